"""Backbones, heads, and reading and writing their weights.

The ResNet has torchvision's parameter names and the ViT has DINOv2's. A checkpoint trained here
loads into those code bases without a converter, and their checkpoints load here. The first layer
takes any number of channels (Sentinel-1: 2, Sentinel-2: 12 or 13, RGB: 3). The other layers do not
depend on the satellite.

    build(arch, in_chans) -> module    load_pretrained(module, path)    python model.py inspect FILE
    build_from(path) -> module         export_backbone(module)          python model.py fold -h

[1] He et al. 2016, Deep residual learning; the stride sits on the 3x3 as in torchvision (v1.5)
[2] Dosovitskiy et al. 2021, ViT; Oquab et al. 2023, DINOv2 (LayerScale, SwiGLU, position table)
[3] Chen, Xie, He 2021, MoCo v3: projector and predictor
[4] Shen et al. 2026, PerA

Letters: B batch, C channels, H W pixels, P patch side, N = (H/P)(W/P) patches, D width, R registers
"""
import argparse
import math
import os
import re
import sys
import zipfile
from collections import Counter

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

RESNETS = {
    "resnet18": dict(depths=(2, 2, 2, 2), bottleneck=False),
    "resnet50": dict(depths=(3, 4, 6, 3), bottleneck=True),
}
VITS = {
    "vit_tiny": dict(width=192, depth=12, heads=3),
    "vit_small": dict(width=384, depth=12, heads=6),
    "vit_base": dict(width=768, depth=12, heads=12),
    "vit_large": dict(width=1024, depth=24, heads=16),
    "vit_giant2": dict(width=1536, depth=40, heads=24),         # DINOv2's ViT-g, with SwiGLU
    "vit_pera_g": dict(width=1024, depth=40, heads=16),         # PerA's "ViT-g", no LayerScale
}


def build(arch, in_chans, img_size=224, patch_size=14, registers=0, drop_path=0.0, layerscale=None):
    """Makes a backbone with random weights, (B,C,H,W) -> (B, embed_dim).

    arch is a name in RESNETS or VITS. A ResNet uses only arch and in_chans. For a ViT, img_size
    and patch_size are in pixels, registers counts extra tokens, drop_path is the share of samples
    that skip a block's branches in training, and layerscale=None means yes but for vit_pera_g.
    build(**model.spec) makes another network of the same kind.
    Raises ValueError for an unknown arch, or if patch_size does not divide img_size.
    """
    if arch in RESNETS:
        spec = dict(arch=arch, in_chans=in_chans)
        model = ResNet(**spec)
    elif arch in VITS:
        if layerscale is None:
            layerscale = arch != "vit_pera_g"
        spec = dict(arch=arch, in_chans=in_chans, img_size=img_size, patch_size=patch_size,
                    registers=registers, drop_path=drop_path, layerscale=layerscale)
        model = ViT(**spec)
    else:
        raise ValueError(f"unknown arch {arch!r}; choose from {', '.join([*RESNETS, *VITS])}")
    model.spec = spec
    return model


# ------------------------------------------------------------------------------------- ResNet [1]


class AllReduce(torch.autograd.Function):
    """Sums a tensor over all ranks.

    The gradient is summed as well, because the loss of every rank depends on x of every rank.
    """

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class BatchNorm(nn.BatchNorm2d):
    """Batch norm of (B,C) or (B,C,H,W) over the global batch.

    W ranks with B/W images each compute what one rank with B images computes. On one rank it is
    PyTorch's own batch norm. nn.SyncBatchNorm does the same, but refuses to run on the CPU.
    """

    def _check_input_dim(self, x):
        pass                              # nn.BatchNorm2d would refuse (B,C), which the heads have

    def forward(self, x):
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world == 1 or not self.training:
            return super().forward(x)
        # channels last; the means below do not depend on the order of H and W
        rows = x.transpose(1, -1).to(self.running_mean.dtype)            # (B, ..., C)
        dims = tuple(range(x.dim() - 1))                                 # all but the last
        count = x.numel() // x.shape[1] * world                          # values a channel
        mean = AllReduce.apply(rows.mean(dims)) / world                  # (C,)
        rows = rows - mean
        var = AllReduce.apply(rows.square().mean(dims)) / world          # (C,)
        rows = rows * (var + self.eps).rsqrt()
        if self.affine:
            rows = rows * self.weight + self.bias
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(var.detach() * count / (count - 1), self.momentum)
        return rows.transpose(1, -1).to(x.dtype)


def downsample(c_in, c_out, stride):
    """The shortcut of a residual block: a 1x1 convolution where the shape of x changes."""
    if stride == 1 and c_in == c_out:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), BatchNorm(c_out))


class BasicBlock(nn.Module):
    """ResNet-18's residual block of two 3x3: (B, c_in, H, W) -> (B, c, H/stride, W/stride)."""
    expansion = 1

    def __init__(self, c_in, c, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c, 3, stride, padding=1, bias=False)
        self.bn1 = BatchNorm(c)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.bn2 = BatchNorm(c)
        self.downsample = downsample(c_in, c, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))                              # (B, c, H/s, W/s)
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x))


