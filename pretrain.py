"""Pretraining with SoftCon or PerA: one process or many, CPU or GPU, the same file.

    torchrun pretrain.py --modality s1                        toy world, small net, CPU, minutes
    torchrun pretrain.py --modality s2c --data PACK --init dinov2_vits14_pretrain.pth    one GPU
    torchrun --nproc-per-node 8 pretrain.py --method pera --modality rgb --data PACK     eight
    torchrun pretrain.py --modality my.json --data PACK       images of any sensor, see data.Sensor

A pack is the folder that `python data.py pack` makes of an archive.

SoftCon [1]: the student sees two seasons of a scene with some blocks masked.  For each season it
must find the teacher's embedding of the other season among those of all scenes of the batch.  How
similar it shall be to each of them follows from the scenes' land-cover labels.

PerA [2]: student and teacher see the same crops of one image, in other colours and through masks
that have no patch in common.  The student must choose the teacher's prototypes, and guess the
pixels of patches that neither of them sees.

In both methods the teacher is a running average of the student and gets no gradient.  All
randomness is a function of --seed and the step: order of the data, seasons, crops, masks.  So a
resumed run repeats the undisturbed one, and W ranks together see what one rank would see (but for
drop path, which each rank draws itself).

[1] Wang, Albrecht, Zhu 2024, Multi-label guided soft contrastive learning
[2] Shen et al. 2026, PerA, and its repository SathShen/PerA

train_step() is one step, main(), at the end of the file, the loop.  Equations are numbered as in
the README.
"""
import argparse
import contextlib
import dataclasses
import json
import math
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

# Threads that work on one product wait for each other in a loop that keeps their cores busy.  If
# another program needs a core, they wait for a thread that has none, and a step takes 10 to 50
# times as long.  After so many turns they sleep instead.  OpenMP reads it when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import losses
import model as models
import probe

# ---------------------------------------------------------------------------------------- presets

# What the presets of a method have in common; what one of them has otherwise stands there.
SOFTCON = dict(
    adapt="random", drop_path=0.0, holdout=0.4,
    jitter=0.0, grey=0.0, mask_ratio=0.3,
    tau=0.2, soft_tau=0.2, soft_weight=0.5,
    weight_decay=[0.05, 0.05], clip=0.0)
PERA = dict(
    adapt="random", drop_path=0.0, holdout=0.4,
    jitter=1.0, grey=0.1, ratios=[0.2, 0.2, 0.6],
    crop_min=0.4, crops=[2, 2], prototypes=512,
    tau=0.1, teacher_tau=[0.03, 0.05],
    weight_decay=[0.04, 0.2], clip=3.0)

# The values of one method on one kind of data: "toy" without --data; with it "small" for fewer than
# SMALL_DATA images, else "full".  Each value has a flag of its own that changes it.  The README's
# table says where the main ones come from.
SMALL_DATA = 20000
PRESETS = {
    ("softcon", "toy"): SOFTCON | dict(
        arch="resnet18", img_size=32, patch_size=4, hidden=512,
        crop_min=0.5,
        epochs=28, batch_size=32, lr=5e-4, momentum=0.9),
    ("softcon", "small"): SOFTCON | dict(
        arch="vit_tiny", img_size=112, patch_size=16, hidden=1024,
        adapt="auto", crop_min=0.3, mask_ratio=0.0,
        epochs=8, batch_size=16, lr=3e-4, momentum=0.98),
    ("softcon", "full"): SOFTCON | dict(
        arch="vit_small", img_size=224, patch_size=14, hidden=4096,
        crop_min=0.2, holdout=0.1, jitter=0.4, grey=0.2,
        soft_weight=0.1,
        epochs=100, batch_size=256, lr=1.5e-4, momentum=0.99),
    ("pera", "toy"): PERA | dict(
        arch="vit_tiny", img_size=32, patch_size=4, hidden=512,
        local_size=16,
        epochs=8, batch_size=32, lr=5e-4, momentum=0.95),
    ("pera", "small"): PERA | dict(
        arch="vit_tiny", img_size=112, patch_size=16, hidden=1024,
        adapt="auto", crop_min=0.3, local_size=48,
        epochs=8, batch_size=64, lr=3e-4, momentum=0.98),
    ("pera", "full"): PERA | dict(
        arch="vit_base", img_size=224, patch_size=16, hidden=2048,
        holdout=0.1, jitter=0.4, local_size=96,
        drop_path=0.3, crops=[2, 8], prototypes=131072,
        epochs=200, batch_size=192, lr=1e-3, momentum=0.992),
}

VIEWS = {"softcon": 2, "pera": 1}          # images of a scene that a step takes: its seasons

# Flags that only one method has.  The other refuses them.
METHOD_FLAGS = {"softcon": ["mask_ratio", "soft_weight", "soft_tau"],
                "pera": ["crops", "local_size", "prototypes", "teacher_tau", "ratios"]}

# Flags that a resumed run may change.  All others decide the numbers, so they must stay.  (The
# device changes last digits; the number of ranks, drop path, KoLeo and batch norms on CPUs.)
MAY_CHANGE = ["data", "max_steps", "out", "resume", "save_every", "log_every", "device", "compile"]

# AdamW's constants.  [MoCo v3; PerA builder.py]
ADAMW = {"softcon": dict(betas=(0.9, 0.95), eps=1e-8),
         "pera": dict(betas=(0.9, 0.999), eps=2e-5)}

