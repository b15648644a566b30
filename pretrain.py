"""Pretraining with SoftCon or PerA: one process or many, CPU or CUDA, the same file.

    torchrun pretrain.py --modality s1                        toy world, small net, CPU, minutes
    torchrun pretrain.py --modality s2c --data DIR --init dinov2_vits14_pretrain.pth     one GPU
    torchrun --nproc-per-node 8 pretrain.py --method pera --modality rgb --data DIR      eight
    torchrun pretrain.py --modality my.json --data DIR        images of any sensor, see data.Sensor

SoftCon [1]: the student sees two seasons of a scene with some blocks masked.  For each season it
must find the teacher's embedding of the other season among those of all scenes of the batch.  How
similar it shall be to each of them follows from the scenes' land-cover labels.

PerA [2]: student and teacher see the same crops of one image, in other colours and through masks
that have no patch in common.  The student must choose the teacher's prototypes, and guess the
pixels of patches that neither of them sees.

In both methods the teacher is a running average of the student and gets no gradient.  All
randomness is a function of --seed and the step: order of the data, seasons, crops, masks.  So a
resumed run repeats the undisturbed one, and W ranks together see what one rank would see.

[1] Wang, Albrecht, Zhu 2024, Multi-label guided soft contrastive learning
[2] Shen et al. 2026, PerA, and its repository SathShen/PerA

The loop is main(), at the end of the file.  Equations are numbered as in the README.
"""
import argparse
import dataclasses
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

# Threads that work on one product wait for each other in a loop that keeps their cores busy.  If
# another program needs a core, they wait for a thread that has none, and a step takes 10 to 50
# times as long.  After so many turns they sleep instead.  OpenMP reads it when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, default_convert
from tqdm import tqdm

import data
import losses
import model as models

# ---------------------------------------------------------------------------------------- presets

# The values of one method on one kind of data: "toy" without --data; with it "small" for fewer than
# SMALL_DATA images, else "full".  Each value has a flag of its own that changes it.  The README's
# table says where each comes from.
SMALL_DATA = 20000
PRESETS = {
    ("softcon", "toy"): dict(
        arch="resnet18", adapt="random", img_size=32, patch_size=4, hidden=512, drop_path=0.0,
        holdout=0.4, crop_min=0.5, jitter=0.0, grey=0.0,
        tau=0.2, soft_weight=0.5, mask_ratio=0.3,
        epochs=28, batch_size=32, lr=5e-4, weight_decay=[0.05, 0.05], momentum=0.9, clip=0.0),
    ("softcon", "small"): dict(
        arch="vit_tiny", adapt="auto", img_size=112, patch_size=16, hidden=1024, drop_path=0.0,
        holdout=0.4, crop_min=0.3, jitter=0.0, grey=0.0,
        tau=0.2, soft_weight=0.5, mask_ratio=0.3,
        epochs=8, batch_size=16, lr=3e-4, weight_decay=[0.05, 0.05], momentum=0.98, clip=0.0),
    ("softcon", "full"): dict(
        arch="vit_small", adapt="random", img_size=224, patch_size=14, hidden=4096, drop_path=0.0,
        holdout=0.1, crop_min=0.2, jitter=0.4, grey=0.2,
        tau=0.2, soft_weight=0.1, mask_ratio=0.3,
        epochs=100, batch_size=256, lr=1.5e-4, weight_decay=[0.05, 0.05], momentum=0.99, clip=0.0),
    ("pera", "toy"): dict(
        arch="vit_tiny", adapt="random", img_size=32, patch_size=4, hidden=512, drop_path=0.0,
        holdout=0.4, crop_min=0.4, crops=[2, 2], local_size=16, jitter=1.0, grey=0.1,
        tau=0.1, teacher_tau=[0.03, 0.05], ratios=[0.2, 0.2, 0.6], prototypes=512, soft_weight=0.0,
        epochs=8, batch_size=32, lr=5e-4, weight_decay=[0.04, 0.2], momentum=0.95, clip=3.0),
    ("pera", "small"): dict(
        arch="vit_tiny", adapt="auto", img_size=112, patch_size=16, hidden=1024, drop_path=0.0,
        holdout=0.4, crop_min=0.3, crops=[2, 2], local_size=48, jitter=1.0, grey=0.1,
        tau=0.1, teacher_tau=[0.03, 0.05], ratios=[0.2, 0.2, 0.6], prototypes=512, soft_weight=0.0,
        epochs=8, batch_size=64, lr=3e-4, weight_decay=[0.04, 0.2], momentum=0.98, clip=3.0),
    ("pera", "full"): dict(
        arch="vit_base", adapt="random", img_size=224, patch_size=16, hidden=2048, drop_path=0.3,
        holdout=0.1, crop_min=0.4, crops=[2, 8], local_size=96, jitter=0.4, grey=0.1,
        tau=0.1, teacher_tau=[0.03, 0.05], ratios=[0.2, 0.2, 0.6], prototypes=131072,
        soft_weight=0.0,
        epochs=200, batch_size=192, lr=1e-3, weight_decay=[0.04, 0.2], momentum=0.992, clip=3.0),
}

VIEWS = {"softcon": 2, "pera": 1}          # images of a scene that a step takes: its seasons

# Flags that only one method has.  The others refuse them.
METHOD_FLAGS = {"softcon": ["mask_ratio"],
                "pera": ["crops", "local_size", "prototypes", "teacher_tau", "ratios"]}

# Flags that a resumed run may change.  All others decide the numbers, so they must stay.
MAY_CHANGE = ["data", "labels", "max_steps", "out", "resume", "save_every", "log_every",
              "tensorboard", "workers", "cache", "device", "compile"]

# Constants that have no flag.
FINAL_LR = 1e-6                # where the cosine of the learning rate ends
TAU_WARMUP = 0.15              # PerA: share of the steps in which the teacher's temperature climbs
KOLEO_WEIGHT = 0.1             # PerA, eq. (10)  [PerA pera_loss.py]
PIXEL_WEIGHT = 0.01            # PerA, eq. (10)  [PerA pera_loss.py]
LOCAL_AREA_MIN = 0.05          # PerA: smallest share of the image in a local crop


