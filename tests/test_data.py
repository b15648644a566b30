"""Claims about data.py: what is read, scaled, joined, refused; what the augmentation does."""
import json
import re
import shutil
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch

import data
from data import SENSORS

S1, S2C, RGB = SENSORS["s1"], SENSORS["s2c"], SENSORS["rgb"]


def first(toy, name):
    """The first product of the first scene."""
    return sorted(Path(toy, name, "0000000").iterdir())[0]


# ----------------------------------------------------------------------------------- the sensors


def test_each_sensor_has_a_number_for_each_band():
    for name, sensor in SENSORS.items():
        assert data.find_sensor(name) is sensor and sensor.name == name
        bands = len(sensor.bands)
        assert len(sensor.ratios) == bands and min(sensor.ratios) == 1
        assert len(sensor.look) == 3 and set(sensor.look) <= set(range(bands))
        assert sensor.kind in ("optical", "radar", "rgb")
        statistics = 0 if sensor.kind == "rgb" else bands
        assert len(sensor.mean) == len(sensor.std) == statistics


def test_an_unknown_sensor_is_named():
    with pytest.raises(ValueError, match="^--modality s3: unknown, take one of s1, s2c, s2a"):
        data.find_sensor("s3")


# ----------------------------------------------------------------------------------- the toy world


