"""Claims about PerA: masks, losses, the sparse forward pass, schedules, runs, refusals."""
import copy
import inspect
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import losses
import model as models
import pretrain
from conftest import SMALL
from lab.kill import equal

PERA = ["--method", "pera", "--arch", "vit_tiny", *SMALL, "--local-size", "12", "--crops", "2", "3",
        "--prototypes", "64", "--batch-size", "4"]


def run(toy, out, *flags):
    """Train into the folder `out`; returns its checkpoint."""
    pretrain.main(["--modality", "s1", "--data", toy, *PERA, "--out", str(out), *map(str, flags)])
    return torch.load(out / "last.pt", weights_only=True)


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("n, counts", [(784, (157, 157, 470)), (256, (51, 51, 154)),
                                       (64, (13, 13, 38)), (36, (7, 7, 22)), (49, (10, 10, 29)),
                                       (5, (1, 1, 3))])
def test_masks_are_disjoint_sorted_and_have_peras_counts(n, counts):
    parts = losses.disjoint_masks(50, n, generator=seeded())
    assert tuple(part.shape[1] for part in parts) == counts
    assert sum(counts) == n
    for row in torch.cat(parts, 1):
        assert row.unique().numel() == n
    for part in parts:
        assert (part.diff(dim=1) > 0).all()


def test_masks_are_uniform_over_positions_and_follow_the_seed_alone():
    def draw(seed):
        return losses.disjoint_masks(20000, 36, generator=seeded(seed))

    for part in draw(0):
        seen = torch.bincount(part.flatten(), minlength=36).double()
        p = part.shape[1] / 36                     # each position is a Binomial(20000, p)
        chi2 = ((seen - 20000 * p) ** 2 / (20000 * p * (1 - p))).sum() * 35 / 36
        assert chi2 < 75                           # 35 degrees of freedom: exceeded once in 10,000
    assert equal(draw(3), draw(3))
    assert not torch.equal(draw(3)[0], draw(4)[0])


def test_ratios_below_one_leave_patches_to_nobody():
    parts = losses.disjoint_masks(3, 100, 0.1, 0.3, 0.4)
    assert [part.shape[1] for part in parts] == [10, 30, 40]
    for row in torch.cat(parts, 1):
        assert row.unique().numel() == 80


@pytest.mark.parametrize("n, ratios", [(36, (0.5, 0.3, 0.3)), (4, (0.1, 0.3, 0.6)),
                                       (36, (0.2, 0.0, 0.8)), (36, (0.4, 0.6, 0.0))])
def test_ratios_that_do_not_fit_are_named(n, ratios):
    with pytest.raises(ValueError, match=f"mask ratios {ratios[0]} {ratios[1]} .* of {n} patches"):
        losses.disjoint_masks(1, n, *ratios)


# ----------------------------------------------------------------------------------------- losses


def test_dino_loss_and_centre_follow_the_formulas_over_several_steps():
    generator = seeded()
    centre = losses.Centre(7).double()
    c = np.zeros(7)
    for tau in (0.03, 0.04, 0.05):
        s, t = torch.randn(2, 5, 7, generator=generator).double()
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
    x = torch.randn(6, 4, generator=seeded()).double()
    u = (x / x.norm(dim=1, keepdim=True)).numpy()
    want = 0.0
    for i in range(6):
        nearest = min(np.linalg.norm(u[i] - u[j]) for j in range(6) if j != i)
        want -= np.log(nearest) / 6
    assert abs(float(losses.koleo(x)) - want) < 1e-6
    same = torch.ones(3, 4, requires_grad=True)
    losses.koleo(same).backward()
    assert torch.isfinite(same.grad).all()
    with pytest.raises(ValueError, match="at least 2"):
        losses.koleo(x[:1])


def test_pixel_loss_is_peras_sum_over_16_by_16_rgb_patches():
    x = torch.rand(2, 3, 32, 48).double()
    unseen = torch.tensor([[0, 5], [2, 3]])
    guess = torch.rand(2, 2, 768).double()
    want = 0.0
    for b in range(2):
        for m in range(2):
            row, column = divmod(int(unseen[b, m]), 3)
            patch = x[b, :, 16 * row:16 * row + 16, 16 * column:16 * column + 16]
            guessed = guess[b, m].reshape(16, 16, 3)                    # row, column, channel
            want += ((guessed - patch.permute(1, 2, 0)) ** 2).sum() / 4
    assert abs(float(losses.pixel_loss(guess, losses.patchify(x, 16), unseen) - want)) < 1e-9