# ------------------------------------------------------------------------------------------ flags


def number(kind, low, high=math.inf):
    """An argparse type: an int or a float (`kind`) between low and high, both included."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} must lie in {low} to {high}")
        return value
    return convert


positive = number(int, 1, 2**31)
natural = number(int, 0, 2**31)
share = number(float, 0, 1)
amount = number(float, 0, 2**31)
temperature = number(float, 1e-4, 100)

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    epilog="Flags without a default take the value of the preset.  The README prints the presets "
           "as a table.")

flag = parser.add_argument_group("data").add_argument
flag("--modality", required=True, metavar="SENSOR",
     help="s1: Sentinel-1 radar; s2c: Sentinel-2 L1C; s2a: L2A, air corrected; rgb; or the JSON "
          "file of another, which `python data.py stats` writes")
flag("--data", help="tree, folder or pack of images; without it: the toy world, made in ./toy")
flag("--labels", help="SSL4EO-S12-ML json (default: ssl4eo_multilabel.json in --data); for folders "
                      "of images 'classes', their names, or a table: csv, a row an image, a "
                      "column a class, 0 or 1")
flag("--layout", choices=["eurosat"], help="order of the bands in the files of --data")
flag("--tile", type=natural, default=0, metavar="N",
     help="folders: resize images to N x N pixels (default: to the size that most have)")
flag("--holdout", type=number(float, 0, 0.99),
     help="share of the scenes kept for probe.py, chosen by a hash of their names")
flag("--img-size", type=positive, help="side of a (global) crop in pixels")
flag("--crop-min", type=number(float, 0.01, 1),
     help="smallest share of the image's area in a (global) crop")
flag("--crops", type=natural, nargs=2, metavar=("GLOBAL", "LOCAL"), help="pera: crops of an image")
flag("--local-size", type=natural, help="pera: side of a local crop in pixels")
flag("--jitter", type=share,
     help="change of brightness and contrast, at most this; radar: none with softcon, with pera an "
          "offset of up to 5 times this in dB")
flag("--grey", type=share, help="share of views turned grey; pera: 0.8 of it, student only")
flag("--cache", type=amount, default=4.0, metavar="GB",
     help="keep the decoded images in memory if they take at most this, per rank (%(default)s)")
flag("--workers", type=natural, default=2, help="reading processes per rank (%(default)s)")

flag = parser.add_argument_group("model").add_argument
flag("--method", default="softcon", choices=["softcon", "pera"],
     help="what to minimise (%(default)s)")
flag("--preset", choices=["toy", "small", "full"],
     help=f"values of the flags not given (default: toy without --data, small for fewer than "
          f"{SMALL_DATA} images, else full)")
flag("--arch", choices=[*models.RESNETS, *models.VITS], help="backbone; pera needs a ViT")
flag("--patch-size", type=positive, help="of a ViT; with a ResNet: the cell of SoftCon's mask")
flag("--hidden", type=positive, help="width of the heads' hidden layers")
flag("--prototypes", type=number(int, 2, 2**31), help="pera: outputs of the CLS head")
flag("--drop-path", type=number(float, 0, 0.99),
     help="share of the student's samples that skip a block")
flag("--init", metavar="FILE", help="start from this checkpoint, for example DINOv2's or DINO's")
flag("--adapt", choices=["random", "mean", "rgb", "auto"],
     help="input layer if --init has other channels: random, as SoftCon does; the mean of the "
          "file's channels; the file's RGB copied into the bands that look so; auto: rgb where "
          "there are such bands, else mean, which is far better with few images")

flag = parser.add_argument_group("loss").add_argument
flag("--tau", type=temperature, help="temperature of InfoNCE; pera: of the student")
flag("--teacher-tau", type=temperature, nargs=2, metavar=("FIRST", "LAST"),
     help=f"pera: temperature of the teacher; LAST is reached after {TAU_WARMUP} of the steps")
flag("--soft-weight", type=amount, help="weight of the soft label term; see soft_share in the log")
flag("--soft-form", default="bce", choices=list(losses.SOFT_TAU),
     help="formula of the soft term, see losses.soft_contrastive (%(default)s)")
flag("--soft-tau", type=temperature,
     help="temperature of the soft term (default: 0.2; 1.0 with --soft-form bce_mean)")
flag("--mask-ratio", type=share, help="softcon: share of the student's patches that are masked")
flag("--ratios", type=share, nargs=3, metavar=("STUDENT", "UNSEEN", "TEACHER"),
     help="pera: shares of the patches that the student sees, that neither sees and the student "
          "must guess, and that the teacher sees")

flag = parser.add_argument_group("optimisation").add_argument
flag("--epochs", type=positive, help="passes over the scenes")
flag("--max-steps", type=natural, default=0,
     help="stop early; the schedules still span all --epochs (%(default)s: never)")
flag("--batch-size", type=positive, help="scenes per step, over all ranks")
flag("--accum", type=positive, default=1,
     help="micro-batches per step; a query meets the keys of its own micro-batch (%(default)s)")
flag("--lr", type=amount, help="AdamW's highest learning rate; it is not scaled by the batch")
flag("--weight-decay", type=amount, nargs=2, metavar=("FIRST", "LAST"),
     help="on a cosine; never on norms and biases")
flag("--warmup", type=share, default=0.1,
     help="share of the steps in which lr climbs (%(default)s)")
flag("--momentum", type=share, help="of the teacher; climbs to 1 on a cosine")
flag("--clip", type=amount, help="scale gradients down to this norm; 0: leave them")

flag = parser.add_argument_group("run").add_argument
flag("--out", help="folder for the run (default: runs/METHOD_MODALITY)")
flag("--resume", action="store_true",
     help="go on from OUT/last.pt if it is there; start if it is not")
flag("--save-every", type=positive, default=500, help="steps between checkpoints (%(default)s)")
flag("--log-every", type=positive, default=10, help="steps between log lines (%(default)s)")
flag("--tensorboard", action="store_true", help="write the log for TensorBoard as well, into OUT")
flag("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of everything (%(default)s)")
flag("--device", default="auto", choices=["auto", "cpu", "cuda"],
     help="auto: CUDA if there is a GPU")
flag("--amp", default="auto", choices=["auto", "bf16", "off"],
     help="bf16 autocast; auto: on CUDA only")
flag("--compile", action="store_true", help="torch.compile: a slow start, then faster steps")


def use_preset(args, kind):
    """Give the flags that are not given the values of a preset: toy, small or full."""
    args.preset = kind
    for name, value in PRESETS[args.method, kind].items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def parse(argv=None):
    """Command line -> namespace of flags.  Those not given take the preset's value.

    With --data and without --preset they are None until open_scenes knows how many images there
    are.  args.sensor is the data.Sensor of --modality.  Wrong flags end the program with a line.
    """
    args = parser.parse_args(argv)
    for method, names in METHOD_FLAGS.items():
        for name in names:
            if method == args.method:
                continue
            if getattr(args, name) is not None:
                parser.error(f"--{name.replace('_', '-')}: has no effect on --method {args.method}")
            delattr(args, name)
    if args.preset:
        use_preset(args, args.preset)
    elif not args.data:
        use_preset(args, "toy")
    if args.soft_tau is None:
        args.soft_tau = losses.SOFT_TAU[args.soft_form]
    try:
        args.sensor = data.find_sensor(args.modality)
    except ValueError as error:
        parser.error(str(error))
    if args.out is None:
        args.out = f"runs/{args.method}_{args.sensor.name}"
    if not args.data and args.modality not in ("s1", "s2c"):
        parser.error(f"--modality {args.modality}: the toy world has s1 and s2c; give --data")
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        args.resume = True                       # a rank died and torchrun started all of them anew
    return args


def plain_flags(args):
    """The flags as json can hold them: all but the sensor, which has a place of its own."""
    return {name: value for name, value in vars(args).items() if name != "sensor"}


def describe_run(args, world, device):
    """The first lines of a run: its command, preset and what differs from it, versions."""
    changed = []
    for name, value in PRESETS[args.method, args.preset].items():
        if getattr(args, name) != value:
            changed.append(f"{name} {getattr(args, name)} instead of {value}")
    lines = [shlex.join(sys.argv),
             f"preset: {args.method}, {args.preset}; changed: {', '.join(changed) or 'nothing'}"]
    for name, value in versions(world, device).items():
        lines.append(f"{name}: {value}")
    return "\n".join(lines)


def versions(world, device):
    """What a result depends on beside its flags."""
    return {"python": sys.version.split()[0], "torch": torch.__version__, "commit": commit(),
            "world": world, "device": device.type}


def commit():
    """Short git hash of this code, with a + if files differ from it."""
    folder = Path(__file__).parent
    command = ["git", "-C", folder, "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def refuse_impossible_flags(args):
    """ValueError, naming the flag, for what is seen to fail before anything is read or written.

    As long as no preset is chosen there is nothing to see; open_scenes calls it again.
    """
    if not args.preset:
        return
    pera = args.method == "pera"
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % (world * args.accum):
        raise ValueError(f"--batch-size {args.batch_size} does not divide into {world} rank(s) x "
                         f"--accum {args.accum}")
    micro_batch = args.batch_size // args.accum
    if micro_batch < 2:
        raise ValueError(f"--batch-size {args.batch_size}: {args.method} needs at least 2 scenes "
                         f"at a time")
    if pera and micro_batch // world < 2:                 # KoLeo compares the scenes of one rank
        raise ValueError(f"--batch-size {args.batch_size}: pera needs at least 2 scenes at a time "
                         f"on each rank")
    if pera and args.arch not in models.VITS:
        raise ValueError(f"--arch {args.arch}: --method pera needs a ViT")
    if pera and args.crops[0] < 1:
        raise ValueError(f"--crops {args.crops[0]} {args.crops[1]}: at least one is global")
    if pera and args.crops[1] and args.local_size > args.img_size:
        raise ValueError(f"--local-size {args.local_size}: exceeds --img-size {args.img_size}")
    if os.path.exists(f"{args.out}/last.pt") and not args.resume:
        raise ValueError(f"--out {args.out}: holds a run; --resume continues it, another --out "
                         f"keeps it")

    if args.tensorboard:
        summary_writer()                                 # its package may be missing

    # draw one mask of each size: ratios that cannot be are refused there
    grid = models.check_grid(args.img_size, args.img_size, args.patch_size)
    if not pera:
        losses.block_mask(1, grid, args.mask_ratio)
        return
    losses.disjoint_masks(1, math.prod(grid), *args.ratios)
    if args.crops[1]:
        grid = models.check_grid(args.local_size, args.local_size, args.patch_size)
        losses.disjoint_masks(1, math.prod(grid), *args.ratios)


# -------------------------------------------------------------------------- processes and signals


def start_processes(args):
    """-> (rank, world, device): one process alone, or one of those that torchrun starts.

    torchrun tells each process its place by environment variables.  ValueError: --device cuda
    without a GPU for this process.
    """
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))        # place among those of this machine
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    if args.amp == "auto":
        args.amp = "bf16" if cuda else "off"
    if cuda and local_rank >= torch.cuda.device_count():
        raise ValueError(f"--device cuda: rank {local_rank} of this machine has no GPU, there are "
                         f"{torch.cuda.device_count()}")
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")    # TF32 for what bf16 leaves in float32
        torch.backends.cudnn.benchmark = True         # shapes never change: try, then keep the best
    elif world > 1:
        torch.set_num_threads(max(1, os.cpu_count() // local_world))
    if world > 1:
        # gloo for tensors on the CPU (the first step, the wish to stop), NCCL for those on GPUs.
        # When torchrun restarts all ranks since one has died, its store still holds the addresses
        # of the dead.  A prefix for each attempt hides them.
        store, _, _ = next(dist.rendezvous("env://"))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", rank=rank,
                                world_size=world, store=dist.PrefixStore(attempt, store))
    return rank, world, device


def end_processes(net, world):
    """Leave the group of processes that start_processes made.

    First DDP, then its group: whichever goes last waits for the group's thread, which may wait for
    Python's lock.  DDP would hold that lock meanwhile, destroy_process_group does not.
    """
    if world > 1:
        net.ddp = None
        dist.destroy_process_group()


def largest_of_ranks(value, world):
    """The largest int `value` of any rank.

    It travels from CPU to CPU, so no GPU has to finish first, and the death of a rank is noticed.
    """
    value = torch.tensor(value)
    if world > 1:
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


signal_times = []            # when SIGTERM or SIGINT came; the run stops after the step it is in


def note_signal(number, frame):
    """First signal: stop after this step.  A second one, later than a second: end at once.

    (torchrun sends on what a scheduler sends to all, so one wish may arrive as two signals.)
    """
    if signal_times and time.monotonic() - signal_times[0] > 1:
        os._exit(128 + number)
    if not signal_times:
        print("stopping after this step; once more ends at once", file=sys.stderr)
    signal_times.append(time.monotonic())


def catch_signals():
    signal.signal(signal.SIGTERM, note_signal)
    signal.signal(signal.SIGINT, note_signal)


def ignore_signals(worker):
    """For reading processes: the process that reads from them ends them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def stop_requested(world):
    """Has any rank got a signal?  The same answer on all ranks, so that they stop together."""
    return largest_of_ranks(len(signal_times), world) > 0


