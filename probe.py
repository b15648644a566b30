"""What did the backbone learn?  Frozen features, one linear head.  [reading time: 6 minutes]

    python probe.py --ckpt runs/softcon_s1/backbone.pt                      toy world, multi-label
    python probe.py --ckpt backbone.pt --data DIR --task ssl4eo             SSL4EO-S12 and labels
    python probe.py --ckpt backbone.pt --data DIR --task eurosat --seeds 5  EuroSAT, 10 classes

Three rows every time, through the same head and on the same test images: the checkpoint, the same
architecture with random weights, and the floor, mean and standard deviation of each band.  The
backbone runs in eval() and is never trained; the head is ridge regression on standardised features,
its penalty cross-validated on the training part: closed form, so nothing depends on luck.
The last line is one JSON object, values 0 to 1.
"""
import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import model as models

# --------------------------------------------------------------------------------- features, head


@torch.no_grad()
def extract(backbones, images, size, device, batch_size=64, workers=0):
    """One pass over `images` -> ([features (n,D) of each backbone], stats (n,2C), labels (n,K)).

    Pixels as in training (uint8 / 255), resized to size x size, no augmentation.
    """
    for b in backbones:
        b.eval().to(device)
    rows, stats, labels = [[] for _ in backbones], [], []
    for x, y, _ in tqdm(DataLoader(images, batch_size, num_workers=workers), "features",
                        leave=False):
        x = x.to(device).float() / 255                                         # (B,C,P,P)
        stats.append(torch.cat([x.mean((2, 3)), x.std((2, 3))], 1).cpu())      # (B,2C)
        labels.append(y)
        if x.shape[-1] != size:
            x = torch.nn.functional.interpolate(x, (size, size), mode="bilinear", antialias=True)
        for out, b in zip(rows, backbones):
            out.append(b(x).float().cpu())                                     # (B,D)
    return [torch.cat(r).numpy() for r in rows], torch.cat(stats).numpy(), torch.cat(labels).numpy()


PENALTIES = np.logspace(-6, 2, 17)                                             # per training row


def ridge(x, y, x_test, group):
    """Scores (n_test,K) of a linear map fitted to multi-hot y (n,K) on features x (n,D), float64.

    Features are standardised by the training part.  The penalty is the one of PENALTIES with the
    smallest squared error in 5-fold cross-validation; rows of one group (n,), the seasons of a
    scene, stay in one fold, as they resemble each other.
    """
    def fit(x, y, at):                                                         # (17, n_at, K)
        mean, std, offset = (x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64) + 1e-8,
                             y.mean(0))
        x, at = (x - mean) / std, (at - mean) / std
        values, vectors = np.linalg.eigh(x.T @ x)                              # (D,), (D,D)
        left, right = at @ vectors, vectors.T @ (x.T @ (y - offset))           # (n_at,D), (D,K)
        return [left / (values + p * len(x)) @ right + offset for p in PENALTIES]
    fold = np.unique(group, return_inverse=True)[1] % 5
    if fold.max() < 1:
        raise ValueError("the head needs training images of at least two scenes")
    errors = sum(((np.stack(fit(x[fold != f], y[fold != f], x[fold == f])) - y[fold == f]) ** 2)
                 .sum((1, 2)) for f in range(min(5, fold.max() + 1)))          # (17,)
    return fit(x, y, x_test)[int(np.argmin(errors))]


# ----------------------------------------------------------------------------------------- metrics


def average_precision(scores, targets, average="micro"):
    """sum_n (R_n - R_(n-1)) P_n over distinct thresholds, as scikit-learn defines it.

    scores, targets (N,C).  micro pools all entries; macro is the mean over classes that have a
    positive (one without has no recall; scikit-learn counts it as 0).
    """
    scores, targets = np.asarray(scores), np.asarray(targets).astype(bool)
    columns = zip(scores.T, targets.T) if average == "macro" else [
        (scores.ravel(), targets.ravel())]
    values = []
    for s, t in columns:
        if t.any():
            order = np.argsort(-s, kind="stable")
            last = np.flatnonzero(np.append(np.diff(s[order]) != 0, True))     # end of each tie
            hits = np.cumsum(t[order])[last]
            values.append(np.sum(np.diff(hits, prepend=0) / hits[-1] * hits / (last + 1)))
    return float(np.mean(values)) if values else 0.0


def accuracy(scores, targets):
    return float((scores.argmax(1) == targets.argmax(1)).mean())


# ------------------------------------------------------------------------------------------ splits


