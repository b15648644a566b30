"""Claims about probe.py: metrics by their definition, heads, splits, and a frozen backbone."""
import argparse
import json
import os
import re
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F

import data
import model
import probe
from conftest import FEW_BLOCKS


@pytest.fixture(autouse=True)
def small_resnet(monkeypatch):
    monkeypatch.setitem(model.RESNETS, "resnet18", FEW_BLOCKS["resnet18"])


def save_backbone(path, *spec, seed=None):
    """Save an untrained backbone, build(*spec), and return the file's name."""
    if seed is not None:
        torch.manual_seed(seed)
    torch.save(model.export_backbone(model.build(*spec)), path)
    return str(path)


def one_hot(classes, count):
    return np.eye(count, dtype=np.uint8)[classes]


def blobs(n=200, d=10, seed=0):
    """Three overlapping clouds of points: x (n,d) float16 and their classes y (n,3) one-hot."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 3, n)
    x = rng.standard_normal((n, d)) + 2 * np.eye(3, d)[kind]
    return x.astype(np.float16), one_hot(kind, 3)


# ----------------------------------------------------------------------------------------- metrics


def ap_reference(scores, targets):
    """Average precision in O(n^2): walk the distinct thresholds from high to low."""
    total = 0.0
    recall = 0.0
    for threshold in sorted(set(scores), reverse=True):
        hits = [y for s, y in zip(scores, targets) if s >= threshold]
        precision = sum(hits) / len(hits)
        new_recall = sum(hits) / sum(targets)
        total += (new_recall - recall) * precision
        recall = new_recall
    return total


def test_average_precision_is_its_definition_with_ties_and_empty_classes():
    rng = np.random.default_rng(0)
    for trial in range(3000):
        n = rng.integers(1, 12)
        c = rng.integers(1, 5)
        if trial % 2:
            scores = rng.integers(0, 4, (n, c)) / 4
        else:
            scores = rng.standard_normal((n, c))
        targets = rng.random((n, c)) < rng.choice([0.1, 0.5, 1.0])
        if targets.any():
            micro = ap_reference(scores.ravel().tolist(), targets.ravel().tolist())
            assert abs(probe.average_precision(scores, targets) - micro) < 1e-12
        macro = []
        for s, t in zip(scores.T.tolist(), targets.T.tolist()):
            if any(t):
                macro.append(ap_reference(s, t))
        got = probe.average_precision(scores, targets, "macro")
        want = np.mean(macro) if macro else 0
        assert abs(got - want) < 1e-12


def test_a_perfect_ranking_scores_one_and_a_constant_one_the_prevalence():
    y = np.array([[1, 0], [0, 1], [0, 0], [1, 0]])
    assert probe.average_precision(y, y) == 1
    assert probe.average_precision(y, y, "macro") == 1
    assert abs(probe.average_precision(np.zeros((4, 2)), y) - 3 / 8) < 1e-12


def test_a_class_without_a_test_image_is_left_out_and_an_all_positive_one_scores_one():
    y = np.array([[1, 0, 1], [1, 0, 0]])
    scores = np.array([[0.1, 0.9, 0.2], [0.4, 0.1, 0.7]])
    assert probe.average_precision(scores, y, "macro") == (1 + 0.5) / 2


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int64, np.uint64, np.float16, bool])
def test_average_precision_is_the_same_for_scores_of_any_number_type(dtype):
    rng = np.random.default_rng(0)
    values = np.array([0, 1, 2, 100, 127])
    if dtype == bool:
        values = np.array([0, 1])
    if dtype == np.int8:
        values = np.array([-128, -127, 0, 1, 127])             # -(-128) is -128 in int8
    scores = rng.choice(values, (50, 3))
    targets = rng.random((50, 3)) < 0.4
    for average in ("micro", "macro"):
        want = probe.average_precision(scores.astype(np.float64), targets, average)
        assert probe.average_precision(scores.astype(dtype), targets, average) == want


def test_infinite_scores_tie_with_each_other():
    targets = np.array([[1], [0], [1], [0]])
    finite = np.array([[2.0], [2.0], [-2.0], [-2.0]])
    infinite = finite * np.inf
    assert probe.average_precision(infinite, targets) == probe.average_precision(finite, targets)


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_average_precision_refuses_nan_scores_and_other_shapes(average):
    y = np.array([[1, 0], [0, 1]])
    with pytest.raises(ValueError, match="some scores are NaN"):
        probe.average_precision(np.array([[0.5, np.nan], [0.1, 0.2]]), y, average)
    with pytest.raises(ValueError, match=r"scores \(2, 1\), targets \(2, 2\)"):
        probe.average_precision(y[:, :1], y, average)


def test_an_unknown_average_is_refused():
    with pytest.raises(ValueError, match="'weighted' is neither micro nor macro"):
        probe.average_precision(np.ones((2, 1)), np.ones((2, 1)), "weighted")


def test_paired_bootstraps_are_narrower_than_the_spread_of_each_and_zero_against_itself():
    rng = np.random.default_rng(0)
    y = np.eye(2)[rng.integers(0, 2, 300)]
    noisy = y + rng.normal(0, 0.6, y.shape)
    scores = {"noisy": noisy, "same": noisy + 1e-9, "perfect": y}
    samples = probe.bootstrap(probe.accuracy, scores, y, 200)
    intervals, gains = probe.compare(samples)
    assert list(gains) == ["same", "perfect"]
    assert gains["same"] == [0, 0]
    assert gains["perfect"][1] < 0                             # noisy loses against perfect
    assert intervals["perfect"] == [1, 1]
    p = probe.accuracy(noisy, y)
    low, high = intervals["noisy"]
    assert abs((high - low) - 3.92 * np.sqrt(p * (1 - p) / 300)) < 0.03


# ------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("D", [8, 70])                         # fewer columns than rows, and more
def test_ridge_is_the_normal_equations_with_the_penalty_that_explicit_cross_validation_picks(D):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, D))
    y = (rng.random((40, 3)) < 0.5).astype(float)
    x_test = rng.standard_normal((5, D))
    scene = np.repeat(np.arange(10), 4)

    def fit(x, y, x_test, penalty):
        mean = x.mean(0)
        std = x.std(0)
        z = (x - mean) / std
        W = np.linalg.solve(z.T @ z + penalty * len(x) * np.eye(D), z.T @ (y - y.mean(0)))
        return (x_test - mean) / std @ W + y.mean(0)

    errors = []
    for penalty in probe.RIDGE_PENALTIES:
        error = 0.0
        for f in range(5):
            out = np.isin(scene, [f, f + 5])                   # whole scenes leave together
            error += ((fit(x[~out], y[~out], x[out], penalty) - y[out]) ** 2).sum()
        errors.append(error)
    best = probe.RIDGE_PENALTIES[int(np.argmin(errors))]
    got = probe.validated(probe.ridge, x, y, x_test, scene)
    assert np.allclose(got, fit(x, y, x_test, best), atol=1e-8)


@pytest.mark.parametrize("multi_label", [False, True])
def test_logistic_ends_where_the_gradient_of_the_penalised_log_loss_is_zero(multi_label):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 4))
    y = (x @ rng.standard_normal((4, 3)) + rng.standard_normal((60, 3)) > 0).astype(float)
    if not multi_label:
        y = np.eye(3)[(x[:, :3] + rng.standard_normal((60, 3))).argmax(1)]
    z = (x - x.mean(0)) / x.std(0)
    fits = probe.logistic(x, y, x, multi_label)
    losses = []
    for penalty, p in zip((1, 0.1, 0.01, 0.001, 0.0001), fits, strict=True):
        if multi_label:
            logits = np.log(p / (1 - p))
            losses.append(-(y * np.log(p) + (1 - y) * np.log(1 - p)).sum(1).mean())
        else:
            logits = np.log(p) - np.log(p).mean(1, keepdims=True)
            losses.append(-(y * np.log(p)).sum(1).mean())
        W, residual, *_ = np.linalg.lstsq(np.c_[z, np.ones(60)], logits, rcond=None)
        assert residual.max() < 1e-9                           # the logits are linear
        gradient = z.T @ (p - y) / 60 + penalty * W[:4]
        assert abs(gradient).max() < 5e-4                      # and at the minimum
        assert np.allclose(p.mean(0), y.mean(0), atol=1e-3)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1


def newton_logistic(x, y, C):
    """The minimum of C * summed log loss of one class + |w|^2 / 2 by Newton's method, float64."""
    z = np.c_[x, np.ones(len(x))]
    ridge = np.diag([1.0] * x.shape[1] + [0.0])                # the intercept is free
    w = np.zeros(z.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-z @ w))
        gradient = C * z.T @ (p - y) + ridge @ w
        curvature = C * (z * (p * (1 - p))[:, None]).T @ z + ridge
        w = w - np.linalg.solve(curvature, gradient)
    return w


