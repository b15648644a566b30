"""Proves and measures the CUDA path in one call: claims, speed, memory, and a short training.

    python tests/lab/gpu.py --json OUT                             at most 8 minutes on one GPU
    python tests/lab/gpu.py --peers PEERS.py --data DIR --json OUT     with all that it can do
    python tests/lab/gpu.py --rows step_vit_base step_vit_base_compiled
    python tests/lab/gpu.py --device cpu --small                   half a minute; CI runs this

Rows, the most important ones first:

agree_*      losses and features on the CPU and on the GPU are the same in float32
bf16         a training in bf16 gets better
resume       a training on the GPU goes on where it stopped
batches      pinned batches arrive whole, although the copy happens later
syncs        a step waits for the GPU once, to see whether the gradient is finite
ranks        a process too many for the GPUs is refused in one line
memory       out of memory ends in one line that names the flags to turn
compile      --compile runs and changes no loss
step_*       training steps at full size: images/s, memory, FLOP/s, what takes the time
loader       the real loop on a pack of 264 px, by the ways to read it
*_compiled   the same steps with --compile
peers        the steps of other code (--peers), by a script that is not part of this repository
training     SoftCon's hard term on a folder of classes (--data), then the probe

Each row runs in a process of its own, so a row that crashes or takes too long is a row that says
so.  With --small all rows run in this process, to load PyTorch once; sizes are tiny, and rows that
need CUDA say so.  Rows that the time does not reach are left out and say so.

FLOP/s count what a step executes: also what PerA computes twice to save memory.  Shares of a step
(augment, loss, optimise) are times of these parts alone over the time of the step.
"""
import argparse
import contextlib
import io
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.utils.data import DataLoader, default_convert

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
import bench  # noqa: E402
import data  # noqa: E402
import losses  # noqa: E402
import model as models  # noqa: E402
import pretrain  # noqa: E402
import probe  # noqa: E402


class Skipped(Exception):
    """A row cannot run here; the text says why."""


def needs_cuda(options):
    if options.device != "cuda":
        raise Skipped("needs CUDA")


# ---------------------------------------------------------------------------------- training steps


def training_args(options, *flags):
    """pretrain.py's flags -> its namespace; the GPU is set up as pretrain.py does it."""
    args = pretrain.parse(["--data", "none", "--preset", "full", "--device", options.device,
                           *flags])
    pretrain.start_processes(args)                      # decides args.amp, allows TF32, and so on
    return args


