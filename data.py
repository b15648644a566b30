"""Reading, scaling, labels, augmentation, and a world to practise on.  [reading time: 20 minutes]

Every reader lists a tree of files and gives one and the same thing, `Scenes`: scene i has one or
more images (seasons), each a uint8 array (C,H,W) on one pixel grid with a multi-hot label row.

    SSL4EO(root, "s2c")   root/{s1,s2c,s2a}/{0000000}/{product}/{band}.tif, Sentinel-1/2 v1.0 [1]
    EuroSAT(root, "s2c")  root/{class}/{class}_{n}.tif (13 bands; SAR: 2) or .jpg (RGB) [2]
    Folder(root, "rgb")   images in class folders or side by side, any of TIFF, PNG and JPEG
    BigEarthNet(root)     root/BigEarthNet-{...}/{patch}/{patch}_{band}.tif, v1 and v2 [3]
    Packed(root)          what `python data.py pack` made of any of these: one file of pixels
    make_toy(root)        writes a procedural SSL4EO-S12 tree, labels included

Radiometry, the same for all: x' = (x - mean) / (4 std) + 1/2, clipped to [0,1] (that is mean +- 2
std), kept as uint8, and given to the model as float in [0,1] [SoftCon README, "Data
normalization"].  RGB images are uint8 already and stay as they are.

[1] Wang et al. 2023, SSL4EO-S12; labels: SSL4EO-S12-ML of SoftCon, classes of Dynamic World
[2] Helber et al. 2019, EuroSAT; Wang et al. 2023, EuroSAT-SAR
[3] Sumbul et al. 2021, BigEarthNet-MM (v1); Clasen et al. 2024, reBEN (v2)
"""
import argparse
import csv
import fcntl
import importlib
import json
import os
import re
import shutil
import struct
import sys
import zlib
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import tifffile
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

CLASSES = ("water", "trees", "grass", "flooded vegetation", "crops", "shrub & scrub", "built",
           "bare", "snow & ice")                            # Dynamic World's indices 0..8
# a modality a row: its bands; sides of their pixels, the finest 1; type on disk (s1 backscatter in
# dB, s2 reflectance x 10000); bands that look red, green, blue; mean and std of the full SSL4EO-S12
# [SSL4EO-S12 convert_rgb.py; torchgeo resnet.py]
SENSORS = {
    "s1": ("VV VH", "1 1", np.float32, [0, 1, 0], "-12.59 -20.26", "5.26 5.91"),
    "s2c": ("B1 B2 B3 B4 B5 B6 B7 B8 B8A B9 B10 B11 B12", "6 1 1 1 2 2 2 1 2 6 6 2 2",
            np.uint16, [3, 2, 1],
            "1612.9 1397.6 1322.3 1373.1 1561 2108.4 2390.7 2318.7 2581 837.7 22 2195.2 1537.4",
            "791 854.3 878.7 1144.9 1127.5 1164.2 1276 1249.5 1345.9 577.5 47.5 1340 1142.9"),
    "s2a": ("B1 B2 B3 B4 B5 B6 B7 B8 B8A B9 B11 B12", "6 1 1 1 2 2 2 1 2 6 2 2",
            np.uint16, [3, 2, 1],
            "756.4 889.6 1151.7 1307.6 1637.6 2212.6 2442 2538.9 2602.9 2666.8 2388.8 1821.5",
            "1111.4 1159.1 1188.1 1375.2 1376.6 1358.6 1418.4 1476.4 1439.9 1582.1 1460.7 1352.2"),
    "rgb": ("R G B", "1 1 1", np.uint8, [0, 1, 2], "", "")}
BANDS = {m: row[0].split() for m, row in SENSORS.items()}
SHRINK = {m: dict(zip(BANDS[m], map(int, row[1].split()))) for m, row in SENSORS.items()}
PRODUCTS = [m for m in BANDS if m != "rgb"]                             # a folder of bands each
RADAR = [m for m in BANDS if SENSORS[m][2] is np.float32]                # decibels, no brightness
DTYPE, COLOURS = ({m: row[k] for m, row in SENSORS.items()} for k in (2, 3))
STATS = {m: [[float(v) for v in text.split()] for text in row[4:]] for m, row in SENSORS.items()}
# of BigEarthNet's own S2 L2A pixels [SSL4EO-S12 bigearthnet_dataset_seco.py]
STATS["ben"] = [[341, 430, 614, 590, 951, 1792, 2075, 2219, 2266, 2246, 1594, 1009],
                [555, 572, 583, 676, 730, 1096, 1273, 1365, 1356, 1302, 1079, 819]]

# ---------------------------------------------------------------------------------------- reading


def require(fine, problem):
    """ValueError(problem), one line that names what is wrong and where, if it is not fine."""
    if not fine:
        raise ValueError(problem)


@contextmanager
def named(path, problem, gone="no such file"):
    """Whatever a library raises inside becomes a ValueError of one line that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path}: {gone}") from None
    except Exception as error:             # codecs raise a dozen kinds, some of a dozen lines
        why = str(error).partition("\n")[0]
        raise ValueError(f"{path}: {problem} ({type(error).__name__}: {why})") from None


def plainly(error):
    """What an error says, without the traceback that a reading process wraps around it."""
    return re.split(r"\n\w+Error: ", str(error))[-1].strip()


def read_text(path):
    """A text file's content; ValueError, naming the file, if it is missing or not UTF-8."""
    with named(path, "not a readable text file"):
        return Path(path).read_text(encoding="utf-8")


def read_tiff(path):
    """First page as an array; ValueError, naming the file, if it is missing, cut off or no TIFF."""
    with named(path, "unreadable TIFF", "missing"):
        x = plain_tiff(np.fromfile(path, np.uint8))
        if x is None:
            with tifffile.TiffFile(path) as file:
                x = file.pages[0].asarray()
        return x.astype(x.dtype.newbyteorder("="), copy=False)


