"""What did the backbone learn?  Frozen features, one small head, by a protocol with a name.

    python probe.py --ckpt runs/softcon_s1/backbone.pt                      toy world, multi-label
    python probe.py --ckpt backbone.pt --data DIR --task eurosat --protocol torchgeo-bench
    python probe.py --ckpt a.pt b.pt --data DIR --task bigearthnet --lists train.csv test.csv
    python probe.py --ckpt backbone.pt --train-frac 0.01 0.05 0.1 1 --out curve.svg

The backbone never trains.  Each image becomes a row of features, once, and a small head learns to
tell the labels from these rows.  The same kind of head is fitted to the features of the checkpoint;
of "random", the same architecture with random weights; and to "stats", the mean and deviation of
each band, which need no network.  All are tested on the same images, and a checkpoint is worth what
it gains over the other two.  The last line of the output is a JSON object, values from 0 to 1.

"Linear probing" means several things in this field.  A protocol fixes all of it: what the network
is given, which features the head sees, how the head is fitted and chosen, and what is reported.
Numbers of different protocols do not compare.  `PROTOCOLS` lists them.

[1] Oquab et al. 2023, DINOv2, appendix B.3: many linear heads, one chosen on a validation part
[2] Caron et al. 2021, DINO: weighted nearest neighbours
[3] SSL4EO-S12, linear_BE_moco_v3.py and linear_EU_moco_v3.py, of 2022
[4] Copernicus-Bench of zhu-xlab/Copernicus-FM, 2025, by SoftCon's first author
[5] torchgeo-bench 0.4, 2026
"""
import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from itertools import product
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")    # before torch is imported; why: see pretrain.py

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import model as models

# --------------------------------------------------------------------------------------- protocols

ANY_FEATURE = ["cls", "cls+mean", "4cls", "4cls+mean", "mean"]                 # see `FEATURES`


@dataclass
class Protocol:
    """How features are judged.  What a protocol leaves open has a flag."""
    source: str                    # who measures so
    head: str                      # what is fitted: see `fit_head`
    features: list                 # of a ViT: --feature takes one of them, by default the first
    size: int = 0                  # side to which images are resized; 0: as the network was trained
    train_views: str = "whole"     # of an image: "whole", "flips" (four) or "crops" (five random)
    test_centre: float = 1.0       # central share of each side that a network sees in testing
    zscore: bool = False           # are bands rescaled to mean 0 and deviation 1 over these images?
    clip_radar: bool = False       # is a radar image clipped to its own 1 % and 99 % quantiles?
    eurosat_scale: bool = False    # is EuroSAT-MS scaled with EuroSAT's statistics?
    shares: tuple = (0.7, 0, 0.3)  # of a class without lists: to train, to validate, to test
    validation: bool = False       # does a validation part choose the penalty?
    with_replacement: bool = False           # may --train-frac draw an image twice?
    batch_metric: bool = False     # multi-label: is the value a mean over batches of 256 images?
    # of SGD on one linear layer
    epochs: int = 0
    batch: int = 0
    momentum: float = 0.0
    weight_decay: float = 0.0
    lr: dict | None = None         # by kind of labels or of network: see `learning_rate`


PROTOCOLS = {
    "ridge": Protocol(
        source="ours: closed form, penalty by 5-fold cross-validation",
        head="ridge", features=ANY_FEATURE),
    "logistic": Protocol(
        source="ours: logistic regression, penalty by 5-fold cross-validation",
        head="logistic", features=ANY_FEATURE),
    "knn": Protocol(
        source="DINO [2]: 20 neighbours vote with exp(cosine / 0.07)",
        head="knn", features=ANY_FEATURE),
    # the network sees whole images, in [1] random crops; SGD runs on standardised features
    "dinov2": Protocol(
        source="DINOv2 B.3 [1]: 52 linear heads by SGD, the best on a fifth of the training part",
        head="grid", features=["grid"]),
    # a new crop in each of the 100 epochs in [3], here five crops: features are computed once
    "ssl4eo-s12": Protocol(
        source="SSL4EO-S12 of 2022 [3]: SGD on random crops, biased batch-wise average precision",
        head="linear", features=["cls", "4cls"], size=224, train_views="crops",
        test_centre=0.875, shares=(0.8, 0, 0.2), with_replacement=True, batch_metric=True,
        epochs=100, batch=256, momentum=0.9, lr={"ViT": 0.1, "ResNet": 8.0}),
    # features of the four flips are computed once; the last epoch counts
    "copernicus-bench": Protocol(
        source="Copernicus-Bench [4], by SoftCon's first author: SGD on the mean patch token",
        head="linear", features=["mean"], size=224, train_views="flips",
        clip_radar=True, eurosat_scale=True, shares=(0.6, 0.2, 0.2),
        epochs=50, batch=64, weight_decay=1e-4, lr={"one label": 0.1, "multi-label": 1.0}),
    "torchgeo-bench": Protocol(
        source="torchgeo-bench [5]: logistic regression, C by a validation part, then refit",
        head="chosen logistic", features=["mean"], size=224, zscore=True,
        shares=(0.6, 0.2, 0.2), validation=True),
}
PROTOCOLS["torchgeo-bench-knn"] = replace(
    PROTOCOLS["torchgeo-bench"], source="torchgeo-bench [5]: majority of 5 neighbours",
    head="5 neighbours")

# EuroSAT's own mean and std, in the order of s2c [4], [SSL4EO-S12 eurosat_dataset.py]
EUROSAT_SCALE = {
    "mean": [1353.73, 1117.20, 1041.88, 946.55, 1199.19, 2003.01, 2374.01, 2301.22, 2599.78, 732.18,
             12.10, 1820.70, 1118.20],
    "std": [897.27, 736.02, 684.78, 620.03, 791.86, 1341.28, 1595.40, 1545.53, 1750.12, 475.12,
            98.27, 1216.49, 736.70],
}

# ------------------------------------------------------------------------------------------- input


@dataclass(frozen=True)
class View:
    """What part of an image a network sees."""
    centre: float = 1.0            # share of each side, around the centre
    mirror: tuple = ()             # dimensions of (B,C,H,W): 2 is upside down, 3 sideways
    draw: int = 0                  # 1, 2, ...: a random crop instead, with this number as its seed
    area: float = 1.0              # least share of the image in that crop


@dataclass(frozen=True)
class Profile:
    """What happens to the values of an image, float in [0,1], before the network."""
    clip: bool = False             # clip each image and band to its own 1 % and 99 % quantiles
    mean: tuple = ()               # of each band, to subtract
    std: tuple = ()                # of each band, to divide by


def training_views(protocol, task):
    """The views of an image that a head trains on."""
    if protocol.train_views == "flips":
        return [View(), View(mirror=(3,)), View(mirror=(2,)), View(mirror=(2, 3))]
    if protocol.train_views == "crops":
        area = 0.08                                            # EuroSAT [3]
        if task.multi_label:
            area = 0.8                                         # BigEarthNet [3]
        return [View(draw=draw, area=area) for draw in range(1, 6)]
    return [View()]


def test_view(protocol):
    return View(centre=protocol.test_centre)


def clip_quantiles(x):
    """Clip x (B,C,H,W) uint8 to the 1 % and 99 % quantiles of each image and band: float.

    [4] clips decibels before they are scaled.  Both are monotone, so their order does not matter
    but for the rounding to 8 bits.
    """
    levels = torch.tensor([0.01, 0.99], device=x.device)
    low, high = torch.quantile(x.flatten(2).float(), levels, dim=2)            # (B,C)
    return x.float().clamp(low[..., None, None], high[..., None, None])


def central_view(x, size=None, centre=1.0):
    """Cut out the centre of images and resize it.

    x (B,C,H,W), values 0 to 255 -> (B,C,size,size) float in [0,1].  centre is the share of each
    side that stays.  Without a size nothing is resized.
    """
    H, W = x.shape[-2:]
    rim = round(W * (1 - centre) / 2)
    x = x[..., rim:H - rim, rim:W - rim].float() / 255
    size = size or x.shape[-1]
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True)


