"""Shared by the tests: the repository on the path, one small toy world and its packs."""
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)                           # for the scripts that tests start
# Sizes are small: more threads would mostly wait for each other.  Torch reads it when imported.
os.environ["OMP_NUM_THREADS"] = "1"

import data  # noqa: E402


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """60 scenes of 24 px."""
    return data.make_toy(str(tmp_path_factory.mktemp("toy") / "world"), 60, 24, seed=1, workers=1)


@pytest.fixture(scope="session")
def packs(toy):
    """{modality: path of the toy world's pack}."""
    paths = {}
    for modality in ("s1", "s2c"):
        archive = data.open_archive(toy, data.SENSORS[modality])
        paths[modality] = f"{toy}_{modality}"
        data.pack(archive, paths[modality], workers=1)
    return paths
