"""Claims about data.py: what is read, scaled, joined, refused and packed; the augmentation."""
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch

import data
from data import SENSORS

S1, S2C, S2A, RGB = [SENSORS[name] for name in ("s1", "s2c", "s2a", "rgb")]
PLANET = {"bands": ["blue", "green", "red", "nir"], "kind": "optical", "dtype": "uint16",
          "mean": [500, 700, 800, 2500], "std": [200, 250, 350, 800]}
POWER = replace(S1, name="power", decibels=True)
NOISE = np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A toy world of 6 scenes of 24 px."""
    return data.make_toy(str(tmp_path_factory.mktemp("toy") / "world"), 6, 24, seed=1, workers=1)


def packed(root, sensor, labels=None, **options):
    """The pack of what lies in root, opened."""
    out = f"{root}_pack{len(list(Path(root).parent.iterdir()))}"
    archive = data.open_archive(str(root), sensor, labels)
    data.pack(archive, out, workers=1, **options)
    return data.open_pack(out)


def write(path, x):
    """x (C,H,W): one TIFF of C channels, or a PNG or JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif" and len(x) == 1:
        tifffile.imwrite(path, x[0], metadata=None)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, x.transpose(1, 2, 0), photometric="minisblack",
                         planarconfig="contig", metadata=None)
    else:
        imagecodecs.imwrite(str(path), np.ascontiguousarray(x.transpose(1, 2, 0)))


