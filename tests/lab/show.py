"""Draw what the model sees, what its features look like, and how a run went: SVG files with words.

    python tests/lab/show.py scenes toy_s2c --out scenes.svg
    python tests/lab/show.py features backbone.pt --data toy_s1 --out features.svg
    python tests/lab/show.py maps backbone.pt --data PACK_WITH_MASKS --n 6 --out maps.svg
    python tests/lab/show.py curve runs/softcon_s1/log.jsonl --out curve.svg
    python tests/lab/show.py gains --out gains.svg

scenes     scenes of a pack, one a row: SoftCon's two views, the masks of both methods, up to five
           images, and how alike the labels are; views as the full-size presets draw them
features   images of a pack beside the principal components of a network's features
maps       test images of a pack with masks, their masks, and what the dense probe guesses
curve      the loss terms of a run and k-NN on held-out scenes, from its log
gains      what the soft term adds on classes that it saw no label of, from lines of study.py

The first run of pretrain.py makes the packs toy_s1 and toy_s2c.
"""
import argparse
import base64
import html
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import imagecodecs
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data  # noqa: E402
import losses  # noqa: E402
import model as models  # noqa: E402
import pretrain  # noqa: E402
import probe  # noqa: E402
import study  # noqa: E402

INK = "#222222"
GREY = "#777777"
RULE = "#cccccc"
BLUE = "#1f5fa8"
ORANGE = "#e6550d"
GREEN = "#2c9a3f"
YELLOW = "#f2d205"
RED = "#d0213a"

WIDTH = 960                           # of a drawing, in pixels
MARGIN = 16
SIDE = 96                             # of a picture
STEP = SIDE + 4                       # from one picture to the next

# ------------------------------------------------------------------------------------------ drawing


class Svg:
    """A drawing that grows downwards.  Lengths are pixels, from the top left."""

    def __init__(self):
        self.elements = []
        self.bottom = 0                                # of what is drawn so far

    def add(self, element, bottom):
        self.elements.append(element)
        self.bottom = max(self.bottom, bottom)

    def rect(self, x, y, width, height, fill, opacity=1):
        self.add(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" '
                 f'fill-opacity="{opacity:.2f}"/>', y + height)

    def text(self, x, y, words, fill=INK, weight="normal", anchor="start"):
        """Write a line of words; y is its base line, x its anchor: start, middle or end."""
        self.add(f'<text x="{x}" y="{y}" fill="{fill}" font-weight="{weight}" '
                 f'text-anchor="{anchor}">{html.escape(words)}</text>', y + 4)

    def line(self, x, y, colour, width=1):
        """Join points x (n,), y (n,) by straight lines."""
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
        self.add(f'<polyline points="{points}" fill="none" stroke="{colour}" '
                 f'stroke-width="{width}"/>', max(y))

    def picture(self, x, y, pixels):
        """Place float pixels (3,h,w) in [0,1]; they stay sharp when enlarged."""
        levels = (255 * pixels).round().byte()
        png = imagecodecs.png_encode(levels.permute(1, 2, 0).contiguous().numpy(), level=9)
        href = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        self.add(f'<image x="{x}" y="{y}" width="{SIDE}" height="{SIDE}" href="{href}" '
                 f'style="image-rendering: pixelated"/>', y + SIDE)

    def legend(self, x, y, colours):
        """What colours mean, {words: colour}, one below the other."""
        for words, colour in colours.items():
            self.rect(x, y, 12, 12, colour)
            self.text(x + 20, y + 10, words)
            y += 18

    def save(self, path):
        height = math.ceil(self.bottom) + MARGIN
        head = (f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
                f'viewBox="0 0 {WIDTH} {height}" font-family="Helvetica, Arial, sans-serif" '
                f'font-size="12">')
        paper = '<rect width="100%" height="100%" fill="white"/>'
        text = "\n".join([head, paper, *self.elements, "</svg>"])
        Path(path).write_text(text + "\n", encoding="utf-8")


def rgb(colour):
    """A colour "#rrggbb" as a picture of one pixel, (3,1,1) in [0,1]."""
    levels = bytes.fromhex(colour.removeprefix("#"))
    return torch.tensor(list(levels)).view(3, 1, 1) / 255


