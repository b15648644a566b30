"""Claims about probe.py: metrics by their definition, heads, splits, and a frozen backbone."""
import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F

import data
import model
import probe


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
    scores, best, value = probe.linear(*training, use, rates, probe.accuracy, False, 100, 0)
    assert best == 1 and value > 0.8
    assert probe.accuracy(scores, y[150:]) > 0.7

    use = use[:1]
    rates = rates[1:2]
    single, best, value = probe.linear(*training, use, rates, probe.accuracy, False, 100, 0)
    assert best == 0 and value is None
    assert not np.array_equal(single, scores)                  # it trains on all five folds


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


def test_draws_are_seeded_crops_mirrored_sideways_and_cached_apart(toy, labels, tmp_path):
    scenes = data.SSL4EO(toy, data.SENSORS["s1"], labels)
    images = data.Images(scenes, [(i, 0) for i in range(20)])
    net = torch.nn.Flatten()
    net.size = 12
    cache = tmp_path / "cache"

    def pixels(**view):
        return probe.extract([net], images, cache=str(cache), **view)[net].reshape(20, 2, 12, 12)

    plain = pixels()
    first = pixels(draw=1, area=0.5)
    second = pixels(draw=2, area=0.5)
    assert np.array_equal(first, pixels(draw=1, area=0.5))
    assert len(list(cache.iterdir())) == 3
    assert not np.array_equal(first, second) and not np.array_equal(first, plain)

    whole = pixels(draw=1, area=1.0)                           # only the aspect moves pixels
    same = []
    mirrored = []
    for crop, image in zip(whole, plain):
        same.append(np.corrcoef(crop.ravel(), image.ravel())[0, 1])
        mirrored.append(np.corrcoef(crop[..., ::-1].ravel(), image.ravel())[0, 1])
    assert 4 <= np.greater(mirrored, same).sum() <= 16
    assert np.maximum(same, mirrored).min() > 0.6


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


def test_train_frac_draws_a_share_of_the_training_images_and_leaves_the_test_images(toy, labels):
    scenes = data.SSL4EO(toy, data.SENSORS["s1"], labels)
    train, test = probe.held_out_halves(scenes, 0.4)
    args = argparse.Namespace(task="ssl4eo", lists=None, train_frac=0.5, replace=False)
    (first, first_test), (second, second_test) = probe.choose_images(args, scenes, 0.4, [1, 2])
    assert first_test == second_test == test
    assert len(first) == len(second) == round(len(train) / 2)
    assert set(first) < set(train) and first != second


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


def test_permuted_test_labels_change_neither_the_chosen_head_nor_its_scores(toy, tmp_path):
    path = save_backbone(tmp_path / "b.pt", "vit_tiny", 2, 24, 6)
    table = json.loads(Path(toy, "ssl4eo_multilabel.json").read_text())
    test = [i for i in table if data.held_out([i], 0.2)[0]]
    changed = dict(table)
    for i, j in zip(test, test[1:] + test[:1]):
        changed[i] = dict(zip(table[i], table[j].values()))
    (tmp_path / "true.json").write_text(json.dumps(table))
    (tmp_path / "permuted.json").write_text(json.dumps(changed))
    flags = ["--ckpt", path, "--data", toy, "--workers", "0", "--holdout", "0.4", "--head", "grid",
             "--steps", "30", "--bootstrap", "5"]
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
    ("Forest_0.tif\nForest_8.tif\nRiver_0.tif", "images that are in both"),
    ("Forest_0.tif\nForest_1.tif", "2 training images are of a single class"),
    ("Forest_0.tif\nSea_1.tif\nSea_2.tif", "2 of 3 images are not there: Sea_1, Sea_2"),
])
def test_lists_that_cannot_be_probed_are_refused(two_classes, tmp_path, train, message):
    (tmp_path / "train.txt").write_text(train)
    with pytest.raises(ValueError, match=message):
        probe.main(two_classes)


def test_the_head_trains_on_the_draws_and_is_tested_on_the_images_themselves(
        toy, tmp_path, monkeypatch):
    path = save_backbone(tmp_path / "b.pt", "resnet18", 2)
    calls = []
    validated = probe.validated

    def spy(fit, x, y, x_test, scene):
        calls.append((x, x_test, scene))
        return validated(fit, x, y, x_test, scene)

    monkeypatch.setattr(probe, "validated", spy)
    flags = ["--ckpt", path, "--data", toy, "--workers", "0", "--holdout", "0.4", "--bootstrap",
             "0", "--img-size", "24"]
    plain = probe.main(flags)
    drawn = probe.main([*flags, "--draws", "2"])
    assert plain["n_train"] == drawn["n_train"] and plain["value"] != drawn["value"]
    x, x_test, scene = calls[0]                                # the checkpoint's, without draws
    x_drawn, x_test_drawn, scene_drawn = calls[3]              # and with
    assert len(x_drawn) == 2 * len(x)
    assert np.array_equal(x_test, x_test_drawn)
    assert np.array_equal(np.sort(scene_drawn), np.sort(np.tile(scene, 2)))
    assert not (x_drawn[:, None] == x[None]).all(2).any()      # no image trains as it is


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
    (["--task", "bigearthnet"], "bigearthnet needs two"),
    (["--lists", "a", "b"], "ssl4eo tests on scenes held out"),
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
        with pytest.raises(ValueError, match=f"{flag} {value}: must lie in {low} to {high}"):
            probe.main(["--ckpt", "x", f"{flag}={value}"])


@pytest.mark.parametrize("flag", ["--lr", "--holdout", "--train-frac", "--centre", "--area"])
def test_nan_is_out_of_every_range(flag):
    with pytest.raises(ValueError, match=f"{flag} nan: must lie in"):
        probe.main(["--ckpt", "x", flag, "nan"])


def test_flags_are_not_abbreviated(capsys):
    with pytest.raises(SystemExit):
        probe.main(["--ckpt", "x", "--boot", "5"])
    assert "--boot" in capsys.readouterr().err
