"""Draw a diagram of each method: which data go where, and what is compared with what.

    python tests/lab/diagrams.py softcon --out tests/lab/figures/softcon.svg
    python tests/lab/diagrams.py pera --out tests/lab/figures/pera.svg

Solid frames are trained or made from the data; dashed frames get no gradient. Equations are
numbered as in the README.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lab.show import GREY, INK, PAPER, Svg, data  # noqa: E402

BLUE = "#d6e6f7"                      # the student
ORANGE = "#fbe2c8"                    # the teacher
GREEN = "#dff0d8"                     # a term of the loss
STRONG_BLUE = "#5f9bd6"               # patches of the student
STRONG_YELLOW = "#f2cf3f"             # patches that the student must guess
STRONG_ORANGE = "#e8a25c"             # patches of the teacher
LINE = 16                             # from one line of words to the next


def box(svg, x, y, width, height, title, lines=(), fill=PAPER, dashed=False):
    """A frame with a title and lines of words, centred."""
    more = {}
    if dashed:
        more["stroke_dasharray"] = "5 3"
    svg.rect(x, y, width, height, fill, stroke=INK, rx=4, **more)
    middle = x + width / 2
    first = y + height / 2 + 4 - len(lines) * LINE / 2
    svg.text(middle, first, title, 13, text_anchor="middle", font_weight="bold")
    for number, words in enumerate(lines, 1):
        svg.text(middle, first + number * LINE, words, 12, text_anchor="middle")


def arrow(svg, *points, dashed=False):
    """A line through points (x, y) with a head at the last; its last part is straight up, down,
    left or right."""
    more = {}
    if dashed:
        more["stroke_dasharray"] = "5 3"
    svg.line(points, INK, 1.4, **more)
    (x0, y0), (x, y) = points[-2:]
    length = max(abs(x - x0), abs(y - y0))
    dx = 8 * (x - x0) / length
    dy = 8 * (y - y0) / length
    svg.line([(x - dx - dy / 2, y - dy + dx / 2), (x, y), (x - dx + dy / 2, y - dy - dx / 2)],
             INK, 1.4)


def words(svg, x, y, *lines, anchor="start", fill=GREY):
    """Lines of words; y is the base line of the first."""
    for number, line in enumerate(lines):
        svg.text(x, y + number * LINE, line, 12, fill, text_anchor=anchor)


def grid(svg, x, y, side, colours):
    """A square of cells with the given colours [[colour, ...], ...]."""
    n = len(colours)
    cell = side / n
    for i, row in enumerate(colours):
        for j, colour in enumerate(row):
            svg.rect(x + j * cell, y + i * cell, cell, cell, colour, stroke=GREY, stroke_width=0.7)


def greys(values):
    """Numbers in [0,1] -> colours from white, 0, to dark, 1."""
    rows = []
    for row in values:
        shades = [round(255 - 190 * value) for value in row]
        rows.append([f"rgb({s},{s},{s})" for s in shades])
    return rows


# ------------------------------------------------------------------------------------------ SoftCon

# an example of four scenes: what the student says, and the two targets
SIMILARITY = [[0.8, 0.2, 0.5, 0.1],
              [0.1, 0.7, 0.2, 0.4],
              [0.4, 0.2, 0.9, 0.2],
              [0.2, 0.5, 0.0, 0.6]]
IDENTITY = [[1, 0, 0, 0],
            [0, 1, 0, 0],
            [0, 0, 1, 0],
            [0, 0, 0, 1]]
LABELS = [[1.0, 0.3, 0.6, 0.0],
          [0.3, 0.8, 0.0, 0.6],
          [0.6, 0.0, 1.0, 0.3],
          [0.0, 0.6, 0.3, 1.0]]


def softcon_losses(svg):
    """The right part of SoftCon's diagram: the similarities and their two targets."""
    grid(svg, 514, 112, 92, greys(SIMILARITY))
    words(svg, 500, 150, "cosines", "q . k", anchor="end")
    arrow(svg, (606, 140), (650, 140), (650, 84), (690, 84))
    arrow(svg, (606, 176), (650, 176), (650, 232), (690, 232))
    grid(svg, 692, 48, 72, greys(IDENTITY))
    grid(svg, 692, 196, 72, greys(LABELS))
    words(svg, 692, 38, "target: the identity", fill=INK)
    words(svg, 692, 186, "target: label similarity", fill=INK)
    words(svg, 772, 70, "hard term:", "InfoNCE,", "eq. (2)", fill=INK)
    words(svg, 772, 218, "soft term,", "weighted,", "eq. (3)", fill=INK)


def softcon():
    svg = Svg(860, 396)
    student = 40                                      # tops of the three rows
    teacher = 190
    labels = 290
    svg.text(16, 22, "SoftCon: two seasons of each scene of a batch", 14, font_weight="bold")

    # the student's row
    box(svg, 16, student, 92, 56, "season 1")
    arrow(svg, (108, student + 28), (130, student + 28))
    box(svg, 130, student, 92, 56, "augment", ("crop, colour",))
    arrow(svg, (222, student + 28), (244, student + 28))
    box(svg, 244, student, 92, 56, "mask", ("30 % in blocks",))
    arrow(svg, (336, student + 28), (358, student + 28))
    box(svg, 358, student, 136, 56, "student", ("backbone, projector,", "predictor"), BLUE)
    arrow(svg, (494, student + 28), (560, student + 28), (560, 110))
    words(svg, 500, student + 20, "queries q")

    # the teacher's row
    box(svg, 16, teacher, 92, 56, "season 2")
    arrow(svg, (108, teacher + 28), (130, teacher + 28))
    box(svg, 130, teacher, 92, 56, "augment", ("crop, colour",))
    arrow(svg, (222, teacher + 28), (358, teacher + 28))
    box(svg, 358, teacher, 136, 56, "teacher", ("backbone, projector",), ORANGE, dashed=True)
    arrow(svg, (494, teacher + 28), (560, teacher + 28), (560, 206))
    words(svg, 500, teacher + 44, "keys k")

    # the teacher follows the student
    arrow(svg, (426, student + 56), (426, teacher), dashed=True)
    words(svg, 416, 128, "moving average of", "the student's", "weights, eq. (5)", anchor="end")

    softcon_losses(svg)

    # the labels
    box(svg, 16, labels, 206, 48, "land-cover labels", ("of season 1 and of season 2",))
    arrow(svg, (222, labels + 24), (358, labels + 24))
    box(svg, 358, labels, 230, 48, "label similarity s, eq. (1)", ("cosine of label vectors",))
    arrow(svg, (588, labels + 24), (728, labels + 24), (728, 270))

    words(svg, 16, 368,
          "Then the seasons change places: season 2 goes to the student, season 1 to the teacher.",
          "The loss is the mean of both directions, eq. (4).", fill=INK)
    return svg


