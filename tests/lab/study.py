"""Repeat a study: train, probe, a line a run; and write the tables of results/README.md.

    python tests/lab/study.py run ucm --shared DIR --workers 2      those of its runs that have no
                                                                    line, two at a time
    python tests/lab/study.py run 'transfer/*64/0' --shared DIR     or those that fit a pattern
    python tests/lab/study.py tables                                writes results/README.md

A run is a training by pretrain.py and some probes by probe.py, called as anybody would; its name is
STUDY/NAME/SEED.  Its line in results/STUDY.jsonl holds the commands, commit, device, the last line
of the log, and what the probes said.  A run with a line is not repeated, and one that was killed
goes on where it stopped.  Runs of `dense` with one seed are made and probed together, since heads
of pixels take longest.  The commands run in the folder --work, where packs and runs lie.

toy       the toy world, s1 and s2c: InfoNCE, SoftCon's two additions to it, and PerA
ucm       the same from natural images on UC Merced, with its 17 labels; the test has these labels
transfer  labels of another kind, batch, weight, mask and size on UC Merced; the test has the 21
          scene classes, of 1, 3, 10 and all training images of a class
halves    RGB chips of EuroSAT: pretraining sees labels of five classes, the test has the others
chips     EuroSAT's 13 bands from natural images, without labels
dense     chips of 224 px of six tiles of Dubai from natural images: IoU of five classes of pixels,
          seen at 112 and 224 px; SoftCon has the labels of the training chips

The seed also draws the split: 80 % of each class train the network and the head, 20 % test; of the
RGB chips 128 and 200 of each class; of `dense` it is the tile that neither sees and that tests.

DIR holds public data, each in a folder of its own:

ucm_multilabel/images/{class}/*.jpg    UC Merced, RGB, 21 folders; USGS images, public domain;
    weegee.vision.ucmerced.edu/datasets/landuse.html; here 80 images of each, resized to 128 px
ucm_multilabel/LandUse_Multilabeled.txt    its 17 labels, several an image; Chaudhuri et al. 2018,
    no licence stated, citation asked; bigearth.eu/datasets
eurosat_ms/{class}/*.tif, eurosat_rgb/{class}/*.jpg    EuroSAT, 13 bands and RGB, 64 px, 10 folders;
    MIT, zenodo.org/records/7711810; here 1,180 and 21,600 chips
dubai_segmentation/tile{1..6}/image_part_*.jpg, .png    aerial images of Dubai and their masks, nine
    a tile, 509 to 1,126 px; CC0, Humans in the Loop; two more tiles are left out
vit_tiny_in1k/vit_tiny_patch16_224.pth    ViT-Tiny/16 of natural images, Apache-2.0, from
    huggingface.co/timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k
"""
import argparse
import csv
import fnmatch
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

RESULTS = Path(__file__).parent / "results"

# ------------------------------------------------------------------------------------------- runs


@dataclass
class Runs:
    """Runs that are probed together.  train: {name of a run: flags of pretrain.py}; probes: {name:
    flags of probe.py}."""
    study: str
    seed: int
    train: dict
    probes: dict

    @property
    def keys(self):
        return {f"{self.study}/{name}/{self.seed}": name for name in self.train}


NATURAL = ["--init", "DIR/vit_tiny_in1k/vit_tiny_patch16_224.pth", "--init-norm", "half"]
FROZEN = ["--max-steps", "1", "--lr", "0"]        # a step of no length: the weights as they are
NO_SOFT = ["--soft-weight", "0"]
NO_MASK = ["--mask-ratio", "0"]
MASK = ["--mask-ratio", "0.3"]
INFO_NCE = [*NO_SOFT, *NO_MASK]
METHODS = {
    "InfoNCE": INFO_NCE,
    "+ soft": NO_MASK,
    "+ mask": [*NO_SOFT, *MASK],
    "+ both": MASK,
    "PerA": ["--method", "pera"]}
HEADS = {
    "ridge": ["--protocol", "ridge", "--feature", "cls+mean"],
    "logistic": ["--protocol", "logistic", "--feature", "cls+mean"],
    "knn": ["--protocol", "knn"]}
SHARES = (1.0, 0.3, 0.1, 0.03)                    # of the labels for the head
SHOTS = (1, 3, 10, "all")                         # labelled images of a class, for the head
LABELS = {"labels": "17 labels", "coarse": "6 coarse", "wrong": "20 % wrong"}


