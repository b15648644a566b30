"""Backbones, heads, and getting weights in and out.  [reading time: 16 minutes]

A ResNet with torchvision's parameter names and a ViT with DINOv2's, so that a checkpoint trained
here loads into those code bases without a converter, and theirs load here.  The first layer takes
any number of channels (Sentinel-1: 2, Sentinel-2: 12, 13, RGB: 3); the rest knows no satellite.

    build(arch, in_chans) -> module    load_pretrained(module, path)    python model.py inspect FILE
    build_from(path) -> module         export_backbone(module)

[1] He et al. 2016, Deep residual learning; the stride sits on the 3x3 as in torchvision (v1.5)
[2] Dosovitskiy et al. 2021, ViT; Oquab et al. 2023, DINOv2 (LayerScale, SwiGLU, position table)
[3] Chen, Xie, He 2021, MoCo v3: projector and predictor      [4] Shen et al. 2026, PerA

Letters: B batch, C channels, H W pixels, P patch side, N = (H/P)(W/P) patches, D width, R registers
"""
import argparse
import math
import re
import sys
import zipfile
from collections import Counter, OrderedDict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

RESNETS = {"resnet18": ((2, 2, 2, 2), False), "resnet50": ((3, 4, 6, 3), True)}  # bottleneck or not
VITS = {"vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6), "vit_base": (768, 12, 12),
        "vit_large": (1024, 24, 16), "vit_giant2": (1536, 40, 24), "vit_pera_g": (1024, 40, 16)}


def build(arch, in_chans, img_size=224, patch_size=14, registers=0, drop_path=0.0, layerscale=None):
    """A backbone (B,C,H,W) -> (B, embed_dim), random weights; build(**model.spec) is its twin.

    vit_giant2 is DINOv2's (SwiGLU), vit_pera_g PerA's "ViT-g" (no LayerScale, patch 16).
    Raises ValueError for an unknown arch or an img_size that patch_size does not divide."""
    spec = {"arch": arch, "in_chans": in_chans} if arch in RESNETS else dict(locals())
    if arch not in RESNETS | VITS:
        raise ValueError(f"unknown arch {arch!r}; choose from {', '.join([*RESNETS, *VITS])}")
    model = (ViT if arch in VITS else ResNet)(**spec)
    model.spec = spec
    return model


# ------------------------------------------------------------------------------------- ResNet [1]


class AllReduce(torch.autograd.Function):
    """Sum over ranks; so is the gradient, since every rank's loss depends on every rank's x."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward


class BatchNorm(nn.BatchNorm2d):
    """Batch norm of (B,C) or (B,C,H,W) over the global batch: W ranks with B/W rows each compute
    what one with B rows does, which is PyTorch's own (nn.SyncBatchNorm refuses the CPU)."""

    def _check_input_dim(self, x):
        pass                                                     # (B,C) is as welcome as (B,C,H,W)

    def forward(self, x):
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world == 1 or not self.training:
            return super().forward(x)
        rows = x.transpose(1, -1).to(self.running_mean.dtype)                # (B, ..., C)
        dims, count = tuple(range(x.dim() - 1)), x.numel() // x.shape[1] * world
        mean = AllReduce.apply(rows.mean(dims)) / world                      # (C,)
        rows = rows - mean
        var = AllReduce.apply(rows.square().mean(dims)) / world              # (C,)
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(var.detach() * count / (count - 1), self.momentum)
        rows = rows * (var + self.eps).rsqrt()
        rows = rows * self.weight + self.bias if self.affine else rows
        return rows.transpose(1, -1).to(x.dtype)