class Training:
    """The loop of pretrain.py without data, log and checkpoints: random pixels, random labels.

    x (B,V,C,H,W) uint8 and y (B,V,L) uint8 are on the device.
    """

    def __init__(self, args, device):
        torch.manual_seed(0)
        self.args = args
        self.net = pretrain.networks(args, device, quiet=True)
        self.optimiser = pretrain.adamw(self.net.student, args)
        generator = torch.Generator().manual_seed(1)
        views = pretrain.VIEWS[args.method]
        side = args.img_size * 264 // 224
        shape = (args.batch_size, views, len(args.sensor.bands), side, side)
        x = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        y = torch.randint(2, (args.batch_size, views, 9), dtype=torch.uint8, generator=generator)
        self.x = x.to(device)
        self.y = y.to(device)

    def images(self):
        """Images of a step, as pretrain.py's log counts them."""
        return self.x.shape[0] * self.x.shape[1]

    def differentiate(self, step):
        """Forward and backward of a step -> its loss and the teacher's features."""
        self.now = pretrain.schedules(self.args, step, 100)
        draws = pretrain.StepRandomness(0, step, 0, 0, 1)
        loss, _, _, features = pretrain.STEPS[self.args.method](
            self.net, self.x, self.y, self.args, draws, self.now)
        loss.backward()
        return loss.detach(), features.detach()

    def optimise(self):
        """What follows the backward pass, with the one wait for the GPU."""
        matrices, vectors = self.optimiser.param_groups
        matrices["lr"] = vectors["lr"] = self.now["lr"]
        norm = torch.nn.utils.clip_grad_norm_(
            matrices["params"] + vectors["params"], self.args.clip or float("inf"))
        if not torch.isfinite(norm):
            raise ValueError(f"gradient norm {norm:g}")
        self.optimiser.step()
        models.ema_update(self.net.teacher, self.net.student, self.now["momentum"])

    def step(self, step=1):
        loss, features = self.differentiate(step)
        self.optimise()
        self.optimiser.zero_grad(set_to_none=True)
        return loss, features

    # the parts of a step, alone

    def augment(self):
        draws = pretrain.StepRandomness(0, 1, 0, 0, 1)
        if self.args.method == "softcon":
            pretrain.softcon_views(self.x, self.args, draws)
            return
        n_global, n_local = self.args.crops
        x = self.x[:, 0]
        pretrain.aligned_pairs(x, self.args, draws, n_global, self.args.img_size, 0.4, 1.0)
        pretrain.aligned_pairs(x, self.args, draws, n_local, self.args.local_size, 0.05, 0.4)

    def loss(self):
        """Forward and backward of the loss on random embeddings."""
        B = len(self.x)
        device = self.x.device
        if self.args.method == "softcon":
            q = torch.randn(2, B, 256, device=device, requires_grad=True)
            k = torch.randn(2, B, 256, device=device)
            y = self.y.transpose(0, 1)                                    # (2,B,L)
            loss1, _, _ = losses.softcon_loss(q[0], k[1], y[0], y[1])
            loss2, _, _ = losses.softcon_loss(q[1], k[0], y[1], y[0])
            (loss1 + loss2).backward()
            return
        n_global, n_local = self.args.crops
        crops = n_global + n_local
        z = torch.randn(crops * B, 384, device=device, requires_grad=True)
        z_t = torch.randn(crops * B, 384, device=device)
        with pretrain.autocast(self.args, device):
            W = self.net.student.cls_head.prototypes()
            W_t = self.net.teacher.cls_head.prototypes()
            dino, koleo = losses.pera_loss(z, z_t, [W, W_t], self.net.centre.value, 0.04, crops,
                                           n_global)
        (dino + koleo).backward()


def seconds_of(work, times, device):
    """Median seconds of `times` calls in a row, on a GPU by its own clock; warm up before."""
    found = []
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
        events[0].record()
        for event in events[1:]:
            work()
            event.record()                              # no wait: the calls follow each other
        torch.cuda.synchronize()
        for begin, end in zip(events, events[1:]):
            found.append(begin.elapsed_time(end) / 1000)
    else:
        for _ in range(times):
            begin = time.perf_counter()
            work()
            found.append(time.perf_counter() - begin)
    return statistics.median(found)


def matrix_product_speed(options, device):
    """FLOP/s of a bf16 matrix product (8192 cubed) of random numbers: what the card can do."""
    n = 256 if options.small else 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    b = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ b
    return 2 * n**3 / seconds_of(lambda: a @ b, 10, device)


# ------------------------------------------------------------------------------------------- data


def random_image(path, bands, size):
    """The image of a made-up file "NUMBER": random pixels (C,size,size) uint8."""
    rng = np.random.default_rng(int(path))
    return rng.integers(256, size=(bands, size, size), dtype=np.uint8)


def random_pack(folder, scenes, size):
    """A packed folder of `scenes` s2c scenes with two random images each -> its path."""
    sensor = data.SENSORS["s2c"]
    files = [[str(2 * i), str(2 * i + 1)] for i in range(scenes)]
    labels = list(np.random.default_rng(0).integers(2, size=(scenes, 2, 9), dtype=np.uint8))
    ids = [f"{i:07d}" for i in range(scenes)]
    source = data.Scenes(ids, files, labels, data.CLASSES, sensor, size,
                         lambda path: random_image(path, len(sensor.bands), size))
    data.pack(source, f"{folder}/pack")
    return f"{folder}/pack"


