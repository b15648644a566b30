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


def columns(net, feature):
    """The slice of describe's row that a head on `feature` sees; of a ResNet's: all."""
    width = net.embed_dim if hasattr(net, "last_blocks") else None
    return slice(*(width * k for k in FEATURES[feature])) if width else slice(None)


class Floor(torch.nn.Module):
    """(B,C,H,W) -> (B,2C): mean and deviation of each band, for which nobody needs a network."""
    size = None

    def forward(self, x):
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)


def look(x, size=None, centre=1.0):
    """uint8 (B,C,H,W) -> float (B,C,size,size) in [0,1]: the central share `centre` of each side,
    resized unless size is None."""
    rim = round(x.shape[-1] * (1 - centre) / 2)
    x = x[..., rim:x.shape[-2] - rim, rim:x.shape[-1] - rim].float() / 255
    size = size or x.shape[-1]
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True)


def cached(folder, nets, images, view):
    """A file for the features of each net, named by all that made them: code, images, weights."""
    base = hashlib.sha256(f"{images.scenes.modality} {view}".encode())
    paths = [images.scenes.files[i][s] for i, s in images.pairs]
    for path in map(Path, [__file__, data.__file__, models.__file__, *paths]):
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            base.update(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns} ".encode())
    for net in nets:
        digest = base.copy()
        digest.update(f"{type(net)} {net.size}".encode())
        for name, weight in net.state_dict().items():
            digest.update(name.encode() + weight.cpu().numpy().tobytes())
        yield f"{folder}/{digest.hexdigest()[:32]}.npy"


@torch.no_grad()
def extract(nets, images, device="cpu", workers=0, cache=None, centre=1.0, draw=0, area=1.0):
    """One pass over `images` -> {net: the rows that `describe` gives, float16 (n,D or 5D)}.

    A net sees the central share `centre` of each side at net.size pixels (None: as they are); draw
    1, 2, ...: instead a random crop of `area` or more of the image, mirrored or not, as [3].  What
    the folder `cache` holds is not computed again; a kill leaves whole files there or none.
    ValueError: features that are not finite.
    """
    view = (draw, area) if draw else (centre,)
    paths = dict(zip(nets, cached(cache, nets, images, view))) if cache else {}
    out = {net: np.load(path) for net, path in paths.items() if os.path.exists(path)}
    todo = {net: [] for net in nets if net not in out}
    g = torch.Generator().manual_seed(draw)
    loader = DataLoader(images, 64, num_workers=workers) if todo else ()
    for x, _, _ in tqdm(loader, f"features, draw {draw}", leave=False):
        x = x.to(device)                                                       # (B,C,H,W)
        crops = data.draw_crops(len(x), g, area) | {"flip_y": torch.ones(len(x))}      # [3]
        for net, rows in todo.items():
            z = data.crop(x, crops, net.size or x.shape[-1]) if draw else look(x, net.size, centre)
            rows.append(describe(net.eval().to(device), z).half().cpu().numpy())
    for net, rows in todo.items():
        out[net] = np.concatenate(rows)
        if not np.isfinite(out[net]).all():
            raise ValueError("features are not finite: NaN in the weights, or beyond float16")
        if cache:
            os.makedirs(cache, exist_ok=True)
            with open(f"{paths[net]}.part{os.getpid()}", "wb") as file:
                np.save(file, out[net])
                os.fsync(file.fileno())
            os.replace(file.name, paths[net])
    return out