# Other constants that have no flag.
FINAL_LR = 1e-6                # where the cosine of the learning rate ends
TAU_WARMUP = 0.15              # PerA: share of the steps in which the teacher's temperature climbs
KOLEO_WEIGHT = 0.1             # PerA, eq. (10)  [PerA pera_loss.py]
PIXEL_WEIGHT = 0.01            # PerA, eq. (10)  [PerA pera_loss.py]
LOCAL_AREA_MIN = 0.05          # PerA: smallest share of the image in a local crop
WATCHED = 1000                 # images that the k-NN of the log learns from, and as many to judge


# ------------------------------------------------------------------------------------------ flags

positive = data.number(int, 1, 2**31)
natural = data.number(int, 0, 2**31)
share = data.number(float, 0, 1)
amount = data.number(float, 0, 2**31)
temperature = data.number(float, 1e-4, 100)

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    epilog="Flags without a default take the value of the preset, see PRESETS in this file.")

flag = parser.add_argument_group("data").add_argument
flag("--modality", required=True, metavar="SENSOR",
     help=f"{', '.join(data.SENSORS)} or a JSON file of `data.py stats`; the bands must be "
          f"those of the pack")
flag("--data", metavar="PACK", help="a folder that `python data.py pack` made (default: toy world)")
flag("--holdout", type=share,
     help="share of scenes kept for probe.py; without effect if the pack has splits, of which "
          "`train` is trained on")
flag("--img-size", type=positive, help="side of a (global) crop in pixels")
flag("--crop-min", type=data.number(float, 0.01, 1),
     help="smallest share of the area in such a crop")
flag("--crops", type=natural, nargs=2, metavar=("GLOBAL", "LOCAL"), help="pera: crops of an image")
flag("--local-size", type=natural, help="pera: side of a local crop in pixels")
flag("--jitter", type=share,
     help="largest change of light; radar: 5 times this in dB, none with softcon")
flag("--grey", type=share, help="share of views turned grey; pera: 0.8 of it, student only")

flag = parser.add_argument_group("model").add_argument
flag("--method", default="softcon", choices=["softcon", "pera"], help="default: %(default)s")
flag("--preset", choices=["toy", "small", "full"],
     help=f"default: toy without --data, small for fewer than {SMALL_DATA} images, else full")
flag("--arch", choices=[*models.RESNETS, *models.VITS], help="backbone; pera needs a ViT")
flag("--patch-size", type=positive, help="of a ViT; with a ResNet: the cell of SoftCon's mask")
flag("--hidden", type=positive, help="width of the heads' hidden layers")
flag("--prototypes", type=positive, help="pera: outputs of the CLS head")
flag("--drop-path", type=data.number(float, 0, 0.99), help="share of samples that skip a block")
flag("--init", metavar="FILE", help="start from this checkpoint, for example DINOv2's or DINO's")
flag("--adapt", choices=["random", "mean", "rgb", "auto"],
     help="first layer if --init has other channels: random, as in SoftCon; their mean; its RGB in "
          "the bands red, green, blue; auto: rgb if it can be, else mean, good with few images")
flag("--init-norm", choices=["imagenet", "half"],
     help="input of --init: by ImageNet's mean and std, or (x - .5) / .5; the first layer adapts")

flag = parser.add_argument_group("loss").add_argument
flag("--tau", type=temperature, help="temperature of InfoNCE; pera: of the student")
flag("--teacher-tau", type=temperature, nargs=2, metavar=("FIRST", "LAST"),
     help=f"pera: temperature of the teacher; LAST is reached after {TAU_WARMUP} of the steps")
flag("--soft-weight", type=amount, help="softcon: of the label term; see soft_share in the log")
flag("--soft-tau", type=temperature, help="softcon: temperature of the label term")
flag("--mask-ratio", type=share, help="softcon: share of the student's patches that are masked")
flag("--ratios", type=share, nargs=3, metavar=("STUDENT", "GUESSED", "TEACHER"),
     help="pera: shares of patches that the student sees, that it must guess, the teacher sees")

flag = parser.add_argument_group("optimisation").add_argument
flag("--epochs", type=positive, help="passes over the scenes")
flag("--max-steps", type=natural, default=0,
     help="stop early; the schedules still span all --epochs (%(default)s: never)")
flag("--batch-size", type=positive,
     help="scenes per step, over all ranks and micro-batches")
flag("--accum", type=positive, default=1,
     help="micro-batches per step (%(default)s); not the same as a larger batch: a query's keys, "
          "KoLeo's neighbours and the statistics of batch norms are those of one micro-batch")
flag("--lr", type=amount, help="AdamW's highest learning rate; it is not scaled by the batch")
flag("--weight-decay", type=amount, nargs=2, metavar=("FIRST", "LAST"),
     help="on a cosine; never on norms and biases")
flag("--warmup", type=share, default=0.1, help="share of steps in which lr climbs (%(default)s)")
flag("--momentum", type=share, help="of the teacher; climbs to 1 on a cosine")
flag("--clip", type=amount, help="scale gradients down to this norm; 0: leave them")

flag = parser.add_argument_group("run").add_argument
flag("--out", help="folder for the run (default: runs/METHOD_MODALITY)")
flag("--resume", action="store_true", help="go on from OUT/last.pt; start if it is not there")
flag("--save-every", type=positive, default=250,
     help="steps between checkpoints, and between values of knn in the log (%(default)s)")
flag("--log-every", type=positive, default=10, help="steps between log lines (%(default)s)")
flag("--seed", type=natural, default=0, help="of everything (%(default)s)")
flag("--device", default="auto", help="as torch names it: cpu, cuda, mps, ...; auto: a GPU if any")
flag("--amp", default="auto", choices=["auto", "bf16", "off"], help="auto: bf16 on CUDA only")
flag("--compile", action="store_true", help="torch.compile: a slow start, then faster steps")