def run_pretrain(options, folder, *flags):
    """pretrain.py in this process -> (lines of its log, what it printed).  folder: --out."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        pretrain.main(["--device", options.device, "--preset", "full", "--out", str(folder),
                       *flags])
    log = Path(folder, "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in log], said.getvalue()


def run_script(flags, folder, environment=None, before=None):
    """pretrain.py as a user calls it -> (exit status, last line of its errors).

    before: Python code that the process runs first.
    """
    command = [sys.executable, str(ROOT / "pretrain.py")]
    if before:
        start = "import runpy; runpy.run_path('pretrain.py', run_name='__main__')"
        command = [sys.executable, "-c", f"{before}; {start}"]
    # run_path does not put the script's folder on the path
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {})
    done = subprocess.run([*command, *flags, "--out", f"{folder}/out"], cwd=ROOT,
                          env=environment, capture_output=True, text=True)
    return done.returncode, last_line(done.stderr)


def last_line(text):
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no output"


# networks of two blocks: to train on the CPU, and to compile in seconds
SMALL_VIT = {"vit_tiny": dict(width=64, depth=2, heads=1)}
SMALL_RESNET = {"resnet18": dict(depths=(1, 1, 1, 1), bottleneck=False)}

# a short training of a small network on a small world; each method
SHORT = {
    "softcon": ["--arch", "vit_tiny", "--img-size", "24", "--patch-size", "6", "--hidden", "32",
                "--batch-size", "8", "--epochs", "4", "--log-every", "1", "--workers", "0"],
    "pera": ["--method", "pera", "--arch", "vit_tiny", "--img-size", "24", "--patch-size", "6",
             "--hidden", "32", "--batch-size", "8", "--epochs", "4", "--log-every", "1",
             "--workers", "0", "--local-size", "12", "--crops", "2", "2", "--prototypes", "64"]}


def small_world(folder, modality="s1"):
    """24 scenes of 24 px -> the flags that name them."""
    root = data.make_toy(f"{folder}/world", 24, 24, workers=0)
    return ["--modality", modality, "--data", root, "--holdout", "0"]


# ----------------------------------------------------------------------------------------- claims

# name: flags at full size, flags at small size.  No drop path: a GPU draws other samples.
AGREE = {
    "agree_resnet": (["--arch", "resnet50", "--batch-size", "8"],
                     ["--arch", "resnet18", "--img-size", "28", "--hidden", "64",
                      "--batch-size", "4"]),
    "agree_vit": (["--arch", "vit_small", "--batch-size", "8"],
                  ["--arch", "vit_tiny", "--img-size", "28", "--hidden", "64",
                   "--batch-size", "4"]),
    "agree_pera": (["--method", "pera", "--arch", "vit_small", "--crops", "2", "4",
                    "--prototypes", "4096", "--batch-size", "8", "--drop-path", "0"],
                   ["--method", "pera", "--arch", "vit_tiny", "--img-size", "48",
                    "--local-size", "32", "--patch-size", "8", "--crops", "2", "2", "--hidden",
                    "64", "--prototypes", "64", "--batch-size", "4", "--drop-path", "0"])}


def five_steps(args, device):
    """-> losses of five steps, features of the first."""
    training = Training(args, device)
    values = []
    for step in range(5):
        loss, features = training.step(step)
        values.append(float(loss))
        if step == 0:
            first_features = features.float().cpu()
    return values, first_features


def agree(options, name):
    """Both devices compute the same, but for rounding.  On the CPU: two runs, to the bit."""
    flags = AGREE[name][options.small]
    args = training_args(options, "--modality", "s2c", "--amp", "off", *flags)
    torch.set_float32_matmul_precision("highest")                        # no TF32
    torch.backends.cudnn.allow_tf32 = False
    values, features = five_steps(args, torch.device("cpu"))
    values_2, features_2 = five_steps(args, torch.device(options.device))
    loss_error = max(abs(a - b) / abs(a) for a, b in zip(values, values_2))
    feature_error = float((features - features_2).norm() / features.norm())
    if options.device == "cpu":
        passed = loss_error == 0 and feature_error == 0
    else:
        passed = loss_error < 1e-3 and feature_error < 1e-4
    return {"passed": passed, "loss_error": loss_error, "feature_error": feature_error,
            "first_loss": values[0], "last_loss": values[-1]}


def bf16(options):
    """The loss falls on the toy world: that of the last steps, a tenth, is below the first ones'.

    In the small mode it is a short training of a small ViT: most CPUs are slow in bf16.
    """
    with tempfile.TemporaryDirectory() as folder:
        if options.small:
            flags = [*small_world(folder, "s2c"), *SHORT["softcon"], "--epochs", "12",
                     "--max-steps", "30", "--lr", "2e-3", "--warmup", "0"]
        else:
            root = data.make_toy(f"{folder}/world", 200, 36, workers=8)
            flags = ["--modality", "s2c", "--data", root, "--arch", "resnet18", "--img-size", "32",
                     "--patch-size", "4", "--hidden", "512", "--batch-size", "32", "--epochs", "40",
                     "--max-steps", "100", "--lr", "5e-4", "--workers", "0", "--log-every", "1"]
        flags += ["--mask-ratio", "0", "--jitter", "0", "--grey", "0", "--crop-min", "0.5",
                  "--momentum", "0.9", "--amp", "bf16"]
        log, _ = run_pretrain(options, f"{folder}/run", *flags)
    tenth = len(log) // 10
    first = statistics.mean(line["loss"] for line in log[:tenth])
    last = statistics.mean(line["loss"] for line in log[-tenth:])
    return {"passed": last < first, "steps": len(log), "first_loss": first, "last_loss": last}


def resume(options):
    """8 steps are 4 steps, a stop, and 4 steps: to the bit on the CPU, else but for rounding.

    In float32, where the GPU's rounding, which differs from run to run, stays small.
    """
    result = {"passed": True}
    with tempfile.TemporaryDirectory() as folder:
        world = small_world(folder)
        for method, flags in SHORT.items():
            flags = [*world, *flags, "--drop-path", "0.1", "--amp", "off"]
            whole, _ = run_pretrain(options, f"{folder}/{method}", *flags, "--max-steps", "8")
            parts = f"{folder}/{method}_in_parts"
            run_pretrain(options, parts, *flags, "--max-steps", "4")
            resumed, _ = run_pretrain(options, parts, *flags, "--max-steps", "8", "--resume")
            error = max(abs(a["loss"] - b["loss"]) / abs(a["loss"])
                        for a, b in zip(whole[4:], resumed[4:], strict=True))
            same_bits = same_students(f"{folder}/{method}/last.pt", f"{parts}/last.pt")
            result[f"{method}_loss_error"] = error
            result[f"{method}_same_bits"] = same_bits
            fine = error < 1e-3 if options.device == "cuda" else same_bits
            result["passed"] = result["passed"] and fine
    return result


def same_students(path_a, path_b):
    """Are the weights of the students in two checkpoints the same to the bit?"""
    a = torch.load(path_a, weights_only=True, map_location="cpu")["student"]
    b = torch.load(path_b, weights_only=True, map_location="cpu")["student"]
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def batches(options):
    """Batches as the loop gets them, copied behind work that keeps the GPU busy."""
    device = torch.device(options.device)
    count = 8 if options.small else 60
    work = torch.randn(2048, 2048, device=device) if device.type == "cuda" else torch.ones(2, 2)
    args = training_args(options, "--modality", "s2c", "--batch-size", "16")
    with tempfile.TemporaryDirectory() as folder:
        scenes = data.open_data(random_pack(folder, 64, 32), args.sensor)
        keys = list(pretrain.batches(np.arange(len(scenes)), args, 1, 0, 0, count))
        loader = DataLoader(scenes, batch_sampler=keys, collate_fn=default_convert,
                            num_workers=2, worker_init_fn=pretrain.ignore_signals,
                            pin_memory=device.type == "cuda")
        arrived = []
        for x, y in loader:
            for _ in range(10):
                work @ work                             # the copy has to wait, the loop does not
            x = x.to(device, non_blocking=True)
            y = y.to(device, non_blocking=True)
            arrived.append((x, y))
        wrong = 0
        for key, (x, y) in zip(keys, arrived, strict=True):
            expected_x, expected_y = scenes.__getitems__(key)
            same = np.array_equal(x.cpu(), expected_x) and np.array_equal(y.cpu(), expected_y)
            wrong += not same
    return {"passed": wrong == 0, "batches": len(arrived), "wrong": wrong}


def syncs(options):
    """PyTorch names each line at which a step waits for the GPU; one of them is meant to be."""
    needs_cuda(options)
    result = {"passed": True}
    for name, (_, flags) in AGREE.items():
        flags = ["--modality", "rgb", *flags, "--drop-path", "0.2"]
        if name == "agree_resnet":
            flags += ["--drop-path", "0"]
        training = Training(training_args(options, *flags), torch.device("cuda"))
        training.step()
        training.step()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            training.step()
        torch.cuda.set_sync_debug_mode("default")
        places = [f"{Path(warning.filename).name}:{warning.lineno}" for warning in found
                  if "synchronizing" in str(warning.message)]
        result[name.removeprefix("agree_")] = places
        result["passed"] = result["passed"] and len(places) <= 1
    return result


def ranks(options):
    """The process after the last GPU gets no GPU.  Without any GPU that is the first process."""
    environment = {}
    gpus = 0
    if options.device == "cuda":
        gpus = torch.cuda.device_count()
    else:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    world = str(gpus + 1)
    environment |= {"RANK": str(gpus), "LOCAL_RANK": str(gpus), "WORLD_SIZE": world,
                    "LOCAL_WORLD_SIZE": world}
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--modality", "s1", "--device", "cuda", "--batch-size", str(2 * (gpus + 1))]
        status, line = run_script(flags, folder, environment)
    passed = status == 1 and line.startswith("pretrain.py: error:") and "has no GPU" in line
    return {"passed": passed, "exit_status": status, "line": line}


def memory(options):
    """The GPU gives a hundredth of its memory; the batch takes more."""
    needs_cuda(options)
    with tempfile.TemporaryDirectory() as folder:
        flags = [*small_world(folder), *SHORT["softcon"], "--preset", "full", "--device", "cuda",
                 "--img-size", "1020", "--batch-size", "16"]
        status, line = run_script(
            flags, folder, before="import torch; torch.cuda.set_per_process_memory_fraction(0.01)")
    passed = status == 1 and "out of GPU memory" in line and "--batch-size" in line
    return {"passed": passed, "exit_status": status, "line": line}


def compiled(options):
    """A ViT of two blocks, to compile in seconds: losses of five steps with and without."""
    needs_cuda(options)
    result = {"passed": True}
    with tempfile.TemporaryDirectory() as folder:
        world = small_world(folder)
        for method, flags in SHORT.items():
            flags = [*world, *flags, "--max-steps", "5", "--drop-path", "0"]
            plain, _ = run_pretrain(options, f"{folder}/{method}", *flags)
            fast, said = run_pretrain(options, f"{folder}/{method}_fast", *flags, "--compile")
            if "--compile: not here" in said:
                raise Skipped("there is no compiler here, as the run says")
            error = max(abs(a["loss"] - b["loss"]) / abs(a["loss"])
                        for a, b in zip(plain, fast, strict=True))
            result[f"{method}_loss_error"] = error
            result["passed"] = result["passed"] and error < 1e-2
    return result


# ------------------------------------------------------------------------------------------ speed

# name: flags, and the share of the bf16 matrix product that we aim at
STEPS = {
    "step_vit_base": (["--modality", "s2c", "--arch", "vit_base", "--batch-size", "256"], 0.5),
    "step_vit_small": (["--modality", "s2c", "--arch", "vit_small", "--batch-size", "256"], 0.4),
    "step_resnet50": (["--modality", "s2c", "--arch", "resnet50", "--batch-size", "256"], None),
    "step_pera_224": (["--modality", "rgb", "--method", "pera", "--batch-size", "192"], None),
    "step_pera_448": (["--modality", "rgb", "--method", "pera", "--batch-size", "32",
                       "--img-size", "448"], None)}

# what --small changes
SMALL_STEP = ["--batch-size", "2", "--img-size", "28", "--patch-size", "14", "--hidden", "64"]
SMALL_PERA = ["--batch-size", "2", "--img-size", "48", "--local-size", "32", "--patch-size", "8",
              "--hidden", "64", "--prototypes", "64", "--crops", "2", "2"]
SMALL_ARCH = {"vit_small": "vit_tiny", "vit_base": "vit_tiny", "resnet50": "resnet18"}


def step_args(options, name):
    flags, _ = STEPS[name]
    args = training_args(options, *flags)
    if options.small:
        changes = SMALL_PERA if args.method == "pera" else SMALL_STEP
        arch = SMALL_ARCH[args.arch]
        args = training_args(options, *flags, *changes, "--arch", arch)
    return args


def step_speed(options, name):
    """Speed, memory and parts of a training step; name: of STEPS, perhaps with _compiled."""
    compile_it = name.endswith("_compiled")
    if compile_it:
        needs_cuda(options)
    name = name.removesuffix("_compiled")
    args = step_args(options, name)
    device = torch.device(options.device)
    training = Training(args, device)
    flops = bench.count_flops(training.step)            # a compiled network would count nothing
    result = {}
    if compile_it:
        pretrain.compile_networks(training.net, device, fail)
        begin = time.perf_counter()
        training.step()
        result["first_step_s"] = time.perf_counter() - begin

    times = 1 if options.small else 10
    if not options.small:
        training.step()
        training.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(training.step, times, device)
    if device.type == "cuda":
        result["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9

    product = matrix_product_speed(options, device)
    result |= {"images_per_s": training.images() / seconds, "step_ms": 1000 * seconds,
               "scenes_per_s": args.batch_size / seconds, "tflop": flops / 1e12,
               "tflop_per_s": flops / seconds / 1e12, "product_tflop_per_s": product / 1e12,
               "of_the_product": flops / seconds / product, "goal": STEPS[name][1]}
    if not compile_it:
        result |= parts_of_step(training, seconds, times, device)
    return result


def fail(text):
    raise ValueError(text)


def parts_of_step(training, seconds, times, device):
    """Shares of the step's seconds, and milliseconds of what only logged steps compute."""
    loss, features = training.differentiate(1)          # leaves gradients to optimise with
    parts = {"augment": training.augment, "loss": training.loss, "optimise": training.optimise}
    shares = {}
    for name, part in parts.items():
        part()
        shares[name] = seconds_of(part, times, device) / seconds
    losses.collapse(features)
    shares["log_ms"] = 1000 * seconds_of(lambda: losses.collapse(features), times, device)
    return shares


