"""Claims about `data.py show`: what stands where, and that it is what is trained on."""
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

import data
import losses
from conftest import ROOT

imagecodecs = pytest.importorskip("imagecodecs")
STUDENT, GUESS, TEACHER = (26, 102, 255), (255, 230, 26), (230, 26, 51)


def draw(root, out, modality, *flags):
    assert not data.main(["show", str(root), "--modality", modality, "--out", str(out),
                          *map(str, flags)])
    return imagecodecs.imread(out)


def tiles(picture, n, seasons, T):
    """{group: (n, columns, T, T, 3)}; the picture holds nothing else than these and light blue."""
    columns, x, out = {"seasons": seasons, "views": 2, "masks": 2, "labels": 1, "alike": n}, 0, {}
    left = np.ones(picture.shape[:2], bool)
    for name, m in columns.items():
        at = [[(slice(i * (T + 4) + 2, (i + 1) * (T + 4) - 2),
                slice(x + j * (T + 4) + 6, x + (j + 1) * (T + 4) + 2)) for j in range(m)]
              for i in range(n)]
        out[name] = np.stack([[picture[a] for a in row] for row in at]).astype(int)
        for a in (a for row in at for a in row):
            left[a] = False
        x += m * (T + 4) + 8
    assert picture.shape == (n * (T + 4), x, 3) and picture.dtype == np.uint8
    assert (picture[left] == (178, 217, 255)).all()
    return out


@pytest.fixture(scope="module")
def shown(toy, tmp_path_factory):
    """Picture of seed 5 by modality, and the scenes that are its rows."""
    scenes = {m: data.SSL4EO(toy, m, f"{toy}/ssl4eo_multilabel.json") for m in ("s1", "s2c")}
    rows = np.random.default_rng(5).permutation(60)[:4]
    return {m: (tiles(draw(toy, tmp_path_factory.mktemp("show") / "x.png", m, "--seed", 5), 4, 4,
                      96), scenes[m], rows) for m in scenes}


@pytest.mark.parametrize("modality, bands", [("s1", [0, 1, 0]), ("s2c", [3, 2, 1])])
def test_rows_are_scenes_and_columns_their_seasons_in_colour(shown, modality, bands):
    picture, scenes, rows = shown[modality]
    for row, i in zip(picture["seasons"], rows):
        for s, x in enumerate(row):
            want = scenes.image(i, s)[bands].transpose(1, 2, 0)
            assert np.array_equal(x, want.repeat(4, 0).repeat(4, 1))


