"""Backbones, heads, and reading and writing their weights.

The ResNet has torchvision's parameter names and the ViT has DINOv2's. A checkpoint trained here
loads into those code bases without a converter, and their checkpoints load here. The first layer
takes any number of channels (Sentinel-1: 2, Sentinel-2: 12 or 13, RGB: 3). The other layers do not
depend on the satellite.

    build(arch, in_chans) -> module    load_pretrained(module, path)    python model.py inspect FILE
    build_from(path) -> module         export_backbone(module)

[1] He et al. 2016, Deep residual learning; the stride sits on the 3x3 as in torchvision (v1.5)
[2] Dosovitskiy et al. 2021, ViT; Oquab et al. 2023, DINOv2 (LayerScale, position table)
[3] Chen, Xie, He 2021, MoCo v3: projector and predictor
[4] Shen et al. 2026, PerA

Letters: B batch, C channels, H W pixels, P patch side, N = (H/P)(W/P) patches, D width, R registers
"""
import argparse
import math
import pickle
import re
import struct
import sys
import zipfile
from collections import defaultdict
from dataclasses import dataclass

import torch
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


def downsample(c_in, c_out, stride):
    """The shortcut of a residual block: a 1x1 convolution where the shape of x changes."""
    if stride == 1 and c_in == c_out:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))


class BasicBlock(nn.Module):
    """ResNet-18's residual block of two 3x3: (B, c_in, H, W) -> (B, c, H/stride, W/stride)."""
    expansion = 1

    def __init__(self, c_in, c, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
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
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.conv3 = nn.Conv2d(c, 4 * c, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * c)
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
        self.bn1 = nn.BatchNorm2d(64)
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


def draw_linear_layers(network):
    """Random weights as ViTs start with: normal with deviation 0.02, and biases of 0."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


class Attention(nn.Module):
    """Multi-head self-attention: (B,N,D) -> (B,N,D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))              # (B, N, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)                   # each (B, heads, N, d)
        y = F.scaled_dot_product_attention(q, k, v)                      # (B, heads, N, d)
        y = y.transpose(1, 2).flatten(2)                                 # (B, N, D)
        return self.proj(y)


class MLP(nn.Module):
    """The usual MLP of a ViT block: (B,N,D) -> (B,N,D), with 4D hidden values."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


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
    """Pre-norm transformer block: (B,N,D) -> (B,N,D)."""

    def __init__(self, dim, heads, layerscale, drop_path):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.mlp = MLP(dim)
        self.ls1 = LayerScale(dim) if layerscale else nn.Identity()
        self.ls2 = LayerScale(dim) if layerscale else nn.Identity()

    def forward(self, x):
        x = self.residual(x, lambda x: self.ls1(self.attn(self.norm1(x))))
        return self.residual(x, lambda x: self.ls2(self.mlp(self.norm2(x))))

    def residual(self, x, branch):
        """x + branch(x), with stochastic depth in training: (B,N,D) -> (B,N,D).

        A random share drop_path of the samples skips the branch. It is computed for the rest
        alone, and what it gives is scaled up so that the expected sum stays the same.
        [dinov2, drop_add_residual_stochastic_depth]
        """
        if not self.training or self.drop_path == 0:
            return x + branch(x)
        B = len(x)
        count = max(1, int(B * (1 - self.drop_path)))
        samples = torch.randperm(B, device=x.device)[:count]
        y = branch(x[samples]).to(x.dtype)                               # (count, N, D)
        return x.index_add(0, samples, y * (B / count))


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
            # DINOv2's files have both. Nothing here uses the token: masked patches are dropped.
            self.mask_token = nn.Parameter(torch.zeros(1, dim), requires_grad=False)
        # a dictionary, because the weights are called patch_embed.proj in DINOv2
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(in_chans, dim, patch_size, patch_size)})
        self.blocks = nn.ModuleList()
        for _ in range(VITS[arch]["depth"]):
            self.blocks.append(ViTBlock(dim, VITS[arch]["heads"], layerscale, drop_path))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        draw_linear_layers(self)

    def positions(self, table, h, w):
        """Position embeddings of M x M patches, CLS first, for h x w: (1,1+M*M,D) -> (1,1+h*w,D).

        They are resampled unless h = w = M, as DINOv2 does: its models without registers add 0.1
        to h and w and do not antialias, those with registers add nothing and antialias.
        [dinov2, interpolate_pos_encoding]
        """
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
        table = self.positions(self.pos_embed, h, w)                     # (1, 1+N, D)
        x = x.reshape(B, C, h, P, w, P).permute(0, 2, 4, 1, 3, 5)        # (B, h, w, C, P, P)
        x = x.reshape(B, h * w, C * P * P)                               # (B, N, CPP)
        positions = table[:, 1:]                                         # (1, N, D)
        if keep is not None:
            x = take(x, keep)                                            # (B, n, CPP)
            positions = take(positions, keep)                            # (B, n, D)
        proj = self.patch_embed["proj"]
        patches = F.linear(x, proj.weight.flatten(1), proj.bias)         # (B, n, D)
        patches = patches + positions
        first = self.cls_token + table[:, :1]                            # (1, 1, D)
        if self.registers:
            first = torch.cat([first, self.register_tokens], 1)          # (1, 1+R, D)
        return torch.cat([first.expand(B, -1, -1), patches], 1)          # (B, 1+R+n, D)

    def outputs(self, x, n, keep=None):
        """The outputs of the last n blocks, each after the final norm: [(B, 1+R+n, D), ...]."""
        first = len(self.blocks) - n
        outputs = []
        x = self.embed(x, keep)                                          # (B, 1+R+n, D)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= first:
                outputs.append(self.norm(x))
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
        layers += [nn.Linear(d_in, d_out, bias=False), nn.BatchNorm1d(d_out), nn.ReLU()]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=False))
    layers.append(nn.BatchNorm1d(widths[-1], affine=False))
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
    matrix is g_k v_k / |v_k|, and g_k is trained from 1 on.

    SparseBranch also has such a head to guess pixels: it has one row for each value of a patch,
    and the product with it is that value.
    """

    def __init__(self, dim, out, hidden, bottleneck=384):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(),
                                 nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, bottleneck))
        draw_linear_layers(self.mlp)
        self.weight_v = nn.Linear(bottleneck, out, bias=False).weight    # torch's own random start
        self.weight_g = nn.Parameter(torch.ones(out, 1))

    def forward(self, x):
        return F.normalize(self.mlp(x), dim=-1, eps=1e-6)                # (n, 384)

    def prototypes(self):
        return F.normalize(self.weight_v) * self.weight_g                # (out, 384)


