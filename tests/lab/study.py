"""The runs behind the results: trains, probes, and writes one line a run to results/STUDY.jsonl.

    python tests/lab/study.py run softcon pera --workers 2     what is missing of these studies, two
                                                               runs at a time, one thread each
    python tests/lab/study.py run ucm 'pera/*/s1/0' --shared DIR       DIR: see real.py
    python tests/lab/study.py tables                           writes results/README.md

A run is named study/name/modality/seed.  Its line has the flags, the commit, the device, the last
line of the training log and what probe.py said.  A run that has a line is not repeated, so a
study that was killed goes on where it stopped.  Checkpoints lie in runs/study/.  Run it from the
root of the repository.

softcon     InfoNCE, its two additions and both, on the toy world, 14 epochs
factors     one choice of SoftCon, or of PerA, at a time
long        InfoNCE, + soft and both at the preset's 28 epochs, with and without the predictor
pera        PerA with and without labels on the toy world
supervised  the same ResNet-18 trained on the labels themselves (supervised.py)
costs       speed and memory of each switch at 224 px (bench.py); needs an idle machine
reading     images a second from TIFFs and packed files (bench.py); needs an idle machine
init        what a network trained on another sensor is worth as a start, by --adapt
eurosat     real chips: pretrained without labels on 70 % of them, tested on the other 30 %; and
            pretrained without labels on all of them
classes     the soft term on the classes of 30 % of the multispectral chips
ucm         UC Merced with its real labels, from the weights of natural images: see real.py
continual   EuroSAT from the weights of natural images: see real.py
"""
import argparse
import fnmatch
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import data  # noqa: E402
import pretrain  # noqa: E402
import probe  # noqa: E402
from lab import real, supervised, tables  # noqa: E402
from lab.lines import RESULTS, read_lines  # noqa: E402
from lab.real_tables import readme_table  # noqa: E402, F401
from lab.runs import (Run, as_optical, betas, chip_folder, chip_probes,  # noqa: E402
                      decay_everything, labelled_only, link, no_predictor, no_vertical_flip,
                      one_direction, one_offset, run_folder, scattered, small_layerscale, toy_run)

# ------------------------------------------------------------------------------------------- runs

SOFTCON = {                                       # the two additions to InfoNCE
    "both": [],
    "InfoNCE": ["--soft-weight", "0", "--mask-ratio", "0"],
    "+ soft": ["--mask-ratio", "0"],
    "+ mask": ["--soft-weight", "0"]}
SHORT = ["--epochs", "14"]                        # half of the preset

FACTORS = {                                       # "both", but for these flags
    "form ce, weight 1": ["--soft-form", "ce", "--soft-weight", "1"],
    "form bce_mean": ["--soft-form", "bce_mean"],
    "soft-tau 0.1": ["--soft-tau", "0.1"],
    "soft-tau 0.5": ["--soft-tau", "0.5"],
    "soft-weight 0.1": ["--soft-weight", "0.1"],
    "soft-weight 2": ["--soft-weight", "2"],
    "mask-ratio 0.5": ["--mask-ratio", "0.5"],
    "mask cells of 8 px": ["--patch-size", "8"],
    "mask scattered": [],
    "labelled images only": [],
    "one direction": [],
    "no predictor": [],
    "no vertical flip": [],
    "crops from 0.2, grey 0.2": ["--crop-min", "0.2", "--grey", "0.2"],
    "lr 1.5e-4": ["--lr", "1.5e-4"],
    "lr 1.5e-3": ["--lr", "1.5e-3"],
    "betas .9 .999": [],
    "momentum 0.99": ["--momentum", "0.99"],
    "ViT, LayerScale 1": ["--arch", "vit_tiny", "--patch-size", "8"],
    "ViT, LayerScale 1e-5": ["--arch", "vit_tiny", "--patch-size", "8"]}