def resolve_flags(argv=None):
    """Command line -> namespace of all flags, final, with the open .pack, its .sensor, and .scenes
    to train on.

    What is given wins over the preset, and the number of images chooses the preset.  InputError:
    a flag or the data cannot be used.  (argparse ends the program for flags that it cannot read.)
    """
    args = parser.parse_args(argv)
    other = "pera" if args.method == "softcon" else "softcon"
    for name in METHOD_FLAGS[other]:
        data.require(getattr(args, name) is None,
                     f"--{name.replace('_', '-')}: has no effect on --method {args.method}")
        delattr(args, name)

    # the data, and what follows from them
    asked = data.find_sensor(args.modality)
    if not args.data:
        args.preset = args.preset or "toy"
        args.data = toy_pack(args.modality)
    args.pack = data.open_pack(args.data)
    args.sensor = args.pack.sensor
    bands = " ".join(args.sensor.bands)
    data.require(asked.bands == args.sensor.bands,
                 f"--modality {args.modality}: {args.data} has the bands {bands}")
    if not args.preset:
        args.preset = "small" if len(args.pack.names) < SMALL_DATA else "full"

    # flags that are not given
    for name, value in PRESETS[args.method, args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.scenes = scenes_to_train_on(args.pack, args.holdout)
    images = sum(not args.scenes.keys().isdisjoint(rows) for rows in args.pack.rows)
    if args.pack.chip and images < args.batch_size:
        args.pack.notes.append(f"the chips come from {images} images, fewer than a batch of "
                               f"{args.batch_size}: neighbours count as different places")
    args.out = args.out or f"runs/{args.method}_{asked.name}"
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.amp == "auto":
        args.amp = "bf16" if args.device.startswith("cuda") else "off"
    check_flags(args)
    return args


def plain_flags(args):
    """What of args is a flag, and may stand in a json file."""
    no_flags = ("pack", "sensor", "scenes")
    return {name: value for name, value in vars(args).items() if name not in no_flags}


def toy_pack(modality):
    """Folder of the toy world's pack.  A machine's first rank makes it, the others wait for it."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        data.toy_pack(modality)
    largest_of_ranks(0)                                              # they meet here
    return data.toy_pack(modality)


def check_flags(args):
    """InputError, naming the flag, for what is bound to fail."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    scenes = len(args.scenes)
    parts = ranks * args.accum
    size = f"--batch-size {args.batch_size}"
    data.require(args.batch_size >= 2 * parts and args.batch_size % parts == 0,
                 f"{size}: not a multiple, 2 or more, of {ranks} rank(s) x --accum {args.accum}")
    data.require(args.batch_size <= scenes, f"{size}: exceeds the {scenes} training scenes")
    data.require(args.resume or not os.path.exists(f"{args.out}/last.pt"),
                 f"--out {args.out}: holds a run; --resume continues it, another --out keeps it")
    sides = [args.img_size]
    if args.method == "pera":
        data.require(args.arch in models.VITS, f"--arch {args.arch}: --method pera needs a ViT")
        data.require(args.crops[0] > 0, "--crops: at least one is global")
        if args.crops[1] > 0:
            sides.append(args.local_size)

    # draw one mask of each size: ratios that cannot be are refused there
    try:
        for side in sides:
            h, w = models.check_grid(side, side, args.patch_size)
            if args.method == "softcon":
                losses.block_mask(1, (h, w), args.mask_ratio)
            else:
                losses.disjoint_masks(1, h * w, *args.ratios)
    except ValueError as error:
        raise data.InputError(f"{error} (--img-size, --local-size, --patch-size)") from error


def describe_run(args, facts):
    """The first lines of a run: its command, preset and what differs from it, facts, notes.

    facts: what `versions` and `describe_data` return, {name: value}.
    """
    changed = []
    for name, value in PRESETS[args.method, args.preset].items():
        if getattr(args, name) != value:
            changed.append(f"{name} {getattr(args, name)} instead of {value}")
    lines = [shlex.join(sys.argv),
             f"preset: {args.method}, {args.preset}; changed: {', '.join(changed) or 'nothing'}"]
    lines += [f"{name}: {value}" for name, value in facts.items()]
    return "\n".join(lines + args.pack.notes)


def versions(args, world):
    """What a result depends on beside its flags."""
    return {"python": sys.version.split()[0], "torch": str(torch.__version__),
            "commit": commit(), "world": world, "device": args.device}


def describe_data(args):
    """What a run is trained on; a resumed run says what of it has changed."""
    pack = args.pack
    labels = pack.labels[np.concatenate(list(args.scenes.values()))]
    uses_labels = args.method == "softcon" and args.soft_weight > 0 and labels.any()
    return {"path": os.path.abspath(pack.path), "checksum": pack.checksum,
            "images": len(pack.names), "training_images": len(labels),
            "training_scenes": len(args.scenes), "by_split": bool((pack.split != "").any()),
            "labelled": int(labels.any(1).sum()),
            "labels_from": pack.labels_from,
            "labels_checksum": f"{zlib.crc32(labels):08x}", "labels_used": bool(uses_labels)}


def commit():
    """Short git hash of this code, with a + if files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, text=True,
                                       stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# -------------------------------------------------------------------------- processes and signals


def start_processes():
    """-> (rank, world): 0 and 1, or what torchrun tells a process in the environment."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        # gloo for tensors on the CPU (the first step, the wish to stop), NCCL for those on GPUs
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return rank, world


def choose_device(args):
    """The torch.device of this process.  InputError: this machine does not have it."""
    name = args.device
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = data.find_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True         # shapes never change: try, then keep the best
    return device


def largest_of_ranks(value):
    """The largest int `value` of any rank; all ranks wait for each other here.

    It travels from CPU to CPU, so no GPU has to finish first, and the death of a rank is noticed.
    """
    value = torch.tensor(value)
    if dist.is_initialized():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


signal_times = []            # when SIGTERM or SIGINT came; the run stops after the step it is in


def note_signal(number, frame):
    """First signal: stop after this step.  A second one, later than a second: end at once.

    (torchrun sends on what a scheduler sends to all, so one wish may arrive as two signals.)
    """
    signal_times.append(time.monotonic())
    if signal_times[-1] - signal_times[0] > 1:
        os._exit(128 + number)
    print("stopping after this step; once more ends at once", file=sys.stderr)


# ------------------------------------------------------------------------------------------- data


def scenes_to_train_on(pack, holdout):
    """{number of a scene: numbers of its images}, of the images that training may see.

    They are the split "train" if the pack has splits, else all of the scenes that are not held out.
    A chip is a place of its own here, though a whole image is held out: so an epoch sees all chips,
    and SoftCon takes two views of one chip, never two chips, for the same place.
    """
    in_train = pack.split == "train"                                 # (n,)
    if (pack.split == "").all():
        held_out = data.held_out(pack.scenes, holdout)               # (m,)
        for i, rows in enumerate(pack.rows):
            in_train[rows] = not held_out[i]
    if pack.chip:
        return {row: [row] for row in np.flatnonzero(in_train)}
    scenes = {i: rows[in_train[rows]] for i, rows in enumerate(pack.rows)}
    return {i: rows for i, rows in scenes.items() if len(rows)}


def draw_batches(scenes, args, rank, world, start, stop):
    """Yield this rank's micro-batches, from step `start` up to `stop`: (B,V) numbers of images.

    Step t of an epoch takes the t-th slice of the epoch's permutation of the scenes, whatever the
    number of ranks.  The V images of a scene are different ones; a scene with fewer repeats them.
    """
    steps_per_epoch = len(scenes) // args.batch_size
    for step in range(start, stop):
        epoch, t = divmod(step, steps_per_epoch)
        if t == 0 or step == start:
            order = np.random.default_rng([args.seed, epoch]).permutation(list(scenes))
        batch = order[t * args.batch_size:(t + 1) * args.batch_size]
        for micro_batch in batch.reshape(args.accum, world, -1)[:, rank]:
            images = []
            for i in micro_batch:
                seasons = np.random.default_rng([args.seed, epoch, i]).permutation(scenes[i])
                images.append(np.resize(seasons, VIEWS[args.method]))
            yield np.stack(images)


def read_ahead(pack, batches, device, threads=4):
    """For each (B,V) numbers of images in `batches`: x (B,V,C,H,W) and y (B,V,L), uint8, on device.

    While a step runs, each thread reads one of the next micro-batches.  OSError: the pack cannot
    be read any more.
    """
    def read(rows):
        x = torch.empty(*rows.shape, *pack.images.shape[1:], dtype=torch.uint8,
                        pin_memory=device.type == "cuda")
        pack.read(rows.ravel(), x.flatten(0, 1).numpy())
        return x, torch.from_numpy(pack.labels[rows])

    def to_device(job):
        return [part.to(device, non_blocking=True) for part in job.result()]

    jobs = deque()
    with ThreadPoolExecutor(threads) as pool:
        for rows in batches:
            jobs.append(pool.submit(read, rows))
            if len(jobs) > threads:
                yield to_device(jobs.popleft())
        while jobs:
            yield to_device(jobs.popleft())


class StepRandomness:
    """The random draws of one micro-batch, but for drop path the same for any number of ranks.

    Every rank draws for the views of all ranks, and `of_this_rank` cuts its part out.
    """

    def __init__(self, seed, step, micro, rank, world):
        self.rank = rank
        self.world = world
        seed = int(np.random.SeedSequence([seed, step, micro]).generate_state(1)[0])
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed + rank)                     # for drop path, which draws on its own

    def of_this_rank(self, drawn, views):
        """(views x world x B, ...), or a dict of such tensors -> (views x B, ...) of this rank."""
        if isinstance(drawn, dict):
            return {name: self.of_this_rank(value, views) for name, value in drawn.items()}
        drawn = drawn.unflatten(0, (views, self.world, -1))
        return drawn[:, self.rank].flatten(0, 1)