class SparseBranch(nn.Module):
    """PerA's student or teacher [4]: some patches of several crops -> CLS -> prototypes.

    predict=True is the student, which also guesses the pixels of patches that neither network
    sees. Mask tokens stand for these patches and know only their position. They join the global
    crops in the middle of the network.
    """

    def __init__(self, backbone, prototypes=131072, hidden=2048, predict=False):
        super().__init__()
        self.backbone = backbone
        self.cls_head = PrototypeHead(backbone.embed_dim, prototypes, hidden)
        if predict:
            values = backbone.in_chans * backbone.patch_size ** 2        # PPC, numbers in a patch
            self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, backbone.embed_dim))
            self.pred_head = PrototypeHead(backbone.embed_dim, values, hidden)

    def forward(self, crops, patches, guessed_patches=None):
        """Runs all crops, those of one size together.

        crops: [(b,C,H,W), ...], one tensor for each size, the global crops first.
        patches: [(b,n), ...], the indices of the patches that this network sees of each crop.
        guessed_patches: (b,m), the indices of the patches to guess of the global crops, or None.
        Returns the embeddings (sum of b, 384), the CLS features (sum of b, D) and the guesses
        (b,m,PPC), which are None if guessed_patches is.
        """
        outputs = [self.tokens(crops[0], patches[0], guessed_patches)]   # (b, 1+R+n+m, D)
        for i in range(1, len(crops)):
            outputs.append(self.backbone.tokens(crops[i], patches[i]))   # (b, 1+R+n, D)
        cls = torch.cat([y[:, 0] for y in outputs])                      # (sum of b, D)
        guess = None
        if guessed_patches is not None:
            masked = outputs[0][:, -guessed_patches.shape[1]:]           # (b, m, D)
            guess = self.pred_head(masked) @ self.pred_head.prototypes().T        # (b, m, PPC)
        return self.cls_head(cls), cls, guess

    def tokens(self, x, patches, guessed_patches):
        """ViT.tokens with mask tokens behind the other tokens, from the middle block on.

        That is as good as any place, since attention knows no order.
        """
        net = self.backbone
        h, w = check_grid(*x.shape[2:], net.patch_size)
        tokens = net.embed(x, patches)                                   # (b, 1+R+n, D)
        for i, block in enumerate(net.blocks):
            if i == len(net.blocks) // 2 and guessed_patches is not None:
                positions = net.positions(net.pos_embed, h, w)[:, 1:]    # (1, N, D)
                masked = self.mask_token + take(positions, guessed_patches)    # (b, m, D)
                tokens = torch.cat([tokens, masked.to(tokens.dtype)], 1)       # (b, 1+R+n+m, D)
            tokens = block(tokens)
        return net.norm(tokens)