def test_pera_loss_adds_up_crop_by_crop_with_the_gradients_of_the_whole():
    """Re-stated with all scores at once: dino as mean over crops, koleo summed over global ones."""
    generator = seeded()

    def random(*shape):
        return torch.randn(*shape, generator=generator).double()

    student = F.normalize(random(15, 8)).requires_grad_()                   # 5 crops of 3 images
    teacher = F.normalize(random(15, 8))
    W = random(20, 8).requires_grad_()
    W_t = random(20, 8)
    centre = losses.Centre(20).double()
    centre.value = random(1, 20)
    before = centre.value.clone()

    dino, spread = losses.pera_loss(student, teacher, (W, W_t), centre.value, 0.04, 5, 2, 0.3)
    centre.update(random(9, 20))                              # must not reach the backward pass
    got = torch.autograd.grad(dino + 0.1 * spread, (student, W))

    s = student @ W.T
    t = teacher @ W_t.T
    want_dino = losses.dino_loss(s, t, before, 0.04, 0.3)     # equal crops: the mean of the means
    want_spread = losses.koleo(s[:3]) + losses.koleo(s[3:6])
    want = torch.autograd.grad(want_dino + 0.1 * want_spread, (student, W))
    assert torch.allclose(dino, want_dino, atol=1e-12)
    assert torch.allclose(spread, want_spread, atol=1e-12)
    for a, b in zip(got, want):
        assert torch.allclose(a, b, atol=1e-12)


# ---------------------------------------------------------------------------------------- network


def attend(block, x, alive):
    """A block in which nobody looks at the tokens that are not alive: x (17,D), alive (17,)."""
    qkv = block.attn.qkv(block.norm1(x))
    q, k, v = qkv.reshape(-1, 3, 3, 64).permute(1, 2, 0, 3)             # (3 heads, 17, 64)
    weights = (q @ k.mT / 8).masked_fill(~alive, -torch.inf).softmax(-1)
    mixed = (weights @ v).permute(1, 0, 2).reshape(len(x), -1)
    x = x + block.attn.proj(mixed)
    return x + block.mlp(block.norm2(x))


def plain_student(net, image, keep, unseen):
    """SparseBranch for one crop (2,24,24) on its full grid of 16 patches: the CLS feature and the
    guesses. Mask tokens stand in raster order and come alive in the middle block."""
    vit = net.backbone
    proj = vit.patch_embed["proj"]
    patches = F.conv2d(image, proj.weight, proj.bias, stride=6).flatten(1).T        # (16,D)
    hidden = torch.ones(16, dtype=torch.bool)
    hidden[keep] = False
    patches = torch.where(hidden[:, None], net.mask_token[0], patches)
    x = torch.cat([vit.cls_token[0], patches]) + vit.pos_embed[0]                   # (17,D)
    start = x.clone()
    alive = torch.cat([torch.tensor([True]), ~hidden])
    for i, block in enumerate(vit.blocks):
        if i == 6:
            x[1 + unseen] = start[1 + unseen]
            alive = alive.clone()
            alive[1 + unseen] = True
        x = attend(block, x, alive)
    x = vit.norm(x)
    return x[0], net.pred_head(x[1 + unseen]) @ net.pred_head.prototypes().T


def test_the_sparse_student_equals_a_plain_one_crop_at_a_time_restatement():
    """Dropped tokens equal a full grid with an attention mask, in CLS features and guesses."""
    torch.manual_seed(0)
    backbone = models.build("vit_tiny", 2, 24, 6, layerscale=False)
    net = models.SparseBranch(backbone, 32, 48, predict=True).eval().double()
    torch.nn.init.normal_(backbone.pos_embed)
    crops = [torch.rand(3, 2, 24, 24).double(), torch.rand(4, 2, 12, 12).double()]
    keep, unseen, _ = losses.disjoint_masks(3, 16)
    local, _, _ = losses.disjoint_masks(4, 4)
    z, cls, guess = net(crops, [keep, local], unseen)
    for b in range(3):
        want_cls, want_guess = plain_student(net, crops[0][b], keep[b], unseen[b])
        assert torch.allclose(cls[b], want_cls, atol=1e-9)
        assert torch.allclose(guess[b], want_guess, atol=1e-9)
    assert guess.shape == (3, 3, 72)
    assert torch.allclose(cls[3:], backbone(crops[1], local), atol=1e-9)
    assert torch.allclose(z.norm(dim=1), z.new_ones(7), atol=1e-9)


