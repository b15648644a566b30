"""Runs on real images, from real weights: the studies `ucm` and `continual` of study.py.

They read a folder DIR, given by --shared, with these parts.  All are public:

DIR/ucm_multilabel/images/{class}/*.jpg    UC Merced, 21 folders; USGS images, public domain, 317 MB
    weegee.vision.ucmerced.edu/datasets/landuse.html; here 80 of 100 images of each folder, resized
    from 256 to 128 px (bicubic, JPEG quality 92)
DIR/ucm_multilabel/LandUse_Multilabeled.txt    17 classes, several an image, 1 MB; Chaudhuri et al.
    2018; no licence stated, citation asked: bigearth.eu/datasets, "Multi-label UC Merced"
DIR/vit_tiny_in1k/vit_tiny_patch16_224.pth     ViT-Tiny of natural images; Apache-2.0, 22 MB
    huggingface.co/timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k
DIR/eurosat_ms/{class}/*.tif    1,180 chips of EuroSAT-MS; MIT, zenodo.org/records/7711810, 2 GB
DIR/eurosat_rgb/{class}/*.jpg   21,600 chips of EuroSAT-RGB, the same record; 107 MB

UC Merced is split five times, and some runs have two or three of the splits.  Of the 80 images of
each folder 64 are to pretrain on and to fit the head, 16 to test.  Pretraining sees the labels of
those 64, or of a share of them.  Training is in float32.
"""
import itertools
from pathlib import Path

import numpy as np
import torch

import model as models
from lab import beside, finetune
from lab.runs import (Run, chip_folder, chip_probes, link, mean_over_labelled, no_predictor,
                      run_folder, thaw, toy_run)

SPLITS = range(5)
SHARES = (100, 30, 10, 3)                         # % of the images to train on that have labels
UCM = "runs/study/ucm"                            # where make_ucm puts links, tables and lists
WEIGHTS = "runs/study/weights/vit_tiny.pth"       # normalisation folded in: takes x in [0, 1]
WEIGHTS_S2C = "runs/study/weights/vit_tiny_s2c.pth"       # all but B4, B3, B2 have weight 0
WEIGHTS_S1 = "runs/study/weights/vit_tiny_s1.pth"         # VV, VH: each the mean of R, G, B
SIZE = 64                                         # pixels a side; PerA's crops have 112

# ------------------------------------------------------------------------------------- UC Merced

SMALL = ["--preset", "small", "--batch-size", "64"]      # as the preset had; 16 came from here
UCM_FLAGS = [*SMALL, "--holdout", "0", "--epochs", "4"]
BATCH_16 = ["--batch-size", "16"]
INFO_NCE = ["--soft-weight", "0", "--mask-ratio", "0"]
SOFT = ["--mask-ratio", "0"]
METHODS = {                                       # from the weights, on five splits
    "InfoNCE": INFO_NCE,
    "+ soft": SOFT,
    "+ mask": ["--soft-weight", "0"],
    "+ both": [],
    "PerA": ["--method", "pera", "--soft-weight", "0"],
    "PerA + soft": ["--method", "pera", "--soft-weight", "0.5"]}
FORMS = {                                         # "+ soft", but for these flags; three splits
    "soft weight 0.1": ["--soft-weight", "0.1"],
    "soft weight 2": ["--soft-weight", "2"],
    "soft-tau 0.1": ["--soft-tau", "0.1"],
    "soft-tau 0.5": ["--soft-tau", "0.5"],
    "form ce, weight 1": ["--soft-form", "ce", "--soft-weight", "1"],
    "form bce_mean": ["--soft-form", "bce_mean"]}
