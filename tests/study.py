"""The runs behind the README's results: trains, probes, keeps a line a run in tests/results/.

    python tests/study.py run softcon pera --workers 2      what is missing of these, two at a time
    python tests/study.py tables                            the README's tables, from tests/results/

A run is named study/name/modality/seed.  A line of tests/results/STUDY.jsonl has its flags, commit,
device, the last line of its log and what probe.py said; a run that has a line is not repeated, so
that a killed study goes on.  Checkpoints lie in runs/study/, EuroSAT's chips in --shared DIR
(folders eurosat_ms and eurosat_rgb).

softcon  InfoNCE, its two additions and both; then one factor at a time, on the toy world
pera     PerA with and without labels on the toy world, and what a supervised network reaches
init     what a network trained on another sensor is worth as a start, by --adapt
eurosat  real chips: pretrained without labels on 70 % of them, tested on the other 30 %, 3 splits
classes  real labels: half of the training chips have them, the soft term sees those
"""
import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import losses  # noqa: E402
import model as models  # noqa: E402
import pretrain  # noqa: E402
import probe  # noqa: E402

RESULTS = Path(__file__).parent / "results"

# ------------------------------------------------------------------------- switches without a flag


def one_direction():
    """The loss of q1 against k2 alone: (a + b) / 2 becomes a."""
    whole, turn = losses.softcon_loss, itertools.cycle((2, 0))

    def half(*args, **more):
        factor = next(turn)
        return tuple(factor * part for part in whole(*args, **more))
    losses.softcon_loss = half


def no_predictor():
    whole = models.Branch
    models.Branch = lambda backbone, hidden, predict: whole(backbone, hidden)


def labelled_only():
    """Images without labels do not take part."""
    whole = data.open_data

    def labelled(*args, **more):
        s = whole(*args, **more)
        kept = [np.flatnonzero(y.any(1)) for y in s.labels]
        rows = [i for i, k in enumerate(kept) if len(k)]
        return data.Scenes([s.ids[i] for i in rows], [[s.files[i][j] for j in kept[i]] for i in rows],
                           [s.labels[i][kept[i]] for i in rows], s.classes, s.modality, s.size,
                           s.decode, s.views)
    data.open_data = labelled


def scattered():
    """The same share of cells masked, each drawn on its own."""
    def mask(batch, grid, ratio, generator=None):
        n = grid[0] * grid[1]
        order = torch.rand(batch, n, generator=generator).argsort(1)
        return order[:, round(ratio * n):].sort(1).values
    losses.block_mask = mask


# ------------------------------------------------------------------------------------------- runs

SOFTCON = ["--epochs", "10"]
FACTORS = {                                       # name: flags, switch; the default stands first
    "both": ([], None), "InfoNCE": (["--soft-weight", "0", "--mask-ratio", "0"], None),
    "+ soft": (["--mask-ratio", "0"], None), "+ mask": (["--soft-weight", "0"], None),
    "form ce, weight 1": (["--soft-form", "ce", "--soft-weight", "1"], None),
    "form bce_mean": (["--soft-form", "bce_mean"], None),
    "soft-tau 0.1": (["--soft-tau", "0.1"], None), "soft-tau 0.5": (["--soft-tau", "0.5"], None),
    "soft-weight 0.1": (["--soft-weight", "0.1"], None),
    "soft-weight 2": (["--soft-weight", "2"], None),
    "mask-ratio 0.15": (["--mask-ratio", "0.15"], None),
    "mask-ratio 0.5": (["--mask-ratio", "0.5"], None),
    "mask cells of 8 px": (["--patch-size", "8"], None), "mask scattered": ([], scattered),
    "labelled images only": ([], labelled_only), "one direction": ([], one_direction),
    "no predictor": ([], no_predictor)}
PERA = ["--method", "pera", "--jitter", "1"]
CHIPS = ["--holdout", "0", "--arch", "vit_tiny", "--img-size", "64", "--patch-size", "8", "--jitter",
         "0.2", "--grey", "0", "--hidden", "512"]
