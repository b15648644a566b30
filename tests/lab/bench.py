"""Speed and memory of what a training waits for, and the claims to check on a new GPU.

    python tests/lab/bench.py                            minutes on two CPU cores
    python tests/lab/bench.py --rows read step_vit_small
    python tests/lab/bench.py --gpu --json OUT           at most 8 minutes on one GPU
    python tests/lab/bench.py --small                    everything tiny, on the CPU: does it run?

pack       images/s of `data.py pack`, of SSL4EO-S12 v1.0: 13 TIFFs an image
read       images/s of Pack.read by 1 and 4 threads, warm and cold (page cache dropped), beside
           indexing a memory map
augment    images/s of crop, resize, flip and colours of a batch
step_*     pretrain.train_step on random pixels at full size: images/s, peak memory of the process;
           dry_run.py counts the operations

and with --gpu, the most important ones first:

agree_*    losses of five steps on the CPU and on the GPU are the same in float32
bf16       a training in bf16 gets better
resume     a training goes on where it stopped
memory     out of memory ends in one line that names the flags to turn
compile    --compile: how much faster the steps are, and whether the loss stays
loader     the loop itself on a pack of 264 px: images/s, and the share that waits for data

Each row runs in a process of its own, so one that crashes or takes too long is a row that says so;
with --small all run in this process.  Rows that the time does not reach say so, too.  Files lie in
TMPDIR, on the disk that is measured.
"""
import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import pretrain  # noqa: E402


# ---------------------------------------------------------------------------------------- measures


def fastest(work, device, times=3):
    """Seconds of the fastest of some calls."""
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


# --------------------------------------------------------------------------------- packing, reading


def packing(options, folder):
    scenes, size = (4, 24) if options.small else (24, 264)
    world = data.make_toy(f"{folder}/toy", scenes, size)
    archive = data.open_archive(world, data.SENSORS["s2c"])
    begin = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        data.pack(archive, f"{folder}/pack")
    return {"images_per_s": len(archive.images) / (time.perf_counter() - begin)}


def random_pack(path, scenes, size):
    """A pack of s2c pixels: two images a scene, which share a level in each band -> its path."""
    rng = np.random.default_rng(0)
    os.makedirs(path)
    shape = (13, size, size)
    images = np.lib.format.open_memmap(f"{path}/images.npy", "w+", np.uint8, (2 * scenes, *shape))
    rows = ["scene,image,split,labels"]
    for i in range(scenes):
        level = rng.integers(32, 224, size=(13, 1, 1), dtype=np.uint8)
        for j in (2 * i, 2 * i + 1):
            images[j] = level + rng.integers(32, size=shape, dtype=np.uint8)
            rows.append(f"place{i},image{j},,{'land' if i % 2 else 'land;water'}")
    images.flush()
    Path(path, "images.csv").write_text("\n".join(rows) + "\n")
    Path(path, "pack.json").write_text('{"sensor": "s2c"}')
    return path


def reading_rate(path, mapped, threads, cold):
    """Images/s of all images of a pack, in random order, eight at a time."""
    if cold:                          # pages leave the cache if no memory map has touched them
        os.sync()
        with open(f"{path}/images.npy", "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    opened = data.open_pack(path)
    order = np.random.default_rng(1).permutation(len(opened.names))

    def read_some(start):
        rows = order[start:start + 8]
        out = np.empty((len(rows), *opened.images.shape[1:]), np.uint8)
        if mapped:
            out[:] = opened.images[rows]
        else:
            opened.read(rows, out)
    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read_some, range(0, len(order), 8)))
    return len(order) / (time.perf_counter() - begin)


def read(options, folder):
    scenes, size = (8, 32) if options.small else (500, 264)
    path = random_pack(f"{folder}/pack", scenes, size)
    result = {}
    for state in ("warm", "cold"):
        for how in ("pack", "map"):
            for threads in (1, 4):
                rate = reading_rate(path, how == "map", threads, state == "cold")
                result[f"{state} {how} x{threads}"] = rate
    return result


# ----------------------------------------------------------------------------------- training steps

# flags of a step, and what a CPU, a GPU or --small changes
STEPS = {
    "vit_small": ["--arch", "vit_small"],
    "resnet50": ["--arch", "resnet50"],
    "pera": ["--method", "pera", "--arch", "vit_small"]}
SIZES = {
    ("cpu", "softcon"): ["--batch-size", "8"],
    ("cpu", "pera"): ["--batch-size", "8", "--prototypes", "4096"],
    ("gpu", "softcon"): ["--batch-size", "256"],
    ("gpu", "pera"): ["--batch-size", "192", "--arch", "vit_base"],
    ("small", "softcon"): ["--batch-size", "2", "--img-size", "28", "--hidden", "32"],
    ("small", "pera"): ["--batch-size", "2", "--img-size", "32", "--patch-size", "8", "--hidden",
                        "32", "--local-size", "16", "--crops", "2", "2", "--prototypes", "32"]}
