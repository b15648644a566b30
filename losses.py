"""Masks and losses: pure functions on tensors.  [reading time: 12 minutes]

SoftCon [1] trains a student on two views of a scene: its query q_i must find the teacher's key k_i
of the same scene among the keys of all scenes (hard, InfoNCE [2]), and its similarity to every
other key should follow how much the two scenes' land-cover labels overlap (soft).

[1] Wang, Albrecht, Zhu 2024, Multi-label guided soft contrastive learning
[2] van den Oord et al. 2018, CPC; He et al. 2020, MoCo; Chen, Xie, He 2021, MoCo v3
[3] Caron et al. 2021, DINO; Sablayrolles et al. 2019, KoLeo
[4] Shen et al. 2026, PerA, and its repository SathShen/PerA

PerA [4] shows student and teacher different patches of one crop; the student must choose the
teacher's prototypes [3] and guess the pixels of patches that neither network sees.
Equations are numbered as in the README.

Letters: N queries of this rank, M keys of all ranks, D width, L label classes, K prototypes,
P patch side, tau temperature.
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------ gather over ranks


def gather_soon(*xs):
    """Start to gather the rows of all ranks, in rank order and without gradient; other work goes on
    meanwhile, until the function that comes back is called for them.

    [(B/W, ...) on each of W ranks, ...] -> () -> [(B, ...) on all, ...]; xs without other ranks.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return lambda: xs
    xs = [x.detach().contiguous() for x in xs]
    rows = [[torch.empty_like(x) for _ in range(dist.get_world_size())] for x in xs]
    under_way = [dist.all_gather(r, x, async_op=True) for r, x in zip(rows, xs)]

    def gathered():
        for work in under_way:
            work.wait()
        return [torch.cat(r) for r in rows]
    return gathered


class Gather(torch.autograd.Function):
    """gather_soon with a gradient: a row's is summed over the ranks that used it.

    DDP then divides parameter gradients by the number of ranks, which makes W ranks with B/W rows
    each equal one rank with B rows.  (dist.all_gather alone drops the gradient.)
    """

    @staticmethod
    def forward(ctx, x):
        return gather_soon(x)()[0]

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    """(B/W, ...) on each of W ranks -> (B, ...) on all; x itself without torch.distributed."""
    return Gather.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


# ---------------------------------------------------------------------------------------- SoftCon


def has_labels(y):
    """(N,L) multi-hot -> (N,) bool: does the scene carry any label?"""
    return (y > 0).any(1)


def label_similarity(y1, y2):
    """Cosine of multi-hot label vectors, |A and B| / sqrt(|A| |B|): (N,L), (M,L) -> (N,M) in [0,1].

    With one label per scene this is class equality.  A row without labels gives 0 everywhere, which
    is no statement about the scene: `has_labels` tells it apart.
    """
    return cosine(y1.float(), y2.float())                                               # eq. (1)


def full(x):
    """x in float32, or float64 if it is: no loss is computed in less."""
    return x if x.dtype == torch.float64 else x.float()


def cosine(a, b):
    """(N,D), (M,D) -> (N,M) in [-1,1], at least in float32; a zero row gives 0."""
    return F.normalize(full(a)) @ F.normalize(full(b)).T


def info_nce(q, k, tau, offset=0):
    """Hard contrast [1, figure; 2]: mean_i -log( exp(q_i.k_i/tau) / sum_j exp(q_i.k_j/tau) ).

    q (N,D), k (M,D), normalised here; the positive of row i is key i + offset.  Constant features
    give log(M).  One key makes the loss 0 whatever the features are: ValueError.
    """
    if len(k) < 2:
        raise ValueError("contrastive learning needs a global batch of at least 2")
    logits = cosine(q, k) / tau                                                             # (N, M)
    return F.cross_entropy(logits, torch.arange(len(q), device=q.device) + offset)      # eq. (2)


SOFT_TAU = {"ce": 0.2, "bce": 0.2, "bce_mean": 1.0}       # not in the release: ours


def soft_contrastive(q, k, yq, yk, form="bce", tau=None, all_yq=None):
    """Soft contrast: similarity c_ij = q_i.k_j follows label similarity s_ij.  q (N,D), k (M,D),
    normalised here, yq (N,L), yk (M,L) multi-hot.  Three readings, as the release has no formula:

        ce        mean_i  sum_j  -s_ij / (sum_l s_il)  log softmax_j(c_ij / tau)
        bce       mean_i  sum_j  BCE(sigmoid(c_ij / tau), s_ij)
        bce_mean  mean_i  mean_j BCE(sigmoid(c_ij / tau), s_ij)

    bce sums over the keys, so its share of the gradient grows with the batch; the other two keep
    it.  Rows and columns without labels leave the term.  mean_i is over the labelled rows; with
    none the term is 0.  A labelled row that shares no class with any key adds 0 to ce.  tau=None
    takes SOFT_TAU[form].  all_yq (M,L): yq of all ranks, if k and yk are theirs; DDP averages the
    ranks' losses, so that a division by its labelled rows / ranks gives the mean over all.
    """
    valid_q, valid_k, s = has_labels(yq), has_labels(yk), label_similarity(yq, yk)
    logits = cosine(q, k) / (SOFT_TAU[form] if tau is None else tau)                        # (N, M)
    if form == "ce":
        target = s / s.sum(1, keepdim=True).clamp_min(1e-12)
        terms = -target * logits.masked_fill(~valid_k, -1e4).log_softmax(1)
    else:
        terms = F.binary_cross_entropy_with_logits(logits, s.to(logits), reduction="none")
        terms = terms * (valid_q[:, None] & valid_k)
        terms = terms / valid_k.sum().clamp_min(1) if form == "bce_mean" else terms
    rows = valid_q.sum() if all_yq is None else has_labels(all_yq).sum() * len(q) / len(k)
    return terms.sum() / (rows + (rows == 0))                                           # eq. (3)