@pytest.mark.parametrize("C", [1e-3, 1.0, 100.0])
def test_logistic_coefficients_are_the_float64_optimum_of_scikit_learns_objective(C):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((80, 4))
    y = (x @ rng.standard_normal((4, 3)) + 2 * rng.standard_normal((80, 3)) > 0).astype(float)
    W = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    probe.fit_logistic(torch.from_numpy(x), torch.from_numpy(y), W, b, 1 / (C * 80), True,
                       accuracy=1e-7, iterations=1000)
    for k in range(3):
        want = newton_logistic(x, y[:, k], C)
        assert np.allclose(W[:, k].detach(), want[:4], atol=1e-4)
        assert np.isclose(b[0, k].item(), want[4], atol=1e-4)


def rows(x, y):
    return probe.Rows(x[None], y, np.arange(len(x)))


def test_the_c_with_the_best_validation_value_is_fitted_again_on_both_parts():
    x, y = blobs()
    train = rows(x[:100], y[:100])
    validation = rows(x[100:150], y[100:150])
    scores, (C, value) = probe.chosen_logistic(train, validation, x[150:], probe.accuracy, False)
    fits = probe.logistic(x[:100], y[:100], x[100:150], False, 1 / (probe.COSTS * 100), 1e-5, 100)
    values = [probe.accuracy(p, y[100:150]) for p in fits]
    best = int(np.argmax(values))
    assert value == values[best] and np.isclose(C, probe.COSTS[best], rtol=1e-2)
    again = probe.logistic(x[:150], y[:150], x[150:], False, [1 / (probe.COSTS[best] * 150)], 1e-7,
                           1000)
    assert np.array_equal(scores, again[0])


