"""Speed and memory as ratios within one run; no test asserts them.

    python tests/bench.py                           every part, some minutes on two CPU cores
    python tests/bench.py --quick                   smaller images and batches, about a minute
    python tests/bench.py --part step --method pera --arch vit_base --batch-size 16 --amp bf16
    python tests/bench.py --part sparse             PerA's step against one that computes all tokens

    loader   images/s of a straightforward reader, of this one and of packed data
    augment  crop, resize, flip and colours of a batch, and its share of a plain copy's bytes/s
    step     one training step: images/s, FLOP/s counted and as a share of a matrix product's
    drop     forward and backward of a student with 60 % of its tokens dropped, against all of them
    sparse   PerA: the step as it is against every token in both networks: speed and peak memory
             above the resting state (parameters and optimiser)
    loop     the script itself on files of 264 px against its step alone with data in memory
    gather   SoftCon's global loss over 1 to 8 processes on this machine: bytes and time

Each part runs in a process of its own and ends in one JSON line; other flags are pretrain.py's
(default: --modality s2c --arch vit_small --batch-size 8, the full-size preset).
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tifffile
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import losses  # noqa: E402
import model as models  # noqa: E402
import pretrain  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def best(work, times):
    """Seconds of the fastest of `times` calls after one that warms up."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def product(amp):
    """FLOP/s of a 2048 x 2048 matrix product in the step's type: what this machine can do."""
    a = torch.randn(2048, 2048, device=DEVICE, dtype=torch.bfloat16 if amp == "bf16" else None)
    return 2 * 2048 ** 3 / best(lambda: a @ a, 3)


def copy():
    """Bytes/s, read and written, of copying 256 MB to memory that is there."""
    big, other = torch.ones(2, 2 ** 28, dtype=torch.uint8, device=DEVICE)
    return 2 ** 29 / best(lambda: other.copy_(big), 3)


def flops(work):
    """Operations of work(): matrix products, convolutions and attention (4 b h n m d forward, 2.5
    times that backward, as PyTorch counts its CUDA kernels)."""
    def attention(q, k, times):
        return int(4 * q[0] * q[1] * q[2] * k[2] * q[3] * times)
    aten = torch.ops.aten
    cpu = {aten._scaled_dot_product_flash_attention_for_cpu:
           lambda q, k, *_, **__: attention(q, k, 1),
           aten._scaled_dot_product_flash_attention_for_cpu_backward:
           lambda _, q, k, *__, **___: attention(q, k, 2.5)}
    with FlopCounterMode(display=False, custom_mapping=cpu) as counter:
        work()
    return counter.get_total_flops()


