"""Draw what the model sees, what its features look like, and how a run went: SVG files with words.

    python tests/lab/show.py scenes toy_s2c --out scenes.svg
    python tests/lab/show.py features backbone.pt --data toy_s1 --out features.svg
    python tests/lab/show.py maps backbone.pt --data PACK_WITH_MASKS --out maps.svg
    python tests/lab/show.py curve runs/softcon_s1/log.jsonl --out curve.svg
    python tests/lab/show.py gains --out gains.svg

scenes     scenes of a pack, one a row: their images, SoftCon's two views, the masks of both
           methods, the labels and their similarity; views as the full-size presets draw them
features   images of a pack beside the principal components of a ViT's patch tokens
maps       test images of a pack with masks, their masks, and what the dense probe guesses
curve      the loss terms of a run and k-NN on held-out scenes, from its log
gains      what the soft term adds on classes that it saw no label of, from lines of study.py

The first run of pretrain.py makes the packs toy_s1 and toy_s2c.
"""
import argparse
import base64
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import imagecodecs
import numpy as np
import torch
import torch.nn.functional as F

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
PAPER = "#ffffff"
MARGIN = 16

# ------------------------------------------------------------------------------------------ drawing


class Svg:
    """A drawing.  Shapes and words are added one by one; lengths in pixels from the top left."""

    def __init__(self, width, height):
        self.root = ElementTree.Element("svg", {
            "xmlns": "http://www.w3.org/2000/svg", "width": str(width), "height": str(height),
            "viewBox": f"0 0 {width} {height}", "font-family": "Helvetica, Arial, sans-serif"})
        self.rect(0, 0, width, height, PAPER)

    def add(self, tag, content=None, **attributes):
        """Add an element.  Python's stroke_width is SVG's stroke-width."""
        element = ElementTree.SubElement(self.root, tag)
        element.text = content
        for name, value in attributes.items():
            if isinstance(value, float):
                value = round(value, 1)
            element.set(name.replace("_", "-"), str(value))

    def rect(self, x, y, width, height, fill, **more):
        self.add("rect", x=x, y=y, width=width, height=height, fill=fill, **more)

    def text(self, x, y, words, size=12, fill=INK, **more):
        """Write a line of words; y is its base line."""
        self.add("text", words, x=x, y=y, font_size=size, fill=fill, **more)

    def line(self, points, stroke=INK, width=1):
        """Join points [(x, y), ...] by straight lines."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.add("polyline", points=path, fill="none", stroke=stroke, stroke_width=width)

    def image(self, x, y, side, pixels):
        """Place float pixels (3,h,w) in [0,1] in a square; they stay sharp when enlarged."""
        pixels = (255 * pixels).round().byte().permute(1, 2, 0).contiguous().numpy()
        png = base64.b64encode(imagecodecs.png_encode(pixels, level=9)).decode()
        self.add("image", x=x, y=y, width=side, height=side, preserveAspectRatio="none",
                 style="image-rendering: pixelated", href=f"data:image/png;base64,{png}")

    def save(self, path):
        ElementTree.indent(self.root)
        text = ElementTree.tostring(self.root, encoding="unicode")
        Path(path).write_text(text + "\n", encoding="utf-8")


def visible_bands(sensor):
    """Places of the bands that are drawn as red, green and blue."""
    if sensor.red_green_blue:
        return list(sensor.red_green_blue)
    last = len(sensor.bands) - 1
    return [0, (last + 1) // 2, last]


def some_scenes(pack, n, seed):
    """Numbers of n scenes of the pack, or of all if there are fewer."""
    return np.random.default_rng(seed).permutation(len(pack.scenes))[:n].tolist()


# ------------------------------------------------------------------------------------------- scenes

SIDE = 64                             # pixels of a view
PATCH = 8                             # pixels of a patch
TILE = 64                             # side of a drawn image
STEP = TILE + 4                       # from one image to the next
CELL = 42                             # from one cell of the similarity matrix to the next
LINE = 14                             # from one line of words to the next
TOP = 64                              # height of the titles

DARK = (0.15, 0.15, 0.15)             # colours of the masks, red green blue in [0,1]
BLUE = (0.1, 0.4, 1.0)
YELLOW = (1.0, 0.9, 0.1)
RED = (0.9, 0.1, 0.2)
MEANINGS = {DARK: "dark: SoftCon's student does not see this patch",
            BLUE: "blue: PerA's student sees it",
            YELLOW: "yellow: PerA's student must guess its pixels, which nobody sees",
            RED: "red: PerA's teacher sees it"}
NOTES = ["Similarity 1: the same classes.", "Similarity 0: no class in common, or no labels.",
         "The diagonal compares two images of one scene."]
TITLES = {"images": ("Images", "of the scene"),
          "views": ("SoftCon's views", "two images: 1, 2"),
          "softcon": ("SoftCon", "1, masked"),
          "pera": ("PerA", "three sets"),
          "labels": ("Labels", "of view 1, of view 2"),
          "similarity": ("Label similarity", "of view 1 to view 2 of scene")}


def view_flags(method, sensor):
    """What the functions that draw views read of the flags: the full preset's, of small views."""
    small = dict(method=method, sensor=sensor, img_size=SIDE, patch_size=PATCH)
    return SimpleNamespace(**pretrain.PRESETS[method, "full"] | small)


