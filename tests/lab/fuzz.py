"""Thousands of broken inputs: each must be read as what it says or end in one clear line.

    python tests/lab/fuzz.py --cases 3000            about four minutes on one core
    python tests/lab/fuzz.py --cases 500 --kinds tiff image

A case is a good file with one to four accidents (bytes flipped, replaced, zeroed, cut off,
repeated or inserted), or a good command with one flag set to nonsense.  The outcomes are

    clear   a ValueError or OSError that names the file; for flags argparse's message, too
    read    a result of the promised shape and type, the same as that of an independent reader
            where there is one
    wrong   anything else; a crash and a minute without an answer, too

What is wrong is printed and makes the exit code 1.
"""
import argparse
import contextlib
import csv
import io
import json
import multiprocessing
import queue
import shutil
import signal
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Callable
from unittest import mock

import imagecodecs
import numpy as np
import tifffile
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import data  # noqa: E402
import model  # noqa: E402
import pretrain  # noqa: E402
import probe  # noqa: E402

NONSENSE = ["-1", "0", "nan", "inf", "-inf", "1e400", "1e-400", "", "x", "9" * 25, "0.5", "-0.0",
            "1 2 3", "../..", "\u0000", "2147483648", "true", "[]", "None", "é"]
PROBE_FLAGS = ["labels", "modality", "img-size", "train-frac", "protocol", "feature", "holdout",
               "seeds", "seed", "bootstrap", "lists", "split", "out", "exclude"]
SMALL_VIT = {"vit_tiny": dict(width=32, depth=2, heads=1)}         # steps of milliseconds
SECONDS = 60                        # a case that takes longer has hung

# -------------------------------------------------------------------------------------- accidents


def flip_bit(x, at, n, rng):
    x[at] ^= 1 << int(rng.integers(8))


def replace(x, at, n, rng):
    n = min(n, len(x) - at)
    x[at:at + n] = rng.bytes(n)


def zero(x, at, n, rng):
    n = min(n, len(x) - at)
    x[at:at + n] = bytes(n)


def cut_off(x, at, n, rng):
    del x[max(at, 1):]


def repeat(x, at, n, rng):
    x[at:at] = x[at:at + n]


def insert(x, at, n, rng):
    x[at:at] = rng.bytes(n)


ACCIDENTS = [flip_bit, replace, zero, cut_off, repeat, insert]


def mutate(rng, content):
    """Bytes with one to four accidents of 1 to 127 bytes, most of them in the first 400 bytes,
    where formats have their structure."""
    x = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        reach = len(x) if rng.random() < 0.5 else min(len(x), 400)
        at = int(rng.integers(reach))
        n = int(2 ** rng.uniform(0, 7))
        accident = ACCIDENTS[rng.integers(len(ACCIDENTS))]
        accident(x, at, n, rng)
    return bytes(x)


# ------------------------------------------------------------------------------------- good files


@dataclass
class Target:
    """A file that gets broken."""
    path: Path
    content: bytes             # while it is whole
    read: Callable             # of the path; raises ValueError, OSError, or AssertionError


def target(path, read):
    return Target(Path(path), Path(path).read_bytes(), read)


def new_folder(path):
    path.mkdir()
    return path


def tiff_targets(folder, toy):
    """TIFFs of six kinds, and one band of a product."""
    def read_one(path):
        found = data.read_tiff(path)
        with tifffile.TiffFile(path) as file:
            expected = file.pages[0].asarray()
        assert np.array_equal(found, expected, equal_nan=found.dtype.kind == "f")

    def read_product(path):
        x = data.read_product(str(path.parent), data.SENSORS["s1"], 24)
        assert x.shape == (2, 24, 24) and x.dtype == np.uint8

    pixels = np.random.default_rng(0).integers(0, 9000, (24, 24)).astype(np.uint16)
    kinds = [{}, {"compression": "zlib"}, {"compression": "lzw"}, {"tile": (16, 16)},
             {"byteorder": ">"}, {"bigtiff": True}]
    targets = []
    for i, kind in enumerate(kinds):
        tifffile.imwrite(folder / f"{i}.tif", pixels, **kind)
        targets.append(target(folder / f"{i}.tif", read_one))
    band = next(Path(toy, "s1", "0000000").glob("*/VV.tif"))
    return [*targets, target(band, read_product)]


def image_targets(folder):
    """A PNG and a JPEG."""
    def read(path):
        x = data.read_image(str(path), data.SENSORS["rgb"], 24)
        assert x.shape == (3, 24, 24) and x.dtype == np.uint8

    rgb = np.random.default_rng(0).integers(0, 256, (24, 24, 3)).astype(np.uint8)
    (folder / "a.png").write_bytes(imagecodecs.png_encode(rgb))
    (folder / "a.jpg").write_bytes(imagecodecs.jpeg8_encode(rgb))
    return [target(folder / "a.png", read), target(folder / "a.jpg", read)]


