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

README = (ROOT / "README.md").read_text()
MODULES = {"data": data, "losses": losses, "model": model, "pretrain": pretrain, "probe": probe}


def fences(language):
    """The fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def table_with(cell):
    """The rows, lists of cells, of the table whose head has this cell."""
    rows = []
    for line in README.splitlines():
        cells = [text.strip() for text in line.strip("|").split("|")]
        if line.startswith("|") and (rows or cell in cells):
            rows.append(cells)
        elif rows:
            return rows
    return rows


def help_of(command, capsys):
    """What `python SCRIPT [COMMAND] --help` prints."""
    script, *rest = command.split()
    with pytest.raises(SystemExit) as end:
        MODULES[script.removesuffix(".py")].main([*rest, "--help"])
    assert end.value.code in (0, None)
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["pretrain.py", "probe.py", "data.py pack", "data.py stats"])
def test_every_flag_in_the_readmes_commands_is_in_the_help(command, capsys):
    shown = "".join(fences("bash")).replace("\\\n", " ")
    lines = re.findall(rf"{re.escape(command)}( [^#\n]*)", shown)
    assert lines
    known = help_of(command, capsys)
    for line in lines:
        for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", line):
            assert flag in known, (command, flag)


@pytest.mark.parametrize("script", ["pretrain.py", "probe.py", "data.py", "model.py"])
def test_help_explains_and_holds_no_format_leftovers(script, capsys):
    said = help_of(script, capsys)
    assert len(said) > 100 and "%(" not in said and "{'" not in said


def test_every_symbol_the_readme_names_exists():
    named = re.findall(r"(\w+)\.py:(\w+)", README)
    assert named
    for module, symbol in named:
        assert hasattr(MODULES[module], symbol), symbol


def test_every_sensor_protocol_and_command_the_readme_names_exists():
    for name in re.findall(r"--modality (\S+)", "".join(fences("bash"))):
        assert name in data.SENSORS or name.endswith(".json"), name
    for name in re.findall(r"--protocol (\S+)", README):
        assert name.strip("`") in probe.PROTOCOLS or name.endswith("`"), name
    protocols = " ".join(row[0] for row in table_with("`--protocol`")[2:])
    assert set(re.findall(r"`([\w-]+)`", protocols)) == set(probe.PROTOCOLS)


def test_the_install_and_test_commands_are_the_ones_that_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    for command in ("pip install -r requirements.txt", "python -m pytest -q tests"):
        assert command in README and command in ci


def test_the_numbers_of_the_first_table_put_the_network_above_both_floors():
    [table] = [block for block in fences("text") if "random " in block]
    value = {}
    for line in table.splitlines()[1:]:
        name, *numbers = line.split()
        value[name] = [float(number) for number in numbers]
    for floor in ("random", "stats"):
        assert all(a > b for a, b in zip(value["checkpoint"], value[floor], strict=True))


def test_every_local_link_and_picture_is_there():
    links = [x for x in re.findall(r"\]\(([^)]+)\)", README) if not x.startswith("http")]
    assert len(links) > 8
    for link in links:
        assert (ROOT / link).exists(), link


def test_every_equation_number_of_the_readme_stands_in_a_comment_of_the_code():
    code = "".join((ROOT / f"{name}.py").read_text() for name in MODULES)
    for number in range(1, 12):
        assert re.search(rf"\({number}\b", README) and f"# eq. ({number})" in code, number


def test_the_number_of_lines_of_each_file_is_right_to_ten():
    rows = table_with("lines")[2:]
    assert len(rows) == len(MODULES)
    for name, lines, _ in rows:
        file = re.match(r"\[(\w+\.py)\]", name)[1]
        assert abs(int(lines) - len((ROOT / file).read_text().splitlines())) <= 10, file


def test_the_preset_table_is_that_of_pretrain():
    columns = [("softcon", "toy"), ("softcon", "small"), ("softcon", "full"),
               ("pera", "toy"), ("pera", "small"), ("pera", "full")]
    head, _, *rows = table_with("softcon toy")
    assert head[1:-1] == [" ".join(column) for column in columns]
    assert len(rows) > 10
    for flag, *cells, _ in rows:
        name = flag.strip("`").removeprefix("--").replace("-", "_")
        values = [pretrain.PRESETS[column].get(name, "-") for column in columns]
        for value, cell in zip(values, cells, strict=True):
            words = [str(number) for number in value] if isinstance(value, list) else [str(value)]
            assert cell == " ".join(words), (name, cell)


def test_the_pack_by_hand_and_the_use_of_a_backbone_run_as_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_hand, use = fences("python")
    exec(by_hand, {})
    pack = data.open_pack("mine")
    assert pack.images.shape == (4, 3, 64, 64) and pack.classes == ["trees", "water"]
    assert pack.labels.all() and len(pack.scenes) == 4

    (tmp_path / "runs/softcon_s1").mkdir(parents=True)
    network = model.build("resnet18", 2)
    torch.save(model.export_backbone(network), "runs/softcon_s1/backbone.pt")
    names = {}
    exec(use, names)
    assert names["features"].shape == (1, 512)
    with torch.no_grad():
        again = network.eval()(names["x"])
    assert torch.allclose(names["features"], again, atol=1e-5)
    assert 0 < names["x"].min() and names["x"].max() < 1
