"""The runs behind the README's results: trains, probes, keeps a line a run in tests/results/.

    python tests/study.py run softcon pera --workers 2      what is missing of these, two at a time,
                                                            one thread each, or OMP_NUM_THREADS
    python tests/study.py run eurosat 'pera/*/s1/0' --shared DIR    DIR: eurosat_ms and eurosat_rgb
    python tests/study.py tables                            the README's tables, from tests/results/
    python tests/study.py curve runs/softcon_s1 x.svg       a run's log as a figure

A run is named study/name/modality/seed.  A line of tests/results/STUDY.jsonl has its flags, commit,
device, the last line of its log and what probe.py said; a run that has a line is not repeated, so
that a killed study goes on.  Checkpoints lie in runs/study/.

softcon  InfoNCE, its two additions and both, on the toy world, 14 epochs; 5 seeds on s1, 3 on s2c
factors  one factor of SoftCon, or of PerA, at a time, on radar images, some on optical ones
long     InfoNCE, + soft and both at the preset's 28 epochs, with and without the predictor
pera     PerA with and without labels on the toy world
supervised   the same ResNet-18 trained on the labels themselves, tests/supervised.py
costs    speed and memory of each switch at 224 px, tests/bench.py; wants an idle machine
init     what a network trained on another sensor is worth as a start, by --adapt
eurosat  real chips: pretrained without labels on 70 % of them, tested on the other 30 %, 3 splits;
         and without labels on all, tested on 30 %, 5 splits
classes  the soft term on the classes of 30 % of the MS chips, the probe on the other 70 %
"""
import argparse
import fnmatch
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import data  # noqa: E402
import losses  # noqa: E402
import model as models  # noqa: E402
import pretrain  # noqa: E402
import probe  # noqa: E402
import supervised  # noqa: E402

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
        files = [[s.files[i][j] for j in kept[i]] for i in rows]
        labels = [s.labels[i][kept[i]] for i in rows]
        return data.Scenes([s.ids[i] for i in rows], files, labels, s.classes, s.modality, s.size,
                           s.decode, s.views)
    data.open_data = labelled


def scattered():
    """The same share of cells masked, each drawn on its own."""
    def mask(batch, grid, ratio, generator=None):
        n = grid[0] * grid[1]
        order = torch.rand(batch, n, generator=generator).argsort(1)
        return order[:, round(ratio * n):].sort(1).values
    losses.block_mask = mask


def no_vertical_flip():
    whole = data.draw_crops
    data.draw_crops = lambda n, *more: whole(n, *more) | {"flip_y": torch.ones(n)}


def betas():
    """AdamW's usual (0.9, 0.999)."""
    whole = torch.optim.AdamW
    torch.optim.AdamW = lambda groups, **more: whole(groups, **more | {"betas": (0.9, 0.999)})


def decay_everything():
    """Weight decay on norms and biases, too."""
    whole = torch.optim.AdamW
    torch.optim.AdamW = lambda groups, **more: whole(
        [{"params": [p for group in groups for p in group["params"]]}], **more)


def small_layerscale():
    """LayerScale from 1e-5, as DINOv2 is trained."""
    class Small(models.LayerScale):
        def __init__(self, dim):
            super().__init__(dim)
            torch.nn.init.constant_(self.gamma, 1e-5)
    models.LayerScale = Small


def one_offset():
    """VV and VH offset by the same decibels."""
    whole = data.draw_colours

    std = torch.tensor(data.STATS["s1"][1])

    def drawn(*args):
        p = whole(*args)
        return p | {"offset": p["offset"][:, :1] * (std[0] / std)}
    data.draw_colours = drawn


def as_optical():
    """Radar images in other brightness and contrast."""
    whole = data.draw_colours
    data.draw_colours = lambda n, modality, *more: whole(n, "s2c", *more)


# ------------------------------------------------------------------------------------------- runs

