"""What did the backbone learn?  Frozen features, one linear head.

    python probe.py --ckpt runs/softcon_s1/backbone.pt                      toy world, multi-label
    python probe.py --ckpt backbone.pt --data DIR --task eurosat --seeds 5  EuroSAT, 10 classes
    python probe.py --ckpt a.pt b.pt --data DIR --task bigearthnet --lists train.csv test.csv

The backbone never trains.  Each image becomes a row of features, once, and a small head learns to
tell the labels from these rows.  The same kind of head is fitted to the features of the checkpoint;
of "random", the same architecture with random weights; and to "stats", the mean and deviation of
each band, which need no network.  All are tested on the same images, and a checkpoint is worth what
it gains over the other two.  The last line of the output is a JSON object, values from 0 to 1.

[1] Oquab et al. 2023, DINOv2, appendix B.3: many linear heads, one chosen on a validation part
[2] Caron et al. 2021, DINO: weighted nearest neighbours
[3] SSL4EO-S12, linear_BE_moco.py and linear_EU_moco.py; FG-MAE, linear_BE_s1_mae.py
"""
import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
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
}


def describe(net, x):
    """Turn images x (B,C,H,W), float in [0,1], into rows of features.

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


def central_view(x, size=None, centre=1.0):
    """Cut out the centre of images and resize it.

    x (B,C,H,W) uint8 -> (B,C,size,size) float in [0,1].  centre is the share of each side that
    stays.  Without a size nothing is resized.
    """
    H, W = x.shape[-2:]
    rim = round(W * (1 - centre) / 2)
    x = x[..., rim:H - rim, rim:W - rim].float() / 255
    size = size or x.shape[-1]
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True)


@torch.no_grad()
def compute_features(nets, images, device, workers, centre, draw, area):
    """Pass over `images` once, as `extract` describes it: {net: float16 (n,D or 5D)}."""
    for net in nets:
        net.eval().to(device)
    rows = {net: [] for net in nets}
    generator = torch.Generator().manual_seed(draw)
    loader = DataLoader(images, 64, num_workers=workers)
    for x, _, _ in tqdm(loader, f"features, draw {draw}", leave=False):
        x = x.to(device)                                       # (B,C,H,W) uint8
        if draw:
            crops = data.draw_crops(len(x), generator, area)
            crops["flip_y"] = torch.ones(len(x))               # [3] mirror sideways only
        for net in nets:
            if draw:
                view = data.crop(x, crops, net.size or x.shape[-1])
            else:
                view = central_view(x, net.size, centre)
            rows[net].append(describe(net, view).half().cpu().numpy())
    return {net: np.concatenate(rows[net]) for net in nets}


def extract(nets, images, device="cpu", workers=0, cache=None, centre=1.0, draw=0, area=1.0):
    """Compute the features of `images` with each network: {net: float16 (n,D or 5D)}.

    draw 0: a network sees the central share `centre` of each side of an image.
    draw 1, 2, ...: it sees a random crop instead, mirrored sideways or not, that covers at least
    the share `area` of the image, as in [3].  The number of the draw is its seed.
    Each view is resized to net.size pixels a side, or keeps its size where that is None.
    cache: a folder that keeps features, so that the next call reads them instead.
    Raises ValueError for features that are not finite.
    """
    features = {}
    paths = {}
    if cache:
        view = f"centre {centre}"
        if draw:
            view = f"draw {draw}, area {area}"
        paths = cache_paths(cache, nets, images, view)
    for net, path in paths.items():
        if os.path.exists(path):
            with data.file_errors(path, "not a file of features"):
                features[net] = np.load(path)

    missing = [net for net in nets if net not in features]
    if missing:
        computed = compute_features(missing, images, device, workers, centre, draw, area)
        for net, rows in computed.items():
            if not np.isfinite(rows).all():
                raise ValueError("features are not finite: NaN in the weights, or beyond float16")
            if cache:
                save_features(paths[net], rows)
        features.update(computed)
    return {net: features[net] for net in nets}


def cache_paths(folder, nets, images, view):
    """Name a file for the features of each network: {net: path}.

    The name is a hash of all that the features depend on: the code, the sensor, the images, the
    view of them, the weights and the size.  Files count by name, size and time of the last change.
    """
    code = [__file__, data.__file__, models.__file__]
    pixels = [images.scenes.files[i][s] for i, s in images.pairs]
    common = hashlib.sha256(f"{images.scenes.sensor} {view}".encode())
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
        digest.update(f"{type(net)} {net.size}".encode())
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


def describe_images(args, nets, scenes, splits):
    """Compute the features of all images that some split trains or tests on.

    Returns images, a list of n pairs (scene, season), and features, {net: (n,D or 5D)}.  Every
    image comes once with its central view, then once more for each random crop of it.
    """
    whole = set()
    cropped = set()
    for train, test in splits:
        whole.update(train, test)
        cropped.update(train)                                  # images are tested as they are
    whole = sorted(whole)
    cropped = sorted(cropped)

    passes = [extract(nets, data.Images(scenes, whole), args.device, args.workers, args.cache,
                      centre=args.centre)]
    for draw in range(1, args.draws + 1):
        passes.append(extract(nets, data.Images(scenes, cropped), args.device, args.workers,
                              args.cache, draw=draw, area=args.area))
    features = {}
    for net in nets:
        features[net] = np.concatenate([part[net] for part in passes])
    print(f"features: {len(whole)} images")
    if args.draws:
        print(f"features: {args.draws} random crops of each of the {len(cropped)} to train on")
    return whole + args.draws * cropped, features


# ------------------------------------------------------------------------------------------- heads
#
# A head takes x (n,D), features to train on; y (n,L), their labels, 0 or 1; x_test (m,D).  It gives
# scores (m,L): the higher, the likelier the class.

HEADS = ["ridge", "logistic", "knn", "linear", "grid"]         # see `fit_head`
FOLDS = 5                                                      # parts of the training rows
RIDGE_PENALTIES = np.logspace(-6, 2, 17)
LOGISTIC_PENALTIES = (1, 0.1, 0.01, 0.001, 0.0001)             # from strong to weak, see `logistic`
RATES = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]         # [1]
GRID_FEATURES = ["cls", "cls+mean", "4cls", "4cls+mean"]                                      # [1]


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


def logistic(x, y, x_test, multi_label):
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
    for penalty in LOGISTIC_PENALTIES:
        optimiser = torch.optim.LBFGS([W, b], max_iter=200, tolerance_grad=1e-4,
                                      tolerance_change=1e-6, line_search_fn="strong_wolfe")

        def closure():
            logits = x @ W + b                                 # (n,L)
            if multi_label:
                loss = F.binary_cross_entropy_with_logits(logits, y) * y.shape[1]
            else:
                loss = F.cross_entropy(logits, y)
            loss = loss + penalty / 2 * W.square().sum()
            optimiser.zero_grad()
            loss.backward()
            return loss

        optimiser.step(closure)
        logits = (x_test @ W + b).detach()
        if multi_label:
            probabilities.append(logits.sigmoid().numpy())
        else:
            probabilities.append(logits.softmax(1).numpy())
    return np.stack(probabilities)


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


def sgd(x, y, use, rates, multi_label, steps, seed=0, batch=128):
    """Train H linear heads side by side by SGD and return their weights (D,H,L).

    x (n,D) and y (n,L) are the same for all.  Head h sees the columns where use[h] (H,D) is 1, and
    learns at rates[h] * batch / 256, momentum 0.9, with a cosine down to 0.  The loss is the cross
    entropy [1]; multi-label: the mean binary cross entropy over classes [3].

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


