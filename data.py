"""Sensors, archives, packs, augmentation, and a toy world to practise on.

Every data set becomes one array and one table.  An archive only lists its images.  `pack` reads
them, scales them, joins their labels and meets their bad files; everything else opens the pack:

    images.npy    (n,C,H,W) uint8, all images of a scene one after another
    images.csv    a row an image: scene, image, split, labels (names of classes, joined by ;)
    pack.json     the sensor, the classes, where the labels come from, what was left out and why
    masks.npy     where images have masks: (n,H,W) uint8, the class of each pixel, 255 unlabelled

A scene is a place with one or more images, its seasons.  Of a large image that is cut into chips
it is the image, and each chip is one of its images.  These are the archives:

    read_ssl4eo        root/{s1,s2c,s2a}/{0000000}/{product}/{band}.tif           [1], v1.0
                       root/{S1GRD,S2L1C,S2L2A,S2RGB}/*.zarr.zip                  [1], v1.1
    read_bigearthnet   root/BigEarthNet-{...}/{patch}/{patch}_{band}.tif          [2], v1 and v2
    read_folder        TIFF, PNG and JPEG files, in class folders or not
    make_toy           writes an artificial SSL4EO-S12 v1.0 tree with labels

All sensors are scaled in one way: x' = (x - mean) / (4 std) + 1/2, clipped to [0,1], so that
mean - 2 std becomes 0 and mean + 2 std becomes 1 [SoftCon README, "Data normalization"].  Packs
hold x' as uint8, 0 to 255; networks get it as float, 0 to 1.  Pictures have mean 127.5 and std
63.75, so that their 0 to 255 stay as they are.

A file holds its bands where the sensor's `channels` says.  Nothing guesses another order from the
names of folders: a wrong one would train without a word.

[1] Wang et al. 2023, SSL4EO-S12; the labels are SSL4EO-S12-ML of SoftCon
[2] Sumbul et al. 2021, BigEarthNet-MM (v1); Clasen et al. 2024, reBEN (v2)
"""
import argparse
import csv
import dataclasses
import json
import logging
import os
import re
import shutil
import struct
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
import torch
import torch.nn.functional as F
from tqdm import tqdm

# tifffile logs what is wrong with a file before it raises an error; the error is enough
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

# ---------------------------------------------------------------------------------------- errors

# What tifffile, imagecodecs, zarr, pyarrow, csv and json raise for files that are cut off, damaged
# or something else.  Codecs raise RuntimeErrors of their own.
BAD_FILE = (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError, AttributeError,
            EOFError, struct.error, zlib.error, csv.Error, zipfile.BadZipFile,
            tifffile.TiffFileError)


class InputError(ValueError):
    """What a user gave cannot be used.  The message is one line that names file, flag or value."""


class MissingPackage(Exception):
    """A package that only some files need is not installed: no fault of these files."""


def require(condition, problem):
    """Raise InputError(problem) unless the condition holds."""
    if not condition:
        raise InputError(problem)


@contextmanager
def reading(path, problem="unreadable"):
    """Turn what a library raises about a file into an InputError of one line that names the file.

    An InputError gets the name as well, and so does an error of the disk, which is no fault of the
    file and stays an OSError.  A package that is not installed is a MissingPackage.  MemoryError
    and NameError go on as they are.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing") from error
    except ImportError as error:
        raise MissingPackage(f"{path}: needs a package: pip install {error.name}") from error
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    except BAD_FILE as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: {problem} ({type(error).__name__}: {reason})") from error


def read_text(path):
    """The content of a text file in UTF-8."""
    with reading(path):
        return Path(path).read_text(encoding="utf-8-sig")


def read_json(path):
    """The dict in a JSON file."""
    text = read_text(path)
    with reading(path, "no JSON"):
        content = json.loads(text)
        require(isinstance(content, dict), "its JSON is no {name: value}")
    return content


# --------------------------------------------------------------- flags that pretrain and probe have


def number(kind, low, high):
    """An argparse type: an int or a float (`kind`) between low and high, both included."""
    def convert(text):
        value = kind(text)                             # ValueError: argparse says "invalid value"
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} must lie in {low} to {high}")
        return value
    return convert


def find_device(name):
    """The torch.device of --device.  InputError: torch or this machine does not have it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:          # AssertionError: a torch without CUDA
        reason = str(error).partition("\n")[0]
        raise InputError(f"--device {name}: {reason}") from error
    return device


# --------------------------------------------------------------------------------------- sensors


@dataclass
class Sensor:
    """One kind of images.  Lists have an entry for each band; InputError: fields do not agree."""
    name: str         # as --modality takes it; the folder's name in an SSL4EO-S12 tree
    bands: list       # names of the bands
    kind: str         # "optical": reflectance; "radar": decibels; "rgb": display values, 0 to 255
    dtype: str        # type of the pixels in the files, as numpy calls it
    mean: list = field(default_factory=list)             # in the sensor's units
    std: list = field(default_factory=list)
    ratios: list = field(default_factory=list)           # side of a pixel over the finest's: 1, 2
    red_green_blue: list = field(default_factory=list)   # positions of these bands, or empty
    channels: list = field(default_factory=list)         # where in a file each lies; empty: 0, 1,
                                                         # 2, ..., and the file has no others
    scale: float = 1.0           # units = pixels * scale + offset
    offset: float = 0.0
    decibels: bool = False       # pixels are linear power: reading turns the units into decibels
    nodata: float = None         # value of pixels without a measurement; packs hold the mean there

    def __post_init__(self):
        C = len(self.bands)
        if self.kind == "rgb":                 # to_uint8 then leaves 0 to 255 as they are
            self.mean = self.mean or [127.5] * C
            self.std = self.std or [63.75] * C
        self.ratios = self.ratios or [1] * C
        self.red_green_blue = self.red_green_blue or find_red_green_blue(self.bands)

        require(C > 0 and len(set(self.bands)) == C, f"bands {self.bands}: none, or a name twice")
        kinds = ("optical", "radar", "rgb")
        require(self.kind in kinds, f"kind {self.kind!r}: not one of {', '.join(kinds)}")
        require(np.dtype(self.dtype).kind in "iuf", f"dtype {self.dtype!r}: neither int nor float")
        for name in ("mean", "std", "ratios", "channels"):
            values = getattr(self, name)
            given = values or name != "channels"
            require(len(values) == C or not given, f"{name}: {len(values)} numbers for {C} bands")
            require(np.isfinite(values).all(), f"{name} {values}: not finite")
        require(min(self.std) > 0, f"std {self.std}: not above 0")
        require(min(self.ratios) == 1, f"ratios {self.ratios}: the finest band has 1")
        require(min(self.channels, default=0) >= 0
                and len(set(self.channels)) == len(self.channels),
                f"channels {self.channels}: one twice, or below 0")
        positions = {*range(C)}
        require(len(self.red_green_blue) in (0, 3) and positions >= {*self.red_green_blue},
                f"red_green_blue {self.red_green_blue}: not three positions of {C} bands")
        require(self.scale != 0 and np.isfinite([self.scale, self.offset]).all(),
                f"scale {self.scale}, offset {self.offset}: units would not depend on pixels")


def find_red_green_blue(bands):
    """Positions of the bands that are red, green and blue by their names; empty: there are none."""
    names = [re.sub("^b0", "b", str(band).lower()) for band in bands]
    for colours in ("b4 b3 b2", "red green blue", "r g b"):
        colours = colours.split()
        if set(colours) <= set(names):
            return [names.index(colour) for colour in colours]
    return []


def numbers(text):
    """A row of a table as a list: a table without commas reads like the published one."""
    return [float(word) for word in text.split()]


# mean and std: of all of SSL4EO-S12 [SSL4EO-S12 convert_rgb.py; torchgeo resnet.py]
SENSORS = {
    # Sentinel-1 GRD: backscatter in decibels
    "s1": Sensor(
        "s1", ["VV", "VH"], "radar", "float32",
        mean=[-12.59, -20.26], std=[5.26, 5.91]),
    # Sentinel-2 L1C, light as it reaches the satellite through the air: reflectance x 10000
    "s2c": Sensor(
        "s2c",
        "B1 B2 B3 B4 B5 B6 B7 B8 B8A B9 B10 B11 B12".split(),
        "optical", "uint16",
        mean=numbers("1612.9 1397.6 1322.3 1373.1 1561.0 2108.4 2390.7 2318.7 2581.0 837.7 22.0 "
                     "2195.2 1537.4"),
        std=numbers("791.0 854.3 878.7 1144.9 1127.5 1164.2 1276.0 1249.5 1345.9 577.5 47.5 "
                    "1340.0 1142.9"),
        ratios=[6, 1, 1, 1, 2, 2, 2, 1, 2, 6, 6, 2, 2]),     # pixels of 60, 10 and 20 m
    # Sentinel-2 L2A, light as it leaves the ground: reflectance x 10000, without B10
    "s2a": Sensor(
        "s2a",
        "B1 B2 B3 B4 B5 B6 B7 B8 B8A B9 B11 B12".split(),
        "optical", "uint16",
        mean=numbers("756.4 889.6 1151.7 1307.6 1637.6 2212.6 2442.0 2538.9 2602.9 2666.8 2388.8 "
                     "1821.5"),
        std=numbers("1111.4 1159.1 1188.1 1375.2 1376.6 1358.6 1418.4 1476.4 1439.9 1582.1 1460.7 "
                    "1352.2"),
        ratios=[6, 1, 1, 1, 2, 2, 2, 1, 2, 6, 2, 2]),
    # aerial or satellite pictures
    "rgb": Sensor("rgb", ["R", "G", "B"], "rgb", "uint8"),
}
# EuroSAT is L1C too; its files hold B8A last.  One sensor has the statistics of SSL4EO-S12, which
# networks are trained with, the other EuroSAT's own [SSL4EO-S12 eurosat_dataset.py].
SENSORS["eurosat"] = replace(
    SENSORS["s2c"], name="eurosat", ratios=[1] * 13,
    channels=[*range(8), 12, *range(8, 12)])
SENSORS["eurosat-own"] = replace(
    SENSORS["eurosat"], name="eurosat-own",
    mean=numbers("1353.73 1117.20 1041.88 946.55 1199.19 2003.01 2374.01 2301.22 2599.78 732.18 "
                 "12.10 1820.70 1118.20"),
    std=numbers("897.27 736.02 684.78 620.03 791.86 1341.28 1595.39 1545.53 1750.12 475.12 98.27 "
                "1216.49 736.70"))


def find_sensor(name):
    """The sensor of that name, or the one in that JSON file.  InputError: there is none."""
    if name.endswith(".json"):
        fields = read_json(name)
        with reading(name):
            return make_sensor(fields, Path(name).stem)
    require(name in SENSORS,
            f"--modality {name}: unknown, take one of {', '.join(SENSORS)}, or a JSON file")
    return SENSORS[name]