CHOICES = {                                       # "+ both", but for these flags
    "lr 1.5e-4": ["--lr", "1.5e-4"],
    "lr 6e-4": ["--lr", "6e-4"],
    "lr 1.2e-3": ["--lr", "1.2e-3"],
    "momentum 0.95": ["--momentum", "0.95"],
    "momentum 0.995": ["--momentum", "0.995"],
    "lr 6e-4, momentum 0.95": ["--lr", "6e-4", "--momentum", "0.95"],
    "hidden 256": ["--hidden", "256"],
    "hidden 4096": ["--hidden", "4096"],
    "crops from 0.15": ["--crop-min", "0.15"],
    "crops from 0.6": ["--crop-min", "0.6"],
    "jitter 0.4, grey 0.2": ["--jitter", "0.4", "--grey", "0.2"],
    "clip 3": ["--clip", "3"],
    "drop-path 0.1": ["--drop-path", "0.1"],
    "weight decay 0": ["--weight-decay", "0", "0"],
    "batch size 128": ["--batch-size", "128"],
    "batch size 32": ["--batch-size", "32"],
    "batch size 32, lr 6e-4": ["--batch-size", "32", "--lr", "6e-4"],
    "batch size 32, momentum 0.95": ["--batch-size", "32", "--momentum", "0.95"],
    "batch size 16": BATCH_16,
    "batch size 16, lr 6e-4": [*BATCH_16, "--lr", "6e-4"],
    "batch size 16, momentum 0.95": [*BATCH_16, "--momentum", "0.95"],
    "batch size 16, momentum 0.99": [*BATCH_16, "--momentum", "0.99"],
    "batch size 16, hidden 4096": [*BATCH_16, "--hidden", "4096"],
    "batch size 16, crops from 0.6": [*BATCH_16, "--crop-min", "0.6"],
    "batch size 8": ["--batch-size", "8"],
    "8 epochs": ["--epochs", "8"],
    "8 epochs, batch size 32": ["--epochs", "8", "--batch-size", "32"],
    "8 epochs, batch size 16": ["--epochs", "8", *BATCH_16]}
PERA_CHOICES = {                                  # "PerA", but for these flags; two splits
    "PerA, batch size 16": BATCH_16,
    "PerA, no local crops": ["--crops", "2", "0"],
    "PerA, prototypes 64": ["--prototypes", "64"],
    "PerA, prototypes 4096": ["--prototypes", "4096"],
    "PerA, jitter 0.4": ["--jitter", "0.4"],
    "PerA, clip 0": ["--clip", "0"]}


def ucm_run(split, flags, share=100, start=WEIGHTS, switch=None):
    """A training run on 80 % of the images, `share` % of them with labels; ridge heads."""
    root = f"{UCM}/{split}"
    flags = ["--modality", "rgb", "--data", f"{root}/train", "--labels",
             f"{root}/train_{share}.tsv", *UCM_FLAGS, *flags, "--seed", str(split)]
    if "pera" not in flags:                       # PerA's crops have sizes of their own
        flags += ["--img-size", str(SIZE)]
    if start:
        flags += ["--init", start]
    return Run(flags, switch, ucm_probes(split), amp="off")


def ucm_probes(split, head="ridge", shares=SHARES):
    """The head on CLS and the mean patch, fit on each share of the training images."""
    root = f"{UCM}/{split}"
    probes = []
    for share in shares:
        probes.append([
            "--task", "folder", "--modality", "rgb", "--data", f"{root}/all",
            "--labels", f"{root}/labels.tsv", "--lists", f"{root}/fit_{share}.txt",
            f"{root}/test.txt", "--feature", "cls+mean", "--protocol", head, "--seed", str(split)])
    return probes


def method_runs():
    """The weights as they are, what SoftCon and PerA make of them, and the labels themselves."""
    runs = {}
    for split in SPLITS:
        for name, size in (("frozen", SIZE), ("frozen, 112 px", 112)):
            probes = [[*probe, "--img-size", str(size)] for probe in ucm_probes(split)]
            runs[f"ucm/{name}/rgb/{split}"] = Run(["--ckpt", WEIGHTS], None, probes, train=False)
        for name, flags in METHODS.items():
            runs[f"ucm/{name}/rgb/{split}"] = ucm_run(split, flags)
        runs[f"ucm/fine-tuned/rgb/{split}"] = fine_tuned_run(split)
        runs[f"ucm/logistic/rgb/{split}"] = logistic_run(split)
    return runs


def soft_term_runs():
    """InfoNCE without and with the soft term in other ways; few labels; forms of the soft term."""
    runs = {}
    for split, name in itertools.product(range(3), ("InfoNCE", "+ soft")):
        flags = METHODS[name]
        runs[f"ucm/{name}, scratch/rgb/{split}"] = ucm_run(split, flags, start=None)
        runs[f"ucm/{name}, no predictor/rgb/{split}"] = ucm_run(split, flags, switch=no_predictor)
        runs[f"ucm/{name}, thawed/rgb/{split}"] = ucm_run(split, flags, switch=thaw)
        runs[f"ucm/{name}, 12 epochs/rgb/{split}"] = ucm_run(split, [*flags, "--epochs", "12"])
    for split, name in itertools.product(SPLITS, ("InfoNCE", "+ soft")):
        flags = [*METHODS[name], *BATCH_16]
        runs[f"ucm/{name}, batch size 16/rgb/{split}"] = ucm_run(split, flags)
    for split, share in itertools.product(range(3), SHARES[1:]):
        runs[f"ucm/+ soft, {share} % labelled/rgb/{split}"] = ucm_run(split, SOFT, share)
        runs[f"ucm/+ soft, {share} % labelled, their mean/rgb/{split}"] = ucm_run(
            split, SOFT, share, switch=mean_over_labelled)
        if share == 10:
            runs[f"ucm/+ soft, 10 % labelled, their mean, weight 0.05/rgb/{split}"] = ucm_run(
                split, [*SOFT, "--soft-weight", "0.05"], share, switch=mean_over_labelled)
    for split, name in itertools.product(range(3), FORMS):
        runs[f"ucm/{name}/rgb/{split}"] = ucm_run(split, [*SOFT, *FORMS[name]])
    return runs