@torch.no_grad()
def ema_update(teacher, student, momentum):
    """Moves each parameter of the teacher: teacher <- momentum teacher + (1 - momentum) student.

    Buffers do not move: the teacher, which stays in training mode, keeps its own batches'
    statistics in its batch norms [3].
    """
    source = dict(student.named_parameters())
    for name, parameter in teacher.named_parameters():
        parameter.lerp_(source[name], 1 - momentum)                      # eq. (5)


# ----------------------------------------------------------------------------- reading a checkpoint

# What keys mean. First the layer that pixels enter, (D,C,k,k), and another tensor that every
# backbone with such a layer has.
INPUT_LAYERS = {"conv1.weight": "layer1.0.conv1.weight", "patch_embed.proj.weight": "pos_embed"}

# Of several backbones in a file, the one with such a word in its keys is what its authors evaluate:
# an average, the teacher in DINO, PerA and our runs, the query or base encoder in MoCo v2 and v3.
PUBLISHED = {"ema", "model_ema", "state_dict_ema", "teacher", "encoder_q", "base_encoder"}

# A network without its heads has keys that begin like this. A file that has one which the model
# lacks holds another network, for example a deeper one, and the model would not compute what it
# does.
BODY = ("conv1", "bn1", "layer", "patch_embed", "blocks", "norm_pre", "reg")

# Without these a network computes the same: the token of masked patches, which are dropped here,
# and batch norm's counters.
OPTIONAL = ("mask_token", "num_batches_tracked")

# What torch.load was seen to raise for damaged files (bytes changed, cut off or added at random);
# UnpicklingError also for files that want to run code.
UNREADABLE = (pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, RuntimeError,
              ValueError, TypeError, LookupError, AttributeError, AssertionError)


class CheckpointError(ValueError):
    """A file cannot be used as a checkpoint; the message is one line that names it."""


def require(condition, problem):
    """Raises CheckpointError with the problem unless the condition holds."""
    if not condition:
        raise CheckpointError(problem)


@dataclass
class Weights:
    """A backbone in a checkpoint file, what its tensors say of it, and what else the file has."""
    tensors: dict           # {upstream key: tensor}
    arch: str               # from here to layerscale what build wants to know
    in_chans: int
    patch_size: int
    img_size: int
    registers: int
    layerscale: bool
    prefix: str             # what stands before its keys, such as "teacher.backbone."
    ignored: list           # the other keys of the file


def flatten(tree, prefix="", depth=4):
    """{dotted key: tensor} of nested dictionaries, at most `depth` deep.

    Four levels reach optimiser.state.0.exp_avg. A limit is needed because a dictionary may
    contain itself. Anything but a dictionary holds no tensors.
    """
    tensors = {}
    if isinstance(tree, torch.Tensor):
        tensors[prefix.removesuffix(".")] = tree
    elif isinstance(tree, dict) and depth > 0:
        for key, value in tree.items():
            tensors |= flatten(value, f"{prefix}{key}.", depth - 1)
    return tensors


def read_tensors(path):
    """Reads what torch.save wrote, {dotted key: tensor}, and runs no code in it.

    Raises CheckpointError if the file is missing, wants to run code, is damaged or no checkpoint.
    """
    try:
        # mmap leaves on the disk what nobody uses, such as the optimiser's gigabytes; files from
        # before PyTorch 1.6 are no zip archives and do not have it
        mmap = zipfile.is_zipfile(path)
        with torch.serialization.safe_globals([argparse.Namespace]):     # DINO saves its flags
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:                       # torch's own may lack the name of the file
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except UNREADABLE as error:
        problem = "damaged, or not a PyTorch checkpoint"
        if "GLOBAL" in str(error):                 # torch's word for a function to call
            problem = "refused, it wants to run code"
        raise CheckpointError(f"{path}: {problem}") from error
    return flatten(content)


