"""A whole run of the tests takes two processes, for two cores.

The first process starts the second, the same command with a file to report to.  Each of them runs
its half of the test files.  Then the first one passes on what the second reported, test by test.
Its warnings are not passed on.
"""
import ast
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SECOND = ("test_checkpoints.py", "test_data.py", "test_dry_run.py", "test_fuzz.py", "test_gpu.py",
          "test_model.py", "test_packed.py", "test_probe.py")           # about half of the time
FEW = 300                                         # a half with fewer tests is not worth a process
REPORTS = "SECOND_PROCESS_REPORTS_TO"             # environment variable that only the second has


class ReportsToFile:
    """What the second process has beside its terminal, which nobody sees."""

    def __init__(self, config, path):
        self.config = config
        self.file = open(path, "w")

    def pytest_runtest_logreport(self, report):
        """Called after the fixtures of a test, after its body, and after its clean-up."""
        as_dict = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        print(ascii(as_dict), file=self.file, flush=True)      # JSON would turn tuples into lists


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    """Pytest's hook around the run of session.items."""
    first = [test for test in session.items if test.path.name not in SECOND]
    second = [test for test in session.items if test.path.name in SECOND]
    if REPORTS in os.environ:
        session.config.pluginmanager.register(ReportsToFile(session.config, os.environ[REPORTS]))
        session.items = second
        return (yield)
    if min(len(first), len(second)) < FEW or needs_one_process(session.config.option):
        return (yield)
    session.items = first
    with tempfile.TemporaryDirectory() as folder:
        process = start_again(session.config.invocation_params, Path(folder))
        try:
            result = yield
        except BaseException:
            process.send_signal(signal.SIGINT)    # what ends the first process ends the second
            raise
        finally:
            process.wait()
            pass_on_reports(session.config, Path(folder))
        if process.returncode not in (0, 1):      # 1: a test failed
            output = Path(folder, "output.txt").read_text()
            raise RuntimeError(f"the second process ended with {process.returncode}:\n{output}")
    return result


def needs_one_process(option):
    """Runs nothing, or asks at the terminal, or has one folder for what tests write."""
    return option.collectonly or option.usepdb or option.basetemp


def start_again(params, folder):
    """This command as another process."""
    command = [sys.executable, "-m", "pytest", *params.args]
    environment = os.environ | {REPORTS: str(folder / "reports.txt")}
    with open(folder / "output.txt", "w") as output:
        return subprocess.Popen(command, cwd=params.dir, env=environment, stdout=output,
                                stderr=output)


def pass_on_reports(config, folder):
    """Say of the second process's tests what pytest says of its own."""
    file = folder / "reports.txt"
    if not file.exists():                         # it did not come so far
        return
    for line in file.read_text().splitlines():
        as_dict = ast.literal_eval(line)
        report = config.hook.pytest_report_from_serializable(config=config, data=as_dict)
        config.hook.pytest_runtest_logreport(report=report)