# --------------------------------------------------------------------- networks and their schedules


def networks(args, device, quiet=False):
    """-> namespace of student, teacher, centre (PerA's, else an empty module) and ddp: the student,
    which main wraps if there are several ranks.

    The teacher starts as a copy of the student.  It has no predictor and guesses no pixels.
    """
    pera = args.method == "pera"
    channels = len(args.sensor.bands)
    registers = 0
    layerscale = not pera                                # PerA's ViTs have no LayerScale
    if args.init:
        weights = models.read_weights(args.init, channels)
        registers = weights.registers
        layerscale = layerscale or weights.layerscale    # but DINOv2's weights need it

    def branch(drop_path, predict):
        """The student, which predicts, or the teacher."""
        backbone = models.build(args.arch, channels, args.img_size, args.patch_size, registers,
                                drop_path, layerscale)
        if pera:
            network = models.SparseBranch(backbone, args.prototypes, args.hidden, predict)
        else:
            network = models.Branch(backbone, args.hidden, predict)
        if device.type == "cuda" and dist.is_initialized():      # on CPUs, each rank has its own
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return network.to(device, memory_format=torch.channels_last)     # convolutions like it

    student = branch(args.drop_path, predict=True)
    teacher = branch(0.0, predict=False).requires_grad_(False)
    if args.init:
        models.load_pretrained(student.backbone, args.init, args.adapt,
                               args.sensor.red_green_blue, args.init_norm, quiet, weights)
    teacher.load_state_dict(student.state_dict(), strict=False)      # the student has more heads
    centre = losses.Centre(args.prototypes).to(device) if pera else nn.Module()
    return SimpleNamespace(student=student, teacher=teacher, centre=centre, ddp=student)


