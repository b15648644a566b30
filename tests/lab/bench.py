"""Speed and memory of what one waits for, and the claims to check on a new GPU.

    python tests/lab/bench.py                            minutes on two CPU cores
    python tests/lab/bench.py --rows read step_vit
    python tests/lab/bench.py --gpu --json OUT           at most 8 minutes on one GPU
    python tests/lab/bench.py --small                    everything tiny, on the CPU: does it run?

agree_*   loss and gradient of a step on a GPU, beside those on the CPU, in float32, of a ResNet-50
          in float64; without --gpu both are those of the CPU
resume    losses of a training that stopped and went on, beside those of one that did not stop
step_*    images/s of pretrain.train_step on random pixels, and the loss of the first one; without
          --small the full preset's.  Three rows to compare with step_vit, in bf16 on a GPU:
          vit_unmasked   without SoftCon's mask, whose patches a ViT does not compute
          vit_float32    in float32
          vit_compiled   with --compile
read      images/s that pretrain.py's threads get from the disk, page cache cold and warm: if a
          step takes more, it waits
probe     images/s of k-NN as pretrain.py logs it: features of a frozen ViT-Small, and the head
pack      images/s of `data.py pack`, of SSL4EO-S12 v1.0: 13 TIFFs an image

Errors are relative; a row fails if one is above LARGEST_ERROR.  Each row also says its seconds and
the peak memory of its process: on the GPU, or else in all.  It has a process of its own, so one
that crashes or takes too long is a row that says so; with --small all run in this process.  Files
lie in TMPDIR, on the disk that is measured.  dry_run.py counts the operations of a step.
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
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data  # noqa: E402
import pretrain  # noqa: E402

MINUTES = 8                           # for all rows
ROW_SECONDS = 150                     # for one row
LARGEST_ERROR = 1e-3                  # of a ViT's gradient, float32's rounding made 6e-5

# flags of all steps; number of images that are read, probed and packed, and their side in pixels
SIZES = {
    "small": SimpleNamespace(device="cpu", images=16, side=36, flags=[
        "--preset", "toy", "--img-size", "16", "--batch-size", "2"]),
    "cpu": SimpleNamespace(device="cpu", images=96, side=264, flags=[
        "--preset", "full", "--batch-size", "4"]),
    "gpu": SimpleNamespace(device="cuda", images=512, side=264, flags=["--preset", "full"])}
STEPS = {
    "vit": ["--arch", "vit_small"],
    "pera": ["--method", "pera"],
    "resnet50": ["--arch", "resnet50"],
    "vit_unmasked": ["--arch", "vit_small", "--mask-ratio", "0"],
    "vit_float32": ["--arch", "vit_small", "--amp", "off"],
    "vit_compiled": ["--arch", "vit_small", "--compile"]}

# ----------------------------------------------------------------------------- what the rows share


def fastest(work, times=3):
    """Seconds of the fastest of some calls."""
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def relative_error(a, b):
    return float((a - b).norm() / a.norm())


def random_pack(folder, images, side):
    """A pack of random s2c pixels, two images a scene -> its path."""
    path = tempfile.mkdtemp(dir=folder)
    shape = (images, 13, side, side)
    np.save(f"{path}/images.npy", np.random.default_rng(0).integers(256, size=shape, dtype="u1"))
    rows = [f"place{i // 2},image{i},,class{i % 4}" for i in range(images)]
    Path(path, "images.csv").write_text("\n".join(["scene,image,split,labels", *rows]) + "\n")
    Path(path, "pack.json").write_text('{"sensor": "s2c"}')
    return path


def prepare_step(size, folder, flags, device):
    """What a step needs: args, net, values of the schedules, random x (B,V,C,H,W) and y (B,V,L)."""
    pack = random_pack(folder, images=512, side=4)         # for scenes; its pixels are not used
    args = pretrain.resolve_flags([
        "--modality", "s2c", "--data", pack, "--holdout", "0", "--out", f"{folder}/run",
        "--device", device, *size.flags, *flags])
    device = pretrain.choose_device(args)
    torch.manual_seed(0)
    net = pretrain.networks(args, device, quiet=True)
    shape = (args.batch_size, pretrain.VIEWS[args.method])
    x = torch.randint(256, (*shape, 13, size.side, size.side), dtype=torch.uint8)
    y = torch.randint(2, (*shape, 2), dtype=torch.uint8)
    values = pretrain.schedules(args, step=1, total=100)
    return SimpleNamespace(args=args, net=net, x=x.to(device), y=y.to(device), values=values)


# ---------------------------------------------------------------------------------------- the rows
# Each takes a size and an empty folder, and returns {name: number}.


def agree(size, folder, name, dtype=torch.float32):
    """Without drop path, which each device draws on its own."""
    torch.set_default_dtype(dtype)
    torch.backends.cudnn.allow_tf32 = False
    flags = [*STEPS[name], "--amp", "off", "--drop-path", "0", "--batch-size", "4"]
    losses = []
    gradients = []
    for device in ("cpu", size.device):
        run = prepare_step(size, folder, flags, device)
        draws = pretrain.StepRandomness(seed=0, step=1, micro=0, rank=0, world=1)
        method = pretrain.STEPS[run.args.method]
        result = method(run.net, run.x, run.y, run.args, draws, run.values)
        result.loss.backward()
        found = [p.grad.flatten() for p in run.net.student.parameters() if p.grad is not None]
        losses.append(result.loss.detach().cpu())
        gradients.append(torch.cat(found).cpu())
    torch.set_default_dtype(torch.float32)
    return {"loss_error": relative_error(*losses), "gradient_error": relative_error(*gradients)}


def resume(size, folder):
    """PerA has more than SoftCon to go on from.  (On the CPU, test_pretrain.py asks for 0.)"""
    flags = ["--modality", "s2c", "--data", random_pack(folder, images=48, side=40),
             "--holdout", "0", "--method", "pera", "--preset", "toy", "--batch-size", "8",
             "--drop-path", "0.1", "--amp", "off", "--device", size.device, "--log-every", "1"]
    losses = []
    for name, stops in {"whole": ["2"], "stopped": ["1", "2"]}.items():
        out = f"{folder}/{name}"
        for stop in stops:
            pretrain.main([*flags, "--out", out, "--max-steps", stop, "--resume"])
        log = Path(out, "log.jsonl").read_text().splitlines()
        losses.append(torch.tensor([json.loads(line)["loss"] for line in log]))
    return {"loss_error": relative_error(*losses)}


def step(size, folder, name):
    run = prepare_step(size, folder, STEPS[name], size.device)
    if run.args.compile:
        pretrain.compile_networks(run.net)
    optimiser = pretrain.adamw(run.net.student, run.args)
    batch = [(run.x, run.y)]

    def train():
        return pretrain.train_step(run.net, optimiser, batch, run.args, 1, run.values)
    loss = float(train().loss)                             # it warms up, and compiles
    images = run.x.shape[0] * run.x.shape[1]
    return {"images_per_s": images / fastest(train), "loss": loss}


def read(size, folder):
    path = random_pack(folder, size.images, size.side)
    os.sync()
    with open(f"{path}/images.npy", "rb") as file:         # its pages leave the cache
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    pack = data.open_pack(path)
    batches = np.random.default_rng(0).permutation(size.images).reshape(-1, 4, 2)

    def read_all():
        list(pretrain.read_ahead(pack, batches, torch.device("cpu")))
    cold = fastest(read_all, times=1)
    return {"cold_images_per_s": size.images / cold,
            "warm_images_per_s": size.images / fastest(read_all)}


def probing(size, folder):
    run = prepare_step(size, folder, STEPS["vit"], size.device)
    run.args.pack = data.open_pack(random_pack(folder, size.images, size.side))
    split = np.where(np.arange(size.images) % 4, "train", "test")

    def knn():
        pretrain.knn_value(run.net, run.args, split, size.device)
    knn()                                                  # it warms up
    return {"images_per_s": size.images / fastest(knn, times=1)}


def packing(size, folder):
    world = data.make_toy(f"{folder}/toy", size.images // 4, size.side)        # 4 seasons a scene
    archive = data.open_archive(world, data.SENSORS["s2c"])
    seconds = fastest(lambda: data.pack(archive, f"{folder}/pack"), times=1)
    return {"images_per_s": len(archive.images) / seconds}


# the most important ones first: the time may not reach the last
ROWS = {
    "agree_vit": partial(agree, name="vit"),
    "agree_pera": partial(agree, name="pera"),
    # float32's rounding alone changes the gradient of a fresh ResNet-50 by 5 %
    "agree_resnet50": partial(agree, name="resnet50", dtype=torch.float64),
    "resume": resume,
    **{f"step_{name}": partial(step, name=name) for name in STEPS},
    "read": read, "probe": probing, "pack": packing}
NEED_CUDA = ("step_vit_float32", "step_vit_compiled")      # on a CPU step_vit is in float32

# --------------------------------------------------------------------------------- running the rows


def run_here(size, name):
    """A row in this process, where nothing else may speak -> {"status", numbers or "reason"}."""
    if name in NEED_CUDA and size.device != "cuda":
        return {"status": "not run", "reason": "needs CUDA"}
    silence = io.StringIO()
    begin = time.perf_counter()
    with (tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(silence),
          contextlib.redirect_stderr(silence)):
        numbers = ROWS[name](size, folder)
    numbers["peak_gb"] = pretrain.peak_memory_gb()
    numbers["seconds"] = time.perf_counter() - begin
    row = {"status": "passed"}
    for key, value in numbers.items():
        row[key] = float(f"{value:.4g}")
        if key.endswith("error") and not value <= LARGEST_ERROR:           # so NaN fails, too
            row["status"] = "failed"
    return row


def run_apart(options, name, limit):
    """A row in a process of its own, which gets `limit` seconds."""
    if limit < 5:
        return {"status": "not run", "reason": "no time left"}
    command = [sys.executable, __file__, "--row", name]
    if options.size == "gpu":
        command.append("--gpu")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"longer than {limit:.0f} s"}
    if done.returncode:
        last = done.stderr.strip().split("\n")[-1]
        return {"status": "failed", "reason": f"ended with {done.returncode}: {last}"}
    return json.loads(done.stdout.splitlines()[-1])


def print_row(name, row):
    facts = [f"{key} {value}" for key, value in row.items()]
    print(f"{name:18} {', '.join(facts)}", flush=True)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME",
         help="only these rows, in this order")
    flag("--gpu", dest="size", action="store_const", const="gpu", default="cpu",
         help="on the GPU, at the presets' batch sizes")
    flag("--small", dest="size", action="store_const", const="small", help="tiny, on the CPU")
    flag("--json", metavar="OUT", help="write machine and rows to this file, after each row")
    flag("--row", choices=list(ROWS), help=argparse.SUPPRESS)      # in this process, as JSON
    options = parser.parse_args(argv)
    if options.size == "gpu" and not torch.cuda.is_available():
        parser.error("--gpu: there is no GPU")
    return options


def main(argv=None):
    """Returns 1 if a row failed, else 0."""
    options = parse(argv)
    size = SIZES[options.size]
    if options.row:
        print(json.dumps(run_here(size, options.row)))
        return 0
    machine = {"device": torch.cuda.get_device_name() if options.size == "gpu" else "CPU",
               "threads": torch.get_num_threads(), "torch": torch.__version__,
               "commit": pretrain.commit()}
    print_row("machine", machine)
    rows = {}
    deadline = time.monotonic() + 60 * MINUTES
    for name in options.rows:
        if options.size == "small":
            rows[name] = run_here(size, name)
        else:
            limit = min(ROW_SECONDS, deadline - time.monotonic())
            rows[name] = run_apart(options, name, limit)
        print_row(name, rows[name])
        if options.json:
            Path(options.json).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    return int(any(row["status"] == "failed" for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
