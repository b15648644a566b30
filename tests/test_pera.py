"""Claims about PerA: masks, losses, the sparse forward pass, schedules, runs, refusals."""
import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import data
import losses
import model as models
import pretrain
from conftest import ROOT, SMALL
from test_pretrain import equal

PERA = ["--method", "pera", "--arch", "vit_tiny", *SMALL, "--local-size", "12", "--crops", "2", "3",
        "--prototypes", "64", "--batch-size", "4"]


def run(toy, out, *flags, modality="s1"):
    pretrain.main(["--modality", modality, "--data", toy, *PERA, "--out", str(out),
                   *map(str, flags)])
    return torch.load(out / "last.pt", weights_only=True)


# ------------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("n, counts", [(784, (157, 157, 470)), (256, (51, 51, 154)),
                                       (64, (13, 13, 38)), (36, (7, 7, 22)), (49, (10, 10, 29)),
                                       (5, (1, 1, 3))])
def test_masks_are_disjoint_sorted_and_have_peras_counts(n, counts):
    parts = losses.disjoint_masks(50, n, generator=torch.Generator().manual_seed(0))
    assert tuple(p.shape[1] for p in parts) == counts and sum(counts) == n
    for row in torch.cat(parts, 1):
        assert row.unique().numel() == n
    assert all((p.diff(dim=1) > 0).all() for p in parts)


def test_masks_are_uniform_over_positions_and_follow_the_seed_alone():
    def draw(seed):
        return losses.disjoint_masks(20000, 36, generator=torch.Generator().manual_seed(seed))
    for part in draw(0):
        seen = torch.bincount(part.flatten(), minlength=36).double()
        p = part.shape[1] / 36                     # each position is a Binomial(20000, p)
        chi2 = ((seen - 20000 * p) ** 2 / (20000 * p * (1 - p))).sum() * 35 / 36
        assert chi2 < 75                           # 35 degrees of freedom: exceeded once in 10,000
    assert all(torch.equal(a, b) for a, b in zip(draw(3), draw(3)))
    assert not torch.equal(draw(3)[0], draw(4)[0])


def test_ratios_below_one_leave_patches_to_nobody():
    parts = losses.disjoint_masks(3, 100, 0.1, 0.3, 0.4)
    assert [p.shape[1] for p in parts] == [10, 30, 40]
    assert all(r.unique().numel() == 80 for r in torch.cat(parts, 1))


@pytest.mark.parametrize("n, ratios", [(36, (0.5, 0.3, 0.3)), (4, (0.1, 0.3, 0.6)),
                                       (36, (0.2, 0.0, 0.8)), (36, (0.4, 0.6, 0.0))])
def test_ratios_that_do_not_fit_are_named(n, ratios):
    with pytest.raises(ValueError, match=f"mask ratios {ratios[0]} {ratios[1]} .* of {n} patches"):
        losses.disjoint_masks(1, n, *ratios)


# ----------------------------------------------------------------------------------------- losses


def test_dino_loss_and_centre_follow_the_formulas_over_several_steps():
    g = torch.Generator().manual_seed(0)
    centre, c = losses.Centre(7).double(), np.zeros(7)
    for tau in (0.03, 0.04, 0.05):
        s, t = torch.randn(2, 5, 7, generator=g).double()
        want = 0.0
        for i in range(5):
            p_t = np.exp((t[i].numpy() - c) / tau)
            p_s = np.exp(s[i].numpy() / 0.1)
            want -= (p_t / p_t.sum() * np.log(p_s / p_s.sum())).sum() / 5
        assert abs(float(losses.dino_loss(s, t, centre.value, tau)) - want) < 1e-9
        centre.update(t)
        c = 0.9 * c + 0.1 * t.mean(0).numpy()
    assert np.allclose(centre.value[0].numpy(), c, atol=1e-12)


