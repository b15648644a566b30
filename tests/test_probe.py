"""Claims about probe.py: metrics, heads, features, which images, and what a whole probe says."""
import copy
import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch

import data
import model
import probe
from conftest import save_backbone, write_pack
from probe import PARTS


def make_pack(path, one_label=False, split=None, sensor="s1", scenes=40, unlabelled=0):
    """A pack by hand, two images of 24 px of each scene; each class is a brighter stripe."""
    rng = np.random.default_rng(0)
    bands = len(data.SENSORS[sensor].bands)
    x = rng.integers(0, 180, (2 * scenes, bands, 24, 24), np.uint8)
    lines = []
    for n in range(2 * scenes):
        present = rng.random(3) < 0.5
        if one_label:
            present = np.arange(3) == n // 2 % 3
        for k in np.flatnonzero(present):
            x[n, k % bands, 8 * k:8 * k + 8] += np.uint8(5 + 5 * k)
        classes = ";".join(f"class {k}" for k in np.flatnonzero(present) if n >= unlabelled)
        lines.append(f"place{n // 2},place{n // 2}/{n}.tif,{split[n] if split else ''},{classes}")
    return write_pack(path, x, lines, {"sensor": sensor})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of packs, whose images have several labels or one, of networks and of lists."""
    folder = tmp_path_factory.mktemp("world")
    make_pack(folder / "several")
    make_pack(folder / "single", one_label=True)
    make_pack(folder / "unlabelled", scenes=3, unlabelled=6)
    make_pack(folder / "optical", scenes=3, sensor="s2c")
    save_backbone(folder / "resnet.pt", "resnet18", 2, seed=5)
    for seed in (0, 1):
        save_backbone(folder / f"vit{seed}.pt", "vit_tiny", 2, 24, 6, seed=seed)
    weights = torch.load(folder / "vit0.pt", weights_only=True)
    torch.save(weights | {"norm.bias": torch.full((192,), math.nan)}, folder / "nan.pt")
    names = data.open_pack(folder / "several").scenes
    trained = data.held_out(names, 0.4).argmin()               # a place that a run trained on
    (folder / "some.txt").write_text(names[trained])
    (folder / "rest.txt").write_text(" ".join(names[:trained] + names[trained + 1:]))
    (folder / "none.txt").write_text("nobody")
    return folder


@pytest.fixture
def here(world, monkeypatch):
    """The same folder, as the one in which the probe runs; no run has left anything in it."""
    monkeypatch.chdir(world)
    yield world
    (world / "config.json").unlink(missing_ok=True)


def write_config(pack, bands=("VV", "VH"), by_split=False, **flags):
    """The config.json that a run on a pack leaves beside its checkpoint."""
    config = {"flags": {"img_size": 24, "holdout": 0.4} | flags, "sensor": {"bands": bands},
              "pack": {"path": pack, "checksum": data.open_pack(pack).checksum,
                       "by_split": by_split}}
    with open("config.json", "w") as file:
        json.dump(config, file)


def splits_of(pack, *flags, runs=None):
    """What choose_splits decides for a released checkpoint, or for {ckpt: Run}."""
    args = probe.resolve_flags(["--ckpt", "b.pt", *flags])
    pack = data.open_pack(pack)
    scene = probe.scene_of_rows(pack)
    return probe.choose_splits(args, pack, scene, runs or {"b.pt": None}), pack, scene


def blobs(n=200, d=10):
    """Three overlapping clouds of points: x (n,d) and their classes y (n,3) one-hot."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, n)
    x = rng.standard_normal((n, d)) + 2 * np.eye(3, d)[kind]
    return torch.from_numpy(x).float(), torch.from_numpy(np.eye(3, dtype=np.uint8)[kind])


# ----------------------------------------------------------------------------------------- metrics


def ap_by_definition(scores, targets):
    """Walk the distinct thresholds from high to low."""
    total = 0.0
    recall = 0.0
    for threshold in sorted(set(scores), reverse=True):
        hits = [y for s, y in zip(scores, targets) if s >= threshold]
        new_recall = sum(hits) / sum(targets)
        total += (new_recall - recall) * sum(hits) / len(hits)
        recall = new_recall
    return total