SOFTCON = ["--epochs", "14"]
FACTORS = {                                       # name: flags, switch; the default stands first
    "both": ([], None), "InfoNCE": (["--soft-weight", "0", "--mask-ratio", "0"], None),
    "+ soft": (["--mask-ratio", "0"], None), "+ mask": (["--soft-weight", "0"], None),
    "form ce, weight 1": (["--soft-form", "ce", "--soft-weight", "1"], None),
    "form bce_mean": (["--soft-form", "bce_mean"], None),
    "soft-tau 0.1": (["--soft-tau", "0.1"], None), "soft-tau 0.5": (["--soft-tau", "0.5"], None),
    "soft-weight 0.1": (["--soft-weight", "0.1"], None),
    "soft-weight 2": (["--soft-weight", "2"], None),
    "mask-ratio 0.5": (["--mask-ratio", "0.5"], None),
    "mask cells of 8 px": (["--patch-size", "8"], None), "mask scattered": ([], scattered),
    "labelled images only": ([], labelled_only), "one direction": ([], one_direction),
    "no predictor": ([], no_predictor), "no vertical flip": ([], no_vertical_flip),
    "crops from 0.2, grey 0.2": (["--crop-min", "0.2", "--grey", "0.2"], None),
    "lr 1.5e-4": (["--lr", "1.5e-4"], None), "lr 1.5e-3": (["--lr", "1.5e-3"], None),
    "betas .9 .999": ([], betas), "momentum 0.99": (["--momentum", "0.99"], None),
    "ViT, LayerScale 1": (["--arch", "vit_tiny", "--patch-size", "8"], None),
    "ViT, LayerScale 1e-5": (["--arch", "vit_tiny", "--patch-size", "8"], small_layerscale)}
PERA = ["--method", "pera", "--jitter", "1"]
PERA_FACTORS = {"PerA, one offset": one_offset, "PerA, brightness and contrast": as_optical,
                "PerA, decay everything": decay_everything}
TINY = ["--holdout", "0", "--arch", "vit_tiny", "--img-size", "64", "--patch-size", "8",
        "--hidden", "512", "--lr", "5e-4", "--momentum", "0.95"]
CHIPS = {
    "PerA": ["--method", "pera", "--local-size", "32", "--crops", "2", "2", "--prototypes", "512",
             "--drop-path", "0"],
    "InfoNCE": ["--soft-weight", "0", "--mask-ratio", "0", "--crop-min", "0.3"],
    "InfoNCE + mask": ["--soft-weight", "0", "--crop-min", "0.3"]}
SENSOR = {"s2c": ["--epochs", "20", "--batch-size", "32", "--jitter", "0.2", "--grey", "0"],
          "rgb": ["--epochs", "3", "--batch-size", "64"]}
RGB_SOURCE = ["--holdout", "0", "--arch", "resnet18", "--img-size", "32", "--patch-size", "4",
              "--hidden", "512", "--lr", "5e-4", "--momentum", "0.9", "--crop-min", "0.3",
              "--soft-weight", "0", "--epochs", "2", "--batch-size", "32"]
COSTS = {         # bench.py's flags; of --method pera the crops are 224 and 96 px, 4,096 prototypes
    "SoftCon, all tokens": ["--part", "step", "--mask-ratio", "0"],
    "SoftCon, 30 % masked, the preset": ["--part", "step"],
    "SoftCon, 60 % masked": ["--part", "step", "--mask-ratio", "0.6"],
    "SoftCon, 30 % masked, no soft term": ["--part", "step", "--soft-weight", "0"],
    "SoftCon, 30 % masked, bf16": ["--part", "step", "--amp", "bf16"],
    "PerA, all tokens in both networks": ["--part", "dense"],
    "PerA": ["--part", "sparse"],
    "PerA, soft term": ["--part", "sparse", "--soft-weight", "0.5"],
    "PerA, no local crops": ["--part", "sparse", "--crops", "2", "0"],
    "PerA, bf16": ["--part", "sparse", "--amp", "bf16"]}


def folder(key):
    return f"runs/study/{key.replace(' ', '_')}"


