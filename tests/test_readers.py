"""Claims about the readers of image folders and of BigEarthNet, on files written here."""
import csv
import json
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile

import data
from data import SENSORS

S1, S2C, S2A, RGB = SENSORS["s1"], SENSORS["s2c"], SENSORS["s2a"], SENSORS["rgb"]
PATCH = "S2A_MSIL2A_20170613T101031_61_39"
RADAR = "S1A_IW_GRDH_1SDV_20170613T165043_33UUP_61_39"

# ---------------------------------------------------------------------------------- BigEarthNet


def write_patch(folder, name, sensor, labels=None):
    """Constant bands: 100, 200, ... for S2, -10 and -11 for S1."""
    Path(folder, name).mkdir(parents=True)
    for k, (band, ratio) in enumerate(zip(sensor.bands, sensor.ratios)):
        value = -10 - k if sensor is S1 else 100 * (k + 1)
        x = np.full((120 // ratio, 120 // ratio), value, sensor.dtype)
        tifffile.imwrite(f"{folder}/{name}/{name}_{band}.tif", x)
    if labels is not None:
        table = {"labels": labels, "corresponding_s2_patch": PATCH}
        Path(folder, name, f"{name}_labels_metadata.json").write_text(json.dumps(table))


@pytest.fixture
def ben(tmp_path):
    """Two S2 patches and one S1 patch of v1."""
    s2, s1 = tmp_path / "BigEarthNet-v1.0", tmp_path / "BigEarthNet-S1-v1.0"
    write_patch(s2, PATCH, data.BEN_S2, ["Rice fields", "Vineyards", "Airports"])
    write_patch(s2, PATCH + "0", data.BEN_S2, ["Burnt areas"])
    write_patch(s1, RADAR, S1, ["Sea and ocean"])
    return str(tmp_path)


def names_of_classes(scenes, i):
    return [scenes.classes[k] for k in np.flatnonzero(scenes.labels[i])]


def test_bigearthnet_v1_has_12_bands_in_order_on_one_grid_and_19_classes(ben):
    scenes = data.BigEarthNet(ben, S2A)
    assert scenes.ids == [PATCH, PATCH + "0"] and len(scenes.classes) == 19
    assert names_of_classes(scenes, 0) == ["Arable land", "Permanent crops"]
    assert not scenes.labels[1].any()                     # CORINE's burnt areas have no class
    bands = 100 * np.arange(1, 13, dtype=np.float32)[:, None, None]
    want = data.to_uint8(bands, data.BEN_S2)
    assert np.array_equal(scenes.image(0, 0), np.broadcast_to(want, (12, 120, 120)))


def test_bigearthnets_radar_is_scaled_as_all_radar(ben):
    scenes = data.BigEarthNet(ben, S1)
    want = data.to_uint8(np.float32([-10, -11])[:, None, None], S1)
    assert np.array_equal(scenes.image(0, 0)[:, :1, :1], want)
    assert names_of_classes(scenes, 0) == ["Marine waters"]


def test_a_13_band_network_sees_bigearthnet_with_zeros_for_b10(ben):
    x12, x13 = data.BigEarthNet(ben, S2A).image(0, 0), data.BigEarthNet(ben, S2C).image(0, 0)
    assert x13.shape == (13, 120, 120) and not x13[S2C.bands.index("B10")].any()
    assert np.array_equal(np.delete(x13, 10, 0), x12)


def test_43_corine_labels_go_to_19_classes_or_to_none_and_no_name_goes_twice():
    sizes = [len(corine) for corine in data.BEN_CLASSES.values()]
    assert sizes == [2, 1, 3, 4, 1, 1, 1, 1, 1, 1, 1, 2, 2, 1, 1, 2, 2, 2, 3]
    assert len(data.BEN_NO_CLASS) == 11
    labels = sum(data.BEN_CLASSES.values(), []) + data.BEN_NO_CLASS
    assert len(labels) == len(set(labels)) == 43
    assert {"Land principally occupied by agriculture, with significant areas of "
            "natural vegetation",
            "Transitional woodland/shrub", "Annual crops associated with permanent crops",
            "Road and rail networks and associated land"} <= set(labels)
    index = data.ben_index()
    assert [index[name] for name in data.BEN_CLASSES] == [*range(19)]       # v2's labels
    assert {index[label] for label in data.BEN_NO_CLASS} == {None}


def test_split_lists_choose_patches_and_absent_ones_are_counted_and_named(ben, tmp_path):
    path = tmp_path / "train.csv"
    path.write_text(f"{PATCH},{RADAR}\n")                                   # the official form
    assert data.BigEarthNet(ben, S2A, str(path)).ids == [PATCH]
    assert data.BigEarthNet(ben, S1, str(path)).ids == [RADAR]
    path.write_text("".join(f"gone_{i}\n" for i in range(7)) + PATCH)       # SeCo's form
    with pytest.raises(ValueError, match="train.csv: 7 of 8 .* not there: gone_0, .*, gone_4$"):
        data.BigEarthNet(ben, S2A, str(path))
    assert data.BigEarthNet(ben, S2A, str(path), skip=True).ids == [PATCH]
    with pytest.raises(ValueError, match="/nowhere.csv: no such file"):
        data.BigEarthNet(ben, S2A, "/nowhere.csv")


def test_bigearthnet_v2_takes_labels_and_split_from_the_exported_table(tmp_path):
    name = "S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_26_57"
    write_patch(tmp_path / "BigEarthNet-S2" / name[:-6], name, data.BEN_S2)
    write_patch(tmp_path / "BigEarthNet-S1" / RADAR[:32], RADAR, S1)
    with open(tmp_path / "metadata.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["patch_id", "labels", "split", "country", "s1_name"])
        table.writerow([name, "Arable land;Beaches, dunes, sands", "test", "Austria", RADAR])
        table.writerow(["gone", "Pastures", "train", "Austria", "gone_s1"])
    for sensor, want in ((S2A, name), (S1, RADAR)):
        scenes = data.BigEarthNet(str(tmp_path), sensor, "test")
        assert scenes.ids == [want] and scenes.image(0, 0).shape[1] == 120
        assert names_of_classes(scenes, 0) == ["Arable land", "Beaches, dunes, sands"]
    with pytest.raises(ValueError, match="1 of 1 images are not there: gone"):
        data.BigEarthNet(str(tmp_path), S2A, "train")


def unknown_label(patch):
    (patch / f"{PATCH}_labels_metadata.json").write_text('{"labels": ["Lawn"]}')


def no_labels(patch):
    (patch / f"{PATCH}_labels_metadata.json").unlink()


def no_band(patch):
    (patch / f"{PATCH}_B02.tif").unlink()


def large_band(patch):
    tifffile.imwrite(patch / f"{PATCH}_B05.tif", np.zeros((120, 120), np.uint16))


@pytest.mark.parametrize("harm, message", [
    (unknown_label, "no BigEarthNet labels of .*: 'Lawn'"),
    (no_labels, "no BigEarthNet labels of .*no such file"),
    (no_band, f"{PATCH}_B02.tif: missing"),
    (large_band, "B05.tif: .120, 120. pixels, expected 60 x 60"),
])
def test_a_bad_patch_is_named_in_one_line(ben, harm, message):
    harm(Path(ben, "BigEarthNet-v1.0", PATCH))
    with pytest.raises(ValueError, match=message) as error:
        data.BigEarthNet(ben, S2A).image(0, 0)
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------- image folders


def picture(path, x):
    path.parent.mkdir(parents=True, exist_ok=True)
    imagecodecs.imwrite(str(path), x)


def test_a_folder_holds_classes_or_flat_images_of_any_kind(tmp_path):
    x = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    picture(tmp_path / "a" / "x.png", x)
    picture(tmp_path / "b" / "Y.JPG", np.full((8, 8, 3), 90, np.uint8))
    tifffile.imwrite(tmp_path / "b" / "z.tiff", x, photometric="rgb")
    (tmp_path / "empty").mkdir()
    scenes = data.open_data(str(tmp_path), RGB, "classes")
    assert scenes.classes == ("a", "b") and scenes.ids == ["x", "Y", "z"] and scenes.size == 8
    assert [int(y[0].argmax()) for y in scenes.labels] == [0, 1, 1]
    assert np.array_equal(scenes.image(0, 0), x.transpose(2, 0, 1))
    assert np.array_equal(scenes.image(2, 0), x.transpose(2, 0, 1))
    flat = data.Folder(str(tmp_path / "b"), RGB)
    assert len(flat) == 2 and flat.labels[0].shape == (1, 1) and not np.any(flat.labels)


def test_a_picture_is_read_by_what_it_holds_whatever_its_name(tmp_path):
    x = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    (tmp_path / "a.jpg").write_bytes(imagecodecs.png_encode(x))
    assert np.array_equal(data.Folder(str(tmp_path), RGB).image(0, 0), x.transpose(2, 0, 1))


def test_grey_and_alpha_become_rgb_and_16_bits_are_refused(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    picture(tmp_path / "a.png", grey)
    picture(tmp_path / "b.png", np.dstack([grey, grey + 1, grey + 2, grey * 0]))
    picture(tmp_path / "c.png", np.dstack([grey, grey, grey]).astype(np.uint16))
    tifffile.imwrite(tmp_path / "d.tif", np.dstack([grey, grey + 1, grey + 2, grey * 0]),
                     photometric="rgb", extrasamples=["unassalpha"])
    tifffile.imwrite(tmp_path / "e.tif", grey)
    scenes = data.Folder(str(tmp_path), RGB)
    for i in (0, 4):
        assert np.array_equal(scenes.image(i, 0), np.stack([grey, grey, grey]))
    for i in (1, 3):
        assert np.array_equal(scenes.image(i, 0), np.stack([grey, grey + 1, grey + 2]))
    with pytest.raises(ValueError, match="c.png: uint16 .3, 8, 8., expected 3 bands of uint8"):
        scenes.image(2, 0)


def test_a_folder_without_images_of_the_sensor_is_named(tmp_path):
    picture(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="no s1 images .* in it or its folders"):
        data.Folder(str(tmp_path), S1)


NOISE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
PNG, JPEG = imagecodecs.png_encode(NOISE), imagecodecs.jpeg8_encode(NOISE)


@pytest.mark.parametrize("name, content, message", [
    ("x.png", b"", "x.png: unreadable image .*empty file"),
    ("x.jpg", b"", "x.jpg: unreadable image .*empty file"),
    ("x.tif", b"", "x.tif: unreadable TIFF"),
    ("x.png", PNG[:4], "x.png: unreadable image"),
    ("x.png", PNG[:33], "x.png: unreadable image"),
    ("x.png", PNG[:len(PNG) // 2], "x.png: unreadable image"),
    ("x.jpg", JPEG[:4], "x.jpg: unreadable image"),
    ("x.jpg", JPEG[:len(JPEG) // 2], "x.jpg: unreadable image .*cut off"),
    ("x.jpg", b"<html>", "x.jpg: unreadable image .*neither PNG nor JPEG"),
])
def test_an_empty_or_cut_off_image_is_named_in_one_line(tmp_path, name, content, message):
    picture(tmp_path / "good.png", NOISE)
    (tmp_path / name).write_bytes(content)
    scenes = data.Folder(str(tmp_path), RGB)
    with pytest.raises(ValueError, match=message) as error:
        scenes.image(scenes.ids.index("x"), 0)
    assert "\n" not in str(error.value)


def test_eurosat_sar_is_two_float_bands_interleaved_or_not_and_nan_is_refused(tmp_path):
    folder = tmp_path / "River"
    folder.mkdir()
    planes = np.stack([np.full((64, 64), -12.59), np.full((64, 64), -26.17)]).astype(np.float32)
    tifffile.imwrite(folder / "River_1.tif", planes, photometric="minisblack",
                     planarconfig="separate")
    for n, x in ((2, planes), (3, planes * np.nan)):
        tifffile.imwrite(folder / f"River_{n}.tif", x.transpose(1, 2, 0), photometric="minisblack",
                         planarconfig="contig")
    scenes = data.open_data(str(tmp_path), S1)
    for i in (0, 1):
        assert scenes.image(i, 0)[:, 5, 5].tolist() == [128, 64]
    with pytest.raises(ValueError, match="River_3.tif: NaN or infinite pixels"):
        scenes.image(2, 0)


def test_b8a_moves_where_eurosats_layout_is_named_and_nowhere_else(tmp_path):
    x = np.broadcast_to(np.arange(13) * 100, (16, 16, 13)).astype(np.uint16)
    (tmp_path / "Forest").mkdir()
    tifffile.imwrite(tmp_path / "Forest" / "1.tif", x, planarconfig="contig")

    def bands_of(layout):
        scenes = data.open_data(str(tmp_path), S2C, layout=layout)
        return scenes.image(0, 0)[:, 3, 3].tolist()
    in_order = data.to_uint8(100 * np.arange(13, dtype=np.float32)[:, None, None], S2C)[:, 0, 0]
    b8a_last = data.to_uint8(100 * np.float32(data.EUROSAT_ORDER)[:, None, None], S2C)[:, 0, 0]
    assert bands_of(None) == in_order.tolist()
    assert bands_of("eurosat") == b8a_last.tolist()


# ---------------------------------------------------------------------------------------- TIFFs


KINDS = {"one block": {}, "strips in a row": {"rowsperstrip": 5}, "big-endian": {"byteorder": ">"},
         "BigTIFF": {"bigtiff": True}, "tiles": {"tile": (16, 16)},
         "deflate": {"compression": "zlib"}, "lzw": {"compression": "lzw"},
         "predictor": {"compression": "zlib", "predictor": 2}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "int16", "float64"])
def test_every_kind_of_tiff_is_read_as_it_was_written(tmp_path, kind, dtype):
    flags = KINDS[kind]
    if kind == "predictor" and dtype.startswith("float"):
        flags = flags | {"predictor": 3}
    for shape in ((33, 21), (1, 7), (24, 24)):
        x = (np.random.default_rng(0).standard_normal(shape) * 50).astype(dtype)
        tifffile.imwrite(tmp_path / "x.tif", x, metadata=None, **flags)
        got = data.read_tiff(tmp_path / "x.tif")
        assert got.dtype == dtype and np.array_equal(got, x)


def test_of_a_tiff_with_several_pages_the_first_is_read(tmp_path):
    x = np.arange(576, dtype=np.uint16).reshape(24, 24)
    tifffile.imwrite(tmp_path / "x.tif", np.stack([x, x + 1]), metadata=None)
    assert np.array_equal(data.read_tiff(tmp_path / "x.tif"), x)


def test_strips_out_of_order_are_read_in_order(tmp_path):
    path = tmp_path / "x.tif"
    x = np.arange(576, dtype=np.uint16).reshape(24, 24)
    tifffile.imwrite(path, x, metadata=None, rowsperstrip=12)
    with tifffile.TiffFile(path) as file:
        tag = file.pages[0].tags["StripOffsets"]
        place, offsets = tag.valueoffset, tag.value
    raw = np.fromfile(path, np.uint8)
    raw[place:place + 8].view("<u4")[:] = offsets[::-1]                      # swap the two
    raw.tofile(path)
    assert np.array_equal(data.read_tiff(path), np.roll(x, 12, 0))