def find_backbones(tensors):
    """The backbones in a file: {what stands before their keys: number of channels}."""
    backbones = {}
    for key, tensor in tensors.items():
        for layer, companion in INPUT_LAYERS.items():
            prefix = key.removesuffix(layer)
            if prefix != key and prefix + companion in tensors and tensor.dim() == 4:
                backbones[prefix] = tensor.shape[1]
    return backbones


def choose_backbone(backbones, in_chans):
    """Of find_backbones' prefixes the one that its authors evaluate, see PUBLISHED.

    Of several such the one whose number of channels is nearest to in_chans (DeCUR's file has a
    backbone for radar and one for optical images), and of several of these the first.
    """
    published = [prefix for prefix in backbones if PUBLISHED.intersection(prefix.split("."))]
    return min(published or backbones, key=lambda prefix: abs(backbones[prefix] - in_chans))


def upstream_key(key, tensor):
    """A backbone's key as DINOv2 or torchvision have it."""
    if key == "reg_token":                                               # timm's name
        return "register_tokens"
    if key == "mask_token" and tensor.dim() == 3:                        # MAE's, of another width
        return "decoder.mask_token"
    # DINOv2 trains in chunks of blocks: blocks.CHUNK.BLOCK.name becomes blocks.BLOCK.name
    return re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key)


def is_resnet(tensors):
    return "layer1.0.conv1.weight" in tensors


def input_layer(tensors):
    return "conv1.weight" if is_resnet(tensors) else "patch_embed.proj.weight"


def count_blocks(tensors, name):
    """How many blocks a layer has: the keys are NAME.0.x, NAME.1.x, ..."""
    return len({key.split(".")[1] for key in tensors if key.startswith(f"{name}.")})


def find_arch(path, tensors):
    """The name in RESNETS or VITS of the network with these tensors; CheckpointError without one.

    Heads cannot be counted: a ViT-S with 12 of them is taken for one with 6.
    """
    if is_resnet(tensors):
        depths = tuple(count_blocks(tensors, f"layer{i}") for i in (1, 2, 3, 4))
        shape = dict(depths=depths, bottleneck="layer1.0.conv3.weight" in tensors)
    else:
        width = len(tensors["patch_embed.proj.weight"])
        shape = dict(width=width, depth=count_blocks(tensors, "blocks"))
    for arch, fields in (RESNETS | VITS).items():
        if shape.items() <= fields.items():                              # fields contain the shape
            return arch
    raise CheckpointError(f"{path}: none of {', '.join([*RESNETS, *VITS])} has {shape}")


def check_tensors(path, tensors):
    """Raises CheckpointError if a tensor's numbers are not in the file, or are no floats.

    A tensor on the meta device has no numbers, and one that was expanded may turn 4 bytes into
    4 TB. Integers are those of a quantised network, whose scale lies elsewhere.
    """
    for key, tensor in tensors.items():
        dense = tensor.layout == torch.strided and not tensor.is_meta
        require(dense and tensor.nbytes <= tensor.untyped_storage().nbytes(),
                f"{path}: the numbers of {key} are not in the file")
        require(tensor.is_floating_point() or not key.endswith(("weight", "bias")),
                f"{path}: {key} is {tensor.dtype}")


def read_tables(path, tensors):
    """The sizes of a ViT's tables: patches along a side of its images, and registers.

    Gives timm's table of positions the form (1, 1+M*M, D) of DINOv2's.
    Raises CheckpointError if it is no such table.
    """
    table = tensors["pos_embed"]
    registers = tensors.get("register_tokens", torch.empty(1, 0, 1))
    problem = (f"{path}: pos_embed is {tuple(table.shape)}, register_tokens "
               f"{tuple(registers.shape)}, not (1, 1+M*M, D) and (1, R, D)")
    require(table.dim() == registers.dim() == 3 and len(table) == 1, problem)
    count = table.shape[1]
    side = math.isqrt(count)
    if registers.shape[1] > 0 and count == side ** 2:
        # timm's table has no row for CLS if there are registers: cls_token already contains it
        tensors["pos_embed"] = F.pad(table, (0, 0, 1, 0))
        count += 1
    require(side > 0 and count == 1 + side ** 2, problem)
    return side, registers.shape[1]


