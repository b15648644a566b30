"""Reading, scaling, labels, packing, augmentation, and a toy world to practise on.

A reader lists the files of one layout and returns `Scenes`.  A scene is a place with one or more
images (its seasons); an image is a uint8 array (C,H,W) with a row of labels.

    SSL4EOZips(root, sensor)    root/{S1GRD,S2L1C,S2L2A,S2RGB}/*.zarr.zip             [1], v1.1
    SSL4EO(root, sensor)        root/{s1,s2c,s2a}/{0000000}/{product}/{band}.tif      [1], v1.0
    Folder(root, sensor)        TIFF, PNG and JPEG images, in class folders or all in root
    EuroSAT(root, sensor)       the same, with EuroSAT's order of bands               [2]
    BigEarthNet(root, sensor)   root/BigEarthNet-{...}/{patch}/{patch}_{band}.tif     [3], v1 and v2
    Packed(root, sensor)        what `python data.py pack` made of any of these
    open_data(root, sensor)     takes the reader that fits what lies in root
    make_toy(root)              writes an artificial SSL4EO-S12 tree with labels

All sensors are scaled in one way: x' = (x - mean) / (4 std) + 1/2, clipped to [0,1], so that
mean - 2 std becomes 0 and mean + 2 std becomes 1 [SoftCon README, "Data normalization"].  Images
are stored as uint8, 0 to 255, and reach the network as float, 0 to 1.  RGB images are uint8
already and stay as they are.

A file holds the bands of its sensor in the sensor's order.  Nothing guesses another order from the
names of folders: a wrong one would train without a word.

[1] Wang et al. 2023, SSL4EO-S12; the labels are SSL4EO-S12-ML of SoftCon
[2] Helber et al. 2019, EuroSAT; Wang et al. 2023, EuroSAT-SAR
[3] Sumbul et al. 2021, BigEarthNet-MM (v1); Clasen et al. 2024, reBEN (v2)
"""
import argparse
import copy
import csv
import dataclasses
import fcntl
import json
import logging
import os
import re
import shutil
import struct
import sys
import zipfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

# tifffile logs what is wrong with a file before it raises an error; the error is enough
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

# --------------------------------------------------------------------------------------- sensors


@dataclass
class Sensor:
    """One kind of images.  Lists follow the order of the channels, with an entry per band."""
    name: str       # as --modality takes it; the folder's name in an SSL4EO-S12 tree
    bands: list     # names of the bands
    kind: str       # "optical": reflectance; "radar": decibels; "rgb": display values, not rescaled
    dtype: str      # type of the pixels on disk, as numpy calls it
    ratios: list    # side of a pixel of the band, in pixels of the finest band
    look: list      # the three bands to show as red, green and blue, by position
    mean: list      # of the band, in the sensor's units; empty: pixels are display values, 0 to 255
    std: list       # of the band, in the sensor's units
    scale: float = 1.0        # units = pixels * scale + offset
    offset: float = 0.0
    decibels: bool = False    # pixels are linear power: reading turns the units into decibels
    nodata: float = None      # value of pixels without a measurement; they become the band's mean


# mean and std: of all of SSL4EO-S12 [SSL4EO-S12 convert_rgb.py; torchgeo resnet.py]
SENSORS = {
    # Sentinel-1 GRD: backscatter in decibels
    "s1": Sensor(
        name="s1",
        bands=["VV", "VH"],
        kind="radar",
        dtype="float32",
        ratios=[1, 1],
        look=[0, 1, 0],
        mean=[-12.59, -20.26],
        std=[5.26, 5.91]),
    # Sentinel-2 L1C, light as it reaches the satellite through the air: reflectance x 10000
    "s2c": Sensor(
        name="s2c",
        bands=["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12"],
        kind="optical",
        dtype="uint16",
        ratios=[6, 1, 1, 1, 2, 2, 2, 1, 2, 6, 6, 2, 2],      # pixels of 60, 10 and 20 m
        look=[3, 2, 1],
        mean=[1612.9, 1397.6, 1322.3, 1373.1, 1561.0, 2108.4, 2390.7, 2318.7, 2581.0, 837.7, 22.0,
              2195.2, 1537.4],
        std=[791.0, 854.3, 878.7, 1144.9, 1127.5, 1164.2, 1276.0, 1249.5, 1345.9, 577.5, 47.5,
             1340.0, 1142.9]),
    # Sentinel-2 L2A, light as it leaves the ground: reflectance x 10000, without B10
    "s2a": Sensor(
        name="s2a",
        bands=["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B11", "B12"],
        kind="optical",
        dtype="uint16",
        ratios=[6, 1, 1, 1, 2, 2, 2, 1, 2, 6, 2, 2],
        look=[3, 2, 1],
        mean=[756.4, 889.6, 1151.7, 1307.6, 1637.6, 2212.6, 2442.0, 2538.9, 2602.9, 2666.8, 2388.8,
              1821.5],
        std=[1111.4, 1159.1, 1188.1, 1375.2, 1376.6, 1358.6, 1418.4, 1476.4, 1439.9, 1582.1,
             1460.7, 1352.2]),
    # aerial or satellite pictures
    "rgb": Sensor(
        name="rgb",
        bands=["R", "G", "B"],
        kind="rgb",
        dtype="uint8",
        ratios=[1, 1, 1],
        look=[0, 1, 2],
        mean=[],
        std=[]),
}


def find_sensor(name):
    """The sensor of that name, or the one in that JSON file.  ValueError: there is none."""
    if name.endswith(".json"):
        text = read_text(name)
        with file_errors(name, "not a sensor"):
            return make_sensor(json.loads(text), Path(name).stem)
    require(name in SENSORS, f"--modality {name}: unknown, take one of {', '.join(SENSORS)}, or a "
                             f"JSON file")
    return SENSORS[name]


def make_sensor(fields, name="own"):
    """A Sensor from a dict of its fields, as JSON holds them.

    bands, kind and dtype must be there, mean and std too unless the pixels are display values.
    Left out, the ratios are 1, and find_look says which bands look red, green and blue.
    ValueError: a field is unknown, missing or does not fit the bands.
    """
    known = [field.name for field in dataclasses.fields(Sensor)]
    for field in fields:
        require(field in known, f"unknown field {field!r}, a sensor has {', '.join(known)}")
    for field in ("bands", "kind", "dtype"):
        require(field in fields, f"no field {field!r}")
    bands = fields["bands"]
    C = len(bands)
    require(isinstance(bands, list) and C > 0, f"bands {bands!r}: not a list of names")
    require(len(set(bands)) == C, f"bands {bands}: a name twice")
    defaults = {"name": name, "ratios": [1] * C, "look": find_look(bands), "mean": [], "std": []}
    sensor = Sensor(**defaults | fields)

    kinds = ("optical", "radar", "rgb")
    require(sensor.kind in kinds, f"kind {sensor.kind!r}: not one of {', '.join(kinds)}")
    require(np.dtype(sensor.dtype).kind in "iuf", f"dtype {sensor.dtype!r}: neither int nor float")
    require(sensor.mean or sensor.kind == "rgb", "no mean and std; `python data.py stats` measures")
    scaled = ["mean", "std"] if sensor.mean or sensor.std else []
    for field in ["ratios", *scaled]:
        values = getattr(sensor, field)
        require(len(values) == C, f"{field}: {len(values)} numbers for {C} bands")
        require(np.isfinite(values).all(), f"{field} {values}: not finite")
    require(min(sensor.ratios) == 1, f"ratios {sensor.ratios}: the finest band has 1")
    require(all(std > 0 for std in sensor.std), f"std {sensor.std}: not above 0")
    require(len(sensor.look) == 3 and set(sensor.look) <= set(range(C)),
            f"look {sensor.look}: not three positions of {C} bands")
    require(sensor.scale != 0 and np.isfinite([sensor.scale, sensor.offset]).all(),
            f"scale {sensor.scale}, offset {sensor.offset}: units would not depend on pixels")
    return sensor


def find_look(bands):
    """Positions of the bands that are red, green and blue by their names, else of the first three.

    Of two bands the second looks green, as in Sentinel-1; a single one is grey.
    """
    names = [re.sub("^b0", "b", band.lower()) for band in bands]
    for colours in (["b4", "b3", "b2"], ["red", "green", "blue"], ["r", "g", "b"]):
        if set(colours) <= set(names):
            return [names.index(colour) for colour in colours]
    if len(bands) < 3:
        return [0, len(bands) - 1, 0]
    return [0, 1, 2]


# ---------------------------------------------------------------------------------------- errors


def require(fine, problem):
    """Raise ValueError(problem) unless `fine`.  A problem is a line that names file or flag."""
    if not fine:
        raise ValueError(problem)