def test_average_precision_is_its_definition_with_ties_and_empty_classes_in_any_number_type():
    """Many ties, as whole numbers of some type, in every second trial."""
    rng = np.random.default_rng(0)
    kinds = [np.uint8, np.int64, np.float16, lambda x: torch.from_numpy(x).bfloat16()]
    for trial in range(1000):
        n, c = rng.integers(1, 12), rng.integers(1, 5)
        targets = rng.random((n, c)) < rng.choice([0.1, 0.5, 1.0])
        scores = rng.standard_normal((n, c))
        if trial % 2:
            scores = kinds[trial // 2 % 4](rng.integers(0, 4, (n, c)))
        rankings = {"micro": [(scores.ravel(), targets.ravel())],
                    "macro": list(zip(scores.T, targets.T))}
        for average, pairs in rankings.items():
            values = [ap_by_definition(s.tolist(), t.tolist()) for s, t in pairs if t.any()]
            want = np.mean(values) if values else 0
            assert abs(probe.average_precision(scores, targets, average) - want) < 1e-12


def test_bootstraps_are_paired_and_as_wide_as_the_binomial_says():
    rng = np.random.default_rng(0)
    y = np.eye(2)[rng.integers(0, 2, 300)]
    noisy = y + rng.normal(0, 0.6, y.shape)
    scores = {"noisy": noisy, "same": noisy + 1e-9, "perfect": y}
    intervals, gains = probe.print_intervals(probe.bootstrap(probe.accuracy, scores, y, 200))
    assert gains["same"] == [0, 0] and gains["perfect"][1] < 0
    assert list(gains) == ["same", "perfect"] and intervals["perfect"] == [1, 1]
    p = probe.accuracy(noisy, y)
    low, high = intervals["noisy"]
    assert low < p < high
    assert abs((high - low) - 3.92 * np.sqrt(p * (1 - p) / 300)) < 0.03


# ------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("D", [8, 70])                         # fewer columns than rows, and more
def test_ridge_is_least_squares_with_the_penalty_that_folds_of_whole_scenes_pick(D):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, D))
    y = (x[:, :3] + rng.standard_normal((40, 3)) > 0).astype(float)
    x_test = rng.standard_normal((5, D))
    scene = np.repeat(np.arange(10), 4)

    def fit(x, y, x_test, penalty):
        """Normal equations."""
        mean, std = x.mean(0), x.std(0)
        z = (x - mean) / std
        W = np.linalg.solve(z.T @ z + penalty * len(x) * np.eye(D), z.T @ (y - y.mean(0)))
        return (x_test - mean) / std @ W + y.mean(0)

    errors = np.zeros(len(probe.RIDGE_PENALTIES))
    for p, penalty in enumerate(probe.RIDGE_PENALTIES):
        for f in range(5):
            out = np.isin(scene, [f, f + 5])                   # whole scenes leave together
            errors[p] += ((fit(x[~out], y[~out], x[out], penalty) - y[out]) ** 2).sum()
    best = probe.RIDGE_PENALTIES[errors.argmin()]
    got = probe.cross_validated(probe.ridge, *map(torch.from_numpy, (x, y, x_test)), scene)
    assert np.allclose(got, fit(x, y, x_test, best), atol=1e-8)


def newton(z, y, penalty):
    """Probabilities at the minimum of the mean log loss of one class plus penalty / 2 |w|^2."""
    z = np.c_[z, np.ones(len(z))]
    ridge = penalty * np.diag([1.0] * (z.shape[1] - 1) + [0.0])                # free intercept
    w = np.zeros(z.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-z @ w))
        curvature = (z * (p * (1 - p))[:, None]).T @ z / len(z) + ridge
        w = w - np.linalg.solve(curvature, z.T @ (p - y) / len(z) + ridge @ w)
    return 1 / (1 + np.exp(-z @ w))


