"""The upper mark of the toy world: a ResNet-18 trained on the labels themselves.

    python tests/lab/supervised.py --modality s2c          10 epochs, 6 minutes on one core

Trains on the labelled images of the scenes that pretraining sees, and tests on the images that
probe.py tests on, in the same metrics.  The last line is one JSON object.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))
import data  # noqa: E402
import model as models  # noqa: E402
import pretrain  # noqa: E402
import probe  # noqa: E402


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--modality", choices=["s1", "s2c"], required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def labelled_images(scenes, chosen):
    """The labelled images of the scenes with chosen[i]: x uint8 (n,C,H,W), y uint8 (n,L)."""
    images = []
    labels = []
    for i in tqdm(np.flatnonzero(chosen), "reading", leave=False):
        for s in range(len(scenes.files[i])):
            if scenes.labels[i][s].any():
                images.append(scenes.image(i, s))
                labels.append(scenes.labels[i][s])
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels))


def flipped(views):
    """float (B,C,H,W) -> the same, the whole batch mirrored and turned by chance."""
    for dims in ([2], [3], [2, 3]):
        if torch.rand(()) < 0.5:
            views = views.flip(dims)
    return views.contiguous(memory_format=torch.channels_last)


def train(net, x, y, args):
    """Binary cross-entropy on all classes; AdamW, cosine, warm-up in a tenth of the steps."""
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.05, fused=True)
    per_epoch = len(x) // args.batch_size
    total = args.epochs * per_epoch
    for step in tqdm(range(total), f"supervised {args.modality}"):
        position = step % per_epoch
        if position == 0:
            order = torch.randperm(len(x))
        rows = order[position * args.batch_size:][:args.batch_size]
        views = flipped(x[rows].float() / 255)                             # (B,C,H,W)
        loss = F.binary_cross_entropy_with_logits(net(views), y[rows].float())
        for group in optimiser.param_groups:
            group["lr"] = pretrain.schedule(step, total, args.lr, 0, total // 10)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@torch.no_grad()
def predict(net, x):
    """uint8 (n,C,H,W) -> scores (n,L)"""
    net.eval()
    scores = [net(part.float() / 255) for part in x.split(128)]
    return torch.cat(scores).numpy()


def main(argv=None):
    args = parse(argv)

    # ------------------------------------------------------------------------------------- data
    root = data.make_toy("toy")
    sensor = data.find_sensor(args.modality)
    scenes = data.SSL4EO(root, sensor, f"{root}/ssl4eo_multilabel.json")
    holdout = pretrain.PRESETS["softcon", "toy"]["holdout"]
    # pretraining leaves out the share `holdout` of the scenes; probe.py fits its head on one half
    # of these and tests it on the other
    x, y = labelled_images(scenes, ~data.held_out(scenes.ids, holdout))
    x_test, y_test = labelled_images(scenes, data.held_out(scenes.ids, holdout / 2))

    # ----------------------------------------------------------------------------------- network
    torch.manual_seed(args.seed)
    backbone = models.build("resnet18", x.shape[1])
    net = torch.nn.Sequential(backbone, torch.nn.Linear(backbone.embed_dim, y.shape[1]))
    net = net.to(memory_format=torch.channels_last)

    # --------------------------------------------------------------------------- training, testing
    train(net, x, y, args)
    scores = predict(net, x_test)
    row = {"modality": args.modality, "n_train": len(x), "n_test": len(x_test),
           "epochs": args.epochs, "seed": args.seed,
           "micro_map": round(probe.average_precision(scores, y_test.numpy(), "micro"), 5),
           "macro_map": round(probe.average_precision(scores, y_test.numpy(), "macro"), 5)}
    print(json.dumps(row))
    return row


if __name__ == "__main__":
    main()