def plain_tiff(raw):
    """The bytes of a TIFF -> (H,W) if its first page is one band in one uncompressed block; None:
    ask tifffile, which opens anything, and takes ten times as long.  [TIFF 6.0, section 2]"""
    # width, height, bits, strips, strips' bytes, type; compression, bit order, bands, predictor,
    # tiles, depth: 1 if the file does not say
    tags = dict.fromkeys((256, 257, 258, 273, 279, 339, 259, 266, 277, 317, 322, 32997), (1,))
    try:
        (at,), order = struct.unpack_from("<I", raw, 4), []
        n, = struct.unpack_from("<H", raw, at)
        for at in range(at + 2, at + 2 + 12 * n, 12):
            tag, kind, count, value = struct.unpack_from("<HHII", raw, at)
            order.append(tag)
            if tag in tags:
                form = f"<{count}" + {3: "H", 4: "I"}[kind]
                here = struct.calcsize(form) <= 4                    # else `value` says where
                tags[tag] = struct.unpack_from(form, raw, at + 8 if here else value)
        w, h, bits, starts, sizes, kind, *rest = tags.values()
        kind = {(8, 1): "u1", (16, 1): "<u2", (32, 3): "<f4"}[bits + kind]
        ends = np.add(starts, sizes)
        if (raw[:4].tobytes() == b"II*\0" and {*rest} == {(1,)} and order == sorted({*order})
                and (ends[:-1] == starts[1:]).all()):
            return raw[starts[0]:ends[-1]].view(kind).reshape(h + w)
    except (KeyError, IndexError, ValueError, struct.error):
        return None


def to_uint8(x, modality):
    """C bands (H,W) in the sensor's units -> uint8, mean - 2 std at 0, mean + 2 std at 255.

    Values beyond saturate.  (A plain cast would wrap: reflectance 12000 as x/10000*255 gives 50.)
    """
    mean, std = np.float32(STATS[modality])[..., None, None]         # (C,1,1)
    x = np.stack(x, dtype=np.float32)                                # (C,H,W)
    x -= mean - 2 * std
    x *= 255 / (4 * std)
    x += 0.5
    return np.clip(x, 0, 255, out=x).astype(np.uint8)


def resize(x, size):
    """(H,W) or (C,H,W) to (...,size,size), bilinear with pixel centres aligned."""
    if x.shape[-2:] == (size, size):
        return x
    x = torch.from_numpy(np.ascontiguousarray(x, np.float32)).reshape(1, -1, *x.shape[-2:])
    return F.interpolate(x, (size, size), mode="bilinear", antialias=size < x.shape[-1])[0].numpy()


def read_band(path, modality, size):
    """One band file -> (H,W) of the sensor's type and finite, about size x size pixels."""
    x, dtype = read_tiff(path), DTYPE[modality]
    require(x.dtype == dtype, f"{path}: {x.dtype} pixels, {modality} has {dtype.__name__}")
    fits = x.ndim == 2 and max(abs(n - size) for n in x.shape) <= size // 40
    require(fits, f"{path}: {x.shape} pixels, expected {size} x {size}")
    require(np.isfinite(x).all(), f"{path}: NaN or infinite pixels")
    return x


def read_product(folder, modality, size, prefix="", stats=None, scale=to_uint8):
    """One S1 or S2 product folder of TIFFs {prefix}{band}.tif -> uint8 (C,size,size).

    10, 20 and 60 m bands have size, size/2 and size/6 pixels and are resampled to one grid.
    scale(bands, name in STATS) makes the result.  ValueError: a line for each bad file.
    """
    bands, bad = [], []
    for name in BANDS[modality]:
        on_disk = prefix + re.sub(r"^B(\d)$", r"B0\1", name) if prefix else name
        try:
            x = read_band(f"{folder}/{on_disk}.tif", modality, size // SHRINK[modality][name])
            bands.append(resize(x, size).reshape(size, size))
        except ValueError as error:
            bad.append(str(error))
    require(not bad, "\n".join(bad))
    return scale(bands, stats or modality)


class Scenes(Dataset):
    """Scenes of one or more images.  scenes[i, seed] -> (x, y), a list of such keys -> the same for
    a batch, with one more axis in front:

        x  uint8 (V, C, H, W)   `views` different images of scene i, drawn with `seed`; a scene
        y  uint8 (V, L)         with fewer repeats them; y: multi-hot labels, all 0 = unlabelled

    ids[i] is the scene's name, files[i] its images, labels[i] (S,L), decode(file) -> (C,H,W).
    memory: None, or all images (n,C,H,W); files[i] are then their places in it.
    """

    def __init__(self, ids, files, labels, classes, modality, size, decode, views=2, memory=None):
        self.ids, self.files, self.labels, self.classes = ids, files, labels, classes
        self.modality, self.size, self.decode = modality, size, decode
        self.views, self.memory = views, memory

    def __len__(self):
        return len(self.ids)

    def image(self, i, s):
        """Image s of scene i: uint8 (C,H,W)."""
        return self.decode(self.files[i][s])

    def __getitem__(self, keys):
        if isinstance(keys, tuple):
            return tuple(v[0] for v in self[[keys]])
        pairs = [(i, s) for i, seed in keys for s in np.resize(
            np.random.default_rng(seed).permutation(len(self.files[i])), self.views)]
        x = np.stack([self.image(*p) for p in pairs]) if self.memory is None else (
            self.memory[[self.files[i][s] for i, s in pairs]])       # the only copy there is
        y = np.stack([self.labels[i][s] for i, s in pairs])
        return tuple(v.reshape(len(keys), self.views, *v.shape[1:]) for v in (x, y))

    def pairs(self, scenes):
        return [(i, s) for i in scenes for s in range(len(self.files[i]))]

    def preload(self, scenes, workers=0):
        """Decode the named scenes once and keep them in memory, so that no epoch reads again."""
        if self.memory is None:                                      # else packed: the page cache
            pairs, C = self.pairs(scenes), len(BANDS[self.modality])
            memory = np.empty((len(pairs), C, self.size, self.size), np.uint8)
            loader = DataLoader(Images(self, pairs), 64, num_workers=workers)
            for x, _, at in tqdm(loader, "reading", leave=False):
                memory[at] = x
            for place, (i, s) in enumerate(pairs):
                self.files[i][s] = place
            self.memory, self.decode = memory, memory.__getitem__


class Images(Dataset):
    """The single images `pairs` = [(scene, season), ...] of `scenes`: -> (x, y, position)."""

    def __init__(self, scenes, pairs):
        self.scenes, self.pairs = scenes, pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, j):
        i, s = self.pairs[j]
        return self.scenes.image(i, s), self.scenes.labels[i][s], j