def test_logistic_of_several_labels_is_newtons_optimum_of_each_class():
    rng = np.random.default_rng(0)
    x = 3 + 5 * rng.standard_normal((80, 4))
    y = (x @ rng.standard_normal((4, 3)) + 8 * rng.standard_normal((80, 3)) > 0).astype(float)
    z = (x - x.mean(0)) / x.std(0)
    penalties = (1, 0.01)
    got = probe.logistic(*map(torch.from_numpy, (x, y, x)), False, penalties, 1e-5)
    for p, penalty in zip(got, penalties, strict=True):
        for k in range(3):
            assert np.allclose(p[:, k], newton(z, y[:, k], penalty), atol=1e-3)


def test_logistic_of_one_label_ends_where_the_gradient_of_the_softmax_loss_is_zero():
    x, y = blobs(60, 4)
    z = ((x - x.mean(0)) / x.std(0, correction=0)).double().numpy()
    fits = probe.logistic(x, y, x, True, accuracy=1e-6)
    for penalty, p in zip(probe.LOGISTIC_PENALTIES, fits.numpy(), strict=True):
        logits = np.log(p) - np.log(p).mean(1, keepdims=True)
        W, residual, *_ = np.linalg.lstsq(np.c_[z, np.ones(60)], logits, rcond=None)
        assert residual.max() < 1e-9                           # the logits are linear
        assert abs(z.T @ (p - y.numpy()) / 60 + penalty * W[:4]).max() < 1e-4
        assert np.allclose(p.mean(0), y.double().mean(0), atol=1e-4)           # free intercept


def test_torchgeo_bench_takes_the_c_with_the_best_validation_value_and_fits_both_parts(
        monkeypatch):
    monkeypatch.setattr(probe, "COSTS", np.logspace(-4, 1, 8))
    x, y = blobs(100)
    for validation in (y[50:75], y[50:75].roll(1, 1)):         # the second asks for another C
        values = []
        for C in probe.COSTS:
            [p] = probe.logistic(x[:50], y[:50], x[50:75], True, [1 / (C * 50)], 1e-5)
            values.append(probe.accuracy(p.numpy(), validation.numpy()))
        C = probe.COSTS[int(np.argmax(values))]
        both = torch.cat([y[:50], validation])
        [want] = probe.logistic(x[:75], both, x[75:], True, [1 / (C * 75)], 1e-7, 1000)
        got = probe.validated_logistic(x[:50], y[:50], x[50:75], validation, x[75:], True)
        assert np.allclose(got, want, atol=1e-5)


def test_knn_is_the_weighted_vote_of_its_definition():
    x, y = blobs()
    got = probe.knn(x[:150], y[:150], x[150:])
    unit = (x / x.norm(dim=1, keepdim=True)).double().numpy()
    for row, cosine in zip(got, unit[150:] @ unit[:150].T):
        near = np.argsort(-cosine)[:20]
        votes = np.exp((cosine[near] - 1) / 0.07)
        assert np.allclose(row, (votes[:, None] * y[near].numpy()).sum(0), rtol=1e-3)


@pytest.mark.parametrize("one_label, first_rate", [(True, 0.1), (False, 1.0)])
def test_copernicus_benchs_head_is_sgd_written_out(one_label, first_rate):
    """Plain gradients in float64, no momentum; the draws in their order: weights, epoch, views."""
    protocol = probe.PROTOCOLS["copernicus-bench"]
    x, y = blobs(150)
    views = torch.stack([x, x + 1, -x, 2 * x])                 # (V,n,D)
    draws = torch.Generator().manual_seed(3)
    W = torch.empty(3, 10).normal_(std=0.01, generator=draws).double()
    b = torch.zeros(3, dtype=torch.float64)
    step = 0
    for _ in range(50):
        for rows in torch.randperm(150, generator=draws).split(64):            # 3 steps an epoch
            z = views[torch.randint(4, (len(rows),), generator=draws), rows].double()
            logits = z @ W.T + b
            if one_label:
                error = (logits.softmax(1) - y[rows]) / len(rows)
            else:
                error = (logits.sigmoid() - y[rows]) / (len(rows) * 3)
            rate = first_rate * (1 + math.cos(math.pi * step / 150)) / 2
            W = W - rate * (error.T @ z + 1e-4 * W)
            b = b - rate * (error.sum(0) + 1e-4 * b)
            step += 1
    x_test = torch.cat([torch.eye(10), torch.zeros(1, 10)])
    got = probe.sgd(views, y, x_test, protocol, one_label, seed=3)
    assert torch.allclose(got.double(), torch.cat([W.T + b, b[None]]), atol=1e-4)


