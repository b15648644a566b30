"""Claims about two_processes.py, on a folder of four small tests."""
import os
import subprocess
import sys

import pytest

import two_processes

CONFTEST = """
import two_processes
from two_processes import pytest_runtestloop
two_processes.FEW = 1
"""
FIRST = """
def test_a():
    pass
"""
SECOND = """
import os

def test_b():
    print("said by b")
    assert [1, 2] == [1, 3]

def test_c():
    if os.environ["WHAT"] != "go on":
        os._exit(int(os.environ["WHAT"]))

def test_d(tmp_path):
    pass
"""


def run_pytest(folder, what, *words):
    """pytest on the small tests, outside this run's two processes -> exit status and output."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_first.py").write_text(FIRST)
    (folder / two_processes.SECOND[0]).write_text(SECOND)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", ".", *words], cwd=folder,
                          env=os.environ | {"WHAT": what}, capture_output=True, text=True,
                          timeout=60)
    return done.returncode, done.stdout


def test_each_test_is_counted_once_and_a_failed_one_says_why(tmp_path):
    status, output = run_pytest(tmp_path, "go on")
    assert status == 1
    assert "1 failed, 3 passed" in output
    assert "At index 1 diff: 2 != 3" in output and "said by b" in output


@pytest.mark.parametrize("words, counts", [
    (["-x"], "1 failed, 1 passed"),
    (["-k", "b or d"], "1 failed, 1 passed, 2 deselected"),
    (["--collect-only"], "4 tests collected")])
def test_words_of_the_command_hold_for_both(words, counts, tmp_path):
    assert counts in run_pytest(tmp_path, "go on", *words)[1]


@pytest.mark.parametrize("code", ["0", "1", "6"])
def test_if_the_second_process_ends_too_early_that_is_an_error_and_what_it_reported_counts(
        code, tmp_path):
    status, output = run_pytest(tmp_path, code)
    assert status == 3
    assert f"the second process ended with {code} after 1 of 3 tests" in output
    assert "1 failed, 1 passed" in output