def test_five_neighbours_vote_by_exact_distance():
    x, y = blobs()
    got = probe.majority(x[:150], y[:150], x[150:])
    for row, point in zip(got, x[150:].astype(float)):
        distance = np.sqrt(((x[:150].astype(float) - point) ** 2).sum(1))
        assert np.array_equal(row, y[np.argsort(distance, kind="stable")[:5]].mean(0))


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_linear_layer_learns_each_view_at_a_rate_that_falls_to_zero(multi_label):
    x, y = blobs()
    protocol = probe.PROTOCOLS["copernicus-bench"]
    train = probe.Rows(np.stack([x[:150], x[:150] + 1]), y[:150], np.arange(150))
    scores = probe.linear(train, x[150:], protocol, 0.1, multi_label, seed=0)
    assert probe.accuracy(scores, y[150:]) > 0.75
    shifted = probe.linear(train, x[150:] + 1, protocol, 0.1, multi_label, seed=0)
    assert probe.accuracy(shifted, y[150:]) > 0.75             # it saw the other view as well
    assert np.array_equal(scores, probe.linear(train, x[150:], protocol, 0.1, multi_label, 0))
    frozen = probe.linear(train, x[150:], protocol, 0.0, multi_label, seed=0)
    assert abs(frozen).max() < 0.5                             # weights of deviation 0.01


def test_the_rate_depends_on_the_labels_or_on_the_network_as_the_protocols_say():
    copernicus = probe.PROTOCOLS["copernicus-bench"]
    ssl4eo = probe.PROTOCOLS["ssl4eo-s12"]
    resnet = model.build("resnet18", 2)
    vit = model.build("vit_tiny", 2, 24, 6)
    assert probe.learning_rate(copernicus, probe.TASKS["eurosat"], vit) == 0.1
    assert probe.learning_rate(copernicus, probe.TASKS["bigearthnet"], vit) == 1
    assert probe.learning_rate(ssl4eo, probe.TASKS["eurosat"], vit) == 0.1
    assert probe.learning_rate(ssl4eo, probe.TASKS["eurosat"], resnet) == 8
    assert probe.learning_rate(probe.PROTOCOLS["ridge"], probe.TASKS["eurosat"], vit) is None


def test_knn_is_the_weighted_vote_of_its_definition():
    x, y = blobs()
    got = probe.knn(x[:150], y[:150], x[150:], k=7)
    unit = x.astype(float) / np.linalg.norm(x.astype(float), axis=1, keepdims=True)
    for row, cosine in zip(got, unit[150:] @ unit[:150].T):
        near = np.argsort(-cosine)[:7]
        votes = np.exp((cosine[near] - 1) / 0.07)
        want = (votes[:, None] * y[near]).sum(0)
        assert np.allclose(row, want, rtol=1e-3)


def torch_sgd(x, y, rate, multi_label):
    """The weights (D,L) of a linear head after 40 steps of torch.optim.SGD on batches of 16."""
    n, D = x.shape
    generator = torch.Generator().manual_seed(1)
    layer = torch.nn.Linear(D, 3, bias=False)
    layer.weight.data = 0.01 * torch.randn(D, 1, 3, generator=generator)[:, 0].T
    optimiser = torch.optim.SGD(layer.parameters(), 1.0, momentum=0.9)
    epochs = 40 * 16 // n + 1
    order = torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)])
    for step, rows in enumerate(order.split(16)[:40]):
        if multi_label:
            loss = F.multilabel_soft_margin_loss(layer(x[rows]), y[rows])
        else:
            loss = F.cross_entropy(layer(x[rows]), y[rows].argmax(1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.param_groups[0]["lr"] = rate * 16 / 256 * (1 + np.cos(np.pi * step / 40)) / 2
        optimiser.step()
    return layer.weight.T


@pytest.mark.parametrize("multi_label", [False, True])
def test_heads_that_train_side_by_side_get_the_weights_that_each_gets_alone(multi_label):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator)
    y = torch.eye(3)[torch.randint(3, (50,), generator=generator)]
    use = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1.]])
    rates = torch.tensor([0.1, 1.0, 3.0])
    together = probe.sgd(x, y, use, rates, multi_label, 40, seed=1, batch=16)
    assert not together[[0, 1, 4], 1].any()                    # columns that head 1 does not see
    for h in range(3):
        alone = probe.sgd(x, y, use[h:h + 1], rates[h:h + 1], multi_label, 40, seed=1, batch=16)
        assert torch.allclose(alone[:, 0], together[:, h], atol=1e-6)
    for h in (0, 2):                                           # the heads that see all columns
        assert torch.allclose(torch_sgd(x, y, rates[h], multi_label), together[:, h], atol=1e-5)


def test_the_grids_choice_is_the_best_on_the_fifth_fold_of_the_training_part():
    x, y = blobs()
    training = x[:150], y[:150], x[150:], np.arange(150)
    rates = torch.tensor([1e-6, 0.1, 1e-5])
    use = torch.ones(3, x.shape[1])
    scores, best, value = probe.grid(*training, use, rates, probe.accuracy, False, 0, steps=100)
    assert best == 1 and value > 0.8
    assert probe.accuracy(scores, y[150:]) > 0.7


# ---------------------------------------------------------------------------------------- features


def test_the_backbone_is_bit_identical_after_feature_extraction(toy, labels):
    scenes = data.SSL4EO(toy, data.SENSORS["s1"], labels)
    net = model.build("resnet18", 2).train()
    net.size = 32
    before = {name: value.clone() for name, value in net.state_dict().items()}
    images = data.Images(scenes, [(0, 0), (1, 2)])
    stats, features = probe.extract([probe.BandStatistics(), net], images).values()
    assert features.shape == (2, 512) and stats.shape == (2, 4)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    x = torch.from_numpy(scenes.image(1, 2)) / 255
    want = torch.cat([x.mean((1, 2)), x.std((1, 2))])
    assert np.allclose(stats[1], want, atol=3e-4)


