"""The upper mark of the toy world: a ResNet-18 trained on the labels themselves.

    python tests/supervised.py --modality s2c          10 epochs, 6 minutes on one core

Trains on the scenes that pretraining sees, tests on the images that probe.py tests on, in the same
metrics.  The last line is one JSON object.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import model as models  # noqa: E402
import pretrain  # noqa: E402
import probe  # noqa: E402


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--modality", choices=["s1", "s2c"], required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    root, holdout = data.make_toy("toy"), pretrain.PRESETS["holdout"][0]
    scenes = data.SSL4EO(root, args.modality, f"{root}/ssl4eo_multilabel.json")
    mine = np.flatnonzero(~data.held_out(scenes.ids, holdout))
    pairs = [(i, s) for i in mine for s in range(len(scenes.files[i])) if scenes.labels[i][s].any()]
    test = probe.split(scenes, "ssl4eo", 0, 1.0, holdout)[1]

    def load(pairs):
        rows = [(scenes.image(i, s), scenes.labels[i][s]) for i, s in tqdm(pairs, leave=False)]
        return (torch.from_numpy(np.stack(v)) for v in zip(*rows))
    (x, y), (x_test, y_test) = load(pairs), load(test)
    torch.manual_seed(args.seed)
    backbone = models.build("resnet18", x.shape[1])
    net = torch.nn.Sequential(backbone, torch.nn.Linear(backbone.embed_dim, y.shape[1]))
    net = net.to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.05, fused=True)
    steps, total = len(x) // args.batch_size, args.epochs * (len(x) // args.batch_size)
    for step in tqdm(range(total), f"supervised {args.modality}"):
        if step % steps == 0:
            order = torch.randperm(len(x))
        rows = order[step % steps * args.batch_size:][:args.batch_size]
        views = x[rows].float() / 255
        for dims in ([2], [3], [2, 3]):                                # flips
            views = views.flip(dims) if torch.rand(()) < 0.5 else views
        loss = F.binary_cross_entropy_with_logits(
            net(views.contiguous(memory_format=torch.channels_last)), y[rows].float())
        for group in optimiser.param_groups:
            group["lr"] = pretrain.schedule(step, total, args.lr, 0, total // 10)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    net.eval()
    with torch.no_grad():
        scores = torch.cat([net(v.float() / 255) for v in x_test.split(128)]).numpy()
    row = {"modality": args.modality, "n_train": len(x), "n_test": len(x_test),
           "epochs": args.epochs, "seed": args.seed,
           "micro_map": round(probe.average_precision(scores, y_test), 5),
           "macro_map": round(probe.average_precision(scores, y_test, "macro"), 5)}
    print(json.dumps(row))
    return row


if __name__ == "__main__":
    main()