class ThreadLoader:
    """In place of a DataLoader: one thread reads up to two batches ahead, without a process."""

    def __init__(self, *args, num_workers, **kwargs):
        self.loader = DataLoader(*args, num_workers=0, **kwargs)

    def __iter__(self):
        ahead = queue.Queue(2)

        def read():
            for batch in self.loader:
                ahead.put(batch)
            ahead.put(None)
        threading.Thread(target=read, daemon=True).start()
        return iter(ahead.get, None)


def loader(options):
    """images/s and data_wait of pretrain.py on a pack, by the ways to read it."""
    flags = ["--arch", "vit_small", "--batch-size", "256", "--max-steps", "18", "--log-every", "6"]
    ways = {"in place": "0", "thread": "0", "2 processes": "2", "8 processes": "8"}
    scenes, size = 1024, 264
    if options.small:
        flags = [*SMALL_STEP, "--arch", "vit_tiny", "--batch-size", "4", "--max-steps", "4",
                 "--log-every", "2"]
        ways = {"in place": "0", "thread": "0", "1 process": "1"}
        scenes, size = 16, 33
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        root = random_pack(folder, scenes, size)
        for way, workers in ways.items():
            how = ThreadLoader if way == "thread" else DataLoader
            with mock.patch.object(pretrain, "DataLoader", how):
                log, _ = run_pretrain(
                    options, f"{folder}/{way}", "--modality", "s2c", "--data", root, "--holdout",
                    "0", "--cache", "0", "--workers", workers, *flags)
            result[f"{way}: images_per_s"] = log[-1]["images_per_s"]
            result[f"{way}: data_wait"] = log[-1]["data_wait"]
    return result


