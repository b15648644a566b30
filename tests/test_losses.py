"""Claims about losses.py, against loops in float64 that are written from the equations."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import losses
from conftest import seeded

N, M, D, L = 7, 11, 5, 9               # queries, keys, width, label classes


def random(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def example(seed=0, n=N):
    """Random q (n,D), k (M,D) and their labels, of which one row each is empty."""
    yq = torch.rand(n, L, generator=seeded(seed)) < 0.3
    yk = torch.rand(M, L, generator=seeded(seed + 100)) < 0.3
    yq[2] = False
    yk[4] = False
    return random(n, D, seed=seed), random(M, D, seed=seed + 100), yq.byte(), yk.byte()


# ------------------------------------------------------------------------------------ SoftCon


def cos(a, b):
    return float((a * b).sum() / (a.norm() * b.norm()))


def similarity(a, b):
    size = int(a.sum()) * int(b.sum())
    if size == 0:
        return 0.0
    return int((a & b).sum()) / math.sqrt(size)


def info_nce_by_loop(q, k, tau, offset):
    total = 0.0
    for i in range(len(q)):
        z = [cos(q[i], k[j]) / tau for j in range(len(k))]
        total -= z[i + offset] - math.log(sum(math.exp(v) for v in z))
    return total / len(q)


def soft_by_loop(q, k, yq, yk, tau):
    total = 0.0
    for i in range(len(q)):
        for j in range(len(k)):
            if yq[i].any() and yk[j].any():
                p = 1 / (1 + math.exp(-cos(q[i], k[j]) / tau))
                s = similarity(yq[i], yk[j])
                total -= s * math.log(p) + (1 - s) * math.log(1 - p)
    return total / len(q)


def test_label_similarity_is_shared_classes_over_the_root_of_the_sizes():
    for seed in range(3):
        _, _, yq, yk = example(seed)
        s = losses.label_similarity(yq, yk)
        want = [[similarity(a, b) for b in yk] for a in yq]
        assert torch.allclose(s, torch.tensor(want), atol=1e-6)


def test_single_labels_reduce_label_similarity_to_class_equality():
    a = torch.randint(L, (20,), generator=seeded())
    b = torch.randint(L, (30,), generator=seeded(1))
    one_hot = torch.eye(L)
    assert torch.equal(losses.label_similarity(one_hot[a], one_hot[b]), (a[:, None] == b).float())


@pytest.mark.parametrize("tau, offset", [(0.1, 0), (0.2, 3)])
def test_info_nce_equals_a_double_loop(tau, offset):
    q, k, _, _ = example()
    want = info_nce_by_loop(q, k, tau, offset)
    assert abs(float(losses.info_nce(q, k, tau, offset)) - want) < 1e-12


@pytest.mark.parametrize("keys", [2, 11, 256])
def test_constant_features_give_info_nce_the_log_of_the_number_of_keys(keys):
    value = losses.info_nce(torch.ones(2, D), torch.ones(keys, D), 0.2)
    assert abs(float(value) - math.log(keys)) < 1e-5


@pytest.mark.parametrize("tau", [0.1, 0.2, 1.0])
def test_the_soft_term_equals_a_double_loop(tau):
    for seed in range(3):
        q, k, yq, yk = example(seed)
        value = float(losses.soft_contrastive(q, k, yq, yk, tau))
        assert abs(value - soft_by_loop(q, k, yq, yk, tau)) < 1e-6         # labels are in float32


def test_unlabelled_rows_and_columns_add_nothing_to_the_soft_term_and_stay_in_info_nce():
    q, k, yq, yk = example()
    other_q = q.clone()
    other_q[2] *= -1
    other_k = k.clone()
    other_k[4] *= -1
    for new_q, new_k in ((other_q, k), (q, other_k)):
        assert torch.equal(losses.soft_contrastive(q, k, yq, yk),
                           losses.soft_contrastive(new_q, new_k, yq, yk))
        assert losses.info_nce(q, k, 0.2) != losses.info_nce(new_q, new_k, 0.2)
    q.requires_grad_()
    for a, b in ((0 * yq, yk), (yq, 0 * yk)):
        nothing = losses.soft_contrastive(q, k, a, b)
        assert not nothing.any() and not torch.autograd.grad(nothing, q)[0].any()


def test_softcons_loss_is_info_nce_plus_weight_times_the_soft_term_at_its_own_temperature():
    q, k, yq, yk = example(n=M)
    loss, hard, soft = losses.softcon_loss(q, k, yq, yk, tau=0.3, weight=0.7, soft_tau=0.5)
    assert torch.equal(hard, losses.info_nce(q, k, 0.3))
    assert torch.equal(soft, losses.soft_contrastive(q, k, yq, yk, 0.5))
    assert abs(float(hard + 0.7 * soft - loss)) < 1e-12
    by_default = losses.softcon_loss(q, k, yq, yk)
    assert torch.equal(by_default[0], losses.softcon_loss(q, k, yq, yk, 0.2, 0.5, 0.2)[0])


def test_on_one_rank_gather_gives_the_rows_themselves_without_a_gradient():
    x = random(3, D).requires_grad_()
    gathered = losses.gather(x)
    assert torch.equal(gathered, x) and not gathered.requires_grad


# --------------------------------------------------------------------------------------- PerA


@pytest.mark.parametrize("tau_student", [0.1, 0.3])
def test_dino_loss_and_centre_follow_the_formulas_and_the_teachers_scores_get_no_gradient(
        tau_student):
    centre = losses.Centre(7).double()
    c = np.zeros(7)
    for step, tau in enumerate((0.03, 0.04, 0.05)):
        s = random(5, 7, seed=step).requires_grad_()
        t = random(5, 7, seed=step + 10).requires_grad_()
        value = losses.dino_loss(s, t, centre.value, tau, tau_student)
        value.backward()
        assert s.grad.any() and t.grad is None
        t = t.detach().numpy()
        p_t = np.exp((t - c) / tau)
        p_s = np.exp(s.detach().numpy() / tau_student)
        p_t /= p_t.sum(1, keepdims=True)
        p_s /= p_s.sum(1, keepdims=True)
        assert abs(float(value.detach()) + (p_t * np.log(p_s)).sum() / 5) < 1e-9
        centre.update(torch.from_numpy(t))
        c = 0.9 * c + 0.1 * t.mean(0)
    assert np.allclose(centre.value[0].numpy(), c, atol=1e-12)


def test_koleo_is_the_log_distance_to_the_nearest_other_row_on_the_sphere():
    x = random(6, 4)
    u = (x / x.norm(dim=1, keepdim=True)).numpy()
    want = 0.0
    for i in range(6):
        nearest = min(np.linalg.norm(u[i] - u[j]) for j in range(6) if j != i)
        want -= np.log(nearest) / 6
    assert abs(float(losses.koleo(x)) - want) < 1e-6
    assert torch.allclose(losses.koleo(x * torch.arange(1, 7)[:, None]), losses.koleo(x))


def test_koleo_never_chooses_a_row_itself_and_equal_rows_have_a_finite_gradient():
    angles = torch.tensor([0, 2, 4]).double() * math.pi / 3             # all cosines are negative
    triangle = torch.stack([angles.cos(), angles.sin()], 1)
    assert abs(float(losses.koleo(triangle)) + math.log(math.sqrt(3))) < 1e-6
    same = torch.ones(3, 4, requires_grad=True)
    losses.koleo(same).backward()
    assert torch.isfinite(same.grad).all()


def test_pixel_loss_is_the_squared_error_summed_over_a_16_by_16_rgb_patch():
    x = random(2, 3, 32, 48)
    guess = random(2, 2, 768, seed=1)
    guessed_patches = torch.tensor([[0, 5], [2, 3]])
    want = 0.0
    for b in range(2):
        for m in range(2):
            row, column = divmod(int(guessed_patches[b, m]), 3)
            patch = x[b, :, 16 * row:16 * row + 16, 16 * column:16 * column + 16]
            as_image = guess[b, m].reshape(16, 16, 3)                      # row, column, channel
            want += float(((as_image - patch.permute(1, 2, 0)) ** 2).sum()) / 4
    value = losses.pixel_loss(guess, losses.patchify(x, 16), guessed_patches)
    assert abs(float(value) - want) < 1e-9


@pytest.mark.parametrize("n_crops, n_global", [(5, 2), (3, 1), (2, 2)])
def test_peras_losses_add_up_crop_by_crop_with_the_gradients_of_the_whole(n_crops, n_global):
    """Re-stated with all scores at once: dino a mean over crops, koleo a sum over global ones."""
    B = 3
    student = F.normalize(random(n_crops * B, 8)).requires_grad_()
    teacher = F.normalize(random(n_crops * B, 8, seed=1)).requires_grad_()
    prototypes = random(20, 8, seed=2).requires_grad_()
    prototypes_t = random(20, 8, seed=3)
    centre = losses.Centre(20).double()
    centre.value = random(1, 20, seed=4)

    s = student @ prototypes.T
    dino = losses.dino_loss(s, teacher @ prototypes_t.T, centre.value, 0.04, 0.3)
    koleo = sum(losses.koleo(s[B * i:B * (i + 1)]) for i in range(n_global))
    want = torch.autograd.grad(dino + 0.1 * koleo, (student, prototypes))

    found = losses.pera_loss(student, teacher, (prototypes, prototypes_t), centre.value, 0.04,
                             n_crops, n_global, 0.3)
    centre.update(random(9, 20))                              # must not reach the backward pass
    (found[0] + 0.1 * found[1]).backward()
    for a, b in zip((*found, student.grad, prototypes.grad), (dino, koleo, *want), strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    assert teacher.grad is None or not teacher.grad.any()


def test_inside_autocast_softcons_and_peras_losses_and_gradients_are_those_of_float32():
    near = random(1, 8)                                     # rows that bfloat16 cannot tell apart
    q = (near + 0.02 * random(12, 8, seed=4)).float().requires_grad_()
    k = (near + 0.02 * random(12, 8, seed=5)).float()
    W = random(32, 8, seed=6).float()
    _, _, y, _ = example(n=12)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _, _ = losses.softcon_loss(q, k, y, y)
            dino, koleo = losses.pera_loss(q, k, [W, W], torch.zeros(1, 32), 0.04, 2, 1)
        gradient, = torch.autograd.grad(loss + dino + koleo, q)
        found.append(torch.stack([loss, dino, koleo, *gradient.flatten()]))
    assert torch.equal(*found)


# -------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("n, counts, shares", [
    (784, (157, 157, 470), ()), (196, (39, 39, 118), ()), (64, (13, 13, 38), ()),
    (36, (7, 7, 22), ()), (49, (10, 10, 29), ()), (5, (1, 1, 3), ()),
    (100, (10, 30, 40), (0.1, 0.3, 0.4))])                               # 20 are left to nobody
def test_peras_three_sets_are_disjoint_sorted_and_of_the_released_sizes(n, counts, shares):
    sets = losses.disjoint_masks(50, n, *shares, generator=seeded())
    assert tuple(patches.shape[1] for patches in sets) == counts
    assert all((patches.diff(dim=1) > 0).all() for patches in sets)
    for row in torch.cat(sets, 1):
        assert row.unique().numel() == sum(counts)
        assert 0 <= row.min() and row.max() < n


def test_masks_are_uniform_over_positions_and_follow_the_seed_alone():
    sets = losses.disjoint_masks(20000, 36, generator=seeded())
    for patches in sets:
        drawn = torch.bincount(patches.flatten(), minlength=36).double()
        p = patches.shape[1] / 36                  # each position is a Binomial(20000, p)
        chi2 = ((drawn - 20000 * p) ** 2 / (20000 * p * (1 - p))).sum() * 35 / 36
        assert chi2 < 75                           # 35 degrees of freedom: exceeded once in 10,000
    again = losses.disjoint_masks(20000, 36, generator=seeded())
    assert all(torch.equal(a, b) for a, b in zip(sets, again))
    assert not torch.equal(sets[0], losses.disjoint_masks(20000, 36, generator=seeded(1))[0])


@pytest.mark.parametrize("h, w, ratio", [(16, 16, 0.3), (8, 6, 0.4), (7, 5, 0.6), (2, 3, 0)])
def test_block_mask_covers_with_one_drawn_rectangle_after_another_and_cuts_the_last(h, w, ratio):
    """So that each image keeps exactly the same number of patches, in order."""
    n_mask = round(ratio * h * w)
    patches = losses.block_mask(20, (h, w), ratio, seeded())
    assert patches.shape == (20, h * w - n_mask)
    drawn = torch.stack(losses.draw_blocks(20, (h, w), n_mask, seeded(), blocks=16), -1)
    for b in range(20):
        covered = []
        for top, left, height, width in drawn[b].tolist():
            for patch in range(h * w):
                y, x = divmod(patch, w)
                if top <= y < top + height and left <= x < left + width and patch not in covered:
                    covered.append(patch)
        assert patches[b].tolist() == sorted(set(range(h * w)) - set(covered[:n_mask]))


def test_blocks_are_of_either_direction_and_every_place_gets_its_turn():
    patches = losses.block_mask(400, (16, 8), 0.3, seeded())
    mask = torch.ones(400, 128).scatter_(1, patches, 0).reshape(400, 16, 8)
    below = (mask[:, 1:] * mask[:, :-1]).sum() / mask[:, :-1].sum()
    beside = (mask[:, :, 1:] * mask[:, :, :-1]).sum() / mask[:, :, :-1].sum()
    assert below > 0.6 and beside > 0.6             # masked at random, both would be .3
    assert mask.mean(0).min() > 0.05


def test_blank_patches_puts_the_mean_where_a_resnet_is_masked():
    x = torch.rand(2, 3, 4, 6, generator=seeded())
    y = losses.blank_patches(x, torch.tensor([[0, 4], [1, 2]]), 2)
    given = torch.tensor([[[1, 0, 0], [0, 1, 0]], [[0, 1, 1], [0, 0, 0]]])
    given = given.kron(torch.ones(1, 2, 2)).bool()[:, None]                        # (2,1,4,6)
    assert torch.equal(y, torch.where(given, x, torch.tensor(0.5)))


# ------------------------------------------------------------------------------- what the log says


def test_feature_std_and_effective_rank_equal_independent_formulas_and_are_0_and_1_if_constant():
    """The formulas in float64, from the eigenvalues of the covariance matrix."""
    x = random(64, 8) * torch.arange(1, 9)
    for features in (x, x + 5, x + torch.arange(8)):                       # their means differ
        std, rank = losses.collapse(features.float())
        z = (features / features.norm(dim=1, keepdim=True)).numpy()
        p = np.sqrt(np.linalg.eigvalsh(np.cov(z.T)).clip(1e-30))
        p = p / p.sum()
        assert abs(std - z.std(0, ddof=1).mean() * math.sqrt(8)) < 1e-4
        assert abs(rank - math.exp(-(p * np.log(p)).sum())) < 1e-3
    std, rank = losses.collapse(torch.ones(64, 32))
    assert std < 1e-6 and rank < 1.01