class Bottleneck(nn.Module):
    """ResNet-50's residual block of 1x1, 3x3, 1x1, the last of which makes 4 times the channels:
    (B, c_in, H, W) -> (B, 4c, H/stride, W/stride)."""
    expansion = 4

    def __init__(self, c_in, c, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c, 1, bias=False)
        self.bn1 = BatchNorm(c)
        self.conv2 = nn.Conv2d(c, c, 3, stride, padding=1, bias=False)
        self.bn2 = BatchNorm(c)
        self.conv3 = nn.Conv2d(c, 4 * c, 1, bias=False)
        self.bn3 = BatchNorm(4 * c)
        self.downsample = downsample(c_in, 4 * c, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))                              # (B, c, H, W)
        y = F.relu(self.bn2(self.conv2(y)))                              # (B, c, H/s, W/s)
        y = self.bn3(self.conv3(y))                                      # (B, 4c, H/s, W/s)
        return F.relu(y + self.downsample(x))


def residual_layer(block, c_in, c, depth, stride):
    """`depth` residual blocks, of which the first one changes channels and resolution."""
    blocks = [block(c_in, c, stride)]
    for _ in range(depth - 1):
        blocks.append(block(c * block.expansion, c, stride=1))
    return nn.Sequential(*blocks)


class ResNet(nn.Module):
    """torchvision's ResNet without `fc`: (B,C,H,W) -> pooled features (B, embed_dim)."""

    def __init__(self, arch, in_chans):
        super().__init__()
        depths = RESNETS[arch]["depths"]
        block = Bottleneck if RESNETS[arch]["bottleneck"] else BasicBlock
        expansion = block.expansion
        self.in_chans = in_chans
        self.embed_dim = 512 * expansion
        self.conv1 = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNorm(64)
        self.layer1 = residual_layer(block, 64, 64, depths[0], stride=1)
        self.layer2 = residual_layer(block, 64 * expansion, 128, depths[1], stride=2)
        self.layer3 = residual_layer(block, 128 * expansion, 256, depths[2], stride=2)
        self.layer4 = residual_layer(block, 256 * expansion, 512, depths[3], stride=2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def feature_maps(self, x):
        """The outputs of the four layers, from fine to coarse: (B,C,H,W) -> [(B,D/8,H/4,W/4), ...].

        For heads that say something of each pixel; the ViT's last_blocks serve them, too.
        """
        x = F.relu(self.bn1(self.conv1(x)))                              # (B, 64, H/2, W/2)
        x = F.max_pool2d(x, 3, stride=2, padding=1)                      # (B, 64, H/4, W/4)
        x1 = self.layer1(x)                                              # (B, D/8, H/4, W/4)
        x2 = self.layer2(x1)                                             # (B, D/4, H/8, W/8)
        x3 = self.layer3(x2)                                             # (B, D/2, H/16, W/16)
        x4 = self.layer4(x3)                                             # (B, D, H/32, W/32)
        return [x1, x2, x3, x4]

    def forward(self, x):
        return self.feature_maps(x)[-1].mean((2, 3))                     # (B, D)


# ---------------------------------------------------------------------------------------- ViT [2]


def check_grid(H, W, P):
    """The number of patches along both sides of an image, (H/P, W/P).

    Raises ValueError unless P divides H and W.
    """
    if H % P or W % P:
        raise ValueError(f"image size {H} x {W} is not divisible by patch size {P}")
    return H // P, W // P


def take(x, index):
    """Picks rows: x (B,N,D) or (1,N,D), their indices (B,n) -> (B,n,D)."""
    return x.take_along_dim(index[..., None], 1)


# Crops of different sizes have sequences of different lengths. All their T tokens lie one after
# another in one tensor (T,D), and `groups` says how to cut it: first b sequences of n tokens, then
# b others of another n, and so on. Only attention has to know where a sequence ends, so that
# nothing needs padding.


def pack(sequences):
    """Joins [(b,n,D), ...] to one tensor (T,D); returns it and the groups [(b, n), ...]."""
    groups = [x.shape[:2] for x in sequences]
    return torch.cat([x.flatten(0, 1) for x in sequences]), groups


def unpack(x, groups):
    """Undoes pack: (T,D) and [(b, n), ...] -> [(b,n,D), ...], which are views of x."""
    parts = x.split([b * n for b, n in groups])
    return [part.view(b, n, -1) for part, (b, n) in zip(parts, groups)]


class Attention(nn.Module):
    """Multi-head self-attention within each sequence: x (T,D), groups -> (T,D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, groups):
        mixed = []
        for qkv in unpack(self.qkv(x), groups):                          # (b, n, 3D)
            qkv = qkv.unflatten(2, (3, self.heads, -1))                  # (b, n, 3, heads, d)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)               # each (b, heads, n, d)
            y = F.scaled_dot_product_attention(q, k, v)                  # (b, heads, n, d)
            mixed.append(y.transpose(1, 2).flatten(2))                   # (b, n, D)
        x, _ = pack(mixed)                                               # (T, D)
        return self.proj(x)


class MLP(nn.Module):
    """The usual MLP of a ViT block: (T,D) -> (T,D), with 4D hidden values."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """The gated MLP of DINOv2's ViT-g: (T,D) -> (T,D).

    The hidden width is 8/3 D, rounded up to a multiple of 8. So it has as many weights as MLP.
    """

    def __init__(self, dim):
        super().__init__()
        hidden = (int(4 * dim * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)                           # (T, hidden) each
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """Multiplies each channel by a learned factor.

    It starts at 1, which changes nothing; DINOv2's trained factors replace it when they are loaded.
    """

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class ViTBlock(nn.Module):
    """Pre-norm transformer block on packed sequences: x (T,D), groups [(b, n), ...] -> (T,D)."""

    def __init__(self, dim, heads, swiglu, layerscale, drop_path):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.mlp = SwiGLU(dim) if swiglu else MLP(dim)
        self.ls1 = LayerScale(dim) if layerscale else nn.Identity()
        self.ls2 = LayerScale(dim) if layerscale else nn.Identity()

    def attention_branch(self, x, groups):
        return self.ls1(self.attn(self.norm1(x), groups))

    def mlp_branch(self, x, groups):
        return self.ls2(self.mlp(self.norm2(x)))

    def forward(self, x, groups):
        x = self.residual(x, groups, self.attention_branch)
        return self.residual(x, groups, self.mlp_branch)

    def residual(self, x, groups, branch):
        """x + branch(x), with stochastic depth in training: x (T,D) -> (T,D).

        In each group a random share drop_path of the samples skips the branch. It is computed for
        the others alone, and what it gives is scaled up so that the expected sum stays the same.
        [dinov2, drop_add_residual_stochastic_depth]
        """
        if not self.training or self.drop_path == 0:
            return x + branch(x, groups)
        taking_part = []
        scales = []
        all_rows = torch.arange(len(x), device=x.device)                 # (T,)
        for rows in unpack(all_rows, groups):                            # (b, n, 1)
            b, n, _ = rows.shape
            count = max(1, int(b * (1 - self.drop_path)))
            samples = torch.randperm(b, device=x.device)[:count]
            taking_part.append(rows[samples])                            # (count, n, 1)
            scales.append(x.new_full((count * n, 1), b / count))
        rows, branch_groups = pack(taking_part)                          # (t, 1)
        rows = rows[:, 0]
        y = branch(x[rows], branch_groups) * torch.cat(scales)           # (t, D)
        return x.index_add(0, rows, y.to(x.dtype))                       # (T, D)


class ViT(nn.Module):
    """DINOv2's vision transformer: (B,C,H,W) -> the CLS token after the final norm (B, embed_dim).

    grid is (h, w), the number of patches along both sides at img_size.
    """

    def __init__(self, arch, in_chans, img_size, patch_size, registers, drop_path, layerscale):
        super().__init__()
        dim = VITS[arch]["width"]
        self.in_chans = in_chans
        self.img_size = img_size
        self.patch_size = patch_size
        self.registers = registers
        self.embed_dim = dim
        self.grid = check_grid(img_size, img_size, patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 1e-6)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(self.grid), dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if registers:
            self.register_tokens = nn.Parameter(torch.randn(1, registers, dim) * 1e-6)
        if layerscale:
            # all of DINOv2's files have this token; here masked patches are dropped instead
            self.mask_token = nn.Parameter(torch.zeros(1, dim), requires_grad=False)
        # a dictionary, because the weights are called patch_embed.proj in DINOv2
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(in_chans, dim, patch_size, patch_size)})
        self.blocks = nn.ModuleList()
        for _ in range(VITS[arch]["depth"]):
            self.blocks.append(ViTBlock(dim, VITS[arch]["heads"], swiglu=arch == "vit_giant2",
                                        layerscale=layerscale, drop_path=drop_path))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def positions(self, h, w, table=None):
        """The position embeddings of an image of h x w patches, CLS first: (1, 1+h*w, D).

        table: (1, 1+M*M, D), by default the model's. It is resampled unless h = w = M, as DINOv2
        does: its models without registers add 0.1 to h and w and do not antialias, those with
        registers add nothing and antialias. [dinov2, interpolate_pos_encoding]
        """
        if table is None:
            table = self.pos_embed
        M = math.isqrt(table.shape[1] - 1)
        if (h, w) == (M, M):
            return table
        grid = table[:, 1:].float().reshape(1, M, M, -1)                 # (1, M, M, D)
        grid = grid.permute(0, 3, 1, 2)                                  # (1, D, M, M)
        if self.registers:
            grid = F.interpolate(grid, size=(h, w), mode="bicubic", antialias=True)
        else:
            scale = ((h + 0.1) / M, (w + 0.1) / M)
            grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        patches = grid.flatten(2).mT.to(table.dtype)                     # (1, h*w, D)
        return torch.cat([table[:, :1], patches], 1)

    def embed(self, x, keep=None):
        """Turns pixels (B,C,H,W) into tokens (B, 1+R+n, D): CLS, registers, patches.

        keep (B,n) holds the indices of the patches to compute; without it all N are computed. A
        convolution with stride P is one matrix product per patch, so the patches are cut out
        first and multiplied afterwards, and those that are dropped cost nothing.
        Raises ValueError if C, H or W do not fit the model.
        """
        B, C, H, W = x.shape
        P = self.patch_size
        if C != self.in_chans:
            raise ValueError(f"input has {C} channels, the model takes {self.in_chans}")
        h, w = check_grid(H, W, P)
        table = self.positions(h, w)                                     # (1, 1+N, D)
        x = x.reshape(B, C, h, P, w, P).permute(0, 2, 4, 1, 3, 5)        # (B, h, w, C, P, P)
        x = x.reshape(B, h * w, C * P * P)                               # (B, N, CPP)
        positions = table[:, 1:]                                         # (1, N, D)
        if keep is not None:
            x = take(x, keep)                                            # (B, n, CPP)
            positions = take(positions, keep)                            # (B, n, D)
        proj = self.patch_embed["proj"]
        patches = F.linear(x, proj.weight.flatten(1), proj.bias)         # (B, n, D)
        patches = patches + positions
        cls = self.cls_token + table[:, :1]                              # (1, 1, D)
        tokens = [cls.expand(B, -1, -1)]                                 # (B, 1, D)
        if self.registers:
            tokens.append(self.register_tokens.expand(B, -1, -1))        # (B, R, D)
        tokens.append(patches)
        return torch.cat(tokens, 1)                                      # (B, 1+R+n, D)

    def outputs(self, x, n, keep=None):
        """The outputs of the last n blocks, each after the final norm: [(B, 1+R+n, D), ...]."""
        first = len(self.blocks) - n
        outputs = []
        x, groups = pack([self.embed(x, keep)])                          # (T, D)
        for i, block in enumerate(self.blocks):
            x = block(x, groups)
            if i >= first:
                outputs += unpack(self.norm(x), groups)                  # one group: (B, 1+R+n, D)
        return outputs

    def tokens(self, x, keep=None):
        """All tokens after the final norm: (B,C,H,W), keep (B,n) or None -> (B, 1+R+n, D)."""
        return self.outputs(x, 1, keep)[0]

    def forward(self, x, keep=None):
        return self.tokens(x, keep)[:, 0]                                # (B, D)

    def last_blocks(self, x, n):
        """CLS and patches of the last n blocks after the final norm: [((B,D), (B,N,D)), ...]."""
        first_patch = 1 + self.registers
        return [(y[:, 0], y[:, first_patch:]) for y in self.outputs(x, n)]


# ------------------------------------------------------------------------------------------- heads


def head(widths):
    """MoCo v3's MLP [3] through the given widths: (B, widths[0]) -> (B, widths[-1]).

    Every linear layer is without bias and has batch norm after it. ReLU follows all but the last,
    whose batch norm has neither scale nor shift.
    """
    layers = []
    for d_in, d_out in zip(widths[:-2], widths[1:-1]):
        layers += [nn.Linear(d_in, d_out, bias=False), BatchNorm(d_out), nn.ReLU()]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=False))
    layers.append(BatchNorm(widths[-1], affine=False))
    return nn.Sequential(*layers)


class Branch(nn.Module):
    """SoftCon's student or teacher: backbone, projector and, for the student, predictor.

    Maps images (B,C,H,W) to embeddings (B, out) and the backbone's features (B, D). predict=True
    is the student. keep (B,n) names the patches that a ViT sees, as in ViT.embed.
    """

    def __init__(self, backbone, hidden=4096, predict=False, out=256):
        super().__init__()
        self.backbone = backbone
        self.projector = head([backbone.embed_dim, hidden, hidden, out])
        self.predictor = head([out, hidden, out]) if predict else nn.Identity()

    def forward(self, x, keep=None):
        if keep is None:
            features = self.backbone(x)                                  # (B, D)
        else:
            features = self.backbone(x, keep)                            # (B, D)
        z = self.projector(features)                                     # (B, out)
        return self.predictor(z), features


class PrototypeHead(nn.Module):
    """PerA's head [4]: an MLP whose output (n, 384) of length 1 is compared with `out` prototypes.

    forward returns the embeddings (n, 384) and prototypes() the matrix (out, 384). The caller
    multiplies them, since all n x out products may be too many to hold at once. Row k of the
    matrix is g_k v_k / |v_k|, and g_k is trained from 1 on. The head that guesses pixels has the
    same form: there a product is no score but the value of one pixel.
    """

    def __init__(self, dim, out, hidden, bottleneck=384):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(),
                                 nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, bottleneck))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.weight_v = nn.Linear(bottleneck, out, bias=False).weight    # starts as a layer's does
        self.weight_g = nn.Parameter(torch.ones(out, 1))

    def forward(self, x):
        return F.normalize(self.mlp(x), dim=-1, eps=1e-6)                # (n, 384)

    def prototypes(self):
        return F.normalize(self.weight_v) * self.weight_g                # (out, 384)


class SparseBranch(nn.Module):
    """PerA's student or teacher [4]: some patches of several crops -> CLS -> prototypes.

    predict=True is the student, which also guesses the pixels of patches that neither side sees.
    Mask tokens stand for these patches and know only their position. They join the global crops
    in the middle of the network.
    """

    def __init__(self, backbone, prototypes=131072, hidden=2048, predict=False):
        super().__init__()
        self.backbone = backbone
        self.cls_head = PrototypeHead(backbone.embed_dim, prototypes, hidden)
        if predict:
            values = backbone.in_chans * backbone.patch_size ** 2        # PPC, numbers in a patch
            self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, backbone.embed_dim))
            self.pred_head = PrototypeHead(backbone.embed_dim, values, hidden)

    def forward(self, crops, keep, unseen=None):
        """Runs all crops at once.

        crops: [(b,C,H,W), ...], one tensor for each size, the global crops first.
        keep: [(b,n), ...], the indices of the patches to see of each crop.
        unseen: (b,m), the indices of the patches to guess of the global crops, or None.
        Returns the embeddings (sum of b, 384), the CLS features (sum of b, D) and the guesses
        (b,m,PPC), which are None if unseen is.
        """
        net = self.backbone
        middle = len(net.blocks) // 2
        x, groups = pack([net.embed(crop, seen) for crop, seen in zip(crops, keep)])     # (T, D)
        for i, block in enumerate(net.blocks):
            if i == middle and unseen is not None:
                h, w = check_grid(*crops[0].shape[2:], net.patch_size)
                x, groups = self.add_mask_tokens(x, groups, net.positions(h, w), unseen)
            x = block(x, groups)
        outputs = unpack(net.norm(x), groups)                            # [(b, 1+R+n, D), ...]
        cls = torch.cat([y[:, 0] for y in outputs])                      # (sum of b, D)
        guess = None
        if unseen is not None:
            masked = outputs[0][:, -unseen.shape[1]:]                    # (b, m, D)
            guess = self.pred_head(masked) @ self.pred_head.prototypes().T        # (b, m, PPC)
        return self.cls_head(cls), cls, guess

    def add_mask_tokens(self, x, groups, table, unseen):
        """Appends mask tokens at the positions unseen (b,m) to the sequences of the first group.

        They stand behind the other tokens, which is as good as any place, since attention knows
        no order. Returns the packed tokens and their groups.
        """
        tokens = self.mask_token + take(table[:, 1:], unseen)            # (b, m, D)
        sequences = unpack(x, groups)
        sequences[0] = torch.cat([sequences[0], tokens.to(x.dtype)], 1)  # (b, 1+R+n+m, D)
        return pack(sequences)


@torch.no_grad()
def ema_update(teacher, student, momentum):
    """Moves each parameter of the teacher: teacher <- momentum teacher + (1 - momentum) student.

    Buffers do not move: the teacher's batch norms keep the statistics of their own batches [3].
    """
    source = dict(student.named_parameters())
    for name, parameter in teacher.named_parameters():
        parameter.lerp_(source[name], 1 - momentum)                      # eq. (5)


# ----------------------------------------------------------------------------- reading a checkpoint

INPUT_LAYERS = ("conv1.weight", "patch_embed.proj.weight")               # of ResNet, of ViT

# Every ResNet and every ViT has two of these keys, so that a backbone is found if one is missing.
LANDMARKS = ("layer1.0.conv1.weight", "layer4.0.conv1.weight",
             "patch_embed.proj.weight", "cls_token")

# Of several backbones in a file the one with such a word in its prefix is what its authors
# evaluate: the teacher in DINO, PerA and our runs, the query or base encoder in MoCo v2 and v3.
PUBLISHED = ("teacher", "encoder_q", "base_encoder")

# DINOv2's name -> timm's, parts of a key
TIMM_SWIGLU = {"mlp.w12.": "mlp.fc1.", "mlp.w3.": "mlp.fc2."}
TIMM_REGISTERS = {"register_tokens": "reg_token"}


def check_archive(path):
    """Raises an error if a zip file is compressed or a checksum is wrong.

    torch.save never compresses, and torch.load looks at no checksum: a bit that has flipped on
    the disk would go unnoticed.
    """
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile("compressed")
        if archive.testzip() is not None:
            raise zipfile.BadZipFile("wrong checksum")


def flatten(tree, depth=4, prefix=""):
    """{dotted key: tensor} of nested dictionaries, at most `depth` deep.

    Four levels reach optimiser.state.0.exp_avg. A limit is needed because a dictionary may
    contain itself. Anything but a dictionary holds no tensors.
    """
    tensors = {}
    if not isinstance(tree, dict):
        return tensors
    for key, value in tree.items():
        if isinstance(value, torch.Tensor):
            tensors[f"{prefix}{key}"] = value
        elif depth > 1:
            tensors |= flatten(value, depth - 1, f"{prefix}{key}.")
    return tensors


def check_tensor(tensor):
    """Raises an error if a tensor has no numbers, or claims far more than the file holds.

    A tensor on the meta device has none, and one that was expanded may turn 4 bytes into 4 TB.
    """
    claimed = tensor.nbytes
    if tensor.is_meta or claimed > tensor.untyped_storage().nbytes() + 2 ** 30:
        raise ValueError(f"{claimed} bytes are not in the file")


def explain(error):
    """Why a file could not be read, in one line."""
    if isinstance(error, OSError) and error.filename:
        return error.strerror                                            # missing, a folder, ...
    code = re.search(r"GLOBAL (\S+)", str(error))      # torch's word for a function to be called
    if code:
        return f"refused, it wants to run code ({code[1]})"
    return "damaged, compressed, or not a PyTorch checkpoint"


def read_tensors(path):
    """Reads what torch.save wrote, {dotted key: tensor}, and runs no code in it.

    Raises ValueError with the path in one line if the file is missing, wants to run code, is
    damaged or compressed, or is no checkpoint at all.
    """
    try:
        is_zip = zipfile.is_zipfile(path)          # not in files from before PyTorch 1.6
        if is_zip:
            check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):     # DINO saves its flags
            # mmap leaves on the disk what nobody uses, such as the optimiser's gigabytes
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        tensors = flatten(content)
        for tensor in tensors.values():
            check_tensor(tensor)
    except Exception as error:                     # torch.load raises half a dozen kinds
        raise ValueError(f"{path}: {explain(error)}") from None
    return tensors


def choose_backbone(tensors, prefer, in_chans):
    """What stands before the keys of the backbone to take, such as "teacher.backbone.".

    Of several backbones it is the one with the word `prefer` in its prefix, else the one that its
    authors evaluate, else the one whose number of channels is nearest to in_chans (DeCUR's file
    has one for radar and one for optical images).
    """
    prefixes = []
    for key in tensors:
        for landmark in LANDMARKS:
            if key == landmark or key.endswith(f".{landmark}"):
                prefixes.append(key.removesuffix(landmark))

    def order(prefix):                             # the smallest comes first, False before True
        published = any(word in prefix for word in PUBLISHED)
        distance = -1                              # without input layer: first, the error names it
        for name in INPUT_LAYERS:
            if prefix + name in tensors and tensors[prefix + name].dim() > 1:
                distance = abs(tensors[prefix + name].shape[1] - in_chans)
        return prefer not in prefix, not published, distance

    return min(prefixes, key=order, default="")


def rename(state, names):
    """Replaces parts of all keys: names is {old: new}."""
    renamed = {}
    for key, tensor in state.items():
        for old, new in names.items():
            key = key.replace(old, new)
        renamed[key] = tensor
    return renamed


def invert(names):
    return {new: old for old, new in names.items()}


def upstream_keys(state):
    """A backbone's tensors under the keys of DINOv2 or torchvision."""
    # DINOv2 trains in chunks of blocks: blocks.CHUNK.BLOCK.name becomes blocks.BLOCK.name
    state = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): x for key, x in state.items()}
    if any(is_timm_swiglu(key, tensor) for key, tensor in state.items()):
        state = rename(state, invert(TIMM_SWIGLU))
    return rename(state, invert(TIMM_REGISTERS))


