"""Probes by protocol, on real chips and on the toy world; one line each in results/probing.jsonl.

    python tests/lab/probing.py run NAME ...    runs these probes, or all that have no line yet
    python tests/lab/probing.py table           makes results/probing.md of the lines

The folder in which it runs must hold what the flags name: eurosat_ms and eurosat_rgb, folders of
EuroSAT's chips; vit_tiny_in1k.pth, timm's vit_tiny_patch16_224.augreg_in21k_ft_in1k; and
runs/softcon_s1, left by `pretrain.py --modality s1`.  vit_tiny_s2c.pth is made of the former: the
weights of red, green and blue start the input layer for those bands, the others start anew.
"""
import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import model  # noqa: E402
import probe  # noqa: E402
from lab import study, tables  # noqa: E402

# EuroSAT at its own 64 pixels: 224 would take 14 times as long
RGB = ["--task", "eurosat", "--data", "eurosat_rgb", "--ckpt", "vit_tiny_in1k.pth",
       "--split", "2000", "1000", "1000", "--img-size", "64"]
MS = ["--task", "eurosat", "--data", "eurosat_ms", "--ckpt", "vit_tiny_s2c.pth",
      "--seeds", "3", "--img-size", "64"]
TOY = ["--ckpt", "runs/softcon_s1/backbone.pt", "--seeds", "3"]
CURVE = ["--train-frac", "0.01", "0.05", "0.1", "1"]

RUNS = {
    "rgb torchgeo-bench": [*RGB, "--protocol", "torchgeo-bench", *CURVE],
    "rgb torchgeo-bench-knn": [*RGB, "--protocol", "torchgeo-bench-knn"],
    "rgb copernicus-bench": [*RGB, "--protocol", "copernicus-bench"],
    "rgb ridge": [*RGB, "--protocol", "ridge"],
    "ms torchgeo-bench": [*MS, "--protocol", "torchgeo-bench"],
    "ms torchgeo-bench-knn": [*MS, "--protocol", "torchgeo-bench-knn"],
    "ms copernicus-bench": [*MS, "--protocol", "copernicus-bench"],
    "ms ridge": [*MS, "--protocol", "ridge", "--layers"],
    "toy ridge": [*TOY, "--protocol", "ridge", *CURVE],
}


def adapt_to_s2c(source, path):
    """Start a network for the 13 bands of s2c from one for RGB."""
    torch.manual_seed(0)
    net = model.build("vit_tiny", 13, 224, 16, layerscale=False)
    model.load_pretrained(net, source, adapt="rgb")
    torch.save(model.export_backbone(net), path)


def run(name):
    """Run a probe and append its line."""
    flags = RUNS[name]
    if "vit_tiny_s2c.pth" in flags and not Path("vit_tiny_s2c.pth").exists():
        adapt_to_s2c("vit_tiny_in1k.pth", "vit_tiny_s2c.pth")
    if "--train-frac" in flags:
        flags = [*flags, "--out", f"{name.replace(' ', '_')}.svg"]
    start = time.time()
    report = probe.main([*flags, "--workers", "0", "--cache", "cache"])
    line = {"name": name, "command": f"python probe.py {' '.join(flags)}",
            "commit": study.commit(), "device": "cpu", "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version(),
            "minutes": round((time.time() - start) / 60, 1), **report}
    with (tables.RESULTS / "probing.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RUNS))
    args = parser.parse_args(argv)
    if args.what == "run":
        done = [line["name"] for line in tables.read_lines("probing")]
        for name in args.names or RUNS:
            if name not in done:
                run(name)


if __name__ == "__main__":
    main()
