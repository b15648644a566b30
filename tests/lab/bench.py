"""Speed and memory, mostly as ratios within one run.  No test asserts them.

    python tests/lab/bench.py                           every part, some minutes on two CPU cores
    python tests/lab/bench.py --quick                   smaller images and batches, about a minute
    python tests/lab/bench.py --part step --method pera --arch vit_base --batch-size 16 --amp bf16
    python tests/lab/bench.py --part sparse dense       PerA's step against one with all tokens

loader   images/s of a straightforward reader, of this one, of v1.1's zips and of packed data
augment  crop, resize, flip and colours of a batch, and its share of a plain copy's bytes/s
step     one training step: images/s; FLOP/s counted, also as a share of a matrix product's
drop     forward and backward of a student with 60 % of its tokens dropped, against all of them
sparse   PerA's step as it is: speed, and peak memory above parameters and optimiser
dense    PerA's step with every token in both networks
loop     the script itself on files of 264 px, against its step alone with data in memory
gather   SoftCon's global loss over 1 to 8 processes on this machine: bytes and time
spin     the first run beside 0, 1, 2 busy programs: OpenMP's way of waiting, and pretrain.py's

Each part runs in a process of its own and ends in one JSON line.  Other flags are pretrain.py's;
the defaults are --modality s2c --arch vit_small --batch-size 8 and the full-size preset.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import tifffile
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, default_convert
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))
import data  # noqa: E402
import losses  # noqa: E402
import model as models  # noqa: E402
import folders  # noqa: E402
import pretrain  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")

# --------------------------------------------------------------------------------------- measures


def fastest(work, times):
    """Seconds of the fastest of `times` calls after one that warms up."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        work()
        if CUDA:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def matrix_product_speed(amp):
    """FLOP/s of a 2048 x 2048 matrix product in the step's type: what this machine can do."""
    dtype = torch.bfloat16 if amp == "bf16" else torch.float32
    a = torch.randn(2048, 2048, device=DEVICE, dtype=dtype)
    return 2 * 2048**3 / fastest(lambda: a @ a, 3)


def copy_speed():
    """Bytes/s, read and written, of copying 256 MB to memory that is there."""
    source = torch.ones(2**28, dtype=torch.uint8, device=DEVICE)
    target = torch.ones(2**28, dtype=torch.uint8, device=DEVICE)
    return 2 * 2**28 / fastest(lambda: target.copy_(source), 3)


def attention_flops(q, k, passes):
    """4 b h n m d for q (b,h,n,d), k (b,h,m,d) forward; backward counts as 2.5 such passes, as
    PyTorch counts its CUDA kernels."""
    b, h, n, d = q
    return int(4 * b * h * n * k[2] * d * passes)


def count_flops(work):
    """Operations of work(): matrix products, convolutions and attention."""
    aten = torch.ops.aten
    on_cpu = {                       # attention on the CPU, which PyTorch's counter does not know
        aten._scaled_dot_product_flash_attention_for_cpu:
            lambda q, k, *_, **__: attention_flops(q, k, 1),
        aten._scaled_dot_product_flash_attention_for_cpu_backward:
            lambda grad, q, k, *_, **__: attention_flops(q, k, 2.5)}
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        work()
    return counter.get_total_flops()