def choose_profile(args, protocol, images):
    """The profile of the input under a protocol: the Profile, and its name for the output."""
    sensor = images.scenes.sensor
    if protocol.zscore:
        mean, std = band_moments(images, args.workers)
        return Profile(mean=mean, std=std), "z-score over all images of this probe"
    if sensor.kind == "rgb":
        return Profile(), "display values in [0, 1]"
    name = f"mean -+ 2 std of {sensor.name} to [0, 1], clipped"
    if protocol.eurosat_scale and args.task == "eurosat" and sensor.name == "s2c":
        name = "mean -+ 2 std of EuroSAT to [0, 1], clipped"
    clip = protocol.clip_radar and sensor.kind == "radar"
    if clip:
        name += ", after a clip of each image and band to its 1 % and 99 % quantiles"
    if args.task == "bigearthnet" and sensor.name == "s2c":
        name += ", B10 is 0"
    return Profile(clip=clip), name


def band_moments(images, workers):
    """Mean and deviation of each band over all images, values in [0,1]: two tuples."""
    total = 0
    squares = 0
    pixels = 0
    for x, _, _ in DataLoader(images, 64, num_workers=workers):
        x = x.double() / 255                                   # (B,C,H,W)
        total += x.sum((0, 2, 3))                              # (C,)
        squares += x.square().sum((0, 2, 3))
        pixels += x[:, 0].numel()
    mean = total / pixels
    std = (squares / pixels - mean ** 2).clamp(min=0).sqrt() + 1e-8            # B10 may be constant
    return tuple(mean.tolist()), tuple(std.tolist())


# ---------------------------------------------------------------------------------------- features

# A ViT's row of features has five parts, each as wide as a token: the CLS tokens of its last four
# blocks (parts 0 to 3) and the mean patch token of the last block (part 4).  A head sees the parts
# from the first number up to, not including, the second.
FEATURES = {
    "cls": (3, 4),
    "cls+mean": (3, 5),
    "4cls": (0, 4),
    "4cls+mean": (0, 5),
    "mean": (4, 5),
    "grid": (0, 5),                                            # the heads of the grid choose
}


def describe(net, x):
    """Turn images x (B,C,H,W), float, into rows of features.

    A ViT gives (B,5D), laid out as FEATURES says; any other network its output (B,D).
    """
    if not isinstance(net, models.ViT):
        return net(x)
    blocks = net.last_blocks(x, 4)                             # 4 x (cls (B,D), patches (B,N,D))
    parts = [cls for cls, _ in blocks]
    last_patches = blocks[-1][1]                               # (B,N,D)
    parts.append(last_patches.mean(1))                         # (B,D)
    return torch.cat(parts, 1)                                 # (B,5D)


def columns(net, feature):
    """The columns of a row of features that a head on `feature` sees: of a ResNet's row, all."""
    if not isinstance(net, models.ViT):
        return slice(None)
    first, end = FEATURES[feature]
    return slice(first * net.embed_dim, end * net.embed_dim)


class BandStatistics(torch.nn.Module):
    """Mean and deviation of each band, for which nobody needs a network: (B,C,H,W) -> (B,2C)."""
    size = None                                                # it takes images as they are

    def forward(self, x):
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)


class Blocks(torch.nn.Module):
    """The same feature of every block of a ViT, for --layers: (B,C,H,W) -> (B, depth*F).

    feature: "cls", "mean" or, whatever else it is, both.  Raises ValueError for a ResNet.
    """

    def __init__(self, net, feature):
        super().__init__()
        if not isinstance(net, models.ViT):
            raise ValueError("--layers: takes a ViT, a ResNet has no blocks of tokens")
        self.net = net
        self.size = net.size
        self.feature = feature
        self.depth = len(net.blocks)
        self.width = net.embed_dim
        if feature not in ("cls", "mean"):
            self.width *= 2

    def columns(self, k):
        """The columns of block k."""
        return slice(k * self.width, (k + 1) * self.width)

    def forward(self, x):
        parts = []
        for cls, patches in self.net.last_blocks(x, self.depth):               # (B,D), (B,N,D)
            if self.feature != "mean":
                parts.append(cls)
            if self.feature != "cls":
                parts.append(patches.mean(1))
        return torch.cat(parts, 1)


@torch.no_grad()
def compute_features(nets, images, device, workers, view, profile):
    """Pass over `images` once, as `extract` describes it: {net: float16 (n,D or 5D)}."""
    for net in nets:
        net.eval().to(device)
    rows = {net: [] for net in nets}
    generator = torch.Generator().manual_seed(view.draw)
    loader = DataLoader(images, 64, num_workers=workers)
    for x, _, _ in tqdm(loader, "features", leave=False):
        x = x.to(device)                                       # (B,C,H,W) uint8
        if profile.clip:
            x = clip_quantiles(x)
        if view.draw:
            crops = data.draw_crops(len(x), generator, view.area)
            crops["flip_y"] = torch.ones(len(x))               # [3] mirror sideways only
        for net in nets:
            if view.draw:
                seen = data.crop(x, crops, net.size or x.shape[-1])
            else:
                seen = central_view(x, net.size, view.centre)
            if view.mirror:
                seen = seen.flip(view.mirror)
            if profile.mean:
                mean = torch.tensor(profile.mean, device=device)[:, None, None]
                std = torch.tensor(profile.std, device=device)[:, None, None]
                seen = (seen - mean) / std
            rows[net].append(describe(net, seen).half().cpu().numpy())
    return {net: np.concatenate(rows[net]) for net in nets}


def extract(nets, images, device="cpu", workers=0, cache=None, view=View(), profile=Profile()):
    """Compute the features of `images` with each network: {net: float16 (n,D or 5D)}.

    A network sees the view of an image, resized to net.size pixels a side, or in its own size where
    that is None.  cache: a folder that keeps features, so that the next call reads them instead.
    Raises ValueError for features that are not finite.
    """
    features = {}
    paths = {}
    if cache:
        paths = cache_paths(cache, nets, images, view, profile)
    for net, path in paths.items():
        if os.path.exists(path):
            with data.file_errors(path, "not a file of features"):
                features[net] = np.load(path)

    missing = [net for net in nets if net not in features]
    if missing:
        computed = compute_features(missing, images, device, workers, view, profile)
        for net, rows in computed.items():
            if not np.isfinite(rows).all():
                raise ValueError("features are not finite: NaN in the weights, or beyond float16")
            if cache:
                save_features(paths[net], rows)
        features.update(computed)
    return {net: features[net] for net in nets}


def cache_paths(folder, nets, images, view, profile):
    """Name a file for the features of each network: {net: path}.

    The name is a hash of all that the features depend on: the code, the sensor, the images, the
    view of them, the profile of the input, the weights and the size.  Files count by name, size and
    time of the last change.
    """
    code = [__file__, data.__file__, models.__file__]
    pixels = [images.scenes.files[i][s] for i, s in images.pairs]
    common = hashlib.sha256(f"{images.scenes.sensor} {view} {profile}".encode())
    for path in map(Path, code + pixels):
        files = [path]
        if path.is_dir():                                      # a product: a folder of bands
            files = sorted(path.iterdir())
        elif path.parent.suffix == ".zip":                     # an image in a zip
            common.update(str(path).encode())
            files = [path.parent]
        for file in files:
            stat = file.stat()
            common.update(f"{file} {stat.st_size} {stat.st_mtime_ns} ".encode())

    paths = {}
    for net in nets:
        digest = common.copy()
        feature = getattr(net, "feature", "")                  # of `Blocks`
        digest.update(f"{type(net)} {feature} {net.size}".encode())
        for name, weight in net.state_dict().items():
            digest.update(name.encode() + weight.cpu().numpy().tobytes())
        paths[net] = f"{folder}/{digest.hexdigest()[:32]}.npy"
    return paths