class Block(nn.Module):
    """Residual block: two 3x3 (ResNet-18), or 1x1, 3x3, 1x1 to 4 times the width (ResNet-50):
    (B, c_in, H, W) -> (B, c or 4c, H/stride, W/stride)."""

    def __init__(self, c_in, c, stride, bottleneck):
        super().__init__()
        shapes = ([(c_in, c, 1, 1), (c, c, 3, stride), (c, 4 * c, 1, 1)] if bottleneck else
                  [(c_in, c, 3, stride), (c, c, 3, 1)])                  # (in, out, kernel, stride)
        for i, (a, b, k, s) in enumerate(shapes, 1):
            self.add_module(f"conv{i}", nn.Conv2d(a, b, k, s, k // 2, bias=False))
            self.add_module(f"bn{i}", BatchNorm(b))
        self.depth, self.downsample = len(shapes), nn.Identity()
        if stride != 1 or c_in != b:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, b, 1, stride, bias=False), BatchNorm(b))

    def forward(self, x):
        y = self.bn1(self.conv1(x))
        for i in range(2, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(F.relu(y)))
        return F.relu(y + self.downsample(x))


class ResNet(nn.Module):
    """torchvision's ResNet without `fc`: (B,C,H,W) -> pooled features (B, embed_dim)."""

    def __init__(self, arch, in_chans):
        super().__init__()
        depths, bottleneck = RESNETS[arch]
        self.conv1, self.bn1 = nn.Conv2d(in_chans, 64, 7, 2, 3, bias=False), BatchNorm(64)
        c_in = 64
        for i, depth in enumerate(depths):
            layer, c = nn.Sequential(), 64 * 2 ** i
            for j in range(depth):
                layer.append(Block(c_in, c, 2 if i and not j else 1, bottleneck))
                c_in = c * (4 if bottleneck else 1)
            self.add_module(f"layer{i + 1}", layer)
        self.in_chans, self.embed_dim = in_chans, c_in
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)          # (B, 64, H/4, W/4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))           # (B, D, H/32, W/32)
        return x.mean((2, 3))                                               # (B, D)


# ---------------------------------------------------------------------------------------- ViT [2]


def take(x, index):
    """Rows of x (B,N,D) or (1,N,D) named by index (B,n): (B,n,D)."""
    return x.take_along_dim(index[..., None], 1)


def pack(xs):
    """Sequences of unlike lengths, [(b,n,D), ...] -> one after another (T,D), and their (b, n)."""
    return torch.cat([x.flatten(0, 1) for x in xs]), [x.shape[:2] for x in xs]


def unpack(x, groups):
    """Undoes pack: (T,D), [(b, n), ...] -> views [(b,n,D), ...]."""
    return [y.view(b, n, -1) for y, (b, n) in zip(x.split([b * n for b, n in groups]), groups)]


