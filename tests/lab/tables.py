"""The page results/README.md and the README's table, made of the lines in results/*.jsonl.

    python tests/lab/study.py tables          writes results/README.md

`page()` is the text of the page; tests/test_results.py holds the file to it.  A function here
makes one section: a caption that says what was run, then a table with one fact a row.  Numbers in
the captions are computed from the same lines, so that they cannot differ from the tables.
"""
import numpy as np

from lab import real_tables
from lab.lines import (bullets, by_seed, caption, cell, find, gain_cells, markdown, paired_gain,
                       paragraph, read_lines, standard_error, values)

# ------------------------------------------------------------------------------------- captions


def toy_data():
    """What the networks of the toy world and the heads of their probes saw."""
    found = find("softcon/both", "s1")[0]["probes"][0]
    return (f"Data: the toy world of 2,000 scenes of 36 px with four seasons each, on s1 (radar) "
            f"or s2c (optical). Networks train on 1,207 scenes; the ridge head is fit on "
            f"{found['n_train']:,} images and tested on {found['n_test']:,} images of the other "
            f"scenes, with 9 classes.")


def chip_data(count, kind):
    return (f"Data: {count} {kind} EuroSAT chips of 64 px in 10 classes. The network is a "
            f"ViT-tiny/8. The head sees CLS and the mean patch, or CLS alone where the column says "
            f"so.")


# ------------------------------------------------------------------------------------- toy world

TOY_ROWS = [
    dict(title="mean and std of each band", run="long/both", network="stats"),
    dict(title="ResNet-18, random weights", run="long/both", network="random"),
    dict(title="InfoNCE", run="softcon/InfoNCE", epochs=14, predictor="yes"),
    dict(title="+ mask", run="softcon/+ mask", epochs=14, predictor="yes"),
    dict(title="+ soft", run="softcon/+ soft", epochs=14, predictor="yes"),
    dict(title="+ both", run="softcon/both", epochs=14, predictor="yes"),
    dict(title="InfoNCE", run="long/InfoNCE", epochs=28, predictor="yes"),
    dict(title="+ soft", run="long/+ soft", epochs=28, predictor="yes"),
    dict(title="+ both, the preset", run="long/both", epochs=28, predictor="yes"),
    dict(title="+ both", run="factors/no predictor", epochs=14, predictor="no"),
    dict(title="InfoNCE", run="long/InfoNCE, no predictor", epochs=28, predictor="no"),
    dict(title="+ soft", run="long/+ soft, no predictor", epochs=28, predictor="no"),
    dict(title="+ both", run="long/both, no predictor", epochs=28, predictor="no"),
    dict(title="ViT-tiny/4, random weights", run="pera/PerA", network="random"),
    dict(title="PerA, the preset", run="pera/PerA", epochs=8),
    dict(title="PerA + soft", run="pera/PerA + soft", epochs=8)]


def supervised_values():
    """Four cells: micro and macro on s1, then on s2c."""
    lines = {line["modality"]: line for line in read_lines("supervised")}
    cells = []
    for modality in ("s1", "s2c"):
        for metric in ("micro_map", "macro_map"):
            found = [lines[modality][metric]] if modality in lines else []
            cells.append(cell(found))
    return cells


def toy_cells(run, network="checkpoint"):
    """Four cells: micro and macro on s1, then on s2c."""
    cells = []
    for modality in ("s1", "s2c"):
        for metric in ("micro_map", "macro_map"):
            cells.append(cell(values(run, modality, metric, network)))
    return cells


def toy_section():
    rows = []
    for row in TOY_ROWS:
        network = row.get("network", "checkpoint")
        seeds = [len(values(row["run"], m, "micro_map", network)) for m in ("s1", "s2c")]
        rows.append([row["title"], row.get("epochs", "-"), row.get("predictor", "-"),
                     *toy_cells(row["run"], network), *seeds])
    rows.append(["ResNet-18, supervised", 10, "-", *supervised_values(), 1, 1])
    header = ["network", "epochs", "predictor", "s1 micro", "s1 macro", "s2c micro", "s2c macro",
              "seeds s1", "seeds s2c"]
    runs = [row["run"] for row in TOY_ROWS] + ["supervised/10 epochs"]
    labelled = read_lines("supervised")[0]["n_train"]
    text = paragraph(
        "Average precision of frozen features of SoftCon (ResNet-18) and of PerA (ViT-tiny/4),",
        "between the floors and a ResNet-18 that trained on the labels themselves.", toy_data(),
        f"The supervised network trains on the {labelled:,} labelled images of the 1,207 scenes.")
    above = caption(text, "softcon long pera supervised 'factors/no predictor/*'", runs,
                    ("s1", "s2c"))
    remark = paragraph(
        "World, preset and epochs were chosen by probes of such worlds, and seeds vary the",
        "training only. So the margins are optimistic.")
    return f"## The toy world\n\n{above}\n\n{markdown(header, rows)}\n\n{remark}"