def label_targets(toy):
    """The json of labels."""
    def read(path):
        found = data.read_labels(path)
        for scene, products in json.loads(path.read_text()).items():
            for product, classes in products.items():
                assert found[scene][product] == [int(c) for c in classes]
        data.SSL4EO(toy, data.SENSORS["s1"], path)
    return [target(f"{toy}/ssl4eo_multilabel.json", read)]


def list_targets(folder):
    """A list of names."""
    names = {f"{kind}_{n}" for kind in ("Forest", "River") for n in range(9)}
    (folder / "list.txt").write_text("".join(f"{name}.jpg\n" for name in sorted(names)))

    def read(path):
        assert set(data.read_names(path, names)) <= names
    return [target(folder / "list.txt", read)]


def csv_targets(folder):
    """The metadata of two patches of BigEarthNet v2."""
    rows = [["patch_id", "labels", "split", "s1_name"]]
    for n in range(2):
        name = f"S2A_MSIL2A_20170613T101031_{n}_39"
        (folder / "BigEarthNet-S2" / name[:-5] / name).mkdir(parents=True)
        rows.append([name, "Arable land;Pastures", "train", name])
    with (folder / "metadata.csv").open("w") as file:
        csv.writer(file).writerows(rows)

    def read(path):
        data.BigEarthNet(str(path.parent), data.SENSORS["s2a"])
    return [target(folder / "metadata.csv", read)]


def checkpoint_targets(folder):
    """Weights of a ResNet and a ViT, each in PyTorch's zip format and in the one before."""
    networks = {"resnet18": model.build("resnet18", 2),
                "vit_tiny": model.build("vit_tiny", 2, img_size=24, patch_size=12)}
    targets = []
    for arch, network in networks.items():
        state = {}
        for name, tensor in model.export_backbone(network).items():
            if "layer" not in name or "layer1" in name:             # less to read
                state[name] = tensor
        for zipped in (True, False):
            path = folder / f"{arch}_{zipped}.pth"
            torch.save(state, path, _use_new_zipfile_serialization=zipped)
            targets.append(target(path, weights_reader(state, zipped)))
    return targets


def weights_reader(state, zipped):
    def read(path):
        found = model.read_weights(path)[0]
        if zipped:                                  # the old format has no checksums: bits may flip
            for name, tensor in found.items():
                assert torch.equal(tensor, state[name])
    return read


def run_targets(root, train_flags, probe_flags):
    """What a training run left: its checkpoint and log, read by --resume; its config.json, read by
    probe.py.  A run that is resumed from a broken file must end as the undisturbed one."""
    run = root / "run"
    whole = root / "whole"
    pretrain.main([*train_flags, "--max-steps", "1"])
    shutil.copytree(run, whole)
    resume_flags = [*train_flags, "--resume", "--max-steps", "2"]
    pretrain.main([*resume_flags, "--out", str(whole)])

    def resume(path):
        pretrain.main(resume_flags)
        assert (run / "backbone.pt").read_bytes() == (whole / "backbone.pt").read_bytes()

    def read_config(path):
        probe.main([*probe_flags, "--bootstrap", "0"])
    return {"resume": [target(run / "last.pt", resume), target(run / "log.jsonl", resume)],
            "config": [target(run / "config.json", read_config)]}


def make_inputs(folder):
    """Good files in the folder: {kind: [Target, ...]}; and good commands: {script: flags}."""
    root = Path(folder)
    toy = data.make_toy(str(root / "toy"), 12, 24, seed=3, workers=1)
    train_flags = [
        "--modality", "s1", "--data", toy, "--img-size", "24", "--patch-size", "12", "--arch",
        "vit_tiny", "--hidden", "16", "--batch-size", "4", "--epochs", "4", "--holdout", "0.4",
        "--workers", "0", "--log-every", "1", "--device", "cpu", "--out", str(root / "run")]
    probe_flags = [
        "--ckpt", str(root / "run" / "backbone.pt"), "--data", toy, "--workers", "0",
        "--bootstrap", "2", "--device", "cpu"]
    targets = {
        "tiff": tiff_targets(new_folder(root / "tiff"), toy),
        "image": image_targets(new_folder(root / "image")),
        "labels": label_targets(toy),
        "list": list_targets(new_folder(root / "list")),
        "csv": csv_targets(new_folder(root / "csv")),
        "checkpoint": checkpoint_targets(new_folder(root / "checkpoint")),
        **run_targets(root, train_flags, probe_flags)}
    return targets, {"pretrain": train_flags, "probe": probe_flags}