def save_features(path, rows):
    """Write features aside, flush, then rename, so that a file of the cache is always whole."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    aside = f"{path}.part{os.getpid()}"
    with data.file_errors(path, "not written"), open(aside, "wb") as file:
        np.save(file, rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


@dataclass
class Features:
    """The features of some images under one view."""
    row: dict                      # {image: its row}
    of: dict                       # {net: (n,D or 5D)}


def describe_images(args, protocol, task, nets, scenes, splits):
    """Compute the features of all images that some split trains or tests on.

    splits: {share: [split of a seed, ...]}.
    Returns {view: Features} and the name of the input's profile.  Views that only serve to train
    are computed of training images alone.
    """
    whole = set()
    to_train = set()
    for train, validation, test in sum(splits.values(), []):
        whole.update(train, validation, test)
        to_train.update(train)                                 # images are tested as they are
    whole = sorted(whole)
    to_train = sorted(to_train)
    profile, name = choose_profile(args, protocol, data.Images(scenes, whole))

    test = test_view(protocol)
    features = {}
    for view in dict.fromkeys([test, *training_views(protocol, task)]):
        images = to_train
        if view == test:
            images = whole
        found = extract(nets, data.Images(scenes, images), args.device, args.workers, args.cache,
                        view, profile)
        features[view] = Features({image: j for j, image in enumerate(images)}, found)
    print(f"features: {len(whole)} images, {len(features)} view(s) of those to train on")
    return features, name


@dataclass
class Rows:
    """Features of n images under V views, and their labels."""
    x: np.ndarray                  # (V,n,D)
    y: np.ndarray                  # (n,L), 0 or 1
    scene: np.ndarray              # (n,)


def rows_of(features, scenes, net, seen, images, views):
    """Gather the columns `seen` of the features of `images`, with their labels, as Rows."""
    x = []
    for view in views:
        rows = [features[view].row[image] for image in images]
        x.append(features[view].of[net][rows][:, seen])
    y = np.array([scenes.labels[i][s] for i, s in images])
    scene = np.array([i for i, _ in images])
    return Rows(np.stack(x), y.reshape(len(images), len(scenes.classes)), scene)


# ------------------------------------------------------------------------------------------- heads
#
# A head takes x (n,D), features to train on; y (n,L), their labels, 0 or 1; x_test (m,D).  It gives
# scores (m,L): the higher, the likelier the class.

FOLDS = 5                                                      # parts of the training rows
RIDGE_PENALTIES = np.logspace(-6, 2, 17)
LOGISTIC_PENALTIES = (1, 0.1, 0.01, 0.001, 0.0001)             # from strong to weak, see `logistic`
COSTS = np.logspace(-6, 4, 40)                                 # C, from strong to weak penalty [5]
RATES = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]         # [1]
GRID_FEATURES = ["cls", "cls+mean", "4cls", "4cls+mean"]                                      # [1]
GRID_STEPS = 12500                                             # 10 epochs of 1,250 steps [1]


def standardise(x, x_test):
    """Subtract the mean and divide by the deviation of each column of x, in float64."""
    mean = x.mean(0, dtype=np.float64)
    std = x.std(0, dtype=np.float64) + 1e-8                    # a constant column stays 0
    return (x - mean) / std, (x_test - mean) / std


def folds(scene):
    """The fold of each row, 0 to 4, from its scene (n,): rows of one scene share a fold.

    These are its seasons or its random crops.  In two folds they would make validation too easy.
    """
    _, number = np.unique(scene, return_inverse=True)          # 0, 1, 2, ... without gaps
    return number % FOLDS


def validated(fit, x, y, x_test, scene):
    """Choose a penalty by cross-validation on the training rows: scores (m,L) with the best one.

    fit(x, y, x_test) gives scores (penalties,m,L).  The best penalty has the least squared error
    on rows that were left out, one fold after the other.  scene (n,) is the scene of each row.
    """
    fold = folds(scene)
    errors = 0
    for f in range(fold.max() + 1):
        left_out = fold == f
        scores = fit(x[~left_out], y[~left_out], x[left_out])  # (penalties,m,L)
        errors += ((scores - y[left_out]) ** 2).sum((1, 2))    # (penalties,)
    best = np.argmin(errors)
    return fit(x, y, x_test)[best]


def ridge(x, y, x_test):
    """Fit linear maps by least squares, one for each penalty p: scores (penalties,m,L).

    Each minimises the mean over rows of |x W - y|^2, plus p |W|^2, in closed form and float64.
    One eigendecomposition of x^T x serves all penalties.
    """
    x, x_test = standardise(x, x_test)
    offset = y.mean(0)                                         # (L,), what the intercept gives
    n, D = x.shape
    if D <= n:
        values, vectors = np.linalg.eigh(x.T @ x)              # (D,), (D,D)
    else:
        # x x^T is the smaller matrix, and its eigenvalues are those of x^T x that are not 0
        values, vectors = np.linalg.eigh(x @ x.T)              # (n,), (n,n)
        vectors = x.T @ vectors / np.sqrt(values.clip(1e-9 * values[-1]))      # (D,n)
    left = x_test @ vectors
    right = vectors.T @ (x.T @ (y - offset))
    scores = [left / (values + penalty * n) @ right + offset for penalty in RIDGE_PENALTIES]
    return np.stack(scores)


def fit_logistic(x, y, W, b, penalty, multi_label, accuracy, iterations):
    """Move W (D,L) and b (1,L) to the minimum of the penalised log loss of x (n,D), y (n,L).

    All are float64 tensors.  L-BFGS ends at a gradient below `accuracy`.
    """
    optimiser = torch.optim.LBFGS([W, b], max_iter=iterations, tolerance_grad=accuracy,
                                  tolerance_change=accuracy / 100, line_search_fn="strong_wolfe")

    def closure():
        """Loss and gradients at the present W and b; LBFGS calls it several times a step."""
        logits = x @ W + b                                     # (n,L)
        if multi_label:
            loss = F.binary_cross_entropy_with_logits(logits, y) * y.shape[1]
        else:
            loss = F.cross_entropy(logits, y)
        loss = loss + penalty / 2 * W.square().sum()
        optimiser.zero_grad()
        loss.backward()
        return loss

    optimiser.step(closure)


def logistic(x, y, x_test, multi_label, penalties=LOGISTIC_PENALTIES, accuracy=1e-4,
             iterations=200):
    """Fit logistic regressions, one for each penalty p: probabilities (penalties,m,L).

    Each minimises the mean log loss of a row (softmax; multi-label: a sigmoid for each class, and
    their sum) plus p / 2 |W|^2, by L-BFGS in float64.  It starts where the one before, of a larger
    penalty, ended, which saves iterations.
    """
    x, x_test = standardise(x, x_test)
    x = torch.from_numpy(x)                                    # (n,D)
    x_test = torch.from_numpy(x_test)                          # (m,D)
    y = torch.from_numpy(y).double()                           # (n,L)
    W = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, requires_grad=True)
    b = torch.zeros(1, y.shape[1], dtype=torch.float64, requires_grad=True)
    probabilities = []
    for penalty in penalties:
        fit_logistic(x, y, W, b, penalty, multi_label, accuracy, iterations)
        logits = (x_test @ W + b).detach()
        if multi_label:
            probabilities.append(logits.sigmoid().numpy())
        else:
            probabilities.append(logits.softmax(1).numpy())
    return np.stack(probabilities)


def chosen_logistic(train, validation, x_test, metric, multi_label):
    """Fit logistic regressions as [5] does: scores (m,L), [C, its value on the validation part].

    scikit-learn's C weighs the summed log loss of n rows against |W|^2 / 2: the penalty on their
    mean is 1 / (C n).  The best C on the validation part is fitted again with that part.
    """
    n = len(train.y)
    fit = partial(logistic, multi_label=multi_label)
    # a rough fit is enough to choose: each starts where the one before ended
    scores = fit(train.x[0], train.y, validation.x[0], penalties=1 / (COSTS * n), accuracy=1e-5,
                 iterations=100)
    values = [float(metric(s, validation.y)) for s in scores]
    best = int(np.argmax(values))
    x = np.concatenate([train.x[0], validation.x[0]])
    y = np.concatenate([train.y, validation.y])
    scores = fit(x, y, x_test, penalties=[1 / (COSTS[best] * len(x))], accuracy=1e-7,
                 iterations=1000)
    return scores[0], [float(f"{COSTS[best]:.3g}"), values[best]]


def knn(x, y, x_test, k=20, tau=0.07):
    """Let the k most similar training rows vote with exp(cosine / tau) [2]: scores (m,L)."""
    x = F.normalize(torch.from_numpy(x).float())
    y = torch.from_numpy(y).float()
    x_test = F.normalize(torch.from_numpy(x_test).float())
    scores = []
    for rows in x_test.split(1024):
        cosine, index = (rows @ x.T).topk(min(k, len(x)))      # (b,k), (b,k)
        votes = ((cosine - 1) / tau).exp()                     # with -1 no vote exceeds 1
        scores.append((votes[..., None] * y[index]).sum(1))    # (b,L)
    return torch.cat(scores).numpy()


def majority(x, y, x_test, k=5):
    """Let the k nearest training rows, by Euclidean distance, vote [5]: shares of votes (m,L)."""
    x = torch.from_numpy(x).double()
    y = torch.from_numpy(y).double()
    shares = []
    for rows in torch.from_numpy(x_test).double().split(256):
        # differences, not inner products: these round, and rounding would reorder neighbours
        distance = torch.cdist(rows, x, compute_mode="donot_use_mm_for_euclid_dist")   # (b,n)
        index = distance.topk(min(k, len(x)), largest=False).indices                   # (b,k)
        shares.append(y[index].mean(1))                        # (b,L)
    return torch.cat(shares).numpy()


def linear(train, x_test, protocol, lr, multi_label, seed):
    """Train one linear layer by SGD on features as they are [3], [4]: scores (m,L).

    Each epoch sees every image once, under a view drawn by chance.  The rate falls with a cosine
    from lr to 0, which is OneCycle without its warm-up.
    """
    x = torch.from_numpy(train.x).float()                      # (V,n,D)
    y = torch.from_numpy(train.y).float()                      # (n,L)
    V, n, D = x.shape
    generator = torch.Generator().manual_seed(seed)
    layer = torch.nn.Linear(D, y.shape[1])
    torch.nn.init.normal_(layer.weight, std=0.01, generator=generator)         # [3]
    torch.nn.init.zeros_(layer.bias)
    optimiser = torch.optim.SGD(layer.parameters(), lr, momentum=protocol.momentum,
                                weight_decay=protocol.weight_decay)
    steps = protocol.epochs * math.ceil(n / protocol.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(protocol.epochs):
        for rows in torch.randperm(n, generator=generator).split(protocol.batch):
            view = torch.randint(V, (len(rows),), generator=generator)
            logits = layer(x[view, rows])                      # (B,L)
            if multi_label:
                loss = F.multilabel_soft_margin_loss(logits, y[rows])
            else:
                loss = F.cross_entropy(logits, y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        return layer(torch.from_numpy(x_test).float()).numpy()


def learning_rate(protocol, task, net):
    """The rate that the protocol has for this kind of labels, or for this kind of network.

    All heads of a probe learn at the rate for the first checkpoint: the floors as well.
    """
    if protocol.lr is None:
        return None
    if "multi-label" in protocol.lr:
        kind = "multi-label" if task.multi_label else "one label"
    else:
        kind = "ViT" if isinstance(net, models.ViT) else "ResNet"
    return protocol.lr[kind]


def sgd(x, y, use, rates, multi_label, steps, seed=0, batch=128):
    """Train H linear heads side by side by SGD and return their weights (D,H,L).

    x (n,D) and y (n,L) are the same for all.  Head h sees the columns where use[h] (H,D) is 1, and
    learns at rates[h] * batch / 256, momentum 0.9, with a cosine down to 0.  The loss is the cross
    entropy [1]; multi-label: the mean binary cross entropy over classes.

    One matrix product serves all heads, which makes the 52 of [1] affordable.  The gradient is
    written out by hand.  That of a head depends on its own weights only, so that each head ends
    with the weights that it would have if it trained alone.
    """
    n, D = x.shape
    L = y.shape[1]
    H = len(rates)
    use = use.T[..., None]                                     # (D,H,1)
    generator = torch.Generator().manual_seed(seed)
    W = 0.01 * torch.randn(D, 1, L, generator=generator) * use                 # (D,H,L)
    velocity = torch.zeros_like(W)
    epochs = steps * batch // n + 1
    order = torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)])
    for step, rows in enumerate(order.split(batch)[:steps]):
        logits = (x[rows] @ W.flatten(1)).unflatten(1, (H, L))                 # (B,H,L)
        if multi_label:
            d_logits = (logits.sigmoid() - y[rows, None]) / (len(rows) * L)    # d loss / d logits
        else:
            d_logits = (logits.softmax(2) - y[rows, None]) / len(rows)
        d_W = use * (x[rows].T @ d_logits.flatten(1)).unflatten(1, (H, L))     # (D,H,L)
        velocity = 0.9 * velocity + d_W
        decay = (1 + np.cos(np.pi * step / steps)) / 2         # from 1 to 0
        W = W - velocity * rates[:, None] * (batch / 256 * decay)
    return W


def grid(x, y, x_test, scene, use, rates, metric, multi_label, seed, steps):
    """Train H linear heads as `sgd` does and take the best one: its scores (m,L), index and value.

    use (H,D) and rates (H,) describe the heads.  They train on four fifths of the scenes, and
    `metric` on the last fifth chooses: the test set has no say.
    """
    x, x_test = standardise(x, x_test)
    x = F.pad(torch.from_numpy(x).float(), (0, 1), value=1)    # (n,D+1): a column of ones, the bias
    x_test = F.pad(torch.from_numpy(x_test).float(), (0, 1), value=1)          # (m,D+1)
    use = F.pad(use, (0, 1), value=1)                          # (H,D+1)
    y = torch.from_numpy(y).float()                            # (n,L)
    left_out = torch.from_numpy(folds(scene) == 0)
    W = sgd(x[~left_out], y[~left_out], use, rates, multi_label, steps, seed)  # (D+1,H,L)
    values = []
    for head in W.unbind(1):
        scores = x[left_out] @ head
        values.append(float(metric(scores.numpy(), y[left_out].numpy())))
    best = int(np.argmax(values))
    return (x_test @ W[:, best]).numpy(), best, values[best]


def fit_grid(net, train, x_test, metric, multi_label, seed, steps=GRID_STEPS):
    """Fit the best head of DINOv2's grid: scores (m,L), [feature, rate, value that chose it].

    A feature is chosen by a mask, not by cutting out columns, so that all heads can train side by
    side.
    """
    features = GRID_FEATURES
    if not isinstance(net, models.ViT):
        features = ["cls"]                                     # any name: it selects all columns
    heads = list(product(features, RATES))
    x = train.x[0]
    use = torch.zeros(len(heads), x.shape[1])
    for mask, (feature, _) in zip(use, heads):
        mask[columns(net, feature)] = 1
    rates = torch.tensor([rate for _, rate in heads])
    scores, best, value = grid(x, train.y, x_test, train.scene, use, rates, metric, multi_label,
                               seed, steps)
    return scores, [*heads[best], value]


def fit_head(problem, net, train, validation, x_test, seed):
    """Fit the head of the protocol: scores (m,L) of the test rows, and what was chosen or None.

    train and validation are Rows, x_test (m,D).
    """
    head = problem.protocol.head
    multi_label = problem.task.multi_label
    _, metric = value_metric(problem.protocol, problem.task)
    x = train.x[0]
    y = train.y
    if head == "ridge":
        return validated(ridge, x, y, x_test, train.scene), None
    if head == "logistic":
        fit = partial(logistic, multi_label=multi_label)
        return validated(fit, x, y, x_test, train.scene), None
    if head == "knn":
        return knn(x, y, x_test), None
    if head == "grid":
        return fit_grid(net, train, x_test, metric, multi_label, seed)
    if head == "linear":
        return linear(train, x_test, problem.protocol, problem.lr, multi_label, seed), None
    if head == "chosen logistic":
        return chosen_logistic(train, validation, x_test, metric, multi_label)
    # "5 neighbours": nothing is left to choose, so the validation part votes, too
    x = np.concatenate([x, validation.x[0]])
    y = np.concatenate([y, validation.y])
    return majority(x, y, x_test), None


# ----------------------------------------------------------------------------------------- metrics
#
# A metric takes scores (n,L) and labels (n,L), 0 or 1, and gives a number from 0 to 1.


def ranked_precision(scores, targets):
    """Average precision of one ranking, scores (n,), targets (n,) bool with at least one positive.

    It is the sum over thresholds of (recall_k - recall_(k-1)) precision_k, as scikit-learn defines
    it.  Images of equal score share a threshold, so that their order does not matter.
    """
    order = np.argsort(scores)[::-1]                           # from high to low
    scores = scores[order]
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))          # end of each tie
    hits = np.cumsum(targets[order])[ends]                     # positives at or above a threshold
    gained_recall = np.diff(hits, prepend=0) / hits[-1]
    return np.sum(gained_recall * hits / (ends + 1))           # hits / (ends + 1) is the precision


def average_precision(scores, targets, average="micro"):
    """Average precision of scores (N,L), numbers of any type, against targets (N,L), 0 or 1.

    micro: one ranking of all N*L entries.  macro: the mean over the classes that have a positive;
    scikit-learn counts the others as 0, though they have no recall.  0.0 if nothing is positive.
    Raises ValueError for NaN scores, other shapes or another average.
    """
    scores = np.asarray(scores)
    targets = np.asarray(targets).astype(bool)
    if scores.shape != targets.shape:
        raise ValueError(f"average precision: scores {scores.shape}, targets {targets.shape}")
    if np.isnan(scores).any():
        raise ValueError("average precision: some scores are NaN, which have no order")
    if average == "micro":
        rankings = [(scores.ravel(), targets.ravel())]
    elif average == "macro":
        rankings = zip(scores.T, targets.T)
    else:
        raise ValueError(f"average precision: {average!r} is neither micro nor macro")
    values = [ranked_precision(s, t) for s, t in rankings if t.any()]
    if not values:
        return 0.0
    return float(np.mean(values))


def macro_average_precision(scores, targets):
    return average_precision(scores, targets, "macro")


def batch_average_precision(scores, targets):
    """The mean of micro average precisions of batches of 256 images: biased, but published [3]."""
    values = []
    for i in range(0, len(scores), 256):
        values.append(average_precision(scores[i:i + 256], targets[i:i + 256]))
    return np.mean(values)


def accuracy(scores, targets):
    return np.mean(scores.argmax(1) == targets.argmax(1))


def bootstrap(metric, scores, targets, draws):
    """Resample the test images `draws` times: {name: the metric of scores[name] on each (draws,)}.

    All names see the same resamplings.  So their differences are paired: they vary less than each
    value does, since an image that is hard for one is hard for the other.
    """
    n = len(targets)
    picks = np.random.default_rng(0).integers(0, n, (draws, n))
    values = {}
    for name, own in scores.items():
        values[name] = np.array([metric(own[pick], targets[pick]) for pick in picks])
    return values


def interval(values):
    """[low, high], between which 95 % of the values lie."""
    return np.quantile(values, (0.025, 0.975)).round(5).tolist()


# ------------------------------------------------------------------------------------------ splits
#
# An image is a pair (scene, season).  A split is three lists of images: to train a head,
# to validate a choice (often empty), to test it.


def held_out_halves(scenes, holdout):
    """Split the labelled images of the share `holdout` of scenes that pretraining never saw.

    Half of these scenes train a head, half test it.  The scenes of pretraining do neither: the
    network may have learnt them by heart.
    """
    held_out = data.held_out(scenes.ids, holdout)
    to_test = data.held_out(scenes.ids, holdout / 2)           # a subset: the same hash decides
    train = []
    test = []
    for i, s in scenes.images_of(np.flatnonzero(held_out)):
        if not scenes.labels[i][s].any():
            continue
        if to_test[i]:
            test.append((i, s))
        else:
            train.append((i, s))
    return train, test


def listed_images(args, scenes):
    """Split as the two or three files of --lists say, without the images that --exclude names."""
    index = {name: i for i, name in enumerate(scenes.ids)}
    if len(index) < len(scenes):
        raise ValueError("--lists: names do not suffice, two images in --data have the same name")
    excluded = set()
    for path in args.exclude:
        excluded.update(index[name] for name in data.read_names(path, index, skip=True))
    split = []
    for path in args.lists:
        numbers = [index[name] for name in data.read_names(path, index, skip=args.skip_missing)]
        split.append([(i, 0) for i in numbers if i not in excluded])
    if len(split) == 2:
        split.insert(1, [])                                    # no validation part
    train, validation, test = split
    names = [*set(train), *set(validation), *set(test)]
    if len(set(names)) < len(names):
        raise ValueError("--lists: images that are in two of them")
    return train, validation, test


def class_shares(scenes, shares, rng):
    """Split each class by chance into parts of these shares, to train, to validate, to test."""
    train_end, validation_end, test_end = np.cumsum(shares)
    train = []
    validation = []
    test = []
    for members in np.concatenate(scenes.labels).T:            # (n,) each
        order = [(i, 0) for i in rng.permutation(np.flatnonzero(members))]
        n = len(order)
        train += order[:round(train_end * n)]
        validation += order[round(train_end * n):round(validation_end * n)]
        test += order[round(validation_end * n):round(test_end * n)]
    return train, validation, test


def draw_share(images, share, rng, replace=False):
    """Draw a share of the images, in their order.  replace: an image may come twice, as in [3]."""
    n = len(images)
    if replace:
        drawn = rng.choice(n, int(share * n))
    else:
        drawn = rng.permutation(n)[:round(share * n)]
    return [images[j] for j in sorted(drawn)]


def draw_share_of_classes(images, scenes, share, rng):
    """Draw a share of the images of each class, but at least one."""
    members = {}
    for i, s in images:
        members.setdefault(scenes.labels[i][s].argmax(), []).append((i, s))
    drawn = []
    for k in sorted(members):
        at_least_one = max(share, 1 / len(members[k]))
        drawn += draw_share(members[k], at_least_one, rng)
    return drawn


def reduce_split(scenes, split, share, multi_label, replace, seed):
    """Keep a share of the images to train and to validate on, for all of which one needs labels."""
    train, validation, test = split
    if share == 1:
        return split
    rng = np.random.default_rng(seed)
    if multi_label:
        train = draw_share(train, share, rng, replace)
        validation = draw_share(validation, share, rng, replace)
    else:
        train = draw_share_of_classes(train, scenes, share, rng)
        validation = draw_share_of_classes(validation, scenes, share, rng)
    return train, validation, test


def check_split(scenes, train, test):
    """Raise ValueError if there is nothing to train or to test on, or nothing to tell apart."""
    if not train or not test:
        raise ValueError(f"split leaves {len(train)} training and {len(test)} test images")
    classes = np.any([scenes.labels[i][s] for i, s in train], 0)               # (L,)
    if classes.sum() < 2 or len({i for i, _ in train}) < 2:
        raise ValueError(f"the {len(train)} training images are of a single class or scene")


def choose_images(args, protocol, task, scenes, holdout, seeds):
    """Choose what each seed trains, validates and tests on: {train_frac: [split of a seed, ...]}.

    With --lists as they say; ssl4eo and tables of labels by scenes held out, the same for all
    seeds; else shares of each class, drawn by the seed.
    A protocol that validates takes a fifth of the training scenes where no part is set aside.
    """
    fixed = None                                               # the same for all seeds
    if args.lists:
        fixed = listed_images(args, scenes)
    elif args.task == "ssl4eo" or args.labels:
        train, test = held_out_halves(scenes, holdout)
        fixed = train, [], test
    shares = np.array(args.split or protocol.shares, float)
    if shares.sum() > 1.001:
        shares = shares / len(scenes)                          # numbers of images
    whole = []
    for seed in seeds:
        split = fixed or class_shares(scenes, shares, np.random.default_rng(seed))
        train, validation, test = split
        if protocol.validation and train and not validation:
            left_out = folds(np.array([i for i, _ in train])) == 0
            validation = [image for image, out in zip(train, left_out) if out]
            train = [image for image, out in zip(train, left_out) if not out]
        whole.append((train, validation, test))
    splits = {}
    for share in args.train_frac:
        splits[share] = []
        for seed, split in zip(seeds, whole):
            split = reduce_split(scenes, split, share, task.multi_label,
                                 protocol.with_replacement, seed)
            train, validation, test = split
            check_split(scenes, train, test)
            if protocol.validation and not validation:
                raise ValueError(f"split leaves 0 images to validate {len(train)} training images")
            splits[share].append(split)
    return splits


# ---------------------------------------------------------------------------------------- networks


def run_flags(ckpt):
    """Read some flags of the run that left `ckpt` from the config.json beside it: {name: value}.

    {} if there is no such file, as beside released weights.  ValueError if it is damaged.
    """
    path = Path(ckpt).parent / "config.json"
    if not path.exists():
        return {}
    kinds = {"img_size": int, "holdout": float, "labels": str, "data": str, "modality": str}
    try:
        config = json.loads(data.read_text(path))
        flags = config.get("flags", {})
        known = {}
        for name, kind in kinds.items():
            if flags.get(name) is not None:
                known[name] = kind(flags[name])
        if known.get("modality", "").endswith(".json"):
            known["sensor"] = data.make_sensor(config["sensor"])
        return known
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: not a run's config.json ({error})") from None


def choose_sensor(args, run, net):
    """Find the sensor: that of --modality, else the run's, else the first with net's channels."""
    if "sensor" in run and not args.modality:
        return run["sensor"]
    name = args.modality or run.get("modality")
    if name:
        return data.find_sensor(name)
    for sensor in data.SENSORS.values():
        if len(sensor.bands) == net.in_chans:
            return sensor
    raise ValueError(f"{args.ckpt[0]}: {net.in_chans} channels, no sensor has as many bands")


def choose_holdout(args, runs):
    """The share of scenes to probe on: --holdout, else the least that a run held out, else 0.1.

    Raises ValueError if a run saw images, or their classes, that the probe would test on.
    """
    holdout = args.holdout
    if holdout is None:
        holdout = min(run.get("holdout", 0.1) for run in runs)
    for path, run in zip(args.ckpt, runs):
        if holdout > run.get("holdout", 1):
            raise ValueError(f"--holdout {holdout}: {path} held out {run['holdout']}, saw the rest")
        same_data = os.path.realpath(run.get("data", "")) == os.path.realpath(args.data or "")
        if run.get("labels") == "classes" and same_data:
            raise ValueError(f"{path}: was trained on the classes of all images in {args.data}")
    return holdout


def load_networks(args, protocol, task):
    """Load the checkpoints, and find out from the runs that left them what to probe them on.

    Returns [(name, network), ...], the sensor whose images they take, and the share of scenes that
    none of the runs has seen.  Every network gets an attribute `size`: the side in pixels to which
    its images are resized.
    Raises ValueError if a checkpoint does not fit the sensor, or the sensor the task.
    """
    bands = 0                      # of the network to take if a file holds two, as DeCUR's do
    if args.modality:
        bands = len(data.find_sensor(args.modality).bands)
    nets = [models.build_from(path, bands) for path in args.ckpt]
    runs = [run_flags(path) for path in args.ckpt]
    sensor = choose_sensor(args, runs[0], nets[0])
    for path, net, run in zip(args.ckpt, nets, runs):
        unknown = task.modalities and sensor.name not in task.modalities
        if net.in_chans != len(sensor.bands) or unknown:
            raise ValueError(f"{path}: {net.in_chans} channels, modality {sensor.name} has "
                             f"{len(sensor.bands)}, {args.task} takes {' '.join(task.modalities)}")
        native = run.get("img_size") or getattr(net, "img_size", 224)
        net.size = args.img_size or protocol.size or native
        held_out = run.get("holdout", "not known, no config.json beside it")
        print(f"{path}: {type(net).__name__} {net.embed_dim}, {net.size} px, "
              f"scenes held out: {held_out}")
    names = args.ckpt
    if len(nets) == 1:
        names = ["checkpoint"]
    return dict(zip(names, nets)), sensor, choose_holdout(args, runs)


def unique_networks(networks):
    """The networks of [{name: network}, ...], each once."""
    found = []
    for by_name in networks:
        found += [net for net in by_name.values() if net not in found]
    return found


def random_network(net, seed):
    """Build the architecture of `net` anew, with random weights."""
    torch.manual_seed(seed)
    fresh = models.build(**net.spec)
    fresh.size = net.size
    return fresh


# ------------------------------------------------------------------------------------------- tasks


@dataclass
class Task:
    reader: Callable               # of data.py: reader(root, sensor=...) -> Scenes
    modalities: list               # names of the sensors that it reads; empty: any
    multi_label: bool              # several classes an image, or exactly one
    metrics: dict                  # name -> function of scores and labels
    value: str                     # the metric that chooses heads and that the JSON line reports


MULTI_LABEL = {"micro_map": average_precision, "macro_map": macro_average_precision}
TASKS = {
    "ssl4eo": Task(
        reader=data.SSL4EO, modalities=["s1", "s2c", "s2a"],
        multi_label=True, metrics=MULTI_LABEL, value="micro_map"),
    "bigearthnet": Task(
        reader=data.BigEarthNet, modalities=["s1", "s2a", "s2c"],
        multi_label=True, metrics=MULTI_LABEL | {"mean_of_256s": batch_average_precision},
        value="micro_map"),
    "eurosat": Task(
        reader=data.EuroSAT, modalities=["s1", "s2c", "rgb"],
        multi_label=False, metrics={"accuracy": accuracy}, value="accuracy"),
    "folder": Task(
        reader=data.Folder, modalities=[],
        multi_label=False, metrics={"accuracy": accuracy}, value="accuracy"),
}


def value_metric(protocol, task):
    """The metric that chooses heads and that the JSON line reports: its name and its function."""
    if protocol.batch_metric and task.multi_label:
        return "mean_of_256s", batch_average_precision
    return task.value, task.metrics[task.value]


def metrics_of(protocol, task):
    """All metrics that are printed: {name: function}."""
    name, function = value_metric(protocol, task)
    return task.metrics | {name: function}


def open_scenes(args, protocol, task, sensor):
    """Open the images of the task in --data, or in the toy world, which is made if need be."""
    root = args.data or data.make_toy("toy")
    if protocol.eurosat_scale and args.task == "eurosat" and sensor.name == "s2c":
        sensor = replace(sensor, **EUROSAT_SCALE)
    if args.task == "ssl4eo":
        labels = args.labels or f"{root}/ssl4eo_multilabel.json"
        reader = data.SSL4EOZips if data.find_zips(root, sensor) else task.reader
        scenes = reader(root, sensor=sensor, labels=labels)
    elif args.task == "folder":
        scenes = task.reader(root, sensor=sensor, labels=args.labels or "classes")
    else:
        scenes = task.reader(root, sensor=sensor)
    if not any(labels.any() for labels in scenes.labels):
        raise ValueError(f"{root}: its images have no labels: put them into a folder for each "
                         f"class, or name a table with --labels")
    print(f"{args.task} {root}: {len(scenes)} scenes, {sensor.name}, {len(scenes.classes)} classes")
    for line in scenes.notes + data.look_at(scenes, range(len(scenes))):
        print(line)
    return scenes


# ------------------------------------------------------------------------------------- evaluation


@dataclass
class Problem:
    """What all heads of a probe share."""
    protocol: Protocol
    task: Task
    scenes: data.Scenes
    features: dict                 # {view: Features}
    feature: str                   # of a ViT: what its heads see
    lr: float | None               # of the heads that the protocol trains by SGD


def fit_split(problem, net, split, seed, seen=None):
    """Fit a head to the features of a network: scores (m,L), labels (m,L), what was chosen or None.

    seen: the columns of its features that the head sees; None: those of the feature.
    """
    train, validation, test = split
    if seen is None:
        seen = columns(net, problem.feature)
    where = problem.features, problem.scenes, net, seen
    test_views = [test_view(problem.protocol)]
    train = rows_of(*where, train, training_views(problem.protocol, problem.task))
    validation = rows_of(*where, validation, test_views)
    test = rows_of(*where, test, test_views)
    scores, choice = fit_head(problem, net, train, validation, test.x[0], seed)
    return scores, test.y, choice


def evaluate(problem, networks, splits, seeds):
    """Fit and test a head for each seed and network.

    networks: for each seed {name: net}.  Returns table[name][metric] and chosen[name], lists with
    an entry for each seed; and {name: scores (m,L)} and the labels (m,L) of the last seed.
    """
    metrics = metrics_of(problem.protocol, problem.task)
    table = {}
    chosen = {}
    for name in networks[0]:
        table[name] = {metric: [] for metric in metrics}
        chosen[name] = []
    for nets, split, seed in zip(networks, splits, seeds):
        scores = {}
        for name, net in nets.items():
            scores[name], labels, choice = fit_split(problem, net, split, seed)
            if choice:
                chosen[name].append(choice)
            for metric, function in metrics.items():
                value = float(function(scores[name], labels))
                table[name][metric].append(round(value, 5))
    return table, chosen, scores, labels


def evaluate_blocks(problem, blocks, split, seed):
    """Fit and test a head for each block of a ViT: the values, from the first block to the last."""
    metric = problem.task.metrics[problem.task.value]
    values = []
    for k in range(blocks.depth):
        scores, labels, _ = fit_split(problem, blocks, split, seed, blocks.columns(k))
        values.append(round(float(metric(scores, labels)), 5))
        print(f"block {k + 1:2} of {blocks.depth}: {problem.task.value} {values[-1]:.4f}")
    return values


# ------------------------------------------------------------------------------------------- flags

RANGES = {                         # of each flag that is a number: the least and the largest value
    "img_size": (1, 4096),
    "train_frac": (1e-6, 1.0),
    "split": (0.0, 1e8),
    "holdout": (0.0, 1.0),
    "seeds": (1, 1000),
    "seed": (0, 2 ** 32),
    "bootstrap": (0, 10 ** 6),
    "workers": (0, 1000),
}


def parse(argv=None):
    """Read the flags.  ValueError, or argparse's own error, names one that is unfit."""
    parser = argparse.ArgumentParser(description="Probe frozen features", allow_abbrev=False)

    flag = parser.add_argument_group("network").add_argument
    flag("--ckpt", nargs="+", required=True, help="of a run, or released; several are compared")
    flag("--img-size", type=int, help="pixels a side; else the protocol's, the run's, or 224")

    flag = parser.add_argument_group("protocol").add_argument
    flag("--protocol", choices=list(PROTOCOLS), default="ridge", help="who measures (%(default)s)")
    flag("--feature", choices=list(FEATURES), help="of a ViT; else the protocol's first")
    flag("--layers", action="store_true", help="also the value of each block of the first ViT")

    flag = parser.add_argument_group("images and labels").add_argument
    flag("--task", choices=list(TASKS), default="ssl4eo", help="what the labels are (%(default)s)")
    flag("--data", help="folder of the images; else the toy world")
    flag("--modality", help="a sensor; else the run's, or the one with as many bands")
    flag("--labels", help="SSL4EO-S12-ML json; else ssl4eo_multilabel.json in --data; or a table")
    flag("--holdout", type=float, help="ssl4eo, or a table without lists: share of scenes to use; "
         "else the run's, or 0.1")

    flag = parser.add_argument_group("which images train the head").add_argument
    flag("--lists", nargs="+", metavar="FILE", help="names to train on, [to validate on,] to test")
    flag("--exclude", nargs="*", default=[], metavar="FILE", help="names to leave out: snow, cloud")
    flag("--skip-missing", action="store_true", help="go on without listed images that are absent")
    flag("--split", nargs=3, type=float, metavar="N", help="without lists: shares of each class, "
         "or numbers of images, to train, validate, test; else the protocol's")
    flag("--train-frac", nargs="+", type=float, default=[1.0], help="shares to train on (1)")
    flag("--seeds", type=int, default=1, help="random networks, splits, shares (%(default)s)")
    flag("--seed", type=int, default=0, help="the first of these seeds (%(default)s)")

    flag = parser.add_argument_group("report").add_argument
    flag("--out", metavar="SVG", help="draw the value against the number of training images")
    flag("--bootstrap", type=int, default=200, help="resamplings for intervals (%(default)s)")
    flag("--classes", action="store_true", help="print a line for each class")

    flag = parser.add_argument_group("machine").add_argument
    flag("--cache", help="folder that keeps features for the next probe")
    flag("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(%(default)s)")
    flag("--workers", type=int, default=2, help="processes that read images (%(default)s)")

    args = parser.parse_args(argv)
    check_flags(args)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.feature = args.feature or PROTOCOLS[args.protocol].features[0]
    return args


