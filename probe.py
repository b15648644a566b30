"""What did the backbone learn?  Frozen features, one linear head.  [reading time: 14 minutes]

    python probe.py --ckpt runs/softcon_s1/backbone.pt                      toy world, multi-label
    python probe.py --ckpt backbone.pt --data DIR --task eurosat --seeds 5  EuroSAT, 10 classes
    python probe.py --ckpt a.pt b.pt --data DIR --task bigearthnet --lists train.csv test.csv

Three rows, by the same head on the same test images: the checkpoint, its architecture with random
weights, and the floor, mean and deviation of each band.  The backbone never trains: an image
becomes a row of features, once.  The last line is a JSON object, values 0 to 1.

[1] Oquab et al. 2023, DINOv2, B.3: many linear heads    [2] Caron et al. 2021, DINO: neighbours
[3] SSL4EO-S12, linear_BE_moco.py, linear_EU_moco.py; FG-MAE, linear_BE_s1_mae.py
"""
import argparse
import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import model as models

# ---------------------------------------------------------------------------------------- features

# a ViT's row: CLS of its last 4 blocks, mean patch token of the last; a head takes columns a*D:b*D
FEATURES = {"cls": (3, 4), "cls+mean": (3, 5), "4cls": (0, 4), "4cls+mean": (0, 5), "mean": (4, 5)}


def describe(net, x):
    """(B,C,H,W) -> (B,5D) of a ViT, laid out as FEATURES says; pooled (B,D) of a ResNet."""
    if not hasattr(net, "last_blocks"):
        return net(x)
    blocks = net.last_blocks(x, 4)
    return torch.cat([cls for cls, _ in blocks] + [blocks[-1][1].mean(1)], 1)


class Floor(torch.nn.Module):
    """(B,C,H,W) -> (B,2C): mean and deviation of each band, for which nobody needs a network."""

    def forward(self, x):
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)


def look(x, size, centre=1.0, crops=None):
    """uint8 (B,C,P,P) -> float (B,C,size,size) in [0,1]: the central share `centre` of each side,
    resized (size None: not); or where `crops` (data.draw_crops) looks."""
    if crops:
        return data.crop(x, crops, size or x.shape[-1])
    rim = round(x.shape[-1] * (1 - centre) / 2)
    x = x[..., rim:x.shape[-2] - rim, rim:x.shape[-1] - rim].float() / 255
    return x if size in (None, x.shape[-1]) else F.interpolate(x, (size, size), mode="bilinear",
                                                               antialias=True)


def cached(folder, nets, images, sizes, view):
    """A file for the features of each net, named by all that made them: code, images, weights."""
    base = hashlib.sha256(images.scenes.modality.encode() + Path(data.__file__).read_bytes() +
                          Path(models.__file__).read_bytes())
    for path in (Path(images.scenes.files[i][s]) for i, s in images.pairs):
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            base.update(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns} ".encode())
    for net, size in zip(nets, sizes):
        digest = hashlib.sha256(f"{base.hexdigest()} {type(net)} {size} {view}".encode())
        for name, v in net.state_dict().items():
            digest.update(name.encode() + v.cpu().numpy().tobytes())
        yield f"{folder}/{digest.hexdigest()[:32]}.npy"