def test_a_vits_row_is_four_cls_tokens_and_the_mean_patch_and_cls_is_its_forward():
    net = model.build("vit_tiny", 2, 24, 6).eval()
    x = torch.rand(3, 2, 24, 24)
    with torch.no_grad():
        row = probe.describe(net, x)
        assert row.shape == (3, 5 * 192)
        assert torch.equal(row[:, probe.columns(net, "cls")], net(x))
        assert torch.equal(row[:, :192], net.last_blocks(x, 4)[0][0])
        assert torch.equal(row[:, probe.columns(net, "mean")], net.tokens(x)[:, 1:].mean(1))


def test_the_cache_gives_the_same_and_notices_changed_weights_images_and_sizes(
        toy, labels, tmp_path, monkeypatch):
    scenes = data.SSL4EO(toy, data.SENSORS["s1"], labels)
    images = data.Images(scenes, [(0, 0), (1, 2)])
    net = model.build("resnet18", 2)
    net.size = 32
    nets = [probe.BandStatistics(), net]
    want = probe.extract(nets, images)
    cache = str(tmp_path / "cache")
    reads = []
    read = data.Scenes.image

    def counted(self, i, s):
        reads.append((i, s))
        return read(self, i, s)

    monkeypatch.setattr(data.Scenes, "image", counted)

    def extract_with_cache():
        """The features, and how many images were read for them."""
        reads.clear()
        features = probe.extract(nets, images, cache=cache)
        return features, len(reads)

    for expected in (2, 0):
        features, count = extract_with_cache()
        assert count == expected
        assert all(np.array_equal(features[n], want[n]) for n in nets)
    assert all(name.endswith(".npy") for name in os.listdir(cache))
    net.size = 24
    assert extract_with_cache()[1] == 2
    net.size = 32
    with torch.no_grad():
        net.conv1.weight += 1e-3
    assert extract_with_cache()[1] == 2
    os.utime(sorted(Path(scenes.files[0][0]).iterdir())[0], (1, 1))
    assert extract_with_cache()[1] == 2
    assert extract_with_cache()[1] == 0


def test_a_damaged_file_of_the_cache_is_named(toy, labels, tmp_path):
    scenes = data.SSL4EO(toy, data.SENSORS["s1"], labels)
    images = data.Images(scenes, [(0, 0)])
    nets = [probe.BandStatistics()]
    probe.extract(nets, images, cache=str(tmp_path))
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{file.name}: not a file of features"):
        probe.extract(nets, images, cache=str(tmp_path))


def test_features_that_are_not_finite_are_refused(toy, labels):
    net = model.build("resnet18", 2)
    net.size = 32
    with torch.no_grad():
        net.conv1.weight[:] = float("nan")
    scenes = data.SSL4EO(toy, data.SENSORS["s1"], labels)
    with pytest.raises(ValueError, match="features are not finite"):
        probe.extract([net], data.Images(scenes, [(0, 0)]))


def pixels(scenes, view, n=20, profile=probe.Profile(), cache=None):
    """What a network of 12 pixels sees of the first n scenes: (n,C,12,12)."""
    net = torch.nn.Flatten()
    net.size = 12
    images = data.Images(scenes, [(i, 0) for i in range(n)])
    found = probe.extract([net], images, cache=cache, view=view, profile=profile)[net]
    return found.reshape(n, -1, 12, 12)


def test_draws_are_seeded_crops_mirrored_sideways_and_cached_apart(toy, labels, tmp_path):
    scenes = data.SSL4EO(toy, data.SENSORS["s1"], labels)
    cache = tmp_path / "cache"
    plain = pixels(scenes, probe.View(), cache=str(cache))
    first = pixels(scenes, probe.View(draw=1, area=0.5), cache=str(cache))
    second = pixels(scenes, probe.View(draw=2, area=0.5), cache=str(cache))
    again = pixels(scenes, probe.View(draw=1, area=0.5), cache=str(cache))
    assert np.array_equal(first, again)
    assert len(list(cache.iterdir())) == 3
    assert not np.array_equal(first, second) and not np.array_equal(first, plain)

    whole = pixels(scenes, probe.View(draw=1, area=1.0))       # only the aspect moves pixels
    same = []
    mirrored = []
    for crop, image in zip(whole, plain):
        same.append(np.corrcoef(crop.ravel(), image.ravel())[0, 1])
        mirrored.append(np.corrcoef(crop[..., ::-1].ravel(), image.ravel())[0, 1])
    assert 4 <= np.greater(mirrored, same).sum() <= 16
    assert np.maximum(same, mirrored).min() > 0.6


def test_the_four_flips_are_the_image_mirrored_in_each_way(toy, labels):
    scenes = data.SSL4EO(toy, data.SENSORS["s1"], labels)
    views = probe.training_views(probe.PROTOCOLS["copernicus-bench"], probe.TASKS["ssl4eo"])
    plain, sideways, upside_down, both = [pixels(scenes, view, n=3) for view in views]
    assert np.array_equal(sideways, plain[..., ::-1])
    assert np.array_equal(upside_down, plain[..., ::-1, :])
    assert np.array_equal(both, plain[..., ::-1, ::-1])


def test_a_radar_image_is_clipped_to_its_quantiles_band_by_band():
    x = torch.randint(0, 256, (3, 2, 50, 50), dtype=torch.uint8)
    clipped = probe.clip_quantiles(x)
    for image, source in zip(clipped, x.numpy()):
        for band, pixels in zip(image.numpy(), source):
            low, high = np.quantile(pixels, (0.01, 0.99))
            assert np.allclose(band, pixels.clip(low, high), atol=1e-3)