def check_flags(args):
    """Raise ValueError for a value out of its range and for flags that do not go together."""
    for name, (low, high) in RANGES.items():
        values = getattr(args, name)
        if not isinstance(values, list):
            values = [values]
        for value in values:
            if value is not None and not low <= value <= high:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {value}: must lie in {low} to {high}")
    features = PROTOCOLS[args.protocol].features
    if args.feature and args.feature not in features:
        raise ValueError(f"--feature {args.feature}: protocol {args.protocol} takes "
                         f"{' '.join(features)}")
    if len(set(args.train_frac)) < len(args.train_frac):
        raise ValueError("--train-frac: a value twice")
    if args.out and len(args.train_frac) < 2:
        raise ValueError("--out: draws a curve, which needs several values of --train-frac")
    if args.task == "bigearthnet" and not args.lists:
        raise ValueError("--lists: bigearthnet needs them, names to train on and names to test on")
    if args.task == "ssl4eo" and (args.lists or args.split):
        raise ValueError("--lists, --split: ssl4eo tests on scenes held out, it takes neither")
    if args.lists and (len(args.lists) not in (2, 3) or args.split):
        raise ValueError("--lists: takes two or three files, and no --split beside it")
    if args.labels and args.split:
        raise ValueError("--split: divides classes, images of a table have several; take --lists")
    if args.labels and args.task not in ("ssl4eo", "folder"):
        raise ValueError(f"--labels: --task {args.task} has labels of its own")
    if args.task != "ssl4eo" and not args.data:
        raise ValueError(f"--task {args.task}: needs --data")
    if len(set(args.ckpt)) < len(args.ckpt):
        raise ValueError("--ckpt: a file twice")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device")


