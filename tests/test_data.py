"""Claims about data.py: what is read, scaled, joined, refused; what the augmentation does."""
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

import data


def first(toy, modality):
    return sorted(Path(toy, modality, "0000000").iterdir())[0]


# ----------------------------------------------------------------------------------- the toy world


def test_the_toy_world_is_an_ssl4eo_v1_tree(toy, labels):
    table = json.loads(Path(labels).read_text())
    for modality, bands, kind in (("s1", 2, np.float32), ("s2c", 13, np.uint16)):
        scenes = sorted(p.name for p in Path(toy, modality).iterdir())
        assert scenes == [f"{i:07d}" for i in range(60)]
        for product in Path(toy, modality, "0000007").iterdir():
            files = sorted(p.name for p in product.iterdir())
            assert files == sorted(f"{b}.tif" for b in data.BANDS[modality])
            sizes = [tifffile.imread(product / f"{b}.tif") for b in data.BANDS[modality]]
            assert {x.dtype for x in sizes} == {np.dtype(kind)} and len(sizes) == bands
            assert [24 // len(x) for x in sizes] == [
                data.SHRINK[modality][b] for b in data.BANDS[modality]]
    names = [p.name for p in Path(toy, "s2c", "0000007").iterdir()]
    assert len(names) == 4 and set(names) == set(table["0000007"])
    assert all(re.fullmatch(r"\d{8}T\d{6}_\d{8}T\d{6}_T\w{5}", n) for n in names)
    lists = [c for mine in table.values() for c in mine.values()]
    assert any(c == [] for c in lists) and {c for x in lists for c in x} == set("012345678")
    with tifffile.TiffFile(first(toy, "s2c") / "B1.tif") as file:
        assert {33550, 33922, 34735} <= set(file.pages[0].tags.keys())           # georeferenced


def test_the_toy_world_depends_on_its_seed_only(tmp_path):
    a, b, c = (data.make_toy(str(tmp_path / n), k, 12, s, 1) for n, k, s in
               (("a", 3, 0), ("b", 5, 0), ("c", 3, 1)))
    x, y, z = (data.SSL4EO(r, "s2c", f"{r}/ssl4eo_multilabel.json") for r in (a, b, c))
    assert all(np.array_equal(x.image(i, s), y.image(i, s)) for i in range(3) for s in range(4))
    assert not np.array_equal(x.image(0, 0), z.image(0, 0))
    assert data.make_toy(a, 3, 12, 0) == a                                      # left alone
    with pytest.raises(ValueError, match="exists and is not the toy world"):
        data.make_toy(a, 4, 12, 0)
    with pytest.raises(ValueError, match="multiple of 6"):
        data.make_toy(str(tmp_path / "d"), 3, 13)
    assert not (tmp_path / "d").exists()


# ---------------------------------------------------------------------------- reading and scaling


def test_values_beyond_the_range_saturate_and_never_wrap():
    for modality in ("s1", "s2c", "s2a"):
        mean, std = (np.array(v, np.float32)[:, None, None] for v in data.STATS[modality])
        for z in np.linspace(-50, 50, 101):
            got = data.to_uint8(mean + z * std, modality).astype(int)
            want = np.clip((z / 4 + 0.5) * 255, 0, 255)
            assert got.dtype == int and np.abs(got - want).max() <= 0.51, (modality, z)
    white = data.to_uint8(np.full((13, 1, 1), 65535, np.uint16), "s2c")
    black = data.to_uint8(np.zeros((13, 1, 1), np.uint16), "s2c")
    assert (white == 255).all() and (black <= 127).all()