@torch.no_grad()
def extract(nets, images, sizes, device, batch_size=64, workers=0, cache=None, centre=1.0, draw=0,
            area=1.0):
    """One pass over `images` -> the features of each net, float16 (n,D or 5D).

    Pixels as in training, resized to sizes[k] (None: not), of the central share `centre` of each
    side; draw > 0: of that random crop of `area` or more of the image, mirrored or not [3].  What
    the folder `cache` holds is not computed again; a kill leaves whole files there or none.
    """
    view = centre, draw, area
    paths = [*cached(cache, nets, images, sizes, view)] if cache else [""] * len(nets)
    out = [np.load(p) if os.path.exists(p) else [] for p in paths]
    todo = [k for k, rows in enumerate(out) if not len(rows)]
    g = torch.Generator().manual_seed(draw)
    loader = DataLoader(images, batch_size, num_workers=workers) if todo else ()
    for x, _, _ in tqdm(loader, f"draw {draw}" if draw else "features", leave=False):
        x, crops = x.to(device), data.draw_crops(len(x), g, area) | {
            "flip_y": torch.ones(len(x))} if draw else None                    # [3] mirror sideways
        for k in todo:                                                         # (B,C,P,P)
            z = look(x, sizes[k], centre, crops)
            out[k].append(describe(nets[k].eval().to(device), z).half().cpu().numpy())
    for k in todo:
        out[k] = np.concatenate(out[k])
        if not np.isfinite(out[k]).all():
            raise ValueError("features are not finite: NaN in the weights, or beyond float16")
        if cache:
            os.makedirs(cache, exist_ok=True)
            with open(f"{paths[k]}.part{os.getpid()}", "wb") as file:
                np.save(file, out[k])
                os.fsync(file.fileno())
            os.replace(file.name, paths[k])
    return out


def show(folder, net, images, size):
    """A PNG of each image: its colours beside the last patch tokens of a ViT, whose three principal
    components over all these images are red, green and blue."""
    import imagecodecs
    x = torch.stack([torch.from_numpy(x) for x, _, _ in images])               # (n,C,P,P)
    with torch.no_grad():
        tokens = net.eval().cpu().last_blocks(look(x, size), 1)[0][1].flatten(0, 1)     # (nN,D)
    tokens -= tokens.mean(0)
    pca = tokens @ torch.linalg.svd(tokens, full_matrices=False)[2][:3].T      # (nN,3)
    low, high = torch.quantile(pca, torch.tensor([0.02, 0.98]), dim=0)
    pca = ((pca - low) / (high - low)).clamp(0, 1).view(len(x), size // net.patch_size, -1, 3)
    pca = F.interpolate(255 * pca.permute(0, 3, 1, 2), x.shape[-2:]).byte()    # (n,3,P,P)
    both = torch.cat([x[:, data.COLOURS[images.scenes.modality]], pca], 3).permute(0, 2, 3, 1)
    os.makedirs(folder, exist_ok=True)
    for (i, s), picture in zip(images.pairs, both.contiguous().numpy()):
        imagecodecs.imwrite(f"{folder}/{images.scenes.ids[i]}_{s}.png", picture)
    print(f"{folder}: {len(x)} pictures")


# ------------------------------------------------------------------------------------------- heads

PENALTIES = np.logspace(-6, 2, 17)                            # on the mean loss of a training row


def folds(group):
    """(n,) fold 0..4 of each row; rows of one group, the seasons of a scene, stay together."""
    fold = np.unique(group, return_inverse=True)[1] % 5
    if fold.max() < 1:
        raise ValueError("the head needs training images of at least two scenes")
    return fold


def validated(fit, x, y, x_test, group):
    """Scores (n_test,K) of `fit` with the penalty whose squared error in 5-fold cross-validation is
    smallest.  fit(x (n,D), y (n,K) multi-hot, at (m,D)) -> (penalties, m, K)."""
    fold = folds(group)
    errors = sum(((fit(x[fold != f], y[fold != f], x[fold == f]) - y[fold == f]) ** 2)
                 .sum((1, 2)) for f in range(min(5, fold.max() + 1)))
    return fit(x, y, x_test)[int(np.argmin(errors))]


def ridge(x, y, at):
    """Linear maps of least squared error + penalty |W|^2 for all PENALTIES, closed form, float64:
    one eigendecomposition serves all."""
    (x, at), offset = standardise(x, at), y.mean(0)
    wide = x.shape[1] > len(x)                         # then the smaller x x^T has all there is
    values, vectors = np.linalg.eigh(x @ x.T if wide else x.T @ x)             # (D,), (D,D)
    vectors = x.T @ vectors / np.sqrt(values.clip(1e-9 * values[-1])) if wide else vectors
    left, right = at @ vectors, vectors.T @ (x.T @ (y - offset))               # (m,D), (D,K)
    return np.stack([left / (values + p * len(x)) @ right + offset for p in PENALTIES])


def logistic(x, y, at, multi):
    """Probabilities by least log loss (softmax; multi: sigmoids) + penalty |W|^2 / 2, for penalties
    from 1 down to 1e-4: LBFGS in float64, each from where the last ended."""
    x, at, y = (torch.from_numpy(v).double() for v in (*standardise(x, at), y))
    W, b = (torch.zeros(n, y.shape[1], dtype=y.dtype, requires_grad=True) for n in (x.shape[1], 1))
    loss, activate = ((F.binary_cross_entropy_with_logits, torch.sigmoid) if multi else
                      (F.cross_entropy, partial(torch.softmax, dim=1)))
    out = []
    for p in PENALTIES[12:3:-2]:
        optimiser = torch.optim.LBFGS([W, b], max_iter=200, tolerance_grad=1e-4,
                                      tolerance_change=1e-6, line_search_fn="strong_wolfe")

        def closure():
            value = loss(x @ W + b, y) * (y.shape[1] if multi else 1) + p / 2 * W.square().sum()
            optimiser.zero_grad()
            value.backward()
            return value
        optimiser.step(closure)
        out.append(activate(at @ W + b).detach().numpy())
    return np.stack(out)


def standardise(x, *others):
    mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64) + 1e-8
    return [(v - mean) / std for v in (x, *others)]