# ------------------------------------------------------------------------------------------ report


def mean(values):
    return round(float(np.mean(values)), 5)


def deviation(values):
    """The sample deviation of the values of several seeds; 0 of a single one."""
    if len(values) == 1:
        return 0.0
    return round(float(np.std(values, ddof=1)), 5)


def print_table(table, chosen):
    """Print a line for each row: mean ± deviation of each metric, and the heads that were chosen.

    table[name][metric] and chosen[name] are lists with an entry for each seed.
    """
    width = max(12, *map(len, table))
    print("".ljust(width), *[f"{metric:>17}" for metric in table["stats"]])
    for name, row in table.items():
        cells = []
        for values in row.values():
            cell = f"{np.mean(values):.4f}"
            if len(values) > 1:
                cell += f" ± {deviation(values):.4f}"
            cells.append(f"{cell:>17}")
        print(f"{name:{width}}", *cells, *chosen[name])


def compare(samples):
    """Intervals [low, high] of each row, and of what the first row gains over each other row.

    samples: {name: the metric on each resampling (draws,)}, as `bootstrap` gives it.
    """
    first = next(iter(samples))
    intervals = {}
    gains = {}
    for name, values in samples.items():
        intervals[name] = interval(values)
        if name != first:
            gains[name] = interval(samples[first] - values)
    return intervals, gains