GAINS = [
    dict(title="soft term over InfoNCE", run="softcon/+ soft", base="softcon/InfoNCE"),
    dict(title="soft term over InfoNCE", run="long/+ soft", base="long/InfoNCE", epochs=28),
    dict(title="soft term over InfoNCE", run="long/+ soft, no predictor",
         base="long/InfoNCE, no predictor", epochs=28, predictor="no"),
    dict(title="mask over InfoNCE", run="softcon/+ mask", base="softcon/InfoNCE"),
    dict(title="mask over + soft", run="softcon/both", base="softcon/+ soft"),
    dict(title="mask over + soft", run="long/both", base="long/+ soft", epochs=28),
    dict(title="no predictor over both", run="factors/no predictor", base="softcon/both",
         predictor="yes, no"),
    dict(title="no predictor over both", run="long/both, no predictor", base="long/both",
         epochs=28, predictor="yes, no")]


def gains_section():
    rows = []
    for row in GAINS:
        for modality in ("s1", "s2c"):
            gains = paired_gain(row["run"], row["base"], modality)
            rows.append([row["title"], row.get("epochs", 14), row.get("predictor", "yes"),
                         modality, *gain_cells(gains, 3)[:2], len(gains)])
    header = ["comparison", "epochs", "predictor", "modality", "gain in micro", "standard error",
              "paired seeds"]
    text = paragraph(
        "Differences in micro average precision between two runs of the same seed: their mean and",
        "its standard error. The runs are those of the table above.")
    return f"## Gains on the toy world\n\n{text}\n\n{markdown(header, rows)}"


TAKE_OFF = 0.66
TAKE_OFF_ROWS = [
    dict(title="InfoNCE", run="softcon/InfoNCE"),
    dict(title="+ mask", run="softcon/+ mask"),
    dict(title="+ soft", run="softcon/+ soft"),
    dict(title="+ both", run="softcon/both"),
    dict(title="+ both, no predictor", run="factors/no predictor")]


def take_off_section():
    rows = []
    for row in TAKE_OFF_ROWS:
        numbers = values(row["run"], "s1", "micro_map")
        high = [number for number in numbers if number > TAKE_OFF]
        rows.append([row["title"], len(high), len(numbers)])
    text = paragraph(
        "On s1 a run either stays near its start or takes off, to a micro average precision above",
        f"{TAKE_OFF} after 14 epochs. The runs are those of the first table.")
    table = markdown(["14 epochs of s1", f"runs above {TAKE_OFF}", "runs"], rows)
    return f"## Runs that took off\n\n{text}\n\n{table}"


# --------------------------------------------------------------------------- one choice at a time