def test_z_scores_have_mean_zero_and_deviation_one_over_the_images(toy, labels):
    scenes = data.SSL4EO(toy, data.SENSORS["s1"], labels)
    images = data.Images(scenes, [(i, 0) for i in range(20)])
    mean, std = probe.band_moments(images, workers=0)
    x = np.stack([scenes.image(i, 0) for i in range(20)]) / 255
    assert np.allclose(mean, x.mean((0, 2, 3))) and np.allclose(std, x.std((0, 2, 3)))
    stats = probe.BandStatistics()
    profile = probe.Profile(mean=mean, std=std)
    z = probe.extract([stats], images, profile=profile)[stats]
    assert np.allclose(z[:, :2].mean(0), 0, atol=2e-3)         # the mean of the images' means


def test_the_profile_that_the_output_names_is_the_one_of_protocol_task_and_sensor(toy, labels):
    def name(protocol, task, scenes):
        args = argparse.Namespace(task=task, workers=0)
        images = data.Images(scenes, [(0, 0)])
        return probe.choose_profile(args, probe.PROTOCOLS[protocol], images)[1]

    radar = data.SSL4EO(toy, data.SENSORS["s1"], labels)
    optical = data.SSL4EO(toy, data.SENSORS["s2c"], labels)
    assert name("ridge", "ssl4eo", radar) == "mean -+ 2 std of s1 to [0, 1], clipped"
    assert "1 % and 99 % quantiles" in name("copernicus-bench", "ssl4eo", radar)
    assert "quantiles" not in name("copernicus-bench", "ssl4eo", optical)
    assert "of EuroSAT" in name("copernicus-bench", "eurosat", optical)
    assert "B10 is 0" in name("copernicus-bench", "bigearthnet", optical)
    assert "z-score" in name("torchgeo-bench", "ssl4eo", radar)


def test_the_features_of_the_last_block_are_the_features():
    net = model.build("vit_tiny", 2, 24, 6).eval()
    net.size = 24
    x = torch.rand(3, 2, 24, 24)
    with torch.no_grad():
        row = probe.describe(net, x)
        for feature in ("cls", "mean", "cls+mean"):
            blocks = probe.Blocks(net, feature)
            last = blocks(x)[:, blocks.columns(blocks.depth - 1)]
            assert torch.equal(last, row[:, probe.columns(net, feature)])
            assert blocks.columns(blocks.depth - 1).stop == blocks(x).shape[1]


def test_the_central_view_is_the_central_share_of_each_side(toy, labels):
    scenes = data.SSL4EO(toy, data.SENSORS["s1"], labels)
    x = torch.from_numpy(scenes.image(3, 0))[None]
    half = probe.central_view(x, None, 0.5)
    assert half.shape[-1] == 12
    assert torch.equal(half, x[..., 6:18, 6:18] / 255)


# ------------------------------------------------------------------------------------------ splits


def test_the_split_is_by_location_among_the_scenes_that_pretraining_held_out(toy, labels):
    scenes = data.SSL4EO(toy, data.SENSORS["s1"], labels)
    train, test = probe.held_out_halves(scenes, 0.4)
    held_out = set(np.flatnonzero(data.held_out(scenes.ids, 0.4)))
    train_scenes = {i for i, _ in train}
    test_scenes = {i for i, _ in test}
    assert train_scenes and test_scenes and not train_scenes & test_scenes
    assert train_scenes | test_scenes <= held_out
    assert all(scenes.labels[i][s].any() for i, s in train + test)


def test_a_split_to_train_on_a_single_scene_is_refused(toy, labels):
    scenes = data.SSL4EO(toy, data.SENSORS["s1"], labels)
    with pytest.raises(ValueError, match="4 training images are of a single class or scene"):
        probe.check_split(scenes, [(5, 0), (5, 1), (5, 2), (5, 3)], [(6, 0)])


def choose(scenes, task, protocol="ridge", fractions=(1.0,), split=None, holdout=0.4, seeds=(1, 2)):
    args = argparse.Namespace(task=task, labels=None, lists=None, split=split,
                              train_frac=list(fractions))
    return probe.choose_images(args, probe.PROTOCOLS[protocol], probe.TASKS[task], scenes, holdout,
                               seeds)


def test_train_frac_draws_a_share_of_the_training_images_and_leaves_the_test_images(toy, labels):
    scenes = data.SSL4EO(toy, data.SENSORS["s1"], labels)
    train, test = probe.held_out_halves(scenes, 0.4)
    splits = choose(scenes, "ssl4eo", fractions=(0.25, 0.5))
    (first, _, first_test), (second, _, second_test) = splits[0.5]
    assert first_test == second_test == test
    assert len(first) == len(second) == round(len(train) / 2)
    assert set(first) < set(train) and first != second
    assert set(splits[0.25][0][0]) < set(first)                # a smaller share is a part of it


def test_a_protocol_that_validates_sets_a_fifth_of_the_training_scenes_aside(toy, labels):
    scenes = data.SSL4EO(toy, data.SENSORS["s1"], labels)
    [(whole, _, test)] = choose(scenes, "ssl4eo", seeds=[0])[1.0]
    [(train, validation, same_test)] = choose(scenes, "ssl4eo", "torchgeo-bench", seeds=[0])[1.0]
    assert same_test == test and sorted(train + validation) == whole
    assert not {i for i, _ in train} & {i for i, _ in validation}
    assert 0.1 < len(validation) / len(whole) < 0.3


@pytest.fixture
def ten_classes():
    """Scenes of ten classes with 50 images each, which need no files."""
    y = [np.eye(10, dtype=np.uint8)[[k % 10]] for k in range(500)]
    names = [str(k) for k in range(500)]
    return data.Scenes(names, [[name] for name in names], y, list("abcdefghij"),
                       data.SENSORS["rgb"], 8, None)


