"""Reading the lines of results/*.jsonl, and turning them into the tables and words of a page."""
import functools
import json
import textwrap
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"

# --------------------------------------------------------------------------- reading the results


def read_lines(study):
    """The lines of results/STUDY.jsonl as dicts; none if the file is not there."""
    file = RESULTS / f"{study}.jsonl"
    if not file.exists():
        return []
    return parse(file.read_text())


@functools.cache
def parse(text):
    """The JSON of each line.  A page asks for the same text some hundred times."""
    return [json.loads(line) for line in text.splitlines()]


def find(run, modality):
    """{seed: line} of the run "study/name" on one modality."""
    found = {}
    for line in read_lines(run.split("/")[0]):
        name, line_modality, seed = line["key"].rsplit("/", 2)
        if name == run and line_modality == modality:
            found[int(seed)] = line
    return found


def by_seed(run, modality, metric, network="checkpoint", probe=0):
    """{seed: [the metric for each seed of the probe]}; network: checkpoint, random or stats."""
    return {seed: line["probes"][probe]["all"][network][metric]
            for seed, line in sorted(find(run, modality).items())}


def values(run, modality, metric, network="checkpoint", probe=0):
    """All values of a run in one list.

    A network has one value, unless the seeds of the probe split the images differently.  Random
    weights and band statistics are the same in all runs on one world: a value that comes again
    counts once.
    """
    found = by_seed(run, modality, metric, network, probe)
    numbers = []
    for per_probe_seed in found.values():
        same = len(set(per_probe_seed)) == 1
        numbers += per_probe_seed[:1] if same else per_probe_seed
    if network != "checkpoint" and len(found) > 1:
        numbers = list(dict.fromkeys(numbers))
    return numbers


def paired_gain(run, base, modality, metric="micro_map", probe=0):
    """Differences run - base of the seeds that both have; of the probe's seeds the first."""
    ours = by_seed(run, modality, metric, probe=probe)
    theirs = by_seed(base, modality, metric, probe=probe)
    seeds = sorted(ours.keys() & theirs.keys())
    return [ours[seed][0] - theirs[seed][0] for seed in seeds]


def standard_error(numbers):
    return np.std(numbers, ddof=1) / len(numbers) ** 0.5


# ----------------------------------------------------------------------------------------- words


def markdown(header, rows):
    """Rows of cells, which are texts or numbers, as a markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def cell(numbers, digits=3):
    """mean ± standard deviation; of a single number no deviation."""
    if len(numbers) == 0:
        return "not run"
    text = f"{np.mean(numbers):.{digits}f}"
    if len(numbers) > 1:
        text += f" ± {np.std(numbers, ddof=1):.{digits}f}"
    return text


def gain_cells(gains, digits):
    """Mean, standard error, and their ratio; of one pair the mean alone, of two no ratio."""
    if len(gains) == 0:
        return ["not run", "not run", "not run"]
    mean = np.mean(gains)
    if len(gains) == 1:
        return [f"{mean:+.{digits}f}", "-", "-"]
    error = standard_error(gains)
    ratio = f"{mean / error:+.1f}" if len(gains) > 2 else "-"
    return [f"{mean:+.{digits}f}", f"{error:.{digits}f}", ratio]


def paragraph(*sentences):
    """Pieces of text as one paragraph, in lines of at most 100 columns."""
    return textwrap.fill(" ".join(sentences), 100, break_on_hyphens=False)


def bullets(*items):
    """Each item as a point of a list."""
    lines = [textwrap.fill(item, 100, initial_indent="- ", subsequent_indent="  ",
                           break_on_hyphens=False) for item in items]
    return "\n".join(lines)


def distinct(lines, name):
    """The different values of one field, sorted, separated by commas."""
    return ", ".join(sorted({str(line[name]) for line in lines}))


def caption(text, studies, runs, modalities):
    """What a table shows; the command that makes runs without a line; device and commits."""
    lines = []
    for run in runs:
        for modality in modalities:
            lines += find(run, modality).values()
    command = f"    python tests/lab/study.py run {studies}"
    if not lines:
        return f"{text}\n\n{command}\n\nNot run."
    origin = paragraph(
        f"Device: {distinct(lines, 'device')}, threads a run: {distinct(lines, 'threads')}, torch "
        f"{distinct(lines, 'torch')}. Commits: {distinct(lines, 'commit')}.")
    return f"{text}\n\n{command}\n\n{origin}"
