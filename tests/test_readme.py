"""The README and the house rules, held to account."""
import ast
import re

import pytest

import data
import losses
import model
import pretrain
import probe
import study
from conftest import ROOT

README = (ROOT / "README.md").read_text()
BUDGET = {"model.py": 458, "losses.py": 237, "data.py": 708, "pretrain.py": 697, "probe.py": 417}


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
        for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", rest.split("#")[0].split("&&")[0]):
            assert flag in known, (script, flag)


def test_every_symbol_the_readme_names_exists():
    modules = {"data": data, "losses": losses, "model": model, "pretrain": pretrain, "probe": probe}
    named = re.findall(r"(\w+)\.py:(\w+)", README)
    assert named and all(hasattr(modules[m], symbol) for m, symbol in named)


def test_the_first_command_stands_before_line_25_of_at_most_260():
    lines = README.splitlines()
    assert next(i for i, x in enumerate(lines, 1) if "torchrun pretrain.py" in x) < 25
    assert len(lines) <= 260


def test_the_install_and_test_commands_are_the_ones_that_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    for command in ("pip install -r requirements.txt", "python -m pytest -q tests"):
        assert command in README and command in ci


def test_every_local_link_resolves():
    links = re.findall(r"\]\(([^)]+)\)", README)
    headings = {re.sub(r"[^a-z0-9 -]", "", x.lower()).strip().replace(" ", "-")
                for x in re.findall(r"^#+ (.*)$", README, re.M)}
    assert len(links) > 3 and all(
        x[1:] in headings if x[0] == "#" else (ROOT / x).is_file() for x in links), links


def test_every_equation_of_the_readme_is_computed_where_the_code_says_so():
    code = "".join((ROOT / name).read_text() for name in BUDGET)
    assert [code.count(f"# eq. ({n})") for n in range(1, 12)] == [1] * 11
    assert all(f"({n})" in README for n in range(1, 12))


def test_every_result_in_the_readme_is_the_one_in_its_file():
    text = " ".join(README.split())
    tables = [*study.tables()]
    assert len(tables) > 25 and [x for x in tables if x not in text] == []
    shown = README.partition("## Results")[2].partition("## Where")[0].splitlines()
    assert [x for x in shown if x.startswith("|") and x not in tables] == []


def test_a_result_line_names_what_it_takes_to_repeat_it():
    plan = study.listing()
    for file in (ROOT / "tests" / "results").glob("*.jsonl"):
        for row in study.rows(file.stem):
            assert row["key"] in plan and re.fullmatch(r"[0-9a-f]{7,}\+?", row["commit"])
            assert row["torch"] and row["device"]
            assert row["flags"].startswith(" ".join(plan[row["key"]][0]))


def test_a_table_keeps_equal_values_of_one_run_and_pairs_seeds_by_their_number(monkeypatch):
    def row(key, *micro):
        return {"key": key, "probes": [{"all": {"checkpoint": {"micro_map": micro}}}]}
    lines = {"long": [row("long/+ soft/s1/2", .7), row("long/+ soft/s1/0", .5),
                      row("long/InfoNCE/s1/0", .4), row("long/InfoNCE/s1/1", .9),
                      row("long/InfoNCE/s1/2", .5)],
             "eurosat": [row("eurosat/a/s2c/0", .8, .9, .8), row("eurosat/b/s2c/0", .8, .8, .8)]}
    monkeypatch.setattr(study, "rows", lambda study: lines.get(study, []))
    assert study.values("eurosat/a", "s2c", "micro_map") == [.8, .9, .8]
    assert study.values("eurosat/b", "s2c", "micro_map") == [.8]
    assert "28 epochs +0.150 (0.050), not run;" in next(study.gains())


@pytest.mark.parametrize("module", [pretrain, probe, data])
def test_help_explains_and_holds_no_format_leftovers(module, capsys):
    with pytest.raises(SystemExit):
        (module.parse if module is pretrain else module.main)(["--help"])
    said = capsys.readouterr().out
    assert len(said) > 300 and "{'" not in said and "%" not in said.replace(" %", "")
