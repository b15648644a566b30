"""Claims about pretrain.py: flags, order of the data, one step, runs that stop and go on."""
import copy
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import losses
import model
import pretrain
import probe
from conftest import ROOT, TINY, save_backbone, seeded, step_flags, write_pack


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The smallest networks, with fewer blocks."""
    monkeypatch.setitem(model.VITS, "vit_tiny", TINY)
    monkeypatch.setitem(model.RESNETS, "resnet18", dict(depths=(1, 1, 1, 1), bottleneck=False))


# a short training of a small network; `full` is the preset with everything switched on
SMALL = ["--preset", "full", "--img-size", "24", "--patch-size", "6", "--hidden", "32",
         "--batch-size", "8", "--epochs", "4", "--log-every", "1", "--device", "cpu"]
PERA = ["--method", "pera", "--local-size", "12", "--crops", "2", "3", "--prototypes", "64"]


def flags_of(pack, out, *flags):
    return ["--modality", "s1", "--data", pack, "--out", str(out), "--arch", "vit_tiny", *SMALL,
            *map(str, flags)]


def run(pack, out, *flags):
    """Train in this process -> what is in last.pt."""
    pretrain.main(flags_of(pack, out, *flags))
    return torch.load(out / "last.pt", weights_only=True)


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def equal(a, b):
    """Are two states, of tensors, dicts, lists and numbers, the same to the bit?"""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):                       # flags of runs, of which some may change, aside
        names = a.keys() - {"config"}
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in names)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def unlabelled_pack(path, out):
    """A copy of a pack without labels -> its path."""
    rows = Path(path, "images.csv").read_text().splitlines()[1:]
    rows = [row.rpartition(",")[0] + "," for row in rows]
    index = json.loads(Path(path, "pack.json").read_text())
    return write_pack(out, np.load(f"{path}/images.npy"), rows, index)


# ------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize("flags, words", [
    (["--data", "/nowhere"], "/nowhere: .*python data.py pack /nowhere NEW_FOLDER --modality"),
    (["--modality", "s2a"], "--modality s2a: .* has the bands VV VH"),
    (["--img-size", "25"], "image size 25 x 25 is not divisible by patch size 6"),
    (["--batch-size", "1"], "--batch-size 1: not a multiple, 2 or more, of 1 rank"),
    (["--batch-size", "500"], "--batch-size 500: exceeds the 5. training scenes"),
    (["--device", "cuda:77"], "--device cuda:77: "),
    (["--ratios", "0.2", "0.2", "0.6"], "--ratios: has no effect on --method softcon"),
    ([*PERA, "--arch", "resnet18"], "--arch resnet18: --method pera needs a ViT"),
    ([*PERA, "--ratios", "0.5", "0.5", "0.6"], "mask ratios 0.5 0.5 0.6 of 16 patches"),
    (["--method", "pera", "--mask", "0.7"], "unrecognized arguments: --mask 0.7"),
    (["--lr", "nan"], "--lr: nan must lie in 0 to"),
])
def test_flags_that_cannot_be_are_named_in_one_line_and_leave_nothing(
        packs, tmp_path, flags, words, capsys):
    problems = (data.InputError, model.CheckpointError, OSError, SystemExit)
    with pytest.raises(problems) as error:
        run(packs["s1"], tmp_path / "r", *flags)
    line = str(error.value)
    if error.type is SystemExit:                                      # argparse
        line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(words, line) and "\n" not in line and not (tmp_path / "r").exists()


def test_what_is_given_wins_over_the_preset_which_the_number_of_images_chooses(packs, tmp_path):
    flags = ["--modality", "s1", "--data", packs["s1"], "--device", "cpu"]
    args = pretrain.resolve_flags([*flags, "--epochs", "3", "--img-size", "112"])
    expected = pretrain.PRESETS["softcon", "small"] | {"epochs": 3}
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.amp == "off" and args.out == "runs/softcon_s1"
    said = pretrain.describe_run(args, {})
    assert "preset: softcon, small; changed: epochs 3 instead of 8\n" in said
    args = pretrain.resolve_flags([*flags, "--method", "pera", "--preset", "toy"])
    assert args.preset == "toy" and not hasattr(args, "mask_ratio")
    for n, preset in ((19_999, "small"), (20_000, "full")):
        rows = [f"{i},{i},train," for i in range(n)]
        x = np.zeros((n, 2, 1, 1), np.uint8)
        pack = write_pack(tmp_path / preset, x, rows, {"sensor": "s1"})
        assert pretrain.resolve_flags([*flags, "--data", pack]).preset == preset


# ------------------------------------------------------------------------------- order of the data


SCENES = {i: np.arange(10 * i, 10 * i + 4) for i in range(100, 143)}   # five batches and a rest


def batches(rank=0, world=1, start=0, stop=10, scenes=SCENES):
    args = SimpleNamespace(method="softcon", batch_size=8, accum=2, seed=3)
    drawn = pretrain.draw_batches(scenes, args, rank, world, start, stop)
    return [rows.tolist() for rows in drawn]


def test_an_epoch_visits_a_scene_at_most_once_in_an_order_of_its_own():
    one = batches()
    assert len(one) == 20 and {len(rows) for rows in one} == {4}
    order = [[pair[0] // 10 for rows in epoch for pair in rows] for epoch in (one[:10], one[10:])]
    assert len(set(order[0])) == len(set(order[1])) == 40 and order[0] != order[1]
    assert batches(start=3) == one[6:]                                # resuming skips ahead


def test_several_ranks_read_together_what_one_rank_reads():
    pairs = zip(batches(rank=0, world=2), batches(rank=1, world=2), strict=True)
    assert [first + second for first, second in pairs] == batches()


def test_seasons_are_two_different_ones_drawn_anew_in_every_epoch():
    seasons = []
    for epoch in (0, 1):
        rows = sum(batches(start=5 * epoch, stop=5 * epoch + 5), [])
        seasons.append({pair[0] // 10: pair for pair in rows})
        for i, pair in seasons[epoch].items():
            assert set(pair) < set(SCENES[i]) and pair[0] != pair[1]
    both = seasons[0].keys() & seasons[1].keys()
    assert sum(seasons[0][i] != seasons[1][i] for i in both) > len(both) / 2
    alone = batches(stop=1, scenes={i: np.array([i]) for i in range(8)})
    assert all(first == second for first, second in sum(alone, []))


def test_reading_ahead_gives_the_images_and_labels_asked_for_in_order(packs):
    pack = data.open_pack(packs["s2c"])
    rows = [np.random.default_rng(i).integers(0, len(pack.names), (3, 2)) for i in range(11)]
    read = list(pretrain.read_ahead(pack, iter(rows), torch.device("cpu"), threads=3))
    assert len(read) == 11
    for asked, (x, y) in zip(rows, read):
        assert np.array_equal(x, pack.images[asked]) and np.array_equal(y, pack.labels[asked])


def test_training_takes_the_train_split_or_else_the_scenes_that_are_not_held_out(packs):
    pack = data.open_pack(packs["s1"])
    held_out = data.held_out(pack.scenes, 0.4)
    both = np.concatenate(pack.rows[:2])                              # not one after the other
    pack.rows[:2] = [both[::2], both[1::2]]
    scenes = pretrain.scenes_to_train_on(pack, 0.4)
    assert list(scenes) == np.flatnonzero(~held_out).tolist() and 20 < len(scenes) < 50
    assert all(np.array_equal(scenes[i], pack.rows[i]) for i in scenes)
    pack.split = np.full(len(pack.names), "test ")
    pack.split[pack.rows[5]] = ["train", "val", "train", ""]
    pack.split[pack.rows[7]] = "train"
    scenes = pretrain.scenes_to_train_on(pack, 0.4)
    assert list(scenes) == [5, 7] and scenes[5].tolist() == pack.rows[5][[0, 2]].tolist()


# -------------------------------------------------------------------------------- one step, in full


TOTAL = 20                                    # steps that the schedules span, of which six are made


def flags_for_step(method, sensor, arch="vit_tiny"):
    return step_flags(method, sensor=data.SENSORS[sensor], arch=arch, seed=5, clip=8.0, warmup=0.2,
                      drop_path=0.2, weight_decay=[0.1, 0.4], momentum=0.8, grey=0.2)


def random_batch(args, step):
    """Two micro-batches of 4 scenes, with labels that depend on the season."""
    g = seeded(step)
    V = pretrain.VIEWS[args.method]
    batch = []
    for _ in range(2):
        x = torch.randint(256, (4, V, len(args.sensor.bands), 30, 30), generator=g)
        y = torch.rand(4, V, 5, generator=g) < 0.4
        batch.append((x.to(torch.uint8), y.to(torch.uint8)))
    return batch


def generator_of(args, step, micro):
    """The generator of a micro-batch; drop path draws from torch's own, seeded alike."""
    seed = int(np.random.SeedSequence([args.seed, step, micro]).generate_state(1)[0])
    torch.manual_seed(seed)
    return seeded(seed)