@pytest.mark.parametrize("modality", ["s1", "s2c"])
def test_the_reader_stacks_bands_in_order_on_one_grid(toy, modality):
    scenes = data.SSL4EO(toy, modality)
    folder, mean, std = first(toy, modality), *data.STATS[modality]
    x = scenes.image(0, 0)
    assert x.shape == (len(data.BANDS[modality]), 24, 24) and x.dtype == np.uint8
    for c, band in enumerate(data.BANDS[modality]):
        native = tifffile.imread(folder / f"{band}.tif").astype(float)
        k = data.SHRINK[modality][band]
        if k == 1:
            want = np.clip(((native - mean[c]) / (4 * std[c]) + 0.5) * 255, 0, 255)
            assert np.abs(x[c] - want).max() <= 0.51
        else:                                     # pixel centres: interior means survive upsampling
            v = data.resize(native, 24)
            lo, hi = native.min(), native.max()
            assert v.min() >= lo - 1e-3 and v.max() <= hi + 1e-3
            assert abs(v.mean() - native.mean()) < 0.05 * (hi - lo)


def test_resize_is_bilinear_with_aligned_pixel_centres():
    got = data.resize(np.array([[0.0, 4.0]] * 2), 4)[0]
    assert np.allclose(got, [[0, 1, 3, 4]] * 4)


def test_labels_join_by_product_name_and_s1_by_rank_in_time(toy, labels):
    table = json.loads(Path(labels).read_text())
    s2, s1 = data.SSL4EO(toy, "s2c", labels), data.SSL4EO(toy, "s1", labels)
    for i, name in enumerate(s2.ids):
        order = sorted(table[name])
        for s, product in enumerate(order):
            assert s2.files[i][s].endswith(product)
            want = np.isin(np.arange(9), [int(c) for c in table[name][product]])
            assert np.array_equal(s2.labels[i][s], want) and np.array_equal(s1.labels[i][s], want)


def test_s1_without_the_s2_tree_joins_by_the_json_alone(toy, labels, tmp_path):
    shutil.copytree(f"{toy}/s1", tmp_path / "s1")
    a, b = data.SSL4EO(toy, "s1", labels), data.SSL4EO(tmp_path, "s1", labels)
    assert all(np.array_equal(x, y) for x, y in zip(a.labels, b.labels))


def test_a_scene_the_json_leaves_out_is_unlabelled(toy, labels, tmp_path):
    table = json.loads(Path(labels).read_text())
    del table["0000003"]
    Path(tmp_path, "l.json").write_text(json.dumps(table))
    scenes = data.SSL4EO(toy, "s1", tmp_path / "l.json")
    assert not scenes.labels[3].any() and any(y.any() for y in scenes.labels)


def test_items_are_two_different_seasons_chosen_by_the_seed(toy, labels):
    scenes = data.SSL4EO(toy, "s1", labels)
    seen = set()
    for seed in range(20):
        x, y = scenes[5, seed]
        assert x.shape == (2, 2, 24, 24) and y.shape == (2, 9)
        which = tuple(s for v in x for s in range(4) if np.array_equal(v, scenes.image(5, s)))
        assert len(set(which)) == 2 and np.array_equal(y, scenes.labels[5][list(which)])
        assert np.array_equal(scenes[5, seed][0], x)
        seen.add(which)
    assert len(seen) > 6


def test_preloading_changes_nothing(toy):
    a, b = data.SSL4EO(toy, "s2c"), data.SSL4EO(toy, "s2c")
    b.preload([2, 5], workers=0)
    assert all(np.array_equal(a[i, 7][0], b[i, 7][0]) for i in (2, 5))
    assert all(np.array_equal(a.image(i, s), b.image(i, s)) for i in (5, 2) for s in range(4))
    assert b.memory.shape == (8, 13, 24, 24)
    with pytest.raises(IndexError):
        b.image(3, 0)                                          # was not read: not zeros, an error


def test_held_out_scenes_depend_on_their_name_alone():
    ids = [f"{i:07d}" for i in range(5000)]
    out = data.held_out(ids, 0.2)
    assert 0.18 < out.mean() < 0.22 and np.array_equal(data.held_out(ids[::-1], 0.2)[::-1], out)
    assert (data.held_out(ids, 0.3) | ~out).all() and not data.held_out(ids, 0).any()


def eurosat(root, bands=13):
    for c, kind in enumerate(("Forest", "River")):
        Path(root, kind).mkdir(parents=True)
        for n in range(1, 4):
            x = np.broadcast_to(np.arange(bands) * 100 + c, (64, 64, bands)).astype(np.uint16)
            tifffile.imwrite(Path(root, kind, f"{kind}_{n}.tif"), x, planarconfig="contig")
    return str(root)


