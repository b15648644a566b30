"""Claims about checkpoint files: every family loads, every tensor is accounted for, ours go out.

Files are made here from key and shape lists written out by hand, in each family's own naming and
nesting.  The backbones are narrow (48) and shallow; the full-size lists are compared on the meta
device.  Forward passes are re-stated from the state dict alone.
"""
import argparse
import functools
import math
import runpy
import sys
import zipfile

import pytest
import torch
import torch.nn.functional as F

import model as models
import pretrain
from conftest import ROOT, SMALL

SHALLOW = {"vit_small": (48, 2, 6), "vit_giant2": (48, 3, 6), "vit_pera_g": (48, 4, 6)}


@pytest.fixture
def small(monkeypatch):
    """The same architectures, narrow and shallow, told apart by their depth."""
    for arch, shape in SHALLOW.items():
        monkeypatch.setitem(models.VITS, arch, shape)
    monkeypatch.setitem(models.RESNETS, "resnet50", ((1, 1, 1, 1), True))
    monkeypatch.setitem(models.RESNETS, "resnet18", ((1, 1, 1, 1), False))


# ------------------------------------------------------------------------------ key and shape lists


def vit(depth=2, D=48, chans=3, patch=14, size=518, ls=True, mask=True, registers=0, swiglu=False):
    """Keys and shapes of DINOv2's ViT."""
    wide = (int(4 * D * 2 / 3) + 7) // 8 * 8
    shapes = {"cls_token": (1, 1, D), "pos_embed": (1, 1 + (size // patch) ** 2, D),
              "patch_embed.proj.weight": (D, chans, patch, patch), "patch_embed.proj.bias": (D,),
              "norm.weight": (D,), "norm.bias": (D,)}
    shapes |= {"mask_token": (1, D)} if mask else {}
    shapes |= {"register_tokens": (1, registers, D)} if registers else {}
    block = {"norm1.weight": (D,), "norm1.bias": (D,), "norm2.weight": (D,), "norm2.bias": (D,),
             "attn.qkv.weight": (3 * D, D), "attn.qkv.bias": (3 * D,),
             "attn.proj.weight": (D, D), "attn.proj.bias": (D,)}
    block |= {"mlp.w12.weight": (2 * wide, D), "mlp.w12.bias": (2 * wide,),
              "mlp.w3.weight": (D, wide), "mlp.w3.bias": (D,)} if swiglu else {
              "mlp.fc1.weight": (4 * D, D), "mlp.fc1.bias": (4 * D,),
              "mlp.fc2.weight": (D, 4 * D), "mlp.fc2.bias": (D,)}
    block |= {"ls1.gamma": (D,), "ls2.gamma": (D,)} if ls else {}
    return shapes | {f"blocks.{i}.{k}": s for i in range(depth) for k, s in block.items()}


def resnet(chans=3, depths=(1, 1, 1, 1), bottleneck=True):
    """Keys and shapes of torchvision's ResNet without fc."""
    shapes = {"conv1.weight": (64, chans, 7, 7)}

    def bn(name, c):
        for k in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{k}"] = (c,)
        shapes[f"{name}.num_batches_tracked"] = ()
    bn("bn1", 64)
    c_in = 64
    for i, depth in enumerate(depths):
        c = 64 * 2 ** i
        for j in range(depth):
            name = f"layer{i + 1}.{j}"
            convs = [(c_in, c, 1), (c, c, 3), (c, 4 * c, 1)] if bottleneck else [
                (c_in, c, 3), (c, c, 3)]
            for n, (a, b, k) in enumerate(convs, 1):
                shapes[f"{name}.conv{n}.weight"] = (b, a, k, k)
                bn(f"{name}.bn{n}", b)
            if j == 0 and (i or bottleneck):
                shapes[f"{name}.downsample.0.weight"] = (convs[-1][1], c_in, 1, 1)
                bn(f"{name}.downsample.1", convs[-1][1])
            c_in = convs[-1][1]
    return shapes


@functools.lru_cache
def random_tensors(shapes, seed):
    g = torch.Generator().manual_seed(seed)
    return {k: torch.rand(s, generator=g) * 0.1 if s else torch.tensor(7) for k, s in shapes}


def fill(shapes, seed=0):
    return dict(random_tensors(tuple(shapes.items()), seed))


@pytest.mark.parametrize("arch, args, shapes", [
    ("vit_small", dict(img_size=518), vit(12, 384)), ("vit_base", dict(img_size=518), vit(12, 768)),
    ("vit_large", dict(img_size=518, registers=4), vit(24, 1024, registers=4)),
    ("vit_giant2", dict(img_size=518), vit(40, 1536, swiglu=True)),
    ("vit_small", dict(in_chans=13), vit(12, 384, 13, size=224)),                     # SoftCon
    ("vit_base", dict(in_chans=2), vit(12, 768, 2, size=224)),
    ("vit_small", dict(in_chans=13, patch_size=16, layerscale=False),                 # SSL4EO-S12
     vit(12, 384, 13, 16, 224, ls=False, mask=False)),
    ("vit_pera_g", dict(img_size=448, patch_size=16),
     vit(40, 1024, 3, 16, 448, ls=False, mask=False)),
    ("resnet50", dict(in_chans=13), resnet(13, (3, 4, 6, 3))),
    ("resnet18", {}, resnet(3, (2, 2, 2, 2), False)),
])
def test_full_size_models_have_exactly_the_released_files_keys_and_shapes(arch, args, shapes):
    with torch.device("meta"):
        m = models.build(arch, **{"in_chans": 3, **args})
    assert {k: tuple(v.shape) for k, v in m.state_dict().items()} == shapes


# ----------------------------------------------------------------------------------------- families


def chunks(state):
    """DINOv2 trained with block_chunks: blocks.CHUNK.BLOCK.name, blocks counted through."""
    return {f"blocks.{int(k.split('.')[1]) // 2}{k[6:]}" if k.startswith("blocks.") else k: v
            for k, v in state.items()}


def timm(state):
    """timm's naming; with registers cls_token holds its position and the table has no CLS row."""
    state = {k.replace("w12", "fc1").replace("w3", "fc2"): v for k, v in state.items()}
    state.pop("mask_token", None)
    if "register_tokens" in state:
        state["reg_token"] = state.pop("register_tokens")
        pos = state.get("pos_embed", torch.ones(1))
        if pos.dim() == 3:
            state["pos_embed"] = pos[:, 1:]
            state |= {k: v + pos[:, :1] for k, v in state.items()
                      if k == "cls_token" and v.dim() == 3}
    return state


def at(prefix, state):
    return {prefix + k: v for k, v in state.items()}


def heads(*names):
    return {k: torch.ones(2, 2) for k in names}


ADAM = {"state": {0: {"step": torch.tensor(1.), "exp_avg": torch.ones(3)}},
        "param_groups": [{"lr": 0.1}]}
NEST = {                                   # (wanted copy, other copy) -> what torch.save was given
    "flat": lambda s, o: s,
    "fc": lambda s, o: s | heads("fc.weight", "fc.bias"),
    "state_dict": lambda s, o: {"state_dict": s},
    "dino": lambda s, o: {
        "student": at("module.backbone.", o) | heads("module.head.mlp.0.weight"),
        "teacher": at("backbone.", s) | heads("head.mlp.0.weight"), "optimizer": ADAM, "epoch": 3,
        "args": argparse.Namespace(arch="vit_small", lr=1e-3), "dino_loss": heads("center")},
    "moco2": lambda s, o: {"epoch": 99, "arch": "resnet50", "state_dict": at(
        "module.encoder_k.", o) | at("module.encoder_q.", s | heads("fc.0.weight", "fc.2.weight"))
        | heads("module.queue", "module.queue_ptr"), "optimizer": ADAM},
    "moco3": lambda s, o: {"epoch": 99, "state_dict": at("module.momentum_encoder.", o) | at(
        "module.base_encoder.", s | heads("head.0.weight", "head.1.weight", "head.1.bias",
                                          "head.3.weight"))
        | heads("module.predictor.0.weight"), "optimizer": ADAM, "scaler": {"scale": 1.0}},
    "decur": lambda s, o: {"model": at("module.backbone_1.", o) | at("module.backbone_2.", s)
                           | heads("module.projector1.0.weight")},
    "pera": lambda s, o: {"model": {"s_mask_token": torch.ones(1, 1, 48)} | at(
        "student.backbone.", o) | at("teacher.backbone.", s) | heads(
            "teacher.cls_head.last_layer.weight_v", "student.pred_head.mlp0.mlp.0.weight"),
        "optimizer": ADAM, "scaler": {}, "best_loss": 0.5, "epoch": 42},
    "distilled": lambda s, o: {"model": at("student.backbone.", s)},
    "last.pt": lambda s, o: {
        "student": at("backbone.", o) | heads("projector.0.weight", "predictor.0.weight"),
        "teacher": at("backbone.", s) | heads("projector.0.weight"), "optimiser": ADAM, "step": 9,
        "flags": {"arch": "vit_small", "seed": 0}}}
bare, pera = dict(ls=False, mask=False, patch=16), dict(depth=4, ls=False, mask=False, patch=16,
                                                        size=448)
FILES = {                 # family: (keys and shapes, naming, nesting, arch, what inspect calls it)
    "DINOv2": (vit(), dict, "flat", "vit_small", "DINOv2"),
    "DINOv2 g": (vit(3, swiglu=True), dict, "flat", "vit_giant2", "DINOv2"),
    "DINOv2 reg4": (vit(registers=4), dict, "flat", "vit_small", "DINOv2"),
    "DINOv2 chunks": (vit(3, swiglu=True, registers=4), chunks, "flat", "vit_giant2", "DINOv2"),
    "timm": (vit(mask=False), timm, "flat", "vit_small", "DINOv2"),
    "timm g": (vit(3, mask=False, swiglu=True), timm, "flat", "vit_giant2", "DINOv2"),
    "timm g reg4": (vit(3, mask=False, swiglu=True, registers=4), timm, "flat", "vit_giant2",
                    "DINOv2"),
    "DINO RN50": (resnet(), dict, "flat", "resnet50", "bare backbone"),
    "DINO RN50 training": (resnet(), dict, "dino", "resnet50", "DINO"),
    "DINO ViT training": (vit(size=224, **bare), dict, "dino", "vit_small", "DINO"),
    "torchvision RN18": (resnet(bottleneck=False), dict, "fc", "resnet18", "torchvision"),
    "torchvision RN50": (resnet(), dict, "fc", "resnet50", "torchvision"),
    "SoftCon RN50 13": (resnet(13), dict, "flat", "resnet50", "bare backbone"),
    "SoftCon ViT 13": (vit(chans=13, size=224), dict, "flat", "vit_small", "DINOv2"),
    "SoftCon ViT 2": (vit(chans=2, size=224), dict, "flat", "vit_small", "DINOv2"),
    "SoftCon enc": (vit(chans=2, size=224, mask=False), dict, "flat", "vit_small", "DINOv2"),
    "SSL4EO MoCo v2": (resnet(13), dict, "moco2", "resnet50", "MoCo v2"),
    "SSL4EO MoCo v3": (vit(chans=13, size=224, **bare), dict, "moco3", "vit_small", "MoCo v3"),
    "SSL4EO backbone": (resnet(13), dict, "state_dict", "resnet50", "bare backbone"),
    "DeCUR MS": (resnet(13), dict, "decur", "resnet50", "DeCUR"),
    "PerA": (vit(**pera), dict, "pera", "vit_pera_g", "PerA"),
    "PerA distilled": (vit(size=448, **bare), dict, "distilled", "vit_small", "bare backbone"),
    "last.pt": (vit(chans=2, size=56), dict, "last.pt", "vit_small", "last.pt")}


def write(path, family, change=lambda state: None):
    """The family's file at `path`; returns its backbone and its other copy under upstream keys."""
    shapes, naming, nest = FILES[family][:3]
    state, other = fill(shapes), fill(shapes, 1)
    if nest == "decur":
        other["conv1.weight"] = other["conv1.weight"][:, :2]
    changed = dict(state)
    change(changed)
    torch.save(NEST[nest](naming(changed), naming(other)), path)
    return state, other


def tensors(node):
    return (1 if isinstance(node, torch.Tensor) else
            sum(map(tensors, node.values())) if isinstance(node, dict) else 0)


@pytest.mark.parametrize("family", FILES)
def test_a_file_of_every_family_builds_itself_with_every_tensor_accounted_for(
        family, small, tmp_path, capsys):
    path = tmp_path / "x.bin"
    state, _ = write(path, family)
    shapes, naming, nest, arch, called = FILES[family]
    chans = next(s[1] for k, s in shapes.items() if k in models.FIRST)
    m = models.build_from(path, chans)
    assert m.spec["arch"] == arch and m.in_chans == chans and capsys.readouterr().out == ""
    m.eval()(torch.rand(1, chans, 112, 112))
    target = models.build(**m.spec)
    report = models.load_pretrained(target, path)
    own = target.state_dict()
    if naming is timm and "register_tokens" in state:    # CLS and its position come as one vector
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = F.pad(state["pos_embed"][:, 1:], (0, 0, 1, 0))
    assert sorted(report["loaded"]) == sorted(state)
    assert all(torch.equal(own[k], v) and torch.equal(m.state_dict()[k], v)
               for k, v in state.items())
    assert report["resampled"] == report["adapted"] == []
    assert sorted(report["fresh"]) == sorted(set(own) - set(state))
    assert set(report["fresh"]) <= {"mask_token"}
    blob = torch.load(path, weights_only=False)
    assert len(report["loaded"]) + len(report["ignored"]) == tensors(blob)
    assert called in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize("how", ["missing", "renamed", "mis-shaped"])
@pytest.mark.parametrize("family", FILES)
def test_a_missing_renamed_or_mis_shaped_tensor_is_named(family, how, small, tmp_path):
    shapes, arch = FILES[family][0], FILES[family][3]
    vits = ["cls_token", "pos_embed", "patch_embed.proj.weight", "norm.bias",
            "blocks.1.attn.qkv.weight", "blocks.1.ls2.gamma", "blocks.0.mlp.w12.weight"]
    resnets = ["conv1.weight", "layer1.0.conv1.weight", "layer4.0.bn2.running_var"]
    for name in vits if arch.startswith("vit") else resnets:
        if name not in shapes:
            continue

        def change(state):
            tensor = state.pop(name)
            if how == "renamed":
                state[name.replace(name.split(".")[-1], "wieght")] = tensor
            if how == "mis-shaped":
                state[name] = torch.ones(5)
        write(tmp_path / "x", family, change)
        chans = next(s[1] for k, s in shapes.items() if k in models.FIRST)
        with pytest.raises(ValueError) as error:
            models.build_from(tmp_path / "x", chans)
        assert name in str(error.value) and str(tmp_path / "x") in str(error.value), name
        assert "\n" not in str(error.value)


def test_the_copy_taken_is_the_published_one_unless_another_is_asked_for(small, tmp_path):
    for family, named in (("PerA", "student"), ("DINO ViT training", "student"),
                          ("SSL4EO MoCo v3", "momentum"), ("last.pt", "student")):
        state, other = write(tmp_path / "x", family)
        assert torch.equal(models.read_weights(tmp_path / "x")[0]["norm.bias"], state["norm.bias"])
        weights = models.read_weights(tmp_path / "x", named)
        assert torch.equal(weights[0]["norm.bias"], other["norm.bias"])
    model = models.build("vit_small", 2, 56)
    models.load_pretrained(model, tmp_path / "x", weights=weights, quiet=True)
    assert torch.equal(model.norm.bias, other["norm.bias"])


def test_of_decurs_two_backbones_the_one_nearest_in_channels_is_taken(small, tmp_path):
    state, other = write(tmp_path / "x", "DeCUR MS")
    for chans, want in ((13, state), (12, state), (2, other)):
        m = models.build("resnet50", chans)
        report = models.load_pretrained(m, tmp_path / "x", quiet=True)
        assert torch.equal(m.bn1.weight, want["bn1.weight"])
        assert report["adapted"] == (["conv1.weight"] if chans == 12 else [])


def test_a_vit_of_no_known_size_is_refused_by_its_size_and_file(small, tmp_path):
    torch.save(fill(vit(depth=9)), tmp_path / "x")
    with pytest.raises(ValueError, match="x: a ViT 48 wide and 9 deep is not one of .*vit_tiny"):
        models.build_from(tmp_path / "x")
    with pytest.raises(ValueError, match="has blocks.2.norm1.weight, which the model lacks"):
        models.load_pretrained(models.build("vit_small", 3), tmp_path / "x")
    state = fill(vit())
    torch.save(state | {"pos_embed": torch.ones(1, 200, 48)}, tmp_path / "x")       # no square
    with pytest.raises(ValueError, match=r"pos_embed is \(1, 200, 48\)"):
        models.load_pretrained(models.build("vit_small", 3), tmp_path / "x")


def test_half_precision_and_files_of_the_old_format_load(small, tmp_path):
    state = {k: v.half() for k, v in fill(vit()).items()}
    torch.save(state, tmp_path / "x", _use_new_zipfile_serialization=False)
    m = models.build_from(tmp_path / "x")
    assert m.norm.bias.dtype == torch.float32
    assert torch.equal(m.norm.bias, state["norm.bias"].float())


def test_the_file_is_read_once_by_build_from_and_by_pretrain(
        small, tmp_path, toy, labels, monkeypatch):
    state = fill(vit(chans=2, patch=6, size=24, registers=1))
    torch.save(state, tmp_path / "x.pth")
    load, read = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *a, **k: read.append(a[0]) or load(*a, **k))
    models.build_from(tmp_path / "x.pth")
    assert len(read) == 1
    pretrain.main([*SMALL, "--modality", "s1", "--data", toy, "--labels", labels, "--arch",
                   "vit_small", "--max-steps", "1", "--init", str(tmp_path / "x.pth"), "--out",
                   str(tmp_path / "run"), "--device", "cpu"])
    assert len(read) == 2
    assert models.build_from(tmp_path / "run/backbone.pt").registers == 1
    last = models.build_from(tmp_path / "run/last.pt").state_dict()
    assert all(torch.equal(v, last[k]) for k, v in models.build_from(
        tmp_path / "run/backbone.pt").state_dict().items())


# ------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("arch, args, shapes", [
    ("vit_small", {}, vit(size=224)), ("vit_small", dict(registers=4), vit(size=224, registers=4)),
    ("vit_giant2", dict(registers=4), vit(3, size=224, registers=4, swiglu=True)),
    ("vit_pera_g", {}, vit(4, size=224, ls=False, mask=False)), ("resnet50", {}, resnet()),
    ("resnet18", {}, resnet(bottleneck=False)),
])
def test_exported_keys_and_shapes_are_exactly_upstreams_and_timms(
        arch, args, shapes, small, tmp_path):
    m = models.build(arch, 3, **args)
    m.load_state_dict(fill(shapes))
    state, other = models.export_backbone(m), models.export_backbone(m, timm=True)
    assert {k: tuple(v.shape) for k, v in state.items()} == shapes
    want = timm(fill(shapes)) if "cls_token" in shapes else fill(shapes)
    assert set(other) == set(want) and all(torch.equal(other[k], v) for k, v in want.items())
    torch.save(other, tmp_path / "x")
    x = torch.rand(1, 3, 224, 224)
    assert torch.allclose(models.build_from(tmp_path / "x").eval()(x), m.eval()(x), atol=1e-5)


