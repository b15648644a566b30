"""Claims about data of one's own: any sensor, any folder, tables of labels, SSL4EO-S12 v1.1."""
import json
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch

import data
import model
import pretrain
import probe
from data import SENSORS
from lab import finetune, folders

S1, S2C, S2A = SENSORS["s1"], SENSORS["s2c"], SENSORS["s2a"]
ALL_BANDS = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11",
             "B12"]
BANDS = {"s1": ["vv", "vh"], "s2c": ALL_BANDS, "s2a": [b for b in ALL_BANDS if b != "B10"]}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(model.VITS, "vit_tiny", {"width": 32, "depth": 1, "heads": 1})


# ------------------------------------------------------------------ every band at its mean is grey


def flat(sensor, side=24):
    """(C,side,side): every band at its mean, in the sensor's units."""
    return np.broadcast_to(np.float64(sensor.mean)[:, None, None], (len(sensor.mean), side, side))


def write_bands(folder, sensor, side=24, prefix=""):
    """A TIFF for each band, each with pixels of its own size."""
    folder.mkdir(parents=True)
    for band, mean, ratio in zip(sensor.bands, sensor.mean, sensor.ratios):
        pixels = np.full((side // ratio, side // ratio), mean).astype(sensor.dtype)
        tifffile.imwrite(folder / f"{prefix}{band}.tif", pixels)


def ssl4eo_tree(root, sensor):
    product = folders.product_names(1, sensor.name.upper()[:2])[0][0]
    write_bands(root / sensor.name / "0000000" / product, sensor)
    return data.open_data(str(root), sensor)


def ssl4eo_zip(root, sensor):
    on_disk = data.ZIP_SENSORS[sensor.name]
    x = flat(on_disk) - on_disk.offset
    if on_disk.dtype == "int16":
        x = x.round()
    x = x.astype(on_disk.dtype)
    x = np.broadcast_to(x, (1, 4, *x.shape))
    path = root / data.ZIP_FOLDERS[sensor.name] / "a.zarr.zip"
    folders.write_zip(path, x, BANDS[sensor.name], ["0000000"],
                      folders.product_names(1, sensor.name.upper()[:2]))
    return data.open_data(str(root), sensor)


def bigearthnet(root, sensor):
    on_disk = sensor if sensor is S1 else data.BEN_S2
    folder = root / sorted(data.BEN_FOLDERS[sensor.name])[-1] / "S2A_patch"
    write_bands(folder, on_disk, 120, "S2A_patch_")
    (folder / "S2A_patch_labels_metadata.json").write_text('{"labels": ["Pastures"]}')
    return data.open_data(str(root), sensor)


def folder_of_tiffs(root, sensor):
    folders.write_tiff(root / "0.tif", flat(sensor).astype(sensor.dtype))
    return data.open_data(str(root), sensor)


def other_size(root, sensor):
    folders.write_tiff(root / "0.tif", flat(sensor, 30).astype(sensor.dtype))
    return data.open_data(str(root), sensor, tile=24)


def eurosat(root, sensor):
    x = flat(sensor)
    in_file = [x[data.EUROSAT_ORDER.index(k)] for k in range(13)]
    folders.write_tiff(root / "Forest" / "0.tif", np.uint16(in_file))
    return data.open_data(str(root), sensor, layout="eurosat")


def linear_power(root, sensor):
    folders.write_tiff(root / "0.tif", np.float32(10 ** (flat(sensor) / 10)))
    return data.open_data(str(root), sensor)


def packed(root, sensor):
    data.pack(ssl4eo_tree(root / "tree", sensor), str(root / "packed"))
    return data.open_data(str(root / "packed"), sensor)


POWER = replace(S1, name="power", decibels=True)
UNIT = data.make_sensor(folders.UNIT)
PLANET = data.make_sensor(folders.PLANET)
PAN = data.make_sensor({"bands": ["pan"], "kind": "optical", "dtype": "uint8", "mean": [100],
                        "std": [30]})
SCALED = data.make_sensor({"bands": ["a", "b"], "kind": "optical", "dtype": "int16", "mean": [300,
                           40], "std": [100, 20], "nodata": -9999})


@pytest.mark.parametrize("write, sensor", [
    (ssl4eo_tree, S1), (ssl4eo_tree, S2C), (ssl4eo_tree, S2A), (ssl4eo_zip, S1), (ssl4eo_zip, S2C),
    (ssl4eo_zip, S2A), (bigearthnet, S1), (bigearthnet, S2A), (folder_of_tiffs, S1),
    (folder_of_tiffs, S2C), (folder_of_tiffs, S2A), (folder_of_tiffs, UNIT),
    (folder_of_tiffs, PLANET), (folder_of_tiffs, PAN), (folder_of_tiffs, SCALED),
    (other_size, S2C), (other_size, PLANET), (eurosat, S2C), (linear_power, POWER), (packed, S1),
    (packed, S2C)])
def test_a_band_at_its_mean_is_middle_grey_whatever_reads_it(tmp_path, write, sensor):
    x = write(tmp_path, sensor).image(0, 0)
    assert len(x) == len(sensor.bands)
    assert set(np.unique(x).tolist()) <= {127, 128}


# ------------------------------------------------------------------------- folders as people have


@pytest.mark.parametrize("case", folders.CASES, ids=lambda case: case.write.__name__)
def test_a_folder_trains_or_a_line_says_why_not(tmp_path, case, tiny):
    trains, said = folders.run(case, str(tmp_path))
    assert trains == case.trains, said
    assert any(case.said in line for line in said), said
    if not trains:
        assert "\n" not in said[0]


def test_an_image_of_another_size_is_its_central_square_resized(tmp_path):
    x = np.zeros((3, 8, 12), np.uint8)
    x[:, :, 2:10] = 50                                       # the central square
    folders.write_picture(tmp_path / "a.png", x.transpose(1, 2, 0))
    image = data.Folder(str(tmp_path), SENSORS["rgb"], tile=4).image(0, 0)
    assert image.shape == (3, 4, 4) and (image == 50).all()


# ------------------------------------------------------------------------------------- sensors


def test_stats_writes_a_sensor_with_which_the_images_are_grey_on_average(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(4):
        x = np.stack([rng.normal(mean, 50, (24, 24)) for mean in (500, 900, 700, 3000)])
        x[:, :3] = 0
        folders.write_tiff(tmp_path / "images" / f"{i}.tif", x.astype(np.uint16))
    out = str(tmp_path / "my.json")
    data.main(["stats", str(tmp_path / "images"), "--bands", "B2", "B3", "B4", "B8", "--nodata",
               "0", "--out", out, "--workers", "0"])
    sensor = data.find_sensor(out)
    assert sensor.bands == ["B2", "B3", "B4", "B8"] and sensor.look == [2, 1, 0]
    assert sensor.dtype == "uint16" and sensor.name == "my" and sensor.nodata == 0
    assert np.allclose(sensor.mean, [500, 900, 700, 3000], atol=4)
    assert np.allclose(sensor.std, 50, atol=4)
    x = data.open_data(str(tmp_path / "images"), sensor).image(0, 0)
    assert np.abs(x[:, 3:].mean((1, 2)) - 127.5).max() < 6
    assert (x[:, :3] == 127).all()                           # without data: the mean


@pytest.mark.parametrize("change, message", [
    ({"bnads": 1}, "unknown field 'bnads'"),
    ({"kind": "sonar"}, "kind 'sonar': not one of optical, radar, rgb"),
    ({"dtype": "complex64"}, "dtype 'complex64': neither int nor float"),
    ({"dtype": "uint17"}, "uint17"),
    ({"mean": [1]}, "mean: 1 numbers for 4 bands"),
    ({"std": [1, 1, 1, 0]}, "not above 0"),
    ({"look": [0, 1, 4]}, "not three positions of 4 bands"),
    ({"bands": ["a", "a", "b", "c"]}, "a name twice"),
    ({"ratios": [2, 2, 2, 2]}, "the finest band has 1"),
    ({"scale": 0}, "units would not depend on pixels"),
])
def test_a_sensor_that_makes_no_sense_is_named_in_one_line(tmp_path, change, message):
    path = tmp_path / "my.json"
    path.write_text(json.dumps(folders.PLANET | change))
    with pytest.raises(ValueError, match=f"my.json: not a sensor .*{message}") as error:
        data.find_sensor(str(path))
    assert "\n" not in str(error.value)


def test_a_run_brings_its_own_sensor_to_the_probe_without_a_flag(tmp_path, tiny, capsys):
    root = tmp_path / "data"
    sensor = data.make_sensor(folders.PLANET)
    for i in range(40):
        x = folders.noise(sensor, i) + 400 * (i % 2)
        folders.write_tiff(root / ("a" if i % 2 else "b") / f"{i}.tif", x.astype(np.uint16))
    flags = folders.write_sensor(root, **folders.PLANET)
    pretrain.main([*flags, "--data", str(root), "--out", str(tmp_path / "r"), *folders.TRAINING])
    (root / "sensor.json").unlink()                          # config.json holds its fields
    report = probe.main(["--ckpt", str(tmp_path / "r" / "backbone.pt"), "--task", "folder",
                         "--data", str(root), "--bootstrap", "0", "--workers", "0"])
    assert report["stats"] == 1.0 and report["metric"] == "accuracy"
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert data.make_sensor(config["sensor"]) == replace(sensor, name="sensor")


def test_a_run_goes_on_with_its_own_sensor_only(tmp_path, tiny):
    root = tmp_path / "data"
    root.mkdir()
    flags = [*folders.planet(root), "--data", str(root), "--out", str(tmp_path / "r"),
             *folders.TRAINING, "--resume"]
    pretrain.main(flags)
    folders.write_sensor(root, **folders.PLANET | {"std": [1, 2, 3, 4]})
    with pytest.raises(ValueError, match="--modality .*: the run in .* has another sensor"):
        pretrain.main(flags)


def test_a_pack_is_opened_for_the_sensor_it_was_made_for_only(tmp_path):
    folder_of_tiffs(tmp_path / "images", PLANET)
    data.pack(data.open_data(str(tmp_path / "images"), PLANET), str(tmp_path / "packed"))
    assert data.open_data(str(tmp_path / "packed"), PLANET).size == 24
    with pytest.raises(ValueError, match="packed for a own with other fields"):
        data.open_data(str(tmp_path / "packed"), replace(PLANET, mean=[1, 2, 3, 4]))


@pytest.mark.parametrize("C", [1, 2, 3, 5])
def test_radar_of_any_number_of_bands_has_an_offset_for_each(C):
    sensor = replace(S1, bands=list("abcde"[:C]), mean=[0] * C, std=[5] * C)
    drawn = data.draw_colours(1000, sensor, torch.Generator().manual_seed(0), jitter=0.4)
    offset = drawn["offset"]
    assert offset.shape == (1000, C) and 0 < offset.abs().max() <= 0.1
    moved = offset[offset[:, 0] != 0]
    assert 0.75 < len(moved) / 1000 < 0.85
    if C > 1:
        correlation = torch.corrcoef(moved.T) - torch.eye(C)
        assert correlation.abs().max() < 0.15


def test_to_input_gives_what_reading_gives(tmp_path):
    for sensor, write in ((S2C, folder_of_tiffs), (POWER, linear_power)):
        scenes = write(tmp_path / sensor.name, sensor)
        x = tifffile.imread(scenes.files[0][0]).transpose(2, 0, 1)
        want = torch.from_numpy(scenes.image(0, 0)).float() / 255
        got = data.to_input(x, sensor)
        assert got.shape == (1, *want.shape) and torch.equal(got[0], want)
    with pytest.raises(ValueError, match=r"array of shape .24, 24, 2.: power takes .2, height"):
        data.to_input(x.transpose(1, 2, 0), POWER)


# --------------------------------------------------------------------------- labels from a table


def write_table(root, text):
    for name in ("a/0.png", "a/1.png", "b/1.png", "b/2.png"):
        folders.write_picture(root / name, folders.colours())
    path = root / "labels.csv"
    path.write_text(text)
    return str(path)


def test_a_table_labels_the_images_that_it_names_and_no_other(tmp_path):
    path = write_table(tmp_path, "image\twater\ttrees\n0\t1\t1\n\nb/1.png\t0\t1\n2.png\t1\t0\n")
    scenes = data.open_data(str(tmp_path), SENSORS["rgb"], path)
    assert scenes.classes == ("water", "trees")
    assert [labels[0].tolist() for labels in scenes.labels] == [[1, 1], [0, 0], [0, 1], [1, 0]]


@pytest.mark.parametrize("text, message", [
    ("", "empty"),
    ("image\n0\n", "no header row of classes"),
    ("0,1,0\n1,0,1\n", "the first row holds labels"),
    ("image,a,b\n0,1\n", "0: 1 labels for 2 classes"),
    ("image,a,b\n0,1,2\n", "0: labels are 0 or 1"),
    ("image,a,b\n0,1,0\n0,1,0\n", "0: a row twice"),
    ("image,a,b\n0,1,0\n0.png,1,0\n", "0.png: its image has another row"),
    ("image,a,b\n9,1,0\n", "9: no such image in"),
    ("image,a,b\n1,1,0\n", "1: 2 images have that name, write folder/1"),
    ("image,a,a\n0,1,0\n", "a class twice"),
])
def test_a_table_that_does_not_fit_is_named_with_its_row(tmp_path, text, message):
    path = write_table(tmp_path, text)
    with pytest.raises(ValueError, match=f"labels.csv: .*{message}") as error:
        data.open_data(str(tmp_path), SENSORS["rgb"], path)
    assert "\n" not in str(error.value)


def test_labels_from_a_table_train_the_soft_term_and_are_probed_by_average_precision(
        tmp_path, tiny, capsys):
    root = tmp_path / "data"
    rows = ["image,red,green,blue"]
    for i in range(60):
        bright = np.random.default_rng(i).integers(0, 2, 3)
        x = folders.colours(i) // 4 + np.uint8(140 * bright)
        folders.write_picture(root / f"{i}.png", x)
        rows.append(",".join(map(str, [i, *bright])))
    (root / "labels.csv").write_text("\n".join(rows))
    labels = ["--data", str(root), "--labels", str(root / "labels.csv")]
    out = tmp_path / "r"
    pretrain.main(["--modality", "rgb", *labels, "--out", str(out), *folders.TRAINING,
                   "--holdout", "0.5"])
    assert json.loads((out / "log.jsonl").read_text())["soft"] > 0
    report = probe.main(["--ckpt", str(out / "backbone.pt"), "--task", "folder", *labels,
                         "--bootstrap", "0", "--workers", "0"])
    assert report["metric"] == "micro_map" and report["stats"] > 0.95
    with pytest.raises(ValueError, match="data: its images have no labels"):
        probe.main(["--ckpt", str(out / "backbone.pt"), "--task", "folder", *labels[:2]])


# ------------------------------------------------------------------------------ SSL4EO-S12 v1.1


@pytest.mark.parametrize("compressor", ["blosc", "zstd", "zlib", "gzip", None])
@pytest.mark.parametrize("chunks", [(1, 1, 3, 6, 6), (5, 1, 3, 6, 6), (2, 3, 2, 4, 6)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_is_read_as_it_was_written_whatever_its_chunks(
        tmp_path, compressor, chunks, order):
    x = np.random.default_rng(0).integers(-99, 9999, (5, 4, 3, 6, 6), np.int16)
    meta = compressor and {"id": compressor}
    folders.write_zip(tmp_path / "a.zip", x, list("abc"), list("12345"), [["p"]],
                      chunks, compressor=meta, order=order)
    array = data.index_zarr(str(tmp_path / "a.zip"), "bands")
    assert np.array_equal(data.read_zarr(array), x)
    for first in ((4, 3), (0, 2), (3,)):
        assert np.array_equal(data.read_zarr(array, first), x[first])


def zip_tree(root, places=5):
    """Zips of s1 and s2c with the same places in another order, and their labels."""
    names = [f"{i:07d}" for i in range(places)]
    rng = np.random.default_rng(0)
    x = rng.integers(1000, 5000, (places, 4, 13, 6, 6), np.int16)
    folders.write_zip(root / "train" / "S2L1C" / "a.zarr.zip", x, ALL_BANDS, names,
                      folders.product_names(places))
    radar = rng.normal(-12, 5, (places, 4, 2, 6, 6)).astype(np.float16)
    folders.write_zip(root / "train" / "S1GRD" / "a.zarr.zip", radar, ["vv", "vh"], names[::-1],
                      folders.product_names(places, "S1")[::-1])
    products = folders.product_names(places)
    table = {names[2]: {products[2][0]: ["1", "4"], products[2][3]: ["0"]}, names[3]: {}}
    (root / "ssl4eo_multilabel.json").write_text(json.dumps(table))
    return x, radar


def test_zips_give_images_in_order_and_labels_by_product_or_place_and_season(tmp_path):
    x, radar = zip_tree(tmp_path)
    optical = data.open_data(str(tmp_path), S2C)
    assert optical.ids == [f"{i:07d}" for i in range(5)] and optical.size == 6
    want = data.to_uint8(np.float32(x[3, 1]) - 1000, data.ZIP_SENSORS["s2c"])
    assert np.array_equal(optical.image(3, 1), want)
    s1 = data.open_data(str(tmp_path), S1)
    assert s1.ids == optical.ids[::-1]
    want = data.to_uint8(radar[2, 1], data.ZIP_SENSORS["s1"])
    assert np.array_equal(s1.image(2, 1), want)
    for scenes in (optical, s1):
        labels = scenes.labels[scenes.ids.index("0000002")]
        assert [np.flatnonzero(row).tolist() for row in labels] == [[1, 4], [], [], [0]]
        assert sum(labels.any() for labels in scenes.labels) == 1
        assert scenes.notes[0].startswith("2 of the 2 products in")


def test_zips_are_checked_packed_and_measured_as_trees_are(tmp_path, capsys):
    zip_tree(tmp_path)
    flags = ["--modality", "s2c", "--workers", "0"]
    assert data.main(["check", str(tmp_path), *flags]) == 0
    data.main(["pack", str(tmp_path), str(tmp_path / "packed"), *flags])
    scenes = data.open_data(str(tmp_path), S2C)
    images = data.open_data(str(tmp_path / "packed"), S2C)
    assert np.array_equal(images.image(4, 2), scenes.image(4, 2))
    data.main(["stats", str(tmp_path), *flags])
    assert "B8A" in capsys.readouterr().out


def other_bands(path):
    x = np.zeros((1, 4, 13, 6, 6), np.int16)
    folders.write_zip(path, x, ALL_BANDS[::-1], ["0"], folders.product_names(1))


def no_zip(path):
    path.write_bytes(b"no zip")


def float_pixels(path):
    x = np.zeros((1, 4, 13, 6, 6), np.float32)
    folders.write_zip(path, x, ALL_BANDS, ["0"], folders.product_names(1))


@pytest.mark.parametrize("write, message", [
    (other_bands, "a.zarr.zip: no zip of SSL4EO-S12 v1.1 .*bands B12 B11"),
    (no_zip, "a.zarr.zip: no zip of SSL4EO-S12 v1.1"),
    (float_pixels, "a.zarr.zip/0.0: unreadable .*float32 pixels, s2c has int16")])
def test_a_zip_of_something_else_is_named_in_one_line(tmp_path, write, message):
    path = tmp_path / "S2L1C" / "a.zarr.zip"
    path.parent.mkdir()
    write(path)
    with pytest.raises(ValueError, match=message) as error:
        data.open_data(str(tmp_path), S2C).image(0, 0)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------- presets


def test_the_preset_follows_the_number_of_images_and_a_small_folder_fills_its_batch(
        tmp_path, monkeypatch, capsys):
    root = tmp_path / "data"
    for i in range(20):
        folders.write_picture(root / f"{i}.png", folders.colours(i))
    args = pretrain.parse(["--modality", "rgb", "--data", str(root)])
    scenes = pretrain.open_scenes(args, 1)
    train = pretrain.prepare_scenes(args, scenes, 0, print)
    assert args.preset == "small" and args.arch == "vit_tiny" and args.img_size == 112
    assert args.batch_size == 8 <= len(train) < 16
    monkeypatch.setattr(pretrain, "SMALL_DATA", 20)
    args = pretrain.parse(["--modality", "rgb", "--data", str(root), "--batch-size", "8"])
    pretrain.open_scenes(args, 1)
    assert args.preset == "full" and args.batch_size == 8


def test_bigearthnet_v2_without_its_table_says_how_to_make_it(tmp_path):
    (tmp_path / "BigEarthNet-S2").mkdir()
    with pytest.raises(ValueError, match="metadata.csv: missing; .*metadata.parquet.*pyarrow"):
        data.open_data(str(tmp_path), S2A)


# ------------------------------------------------------------------------------ after pretraining


def test_feature_maps_are_four_layers_whose_last_is_the_pooled_feature():
    network = model.build("resnet18", 3).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        maps = network.feature_maps(x)
        features = network(x)
    shapes = [tuple(layer.shape[1:]) for layer in maps]
    assert shapes == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]
    assert torch.equal(maps[-1].mean((2, 3)), features)


def test_the_example_of_fine_tuning_learns(tmp_path, tiny):
    root = tmp_path / "data"
    for i in range(60):
        x = folders.colours(i) // 2 + np.uint8(100 * (i % 2))
        folders.write_picture(root / ("dark", "light")[i % 2] / f"{i}.png", x)
    torch.manual_seed(0)
    backbone = model.build("vit_tiny", 3, 24, 4)
    torch.save(model.export_backbone(backbone), tmp_path / "b.pt")
    command = [str(tmp_path / "b.pt"), "rgb", "--data", str(root), "--epochs", "30", "--lr", "1e-3"]
    assert finetune.main(command)["accuracy"] > 0.9
    rows = "".join(f"{i},{i % 2},1\n" for i in range(60))
    (tmp_path / "table.csv").write_text(f"image,light,there\n{rows}")
    several = finetune.main([*command, "--labels", str(tmp_path / "table.csv")])
    assert several["micro_map"] > 0.9 and several["macro_map"] > 0.9