def test_eurosats_last_band_b8a_moves_to_its_place(tmp_path):
    scenes = data.open_data(eurosat(tmp_path / "e"), "s2c", "classes")
    assert scenes.classes == ("Forest", "River") and len(scenes) == 6 and scenes.size == 64
    order = [0, 1, 2, 3, 4, 5, 6, 7, 12, 8, 9, 10, 11]
    want = data.to_uint8(np.array(order, np.float32).reshape(13, 1, 1) * 100, "s2c")
    assert np.array_equal(scenes.image(0, 0)[:, :1, :1], want)
    assert [int(y[0].argmax()) for y in scenes.labels] == [0, 0, 0, 1, 1, 1]


def test_class_folders_and_products_do_not_take_each_others_labels_or_sizes(toy, labels, tmp_path):
    root = eurosat(tmp_path / "e")
    with pytest.raises(ValueError, match="--labels .*json: .* holds classes"):
        data.open_data(root, "s2c", labels)
    with pytest.raises(ValueError, match="--labels classes: .* holds products"):
        data.open_data(toy, "s1", "classes")
    tifffile.imwrite(f"{root}/River/River_3.tif", np.zeros((60, 60, 13), np.uint16),
                     planarconfig="contig")
    with pytest.raises(ValueError, match="River_3.tif: .60, 60. pixels, the others have 64 x 64"):
        data.open_data(root, "s2c").image(5, 0)


# ------------------------------------------------------------------------------------ bad input


def damage(toy, tmp_path, modality):
    for m in ("s1", "s2c"):
        for i in ("0000000", "0000001"):
            shutil.copytree(f"{toy}/{m}/{i}", tmp_path / m / i)
    return sorted((tmp_path / modality / "0000000").iterdir())[0]


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


def write(value):
    return lambda path: tifffile.imwrite(path, value, photometric="minisblack", planarconfig=
                                         "contig" if value.ndim == 3 else None)


@pytest.mark.parametrize("modality, band, harm, message", [
    ("s2c", "B8A", Path.unlink, "B8A.tif: missing"),
    ("s1", "VV", Path.unlink, "VV.tif: missing"),
    ("s2c", "B4", cut, "B4.tif: unreadable TIFF"),
    ("s2c", "B4", lambda p: p.write_bytes(b""), "B4.tif: unreadable TIFF"),
    ("s2c", "B4", lambda p: p.write_text("hello"), "B4.tif: unreadable TIFF"),
    ("s2c", "B4", write(np.ones((24, 24), np.float32)), "B4.tif: float32 pixels, s2c has uint16"),
    ("s1", "VH", write(np.ones((24, 24), np.uint16)), "VH.tif: uint16 pixels, s1 has float32"),
    ("s2c", "B5", write(np.ones((24, 24), np.uint16)), "B5.tif: .24, 24. pixels, expected 12 x 12"),
    ("s2c", "B5", write(np.ones((12, 12, 2), np.uint16)), "B5.tif: .12, 12, 2. pixels"),
    ("s1", "VH", write(np.full((24, 24), np.nan, np.float32)), "VH.tif: NaN or infinite"),
])
def test_a_bad_file_is_named_in_one_line(toy, tmp_path, modality, band, harm, message):
    product = damage(toy, tmp_path, modality)
    harm(product / f"{band}.tif")
    with pytest.raises(ValueError, match=message) as error:
        data.SSL4EO(str(tmp_path), modality).image(0, 0)
    assert "\n" not in str(error.value) and str(product) in str(error.value)


@pytest.mark.parametrize("harm, message", [
    (lambda r: shutil.rmtree(r / "s1"), "/s1: no such folder"),
    (lambda r: shutil.rmtree(r), "no such folder"),
    (lambda r: shutil.rmtree(r / "s1" / "0000001"), "s1/0000001: missing, while .*s2c/0000001"),
    (lambda r: [shutil.rmtree(p) for p in (r / "s1" / "0000001").iterdir()],
     "s1/0000001: scene without a s1 product"),
    (lambda r: (r / "s1" / "0000001" / "notes").mkdir(), "'notes' has no date"),
])
def test_a_bad_tree_is_named_in_one_line(toy, tmp_path, harm, message):
    damage(toy, tmp_path / "t", "s1")
    harm(tmp_path / "t")
    with pytest.raises(ValueError, match=message):
        data.open_data(str(tmp_path / "t"), "s1")