def visible_bands(sensor):
    """Places of the bands that are drawn as red, green and blue."""
    last = len(sensor.bands) - 1
    return sensor.red_green_blue or [0, (last + 1) // 2, last]


def small_image(pack, row):
    """An image of a pack: float (3,h,w) in [0,1], at most SIDE pixels high and wide."""
    image = pack.images[row][visible_bands(pack.sensor)]
    return torch.from_numpy(data.resize(image, min(SIDE, pack.size))) / 255


def draw_groups(caption, titles, groups):
    """Draw groups of pictures, {name: [pixels, ...]}, with a title above each of the pictures."""
    svg = Svg()
    svg.text(MARGIN, 24, caption)
    columns = 9 // len(titles)                         # groups in a line
    width = len(titles) * STEP + 14
    for k, (name, pictures) in enumerate(groups.items()):
        left = MARGIN + k % columns * width
        top = 64 + k // columns * (STEP + 18)
        svg.text(left, top + 14, name, GREY)
        for j, pixels in enumerate(pictures):
            svg.picture(left + j * STEP, top + 20, pixels)
        for j, title in enumerate(titles):
            if k < columns:
                svg.text(left + j * STEP, 52, title, weight="bold")
    return svg


# ------------------------------------------------------------------------------------------- scenes

PATCH = 12                            # pixels of a patch; a view has SIDE pixels
LETTERS = "ABCDEFGHIJKL"              # of the scenes
MASKS = {"black: SoftCon's student does not see this patch": "#000000",
         "blue: PerA's student sees it": BLUE,
         "yellow: PerA's student must guess its pixels, which nobody sees": YELLOW,
         "red: PerA's teacher sees it": RED}
ALONE = {(1, 1): "", (1, 0): " (1)", (0, 1): " (2)"}        # after a label that one view alone has


def view_flags(method, sensor):
    """What the functions that draw views read of the flags: the full preset's, of small views."""
    small = dict(method=method, sensor=sensor, img_size=SIDE, patch_size=PATCH)
    return SimpleNamespace(**pretrain.PRESETS[method, "full"] | small)


def only(patches, views):
    """The views (n,3,SIDE,SIDE), black but for these patches (n,m)."""
    there = losses.blank_patches(torch.ones_like(views), patches, PATCH) == 1
    return views * there


def training_pictures(pack, rows, seed):
    """What training sees of n scenes, given rows (n,2) of their images.

    (n,4,3,SIDE,SIDE): SoftCon's view 1, view 2, view 1 masked, and PerA's three sets of patches.
    """
    x = torch.from_numpy(pack.images[rows])                                     # (n,2,C,H,W)
    draws = pretrain.StepRandomness(seed, step=0, micro=0, rank=0, world=1)
    views, kept = pretrain.softcon_views(x, view_flags("softcon", pack.sensor), draws)
    flags = view_flags("pera", pack.sensor)
    pera = pretrain.aligned_pairs(x[:, 0], flags, draws, 1, SIDE, flags.crop_min, 1.0)

    bands = visible_bands(pack.sensor)
    first, second = views[:, bands].chunk(2)                                    # (n,3,.,.) each
    student = pera.student_view[:, bands]
    teacher = pera.teacher_view[:, bands]
    masked = only(kept[:len(rows)], first)
    # no patch is in two of the sets, so their sum is a picture
    sets = (only(pera.student_patches, (student + rgb(BLUE)) / 2)
            + only(pera.guessed_patches, (student + rgb(YELLOW)) / 2)
            + only(pera.teacher_patches, (teacher + rgb(RED)) / 2))
    return torch.stack([first, second, masked, sets], 1)


def draw_similarity(svg, left, top, values):
    """Draw a matrix (n,n) of numbers in [0,1]: the more, the bluer the cell."""
    svg.text(left, top, "Similarity of the labels of view 1 (rows) and view 2 (columns);")
    svg.text(left, top + 18, "1: the same classes, 0: none in common, or no labels")
    for i, row in enumerate(values):
        y = top + 44 + 22 * i
        svg.text(left, y + 14, LETTERS[i], GREY)
        svg.text(left + 38 + 38 * i, top + 38, LETTERS[i], GREY, anchor="middle")
        for j, value in enumerate(row):
            x = left + 20 + 38 * j
            svg.rect(x, y, 36, 20, BLUE, opacity=value / 2)
            svg.text(x + 18, y + 14, f"{value:.2f}", anchor="middle")


def draw_scenes(args):
    """Draw what training sees of scenes of a pack."""
    pack = data.open_pack(args.path)
    scenes = args.rng.permutation(len(pack.scenes))[:args.n]
    rows = [np.resize(args.rng.permutation(pack.rows[i]), 2) for i in scenes]
    rows = np.stack(rows)                                                       # (n,2)
    labels = pack.labels[rows]                                                  # (n,2,L)
    pictures = training_pictures(pack, rows, args.seed)
    groups = {}
    for k, i in enumerate(scenes):
        words = [name + ALONE[a, b] for name, a, b in zip(pack.classes, *labels[k]) if a or b]
        name = f"{LETTERS[k]}: {pack.scenes[i]}; {', '.join(words)}"
        images = [small_image(pack, row) for row in pack.rows[i][:5]]
        groups[name] = [*pictures[k], *images]
    titles = ("View 1", "View 2", "SoftCon", "PerA", "Images of the scene")
    caption = "Views of SoftCon and PerA. Above each row: scene and labels; (1): of view 1 alone."
    svg = draw_groups(caption, titles, groups)
    top = svg.bottom + 28
    svg.legend(MARGIN, top - 10, MASKS)
    first, second = torch.from_numpy(labels).unbind(1)                          # (n,L) each
    draw_similarity(svg, 480, top, losses.label_similarity(first, second))
    return svg


# ------------------------------------------------------------------------------- features and maps

CLASS_COLOURS = (ORANGE, "#e8d19a", "#555555", GREEN, BLUE, "#9d4eb5", YELLOW, "#7fd1c7")


def principal_components(x):
    """Maps of features (n,D,h,w) -> their main directions over all images: (n,3,h,w) in [0,1]."""
    x = x.movedim(1, 3)                                                         # (n,h,w,D)
    _, directions = torch.linalg.eigh(x.flatten(0, 2).T.cov())                  # variance grows
    components = x @ directions[:, [-1, -2, -3]]                                # (n,h,w,3)
    std, mean = torch.std_mean(components, (0, 1, 2))                           # (3,) each
    # without the sigmoid a few extreme features would leave no contrast to the others
    return ((components - mean) / std).sigmoid().movedim(3, 1)


@torch.no_grad()
def draw_features(args):
    """Draw images of a pack, each beside the principal components of its last map of features."""
    pack = data.open_pack(args.data)
    flags = SimpleNamespace(img_size=args.img_size, protocol="dense")
    network = probe.load_network(args.path, probe.read_run(args.path), pack, flags)
    rows = args.rng.permutation(len(pack.names))[:args.n]
    x = probe.to_network(probe.read_images(pack, rows), network.size, probe.Scaling())
    components = principal_components(probe.feature_map(network.net.eval(), x, 1))
    groups = {}
    for row, colours in zip(rows, components):
        groups[f"image {row}"] = [small_image(pack, row), colours]
    caption = "Features: their three main directions over all these images, as red, green, blue."
    return draw_groups(caption, ("Image", "Features"), groups)


def guessed_masks(args):
    """Probe a network as probe.py does -> its pack, n rows of test images, their guessed masks."""
    words = ["--ckpt", args.path, "--data", args.data, "--protocol", "dense"]
    flags = probe.resolve_flags(words)
    flags.img_size = args.img_size
    pack = probe.open_pack(flags)
    network = probe.load_network(args.path, flags.runs[args.path], pack, flags)
    splits = probe.choose_splits(flags, pack, probe.scene_of_rows(pack), flags.runs)
    protocol = probe.PROTOCOLS["dense"]
    features = probe.compute_features(network, pack, splits, protocol, flags.feature,
                                      probe.Scaling(), flags.device)[0]         # (n,D,h,w)
    split = splits[1.0, 0]                             # of seed 0, with all training images
    train = np.flatnonzero(split == "train")
    masks = torch.from_numpy(pack.masks[train])
    head = probe.fit_pixels(protocol, features[train], masks, len(pack.classes), 0, "cpu")
    rows = args.rng.permutation(np.flatnonzero(split == "test"))[:args.n]
    with torch.no_grad():
        logits = probe.pixel_logits(head, features[rows], pack.size)            # (n,L,H,W)
    return pack, rows, logits.argmax(1)


def draw_maps(args):
    """Draw test images of a pack, each beside its mask and the guess of a linear head."""
    pack, rows, guesses = guessed_masks(args)
    colours = dict(zip(pack.classes, itertools.cycle(CLASS_COLOURS)))
    palette = torch.ones(256, 3)                       # unlabelled is white
    for k, colour in enumerate(colours.values()):
        palette[k] = rgb(colour).flatten()
    groups = {}
    for row, guess in zip(rows, guesses):
        mask = torch.tensor(pack.masks[row]).long()
        numbers = torch.stack([mask, guess])                                    # (2,H,W)
        groups[f"image {row}"] = [small_image(pack, row), *palette[numbers].movedim(3, 1)]
    caption = "Frozen features, a linear head; white is unlabelled."
    svg = draw_groups(caption, ("Image", "Mask", "Guess"), groups)
    svg.legend(MARGIN, svg.bottom + 12, colours)
    return svg


# --------------------------------------------------------------------------------- curve and gains


def round_numbers(low, high):
    """Two to five numbers from low to high: multiples of a number of one digit, and zeros."""
    step = float(f"{(high - low) / 3:.0e}")
    return step * np.arange(math.ceil(low / step), math.floor(high / step) + 1)


def draw_axes(svg, place, title, x_range, x_words, y_values):
    """Draw axes at place 0, 1, 2, ..., three in a line.  Returns line(x, y, colour, width).

    x_range: [low, high]; x_words: {x: words below it}; y_values: all that they must hold.
    """
    left = 46 + place % 3 * 310
    top = 40 + place // 3 * 210
    room = 0.05 * np.ptp(y_values) or 1                # a constant gets room, too
    low = min(y_values) - room
    high = max(y_values) + room

    def across(x):
        return np.interp(x, x_range, [left, left + 250]).round(1)

    def down(y):
        return np.interp(y, [low, high], [top + 140, top]).round(1)

    def line(x, y, colour, width=1):
        svg.line(across(x), down(y), colour, width)

    svg.text(left, top - 14, title, weight="bold")
    for y in round_numbers(low, high):
        line(x_range, [y, y], RULE)
        svg.text(left - 6, down(y) + 4, f"{y:g}", GREY, anchor="end")
    line(x_range, [low, low], GREY)
    for x, words in x_words.items():
        svg.text(across(x), top + 156, words, GREY, anchor="middle")
    return line


TERMS = {"info_nce": "InfoNCE, eq. (2)",
         "dino": "DINO loss, eq. (7)",
         "koleo": "KoLeo, eq. (8)",
         "pixel": "pixel loss, eq. (9)",
         "soft": "soft term, eq. (3)",
         "knn": "k-NN on held-out scenes"}


def running_mean(values):
    """The mean of each value and its neighbours, over about a tenth of the run."""
    reach = len(values) // 20
    return [np.mean(values[max(0, i - reach):i + reach + 1]) for i in range(len(values))]


def draw_curve(args):
    """Draw the loss terms and k-NN of a run over its steps."""
    with data.reading(args.path, "not the log of a run"):
        log = [json.loads(line) for line in Path(args.path).read_text().splitlines()]
        last = log[-1]["step"]
    svg = Svg()
    words = {step: f"{step:g}" for step in round_numbers(0, last)}
    names = [name for name in TERMS if name in log[-1]]
    for place, name in enumerate(names):
        rows = [row for row in log if name in row]     # k-NN: where checkpoints are
        steps = [row["step"] for row in rows]
        values = [row[name] for row in rows]
        line = draw_axes(svg, place, TERMS[name], [0, last], words, values)
        line(steps, values, "#9dbfe3")
        line(steps, running_mean(values), BLUE, 2)
    svg.text(46, svg.bottom + 24, "Over the steps of the run. Light: each line of the log. Dark: "
             "the mean over a tenth of the run.", GREY)
    return svg


PANELS = {"17 labels, by batch and size": ["17 labels, batch 16", "17 labels, 112 px, batch 16",
                                           "17 labels, batch 64", "17 labels, batch 256"],
          "Other labels, batch 64": ["6 coarse, batch 64", "20 % wrong, batch 64"],
          "Weight and mask, batch 64": ["17 labels, weight 0.1, batch 64",
                                        "17 labels, weight 2, batch 64",
                                        "17 labels, mask, batch 64"]}


def draw_gains(args):
    """Draw what settings of study.py's transfer gain over InfoNCE with the same size, batch and mask.

    A panel for each question; bars are standard errors.
    """
    lines = study.read_lines("transfer")
    table = study.TABLES["transfer gains"]
    ridge = table.columns[:len(study.SHOTS)]           # 1, 3, 10 and all images of a class
    bars = {}                                          # {name: (3,4), mean and the bar's ends}
    for name in itertools.chain(*PANELS.values()):
        gains = [study.paired_gains(lines, table, *table.rows[name], column) for column in ridge]
        gains = 100 * np.array(gains)                  # (4,n), points of accuracy on n splits
        n = gains.shape[1]
        if n > 1:                                      # a single split tells no error
            mean = gains.mean(1)
            error = gains.std(1, ddof=1) / n ** 0.5
            bars[name] = np.stack([mean, mean - error, mean + error])
    heights = np.append(0, [*bars.values()])           # of all panels, which have one scale

    svg = Svg()
    x_range = [-0.5, len(study.SHOTS) - 0.5]
    words = {x: str(shots) for x, shots in enumerate(study.SHOTS)}
    for place, (title, names) in enumerate(PANELS.items()):
        line = draw_axes(svg, place, title, x_range, words, heights)
        line(x_range, [0, 0], INK)
        names = [name for name in names if name in bars]
        colours = dict(zip(names, (BLUE, ORANGE, GREEN, RED)))
        for i, name in enumerate(names):
            mean, low, high = bars[name]
            x = np.arange(len(mean)) + 0.1 * i
            line(x, mean, colours[name], 2)
            for j in range(len(mean)):
                line([x[j], x[j]], [low[j], high[j]], colours[name], 2)
        svg.legend(46 + 310 * place, 212, colours)
    svg.text(46, svg.bottom + 20, "Points of accuracy over InfoNCE with the same size, batch and "
             "mask, ridge; labelled images of each of 21 scene classes; paired over splits.", GREY)
    return svg


# ------------------------------------------------------------------------------------- command line

COMMANDS = {"scenes": draw_scenes, "features": draw_features, "maps": draw_maps,
            "curve": draw_curve, "gains": draw_gains}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("command", choices=COMMANDS)
    flag("path", nargs="?", help="a pack, a checkpoint or a log.jsonl; gains: nothing")
    flag("--data", metavar="PACK", help="of features and maps")
    flag("--img-size", type=int, metavar="N", help="pixels that the network sees, as in probe.py")
    flag("--n", type=data.number(int, 1, len(LETTERS)), default=4, help="scenes or images (4)")
    flag("--seed", type=int, default=0, help="another seed, other scenes or images")
    flag("--out", required=True, help="the SVG file to write")
    args = parser.parse_args(argv)
    needs_pack = args.command in ("features", "maps")
    data.require(args.data or not needs_pack, f"{args.command}: give a pack by --data")
    data.require(args.path or args.command == "gains", f"{args.command}: give a path")
    args.rng = np.random.default_rng(args.seed)
    COMMANDS[args.command](args).save(args.out)


if __name__ == "__main__":
    try:
        main()
    except (data.InputError, models.CheckpointError, OSError) as error:
        sys.exit(f"show.py: error: {error}")