SWITCH_ROWS = [
    dict(choice="as it is", setting="soft weight .5, mask .3", run="softcon/both"),
    dict(choice="soft term: `bce`, weight .5, temperature .2", setting="`bce_mean`",
         run="factors/form bce_mean"),
    dict(choice="soft term", setting="`ce`, weight 1", run="factors/form ce, weight 1"),
    dict(choice="soft term", setting="none", run="softcon/+ mask"),
    dict(choice="soft term", setting="weight .1", run="factors/soft-weight 0.1"),
    dict(choice="soft term", setting="weight 2", run="factors/soft-weight 2"),
    dict(choice="soft term", setting="temperature .1", run="factors/soft-tau 0.1"),
    dict(choice="soft term", setting="temperature .5", run="factors/soft-tau 0.5"),
    dict(choice="mask: .3, blocks of 4 px cells", setting="none", run="softcon/+ soft"),
    dict(choice="mask", setting=".5", run="factors/mask-ratio 0.5"),
    dict(choice="mask", setting="blocks of 8 px cells", run="factors/mask cells of 8 px"),
    dict(choice="mask", setting="each cell alone", run="factors/mask scattered"),
    dict(choice="loss: both directions, all images", setting="q1 with k2 alone",
         run="factors/one direction"),
    dict(choice="loss", setting="no unlabelled images", run="factors/labelled images only"),
    dict(choice="heads: projector, predictor", setting="no predictor", run="factors/no predictor"),
    dict(choice="augmentation: flips both ways, crops from .5", setting="no vertical flip",
         run="factors/no vertical flip"),
    dict(choice="augmentation", setting="crops from .2, grey .2",
         run="factors/crops from 0.2, grey 0.2"),
    dict(choice="optimiser: lr 5e-4, betas .9 .95, momentum .9", setting="lr 1.5e-4",
         run="factors/lr 1.5e-4"),
    dict(choice="optimiser", setting="lr 1.5e-3", run="factors/lr 1.5e-3"),
    dict(choice="optimiser", setting="betas .9 .999", run="factors/betas .9 .999"),
    dict(choice="optimiser", setting="momentum .99", run="factors/momentum 0.99"),
    dict(choice="ViT-tiny/8 instead of ResNet-18", setting="LayerScale from 1",
         run="factors/ViT, LayerScale 1"),
    dict(choice="ViT-tiny/8 instead of ResNet-18", setting="LayerScale from 1e-5",
         run="factors/ViT, LayerScale 1e-5")]
OPTICAL_SWITCH_ROWS = [
    dict(choice="as it is", setting="soft weight .5, mask .3", run="softcon/both"),
    dict(choice="soft term", setting="weight 2", run="factors/soft-weight 2"),
    dict(choice="soft term", setting="`ce`, weight 1", run="factors/form ce, weight 1"),
    dict(choice="heads", setting="no predictor", run="factors/no predictor")]
PERA_ROWS = [
    dict(choice="as it is", setting="VV and VH offset apart, no decay of norms", run="pera/PerA"),
    dict(choice="light", setting="VV and VH offset together", run="factors/PerA, one offset"),
    dict(choice="light", setting="brightness and contrast",
         run="factors/PerA, brightness and contrast"),
    dict(choice="weight decay", setting="of everything", run="factors/PerA, decay everything")]


def choice_table(choices, modality):
    """A row a setting: micro and macro average precision, number of seeds."""
    rows = []
    for row in choices:
        micro = values(row["run"], modality, "micro_map")
        macro = values(row["run"], modality, "macro_map")
        rows.append([row["choice"], row["setting"], cell(micro), cell(macro), len(micro)])
    return markdown(["choice", "setting", f"{modality} micro", f"{modality} macro", "seeds"], rows)


def switch_section():
    radar_text = paragraph(
        'SoftCon as in the row "+ both" of 14 epochs with predictor, on s1, with one choice',
        "changed at a time. Where a choice comes first, it says what the preset has.", toy_data())
    radar = caption(radar_text, "softcon factors", [row["run"] for row in SWITCH_ROWS], ["s1"])
    optical = caption("The same on s2c.", "softcon factors",
                      [row["run"] for row in OPTICAL_SWITCH_ROWS], ["s2c"])
    return (f"## SoftCon's choices\n\n{radar}\n\n{choice_table(SWITCH_ROWS, 's1')}\n\n"
            f"{optical}\n\n{choice_table(OPTICAL_SWITCH_ROWS, 's2c')}")


def pera_section():
    text = paragraph(
        "PerA's toy preset, 8 epochs of s1, with one choice of this code replaced by another.",
        toy_data())
    above = caption(text, "pera 'factors/PerA*'", [row["run"] for row in PERA_ROWS], ["s1"])
    return f"## PerA's choices\n\n{above}\n\n{choice_table(PERA_ROWS, 's1')}"


START_NAMES = {
    "none": "from scratch",
    "random": "input layer fresh",
    "mean": "input layer: the file's mean",
    "rgb": "input layer: the file's rgb"}


def start_table(modality, adapts):
    rows = []
    for adapt in adapts:
        micro = values(f"init/{adapt}", modality, "micro_map")
        macro = values(f"init/{adapt}", modality, "macro_map")
        rows.append([START_NAMES[adapt], cell(micro), cell(macro), len(micro)])
    return markdown(["start", f"{modality} micro", f"{modality} macro", "seeds"], rows)