def make_sensor(fields, name="own"):
    """A Sensor from a dict of its fields, as JSON holds them.

    bands, kind and dtype must be there, mean and std too unless the pixels are display values.
    InputError: a field is unknown, missing, or does not agree with the others.
    """
    with reading(f"sensor {name}", "unsuitable"):
        return Sensor(**{"name": name} | fields)


# --------------------------------------------------------------------------------------- scaling


def to_units(x, sensor):
    """Pixels as stored, any shape -> float32 in the sensor's units, NaN: nothing was measured.

    InputError: pixels are NaN or infinite, and that does not say nodata.
    """
    missing = np.zeros(x.shape, bool)
    if sensor.nodata is not None:
        missing = np.isnan(x) if np.isnan(sensor.nodata) else x == sensor.nodata
    require((np.isfinite(x) | missing).all(),
            "NaN or infinite pixels; if nothing was measured there, give the sensor a nodata")
    scale, offset = np.float32([sensor.scale, sensor.offset])
    units = np.float32(x) * scale + offset
    if sensor.decibels:
        missing |= units <= 0                            # no power has no logarithm
        units = 10 * np.log10(np.where(missing, 1, units))
    if missing.any():
        units[missing] = np.nan
    return units


def to_uint8(x, sensor):
    """(C,H,W) in the sensor's units -> uint8 (C,H,W): mean -+ 2 std become 0 and 255.

    Values beyond saturate.  (A plain cast would wrap: reflectance 12000 as x/10000*255 gives 50.)
    NaN, a pixel without a measurement, becomes the mean.
    """
    mean = np.float32(sensor.mean)[:, None, None]                    # (C,1,1)
    std = np.float32(sensor.std)[:, None, None]                      # (C,1,1)
    x = np.float32(x) - (mean - 2 * std)
    x *= 255 / (4 * std)
    x += 0.5                                                         # the cast rounds down
    x[np.isnan(x)] = 127.5
    return x.clip(0, 255, out=x).astype(np.uint8)


def to_input(x, sensor):
    """An array (C,H,W), pixels as stored, bands in the sensor's order -> float (1,C,H,W) in [0,1].

    It is what the networks were trained on: units, scale, clip, 256 levels.  `sensor` is that of
    the pack; pixels of SSL4EO-S12 v1.1 differ from those of v1.0.  InputError: another number of
    bands, or NaN.
    """
    x = np.asarray(x)
    C = len(sensor.bands)
    require(x.ndim == 3 and len(x) == C,
            f"array of shape {x.shape}: {sensor.name} takes ({C}, height, width), in the order "
            f"{' '.join(sensor.bands)}")
    levels = to_uint8(to_units(x, sensor), sensor)
    return torch.from_numpy(levels).float()[None] / 255


def resize(x, size):
    """(C,H,W) -> (C,size,size), bilinear, pixel centres aligned; what shrinks is antialiased."""
    if x.shape[1:] == (size, size):
        return x
    image = torch.from_numpy(np.ascontiguousarray(x, np.float32))[None]
    shrinks = size < x.shape[2]
    image = F.interpolate(image, (size, size), mode="bilinear", antialias=shrinks)
    return image[0].numpy()


# ----------------------------------------------------------------------------------- image files

TIFF = (".tif", ".tiff")
PICTURES = (".png", ".jpg", ".jpeg")
UNLABELLED = 255                                                     # in a mask


def whole_pages(tiff):
    """The pages of a TIFF but for smaller copies and masks."""
    return [page for page in tiff.pages if not (page.is_reduced or page.is_mask)]


def read_tiff(path, bands=1, window=None):
    """A TIFF -> (C,H,W) as stored.  InputError: missing, cut off, no TIFF, or colours in disguise.

    Its channels are those of all its pages.  Smaller copies and masks in the file are passed over;
    of bands + 1 channels one of opacity is left out.  window: see read_page.
    """
    with reading(path), open(path, "rb") as file, tifffile.TiffFile(file) as tiff:
        pages = whole_pages(tiff)
        page = pages[0]
        for kind in ("PALETTE", "MINISWHITE"):
            require(page.photometric != tifffile.PHOTOMETRIC[kind],
                    f"its pixels are of the kind {kind}; save it as grey or RGB")
        x = np.stack([read_page(page, window) for page in pages])    # (pages,H,W) or with channels
        if page.axes == "YXS":
            x = np.moveaxis(x, 3, 1)                                 # (pages,channels,H,W)
        x = x.reshape(-1, *x.shape[-2:])                             # (C,H,W)
        opacity = {tifffile.EXTRASAMPLE.ASSOCALPHA, tifffile.EXTRASAMPLE.UNASSALPHA}
        if len(x) == bands + 1 and opacity & {*page.extrasamples[-1:]}:
            x = x[:bands]
        return x.astype(x.dtype.newbyteorder("="), copy=False)       # the machine's byte order


def read_page(page, window=None):
    """The pixels of a TIFF's page, or of its window (top, left, side), in the order of its axes.

    Of a window only the tiles or strips that it touches are read, which needs the package zarr.
    """
    if window is None:
        return page.asarray()
    import zarr
    top, left, side = window
    part = {"Y": slice(top, top + side), "X": slice(left, left + side)}
    pixels = zarr.open_array(page.aszarr(), mode="r")
    return pixels[tuple(part.get(axis, slice(None)) for axis in page.axes)]


def read_picture(path, bands=3):
    """A PNG or JPEG -> (C,H,W) as stored; opacity is left out unless it is one of the bands."""
    with reading(path):
        raw = Path(path).read_bytes()
        if raw.startswith(b"\x89PNG"):
            x = imagecodecs.png_decode(raw)
        else:
            require(raw.startswith(b"\xff\xd8"), "neither PNG nor JPEG")
            # of a JPEG without its end marker the decoder makes the missing rows up
            require(b"\xff\xd9" in raw[-32:], "JPEG is cut off")
            x = imagecodecs.jpeg8_decode(raw)
    x = np.atleast_3d(x).transpose(2, 0, 1)
    if len(x) in (2, 4) and len(x) != bands:
        x = x[:-1]
    return x


last_picture = lru_cache(maxsize=2)(read_picture)   # an image and its mask: chips come in order


def read_pixels(path, bands, window=None):
    """A TIFF, PNG or JPEG that should have so many bands -> (C,H,W) as stored, all or a window."""
    if path.lower().endswith(TIFF):
        return read_tiff(path, bands, window)
    if window is None:
        return read_picture(path, bands)
    top, left, side = window
    return last_picture(path, bands)[:, top:top + side, left:left + side]


def size_of(path, mask=None):
    """Height and width of a TIFF, PNG or JPEG.  InputError: its mask has others."""
    if path.lower().endswith(TIFF):
        with reading(path), tifffile.TiffFile(path) as tiff:
            page = whole_pages(tiff)[0]
            size = (page.imagelength, page.imagewidth)
    else:
        size = read_picture(path).shape[1:]
    require(not mask or size_of(mask) == size, f"{mask}: not as large as its image")
    return size


def read_file(path, sensor, bands, channels=(), window=None):
    """An image file -> its `bands` bands (bands,H,W) in the sensor's units.

    channels: where in the file they lie; empty: in this order, and it has no others.  rgb: a grey
    image has three equal bands.  window: see read_page.  InputError: other channels or another
    type, NaN, and as read_tiff.
    """
    x = read_pixels(path, bands, window)
    if sensor.kind == "rgb" and len(x) == 1:
        x = np.repeat(x, bands, axis=0)
    with reading(path):
        if channels:
            require(len(x) > max(channels), f"{len(x)} channels, the sensor's are {channels}")
            x = x[channels]
        require(x.dtype == sensor.dtype and len(x) == bands,
                f"{x.dtype} {x.shape}, expected {bands} bands of {sensor.dtype}; a sensor's "
                f"`channels` pick some of a file's")
        return to_units(x, sensor)


def read_colours(path):
    """A json {class: "#RRGGBB", or several} -> (names of classes, {colour, an int: class number}).

    Those of "unlabelled" have the number 255.
    """
    table = read_json(path)
    classes = [name for name in table if name != "unlabelled"]
    number_of = {}
    with reading(path, 'not {class: "#RRGGBB"}'):
        for name, colours in table.items():
            index = classes.index(name) if name in classes else UNLABELLED
            for colour in colours.split():
                require(re.fullmatch("#[0-9a-fA-F]{6}", colour), f"{colour} is not #RRGGBB")
                code = int(colour[1:], 16)
                require(code not in number_of, f"{colour} is twice in it")
                number_of[code] = index
    return classes, number_of


def read_mask(path, number_of=None, window=None):
    """A mask -> (H,W) uint8, the number of each pixel's class, 255: unlabelled.

    number_of: of each colour, see read_colours; None: the file holds the numbers.  window: see
    read_page.  InputError: neither numbers nor known colours.
    """
    channels = 3 if number_of else 1
    x = read_pixels(path, channels, window)
    if len(x) == 1:                                                  # grey is a colour, too
        x = np.repeat(x, channels, axis=0)
    with reading(path):
        require(len(x) == channels and x.dtype.kind in "iu" and 0 <= x.min() and x.max() < 256,
                f"{x.dtype} {x.shape}, no mask of 1 channel of numbers below 256, or with "
                f"--colours of 3")
        if not number_of:
            return x[0].astype(np.uint8)
        red, green, blue = x.astype(int)
        colours, place = np.unique(red << 16 | green << 8 | blue, return_inverse=True)
        for colour in colours:
            require(colour in number_of, f"colour #{colour:06X} is not in --colours")
        return np.uint8([number_of[colour] for colour in colours])[place].reshape(red.shape)


def read_bands(prefix, sensor):
    """prefix + band + .tif for each band -> (C,S,S) in the sensor's units, all as the finest.

    InputError names each bad file.
    """
    paths = [f"{prefix}{band}.tif" for band in sensor.bands]
    bands = []                                                       # (1,H,W) each
    problems = []
    for path in paths:
        try:
            bands.append(read_file(path, sensor, bands=1))
        except InputError as error:
            problems.append(str(error))
    require(not problems, "; ".join(problems))
    size = max(bands[sensor.ratios.index(1)].shape)
    for path, x, ratio in zip(paths, bands, sensor.ratios):
        side = size // ratio
        # some files of SSL4EO-S12 are a few pixels off
        require(max(abs(length - side) for length in x.shape[1:]) <= size // 40,
                f"{path}: {x.shape[1:]} pixels, expected {side} x {side}")
    return np.concatenate([resize(x, size) for x in bands])


# -------------------------------------------------------------------------------------- archives


