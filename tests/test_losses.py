"""Claims about losses.py, each against a double loop in float64 written from the equations."""
import math

import pytest
import torch

import losses

torch.manual_seed(0)
N, M, D, L = 7, 11, 5, 9               # queries, keys, width, label classes


def example(seed=0, n=N, m=M):
    """Random q (n,D), k (m,D) in float64 and their labels, of which one row each is empty."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(n, D, generator=generator).double()
    k = torch.randn(m, D, generator=generator).double()
    yq = torch.rand(n, L, generator=generator) < 0.3
    yk = torch.rand(m, L, generator=generator) < 0.3
    yq[2] = False                                                  # unlabelled
    yk[4] = False
    return q, k, yq.to(torch.uint8), yk.to(torch.uint8)


# -------------------------------------------------------------------------- the double loops


def cos(a, b):
    return float((a * b).sum() / (a.norm() * b.norm()))


def similarity(a, b):
    shared = int((a & b).sum())
    size = int(a.sum()) * int(b.sum())
    if size == 0:
        return 0.0
    return shared / math.sqrt(size)


def cross_entropy_of_row(s, z):
    """s, z: {key: label similarity}, {key: logit}."""
    total = sum(s.values())
    if total == 0:
        return 0.0
    normaliser = math.log(sum(math.exp(v) for v in z.values()))
    return -sum(s[j] / total * (z[j] - normaliser) for j in s)


def binary_cross_entropy_of_row(s, z):
    loss = 0.0
    for j in s:
        p = 1 / (1 + math.exp(-z[j]))
        loss -= s[j] * math.log(p) + (1 - s[j]) * math.log(1 - p)
    return loss


def soft_reference(q, k, yq, yk, form, tau):
    rows = [i for i in range(len(q)) if yq[i].sum()]
    columns = [j for j in range(len(k)) if yk[j].sum()]
    total = 0.0
    for i in rows:
        s = {j: similarity(yq[i], yk[j]) for j in columns}
        z = {j: cos(q[i], k[j]) / tau for j in columns}
        if form == "ce":
            total += cross_entropy_of_row(s, z)
        elif form == "bce":
            total += binary_cross_entropy_of_row(s, z)
        else:
            total += binary_cross_entropy_of_row(s, z) / len(k)
    return total / len(q)


# ------------------------------------------------------------------------------------ SoftCon


@pytest.mark.parametrize("seed", range(3))
def test_label_similarity_is_shared_classes_over_root_of_sizes(seed):
    _, _, yq, yk = example(seed)
    s = losses.label_similarity(yq, yk)
    for i in range(N):
        for j in range(M):
            assert abs(float(s[i, j]) - similarity(yq[i], yk[j])) < 1e-6


def test_single_labels_reduce_the_soft_target_to_class_equality():
    a = torch.randint(L, (20,))
    b = torch.randint(L, (30,))
    one_hot = torch.eye(L)
    s = losses.label_similarity(one_hot[a], one_hot[b])
    assert torch.equal(s, (a[:, None] == b).float())


@pytest.mark.parametrize("offset", [0, 3])
def test_info_nce_equals_a_double_loop(offset):
    q, k, _, _ = example()
    want = 0.0
    for i in range(N):
        z = [cos(q[i], k[j]) / 0.2 for j in range(M)]
        want -= (z[i + offset] - math.log(sum(math.exp(v) for v in z))) / N
    assert abs(float(losses.info_nce(q, k, 0.2, offset)) - want) < 1e-12


@pytest.mark.parametrize("keys", [2, 11, 256])
def test_constant_features_give_info_nce_the_log_of_the_number_of_keys(keys):
    value = losses.info_nce(torch.ones(2, D), torch.ones(keys, D), 0.2)
    assert abs(float(value) - math.log(keys)) < 1e-5


@pytest.mark.parametrize("form", losses.SOFT_TAU)
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_soft_term_equals_a_double_loop(form, tau):
    for seed in range(4):
        q, k, yq, yk = example(seed)
        value = float(losses.soft_contrastive(q, k, yq, yk, form, tau))
        assert abs(value - soft_reference(q, k, yq, yk, form, tau)) < 1e-6


@pytest.mark.parametrize("form", losses.SOFT_TAU)
@pytest.mark.parametrize("labelled", [range(M), [5], []])
def test_the_average_over_parts_of_the_queries_is_the_soft_term_of_all(form, labelled):
    """However unevenly the parts hold the rows with labels."""
    q, k, yq, yk = example(n=M)
    for i in range(M):
        if i not in labelled:
            yq[i] = 0
    whole = losses.soft_contrastive(q, k, yq, yk, form)
    parts = [losses.soft_contrastive(q[i:i + 1], k, yq[i:i + 1], yk, form) for i in range(M)]
    assert torch.allclose(torch.stack(parts).mean(), whole, atol=1e-6)


def test_softcon_loss_is_info_nce_plus_weight_times_soft():
    q, k, yq, yk = example(n=M)
    loss, hard, soft = losses.softcon_loss(q, k, yq, yk, 0.2, 0.7, "bce", 0.5)
    want = losses.info_nce(q, k, 0.2) + 0.7 * losses.soft_contrastive(q, k, yq, yk, "bce", 0.5)
    assert abs(float(loss - want)) < 1e-12
    assert abs(float(hard + 0.7 * soft - loss)) < 1e-12


@pytest.mark.parametrize("form", losses.SOFT_TAU)
def test_unlabelled_rows_and_columns_add_nothing_to_the_soft_term_and_stay_in_info_nce(form):
    q, k, yq, yk = example()
    other_q = q.clone()
    other_q[2] = -q[2]
    other_k = k.clone()
    other_k[4] = -k[4]
    for new_q, new_k in ((other_q, k), (q, other_k)):
        assert torch.equal(losses.soft_contrastive(q, k, yq, yk, form),
                           losses.soft_contrastive(new_q, new_k, yq, yk, form))
        assert losses.info_nce(q, k, 0.2) != losses.info_nce(new_q, new_k, 0.2)


@pytest.mark.parametrize("form", losses.SOFT_TAU)
def test_the_soft_term_is_that_of_the_labelled_rows_alone_times_their_share(form):
    q, k, yq, yk = example(n=M)
    yq[:] = torch.eye(L)[torch.arange(M) % L]
    labelled = torch.arange(M) % 2 == 0
    alone = losses.soft_contrastive(q[labelled], k, yq[labelled], yk, form)
    yq[~labelled] = 0
    share = float(labelled.float().mean())
    assert torch.allclose(losses.soft_contrastive(q, k, yq, yk, form), share * alone)


@pytest.mark.parametrize("form", losses.SOFT_TAU)
def test_without_any_label_the_soft_term_is_zero_and_has_a_zero_gradient(form):
    q, k, yq, yk = example()
    q.requires_grad_()
    none_q = torch.zeros_like(yq)
    none_k = torch.zeros_like(yk)
    for a, b in ((none_q, yk), (yq, none_k), (none_q, none_k)):
        value = losses.soft_contrastive(q, k, a, b, form)
        gradient, = torch.autograd.grad(value, q)
        assert float(value.detach()) == 0
        assert not gradient.any()


def test_the_soft_diagonal_is_what_the_two_seasons_say():
    y1 = torch.tensor([[1, 1, 0], [0, 0, 1]])
    y2 = torch.tensor([[1, 0, 0], [1, 1, 0]])
    diagonal = losses.label_similarity(y1, y2).diagonal()
    assert torch.allclose(diagonal, torch.tensor([0.5 ** 0.5, 0]))


def test_permuting_the_batch_changes_nothing():
    q, k, yq, yk = example(n=M)
    p = torch.randperm(M)
    before = losses.softcon_loss(q, k, yq, yk)
    after = losses.softcon_loss(q[p], k[p], yq[p], yk[p])
    for a, b in zip(before, after):
        assert torch.allclose(a, b, atol=1e-10)


def test_identical_labels_pull_every_pair_alike():
    q, k, _, _ = example()
    value = losses.soft_contrastive(q, k, torch.ones(N, L), torch.ones(M, L), "ce", 0.2)
    log_p = (losses.cosine(q, k) / 0.2).log_softmax(1)
    assert torch.allclose(value, -log_p.mean(), atol=1e-6)


def test_one_key_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        losses.info_nce(torch.ones(1, D), torch.ones(1, D), 0.2)


# -------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("grid", [(16, 16), (8, 8), (7, 5), (2, 3)])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.6])
def test_block_mask_keeps_the_exact_number_sorted_distinct_and_reproducible(grid, ratio):
    generator = torch.Generator().manual_seed(3)
    keep = losses.block_mask(50, grid, ratio, generator)
    n = grid[0] * grid[1]
    assert keep.shape == (50, n - round(ratio * n))
    assert keep.min() >= 0 and keep.max() < n
    assert (keep.diff(dim=1) > 0).all()
    assert torch.equal(keep, losses.block_mask(50, grid, ratio, generator.manual_seed(3)))
    if ratio > 0:
        assert (keep != keep[0]).any()


def test_block_mask_is_made_of_blocks():
    """Masked patches have masked neighbours far more often than the ratio says."""
    keep = losses.block_mask(200, (16, 16), 0.3, torch.Generator().manual_seed(0))
    mask = torch.ones(200, 256).scatter_(1, keep, 0).reshape(200, 16, 16)
    beside = (mask[:, 1:] * mask[:, :-1]).sum() / mask[:, :-1].sum()
    assert beside > 0.6
    assert mask.mean(0).min() > 0.05                               # and every place gets its turn


def test_block_mask_refuses_to_mask_everything():
    with pytest.raises(ValueError, match="mask ratio 1.0"):
        losses.block_mask(2, (4, 4), 1.0)


def test_blank_patches_greys_the_masked_cells_and_leaves_the_others():
    x = torch.rand(1, 2, 4, 4)
    y = losses.blank_patches(x, torch.tensor([[0, 3]]), 2)
    assert torch.equal(y[..., :2, :2], x[..., :2, :2])
    assert torch.equal(y[..., 2:, 2:], x[..., 2:, 2:])
    assert (y[..., :2, 2:] == 0.5).all()
    assert (y[..., 2:, :2] == 0.5).all()


# ------------------------------------------------------------------------------- what the log says


def test_collapse_tells_constant_from_spread_features():
    std, rank = losses.collapse(torch.ones(64, 32))
    assert std < 1e-6 and rank < 1.01
    std, rank = losses.collapse(torch.randn(512, 32))
    assert 0.9 < std < 1.1 and rank > 28
    std, rank = losses.collapse(torch.randn(512, 1) * torch.randn(32))
    assert rank < 1.1


def test_soft_share_is_the_ratio_of_gradient_norms():
    q = torch.randn(4, 3, requires_grad=True)
    assert abs(losses.soft_share(q, q.sum(), 3 * q.sum()) - 0.75) < 1e-6