def is_timm_swiglu(key, tensor):
    """Whether a tensor called fc1 is SwiGLU's w12 (16/3 D, D) and not an MLP's (4D, D)."""
    if not key.endswith("mlp.fc1.weight") or tensor.dim() != 2:
        return False
    return tensor.shape[0] > 5 * tensor.shape[1]


def is_resnet(state):
    return any(key.startswith(("layer1.", "layer4.")) for key in state)


def is_square(n):
    return math.isqrt(n) ** 2 == n


def read_weights(path, prefer="", in_chans=0):
    """Reads the backbone in a checkpoint file of any family.

    It goes by keys and shapes, not by the file's name; choose_backbone says which one of several
    backbones is taken. Returns its tensors under upstream keys, {key: tensor}, and the list of all
    other keys in the file.
    Raises ValueError as read_tensors does, and if the file has no ViT or ResNet.
    """
    tensors = read_tensors(path)
    prefix = choose_backbone(tensors, prefer, in_chans)
    state = {}
    others = []
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            state[key.removeprefix(prefix)] = tensor
        else:
            others.append(key)
    state = upstream_keys(state)

    if is_resnet(state):
        required = {"conv1.weight": 4}                                   # key: number of dimensions
    else:
        required = {"patch_embed.proj.weight": 4, "pos_embed": 3}
    for name, dims in required.items():
        if name not in state or state[name].dim() != dims or state[name].numel() == 0:
            raise ValueError(f"{path}: no ViT or ResNet, has no {dims}-dimensional tensor {name}")

    # timm's table has no row for CLS if there are registers: cls_token already contains it
    if "register_tokens" in state and is_square(state["pos_embed"].shape[1]):
        state["pos_embed"] = F.pad(state["pos_embed"], (0, 0, 1, 0))
    return state, others