class Attention(nn.Module):
    """The one place where it matters where a sequence ends; no padding is ever computed."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, groups):
        out = []
        for qkv in unpack(self.qkv(x), groups):                              # (b, n, 3D)
            qkv = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)   # (3, b, h, n, d)
            y = F.scaled_dot_product_attention(*qkv)                         # (b, h, n, d)
            out.append(y.transpose(1, 2).flatten(2))                         # (b, n, D)
        return self.proj(pack(out)[0])                                       # (T, D)


class SwiGLU(nn.Module):
    """DINOv2-giant's MLP: hidden width 8/3 D, rounded up to a multiple of 8."""

    def __init__(self, dim):
        super().__init__()
        hidden = (int(4 * dim * 2 / 3) + 7) // 8 * 8
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """Starts at 1, a plain residual branch; DINOv2's trained values replace it when loaded."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class ViTBlock(nn.Module):
    """Pre-norm block on packed sequences: x (T,D) and their groups [(b, n), ...] -> (T,D)."""

    def __init__(self, dim, heads, swiglu, layerscale, drop_path):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.drop_path = Attention(dim, heads), drop_path
        self.mlp = SwiGLU(dim) if swiglu else nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))
        self.ls1, self.ls2 = (LayerScale(dim) if layerscale else nn.Identity() for _ in range(2))

    def residual(self, x, groups, branch):
        """x + branch(x); in training only a random (1 - drop_path) of each group's samples pays for
        it, scaled up for the others [dinov2, drop_add_residual_stochastic_depth]."""
        if not self.training or self.drop_path == 0:
            return x + branch(x, groups)
        share = 1 - self.drop_path
        rows = unpack(torch.arange(len(x), device=x.device)[:, None], groups)           # (b, n, 1)
        kept = [r[torch.randperm(len(r), device=x.device)[:int(len(r) * share) or 1]] for r in rows]
        scale = [x.new_full((k.numel(), 1), len(r) / len(k)) for r, k in zip(rows, kept)]
        kept, groups = pack(kept)                                            # (t, 1)
        y = branch(x[kept[:, 0]], groups) * torch.cat(scale)                 # (t, D)
        return x.index_add(0, kept[:, 0], y.to(x.dtype))                     # (T, D)

    def forward(self, x, groups):
        x = self.residual(x, groups, lambda x, g: self.ls1(self.attn(self.norm1(x), g)))
        return self.residual(x, groups, lambda x, g: self.ls2(self.mlp(self.norm2(x))))


class ViT(nn.Module):
    """DINOv2's vision transformer: (B,C,H,W) -> the CLS token after the norm (B, embed_dim)."""

    def __init__(self, arch, in_chans, img_size, patch_size, registers, drop_path, layerscale):
        super().__init__()
        dim, depth, heads = VITS[arch]
        layerscale = arch != "vit_pera_g" if layerscale is None else layerscale
        self.in_chans, self.img_size, self.patch_size = in_chans, img_size, patch_size
        self.embed_dim, self.registers = dim, registers
        self.grid = check_grid(img_size, img_size, patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 1e-6)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(self.grid), dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if registers:
            self.register_tokens = nn.Parameter(torch.randn(1, registers, dim) * 1e-6)
        if layerscale:                       # DINOv2's files carry it; dropped tokens never need it
            self.mask_token = nn.Parameter(torch.zeros(1, dim), requires_grad=False)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(in_chans, dim, patch_size, patch_size)})
        args = dim, heads, arch == "vit_giant2", layerscale, drop_path
        self.blocks = nn.ModuleList([ViTBlock(*args) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)

    def positions(self, h, w, table=None):
        """The position table, or another (1, 1+M*M, D), for h x w patches: (1, 1+h*w, D).

        DINOv2's models without registers were trained with the scale nudged by 0.1 pixel and no
        antialiasing, those with, the other way round. [dinov2, interpolate_pos_encoding]"""
        pos = self.pos_embed if table is None else table
        M = math.isqrt(pos.shape[1] - 1)
        if (h, w) == (M, M):
            return pos
        grid = pos[:, 1:].float().reshape(1, M, M, -1).permute(0, 3, 1, 2)   # (1, D, M, M)
        to = dict(size=(h, w), antialias=True) if self.registers else dict(
            scale_factor=((h + 0.1) / M, (w + 0.1) / M))
        grid = F.interpolate(grid, mode="bicubic", **to)                     # (1, D, h, w)
        return torch.cat([pos[:, :1], grid.flatten(2).mT.to(pos.dtype)], 1)

    def embed(self, x, keep=None):
        """Pixels (B,C,H,W) to tokens (B, 1+R+n, D); only the n kept patches are ever computed.

        A stride-P convolution is one matrix product per patch: cutting the patches first and
        multiplying after lets the dropped ones cost nothing.  ValueError: C, H, W do not fit."""
        (B, C, H, W), P = x.shape, self.patch_size
        if C != self.in_chans:
            raise ValueError(f"input has {C} channels, the model takes {self.in_chans}")
        h, w = check_grid(H, W, P)
        pos = self.positions(h, w)                                           # (1, 1+N, D)
        x = x.reshape(B, C, h, P, w, P).permute(0, 2, 4, 1, 3, 5)            # (B, h, w, C, P, P)
        x, at = x.reshape(B, h * w, C * P * P), pos[:, 1:]                   # (B,N,CPP), (1,N,D)
        if keep is not None:
            x, at = take(x, keep), take(at, keep)                            # (B, n, ...)
        proj = self.patch_embed["proj"]
        x = F.linear(x, proj.weight.flatten(1), proj.bias) + at              # (B, n, D)
        first = [self.cls_token + pos[:, :1], *([self.register_tokens] if self.registers else [])]
        return torch.cat([*(t.expand(B, -1, -1) for t in first), x], 1)      # (B, 1+R+n, D)

    def outputs(self, x, n, keep=None):
        """What the last n blocks give, final norm applied: [(B, 1+R+n_kept, D), ...]."""
        outputs, (x, groups) = [], pack([self.embed(x, keep)])
        for left, block in enumerate(self.blocks, n - len(self.blocks)):
            x = block(x, groups)
            if left >= 0:
                outputs.append(self.norm(x).view(*groups[0], -1))
        return outputs

    def tokens(self, x, keep=None):
        """(B,C,H,W), keep (B,n) patch indices or None -> (B, 1+R+n, D) after the final norm."""
        return self.outputs(x, 1, keep)[0]

    def forward(self, x, keep=None):
        return self.tokens(x, keep)[:, 0]

    def last_blocks(self, x, n):
        """The last n blocks' outputs, final norm applied: [(cls (B,D), patches (B,N,D)), ...]."""
        return [(y[:, 0], y[:, 1 + self.registers:]) for y in self.outputs(x, n)]


def check_grid(H, W, P):
    """Patches along both sides of an image, (H/P, W/P); ValueError unless both are whole."""
    if H % P or W % P:
        raise ValueError(f"image size {H} x {W} is not divisible by patch size {P}")
    return H // P, W // P


# ------------------------------------------------------------------------------------------- heads


def head(widths):
    """MoCo v3's MLP [3]: Linear without bias, BN, ReLU, ..., Linear, BN without scale and shift."""
    layers = []
    for a, b in zip(widths, widths[1:]):
        layers += [nn.Linear(a, b, bias=False), BatchNorm(b), nn.ReLU()]
    return nn.Sequential(*layers[:-2], BatchNorm(b, affine=False))


class Branch(nn.Module):
    """One side of SoftCon: backbone -> projector (D, hidden, hidden, out) [-> predictor (out,
    hidden, out), student only].  Gives z (B, out) and the features (B, D): only these are kept."""

    def __init__(self, backbone, hidden=4096, predict=False, out=256):
        super().__init__()
        self.backbone = backbone
        self.projector = head([backbone.embed_dim, hidden, hidden, out])
        self.predictor = head([out, hidden, out]) if predict else nn.Identity()

    def forward(self, x, keep=None):
        features = self.backbone(x) if keep is None else self.backbone(x, keep)       # (B, D)
        z = self.projector(features)                                                  # (B, out)
        return self.predictor(z), features


class PrototypeHead(nn.Module):
    """PerA's head: MLP (D, hidden, hidden, 384) with GELU and L2 norm, then `out` dot products.

    forward gives the embedding (n, 384), `prototypes` the matrix (out, 384) to multiply it with:
    the products may be too many to hold at once.  Its row k is g_k v_k / |v_k|, with g_k from 1."""

    def __init__(self, dim, out, hidden, bottleneck=384):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden),
                                 nn.GELU(), nn.Linear(hidden, bottleneck))
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.weight_v = nn.Linear(bottleneck, out, bias=False).weight
        self.weight_g = nn.Parameter(torch.ones(out, 1))

    def forward(self, x):
        return F.normalize(self.mlp(x), dim=-1, eps=1e-6)

    def prototypes(self):
        return F.normalize(self.weight_v) * self.weight_g