def compile_networks(net):
    for branch in (net.student, net.teacher):
        # the blocks of a ViT are alike, so what is compiled for one serves them all
        for part in getattr(branch.backbone, "blocks", [branch]):
            # shapes never change; by default, what differs between student and teacher (tokens,
            # drop path) would become a variable, which makes the steps slower
            part.compile(dynamic=False)


def adamw(student, args):
    """AdamW with weight decay on what has more than one dimension: not on norms and biases."""
    trained = [p for p in student.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    vectors = [p for p in trained if p.dim() <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0}]
    return torch.optim.AdamW(groups, **ADAMW[args.method], fused=True)


def linear(step, steps, first, last):
    """Value at `step` of a line from first to last in `steps` steps, both included, then last."""
    if step >= steps:
        return last
    return first + (last - first) * step / max(1, steps - 1)


def cosine(step, total, start, end, warmup=0):
    """Value at `step` of `total`: a line from 0 to `start` in `warmup` steps, then half a cosine to
    `end`.  So the very first step has the value 0 if there is a warm-up.  [PerA builder.py]"""
    if step < warmup:
        return linear(step, warmup, 0.0, start)
    progress = (step - warmup) / max(1, total - warmup)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def schedules(args, step, total):
    """What changes from step to step, by its name in the log."""
    warmup = round(args.warmup * total)
    values = {"lr": cosine(step, total, args.lr, FINAL_LR, warmup),
              "weight_decay": cosine(step, total, *args.weight_decay),
              "momentum": cosine(step, total, args.momentum, 1)}
    if args.method == "pera":
        values["teacher_tau"] = linear(step, round(TAU_WARMUP * total), *args.teacher_tau)
    return values


# ------------------------------------------------------------------------------- SoftCon, one step


def autocast(args, device):
    """bf16 for matrix products and convolutions inside; with --amp off, nothing."""
    if args.amp == "off":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def softcon_views(x, args, draws):
    """Two seasons (B,2,C,H,W) uint8 -> a view of each and the patches that the student keeps.

    Views (2B,C,h,w) in [0,1], all first seasons before all second ones; kept patches (2B,n).
    """
    total = 2 * len(x) * draws.world                              # views of all ranks
    light_p = 0.0 if args.sensor.kind == "radar" else 0.8         # radar brings its own light
    crops = data.draw_crops(total, draws.generator, args.crop_min)
    light = data.draw_colours(total, args.sensor, draws.generator, light_p, args.jitter, args.grey)
    grid = models.check_grid(args.img_size, args.img_size, args.patch_size)
    patches = losses.block_mask(total, grid, args.mask_ratio, draws.generator)

    seasons = x.transpose(0, 1).flatten(0, 1)                             # (2B,C,H,W)
    views = data.crop(seasons, draws.of_this_rank(crops, 2), args.img_size)       # (2B,C,h,w)
    views = data.colour(views, draws.of_this_rank(light, 2))
    views = views.contiguous(memory_format=torch.channels_last)
    return views, draws.of_this_rank(patches, 2).to(x.device, non_blocking=True)


def softcon_step(net, x, y, args, draws, values):
    """SoftCon's loss on one micro-batch, in both directions.

    x (B,2,C,H,W) uint8: two seasons of each scene; y (B,2,L): their labels.  Returns a namespace:
    the loss; its terms for the log; embeddings (2B,256) of the student, on which the soft term
    acts; features (2B,D) of the teacher.
    """
    views, student_patches = softcon_views(x, args, draws)                # (2B,C,h,w), (2B,n)
    with autocast(args, x.device):
        with torch.no_grad():
            k, features = net.teacher(views)                              # (2B,256), (2B,D)
        if args.arch in models.VITS:
            q, _ = net.ddp(views, student_patches)                        # (2B,256)
        else:                                        # a ResNet cannot drop patches: grey there
            q, _ = net.ddp(losses.blank_patches(views, student_patches, args.patch_size))

    # keys and labels of all ranks: M = B x ranks
    keys = losses.gather(k.unflatten(0, (2, -1)).transpose(0, 1))         # (M,2,256)
    labels = losses.gather(y)                                             # (M,2,L)

    # each season's queries meet the other season's keys
    q1, q2 = q.chunk(2)                                                   # (B,256)
    y1, y2 = y.unbind(1)                                                  # (B,L)
    k1, k2 = keys.unbind(1)                                               # (M,256)
    all_y1, all_y2 = labels.unbind(1)                                     # (M,L)
    flags = [args.tau, args.soft_weight, args.soft_tau]
    loss1, hard1, soft1 = losses.softcon_loss(q1, k2, y1, all_y2, *flags)
    loss2, hard2, soft2 = losses.softcon_loss(q2, k1, y2, all_y1, *flags)
    terms = {"info_nce": (hard1 + hard2) / 2, "soft": (soft1 + soft2) / 2}
    return SimpleNamespace(loss=(loss1 + loss2) / 2, terms=terms, embeddings=q, features=features)


# ---------------------------------------------------------------------------------- PerA, one step