def area_of(patches):
    """Patch indices (m,) of a view -> (SIDE,SIDE) bool: their pixels."""
    side = SIDE // PATCH
    area = torch.zeros(side * side, dtype=torch.bool)
    area[patches] = True
    return area.reshape(side, side).kron(torch.ones(PATCH, PATCH, dtype=torch.bool))


def fill(colour):
    """(3,SIDE,SIDE) of one colour."""
    return torch.tensor(colour).view(3, 1, 1).expand(3, SIDE, SIDE)


def tint(picture, view, patches, colour):
    """The picture (3,SIDE,SIDE) with these patches of a view in a colour."""
    return torch.where(area_of(patches), (view + fill(colour)) / 2, picture)


def scene_pictures(pack, scenes, seed):
    """What training would see of some scenes, by columns of the drawing.

    Returns [{name of the column: [float (3,h,w) in [0,1], ...]}, ...], a dict a scene, and the
    labels (n,2,L) of the two views.
    """
    rng = np.random.default_rng(seed)
    # two images of each scene, one twice if alone: (n,2)
    pairs = np.array([rng.choice(pack.rows[i], 2, replace=len(pack.rows[i]) < 2) for i in scenes])
    x = torch.from_numpy(pack.images[pairs])                            # (n,2,C,H,W)
    n = len(scenes)

    draws = pretrain.StepRandomness(seed, step=0, micro=0, rank=0, world=1)
    views, kept = pretrain.softcon_views(x, view_flags("softcon", pack.sensor), draws)
    flags = view_flags("pera", pack.sensor)
    pera = pretrain.aligned_pairs(x[:, 0], flags, draws, 1, SIDE, flags.crop_min, 1.0)

    bands = visible_bands(pack.sensor)
    pictures = []
    for k, i in enumerate(scenes):
        view = views[k, bands]
        student = pera.student_view[k, bands]
        sets = tint(fill(DARK), student, pera.student_patches[k], BLUE)
        sets = tint(sets, student, pera.guessed_patches[k], YELLOW)
        sets = tint(sets, pera.teacher_view[k, bands], pera.teacher_patches[k], RED)
        pictures.append({"images": [shrink(pack.images[row][bands]) for row in pack.rows[i]],
                         "views": [view, views[n + k, bands]],
                         "softcon": [torch.where(area_of(kept[k]), view, fill(DARK))],
                         "pera": [sets]})
    return pictures, torch.from_numpy(pack.labels[pairs])


def shrink(pixels, side=96):
    """uint8 (3,H,W) -> float (3,h,w) in [0,1], at most `side` pixels high and wide."""
    x = torch.from_numpy(pixels).float()[None] / 255
    if x.shape[-1] > side:
        x = F.interpolate(x, (side, side), mode="area")
    return x[0]


def label_lines(y, classes):
    """Words for the labels y (2,L) of the two views: [(views that have a class, its name), ...]."""
    lines = []
    for k, name in enumerate(classes):
        carriers = [str(view + 1) for view in range(2) if y[view, k]]
        if carriers:
            lines.append((" ".join(carriers), name))
    return lines or [("", "no labels")]


def columns_of(images, n):
    """Left edge of each column of the drawing, and its width; images: the most of a scene."""
    widths = {"images": images * STEP, "views": 2 * STEP, "softcon": STEP, "pera": STEP,
              "labels": 142, "similarity": max(n * CELL, 172)}
    left = {}
    x = MARGIN
    for name, width in widths.items():
        left[name] = x
        x += width + 16
    return left, x