@contextmanager
def file_errors(path, problem, gone="no such file"):
    """Turn whatever a library raises inside into a ValueError of one line that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path}: {gone}") from None
    except Exception as error:          # codecs raise a dozen kinds, some with a dozen lines
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: {problem} ({type(error).__name__}: {reason})") from None


def error_message(error):
    """What an error says, without the traceback that a reading process puts before it."""
    return re.split(r"\n\w+Error: ", str(error))[-1].strip()


# ----------------------------------------------------------------------------------------- files


def read_text(path):
    """The content of a text file.  ValueError, naming the file: it is missing or not UTF-8."""
    with file_errors(path, "not a readable text file"):
        return Path(path).read_text(encoding="utf-8")


def read_tiff(path, bands=1):
    """The first page of a TIFF as an array.  ValueError, naming it: missing, cut off or no TIFF.

    bands: if a page holds a single band and there are so many pages, all of them (bands,H,W).
    A channel of opacity beyond the bands is left out.
    `pages.first` of an open file is faster than `tifffile.imread`, which looks at all pages.
    """
    with file_errors(path, "unreadable TIFF", gone="missing"):
        with open(path, "rb") as file:
            tiff = tifffile.TiffFile(file)
            page = tiff.pages.first
            require(page.photometric != tifffile.PHOTOMETRIC.PALETTE,
                    "its colours are numbers of a palette; save it as RGB")
            x = page.asarray()
            if bands > 1 and x.ndim == 2 and len(tiff.pages) == bands:
                x = np.stack([page.asarray() for page in tiff.pages])
        opacity = (tifffile.EXTRASAMPLE.ASSOCALPHA, tifffile.EXTRASAMPLE.UNASSALPHA)
        if page.samplesperpixel == bands + 1 and page.extrasamples[-1:] in [(o,) for o in opacity]:
            channels_first = page.planarconfig == tifffile.PLANARCONFIG.SEPARATE
            x = x[:bands] if channels_first else x[..., :bands]
        return x.astype(x.dtype.newbyteorder("="), copy=False)       # the machine's byte order


def read_picture(path):
    """A PNG or JPEG -> (H,W,C) as stored, at least one channel.  ValueError as read_tiff."""
    with file_errors(path, "unreadable image"):
        raw = Path(path).read_bytes()
        require(raw, "empty file")
        if raw.startswith(b"\x89PNG"):
            return np.atleast_3d(imagecodecs.png_decode(raw))
        require(raw.startswith(b"\xff\xd8"), "neither PNG nor JPEG")
        # of a JPEG without its end marker the decoder makes the missing rows up
        require(b"\xff\xd9" in raw[-32:], "JPEG is cut off")
        return np.atleast_3d(imagecodecs.jpeg8_decode(raw))


def image_sides(path):
    """(H, W) of a TIFF, PNG or JPEG, from its header alone.  ValueError as read_tiff."""
    with file_errors(path, "unreadable image"), open(path, "rb") as file:
        start = file.read(24)
        if start.startswith(b"\x89PNG"):
            width, height = struct.unpack(">II", start[16:24])
            return height, width
        if not start.startswith(b"\xff\xd8"):
            file.seek(0)
            page = tifffile.TiffFile(file).pages.first
            return page.imagelength, page.imagewidth
        # a JPEG is a chain of segments: marker, length, content; those of the sides are C0 to C3
        place = 2
        while True:
            file.seek(place)
            marker, length, _, height, width = struct.unpack(">HHBHH", file.read(9))
            require(marker >= 0xff00, "broken JPEG header")
            if 0xffc0 <= marker <= 0xffc3:
                return height, width
            place += 2 + length


def to_units(x, sensor):
    """Pixels as stored, any shape -> the sensor's units.  Those without a measurement become NaN.

    Most sensors store their units, so that most pixels come back as they are.
    """
    missing = None
    if sensor.nodata is not None:
        missing = x == sensor.nodata
        if np.isnan(sensor.nodata):
            missing = np.isnan(x)
    if sensor.scale != 1 or sensor.offset != 0:
        x = np.float32(x) * np.float32(sensor.scale) + np.float32(sensor.offset)
    if sensor.decibels:
        x = 10 * np.log10(np.maximum(np.float32(x), 1e-10))          # zero power has no logarithm
    if missing is not None:
        x = np.where(missing, np.float32("nan"), x)
    return x


def require_finite(x, sensor, path):
    """ValueError: pixels that are NaN, unless that says nodata, or infinite."""
    fine = np.isfinite(x)
    if sensor.nodata is not None:
        fine |= np.isnan(x) & np.isnan(sensor.nodata)
    require(fine.all(), f"{path}: NaN or infinite pixels")


def read_band(path, sensor, size):
    """One band's TIFF -> (H,W) in the sensor's units, finite, about size x size pixels."""
    x = read_tiff(path)
    require(x.dtype == sensor.dtype, f"{path}: {x.dtype} pixels, {sensor.name} has {sensor.dtype}")
    tolerance = size // 40                     # some files of SSL4EO-S12 are a few pixels off
    fits = x.ndim == 2 and max(abs(side - size) for side in x.shape) <= tolerance
    require(fits, f"{path}: {x.shape} pixels, expected {size} x {size}")
    require_finite(x, sensor, path)
    return to_units(x, sensor)


def read_all_bands(path, sensor):
    """One image file with all bands -> (C,H,W) of the sensor's type, finite.

    rgb: a grey image has three equal bands.
    """
    bands = len(sensor.bands)
    if path.lower().endswith((".tif", ".tiff")):
        x = read_tiff(path, bands)
    else:
        x = read_picture(path)
        if x.shape[2] == bands + 1 or x.shape[2] == 2:
            x = x[..., :-1]                                          # opacity
    if sensor.kind == "rgb" and (x.ndim == 2 or x.shape[2] == 1):
        x = np.repeat(x.reshape(*x.shape[:2], 1), 3, axis=2)
    if x.ndim == 2:
        x = x[..., None]                                             # a single band
    if x.shape[2] == bands:
        x = x.transpose(2, 0, 1)
    fits = x.shape[0] == bands and x.ndim == 3 and x.dtype == sensor.dtype
    require(fits, f"{path}: {x.dtype} {x.shape}, expected {bands} bands of {sensor.dtype}")
    require_finite(x, sensor, path)
    return x


def subfolders(folder):
    """Sorted names of the folders in a folder."""
    require(os.path.isdir(folder), f"{folder}: no such folder")
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def usual_side(paths):
    """The side that most of the first 20 images have.

    The first image alone could be a bad one.  If all 20 are, it is 264, the side of SSL4EO-S12.
    """
    sides = []
    for path in paths[:20]:
        with suppress(ValueError):
            sides.append(max(image_sides(path)))
    return max(sides, key=sides.count, default=264)


# --------------------------------------------------------------------------------------- scaling


def to_uint8(x, sensor):
    """C bands (H,W) in the sensor's units -> uint8 (C,H,W): mean -+ 2 std become 0 and 255.

    Values beyond saturate.  (A plain cast would wrap: reflectance 12000 as x/10000*255 gives 50.)
    NaN, a pixel without a measurement, becomes the mean.  A sensor without a mean has display
    values, which are only rounded.
    """
    if not sensor.mean:
        x = np.asarray(x)
        if x.dtype == np.uint8:
            return x
        return np.clip(np.nan_to_num(x, nan=127) + 0.5, 0, 255).astype(np.uint8)
    mean = np.float32(sensor.mean)[:, None, None]                    # (C,1,1)
    std = np.float32(sensor.std)[:, None, None]                      # (C,1,1)
    x = np.stack(x, dtype=np.float32)                                # (C,H,W)
    x -= mean - 2 * std
    x *= 255 / (4 * std)
    x += 0.5                                                         # the cast rounds down
    if sensor.nodata is not None:
        x[np.isnan(x)] = 127.5
    return np.clip(x, 0, 255, out=x).astype(np.uint8)


def to_input(x, sensor):
    """An array (C,H,W), pixels as the sensor's files hold them -> float (1,C,H,W) in [0,1].

    It is what the networks were trained on: units, scale, clip, 256 levels.  Pixels of SSL4EO-S12
    v1.1 are those of ZIP_SENSORS.  ValueError: another number of bands, or NaN.
    """
    x = np.asarray(x)
    bands = len(sensor.bands)
    require(x.ndim == 3 and len(x) == bands,
            f"array of shape {x.shape}: {sensor.name} takes ({bands}, height, width), in the order "
            f"{' '.join(sensor.bands)}")
    require_finite(x, sensor, "array")
    return torch.from_numpy(to_uint8(to_units(x, sensor), sensor)).float()[None] / 255


def resize(x, size):
    """(H,W) or (C,H,W) -> the same with size x size pixels, bilinear, pixel centres aligned."""
    if x.shape[-2:] == (size, size):
        return x
    image = torch.from_numpy(np.ascontiguousarray(x, np.float32)).reshape(1, -1, *x.shape[-2:])
    shrinks = size < x.shape[-1]
    image = F.interpolate(image, (size, size), mode="bilinear", antialias=shrinks)   # (1,C,.,.)
    return image.numpy().reshape(*x.shape[:-2], size, size)


def read_product(folder, sensor, size, prefix="", scale=to_uint8):
    """A folder of TIFFs {prefix}{band}.tif -> uint8 (C,size,size), all bands on one grid.

    size is the side of the finest bands; the coarser ones are interpolated.  scale(bands, sensor)
    makes the result out of bands in the sensor's units.  ValueError: a line for each bad file.
    """
    bands, problems = [], []
    for name, ratio in zip(sensor.bands, sensor.ratios):
        try:
            x = read_band(f"{folder}/{prefix}{name}.tif", sensor, size // ratio)
            bands.append(resize(x, size))
        except ValueError as error:
            problems.append(str(error))
    require(not problems, "\n".join(problems))
    return scale(bands, sensor)


def read_image(path, sensor, size, order=None, scale=to_uint8):
    """One TIFF, PNG or JPEG -> uint8 (C,size,size): its central square, resized.

    order: where in the file each band of the sensor is; None: at its own place.  scale: see
    read_product.
    """
    x = read_all_bands(path, sensor)                                 # (C,H,W)
    if order is not None:
        x = x[order]
    x = to_units(x, sensor)
    side = min(x.shape[1:])
    top, left = [(length - side) // 2 for length in x.shape[1:]]
    x = resize(x[:, top:top + side, left:left + side], size)
    return scale(x, sensor)


# ---------------------------------------------------------------------------------------- scenes


class Scenes(Dataset):
    """Places, each with one or more images.

        ids       names of the scenes
        files     files[i][s] is the path of image s of scene i: a file, or a folder of bands
        labels    labels[i] is (S,L) uint8, a multi-hot row for each image; all 0: unlabelled
        classes   names of the L classes
        sensor    what the images are made of
        size      side of all images, in pixels
        decode    decode(path) -> uint8 (C,H,W)
        views     how many images of a scene scenes[i, seed] gives
        memory    None, or images in memory (n,C,H,W); image s of scene i is memory[rows[i][s]]
        notes     lines for the user: what the reader did that nobody may expect
    """

    def __init__(self, ids, files, labels, classes, sensor, size, decode, views=2):
        self.ids = ids
        self.files = files
        self.labels = labels
        self.classes = classes
        self.sensor = sensor
        self.size = size
        self.decode = decode
        self.views = views
        self.memory = None
        self.rows = None
        self.notes = []

    def __len__(self):
        return len(self.ids)

    def images_of(self, scenes):
        """All images of the scenes with these numbers: [(i, s), ...]."""
        pairs = []
        for i in scenes:
            pairs += [(i, s) for s in range(len(self.files[i]))]
        return pairs

    def image(self, i, s):
        """Image s of scene i: uint8 (C,H,W)."""
        if self.memory is not None:
            return self.memory[self.rows[i][s]]
        return self.decode(self.files[i][s])

    def draw(self, i, seed):
        """(V,) numbers of different images of scene i; a scene with fewer than V repeats them."""
        order = np.random.default_rng(seed).permutation(len(self.files[i]))
        return np.resize(order, self.views)

    def __getitem__(self, key):
        """scenes[i, seed] -> x (V,C,H,W) uint8 and y (V,L) uint8, images of scene i and labels."""
        i, seed = key
        drawn = self.draw(i, seed)
        x = np.stack([self.image(i, s) for s in drawn])
        y = self.labels[i][drawn]
        return x, y

    def __getitems__(self, keys):
        """A batch of keys (i, seed) -> x (B,V,C,H,W) and y (B,V,L), as __getitem__ for each.

        A DataLoader with batch_sampler calls it; its collate_fn is torch's default_convert.
        """
        if self.memory is None:
            items = [self[key] for key in keys]
            x = np.stack([images for images, _ in items])
            y = np.stack([labels for _, labels in items])
            return x, y
        drawn = [(i, self.draw(i, seed)) for i, seed in keys]
        rows = np.stack([self.rows[i][order] for i, order in drawn])         # (B,V)
        y = np.stack([self.labels[i][order] for i, order in drawn])
        return self.memory[rows], y                                  # each image is copied once

    def preload(self, scenes, workers=0):
        """Read all images of these scenes into memory, so that no epoch reads them again.

        After it the images of other scenes are an IndexError.  A packed file stays where it is:
        the system holds in memory what was read of it.
        """
        if self.memory is not None:
            return
        pairs = self.images_of(scenes)
        memory = np.empty((len(pairs), len(self.sensor.bands), self.size, self.size), np.uint8)
        loader = DataLoader(Images(self, pairs), batch_size=64, num_workers=workers)
        for x, _, positions in tqdm(loader, "reading", leave=False):
            memory[positions] = x
        self.rows = [np.empty(0, int) for _ in self.files]
        start = 0
        for i in scenes:
            end = start + len(self.files[i])
            self.rows[i] = np.arange(start, end)
            start = end
        self.memory = memory


class Images(Dataset):
    """Single images of `scenes`: pairs = [(i, s), ...]; item j -> (x (C,H,W), y (L,), j)."""

    def __init__(self, scenes, pairs):
        self.scenes = scenes
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, j):
        i, s = self.pairs[j]
        return self.scenes.image(i, s), self.scenes.labels[i][s], j


def in_parallel(job, items, workers, title):
    """job(item) for each item of a list, in order, by `workers` processes (0: by this one).

    A DataLoader without batches calls collate_fn on each item, in the processes that it starts.
    """
    return tqdm(DataLoader(items, batch_size=None, collate_fn=job, num_workers=workers), title)


def held_out(ids, fraction):
    """(n,) bool: the scenes set aside for testing, chosen by a hash of the name alone.

    So pretraining and probing agree without a list, whatever else lies in the folder.
    """
    return np.array([zlib.crc32(name.encode()) / 2 ** 32 < fraction for name in ids], bool)


USUAL_CAUSES = {
    "optical": "another order of the bands, another unit (0 to 1 instead of 0 to 10000), another "
               "level (L1C, L2A), the +1000 of ESA's products since 2022, pixels without data",
    "radar": "another order of the bands, linear power instead of decibels, pixels without data",
    "rgb": "pixels without data, a scale for more than 8 bits",
}


def look_at(scenes, numbers, images=16):
    """Look at some images of the scenes with these numbers -> lines that name suspicious bands.

    Of such a band more than half of the pixels are clipped, or have one and the same value.
    """
    pairs = scenes.images_of(numbers[::max(1, len(numbers) // images)])[:images]
    sample = []
    for i, s in pairs:
        with suppress(ValueError):          # whoever reads it for training names a bad file
            sample.append(scenes.image(i, s))
    if not sample:
        return []
    clipped, equal = [], []
    for band, pixels in zip(scenes.sensor.bands, np.stack(sample, axis=1)):      # (n,H,W)
        shares = np.bincount(pixels.ravel(), minlength=256) / pixels.size
        extreme = shares[0] + shares[255]
        if extreme > 0.5:
            clipped.append(f"{band} {extreme:.0%}")
        elif shares.max() > 0.5:
            equal.append(f"{band} {shares.max():.0%}")
    lines = []
    if clipped:
        lines.append(f"most of the pixels are clipped: {', '.join(clipped)}")
    if equal:
        lines.append(f"most of the pixels have the same value: {', '.join(equal)}")
    if lines:
        lines.append(f"the usual causes: {USUAL_CAUSES[scenes.sensor.kind]}; `python data.py "
                     f"stats` measures each band")
    return lines


# ---------------------------------------------------------------------------------------- labels

# Dynamic World's indices 0 to 8, which SSL4EO-S12-ML uses
CLASSES = ("water", "trees", "grass", "flooded vegetation", "crops", "shrub & scrub", "built",
           "bare", "snow & ice")


def multi_hot(rows, L):
    """[{class index, ...}, ...], a set for each image -> (S,L) uint8."""
    y = np.zeros((len(rows), L), np.uint8)
    for s, row in enumerate(rows):
        y[s, list(row)] = 1
    return y


def read_labels(path):
    """SSL4EO-S12-ML's json -> {scene: {S2 product: [class index, ...]}}.

    In the file classes are strings "0" to "8".  ValueError: another form or an unknown class.
    """
    text = read_text(path)
    with file_errors(path, "not labels of the form {scene: {product: [class]}}"):
        table = json.loads(text)
        for scene, products in table.items():
            for product, classes in products.items():
                for c in classes:
                    require(str(c).isdecimal() and int(c) < len(CLASSES),
                            f"unknown class {c!r} in scene {scene}, product {product}")
                products[product] = [int(c) for c in classes]
        return table


def read_table(path):
    """A table of labels -> (classes, {image: [0 or 1 for each class]}).

    Tabs or commas separate the cells.  The header row names the classes after its first cell, and
    each other row begins with an image.  ValueError, naming file and row: anything else.
    """
    lines = [line for line in read_text(path).removeprefix("\ufeff").splitlines() if line.strip()]
    require(lines, f"{path}: empty")
    separator = "\t" if "\t" in lines[0] else ","
    header, *rows = csv.reader(lines, delimiter=separator)
    require(len(header) > 1, f"{path}: no header row of classes, separated by tabs or commas")
    classes = tuple(name.strip() for name in header[1:])
    require(len(set(classes)) == len(classes), f"{path}: a class twice")
    require(not set(classes) <= {"0", "1"}, f"{path}: the first row holds labels, not classes")
    table = {}
    for row in rows:
        name, *cells = [cell.strip() for cell in row]
        require(len(cells) == len(classes),
                f"{path}: {name}: {len(cells)} labels for {len(classes)} classes")
        require(set(cells) <= {"0", "1"}, f"{path}: {name}: labels are 0 or 1")
        require(name not in table, f"{path}: {name}: a row twice")
        table[name] = [int(cell) for cell in cells]
    return classes, table


def labels_from_table(path, root, images):
    """Labels of `images`, paths in root, from a table -> (classes, [(1,L) uint8, ...]).

    A row names its image with or without its folder and its ending.  Images without a row are
    unlabelled.  ValueError, naming the row: no image or several have that name.
    """
    classes, table = read_table(path)
    numbers = {}                                # the images that a name means
    for i, image in enumerate(images):
        inside = Path(image).relative_to(root)
        for name in {inside.name, inside.stem, str(inside), str(inside.with_suffix(""))}:
            numbers.setdefault(name, []).append(i)
    labels = [None] * len(images)
    for name, row in table.items():
        found = numbers.get(name, [])
        require(found, f"{path}: {name}: no such image in {root}")
        require(len(found) == 1, f"{path}: {name}: {len(found)} images have that name, write "
                                 f"folder/{name}")
        require(labels[found[0]] is None, f"{path}: {name}: its image has another row")
        labels[found[0]] = np.uint8([row])
    unlabelled = np.zeros((1, len(classes)), np.uint8)
    return classes, [unlabelled if label is None else label for label in labels]


def read_names(path, known, skip=False):
    """Names of images from a text file, one a line; see known_names."""
    return known_names(read_text(path).split(), known, path, skip)


def known_names(names, known, source, skip=False):
    """Those of `names` that are in `known`; of a pair "a,b", the one that is.

    ValueError, naming the source: some are not known.  With `skip` they are passed over.
    """
    found, missing = [], []
    for entry in names:
        choices = [Path(name).stem for name in entry.split(",")]
        matches = [name for name in choices if name in known]
        if matches:
            found.append(matches[0])
        else:
            missing.append(choices[0])
    require(skip or not missing, f"{source}: {len(missing)} of {len(names)} images are not there: "
                                 f"{', '.join(missing[:5])}")
    return found


# ----------------------------------------------------------------------------------- SSL4EO-S12

PRODUCTS = ["s1", "s2c", "s2a"]                # a folder of scenes for each sensor


def SSL4EO(root, sensor, labels=None, views=2):
    """An SSL4EO-S12 v1.0 tree [1]; sensor s1, s2c or s2a; labels: SSL4EO-S12-ML's json.

    A scene or product that the json leaves out, or gives an empty list, is unlabelled.
    ValueError: a class, a product or a scene that does not exist.
    """
    tree = f"{root}/{sensor.name}"
    ids = subfolders(tree)
    require(ids, f"{tree}: no scenes")
    trees = {name: f"{root}/{name}" for name in PRODUCTS if os.path.isdir(f"{root}/{name}")}
    for other in trees.values():
        missing = sorted(set(subfolders(other)) - set(ids))
        if missing:
            raise ValueError(f"{tree}/{missing[0]}: missing, while {other}/{missing[0]} is there")

    table = {}
    if labels:
        table = read_labels(labels)
    s2_tree = trees.get("s2c", trees.get("s2a"))
    files, rows = [], []
    for scene in ids:
        products = products_of(f"{tree}/{scene}")
        require(products, f"{tree}/{scene}: scene without a {sensor.name} product")
        files.append([f"{tree}/{scene}/{product}" for product in products])
        labelled = table.get(scene, {})        # {S2 product: classes}
        names = products                       # of the S2 images whose labels these images take
        if sensor.kind == "radar":
            names = s2_names(scene, s2_tree, labelled)
        for name in labelled:
            require(name in names, f"{labels}: scene {scene} has no product {name}")
        if len(names) != len(products):        # no telling which belongs to which
            names = [None] * len(products)
        rows.append(multi_hot([labelled.get(name, ()) for name in names], len(CLASSES)))

    finest = sensor.bands[sensor.ratios.index(min(sensor.ratios))]
    size = usual_side([f"{products[0]}/{finest}.tif" for products in files])
    decode = partial(read_product, sensor=sensor, size=size)
    return Scenes(ids, files, rows, CLASSES, sensor, size, decode, views)


def products_of(folder):
    """Names of the products of a scene, in order of time."""
    with file_errors(folder, "not a scene"):
        return sorted(subfolders(folder), key=date)


def date(product):
    """Sensing time of a product: the first time stamp in its name."""
    found = re.search(r"\d{8}T\d{6}", product)
    require(found, f"product name {product!r} has no date such as 20200604T054639")
    return found[0]


def s2_names(scene, s2_tree, labelled):
    """S2 products of a scene in order of time: an S1 image takes the labels of the same rank.

    The S2 tree has their names, or without such a tree the scene's labels.
    """
    if s2_tree:
        return products_of(f"{s2_tree}/{scene}")
    return sorted(labelled, key=date)


# ------------------------------------------------------------------------- SSL4EO-S12 v1.1, zarr

ZIP_FOLDERS = {"s1": "S1GRD", "s2c": "S2L1C", "s2a": "S2L2A", "rgb": "S2RGB"}

# What its files hold.  The pixels of Sentinel-2 are reflectance x 10000 + 1000, as in ESA's
# products since 2022.  Its statistics [SSL4EO-S12-v1.1, README] include that offset, ours do not.
ZIP_SENSORS = {
    "s1": replace(
        SENSORS["s1"], dtype="float16", mean=[-12.577, -20.265], std=[5.179, 5.872]),
    "s2c": replace(
        SENSORS["s2c"], dtype="int16", offset=-1000.0,
        mean=[1607.345, 1393.068, 1320.225, 1373.963, 1562.536, 2110.071, 2392.832, 2321.154,
              2583.770, 838.712, 21.753, 2205.112, 1545.798],
        std=[786.523, 849.702, 875.318, 1143.578, 1126.248, 1161.980, 1273.505, 1246.790,
             1342.755, 576.795, 45.626, 1340.347, 1145.036]),
    "s2a": replace(
        SENSORS["s2a"], dtype="int16", offset=-1000.0,
        mean=[793.243, 924.863, 1184.553, 1340.936, 1671.402, 2240.082, 2468.412, 2563.244,
              2627.704, 2711.071, 2416.714, 1849.625],
        std=[1160.144, 1201.092, 1219.943, 1397.225, 1400.035, 1373.136, 1429.170, 1485.025,
             1447.836, 1652.703, 1471.002, 1365.307]),
    "rgb": SENSORS["rgb"],
}


def find_zips(root, sensor):
    """Paths of the sensor's zips in root, root/train and root/val, sorted."""
    folder = ZIP_FOLDERS.get(sensor.name)
    paths = []
    for part in (".", "train", "val"):
        paths += sorted(Path(root, part, str(folder)).glob("*.zarr.zip"))
    return [str(path) for path in paths]