# ------------------------------------------------------------------------------------------ cases


def hung(*_):
    raise KeyboardInterrupt(f"{SECONDS} s without an answer")


@contextlib.contextmanager
def restored(folder):
    """Afterwards the folder has the files that it had, as they were."""
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    try:
        yield
    finally:
        for path in folder.iterdir():
            if path.is_file() and path not in before:
                path.unlink()
        for path, content in before.items():
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)


def outcome(work, what, accepted):
    """Runs work() -> ("clear", "read" or "wrong", what happened).

    accepted(error): does a ValueError, OSError or SystemExit say clearly what is wrong?
    """
    signal.signal(signal.SIGALRM, hung)
    signal.alarm(SECONDS)
    silent = io.StringIO()
    try:
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            work()
        return "read", what
    except (ValueError, OSError, SystemExit) as error:
        kind = "clear" if accepted(error) else "wrong"
        return kind, f"{what}: {type(error).__name__}: {error}"
    except BaseException as error:
        return "wrong", f"{what}: {type(error).__name__}: {error}"
    finally:
        signal.alarm(0)


def training_flags():
    """The names of pretrain.py's flags, of both methods."""
    names = []
    for method in ("softcon", "pera"):
        flags = vars(pretrain.parse(["--modality", "s1", "--method", method]))
        names += [name.replace("_", "-") for name in flags if name not in names]
    return sorted(set(names) - {"sensor", "out", "resume", "workers"})


def flag_case(commands, rng, folder):
    """A good command with one more flag, whose value is nonsense."""
    script = ("pretrain", "probe")[rng.integers(2)]
    flags = list(commands[script])
    if script == "pretrain":
        main = pretrain.main
        name = rng.choice(training_flags())
        flags += ["--out", f"{folder}/{rng.integers(1 << 60)}", "--max-steps", "1"]
    else:
        main = probe.main
        name = rng.choice(PROBE_FLAGS)
    flags.append(f"--{name}={rng.choice(NONSENSE)}")

    def accepted(error):
        if isinstance(error, SystemExit):                   # argparse has printed its message
            return bool(error.code)
        return bool(str(error))
    return outcome(lambda: main(flags), f"{script}.py {flags[-1]}", accepted)


def file_case(kind, targets, rng):
    """A file of that kind with accidents."""
    broken = targets[rng.integers(len(targets))]

    def accepted(error):
        if isinstance(error, SystemExit):
            return False
        # one band of many, and settings that contradict the data, may be named by other words
        return broken.path.name in str(error) or kind in ("tiff", "config")
    with restored(broken.path.parent):
        broken.path.write_bytes(mutate(rng, broken.content))
        return outcome(lambda: broken.read(broken.path), str(broken.path), accepted)


def worker(kinds, seed, cases, targets, commands, folder, results):
    """Puts (case, outcome, what happened) of each case into the queue `results`."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for case in cases:
        kind = kinds[case % len(kinds)]
        # stands if the process does not live to say more
        results.put((case, "wrong", f"{kind}: the process died or hung"))
        rng = np.random.default_rng([seed, case])
        if kind == "flags":
            found, what = flag_case(commands, rng, folder)
        else:
            found, what = file_case(kind, targets[kind], rng)
        results.put((case, found, f"{kind}: {what}"))


def run_worker(*args):
    """A worker in a forked process -> {case: (outcome, what happened)}, also if it crashes."""
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    process = fork.Process(target=worker, args=(*args, results))
    process.start()
    found = {}
    while process.is_alive() or not results.empty():
        with contextlib.suppress(queue.Empty):
            case, kind, what = results.get(timeout=0.2)
            found[case] = kind, what
    process.join()
    return found


def fuzz(cases, seed, kinds=None):
    """-> {outcome: count}, [what went wrong, ...]"""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                # the same bits in all processes
    found = {}
    with (tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(),
          mock.patch.dict(model.VITS, SMALL_VIT)):
        warnings.simplefilter("ignore")
        targets, commands = make_inputs(folder)
        if not kinds:
            kinds = [*targets, "flags"]
        while len(found) < cases:                           # a new process after each that crashed
            found |= run_worker(kinds, seed, range(len(found), cases), targets, commands, folder)
    torch.set_num_threads(threads)
    counts = {"clear": 0, "read": 0, "wrong": 0}
    for kind, _ in found.values():
        counts[kind] += 1
    return counts, [what for kind, what in found.values() if kind == "wrong"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", help="tiff image labels list csv checkpoint resume "
                        "config flags; default: all in turn")
    args = parser.parse_args(argv)
    counts, wrong = fuzz(args.cases, args.seed, args.kinds)
    for what in wrong:
        print(what)
    print(json.dumps(counts))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
