"""The README, held to account: what it names exists, what it shows is so, its code runs."""
import re

import pytest
import torch

import data
import losses
import model
import pretrain
import probe
from conftest import ROOT
from lab import study

README = (ROOT / "README.md").read_text()
MODULES = {"data": data, "losses": losses, "model": model, "pretrain": pretrain, "probe": probe}


def fences(language):
    """The fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def table_under(heading):
    """The rows of the first table after a heading, each a list of cells."""
    rows = []
    for line in README.partition(heading)[2].splitlines():
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            break
    return rows


def help_of(command, capsys):
    """What `python SCRIPT [COMMAND] --help` prints."""
    script, *rest = command
    run = {"pretrain.py": pretrain.parse, "probe.py": probe.main, "data.py": data.main}[script]
    with pytest.raises(SystemExit) as end:
        run([*rest, "--help"])
    assert end.value.code in (0, None)
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [
    ["pretrain.py"], ["probe.py"], ["data.py", "check"], ["data.py", "pack"], ["data.py", "stats"]])
def test_every_flag_in_the_readmes_commands_exists(command, capsys):
    shown = "".join(fences("bash")).replace("\\\n", " ")
    name = " ".join(command).replace(".", r"\.")
    lines = re.findall(rf"{name}( [^#\n]*)", shown)
    if command[-1] in ("pretrain.py", "probe.py"):
        assert lines
    known = help_of(command, capsys)
    for line in lines:
        for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", line):
            assert flag in known, (command, flag)


def test_every_symbol_the_readme_names_exists():
    named = re.findall(r"(\w+)\.py:(\w+)", README)
    assert len(named) > 3
    for module, symbol in named:
        assert hasattr(MODULES[module], symbol), symbol


def test_the_install_and_test_commands_are_the_ones_that_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    for command in ("pip install -r requirements.txt", "python -m pytest -q tests"):
        assert command in README and command in ci


def test_every_local_link_and_picture_is_there():
    links = [x for x in re.findall(r"\]\(([^)]+)\)", README) if not x.startswith("http")]
    assert len(links) > 8
    for link in links:
        assert (ROOT / link).exists(), link


def test_every_equation_of_the_readme_is_computed_where_the_code_says_so():
    code = "".join((ROOT / f"{name}.py").read_text() for name in MODULES)
    for number in range(1, 12):
        assert f"({number})" in README and f"# eq. ({number})" in code, number


def test_the_preset_table_is_that_of_pretrain():
    columns = [("softcon", "toy"), ("softcon", "small"), ("softcon", "full"),
               ("pera", "toy"), ("pera", "small"), ("pera", "full")]
    head, _, *rows = table_under("Presets (toy")
    assert head[1:-1] == [" ".join(column) for column in columns]
    shown = {row[0].strip("`").removeprefix("--").replace("-", "_"): row[1:] for row in rows}
    assert set(shown) == set().union(*(pretrain.PRESETS[column] for column in columns))
    for name, cells in shown.items():
        for column, cell in zip(columns, cells):
            value = pretrain.PRESETS[column].get(name, "-")
            if isinstance(value, list):
                value = " ".join(map(str, value))
            assert cell == str(value), (name, column)


def test_the_results_are_those_of_the_result_files():
    assert study.readme_table().strip() in README


def test_the_nine_classes_are_those_of_the_labels():
    text = " ".join(README.split())
    for number, name in enumerate(data.CLASSES):
        assert f"{number} {name}" in text


def test_the_python_that_uses_a_backbone_runs(tmp_path, monkeypatch):
    (tmp_path / "runs/softcon_s1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    network = model.build("resnet18", 2)
    torch.save(model.export_backbone(network), "runs/softcon_s1/backbone.pt")
    code, = fences("python")
    names = {}
    exec(code, names)
    assert names["features"].shape == (1, 512)
    with torch.no_grad():
        again = network.eval()(names["x"])
    assert torch.allclose(names["features"], again, atol=1e-5)
    assert 0 < names["x"].min() and names["x"].max() < 1


@pytest.mark.parametrize("script", ["pretrain.py", "probe.py", "data.py"])
def test_help_explains_and_holds_no_format_leftovers(script, capsys):
    said = help_of([script], capsys)
    assert len(said) > 100 and "%(" not in said and "{'" not in said