def draw_scenes(pack, seed=0, n=4):
    """Draw n scenes of a pack, chosen by `seed`; see the module's docstring."""
    scenes = some_scenes(pack, n, seed)
    n = len(scenes)
    pictures, labels = scene_pictures(pack, scenes, seed)
    similarity = losses.label_similarity(labels[:, 0], labels[:, 1])    # (n,n)
    words = [label_lines(y, pack.classes) for y in labels]
    row_height = max(TILE, LINE * max(map(len, words))) + 28
    left, width = columns_of(max(len(groups["images"]) for groups in pictures), n)

    svg = Svg(width, TOP + n * row_height + 86)
    for name, (title, subtitle) in TITLES.items():
        svg.text(left[name], 24, title, 14, font_weight="bold")
        svg.text(left[name], 40, subtitle, 12, GREY)
    for k, i in enumerate(scenes):
        letter = chr(ord("A") + k)
        y = TOP + k * row_height + 16
        svg.text(left["similarity"] + k * CELL + CELL / 2, TOP - 6, letter, 12, GREY,
                 text_anchor="middle")
        svg.text(MARGIN, y - 6, f"{letter}: {pack.scenes[i]}", 12, GREY)
        for name, group in pictures[k].items():
            for j, pixels in enumerate(group):
                svg.image(left[name] + j * STEP, y, TILE, pixels)
        for j, (carriers, name) in enumerate(words[k]):
            svg.text(left["labels"], y + 10 + j * LINE, carriers, 11, GREY)
            svg.text(left["labels"] + 22, y + 10 + j * LINE, name)
        draw_similarity(svg, left["similarity"], y, similarity[k].tolist())
    draw_legend(svg, left["labels"], TOP + n * row_height + 16)
    return svg


def draw_similarity(svg, x, y, values):
    """One row of the matrix: a grey cell with its number for each value in [0,1]."""
    for value in values:
        shade = round(255 * value)
        ink = INK if value > 0.5 else PAPER
        svg.rect(x, y, CELL - 2, TILE, f"rgb({shade},{shade},{shade})", stroke=RULE)
        svg.text(x + CELL / 2 - 1, y + TILE / 2 + 4, f"{value:.2f}", 12, ink,
                 text_anchor="middle")
        x += CELL


def draw_legend(svg, right, y):
    """What the colours of the masks and the numbers mean."""
    for line, (colour, words) in enumerate(MEANINGS.items()):
        rgb = ",".join(str(round(255 * value)) for value in colour)
        svg.rect(MARGIN, y + line * 18 - 10, 12, 12, f"rgb({rgb})")
        svg.text(MARGIN + 20, y + line * 18, words)
    for line, words in enumerate(NOTES):
        svg.text(right, y + line * 18, words)


# ----------------------------------------------------------------------------------------- features


@torch.no_grad()
def principal_components(net, x):
    """Patch tokens of x (n,C,H,W) -> (n,3,h,w) in [0,1]: their three main directions over all
    images, as red, green and blue."""
    _, tokens = net.last_blocks(x, 1)[0]                                # (n,N,D)
    n, N, D = tokens.shape
    tokens = tokens.reshape(n * N, D)
    _, directions = torch.linalg.eigh(tokens.T.cov())                   # of growing variance
    components = tokens @ directions[:, [-1, -2, -3]]                   # (nN,3)
    # a few extreme tokens would leave no contrast to the others
    low, high = torch.quantile(components, torch.tensor([0.02, 0.98]), dim=0)
    components = ((components - low) / (high - low)).clamp(0, 1)
    h, w = models.check_grid(*x.shape[-2:], net.patch_size)
    return components.reshape(n, h, w, 3).permute(0, 3, 1, 2)