def read_weights(path, in_chans=0):
    """Reads the backbone in a checkpoint file of any family, by keys and shapes -> Weights.

    choose_backbone says which one of several is taken, and in_chans matters for that alone.
    Raises CheckpointError as read_tensors does, and if the file has no ViT or ResNet, or one of a
    size that is not in VITS or RESNETS.
    """
    tensors = read_tensors(path)
    backbones = find_backbones(tensors)
    require(backbones, f"{path}: no ViT or ResNet, has no 4-dimensional conv1.weight with a "
                       f"layer1.0.conv1.weight or patch_embed.proj.weight with a pos_embed")
    prefix = choose_backbone(backbones, in_chans)
    backbone = {}
    ignored = []
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            backbone[upstream_key(key.removeprefix(prefix), tensor)] = tensor
        else:
            ignored.append(key)
    check_tensors(path, backbone)
    _, channels, patch_size, _ = backbone[input_layer(backbone)].shape
    side = 1
    registers = 0
    if not is_resnet(backbone):
        side, registers = read_tables(path, backbone)
    layerscale = any(key.endswith("gamma") for key in backbone)
    return Weights(backbone, find_arch(path, backbone), channels, patch_size, side * patch_size,
                   registers, layerscale, prefix, ignored)


# ------------------------------------------------------------------- loading and saving a backbone

# mean and standard deviation of red, green and blue in [0,1] that natural-image weights expect to
# be taken away; "half" is that of the ViTs of the original ViT paper
NORMS = {
    "imagenet": dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "half": dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
}


def build_from(path, in_chans=0, quiet=True):
    """Builds the backbone in a file, loads its weights and returns it in eval mode.

    Everything is read off the tensors; in_chans only chooses between several backbones.
    Raises CheckpointError as read_weights and load_pretrained do.
    """
    weights = read_weights(path, in_chans)
    model = build(weights.arch, weights.in_chans, weights.img_size, weights.patch_size,
                  weights.registers, layerscale=weights.layerscale)
    load_pretrained(model, path, quiet=quiet, weights=weights)
    return model.eval()


def fold_normalisation(tensors, norm):
    """Weights of a network that takes (x - mean) / std -> weights of one that takes x itself.

    tensors are a backbone's of 3 channels, norm is a key of NORMS. Networks of natural images
    expect such input, while everything here has x in [0, 1]:
        w (x - mean) / std + b  =  (w / std) x  +  (b - sum of w mean / std)
    A ResNet's first layer has no bias, so there the constant goes into its batch norm. That is
    exact but at the border: the 3 pixels of padding were the mean colour, and now are black.
    """
    mean = torch.tensor(NORMS[norm]["mean"])[:, None, None]                    # (3,1,1)
    std = torch.tensor(NORMS[norm]["std"])[:, None, None]
    layer = input_layer(tensors)
    weight = tensors[layer] / std                                              # (D,3,k,k)
    constant = (weight * mean).sum((1, 2, 3))                                  # (D,)
    tensors = tensors | {layer: weight}
    if is_resnet(tensors):
        tensors["bn1.running_mean"] = tensors["bn1.running_mean"] + constant
    else:
        tensors["patch_embed.proj.bias"] = tensors["patch_embed.proj.bias"] - constant
    return tensors


def adapt_input(path, weight, fresh, adapt, red_green_blue=()):
    """A first layer for another number of channels: weight (D,c,k,k) -> like fresh (D,C,k,k).

    adapt="random" returns fresh, as SoftCon does.
    adapt="mean" gives every channel the file's average, times c/C to keep the output's size.
    adapt="rgb" copies three channels to the positions red_green_blue and takes fresh elsewhere.
    Whatever adapt is, 12 and 13 bands of Sentinel-2 keep the bands they share, which are all but
    B10: the new layer gives what the file's would at B10 = 0.
    Raises CheckpointError if adapt does not apply, or the layers differ in more than that.
    """
    require(weight[:, :1].shape == fresh[:, :1].shape,
            f"{path}: the first layer is {tuple(weight.shape)}, the model's {tuple(fresh.shape)}")
    weight = weight.to(fresh)
    c = weight.shape[1]
    C = fresh.shape[1]
    if (c, C) == (13, 12):                                               # B10 has the index 10
        return torch.cat([weight[:, :10], weight[:, 11:]], 1)
    if (c, C) == (12, 13):
        nothing = torch.zeros_like(fresh[:, :1])
        return torch.cat([weight[:, :10], nothing, weight[:, 10:]], 1)
    if adapt == "random":
        return fresh
    if adapt == "mean":
        return weight.mean(1, keepdim=True).expand_as(fresh) * (c / C)
    require(c == len(red_green_blue) == 3,
            f"{path}: adapt={adapt} does not lead from {c} to {C} channels")
    adapted = fresh.clone()
    adapted[:, list(red_green_blue)] = weight
    return adapted


