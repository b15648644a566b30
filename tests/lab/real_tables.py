"""The sections of results/README.md on real images: what the studies `ucm` and `continual` found.

tables.py puts them on the page.  A test holds the page to the lines of ucm.jsonl and
continual.jsonl, from which all numbers come.
"""
import numpy as np

from lab import real
from lab.lines import (by_seed, caption, cell, find, gain_cells, markdown, paired_gain, paragraph,
                       standard_error, values)

METRICS = ("micro_map", "macro_map")

# a row: what it is called on the page, and the run that it comes from
MAIN_ROWS = [
    dict(title="mean and std of each band", run="ucm/frozen", network="stats", size=64),
    dict(title="random weights", run="ucm/frozen", network="random", size=64),
    dict(title="natural-image weights, frozen", run="ucm/frozen", size=64),
    dict(title="InfoNCE", run="ucm/InfoNCE", size=64),
    dict(title="InfoNCE + soft term", run="ucm/+ soft", size=64),
    dict(title="InfoNCE + mask", run="ucm/+ mask", size=64),
    dict(title="InfoNCE + soft term + mask", run="ucm/+ both", size=64),
    dict(title="natural-image weights, frozen", run="ucm/frozen, 112 px", size=112),
    dict(title="PerA", run="ucm/PerA", size=112),
    dict(title="PerA + soft term", run="ucm/PerA + soft", size=112),
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
START_ROWS = [
    dict(title="mean and std of each band", run="continual/frozen", network="stats"),
    dict(title="random weights", run="continual/frozen", network="random"),
    dict(title="natural-image weights on B4 B3 B2, frozen", run="continual/frozen"),
    dict(title="InfoNCE from scratch", run="continual/scratch"),
    dict(title="from the weights, input layer fresh", run="continual/random"),
    dict(title="from the weights, input layer: their mean", run="continual/mean"),
    dict(title="from the weights, input layer: their rgb", run="continual/rgb"),
    dict(title="the same, 24 epochs", run="continual/rgb, 24 epochs"),
    dict(title="fresh, backbone frozen in the first tenth", run="continual/random, thawed"),
    dict(title="rgb, backbone frozen in the first tenth", run="continual/rgb, thawed")]
RGB_ROWS = [
    dict(title="mean and std of each band", run="continual/frozen", network="stats"),
    dict(title="random weights", run="continual/frozen", network="random"),
    dict(title="natural-image weights, frozen", run="continual/frozen"),
    dict(title="InfoNCE from scratch", run="continual/scratch"),
    dict(title="InfoNCE from the weights", run="continual/random")]
RADAR_ROWS = [
    dict(title="mean and std of each band", run="continual/random", network="stats"),
    dict(title="random weights", run="continual/random", network="random"),
    dict(title="from scratch", run="continual/scratch"),
    dict(title="from natural-image weights, input layer fresh", run="continual/random"),
    dict(title="from natural-image weights, input layer: their mean", run="continual/mean")]


def first_values(run, metric, network="checkpoint", probe=0, modality="rgb"):
    """{split: the metric of one probe}."""
    found = by_seed(run, modality, metric, network, probe)
    return {split: numbers[0] for split, numbers in found.items()}


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
    """The rows whose run has a line; the others stand under "Not run"."""
    return [row for row in rows if find(row["run"], modality)]


def fine_tuned_cells():
    lines = find("ucm/fine-tuned", "rgb").values()
    return [cell([line[metric] for line in lines]) for metric in METRICS] + [len(lines)]


def main_section():
    rows = []
    for row in that_were_run(MAIN_ROWS):
        found = [list(first_values(row["run"], metric, row.get("network", "checkpoint")).values())
                 for metric in METRICS]
        rows.append([row["title"], row["size"], *map(cell, found), len(found[0]),
                     minutes(row["run"]) if "network" not in row else "-"])
    micro, macro, count = fine_tuned_cells()
    rows.append(["fine-tuned with the labels", 64, micro, macro, count, "-"])
    text = paragraph(
        "Data: 1,680 aerial images of UC Merced, 128 px, with 17 real labels, 3.3 an image. Each",
        "of five splits pretrains a ViT-Tiny/16 on 1,344 of them with their labels, fits a ridge",
        "head on CLS and the mean patch of the same, and tests it on the other 336. SoftCon: 4",
        "epochs at 64 px; PerA: 4 epochs at 112 px. All trained networks but those from scratch",
        "start from ViT-Tiny weights of natural images, with their normalisation folded in",
        "(`model.py fold`).",
        "Average precision; minutes of a run on one busy core. The fine-tuned network learns from",
        "the labels themselves, 12 epochs.")
    above = caption(text, "ucm --shared DIR", runs_of(MAIN_ROWS), ["rgb"])
    header = ["network", "px", "micro", "macro", "splits", "minutes"]
    return f"## Real images with real labels\n\n{above}\n\n{markdown(header, rows)}"


def readme_table():
    """The README's table of eight rows: the most telling of MAIN_ROWS, and the upper mark."""
    rows = []
    for row in MAIN_ROWS:
        if "mask" in row["title"] or "scratch" in row["title"] or row["run"] == "ucm/PerA + soft":
            continue
        found = [list(first_values(row["run"], metric, row.get("network", "checkpoint")).values())
                 for metric in METRICS]
        rows.append([row["title"], row["size"], len(found[0]), *map(cell, found)])
    micro, macro, count = fine_tuned_cells()
    rows.append(["fine-tuned with the labels", 64, count, micro, macro])
    return markdown(["UC Merced", "px", "splits", "micro", "macro"], rows)


def gain_section():
    rows = []
    for row in GAIN_ROWS:
        if len(gain(row["run"], row["base"], METRICS[0])) < 2:
            continue
        cells = []
        for metric in METRICS:
            cells += gain_cells(gain(row["run"], row["base"], metric), 4)
        rows.append([row["title"], *cells, len(gain(row["run"], row["base"], METRICS[0]))])
    text = paragraph(
        "Differences between two runs of the same split: their mean, its standard error, and the",
        "one by the other. Ridge head, runs of the table above and below.")
    header = ["UC Merced", "micro", "error", "ratio", "macro", "error", "ratio", "splits"]
    return f"## Gains on real labels\n\n{text}\n\n{markdown(header, rows)}"


def logistic_values(column, metric):
    """The values of a network in the logistic probes; column: its place in their tables."""
    found = []
    for _, line in sorted(find("ucm/logistic", "rgb").items()):
        table = line["probes"][0]["all"]
        found.append(list(table.values())[column][metric][0])
    return found


def logistic_section():
    titles = {-1: "mean and std of each band", -2: "random weights",
              0: "natural-image weights, frozen", 1: "InfoNCE", 2: "+ soft term"}
    rows = []
    for column, title in titles.items():
        found = [logistic_values(column, metric) for metric in METRICS]
        rows.append([title, *map(cell, found), len(found[0])])
    gains = []
    for metric in METRICS:
        pairs = zip(logistic_values(2, metric), logistic_values(1, metric))
        gains += gain_cells([soft - bare for soft, bare in pairs], 4)
    text = paragraph("The networks at 64 px of the table above, with a logistic head.")
    above = caption(text, "'ucm/logistic/*' --shared DIR", ["ucm/logistic"], ["rgb"])
    below = paragraph(
        f"The soft term over InfoNCE with this head: micro {gains[0]} ± {gains[1]} (standard",
        f"error), macro {gains[3]} ± {gains[4]}.")
    return (f"## A logistic head on real labels\n\n{above}\n\n"
            f"{markdown(['network', 'micro', 'macro', 'splits'], rows)}\n\n{below}")


def share_rows():
    """For each share of labels: the head on frozen weights, on InfoNCE, and on the soft term with
    all labels and with that share."""
    rows = []
    for probe, share in enumerate(real.SHARES):
        name = "ucm/+ soft" if share == 100 else f"ucm/+ soft, {share} % labelled"
        columns = [first_values("ucm/frozen", "micro_map", "checkpoint", probe),
                   first_values("ucm/InfoNCE", "micro_map", "checkpoint", probe),
                   first_values(name, "micro_map", "checkpoint", probe)]
        common = set.intersection(*map(set, columns)) or set(columns[0])
        columns = [{split: column[split] for split in column if split in common}
                   for column in columns]
        rows.append((share, columns, gain(name, "ucm/InfoNCE", "micro_map", probe)))
    return rows


def share_section():
    rows = []
    for share, columns, gains in share_rows():
        rows.append([f"{share} %", 21 * round(64 * share / 100),
                     *[cell(list(column.values())) for column in columns], *gain_cells(gains, 4),
                     len(gains)])
    text = paragraph(
        "Fewer labels: pretraining sees all 1,344 images but the labels of a share of them only,",
        "and the ridge head is fit on the same share. Micro average precision.")
    above = caption(text, "'ucm/+ soft*labelled/*' --shared DIR",
                    [f"ucm/+ soft, {share} % labelled" for share in real.SHARES[1:]], ["rgb"])
    header = ["labelled", "images", "frozen", "InfoNCE", "+ soft term",
              "soft over InfoNCE", "error", "ratio", "splits"]
    light = gain("ucm/+ soft, 10 % labelled, weight 0.05", "ucm/InfoNCE", "micro_map", 2)
    below = paragraph(
        "With labels of 10 % and the weight in proportion (.05 instead of .5), soft over InfoNCE is",
        f"{cell(light, 4)} on {len(light)} split(s): the term is a mean over labelled",
        "images, so a pair of them weighs ten times as much as when all have labels.")
    return f"## Few labels\n\n{above}\n\n{markdown(header, rows)}\n\n{below}"


def form_section():
    rows = []
    for row in that_were_run(FORM_ROWS):
        cells = []
        for metric in METRICS:
            found = first_values(row["run"], metric)
            common = [found[split] for split in found if split < 3]
            cells.append(cell(common))
        over = ["-", "-"]
        if row["run"] != "ucm/+ soft":
            over = gain_cells(gain(row["run"], "ucm/+ soft", "micro_map")[:3], 4)[:2]
        rows.append([row["title"], *cells, *over, len(common)])
    text = paragraph(
        "The soft term's form, weight and temperature on UC Merced: the row \"+ soft term\" above",
        "with one choice changed, on splits 0 to 2.")
    studies = " ".join(f"'ucm/{name}/*'" for name in real.FORMS)
    above = caption(text, f"{studies} --shared DIR", runs_of(FORM_ROWS), ["rgb"])
    header = ["soft term", "micro", "macro", "over the first row, micro", "error", "splits"]
    return f"## The soft term's form on real labels\n\n{above}\n\n{markdown(header, rows)}"


# EuroSAT: where ridge and logistic stand among the probes of a line, see real.continual_runs
CHIP_HEADS = {"s2c": {"ridge": 2, "logistic": 3}, "rgb": {"ridge": 0, "logistic": 1}}


def chip_table(modality, start_rows, text):
    """Accuracy on EuroSAT chips."""
    rows = []
    for row in that_were_run(start_rows, modality):
        network = row.get("network", "checkpoint")
        cells = [cell(values(row["run"], modality, "accuracy", network, probe))
                 for probe in CHIP_HEADS[modality].values()]
        rows.append([row["title"], *cells, len(find(row["run"], modality))])
    above = caption(text, f"'continual/*/{modality}/*' --shared DIR", runs_of(start_rows),
                    [modality])
    return f"{above}\n\n{markdown(['network', 'ridge', 'logistic', 'splits'], rows)}"


def radar_table():
    """Average precision on radar images of the toy world."""
    rows = []
    for row in that_were_run(RADAR_ROWS, "s1"):
        network = row.get("network", "checkpoint")
        cells = [cell(values(row["run"], "s1", metric, network)) for metric in METRICS]
        rows.append([row["title"], *cells, len(find(row["run"], "s1"))])
    text = paragraph(
        "Radar images (VV, VH) of the toy world, ViT-Tiny/16 at 64 px, SoftCon with soft term and",
        "mask, 4 epochs; probe.py's default probe. Average precision.")
    above = caption(text, "'continual/*/s1/*' --shared DIR", runs_of(RADAR_ROWS), ["s1"])
    return f"{above}\n\n{markdown(['network', 'micro', 'macro', 'seeds'], rows)}"


def start_section():
    few = paragraph(
        "1,180 multispectral EuroSAT chips, ViT-Tiny/16 at 64 px, InfoNCE without labels: 8 epochs",
        "on 70 % of the chips, the head on the same, the test on 30 %. Heads on CLS and the mean",
        "patch. Accuracy.")
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
    ("`--adapt random`", "the paper's, not ours; with few images `rgb` is far better: From natural "
     "images to other sensors"),
    ("`--soft-weight 0.5`, `--soft-form bce`, `--soft-tau 0.2`",
     "Gains on real labels; The soft term's form on real labels"),
    ("`--mask-ratio 0.3`", "Gains on real labels; on the toy world it costs; it is the paper's and "
     "spares a ViT work"),
    ("`--img-size 112`, `--arch vit_tiny`, `--patch-size 16`",
     "Real images with real labels: frozen weights at 64 and 112 px"),
    ("predictor", "Gains on real labels; on the toy world, Gains on the toy world"),
    ("`--epochs 8`", "no row: 4 epochs are measured, and 12 where Gains on real labels says so"),
    ("`--lr`, `--momentum`, `--hidden`, `--crop-min`, `--batch-size`, `--jitter`, `--holdout`, "
     "`--clip`, PerA's `--prototypes`, `--crops`", "no row: one trial run each, or none"),
    ("toy: all", "SoftCon's choices; PerA's choices; The toy world"),
    ("full: `--soft-weight 0.1`, `--mask-ratio 0.3`, `--holdout 0.1`, `--drop-path 0`, `--clip 0`",
     "no row: a full run was never made")]