def aligned_pairs(x, args, draws, count, size, area_min, area_max):
    """`count` crops of each image of x (B,C,H,W), each for the student and for the teacher.

    Both see the same pixels in other colours.  Returns a namespace: student_view and teacher_view
    (count B, C, size, size) in [0,1], and three sets of patches that have none in common:
    student_patches, which the student sees, guessed_patches, which neither sees and the student
    must guess, and teacher_patches, each (count B, n).  How often and how much colours change is
    as released.  [PerA augmentation.py]
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

    pixels = data.crop(x.repeat(count, 1, 1, 1), draws.of_this_rank(crops, count), size)
    student_view = data.colour(pixels, draws.of_this_rank(student_light, count))
    teacher_view = data.colour(pixels, draws.of_this_rank(teacher_light, count))
    student_patches, guessed_patches, teacher_patches = [
        draws.of_this_rank(mask, count).to(x.device) for mask in masks]
    return SimpleNamespace(student_view=student_view, teacher_view=teacher_view,
                           student_patches=student_patches, guessed_patches=guessed_patches,
                           teacher_patches=teacher_patches)


def pera_step(net, x, y, args, draws, values):
    """PerA's loss on one micro-batch.

    x (B,1,C,H,W) uint8: an image of each scene; y, their labels, are not used;
    values["teacher_tau"].  Returns a namespace: the loss; its terms for the log; features (B,D) of
    the teacher, of the first crop; scores (1,K): the teacher's mean, to which the centre moves.
    """
    x = x[:, 0]                                                           # (B,C,H,W)
    n_global, n_local = args.crops
    pairs = [aligned_pairs(x, args, draws, n_global, args.img_size, args.crop_min, 1.0)]
    if n_local:
        pairs.append(aligned_pairs(x, args, draws, n_local, args.local_size, LOCAL_AREA_MIN,
                                   args.crop_min))
    guessed_patches = pairs[0].guessed_patches            # of global crops alone: (n_global B, m)

    # embeddings z and z_t (crops B, 384), features (crops B, D), guess (n_global B, m, PPC)
    with autocast(args, x.device):
        with torch.no_grad():
            z_t, features, _ = net.teacher([pair.teacher_view for pair in pairs],
                                           [pair.teacher_patches for pair in pairs])
        z, _, guess = net.ddp([pair.student_view for pair in pairs],
                              [pair.student_patches for pair in pairs], guessed_patches)

    prototypes = net.student.cls_head.prototypes()                        # (K,384)
    prototypes_t = net.teacher.cls_head.prototypes()
    dino, koleo = losses.pera_loss(z, z_t, [prototypes, prototypes_t], net.centre.value,
                                   values["teacher_tau"], n_global + n_local, n_global, args.tau)

    # From [0,1] to [-2,2]: z-scores of the sensor (but for rgb), as [0,1] spans 4 deviations.
    target = 4 * losses.patchify(pairs[0].student_view - 0.5, args.patch_size)    # (.., N, PPC)
    pixel = losses.pixel_loss(guess, target, guessed_patches)
    loss = dino + KOLEO_WEIGHT * koleo + PIXEL_WEIGHT * pixel                           # eq. (10)

    # scores are linear in z_t, so the scores of the mean are the mean of the scores
    scores = z_t.to(prototypes_t).mean(0, keepdim=True) @ prototypes_t.T      # (1,K)
    terms = {"dino": dino, "koleo": koleo, "pixel": pixel}
    return SimpleNamespace(loss=loss, terms=terms, features=features[:len(x)], scores=scores)


STEPS = {"softcon": softcon_step, "pera": pera_step}

# ---------------------------------------------------------------------------- either method's step


def train_step(net, optimiser, batch, args, step, values, rank=0, world=1, measure=False):
    """Move the student by one step of AdamW; the teacher, and PerA's centre, follow.

    net: what `networks` returns; optimiser: of `adamw`; batch: --accum micro-batches of this rank,
    each x (B,V,C,H,W) uint8 and y (B,V,L) uint8 on the device; values: what `schedules` returns for
    this step.  Returns a namespace for the log: loss and terms, means over the micro-batches;
    gradient_norm, before it is clipped; features of the last micro-batch; soft_share, measured in
    the first one if `measure`, else None.  FloatingPointError: the gradient is not finite; then
    nothing has moved.
    """
    matrices, vectors = optimiser.param_groups
    matrices.update(lr=values["lr"], weight_decay=values["weight_decay"])
    vectors.update(lr=values["lr"])

    # gradients, summed over the micro-batches and, in the last one, averaged over the ranks
    means = 0
    scores = []
    soft_share = None
    for micro, (x, y) in enumerate(batch):
        draws = StepRandomness(args.seed, step, micro, rank, world)
        net.ddp.require_backward_grad_sync = micro == len(batch) - 1
        result = STEPS[args.method](net, x, y, args, draws, values)
        numbers = torch.stack([result.loss, *result.terms.values()]).detach()
        means = means + numbers / len(batch)
        if args.method == "pera":
            scores.append(result.scores)
        elif measure and micro == 0:
            soft = args.soft_weight * result.terms["soft"]
            soft_share = losses.soft_share(result.embeddings, result.loss - soft, soft)
        (result.loss / len(batch)).backward()

    # a gradient that is not finite stops all ranks before a weight moves
    parameters = matrices["params"] + vectors["params"]
    norm = nn.utils.clip_grad_norm_(parameters, args.clip or math.inf)
    if not torch.isfinite(norm):
        raise FloatingPointError(
            f"step {step}: loss {means[0]:g}, gradient norm {norm:g}, lr {values['lr']:g}; "
            f"stopped before a weight changed")
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    models.ema_update(net.teacher, net.student, values["momentum"])                     # eq. (5)
    if scores:
        net.centre.update(torch.cat(scores))
    return SimpleNamespace(loss=means[0], terms=dict(zip(result.terms, means[1:])),
                           gradient_norm=norm, features=result.features, soft_share=soft_share)


# ------------------------------------------------------------------------- held-out scenes, watched


def images_to_watch(pack, holdout):
    """(n,) text: which labelled images the k-NN of the log learns from, "train", judges, "test".

    Of a pack with splits: some of `train`, and of `val`, or without it `test`.  Of others: scenes
    that are held out, but none of the half on which probe.py tests, so that a run which was chosen
    by its log is still tested on scenes that nobody looked at.
    """
    if (pack.split != "").any():
        judged = "val" if "val" in pack.split else "test"
        chosen = {"train": pack.split == "train", "test": pack.split == judged}
    else:
        scene = probe.scene_of_rows(pack)
        all_held_out, three_quarters, half = [
            data.held_out(pack.scenes, holdout * part)[scene] for part in (1, 0.75, 0.5)]
        chosen = {"train": all_held_out & ~three_quarters, "test": three_quarters & ~half}
    watched = np.full(len(pack.names), "", "U5")
    for part, images in chosen.items():
        rows = np.flatnonzero(images & pack.labels.any(1))
        watched[np.random.default_rng(0).permutation(rows)[:WATCHED]] = part
    return watched


def knn_value(net, args, watched, device):
    """What probe.py --protocol knn says of the teacher on these images: micro AP, or accuracy."""
    protocol = probe.PROTOCOLS["knn"]
    network = probe.Network(net.teacher.backbone, args.img_size)
    features = probe.compute_features(network, args.pack, {0: watched}, protocol, "cls",
                                      probe.Scaling(), device)
    net.teacher.train()
    labels = args.pack.labels
    one_label = args.pack.one_label
    scores = probe.fit_head(protocol, features, labels, None, watched, one_label, 0, device)
    metric, *_ = probe.metrics_of(one_label).values()
    return float(metric(scores, labels[watched == "test"]))


# -------------------------------------------------------------------------------------------- log


class Log:
    """log.jsonl: what a run says of itself, a JSON object every --log-every steps.

    The losses are those that were optimised, over all micro-batches and ranks.  soft_share is of
    the first micro-batch, feature_std and effective_rank are of the last, over all ranks.
    data_wait is the share of the time since the last line in which steps waited for data.  knn is
    there when a checkpoint is, if there are labels.
    """

    def __init__(self, args, rank, start, steps_per_epoch):
        self.args = args
        self.rank = rank
        self.steps_per_epoch = steps_per_epoch
        self.path = f"{args.out}/log.jsonl"
        if rank == 0:
            replace_file(self.path, lines_until(self.path, start))
        self.begin(start)

    def begin(self, step):
        self.first_step = step
        self.first_time = time.perf_counter()
        self.waited = 0.0

    def next_batch(self, reader):
        """The --accum micro-batches of a step.  While it takes time, a GPU stands idle."""
        begin = time.perf_counter()
        batch = [next(reader) for _ in range(self.args.accum)]
        self.waited += time.perf_counter() - begin
        return batch

    def write(self, step, values, result, knn=None):
        """Write the line after `step` steps.  All ranks must call it, as they average together.

        knn: a function that gives its value, at a time that images_per_s does not count.
        """
        means = torch.stack([result.loss, *result.terms.values()])
        means = losses.gather(means[None]).mean(0)                           # over the ranks
        line = {"step": step, "epoch": step / self.steps_per_epoch}
        line |= dict(zip(["loss", *result.terms], means.tolist()))
        line |= values
        if result.soft_share is not None:
            line["soft_share"] = result.soft_share
        line["gradient_norm"] = float(result.gradient_norm)
        line["feature_std"], line["effective_rank"] = losses.collapse(result.features)
        seconds = time.perf_counter() - self.first_time
        scenes = self.args.batch_size * (step - self.first_step)
        line["images_per_s"] = scenes * VIEWS[self.args.method] / seconds
        line["data_wait"] = self.waited / seconds
        line["peak_memory_gb"] = peak_memory_gb()
        if knn:
            line["knn"] = knn()
        line = {name: round(value, 6) for name, value in line.items()}
        if self.rank == 0:
            write(self.path, json.dumps(line) + "\n", "ab")
        self.begin(step)
        return line


def lines_until(path, step):
    """The log's lines up to `step`.  Later ones are of steps that a resumed run does again."""
    if step == 0 or not os.path.exists(path):
        return ""
    lines = Path(path).read_text(errors="replace").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("}\n")]    # a kill may cut off the last one
    return "".join(line for line in whole if json.loads(line)["step"] <= step)


