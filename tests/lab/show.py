"""Draw what the model sees, what its features look like, and how a run went: SVG files with words.

    python tests/lab/show.py scenes toy --modality s2c --out scenes.svg
    python tests/lab/show.py features backbone.pt --data toy --modality s2c --out features.svg
    python tests/lab/show.py curve runs/softcon_s1/log.jsonl --out curve.svg

scenes     scenes of a data set, one a row: its seasons, SoftCon's two views, the masks of both
           methods, the labels and their similarity; all as the full-size presets draw them
features   images beside the principal components of a ViT's patch tokens
curve      the loss terms and the effective rank of a run, from its log

The first run of pretrain.py makes the data set `toy` (so does `python data.py toy toy`).
"""
import argparse
import base64
import json
import math
import sys
from pathlib import Path
from xml.etree import ElementTree

import imagecodecs
import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data  # noqa: E402
import losses  # noqa: E402
import model  # noqa: E402
import pretrain  # noqa: E402

INK = "#222222"
GREY = "#777777"
RULE = "#cccccc"
PAPER = "#ffffff"

# ------------------------------------------------------------------------------------------ drawing


class Svg:
    """A drawing. Shapes and words are added one by one; lengths are in pixels from the top left."""

    def __init__(self, width, height):
        self.root = ElementTree.Element("svg", {
            "xmlns": "http://www.w3.org/2000/svg", "width": str(width), "height": str(height),
            "viewBox": f"0 0 {width} {height}", "font-family": "Helvetica, Arial, sans-serif"})
        self.rect(0, 0, width, height, PAPER)

    def add(self, tag, content=None, **attributes):
        """Add an element. Python's stroke_width is SVG's stroke-width."""
        element = ElementTree.SubElement(self.root, tag)
        element.text = content
        for name, value in attributes.items():
            if isinstance(value, float):
                value = round(value, 1)
            element.set(name.replace("_", "-"), str(value))

    def rect(self, x, y, width, height, fill, **more):
        self.add("rect", x=x, y=y, width=width, height=height, fill=fill, **more)

    def text(self, x, y, words, size=12, fill=INK, **more):
        """Write a line of words; y is its base line. anchor: text_anchor="middle" or "end"."""
        self.add("text", words, x=x, y=y, font_size=size, fill=fill, **more)

    def line(self, points, stroke=INK, width=1, **more):
        """Join points [(x, y), ...] by straight lines."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.add("polyline", points=path, fill="none", stroke=stroke, stroke_width=width, **more)

    def image(self, x, y, side, pixels):
        """Place pixels, uint8 (h,w,3), in a square; they stay sharp squares when enlarged."""
        png = imagecodecs.png_encode(np.ascontiguousarray(pixels), level=9)
        self.add("image", x=x, y=y, width=side, height=side, preserveAspectRatio="none",
                 style="image-rendering: pixelated",
                 href=f"data:image/png;base64,{base64.b64encode(png).decode()}")

    def save(self, path):
        ElementTree.indent(self.root)
        text = ElementTree.tostring(self.root, encoding="unicode")
        with data.file_errors(path, "not written", "its folder is gone"):
            Path(path).write_text(text + "\n", encoding="utf-8")


def pixels_of(x):
    """float (3,H,W) in [0,1] -> uint8 (H,W,3)."""
    return (255 * x).round().byte().permute(1, 2, 0).numpy()


# ------------------------------------------------------------------------------------------- scenes

SIDE = 64                             # pixels of a view
PATCH = 8                             # pixels of a patch
MARGIN = 16
TILE = 64                             # side of a drawn image
STEP = TILE + 4                       # from one image to the next
CELL = 42                             # from one cell of the similarity matrix to the next
LINE = 14                             # from one line of words to the next
GAP = 16                              # between groups of columns
TOP = 64                              # height of the titles

DARK = (0.15, 0.15, 0.15)             # colours of the masks, red green blue in [0,1]
BLUE = (0.1, 0.4, 1.0)
YELLOW = (1.0, 0.9, 0.1)
RED = (0.9, 0.1, 0.2)


def flags(method, modality, root):
    """pretrain.py's flags for data of this kind: the full-size preset, but small views."""
    return pretrain.parse(["--method", method, "--modality", modality, "--data", root, "--preset",
                           "full", "--img-size", str(SIDE), "--patch-size", str(PATCH)])