def share_of(shots, images):
    """--train-frac for so many of a class's training images."""
    return 1.0 if shots == "all" else shots / images


def probes_of(heads, pack, shares, *more):
    """{head: flags of its probe}"""
    shares = [str(share) for share in shares]
    return {head: ["--data", pack, "--train-frac", *shares, *HEADS[head], *more] for head in heads}


def toy_runs(seed):
    runs = []
    for modality in ("s1", "s2c"):
        for method, flags in METHODS.items():
            train = {f"{modality} {method}": ["--modality", modality, *flags]}
            runs.append(Runs("toy", seed, train, {"ridge": []}))
    return runs


def ucm_runs(seed):
    runs = []
    pack = f"packs/ucm_labels_{seed}"
    for method, flags in {"frozen": FROZEN, **METHODS}.items():
        train = ["--modality", "rgb", "--data", pack, "--epochs", "4", *NATURAL, *flags]
        runs.append(Runs("ucm", seed, {method: train}, probes_of(["ridge"], pack, SHARES)))
    return runs


def transfer_settings():
    """{name: (labelling, flags)}: which labels pretraining sees, and how."""
    settings = {"frozen": ("labels", FROZEN)}
    for batch in ("16", "64", "256"):
        flags = ["--batch-size", batch]
        settings[f"InfoNCE, batch {batch}"] = ("labels", [*flags, *INFO_NCE])
        labellings = LABELS if batch == "64" else {"labels": LABELS["labels"]}
        for labelling, words in labellings.items():
            settings[f"{words}, batch {batch}"] = (labelling, [*flags, *NO_MASK])
    flags = ["--batch-size", "64"]
    for weight in ("0.1", "2"):
        weighted = [*flags, *NO_MASK, "--soft-weight", weight]
        settings[f"17 labels, weight {weight}, batch 64"] = ("labels", weighted)
    settings["InfoNCE, mask, batch 64"] = ("labels", [*flags, *NO_SOFT, *MASK])
    settings["17 labels, mask, batch 64"] = ("labels", [*flags, *MASK])
    flags = ["--batch-size", "16", "--img-size", "112"]          # as the small preset
    settings["frozen, 112 px"] = ("labels", [*FROZEN, *flags])
    settings["InfoNCE, 112 px, batch 16"] = ("labels", [*flags, *INFO_NCE])
    settings["17 labels, 112 px, batch 16"] = ("labels", [*flags, *NO_MASK])
    return settings


def transfer_runs(seed):
    runs = []
    test = f"packs/ucm_classes_{seed}"
    shares = [share_of(shots, 64) for shots in SHOTS]
    probes = probes_of(["ridge", "knn"], test, shares, "--seeds", "3")
    for name, (labelling, flags) in transfer_settings().items():
        train = ["--modality", "rgb", "--data", f"packs/ucm_{labelling}_{seed}", "--epochs", "4",
                 "--img-size", "64", *NATURAL, *flags]
        runs.append(Runs("transfer", seed, {name: train}, probes))
    return runs


HALVES = {"frozen": FROZEN, "InfoNCE": INFO_NCE, "+ soft": NO_MASK}


def halves_runs(seed):
    runs = []
    shares = [share_of(shots, 128) for shots in SHOTS]
    probes = probes_of(["ridge", "knn"], f"packs/rgbchips_otherhalf_{seed}", shares, "--seeds", "3")
    for name, flags in HALVES.items():
        train = ["--modality", "rgb", "--data", f"packs/rgbchips_half_{seed}", "--epochs", "4",
                 "--preset", "small", "--img-size", "64", "--batch-size", "64", *NATURAL, *flags]
        runs.append(Runs("halves", seed, {name: train}, probes))
    return runs


CHIPS = {
    "frozen, rgb": [*FROZEN, *NATURAL, "--adapt", "rgb"],
    "InfoNCE, from scratch": INFO_NCE,
    "InfoNCE, layer fresh": [*INFO_NCE, *NATURAL, "--adapt", "random"],
    "InfoNCE, rgb": [*INFO_NCE, *NATURAL, "--adapt", "rgb"],
    "PerA, rgb": ["--method", "pera", *NATURAL, "--adapt", "rgb"]}


