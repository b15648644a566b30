"""Claims about `data.py pack`, `check` and `stats`, and about the command line."""
import os
import resource
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from torch.utils.data import DataLoader, default_convert

import data
import pretrain
from conftest import SMALL
from data import SENSORS
from programs import script

S1, S2C, RGB = SENSORS["s1"], SENSORS["s2c"], SENSORS["rgb"]


def pack(source, out, name, *flags):
    code = data.main(["pack", str(source), str(out), "--modality", name, "--workers", "2", *flags])
    assert code == 0
    return Path(out)


def write_rgb_classes(root):
    """Two images of class a, one of class b."""
    rng = np.random.default_rng(0)
    for name in ("a/0.tif", "a/1.tif", "b/0.tif"):
        path = Path(root, name)
        path.parent.mkdir(exist_ok=True)
        tifffile.imwrite(path, rng.integers(0, 256, (8, 8, 3), np.uint8), photometric="rgb")
    return str(root)


def copy_scenes(toy, root, name, count):
    for i in range(count):
        shutil.copytree(f"{toy}/{name}/{i:07d}", Path(root, name, f"{i:07d}"))


def band_file(root, name, i, s, band):
    product = sorted(Path(root, name, f"{i:07d}").iterdir())[s]
    return product / f"{band}.tif"


@pytest.fixture(scope="module")
def packed(toy, tmp_path_factory):
    return pack(toy, tmp_path_factory.mktemp("packed") / "s2c", "s2c")


# ---------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("name", ["s1", "s2c", "rgb"])
def test_packed_images_ids_and_labels_equal_those_of_the_tree_bit_for_bit(toy, tmp_path, name):
    source, flags, labels = toy, [], f"{toy}/ssl4eo_multilabel.json"
    if name == "rgb":
        source, flags, labels = write_rgb_classes(tmp_path), ["--labels", "classes"], "classes"
    a = data.open_data(source, SENSORS[name], labels)
    b = data.open_data(str(pack(source, tmp_path / "out", name, *flags)), SENSORS[name])
    assert b.ids == a.ids and list(b.classes) == list(a.classes) and b.size == a.size
    assert a.images_of(range(len(a))) == b.images_of(range(len(b)))
    assert all(np.array_equal(x, y) for x, y in zip(a.labels, b.labels))
    for i, s in a.images_of(range(len(a))):
        assert np.array_equal(a.image(i, s), b.image(i, s))
        assert np.shares_memory(b.image(i, s), b.memory)                         # no copy
        assert os.path.exists(b.files[i][s])
    with pytest.raises(ValueError):
        b.image(0, 0)[:] = 0                                                     # nor a way in


def test_class_folders_are_packed_without_labels_unless_these_are_asked_for(tmp_path):
    out = pack(write_rgb_classes(tmp_path), tmp_path / "out", "rgb")
    assert not np.any(data.open_data(str(out), RGB).labels)