CHIP_METHODS = {
    "PerA": ["--method", "pera", "--local-size", "32", "--crops", "2", "2", "--prototypes", "512",
             "--lr", "5e-4", "--momentum", "0.95", "--drop-path", "0"],
    "InfoNCE": ["--soft-weight", "0", "--mask-ratio", "0", "--lr", "5e-4", "--momentum", "0.95",
                "--crop-min", "0.3"],
    "InfoNCE + mask": ["--soft-weight", "0", "--lr", "5e-4", "--momentum", "0.95", "--crop-min",
                       "0.3"]}


def listing():
    """{key: (training flags, switch, [probe flags, ...])}, in the order in which they are run."""
    runs = {}

    def add(study, name, modality, seed, train, switch=None, probes=([],)):
        flags = ["--modality", modality, *train, "--seed", str(seed)]
        runs[f"{study}/{name}/{modality}/{seed}"] = flags, switch, list(probes)
    for seed, modality, name in itertools.product(range(3), ("s1", "s2c"), [*FACTORS][:4]):
        add("softcon", name, modality, seed, SOFTCON + FACTORS[name][0])
    for seed, name in itertools.product(range(3), [*FACTORS][4:]):
        add("softcon", name, "s1", seed, SOFTCON + FACTORS[name][0], FACTORS[name][1])
    for modality, epochs, seed in itertools.product(("s1", "s2c"), (28, 56), range(3)):
        if (modality, epochs) in (("s1", 28), ("s2c", 56)):
            add("softcon", f"both, {epochs} epochs", modality, seed, ["--epochs", str(epochs)])
    features = [["--feature", "cls"], ["--feature", "mean"]]
    for seed, modality, soft in itertools.product(range(3), ("s1", "s2c"), (0, 0.5)):
        add("pera", "PerA + soft" if soft else "PerA", modality, seed,
            [*PERA, "--soft-weight", str(soft)], probes=features)
    return runs


# ---------------------------------------------------------------------------------------- running


def path(key):
    return RESULTS / f"{key.split('/')[0]}.jsonl"


def rows(study):
    file = RESULTS / f"{study}.jsonl"
    return [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []


def one(key):
    """Train and probe; one line to the study's file."""
    flags, switch, probes = listing()[key]
    out, start = f"runs/study/{key.replace(' ', '_')}", time.time()
    if switch:
        switch()
    flags = [*flags, "--amp", "bf16", "--workers", "0", "--save-every", "1000000"]
    pretrain.main([*flags, "--out", out])
    log = json.loads(Path(out, "log.jsonl").read_text().splitlines()[-1])
    said = [probe.main(["--ckpt", f"{out}/backbone.pt", "--bootstrap", "0", "--cache",
                        "runs/study/cache", "--workers", "0", *more]) for more in probes]
    row = {"key": key, "flags": " ".join(flags), "switch": switch and switch.__name__,
           "commit": pretrain.commit(), "device": "cpu", "threads": torch.get_num_threads(),
           "torch": torch.__version__, "python": platform.python_version(),
           "minutes": round((time.time() - start) / 60, 2), "log": log,
           "probes": [{"flags": " ".join(more)} | {k: x[k] for k in ("n_train", "n_test", "all")}
                      for more, x in zip(probes, said)]}
    RESULTS.mkdir(exist_ok=True)
    with path(key).open("a") as file:
        file.write(json.dumps(row) + "\n")


def run(studies, workers):
    data.make_toy("toy")
    done = {row["key"] for study in studies for row in rows(study)}
    todo = [key for key in listing() if key.split("/")[0] in studies and key not in done]
    busy, environment = {}, os.environ | {"OMP_NUM_THREADS": "1"}
    while todo or busy:
        while todo and len(busy) < workers:
            key = todo.pop(0)
            said = Path("runs/study", f"{key.replace('/', '_')}.txt")
            said.parent.mkdir(parents=True, exist_ok=True)
            with said.open("w") as file:
                busy[key] = subprocess.Popen([sys.executable, __file__, "one", key],
                                             env=environment, stdout=file, stderr=file)
        time.sleep(1)
        for key, process in [*busy.items()]:
            if process.poll() is not None:
                print(key, f"exit {process.returncode}, {len(todo)} to go", flush=True)
                del busy[key]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["run", "one", "tables"])
    parser.add_argument("names", nargs="*", help="run: studies; one: a run's key")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each")
    args = parser.parse_args(argv)
    if args.what == "run":
        run(args.names, args.workers)
    elif args.what == "one":
        one(*args.names)


if __name__ == "__main__":
    main()