def print_intervals(table, metric, intervals, gains):
    """Print the last seed's values with their intervals, then the first row's gains with theirs."""
    last = {name: row[metric][-1] for name, row in table.items()}
    first = next(iter(last))
    width = max(12, *map(len, last))
    print(f"{metric} of the last seed [95 % of bootstraps]")
    for name, (low, high) in intervals.items():
        print(f"{name:{width}} {last[name]:.3f} [{low:.3f}, {high:.3f}]")
    for name, (low, high) in gains.items():
        print(f"{first} - {name}: {last[first] - last[name]:+.3f} [{low:.3f}, {high:.3f}]")


def print_classes(classes, scores, targets, multi_label):
    """Print a line for each class: its test images, and how they fared.

    That is the class's average precision; with one class an image, how often each class was called.
    """
    for k, name in enumerate(classes):
        members = targets[:, k] > 0
        if multi_label:
            result = round(average_precision(scores[:, k], members), 4)
        else:
            calls = np.bincount(scores[members].argmax(1), minlength=len(classes))
            result = f"called {calls}"
        print(f"{name[:40]:40} {members.sum():6} {result}")


def print_bias(row):
    """Say how far the mean over batches lies from the average precision of all images at once."""
    bias = np.mean(row["mean_of_256s"]) - np.mean(row["micro_map"])
    print(f"mean_of_256s is biased: {bias:+.4f} against micro_map, one ranking of all test images")


