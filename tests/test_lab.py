"""Claims about tests/lab: each script starts in its small mode, and what it prints is true."""
import json
import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import data
import model
import pretrain
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "lab"))
import bench  # noqa: E402
import dry_run  # noqa: E402
import show  # noqa: E402
import study  # noqa: E402

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("flags", [
    ["--method", "softcon", "--arch", "resnet18"],
    ["--method", "pera", "--crops", "2", "3", "--local-size", "12", "--prototypes", "64"]])
def test_a_dry_run_counts_the_students_parameters_and_names_the_views(packs, capsys, flags):
    flags = ["--modality", "s1", "--data", packs["s1"], "--preset", "toy", "--img-size", "24",
             "--patch-size", "6", "--batch-size", "4", *flags]
    dry_run.main(flags)
    printed = capsys.readouterr().out
    net = pretrain.networks(pretrain.resolve_flags(flags), torch.device("cpu"), quiet=True)
    millions = sum(p.numel() for p in net.student.parameters()) / 1e6
    assert f"student: parameters in millions {millions:.2f}" in printed
    assert re.search(r"views (\(8,2,24,24\)) |student_view (\(8,2,24,24\))", printed)


def draw(folder, *words):
    """The drawing's root, its images and its words."""
    show.main([*map(str, words), "--out", str(folder / "x.svg")])
    root = ElementTree.parse(folder / "x.svg").getroot()
    return list(root.iter(f"{SVG}image")), [text.text for text in root.iter(f"{SVG}text")]


def test_scenes_are_drawn_with_their_images_two_views_two_masks_and_labels(packs, tmp_path):
    pack = data.open_pack(packs["s2c"])
    images, words = draw(tmp_path, "scenes", packs["s2c"], "--n", 3, "--seed", 5)
    chosen = show.some_scenes(pack, 3, 5)
    assert len(images) == sum(len(pack.rows[i]) + 2 + 1 + 1 for i in chosen)
    assert {f"{'ABC'[k]}: {pack.scenes[i]}" for k, i in enumerate(chosen)} <= set(words)
    assert len([word for word in words if re.fullmatch(r"[01]\.\d\d", word)]) == 3 * 3


def test_features_are_drawn_beside_their_images_and_a_curve_has_a_panel_a_term(packs, tmp_path):
    torch.save(model.export_backbone(model.build("vit_tiny", 2, 24, 6)), tmp_path / "tiny.pt")
    flags = ["--data", packs["s1"], "--n", 2, "--img-size", 36]
    images, words = draw(tmp_path, "features", tmp_path / "tiny.pt", *flags)
    assert len(images) == 4
    assert any("36 x 36 pixels, 6 x 6 patches" in word for word in words)
    log = [{"step": i, "info_nce": 3 / i, "soft": 0, "effective_rank": i} for i in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    _, words = draw(tmp_path, "curve", tmp_path / "log.jsonl")
    assert words.count("step") == 3


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
        assert row["status"] == "passed" or "CUDA" in row["reason"] or "zarr" in row["reason"]
        for key, value in row.items():
            assert key in ("status", "reason") or value == 0 and "error" in key or value > 0, name


def line(name, seed, accuracy):
    """A line of a study, as far as a table reads it."""
    networks = {"checkpoint": {"accuracy": accuracy}, "random": {"accuracy": [0.5]}}
    probes = {"ridge": {"curve": [{"train_frac": 1.0, "all": networks}]}}
    return {"study": "made up", "name": name, "seed": seed, "probes": probes, "commit": "abc1234",
            "device": "cpu", "torch": "2.13"}


def test_a_table_has_means_deviations_and_paired_standard_errors():
    """Differences of seeds 0 and 1: .1 and .3, mean .2, its error .1; seed 2 has no pair."""
    lines = [line("a", 0, [0.7, 0.9]), line("a", 1, [0.9]), line("a", 2, [0.1]),
             line("b", 0, [0.7]), line("b", 1, [0.6])]
    column = study.Column("top", "ridge", "accuracy")
    rows = {"A": ("a", "checkpoint"), "B": ("b", "checkpoint"), "floor": ("b", "random"),
            "C": ("c", "checkpoint")}
    table = study.make_table(lines, study.Table("made up", rows, [column]))
    assert table.splitlines()[2:] == [
        "| A | 0.600 ± 0.436 (3) |", "| B | 0.650 ± 0.071 (2) |", "| floor | 0.500 ± 0.000 (2) |",
        "", "`study.py run made up`: not run: C; commit abc1234; device cpu; torch 2.13."]
    gains = study.Table("made up", {"A over B": ("a", "b")}, [column], gains=True)
    assert "| A over B | +0.200 ± 0.100 (2) |" in study.make_table(lines, gains)


def test_the_tables_of_the_results_page_are_those_of_its_lines():
    page = (study.RESULTS / "README.md").read_text()
    assert study.write_tables(page, study.read_lines()) == page
    assert set(re.findall(r"<!-- table: (.*) -->", page)) == set(study.TABLES)
    for table in study.TABLES.values():
        names = {run.name for run in study.all_runs([0]) if run.study == table.study}
        for column in table.columns:
            assert {column.run.format(run) for run, _ in table.rows.values()} <= names


def test_a_tile_is_left_out_and_masks_go_with_their_images(tmp_path):
    rows = [f"tile{i // 4}/{i},tile{i // 4}/{i}.jpg/0_0,,sea" for i in range(12)]
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "images.csv").write_text("\n".join(["scene,image,split,labels", *rows]))
    (tmp_path / "all" / "pack.json").write_text('{"sensor": "rgb", "mask_classes": ["sea"]}')
    np.save(tmp_path / "all" / "images.npy", np.zeros((12, 3, 4, 4), np.uint8))
    np.save(tmp_path / "all" / "masks.npy", np.zeros((12, 4, 4), np.uint8))
    study.relabel(tmp_path / "all", tmp_path / "one", "tiles", seed=1)
    pack = data.open_pack(str(tmp_path / "one"))
    assert pack.split.tolist() == 4 * ["train"] + 4 * ["test"] + 4 * ["train"]
    assert pack.masks.shape == (12, 4, 4) and pack.labels.all()


def test_a_pack_gets_other_labels_and_a_split_of_each_class(tmp_path):
    rows = ["scene,image,split,labels"]
    for i in range(10):
        rows += [f"beach/{i},beach/{i},,sand;sea", f"park/{i},park/{i},,trees"]
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "images.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "all" / "pack.json").write_text('{"sensor": "rgb"}')
    np.save(tmp_path / "all" / "images.npy", np.zeros((20, 3, 4, 4), np.uint8))
    labels = {"labels": [[1, 1, 0], [0, 0, 1]], "classes": [[1, 0], [0, 1]],
              "coarse": [[1, 0, 1], [0, 1, 0]]}                   # bare, vegetation, water
    for labelling, of_two in labels.items():
        study.relabel(tmp_path / "all", tmp_path / labelling, labelling, seed=1)
        pack = data.open_pack(str(tmp_path / labelling))
        assert pack.labels.tolist() == 10 * of_two
        for k in range(2):
            assert (pack.split[k::2] == "train").sum() == 8 and (pack.split == "test").sum() == 4
