"""Folders of images as people have them, and what happens to each when it is trained on.

    python tests/lab/folders.py tests/lab/results/folders.md

Every folder is written here, with a few small images, and trained on for one step.  Either that
works, or one line says why not; what looks wrong and cannot be refused is said in a `data:` line.
"""
import contextlib
import dataclasses
import io
import json
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import model  # noqa: E402
import pretrain  # noqa: E402

SIDE = 24                             # of the images
COUNT = 8                             # images of a folder
TRAINING = ["--arch", "vit_tiny", "--img-size", "16", "--patch-size", "4", "--hidden", "16",
            "--batch-size", "4", "--holdout", "0", "--max-steps", "1", "--workers", "0",
            "--device", "cpu"]

# ---------------------------------------------------------------------------------- writing images


def noise(sensor, i=0, side=SIDE):
    """(C,side,side) pixels around the mean of each band, in the sensor's units."""
    rng = np.random.default_rng(i)
    mean = np.float64(sensor.mean)[:, None, None]
    std = np.float64(sensor.std)[:, None, None]
    return mean + 0.5 * std * rng.standard_normal((len(mean), side, side))


def colours(i=0, height=SIDE, width=SIDE):
    """(height,width,3) uint8."""
    return np.random.default_rng(i).integers(30, 220, (height, width, 3), np.uint8)