# ------------------------------------------------------------------- loading and saving a backbone

# Keys of a network without its heads begin like this. A file that has one which the model lacks
# holds another network, for example a deeper one, and the model would not compute what it does.
BODY = ("conv1", "bn1", "layer", "patch_embed", "blocks", "norm_pre", "reg")

# What a file is called, by a word in its keys; the first word that occurs decides.
FAMILIES = {
    "s_mask_token": "PerA",
    "optimiser": "last.pt",
    "encoder_k": "MoCo v2",
    "momentum_encoder": "MoCo v3",
    "backbone_": "DeCUR",
    "student": "DINO",
    "fc.weight": "torchvision",
    "gamma": "DINOv2's keys",
}


def count_blocks(state, name):
    """How many blocks a layer has: state has the keys NAME.0.x, NAME.1.x, ..."""
    return len({key.split(".")[1] for key in state if key.startswith(f"{name}.")})


def known_arch(state):
    """The architecture that the tensors have, as (name for build or None, description).

    The number of heads is in no tensor, so a ViT is known by width and depth.
    """
    if is_resnet(state):
        depths = tuple(count_blocks(state, f"layer{i}") for i in (1, 2, 3, 4))
        shape = dict(depths=depths, bottleneck="layer1.0.conv3.weight" in state)
        description = f"a ResNet with {depths} blocks"
        table = RESNETS
    else:
        width = state["patch_embed.proj.weight"].shape[0]
        shape = dict(width=width, depth=count_blocks(state, "blocks"))
        description = f"a ViT {width} wide and {shape['depth']} deep"
        table = VITS
    for arch, fields in table.items():
        if shape.items() <= fields.items():                              # fields contain shape
            return arch, description
    return None, description


