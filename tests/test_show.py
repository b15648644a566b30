"""Claims about tests/lab/show.py and diagrams.py: what stands where, and that it is true."""
import base64
import json
import shutil
from xml.etree import ElementTree

import imagecodecs
import numpy as np
import pytest
import torch

import data
import losses
import model
import pretrain
from conftest import ROOT
from lab import diagrams, show
from programs import script

FIGURES = ROOT / "tests" / "lab" / "figures"
TINTS = {"student": (26, 102, 255), "guess": (255, 230, 26), "teacher": (230, 26, 51)}
DARK = (38, 38, 38)


class Drawing:
    """An SVG file that was read: its words and its images, in the order of the file."""

    def __init__(self, path):
        self.root = ElementTree.parse(path).getroot()
        self.words = [element.text for element in self.elements("text")]
        self.images = [self.pixels(element) for element in self.elements("image")]

    def elements(self, tag):
        return self.root.iter("{http://www.w3.org/2000/svg}" + tag)

    def pixels(self, element):
        png = element.get("href").removeprefix("data:image/png;base64,")
        return imagecodecs.png_decode(base64.b64decode(png)).astype(int)


def draw(out, command, *flags):
    show.main([command, "--out", str(out), *map(str, flags)])
    return Drawing(out)


def chosen(scenes, seed, n=4):
    """The scenes that are drawn with `seed`, and the labels (n,2,L) of their two views."""
    rows = np.random.default_rng(seed).permutation(len(scenes))[:n].tolist()
    _, y = scenes.__getitems__([(i, (seed, i)) for i in rows])
    return rows, y


def pixels(view):
    """float (3,64,64) in [0,1] -> its patches in [0,255], as patches_of."""
    return patches_of(255 * view.permute(1, 2, 0).numpy())


def patches_of(image):
    """(64,64,3) pixels -> (64 patches, pixels of a patch, 3)."""
    side = len(image) // 8
    return image.reshape(8, side, 8, side, 3).swapaxes(1, 2).reshape(64, side * side, 3)


@pytest.fixture(scope="module", params=["s1", "s2c"])
def scenes_drawn(request, toy, tmp_path_factory):
    """(drawing of seed 5, the data set)."""
    out = tmp_path_factory.mktemp("show") / "x.svg"
    drawing = draw(out, "scenes", toy, "--modality", request.param, "--seed", 5)
    sensor = data.find_sensor(request.param)
    return drawing, data.SSL4EO(toy, sensor, f"{toy}/ssl4eo_multilabel.json")


# ------------------------------------------------------------------------------------------- scenes


def test_the_class_names_are_those_of_the_labels_of_both_views(scenes_drawn):
    drawing, scenes = scenes_drawn
    rows, y = chosen(scenes, 5)
    for i in rows:
        assert sum(scenes.ids[i] in words for words in drawing.words) == 1
    carriers = {(1, 0): "1", (0, 1): "2", (1, 1): "1 2"}
    want = []
    for views in y:
        for name, views_of_class in zip(scenes.classes, views.T.tolist()):
            if any(views_of_class):
                want += [carriers[tuple(views_of_class)], name]
    got = [words for words in drawing.words if words in want]
    assert got == want and len(want) > 8


def test_the_matrix_has_the_label_similarity_of_each_pair_of_scenes(scenes_drawn):
    drawing, scenes = scenes_drawn
    _, y = chosen(scenes, 5)
    s = losses.label_similarity(*torch.from_numpy(y).unbind(1)).flatten().tolist()
    numbers = [words for words in drawing.words if words[1:2] == "."]
    assert numbers == [f"{value:.2f}" for value in s]
    assert len(numbers) == 16 and len(set(numbers)) > 3


def test_a_row_has_the_seasons_of_its_scene_in_colour(scenes_drawn):
    drawing, scenes = scenes_drawn
    look = scenes.sensor.look
    rows, _ = chosen(scenes, 5)
    assert len(drawing.images) == 4 * (4 + 2 + 2)
    for row, i in enumerate(rows):
        for s in range(4):
            want = scenes.image(i, s)[look].transpose(1, 2, 0)
            assert np.array_equal(drawing.images[8 * row + s], want)