def listing():
    """{key: (training flags, switch, [probe flags, ...])}, in the order in which they are run."""
    runs, every, seeds = {}, [["--feature", "cls"], ["--feature", "cls+mean"]], range(3)

    def add(study, name, modality, seed, train, switch=None, probes=([],)):
        flags = ["--modality", modality, *train, "--seed", str(seed)]
        runs[f"{study}/{name}/{modality}/{seed}"] = flags, switch, list(probes)

    def chips(study, name, modality, seed, share, *flags, heads=("ridge",), switch=None):
        at = f"runs/study/chips/{modality}_{share}_{seed}"
        probes = [["--task", "eurosat", "--data", f"{at}/all", "--modality", modality, "--lists",
                   f"{at}/fit.txt", f"{at}/test.txt", *more, "--head", head, "--bootstrap", "200",
                   "--seed", str(seed), "--img-size", "64"] for more in every for head in heads]
        add(study, name, modality, seed, ["--data", f"{at}/train", *flags], switch,
            probes if study != "init" else [])
    for seed, modality, name in itertools.product(range(5), ("s1", "s2c"), [*FACTORS][:4]):
        if seed in seeds or modality == "s1":
            add("softcon", name, modality, seed, SOFTCON + FACTORS[name][0])
    for seed, name in itertools.product(seeds, ("soft-weight 2", "form ce, weight 1",
                                                "no predictor")):
        add("factors", name, "s2c", seed, SOFTCON + FACTORS[name][0], FACTORS[name][1])
    for seed, name in itertools.product(range(5), [*FACTORS][4:]):
        if seed in seeds or name == "no predictor":
            add("factors", name, "s1", seed, SOFTCON + FACTORS[name][0], FACTORS[name][1])
    for seed, name in itertools.product(seeds, PERA_FACTORS):
        add("factors", name, "s1", seed, PERA, PERA_FACTORS[name])
    for seed, modality, name in itertools.product(seeds, ("s2c", "s1"), [*FACTORS][:3]):
        add("long", f"{name}, no predictor", modality, seed, FACTORS[name][0], no_predictor)
        add("long", name, modality, seed, FACTORS[name][0],
            probes=[["--seeds", "3"] if (seed, name) == (0, "both") else []])
    for seed, modality, soft in itertools.product(seeds, ("s1", "s2c"), (0, 0.5)):
        add("pera", "PerA + soft" if soft else "PerA", modality, seed,
            [*PERA, "--soft-weight", str(soft)],
            probes=[["--feature", f, *["--seeds", "3"] * (seed == 0)] for f in ("cls", "mean")])
    for seed, name in itertools.product(seeds, CHIPS):
        chips("eurosat", name, "s2c", seed, 70, *TINY, *SENSOR["s2c"], *CHIPS[name],
              heads=("ridge", "logistic"))
    for seed in seeds:
        chips("eurosat", "+ mask, no predictor", "s2c", seed, 70, *TINY, *SENSOR["s2c"],
              *CHIPS["InfoNCE + mask"], heads=("ridge", "logistic"), switch=no_predictor)
    every_chip = "runs/study/chips/s2c_70_0/all"
    add("eurosat", "PerA, all chips", "s2c", 0,
        ["--data", every_chip, *TINY, *SENSOR["s2c"], *CHIPS["PerA"]],
        probes=[["--task", "eurosat", "--data", every_chip, "--seeds", "5", *f, "--head", head]
                for f in every for head in ("ridge", "logistic")])
    for name in CHIPS:
        chips("eurosat", name, "rgb", 0, 70, *TINY, *SENSOR["rgb"], *CHIPS[name])
    for seed, weight in itertools.product(seeds, (0, 0.5)):
        chips("classes", "+ soft on classes" if weight else "InfoNCE + mask", "s2c", seed, 30,
              *TINY, *SENSOR["s2c"], *CHIPS["InfoNCE + mask"], "--labels", "classes",
              "--soft-weight", str(weight))
    chips("init", "InfoNCE, ResNet-18", "rgb", 0, 70, *RGB_SOURCE)
    for modality in ("s1", "s2c"):
        runs[f"supervised/10 epochs/{modality}/0"] = ["--modality", modality], None, []
    for name, flags in COSTS.items():
        runs[f"costs/{name}/s2c/0"] = flags, None, []
    source = {"s1": "softcon/both/s2c/{}", "s2c": "init/InfoNCE, ResNet-18/rgb/0"}
    for seed, modality in itertools.product(seeds, source):
        for adapt in ("none", "random", "mean") + ("rgb",) * (modality == "s2c"):
            start = ["--init", f"{folder(source[modality].format(seed))}/backbone.pt", "--adapt",
                     adapt] if adapt != "none" else []
            add("init", adapt, modality, seed, ["--epochs", "3", *start])
    return runs