@dataclass(slots=True)
class Image:
    """One image of an archive, not yet read."""
    scene: str          # name of the place
    name: str           # path in the archive
    read: Callable      # read() -> (C,H,W) in the sensor's units, NaN where nothing was measured
    labels: tuple = ()  # names of classes; empty: unlabelled
    split: str = ""     # "train", "val" or "test", where the archive says so
    size: Callable = None        # size() -> (H,W), if it can be cut into chips
    mask: Callable = None        # mask() -> (H,W) uint8, see read_mask


@dataclass
class Archive:
    """What lies in a folder: images of one sensor, those of a scene together, in order of time."""
    images: list             # of Image
    sensor: Sensor           # of the files: v1.1 has its own type, offset and statistics
    classes: tuple = ()
    labels_from: str = ""    # where the labels come from, in words
    notes: list = field(default_factory=list)    # lines for the user
    mask_classes: tuple = ()                     # empty: masks, if there are any, have numbers


def open_archive(root, sensor, labels=None, masks=None, colours=None):
    """The archive in `root`, by the reader for what lies there.

    labels: for SSL4EO-S12 the json of SSL4EO-S12-ML (None: the one in root, if any); for folders of
    images a table, see labels_from_table, or "classes", the folders; None: they are unlabelled.
    BigEarthNet brings its own.  masks, colours: see read_folder.  InputError: nothing there that
    suits the sensor.
    """
    folders = set(subfolders(root))
    require(not os.path.exists(f"{root}/images.npy"), f"{root}: is a pack already")
    if folders & set().union(*BEN_FOLDERS.values()):
        require(not labels, f"--labels {labels}: BigEarthNet brings its own")
        return read_bigearthnet(root, sensor)
    if folders & {"s1", "s2c", "s2a"} or find_zips(root, sensor):
        require(labels != "classes", f"--labels classes: {root} holds products of SSL4EO-S12")
        return read_ssl4eo(root, sensor, labels)
    return read_folder(root, sensor, labels, masks, colours)


def subfolders(folder):
    """Sorted names of the folders in a folder."""
    require(os.path.isdir(folder), f"{folder}: no such folder")
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


# ----------------------------------------------------------------------------------- SSL4EO-S12

# Dynamic World's indices 0 to 8, which SSL4EO-S12-ML uses
CLASSES = ("water", "trees", "grass", "flooded vegetation", "crops", "shrub & scrub", "built",
           "bare", "snow & ice")


def read_ssl4eo(root, sensor, path=None):
    """SSL4EO-S12 [1], v1.0 or v1.1 as it is downloaded; sensor s1, s2c, s2a, of v1.1 rgb too.

    path: SSL4EO-S12-ML's json, which names S2 products; None: root/ssl4eo_multilabel.json if it is
    there.  A scene or product that it leaves out, or gives an empty list, is unlabelled.
    """
    list_products = list_tree
    if find_zips(root, sensor):
        list_products = list_zips
        if sensor == SENSORS[sensor.name]:     # one from a JSON file says itself what files hold
            sensor = ZIP_SENSORS[sensor.name]
    if not path and os.path.exists(f"{root}/ssl4eo_multilabel.json"):
        path = f"{root}/ssl4eo_multilabel.json"
    archive = Archive([], sensor)
    scenes = list_products(root, sensor)
    table = read_labels(path) if path else {}
    named = {}                                 # {scene: {product: ...}} of the modality in the json
    absent = [table.get(scene, {}).keys() - products.keys() for scene, products in scenes.items()]
    if any(absent):
        named = other_s2(root, sensor, list_products)
    by_order = 0
    for scene, products in scenes.items():
        labels = table.get(scene, {})
        sources = label_sources(labels, products, named.get(scene, ()))
        for product, source in zip(products, sources):
            classes = labels.get(source, ())
            by_order += len(classes) > 0 and source != product
            archive.images.append(Image(scene, f"{scene}/{product}", products[product], classes))
    if path:
        labelled = sum(len(image.labels) > 0 for image in archive.images)
        require(labelled, f"{path}: labels none of the products here")
        archive.classes = CLASSES
        archive.labels_from = f"{Path(path).name} (SSL4EO-S12-ML)"
        archive.notes.append(f"{labelled} images have labels from {path}, {by_order} of them by "
                             f"place and order of time")
    return archive


def label_sources(labels, products, named):
    """Names of the products whose labels the products of a scene take, one by one.

    labels: {product: classes} of the scene.  They go to the products that they name.  If these are
    not here, because the archive is radar or another level of S2, they go by order of time: that of
    `named`, the other modality's products, or without these that of the labels.  If the numbers of
    products differ, no image gets any.
    """
    for names in (products, named, sorted(labels, key=date)):
        if labels.keys() <= {*names} and len(names) == len(products):
            return names
    return products


def other_s2(root, sensor, list_products):
    """As list_products gives, of another S2 modality beside the sensor's; {}: there is none."""
    for name in ("s2c", "s2a"):
        if name != sensor.name:
            with suppress(InputError):
                return list_products(root, SENSORS[name])
    return {}


def list_tree(root, sensor):
    """{scene: {product: function that reads it}}, products in order of time."""
    tree = f"{root}/{sensor.name}"
    scenes = {}
    for scene in subfolders(tree):
        products = sorted(subfolders(f"{tree}/{scene}"), key=date)
        require(products, f"{tree}/{scene}: scene without a product")
        scenes[scene] = {product: partial(read_bands, f"{tree}/{scene}/{product}/", sensor)
                         for product in products}
    require(scenes, f"{tree}: no scenes")
    return scenes


def date(product):
    """Sensing time of a product: the first time stamp in its name."""
    found = re.search(r"\d{8}T\d{6}", product)
    require(found, f"product name {product!r} has no date such as 20200604T054639")
    return found[0]


def read_labels(path):
    """SSL4EO-S12-ML's json -> {scene: {S2 product: (class name, ...)}}.

    In the file classes are strings "0" to "8".  InputError: another form or an unknown class.
    """
    table = read_json(path)
    names = dict(zip("012345678", CLASSES))
    with reading(path, "not labels of the form {scene: {product: [class]}}"):
        for products in table.values():
            for product, numbers in products.items():
                products[product] = tuple(names[str(number)] for number in numbers)
    return table


# ------------------------------------------------------------------------- SSL4EO-S12 v1.1, zarr

ZIP_FOLDERS = {"s1": "S1GRD", "s2c": "S2L1C", "s2a": "S2L2A", "rgb": "S2RGB"}

# What its files hold.  The pixels of Sentinel-2 are reflectance x 10000 + 1000, as in ESA's
# products since 2022.  Its statistics [SSL4EO-S12-v1.1, README] include that offset, ours do not.
ZIP_SENSORS = {
    "s1": replace(
        SENSORS["s1"], dtype="float16",
        mean=[-12.577, -20.265], std=[5.179, 5.872]),
    "s2c": replace(
        SENSORS["s2c"], dtype="int16", offset=-1000.0,
        mean=numbers("1607.345 1393.068 1320.225 1373.963 1562.536 2110.071 2392.832 2321.154 "
                     "2583.770 838.712 21.753 2205.112 1545.798"),
        std=numbers("786.523 849.702 875.318 1143.578 1126.248 1161.980 1273.505 1246.790 "
                    "1342.755 576.795 45.626 1340.347 1145.036")),
    "s2a": replace(
        SENSORS["s2a"], dtype="int16", offset=-1000.0,
        mean=numbers("793.243 924.863 1184.553 1340.936 1671.402 2240.082 2468.412 2563.244 "
                     "2627.704 2711.071 2416.714 1849.625"),
        std=numbers("1160.144 1201.092 1219.943 1397.225 1400.035 1373.136 1429.170 1485.025 "
                    "1447.836 1652.703 1471.002 1365.307")),
    "rgb": SENSORS["rgb"],
}


def find_zips(root, sensor):
    """Paths of the sensor's zips in root, root/train and root/val, sorted."""
    paths = []
    if sensor.name in ZIP_FOLDERS:
        for folder in (".", "train", "val"):
            paths += sorted(Path(root, folder, ZIP_FOLDERS[sensor.name]).glob("*.zarr.zip"))
    return [str(path) for path in paths]


def list_zips(root, sensor):
    """As list_tree."""
    scenes = {}
    for path in tqdm(find_zips(root, sensor), "opening", leave=False):
        with reading(path, "no zip of SSL4EO-S12 v1.1"):
            file = open_zip(path)
            places = file["sample"][:].tolist()
            products = file["file_id"][:].tolist()                   # [places] of [seasons]
            bands = file["band"][:].tolist()
            chunk = file["bands"].chunks[0]
            # B01 is B1, vv is VV
            channels = sensor.channels or range(len(bands))
            plain = [re.sub("^B0", "B", bands[channel].upper()) for channel in channels]
            require(plain == [band.upper() for band in sensor.bands],
                    f"bands {' '.join(bands)}, {sensor.name} has {' '.join(sensor.bands)}")
        for i, (place, names) in enumerate(zip(places, products)):
            scenes[place] = {
                name: partial(read_zip_image, path, i, names.index(name), chunk, sensor)
                for name in sorted(names, key=date)}
    require(scenes, f"{root}: no zips of {sensor.name}")
    return scenes


def open_zip(path):
    """The zarr group in a zip: SSL4EO-S12 v1.1 has 64 places of four seasons in each."""
    import zarr
    return zarr.open_group(zarr.storage.ZipStore(path, mode="r"), mode="r")


# Where a chunk holds many places, images that are read in order decode it once for each season.
@lru_cache(maxsize=4)
def read_chunk(path, start, stop, season):
    """(places,C,H,W) as stored."""
    return np.asarray(open_zip(path)["bands"][start:stop, season])


def read_zip_image(path, place, season, chunk, sensor):
    """One image in a zip -> (C,H,W) in the sensor's units.  chunk: the places of a chunk."""
    start = place // chunk * chunk
    with reading(f"{path}: place {place}, season {season}"):
        x = read_chunk(path, start, start + chunk, season)[place - start]        # (C,H,W)
        if sensor.channels:
            x = x[sensor.channels]
        require(x.dtype == sensor.dtype, f"{x.dtype} pixels, {sensor.name} has {sensor.dtype}")
        return to_units(x, sensor)


# ---------------------------------------------------------------------------------- BigEarthNet

# names of the folder of patches in v1, in v2, and in short
BEN_FOLDERS = {
    "s1": {"BigEarthNet-S1-v1.0", "BigEarthNet-S1", "S1"},
    "s2a": {"BigEarthNet-v1.0", "BigEarthNet-S2", "S2"},
    "s2c": {"BigEarthNet-v1.0", "BigEarthNet-S2", "S2"},
}