def in_parallel(job, items, workers, title):
    """job(item) of each, in order, from `workers` processes (0: this one); shows a progress bar."""
    return tqdm(DataLoader(items, None, collate_fn=job, num_workers=workers), title)


def held_out(ids, fraction):
    """(n,) bool: scenes set aside for testing, chosen by a hash of the name alone, so that training
    and probing agree without a list, whatever else lies in the folder."""
    return np.array([zlib.crc32(i.encode()) / 2 ** 32 < fraction for i in ids], bool)


def subfolders(folder):
    require(os.path.isdir(folder), f"{folder}: no such folder")
    return sorted(e.name for e in os.scandir(folder) if e.is_dir())


def date(product):
    """Sensing time of a product, the first time stamp in its name."""
    found = re.search(r"\d{8}T\d{6}", product)
    require(found, f"product name {product!r} has no date such as 20200604T054639")
    return found[0]


def multi_hot(rows, L):
    """[{class index, ...}, ...], a set an image -> (S,L) uint8."""
    return np.uint8([[k in row for k in range(L)] for row in rows])


def SSL4EO(root, modality, labels=None, seasons=2):
    """SSL4EO-S12 v1.0 tree [1], modality s1, s2c or s2a; `labels`: the SSL4EO-S12-ML json.

    Labels join by scene id and S2 product name; an S1 image takes those of the S2 image of the same
    scene and the same rank in time.  A scene or product that the json leaves out, or gives an empty
    list, is unlabelled, and so are S1 images of a scene with fewer or more S2 images; a class or a
    product that does not exist is a ValueError.
    """
    ids, files, rows = subfolders(f"{root}/{modality}"), [], []
    require(ids, f"{root}/{modality}: no scenes")
    trees = {m: f"{root}/{m}" for m in PRODUCTS if os.path.isdir(f"{root}/{m}")}
    for tree in trees.values():
        for i in sorted({*subfolders(tree)} - {*ids}):
            raise ValueError(f"{root}/{modality}/{i}: missing, while {tree}/{i} is there")
    table, s2 = read_labels(labels) if labels else {}, trees.get("s2c", trees.get("s2a"))
    for i in ids:
        mine = table.get(i, {})
        with named(f"{root}/{modality}/{i}", "not a scene"):
            products = sorted(subfolders(f"{root}/{modality}/{i}"), key=date)
        require(products, f"{root}/{modality}/{i}: scene without a {modality} product")
        names = products                                             # of the S2 images
        if modality[:2] != "s2":
            names = sorted(subfolders(f"{s2}/{i}") if s2 else mine, key=date)
        for name in mine.keys() - {*names}:
            raise ValueError(f"{labels}: scene {i} has no product {name}")
        names = names if len(names) == len(products) else [None] * len(products)
        rows.append(multi_hot([mine.get(name, ()) for name in names], len(CLASSES)))
        files.append([f"{root}/{modality}/{i}/{p}" for p in products])
    finest, sizes = min(SHRINK[modality], key=SHRINK[modality].get), []
    for row in files[:99]:                                           # no bad one sets the measure
        with suppress(ValueError):
            sizes.append(max(read_tiff(f"{row[0]}/{finest}.tif").shape))
    size = max(sizes, key=sizes.count, default=264)
    decode = partial(read_product, modality=modality, size=size)
    return Scenes(ids, files, rows, CLASSES, modality, size, decode, seasons)


def read_labels(path):
    """{scene: {product: [class index, ...]}} from the json, whose classes are strings "0".."8"."""
    text = read_text(path)
    with named(path, "not labels of the form {scene: {product: [class]}}"):
        table = json.loads(text)
        for i, mine in table.items():
            for product, classes in mine.items():
                for c in classes:
                    require(str(c).isdecimal() and int(c) < len(CLASSES),
                            f"unknown class {c!r} in scene {i}, product {product}")
                mine[product] = [int(c) for c in classes]
        return table


def read_image(path, modality, size=None, order=None, scale=to_uint8):
    """One TIFF, PNG or JPEG -> uint8 (C,H,W); order: where the file keeps each band of `modality`.
    A PNG's or JPEG's grey is repeated, a PNG's alpha left out; other bands or types are refused."""
    bands, dtype = len(BANDS[modality]), np.dtype(DTYPE[modality])
    if path.lower().endswith((".tif", ".tiff")):
        x = read_tiff(path)
    else:
        with named(path, "unreadable image"):
            import imagecodecs                 # only here: TIFFs without compression do without it
            raw = Path(path).read_bytes()
            require(path.lower().endswith(".png") or b"\xff\xd9" in raw[-32:], "JPEG is cut off")
            x = np.atleast_3d(imagecodecs.imread(raw))
        x = x[..., :3 if path.lower().endswith(".png") else None]
        x = x[..., [0] * 3] if x.shape[2] < 3 else x
    x = x.transpose(1, 2, 0) if x.ndim == 3 and len(x) == bands else x         # band after band
    require(x.shape[2:] == (bands,) and x.dtype == dtype and np.isfinite(x).all(),
            f"{path}: {x.dtype} {x.shape}, expected {bands} finite bands of {dtype}")
    side = size or len(x)
    require(x.shape[:2] == (side, side),
            f"{path}: {x.shape[:2]} pixels, the others have {side} x {side}")
    x = x.transpose(2, 0, 1)
    return x if modality == "rgb" else scale(x if order is None else x[order], modality)


def Folder(root, modality="rgb", views=2, order=None):
    """Square images of one size, an image a scene: a folder a class, or all in root, unlabelled;
    rgb: TIFF, PNG or JPEG of 8 bits; s1, s2c, s2a: TIFFs with all bands (order: read_image)."""
    kinds = (".tif", ".tiff") + (".png", ".jpg", ".jpeg") * (modality == "rgb")
    found = {c: sorted(f"{c}/{f}" for f in os.listdir(f"{root}/{c}") if f.lower().endswith(kinds))
             for c in [*subfolders(root), "."]}
    classes = tuple(c for c in found if found[c] and c != ".") or (".",)
    names = [f for c in classes for f in found[c]]
    require(names, f"{root}: no {modality} images ({' '.join(kinds)}) in it or its folders")
    labels = [np.uint8([[f.split("/")[0] == c != "." for c in classes]]) for f in names]
    size = read_image(f"{root}/{names[0]}", modality, None, order).shape[1]
    decode = partial(read_image, modality=modality, size=size, order=order)
    return Scenes([Path(f).stem for f in names], [[f"{root}/{f}"] for f in names], labels, classes,
                  modality, size, decode, views)


