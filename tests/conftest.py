"""Shared by the tests: the repository on the path, a small toy world, tiny packs and networks."""
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)                           # for the scripts that tests start
# Sizes are small: more threads would mostly wait for each other.  Torch reads it when imported.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
import pretrain  # noqa: E402

TINY = dict(width=32, depth=2, heads=2)                        # a ViT


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


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def write_pack(path, images, rows, index):
    """A pack as numpy and a text editor make it -> its path; rows: lines of images.csv."""
    path.mkdir()
    np.save(path / "images.npy", images)
    (path / "images.csv").write_text("\n".join(["scene,image,split,labels", *rows]) + "\n")
    (path / "pack.json").write_text(json.dumps(index))
    return str(path)


def save_backbone(path, *spec, seed=0):
    """The checkpoint of a network with random weights -> its path; spec: what model.build takes."""
    torch.manual_seed(seed)
    torch.save(model.export_backbone(model.build(*spec)), path)
    return str(path)


def step_flags(method, **own):
    """What pretrain.train_step reads of the flags: the full preset's, of tiny networks."""
    tiny = dict(method=method, arch="vit_tiny", init=None, amp="off", accum=2, img_size=24,
                patch_size=6, hidden=16, prototypes=20, crops=[2, 2], local_size=12, lr=1e-2,
                soft_weight=0.7, jitter=0.4)
    return SimpleNamespace(**pretrain.PRESETS[method, "full"] | tiny | own)