class SparseBranch(nn.Module):
    """One side of PerA [4]: some patches of global and local crops -> CLS -> prototypes.

    The student (predict=True) also guesses the pixels of patches that nobody shows it: in the
    middle of the network mask tokens that know only their position join the global crops."""

    def __init__(self, backbone, prototypes=131072, hidden=2048, predict=False):
        super().__init__()
        self.backbone = backbone
        self.cls_head = PrototypeHead(backbone.embed_dim, prototypes, hidden)
        if predict:
            values = backbone.in_chans * backbone.patch_size ** 2
            self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, backbone.embed_dim))
            self.pred_head = PrototypeHead(backbone.embed_dim, values, hidden)

    def forward(self, crops, keep, learn=None):
        """crops [(b,C,H,W), ...], patches to see [(b,n), ...], and to guess in crops[0]: (b,m).

        Returns embeddings (sum of b, 384), CLS (sum of b, D), guesses (b,m,PPC) or None."""
        net = self.backbone
        x, groups = pack([net.embed(x, k) for x, k in zip(crops, keep)])              # (T, D)
        for i, block in enumerate(net.blocks):
            if learn is not None and i == len(net.blocks) // 2:
                pos = net.positions(*check_grid(*crops[0].shape[2:], net.patch_size))[:, 1:]
                asked = self.mask_token + take(pos, learn)                           # (b, m, D)
                first, *others = unpack(x, groups)        # at the end: attention knows no order
                x, groups = pack([torch.cat([first, asked.to(x.dtype)], 1), *others])
            x = block(x, groups)
        xs = unpack(net.norm(x), groups)
        cls, guess = torch.cat([x[:, 0] for x in xs]), None
        if learn is not None:
            guess = self.pred_head(xs[0][:, -learn.shape[1]:]) @ self.pred_head.prototypes().T
        return self.cls_head(cls), cls, guess