def start_section():
    runs = [f"init/{adapt}" for adapt in START_NAMES]
    radar_text = paragraph(
        "Three epochs of SoftCon (ResNet-18) on s1, from SoftCon's s2c network of the same seed",
        '("+ both", 14 epochs).', toy_data())
    radar = caption(radar_text, "init --shared DIR", runs, ["s1"])
    optical_text = paragraph(
        "Three epochs of SoftCon (ResNet-18) on s2c, from one network that InfoNCE trained for two",
        "epochs on 70 % of 21,600 RGB EuroSAT chips.")
    optical_runs = [*runs, "init/InfoNCE, ResNet-18"]
    optical = caption(optical_text, "init --shared DIR", optical_runs, ["s2c", "rgb"])
    return (f"## Starts from another sensor\n\n{radar}\n\n"
            f"{start_table('s1', ('none', 'random', 'mean'))}\n\n{optical}\n\n"
            f"{start_table('s2c', ('none', 'random', 'mean', 'rgb'))}")


# ------------------------------------------------------------------------------------ real chips

# The probes of a run on multispectral chips, in order: ridge and logistic on CLS, then both on CLS
# and the mean patch.  On RGB chips: ridge on CLS, then on CLS and the mean patch.
MS_PROBES = {"ridge": 2, "ridge, CLS": 0, "logistic": 3, "logistic, CLS": 1}
RGB_PROBES = {"ridge": 1, "ridge, CLS": 0}
CLASS_PROBES = {"ridge": 1, "ridge, CLS": 0}
ELSEWHERE = 0.81                    # accuracy of mean and std as others measured it on such chips
CHIP_ROWS = [
    dict(title="PerA", run="eurosat/PerA"),
    dict(title="InfoNCE", run="eurosat/InfoNCE"),
    dict(title="InfoNCE + mask", run="eurosat/InfoNCE + mask"),
    dict(title="InfoNCE + mask, no predictor", run="eurosat/+ mask, no predictor"),
    dict(title="random weights", run="eurosat/PerA", network="random"),
    dict(title="mean and std of each band", run="eurosat/PerA", network="stats")]
ALL_CHIP_ROWS = [
    dict(title="PerA, all chips", run="eurosat/PerA, all chips"),
    dict(title="random weights", run="eurosat/PerA, all chips", network="random"),
    dict(title="mean and std of each band", run="eurosat/PerA, all chips", network="stats")]
CLASS_ROWS = [
    dict(title="InfoNCE + mask", run="classes/InfoNCE + mask"),
    dict(title="+ soft on classes", run="classes/+ soft on classes"),
    dict(title="random weights", run="classes/InfoNCE + mask", network="random"),
    dict(title="mean and std of each band", run="classes/InfoNCE + mask", network="stats")]


def accuracies(row, modality, probe):
    return values(row["run"], modality, "accuracy", row.get("network", "checkpoint"), probe)


def chip_table(chip_rows, modality, probes):
    """Accuracies, a column a probe; last how many splits there are."""
    rows = []
    for row in chip_rows:
        cells = [cell(accuracies(row, modality, probe)) for probe in probes.values()]
        splits = sum(map(len, by_seed(row["run"], modality, "accuracy").values()))
        rows.append([row["title"], *cells, splits])
    return markdown(["accuracy", *probes, "splits"], rows)


def gain_over_random(run, modality, probe):
    """The differences checkpoint - random of all splits, in order."""
    ours = by_seed(run, modality, "accuracy", "checkpoint", probe)
    random = by_seed(run, modality, "accuracy", "random", probe)
    gains = []
    for seed in ours:
        gains += [a - b for a, b in zip(ours[seed], random[seed])]
    return gains


def split_table():
    """PerA's gain over random weights, split by split."""
    part = gain_over_random("eurosat/PerA", "s2c", MS_PROBES["ridge"])
    every = gain_over_random("eurosat/PerA, all chips", "s2c", MS_PROBES["ridge"])
    rows = []
    for split, gain in enumerate(every):
        part_cell = f"{part[split]:+.3f}" if split < len(part) else "not run"
        rows.append([split, part_cell, f"{gain:+.3f}"])
    return markdown(["split", "pretrained on 70 %", "pretrained on all chips"], rows)


