"""Speed and memory as ratios within one run; no test asserts them.

    python tests/bench.py --method pera                      ViT-S/16, 2 x 224 + 8 x 96 px, 8 images
    python tests/bench.py --method pera --arch vit_base --img-size 448 --batch-size 16 --amp bf16

PerA: the training step as it is (sparse) against the same step with every token in both networks
(dense): images/s and the peak memory above the resting state (parameters and optimiser).  Each runs
in a process of its own; the last line is one JSON object.
"""
import argparse
import copy
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--method", choices=["pera"], required=True)
    parser.add_argument("--steps", type=int, default=2, help="timed steps; the fastest counts")
    parser.add_argument("--kind", choices=["sparse", "dense"], help="only this one, in this process")
    own, rest = parser.parse_known_args(argv)
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
