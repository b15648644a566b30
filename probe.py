"""What did the backbone learn?  Frozen features, one small head, by a protocol with a name.

    python probe.py --ckpt runs/softcon_s1/backbone.pt            the pack that the run trained on
    python probe.py --ckpt a.pt b.pt --data PACK                  two networks side by side
    python probe.py --ckpt a.pt --data PACK --protocol copernicus-bench --seeds 3
    python probe.py --ckpt a.pt --data PACK --lists train.txt test.txt --train-frac 0.01 0.1 1
    python probe.py --ckpt a.pt --data PACK_WITH_MASKS            what it knows of each pixel

The backbone never trains.  Each image becomes a row of features, once, and a small head learns to
tell the labels from these rows.  The same head is trained on the features of the checkpoint, on
those of "random", the same architecture with random weights, and on "stats", the mean and deviation
of each band, which need no network.  All are tested on the same images, and a checkpoint is worth
what it gains over the other two.  (How good the weights are that a run started from, the same run
tells with --max-steps 1 --lr 0, as one more --ckpt.)  The last line of the output is a JSON object,
values from 0 to 1.  Where a pack has masks, the head tells the class of each pixel from a map of
features, and "stats" are those of a window around it.

Which images train the head and which test it, the first of these rules that applies decides, and a
line of the output says so: (1) --lists; (2) the pack's own split; (3) if a checkpoint's run trained
on this pack, the scenes that it held out, half and half by a hash of their names; (4) if images
have several labels, all scenes (or --holdout of them), likewise; (5) else shares of each class,
drawn by the seed, or with --holdout as in (4).

"Linear probing" means several things in this field.  A protocol fixes what the network is given,
which features the head gets, how the head is trained, and what chooses its penalty.  Numbers of
different protocols do not compare.

[1] Caron et al. 2021, DINO: weighted nearest neighbours
[2] Copernicus-Bench of zhu-xlab/Copernicus-FM, 2025, by SoftCon's first author
[3] torchgeo-bench 0.4, 2026

Letters: n images, V views of an image, C bands, H W pixels, D features, L classes, m test images,
h w cells of a map of features
"""
import argparse
import json
import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")    # before torch is imported; why: see pretrain.py

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import model as models

# --------------------------------------------------------------------------------------- protocols

ANY_FEATURE = ("cls", "cls+mean", "mean", "4cls")              # see `describe`
BLOCKS = ("1", "4")                                            # of a map: see `feature_map`
FOUR_FLIPS = ((), (3,), (2,), (2, 3))                          # dimensions of (B,C,H,W) to mirror


@dataclass
class Protocol:
    """How features are judged.  What a protocol leaves open has a flag."""
    source: str                    # who measures so, and how
    head: str                      # what is trained: see `fit_head`
    features: tuple = ANY_FEATURE  # of a ViT: --feature takes one of them, by default the first
    size: int = 0                  # side to which images are resized; 0: as the network was trained
    views: tuple = ((),)           # of an image, for the head to train on; the first is the image
    zscore: bool = False           # are bands rescaled to mean 0 and deviation 1 over these images?
    clip_radar: bool = False       # is a radar image clipped to its own 1 % and 99 % quantiles?
    wants: str = ""                # of EuroSAT: the sensor that the pack should have
    shares: tuple = (0.7, 0, 0.3)  # of each class to train, validate and test on, if rule 5 decides
    validates: bool = False        # do validation images choose the penalty?
    # of SGD on one linear layer; dense: of AdamW, and a pixel has one label
    epochs: int = 0
    steps: int = 0                 # or so many, however few the images
    batch_size: int = 0
    weight_decay: float = 0.0
    lr_one_label: float = 0.0
    lr_multi_label: float = 0.0


PROTOCOLS = {
    "ridge": Protocol(
        source="ours: least squares, penalty by 5-fold cross-validation",
        head="ridge"),
    "logistic": Protocol(
        source="ours: logistic regression, penalty by 5-fold cross-validation",
        head="logistic"),
    "knn": Protocol(
        source="DINO [1]: 20 neighbours vote with exp(cosine / 0.07)",
        head="knn"),
    # [2] flips images anew in each epoch; here the features of the four flips are computed once
    "copernicus-bench": Protocol(
        source="Copernicus-Bench [2], by SoftCon's first author: SGD on the mean patch token",
        head="sgd", features=("mean",), size=224, views=FOUR_FLIPS, clip_radar=True,
        wants="eurosat-own", shares=(0.6, 0.2, 0.2),
        epochs=50, batch_size=64, weight_decay=1e-4, lr_one_label=0.1, lr_multi_label=1.0),
    "torchgeo-bench": Protocol(
        source="torchgeo-bench [3]: z-scores, logistic regression, C by validation, then refitted",
        head="validated logistic", features=("mean",), size=224, zscore=True,
        shares=(0.6, 0.2, 0.2), validates=True),
    # the head is theirs; rate, batch and number of steps are ours, nobody states theirs
    "dense": Protocol(
        source="torchgeo-bench's linear head [3]: batch norm, 1 x 1 convolution, AdamW; of a pixel",
        head="dense", features=BLOCKS,
        steps=500, batch_size=16, weight_decay=1e-4, lr_one_label=1e-2),
}

# ---------------------------------------------------------------------------------------- features


@dataclass
class Network:
    """A frozen network and the side, in pixels, to which it gets images; 0: as they are."""
    net: torch.nn.Module
    size: int


@dataclass
class Scaling:
    """What happens to the values of an image, float in [0,1], before a network."""
    clip: bool = False             # first clip each image and band to its own quantiles
    mean: torch.Tensor | float = 0.0           # of each band (C,1,1), to subtract
    std: torch.Tensor | float = 1.0            # of each band (C,1,1), to divide by