SWITCHES = {
    "mask scattered": scattered,
    "labelled images only": labelled_only,
    "one direction": one_direction,
    "no predictor": no_predictor,
    "no vertical flip": no_vertical_flip,
    "betas .9 .999": betas,
    "ViT, LayerScale 1e-5": small_layerscale}

PERA = ["--method", "pera", "--jitter", "1"]
PERA_SWITCHES = {
    "PerA, one offset": one_offset,
    "PerA, brightness and contrast": as_optical,
    "PerA, decay everything": decay_everything}

CHIP_NETWORK = ["--holdout", "0", "--arch", "vit_tiny", "--img-size", "64", "--patch-size", "8",
                "--hidden", "512", "--lr", "5e-4", "--momentum", "0.95"]
CHIP_LENGTH = {
    "s2c": ["--epochs", "20", "--batch-size", "32", "--jitter", "0.2", "--grey", "0"],
    "rgb": ["--epochs", "3", "--batch-size", "64"]}
CHIP_METHODS = {
    "PerA": ["--method", "pera", "--local-size", "32", "--crops", "2", "2", "--prototypes", "512",
             "--drop-path", "0"],
    "InfoNCE": ["--soft-weight", "0", "--mask-ratio", "0", "--crop-min", "0.3"],
    "InfoNCE + mask": ["--soft-weight", "0", "--crop-min", "0.3"]}
RGB_SOURCE = ["--holdout", "0", "--arch", "resnet18", "--img-size", "32", "--patch-size", "4",
              "--hidden", "512", "--lr", "5e-4", "--momentum", "0.9", "--crop-min", "0.3",
              "--soft-weight", "0", "--epochs", "2", "--batch-size", "32"]

