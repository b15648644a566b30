"""Two figures of the results on UC Merced, drawn from results/ucm.jsonl as SVG with words.

    python tests/lab/charts.py        writes figures/ucm_methods.svg and figures/ucm_shares.svg
"""
import math
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from lab import real_tables  # noqa: E402
from lab.lines import find  # noqa: E402
from lab.show import GREY, INK, RULE, Svg  # noqa: E402

FIGURES = Path(__file__).parent / "figures"
BLUE = "#1f5fa8"
ORANGE = "#c05020"
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
    """[(name, values of the splits), ...] in the order of the table, without what was not run."""
    found = []
    for row in real_tables.MAIN_ROWS:
        network = row.get("network", "checkpoint")
        numbers = list(real_tables.first_values(row["run"], "micro_map", network).values())
        title = row["title"]
        if row["size"] == 112:
            title += ", 112 px"
        found.append((title, numbers))
    lines = find("ucm/fine-tuned", "rgb").values()
    found.append(("fine-tuned with the labels", [line["micro_map"] for line in lines]))
    return [(title, numbers) for title, numbers in found if numbers]


def draw_methods():
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
    return svg


def draw_shares():
    """Micro average precision against the share of labelled images."""
    names = ["frozen weights", "InfoNCE, no labels", "+ soft term, the share's labels"]
    colours = [GREY, BLUE, ORANGE]
    rows = real_tables.share_rows()
    curves = []
    for column, name in enumerate(names):
        points = [(share, float(np.mean(list(columns[column].values()))))
                  for share, columns, _ in rows if columns[column]]
        curves.append((name, points))
    numbers = [value for _, points in curves for _, value in points]
    low, high = axis_range(numbers)

    svg = Svg(640, 360)
    svg.text(20, 26, "UC Merced: what labels are worth, when few images have them", 14,
             font_weight="bold")
    svg.text(20, 44, "micro average precision of a ridge head that is fit on the labelled images",
             fill=GREY)

    def x_of(share):
        return 60 + 330 * math.log10(share / 3) / math.log10(100 / 3)

    def y_of(value):
        return 300 - 230 * (value - low) / (high - low)
    for tick in range(round(20 * low), round(20 * high) + 1):
        svg.line([(60, y_of(tick / 20)), (390, y_of(tick / 20))], RULE)
        svg.text(52, y_of(tick / 20) + 4, f"{tick / 20:.2f}", text_anchor="end")
    for share, _, _ in rows:
        svg.text(x_of(share), 318, f"{share} %", text_anchor="middle")
    svg.text(225, 340, "share of the 1,344 training images with labels", text_anchor="middle")
    for k, (name, points) in enumerate(curves):
        svg.line([(x_of(share), y_of(value)) for share, value in points], colours[k], 2)
        for share, value in points:
            svg.add("circle", cx=x_of(share), cy=y_of(value), r=3, fill=colours[k])
        svg.text(405, 90 + 20 * k, name, fill=colours[k])
    return svg


DRAWINGS = {"ucm_methods.svg": draw_methods, "ucm_shares.svg": draw_shares}


def main():
    for name, draw in DRAWINGS.items():
        draw().save(FIGURES / name)
        print(f"{FIGURES / name} written")


if __name__ == "__main__":
    main()