def chips_runs(seed):
    runs = []
    pack = f"packs/chips_classes_{seed}"
    for name, flags in CHIPS.items():
        train = ["--modality", "eurosat", "--data", pack, "--img-size", "64", *flags]
        probes = probes_of(["ridge", "logistic"], pack, [1.0])
        runs.append(Runs("chips", seed, {name: train}, probes))
    return runs


DENSE = {"frozen": FROZEN, "InfoNCE": INFO_NCE, "SoftCon": [], "PerA": ["--method", "pera"]}
SIDES = ("112", "224")                            # at which the probe shows the chips


def dense_runs(seed):
    pack = f"packs/dubai_tiles_{seed}"
    probes = {side: ["--data", pack, "--img-size", side] for side in SIDES}
    train = {}
    for name, flags in DENSE.items():
        train[name] = ["--modality", "rgb", "--data", pack, "--epochs", "3", *NATURAL, *flags]
    return [Runs("dense", seed, train, probes)]


STUDIES = [toy_runs, ucm_runs, transfer_runs, halves_runs, chips_runs, dense_runs]


def all_runs():
    runs = []
    for study in STUDIES:
        for seed in range(6 if study is dense_runs else 3):
            for run in study(seed):
                for flags in run.train.values():
                    flags += ["--seed", str(seed)]
                runs.append(run)
    return runs


# ------------------------------------------------------------------------------------------ packs

COARSE = {
    "vegetation": {"trees", "grass", "chaparral", "field"},
    "bare": {"bare-soil", "sand"},
    "water": {"water", "sea"},
    "built": {"buildings", "mobile-home", "tanks"},
    "sealed": {"pavement", "court", "dock"},
    "vehicles": {"cars", "airplane", "ship"}}


def class_of(row):
    """The folder that a row's image lies in."""
    return row["scene"].split("/")[0]