def make_chips(root, at):
    """Folders at/all and at/train of links to the chips of `root`, and lists at/{fit,test}.txt.

    `at` ends in MODALITY_SHARE_SEED: SHARE % of each class are to pretrain on. 70: the head is fit
    on the same, 30 % are the test; 30: the head is fit on another 30 %, 40 % are the test.
    """
    modality, share, seed = Path(at).name.split("_")
    names, rng = {"fit": [], "test": []}, np.random.default_rng(int(seed))
    for c in sorted(x for x in Path(root).iterdir() if x.is_dir()):
        files = sorted(c.iterdir())
        files = [files[i] for i in rng.permutation(len(files))]
        first, last = round(int(share) / 100 * len(files)), round(0.6 * len(files))
        train, rest = files[:first], files[first:]
        fit, test = (train, rest) if share == "70" else (files[first:last], files[last:])
        for kind, some in (("all", files), ("train", train)):
            Path(at, kind, c.name).mkdir(parents=True)
            for file in some:
                Path(at, kind, c.name, file.name).symlink_to(file.resolve())
        names["fit"] += [f.name for f in fit]
        names["test"] += [f.name for f in test]
    for kind, some in names.items():
        Path(at, f"{kind}.txt").write_text("\n".join(some))


# ---------------------------------------------------------------------------------------- running