@torch.no_grad()
def ema_update(teacher, student, momentum):
    """teacher <- momentum * teacher + (1 - momentum) * student, for each parameter of the teacher.
    Buffers stay: the teacher's batch norms count their own batches [3]."""
    own = dict(teacher.named_parameters())
    new = [student.get_parameter(name) for name in own]
    torch._foreach_lerp_([*own.values()], new, 1 - momentum)                            # eq. (5)


# ----------------------------------------------------------------------------- weights in and out

FIRST = "conv1.weight", "patch_embed.proj.weight"              # the input layer, ResNet and ViT
BACKBONE = r"(|.*\.)(patch_embed\.proj\.weight|cls_token|layer[14]\.0\.conv1\.weight)"
BODY = r"layer\d|conv1|bn1|blocks|norm_pre|patch_embed|reg"    # a deeper net is not a shallower one
TIMM = ("mlp.w12.", "mlp.fc1."), ("mlp.w3.", "mlp.fc2."), ("register_tokens", "reg_token")
FAMILIES = {"s_mask_token": "PerA", "optimiser": "last.pt", "encoder_k": "MoCo v2",
            "momentum_encoder": "MoCo v3", "backbone_": "DeCUR", "student": "DINO",
            r"\bfc\.": "torchvision", "gamma": "DINOv2's keys", "": "bare backbone"}   # first hit


def read_tensors(path):
    """{dotted key: tensor} of what torch.save wrote; unpickles no code.  One-line ValueError with
    the path: it is not there, wants to run code, is damaged, compressed or less than it says."""
    try:
        archive, flat = zipfile.is_zipfile(path) and zipfile.ZipFile(path), {}
        if archive and (any(i.compress_type for i in archive.infolist()) or archive.testzip()):
            raise RuntimeError          # torch.save never compresses, torch.load checks no checksum
        with torch.serialization.safe_globals([argparse.Namespace]):         # DINO saves its flags
            level = [("", torch.load(path, "cpu", weights_only=True, mmap=bool(archive)))]
        for _ in range(4):         # as deep as optimiser.state.0.exp_avg; a dict may contain itself
            items = [(p + str(k), v) for p, d in level if isinstance(d, dict) for k, v in d.items()]
            flat |= {k: v for k, v in items if isinstance(v, torch.Tensor)}
            level = {id(v): (f"{k}.", v) for k, v in items}.values()
        if any(v.is_meta or v.nbytes > v.untyped_storage().nbytes() + 2**30 for v in flat.values()):
            raise RuntimeError
    except Exception as error:                                # torch.load raises half a dozen kinds
        code = re.search(r"GLOBAL (\S+)", str(error))
        why = (f"refused, it wants to run code ({code[1]})" if code else error.strerror if
               getattr(error, "filename", None) else "damaged, or not a PyTorch checkpoint")
        raise ValueError(f"{path}: {why}") from None
    return flat