OF_IMAGES = {name: protocol for name, protocol in probe.PROTOCOLS.items() if name != "dense"}


@pytest.mark.parametrize("protocol", OF_IMAGES.values(), ids=OF_IMAGES)
def test_every_head_learns_and_the_labels_of_test_images_have_no_say(protocol):
    x, y = blobs()
    y = y.numpy()
    split = np.repeat(PARTS, (100, 50, 50))
    features = x.half().expand(len(protocol.views), -1, -1)
    changed = np.concatenate([y[:150], np.roll(y[150:], 1, 1)])
    scores, same = [probe.fit_head(protocol, features, labels, np.arange(200), split, True, 0,
                                   "cpu") for labels in (y, changed)]
    assert np.array_equal(scores, same)
    assert probe.accuracy(scores, y[150:]) > 0.75


# ---------------------------------------------------------------------------------------- features


def test_a_vits_features_are_the_tokens_that_their_names_say():
    net = model.build("vit_tiny", 2, 24, 6, 3).eval()          # three registers
    x = torch.rand(2, 2, 24, 24)
    with torch.no_grad():
        patches = net.tokens(x)[:, 4:]
        cls = []
        for depth in (9, 10, 11, 12):
            shallow = copy.deepcopy(net)
            shallow.blocks = shallow.blocks[:depth]
            cls.append(shallow(x))
        want = {"cls": cls[3], "mean": patches.mean(1), "4cls": torch.cat(cls, 1),
                "cls+mean": torch.cat([cls[3], patches.mean(1)], 1)}
        for feature in probe.ANY_FEATURE:
            assert torch.allclose(probe.describe(net, x, feature), want[feature], atol=1e-5)


def test_copernicus_bench_clips_radar_alone_to_the_quantiles_of_each_image_and_band(world):
    pack = data.open_pack(world / "several")
    protocol = probe.PROTOCOLS["copernicus-bench"]
    x = torch.randint(0, 256, (3, 2, 50, 50), dtype=torch.uint8)
    low, high = np.quantile(x.numpy(), (0.01, 0.99), axis=(2, 3), keepdims=True)
    clipped = probe.to_network(x, 0, probe.choose_scaling(protocol, pack, []))
    assert np.allclose(clipped, np.clip(x.numpy(), low, high) / 255, atol=1e-5)
    assert not probe.choose_scaling(probe.PROTOCOLS["ridge"], pack, []).clip
    pack.sensor = data.SENSORS["s2c"]
    assert not probe.choose_scaling(protocol, pack, []).clip


def test_z_scores_have_mean_zero_and_deviation_one_over_the_images_of_the_probe(world):
    pack = data.open_pack(world / "several")
    rows = np.arange(3, 75)                                    # more than one batch
    scaling = probe.choose_scaling(probe.PROTOCOLS["torchgeo-bench"], pack, rows)
    x = probe.to_network(torch.from_numpy(pack.images[rows]), 0, scaling)
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(2), atol=1e-5)
    assert torch.allclose(x.std((0, 2, 3)), torch.ones(2), atol=1e-4)


def test_flips_are_of_training_images_alone_and_the_network_stays_as_it_was(world):
    pack = data.open_pack(world / "several")
    split = np.array(["train", "test", ""] * 26 + ["train", ""])
    x = torch.from_numpy(np.array(pack.images)) / 255

    def features(net):
        protocol = probe.PROTOCOLS["copernicus-bench"]
        return probe.compute_features(probe.Network(net, 0), pack, {0: split}, protocol, "mean",
                                      probe.Scaling(), "cpu").float()

    views = features(torch.nn.Flatten()).unflatten(2, x.shape[1:])             # (4,n,C,H,W)
    for view, dims in zip(views, [[], [3], [2], [2, 3]], strict=True):
        filled = split == "train" if dims else split != ""
        assert torch.allclose(view[filled], x[filled].flip(dims), atol=3e-4)
        assert not view[~filled].any()
    used = split != ""
    stats = torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)
    assert torch.allclose(features(probe.BandStatistics())[0, used], stats[used], atol=3e-4)

    net = model.build("resnet18", 2).train()
    before = copy.deepcopy(net.state_dict())
    features(net)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