def SSL4EOZips(root, sensor, labels=None, views=2):
    """SSL4EO-S12 v1.1 as it is downloaded: zips of zarr arrays, 64 places of four seasons each.

    labels: SSL4EO-S12-ML's json, joined by the product's name; to s1 by place and order of time.
    The path of image s of sample i is written {zip}/{i}.{s}.
    """
    on_disk = sensor
    if sensor == SENSORS.get(sensor.name):
        on_disk = ZIP_SENSORS[sensor.name]               # a sensor from a JSON file stays as it is
    paths = find_zips(root, sensor)
    table = {}
    s2_products = {}
    if labels:
        table = read_labels(labels)
        if sensor.kind == "radar":
            s2_products = products_in_zips(root)

    ids, files, rows = [], [], []
    images = {}                                          # {zip: its array of images}
    joined = 0                                           # products that have labels
    for path in tqdm(paths, "opening", leave=False, disable=len(paths) < 100):
        with file_errors(path, "no zip of SSL4EO-S12 v1.1"):
            images[path] = index_zarr(path, "bands")
            require_bands(path, on_disk)
            places = read_zarr(index_zarr(path, "sample"))
            products = read_zarr(index_zarr(path, "file_id"))        # (places,seasons)
        for i, place in enumerate(map(str, places)):
            order = sorted(range(len(products[i])), key=lambda s: date(str(products[i, s])))
            names = [str(products[i, s]) for s in order]
            labelled = table.get(place, {})                          # {S2 product: classes}
            if sensor.kind == "radar":
                names = s2_products.get(place, sorted(labelled, key=date))
            if len(names) != len(order):                 # no telling which belongs to which
                names = [None] * len(order)
            joined += len(set(names) & set(labelled))
            ids.append(place)
            files.append([f"{path}/{i}.{s}" for s in order])
            rows.append(multi_hot([labelled.get(name, ()) for name in names], len(CLASSES)))

    sides = {array.shape[-2:] for array in images.values()}
    size = images[paths[0]].shape[-1]
    require(sides == {(size, size)}, f"{root}: images of unlike sizes: {sides}")
    decode = partial(read_zip_image, sensor=on_disk, images=images)
    scenes = Scenes(ids, files, rows, CLASSES, sensor, size, decode, views)
    if labels:
        listed = sum(len(products) for products in table.values())
        scenes.notes.append(f"{joined} of the {listed} products in {labels} are here")
    return scenes


