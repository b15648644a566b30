"""The sections of results/README.md on real images: what the studies `ucm` and `continual` found.

tables.py puts them on the page.  All numbers in the tables come from the lines of ucm.jsonl and
continual.jsonl; the sizes of the data in the captions are those of real.py.
"""
import numpy as np

from lab import real
from lab.lines import by_seed, caption, cell, find, gain_cells, markdown, paired_gain, paragraph
from lab.runs import run_folder

METRICS = ("micro_map", "macro_map")

# A row: what it is called on the page, and the run that it comes from; network: which network of
# its probe, if not the checkpoint; readme: it stands in the README, too.
MAIN_ROWS = [
    dict(title="mean and std of each band", run="ucm/frozen", network="stats", size=64,
         readme=True),
    dict(title="random weights", run="ucm/frozen", network="random", size=64, readme=True),
    dict(title="natural-image weights, frozen", run="ucm/frozen", size=64, readme=True),
    dict(title="InfoNCE", run="ucm/InfoNCE", size=64),
    dict(title="InfoNCE + soft term", run="ucm/+ soft", size=64),
    dict(title="InfoNCE + mask", run="ucm/+ mask", size=64),
    dict(title="InfoNCE + soft term + mask", run="ucm/+ both", size=64),
    dict(title="InfoNCE, batch size 16", run="ucm/InfoNCE, batch size 16", size=64, readme=True),
    dict(title="InfoNCE + soft term, batch size 16", run="ucm/+ soft, batch size 16", size=64,
         readme=True),
    dict(title="InfoNCE + soft term + mask, batch size 16", run="ucm/batch size 16", size=64),
    dict(title="natural-image weights, frozen", run="ucm/frozen, 112 px", size=112, readme=True),
    dict(title="PerA", run="ucm/PerA", size=112, readme=True),
    dict(title="PerA + soft term", run="ucm/PerA + soft", size=112),
    dict(title="PerA, batch size 16", run="ucm/PerA, batch size 16", size=112),
    dict(title="InfoNCE from scratch", run="ucm/InfoNCE, scratch", size=64),
    dict(title="InfoNCE + soft term from scratch", run="ucm/+ soft, scratch", size=64)]
GAIN_ROWS = [
    dict(title="InfoNCE over the frozen weights", run="ucm/InfoNCE", base="ucm/frozen"),
    dict(title="soft term over InfoNCE", run="ucm/+ soft", base="ucm/InfoNCE"),
    dict(title="mask over InfoNCE", run="ucm/+ mask", base="ucm/InfoNCE"),
    dict(title="mask over InfoNCE + soft term", run="ucm/+ both", base="ucm/+ soft"),
    dict(title="soft term over InfoNCE, both masked", run="ucm/+ both", base="ucm/+ mask"),
    dict(title="soft term over InfoNCE, 12 epochs", run="ucm/+ soft, 12 epochs",
         base="ucm/InfoNCE, 12 epochs"),
    dict(title="soft term over InfoNCE, from scratch", run="ucm/+ soft, scratch",
         base="ucm/InfoNCE, scratch"),
    dict(title="soft term over InfoNCE, no predictor", run="ucm/+ soft, no predictor",
         base="ucm/InfoNCE, no predictor"),
    dict(title="no predictor over predictor, + soft term", run="ucm/+ soft, no predictor",
         base="ucm/+ soft"),
    dict(title="soft term over InfoNCE, batch size 16", run="ucm/+ soft, batch size 16",
         base="ucm/InfoNCE, batch size 16"),
    dict(title="backbone frozen in the first tenth, InfoNCE", run="ucm/InfoNCE, thawed",
         base="ucm/InfoNCE"),
    dict(title="backbone frozen in the first tenth, + soft term", run="ucm/+ soft, thawed",
         base="ucm/+ soft"),
    dict(title="PerA over the frozen weights, 112 px", run="ucm/PerA", base="ucm/frozen, 112 px"),
    dict(title="soft term in PerA", run="ucm/PerA + soft", base="ucm/PerA")]