def process_memory(field):
    """Bytes that this process holds now (VmRSS) or has held at most (VmHWM); Linux."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s*(\d+) kB", status)[1])


def memory_now():
    return torch.cuda.memory_allocated() if CUDA else process_memory("VmRSS")


def memory_peak():
    return torch.cuda.max_memory_allocated() if CUDA else process_memory("VmHWM")


# ----------------------------------------------------------------------------------- training steps


class AllTokens:
    """PerA's student or teacher made to compute every patch from the first block on.

    Hidden patches are mask tokens from the start, and pixels are guessed from those in `unseen`.
    """

    def __init__(self, branch):
        self.branch = branch
        self.cls_head = branch.cls_head

    def tokens(self, x, seen, masked):
        """(B,C,H,W) -> (B,1+R+N,D); masked: patches that are not in `seen` (B,n) become masks."""
        net = self.branch.backbone
        tokens = net.embed(x)
        if not masked:
            return tokens
        first = 1 + net.registers
        grid = models.check_grid(*x.shape[2:], net.patch_size)
        masks = self.branch.mask_token + net.positions(*grid)[:, 1:]               # (1,N,D)
        visible = torch.zeros(*tokens[:, first:].shape[:2], 1, dtype=torch.bool, device=x.device)
        visible = visible.scatter(1, seen[..., None], True)                        # (B,N,1)
        patches = torch.where(visible, tokens[:, first:], masks)
        return torch.cat([tokens[:, :first], patches], 1)

    def __call__(self, crops, keep, unseen=None):
        branch = self.branch
        net = branch.backbone
        student = unseen is not None
        tokens = [self.tokens(x, seen, student) for x, seen in zip(crops, keep)]
        x, groups = models.pack(tokens)
        for block in net.blocks:
            x = block(x, groups)
        outputs = models.unpack(net.norm(x), groups)
        cls = torch.cat([x[:, 0] for x in outputs])
        guess = None
        if student:
            patches = models.take(outputs[0][:, 1 + net.registers:], unseen)
            guess = branch.pred_head(patches) @ branch.pred_head.prototypes().T
        return branch.cls_head(cls), cls, guess


def make_step(args, all_tokens=False):
    """A whole training step on random pixels as a function without arguments, and the bytes at
    rest, of parameters and optimiser."""
    torch.manual_seed(0)
    net = pretrain.networks(args, DEVICE, quiet=True)
    student, teacher = net.student, net.teacher
    if all_tokens:
        net.ddp = AllTokens(student)
        net.teacher = AllTokens(teacher)
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, fused=True)
    for p in parameters:                                  # one step, so that its state is there
        p.grad = torch.zeros_like(p)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)

    views = pretrain.VIEWS[args.method]
    side = max(args.img_size, getattr(args, "local_size", 0)) + 40
    shape = (args.batch_size, views, len(args.sensor.bands), side, side)
    x = torch.randint(256, shape, dtype=torch.uint8, device=DEVICE)
    y = torch.randint(2, (args.batch_size, views, 9), device=DEVICE)
    rest = memory_now()

    def step():
        draws = pretrain.StepRandomness(0, 0, 0, 0, 1)
        loss, *_ = pretrain.STEPS[args.method](net, x, y, args, draws, {"teacher_tau": 0.04})
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        models.ema_update(teacher, student, 0.99)
    return step, rest


def images_of_step(args):
    """SoftCon reads two seasons of a scene, PerA one."""
    return args.batch_size * pretrain.VIEWS[args.method]


def step(args):
    work, rest = make_step(args)
    seconds = fastest(work, args.steps)
    flops = count_flops(work)
    images = images_of_step(args)
    return {"images_per_s": images / seconds, "flop_per_s": flops / seconds,
            "of_a_matrix_product": flops / seconds / matrix_product_speed(args.amp),
            "gflop_per_image": flops / images / 1e9, "rest_gb": rest / 1e9,
            "step_gb": (memory_peak() - rest) / 1e9}


def sparse(args, all_tokens=False):
    work, rest = make_step(args, all_tokens)
    seconds = fastest(work, args.steps)
    return {"images_per_s": args.batch_size / seconds, "rest_gb": rest / 1e9,
            "step_gb": (memory_peak() - rest) / 1e9}


def dense(args):
    return sparse(args, all_tokens=True)


def drop(args):
    chans = len(args.sensor.bands)
    net = models.build(args.arch, chans, args.img_size, args.patch_size).to(DEVICE)
    x = torch.rand(args.batch_size, chans, args.img_size, args.img_size, device=DEVICE)
    grid = models.check_grid(args.img_size, args.img_size, args.patch_size)
    keep = losses.block_mask(len(x), grid, 0.6, torch.Generator().manual_seed(0)).to(DEVICE)

    def work(keep=None):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=args.amp == "bf16"):
            net(x, keep).sum().backward()
    every = fastest(work, args.steps)
    kept = fastest(lambda: work(keep), args.steps)
    return {"all_ms": 1e3 * every, "kept_ms": 1e3 * kept, "ratio": kept / every,
            "flop_ratio": count_flops(lambda: work(keep)) / count_flops(work)}


def augment(args):
    chans = len(args.sensor.bands)
    n = 16
    x = torch.randint(256, (n, chans, 264, 264), dtype=torch.uint8, device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    crops = data.draw_crops(n, generator)
    light = data.draw_colours(n, args.sensor, generator)
    seconds = fastest(lambda: data.colour(data.crop(x, crops, args.img_size), light), 3)
    moved = n * chans * (264**2 + 4 * args.img_size**2)              # uint8 in, float32 out
    return {"images_per_s": n / seconds, "bytes_per_s": moved / seconds,
            "of_a_copy": moved / seconds / copy_speed()}


def loop(args):
    """The script for 8 steps, files decoded by one worker, beside its own step."""
    step_seconds = fastest(make_step(args)[0], args.steps)
    with tempfile.TemporaryDirectory() as folder:
        root = data.make_toy(f"{folder}/world", 3 * args.batch_size, 264)
        subprocess.run([
            sys.executable, pretrain.__file__, *args.flags, "--data", root, "--out",
            f"{folder}/run", "--preset", "full", "--cache", "0", "--workers", "1", "--epochs", "9",
            "--max-steps", "8", "--log-every", "4"], capture_output=True, check=True)
        log = Path(folder, "run", "log.jsonl").read_text().splitlines()
    last = json.loads(log[-1])
    images = images_of_step(args)
    return {"step_images_per_s": images / step_seconds, "loop_images_per_s": last["images_per_s"],
            "ratio": last["images_per_s"] * step_seconds / images, "data_wait": last["data_wait"]}


# ---------------------------------------------------------------------------------------- reading


def plain_reader(folder):
    """A product of 13 bands -> (13,264,264) uint8, as one would first write it."""
    sensor = data.SENSORS["s2c"]
    bands = []
    for name in sensor.bands:
        x = torch.from_numpy(tifffile.imread(f"{folder}/{name}.tif").astype(np.float32))
        bands.append(F.interpolate(x[None, None], (264, 264), mode="bilinear")[0, 0])
    mean = torch.tensor(sensor.mean)[:, None, None]
    std = torch.tensor(sensor.std)[:, None, None]
    x = (torch.stack(bands) - (mean - 2 * std)) * (255 / (4 * std)) + 0.5
    return x.clamp(0, 255).to(torch.uint8).numpy()


def drop_from_page_cache(root):
    """The files under `root` are read from the disk next time, but for those of a memory map."""
    os.sync()
    for path in Path(root).rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def images_per_s(scenes, workers, batches):
    """Through pretrain.py's DataLoader, from the second batch on, so that workers are up."""
    rng = np.random.default_rng(0)
    keys = []
    for k in range(batches):
        keys.append([(int(i), (k, int(i))) for i in rng.permutation(len(scenes))[:8]])
    loader = iter(DataLoader(scenes, batch_sampler=keys, collate_fn=default_convert,
                             num_workers=workers))
    next(loader)
    images = 0
    start = time.perf_counter()
    for x, _ in loader:
        images += x.shape[0] * x.shape[1]
    return images / (time.perf_counter() - start)