def read_weights(path, which="", in_chans=0):
    """Any checkpoint file -> (backbone tensors under upstream keys, keys left out), by keys only.

    Of several backbones: the one with `which` in its prefix ("student"), else the one its authors
    evaluate (teacher in DINO, PerA and our runs, MoCo's query or base encoder), else the nearest to
    in_chans (DeCUR: SAR or MS).  Raises ValueError as read_tensors and for no ViT or ResNet."""
    flat = read_tensors(path)
    prefixes = [m[1] for m in (re.fullmatch(BACKBONE, k) for k in flat) if m]
    prefix = min(prefixes, default="", key=lambda p: (
        which not in p, not re.search("teacher|encoder_q|base_encoder", p),
        [abs(n - in_chans) for k in FIRST if p + k in flat for n in flat[p + k].shape[1:2]]))
    state = {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", k.removeprefix(prefix)): v
             for k, v in flat.items() if k.startswith(prefix)}             # DINOv2's block chunks
    gated = any(k.endswith("mlp.fc1.weight") and v.dim() and v.shape[0] > 5 * v.shape[-1]
                for k, v in state.items())                     # SwiGLU's: 16/3 times D; an MLP's: 4
    for ours, timms in TIMM[0 if gated else 2:]:
        state = {k.replace(timms, ours): v for k, v in state.items()}
    resnet = any(re.match(r"layer\d\.", k) for k in state)
    for name, dims in ((FIRST[0], 4),) if resnet else ((FIRST[1], 4), ("pos_embed", 3)):
        if name not in state or state[name].dim() != dims or 0 in state[name].shape:
            raise ValueError(f"{path}: no ViT or ResNet, has no {dims}-dimensional tensor {name}")
    if not resnet and "register_tokens" in state and state["pos_embed"].shape[1] ** 0.5 % 1 == 0:
        state["pos_embed"] = F.pad(state["pos_embed"], (0, 0, 1, 0))   # timm: cls_token includes it
    return state, [k for k in flat if not k.startswith(prefix)]


def build_from(path, in_chans=0, quiet=True):
    """The backbone in a file, loaded: architecture, channels, patch, size read off the tensors.

    in_chans only chooses between several.  Heads are in no tensor: a ViT-S with 12 is read as 6.
    Raises ValueError as read_weights, load_pretrained, and for a ViT of no known size."""
    weights = state, _ = read_weights(path, in_chans=in_chans)
    dim, chans, patch, _ = state[FIRST[0] if FIRST[0] in state else FIRST[1]].shape
    if FIRST[0] in state:
        model = build("resnet50" if "layer1.0.conv3.weight" in state else "resnet18", chans)
    else:
        depth = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
        arch = next((a for a, v in VITS.items() if v[:2] == (dim, depth)), None)
        if arch is None:
            raise ValueError(f"{path}: a ViT {dim} wide and {depth} deep is not one of {[*VITS]}")
        side = max(1, math.isqrt(state["pos_embed"].shape[1] - 1))
        registers = state.get("register_tokens", torch.empty(0)).numel() // dim
        model = build(arch, chans, side * patch, patch, registers,
                      layerscale=any(k.endswith("gamma") for k in state))
    load_pretrained(model, path, quiet=quiet, weights=weights)
    return model


def adapt_input(weight, fresh, adapt, rgb=(3, 2, 1)):
    """First-layer weight (D, C_file, k, k) for fresh.shape[1] channels; ValueError if it cannot be.

    random: the fresh one, as SoftCon.  mean: the file's average in every band, times C_file / C, so
    that the output keeps its size.  rgb: copied to these channels (B4, B3, B2), fresh elsewhere.
    12 and 13 bands, whatever `adapt`, share all but B10: the output is the file's at B10 = 0."""
    weight, C_file, C = weight.to(fresh), weight.shape[1], fresh.shape[1]
    if {C_file, C} == {12, 13}:                                              # B10 has index 10
        return torch.cat([weight[:, :10], 0 * fresh[:, 12:], weight[:, C_file - 2:]], 1)
    if adapt == "random":
        return fresh
    if adapt == "mean":
        return weight.mean(1, keepdim=True).expand_as(fresh) * (C_file / C)
    if adapt != "rgb" or C_file != 3 or len({*rgb}) < 3 or C <= max(rgb):
        raise ValueError(f"adapt={adapt} does not lead from {C_file} to {C} channels")
    return fresh.index_copy(1, torch.tensor(rgb, device=fresh.device), weight)