FORM_ROWS = [
    dict(title="`bce`, weight .5, temperature .2: the preset's", run="ucm/+ soft"),
    dict(title="none", run="ucm/InfoNCE"),
    dict(title="weight .1", run="ucm/soft weight 0.1"),
    dict(title="weight 2", run="ucm/soft weight 2"),
    dict(title="temperature .1", run="ucm/soft-tau 0.1"),
    dict(title="temperature .5", run="ucm/soft-tau 0.5"),
    dict(title="`ce`, weight 1", run="ucm/form ce, weight 1"),
    dict(title="`bce_mean`, temperature 1", run="ucm/form bce_mean")]
CHOICE_ROWS = [dict(title="batch size 64", run="ucm/+ both")]
CHOICE_ROWS += [dict(title=name, run=f"ucm/{name}") for name in real.CHOICES]
PERA_CHOICE_ROWS = [dict(title="batch size 64", run="ucm/PerA")]
PERA_CHOICE_ROWS += [dict(title=name.removeprefix("PerA, "), run=f"ucm/{name}")
                     for name in real.PERA_CHOICES]
CHIP_FLOORS = [
    dict(title="mean and std of each band", run="continual/frozen", network="stats"),
    dict(title="random weights", run="continual/frozen", network="random")]
START_ROWS = [
    *CHIP_FLOORS,
    dict(title="natural-image weights on B4 B3 B2, frozen", run="continual/frozen"),
    dict(title="InfoNCE from scratch", run="continual/scratch"),
    dict(title="from the weights, input layer fresh", run="continual/random"),
    dict(title="from the weights, input layer: their mean", run="continual/mean"),
    dict(title="from the weights, input layer: their rgb", run="continual/rgb"),
    dict(title="the same, 24 epochs", run="continual/rgb, 24 epochs"),
    dict(title="the same, batch size 16", run="continual/rgb, batch size 16"),
    dict(title="fresh, backbone frozen in the first tenth", run="continual/random, thawed"),
    dict(title="rgb, backbone frozen in the first tenth", run="continual/rgb, thawed")]
RGB_ROWS = [
    *CHIP_FLOORS,
    dict(title="natural-image weights, frozen", run="continual/frozen"),
    dict(title="InfoNCE from scratch", run="continual/scratch"),
    dict(title="InfoNCE from the weights", run="continual/random")]
RADAR_ROWS = [
    dict(title="mean and std of each band", run="continual/random", network="stats"),
    dict(title="random weights", run="continual/random", network="random"),
    dict(title="natural-image weights, input layer: their mean, frozen", run="continual/frozen"),
    dict(title="from scratch", run="continual/scratch"),
    dict(title="from natural-image weights, input layer fresh", run="continual/random"),
    dict(title="from natural-image weights, input layer: their mean", run="continual/mean")]


def first_values(run, metric, network="checkpoint", probe=0, modality="rgb"):
    """{split: the metric of one probe}."""
    found = by_seed(run, modality, metric, network, probe)
    return {split: numbers[0] for split, numbers in found.items()}


def row_values(row, metric, probe=0, modality="rgb"):
    """The metric of a row, one value a split."""
    network = row.get("network", "checkpoint")
    return list(first_values(row["run"], metric, network, probe, modality).values())


def fine_tuned_values(metric):
    return [line[metric] for line in find("ucm/fine-tuned", "rgb").values()]


def gain(run, base, metric, probe=0):
    """Differences run - base on the splits that both have."""
    return paired_gain(run, base, "rgb", metric, probe)


def minutes(run):
    lines = find(run, "rgb").values()
    trained = [line["minutes"] for line in lines if line.get("log")]
    return f"{np.median(trained):.0f}" if trained else "-"


def runs_of(rows):
    return list(dict.fromkeys(row[name] for row in rows for name in ("run", "base") if name in row))


def that_were_run(rows, modality="rgb"):
    """The rows whose run has a line; the others stand under "Not run on real images"."""
    return [row for row in rows if find(row["run"], modality)]


def mean_rows(rows, columns, modality="rgb"):
    """Title, a cell for each column (metric, probe), and the number of splits, of rows that ran."""
    lines = []
    for row in that_were_run(rows, modality):
        found = [row_values(row, metric, probe, modality) for metric, probe in columns]
        lines.append([row["title"], *map(cell, found), len(found[0])])
    return lines


