"""Shared by the tests: the repository on the path, two processes, one small toy world, flags."""
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
from two_processes import pytest_runtestloop  # noqa: E402, F401

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


@pytest.fixture(scope="session")
def packs(toy):
    """{modality: path of the toy world's pack}."""
    paths = {}
    for modality in ("s1", "s2c"):
        archive = data.open_archive(toy, data.SENSORS[modality])
        paths[modality] = f"{toy}_{modality}"
        data.pack(archive, paths[modality], workers=1)
    return paths


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


def run_script(name, *words):
    """A script of the lab in an interpreter of its own, at most five minutes -> exit status and
    output."""
    command = [sys.executable, str(ROOT / "tests" / "lab" / name), *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=300)
    return done.returncode, done.stdout