# ------------------------------------------------------------------------------------------- data


def open_scenes(args, world):
    """Open --data, or the toy world, which is made if need be, and choose the preset.

    With the preset all flags are known.  ValueError: some cannot be, see refuse_impossible_flags.
    """
    if not args.data and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        data.make_toy("toy")
    if world > 1:
        dist.barrier()
    views = VIEWS[args.method]
    scenes = data.open_data(args.data or "toy", args.sensor, args.labels, views, args.layout,
                            args.tile)
    if not args.preset:
        images = sum(len(files) for files in scenes.files)
        use_preset(args, "small" if images < SMALL_DATA else "full")
        shrink_batch(args, len(scenes_to_train_on(args, scenes)))
        refuse_impossible_flags(args)
    return scenes


def scenes_to_train_on(args, scenes):
    """The numbers of the scenes that are not held out."""
    return np.flatnonzero(~data.held_out(scenes.ids, args.holdout))


def shrink_batch(args, scenes):
    """Halve the small preset's batch until the scenes fill one; a batch that is given stays."""
    if args.batch_size == PRESETS[args.method, args.preset]["batch_size"]:
        while args.preset == "small" and args.batch_size > max(scenes, 2):
            args.batch_size //= 2


def prepare_scenes(args, scenes, rank, say):
    """Say what the data are and read them into memory if they fit -> numbers to train on."""
    train = scenes_to_train_on(args, scenes)
    if len(train) < args.batch_size:
        raise ValueError(f"--batch-size {args.batch_size} exceeds the {len(train)} training scenes")

    images = sum(len(scenes.files[i]) for i in train)
    labelled = sum(int(scenes.labels[i].any(1).sum()) for i in train)
    say(f"data: {args.data or 'toy'}: {len(train)} of {len(scenes)} scenes to train on ({images} "
        f"images of {scenes.size} px, {labelled} labelled), the others held out; bands "
        f"{' '.join(args.sensor.bands)}")
    for note in scenes.notes:
        say(f"data: {note}")
    if rank == 0:
        for line in data.look_at(scenes, train):
            say(f"data: {line}")
    if args.soft_weight > 0 and labelled == 0:
        say("no labels: the soft term is 0")

    bytes_in_memory = images * len(args.sensor.bands) * scenes.size**2
    if bytes_in_memory < args.cache * 1e9:
        scenes.preload(train, args.workers)
        args.workers = 0                    # a copy in memory is faster than another process
    return train


