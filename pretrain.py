"""Pretraining, one process or many, CPU or CUDA, the same file.  [reading time: 10 minutes]

    torchrun pretrain.py --modality s1                        toy world, small net, CPU: 4 minutes
    torchrun pretrain.py --modality s2c --data DIR --init dinov2_vits14_pretrain.pth     one GPU
    torchrun --nproc-per-node 8 pretrain.py --modality s2c --data DIR ...                eight

SoftCon: the student sees two seasons of a scene, with blocks masked, and for each must find the
teacher's embedding of the other season among those of all scenes of the batch; how similar it may
be to the others follows from the scenes' land-cover labels.  The teacher, an average of past
students, sees everything and gets no gradient.

All randomness is a function of (--seed, step): data order, seasons, crops, masks.  So a resumed run
repeats the undisturbed one, and W ranks see, together, what one rank would see.
"""
import argparse
import copy
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import losses
import model as models

TOY = dict(arch="resnet18", img_size=32, patch_size=4, hidden=512, epochs=28, batch_size=32,
           lr=4e-3, momentum=0.9, soft_weight=0.5, crop_min=0.5, jitter=0.0, grey=0.0, holdout=0.4)
FULL = dict(arch="vit_small", img_size=224, patch_size=14, hidden=4096, epochs=100, batch_size=256,
            lr=1.5e-4, momentum=0.99, soft_weight=0.1, crop_min=0.2, jitter=0.4, grey=0.2,
            holdout=0.1)