def choice_runs():
    """One choice at a time."""
    runs = {}
    for split, name in itertools.product(range(3), CHOICES):
        runs[f"ucm/{name}/rgb/{split}"] = ucm_run(split, CHOICES[name])
    for split, name in itertools.product(range(2), PERA_CHOICES):
        flags = [*METHODS["PerA"], *PERA_CHOICES[name]]
        runs[f"ucm/{name}/rgb/{split}"] = ucm_run(split, flags)
    return runs


def ucm_runs():
    return method_runs() | soft_term_runs() | choice_runs()


def fine_tuned_run(split):
    """The network of the weights, trained on the labels for 12 epochs."""
    root = f"{UCM}/{split}"
    return Run([WEIGHTS, "rgb", "--data", f"{root}/all", "--labels", f"{root}/labels.tsv",
                "--lists", f"{root}/fit_100.txt", f"{root}/test.txt", "--epochs", "12",
                "--img-size", str(SIZE), "--seed", str(split)], script=finetune.main)


def images_of(share):
    """The number of training images in a share.  Each of the 21 folders has 64 of them."""
    return 21 * round(share / 100 * 64)


def logistic_run(split):
    """One probe of several networks, which computes band statistics and random weights once."""
    files = [WEIGHTS]
    for name in ("InfoNCE", "+ soft"):
        files.append(f"{run_folder(f'ucm/{name}/rgb/{split}')}/backbone.pt")
    [probe] = ucm_probes(split, "logistic", [100])
    return Run(["--ckpt", *files], None, [[*probe, "--img-size", str(SIZE)]], train=False)


def make_ucm(source, folder):
    """Links to the images, tables of labels and lists of names of one split.

    folder: .../SPLIT.  In it: all, train/{class}; labels.tsv, and train_S.tsv with the rows that
    pretraining may see; fit_S.txt and test.txt for the probe.  S is a share of SHARES.
    """
    rng = np.random.default_rng(int(folder.name))
    folder.mkdir(parents=True)
    (folder / "all").symlink_to(Path(source, "images").resolve())
    header, *lines = Path(source, "LandUse_Multilabeled.txt").read_text().splitlines()
    rows = {line.split("\t")[0]: line for line in lines}
    train = []                                    # the names to train on, a list for each class
    test = []
    for class_folder in sorted(Path(source, "images").iterdir()):
        files = sorted(class_folder.iterdir())
        files = [files[i] for i in rng.permutation(len(files))]
        count = round(0.8 * len(files))
        link(files[:count], folder / "train" / class_folder.name)
        train.append([file.stem for file in files[:count]])
        test += [file.stem for file in files[count:]]
    (folder / "test.txt").write_text("\n".join(test))
    (folder / "labels.tsv").write_text("\n".join([header, *lines]))
    for share in SHARES:
        names = []
        for class_names in train:
            names += class_names[:round(share / 100 * len(class_names))]
        (folder / f"fit_{share}.txt").write_text("\n".join(names))
        table = [header, *[rows[name] for name in names]]
        (folder / f"train_{share}.tsv").write_text("\n".join(table))


# ---------------------------------------------------------- from natural images to other sensors

CHIPS = [*SMALL, "--layout", "eurosat", "--holdout", "0", "--img-size", str(SIZE),
         "--epochs", "8", *INFO_NCE]
STARTS = {
    "scratch": [],
    "random": ["--init", WEIGHTS, "--adapt", "random"],
    "mean": ["--init", WEIGHTS, "--adapt", "mean"],
    "rgb": ["--init", WEIGHTS, "--adapt", "rgb"]}


def multispectral_run(split, flags, switch=None):
    """Training on 70 % of the multispectral chips; ridge and logistic heads."""
    flags = ["--modality", "s2c", "--data", f"{chip_folder('s2c', 70, split)}/train", *CHIPS,
             *flags, "--seed", str(split)]
    probes = chip_probes("s2c", 70, split, ("ridge", "logistic"))
    return Run(flags, switch, probes, amp="off")