def default_section():
    text = paragraph(
        "What the papers do not give and this code chooses, and the table that it rests on. The",
        "values themselves stand in the README's table of presets.")
    table = markdown(["default", "rests on"], DEFAULT_ROWS)
    return f"## Where our defaults come from\n\n{text}\n\n{table}"


def sentence_of_gain(what, run, base, metric="micro_map", probe=0):
    """The sentence "WHAT: +0.006 (5.1 standard errors, 5 splits)."; of one split: nothing."""
    gains = gain(run, base, metric, probe)
    if len(gains) < 2:
        return ""
    return (f"{what}: {np.mean(gains):+.3f} ({np.mean(gains) / standard_error(gains):.1f} standard "
            f"errors, {len(gains)} splits).")


def findings():
    """What the tables of this file say, most important first."""
    few = [gain(f"ucm/+ soft, {share} % labelled", "ucm/InfoNCE", "micro_map", probe)
           for probe, share in enumerate(real.SHARES) if share in (10, 3)]
    lines = [
        sentence_of_gain("On UC Merced with real labels, soft term over InfoNCE in micro average "
                         "precision", "ucm/+ soft", "ucm/InfoNCE"),
        sentence_of_gain("In macro average precision", "ucm/+ soft", "ucm/InfoNCE", "macro_map"),
        sentence_of_gain("InfoNCE over the frozen natural-image weights it starts from",
                         "ucm/InfoNCE", "ucm/frozen"),
        sentence_of_gain("The mask over InfoNCE", "ucm/+ mask", "ucm/InfoNCE"),
        sentence_of_gain("PerA over the frozen weights, at 112 px", "ucm/PerA",
                         "ucm/frozen, 112 px"),
        sentence_of_gain("No predictor over a predictor, with the soft term",
                         "ucm/+ soft, no predictor", "ucm/+ soft")]
    if all(len(gains) > 1 for gains in few):
        lines.append(
            f"With labels of 10 % and 3 % of the images, in pretraining and for the head, the soft "
            f"term gains {np.mean(few[0]):+.3f} and {np.mean(few[1]):+.3f} over InfoNCE with the "
            f"same head.")
    starts = {name: first_values(f"continual/{name}", "accuracy", "checkpoint", 3, "s2c")
              for name in ("rgb", "rgb, 24 epochs", "random", "frozen")}
    stats = first_values("continual/frozen", "accuracy", "stats", 3, "s2c")
    means = {name: np.mean(list(found.values())) for name, found in starts.items() if found}
    if len(means) == 4:
        lines.append(
            f"On 13 bands, with a logistic head: going on from natural-image weights has "
            f"{means['rgb']:.3f} after 8 epochs and {means['rgb, 24 epochs']:.3f} after 24 if the "
            f"input layer starts from their RGB, {means['random']:.3f} if it starts anew; the "
            f"frozen weights on B4, B3, B2 have {means['frozen']:.3f}, band statistics "
            f"{np.mean(list(stats.values())):.3f}.")
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
            start_section(), default_section(), not_run_section()]