@pytest.mark.parametrize("change, message", [
    (lambda t: t["0000002"].update({sorted(t["0000002"])[0]: ["9"]}),
     "unknown class '9' in scene 0000002"),
    (lambda t: t["0000002"].update({sorted(t["0000002"])[0]: ["trees"]}), "unknown class 'trees'"),
    (lambda t: t["0000002"].update({"20200101T000000_X_T1": ["1"]}),
     "0000002 has no product 20200101T0000"),
    (lambda t: t.update({"0000002": 5}), "not labels of the form"),
])
def test_labels_that_do_not_fit_are_named(toy, labels, tmp_path, change, message):
    table = json.loads(Path(labels).read_text())
    change(table)
    Path(tmp_path, "l.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match=message):
        data.SSL4EO(toy, "s2c", str(tmp_path / "l.json"))


def test_a_labels_file_that_is_missing_or_no_json_is_named(toy, tmp_path):
    with pytest.raises(ValueError, match="l.json: no such file"):
        data.SSL4EO(toy, "s2c", str(tmp_path / "l.json"))
    Path(tmp_path, "l.json").write_text("<html>")
    with pytest.raises(ValueError, match="l.json: not labels"):
        data.SSL4EO(toy, "s2c", str(tmp_path / "l.json"))


# --------------------------------------------------------------------------------- augmentation


def identity(n):
    p = {k: torch.zeros(n) for k in ("x", "y", "offset", "hue", "blur")}
    return p | {k: torch.ones(n) for k in ("h", "w", "flip_x", "flip_y", "brightness", "contrast",
                                           "saturation")}


def view(x, p, size):
    return data.colour(data.crop(x, p, size), p)


def pixels(n=3, c=5, size=12):
    return torch.randint(256, (n, c, size, size), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(0))


def test_neutral_parameters_give_the_image_over_255():
    x = pixels()
    assert torch.allclose(view(x, identity(3), 12), x / 255, atol=1e-6)


@pytest.mark.parametrize("key, value, expect", [
    ("flip_x", -1, lambda x: x.flip(-1)), ("flip_y", -1, lambda x: x.flip(-2)),
    ("brightness", 1.3, lambda x: (x * 1.3).clamp(0, 1)),
    ("contrast", 0.6,
     lambda x: (x - x.mean((2, 3), keepdim=True)) * 0.6 + x.mean((2, 3), keepdim=True)),
    ("saturation", 0, lambda x: x.mean(1, keepdim=True).expand_as(x)),
])
def test_each_parameter_does_its_one_thing_to_its_one_image(key, value, expect):
    x, p = pixels(), identity(3)
    p[key][1] = value
    got, plain = view(x, p, 12), x / 255
    assert torch.allclose(got[1], expect(plain)[1], atol=1e-5)
    assert torch.allclose(got[[0, 2]], plain[[0, 2]], atol=1e-6)


def test_radar_shifts_by_decibels_and_saturates():
    """-12.59 dB, VV's mean, sits at 0.5; 2 std up or down is the end of the range."""
    x = torch.tensor([127, 127], dtype=torch.uint8).view(1, 2, 1, 1).expand(1, 2, 12, 12)
    for offset in (1.5, -30.0):
        width = 4 * torch.tensor([5.26, 5.91])                                  # of the range, in dB
        got = view(x, identity(1) | {"offset": (offset / width)[None]}, 12)
        want = ((127 / 255 * width + offset) / width).clamp(0, 1)
        assert torch.allclose(got, want.view(1, 2, 1, 1).expand_as(got), atol=1e-6)


def test_hue_turns_a_third_of_the_circle_from_red_to_green_and_leaves_grey_alone():
    x = torch.zeros(2, 3, 12, 12, dtype=torch.uint8)
    x[0, 0], x[1] = 200, 90
    got = view(x, identity(2) | {"hue": torch.full((2,), 1 / 3)}, 12)
    assert torch.allclose(got[1], x[1] / 255, atol=1e-5)
    assert torch.allclose(got[0], x[0, [1, 0, 2]] / 255, atol=1e-5)


def test_a_quarter_crop_is_that_quarter():
    x, p = pixels(1), identity(1)
    p |= {"h": torch.tensor([0.5]), "w": torch.tensor([0.5]), "x": torch.tensor([0.5]),
          "y": torch.tensor([-0.5])}
    assert torch.allclose(view(x, p, 6), x[..., :6, 6:] / 255, atol=1e-5)


def test_blur_is_a_gaussian_that_keeps_a_constant_image_and_lowers_contrast():
    p = identity(1) | {"blur": torch.tensor([224.0])}                    # std 1 px at 12 px... x 12
    flat = view(torch.full((1, 2, 12, 12), 100, dtype=torch.uint8), p, 12)
    assert torch.allclose(flat, torch.tensor(100 / 255), atol=1e-5)
    p = identity(1) | {"blur": torch.tensor([224 / 32])}                    # std 1 px at 32 px
    dot = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    dot[0, 0, 16, 16] = 255
    row = view(dot, p, 32)[0, 0, 16, 13:20]
    want = torch.exp(-torch.arange(-3, 4.0) ** 2 / 2)
    assert torch.allclose(row / row.max(), want, atol=1e-4)


def test_drawn_parameters_replay_and_lie_in_their_ranges():
    def draw(modality, seed):
        g = torch.Generator().manual_seed(seed)
        return data.draw_crops(4000, g) | data.draw_colours(4000, modality, g)
    a, b, radar, rgb = (draw(m, s) for m, s in (("s2c", 0), ("s2c", 0), ("s1", 0), ("rgb", 0)))
    assert all(torch.equal(a[k], b[k]) for k in a)
    area = a["h"] * a["w"]
    assert area.min() > 0.15 and area.max() <= 1 and 0.55 < area.mean() < 0.62
    assert (a["x"].abs() + a["w"] <= 1 + 1e-6).all() and (a["y"].abs() + a["h"] <= 1 + 1e-6).all()
    assert 0.77 < (a["brightness"] != 1).float().mean() < 0.83
    assert a["contrast"].min() >= 0.6 and a["contrast"].max() <= 1.4
    assert set(a["saturation"].tolist()) == {0, 1} and (a["hue"] == 0).all()
    assert 0.17 < (a["saturation"] == 0).float().mean() < 0.23
    assert 0.46 < (a["blur"] > 0).float().mean() < 0.54 and (a["offset"] == 0).all()
    assert (radar["brightness"] == 1).all() and (radar["contrast"] == 1).all()
    decibel = radar["offset"] * 4 * torch.tensor([5.26, 5.91])
    assert 1.9 < decibel.max() <= 2 + 1e-6 and -2 - 1e-6 <= decibel.min() < -1.9
    vv, vh = radar["offset"].T                                  # jittered together, not alike
    assert torch.equal(vv == 0, vh == 0) and abs(torch.corrcoef(radar["offset"].T)[0, 1]) < 0.1
    assert 0.09 < rgb["hue"].max() <= 0.1 and 1.19 < rgb["saturation"].max() <= 1.2


def test_eurosat_rgb_is_read_as_it_is(tmp_path):
    imagecodecs = pytest.importorskip("imagecodecs")
    (tmp_path / "River").mkdir()
    imagecodecs.imwrite(tmp_path / "River" / "River_1.jpg", np.full((64, 64, 3), 90, np.uint8))
    (tmp_path / "River" / "River_2.jpg").write_bytes(b"no image")
    scenes = data.EuroSAT(str(tmp_path), "rgb")
    assert scenes.image(0, 0).shape == (3, 64, 64) and abs(int(scenes.image(0, 0).mean()) - 90) < 3
    with pytest.raises(ValueError, match="River_2.jpg: unreadable image"):
        scenes.image(1, 0)
