"""Pretraining, one process or many, CPU or CUDA, the same file.  [reading time: 20 minutes]

    torchrun pretrain.py --modality s1                        toy world, small net, CPU: 4 minutes
    torchrun pretrain.py --modality s2c --data DIR --init dinov2_vits14_pretrain.pth     one GPU
    torchrun --nproc-per-node 8 pretrain.py --method pera --modality rgb --data DIR      eight

SoftCon: the student sees two seasons of a scene, with blocks masked, and for each must find the
teacher's embedding of the other season among those of all scenes of the batch; how similar it may
be to the others follows from the scenes' land-cover labels.

PerA: student and teacher see the same crops of one image in other colours, and no patch in common;
the student must choose the teacher's prototypes and guess the pixels of patches nobody showed it.

In both the teacher is an average of past students and gets no gradient.  All randomness is a
function of (--seed, step): data order, seasons, crops, masks.  So a resumed run repeats the
undisturbed one, and W ranks see, together, what one rank would see.

Defaults in brackets; four of them: softcon on toy, softcon on --data, pera on toy, pera on --data.
"""
import argparse
import itertools
import json
import linecache
import math
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import losses
import model as models

FLAGS = {   # default, or (softcon on toy, on --data, pera on toy, on --data); help; choices
    "data": {
        "modality": (None, "s1 radar, s2c optical, s2a the same, air corrected, rgb", data.BANDS),
        "data": (None, "SSL4EO-S12 tree or class folders, with the full-size preset;\n"
                 "none: a toy world in ./toy, with a small one"),
        "labels": (None, "SSL4EO-S12-ML json (ssl4eo_multilabel.json in --data), or 'classes'"),
        "holdout": ((0.4, 0.1, 0.4, 0.1), "share of scenes kept for probe.py, by hash of the name"),
        "img-size": ((32, 224, 32, 224), "side of a (global) crop in pixels"),
        "crop-min": ((0.5, 0.2, 0.4, 0.4), "smallest share of the image in a (global) crop"),
        "crops": (([2, 8], [2, 8], [2, 2], [2, 8]), "pera: global and local crops of an image"),
        "local-size": ((0, 0, 16, 96), "pera: side of a local crop; its area: 0.05 to --crop-min"),
        "jitter": ((0.0, 0.4, 0.4, 0.4), "of brightness, contrast; on s1 pera's alone, x 5 dB"),
        "grey": ((0.0, 0.2, 0.1, 0.1), "share of views turned grey; pera: 0.8 of it, student"),
        "cache": (4.0, "decode once and keep in memory if it fits in this many GB per rank"),
        "on-bad": ("stop", "unreadable file: skip = another scene, up to 1 %%", ["stop", "skip"])},
    "model": {
        "method": ("softcon", "what to minimise", ["softcon", "pera"]),
        "arch": (("resnet18", "vit_small", "vit_tiny", "vit_base"), "backbone; pera takes a ViT",
                 models.RESNETS | models.VITS),
        "patch-size": ((4, 14, 4, 16), "of a ViT; with a ResNet, the cell of the mask"),
        "hidden": ((512, 4096, 512, 2048), "width of the heads"),
        "prototypes": ((0, 0, 512, 131072), "pera: outputs of the CLS head"),
        "drop-path": ((0.0, 0.0, 0.0, 0.3), "share of the student's samples that skip a block"),
        "init": (None, "start from this checkpoint, e.g. DINOv2 or DINO"),
        "adapt": ("random", "input layer if channels differ: fresh, as in SoftCon; the file's mean;"
                  "\nits rgb copied into B4, B3, B2", ["random", "mean", "rgb"])},
    "loss": {
        "tau": ((0.2, 0.2, 0.1, 0.1), "temperature of InfoNCE; pera: of the student"),
        "teacher-tau": ([0.03, 0.05], "pera: of the teacher, first and after 0.15 of the steps"),
        "soft-weight": ((0.5, 0.1, 0.0, 0.0), "of the soft label term; see soft_share in the log"),
        "soft-form": ("bce", "its formula, losses.soft_contrastive", losses.SOFT_TAU),
        "soft-tau": (0.0, "its temperature; 0: 0.2, with bce_mean 1"),
        "mask-ratio": (0.3, "softcon: share of the student's patches that are masked"),
        "ratios": ([0.2, 0.2, 0.6], "pera: patches for the student, to guess, for the teacher")},
    "optimisation": {
        "epochs": ((28, 100, 8, 200), "passes over the scenes"),
        "max-steps": (0, "stop early, 0: never; the schedules still span --epochs"),
        "batch-size": ((32, 256, 32, 192), "scenes per step, over all ranks"),
        "accum": (1, "micro-batches per step; keys are those of one micro-batch"),
        "lr": ((5e-4, 1.5e-4, 5e-4, 1e-3), "AdamW's peak, as it is: not scaled by the batch"),
        "weight-decay": (([0.05] * 2, [0.05] * 2, [0.04, 0.2], [0.04, 0.2]),
                         "first and last, on a cosine; not on norms and biases"),
        "warmup": (0.1, "share of the steps in which lr climbs from 0"),
        "momentum": ((0.9, 0.99, 0.95, 0.992), "of the teacher; climbs to 1 on a cosine"),
        "clip": ((0.0, 0.0, 3.0, 3.0), "gradient norm at most this; 0: any")},
    "run": {
        "out": (None, "folder (runs/METHOD_MODALITY)"),
        "resume": (False, "go on from OUT/last.pt, or from last_1.pt if that is damaged"),
        "resume-with-changes": ([], "flags, e.g. tau data, whose value or content may differ"),
        "save-every": (500, "steps between checkpoints"),
        "log-every": (10, "steps between lines of log.jsonl"),
        "tensorboard": (False, "write the numbers of log.jsonl for TensorBoard, too, into OUT"),
        "dry-run": (False, "print one step, tensor by tensor, and its cost; write nothing"),
        "workers": (2, "reading processes per rank"),
        "seed": (0, "of everything"),
        "device": ("auto", "auto: CUDA if there is one", ["auto", "cpu", "cuda"]),
        "amp": ("auto", "bf16 autocast; auto: on CUDA", ["auto", "bf16", "off"]),
        "compile": (False, "torch.compile both networks: minutes first, then faster steps")}}