@torch.no_grad()
def load_pretrained(model, path, adapt="random", quiet=False, weights=None, rgb=(3, 2, 1)):
    """Fill `model` from a checkpoint file; returns and prints what happened to every tensor.

    {"loaded", "resampled" (position table), "adapted" (input layer), "fresh" (kept its start),
    "ignored" (only in the file)} -> names.  ValueError that names it: a tensor that the file lacks
    (but for mask token, LayerScale, then 1, batch counters) or has in another shape, a block only
    in the file.  weights: read_weights(path), if called before; adapt, rgb: as adapt_input."""
    state, rest = weights or read_weights(path, in_chans=model.in_chans)
    own, keys = model.state_dict(), " ".join([*state, *rest])
    extra = [k for k in state if k not in own]
    report = {"loaded": [], "resampled": [], "adapted": [], "fresh": [], "ignored": rest + extra}
    absent = ("mask_token", "num_batches_tracked") + ("gamma",) * ("gamma" not in keys)
    wrong = [f"has no tensor {k}" for k in own if k not in state and not k.endswith(absent)]
    wrong += [f"has {k}, which the model lacks" for k in extra if re.match(BODY, k)]
    for name, old in own.items():
        new, verdict = state.get(name, old), "loaded"
        if new.shape != old.shape:
            if name in FIRST and new.shape[:1] + new.shape[2:] == old.shape[:1] + old.shape[2:]:
                try:
                    new, verdict = adapt_input(new, old, adapt, rgb), "adapted"
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from None
            elif name == "pos_embed" and new.shape[::2] == old.shape[::2] and (
                    new.shape[1] > 1 and (new.shape[1] - 1) ** 0.5 % 1 == 0):
                new, verdict = model.positions(*model.grid, new), "resampled"
            elif name == "mask_token":                                  # MAE's, of its decoder
                new = old
        if (new.shape, new.is_floating_point()) != (old.shape, old.is_floating_point()):
            wrong.append(f"{name} is {tuple(new.shape)} {new.dtype}, "
                         f"the model's is {tuple(old.shape)} {old.dtype}")
        report["fresh" if new is old else verdict].append(name)
        own[name] = new
    if wrong:
        raise ValueError(f"{path}: {'; '.join(wrong[:3])}")
    model.load_state_dict(own)
    if not quiet:
        print(f"{path}: {next(v for k, v in FAMILIES.items() if re.search(k, keys))}, as "
              f"{model.spec}, {sum(p.numel() for p in model.parameters()):,} parameters")
        for verdict, names in report.items():
            tops = Counter(re.match(r"((state_dict|model|module)\.)*([^.]*)", k)[3] for k in names)
            names = names if len(names) < 4 else [f"{k}.* ({n})" for k, n in tops.items()]
            print(f"  {tops.total()} {verdict}: {', '.join(names)}")
    return report


def export_backbone(model, timm=False):
    """The state dict to publish, on the CPU: strict in torchvision (fc = Identity), DINOv2's ViT
    and, without LayerScale, PerA's.  timm=True: strict in timm, which has no mask token, names
    SwiGLU as an MLP and, beside registers, keeps the position of CLS in cls_token."""
    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    for ours, timms in TIMM if timm else ():
        state = {k.replace(ours, timms): v for k, v in state.items() if k != "mask_token"}
    if "reg_token" in state:
        state["cls_token"] += state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:].clone()
    return state


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "inspect":
        sys.exit("usage: python model.py inspect FILE")
    try:
        build_from(sys.argv[2], quiet=False)
    except ValueError as error:
        sys.exit(f"model.py: error: {error}")