FREE = {"data", "labels", "init", "max_steps", "out", "resume", "save_every", "log_every",
        "workers", "cache", "device"}


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)

    def group(title, *flags):
        add = parser.add_argument_group(title).add_argument
        for name, default, text, *more in flags:
            kind = {"type": type(default)} if default is not None else {}
            kind = {"action": "store_true"} if default is False else kind | dict(*more)
            add(name, default=default, help=text + preset(name, default), **kind)

    def preset(name, default):
        key = name[2:].replace("-", "_")
        if key in TOY:
            return f" (toy {TOY[key]}, with --data {FULL[key]})"
        return "" if default is None or default is False else f" ({default})"
    group("data",
          ("--modality", None, "s1 radar, s2c/s2a optical before/after atmospheric correction, rgb",
           {"choices": list(data.BANDS), "required": True}),
          ("--data", None, "folder: SSL4EO-S12 tree or EuroSAT; none: a toy world in ./toy"),
          ("--labels", None, "SSL4EO-S12-ML json, default ssl4eo_multilabel.json in --data;\n"
           "'classes': the class folders; without labels InfoNCE is left"),
          ("--holdout", None, "share of scenes, by hash of the name, kept for probe.py",
           {"type": float}),
          ("--img-size", None, "side of a crop in pixels", {"type": int}),
          ("--crop-min", None, "smallest share of the image that a crop covers", {"type": float}),
          ("--jitter", None, "strength of brightness and contrast; not for s1", {"type": float}),
          ("--grey", None, "share of views whose bands become their mean", {"type": float}),
          ("--cache", 4.0, "decode once and keep in memory if it fits in this many GB per rank"))
    group("model",
          ("--method", "softcon", "what to minimise", {"choices": ["softcon"]}),
          ("--arch", None, "backbone", {"choices": [*models.RESNETS, *models.VITS]}),
          ("--patch-size", None, "of a ViT; with a ResNet, the cell of the mask", {"type": int}),
          ("--hidden", None, "width of projector and predictor", {"type": int}),
          ("--init", None, "start from this checkpoint, e.g. DINOv2 or DINO"),
          ("--adapt", "random", "input layer when channels differ: random = fresh, "
           "as in the paper;\nmean = average of the file's, rgb = copied into B4, B3, B2",
           {"choices": ["random", "mean", "rgb"]}))
    group("loss",
          ("--tau", 0.2, "temperature of InfoNCE"),
          ("--soft-weight", None, "of the soft label term; 0 switches it off; "
           "see soft_share in the log", {"type": float}),
          ("--soft-form", "bce", "its formula, losses.soft_contrastive",
           {"choices": [*losses.SOFT_TAU]}),
          ("--soft-tau", None, "its temperature, default losses.SOFT_TAU", {"type": float}),
          ("--mask-ratio", 0.3, "share of the student's patches that are masked"))
    group("optimisation",
          ("--epochs", None, "passes over the scenes", {"type": int}),
          ("--max-steps", 0, "stop early; the schedules still span --epochs"),
          ("--batch-size", None, "scenes per step, over all ranks", {"type": int}),
          ("--accum", 1, "micro-batches per step; keys are those of one micro-batch"),
          ("--lr", None, "AdamW's, per 256 scenes; scaled by the batch", {"type": float}),
          ("--weight-decay", 0.05, "not on norms and biases"),
          ("--warmup", 0.1, "share of the steps in which lr climbs from 0"),
          ("--momentum", None, "of the teacher; climbs to 1 on a cosine", {"type": float}))
    group("run",
          ("--out", None, "folder (runs/METHOD_MODALITY)"),
          ("--resume", False, "go on from OUT/last.pt"),
          ("--save-every", 500, "steps between checkpoints"),
          ("--log-every", 10, "steps between lines of log.jsonl"),
          ("--workers", 2, "reading processes per rank"),
          ("--seed", 0, "of everything"),
          ("--device", "auto", "auto: CUDA if there is one", {"choices": ["auto", "cpu", "cuda"]}),
          ("--amp", "auto", "bf16 autocast; auto: on CUDA", {"choices": ["auto", "bf16", "off"]}))
    args = parser.parse_args(argv)
    for name, value in (FULL if args.data else TOY).items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    for name in ("img_size", "patch_size", "epochs", "batch_size", "accum", "log_every",
                 "save_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    args.out = args.out or f"runs/{args.method}_{args.modality}"
    return args


# ----------------------------------------------------------------------------- small pure functions


def schedule(step, total, start, end, warmup=0):
    """Value at step in [0, total): linear 0 to `start` in `warmup` steps, half cosine to `end`."""
    if step < warmup:
        return start * (step + 1) / warmup
    return end + (start - end) * (
        1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def batches(scenes, args, world, rank, start, stop):
    """Keys (scene, seed of its seasons) of this rank's micro-batches from step `start` to `stop`.

    Step t of an epoch takes the t-th slice of its permutation, whatever the number of ranks.
    """
    per_epoch, micro = len(scenes) // args.batch_size, args.batch_size // (world * args.accum)
    for step in range(start, stop):
        epoch, at = divmod(step, per_epoch)
        if at == 0 or step == start:
            order = np.random.default_rng([args.seed, epoch]).permutation(scenes)
        batch = order[at * args.batch_size:(at + 1) * args.batch_size]
        for rows in batch.reshape(args.accum, world, micro)[:, rank]:
            yield [(int(i), (args.seed, epoch, int(i))) for i in rows]


def draw_views(args, n, step, micro, rank, world):
    """Augmentation and masks of a micro-batch: drawn for all ranks' 2 x n views, cut to ours."""
    seed = int(np.random.SeedSequence([args.seed, step, micro]).generate_state(1)[0])
    generator = torch.Generator().manual_seed(seed)
    grid = (args.img_size // args.patch_size,) * 2

    def mine(x):
        return x.unflatten(0, (2, world, n))[:, rank].flatten(0, 1)
    views = data.draw_augmentation(2 * world * n, args.modality, generator, args.crop_min,
                                   args.jitter, args.grey)
    keep = losses.block_mask(2 * world * n, grid, args.mask_ratio, generator)
    return {k: mine(v) for k, v in views.items()}, mine(keep)


def softcon_step(student, teacher, views, keep, y, args):
    """Both directions of SoftCon on one micro-batch.

    views (2B,C,H,W) in [0,1], view-major; keep (2B,n) patches the student sees; y (2B,K) labels.
    Returns the loss, what goes to the log, and the teacher's features (2B,D).
    """
    vit = hasattr(teacher.backbone, "patch_size")
    amp = torch.autocast(views.device.type, torch.bfloat16, enabled=args.amp == "bf16")
    with amp:
        with torch.no_grad():
            k, features = teacher(views)                                         # (2B,256), (2B,D)
        masked = views if vit else losses.blank_patches(views, keep, args.patch_size)
        q, _ = student(masked, keep if vit else None)                            # (2B,256)
    (q1, q2), (k1, k2), (y1, y2) = q.chunk(2), k.chunk(2), y.chunk(2)
    arguments = args.tau, args.soft_weight, args.soft_form, args.soft_tau
    a = losses.softcon_loss(q1, k2, y1, y2, *arguments)
    b = losses.softcon_loss(q2, k1, y2, y1, *arguments)
    loss, hard, soft = ((u + v) / 2 for u, v in zip(a, b))
    return loss, {"info_nce": hard, "soft": soft, "q": q}, features


def save(path, state):
    """Write beside, flush to disk, rename: `path` is always a whole file."""
    part = f"{path}.part"
    with open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def commit():
    """Short git hash of this code, with + when files differ from it."""
    def git(*words):
        run = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True,
                             text=True)
        return run.stdout.strip()
    try:
        return (git("rev-parse", "--short", "HEAD") or "unknown") + "+" * bool(
            git("status", "-s", "-uno"))
    except OSError:
        return "unknown"


def main(argv=None):
    args = parse(argv)

    # --------------------------------------------------------------------- processes and device
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local, locals_ = (int(os.environ.get(k, d))
                      for k, d in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    cuda = args.device == "cuda" or args.device == "auto" and torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        raise ValueError(f"--device cuda: no CUDA device for local rank {local}")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    args.amp = args.amp if args.amp != "auto" else "bf16" if cuda else "off"
    if args.batch_size % (world * args.accum):
        raise ValueError(f"--batch-size {args.batch_size} does not divide into {world} rank(s) x "
                         f"--accum {args.accum}")
    if args.batch_size // args.accum < 2:
        raise ValueError(f"--batch-size {args.batch_size}: contrast needs at least 2 scenes "
                         f"at a time")
    grid = models.check_grid(args.img_size, args.img_size, args.patch_size)
    losses.block_mask(1, grid, args.mask_ratio)                     # refuses a ratio that cannot be
    if os.path.exists(f"{args.out}/last.pt") and not args.resume:
        raise ValueError(f"--out {args.out}: holds a run; --resume continues it, "
                         f"another --out keeps it")
    if args.resume and not os.path.exists(f"{args.out}/last.pt"):
        raise ValueError(f"--resume: no {args.out}/last.pt")
    if world > 1:
        torch.cuda.set_device(device) if cuda else torch.set_num_threads(
            max(1, os.cpu_count() // locals_))
        dist.init_process_group("nccl" if cuda else "gloo")
    say = tqdm.write if rank == 0 else lambda *_: None
    say(f"{' '.join(sys.argv)}\n{json.dumps(vars(args))}\npython {platform.python_version()}, "
        f"torch {torch.__version__}, commit {commit()}, {world} x {device.type}, amp {args.amp}")

    # ------------------------------------------------------------------------------------- data
    if not args.data and local == 0:
        data.make_toy("toy")
    if world > 1:
        dist.barrier()
    root = args.data or "toy"
    default = f"{root}/ssl4eo_multilabel.json"
    labels = args.labels or (default if os.path.exists(default) else None)
    scenes = data.open_data(root, args.modality, labels)
    if not labels:
        scenes.labels = [np.zeros_like(y) for y in scenes.labels]
    train = np.flatnonzero(~data.held_out(scenes.ids, args.holdout))
    n_images = sum(len(scenes.files[i]) for i in train)
    labelled = sum(int(scenes.labels[i].any(1).sum()) for i in train)
    say(f"data: {root}: {len(train)} of {len(scenes)} scenes to train on ({n_images} images of "
        f"{scenes.size} px, {labelled} labelled), the others held out")
    if not labelled and args.soft_weight:
        say("no labels: the soft term is 0, InfoNCE alone is trained")
    if len(train) < args.batch_size:
        raise ValueError(f"--batch-size {args.batch_size} exceeds the {len(train)} training scenes")
    if n_images * len(data.BANDS[args.modality]) * scenes.size ** 2 < args.cache * 1e9:
        scenes.preload(train, args.workers)
        args.workers = 0

    # ------------------------------------------------------------------------------------ model
    torch.manual_seed(args.seed)
    chans = len(data.BANDS[args.modality])
    weights = models.read_weights(args.init, in_chans=chans) if args.init else ({}, [])
    registers = weights[0].get("register_tokens")
    backbone = models.build(args.arch, chans, args.img_size, args.patch_size,
                            0 if registers is None else registers.shape[1])
    if args.init and not args.resume:
        models.load_pretrained(backbone, args.init, args.adapt, rank > 0, weights)
    student = models.Branch(backbone, args.hidden, predictor=True).to(device)
    student = student.to(memory_format=torch.channels_last)      # 4-d weights: convolutions like it
    teacher = copy.deepcopy(student).requires_grad_(False)
    teacher.predictor = torch.nn.Identity()
    ddp = DistributedDataParallel(student, gradient_as_bucket_view=True) if world > 1 else student

    # -------------------------------------------------------------------- optimiser, schedules
    decay = [p for p in student.parameters() if p.requires_grad and p.dim() > 1]
    plain = [p for p in student.parameters() if p.requires_grad and p.dim() < 2]
    optimiser = torch.optim.AdamW([{"params": decay, "weight_decay": args.weight_decay},
                                   {"params": plain, "weight_decay": 0}],
                                  betas=(0.9, 0.95), fused=True)
    per_epoch = len(train) // args.batch_size
    total = args.epochs * per_epoch
    stop = min(total, args.max_steps or total)
    lr = args.lr * args.batch_size / 256
    millions = sum(p.numel() for p in student.parameters()) / 1e6
    say(f"model: {args.arch}, student {millions:.1f} M parameters; {total} steps "
        f"of {args.batch_size} scenes ({world} x {args.accum} x "
        f"{args.batch_size // world // args.accum}), lr {lr:.2e}")

    # ----------------------------------------------------------------------------------- resume
    start, log = 0, Path(args.out, "log.jsonl")
    flags = {"scenes": len(train)} | {k: v for k, v in vars(args).items() if k not in FREE}
    if args.resume:
        try:
            state = torch.load(f"{args.out}/last.pt", map_location="cpu", weights_only=True)
            old, start = state["flags"], state["step"]
        except Exception as error:                            # torch.load raises half a dozen kinds
            raise ValueError(f"{args.out}/last.pt: not a whole checkpoint of a run "
                             f"({type(error).__name__})") from None
        for k in flags:
            if old.get(k) != flags[k]:
                raise ValueError(f"--{k.replace('_', '-')} {flags[k]}: the run in {args.out} has "
                                 f"{old.get(k)}")
        if start >= stop:
            raise ValueError(f"--resume: {args.out} is at step {start} already, the end is {stop}")
        student.load_state_dict(state["student"])
        teacher.load_state_dict(state["teacher"])
        optimiser.load_state_dict(state["optimiser"])
        say(f"resumed {args.out}/last.pt at step {start}")
    if rank == 0:
        os.makedirs(args.out, exist_ok=True)
        versions = {"python": platform.python_version(), "torch": torch.__version__,
                    "commit": commit()}
        Path(args.out, "config.json").write_text(
            json.dumps({"flags": vars(args), **versions, "world": world}, indent=1))
        lines = log.read_text().splitlines() if args.resume and log.exists() else []
        lines = [x for x in lines if x.endswith("}") and json.loads(x)["step"] <= start]
        log.write_text("".join(f"{x}\n" for x in lines))

    def checkpoint(step):
        if rank == 0:
            save(f"{args.out}/last.pt",
                 {"student": student.state_dict(), "teacher": teacher.state_dict(),
                  "optimiser": optimiser.state_dict(), "step": step, "flags": flags})
            save(f"{args.out}/backbone.pt", models.export_backbone(teacher.backbone))

    # ------------------------------------------------------------------------------------- loop
    loader = iter(DataLoader(scenes, batch_sampler=batches(train, args, world, rank, start, stop),
                             num_workers=args.workers, pin_memory=cuda))
    bar = tqdm(range(start, stop), args.method, stop, initial=start, disable=rank > 0)
    clock, waited, since = time.perf_counter(), 0.0, start
    for step in bar:
        now = {"lr": schedule(step, total, lr, 0, round(args.warmup * total)),
               "momentum": schedule(step, total, args.momentum, 1)}
        for g in optimiser.param_groups:
            g["lr"] = now["lr"]
        logging = (step + 1) % args.log_every == 0 or step + 1 == stop
        saving = (step + 1) % args.save_every == 0 or step + 1 == stop
        numbers = torch.zeros(3, device=device)
        for micro in range(args.accum):
            t = time.perf_counter()
            x, y = next(loader)                                  # (B,2,C,P,P) uint8, (B,2,K)
            waited += time.perf_counter() - t
            x, y = (v.to(device, non_blocking=True).transpose(0, 1).flatten(0, 1) for v in (x, y))
            p, keep = draw_views(args, len(x) // 2, step, micro, rank, world)
            views = data.augment(x, p, args.img_size)            # (2B,C,H,W) float in [0,1]
            views = views.contiguous(memory_format=torch.channels_last)
            ddp.require_backward_grad_sync = micro == args.accum - 1
            loss, parts, features = softcon_step(ddp, teacher, views, keep.to(device), y, args)
            if logging and micro == 0:
                q = parts.pop("q")
                now["soft_share"] = losses.soft_share(q, parts["info_nce"], parts["soft"],
                                                      args.soft_weight)
            (loss / args.accum).backward()
            numbers += torch.stack([loss, parts["info_nce"], parts["soft"]]).detach() / args.accum
        if logging or saving:
            norm = torch.nn.utils.get_total_norm([p.grad for p in decay + plain])
            if world > 1:
                dist.all_reduce(numbers)
            numbers = dict(zip(("loss", "info_nce", "soft"), (numbers / world).tolist()))
            if not math.isfinite(numbers["loss"] + float(norm)):
                raise ValueError(f"step {step}: loss {numbers['loss']}, gradient norm "
                                 f"{float(norm)}; stopped, the last checkpoint is from before")
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        models.ema_update(teacher, student, now["momentum"])
        if logging and rank == 0:
            std, eff = losses.collapse(features)
            seconds = time.perf_counter() - clock
            rate = 2 * args.batch_size * (step + 1 - since) / seconds
            memory = (torch.cuda.max_memory_allocated() if cuda else
                      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)     # KiB on Linux
            now = {"step": step + 1, "epoch": (step + 1) / per_epoch, **numbers, **now,
                   "gradient_norm": float(norm), "feature_std": std, "effective_rank": eff,
                   "images_per_s": rate, "data_wait": waited / seconds,
                   "peak_memory_gb": memory / 1e9}
            with log.open("a") as file:
                file.write(json.dumps({k: round(v, 6) for k, v in now.items()}) + "\n")
            bar.set_postfix_str(f"loss {numbers['loss']:.3f}, {rate:.0f} images/s")
            clock, waited, since = time.perf_counter(), 0.0, step + 1
        if saving:
            checkpoint(step + 1)
    say(f"{args.out}: config.json log.jsonl last.pt backbone.pt at step {stop}\n"
        f"next: python probe.py --ckpt {args.out}/backbone.pt"
        + (f" --data {args.data}" if args.data else ""))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"pretrain.py: error: {str(error).strip().splitlines()[-1]}")
