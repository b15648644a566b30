"""Claims about `data.py pack`, `check` and `stats`, and about TIFFs read without tifffile."""
import io
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from torch.utils.data import DataLoader

import data
import pretrain
from conftest import ROOT, SMALL


def pack(source, out, modality, *more):
    assert not data.main(["pack", str(source), str(out), "--modality", modality, "--workers", "2",
                          *more])
    return Path(out)


def tree(root, modality, toy):
    """A source of each kind: the toy world's s1 and s2c, rgb images in class folders."""
    if modality != "rgb":
        return toy
    rng = np.random.default_rng(0)
    for name in "aab":
        folder = Path(root, name)
        folder.mkdir(exist_ok=True)
        tifffile.imwrite(folder / f"{len(list(folder.iterdir()))}.tif", photometric="rgb",
                         data=rng.integers(0, 256, (8, 8, 3), np.uint8))
    return str(root)


@pytest.fixture(scope="module")
def packed(toy, tmp_path_factory):
    return pack(toy, tmp_path_factory.mktemp("packed") / "s2c", "s2c")


def plain_product(folder):
    """The reader as it stands in a textbook: open with tifffile, resample, stack, scale, clip."""
    bands = np.empty((13, 24, 24), np.float32)
    for i, band in enumerate(data.BANDS["s2c"]):
        bands[i] = data.resize(tifffile.imread(f"{folder}/{band}.tif"), 24)
    mean, std = (np.float32(v)[:, None, None] for v in data.STATS["s2c"])
    return np.clip((bands - (mean - 2 * std)) * (255 / (4 * std)) + 0.5, 0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("modality", ["s1", "s2c", "rgb"])
def test_packed_images_ids_and_labels_equal_those_of_the_tree_bit_for_bit(toy, labels, tmp_path,
                                                                          modality):
    source = tree(tmp_path, modality, toy)
    out = pack(source, tmp_path / "out", modality, *["--labels", "classes"] * (modality == "rgb"))
    a = data.open_data(source, modality, "classes" if modality == "rgb" else labels)
    b = data.open_data(str(out), modality)
    assert b.ids == a.ids and list(b.classes) == list(a.classes) and b.size == a.size
    assert [len(f) for f in b.files] == [len(f) for f in a.files]
    assert all(np.array_equal(x, y) for x, y in zip(a.labels, b.labels))
    for i, s in a.pairs(range(len(a))):
        assert np.array_equal(a.image(i, s), b.image(i, s))
        assert np.shares_memory(b.image(i, s), b.memory)                          # no copy
    with pytest.raises(ValueError):
        b.image(0, 0)[:] = 0                                                      # nor a way in


def test_class_folders_are_packed_without_labels_unless_these_are_asked_for(tmp_path):
    out = pack(tree(tmp_path, "rgb", None), tmp_path / "out", "rgb")
    assert not np.any(data.open_data(str(out), "rgb").labels)


def test_a_list_of_keys_is_a_batch_of_what_each_key_gives(toy, labels, packed):
    keys = [(5, (0, 1, 5)), (2, (0, 1, 2)), (7, (0, 1, 7))]
    for scenes in (data.SSL4EO(toy, "s2c", labels), data.open_data(str(packed), "s2c")):
        for workers in (0, 1):
            x, y = next(iter(DataLoader(scenes, None, sampler=[keys], num_workers=workers)))
            assert x.shape == (3, 2, 13, 24, 24) and x.dtype == y.dtype == torch.uint8
            for k, row in enumerate(keys):
                assert np.array_equal(x[k], scenes[row][0]) and np.array_equal(y[k], scenes[row][1])


def test_a_killed_pack_goes_on_where_it_stopped_and_ends_in_the_same_bytes(toy, packed, tmp_path):
    out, seen = tmp_path / "out", []
    command = [sys.executable, str(ROOT / "data.py"), "pack", toy, str(out), "--modality", "s2c",
               "--workers", "1"]
    slow = ("import sys, time, data; read = data.read_product\n"        # else it is over too soon
            "def slowly(*a, **k): time.sleep(0.01); return read(*a, **k)\n"
            "data.read_product = slowly; data.main(sys.argv[1:])")
    for least in (1, 120_000, 400_000):
        run = subprocess.Popen([sys.executable, "-c", slow, *command[2:]], cwd=ROOT,
                               stderr=subprocess.DEVNULL, start_new_session=True)
        while sum(f.stat().st_size for f in tmp_path.glob("out.part*/images*")) < least:
            assert run.poll() is None
            time.sleep(0.01)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        (part,) = tmp_path.iterdir()
        assert part.name.startswith("out.part") and not (part / "index.jsonl").exists()
        seen.append((part / "images.uint8").stat().st_size)
        with pytest.raises(OSError, match="index.jsonl"):
            data.open_data(str(part), "s2c")                                    # clearly unfinished
        with (part / "images.uint8").open("ab") as file:
            file.write(b"half an image")
    assert seen == sorted(set(seen)) and seen[-1] < 240 * 13 * 24 * 24
    subprocess.run(command, check=True, capture_output=True)
    for name in ("images.uint8", "index.jsonl"):
        assert (out / name).read_bytes() == (packed / name).read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_rgb_images_have_no_statistics_in_sensor_units(tmp_path):
    with pytest.raises(ValueError, match="^rgb and packed images have no sensor units$"):
        data.main(["stats", tree(tmp_path, "rgb", None), "--modality", "rgb"])


def test_images_that_are_packed_already_are_not_read_again(toy, packed, tmp_path, monkeypatch):
    scenes, read = data.open_data(toy, "s1"), []
    monkeypatch.setattr(data.os, "rename", lambda *_: None)
    data.pack(scenes, str(tmp_path / "out"))                                     # all but the end
    monkeypatch.undo()
    decode = scenes.decode
    scenes.decode = lambda f: read.append(f) or decode(f)
    (part,) = tmp_path.glob("out.part*")
    os.truncate(part / "images.uint8", 237 * 2 * 24 * 24 + 5)
    data.pack(scenes, str(tmp_path / "out"))
    assert read == [f for row in scenes.files for f in row][237:]
    assert data.open_data(str(tmp_path / "out"), "s1").memory.shape == (240, 2, 24, 24)


def test_other_data_never_continues_an_unfinished_pack(toy, labels, tmp_path, monkeypatch):
    monkeypatch.setattr(data.os, "rename", lambda *_: None)
    for source in (data.SSL4EO(toy, "s1"), data.open_data(toy, "s1", labels)):
        data.pack(source, str(tmp_path / "out"))
    assert len(list(tmp_path.glob("out.part*"))) == 2


def test_two_packs_never_write_the_same_file(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(data.os, "rename", lambda *_: None)
    data.pack(data.open_data(toy, "s1"), str(tmp_path / "out"))
    (part,) = tmp_path.iterdir()
    hold = ("import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.lockf(f, fcntl.LOCK_EX)\n"
            "print('held', flush=True); input()")
    other = subprocess.Popen([sys.executable, "-c", hold, str(part / "images.uint8")],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(ValueError, match="out.part.*: another process is writing it"):
        data.pack(data.open_data(toy, "s1"), str(tmp_path / "out"))
    other.communicate(b"\n")
    data.pack(data.open_data(toy, "s1"), str(tmp_path / "out"))                 # free again


def forge(out, old, new):
    """Change the index and its checksum with it."""
    index = (out / "index.jsonl").read_bytes().split(b"\n")[1].replace(old, new)
    (out / "index.jsonl").write_bytes(b"%d\n%b" % (zlib.crc32(index), index))


@pytest.mark.parametrize("harm, message", [
    (lambda d: (d / "index.jsonl").write_bytes((d / "index.jsonl").read_bytes().replace(
        b'"0000003"', b'"0000004"')), "index.jsonl: damaged"),
    (lambda d: (d / "index.jsonl").write_bytes(b""), "index.jsonl: damaged"),
    (lambda d: os.truncate(d / "index.jsonl", 200), "index.jsonl: damaged"),
    (lambda d: (d / "index.jsonl").unlink(), "No such file.*index.jsonl"),
    (lambda d: os.truncate(d / "images.uint8", 1_000_000), "images.uint8: 1000000 bytes, but .240"),
    (lambda d: (d / "images.uint8").open("ab").write(b"x"), "images.uint8: 1797121 bytes"),
    (lambda d: forge(d, b'"size": 24', b'"size": 12'), "images.uint8: 1797120 bytes"),
    (lambda d: forge(d, b'"labels": [', b'"labels": [[[0]], '), "but .241, 13, 24, 24. pixels"),
])
def test_a_damaged_pack_is_refused_in_one_line(packed, tmp_path, harm, message):
    out = shutil.copytree(packed, tmp_path / "out")
    harm(out)
    with pytest.raises((ValueError, OSError), match=message) as error:
        data.open_data(str(out), "s2c")
    assert "\n" not in str(error.value)


def test_a_pack_is_never_overwritten_and_has_its_own_modality_and_labels(toy, labels, packed):
    before = (packed / "images.uint8").stat().st_mtime_ns
    with pytest.raises(ValueError, match="s2c: exists; pack never overwrites"):
        pack(toy, packed, "s2c")
    assert (packed / "images.uint8").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="packed with its labels, for --modality s2c only"):
        data.open_data(str(packed), "s1")
    with pytest.raises(ValueError, match="packed with its labels, for"):
        data.open_data(str(packed), "s2c", labels)
    with pytest.raises(ValueError, match="packed images have no sensor units"):
        data.main(["stats", str(packed), "--modality", "s2c"])


@pytest.mark.parametrize("cache", ["4", "0"])
def test_training_from_a_pack_equals_training_from_the_tree(toy, packed, tmp_path, cache):
    runs = []
    for source in (toy, packed):
        runs.append(tmp_path / f"run{len(runs)}")
        pretrain.main(["--modality", "s2c", "--arch", "resnet18", *SMALL, "--data", str(source),
                       "--max-steps", "3", "--cache", cache, "--soft-weight", "0.5",
                       "--out", str(runs[-1])])
    a, b = (torch.load(r / "backbone.pt", weights_only=True) for r in runs)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert '"soft"' in (runs[1] / "log.jsonl").read_text()                       # with its labels


# ---------------------------------------------------------------------------------- reading TIFFs


def test_the_reader_equals_open_resample_stack_scale_bit_for_bit(toy):
    scenes = data.SSL4EO(toy, "s2c")
    for i in range(5):
        for s in range(4):
            assert np.array_equal(scenes.image(i, s), plain_product(scenes.files[i][s]))


TYPES = [np.uint8, np.uint16, np.float32, np.int16, np.float64]
KINDS = {"one block": ({}, True), "strips in a row": ({"rowsperstrip": 5}, True),
         "big-endian": ({"byteorder": ">"}, False), "BigTIFF": ({"bigtiff": True}, False),
         "tiles": ({"tile": (16, 16)}, False), "deflate": ({"compression": "zlib"}, False),
         "predictor": ({"compression": "zlib", "predictor": 2}, False)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES)
def test_every_kind_of_tiff_is_read_as_tifffile_reads_it(tmp_path, kind, dtype):
    flags, plain = KINDS[kind]
    if kind == "predictor" and np.dtype(dtype).kind == "f":
        flags = flags | {"predictor": 3}
    if flags.get("compression"):
        pytest.importorskip("imagecodecs")
    for shape in ((33, 21), (1, 7), (24, 24)):
        x = (np.random.default_rng(0).standard_normal(shape) * 50).astype(dtype)
        tifffile.imwrite(tmp_path / "x.tif", x, metadata=None, **flags)
        got, raw = data.read_tiff(tmp_path / "x.tif"), np.fromfile(tmp_path / "x.tif", np.uint8)
        assert got.dtype == dtype and np.array_equal(got, tifffile.imread(tmp_path / "x.tif"))
        assert (data.plain_tiff(raw) is not None) == (plain and dtype in TYPES[:3])


def test_strips_out_of_order_pages_colours_and_cut_files_are_left_to_tifffile(tmp_path):
    x, path = np.arange(576, dtype=np.uint16).reshape(24, 24), tmp_path / "x.tif"
    tifffile.imwrite(path, x, metadata=None, rowsperstrip=12)
    raw = np.fromfile(path, np.uint8)
    with tifffile.TiffFile(path) as file:
        tag = file.pages[0].tags["StripOffsets"]
        at, starts = tag.valueoffset, tag.value
    raw[at:at + 8].view("<u4")[:] = starts[::-1]                                 # swap the two
    raw.tofile(path)
    assert data.plain_tiff(raw) is None
    assert np.array_equal(data.read_tiff(path), np.roll(x, 12, 0))
    for cut in (0, 3, 7, 40, len(raw) - 1):
        assert data.plain_tiff(raw[:cut]) is None
    tifffile.imwrite(path, np.stack([x, x + 1]), metadata=None)                  # two pages
    assert np.array_equal(data.read_tiff(path), x)
    tifffile.imwrite(path, np.dstack([x, x, x]), metadata=None, photometric="rgb")
    assert data.plain_tiff(np.fromfile(path, np.uint8)) is None
    assert data.read_tiff(path).shape == (24, 24, 3)


@pytest.mark.parametrize("flags", [{}, {"rowsperstrip": 5}])
def test_a_mutated_header_is_read_as_tifffile_reads_it_or_left_to_it(flags):
    file, rng, read = io.BytesIO(), np.random.default_rng(1), 0
    x = np.arange(576, dtype=np.uint16).reshape(24, 24)
    tifffile.imwrite(file, x, metadata=None, **flags)
    raw = np.frombuffer(file.getvalue(), np.uint8)
    for _ in range(500):
        bad = raw.copy()
        bad[rng.integers(0, len(raw) - x.nbytes, 2)] = rng.integers(0, 256, 2)
        got = data.plain_tiff(bad)
        if got is not None:
            try:
                with tifffile.TiffFile(io.BytesIO(bad.tobytes())) as file:
                    want = file.pages[0].asarray()
            except tifffile.TiffFileError:                     # of the page that should follow
                continue
            assert got.dtype == want.dtype and np.array_equal(got, want)
            read += 1
    assert read > 100


# --------------------------------------------------------------------------------- check and stats


def test_check_lists_exactly_the_bad_files_and_exits_with_1(toy, tmp_path, capsys):
    for i in range(5):
        shutil.copytree(f"{toy}/s2c/{i:07d}", tmp_path / "s2c" / f"{i:07d}")
        shutil.copytree(f"{toy}/s1/{i:07d}", tmp_path / "s1" / f"{i:07d}")
    command = ["check", str(tmp_path), "--modality"]
    assert not data.main([*command, "s2c", "--workers", "2"])
    assert capsys.readouterr().out == f"{tmp_path}: 20 images of 5 scenes, 0 bad files\n"

    def file(modality, i, s, band):
        return sorted(Path(tmp_path, modality, f"{i:07d}").iterdir())[s] / f"{band}.tif"
    file("s2c", 1, 0, "B3").unlink()
    os.truncate(file("s2c", 1, 0, "B4"), 700)                                    # same product
    tifffile.imwrite(file("s2c", 2, 3, "B1"), np.zeros((4, 4), np.uint8))
    tifffile.imwrite(file("s2c", 4, 1, "B8"), np.zeros((12, 12), np.uint16))
    x = np.zeros((24, 24), np.float32)
    x[3, 4] = np.nan
    tifffile.imwrite(file("s1", 3, 2, "VH"), x)
    want = [(file("s2c", 1, 0, "B3"), "missing"), (file("s2c", 1, 0, "B4"), "unreadable TIFF"),
            (file("s2c", 2, 3, "B1"), "uint8 pixels, s2c has uint16"),
            (file("s2c", 4, 1, "B8"), "(12, 12) pixels, expected 24 x 24")]
    for workers in ("0", "2"):
        assert data.main([*command, "s2c", "--workers", workers])
        *lines, last = capsys.readouterr().out.splitlines()
        assert len(lines) == len(want) and last.endswith("20 images of 5 scenes, 4 bad files")
        assert all(x.startswith(f"{path}: {why}") for x, (path, why) in zip(lines, want))
    run = subprocess.run([sys.executable, str(ROOT / "data.py"), *command, "s1"],
                         capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stdout.splitlines() == [f"{file('s1', 3, 2, 'VH')}: NaN or infinite pixels",
                                       f"{tmp_path}: 20 images of 5 scenes, 1 bad files"]
    command = ["pack", str(tmp_path), str(tmp_path / "out"), "--modality", "s1"]
    run = subprocess.run([sys.executable, str(ROOT / "data.py"), *command], capture_output=True,
                         text=True)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "data.py: error: " in run.stderr and "VH.tif: NaN or infinite pixels" in run.stderr


def test_a_bad_first_file_hides_no_other_and_sets_no_measure(toy, tmp_path, capsys):
    for i in range(4):
        shutil.copytree(f"{toy}/s1/{i:07d}", tmp_path / "s1" / f"{i:07d}")
    first, last = (sorted((tmp_path / "s1" / f"{i:07d}").iterdir())[0] / "VV.tif" for i in (0, 3))
    tifffile.imwrite(first, np.zeros((25, 25), np.float32))                    # of 24: resampled
    assert data.open_data(str(tmp_path), "s1").size == 24
    first.unlink()
    os.truncate(last, 700)
    assert data.main(["check", str(tmp_path), "--modality", "s1", "--workers", "0"])
    *lines, _ = capsys.readouterr().out.splitlines()
    assert [x.split(":")[0] for x in lines] == [str(first), str(last)]


def test_a_cut_jpeg_is_bad_and_each_bad_image_is_one_line(tmp_path, capsys):
    import imagecodecs
    (tmp_path / "a").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    whole = imagecodecs.jpeg8_encode(noise)
    for name, raw in (("0.jpg", whole), ("1.jpg", whole[:len(whole) // 2]), ("2.png", b"junk")):
        (tmp_path / "a" / name).write_bytes(raw)
    assert data.main(["check", str(tmp_path), "--modality", "rgb", "--workers", "0"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "1.jpg: unreadable" in lines[0] and "2.png: unreadable" in lines[1]
    assert last.endswith("3 images of 3 scenes, 2 bad files")


def test_a_folder_that_is_no_product_is_named_with_its_scene(toy, tmp_path):
    shutil.copytree(f"{toy}/s1/0000000", tmp_path / "s1" / "0000000")
    (tmp_path / "s1" / "0000000" / "notes").mkdir()
    with pytest.raises(ValueError, match="s1/0000000: not a scene .*'notes' has no date"):
        data.open_data(str(tmp_path), "s1")


@pytest.mark.parametrize("modality", ["s1", "s2c"])
def test_stats_equal_numpys_over_all_pixels_in_the_sensors_units(toy, tmp_path, modality, capsys):
    for i in range(4):
        shutil.copytree(f"{toy}/{modality}/{i:07d}", tmp_path / modality / f"{i:07d}")
    scenes = data.open_data(str(tmp_path), modality)
    got = data.statistics(scenes, workers=2)
    for c, band in enumerate(data.BANDS[modality]):
        x = np.float64([data.resize(tifffile.imread(f"{f}/{band}.tif"), 24).reshape(24, 24)
                        for row in scenes.files for f in row])
        mean, std = (v[c] for v in data.STATS[modality])
        want = [x.mean(), x.std(), x.min(), x.max(), (x < mean - 2 * std).mean(),
                (x > mean + 2 * std).mean(), mean, std]
        assert np.allclose(got[c], want, rtol=1e-9)
    data.main(["stats", str(tmp_path), "--modality", modality, "--workers", "0"])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 1 + len(data.BANDS[modality])
    assert rows[1].split()[:2] == [data.BANDS[modality][0], f"{got[0, 0]:.2f}"]