def chip_section():
    part_text = paragraph(
        chip_data("1,180", "multispectral"),
        "Networks are pretrained without labels for 20 epochs on 70 % of them (826); the head is",
        "fit on the same chips and tested on the other 354. One number without ± is one split.")
    part = caption(part_text, "eurosat --shared DIR", [row["run"] for row in CHIP_ROWS], ["s2c"])
    every_text = paragraph(
        "One network is pretrained without labels on all 1,180 chips; each of five splits has 826",
        "of them to fit the head and 354 to test it.")
    every = caption(every_text, "eurosat --shared DIR", ["eurosat/PerA, all chips"], ["s2c"])
    splits = paragraph(
        "PerA's gain over random weights, split by split, of the ridge head on CLS and the mean",
        "patch. The runs are those of the two tables above.")
    return (f"## Real multispectral chips\n\n{part}\n\n"
            f"{chip_table(CHIP_ROWS, 's2c', MS_PROBES)}\n\n{every}\n\n"
            f"{chip_table(ALL_CHIP_ROWS, 's2c', MS_PROBES)}\n\n{splits}\n\n{split_table()}")


def class_section():
    text = paragraph(
        chip_data("1,180", "multispectral"),
        "SoftCon trains for 20 epochs on 30 % of them with their classes as labels (354); a ridge",
        "head is fit on another 30 % (354) and tested on the last 40 % (472).")
    above = caption(text, "classes --shared DIR", [row["run"] for row in CLASS_ROWS], ["s2c"])
    table = chip_table(CLASS_ROWS, "s2c", CLASS_PROBES)
    return f"## The soft term on real classes\n\n{above}\n\n{table}"


def gain_interval(probe):
    """95 % interval of checkpoint - random.  Older lines have that of random - checkpoint."""
    if "gain" in probe:
        return probe["gain"]["random"]
    low, high = probe["difference"]["random"]
    return -high, -low


def rgb_gain_table(methods):
    rows = []
    for row in methods:
        gain = gain_over_random(row["run"], "rgb", RGB_PROBES["ridge"])[0]
        low, high = gain_interval(find(row["run"], "rgb")[0]["probes"][RGB_PROBES["ridge"]])
        rows.append([row["title"], f"{gain:+.3f}", f"{low:+.3f}", f"{high:+.3f}"])
    return markdown(["network", "gain in accuracy", "95 % from", "95 % to"], rows)


def rgb_section():
    methods = CHIP_ROWS[:3]
    floors = CHIP_ROWS[-2:]
    text = paragraph(
        chip_data("21,600", "RGB"),
        "Networks are pretrained without labels for 3 epochs on 70 % of them (15,120); the ridge",
        "head is fit on the same chips and tested on the other 6,480. There is one split.")
    above = caption(text, "eurosat --shared DIR", [row["run"] for row in methods], ["rgb"])
    gains = paragraph(
        "Gains over random weights, with CLS and the mean patch. 95 % of 200 paired bootstraps of",
        "the test chips lie in the interval. The runs are those of the table above.")
    return (f"## Real RGB chips\n\n{above}\n\n"
            f"{chip_table([*methods, *floors], 'rgb', RGB_PROBES)}\n\n{gains}\n\n"
            f"{rgb_gain_table(methods)}")


# ----------------------------------------------------------------------------------------- costs

COST_ROWS = {
    "SoftCon, ViT-S/14": [
        dict(title="all tokens", run="costs/SoftCon, all tokens"),
        dict(title="30 % masked, the preset", run="costs/SoftCon, 30 % masked, the preset"),
        dict(title="60 % masked", run="costs/SoftCon, 60 % masked"),
        dict(title="30 % masked, no soft term", run="costs/SoftCon, 30 % masked, no soft term"),
        dict(title="30 % masked, bf16", run="costs/SoftCon, 30 % masked, bf16")],
    "PerA, ViT-S/16": [
        dict(title="all tokens in both networks", run="costs/PerA, all tokens in both networks"),
        dict(title="patches dropped", run="costs/PerA"),
        dict(title="patches dropped, soft term", run="costs/PerA, soft term"),
        dict(title="patches dropped, no local crops", run="costs/PerA, no local crops"),
        dict(title="patches dropped, bf16", run="costs/PerA, bf16")]}