class BandStatistics(torch.nn.Module):
    """Mean and deviation of each band, for which nobody needs a network: (B,C,H,W) -> (B,2C)."""

    def forward(self, x):
        mean = x.mean((2, 3))                                  # (B,C)
        std = x.std((2, 3))
        return torch.cat([mean, std], 1)


class WindowStatistics(torch.nn.Module):
    """For each cell of 4 x 4 pixels its mean, and mean and deviation of the 16 x 16 around it.

    Two maps, as a ResNet gives: x (B,C,H,W) -> (B,C,H/4,W/4), (B,2C,H/4,W/4).
    """

    def feature_maps(self, x):
        around = partial(F.avg_pool2d, kernel_size=16, stride=4, padding=6, count_include_pad=False)
        mean = around(x)
        variance = around(x.square()) - mean.square()
        std = variance.clamp(min=0).sqrt()
        return F.avg_pool2d(x, 4), torch.cat([mean, std], 1)


def batches(rows):
    """Cut row numbers (n,) into arrays of 64."""
    return np.split(rows, range(64, len(rows), 64))


def read_images(pack, rows):
    """The images of these rows of the pack: (B,C,H,W) uint8."""
    x = np.empty((len(rows), *pack.images.shape[1:]), np.uint8)
    pack.read(rows, x)
    return torch.from_numpy(x)


def clip_quantiles(x):
    """Clip x (B,C,H,W) float to the 1 % and 99 % quantiles of each image and band.

    [2] clips decibels before they are scaled.  Both are monotone, so their order does not matter
    but for the rounding to 8 bits.
    """
    levels = torch.tensor([0.01, 0.99], device=x.device)
    low, high = torch.quantile(x.flatten(2), levels, dim=2)    # (B,C) each
    return x.clamp(low[..., None, None], high[..., None, None])


def band_moments(pack, rows):
    """Mean and deviation of each band over the images of these rows, in [0,1]: (C,1,1) each."""
    total = 0
    squares = 0
    for batch in batches(rows):
        x = read_images(pack, batch).double() / 255            # (B,C,H,W)
        total += x.sum((0, 2, 3))                              # (C,)
        squares += x.square().sum((0, 2, 3))
    pixels = len(rows) * pack.size ** 2
    mean = total / pixels
    std = (squares / pixels - mean ** 2).clamp(min=0).sqrt() + 1e-8            # B10 may be constant
    return mean.float()[:, None, None], std.float()[:, None, None]


def choose_scaling(protocol, pack, rows):
    """The Scaling under a protocol; rows: all images of the probe."""
    if protocol.zscore:
        mean, std = band_moments(pack, rows)
        return Scaling(mean=mean, std=std)
    return Scaling(clip=protocol.clip_radar and pack.sensor.kind == "radar")


def to_network(x, size, scaling, mirrored=()):
    """Images as a network gets them: x (B,C,H,W) uint8 -> float (B,C,size,size)."""
    x = x.to(torch.get_default_dtype())
    if scaling.clip:
        x = clip_quantiles(x)
    x = x / 255
    if size:
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    mean = torch.as_tensor(scaling.mean).to(x)
    std = torch.as_tensor(scaling.std).to(x)
    return (x.flip(mirrored) - mean) / std


def describe(net, x, feature):
    """Turn images x (B,C,H,W), float, into rows of features (B,D).

    Of a ViT these are its tokens after the final norm: "cls", "mean" of the last block's patches,
    "cls+mean" side by side, or "4cls", the CLS tokens of the last four blocks.  Any other network
    has only its output.  "1" and "4" are maps.
    """
    if feature in BLOCKS:
        return feature_map(net, x, int(feature))
    if not isinstance(net, models.ViT):
        return net(x)
    blocks = net.last_blocks(x, 4)                             # 4 x (cls (B,D), patches (B,N,D))
    cls = [cls for cls, _ in blocks]
    mean = blocks[-1][1].mean(1)                               # (B,D)
    parts = {
        "cls": [cls[-1]],
        "mean": [mean],
        "cls+mean": [cls[-1], mean],
        "4cls": cls}
    return torch.cat(parts[feature], 1)


def feature_map(net, x, blocks):
    """Turn images x (B,C,H,W), float, into maps of features (B,D,h,w).

    Of a ViT these are the patch tokens of its last blocks, side by side, after the final norm; of a
    ResNet its last two maps, the coarse one resized to the finer one.
    """
    if isinstance(net, models.ViT):
        grid = models.check_grid(*x.shape[2:], net.patch_size)
        tokens = [patches for _, patches in net.last_blocks(x, blocks)]        # (B,N,D) each
        return torch.cat(tokens, 2).mT.unflatten(2, grid)
    fine, coarse = net.feature_maps(x)[-2:]
    coarse = F.interpolate(coarse, fine.shape[2:], mode="bilinear")
    return torch.cat([fine, coarse], 1)


@torch.no_grad()
def compute_features(network, pack, splits, protocol, feature, scaling, device):
    """The features of the images in the splits, under each view: (V,n,D) float16, on the CPU.
    Maps are (V,n,D,h,w).

    View 0 is the image as it is, in which it is tested; the others are of training images alone.
    What is not computed is 0 and takes no memory: the system gives only what is written.
    Raises InputError for features that are not finite.
    """
    net = network.net.eval().to(device)
    features = None
    for v, mirrored in enumerate(protocol.views):
        rows = used_rows(splits, ["train"] if v else PARTS)
        for batch in tqdm(batches(rows), "features", leave=False, disable=None):
            x = read_images(pack, batch).to(device)            # (B,C,H,W)
            found = describe(net, to_network(x, network.size, scaling, mirrored), feature)
            if features is None:
                shape = len(protocol.views), len(pack.names), *found.shape[1:]
                features = np.zeros(shape, np.float16)
            found = found.half().cpu()                         # (B,D), (B,D,h,w)
            data.require(found.isfinite().all(), "features are not finite: NaN in the weights, or "
                                                 "beyond float16")
            features[v, batch] = found
    return torch.from_numpy(features)