@pytest.mark.parametrize("source", ["tree", "packed", "in memory"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_is_what_each_of_its_keys_gives(toy, labels, packed, source, workers):
    keys = [(5, (0, 1, 5)), (2, (0, 1, 2)), (7, (0, 1, 7))]
    scenes = data.SSL4EO(toy, S2C, labels)
    if source == "packed":
        scenes = data.open_data(str(packed), S2C)
    if source == "in memory":
        scenes.preload([2, 5, 7])
    loader = DataLoader(scenes, batch_sampler=[keys], num_workers=workers,
                        collate_fn=default_convert)
    x, y = next(iter(loader))
    assert x.shape == (3, 2, 13, 24, 24) and y.shape == (3, 2, 9)
    assert x.dtype == y.dtype == torch.uint8
    for k, key in enumerate(keys):
        assert np.array_equal(x[k], scenes[key][0]) and np.array_equal(y[k], scenes[key][1])


def script_on_a_slow_disk(*arguments):
    """data.py's main, where reading an image takes 10 ms."""
    read = data.read_product

    def slowly(*arguments, **options):
        time.sleep(0.01)
        return read(*arguments, **options)
    data.read_product = slowly
    data.main(arguments)


def test_a_killed_pack_goes_on_where_it_stopped_and_ends_in_the_same_bytes(
        toy, packed, tmp_path, start):
    out, sizes = tmp_path / "out", []
    arguments = ["pack", toy, str(out), "--modality", "s2c", "--workers", "1"]
    for least in (1, 120_000, 400_000):
        program = start(script_on_a_slow_disk, *arguments)
        while sum(file.stat().st_size for file in tmp_path.glob("out.part*/images*")) < least:
            assert program.running()
            time.sleep(0.01)
        program.kill()
        (part,) = tmp_path.iterdir()
        assert part.name.startswith("out.part")
        sizes.append((part / "images.uint8").stat().st_size)
        with pytest.raises(ValueError, match="index.jsonl: missing; pack did not come to its end"):
            data.open_data(str(part), S2C)
        with (part / "images.uint8").open("ab") as file:
            file.write(b"half an image")
    assert sizes == sorted(set(sizes)) and sizes[-1] < 240 * 13 * 24 * 24
    done = start(script, "data.py", *arguments).end()
    assert done.code == 0, done.err
    for name in ("images.uint8", "index.jsonl"):
        assert (out / name).read_bytes() == (packed / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def pack_all_but_the_end(scenes, out, monkeypatch):
    """As if killed before the last step -> the unfinished folder."""
    monkeypatch.setattr(data.os, "rename", lambda *_: None)
    data.pack(scenes, str(out))
    monkeypatch.undo()
    return next(out.parent.glob("out.part*"))


def test_images_that_are_packed_already_are_not_read_again(toy, tmp_path, monkeypatch):
    scenes, read = data.open_data(toy, S1), []
    part = pack_all_but_the_end(scenes, tmp_path / "out", monkeypatch)
    os.truncate(part / "images.uint8", 237 * 2 * 24 * 24 + 5)
    decode = scenes.decode

    def decode_and_note(path):
        read.append(path)
        return decode(path)
    scenes.decode = decode_and_note
    data.pack(scenes, str(tmp_path / "out"))
    assert read == scenes.files[59][1:]                                          # 3 of 240
    assert data.open_data(str(tmp_path / "out"), S1).memory.shape == (240, 2, 24, 24)


def test_other_data_never_continues_an_unfinished_pack(toy, labels, tmp_path, monkeypatch):
    for source in (data.SSL4EO(toy, S1), data.open_data(toy, S1, labels)):
        pack_all_but_the_end(source, tmp_path / "out", monkeypatch)
    assert len(list(tmp_path.glob("out.part*"))) == 2


HOLD = """import fcntl, sys
file = open(sys.argv[1], 'ab')
fcntl.lockf(file, fcntl.LOCK_EX)
print('held', flush=True)
input()"""


def test_two_packs_never_write_the_same_file(toy, tmp_path, monkeypatch):
    scenes, out = data.open_data(toy, S1), tmp_path / "out"
    part = pack_all_but_the_end(scenes, out, monkeypatch)
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(part / "images.uint8")],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(ValueError, match="out.part.*: another process is writing it"):
        data.pack(scenes, str(out))
    other.communicate(b"\n")
    data.pack(scenes, str(out))                                                  # free again


def script_with_a_megabyte(*arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    script(*arguments)


def test_a_pack_that_the_disk_does_not_take_says_so_with_the_file(toy, tmp_path, start):
    arguments = ["pack", toy, tmp_path / "out", "--modality", "s2c", "--workers", "0"]
    done = start(script_with_a_megabyte, "data.py", *arguments).end()
    assert done.code == 1
    last = done.err.splitlines()[-1]
    assert last.startswith(f"data.py: error: {tmp_path}/out.part")
    assert last.endswith("images.uint8: not written (File too large)")
    assert start(script, "data.py", *arguments).end().code == 0                  # and goes on
    assert data.open_data(str(tmp_path / "out"), S2C).memory.shape == (240, 13, 24, 24)


def forge(out, old, new):
    """Change the index and its checksum with it."""
    index = (out / "index.jsonl").read_bytes().split(b"\n")[1].replace(old, new)
    (out / "index.jsonl").write_bytes(b"%d\n%b" % (zlib.crc32(index), index))


def change_a_name(out):
    index = (out / "index.jsonl").read_bytes()
    (out / "index.jsonl").write_bytes(index.replace(b'"0000003"', b'"0000004"'))


def empty_index(out):
    (out / "index.jsonl").write_bytes(b"")


def cut_index(out):
    os.truncate(out / "index.jsonl", 200)


def remove_index(out):
    (out / "index.jsonl").unlink()


def cut_images(out):
    os.truncate(out / "images.uint8", 1_000_000)


def add_a_byte(out):
    with (out / "images.uint8").open("ab") as file:
        file.write(b"x")


def forge_the_size(out):
    forge(out, b'"size": 24', b'"size": 12')


def forge_the_labels(out):
    forge(out, b'"labels": [', b'"labels": [[[0]], ')


@pytest.mark.parametrize("harm, message", [
    (change_a_name, "index.jsonl: damaged"),
    (empty_index, "index.jsonl: damaged"),
    (cut_index, "index.jsonl: damaged"),
    (remove_index, "index.jsonl: missing"),
    (cut_images, "images.uint8: 1000000 bytes, but .240"),
    (add_a_byte, "images.uint8: 1797121 bytes"),
    (forge_the_size, "images.uint8: 1797120 bytes"),
    (forge_the_labels, "but .241, 13, 24, 24. pixels"),
])
def test_a_damaged_pack_is_refused_in_one_line(packed, tmp_path, harm, message):
    out = shutil.copytree(packed, tmp_path / "out")
    harm(out)
    with pytest.raises(ValueError, match=message) as error:
        data.open_data(str(out), S2C)
    assert "\n" not in str(error.value)


def test_a_pack_is_never_overwritten(toy, packed):
    before = (packed / "images.uint8").stat().st_mtime_ns
    with pytest.raises(ValueError, match="s2c: exists; pack never overwrites"):
        pack(toy, packed, "s2c")
    assert (packed / "images.uint8").stat().st_mtime_ns == before


def test_a_pack_has_its_own_sensor_and_labels(labels, packed):
    with pytest.raises(ValueError, match="packed with its labels, for --modality s2c only"):
        data.open_data(str(packed), S1)
    with pytest.raises(ValueError, match="packed with its labels, for --modality s2c only"):
        data.open_data(str(packed), S2C, labels)


@pytest.mark.parametrize("cache", ["4", "0"])
def test_training_from_a_pack_equals_training_from_the_tree(
        toy, packed, tmp_path, cache, few_blocks):
    weights = []
    for name, source in (("tree", toy), ("pack", packed)):
        out = tmp_path / name
        pretrain.main(["--modality", "s2c", "--arch", "vit_tiny", *SMALL, "--data", str(source),
                       "--holdout", "0.5", "--max-steps", "3", "--cache", cache,
                       "--soft-weight", "0.5",
                       "--out", str(out)])
        weights.append(torch.load(out / "backbone.pt", weights_only=True))
    a, b = weights
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert '"soft"' in (out / "log.jsonl").read_text()                           # with its labels


def textbook_product(folder):
    """A reader as it stands in a textbook: open, resample, stack, scale, clip."""
    bands = np.empty((13, 24, 24), np.float32)
    for k, band in enumerate(S2C.bands):
        bands[k] = data.resize(tifffile.imread(f"{folder}/{band}.tif"), 24)
    mean = np.float32(S2C.mean)[:, None, None]
    std = np.float32(S2C.std)[:, None, None]
    scaled = (bands - (mean - 2 * std)) * (255 / (4 * std)) + 0.5
    return np.clip(scaled, 0, 255).astype(np.uint8)


def test_the_reader_equals_open_resample_stack_scale_bit_for_bit(toy):
    scenes = data.SSL4EO(toy, S2C)
    for i, s in scenes.images_of(range(5)):
        assert np.array_equal(scenes.image(i, s), textbook_product(scenes.files[i][s]))


# ------------------------------------------------------------------------------------------ check


def damage_five_files(toy, root):
    """Five scenes with bad files -> the beginnings of the lines that check prints, by sensor."""
    for name in ("s1", "s2c"):
        copy_scenes(toy, root, name, 5)
    missing, short = band_file(root, "s2c", 1, 0, "B3"), band_file(root, "s2c", 1, 0, "B4")
    other_type, other_size = band_file(root, "s2c", 2, 3, "B1"), band_file(root, "s2c", 4, 1, "B8")
    not_a_number = band_file(root, "s1", 3, 2, "VH")
    missing.unlink()
    os.truncate(short, 700)                                                      # same product
    tifffile.imwrite(other_type, np.zeros((4, 4), np.uint8))
    tifffile.imwrite(other_size, np.zeros((12, 12), np.uint16))
    tifffile.imwrite(not_a_number, np.full((24, 24), np.nan, np.float32))
    return {
        "s2c": [f"{missing}: missing", f"{short}: unreadable TIFF",
                f"{other_type}: uint8 pixels, s2c has uint16",
                f"{other_size}: (12, 12) pixels, expected 24 x 24"],
        "s1": [f"{not_a_number}: NaN or infinite pixels"]}


@pytest.mark.parametrize("workers", ["0", "2"])
def test_check_lists_exactly_the_bad_files(toy, tmp_path, capsys, workers):
    want = damage_five_files(toy, tmp_path)["s2c"]
    assert data.main(["check", str(tmp_path), "--modality", "s2c", "--workers", workers]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == f"{tmp_path}: 20 images of 5 scenes, {len(want)} bad files"
    assert len(lines) == len(want)
    assert all(line.startswith(beginning) for line, beginning in zip(lines, want))


def test_check_of_whole_files_says_so(toy, capsys):
    assert data.main(["check", toy, "--modality", "s1", "--workers", "2"]) == 0
    assert capsys.readouterr().out == f"{toy}: 240 images of 60 scenes, 0 bad files\n"


def test_the_script_exits_with_1_where_files_are_bad(toy, tmp_path, start):
    want = damage_five_files(toy, tmp_path)["s1"]
    done = start(script, "data.py", "check", tmp_path, "--modality", "s1").end()
    assert done.code == 1
    assert done.out.splitlines() == [*want, f"{tmp_path}: 20 images of 5 scenes, 1 bad files"]


def test_pack_stops_with_the_first_bad_file_in_one_line(toy, tmp_path, start):
    want = damage_five_files(toy, tmp_path)["s2c"][0]
    flags = [tmp_path, tmp_path / "out", "--modality", "s2c"]
    done = start(script, "data.py", "pack", *flags).end()
    assert done.code == 1 and "Traceback" not in done.err
    assert done.err.splitlines()[-1] == f"data.py: error: {want}"
    assert not (tmp_path / "out").exists()


def test_pack_skip_bad_leaves_scenes_with_bad_files_out_and_names_them(toy, tmp_path, capsys):
    want = damage_five_files(toy, tmp_path)["s2c"]
    out = pack(tmp_path, tmp_path / "out", "s2c", "--skip-bad")
    *lines, last = capsys.readouterr().out.splitlines()
    assert all(line.startswith(beginning) for line, beginning in zip(lines, want))
    assert lines[4:] == ["left out: 0000001", "left out: 0000002", "left out: 0000004"]
    assert last == f"{out}: 8 images of 2 scenes"
    tree, scenes = data.open_data(str(tmp_path), S2C), data.open_data(str(out), S2C)
    assert scenes.ids == ["0000000", "0000003"]
    assert np.array_equal(scenes.image(1, 2), tree.image(3, 2))


def test_a_bad_first_file_hides_no_other_and_sets_no_measure(toy, tmp_path, capsys):
    copy_scenes(toy, tmp_path, "s1", 4)
    first, last = band_file(tmp_path, "s1", 0, 0, "VV"), band_file(tmp_path, "s1", 3, 0, "VV")
    tifffile.imwrite(first, np.zeros((25, 25), np.float32))                    # of 24: resampled
    assert data.open_data(str(tmp_path), S1).size == 24
    first.unlink()
    os.truncate(last, 700)
    assert data.main(["check", str(tmp_path), "--modality", "s1", "--workers", "0"]) == 1
    *lines, _ = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(first), str(last)]


def test_check_of_a_folder_lists_the_empty_first_image_and_all_other_bad_ones(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    jpeg = imagecodecs.jpeg8_encode(noise)
    contents = {"0.png": b"", "1.jpg": jpeg, "2.jpg": jpeg[:len(jpeg) // 2], "3.png": b"junk",
                "4.tif": b"", "5.jpg": jpeg}
    for name, content in contents.items():
        (tmp_path / "a" / name).write_bytes(content)
    assert data.main(["check", str(tmp_path), "--modality", "rgb", "--workers", "0"]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split(": unreadable")[0] for line in lines] == [
        f"{tmp_path}/a/{name}" for name in ("0.png", "2.jpg", "3.png", "4.tif")]
    assert last.endswith("6 images of 6 scenes, 4 bad files")


def test_a_folder_of_bad_images_only_is_listed_as_well_and_never_packed(tmp_path, capsys):
    (tmp_path / "0.png").write_bytes(b"")
    assert data.main(["check", str(tmp_path), "--modality", "rgb", "--workers", "0"]) == 1
    assert "0.png: unreadable image" in capsys.readouterr().out
    with pytest.raises(ValueError, match="each scene has a bad file"):
        pack(tmp_path, tmp_path / "out", "rgb", "--skip-bad")


def test_a_folder_that_is_no_product_is_named_with_its_scene(toy, tmp_path):
    copy_scenes(toy, tmp_path, "s1", 1)
    (tmp_path / "s1" / "0000000" / "notes").mkdir()
    with pytest.raises(ValueError, match="s1/0000000: not a scene .*'notes' has no date"):
        data.open_data(str(tmp_path), S1)


# ------------------------------------------------------------------------------------------ stats


@pytest.mark.parametrize("name", ["s1", "s2c"])
def test_stats_equal_numpys_over_all_pixels_in_the_sensors_units(toy, tmp_path, name, capsys):
    copy_scenes(toy, tmp_path, name, 4)
    sensor = SENSORS[name]
    scenes = data.open_data(str(tmp_path), sensor)
    got = data.statistics(scenes, workers=2)
    for c, band in enumerate(sensor.bands):
        images = []
        for i, s in scenes.images_of(range(4)):
            images.append(data.resize(tifffile.imread(f"{scenes.files[i][s]}/{band}.tif"), 24))
        x, mean, std = np.float64(images), sensor.mean[c], sensor.std[c]
        want = [x.mean(), x.std(), x.min(), x.max(), (x < mean - 2 * std).mean(),
                (x > mean + 2 * std).mean(), mean, std]
        assert np.allclose(got[c], want, rtol=1e-9)
    data.main(["stats", str(tmp_path), "--modality", name, "--workers", "0"])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 1 + len(sensor.bands)
    assert rows[1].split()[:2] == [sensor.bands[0], f"{got[0, 0]:.2f}"]


def test_rgb_and_packed_images_have_no_statistics_in_sensor_units(packed, tmp_path):
    for source, name in ((write_rgb_classes(tmp_path), "rgb"), (packed, "s2c")):
        with pytest.raises(ValueError, match="^rgb and packed images have no sensor units$"):
            data.main(["stats", str(source), "--modality", name])


# ----------------------------------------------------------------------------------- command line


def test_an_error_on_the_command_line_is_one_line(start):
    for arguments, message in (
            (["check", "/nowhere", "--modality", "s1"], "/nowhere: no such folder"),
            (["check", "/nowhere", "--modality", "s9"],
             "--modality s9: unknown, take one of s1, s2c, s2a, rgb, or a JSON file")):
        done = start(script, "data.py", *arguments).end()
        assert done.code == 1 and done.err == f"data.py: error: {message}\n"


def test_flags_are_not_abbreviated(capsys):
    with pytest.raises(SystemExit):
        data.main(["check", "/nowhere", "--modal", "s1"])
    assert "unrecognized arguments: --modal" in capsys.readouterr().err


def test_help_has_an_example_of_each_command(capsys):
    with pytest.raises(SystemExit):
        data.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"python data.py {name} " in text for name in ("toy", "check", "stats", "pack"))