def write_tiff(path, x):
    """x (C,H,W) as one page of C bands, or (H,W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {}
    if len(x) == 1:
        x = x[0]
    if x.ndim == 3:
        x = x.transpose(1, 2, 0)
        options = {"photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(path, x, metadata=None, **options)


def write_picture(path, x):
    """A PNG or JPEG (H,W,C) or (H,W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    imagecodecs.imwrite(str(path), np.ascontiguousarray(x))


def write_tiffs(root, sensor, change=lambda x: x):
    """COUNT images of a sensor; change(x): what to write for x in its units."""
    for i in range(COUNT):
        write_tiff(root / f"{i}.tif", change(noise(sensor, i)).astype(sensor.dtype))


def write_sensor(root, **fields):
    """A sensor's JSON file beside the images -> the flag that names it."""
    path = root / "sensor.json"
    path.write_text(json.dumps(fields))
    return ["--modality", str(path)]


BLOSC = {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1, "blocksize": 0}
ENCODERS = {
    "blosc": lambda x: imagecodecs.blosc_encode(x, typesize=2, shuffle=True, compressor="lz4"),
    "zstd": imagecodecs.zstd_encode,
    "zlib": imagecodecs.zlib_encode,
    "gzip": imagecodecs.gzip_encode,
}


def write_zarr(file, name, x, chunks, compressor=BLOSC, order="C", fill=None):
    """An array as zarr, version 2, writes it into a zip."""
    meta = {"zarr_format": 2, "shape": x.shape, "chunks": chunks, "dtype": x.dtype.str,
            "compressor": compressor, "filters": None, "fill_value": fill, "order": order}
    file.writestr(f"{name}/.zarray", json.dumps(meta))
    grid = [-(-length // chunk) for length, chunk in zip(x.shape, chunks)]
    for number in np.ndindex(*grid):
        chunk = np.zeros(chunks, x.dtype)
        source = x[tuple(slice(i * c, (i + 1) * c) for i, c in zip(number, chunks))]
        chunk[tuple(slice(0, length) for length in source.shape)] = source
        raw = chunk.tobytes(order)
        if compressor:
            raw = ENCODERS[compressor["id"]](raw)
        file.writestr(f"{name}/{'.'.join(map(str, number))}", raw)


def write_zip(path, x, bands, places, products, chunks=None, **options):
    """A zip of SSL4EO-S12 v1.1: x (places,seasons,C,H,W); products (places,seasons) names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chunks = chunks or (1, 1, *x.shape[2:])
    with zipfile.ZipFile(path, "w") as file:
        write_zarr(file, "bands", x, chunks, **options)
        for name, values in (("band", bands), ("sample", places), ("file_id", products)):
            values = np.array(values)
            write_zarr(file, name, values, values.shape)


def product_names(places, kind="S2"):
    """(places,4) names of products as SSL4EO-S12 has them."""
    names = []
    for i in range(places):
        days = [f"2020{month:02d}{i + 1:02d}" for month in (1, 4, 7, 10)]
        if kind == "S1":
            names.append([f"S1A_IW_GRDH_1SDV_{day}T010203_{day}T010228_032911_03CFF0_9BAF"
                          for day in days])
        else:
            names.append([f"{day}T054639_{day}T054831_T43RCP" for day in days])
    return names


# ----------------------------------------------------------------------------------- the folders

S1, S2C, S2A = data.SENSORS["s1"], data.SENSORS["s2c"], data.SENSORS["s2a"]
PLANET = dict(bands=["blue", "green", "red", "nir"], kind="optical", dtype="uint16",
              mean=[500, 700, 800, 2500], std=[200, 250, 350, 800])
POWER = dict(bands=["VV", "VH"], kind="radar", dtype="float32", decibels=True,
             mean=S1.mean, std=S1.std)
UNIT = dict(bands=S2C.bands, kind="optical", dtype="float32",
            mean=[mean / 10000 for mean in S2C.mean], std=[std / 10000 for std in S2C.std])


def planet(root):
    write_tiffs(root, data.make_sensor(PLANET))
    return write_sensor(root, **PLANET)


def planet_pages(root):
    for i in range(COUNT):
        x = noise(data.make_sensor(PLANET), i).astype(np.uint16)
        tifffile.imwrite(root / f"{i}.tif", x, photometric="minisblack", metadata=None)
    return write_sensor(root, **PLANET)


def planet_as_rgb(root):
    write_tiffs(root, data.make_sensor(PLANET))
    return ["--modality", "rgb"]


def planet_nodata(root):
    fields = PLANET | {"nodata": 0}

    def with_border(x):
        x[:, :8] = 0
        return x
    write_tiffs(root, data.make_sensor(PLANET), with_border)
    return write_sensor(root, **fields)


def planet_mostly_empty(root):
    def with_border(x):
        x[:, :16] = 0
        return x
    write_tiffs(root, data.make_sensor(PLANET), with_border)
    return write_sensor(root, **PLANET)


def reflectance(root):
    write_tiffs(root, data.make_sensor(UNIT))
    return write_sensor(root, **UNIT)


def reflectance_as_s2c(root):
    write_tiffs(root, data.make_sensor(UNIT))
    return ["--modality", "s2c"]


def reflectance_in_wrong_unit(root):
    write_tiffs(root, data.make_sensor(UNIT))
    return write_sensor(root, **UNIT | {"mean": S2C.mean, "std": S2C.std})


def level_2a(root):
    write_tiffs(root, S2A)
    return ["--modality", "s2a"]


def level_2a_as_s2c(root):
    write_tiffs(root, S2A)
    return ["--modality", "s2c"]


def with_offset(root):
    write_tiffs(root, S2C, lambda x: x + 1000)
    return ["--modality", "s2c"]


def linear_power(root):
    write_tiffs(root, S1, lambda x: 10 ** (x / 10))
    return write_sensor(root, **POWER)


def linear_power_as_s1(root):
    write_tiffs(root, S1, lambda x: 10 ** (x / 10))
    return ["--modality", "s1"]


def decibels(root):
    write_tiffs(root, S1)
    return ["--modality", "s1"]


def decibels_with_holes(root):
    def with_hole(x):
        x[:, 3, 4] = np.nan
        return x
    write_tiffs(root, S1, with_hole)
    return ["--modality", "s1"]


def one_band(root):
    for i in range(COUNT):
        write_picture(root / f"{i}.png", colours(i)[..., 0])
    return write_sensor(root, bands=["pan"], kind="optical", dtype="uint8", mean=[125], std=[55])


def eurosat_files(root):
    for i in range(COUNT):
        x = noise(S2C, i)
        in_file = [x[data.EUROSAT_ORDER.index(k)] for k in range(13)]
        write_tiff(root / "Forest" / f"{i}.tif", np.uint16(in_file))


def eurosat(root):
    eurosat_files(root)
    return ["--modality", "s2c", "--layout", "eurosat"]


def eurosat_without_layout(root):
    eurosat_files(root)
    return ["--modality", "s2c"]


def classes(root):
    for i in range(COUNT):
        write_picture(root / ("field" if i % 2 else "town") / f"{i}.png", colours(i))
    return ["--modality", "rgb", "--labels", "classes"]


def flat_classes(root):
    for i in range(COUNT):
        write_picture(root / f"{i}.png", colours(i))
    return ["--modality", "rgb", "--labels", "classes"]


def beside(root):
    classes(root)
    write_picture(root / "overview.png", colours())
    return ["--modality", "rgb"]


def too_deep(root):
    for i in range(COUNT):
        write_picture(root / "images" / "town" / f"{i}.png", colours(i))
    return ["--modality", "rgb"]


def nothing(root):
    return ["--modality", "rgb"]


def rgba(root):
    for i in range(COUNT):
        x = np.dstack([colours(i), np.full((SIDE, SIDE), 255, np.uint8)])
        tifffile.imwrite(root / f"{i}.tif", x, photometric="rgb", extrasamples=["unassalpha"])
    return ["--modality", "rgb"]


def palette(root):
    for i in range(COUNT):
        tifffile.imwrite(root / f"{i}.tif", colours(i)[..., 0], photometric="palette",
                         colormap=np.zeros((3, 256), np.uint16))
    return ["--modality", "rgb"]


def sixteen_bits(root):
    for i in range(COUNT):
        write_picture(root / f"{i}.png", colours(i).astype(np.uint16) * 257)
    return ["--modality", "rgb"]


def sixteen_bits_scaled(root):
    sixteen_bits(root)
    return write_sensor(root, bands=["R", "G", "B"], kind="rgb", dtype="uint16", scale=1 / 257)


def sizes(root):
    for i in range(COUNT):
        height, width = (SIDE, SIDE) if i < 5 else (SIDE + i, 2 * SIDE)
        write_picture(root / f"{i}.jpg", colours(i, height, width))
    return ["--modality", "rgb"]


def tiles(root):
    sizes(root)
    return ["--modality", "rgb", "--tile", "16"]


def hidden_files(root):
    flat_classes(root)
    (root / "._0.png").write_bytes(b"what macOS leaves")
    return ["--modality", "rgb"]


def cut_off(root):
    sizes(root)
    raw = (root / "3.jpg").read_bytes()
    (root / "3.jpg").write_bytes(raw[:len(raw) // 2])
    return ["--modality", "rgb"]


def table(root, rows, separator=","):
    """Images and a table of their labels beside the folder's images."""
    for i in range(COUNT):
        write_picture(root / f"{i}.png", colours(i))
    lines = [["image", "water", "trees"], *rows]
    (root / "labels.csv").write_text("\n".join(separator.join(line) for line in lines))
    return ["--modality", "rgb", "--labels", str(root / "labels.csv")]


def commas(root):
    return table(root, [["0", "1", "0"], ["1.png", "1", "1"]])


def tabs(root):
    return table(root, [["0", "1", "0"], ["1.png", "1", "1"]], "\t")


def row_without_image(root):
    return table(root, [["0", "1", "0"], ["77", "1", "1"]])


def half_a_label(root):
    return table(root, [["0", "1", "0.5"]])


def zips(root):
    x = np.stack([[noise(S2C, 4 * i + s) + 1000 for s in range(4)] for i in range(COUNT)])
    places = [f"{i:07d}" for i in range(COUNT)]
    bands = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11",
             "B12"]
    write_zip(root / "train" / "S2L1C" / "a.zarr.zip", x.astype(np.int16), bands, places,
              product_names(COUNT))
    return ["--modality", "s2c"]


def damaged_zip(root):
    flags = zips(root)
    path = root / "train" / "S2L1C" / "a.zarr.zip"
    raw = bytearray(path.read_bytes())
    raw[2000:2100] = bytes(100)
    path.write_bytes(raw)
    return flags


@dataclass
class Case:
    write: Callable        # write(root) writes the folder and returns the flags
    text: str              # what it is
    said: str              # a part of a line that is said, "" for none
    trains: bool


CASES = [
    Case(planet, "4 bands, uint16, a sensor's JSON", "bands blue green red nir", True),
    Case(planet_pages, "the same, each band a page of the TIFF", "bands blue green red nir", True),
    Case(planet_as_rgb, "the same, as rgb", "uint16 (24, 24, 4), expected 3 bands of uint8", False),
    Case(planet_nodata, "the same with a border of 0, nodata 0", "", True),
    Case(planet_mostly_empty, "more border than image, no nodata",
         "clipped: blue 67%, green 67%", True),
    Case(reflectance, "13 bands, float32, reflectance 0 to 1, JSON", "bands B1 B2", True),
    Case(reflectance_as_s2c, "the same, as s2c", "float32 (13, 24, 24), expected", False),
    Case(reflectance_in_wrong_unit, "the same, JSON with statistics of 0 to 10000",
         "have the same value: B2 100%", True),
    Case(level_2a, "12 bands, uint16, L2A, as s2a", "bands B1 B2", True),
    Case(level_2a_as_s2c, "the same, as s2c", "(24, 24, 12), expected 13 bands", False),
    Case(with_offset, "13 bands, uint16, L1C of 2022 with its +1000, as s2c",
         "clipped: B10 100%", True),
    Case(decibels, "2 bands, float32, decibels, as s1", "bands VV VH", True),
    Case(decibels_with_holes, "the same with NaN", "NaN or infinite pixels", False),
    Case(linear_power, "2 bands, float32, linear power, JSON with decibels", "bands VV VH", True),
    Case(linear_power_as_s1, "the same, as s1", "clipped: VV 100%, VH 100%", True),
    Case(one_band, "1 band, 8-bit PNG, JSON", "bands pan", True),
    Case(eurosat, "13 bands in EuroSAT's order, --layout eurosat",
         "files hold B1 B2 B3 B4 B5 B6 B7 B8 B9 B10 B11 B12 B8A", True),
    Case(eurosat_without_layout, "the same, without the flag", "clipped: B10 100%", True),
    Case(classes, "RGB PNG in class folders, --labels classes", "8 labelled", True),
    Case(flat_classes, "RGB PNG without folders, --labels classes", "has no folders of classes",
         False),
    Case(beside, "RGB PNG in folders and beside them", "images beside folders of images", False),
    Case(too_deep, "RGB PNG two folders deep", "no rgb images (.tif .tiff .png .jpg .jpeg) in it",
         False),
    Case(nothing, "an empty folder", "no rgb images", False),
    Case(hidden_files, "RGB PNG with hidden files of macOS", "8 images of 24 px", True),
    Case(rgba, "RGBA TIFF", "8 images of 24 px", True),
    Case(palette, "TIFF with a palette", "numbers of a palette; save it as RGB", False),
    Case(sixteen_bits, "16-bit RGB PNG, as rgb", "uint16 (3, 24, 24), expected 3 bands of uint8",
         False),
    Case(sixteen_bits_scaled, "the same, JSON with scale 1/257", "bands R G B", True),
    Case(sizes, "JPEG of several sizes, not square", "3 of 8 images are not 24 x 24", True),
    Case(tiles, "the same, --tile 16", "8 of 8 images are not 16 x 16", True),
    Case(cut_off, "the same, one cut off", "3.jpg: unreadable image (ValueError: JPEG is cut off)",
         False),
    Case(commas, "RGB and a table of labels with commas", "2 labelled", True),
    Case(tabs, "the same with tabs", "2 labelled", True),
    Case(row_without_image, "a row without an image", "labels.csv: 77: no such image", False),
    Case(half_a_label, "a label of 0.5", "labels.csv: 0: labels are 0 or 1", False),
    Case(zips, "SSL4EO-S12 v1.1, as s2c", "32 images of 24 px", True),
    Case(damaged_zip, "the same, damaged", "damaged, its checksum differs", False),
]


def run(case, folder):
    """Train on the folder of a case -> (did it train, the lines of the data that were said)."""
    root = Path(folder, "data")
    root.mkdir()
    flags = case.write(root)
    model.VITS["vit_tiny"] = {"width": 32, "depth": 1, "heads": 1}       # it is saved quickly
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            pretrain.main([*flags, "--data", str(root), "--out", f"{folder}/run", *TRAINING])
    except (ValueError, OSError) as error:
        return False, [data.error_message(error).replace(f"{root}/", "").replace(str(root), "DIR")]
    lines = [line.replace(str(root), "DIR").removeprefix("data: ")
             for line in out.getvalue().splitlines() if line.startswith("data: ")]
    return True, lines


def main(argv=None):
    path, = argv or sys.argv[1:]
    lines = ["# What happens to folders of images", "",
             "Made by `python tests/lab/folders.py tests/lab/results/folders.md`: every folder is "
             "written with", f"{COUNT} images of {SIDE} px or so and trained on for one step. "
             "`tests/test_own_data.py` runs the same.", "",
             "| folder | trains | what is said |", "|---|---|---|"]
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            trains, said = run(case, folder)
        said = "<br>".join(line.replace("|", "\\|") for line in said)
        lines.append(f"| {case.text} | {'yes' if trains else 'no'} | {said} |")
    Path(path).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