# the 19 classes, which v2's labels name, and the CORINE labels of v1 that belong to each
BEN_CLASSES = {
    "Urban fabric": ["Continuous urban fabric", "Discontinuous urban fabric"],
    "Industrial or commercial units": [],
    "Arable land": ["Non-irrigated arable land", "Permanently irrigated land", "Rice fields"],
    "Permanent crops": ["Vineyards", "Fruit trees and berry plantations", "Olive groves",
                        "Annual crops associated with permanent crops"],
    "Pastures": [],
    "Complex cultivation patterns": [],
    "Land principally occupied by agriculture, with significant areas of natural vegetation": [],
    "Agro-forestry areas": [],
    "Broad-leaved forest": [],
    "Coniferous forest": [],
    "Mixed forest": [],
    "Natural grassland and sparsely vegetated areas": ["Natural grassland",
                                                       "Sparsely vegetated areas"],
    "Moors, heathland and sclerophyllous vegetation": ["Moors and heathland",
                                                       "Sclerophyllous vegetation"],
    "Transitional woodland, shrub": ["Transitional woodland/shrub"],
    "Beaches, dunes, sands": [],
    "Inland wetlands": ["Inland marshes", "Peatbogs"],
    "Coastal wetlands": ["Salt marshes", "Salines"],
    "Inland waters": ["Water courses", "Water bodies"],
    "Marine waters": ["Coastal lagoons", "Estuaries", "Sea and ocean"],
}


def read_bigearthnet(root, sensor):
    """BigEarthNet [2], v1 or v2; sensor s1, s2a, or s2c, whose B10 is then 0 in the pack.

    S2 patches are L2A and scaled with the statistics of s2a, as the first author of SoftCon does
    [Copernicus-Bench].  v1 has a json of labels in each patch; v2 has labels and official splits in
    root/metadata.parquet, which leaves out patches of snow and cloud.
    """
    found = [name for name in subfolders(root) if name in BEN_FOLDERS.get(sensor.name, ())]
    require(found, f"{root}: no BigEarthNet folder for modality {sensor.name}")
    archive = Archive([], sensor, tuple(BEN_CLASSES), "BigEarthNet's own labels")
    on_disk = sensor
    if sensor.name == "s2c":
        on_disk = SENSORS["s2a"]
        b10 = sensor.bands.index("B10")        # 0 is its mean - 2 std, so that the pack has 0
        mean = np.insert(on_disk.mean, b10, 2.0)
        std = np.insert(on_disk.std, b10, 1.0)
        archive.sensor = replace(sensor, mean=mean.tolist(), std=std.tolist())
        archive.notes.append("B10 is 0 everywhere, since level L2A has none")
    files = [re.sub(r"^B(\d)$", r"B0\1", band) for band in on_disk.bands]        # B1 is B01
    on_disk = replace(on_disk, bands=files)

    table = f"{root}/metadata.parquet"
    v2 = os.path.exists(table)
    paths = Path(root, found[0]).glob("S*/S*" if v2 else "S*")       # tile/patch
    patches = {path.name: path for path in paths}
    if v2:
        known = read_metadata(table, "s1_name" if sensor.name == "s1" else "patch_id")
    else:
        known = {name: read_patch_labels(path, table) for name, path in patches.items()}
    class_of = {}                              # {label of v1 or v2: class}
    for name, corine in BEN_CLASSES.items():
        class_of |= dict.fromkeys([name, *corine], name)
    for name in sorted(patches.keys() & known.keys()):
        labels, split = known[name]
        classes = {class_of[label] for label in labels if label in class_of}
        read = partial(read_patch, f"{patches[name]}/{name}_", on_disk, archive.sensor)
        archive.images.append(Image(name, name, read, tuple(sorted(classes)), split))
    require(archive.images, f"{root}/{found[0]}: no patches")
    return archive


def read_patch_labels(patch, table):
    """(labels, split) of a patch of v1, a Path; `table` is what v2 has instead."""
    path = patch / f"{patch.name}_labels_metadata.json"
    require(path.exists(), f"{path}: missing, and {table} of v2")
    return read_json(path).get("labels", []), ""


def read_metadata(path, column):
    """v2's table -> {name of a patch, from `column`: (labels, split)}."""
    columns = [column, "labels", "split"]
    with reading(path, f"no table with the columns {', '.join(columns)}"):
        import pyarrow.parquet
        rows = pyarrow.parquet.read_table(path, columns=columns).to_pylist()
        return {row[column]: (row["labels"], row["split"].replace("validation", "val"))
                for row in rows}


def read_patch(prefix, on_disk, sensor):
    """A patch -> (C,120,120) in the sensor's units; B10, which L2A does not have, is 0."""
    x = read_bands(prefix, on_disk)
    if len(x) < len(sensor.bands):
        x = np.insert(x, sensor.bands.index("B10"), 0, axis=0)
    return x


# -------------------------------------------------------------------------------- image folders


FROM_MASKS = "the masks: classes of 5 % of the pixels or more"
LABEL_SHARE = 0.05


def read_folder(root, sensor, labels=None, masks=None, colours=None):
    """All images in a folder and the folders in it, each a scene named by its path.

    TIFFs that hold all bands, and for up to four bands of 8 or 16 bits PNG and JPEG as well.
    labels: "classes", the first folders of the paths, or a table, see labels_from_table; None: the
    classes in the masks, if any.  masks: see find_masks; colours: see read_colours.
    """
    archive = Archive([], sensor)
    names = find_images(root, sensor)
    mask_of = find_masks(root, names, masks) if masks else dict.fromkeys(names)
    names = [*mask_of]
    number_of = None
    if colours:
        archive.mask_classes, number_of = read_colours(colours)
    first = {name: name.rpartition("/")[0].partition("/")[0] for name in names}      # folder or ""
    folders = sorted(set(first.values()))
    found = {}                                           # {image: its classes}
    if labels == "classes":
        require("" not in folders and len(folders) > 1,
                f"--labels classes: {root} has no folders of classes, or images beside them")
        archive.classes = tuple(folders)
        archive.labels_from = "the names of the folders"
        found = {name: (folder,) for name, folder in first.items()}
    elif labels:
        archive.classes, found = labels_from_table(labels, root, names)
        archive.labels_from = Path(labels).name
    elif masks:
        archive.classes = archive.mask_classes
        archive.labels_from = FROM_MASKS                 # see write_images
    elif 1 < len(folders) <= 30:
        archive.notes.append(f"no labels; --labels classes takes the folders: {', '.join(folders)}")

    image_of = {}                                        # {scene: its image}
    for name in names:
        scene = os.path.splitext(name)[0]
        require(scene not in image_of, f"{root}: {image_of.get(scene)} and {name} have one name; "
                                       f"if these are masks, say --masks .png")
        image_of[scene] = name
        path = f"{root}/{name}"
        read = partial(read_file, path, sensor, len(sensor.bands), sensor.channels)
        mask = partial(read_mask, mask_of[name], number_of) if masks else None
        size = partial(size_of, path, mask_of[name])
        classes = found.get(name, ())
        archive.images.append(Image(scene, name, read, classes, size=size, mask=mask))
    return archive


def find_images(root, sensor):
    """Sorted paths in root of the files that may be the sensor's images.  Hidden ones are none."""
    endings = TIFF
    if len(sensor.bands) <= 4 and sensor.dtype in ("uint8", "uint16"):
        endings = TIFF + PICTURES
    paths = []
    for folder, inside, files in os.walk(root, followlinks=True):
        inside[:] = [name for name in inside if not name.startswith(".")]
        paths += [Path(folder, name).relative_to(root) for name in files
                  if name.lower().endswith(endings) and not name.startswith(".")]
    require(paths, f"{root}: no {sensor.name} images ({' '.join(endings)}) in it or its folders")
    return [path.as_posix() for path in sorted(paths)]


def find_masks(root, names, masks):
    """Of the files `names` in root those that are images -> {image: path of its mask}.

    masks: a folder, in which a mask has the path of its image in root but for the ending, .png or
    .tif; or what masks beside their images have instead of the ending: .png, _mask.tif.
    """
    if os.path.isdir(masks):
        inside = os.path.relpath(masks, root) + "/"
        images = [name for name in names if not name.startswith(inside)]
        folder, endings = masks, (".png", *TIFF)
    else:
        require(masks.lower().endswith((".png", *TIFF)),
                f"--masks {masks}: no folder, and no ending such as .png or _mask.tif")
        images = [name for name in names if not name.endswith(masks)]
        folder, endings = root, (masks,)
    require(images, f"--masks {masks}: leaves no image in {root}")
    mask_of = {}
    for name in images:
        stem = f"{folder}/{os.path.splitext(name)[0]}"
        paths = [stem + ending for ending in endings if os.path.exists(stem + ending)]
        mask_of[name] = paths[0] if paths else stem + endings[0]     # missing: said when it is read
    return mask_of


def labels_from_table(path, root, names):
    """Labels of the images `names`, paths in root -> (classes, {image: (class, ...)}).

    Tabs or commas separate the cells of the table.  Its header row names the classes after the
    first cell; each other row begins with an image, with or without its folder and its ending, and
    has 0 or 1 for each class.  Images without a row are unlabelled.  InputError, naming the row.
    """
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    require(lines, f"{path}: empty")
    header, *rows = csv.reader(lines, delimiter="\t" if "\t" in lines[0] else ",")
    classes = tuple(cell.strip() for cell in header[1:])
    require(classes and len(set(classes)) == len(classes) and not set(classes) <= {"0", "1"},
            f"{path}: its first row does not name the classes, separated by tabs or commas")
    meant = {}                                           # {name in a row: images that it may mean}
    for name in names:
        inside = Path(name)
        for short in {inside.name, inside.stem, name, os.path.splitext(name)[0]}:
            meant.setdefault(short, []).append(name)
    found = {}
    for row in rows:
        name, *cells = [cell.strip() for cell in row]
        images = meant.get(name, [])
        require(len(images) == 1, f"{path}: {name}: the name of {len(images)} images in {root}, "
                                  f"write folder/image")
        require(images[0] not in found, f"{path}: {name}: its image has another row")
        require(len(cells) == len(classes) and set(cells) <= {"0", "1"},
                f"{path}: {name}: its labels are not {len(classes)} times 0 or 1")
        found[images[0]] = tuple(label for label, cell in zip(classes, cells) if cell == "1")
    return classes, found


# --------------------------------------------------------------------------------------- packing

HEADER = ["scene", "image", "split", "labels"]           # of images.csv