# -------------------------------------------------------------------------------- peers and results


def peers(options):
    """A script that takes --device, --budget SECONDS, --json FILE (and --tiny), and appends a JSON
    object to FILE for each step it timed: case, compile, images_s (scenes), peak_mem_gib."""
    if not options.peers:
        raise Skipped("no --peers FILE")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, options.peers, "--device", options.device, "--json",
                   f"{folder}/lines", "--budget", str(options.limit - 15)]
        if options.small:
            command.append("--tiny")
        done = subprocess.run(command, capture_output=True, text=True)
        if not os.path.exists(f"{folder}/lines"):
            errors = [line for line in done.stdout.splitlines() if "Error" in line]
            reason = errors[-1] if errors else last_line(done.stderr)
            if "No module named" in reason:
                raise Skipped(reason)
            raise ValueError(reason)
        lines = Path(folder, "lines").read_text().splitlines()
    result = {}
    for line in map(json.loads, lines):
        name = line["case"]
        if line.get("compile") == "on":
            name += "_compiled"
        result[f"{name}: scenes_per_s"] = line["images_s"]
        if "peak_mem_gib" in line:
            result[f"{name}: peak_memory_gb"] = line["peak_mem_gib"] * 2**30 / 1e9
    return result


def made_up_chips(folder):
    """Two classes of 20 RGB images of 16 px each -> their folder."""
    import tifffile
    rng = np.random.default_rng(0)
    for k, name in enumerate(("dark", "light")):
        os.makedirs(f"{folder}/chips/{name}")
        for n in range(20):
            pixels = rng.integers(100 * k, 100 + 100 * k, size=(16, 16, 3), dtype=np.uint8)
            tifffile.imwrite(f"{folder}/chips/{name}/{name}_{n}.tif", pixels, photometric="rgb")
    return f"{folder}/chips"