def peak_memory_gb():
    """The most memory that this process has held: on the GPU, or else in all."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9    # it counts KiB


# ------------------------------------------------------------------------------------ checkpoints


def write(path, content, mode):
    """Write a text, or an object by torch.save, to the disk.  OSError: it is full, for example."""
    try:
        with open(path, mode) as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"{path}: not written ({error.strerror}); what was there still is") from error


def replace_file(path, content):
    """Write a file so that it is whole at any moment: beside its place, then renamed."""
    write(f"{path}.part", content, "wb")
    os.replace(f"{path}.part", path)


def save_checkpoint(args, parts, step, config):
    """last.pt to go on from, backbone.pt to use: the teacher's, under upstream names."""
    backbone = models.export_backbone(parts["teacher"].backbone)
    replace_file(f"{args.out}/backbone.pt", backbone)
    state = {name: part.state_dict() for name, part in parts.items()}
    replace_file(f"{args.out}/last.pt", state | {"step": step, "config": config})


def load_checkpoint(args, parts, config, announce):
    """Fill `parts` from OUT/last.pt -> the step to go on at, 0 if there is no checkpoint.

    Flags that decide the numbers must be those of the run.  Other scenes or labels are said, and
    the run goes on: a bad scene may have been taken out in the meantime.
    """
    path = f"{args.out}/last.pt"
    if not os.path.exists(path):
        announce(f"--resume: no {path} yet, so the run starts")
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["config"]
    except models.UNREADABLE as error:
        raise data.InputError(f"{path}: no whole checkpoint of a run") from error
    for group in ("flags", "sensor", "pack"):
        for name, value in config[group].items():
            old = before[group].get(name)
            if value != old and name not in MAY_CHANGE:
                difference = f"{group}: {name} {value}, but the run in {args.out} has {old}"
                data.require(group == "pack", difference)
                announce(difference)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    announce(f"resumed {path} at step {state['step']}")
    return state["step"]