def batches(train, args, world, rank, start, stop):
    """Yield the keys of this rank's micro-batches, from step `start` up to `stop`.

    A key is (scene, seed of its seasons).  Step t of an epoch takes the t-th slice of the epoch's
    permutation of `train`, whatever the number of ranks.
    """
    steps_per_epoch = len(train) // args.batch_size
    for step in range(start, stop):
        epoch, t = divmod(step, steps_per_epoch)
        if t == 0 or step == start:
            order = np.random.default_rng([args.seed, epoch]).permutation(train)
        batch = order[t * args.batch_size:(t + 1) * args.batch_size]
        for scenes in batch.reshape(args.accum, world, -1)[:, rank]:
            yield [(int(i), (args.seed, epoch, int(i))) for i in scenes]


class StepRandomness:
    """The random draws of one micro-batch, the same whatever the number of ranks.

    Every rank draws for the views of all ranks, and `ours` cuts this rank's part out.
    """

    def __init__(self, seed, step, micro, rank, world):
        self.rank = rank
        self.world = world
        seed = int(np.random.SeedSequence([seed, step, micro]).generate_state(1)[0])
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed + rank)                     # for drop path, which draws on its own

    def ours(self, drawn, views):
        """(views x world x B, ...), or a dict of such tensors -> (views x B, ...) of this rank."""
        if isinstance(drawn, dict):
            return {name: self.ours(value, views) for name, value in drawn.items()}
        drawn = drawn.unflatten(0, (views, self.world, -1))
        return drawn[:, self.rank].flatten(0, 1)


# --------------------------------------------------------------------- networks and their schedules


def networks(args, device, load_init=True, quiet=False):
    """-> namespace of student, teacher, centre (PerA's, else None) and ddp: the student, which main
    wraps if there are several ranks.

    The teacher starts as a copy of the student.  It has no predictor and guesses no pixels.
    load_init: fill the student's backbone from --init; False: only its shapes are read there.
    """
    pera = args.method == "pera"
    channels = len(args.sensor.bands)
    registers = 0
    layerscale = not pera                                # PerA's ViTs have no LayerScale
    if args.init:
        weights = models.read_weights(args.init, in_chans=channels)
        tensors = weights[0]
        if "register_tokens" in tensors:
            registers = tensors["register_tokens"].shape[1]
        if "blocks.0.ls1.gamma" in tensors:
            layerscale = True                            # but DINOv2's weights need it

    def branch(drop_path, predict):
        backbone = models.build(args.arch, channels, args.img_size, args.patch_size, registers,
                                drop_path, layerscale)
        if pera:
            network = models.SparseBranch(backbone, args.prototypes, args.hidden, predict)
        else:
            network = models.Branch(backbone, args.hidden, predict)
        return network.to(device, memory_format=torch.channels_last)     # convolutions like it

    student = branch(args.drop_path, predict=True)
    teacher = branch(0.0, predict=False).requires_grad_(False)
    if args.init and load_init:
        models.load_pretrained(student.backbone, args.init, args.adapt, quiet, weights,
                               args.sensor.look)
    teacher.load_state_dict(student.state_dict(), strict=False)      # the student has more heads
    centre = losses.Centre(args.prototypes).to(device) if pera else None
    return SimpleNamespace(student=student, teacher=teacher, centre=centre, ddp=student)