def training(options):
    """ResNet-18 from scratch, and ViT-Tiny from --init; accuracy with a ridge head on 30 %."""
    if not options.data and not options.small:
        raise Skipped("no --data DIR")
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        root = options.data or made_up_chips(folder)
        networks = {"resnet18": ["--arch", "resnet18", "--patch-size", "8"],
                    "vit_tiny": ["--arch", "vit_tiny", "--patch-size", "16"]}
        if options.init:
            networks["vit_tiny"] += ["--init", options.init]
        length = ["--img-size", "64", "--batch-size", "256", "--epochs", str(options.epochs),
                  "--hidden", "512", "--lr", "5e-4", "--momentum", "0.95"]
        if options.small:
            length = ["--img-size", "16", "--batch-size", "8", "--max-steps", "3", "--hidden", "32",
                      "--log-every", "1", "--workers", "0"]
        for name, flags in networks.items():
            run = f"{folder}/{name}"
            begin = time.perf_counter()
            log, _ = run_pretrain(
                options, run, "--modality", "rgb", "--data", root, "--holdout", "0",
                "--soft-weight", "0", "--mask-ratio", "0", "--crop-min", "0.3", "--workers", "8",
                *flags, *length)
            result[f"{name}: seconds"] = time.perf_counter() - begin
            result[f"{name}: first_loss"] = log[0]["loss"]
            result[f"{name}: last_loss"] = log[-1]["loss"]
            result |= accuracies(options, name, run, root)
    return result


