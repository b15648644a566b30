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
    assert os.environ["WHAT"] != "crash" or os._exit(6)

def test_d(tmp_path):
    pass
"""


def run_pytest(folder, what, *words):
    """pytest on the small tests, outside this run's two processes -> exit status and output."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_first.py").write_text(FIRST)
    (folder / two_processes.SECOND[0]).write_text(SECOND)
    environment = os.environ | {"WHAT": what}
    environment.pop(two_processes.REPORTS, None)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", ".", *words], cwd=folder,
                          env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout


def test_each_test_is_counted_once_and_a_failed_one_says_why(tmp_path):
    status, output = run_pytest(tmp_path, "no crash")
    assert status == 1
    assert "1 failed, 3 passed" in output
    assert "At index 1 diff: 2 != 3" in output and "said by b" in output


@pytest.mark.parametrize("words, counts", [
    (["-x"], "1 failed, 1 passed"),
    (["-k", "b or d"], "1 failed, 1 passed, 2 deselected"),
    (["--collect-only"], "4 tests collected")])
def test_words_of_the_command_hold_for_both(words, counts, tmp_path):
    assert counts in run_pytest(tmp_path, "no crash", *words)[1]


def test_a_crash_of_the_second_process_is_an_error_and_what_it_reported_counts(tmp_path):
    status, output = run_pytest(tmp_path, "crash")
    assert status == 3
    assert "the second process ended with 6" in output and "1 failed, 1 passed" in output