@torch.no_grad()
def show(folder, net, images):
    """A PNG of each image: its colours beside the last patch tokens of a ViT, whose three principal
    components over all these images are red, green and blue."""
    import imagecodecs
    x, _, _ = next(iter(DataLoader(images, len(images))))                      # (n,C,H,W)
    tokens = net.eval().cpu().last_blocks(look(x, net.size), 1)[0][1].flatten(0, 1)     # (nN,D)
    pca = tokens @ torch.linalg.eigh(tokens.T.cov())[1][:, [-1, -2, -3]]       # (nN,3)
    low, high = torch.quantile(pca, torch.tensor([0.02, 0.98]), dim=0)
    pca = ((pca - low) / (high - low)).clamp(0, 1).view(len(x), net.size // net.patch_size, -1, 3)
    pca = F.interpolate(255 * pca.permute(0, 3, 1, 2), x.shape[-2:]).byte()    # (n,3,H,W)
    both = torch.cat([x[:, data.COLOURS[images.scenes.modality]], pca], 3).permute(0, 2, 3, 1)
    os.makedirs(folder, exist_ok=True)
    for (i, s), picture in zip(images.pairs, both.contiguous().numpy()):
        imagecodecs.imwrite(f"{folder}/{images.scenes.ids[i]}_{s}.png", picture)


# ------------------------------------------------------------------------------------------- heads

PENALTIES = np.logspace(-6, 2, 17)                            # on the mean loss of a training row


def validated(fit, x, y, x_test, scene):
    """Scores (m,L) of `fit` with the penalty of least squared error in 5-fold cross-validation, in
    which the rows of a scene (n,), 0, 1, ..., stay together: its seasons or draws.
    fit(x (n,D), y (n,L) multi-hot, x_test (m,D)) -> (penalties,m,L)."""
    fold, errors = scene % 5, 0
    for f in range(fold.max() + 1):
        out = fold == f
        errors += ((fit(x[~out], y[~out], x[out]) - y[out]) ** 2).sum((1, 2))
    return fit(x, y, x_test)[np.argmin(errors)]


def ridge(x, y, x_test):
    """Linear maps of least squared error + penalty |W|^2 for all PENALTIES, closed form, float64:
    one eigendecomposition serves all."""
    (x, x_test), offset = standardise(x, x_test), y.mean(0)
    wide = x.shape[1] > len(x)                         # then the smaller x x^T has all there is
    values, vectors = np.linalg.eigh(x @ x.T if wide else x.T @ x)             # (D,), (D,D)
    vectors = x.T @ vectors / np.sqrt(values.clip(1e-9 * values[-1])) if wide else vectors
    left, right = x_test @ vectors, vectors.T @ (x.T @ (y - offset))           # (m,D), (D,L)
    return np.stack([left / (values + p * len(x)) @ right + offset for p in PENALTIES])


def logistic(x, y, x_test, multi):
    """Probabilities by least log loss (softmax; multi: sigmoids) + penalty |W|^2 / 2, for penalties
    from 1 down to 1e-4: LBFGS in float64, each from where the last ended."""
    x, x_test, y = (torch.from_numpy(v).double() for v in (*standardise(x, x_test), y))
    W, b = (torch.zeros(n, y.shape[1], dtype=y.dtype, requires_grad=True) for n in (x.shape[1], 1))
    out = []
    for penalty in PENALTIES[12:3:-2]:
        optimiser = torch.optim.LBFGS([W, b], max_iter=200, tolerance_grad=1e-4,
                                      tolerance_change=1e-6, line_search_fn="strong_wolfe")

        def closure():
            z = x @ W + b                                                      # (n,L)
            loss = F.binary_cross_entropy_with_logits(z, y) * y.shape[1] if multi else (
                F.cross_entropy(z, y))
            loss = loss + penalty / 2 * W.square().sum()
            optimiser.zero_grad()
            loss.backward()
            return loss
        optimiser.step(closure)
        z = (x_test @ W + b).detach()
        out.append((z.sigmoid() if multi else z.softmax(1)).numpy())
    return np.stack(out)


def standardise(x, *others):
    """Each (n,D) minus x's mean, over x's deviation, column by column, float64."""
    mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64) + 1e-8
    return [(v - mean) / std for v in (x, *others)]


def knn(x, y, x_test, k=20, tau=0.07):
    """The k training rows most alike vote, each with exp(cosine / tau) [2] -> scores (m,L)."""
    x, x_test, y = (torch.from_numpy(v).float() for v in (x, x_test, y))
    near = [(rows @ F.normalize(x).T).topk(min(k, len(x)))                     # 2 x (m,k)
            for rows in F.normalize(x_test).split(1024)]
    return torch.cat([(((cosine - 1) / tau).exp()[..., None] * y[index]).sum(1)
                      for cosine, index in near]).numpy()