@contextmanager
def whole_folder(path):
    """Give a folder to write into, which becomes `path` when all is written, and goes if not."""
    folder = f"{os.path.normpath(path)}.part{os.getpid()}"
    os.makedirs(folder)
    try:
        yield folder
        os.rename(folder, path)
    except OSError as error:
        if error.filename:                     # of an image: see reading
            raise
        raise InputError(f"{folder}: not written ({error.strerror})") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def pack(archive, out, size=0, skip_bad=False, workers=os.cpu_count(), chip=0, stride=0):
    """Read, scale and write all images of an archive into the pack `out`, a new folder.

    size: side in pixels, to which the central square of each image is resized; 0: the side that
    most images have.  skip_bad: leave out the images that cannot be read, and name them.
    chip, stride: see chips_of; chips that are mostly without data are left out.
    InputError: bad images, after all are listed; a full disk.
    """
    require(not os.path.exists(out), f"{out}: exists; pack never overwrites")
    require(";" not in "".join(archive.classes), "a name of a class has a semicolon in it")
    require(chip or not stride, "--stride: goes with --chip")
    if chip:
        require(archive.images[0].size, "--chip: goes with folders of images, this is an archive")
        job = partial(chips_of, chip=chip, stride=stride or chip)
        chips = [*chain(*in_parallel(job, archive.images, workers, "sizes"))]
        note = f"{len(archive.images)} images, cut into {len(chips)} of up to {chip} x {chip}"
        archive = replace(archive, images=chips, notes=[*archive.notes, note])
    size = size or chip or usual_size(archive.images)
    with whole_folder(out) as folder:
        images, left_out, notes, mask_classes = write_images(folder, archive, size, workers,
                                                             chip > 0)
        classes = mask_classes if archive.labels_from == FROM_MASKS else archive.classes
        notes = archive.notes + notes
        bad = f"{len(left_out)} of {len(archive.images)} images cannot be read"
        require(skip_bad or not left_out, f"{bad}, see above; --skip-bad leaves them out")
        require(images, "; ".join([f"nothing to pack: {bad}", *notes]))
        require(len(mask_classes) > 1 or not images[0].mask,
                "the masks have not two classes; 255 is unlabelled: --colours makes it a class")
        if left_out:
            notes.append(f"{bad} and are left out: {', '.join([*left_out][:5])}")
        with open(f"{folder}/images.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(HEADER)
            for image in images:
                table.writerow([image.scene, image.name, image.split, ";".join(image.labels)])
        index = {"sensor": dataclasses.asdict(archive.sensor), "classes": classes,
                 "labels_from": archive.labels_from, "notes": notes, "left_out": left_out,
                 "chip": chip, "mask_classes": mask_classes}
        Path(folder, "pack.json").write_text(json.dumps(index, indent=1))
    scenes = {image.scene for image in images}
    labelled = sum(len(image.labels) > 0 for image in images)
    print(*notes, f"{out}: {len(images)} images of {len(scenes)} scenes, {labelled} labelled, "
                  f"{size} x {size} pixels, {len(archive.sensor.bands)} bands", sep="\n")


def usual_size(images):
    """The side that most images have, of up to 64 that are spread over the list."""
    sides = Counter()
    problem = ""
    for image in images[::len(images) // 64 + 1]:
        try:
            sides[min(image.read().shape[1:])] += 1
        except InputError as error:                      # the others are named when packed
            problem = str(error)
    require(sides, f"no image can be read, among them {problem}")
    return sides.most_common(1)[0][0]


def chips_of(image, chip, stride):
    """An Image -> those of its chips, squares of `chip` pixels as stored, `stride` pixels apart.

    The last of a row or column ends where the image does and overlaps the one before it: so no
    pixel is lost.  A chip is named by its first row and column.  An image with a side below `chip`
    stays whole, and so does one with a fault, which is named when it is packed.
    """
    try:
        H, W = image.size()
    except InputError:
        return [image]
    if min(H, W) < chip or (H, W) == (chip, chip):
        return [image]
    chips = []
    for top in [*range(0, H - chip, stride), H - chip]:
        for left in [*range(0, W - chip, stride), W - chip]:
            window = (top, left, chip)
            mask = image.mask and partial(image.mask, window=window)
            chips.append(replace(image, name=f"{image.name}/{top}_{left}", mask=mask,
                                 read=partial(image.read, window=window)))
    return chips


def write_images(folder, archive, size, workers, are_chips=False):
    """Write images.npy and masks.npy.

    Returns their Images, {name: what is wrong} of the others, notes, and the classes in the masks.
    """
    images = []
    left_out = {}
    remarks = Counter()
    pixels = np.zeros(256, int)                          # of each class, over all masks
    classes = archive.mask_classes or [str(k) for k in range(UNLABELLED)]    # numbers are names
    masked = archive.images[0].mask is not None
    n = len(archive.images)
    bands = len(archive.sensor.bands)
    job = partial(pack_image, sensor=archive.sensor, size=size)
    with (open(f"{folder}/images.npy", "wb") as file,
          open(f"{folder}/masks.npy", "wb") if masked else nullcontext() as mask_file):
        write_header(file, (n, bands, size, size))
        if masked:
            write_header(mask_file, (n, size, size))
        results = in_parallel(job, archive.images, workers, "packing")
        for image, (x, mask, said, problem) in zip(archive.images, results):
            if problem:
                left_out[image.name] = problem
                tqdm.write(problem)
                continue
            if are_chips and "empty" in said:
                remarks["empty"] += 1
                continue
            remarks.update(said)
            file.write(np.ascontiguousarray(x))
            images.append(image)
            if masked:
                mask_file.write(mask)
                areas = np.bincount(mask.ravel(), minlength=256)     # of each class
                pixels += areas
                if archive.labels_from == FROM_MASKS:
                    image.labels = [name for name, area in zip(classes, areas)
                                    if area >= LABEL_SHARE * mask.size]
        write_header(file, (len(images), bands, size, size))
        if masked:
            write_header(mask_file, (len(images), size, size))
    if not archive.mask_classes:
        last = max(np.flatnonzero(pixels[:UNLABELLED]), default=-1)
        classes = classes[:last + 1]
    notes = pack_notes(f"{folder}/images.npy", archive, size, remarks, are_chips)
    return images, left_out, notes, classes


def pack_notes(path, archive, size, remarks, are_chips):
    """Lines for the user; remarks: how often pack_image said what."""
    notes = []
    n = len(archive.images)
    if remarks["resized"]:
        notes.append(f"{remarks['resized']} of {n} images are not {size} x {size}: their central "
                     f"square is resized")
    if remarks["cropped"]:
        notes.append(f"{remarks['cropped']} of {n} images lose more than a tenth of their pixels "
                     f"by that; --chip {size} cuts those that are larger into chips")
    if are_chips and remarks["empty"]:
        notes.append(f"{remarks['empty']} of {n} chips are mostly without data and left out")
    x = np.load(path, mmap_mode="r")
    if len(x):
        notes += suspicious_bands(x[::max(1, len(x) // 16)], archive.sensor)
    return notes


def write_header(file, shape):
    """The beginning of a .npy file of uint8.  Its length is the same for any number of images."""
    file.seek(0)
    fields = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, fields)


def pack_image(image, sensor, size):
    """An Image -> (uint8 (C,size,size), its mask or None, what is remarkable, what is wrong)."""
    try:
        x = image.read()
        mask = None
        if image.mask:
            mask = image.mask()
            require(mask.shape == x.shape[1:],
                    f"{image.name}: {x.shape[1:]} pixels, its mask {mask.shape}")
    except InputError as error:
        return None, None, (), str(error)
    H, W = x.shape[1:]
    side = min(H, W)
    top = (H - side) // 2
    left = (W - side) // 2
    central = np.s_[..., top:top + side, left:left + side]
    remarks = {"resized": (H, W) != (size, size), "cropped": side < 0.9 * max(H, W),
               "empty": np.count_nonzero(np.isnan(x)) > x.size / 2}
    if image.mask:                             # each pixel has one class: that at its centre
        centres = ((np.arange(size) + 0.5) * side / size).astype(int)
        mask = mask[central][np.ix_(centres, centres)]
    return (to_uint8(resize(x[central], size), sensor), mask,
            [remark for remark, holds in remarks.items() if holds], "")


def in_parallel(job, items, workers, title):
    """Yield job(item) for each item of a list, in order, with a bar, by `workers` processes."""
    if workers <= 1:
        yield from map(job, tqdm(items, title))
        return
    wave = 128 * workers                       # at most so many results wait for who fetches them
    with (ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
          tqdm(total=len(items), desc=title) as bar):
        for start in range(0, len(items), wave):
            for result in pool.map(job, items[start:start + wave], chunksize=16):
                bar.update()
                yield result


def suspicious_bands(x, sensor):
    """Notes about bands of the images x (n,C,H,W) uint8 that look as if something was wrong."""
    suspicious = []
    for band, pixels in zip(sensor.bands, x.swapaxes(0, 1)):         # (n,H,W)
        shares = np.bincount(pixels.ravel(), minlength=256) / pixels.size
        share = max(shares[0] + shares[255], shares.max())
        if share > 0.5:
            suspicious.append(f"{band} {share:.0%}")
    if not suspicious:
        return []
    return [f"suspicious bands, clipped or of one value: {', '.join(suspicious)}; usual causes: "
            f"another order of bands, another unit (reflectance 0 to 1, linear power), another "
            f"level or offset of Sentinel-2, pixels without data; `python data.py stats` measures "
            f"each band"]


# ---------------------------------------------------------------------------------- packs, opened


class Pack:
    """A pack, opened: n images of m scenes, L classes.

    InputError: it is none, or its files do not agree.
    """

    def __init__(self, path):
        for name in ("images.npy", "images.csv", "pack.json"):
            require(os.path.exists(f"{path}/{name}"),
                    f"{path}: no pack, there is no {name}; `python data.py pack {path} NEW_FOLDER "
                    f"--modality s1|s2c|s2a|rgb|SENSOR.json` makes one of an archive or of images")
        index = read_json(f"{path}/pack.json")
        sensor = index.get("sensor", index)              # a name, a dict, or a sensor's file alone
        with reading(f"{path}/pack.json"):
            sensor = find_sensor(sensor) if isinstance(sensor, str) else make_sensor(sensor)
        C = len(sensor.bands)
        with reading(f"{path}/images.npy"):
            images = np.load(f"{path}/images.npy", mmap_mode="r")
            n = len(images)
            side = images.shape[-1]
        require(images.dtype == np.uint8 and images.shape == (n, C, side, side)
                and images.flags.c_contiguous,
                f"{path}/images.npy: {images.dtype} {images.shape}, expected uint8 (n, {C}, side, "
                f"side) for the {C} bands of {sensor.name}")
        scene_of, names, split, labels = read_images_csv(f"{path}/images.csv")
        require(len(names) == n, f"{path}: {n} images in images.npy, {len(names)} in images.csv")
        rows = {}
        for row, scene in enumerate(scene_of):
            rows.setdefault(scene, []).append(row)
        mentioned = {*";".join({*labels}).split(";")} - {""}

        self.path = path
        self.sensor = sensor
        self.images = images                             # (n,C,H,W) uint8, read only
        self.size = side                                 # in pixels
        self.names = names                               # [n] of the images
        self.split = np.array(split)                     # (n,) "train", "val", "test" or ""
        self.scenes = [*rows]                            # [m] names, in order of first images
        self.rows = [np.array(members) for members in rows.values()]         # [m]: rows of scene i
        text = "\n".join(rows)
        self.checksum = f"{zlib.crc32(text.encode()):08x}"           # packs of one archive agree
        self.classes = index.get("classes", sorted(mentioned))       # [L] names
        self.labels = multi_hot(labels, self.classes, path)          # (n,L) uint8; 0: unlabelled
        most = self.labels.sum(1).max(initial=0)
        self.one_label = bool(most == 1)                 # there are labels, one an image
        self.labels_from = index.get("labels_from", "")  # in words
        self.chip = index.get("chip", 0)                 # side of chips as cut; 0: whole images
        self.masks = open_masks(f"{path}/masks.npy", (n, side, side))
        self.mask_classes = index.get("mask_classes", [])            # names; 255 is unlabelled
        require(self.masks is None or self.mask_classes,
                f"{path}/pack.json: no mask_classes, which masks.npy needs")
        self.notes = index.get("notes", [])              # lines for the user
        self.file = open(f"{path}/images.npy", "rb", buffering=0)

    def read(self, rows, out):
        """Copy the images `rows`, k numbers, into out (k,C,H,W), a contiguous uint8 array.

        Whole images are read, by calls that leave Python's lock: several threads at once are as
        fast as the disk.  A memory map would fetch them in pieces of 4 KB.
        """
        for row, image in zip(rows, out, strict=True):
            memory = memoryview(image).cast("B")
            place = self.images.offset + int(row) * len(memory)
            while memory:
                count = os.preadv(self.file.fileno(), [memory], place)
                require(count > 0, f"{self.path}/images.npy: ends before image {row}")
                memory = memory[count:]
                place += count


def open_masks(path, shape):
    """masks.npy, (n,H,W) uint8, read only; None: the pack has none."""
    if not os.path.exists(path):
        return None
    with reading(path):
        masks = np.load(path, mmap_mode="r")
    require(masks.dtype == np.uint8 and masks.shape == shape,
            f"{path}: {masks.dtype} {masks.shape}, expected uint8 {shape} as images.npy")
    return masks


def open_pack(path):
    """The Pack in a folder."""
    return Pack(path)


def read_images_csv(path):
    """images.csv -> its four columns, lists of text."""
    with reading(path), open(path, newline="", encoding="utf-8-sig") as file:
        header, *rows = [row for row in csv.reader(file) if row] or [[]]
    require(rows and header == HEADER, f"{path}: not {','.join(HEADER)} and their rows")
    for number, row in enumerate(rows, start=2):
        require(len(row) == 4, f"{path}: row {number} has {len(row)} cells, expected 4")
        require(row[2] in ("train", "val", "test", ""),
                f"{path}: row {number} has split {row[2]!r}, expected train, val, test or nothing")
    return [list(column) for column in zip(*rows)]


def multi_hot(texts, classes, path):
    """["class;class", ...] -> (n,L) uint8."""
    index = {name: k for k, name in enumerate(classes)}
    y = np.zeros((len(texts), len(classes)), np.uint8)
    for row, text in enumerate(texts):
        for name in filter(None, text.split(";")):
            require(name in index, f"{path}/images.csv: class {name!r} is not in pack.json")
            y[row, index[name]] = 1
    return y


def held_out(names, fraction):
    """(n,) bool: the scenes set aside for testing, chosen by a hash of the name alone.

    So pretraining and probing agree without a list, whatever else lies in the folder.
    """
    hashes = [zlib.crc32(name.encode()) / 2 ** 32 for name in names]
    return np.array(hashes) < fraction


# ------------------------------------------------------------------------------------ statistics


def moments(image):
    """An Image -> (5,C), about the pixels of each band that hold a measurement.

    How many they are, their sum, sum of squares, min, max.
    """
    x = np.float64(image.read())
    x = x.reshape(len(x), -1)                                        # (C,HW)
    return np.stack([
        (~np.isnan(x)).sum(1),
        np.nansum(x, 1),
        np.nansum(x * x, 1),
        np.fmin.reduce(x, 1),                                        # of numbers, not of NaN
        np.fmax.reduce(x, 1)])


def statistics(archive, workers=0):
    """Mean, std, min and max of each band: (C,4).

    Over all pixels of all images, in the sensor's units; pixels without a measurement do not count.
    InputError: a bad image, or a band without any measurement.
    """
    x = np.stack([*in_parallel(moments, archive.images, workers, "statistics")])     # (n,5,C)
    count, sums, squares = x[:, :3].sum(0)                           # (C,) each
    require(count.all(), "a band without any measurement: is nodata right?")
    mean = sums / count
    std = np.sqrt((squares / count - mean ** 2).clip(0))
    low = np.fmin.reduce(x[:, 3])
    high = np.fmax.reduce(x[:, 4])
    return np.stack([mean, std, low, high], axis=1)


def print_statistics(archive, out, workers):
    """A line for each band: what its pixels are, and what the sensor takes them for.

    out: JSON file for a sensor with the mean and std of these pixels, or None.
    """
    sensor = archive.sensor
    table = statistics(archive, workers)
    if out:
        mean, std = table[:, :2].T.tolist()
        sensor = replace(sensor, name=Path(out).stem, mean=mean, std=std)
        Path(out).write_text(json.dumps(dataclasses.asdict(sensor), indent=1))
        print(f"{out}: {len(mean)} bands of {sensor.dtype}; check its unit and which bands are "
              f"red, green, blue; then --modality {out}")
    print("band      mean       std       min       max  sensor: mean       std")
    rows = np.column_stack([table, sensor.mean, sensor.std])
    for name, row in zip(sensor.bands, rows):
        print("{:4}{:10.2f}{:10.2f}{:10.2f}{:10.2f}{:14.2f}{:10.2f}".format(name, *row))


def new_sensor(root, fields):
    """A Sensor for the images in a folder; its mean and std, 0 and 1, are yet to be measured.

    fields: those that no file tells: bands, kind, and if need be channels, scale, offset, decibels
    and nodata.  InputError: fields do not agree, no images, or a bad one.
    """
    C = len(fields["bands"])
    sensor = make_sensor(fields | {"dtype": "uint8", "mean": [0.0] * C, "std": [1.0] * C})
    path = f"{root}/{find_images(root, sensor)[0]}"
    sensor.dtype = read_pixels(path, C).dtype.name
    if sensor.nodata is None and path.lower().endswith(TIFF):
        with tifffile.TiffFile(path) as tiff:
            tag = tiff.pages.first.tags.get("GDAL_NODATA")
        if tag:
            sensor.nodata = float(tag.value)
            print(f"{path}: GDAL's tag says that {sensor.nodata:g} is no data; --nodata overrides")
    return sensor


# --------------------------------------------------------------------------------- augmentation
#
# Numbers are drawn on the CPU, by a generator whose seed the caller knows, and applied where the
# images are.  Drawing them again gives the same pixels.


def draw_crops(n, generator, area_min=0.2, area_max=1.0):
    """The crops of n views: {name: (n,) floats}.

        h, w            sides as shares of the image's: area U(area_min, area_max) of the image,
                        aspect log-uniform in [3/4, 4/3]
        y, x            centre; the image spans [-1, 1]
        flip_y, flip_x  1 or -1: mirrored

    [SSL4EO-S12 pretrain_moco_v2_s2c.py; PerA; the vertical flip in SoftCon is ours]
    """
    u_area, u_aspect, u_y, u_x, u_flip_x, u_flip_y = torch.rand(6, n, generator=generator)
    area = area_min + (area_max - area_min) * u_area
    aspect = (4 / 3) ** (2 * u_aspect - 1)
    h = (area / aspect).sqrt().clamp(max=1)
    w = (area * aspect).sqrt().clamp(max=1)
    return {
        "h": h,
        "w": w,
        "y": (1 - h) * (2 * u_y - 1),
        "x": (1 - w) * (2 * u_x - 1),
        "flip_x": 1 - 2 * (u_flip_x < 0.5).float(),
        "flip_y": 1 - 2 * (u_flip_y < 0.5).float(),
    }


def draw_colours(n, sensor, generator, p=0.8, jitter=0.4, grey=0.2, blur=0.5):
    """The colours of n views: {name: (n,) floats; offset: (n,C) or (n,1)}.

    With probability p a view is jittered:

        brightness, contrast   factors U(1 - jitter, 1 + jitter), optical and rgb
        saturation             factor U(1 - jitter/2, 1 + jitter/2), rgb
        hue                    a turn of up to jitter/4, rgb
        offset                 up to 5 jitter dB for each band, radar: decibels are no brightness

    grey: probability that all bands become their mean (saturation 0).
    blur: probability that a view is blurred, with a std U(0.1, 2) of pixels at side 224.
    [SSL4EO-S12 pretrain_moco_v2_s2c.py; DeCUR for SAR; PerA augmentation.py; the offset is ours]
    """
    u = torch.rand(9, n, generator=generator)
    jittered = u[0] < p                                              # (n,)
    swings = jitter * (2 * u[[1, 2, 3, 4, 8]] - 1) * jittered        # (5,n) in [-jitter, jitter]
    brightness, contrast, saturation, hue, second = swings
    drawn = {
        "brightness": torch.ones(n),
        "contrast": torch.ones(n),
        "offset": torch.zeros(n, 1),
        "saturation": torch.ones(n),
        "hue": torch.zeros(n),
    }
    if sensor.kind == "radar":
        # the first two bands take numbers that are drawn anyway, those beyond get their own
        C = len(sensor.bands)
        others = torch.rand(max(0, C - 2), n, generator=generator)
        others = jitter * (2 * others - 1) * jittered                # (C-2,n)
        decibels = 5 * torch.stack([brightness, second, *others][:C], dim=1)     # (n,C)
        drawn["offset"] = decibels * (0.25 / torch.tensor(sensor.std))   # [0,1] spans 4 std
    else:
        drawn["brightness"] = 1 + brightness
        drawn["contrast"] = 1 + contrast
    if sensor.kind == "rgb":
        drawn["saturation"] = 1 + saturation / 2
        drawn["hue"] = hue / 4
    drawn["saturation"] = torch.where(u[5] < grey, 0, drawn["saturation"])
    drawn["blur"] = torch.where(u[6] < blur, 0.1 + 1.9 * u[7], 0)
    return drawn


def crop(x, p, size):
    """uint8 (n,C,H,W) and what draw_crops drew -> (n,C,size,size) in [0,1], on x's device.

    Each window, in whole pixels, is cut out, mirrored and resized, bilinear.  Where it shrinks, a
    pixel of the view is a mean over the pixels that it covers (antialias): so training shows the
    network what the probe does.  [torchvision, RandomResizedCrop]
    The views are of PyTorch's default type.
    """
    n, C, H, W = x.shape
    height = (p["h"] * H).round().clamp(min=1)
    width = (p["w"] * W).round().clamp(min=1)
    top = ((1 + p["y"]) / 2 * H - height / 2).round()
    left = ((1 + p["x"]) / 2 * W - width / 2).round()
    bottom = top + height
    right = left + width
    places = torch.stack([top, bottom, left, right, p["flip_y"], p["flip_x"]], dim=1)
    views = torch.empty(n, C, size, size, device=x.device)
    for i, place in enumerate(places.int().tolist()):
        top, bottom, left, right, flip_y, flip_x = place
        window = x[i:i + 1, :, top:bottom, left:right]
        if flip_y < 0:
            window = window.flip(2)
        if flip_x < 0:
            window = window.flip(3)
        window = window.to(views)
        views[i] = F.interpolate(window, (size, size), mode="bilinear", antialias=True)[0]
    return views.div_(255)


def colour(x, p):
    """float (n,C,H,W) in [0,1] and what draw_colours drew -> the same images in these colours."""
    # decided while the numbers are on the CPU: asking a GPU would make it wait
    blurred = p["blur"].nonzero()[:, 0]
    std = float(p["blur"].max()) * x.shape[-1] / 224
    reach = int(np.ceil(3 * std))                                    # in pixels
    p = {name: value.to(x.device, x.dtype, non_blocking=True).view(len(x), -1, 1, 1)
         for name, value in p.items()}                               # (n,1,1,1); offset (n,C,1,1)

    x = change_light(x, p["brightness"], p["contrast"], p["offset"])
    grey = x.mean(1, keepdim=True)                                   # (n,1,H,W)
    x = torch.lerp(grey, x, p["saturation"])                         # 0: grey
    if x.shape[1] == 3:
        x = turn_hue(x, grey, p["hue"])
    if len(blurred):
        rows = blurred.to(x.device, non_blocking=True)
        std = p["blur"][rows] * x.shape[-1] / 224                    # in pixels
        x = x.index_copy(0, rows, blur_images(x[rows], std, reach))
    return x


def change_light(x, brightness, contrast, offset):
    """x brightness + offset, then contrast about the mean of each band, clipped to [0,1].

    Both are one product: x b c + (o - m) c + m, where m is the mean after the first.
    """
    mean = x.mean((2, 3), keepdim=True) * brightness + offset        # (n,C,1,1)
    shift = mean + (offset - mean) * contrast
    return torch.addcmul(shift, x, brightness * contrast).clamp_(0, 1)


def turn_hue(x, grey, turn):
    """RGB images turned about the grey axis by `turn`, 1 being full circle; clipped to [0,1]."""
    side = x.roll(1, 1) - x.roll(-1, 1)                              # at right angles to x - grey
    side = side / 3 ** 0.5
    angle = 2 * torch.pi * turn
    turned = angle.cos() * (x - grey) + angle.sin() * side
    return (grey + turned).clamp(0, 1)


def blur_images(x, std, reach):
    """float (n,C,H,W), std (n,1,1,1) in pixels -> blurred by a Gaussian of 2 reach + 1 taps.

    All images and bands are the channels of one grouped convolution, down and then across.
    """
    n, C, H, W = x.shape
    taps = torch.arange(-reach, reach + 1, device=x.device).view(-1, 1)      # (taps,1)
    exponent = -(taps / std.clamp_min(1e-3)).square() / 2            # (n,1,taps,1)
    kernel = exponent.softmax(2).repeat_interleave(C, 0)             # (nC,1,taps,1), sum 1
    x = F.pad(x, [reach] * 4, mode="replicate")
    x = x.flatten(0, 1)[None]                                        # (1,nC,.,.)
    x = F.conv2d(x, kernel, groups=n * C)
    x = F.conv2d(x, kernel.mT, groups=n * C)
    return x.view(n, C, H, W)


# ---------------------------------------------------------------------------------- command line

EXAMPLES = """examples:
  python data.py toy toy                                  an artificial world of 2,000 scenes
  python data.py pack toy toy_s1 --modality s1            its radar images as a pack
  python data.py pack SSL4EO packed --modality s2c        v1.0 or v1.1, with the labels in it
  python data.py pack EuroSAT euro --modality eurosat --labels classes
  python data.py pack DIR mine --modality rgb --labels table.csv --size 128
  python data.py pack DIR mine --modality rgb --chip 224 --masks .png --colours colours.json
  python data.py stats SSL4EO --modality s2c              mean, std and range of each band
  python data.py stats DIR --bands B2 B3 B4 B8 --out my.json          a sensor for --modality
"""


def parse(argv):
    """Command line -> namespace of flags.  Wrong flags end the program with one line."""
    parser = argparse.ArgumentParser(
        description="Put archives and folders of satellite images into packs, measure them, write "
                    "the toy world.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    command = partial(commands.add_parser, allow_abbrev=False)
    source = argparse.ArgumentParser(add_help=False)                 # what pack and stats share
    source.add_argument("root", help="SSL4EO-S12, BigEarthNet, or a folder of TIFF, PNG or JPEG")
    source.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    modality = {"metavar": "SENSOR", "help": f"{', '.join(SENSORS)}, or a JSON file of stats"}

    toy = command("toy", help="write the toy world, an SSL4EO-S12 v1.0 tree")
    flag = toy.add_argument
    flag("root", help="a new folder")
    flag("--scenes", type=int, default=2000, help="places, four seasons each")
    flag("--size", type=int, default=36, help="side in pixels, a multiple of 6")
    flag("--seed", type=int, default=0, help="another seed, another world")

    packs = command("pack", help="put all images into one array and one table", parents=[source])
    add_pack_flags(packs.add_argument, modality)

    stats = command("stats", help="measure each band; make a sensor", parents=[source])
    either = stats.add_mutually_exclusive_group(required=True)
    either.add_argument("--modality", **modality)
    either.add_argument("--bands", nargs="+", metavar="BAND", help="names of a new sensor's bands")
    flag = stats.add_argument
    flag("--out", metavar="FILE", help="JSON file for a sensor with the mean and std measured")
    flag("--channels", nargs="+", type=int, default=[], metavar="N",
         help="where in a file each of its bands lies, from 0; default: 0 1 2 ...")
    flag("--kind", choices=["optical", "radar", "rgb"], default="optical",
         help="of the new sensor: which colours change in training (%(default)s)")
    flag("--scale", type=float, default=1.0, help="units = pixels * scale + offset")
    flag("--offset", type=float, default=0.0, help="for example -1000")
    flag("--decibels", action="store_true", help="pixels are linear power")
    flag("--nodata", type=float, help="pixels without a measurement; default: what GDAL's tag says")
    args = parser.parse_args(argv)
    if args.command == "stats" and args.modality:
        for name in NEW_SENSOR[1:]:
            require(getattr(args, name) == stats.get_default(name),
                    f"--{name}: goes with --bands; --modality says it already")
    return args


def add_pack_flags(flag, modality):
    """The flags that `pack` has and `stats` has not; modality: how both describe --modality."""
    flag("out", help="a new folder")
    flag("--modality", required=True, **modality)
    flag("--labels", metavar="FILE", help="the json of SSL4EO-S12-ML; a table of an image, then 0 "
                                          "or 1 for each class; or classes: the folders' names")
    flag("--masks", metavar="DIR",
         help="folder of masks, named as their images, or how masks beside their images end: .png, "
              "_mask.tif; classes of 5 %% of an image are its labels, unless --labels is given")
    flag("--colours", metavar="FILE",
         help='json {class: "#RRGGBB #RRGGBB"} of the masks, "unlabelled" too; default: they hold '
              'numbers, 255 unlabelled')
    flag("--skip-bad", action="store_true", help="leave out images that cannot be read")
    flag("--size", type=int, default=0, metavar="N", help="side in pixels; default: the usual one")
    flag("--chip", type=number(int, 1, 2**31), default=0, metavar="N",
         help="cut images larger than N pixels into chips of N x N, as stored")
    flag("--stride", type=number(int, 1, 2**31), default=0, metavar="N",
         help="from a chip to the next (default: --chip)")


# fields of a sensor that no file tells
NEW_SENSOR = ("bands", "kind", "channels", "scale", "offset", "decibels", "nodata")


def main(argv=None):
    """Run a command.  InputError, MissingPackage, OSError: what was given cannot be used."""
    args = parse(argv)
    if args.command == "toy":
        make_toy(args.root, args.scenes, args.size, args.seed)
    elif args.command == "pack":
        require(args.masks or not args.colours, "--colours: goes with --masks")
        archive = open_archive(args.root, find_sensor(args.modality), args.labels, args.masks,
                               args.colours)
        require(not args.masks or archive.images[0].mask, "--masks: goes with folders of images")
        pack(archive, args.out, args.size, args.skip_bad, args.workers, args.chip, args.stride)
    elif args.modality:
        archive = open_archive(args.root, find_sensor(args.modality))
        print_statistics(archive, args.out, args.workers)
    else:
        fields = {name: getattr(args, name) for name in NEW_SENSOR}
        archive = read_folder(args.root, new_sensor(args.root, fields))
        print_statistics(archive, args.out, args.workers)


# ------------------------------------------------------------------------------------- toy world

# rows in the order of CLASSES; reflectance x 10000 in the 13 bands of s2c
SPECTRA = np.float32([numbers(row) for row in (
    "1300 1000  800  550  450  350  320  280  260  120   10  120   80",
    "1220  880  800  520  850 1850 2200 2150 2350  800   14 1200  550",
    "1330 1080 1120  900 1500 2550 2950 2850 3050  980   18 2250 1250",
    "1290 1020  900  680  850 1400 1600 1550 1650  550   12  750  400",
    "1380 1130 1180  950 1600 3000 3900 3800 4000 1150   20 1900 1000",
    "1420 1200 1180 1250 1600 2050 2250 2200 2450  880   21 2700 1950",
    "1800 1720 1680 1750 1850 1950 2000 2050 2100  780   25 2100 1900",
    "1700 1560 1680 2100 2450 2600 2700 2700 2900  900   26 3500 3100",
    "4200 4000 3900 3900 3800 3600 3500 3400 3300 1300   60  800  600")])
# backscatter of VV and VH in decibels
BACKSCATTER = np.float32([numbers("-19 -9.5 -13 -9 -11.5 -12 -5 -15 -13"),
                          numbers("-26 -14.5 -20 -18.5 -17 -18.5 -12 -23 -19")]).T
TEXTURE = np.array([0.1, 1, 1, 1, 1, 1, 1.2, 0.8, 0.3])              # how much brightness varies
WATER, TREES, GRASS, FLOODED, CROPS, SHRUB, BUILT, BARE, SNOW = range(9)
VEGETATION = slice(TREES, SHRUB + 1)
WINTER, SPRING, SUMMER, AUTUMN = range(4)
LEAVES = [0.35, 0.8, 1, 0.6]                                         # how green each season is


def smooth(rng, size, scale):
    """Gaussian random field (size,size), mean 0, unit variance, correlated over `scale` pixels."""
    f = np.fft.fftfreq(size)
    squared = f[:, None] ** 2 + f[:size // 2 + 1] ** 2               # frequency squared
    decay = np.exp(-2 * (np.pi * scale) ** 2 * squared)
    waves = np.fft.rfft2(rng.standard_normal((size, size)))
    field = np.fft.irfft2(waves * decay, (size, size))
    field = (field - field.mean()) / (field.std() + 1e-9)
    return field.astype(np.float32)


def stripes(rng, size, period, bend):
    """Waves (size,size) of that period in pixels and any direction; bend shifts their phase."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    angle = rng.uniform(0, np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    return np.sin(2 * np.pi * along / period + bend)


def town(rng, size):
    """Blocks of houses (size,size), each of one brightness, with dark streets between them."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    block = rng.integers(5, 8)
    streets = (x % block < 1) | (y % block < 1)
    noise = rng.standard_normal((size, size)).astype(np.float32)
    ones = np.ones((block, block))
    houses = np.kron(noise[::block, ::block], ones)
    return np.where(streets, -1.5, houses[:size, :size])


def textures(rng, size):
    """(9,size,size), unit variance: what tells the classes apart where spectra do not."""
    parcels = smooth(rng, size, 4) > 0                               # ploughed in two directions
    ploughed = [stripes(rng, size, rng.uniform(4, 6), 0) for _ in range(2)]
    houses = town(rng, size)
    t = [                                                            # in the order of CLASSES
        smooth(rng, size, 1),
        smooth(rng, size, 1.2),
        smooth(rng, size, 5),
        np.sign(smooth(rng, size, 2.5)),
        np.where(parcels, *ploughed),
        smooth(rng, size, 0.8) > 1.3,
        houses,
        stripes(rng, size, rng.uniform(8, 12), 2 * smooth(rng, size, 6)),
        smooth(rng, size, 8),
    ]
    t = np.stack(t).astype(np.float32)
    std = t.std((1, 2), keepdims=True)
    return (t - t.mean((1, 2), keepdims=True)) / (std + 1e-6)


def summer_cover(rng, size, cold, wet, populated):
    """(size,size) class of each pixel: three to five classes that fit the climate."""
    chance = 0.15 + np.array(                                        # in the order of CLASSES
        [wet, 1, 1, 0.8 * wet, 1, 1 - wet / 2, populated, 1 - wet, cold - 0.15])
    count = rng.integers(3, 6)
    present = rng.choice(9, count, replace=False, p=chance / chance.sum())
    score = np.stack([smooth(rng, size, size / 10) for _ in present])
    score += rng.normal(0, 0.6, (len(present), 1, 1))                # some cover more than others
    return present[score.argmax(0)]


def cover_in(season, summer, relief, cold):
    """(H,W) class of each pixel in a season."""
    cover = summer.copy()
    if season == WINTER:
        cover[(relief > 1.8 - cold) & (cover != WATER)] = SNOW
    if season == SPRING:
        cover[(relief < -1.2) & (cover == GRASS)] = FLOODED
    if season == AUTUMN:
        cover[(relief > 0.7) & (cover == CROPS)] = BARE              # harvested
    return cover


def season_spectra(rng, season):
    """(9,13) reflectance: in winter vegetation looks halfway like bare soil."""
    leaf = np.clip(LEAVES[season] + rng.normal(0, 0.1), 0, 1)
    spectra = SPECTRA.copy()
    green = SPECTRA[VEGETATION]
    dry = 0.5 * SPECTRA[BARE] + 0.5 * green
    spectra[VEGETATION] = leaf * green + (1 - leaf) * dry
    return spectra


def light_and_haze(rng, s2, gain):
    """Hills lit from one side, the sun's height, the sensor's gain, and haze in the blue bands.

    Returns the bands (13,H,W) and the slope of the hills (H,W).
    """
    size = s2.shape[-1]
    blueness = np.exp(-np.arange(13) / 4)[:, None, None]             # (13,1,1)
    haze = rng.uniform(0, 600) * blueness
    slope = smooth(rng, size, size / 7)
    hills = np.exp(rng.uniform(-0.4, 0.4) * slope)
    sun = rng.uniform(0.6, 1.4)
    return s2 * hills * sun * gain + haze, slope


def clouds(rng, s2):
    """Bright clouds over four of ten images.  B10 looks at the upper air and sees less of them."""
    size = s2.shape[-1]
    cloud = np.clip(2 * smooth(rng, size, size / 10) - 1.5, 0, 1)    # how opaque, (H,W)
    if rng.random() >= 0.4:
        return s2
    brightness = np.full((13, 1, 1), 6000)
    brightness[SENSORS["s2c"].bands.index("B10")] = 400
    return s2 + cloud * (brightness - s2)


def speckle(rng, s1, slope):
    """Calibration, incidence angle, and the grain of a radar image of 12 looks, in decibels."""
    calibration = rng.normal(0, 1.5, (2, 1, 1))
    incidence = rng.uniform(-2, 2) * slope
    grain = rng.gamma(12, 1 / 12, s1.shape)
    return s1 + (calibration + incidence) + 10 * np.log10(grain)


def toy_scene(seed, i, size):
    """Toy scene i, season by season: s2 (13,H,W) uint16, s1 (2,H,W) float32, labels.

    Another order of the draws would be another world: results with this one could not be repeated.
    """
    rng = np.random.default_rng([seed, i])
    cold, wet, populated = rng.uniform(0, 1, 3)
    summer = summer_cover(rng, size, cold, wet, populated)           # (H,W)
    relief = smooth(rng, size, size / 8)                             # (H,W)
    texture = textures(rng, size)                                    # (9,H,W)
    # a class does not look the same everywhere
    brightness = rng.normal(0, 0.1, (9, 1))
    tint = rng.normal(0, 0.05, (9, 13))
    level = np.exp(brightness + tint)
    level_db = rng.normal(0, 1.5, (9, 2))
    amplitude = TEXTURE * rng.uniform(0.6, 1.4, 9)
    for season in range(4):
        cover = cover_in(season, summer, relief, cold)
        grain = np.take_along_axis(texture, cover[None], 0)[0]       # (H,W)
        grain = grain * amplitude[cover]

        gain = np.exp(rng.normal(0, 0.1, (13, 1, 1)))
        spectra = season_spectra(rng, season) * level                # (9,13)
        s2 = spectra[cover].transpose(2, 0, 1)                       # (13,H,W)
        s2 = s2 * np.exp(0.3 * grain - 0.05)
        s2, slope = light_and_haze(rng, s2, gain)
        s2 = clouds(rng, s2)
        s2 += rng.normal(0, 20, s2.shape)

        backscatter = BACKSCATTER + level_db                         # (9,2)
        s1 = backscatter[cover].transpose(2, 0, 1) + 4 * grain       # (2,H,W)
        s1 = speckle(rng, s1, slope)

        area = np.bincount(cover.ravel(), minlength=9) / cover.size  # (9,) share of each class
        labels = [str(c) for c in np.flatnonzero(area > 0.03)]
        if rng.random() <= 0.08:
            labels = []                                              # nobody labelled it
        s2 = np.clip(np.rint(s2), 0, 65535).astype(np.uint16)
        yield s2, s1.astype(np.float32), labels


def write_bands(folder, sensor, x, position):
    """Write the bands of x (C,H,W) as GeoTIFFs, each with pixels of its own size."""
    os.makedirs(folder)
    for band, name, ratio in zip(x, sensor.bands, sensor.ratios):
        side = band.shape[0] // ratio
        squares = band.reshape(side, ratio, side, ratio)
        pixels = squares.mean((1, 3)).astype(band.dtype)
        degrees = 10 * ratio / 111320                                # a degree has 111,320 m
        geotags = [
            (33550, "d", 3, (degrees, degrees, 0), True),            # size of a pixel
            (33922, "d", 6, (0, 0, 0, *position, 0), True),          # place of the first pixel
            (34735, "H", 12, (1, 1, 0, 2, 1024, 0, 1, 2, 2048, 0, 1, 4326), True)]   # EPSG:4326
        tifffile.imwrite(f"{folder}/{name}.tif", pixels, metadata=None, extratags=geotags)


def write_toy_scene(i, root, size, seed):
    """Write scene i into an SSL4EO-S12 v1.0 tree -> (scene, {S2 product: labels}) for the json."""
    scene = f"{i:07d}"
    position = (0.1 * (i % 1000), 45)                                # degrees east, degrees north
    table = {}
    for season, (s2, s1, labels) in enumerate(toy_scene(seed, i, size)):
        day = f"2020{1 + 3 * season:02d}{1 + i % 28:02d}"
        s2_name = f"{day}T054639_{day}T054831_T43RCP"
        s1_name = f"S1A_IW_GRDH_1SDV_{day}T010203_{day}T010228_032911_03CFF0_9BAF"
        write_bands(f"{root}/s2c/{scene}/{s2_name}", SENSORS["s2c"], s2, position)
        write_bands(f"{root}/s1/{scene}/{s1_name}", SENSORS["s1"], s1, position)
        table[s2_name] = labels
    return scene, table


def make_toy(root, scenes=2000, size=36, seed=0, workers=os.cpu_count()):
    """Write an artificial world as an SSL4EO-S12 v1.0 tree: root/{s1,s2c} and the labels' json.

    Nine classes with spectra, backscatter and texture of their own, in four seasons.  Light, haze,
    clouds, gain and speckle hide what a mean and a std could tell.  size: side of the 10 m bands in
    pixels, a multiple of 6.  The tree appears whole or not at all; one that is there is left alone.
    """
    root = os.path.normpath(root)
    world = json.dumps({"scenes": scenes, "size": size, "seed": seed, "version": 1})
    if os.path.exists(f"{root}/toy.json") and read_text(f"{root}/toy.json") == world:
        return root
    require(not os.path.exists(root), f"{root}: exists and is not the toy world {world}; move it")
    require(size % 6 == 0 and size >= 12 and scenes > 0,
            f"toy world of {scenes} scenes of {size} pixels: size is a multiple of 6, >= 12")
    with whole_folder(root) as folder:
        job = partial(write_toy_scene, root=folder, size=size, seed=seed)
        table = dict(in_parallel(job, range(scenes), workers, f"toy world {root}"))
        Path(folder, "ssl4eo_multilabel.json").write_text(json.dumps(table))
        Path(folder, "toy.json").write_text(world)
    return root


def toy_pack(modality):
    """Make the toy world in ./toy and a pack of its s1 or s2c -> the pack's path, ./toy_s1."""
    require(modality in ("s1", "s2c"), f"--modality {modality}: the toy world has s1 and s2c; name "
                                       f"a pack of yours with --data")
    path = f"toy_{modality}"
    if not os.path.exists(path):
        pack(open_archive(make_toy("toy"), SENSORS[modality]), path)
    return path


if __name__ == "__main__":
    try:
        main()
    except (InputError, MissingPackage, OSError) as error:
        sys.exit(f"data.py: error: {error}")
