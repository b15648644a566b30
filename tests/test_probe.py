"""Claims about probe.py: metrics by their definition, the head, the split, a frozen backbone."""
import numpy as np
import pytest
import torch

import data
import model
import probe


def ap_reference(scores, targets):
    """O(n^2): walk the distinct thresholds from high to low."""
    total, recall = 0.0, 0.0
    for t in sorted(set(scores), reverse=True):
        chosen = [y for s, y in zip(scores, targets) if s >= t]
        r = sum(chosen) / sum(targets)
        total, recall = total + (r - recall) * sum(chosen) / len(chosen), r
    return total


def test_average_precision_is_its_definition_with_ties_and_empty_classes():
    rng = np.random.default_rng(0)
    for trial in range(500):
        n, c = rng.integers(1, 12), rng.integers(1, 5)
        scores = rng.integers(0, 4, (n, c)) / 4 if trial % 2 else rng.standard_normal((n, c))
        targets = rng.random((n, c)) < rng.choice([0.1, 0.5, 1.0])
        if targets.any():
            micro = ap_reference(scores.ravel().tolist(), targets.ravel().tolist())
            assert abs(probe.average_precision(scores, targets) - micro) < 1e-12
        macro = [ap_reference(scores[:, k].tolist(), targets[:, k].tolist())
                 for k in range(c) if targets[:, k].any()]
        got = probe.average_precision(scores, targets, "macro")
        assert abs(got - (np.mean(macro) if macro else 0)) < 1e-12


def test_a_perfect_ranking_scores_one_and_a_constant_one_the_prevalence():
    y = np.array([[1, 0], [0, 1], [0, 0], [1, 0]])
    assert probe.average_precision(y, y) == probe.average_precision(y, y, "macro") == 1
    assert abs(probe.average_precision(np.zeros((4, 2)), y) - 3 / 8) < 1e-12


def test_ridge_is_the_normal_equations_with_the_penalty_that_explicit_cross_validation_picks():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((40, 8)), (rng.random((40, 3)) < 0.5).astype(float)
    x_test, group = rng.standard_normal((5, 8)), np.repeat(np.arange(10), 4)

    def fit(x, y, at, penalty):
        mean, std = x.mean(0), x.std(0)
        z, centre = (x - mean) / std, y.mean(0)
        w = np.linalg.solve(z.T @ z + penalty * len(x) * np.eye(8), z.T @ (y - centre))
        return (at - mean) / std @ w + centre
    errors = []
    for penalty in probe.PENALTIES:
        e = 0.0
        for f in range(5):
            out = np.isin(group, [f, f + 5])                       # whole groups leave together
            e += ((fit(x[~out], y[~out], x[out], penalty) - y[out]) ** 2).sum()
        errors.append(e)
    best = probe.PENALTIES[int(np.argmin(errors))]
    assert np.allclose(probe.ridge(x, y, x_test, group), fit(x, y, x_test, best), atol=1e-8)


def test_the_split_is_by_location_among_the_scenes_that_pretraining_held_out(toy, labels):
    scenes = data.SSL4EO(toy, "s1", labels)
    train, test = probe.split(scenes, "ssl4eo", 0, 1.0, 0.4)
    out = set(np.flatnonzero(data.held_out(scenes.ids, 0.4)))
    a, b = {i for i, _ in train}, {i for i, _ in test}
    assert a and b and a | b <= out and not a & b
    assert all(scenes.labels[i][s].any() for i, s in train + test)
    half = probe.split(scenes, "ssl4eo", 1, 0.5, 0.4)
    assert half[1] == test and len(half[0]) == round(len(train) / 2) and set(half[0]) < set(train)


def test_the_backbone_is_bit_identical_after_feature_extraction(toy, labels):
    scenes = data.SSL4EO(toy, "s1", labels)
    net = model.build("resnet18", 2).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    (features,), stats, y = probe.extract([net], data.Images(scenes, [(0, 0), (1, 2)]), 32, "cpu")
    assert features.shape == (2, 512) and stats.shape == (2, 4) and y.shape == (2, 9)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    x = torch.from_numpy(scenes.image(1, 2)) / 255
    assert np.allclose(stats[1], torch.cat([x.mean((1, 2)), x.std((1, 2))]), atol=1e-6)


def test_a_probe_of_the_toy_world_ends_in_one_json_row_with_three_values(toy, tmp_path, capsys):
    path = tmp_path / "b.pt"
    torch.save(model.export_backbone(model.build("vit_tiny", 2, 24, 6)), path)
    out = probe.main(["--ckpt", str(path), "--data", toy, "--workers", "0", "--seeds", "2",
                      "--holdout", "0.4"])
    assert out["metric"] == "micro_map" and out["seeds"] == 2 and out["n_test"] > 10
    assert all(0 < out[k] <= 1 for k in ("value", "random", "stats"))
    again = probe.main(["--ckpt", str(path), "--data", toy, "--workers", "0", "--seeds", "2",
                        "--holdout", "0.4"])
    assert again == out
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith('{"task": "ssl4eo"')


@pytest.mark.parametrize("flags, message", [
    (["--data", "/nowhere"], "/nowhere/s1: no such folder"),
    (["--modality", "s2c"], "2 channels, modality s2c has 13"),
    (["--holdout", "0"], "leaves 0 training and 0 test images"),
    (["--task", "eurosat"], "class folders hold s2c or rgb chips, not s1"),
    (["--labels", "/nowhere.json"], "nowhere.json: no such labels file"),
])
def test_bad_flags_are_named(toy, tmp_path, flags, message):
    path = tmp_path / "b.pt"
    torch.save(model.export_backbone(model.build("resnet18", 2)), path)
    with pytest.raises(ValueError, match=message):
        probe.main(["--ckpt", str(path), "--data", toy, "--workers", "0", *flags])