def compile_networks(net, device, say):
    """Compile both networks; without a compiler, or on an old GPU, say so and leave them."""
    try:
        torch.compile(lambda x: 2 * x)(torch.ones(2, device=device))     # can it be done here?
        for branch in (net.student, net.teacher):
            # the blocks of a ViT are alike, so what is compiled for one serves them all
            parts = getattr(branch.backbone, "blocks", [branch])
            for part in parts:
                # shapes never change; by default, what differs between student and teacher (tokens,
                # drop path) would become a variable, which makes the steps slower
                part.compile(dynamic=False)
    except Exception as error:
        say(f"--compile: not here ({type(error).__name__}), the networks run as they are")


def adamw(student, args):
    """AdamW with weight decay on matrices only: not on norms, biases, single vectors."""
    trained = [p for p in student.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    vectors = [p for p in trained if p.dim() <= 1]
    betas, eps = (0.9, 0.95), 1e-8
    if args.method == "pera":
        betas, eps = (0.9, 0.999), 2e-5                                      # [PerA builder.py]
    return torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0}],
                             betas=betas, eps=eps, fused=True)


def linear(step, steps, first, last):
    """Value at `step` of a line from first to last in `steps` steps, both included, then last."""
    if step >= steps:
        return last
    return first + (last - first) * step / max(1, steps - 1)


def schedule(step, total, start, end, warmup=0):
    """Value at `step` of `total`: a line from 0 to `start` in `warmup` steps, then half a cosine to
    `end`.  So the very first step has the value 0 if there is a warm-up.  [PerA builder.py]"""
    if step < warmup:
        return linear(step, warmup, 0.0, start)
    progress = (step - warmup) / max(1, total - warmup)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def schedules(args, step, total):
    """What changes from step to step, by its name in the log."""
    warmup = round(args.warmup * total)
    now = {"lr": schedule(step, total, args.lr, FINAL_LR, warmup),
           "weight_decay": schedule(step, total, *args.weight_decay),
           "momentum": schedule(step, total, args.momentum, 1)}
    if args.method == "pera":
        now["teacher_tau"] = linear(step, round(TAU_WARMUP * total), *args.teacher_tau)
    return now


# ------------------------------------------------------------------------------- SoftCon, one step


