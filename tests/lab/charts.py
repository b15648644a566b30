"""Two figures of the results on UC Merced, drawn from results/ucm.jsonl as SVG with words.

    python tests/lab/charts.py        writes figures/ucm_methods.svg and figures/ucm_shares.svg
"""
import math
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import probe  # noqa: E402
from lab import real, real_tables  # noqa: E402
from lab.show import GREY, INK, RULE, Svg  # noqa: E402

FIGURES = Path(__file__).parent / "figures"
BLUE = "#1f5fa8"
LEFT, RIGHT = 220, 560                            # of the axis, in pixels


def draw_axis(svg, low, high, top, bottom, title):
    """Vertical lines at every twentieth, their values, and what they are -> x of a value."""
    def place(value):
        return LEFT + (RIGHT - LEFT) * (value - low) / (high - low)
    for tick in range(round(20 * low), round(20 * high) + 1):
        svg.line([(place(tick / 20), top), (place(tick / 20), bottom)], RULE)
        svg.text(place(tick / 20), bottom + 16, f"{tick / 20:.2f}", text_anchor="middle")
    svg.text((LEFT + RIGHT) / 2, bottom + 34, title, text_anchor="middle")
    return place


def axis_range(numbers):
    """The twentieths below and above all numbers."""
    return math.floor(20 * min(numbers)) / 20, math.ceil(20 * max(numbers)) / 20


def method_values():
    """[(name, values of the splits), ...] in the order of the table."""
    found = []
    for row in real_tables.that_were_run(real_tables.MAIN_ROWS):
        title = row["title"]
        if row["size"] == 112:
            title += ", 112 px"
        found.append((title, real_tables.row_values(row, "micro_map")))
    found.append(("fine-tuned with the labels", real_tables.fine_tuned_values("micro_map")))
    return found


def draw_methods(path):
    """A row a method: a dot for each split, and a line at their mean."""
    rows = method_values()
    svg = Svg(640, 120 + 22 * len(rows))
    svg.text(20, 26, "UC Merced, 17 classes, 3.3 an image: what a ridge head makes of features", 14,
             font_weight="bold")
    svg.text(20, 44, "a dot is one split, a line their mean; fine-tuned: all weights learn",
             fill=GREY)
    numbers = sum([values for _, values in rows], [])
    low, high = axis_range(numbers)
    bottom = 66 + 22 * len(rows)
    place = draw_axis(svg, low, high, 60, bottom, "micro average precision")
    for k, (title, values) in enumerate(rows):
        y = 78 + 22 * k
        svg.text(LEFT - 10, y + 4, title, text_anchor="end")
        for value in values:
            svg.add("circle", cx=place(value), cy=y, r=3, fill=BLUE, fill_opacity=0.5)
        mean = float(np.mean(values))
        svg.line([(place(mean), y - 8), (place(mean), y + 8)], INK, 2)
        svg.text(RIGHT + 12, y + 4, f"{mean:.3f}")
    svg.save(path)


def draw_shares(path):
    """Micro average precision by the number of labelled images, on splits that all runs have."""
    names = ["soft term, all labels", "soft term, share's labels", "InfoNCE, no labels", "frozen"]
    columns = {}                                  # {share: {name: {split: value}}}
    for k, share in enumerate(real.SHARES):
        columns[share] = {name: real_tables.first_values(
            real_tables.share_run(name, share), "micro_map", "checkpoint", k) for name in names}
    common = set.intersection(*[set(columns[share][name]) for share in columns for name in names])
    rows = []
    for share in reversed(real.SHARES):           # few labels first
        values = {name: {"micro_map": [columns[share][name][split] for split in sorted(common)]}
                  for name in names}
        rows.append({"n_train": real.images_of(share), "all": values})
    probe.draw_curve(path, rows, "micro_map",
                     "UC Merced: micro AP of a head, by the labels that pretraining saw")


DRAWINGS = {"ucm_methods.svg": draw_methods, "ucm_shares.svg": draw_shares}


def main():
    for name, draw in DRAWINGS.items():
        draw(FIGURES / name)
        print(f"{FIGURES / name} written")


if __name__ == "__main__":
    main()