def test_views_and_masks_are_those_that_training_draws(scenes_drawn):
    drawing, scenes = scenes_drawn
    look = scenes.sensor.look
    rows, _ = chosen(scenes, 5)
    x, _ = scenes.__getitems__([(i, (5, i)) for i in rows])
    x = torch.from_numpy(x)
    args = show.flags("softcon", scenes.sensor.name, "x")
    draws = pretrain.StepRandomness(5, 0, 0, 0, 1)
    views, kept = pretrain.softcon_views(x, args, draws)
    args = show.flags("pera", scenes.sensor.name, "x")
    student, teacher, *sets = pretrain.aligned_pairs(x[:, 0], args, draws, 1, 64, 0.4, 1)
    for row in range(4):
        images = drawing.images[8 * row + 4:8 * row + 8]
        view1, view2, softcon, pera = [patches_of(image) for image in images]
        assert abs(view1 - pixels(views[row, look])).max() <= 1
        assert abs(view2 - pixels(views[4 + row, look])).max() <= 1

        dark = (softcon == DARK).all((1, 2))
        assert np.flatnonzero(~dark).tolist() == kept[row].tolist()
        assert np.array_equal(softcon[~dark], view1[~dark])

        seen_in = {"student": student, "guess": student, "teacher": teacher}
        for (name, colour), patches in zip(TINTS.items(), sets):
            source = pixels(seen_in[name][row, look])
            tinted = (abs(2 * pera - source - colour) <= 2).all((1, 2))
            assert np.flatnonzero(tinted).tolist() == patches[row].tolist(), name


def test_the_words_say_what_the_columns_and_colours_mean(scenes_drawn):
    drawing, _ = scenes_drawn
    text = " ".join(drawing.words)
    for word in ("Seasons", "SoftCon's views", "Labels", "Label similarity", "dark: ", "blue: ",
                 "yellow: ", "red: "):
        assert word in text