def softcon_loss(q, k, yq, yk, tau=0.2, weight=0.5, form="bce", soft_tau=None, all_yq=None):
    """InfoNCE + weight * soft, for this rank's queries against the keys of all ranks.

    q (N,D) student, k (N,D) teacher, yq and yk (N,L) the labels of the two views: two seasons of
    one scene, so s_ii is what their labels say and not always 1.  Gathers them; who gives all_yq
    has: it is yq (M,L) of all ranks, as are k (M,D) and yk (M,L).  Returns (loss, InfoNCE, soft).
    """
    if all_yq is None:
        k, all_yq, yk = gather(k), gather(yq), gather(yk)
    rank = dist.get_rank() if dist.is_initialized() else 0
    hard = info_nce(q, k, tau, offset=rank * len(q))
    soft = soft_contrastive(q, k, yq, yk, form, soft_tau, all_yq)
    return hard + weight * soft, hard, soft                                             # eq. (4)


# ------------------------------------------------------------------------------------------- PerA


class Centre(torch.nn.Module):
    """Running mean (1,K) of the teacher's prototype scores, from 0; part of the checkpoint.

    Subtracted before the teacher's softmax, so that no prototype can win for every image.
    """

    def __init__(self, prototypes, momentum=0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(1, prototypes))

    @torch.no_grad()
    def update(self, scores):
        """scores (n,K), or their mean, of this rank: value <- .9 value + .1 mean over all ranks.
        Call it after the loss: a step is centred by the steps before it."""
        mean = scores.mean(0, keepdim=True).to(self.value)
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        # a new tensor: the backward pass still needs the one it replaces
        self.value = self.value.lerp(mean, 1 - self.momentum)                           # eq. (11)


def dino_loss(student, teacher, centre, tau_teacher, tau_student=0.1):
    """-mean_i sum_k softmax((t_i - c) / tau_t)_k log softmax(s_i / tau_s)_k  [4, cls_loss.py].

    Prototype scores s and t (n,K) of the same crops, centre c (1,K).  t gets no gradient.
    """
    target = ((full(teacher.detach()) - centre) / tau_teacher).softmax(1)
    return -(target * (full(student) / tau_student).log_softmax(1)).sum(1).mean()       # eq. (7)


def koleo(x):
    """-mean_i log(distance to the nearest other row + 1e-8) of normalised rows x (n,D): spreads
    them out [4, koleo_loss.py].  A single row has no neighbour: ValueError."""
    if len(x) < 2:
        raise ValueError("koleo needs at least 2 images per rank")
    x = F.normalize(full(x))
    with torch.no_grad():
        nearest = (x @ x.T).fill_diagonal_(-2).argmax(1)
    return -(F.pairwise_distance(x, x[nearest], eps=1e-8) + 1e-8).log().mean()          # eq. (8)


