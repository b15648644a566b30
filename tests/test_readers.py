"""Claims about the readers of image folders and of BigEarthNet, on files written here."""
import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

import data

PATCH = "S2A_MSIL2A_20170613T101031_61_39"
RADAR = "S1A_IW_GRDH_1SDV_20170613T165043_33UUP_61_39"
SIDE = {"B1": 20, "B9": 20, **dict.fromkeys(["B5", "B6", "B7", "B8A", "B11", "B12"], 60)}


def write_patch(folder, name, labels=None, bands=data.BANDS["s2a"]):
    Path(folder, name).mkdir(parents=True)
    for k, band in enumerate(bands):
        x = np.full((SIDE.get(band, 120),) * 2, 100 * (k + 1) if band[0] == "B" else -10 - k)
        on_disk = f"B0{band[1]}" if len(band) == 2 and band[0] == "B" else band
        tifffile.imwrite(f"{folder}/{name}/{name}_{on_disk}.tif",
                         x.astype(np.uint16 if band[0] == "B" else np.float32))
    if labels is not None:
        Path(folder, name, f"{name}_labels_metadata.json").write_text(json.dumps(
            {"labels": labels, "corresponding_s2_patch": PATCH}))


@pytest.fixture
def ben(tmp_path):
    write_patch(tmp_path / "BigEarthNet-v1.0", PATCH, ["Rice fields", "Vineyards", "Airports"])
    write_patch(tmp_path / "BigEarthNet-v1.0", PATCH + "0", ["Burnt areas"])
    write_patch(tmp_path / "BigEarthNet-S1-v1.0", RADAR, ["Sea and ocean"], data.BANDS["s1"])
    return str(tmp_path)


def test_bigearthnet_v1_has_12_bands_in_order_on_one_grid_and_19_classes(ben):
    scenes = data.BigEarthNet(ben, None, "s2a")
    assert scenes.ids == [PATCH, PATCH + "0"] and len(scenes.classes) == 19
    assert [scenes.classes[k] for k in np.flatnonzero(scenes.labels[0])] == [
        "Arable land", "Permanent crops"]
    assert not scenes.labels[1].any()                     # CORINE's burnt areas have no class
    want = data.to_uint8(100 * np.arange(1, 13, dtype=np.float32)[:, None, None], "ben")
    assert np.array_equal(scenes.image(0, 0), np.broadcast_to(want, (12, 120, 120)))
    radar = data.BigEarthNet(ben, None, "s1")
    want = data.to_uint8(np.float32([-10, -11])[:, None, None], "s1")
    assert np.array_equal(radar.image(0, 0)[:, :1, :1], want)
    assert radar.classes[int(radar.labels[0].argmax())] == "Marine waters"


def test_a_13_band_network_sees_bigearthnet_with_zeros_for_b10(ben):
    a, c = (data.BigEarthNet(ben, None, m).image(0, 0) for m in ("s2a", "s2c"))
    assert c.shape == (13, 120, 120) and not c[data.BANDS["s2c"].index("B10")].any()
    assert np.array_equal(np.delete(c, 10, 0), a)


def test_43_corine_labels_go_to_19_classes_or_to_none_and_no_name_goes_twice():
    names = [label for row in data.BEN[:-1] for label in row]
    assert len(data.BEN) == 20 and len(names) == len(set(names)) and len(data.BEN[-1]) == 11
    corine = {label for row in data.BEN[:-1] for label in row[1:] or row} | set(data.BEN[-1])
    assert len(corine) == 43
    sizes = [len(row[1:] or row) for row in data.BEN[:-1]]
    assert sizes == [2, 1, 3, 4, 1, 1, 1, 1, 1, 1, 1, 2, 2, 1, 1, 2, 2, 2, 3]
    assert {"Land principally occupied by agriculture, with significant areas of "
            "natural vegetation",
            "Transitional woodland/shrub", "Annual crops associated with permanent crops",
            "Road and rail networks and associated land"} <= corine


def test_split_lists_choose_patches_and_absent_ones_are_counted_and_named(ben, tmp_path):
    path = tmp_path / "train.csv"
    path.write_text(f"{PATCH},{RADAR}\n")                                   # the official form
    assert data.BigEarthNet(ben, str(path), "s2a").ids == [PATCH]
    assert data.BigEarthNet(ben, str(path), "s1").ids == [RADAR]
    path.write_text("".join(f"gone_{i}\n" for i in range(7)) + PATCH)        # SeCo's form
    with pytest.raises(ValueError, match="train.csv: 7 of 8 .* not there: gone_0, .*, gone_4$"):
        data.BigEarthNet(ben, str(path), "s2a")
    assert data.BigEarthNet(ben, str(path), "s2a", skip=True).ids == [PATCH]
    with pytest.raises(ValueError, match="/nowhere.csv: no such file"):
        data.BigEarthNet(ben, "/nowhere.csv")