# --------------------------------------------------------------------------------------------- PerA

# which patches of a crop go to the student (S), are guessed (G), go to the teacher (T)
PATCHES = ["TSTGT", "GTTST", "TTSTG", "STGTT", "TGTTS"]


def patches(letter, colour):
    """Colours of a grid in which only the patches of one set are filled."""
    rows = []
    for row in PATCHES:
        colours = []
        for patch in row:
            if patch == letter:
                colours.append(colour)
            else:
                colours.append(PAPER)
        rows.append(colours)
    return rows


def pera_losses(svg, guess, student, teacher):
    """The right part of PerA's diagram: from what the networks say to the terms of the loss."""
    # the pixels
    arrow(svg, (346, guess - 20), (640, guess - 20))
    words(svg, 362, guess - 26, "pixels of these patches (global crops only)")
    arrow(svg, (580, student - 18), (606, student - 18), (606, guess + 14), (640, guess + 14))
    words(svg, 614, guess + 40, "guessed pixels")
    box(svg, 640, guess - 30, 208, 52, "pixel loss", ("squared error, eq. (9)",), GREEN)

    # the CLS tokens
    arrow(svg, (580, student + 8), (628, student + 8))
    words(svg, 590, student + 24, "CLS")
    box(svg, 628, student - 22, 108, 60, "scores", ("of the student's", "prototypes"), BLUE)
    arrow(svg, (580, teacher), (628, teacher))
    words(svg, 590, teacher + 16, "CLS")
    box(svg, 628, teacher - 30, 108, 76, "scores", ("minus their", "running mean,", "eq. (11)"),
        ORANGE, dashed=True)
    arrow(svg, (736, student + 8), (756, student + 8))
    box(svg, 756, student - 22, 92, 60, "KoLeo", ("global crops,", "eq. (8)"), GREEN)
    arrow(svg, (682, student + 38), (682, 260), (756, 260))
    arrow(svg, (682, teacher - 30), (682, 270), (756, 270))
    box(svg, 756, 240, 92, 50, "DINO loss", ("eq. (7)",), GREEN)


def pera():
    svg = Svg(860, 436)
    guess = 80                                        # middles of the three rows
    student = 190
    teacher = 330
    svg.text(16, 22, "PerA: one crop of an image, and no patch in common", 14, font_weight="bold")

    # one crop in two colours
    box(svg, 16, 228, 88, 64, "one crop", ("of 2 global,", "8 local"))
    arrow(svg, (60, 228), (60, student), (128, student))
    arrow(svg, (60, 292), (60, teacher), (128, teacher))
    box(svg, 128, student - 26, 112, 52, "colours", ("of the student",))
    box(svg, 128, teacher - 26, 112, 52, "colours", ("of the teacher",))

    # three sets of patches
    arrow(svg, (184, student - 26), (184, guess), (274, guess))
    arrow(svg, (240, student), (274, student))
    arrow(svg, (240, teacher), (274, teacher))
    grid(svg, 276, guess - 35, 70, patches("G", STRONG_YELLOW))
    grid(svg, 276, student - 35, 70, patches("S", STRONG_BLUE))
    grid(svg, 276, teacher - 35, 70, patches("T", STRONG_ORANGE))
    words(svg, 276, guess - 40, "20 % to guess")
    words(svg, 276, student - 40, "20 % seen")
    words(svg, 276, teacher - 40, "60 % seen")

    # the networks
    arrow(svg, (346, student), (396, student))
    box(svg, 396, student - 30, 92, 60, "student", ("first half", "of the blocks"), BLUE)
    box(svg, 488, student - 30, 92, 60, "student", ("second half", "of the blocks"), BLUE)
    arrow(svg, (346, guess + 20), (524, guess + 20), (524, student - 30))
    words(svg, 362, guess + 36, "mask tokens with the", "places to guess")
    arrow(svg, (346, teacher), (396, teacher))
    box(svg, 396, teacher - 30, 184, 60, "teacher", ("all blocks",), ORANGE, dashed=True)
    arrow(svg, (488, student + 30), (488, teacher - 30), dashed=True)
    words(svg, 478, 256, "moving average of the", "student's weights, eq. (5)", anchor="end")

    pera_losses(svg, guess, student, teacher)
    words(svg, 16, 402, "The three sets are drawn anew for every crop, eq. (6).",
          "Loss: DINO loss + 0.1 KoLeo + 0.01 pixel loss, eq. (10).", fill=INK)
    return svg


METHODS = {"softcon": softcon, "pera": pera}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--out", required=True, help="the SVG file to write")
    args = parser.parse_args(argv)
    METHODS[args.method]().save(args.out)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"diagrams.py: error: {data.error_message(error)}")