def knn(x, y, x_test, k=20, tau=0.07):
    """The k training rows most alike vote, each with exp(cosine / tau) [2]."""
    x, x_test, y = (torch.from_numpy(v).float() for v in (x, x_test, y))
    near = [(rows @ F.normalize(x).T).topk(min(k, len(x)))                     # 2 x (m,k)
            for rows in F.normalize(x_test).split(1024)]
    return torch.cat([(((c - 1) / tau).exp()[..., None] * y[at]).sum(1) for c, at in near]).numpy()


def sgd(x, y, use, rates, multi, steps, seed=0, batch=128):
    """H linear heads at once: x (n,D), y (n,K), use (H,D) 0 or 1, rates (H,) -> weights (D,H,K).

    Head h sees features use[h], at rate rates[h] * batch / 256, momentum 0.9, cosine to 0, by the
    loss of [1] or (multi) [3].  One product (B,D) x (D,HK) serves all; no gradient mixes heads.
    """
    g, (n, K), use = torch.Generator().manual_seed(seed), y.shape, use.T[..., None]   # (D,H,1)
    W, momentum = 0.01 * torch.randn(x.shape[1], 1, K, generator=g) * use, 0
    order = [torch.randperm(n, generator=g) for _ in range(steps * batch // n + 1)]
    for step, rows in enumerate(torch.cat(order).split(batch)[:steps]):
        z = (x[rows] @ W.flatten(1)).unflatten(1, W.shape[1:])                 # (B,H,K)
        z = (z.sigmoid() if multi else z.softmax(2)) - y[rows, None]
        z /= len(rows) * (K if multi else 1)                                   # d loss / d z
        momentum = 0.9 * momentum + use * (x[rows].T @ z.flatten(1)).unflatten(1, z.shape[1:])
        W = W - momentum * rates[:, None] * (batch / 512 * (1 + np.cos(np.pi * step / steps)))
    return W


LRS = [a * 10.0 ** e for e in range(-5, -1) for a in (1, 2, 5)] + [0.1]         # 13 [1]


def linear(x, y, x_test, group, multi, metric, heads, dim, steps, seed):
    """Of heads [(feature, rate), ...] on standardised features the best: scores, [*head, value].

    dim: D of a ViT, else None.  Several train on 4 folds; the fifth, never the test set, chooses.
    """
    use, rates = torch.ones(len(heads), x.shape[1] + 1), torch.tensor([rate for _, rate in heads])
    for row, (name, _) in zip(use, heads if dim else ()):
        row[:FEATURES[name][0] * dim] = row[FEATURES[name][1] * dim:-1] = 0
    x, x_test, y = (torch.from_numpy(v).float() for v in (*standardise(x, x_test), y))
    x, x_test = (F.pad(v, (0, 1), value=1) for v in (x, x_test))
    out = torch.from_numpy((folds(group) == 0) & (len(heads) > 1))
    W = sgd(x[~out], y[~out], use, rates, multi, steps, seed)
    values = [float(metric((x[out] @ w).numpy(), y[out].numpy())) for w in W.unbind(1) if out.any()]
    h = int(np.argmax(values)) if values else 0
    return (x_test @ W[:, h]).numpy(), [*heads[h], *values[h:h + 1]]


# ------------------------------------------------------------------------------- metrics and splits


def average_precision(scores, targets, average="micro"):
    """sum_n (R_n - R_(n-1)) P_n over distinct thresholds, as scikit-learn defines it.

    scores, targets (N,C).  micro pools all entries; macro is the mean over classes with a positive
    (one without has no recall; scikit-learn counts it as 0).
    """
    scores, targets = np.asarray(scores), np.asarray(targets).astype(bool)
    values, shape = [], (-1, 1 if average == "micro" else scores.shape[1])
    for s, t in zip(scores.reshape(shape).T, targets.reshape(shape).T):
        if t.any():
            order = np.argsort(-s, kind="stable")
            last = np.flatnonzero(np.append(np.diff(s[order]) != 0, True))     # end of each tie
            hits = np.cumsum(t[order])[last]
            values.append(np.sum(np.diff(hits, prepend=0) / hits[-1] * hits / (last + 1)))
    return float(np.mean(values)) if values else 0.0


def bootstrap(metric, rows, y, draws):
    """95 % intervals [low, high] of each row's metric and of its gain over the first row's, over
    `draws` resamplings of the test images, the same for all; rows: scores (n,K)."""
    picks = np.random.default_rng(0).integers(0, len(y), (draws, len(y)))
    v = np.array([[metric(s[p], y[p]) for p in picks] for s in rows])
    return [np.quantile(x, (0.025, 0.975), 1).T.round(5).tolist() for x in (v, v - v[0])]


def split(scenes, task, seed, train_frac, holdout, parts=None, replace=False):
    """Images for training and testing: two lists of (scene, season).

    ssl4eo: only scenes that pretraining held out take part, half of them to train the head, half to
    test it: on its own training scenes a network remembers what it would not know of others.
    Unlabelled images are left out.  parts: two lists of scenes instead.  Of either, train_frac of
    the training images are drawn, as [3] do with `replace`.  Otherwise: train_frac of each class.
    """
    rng = np.random.default_rng(seed)
    if task == "ssl4eo":
        out, half = (data.held_out(scenes.ids, f) for f in (holdout, holdout / 2))
        pairs = [(i, s) for i in np.flatnonzero(out) for s in range(len(scenes.files[i]))]
        pairs = [(i, s) for i, s in pairs if scenes.labels[i][s].any()]
        train, test = ([p for p in pairs if half[p[0]] == side] for side in (False, True))
    elif parts:
        train, test = ([(i, 0) for i in part] for part in parts)
    else:
        rows = [rng.permutation(np.flatnonzero(k)) for k in np.concatenate(scenes.labels).T]
        cut = [round(train_frac * len(r)) for r in rows]
        train = [(i, 0) for r, c in zip(rows, cut) for i in r[:c]]
        test = [(i, 0) for r, c in zip(rows, cut) for i in r[c:]]
    if parts or task == "ssl4eo":
        keep = (rng.choice(len(train), int(train_frac * len(train))) if replace else
                rng.permutation(len(train))[:round(train_frac * len(train))])
        train = [train[j] for j in sorted(keep)]
    if not train or not test:
        raise ValueError(f"split leaves {len(train)} training and {len(test)} test images")
    if np.any([scenes.labels[i][s] for i, s in train], 0).sum() < 2:
        raise ValueError(f"the {len(train)} training images are of a single class")
    return train, test


def run_flags(path):
    """img_size, holdout and labels of the run whose config.json it is, as far as they are there."""
    if not path.exists():
        print(f"{path}: not there; --img-size and --holdout of the run are not known")
        return {}
    try:
        flags, kinds = json.loads(data.read_text(path)).get("flags", {}), {
            "img_size": int, "holdout": float, "labels": str}
        return {k: kind(flags[k]) for k, kind in kinds.items() if k in flags}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a run's config.json ({error})") from None


TASKS = {"ssl4eo": (data.SSL4EO, "s1 s2c s2a"), "bigearthnet": (data.BigEarthNet, "s1 s2a s2c"),
         "eurosat": (data.EuroSAT, "s1 s2c rgb"), "folder": (data.Folder, "s1 s2c s2a rgb")}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--ckpt", required=True, nargs="+", help="of a run, or released; several: compare")
    flag("--task", choices=list(TASKS), default="ssl4eo", help="what the labels are")
    flag("--data", help="folder; default: the toy world")
    flag("--labels", help="SSL4EO-S12-ML json; default: ssl4eo_multilabel.json in --data")
    flag("--modality", choices=list(data.BANDS), help="default: by the checkpoint's channels")
    flag("--img-size", type=int, help="default: the run's config.json, the position table, or 224")
    flag("--lists", nargs=2, help="files of names to train on, to test on")
    flag("--exclude", nargs="*", default=[], help="lists to leave out of --lists: snow, cloud")
    flag("--drop-unlabelled", action="store_true", help="leave out images of no class, too")
    flag("--skip-missing", action="store_true", help="go on without listed images that are absent")
    flag("--train-frac", type=float, help="share to train on; default 1, folders 0.7 of each class")
    flag("--replace", action="store_true", help="draw that share with replacement, as published")
    flag("--head", choices=["ridge", "logistic", "knn", "linear", "grid"], default="ridge")
    flag("--feature", choices=list(FEATURES), default="cls", help="of a ViT; 4: last 4 blocks")
    flag("--lr", type=float, default=0.1, help="of --head linear, for 256 rows")
    flag("--steps", type=int, default=12500, help="of --head linear and grid, 128 rows each")
    flag("--holdout", type=float, help="share of scenes to use; default: the run's, or 0.1")
    flag("--seeds", type=int, default=1, help="random backbones, and draws of the training part")
    flag("--seed", type=int, default=0, help="the first of them")
    flag("--cache", help="folder that keeps features")
    flag("--centre", type=float, default=1.0, help="look at this share of each side; published: "
         "0.875 (resize 256, crop 224)")
    flag("--draws", type=int, default=0, help="train the head on so many random crops, mirrored or "
         "not, of each image instead, as published")
    flag("--area", type=float, default=0.8, help="their least share of the image; EuroSAT: 0.08")
    flag("--show", help="folder for pictures of 8 test images: colours, PCA of a ViT's patches")
    flag("--bootstrap", type=int, default=200, help="resamplings for 95 %% intervals; 0: none")
    flag("--classes", action="store_true", help="a line a class; accuracy: with confusions")
    flag("--device", default="auto", choices=["auto", "cpu", "cuda"])
    flag("--workers", type=int, default=2, help="reading processes")
    args = parser.parse_args(argv)

    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    if args.device == "cuda" != device:
        raise ValueError("--device cuda: no CUDA device")
    for name, low, high in (("train-frac", 1e-6, 1), ("holdout", 0, 1), ("centre", 0.1, 1),
                            ("area", 0.01, 1), ("draws", 0, 1000), ("seeds", 1, 1000),
                            ("seed", 0, 2 ** 32), ("img-size", 1, 4096),
                            ("steps", 1, 10 ** 8), ("bootstrap", 0, 10 ** 6)):
        value = getattr(args, name.replace("-", "_"))
        if value is not None and not low <= value <= high:
            parser.error(f"--{name} {value}: must lie in {low} to {high}")
    nets, sizes, holdout, modality = [Floor()], [None], args.holdout, args.modality
    for path in args.ckpt:
        net = models.build_from(path, len(data.BANDS.get(args.modality, ())))
        config = run_flags(Path(path).parent / "config.json")
        kept = config.get("holdout", 0.1 if args.holdout is None else 1)
        if args.holdout is not None and args.holdout > kept:
            raise ValueError(f"--holdout {args.holdout}: the run held out {kept}, saw the others")
        holdout = kept if holdout is None else min(holdout, kept)      # smaller: a part of larger
        if args.task != "ssl4eo" and config.get("labels") == "classes":
            raise ValueError(f"{path}: was trained on the classes that this task tests")
        modality = modality or {len(b): m for m, b in data.BANDS.items()}.get(net.in_chans)
        bands = len(data.BANDS.get(modality, ()))
        if bands != net.in_chans or modality not in TASKS[args.task][1].split():
            raise ValueError(f"{path}: {net.in_chans} channels, modality {modality} has {bands}, "
                             f"{args.task} takes {TASKS[args.task][1]}")
        nets.append(net)
        sizes.append(args.img_size or config.get("img_size") or getattr(net, "img_size", 224))
    if args.task == "bigearthnet" and not args.lists or args.task == "ssl4eo" and args.lists:
        raise ValueError("--lists: bigearthnet needs two, ssl4eo tests on scenes held out")
    if args.task != "ssl4eo" and not args.data:
        raise ValueError(f"--task {args.task}: needs --data")
    if args.show and not hasattr(nets[1], "last_blocks"):
        raise ValueError("--show: a ResNet has no patch tokens")
    root, parts = args.data or data.make_toy("toy"), None
    if os.path.exists(f"{root}/images.uint8"):
        raise ValueError(f"{root}: packed; probe the folder that it was packed from")
    labels = {"labels": args.labels or f"{root}/ssl4eo_multilabel.json"}
    scenes = TASKS[args.task][0](root, modality=modality, **labels if args.task == "ssl4eo" else {})
    if args.lists:
        at = {name: i for i, name in enumerate(scenes.ids)}
        out = {at[n] for f in args.exclude for n in data.listed(f, at, True)}
        out |= {i for i, y in enumerate(scenes.labels) if args.drop_unlabelled and not y.any()}
        parts = [[at[n] for n in data.listed(f, at, args.skip_missing) if at[n] not in out]
                 for f in args.lists]
        if len(at) < len(scenes) or {*parts[0]} & {*parts[1]}:
            raise ValueError("--lists: images that are in both, or two of one name in --data")
    frac = args.train_frac or (0.7 if not parts and args.task != "ssl4eo" else 1.0)
    print(f"{' '.join(args.ckpt)}: {type(net).__name__} {net.embed_dim}, {modality}, {sizes[1]} px "
          f"{args.task} {root}: {len(scenes)} scenes, {len(scenes.classes)} classes")

    seeds = range(args.seed, args.seed + args.seeds)
    for seed in seeds:
        torch.manual_seed(seed)
        nets.append(models.build(**nets[1].spec))
        sizes.append(sizes[1])
    splits = [split(scenes, args.task, seed, frac, holdout, parts, args.replace) for seed in seeds]
    pairs = sorted({p for train, test in splits for p in train + test})
    drawn = sorted({p for train, _ in splits for p in train})
    views = [extract(nets, data.Images(scenes, drawn if draw else pairs), sizes, device, 64,
                     args.workers, args.cache, args.centre, draw, args.area if draw else 1.0)
             for draw in range(args.draws + 1)]
    features, at, of = [np.concatenate(v) for v in zip(*views)], {}, pairs + args.draws * drawn
    y, scene = np.stack([scenes.labels[i][s] for i, s in of]), np.array([i for i, _ in of])
    for j, pair in enumerate(of):
        at.setdefault(pair, []).append(j)                        # rows: the image itself, its draws
    if args.show:
        first = list({i: (i, s) for i, s in splits[0][1]}.values())[:8]           # of 8 scenes
        show(args.show, nets[1], data.Images(scenes, first), sizes[1])

    # ------------------------------------------------------------------------- heads and rows
    multi, n = args.task in ("ssl4eo", "bigearthnet"), len(args.ckpt)
    metrics = {"accuracy": lambda s, t: np.mean(s.argmax(1) == t.argmax(1))} if not multi else {
        "micro_map": average_precision, "macro_map": lambda s, t: average_precision(s, t, "macro")}
    if args.task == "bigearthnet":                             # as published [3], and biased
        metrics["mean_of_256s"] = lambda s, t: np.mean(
            [average_precision(s[i:i + 256], t[i:i + 256]) for i in range(0, len(s), 256)])
    first, metric = next(iter(metrics.items()))
    names = [*(["checkpoint"] if n == 1 else args.ckpt), "random", "stats"]
    table = {name: {m: [] for m in metrics} for name in names}
    chosen, scores = {name: [] for name in names}, {}
    for k, (seed, parts) in enumerate(zip(seeds, splits)):
        train, test = [j for p in parts[0] for j in at[p][args.draws > 0:]], [
            at[p][0] for p in parts[1]]
        for name, j in zip(names, [*range(1, n + 1), n + 1 + k, 0]):
            x, dim = features[j], nets[j].embed_dim if hasattr(nets[j], "last_blocks") else None
            if args.head in ("linear", "grid"):
                heads = [(args.feature, args.lr)] if args.head == "linear" else [
                    (f, lr) for f in FEATURES for lr in LRS if f == "cls" or dim and f != "mean"]
                scores[name], choice = linear(x[train], y[train], x[test], scene[train], multi,
                                              metric, heads, dim, args.steps, seed)
                chosen[name].append(choice)
            else:
                x = x[:, slice(*(dim * e for e in FEATURES[args.feature]))] if dim else x
                fit = {"ridge": ridge, "logistic": partial(logistic, multi=multi)}.get(args.head)
                scores[name] = validated(fit, x[train], y[train], x[test], scene[train]) if fit \
                    else knn(x[train], y[train], x[test])
            for m, function in metrics.items():
                table[name][m].append(round(float(function(scores[name], y[test])), 5))
    empty, width = int((~y[test].any(0)).sum()), max(12, *map(len, names))
    print(f"{len(parts[0])} training, {len(test)} test images ({empty} classes have none: not in "
          f"macro), mean ± deviation over {args.seeds} seed(s)\n{'':{width}}",
          *(f"{m:>17}" for m in metrics))
    for name, row in table.items():
        print(f"{name:{width}}", *(f"{np.mean(v):9.4f} ± {np.std(v):.4f}" for v in row.values()),
              *chosen[name])                       # --head grid: feature, rate, validation value
    value, *_, random, stats = (round(float(np.mean(v[first])), 5) for v in table.values())
    out = {"task": args.task, "metric": first, "n_train": len(parts[0]), "n_test": len(test),
           "value": value, "random": random, "stats": stats, "seeds": args.seeds, "head": args.head,
           "std": round(float(np.std(table[names[0]][first])), 5), "chosen": chosen, "all": table,
           "empty_classes": empty, "ckpt": args.ckpt[0] if n == 1 else args.ckpt}
    if args.bootstrap:
        own, gain = bootstrap(metric, scores.values(), y[test], args.bootstrap)
        print(*(f"{name:{width}} {first}, 95 % of bootstraps: {a}, minus {names[0]}: {b}"
                for name, a, b in zip(names, own, gain)), sep="\n")
        out |= {"interval": dict(zip(names, own)), "difference": dict(zip(names, gain))}
    for k, name in enumerate(scenes.classes if args.classes else ()):  # the first row's, last seed
        mine, s = y[test][:, k] > 0, scores[names[0]]
        print(f"{name[:40]:40} {mine.sum():6}", round(average_precision(s[:, k], mine), 4) if multi
              else f"called {np.bincount(s[mine].argmax(1), minlength=s.shape[1])}")
    print(json.dumps(out))
    return out


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"probe.py: error: {data.plainly(error)}")