def linear(x, y, x_test, scene, use, rates, metric, multi_label, steps, seed):
    """Train H linear heads as `sgd` does and take the best one: its scores (m,L), index and value.

    use (H,D) and rates (H,) describe the heads.  Several heads train on four fifths of the scenes,
    and `metric` on the last fifth chooses: the test set has no say.  A single head has nothing to
    choose, trains on all rows, and has the value None.
    """
    x, x_test = standardise(x, x_test)
    x = F.pad(torch.from_numpy(x).float(), (0, 1), value=1)    # (n,D+1): a column of ones, the bias
    x_test = F.pad(torch.from_numpy(x_test).float(), (0, 1), value=1)          # (m,D+1)
    use = F.pad(use, (0, 1), value=1)                          # (H,D+1)
    y = torch.from_numpy(y).float()                            # (n,L)
    if len(rates) == 1:
        W = sgd(x, y, use, rates, multi_label, steps, seed)    # (D+1,1,L)
        return (x_test @ W[:, 0]).numpy(), 0, None

    left_out = torch.from_numpy(folds(scene) == 0)
    W = sgd(x[~left_out], y[~left_out], use, rates, multi_label, steps, seed)  # (D+1,H,L)
    values = []
    for head in W.unbind(1):
        scores = x[left_out] @ head
        values.append(float(metric(scores.numpy(), y[left_out].numpy())))
    best = int(np.argmax(values))
    return (x_test @ W[:, best]).numpy(), best, values[best]