def build_from(path, in_chans=0, quiet=True):
    """Builds the backbone in a file, loads its weights and returns it in eval mode.

    Architecture, channels, patch size, image size and registers are read off the tensors; a ViT-S
    with 12 heads is taken for one with 6. in_chans only chooses between several backbones.
    Raises ValueError as read_weights and load_pretrained do, and for a network of no known size.
    """
    state, others = read_weights(path, in_chans=in_chans)
    arch, description = known_arch(state)
    if arch is None:
        raise ValueError(f"{path}: {description} is not one of {', '.join([*RESNETS, *VITS])}")
    if arch in RESNETS:
        model = build(arch, state["conv1.weight"].shape[1])
    else:
        dim, channels, patch_size, _ = state["patch_embed.proj.weight"].shape
        side = max(1, math.isqrt(state["pos_embed"].shape[1] - 1))       # patches along a side
        registers = 0
        if "register_tokens" in state:
            registers = state["register_tokens"].numel() // dim
        layerscale = any(key.endswith("gamma") for key in state)
        model = build(arch, channels, side * patch_size, patch_size, registers,
                      layerscale=layerscale)
    load_pretrained(model, path, quiet=quiet, weights=(state, others))
    return model.eval()


def adapt_input(weight, fresh, adapt, rgb=(3, 2, 1)):
    """A first layer for another number of channels: weight (D,c,k,k) -> like fresh (D,C,k,k).

    adapt="random" returns fresh, as SoftCon does.
    adapt="mean" gives every channel the file's average, times c/C to keep the output's size.
    adapt="rgb" copies three channels to the indices rgb (B4, B3, B2) and takes fresh elsewhere.
    adapt="auto" is "rgb" where that applies, and "mean" elsewhere.
    Whatever adapt is, 12 and 13 bands of Sentinel-2 keep the bands they share, which are all but
    B10: the new layer gives what the file's would at B10 = 0.
    Raises ValueError if adapt does not apply.
    """
    weight = weight.to(fresh)
    c = weight.shape[1]
    C = fresh.shape[1]
    if (c, C) == (13, 12):                                               # B10 has the index 10
        return torch.cat([weight[:, :10], weight[:, 11:]], 1)
    if (c, C) == (12, 13):
        return torch.cat([weight[:, :10], torch.zeros_like(fresh[:, :1]), weight[:, 10:]], 1)
    rgb_applies = c == 3 and C > max(rgb) and len(set(rgb)) == 3
    if adapt == "auto":
        adapt = "rgb" if rgb_applies else "mean"
    if adapt == "random":
        return fresh
    if adapt == "mean":
        return weight.mean(1, keepdim=True).expand_as(fresh) * (c / C)
    if adapt == "rgb" and rgb_applies:
        adapted = fresh.clone()
        adapted[:, list(rgb)] = weight
        return adapted
    raise ValueError(f"adapt={adapt} does not lead from {c} to {C} channels")


