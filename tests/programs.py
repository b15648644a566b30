"""Programs that tests start, without a new import of PyTorch for each of them.

The import takes seconds.  So one process beside pytest does it, and every program is a fork of that
process: it has signals, an exit status, output, an environment and a folder of its own.  It runs a
script from its first line, as `python script.py` does, or calls a function.
"""
import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import model
from conftest import FEW_BLOCKS, ROOT

forks = multiprocessing.get_context("forkserver")
# what the scripts import, and torch._dynamo, which the first optimiser of a process imports
forks.set_forkserver_preload(["pytest", "torch._dynamo", "torch.distributed.run", "pretrain",
                              "probe", "programs"])


@dataclass
class Ended:
    """What is left of a program."""
    code: int                   # exit status; -9 if signal 9 ended it
    out: str
    err: str


class Program:
    """A process of its own, and a group of its own, that calls function(*arguments).

    environment: variables to add to those that the first program began with.
    """

    def __init__(self, function, *arguments, folder=ROOT, environment=None):
        self.output = tempfile.TemporaryDirectory()
        for name in ("out", "err"):
            Path(self.output.name, name).touch()
        # for processes that it starts itself, as if it had not come from the fork server
        method = multiprocessing.get_start_method()
        self.process = forks.Process(target=run, args=(
            method, self.output.name, str(folder), environment or {}, function, arguments))
        self.process.start()
        self.pid = self.process.pid

    def running(self):
        return self.process.is_alive()

    def out(self):
        """What it has printed so far."""
        return Path(self.output.name, "out").read_text()

    def err(self):
        return Path(self.output.name, "err").read_text()

    def kill(self):
        """Kill it and its group.  Ranks that torchrun started have groups of their own."""
        with contextlib.suppress(ProcessLookupError):      # it has no group yet, or all have ended
            os.killpg(self.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()

    def end(self, seconds=90):
        """Wait for its end."""
        self.process.join(seconds)
        assert not self.running(), f"it runs for more than {seconds} s"
        return Ended(self.process.exitcode, self.out(), self.err())


def run(method, output, folder, environment, function, arguments):
    """Set up the new process, then call the function."""
    os.setsid()
    multiprocessing.set_start_method(method, force=True)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}/{name}", os.O_WRONLY | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.update(environment)
    function(*arguments)


def script(name, *words):
    """Run ROOT/name as `python name words...` does."""
    sys.argv = [name, *map(str, words)]
    runpy.run_path(str(ROOT / name), run_name="__main__")


def take_few_blocks():
    """Give this process the networks of conftest's few_blocks."""
    model.RESNETS["resnet18"] = FEW_BLOCKS["resnet18"]
    model.VITS["vit_tiny"] = FEW_BLOCKS["vit_tiny"]


def script_with_few_blocks(name, *words):
    """The same as script, with few blocks."""
    take_few_blocks()
    script(name, *words)


def end_well(programs):
    """Wait for the end of all, which must be without an error."""
    for program in programs:
        done = program.end()
        assert done.code == 0, done.err


def rank_environments(world):
    """The variables by which torchrun tells each of `world` processes its place."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    everyone = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [everyone | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