# ------------------------------------------------------------------------------ forward, re-stated


def cubic(x, a):
    x = abs(x)
    return ((a + 2) * x ** 3 - (a + 3) * x ** 2 + 1 if x < 1 else
            a * x ** 3 - 5 * a * x ** 2 + 8 * a * x - 4 * a if x < 2 else 0.0)


def resampling(M, n, antialias):
    """(n, M) weights of bicubic resampling: 4 taps at scale M / (n + .1), or a stretched kernel."""
    R, scale = torch.zeros(n, M, dtype=torch.float64), M / (n if antialias else n + 0.1)
    for i in range(n):
        centre, stretch = (i + 0.5) * scale, max(scale, 1.0)
        if antialias:
            low, high = (int(centre + side * 2 * stretch + 0.5) for side in (-1, 1))
            for j in range(max(low, 0), min(high, M)):
                R[i, j] = cubic((j + 0.5 - centre) / stretch, -0.5)
            R[i] /= R[i].sum()
        else:
            for j in range(math.floor(centre - 0.5) - 1, math.floor(centre - 0.5) + 3):
                R[i, min(max(j, 0), M - 1)] += cubic(centre - 0.5 - j, -0.75)
    return R


def vit_tokens(s, x, heads, registers):
    """DINOv2's forward from its state dict, in float64, one head and one patch at a time."""
    s, x = {k: v.double() for k, v in s.items()}, x.double()
    P, D = s["patch_embed.proj.weight"].shape[-1], s["norm.weight"].numel()
    h, w, M = x.shape[2] // P, x.shape[3] // P, math.isqrt(s["pos_embed"].shape[1] - 1)
    grid = s["pos_embed"][0, 1:].reshape(M, M, D)
    if (h, w) != (M, M):
        rows, columns = (resampling(M, n, registers > 0) for n in (h, w))
        grid = torch.einsum("im,jn,mnd->ijd", rows, columns, grid)

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * s[f"{name}.weight"]
                + s[f"{name}.bias"])

    def linear(x, name):
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]
    out = []
    for image in x:
        y = [s["cls_token"][0, 0] + s["pos_embed"][0, 0]]
        y += [s["register_tokens"][0, i] for i in range(registers)]
        for i in range(h):
            for j in range(w):
                patch = image[:, i * P:(i + 1) * P, j * P:(j + 1) * P].flatten()
                y.append(s["patch_embed.proj.weight"].flatten(1) @ patch
                         + s["patch_embed.proj.bias"] + grid[i, j])
        y = torch.stack(y)
        for b in range(1 + max(int(k.split(".")[1]) for k in s if k.startswith("blocks"))):
            k = f"blocks.{b}."
            q, key, v = linear(norm(y, f"{k}norm1"), f"{k}attn.qkv").split(D, 1)
            mixed = [(q[:, c] @ key[:, c].T / math.sqrt(D // heads)).softmax(1) @ v[:, c]
                     for c in torch.arange(D).split(D // heads)]
            y = y + linear(torch.cat(mixed, 1), f"{k}attn.proj") * s.get(f"{k}ls1.gamma", 1)
            z = norm(y, f"{k}norm2")
            if f"{k}mlp.w3.weight" in s:
                gate, value = linear(z, f"{k}mlp.w12").chunk(2, 1)
                z = linear(gate * gate.sigmoid() * value, f"{k}mlp.w3")
            else:
                z = linear(z, f"{k}mlp.fc1")
                z = linear(z * (1 + torch.erf(z / math.sqrt(2))) / 2, f"{k}mlp.fc2")
            y = y + z * s.get(f"{k}ls2.gamma", 1)
        out.append(norm(y, "norm"))
    return torch.stack(out).float()


@pytest.mark.parametrize("arch, args", [
    ("vit_small", {}), ("vit_small", dict(registers=4)), ("vit_small", dict(layerscale=False)),
    ("vit_giant2", {}), ("vit_giant2", dict(registers=4))])
@pytest.mark.parametrize("size", [(224, 224), (98, 154), (518, 518)])
def test_a_vit_computes_what_dinov2s_definition_says_at_every_size(arch, args, size, small):
    """Pre-norm block, LayerScale, SwiGLU, order of registers, positions in both modes."""
    m = models.build(arch, 2, 518, **args).eval()
    g = torch.Generator().manual_seed(0)
    state = {k: torch.randn(v.shape, generator=g) * 0.2 for k, v in m.state_dict().items()}
    m.load_state_dict(state)
    x = torch.rand(1, 2, *size, generator=g)
    with torch.no_grad():
        ours = m.tokens(x)
        stated = vit_tokens(state, x, SHALLOW[arch][2], args.get("registers", 0))
    assert ours.shape[1] == 1 + args.get("registers", 0) + size[0] * size[1] // 196
    assert torch.allclose(ours, stated, atol=1e-5, rtol=1e-5), (ours - stated).abs().max()


def resnet_features(s, x, bottleneck, stride_at):
    """torchvision's forward in eval() from its state dict; the stride at the stride_at-th conv."""
    def conv_bn(x, conv, bn, stride=1):
        x = F.conv2d(x, s[f"{conv}.weight"], None, stride, s[f"{conv}.weight"].shape[-1] // 2)
        column = {k: s[f"{bn}.{k}"][:, None, None]
                  for k in ("running_mean", "running_var", "weight", "bias")}
        return ((x - column["running_mean"]) / (column["running_var"] + 1e-5).sqrt()
                * column["weight"] + column["bias"])
    x = F.max_pool2d(conv_bn(x, "conv1", "bn1", 2).clamp(min=0), 3, 2, 1)
    for i in range(1, 5):
        k, y, n = f"layer{i}.0.", x, 3 if bottleneck else 2
        for c in range(1, n + 1):
            y = conv_bn(y, f"{k}conv{c}", f"{k}bn{c}", 2 if i > 1 and c == stride_at else 1)
            y = y.clamp(min=0) if c < n else y
        if f"{k}downsample.0.weight" in s:
            x = conv_bn(x, f"{k}downsample.0", f"{k}downsample.1", 2 if i > 1 else 1)
        x = (x + y).clamp(min=0)
    return x.mean((2, 3))


@pytest.mark.parametrize("arch, stride_at", [("resnet50", 2), ("resnet18", 1)])
def test_a_resnet_computes_torchvisions_definition_with_the_stride_on_the_3x3(
        arch, stride_at, small):
    m = models.build(arch, 2).eval()
    g = torch.Generator().manual_seed(0)
    for name, v in m.state_dict().items():
        if "bn" in name or "downsample.1" in name:
            v.copy_(torch.rand(v.shape, generator=g) + 0.5)
    x = torch.rand(2, 2, 64, 64, generator=g)
    with torch.no_grad():
        ours, s = m(x), m.state_dict()
        stated = resnet_features(s, x, arch == "resnet50", stride_at)
        assert torch.allclose(ours, stated, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(ours, resnet_features(s, x, arch == "resnet50", 3 - stride_at),
                                  atol=1e-2)


# -------------------------------------------------------------------------------- the input layer


def test_12_and_13_bands_cross_by_name_whatever_adapt_says(small, tmp_path):
    """13 to 12 gives the file's output at B10 = 0, 12 to 13 its output whatever B10 is."""
    x = torch.rand(2, 13, 64, 64)
    no_b10 = [b for b in range(13) if b != 10]
    for adapt in ("random", "mean", "rgb"):
        for arch, shapes in (("resnet18", resnet(13, bottleneck=False)),
                             ("vit_small", vit(chans=13, size=224))):
            torch.save(fill(shapes), tmp_path / "13")
            thirteen = models.build_from(tmp_path / "13")
            twelve = models.build(arch, 12)
            assert models.load_pretrained(twelve, tmp_path / "13", adapt, quiet=True)["adapted"]
            zero = x.clone()
            zero[:, 10] = 0
            first, second = (m.conv1 if arch == "resnet18" else m.patch_embed["proj"]
                             for m in (thirteen, twelve))
            assert torch.allclose(second(x[:, no_b10]), first(zero), atol=1e-4)
            torch.save(models.export_backbone(twelve), tmp_path / "12")
            models.load_pretrained(thirteen, tmp_path / "12", adapt, quiet=True)
            assert torch.allclose(first(x), second(x[:, no_b10]), atol=1e-4)
            assert first.weight[:, 10].eq(0).all()


def test_what_each_adaptation_does_to_the_scale_of_the_first_output():
    """mean keeps it for bands that agree; rgb adds the fresh bands to the file's output; random
    forgets the file: the spread is the fresh layer's own."""
    g = torch.Generator().manual_seed(0)
    weight, fresh = (torch.randn(64, c, 7, 7, generator=g) * s for c, s in ((3, 0.3), (13, 0.02)))
    grey, x = torch.rand(4, 1, 32, 32, generator=g), torch.rand(4, 13, 32, 32, generator=g)
    file = F.conv2d(grey.expand(-1, 3, -1, -1), weight)
    for C in (2, 12, 13):
        mean = models.adapt_input(weight, fresh[:, :C], "mean")
        assert torch.allclose(F.conv2d(grey.expand(-1, C, -1, -1), mean), file, atol=1e-4)
    noise, same = x - 0.5, weight.mean(1, True).expand(-1, 3, -1, -1)        # bands that disagree
    spread = F.conv2d(noise, models.adapt_input(weight, fresh, "mean")).std()
    assert abs(spread / F.conv2d(noise[:, :3], same).std() / math.sqrt(3 / 13) - 1) < 0.05
    rgb = models.adapt_input(weight, fresh, "rgb")
    others = [b for b in range(13) if b not in (1, 2, 3)]
    assert torch.allclose(F.conv2d(x, rgb), F.conv2d(x[:, [3, 2, 1]], weight)
                          + F.conv2d(x[:, others], fresh[:, others]), atol=1e-4)
    assert models.adapt_input(weight, fresh, "random") is fresh
    with pytest.raises(ValueError, match="adapt=rgb does not lead from 3 to 2 channels"):
        models.adapt_input(weight, fresh[:, :2], "rgb")
    far = models.adapt_input(weight, fresh, "rgb", [6, 4, 2])           # another sensor's red, green, blue
    assert torch.equal(far[:, [6, 4, 2]], weight) and torch.equal(far[:, :2], fresh[:, :2])
    with pytest.raises(ValueError, match="adapt=rgb does not lead from 3 to"):
        models.adapt_input(weight, fresh, "rgb", [0, 1, 0])                                # radar
    with pytest.raises(ValueError, match="adapt=inflate does not lead"):
        models.adapt_input(weight, fresh, "inflate")


# ------------------------------------------------------------------------------------ hostile files


def nested(depth):
    d = {}
    for _ in range(depth):
        d = {"a": d, "b": d}
    return d


@pytest.mark.parametrize("make, message", [
    ("deflated", "not a PyTorch checkpoint"), ("posing", "not a PyTorch checkpoint"),
    ("meta", "not a PyTorch checkpoint"), ("endless", "no ViT or ResNet"),
    ("doubling", "no ViT or ResNet"), ("list", "no ViT or ResNet"), ("number", "no ViT or ResNet"),
    ("html", "not a PyTorch checkpoint"), ("cut", "not a PyTorch checkpoint"), ("dir", "directory"),
])
def test_bombs_and_rubbish_end_in_one_line_that_names_the_file(
        make, message, small, tmp_path, monkeypatch):
    path, state = tmp_path / "x.pth", fill(vit())
    if make == "deflated":                                     # 64 MB of zeros in 64 kB
        torch.save(state, path)
        with zipfile.ZipFile(path) as old:
            files = {i.filename: old.read(i) for i in old.infolist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name, content in files.items():
                new.writestr(name, content if name[-3:] != "pkl" else content + bytes(2 ** 26))
        monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("it was unpacked"))
    elif make == "posing":                                     # 4 TB of positions in 4 bytes
        torch.save(state | {"pos_embed": torch.zeros(1, 1, 1).expand(1, 10 ** 12, 48)}, path)
    elif make == "meta":
        torch.save(state | {"norm.bias": torch.empty(48, device="meta")}, path)
    elif make == "endless":
        loop = {}
        loop["a"] = loop["b"] = loop
        torch.save(loop, path)
    elif make in ("doubling", "list", "number"):
        torch.save({"doubling": nested(60), "list": [state], "number": 3}[make], path)
    elif make == "html":
        path.write_text("<!DOCTYPE html><html><body>Access denied</body></html>" * 100)
    elif make == "cut":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-2000])
    else:
        path.mkdir()
    for call in (lambda: models.build_from(path),
                 lambda: models.load_pretrained(models.build("vit_small", 3), path)):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert str(path) in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------ inspect


def inspect(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["model.py", *map(str, argv)])
    runpy.run_path(str(ROOT / "model.py"), run_name="__main__")


def test_inspect_says_what_a_file_is_and_how_it_loads_in_a_few_lines(
        tmp_path, monkeypatch, capsys):
    state = fill(vit(12, 192, chans=13, patch=16, size=64, mask=False, registers=2))
    extra = heads("head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias", "queue")
    torch.save({"model": at("module.", state | extra)}, tmp_path / "x")
    inspect(monkeypatch, "inspect", tmp_path / "x")
    out = capsys.readouterr().out
    size = sum(v.numel() for v in state.values()) + 192
    for text in ("DINOv2", "'vit_tiny'", "'in_chans': 13", "'img_size': 64", "'patch_size': 16",
                 "'registers': 2", f"{size:,} parameters", f"{len(state)} loaded",
                 "1 fresh: mask_token", "head.* (4)", "queue.* (1)"):
        assert text in out, text
    assert len(out.splitlines()) <= 8
    (tmp_path / "x").write_text("<html>")
    with pytest.raises(SystemExit, match="model.py: error: .*x: damaged"):
        inspect(monkeypatch, "inspect", tmp_path / "x")
    with pytest.raises(SystemExit, match="usage"):
        inspect(monkeypatch)


@pytest.mark.parametrize("change, message", [
    ({"norm_pre.weight": torch.ones(48)}, "has norm_pre.weight, which the model lacks"),
    ({"patch_embed.norm.weight": torch.ones(48)}, "has patch_embed.norm.weight, which the model"),
    ({"norm.bias": torch.ones(48, dtype=torch.int8)},
     r"norm.bias is \(48,\) torch.int8, the model's is \(48,\) torch.float32"),
    ({"pos_embed": torch.ones(1, 1, 48)}, r"pos_embed is \(1, 1, 48\) torch.float32, the model's"),
    ({"pos_embed": torch.ones(2, 257, 48)}, r"pos_embed is \(2, 257, 48\) torch.float32, the mod"),
    ({"pos_embed": torch.ones(2, 1370, 48)}, r"pos_embed is \(2, 1370, 48\) torch.float32, the mo"),
    ({"pos_embed": torch.ones(1, 257, 24)}, r"pos_embed is \(1, 257, 24\) torch.float32, the mode"),
    ({"patch_embed.proj.weight": torch.ones(48, 3, 14, 7)},
     r"patch_embed.proj.weight is \(48, 3, 14, 7\) torch.float32, the model's is \(48, 3, 14, 14"),
])
def test_what_would_load_wrongly_is_named(small, tmp_path, change, message):
    torch.save(fill(vit()) | change, tmp_path / "x")
    for load in (models.build_from,
                 lambda path: models.load_pretrained(models.build("vit_small", 3), path)):
        with pytest.raises(ValueError, match=f"x: .*{message}"):
            load(tmp_path / "x")


def test_a_mask_token_of_another_shape_and_a_tall_head_do_not_matter(small, tmp_path):
    more = {"mask_token": torch.ones(1, 1, 32), "head.fc1.weight": torch.ones(512, 48)}
    torch.save(fill(vit()) | more, tmp_path / "x")
    report = models.load_pretrained(models.build("vit_small", 3), tmp_path / "x")
    assert report["fresh"] == ["mask_token"] and report["ignored"] == ["head.fc1.weight"]


def test_one_flipped_bit_of_a_weight_is_noticed(tmp_path):
    state = models.export_backbone(models.build("resnet18", 2))
    torch.save(state, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[len(content) // 2] ^= 1                                    # amid some tensor's numbers
    (tmp_path / "a.pt").write_bytes(content)
    assert torch.load(tmp_path / "a.pt", weights_only=True).keys() == state.keys()
    with pytest.raises(ValueError, match="a.pt: damaged"):
        models.read_weights(str(tmp_path / "a.pt"))