# --------------------------------------------------------------------------------- dense: of pixels


def masked_pack(path, unlabelled=0):
    """A pack by hand of 32 px: where band VH is bright, which are quarters, the mask is 1.

    unlabelled: so many more images, of noise, whose masks say nothing.
    """
    rng = np.random.default_rng(0)
    scenes = 24
    bright = rng.random((scenes, 2, 2)) < 0.5
    masks = bright.repeat(16, 1).repeat(16, 2).astype(np.uint8)
    x = rng.integers(0, 256, (scenes, 2, 32, 32))
    x[:, 1] = 80 + 80 * masks + rng.integers(-10, 11, masks.shape)
    masks[:, :3, :5] = 255
    x = np.concatenate([x, rng.integers(0, 256, (unlabelled, 2, 32, 32))])
    masks = np.concatenate([masks, np.full((unlabelled, 32, 32), 255, np.uint8)])
    parts = ["train"] * 16 + ["test"] * 8
    rows = [f"{i},{i}.tif,{parts[i % scenes]}," for i in range(len(x))]
    index = {"sensor": "s1", "mask_classes": ["dark", "bright"]}
    write_pack(path, x.astype(np.uint8), rows, index)
    np.save(path / "masks.npy", masks)
    return str(path)


def test_the_dense_probe_learns_a_mask_that_one_band_decides_and_ignores_unlabelled_images(
        here, tmp_path):
    """Maps of 4 px cells: of a network with such patches, and of the statistics."""
    vit = save_backbone(tmp_path / "fine.pt", "vit_tiny", 2, 32, 4)
    out = [probe.main(["--ckpt", vit, "--data", masked_pack(tmp_path / str(k), unlabelled=k)])
           for k in (0, 5)]
    assert out[0]["metric"] == "miou" and out[0]["protocol"] == "dense"
    assert out[0]["stats"] > 0.98 and out[0]["value"] > 0.98
    assert list(out[0]["all"]["stats"]) == ["miou", "pixel_accuracy", "dark", "bright"]
    assert out[0]["all"] == out[1]["all"] and out[0]["n_train"] == out[1]["n_train"] == 16


def test_the_head_of_pixels_is_plain_pytorch_written_out():
    """Sums over labelled pixels alone, in float64; the draws in their order: weights, epochs."""
    protocol = dataclasses.replace(probe.PROTOCOLS["dense"], steps=7, batch_size=4)
    rng = torch.Generator().manual_seed(1)
    x = (3 + 2 * torch.randn(10, 5, 3, 3, generator=rng)).half()
    y = torch.randint(0, 4, (10, 12, 12), generator=rng).byte()
    y[y == 3] = 255
    head = probe.fit_pixels(protocol, x, y, 3, 7, "cpu")

    draws = torch.Generator().manual_seed(7)
    W = torch.empty(3, 5, 1, 1).normal_(std=0.01, generator=draws)[:, :, 0, 0].double()
    parameters = [torch.ones(5), torch.zeros(5), W, torch.zeros(3)]
    parameters = [p.double().requires_grad_() for p in parameters]
    optimiser = torch.optim.AdamW(parameters, 1e-2, weight_decay=1e-4)
    up = torch.from_numpy(enlarged(3, 12))                     # (12,3)
    batches = []
    for step in range(7):                                      # two epochs of 3 batches, one more
        batches = batches or list(torch.randperm(10, generator=draws).split(4))
        rows = batches.pop()
        scale, shift, W, b = parameters
        z = x[rows].double()
        mean = z.mean((0, 2, 3), keepdim=True)
        variance = (z - mean).square().mean((0, 2, 3), keepdim=True)
        z = (z - mean) / (variance + 1e-5).sqrt() * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
        scores = torch.einsum("ld,bdhw,yh,xw->byxl", W, z, up, up) + b
        known = y[rows] != 255
        p = scores.log_softmax(3)[known]                       # (pixels,3)
        loss = -p[range(len(p)), y[rows][known].long()].sum() / known.sum()
        optimiser.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(math.pi * step / 7)) / 2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for got, want in zip(head.parameters(), parameters, strict=True):
        assert torch.allclose(got.double().squeeze(), want, atol=1e-5)


