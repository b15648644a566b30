"""Claims about probe.py: metrics by their definition, the head, the split, a frozen backbone."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
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
    for trial in range(3000):
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


@pytest.mark.parametrize("D", [8, 70])                             # fewer than rows, and more
def test_ridge_is_the_normal_equations_with_the_penalty_that_explicit_cross_validation_picks(D):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((40, D)), (rng.random((40, 3)) < 0.5).astype(float)
    x_test, group = rng.standard_normal((5, D)), np.repeat(np.arange(10), 4)

    def fit(x, y, at, penalty):
        mean, std = x.mean(0), x.std(0)
        z, centre = (x - mean) / std, y.mean(0)
        w = np.linalg.solve(z.T @ z + penalty * len(x) * np.eye(D), z.T @ (y - centre))
        return (at - mean) / std @ w + centre
    errors = []
    for penalty in probe.PENALTIES:
        e = 0.0
        for f in range(5):
            out = np.isin(group, [f, f + 5])                       # whole groups leave together
            e += ((fit(x[~out], y[~out], x[out], penalty) - y[out]) ** 2).sum()
        errors.append(e)
    best = probe.PENALTIES[int(np.argmin(errors))]
    got = probe.validated(probe.ridge, x, y, x_test, group)
    assert np.allclose(got, fit(x, y, x_test, best), atol=1e-8)


def test_the_split_is_by_location_among_the_scenes_that_pretraining_held_out(toy, labels):
    scenes = data.SSL4EO(toy, "s1", labels)
    train, test = probe.split(scenes, "ssl4eo", 0, 1.0, 0.4)
    out = set(np.flatnonzero(data.held_out(scenes.ids, 0.4)))
    a, b = {i for i, _ in train}, {i for i, _ in test}
    assert a and b and a | b <= out and not a & b
    assert all(scenes.labels[i][s].any() for i, s in train + test)
    with pytest.raises(ValueError, match="4 training images are of a single class or scene"):
        probe.split(scenes, "bigearthnet", 0, 1.0, 0, [[(5, s) for s in range(4)], [(6, 0)]])
    half = probe.split(scenes, "ssl4eo", 1, 0.5, 0.4)
    assert half[1] == test and len(half[0]) == round(len(train) / 2) and set(half[0]) < set(train)


def test_the_backbone_is_bit_identical_after_feature_extraction(toy, labels):
    scenes = data.SSL4EO(toy, "s1", labels)
    net = model.build("resnet18", 2).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    images = data.Images(scenes, [(0, 0), (1, 2)])
    net.size = 32
    stats, features = probe.extract([probe.Floor(), net], images).values()
    assert features.shape == (2, 512) and stats.shape == (2, 4)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    x = torch.from_numpy(scenes.image(1, 2)) / 255
    assert np.allclose(stats[1], torch.cat([x.mean((1, 2)), x.std((1, 2))]), atol=3e-4)


def test_a_vits_row_is_four_cls_tokens_and_the_mean_patch_and_cls_is_its_forward():
    net, x = model.build("vit_tiny", 2, 24, 6).eval(), torch.rand(3, 2, 24, 24)
    with torch.no_grad():
        row, blocks = probe.describe(net, x), net.last_blocks(x, 4)
        a, b = (192 * e for e in probe.FEATURES["cls"])
        assert row.shape == (3, 5 * 192) and torch.equal(row[:, a:b], net(x))
        assert torch.equal(row[:, :192], blocks[0][0])
        assert torch.equal(row[:, 768:], net.tokens(x)[:, 1:].mean(1))


def test_the_cache_gives_the_same_and_notices_changed_weights_images_and_sizes(
        toy, labels, tmp_path, monkeypatch):
    scenes = data.SSL4EO(toy, "s1", labels)
    images, net = data.Images(scenes, [(0, 0), (1, 2)]), model.build("resnet18", 2)
    nets, cache = [probe.Floor(), net], str(tmp_path / "c")
    net.size = 32
    want = probe.extract(nets, images)

    def count():
        reads = []
        monkeypatch.setattr(data.Scenes, "image", lambda self, i, s: reads.append(i) or
                            self.decode(self.files[i][s]))
        got = probe.extract(nets, images, cache=cache)
        return len(reads), got
    first, again = count(), count()
    assert first[0] == 2 and again[0] == 0
    assert all(np.array_equal(got[1][n], want[n]) for got in (first, again) for n in nets)
    assert not [f for f in Path(cache).iterdir() if f.suffix != ".npy"]
    net.size = 24
    assert count()[0] == 2
    net.size = 32
    with torch.no_grad():
        net.conv1.weight += 1e-3
    assert count()[0] == 2
    os.utime(sorted(Path(scenes.files[0][0]).iterdir())[0], (1, 1))
    assert count()[0] == 2 and count()[0] == 0


def test_features_that_are_not_finite_are_refused(toy, labels):
    net = model.build("resnet18", 2)
    net.size = 32
    with torch.no_grad():
        net.conv1.weight[:] = float("nan")
    with pytest.raises(ValueError, match="features are not finite"):
        probe.extract([net], data.Images(data.SSL4EO(toy, "s1", labels), [(0, 0)]))


@pytest.mark.parametrize("multi", [False, True])
def test_the_batched_grid_gives_the_weights_that_each_head_gets_alone(multi):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 6, generator=g), torch.eye(3)[torch.randint(3, (50,), generator=g)]
    use = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1.]])
    rates = torch.tensor([0.1, 1.0, 3.0])
    together = probe.sgd(x, y, use, rates, multi, 40, seed=1, batch=16)
    assert not together[[0, 1, 4], 1].any()
    for h in range(3):
        alone = probe.sgd(x, y, use[h:h + 1], rates[h:h + 1], multi, 40, seed=1, batch=16)
        assert torch.allclose(alone[:, 0], together[:, h], atol=1e-6)
        on = use[h] > 0                                    # and those that torch.optim.SGD gets
        g = torch.Generator().manual_seed(1)
        layer = torch.nn.Linear(int(on.sum()), 3, bias=False)
        layer.weight.data = 0.01 * torch.randn(6, 1, 3, generator=g)[on, 0].T
        optimiser = torch.optim.SGD(layer.parameters(), 1.0, momentum=0.9)
        order = torch.cat([torch.randperm(50, generator=g) for _ in range(40 * 16 // 50 + 1)])
        velocity_rate = rates[h] * 16 / 256
        for step, rows in enumerate(order.split(16)[:40]):
            z = layer(x[rows][:, on])
            loss = (torch.nn.functional.multilabel_soft_margin_loss(z, y[rows]) if multi else
                    torch.nn.functional.cross_entropy(z, y[rows].argmax(1)))
            optimiser.zero_grad()
            loss.backward()
            optimiser.param_groups[0]["lr"] = velocity_rate * (1 + np.cos(np.pi * step / 40)) / 2
            optimiser.step()
        assert torch.allclose(layer.weight.T, together[on, h], atol=1e-5)


def blobs(n=200, d=10, seed=0):
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 3, n)
    y = np.eye(3, dtype=np.uint8)[kind]
    return (rng.standard_normal((n, d)) + 2 * np.eye(3, d)[kind]).astype(np.float16), y


def test_the_grids_choice_is_the_best_on_the_fifth_fold_of_the_training_part():
    x, y = blobs()
    heads = [("cls", lr) for lr in (1e-6, 0.1, 1e-5)]

    def right(s, t):
        return float((s.argmax(1) == t.argmax(1)).mean())
    fit = x[:150], y[:150], x[150:], np.arange(150)
    scores, chosen = probe.linear(*fit, False, right, heads, None, 100, 0)
    assert chosen[:2] == ["cls", 0.1] and chosen[2] > 0.8 and right(scores, y[150:]) > 0.7
    one, _ = probe.linear(*fit, False, right, heads[1:2], None, 100, 0)
    assert not np.array_equal(one, scores)                 # a single head trains on all five folds


def test_knn_is_the_weighted_vote_of_its_definition():
    x, y = blobs()
    got = probe.knn(x[:150], y[:150], x[150:], k=7)
    a, b = (v.astype(float) / np.linalg.norm(v.astype(float), axis=1)[:, None]
            for v in (x[150:], x[:150]))
    for row, cos in zip(got, a @ b.T):
        near = np.argsort(-cos)[:7]
        want = (np.exp((cos[near] - 1) / 0.07)[:, None] * y[near]).sum(0)
        assert np.allclose(row, want, rtol=1e-3)


def test_paired_bootstraps_are_narrower_than_the_spread_of_each_and_zero_against_itself():
    rng = np.random.default_rng(0)
    y = np.eye(2)[rng.integers(0, 2, 300)]
    good = y + rng.normal(0, 0.6, y.shape)
    metric = lambda s, t: np.mean(s.argmax(1) == t.argmax(1))                        # noqa: E731
    own, gain = probe.bootstrap(metric, [good, good + 1e-9, y], y, 200)
    assert gain[0] == gain[1] == [0, 0] and own[2] == [1, 1] and gain[2][0] > 0
    p = metric(good, y)
    assert abs((own[0][1] - own[0][0]) - 3.92 * np.sqrt(p * (1 - p) / 300)) < 0.03


def test_train_frac_with_replacement_draws_as_the_published_ten_percent(toy, labels):
    scenes = data.SSL4EO(toy, "s1", labels)
    lists = [[(i, 0) for i in range(40)], [(i, 0) for i in range(40, 60)]]
    train, test = probe.split(scenes, "bigearthnet", 42, 0.5, 0, lists, True)
    want = np.random.default_rng(42).choice(range(40), int(0.5 * 40))
    assert [i for i, _ in train] == sorted(want) and len(set(want)) < 20 and len(test) == 20


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


def test_permuted_test_labels_change_neither_the_chosen_head_nor_its_scores(toy, tmp_path):
    path = tmp_path / "b.pt"
    torch.save(model.export_backbone(model.build("vit_tiny", 2, 24, 6)), path)
    table = json.loads(Path(toy, "ssl4eo_multilabel.json").read_text())
    test = [i for i in table if data.held_out([i], 0.2)[0]]
    changed = dict(table)
    for i, j in zip(test, test[1:] + test[:1]):
        changed[i] = dict(zip(table[i], table[j].values()))
    outs = []
    for name, labels in (("a", table), ("b", changed)):
        (tmp_path / name).write_text(json.dumps(labels))
        outs.append(probe.main([
            "--ckpt", str(path), "--data", toy, "--workers", "0", "--holdout", "0.4", "--head",
            "grid", "--steps", "30", "--bootstrap", "5", "--labels", str(tmp_path / name)]))
    assert outs[0]["chosen"] == outs[1]["chosen"] and len(outs[0]["chosen"]["checkpoint"][0]) == 3
    assert outs[0]["value"] != outs[1]["value"] and outs[0]["n_train"] == outs[1]["n_train"]


def test_several_checkpoints_stand_side_by_side_on_lists_of_class_folders(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for c, kind in enumerate(("Forest", "River")):
        (tmp_path / kind).mkdir()
        for n in range(12):
            x = rng.integers(1000, 1400, (16, 16, 13)) + 300 * c
            tifffile.imwrite(tmp_path / kind / f"{kind}_{n}.tif", x.astype(np.uint16),
                             planarconfig="contig")
    lists = []
    for part, numbers in (("train", range(8)), ("test", range(8, 12))):
        lists.append(str(tmp_path / f"{part}.txt"))
        Path(lists[-1]).write_text("".join(f"{k}_{n}.tif\n" for k in ("Forest", "River")
                                           for n in numbers))
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(model.export_backbone(model.build("resnet18", 13)), tmp_path / f"{seed}.pt")
    ckpts = [str(tmp_path / "0.pt"), str(tmp_path / "1.pt")]
    flags = ["--ckpt", *ckpts, "--task", "eurosat", "--data", str(tmp_path), "--img-size", "32",
             "--workers", "0", "--bootstrap", "20", "--lists", *lists]
    out = probe.main([*flags, "--classes"])
    assert out["n_train"] == 16 and out["n_test"] == 8 and out["stats"] == 1
    assert list(out["all"]) == [*ckpts, "random", "stats"]
    assert out["difference"][ckpts[0]] == [0, 0] and len(out["difference"][ckpts[1]]) == 2
    assert "called [" in capsys.readouterr().out
    with pytest.raises(ValueError, match="images that are in both"):
        probe.main(flags[:-1] + [lists[0]])
    Path(lists[0]).write_text("Forest_0.tif\nForest_1.tif")
    with pytest.raises(ValueError, match="2 training images are of a single class"):
        probe.main(flags)
    Path(lists[0]).write_text("Forest_0.tif\nSea_1.tif\nSea_2.tif")
    with pytest.raises(ValueError, match="2 of 3 images are not there: Sea_1, Sea_2"):
        probe.main(flags)


def test_an_rgb_checkpoint_is_told_which_channels_a_task_takes(toy, tmp_path):
    path = tmp_path / "dinov2.pth"
    torch.save(model.export_backbone(model.build("vit_tiny", 3, 28, 14)), path)
    for more, message in (([], "3 channels, modality rgb has 3, ssl4eo takes s1 s2c s2a"),
                          (["--modality", "s2c"], "3 channels, modality s2c has 13")):
        with pytest.raises(ValueError, match=message):
            probe.main(["--ckpt", str(path), "--data", toy, *more])


def test_a_file_named_twice_is_refused_and_a_run_brings_its_modality(toy, tmp_path, monkeypatch):
    path = tmp_path / "backbone.pt"
    torch.save(model.export_backbone(model.build("resnet18", 2)), path)
    with pytest.raises(ValueError, match="--ckpt: a file twice"):
        probe.main(["--ckpt", str(path), str(path), "--data", toy])
    monkeypatch.setattr(data, "BANDS", data.BANDS | {"palsar": ["HH", "HV"]})     # two bands as well
    (tmp_path / "config.json").write_text('{"flags": {"modality": "s1", "img_size": 24}}')
    assert probe.main(["--ckpt", str(path), "--data", toy, "--bootstrap", "0"])["n_test"] > 0


def test_a_class_without_a_test_image_is_counted_and_all_positive_ones_score_one():
    y = np.array([[1, 0, 1], [1, 0, 0]])
    s = np.array([[0.1, 0.9, 0.2], [0.4, 0.1, 0.7]])
    assert probe.average_precision(s, y, "macro") == (1 + 0.5) / 2


@pytest.mark.parametrize("flags, message", [
    (["--data", "/nowhere"], "/nowhere/s1: no such folder"),
    (["--modality", "s2c"], "2 channels, modality s2c has 13"),
    (["--show", "p"], "a ResNet has no patch tokens"),
    (["--holdout", "0"], "leaves 0 training and 0 test images"),
    (["--task", "eurosat"], "no s1 images .* in it or its folders"),
    (["--task", "bigearthnet"], "bigearthnet needs two"),
    (["--lists", "a", "b"], "ssl4eo tests on scenes held out"),
    (["--labels", "/nowhere.json"], "nowhere.json: no such file"),
])
def test_bad_flags_are_named(toy, tmp_path, flags, message):
    path = tmp_path / "b.pt"
    torch.save(model.export_backbone(model.build("resnet18", 2)), path)
    with pytest.raises(ValueError, match=message):
        probe.main(["--ckpt", str(path), "--data", toy, "--workers", "0", *flags])


@pytest.mark.parametrize("multi", [False, True])
def test_logistic_ends_where_the_gradient_of_the_penalised_log_loss_is_zero(multi):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 4))
    y = (x @ rng.standard_normal((4, 3)) + rng.standard_normal((60, 3)) > 0).astype(float)
    y = y if multi else np.eye(3)[(x[:, :3] + rng.standard_normal((60, 3))).argmax(1)]
    z = (x - x.mean(0)) / x.std(0)
    fits = probe.logistic(x, y, x, multi)
    for penalty, p in zip((1, 0.1, 0.01, 0.001, 0.0001), fits, strict=True):
        logits = np.log(p / (1 - p)) if multi else np.log(p) - np.log(p).mean(1, keepdims=True)
        W, rest, *_ = np.linalg.lstsq(np.c_[z, np.ones(60)], logits, rcond=None)
        gradient = z.T @ (p - y) / 60 + penalty * W[:4]
        assert rest.max() < 1e-9 and abs(gradient).max() < 5e-4    # linear, and at the minimum
        assert np.allclose(p.mean(0), y.mean(0), atol=1e-3)
    losses = [-(y * np.log(p) + multi * (1 - y) * np.log(1 - p)).sum(1).mean() for p in fits]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1


def test_draws_are_seeded_crops_mirrored_sideways_and_cached_apart(toy, labels, tmp_path):
    scenes = data.SSL4EO(toy, "s1", labels)
    images, net = data.Images(scenes, [(i, 0) for i in range(20)]), torch.nn.Flatten()
    net.size = 12
    take = lambda **view: probe.extract([net], images, cache=str(tmp_path / "c"),  # noqa: E731
                                        **view)[net].reshape(20, 2, 12, 12)
    plain, a, b = take(), take(draw=1, area=0.5), take(draw=2, area=0.5)
    assert np.array_equal(a, take(draw=1, area=0.5)) and len(os.listdir(tmp_path / "c")) == 3
    assert not np.array_equal(a, b) and not np.array_equal(a, plain)
    whole = take(draw=1, area=1.0)                        # aspect alone moves pixels
    same = [np.corrcoef(whole[i].ravel(), plain[i].ravel())[0, 1] for i in range(20)]
    turned = [np.corrcoef(whole[i, ..., ::-1].ravel(), plain[i].ravel())[0, 1] for i in range(20)]
    assert 4 <= np.greater(turned, same).sum() <= 16 and np.maximum(same, turned).min() > 0.6
    x = torch.from_numpy(scenes.image(3, 0))[None]
    half = probe.look(x, None, 0.5)
    assert half.shape[-1] == 12 and torch.equal(half, x[..., 6:18, 6:18] / 255)


def test_the_head_trains_on_the_draws_and_is_tested_on_the_images_themselves(
        toy, tmp_path, monkeypatch):
    path, seen = tmp_path / "b.pt", []
    torch.save(model.export_backbone(model.build("resnet18", 2)), path)
    head = probe.validated
    monkeypatch.setattr(probe, "validated", lambda *a: seen.append(a) or head(*a))
    flags = ["--ckpt", str(path), "--data", toy, "--workers", "0", "--holdout", "0.4",
             "--bootstrap", "0", "--img-size", "24"]
    one, two = probe.main(flags), probe.main([*flags, "--draws", "2"])
    assert one["n_train"] == two["n_train"] and one["value"] != two["value"]
    (_, x, _, x_test, group), (_, x2, _, x2_test, group2) = seen[0], seen[3]
    assert len(x2) == 2 * len(x) and np.array_equal(x_test, x2_test)
    assert np.array_equal(np.sort(group2), np.sort(np.tile(group, 2)))
    assert not (x2[:, None] == x[None]).all(2).any()


def test_show_writes_colours_beside_the_main_directions_of_the_patches(toy, labels, tmp_path):
    import imagecodecs
    scenes = data.SSL4EO(toy, "s1", labels)
    images = data.Images(scenes, [(0, 1), (4, 2)])
    net = model.build("vit_tiny", 2, 24, 4)
    net.size = 24
    probe.show(str(tmp_path / "p"), net, images)
    x = imagecodecs.imread(tmp_path / "p" / f"{scenes.ids[4]}_2.png")
    assert x.shape == (24, 48, 3) and len(os.listdir(tmp_path / "p")) == 2
    assert np.array_equal(x[:, :24].transpose(2, 0, 1), scenes.image(4, 2)[[0, 1, 0]])
    patches = x[:, 24:].reshape(6, 4, 6, 4, 3).swapaxes(1, 2).reshape(36, 16, 3)
    assert (patches == patches[:, :1]).all() and len(np.unique(patches[:, 0], axis=0)) > 20


def test_a_probe_says_when_the_run_is_not_known_and_refuses_scenes_that_the_run_saw(
        toy, tmp_path, capsys):
    path = tmp_path / "b.pt"
    torch.save(model.export_backbone(model.build("resnet18", 2)), path)
    flags = ["--ckpt", str(path), "--data", toy, "--workers", "0", "--bootstrap", "0"]
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
    for damaged in ('{"flags": {"img_size": 1e999}}', '{"flags": {"holdout": "x"}}', "[]", "{"):
        config.write_text(damaged)
        with pytest.raises(ValueError, match="config.json: not a run's config.json"):
            probe.main(flags)


@pytest.mark.parametrize("name", [n for n, (*_, kind) in probe.FLAGS.items()
                                  if isinstance(kind, tuple)])
def test_a_value_out_of_range_is_refused_with_the_range(name, capsys):
    low, high = probe.FLAGS[name][2]
    for value in (low - 1, high + 1, "nan"):
        with pytest.raises(SystemExit):
            probe.main(["--ckpt", "x", f"--{name}={value}"])
        said = capsys.readouterr().err
        assert f"--{name}" in said and (f"{low} to {high}" in said or "invalid int value" in said)