def test_neither_side_ever_computes_what_it_does_not_see():
    net = models.SparseBranch(models.build("vit_tiny", 2, 24, 6), 32, 48, predict=True).eval()
    lengths = []
    for block in net.backbone.blocks:
        block.register_forward_pre_hook(lambda module, inputs: lengths.append(len(inputs[0])))
    student, unseen, teacher = losses.disjoint_masks(2, 16)
    x = torch.rand(2, 2, 24, 24)
    net([x], [student], unseen)
    assert lengths == [2 * (1 + 3)] * 6 + [2 * (1 + 3 + 3)] * 6
    lengths.clear()
    net([x], [teacher])
    assert lengths == [2 * (1 + 10)] * 12
    blank = losses.blank_patches(x, teacher, 6)       # what only the student sees is free
    assert torch.equal(net([x], [teacher])[1], net([blank], [teacher])[1])


def test_prototype_rows_have_trainable_length_one_at_the_start():
    head = models.PrototypeHead(12, 30, 16)
    assert torch.allclose(head.prototypes().norm(dim=1), torch.ones(30), atol=1e-6)
    assert head(torch.randn(4, 12)).shape == (4, 384)
    assert head.weight_g.requires_grad


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


# ----------------------------------------------------------------------------------------- one step


class Spy:
    """Calls a function and remembers what it was given: .calls is a list of {name: value}."""

    def __init__(self, function):
        self.function = function
        self.signature = inspect.signature(getattr(function, "forward", function))
        self.calls = []

    def __call__(self, *args, **kwargs):
        given = self.signature.bind(*args, **kwargs)
        given.apply_defaults()
        self.calls.append(given.arguments)
        return self.function(*args, **kwargs)


def spied_step(flags, monkeypatch):
    """A step of PerA on random images: (spies by name, net, the centre's value before it)."""
    args = pretrain.parse(["--modality", "s1", *PERA, "--amp", "off", *flags])
    net = pretrain.networks(args, "cpu")
    net.centre.value = torch.randn(net.centre.value.shape)
    before = net.centre.value
    spies = {"student": Spy(net.student), "teacher": Spy(net.teacher.forward)}
    net.ddp = spies["student"]
    net.teacher.forward = spies["teacher"]
    for module, name in ((losses, "pera_loss"), (losses, "pixel_loss"), (data, "draw_crops"),
                         (data, "draw_colours")):
        spies[name] = Spy(getattr(module, name))
        monkeypatch.setattr(module, name, spies[name])
    x = torch.randint(256, (4, 1, 2, 24, 24), dtype=torch.uint8)
    draws = pretrain.StepRandomness(0, 0, 0, 0, 1)
    pretrain.pera_step(net, x, torch.zeros(4, 1, 9), args, draws, {"teacher_tau": 0.04})
    return spies, net, before


@pytest.mark.parametrize("jitter", [0.0, 0.4])
def test_the_views_of_a_pair_share_the_crop_and_differ_in_colour(jitter, monkeypatch):
    """With colours switched off student and teacher get the same pixels; with them on, not."""
    spies, _, _ = spied_step(["--jitter", str(jitter), "--grey", str(jitter)], monkeypatch)
    student, _, _ = spies["student"].calls[0].values()
    teacher, _, *_ = spies["teacher"].calls[0].values()
    assert [view.shape for view in student] == [(8, 2, 24, 24), (12, 2, 12, 12)]
    for a, b in zip(student, teacher):
        assert torch.equal(a, b) == (jitter == 0)


def test_student_and_teacher_get_patches_that_are_disjoint(monkeypatch):
    spies, _, _ = spied_step([], monkeypatch)
    _, keep, unseen = spies["student"].calls[0].values()
    _, others, *_ = spies["teacher"].calls[0].values()
    assert [part.shape for part in keep] == [(8, 3), (12, 1)]
    assert others[0].shape == (8, 10)
    for row in torch.cat([keep[0], unseen, others[0]], 1):                  # of global crops
        assert row.unique().numel() == 16
    for row in torch.cat([keep[1], others[1]], 1):                         # of local crops
        assert row.unique().numel() == len(row)


def test_crops_and_colours_are_drawn_as_published(monkeypatch):
    spies, _, _ = spied_step([], monkeypatch)
    areas = [(call["area_min"], call["area_max"]) for call in spies["draw_crops"].calls]
    assert areas == [(0.4, 1.0), (0.05, 0.4)]
    student, teacher = (0.8, pytest.approx(0.08), 0), (0.1, 0, 0)
    light = [(call["p"], call["grey"], call["blur"]) for call in spies["draw_colours"].calls]
    assert light == [student, teacher, student, teacher]