def autocast(args, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16")


def softcon_views(x, args, draws):
    """Two seasons (B,2,C,H,W) uint8 -> a view of each and the patches that the student keeps.

    Views (2B,C,h,w) in [0,1], all first seasons before all second ones; kept patches (2B,n).
    """
    total = 2 * len(x) * draws.world                              # views of all ranks
    crops = data.draw_crops(total, draws.generator, args.crop_min)
    light = data.draw_colours(total, args.sensor, draws.generator,
                              p=0.0 if args.sensor.kind == "radar" else 0.8,   # no light in radar
                              jitter=args.jitter, grey=args.grey)
    grid = models.check_grid(args.img_size, args.img_size, args.patch_size)
    keep = losses.block_mask(total, grid, args.mask_ratio, draws.generator)

    seasons = x.transpose(0, 1).flatten(0, 1)                             # (2B,C,H,W)
    views = data.crop(seasons, draws.ours(crops, 2), args.img_size)       # (2B,C,h,w)
    views = data.colour(views, draws.ours(light, 2))
    views = views.contiguous(memory_format=torch.channels_last)
    return views, draws.ours(keep, 2).to(x.device, non_blocking=True)


def softcon_step(net, x, y, args, draws, now):
    """SoftCon's loss on one micro-batch, in both directions.

    x (B,2,C,H,W) uint8: two seasons of each scene; y (B,2,L): their labels.
    Returns the loss; its parts for the log; the student's embeddings (2B,256), on which the soft
    term acts; the teacher's features (2B,D).
    """
    views, keep = softcon_views(x, args, draws)                           # (2B,C,h,w), (2B,n)
    with autocast(args, x.device):
        with torch.no_grad():
            k, features = net.teacher(views)                              # (2B,256), (2B,D)
        if args.arch in models.VITS:
            q, _ = net.ddp(views, keep)                                   # (2B,256)
        else:                                        # a ResNet cannot drop patches: grey there
            q, _ = net.ddp(losses.blank_patches(views, keep, args.patch_size))

    # keys and labels of all ranks: M = B x ranks
    keys = losses.gather(k.unflatten(0, (2, -1)).transpose(0, 1))         # (M,2,256)
    labels = losses.gather(y)                                             # (M,2,L)

    # each season's queries meet the other season's keys
    q1, q2 = q.chunk(2)                                                   # (B,256)
    y1, y2 = y.unbind(1)                                                  # (B,L)
    k1, k2 = keys.unbind(1)                                               # (M,256)
    all_y1, all_y2 = labels.unbind(1)                                     # (M,L)
    flags = dict(tau=args.tau, weight=args.soft_weight, form=args.soft_form, soft_tau=args.soft_tau)
    loss1, hard1, soft1 = losses.softcon_loss(q1, k2, y1, all_y2, **flags)
    loss2, hard2, soft2 = losses.softcon_loss(q2, k1, y2, all_y1, **flags)
    parts = {"info_nce": (hard1 + hard2) / 2, "soft": (soft1 + soft2) / 2}
    return (loss1 + loss2) / 2, parts, q, features


# ---------------------------------------------------------------------------------- PerA, one step


def aligned_pairs(x, args, draws, count, size, area_min, area_max):
    """`count` crops of each image of x (B,C,H,W), each for the student and for the teacher.

    Both see the same pixels in other colours.  Returns student's and teacher's view
    (count B, C, size, size) in [0,1], and three sets of patches that have none in common: those
    that the student sees (keep), that neither sees and the student must guess (unseen), and that
    the teacher sees (others).  How often and how much colours change is as released.
    [PerA augmentation.py]
    """
    total = count * len(x) * draws.world                          # crops of all ranks
    patches = (size // args.patch_size) ** 2
    g = draws.generator
    masks = losses.disjoint_masks(total, patches, *args.ratios, g)
    crops = data.draw_crops(total, g, area_min, area_max)
    student_light = data.draw_colours(total, args.sensor, g, p=0.8, jitter=args.jitter,
                                      grey=0.8 * args.grey, blur=0)
    teacher_light = data.draw_colours(total, args.sensor, g, p=0.1, jitter=args.jitter,
                                      grey=0, blur=0)

    pixels = data.crop(x.repeat(count, 1, 1, 1), draws.ours(crops, count), size)
    student_view = data.colour(pixels, draws.ours(student_light, count))
    teacher_view = data.colour(pixels, draws.ours(teacher_light, count))
    keep, unseen, others = [draws.ours(mask, count).to(x.device) for mask in masks]
    return student_view, teacher_view, keep, unseen, others


def pera_step(net, x, y, args, draws, now):
    """PerA's loss on one micro-batch.

    x (B,1,C,H,W) uint8: an image of each scene; y (B,1,L): its labels; now["teacher_tau"].
    Returns the loss; its parts for the log; the student's CLS features (crops B, D), of which the
    soft term acts on those of the global crops; the teacher's features of the first crop (B,D).
    """
    x = x[:, 0]                                                           # (B,C,H,W)
    y = y[:, 0]                                                           # (B,L)
    n_global, n_local = args.crops
    pairs = [aligned_pairs(x, args, draws, n_global, args.img_size, args.crop_min, 1.0)]
    if n_local:
        pairs.append(aligned_pairs(x, args, draws, n_local, args.local_size, LOCAL_AREA_MIN,
                                   args.crop_min))
    # from a pair for each size to a list of student's views, of teacher's views, and so on
    views, views_t, keep, unseen, others = zip(*pairs)
    view = views[0]                                      # only in global crops pixels are guessed
    unseen = unseen[0]                                                    # (n_global B, m)

    with autocast(args, x.device):
        with torch.no_grad():
            z_t, features_t, _ = net.teacher(views_t, others)             # (crops B, 384), (.., D)
        z, features, guess = net.ddp(views, keep, unseen)                 # .. (n_global B, m, PPC)
        prototypes = net.student.cls_head.prototypes()                    # (K,384)
        prototypes_t = net.teacher.cls_head.prototypes()
        dino, koleo = losses.pera_loss(z, z_t, [prototypes, prototypes_t], net.centre.value,
                                       now["teacher_tau"], n_global + n_local, n_global, args.tau)

    # From [0,1] to [-2,2]: z-scores of the sensor (but for rgb), as [0,1] spans 4 deviations.
    target = 4 * losses.patchify(view - 0.5, args.patch_size)             # (n_global B, N, PPC)
    pixel = losses.pixel_loss(guess, target, unseen)
    loss = dino + KOLEO_WEIGHT * koleo + PIXEL_WEIGHT * pixel                           # eq. (10)
    parts = {"dino": dino, "koleo": koleo, "pixel": pixel}

    # scores are linear in z_t, so the scores of the mean are the mean of the scores
    net.centre.update(z_t.float().mean(0, keepdim=True) @ prototypes_t.T)

    # not in PerA: SoftCon's soft term on the CLS features of the global crops
    if args.soft_weight:
        parts["soft"] = soft_between_crops(features, features_t, y, args)
        loss = loss + args.soft_weight * parts["soft"]
    return loss, parts, features, features_t[:len(x)]


def soft_between_crops(features, features_t, y, args):
    """Mean over global crops of the soft term between the student's and the teacher's features.

    features, features_t (crops B, D), global crops first; y (B,L).
    """
    n_global = args.crops[0]
    B = len(y)
    q = features[:n_global * B].chunk(n_global)                           # n_global x (B,D)
    k = features_t[:n_global * B].unflatten(0, (n_global, B))             # (n_global,B,D)
    keys = losses.gather(k.transpose(0, 1))                               # (M,n_global,D)
    labels = losses.gather(y)                                             # (M,L)
    terms = [losses.soft_contrastive(q[i], keys[:, i], y, labels, args.soft_form, args.soft_tau)
             for i in range(n_global)]
    return sum(terms) / n_global


STEPS = {"softcon": softcon_step, "pera": pera_step}

# -------------------------------------------------------------------------------------------- log


class Log:
    """log.jsonl, the progress bar and TensorBoard: what a run says of itself.

    Call start_step, waiting (around the loader), add (each micro-batch), write (at logged steps).
    The losses are those that were optimised, over all micro-batches and ranks.  soft_share is of
    the first micro-batch, feature_std and effective_rank are of the last, over all ranks.
    """

    def __init__(self, args, rank, world, start, total, steps_per_epoch, device):
        self.args = args
        self.rank = rank
        self.world = world
        self.warmup = round(args.warmup * total)
        self.steps_per_epoch = steps_per_epoch
        self.device = device
        self.path = Path(args.out, "log.jsonl")
        self.board = None
        self.collapsed = 0                       # lines in a row that look like a collapse
        self.last_step = start
        self.last_time = time.perf_counter()
        self.waited = 0.0
        if rank == 0:
            write_file(self.path, lines_until(self.path, start))
            if args.tensorboard:
                self.board = summary_writer()(args.out, purge_step=start + 1)

    @contextmanager
    def waiting(self):
        """Times the loader, so that the log can say what share of the time a GPU stood idle."""
        begin = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begin

    def start_step(self):
        self.sums = 0
        self.soft_share = None

    def add(self, loss, parts):
        """The loss and its parts of one micro-batch."""
        self.names = ["loss", *parts]
        numbers = torch.stack([loss, *parts.values()]).detach()
        self.sums = self.sums + numbers / self.args.accum

    def measure_soft_share(self, embeddings, loss, soft):
        """How much of the gradient at the embeddings comes from the soft term; before backward."""
        soft = self.args.soft_weight * soft
        self.soft_share = losses.soft_share(embeddings, loss - soft, soft)

    def write(self, step, now, norm, features):
        """Write the line after `step` steps.  All ranks must call it, as they average together."""
        means = self.sums
        if self.world > 1:
            dist.all_reduce(means)
            means = means / self.world
        std, effective_rank = losses.collapse(features)
        seconds = time.perf_counter() - self.last_time
        images = self.args.batch_size * (step - self.last_step)
        images *= VIEWS[self.args.method]
        line = {"step": step, "epoch": step / self.steps_per_epoch}
        line |= dict(zip(self.names, means.tolist()))
        line |= now
        if self.soft_share is not None:
            line["soft_share"] = self.soft_share
        line |= {"gradient_norm": float(norm), "feature_std": std,
                 "effective_rank": effective_rank, "images_per_s": images / seconds,
                 "data_wait": self.waited / seconds, "peak_memory_gb": peak_memory_gb(self.device)}
        line = {name: round(value, 6) for name, value in line.items()}
        if self.rank == 0:
            self.warn_of_collapse(step, std, effective_rank)
            with data.file_errors(self.path, "not written"), open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
            if self.board:
                for name, value in line.items():
                    self.board.add_scalar(name, value, step)
                self.board.flush()
        self.last_step = step
        self.last_time = time.perf_counter()
        self.waited = 0.0
        return line

    def warn_of_collapse(self, step, std, effective_rank):
        """Say once that all scenes look alike, after ten lines in a row that show it."""
        if step > self.warmup and (std < 0.05 or effective_rank < 2):
            self.collapsed += 1
        else:
            self.collapsed = 0
        if self.collapsed == 10:
            tqdm.write(f"step {step}: the teacher's features collapse: std {std:.3f} of 1, "
                       f"effective rank {effective_rank:.1f}; lower --lr, or raise --teacher-tau "
                       f"or --batch-size")


def lines_until(path, step):
    """The log's lines up to `step`.  Later ones are of steps that a resumed run does again."""
    if step == 0 or not path.exists():
        return ""
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue                                     # cut off when the process was killed
    return "".join(kept)


def summary_writer():
    """TensorBoard's writer, the one thing here that needs a package of its own."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"--tensorboard: {error}; pip install tensorboard") from None
    return SummaryWriter


def peak_memory_gb(device):
    """The most memory that this process has held: on the GPU, or in all (0 if nobody says)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if os.path.exists("/proc/self/status"):
        for line in open("/proc/self/status"):
            if line.startswith("VmHWM:"):                            # "high water mark", in KiB
                return int(line.split()[1]) * 1024 / 1e9
    return 0.0


# ------------------------------------------------------------------------------------ checkpoints


def write_file(path, content):
    """Write text, or an object by torch.save, so that `path` is whole at any moment.

    It is written beside its place, flushed to the disk, then renamed.  If that fails, what was
    there stays, and ValueError names `path`.
    """
    part = Path(f"{path}.part")
    try:
        with data.file_errors(path, "not written; what was there still is", "its folder is gone"):
            with open(part, "wb") as file:
                if isinstance(content, str):
                    file.write(content.encode())
                else:
                    torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_config(args, world, device):
    """config.json in the run's folder: all that the run was asked for, and with what."""
    os.makedirs(args.out, exist_ok=True)
    config = {"flags": plain_flags(args), "sensor": dataclasses.asdict(args.sensor)}
    config |= versions(world, device)
    write_file(f"{args.out}/config.json", json.dumps(config, indent=1))


def fingerprint(scenes, train):
    """The list of training scenes and their labels, each as a count and a checksum."""
    names = " ".join(scenes.ids[i] for i in train).encode()
    labels = b"".join(scenes.labels[i].tobytes() for i in train)
    return {"scenes": f"{len(train)} scenes, checksum {zlib.crc32(names):08x}",
            "labels": f"checksum {zlib.crc32(labels):08x}"}


def flags_that_must_stay(args):
    return {name: value for name, value in plain_flags(args).items() if name not in MAY_CHANGE}


def save_checkpoint(args, parts, teacher, step, world, content):
    """last.pt to go on from, backbone.pt to use: the teacher's, under upstream names."""
    write_file(f"{args.out}/backbone.pt", models.export_backbone(teacher.backbone))
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"step": step, "flags": flags_that_must_stay(args), "world": world, "data": content,
              "sensor": json.dumps(dataclasses.asdict(args.sensor))}
    write_file(f"{args.out}/last.pt", state)


def read_checkpoint(path):
    """The dict in last.pt; one ValueError if it is damaged or no checkpoint of a run."""
    try:
        models.check_archive(path)                       # torch.load does not look at checksums
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["step"], state["flags"]
    except Exception as error:                           # torch.load raises half a dozen kinds
        raise ValueError(f"{path}: not a whole checkpoint of a run ({type(error).__name__}); move "
                         f"it away to start anew") from None
    return state


def load_checkpoint(args, parts, world, content, say):
    """Fill `parts` from OUT/last.pt -> the step to go on at, 0 if there is no checkpoint.

    Flags that decide the numbers must be those of the run.  Other scenes or labels are said, and
    the run goes on: a bad scene may have been taken out in the meantime.
    """
    path = f"{args.out}/last.pt"
    if not os.path.exists(path):
        say(f"--resume: no {path} yet, so the run starts")
        return 0
    state = read_checkpoint(path)
    for name, value in flags_that_must_stay(args).items():
        if state["flags"].get(name) != value:
            raise ValueError(f"--{name.replace('_', '-')} {value}: the run in {args.out} has "
                             f"{state['flags'].get(name)}")
    sensor = json.dumps(dataclasses.asdict(args.sensor))
    if state.get("sensor", sensor) != sensor:
        raise ValueError(f"--modality {args.modality}: the run in {args.out} has another sensor: "
                         f"{state['sensor']}")
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"{path}: {name} does not fit ({type(error).__name__})") from None
    say(f"resumed {path} at step {state['step']}")
    for name, value in content.items():
        if state.get("data", {}).get(name) != value:
            say(f"other {name} than before: {value}, were {state.get('data', {}).get(name)}")
    if state.get("world", world) != world:
        say(f"{world} ranks instead of {state['world']}: data, draws and schedules go on; not "
            f"exact are the rounding of sums, drop path, and pera's KoLeo, which is per rank")
    return state["step"]


