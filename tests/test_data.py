"""Claims about data.py: what is read, scaled, joined, refused and packed; the augmentation."""
import importlib.util
import json
import os
import re
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch

import data
from conftest import seeded, write_pack
from data import SENSORS

S1, S2C, S2A, RGB = [SENSORS[name] for name in ("s1", "s2c", "s2a", "rgb")]
PLANET = {"bands": ["blue", "green", "red", "nir"], "kind": "optical", "dtype": "uint16",
          "mean": [500, 700, 800, 2500], "std": [200, 250, 350, 800]}
POWER = replace(S1, name="power", decibels=True)
ZARR = importlib.util.find_spec("zarr")
NOISE = np.random.default_rng(0).integers(0, 255, (3, 24, 24), np.uint8)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A toy world of 3 scenes of 12 px."""
    return data.make_toy(str(tmp_path_factory.mktemp("toy") / "world"), 3, 12, seed=1, workers=1)


def packed(root, sensor, labels=None, **options):
    """The pack of what lies in root, opened."""
    out = f"{root}_pack{len(list(Path(root).parent.iterdir()))}"
    data.pack(data.open_archive(str(root), sensor, labels), out, workers=1, **options)
    return data.open_pack(out)


def write(path, x, **options):
    """x (C,H,W): one TIFF of C channels, or a PNG or JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    x = x[0] if len(x) == 1 else x.transpose(1, 2, 0)
    if path.suffix == ".tif":
        options = {"photometric": "minisblack", "planarconfig": "contig"} | options
        tifffile.imwrite(path, x, metadata=None, **options)
    else:
        imagecodecs.imwrite(str(path), np.ascontiguousarray(x))