def fit_sgd(args, task, net, x, y, x_test, scene, seed):
    """Fit the head "linear" or the best of "grid": scores (m,L), [feature, rate, value if chosen].

    x holds all features of the net.  A feature is chosen by a mask, not by cutting out columns, so
    that the heads of the grid can train side by side.
    """
    if args.head == "linear":
        heads = [(args.feature, args.lr)]
    else:
        features = GRID_FEATURES
        if not isinstance(net, models.ViT):
            features = ["cls"]                                 # any name: it selects all columns
        heads = list(product(features, RATES))
    use = torch.zeros(len(heads), x.shape[1])
    for mask, (feature, _) in zip(use, heads):
        mask[columns(net, feature)] = 1
    rates = torch.tensor([rate for _, rate in heads])
    metric = task.metrics[task.value]
    scores, best, value = linear(x, y, x_test, scene, use, rates, metric, task.multi_label,
                                 args.steps, seed)
    choice = list(heads[best])
    if value is not None:
        choice.append(value)
    return scores, choice


def fit_head(args, task, net, x, y, x_test, scene, seed):
    """Fit the head that --head names: scores (m,L) of the test rows, and what `fit_sgd` chose."""
    if args.head in ("linear", "grid"):
        return fit_sgd(args, task, net, x, y, x_test, scene, seed)
    seen = columns(net, args.feature)
    x = x[:, seen]
    x_test = x_test[:, seen]
    if args.head == "knn":
        return knn(x, y, x_test), None
    if args.head == "logistic":
        fit = partial(logistic, multi_label=task.multi_label)
        return validated(fit, x, y, x_test, scene), None
    return validated(ridge, x, y, x_test, scene), None


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
# An image is a pair (scene, season).  A split is two lists of images: to train a head, to test it.


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
    """Split as the files of --lists say, without what --exclude and --drop-unlabelled name."""
    index = {name: i for i, name in enumerate(scenes.ids)}
    if len(index) < len(scenes):
        raise ValueError("--lists: names do not suffice, two images in --data have the same name")
    excluded = set()
    for path in args.exclude:
        excluded.update(index[name] for name in data.read_names(path, index, skip=True))
    if args.drop_unlabelled:
        excluded.update(i for i, labels in enumerate(scenes.labels) if not labels.any())
    split = []
    for path in args.lists:
        numbers = [index[name] for name in data.read_names(path, index, skip=args.skip_missing)]
        split.append([(i, 0) for i in numbers if i not in excluded])
    train, test = split
    if set(train) & set(test):
        raise ValueError("--lists: images that are in both")
    return train, test


def draw_share(images, share, rng, replace=False):
    """Draw a share of the images, in their order.  replace: an image may come twice, as in [3]."""
    n = len(images)
    if replace:
        drawn = rng.choice(n, int(share * n))
    else:
        drawn = rng.permutation(n)[:round(share * n)]
    return [images[j] for j in sorted(drawn)]


def class_shares(scenes, share, rng):
    """Split each class by chance: `share` of its images to train a head, the others to test it."""
    train = []
    test = []
    for members in np.concatenate(scenes.labels).T:            # (n,) each
        order = [(i, 0) for i in rng.permutation(np.flatnonzero(members))]
        cut = round(share * len(order))
        train += order[:cut]
        test += order[cut:]
    return train, test


def check_split(scenes, train, test):
    """Raise ValueError if there is nothing to train or to test on, or nothing to tell apart."""
    if not train or not test:
        raise ValueError(f"split leaves {len(train)} training and {len(test)} test images")
    classes = np.any([scenes.labels[i][s] for i, s in train], 0)               # (L,)
    if classes.sum() < 2 or len({i for i, _ in train}) < 2:
        raise ValueError(f"the {len(train)} training images are of a single class or scene")


