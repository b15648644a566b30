"""A whole run of the tests takes two processes, for two cores.

When the tests are collected this process forks.  The fork runs the files in FORKED and writes what
comes out to a file; the first process runs the others, then reads the file and reports on those
tests as on its own, but for warnings.  Fewer tests than a whole run, as with -k or by name, stay in
one process.
"""
import ast
import contextlib
import os
import signal
import sys
import tempfile

import pytest

FORKED = ("test_checkpoints.py", "test_data.py", "test_dry_run.py", "test_fuzz.py", "test_gpu.py",
          "test_model.py", "test_packed.py", "test_probe.py")           # about half of the time
FEW = 300                                         # tests for which a fork would not pay


class ReportsToFile:
    """What the fork has in place of the terminal."""

    def __init__(self, config, file):
        self.config = config
        self.file = file

    def pytest_runtest_logreport(self, report):
        """Called after a test's fixtures, after its body, and after its clean-up."""
        as_dict = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        print(repr(as_dict), file=self.file, flush=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    """Pytest's hook around the run of session.items."""
    theirs = [test for test in session.items if test.path.name in FORKED]
    ours = [test for test in session.items if test.path.name not in FORKED]
    if sys.platform != "linux" or min(len(theirs), len(ours)) < FEW:
        return (yield)
    with tempfile.TemporaryFile("w+") as file:
        child = os.fork()
        if child == 0:
            plugins = session.config.pluginmanager
            plugins.unregister(name="terminalreporter")
            plugins.register(ReportsToFile(session.config, file))
            session.items = theirs
            return (yield)
        session.items = ours
        try:
            result = yield
        except session.Failed:                    # a failed test and -x; Ctrl-C reaches both
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGINT)
            raise
        finally:
            os.waitpid(child, 0)
        report_on(theirs, file, session)
    return result


def report_on(tests, file, session):
    """Report on the fork's tests, which must all have come to their end, unless -x ended them."""
    hook = session.config.hook
    ended = set()
    file.seek(0)
    for line in file:
        as_dict = ast.literal_eval(line)          # JSON would turn tuples into lists
        report = hook.pytest_report_from_serializable(config=session.config, data=as_dict)
        hook.pytest_runtest_logreport(report=report)
        if report.when == "teardown":
            ended.add(report.nodeid)
    missing = [test.nodeid for test in tests if test.nodeid not in ended]
    if missing and not session.shouldfail:
        raise RuntimeError(f"the second process ended before {missing[0]}")