def print_curve(rows, metric):
    """Print a row for each --train-frac: mean ± deviation of each network."""
    names = list(rows[0]["all"])
    print("share   images", *[f"{name[-17:]:>17}" for name in names])
    for row in rows:
        cells = []
        for name in names:
            values = row["all"][name][metric]
            cells.append(f"{np.mean(values):8.4f} ± {deviation(values):.4f}")
        print(f"{row['train_frac']:<7g} {row['n_train']:6}", *cells)


def draw_curve(path, rows, metric, title):
    """Draw the value of each network against the number of training images, as an SVG file."""
    colours = ["#1f5fa8", "#777777", "#c05020", "#3a8a3a", "#8040a0", "#a08000"]
    names = list(rows[0]["all"])
    means = {}
    for name in names:
        means[name] = [float(np.mean(row["all"][name][metric])) for row in rows]
    low = math.floor(10 * min(map(min, means.values()))) / 10  # the axis ends at tenths
    high = max(math.ceil(10 * max(map(max, means.values()))) / 10, low + 0.1)
    counts = [row["n_train"] for row in rows]
    decades = math.log10(max(counts) / min(counts)) or 1.0

    def x_of(count):
        return 60 + 380 * math.log10(count / min(counts)) / decades

    def y_of(value):
        return 280 - 230 * (value - low) / (high - low)

    lines = ['<svg xmlns="http://www.w3.org/2000/svg" width="640" height="340" '
             'font-family="Helvetica, Arial, sans-serif" font-size="12">',
             '<rect width="640" height="340" fill="white"/>',
             f'<text x="60" y="28" font-size="14" font-weight="bold">{escape(title)}</text>',
             '<text x="250" y="324" text-anchor="middle">training images</text>']
    for tick in np.arange(round(10 * low), round(10 * high) + 1) / 10:
        lines.append(f'<path d="M60 {y_of(tick):.1f}H440" stroke="#cccccc"/>'
                     f'<text x="52" y="{y_of(tick) + 4:.1f}" text-anchor="end">{tick:.1f}</text>')
    for count in counts:
        lines.append(f'<text x="{x_of(count):.1f}" y="300" text-anchor="middle">{count}</text>')
    for k, name in enumerate(names):
        colour = colours[k % len(colours)]
        points = " ".join(f"{x_of(n):.1f},{y_of(v):.1f}" for n, v in zip(counts, means[name]))
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" '
                     'stroke-width="2"/>')
        lines.append(f'<text x="455" y="{60 + 18 * k}" fill="{colour}">{escape(name[-26:])} '
                     f'{means[name][-1]:.3f}</text>')
    with data.file_errors(path, "not written", "its folder is gone"):
        Path(path).write_text("\n".join([*lines, "</svg>\n"]), encoding="utf-8")