def split(scenes, task, seed, train_frac, holdout):
    """Images for training and testing: two lists of (scene, season).

    ssl4eo: only scenes that pretraining held out take part, half of them to train the head, half to
    test it: on its own training scenes a network remembers what it would not know of others.
    Unlabelled images are left out; train_frac of the training images are drawn.  eurosat:
    stratified by class.
    """
    rng = np.random.default_rng(seed)
    if task == "ssl4eo":
        out, half = (data.held_out(scenes.ids, f) for f in (holdout, holdout / 2))
        pairs = [(i, s) for i in np.flatnonzero(out) for s in range(len(scenes.files[i]))]
        pairs = [(i, s) for i, s in pairs if scenes.labels[i][s].any()]
        train, test = ([p for p in pairs if half[p[0]] == side] for side in (False, True))
        keep = rng.permutation(len(train))[:round(train_frac * len(train))]
        train = [train[j] for j in sorted(keep)]
    else:
        train, test = [], []
        kind = np.array([y[0].argmax() for y in scenes.labels])
        for k in range(len(scenes.classes)):
            rows = rng.permutation(np.flatnonzero(kind == k))
            cut = round(train_frac * len(rows))
            train += [(i, 0) for i in rows[:cut]]
            test += [(i, 0) for i in rows[cut:]]
    if not train or not test:
        raise ValueError(f"split leaves {len(train)} training and {len(test)} test images")
    return train, test


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    flag = parser.add_argument
    flag("--ckpt", required=True, help="weights: backbone.pt of a run, or a released checkpoint")
    flag("--task", choices=["ssl4eo", "eurosat"], default="ssl4eo", help="what the labels are")
    flag("--data", help="folder; default: the toy world")
    flag("--labels", help="SSL4EO-S12-ML json; default: ssl4eo_multilabel.json in --data")
    flag("--modality", choices=list(data.BANDS), help="default: by the checkpoint's channels")
    flag("--img-size", type=int, help="default: the run's config.json, the position table, or 224")
    flag("--train-frac", type=float, help="share to train on; default 1, eurosat 0.7 of each class")
    flag("--holdout", type=float, help="share of scenes to use; default: the run's, or 0.1")
    flag("--seeds", type=int, default=1, help="random backbones, and draws of the training part\n"
         "(ssl4eo with all of it: there is one split, so rows 1 and 3 do not vary)")
    flag("--device", default="auto", choices=["auto", "cpu", "cuda"])
    flag("--workers", type=int, default=2, help="reading processes")
    args = parser.parse_args(argv)

    # ---------------------------------------------------------------------- checkpoint and data
    cuda = torch.cuda.is_available()
    device = ("cuda" if cuda else "cpu") if args.device == "auto" else args.device
    if device == "cuda" and not cuda:
        raise ValueError("--device cuda: no CUDA device")
    trained = models.build_from(args.ckpt, len(data.BANDS.get(args.modality, ())))
    config = Path(args.ckpt).parent / "config.json"
    config = json.loads(config.read_text()).get("flags", {}) if config.exists() else {}
    holdout = config.get("holdout", 0.1) if args.holdout is None else args.holdout
    if holdout > config.get("holdout", 1):
        raise ValueError(f"--holdout {holdout}: the run held out {config['holdout']}; it has "
                         f"trained on some of these scenes")
    if args.task == "eurosat" and config.get("labels") == "classes":
        raise ValueError(f"{args.ckpt}: was trained on the classes that this task tests")
    if not 0 < (1 if args.train_frac is None else args.train_frac) <= 1:
        raise ValueError(f"--train-frac {args.train_frac}: must lie in (0, 1]")
    size = args.img_size or config.get("img_size") or getattr(trained, "img_size", 224)
    modality = args.modality or {len(b): m for m, b in data.BANDS.items()}.get(trained.in_chans)
    if modality is None or len(data.BANDS[modality]) != trained.in_chans:
        raise ValueError(f"{args.ckpt}: {trained.in_chans} channels, modality {modality} has "
                         f"{len(data.BANDS.get(modality, ()))}")
    root = args.data or data.make_toy("toy")
    labels = args.labels or f"{root}/ssl4eo_multilabel.json"
    scenes = (data.SSL4EO(root, modality, labels) if args.task == "ssl4eo"
              else data.EuroSAT(root, modality))
    frac = args.train_frac or (1.0 if args.task == "ssl4eo" else 0.7)
    print(f"{args.ckpt}: {type(trained).__name__} {trained.embed_dim}, {modality}, {size} px; "
          f"{args.task} {root}: {len(scenes)} scenes, {len(scenes.classes)} classes")

    # ------------------------------------------------------------------------- features, once
    random = []
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        random.append(models.build(**trained.spec))
    splits = [split(scenes, args.task, seed, frac, holdout) for seed in range(args.seeds)]
    pairs = sorted({p for train, test in splits for p in train + test})
    images = data.Images(scenes, pairs)
    features, stats, y = extract([trained, *random], images, size, device, workers=args.workers)
    row, scene = {pair: j for j, pair in enumerate(pairs)}, np.array([i for i, _ in pairs])

    # ------------------------------------------------------------------------- heads and rows
    metrics = ({"micro_map": average_precision,
                "macro_map": lambda s, t: average_precision(s, t, "macro")}
               if args.task == "ssl4eo" else {"accuracy": accuracy})
    table = {name: {m: [] for m in metrics} for name in ("checkpoint", "random", "stats")}
    for seed, parts in enumerate(splits):
        train, test = ([row[p] for p in part] for part in parts)
        for name, x in zip(table, (features[0], features[1 + seed], stats)):
            scores = ridge(x[train], y[train], x[test], scene[train])
            for m, function in metrics.items():
                table[name][m].append(function(scores, y[test]))
    print(f"{len(train)} training and {len(test)} test images, mean ± deviation over {args.seeds} "
          f"seed(s)\n{'':12}" + "".join(f"{m:>18}" for m in metrics))
    for name, values in table.items():
        print(f"{name:12}" + "".join(f"{np.mean(v):>10.4f} ± {np.std(v):.4f}"
                                     for v in values.values()))
    m = next(iter(metrics))
    out = {"task": args.task, "metric": m, "n_train": len(train), "n_test": len(test)}
    out |= {k: round(float(np.mean(v[m])), 5)
            for k, v in zip(("value", "random", "stats"), table.values())}
    out |= {"std": round(float(np.std(table["checkpoint"][m])), 5), "seeds": args.seeds,
            "all": {k: {m: [round(a, 5) for a in v] for m, v in t.items()}
                    for k, t in table.items()},
            "ckpt": os.fspath(args.ckpt)}
    print(json.dumps(out))
    return out


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"probe.py: error: {str(error).strip().splitlines()[-1]}")