def main_section():
    rows = []
    for row in that_were_run(MAIN_ROWS):
        found = [row_values(row, metric) for metric in METRICS]
        rows.append([row["title"], row["size"], *map(cell, found), len(found[0]),
                     minutes(row["run"])])
    found = [fine_tuned_values(metric) for metric in METRICS]
    rows.append(["fine-tuned with the labels", 64, *map(cell, found), len(found[0]), "-"])
    text = paragraph(
        "Data: 1,680 aerial images of UC Merced, 128 px, with 17 real labels, 3.3 an image. Each",
        "of five splits pretrains a ViT-Tiny/16 on 1,344 of them with their labels, fits a ridge",
        "head on CLS and the mean patch of the same, and tests it on the other 336. SoftCon: 4",
        "epochs at 64 px; PerA: 4 epochs at 112 px; batch size 64 where none is said. All trained",
        "networks but those from scratch start from ViT-Tiny weights of natural images, with",
        "their normalisation folded in (`model.py fold`).",
        "Average precision; minutes of a run on one busy core. The fine-tuned network learns from",
        "the labels themselves, 12 epochs.")
    above = caption(text, "ucm --shared DIR", [*runs_of(MAIN_ROWS), "ucm/fine-tuned"], ["rgb"])
    header = ["network", "px", "micro", "macro", "splits", "minutes"]
    return f"## Real images with real labels\n\n{above}\n\n{markdown(header, rows)}"


def readme_table():
    """The README's table of eight rows: the most telling of MAIN_ROWS, and the upper mark."""
    rows = []
    for row in MAIN_ROWS:
        if row.get("readme"):
            found = [row_values(row, metric) for metric in METRICS]
            rows.append([row["title"], row["size"], len(found[0]), *map(cell, found)])
    found = [fine_tuned_values(metric) for metric in METRICS]
    rows.append(["fine-tuned with the labels", 64, len(found[0]), *map(cell, found)])
    header = ["UC Merced; trained: 4 epochs from natural images", "px", "splits", "micro", "macro"]
    return markdown(header, rows)


def gain_section():
    rows = []
    for row in GAIN_ROWS:
        count = len(gain(row["run"], row["base"], METRICS[0]))
        if count == 0:
            continue
        cells = []
        for metric in METRICS:
            cells += gain_cells(gain(row["run"], row["base"], metric), 4)
        rows.append([row["title"], *cells, count])
    text = paragraph(
        "Differences between two runs of the same split: their mean, its standard error, and the",
        "one by the other. Ridge head, as in the table above.")
    above = caption(text, "ucm --shared DIR", runs_of(GAIN_ROWS), ["rgb"])
    header = ["UC Merced", "micro", "error", "ratio", "macro", "error", "ratio", "splits"]
    return f"## Gains on real labels\n\n{above}\n\n{markdown(header, rows)}"


LOGISTIC_ROWS = {                                 # what probe.py calls the networks of one probe
    "mean and std of each band": "stats",
    "random weights": "random",
    "natural-image weights, frozen": real.WEIGHTS,
    "InfoNCE": f"{run_folder('ucm/InfoNCE/rgb')}/{{split}}/backbone.pt",
    "InfoNCE + soft term": f"{run_folder('ucm/+ soft/rgb')}/{{split}}/backbone.pt"}


def logistic_values(title, metric):
    """{split: the metric of a network in the logistic probes}."""
    found = {}
    for split, line in sorted(find("ucm/logistic", "rgb").items()):
        network = LOGISTIC_ROWS[title].format(split=split)
        found[split] = line["probes"][0]["all"][network][metric][0]
    return found


def logistic_section():
    rows = []
    for title in LOGISTIC_ROWS:
        found = [list(logistic_values(title, metric).values()) for metric in METRICS]
        rows.append([title, *map(cell, found), len(found[0])])
    cells = []
    for metric in METRICS:
        soft = logistic_values("InfoNCE + soft term", metric)
        bare = logistic_values("InfoNCE", metric)
        cells += gain_cells([soft[split] - bare[split] for split in soft], 4)
    text = paragraph("Networks of the first table at 64 px, with a logistic head.")
    above = caption(text, "'ucm/logistic/*' --shared DIR", ["ucm/logistic"], ["rgb"])
    below = paragraph(
        f"The soft term over InfoNCE with this head: micro {cells[0]} ± {cells[1]} (standard",
        f"error), macro {cells[3]} ± {cells[4]}.")
    return (f"## A logistic head on real labels\n\n{above}\n\n"
            f"{markdown(['network', 'micro', 'macro', 'splits'], rows)}\n\n{below}")