@pytest.mark.parametrize("protocol, split, sizes", [
    ("ridge", None, (350, 0, 150)), ("copernicus-bench", None, (300, 100, 100)),
    ("ssl4eo-s12", None, (400, 0, 100)), ("ridge", [100, 50, 150], (100, 50, 150))])
def test_classes_are_split_as_the_protocol_or_the_flag_says(ten_classes, protocol, split, sizes):
    [(train, validation, test)] = choose(ten_classes, "eurosat", protocol, split=split,
                                         seeds=[3])[1.0]
    assert (len(train), len(validation), len(test)) == sizes
    assert len(set(train + validation + test)) == sum(sizes)
    for part in (train, test):
        counts = np.sum([ten_classes.labels[i][0] for i, _ in part], 0)
        assert (counts == len(part) / 10).all()
    assert choose(ten_classes, "eurosat", protocol, split=split, seeds=[3])[1.0] != choose(
        ten_classes, "eurosat", protocol, split=split, seeds=[4])[1.0]


def test_a_small_share_has_at_least_one_image_of_each_class(ten_classes):
    [(train, validation, test)] = choose(ten_classes, "eurosat", "torchgeo-bench", (0.01,),
                                         seeds=[0])[0.01]
    assert len(train) == len(validation) == 10 and len(test) == 100
    assert np.sum([ten_classes.labels[i][0] for i, _ in train], 0).tolist() == [1] * 10


def test_train_frac_with_replacement_draws_as_the_published_ten_percent():
    images = [(i, 0) for i in range(40)]
    drawn = probe.draw_share(images, 0.5, np.random.default_rng(42), replace=True)
    want = np.random.default_rng(42).choice(range(40), int(0.5 * 40))
    assert [i for i, _ in drawn] == sorted(want)
    assert len(set(want)) < 20                                 # some came twice


# ----------------------------------------------------------------------------------- whole probes


def test_a_probe_of_the_toy_world_ends_in_one_json_row_with_three_values(toy, tmp_path, capsys):
    path = save_backbone(tmp_path / "b.pt", "vit_tiny", 2, 24, 6)
    flags = ["--ckpt", path, "--data", toy, "--workers", "0", "--seeds", "2", "--holdout", "0.4"]
    out = probe.main(flags)
    assert out["metric"] == "micro_map" and out["seeds"] == 2 and out["n_test"] > 10
    assert all(0 < out[name] <= 1 for name in ("value", "random", "stats"))
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[-1].startswith('{"task": "ssl4eo"')
    assert json.loads(printed[-1]) == out
    assert probe.main(flags) == out


def test_gains_are_those_of_the_checkpoint_over_each_other_row(toy, tmp_path, capsys):
    path = save_backbone(tmp_path / "b.pt", "resnet18", 2)
    out = probe.main(["--ckpt", path, "--data", toy, "--workers", "0", "--holdout", "0.4",
                      "--img-size", "24"])
    assert list(out["interval"]) == ["checkpoint", "random", "stats"]
    assert list(out["gain"]) == ["random", "stats"]
    printed = capsys.readouterr().out
    for name, (low, high) in out["gain"].items():
        gain = out["value"] - out[name]
        assert low <= gain <= high
        assert f"checkpoint - {name}: {gain:+.3f} [{low:.3f}, {high:.3f}]" in printed


def test_permuted_test_labels_change_neither_the_chosen_head_nor_its_scores(
        toy, tmp_path, monkeypatch):
    path = save_backbone(tmp_path / "b.pt", "vit_tiny", 2, 24, 6)
    table = json.loads(Path(toy, "ssl4eo_multilabel.json").read_text())
    test = [i for i in table if data.held_out([i], 0.2)[0]]
    changed = dict(table)
    for i, j in zip(test, test[1:] + test[:1]):
        changed[i] = dict(zip(table[i], table[j].values()))
    (tmp_path / "true.json").write_text(json.dumps(table))
    (tmp_path / "permuted.json").write_text(json.dumps(changed))
    monkeypatch.setattr(probe, "fit_grid", partial(probe.fit_grid, steps=30))
    flags = ["--ckpt", path, "--data", toy, "--workers", "0", "--holdout", "0.4", "--protocol",
             "dinov2", "--bootstrap", "5"]
    true = probe.main([*flags, "--labels", str(tmp_path / "true.json")])
    permuted = probe.main([*flags, "--labels", str(tmp_path / "permuted.json")])
    assert true["chosen"] == permuted["chosen"]
    assert len(true["chosen"]["checkpoint"][0]) == 3
    assert true["value"] != permuted["value"] and true["n_train"] == permuted["n_train"]


@pytest.fixture
def two_classes(tmp_path):
    """Flags that probe two checkpoints on twelve images each of two classes, with lists."""
    rng = np.random.default_rng(0)
    lines = {"train": [], "test": []}
    for c, kind in enumerate(("Forest", "River")):
        (tmp_path / kind).mkdir()
        for n in range(12):
            x = rng.integers(1000, 1400, (16, 16, 13)) + 300 * c
            name = f"{kind}_{n}.tif"
            tifffile.imwrite(tmp_path / kind / name, x.astype(np.uint16), planarconfig="contig")
            lines["train" if n < 8 else "test"].append(name)
    for part, names in lines.items():
        (tmp_path / f"{part}.txt").write_text("\n".join(names))
    return ["--ckpt", save_backbone(tmp_path / "0.pt", "resnet18", 13, seed=0),
            save_backbone(tmp_path / "1.pt", "resnet18", 13, seed=1),
            "--task", "eurosat", "--data", str(tmp_path), "--img-size", "32", "--workers", "0",
            "--bootstrap", "20", "--lists", str(tmp_path / "train.txt"), str(tmp_path / "test.txt")]