EUROSAT_CLASSES = set("AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture "
                      "PermanentCrop Residential River SeaLake".split())


def EuroSAT(root, modality="s2c", views=2):
    """EuroSAT [2], unpacked: s2c (13-band tif, B8A last in the file), rgb (jpg), s1 (SAR, tif)."""
    order = [*range(8), 12, *range(8, 12)] if modality == "s2c" else None
    return Folder(root, modality, views, order)


BEN_TOP = {"s1": {"BigEarthNet-S1-v1.0", "BigEarthNet-S1", "S1"}}           # v1, v2, short
BEN_TOP["s2a"] = BEN_TOP["s2c"] = {"BigEarthNet-v1.0", "BigEarthNet-S2", "S2"}
# 19 classes | with their CORINE labels; the last group has no class
BEN = """Urban fabric|Continuous urban fabric|Discontinuous urban fabric;Industrial or commercial
    units;Arable land|Non-irrigated arable land|Permanently irrigated land|Rice fields;Permanent
    crops|Vineyards|Fruit trees and berry plantations|Olive groves|Annual crops associated with
    permanent crops;Pastures;Complex cultivation patterns;Land principally occupied by agriculture,
    with significant areas of natural vegetation;Agro-forestry areas;Broad-leaved forest;Coniferous
    forest;Mixed forest;Natural grassland and sparsely vegetated areas|Natural grassland|Sparsely
    vegetated areas;Moors, heathland and sclerophyllous vegetation|Moors and heathland|
    Sclerophyllous vegetation;Transitional woodland, shrub|Transitional woodland/shrub;Beaches,
    dunes, sands;Inland wetlands|Inland marshes|Peatbogs;Coastal wetlands|Salt marshes|Salines;
    Inland waters|Water courses|Water bodies;Marine waters|Coastal lagoons|Estuaries|Sea and ocean;
    Road and rail networks and associated land|Port areas|Airports|Mineral extraction sites|Dump
    sites|Construction sites|Green urban areas|Sport and leisure facilities|Bare rock|Burnt areas|
    Intertidal flats"""
BEN = [[" ".join(x.split()) for x in row.split("|")] for row in BEN.split(";")]


def read_patch(folder, modality, scale=to_uint8):
    """A patch of BigEarthNet -> uint8 (C,120,120); s2c: L2A with a plane of zeros for B10."""
    kind = ("s1", "s1") if modality == "s1" else ("s2a", "ben")
    x = read_product(folder, kind[0], 120, f"{Path(folder).name}_", kind[1], scale)
    return np.insert(x, 10, 0, 0) if modality == "s2c" else x


def BigEarthNet(root, split=None, modality="s2a", views=2, skip=False):
    """BigEarthNet [3], v1 or v2; s1, s2a, or s2c as SSL4EO-S12 probes 13-band networks: B10 is 0.

    split: a file for `listed`, or a part of v2 (train, ...); None: all patches.  v2's labels lie in
    root/metadata.csv (README, Probing).  19 classes; zeros if the CORINE labels belong to none.
    """
    top = [f for f in subfolders(root) if f in BEN_TOP.get(modality, ())]
    require(top, f"{root}: no BigEarthNet folder for modality {modality}")
    meta, key = Path(root, "metadata.csv"), "s1_name" if modality == "s1" else "patch_id"
    v2 = meta.exists()
    table = csv.DictReader(read_text(meta).splitlines() if v2 else ())
    table = {row.get(key) or "": row for row in table}
    have = {p.name: p for p in sorted(Path(root, top[0]).glob("S*/S*" if v2 else "S*"))}
    names = [name for name, r in table.items() if split in (None, r.get("split"))]
    names = listed(split or meta, have, skip, names) if split or v2 else [*have]
    columns, rows = {label: k for k, row in enumerate(BEN) for label in row}, []
    for name in names:
        with named(meta if v2 else have[name], f"no BigEarthNet labels of {name}"):
            found = table[name]["labels"].split(";") if v2 else json.loads(
                read_text(have[name] / f"{name}_labels_metadata.json"))["labels"]
            rows.append(multi_hot([{columns[label] for label in found}], len(BEN) - 1))
    files, classes = [[str(have[name])] for name in names], tuple(row[0] for row in BEN[:-1])
    decode = partial(read_patch, modality=modality)
    return Scenes(names, files, rows, classes, modality, 120, decode, views)


def listed(path, have, skip=False, names=()):
    """`names`, or those in the file `path`, one a line (of `a,b` the one in `have`); one that
    `have` lacks is a ValueError, or with `skip` passed over."""
    lines = [[Path(n).stem for n in x.split(",")] for x in names or read_text(path).split()]
    found = [next((n for n in line if n in have), None) for line in lines]
    gone = [line[0] for line, n in zip(lines, found) if n is None]
    require(skip or not gone, f"{path}: {len(gone)} of {len(lines)} images are not there: "
                              f"{', '.join(gone[:5])}")
    return [n for n in found if n]


def open_data(root, modality, labels=None, views=2):
    """The reader that fits what lies in `root`.  labels: a json (an SSL4EO-S12 tree's own is found)
    or "classes", those of class folders; else the images have none.  Packed ones bring theirs."""
    folders, own = {*subfolders(root)}, f"{root}/ssl4eo_multilabel.json"
    if os.path.exists(f"{root}/images.uint8"):
        return Packed(root, modality, views, labels)
    products = bool(folders & {*PRODUCTS})
    require(not labels or products != (labels == "classes"),
            f"--labels {labels}: {root} holds {'products' if products else 'classes'}")
    if products:
        return SSL4EO(root, modality, labels or (own if os.path.exists(own) else None), views)
    ben = folders & set().union(*BEN_TOP.values())
    reader = BigEarthNet if ben else EuroSAT if folders <= EUROSAT_CLASSES else Folder
    scenes = reader(root, modality=modality, views=views)
    scenes.labels = [y * (labels == "classes") for y in scenes.labels]
    return scenes