def fit(name, tensor, fresh, model, adapt, rgb):
    """Makes a tensor of the file fit the model: returns (tensor, verdict).

    fresh is the model's tensor of that name. Verdicts: "loaded" as it is, "adapted" to the number
    of channels, "resampled" to the number of positions, or "fresh" if the model's stays.
    Raises ValueError if it fits in none of these ways.
    """
    shape = tensor.shape
    wanted = fresh.shape
    problem = (f"{name} is {tuple(shape)} {tensor.dtype}, "
               f"the model's is {tuple(wanted)} {fresh.dtype}")
    if tensor.is_floating_point() != fresh.is_floating_point():
        raise ValueError(problem)
    if shape == wanted:
        return tensor, "loaded"
    if name in INPUT_LAYERS and (shape[0], *shape[2:]) == (wanted[0], *wanted[2:]):
        adapted = adapt_input(tensor, fresh, adapt, rgb)
        return adapted, "fresh" if adapted is fresh else "adapted"
    if name == "pos_embed" and (shape[0], shape[2]) == (wanted[0], wanted[2]):
        patches = shape[1] - 1
        if patches > 0 and is_square(patches):
            return model.positions(*model.grid, tensor), "resampled"
    if name == "mask_token":                       # MAE's has its decoder's width; nothing uses it
        return fresh, "fresh"
    raise ValueError(problem)


