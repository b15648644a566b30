"""The README and the house rules, held to account."""
import ast
import re
import shlex

import pytest

import data
import losses
import model
import pretrain
import probe
from conftest import ROOT

README = (ROOT / "README.md").read_text()
BUDGET = {"model.py": 455, "losses.py": 243, "data.py": 691, "pretrain.py": 693, "probe.py": 412}


@pytest.mark.parametrize("name, budget", BUDGET.items())
def test_files_keep_their_line_budget_and_100_columns(name, budget):
    lines = (ROOT / name).read_text().splitlines()
    assert sum(bool(x.strip()) for x in lines) <= budget
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("name", ["model.py", "losses.py", "data.py"])
def test_imports_form_a_tree(name):
    tree = ast.parse((ROOT / name).read_text())
    found = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    found |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not found & {x.removesuffix(".py") for x in BUDGET}


def test_every_flag_in_the_readmes_commands_exists(capsys):
    shown = re.findall(r"(pretrain|probe|data)\.py( [^`\n]*)", README)
    assert len(shown) > 6
    for script, rest in shown:
        module = {"pretrain": pretrain, "probe": probe, "data": data}[script]
        with pytest.raises(SystemExit):
            (module.parse if script == "pretrain" else module.main)(
                ["--help"] if script != "data" else [rest.split()[0], "--help"])
        known = capsys.readouterr().out
        for word in shlex.split(rest.split("&&")[0].rstrip("\\"), comments=True):
            if word.startswith("--"):
                assert word.split("=")[0] in known, (script, word)


def test_every_symbol_the_readme_names_exists():
    modules = {"data": data, "losses": losses, "model": model, "pretrain": pretrain, "probe": probe}
    named = re.findall(r"(\w+)\.py:(\w+)", README)
    assert named and all(hasattr(modules[m], symbol) for m, symbol in named)


def test_the_first_command_stands_before_line_25():
    lines = README.splitlines()
    assert next(i for i, x in enumerate(lines, 1) if "torchrun pretrain.py" in x) < 25
    assert len(lines) <= 345


@pytest.mark.parametrize("module", [pretrain, probe, data])
def test_help_explains_and_holds_no_format_leftovers(module, capsys):
    with pytest.raises(SystemExit):
        (module.parse if module is pretrain else module.main)(["--help"])
    said = capsys.readouterr().out
    assert len(said) > 300 and "{'" not in said and "%" not in said.replace(" %", "")