def reading_speeds(name, root, quick):
    """{reading processes: images/s}; "cold": no process, files just dropped from the page cache."""
    sensor = data.SENSORS["s2c"]
    drop_from_page_cache(root)
    speeds = {}
    for workers in ("cold", 0, 1, 2):
        batches, times = 8, 3
        if name == "packed":
            batches = 100
        if workers == "cold" or quick:
            batches, times = 4, 1
        found = []
        for _ in range(times):
            scenes = data.open_data(root, sensor)
            if name == "plain":
                scenes.decode = plain_reader
            found.append(images_per_s(scenes, 0 if workers == "cold" else workers, batches))
        speeds[str(workers)] = max(found)
    return speeds


def stack(bands, sensor):
    return np.stack(bands)


def write_zips(tree, root):
    """The images of a v1.0 tree as v1.1 has them, an image a chunk -> root."""
    scenes = data.open_data(tree, data.SENSORS["s2c"])
    read = partial(scenes.decode, scale=stack)
    x = np.stack([[read(path) for path in paths] for paths in scenes.files])
    products = [[Path(path).name for path in paths] for paths in scenes.files]
    folders.write_zip(Path(root, "S2L1C", "a.zarr.zip"), np.int16(x + 1000), scenes.sensor.bands,
                      scenes.ids, products)
    return root


def loader(args):
    """images/s of training batches: 8 scenes, 2 seasons, 13 bands, 264 px."""
    torch.set_num_threads(1)                                          # as in a worker
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        tree = data.make_toy(f"{folder}/toy", 24, 264)
        packed = f"{folder}/packed"
        data.pack(data.open_data(tree, data.SENSORS["s2c"]), packed)
        zips = write_zips(tree, f"{folder}/zips")
        for name, root in (("plain", tree), ("tiff", tree), ("zips", zips), ("packed", packed)):
            rows[name] = reading_speeds(name, root, args.quick)
    for name in ("tiff", "zips", "packed"):
        rows[f"{name} / plain"] = {k: v / rows["plain"][k] for k, v in rows[name].items()}
    moved = 2 * 13 * 264 * 264                                        # bytes, read and written
    rows["packed_of_a_copy"] = rows["packed"]["0"] * moved / copy_speed()
    return rows


