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
    reports = os.environ.pop(REPORTS, None)
    if reports:
        session.config.pluginmanager.register(ReportsToFile(session.config, reports))
        session.items = second
        return (yield)
    if min(len(first), len(second)) < FEW or needs_one_process(session.config.option):
        return (yield)
    session.items = first
    with tempfile.TemporaryDirectory() as folder:
        process = start_again(session.config.invocation_params, Path(folder))
        try:
            result = yield
            process.wait()
        except BaseException:                     # what ends the first process ends the second
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
        finally:
            ended = pass_on_reports(session.config, Path(folder, "reports.txt"))
        output = Path(folder, "output.txt").read_text()
    code = process.returncode
    whole = code in (0, 1) and len(ended) == len(second)      # 1: a test failed
    if not whole and not session.shouldfail:      # shouldfail: -x or --maxfail cut it short
        raise RuntimeError(f"the second process ended with {code} after {len(ended)} of "
                           f"{len(second)} tests:\n{output}")
    return result


def needs_one_process(option):
    """Runs nothing, or asks at the terminal, or stops and remembers, or has one folder to write."""
    stepwise = getattr(option, "stepwise", False)
    return option.collectonly or option.usepdb or stepwise or option.basetemp


def start_again(params, folder):
    """This command as another process."""
    command = [sys.executable, "-m", "pytest", *params.args]
    environment = os.environ | {REPORTS: str(folder / "reports.txt")}
    with open(folder / "output.txt", "w") as output:
        return subprocess.Popen(command, cwd=params.dir, env=environment, stdout=output,
                                stderr=output)


def pass_on_reports(config, file):
    """Say of the second process's tests what pytest says of its own -> the names of those that came
    to their end."""
    ended = set()
    lines = file.read_text().splitlines() if file.exists() else []
    for line in lines:
        try:
            as_dict = ast.literal_eval(line)
        except (SyntaxError, ValueError):         # a full disk cut it off
            break
        report = config.hook.pytest_report_from_serializable(config=config, data=as_dict)
        config.hook.pytest_runtest_logreport(report=report)
        if report.when == "teardown":
            ended.add(report.nodeid)
    return ended