def test_koleo_is_the_log_distance_to_the_nearest_normalised_neighbour():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
    u = (x / x.norm(dim=1, keepdim=True)).numpy()
    near = [min(np.linalg.norm(u[i] - u[j]) for j in range(6) if j != i) for i in range(6)]
    assert abs(float(losses.koleo(x)) + np.mean(np.log(near))) < 1e-6
    same = torch.ones(3, 4, requires_grad=True)
    losses.koleo(same).backward()
    assert torch.isfinite(same.grad).all()
    with pytest.raises(ValueError, match="at least 2"):
        losses.koleo(x[:1])


def test_pixel_loss_is_peras_sum_over_16_by_16_rgb_patches():
    x = torch.rand(2, 3, 32, 48).double()
    learn, guess = torch.tensor([[0, 5], [2, 3]]), torch.rand(2, 2, 768).double()
    want = 0.0
    for b in range(2):
        for m in range(2):
            r, c = divmod(int(learn[b, m]), 3)
            patch = x[b, :, 16 * r:16 * r + 16, 16 * c:16 * c + 16]
            value = guess[b, m].reshape(16, 16, 3)                      # row, column, channel
            want += ((value - patch.permute(1, 2, 0)) ** 2).sum() / 4
    assert abs(float(losses.pixel_loss(guess, losses.patchify(x, 16), learn) - want)) < 1e-9


def test_pera_loss_adds_up_crop_by_crop_with_the_gradients_of_the_whole():
    """Re-stated with all scores at once: dino as mean over crops, koleo summed over global ones."""
    g = torch.Generator().manual_seed(0)
    s, t = (F.normalize(torch.randn(15, 8, generator=g).double()) for _ in "st")     # 5 crops of 3
    a, b = (torch.randn(20, 8, generator=g).double() for _ in "ab")
    s.requires_grad_(), a.requires_grad_()
    centre = torch.randn(1, 20, generator=g).double()
    running = losses.Centre(20).double()
    running.value = centre.clone()
    dino, spread = losses.pera_loss(s, t, (a, b), running.value, 0.04, 5, 2, 0.3)
    running.update(torch.randn(9, 20, generator=g).double())   # must not reach the backward pass
    got = torch.autograd.grad(dino + 0.1 * spread, (s, a))
    x, y = s @ a.T, t @ b.T
    plain = losses.dino_loss(x, y, centre, 0.04, 0.3)       # equal crops: the mean of the means
    near = losses.koleo(x[:3]) + losses.koleo(x[3:6])
    want = torch.autograd.grad(plain + 0.1 * near, (s, a))
    assert torch.allclose(dino, plain, atol=1e-12) and torch.allclose(spread, near, atol=1e-12)
    assert all(torch.allclose(u, v, atol=1e-12) for u, v in zip(got, want))