def multispectral_runs():
    """EuroSAT-MS, three splits; 8 epochs, or 24."""
    runs = {}
    for split in range(3):
        probes = chip_probes("s2c", 70, split, ("ridge", "logistic"))
        runs[f"continual/frozen/s2c/{split}"] = Run(
            ["--ckpt", WEIGHTS_S2C], None, probes, train=False)
        for name, flags in STARTS.items():
            runs[f"continual/{name}/s2c/{split}"] = multispectral_run(split, flags)
        for name in ("random", "rgb"):
            runs[f"continual/{name}, thawed/s2c/{split}"] = multispectral_run(
                split, STARTS[name], thaw)
        runs[f"continual/rgb, batch size 16/s2c/{split}"] = multispectral_run(
            split, [*STARTS["rgb"], *BATCH_16])
        runs[f"continual/rgb, 24 epochs/s2c/{split}"] = multispectral_run(
            split, [*STARTS["rgb"], "--epochs", "24"])
        for name in ("rgb", "rgb, 24 epochs"):
            runs[f"continual/{name} and statistics/s2c/{split}"] = beside_run(split, name)
    return runs


def beside_run(split, name):
    """A head on the features of the run `name`, on band statistics, and on both (beside.py)."""
    chips = chip_folder("s2c", 70, split)
    backbone = f"{run_folder(f'continual/{name}/s2c/{split}')}/backbone.pt"
    return Run([backbone, "--modality", "s2c", "--data", f"{chips}/all", "--lists",
                f"{chips}/fit.txt", f"{chips}/test.txt"], script=beside.main)


def rgb_runs():
    """EuroSAT-RGB, one split: one epoch on 80 % of the chips."""
    runs = {}
    probes = chip_probes("rgb", 80, 0, ("ridge", "logistic"), ["cls+mean"])
    runs["continual/frozen/rgb/0"] = Run(["--ckpt", WEIGHTS], None, probes, train=False)
    for name in ("scratch", "random"):
        flags = ["--modality", "rgb", "--data", f"{chip_folder('rgb', 80, 0)}/train", *SMALL,
                 "--holdout", "0", "--img-size", str(SIZE), "--epochs", "1", *INFO_NCE,
                 *STARTS[name], "--seed", "0"]
        runs[f"continual/{name}/rgb/0"] = Run(flags, None, probes, amp="off")
    return runs


def radar_runs():
    """Radar images of the toy world, three seeds."""
    probe = ["--modality", "s1", "--data", "toy", "--holdout", "0.4", "--img-size", str(SIZE)]
    runs = {"continual/frozen/s1/0": Run(["--ckpt", WEIGHTS_S1], None, [probe], train=False)}
    for seed, name in itertools.product(range(3), ("scratch", "random", "mean")):
        flags = [*SMALL, "--img-size", str(SIZE), "--epochs", "4", *STARTS[name]]
        run = toy_run("s1", seed, flags)
        run.amp = "off"
        runs[f"continual/{name}/s1/{seed}"] = run
    return runs


def continual_runs():
    return multispectral_runs() | rgb_runs() | radar_runs()


def make_weights(shared):
    """The weights of natural images for x in [0, 1], for RGB, for 13 bands and for two."""
    folder = Path(WEIGHTS).parent
    folder.mkdir(parents=True, exist_ok=True)
    state, _ = models.read_weights(str(Path(shared, "vit_tiny_in1k/vit_tiny_patch16_224.pth")))
    state = models.fold_normalisation(state, [0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
    torch.save(state, WEIGHTS)
    layer = state["patch_embed.proj.weight"]
    for path, bands, adapt in ((WEIGHTS_S2C, 13, "rgb"), (WEIGHTS_S1, 2, "mean")):
        nothing = torch.zeros(layer.shape[0], bands, *layer.shape[2:])
        adapted = models.adapt_input(layer, nothing, adapt)
        torch.save(state | {"patch_embed.proj.weight": adapted}, path)


def make_folders(keys, shared):
    """Make the weights and the folders of UC Merced that these runs read, if not there yet."""
    if not Path(WEIGHTS_S1).exists():             # the last file of make_weights
        make_weights(shared)
    for key in keys:
        if key.startswith("ucm/"):
            folder = Path(UCM, key.split("/")[-1])
            if not folder.exists():
                make_ucm(Path(shared, "ucm_multilabel"), folder)