# ------------------------------------------------------------------------------------------- heads
#
# A head takes x (n,D), features to train on; y (n,L), their labels, 0 or 1; x_test (m,D): tensors
# on one device.  It gives scores (m,L): the higher, the likelier the class.

FOLDS = 5                                                      # parts of the training rows
RIDGE_PENALTIES = np.logspace(-6, 2, 17)
LOGISTIC_PENALTIES = (1, 0.1, 0.01, 0.001, 0.0001)             # from strong to weak, see `logistic`
COSTS = np.logspace(-6, 4, 40)                                 # C, from strong to weak penalty [3]


def standardise(x, x_test):
    """Subtract the mean and divide by the deviation of each column of x, in float64."""
    x = x.double()
    mean = x.mean(0)
    std = x.std(0, correction=0) + 1e-8                        # a constant column stays 0
    return (x - mean) / std, (x_test.double() - mean) / std


def folds(scene):
    """The fold of each row, 0 to 4, from its scene (n,): rows of one scene share a fold.

    These are its seasons.  In two folds they would make validation too easy.
    """
    _, number = np.unique(scene, return_inverse=True)          # 0, 1, 2, ... without gaps
    return number % FOLDS


def cross_validated(fit, x, y, x_test, scene):
    """Choose a penalty by cross-validation on the training rows: scores (m,L) with the best one.

    fit(x, y, x_test) gives scores (penalties,m,L).  The best penalty has the least squared error
    on rows that were left out, one fold after the other.  scene (n,) is the scene of each row.
    """
    fold = torch.from_numpy(folds(scene)).to(x.device)
    errors = 0
    for f in range(int(fold.max()) + 1):
        left_out = fold == f
        scores = fit(x[~left_out], y[~left_out], x[left_out])  # (penalties,m,L)
        errors += (scores - y[left_out]).square().sum((1, 2))  # (penalties,)
    return fit(x, y, x_test)[int(errors.argmin())]


def ridge(x, y, x_test):
    """Fit linear maps by least squares, one for each penalty p: scores (penalties,m,L).

    Each minimises the mean over rows of |x W - y|^2, plus p |W|^2, in closed form and float64.
    One eigendecomposition of x^T x serves all penalties.
    """
    x, x_test = standardise(x, x_test)
    y = y.double()
    offset = y.mean(0)                                         # (L,), what the intercept gives
    n, D = x.shape
    if D <= n:
        values, vectors = torch.linalg.eigh(x.T @ x)           # (D,), (D,D)
    else:
        # x x^T is the smaller matrix, and its eigenvalues are those of x^T x that are not 0
        values, vectors = torch.linalg.eigh(x @ x.T)           # (n,), (n,n)
        vectors = x.T @ vectors / values.clamp(min=1e-9 * values[-1]).sqrt()   # (D,n)
    left = x_test @ vectors
    right = vectors.T @ (x.T @ (y - offset))
    scores = [left / (values + penalty * n) @ right + offset for penalty in RIDGE_PENALTIES]
    return torch.stack(scores)


def log_loss(logits, y, one_label):
    """Mean log loss of logits (n,L), a softmax or, of several labels, a sigmoid for each class."""
    if one_label:
        return F.cross_entropy(logits, y)
    return F.binary_cross_entropy_with_logits(logits, y)


def logistic(x, y, x_test, one_label, penalties=LOGISTIC_PENALTIES, accuracy=1e-4, iterations=200):
    """Fit logistic regressions, one for each penalty p: probabilities (penalties,m,L).

    Each minimises the mean log loss of a row (of several labels: the sum over classes) plus
    p / 2 |W|^2, by L-BFGS in float64, to a gradient below `accuracy`.  It starts where the one
    before, of a larger penalty, ended, which saves iterations.
    """
    x, x_test = standardise(x, x_test)
    y = y.double()
    W = x.new_zeros(x.shape[1], y.shape[1], requires_grad=True)
    b = x.new_zeros(1, y.shape[1], requires_grad=True)
    terms = 1 if one_label else y.shape[1]
    probabilities = []
    for penalty in penalties:
        optimiser = torch.optim.LBFGS([W, b], max_iter=iterations, tolerance_grad=accuracy,
                                      tolerance_change=accuracy / 100,
                                      line_search_fn="strong_wolfe")

        def loss_and_gradients():
            """At the present W and b; LBFGS calls it several times a step."""
            loss = terms * log_loss(x @ W + b, y, one_label)
            loss = loss + penalty / 2 * W.square().sum()
            optimiser.zero_grad()
            loss.backward()
            return loss

        optimiser.step(loss_and_gradients)
        logits = (x_test @ W + b).detach()                     # (m,L)
        probabilities.append(logits.softmax(1) if one_label else logits.sigmoid())
    return torch.stack(probabilities)


