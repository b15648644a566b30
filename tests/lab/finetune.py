"""Fine-tune a backbone on labelled images: what twenty lines of PyTorch do with it.

    python tests/lab/finetune.py runs/softcon_rgb/backbone.pt rgb --data DIR      DIR/{class}/*.png
    python tests/lab/finetune.py weights.pth rgb --data DIR --labels T.csv --lists fit.txt test.txt

All weights learn, by AdamW on crops of the images.  Without a table an image has the class of its
folder, and the result is the accuracy; with one it has several, and the result is average
precision.  Without lists 30 % of the images are held out.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import data  # noqa: E402
import model  # noqa: E402
import pretrain  # noqa: E402
import probe  # noqa: E402


def finetune(backbone, x, y, size, multi_label, epochs, lr, batch=32, seed=0):
    """x (n,C,H,W) uint8, y (n,L) of 0 and 1 -> the backbone with a linear layer, trained."""
    torch.manual_seed(seed)
    network = torch.nn.Sequential(backbone, torch.nn.Linear(backbone.embed_dim, y.shape[1]))
    network.train()
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * len(x.split(batch))
    step = 0
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            crops = data.draw_crops(len(rows), generator, area_min=0.5)
            logits = network(data.crop(x[rows], crops, size))                  # (B,L)
            if multi_label:
                loss = F.binary_cross_entropy_with_logits(logits, y[rows])
            else:
                loss = F.cross_entropy(logits, y[rows])
            optimiser.param_groups[0]["lr"] = pretrain.schedule(step, steps, lr, 0, steps // 10)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step += 1
    return network.eval()


@torch.no_grad()
def predict(network, x, size):
    """x (n,C,H,W) uint8 -> scores (n,L)"""
    scores = [network(probe.central_view(part, size)) for part in x.split(128)]
    return torch.cat(scores).numpy()


def listed(scenes, paths):
    """The numbers of the images that each file of names lists."""
    numbers = {name: i for i, name in enumerate(scenes.ids)}
    found = []
    for path in paths:
        found.append([numbers[name] for name in data.read_names(path, numbers)])
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("ckpt")
    parser.add_argument("sensor", help="as --modality of pretrain.py")
    parser.add_argument("--data", required=True)
    parser.add_argument("--labels", default="classes", help="a table, see README")
    parser.add_argument("--lists", nargs=2, help="names to train on, names to test on")
    parser.add_argument("--img-size", type=int, default=0,
                        help="else the ViT's, or for a ResNet the images'")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    scenes = data.Folder(args.data, data.find_sensor(args.sensor), labels=args.labels)
    x = torch.stack([torch.from_numpy(scenes.image(i, 0)) for i in range(len(scenes))])
    y = torch.stack([torch.from_numpy(labels[0]).float() for labels in scenes.labels])
    held_out = torch.from_numpy(data.held_out(scenes.ids, 0.3))
    train, test = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
    if args.lists:
        train, test = listed(scenes, args.lists)

    backbone = model.build_from(args.ckpt)
    size = args.img_size or getattr(backbone, "img_size", x.shape[-1])
    multi_label = args.labels != "classes"
    network = finetune(backbone, x[train], y[train], size, multi_label, args.epochs, args.lr,
                       seed=args.seed)
    scores = predict(network, x[test], size)
    row = {"n_train": len(train), "n_test": len(test)}
    if multi_label:
        row["micro_map"] = probe.average_precision(scores, y[test].numpy(), "micro")
        row["macro_map"] = probe.average_precision(scores, y[test].numpy(), "macro")
    else:
        row["accuracy"] = float(probe.accuracy(scores, y[test].numpy()))
    print(json.dumps(row))
    return row


if __name__ == "__main__":
    main()