def choose_images(args, scenes, holdout, seeds):
    """Choose what each seed trains and tests on: [(train, test), ...]."""
    fixed = None                                               # the same for all seeds
    if args.lists:
        fixed = listed_images(args, scenes)
    elif TASKS[args.task].multi_label or args.labels:
        fixed = held_out_halves(scenes, holdout)
    share = args.train_frac
    if share is None:
        share = 1.0 if fixed else 0.7
    splits = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        if fixed:
            train, test = fixed
            train = draw_share(train, share, rng, args.replace)
        else:
            train, test = class_shares(scenes, share, rng)
        check_split(scenes, train, test)
        splits.append((train, test))
    return splits


def rows_of_split(images, train, test, draws):
    """Find the rows of features to train on and to test on, two lists of indices into `images`.

    With draws, the random crops of an image train in its place.  It is tested as it is.
    """
    rows = {image: [] for image in images}
    for j, image in enumerate(images):
        rows[image].append(j)                                  # its central view comes first
    training_rows = []
    for image in train:
        if draws:
            training_rows += rows[image][1:]
        else:
            training_rows += rows[image]
    test_rows = [rows[image][0] for image in test]
    return training_rows, test_rows


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


def load_networks(args, task):
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
        net.size = args.img_size or run.get("img_size") or getattr(net, "img_size", 224)
        held_out = run.get("holdout", "not known, no config.json beside it")
        print(f"{path}: {type(net).__name__} {net.embed_dim}, {net.size} px, "
              f"scenes held out: {held_out}")
    names = args.ckpt
    if len(nets) == 1:
        names = ["checkpoint"]
    return list(zip(names, nets)), sensor, choose_holdout(args, runs)


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


def open_scenes(args, task, sensor):
    """Open the images of the task in --data, or in the toy world, which is made if need be."""
    root = args.data or data.make_toy("toy")
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


# ------------------------------------------------------------------------------------------- flags

RANGES = {                         # of each flag that is a number: the least and the largest value
    "img_size": (1, 4096),
    "train_frac": (1e-6, 1.0),
    "lr": (0.0, 1e6),
    "steps": (1, 10 ** 8),
    "holdout": (0.0, 1.0),
    "seeds": (1, 1000),
    "seed": (0, 2 ** 32),
    "centre": (0.1, 1.0),
    "draws": (0, 1000),
    "area": (0.01, 1.0),
    "bootstrap": (0, 10 ** 6),
    "workers": (0, 1000),
}


def parse(argv=None):
    """Read the flags.  ValueError, or argparse's own error, names one that is unfit."""
    parser = argparse.ArgumentParser(description="Probe frozen features", allow_abbrev=False)

    flag = parser.add_argument_group("network").add_argument
    flag("--ckpt", nargs="+", required=True, help="of a run, or released; several are compared")
    flag("--img-size", type=int, help="pixels a side; else the run's, the position table's, or 224")

    flag = parser.add_argument_group("images and labels").add_argument
    flag("--task", choices=list(TASKS), default="ssl4eo", help="what the labels are (%(default)s)")
    flag("--data", help="folder of the images; else the toy world")
    flag("--modality", help="a sensor; else the run's, or the one with as many bands")
    flag("--labels", help="SSL4EO-S12-ML json; else ssl4eo_multilabel.json in --data; or a table")
    flag("--holdout", type=float, help="ssl4eo: share of scenes to use; else the run's, or 0.1")

    flag = parser.add_argument_group("which images train the head").add_argument
    flag("--lists", nargs=2, metavar="FILE", help="names to train on, names to test on")
    flag("--exclude", nargs="*", default=[], metavar="FILE", help="names to leave out: snow, cloud")
    flag("--drop-unlabelled", action="store_true", help="leave out listed images of no class")
    flag("--skip-missing", action="store_true", help="go on without listed images that are absent")
    flag("--train-frac", type=float, help="share to train on; else 1, or 0.7 of each class")
    flag("--replace", action="store_true", help="draw that share with replacement, as published")
    flag("--seeds", type=int, default=1, help="random networks, draws of the share (%(default)s)")
    flag("--seed", type=int, default=0, help="the first of these seeds (%(default)s)")

    flag = parser.add_argument_group("views").add_argument
    flag("--centre", type=float, default=1.0, help="share of each side that is seen (%(default)s)")
    flag("--draws", type=int, default=0, help="train on so many random crops of an image instead")
    flag("--area", type=float, default=0.8, help="least share of an image in a crop (%(default)s)")

    flag = parser.add_argument_group("head").add_argument
    flag("--head", choices=HEADS, default="ridge", help="what is fitted (%(default)s)")
    flag("--feature", choices=list(FEATURES), default="cls", help="of a ViT (%(default)s)")
    flag("--lr", type=float, default=0.1, help="of linear, for a batch of 256 (%(default)s)")
    flag("--steps", type=int, default=12500, help="of linear and grid, 128 rows each (%(default)s)")

    flag = parser.add_argument_group("report").add_argument
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
    return args