def enlarged(length, size):
    """(size,length): how much each of `length` cells counts for each of `size` pixels, bilinear."""
    weights = np.zeros((size, length))
    for i in range(size):
        place = np.clip((i + 0.5) * length / size - 0.5, 0, length - 1)
        low = min(int(place), length - 2)
        weights[i, low:low + 2] = [1 - place + low, place - low]
    return weights


def test_mean_iou_equals_sets_of_pixels_and_counts_unlabelled_ones_nowhere():
    rng = np.random.default_rng(0)
    y = rng.choice([0, 1, 2, 255], (6, 8, 8)).astype(np.uint8)
    logits = torch.from_numpy(rng.standard_normal((6, 4, 8, 8))).float()       # class 3 is nowhere
    logits[:, 3] = -9
    counts = probe.confusion(torch.nn.Identity(), logits, torch.from_numpy(y), 4, "cpu")
    guess = logits.argmax(1).numpy()
    known = y != 255
    iou = [(known & (y == k) & (guess == k)).sum() / (known & ((y == k) | (guess == k))).sum()
           for k in range(3)]
    metrics = probe.pixel_metrics("abcd")
    got = {name: metric(counts, None) for name, metric in metrics.items()}
    want = {"miou": np.mean(iou), "pixel_accuracy": (y == guess)[known].mean(), "a": iou[0],
            "b": iou[1], "c": iou[2], "d": 0}
    assert got == pytest.approx(want)
    assert counts.shape == (6, 4, 4) and (counts.sum((1, 2)) == known.sum((1, 2))).all()


def test_maps_are_the_patches_of_the_last_blocks_or_the_last_two_maps_of_a_resnet():
    x = torch.rand(2, 2, 24, 36)
    vit = model.build("vit_tiny", 2, 24, 6, 3).eval()
    resnet = model.build("resnet18", 2).eval()
    with torch.no_grad():
        for feature in (1, 4):
            got = probe.describe(vit, x, str(feature))         # (2,192 blocks,4,6)
            want = torch.cat([patches for _, patches in vit.last_blocks(x, feature)], 2)
            assert torch.equal(got.flatten(2).mT, want) and got.shape[2:] == (4, 6)
        fine, coarse = resnet.feature_maps(x)[2:]
        got = probe.describe(resnet, x, "1")
        assert torch.equal(got[:, :256], fine) and got.shape[1:] == (768, 2, 3)
        assert torch.allclose(got[:, 256:, 0, 0], coarse[:, :, 0, 0])
        values, around = probe.WindowStatistics().feature_maps(x)
        assert torch.allclose(values[0, 1, 2, 5], x[0, 1, 8:12, 20:24].mean())
        window = x[0, 1, 2:18, 14:30]
        want = torch.stack([window.mean(), window.std(correction=0)])
        assert torch.allclose(around[0, 1::2, 2, 5], want, atol=1e-5)


# ------------------------------------------------------------------------------------------ splits


def test_rule_1_lists_of_images_or_scenes_decide(here, capsys):
    (here / "a.txt").write_text("place3/6.tif\nnowhere,7.jpg\n")               # images
    (here / "b.txt").write_text("place8 place9 nobody place1/17.tif\n")        # scenes
    (here / "c.txt").write_text("place5\n")
    for lists, want in ((["a.txt", "b.txt", "c.txt"], [[6, 7], [16, 17, 18, 19], [10, 11]]),
                        (["a.txt", "b.txt"], [[6, 7], [], [16, 17, 18, 19]])):
        pack = data.open_pack("several")
        split = probe.split_by_lists(lists, pack, probe.scene_of_rows(pack))
        assert [np.flatnonzero(split == part).tolist() for part in PARTS] == want
    assert "b.txt: 4 names, 4 images of several" in capsys.readouterr().out