def rank_of_two(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    centre = losses.Centre(5)
    for x in scores():
        centre.update(x[3 * rank:3 * rank + 3])
    torch.save(centre.value, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def scores():
    return torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(2))


def test_the_centre_of_two_ranks_is_that_of_one(tmp_path):
    mp.spawn(rank_of_two, (str(tmp_path),), nprocs=2)
    centre = losses.Centre(5)
    for x in scores():
        centre.update(x)
    for r in (0, 1):
        assert torch.allclose(torch.load(tmp_path / f"{r}.pt"), centre.value, atol=1e-6)


# ---------------------------------------------------------------------------------------- network


def test_the_sparse_student_equals_a_plain_one_crop_at_a_time_restatement():
    """Full grids, a boolean attention mask instead of dropped tokens, mask tokens in raster order
    from the middle block on: the CLS features and guesses are the same."""
    torch.manual_seed(0)
    net = models.SparseBranch(models.build("vit_tiny", 2, 24, 6, layerscale=False), 32, 48,
                              predict=True).eval().double()
    vit, n = net.backbone, 16
    torch.nn.init.normal_(vit.pos_embed)
    crops = [torch.rand(3, 2, 24, 24).double(), torch.rand(4, 2, 12, 12).double()]
    keep, learn, _ = losses.disjoint_masks(3, n)
    local = losses.disjoint_masks(4, 4)[0]
    z, cls, guess = net(crops, [keep, local], learn)

    def attend(block, x, alive):                                        # x (17,D), alive (17,)
        q, k, v = block.attn.qkv(block.norm1(x)).reshape(-1, 3, 3, 64).permute(1, 2, 0, 3)
        a = (q @ k.mT / 8).masked_fill(~alive, -torch.inf).softmax(-1) @ v
        x = x + block.attn.proj(a.permute(1, 0, 2).reshape(len(x), -1))
        return x + block.mlp(block.norm2(x))
    for b in range(3):
        pixels = F.conv2d(crops[0][b], vit.patch_embed["proj"].weight, vit.patch_embed["proj"].bias,
                          stride=6).flatten(1).T                        # (16,D)
        hidden = torch.ones(n, dtype=torch.bool)
        hidden[keep[b]] = False
        x = torch.cat([vit.cls_token[0], torch.where(hidden[:, None], net.mask_token[0], pixels)])
        x = x + vit.pos_embed[0]
        fresh, alive = x.clone(), torch.cat([torch.tensor([True]), ~hidden])
        for i, block in enumerate(vit.blocks):
            if i == 6:
                x[1 + learn[b]], alive = fresh[1 + learn[b]], alive.clone()
                alive[1 + learn[b]] = True
            x = attend(block, x, alive)
        x = vit.norm(x)
        assert torch.allclose(cls[b], x[0], atol=1e-9)
        want = net.pred_head(x[1 + learn[b]]) @ net.pred_head.prototypes().T
        assert torch.allclose(guess[b], want, atol=1e-9)
    assert torch.allclose(cls[3:], vit(crops[1], local), atol=1e-9) and guess.shape == (3, 3, 72)
    assert torch.allclose(z.norm(dim=1), z.new_ones(7), atol=1e-9)


def test_neither_side_ever_computes_what_it_does_not_see():
    net = models.SparseBranch(models.build("vit_tiny", 2, 24, 6), 32, 48, predict=True).eval()
    lengths = []
    for block in net.backbone.blocks:
        block.register_forward_pre_hook(lambda m, args: lengths.append(len(args[0])))
    student, learn, teacher = losses.disjoint_masks(2, 16)
    net([torch.rand(2, 2, 24, 24)], [student], learn)
    assert lengths == [2 * (1 + 3)] * 6 + [2 * (1 + 3 + 3)] * 6
    lengths.clear()
    net([torch.rand(2, 2, 24, 24)], [teacher])
    assert lengths == [2 * (1 + 10)] * 12
    x = torch.rand(2, 2, 24, 24)
    blank = losses.blank_patches(x, teacher, 6)       # what only the student sees is free
    assert torch.equal(net([x], [teacher])[1], net([blank], [teacher])[1])


def test_prototype_rows_have_trainable_length_one_at_the_start():
    head = models.PrototypeHead(12, 30, 16)
    assert torch.allclose(head.prototypes().norm(dim=1), torch.ones(30), atol=1e-6)
    assert head(torch.randn(4, 12)).shape == (4, 384) and head.weight_g.requires_grad


# -------------------------------------------------------------------------------- schedules, runs


def test_schedules_meet_peras_published_numbers_at_their_ends():
    """200 epochs of 50 steps: lr 0 -> 1e-3 in 20 epochs -> 1e-6, weight decay .04 -> .2, momentum
    .992 -> 1, teacher temperature .03 -> .05 in 30 epochs, then still."""
    args = pretrain.parse(["--modality", "rgb", "--method", "pera", "--data", "x"])
    total = args.epochs * 50
    lr = [pretrain.schedule(t, total, args.lr, 1e-6, round(args.warmup * total))
          for t in range(total + 1)]
    assert lr[0] == 0 and lr[999] == lr[1000] == max(lr) == 1e-3 and abs(lr[total] - 1e-6) < 1e-12
    wd = [pretrain.schedule(t, total, *args.weight_decay) for t in (0, total // 2, total)]
    assert np.allclose(wd, [0.04, 0.12, 0.2])
    momentum = [pretrain.schedule(t, total, args.momentum, 1) for t in (0, total)]
    assert np.allclose(momentum, [0.992, 1])
    first, last = args.teacher_tau
    tau = [pretrain.schedule(t, total, last, last, 1500, first) for t in (0, 1499, 1500, total)]
    assert np.allclose(tau, [0.03, 0.05, 0.05, 0.05])
    assert (args.drop_path, args.prototypes, args.crops, args.clip) == (0.3, 131072, [2, 8], 3.0)
    assert args.ratios == [0.2, 0.2, 0.6] and args.local_size == 96 and args.crop_min == 0.4


def test_the_views_of_a_pair_share_the_crop_and_differ_in_colour(monkeypatch):
    """With colours switched off student and teacher get the same pixels; with them on, not."""
    args = pretrain.parse(["--modality", "s2c", "--method", "pera", "--crops", "2", "8"])
    x = torch.randint(256, (3, 1, 13, 36, 36), dtype=torch.uint8)
    seen = {}

    class Stop(Exception):
        pass

    def spy(side):
        def call(crops, *_):
            seen[side] = crops
            if side == "student":
                raise Stop
            return None, None, None
        return call
    net = type("Net", (), {"teacher": staticmethod(spy("teacher")),
                           "ddp": staticmethod(spy("student"))})
    for jitter in (0.0, 0.4):
        args.jitter = args.grey = jitter
        with pytest.raises(Stop):
            pretrain.pera_step(net, x, x[:, :, :1, 0, 0], args, pretrain.Dice(0, 0, 0, 0, 1), {})
        same = [torch.equal(a, b) for a, b in zip(seen["student"], seen["teacher"])]
        assert same == [jitter == 0] * 2
        assert [v.shape for v in seen["student"]] == [(6, 13, 32, 32), (24, 13, 16, 16)]


def test_a_step_wires_views_masks_targets_temperatures_and_centre_as_published(monkeypatch):
    """What reaches the networks and the losses in one real step."""
    args = pretrain.parse(["--modality", "s1", *PERA, "--tau", "0.2"])
    args.amp, seen = "off", {}
    student = models.SparseBranch(models.build("vit_tiny", 2, 24, 6), 64, 32, predict=True)
    teacher = models.SparseBranch(models.build("vit_tiny", 2, 24, 6), 64, 32)
    start = torch.randn(1, 64)
    centre = losses.Centre(64)
    centre.value = start

    def spy(name, function):
        def call(*inputs):
            seen.setdefault(name, []).append(inputs)
            return function(*inputs)
        return call
    net = type("Net", (), {"student": student, "ddp": staticmethod(spy("student", student)),
                           "teacher": teacher, "centre": centre})
    teacher.forward = spy("teacher", teacher.forward)
    for module, name in ((losses, "pera_loss"), (losses, "pixel_loss"), (data, "draw_crops"),
                         (data, "draw_colours")):
        monkeypatch.setattr(module, name, spy(name, getattr(module, name)))
    x = torch.randint(256, (4, 1, 2, 24, 24), dtype=torch.uint8)
    pretrain.pera_step(net, x, torch.zeros(4, 1, 9), args, pretrain.Dice(0, 0, 0, 0, 1),
                       {"teacher_tau": 0.04})
    mine, keep, learn = seen["student"][0]
    theirs, others = seen["teacher"][0]
    for a, b, extra in zip(keep, others, ([learn], [])):                   # global, local crops
        for rows in zip(a, b, *(e for e in extra)):
            assert torch.cat(rows).unique().numel() == sum(map(len, rows))
    assert [k.shape for k in keep] == [(8, 3), (12, 1)] and others[0].shape == (8, 10)
    assert [c[2:] for c in seen["draw_crops"]] == [(0.4, 1.0), (0.05, 0.4)]
    assert [(c[3], c[5], c[6]) for c in seen["draw_colours"]] == [
        (0.8, pytest.approx(0.08), 0), (0.1, 0, 0)] * 2                    # student, teacher
    _, pixels, asked = seen["pixel_loss"][0]
    assert torch.equal(pixels, losses.patchify(4 * (mine[0] - 0.5), 6)) and asked is learn
    used = seen["pera_loss"][0]
    assert used[3] is start and used[4:] == (0.04, 5, 2, 0.2)
    scores = used[1].mean(0) @ teacher.cls_head.prototypes().T
    assert torch.allclose(centre.value, 0.9 * start + 0.1 * scores, atol=1e-5)


def test_a_runs_schedules_are_logged_with_peras_numbers(toy, tmp_path):
    run(toy, tmp_path / "r", "--crops", 1, 0, "--epochs", 2)                # 28 steps, warm-up 3
    log = [json.loads(x) for x in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    lr, wd, m, tau = ([x[k] for x in log] for k in ("lr", "weight_decay", "momentum",
                                                   "teacher_tau"))
    assert len(log) == 28 and lr[0] == 0 and lr[2] == lr[3] == 1e-3 and lr[-1] < 1e-5
    assert wd[0] == 0.04 and 0.198 < wd[-1] < 0.2 and m[0] == 0.992 and 0.9999 < m[-1] < 1
    assert tau[0] == 0.03 and tau[3] == tau[-1] == 0.05 and abs(tau[1] - 0.03 - 0.02 / 3) < 1e-6


def test_the_teacher_gets_no_gradient_and_moves_by_one_minus_m_of_the_difference(toy, tmp_path):
    state = run(toy, tmp_path / "r", "--max-steps", 1, "--momentum", 0.75, "--warmup", 0)
    torch.manual_seed(0)
    start = models.SparseBranch(models.build("vit_tiny", 2, 24, 6, drop_path=0.3, layerscale=False),
                                64, 32, predict=True).state_dict()
    assert set(start) - set(state["teacher"]) == {k for k in start if k.startswith(
        ("pred_head", "mask_token"))}
    for k, t in state["teacher"].items():
        assert torch.allclose(t, 0.75 * start[k] + 0.25 * state["student"][k], atol=1e-6), k
    assert not torch.equal(state["student"]["cls_head.weight_v"], start["cls_head.weight_v"])


def test_k_steps_resume_and_k_steps_equal_2k_steps_bit_for_bit(toy, tmp_path):
    """With drop path, accumulation and the soft term on; the centre is part of the checkpoint."""
    flags = ["--accum", 2, "--soft-weight", 0.3]
    whole = run(toy, tmp_path / "a", *flags, "--max-steps", 4)
    run(toy, tmp_path / "b", *flags, "--max-steps", 2)
    parts = run(toy, tmp_path / "b", *flags, "--max-steps", 4, "--resume")
    assert equal(whole, parts) and whole["centre"]["value"].abs().max() > 0
    log = [json.loads(x) for x in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert {"loss", "dino", "koleo", "pixel", "soft", "soft_share", "teacher_tau",
            "weight_decay"} < set(log[0])
    want = [x["dino"] + 0.1 * x["koleo"] + 0.01 * x["pixel"] + 0.3 * x["soft"] for x in log]
    assert np.allclose(want, [x["loss"] for x in log], atol=1e-4)


def test_the_students_temperature_is_the_flags(toy, tmp_path):
    logs = []
    for tau in ("0.1", "1"):
        run(toy, tmp_path / tau, "--max-steps", 1, "--crops", 1, 0, "--tau", tau)
        logs.append(json.loads((tmp_path / tau / "log.jsonl").read_text()))
    assert logs[0]["dino"] != logs[1]["dino"] and logs[0]["koleo"] == logs[1]["koleo"]


def test_guesses_of_hidden_pixels_improve_on_held_out_images(toy, tmp_path):
    run(toy, tmp_path / "r", "--crops", 1, 0, "--epochs", 5, "--lr", 1e-3)
    scenes = data.SSL4EO(toy, "s1", f"{toy}/ssl4eo_multilabel.json")
    x = torch.from_numpy(np.stack([scenes.image(i, 0) for i in np.flatnonzero(
        data.held_out(scenes.ids, 0.1))])) / 255
    keep, learn, _ = losses.disjoint_masks(len(x), 16, generator=torch.Generator().manual_seed(0))
    pixels = losses.patchify(4 * (x - 0.5), 6)
    torch.manual_seed(0)
    net = models.SparseBranch(models.build("vit_tiny", 2, 24, 6, layerscale=False), 64, 32,
                              predict=True).eval()
    errors = []
    for state in (None, torch.load(tmp_path / "r" / "last.pt", weights_only=True)["student"]):
        if state:
            net.load_state_dict(state)
        with torch.no_grad():
            guess = net([x], [keep], learn)[2]
        errors.append(float(losses.pixel_loss(guess, pixels, learn)))
    assert errors[1] < 0.9 * errors[0]


def test_layerscale_comes_with_the_init_file_and_not_otherwise(toy, tmp_path):
    path = tmp_path / "dinov2.pth"
    torch.save(models.export_backbone(models.build("vit_tiny", 3, 28, 14, registers=2)), path)
    state = run(toy, tmp_path / "a", "--init", path, "--img-size", 28, "--patch-size", 14,
                "--local-size", 0, "--crops", 2, 0, "--ratios", 0.25, 0.25, 0.5, "--max-steps", 1)
    assert "backbone.blocks.0.ls1.gamma" in state["student"]
    assert "backbone.register_tokens" in state["student"]
    plain = run(toy, tmp_path / "b", "--max-steps", 1)["student"]
    assert not [k for k in plain if "gamma" in k or k == "backbone.mask_token"]


def test_the_script_on_two_ranks_follows_one_rank_up_to_koleo(toy, tmp_path):
    """KoLeo looks for neighbours within a rank, as released; views, masks, dino, pixels agree."""
    logs = []
    for n in ("1", "2"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc-per-node", n, str(ROOT / "pretrain.py"), "--modality", "s1", "--data",
                   toy, *PERA, "--drop-path", "0", "--soft-weight", "0.1", "--max-steps", "1",
                   "--out", str(tmp_path / n)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        logs.append(json.loads((tmp_path / n / "log.jsonl").read_text()))
    for key in ("dino", "pixel", "soft"):
        assert abs(logs[0][key] - logs[1][key]) < 1e-4 * logs[0][key], key


@pytest.mark.parametrize("flags, message", [
    (["--arch", "resnet18"], "--method pera takes a ViT"),
    (["--batch-size", "1"], "pera needs at least 2 scenes at a time on each rank"),
    (["--ratios", "0.5", "0.5", "0.6"], "mask ratios 0.5 0.5 0.6 of 16 patches"),
    (["--ratios", "0.01", "0.39", "0.6"], "mask ratios 0.01 .* each part needs at least one"),
    (["--local-size", "13"], "image size 13 x 13 is not divisible by patch size 6"),
    (["--local-size", "6"], "of 1 patches"),
    (["--local-size", "30"], "--local-size 30: exceeds --img-size 24"),
    (["--crops", "0", "8"], "--crops 0 8"),
])
def test_bad_flags_are_named_and_leave_nothing_behind(toy, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message) as error:
        pretrain.main(["--modality", "s1", "--data", toy, *PERA, "--out", str(tmp_path / "r"),
                       *flags])
    assert "\n" not in str(error.value) and not (tmp_path / "r").exists()


def test_ema_of_a_copy_follows_only_what_the_teacher_has():
    net = models.SparseBranch(models.build("vit_tiny", 2, 24, 6), 8, 8, predict=True)
    teacher = copy.deepcopy(net)
    teacher.pred_head = teacher.mask_token = None
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    models.ema_update(teacher, net, 0.75)
    for name, p in teacher.named_parameters():
        assert torch.allclose(p, net.get_parameter(name) - 0.75, atol=1e-5), name


@pytest.mark.parametrize("flag, value", [("--prototypes", "0"), ("--drop-path", "1.0"),
                                         ("--jitter", "3.0"), ("--crop-min", "2.0"),
                                         ("--lr", "-1.0"), ("--workers", "-1")])
def test_values_out_of_range_are_refused_by_flag(flag, value, capsys):
    with pytest.raises(SystemExit):
        pretrain.parse(["--modality", "s1", *PERA, flag, value])
    assert f"{flag} {value}: must lie in" in capsys.readouterr().err