def check_flags(args):
    """Raise ValueError for a value out of its range and for flags that do not go together."""
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {value}: must lie in {low} to {high}")
    if args.task == "bigearthnet" and not args.lists:
        raise ValueError("--lists: bigearthnet needs two, names to train on and names to test on")
    if args.task == "ssl4eo" and args.lists:
        raise ValueError("--lists: ssl4eo tests on scenes held out, it takes no lists")
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


# -------------------------------------------------------------------------------------------- main


def main(argv=None):
    """Probe as the flags say and return the JSON object of the last line.

    Raises ValueError or OSError, with one line that names it, for a flag or a file that is unfit.
    """
    args = parse(argv)
    task = TASKS[args.task]
    if args.task == "folder" and args.labels:                  # a table: several classes an image
        task = replace(task, multi_label=True, metrics=MULTI_LABEL, value="micro_map")
    seeds = range(args.seed, args.seed + args.seeds)

    # ------------------------------------------------------------------------------------ networks
    checkpoints, sensor, holdout = load_networks(args, task)   # [(name, network), ...]
    first, first_net = checkpoints[0]
    randoms = [random_network(first_net, seed) for seed in seeds]
    stats = BandStatistics()

    # ----------------------------------------------------------------- images to train and test on
    scenes = open_scenes(args, task, sensor)
    splits = choose_images(args, scenes, holdout, seeds)       # [(train, test), ...]

    # ------------------------------------------------------------------------------------ features
    nets = [net for _, net in checkpoints] + randoms + [stats]
    images, features = describe_images(args, nets, scenes, splits)             # n, {net: (n,F)}
    scene = np.array([i for i, _ in images])                                   # (n,)
    labels = np.stack([scenes.labels[i][s] for i, s in images])                # (n,L)

    # ------------------------------------------------------------- a head for each seed and network
    table = {}                                                 # table[name][metric]: a value a seed
    chosen = {}
    for name in [name for name, _ in checkpoints] + ["random", "stats"]:
        table[name] = {metric: [] for metric in task.metrics}
        chosen[name] = []
    for seed, random, (train, test) in zip(seeds, randoms, splits):
        train_rows, test_rows = rows_of_split(images, train, test, args.draws)
        y_test = labels[test_rows]
        scores = {}
        for name, net in [*checkpoints, ("random", random), ("stats", stats)]:
            x = features[net]
            scores[name], choice = fit_head(args, task, net, x[train_rows], labels[train_rows],
                                            x[test_rows], scene[train_rows], seed)
            if choice:
                chosen[name].append(choice)
            for metric, function in task.metrics.items():
                value = float(function(scores[name], y_test))
                table[name][metric].append(round(value, 5))

    # ----------------------------------------------------------------------------------- the table
    empty = int((~y_test.any(0)).sum())
    print(f"{len(train)} training, {len(test)} test images ({empty} classes have none: not in "
          f"macro), {args.seeds} seed(s): mean ± deviation")
    print_table(table, chosen)
    report = {
        "task": args.task, "metric": task.value, "n_train": len(train), "n_test": len(test),
        "value": mean(table[first][task.value]), "random": mean(table["random"][task.value]),
        "stats": mean(table["stats"][task.value]), "seeds": args.seeds, "head": args.head,
        "std": deviation(table[first][task.value]), "chosen": chosen, "all": table,
        "empty_classes": empty, "ckpt": args.ckpt}

    # ------------------------------------------------------ intervals and classes of the last seed
    if args.bootstrap:
        samples = bootstrap(task.metrics[task.value], scores, y_test, args.bootstrap)
        report["interval"], report["gain"] = compare(samples)
        print_intervals(table, task.value, report["interval"], report["gain"])
    if args.classes:
        print_classes(scenes.classes, scores[first], y_test, task.multi_label)
    print(json.dumps(report))
    return report


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"probe.py: error: {data.error_message(error)}")