@pytest.mark.parametrize("protocol", ["ridge", "torchgeo-bench"])
def test_rule_2_a_pack_with_a_split_of_its_own_keeps_it_but_for_unlabelled_images(
        tmp_path, protocol):
    parts = ["train"] * 40 + ["val"] * 20 + ["test"] * 20
    splits, pack, _ = splits_of(make_pack(tmp_path / "own", split=parts, unlabelled=2),
                                "--protocol", protocol)
    assert splits[1.0, 0].tolist() == np.where(pack.labels.any(1), parts, "").tolist()


@pytest.mark.parametrize("name, flags, runs, holdout", [
    ("several", [], [0.9, 0.6], 0.6), ("single", [], [0.9, 0.6], 0.6), ("several", [], [], 1.0),
    ("several", ["--holdout", "0.6"], [], 0.6), ("single", ["--holdout", "0.6"], [], 0.6)])
def test_else_a_hash_halves_the_scenes_that_the_run_held_out_or_all_of_them(
        world, name, flags, runs, holdout):
    """runs: the shares that they held out; one of another pack has no say."""
    pack = data.open_pack(world / name)
    own = {f"{share}.pt": probe.Run(24, share, pack.sensor.bands, "pack", pack.checksum, False)
           for share in runs}
    own["other.pt"] = probe.Run(24, 0.1, pack.sensor.bands, "other", "00000000", False)
    splits, _, scene = splits_of(world / name, *flags, runs=own)
    used = data.held_out(pack.scenes, holdout)[scene] & pack.labels.any(1)
    test = data.held_out(pack.scenes, holdout / 2)[scene] & used
    want = np.where(test, "test", np.where(used, "train", ""))
    assert splits[1.0, 0].tolist() == want.tolist()


def test_a_pack_that_got_a_split_after_the_run_is_still_judged_by_what_the_run_saw(tmp_path):
    parts = ["train"] * 40 + ["test"] * 40
    path = make_pack(tmp_path / "own", split=parts)
    pack = data.open_pack(path)
    run = probe.Run(24, 0.4, pack.sensor.bands, path, pack.checksum, False)
    with pytest.raises(data.InputError, match="a.pt was trained on"):
        splits_of(path, runs={"a.pt": run})
    splits, *_ = splits_of(path, runs={"a.pt": dataclasses.replace(run, by_split=True)})
    assert splits[1.0, 0].tolist() == np.where(pack.labels.any(1), parts, "").tolist()


@pytest.mark.parametrize("protocol, counts", [("ridge", [56, 0, 24]),
                                              ("copernicus-bench", [48, 16, 16])])
def test_rule_5_shares_of_the_scenes_of_each_class_are_drawn(world, protocol, counts):
    splits, pack, _ = splits_of(world / "single", "--protocol", protocol, "--seeds", "2")
    for split in splits.values():
        assert np.allclose([(split == part).sum() for part in PARTS], counts, atol=4)
        assert all(len(set(split[rows])) == 1 for rows in pack.rows)           # whole scenes
        assert np.ptp(pack.labels[split == "test"].sum(0)) <= 4
    assert (splits[1.0, 0] != splits[1.0, 1]).any()


@pytest.mark.parametrize("name, share", [("several", 0.2), ("single", 0.06)])
def test_train_frac_thins_what_needs_labels_and_leaves_the_test_images(world, name, share):
    splits, pack, _ = splits_of(world / name, "--seeds", "2", "--train-frac", str(share), "0.5",
                                "1", "--protocol", "torchgeo-bench")
    whole, half, few = splits[1.0, 0], splits[0.5, 0], splits[share, 0]
    for part in ("train", "val"):
        assert (whole[half == part] == part).all()
        assert (half[few == part] == part).all()               # a smaller share is a part of it
        assert abs((half == part).sum() - (whole == part).sum() / 2) <= 3
    assert name == "several" or pack.labels[few == "val"].sum(0).tolist() == [1, 1, 1]
    assert 0.1 < (whole == "val").sum() / (whole != "test").sum() < 0.3          # to validate
    assert np.array_equal(few == "test", whole == "test")
    assert (splits[0.5, 1] != half).any()


# ----------------------------------------------------------------------------------- whole probes