@pytest.mark.parametrize("modality", ["s1", "s2c"])
def test_labels_and_their_similarity_are_those_of_the_two_views(shown, modality):
    picture, scenes, rows = shown[modality]
    _, y = scenes[[(int(i), (5, int(i))) for i in rows]]
    assert y.any() and y.shape == (4, 2, 9)
    for (bars,), mine in zip(picture["labels"], y):
        for k in range(9):                                              # a class a line, 10.7 px
            assert np.array_equal(bars[(32 * k + 16) // 3, [24, 72], 0], 255 * mine[:, k])
    s = np.array([[len({*np.flatnonzero(a)} & {*np.flatnonzero(b)}) for b in y[:, 1]]
                  for a in y[:, 0]]) / np.sqrt(np.outer(y[:, 0].sum(1), y[:, 1].sum(1)).clip(1))
    grey = picture["alike"]
    assert (grey == grey[:, :, :1, :1, :1]).all()                       # one value a cell
    assert np.abs(grey[:, :, 0, 0, 0] - 255 * s).max() <= 0.5 + 1e-4


@pytest.mark.parametrize("modality", ["s1", "s2c"])
def test_as_many_patches_have_a_tint_as_the_masks_have_tokens(shown, modality):
    picture, _, _ = shown[modality]
    parts = [len(p[0]) for p in losses.disjoint_masks(1, 64)]
    kept = losses.block_mask(1, (8, 8), 0.3).shape[1]
    for (view, _), (softcon, pera) in zip(picture["views"], picture["masks"]):
        cells = [x.reshape(8, 12, 8, 12, 3).swapaxes(1, 2).reshape(64, 144, 3)
                 for x in (view, softcon, pera)]
        dark = (cells[1] == 38).all((1, 2))
        assert (~dark).sum() == kept and np.array_equal(cells[1][~dark], cells[0][~dark])
        tint = 2 * cells[2] - cells[0]
        counts = [(np.abs(tint - t) <= 2).all((1, 2)).sum() for t in (STUDENT, GUESS, TEACHER)]
        assert counts == parts and sum(parts) == 64


def test_the_seed_decides_everything_and_other_seeds_give_other_views(toy, tmp_path):
    png = [tmp_path / f"{k}.png" for k in range(3)]
    a, b, c = (draw(toy, out, "s2c", "--seed", k) for out, k in zip(png, (0, 0, 1)))
    assert png[0].read_bytes() == png[1].read_bytes() and not np.array_equal(a, c)
    tifffile.imwrite(tmp_path / "one.tif", np.random.default_rng(0).integers(
        0, 256, (32, 32, 3), np.uint8), photometric="rgb")
    Path(tmp_path, "rgb").mkdir()
    shutil.move(tmp_path / "one.tif", tmp_path / "rgb")
    a, b = (tiles(draw(tmp_path / "rgb", png[0], "rgb", "--seed", k), 1, 1, 96) for k in (0, 1))
    assert np.array_equal(a["seasons"], b["seasons"])                   # one scene, one season
    assert not np.array_equal(a["views"], b["views"])
    assert not np.array_equal(a["masks"], b["masks"])


def test_class_folders_packed_data_and_scenes_of_few_seasons_are_drawn_too(toy, labels, tmp_path):
    for n, kind in enumerate(("Forest", "River", "SeaLake")):
        (tmp_path / "e" / kind).mkdir(parents=True)
        tifffile.imwrite(tmp_path / "e" / kind / f"{kind}_1.tif", np.full(
            (64, 64, 13), 1000 * n, np.uint16), planarconfig="contig")
    out = tmp_path / "x.png"
    unlike = tiles(draw(tmp_path / "e", out, "s2c", "--labels", "classes"), 3, 1, 64)["alike"]
    assert np.array_equal(unlike[:, :, 0, 0, 0], 255 * np.eye(3))
    assert not tiles(draw(tmp_path / "e", out, "s2c"), 3, 1, 64)["labels"].any()   # as in training
    assert not data.main(["pack", toy, str(tmp_path / "p"), "--modality", "s1", "--workers", "0"])
    assert np.array_equal(draw(toy, out, "s1"), draw(tmp_path / "p", tmp_path / "y.png", "s1"))
    for i in range(5):
        shutil.copytree(f"{toy}/s1/{i:07d}", tmp_path / "t" / "s1" / f"{i:07d}")
    for product in sorted((tmp_path / "t" / "s1" / "0000003").iterdir())[1:]:
        shutil.rmtree(product)
    picture = draw(tmp_path / "t", out, "s1", "--seed", 3)
    row = list(np.random.default_rng(3).permutation(5)).index(3)
    assert (picture[row * 100:(row + 1) * 100, 106:402] == (178, 217, 255)).all()


def test_images_of_any_size_become_tiles_of_at_most_96_pixels(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.full((264, 264, 3), 77, np.uint8), photometric="rgb")
    picture = tiles(draw(tmp_path, tmp_path / "x.png", "rgb"), 1, 1, 96)
    assert (picture["seasons"] == 77).all()


@pytest.mark.parametrize("flags, message", [
    (["--modality", "s2a"], "/s2a: no such folder"),
    (["--modality", "s2c", "--labels", "classes"], "--labels classes: .* holds products"),
    (["--modality", "s2c", "--seed", "-1"], "non-negative"),
    (["--modality", "s2c", "--out", "/nowhere/x.png"], "/nowhere/x.png"),
])
def test_bad_requests_end_in_one_line(toy, tmp_path, flags, message):
    command = ["show", toy, "--out", str(tmp_path / "x.png"), *flags]
    with pytest.raises((ValueError, OSError), match=message) as error:
        data.main(command)
    assert "\n" not in str(error.value) and not (tmp_path / "x.png").exists()


def test_a_bad_file_and_a_missing_out_are_named_on_the_command_line(toy, tmp_path):
    shutil.copytree(f"{toy}/s1/0000000", tmp_path / "s1" / "0000000")
    product = sorted((tmp_path / "s1" / "0000000").iterdir())[2]
    (product / "VV.tif").write_text("hello")
    for flags, message in ((["--out", "x.png"], f"{product}/VV.tif: unreadable TIFF"),
                           ([], "--out")):
        run = subprocess.run([sys.executable, str(ROOT / "data.py"), "show", str(tmp_path),
                              "--modality", "s1", *flags], capture_output=True, text=True,
                             cwd=tmp_path)
        assert run.returncode and message in run.stderr.splitlines()[-1]
        assert "Traceback" not in run.stderr and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("name", ["show_s1", "show_s2c"])
def test_the_committed_figures_are_small_and_of_this_layout(name):
    path = ROOT / "tests" / "figures" / f"{name}.png"
    assert path.stat().st_size < 150_000
    picture = tiles(imagecodecs.imread(path), 4, 4, 72)
    assert picture["labels"].max() == 255 and picture["alike"].any()