# -------------------------------------------------------------------------- packing and checking


def pack(scenes, out, workers=0):
    """All images of `scenes`, as read, in one file: out/images.uint8 (n,C,H,W), scene by scene.

    out/index.jsonl: the CRC-32 of its second line; all else that Packed gives back.  `out` appears
    when it is whole.  Until then the file grows, image by image, in out.part{...}, named by what
    goes in: after a kill the same call cuts off half an image and goes on from there.
    """
    require(not os.path.exists(out), f"{out}: exists; pack never overwrites")
    index = {k: getattr(scenes, k) for k in ("modality", "size", "classes", "ids")}
    index = json.dumps(index | {"labels": [y.tolist() for y in scenes.labels]}).encode()
    part = f"{os.path.normpath(out)}.part{zlib.crc32(index + repr(scenes.files).encode()):08x}"
    os.makedirs(part, exist_ok=True)
    with open(f"{part}/images.uint8", "ab") as file:
        with named(part, "another process is writing it"):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        done, cut = divmod(file.tell(), len(BANDS[scenes.modality]) * scenes.size ** 2)
        file.truncate(file.tell() - cut)
        files = [f for row in scenes.files for f in row][done:]
        for x in in_parallel(scenes.decode, files, workers, f"packing {out}"):
            file.write(np.ascontiguousarray(x))
        file.flush()
        os.fsync(file.fileno())
        Path(part, "index.jsonl").write_bytes(b"%d\n%b" % (zlib.crc32(index), index))
        os.rename(part, out)


def Packed(root, modality, views=2, labels=None):
    """What `pack` wrote; image() gives views of the file, mapped into memory and not read ahead."""
    path = f"{root}/images.uint8"
    crc, _, index = Path(root, "index.jsonl").read_bytes().partition(b"\n")
    require(crc == b"%d" % zlib.crc32(index), f"{root}/index.jsonl: damaged, its checksum differs")
    index = json.loads(index)
    require(not labels and modality == index["modality"],
            f"{root}: packed with its labels, for --modality {index['modality']} only")
    rows, n = [np.uint8(y) for y in index["labels"]], os.path.getsize(path)
    ends = np.cumsum([0, *map(len, rows)]).tolist()
    files = [range(*at) for at in zip(ends, ends[1:])]
    shape = ends[-1], len(BANDS[modality]), index["size"], index["size"]
    require(n == np.prod(shape), f"{path}: {n} bytes, but {shape} pixels make {np.prod(shape)}")
    memory = np.memmap(path, np.uint8, "r", shape=shape)
    return Scenes(**index | {"labels": rows}, files=files, decode=memory.__getitem__, views=views,
                  memory=memory)


def complaint(decode, file):
    """What is wrong with an image, a line for each bad file, or nothing."""
    try:
        decode(file)
    except (ValueError, OSError) as error:
        return f"{error}\n"
    return ""


def moments(x, name):
    """C bands (H,W) in the sensor's units -> (C,8): mean, mean square, min, max, the shares below
    and above what to_uint8 keeps, and the mean and std that STATS[name] has."""
    x, (mean, std) = np.float64(x).reshape(len(x), -1).T, np.float64(STATS[name])      # (HW,C)
    return np.stack([x.mean(0), (x * x).mean(0), x.min(0), x.max(0), (x < mean - 2 * std).mean(0),
                     (x > mean + 2 * std).mean(0), mean, std], 1)


def statistics(scenes, workers=0):
    """As `moments`, over all images, and the std where the mean square was."""
    require(scenes.memory is None and scenes.modality != "rgb",
            "rgb and packed images have no sensor units")
    job, files = partial(scenes.decode, scale=moments), [f for row in scenes.files for f in row]
    x = np.stack([*in_parallel(job, files, workers, "statistics")])                    # (n,C,8)
    mean, square, _, _, *rest = x.mean(0).T                                            # (C,) each
    std = np.sqrt((square - mean ** 2).clip(0))
    return np.stack([mean, std, x[..., 2].min(0), x[..., 3].max(0), *rest], 1)


# --------------------------------------------------------------------------------- augmentation


def draw_crops(n, generator, area_min=0.2, area_max=1.0):
    """Where n views look, one float each, on the CPU; replaying them gives the same pixels.

    Share of the image's area U(area_min, area_max), aspect log-uniform in [3/4, 4/3], position,
    flips both ways.  [SSL4EO-S12 pretrain_moco_v2_s2c.py; PerA; vertical flip in SoftCon: ours]
    """
    u = torch.rand(6, n, generator=generator)
    area, aspect = area_min + (area_max - area_min) * u[0], (4 / 3) ** (2 * u[1] - 1)
    h, w = (area / aspect).sqrt().clamp(max=1), (area * aspect).sqrt().clamp(max=1)
    return {"h": h, "w": w, "y": (1 - h) * (2 * u[2] - 1), "x": (1 - w) * (2 * u[3] - 1),
            "flip_x": 1 - 2 * (u[4] < 0.5).float(), "flip_y": 1 - 2 * (u[5] < 0.5).float()}


def draw_colours(n, modality, generator, p=0.8, jitter=0.4, grey=0.2, blur=0.5):
    """In what light n views are seen; with probability p each is jittered:

        optical  brightness and contrast U(1 - jitter, 1 + jitter)
        rgb      also saturation U(1 -+ jitter/2) and hue, a turn of up to jitter/4
        radar    decibels are no brightness: VV and VH offset by up to 5 jitter dB, each its own

    grey: probability that all bands become their mean; blur: of std U(.1, 2) pixels at 224.
    [SSL4EO-S12 pretrain_moco_v2_s2c.py; DeCUR for SAR; PerA augmentation.py; dB offset: ours]
    """
    u, radar, rgb = torch.rand(9, n, generator=generator), modality in RADAR, modality == "rgb"
    swing = jitter * (2 * u[[1, 2, 3, 4, 8]] - 1) * (u[0] < p)                        # (5,n)
    return {"brightness": 1 + swing[0] * (not radar), "contrast": 1 + swing[1] * (not radar),
            "offset": 5 * swing[[0, 4]].T * (0.25 / torch.tensor(STATS[modality][1])) if radar
            else torch.zeros(n, 1),                                  # the range [0,1] is 4 std wide
            "saturation": torch.where(u[5] < grey, 0, 1 + rgb * swing[2] / 2),
            "hue": rgb * swing[3] / 4, "blur": torch.where(u[6] < blur, 0.1 + 1.9 * u[7], 0)}


