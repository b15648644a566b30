"""Claims about tests/lab/results: the page is made of the lines, and a line can be repeated."""
import re

import pytest

import data
from lab import charts, lines, probing, real, study, tables

PROBES = study.RESULTS / "probing.jsonl"               # its lines are of probes alone


def test_the_results_page_is_what_the_study_script_makes_of_the_lines():
    assert (study.RESULTS / "README.md").read_text() == tables.page()


def test_the_readmes_table_has_its_eight_rows_and_no_empty_cell():
    header, _, *rows = study.readme_table().splitlines()
    assert len(rows) == 8
    for row in rows:
        assert row.count("|") == header.count("|") and "not run" not in row


@pytest.mark.parametrize("name", charts.DRAWINGS)
def test_the_figures_are_drawn_from_the_lines(name, tmp_path):
    charts.DRAWINGS[name](tmp_path / name)
    assert (charts.FIGURES / name).read_text() == (tmp_path / name).read_text()


def test_the_page_of_probes_is_made_of_its_lines_and_each_can_be_repeated():
    assert (study.RESULTS / "probing.md").read_text() == probing.page()
    for line in study.read_lines("probing"):
        assert re.fullmatch(r"[0-9a-f]{7,}", line["commit"])
        assert line["command"].startswith(f"python probe.py {' '.join(probing.RUNS[line['name']])}")


@pytest.mark.parametrize("file", sorted(set(study.RESULTS.glob("*.jsonl")) - {PROBES}),
                         ids=lambda f: f.stem)
def test_a_line_names_what_it_takes_to_repeat_its_run(file):
    runs = study.all_runs()
    for line in study.read_lines(file.stem):
        assert re.fullmatch(r"[0-9a-f]{7,}\+?", line["commit"])
        assert line["torch"] and line["device"]
        flags = " ".join(runs[line["key"]].flags)
        shown = line["flags"]
        # older runs: the default of that time
        for added in (" --preset full", " --layout eurosat", " --batch-size 64"):
            flags = flags.replace(added, "")
            shown = shown.replace(added, "")
        assert shown.startswith(flags)


def test_every_run_has_a_key_of_its_study_and_a_seed():
    for key in study.all_runs():
        assert re.fullmatch(r"[a-z]+/[^/]+/(s1|s2c|rgb)/\d", key)


def line(key, *micro):
    return {"key": key, "probes": [{"all": {"checkpoint": {"micro_map": micro}}}]}


def test_equal_values_of_different_splits_all_count_and_repeated_ones_count_once(monkeypatch):
    found = [line("eurosat/a/s2c/0", .8, .9, .8), line("eurosat/b/s2c/0", .8, .8, .8)]
    monkeypatch.setattr(lines, "read_lines", lambda study: found)
    assert lines.values("eurosat/a", "s2c", "micro_map") == [.8, .9, .8]
    assert lines.values("eurosat/b", "s2c", "micro_map") == [.8]


def test_gains_pair_runs_by_their_seed(monkeypatch):
    found = {"long": [line("long/+ soft/s1/2", .7), line("long/+ soft/s1/0", .5),
                      line("long/InfoNCE/s1/0", .4), line("long/InfoNCE/s1/1", .9),
                      line("long/InfoNCE/s1/2", .5)]}
    monkeypatch.setattr(lines, "read_lines", lambda study: found.get(study, []))
    text = tables.gains_section()
    assert "| soft term over InfoNCE | 28 | yes | s1 | +0.150 | 0.050 | 2 |" in text
    assert "| soft term over InfoNCE | 28 | yes | s2c | not run | not run | 0 |" in text


def test_chips_are_divided_by_class_without_overlap(tmp_path):
    """Of 10 chips a class: 7 to pretrain on and fit the head, 3 to test; or 3, 3 and 4."""
    for name in ("Forest", "River"):
        (tmp_path / "chips" / name).mkdir(parents=True)
        for n in range(10):
            (tmp_path / "chips" / name / f"{name}_{n}.tif").touch()
    for share, sizes in ((70, (14, 14, 6)), (30, (6, 6, 8))):
        folder = tmp_path / f"s2c_{share}_1"
        study.make_chips(tmp_path / "chips", folder)
        train = {path.name for path in (folder / "train").glob("*/*")}
        fit = set((folder / "fit.txt").read_text().split())
        test = set((folder / "test.txt").read_text().split())
        assert (len(train), len(fit), len(test)) == sizes
        assert not (train | fit) & test and (fit == train) == (share == 70)
        assert len(list((folder / "all").glob("*/*"))) == 20


def test_uc_merced_is_divided_by_folder_and_labels_are_those_of_the_training_part(tmp_path):
    """Of 10 images a folder 8 train; a share of 30 % are 2 of them."""
    rows = ["image\tsea\tsand"]
    for name in ("beach", "harbour"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for n in range(10):
            (tmp_path / "images" / name / f"{name}{n}.jpg").touch()
            rows.append(f"{name}{n}\t1\t{n % 2}")
    (tmp_path / "LandUse_Multilabeled.txt").write_text("\n".join(rows))
    real.make_ucm(tmp_path, tmp_path / "splits" / "3")
    folder = tmp_path / "splits" / "3"
    train = {path.stem for path in (folder / "train").glob("*/*")}
    test = (folder / "test.txt").read_text().split()
    assert (len(train), len(test)) == (16, 4) and not train & set(test)
    assert sum(name.startswith("beach") for name in test) == 2
    for share, count in ((100, 16), (30, 4)):
        fit = (folder / f"fit_{share}.txt").read_text().split()
        _, table = data.read_table(str(folder / f"train_{share}.tsv"))
        assert len(fit) == count and set(fit) <= train and set(table) == set(fit)
    assert len(data.read_table(str(folder / "labels.tsv"))[1]) == 20
