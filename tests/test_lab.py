"""Each script of tests/lab starts in its small mode; results/README.md is made of its lines."""
import json
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from conftest import ROOT, save_backbone, write_pack

sys.path.insert(0, str(ROOT / "tests" / "lab"))
import bench  # noqa: E402
import dry_run  # noqa: E402
import show  # noqa: E402
import study  # noqa: E402
import why  # noqa: E402


@pytest.mark.parametrize("method, view", [("softcon", "views (8,2,24,24)"),
                                          ("pera", "student_view (8,2,24,24)")])
def test_a_dry_run_names_the_views_of_a_step(packs, capsys, method, view):
    dry_run.main(["--modality", "s1", "--data", packs["s1"], "--method", method, "--preset", "toy",
                  "--arch", "vit_tiny", "--img-size", "24", "--patch-size", "6", "--batch-size",
                  "4", *(["--local-size", "12"] if method == "pera" else [])])
    assert view in capsys.readouterr().out


def test_show_draws_scenes_features_maps_and_a_curve(packs, tmp_path):
    vit = save_backbone(tmp_path / "tiny.pt", "vit_tiny", 2, 24, 6)
    log = [{"step": i, "info_nce": 3 / i, "soft": 0, "knn": i} for i in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    x = np.full((8, 2, 24, 24), 50, np.uint8)
    x[:, :, 12:] = 200
    rows = [f"{i},{i},{'train' if i < 5 else 'test'}," for i in range(8)]
    index = {"sensor": "s1", "mask_classes": ["sea", "land"]}
    masked = write_pack(tmp_path / "p", x, rows, index)
    np.save(tmp_path / "p" / "masks.npy", (x[:, 0] > 100).astype(np.uint8))
    commands = {("scenes", packs["s2c"], "--n", "3"): 3 * (4 + 2 + 1 + 1),     # images in it
                ("features", vit, "--data", packs["s1"], "--n", "2"): 2 * 2,
                ("maps", vit, "--data", masked, "--n", "2"): 3 * 2,
                ("curve", str(tmp_path / "log.jsonl")): 0}
    for words, images in commands.items():
        show.main([*words, "--out", str(tmp_path / "x.svg")])
        root = ElementTree.parse(tmp_path / "x.svg").getroot()
        assert len([*root.iter("{http://www.w3.org/2000/svg}image")]) == images


def test_the_small_bench_gives_positive_numbers_or_says_what_is_missing(tmp_path):
    assert bench.main(["--small", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert list(rows) == list(bench.ROWS)
    for name, row in rows.items():
        assert row["status"] == "passed" or row["reason"] == "needs CUDA"
        for key, value in row.items():
            assert key in ("status", "reason") or value == 0 and "error" in key or value > 0, name


def test_a_study_of_no_runs_and_a_look_at_none_start(tmp_path, capsys):
    study.main(["run", "--work", str(tmp_path)])
    why.main(str(tmp_path))
    assert capsys.readouterr().out.startswith("0 runs: \nrun")


def test_the_tables_of_the_results_page_are_made_of_the_jsonl_files_beside_it():
    page = (study.RESULTS / "README.md").read_text()
    assert study.write_tables(page, study.read_lines()) == page