def patchify(x, P):
    """(B,C,H,W) -> (B,N,PPC): the values of each patch by row, column, channel."""
    B, C, H, W = x.shape
    x = x.reshape(B, C, H // P, P, W // P, P).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(B, -1, P * P * C)


def pixel_loss(guess, pixels, learn):
    """768 x mean squared error of guessed patches (b,m,PPC) against those of patchify (b,N,PPC)
    that learn (b,m) names.  With PerA's 16 x 16 x 3 values that is its sum over a patch; the mean
    keeps the weight of the term for other patches and bands."""
    target = pixels.gather(1, learn[..., None].expand(-1, -1, pixels.shape[-1]))
    return 768 * F.mse_loss(full(guess), full(target))                                  # eq. (9)


def pera_loss(student, teacher, prototypes, centre, tau_teacher, crops, n_global, tau=0.1):
    """PerA's two losses on CLS [4]: (dino, koleo), crop by crop.

    student, teacher: embeddings (crops B, 384), crop-major; prototypes: their two matrices (K,384).
    dino is the mean over the crops, each against the same crop of the teacher; koleo the sum over
    the global crops, on their scores, as released.  One crop's scores (B,K) are alive at a time:
    the backward pass computes them again.
    """
    def one(z, z_t, spread):
        s, t = F.linear(z, prototypes[0]), F.linear(z_t, prototypes[1])          # (B,K)
        return dino_loss(s, t, centre, tau_teacher, tau), koleo(s) if spread else s.new_zeros(())
    terms = [checkpoint(one, z, z_t, i < n_global, use_reentrant=False, preserve_rng_state=False)
             for i, (z, z_t) in enumerate(zip(student.chunk(crops), teacher.chunk(crops)))]
    return sum(dino for dino, _ in terms) / crops, sum(spread for _, spread in terms)


# ------------------------------------------------------------------------------------------ masks


def disjoint_masks(batch, n_tokens, student=0.2, learn=0.2, teacher=0.6, generator=None,
                   device=None):
    """PerA's three sets of patches that share none: the student's, those it must guess, the
    teacher's; each (batch, n) sorted, drawn uniformly [4, pera.py].

    With N tokens the student sees round(student N), the teacher N - round((1 - teacher) N), and
    what lies between is guessed; ratios that sum to less than 1 leave patches to nobody.
    ValueError: a sum above 1, or a part without a token.
    """
    idle = 1 - student - learn - teacher
    first, last = round(student * n_tokens), round((1 - teacher) * n_tokens)
    middle = last - round(max(idle, 0) * n_tokens)
    if idle < -1e-6 or not 0 < first < middle <= last < n_tokens:
        raise ValueError(f"mask ratios {student} {learn} {teacher} of {n_tokens} patches: each "
                         f"part needs at least one, and their sum may not exceed 1")
    order = torch.rand(batch, n_tokens, generator=generator).argsort(1)
    parts = order[:, :first], order[:, first:middle], order[:, last:]                   # eq. (6)
    return tuple(part.sort(1).values.to(device) for part in parts)


def block_mask(batch, grid, ratio, generator=None, blocks=16):
    """Block-wise Siamese mask [1, figure]: which patches the student keeps, (batch, n) sorted.

    `blocks` rectangles an image (4 or more patches, aspect log-uniform in [0.3, 1/0.3], as DINOv2
    draws them; ours may hang over the rim) cover it one after another until round(ratio * N)
    patches are gone; the last is cut, so every row keeps equally many and the batch a rectangle.
    """
    h, w = grid
    N, n_mask = h * w, round(ratio * h * w)
    if not 0 <= n_mask < N:
        raise ValueError(f"mask ratio {ratio} leaves no patch of a {h} x {w} grid")

    def uniform(low, high):
        return low + (high - low) * torch.rand(batch, blocks, generator=generator)
    area = uniform(min(4, N), max(4, n_mask / 2))
    aspect = uniform(math.log(0.3), -math.log(0.3)).exp()
    bh = (area * aspect).sqrt().round().clamp(1, h)                              # (batch, blocks)
    bw = (area / aspect).sqrt().round().clamp(1, w)
    top, left = ((uniform(0, n) - b / 2).round() for n, b in ((h, bh), (w, bw)))  # may overhang
    y, x = torch.arange(h)[:, None], torch.arange(w)
    a = [v[..., None, None] for v in (top, left, bh, bw)]
    inside = (y >= a[0]) & (y < a[0] + a[2]) & (x >= a[1]) & (x < a[1] + a[3])   # (b, blocks, h, w)
    inside = torch.cat([inside, torch.ones(batch, 1, h, w, dtype=torch.bool)], 1).flatten(2)
    first = inside.byte().argmax(1)                                              # (batch, N)
    order = (first * N + torch.arange(N)).argsort(1)                             # covered first
    return order[:, n_mask:].sort(1).values


def blank_patches(x, keep, patch_size):
    """x (B,C,H,W) with every patch that is not kept set to 0.5, the middle of the input range.

    For backbones that cannot drop tokens (ResNet).
    """
    B, _, H, W = x.shape
    h, w = H // patch_size, W // patch_size
    mask = torch.zeros(B, h * w, dtype=torch.bool, device=x.device).scatter_(1, keep, True)
    mask = mask.reshape(B, 1, h, w).repeat_interleave(patch_size, 2).repeat_interleave(
        patch_size, 3)
    return torch.where(mask, x, 0.5)


# ------------------------------------------------------------------------------- what the log says


@torch.no_grad()
def collapse(features):
    """(B,D) -> (std, rank): mean over dimensions of the std of L2-normalised features, times
    sqrt(D) (1 for isotropic noise, 0 when all scenes look alike), and the effective rank, the
    exponential of the entropy of the normalised singular values of the centred features."""
    z = F.normalize(features.float())
    z = z - z.mean(0)
    p = torch.linalg.svdvals(z)
    p = p / p.sum().clamp_min(1e-12)
    return float(z.std(0).mean() * z.shape[1] ** 0.5), float((-(p * (p + 1e-12).log()).sum()).exp())


def soft_share(q, hard, soft):
    """Share of the gradient norm at the embeddings q that comes from the weighted soft term."""
    norms = [torch.autograd.grad(x, q, retain_graph=True)[0].norm() for x in (hard, soft)]
    return float(norms[1] / (norms[0] + norms[1]).clamp_min(1e-12))