def test_several_checkpoints_stand_side_by_side_on_lists_of_class_folders(two_classes, capsys):
    first, second = two_classes[1:3]
    out = probe.main([*two_classes, "--classes"])
    assert out["n_train"] == 16 and out["n_test"] == 8 and out["stats"] == 1
    assert list(out["all"]) == [first, second, "random", "stats"]
    assert list(out["gain"]) == [second, "random", "stats"]
    assert "called [" in capsys.readouterr().out


@pytest.mark.parametrize("train, message", [
    ("Forest_0.tif\nForest_8.tif\nRiver_0.tif", "images that are in two of them"),
    ("Forest_0.tif\nForest_1.tif", "2 training images are of a single class"),
    ("Forest_0.tif\nSea_1.tif\nSea_2.tif", "2 of 3 images are not there: Sea_1, Sea_2"),
])
def test_lists_that_cannot_be_probed_are_refused(two_classes, tmp_path, train, message):
    (tmp_path / "train.txt").write_text(train)
    with pytest.raises(ValueError, match=message):
        probe.main(two_classes)


@pytest.mark.parametrize("protocol", probe.PROTOCOLS)
def test_each_protocol_gives_checkpoint_and_floors_the_same_head(
        two_classes, protocol, monkeypatch):
    monkeypatch.setattr(probe, "fit_grid", partial(probe.fit_grid, steps=30))
    fit_head = probe.fit_head
    calls = []

    def spy(problem, net, *rows):
        calls.append((problem.protocol.head, problem.lr))
        return fit_head(problem, net, *rows)

    monkeypatch.setattr(probe, "fit_head", spy)
    out = probe.main([*two_classes, "--protocol", protocol])
    assert len(calls) == 4 and len(set(calls)) == 1            # two checkpoints, two floors
    assert out["protocol"] == protocol and out["input"] and out["img_size"] == 32
    assert 0 <= out["value"] <= 1
    if probe.PROTOCOLS[protocol].head in ("ridge", "logistic", "knn", "5 neighbours"):
        assert out["stats"] == 1                               # the classes differ by brightness


def test_three_lists_are_to_train_to_validate_and_to_test(two_classes, tmp_path):
    names = (tmp_path / "train.txt").read_text().split()
    (tmp_path / "train.txt").write_text("\n".join(names[::2]))
    (tmp_path / "validate.txt").write_text("\n".join(names[1::2]))
    lists = [str(tmp_path / f"{part}.txt") for part in ("train", "validate", "test")]
    out = probe.main([*two_classes, "--lists", *lists, "--protocol", "torchgeo-bench"])
    assert out["n_train"] == 8 and out["n_test"] == 8


def test_several_shares_print_a_row_each_and_draw_a_curve_for_each_network(
        two_classes, tmp_path, capsys):
    path = tmp_path / "curve.svg"
    out = probe.main([*two_classes, "--train-frac", "0.25", "1", "--out", str(path)])
    assert [row["n_train"] for row in out["curve"]] == [4, 16] and out["n_train"] == 16
    printed = capsys.readouterr().out
    for row in out["curve"]:
        assert f"{row['train_frac']:<7g} {row['n_train']:6}" in printed
        assert list(row["all"]) == list(out["all"])
    drawing = ElementTree.parse(path).getroot()
    curves = [line for line in drawing if line.tag.endswith("polyline")]
    assert len(curves) == 4
    assert all(len(line.get("points").split()) == 2 for line in curves)


def test_layers_are_the_values_of_a_vits_blocks_and_a_resnet_has_none(toy, tmp_path, capsys):
    path = save_backbone(tmp_path / "b.pt", "vit_tiny", 2, 24, 6)
    flags = ["--data", toy, "--workers", "0", "--holdout", "0.4", "--bootstrap", "0", "--layers"]
    out = probe.main(["--ckpt", path, *flags])
    assert len(out["layers"]) == 12
    assert out["layers"][-1] == out["value"]
    assert f"block  1 of 12: micro_map {out['layers'][0]:.4f}" in capsys.readouterr().out
    path = save_backbone(tmp_path / "r.pt", "resnet18", 2)
    with pytest.raises(ValueError, match="--layers: takes a ViT"):
        probe.main(["--ckpt", path, "--img-size", "24", *flags])


def test_the_batchwise_metric_says_its_bias(toy, tmp_path, capsys):
    path = save_backbone(tmp_path / "b.pt", "resnet18", 2)
    out = probe.main(["--ckpt", path, "--data", toy, "--workers", "0", "--holdout", "0.4",
                      "--bootstrap", "0", "--img-size", "24", "--protocol", "ssl4eo-s12"])
    row = out["all"]["checkpoint"]
    assert out["metric"] == "mean_of_256s" and out["value"] == row["mean_of_256s"][0]
    bias = row["mean_of_256s"][0] - row["micro_map"][0]
    assert f"mean_of_256s is biased: {bias:+.4f}" in capsys.readouterr().out


# ------------------------------------------------------------------ what a run tells, and bad flags