def crop(x, p, size):
    """uint8 (n,C,H,W) and what draw_crops drew -> float (n,C,size,size) in [0,1], on x's device.

    Crop, resize and flip are one bilinear sampling; nothing loops over images.
    """
    p = {k: v.to(x.device, non_blocking=True) for k, v in p.items()}
    zero = torch.zeros_like(p["x"])
    theta = torch.stack([p["w"] * p["flip_x"], zero, p["x"], zero, p["h"] * p["flip_y"], p["y"]], 1)
    grid = F.affine_grid(theta.view(-1, 2, 3), [*x.shape[:2], size, size], align_corners=False)
    return F.grid_sample(x.float(), grid, padding_mode="border", align_corners=False).div_(255)


def colour(x, p):
    """float (n,C,H,W) in [0,1] and what draw_colours drew -> the same in that light."""
    blurred, tinted = p["blur"].nonzero()[:, 0], (p["saturation"] != 1).any()  # known on the CPU
    reach = int(np.ceil(3 * float(p["blur"].max()) * x.shape[-1] / 224))
    p = {k: v.to(x.device, non_blocking=True).view(len(x), -1, 1, 1) for k, v in p.items()}
    mean = x.mean((2, 3), keepdim=True) * p["brightness"] + p["offset"]        # then contrast, as
    x = torch.addcmul(mean + (p["offset"] - mean) * p["contrast"], x,          # one product
                      p["brightness"] * p["contrast"]).clamp_(0, 1)
    mean = x.mean(1, keepdim=True)
    x = torch.lerp(mean, x, p["saturation"]) if tinted else x
    if x.shape[1] == 3:                                              # turn about the grey axis
        side = (x.roll(1, 1) - x.roll(-1, 1)) / 3 ** 0.5
        turn = 2 * torch.pi * p["hue"]
        x = (mean + turn.cos() * (x - mean) + turn.sin() * side).clamp(0, 1)
    if len(blurred):                                              # down, then across, over +- 3 std
        n, C, size, rows = len(blurred), *x.shape[1:3], blurred.to(x.device)
        at = torch.arange(-reach, reach + 1, device=x.device).view(-1, 1)      # (taps, 1)
        std = (p["blur"][rows] * size / 224).clamp_min(1e-3)
        K = (-(at / std).square() / 2).softmax(2).repeat_interleave(C, 0)      # (nC, 1, taps, 1)
        y = F.pad(x[rows], (reach,) * 4, mode="replicate").flatten(0, 1)[None]   # (1, nC, ., .)
        y = F.conv2d(F.conv2d(y, K, groups=n * C), K.mT, groups=n * C)         # (1, nC, size, size)
        x = x.index_copy(0, rows, y.view(n, C, size, size))
    return x


# ---------------------------------------------------------------------------------------- picture


def show(scenes, out, losses, seed=0, n=4, grid=8):
    """Write to `out` (PNG) what the model sees of n scenes, a row each, drawn with `seed`.

    Left to right: all seasons | SoftCon's two views (full-size augmentation) | view 1 as SoftCon
    masks it (dark: dropped) and as PerA does (blue: the student's patches, yellow: to guess, red:
    the teacher's) | labels of both views, a line a class | label similarity of view 1 to each
    row's view 2, black 0, white 1.
    losses: that module, an argument because this one imports nothing of ours.
    """
    import imagecodecs
    rows = np.random.default_rng(seed).permutation(len(scenes))[:n].tolist()
    g, m, n = torch.Generator().manual_seed(seed % 2 ** 63), scenes.modality, len(rows)
    T, eye = 96 // scenes.size * scenes.size or 96, COLOURS[m]             # T: side of an image

    def tiles(x):                                                          # (.,.,h,w) -> (.,.,T,T)
        return F.interpolate(x.float(), (T, T), mode="area")
    seasons = torch.full((n, max(len(scenes.files[i]) for i in rows), 3, T, T), torch.nan)
    for row, i in zip(seasons, rows):
        x = np.stack([scenes.image(*pair)[eye] for pair in scenes.pairs([i])])
        row[:len(x)] = tiles(torch.from_numpy(x)) / 255
    x, y = map(torch.from_numpy, scenes[[(i, (seed, i)) for i in rows]])   # (n,2,C,H,W), (n,2,L)
    p = draw_crops(2 * n, g) | draw_colours(2 * n, m, g, 0.8 * (m not in RADAR))
    views = colour(crop(x.flatten(0, 1), p, scenes.size), p)[:, eye]       # (2n,3,H,W)
    views = tiles(views).view(n, 2, 3, T, T)

    def painted(parts, tints):
        """View 1, dark but for the patches of each part (n,m), which get its tint."""
        image, out = views[:, 0], torch.full((n, 3, T, T), 0.15)
        for part, tint in zip(parts, tints):
            mask = torch.zeros(n, grid ** 2).scatter(1, part, 1).view(n, 1, grid, grid)
            out = torch.where(tiles(mask) > 0.5, (image + tint) / 2, out)
        return out
    tints = torch.tensor([[0.1, 0.4, 1], [1, 0.9, 0.1], [0.9, 0.1, 0.2]]).view(3, 3, 1, 1)
    masks = torch.stack([painted([losses.block_mask(n, (grid, grid), 0.3, g)], [views[:, 0]]),
                         painted(losses.disjoint_masks(n, grid ** 2, generator=g), tints)], 1)
    sets = tiles(y.mT[:, None]).expand(n, 3, T, T)[:, None]                # (n,1,3,T,T)
    alike = losses.label_similarity(*y.unbind(1)).view(n, n, 1, 1, 1).expand(n, n, 3, T, T)
    groups = [F.pad(v, (2, 2, 2, 2), value=torch.nan).permute(0, 3, 1, 4, 2).flatten(2, 3)
              .flatten(0, 1) for v in (seasons, views, masks, sets, alike)]              # (H,W,3)
    x = torch.cat([F.pad(v, (0, 0, 4, 4), value=torch.nan) for v in groups], 1)
    x = torch.where(x.isnan(), torch.tensor([0.7, 0.85, 1]), x)            # the paper: light blue
    with named(out, "not written", "its folder is gone"):
        Path(out).write_bytes(imagecodecs.png_encode((255 * x).round().byte().numpy(), level=9))


