"""Speed and memory as ratios within one run; no test asserts them.

    python tests/bench.py --method pera                      ViT-S/16, 2 x 224 + 8 x 96 px, 8 images
    python tests/bench.py --method pera --arch vit_base --img-size 448 --batch-size 16 --amp bf16
    python tests/bench.py --part loader [--data DIR] [--json]     24 toy scenes of 264 px, 13 bands

PerA: the training step as it is (sparse) against the same step with every token in both networks
(dense): images/s and the peak memory above the resting state (parameters and optimiser).  Each runs
in a process of its own; the last line is one JSON object.

loader: images/s of training batches (8 scenes, 2 seasons) from an s2c tree, by 0, 1 and 2 workers,
out of the page cache and (cold, 0 workers) just dropped from it.  plain stands in for a
straightforward reader: tifffile.imread for each of 13 files, one F.interpolate each, stack, scale.
"""
import argparse
import copy
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tifffile
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import losses  # noqa: E402
import model as models  # noqa: E402
import pretrain  # noqa: E402


def resident():
    """Bytes of memory this process holds now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def dense(branch):
    """The branch made to compute every patch, hidden ones as mask tokens, from the first block on;
    the guesses are read off where they were asked for."""
    def forward(crops, keep, learn=None):
        net, guess = branch.backbone, None
        tokens = []
        for x, seen in zip(crops, keep):
            t, first = net.embed(x), 1 + net.registers
            if learn is not None:                                  # the student's hidden patches
                pos = net.positions(*(n // net.patch_size for n in x.shape[2:]))[:, 1:]
                shown = torch.zeros(t.shape[0], t.shape[1] - first, 1, dtype=torch.bool)
                shown = shown.to(x.device).scatter_(1, seen[..., None], True)
                t = torch.cat([t[:, :first], torch.where(shown, t[:, first:],
                                                         branch.mask_token + pos)], 1)
            tokens.append(t)
        x, groups = models.pack(tokens)
        for block in net.blocks:
            x = block(x, groups)
        xs = models.unpack(net.norm(x), groups)
        cls = torch.cat([x[:, 0] for x in xs])
        if learn is not None:
            patches = models.take(xs[0][:, first:], learn)
            guess = branch.pred_head(patches) @ branch.pred_head.prototypes().T
        return branch.cls_head(cls), cls, guess
    return forward


def pera(args, kind):
    """One process: build, rest, `--steps` training steps; prints a JSON line."""
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    C = len(pretrain.data.BANDS[args.modality])
    backbone = models.build(args.arch, C, args.img_size, args.patch_size, 0, args.drop_path, False)
    student = models.SparseBranch(backbone, args.prototypes, args.hidden, predict=True).to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    for module in teacher.modules():
        if isinstance(module, models.ViTBlock):
            module.drop_path = 0.0
    net = SimpleNamespace(student=student, teacher=teacher, ddp=student,
                          centre=losses.Centre(args.prototypes).to(device))
    if kind == "dense":
        net.ddp, forward = dense(student), dense(teacher)
        net.teacher = lambda crops, keep: forward(crops, keep)
        net.teacher.cls_head = teacher.cls_head
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, fused=True)
    for p in parameters:                                           # the optimiser's state, made now
        p.grad = torch.zeros_like(p)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    side = max(args.img_size, args.local_size)
    x = torch.randint(256, (args.batch_size, 1, C, side, side), dtype=torch.uint8, device=device)
    y = torch.zeros(args.batch_size, 1, 9, device=device)
    rest = torch.cuda.memory_allocated() if cuda else resident()
    seconds = []
    for step in range(args.steps + 1):
        start = time.perf_counter()
        dice = pretrain.Dice(0, step, 0, 0, 1)
        loss = pretrain.pera_step(net, x, y, args, dice, {"teacher_tau": 0.04})[0]
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        models.ema_update(teacher, student, 0.99)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if cuda else (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    print(json.dumps({"images_per_s": args.batch_size / min(seconds[1:]), "rest_gb": rest / 1e9,
                      "step_gb": (peak - rest) / 1e9, "device": device}))


def plain_reader(folder):
    """(13,264,264) uint8 as one would first write it."""
    bands = []
    for name in data.S2:
        x = torch.from_numpy(tifffile.imread(f"{folder}/{name}.tif").astype(np.float32))
        bands.append(F.interpolate(x[None, None], (264, 264), mode="bilinear")[0, 0])
    mean, std = torch.tensor(data.STATS["s2c"])[:, :, None, None]
    x = (torch.stack(bands) - (mean - 2 * std)) * (255 / (4 * std)) + 0.5
    return x.clamp(0, 255).to(torch.uint8).numpy()


def forget(root):
    """Drop the files under `root` from the page cache; those of a live memory map stay."""
    os.sync()
    for path in filter(Path.is_file, Path(root).rglob("*")):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def images_per_s(scenes, workers, batches):
    """Through the DataLoader of pretrain.py, from the second batch on, so that workers are up."""
    order = np.random.default_rng(0)
    keys = [[(int(i), (k, int(i))) for i in order.permutation(len(scenes))[:8]]
            for k in range(batches)]
    loader, n = iter(DataLoader(scenes, None, sampler=keys, num_workers=workers)), 0
    next(loader)
    start = time.perf_counter()
    for x, _ in loader:
        n += x.shape[0] * x.shape[1]
    return n / (time.perf_counter() - start)


def loader(folder, root, as_json):
    """Table and JSON line; `folder` is scratch, `root` a tree of 264 px s2c scenes or None."""
    torch.set_num_threads(1)                                       # as in a worker
    root = root or data.make_toy(f"{folder}/toy", 24, 264)
    packed = f"{folder}/packed"
    data.pack(data.open_data(root, "s2c"), packed)
    block = np.ones(2 ** 26, np.uint8)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        block.copy()
        seconds.append(time.perf_counter() - start)
    copy = block.nbytes / min(seconds)
    rows = {}
    for name in ("plain", "tiff", "packed"):
        where, rates = packed if name == "packed" else root, []
        forget(where)
        for kind in ("cold", 0, 1, 2):
            scenes = data.open_data(where, "s2c")
            scenes.decode = plain_reader if name == "plain" else scenes.decode
            batches = 4 if kind == "cold" else 100 if name == "packed" else 8
            rates.append(max(images_per_s(scenes, int(kind != "cold" and kind), batches)
                             for _ in range(1 if kind == "cold" else 3)))
        rows[name] = dict(zip(("cold", "0", "1", "2"), rates))
    size = 13 * 264 * 264
    if not as_json:
        print("images/s        cold  workers: 0         1         2")
        for name, row in rows.items():
            print(f"{name:10}" + "".join(f"{v:10.0f}" for v in row.values()))
        for name in ("tiff", "packed"):
            print(f"{name}/plain".ljust(14) + "  ".join(
                f"{rows[name][k] / rows['plain'][k]:8.1f}" for k in rows[name]))
        print(f"packed, 0 workers: {rows['packed']['0'] * size / 1e9:.2f} GB/s of pixels, "
              f"{rows['packed']['0'] * size / copy:.2f} of a memory copy ({copy / 1e9:.2f} GB/s)")
    print(json.dumps({"images_per_s": rows, "bytes_per_image": size, "copy_bytes_per_s": copy,
                      "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__}))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    part = parser.add_mutually_exclusive_group(required=True)
    part.add_argument("--method", choices=["pera"])
    part.add_argument("--part", choices=["loader"])
    parser.add_argument("--json", action="store_true", help="loader: nothing but the JSON line")
    parser.add_argument("--steps", type=int, default=2, help="timed steps; the fastest counts")
    parser.add_argument("--kind", choices=["sparse", "dense"], help="only this one, in this process")
    own, rest = parser.parse_known_args(argv)
    if own.part == "loader":
        parser = argparse.ArgumentParser()
        parser.add_argument("--data", help="s2c tree of 264 px (a toy world)")
        with tempfile.TemporaryDirectory() as folder:
            return loader(folder, parser.parse_args(rest).data, own.json)
    defaults = ["--arch", "vit_small", "--prototypes", "4096", "--batch-size", "8"]
    args = pretrain.parse(["--method", own.method, "--modality", "s2c", "--data", "none",
                           *defaults, *rest])
    args.amp = "off" if args.amp == "auto" and not torch.cuda.is_available() else args.amp
    args.amp = "bf16" if args.amp == "auto" else args.amp
    args.steps = own.steps
    if own.kind:
        return pera(args, own.kind)
    rows = {}
    for kind in ("sparse", "dense"):
        command = [sys.executable, __file__, "--method", own.method, "--steps", str(own.steps),
                   "--kind", kind, *rest]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"bench.py: error: {kind}: {done.stderr.strip().splitlines()[-1]}")
        row = rows[kind] = json.loads(done.stdout.splitlines()[-1])
        print(f"{kind:8}{row['images_per_s']:8.2f} images/s, step {row['step_gb']:.2f}"
              f" GB above the resting {row['rest_gb']:.2f} GB")
    ratio = {k: round(rows["sparse"][k] / rows["dense"][k], 3) for k in ("images_per_s", "step_gb")}
    print(f"sparse / dense: {ratio['images_per_s']:.2f} x the speed, {ratio['step_gb']:.2f} x the "
          f"memory")
    print(json.dumps({**rows, "ratio": ratio, "arch": args.arch, "img_size": args.img_size,
                      "batch_size": args.batch_size, "amp": args.amp,
                      "torch": torch.__version__, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
