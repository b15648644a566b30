"""A look at why the soft term helps or not: its gradient, and how classes lie in the features.

    python tests/lab/why.py runs/study           after study.py run transfer, in that --work

A row for each of its runs.  Of the features of the test images, CLS of the last block, of unit
length:

between      share of their variance that lies between the means of the 21 scene classes, which
             pretraining saw no label of
before       the same of the block before the last
agreement    correlation of the cosine of two images with the similarity of their 17 labels
rank         their effective rank

and of those with the soft term, right labels and no mask, a mean over eight batches with the
weights at the end of the run:

embeddings   the soft term's share of the two terms' gradient norms, at the student's embeddings
features     the same at the backbone's features, which is what reaches the backbone
cosine       between these two gradients
"""
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data  # noqa: E402
import losses  # noqa: E402
import model  # noqa: E402
import pretrain  # noqa: E402
import probe  # noqa: E402
import study  # noqa: E402

CPU = torch.device("cpu")


def between_classes(z, kind):
    """Share of the variance of z (n,D) that lies between the means of its classes, kind (n,)."""
    means = torch.stack([z[kind == k].mean(0) for k in range(kind.max() + 1)])
    within = (z - means[kind]).square().sum()
    return float(1 - within / (z - z.mean(0)).square().sum())


@torch.no_grad()
def structure(backbone, size, classes, labels):
    """between, before, agreement, rank of a ViT; classes, labels: packs of the same images."""
    rows = np.flatnonzero(classes.split == "test")
    net = model.build_from(backbone)
    tokens = []                                                  # CLS of the last two blocks
    for batch in probe.batches(rows):
        x = probe.to_network(probe.read_images(classes, batch), size, probe.Scaling())
        tokens.append(torch.stack([cls for cls, _ in net.last_blocks(x, 2)]))
    before, z = F.normalize(torch.cat(tokens, 1), dim=2)         # (n,D) each
    kind = torch.from_numpy(classes.labels[rows].argmax(1))      # (n,)
    y = torch.from_numpy(labels.labels[rows])
    pairs = torch.triu_indices(len(z), len(z), 1).unbind()
    both = torch.stack([(z @ z.T)[pairs], losses.label_similarity(y, y)[pairs]])
    return (between_classes(z, kind), between_classes(before, kind), float(both.corrcoef()[0, 1]),
            losses.collapse(z)[1])


def soft_gradients(flags, out, batches=8):
    """embeddings, features, cosine of a run of SoftCon; flags: of pretrain.py."""
    args = pretrain.resolve_flags([*flags, "--device", "cpu", "--resume"])
    net = pretrain.networks(args, CPU, quiet=True)
    state = torch.load(f"{out}/last.pt", weights_only=True)
    net.student.load_state_dict(state["student"])
    net.teacher.load_state_dict(state["teacher"])
    features = []                                                # of the student's backbone
    net.student.backbone.register_forward_hook(lambda *call: features.append(call[-1]))
    rows = pretrain.draw_batches(args.scenes, args, 0, 1, 0, batches)
    found = []
    for step, (x, y) in enumerate(pretrain.read_ahead(args.pack, rows, CPU)):
        draws = pretrain.StepRandomness(args.seed, step, 0, 0, 1)
        result = pretrain.softcon_step(net, x, y, args, draws, {})
        hard = result.terms["info_nce"]
        soft = args.soft_weight * result.terms["soft"]
        gradients = [torch.autograd.grad(term, features[-1], retain_graph=True)[0].flatten()
                     for term in (hard, soft)]
        found.append([losses.soft_share(result.embeddings, hard, soft),
                      losses.soft_share(features[-1], hard, soft),
                      float(F.cosine_similarity(*gradients, dim=0))])
    return np.mean(found, 0)


def main(work):
    print("run".ljust(36), "between  before agreement  rank   embeddings features cosine")
    trained = {key: (run.train[name], run.seed) for run in study.all_runs()
               for key, name in run.keys.items() if run.study == "transfer"}
    for key, (train, seed) in trained.items():
        out = f"{work}/runs/{key}".replace(" ", "_")
        if not Path(out, "backbone.pt").exists():
            continue
        labels, classes = [data.open_pack(f"{work}/packs/ucm_{kind}_{seed}")
                           for kind in ("labels", "classes")]
        size = 112 if "112 px" in key else 64
        row = structure(f"{out}/backbone.pt", size, classes, labels)
        line = "{:36}{:9.3f}{:8.3f}{:10.3f}{:6.1f}".format(key.partition("/")[2], *row)
        if "17 labels" in key and "mask" not in key:
            # the weights come from the run, so --init would be read for nothing
            flags = [flag.replace("packs/", f"{work}/packs/") for flag in train]
            place = flags.index("--init")
            del flags[place:place + len(study.NATURAL)]
            line += "{:13.3f}{:9.3f}{:7.3f}".format(*soft_gradients(flags, out))
        print(line, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
