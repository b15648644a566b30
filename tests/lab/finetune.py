"""Fine-tune a backbone on the classes of a folder: what twenty lines of PyTorch do with it.

    python tests/lab/finetune.py runs/softcon_rgb/backbone.pt DIR rgb        DIR/{class}/*.png
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import data  # noqa: E402
import model  # noqa: E402


def finetune(path, root, sensor, epochs=10, lr=1e-4):
    scenes = data.Folder(root, data.find_sensor(sensor))
    x = torch.stack([torch.from_numpy(scenes.image(i, 0)) for i in range(len(scenes))])
    y = torch.tensor([labels[0].argmax() for labels in scenes.labels])
    test = torch.from_numpy(data.held_out(scenes.ids, 0.3))
    train = (~test).nonzero()[:, 0]
    backbone = model.build_from(path)
    size = getattr(backbone, "img_size", x.shape[-1])
    network = torch.nn.Sequential(backbone, torch.nn.Linear(backbone.embed_dim, int(y.max()) + 1))
    optimiser = torch.optim.AdamW(network.train().parameters(), lr=lr, weight_decay=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in train[torch.randperm(len(train), generator=generator)].split(32):
            crops = data.draw_crops(len(rows), generator, area_min=0.5)
            loss = F.cross_entropy(network(data.crop(x[rows], crops, size)), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        images = F.interpolate(x[test] / 255, (size, size), mode="bilinear", antialias=True)
        return float((network.eval()(images).argmax(1) == y[test]).float().mean())


if __name__ == "__main__":
    print(f"accuracy on the 30 % of the images that were held out: {finetune(*sys.argv[1:]):.3f}")