def accuracies(options, name, run, root):
    """probe.py's three values: of the run, of random weights, of band statistics."""
    if os.path.exists(f"{root}/images.uint8"):
        return {f"{name}: accuracy": "none, probe.py reads no pack"}
    with contextlib.redirect_stdout(io.StringIO()):
        report = probe.main(["--ckpt", f"{run}/backbone.pt", "--task", "folder", "--data", root,
                             "--modality", "rgb", "--device", options.device, "--bootstrap", "0",
                             "--workers", "0" if options.small else "8"])
    return {f"{name}: accuracy": report["value"], f"{name}: random": report["random"],
            f"{name}: stats": report["stats"], f"{name}: n_test": report["n_test"]}


# ------------------------------------------------------------------------------------ table of rows

# in the order in which they run and are printed; a function takes the options, or options and name
ROWS = {"agree_resnet": agree, "agree_vit": agree, "agree_pera": agree, "bf16": bf16,
        "resume": resume, "batches": batches, "syncs": syncs, "ranks": ranks, "memory": memory,
        "compile": compiled, "step_vit_base": step_speed, "step_vit_small": step_speed,
        "step_resnet50": step_speed, "step_pera_224": step_speed, "step_pera_448": step_speed,
        "loader": loader, "step_vit_base_compiled": step_speed,
        "step_vit_small_compiled": step_speed, "peers": peers, "training": training,
        "step_resnet50_compiled": step_speed, "step_pera_224_compiled": step_speed,
        "step_pera_448_compiled": step_speed}