def test_bigearthnet_v2_takes_labels_and_split_from_the_exported_table(tmp_path):
    name, s1 = "S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_26_57", RADAR
    write_patch(tmp_path / "BigEarthNet-S2" / name[:-6], name)
    write_patch(tmp_path / "BigEarthNet-S1" / s1[:32], s1, None, data.BANDS["s1"])
    with open(tmp_path / "metadata.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["patch_id", "labels", "split", "country", "s1_name"])
        out.writerow([name, "Arable land;Beaches, dunes, sands", "test", "Austria", s1])
        out.writerow(["gone", "Pastures", "train", "Austria", "gone_s1"])
    for modality, want in (("s2a", name), ("s1", s1)):
        scenes = data.BigEarthNet(str(tmp_path), "test", modality)
        assert scenes.ids == [want] and scenes.image(0, 0).shape[1] == 120
        assert [scenes.classes[k] for k in np.flatnonzero(scenes.labels[0])] == [
            "Arable land", "Beaches, dunes, sands"]
    with pytest.raises(ValueError, match="1 of 1 images are not there: gone"):
        data.BigEarthNet(str(tmp_path), "train", "s2a")


@pytest.mark.parametrize("harm, message", [
    (lambda f: (f / f"{PATCH}_labels_metadata.json").write_text('{"labels": ["Lawn"]}'),
     "no BigEarthNet labels of .*: 'Lawn'"),
    (lambda f: (f / f"{PATCH}_labels_metadata.json").unlink(), "no BigEarthNet labels of .*no such file"),
    (lambda f: (f / f"{PATCH}_B02.tif").unlink(), f"{PATCH}_B02.tif: missing"),
    (lambda f: tifffile.imwrite(f / f"{PATCH}_B05.tif", np.zeros((120, 120), np.uint16)),
     "B05.tif: .120, 120. pixels, expected 60 x 60"),
])
def test_a_bad_patch_is_named_in_one_line(ben, harm, message):
    harm(Path(ben, "BigEarthNet-v1.0", PATCH))
    with pytest.raises(ValueError, match=message):
        data.BigEarthNet(ben).image(0, 0)


def png(path, x):
    path.parent.mkdir(parents=True, exist_ok=True)
    pytest.importorskip("imagecodecs").imwrite(str(path), x)


def test_a_folder_holds_classes_or_flat_images_of_any_kind(tmp_path):
    x = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    png(tmp_path / "a" / "x.png", x)
    png(tmp_path / "b" / "Y.JPG", np.full((8, 8, 3), 90, np.uint8))
    tifffile.imwrite(tmp_path / "b" / "z.tiff", x, photometric="rgb")
    (tmp_path / "empty").mkdir()
    scenes = data.open_data(str(tmp_path), "rgb", "classes")
    assert scenes.classes == ("a", "b") and scenes.ids == ["x", "Y", "z"] and scenes.size == 8
    assert [int(y[0].argmax()) for y in scenes.labels] == [0, 1, 1]
    assert np.array_equal(scenes.image(0, 0), x.transpose(2, 0, 1))
    assert np.array_equal(scenes.image(2, 0), x.transpose(2, 0, 1))
    flat = data.Folder(str(tmp_path / "b"))
    assert len(flat) == 2 and flat.labels[0].shape == (1, 1) and not np.any(flat.labels)


def test_grey_and_alpha_become_rgb_and_16_bits_and_unlike_sizes_are_refused(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    png(tmp_path / "a.png", grey)
    png(tmp_path / "b.png", np.dstack([grey, grey + 1, grey + 2, grey * 0]))
    png(tmp_path / "c.png", np.dstack([grey] * 3).astype(np.uint16))
    png(tmp_path / "d.png", np.zeros((8, 9, 3), np.uint8))
    scenes = data.Folder(str(tmp_path))
    assert np.array_equal(scenes.image(0, 0), np.stack([grey] * 3))
    assert np.array_equal(scenes.image(1, 0), np.stack([grey, grey + 1, grey + 2]))
    with pytest.raises(ValueError, match="c.png: uint16 .8, 8, 3., expected 3 finite bands of uin"):
        scenes.image(2, 0)
    with pytest.raises(ValueError, match="d.png: .8, 9. pixels, the others have 8 x 8"):
        scenes.image(3, 0)
    with pytest.raises(ValueError, match="no s1 images .* in it or its folders"):
        data.Folder(str(tmp_path), "s1")


def test_eurosat_sar_is_two_float_bands_interleaved_or_not_and_nan_is_refused(tmp_path):
    (tmp_path / "River").mkdir()
    x = np.stack([np.full((64, 64), -12.59), np.full((64, 64), -26.17)]).astype(np.float32)
    for n, y in enumerate((x, x.transpose(1, 2, 0), x * np.nan), 1):
        tifffile.imwrite(tmp_path / "River" / f"River_{n}.tif", y, photometric="minisblack",
                         planarconfig="separate" if len(y) == 2 else "contig")
    scenes = data.open_data(str(tmp_path), "s1")
    for i in (0, 1):
        assert scenes.image(i, 0)[:, 5, 5].tolist() == [128, 64]
    with pytest.raises(ValueError, match="River_3.tif: float32 .*expected 2 finite bands"):
        scenes.image(2, 0)


def test_b8a_moves_in_eurosats_folders_and_in_no_other(tmp_path):
    x = np.broadcast_to(np.arange(13) * 100, (16, 16, 13)).astype(np.uint16)
    for kind in ("Forest", "meadow"):
        (tmp_path / kind / kind).mkdir(parents=True)
        tifffile.imwrite(tmp_path / kind / kind / "1.tif", x, planarconfig="contig")
    for kind, order in (("Forest", [*range(8), 12, *range(8, 12)]), ("meadow", range(13))):
        want = data.to_uint8(100 * np.array(order, np.float32)[:, None, None], "s2c")[:, 0, 0]
        got = data.open_data(str(tmp_path / kind), "s2c").image(0, 0)[:, 3, 3]
        assert np.array_equal(got, want)
    (tmp_path / "Forest" / "meadow").mkdir()                  # one name in common is not EuroSAT
    assert np.array_equal(data.open_data(str(tmp_path / "Forest"), "s2c").image(0, 0)[:, 3, 3], want)