SHARE_ROWS = {                                    # what pretraining saw of the labels
    "frozen": "ucm/frozen", "InfoNCE, no labels": "ucm/InfoNCE",
    "soft term, share's labels": "ucm/+ soft, {} % labelled",
    "the same, mean over labelled images": "ucm/+ soft, {} % labelled, their mean",
    "soft term, all labels": "ucm/+ soft"}


def share_run(name, share):
    """The run of a row of SHARE_ROWS; a share of 100 % is all labels."""
    run = SHARE_ROWS[name]
    if "{}" in run and share == 100:
        return "ucm/+ soft"
    return run.format(share)


def gain_with_error(gains, digits=4):
    """Mean ± standard error; of one split no error."""
    mean, error, _ = gain_cells(gains, digits)
    return f"{mean} ± {error}" if len(gains) > 1 else mean


def gain_and_splits(gains):
    """Mean ± standard error, and the number of splits in brackets."""
    return f"{gain_with_error(gains)} ({len(gains)})"


def share_section():
    rows = []
    for name in SHARE_ROWS:
        cells = []
        for probe, share in enumerate(real.SHARES):
            by_split = first_values(share_run(name, share), "micro_map", probe=probe)
            cells.append(cell(list(by_split.values())))
        rows.append([name, *cells])
    tenth = gain_and_splits(gain("ucm/+ soft, 10 % labelled, their mean, weight 0.05",
                                 "ucm/InfoNCE", "micro_map", real.SHARES.index(10)))
    counts = ", ".join(f"{real.images_of(share):,}" for share in real.SHARES)
    text = paragraph(
        "Pretraining sees all 1,344 images, and labels of none, of a share of them, or of all; the",
        f"ridge head is fit on the share alone ({counts} images). Micro average precision.")
    all_runs = [share_run(name, share) for name in SHARE_ROWS for share in real.SHARES]
    above = caption(text, "ucm --shared DIR", list(dict.fromkeys(all_runs)), ["rgb"])
    header = ["labels in pretraining", *[f"head: {share} %" for share in real.SHARES]]
    between = paragraph(
        "Over InfoNCE with the same head: mean ± standard error, and the number of splits. The",
        "soft term is a mean over all images, and those without labels add 0. When 10 % have",
        "labels, a mean over those alone makes the soft term ten times stronger. With its weight",
        f"cut from 0.5 to 0.05 that mean gains {tenth} over InfoNCE.")
    return (f"## Few labels\n\n{above}\n\n{markdown(header, rows)}\n\n{between}\n\n"
            f"{markdown(header, share_gains())}")


def share_gains():
    """Rows of gains over InfoNCE; the last row: mean over all images minus mean over labelled ones.
    """
    over_all = "soft term, share's labels"
    over_labelled = "the same, mean over labelled images"
    rows = []
    for name in (over_all, over_labelled, "soft term, all labels"):
        cells = []
        for probe, share in enumerate(real.SHARES):
            over = gain(share_run(name, share), "ucm/InfoNCE", "micro_map", probe)
            cells.append(gain_and_splits(over))
        rows.append([name, *cells])
    cells = []
    for probe, share in enumerate(real.SHARES):
        if share < 100:
            over = gain(share_run(over_all, share), share_run(over_labelled, share), "micro_map",
                        probe)
            cells.append(gain_and_splits(over))
    return [*rows, ["the first row over the second", "-", *cells]]


def choice_table(rows, text):
    """Average precision, and the gain over the first row on the splits that both have."""
    lines = []
    for row in that_were_run(rows):
        [cells] = mean_rows([row], [(metric, 0) for metric in METRICS])
        gains = ["-", "-"]
        if row is not rows[0]:
            gains = [gain_with_error(gain(row["run"], rows[0]["run"], m)) for m in METRICS]
        lines.append([*cells, *gains])
    above = caption(text, "ucm --shared DIR", runs_of(rows), ["rgb"])
    header = ["choice", "micro", "macro", "splits", "gain in micro", "gain in macro"]
    return f"{above}\n\n{markdown(header, lines)}"