def test_the_seed_decides_every_byte_and_another_seed_draws_other_scenes(toy, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        draw(tmp_path / name, "scenes", toy, "--modality", "s2c", "--seed", seed, "--n", 2)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_class_folders_and_large_images_are_drawn_too(tmp_path):
    for n, name in enumerate(("Forest", "River & Sea")):
        (tmp_path / "e" / name).mkdir(parents=True)
        pixels = np.full((264, 264, 3), 100 * n, np.uint8)
        imagecodecs.imwrite(tmp_path / "e" / name / f"{name}_1.png", pixels)
    flags = [tmp_path / "e", "--modality", "rgb"]
    labelled = draw(tmp_path / "x.svg", "scenes", *flags, "--labels", "classes")
    assert {"Forest", "River & Sea"} < set(labelled.words)
    assert [len(x) for x in labelled.images] == 2 * [96, 64, 64, 64, 64]    # one season a scene
    assert labelled.words.count("1.00") == labelled.words.count("0.00") == 2
    assert draw(tmp_path / "y.svg", "scenes", *flags).words.count("no labels") == 2


def test_packed_scenes_are_drawn_as_the_files_that_they_were_packed_from(toy, tmp_path):
    data.main(["pack", toy, str(tmp_path / "p"), "--modality", "s1", "--workers", "0"])
    draw(tmp_path / "a", "scenes", toy, "--modality", "s1")
    draw(tmp_path / "b", "scenes", tmp_path / "p", "--modality", "s1")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_scene_of_one_season_has_one_image_and_two_views(toy, tmp_path):
    shutil.copytree(f"{toy}/s1/0000003", tmp_path / "s1" / "0000003")
    for product in sorted((tmp_path / "s1" / "0000003").iterdir())[1:]:
        shutil.rmtree(product)
    drawing = draw(tmp_path / "x.svg", "scenes", tmp_path, "--modality", "s1")
    assert len(drawing.images) == 1 + 2 + 2


# ----------------------------------------------------------------------------------------- features


def save_network(path, arch, *more):
    torch.manual_seed(0)
    torch.save(model.export_backbone(model.build(arch, 2, *more)), path)
    return path


def test_each_image_stands_beside_the_main_directions_of_its_patches(toy, tmp_path):
    path = save_network(tmp_path / "tiny.pt", "vit_tiny", 24, 4)
    flags = ["--data", toy, "--modality", "s1", "--n", 3]
    drawing = draw(tmp_path / "x.svg", "features", path, *flags)
    assert [len(x) for x in drawing.images[1::2]] == [6] * 3              # patches along a side
    components = np.stack(drawing.images[1::2]).reshape(-1, 3) / 255
    assert len(np.unique(components, axis=0)) > 50
    correlation = np.corrcoef(components.T)
    assert abs(correlation[np.triu_indices(3, 1)]).max() < 0.2           # but for the clipping, 0
    text = " ".join(drawing.words)
    assert "tiny.pt" in text and "vit_tiny, 24 x 24 pixels, 6 x 6 patches" in text


def test_the_number_of_pixels_that_the_network_sees_can_be_chosen(toy, tmp_path):
    path = save_network(tmp_path / "tiny.pt", "vit_tiny", 24, 4)
    flags = ["--data", toy, "--modality", "s1", "--n", 1, "--img-size", 40]
    drawing = draw(tmp_path / "x.svg", "features", path, *flags)
    assert drawing.images[1].shape == (10, 10, 3)


# -------------------------------------------------------------------------------------------- curve


def write_log(path, terms, steps=30):
    rows = []
    for step in range(1, steps + 1):
        row = {"step": 10 * step, "loss": 1.0, "effective_rank": 5 + step}
        rows.append(row | {name: factor / step for name, factor in terms.items()})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("terms, titles", [
    ({"info_nce": 3, "soft": 20}, ["InfoNCE, eq. (2)", "soft term, eq. (3)"]),
    ({"dino": 6, "koleo": 4, "pixel": 700},
     ["DINO loss, eq. (7)", "KoLeo, eq. (8)", "pixel loss, eq. (9)"])])
def test_a_curve_has_a_panel_a_term_with_named_axes(terms, titles, tmp_path):
    drawing = draw(tmp_path / "x.svg", "curve", write_log(tmp_path / "log.jsonl", terms))
    titles = titles + ["effective rank of the features"]
    assert [words for words in drawing.words if words in titles] == titles
    assert drawing.words.count("step") == len(titles)
    assert drawing.words.count("300") == len(titles)                      # the last step's tick
    points = [line.get("points").split() for line in drawing.elements("polyline")]
    curves = [line for line in points if len(line) == 30]
    assert len(curves) == 2 * len(titles)                                 # each and its mean
    falling = [float(point.split(",")[1]) for point in curves[0]]
    rising = [float(point.split(",")[1]) for point in curves[-1]]
    assert falling == sorted(falling) and rising == sorted(rising, reverse=True)   # y points down


def test_a_constant_term_has_a_curve_too(tmp_path):
    log = write_log(tmp_path / "log.jsonl", {"info_nce": 3, "soft": 0})
    assert "soft term, eq. (3)" in draw(tmp_path / "x.svg", "curve", log).words


# ------------------------------------------------------------------------------------- bad requests


@pytest.mark.parametrize("words, message", [
    (["scenes", "TOY", "--modality", "s2a"], "/s2a: no such folder"),
    (["scenes", "TOY", "--modality", "s9"], "s9"),
    (["scenes", "TOY", "--modality", "s2c", "--labels", "classes"], "--labels classes: "),
    (["scenes", "TOY", "--modality", "s2c", "--n", "0"], "--n 0: must lie in 1 to 26"),
    (["scenes", "TOY", "--modality", "s2c", "--out", "/nowhere/x.svg"], "/nowhere/x.svg"),
    (["features", "RESNET", "--data", "TOY", "--modality", "s1"], "a ResNet has no patch tokens"),
    (["features", "/nowhere.pt", "--data", "TOY", "--modality", "s1"], "/nowhere.pt"),
    (["curve", "/nowhere.jsonl"], "/nowhere.jsonl"),
    (["curve", "TOY/toy.json"], "toy.json: not the log of a run"),
    (["curve", "TOY/ssl4eo_multilabel.json"], "ssl4eo_multilabel.json: not the log of a run"),
])
def test_bad_requests_are_named_in_one_line(toy, tmp_path, words, message):
    resnet = save_network(tmp_path / "resnet.pt", "resnet18")
    words = [word.replace("TOY", toy).replace("RESNET", str(resnet)) for word in words]
    with pytest.raises((ValueError, OSError), match=message) as error:
        draw(tmp_path / "x.svg", *words)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x.svg").exists()


def test_the_command_line_ends_in_one_line_and_a_non_zero_exit(tmp_path, start):
    done = start(script, "tests/lab/show.py", "curve", "no.jsonl", "--out", "x.svg",
                 folder=tmp_path).end()
    assert done.code
    assert done.err.startswith("show.py: error: no.jsonl")
    assert done.err.count("\n") == 1


# ---------------------------------------------------------------------------- the committed figures


@pytest.mark.parametrize("method", diagrams.METHODS)
def test_the_committed_diagrams_are_what_the_script_draws(method, tmp_path):
    diagrams.main([method, "--out", str(tmp_path / "x.svg")])
    drawn = (tmp_path / "x.svg").read_text(encoding="utf-8")
    assert drawn == (FIGURES / f"{method}.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["scenes_s2c", "features", "curve"])
def test_the_committed_figures_parse_and_are_small(name):
    path = FIGURES / f"{name}.svg"
    assert path.stat().st_size < 400_000
    assert len(Drawing(path).words) > 2