def area_of(patches):
    """Patch indices (m,) of a view -> (SIDE,SIDE) bool: their pixels."""
    grid = torch.zeros((SIDE // PATCH) ** 2, dtype=torch.bool)
    grid[patches] = True
    grid = grid.reshape(SIDE // PATCH, SIDE // PATCH)
    return grid.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)


def fill(colour):
    """(3,SIDE,SIDE) of one colour."""
    return torch.tensor(colour).view(3, 1, 1).expand(3, SIDE, SIDE)


def masked_view(view, keep):
    """A view (3,SIDE,SIDE) of which only the patches in keep (m,) are not dark."""
    return torch.where(area_of(keep), view, fill(DARK))


def three_sets(student, teacher, keep, guess, others):
    """PerA's patches in one picture: those of the student's view (3,SIDE,SIDE) that it sees (blue)
    and must guess (yellow), and those of the teacher's view that the teacher sees (red)."""
    picture = fill(DARK)
    for patches, view, colour in ((keep, student, BLUE), (guess, student, YELLOW),
                                  (others, teacher, RED)):
        picture = torch.where(area_of(patches), (view + fill(colour)) / 2, picture)
    return picture


def shrink(pixels, side=96):
    """uint8 (3,H,W) -> float (3,h,w) in [0,1], at most `side` pixels high and wide."""
    x = torch.from_numpy(pixels).float()[None] / 255
    if x.shape[-1] > side:
        x = F.interpolate(x, (side, side), mode="area")
    return x[0]


def label_lines(y, classes):
    """Words for the labels y (2,L) of the two views: the views that carry a class, and its name."""
    lines = []
    for k, name in enumerate(classes):
        if y[0, k] and y[1, k]:
            lines.append(("1 2", name))
        elif y[0, k]:
            lines.append(("1", name))
        elif y[1, k]:
            lines.append(("2", name))
    return lines or [("", "no labels")]


def columns_of(seasons, n):
    """Left edge of each group of columns, by name, and the width of the whole drawing."""
    widths = {"seasons": seasons * STEP, "views": 2 * STEP, "softcon": STEP, "pera": STEP,
              "labels": 142, "similarity": max(n * CELL, 172)}
    left = {}
    x = MARGIN
    for name, width in widths.items():
        left[name] = x
        x += width + GAP
    return left, x


def draw_titles(svg, left, n):
    titles = {"seasons": ("Seasons", "every image of the scene"),
              "views": ("SoftCon's views", "two seasons: 1, 2"),
              "softcon": ("SoftCon", "1, masked"),
              "pera": ("PerA", "three sets"),
              "labels": ("Labels", "of view 1, of view 2"),
              "similarity": ("Label similarity", "of view 1 to view 2 of scene")}
    for name, (title, subtitle) in titles.items():
        svg.text(left[name], 24, title, 14, font_weight="bold")
        svg.text(left[name], 40, subtitle, 12, GREY)
    for j in range(n):
        x = left["similarity"] + j * CELL + CELL / 2
        svg.text(x, TOP - 6, letter(j), 12, GREY, text_anchor="middle")


def letter(row):
    """Name of a row of the drawing: A, B, ..."""
    return chr(ord("A") + row)


def draw_labels(svg, x, y, lines):
    for number, (carriers, name) in enumerate(lines):
        svg.text(x, y + 10 + number * LINE, carriers, 11, GREY)
        svg.text(x + 22, y + 10 + number * LINE, name)


def draw_similarity(svg, x, y, values):
    """One row of the matrix: a grey cell with its number for each value in [0,1]."""
    for value in values:
        shade = round(255 * value)
        ink = PAPER
        if value > 0.5:
            ink = INK
        svg.rect(x, y, CELL - 2, TILE, f"rgb({shade},{shade},{shade})", stroke=RULE)
        svg.text(x + CELL / 2 - 1, y + TILE / 2 + 4, f"{value:.2f}", 12, ink,
                 text_anchor="middle")
        x += CELL


def draw_legend(svg, left, y):
    """What the colours of the masks and the numbers mean."""
    meanings = ((DARK, "dark: SoftCon's student does not see this patch"),
                (BLUE, "blue: PerA's student sees it"),
                (YELLOW, "yellow: PerA's student must guess its pixels, which nobody sees"),
                (RED, "red: PerA's teacher sees it"))
    notes = ("Similarity 1: the same classes.", "Similarity 0: no class in common, or no labels.",
             "The diagonal compares two seasons of one scene.")
    for line, (colour, words) in enumerate(meanings):
        red, green, blue = [round(255 * value) for value in colour]
        svg.rect(MARGIN, y + line * 18 - 10, 12, 12, f"rgb({red},{green},{blue})")
        svg.text(MARGIN + 20, y + line * 18, words)
    for line, words in enumerate(notes):
        svg.text(left["labels"], y + line * 18, words)


def scene_pictures(root, scenes, rows, seed):
    """What training would see of some scenes, by columns of the drawing.

    Returns [{name of the column: [uint8 (h,w,3), ...]}, ...], a dict a scene, and the labels
    (n,2,L) of the two views.
    """
    softcon = flags("softcon", scenes.sensor.name, root)
    pera = flags("pera", scenes.sensor.name, root)
    look = scenes.sensor.look
    n = len(rows)
    x, labels = scenes.__getitems__([(i, (seed, i)) for i in rows])     # (n,2,C,H,W), (n,2,L)
    x = torch.from_numpy(x)
    draws = pretrain.StepRandomness(seed, step=0, micro=0, rank=0, world=1)
    views, kept = pretrain.softcon_views(x, softcon, draws)             # (2n,C,s,s), (2n,m)
    student, teacher, *sets = pretrain.aligned_pairs(x[:, 0], pera, draws, 1, SIDE, pera.crop_min,
                                                     1.0)               # (n,C,s,s), (n,m)
    pictures = []
    for row, i in enumerate(rows):
        view1 = views[row, look]
        view2 = views[n + row, look]
        patches = [part[row] for part in sets]
        seasons = [scenes.image(i, s)[look] for s in range(len(scenes.files[i]))]
        groups = {"seasons": list(map(shrink, seasons)),
                  "views": [view1, view2],
                  "softcon": [masked_view(view1, kept[row])],
                  "pera": [three_sets(student[row, look], teacher[row, look], *patches)]}
        pictures.append({name: list(map(pixels_of, group)) for name, group in groups.items()})
    return pictures, torch.from_numpy(labels)


def draw_scenes(root, scenes, seed=0, n=4):
    """Draw n scenes of the data set in `root`, chosen by `seed`; see the module's docstring."""
    rows = np.random.default_rng(seed).permutation(len(scenes))[:n].tolist()
    n = len(rows)
    pictures, labels = scene_pictures(root, scenes, rows, seed)
    similarity = losses.label_similarity(labels[:, 0], labels[:, 1])    # (n,n)
    words = [label_lines(y, scenes.classes) for y in labels]
    lines = max(len(row) for row in words)
    row_height = max(TILE, LINE * lines) + 28

    left, width = columns_of(max(len(groups["seasons"]) for groups in pictures), n)
    svg = Svg(width, TOP + n * row_height + 86)
    draw_titles(svg, left, n)
    for row, i in enumerate(rows):
        y = TOP + row * row_height
        svg.text(MARGIN, y + 10, f"{letter(row)}: {scenes.ids[i]}", 12, GREY)
        y += 16
        for name, group in pictures[row].items():
            for j, pixels in enumerate(group):
                svg.image(left[name] + j * STEP, y, TILE, pixels)
        draw_labels(svg, left["labels"], y, words[row])
        draw_similarity(svg, left["similarity"], y, similarity[row].tolist())
    draw_legend(svg, left, TOP + n * row_height + 16)
    return svg


# ----------------------------------------------------------------------------------------- features


def resize(x, size):
    """uint8 (n,C,H,W) -> float (n,C,size,size) in [0,1], what the network takes."""
    return F.interpolate(x.float() / 255, (size, size), mode="bilinear", antialias=True)


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
    h, w = model.check_grid(*x.shape[-2:], net.patch_size)
    return components.reshape(n, h, w, 3).permute(0, 3, 1, 2)


def draw_features(net, name, scenes, seed=0, n=8, size=0, side=100, columns=4):
    """Draw n images, chosen by `seed`, each beside the principal components of its patch tokens.

    name: of the network, for the caption. size: pixels of an image as the network sees it, 0 for
    the size that it was trained with.
    """
    if not hasattr(net, "last_blocks"):
        raise ValueError("features: a ResNet has no patch tokens; give a ViT's checkpoint")
    rows = np.random.default_rng(seed).permutation(len(scenes))[:n].tolist()
    x = torch.from_numpy(np.stack([scenes.image(i, 0) for i in rows]))   # uint8 (n,C,H,W)
    x = resize(x, size or net.img_size)
    components = principal_components(net.eval(), x)
    colours = F.interpolate(x[:, scenes.sensor.look], (side, side), mode="bilinear", antialias=True)

    size = x.shape[-1]
    patches = size // net.patch_size
    pair = 2 * side + 16                               # from one image to the next
    line = side + 10
    svg = Svg(MARGIN + columns * pair, 70 + math.ceil(len(rows) / columns) * line)
    svg.text(MARGIN, 24, f"Patch tokens of {name}", 14, font_weight="bold")
    arch = net.spec["arch"]
    svg.text(MARGIN, 42, f"{arch}, {size} x {size} pixels, {patches} x {patches} patches. "
             "Beside each image: the three principal components of the patch tokens")
    svg.text(MARGIN, 58, "over all these images, as red, green and blue.")
    for j in range(len(rows)):
        x = MARGIN + j % columns * pair
        y = 70 + j // columns * line
        svg.image(x, y, side, pixels_of(colours[j]))
        svg.image(x + side + 2, y, side, pixels_of(components[j]))
    return svg


# -------------------------------------------------------------------------------------------- curve

TERMS = {"info_nce": "InfoNCE, eq. (2)",
         "dino": "DINO loss, eq. (7)",
         "koleo": "KoLeo, eq. (8)",
         "pixel": "pixel loss, eq. (9)",
         "soft": "soft term, eq. (3)"}


def read_log(path):
    """[{name: number}, ...] of a run's log.jsonl, a step each."""
    rows = []
    for number, line in enumerate(data.read_text(path).splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}: line {number} is not JSON") from None
    if len(rows) < 2 or not all(isinstance(row, dict) and "step" in row for row in rows):
        raise ValueError(f"{path}: not the log of a run of two or more lines")
    return rows


def ticks(low, high, about=4):
    """Round numbers that lie in [low, high], about as many as `about`."""
    rough = (high - low) / about
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first = math.ceil(low / step)
    last = math.floor(high / step)
    return [k * step for k in range(first, last + 1)]


def running_mean(values):
    """The mean of each value and its neighbours, over about a tenth of the run."""
    reach = len(values) // 20
    means = []
    for i in range(len(values)):
        near = values[max(0, i - reach):i + reach + 1]
        means.append(sum(near) / len(near))
    return means


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
    """Draw the loss terms and the effective rank of a run's log over its steps."""
    names = {name: title for name, title in TERMS.items() if name in log[0]}
    names["effective_rank"] = "effective rank of the features"
    columns = 3
    if len(names) == 4:
        columns = 2
    width = 900 // columns
    height = 230
    lines = math.ceil(len(names) / columns)
    svg = Svg(900, lines * height + 30)
    svg.text(46, lines * height + 14, "Light: each line of the log. Dark: the mean over a tenth of "
             "the run.", 12, GREY)
    steps = [row["step"] for row in log]
    for k, (name, title) in enumerate(names.items()):
        values = [row[name] for row in log]
        left = k % columns * width + 46
        top = k // columns * height + 36
        draw_panel(svg, left, top, width - 64, height - 84, title, steps, values)
    return svg


# ------------------------------------------------------------------------------------- command line


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    scenes = commands.add_parser("scenes", help="what the model sees", allow_abbrev=False)
    scenes.add_argument("root", help="a data set that pretrain.py's --data takes")
    scenes.add_argument("--labels", help="as in pretrain.py")
    scenes.add_argument("--n", type=int, default=4, help="number of scenes")

    features = commands.add_parser("features", help="patch tokens as colours", allow_abbrev=False)
    features.add_argument("checkpoint", help="a ViT that model.py reads")
    features.add_argument("--data", dest="root", required=True, help="a data set, as above")
    features.add_argument("--img-size", type=int, default=0, help="pixels that the network sees")
    features.add_argument("--n", type=int, default=8, help="number of images")

    curve = commands.add_parser("curve", help="the course of a run", allow_abbrev=False)
    curve.add_argument("log", help="a run's log.jsonl")

    for command in (scenes, features):
        command.add_argument("--modality", required=True, help="name of the sensor")
        command.add_argument("--seed", type=int, default=0, help="another seed, other scenes")
    for command in (scenes, features, curve):
        command.add_argument("--out", required=True, help="the SVG file to write")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if args.command == "curve":
        svg = draw_curve(read_log(args.log))
    else:
        data.require(1 <= args.n <= 26, f"--n {args.n}: must lie in 1 to 26")
        sensor = data.find_sensor(args.modality)
        if args.command == "scenes":
            scenes = data.open_data(args.root, sensor, args.labels)
            svg = draw_scenes(args.root, scenes, args.seed, args.n)
        else:
            scenes = data.open_data(args.root, sensor)
            net = model.build_from(args.checkpoint)
            name = Path(args.checkpoint).name
            svg = draw_features(net, name, scenes, args.seed, args.n, args.img_size)
    svg.save(args.out)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"show.py: error: {data.error_message(error)}")