def resident():
    """Bytes of memory this process holds now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak():
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


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


def stepper(args, all_tokens=False):
    """A whole training step on random pixels as a function of no arguments, and the bytes at rest,
    parameters and optimiser."""
    torch.manual_seed(0)
    C, pera = len(data.BANDS[args.modality]), args.method == "pera"
    net = pretrain.networks(args, DEVICE)
    student, teacher = net.student, net.teacher
    if all_tokens:
        net.ddp, forward = dense(student), dense(teacher)
        net.teacher = lambda crops, keep: forward(crops, keep)
        net.teacher.cls_head = teacher.cls_head
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, fused=True)
    for p in parameters:                                           # the optimiser's state, made now
        p.grad = torch.zeros_like(p)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    side = max(args.img_size, args.local_size) + 40
    shape = args.batch_size, 1 if pera else 2, C, side, side
    x = torch.randint(256, shape, dtype=torch.uint8, device=DEVICE)
    y = torch.randint(2, (*shape[:2], 9), device=DEVICE)
    rest, function = torch.cuda.memory_allocated() if DEVICE == "cuda" else resident(), (
        pretrain.pera_step if pera else pretrain.softcon_step)

    def step():
        dice = pretrain.Dice(0, 0, 0, 0, 1)
        function(net, x, y, args, dice, {"teacher_tau": 0.04})[0].backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        models.ema_update(teacher, student, 0.99)
    return step, rest


# -------------------------------------------------------------------------------------------- parts


def plain_reader(folder):
    """(13,264,264) uint8 as one would first write it."""
    bands = []
    for name in data.BANDS["s2c"]:
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


def loader(args):
    """images/s of training batches (8 scenes, 2 seasons, 13 bands, 264 px): plain stands in for a
    straightforward reader, tiff is ours, packed what `data.py pack` wrote; by reading processes, out
    of the page cache (cold: just dropped from it, no process)."""
    torch.set_num_threads(1)                                       # as in a worker
    rows, size = {}, 13 * 264 * 264
    with tempfile.TemporaryDirectory() as folder:
        tree, packed = data.make_toy(f"{folder}/toy", 24, 264), f"{folder}/packed"
        times = 1 if args.quick else 3
        data.pack(data.open_data(tree, "s2c"), packed)
        for name, root in (("plain", tree), ("tiff", tree), ("packed", packed)):
            forget(root)
            rows[name] = {}
            for workers in ("cold", 0, 1, 2):
                scenes = data.open_data(root, "s2c")
                scenes.decode = plain_reader if name == "plain" else scenes.decode
                batches = 4 if workers == "cold" or args.quick else 100 if name == "packed" else 8
                rows[name][str(workers)] = max(
                    images_per_s(scenes, workers if workers != "cold" else 0, batches)
                    for _ in range(1 if workers == "cold" else times))
    for name in ("tiff", "packed"):
        rows[f"{name} / plain"] = {k: v / rows["plain"][k] for k, v in rows[name].items()}
    return rows | {"packed_of_a_copy": rows["packed"]["0"] * size * 2 / copy()}


def augment(args):
    C, n = len(data.BANDS[args.modality]), 16
    x = torch.randint(256, (n, C, 264, 264), dtype=torch.uint8, device=DEVICE)
    g = torch.Generator().manual_seed(0)
    p = data.draw_crops(n, g) | data.draw_colours(n, args.modality, g)
    seconds = best(lambda: data.colour(data.crop(x, p, args.img_size), p), 3)
    moved = n * C * (264 ** 2 + 4 * args.img_size ** 2)                # uint8 in, float32 out
    return {"images_per_s": n / seconds, "bytes_per_s": moved / seconds,
            "of_a_copy": moved / seconds / copy()}


def step(args):
    work, rest = stepper(args)
    seconds, count = best(work, args.steps), flops(work)
    images = args.batch_size * (1 if args.method == "pera" else 2)
    return {"images_per_s": images / seconds, "flop_per_s": count / seconds,
            "of_a_matrix_product": count / seconds / product(args.amp),
            "gflop_per_image": count / images / 1e9, "rest_gb": rest / 1e9,
            "step_gb": (peak() - rest) / 1e9}


def drop(args):
    C = len(data.BANDS[args.modality])
    net = models.build(args.arch, C, args.img_size, args.patch_size).to(DEVICE)
    x = torch.rand(args.batch_size, C, args.img_size, args.img_size, device=DEVICE)
    grid = (args.img_size // args.patch_size,) * 2
    keep = losses.block_mask(len(x), grid, 0.6, torch.Generator().manual_seed(0)).to(DEVICE)

    def work(keep=None):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=args.amp == "bf16"):
            net(x, keep).sum().backward()
    all_tokens, kept = best(work, args.steps), best(lambda: work(keep), args.steps)
    return {"all_ms": 1e3 * all_tokens, "kept_ms": 1e3 * kept, "ratio": kept / all_tokens,
            "flop_ratio": flops(lambda: work(keep)) / flops(work)}


def sparse(args):
    work, rest = stepper(args, args.dense)
    seconds = best(work, args.steps)
    return {"images_per_s": args.batch_size / seconds, "rest_gb": rest / 1e9,
            "step_gb": (peak() - rest) / 1e9}


def loop(args, rest):
    """The script for 8 steps, files decoded by one worker, beside its own step."""
    alone = best(stepper(args)[0], args.steps)
    with tempfile.TemporaryDirectory() as folder:
        root = data.make_toy(f"{folder}/world", 3 * args.batch_size, 264)
        command = [sys.executable, pretrain.__file__, "--data", root, "--out", f"{folder}/run",
                   "--cache", "0", "--workers", "1", "--epochs", "9", "--max-steps", "8",
                   "--log-every", "4", *rest]
        subprocess.run(command, capture_output=True, check=True)
        log = json.loads(Path(folder, "run", "log.jsonl").read_text().splitlines()[-1])
    images = args.batch_size * (1 if args.method == "pera" else 2)
    return {"step_images_per_s": images / alone, "loop_images_per_s": log["images_per_s"],
            "ratio": log["images_per_s"] * alone / images, "data_wait": log["data_wait"]}


def one_rank(rank, world, file, batch, width, seconds):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=world)
    n, g = batch // world, torch.Generator().manual_seed(rank)
    q, k = (torch.randn(n, 2, width, generator=g, requires_grad=r) for r in (True, False))
    y = torch.randint(2, (n, 2, 9), generator=g, dtype=torch.uint8)

    def both():
        (k1, k2), (Y1, Y2) = (v.unbind(1) for v in losses.gather_soon(k, y)())
        (q1, q2), (y1, y2) = q.unbind(1), y.unbind(1)
        sum(losses.softcon_loss(*v)[0] for v in (
            (q1, k2, y1, Y2, 0.2, 0.5, "bce", None, Y1),
            (q2, k1, y2, Y1, 0.2, 0.5, "bce", None, Y2))).backward()
    seconds[rank] = best(both, 20)
    dist.destroy_process_group()


def gather(args, batch=256, width=256):
    """Both directions of SoftCon's loss; they gather keys (B,2,256) float32 and labels (B,2,9)."""
    rows = {}
    for world in (1, 2, 4, 8):
        seconds = torch.zeros(world).share_memory_()
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(
                one_rank, (world, f"{folder}/rendezvous", batch, width, seconds), world)
        received = 2 * (world - 1) * (batch // world) * (4 * width + 9)
        rows[f"{world} ranks"] = {"received_kb_per_rank": received / 1e3,
                                  "ms": 1e3 * float(seconds.max())}
    return rows


PARTS = {"loader": loader, "augment": augment, "step": step, "drop": drop, "sparse": sparse, "dense": sparse,
         "loop": loop, "gather": gather}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--part", nargs="*", choices=list(PARTS), help="default: all")
    parser.add_argument("--steps", type=int, default=2, help="timed calls; the fastest counts")
    parser.add_argument("--quick", action="store_true", help="112 px, 4 images a step")
    parser.add_argument("--json", action="store_true", help="nothing but one JSON object")
    parser.add_argument("--here", action="store_true", help="one part, in this process")
    own, rest = parser.parse_known_args(argv)
    if own.here:
        size = ["--img-size", "112", "--batch-size", "4"] if own.quick else ["--batch-size", "8"]
        size += ["--local-size", "48"] * (own.quick and "pera" in rest)
        flags, part = ["--modality", "s2c", "--arch", "vit_small", *size, *rest], own.part[0]
        args = pretrain.parse(["--data", "none", *flags])
        args.amp = args.amp if args.amp != "auto" else "bf16" if DEVICE == "cuda" else "off"
        args.steps, args.quick, args.dense = own.steps, own.quick, part == "dense"
        print(json.dumps(PARTS[part](args, *[flags] * (part == "loop"))))
        return
    rows = {"machine": {"device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
                        "threads": torch.get_num_threads(), "torch": torch.__version__}}
    for part in own.part or PARTS:
        only_pera = ["--method", "pera", "--prototypes", "4096"] * (part in ("sparse", "dense"))
        command = [sys.executable, __file__, "--here", "--part", part, "--steps", str(own.steps),
                   *["--quick"] * own.quick, *only_pera, *rest]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"bench.py: error: {part}: {done.stderr.strip().splitlines()[-1]}")
        rows[part] = json.loads(done.stdout.splitlines()[-1])
        if part == "dense" and "sparse" in rows:
            rows[part] |= {f"sparse / dense, {k}": rows["sparse"][k] / rows[part][k]
                           for k in ("images_per_s", "step_gb")}
        if not own.json:
            print(part, json.dumps(rows[part]))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