def cost_table(title):
    rows = []
    for row in COST_ROWS[title]:
        cells = ["not run", "not run"]
        if find(row["run"], "s2c"):
            line = find(row["run"], "s2c")[0]
            part = line.get("step") or line.get("sparse") or line.get("dense")
            cells = [f"{part['images_per_s']:.1f}", f"{part['step_gb']:.2f}"]
        rows.append([row["title"], *cells, "not run"])
    return markdown([title, "images/s", "GB", "images/s on a GPU"], rows)


def cost_section():
    softcon, pera = COST_ROWS
    softcon_text = paragraph(
        "A SoftCon step at full size on random pixels: 13 bands, 224 px, 8 scenes, float32 unless",
        "the row says bf16. GB is the memory that it takes above parameters and optimiser.")
    softcon_above = caption(softcon_text, "'costs/SoftCon*'",
                            [row["run"] for row in COST_ROWS[softcon]], ["s2c"])
    pera_text = paragraph(
        "A PerA step of the same size: crops of 2 x 224 and 8 x 96 px, 4,096 prototypes. The first",
        "two rows test the claim that dropping patches saves memory.")
    pera_above = caption(pera_text, "'costs/PerA*'", [row["run"] for row in COST_ROWS[pera]],
                         ["s2c"])
    return (f"## What a training step costs\n\n{softcon_above}\n\n{cost_table(softcon)}\n\n"
            f"{pera_above}\n\n{cost_table(pera)}")


# What bench.py printed at commit 8869603, before a results file held such lines.  The data.py of
# that commit had a TIFF parser; since then tifffile reads.
OLD_READING = [
    dict(reader="tifffile, interpolate, stack, scale", workers="1", images=131),
    dict(reader="tifffile, interpolate, stack, scale", workers="2", images=278),
    dict(reader="`data.py`, with the parser of that commit", workers="1", images=297),
    dict(reader="`data.py`, with the parser of that commit", workers="2", images=557),
    dict(reader="packed by `data.py pack`", workers="0", images=11417)]
OLD_DROP_RATIO = 0.38
NEW_READING = [
    dict(reader="tifffile, interpolate, stack, scale", part="plain", workers="1"),
    dict(reader="tifffile, interpolate, stack, scale", part="plain", workers="2"),
    dict(reader="`data.py`", part="tiff", workers="1"),
    dict(reader="`data.py`", part="tiff", workers="2"),
    dict(reader="packed by `data.py pack`", part="packed", workers="0"),
    dict(reader="packed by `data.py pack`", part="packed", workers="2")]


def reading_section():
    rows = []
    for row in OLD_READING:
        rows.append([row["reader"], row["workers"], f"{row['images']:,}", "8869603"])
    for row in NEW_READING:
        cells = ["not run", "-"]
        for line in find("reading/TIFFs and packed files", "s2c").values():
            cells = [f"{line['loader'][row['part']][row['workers']]:,.0f}", line["commit"]]
        rows.append([row["reader"], row["workers"], *cells])
    drops = [[f"{OLD_DROP_RATIO:.2f}", "8869603"]]
    for line in find("reading/60 % of the tokens dropped", "s2c").values():
        drops.append([f"{line['drop']['ratio']:.2f}", line["commit"]])
    text = paragraph(
        "13 TIFFs of 264 px become one image. Device: two CPU cores, files in the page cache. The",
        "`data.py` of commit 8869603 had a TIFF parser, which tifffile has replaced since.")
    drop_text = paragraph(
        "Time of forward and backward of a ViT-S/14 with 60 % of its tokens dropped, as a share of",
        "that with all tokens. Command and device as above.")
    table = markdown(["reader", "processes", "images/s", "commit"], rows)
    drop_table = markdown(["share of the time", "commit"], drops)
    return (f"## Reading images\n\n{text}\n\n    python tests/lab/study.py run reading\n\n{table}"
            f"\n\n{drop_text}\n\n{drop_table}")


def received_megabytes(scenes, ranks):
    """What a rank receives in a step: keys (scenes,2,256) float32 and labels (scenes,2,9) uint8."""
    return 2 * (ranks - 1) / ranks * scenes * (4 * 256 + 9) / 1e6