def products_in_zips(root):
    """{place: its S2 products in order of time}, from the zips of L1C or else of L2A."""
    products = {}
    paths = find_zips(root, SENSORS["s2c"]) or find_zips(root, SENSORS["s2a"])
    for path in paths:
        with file_errors(path, "no zip of SSL4EO-S12 v1.1"):
            places = read_zarr(index_zarr(path, "sample"))
            names = read_zarr(index_zarr(path, "file_id"))
        for place, row in zip(places, names):
            products[str(place)] = sorted(map(str, row), key=date)
    return products


def require_bands(path, sensor):
    """ValueError: the zip has other bands than the sensor.  B01 and B1, vv and VV are the same."""
    names = [str(name) for name in read_zarr(index_zarr(path, "band"))]
    plain = [re.sub("^B0", "B", name.upper()) for name in names]
    require(plain == [band.upper() for band in sensor.bands],
            f"bands {' '.join(names)}, {sensor.name} has {' '.join(sensor.bands)}")


def read_zip_image(file, sensor, images, scale=to_uint8):
    """Image {zip}/{i}.{s} -> uint8 (C,H,W).  images: {zip: ZarrArray}; scale: see read_product."""
    path, numbers = os.path.split(file)
    with file_errors(file, "unreadable"):
        i, s = map(int, numbers.split("."))
        x = read_zarr(images[path], (i, s))                          # (C,H,W)
        require(x.dtype == sensor.dtype, f"{x.dtype} pixels, {sensor.name} has {sensor.dtype}")
    require_finite(x, sensor, file)
    return scale(to_units(x, sensor), sensor)


# zarr, version 2: an array is cut into chunks, and each is compressed alone.  In the zip,
# NAME/.zarray is a json of its shape, and NAME/1.0.2 the second chunk along the first axis, the
# first along the second, the third along the third.

DECODERS = {"blosc": imagecodecs.blosc_decode, "zstd": imagecodecs.zstd_decode,
            "zlib": imagecodecs.zlib_decode, "gzip": imagecodecs.gzip_decode}


@dataclass
class ZarrArray:
    """An array in a zip: what zarr says of it, and where in the file each chunk lies."""
    path: str
    shape: tuple
    chunks: tuple          # shape of a chunk
    dtype: np.dtype
    order: str             # "C" or "F", of the numbers in a chunk
    compressor: str        # a key of DECODERS, or "" for none
    fill: object           # value of a chunk that is not there; None: all must be there
    where: np.ndarray      # (chunks along each axis, 4): place of its header, bytes, CRC-32, method