def write_bands(folder, sensor, side=24):
    """A product or a patch: a TIFF for each band, with pixels of its own size, at its mean."""
    for band, mean, ratio in zip(sensor.bands, sensor.mean, sensor.ratios):
        if side == 120:                                                          # BigEarthNet
            band = f"{folder.name}_" + re.sub(r"^B(\d)$", r"B0\1", band)
        x = np.full((1, side // ratio, side // ratio), mean).astype(sensor.dtype)
        write(folder / f"{band}.tif", x)


def product_names(place, kind):
    """Four names as SSL4EO-S12 has them, in order of time."""
    days = [f"2020{month:02d}{place + 1:02d}" for month in (1, 4, 7, 10)]
    if kind == "s1":
        return [f"S1A_IW_GRDH_1SDV_{day}T010203_{day}T010228_032911_03CFF0_9BAF" for day in days]
    return [f"{day}T054639_{day}T054831_T43RCP" for day in days]


def write_zip(path, x, bands, places, products, chunk=1):
    """SSL4EO-S12 v1.1: arrays in a zip of zarr, version 2."""
    zarr = pytest.importorskip("zarr")
    path.parent.mkdir(parents=True, exist_ok=True)
    with zarr.storage.ZipStore(path, mode="w") as store:
        file = zarr.open_group(store, mode="w", zarr_format=2)
        file.create_array("bands", data=x, chunks=(chunk, 1, *x.shape[2:]))
        for name, texts in {"band": bands, "sample": places, "file_id": products}.items():
            file.create_array(name, data=np.array(texts))


# ------------------------------------------------- every band at its mean is grey, whoever reads it


def tree(root, sensor):
    product = product_names(0, sensor.name)[0]
    write_bands(root / "a" / sensor.name / "0000000" / product, sensor)


def zips(root, sensor):
    on_disk = data.ZIP_SENSORS[sensor.name]
    x = np.zeros((1, 4, len(on_disk.mean), 24, 24), on_disk.dtype)
    values = np.array(on_disk.mean) - on_disk.offset
    x += (values if sensor is S1 else values.round()).astype(on_disk.dtype)[:, None, None]
    write_zip(root / "a" / "train" / data.ZIP_FOLDERS[sensor.name] / "a.zarr.zip", x, sensor.bands,
              ["0000000"], [product_names(0, sensor.name)])


def bigearthnet(root, sensor):
    patch = root / "a" / sorted(data.BEN_FOLDERS[sensor.name])[-1] / "S2A_p"
    write_bands(patch, S2A if sensor is S2C else sensor, 120)
    (patch / "S2A_p_labels_metadata.json").write_text('{"labels": ["Pastures"]}')


def folder(root, sensor):
    mean = np.float64(sensor.mean)
    if sensor.decibels:
        mean = 10 ** (mean / 10)
    channels = sensor.channels or [*range(len(mean))]
    stored = np.zeros((max(channels) + 1 + len(sensor.channels), 30, 24))    # some have more
    stored[channels] = ((mean - sensor.offset) / sensor.scale)[:, None, None]
    write(root / "a" / "0.tif", stored.astype(sensor.dtype))


UNIT = data.make_sensor({"bands": S2C.bands, "kind": "optical", "dtype": "float32", "scale": 1e4,
                         "mean": S2C.mean, "std": S2C.std})
PAN = data.make_sensor({"bands": ["pan"], "kind": "optical", "dtype": "uint8", "mean": [100],
                        "std": [30], "nodata": 0})
PICKED = data.make_sensor({"bands": ["B8", "B2"], "kind": "optical", "dtype": "uint16",
                           "mean": [900, 40], "std": [100, 20], "channels": [7, 1]})
FIRST = data.make_sensor({"bands": ["B1", "B2"], "kind": "optical", "dtype": "uint16",
                          "mean": [900, 40], "std": [100, 20], "channels": [0, 1]})


@pytest.mark.parametrize("write_archive, sensor", [
    (tree, S1), (tree, S2C), (tree, S2A), (zips, S1), (zips, S2C), (zips, S2A), (bigearthnet, S1),
    (bigearthnet, S2A), (bigearthnet, S2C), (folder, S1), (folder, S2C), (folder, S2A),
    (folder, SENSORS["eurosat"]), (folder, SENSORS["eurosat-own"]), (folder, UNIT), (folder, PAN),
    (folder, data.make_sensor(PLANET)), (folder, POWER), (folder, PICKED), (folder, FIRST)])
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
    mean = np.float32(S2C.mean)[:, None, None]
    std = np.float32(S2C.std)[:, None, None]
    for row in (0, 5, 11):
        bands = [data.resize(tifffile.imread(f"{world}/s2c/{pack.names[row]}/{band}.tif")[None], 12)
                 for band in S2C.bands]
        x = np.concatenate(bands).astype(np.float32)
        scaled = (x - (mean - 2 * std)) * (255 / (4 * std)) + 0.5
        assert np.array_equal(pack.images[row], np.clip(scaled, 0, 255).astype(np.uint8))
    assert pack.names == sorted(pack.names)                # scene by scene, in order of time
    assert pack.scenes == [f"{i:07d}" for i in range(3)]
    assert pack.rows[2].tolist() == [8, 9, 10, 11]


def test_eurosats_last_channel_is_b8a_the_ninth_band():
    for name in ("eurosat", "eurosat-own"):
        bands = np.array(SENSORS[name].bands)[np.argsort(SENSORS[name].channels)]
        assert bands.tolist() == [*S2C.bands[:8], *S2C.bands[9:], "B8A"]


@pytest.mark.parametrize("kind", [
    {}, {"rowsperstrip": 5}, {"byteorder": ">"}, {"bigtiff": True}, {"tile": (16, 32)},
    {"compression": "lzw"}, {"tile": (16, 16), "compression": "zlib", "predictor": True}], ids=str)
def test_every_kind_of_tiff_is_read_as_it_was_written_whole_or_by_a_window(tmp_path, kind):
    for dtype in ("uint8", "uint16", "float32", "int16"):
        for shape in ((1, 33, 41), (1, 1, 7), (3, 20, 50)):
            x = (np.random.default_rng(0).standard_normal(shape) * 50).astype(dtype)
            write(tmp_path / "x.tif", x, **kind)
            got = data.read_tiff(tmp_path / "x.tif", len(x))
            assert got.dtype == dtype and np.array_equal(got, x)
            if ZARR and shape[1] > 1:
                window = data.read_tiff(tmp_path / "x.tif", len(x), (3, 13, 17))
                assert np.array_equal(window, x[:, 3:20, 13:30])


def test_bands_are_read_from_channels_planes_and_pages_alike_and_smaller_copies_are_not(tmp_path):
    x = np.random.default_rng(0).integers(0, 999, (4, 8, 4), np.uint16)         # as wide as deep
    write(tmp_path / "a.tif", x)
    tifffile.imwrite(tmp_path / "b.tif", x, photometric="minisblack", planarconfig="separate")
    with tifffile.TiffWriter(tmp_path / "c.tif") as file:
        file.write(x, photometric="minisblack", metadata=None)
        file.write(x[0, ::2, ::2], photometric="minisblack", subfiletype=1, metadata=None)
    with tifffile.TiffWriter(tmp_path / "d.tif") as file:
        file.write(x[0, ::2, ::2], photometric="minisblack", subfiletype=1, metadata=None)
        file.write(x, photometric="minisblack", metadata=None)
    for name in ("a.tif", "b.tif", "c.tif", "d.tif"):
        assert np.array_equal(data.read_tiff(tmp_path / name, bands=4), x)
        if ZARR:
            assert np.array_equal(data.read_tiff(tmp_path / name, 4, (2, 1, 3)), x[:, 2:5, 1:4])
        assert data.size_of(f"{tmp_path}/{name}") == (8, 4)


def test_of_a_tiled_tiff_only_the_tiles_under_the_window_are_read(tmp_path):
    pytest.importorskip("zarr")
    x = np.random.default_rng(0).integers(0, 255, (1, 64, 64), np.uint8)
    write(tmp_path / "x.tif", x, tile=(16, 16), compression="zlib")
    with tifffile.TiffFile(tmp_path / "x.tif") as file:
        places = zip(file.pages[0].dataoffsets, file.pages[0].databytecounts)
    raw = bytearray((tmp_path / "x.tif").read_bytes())
    for i, (place, length) in enumerate(places):
        if i not in (5, 6):                                # damage all tiles but two
            raw[place:place + length] = bytes(length)
    (tmp_path / "x.tif").write_bytes(raw)
    assert np.array_equal(data.read_tiff(tmp_path / "x.tif", 1, (17, 20, 14)), x[:, 17:31, 20:34])
    with pytest.raises(data.InputError, match="x.tif: unreadable"):
        data.read_tiff(tmp_path / "x.tif", 1, (17, 20, 20))


def test_grey_becomes_three_bands_and_opacity_is_left_out(tmp_path):
    opaque = np.concatenate([NOISE, NOISE[:1] * 0])
    write(tmp_path / "a" / "0.png", NOISE[:1])
    write(tmp_path / "a" / "1.png", opaque)
    write(tmp_path / "a" / "2.tif", opaque, photometric="rgb", extrasamples=["unassalpha"])
    write(tmp_path / "a" / "3.tif", NOISE[:1])
    shutil.copy(tmp_path / "a" / "1.png", tmp_path / "a" / "4.jpg")              # whatever its name
    images = packed(tmp_path / "a", RGB).images
    for row, want in enumerate([NOISE[[0, 0, 0]], NOISE, NOISE, NOISE[[0, 0, 0]], NOISE]):
        assert np.array_equal(images[row], want), row


def test_pixels_without_a_measurement_become_the_mean_and_are_in_no_statistics(tmp_path):
    sensor = data.make_sensor(PLANET | {"nodata": 0})
    x = np.full((4, 24, 24), 600, np.uint16)
    x[:, 12:] = 800
    x[:, :3] = 0
    write(tmp_path / "a" / "0.tif", x)
    pack = packed(tmp_path / "a", sensor)
    assert (pack.images[0, :, :3] == 127).all() and not (pack.images[0, :, 3:] == 127).any()
    table = data.statistics(data.open_archive(str(tmp_path / "a"), sensor))
    assert np.allclose(table, [x[0, 3:].mean(), x[0, 3:].std(), 600, 800])
    not_a_number = replace(S1, nodata=float("nan"))
    assert np.isnan(data.to_units(np.float32([np.nan, 1]), not_a_number)).tolist() == [True, False]


def test_power_of_zero_or_less_has_no_decibels_and_becomes_the_mean():
    power = np.float32([[[1, 10, 0, -3]], [[0.1, 1000, 1e-5, 1]]])
    got = data.to_units(power, POWER)
    assert np.allclose(got, [[[0, 10, np.nan, np.nan]], [[-10, 30, -50, 0]]], equal_nan=True)
    assert (data.to_uint8(got, POWER)[0, 0, 2:] == 127).all()


def test_to_input_gives_what_the_pack_holds(tmp_path):
    x = np.random.default_rng(0).integers(0, 3000, (4, 24, 24), np.uint16)
    sensor = data.make_sensor(PLANET | {"nodata": 7, "offset": -100.0})
    write(tmp_path / "a" / "0.tif", x)
    want = torch.tensor(packed(tmp_path / "a", sensor).images[0]) / 255
    assert torch.equal(data.to_input(x, sensor)[0], want)


def test_an_image_of_another_size_is_its_central_square_resized(tmp_path):
    for i in range(3):
        write(tmp_path / "a" / f"{i}.png", np.full((3, 8, 8), 9, np.uint8))
    x = np.zeros((3, 16, 24), np.uint8)
    x[:, :, 4:20] = 50
    write(tmp_path / "a" / "3.png", x)
    pack = packed(tmp_path / "a", RGB)
    assert pack.size == 8 and (pack.images[3] == 50).all() and (pack.images[0] == 9).all()
    assert pack.notes[0].startswith("1 of 4 images are not 8 x 8: their central square")
    assert pack.notes[1].startswith("1 of 4 images lose more than a tenth")
    assert packed(tmp_path / "a", RGB, size=4).images.shape == (4, 3, 4, 4)
    steps = np.array([[[0.0, 4.0], [0.0, 4.0]]])
    assert np.allclose(data.resize(steps, 4), [0, 1, 3, 4])          # pixel centres are aligned
    stripes = np.tile([0.0, 9.0, 0.0, 0.0], (1, 16, 4))
    assert np.allclose(data.resize(stripes, 4)[..., 1:3], 9 / 4, atol=0.6)       # no aliasing


def test_a_bad_image_is_named_and_left_out_only_if_asked(tmp_path, capsys):
    write(tmp_path / "a" / "good.png", NOISE)
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


@pytest.mark.parametrize("error", [
    NameError("undefined"), MemoryError(), OSError(5, "Input/output error"),
    ImportError("No module", name="zarr")], ids=repr)
def test_what_is_no_fault_of_the_file_is_never_skipped(tmp_path, error):
    def read():
        with data.reading("a.tif"):
            raise error
    archive = data.Archive([data.Image("a", "a.tif", read)], S1)
    kind = data.MissingPackage if isinstance(error, ImportError) else type(error)
    with pytest.raises(kind) as caught:
        data.pack(archive, str(tmp_path / "p"), size=8, skip_bad=True, workers=1)
    assert not isinstance(error, OSError) or caught.value.filename == "a.tif"
    assert not os.listdir(tmp_path)


# ------------------------------------------------------------------------------------------ labels


def classes_of(pack, row):
    return [pack.classes[k] for k in np.flatnonzero(pack.labels[row])]


def test_labels_join_by_product_name_and_those_of_radar_by_order_of_time(world, tmp_path):
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

    shutil.copytree(f"{world}/s1", tmp_path / "a" / "s1")            # three products, four labels:
    shutil.rmtree(sorted((tmp_path / "a" / "s1" / "0000000").iterdir())[0])
    pack = packed(tmp_path / "a", S1, f"{world}/ssl4eo_multilabel.json")
    assert not pack.labels[:3].any() and np.array_equal(pack.labels[3:], radar.labels[4:])


def test_l2a_products_of_other_names_take_the_labels_of_l1c_by_order(world, tmp_path):
    for product in Path(world, "s2c").glob("*/*"):
        name = product.name.replace("T43RCP", "T43RCQ")
        write_bands(tmp_path / "a" / "s2a" / product.parent.name / name, S2A, 12)
    table = json.loads(Path(world, "ssl4eo_multilabel.json").read_text())
    want = packed(world, S2C).labels.copy()
    shutil.copytree(f"{world}/s2c", tmp_path / "a" / "s2c")
    del table["0000002"][sorted(table["0000002"])[0]]      # its place in the order is still known
    want[8] = 0
    (tmp_path / "a" / "ssl4eo_multilabel.json").write_text(json.dumps(table))
    assert np.array_equal(packed(tmp_path / "a", S2A).labels, want)


@pytest.mark.parametrize("chunk", [1, 2])
def test_v11_zips_are_read_in_order_of_time_less_1000_and_join_their_labels(tmp_path, chunk):
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


def test_class_folders_are_labels_only_when_asked_for_and_hidden_files_are_no_images(tmp_path):
    for name in ("town/0.png", "field/1.png", "field/0.png", ".hidden/x.png", "town/._x.png"):
        write(tmp_path / "a" / name, NOISE)
    pack = packed(tmp_path / "a", RGB, "classes")
    assert pack.scenes == ["field/0", "field/1", "town/0"] and pack.classes == ["field", "town"]
    assert [classes_of(pack, row) for row in range(3)] == [["field"], ["field"], ["town"]]
    assert pack.one_label and pack.labels_from == "the names of the folders"
    pack = packed(tmp_path / "a", RGB)
    assert pack.labels.shape == (3, 0) and not pack.one_label and pack.labels_from == ""


def test_a_table_labels_the_images_that_it_names_and_no_other(tmp_path):
    text = "image\twater\ttrees\n0\t1\t1\n\nb/1.png\t0\t1\n2.png\t1\t0"
    opened = table(text)(tmp_path)
    assert opened.classes == ("water", "trees") and opened.labels_from == "labels.csv"
    assert [image.labels for image in opened.images] == [
        ("water", "trees"), (), ("trees",), ("water",)]


@pytest.mark.parametrize("version", [1, 2])
def test_bigearthnet_has_19_classes_of_either_version_and_the_splits_of_v2(tmp_path, version):
    names = [f"S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_26_5{k}" for k in range(3)]
    if version == 1:
        labels = [["Rice fields", "Vineyards", "Airports"], ["Burnt areas"], ["Salines"]]
        for name, present in zip(names, labels):
            patch = tmp_path / "a" / "BigEarthNet-v1.0" / name
            write_bands(patch, S2A, 120)
            (patch / f"{name}_labels_metadata.json").write_text(json.dumps({"labels": present}))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet
        for name in names:
            write_bands(tmp_path / "a" / "BigEarthNet-S2" / "S2A_tile" / name, S2A, 120)
        table = {"patch_id": names[:2], "labels": [["Arable land", "Permanent crops"], []],
                 "split": ["validation", "test"], "s1_name": ["gone", "too"]}
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a" / "metadata.parquet")
    pack = packed(tmp_path / "a", S2A)
    assert len(pack.classes) == 19 and pack.size == 120
    assert classes_of(pack, 0) == ["Arable land", "Permanent crops"] and not pack.labels[1].any()
    if version == 1:
        assert classes_of(pack, 2) == ["Coastal wetlands"] and pack.split.tolist() == ["", "", ""]
    else:                                                            # the third patch has no row
        assert pack.names == names[:2] and pack.split.tolist() == ["val", "test"]


# ----------------------------------------------------------------------------------------- packing


def test_two_processes_pack_the_same_bytes_as_one(world, tmp_path):
    archive = data.open_archive(world, S2C)
    for workers in (1, 2):
        data.pack(archive, str(tmp_path / str(workers)), workers=workers)
    for name in ("images.npy", "images.csv", "pack.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    with pytest.raises(data.InputError, match="1: exists; pack never overwrites"):
        data.pack(archive, str(tmp_path / "1"))


ROWS = ["b,b/0,train,tree;sea", "a,a/0,val,", "b,b/1,train,tree", "a,a/1,test,sea", '"c, d",c,,']


def by_hand(root, x=None, rows=ROWS, index=None):
    """A pack of five images of 8 px."""
    if x is None:
        x = np.random.default_rng(0).integers(0, 255, (5, 3, 8, 8), np.uint8)
    return write_pack(root, x, rows, index or {"sensor": "rgb"})


@pytest.mark.parametrize("index", [
    {"sensor": "rgb"}, {"bands": ["R", "G", "B"], "kind": "rgb", "dtype": "uint8", "name": "rgb"}])
def test_a_pack_made_by_hand_is_a_pack(tmp_path, index):
    pack = data.open_pack(by_hand(tmp_path / "p", index=index))
    assert pack.sensor == RGB and pack.size == 8 and pack.classes == ["sea", "tree"]
    assert pack.scenes == ["b", "a", "c, d"] and pack.names == ["b/0", "a/0", "b/1", "a/1", "c"]
    assert [rows.tolist() for rows in pack.rows] == [[0, 2], [1, 3], [4]]
    assert pack.labels.tolist() == [[1, 1], [0, 0], [0, 1], [1, 0], [0, 0]] and not pack.one_label
    assert pack.split.tolist() == ["train", "val", "train", "test", ""]
    assert pack.checksum == f"{zlib.crc32(b'b' + bytes([10]) + b'a' + bytes([10]) + b'c, d'):08x}"


def test_read_copies_whole_images_in_any_order(tmp_path):
    pack = data.open_pack(by_hand(tmp_path / "p"))
    rows = np.array([4, 0, 0, 3], np.int32)
    out = np.zeros((4, 3, 8, 8), np.uint8)
    pack.read(rows, out)
    assert np.array_equal(out, pack.images[rows])
    os.truncate(tmp_path / "p" / "images.npy", os.path.getsize(tmp_path / "p" / "images.npy") - 1)
    with pytest.raises(data.InputError, match="images.npy: ends before image 4"):
        pack.read(rows, out)


def test_the_scenes_held_out_depend_on_their_names_alone():
    names = [f"{i:07d}" for i in range(5000)]
    out = data.held_out(names, 0.2)
    assert np.flatnonzero(out)[:8].tolist() == [3, 7, 23, 27, 33, 37, 46, 52]
    assert 0.18 < out.mean() < 0.22
    assert np.array_equal(data.held_out(names[::-1], 0.2), out[::-1])
    assert (data.held_out(names, 0.3) | ~out).all() and not data.held_out(names, 0).any()


# --------------------------------------------------------------------------------- chips and masks


THREE = '{"sea": "#0000ff", "land": "#00FF00 #FF0000", "unlabelled": "#000000"}'


def colours_file(root, text=THREE):
    (root / "colours.json").write_text(text)
    return str(root / "colours.json")


COLOURS = np.uint8([[0, 0, 255], [0, 255, 0], [255, 0, 0], [0, 0, 0]])
NUMBERS = np.uint8([0, 1, 1, 255])                         # of these colours, by colours_file


def masked_images(root, sizes):
    """Images of these sizes (H,W) in root/a, coloured masks beside them -> {name: (x, mask)}."""
    rng = np.random.default_rng(0)
    found = {}
    for i, (H, W) in enumerate(sizes):
        x = rng.integers(0, 255, (3, H, W), np.uint8)
        place = rng.integers(0, 4, (H, W))
        write(root / "a" / f"{i}.png", x)
        write(root / "a" / f"{i}_mask.png", COLOURS[place].transpose(2, 0, 1))
        found[f"{i}.png"] = (x, NUMBERS[place])
    return found


def pack_of(root, **options):
    archive = data.open_archive(str(root / "a"), RGB, masks="_mask.png", colours=colours_file(root))
    data.pack(archive, str(root / "p"), workers=1, **options)
    return data.open_pack(str(root / "p"))


@pytest.mark.parametrize("stride", [0, 10])
def test_chips_and_their_masks_are_slices_of_the_image_and_cover_it_bit_for_bit(tmp_path, stride):
    images = masked_images(tmp_path, [(50, 41), (20, 20), (10, 30)])
    pack = pack_of(tmp_path, chip=20, stride=stride)
    assert pack.chip == 20 and pack.scenes == ["0", "1", "2"] and pack.size == 20
    seen = np.zeros((50, 41), bool)
    for name, x, mask in zip(pack.names, pack.images, pack.masks, strict=True):
        if not name.startswith("0.png/"):
            continue
        top, left = map(int, name.removeprefix("0.png/").split("_"))
        want_x, want_mask = images["0.png"]
        assert np.array_equal(x, want_x[:, top:top + 20, left:left + 20])
        assert np.array_equal(mask, want_mask[top:top + 20, left:left + 20])
        seen[top:top + 20, left:left + 20] = True
    assert seen.all() and len(pack.rows[0]) == (9 if stride == 0 else 16)
    assert pack.names[-2:] == ["1.png", "2.png"]           # a side is not longer than a chip: whole
    assert np.array_equal(pack.images[-2], images["1.png"][0])
    assert "1 of " in pack.notes[1] and "their central square is resized" in pack.notes[1]


def test_chips_that_are_mostly_without_data_are_left_out_and_counted(tmp_path):
    pytest.importorskip("zarr")
    sensor = data.make_sensor(PLANET | {"nodata": 0})
    x = np.full((4, 24, 48), 600, np.uint16)
    x[:, :, 4:36] = 0                                      # of chips of 24: 20 columns, and 12
    write(tmp_path / "a" / "0.png", x)
    pack = packed(tmp_path / "a", sensor, chip=24)
    assert pack.names == ["0.png/0_24"]
    assert "1 of 2 chips are mostly without data and left out" in pack.notes
    write(tmp_path / "b" / "0.png", 0 * x)
    with pytest.raises(data.InputError, match="nothing to pack: .*; 2 of 2 chips are mostly"):
        packed(tmp_path / "b", sensor, chip=24)


@pytest.mark.parametrize("place", ["masks", ""])           # in a folder, or beside
def test_a_mask_is_cut_and_resized_as_its_image_and_labels_it_by_classes_of_5_percent(
        tmp_path, place):
    write(tmp_path / "a" / "0.jpg", NOISE[:, :20])         # 20 x 24
    mask = np.zeros((20, 24), np.uint8)
    mask[:, 4:6] = 2
    mask[:2, 7:10] = 1                                     # 6 of 400 pixels: no label
    mask[:, :2] = 3                                        # outside the central square
    write(tmp_path / "a" / place / "0.png", mask[None])
    masks = f"{tmp_path}/a/masks" if place else ".png"
    archive = data.open_archive(str(tmp_path / "a"), RGB, masks=masks)
    data.pack(archive, str(tmp_path / "p"), workers=1, size=10)
    pack = data.open_pack(str(tmp_path / "p"))
    assert np.array_equal(pack.masks[0], mask[1::2, 3:22:2]) and pack.names == ["0.jpg"]
    assert pack.mask_classes == ["0", "1", "2"] and classes_of(pack, 0) == ["0", "2"]


def test_masks_of_0_and_255_are_one_class_unless_colours_make_255_another(tmp_path):
    mask = np.uint8([[0, 255], [255, 255]]).repeat(12, 0).repeat(12, 1)
    write(tmp_path / "a" / "0.png", NOISE)
    write(tmp_path / "a" / "0_m.png", mask[None])
    with pytest.raises(data.InputError, match="have not two classes; 255 is unlabelled: --colours"):
        data.pack(data.open_archive(str(tmp_path / "a"), RGB, masks="_m.png"), str(tmp_path / "p"))
    colours = colours_file(tmp_path, '{"no": "#000000", "yes": "#FFFFFF"}')
    archive = data.open_archive(str(tmp_path / "a"), RGB, masks="_m.png", colours=colours)
    data.pack(archive, str(tmp_path / "p"), workers=1)
    assert np.array_equal(data.open_pack(str(tmp_path / "p")).masks[0], mask // 255)


@pytest.mark.parametrize("harm, message", [
    (lambda mask: write(mask, COLOURS[np.zeros((30, 30), int)].transpose(2, 0, 1)),
     "0.png: (50, 41) pixels, its mask (30, 30)"),
    (lambda mask: write(mask, np.full((3, 50, 41), 9, np.uint8)),
     "0_mask.png: colour #090909 is not in --colours"),
    (lambda mask: mask.unlink(), "0_mask.png: missing"),
    (lambda mask: write(mask, np.full((1, 50, 41), 300, np.uint16)),
     "0_mask.png: uint16 (3, 20, 20), no mask of 1 channel")])
def test_a_bad_mask_is_named_and_its_image_left_out_only_if_asked(tmp_path, capsys, harm, message):
    masked_images(tmp_path, [(50, 41), (20, 20)])
    harm(tmp_path / "a" / "0_mask.png")
    with pytest.raises(data.InputError, match="images cannot be read, see above; --skip-bad"):
        pack_of(tmp_path, chip=20)
    printed = capsys.readouterr().out.splitlines()
    assert all(message in line for line in printed) and len(printed) in (1, 9)
    pack = pack_of(tmp_path, chip=20, skip_bad=True)
    assert pack.names == ["1.png"] and pack.masks.shape == (1, 20, 20)


# -------------------------------------------------------------------------- stats and command line


def test_stats_writes_a_sensor_for_some_channels_and_heeds_gdals_nodata(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(4):
        x = np.stack([rng.normal(mean, 50, (24, 24)) for mean in (500, 900, 700, 3000)])
        x[:, :3] = -9999
        write(tmp_path / "a" / f"{i}.tif", x.astype(np.int16),
              extratags=[(42113, "s", 0, "-9999", True)])
    out = str(tmp_path / "my.json")
    data.main(["stats", str(tmp_path / "a"), *"--bands B8 B4 B3 B2 --channels 3 2 1 0".split(),
               "--out", out, "--workers", "1"])
    assert "0.tif: GDAL's tag says that -9999 is no data" in capsys.readouterr().out
    sensor = data.find_sensor(out)
    assert sensor.channels == [3, 2, 1, 0] and sensor.red_green_blue == [1, 2, 3]
    assert sensor.dtype == "int16" and sensor.name == "my" and sensor.nodata == -9999
    assert np.allclose(sensor.mean, [3000, 700, 900, 500], atol=4)
    assert np.allclose(sensor.std, 50, atol=4)


# ------------------------------------------------------------------------------------- odd inputs
# Each is a function of an empty folder.

PNG = imagecodecs.png_encode(np.ascontiguousarray(NOISE.transpose(1, 2, 0)))
JPEG = imagecodecs.jpeg8_encode(np.ascontiguousarray(NOISE.transpose(1, 2, 0)))
RADAR = {f"s1/0000000/{product_names(0, 's1')[0]}/{band}.tif": NOISE[:1] for band in S1.bands}
FOUR = dict.fromkeys(("a/0.png", "a/1.png", "b/1.png", "b/2.png"), PNG)
X = np.zeros((5, 3, 8, 8), np.uint8)
BAD_ZIP = "a.zarr.zip: no zip of SSL4EO-S12 v1.1"
if not ZARR:
    BAD_ZIP = "a.zarr.zip: needs a package: pip install zarr"


def sensor(**change):
    return lambda root: data.make_sensor(PLANET | change, "my")


def commanded(write_archive, sensor, root, *flags):
    write_archive(root, sensor)
    data.main(["pack", f"{root}/a", f"{root}/p", "--modality", sensor.name, *flags])


def pack(**parts):
    return lambda root: data.open_pack(by_hand(root / "p", **parts))


def masks(y):
    """Opens a pack with these masks."""
    def attempt(root):
        by_hand(root / "p")
        np.save(root / "p" / "masks.npy", y)
        data.open_pack(str(root / "p"))
    return attempt


def colours(root, text):
    data.read_colours(colours_file(root, text))


def find_masks(root, masks):
    data.find_masks(str(root), ["x.png"], masks)


def archive(files, sensor, labels=None, **options):
    """Opens a folder with these files, and reads the first image in it.

    files: {path: pixels (C,H,W), bytes or text, None for a folder}
    """
    def attempt(root):
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                path.mkdir()
            elif isinstance(content, np.ndarray):
                write(path, content, **options)
            else:
                path.write_bytes(content.encode() if isinstance(content, str) else content)
        opened = data.open_archive(str(root), sensor, labels and str(root / labels))
        opened.images[0].read()
        return opened
    return attempt


def image(name, x, sensor=RGB, **options):
    return archive({name: x}, sensor, **options)


def table(text):
    return archive(FOUR | {"labels.csv": text}, RGB, "labels.csv")


def labels(text):
    return archive(RADAR | {"l.json": text}, S1, "l.json")


def bands(sensor, **harm):
    """Reads a product, after harm to some of its bands."""
    def attempt(root):
        tree(root, sensor)
        for name, spoil in harm.items():
            (path,) = root.glob(f"a/*/*/*/{name}.tif")
            spoil(path)
        data.open_archive(str(root / "a"), sensor).images[0].read()
    return attempt


@pytest.mark.parametrize("attempt, message", [
    (sensor(bnads=1), "sensor my: unsuitable (TypeError: Sensor.__init__() got an unexpected"),
    (sensor(kind="sonar"), "sensor my: kind 'sonar': not one of optical, radar, rgb"),
    (sensor(mean=[1]), "mean: 1 numbers for 4 bands"),
    (image("x.tif", b""), "x.tif: unreadable"),
    (image("x.jpg", b"<html>"), "x.jpg: neither PNG nor JPEG"),
    (image("x.jpg", JPEG[:len(JPEG) // 2]), "x.jpg: JPEG is cut off"),
    (image("x.png", NOISE.astype("u2")), "x.png: uint16 (3, 24, 24), expected 3 bands of uint8"),
    (image("x.tif", NOISE[:1], photometric="palette", colormap=np.zeros((3, 256), "u2")),
     "x.tif: its pixels are of the kind PALETTE"),
    (image("x.tif", np.full((2, 24, 24), np.nan, "f4"), S1), "x.tif: NaN or infinite pixels"),
    (bands(S2C, B8A=Path.unlink), "B8A.tif: missing"),
    (bands(S2C, B4=lambda path: os.truncate(path, os.path.getsize(path) - 1)),
     "B4.tif: unreadable"),
    (archive({"a": None}, RGB), "no rgb images (.tif .tiff .png .jpg .jpeg) in it or its folders"),
    (archive({"x.jpg": PNG, "x.png": PNG}, RGB),
     "x.jpg and x.png have one name; if these are masks, say --masks .png"),
    (archive({"images.npy": b""}, RGB), "is a pack already"),
    (archive({"s1": None}, S2C), "s2c: no such folder"),
    (archive({"S2": None}, S2C), "S2: no patches"),
    (archive({"BigEarthNet-S2/S2A_tile": None}, S2A), "_labels_metadata.json: missing, and "),
    (labels('{"0000000": {"p": ["9"]}}'), "l.json: not labels of the form"),
    (labels('{"0000001": {"20200101T000000_p": ["1"]}}'), "labels none of the products here"),
    (table("0,1,0\n1,0,1\n"), "labels.csv: its first row does not name the classes"),
    (table("image,a,b\n0,1,0.5\n"), "labels.csv: 0: its labels are not 2 times 0 or 1"),
    (table("image,a,b\n1,1,0\n"), "labels.csv: 1: the name of 2 images in"),
    (archive({"S2L1C/a.zarr.zip": b"PK"}, S2C), BAD_ZIP),
    (pack(x=X.astype(np.int16)), "images.npy: int16 (5, 3, 8, 8), expected uint8 (n, 3, side"),
    (pack(x=X[:4]), "4 images in images.npy, 5 in images.csv"),
    (pack(rows=["a,a,,", "a,b"]), "images.csv: row 3 has 2 cells, expected 4"),
    (pack(rows=["a,a,dev,"]), "images.csv: row 2 has split 'dev', expected train"),
    (pack(x=X[:1], rows=["a,a,,lake"], index={"sensor": "rgb", "classes": ["sea"]}),
     "images.csv: class 'lake' is not in pack.json"),
    (pack(index={"sensor": "s9"}), "pack.json: --modality s9: unknown"),
    (masks(np.zeros((5, 8, 8), "i2")), "masks.npy: int16 (5, 8, 8), expected uint8 (5, 8, 8)"),
    (lambda root: colours(root, '{"a": "#fff"}'), "colours.json: #fff is not #RRGGBB"),
    (lambda root: colours(root, '{"a": "#ABCDEF", "b": "#abcdef"}'), "#abcdef is twice in it"),
    (lambda root: find_masks(root, "maks"), "--masks maks: no folder, and no ending such as .png"),
    (lambda root: commanded(tree, S1, root, "--masks", ".png"), "--masks: goes with folders of"),
    (lambda root: data.open_pack(str(root)), "NEW_FOLDER --modality"),
])
def test_an_odd_input_is_refused_in_one_line_that_names_it(tmp_path, attempt, message):
    with pytest.raises((data.InputError, data.MissingPackage)) as error:
        attempt(tmp_path)
    line = str(error.value)
    assert message in line and "\n" not in line
    assert any(name in line for name in (str(tmp_path), "sensor my", "--masks"))


# ------------------------------------------------------------------------------------ augmentation


def triangles(length, size):
    """(size, length): how much each of `length` pixels counts in each of `size`, by definition."""
    reach = max(1, length / size)              # an antialiasing triangle widens as pixels shrink
    weights = np.zeros((size, length))
    for i, j in np.ndindex(size, length):
        weights[i, j] = max(0, 1 - abs((i + 0.5) * length / size - (j + 0.5)) / reach)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [5, 20])      # windows of 6 to 12 pixels shrink, and grow
def test_a_crop_is_its_window_in_whole_pixels_resized_with_antialias_and_flipped_as_drawn(size):
    x = torch.randint(256, (6, 2, 12, 12), dtype=torch.uint8)
    p = data.draw_crops(6, seeded(3))
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


def test_drawn_crops_lie_in_the_image_and_each_number_is_drawn_apart():
    p = data.draw_crops(20000, seeded())
    area, aspect = p["h"] * p["w"], p["w"] / p["h"]
    assert area.min() > 0.15 and area.max() <= 1 and 0.55 < area.mean() < 0.62
    assert 0.74 < aspect.min() < 0.76 and 1.32 < aspect.max() < 1.34
    assert (p["x"].abs() + p["w"] <= 1 + 1e-6).all() and (p["y"].abs() + p["h"] <= 1 + 1e-6).all()
    apart = torch.stack([area, aspect.log(), p["y"], p["x"], p["flip_x"], p["flip_y"]])
    assert (torch.corrcoef(apart) - torch.eye(6)).abs().max() < 0.05
    for name in ("flip_x", "flip_y"):
        assert abs(p[name].mean()) < 0.03 and set(p[name].tolist()) == {-1, 1}


def gaussian(length, std, reach):
    """(length,length): row i holds the weights of all pixels in i; outside lies the border."""
    weights = np.zeros((length, length))
    for i, tap in np.ndindex(length, 2 * reach + 1):
        offset = tap - reach
        weights[i, np.clip(i + offset, 0, length - 1)] += np.exp(-(offset / std) ** 2 / 2)
    return weights / weights.sum(1, keepdims=True)


def recoloured(x, p, n, reach):
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
        blur = gaussian(16, v["blur"] * 16 / 224, reach)
        x = blur @ x @ blur.T
    return x


@pytest.mark.parametrize("sensor", [S1, S2C, RGB], ids=["s1", "s2c", "rgb"])
def test_colours_change_by_their_formulas_in_their_order(sensor):
    x = torch.rand(24, len(sensor.bands), 16, 16)
    p = data.draw_colours(24, sensor, seeded(1), grey=0.3)
    p["blur"] = p["blur"] * 12                                       # std of up to 1.7 pixels
    got = data.colour(x, p)
    reach = int(np.ceil(3 * float(p["blur"].max()) * 16 / 224))      # of all kernels
    for n in range(24):
        want = recoloured(x[n].double().numpy(), p, n, reach)
        assert np.abs(got[n].numpy() - want).max() < 1e-5


def test_drawn_colours_lie_in_their_ranges_by_kind_of_sensor():
    radar, optical, rgb = [data.draw_colours(4000, sensor, seeded()) for sensor in (S1, S2C, RGB)]
    assert 0.77 < (optical["brightness"] != 1).float().mean() < 0.83
    for name in ("brightness", "contrast"):
        assert 0.6 <= optical[name].min() < 0.61 and 1.39 < optical[name].max() <= 1.4
        assert (radar[name] == 1).all()
    assert (optical["hue"] == 0).all() and set(optical["saturation"].tolist()) == {0, 1}
    assert 0.17 < (optical["saturation"] == 0).float().mean() < 0.23
    assert 0.09 < rgb["hue"].max() <= 0.1 and 1.19 < rgb["saturation"].max() <= 1.2
    blur = optical["blur"][optical["blur"] > 0]
    assert 0.46 < len(blur) / 4000 < 0.54 and 0.1 < blur.min() < 0.11 and 1.98 < blur.max() < 2
    decibels = radar["offset"] * 4 * torch.tensor(S1.std)            # 2 dB, another for each band
    moved = decibels[decibels[:, 0] != 0]
    assert 0.77 < len(moved) / 4000 < 0.83 and -2 <= decibels.min() < -1.98
    assert 1.98 < decibels.max() <= 2 and torch.corrcoef(moved.T)[0, 1].abs() < 0.1


# --------------------------------------------------------------------------------------- toy world


def test_the_toy_world_is_an_ssl4eo_v1_tree_and_the_same_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data.make_toy("toy", 4, 12, 3, 1) == "toy"
    files = {"s1": [], "s2c": []}
    for path in sorted(Path("toy").rglob("*.tif")):
        with tifffile.TiffFile(path) as file:
            assert {33550, 33922, 34735} <= set(file.pages[0].tags.keys())       # georeferenced
            files[path.parts[1]].append(np.float64(file.asarray().ravel()))
    assert [len(files["s1"]), len(files["s2c"])] == [4 * 4 * 2, 4 * 4 * 13]
    numbers = [np.concatenate(x) for x in files.values()]
    means = [[x.mean(), x.std()] for x in numbers]
    assert np.allclose(means, [[-15.88379, 7.00210], [2224.9649, 1462.7404]], rtol=1e-4)
    assert zlib.crc32(Path("toy/ssl4eo_multilabel.json").read_bytes()) == 2537734565
    assert data.make_toy("toy", 4, 12, 3) == "toy"                   # left alone
    for scenes, size in ((5, 12), (4, 13)):
        with pytest.raises(data.InputError, match="exists and is not the toy world"):
            data.make_toy("toy", scenes, size, 3)