# -------------------------------------------------------------------------------------- processes


def gather_and_compare(q, k, y):
    """Both directions of SoftCon's loss, forward and backward; q, k (n,2,D), y (n,2,L)."""
    keys = losses.gather(k)                                           # (M,2,D)
    labels = losses.gather(y)                                         # (M,2,L)
    total = 0
    for ours, theirs in ((0, 1), (1, 0)):
        loss, _, _ = losses.softcon_loss(q[:, ours], keys[:, theirs], y[:, ours], labels[:, theirs],
                                         0.2, 0.5)
        total = total + loss
    total.backward()


def one_rank(rank, world, file, batch, width, seconds):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=world)
    n = batch // world
    generator = torch.Generator().manual_seed(rank)
    q = torch.randn(n, 2, width, generator=generator, requires_grad=True)
    k = torch.randn(n, 2, width, generator=generator)
    y = torch.randint(2, (n, 2, 9), generator=generator, dtype=torch.uint8)
    seconds[rank] = fastest(lambda: gather_and_compare(q, k, y), 20)
    dist.destroy_process_group()


def gather(args, batch=256, width=256):
    """Keys (B,2,256) float32 and labels (B,2,9) uint8 of all ranks, and the loss on them."""
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


def spin(args):
    """Seconds a step of the first run with two threads, by busy neighbours and turns of waiting."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        root = data.make_toy(f"{folder}/world", 200)
        for neighbours in (0, 1, 2):
            busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"])
                    for _ in range(neighbours)]
            for turns in ("300000", "1000"):             # OpenMP's own number, and ours
                out = f"{folder}/{neighbours}_{turns}"
                environment = os.environ | {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": turns}
                subprocess.run([
                    sys.executable, pretrain.__file__, "--modality", "s1", "--preset", "toy",
                    "--data", root, "--out", out, "--device", "cpu", "--max-steps", "8",
                    "--log-every", "4"], env=environment, capture_output=True, check=True)
                last = json.loads(Path(out, "log.jsonl").read_text().splitlines()[-1])
                rows[f"{neighbours} busy, {turns} turns"] = 64 / last["images_per_s"]
            for process in busy:
                process.kill()
                process.wait()
    return rows


# ------------------------------------------------------------------------------------ command line

PARTS = {"loader": loader, "augment": augment, "step": step, "drop": drop, "sparse": sparse,
         "dense": dense, "loop": loop, "gather": gather, "spin": spin}


def training_args(ours, rest):
    """pretrain.py's flags with the defaults of this script."""
    flags = ["--modality", "s2c", "--arch", "vit_small", "--batch-size", "8"]
    if ours.quick:
        flags += ["--img-size", "112", "--batch-size", "4"]
        if "pera" in rest:
            flags += ["--local-size", "48"]
    flags += rest
    args = pretrain.parse(["--data", "none", "--preset", "full", *flags])
    if args.amp == "auto":
        args.amp = "bf16" if CUDA else "off"
    args.flags = flags
    args.steps = ours.steps
    args.quick = ours.quick
    return args


def run_part(part, ours, rest):
    """A part in a process of its own, so that peaks of memory are its own -> its JSON object."""
    command = [sys.executable, __file__, "--here", "--part", part, "--steps", str(ours.steps)]
    if ours.quick:
        command.append("--quick")
    if part in ("sparse", "dense"):
        command += ["--method", "pera", "--prototypes", "4096"]
    done = subprocess.run([*command, *rest], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"bench.py: error: {part}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--part", nargs="*", choices=list(PARTS), help="default: all")
    parser.add_argument("--steps", type=int, default=2, help="timed calls; the fastest counts")
    parser.add_argument("--quick", action="store_true", help="112 px, 4 scenes a step")
    parser.add_argument("--json", action="store_true", help="nothing but one JSON object")
    parser.add_argument("--here", action="store_true", help="one part, in this process")
    ours, rest = parser.parse_known_args(argv)
    if ours.here:
        print(json.dumps(PARTS[ours.part[0]](training_args(ours, rest))))
        return
    device = torch.cuda.get_device_name() if CUDA else "cpu"
    rows = {"machine": {"device": device, "threads": torch.get_num_threads(),
                        "torch": torch.__version__}}
    for part in ours.part or PARTS:
        rows[part] = run_part(part, ours, rest)
        if part == "dense" and "sparse" in rows:
            for name in ("images_per_s", "step_gb"):
                rows[part][f"sparse / dense, {name}"] = rows["sparse"][name] / rows[part][name]
        if not ours.json:
            print(part, json.dumps(rows[part]))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
