"""Each script of tests/lab starts in its small mode, and the results page is that of its lines."""
import json
import sys
from xml.etree import ElementTree

import pytest

from conftest import ROOT, save_backbone

sys.path.insert(0, str(ROOT / "tests" / "lab"))
import bench  # noqa: E402
import dry_run  # noqa: E402
import show  # noqa: E402
import study  # noqa: E402


@pytest.mark.parametrize("method, view", [("softcon", "views (8,2,24,24)"),
                                          ("pera", "student_view (8,2,24,24)")])
def test_a_dry_run_names_the_views_of_a_step(packs, capsys, method, view):
    dry_run.main(["--modality", "s1", "--data", packs["s1"], "--method", method, "--preset", "toy",
                  "--arch", "vit_tiny", "--img-size", "24", "--patch-size", "6", "--batch-size",
                  "4", *(["--local-size", "12"] if method == "pera" else [])])
    assert view in capsys.readouterr().out


def test_show_draws_scenes_features_and_a_curve(packs, tmp_path):
    vit = save_backbone(tmp_path / "tiny.pt", "vit_tiny", 2, 24, 6)
    log = [{"step": i, "info_nce": 3 / i, "soft": 0, "effective_rank": i} for i in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    commands = {("scenes", packs["s2c"], "--n", "3"): 3 * (4 + 2 + 1 + 1),     # images in it
                ("features", vit, "--data", packs["s1"], "--n", "2"): 2 * 2,
                ("curve", str(tmp_path / "log.jsonl")): 0}
    for words, images in commands.items():
        show.main([*words, "--out", str(tmp_path / "x.svg")])
        root = ElementTree.parse(tmp_path / "x.svg").getroot()
        assert len([*root.iter("{http://www.w3.org/2000/svg}image")]) == images


def test_maps_are_drawn_as_image_mask_and_guess_with_the_names_of_the_classes(tmp_path):
    x = np.full((8, 2, 16, 16), 50, np.uint8)
    x[:, :, 8:] = 200
    (tmp_path / "p").mkdir()
    np.save(tmp_path / "p" / "images.npy", x)
    np.save(tmp_path / "p" / "masks.npy", (x[:, 0] > 100).astype(np.uint8))
    rows = [f"{i},{i},{'train' if i < 5 else 'test'}," for i in range(8)]
    (tmp_path / "p" / "images.csv").write_text("\n".join(["scene,image,split,labels", *rows]))
    (tmp_path / "p" / "pack.json").write_text('{"sensor": "s1", "mask_classes": ["sea", "land"]}')
    torch.save(model.export_backbone(model.build("vit_tiny", 2, 16, 4)), tmp_path / "tiny.pt")
    images, words = draw(tmp_path, "maps", tmp_path / "tiny.pt", "--data", tmp_path / "p", "--n", 2)
    pixels = [image.get("href") for image in images]
    assert len(pixels) == 6 and {"sea", "land", "image", "mask", "guess"} <= set(words)
    assert pixels[1] == pixels[2] == pixels[4] == pixels[5] != pixels[0]      # a perfect guess


def test_the_small_bench_gives_positive_numbers_or_says_what_is_missing(tmp_path):
    assert bench.main(["--small", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert list(rows) == list(bench.ROWS)
    for name, row in rows.items():
        assert row["status"] == "passed" or row["reason"] == "needs CUDA"
        for key, value in row.items():
            assert key in ("status", "reason") or value == 0 and "error" in key or value > 0, name


def test_the_tables_of_the_results_page_are_those_of_its_lines():
    page = (study.RESULTS / "README.md").read_text()
    assert study.write_tables(page, study.read_lines()) == page