def new_labels(rows, labelling, rng):
    """Rows of images.csv -> their labels: as they are ("labels"), in six groups ("coarse"), a fifth
    of the images with those of another ("wrong"), the names of their folders ("classes"), or these
    names for half of the folders ("half"; "otherhalf")."""
    labels = [row["labels"] for row in rows]
    if labelling == "classes":
        labels = [class_of(row) for row in rows]
    if labelling.endswith("half"):
        folders = rng.permutation(np.unique([class_of(row) for row in rows]))
        half = np.array_split(folders, 2)[labelling == "half"]
        labels = [class_of(row) if class_of(row) in half else "" for row in rows]
    if labelling == "coarse":
        sets = [set(names.split(";")) for names in labels]
        labels = [";".join(group for group in COARSE if COARSE[group] & names) for names in sets]
    if labelling == "wrong":
        chosen = rng.permutation(len(rows))[:len(rows) // 5]
        for i, j in zip(chosen, np.roll(chosen, 1)):
            labels[i] = rows[j]["labels"]
    return labels


def relabel(source, out, labelling, seed):
    """A pack of the same images, which are linked, with other labels and a split of its own.

    Of each class folder 80 %, drawn by `seed`, are "train", the others "test"; of large ones 128
    and 200; with the labelling "tiles" all of the folders but number `seed` are "train".
    """
    with open(f"{source}/images.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rng = np.random.default_rng(seed)
    folders = np.array([class_of(row) for row in rows])
    for number, name in enumerate(np.unique(folders)):
        members = rng.permutation(np.flatnonzero(folders == name))
        trained = min(128, round(0.8 * len(members)))
        if labelling == "tiles":
            trained = 0 if number == seed else len(members)
        for i in members[:trained]:
            rows[i]["split"] = "train"
        for i in members[trained:trained + 200]:
            rows[i]["split"] = "test"
    for row, labels in zip(rows, new_labels(rows, labelling, rng)):
        row["labels"] = labels

    about = json.loads(Path(source, "pack.json").read_text())
    about.pop("classes", None)                    # they are the names in images.csv
    about["labels_from"] = f"study.py: {labelling}"
    with data.whole_folder(out) as folder:
        with open(f"{folder}/images.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, data.HEADER)
            writer.writeheader()
            writer.writerows(rows)
        Path(folder, "pack.json").write_text(json.dumps(about, indent=1))
        for path in Path(source).absolute().glob("*.npy"):         # images, and masks if any
            os.symlink(path, f"{folder}/{path.name}")


SOURCES = {        # flags of data.py pack
    "rgbchips": ["DIR/eurosat_rgb", "packs/rgbchips", "--modality", "rgb", "--labels", "classes"],
    "ucm": ["DIR/ucm_multilabel/images", "packs/ucm", "--modality", "rgb", "--labels",
            "DIR/ucm_multilabel/LandUse_Multilabeled.txt"],
    "dubai": ["DIR/dubai_segmentation", "packs/dubai", "--modality", "rgb", "--chip", "224",
              "--masks", ".png", "--colours", str(Path(__file__).parent / "dubai_colours.json")],
    "chips": ["DIR/eurosat_ms", "packs/chips", "--modality", "eurosat", "--labels", "classes"]}


def prepare(runs, work, shared):
    """Make the packs that the runs read: packs/SOURCE, and packs/SOURCE_LABELLING_SEED."""
    words = set()
    for run in runs:
        for flags in (*run.train.values(), *run.probes.values()):
            words |= set(flags)
    for name in sorted(word for word in words if word.startswith("packs/")):
        source, labelling, seed = name.removeprefix("packs/").split("_")
        if not Path(work, "packs", source).exists():
            call("data.py", ["pack", *SOURCES[source]], work, shared, sys.stdout)
        if not Path(work, name).exists():
            relabel(f"{work}/packs/{source}", f"{work}/{name}", labelling, int(seed))
    for modality in sorted(words & {"s1", "s2c"}):
        if not Path(work, f"toy_{modality}").exists():
            flags = ["pack", "toy", f"toy_{modality}", "--modality", modality]
            call("data.py", ["toy", "toy"], work, shared, sys.stdout)
            call("data.py", flags, work, shared, sys.stdout)


# ---------------------------------------------------------------------------------------- running


def call(script, flags, work, shared, output):
    """python SCRIPT FLAGS in the folder `work`, with one thread; CalledProcessError if it fails."""
    flags = [flag.replace("DIR", os.path.abspath(shared)) for flag in flags]
    subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=work, check=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output,
                   stderr=subprocess.STDOUT)


def commit_of_code():
    """Short git hash of the code, with + if a file but the results differs from it."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", ":!tests/lab/results"])
    return (name.stdout.strip() or "unknown") + ("+" if changed.returncode else "")


def last_json(path):
    return json.loads(Path(path).read_text().splitlines()[-1])


def said_of(report, ckpt):
    """What a probe, of several networks or this one, said of it and of the floors."""
    said = {name: report[name] for name in ("protocol", "feature", "img_size", "seeds", "n_test")}
    said["curve"] = []
    for row in report["curve"]:
        values = row["all"]
        own = {"checkpoint": values.get(ckpt) or values["checkpoint"]}
        own |= {name: values[name] for name in ("random", "stats")}
        said["curve"].append(row | {"all": own})
    return said


def run_together(run, work, shared):
    """Train and probe -> the lines of these runs."""
    begin = time.time()
    commit = commit_of_code()
    outs = {name: f"runs/{key}".replace(" ", "_") for key, name in run.keys.items()}
    commands = {}                                 # {file of what it says: words}
    for name, out in outs.items():
        os.makedirs(f"{work}/{out}", exist_ok=True)
        commands[f"{out}/train"] = ["pretrain.py", *run.train[name], "--out", out, "--resume"]
    ckpts = [f"{out}/backbone.pt" for out in outs.values()]
    last = [*outs.values()][-1]                   # its folder holds what the probes say
    for probe, flags in run.probes.items():
        commands[f"{last}/{probe}"] = ["probe.py", "--ckpt", *ckpts, *flags]
    for path, (script, *flags) in commands.items():
        with open(f"{work}/{path}.txt", "w") as output:
            call(script, flags, work, shared, output)
    reports = {probe: last_json(f"{work}/{last}/{probe}.txt") for probe in run.probes}
    shown = [shlex.join(["python", *words]) for words in commands.values()]
    lines = []
    for (name, out), ckpt in zip(outs.items(), ckpts):
        config = json.loads(Path(work, out, "config.json").read_text())
        lines.append({
            "study": run.study, "name": name, "seed": run.seed, "commands": shown,
            "commit": commit, "device": config["device"], "threads": 1,
            "torch": importlib.metadata.version("torch"),
            "minutes": round((time.time() - begin) / 60, 1),
            "log": last_json(f"{work}/{out}/log.jsonl"),
            "probes": {probe: said_of(report, ckpt) for probe, report in reports.items()}})
    return lines


def run_many(runs, workers, work, shared):
    """All these, `workers` at a time; appends their lines.  Returns how many failed."""
    lock = threading.Lock()

    def run_and_write(run):
        keys = ", ".join(run.keys)
        try:
            lines = run_together(run, work, shared)
        except subprocess.CalledProcessError as error:
            print(f"{keys}: {error}; what it said lies in {work}/runs", flush=True)
            return 1
        with lock, open(RESULTS / f"{run.study}.jsonl", "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        print(f"{keys}: {lines[0]['minutes']} minutes", flush=True)
        return 0

    with ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(run_and_write, runs))


# ----------------------------------------------------------------------------------------- tables


@dataclass
class Column:
    """A number of each run: a metric of one of its probes, at one of the probe's shares."""
    title: str
    probe: str
    metric: str
    share: float = 1.0
    run: str = "{}"                               # the run's name, with {} for the row's


@dataclass
class Table:
    """rows: {title: (name of a run, network of its probe)}; of gains {title: (run, base)}."""
    study: str
    rows: dict
    columns: list
    gains: bool = False


def by_seed(lines, table, name, network, column):
    """{seed: number, a mean over the probe's seeds}; network: checkpoint, random or stats."""
    found = {}
    for line in lines:
        if line["study"] == table.study and line["name"] == column.run.format(name):
            for row in line["probes"][column.probe]["curve"]:
                if row["train_frac"] == column.share:
                    found[line["seed"]] = np.mean(row["all"][network][column.metric])
    return found


def paired_gains(lines, table, run, base, column):
    """What a run gains over another: a number for each seed that both have."""
    own = by_seed(lines, table, run, "checkpoint", column)
    other = by_seed(lines, table, base, "checkpoint", column)
    return [own[seed] - other[seed] for seed in own if seed in other]


def cell(numbers, gain=False):
    """Mean ± deviation (number of seeds); of gains the mean ± its standard error."""
    if not numbers:
        return "not run"
    text = f"{np.mean(numbers):+.3f}" if gain else f"{np.mean(numbers):.3f}"
    if len(numbers) > 1:
        spread = np.std(numbers, ddof=1)
        if gain:
            spread = spread / len(numbers) ** 0.5
        text += f" ± {spread:.3f}"
    return f"{text} ({len(numbers)})"


def make_table(lines, table):
    """A table as markdown, then, but for gains, what is missing and where the numbers come from."""
    lines = [line for line in lines if line["study"] == table.study]
    if not lines:
        return "Not run yet."
    header = ["", *[column.title for column in table.columns]]
    rows = [header, ["---"] * len(header)]
    facts = []
    for title, (run, other) in table.rows.items():
        cells = []
        for column in table.columns:
            if table.gains:
                cells.append(cell(paired_gains(lines, table, run, other, column), gain=True))
            else:
                cells.append(cell([*by_seed(lines, table, run, other, column).values()]))
        if set(cells) == {"not run"}:
            facts.append(f"not run: {title}")
        else:
            rows.append([title, *cells])
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    if table.gains:
        return text
    for name in ("commit", "device", "torch"):
        facts.append(f"{name} " + ", ".join(sorted({line[name] for line in lines})))
    return f"{text}\n\n`study.py run {table.study}`: {'; '.join(facts)}."


def rows_of(names, base):
    """Rows of the floors, which are probed beside the run `base`, and of runs by their names."""
    rows = {"band statistics": (base, "stats"), "random weights": (base, "random")}
    return rows | {name: (name, "checkpoint") for name in names}


def gains_over_info_nce(names):
    """Each setting of `transfer` over InfoNCE with the same size, batch and mask."""
    rows = {}
    for name in names:
        labels, *how = name.split(", ")
        if how and labels not in ("frozen", "InfoNCE"):
            how = [part for part in how if not part.startswith("weight")]
            rows[name] = (name, ", ".join(["InfoNCE", *how]))
    return rows


SOFT_GAINS = {"+ soft over InfoNCE": ("+ soft", "InfoNCE"),
              "+ both over + mask": ("+ both", "+ mask"),
              "+ mask over InfoNCE": ("+ mask", "InfoNCE")}
UCM_GAINS = {"InfoNCE over frozen": ("InfoNCE", "frozen"), **SOFT_GAINS,
             "PerA over frozen": ("PerA", "frozen")}
TOY = [Column(f"{modality} {metric}", "ridge", f"{metric}_map", run=f"{modality} {{}}")
       for modality in ("s1", "s2c") for metric in ("micro", "macro")]
UCM = [Column(f"{metric}, head {share:.0%}", "ridge", f"{metric}_map", share)
       for metric in ("micro", "macro") for share in SHARES]
TRANSFER = [Column(f"{head}, {shots}", head, "accuracy", share_of(shots, 64))
            for head in ("ridge", "knn") for shots in SHOTS]
HALF = [Column(f"{head}, {shots}", head, "accuracy", share_of(shots, 128))
        for head in ("ridge", "knn") for shots in SHOTS]
IOU = [Column(f"{words}, {side} px", side, metric) for side in SIDES
       for metric, words in (("miou", "mean IoU"), ("pixel_accuracy", "right pixels"))]
DENSE_GAINS = {f"{name} over frozen": (name, "frozen") for name in [*DENSE][1:]}
DENSE_GAINS |= {"SoftCon over InfoNCE": ("SoftCon", "InfoNCE"),
                "PerA over SoftCon": ("PerA", "SoftCon")}
TABLES = {
    "toy": Table("toy", rows_of(METHODS, "InfoNCE"), TOY),
    "toy gains": Table("toy", SOFT_GAINS, TOY, gains=True),
    "ucm": Table("ucm", rows_of(["frozen", *METHODS], "frozen"), UCM),
    "ucm gains": Table("ucm", UCM_GAINS, UCM, gains=True),
    "transfer": Table("transfer", rows_of(transfer_settings(), "frozen"), TRANSFER),
    "transfer gains": Table("transfer", gains_over_info_nce(transfer_settings()), TRANSFER,
                            gains=True),
    "halves gains": Table("halves", {"+ soft over InfoNCE": ("+ soft", "InfoNCE"),
                                     "InfoNCE over frozen": ("InfoNCE", "frozen")}, HALF,
                          gains=True),
    "chips": Table("chips", rows_of(CHIPS, "frozen, rgb"),
                   [Column(head, head, "accuracy") for head in ("ridge", "logistic")]),
    "dense": Table("dense", rows_of(DENSE, "frozen"), IOU),
    "dense gains": Table("dense", DENSE_GAINS, IOU, gains=True)}


def read_lines(pattern="*"):
    """The lines of the studies whose names fit the pattern."""
    lines = []
    for path in sorted(RESULTS.glob(f"{pattern}.jsonl")):
        lines += [json.loads(line) for line in path.read_text().splitlines()]
    return lines


def write_tables(page, lines):
    """The page with each table between <!-- table: NAME --> and <!-- end --> made anew."""
    for name, table in TABLES.items():
        head, mark, rest = page.partition(f"<!-- table: {name} -->\n")
        if mark:
            _, _, tail = rest.partition("<!-- end -->")
            page = f"{head}{mark}{make_table(lines, table)}\n<!-- end -->{tail}"
    return page


# ------------------------------------------------------------------------------------------- main


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "tables"])
    parser.add_argument("names", nargs="*", help="studies, or names of runs with * and ?")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time (%(default)s)")
    parser.add_argument("--shared", default=".", metavar="DIR", help="folder of the public data")
    parser.add_argument("--work", default="runs/study", help="folder of packs, runs (%(default)s)")
    args = parser.parse_args(argv)

    lines = read_lines()
    if args.what == "tables":
        page = RESULTS / "README.md"
        page.write_text(write_tables(page.read_text(), lines))
        print(f"{page}: {len(lines)} runs")
        return
    done = {f"{line['study']}/{line['name']}/{line['seed']}" for line in lines}
    runs = all_runs()
    asked = set()                                 # of their places in runs: once, if names overlap
    for name in args.names:
        fits = {i for i, run in enumerate(runs)
                if name == run.study or fnmatch.filter(run.keys, name)}
        data.require(fits, f"{name}: no study, and no run that fits")
        asked |= fits
    chosen = [runs[i] for i in sorted(asked) if not done.issuperset(runs[i].keys)]
    keys = [key for run in chosen for key in run.keys]
    print(f"{len(keys)} runs: {', '.join(keys)}")
    os.makedirs(f"{args.work}/packs", exist_ok=True)
    prepare(chosen, args.work, args.shared)
    return run_many(chosen, args.workers, args.work, args.shared)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (data.InputError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"study.py: error: {error}")