@torch.no_grad()
def load_pretrained(model, path, adapt="random", quiet=False, weights=None, rgb=(3, 2, 1)):
    """Fills a model from a checkpoint file and prints what happened to every tensor.

    adapt and rgb are for a file with another number of channels, see adapt_input. weights is what
    read_weights(path) returned, if it has been called. Returns {verdict: names} with the verdicts
    of fit and "ignored" for what is only in the file.
    Raises ValueError that names the tensor if the file lacks one, has one that does not fit, or
    has a block that the model lacks. Three may be absent: the mask token, counters of batches and,
    if the file has none at all, LayerScale, which then is 1.
    """
    if weights is None:
        weights = read_weights(path, in_chans=model.in_chans)
    state, others = weights
    target = model.state_dict()
    optional = ("mask_token", "num_batches_tracked")
    if not any(key.endswith("gamma") for key in state):
        optional += ("gamma",)
    missing = [name for name in target if name not in state]
    extra = [name for name in state if name not in target]
    problems = [f"has no tensor {name}" for name in missing if not name.endswith(optional)]
    problems += [f"has {name}, which the model lacks" for name in extra if name.startswith(BODY)]

    report = {"loaded": [], "resampled": [], "adapted": [], "fresh": list(missing),
              "ignored": others + extra}
    for name, fresh in target.items():
        if name in missing:
            continue
        try:
            target[name], verdict = fit(name, state[name], fresh, model, adapt, rgb)
            report[verdict].append(name)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        arch, _ = known_arch(state)
        if arch and arch != model.spec["arch"]:
            problems.insert(0, f"holds a {arch}, take --arch {arch}; the model is a "
                               f"{model.spec['arch']}")
        raise ValueError(f"{path}: {'; '.join(problems[:3])}")
    model.load_state_dict(target)
    if not quiet:
        print_report(model, path, [*state, *others], report)
    return report