SMALL_ARCH = {"vit_small": "vit_tiny", "resnet50": "resnet18", "pera": "vit_tiny"}


class Steps:
    """pretrain.py's steps on random pixels x (B,V,C,H,W) and labels y (B,V,L); a call makes one."""

    def __init__(self, options, name, device, *more):
        method = "pera" if name == "pera" else "softcon"
        flags = [*STEPS[name], *SIZES["gpu" if options.gpu else "cpu", method]]
        if options.small:
            flags += [*SIZES["small", method], "--arch", SMALL_ARCH[name]]
        with tempfile.TemporaryDirectory() as folder:
            pack = random_pack(f"{folder}/pack", 256, 4)          # its pixels are not used
            self.args = args = pretrain.resolve_flags([
                "--modality", "s2c", "--data", pack, "--holdout", "0", "--preset", "full",
                "--out", f"{folder}/run", "--device", device, *flags, *more])
        torch.manual_seed(0)
        self.net = pretrain.networks(args, torch.device(device), quiet=True)
        self.optimiser = pretrain.adamw(self.net.student, args)
        views = pretrain.VIEWS[method]
        self.images = args.batch_size * views
        side = args.img_size * 264 // 224
        x = torch.randint(256, (args.batch_size, views, 13, side, side), dtype=torch.uint8)
        y = torch.randint(2, (args.batch_size, views, 2), dtype=torch.uint8)
        self.batch = [(x.to(device), y.to(device))]

    def __call__(self, step=1):
        values = pretrain.schedules(self.args, step, 100)
        return pretrain.train_step(self.net, self.optimiser, self.batch, self.args, step, values)


def step(options, folder, name):
    steps = Steps(options, name, options.device)
    steps()                                                     # warms up
    seconds = fastest(steps, options.device, 1 if options.small else 3)
    return {"images_per_s": steps.images / seconds, "peak_gb": pretrain.peak_memory_gb()}


def augment(options, folder):
    n, size, side = (4, 33, 28) if options.small else (16, 264, 224)
    x = torch.randint(256, (n, 13, size, size), dtype=torch.uint8, device=options.device)
    generator = torch.Generator().manual_seed(0)
    crops = data.draw_crops(n, generator)
    light = data.draw_colours(n, data.SENSORS["s2c"], generator)
    seconds = fastest(lambda: data.colour(data.crop(x, crops, side), light), options.device)
    return {"images_per_s": n / seconds}


# --------------------------------------------------------------------------- claims, for a new GPU


def largest_error(a, b):
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))


def agree(options, folder, name):
    """Without drop path, in small batches; on the CPU two runs are the same to the bit."""
    torch.set_float32_matmul_precision("highest")               # no TF32
    torch.backends.cudnn.allow_tf32 = False
    found = []
    for device in ("cpu", options.device):
        steps = Steps(options, name, device, "--amp", "off", "--drop-path", "0", "--batch-size",
                      "4")
        found.append([float(steps(i).loss) for i in range(1 if options.small else 5)])
    error = largest_error(*found)
    limit = 1e-3 if options.device == "cuda" else 0
    return {"passed": error <= limit, "error": error, "last_loss": found[0][-1]}


SHORT = ["--modality", "s2c", "--holdout", "0", "--preset", "toy", "--arch", "vit_tiny", "--hidden",
         "32", "--img-size", "24", "--patch-size", "6", "--batch-size", "8", "--epochs", "20"]


def train(options, pack, out, *flags):
    """A short training by pretrain.py in this process -> the lines of its log."""
    with contextlib.redirect_stdout(io.StringIO()):
        pretrain.main([*SHORT, "--data", pack, "--out", out, "--device", options.device,
                       "--log-every", "1", *flags])
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def bf16(options, folder):
    pack = random_pack(f"{folder}/pack", 24, 24)
    log = train(options, pack, f"{folder}/run", "--amp", "bf16", "--max-steps", "60")
    first = float(np.mean([line["loss"] for line in log[:6]]))
    last = float(np.mean([line["loss"] for line in log[-6:]]))
    return {"passed": last < first, "first_loss": first, "last_loss": last}


def resume(options, folder):
    """2 steps are 1 step, a stop, and 1 step: to the bit on the CPU, else but for rounding."""
    pack = random_pack(f"{folder}/pack", 24, 24)
    flags = ["--method", "pera", "--local-size", "12", "--drop-path", "0.1", "--amp", "off"]
    whole = train(options, pack, f"{folder}/whole", *flags, "--max-steps", "2")
    train(options, pack, f"{folder}/stopped", *flags, "--max-steps", "1")
    resumed = train(options, pack, f"{folder}/stopped", *flags, "--max-steps", "2", "--resume")
    error = largest_error([line["loss"] for line in whole], [line["loss"] for line in resumed])
    return {"passed": error <= (1e-3 if options.device == "cuda" else 0), "error": error}