COSTS = {         # bench.py's flags; of PerA the crops are 224 and 96 px, the prototypes 4,096
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


def softcon_runs():
    """InfoNCE, + soft, + mask and both: five seeds on radar images, three on optical ones."""
    runs = {}
    for seed, modality, name in itertools.product(range(5), ("s1", "s2c"), SOFTCON):
        if modality == "s1" or seed < 3:
            flags = [*SHORT, *SOFTCON[name]]
            runs[f"softcon/{name}/{modality}/{seed}"] = toy_run(modality, seed, flags)
    return runs


def factor_runs():
    """One choice at a time: three seeds; on radar images five without the predictor."""
    runs = {}
    for seed in range(3):
        for name in ("soft-weight 2", "form ce, weight 1", "no predictor"):
            runs[f"factors/{name}/s2c/{seed}"] = toy_run(
                "s2c", seed, [*SHORT, *FACTORS[name]], SWITCHES.get(name))
    for seed, name in itertools.product(range(5), FACTORS):
        if name == "no predictor" or seed < 3:
            runs[f"factors/{name}/s1/{seed}"] = toy_run(
                "s1", seed, [*SHORT, *FACTORS[name]], SWITCHES.get(name))
    for seed, name in itertools.product(range(3), PERA_SWITCHES):
        runs[f"factors/{name}/s1/{seed}"] = toy_run("s1", seed, PERA, PERA_SWITCHES[name])
    return runs


def long_runs():
    """The preset's 28 epochs; one probe also draws three random networks."""
    runs = {}
    for seed, modality, name in itertools.product(range(3), ("s2c", "s1"), list(SOFTCON)[:3]):
        runs[f"long/{name}, no predictor/{modality}/{seed}"] = toy_run(
            modality, seed, SOFTCON[name], no_predictor)
        probes = [[]]
        if seed == 0 and name == "both":
            probes = [["--seeds", "3"]]
        runs[f"long/{name}/{modality}/{seed}"] = toy_run(
            modality, seed, SOFTCON[name], probes=probes)
    return runs


def pera_runs():
    """PerA without and with the soft term, probed on CLS and on the mean patch."""
    runs = {}
    for seed, modality, soft in itertools.product(range(3), ("s1", "s2c"), (0, 0.5)):
        probes = [["--feature", "cls"], ["--feature", "mean"]]
        if seed == 0:
            probes = [[*flags, "--seeds", "3"] for flags in probes]
        name = "PerA + soft" if soft else "PerA"
        flags = [*PERA, "--soft-weight", str(soft)]
        runs[f"pera/{name}/{modality}/{seed}"] = toy_run(modality, seed, flags, probes=probes)
    return runs


CHIP_LAYOUT = {"s2c": ["--layout", "eurosat"], "rgb": []}


def chip_run(modality, seed, share, flags, heads=("ridge",), switch=None):
    """A run on `share` % of the real chips of a modality."""
    flags = ["--data", f"{chip_folder(modality, share, seed)}/train", "--preset", "full",
             *CHIP_LAYOUT[modality], *flags]
    return toy_run(modality, seed, flags, switch, chip_probes(modality, share, seed, heads))


def eurosat_runs():
    """Multispectral chips: three splits and two heads; RGB chips: one split, ridge."""
    runs = {}
    optical = [*CHIP_NETWORK, *CHIP_LENGTH["s2c"]]
    heads = ("ridge", "logistic")
    for seed, name in itertools.product(range(3), CHIP_METHODS):
        runs[f"eurosat/{name}/s2c/{seed}"] = chip_run(
            "s2c", seed, 70, [*optical, *CHIP_METHODS[name]], heads)
    for seed in range(3):
        runs[f"eurosat/+ mask, no predictor/s2c/{seed}"] = chip_run(
            "s2c", seed, 70, [*optical, *CHIP_METHODS["InfoNCE + mask"]], heads, no_predictor)

    every_chip = f"{chip_folder('s2c', 70, 0)}/all"
    flags = ["--data", every_chip, "--preset", "full", *CHIP_LAYOUT["s2c"], *optical,
             *CHIP_METHODS["PerA"]]
    probes = []
    for feature, head in itertools.product(("cls", "cls+mean"), heads):
        probes.append(["--task", "eurosat", "--data", every_chip, "--seeds", "5",
                       "--feature", feature, "--protocol", head])
    runs["eurosat/PerA, all chips/s2c/0"] = toy_run("s2c", 0, flags, probes=probes)

    for name, flags in CHIP_METHODS.items():
        flags = [*CHIP_NETWORK, *CHIP_LENGTH["rgb"], *flags]
        runs[f"eurosat/{name}/rgb/0"] = chip_run("rgb", 0, 70, flags)
    return runs


def class_runs():
    """SoftCon with the classes of 30 % of the chips as labels, without and with the soft term."""
    runs = {}
    names = {"InfoNCE + mask": "0", "+ soft on classes": "0.5"}
    for seed, name in itertools.product(range(3), names):
        flags = [*CHIP_NETWORK, *CHIP_LENGTH["s2c"], *CHIP_METHODS["InfoNCE + mask"],
                 "--labels", "classes", "--soft-weight", names[name]]
        runs[f"classes/{name}/s2c/{seed}"] = chip_run("s2c", seed, 30, flags)
    return runs


def init_runs():
    """Three epochs of radar images from SoftCon's optical network, and three of optical images
    from a network that InfoNCE trained on RGB chips."""
    rgb = "init/InfoNCE, ResNet-18/rgb/0"
    runs = {rgb: chip_run("rgb", 0, 70, RGB_SOURCE)}
    runs[rgb].probes = []
    for seed, modality in itertools.product(range(3), ("s1", "s2c")):
        source = f"softcon/both/s2c/{seed}" if modality == "s1" else rgb
        adapts = ["none", "random", "mean"]
        if modality == "s2c":
            adapts.append("rgb")
        for adapt in adapts:
            flags = ["--epochs", "3"]
            if adapt != "none":
                flags += ["--init", f"{run_folder(source)}/backbone.pt", "--adapt", adapt]
            runs[f"init/{adapt}/{modality}/{seed}"] = toy_run(modality, seed, flags)
    return runs


def measured_runs():
    """What supervised.py and bench.py measure."""
    runs = {}
    for modality in ("s1", "s2c"):
        runs[f"supervised/10 epochs/{modality}/0"] = Run(
            ["--modality", modality], script=supervised.main)
    for name, flags in COSTS.items():
        runs[f"costs/{name}/s2c/0"] = Run(flags, script=measure)
    runs["reading/TIFFs and packed files/s2c/0"] = Run(["--part", "loader"], script=measure)
    runs["reading/60 % of the tokens dropped/s2c/0"] = Run(["--part", "drop"], script=measure)
    return runs


def all_runs():
    """{key: Run} in the order in which they are run."""
    studies = (softcon_runs, factor_runs, long_runs, pera_runs, eurosat_runs, class_runs,
               measured_runs, init_runs, real.ucm_runs, real.continual_runs)
    runs = {}
    for study in studies:
        runs.update(study())
    return runs


def make_chips(root, folder):
    """Folders folder/all and folder/train of links to the chips of `root`, and two lists of names,
    folder/fit.txt and folder/test.txt.

    `folder` ends in MODALITY_SHARE_SEED; SHARE % of each class are to pretrain on.  With 70 the
    head is fit on the same chips and tested on the other 30 %.  With 30 the head is fit on another
    30 % and tested on 40 %.
    """
    modality, share, seed = Path(folder).name.split("_")
    rng = np.random.default_rng(int(seed))
    fit_names, test_names = [], []
    for class_folder in sorted(x for x in Path(root).iterdir() if x.is_dir()):
        files = sorted(class_folder.iterdir())
        files = [files[i] for i in rng.permutation(len(files))]
        first = round(int(share) / 100 * len(files))
        train = files[:first]
        fit, test = train, files[first:]
        if share == "30":
            last = round(0.6 * len(files))
            fit, test = files[first:last], files[last:]
        link(files, Path(folder, "all", class_folder.name))
        link(train, Path(folder, "train", class_folder.name))
        fit_names += [f.name for f in fit]
        test_names += [f.name for f in test]
    Path(folder, "fit.txt").write_text("\n".join(fit_names))
    Path(folder, "test.txt").write_text("\n".join(test_names))


# ---------------------------------------------------------------------------------------- running


def commit():
    """Short git hash of the code, with + when any file but the results differs from it."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    changed = git("diff", "--quiet", "HEAD", "--", ".", ":!tests/lab/results").returncode
    name = git("rev-parse", "--short", "HEAD").stdout.strip() or "unknown"
    return f"{name}+" if changed else name


def record(key, flags, **results):
    """Append the run's line to the file of its study.  A run that others start from may be trained
    again after its checkpoint was lost: then its line stands already."""
    study = key.split("/")[0]
    if any(line["key"] == key for line in read_lines(study)):
        return
    line = {"key": key, "flags": " ".join(flags), "commit": commit(), "device": "cpu",
            "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version(), **results}
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{study}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def train_and_probe(key, run):
    """One run of pretrain.py, its probes, and its line."""
    folder = run_folder(key)
    start = time.time()
    if run.switch:
        run.switch()
    flags = run.flags
    networks = run.flags
    log = None
    if run.train:
        shutil.rmtree(folder, ignore_errors=True)          # what a killed run left there
        flags = [*run.flags, "--amp", run.amp, "--workers", "0", "--save-every", "1000000"]
        pretrain.main([*flags, "--out", folder])
        log = json.loads(Path(folder, "log.jsonl").read_text().splitlines()[-1])
        networks = ["--ckpt", f"{folder}/backbone.pt"]

    probes = []
    for probe_flags in run.probes:
        found = probe.main([*networks, "--bootstrap", "0", "--cache", "runs/study/cache",
                            "--workers", "0", *probe_flags])
        numbers = {"flags": " ".join(probe_flags)}
        for name in ("n_train", "n_test", "all", "interval", "gain"):
            if name in found:
                numbers[name] = found[name]
        probes.append(numbers)
    record(key, flags, switch=run.switch and run.switch.__name__,
           minutes=(time.time() - start) / 60, log=log, probes=probes)


def measure(flags):
    """What bench.py prints, run by itself."""
    command = [sys.executable, str(ROOT / "tests/lab/bench.py"), "--json", *flags]
    printed = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    del printed["machine"]
    return printed


def run_one(key):
    """A run in this process."""
    run = all_runs()[key]
    if run.script:
        record(key, run.flags, **run.script(run.flags))
    else:
        train_and_probe(key, run)


def sources(key, runs):
    """The runs whose networks this one starts from, or probes."""
    return [other for other in runs if f"{run_folder(other)}/backbone.pt" in runs[key].flags]


def choose(names, runs):
    """The runs of these studies, or with keys like these, that have no line yet; and the runs they
    start from, if their networks are not there."""
    done = set()
    for study in {key.split("/")[0] for key in runs}:
        done |= {line["key"] for line in read_lines(study)}
    chosen = []
    for name in names:
        for key in runs:
            fits = key.startswith(f"{name}/") or fnmatch.fnmatch(key, name)
            if fits and key not in done and key not in chosen:
                chosen.append(key)
    lost = []
    for key in chosen:
        for start in sources(key, runs):
            if start not in lost and not Path(run_folder(start), "backbone.pt").exists():
                lost.append(start)
    return lost + [key for key in chosen if key not in lost]


def link_chips(keys, runs, shared):
    """The folders of real chips that these runs read."""
    folders = set()
    for key in keys:
        flags = sum(runs[key].probes, runs[key].flags)
        folders |= {Path(flag).parent for flag in flags if "/chips/" in flag}
    for folder in folders:
        kind = "eurosat_rgb" if folder.name.startswith("rgb") else "eurosat_ms"
        if not folder.exists():
            make_chips(Path(shared, kind), folder)


def start_process(key):
    """A run in a process of its own, with one thread; what it prints goes to a file."""
    output = Path("runs/study", f"{key.replace('/', '_')}.txt")
    output.parent.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with output.open("w") as file:
        return subprocess.Popen([sys.executable, __file__, "one", key], env=environment,
                                stdout=file, stderr=file)


def run_many(names, workers, shared):
    """The chosen runs, `workers` at a time; a run waits for the one that it starts from."""
    runs = all_runs()
    waiting = choose(names, runs)
    if any("--data" not in runs[key].flags for key in waiting):
        data.make_toy("toy")
    link_chips(waiting, runs, shared)
    if any(key.startswith(("ucm/", "continual/")) for key in waiting):
        real.make_folders(waiting, shared)
    busy = {}
    while waiting or busy:
        unfinished = [*busy, *waiting]
        ready = [key for key in waiting if not set(sources(key, runs)) & set(unfinished)]
        for key in ready[:workers - len(busy)]:
            waiting.remove(key)
            busy[key] = start_process(key)
        time.sleep(1)
        for key, process in list(busy.items()):
            if process.poll() is not None:
                print(f"{key} exit {process.returncode}, {len(waiting)} to go", flush=True)
                del busy[key]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["run", "one", "tables"], help="one: a run, by its key")
    parser.add_argument("names", nargs="*", help="studies, or keys with * and ?")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--shared", default=".", help="folder of the data listed in real.py")
    args = parser.parse_args(argv)
    if args.what == "run":
        run_many(args.names, args.workers, args.shared)
    elif args.what == "one":
        run_one(args.names[0])
    else:
        (RESULTS / "README.md").write_text(tables.page())
        print(f"{RESULTS / 'README.md'} written")


if __name__ == "__main__":
    main()