def plain_softcon(student, teacher, centre, x, y, args, tau_teacher, g):
    """-> loss, and the shares of the two terms in the gradient at q."""
    B = len(x)
    crops = data.draw_crops(2 * B, g, args.crop_min)
    p = 0 if args.sensor.kind == "radar" else 0.8
    light = data.draw_colours(2 * B, args.sensor, g, p, args.jitter, args.grey)
    patches = losses.block_mask(2 * B, (4, 4), args.mask_ratio, g)
    views = data.colour(data.crop(torch.cat([x[:, 0], x[:, 1]]), crops, 24), light)
    k = F.normalize(teacher(views)[0].detach())
    if args.arch == "vit_tiny":
        q = student(views, patches)[0]
    else:
        q = student(losses.blank_patches(views, patches, 6))[0]
    hard = soft = 0
    for asking, answering in ((0, 1), (1, 0)):
        cosines = F.normalize(q[asking * B:][:B]) @ k[answering * B:][:B].T
        similar = losses.label_similarity(y[:, asking], y[:, answering]).double()
        labelled = y[:, asking].any(1)[:, None] & y[:, answering].any(1)
        hard = hard - (cosines / args.tau).log_softmax(1).diagonal().mean() / 2
        chance = (cosines / args.soft_tau).sigmoid()
        entropy = -similar * chance.log() - (1 - similar) * (1 - chance).log()
        soft = soft + (entropy * labelled).sum() / B / 2
    hard_norm, soft_norm = [torch.autograd.grad(term, q, retain_graph=True)[0].norm()
                            for term in (hard, args.soft_weight * soft)]
    return hard + args.soft_weight * soft, soft_norm / (hard_norm + soft_norm)