def traffic_section():
    rows = []
    for scenes, ranks in ((256, 8), (4096, 64)):
        rows.append([f"{scenes:,}", ranks, f"{received_megabytes(scenes, ranks):.1f}"])
    text = paragraph(
        "SoftCon gathers keys and labels. On W ranks each receives 2 (W - 1) / W B (4 x 256 + 9)",
        "bytes a step of B scenes, in float32. This is computed, not measured.")
    table = markdown(["scenes a step", "ranks", "MB a rank and step"], rows)
    return f"## What ranks send each other\n\n{text}\n\n{table}"


# -------------------------------------------------------------------------------- published numbers

PUBLISHED = [
    dict(images="Sentinel-2", network="ResNet-50", bigearthnet=84.8, eurosat=98.6),
    dict(images="Sentinel-2", network="ViT-S/14", bigearthnet=85.0, eurosat=97.1),
    dict(images="Sentinel-2", network="ViT-B/14, four blocks", bigearthnet=86.8, eurosat=98.0),
    dict(images="Sentinel-1", network="ResNet-50", bigearthnet=78.9, eurosat=87.1),
    dict(images="Sentinel-1", network="ViT-S/14", bigearthnet=80.3, eurosat=87.1),
    dict(images="Sentinel-1", network="ViT-B/14, four blocks", bigearthnet=82.5, eurosat=89.1)]


def published_section():
    rows = []
    for row in PUBLISHED:
        rows.append([row["images"], row["network"], row["bigearthnet"], row["eurosat"], "not run"])
    header = ["pretrained on SSL4EO-S12's", "network", "BigEarthNet-10 %, mAP in %",
              "EuroSAT, accuracy in %", "ours"]
    text = paragraph(
        "SoftCon's released networks with a linear head; source: the README of zhu-xlab/softcon.",
        "They were pretrained on the 250,000 scenes of SSL4EO-S12, the networks of this page on",
        "1,207 toy scenes or on EuroSAT chips, so none of our numbers compares with these.")
    remark = paragraph(
        "PerA's result tables were not at hand. PerA at full size is not run here either.")
    return f"## The papers' own numbers\n\n{text}\n\n{markdown(header, rows)}\n\n{remark}"


# -------------------------------------------------------------------------------------- findings


def headline():
    stats = values("eurosat/PerA", "s2c", "accuracy", "stats", MS_PROBES["logistic"])
    networks = [row for row in CHIP_ROWS + ALL_CHIP_ROWS if row.get("network") != "stats"]
    best = max(np.mean(accuracies(row, "s2c", MS_PROBES["logistic"])) for row in networks)
    return paragraph(
        "On the 1,180 multispectral EuroSAT chips, band statistics (mean and standard deviation of",
        f"each band) with a logistic head beat every network trained from scratch: {cell(stats)}",
        f"against {best:.3f} in accuracy. A start from natural-image weights passes them.")


def soft_findings():
    """What the soft term, the predictor and the mask are worth on the toy world."""
    gains = []
    errors = []
    bare = []
    for modality in ("s1", "s2c"):
        gain = paired_gain("long/+ soft", "long/InfoNCE", modality)
        gains.append(np.mean(gain))
        errors.append(np.mean(gain) / standard_error(gain))
        bare.append(np.mean(paired_gain("long/+ soft, no predictor", "long/InfoNCE, no predictor",
                                        modality)))
    return [
        "At the preset's 28 epochs, unmasked and with a predictor, the soft term gains "
        f"{gains[0]:.3f} on the toy world's s1 and {gains[1]:.3f} on s2c: {errors[0]:.1f} and "
        f"{errors[1]:.1f} standard errors of 3 seeds.",
        f"Without a predictor the soft term gains {bare[0]:.3f} on s1 and nothing on s2c "
        f"({bare[1]:+.3f}). So the predictor stays in the preset: on the toy world the soft term "
        "pays on s2c only with it. On UC Merced it pays without one, too.",
        "Mask and predictor delay the take-off on s1. At 28 epochs what they cost is within the "
        "noise.",
        "The mask stays because it is the paper's, because it spares a ViT work, and because it "
        "helps InfoNCE on UC Merced; over the soft term it adds nothing there."]