# ------------------------------------------------------------------------------------------- main


def main(argv=None):
    rank, world = start_processes()
    args = resolve_flags(argv)
    device = choose_device(args)
    announce = tqdm.write if rank == 0 else lambda text: None
    software = versions(args, world)
    pack = describe_data(args)
    announce(describe_run(args, software | pack))
    config = {"flags": plain_flags(args), "sensor": dataclasses.asdict(args.sensor), "pack": pack,
              **software}
    steps_per_epoch = len(args.scenes) // args.batch_size
    total = args.epochs * steps_per_epoch                    # what the schedules span
    stop = min(total, args.max_steps or total)

    # ---------------------------------------------------------------------- networks and optimiser
    torch.manual_seed(args.seed)
    net = networks(args, device, quiet=rank > 0)
    optimiser = adamw(net.student, args)
    parts = {"student": net.student, "teacher": net.teacher, "centre": net.centre,
             "optimiser": optimiser}
    if args.compile:
        compile_networks(net)
    if world > 1:
        net.ddp = DistributedDataParallel(net.student, gradient_as_bucket_view=True)
    if world > 1 and device.type == "cpu":
        announce("batch norms: each rank normalises by its own part of the batch, as on the CPU")
    millions = sum(p.numel() for p in net.student.parameters()) / 1e6
    announce(f"student: {args.arch} and heads, {millions:.1f} M parameters; {total} steps of "
             f"{args.batch_size} scenes, amp {args.amp}")

    # ---------------------------------------------------------------------------------- the folder
    start = load_checkpoint(args, parts, config, announce) if args.resume else 0
    data.require(largest_of_ranks(start) == start,
                 f"--out {args.out}: must be one folder for all ranks, they see different runs")
    if rank == 0:
        os.makedirs(args.out, exist_ok=True)
        replace_file(f"{args.out}/config.json", json.dumps(config, indent=1))
    log = Log(args, rank, start, steps_per_epoch)

    # ----------------------------------------------------------------------------------- training
    batches = draw_batches(args.scenes, args, rank, world, start, stop)
    reader = read_ahead(args.pack, batches, device)
    watched = images_to_watch(args.pack, args.holdout)
    knn = None
    if rank == 0 and {"train", "test"} <= {*watched}:
        knn = partial(knn_value, net, args, watched, device)
    bar = tqdm(range(start, stop), args.method, initial=start, total=stop, disable=rank > 0)
    stopped = False
    for step in bar:
        values = schedules(args, step, total)
        last = step + 1 == stop
        saved = last or (step + 1) % args.save_every == 0
        logged = saved or (step + 1) % args.log_every == 0
        batch = log.next_batch(reader)
        result = train_step(net, optimiser, batch, args, step, values, rank, world, logged)
        if logged:
            line = log.write(step + 1, values, result, knn if saved else None)
            bar.set_postfix_str(f"loss {line['loss']:.3f}, {line['images_per_s']:.0f} images/s")
            if "knn" in line:
                announce(f"step {step + 1}: k-NN on held-out scenes {line['knn']:.4f}")
        stopped = largest_of_ranks(len(signal_times)) > 0 and not last       # all ranks or none
        if rank == 0 and (saved or stopped):
            save_checkpoint(args, parts, step + 1, config)
        if stopped:
            break

    # ------------------------------------------------------------------------------------ the end
    if stopped:
        announce(f"stopped at step {step + 1}, saved; the same command with --resume goes on")
    else:
        announce(f"{args.out}: config.json log.jsonl last.pt backbone.pt at step "
                 f"{max(start, stop)}\nnext: {next_command(args)}")
    if world > 1:
        # First DDP, then its group: whichever goes last waits for the group's thread, which may
        # wait for Python's lock.  DDP would hold that lock meanwhile, this call does not.
        net.ddp = None
        dist.destroy_process_group()


def next_command(args):
    command = f"python probe.py --ckpt {args.out}/backbone.pt"
    if args.pack.labels.any():
        return command
    return f"{command} --data PACK, one with labels, which {args.data} has not"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, note_signal)
    signal.signal(signal.SIGINT, note_signal)
    try:
        main()
    except (data.InputError, models.CheckpointError, OSError, FloatingPointError) as error:
        sys.exit(f"pretrain.py: error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("pretrain.py: error: out of GPU memory; lower --batch-size, or raise --accum (the "
                 "batch is then computed in parts), or lower --img-size or --crops")