def memory(options, folder):
    """The GPU gives a hundredth of its memory; the batch takes more."""
    start = ("import runpy, torch; torch.cuda.set_per_process_memory_fraction(0.01); "
             "runpy.run_path('pretrain.py', run_name='__main__')")
    flags = [*SHORT, "--data", random_pack(f"{folder}/pack", 24, 24), "--out", f"{folder}/run",
             "--img-size", "1020", "--batch-size", "16"]
    done = subprocess.run([sys.executable, "-c", start, *flags], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    line = last_line(done.stderr)
    return {"passed": done.returncode == 1 and "--batch-size" in line, "line": line}


def compiled(options, folder):
    """The ViT's step."""
    plain = Steps(options, "vit_small", options.device)
    fast = Steps(options, "vit_small", options.device)
    pretrain.compile_networks(fast.net)
    error = largest_error([float(plain(1).loss)], [float(fast(1).loss)])
    seconds = {steps: fastest(steps, options.device) for steps in (plain, fast)}
    return {"passed": error < 1e-2, "error": error, "times_as_fast": seconds[plain] / seconds[fast]}


def loader(options, folder):
    """The second half of some steps."""
    pack = random_pack(f"{folder}/pack", *((16, 33) if options.small else (512, 264)))
    flags = ["--max-steps", "2"]
    if not options.small:
        flags = ["--max-steps", "12", "--arch", "vit_small", "--img-size", "224", "--patch-size",
                 "14", "--hidden", "4096", "--batch-size", "256"]
    log = train(options, pack, f"{folder}/run", *flags)
    half = log[len(log) // 2:]
    return {name: float(np.mean([line[name] for line in half]))
            for name in ("images_per_s", "data_wait")}


# -------------------------------------------------------------------------------------------- rows

# each takes the options and an empty folder, and returns {name: number}
STEP_ROWS = {f"step_{name}": partial(step, name=name) for name in STEPS}
HOUSE = {"pack": packing, "read": read, "augment": augment, **STEP_ROWS}
GPU = {**{f"agree_{name}": partial(agree, name=name) for name in STEPS}, "bf16": bf16,
       "resume": resume, "memory": memory, **STEP_ROWS, "compile": compiled, "augment": augment,
       "loader": loader}
ROWS = HOUSE | GPU
NEED_CUDA = ("bf16", "memory", "compile")
ROW_SECONDS = 150                     # that a row may take


def run_here(options, name):
    """A row in this process -> {"status", numbers or "reason"}."""
    if name in NEED_CUDA and options.device != "cuda":
        return {"status": "not run", "reason": "needs CUDA"}
    with tempfile.TemporaryDirectory() as folder:
        result = ROWS[name](options, folder)
    passed = result.pop("passed", True)
    return {"status": "passed" if passed else "failed", **result}


def run_apart(options, name, limit):
    """A row in a process of its own that gets `limit` seconds."""
    command = [sys.executable, __file__, "--row", name, *["--gpu"] * options.gpu]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"longer than {limit:.0f} s"}
    if done.returncode:
        return {"status": "failed",
                "reason": f"exit status {done.returncode}: {last_line(done.stderr)}"}
    return json.loads(last_line(done.stdout))


def last_line(text):
    return (text.strip().splitlines() or ["no output"])[-1]


def print_row(name, result):
    facts = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
             for key, value in result.items()]
    print(f"{name:16} {', '.join(facts)}", flush=True)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--rows", nargs="+", choices=list(ROWS), metavar="NAME", help="these rows, in this order")
    flag("--gpu", action="store_true", help="the rows of a GPU, at its batch sizes")
    flag("--small", action="store_true", help="all rows, tiny, on the CPU")
    flag("--minutes", type=float, default=8, help="stop after them (%(default)s)")
    flag("--json", metavar="OUT", help="write rows and machine to this file, after each row")
    flag("--row", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu: there is no GPU")
    options.device = "cuda" if options.gpu else "cpu"
    return options


def main(argv=None):
    """Returns 1 if a row failed, else 0."""
    options = parse(argv)
    if options.row:
        print(json.dumps(run_here(options, options.row)))
        return 0
    names = list(GPU) if options.gpu else list(HOUSE)
    if options.small:
        names = list(ROWS)
        torch.set_num_threads(1)
    machine = {"card": torch.cuda.get_device_name() if options.gpu else "cpu",
               "threads": torch.get_num_threads(), "torch": torch.__version__,
               "commit": pretrain.commit()}
    print_row("machine", machine)
    rows = {}
    deadline = time.monotonic() + 60 * options.minutes
    for name in options.rows or names:
        begin = time.monotonic()
        limit = min(ROW_SECONDS, deadline - begin)
        if limit < 5:
            result = {"status": "not run", "reason": "no time left"}
        elif options.small:
            result = run_here(options, name)
        else:
            result = run_apart(options, name, limit)
        rows[name] = result | {"seconds": time.monotonic() - begin}
        print_row(name, rows[name])
        if options.json:
            Path(options.json).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    return int(any(row["status"] == "failed" for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