@pytest.mark.parametrize("sensor, bands, dtype", [(S1, 2, np.float32), (S2C, 13, np.uint16)])
def test_the_toy_world_is_an_ssl4eo_v1_tree(toy, sensor, bands, dtype):
    scenes = sorted(path.name for path in Path(toy, sensor.name).iterdir())
    assert scenes == [f"{i:07d}" for i in range(60)]
    for product in Path(toy, sensor.name, "0000007").iterdir():
        files = sorted(path.name for path in product.iterdir())
        assert files == sorted(f"{band}.tif" for band in sensor.bands) and len(files) == bands
        for band, ratio in zip(sensor.bands, sensor.ratios):
            x = tifffile.imread(product / f"{band}.tif")
            assert x.dtype == dtype and x.shape == (24 // ratio, 24 // ratio)


def test_the_toy_worlds_labels_name_its_products_and_all_classes(toy, labels):
    table = json.loads(Path(labels).read_text())
    names = [path.name for path in Path(toy, "s2c", "0000007").iterdir()]
    assert len(names) == 4 and set(names) == set(table["0000007"])
    assert all(re.fullmatch(r"\d{8}T\d{6}_\d{8}T\d{6}_T\w{5}", name) for name in names)
    lists = []
    for products in table.values():
        lists += products.values()
    assert [] in lists                                             # some images are unlabelled
    assert set().union(*lists) == set("012345678")


def test_the_toy_worlds_files_are_georeferenced(toy):
    with tifffile.TiffFile(first(toy, "s2c") / "B1.tif") as file:
        assert {33550, 33922, 34735} <= set(file.pages[0].tags.keys())


def test_the_toy_world_depends_on_its_seed_only(tmp_path):
    def world(name, scenes, seed):
        root = data.make_toy(str(tmp_path / name), scenes, 12, seed, 1)
        return data.SSL4EO(root, S2C, f"{root}/ssl4eo_multilabel.json")
    small, large, other = world("a", 3, 0), world("b", 5, 0), world("c", 3, 1)
    for i, s in small.images_of(range(3)):
        assert np.array_equal(small.image(i, s), large.image(i, s))
    assert not np.array_equal(small.image(0, 0), other.image(0, 0))


def test_a_toy_world_that_is_there_is_left_alone_and_no_other_folder_is_touched(tmp_path):
    root = data.make_toy(str(tmp_path / "a"), 3, 12, 0, 1)
    before = (tmp_path / "a" / "toy.json").stat().st_mtime_ns
    assert data.make_toy(root, 3, 12, 0) == root
    assert (tmp_path / "a" / "toy.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="exists and is not the toy world"):
        data.make_toy(root, 4, 12, 0)
    with pytest.raises(ValueError, match="multiple of 6"):
        data.make_toy(str(tmp_path / "d"), 3, 13)
    assert not (tmp_path / "d").exists()


# ---------------------------------------------------------------------------- reading and scaling


@pytest.mark.parametrize("name", ["s1", "s2c", "s2a"])
def test_values_beyond_the_range_saturate_and_never_wrap(name):
    sensor = SENSORS[name]
    mean = np.float32(sensor.mean)[:, None, None]
    std = np.float32(sensor.std)[:, None, None]
    for z in np.linspace(-50, 50, 101):
        got = data.to_uint8(mean + z * std, sensor)
        want = np.clip((z / 4 + 0.5) * 255, 0, 255)
        assert got.dtype == np.uint8 and np.abs(got.astype(int) - want).max() <= 0.51, z


def test_the_ends_of_uint16_are_the_ends_of_the_range():
    white = data.to_uint8(np.full((13, 1, 1), 65535, np.uint16), S2C)
    black = data.to_uint8(np.zeros((13, 1, 1), np.uint16), S2C)
    assert (white == 255).all() and (black <= 127).all()


@pytest.mark.parametrize("sensor", [S1, S2C], ids=["s1", "s2c"])
def test_the_reader_stacks_bands_in_order_on_one_grid(toy, sensor):
    x = data.SSL4EO(toy, sensor).image(0, 0)
    assert x.shape == (len(sensor.bands), 24, 24) and x.dtype == np.uint8
    for c, band in enumerate(sensor.bands):
        native = tifffile.imread(first(toy, sensor.name) / f"{band}.tif").astype(float)
        mean, std = sensor.mean[c], sensor.std[c]
        if sensor.ratios[c] == 1:
            want = np.clip(((native - mean) / (4 * std) + 0.5) * 255, 0, 255)
            assert np.abs(x[c] - want).max() <= 0.51
        else:                                     # pixel centres: interior means survive upsampling
            fine = data.resize(native, 24)
            low, high = native.min(), native.max()
            assert fine.min() >= low - 1e-3 and fine.max() <= high + 1e-3
            assert abs(fine.mean() - native.mean()) < 0.05 * (high - low)


def test_resize_is_bilinear_with_aligned_pixel_centres():
    got = data.resize(np.array([[0.0, 4.0], [0.0, 4.0]]), 4)
    assert got.shape == (4, 4) and np.allclose(got, [0, 1, 3, 4])


def test_labels_join_by_product_name_and_s1_by_rank_in_time(toy, labels):
    table = json.loads(Path(labels).read_text())
    s2, s1 = data.SSL4EO(toy, S2C, labels), data.SSL4EO(toy, S1, labels)
    for i, name in enumerate(s2.ids):
        for s, product in enumerate(sorted(table[name])):
            assert s2.files[i][s].endswith(product)
            want = np.isin(np.arange(9), [int(c) for c in table[name][product]])
            assert np.array_equal(s2.labels[i][s], want)
            assert np.array_equal(s1.labels[i][s], want)


def test_s1_without_the_s2_tree_joins_by_the_json_alone(toy, labels, tmp_path):
    shutil.copytree(f"{toy}/s1", tmp_path / "s1")
    a, b = data.SSL4EO(toy, S1, labels), data.SSL4EO(tmp_path, S1, labels)
    assert np.array_equal(a.labels, b.labels)


def test_a_scene_the_json_leaves_out_is_unlabelled(toy, labels, tmp_path):
    table = json.loads(Path(labels).read_text())
    del table["0000003"]
    Path(tmp_path, "l.json").write_text(json.dumps(table))
    scenes = data.SSL4EO(toy, S1, tmp_path / "l.json")
    assert not scenes.labels[3].any() and any(y.any() for y in scenes.labels)


def test_s1_images_of_a_scene_with_more_s2_images_are_unlabelled(toy, labels, tmp_path):
    shutil.copytree(f"{toy}/s1", tmp_path / "s1")
    shutil.rmtree(first(tmp_path, "s1"))
    scenes = data.SSL4EO(tmp_path, S1, labels)
    assert scenes.labels[0].shape == (3, 9) and not scenes.labels[0].any()


# ------------------------------------------------------------------------------ scenes and batches


def test_a_scene_gives_two_different_seasons_chosen_by_the_seed(toy, labels):
    scenes = data.SSL4EO(toy, S1, labels)
    seen = set()
    for seed in range(20):
        x, y = scenes[5, seed]
        assert x.shape == (2, 2, 24, 24) and y.shape == (2, 9)
        seasons = []
        for view in x:
            seasons += [s for s in range(4) if np.array_equal(view, scenes.image(5, s))]
        assert len(seasons) == len(set(seasons)) == 2
        assert np.array_equal(y, scenes.labels[5][seasons])
        assert np.array_equal(scenes[5, seed][0], x)
        seen.add(tuple(seasons))
    assert len(seen) > 6


def test_a_scene_with_fewer_images_than_views_repeats_them(toy, tmp_path):
    shutil.copytree(f"{toy}/s1/0000000", tmp_path / "s1" / "0000000")
    for product in sorted((tmp_path / "s1" / "0000000").iterdir())[2:]:
        shutil.rmtree(product)
    scenes = data.SSL4EO(tmp_path, S1, views=3)
    drawn = scenes.draw(0, seed=1).tolist()
    assert set(drawn[:2]) == {0, 1} and drawn[2] == drawn[0] and scenes[0, 1][0].shape[0] == 3


def test_preloading_changes_nothing(toy):
    a, b = data.SSL4EO(toy, S2C), data.SSL4EO(toy, S2C)
    b.preload([2, 5], workers=0)
    assert b.memory.shape == (8, 13, 24, 24)
    for i, s in b.images_of([5, 2]):
        assert np.array_equal(a.image(i, s), b.image(i, s))
    keys = [(5, 7), (2, 7)]
    for key in keys:
        assert np.array_equal(a[key][0], b[key][0])
    assert np.array_equal(a.__getitems__(keys)[0], b.__getitems__(keys)[0])
    with pytest.raises(IndexError):
        b.image(3, 0)                                          # was not read: not zeros, an error


def test_held_out_scenes_depend_on_their_name_alone():
    ids = [f"{i:07d}" for i in range(5000)]
    out = data.held_out(ids, 0.2)
    assert 0.18 < out.mean() < 0.22
    assert np.array_equal(data.held_out(ids[::-1], 0.2)[::-1], out)
    assert (data.held_out(ids, 0.3) | ~out).all()              # a larger share holds the smaller
    assert not data.held_out(ids, 0).any()


# ---------------------------------------------------------------------------------------- EuroSAT


def eurosat(root):
    """Two classes of three images whose band k is 100 k, plus the class."""
    for c, name in enumerate(("Forest", "River")):
        Path(root, name).mkdir(parents=True)
        x = np.broadcast_to(np.arange(13) * 100 + c, (64, 64, 13)).astype(np.uint16)
        for n in range(1, 4):
            tifffile.imwrite(Path(root, name, f"{name}_{n}.tif"), x, planarconfig="contig")
    return str(root)


def test_eurosats_last_band_b8a_moves_to_its_place(tmp_path):
    scenes = data.open_data(eurosat(tmp_path / "e"), S2C, "classes", layout="eurosat")
    assert scenes.classes == ("Forest", "River") and len(scenes) == 6 and scenes.size == 64
    order = np.float32([0, 1, 2, 3, 4, 5, 6, 7, 12, 8, 9, 10, 11])
    want = data.to_uint8(100 * order[:, None, None], S2C)
    assert np.array_equal(scenes.image(0, 0)[:, :1, :1], want)
    assert [int(y[0].argmax()) for y in scenes.labels] == [0, 0, 0, 1, 1, 1]


def test_class_folders_and_products_do_not_take_each_others_labels(toy, labels, tmp_path):
    with pytest.raises(ValueError, match="--labels .*json: .* holds classes"):
        data.open_data(eurosat(tmp_path / "e"), S2C, labels)
    with pytest.raises(ValueError, match="--labels classes: .* holds products"):
        data.open_data(toy, S1, "classes")


def test_an_image_of_another_size_is_resized_and_said(tmp_path):
    root = eurosat(tmp_path / "e")
    small = np.full((60, 60, 13), 1000, np.uint16)
    tifffile.imwrite(f"{root}/River/River_3.tif", small, planarconfig="contig")
    scenes = data.open_data(root, S2C)
    want = data.to_uint8(np.full((13, 64, 64), 1000, np.float32), S2C)
    assert np.array_equal(scenes.image(5, 0), want)
    assert scenes.notes[0].startswith("1 of 6 images are not 64 x 64")


def test_eurosat_rgb_is_read_as_it_is(tmp_path):
    (tmp_path / "River").mkdir()
    imagecodecs.imwrite(tmp_path / "River" / "River_1.jpg", np.full((64, 64, 3), 90, np.uint8))
    (tmp_path / "River" / "River_2.jpg").write_bytes(b"no image")
    scenes = data.EuroSAT(str(tmp_path), RGB)
    x = scenes.image(0, 0)
    assert x.shape == (3, 64, 64) and abs(int(x.mean()) - 90) < 3
    with pytest.raises(ValueError, match="River_2.jpg: unreadable image"):
        scenes.image(1, 0)


# ------------------------------------------------------------------------------------ bad input


def damage(toy, tmp_path, name):
    """Copy two scenes of the toy world -> the first product of the sensor."""
    for tree in ("s1", "s2c"):
        for scene in ("0000000", "0000001"):
            shutil.copytree(f"{toy}/{tree}/{scene}", tmp_path / tree / scene)
    return first(tmp_path, name)


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


def cut_last_byte(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("hello")


def write(shape, dtype, value=1):
    """A harm: another image in the file's place."""
    planes = "contig" if len(shape) == 3 else None

    def harm(path):
        tifffile.imwrite(path, np.full(shape, value, dtype), photometric="minisblack",
                         planarconfig=planes)
    return harm


@pytest.mark.parametrize("name, band, harm, message", [
    ("s2c", "B8A", Path.unlink, "B8A.tif: missing"),
    ("s1", "VV", Path.unlink, "VV.tif: missing"),
    ("s2c", "B4", cut, "B4.tif: unreadable TIFF"),
    ("s2c", "B4", cut_last_byte, "B4.tif: unreadable TIFF"),
    ("s2c", "B4", empty, "B4.tif: unreadable TIFF"),
    ("s2c", "B4", text, "B4.tif: unreadable TIFF"),
    ("s2c", "B4", write((24, 24), "float32"), "B4.tif: float32 pixels, s2c has uint16"),
    ("s1", "VH", write((24, 24), "uint16"), "VH.tif: uint16 pixels, s1 has float32"),
    ("s2c", "B5", write((24, 24), "uint16"), "B5.tif: .24, 24. pixels, expected 12 x 12"),
    ("s2c", "B5", write((12, 12, 2), "uint16"), "B5.tif: .12, 12, 2. pixels"),
    ("s1", "VH", write((24, 24), "float32", np.nan), "VH.tif: NaN or infinite"),
])
def test_a_bad_file_is_named_in_one_line(toy, tmp_path, name, band, harm, message):
    product = damage(toy, tmp_path, name)
    harm(product / f"{band}.tif")
    with pytest.raises(ValueError, match=message) as error:
        data.SSL4EO(str(tmp_path), SENSORS[name]).image(0, 0)
    assert "\n" not in str(error.value) and str(product) in str(error.value)


def remove_the_s1_tree(root):
    shutil.rmtree(root / "s1")


def remove_everything(root):
    shutil.rmtree(root)


def remove_a_scene(root):
    shutil.rmtree(root / "s1" / "0000001")


def remove_the_products_of_a_scene(root):
    for product in (root / "s1" / "0000001").iterdir():
        shutil.rmtree(product)


def add_a_folder_to_a_scene(root):
    (root / "s1" / "0000001" / "notes").mkdir()


@pytest.mark.parametrize("harm, message", [
    (remove_the_s1_tree, "/s1: no such folder"),
    (remove_everything, "no such folder"),
    (remove_a_scene, "s1/0000001: missing, while .*s2c/0000001"),
    (remove_the_products_of_a_scene, "s1/0000001: scene without a s1 product"),
    (add_a_folder_to_a_scene, "s1/0000001: not a scene .*'notes' has no date"),
])
def test_a_bad_tree_is_named_in_one_line(toy, tmp_path, harm, message):
    damage(toy, tmp_path / "t", "s1")
    harm(tmp_path / "t")
    with pytest.raises(ValueError, match=message):
        data.open_data(str(tmp_path / "t"), S1)


@pytest.mark.parametrize("product, classes, message", [
    ("first", ["9"], "unknown class '9' in scene 0000002"),
    ("first", ["trees"], "unknown class 'trees'"),
    ("20200101T000000_X_T1", ["1"], "0000002 has no product 20200101T0000"),
    ("first", 5, "not labels of the form"),
])
def test_labels_that_do_not_fit_are_named(toy, labels, tmp_path, product, classes, message):
    table = json.loads(Path(labels).read_text())
    if product == "first":
        product = sorted(table["0000002"])[0]
    table["0000002"][product] = classes
    Path(tmp_path, "l.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match=message):
        data.SSL4EO(toy, S2C, str(tmp_path / "l.json"))


def test_a_labels_file_that_is_missing_or_no_json_or_no_table_is_named(toy, tmp_path):
    path = tmp_path / "l.json"
    with pytest.raises(ValueError, match="l.json: no such file"):
        data.SSL4EO(toy, S2C, str(path))
    for content in ("<html>", '{"0000002": 5}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="l.json: not labels of the form"):
            data.SSL4EO(toy, S2C, str(path))


# --------------------------------------------------------------------------------- augmentation


def identity(n):
    """Parameters that change nothing."""
    zeros = dict.fromkeys(["x", "y", "offset", "hue", "blur"], torch.zeros(n))
    ones = dict.fromkeys(["h", "w", "flip_x", "flip_y", "brightness", "contrast", "saturation"],
                         torch.ones(n))
    return {name: value.clone() for name, value in (zeros | ones).items()}


def view(x, p, size):
    return data.colour(data.crop(x, p, size), p)


def pixels(n=3, c=5, size=12):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, c, size, size), dtype=torch.uint8, generator=generator)


def test_neutral_parameters_give_the_image_over_255():
    x = pixels()
    assert torch.allclose(view(x, identity(3), 12), x / 255, atol=1e-6)


def brighter(x):
    return (x * 1.3).clamp(0, 1)


def paler(x):
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * 0.6 + mean


def greyed(x):
    return x.mean(1, keepdim=True).expand_as(x)


@pytest.mark.parametrize("name, value, expect", [
    ("flip_x", -1, lambda x: x.flip(-1)),
    ("flip_y", -1, lambda x: x.flip(-2)),
    ("brightness", 1.3, brighter),
    ("contrast", 0.6, paler),
    ("saturation", 0, greyed),
])
def test_each_parameter_does_its_one_thing_to_its_one_image(name, value, expect):
    x, p = pixels(), identity(3)
    p[name][1] = value
    got, plain = view(x, p, 12), x / 255
    assert torch.allclose(got[1], expect(plain)[1], atol=1e-5)
    assert torch.allclose(got[[0, 2]], plain[[0, 2]], atol=1e-6)


@pytest.mark.parametrize("decibels", [1.5, -30.0])
def test_radar_shifts_by_decibels_and_saturates(decibels):
    """-12.59 dB, VV's mean, sits at 0.5; 2 std up or down is the end of the range."""
    x = torch.full((1, 2, 12, 12), 127, dtype=torch.uint8)
    width = 4 * torch.tensor([5.26, 5.91])                                  # of the range, in dB
    p = identity(1) | {"offset": (decibels / width)[None]}
    want = ((127 / 255 * width + decibels) / width).clamp(0, 1)
    got = view(x, p, 12)
    assert torch.allclose(got, want.view(1, 2, 1, 1).expand_as(got), atol=1e-6)


def test_hue_turns_a_third_of_the_circle_from_red_to_green_and_leaves_grey_alone():
    x = torch.zeros(2, 3, 12, 12, dtype=torch.uint8)
    x[0, 0], x[1] = 200, 90
    got = view(x, identity(2) | {"hue": torch.full((2,), 1 / 3)}, 12)
    assert torch.allclose(got[1], x[1] / 255, atol=1e-5)
    assert torch.allclose(got[0], x[0, [1, 0, 2]] / 255, atol=1e-5)


def test_a_quarter_crop_is_that_quarter():
    x, p = pixels(1), identity(1)
    p |= {"h": torch.tensor([0.5]), "w": torch.tensor([0.5]),
          "x": torch.tensor([0.5]), "y": torch.tensor([-0.5])}
    assert torch.allclose(view(x, p, 6), x[..., :6, 6:] / 255, atol=1e-5)


def test_blur_keeps_a_constant_image():
    p = identity(1) | {"blur": torch.tensor([224.0])}                       # std 12 px at 12 px
    flat = view(torch.full((1, 2, 12, 12), 100, dtype=torch.uint8), p, 12)
    assert torch.allclose(flat, torch.tensor(100 / 255), atol=1e-5)


def test_blur_makes_a_gaussian_of_a_dot():
    p = identity(1) | {"blur": torch.tensor([224 / 32])}                    # std 1 px at 32 px
    dot = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    dot[0, 0, 16, 16] = 255
    row = view(dot, p, 32)[0, 0, 16, 13:20]
    want = torch.exp(-torch.arange(-3, 4.0) ** 2 / 2)
    assert torch.allclose(row / row.max(), want, atol=1e-4)


def draws(sensor, seed=0, n=4000):
    generator = torch.Generator().manual_seed(seed)
    return data.draw_crops(n, generator) | data.draw_colours(n, sensor, generator)


def test_drawn_parameters_replay():
    a, b = draws(S2C), draws(S2C)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_drawn_crops_lie_in_the_image_and_in_their_ranges():
    p = draws(S2C)
    area = p["h"] * p["w"]
    assert area.min() > 0.15 and area.max() <= 1 and 0.55 < area.mean() < 0.62
    assert (p["x"].abs() + p["w"] <= 1 + 1e-6).all()
    assert (p["y"].abs() + p["h"] <= 1 + 1e-6).all()


def test_drawn_light_of_optical_images_lies_in_its_ranges():
    p = draws(S2C)
    assert 0.77 < (p["brightness"] != 1).float().mean() < 0.83
    assert p["contrast"].min() >= 0.6 and p["contrast"].max() <= 1.4
    assert set(p["saturation"].tolist()) == {0, 1}
    assert (p["hue"] == 0).all() and (p["offset"] == 0).all()
    assert 0.17 < (p["saturation"] == 0).float().mean() < 0.23
    assert 0.46 < (p["blur"] > 0).float().mean() < 0.54


def test_drawn_light_of_radar_images_is_an_offset_in_decibels_for_each_band():
    p = draws(S1)
    assert (p["brightness"] == 1).all() and (p["contrast"] == 1).all()
    decibels = p["offset"] * 4 * torch.tensor([5.26, 5.91])
    assert 1.9 < decibels.max() <= 2 + 1e-6 and -2 - 1e-6 <= decibels.min() < -1.9
    vv, vh = p["offset"].T
    assert torch.equal(vv == 0, vh == 0)                                    # jittered together,
    assert abs(torch.corrcoef(p["offset"].T)[0, 1]) < 0.1                   # but not alike


def test_drawn_light_of_rgb_images_has_saturation_and_hue():
    p = draws(RGB)
    assert 0.09 < p["hue"].max() <= 0.1 and 1.19 < p["saturation"].max() <= 1.2