def validated_logistic(x, y, x_validation, y_validation, x_test, one_label):
    """Fit logistic regressions as [3] does: probabilities (m,L).

    scikit-learn's C weighs the summed log loss of n rows against |W|^2 / 2: the penalty on their
    mean is 1 / (C n).  The best C on the validation rows is fitted again with these rows.
    """
    # a rough fit is enough to choose: each starts where the one before ended
    penalties = 1 / (COSTS * len(x))
    scores = logistic(x, y, x_validation, one_label, penalties, accuracy=1e-5, iterations=100)
    metric, *_ = metrics_of(one_label).values()
    scores = scores.cpu().numpy()                              # (costs,.,L)
    targets = y_validation.cpu().numpy()
    values = [metric(s, targets) for s in scores]
    C = COSTS[np.argmax(values)]
    x = torch.cat([x, x_validation])
    y = torch.cat([y, y_validation])
    penalties = [1 / (C * len(x))]
    [scores] = logistic(x, y, x_test, one_label, penalties, accuracy=1e-7, iterations=1000)
    return scores


def knn(x, y, x_test, k=20, tau=0.07):
    """Let the k most similar training rows vote with exp(cosine / tau) [1]: scores (m,L)."""
    x = F.normalize(x.float())
    y = y.float()
    scores = []
    for rows in F.normalize(x_test.float()).split(1024):
        cosine, index = (rows @ x.T).topk(min(k, len(x)))      # (b,k), (b,k)
        votes = ((cosine - 1) / tau).exp()                     # with -1 no vote exceeds 1
        scores.append((votes[..., None] * y[index]).sum(1))    # (b,L)
    return torch.cat(scores)