def refuse_bad_step(args, step, loss, norm, scenes, train, rank):
    """A gradient that is not finite: write down the scenes of its step, then ValueError."""
    if rank == 0:
        names = []
        for batch in batches(train, args, 1, 0, step, step + 1):
            names += [scenes.ids[i] for i, _ in batch]
        write_file(f"{args.out}/bad_step.json", json.dumps({"step": step, "scenes": names}))
    raise ValueError(f"step {step}: loss {loss:g}, gradient norm {norm:g}; stopped before the "
                     f"weights changed, the last checkpoint is from before; the scenes: "
                     f"{args.out}/bad_step.json")


# ------------------------------------------------------------------------------------------- main


def main(argv=None):
    args = parse(argv)
    refuse_impossible_flags(args)
    rank, world, device = start_processes(args)
    say = tqdm.write if rank == 0 else lambda text: None

    # --------------------------------------------------------------------------------------- data
    scenes = open_scenes(args, world)
    say(describe_run(args, world, device))
    train = prepare_scenes(args, scenes, rank, say)
    content = fingerprint(scenes, train)
    steps_per_epoch = len(train) // args.batch_size
    total = args.epochs * steps_per_epoch                    # what the schedules span
    stop = min(total, args.max_steps or total)

    # ---------------------------------------------------------------------- networks and optimiser
    torch.manual_seed(args.seed)
    net = networks(args, device, quiet=rank > 0)
    if args.compile:
        compile_networks(net, device, say)
    if world > 1:
        net.ddp = DistributedDataParallel(net.student, gradient_as_bucket_view=True)
    optimiser = adamw(net.student, args)
    millions = sum(p.numel() for p in net.student.parameters()) / 1e6
    say(f"model: {args.arch}, student {millions:.1f} M parameters; {total} steps of "
        f"{args.batch_size} scenes ({world} ranks x {args.accum} micro-batches), amp {args.amp}")

    # ------------------------------------------------------------------------------------- resume
    parts = {"student": net.student, "teacher": net.teacher, "optimiser": optimiser}
    if net.centre is not None:
        parts["centre"] = net.centre
    start = load_checkpoint(args, parts, world, content, say) if args.resume else 0
    if largest_of_ranks(start, world) != start:
        raise ValueError(f"--out {args.out}: the ranks see different checkpoints; it must be one "
                         f"folder for all")
    if rank == 0:
        write_config(args, world, device)
    log = Log(args, rank, world, start, total, steps_per_epoch, device)
    matrices, vectors = optimiser.param_groups               # loading a checkpoint makes new ones

    # ----------------------------------------------------------------------------------- training
    loader = iter(DataLoader(
        scenes, batch_sampler=batches(train, args, world, rank, start, stop),
        collate_fn=default_convert,                          # Scenes gives whole batches
        num_workers=args.workers, worker_init_fn=ignore_signals,
        pin_memory=device.type == "cuda"))
    bar = tqdm(range(start, stop), args.method, initial=start, total=stop, disable=rank > 0)
    stopped = False
    for step in bar:
        now = schedules(args, step, total)
        matrices["lr"] = vectors["lr"] = now["lr"]
        matrices["weight_decay"] = now["weight_decay"]
        logged = (step + 1) % args.log_every == 0 or step + 1 == stop

        # gradients, summed over --accum micro-batches
        log.start_step()
        for micro in range(args.accum):
            with log.waiting():
                x, y = next(loader)                          # (B,V,C,H,W) uint8, (B,V,L)
            x = x.to(device, non_blocking=True)
            y = y.to(device, non_blocking=True)
            draws = StepRandomness(args.seed, step, micro, rank, world)
            net.ddp.require_backward_grad_sync = micro == args.accum - 1
            loss, terms, embeddings, features = STEPS[args.method](net, x, y, args, draws, now)
            log.add(loss, terms)
            if logged and micro == 0 and "soft" in terms:
                log.measure_soft_share(embeddings, loss, terms["soft"])
            (loss / args.accum).backward()

        # a gradient that is not finite stops all ranks before a weight moves
        norm = torch.nn.utils.clip_grad_norm_(
            matrices["params"] + vectors["params"], args.clip or math.inf)
        if not torch.isfinite(norm):
            refuse_bad_step(args, step, loss, norm, scenes, train, rank)

        # the student moves, the teacher follows
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        models.ema_update(net.teacher, net.student, now["momentum"])                    # eq. (5)

        # what is written down
        if logged:
            line = log.write(step + 1, now, norm, features)
            bar.set_postfix_str(f"loss {line['loss']:.3f}, {line['images_per_s']:.0f} images/s")
        stopped = stop_requested(world) and step + 1 < stop
        if rank == 0 and (stopped or (step + 1) % args.save_every == 0 or step + 1 == stop):
            save_checkpoint(args, parts, net.teacher, step + 1, world, content)
        if stopped:
            break

    # ------------------------------------------------------------------------------------ the end
    if stopped:
        say(f"stopped at step {step + 1}, saved; the same command with --resume goes on")
    else:
        say(f"{args.out}: config.json log.jsonl last.pt backbone.pt at step {max(start, stop)}\n"
            f"next: python probe.py --ckpt {args.out}/backbone.pt")
    end_processes(net, world)


if __name__ == "__main__":
    try:
        catch_signals()
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"pretrain.py: error: {data.error_message(error)}")
    except torch.OutOfMemoryError:
        sys.exit("pretrain.py: error: out of GPU memory; lower --batch-size, or raise --accum (the "
                 "batch is then computed in parts), or lower --img-size or --crops")