def form_section():
    text = paragraph(
        "The soft term's form, weight and temperature on UC Merced: the row \"InfoNCE + soft",
        "term\" of the first table with one choice changed. The mean of a row is over its own",
        "splits; its gain over the first row, with the standard error, is over the splits that",
        "both have. So means do not subtract to gains.")
    return f"## The soft term's form on real labels\n\n{choice_table(FORM_ROWS, text)}"


def choice_section():
    softcon = paragraph(
        "SoftCon's small preset on UC Merced, but for 4 epochs, 64 px and batch size 64, which the",
        "preset had before: the row \"InfoNCE + soft term + mask\" of the first table with one",
        "choice changed, or two. Means and gains as in the table before.")
    pera = paragraph(
        "PerA's small preset with 4 epochs, at 112 px: the row \"PerA\" of the first table with",
        "one choice changed.")
    return ("## The small presets, one choice at a time\n\n"
            f"{choice_table(CHOICE_ROWS, softcon)}\n\n{choice_table(PERA_CHOICE_ROWS, pera)}")


# EuroSAT: where ridge and logistic stand among the probes of a line, see real.py
CHIP_HEADS = {"s2c": {"ridge": 2, "logistic": 3}, "rgb": {"ridge": 0, "logistic": 1}}


def chip_table(modality, start_rows, text):
    """Accuracy on EuroSAT chips."""
    heads = CHIP_HEADS[modality]
    rows = mean_rows(start_rows, [("accuracy", probe) for probe in heads.values()], modality)
    above = caption(text, f"'continual/*/{modality}/*' --shared DIR", runs_of(start_rows),
                    [modality])
    return f"{above}\n\n{markdown(['network', *heads, 'splits'], rows)}"


def radar_table():
    """Average precision on radar images of the toy world."""
    rows = mean_rows(RADAR_ROWS, [(metric, 0) for metric in METRICS], "s1")
    text = paragraph(
        "Radar images (VV, VH) of the toy world, ViT-Tiny/16 at 64 px, SoftCon with soft term and",
        "mask, 4 epochs; probe.py's default probe. Average precision.")
    above = caption(text, "'continual/*/s1/*' --shared DIR", runs_of(RADAR_ROWS), ["s1"])
    return f"{above}\n\n{markdown(['network', 'micro', 'macro', 'seeds'], rows)}"


def start_section():
    few = paragraph(
        "1,180 multispectral EuroSAT chips, ViT-Tiny/16 at 64 px, InfoNCE without labels: 8 epochs",
        "of batches of 64 on 70 % of the chips, the head on the same, the test on 30 %. Heads on",
        "CLS and the mean patch. Accuracy.")
    many = paragraph(
        "21,600 RGB EuroSAT chips, the same network and features: one epoch on 80 % of the chips,",
        "the head on the same, the test on 20 %. Accuracy.")
    parts = [chip_table("s2c", START_ROWS, few), beside_table(),
             chip_table("rgb", RGB_ROWS, many), radar_table()]
    return "## From natural images to other sensors\n\n" + "\n\n".join(parts)


def beside_table():
    """A logistic head on band statistics, on networks, and on both together."""
    rows = []
    for name, title in (("rgb", "8 epochs"), ("rgb, 24 epochs", "24 epochs")):
        run = f"continual/{name} and statistics"
        lines = find(run, "s2c").values()
        cells = [cell([line[key] for line in lines]) for key in ("network", "stats", "both")]
        rows.append([title, *cells, len(lines)])
    text = paragraph(
        "Does a network know more than band statistics? A logistic head on the multispectral chips",
        "of the table above, on features of the networks that start from the weights' RGB, on mean",
        "and std of each band, and on both side by side. Accuracy.")
    above = caption(text, "'continual/*and statistics/*' --shared DIR",
                    ["continual/rgb and statistics", "continual/rgb, 24 epochs and statistics"],
                    ["s2c"])
    header = ["network", "its features", "statistics", "both", "splits"]
    return f"{above}\n\n{markdown(header, rows)}"


