"""Shared by the tests: the repository on the path, one small toy world, flags, slow scripts."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "lab")]
sys.path[:0] = FOLDERS
os.environ["PYTHONPATH"] = os.pathsep.join(FOLDERS)            # for the scripts that tests start
# Sizes are small: more threads would mostly wait for each other.  Torch reads it when imported.
os.environ["OMP_NUM_THREADS"] = "1"

import data  # noqa: E402
import model  # noqa: E402

# a short training run of a small network
SMALL = ["--img-size", "24", "--patch-size", "6", "--hidden", "32", "--batch-size", "8", "--epochs",
         "4", "--log-every", "1", "--save-every", "100", "--workers", "0", "--preset", "full"]

# the two smallest networks with fewer blocks, for claims that do not depend on their number
FEW_BLOCKS = {"resnet18": dict(depths=(1, 1, 1, 1), bottleneck=False),
              "vit_tiny": dict(width=192, depth=2, heads=3)}


@pytest.fixture
def few_blocks(monkeypatch):
    monkeypatch.setitem(model.RESNETS, "resnet18", FEW_BLOCKS["resnet18"])
    monkeypatch.setitem(model.VITS, "vit_tiny", FEW_BLOCKS["vit_tiny"])


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """60 scenes of 24 px."""
    return data.make_toy(str(tmp_path_factory.mktemp("toy") / "world"), 60, 24, seed=1)


@pytest.fixture
def labels(toy):
    return f"{toy}/ssl4eo_multilabel.json"


@pytest.fixture
def start():
    """A function that starts a programs.Program; those that a failed test leaves are killed."""
    from programs import Program                  # here, since it imports this file
    started = []

    def start_program(function, *arguments, **options):
        started.append(Program(function, *arguments, **options))
        return started[-1]
    yield start_program
    for program in started:
        program.kill()


class SlowScript:
    """A script of the lab in an interpreter of its own; what it prints goes to a file."""

    def __init__(self, folder, name, *words):
        self.output = folder / "output.txt"
        command = [sys.executable, str(ROOT / "tests" / "lab" / name), *map(str, words)]
        with self.output.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file)

    def end(self):
        """Wait for its end, at most five minutes -> exit status and output."""
        return self.process.wait(300), self.output.read_text()


@pytest.fixture(scope="session")
def slow_script(tmp_path_factory):
    """A function that starts a SlowScript; those that still run after all tests are killed."""
    started = []

    def start_script(name, *words):
        started.append(SlowScript(tmp_path_factory.mktemp("script"), name, *words))
        return started[-1]
    yield start_script
    for script in started:
        script.process.kill()


@pytest.fixture(scope="session")
def gpu_script(slow_script, tmp_path_factory):
    """gpu.py's small mode, and the file to which it writes its rows."""
    rows = tmp_path_factory.mktemp("gpu") / "rows.json"
    return slow_script("gpu.py", "--device", "cpu", "--small", "--json", rows), rows


@pytest.fixture(scope="session")
def kill_script(slow_script):
    """Two kills while a training starts, two amid its steps, two while it saves."""
    return slow_script("kill.py", "--kills", 6)


@pytest.fixture(scope="session")
def fuzz_script(slow_script):
    return slow_script("fuzz.py", "--cases", 180, "--seed", 1)


@pytest.fixture(scope="session", autouse=True)
def start_ahead(request):
    """What the chosen tests will wait for starts before the first test, for the other cores."""
    wanted = {name for test in request.session.items for name in test.fixturenames}
    if "start" in wanted:
        from programs import start_server         # here, since it imports this file
        start_server()
    for name in ("gpu_script", "fuzz_script", "kill_script"):
        if name in wanted:
            request.getfixturevalue(name)