# -------------------------------------------------------------------------------------------- main


def main(argv=None):
    """Probe as the flags say and return the JSON object of the last line.

    Raises ValueError or OSError, with one line that names it, for a flag or a file that is unfit.
    """
    args = parse(argv)
    protocol = PROTOCOLS[args.protocol]
    task = TASKS[args.task]
    if args.task == "folder" and args.labels:                  # a table: several classes an image
        task = replace(task, multi_label=True, metrics=MULTI_LABEL, value="micro_map")
    value, metric = value_metric(protocol, task)
    seeds = range(args.seed, args.seed + args.seeds)

    # ------------------------------------------------------------------------------------ networks
    checkpoints, sensor, holdout = load_networks(args, protocol, task)         # {name: network}
    first, first_net = next(iter(checkpoints.items()))
    stats = BandStatistics()
    networks = []                                              # {name: network} for each seed
    for seed in seeds:
        networks.append(checkpoints | {"random": random_network(first_net, seed), "stats": stats})
    to_describe = unique_networks(networks)
    if args.layers:
        blocks = Blocks(first_net, args.feature)
        to_describe.append(blocks)

    # ------------------------------------------------------- images to train, validate and test on
    scenes = open_scenes(args, protocol, task, sensor)
    splits = choose_images(args, protocol, task, scenes, holdout, seeds)       # {share: [split]}

    # ------------------------------------------------------------------------------------ features
    features, profile = describe_images(args, protocol, task, to_describe, scenes, splits)
    print(f"protocol {args.protocol}: {protocol.source}")
    print(f"input: {profile}; {first_net.size} px; feature of a ViT: {args.feature}")
    lr = learning_rate(protocol, task, first_net)
    problem = Problem(protocol, task, scenes, features, args.feature, lr)

    # ------------------------------------------------ a head for each share, seed and network
    rows = []
    for share in args.train_frac:
        table, chosen, scores, y_test = evaluate(problem, networks, splits[share], seeds)
        train, _, test = splits[share][-1]
        rows.append({"train_frac": share, "n_train": len(train), "all": table})

    # ----------------------------------------------------------------------------------- the table
    empty = int((~y_test.any(0)).sum())
    print(f"{len(train)} training, {len(test)} test images ({empty} classes have none: not in "
          f"macro), {args.seeds} seed(s): mean ± deviation")
    print_table(table, chosen)
    if protocol.batch_metric and task.multi_label:
        print_bias(table[first])
    report = {
        "task": args.task, "metric": value, "n_train": len(train), "n_test": len(test),
        "value": mean(table[first][value]), "random": mean(table["random"][value]),
        "stats": mean(table["stats"][value]), "seeds": args.seeds, "protocol": args.protocol,
        "std": deviation(table[first][value]), "chosen": chosen, "all": table,
        "empty_classes": empty, "ckpt": args.ckpt, "input": profile, "img_size": first_net.size,
        "feature": args.feature}

    # --------------------------------------------------------------- shares of the training images
    if len(rows) > 1:
        report["curve"] = rows
        print_curve(rows, value)
    if args.out:
        title = f"{value} on {args.task}, protocol {args.protocol}"
        draw_curve(args.out, rows, value, title)

    # ---------------------------------------------- intervals, classes and blocks of the last seed
    if args.bootstrap:
        samples = bootstrap(metric, scores, y_test, args.bootstrap)
        report["interval"], report["gain"] = compare(samples)
        print_intervals(table, value, report["interval"], report["gain"])
    if args.classes:
        print_classes(scenes.classes, scores[first], y_test, task.multi_label)
    if args.layers:
        report["layers"] = evaluate_blocks(problem, blocks, splits[share][-1], seeds[-1])
    print(json.dumps(report))
    return report


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"probe.py: error: {data.error_message(error)}")