def chip_findings():
    """What pretraining is worth on real chips."""
    every = accuracies(ALL_CHIP_ROWS[0], "s2c", MS_PROBES["ridge"])
    errors = (np.mean(every) - ELSEWHERE) / standard_error(every)
    every_gains = gain_over_random("eurosat/PerA, all chips", "s2c", MS_PROBES["ridge"])
    part_gains = gain_over_random("eurosat/PerA", "s2c", MS_PROBES["ridge"])
    ahead = sum(gain > 0 for gain in every_gains)
    part_ahead = sum(gain > 0 for gain in part_gains)
    rgb = [gain_over_random(row["run"], "rgb", RGB_PROBES["ridge"])[0] for row in CHIP_ROWS[:3]]
    bare, soft = [np.mean(accuracies(row, "s2c", CLASS_PROBES["ridge"])) for row in CLASS_ROWS[:2]]
    return [
        "A logistic head makes more of band statistics than of any network trained from scratch "
        "on the multispectral chips. A ridge head puts PerA ahead of them.",
        f"With a ridge head PerA is ahead of random weights in {ahead} of 5 splits when pretrained "
        f"on all multispectral chips, and in {part_ahead} of 3 when pretrained on 70 % of them.",
        f"Pretrained on all multispectral chips PerA has {np.mean(every):.3f} with that head. That "
        f"is {errors:.1f} standard errors above the {ELSEWHERE:.2f} measured elsewhere for mean "
        "and standard deviation.",
        f"With the classes of 30 % of the chips as labels, the soft term lifts the accuracy from "
        f"{bare:.3f} to {soft:.3f}.",
        f"On RGB chips PerA gains {rgb[0]:.3f} over random weights, InfoNCE {rgb[1]:.3f}, and "
        f"InfoNCE with the mask {rgb[2]:.3f}."]


def other_findings():
    scratch = np.mean(values("init/none", "s2c", "micro_map"))
    fresh = np.mean(values("init/random", "s2c", "micro_map"))
    dense = find("costs/PerA, all tokens in both networks", "s2c")[0]["dense"]
    sparse = find("costs/PerA", "s2c")[0]["sparse"]
    speed = sparse["images_per_s"] / dense["images_per_s"]
    memory = sparse["step_gb"] / dense["step_gb"]
    return [
        f"A start from another sensor's network pays on s2c ({fresh:.3f} with a fresh input layer, "
        f"{scratch:.3f} from scratch, after 3 epochs), and little on s1.",
        f"Dropped patches make PerA's step {speed:.1f} times as fast, in {memory:.2f} of the "
        "memory.",
        "Not run: any GPU, the real 250,000 scenes of SSL4EO-S12, the released weight files, "
        "BigEarthNet."]


# ----------------------------------------------------------------------------------------- pages


def opening():
    files = paragraph(
        "This page is made of the `.jsonl` files beside it by `python tests/lab/study.py tables`,",
        "and a test holds it to them. A line of these files is one run: its flags, commit, device,",
        "the last line of its log, and what `probe.py` said. `python tests/lab/study.py run STUDY`",
        "repeats the runs of a study that have no line. A commit with + had changed files.")
    numbers = paragraph(
        '"a ± b" is mean and standard deviation over the seeds or splits of the row; a number',
        "without ± is one run. Micro average precision pools all classes, macro is the mean over",
        "classes. Training was in bf16 unless a table says otherwise. The papers' own numbers",
        "stand in the last table.")
    older = paragraph(
        "Until commit 6fd5911 the soft term was a mean over labelled images. With labels of all",
        "images that is the same. On the toy world, of whose images 92 % have labels, its runs are",
        "older: there the term was 1.09 times as loud as now (`bce_mean`: 1.19 times).")
    findings = bullets(*real_tables.findings(), *soft_findings(), *chip_findings(),
                       *other_findings())
    top = f"# Results\n\n{headline()}\n\n{files}\n\n{numbers}\n\n{older}"
    return f"{top}\n\n## Findings\n\n{findings}"


def page():
    """The text of results/README.md."""
    sections = [opening(), toy_section(), gains_section(), take_off_section(), switch_section(),
                pera_section(), start_section(), chip_section(), class_section(), rgb_section(),
                cost_section(), reading_section(), traffic_section(), published_section()]
    sections[1:1] = real_tables.sections()                     # real images come first
    return "\n\n".join(sections) + "\n"