PRESETS = {name.replace("-", "_"): row[0] for flags in FLAGS.values()
           for name, row in flags.items() if isinstance(row[0], tuple)}
FREE = set("data labels max_steps out resume resume_with_changes save_every log_every tensorboard "
           "dry_run workers cache on_bad device compile".split())       # another value is no change


def parse(argv):
    """Flags -> namespace; those of PRESETS take the value of their method and data if not given."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, (default, text, *choices) in flags.items():
            if default is False:
                group.add_argument(f"--{name}", action="store_true", help=text)
                continue
            like = default[0] if isinstance(default, tuple) else default
            first, *_ = like if isinstance(like, list) and like else [like]
            text += "" if default in (None, []) else f" ({str(default).strip('()')})"
            group.add_argument(
                f"--{name}", default=None if isinstance(default, tuple) else default, help=text,
                type=type(first) if isinstance(first, (int, float)) else str,
                nargs=(len(like) or "*") if isinstance(like, list) else None,
                choices=[*choices[0]] if choices else None, required=name == "modality")
    given = {word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    args = parser.parse_args(argv)
    for name in [name for name in PRESETS if getattr(args, name) is None]:
        setattr(args, name, PRESETS[name][2 * (args.method == "pera") + bool(args.data)])
    args.soft_tau = args.soft_tau or losses.SOFT_TAU[args.soft_form]
    args.out = args.out or f"runs/{args.method}_{args.modality}"
    many, two = 2 ** 31, 2 * (args.method == "pera")
    for names, low, high in (
            ("img-size patch-size epochs batch-size accum hidden log-every save-every", 1, many),
            ("max-steps", 0, many), ("seed", 0, 2 ** 63), ("prototypes", two, many),
            ("drop-path holdout", 0, 0.99), ("crop-min", 0.01, 1),
            ("tau soft-tau teacher-tau", 1e-4, 100), ("jitter grey warmup momentum", 0, 1),
            ("workers lr soft-weight clip cache weight-decay", 0, many)):
        for name in names.split():
            value = getattr(args, name.replace("-", "_"))
            if not all(low <= v <= high for v in (value if isinstance(value, list) else [value])):
                parser.error(f"--{name} {value}: must lie in {low} to {high}")
    for name, (_, text, *_) in itertools.chain(*(flags.items() for flags in FLAGS.values())):
        if f"--{name}" in given and text.startswith("softcon: pera:".split()[two == 0]):
            parser.error(f"--{name}: has no effect on --method {args.method}")
    if not args.data and args.modality not in ("s1", "s2c"):
        parser.error(f"--modality {args.modality}: the toy world has s1 and s2c; give --data")
    return args


# ----------------------------------------------------------------------------- small pure functions


def schedule(step, total, start, end, warmup=0, first=0.0):
    """Value at step in [0, total): a line from `first` to `start`, both included, in `warmup`
    steps, then half a cosine to `end`.  [PerA builder.py]"""
    if step < warmup:
        return first + (start - first) * step / max(1, warmup - 1)
    return end + (start - end) * (
        1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def schedules(args, step, total):
    """What changes from step to step, by its name in the log."""
    values = {"lr": schedule(step, total, args.lr, 1e-6, round(args.warmup * total)),
              "weight_decay": schedule(step, total, *args.weight_decay),
              "momentum": schedule(step, total, args.momentum, 1)}
    if args.method == "pera":
        first, last = args.teacher_tau
        values["teacher_tau"] = schedule(step, total, last, last, round(0.15 * total), first)
    return values


def batches(scenes, args, world, rank, start, stop):
    """Keys (scene, seed of its seasons) of this rank's micro-batches from step `start` to `stop`.

    Step t of an epoch takes the t-th slice of its permutation, whatever the number of ranks.
    """
    per_epoch, micro = len(scenes) // args.batch_size, args.batch_size // (world * args.accum)
    for step in range(start, stop):
        epoch, t = divmod(step, per_epoch)
        if t == 0 or step == start:
            order = np.random.default_rng([args.seed, epoch]).permutation(scenes)
        batch = order[t * args.batch_size:(t + 1) * args.batch_size]
        for rows in batch.reshape(args.accum, world, micro)[:, rank]:
            yield [(int(i), (args.seed, epoch, int(i))) for i in rows]


class Dice:
    """The random draws of one micro-batch, the same on any number of ranks: they are drawn for all
    ranks' views, view-major, and `ours` cuts this rank's out."""

    def __init__(self, seed, step, micro, rank, world):
        self.rank, self.world = rank, world
        seed = int(np.random.SeedSequence([seed, step, micro]).generate_state(1)[0])
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed + rank)                               # what drop path draws from

    def ours(self, drawn, views):
        """{name: (views x world x n, ...)} -> {name: (views x n, ...)}"""
        return {k: v.unflatten(0, (views, self.world, -1))[:, self.rank].flatten(0, 1)
                for k, v in drawn.items()}


# ------------------------------------------------------------------------------------- the methods


def networks(args, device, load=False, quiet=True):
    """Student, teacher and centre of --method; load: the student's backbone from --init.

    The teacher starts as a copy, has neither predictor nor guesses, and gets no gradient.
    """
    pera, chans = args.method == "pera", len(data.BANDS[args.modality])
    weights = models.read_weights(args.init, in_chans=chans) if args.init else ({}, [])
    registers = weights[0].get("register_tokens", torch.empty(1, 0)).shape[1]
    layerscale = not pera or "blocks.0.ls1.gamma" in weights[0]     # PerA has none of its own

    def side(drop_path, predict=False):
        backbone = models.build(args.arch, chans, args.img_size, args.patch_size, registers,
                                drop_path, layerscale)
        branch = models.SparseBranch(backbone, args.prototypes, args.hidden, predict) if pera \
            else models.Branch(backbone, args.hidden, predict)
        return branch.to(device, memory_format=torch.channels_last)          # convolutions like it
    student, teacher = side(args.drop_path, True), side(0.0).requires_grad_(False)
    if load:
        models.load_pretrained(student.backbone, args.init, args.adapt, quiet, weights,
                               data.COLOURS[args.modality])
    teacher.load_state_dict(student.state_dict(), strict=False)          # but for what it lacks
    if args.compile and not args.dry_run:
        try:
            torch.compile(lambda x: 2 * x)(torch.ones(2, device=device))         # is it possible?
            student.compile()
            teacher.compile()
        except Exception as error:                                     # no compiler, an old GPU
            if not quiet:
                print(f"--compile: not here ({type(error).__name__}), the networks run as they are")
    return SimpleNamespace(student=student, ddp=student, teacher=teacher,
                           centre=losses.Centre(args.prototypes).to(device))


def two_views(x, args, dice):
    """Two seasons of each scene, uint8 (B,2,C,H,W) -> a view of each, season by season, (2B,C,h,w)
    in [0,1]; draws from dice."""
    total, g = 2 * len(x) * dice.world, dice.generator
    light = total, args.modality, g, 0.8 * (args.modality not in data.RADAR), args.jitter, args.grey
    p = dice.ours(data.draw_crops(total, g, args.crop_min) | data.draw_colours(*light), 2)
    views = data.colour(data.crop(x.transpose(0, 1).flatten(0, 1), p, args.img_size), p)
    return views.contiguous(memory_format=torch.channels_last)


def softcon_step(net, x, y, args, dice, values):
    """Both directions of SoftCon on one micro-batch.

    net: student (in ddp) and teacher; x uint8 (B,2,C,H,W) two seasons of each scene, y (B,2,L).
    Returns the loss, its parts for the log, the student's embeddings (2B,256), on which the soft
    term acts, and the teacher's features (2B,D).
    """
    views, grid = two_views(x, args, dice), (args.img_size // args.patch_size,) * 2    # (2B,C,h,w)
    mask = losses.block_mask(len(views) * dice.world, grid, args.mask_ratio, dice.generator)
    keep = dice.ours({"keep": mask}, 2)["keep"].to(x.device)                     # (2B,n)
    vit = hasattr(net.teacher.backbone, "patch_size")
    with torch.autocast("cuda" if x.is_cuda else "cpu", torch.bfloat16, enabled=args.amp == "bf16"):
        with torch.no_grad():
            k, features = net.teacher(views)                                     # (2B,256), (2B,D)
        keys = losses.gather_soon(k.unflatten(0, (2, -1)).transpose(0, 1), y)    # on their way
        masked = views if vit else losses.blank_patches(views, keep, args.patch_size)
        q, _ = net.ddp(masked, keep if vit else None)                            # (2B,256)
    (q1, q2), (y1, y2) = q.chunk(2), y.unbind(1)                                 # (B,256), (B,L)
    (k1, k2), (Y1, Y2) = (v.unbind(1) for v in keys())                           # (M,256), (M,L)
    flags = args.tau, args.soft_weight, args.soft_form, args.soft_tau
    one = losses.softcon_loss(q1, k2, y1, Y2, *flags, Y1)
    other = losses.softcon_loss(q2, k1, y2, Y1, *flags, Y2)
    loss, hard, soft = ((a + b) / 2 for a, b in zip(one, other))
    return loss, {"info_nce": hard, "soft": soft}, q, features


def pera_step(net, x, y, args, dice, values):
    """PerA on one micro-batch: the same crops for both sides, in other colours, other patches.

    x uint8 (B,1,C,H,W), y (B,1,L); net.centre: losses.Centre; values: teacher_tau of this step.
    Returns the loss, its parts, the student's CLS features (crops B, D), the teacher's (B,D).
    """
    x, y, g, (n_global, n_local) = x[:, 0], y[:, 0], dice.generator, args.crops

    def pairs(count, size, *area):
        """`count` crops an image: student's and teacher's view (count B,C,H,W), their patches."""
        total = count * len(x) * dice.world
        masks = losses.disjoint_masks(total, (size // args.patch_size) ** 2, *args.ratios, g)
        where = dice.ours(data.draw_crops(total, g, *area) | dict(zip("slt", masks)), count)
        masks = [where.pop(k).to(x.device) for k in "slt"]
        seen = data.crop(x.repeat(count, 1, 1, 1), where, size)                  # (count B,C,H,W)
        light = [dice.ours(data.draw_colours(total, args.modality, g, p, args.jitter, grey, 0),
                           count) for p, grey in ((0.8, 0.8 * args.grey), (0.1, 0))]
        return *(data.colour(seen, p) for p in light), *masks
    views = [pairs(n_global, args.img_size, args.crop_min, 1.0)]
    if n_local:
        views.append(pairs(n_local, args.local_size, 0.05, args.crop_min))
    mine, theirs, keep, learn, others = zip(*views)
    with torch.autocast("cuda" if x.is_cuda else "cpu", torch.bfloat16, enabled=args.amp == "bf16"):
        with torch.no_grad():
            z_t, features, _ = net.teacher(theirs, others)              # (crops B,384), (crops B,D)
        if args.soft_weight:
            k = features[:n_global * len(x)].unflatten(0, (n_global, -1))        # (n_global,B,D)
            keys = losses.gather_soon(k.transpose(0, 1), y)                      # on their way
        z, cls, guess = net.ddp(mine, keep, learn[0])                   # guess (n_global B, m, PPC)
        matrices = [b.cls_head.prototypes() for b in (net.student, net.teacher)]         # (K,384)
        dino, spread = losses.pera_loss(z, z_t, matrices, net.centre.value, values["teacher_tau"],
                                        n_global + n_local, n_global, args.tau)
    sigmas = 4 * losses.patchify(mine[0] - 0.5, args.patch_size)         # the sensor's z-scores
    pixel = losses.pixel_loss(guess, sigmas, learn[0])
    net.centre.update(z_t.float().mean(0, keepdim=True) @ matrices[1].T)  # scores are linear in z_t
    parts = {"dino": dino, "koleo": spread, "pixel": pixel}
    loss = dino + 0.1 * spread + 0.01 * pixel                                           # eq. (10)
    if args.soft_weight:
        k, labels = keys()                                               # of all ranks
        parts["soft"] = sum(
            losses.soft_contrastive(q, k, y, labels, args.soft_form, args.soft_tau, labels)
            for q, k in zip(cls[:n_global * len(x)].chunk(n_global), k.unbind(1))) / n_global
        loss = loss + args.soft_weight * parts["soft"]
    return loss, parts, cls, features[:len(x)]


STEPS = {"softcon": softcon_step, "pera": pera_step}

# ----------------------------------------------------------------------------------------- dry run


def annotated(work):
    """-> (lines of text, what work() returns): each line of these files that makes tensors, with
    their names and shapes, as deep as the calls are nested; once for the same shapes."""
    ours, texts, stack = (__file__, losses.__file__, models.__file__), [], []

    def shapes(named):
        for name, value in named:
            if torch.is_tensor(value):
                yield f"{name} ({','.join(map(str, value.shape))})"
            elif isinstance(value, (list, tuple)):
                yield from shapes((f"{name}[{i}]", v) for i, v in enumerate(value))

    def trace(frame, event, arg):
        """What Python calls as a function begins, then at every line of it and at its end."""
        code = frame.f_code
        if code.co_filename not in ours or code.co_name[0] == "<" or (
                len({number for *_, number in code.co_lines()}) < 3):            # a one-liner
            return None
        values = dict(frame.f_locals)
        before, number = ({}, 0) if event == "call" else stack.pop()
        made = ", ".join(shapes((k, v) for k, v in values.items() if before.get(k) is not v))
        line = " ".join(linecache.getline(code.co_filename, number).split()) if number else (
            f"in {code.co_qualname}:")
        text = f"{'  ' * len(stack) + made:<64} {line}"
        if (made or not number) and text not in texts:
            texts.append(text)
        if event != "return":
            stack.append((values, frame.f_lineno))
        elif texts[-1].endswith(f" in {code.co_qualname}:"):
            texts.pop()                                                          # it made nothing
        return trace
    debugger = sys.gettrace()
    sys.settrace(trace)
    try:
        return texts, work()
    finally:
        sys.settrace(debugger)


def dry_run(args, world):
    """Print what one micro-batch of one rank does, tensor by tensor, and what it costs.

    On the meta device, where tensors have a shape and no numbers: nothing is computed or written.
    """
    pera, here, kept = args.method == "pera", args.data or os.path.isdir("toy"), []
    scenes, train, _ = open_scenes(args) if here else (None, range(100 * args.batch_size), "")
    B, size = args.batch_size // world // args.accum, scenes.size if here else 36
    with torch.device("meta"):
        net = networks(args, "meta")
        x = torch.empty(B, 2 - pera, len(data.BANDS[args.modality]), size, size, dtype=torch.uint8)
        y = torch.empty(B, 2 - pera, scenes.labels[0].shape[1] if here else len(data.CLASSES))
    tokens, weights, gb = {}, set(), {}
    for name, side in (("student", net.student), ("teacher", net.teacher)):
        counts = {part: sum(p.numel() for p in module.parameters()) / 1e6
                  for part, module in (("parameters in millions", side), *side.named_children())}
        print(f"{name}:", ", ".join(f"{part} {n:.2f}" for part, n in counts.items()))
        gb[name] = 4e-3 * counts["parameters in millions"]
        weights |= {p.untyped_storage()._cdata for p in side.parameters()}
        for block in getattr(side.backbone, "blocks", ()):
            block.register_forward_pre_hook(lambda _, inputs, name=name: tokens.setdefault(
                f"{name} {' and '.join(str(n) for _, n in inputs[1])}"))
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            inputs = net, x, y, args, Dice(args.seed, 0, 0, 0, 1), schedules(args, 0, 100)
            texts, (loss, *_) = annotated(lambda: STEPS[args.method](*inputs))
        loss.backward()
    flops = counter.get_total_flops() / 1e12
    print("what each line makes; lines that come with the same shapes again are left out:", *texts,
          sep="\n")
    print("tokens of a view, CLS included:", ", ".join(tokens) or "none, a ResNet")
    print(f"operations: {flops:.4g} TFLOP a micro-batch of {B} scenes, "
          f"{flops * args.accum * world:.4g} TFLOP a step of {args.batch_size}")
    kept = {s._cdata: s.nbytes() / 1e9 for s in (t.untyped_storage() for t in kept)}
    print(f"memory of a rank in GB: parameters {gb['student']:.2f}, gradients {gb['student']:.2f}, "
          f"AdamW {2 * gb['student']:.2f}, teacher {gb['teacher']:.2f}, activations "
          f"{sum(n for s, n in kept.items() if s not in weights):.2f} (float32; bf16: about half)")
    per_epoch = len(train) // args.batch_size
    total = args.epochs * per_epoch
    print(f"steps: {total}, {per_epoch} an epoch" + " (a guess: no data are here yet)" * (not here))
    for step in (0, total // 2, total - 1):
        print(f"step {step}:", ", ".join(
            f"{name} {value:.4g}" for name, value in schedules(args, step, total).items()))


# --------------------------------------------------------------------------------------------- run


def save(path, content, older=None):
    """Write text or a state beside `path`, flush to disk, rename: `path` is always whole; the one
    it replaces becomes `older`.  If that fails both stay, and ValueError names `path`."""
    part = Path(f"{path}.part")
    try:
        with data.named(path, "not written; what was there still is", "its folder is gone"):
            with open(part, "wb") as file:
                file.write(content.encode()) if isinstance(content, str) else torch.save(
                    content, file)
                file.flush()
                os.fsync(file.fileno())
            if older and os.path.exists(path):
                os.replace(path, older)
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def newest(paths, say):
    """First of the checkpoints `paths` that is whole, step and flags; the others are named."""
    for path in filter(os.path.exists, paths):
        try:
            with zipfile.ZipFile(path) as file:             # torch.load looks at no checksums
                if file.testzip():
                    raise zipfile.BadZipFile
            state = torch.load(path, map_location="cpu", weights_only=True)
            return path, state, state["step"], state["flags"]
        except Exception as error:                          # torch.load raises half a dozen kinds
            problem = f"{path}: not a whole checkpoint of a run ({type(error).__name__})"
            say(problem)
    raise ValueError(problem)


def listen(worker=None):
    """A list that SIGTERM and SIGINT fill, so that the run stops after its step; one more, later
    than a second (torchrun repeats what a scheduler sends), ends the process at once.  Reading
    processes call this too, and so leave it to the one they read for to end them."""
    asked = []

    def note(number, frame):
        if asked and time.monotonic() - asked[0] > 1:
            os._exit(128 + number)
        if worker is None and not asked:
            print("stopping after this step; once more ends at once", file=sys.stderr)
        asked.append(time.monotonic())
    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    return asked


def largest(value, world):
    """The largest int `value` of any rank.  It travels from CPU to CPU (gloo): no GPU is waited
    for, and a rank that has died is noticed at once, where NCCL would wait for minutes."""
    value = torch.tensor(value)
    if world > 1:
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def ahead(loader, device):
    """The loader's batches (x, y, ...), x and y on `device`: to a GPU each is copied beside the
    step before.  On the CPU they stay as they are."""
    if device.type != "cuda":
        yield from loader
        return
    side = torch.cuda.Stream(device)

    def copies():
        try:
            for x, y, *rest in loader:
                with torch.cuda.stream(side):
                    moved = [v.to(device, non_blocking=True) for v in (x, y)]
                yield moved, rest, side.record_event()
        except Exception as error:               # of the next batch: this step shall still be done
            yield None, error, None
    # the second of a pair is on its way while the first is used
    for (moved, rest, copied), _ in itertools.pairwise(itertools.chain(copies(), [None])):
        if moved is None:
            raise rest
        here = torch.cuda.current_stream(device)
        here.wait_event(copied)
        for v in moved:
            v.record_stream(here)                # its memory is not given away while `here` uses it
        yield *moved, *rest


class Spare:
    """Batches of `scenes` as (x, y, complaints): for a scene that cannot be read another one of
    `train`, drawn by its key."""

    def __init__(self, scenes, train):
        self.scenes, self.train = scenes, train

    def __getitem__(self, keys):
        rows, complaints = [], []
        for i, seed in keys:
            for other in (i, *np.random.default_rng([*seed, 1]).choice(self.train, 9)):
                try:
                    rows.append(self.scenes[int(other), seed])
                    break
                except ValueError as error:
                    complaints.append(str(error))
            else:
                raise ValueError(complaints[-1])
        return *(np.stack(v) for v in zip(*rows)), complaints


def open_scenes(args):
    """The scenes of --data or of the toy world, the numbers of those to train on, their folder."""
    root, views = args.data or "toy", 1 if args.method == "pera" else 2
    scenes = data.open_data(root, args.modality, args.labels, views)
    train = np.flatnonzero(~data.held_out(scenes.ids, args.holdout))
    if len(train) < args.batch_size:
        raise ValueError(f"--batch-size {args.batch_size} exceeds the {len(train)} training scenes")
    return scenes, train, root


def commit():
    """Short git hash of this code, with + when files differ from it."""
    folder = shlex.quote(str(Path(__file__).parent))
    command = f"git -C {folder} describe --always --dirty=+ --exclude='*' 2> /dev/null"
    return subprocess.getoutput(command) or "unknown"


def main(argv=None, asked=()):
    """asked: a list that fills when the run shall stop, as `listen` gives."""
    args = parse(argv)

    # --------------------------------------------------------------------- processes and device
    world, rank, local, locals_ = (int(os.environ.get(name, alone)) for name, alone in (
        ("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    pera, micro_batch = args.method == "pera", args.batch_size // args.accum
    cuda = args.device == "cuda" or args.device == "auto" and torch.cuda.is_available()
    args.amp = args.amp if args.amp != "auto" else "bf16" if cuda else "off"
    ckpt, older = f"{args.out}/last.pt", f"{args.out}/last_1.pt"
    there = os.path.exists(ckpt) or os.path.exists(older)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    args.resume |= there and attempt != "0"
    for wrong, why in (
            (cuda and local >= torch.cuda.device_count(),
             f"--device cuda: no CUDA device for local rank {local}"),
            (args.batch_size % (world * args.accum), f"--batch-size {args.batch_size} does not "
             f"divide into {world} rank(s) x --accum {args.accum}"),
            (micro_batch // (world if pera else 1) < 2, f"--batch-size {args.batch_size}: "
             f"{args.method} needs at least 2 scenes at a time" + " on each rank" * pera),
            (pera and (args.arch not in models.VITS or args.crops[0] < 1 or args.crops[1] < 0),
             f"--method pera takes a ViT and at least one global crop, not --arch {args.arch} "
             f"--crops {args.crops[0]} {args.crops[1]}"),
            (pera and args.crops[1] and args.local_size > args.img_size,
             f"--local-size {args.local_size}: exceeds --img-size {args.img_size}"),
            (there and not args.resume and not args.dry_run, f"--out {args.out}: holds a run; "
             f"--resume continues it, another --out keeps it"),
            (args.resume and not there, f"--resume: no {ckpt}")):
        if wrong:
            raise ValueError(why)
    for size in [args.img_size, args.local_size][:1 + (pera and args.crops[1] > 0)]:
        h, w = models.check_grid(size, size, args.patch_size)     # and refuse ratios that cannot be
        losses.disjoint_masks(1, h * w, *args.ratios) if pera else losses.block_mask(
            1, (h, w), args.mask_ratio)
    if args.dry_run:
        return dry_run(args, world) if rank == 0 else None
    if args.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(f"--tensorboard: {error}; pip install tensorboard") from None
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if world > 1:
        torch.cuda.set_device(device) if cuda else torch.set_num_threads(
            max(1, os.cpu_count() // locals_))
        store = next(dist.rendezvous("env://"))[0]   # restarted ranks shall not look for dead ones
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", rank=rank,
                                world_size=world, store=dist.PrefixStore(attempt, store))
    say = tqdm.write if rank == 0 else lambda *_: None
    facts = {"python": sys.version.split()[0], "torch": torch.__version__, "commit": commit(),
             "world": world, "device": device.type}
    say(f"{' '.join(sys.argv)}\n{json.dumps(vars(args))}\n"
        + ", ".join(f"{name} {fact}" for name, fact in facts.items()))

    # ------------------------------------------------------------------------------------- data
    if not args.data and local == 0:
        data.make_toy("toy")
    if world > 1:
        dist.barrier()
    scenes, train, root = open_scenes(args)
    n_images = sum(len(scenes.files[i]) for i in train)
    labelled = sum(int(scenes.labels[i].any(1).sum()) for i in train)
    say(f"data: {root}: {len(train)} of {len(scenes)} scenes to train on ({n_images} images of "
        f"{scenes.size} px, {labelled} labelled), the others held out"
        + "; no labels: the soft term is 0" * (not labelled and args.soft_weight > 0))
    if n_images * len(data.BANDS[args.modality]) * scenes.size ** 2 < args.cache * 1e9:
        try:
            scenes.preload(train, args.workers)
            args.workers = 0
        except ValueError:
            if args.on_bad == "stop":
                raise
            say("bad files: nothing is kept in memory, each scene is read when its turn comes")

    # ----------------------------------------------------------------- model, optimiser, schedules
    torch.manual_seed(args.seed)
    net = networks(args, device, args.init and not args.resume, rank > 0)
    student, teacher = net.student, net.teacher
    if world > 1:
        net.ddp = DistributedDataParallel(student, gradient_as_bucket_view=True)
    decayed, plain = ([p for p in student.parameters() if p.requires_grad and (p.dim() > 1) == yes]
                      for yes in (True, False))
    more = {"betas": (0.9, 0.999), "eps": 2e-5} if pera else {"betas": (0.9, 0.95)}
    optimiser = torch.optim.AdamW([{"params": decayed}, {"params": plain, "weight_decay": 0}],
                                  fused=True, **more)
    per_epoch = len(train) // args.batch_size
    total = args.epochs * per_epoch
    stop = min(total, args.max_steps or total)
    millions = sum(p.numel() for p in student.parameters()) / 1e6
    say(f"model: {args.arch}, student {millions:.1f} M parameters; {total} steps of "
        f"{args.batch_size} scenes ({world} x {args.accum} x "
        f"{args.batch_size // world // args.accum}), lr {args.lr:.2e}, amp {args.amp}")

    # ----------------------------------------------------------------------------------- resume
    start, log = 0, Path(args.out, "log.jsonl")
    content = {"data": [f"{scenes.ids[i]} ".encode() for i in train],
               "labels": [scenes.labels[i].tobytes() for i in train]}
    flags = {k: v for k, v in vars(args).items() if k not in FREE} | {
        k: f"{len(v)} scenes, crc {zlib.crc32(b''.join(v)):08x}" for k, v in content.items()}
    kept = {"student": student, "teacher": teacher, "centre": net.centre, "optimiser": optimiser}
    if args.resume:
        path, state, start, old = newest((ckpt, older), say)
        changed = {k.replace("_", "-"): k for k in flags if old.get(k) != flags[k]}
        for name in {*args.resume_with_changes} - {k.replace("_", "-") for k in flags}:
            raise ValueError(f"--resume-with-changes {name}: no flag that a run would compare")
        for name, k in changed.items():
            if name not in args.resume_with_changes:
                raise ValueError(f"--{name} {flags[k]}: the run in {args.out} has {old.get(k)}; "
                                 f"to change it: --resume-with-changes {' '.join(changed)}")
        try:
            for name, part in kept.items():
                part.load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"{path}: {name} does not fit ({type(error).__name__})") from None
        say(f"resumed {path} at step {start}" + ", changed: " * bool(changed) + ", ".join(changed))
        if state.get("world", world) != world:
            say(f"{world} ranks instead of {state['world']}: data, draws and schedules go on; not "
                f"exact are the rounding of sums, drop path, and pera's KoLeo, which is per rank")
    if largest(start, world) != start:
        raise ValueError(f"--out {args.out}: ranks begin at different steps; it must be one folder")
    if rank == 0:
        os.makedirs(args.out, exist_ok=True)
        if args.resume and path == older and os.path.exists(ckpt):
            os.replace(ckpt, f"{ckpt}.damaged")               # it shall not become the older one
        save(f"{args.out}/config.json", json.dumps({"flags": vars(args), **facts}, indent=1))
        lines = log.read_text(errors="replace") if start and log.exists() else ""
        lines = re.finditer(r'^{"step": (\d+), .*}\n', lines, re.M)          # a cut-off one is none
        save(log, "".join(line[0] for line in lines if int(line[1]) <= start))
        if args.tensorboard:
            board = SummaryWriter(args.out, purge_step=start + 1)

    # ------------------------------------------------------------------------------------- loop
    loader = ahead(DataLoader(Spare(scenes, train) if args.on_bad == "skip" else scenes, None,
                              sampler=batches(train, args, world, rank, start, stop),
                              num_workers=args.workers, pin_memory=cuda, worker_init_fn=listen),
                   device)
    bar = tqdm(range(start, stop), args.method, stop, initial=start, disable=rank > 0)
    clock, waited, since, low, skipped = time.perf_counter(), 0.0, start, 0, set()
    bad = torch.zeros(3, device=device)         # the first step that is not finite, from 1, and why
    for step in bar:
        values, means = schedules(args, step, total), 0
        for group in optimiser.param_groups:
            group["lr"] = values["lr"]
        optimiser.param_groups[0]["weight_decay"] = values["weight_decay"]
        logging, saving = ((step + 1) % often == 0 or step + 1 == stop
                           for often in (args.log_every, args.save_every))

        # -- a step: loss, gradients, weights, teacher
        for micro in range(args.accum):
            begin = time.perf_counter()
            x, y, *complaints = next(loader)                     # (B,V,C,H,W) uint8, (B,V,L)
            waited += time.perf_counter() - begin
            for complaint in {*itertools.chain(*complaints)} - skipped:
                tqdm.write(f"--on-bad skip: {complaint}")
                skipped.add(complaint)
            if len(skipped) > 0.01 * len(train):
                raise ValueError(f"--on-bad skip: {len(skipped)} bad files are more than 1 % of "
                                 f"{len(train)} scenes")
            dice = Dice(args.seed, step, micro, rank, world)
            net.ddp.require_backward_grad_sync = micro == args.accum - 1
            loss, parts, q, features = STEPS[args.method](net, x, y, args, dice, values)
            if logging and micro == 0 and "soft" in parts:
                soft = args.soft_weight * parts["soft"]
                values["soft_share"] = losses.soft_share(q, loss - soft, soft)
            (loss / args.accum).backward()
            means += torch.stack([loss, *parts.values()]).detach() / args.accum
        if world > 1:
            dist.all_reduce(means)
            means /= world
        norm = torch.nn.utils.get_total_norm([p.grad for p in decayed + plain])
        this = torch.stack([torch.full_like(norm, step + 1), means[0], norm])
        bad = torch.where((bad[0] > 0) | this.isfinite().all(), bad, this)
        optimiser.found_inf = (bad[0] > 0).float()   # on the device: from there on no weight moves
        stopping = largest(len(asked), world) and step + 1 < stop
        if (logging or saving or stopping) and bad[0] > 0:
            spoilt, why = int(bad[0]) - 1, "loss {:g}, gradient norm {:g}".format(*bad[1:])
            keys = itertools.chain(*batches(train, args, 1, 0, spoilt, spoilt + 1))
            if rank == 0:
                save(f"{args.out}/bad_step.json", json.dumps({
                    "step": spoilt, "why": why, "scenes": [scenes.ids[i] for i, _ in keys]}))
            raise ValueError(f"step {spoilt}: {why}; stopped before the weights changed, the last "
                             f"checkpoint is from before; the scenes: {args.out}/bad_step.json")
        if args.clip:
            torch.nn.utils.clip_grads_with_norm_(decayed + plain, args.clip, norm)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        models.ema_update(teacher, student, values["momentum"])

        # -- what is said and kept of it
        if logging and rank == 0:
            (std, eff), seconds = losses.collapse(features), time.perf_counter() - clock
            low = (low + 1) * (step > round(args.warmup * total) and (std < 0.05 or eff < 2))
            if low == 10:                                              # lines of the log in a row
                say(f"step {step + 1}: the teacher's features collapse: std {std:.3f} of 1, "
                    f"effective rank {eff:.1f}; lower --lr or raise --teacher-tau, --batch-size")
            memory = (torch.cuda.max_memory_allocated() if cuda else
                      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)     # KiB on Linux
            row = {"step": step + 1, "epoch": (step + 1) / per_epoch,
                   **dict(zip(("loss", *parts), means.tolist())), **values,
                   "gradient_norm": float(norm), "feature_std": std, "effective_rank": eff,
                   "images_per_s": scenes.views * args.batch_size * (step + 1 - since) / seconds,
                   "data_wait": waited / seconds, "peak_memory_gb": memory / 1e9}
            with data.named(log, "not written", "its folder is gone"), log.open("a") as file:
                file.write(json.dumps({k: round(v, 6) for k, v in row.items()}) + "\n")
            if args.tensorboard:
                for name, value in row.items():
                    board.add_scalar(name, value, step + 1)
                board.flush()
            bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['images_per_s']:.0f} images/s")
            clock, waited, since = time.perf_counter(), 0.0, step + 1
        if (saving or stopping) and rank == 0:
            save(f"{args.out}/backbone.pt", models.export_backbone(teacher.backbone))
            save(ckpt, {"step": step + 1, "flags": flags, "world": world}
                 | {name: part.state_dict() for name, part in kept.items()}, older)
        if stopping:
            run = f"torchrun --nproc-per-node {locals_}" if world > 1 else "python"
            say(f"stopped at step {step + 1}, saved; to go on:\n{run} "
                f"{shlex.join([a for a in sys.argv if a != '--resume'])} --resume")
            break
    else:
        tree = os.path.isdir(f"{root}/{args.modality}")
        say(f"{args.out}: config.json log.jsonl last.pt backbone.pt at step {max(start, stop)}\n"
            f"next: python probe.py --ckpt {args.out}/backbone.pt"
            + (f" --data {root}" if tree else " --task ... --data ...  (labelled images: --help)"))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(asked=listen())
    except (ValueError, OSError) as error:
        sys.exit(f"pretrain.py: error: {data.plainly(error)}")