def family_of(keys):
    """What a file with these keys is called."""
    for word, family in FAMILIES.items():
        if any(word in key for key in keys):
            return family
    return "bare backbone"


def print_report(model, path, keys, report):
    """Says what a file is, by its keys, and how many tensors came to each verdict."""
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{path}: {family_of(keys)}, as {model.spec}, {parameters:,} parameters")
    for verdict, names in report.items():
        print(f"  {len(names)} {verdict}: {shorten(names)}")


def shorten(names):
    """Up to three names in full, more of them counted by their first part: "blocks.* (168)"."""
    if len(names) <= 3:
        return ", ".join(names)
    counts = Counter()
    for name in names:
        for wrapper in ("state_dict.", "model.", "module."):
            name = name.removeprefix(wrapper)
        counts[name.split(".")[0]] += 1
    return ", ".join(f"{part}.* ({count})" for part, count in counts.items())


def fold_normalisation(state, mean, std):
    """Weights of a network that takes (x - mean) / std -> weights of one that takes x itself.

    state is a backbone's tensors as read_weights returns them, mean and std have a number for each
    channel. Networks of natural images expect such input, while everything here has x in [0, 1]:
        w (x - mean) / std + b  =  (w / std) x  +  (b - sum of w mean / std)
    A ResNet's first layer has no bias, so there the constant goes into its batch norm. That is
    exact but at the border: the 3 pixels of padding were the mean colour, and now are black.
    Raises ValueError if there are other channels, or a deviation is not above 0.
    """
    layer = "conv1.weight" if is_resnet(state) else "patch_embed.proj.weight"
    channels = state[layer].shape[1]
    if not channels == len(mean) == len(std):
        raise ValueError(f"{channels} channels, but {len(mean)} means and {len(std)} deviations")
    if min(std) <= 0:
        raise ValueError(f"deviations {std}: must be above 0")
    mean = torch.tensor(mean)[:, None, None]                                   # (C,1,1)
    std = torch.tensor(std)[:, None, None]
    state = dict(state)
    state[layer] = state[layer] / std                                          # (D,C,k,k)
    constant = (state[layer] * mean).sum((1, 2, 3))                            # (D,)
    if is_resnet(state):
        state["bn1.running_mean"] = state["bn1.running_mean"] + constant
    else:
        state["patch_embed.proj.bias"] = state["patch_embed.proj.bias"] - constant
    return state


def export_backbone(model, timm=False):
    """The state dict to publish, on the CPU.

    It loads with strict=True into torchvision's ResNet (with fc = Identity), DINOv2's ViT and,
    without LayerScale, PerA's. With timm=True it loads with strict=True into timm's ViT, which has
    no mask token, names SwiGLU's layers like an MLP's and, if there are registers, keeps the
    position of CLS in cls_token.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = tensor.detach().cpu().contiguous().clone()
    if timm:
        state.pop("mask_token", None)
        state = rename(state, TIMM_SWIGLU | TIMM_REGISTERS)
        if "reg_token" in state:
            state["cls_token"] += state["pos_embed"][:, :1]
            state["pos_embed"] = state["pos_embed"][:, 1:].clone()
    return state


def main(argv=None):
    parser = argparse.ArgumentParser(description="Checkpoint files", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="say what a file holds and how it loads")
    fold = commands.add_parser("fold", usage="model.py fold FILE OUT --mean R G B --std R G B",
                               help="make weights that expect (x - mean) / std, x in "
                               "[0, 1], take x itself, as all networks here do")
    for command in (inspect, fold):
        command.add_argument("file")
    fold.add_argument("out", help="file to write")
    fold.add_argument("--mean", nargs="+", type=float, required=True,
                      help="of each channel; ImageNet's: 0.485 0.456 0.406")
    fold.add_argument("--std", nargs="+", type=float, required=True,
                      help="of each channel; ImageNet's: 0.229 0.224 0.225")
    args = parser.parse_args(argv)
    if args.command == "inspect":
        build_from(args.file, quiet=False)
    else:
        state, _ = read_weights(args.file)
        folded = fold_normalisation(state, args.mean, args.std)
        with open(f"{args.out}.part", "wb") as file:                   # whole, or not there at all
            torch.save(folded, file)
        os.replace(f"{args.out}.part", args.out)
        print(f"{args.out} written")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"model.py: error: {error}")