def index_zarr(path, name):
    """Find the array `name` in a zip: ZarrArray.  Its chunks are not read."""
    with zipfile.ZipFile(path) as file:
        meta = json.loads(file.read(f"{name}/.zarray"))
        require(meta["zarr_format"] == 2, f"{name}: zarr of version {meta['zarr_format']}, not 2")
        require(not meta["filters"], f"{name}: filters {meta['filters']}")
        compressor = (meta["compressor"] or {"id": ""})["id"]
        require(compressor in ("", *DECODERS), f"{name}: compressor {compressor}")
        grid = [-(-length // chunk) for length, chunk in zip(meta["shape"], meta["chunks"])]
        where = np.zeros((*grid, 4), np.int64)
        separator = meta.get("dimension_separator", ".")
        for info in file.infolist():
            folder, _, key = info.filename.partition("/")
            if folder == name and not key.startswith("."):
                chunk = tuple(map(int, key.split(separator)))
                where[chunk] = (info.header_offset, info.compress_size, info.CRC,
                                info.compress_type)
    return ZarrArray(path, tuple(meta["shape"]), tuple(meta["chunks"]), np.dtype(meta["dtype"]),
                     meta["order"], compressor, meta["fill_value"], where)


def read_zarr(array, first=()):
    """The part array[first] of a ZarrArray, where first holds numbers for the first axes."""
    n = len(first)
    corner = tuple(i // chunk for i, chunk in zip(first, array.chunks))
    inside = tuple(i % chunk for i, chunk in zip(first, array.chunks))
    x = np.empty(array.shape[n:], array.dtype)
    for rest in np.ndindex(array.where.shape[n:-1]):
        starts = [i * chunk for i, chunk in zip(rest, array.chunks[n:])]
        target = tuple(slice(start, start + chunk) for start, chunk
                       in zip(starts, array.chunks[n:]))
        # a chunk at the end of an axis is whole, and reaches beyond the array
        kept = tuple(slice(0, length - start) for start, length in zip(starts, x.shape))
        x[target] = read_chunk(array, corner + rest)[inside][kept]
    return x


def read_chunk(array, number):
    """Chunk `number`, a tuple, of a ZarrArray: array of the shape of a chunk."""
    place, size, checksum, method = map(int, array.where[number])
    if size == 0:
        require(array.fill is not None, f"chunk {number} is not there")
        return np.full(array.chunks, array.fill, array.dtype)
    return decode_chunk(array.path, place, size, checksum, method, array.compressor,
                        array.dtype, array.chunks, array.order)


# Where a chunk holds many images, those that are read in order, as `pack` does, decode it once.
@lru_cache(maxsize=4)
def decode_chunk(path, place, size, checksum, method, compressor, dtype, shape, order):
    """The chunk whose zip header is at byte `place` of a file."""
    with open(path, "rb") as file:
        file.seek(place)
        name, extra = struct.unpack("<26x2H", file.read(30))         # lengths of what comes before
        file.seek(name + extra, os.SEEK_CUR)
        raw = file.read(size)
    if method == zipfile.ZIP_DEFLATED:
        raw = zlib.decompress(raw, -zlib.MAX_WBITS)
    else:
        require(method == zipfile.ZIP_STORED, f"compressed in the zip by method {method}")
    require(zlib.crc32(raw) == checksum, "damaged, its checksum differs")
    if compressor:
        raw = DECODERS[compressor](raw)
    x = np.frombuffer(raw, dtype).reshape(shape, order=order)
    return x.astype(dtype.newbyteorder("="), copy=False)


# -------------------------------------------------------------------------------- image folders

EUROSAT_CLASSES = {"AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial",
                   "Pasture", "PermanentCrop", "Residential", "River", "SeaLake"}
EUROSAT_ORDER = [0, 1, 2, 3, 4, 5, 6, 7, 12, 8, 9, 10, 11]           # B8A is last in the files


def Folder(root, sensor, views=2, order=None, labels="classes", tile=0):
    """Images, each a scene: a folder a class, or all in root and unlabelled.

    TIFFs that hold all bands; of up to four bands of 8 or 16 bits PNG and JPEG as well.  The
    central square of each is resized to tile x tile pixels; 0: to the side that most have.
    order: see read_image.  labels: "classes", those of the folders, or a table, see read_table.
    """
    images = find_images(root, sensor)
    paths = []
    classes = tuple(images)
    class_labels = []
    for k, members in enumerate(images.values()):
        label = multi_hot([{k}], len(classes))                       # (1,L)
        if classes == (".",):
            label = np.zeros_like(label)                             # no folders, no classes
        paths += members
        class_labels += [label] * len(members)
    if labels == "classes":
        labels = class_labels
    else:
        classes, labels = labels_from_table(labels, root, paths)

    ids = [Path(path).stem for path in paths]
    files = [[path] for path in paths]
    size, notes = common_size(paths, tile)
    decode = partial(read_image, sensor=sensor, size=size, order=order)
    scenes = Scenes(ids, files, labels, classes, sensor, size, decode, views)
    scenes.notes = notes
    if 1 < len(images) <= 30:
        scenes.notes.append(f"folders: {', '.join(images)}")
    return scenes


def find_images(root, sensor):
    """Images that may be the sensor's: {folder in root: paths}, or {".": paths} of root itself."""
    kinds = [".tif", ".tiff"]
    if len(sensor.bands) <= 4 and sensor.dtype in ("uint8", "uint16"):
        kinds += [".png", ".jpg", ".jpeg"]
    images = {name: list_images(f"{root}/{name}", kinds) for name in subfolders(root)}
    images = {name: paths for name, paths in images.items() if paths}
    beside = list_images(root, kinds)
    require(not images or not beside, f"{root}: images beside folders of images "
                                      f"({', '.join(list(images)[:3])}); move one or the other")
    require(images or beside,
            f"{root}: no {sensor.name} images ({' '.join(kinds)}) in it or its folders")
    return images or {".": beside}


def list_images(folder, kinds):
    """Paths of the files with these endings, sorted by name.  Hidden ones are no images."""
    names = [name for name in sorted(os.listdir(folder)) if not name.startswith(".")]
    return [f"{folder}/{name}" for name in names if name.lower().endswith(tuple(kinds))]


def common_size(paths, tile=0, most=10000):
    """(size, notes): the side that most images have, or `tile`, and how many have others.

    Looks at the headers of `most` images.  A bad file has no say.
    """
    looked_at = paths[::max(1, len(paths) // most)]
    shapes = []
    for path in looked_at:
        with suppress(ValueError):
            shapes.append(image_sides(path))
    sides = sorted(min(shape) for shape in shapes)
    size = tile or max(sides, key=sides.count, default=264)
    others = sum(shape != (size, size) for shape in shapes)
    if others == 0:
        return size, []
    return size, [f"{others} of {len(looked_at)} images are not {size} x {size}: their central "
                  f"square is resized"]


def EuroSAT(root, sensor, views=2, labels="classes", tile=0):
    """EuroSAT [2], unpacked: s2c (13 bands, TIFF), rgb (JPEG) or s1 (EuroSAT-SAR, TIFF)."""
    if sensor.name != "s2c":
        return Folder(root, sensor, views, None, labels, tile)
    scenes = Folder(root, sensor, views, EUROSAT_ORDER, labels, tile)
    in_files = sorted(sensor.bands, key=lambda band: EUROSAT_ORDER[sensor.bands.index(band)])
    scenes.notes.append(f"EuroSAT's files hold {' '.join(in_files)}")
    return scenes


# ---------------------------------------------------------------------------------- BigEarthNet

# names of the folder of patches in v1, in v2, and in short
BEN_FOLDERS = {
    "s1": {"BigEarthNet-S1-v1.0", "BigEarthNet-S1", "S1"},
    "s2a": {"BigEarthNet-v1.0", "BigEarthNet-S2", "S2"},
    "s2c": {"BigEarthNet-v1.0", "BigEarthNet-S2", "S2"},
}
# its files, and the statistics of its own pixels [SSL4EO-S12 bigearthnet_dataset_seco.py]
BEN_S2 = replace(
    SENSORS["s2a"],
    bands=["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"],
    mean=[341, 430, 614, 590, 951, 1792, 2075, 2219, 2266, 2246, 1594, 1009],
    std=[555, 572, 583, 676, 730, 1096, 1273, 1365, 1356, 1302, 1079, 819])

# the 19 classes, which v2's labels name, and the CORINE labels of v1 that belong to each
BEN_CLASSES = {
    "Urban fabric": ["Continuous urban fabric", "Discontinuous urban fabric"],
    "Industrial or commercial units": ["Industrial or commercial units"],
    "Arable land": ["Non-irrigated arable land", "Permanently irrigated land", "Rice fields"],
    "Permanent crops": ["Vineyards", "Fruit trees and berry plantations", "Olive groves",
                        "Annual crops associated with permanent crops"],
    "Pastures": ["Pastures"],
    "Complex cultivation patterns": ["Complex cultivation patterns"],
    "Land principally occupied by agriculture, with significant areas of natural vegetation": [
        "Land principally occupied by agriculture, with significant areas of natural vegetation"],
    "Agro-forestry areas": ["Agro-forestry areas"],
    "Broad-leaved forest": ["Broad-leaved forest"],
    "Coniferous forest": ["Coniferous forest"],
    "Mixed forest": ["Mixed forest"],
    "Natural grassland and sparsely vegetated areas": [
        "Natural grassland", "Sparsely vegetated areas"],
    "Moors, heathland and sclerophyllous vegetation": [
        "Moors and heathland", "Sclerophyllous vegetation"],
    "Transitional woodland, shrub": ["Transitional woodland/shrub"],
    "Beaches, dunes, sands": ["Beaches, dunes, sands"],
    "Inland wetlands": ["Inland marshes", "Peatbogs"],
    "Coastal wetlands": ["Salt marshes", "Salines"],
    "Inland waters": ["Water courses", "Water bodies"],
    "Marine waters": ["Coastal lagoons", "Estuaries", "Sea and ocean"],
}
BEN_NO_CLASS = [
    "Road and rail networks and associated land", "Port areas", "Airports",
    "Mineral extraction sites", "Dump sites", "Construction sites", "Green urban areas",
    "Sport and leisure facilities", "Bare rock", "Burnt areas", "Intertidal flats"]


BEN_EXPORT = """python -c "import pandas; t = pandas.read_parquet('metadata.parquet'); \
t['labels'] = t['labels'].str.join(';'); t.to_csv('metadata.csv', index=False)\""""


def BigEarthNet(root, sensor, split=None, views=2, skip=False):
    """BigEarthNet [3], v1 or v2; sensor s1 or s2a, or s2c, whose B10 is then 0 everywhere.

    split: a file of names (see known_names), or a part of v2 such as train; None: all patches.
    skip: pass over names without a patch.  v2 has its labels in root/metadata.csv.
    """
    found = [name for name in subfolders(root) if name in BEN_FOLDERS.get(sensor.name, ())]
    require(found, f"{root}: no BigEarthNet folder for modality {sensor.name}")
    metadata = Path(root, "metadata.csv")
    v2 = metadata.exists()
    require(v2 or found[0] not in ("BigEarthNet-S1", "BigEarthNet-S2"),
            f"{metadata}: missing; make it of BigEarthNet v2's metadata.parquet, with pandas and "
            f"pyarrow: {BEN_EXPORT}")
    table, pattern = {}, "S*"
    if v2:
        table = read_metadata(metadata, sensor)
        pattern = "S*/S*"                                            # tile/patch
    folders = {path.name: path for path in sorted(Path(root, found[0]).glob(pattern))}

    # v2's table lists the patches of all parts, or of the one that `split` names
    listed = [name for name, row in table.items() if split in (None, row.get("split"))]
    if listed:
        names = known_names(listed, folders, metadata, skip)
    elif split:
        names = read_names(split, folders, skip)
    else:
        names = list(folders)

    rows = []
    index = ben_index()
    for name in names:
        source = folders[name]
        if v2:
            source = metadata
        with file_errors(source, f"no BigEarthNet labels of {name}"):
            if v2:
                labels = table[name]["labels"].split(";")
            else:
                labels = json.loads(read_text(source / f"{name}_labels_metadata.json"))["labels"]
            present = {index[label] for label in labels} - {None}
            rows.append(multi_hot([present], len(BEN_CLASSES)))
    files = [[str(folders[name])] for name in names]
    decode = partial(read_patch, sensor=sensor)
    scenes = Scenes(names, files, rows, tuple(BEN_CLASSES), sensor, 120, decode, views)
    if sensor.name == "s2c":
        scenes.notes.append("B10 is 0 everywhere, since level L2A has none")
    return scenes


def read_metadata(path, sensor):
    """v2's table -> {name of a patch of the sensor: its row}."""
    column = "patch_id"
    if sensor.name == "s1":
        column = "s1_name"
    with file_errors(path, "not a table"):
        return {row.get(column) or "": row for row in csv.DictReader(read_text(path).splitlines())}


def ben_index():
    """{label of v1 or v2: index of its class, or None}."""
    index = dict.fromkeys(BEN_NO_CLASS)
    for k, (name, corine) in enumerate(BEN_CLASSES.items()):
        index |= dict.fromkeys([name, *corine], k)
    return index


def read_patch(folder, sensor, scale=to_uint8):
    """A patch -> uint8 (C,120,120).  For s2c: L2A with 0 for B10, as in SSL4EO-S12's probes."""
    on_disk = BEN_S2
    if sensor.name == "s1":
        on_disk = sensor
    x = read_product(folder, on_disk, size=120, prefix=f"{Path(folder).name}_", scale=scale)
    if sensor.name == "s2c":
        x = np.insert(x, sensor.bands.index("B10"), 0, axis=0)
    return x


# ------------------------------------------------------------------------------------- any folder


def open_data(root, sensor, labels=None, views=2, layout=None, tile=0):
    """The scenes in `root`, by the reader that fits what lies there.

    labels: a json for an SSL4EO-S12 tree (None: the one in root, if any); for folders of images a
    table, see read_table, or "classes", those of the folders; None: they are unlabelled.  A packed
    folder brings its own.
    layout: "eurosat" for its order of the bands.  tile: see Folder.
    """
    folders = set(subfolders(root))
    if os.path.exists(f"{root}/images.uint8"):
        refuse_folder_flags(root, layout, tile)
        return Packed(root, sensor, labels, views)
    zips = find_zips(root, sensor)
    if zips or folders & set(PRODUCTS):
        refuse_folder_flags(root, layout, tile)
        require(labels != "classes", f"--labels classes: {root} holds products")
        json_in_root = f"{root}/ssl4eo_multilabel.json"
        if not labels and os.path.exists(json_in_root):
            labels = json_in_root
        if zips:
            return SSL4EOZips(root, sensor, labels, views)
        return SSL4EO(root, sensor, labels, views)

    if folders & set().union(*BEN_FOLDERS.values()):
        refuse_folder_flags(root, layout, tile)
        require(labels in (None, "classes"), f"--labels {labels}: {root} brings its own labels, "
                                             f"which --labels classes takes")
        scenes = BigEarthNet(root, sensor, views=views)
    else:
        require(not labels or not labels.endswith(".json"), f"--labels {labels}: {root} holds "
                                                            f"classes")
        reader = {None: Folder, "eurosat": EuroSAT}[layout]
        scenes = reader(root, sensor, views, labels=labels or "classes", tile=tile)
        require(labels != "classes" or any(y.any() for y in scenes.labels),
                f"--labels classes: {root} has no folders of classes")
        if sensor.name == "s2c" and not layout and folders and folders <= EUROSAT_CLASSES:
            scenes.notes.append("the folders are named as EuroSAT's, whose files have another "
                                "order of bands: if these are they, --layout eurosat")
    if not labels:
        scenes.labels = [np.zeros_like(y) for y in scenes.labels]
    return scenes


def refuse_folder_flags(root, layout, tile):
    for name, value in (("layout", layout), ("tile", tile)):
        require(not value, f"--{name} {value}: {root} is no folder of images")


# ------------------------------------------------------------------- packing, checking, statistics


def pack(scenes, out, workers=0):
    """Write all images, as read, into one file: out/images.uint8 (n,C,H,W), scene by scene.

    The second line of out/index.jsonl has what else Packed needs, the first line its CRC-32.
    `out` appears when it is whole.  Until then the file grows in a folder beside it, named by what
    goes in.  After a kill the same call drops the half image at its end and goes on from there.
    """
    require_new(out)
    index = {"modality": scenes.sensor.name, "sensor": dataclasses.asdict(scenes.sensor),
             "size": scenes.size, "classes": scenes.classes,
             "ids": scenes.ids, "labels": [y.tolist() for y in scenes.labels]}
    index = json.dumps(index).encode()
    content = zlib.crc32(index + repr(scenes.files).encode())
    part = f"{os.path.normpath(out)}.part{content:08x}"
    path = f"{part}/images.uint8"
    os.makedirs(part, exist_ok=True)
    try:
        with open(path, "ab") as file:
            with file_errors(part, "another process is writing it"):
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            append_images(file, scenes, workers, f"packing {out}")
        Path(part, "index.jsonl").write_bytes(b"%d\n%b" % (zlib.crc32(index), index))
        os.rename(part, out)
    except OSError as error:            # a full disk, above all; bad images are ValueErrors
        raise ValueError(f"{path}: not written ({error.strerror})") from None


def require_new(out):
    require(not os.path.exists(out), f"{out}: exists; pack never overwrites")


def append_images(file, scenes, workers, title):
    """Bring a file of images to its full length, and its bytes to the disk."""
    image_bytes = len(scenes.sensor.bands) * scenes.size ** 2
    written = file.tell() // image_bytes
    file.truncate(written * image_bytes)                             # drop half an image
    missing = scenes.images_of(range(len(scenes)))[written:]
    for x in in_parallel(partial(image_of, scenes), missing, workers, title):
        file.write(np.ascontiguousarray(x))
    file.flush()
    os.fsync(file.fileno())


def image_of(scenes, pair):
    i, s = pair
    return scenes.image(i, s)


def Packed(root, sensor, labels=None, views=2):
    """The scenes that `pack` wrote to root.  Images are views of the file, mapped into memory.

    labels must be None: a packed folder brings its own.
    """
    path = f"{root}/images.uint8"
    index_path = f"{root}/index.jsonl"
    with file_errors(index_path, "unreadable", gone="missing; pack did not come to its end"):
        checksum, _, index = Path(index_path).read_bytes().partition(b"\n")
    require(checksum == b"%d" % zlib.crc32(index), f"{index_path}: damaged, its checksum differs")
    index = json.loads(index)
    require(not labels and sensor.name == index["modality"],
            f"{root}: packed with its labels, for --modality {index['modality']} only")
    packed_for = json.dumps(index.get("sensor", dataclasses.asdict(sensor)))
    require(packed_for == json.dumps(dataclasses.asdict(sensor)),
            f"{root}: packed for a {sensor.name} with other fields: {packed_for}")

    rows, n = [], 0
    for scene_labels in index["labels"]:
        rows.append(np.arange(n, n + len(scene_labels)))
        n += len(scene_labels)
    shape = (n, len(sensor.bands), index["size"], index["size"])
    expected = np.prod(shape)
    found = os.path.getsize(path)
    require(found == expected, f"{path}: {found} bytes, but {shape} pixels make {expected}")

    files = [[path] * len(scene_rows) for scene_rows in rows]
    labels = [np.uint8(scene_labels) for scene_labels in index["labels"]]
    scenes = Scenes(index["ids"], files, labels, index["classes"], sensor, index["size"], None,
                    views)
    scenes.memory = np.memmap(path, np.uint8, "r", shape=shape)
    scenes.rows = rows
    return scenes


def find_bad_files(scenes, workers=0):
    """Read everything -> {number of a scene: [a line for each of its bad files]}."""
    pairs = scenes.images_of(range(len(scenes)))
    problems = in_parallel(partial(problem_of, scenes), pairs, workers, "checking")
    bad = {}
    for (i, _), problem in zip(pairs, problems):
        if problem:
            bad.setdefault(i, []).extend(problem.splitlines())
    return bad


def problem_of(scenes, pair):
    """What is wrong with an image; "": nothing."""
    try:
        image_of(scenes, pair)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def leave_out(scenes, bad):
    """The scenes without those whose numbers are in `bad`; for scenes that are not in memory."""
    good = [i for i in range(len(scenes)) if i not in bad]
    require(good, "each scene has a bad file")
    result = copy.copy(scenes)
    result.ids = [scenes.ids[i] for i in good]
    result.files = [scenes.files[i] for i in good]
    result.labels = [scenes.labels[i] for i in good]
    return result


def moments(x, sensor):
    """C bands (H,W) in the sensor's units -> (C,9), nine numbers a band.

    They are mean, mean square, min, max, the shares of pixels that to_uint8 clips below and above,
    the mean and std that the sensor has, and the share of pixels that hold a measurement.  All but
    the last are of these pixels only.
    """
    x = np.float64(x).reshape(len(x), -1).T                          # (HW,C)
    mean = np.float64(sensor.mean)                                   # (C,)
    std = np.float64(sensor.std)
    below = x < mean - 2 * std
    above = x > mean + 2 * std
    measured = ~np.isnan(x)
    count = measured.sum(0).clip(1)                                  # (C,)
    low = np.where(measured, x, np.inf).min(0)
    high = np.where(measured, x, -np.inf).max(0)
    x = np.where(measured, x, 0)
    return np.stack([x.sum(0) / count, (x * x).sum(0) / count, low, high, below.sum(0) / count,
                     above.sum(0) / count, mean, std, measured.mean(0)], axis=1)


def statistics(scenes, workers=0):
    """(C,8) as `moments`, over all images and with the std in place of the mean square."""
    require(scenes.memory is None and scenes.sensor.mean,
            "rgb and packed images have no sensor units")
    paths = [scenes.files[i][s] for i, s in scenes.images_of(range(len(scenes)))]
    job = partial(scenes.decode, scale=moments)
    x = np.stack([*in_parallel(job, paths, workers, "statistics")])  # (n,C,9)
    low = x[:, :, 2].min(0)
    high = x[:, :, 3].max(0)
    measured = x[:, :, 8:]                                           # (n,C,1)
    require(measured.any(0).all(), "a band without any measurement: is nodata right?")
    x = np.where(measured > 0, x, 0)[:, :, :8]
    table = (x * measured).sum(0) / measured.sum(0)                  # (C,8)
    table[:, 1] = np.sqrt((table[:, 1] - table[:, 0] ** 2).clip(0))  # std
    table[:, 2] = low
    table[:, 3] = high
    return table


def measure_sensor(root, fields, tile=0, workers=0):
    """A Sensor for the images in a folder, with the mean and std of all their pixels.

    fields: those that no pixel tells: name, bands, kind, and if need be scale, offset, decibels
    and nodata.  ValueError: bad images, or a band that is constant.
    """
    C = len(fields["bands"])
    unscaled = {"mean": [0.0] * C, "std": [1.0] * C}
    sensor = make_sensor(fields | unscaled | {"dtype": find_dtype(root)})
    table = statistics(Folder(root, sensor, tile=tile), workers)
    for band, std in zip(sensor.bands, table[:, 1]):
        require(std > 0, f"{root}: band {band} is constant")
    mean = [float(f"{value:.6g}") for value in table[:, 0]]
    std = [float(f"{value:.6g}") for value in table[:, 1]]
    return replace(sensor, mean=mean, std=std)


def find_dtype(root):
    """The numpy name of the pixels' type in the first image of a folder that can be read."""
    for folder in [*subfolders(root), "."]:
        for path in list_images(f"{root}/{folder}", [".tif", ".tiff"]):
            with suppress(ValueError):
                return read_tiff(path).dtype.name
        for path in list_images(f"{root}/{folder}", [".png", ".jpg", ".jpeg"]):
            with suppress(ValueError):
                return read_picture(path).dtype.name
    raise ValueError(f"{root}: no image that can be read, in it or its folders")


# --------------------------------------------------------------------------------- augmentation
#
# Numbers are drawn on the CPU, by a generator whose seed the caller knows, and applied where the
# images are.  Drawing them again gives the same pixels.


def draw_crops(n, generator, area_min=0.2, area_max=1.0):
    """Where n views look: {name: (n,) floats}.

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
    """In what light n views are seen: {name: (n,) floats; offset: (n,C) or (n,1)}.

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
    swings = jitter * (2 * u[[1, 2, 3, 4, 8]] - 1) * (u[0] < p)      # (5,n) in [-jitter, jitter]
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
        others = jitter * (2 * others - 1) * (u[0] < p)              # (C-2,n)
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
    """uint8 (n,C,H,W) and what draw_crops drew -> float (n,C,size,size) in [0,1], on x's device.

    Crop, resize and flip are one bilinear sampling of all images at once.
    """
    p = {name: value.to(x.device, non_blocking=True)[:, None] for name, value in p.items()}
    # Centres of the pixels of a view, which spans [-1, 1].  F.affine_grid gives the same numbers,
    # but by a matrix product: with TF32 the places would be wrong by up to a tenth of a pixel.
    centres = torch.linspace(-1, 1, size, device=x.device) * (size - 1) / size       # (size,)
    columns = p["w"] * p["flip_x"] * centres + p["x"]                # (n,size), in the image
    rows = p["h"] * p["flip_y"] * centres + p["y"]                   # (n,size)
    grid = torch.stack([columns[:, None, :].expand(-1, size, -1),
                        rows[:, :, None].expand(-1, -1, size)], dim=3)       # (n,size,size,2)
    x = F.grid_sample(x.float(), grid, padding_mode="border", align_corners=False)
    return x.div_(255)


def colour(x, p):
    """float (n,C,H,W) in [0,1] and what draw_colours drew -> the same images in that light."""
    # decided while the numbers are on the CPU: asking a GPU would make it wait
    blurred = p["blur"].nonzero()[:, 0]
    changes_saturation = bool((p["saturation"] != 1).any())
    reach = int(np.ceil(3 * float(p["blur"].max()) * x.shape[-1] / 224))     # 3 std, in pixels
    p = {name: value.to(x.device, non_blocking=True).view(len(x), -1, 1, 1)
         for name, value in p.items()}                               # (n,1,1,1); offset (n,C,1,1)

    x = change_light(x, p["brightness"], p["contrast"], p["offset"])
    grey = x.mean(1, keepdim=True)                                   # (n,1,H,W)
    if changes_saturation:
        x = torch.lerp(grey, x, p["saturation"])                     # 0: grey
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
    side = (x.roll(1, 1) - x.roll(-1, 1)) / 3 ** 0.5                 # at right angles to x - grey
    angle = 2 * torch.pi * turn
    return (grey + angle.cos() * (x - grey) + angle.sin() * side).clamp(0, 1)


def blur_images(x, std, reach):
    """float (n,C,H,W), std (n,1,1,1) in pixels -> blurred by a Gaussian of 2 reach + 1 taps.

    All images and bands are the channels of one grouped convolution, down and then across.
    """
    n, C, H, W = x.shape
    taps = torch.arange(-reach, reach + 1, device=x.device).view(-1, 1)      # (taps,1)
    exponent = -(taps / std.clamp_min(1e-3)).square() / 2            # (n,1,taps,1)
    kernel = exponent.softmax(2).repeat_interleave(C, 0)             # (nC,1,taps,1), sum 1
    x = F.pad(x, (reach, reach, reach, reach), mode="replicate")
    x = x.flatten(0, 1)[None]                                        # (1,nC,.,.)
    x = F.conv2d(x, kernel, groups=n * C)
    x = F.conv2d(x, kernel.mT, groups=n * C)
    return x.view(n, C, H, W)


# ------------------------------------------------------------------------------------- toy world

# s2c: reflectance x 10000 of each class in the 13 bands; s1: backscatter of VV and VH in decibels;
# texture: how much its brightness varies
LAND = {
    "water": {
        "s2c": [1300, 1000, 800, 550, 450, 350, 320, 280, 260, 120, 10, 120, 80],
        "s1": [-19, -26], "texture": 0.1},
    "trees": {
        "s2c": [1220, 880, 800, 520, 850, 1850, 2200, 2150, 2350, 800, 14, 1200, 550],
        "s1": [-9.5, -14.5], "texture": 1},
    "grass": {
        "s2c": [1330, 1080, 1120, 900, 1500, 2550, 2950, 2850, 3050, 980, 18, 2250, 1250],
        "s1": [-13, -20], "texture": 1},
    "flooded vegetation": {
        "s2c": [1290, 1020, 900, 680, 850, 1400, 1600, 1550, 1650, 550, 12, 750, 400],
        "s1": [-9, -18.5], "texture": 1},
    "crops": {
        "s2c": [1380, 1130, 1180, 950, 1600, 3000, 3900, 3800, 4000, 1150, 20, 1900, 1000],
        "s1": [-11.5, -17], "texture": 1},
    "shrub & scrub": {
        "s2c": [1420, 1200, 1180, 1250, 1600, 2050, 2250, 2200, 2450, 880, 21, 2700, 1950],
        "s1": [-12, -18.5], "texture": 1},
    "built": {
        "s2c": [1800, 1720, 1680, 1750, 1850, 1950, 2000, 2050, 2100, 780, 25, 2100, 1900],
        "s1": [-5, -12], "texture": 1.2},
    "bare": {
        "s2c": [1700, 1560, 1680, 2100, 2450, 2600, 2700, 2700, 2900, 900, 26, 3500, 3100],
        "s1": [-15, -23], "texture": 0.8},
    "snow & ice": {
        "s2c": [4200, 4000, 3900, 3900, 3800, 3600, 3500, 3400, 3300, 1300, 60, 800, 600],
        "s1": [-13, -19], "texture": 0.3},
}
SPECTRA = np.float32([land["s2c"] for land in LAND.values()])        # (9,13)
BACKSCATTER = np.float32([land["s1"] for land in LAND.values()])     # (9,2)
TEXTURE = np.array([land["texture"] for land in LAND.values()])      # (9,)
WATER, TREES, GRASS, FLOODED, CROPS, SHRUB, BUILT, BARE, SNOW = range(9)
VEGETATION = slice(TREES, SHRUB + 1)
WINTER, SPRING, SUMMER, AUTUMN = range(4)
LEAVES = [0.35, 0.8, 1, 0.6]                                         # how green each season is


def smooth(rng, size, scale):
    """Gaussian random field (size,size), mean 0, unit variance, correlated over `scale` pixels."""
    f = np.fft.fftfreq(size)
    squared = f[:, None] ** 2 + f[:size // 2 + 1] ** 2               # frequency squared
    decay = np.exp(-2 * (np.pi * scale) ** 2 * squared)
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((size, size))) * decay, (size, size))
    return ((field - field.mean()) / (field.std() + 1e-9)).astype(np.float32)


def stripes(rng, size, period, bend):
    """Waves (size,size) of that period in pixels and any direction; bend shifts their phase."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    angle = rng.uniform(0, np.pi)
    return np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period + bend)


def town(rng, size):
    """Blocks of houses (size,size), each of one brightness, with dark streets between them."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    block = rng.integers(5, 8)
    houses = rng.standard_normal((size, size)).astype(np.float32)
    houses = np.kron(houses[::block, ::block], np.ones((block, block)))[:size, :size]
    streets = (x % block < 1) | (y % block < 1)
    return np.where(streets, -1.5, houses)


def textures(rng, size):
    """(9,size,size), unit variance: what tells the classes apart where spectra do not."""
    parcels = smooth(rng, size, 4) > 0                               # ploughed in two directions
    ploughed = [stripes(rng, size, rng.uniform(4, 6), 0) for _ in range(2)]
    houses = town(rng, size)
    t = {
        "water": smooth(rng, size, 1),
        "trees": smooth(rng, size, 1.2),
        "grass": smooth(rng, size, 5),
        "flooded vegetation": np.sign(smooth(rng, size, 2.5)),
        "crops": np.where(parcels, *ploughed),
        "shrub & scrub": smooth(rng, size, 0.8) > 1.3,
        "built": houses,
        "bare": stripes(rng, size, rng.uniform(8, 12), 2 * smooth(rng, size, 6)),
        "snow & ice": smooth(rng, size, 8),
    }
    t = np.stack(list(t.values())).astype(np.float32)
    return (t - t.mean((1, 2), keepdims=True)) / (t.std((1, 2), keepdims=True) + 1e-6)


def summer_cover(rng, size, cold, wet, populated):
    """(size,size) class of each pixel: three to five classes that fit the climate."""
    chance = {
        "water": wet,
        "trees": 1,
        "grass": 1,
        "flooded vegetation": 0.8 * wet,
        "crops": 1,
        "shrub & scrub": 1 - wet / 2,
        "built": populated,
        "bare": 1 - wet,
        "snow & ice": cold - 0.15,
    }
    chance = np.array(list(chance.values())) + 0.15
    present = rng.choice(9, rng.integers(3, 6), replace=False, p=chance / chance.sum())
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
    green = SPECTRA[VEGETATION]
    spectra = SPECTRA.copy()
    spectra[VEGETATION] = leaf * green + (1 - leaf) * (0.5 * SPECTRA[BARE] + 0.5 * green)
    return spectra


def light_and_haze(rng, s2, gain):
    """Hills lit from one side, the sun's height, the sensor's gain, and haze in the blue bands.

    Returns the bands (13,H,W) and the slope of the hills (H,W).
    """
    size = s2.shape[-1]
    haze = rng.uniform(0, 600) * np.exp(-np.arange(13) / 4)[:, None, None]
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
    s1 += rng.normal(0, 1.5, (2, 1, 1)) + rng.uniform(-2, 2) * slope
    s1 += 10 * np.log10(rng.gamma(12, 1 / 12, s1.shape))
    return s1


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
    level = np.exp(rng.normal(0, 0.1, (9, 1)) + rng.normal(0, 0.05, (9, 13)))
    level_db = rng.normal(0, 1.5, (9, 2))
    amplitude = TEXTURE * rng.uniform(0.6, 1.4, 9)
    for season in range(4):
        cover = cover_in(season, summer, relief, cold)
        grain = np.take_along_axis(texture, cover[None], 0)[0] * amplitude[cover]    # (H,W)

        gain = np.exp(rng.normal(0, 0.1, (13, 1, 1)))
        spectra = season_spectra(rng, season) * level                # (9,13)
        s2 = spectra[cover].transpose(2, 0, 1) * np.exp(0.3 * grain - 0.05)
        s2, slope = light_and_haze(rng, s2, gain)
        s2 = clouds(rng, s2)
        s2 += rng.normal(0, 20, s2.shape)

        s1 = (BACKSCATTER + level_db)[cover].transpose(2, 0, 1) + 4 * grain
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
        pixels = band.reshape(side, ratio, side, ratio).mean((1, 3)).astype(band.dtype)
        degrees = 10 * ratio / 111320                                # a degree has 111,320 m
        geotags = [
            (33550, "d", 3, (degrees, degrees, 0), True),            # size of a pixel
            (33922, "d", 6, (0, 0, 0, *position, 0), True),          # place of the first pixel
            (34735, "H", 12, (1, 1, 0, 2, 1024, 0, 1, 2, 2048, 0, 1, 4326), True)]   # EPSG:4326
        with file_errors(f"{folder}/{name}.tif", "not written"):
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
    require(not os.path.exists(root), f"{root}: exists and is not the toy world {world}; "
                                      f"delete it, or name it with --data")
    require(size % 6 == 0 and size >= 12 and scenes > 0,
            f"toy world of {scenes} scenes of {size} pixels: size is a multiple of 6, >= 12")
    part = f"{root}.part{os.getpid()}"
    os.makedirs(part)
    try:
        job = partial(write_toy_scene, root=part, size=size, seed=seed)
        table = dict(in_parallel(job, range(scenes), workers, f"toy world {root}"))
        Path(part, "ssl4eo_multilabel.json").write_text(json.dumps(table))
        Path(part, "toy.json").write_text(world)
        os.rename(part, root)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return root


# ---------------------------------------------------------------------------------- command line

EXAMPLES = """examples:
  python data.py toy toy                              an artificial world of 2,000 scenes
  python data.py check SSL4EO --modality s1           list the files that are missing or broken
  python data.py stats SSL4EO --modality s2c          mean, std and range of each band
  python data.py stats DIR --bands B2 B3 B4 B8 --out my.json       a sensor for --modality
  python data.py pack SSL4EO PACKED --modality s2c    one file of pixels, much faster to read
  python pretrain.py --modality s2c --data PACKED     pretrain on it
"""


def parse(argv):
    """Command line -> namespace of flags.  Wrong flags end the program with one line."""
    parser = argparse.ArgumentParser(
        description="Make, check, measure and pack folders of satellite images.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    toy = commands.add_parser("toy", allow_abbrev=False,
                              help="write the toy world, an SSL4EO-S12 v1.0 tree")
    toy.add_argument("root", help="a new folder")
    toy.add_argument("--scenes", type=int, default=2000, help="places, four seasons each")
    toy.add_argument("--size", type=int, default=36, help="side in pixels, a multiple of 6")
    toy.add_argument("--seed", type=int, default=0, help="another seed, another world")

    source = argparse.ArgumentParser(add_help=False)                 # what the other three share
    source.add_argument("root", help="any folder that pretrain.py takes as --data")
    source.add_argument("--modality", metavar="SENSOR",
                        help="s1 (radar), s2c (optical, L1C), s2a (optical, L2A), rgb or a JSON")
    source.add_argument("--labels", help="labels to pack, as in pretrain.py")
    source.add_argument("--layout", choices=["eurosat"], help="as in pretrain.py")
    source.add_argument("--tile", type=int, default=0, metavar="N", help="as in pretrain.py")
    source.add_argument("--workers", type=int, default=os.cpu_count(), help="reading processes")

    commands.add_parser("check", parents=[source], allow_abbrev=False,
                        help="read everything and list each bad file; exit code 1 if there is one")
    stats = commands.add_parser(
        "stats", parents=[source], allow_abbrev=False,
        help="mean, std and range of each band, and the shares that are clipped; or a new sensor")
    stats.add_argument("--bands", nargs="+", metavar="BAND",
                       help="instead of --modality: names of the bands in the order of the files")
    stats.add_argument("--out", metavar="FILE", help="JSON file for the sensor that --bands makes")
    stats.add_argument("--kind", choices=["optical", "radar", "rgb"], default="optical",
                       help="of the new sensor: which colours change in training (%(default)s)")
    stats.add_argument("--scale", type=float, default=1.0, help="units = pixels * scale + offset")
    stats.add_argument("--offset", type=float, default=0.0, help="for example -1000")
    stats.add_argument("--decibels", action="store_true", help="pixels are linear power")
    stats.add_argument("--nodata", type=float, help="value of pixels without a measurement, or nan")
    packing = commands.add_parser("pack", parents=[source], allow_abbrev=False,
                                  help="put all images into one file, which --data takes as well")
    packing.add_argument("out", help="a new folder")
    packing.add_argument("--skip-bad", action="store_true",
                         help="leave out scenes with bad files, and name them")
    args = parser.parse_args(argv)
    if args.command == "stats" and args.bands:
        if args.modality or not args.out:
            parser.error("--bands goes with --out, and without --modality")
    elif args.command != "toy" and not args.modality:
        parser.error("the following arguments are required: --modality")
    return args


def write_sensor(args):
    """Measure the images in args.root and write the sensor that they make to args.out."""
    fields = {"name": Path(args.out).stem, "bands": args.bands, "kind": args.kind,
              "scale": args.scale, "offset": args.offset, "decibels": args.decibels,
              "nodata": args.nodata}
    sensor = measure_sensor(args.root, fields, args.tile, args.workers)
    lines = [f" {json.dumps(name)}: {json.dumps(value)}"
             for name, value in dataclasses.asdict(sensor).items()]
    with file_errors(args.out, "not written"):
        Path(args.out).write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{args.out}: {len(sensor.bands)} bands of {sensor.dtype}; look at its unit and at which "
          f"bands look red, green, blue; then --modality {args.out}")


def print_bad_files(scenes, workers):
    """Print a line for each bad file -> as find_bad_files."""
    bad = find_bad_files(scenes, workers)
    for problems in bad.values():
        print(*problems, sep="\n")
    return bad


def print_statistics(scenes, workers):
    print("band      mean       std       min       max  below  above  sensor: mean       std")
    for name, row in zip(scenes.sensor.bands, statistics(scenes, workers)):
        mean, std, low, high, below, above, sensor_mean, sensor_std = row
        print(f"{name:4}{mean:10.2f}{std:10.2f}{low:10.2f}{high:10.2f}{below:7.2%}{above:7.2%}"
              f"{sensor_mean:14.2f}{sensor_std:10.2f}")


def main(argv=None):
    """Run a command -> exit code.  ValueError, OSError: what was given cannot be used."""
    args = parse(argv)
    if args.command == "toy":
        make_toy(args.root, args.scenes, args.size, args.seed)
        return 0
    if args.command == "stats" and args.bands:
        write_sensor(args)
        return 0
    scenes = open_data(args.root, find_sensor(args.modality), args.labels, layout=args.layout,
                       tile=args.tile)
    for note in scenes.notes:
        print(note)
    images = sum(len(files) for files in scenes.files)
    if args.command == "stats":
        print_statistics(scenes, args.workers)
    if args.command == "check":
        bad = print_bad_files(scenes, args.workers)
        count = sum(len(problems) for problems in bad.values())
        print(f"{args.root}: {images} images of {len(scenes)} scenes, {count} bad files")
        return int(count > 0)
    if args.command == "pack":
        require_new(args.out)
        if args.skip_bad:
            bad = print_bad_files(scenes, args.workers)
            for i in bad:
                print(f"left out: {scenes.ids[i]}")
            scenes = leave_out(scenes, bad)
        pack(scenes, args.out, args.workers)
        images = sum(len(files) for files in scenes.files)
        print(f"{args.out}: {images} images of {len(scenes)} scenes")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        first_line = error_message(error).partition("\n")[0]         # of a product, the first file
        sys.exit(f"data.py: error: {first_line}")