def test_a_probe_says_when_the_run_is_not_known_and_refuses_scenes_that_the_run_saw(
        toy, tmp_path, capsys):
    path = save_backbone(tmp_path / "b.pt", "resnet18", 2)
    flags = ["--ckpt", path, "--data", toy, "--workers", "0", "--bootstrap", "0"]
    probe.main([*flags, "--img-size", "24", "--holdout", "0.4"])
    assert f"{path}: ResNet 512, 24 px, scenes held out: not known" in capsys.readouterr().out

    config = tmp_path / "config.json"
    config.write_text(json.dumps({"flags": {"holdout": 0.3, "img_size": 30}}))
    probe.main(flags)
    assert f"{path}: ResNet 512, 30 px, scenes held out: 0.3\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--holdout 0.4: .*b.pt held out 0.3, saw the rest"):
        probe.main([*flags, "--holdout", "0.4"])

    config.write_text(json.dumps({"flags": {"labels": "classes", "data": f"{toy}/../world"}}))
    with pytest.raises(ValueError, match="b.pt: was trained on the classes of all images in"):
        probe.main(flags)


@pytest.mark.parametrize("damaged", [
    '{"flags": {"img_size": 1e999}}', '{"flags": {"holdout": "x"}}', '{"flags": 1}', "[]", "{"])
def test_a_damaged_config_is_named(toy, tmp_path, damaged):
    path = save_backbone(tmp_path / "b.pt", "resnet18", 2)
    (tmp_path / "config.json").write_text(damaged)
    with pytest.raises(ValueError, match="config.json: not a run's config.json"):
        probe.main(["--ckpt", path, "--data", toy])


def test_a_run_brings_its_modality(toy, tmp_path, monkeypatch):
    path = save_backbone(tmp_path / "backbone.pt", "resnet18", 2)
    palsar = data.Sensor(**vars(data.SENSORS["s1"]) | {"name": "palsar", "bands": ["HH", "HV"]})
    monkeypatch.setattr(data, "SENSORS", {"palsar": palsar} | data.SENSORS)    # two bands as well
    flags = ["--ckpt", path, "--data", toy, "--bootstrap", "0", "--img-size", "24"]
    with pytest.raises(ValueError, match="modality palsar has 2, ssl4eo takes s1 s2c s2a"):
        probe.main(flags)
    (tmp_path / "config.json").write_text('{"flags": {"modality": "s1"}}')
    assert probe.main(flags)["n_test"] > 0


def test_an_rgb_checkpoint_is_told_which_channels_a_task_takes(toy, tmp_path):
    flags = ["--ckpt", save_backbone(tmp_path / "dinov2.pth", "vit_tiny", 3, 28, 14), "--data", toy]
    with pytest.raises(ValueError, match="3 channels, modality rgb has 3, ssl4eo takes s1 s2c s2a"):
        probe.main(flags)
    with pytest.raises(ValueError, match="3 channels, modality s2c has 13"):
        probe.main([*flags, "--modality", "s2c"])


def test_channels_of_no_sensor_are_named(toy, tmp_path):
    path = save_backbone(tmp_path / "b.pt", "resnet18", 5)
    with pytest.raises(ValueError, match="b.pt: 5 channels, no sensor has as many bands"):
        probe.main(["--ckpt", path, "--data", toy])


@pytest.mark.parametrize("flags, message", [
    (["--data", "/nowhere"], "/nowhere/s1: no such folder"),
    (["--modality", "s2c"], "2 channels, modality s2c has 13"),
    (["--modality", "palsar"], "--modality palsar: unknown"),
    (["--holdout", "0"], "leaves 0 training and 0 test images"),
    (["--task", "eurosat"], "no s1 images .* in it or its folders"),
    (["--task", "bigearthnet"], "bigearthnet needs them"),
    (["--lists", "a", "b"], "ssl4eo tests on scenes held out"),
    (["--split", "0.5", "0", "0.5"], "ssl4eo tests on scenes held out"),
    (["--task", "eurosat", "--lists", "a"], "--lists: takes two or three files"),
    (["--protocol", "copernicus-bench", "--feature", "cls"], "copernicus-bench takes mean"),
    (["--out", "x.svg"], "--out: draws a curve, which needs several"),
    (["--train-frac", "0.5", "0.5"], "--train-frac: a value twice"),
    (["--labels", "/nowhere.json"], "nowhere.json: no such file"),
])
def test_bad_flags_are_named(toy, tmp_path, flags, message):
    path = save_backbone(tmp_path / "b.pt", "resnet18", 2)
    with pytest.raises(ValueError, match=message):
        probe.main(["--ckpt", path, "--data", toy, "--workers", "0", *flags])


def test_a_file_named_twice_is_refused():
    with pytest.raises(ValueError, match="--ckpt: a file twice"):
        probe.main(["--ckpt", "b.pt", "b.pt"])


@pytest.mark.parametrize("name", probe.RANGES)
def test_a_value_out_of_range_is_refused_with_the_flag_and_the_range(name):
    low, high = probe.RANGES[name]
    flag = "--" + name.replace("_", "-")
    for value in (low - 1, high + 1):
        given = [f"{flag}={value}"]
        if name == "split":
            given = [flag, "1", "1", str(value)]
        message = re.escape(f"{flag} {value}: must lie in {low} to {high}")
        with pytest.raises(ValueError, match=message):
            probe.main(["--ckpt", "x", *given])


@pytest.mark.parametrize("flag", ["--holdout", "--train-frac"])
def test_nan_is_out_of_every_range(flag):
    with pytest.raises(ValueError, match=f"{flag} nan: must lie in"):
        probe.main(["--ckpt", "x", flag, "nan"])


def test_flags_are_not_abbreviated(capsys):
    with pytest.raises(SystemExit):
        probe.main(["--ckpt", "x", "--boot", "5"])
    assert "--boot" in capsys.readouterr().err