def test_targets_temperatures_and_centre_reach_the_losses_as_published(monkeypatch):
    spies, net, before = spied_step(["--tau", "0.2"], monkeypatch)
    views, _, unseen = spies["student"].calls[0].values()
    pixel, = spies["pixel_loss"].calls
    assert pixel["unseen"] is unseen
    assert torch.equal(pixel["pixels"], losses.patchify(4 * (views[0] - 0.5), 6))
    pera, = spies["pera_loss"].calls
    assert pera["centre"] is before
    assert (pera["tau_teacher"], pera["tau"]) == (0.04, 0.2)
    assert (pera["n_crops"], pera["n_global"]) == (5, 2)
    scores = pera["teacher"].mean(0) @ net.teacher.cls_head.prototypes().T
    assert torch.allclose(net.centre.value, 0.9 * before + 0.1 * scores, atol=1e-5)


# -------------------------------------------------------------------------------- schedules, runs


def test_schedules_meet_peras_published_numbers_at_their_ends():
    """200 epochs of 50 steps: lr 0 -> 1e-3 in 20 epochs -> 1e-6, weight decay .04 -> .2, momentum
    .992 -> 1, teacher temperature .03 -> .05 in 30 epochs, then still."""
    args = pretrain.parse(["--modality", "s1", "--method", "pera", "--preset", "full"])
    total = args.epochs * 50
    now = [pretrain.schedules(args, step, total) for step in range(total + 1)]
    lr = [values["lr"] for values in now]
    assert lr[0] == 0
    assert lr[999] == lr[1000] == max(lr) == 1e-3
    assert abs(lr[total] - 1e-6) < 1e-12
    decay = [now[step]["weight_decay"] for step in (0, total // 2, total)]
    assert np.allclose(decay, [0.04, 0.12, 0.2])
    momentum = [now[step]["momentum"] for step in (0, total)]
    assert np.allclose(momentum, [0.992, 1])
    tau = [now[step]["teacher_tau"] for step in (0, 1499, 1500, total)]
    assert np.allclose(tau, [0.03, 0.05, 0.05, 0.05])


def test_the_full_preset_has_peras_published_values():
    args = pretrain.parse(["--modality", "s1", "--method", "pera", "--preset", "full"])
    assert args.drop_path == 0.3
    assert args.prototypes == 131072
    assert args.crops == [2, 8] and args.local_size == 96 and args.crop_min == 0.4
    assert args.ratios == [0.2, 0.2, 0.6]
    assert args.clip == 3.0


def test_a_runs_schedules_are_logged_with_peras_numbers(toy, tmp_path, few_blocks):
    run(toy, tmp_path / "r", "--crops", 1, 0, "--epochs", 2)                # 28 steps, warm-up 3
    log = read_log(tmp_path / "r")
    assert len(log) == 28
    lr = [row["lr"] for row in log]
    decay = [row["weight_decay"] for row in log]
    momentum = [row["momentum"] for row in log]
    tau = [row["teacher_tau"] for row in log]
    assert lr[0] == 0 and lr[2] == lr[3] == 1e-3 and lr[-1] < 1e-5
    assert decay[0] == 0.04 and 0.198 < decay[-1] < 0.2
    assert momentum[0] == 0.992 and 0.9999 < momentum[-1] < 1
    assert tau[0] == 0.03 and tau[3] == tau[-1] == 0.05
    assert abs(tau[1] - 0.03 - 0.02 / 3) < 1e-6


def test_the_teacher_gets_no_gradient_and_moves_by_one_minus_m_of_the_difference(
        toy, tmp_path, few_blocks):
    state = run(toy, tmp_path / "r", "--max-steps", 1, "--momentum", 0.75, "--warmup", 0)
    torch.manual_seed(0)
    backbone = models.build("vit_tiny", 2, 24, 6, drop_path=0.3, layerscale=False)
    start = models.SparseBranch(backbone, 64, 32, predict=True).state_dict()
    missing = {name for name in start if name.startswith(("pred_head", "mask_token"))}
    assert set(start) - set(state["teacher"]) == missing
    for name, weight in state["teacher"].items():
        want = 0.75 * start[name] + 0.25 * state["student"][name]
        assert torch.allclose(weight, want, atol=1e-6), name
    assert not torch.equal(state["student"]["cls_head.weight_v"], start["cls_head.weight_v"])


def test_k_steps_resume_and_k_steps_equal_2k_steps_bit_for_bit(toy, tmp_path, few_blocks):
    """With drop path, accumulation and the soft term on; the centre is part of the checkpoint."""
    flags = ["--accum", 2, "--soft-weight", 0.3]
    whole = run(toy, tmp_path / "a", *flags, "--max-steps", 4)
    run(toy, tmp_path / "b", *flags, "--max-steps", 2)
    resumed = run(toy, tmp_path / "b", *flags, "--max-steps", 4, "--resume")
    assert equal(whole, resumed)
    assert whole["centre"]["value"].abs().max() > 0


def test_the_log_has_the_parts_whose_weighted_sum_is_the_loss(toy, tmp_path, few_blocks):
    run(toy, tmp_path / "r", "--accum", 2, "--soft-weight", 0.3, "--max-steps", 3)
    for row in read_log(tmp_path / "r"):
        want = row["dino"] + 0.1 * row["koleo"] + 0.01 * row["pixel"] + 0.3 * row["soft"]
        assert abs(want - row["loss"]) < 1e-4
        assert {"soft_share", "teacher_tau", "weight_decay"} < set(row)


def test_the_students_temperature_is_the_flags(toy, tmp_path, few_blocks):
    logs = []
    for tau in ("0.1", "1"):
        run(toy, tmp_path / tau, "--max-steps", 1, "--crops", 1, 0, "--tau", tau)
        logs += read_log(tmp_path / tau)
    assert logs[0]["dino"] != logs[1]["dino"]
    assert logs[0]["koleo"] == logs[1]["koleo"]


def error_of_guesses(x, state=None):
    """Pixel loss on images x (n,2,24,24) of a fresh student, or of one with these weights."""
    keep, unseen, _ = losses.disjoint_masks(len(x), 16, generator=seeded())
    pixels = losses.patchify(4 * (x - 0.5), 6)
    torch.manual_seed(0)
    backbone = models.build("vit_tiny", 2, 24, 6, layerscale=False)
    net = models.SparseBranch(backbone, 64, 32, predict=True).eval()
    if state:
        net.load_state_dict(state)
    with torch.no_grad():
        _, _, guess = net([x], [keep], unseen)
    return float(losses.pixel_loss(guess, pixels, unseen))


def test_guesses_of_hidden_pixels_improve_on_held_out_images(toy, tmp_path, few_blocks):
    state = run(toy, tmp_path / "r", "--crops", 1, 0, "--epochs", 8, "--lr", 2e-3)
    scenes = data.SSL4EO(toy, data.find_sensor("s1"), f"{toy}/ssl4eo_multilabel.json")
    held_out = np.flatnonzero(data.held_out(scenes.ids, 0.1))
    x = torch.from_numpy(np.stack([scenes.image(i, 0) for i in held_out])) / 255
    assert error_of_guesses(x, state["student"]) < 0.9 * error_of_guesses(x)


def test_layerscale_comes_with_the_init_file_and_not_otherwise(toy, tmp_path, few_blocks):
    path = tmp_path / "dinov2.pth"
    torch.save(models.export_backbone(models.build("vit_tiny", 3, 28, 14, registers=2)), path)
    flags = ["--img-size", 28, "--patch-size", 14, "--local-size", 0, "--crops", 2, 0,
             "--ratios", 0.25, 0.25, 0.5]
    with_init = run(toy, tmp_path / "a", "--init", path, *flags, "--max-steps", 1)["student"]
    assert "backbone.blocks.0.ls1.gamma" in with_init
    assert "backbone.register_tokens" in with_init
    plain = run(toy, tmp_path / "b", "--max-steps", 1)["student"]
    assert not [name for name in plain if "gamma" in name or name == "backbone.mask_token"]


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("flags, message", [
    (["--arch", "resnet18"], "--arch resnet18: --method pera needs a ViT"),
    (["--batch-size", "1"], "pera needs at least 2 scenes at a time"),
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
    assert "\n" not in str(error.value)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("flag, value", [("--prototypes", "0"), ("--drop-path", "1.0"),
                                         ("--jitter", "3.0"), ("--crop-min", "2.0"),
                                         ("--lr", "-1.0"), ("--workers", "-1")])
def test_values_out_of_range_are_refused_by_flag(flag, value, capsys):
    with pytest.raises(SystemExit):
        pretrain.parse(["--modality", "s1", *PERA, flag, value])
    assert flag in capsys.readouterr().err