def draw_features(net, name, pack, seed=0, n=8, size=0, side=100, columns=4):
    """Draw n images, chosen by `seed`, each beside the principal components of its patch tokens.

    name: of the network, for the caption.  size: pixels of an image as the network sees it, 0 for
    the size that it was trained with.
    """
    size = size or net.img_size
    data.require(hasattr(net, "last_blocks"), f"{name}: a ResNet has no patch tokens; give a ViT's")
    data.require(net.in_chans == len(pack.sensor.bands), f"{name}: takes {net.in_chans} bands, "
                 f"{pack.path} has {len(pack.sensor.bands)}")
    rows = [pack.rows[i][0] for i in some_scenes(pack, n, seed)]
    x = torch.from_numpy(pack.images[rows]).float() / 255               # (n,C,H,W)
    x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    components = principal_components(net.eval(), x)
    colours = F.interpolate(x[:, visible_bands(pack.sensor)], (side, side), mode="bilinear",
                            antialias=True)

    patches = size // net.patch_size
    pair = 2 * side + 16                               # from one image to the next
    svg = Svg(MARGIN + columns * pair, 70 + math.ceil(len(rows) / columns) * (side + 10))
    svg.text(MARGIN, 24, f"Patch tokens of {name}", 14, font_weight="bold")
    svg.text(MARGIN, 42, f"{net.spec['arch']}, {size} x {size} pixels, {patches} x {patches} "
             "patches. Beside each image: the three principal components of the patch tokens")
    svg.text(MARGIN, 58, "over all these images, as red, green and blue.")
    for j in range(len(rows)):
        x = MARGIN + j % columns * pair
        y = 70 + j // columns * (side + 10)
        svg.image(x, y, side, colours[j])
        svg.image(x + side + 2, y, side, components[j])
    return svg


# --------------------------------------------------------------------------------------------- maps

CLASS_COLOURS = torch.tensor([
    [0xe6, 0x55, 0x0d], [0xe8, 0xd1, 0x9a], [0x55, 0x55, 0x55], [0x2c, 0x9a, 0x3f],
    [0x1f, 0x5f, 0xa8], [0x9d, 0x4e, 0xb5], [0xf2, 0xb7, 0x05], [0x7f, 0xd1, 0xc7]]) / 255


def guessed_masks(checkpoint, path, seed, n, size):
    """Probe a network as probe.py does -> its pack, n rows of test images, their guessed masks."""
    flags = ["--ckpt", checkpoint, "--data", path, "--protocol", "dense"]
    if size:
        flags += ["--img-size", str(size)]
    flags = probe.resolve_flags(flags)
    pack = probe.open_pack(flags)
    network = probe.load_network(checkpoint, flags.runs[checkpoint], pack, flags)
    splits = probe.choose_splits(flags, pack, probe.scene_of_rows(pack), flags.runs)
    protocol = probe.PROTOCOLS["dense"]
    features = probe.compute_features(network, pack, splits, protocol, flags.feature,
                                      probe.Scaling(), flags.device)[0]
    train, test = [np.flatnonzero(splits[1.0, 0] == part) for part in ("train", "test")]
    head = probe.fit_pixels(protocol, features[train], torch.from_numpy(pack.masks[train]),
                            len(pack.classes), 0, "cpu")
    rows = np.random.default_rng(seed).permutation(test)[:n]
    with torch.no_grad():
        guess = probe.pixel_logits(head, features[rows], pack.size).argmax(1)
    return pack, rows, guess


def coloured(mask):
    """(H,W) class numbers -> (3,H,W) colours; unlabelled is white."""
    colours = CLASS_COLOURS[mask % len(CLASS_COLOURS)]                  # (H,W,3)
    colours[mask == data.UNLABELLED] = 1
    return colours.permute(2, 0, 1)


def draw_maps(checkpoint, path, seed=0, n=6, size=0, side=112, columns=2):
    """Draw n test images, chosen by `seed`, each beside its mask and the guess of the probe.

    size: pixels of an image as the network sees it, 0 for the probe's choice.
    """
    pack, rows, guess = guessed_masks(checkpoint, path, seed, n, size)
    bands = visible_bands(pack.sensor)
    triple = 3 * (side + 2) + 14                       # from one image to the next
    svg = Svg(MARGIN + columns * triple, 74 + math.ceil(len(rows) / columns) * (side + 6))
    x = MARGIN
    for k, name in enumerate(pack.classes):
        red, green, blue = (255 * CLASS_COLOURS[k % len(CLASS_COLOURS)]).int().tolist()
        svg.rect(x, 14, 12, 12, f"rgb({red},{green},{blue})")
        svg.text(x + 17, 24, name)
        x += 34 + 7 * len(name)
    svg.text(MARGIN, 44, "Frozen features, a linear head; white is unlabelled.", 12, GREY)
    for j, row in enumerate(rows):
        x = MARGIN + j % columns * triple
        y = 68 + j // columns * (side + 6)
        pictures = {"image": shrink(pack.images[row][bands], side),
                    "mask": coloured(torch.tensor(pack.masks[row]).long()),
                    "guess": coloured(guess[j])}
        for place, (title, pixels) in enumerate(pictures.items()):
            if j < columns:
                svg.text(x + place * (side + 2), 62, title, 12, GREY)
            svg.image(x + place * (side + 2), y, side, pixels)
    return svg