def sgd(x, y, x_test, protocol, one_label, seed):
    """Train one linear layer by SGD on features as they are [2]: x (V,n,D) -> scores (m,L).

    Each epoch sees every image once, under a view drawn by chance.  The rate falls with a cosine to
    0, which is OneCycle without its warm-up.  Draws are made on the CPU: all devices get the same.
    """
    V, n, D = x.shape
    y = y.float()
    lr = protocol.lr_one_label if one_label else protocol.lr_multi_label
    generator = torch.Generator().manual_seed(seed)
    layer = torch.nn.Linear(D, y.shape[1])
    torch.nn.init.normal_(layer.weight, std=0.01, generator=generator)
    torch.nn.init.zeros_(layer.bias)
    layer.to(x.device)
    optimiser = torch.optim.SGD(layer.parameters(), lr, weight_decay=protocol.weight_decay)
    steps = protocol.epochs * math.ceil(n / protocol.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(protocol.epochs):
        for rows in torch.randperm(n, generator=generator).split(protocol.batch_size):
            view = torch.randint(V, (len(rows),), generator=generator)
            loss = log_loss(layer(x[view, rows]), y[rows], one_label)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        return layer(x_test)


def fit_head(protocol, features, labels, scene, split, one_label, seed, device):
    """Train the head of the protocol on the training images: scores (m,L) of the test images.

    features (V,n,D), labels (n,L), scene (n,) and split (n,) have a row for each image of the pack.
    """
    train, validation, test = [np.flatnonzero(split == part) for part in PARTS]
    x = features[:, train].to(device).float()                  # (V,.,D)
    y = torch.from_numpy(labels[train]).to(device)             # (.,L)
    x_test = features[0, test].to(device).float()              # (m,D)
    if protocol.head == "ridge":
        scores = cross_validated(ridge, x[0], y, x_test, scene[train])
    elif protocol.head == "logistic":
        fit = partial(logistic, one_label=one_label)
        scores = cross_validated(fit, x[0], y, x_test, scene[train])
    elif protocol.head == "knn":
        scores = knn(x[0], y, x_test)
    elif protocol.head == "sgd":
        scores = sgd(x, y, x_test, protocol, one_label, seed)
    else:
        x_validation = features[0, validation].to(device).float()
        y_validation = torch.from_numpy(labels[validation]).to(device)
        scores = validated_logistic(x[0], y, x_validation, y_validation, x_test, one_label)
    return scores.cpu().numpy()


# ------------------------------------------------------------------------------- the head of pixels


def pixel_logits(head, x, size):
    """Scores of each class (B,L,size,size) from maps of features x (B,D,h,w)."""
    return F.interpolate(head(x.float()), (size, size), mode="bilinear")


def fit_pixels(protocol, x, masks, L, seed, device):
    """Train batch norm and a 1 x 1 convolution on maps x (n,D,h,w) and masks (n,H,W) uint8.

    The loss is the mean over the labelled pixels of a batch; the rate falls with a cosine to 0.
    """
    generator = torch.Generator().manual_seed(seed)
    n, D = x.shape[:2]
    norm = torch.nn.BatchNorm2d(D)
    head = torch.nn.Sequential(norm, torch.nn.Conv2d(D, L, 1))
    torch.nn.init.normal_(head[1].weight, std=0.01, generator=generator)
    torch.nn.init.zeros_(head[1].bias)
    head.to(device)
    optimiser = torch.optim.AdamW(head.parameters(), protocol.lr_one_label,
                                  weight_decay=protocol.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, protocol.steps)
    left = []                                                  # batches of the epoch
    for _ in tqdm(range(protocol.steps), "head", leave=False):
        left = left or [*torch.randperm(n, generator=generator).split(protocol.batch_size)]
        rows = left.pop()
        y = masks[rows].to(device)                             # (B,H,W)
        logits = pixel_logits(head, x[rows].to(device), y.shape[-1])
        loss = F.cross_entropy(logits, y.long(), ignore_index=data.UNLABELLED)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return head.eval()


@torch.no_grad()
def confusion(head, x, masks, L, device):
    """(m,L,L): how many pixels of each image are of class i and taken for class j."""
    counts = []
    for maps, y in zip(x.split(16), masks.split(16)):
        logits = pixel_logits(head, maps.to(device), y.shape[-1])
        guess = logits.argmax(1).cpu()                         # (B,H,W)
        for guessed, mask in zip(guess, y.long()):             # (H,W) each
            pairs = (mask * L + guessed)[mask != data.UNLABELLED]
            counts.append(pairs.bincount(minlength=L * L).view(L, L))
    return torch.stack(counts).numpy()


def fit_dense(protocol, features, pack, split, seed, device):
    """Train a head for pixels on the training images: its confusion (m,L,L) on the test images."""
    L = len(pack.classes)
    train, test = [np.flatnonzero(split == part) for part in ("train", "test")]
    masks = [torch.from_numpy(pack.masks[rows]) for rows in (train, test)]
    head = fit_pixels(protocol, features[0, train], masks[0], L, seed, device)
    return confusion(head, features[0, test], masks[1], L, device)


# ----------------------------------------------------------------------------------------- metrics
#
# A metric takes scores (m,L) and labels (m,L), 0 or 1, and gives a number from 0 to 1.


def ranked_precision(scores, targets):
    """Average precision of one ranking, scores (n,), targets (n,) bool with at least one positive.

    It is the sum over thresholds of (recall_k - recall_(k-1)) precision_k, as scikit-learn defines
    it.  Images of equal score share a threshold, so that their order does not matter.
    """
    order = np.argsort(scores)[::-1]                           # from high to low
    scores = scores[order]
    differs = scores[1:] != scores[:-1]
    ends = np.flatnonzero(np.append(differs, True))            # end of each tie
    hits = np.cumsum(targets[order])[ends]                     # positives at or above a threshold
    gained_recall = np.diff(hits, prepend=0) / hits[-1]
    return np.sum(gained_recall * hits / (ends + 1))           # hits / (ends + 1) is the precision


def average_precision(scores, targets, average="micro"):
    """Average precision of scores (N,L), arrays or tensors of any type, against targets, 0 or 1.

    micro: one ranking of all N*L entries.  macro: the mean over the classes that have a positive;
    scikit-learn counts the others as 0, though they have no recall.  0.0 if nothing is positive.
    Raises ValueError for NaN scores, other shapes or another average.
    """
    scores = torch.as_tensor(scores).detach().cpu().double().numpy()           # bfloat16 as well
    targets = torch.as_tensor(targets).cpu().bool().numpy()
    if scores.shape != targets.shape:
        raise ValueError(f"average precision: scores {scores.shape}, targets {targets.shape}")
    if np.isnan(scores).any():
        raise ValueError("average precision: some scores are NaN, which have no order")
    if average not in ("micro", "macro"):
        raise ValueError(f"average precision: {average!r} is neither micro nor macro")
    if average == "micro":
        scores = scores.reshape(-1, 1)
        targets = targets.reshape(-1, 1)
    values = [ranked_precision(s, t) for s, t in zip(scores.T, targets.T) if t.any()]
    return float(np.mean(values)) if values else 0.0


def accuracy(scores, targets):
    return float(np.mean(scores.argmax(1) == targets.argmax(1)))


def class_iou(counts):
    """Intersection over union of each class (L,), over all pixels of the images in counts (m,L,L).

    NaN: neither in the masks nor guessed.
    """
    total = counts.sum(0)
    hits = np.diag(total)
    with np.errstate(invalid="ignore"):
        return hits / (total.sum(0) + total.sum(1) - hits)


def pixel_metrics(classes):
    """The metrics of masks, of counts (m,L,L), {name: function}.

    A class that is neither in the masks nor guessed has 0, and no say in mIoU.
    """
    metrics = {"miou": lambda counts, targets: float(np.nanmean(class_iou(counts))),
               "pixel_accuracy": lambda counts, targets: np.trace(counts.sum(0)) / counts.sum()}
    for k, name in enumerate(classes):
        metrics[name] = lambda counts, targets, k=k: float(np.nan_to_num(class_iou(counts)[k]))
    return metrics


def metrics_of(one_label):
    """The metrics of such labels, {name: function}.  The first one is the value of a probe."""
    if one_label:
        return {"accuracy": accuracy}
    return {"micro_map": average_precision,
            "macro_map": partial(average_precision, average="macro")}


def bootstrap(metric, scores, targets, draws):
    """Resample the test images `draws` times: {name: the metric of scores[name] on each (draws,)}.

    All names get the same resamplings.  So their differences are paired: they vary less than each
    value does, since an image that is hard for one is hard for the other.
    """
    n = len(targets)
    picks = np.random.default_rng(0).integers(0, n, (draws, n))
    values = {}
    for name, own in scores.items():
        values[name] = np.array([metric(own[pick], targets[pick]) for pick in picks])
    return values


# ------------------------------------------------------------------------------ pack and networks


@dataclass
class Run:
    """What the config.json beside a checkpoint says of the run that left it."""
    img_size: int
    holdout: float                 # share of the scenes that it did not train on, unless by_split
    bands: list                    # of its sensor
    pack: str                      # path of the pack that it trained on
    checksum: str                  # of that pack's scenes
    by_split: bool                 # did it train on the pack's split "train"?


def read_run(ckpt):
    """The Run that left a checkpoint; None if it is not known, as of a released file."""
    path = Path(ckpt).parent / "config.json"
    config = data.read_json(path) if path.exists() else {}
    if "pack" not in config:                                   # released files may have another
        return None
    flags = config["flags"]
    pack = config["pack"]
    return Run(flags["img_size"], flags["holdout"], config["sensor"]["bands"], pack["path"],
               pack["checksum"], pack["by_split"])


def open_pack(args):
    """Open --data, or the toy world's pack.

    For a dense probe the labels of an image are the classes in its mask: by them splits are chosen.
    """
    path = args.data
    if not path:
        channels = models.build_from(args.ckpt[0]).in_chans
        toy = {2: "s1", 13: "s2c"}
        data.require(channels in toy, f"{args.ckpt[0]}: takes {channels} channels, the toy world "
                                      f"has 2 or 13: name a pack with --data")
        path = data.toy_pack(toy[channels])
    pack = data.open_pack(path)
    print(f"{path}: {len(pack.names)} images of {len(pack.scenes)} scenes, {pack.sensor.name}, "
          f"{len(pack.classes)} classes", *pack.notes, sep="\n")
    if args.protocol == "dense":
        data.require(pack.masks is not None, f"{path}: has no masks: pack it with --masks")
        L = len(pack.mask_classes)
        found = np.stack([np.bincount(mask.ravel(), minlength=256) > 0 for mask in pack.masks])
        data.require(not found[:, L:data.UNLABELLED].any(), f"{path}: masks.npy has numbers beyond "
                                                            f"its {L} classes")
        pack.classes = pack.mask_classes
        pack.labels = found[:, :L]                             # (n,L)
        pack.one_label = False
    data.require(pack.labels.any(), f"{path}: its images have no labels: pack it with --labels")
    wanted = PROTOCOLS[args.protocol].wants
    if wanted and pack.sensor.name == "eurosat":
        print(f"{args.protocol} scales EuroSAT with its own mean and std, which this pack does not "
              f"have: pack it with --modality {wanted}")
    return pack


def load_network(ckpt, run, pack, args):
    """Build the Network in a checkpoint, check that it takes the pack's bands, and describe it."""
    bands = pack.sensor.bands
    net = models.build_from(ckpt, in_chans=len(bands))
    own = f"{net.in_chans} channels"
    origin = "not known what it was trained on, no config.json beside it"
    if run:
        own = f"the bands {' '.join(run.bands)}"
        origin = f"trained on {run.pack}"
    fits = net.in_chans == len(bands) and (run is None or run.bands == bands)
    data.require(fits, f"{ckpt}: takes {own}, {pack.path} has the {len(bands)} bands "
                       f"{' '.join(bands)}")
    sizes = [args.img_size, PROTOCOLS[args.protocol].size, run and run.img_size,
             getattr(net, "img_size", 224)]
    size = next(size for size in sizes if size)
    patch_size = getattr(net, "patch_size", 1)
    data.require(size % patch_size == 0, f"--img-size {size}: not a multiple of the {patch_size} "
                                         f"pixels of a patch of {ckpt}")
    print(f"{ckpt}: {type(net).__name__} {net.embed_dim} wide, {size} px, {origin}")
    return Network(net, size)


def random_network(network, seed):
    """The same architecture with random weights."""
    torch.manual_seed(seed)
    return Network(models.build(**network.net.spec), network.size)


# ------------------------------------------------------------------------------------------ splits
#
# A split (n,) says of each image of the pack whether it trains a head, validates a choice or tests:
# "train", "val", "test" or, for an image that is not used, "".

PARTS = ("train", "val", "test")


def scene_of_rows(pack):
    """The number of the scene of each image: (n,)."""
    scene = np.empty(len(pack.names), int)
    for i, rows in enumerate(pack.rows):
        scene[rows] = i
    return scene


def listed_rows(path, pack, scene):
    """The rows of the images that a text file names, with white space or commas between the names.

    A name is an image's or a scene's, as images.csv has it or without its folder and suffix; names
    that the pack does not have are passed over.  Raises InputError if it has none.
    """
    names = set(data.read_text(path).replace(",", " ").split())
    count = len(names)
    names |= {Path(name).stem for name in names if "/" not in name}
    rows = []
    for row, name in enumerate(pack.names):
        place = pack.scenes[scene[row]]
        if names & {name, Path(name).stem, place, Path(place).name}:
            rows.append(row)
    print(f"{path}: {count} names, {len(rows)} images of {pack.path}")
    data.require(rows, f"{path}: none of its {count} names is in {pack.path}")
    return rows


def split_by_lists(paths, pack, scene):
    """Split as two or three files of names say: to train on, [to validate on,] to test on."""
    data.require(len(paths) in (2, 3), "--lists: takes two or three files")
    parts = PARTS if len(paths) == 3 else ("train", "test")
    split = np.full(len(scene), "", "U5")
    for part, path in zip(parts, paths):
        rows = listed_rows(path, pack, scene)
        data.require((split[rows] == "").all(), f"{path}: has images of another list")
        split[rows] = part
    return split


def split_by_hash(pack, scene, holdout):
    """Split the share `holdout` of all scenes: half of these train a head, half test it."""
    split = np.full(len(scene), "", "U5")
    split[data.held_out(pack.scenes, holdout)[scene]] = "train"
    split[data.held_out(pack.scenes, holdout / 2)[scene]] = "test"     # a subset: the same hash
    return split


def split_by_class(labels, scene, shares, seed):
    """Split the scenes of each class by chance, by these shares to train, validate and test."""
    rng = np.random.default_rng(seed)
    labelled = np.flatnonzero(labels.any(1))
    scenes, first = np.unique(scene[labelled], return_index=True)
    kinds = labels[labelled[first]].argmax(1)                  # the class of each scene
    split = np.full(scene.max() + 1, "", "U5")
    for kind in np.unique(kinds):
        order = rng.permutation(scenes[kinds == kind])
        ends = np.round(np.cumsum(shares) * len(order)).astype(int)
        for part, chosen in zip(PARTS, np.split(order, ends)):
            split[chosen] = part
    return split[scene]


def choose_split(args, pack, scene, own, seed):
    """Decide by the first of five rules that applies: a split, and the reason in words.

    own: {ckpt: its Run}, of those that trained on this pack.
    """
    given = args.lists or (pack.split != "").any()
    data.require(not given or args.holdout is None, "--holdout: the split is given by --lists or "
                                                    "by the pack, which leaves no share to choose")
    if args.lists:                                                                       # rule 1
        return split_by_lists(args.lists, pack, scene), "by --lists"
    if given:                                                                            # rule 2
        return pack.split.copy(), "the pack's own split"
    reason = "no run is known to have trained on this pack"
    limit = 1.0
    for ckpt, run in own.items():
        if run.holdout < limit:
            limit = run.holdout
            reason = f"{ckpt} was trained on the others"
    if own or args.holdout or not pack.one_label:                                # rules 3 and 4
        holdout = args.holdout or limit
        data.require(holdout <= limit, f"--holdout {holdout}: more than {limit}, {reason}")
        return split_by_hash(pack, scene, holdout), (
            f"--holdout {holdout} of the scenes, by a hash of their names, half of them to train "
            f"and half to test ({reason})")
    shares = PROTOCOLS[args.protocol].shares                                             # rule 5
    return split_by_class(pack.labels, scene, shares, seed), (
        f"shares {shares} of each class to train, validate and test, drawn by the seed ({reason})")


def reduce_part(split, part, labels, share, one_label, rng):
    """Keep a share of the images of a part: of each class, at least one, if they have one label."""
    rows = np.flatnonzero(split == part)
    kinds = np.zeros(len(rows), int)
    if one_label:
        kinds = labels[rows].argmax(1)
    for kind in np.unique(kinds):
        members = rows[kinds == kind]
        kept = max(1, round(share * len(members)))
        split[members[rng.permutation(len(members))[kept:]]] = ""


def check_split(split, reason, pack, scene, own):
    """Raise InputError if a run trained on what would be tested, or there is nothing to learn."""
    train, test = [np.flatnonzero(split == part) for part in ("train", "test")]
    for ckpt, run in own.items():
        trained = ~data.held_out(pack.scenes, run.holdout)[scene]
        if run.by_split:
            trained = pack.split == "train"
            data.require(trained.any(), f"{ckpt}: was trained on the split `train` of {pack.path}, "
                                        f"which has no such split any more")
        count = trained[test].sum()
        data.require(count == 0, f"images to test on: {reason}: {ckpt} was trained on {count} of "
                                 f"these {len(test)}")
    data.require(len(train) and len(test), f"{len(train)} images to train on, {len(test)} to test: "
                                           f"{reason}")
    classes = pack.labels[train].any(0).sum()
    scenes = len(set(scene[train]))
    data.require(classes > 1 and scenes > 1,
                 f"the {len(train)} training images are of a single class or scene: {reason}")


def choose_splits(args, pack, scene, runs):
    """Decide which images each head trains, validates and tests on: {(share, seed): split}.

    runs: {ckpt: its Run or None}.
    """
    own = {ckpt: run for ckpt, run in runs.items() if run and run.checksum == pack.checksum}
    labelled = pack.labels.any(1)
    splits = {}
    for seed in range(args.seeds):
        split, reason = choose_split(args, pack, scene, own, seed)
        split[~labelled] = ""
        if PROTOCOLS[args.protocol].validates and "val" not in split:
            train = np.flatnonzero(split == "train")
            split[train[folds(scene[train]) == 0]] = "val"     # a fifth of the scenes
        for share in args.train_frac:
            reduced = split.copy()
            rng = np.random.default_rng(seed)
            if share < 1:                                      # of all images whose labels are used
                reduce_part(reduced, "train", pack.labels, share, pack.one_label, rng)
                reduce_part(reduced, "val", pack.labels, share, pack.one_label, rng)
            check_split(reduced, reason, pack, scene, own)
            splits[share, seed] = reduced
    print(f"images: {reason}; {(~labelled).sum()} without labels are left out")
    return splits


def used_rows(splits, parts=PARTS):
    """The rows of the images that some split has in one of these parts."""
    return np.flatnonzero(np.isin(list(splits.values()), parts).any(0))


# ------------------------------------------------------------------------------------------- flags


def resolve_flags(argv=None):
    """Read the flags.  InputError, or argparse's own error, names one that is unfit."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    share = data.number(float, 1e-6, 1)
    flag("--ckpt", nargs="+", required=True, help="of a run, or released; several are compared")
    flag("--data", metavar="PACK", help="a folder that `python data.py pack` made; else the pack "
         "that the run trained on, or the toy world")
    flag("--protocol", choices=list(PROTOCOLS), help="who measures; else dense if the pack has "
                                                     "masks, or ridge")
    flag("--feature", choices=[*ANY_FEATURE, *BLOCKS], help="of a ViT; else the protocol's first; "
                                                            "dense: of its last or last 4 blocks")
    flag("--img-size", type=data.number(int, 1, 4096), metavar="N",
         help="pixels a side; else the protocol's, the run's, the network's, or 224")
    flag("--lists", nargs="+", metavar="FILE", help="names to train on, [to validate on,] to test")
    flag("--holdout", type=share, metavar="X", help="share of the scenes to use: rules 3 to 5")
    flag("--train-frac", nargs="+", type=share, default=[1.0], metavar="X",
         help="shares of the training images to train on (1)")
    flag("--seeds", type=data.number(int, 1, 1000), default=1, metavar="N",
         help="how many random networks, splits, shares (%(default)s)")
    flag("--bootstrap", type=data.number(int, 0, 10 ** 6), default=200, metavar="N",
         help="resamplings for intervals (%(default)s)")
    flag("--device", default="auto", help="cpu, cuda, mps ...; auto: a GPU if there is one")
    args = parser.parse_args(argv)

    args.runs = {path: read_run(path) for path in args.ckpt}
    for run in args.runs.values():
        args.data = args.data or (run and run.pack)
    if not args.protocol:
        has_masks = os.path.exists(f"{args.data}/masks.npy")
        args.protocol = "dense" if has_masks else "ridge"
    protocol = PROTOCOLS[args.protocol]
    args.feature = args.feature or protocol.features[0]
    data.require(args.feature in protocol.features, f"--feature {args.feature}: protocol "
                 f"{args.protocol} takes {' '.join(protocol.features)}")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.head_device = "cpu" if args.device == "mps" else args.device          # no float64 on mps
    data.find_device(args.device)
    return args


# ------------------------------------------------------------------------------------------ report


def mean(values):
    return round(float(np.mean(values)), 5)


def deviation(values):
    """The sample deviation of the values of several seeds; 0 of a single one."""
    if len(values) == 1:
        return 0.0
    return round(float(np.std(values, ddof=1)), 5)


def print_table(table, share, n_train, n_test):
    """Print a line for each network: mean ± deviation of each metric.

    table[name][metric] is a list with a value for each seed.
    """
    width = max(12, *map(len, table))
    print(f"--train-frac {share:g}: {n_train} training images, {n_test} to test")
    print("".ljust(width), *[f"{metric:>17}" for metric in table["stats"]])
    for name, row in table.items():
        cells = []
        for values in row.values():
            cell = f"{np.mean(values):.4f}"
            if len(values) > 1:
                cell += f" ± {deviation(values):.4f}"
            cells.append(f"{cell:>17}")
        print(f"{name:{width}}", *cells)


def middle(values):
    """Where the middle 95 % of the values begin and end."""
    return np.quantile(values, (0.025, 0.975)).round(5).tolist()


def print_intervals(samples):
    """Print the interval of each network's value, and of what the first gains over each other.

    samples: {name: the metric on each resampling (draws,)}.  Returns both, {name: [low, high]}:
    95 % of the resamplings lie between these.
    """
    first = next(iter(samples))
    intervals = {}
    gains = {}
    for name, values in samples.items():
        low, high = intervals[name] = middle(values)
        line = f"{name}: [{low:.3f}, {high:.3f}]"
        if name != first:
            gained = samples[first] - values
            low, high = gains[name] = middle(gained)
            line += f"; {first} gains [{low:+.3f}, {high:+.3f}]"
        print(line)
    return intervals, gains


# -------------------------------------------------------------------------------------------- main


def main(argv=None):
    """Probe as the flags say and return the JSON object of the last line.

    Raises InputError, CheckpointError or OSError with a line that names the flag or the file.
    """
    args = resolve_flags(argv)
    protocol = PROTOCOLS[args.protocol]

    # -------------------------------------------------------------------------- pack and networks
    runs = args.runs
    dense = protocol.head == "dense"
    pack = open_pack(args)
    networks = {path: load_network(path, run, pack, args) for path, run in runs.items()}
    if len(networks) == 1:
        networks = {"checkpoint": networks[args.ckpt[0]]}
    first = next(iter(networks))
    stats = WindowStatistics() if dense else BandStatistics()
    networks |= {"random": None, "stats": Network(stats, 0)}                   # random: by the seed

    # ------------------------------------------------------------------------------------- images
    scene = scene_of_rows(pack)
    splits = choose_splits(args, pack, scene, runs)            # {(share, seed): (n,)}
    metrics = pixel_metrics(pack.classes) if dense else metrics_of(pack.one_label)
    value, metric = next(iter(metrics.items()))

    # ----------------------------- one matrix of features a network, one head a share and a seed
    print(f"protocol {args.protocol}: {protocol.source}; of a ViT: {args.feature}")
    scaling = choose_scaling(protocol, pack, used_rows(splits))
    features = {}                                              # {name: (V,n,D)}
    tables = {share: {} for share in args.train_frac}           # {share: {name: {metric: [.]}}}
    for seed in range(args.seeds):
        networks["random"] = random_network(networks[first], seed)
        for name, network in networks.items():
            if name == "random" or name not in features:
                features[name] = compute_features(network, pack, splits, protocol, args.feature,
                                                  scaling, args.device)
        for share, table in tables.items():
            split = splits[share, seed]
            scores = {}                                        # {name: (m,L)}
            targets = pack.labels[split == "test"]             # (m,L)
            for name, x in features.items():
                if dense:
                    scores[name] = fit_dense(protocol, x, pack, split, seed, args.head_device)
                else:
                    scores[name] = fit_head(protocol, x, pack.labels, scene, split,
                                            pack.one_label, seed, args.head_device)
                row = table.setdefault(name, {m: [] for m in metrics})
                for m, function in metrics.items():
                    row[m].append(round(function(scores[name], targets), 5))

    # ------------------------------------------------------------------------------------- report
    curve = []
    for share, table in tables.items():
        n_train = int((splits[share, seed] == "train").sum())
        curve.append({"train_frac": share, "n_train": n_train, "all": table})
        print_table(table, share, n_train, len(targets))
    report = {
        "metric": value, "n_train": n_train, "n_test": len(targets),
        "value": mean(table[first][value]), "random": mean(table["random"][value]),
        "stats": mean(table["stats"][value]), "seeds": args.seeds, "protocol": args.protocol,
        "std": deviation(table[first][value]), "all": table, "curve": curve, "ckpt": args.ckpt,
        "data": pack.path, "img_size": networks[first].size, "feature": args.feature}
    if args.bootstrap:
        print(f"{value} of the last seed, 95 % of {args.bootstrap} resamplings of the test images")
        samples = bootstrap(metric, scores, targets, args.bootstrap)
        report["interval"], report["gain"] = print_intervals(samples)
    print(json.dumps(report))
    return report


if __name__ == "__main__":
    try:
        main()
    except (data.InputError, models.CheckpointError, OSError) as error:
        sys.exit(f"probe.py: error: {error}")