def test_a_probe_ends_in_one_json_line_of_value_and_floors_and_repeats_itself(here, capsys):
    flags = ["--ckpt", "resnet.pt", "--data", "several", "--img-size", "24", "--seeds", "2",
             "--train-frac", "0.5", "1", "--bootstrap", "20"]
    out = probe.main(flags)
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1]) == out == probe.main(flags)
    assert out["metric"] == "micro_map" and out["seeds"] == 2 and out["protocol"] == "ridge"
    for name, key in (("checkpoint", "value"), ("random", "random"), ("stats", "stats")):
        values = out["all"][name]["micro_map"]
        assert len(values) == len(out["all"][name]["macro_map"]) == 2
        assert out[key] == pytest.approx(np.mean(values), abs=1e-5)
        assert f"{name:12} {np.mean(values):8.4f} ± {np.std(values, ddof=1):.4f}" in printed
    assert [row["train_frac"] for row in out["curve"]] == [0.5, 1]
    assert abs(out["curve"][0]["n_train"] - out["n_train"] / 2) <= 1
    low, high = out["gain"]["stats"]
    assert low <= out["value"] - out["all"]["stats"]["micro_map"][-1] <= high


def test_the_random_floor_has_the_weights_that_the_seed_draws_and_not_the_trained_ones(here):
    """The files have the weights that seeds 0 and 1 draw."""
    out = probe.main(["--ckpt", "vit1.pt", "vit0.pt", "--data", "several", "--seeds", "2",
                      "--bootstrap", "0"])
    rows = {name: row["micro_map"] for name, row in out["all"].items()}
    assert list(rows) == ["vit1.pt", "vit0.pt", "random", "stats"]
    assert rows["random"] == [rows["vit0.pt"][0], rows["vit1.pt"][1]]
    assert rows["vit0.pt"] != rows["vit1.pt"]


def test_a_run_brings_its_pack_its_size_and_what_it_held_out(here, capsys):
    write_config("several", img_size=28, holdout=0.7)
    out = probe.main(["--ckpt", "resnet.pt", "--bootstrap", "0"])              # as the run says
    assert out["data"] == "several" and out["img_size"] == 28
    printed = capsys.readouterr().out
    assert "images: --holdout 0.7 of the scenes, by a hash of their names" in printed
    assert "(resnet.pt was trained on the others)" in printed


@pytest.mark.parametrize("config, flags, message", [
    ({"holdout": 0.3}, ["--holdout", "0.6"], "--holdout 0.6: more than 0.3, resnet.pt was"),
    ({}, ["--lists", "rest.txt", "some.txt"], "by --lists: resnet.pt was trained on 2 of these 2"),
    ({"bands": ["HH", "HV"]}, [], "resnet.pt: takes the bands HH HV, .* has the 2 bands VV VH"),
    ({"by_split": True}, [],
     "resnet.pt: was trained on the split `train` of several, which has no"),
    (None, ["--lists", "rest.txt", "rest.txt"], "rest.txt: has images of another list"),
    (None, ["--lists", "none.txt", "some.txt"], "none.txt: none of its 1 names is in"),
    (None, ["--feature", "cls", "--protocol", "copernicus-bench"], "copernicus-bench takes mean"),
    (None, ["--protocol", "dense"], "several: has no masks: pack it with --masks"),
    (None, ["--feature", "4"], "--feature 4: protocol ridge takes cls"),
    (None, ["--data", "unlabelled"], "unlabelled: its images have no labels"),
    (None, ["--data", "optical"], "resnet.pt: takes 2 channels, optical has the 13 bands B1"),
    (None, ["--ckpt", "vit0.pt", "--img-size", "25"], "--img-size 25: not a multiple of the 6"),
    (None, ["--ckpt", "nan.pt"], "features are not finite"),
    (None, ["--train-frac", "0"], "--train-frac: 0 must lie in"),
])
def test_what_cannot_be_probed_is_refused_with_one_line(here, config, flags, message, capsys):
    if config is not None:
        write_config("several", **config)
    with pytest.raises((data.InputError, OSError, SystemExit)) as error:
        probe.main(["--ckpt", "resnet.pt", "--data", "several", "--img-size", "24", *flags])
    line = str(error.value)
    if error.type is SystemExit:                               # argparse
        line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, line) and "\n" not in line
