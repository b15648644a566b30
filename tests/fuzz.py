"""Thousands of broken inputs: each must be read as what it says or end in one clear line.

    python tests/fuzz.py --cases 3000                about four minutes on one core

A case is a good file (TIFF, PNG, JPEG, labels json, lists and csv, checkpoints, a run's config.json
and last.pt) with bytes flipped, cut, repeated, zeroed or inserted, or a good command with one flag
set to nonsense.  Counted as `clear`: ValueError or OSError of one line that names the file
(argparse for flags); `read`: a result of the promised shape and type, equal to what an independent reader
finds in the same bytes where there is one.  Anything else, a crash or a minute without an answer
too, is printed and makes the exit code 1.
"""
import argparse
import contextlib
import csv
import io
import json
import multiprocessing
import shutil
import signal
import sys
import tempfile
import warnings
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import model  # noqa: E402
import pretrain  # noqa: E402
import probe  # noqa: E402

NONSENSE = ["-1", "0", "nan", "inf", "-inf", "1e400", "1e-400", "", "x", "9" * 25, "0.5", "-0.0",
            "1 2 3", "../..", "\u0000", "2147483648", "true", "[]", "None", "é"]


def mutate(rng, content):
    """Bytes with one to four accidents, most of them near the start, where the structure is."""
    x = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(len(x)) if rng.random() < 0.5 else rng.integers(min(len(x), 400)))
        n = int(2 ** rng.uniform(0, 7))
        kind = rng.integers(6)
        if kind == 0:
            x[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            x[at:at + n] = rng.bytes(min(n, len(x) - at))
        elif kind == 2:
            x[at:at + n] = bytes(min(n, len(x) - at))
        elif kind == 3:
            del x[max(at, 1):]
        elif kind == 4:
            x[at:at] = x[at:at + n]
        else:
            x[at:at] = rng.bytes(n)
    return bytes(x)


def files(folder):
    """{kind: [(path, good bytes, read: path -> None), ...]}; read checks what it can."""
    rng, root = np.random.default_rng(0), Path(folder)
    toy = data.make_toy(str(root / "toy"), 12, 24, seed=3, workers=1)
    labels = f"{toy}/ssl4eo_multilabel.json"
    scenes = data.SSL4EO(toy, "s1", labels)
    out = {k: [] for k in ("tiff", "image", "labels", "list", "csv", "checkpoint", "config",
                           "resume")}

    def add(kind, path, read):
        out[kind].append((str(path), Path(path).read_bytes(), read))

    def tiff(path):
        got = data.read_tiff(path)
        with tifffile.TiffFile(path) as file:
            assert np.array_equal(got, file.pages[0].asarray(), equal_nan=got.dtype.kind == "f")

    def product(path):
        x = data.read_product(str(Path(path).parent), "s1", 24)
        assert x.shape == (2, 24, 24) and x.dtype == np.uint8
    x = rng.integers(0, 9000, (24, 24)).astype(np.uint16)
    for i, kind in enumerate(({}, {"compression": "zlib"}, {"compression": "lzw"},
                              {"tile": (16, 16)}, {"byteorder": ">"}, {"bigtiff": True})):
        tifffile.imwrite(root / f"{i}.tif", x, **kind)
        add("tiff", root / f"{i}.tif", tiff)
    add("tiff", f"{scenes.files[0][0]}/VV.tif", product)

    def image(path):
        x = data.read_image(path, "rgb", 24)
        assert x.shape == (3, 24, 24) and x.dtype == np.uint8
    rgb = rng.integers(0, 256, (24, 24, 3)).astype(np.uint8)
    (root / "a.png").write_bytes(imagecodecs.png_encode(rgb))
    (root / "a.jpg").write_bytes(imagecodecs.jpeg8_encode(rgb))
    for name in ("a.png", "a.jpg"):
        add("image", root / name, image)

    def table(path):
        got, said = data.read_labels(path), json.loads(Path(path).read_text())
        assert got == {i: {p: [int(c) for c in y] for p, y in mine.items()}
                       for i, mine in said.items()}
        data.SSL4EO(toy, "s1", path)
    add("labels", labels, table)
    names = {f"{kind}_{n}" for kind in ("Forest", "River") for n in range(9)}
    (root / "list.txt").write_text("".join(f"{n}.jpg\n" for n in sorted(names)))
    add("list", root / "list.txt", lambda path: [names.remove(n) or names.add(n)
                                                 for n in data.listed(path, names)])
    ben = root / "ben"
    for n in range(2):
        name = f"S2A_MSIL2A_20170613T101031_{n}_39"
        patch = ben / "BigEarthNet-S2" / name[:-5] / name
        patch.mkdir(parents=True)
        with (ben / "metadata.csv").open("a") as file:
            out_csv = csv.writer(file)
            out_csv.writerows([["patch_id", "labels", "split", "s1_name"]] * (n == 0))
            out_csv.writerow([name, "Arable land;Pastures", "train", name])
    add("csv", ben / "metadata.csv", lambda path: data.BigEarthNet(str(ben)).labels)
    for arch, keys in (("resnet18", {"in_chans": 2}), ("vit_tiny", {"in_chans": 2, "img_size": 24,
                                                                    "patch_size": 12})):
        for zipped in (True, False):
            path = root / f"{arch}{zipped}.pth"
            state = model.export_backbone(model.build(arch, **keys))
            state = {k: v for k, v in state.items() if "layer4" in k or "layer" not in k}
            torch.save(state, path, _use_new_zipfile_serialization=zipped)

            def weights(path, state=state, zipped=zipped):         # the old format has no checksums
                got = model.read_weights(path)[0]
                assert not zipped or all(torch.equal(v, state[k]) for k, v in got.items())
            add("checkpoint", path, weights)
    flags = ["--modality", "s1", "--data", toy, "--img-size", "24", "--patch-size", "12", "--arch",
             "vit_tiny", "--hidden", "16", "--batch-size", "4", "--epochs", "4", "--holdout", "0.4",
             "--workers", "0", "--log-every", "1", "--device", "cpu", "--out", str(root / "run")]
    pretrain.main([*flags, "--max-steps", "1"])
    more = [*flags, "--resume", "--max-steps", "2"]
    shutil.copytree(root / "run", root / "whole")
    pretrain.main([*more, "--out", str(root / "whole")])

    def resume(path):
        pretrain.main(more)
        ours, theirs = ((root / run / "backbone.pt").read_bytes() for run in ("run", "whole"))
        assert ours == theirs
    for name in ("last.pt", "log.jsonl"):
        add("resume", root / "run" / name, resume)
    add("config", root / "run" / "config.json", lambda path: probe.main(
        ["--ckpt", str(root / "run" / "backbone.pt"), "--data", toy, "--workers", "0",
         "--bootstrap", "0", "--device", "cpu"]))
    probed = ["--ckpt", str(root / "run" / "backbone.pt"), "--data", toy, "--workers", "0",
              "--bootstrap", "2", "--device", "cpu", "--steps", "3"]
    return out, {"pretrain": flags, "probe": probed}


def too_long(*_):
    raise KeyboardInterrupt("a minute without an answer")


def one(kind, good, commands, rng, folder):
    """-> ("clear" or "read" or "wrong", what happened)."""
    if kind == "flags":
        script = ("pretrain", "probe")[rng.integers(2)]
        names = ([n for g in pretrain.FLAGS.values() for n in g] if script == "pretrain" else
                 "labels modality img-size train-frac head feature lr steps holdout seeds seed "
                 "bootstrap centre draws area lists exclude".split())
        name = str(rng.choice([n for n in names if n not in ("out", "resume", "workers")]))
        what = f"{script}.py --{name} {rng.choice(NONSENSE)!s}"
        value = what.split(name, 1)[1][1:]
        more = ["--out", f"{folder}/{rng.integers(1 << 60)}", "--max-steps", "1"] * (
            script == "pretrain")
        run = {"pretrain": pretrain, "probe": probe}[script].main

        def work():
            run([*commands[script], *more, f"--{name}={value}"])
        named = name
    else:
        path, content, read = good[kind][rng.integers(len(good[kind]))]
        folder = Path(path).parent
        kept = {p: p.read_bytes() for p in folder.iterdir() if p.is_file()}
        Path(path).write_bytes(mutate(rng, content))
        what, named = f"{path}", Path(path).name

        def work():
            read(path)
    try:
        signal.signal(signal.SIGALRM, too_long)
        signal.alarm(60)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            work()
        return "read", what
    except SystemExit as error:
        return ("clear" if kind == "flags" and error.code else "wrong"), f"{what}: {error!r}"
    except (ValueError, OSError) as error:
        clear = named in str(error) or kind in ("flags", "tiff", "config") and str(error)
        return ("clear" if clear else "wrong"), f"{what}: {type(error).__name__}: {error}"
    except BaseException as error:
        return "wrong", f"{what}: {type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        if kind != "flags":
            for p in {*folder.iterdir()} - {*kept}:
                p.unlink() if p.is_file() else None
            for p, was in kept.items():
                if not p.exists() or p.read_bytes() != was:
                    p.write_bytes(was)


def worker(kinds, seed, start, stop, good, commands, folder, results):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for case in range(start, stop):
        kind = kinds[case % len(kinds)]
        results.put((case, "wrong", f"{kind}: the process died or hung"))
        outcome, what = one(kind, good, commands, np.random.default_rng([seed, case]), folder)
        results.put((case, outcome, f"{kind}: {what}"))


def fuzz(cases, seed, kinds=None):
    """-> {outcome: count}, lines about what went wrong."""
    fork, results, threads = multiprocessing.get_context("fork"), {}, torch.get_num_threads()
    torch.set_num_threads(1)                                       # the same bits in all processes
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        good, commands = files(folder)
        kinds = kinds or [*good, "flags"]
        while len(results) < cases:
            queue = fork.Queue()
            process = fork.Process(target=worker, args=(
                kinds, seed, len(results), cases, good, commands, folder, queue))
            process.start()
            while process.is_alive() or not queue.empty():
                with contextlib.suppress(Exception):
                    case, *outcome = queue.get(timeout=1)
                    results[case] = outcome
            process.join()
    torch.set_num_threads(threads)
    wrong = [what for outcome, what in results.values() if outcome == "wrong"]
    return {o: sum(r[0] == o for r in results.values()) for o in ("clear", "read", "wrong")}, wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*")
    args = parser.parse_args()
    counts, wrong = fuzz(args.cases, args.seed, args.kinds)
    print(*wrong, json.dumps(counts), sep="\n")
    sys.exit(bool(wrong))