# ------------------------------------------------------------------------------------- toy world

# of each class: reflectance x 10000 in the 13 bands, backscatter VV and VH in dB
LAND = np.float32([
    [1300, 1000, 800, 550, 450, 350, 320, 280, 260, 120, 10, 120, 80, -19, -26],
    [1220, 880, 800, 520, 850, 1850, 2200, 2150, 2350, 800, 14, 1200, 550, -9.5, -14.5],
    [1330, 1080, 1120, 900, 1500, 2550, 2950, 2850, 3050, 980, 18, 2250, 1250, -13, -20],
    [1290, 1020, 900, 680, 850, 1400, 1600, 1550, 1650, 550, 12, 750, 400, -9, -18.5],
    [1380, 1130, 1180, 950, 1600, 3000, 3900, 3800, 4000, 1150, 20, 1900, 1000, -11.5, -17],
    [1420, 1200, 1180, 1250, 1600, 2050, 2250, 2200, 2450, 880, 21, 2700, 1950, -12, -18.5],
    [1800, 1720, 1680, 1750, 1850, 1950, 2000, 2050, 2100, 780, 25, 2100, 1900, -5, -12],
    [1700, 1560, 1680, 2100, 2450, 2600, 2700, 2700, 2900, 900, 26, 3500, 3100, -15, -23],
    [4200, 4000, 3900, 3900, 3800, 3600, 3500, 3400, 3300, 1300, 60, 800, 600, -13, -19]])
SPECTRA, BACKSCATTER = LAND[:, :13], LAND[:, 13:]
SOIL, GREEN = SPECTRA[7], SPECTRA[1:6]                               # vegetation fades to the first