# seconds that a row may take at most; 60 where nothing is said
LIMITS = {"compile": 100, "loader": 90, "peers": 150, "training": 150}
for name in STEPS:
    LIMITS[f"{name}_compiled"] = 120


def run_here(options, name):
    """A row in this process -> {"status", numbers or "reason"}."""
    row = ROWS[name]
    arguments = [options]
    if row in (agree, step_speed):
        arguments.append(name)
    try:
        with contextlib.ExitStack() as stack:
            # what a training prints is no part of the table
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            if options.small or name == "compile":
                stack.enter_context(mock.patch.dict(models.VITS, SMALL_VIT))
                stack.enter_context(mock.patch.dict(models.RESNETS, SMALL_RESNET))
            result = row(*arguments)
    except Skipped as reason:
        return {"status": "skipped", "reason": str(reason)}
    except Exception as error:
        traceback.print_exc()
        return {"status": "failed", "reason": f"{type(error).__name__}: {last_line(str(error))}"}
    fine = result.pop("passed", True)
    return {"status": "passed" if fine else "failed"} | result


def run_apart(command, limit):
    """A command that prints a JSON object as its last line -> that object, or why there is none."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    try:
        out, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)          # with the processes that it has started
        out, errors = process.communicate()
        return {"status": "failed", "reason": f"longer than {limit:.0f} s; {last_line(errors)}"}
    try:
        return json.loads(last_line(out))
    except ValueError:
        return {"status": "failed",
                "reason": f"exit status {process.returncode}: {last_line(errors)}"}


def run_rows(options, argv):
    """Runs the rows in order until the time is over; yields (name, result) of each."""
    deadline = time.monotonic() + 60 * options.minutes
    for name in options.rows:
        begin = time.monotonic()
        left = deadline - begin
        if left < 5:
            result = {"status": "skipped", "reason": "no time left"}
        elif options.small:
            result = run_here(options, name)
        else:
            limit = min(left, LIMITS.get(name, 60))
            command = [sys.executable, __file__, *argv, "--row", name, "--limit", str(limit)]
            result = run_apart(command, limit)
        result["seconds"] = time.monotonic() - begin
        print(f"{name}: {result['status']} in {result['seconds']:.1f} s", flush=True)
        yield name, result


def print_table(results):
    for name, result in results.items():
        facts = []
        for key, value in result.items():
            if key == "reason":
                facts.append(value)
            elif isinstance(value, float) and key != "seconds":
                facts.append(f"{key} {value:.4g}")
            elif key not in ("status", "seconds") and value is not None:
                facts.append(f"{key} {value}")
        print(f"{name:24} {result['status']:8} {', '.join(facts)}")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="stop after them (%(default)s)")
    parser.add_argument("--json", metavar="OUT", help="write the rows and the machine to this file")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS),
                        metavar="NAME", help="these rows, in this order (default: all)")
    parser.add_argument("--peers", metavar="FILE", help="script that times other code")
    parser.add_argument("--data", metavar="DIR", help="class folders of RGB images to train on")
    parser.add_argument("--init", metavar="FILE", help="weights from which ViT-Tiny starts there")
    parser.add_argument("--epochs", type=int, default=6, help="of that training (%(default)s)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, all in one process")
    parser.add_argument("--row", choices=list(ROWS), help="this row here, for the script itself")
    parser.add_argument("--limit", type=float, default=60, help="seconds that this row may take")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU; --device cpu --small tries the script itself")
    return options


def describe_machine(options):
    """What the numbers depend on beside the code."""
    device = torch.device(options.device)
    name = "cpu"
    if options.device == "cuda":
        name = torch.cuda.get_device_name()
    return pretrain.versions(1, device) | {"card": name, "small": options.small}


def main(argv=None):
    """Returns 1 if a row failed, else 0."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    if options.row:
        result = run_here(options, options.row)
        print(json.dumps(result))
        return 0
    machine = describe_machine(options)
    results = {}
    for name, result in run_rows(options, argv):
        results[name] = result
        if options.json:                                # after each row, in case the call is ended
            report = {"machine": machine, "rows": results}
            pretrain.write_file(options.json, json.dumps(report, indent=1))
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print_table(results)
    failed = [name for name, result in results.items() if result["status"] == "failed"]
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