def write_bands(folder, sensor, side=24):
    """A product or a patch: a TIFF for each band, with pixels of its own size, at its mean."""
    folder.mkdir(parents=True)
    for band, mean, ratio in zip(sensor.bands, sensor.mean, sensor.ratios):
        pixels = np.full((side // ratio, side // ratio), mean).astype(sensor.dtype)
        if side == 120:                                                          # BigEarthNet
            band = f"{folder.name}_" + re.sub(r"^B(\d)$", r"B0\1", band)
        tifffile.imwrite(folder / f"{band}.tif", pixels)


def tiff(x, **options):
    """A function that writes x to a path."""
    return lambda path: tifffile.imwrite(path, x, metadata=None, **options)


def product_names(place, kind):
    """Four names as SSL4EO-S12 has them, in order of time."""
    names = []
    for month in (1, 4, 7, 10):
        day = f"2020{month:02d}{place + 1:02d}"
        if kind == "s1":
            names.append(f"S1A_IW_GRDH_1SDV_{day}T010203_{day}T010228_032911_03CFF0_9BAF")
        else:
            names.append(f"{day}T054639_{day}T054831_T43RCP")
    return names


def write_zip(path, x, bands, places, products, chunk=1):
    """SSL4EO-S12 v1.1: arrays as zarr, version 2, stores them, without compression."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"bands": x, "band": bands, "sample": places, "file_id": products}
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(".zgroup", '{"zarr_format": 2}')
        for name, values in arrays.items():
            values = np.array(values)
            chunks = (chunk, 1, *x.shape[2:]) if name == "bands" else values.shape
            file.writestr(f"{name}/.zarray", json.dumps({
                "zarr_format": 2, "shape": values.shape, "chunks": chunks, "order": "C",
                "dtype": values.dtype.str, "compressor": None, "filters": None,
                "fill_value": None}))
            if name != "bands":
                file.writestr(f"{name}/{'.'.join('0' * values.ndim)}", values.tobytes())
        for i, s in np.ndindex(len(x) // chunk, 4):
            file.writestr(f"bands/{i}.{s}.0.0.0", x[i * chunk:(i + 1) * chunk, s].tobytes())


# ------------------------------------------------- every band at its mean is grey, whoever reads it


def tree(root, sensor):
    product = product_names(0, sensor.name)[0]
    write_bands(root / "a" / sensor.name / "0000000" / product, sensor)


def zips(root, sensor):
    pytest.importorskip("zarr")
    on_disk = data.ZIP_SENSORS[sensor.name]
    values = np.array(on_disk.mean) - on_disk.offset
    if on_disk.dtype == "int16":
        values = values.round()
    x = np.zeros((1, 4, len(values), 24, 24), on_disk.dtype) + values.astype(on_disk.dtype)[
        :, None, None]
    write_zip(root / "a" / "train" / data.ZIP_FOLDERS[sensor.name] / "a.zarr.zip", x, sensor.bands,
              ["0000000"], [product_names(0, sensor.name)])


def bigearthnet(root, sensor):
    on_disk = S2A if sensor is S2C else sensor
    patch = root / "a" / sorted(data.BEN_FOLDERS[sensor.name])[-1] / "S2A_p"
    write_bands(patch, on_disk, 120)
    (patch / "S2A_p_labels_metadata.json").write_text('{"labels": ["Pastures"]}')


def folder(root, sensor):
    mean = np.float64(sensor.mean)
    if sensor.decibels:
        mean = 10 ** (mean / 10)
    stored = np.zeros((max(sensor.channels) + 1, 30, 24))
    stored[sensor.channels] = ((mean - sensor.offset) / sensor.scale)[:, None, None]
    write(root / "a" / "0.tif", stored.astype(sensor.dtype))


UNIT = data.make_sensor({"bands": S2C.bands, "kind": "optical", "dtype": "float32", "scale": 1e4,
                         "mean": S2C.mean, "std": S2C.std})
PAN = data.make_sensor({"bands": ["pan"], "kind": "optical", "dtype": "uint8", "mean": [100],
                        "std": [30], "nodata": 0})
PICKED = data.make_sensor({"bands": ["B8", "B2"], "kind": "optical", "dtype": "uint16",
                           "mean": [900, 40], "std": [100, 20], "channels": [7, 1]})


@pytest.mark.parametrize("write_archive, sensor", [
    (tree, S1), (tree, S2C), (tree, S2A), (zips, S1), (zips, S2C), (zips, S2A), (bigearthnet, S1),
    (bigearthnet, S2A), (bigearthnet, S2C), (folder, S1), (folder, S2C), (folder, S2A),
    (folder, SENSORS["eurosat"]), (folder, SENSORS["eurosat-own"]), (folder, UNIT), (folder, PAN),
    (folder, data.make_sensor(PLANET)), (folder, POWER), (folder, PICKED)])
def test_a_band_at_its_mean_is_middle_grey_whatever_reads_it(tmp_path, write_archive, sensor):
    write_archive(tmp_path, sensor)
    x = packed(tmp_path / "a", sensor).images[0]
    assert len(x) == len(sensor.bands)
    if write_archive is bigearthnet and sensor is S2C:               # L2A has no B10
        assert not x[10].any()
        x = np.delete(x, 10, axis=0)
    assert set(np.unique(x).tolist()) <= {127, 128}


# ------------------------------------------------------------------------------ reading and scaling


def test_a_product_is_its_bands_read_resampled_stacked_and_scaled_bit_for_bit(world):
    pack = packed(world, S2C)
    for row in (0, 5, 23):
        bands = [data.resize(tifffile.imread(f"{world}/s2c/{pack.names[row]}/{band}.tif"), 24)
                 for band in S2C.bands]
        mean = np.float32(S2C.mean)[:, None, None]
        std = np.float32(S2C.std)[:, None, None]
        scaled = (np.stack(bands, dtype=np.float32) - (mean - 2 * std)) * (255 / (4 * std)) + 0.5
        assert np.array_equal(pack.images[row], np.clip(scaled, 0, 255).astype(np.uint8))
    assert pack.names == sorted(pack.names)                # scene by scene, in order of time
    assert pack.scenes == [f"{i:07d}" for i in range(6)]
    assert pack.rows[5].tolist() == [20, 21, 22, 23]


def test_eurosats_last_channel_is_b8a_the_ninth_band(tmp_path):
    x = np.zeros((13, 8, 8), np.uint16) + 100 * np.arange(13, dtype=np.uint16)[:, None, None]
    write(tmp_path / "a" / "0.tif", x)
    got = packed(tmp_path / "a", SENSORS["eurosat"]).images[0, :, 0, 0]
    in_order = np.float32([0, 1, 2, 3, 4, 5, 6, 7, 12, 8, 9, 10, 11])[:, None, None] * 100
    assert got.tolist() == data.to_uint8(in_order, S2C)[:, 0, 0].tolist()


KINDS = {"one block": {}, "strips": {"rowsperstrip": 5}, "big-endian": {"byteorder": ">"},
         "BigTIFF": {"bigtiff": True}, "tiles": {"tile": (16, 16)}, "lzw": {"compression": "lzw"},
         "predictor": {"compression": "zlib", "predictor": True}}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tiff_is_read_as_it_was_written(tmp_path, kind):
    for dtype in ("uint8", "uint16", "float32", "int16"):
        for shape in ((33, 21), (1, 7)):
            x = (np.random.default_rng(0).standard_normal(shape) * 50).astype(dtype)
            tifffile.imwrite(tmp_path / "x.tif", x, metadata=None, **KINDS[kind])
            got = data.read_tiff(tmp_path / "x.tif")
            assert got.dtype == dtype and np.array_equal(got[0], x)


def test_bands_are_read_from_channels_planes_and_pages_alike_and_smaller_copies_are_not(tmp_path):
    x = np.random.default_rng(0).integers(0, 999, (4, 8, 4), np.uint16)         # as wide as deep
    write(tmp_path / "a.tif", x)
    tiff(x, photometric="minisblack", planarconfig="separate")(tmp_path / "b.tif")
    with tifffile.TiffWriter(tmp_path / "c.tif") as file:
        file.write(x, photometric="minisblack", metadata=None)
        file.write(x[0, ::2, ::2], photometric="minisblack", subfiletype=1, metadata=None)
    for name in ("a.tif", "b.tif", "c.tif"):
        assert np.array_equal(data.read_tiff(tmp_path / name, bands=4), x)


def test_grey_becomes_three_bands_and_opacity_is_left_out(tmp_path):
    x = NOISE.transpose(2, 0, 1)
    write(tmp_path / "a" / "0.png", x[:1])
    write(tmp_path / "a" / "1.png", np.concatenate([x, x[:1] * 0]))
    tifffile.imwrite(tmp_path / "a" / "2.tif", np.dstack([NOISE, NOISE[..., :1] * 0]),
                     photometric="rgb", extrasamples=["unassalpha"])
    tifffile.imwrite(tmp_path / "a" / "3.tif", NOISE[..., 0])
    (tmp_path / "a" / "4.jpg").write_bytes(imagecodecs.png_encode(NOISE))        # whatever its name
    images = packed(tmp_path / "a", RGB).images
    for row, want in enumerate([x[[0, 0, 0]], x, x, x[[0, 0, 0]], x]):
        assert np.array_equal(images[row], want), row


def test_pixels_without_a_measurement_become_the_mean_and_are_in_no_statistics(tmp_path):
    sensor = data.make_sensor(PLANET | {"nodata": 0})
    x = np.full((4, 24, 24), 600, np.uint16)
    x[:, 12:] = 800
    x[:, :3] = 0
    write(tmp_path / "a" / "0.tif", x)
    pack = packed(tmp_path / "a", sensor)
    assert (pack.images[0, :, :3] == 127).all() and not (pack.images[0, :, 3:] == 127).any()
    mean, std, low, high, below, above = data.statistics(
        data.open_archive(str(tmp_path / "a"), sensor)).T
    counts = [9, 12]
    assert np.allclose(mean, np.average([600, 800], weights=counts))
    assert np.allclose(std, np.sqrt(np.average(([600, 800] - mean[0]) ** 2, weights=counts)))
    assert (low == 600).all() and (high == 800).all()
    assert below.tolist() == [0, 0, 0, 1] and above.tolist() == [0, 0, 0, 0]


def test_power_of_zero_or_less_has_no_decibels_and_is_not_measured():
    x = np.float32([[[1, 10, 0, -3]], [[0.1, 1000, 1e-5, 1]]])
    got = data.to_units(x, POWER)
    assert np.allclose(got, [[[0, 10, np.nan, np.nan]], [[-10, 30, -50, 0]]], equal_nan=True)
    assert (data.to_uint8(got, POWER)[0, 0, 2:] == 127).all()


def test_to_input_gives_what_the_pack_holds(tmp_path):
    x = np.random.default_rng(0).integers(0, 3000, (4, 24, 24), np.uint16)
    sensor = data.make_sensor(PLANET | {"nodata": 7, "offset": -100.0})
    write(tmp_path / "a" / "0.tif", x)
    want = torch.tensor(packed(tmp_path / "a", sensor).images[0]) / 255
    assert torch.equal(data.to_input(x, sensor)[0], want)
    with pytest.raises(data.InputError, match=r"shape .24, 24, 2.: power takes .2, height, width"):
        data.to_input(np.zeros((24, 24, 2)), POWER)
    with pytest.raises(data.InputError, match="NaN or infinite"):
        data.to_input(np.full((2, 4, 4), np.nan), S1)


def test_resize_is_bilinear_with_aligned_pixel_centres_and_averages_when_it_shrinks():
    assert np.allclose(data.resize(np.array([[0.0, 4.0], [0.0, 4.0]]), 4), [0, 1, 3, 4])
    stripes = np.tile([0.0, 9.0, 0.0, 0.0], (16, 4))
    assert np.allclose(data.resize(stripes, 4)[:, 1:3], 9 / 4, atol=0.6)         # no aliasing


def test_an_image_of_another_size_is_its_central_square_resized(tmp_path):
    for i in range(3):
        write(tmp_path / "a" / f"{i}.png", np.full((3, 8, 8), 9, np.uint8))
    x = np.zeros((3, 16, 24), np.uint8)
    x[:, :, 4:20] = 50
    write(tmp_path / "a" / "3.png", x)
    pack = packed(tmp_path / "a", RGB)
    assert pack.size == 8 and (pack.images[3] == 50).all() and (pack.images[0] == 9).all()
    assert pack.notes[0].startswith("1 of 4 images are not 8 x 8: their central square")
    assert packed(tmp_path / "a", RGB, size=4).images.shape == (4, 3, 4, 4)


def test_a_bad_image_is_named_and_left_out_only_if_asked(tmp_path, capsys):
    write(tmp_path / "a" / "good.png", NOISE.transpose(2, 0, 1))
    (tmp_path / "a" / "bad.png").write_bytes(b"")
    message = f"{tmp_path}/a/bad.png: neither PNG nor JPEG"
    with pytest.raises(data.InputError, match="1 of 2 images cannot be read, see above; --skip"):
        packed(tmp_path / "a", RGB)
    assert capsys.readouterr().out.splitlines() == [message]
    assert os.listdir(tmp_path) == ["a"]                             # no trace of a pack
    pack = packed(tmp_path / "a", RGB, skip_bad=True)
    assert pack.names == ["good.png"] and pack.images.shape == (1, 3, 24, 24)
    assert pack.notes == ["1 of 2 images cannot be read and are left out: bad.png"]
    index = json.loads(Path(pack.path, "pack.json").read_text())
    assert index["left_out"] == {"bad.png": message}


def test_of_a_scene_with_bad_files_one_image_is_left_out_and_all_files_are_named(world, tmp_path):
    for i in range(2):
        shutil.copytree(f"{world}/s2c/{i:07d}", tmp_path / "a" / "s2c" / f"{i:07d}")
    product = sorted((tmp_path / "a" / "s2c" / "0000001").iterdir())[2]
    (product / "B8A.tif").unlink()
    (product / "B4.tif").write_text("hello")
    pack = packed(tmp_path / "a", S2C, skip_bad=True)
    ((name, reason),) = json.loads(Path(pack.path, "pack.json").read_text())["left_out"].items()
    assert name == f"0000001/{product.name}"
    assert f"{product}/B8A.tif: missing" in reason and f"{product}/B4.tif: unreadable" in reason
    assert [len(rows) for rows in pack.rows] == [4, 3]


@pytest.mark.parametrize("error", [
    NameError("undefined"), MemoryError(), OSError(5, "Input/output error")], ids=repr)
def test_what_is_no_fault_of_the_file_is_never_skipped(tmp_path, error):
    def read():
        raise error
    archive = data.Archive([data.Image("a", "a.tif", read)], S1)
    with pytest.raises(type(error)) as caught:
        data.pack(archive, str(tmp_path / "p"), size=8, skip_bad=True, workers=1)
    assert not isinstance(error, OSError) or caught.value.filename == "a.tif"
    assert not os.listdir(tmp_path)


def test_hidden_files_are_no_images_and_folders_of_masks_are_named(tmp_path):
    for name in ("a/one/x.png", "a/one/masks/x.png", "a/.hidden/x.png", "a/one/._x.png"):
        write(tmp_path / name, NOISE.transpose(2, 0, 1))
    pack = packed(tmp_path / "a", RGB)
    assert pack.names == ["one/masks/x.png", "one/x.png"]
    assert pack.scenes == ["one/masks/x", "one/x"]
    assert pack.notes == ["folders called masks are packed as images; if they hold masks, move "
                          "them elsewhere"]


@pytest.mark.parametrize("sensor, band, note", [
    (data.make_sensor(PLANET | {"mean": [1] * 4, "std": [1] * 4}), 0, "blue 100% clipped"),
    (data.make_sensor(PLANET | {"mean": [9e5] * 4, "std": [1e6] * 4}), 3, "nir 100% of one value"),
])
def test_bands_that_look_wrong_are_noted_with_the_usual_causes(tmp_path, sensor, band, note):
    x = np.random.default_rng(0).integers(500, 700, (4, 24, 24), np.uint16)
    write(tmp_path / "a" / "0.tif", x)
    (text,) = packed(tmp_path / "a", sensor).notes
    assert text.startswith("suspicious bands: blue") and note in text and "usual causes" in text


# ------------------------------------------------------------------------------------------ labels


def classes_of(pack, row):
    return [pack.classes[k] for k in np.flatnonzero(pack.labels[row])]


def test_labels_join_by_product_name_and_those_of_radar_by_order_of_time(world):
    table = json.loads(Path(world, "ssl4eo_multilabel.json").read_text())
    optical, radar = packed(world, S2C), packed(world, S1)
    for row, name in enumerate(optical.names):
        scene, product = name.split("/")
        assert classes_of(optical, row) == [data.CLASSES[int(c)] for c in table[scene][product]]
    assert optical.labels.any() and np.array_equal(optical.labels, radar.labels)
    assert optical.checksum == radar.checksum and not optical.one_label
    assert "SSL4EO-S12-ML" in optical.labels_from
    assert f"{optical.labels.any(1).sum()} of them by place and order of time" in radar.notes[0]
    assert " 0 of them by place and order of time" in optical.notes[0]


def other_names(world, root):
    """A tree of L2A whose products have other names than the labels have, in the same order."""
    for scene in sorted(Path(world, "s2c").iterdir()):
        for product in sorted(scene.iterdir()):
            folder = root / "s2a" / scene.name / product.name.replace("T43RCP", "T43RCQ")
            write_bands(folder, S2A)
    shutil.copy(f"{world}/ssl4eo_multilabel.json", root)


@pytest.mark.parametrize("with_l1c", [True, False])
def test_l2a_products_of_other_names_take_the_labels_of_l1c_by_order(world, tmp_path, with_l1c):
    root = tmp_path / "a"
    other_names(world, root)
    labels = root / "ssl4eo_multilabel.json"
    table = json.loads(labels.read_text())
    first = sorted(table["0000002"])[0]
    if with_l1c:
        shutil.copytree(f"{world}/s2c", root / "s2c")
        del table["0000002"][first]                        # its place in the order is still known
        labels.write_text(json.dumps(table))
    pack, want = packed(root, S2A), packed(world, S2C).labels.copy()
    if with_l1c:
        want[8] = 0
    assert np.array_equal(pack.labels, want)


def test_a_scene_with_another_number_of_products_than_the_labels_is_unlabelled(world, tmp_path):
    shutil.copytree(f"{world}/s1", tmp_path / "a" / "s1")
    shutil.rmtree(sorted((tmp_path / "a" / "s1" / "0000000").iterdir())[0])
    pack = packed(tmp_path / "a", S1, f"{world}/ssl4eo_multilabel.json")
    assert not pack.labels[:3].any() and pack.labels[3:].any()


@pytest.mark.parametrize("chunk", [1, 2])
def test_zips_give_images_in_order_of_time_and_labels_by_product_or_order(tmp_path, chunk):
    pytest.importorskip("zarr")
    places = [f"{i:07d}" for i in range(4)]
    rng = np.random.default_rng(0)
    x = rng.integers(1000, 5000, (4, 4, 13, 6, 6), np.int16)
    shuffled = [2, 0, 3, 1]
    products = [[product_names(i, "s2c")[s] for s in shuffled] for i in range(4)]
    write_zip(tmp_path / "a/train/S2L1C/a.zarr.zip", x, S2C.bands, places, products, chunk)
    radar = rng.normal(-12, 5, (4, 4, 2, 6, 6)).astype(np.float16)
    write_zip(tmp_path / "a/S1GRD/a.zarr.zip", radar, ["vv", "vh"], places[::-1],
              [product_names(i, "s1") for i in range(4)][::-1], chunk)
    first, _, _, last = product_names(2, "s2c")
    table = {places[2]: {first: ["1", "4"], last: ["0"]}, places[3]: {}}
    (tmp_path / "a" / "ssl4eo_multilabel.json").write_text(json.dumps(table))

    optical, s1 = packed(tmp_path / "a", S2C), packed(tmp_path / "a", S1)
    assert optical.scenes == places and s1.scenes == places[::-1]
    for i in range(4):
        for s, stored in enumerate(np.argsort(shuffled)):
            want = data.to_uint8(np.float32(x[i, stored]) - 1000, data.ZIP_SENSORS["s2c"])
            assert np.array_equal(optical.images[4 * i + s], want)
            want = data.to_uint8(radar[3 - i, s], data.ZIP_SENSORS["s1"])
            assert np.array_equal(s1.images[s1.rows[3 - i][s]], want)
    for pack in (optical, s1):
        rows = pack.rows[pack.scenes.index(places[2])]
        assert [classes_of(pack, row) for row in rows] == [["trees", "crops"], [], [], ["water"]]
        assert pack.labels.any(1).sum() == 2


def test_class_folders_are_labels_only_when_asked_for(tmp_path):
    for name in ("town/0.png", "field/1.png", "field/0.png"):
        write(tmp_path / "a" / name, NOISE.transpose(2, 0, 1))
    pack = packed(tmp_path / "a", RGB, "classes")
    assert pack.scenes == ["field/0", "field/1", "town/0"] and pack.classes == ["field", "town"]
    assert [classes_of(pack, row) for row in range(3)] == [["field"], ["field"], ["town"]]
    assert pack.one_label and pack.labels_from == "the names of the folders"
    pack = packed(tmp_path / "a", RGB)
    assert pack.labels.shape == (3, 0) and not pack.one_label and pack.labels_from == ""
    assert "--labels classes takes the folders: field, town" in pack.notes[0]


def table_folder(root, text):
    for name in ("a/0.png", "a/1.png", "b/1.png", "b/2.png"):
        write(root / "images" / name, NOISE.transpose(2, 0, 1))
    (root / "labels.csv").write_text(text)
    return root / "images", str(root / "labels.csv")


def test_a_table_labels_the_images_that_it_names_and_no_other(tmp_path):
    text = "image\twater\ttrees\n0\t1\t1\n\nb/1.png\t0\t1\n2.png\t1\t0\n"
    pack = packed(*table_folder(tmp_path, text)[:1], RGB, str(tmp_path / "labels.csv"))
    assert pack.classes == ["water", "trees"] and pack.labels_from == "labels.csv"
    assert pack.labels.tolist() == [[1, 1], [0, 0], [0, 1], [1, 0]] and not pack.one_label


@pytest.mark.parametrize("form", ["json", "csv", "parquet"])
def test_bigearthnet_has_19_classes_of_either_version_and_the_splits_of_v2(tmp_path, form):
    root = tmp_path / "a"
    if form == "json":
        names = ["S2A_MSIL2A_20170613T101031_61_39", "S2A_MSIL2A_20170613T101031_61_40"]
        folders = [root / "BigEarthNet-v1.0" / name for name in names]
        labels = [["Rice fields", "Vineyards", "Airports"], ["Burnt areas"]]
    else:
        names = [f"S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_26_5{k}" for k in range(3)]
        folders = [root / "BigEarthNet-S2" / name[:-6] / name for name in names]
        labels = [["Arable land", "Permanent crops"], [], ["Pastures"]]
    for name, folder, present in zip(names, folders, labels):
        write_bands(folder, S2A, 120)
        if form == "json":
            (folder / f"{name}_labels_metadata.json").write_text(json.dumps({"labels": present}))
    rows = [{"patch_id": names[k], "labels": labels[k], "split": split, "s1_name": "gone"}
            for k, split in enumerate(["validation", "test"])]       # a third patch has no row
    if form == "csv":
        text = "".join(f'{row["patch_id"]},{";".join(row["labels"])},{row["split"]},x\n'
                       for row in rows)
        (root / "metadata.csv").write_text(f"patch_id,labels,split,s1_name\n{text}")
    if form == "parquet":
        pytest.importorskip("pyarrow")
        pandas = pytest.importorskip("pandas")
        pandas.DataFrame(rows).to_parquet(root / "metadata.parquet")
    pack = packed(root, S2A)
    assert pack.names == names[:2] and len(pack.classes) == 19 and pack.size == 120
    assert classes_of(pack, 0) == ["Arable land", "Permanent crops"] and not pack.labels[1].any()
    assert pack.split.tolist() == (["", ""] if form == "json" else ["val", "test"])


# ----------------------------------------------------------------------------------------- packing


def test_two_processes_pack_the_same_bytes_as_one(world, tmp_path):
    archive = data.open_archive(world, S2C)
    for workers in (1, 2):
        data.pack(archive, str(tmp_path / str(workers)), workers=workers)
    for name in ("images.npy", "images.csv", "pack.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    with pytest.raises(data.InputError, match="1: exists; pack never overwrites"):
        data.pack(archive, str(tmp_path / "1"))


def test_a_disk_that_is_full_is_said_in_one_line_and_nothing_is_left(world, tmp_path):
    def a_small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    command = [sys.executable, data.__file__, "pack", world, tmp_path / "p", "--modality", "s2c",
               "--workers", "2"]
    done = subprocess.run(command, preexec_fn=a_small_disk, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(rf"\ndata.py: error: {tmp_path}/p.part\d+: not written \(File too large\)$",
                     done.stderr.rstrip())
    assert not os.listdir(tmp_path)


def by_hand(root, x=None, csv=None, fields=None):
    """A pack as numpy and a text editor make it."""
    root.mkdir()
    if x is None:
        x = np.random.default_rng(0).integers(0, 255, (5, 3, 8, 8), np.uint8)
    np.save(root / "images.npy", x)
    (root / "images.csv").write_text(csv or (
        "scene,image,split,labels\nb,b/0,train,tree;sea\na,a/0,val,\nb,b/1,train,tree\n"
        "a,a/1,test,sea\n\"c, d\",c,,\n"))
    (root / "pack.json").write_text(json.dumps(fields or {"sensor": "rgb"}))
    return str(root)


@pytest.mark.parametrize("fields", [
    {"sensor": "rgb"}, {"bands": ["R", "G", "B"], "kind": "rgb", "dtype": "uint8", "name": "rgb"}])
def test_a_pack_made_by_hand_is_a_pack(tmp_path, fields):
    pack = data.open_pack(by_hand(tmp_path / "p", fields=fields))
    assert pack.sensor == RGB and pack.size == 8 and pack.classes == ["sea", "tree"]
    assert pack.scenes == ["b", "a", "c, d"] and pack.names == ["b/0", "a/0", "b/1", "a/1", "c"]
    assert [rows.tolist() for rows in pack.rows] == [[0, 2], [1, 3], [4]]
    assert pack.labels.tolist() == [[1, 1], [0, 0], [0, 1], [1, 0], [0, 0]]
    assert pack.split.tolist() == ["train", "val", "train", "test", ""]
    assert pack.checksum == f"{zlib.crc32(b'b' + bytes([10]) + b'a' + bytes([10]) + b'c, d'):08x}"
    with pytest.raises(ValueError):
        pack.images[0] = 0                                           # read only


def test_read_copies_whole_images_in_any_order(tmp_path):
    x = np.random.default_rng(1).integers(0, 255, (5, 3, 8, 8), np.uint8)
    pack = data.open_pack(by_hand(tmp_path / "p", x))
    rows = np.array([4, 0, 0, 3], np.int32)
    out = np.zeros((4, 3, 8, 8), np.uint8)
    pack.read(rows, out)
    assert np.array_equal(out, pack.images[rows]) and np.array_equal(out, x[rows])
    os.truncate(tmp_path / "p" / "images.npy", os.path.getsize(tmp_path / "p" / "images.npy") - 1)
    with pytest.raises(data.InputError, match="images.npy: ends before image 4"):
        pack.read(rows, out)


def test_the_scenes_held_out_depend_on_their_names_alone():
    names = [f"{i:07d}" for i in range(5000)]
    out = data.held_out(names, 0.2)
    assert np.flatnonzero(out)[:8].tolist() == [3, 7, 23, 27, 33, 37, 46, 52]
    assert 0.18 < out.mean() < 0.22
    assert (data.held_out(names, 0.3) | ~out).all() and not data.held_out(names, 0).any()


# -------------------------------------------------------------------------- stats and command line


def test_statistics_equal_numpys_over_all_pixels_in_the_sensors_units(world):
    sensor = S2C
    archive = data.open_archive(world, sensor)
    x = np.float64([image.read() for image in archive.images])       # (n,C,H,W)
    table = data.statistics(archive, workers=2)
    for c in range(len(sensor.bands)):
        band, mean, std = x[:, c], sensor.mean[c], sensor.std[c]
        want = [band.mean(), band.std(), band.min(), band.max(), (band < mean - 2 * std).mean(),
                (band > mean + 2 * std).mean()]
        assert np.allclose(table[c], want, rtol=1e-9)


def test_stats_writes_a_sensor_for_some_channels_and_heeds_gdals_nodata(tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "a").mkdir()
    for i in range(4):
        x = np.stack([rng.normal(mean, 50, (24, 24)) for mean in (500, 900, 700, 3000)], axis=2)
        x[:3] = -9999
        tifffile.imwrite(tmp_path / "a" / f"{i}.tif", x.astype(np.int16), planarconfig="contig",
                         photometric="minisblack", extratags=[(42113, "s", 0, "-9999", True)])
    out = str(tmp_path / "my.json")
    data.main(["stats", str(tmp_path / "a"), "--bands", "B8", "B4", "B3", "B2", "--channels", "3",
               "2", "1", "0", "--out", out, "--workers", "1"])
    assert "0.tif: GDAL's tag says that -9999 is no data" in capsys.readouterr().out
    sensor = data.find_sensor(out)
    assert sensor.channels == [3, 2, 1, 0] and sensor.red_green_blue == [1, 2, 3]
    assert sensor.dtype == "int16" and sensor.name == "my" and sensor.nodata == -9999
    assert np.allclose(sensor.mean, [3000, 700, 900, 500], atol=4)
    assert np.allclose(sensor.std, 50, atol=4)
    x = packed(tmp_path / "a", sensor).images
    assert (x[:, :, :3] == 127).all() and np.abs(x[:, :, 3:].mean((0, 2, 3)) - 127.5).max() < 3
    capsys.readouterr()
    data.main(["stats", str(tmp_path / "a"), "--modality", out, "--workers", "1"])
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["B8", f"{sensor.mean[0]:.2f}"]


@pytest.mark.parametrize("command", [
    "pack a b", "stats a --bands x", "stats a --modality s1 --bands x --out y",
    "pack a b --modal s1"])
def test_flags_that_do_not_go_together_or_are_abbreviated_are_refused(command):
    with pytest.raises(SystemExit):
        data.main(command.split())


# ------------------------------------------------------------------------------------- odd inputs


def sensor(**change):
    def attempt(root):
        (root / "my.json").write_text(json.dumps(PLANET | change))
        data.find_sensor(str(root / "my.json"))
    return attempt


def image(name, harm, sensor=RGB):
    """Reads root/name, which `harm` writes: a function of its path, or its bytes."""
    def attempt(root):
        if isinstance(harm, bytes):
            (root / name).write_bytes(harm)
        else:
            harm(root / name)
        data.read_folder(str(root), sensor).images[0].read()
    return attempt


def archive(name, sensor, labels=None):
    """Opens root, in which name is an empty folder (or a file, if it has an ending)."""
    def attempt(root):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if "." in name:
            shutil.copy(root.parent / "x.png", root / name)
        else:
            (root / name).mkdir()
        data.open_archive(str(root), sensor, labels)
    return attempt


def table(text):
    def attempt(root):
        images, labels = table_folder(root, text)
        data.open_archive(str(images), RGB, labels)
    return attempt


def labels(text):
    """Joins a json to one product of one scene."""
    def attempt(root):
        tree(root, S1)
        (root / "l.json").write_text(text)
        data.open_archive(str(root / "a"), S1, str(root / "l.json"))
    return attempt


def zipped(bands, dtype):
    def attempt(root):
        pytest.importorskip("zarr")
        path = root / "S2L1C" / "a.zarr.zip"
        write_zip(path, np.zeros((1, 4, 13, 6, 6), dtype), bands, ["0"], [product_names(0, "s2c")])
        data.open_archive(str(root), S2C).images[0].read()
    return attempt


def pack(**parts):
    return lambda root: data.open_pack(by_hand(root / "p", **parts))


def band(name, harm):
    """Reads the product in the tree, after harm to one of its bands."""
    def attempt(root):
        tree(root, S2C)
        (product,) = (root / "a" / "s2c" / "0000000").iterdir()
        harm(product / f"{name}.tif")
        data.open_archive(str(root / "a"), S2C).images[0].read()
    return attempt


PNG, JPEG = imagecodecs.png_encode(NOISE), imagecodecs.jpeg8_encode(NOISE)
X = np.zeros((5, 3, 8, 8), np.uint8)
ROW = "scene,image,split,labels\na,a,{},{}\n"


@pytest.mark.parametrize("attempt, message", [
    (sensor(bnads=1), "my.json: sensor my: Sensor.__init__() got an unexpected keyword"),
    (sensor(bands=["a", "a", "b", "c"]), "a name twice"),
    (sensor(kind="sonar"), "my.json: kind 'sonar': not one of optical, radar, rgb"),
    (sensor(dtype="uint17"), "uint17"),
    (sensor(mean=[1]), "mean: 1 numbers for 4 bands"),
    (sensor(mean=list("abcd")), "sensor my: "),
    (sensor(std=[1, 1, 1, 0]), "not above 0"),
    (sensor(ratios=[2, 2, 2, 2]), "the finest band has 1"),
    (sensor(channels=[0, 1, 2, 2]), "one twice, or below 0"),
    (sensor(red_green_blue=[0, 1, 4]), "not three positions of 4 bands"),
    (sensor(scale=0), "units would not depend on pixels"),
    (image("x.tif", b""), "x.tif: unreadable"),
    (image("x.jpg", b"<html>"), "x.jpg: neither PNG nor JPEG"),
    (image("x.png", PNG[:len(PNG) // 2]), "x.png: unreadable"),
    (image("x.jpg", JPEG[:len(JPEG) // 2]), "x.jpg: JPEG is cut off"),
    (image("x.png", imagecodecs.png_encode(NOISE.astype(np.uint16))),
     "x.png: uint16 (3, 24, 24), expected 3 bands of uint8"),
    (image("x.tif", tiff(NOISE[..., :2], photometric="minisblack", planarconfig="contig")),
     "x.tif: uint8 (2, 24, 24), expected 3 bands"),
    (image("x.tif", tiff(NOISE[..., 0], photometric="palette", colormap=np.zeros((3, 256), "u2"))),
     "x.tif: its pixels are of the kind PALETTE"),
    (image("x.tif", tiff(NOISE[..., 0], photometric="miniswhite")), "of the kind MINISWHITE"),
    (image("x.tif", tiff(np.stack([NOISE, NOISE]), photometric="rgb")), "x.tif: 2 pages, not one"),
    (image("x.tif", tiff(np.stack([NOISE] * 3), photometric="rgb")), "several pages of several"),
    (image("x.tif", tiff(np.full((24, 24, 2), np.nan, "f4"), planarconfig="contig",
                         photometric="minisblack"), S1), "x.tif: NaN or infinite pixels"),
    (band("B8A", Path.unlink), "B8A.tif: missing"),
    (band("B4", lambda path: path.write_bytes(path.read_bytes()[:-1])), "B4.tif: unreadable"),
    (band("B4", tiff(np.zeros((24, 24), np.float32))), "B4.tif: float32 (1, 24, 24), expected"),
    (band("B5", tiff(np.zeros((24, 24), np.uint16))), "B5.tif: (24, 24) pixels, expected 12 x 12"),
    (archive("a", RGB), "no rgb images (.tif .tiff .png .jpg .jpeg) in it or its folders"),
    (archive("x.png", S1), "no s1 images (.tif .tiff) in it"),
    (archive("x.png", RGB, "classes"), "has no folders of classes"),
    (lambda root: [archive(name, RGB)(root) for name in ("x.jpg", "x.png")],
     "x.jpg and x.png have one name; if these are masks, move"),
    (lambda root: data.open_archive(by_hand(root / "p"), RGB), "is a pack already"),
    (archive("s1", S1), "s1: no scenes"),
    (archive("s1", S1, "classes"), "--labels classes: "),
    (archive("s1", S2C), "s2c: no such folder"),
    (archive("s1/0000000", S1), "scene without a product"),
    (archive("s1/0000000/notes", S1), "'notes' has no date"),
    (archive("S2", S2C), "S2: no patches"),
    (archive("S2", S1), "no BigEarthNet folder for modality s1"),
    (archive("BigEarthNet-S2/S2A_tile", S2A), "_labels_metadata.json: missing, and "),
    (labels("<html>"), "l.json: no JSON"),
    (labels("[]"), "l.json: its JSON is no"),
    (labels('{"0000000": 5}'), "l.json: not labels of the form"),
    (labels('{"0000000": {"p": ["9"]}}'), "l.json: not labels of the form"),
    (labels('{"0000001": {"20200101T000000_p": ["1"]}}'), "labels none of the products here"),
    (table(""), "labels.csv: empty"),
    (table("image\n0\n"), "labels.csv: its first row does not name the classes"),
    (table("0,1,0\n1,0,1\n"), "labels.csv: its first row does not name the classes"),
    (table("image,a,b\n0,1\n"), "labels.csv: 0: its labels are not 2 times 0 or 1"),
    (table("image,a,b\n0,1,0.5\n"), "labels.csv: 0: its labels are not 2 times 0 or 1"),
    (table("image,a,b\n0,1,0\n0.png,1,0\n"), "labels.csv: 0.png: its image has another row"),
    (table("image,a,b\n9,1,0\n"), "labels.csv: 9: no such image in"),
    (table("image,a,b\n1,1,0\n"), "labels.csv: 1: 2 images have that name, write folder/1"),
    (zipped(S2C.bands[::-1], "int16"), "a.zarr.zip: bands B12 B11"),
    (zipped(S2C.bands, "float32"), "place 0, season 0: float32 pixels, s2c has int16"),
    (archive("S2L1C/a.zarr.zip", S2C), "a.zarr.zip: no zip of SSL4EO-S12 v1.1"),
    (pack(x=X.astype(np.int16)), "images.npy: int16 (5, 3, 8, 8), expected uint8 (n, 3, side"),
    (pack(x=X[:, :2]), "images.npy: uint8 (5, 2, 8, 8), expected"),
    (pack(x=X[..., :7]), "images.npy: uint8 (5, 3, 8, 7), expected"),
    (pack(x=X[:4]), "4 images in images.npy, 5 in images.csv"),
    (pack(csv="image\na\n"), "images.csv: not scene,image,split,labels and their rows"),
    (pack(csv=ROW.format("", "") + "a,b\n"), "images.csv: line 3 has 2 cells, expected 4"),
    (pack(x=X[:1], csv=ROW.format("dev", "")), "images.csv: split {'dev'}, expected train"),
    (pack(x=X[:1], csv=ROW.format("", "lake"), fields={"sensor": "rgb", "classes": ["sea"]}),
     "images.csv: class 'lake' is not in pack.json"),
    (pack(fields={"sensor": "s9"}), "pack.json: --modality s9: unknown"),
    (pack(fields={"classes": []}), "pack.json: sensor own: "),
    (lambda root: data.open_pack(str(root)), "NEW_FOLDER --modality"),
])
def test_an_odd_input_is_refused_in_one_line_that_names_it(tmp_path, attempt, message):
    write(tmp_path / "x.png", NOISE.transpose(2, 0, 1))
    (tmp_path / "root").mkdir()
    with pytest.raises(data.InputError) as error:
        attempt(tmp_path / "root")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value) or "no date" in message


# ------------------------------------------------------------------------------------ augmentation


def identity(n):
    """Parameters that change nothing."""
    zeros = dict.fromkeys(["x", "y", "offset", "hue", "blur"], torch.zeros(n))
    ones = dict.fromkeys(["h", "w", "flip_x", "flip_y", "brightness", "contrast", "saturation"],
                         torch.ones(n))
    return {name: value.clone() for name, value in (zeros | ones).items()}


def pixels(n=3, c=5, size=12):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, c, size, size), dtype=torch.uint8, generator=generator)


def test_the_crop_of_a_whole_image_at_its_size_is_the_image():
    x = pixels()
    assert torch.allclose(data.crop(x, identity(3), 12), x / 255, atol=1e-6)
    assert torch.equal(data.colour(x / 255, identity(3)), x / 255)


def triangles(length, size):
    """(size, length): how much each of `length` pixels counts in each of `size`, by definition."""
    reach = max(1, length / size)              # an antialiasing triangle widens as pixels shrink
    weights = np.zeros((size, length))
    for i, j in np.ndindex(size, length):
        weights[i, j] = max(0, 1 - abs((i + 0.5) * length / size - (j + 0.5)) / reach)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [5, 20])      # windows of 6 to 12 pixels shrink, and grow
def test_a_crop_is_its_window_in_whole_pixels_resized_with_antialias_and_flipped_as_drawn(size):
    x = pixels(6, 2)
    p = data.draw_crops(6, torch.Generator().manual_seed(3))
    got = data.crop(x, p, size)
    assert len({(a, b) for a, b in zip(p["flip_y"].tolist(), p["flip_x"].tolist())}) > 2
    for n in range(6):
        height, width = round(12 * float(p["h"][n])), round(12 * float(p["w"][n]))
        top = round(6 * (1 + float(p["y"][n])) - height / 2)
        left = round(6 * (1 + float(p["x"][n])) - width / 2)
        window = x[n, :, top:top + height, left:left + width].numpy() / 255
        want = triangles(height, size) @ window @ triangles(width, size).T
        want = want[:, ::int(p["flip_y"][n]), ::int(p["flip_x"][n])]
        assert np.allclose(got[n].numpy(), want, atol=1e-5)


def test_crops_have_the_default_type():
    torch.set_default_dtype(torch.float64)
    try:
        generator = torch.Generator().manual_seed(0)
        p = data.draw_crops(3, generator) | data.draw_colours(3, RGB, generator, blur=1)
        view = data.colour(data.crop(pixels(3, 3), p, 8), p)
    finally:
        torch.set_default_dtype(torch.float32)
    assert view.dtype == torch.float64


def test_drawn_crops_lie_in_the_image_and_each_number_is_drawn_apart():
    p = data.draw_crops(20000, torch.Generator().manual_seed(0))
    area, aspect = p["h"] * p["w"], p["w"] / p["h"]
    assert area.min() > 0.15 and area.max() <= 1 and 0.55 < area.mean() < 0.62
    assert 0.74 < aspect.min() < 0.76 and 1.32 < aspect.max() < 1.34
    assert (p["x"].abs() + p["w"] <= 1 + 1e-6).all() and (p["y"].abs() + p["h"] <= 1 + 1e-6).all()
    apart = torch.stack([area, aspect.log(), p["y"], p["x"], p["flip_x"], p["flip_y"]])
    assert (torch.corrcoef(apart) - torch.eye(6)).abs().max() < 0.05
    for name in ("flip_x", "flip_y"):
        assert abs(p[name].mean()) < 0.03 and set(p[name].tolist()) == {-1, 1}


def blurred(image, std):
    """image (C,H,W) convolved with a Gaussian, by its definition; beyond the border: the border."""
    reach = int(np.ceil(3 * std))
    y, x = np.mgrid[-reach:reach + 1, -reach:reach + 1]
    weights = np.exp(-(x ** 2 + y ** 2) / (2 * std ** 2))
    padded = np.pad(image, ((0, 0), (reach, reach), (reach, reach)), "edge")
    out = np.zeros_like(image)
    for i, j in np.ndindex(*image.shape[1:]):
        part = padded[:, i:i + 2 * reach + 1, j:j + 2 * reach + 1]
        out[:, i, j] = (part * weights).sum((1, 2)) / weights.sum()
    return out


def recoloured(x, p, n):
    """Image n (C,H,W) of a view in float64: the formulas of draw_colours, one after another."""
    v = {name: value[n].double().numpy() for name, value in p.items()}
    x = x * v["brightness"] + v["offset"].reshape(-1, 1, 1)
    mean = x.mean((1, 2), keepdims=True)
    x = np.clip((x - mean) * v["contrast"] + mean, 0, 1)
    grey = x.mean(0, keepdims=True)
    x = grey + (x - grey) * v["saturation"]
    if len(x) == 3:
        angle = 2 * np.pi * v["hue"]
        side = np.stack([x[2] - x[1], x[0] - x[2], x[1] - x[0]]) / 3 ** 0.5      # across the grey
        x = np.clip(grey + np.cos(angle) * (x - grey) + np.sin(angle) * side, 0, 1)
    if v["blur"] > 0:
        x = blurred(x, v["blur"] * x.shape[-1] / 224)
    return x


@pytest.mark.parametrize("sensor", [S1, S2C, RGB], ids=["s1", "s2c", "rgb"])
def test_colours_change_by_their_formulas_in_their_order(sensor):
    x = pixels(24, len(sensor.bands), 16) / 255
    p = data.draw_colours(24, sensor, torch.Generator().manual_seed(1), grey=0.3)
    p["blur"] = p["blur"] * 12                                       # std of up to 1.7 pixels
    got = data.colour(x, p)
    reach = np.ceil(3 * float(p["blur"].max()) * 16 / 224)           # of all kernels
    for n in range(24):
        tolerance = 1e-5 if p["blur"][n] * 3 * 16 / 224 > reach - 1 or not p["blur"][n] else 4e-3
        assert np.abs(got[n].numpy() - recoloured(x[n].double().numpy(), p, n)).max() < tolerance


def test_drawn_colours_lie_in_their_ranges_by_kind_of_sensor():
    drawn = {sensor.name: data.draw_colours(4000, sensor, torch.Generator().manual_seed(0))
             for sensor in (S1, S2C, RGB)}
    optical, rgb = drawn["s2c"], drawn["rgb"]
    assert 0.77 < (optical["brightness"] != 1).float().mean() < 0.83
    for name in ("brightness", "contrast"):
        assert 0.6 <= optical[name].min() < 0.61 and 1.39 < optical[name].max() <= 1.4
        assert (drawn["s1"][name] == 1).all()
    assert (optical["hue"] == 0).all() and set(optical["saturation"].tolist()) == {0, 1}
    assert 0.17 < (optical["saturation"] == 0).float().mean() < 0.23
    assert 0.09 < rgb["hue"].max() <= 0.1 and 1.19 < rgb["saturation"].max() <= 1.2
    blur = optical["blur"][optical["blur"] > 0]
    assert 0.46 < len(blur) / 4000 < 0.54 and 0.1 < blur.min() < 0.11 and 1.98 < blur.max() < 2


@pytest.mark.parametrize("C", [1, 2, 5])
def test_radar_has_an_offset_in_decibels_for_each_band(C):
    sensor = replace(S1, bands=list("abcde"[:C]), mean=[0] * C, std=[5.0] * C, ratios=[],
                     channels=[])
    offset = data.draw_colours(4000, sensor, torch.Generator().manual_seed(0))["offset"]
    decibels = offset * 4 * 5
    assert offset.shape == (4000, C) and 1.98 < decibels.max() <= 2 and -2 <= decibels.min() < -1.98
    moved = offset[offset[:, 0] != 0]
    assert 0.77 < len(moved) / 4000 < 0.83 and (moved != 0).all()    # jittered together,
    if C > 1:
        assert (torch.corrcoef(moved.T) - torch.eye(C)).abs().max() < 0.1        # but not alike


# --------------------------------------------------------------------------------------- toy world


def test_the_toy_world_is_an_ssl4eo_v1_tree_and_the_same_everywhere(tmp_path):
    root = data.make_toy(str(tmp_path / "toy"), 4, 12, 3, 1)
    files = {"s1": [], "s2c": []}
    for path in sorted(Path(root).rglob("*.tif")):
        with tifffile.TiffFile(path) as file:
            assert {33550, 33922, 34735} <= set(file.pages[0].tags.keys())       # georeferenced
            files[path.relative_to(root).parts[0]].append(np.float64(file.asarray().ravel()))
    assert [len(files["s1"]), len(files["s2c"])] == [4 * 4 * 2, 4 * 4 * 13]
    numbers = [np.concatenate(x) for x in files.values()]
    means = [[x.mean(), x.std()] for x in numbers]
    assert np.allclose(means, [[-15.88379, 7.00210], [2224.9649, 1462.7404]], rtol=1e-4)
    assert zlib.crc32(Path(root, "ssl4eo_multilabel.json").read_bytes()) == 2537734565
    assert data.make_toy(root, 4, 12, 3) == root                     # left alone
    for scenes, size, message in ((5, 12, "exists and is not the toy world"), (4, 13, "exists")):
        with pytest.raises(data.InputError, match=message):
            data.make_toy(root, scenes, size, 3)


def test_the_toy_pack_is_made_once_where_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.make_toy("toy", 3, 12, workers=1)
    with pytest.raises(data.InputError, match="not the toy world"):  # of 2,000 scenes
        data.toy_pack("s1")
    by_hand(tmp_path / "toy_s2c")
    assert data.toy_pack("s2c") == "toy_s2c"
    with pytest.raises(data.InputError, match="the toy world has s1 and s2c"):
        data.toy_pack("rgb")