@torch.no_grad()
def load_pretrained(model, path, adapt="random", red_green_blue=(), norm=None, quiet=False,
                    weights=None):
    """Fills a model from a checkpoint file and prints what happened to every tensor.

    adapt is for a first layer with another number of channels, see adapt_input; "auto" is "rgb"
    where the file has 3 channels and red_green_blue three positions, else "mean". norm is None,
    "imagenet" or "half", see fold_normalisation. weights is what read_weights(path) returned.

    Returns {verdict: names}: "loaded", "resampled" to the number of positions, "adapted" to the
    channels, "fresh" (the model's own stay), "ignored" (only the file has them).
    Raises CheckpointError if the file holds another architecture, lacks a tensor, has one of
    another shape, or if adapt or norm does not apply. It names the tensor.
    """
    if weights is None:
        weights = read_weights(path, model.in_chans)
    arch = model.spec["arch"]
    require(weights.arch == arch, f"{path}: holds a {weights.arch}, take --arch {weights.arch}; "
                                  f"the model is a {arch}")
    own = model.state_dict()
    check_names(path, weights, own)
    tensors = dict(weights.tensors)
    channels = weights.in_chans
    verdicts = {name: "loaded" if name in tensors else "fresh" for name in own}
    if adapt == "auto":
        adapt = "rgb" if channels == len(red_green_blue) == 3 else "mean"
    if norm:
        require(channels == 3, f"{path}: has {channels} channels, normalisation {norm} is for 3")
        tensors = fold_normalisation(tensors, norm)
    if channels != model.in_chans:
        layer = input_layer(tensors)
        tensors[layer] = adapt_input(path, tensors[layer], own[layer], adapt, red_green_blue)
        verdicts[layer] = "fresh" if tensors[layer] is own[layer] else "adapted"
    if arch in VITS:
        table = tensors["pos_embed"]
        tensors["pos_embed"] = model.positions(table, *model.grid)
        verdicts["pos_embed"] = "loaded" if tensors["pos_embed"] is table else "resampled"
    try:
        model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:                      # its last line names a tensor's two shapes
        raise CheckpointError(f"{path}: {str(error).splitlines()[-1].strip()}") from error
    report = defaultdict(list)
    for name, verdict in verdicts.items():
        report[verdict].append(name)
    report["ignored"] = weights.ignored + [name for name in tensors if name not in own]
    if not quiet:
        print_report(model, path, weights, report)
        if channels == 3 and not norm and (model.in_chans == 3 or adapt == "rgb"):
            print("  natural-image weights expect (x - mean) / std: --init-norm imagenet|half "
                  "folds it in")
    return report


def check_names(path, weights, own):
    """Raises CheckpointError if a file lacks a tensor of the model's own, or the model a block.

    A file may lack what OPTIONAL names and, if it has none at all, LayerScale, which then is 1.
    """
    optional = OPTIONAL if weights.layerscale else (*OPTIONAL, "gamma")
    for name in own:
        require(name in weights.tensors or name.endswith(optional), f"{path}: has no tensor {name}")
    for name in weights.tensors:
        require(name in own or not name.startswith(BODY),
                f"{path}: has {name}, which the model lacks")


def print_report(model, path, weights, report):
    """Says what model a file became, and of each verdict how many tensors and the first three."""
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{path}: {weights.prefix}* is {model.spec}, {parameters:,} parameters")
    for verdict, names in report.items():
        print(f"  {len(names)} {verdict}: {', '.join(names[:3])}")


def export_backbone(model, timm=False):
    """The state dict to publish, on the CPU.

    It loads with strict=True into torchvision's ResNet (with fc = Identity), DINOv2's ViT and,
    without LayerScale, PerA's. With timm=True it loads with strict=True into timm's ViT, which has
    no mask token and, if there are registers, keeps the position of CLS in cls_token.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = tensor.detach().cpu().contiguous().clone()
    if timm:
        state.pop("mask_token", None)
    if timm and "register_tokens" in state:
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] += state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:].clone()
    return state


def main(argv=None):
    parser = argparse.ArgumentParser(description="Checkpoint files", allow_abbrev=False)
    parser.add_argument("command", choices=["inspect"], help="say what a file holds, how it loads")
    parser.add_argument("file", help="of any family, see load_pretrained")
    args = parser.parse_args(argv)
    build_from(args.file, quiet=False)


if __name__ == "__main__":
    try:
        main()
    except CheckpointError as error:
        sys.exit(f"model.py: error: {error}")