def rows(study):
    """The lines of tests/results/STUDY.jsonl."""
    file = RESULTS / f"{study}.jsonl"
    return [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []


def commit():
    """Short git hash of the code, with + when any file but the results differs from it."""
    words = ["git", "diff", "--quiet", "HEAD", "--", ".", ":!tests/results"]
    changed = subprocess.run(words, cwd=RESULTS.parent.parent).returncode
    return pretrain.commit().rstrip("+") + "+" * (changed != 0)


def keep(key, flags, **more):
    """One line to the study's file, unless it is there: of a run that others start from."""
    if any(row["key"] == key for row in rows(key.split("/")[0])):
        return
    row = {"key": key, "flags": " ".join(flags), "commit": commit(), "device": "cpu",
           "threads": torch.get_num_threads(), "torch": torch.__version__,
           "python": platform.python_version()} | more
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{key.split('/')[0]}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def one(key):
    """A run and its line: train and probe, or what the two other scripts say."""
    flags, switch, probes = listing()[key]
    out, start = folder(key), time.time()
    if key.startswith("supervised"):
        return keep(key, flags, **supervised.main(flags))
    if key.startswith("costs"):
        bench = [sys.executable, Path(__file__).parent / "bench.py", "--json", *flags]
        said = json.loads(subprocess.run(bench, capture_output=True, check=True).stdout)
        return keep(key, flags, **{k: v for k, v in said.items() if k != "machine"})
    shutil.rmtree(out, ignore_errors=True)                             # of a run that was ended
    if switch:
        switch()
    flags = [*flags, "--amp", "bf16", "--workers", "0", "--save-every", "1000000"]
    pretrain.main([*flags, "--out", out])
    log = json.loads(Path(out, "log.jsonl").read_text().splitlines()[-1])
    said = [probe.main(["--ckpt", f"{out}/backbone.pt", "--bootstrap", "0", "--cache",
                        "runs/study/cache", "--workers", "0", *more]) for more in probes]
    known = ("n_train", "n_test", "all", "interval", "difference")
    keep(key, flags, switch=switch and switch.__name__, minutes=(time.time() - start) / 60, log=log,
         probes=[{"flags": " ".join(more)} | {k: x[k] for k in known if k in x}
                 for more, x in zip(probes, said)])


def run(names, workers, shared):
    """The runs of studies, or with keys like these, that have no line yet, `workers` at a time."""
    data.make_toy("toy")
    plan = listing()
    done = {row["key"] for study in {key.split("/")[0] for key in plan} for row in rows(study)}
    todo = dict.fromkeys(key for name in names for key in plan if key not in done
                         and (key.startswith(f"{name}/") or fnmatch.fnmatch(key, name)))

    def source(key):
        """The run whose network this one starts from."""
        flags = plan[key][0]
        return next((k for k in plan if f"{folder(k)}/backbone.pt" in flags), None)
    lost = [k for k in map(source, todo) if k and not Path(folder(k), "backbone.pt").exists()]
    todo = [*dict.fromkeys([*lost, *todo])]
    for at in {Path(x).parent for key in todo for x in plan[key][0] if "/chips/" in x}:
        if not at.exists():
            make_chips(Path(shared, "eurosat_rgb" if at.name.startswith("rgb") else "eurosat_ms"),
                       at)
    busy, environment = {}, {"OMP_NUM_THREADS": "1"} | os.environ
    while todo or busy:
        while todo and len(busy) < workers:
            key = next((k for k in todo if source(k) not in [*busy, *todo]), None)
            if key is None:
                break                                        # all that is left waits for a source
            todo.remove(key)
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


# ----------------------------------------------------------------------------------------- tables


def cell(values, digits=3):
    """mean ± standard deviation of the seeds; a single one as it is."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}" if len(values) else "not run"


def by_seed(name, modality, metric, row="checkpoint", probe=0):
    """{seed: `metric` for each seed of the probe} of the run "study/name", for a row of the probe:
    "checkpoint", "random" weights or "stats"."""
    study, name = name.split("/")
    lines = ((r["key"].split("/")[1:], r) for r in rows(study))
    return {seed: r["probes"][probe]["all"][row][metric] for (*words, seed), r in lines
            if words == [name, modality]}


def values(name, modality, metric, row="checkpoint", probe=0):
    """`by_seed` in one list.  "random" and "stats" are shared by runs: what comes again counts
    once.  So does a run's one value, if it is the same for all seeds of the probe."""
    found = [x for _, x in sorted(by_seed(name, modality, metric, row, probe).items())]
    if row == "checkpoint" or len(found) == 1:
        return [v for x in found for v in (x if len({*x}) > 1 else x[:1])]
    return [*dict.fromkeys(v for x in found for v in x)]


def both_sensors(name, row="checkpoint"):
    return [values(name, modality, metric, row) for modality in ("s1", "s2c")
            for metric in ("micro_map", "macro_map")]


def toy_table():
    yield "| toy world | s1 micro | s1 macro | s2c micro | s2c macro |"
    yield "|---|---|---|---|---|"
    for title, name, row in (
            ("mean and std of each band", "long/both", "stats"),
            ("ResNet-18, random weights", "long/both", "random"),
            ("InfoNCE", "softcon/InfoNCE", "checkpoint"),
            ("+ mask", "softcon/+ mask", "checkpoint"),
            ("+ soft", "softcon/+ soft", "checkpoint"), ("+ both", "softcon/both", "checkpoint"),
            ("InfoNCE, 28 epochs", "long/InfoNCE", "checkpoint"),
            ("+ soft, 28 epochs", "long/+ soft", "checkpoint"),
            ("+ both, 28 epochs", "long/both", "checkpoint"),
            ("InfoNCE, no predictor, 28", "long/InfoNCE, no predictor", "checkpoint"),
            ("+ soft, no predictor, 28", "long/+ soft, no predictor", "checkpoint"),
            ("+ both, no predictor, 28", "long/both, no predictor", "checkpoint"),
            ("ViT-tiny/4, random weights", "pera/PerA", "random"),
            ("PerA", "pera/PerA", "checkpoint"), ("PerA + soft", "pera/PerA + soft", "checkpoint")):
        yield f"| {title} | {' | '.join(map(cell, both_sensors(name, row)))} |"
    marks = {r["modality"]: r for r in rows("supervised")}
    marks = [[marks[m][k]] if m in marks else [] for m in ("s1", "s2c")
             for k in ("micro_map", "macro_map")]
    yield f"| ResNet-18, supervised | {' | '.join(map(cell, marks))} |"


def gains():
    parts = []
    for title, a, b in (("soft over InfoNCE", "softcon/+ soft", "softcon/InfoNCE"),
                        ("28 epochs", "long/+ soft", "long/InfoNCE"),
                        ("28, no predictor", "long/+ soft, no predictor",
                         "long/InfoNCE, no predictor"),
                        ("mask over InfoNCE", "softcon/+ mask", "softcon/InfoNCE"),
                        ("mask over + soft", "softcon/both", "softcon/+ soft"),
                        ("28 epochs", "long/both", "long/+ soft"),
                        ("no predictor over both", "factors/no predictor", "softcon/both"),
                        ("28 epochs", "long/both, no predictor", "long/both")):
        gain = []
        for modality in ("s1", "s2c"):
            x, y = (by_seed(name, modality, "micro_map") for name in (a, b))
            d = np.array([x[seed][0] - y[seed][0] for seed in sorted(x.keys() & y.keys())])
            gain.append(f"{d.mean():+.3f} ({d.std(ddof=1) / len(d) ** 0.5:.3f})" if len(d) > 1 else
                        "not run")
        parts.append(f"{title} {', '.join(gain)}")
    yield f"Gains in micro on s1, s2c, mean (standard error of paired seeds): {'; '.join(parts)}."
    high = {name: values(run, "s1", "micro_map") for name, run in (
        ("InfoNCE", "softcon/InfoNCE"), ("+ mask", "softcon/+ mask"), ("+ soft", "softcon/+ soft"),
        ("+ both", "softcon/both"), ("+ both without predictor", "factors/no predictor"))}
    counts = (f"{name} {sum(v > 0.66 for v in x)} of {len(x)}" for name, x in high.items() if x)
    yield f"Runs of s1 that took off (above 0.66 after 14 epochs): {', '.join(counts)}."


SWITCHES = {       # what is switched: modality, {to: run}
    "soft term: `bce`, weight .5, temperature .2": ("s1", {
        "`bce_mean`": "factors/form bce_mean", "`ce`, weight 1": "factors/form ce, weight 1",
        "none": "softcon/+ mask", "weight .1": "factors/soft-weight 0.1",
        "weight 2": "factors/soft-weight 2", "temperature .1": "factors/soft-tau 0.1",
        "temperature .5": "factors/soft-tau 0.5"}),
    "mask: .3, blocks of 4 px cells": ("s1", {
        "none": "softcon/+ soft", ".5": "factors/mask-ratio 0.5",
        "of 8 px cells": "factors/mask cells of 8 px",
        "each cell alone": "factors/mask scattered"}),
    "loss, heads": ("s1", {
        "q1 with k2 alone": "factors/one direction", "no predictor": "factors/no predictor",
        "no unlabelled images": "factors/labelled images only"}),
    "augmentation: flips both ways, crops from .5": ("s1", {
        "no vertical flip": "factors/no vertical flip",
        "crops from .2, grey .2": "factors/crops from 0.2, grey 0.2"}),
    "optimiser: lr 5e-4, betas .9 .95, momentum .9": ("s1", {
        "lr 1.5e-4": "factors/lr 1.5e-4", "lr 1.5e-3": "factors/lr 1.5e-3",
        "betas .9 .999": "factors/betas .9 .999", "momentum .99": "factors/momentum 0.99"}),
    "ViT-tiny/8 instead of ResNet-18": ("s1", {
        "LayerScale from 1": "factors/ViT, LayerScale 1",
        "from 1e-5": "factors/ViT, LayerScale 1e-5"}),
    "the same on s2c": ("s2c", {
        "**as it is**": "softcon/both", "weight 2": "factors/soft-weight 2",
        "`ce`, weight 1": "factors/form ce, weight 1", "no predictor": "factors/no predictor"}),
    "3 epochs of s1 from SoftCon's s2c network": ("s1", {
        "from scratch": "init/none", "input layer fresh": "init/random", "its mean": "init/mean"}),
    "3 epochs of s2c from InfoNCE's RGB network": ("s2c", {
        "from scratch": "init/none", "input layer fresh": "init/random", "its mean": "init/mean",
        "its rgb": "init/rgb"}),
    "PerA alone: VV and VH offset apart, no decay of norms": ("s1", {
        "**as it is**": "pera/PerA", "offset together": "factors/PerA, one offset",
        "brightness, contrast": "factors/PerA, brightness and contrast",
        "decay of everything": "factors/PerA, decay everything"})}


def switch_table():
    yield "| + both, but | micro average precision, on s1 unless it says s2c |"
    yield "|---|---|"
    for switch, (modality, options) in SWITCHES.items():
        found = {to: values(name, modality, "micro_map") for to, name in options.items()}
        parts = [f"{to}: {cell(x)}" for to, x in found.items() if x]
        yield f"| {switch} | {'; '.join(parts) or 'not run'} |"


def chip_table():
    """The probes of a run: ridge and logistic on CLS, then on CLS + mean patch; RGB: ridge."""
    columns = {"MS ridge": ("s2c", 2), "MS ridge, CLS": ("s2c", 0), "MS logistic": ("s2c", 3),
               "RGB ridge": ("rgb", 1), "RGB ridge, CLS": ("rgb", 0)}
    yield f"| accuracy on held-out chips | {' | '.join(columns)} |"
    yield "|---|---|---|---|---|---|"
    lines = [*((n, n, "checkpoint") for n in [*CHIPS, "+ mask, no predictor"]),
             ("random weights", "PerA", "random"),
             ("mean and std", "PerA", "stats"),
             ("PerA, all chips", "PerA, all chips", "checkpoint"),
             ("random weights, those 5 splits", "PerA, all chips", "random"),
             ("mean and std, those 5 splits", "PerA, all chips", "stats")]
    for title, name, row in lines:
        cells = [cell(values(f"eurosat/{name}", modality, "accuracy", row, p))
                 for modality, p in columns.values()]
        yield f"| {title} | {' | '.join(cells)} |"
    for title, name in (("InfoNCE + mask, 30 %", "InfoNCE + mask"),
                        ("+ soft on classes, 30 %", "+ soft on classes")):
        cells = [cell(values(f"classes/{name}", "s2c", "accuracy", probe=p)) for p in (1, 0)]
        yield f"| {title} | {' | '.join(cells)} | - | - | - |"


def cost_table():
    said = {r["key"].split("/")[1]: next(v for v in r.values() if isinstance(v, dict))
            for r in rows("costs")}
    yield "| SoftCon, ViT-S/14 | images/s | GB | PerA, ViT-S/16 | images/s | GB |"
    yield "|---|---|---|---|---|---|"
    for names in zip(*(iter([n for n in COSTS if n.startswith(m)]) for m in ("SoftCon", "PerA"))):
        cells = [(n.partition(", ")[2] or "patches dropped", f"{said[n]['images_per_s']:.1f}",
                  f"{said[n]['step_gb']:.2f}") if n in said else (n, "not run", "not run")
                 for n in names]
        yield f"| {' | '.join(itertools.chain(*cells))} |"


def tables():
    """Every line that the README takes from tests/results/; rows of nothing are left out."""
    for table in (toy_table, gains, switch_table, chip_table, cost_table):
        yield from filled(table)


def filled(table):
    return [x for x in table() if re.search(r"\d\.\d", x) or "not run" not in x]


def curve(run, out):
    """The log of a run as an SVG: InfoNCE, the soft term, the effective rank, over the steps."""
    log = [json.loads(x) for x in Path(run, "log.jsonl").read_text().splitlines()]
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" width="840" height="200" '
             'font-family="sans-serif" font-size="12">']
    for k, name in enumerate(("info_nce", "soft", "effective_rank")):
        x, y = ([row[key] for row in log] for key in ("step", name))
        low, high = min(y), max(y)
        points = " ".join(f"{280 * k + 45 + 220 * a / max(x):.1f},"
                          f"{170 - 140 * (b - low) / (high - low):.1f}" for a, b in zip(x, y))
        parts.append(f'<polyline points="{points}" fill="none" stroke="#2266aa"/>')
        for text, left, top in ((name, 110, 18), (f"{high:.1f}", 8, 34), (f"{low:.1f}", 8, 174),
                                (f"step {max(x)}", 215, 190)):
            parts.append(f'<text x="{280 * k + left}" y="{top}" fill="#777">{text}</text>')
    Path(out).write_text("\n".join([*parts, "</svg>\n"]))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["run", "one", "tables", "curve"])
    parser.add_argument("names", nargs="*", help="studies, keys; curve: run, file")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--shared", default=".", help="folder of eurosat_ms and eurosat_rgb")
    args = parser.parse_args(argv)
    if args.what == "run":
        run(args.names, args.workers, args.shared)
    elif args.what == "one":
        one(*args.names)
    elif args.what == "curve":
        curve(*args.names)
    else:
        print(*tables(), sep="\n")


if __name__ == "__main__":
    main()
