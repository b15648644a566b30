"""Masks and losses: pure functions on tensors.

SoftCon [1] trains a student on two views of a scene. The student's query q_i must find the
teacher's key k_i of the same scene among the keys of all scenes (the hard term, InfoNCE [2]). Its
similarity to every key, its own included, should follow how much the land-cover labels of the two
images overlap (the soft term).

PerA [4] shows student and teacher different patches of one crop. The student must choose the
teacher's prototypes [3] and guess the pixels of patches that neither network sees.

[1] Wang, Albrecht, Zhu 2024, Multi-label guided soft contrastive learning
[2] van den Oord et al. 2018, CPC; He et al. 2020, MoCo; Chen, Xie, He 2021, MoCo v3
[3] Caron et al. 2021, DINO; Sablayrolles et al. 2019, KoLeo
[4] Shen et al. 2026, PerA, and its repository SathShen/PerA

Equations are numbered as in the README.

Letters: N queries of this rank, M keys of all ranks, D width, L label classes, K prototypes,
E width of PerA's embeddings, B batch, R ranks, C channels, H W height and width of an image,
P patch side, tau temperature.
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# --------------------------------------------------------------------- what both methods build on


def gather(x):
    """Collect the rows of all ranks, in rank order: (B/R, ...) on each of R ranks -> (B, ...).

    The result carries no gradient, with any number of ranks: keys come from the teacher, which is
    not trained. Every rank must call it.
    """
    x = x.detach()
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    x = x.contiguous()
    rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, x)
    return torch.cat(rows)


def at_least_float32(x):
    """Convert x to float32, or leave it if it is float64: no loss is computed in less."""
    if x.dtype == torch.float64:
        return x
    return x.float()


def product(a, b):
    """Matrix product of rows, a b^T, at least in float32: (N,D), (M,D) -> (N,M).

    Autocast would compute it in bfloat16, whose 8 bits put the nearest row in the wrong place.
    """
    a = at_least_float32(a)
    b = at_least_float32(b)
    if not torch.amp.is_autocast_available(a.device.type):          # as on the meta device
        return a @ b.T
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.T


def cosine(a, b):
    """Cosine similarity of rows: (N,D), (M,D) -> (N,M) in [-1,1], at least in float32.

    A row of zeros has similarity 0 to every row.
    """
    a = F.normalize(at_least_float32(a))
    b = F.normalize(at_least_float32(b))
    return product(a, b)


# ---------------------------------------------------------------------------------------- SoftCon


def has_labels(y):
    """Say which scenes carry any label: (N,L) multi-hot -> (N,) bool."""
    return (y > 0).any(1)


def label_similarity(y1, y2):
    """Cosine of label vectors, |A and B| / sqrt(|A| |B|): (N,L), (M,L) multi-hot -> (N,M) in [0,1].

    With one label per scene it is class equality. A scene without labels has similarity 0 to every
    scene. That says nothing about the scene, so it adds 0 to the soft term (see has_labels).
    """
    return cosine(y1.float(), y2.float())                                               # eq. (1)


def info_nce(q, k, tau, offset=0):
    """Hard contrast [1, figure; 2]: mean_i -log( exp(q_i.k_i/tau) / sum_j exp(q_i.k_j/tau) ).

    q (N,D) and k (M,D) are normalised here. The key of the same scene as query i is k[i + offset].
    Constant features give log(M). One key alone would make the loss 0 whatever the features are,
    so fewer than two keys are a ValueError.
    """
    if len(k) < 2:
        raise ValueError("contrastive learning needs a global batch of at least 2")
    logits = cosine(q, k) / tau                                                     # (N,M)
    same_scene = torch.arange(len(q), device=q.device) + offset                     # (N,)
    return F.cross_entropy(logits, same_scene)                                          # eq. (2)


def soft_contrastive(q, k, yq, yk, tau=0.2):
    """Soft contrast: the similarity c_ij = q_i.k_j follows the label similarity s_ij.

        mean_i  sum_j  BCE(sigmoid(c_ij / tau), s_ij)

    q (N,D) and k (M,D) are normalised here; yq (N,L) and yk (M,L) are multi-hot. The formula is
    our reading: we know of no published equation or temperature, and the pretraining code was never
    released. The term sums over the keys, so its share of the gradient grows with the batch.

    A pair of which one has no labels adds 0. N counts all rows nevertheless, so with few labels the
    term is weak. Divided by the number of labelled rows it would weigh each pair the more, the
    fewer labels there are: with labels of 10 % of UC Merced that was worse than no soft term.
    """
    s = label_similarity(yq, yk)                                                    # (N,M)
    logits = cosine(q, k) / tau                                                     # (N,M)
    terms = F.binary_cross_entropy_with_logits(logits, s.to(logits), reduction="none")
    labelled_pairs = has_labels(yq)[:, None] & has_labels(yk)                       # (N,M)
    terms = terms * labelled_pairs
    return terms.sum() / len(q)                                      # eq. (3), which is our reading


def softcon_loss(q, k, yq, yk, tau=0.2, weight=0.5, soft_tau=0.2):
    """InfoNCE + weight * soft term, for this rank's queries against the keys of all ranks.

    k and yk are already gathered from all ranks; q and yq are this rank's. All ranks have equally
    many queries, so the mean of what they return is the loss of all.

    q (N,D) comes from the student, k (M,D) from the teacher. yq (N,L) and yk (M,L) are the labels
    of the two views. The views are two seasons of a scene, so s_ii is what the labels of both say
    and not always 1. Returns (loss, InfoNCE, soft term).
    """
    rank = 0
    if dist.is_initialized():
        rank = dist.get_rank()
    hard = info_nce(q, k, tau, offset=rank * len(q))
    soft = soft_contrastive(q, k, yq, yk, soft_tau)
    loss = hard + weight * soft                                                         # eq. (4)
    return loss, hard, soft


# ------------------------------------------------------------------------------------------- PerA


class Centre(torch.nn.Module):
    """Running mean (1,K) of the teacher's prototype scores, from 0; part of the checkpoint.

    dino_loss subtracts it before the teacher's softmax, so that no prototype can win for every
    image.
    """

    def __init__(self, prototypes, momentum=0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(1, prototypes))

    @torch.no_grad()
    def update(self, scores):
        """Move the centre towards this step's scores: value <- 0.9 value + 0.1 mean over all ranks.

        scores (n,K) of this rank, or their mean (1,K). Call it after the loss: a step is centred
        by the steps before it.
        """
        mean = scores.mean(0, keepdim=True).to(self.value)                          # (1,K)
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        # a new tensor: the backward pass still needs the old one
        self.value = self.value.lerp(mean, 1 - self.momentum)                           # eq. (11)


def dino_loss(student, teacher, centre, tau_teacher, tau_student=0.1):
    """Cross-entropy of prototype scores [4, cls_loss.py]:

        -mean_i sum_k softmax((t_i - c) / tau_teacher)_k  log softmax(s_i / tau_student)_k

    student and teacher (n,K): scores s and t of the same crops; centre c (1,K). The teacher's
    scores get no gradient.
    """
    teacher = at_least_float32(teacher.detach())
    target = ((teacher - centre) / tau_teacher).softmax(1)                          # (n,K)
    log_p = (at_least_float32(student) / tau_student).log_softmax(1)                # (n,K)
    cross_entropy = -(target * log_p).sum(1)                                        # (n,)
    return cross_entropy.mean()                                                         # eq. (7)


def koleo(x):
    """Spread rows out [4, koleo_loss.py]: -mean_i log(distance to the nearest other row + 1e-8).

    x (n,D) is normalised here. A single row has no neighbour: ValueError.
    """
    if len(x) < 2:
        raise ValueError("koleo needs at least 2 images per rank")
    x = F.normalize(at_least_float32(x))
    with torch.no_grad():
        similarity = product(x, x)                                                  # (n,n)
        similarity.fill_diagonal_(-2)               # below any cosine: no row is its own neighbour
        nearest = similarity.argmax(1)                                              # (n,)
    distance = F.pairwise_distance(x, x[nearest], eps=1e-8)                         # (n,)
    return -(distance + 1e-8).log().mean()                                              # eq. (8)


def patchify(x, P):
    """Cut images into patches: (B,C,H,W) -> (B,N,PPC), a patch's values by row, column, channel."""
    B, C, H, W = x.shape
    x = x.reshape(B, C, H // P, P, W // P, P)
    x = x.permute(0, 2, 4, 3, 5, 1)                                       # (B, H/P, W/P, P, P, C)
    return x.reshape(B, -1, P * P * C)


def pixel_loss(guess, pixels, guessed_patches):
    """768 x the mean squared error of the guessed patches.

    guess (b,m,PPC) is compared with those of pixels (b,N,PPC), which patchify gives, that
    guessed_patches (b,m) names. The factor 768 is the number of values of PerA's 16 x 16 x 3
    patches: for them the loss is the squared error summed over a patch, as released. A mean keeps
    the weight of the term the same for other patch sizes and bands.
    """
    index = guessed_patches[..., None].expand(-1, -1, pixels.shape[-1])             # (b,m,PPC)
    target = pixels.gather(1, index)                                                # (b,m,PPC)
    error = F.mse_loss(at_least_float32(guess), at_least_float32(target))
    return 768 * error                                                                  # eq. (9)


def pera_loss(student, teacher, prototypes, centre, tau_teacher, n_crops, n_global, tau=0.1):
    """PerA's two losses on CLS embeddings [4], crop by crop: returns (dino, koleo).

    student and teacher (n_crops B, E): embeddings, all images of crop 0 first, then those of crop
    1, and so on, the global crops before the local ones. prototypes: the student's and the
    teacher's matrix (K,E).

    dino is the mean over the crops, each against the same crop of the teacher. koleo is the sum
    over the global crops, and it spreads their scores, not their embeddings, as released.
    """
    student_prototypes, teacher_prototypes = prototypes

    def losses_of_crop(z_student, z_teacher, is_global):
        s = product(z_student, student_prototypes)                                  # (B,K)
        t = product(z_teacher, teacher_prototypes)                                  # (B,K)
        dino = dino_loss(s, t, centre, tau_teacher, tau)
        spread = koleo(s) if is_global else s.new_zeros(())
        return dino, spread

    dino_sum = 0
    koleo_sum = 0
    crops = zip(student.chunk(n_crops), teacher.chunk(n_crops))                     # 2 x (B,E)
    for i, (z_student, z_teacher) in enumerate(crops):
        # Scores are large: K is 131,072. `checkpoint` forgets those of a crop after its loss and
        # lets the backward pass compute them again, so that one crop's are in memory at a time.
        dino, spread = checkpoint(losses_of_crop, z_student, z_teacher, i < n_global,
                                  use_reentrant=False, preserve_rng_state=False)
        dino_sum = dino_sum + dino
        koleo_sum = koleo_sum + spread
    return dino_sum / n_crops, koleo_sum


# ------------------------------------------------------------------------------------------ masks


def disjoint_masks(batch, n_tokens, student=0.2, guessed=0.2, teacher=0.6, generator=None,
                   device=None):
    """Draw PerA's three sets of patches, which share no patch [4, pera.py].

    Returns student_patches, which only the student sees, guessed_patches, which nobody sees and
    the student must guess, and teacher_patches. Each is (batch, n) indices, sorted, drawn
    uniformly. The arguments are shares of the n_tokens patches. Shares that sum to less than 1
    leave the rest unused. A sum above 1 or a set without a patch is a ValueError.
    """
    unused = 1 - student - guessed - teacher
    n_student = round(student * n_tokens)
    # from the other side, as released: that decides which way a half is rounded
    n_teacher = n_tokens - round((1 - teacher) * n_tokens)
    n_unused = round(max(unused, 0) * n_tokens)
    n_guessed = n_tokens - n_student - n_teacher - n_unused
    # sums such as 0.2 + 0.2 + 0.6 may exceed 1 by a rounding error
    if unused < -1e-6 or min(n_student, n_guessed, n_teacher) < 1:
        raise ValueError(f"mask ratios {student} {guessed} {teacher} of {n_tokens} patches: each "
                         f"set needs at least one, and their sum may not exceed 1")
    noise = torch.rand(batch, n_tokens, generator=generator)
    order = noise.argsort(1)                                     # (batch, N), a permutation each
    counts = [n_student, n_guessed, n_unused, n_teacher]
    student_patches, guessed_patches, _, teacher_patches = [
        patches.sort(1).values.to(device) for patches in order.split(counts, dim=1)]    # eq. (6)
    return student_patches, guessed_patches, teacher_patches


def draw_blocks(batch, grid, n_mask, generator, blocks):
    """Draw rectangles for block_mask: top, left, height, width, each (batch, blocks), in patches.

    A rectangle has about 4 to max(4, n_mask / 2) patches. The logarithm of its aspect (height /
    width) is uniform, from 0.3 to 1/0.3, as DINOv2 draws it. Its centre is uniform over the grid,
    so it may hang over the rim.
    """
    h, w = grid

    def uniform(low, high):
        return low + (high - low) * torch.rand(batch, blocks, generator=generator)

    area = uniform(min(4, h * w), max(4, n_mask / 2))
    aspect = uniform(math.log(0.3), -math.log(0.3)).exp()
    height = (area * aspect).sqrt().round().clamp(1, h)
    width = (area / aspect).sqrt().round().clamp(1, w)
    top = (uniform(0, h) - height / 2).round()
    left = (uniform(0, w) - width / 2).round()
    return top, left, height, width


def block_mask(batch, grid, ratio, generator=None, blocks=16):
    """Block-wise Siamese mask [1, figure]: the patches that the student keeps, (batch, n) sorted.

    grid: (rows, columns) of patches. `blocks` rectangles per image cover it one after another until
    round(ratio * N) of its N patches are covered. The last rectangle is cut, so that every image
    keeps equally many patches. A ratio that leaves no patch is a ValueError.
    """
    h, w = grid
    N = h * w
    n_mask = round(ratio * h * w)
    if not 0 <= n_mask < N:
        raise ValueError(f"mask ratio {ratio} leaves no patch of a {h} x {w} grid")

    rectangles = draw_blocks(batch, grid, n_mask, generator, blocks)
    top, left, height, width = [v[..., None, None] for v in rectangles]     # (batch, blocks, 1, 1)
    y = torch.arange(h)[:, None]                                            # (h, 1)
    x = torch.arange(w)                                                     # (w,)
    in_rows = (y >= top) & (y < top + height)                               # (batch, blocks, h, 1)
    in_columns = (x >= left) & (x < left + width)                           # (batch, blocks, 1, w)
    covered = in_rows & in_columns                                          # (batch, blocks, h, w)

    # the number of the first rectangle that covers a patch; `blocks`, the last number, if none does
    number = torch.arange(blocks)[:, None, None]
    first = torch.where(covered, number, blocks).amin(1).flatten(1)         # (batch, N)
    # Patches by that number, so that the first n_mask go; a stable sort takes equal ones row by
    # row. Should the rectangles cover too few patches, which is rare, uncovered ones go as well.
    order = first.argsort(stable=True, dim=1)                               # (batch, N)
    return order[:, n_mask:].sort(1).values


def blank_patches(x, patches, patch_size):
    """Set every patch of x (B,C,H,W) but the given patches (B,n) to 0.5, the sensor's mean.

    This masks the input of backbones that cannot drop tokens (ResNet).
    """
    B, _, H, W = x.shape
    h = H // patch_size
    w = W // patch_size
    kept = torch.zeros(B, h * w, dtype=torch.bool, device=x.device)
    kept = kept.scatter(1, patches, True).reshape(B, 1, h, w)
    kept = kept.repeat_interleave(patch_size, dim=2)
    kept = kept.repeat_interleave(patch_size, dim=3)                                # (B,1,H,W)
    return torch.where(kept, x, 0.5)


# ------------------------------------------------------------------------------- what the log says


@torch.no_grad()
def collapse(features):
    """Measure over all ranks how spread the features are: (B/R, D) -> (std, effective rank).

    std: of the L2-normalised features, a mean over the dimensions, times sqrt(D). It is 1 for
    isotropic noise and 0 when all scenes look alike. Effective rank: the exponential of the
    entropy of the normalised singular values of the centred features, from 1 to min(B - 1, D).
    Every rank must call it.
    """
    z = F.normalize(gather(features.float()))                                       # (B,D)
    z = z - z.mean(0)
    D = z.shape[1]
    std = z.std(0).mean() * D ** 0.5
    p = torch.linalg.svdvals(z)                                                     # (min(B,D),)
    p = p / p.sum().clamp_min(1e-12)
    log_p = (p + 1e-12).log()
    entropy = -(p * log_p).sum()
    return float(std), float(entropy.exp())


def soft_share(q, hard, soft):
    """Share of the weighted soft term in the gradient norm at the embeddings q, over all ranks.

    q (N,D) are this rank's; hard and soft its two terms of the loss, weights included. Returns
    |soft| / (|hard| + |soft|) in [0,1]. Every rank must call it, before the backward pass.
    """
    norms = []
    for term in (hard, soft):
        gradient, = torch.autograd.grad(term, q, retain_graph=True)
        norms.append(gradient.norm())
    ranks = gather(torch.stack(norms)[None])                                        # (R,2)
    hard_norm, soft_norm = ranks.norm(dim=0)       # the root of the squares summed over all ranks
    return float(soft_norm / (hard_norm + soft_norm).clamp_min(1e-12))