def plain_pera(student, teacher, centre, x, y, args, tau_teacher, g):
    """-> loss, and the teacher's mean scores."""
    x = x[:, 0]
    sizes = [(24, args.crop_min, 1.0), (12, 0.05, args.crop_min)]
    seen = [[], [], [], []]                    # views, patches of the student; of the teacher
    for size, low, high in sizes:
        masks = losses.disjoint_masks(2 * len(x), (size // 6) ** 2, *args.ratios, g)
        crops = data.draw_crops(2 * len(x), g, low, high)
        light = data.draw_colours(2 * len(x), args.sensor, g, 0.8, args.jitter, 0.8 * args.grey, 0)
        light_t = data.draw_colours(2 * len(x), args.sensor, g, 0.1, args.jitter, 0, 0)
        pixels = data.crop(torch.cat([x, x]), crops, size)
        pair = (data.colour(pixels, light), masks[0], data.colour(pixels, light_t), masks[2])
        for column, value in zip(seen, pair):
            column.append(value)
        if size == 24:
            guessed_patches = masks[1]
    z, _, guess = student(seen[0], seen[1], guessed_patches)
    z_t = teacher(seen[2], seen[3])[0].detach()
    scores = z @ student.cls_head.prototypes().T
    scores_t = z_t @ teacher.cls_head.prototypes().T.detach()
    target = ((scores_t - centre) / tau_teacher).softmax(1)
    dino = -(target * (scores / args.tau).log_softmax(1)).sum(1).mean()
    koleo = losses.koleo(scores[:4]) + losses.koleo(scores[4:8])
    pixels = losses.patchify(4 * seen[0][0] - 2, 6)
    wanted = torch.stack([row[index] for row, index in zip(pixels, guessed_patches)])
    pixel = 768 * (guess - wanted).square().mean()
    return dino + 0.1 * koleo + 0.01 * pixel, scores_t.mean(0)


def half_cosine(step, start, end, total=TOTAL):
    return end + (start - end) * (1 + math.cos(math.pi * step / total)) / 2


def plain_steps(args, net, steps):
    """The same steps in plain PyTorch -> losses and norms, the networks, centre, moments."""
    student = copy.deepcopy(net.student)
    teacher = copy.deepcopy(net.teacher)
    method = plain_pera if args.method == "pera" else plain_softcon
    betas, eps = ((0.9, 0.999), 2e-5) if args.method == "pera" else ((0.9, 0.95), 1e-8)
    centre = torch.zeros(1, 20)
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in parameters.items()}
    rows = []
    for step in range(steps):
        tau_teacher = [0.03, 0.04, 0.05][min(step, 2)]             # climbs in .15 of 20 steps
        results = []
        for micro, (x, y) in enumerate(random_batch(args, step)):
            g = generator_of(args, step, micro)
            results.append(method(student, teacher, centre, x, y, args, tau_teacher, g))
        loss = (results[0][0] + results[1][0]) / 2
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        rows.append([float(loss.detach()), norm])
        if args.method == "softcon":
            rows[-1].append(float(results[0][1]))

        lr = args.lr * step / 3                                    # a warm-up of .2 of 20 steps
        if step >= 4:
            lr = half_cosine(step - 4, args.lr, 1e-6, TOTAL - 4)
        decay = half_cosine(step, 0.1, 0.4)
        with torch.no_grad():
            for name, gradient in zip(parameters, gradients):
                gradient = gradient * min(1, args.clip / (norm + 1e-6))
                weight = parameters[name]
                mean, square = moments[name]
                mean.mul_(betas[0]).add_((1 - betas[0]) * gradient)
                square.mul_(betas[1]).add_((1 - betas[1]) * gradient.square())
                if weight.dim() > 1:                               # not norms and biases
                    weight.mul_(1 - lr * decay)
                unbiased = square / (1 - betas[1] ** (step + 1))
                weight.sub_(lr * mean / (1 - betas[0] ** (step + 1)) / (unbiased.sqrt() + eps))
            momentum = half_cosine(step, 0.8, 1)
            for name, weight in teacher.named_parameters():
                weight.copy_(momentum * weight + (1 - momentum) * student.get_parameter(name))
        if args.method == "pera":
            centre = 0.9 * centre + 0.1 * (results[0][1] + results[1][1]) / 2
    return rows, student, teacher, centre, moments


@pytest.mark.parametrize("method, sensor, arch, steps", [
    ("softcon", "s2c", "vit_tiny", 6), ("softcon", "s1", "resnet18", 2),
    ("pera", "rgb", "vit_tiny", 6)])
def test_steps_equal_the_same_steps_in_plain_pytorch(method, sensor, arch, steps, float64):
    """Views, pairing of seasons, averages of micro-batches, clipping, AdamW, schedules, teacher."""
    args = flags_for_step(method, sensor, arch)
    torch.manual_seed(0)
    net = pretrain.networks(args, torch.device("cpu"))
    optimiser = pretrain.adamw(net.student, args)
    expected, student, teacher, centre, moments = plain_steps(args, net, steps)
    for step in range(steps):
        values = pretrain.schedules(args, step, TOTAL)
        result = pretrain.train_step(net, optimiser, random_batch(args, step), args, step, values,
                                     measure=True)
        row = [float(result.loss), float(result.gradient_norm)]
        if method == "softcon":
            row.append(result.soft_share)
        assert row == pytest.approx(expected[step], rel=1e-7), step
    norms = [row[1] for row in expected]
    assert args.clip < max(norms) and (steps < 6 or min(norms) < args.clip)
    for network, plain in ((net.student, student), (net.teacher, teacher)):
        torch.testing.assert_close(network.state_dict(), plain.state_dict(), rtol=1e-6, atol=1e-7)
    for name, (mean, square) in moments.items():
        state = optimiser.state[net.student.get_parameter(name)]
        torch.testing.assert_close(state["exp_avg"], mean, rtol=1e-5, atol=1e-12)
        torch.testing.assert_close(state["exp_avg_sq"], square, rtol=1e-5, atol=1e-12)
    assert not any(p.requires_grad for p in net.teacher.parameters())
    if method == "pera":
        assert torch.allclose(net.centre.value, centre, atol=1e-9) and centre.abs().max() > 0.01


@pytest.mark.parametrize("method", ["softcon", "pera"])
def test_a_gradient_that_is_not_finite_stops_before_anything_moves(method):
    args = flags_for_step(method, "s1")
    net = pretrain.networks(args, torch.device("cpu"))
    optimiser = pretrain.adamw(net.student, args)
    values = pretrain.schedules(args, 5, TOTAL)
    pretrain.train_step(net, optimiser, random_batch(args, 0), args, 0, values)
    with torch.no_grad():
        net.student.backbone.cls_token.fill_(math.inf)

    def everything():                             # but batch norms' statistics, which have moved
        parameters = [*net.student.parameters(), *net.teacher.parameters()]
        return [parameters, optimiser.state_dict()["state"], net.centre.state_dict()]

    before = copy.deepcopy(everything())
    with pytest.raises(FloatingPointError, match="step 7: loss nan, gradient norm nan, lr 0.0099"):
        pretrain.train_step(net, optimiser, random_batch(args, 1), args, 7, values)
    assert equal(before, everything())


# ------------------------------------------------------------------------------------------- runs


def test_an_epoch_uses_each_training_chip_once_as_both_views(packs, tmp_path):
    """A pack of chips is one in which `chip` says so; its scenes are the images."""
    shutil.copytree(packs["s1"], tmp_path / "p")
    index = json.loads((tmp_path / "p" / "pack.json").read_text())
    (tmp_path / "p" / "pack.json").write_text(json.dumps(index | {"chip": 24}))
    pack = data.open_pack(str(tmp_path / "p"))
    held_out = data.held_out(pack.scenes, 0.4)
    args = pretrain.resolve_flags(flags_of(pack.path, tmp_path, "--holdout", 0.4))
    assert not any("fewer than a batch" in note for note in args.pack.notes)
    seen = np.concatenate([*pretrain.draw_batches(args.scenes, args, 0, 1, 0,
                                                  len(args.scenes) // 8)])       # (.,2)
    allowed = np.concatenate([rows for i, rows in enumerate(pack.rows) if not held_out[i]])
    assert (seen[:, 0] == seen[:, 1]).all() and len(set(seen[:, 0])) == len(seen)
    assert set(seen[:, 0]) <= set(allowed) and len(allowed) - len(seen) < 8
    flags = flags_of(pack.path, tmp_path, "--holdout", 0.4, "--batch-size", len(allowed))
    note = pretrain.resolve_flags(flags).pack.notes[-1]
    assert note.startswith(f"the chips come from {(~held_out).sum()} images, fewer than a batch")


def test_a_run_leaves_four_files_which_say_what_it_was(packs, tmp_path, capsys):
    out = tmp_path / "r"
    state = run(packs["s2c"], out, "--modality", "s2c", "--holdout", 0.5, "--epochs", 1)
    assert sorted(os.listdir(out)) == ["backbone.pt", "config.json", "last.pt", "log.jsonl"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"next: python probe.py --ckpt {out}/backbone.pt"
    pack = data.open_pack(packs["s2c"])
    scenes = len(pretrain.scenes_to_train_on(pack, 0.5))
    facts = {"path": os.path.abspath(packs["s2c"]), "checksum": pack.checksum, "images": 240,
             "training_images": 4 * scenes, "labels_from": pack.labels_from, "labels_used": True}
    assert {f"{name}: {value}" for name, value in facts.items()} < set(printed)
    config = json.loads((out / "config.json").read_text())
    assert facts.items() <= config["pack"].items() and state["config"] == config
    assert config["flags"]["epochs"] == 1 and config["sensor"]["bands"] == pack.sensor.bands

    log = read_log(out)
    assert [row["step"] for row in log] == list(range(1, scenes // 8 + 1))
    assert state["step"] == len(log) and log[-1]["epoch"] == 1
    for row in log:
        assert abs(row["loss"] - row["info_nce"] - 0.1 * row["soft"]) < 1e-5
        assert 0 < row["soft_share"] < 1 and 0 <= row["data_wait"] <= 1
    assert {"lr", "weight_decay", "momentum", "gradient_norm", "feature_std", "effective_rank",
            "images_per_s", "peak_memory_gb"} < set(log[0])
    backbone = torch.load(out / "backbone.pt", weights_only=True)
    assert all(torch.equal(v, state["teacher"][f"backbone.{k}"]) for k, v in backbone.items())
    assert not torch.equal(backbone["cls_token"], state["student"]["backbone.cls_token"])


def test_knn_in_the_log_is_what_the_probe_says_of_held_out_images_that_it_does_not_test(
        packs, tmp_path, capsys):
    """Each checkpoint's line has it, and looking changes no weight."""
    out = tmp_path / "r"
    state = run(packs["s1"], out, "--holdout", 0.5, "--max-steps", 3, "--save-every", 2)
    log = read_log(out)
    assert ["knn" in row for row in log] == [False, True, True]
    assert f"step 3: k-NN on held-out scenes {log[2]['knn']:.4f}" in capsys.readouterr().out
    pack = data.open_pack(packs["s1"])
    shares = {"learn": (0.375, 0.5), "judge": (0.25, 0.375)}       # of the hashes of scenes' names
    for part, (low, high) in shares.items():
        scenes = [name for name in pack.scenes if low <= zlib.crc32(name.encode()) / 2**32 < high]
        (tmp_path / part).write_text("\n".join(scenes))
    report = probe.main(["--ckpt", f"{out}/backbone.pt", "--data", packs["s1"], "--protocol",
                         "knn", "--lists", f"{tmp_path}/learn", f"{tmp_path}/judge"])
    assert abs(report["value"] - log[2]["knn"]) < 1e-4
    blind = unlabelled_pack(packs["s1"], tmp_path / "blind")
    flags = ["--holdout", 0.5, "--max-steps", 3, "--soft-weight", 0]
    watched, unwatched = [run(where, tmp_path / name, *flags) for where, name in
                          ((packs["s1"], "a"), (blind, "b"))]
    assert equal(watched, unwatched)
    assert "knn" not in read_log(tmp_path / "b")[-1] and state["step"] == 3


@pytest.mark.parametrize("flags", [
    ["--accum", 2],
    [*PERA, "--accum", 2, "--drop-path", 0.3]], ids=["softcon", "pera"])
def test_k_steps_resume_and_k_steps_equal_2k_steps_bit_for_bit(packs, tmp_path, flags):
    """Also if the first steps are asked to resume, where nothing is yet.  Another seed differs."""
    whole = run(packs["s1"], tmp_path / "a", *flags, "--max-steps", 4)
    run(packs["s1"], tmp_path / "b", *flags, "--max-steps", 2, "--resume")
    with open(tmp_path / "b" / "log.jsonl", "a") as log:
        log.write('{"step": 3, "loss": 0.0}\n{"step": 4, "lo')        # as a kill leaves it
    resumed = run(packs["s1"], tmp_path / "b", *flags, "--max-steps", 4, "--resume")
    assert resumed["step"] == 4 and equal(whole, resumed)
    logs = [[row["loss"] for row in read_log(tmp_path / name)] for name in "ab"]
    assert logs[0] == logs[1] and len(logs[0]) == 4
    run(packs["s1"], tmp_path / "c", *flags, "--max-steps", 1, "--seed", 1)
    assert read_log(tmp_path / "c")[0]["loss"] != logs[0][0]
    if "pera" in flags:
        assert whole["centre"]["value"].abs().max() > 0
        assert not [name for name in whole["teacher"] if "gamma" in name or "register" in name]


def test_a_run_is_never_overwritten_and_resumes_only_with_its_own_flags(packs, tmp_path):
    out = tmp_path / "r"
    run(packs["s1"], out, "--max-steps", 1)
    before = (out / "last.pt").read_bytes()
    for flags, words in (
            ([], "--out .*r: holds a run; --resume continues it"),
            (["--resume", "--tau", 0.1], "flags: tau 0.1, but the run in .*r has 0.2"),
            (["--resume", "--seed", 1], "flags: seed 1, but the run in .*r has 0"),
            (["--resume", "--holdout", 0.2], "flags: holdout 0.2, but the run in .*r has 0.1")):
        with pytest.raises(data.InputError, match=words):
            run(packs["s1"], out, *flags)
        assert (out / "last.pt").read_bytes() == before
    state = torch.load(out / "last.pt", weights_only=True)
    state["config"]["sensor"]["offset"] = 1.0
    torch.save(state, out / "last.pt")
    with pytest.raises(data.InputError, match="sensor: offset 0.0, but the run in .*r has 1.0"):
        run(packs["s1"], out, "--resume")
    (out / "last.pt").write_bytes(before[:-1000])
    with pytest.raises(data.InputError, match="r/last.pt: no whole checkpoint of a run"):
        run(packs["s1"], out, "--resume")


def test_a_full_disk_is_said_in_one_line_and_leaves_the_old_checkpoint(packs, tmp_path):
    """/dev/full, where every write fails for want of space, in place of the file beside."""
    out = tmp_path / "r"
    run(packs["s1"], out, "--max-steps", 1)
    before = (out / "last.pt").read_bytes()
    for name in ("config.json", "log.jsonl", "backbone.pt", "last.pt"):
        (out / f"{name}.part").symlink_to("/dev/full")
        with pytest.raises(OSError, match=f"r/{name}.part: not written .No space left") as error:
            run(packs["s1"], out, "--max-steps", 2, "--resume")
        assert "\n" not in str(error.value) and (out / "last.pt").read_bytes() == before
        (out / f"{name}.part").unlink()


def test_a_run_starts_from_the_file_named_with_its_layerscale_and_registers(
        packs, tmp_path, capsys):
    """PerA's ViTs have neither; a rate of 0 leaves the weights as they are."""
    init = save_backbone(tmp_path / "dinov2.pth", "vit_tiny", 3, 24, 6, 2)
    flags = [*PERA, "--init", init, "--max-steps", 1, "--lr", 0, "--modality", "s2c", "--adapt",
             "rgb"]
    backbones = [torch.load(init, weights_only=True)]
    for more in ([], ["--init-norm", "half"]):
        run(packs["s2c"], tmp_path / f"r{len(more)}", *flags, *more)
        assert ("--init-norm imagenet|half" in capsys.readouterr().out) == (more == [])
        backbones.append(torch.load(tmp_path / f"r{len(more)}/backbone.pt", weights_only=True))
    expected, plain, folded = backbones
    for name in ("blocks.1.ls1.gamma", "register_tokens", "blocks.1.mlp.fc1.weight"):
        assert torch.equal(plain[name], expected[name])
    first = "patch_embed.proj.weight"
    assert torch.allclose(plain[first][:, 3], expected[first][:, 0])
    assert torch.allclose(folded[first][:, 3], 2 * plain[first][:, 3])         # (x - .5) / .5


def test_a_pack_without_labels_trains_on_info_nce_alone(packs, tmp_path, capsys):
    pack = unlabelled_pack(packs["s1"], tmp_path / "pack")
    state = run(pack, tmp_path / "r", "--max-steps", 1)
    assert "labels_used: False" in capsys.readouterr().out.splitlines()
    row, = read_log(tmp_path / "r")
    assert row["soft"] == row["soft_share"] == 0 and row["loss"] == row["info_nce"]
    assert state["config"]["pack"]["labels_used"] is False


# ----------------------------------------------------------------------------- the script itself
# with the tiny network
SCRIPT = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import model
model.VITS["vit_tiny"] = {TINY}
sys.argv[0] = "pretrain.py"
runpy.run_path({str(ROOT / "pretrain.py")!r}, run_name="__main__")
"""


def start_script(pack, out, *flags):
    command = [sys.executable, "-c", SCRIPT, *flags_of(pack, out, *flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_run_that_is_killed_then_stopped_then_goes_on_ends_in_the_same_bits(packs, tmp_path):
    """SIGKILL while it trains; what resumes it gets SIGTERM."""
    out = tmp_path / "r"
    flags = ["--epochs", 1000, "--save-every", 3, "--resume"]
    saved = 0
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = start_script(packs["s1"], out, *flags)
        while not (out / "last.pt").exists() or len(read_log(out)) < saved + 5:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.send_signal(number)
        printed, complaints = process.communicate()
        saved = torch.load(out / "last.pt", weights_only=True)["step"]
        if number == signal.SIGKILL:
            assert process.returncode == -number and saved % 3 == 0
    assert process.returncode == 0, complaints
    assert printed.splitlines()[-1] == (f"stopped at step {saved}, saved; the same command with "
                                        f"--resume goes on")
    assert read_log(out)[-1]["step"] == saved
    flags += ["--max-steps", saved + 1]
    assert equal(*[run(packs["s1"], tmp_path / name, *flags) for name in ("r", "whole")])


def test_the_script_ends_with_one_line_for_what_a_user_did(tmp_path):
    _, complaints = start_script("/nowhere", tmp_path / "r").communicate()
    assert re.fullmatch("pretrain.py: error: /nowhere: no pack.*\n", complaints)