# A default that is ours, and the table that it rests on; the small preset's unless it says so.
DEFAULT_ROWS = [
    ("`--adapt auto`", "From natural images to other sensors: `rgb` on 13 bands, `mean` on radar; "
     "the full preset has the paper's `random`"),
    ("`--soft-weight 0.5`, `--soft-form bce`, `--soft-tau 0.2`",
     "Gains on real labels; The soft term's form on real labels"),
    ("soft term: a mean over all images", "Few labels"),
    ("`--mask-ratio 0.3`", "Gains on real labels: it helps InfoNCE, and over the soft term it "
     "changes nothing; on the toy world it costs; the mask is the paper's and spares a ViT work"),
    ("`--img-size 112`, `--arch vit_tiny`, `--patch-size 16`",
     "Real images with real labels: frozen weights at 64 and 112 px"),
    ("predictor", "Gains on the toy world, s2c; on UC Merced no predictor is better in micro "
     "average precision: Gains on real labels"),
    ("no frozen backbone in the first steps", "Gains on real labels; From natural images to other "
     "sensors: it gained on neither, so there is no flag for it"),
    ("`--epochs 8`", "The small presets, one choice at a time; From natural images to other "
     "sensors: longer is better still"),
    ("`--batch-size 16` of SoftCon", "The small presets, one choice at a time; From natural images "
     "to other sensors, 13 bands"),
    ("`--lr`, `--momentum`, `--hidden`, `--crop-min`, `--jitter`, `--grey`, `--clip`, "
     "`--drop-path`, `--weight-decay`; PerA's `--batch-size`, `--crops`, `--prototypes`, "
     "`--jitter`",
     "The small presets, one choice at a time"),
    ("toy: all", "SoftCon's choices; PerA's choices; The toy world"),
    ("full: `--soft-weight 0.1`", "The soft term's form on real labels: .1 is as good as .5 there, "
     "on 2 splits"),
    ("full: `--mask-ratio 0.3`, `--drop-path 0`, `--clip 0`", "the rows of the small preset; "
     "a full run was never made"),
    ("`--holdout`", "no row: it only says how many images are kept for testing")]


def default_section():
    text = paragraph(
        "Left: what the papers do not give and this code chooses. Right: the section of this page",
        "that it rests on. The values themselves stand in the README's table of presets.")
    table = markdown(["default", "rests on"], DEFAULT_ROWS)
    return f"## Where our defaults come from\n\n{text}\n\n{table}"


def sentence_of_gain(what, run, base, metric="micro_map", probe=0):
    """The sentence "WHAT: +0.006 ± 0.001 (5 splits)."; of one split: nothing."""
    gains = gain(run, base, metric, probe)
    if len(gains) < 2:
        return ""
    shown = gain_with_error(gains, 3)
    if len(gains) == 2:
        shown = f"{np.mean(gains):+.3f}"          # an error of two numbers would say too much
    return f"{what}: {shown} ({len(gains)} splits)."


def mean_of(name, modality, network="checkpoint"):
    """The mean over splits of continual/NAME as text: accuracy of the logistic head, or micro AP on
    radar images."""
    metric = "micro_map"
    probe = 0
    if modality in CHIP_HEADS:
        metric = "accuracy"
        probe = CHIP_HEADS[modality]["logistic"]
    numbers = list(first_values(f"continual/{name}", metric, network, probe, modality).values())
    if not numbers:
        return "not run"
    return f"{np.mean(numbers):.3f}"