# -------------------------------------------------------------------------------------------- curve

TERMS = {"info_nce": "InfoNCE, eq. (2)",
         "dino": "DINO loss, eq. (7)",
         "koleo": "KoLeo, eq. (8)",
         "pixel": "pixel loss, eq. (9)",
         "soft": "soft term, eq. (3)",
         "knn": "k-NN on held-out scenes"}


def read_log(path):
    """[{name: number}, ...] of a run's log.jsonl, a line each."""
    with data.reading(path, "not the log of a run"):
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        data.require(len(rows) > 1 and "step" in rows[0], "not two or more lines of a run")
    return rows


def ticks(low, high, about=4):
    """Round numbers that lie in [low, high], about as many as `about`."""
    unit = 10 ** math.floor(math.log10((high - low) / about))
    for factor in (1, 2, 5, 10):
        if factor * unit >= (high - low) / about:
            break
    step = factor * unit
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def running_mean(values):
    """The mean of each value and its neighbours, over about a tenth of the run."""
    reach = len(values) // 20
    return [np.mean(values[max(0, i - reach):i + reach + 1]) for i in range(len(values))]


def draw_panel(svg, left, top, width, height, title, steps, values):
    """One curve with its axes; (left, top) is the corner of the area between them."""
    margin = 0.05 * (max(values) - min(values)) or 1          # a constant gets room, too
    low = min(values) - margin
    high = max(values) + margin
    right = left + width
    bottom = top + height

    def x_of(step):
        return left + width * step / steps[-1]

    def y_of(value):
        return bottom - height * (value - low) / (high - low)

    svg.text(left, top - 12, title, 13, font_weight="bold")
    for value in ticks(low, high):
        svg.line([(left, y_of(value)), (right, y_of(value))], RULE)
        svg.text(left - 6, y_of(value) + 4, f"{value:g}", 11, GREY, text_anchor="end")
    for step in ticks(0, steps[-1]):
        svg.text(x_of(step), bottom + 16, f"{step:g}", 11, GREY, text_anchor="middle")
    svg.line([(left, top), (left, bottom), (right, bottom)], GREY)
    svg.line([(x_of(s), y_of(v)) for s, v in zip(steps, values)], "#9dbfe3")
    svg.line([(x_of(s), y_of(v)) for s, v in zip(steps, running_mean(values))], "#1f5fa8", 2)
    svg.text(left + width / 2, bottom + 34, "step", 12, text_anchor="middle")


def draw_curve(log):
    """Draw the loss terms and k-NN of a run's log over its steps."""
    names = [name for name in TERMS if name in log[-1]]
    columns = 2 if len(names) == 4 else 3
    width = 900 // columns
    height = 230
    lines = math.ceil(len(names) / columns)
    svg = Svg(900, lines * height + 30)
    svg.text(46, lines * height + 14, "Light: each line of the log. Dark: the mean over a tenth of "
             "the run.", 12, GREY)
    for k, name in enumerate(names):
        rows = [row for row in log if name in row]                # k-NN: where checkpoints are
        steps = [row["step"] for row in rows]
        left = k % columns * width + 46
        top = k // columns * height + 36
        values = [row[name] for row in rows]
        draw_panel(svg, left, top, width - 64, height - 84, TERMS[name], steps, values)
    return svg


# -------------------------------------------------------------------------------------------- gains

COLOURS = ("#1f5fa8", "#d98634", "#3a8f4d", "#b03060", "#7a5ca8")
PANELS = {"17 labels, by batch": [f"17 labels, batch {size}" for size in (16, 64, 256)],
          "other labels, batch 64": ["6 coarse, batch 64", "20 % wrong, batch 64"],
          "weight and mask, batch 64": ["17 labels, weight 0.1, batch 64",
                                        "17 labels, weight 2, batch 64",
                                        "17 labels, mask, batch 64"]}