def sgd(x, y, use, rates, multi, steps, seed=0, batch=128):
    """H linear heads at once: x (n,D), y (n,L), use (H,D) 0 or 1, rates (H,) -> weights (D,H,L).

    Head h sees features use[h], at rate rates[h] * batch / 256, momentum 0.9, cosine to 0, by the
    loss of [1] or (multi) [3].  One product (B,D) x (D,HL) serves all; no gradient mixes heads.
    """
    g, (n, L), use = torch.Generator().manual_seed(seed), y.shape, use.T[..., None]   # (D,H,1)
    W, momentum = 0.01 * torch.randn(x.shape[1], 1, L, generator=g) * use, 0
    order = [torch.randperm(n, generator=g) for _ in range(steps * batch // n + 1)]
    for step, rows in enumerate(torch.cat(order).split(batch)[:steps]):
        z = (x[rows] @ W.flatten(1)).unflatten(1, W.shape[1:])                 # (B,H,L)
        z = (z.sigmoid() if multi else z.softmax(2)) - y[rows, None]
        z /= len(rows) * (L if multi else 1)                                   # d loss / d z
        momentum = 0.9 * momentum + use * (x[rows].T @ z.flatten(1)).unflatten(1, z.shape[1:])
        W = W - momentum * rates[:, None] * (batch / 512 * (1 + np.cos(np.pi * step / steps)))
    return W


GRID = [(feature, rate) for feature in [*FEATURES][:4] for rate in (             # 4 x 13 [1]
    *(a * 10.0 ** e for e in range(-5, -1) for a in (1, 2, 5)), 0.1)]


def linear(x, y, x_test, scene, multi, metric, heads, net, steps, seed):
    """Of heads [(feature, rate), ...] on net's standardised features the best: scores (m,L),
    [feature, rate, value].  Several train on 4 folds; the fifth, never the test set, chooses."""
    use, rates = torch.zeros(len(heads), x.shape[1]), torch.tensor([rate for _, rate in heads])
    for row, (feature, _) in zip(use, heads):
        row[columns(net, feature)] = 1
    x, x_test, y = (torch.from_numpy(v).float() for v in (*standardise(x, x_test), y))
    x, x_test, use = (F.pad(v, (0, 1), value=1) for v in (x, x_test, use))     # the bias
    out = torch.from_numpy((scene % 5 == 0) & (len(heads) > 1))
    W = sgd(x[~out], y[~out], use, rates, multi, steps, seed)                  # (D+1,H,L)
    values = [float(metric((x[out] @ w).numpy(), y[out].numpy())) for w in W.unbind(1) if out.any()]
    best = int(np.argmax(values)) if values else 0
    return (x_test @ W[:, best]).numpy(), [*heads[best], *values[best:best + 1]]


# ------------------------------------------------------------------------------- metrics and splits


def average_precision(scores, targets, average="micro"):
    """sum_n (R_n - R_(n-1)) P_n over distinct thresholds, as scikit-learn defines it, of scores and
    targets (N,L).  micro pools all entries; macro is the mean over classes with a positive (one
    without has no recall; scikit-learn counts it as 0)."""
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
    `draws` resamplings of the test images, the same for all; rows: scores (n,L)."""
    picks = np.random.default_rng(0).integers(0, len(y), (draws, len(y)))
    v = np.array([[metric(s[p], y[p]) for p in picks] for s in rows])
    return [np.quantile(x, (0.025, 0.975), 1).T.round(5).tolist() for x in (v, v - v[0])]


def split(scenes, task, seed, share, holdout, lists=None, replace=False):
    """Images (scene, season) to train and to test the head on: two lists.

    ssl4eo: labelled images of the scenes that pretraining held out, half of the scenes to train,
    half to test: on its own training scenes a network remembers what it would not know of others.
    lists: these two.  Of either, `share` of the training images are drawn (`replace`: as [3] do).
    Otherwise `share` of each class to train, the others to test.  ValueError: nothing to train or
    to test on, or a single class or scene to train on.
    """
    rng, train, test = np.random.default_rng(seed), [], []
    if task == "ssl4eo":
        out, half = (data.held_out(scenes.ids, fraction) for fraction in (holdout, holdout / 2))
        known = [(i, s) for i, s in scenes.pairs(np.flatnonzero(out)) if scenes.labels[i][s].any()]
        lists = [[image for image in known if half[image[0]] == side] for side in (False, True)]
    if lists:
        (train, test), n = lists, len(lists[0])
        keep = rng.choice(n, int(share * n)) if replace else rng.permutation(n)[:round(share * n)]
        train = [train[j] for j in sorted(keep)]
    for members in () if lists else np.concatenate(scenes.labels).T:
        order = [(i, 0) for i in rng.permutation(np.flatnonzero(members))]
        cut = round(share * len(order))
        train, test = train + order[:cut], test + order[cut:]
    if not train or not test:
        raise ValueError(f"split leaves {len(train)} training and {len(test)} test images")
    classes = np.any([scenes.labels[i][s] for i, s in train], 0)
    if classes.sum() < 2 or len({i for i, _ in train}) < 2:
        raise ValueError(f"the {len(train)} training images are of a single class or scene")
    return train, test


def run_flags(ckpt):
    """What is asked of the run that left `ckpt`, where its config.json is and says so."""
    path = Path(ckpt).parent / "config.json"
    kinds = {"img_size": int, "holdout": float, "labels": str, "data": str, "modality": str}
    try:
        flags = json.loads(data.read_text(path)).get("flags", {}) if path.exists() else {}
        return {name: kind(flags[name]) for name, kind in kinds.items() if name in flags}
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: not a run's config.json ({error})") from None


# ------------------------------------------------------------------------------- tasks and flags

MANY = {"micro_map": average_precision, "macro_map": partial(average_precision, average="macro")}
ONE = {"accuracy": lambda s, t: np.mean(s.argmax(1) == t.argmax(1))}
BIASED = {"mean_of_256s": lambda s, t: np.mean([                                # as published [3]
    average_precision(s[i:i + 256], t[i:i + 256]) for i in range(0, len(s), 256)])}
TASKS = {                # reader, modalities, metrics of scores and labels (n,L): the first chooses
    "ssl4eo": (data.SSL4EO, data.PRODUCTS, MANY), "folder": (data.Folder, [*data.BANDS], ONE),
    "bigearthnet": (data.BigEarthNet, ["s1", "s2a", "s2c"], MANY | BIASED),
    "eurosat": (data.EuroSAT, ["s1", "s2c", "rgb"], ONE)}
SWITCH = {"action": "store_true"}
DEVICES = ["cpu", "cuda"][:1 + torch.cuda.is_available()]
FLAGS = {                # name: default, help, (lowest, highest) or what argparse needs
    "ckpt": (None, "of a run, or released; several: compare", {"required": True, "nargs": "+"}),
    "task": ("ssl4eo", "what the labels are", {"choices": [*TASKS]}),
    "data": (None, "folder; none: the toy world", {}),
    "labels": (None, "SSL4EO-S12-ML json; none: ssl4eo_multilabel.json in --data", {}),
    "modality": (None, "none: the run's, or by the channels", {"choices": [*data.BANDS]}),
    "img-size": (None, "none: the run's config.json, the position table, or 224", (1, 4096)),
    "lists": (None, "files of names to train on, to test on", {"nargs": 2}),
    "exclude": ([], "lists to leave out of --lists: snow, cloud", {"nargs": "*"}),
    "drop-unlabelled": (False, "leave out images of no class, too", SWITCH),
    "skip-missing": (False, "go on without listed images that are absent", SWITCH),
    "train-frac": (None, "share to train on; none: 1, folders 0.7 of each class", (1e-6, 1.0)),
    "replace": (False, "draw that share with replacement, as published", SWITCH),
    "head": ("ridge", "what is fitted", {"choices": "ridge logistic knn linear grid".split()}),
    "feature": ("cls", "of a ViT; 4: last 4 blocks", {"choices": [*FEATURES]}),
    "lr": (0.1, "of --head linear, for 256 rows", (0.0, 1e6)),
    "steps": (12500, "of --head linear and grid, 128 rows each", (1, 10 ** 8)),
    "holdout": (None, "share of scenes to use; none: the run's, or 0.1", (0.0, 1.0)),
    "seeds": (1, "random backbones, and draws of the training part", (1, 1000)),
    "seed": (0, "the first of them", (0, 2 ** 32)),
    "cache": (None, "folder that keeps features", {}),
    "centre": (1.0, "share of each side to look at; published: 0.875 = 224 / 256", (0.1, 1.0)),
    "draws": (0, "train on so many random crops of an image instead, as published", (0, 1000)),
    "area": (0.8, "their least share of the image; EuroSAT: 0.08", (0.01, 1.0)),
    "show": (None, "folder for pictures of 8 test images: colours, PCA of a ViT's patches", {}),
    "bootstrap": (200, "resamplings for 95 %% intervals; 0: none", (0, 10 ** 6)),
    "classes": (False, "a line a class; accuracy: with confusions", SWITCH),
    "device": (DEVICES[-1], "CUDA if there is one", {"choices": DEVICES}),
    "workers": (2, "reading processes", (0, 1000))}


def main(argv=None):
    """A probe -> the JSON object of its last line.  ValueError, OSError: flags or files unfit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, (default, text, kind) in FLAGS.items():
        kind = {"type": type(kind[1])} if isinstance(kind, tuple) else kind
        text += f" ({default})" * bool(default)
        parser.add_argument(f"--{name}", default=default, help=text, **kind)
    args = parser.parse_args(argv)
    for name, (_, _, kind) in FLAGS.items():
        value = getattr(args, name.replace("-", "_"))
        if isinstance(kind, tuple) and value is not None and not kind[0] <= value <= kind[1]:
            parser.error(f"--{name} {value}: must lie in {kind[0]} to {kind[1]}")
    if args.task == "bigearthnet" and not args.lists or args.task == "ssl4eo" and args.lists:
        raise ValueError("--lists: bigearthnet needs two, ssl4eo tests on scenes held out")
    if args.task != "ssl4eo" and not args.data:
        raise ValueError(f"--task {args.task}: needs --data")
    if len({*args.ckpt}) < len(args.ckpt):
        raise ValueError("--ckpt: a file twice")
    reader, modalities, metrics = TASKS[args.task]
    multi, (key, metric) = metrics is not ONE, next(iter(metrics.items()))

    # ------------------------------------------------ networks: the checkpoints, random ones, floor
    nets = [models.build_from(path, len(data.BANDS.get(args.modality, ()))) for path in args.ckpt]
    runs = [run_flags(path) for path in args.ckpt]
    modality = args.modality or runs[0].get("modality") or {
        len(b): m for m, b in data.BANDS.items()}.get(nets[0].in_chans)
    holdout = min(r.get("holdout", 0.1) for r in runs) if args.holdout is None else args.holdout
    for path, net, run in zip(args.ckpt, nets, runs):
        bands = len(data.BANDS.get(modality, ()))
        if net.in_chans != bands or modality not in modalities:
            raise ValueError(f"{path}: {net.in_chans} channels, modality {modality} has {bands}, "
                             f"{args.task} takes {' '.join(modalities)}")
        if holdout > run.get("holdout", 1):
            raise ValueError(f"--holdout {holdout}: {path} held out {run['holdout']}, saw the rest")
        folders = {os.path.realpath(folder or "") for folder in (run.get("data"), args.data)}
        if run.get("labels") == "classes" and len(folders) == 1:
            raise ValueError(f"{path}: was trained on the classes of all images in {args.data}")
        net.size = args.img_size or run.get("img_size") or getattr(net, "img_size", 224)
        print(f"{path}: {type(net).__name__} {net.embed_dim}, {net.size} px, scenes held out: "
              f"{run.get('holdout', 'not known, no config.json beside it')}")
    if args.show and not hasattr(nets[0], "last_blocks"):
        raise ValueError("--show: a ResNet has no patch tokens")
    seeds, n = range(args.seed, args.seed + args.seeds), len(nets)
    for seed in seeds:
        torch.manual_seed(seed)
        nets.append(models.build(**nets[0].spec))
        nets[-1].size = nets[0].size
    nets.append(Floor())

    # ----------------------------------------------------------------- images to train and test on
    root, lists = args.data or data.make_toy("toy"), None
    labels = {"labels": args.labels or f"{root}/ssl4eo_multilabel.json"}
    scenes = reader(root, modality=modality, **labels if args.task == "ssl4eo" else {})
    if args.lists:
        index = {name: i for i, name in enumerate(scenes.ids)}
        leave = {index[name] for path in args.exclude for name in data.listed(path, index, True)}
        leave |= {i for i, y in enumerate(scenes.labels) if args.drop_unlabelled and not y.any()}
        lists = [[(index[name], 0) for name in data.listed(path, index, args.skip_missing)
                  if index[name] not in leave] for path in args.lists]
        if len(index) < len(scenes) or {*lists[0]} & {*lists[1]}:
            raise ValueError("--lists: images that are in both, or two of one name in --data")
    share = args.train_frac or (0.7 if not lists and args.task != "ssl4eo" else 1.0)
    splits = [split(scenes, args.task, seed, share, holdout, lists, args.replace) for seed in seeds]
    print(f"{args.task} {root}: {len(scenes)} scenes, {modality}, {len(scenes.classes)} classes")

    # ----------------------------------------------------------------------------- rows of features
    drawn = sorted({image for train, _ in splits for image in train})
    whole = sorted({image for sides in splits for side in sides for image in side})
    shown, rows = whole + args.draws * drawn, {}                               # n images
    for j, image in enumerate(shown):
        rows.setdefault(image, []).append(j)                     # of the image itself, of its draws
    scene, y = np.array([i for i, _ in shown]), np.stack([scenes.labels[i][s] for i, s in shown])
    done = [extract(nets, data.Images(scenes, drawn if draw else whole), args.device, args.workers,
                    args.cache, args.centre, draw, args.area) for draw in range(args.draws + 1)]
    features = {net: np.concatenate([views[net] for views in done]) for net in nets}   # (n,F) each
    print(f"features: {len(whole)} images"
          + f", {args.draws} draws of the {len(drawn)} to train on" * (args.draws > 0))
    if args.show:
        last = {i: (i, s) for i, s in splits[0][1]}              # an image of each test scene
        show(args.show, nets[0], data.Images(scenes, [*last.values()][:8]))

    # -------------------------------------------------------------------------- a head for each row
    names = [*(["checkpoint"] if n == 1 else args.ckpt), "random", "stats"]
    table = {name: {m: [] for m in metrics} for name in names}
    chosen, scores = {name: [] for name in names}, {}
    fits = {"ridge": ridge, "logistic": partial(logistic, multi=multi)}
    for k, (seed, images) in enumerate(zip(seeds, splits)):
        train = [j for image in images[0] for j in rows[image][args.draws > 0:]]
        test = [rows[image][0] for image in images[1]]
        place = np.unique(scene[train], return_inverse=True)[1]
        for name, net in zip(names, [*nets[:n], nets[n + k], nets[-1]]):
            grid = GRID if hasattr(net, "last_blocks") else GRID[:13]
            heads = {"linear": [(args.feature, args.lr)], "grid": grid}.get(args.head)
            x = features[net] if heads else features[net][:, columns(net, args.feature)]
            given = x[train], y[train], x[test], place
            if heads:
                scores[name], best = linear(*given, multi, metric, heads, net, args.steps, seed)
                chosen[name].append(best)
            elif args.head == "knn":
                scores[name] = knn(*given[:3])
            else:
                scores[name] = validated(fits[args.head], *given)
            for m, function in metrics.items():
                table[name][m].append(round(float(function(scores[name], y[test])), 5))
    empty, width = int((~y[test].any(0)).sum()), max(12, *map(len, names))
    print(f"{len(images[0])} training, {len(test)} test images ({empty} classes have none: not in "
          f"macro), {args.seeds} seed(s): mean ± deviation\n{'':{width}}",
          *(f"{m:>17}" for m in metrics))
    spread = partial(np.std, ddof=len(seeds) > 1)
    for name, row in table.items():
        cells = (f"{np.mean(v):.4f}" + f" ± {spread(v):.4f}" * (len(v) > 1) for v in row.values())
        print(f"{name:{width}}", *(f"{c:>17}" for c in cells), *chosen[name])     # see `linear`

    # ------------------------------------------- intervals and classes of the last seed, and JSON
    value, *_, random, stats = (round(float(np.mean(row[key])), 5) for row in table.values())
    out = {"task": args.task, "metric": key, "n_train": len(images[0]), "n_test": len(test),
           "value": value, "random": random, "stats": stats, "seeds": args.seeds, "head": args.head,
           "std": round(float(spread(table[names[0]][key])), 5), "chosen": chosen, "all": table,
           "empty_classes": empty, "ckpt": args.ckpt[0] if n == 1 else args.ckpt}
    if args.bootstrap:
        own, gain = bootstrap(metric, scores.values(), y[test], args.bootstrap)
        for name, a, b in zip(names, own, gain):
            gained = f", minus {names[0]}: {b}" * (name != names[0])
            print(f"{name:{width}} {key}, 95 % of bootstraps: {a}{gained}")
        out |= {"interval": dict(zip(names, own)), "difference": dict(zip(names, gain))}
    for k, name in enumerate(scenes.classes if args.classes else ()):             # of the first row
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
