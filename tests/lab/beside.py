"""Does a network know more than band statistics?  A logistic head on both, side by side.

    python tests/lab/beside.py CKPT --modality s2c --data CHIPS --lists fit.txt test.txt

CHIPS are folders of classes in EuroSAT's format.  The head is probe.py's; it sees the features of
the network (CLS and the mean patch), the mean and deviation of each band, or all of them.
"""
import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import data  # noqa: E402
import model  # noqa: E402
import probe  # noqa: E402
from lab.finetune import listed  # noqa: E402


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("ckpt")
    parser.add_argument("--modality", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--lists", nargs=2, required=True, help="names to train on, and to test on")
    parser.add_argument("--img-size", type=int, default=64)
    args = parser.parse_args(argv)

    scenes = data.EuroSAT(args.data, data.find_sensor(args.modality))
    train, test = listed(scenes, args.lists)
    y = np.stack([labels[0] for labels in scenes.labels])                      # (n,L)

    net = model.build_from(args.ckpt)
    net.size = args.img_size                      # to which probe.extract resizes
    stats = probe.BandStatistics()
    images = data.Images(scenes, [(i, 0) for i in range(len(scenes))])
    rows = probe.extract([net, stats], images)
    features = {"network": rows[net][:, probe.columns(net, "cls+mean")], "stats": rows[stats]}
    features["both"] = np.concatenate([features["network"], features["stats"]], 1)

    fit = partial(probe.logistic, multi_label=False)
    result = {"n_train": len(train), "n_test": len(test)}
    for name, x in features.items():
        scores = probe.validated(fit, x[train], y[train], x[test], np.array(train))
        result[name] = round(float(probe.accuracy(scores, y[test])), 5)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