def gains_of(lines, name):
    """Mean and standard error, in points, of the paired gains of a setting of study.py's transfer
    over InfoNCE: [(mean, error), ...] for 1, 3, 10 and all images of a class."""
    setting, base = study.gains_over_info_nce([name])[name]
    points = []
    for column in study.TRANSFER[:len(study.SHOTS)]:              # of the ridge head
        own, other = [study.by_seed(lines, study.TABLES["transfer"], run, "checkpoint", column)
                      for run in (setting, base)]
        gains = [100 * (own[seed] - other[seed]) for seed in own if seed in other]
        if len(gains) > 1:
            points.append((np.mean(gains), np.std(gains, ddof=1) / len(gains) ** 0.5))
    return points


def draw_gains(lines):
    """Draw the gains of all settings, a panel for each question; bars are standard errors."""
    svg = Svg(900, 262)
    panels = {title: {name: gains_of(lines, name) for name in names}
              for title, names in PANELS.items()}
    ends = [mean + sign * error for series in panels.values() for points in series.values()
            for mean, error in points for sign in (-1, 1)]
    low, high = min([0, *ends]), max(ends)
    height = 130

    def y_of(gain):
        return 40 + height * (high - gain) / (high - low)

    for k, (title, series) in enumerate(panels.items()):
        left = 46 + 292 * k
        svg.text(left, 22, title, 13, font_weight="bold")
        for value in ticks(low, high):
            svg.line([(left, y_of(value)), (left + 240, y_of(value))], RULE)
            svg.text(left - 6, y_of(value) + 4, f"{value:+g}", 11, GREY, text_anchor="end")
        svg.line([(left, y_of(0)), (left + 240, y_of(0))], INK)
        for j, shots in enumerate(study.SHOTS):
            svg.text(left + 30 + 60 * j, 56 + height, str(shots), 11, GREY, text_anchor="middle")
        for i, (name, points) in enumerate(series.items()):
            colour = COLOURS[i]
            places = [left + 24 + 60 * j + 6 * i for j in range(len(points))]
            svg.line([(x, y_of(mean)) for x, (mean, _) in zip(places, points)], colour, 2)
            for x, (mean, error) in zip(places, points):
                svg.line([(x, y_of(mean - error)), (x, y_of(mean + error))], colour, 2)
            y = 40 + height + 34 + 15 * i
            svg.line([(left, y - 4), (left + 16, y - 4)], colour, 2)
            svg.text(left + 22, y, name, 11)
    svg.text(46, 256, "Points of accuracy over InfoNCE with the same batch and mask, ridge head; "
             "labelled images of each of 21 scene classes; paired over splits.", 11, GREY)
    return svg


# ------------------------------------------------------------------------------------- command line


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["scenes", "features", "maps", "curve", "gains"])
    parser.add_argument("path", nargs="?", help="scenes: a pack; features, maps: a checkpoint; "
                                                "curve: a run's log.jsonl")
    parser.add_argument("--data", metavar="PACK", help="features, maps: a pack")
    parser.add_argument("--img-size", type=int, default=0, help="pixels that the network sees")
    parser.add_argument("--n", type=int, help="scenes to draw (scenes 4, features 8, maps 6)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other scenes")
    parser.add_argument("--out", required=True, help="the SVG file to write")
    args = parser.parse_args(argv)
    if args.command in ("features", "maps") and not args.data:
        parser.error(f"{args.command}: give a pack by --data")
    if args.command != "gains" and not args.path:
        parser.error(f"{args.command}: give a path")
    return args


def main(argv=None):
    args = parse(argv)
    data.require(args.n is None or 1 <= args.n <= 26, f"--n {args.n}: must lie in 1 to 26")
    if args.command == "curve":
        svg = draw_curve(read_log(args.path))
    elif args.command == "gains":
        svg = draw_gains(study.read_lines("transfer"))
    elif args.command == "scenes":
        svg = draw_scenes(data.open_pack(args.path), args.seed, args.n or 4)
    elif args.command == "maps":
        svg = draw_maps(args.path, args.data, args.seed, args.n or 6, args.img_size)
    else:
        net = models.build_from(args.path)
        svg = draw_features(net, Path(args.path).name, data.open_pack(args.data), args.seed,
                            args.n or 8, args.img_size)
    svg.save(args.out)


if __name__ == "__main__":
    try:
        main()
    except (data.InputError, models.CheckpointError, OSError) as error:
        sys.exit(f"show.py: error: {error}")