def smooth(rng, size, scale):
    """Gaussian random field (size,size), mean 0, unit variance, correlated over `scale` pixels."""
    f = np.fft.fftfreq(size)
    decay = np.exp(-2 * (np.pi * scale) ** 2 * (f[:, None] ** 2 + f[:size // 2 + 1] ** 2))
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((size, size))) * decay, (size, size))
    return ((field - field.mean()) / (field.std() + 1e-9)).astype(np.float32)


def textures(rng, size):
    """(9,size,size), unit variance: what tells the classes apart where spectra do not."""
    y, x = np.mgrid[:size, :size].astype(np.float32)

    def waves(period, bend):
        a = rng.uniform(0, np.pi)
        return np.sin(2 * np.pi * (x * np.cos(a) + y * np.sin(a)) / period + bend)
    fields = np.where(smooth(rng, size, 4) > 0, waves(rng.uniform(4, 6), 0),
                      waves(rng.uniform(4, 6), 0))
    block = rng.integers(5, 8)
    houses = rng.standard_normal((size, size)).astype(np.float32)
    houses = np.kron(houses[::block, ::block], np.ones((block, block)))[:size, :size]
    streets = (x % block < 1) | (y % block < 1)
    t = [smooth(rng, size, 1), smooth(rng, size, 1.2), smooth(rng, size, 5),
         np.sign(smooth(rng, size, 2.5)), fields, smooth(rng, size, 0.8) > 1.3,
         np.where(streets, -1.5, houses), waves(rng.uniform(8, 12), 2 * smooth(rng, size, 6)),
         smooth(rng, size, 8)]
    t = np.stack(t).astype(np.float32)
    return (t - t.mean((1, 2), keepdims=True)) / (t.std((1, 2), keepdims=True) + 1e-6)


def toy_scene(seed, i, size):
    """Toy scene i, season by season: s2 (13,H,W) uint16, s1 (2,H,W) float32, labels."""
    rng = np.random.default_rng([seed, i])
    cold, wet, town = rng.uniform(0, 1, 3)
    likely = np.array([wet, 1, 1, 0.8 * wet, 1, 1 - wet / 2, town, 1 - wet, cold - 0.15]) + 0.15
    present = rng.choice(9, rng.integers(3, 6), replace=False, p=likely / likely.sum())
    score = np.stack([smooth(rng, size, size / 10) for _ in present])
    score += rng.normal(0, 0.6, (len(present), 1, 1))
    summer = present[score.argmax(0)]                                # (H,W) class of each pixel
    relief, t = smooth(rng, size, size / 8), textures(rng, size)
    level = np.exp(rng.normal(0, 0.1, (9, 1)) + rng.normal(0, 0.05, (9, 13)))
    level_db = rng.normal(0, 1.5, (9, 2))
    amplitude = np.array([0.1, 1, 1, 1, 1, 1, 1.2, 0.8, 0.3]) * rng.uniform(0.6, 1.4, 9)
    for season in range(4):                                          # from winter to autumn
        cover = summer.copy()
        cover[(relief > 1.8 - cold) & (cover > 0) & (season == 0)] = 8
        cover[(relief < -1.2) & (cover == 2) & (season == 1)] = 3    # meadows flood in spring
        cover[(relief > 0.7) & (cover == 4) & (season == 3)] = 7     # harvested
        gain_band = np.exp(rng.normal(0, 0.1, (13, 1, 1)))           # the sensor's
        leaf = np.clip((0.35, 0.8, 1, 0.6)[season] + rng.normal(0, 0.1), 0, 1)
        spectra = SPECTRA.copy()
        spectra[1:6] = leaf * GREEN + (1 - leaf) * (0.5 * SOIL + 0.5 * GREEN)
        texture = np.take_along_axis(t, cover[None], 0)[0] * amplitude[cover]
        s2 = (spectra * level)[cover].transpose(2, 0, 1) * np.exp(0.3 * texture - 0.05)
        haze = rng.uniform(0, 600) * np.exp(-np.arange(13) / 4)[:, None, None]
        slope = smooth(rng, size, size / 7)                          # hills lit from one side
        s2 = s2 * np.exp(rng.uniform(-0.4, 0.4) * slope) * rng.uniform(0.6, 1.4) * gain_band + haze
        cloud = np.clip(2 * smooth(rng, size, size / 10) - 1.5, 0, 1) * (rng.random() < 0.4)
        s2 += cloud * (np.where(np.arange(13) == 10, 400, 6000)[:, None, None] - s2)
        s2 += rng.normal(0, 20, s2.shape)
        s1 = (BACKSCATTER + level_db)[cover].transpose(2, 0, 1) + 4 * texture
        s1 += rng.normal(0, 1.5, (2, 1, 1)) + rng.uniform(-2, 2) * slope  # calibration, incidence
        s1 += 10 * np.log10(rng.gamma(12, 1 / 12, s1.shape))           # speckle of 12 looks
        area = np.bincount(cover.ravel(), minlength=9) / cover.size
        labels = np.flatnonzero(area > 0.03) if rng.random() > 0.08 else []       # unlabelled
        s2 = np.clip(np.rint(s2), 0, 65535).astype(np.uint16)
        yield s2, s1.astype(np.float32), [str(c) for c in labels]


def write_toy_scene(i, root, size, seed):
    """Write scene i as an SSL4EO-S12 v1.0 tree; returns its entry of the labels json."""
    entry = {}
    for season, (s2, s1, labels) in enumerate(toy_scene(seed, i, size)):
        day = f"2020{1 + 3 * season:02d}{1 + i % 28:02d}"
        name = f"{day}T054639_{day}T054831_T43RCP"
        radar = f"S1A_IW_GRDH_1SDV_{day}T010203_{day}T010228_032911_03CFF0_9BAF"
        entry[name] = labels
        for m, product, bands in (("s2c", name, s2), ("s1", radar, s1)):
            folder = f"{root}/{m}/{i:07d}/{product}"
            os.makedirs(folder)
            for x, (band, k) in zip(bands, SHRINK[m].items()):
                x = x.reshape(size // k, k, size // k, k).mean((1, 3)).astype(x.dtype)
                tags = [(33550, "d", 3, (10 * k / 111320,) * 2 + (0,), True),   # GeoTIFF: EPSG:4326
                        (33922, "d", 6, (0, 0, 0, 0.1 * (i % 1000), 45, 0), True),
                        (34735, "H", 12, (1, 1, 0, 2, 1024, 0, 1, 2, 2048, 0, 1, 4326), True)]
                with named(f"{folder}/{band}.tif", "not written"):
                    tifffile.imwrite(f"{folder}/{band}.tif", x, metadata=None, extratags=tags)
    return f"{i:07d}", entry


def make_toy(root, scenes=2000, size=36, seed=0, workers=os.cpu_count()):
    """A procedural world as a real SSL4EO-S12 v1.0 tree: root/{s1,s2c} and the ML labels json.

    Nine classes with spectra, backscatter and texture of their own, four seasons; illumination,
    haze, sensor gain, cloud and speckle hide what a mean and a std could tell.  size: pixels of the
    10 m bands, a multiple of 6.  Appears whole or not at all; one that is there is left alone.
    """
    root = os.path.normpath(root)
    what = json.dumps({"scenes": scenes, "size": size, "seed": seed, "version": 1})
    if os.path.exists(f"{root}/toy.json") and read_text(f"{root}/toy.json") == what:
        return root
    require(not os.path.exists(root), f"{root}: exists and is not the toy world {what}; "
            f"delete it, or name it with --data")
    require(size % 6 == 0 and size >= 12 and scenes > 0,
            f"toy world of {scenes} scenes of {size} pixels: size is a multiple of 6, >= 12")
    part = f"{root}.part{os.getpid()}"
    os.makedirs(part)
    try:
        job = partial(write_toy_scene, root=part, size=size, seed=seed)
        entries = dict(in_parallel(job, range(scenes), workers, f"toy world {root}"))
        Path(part, "ssl4eo_multilabel.json").write_text(json.dumps(entries))
        Path(part, "toy.json").write_text(what)
        os.rename(part, root)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return root


# --------------------------------------------------------------------------------- command line

READ = "root --modality --labels "
COMMANDS = {
    "toy": ("write the toy world as an SSL4EO-S12 v1.0 tree", "root --scenes --size --seed"),
    "pack": ("put all images into one file, which --data takes as well", READ + "out --workers"),
    "check": ("read everything, list every bad file", READ + "--workers"),
    "stats": ("what STATS would be, and how much of it is clipped", READ + "--workers"),
    "show": ("draw what the model sees: seasons, views, masks, similarity", READ + "--out --seed")}
FLAGS = {
    "root": {"help": "any folder that pretrain.py's --data takes; toy: a new one"},
    "out": {"help": "a new folder"}, "--out": {"help": "a PNG", "required": True},
    "--modality": {"choices": BANDS, "required": True}, "--labels": {"help": "as in pretrain.py"},
    "--workers": {"type": int, "default": os.cpu_count(), "help": "processes"},
    "--scenes": {"type": int, "default": 2000, "help": "locations, four seasons each"},
    "--size": {"type": int, "default": 36, "help": "pixels of a 10 m band; multiple of 6"},
    "--seed": {"type": int, "default": 0, "help": "another seed, another world or draw"}}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (text, flags) in COMMANDS.items():
        sub = commands.add_parser(name, help=text)
        for flag in flags.split():
            sub.add_argument(flag, **FLAGS[flag])
    args = parser.parse_args(argv)
    if args.command == "toy":
        make_toy(args.root, args.scenes, args.size, args.seed)
        return False
    scenes = open_data(args.root, args.modality, args.labels)
    files, bad = [f for row in scenes.files for f in row], []
    what = f"{len(files)} images of {len(scenes)} scenes"
    if args.command == "pack":
        pack(scenes, args.out, args.workers)
        print(f"{args.out}: {what}")
    elif args.command == "show":
        show(scenes, args.out, importlib.import_module("losses"), args.seed)   # here alone: masks
        print(f"{args.out}: {what}")
    elif args.command == "check":
        job = partial(complaint, scenes.decode)
        bad = "".join(in_parallel(job, files, args.workers, "checking")).splitlines()
        print(*bad, f"{args.root}: {what}, {len(bad)} bad files", sep="\n")
    else:
        print("band      mean       std       min       max  below  above   STATS: mean       std")
        for band, x in zip(BANDS[args.modality], statistics(scenes, args.workers)):
            print(f"{band:4}" + ("{:10.2f}" * 4 + "{:7.2%}" * 2 + "{:13.2f}{:10.2f}").format(*x))
    return bool(bad)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: error: {plainly(error)}")