def findings():
    """What the tables of this file say, most important first."""
    lines = [
        sentence_of_gain("On UC Merced with real labels, soft term over InfoNCE in micro average "
                         "precision, with its standard error", "ucm/+ soft", "ucm/InfoNCE"),
        sentence_of_gain("Soft term over InfoNCE in macro average precision", "ucm/+ soft",
                         "ucm/InfoNCE", "macro_map"),
        sentence_of_gain("Soft term over InfoNCE with batches of 16, micro",
                         "ucm/+ soft, batch size 16", "ucm/InfoNCE, batch size 16"),
        sentence_of_gain("Soft term over InfoNCE with batches of 16, macro",
                         "ucm/+ soft, batch size 16", "ucm/InfoNCE, batch size 16", "macro_map"),
        sentence_of_gain("InfoNCE with batches of 16 over batches of 64, micro",
                         "ucm/InfoNCE, batch size 16", "ucm/InfoNCE"),
        sentence_of_gain("InfoNCE with batches of 16 over batches of 64, macro",
                         "ucm/InfoNCE, batch size 16", "ucm/InfoNCE", "macro_map"),
        sentence_of_gain("InfoNCE over the frozen natural-image weights it starts from",
                         "ucm/InfoNCE", "ucm/frozen"),
        sentence_of_gain("The mask over InfoNCE", "ucm/+ mask", "ucm/InfoNCE"),
        sentence_of_gain("Soft term and mask do not add up: soft term over InfoNCE, both masked",
                         "ucm/+ both", "ucm/+ mask"),
        sentence_of_gain("PerA over the frozen weights, at 112 px", "ucm/PerA",
                         "ucm/frozen, 112 px"),
        sentence_of_gain("Soft term over InfoNCE, both without a predictor",
                         "ucm/+ soft, no predictor", "ucm/InfoNCE, no predictor"),
        sentence_of_gain("No predictor over a predictor, with the soft term",
                         "ucm/+ soft, no predictor", "ucm/+ soft")]
    for share in (10, 3):
        probe = real.SHARES.index(share)
        lines.append(sentence_of_gain(
            f"With labels of {share} % of the images, in pretraining and for the head, soft term "
            "over InfoNCE", f"ucm/+ soft, {share} % labelled", "ucm/InfoNCE", probe=probe))
        lines.append(sentence_of_gain(
            f"With labels of all images in pretraining and of {share} % for the head",
            "ucm/+ soft", "ucm/InfoNCE", probe=probe))
        lines.append(sentence_of_gain(
            f"The same, of {share} % for the head, with batches of 16", "ucm/+ soft, batch size 16",
            "ucm/InfoNCE, batch size 16", probe=probe))
    lines.append(
        "On 13 bands, with a logistic head: going on from natural-image weights whose RGB fill the "
        f"input layer has {mean_of('rgb', 's2c')} after 8 epochs, "
        f"{mean_of('rgb, batch size 16', 's2c')} with batches of 16 instead of 64, and "
        f"{mean_of('rgb, 24 epochs', 's2c')} after 24 epochs; with a fresh input layer "
        f"{mean_of('random', 's2c')} after 8. The frozen weights on B4, B3, B2 have "
        f"{mean_of('frozen', 's2c')}, band statistics {mean_of('frozen', 's2c', 'stats')}.")
    lines.append(
        "On 21,600 RGB chips, with a logistic head: one epoch of InfoNCE from natural-image "
        f"weights has {mean_of('random', 'rgb')}, from scratch {mean_of('scratch', 'rgb')}, "
        f"the frozen weights {mean_of('frozen', 'rgb')}, "
        f"band statistics {mean_of('frozen', 'rgb', 'stats')} (one split).")
    lines.append(
        "On radar images of the toy world, in micro average precision: SoftCon from natural-image "
        f"weights has {mean_of('mean', 's1')} if the input layer starts from their mean, "
        f"{mean_of('random', 's1')} if it starts anew, and {mean_of('scratch', 's1')} from "
        f"scratch; the frozen weights with that layer have {mean_of('frozen', 's1')}.")
    return [line for line in lines if line]


def not_run_section():
    """The runs of real.py that have no line, without their splits."""
    names = []
    for key in [*real.ucm_runs(), *real.continual_runs()]:
        name, modality, _ = key.rsplit("/", 2)
        if not find(name, modality) and f"`{name}/{modality}`" not in names:
            names.append(f"`{name}/{modality}`")
    text = paragraph("Runs of these two studies that have a key and no line: " + ", ".join(names)
                     + ".")
    return f"## Not run on real images\n\n{text}"


def sections():
    return [main_section(), gain_section(), logistic_section(), share_section(), form_section(),
            choice_section(), start_section(), default_section(), not_run_section()]
