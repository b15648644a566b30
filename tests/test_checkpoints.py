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

SHALLOW = {"vit_small": dict(width=48, depth=2, heads=6),
           "vit_giant2": dict(width=48, depth=3, heads=6),
           "vit_pera_g": dict(width=48, depth=4, heads=6)}


@pytest.fixture
def small(monkeypatch):
    """The same architectures, narrow and shallow, told apart by their depth."""
    for arch, shape in SHALLOW.items():
        monkeypatch.setitem(models.VITS, arch, shape)
    for arch, bottleneck in (("resnet50", True), ("resnet18", False)):
        shape = dict(depths=(1, 1, 1, 1), bottleneck=bottleneck)
        monkeypatch.setitem(models.RESNETS, arch, shape)


@pytest.fixture
def undrawn(monkeypatch):
    """New networks have any numbers, for tests that look at names only: drawing takes long."""
    for name in ("kaiming_uniform_", "kaiming_normal_", "trunc_normal_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor)


# ------------------------------------------------------------------------------ key and shape lists


def vit(depth=2, D=48, chans=3, patch=14, size=518, ls=True, mask=True, registers=0, swiglu=False):
    """Keys and shapes of DINOv2's ViT."""
    shapes = {"cls_token": (1, 1, D), "pos_embed": (1, 1 + (size // patch) ** 2, D),
              "patch_embed.proj.weight": (D, chans, patch, patch), "patch_embed.proj.bias": (D,),
              "norm.weight": (D,), "norm.bias": (D,)}
    if mask:
        shapes["mask_token"] = (1, D)
    if registers:
        shapes["register_tokens"] = (1, registers, D)
    block = {"norm1.weight": (D,), "norm1.bias": (D,), "norm2.weight": (D,), "norm2.bias": (D,),
             "attn.qkv.weight": (3 * D, D), "attn.qkv.bias": (3 * D,),
             "attn.proj.weight": (D, D), "attn.proj.bias": (D,)}
    if swiglu:
        wide = (int(4 * D * 2 / 3) + 7) // 8 * 8
        block |= {"mlp.w12.weight": (2 * wide, D), "mlp.w12.bias": (2 * wide,),
                  "mlp.w3.weight": (D, wide), "mlp.w3.bias": (D,)}
    else:
        block |= {"mlp.fc1.weight": (4 * D, D), "mlp.fc1.bias": (4 * D,),
                  "mlp.fc2.weight": (D, 4 * D), "mlp.fc2.bias": (D,)}
    if ls:
        block |= {"ls1.gamma": (D,), "ls2.gamma": (D,)}
    for i in range(depth):
        shapes |= {f"blocks.{i}.{key}": shape for key, shape in block.items()}
    return shapes


def resnet(chans=3, depths=(1, 1, 1, 1), bottleneck=True):
    """Keys and shapes of torchvision's ResNet without fc."""
    shapes = {}

    def conv(name, c_in, c_out, kernel):
        shapes[f"{name}.weight"] = (c_out, c_in, kernel, kernel)

    def bn(name, c):
        for key in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{key}"] = (c,)
        shapes[f"{name}.num_batches_tracked"] = ()

    conv("conv1", chans, 64, 7)
    bn("bn1", 64)
    c_in = 64
    for i, depth in enumerate(depths):
        c = 64 * 2 ** i
        c_out = 4 * c if bottleneck else c
        for j in range(depth):
            name = f"layer{i + 1}.{j}"
            if bottleneck:
                convs = [(c_in, c, 1), (c, c, 3), (c, c_out, 1)]
            else:
                convs = [(c_in, c, 3), (c, c, 3)]
            for n, (before, after, kernel) in enumerate(convs, 1):
                conv(f"{name}.conv{n}", before, after, kernel)
                bn(f"{name}.bn{n}", after)
            if j == 0 and (i > 0 or bottleneck):
                conv(f"{name}.downsample.0", c_in, c_out, 1)
                bn(f"{name}.downsample.1", c_out)
            c_in = c_out
    return shapes


@functools.lru_cache
def random_tensors(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in shapes:
        if shape == ():
            tensors[key] = torch.tensor(7)                              # batch norm's counter
        else:
            tensors[key] = torch.rand(shape, generator=generator) * 0.1
    return tensors


def fill(shapes, seed=0):
    """Random tensors of these shapes, {key: tensor}."""
    return dict(random_tensors(tuple(shapes.items()), seed))


def hollow(shapes, seed=0):
    """The same of zeros, of which a file holds one for each tensor: fast to write and to read."""
    tensors = {}
    for key, shape in shapes.items():
        kind = torch.int64 if shape == () else torch.float32            # batch norm's counter
        tensors[key] = torch.zeros((), dtype=kind).expand(shape)
    return tensors


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
    chunked = {}
    for key, tensor in state.items():
        if key.startswith("blocks."):
            block = int(key.split(".")[1])
            key = key.replace("blocks.", f"blocks.{block // 2}.", 1)
        chunked[key] = tensor
    return chunked


def timm(state):
    """timm's naming; with registers cls_token holds its position and the table has no CLS row."""
    state = {key.replace("w12", "fc1").replace("w3", "fc2"): x for key, x in state.items()}
    state.pop("mask_token", None)
    if "register_tokens" not in state:
        return state
    state["reg_token"] = state.pop("register_tokens")
    if "pos_embed" in state and state["pos_embed"].dim() == 3:
        first, rest = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
        state["pos_embed"] = rest
        if "cls_token" in state and state["cls_token"].dim() == 3:
            state["cls_token"] = state["cls_token"] + first
    return state


def at(prefix, state):
    return {prefix + key: tensor for key, tensor in state.items()}


def heads(*names):
    """Tensors that are no part of a backbone."""
    return {name: torch.ones(2, 2) for name in names}


ADAM = {"state": {0: {"step": torch.tensor(1.), "exp_avg": torch.ones(3)}},
        "param_groups": [{"lr": 0.1}]}

# Each takes the backbone that the authors evaluate and, where there are two, the other copy, and
# returns what they gave to torch.save.


def flat(state, other):
    return state


def torchvision_file(state, other):
    return state | heads("fc.weight", "fc.bias")


def backbone_only(state, other):
    return {"state_dict": state}


def dino_training(state, other):
    return {"student": at("module.backbone.", other) | heads("module.head.mlp.0.weight"),
            "teacher": at("backbone.", state) | heads("head.mlp.0.weight"),
            "optimizer": ADAM, "epoch": 3, "args": argparse.Namespace(arch="vit_small", lr=1e-3),
            "dino_loss": heads("center")}


def moco_v2(state, other):
    query = state | heads("fc.0.weight", "fc.2.weight")
    return {"epoch": 99, "arch": "resnet50", "optimizer": ADAM,
            "state_dict": at("module.encoder_k.", other) | at("module.encoder_q.", query)
            | heads("module.queue", "module.queue_ptr")}


def moco_v3(state, other):
    base = state | heads("head.0.weight", "head.1.weight", "head.1.bias", "head.3.weight")
    return {"epoch": 99, "optimizer": ADAM, "scaler": {"scale": 1.0},
            "state_dict": at("module.momentum_encoder.", other) | at("module.base_encoder.", base)
            | heads("module.predictor.0.weight")}


def decur(state, other):
    return {"model": at("module.backbone_1.", other) | at("module.backbone_2.", state)
            | heads("module.projector1.0.weight")}


def pera_training(state, other):
    return {"model": {"s_mask_token": torch.ones(1, 1, 48)} | at("student.backbone.", other)
            | at("teacher.backbone.", state) | heads("teacher.cls_head.last_layer.weight_v",
                                                     "student.pred_head.mlp0.mlp.0.weight"),
            "optimizer": ADAM, "scaler": {}, "best_loss": 0.5, "epoch": 42}


def pera_distilled(state, other):
    return {"model": at("student.backbone.", state)}


def our_last(state, other):
    return {"student": at("backbone.", other) | heads("projector.0.weight", "predictor.0.weight"),
            "teacher": at("backbone.", state) | heads("projector.0.weight"),
            "optimiser": ADAM, "step": 9, "flags": {"arch": "vit_small", "seed": 0}}


BARE = dict(ls=False, mask=False, patch=16)                      # a ViT as timm and MoCo v3 have it
PERA_G = dict(depth=4, ls=False, mask=False, patch=16, size=448)


def family(shapes, nest, arch, called, naming=dict):
    """shapes: {key: shape}; nest, naming: as in the file; called: what inspect calls the family."""
    return dict(shapes=shapes, naming=naming, nest=nest, arch=arch, called=called)


FAMILIES = {
    "DINOv2": family(vit(), flat, "vit_small", "DINOv2"),
    "DINOv2 g": family(vit(3, swiglu=True), flat, "vit_giant2", "DINOv2"),
    "DINOv2 reg4": family(vit(registers=4), flat, "vit_small", "DINOv2"),
    "DINOv2 chunks": family(vit(3, swiglu=True, registers=4), flat, "vit_giant2", "DINOv2", chunks),
    "timm": family(vit(mask=False), flat, "vit_small", "DINOv2", timm),
    "timm g": family(vit(3, mask=False, swiglu=True), flat, "vit_giant2", "DINOv2", timm),
    "timm g reg4": family(vit(3, mask=False, swiglu=True, registers=4), flat, "vit_giant2",
                          "DINOv2", timm),
    "DINO RN50": family(resnet(), flat, "resnet50", "bare backbone"),
    "DINO RN50 training": family(resnet(), dino_training, "resnet50", "DINO"),
    "DINO ViT training": family(vit(size=224, **BARE), dino_training, "vit_small", "DINO"),
    "torchvision RN18": family(resnet(bottleneck=False), torchvision_file, "resnet18",
                               "torchvision"),
    "torchvision RN50": family(resnet(), torchvision_file, "resnet50", "torchvision"),
    "SoftCon RN50 13": family(resnet(13), flat, "resnet50", "bare backbone"),
    "SoftCon ViT 13": family(vit(chans=13, size=224), flat, "vit_small", "DINOv2"),
    "SoftCon ViT 2": family(vit(chans=2, size=224), flat, "vit_small", "DINOv2"),
    "SoftCon enc": family(vit(chans=2, size=224, mask=False), flat, "vit_small", "DINOv2"),
    "SSL4EO MoCo v2": family(resnet(13), moco_v2, "resnet50", "MoCo v2"),
    "SSL4EO MoCo v3": family(vit(chans=13, size=224, **BARE), moco_v3, "vit_small", "MoCo v3"),
    "SSL4EO backbone": family(resnet(13), backbone_only, "resnet50", "bare backbone"),
    "DeCUR MS": family(resnet(13), decur, "resnet50", "DeCUR"),
    "PerA": family(vit(**PERA_G), pera_training, "vit_pera_g", "PerA"),
    "PerA distilled": family(vit(size=448, **BARE), pera_distilled, "vit_small", "bare backbone"),
    "last.pt": family(vit(chans=2, size=56), our_last, "vit_small", "last.pt"),
}


def write(path, name, change=lambda state: None, tensors=fill):
    """Writes a family's file; returns its backbone and its other copy under upstream keys."""
    shapes, naming, nest = (FAMILIES[name][field] for field in ("shapes", "naming", "nest"))
    state = tensors(shapes)
    other = tensors(shapes, seed=1)
    if nest is decur:
        other["conv1.weight"] = other["conv1.weight"][:, :2]            # radar
    changed = dict(state)
    change(changed)
    torch.save(nest(naming(changed), naming(other)), path)
    return state, other


def channels(shapes):
    """The channels of the input layer."""
    return next(shapes[key][1] for key in models.INPUT_LAYERS if key in shapes)


def count_tensors(node):
    if isinstance(node, torch.Tensor):
        return 1
    if isinstance(node, dict):
        return sum(count_tensors(value) for value in node.values())
    return 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_of_every_family_builds_itself_with_every_tensor_accounted_for(
        name, small, tmp_path, capsys):
    path = tmp_path / "x.bin"
    state, _ = write(path, name)
    wanted = FAMILIES[name]
    chans = channels(wanted["shapes"])
    m = models.build_from(path, chans)
    assert capsys.readouterr().out == ""
    assert m.spec["arch"] == wanted["arch"]
    assert m.in_chans == chans
    m(torch.rand(1, chans, 112, 112))
    target = models.build(**m.spec)
    report = models.load_pretrained(target, path)
    if wanted["naming"] is timm and "register_tokens" in state:
        # CLS and its position come as one vector
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = F.pad(state["pos_embed"][:, 1:], (0, 0, 1, 0))
    assert sorted(report["loaded"]) == sorted(state)
    for key, tensor in state.items():
        assert torch.equal(target.state_dict()[key], tensor), key
        assert torch.equal(m.state_dict()[key], tensor), key
    assert report["resampled"] == report["adapted"] == []
    assert sorted(report["fresh"]) == sorted(set(target.state_dict()) - set(state))
    assert set(report["fresh"]) <= {"mask_token"}
    content = torch.load(path, weights_only=False)
    assert len(report["loaded"]) + len(report["ignored"]) == count_tensors(content)
    assert wanted["called"] in capsys.readouterr().out.splitlines()[0]


VIT_TENSORS = ["cls_token", "pos_embed", "patch_embed.proj.weight", "norm.bias",
               "blocks.1.attn.qkv.weight", "blocks.1.ls2.gamma", "blocks.0.mlp.w12.weight"]
RESNET_TENSORS = ["conv1.weight", "layer1.0.conv1.weight", "layer4.0.bn2.running_var"]


@pytest.mark.parametrize("how", ["missing", "renamed", "mis-shaped"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_missing_renamed_or_mis_shaped_tensor_is_named(name, how, small, undrawn, tmp_path):
    """Missing: each of the tensors above; renamed and mis-shaped: the first that the family has."""
    path = tmp_path / "x"
    shapes = FAMILIES[name]["shapes"]
    keys = [key for key in VIT_TENSORS + RESNET_TENSORS if key in shapes]
    if how != "missing":
        keys = keys[:1]
    for key in keys:

        def change(state):
            tensor = state.pop(key)
            if how == "renamed":
                state[key.replace(key.split(".")[-1], "wieght")] = tensor
            if how == "mis-shaped":
                state[key] = torch.ones(5)

        write(path, name, change, hollow)
        with pytest.raises(ValueError) as error:
            models.build_from(path, channels(shapes))
        assert key in str(error.value)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, word", [("PerA", "student"), ("DINO ViT training", "student"),
                                        ("SSL4EO MoCo v3", "momentum"), ("last.pt", "student")])
def test_the_copy_taken_is_the_published_one_unless_another_is_asked_for(
        name, word, small, tmp_path):
    state, other = write(tmp_path / "x", name)
    published, _ = models.read_weights(tmp_path / "x")
    assert torch.equal(published["norm.bias"], state["norm.bias"])
    weights = models.read_weights(tmp_path / "x", word)
    assert torch.equal(weights[0]["norm.bias"], other["norm.bias"])


def test_weights_that_have_been_read_are_loaded_as_they_are(small, tmp_path):
    _, other = write(tmp_path / "x", "last.pt")
    weights = models.read_weights(tmp_path / "x", "student")
    model = models.build("vit_small", 2, 56)
    models.load_pretrained(model, tmp_path / "x", weights=weights, quiet=True)
    assert torch.equal(model.norm.bias, other["norm.bias"])


def test_of_decurs_two_backbones_the_one_nearest_in_channels_is_taken(small, tmp_path):
    state, other = write(tmp_path / "x", "DeCUR MS")
    for chans, taken, adapted in ((13, state, []), (12, state, ["conv1.weight"]), (2, other, [])):
        m = models.build("resnet50", chans)
        report = models.load_pretrained(m, tmp_path / "x", quiet=True)
        assert torch.equal(m.bn1.weight, taken["bn1.weight"])
        assert report["adapted"] == adapted


def test_a_network_of_no_known_size_is_refused_by_its_size_and_file(small, tmp_path):
    torch.save(fill(resnet(depths=(1, 1, 2, 1))), tmp_path / "x")
    message = r"x: a ResNet with \(1, 1, 2, 1\) blocks is not one of resnet18, resnet50, vit_tiny"
    with pytest.raises(ValueError, match=message):
        models.build_from(tmp_path / "x")
    torch.save(fill(vit(depth=9)), tmp_path / "x")
    with pytest.raises(ValueError, match="x: a ViT 48 wide and 9 deep is not one of .*vit_tiny"):
        models.build_from(tmp_path / "x")
    with pytest.raises(ValueError, match="has blocks.2.norm1.weight, which the model lacks"):
        models.load_pretrained(models.build("vit_small", 3), tmp_path / "x")


def test_a_position_table_that_is_no_square_is_refused(small, tmp_path):
    torch.save(fill(vit()) | {"pos_embed": torch.ones(1, 200, 48)}, tmp_path / "x")
    with pytest.raises(ValueError, match=r"pos_embed is \(1, 200, 48\)"):
        models.load_pretrained(models.build("vit_small", 3), tmp_path / "x")


def test_half_precision_and_files_of_the_old_format_load(small, tmp_path):
    state = {key: tensor.half() for key, tensor in fill(vit()).items()}
    torch.save(state, tmp_path / "x", _use_new_zipfile_serialization=False)
    m = models.build_from(tmp_path / "x")
    assert m.norm.bias.dtype == torch.float32
    assert torch.equal(m.norm.bias, state["norm.bias"].float())


def test_the_file_is_read_once_by_build_from_and_by_pretrain(
        small, tmp_path, toy, labels, monkeypatch):
    state = fill(vit(chans=2, patch=6, size=24, registers=1))
    torch.save(state, tmp_path / "x.pth")
    load = torch.load
    read = []

    def count_and_load(path, *args, **kwargs):
        read.append(path)
        return load(path, *args, **kwargs)

    monkeypatch.setattr(torch, "load", count_and_load)
    models.build_from(tmp_path / "x.pth")
    assert len(read) == 1
    pretrain.main([*SMALL, "--modality", "s1", "--data", toy, "--labels", labels, "--arch",
                   "vit_small", "--max-steps", "1", "--init", str(tmp_path / "x.pth"), "--out",
                   str(tmp_path / "run"), "--device", "cpu"])
    assert len(read) == 2
    backbone = models.build_from(tmp_path / "run/backbone.pt")
    assert backbone.registers == 1
    last = models.build_from(tmp_path / "run/last.pt").state_dict()
    for key, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, last[key]), key


# ------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("arch, args, shapes", [
    ("vit_small", {}, vit(size=224)), ("vit_small", dict(registers=4), vit(size=224, registers=4)),
    ("vit_giant2", dict(registers=4), vit(3, size=224, registers=4, swiglu=True)),
    ("vit_pera_g", {}, vit(4, size=224, ls=False, mask=False)), ("resnet50", {}, resnet()),
    ("resnet18", {}, resnet(bottleneck=False)),
])
def test_exported_keys_and_shapes_are_exactly_upstreams_and_timms(
        arch, args, shapes, small, tmp_path):
    m = models.build(arch, 3, **args).eval()
    m.load_state_dict(fill(shapes))
    state = models.export_backbone(m)
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == shapes
    for_timm = models.export_backbone(m, timm=True)
    wanted = timm(fill(shapes)) if "cls_token" in shapes else fill(shapes)
    assert set(for_timm) == set(wanted)
    for key, tensor in wanted.items():
        assert torch.equal(for_timm[key], tensor), key
    torch.save(for_timm, tmp_path / "x")
    x = torch.rand(1, 3, 224, 224)
    assert torch.allclose(models.build_from(tmp_path / "x")(x), m(x), atol=1e-5)


# ------------------------------------------------------------------------------ forward, re-stated


def cubic(x, a):
    """The bicubic kernel at distance x."""
    x = abs(x)
    if x < 1:
        return (a + 2) * x ** 3 - (a + 3) * x ** 2 + 1
    if x < 2:
        return a * x ** 3 - 5 * a * x ** 2 + 8 * a * x - 4 * a
    return 0.0


def resampling(M, n, antialias):
    """(n, M) weights of bicubic resampling: 4 taps at scale M / (n + .1), or a stretched kernel."""
    R = torch.zeros(n, M, dtype=torch.float64)
    if antialias:
        scale = M / n
        stretch = max(scale, 1.0)
        for i in range(n):
            centre = (i + 0.5) * scale
            low = max(int(centre - 2 * stretch + 0.5), 0)
            high = min(int(centre + 2 * stretch + 0.5), M)
            for j in range(low, high):
                R[i, j] = cubic((j + 0.5 - centre) / stretch, -0.5)
            R[i] /= R[i].sum()
        return R
    scale = M / (n + 0.1)
    for i in range(n):
        centre = (i + 0.5) * scale
        left = math.floor(centre - 0.5)
        for j in range(left - 1, left + 3):
            R[i, min(max(j, 0), M - 1)] += cubic(centre - 0.5 - j, -0.75)
    return R


def vit_tokens(s, x, heads, registers):
    """DINOv2's forward from its state dict, in float64, one head and one patch at a time."""
    s = {key: tensor.double() for key, tensor in s.items()}
    x = x.double()
    D = s["norm.weight"].numel()
    P = s["patch_embed.proj.weight"].shape[-1]
    M = math.isqrt(s["pos_embed"].shape[1] - 1)
    h = x.shape[2] // P
    w = x.shape[3] // P
    depth = 1 + max(int(key.split(".")[1]) for key in s if key.startswith("blocks"))
    grid = s["pos_embed"][0, 1:].reshape(M, M, D)
    if (h, w) != (M, M):
        rows = resampling(M, h, registers > 0)
        columns = resampling(M, w, registers > 0)
        grid = torch.einsum("im,jn,mnd->ijd", rows, columns, grid)

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * s[f"{name}.weight"] + s[f"{name}.bias"]

    def linear(x, name):
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def attention(x, name):
        q, k, v = linear(x, f"{name}.qkv").split(D, 1)
        mixed = []
        for c in torch.arange(D).split(D // heads):
            weights = (q[:, c] @ k[:, c].T / math.sqrt(D // heads)).softmax(1)
            mixed.append(weights @ v[:, c])
        return linear(torch.cat(mixed, 1), f"{name}.proj")

    def mlp(x, name):
        if f"{name}.w3.weight" in s:
            gate, value = linear(x, f"{name}.w12").chunk(2, 1)
            return linear(gate * gate.sigmoid() * value, f"{name}.w3")
        x = linear(x, f"{name}.fc1")
        return linear(x * (1 + torch.erf(x / math.sqrt(2))) / 2, f"{name}.fc2")

    def tokens(image):
        y = [s["cls_token"][0, 0] + s["pos_embed"][0, 0]]
        for i in range(registers):
            y.append(s["register_tokens"][0, i])
        for i in range(h):
            for j in range(w):
                patch = image[:, i * P:(i + 1) * P, j * P:(j + 1) * P].flatten()
                z = s["patch_embed.proj.weight"].flatten(1) @ patch + s["patch_embed.proj.bias"]
                y.append(z + grid[i, j])
        y = torch.stack(y)
        for i in range(depth):
            name = f"blocks.{i}"
            y = y + attention(norm(y, f"{name}.norm1"), f"{name}.attn") * s.get(
                f"{name}.ls1.gamma", 1)
            y = y + mlp(norm(y, f"{name}.norm2"), f"{name}.mlp") * s.get(f"{name}.ls2.gamma", 1)
        return norm(y, "norm")

    return torch.stack([tokens(image) for image in x]).float()


@pytest.mark.parametrize("arch, args", [
    ("vit_small", {}), ("vit_small", dict(registers=4)), ("vit_small", dict(layerscale=False)),
    ("vit_giant2", {}), ("vit_giant2", dict(registers=4))])
@pytest.mark.parametrize("size", [(224, 224), (98, 154), (518, 518)])
def test_a_vit_computes_what_dinov2s_definition_says_at_every_size(arch, args, size, small):
    """Pre-norm block, LayerScale, SwiGLU, order of registers, positions in both modes."""
    m = models.build(arch, 2, 518, **args).eval()
    registers = args.get("registers", 0)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, tensor in m.state_dict().items():
        state[key] = torch.randn(tensor.shape, generator=generator) * 0.2
    m.load_state_dict(state)
    x = torch.rand(1, 2, *size, generator=generator)
    with torch.no_grad():
        ours = m.tokens(x)
        stated = vit_tokens(state, x, SHALLOW[arch]["heads"], registers)
    assert ours.shape[1] == 1 + registers + size[0] * size[1] // 196
    assert torch.allclose(ours, stated, atol=1e-5, rtol=1e-5), (ours - stated).abs().max()


def resnet_features(s, x, bottleneck, stride_at):
    """torchvision's forward in eval() from its state dict; the stride at the stride_at-th conv."""
    def conv_bn(x, conv, bn, stride=1):
        weight = s[f"{conv}.weight"]
        x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2)
        mean, var, scale, shift = (s[f"{bn}.{key}"][:, None, None] for key in (
            "running_mean", "running_var", "weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    x = F.max_pool2d(conv_bn(x, "conv1", "bn1", 2).clamp(min=0), 3, 2, 1)
    convs = 3 if bottleneck else 2
    for i in range(1, 5):
        block = f"layer{i}.0"
        y = x
        for c in range(1, convs + 1):
            stride = 2 if i > 1 and c == stride_at else 1
            y = conv_bn(y, f"{block}.conv{c}", f"{block}.bn{c}", stride)
            if c < convs:
                y = y.clamp(min=0)
        if f"{block}.downsample.0.weight" in s:
            stride = 2 if i > 1 else 1
            x = conv_bn(x, f"{block}.downsample.0", f"{block}.downsample.1", stride)
        x = (x + y).clamp(min=0)
    return x.mean((2, 3))


@pytest.mark.parametrize("arch, stride_at", [("resnet50", 2), ("resnet18", 1)])
def test_a_resnet_computes_torchvisions_definition_with_the_stride_on_the_3x3(
        arch, stride_at, small):
    m = models.build(arch, 2).eval()
    generator = torch.Generator().manual_seed(0)
    state = m.state_dict()
    for name, tensor in state.items():
        if "bn" in name or "downsample.1" in name:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    x = torch.rand(2, 2, 64, 64, generator=generator)
    with torch.no_grad():
        ours = m(x)
        stated = resnet_features(state, x, arch == "resnet50", stride_at)
        elsewhere = resnet_features(state, x, arch == "resnet50", 3 - stride_at)
    assert torch.allclose(ours, stated, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, elsewhere, atol=1e-2)


# -------------------------------------------------------------------------------- the input layer


@pytest.mark.parametrize("adapt", ["random", "mean", "rgb"])
@pytest.mark.parametrize("arch, shapes", [("resnet18", resnet(13, bottleneck=False)),
                                          ("vit_small", vit(chans=13, size=224))])
def test_12_and_13_bands_cross_by_name_whatever_adapt_says(adapt, arch, shapes, small, tmp_path):
    """13 to 12 gives the file's output at B10 = 0, 12 to 13 its output whatever B10 is."""
    def first_layer(model):
        return model.conv1 if arch == "resnet18" else model.patch_embed["proj"]

    x = torch.rand(2, 13, 64, 64)
    at_zero = x.clone()
    at_zero[:, 10] = 0
    without = torch.cat([x[:, :10], x[:, 11:]], 1)
    torch.save(fill(shapes), tmp_path / "13")
    thirteen = models.build_from(tmp_path / "13")
    twelve = models.build(arch, 12)
    report = models.load_pretrained(twelve, tmp_path / "13", adapt, quiet=True)
    assert len(report["adapted"]) == 1
    assert torch.allclose(first_layer(twelve)(without), first_layer(thirteen)(at_zero), atol=1e-4)
    torch.save(models.export_backbone(twelve), tmp_path / "12")
    models.load_pretrained(thirteen, tmp_path / "12", adapt, quiet=True)
    assert torch.allclose(first_layer(thirteen)(x), first_layer(twelve)(without), atol=1e-4)
    assert first_layer(thirteen).weight[:, 10].eq(0).all()


@pytest.fixture
def layers():
    """The file's first layer for 3 channels, a fresh one for 13, and a generator."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 3, 7, 7, generator=generator) * 0.3
    fresh = torch.randn(64, 13, 7, 7, generator=generator) * 0.02
    return weight, fresh, generator


@pytest.mark.parametrize("C", [2, 12, 13])
def test_mean_keeps_the_first_output_for_bands_that_agree(C, layers):
    weight, fresh, generator = layers
    grey = torch.rand(4, 1, 32, 32, generator=generator)
    mean = models.adapt_input(weight, fresh[:, :C], "mean")
    ours = F.conv2d(grey.expand(-1, C, -1, -1), mean)
    assert torch.allclose(ours, F.conv2d(grey.expand(-1, 3, -1, -1), weight), atol=1e-4)


def test_mean_shrinks_the_first_output_for_bands_that_do_not_agree(layers):
    weight, fresh, generator = layers
    noise = torch.rand(4, 13, 32, 32, generator=generator) - 0.5
    ours = F.conv2d(noise, models.adapt_input(weight, fresh, "mean")).std()
    file = F.conv2d(noise[:, :3], weight.mean(1, True).expand(-1, 3, -1, -1)).std()
    assert abs(ours / file / math.sqrt(3 / 13) - 1) < 0.05


def test_rgb_adds_the_fresh_bands_to_the_files_output_and_random_forgets_the_file(layers):
    weight, fresh, generator = layers
    x = torch.rand(4, 13, 32, 32, generator=generator)
    rgb = models.adapt_input(weight, fresh, "rgb")
    others = [b for b in range(13) if b not in (1, 2, 3)]
    stated = F.conv2d(x[:, [3, 2, 1]], weight) + F.conv2d(x[:, others], fresh[:, others])
    assert torch.allclose(F.conv2d(x, rgb), stated, atol=1e-4)
    assert models.adapt_input(weight, fresh, "random") is fresh


def test_auto_is_rgb_where_a_sensor_has_these_bands_and_mean_elsewhere(layers):
    weight, fresh, _ = layers
    for bands, chosen in ((range(13), "rgb"), (range(2), "mean")):
        layer = fresh[:, bands]
        auto = models.adapt_input(weight, layer, "auto")
        assert torch.equal(auto, models.adapt_input(weight, layer, chosen))
    two_channels = weight[:, :2]
    assert torch.equal(models.adapt_input(two_channels, fresh, "auto"),
                       models.adapt_input(two_channels, fresh, "mean"))


def test_rgb_goes_where_a_sensor_has_red_green_and_blue_or_is_refused(layers):
    weight, fresh, _ = layers
    elsewhere = models.adapt_input(weight, fresh, "rgb", [6, 4, 2])
    assert torch.equal(elsewhere[:, [6, 4, 2]], weight)
    assert torch.equal(elsewhere[:, :2], fresh[:, :2])
    with pytest.raises(ValueError, match="adapt=rgb does not lead from 3 to 2 channels"):
        models.adapt_input(weight, fresh[:, :2], "rgb")
    with pytest.raises(ValueError, match="adapt=rgb does not lead from 3 to"):
        models.adapt_input(weight, fresh, "rgb", [0, 1, 0])             # radar has two bands
    with pytest.raises(ValueError, match="adapt=inflate does not lead"):
        models.adapt_input(weight, fresh, "inflate")


# ------------------------------------------------------------------------------------ hostile files


def deflated(path, state):
    """A compressed file: 64 MB of zeros in 64 kB."""
    torch.save(state, path)
    with zipfile.ZipFile(path) as old:
        files = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in files.items():
            if name.endswith("pkl"):
                content += bytes(2 ** 26)
            new.writestr(name, content)


def expanded(path, state):
    """4 TB of positions in 4 bytes."""
    torch.save(state | {"pos_embed": torch.zeros(1, 1, 1).expand(1, 10 ** 12, 48)}, path)


def without_numbers(path, state):
    torch.save(state | {"norm.bias": torch.empty(48, device="meta")}, path)


def endless(path, state):
    """A dictionary that contains itself, twice."""
    loop = {}
    loop["a"] = loop
    loop["b"] = loop
    torch.save(loop, path)


def doubling(path, state):
    """2 ** 60 dictionaries, most of them the same."""
    nested = {}
    for _ in range(60):
        nested = {"a": nested, "b": nested}
    torch.save(nested, path)


def a_list(path, state):
    torch.save([state], path)


def a_number(path, state):
    torch.save(3, path)


def a_web_page(path, state):
    path.write_text("<!DOCTYPE html><html><body>Access denied</body></html>" * 100)


def cut_off(path, state):
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-2000])


def a_folder(path, state):
    path.mkdir()


@pytest.mark.parametrize("make, message", [
    (deflated, "not a PyTorch checkpoint"), (expanded, "not a PyTorch checkpoint"),
    (without_numbers, "not a PyTorch checkpoint"), (endless, "no ViT or ResNet"),
    (doubling, "no ViT or ResNet"), (a_list, "no ViT or ResNet"), (a_number, "no ViT or ResNet"),
    (a_web_page, "not a PyTorch checkpoint"), (cut_off, "not a PyTorch checkpoint"),
    (a_folder, "directory"),
])
def test_bombs_and_rubbish_end_in_one_line_that_names_the_file(
        make, message, small, undrawn, tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    make(path, fill(vit()))
    if make is deflated:
        monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("it was unpacked"))
    with pytest.raises(ValueError, match=message) as error:
        models.build_from(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        models.load_pretrained(models.build("vit_small", 3), path)


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
    parameters = sum(tensor.numel() for tensor in state.values()) + 192            # mask token
    for text in ("DINOv2", "'vit_tiny'", "'in_chans': 13", "'img_size': 64", "'patch_size': 16",
                 "'registers': 2", f"{parameters:,} parameters", f"{len(state)} loaded",
                 "1 fresh: mask_token", "head.* (4)", "queue.* (1)"):
        assert text in out, text
    assert len(out.splitlines()) <= 8


def test_inspect_ends_what_it_cannot_read_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "x").write_text("<html>")
    with pytest.raises(SystemExit, match="model.py: error: .*x: damaged"):
        inspect(monkeypatch, "inspect", tmp_path / "x")
    with pytest.raises(SystemExit, match="2"):
        inspect(monkeypatch)
    assert capsys.readouterr().err.startswith("usage: model.py")


# ------------------------------------------------------------------------ what would load wrongly


@pytest.mark.parametrize("change, message", [
    ({"norm_pre.weight": torch.ones(48)}, "has norm_pre.weight, which the model lacks"),
    ({"patch_embed.norm.weight": torch.ones(48)}, "has patch_embed.norm.weight, which the model"),
    ({"norm.bias": torch.ones(48, dtype=torch.int8)},
     r"norm.bias is \(48,\) torch.int8, the model's is \(48,\) torch.float32"),
    ({"patch_embed.proj.weight": torch.ones(48, 3, 14, 14, dtype=torch.int8)},
     r"patch_embed.proj.weight is \(48, 3, 14, 14\) torch.int8, the model's"),
    ({"pos_embed": torch.ones(1, 1, 48)}, r"pos_embed is \(1, 1, 48\) torch.float32, the model's"),
    ({"pos_embed": torch.ones(2, 257, 48)}, r"pos_embed is \(2, 257, 48\) torch.float32, the mod"),
    ({"pos_embed": torch.ones(2, 1370, 48)}, r"pos_embed is \(2, 1370, 48\) torch.float32, the mo"),
    ({"pos_embed": torch.ones(1, 257, 24)}, r"pos_embed is \(1, 257, 24\) torch.float32, the mode"),
    ({"patch_embed.proj.weight": torch.ones(48, 3, 14, 7)},
     r"patch_embed.proj.weight is \(48, 3, 14, 7\) torch.float32, the model's is \(48, 3, 14, 14"),
])
def test_what_would_load_wrongly_is_named(small, undrawn, tmp_path, change, message):
    torch.save(fill(vit()) | change, tmp_path / "x")
    with pytest.raises(ValueError, match=f"x: .*{message}"):
        models.build_from(tmp_path / "x")
    with pytest.raises(ValueError, match=f"x: .*{message}"):
        models.load_pretrained(models.build("vit_small", 3), tmp_path / "x")


def test_a_mask_token_of_another_shape_and_a_tall_head_do_not_matter(small, tmp_path):
    decoder = {"mask_token": torch.ones(1, 1, 32), "head.fc1.weight": torch.ones(512, 48)}
    torch.save(fill(vit()) | decoder, tmp_path / "x")
    report = models.load_pretrained(models.build("vit_small", 3), tmp_path / "x")
    assert report["fresh"] == ["mask_token"]
    assert report["ignored"] == ["head.fc1.weight"]


def test_one_flipped_bit_of_a_weight_is_noticed(tmp_path):
    state = models.export_backbone(models.build("resnet18", 2))
    torch.save(state, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[len(content) // 2] ^= 1                                    # amid some tensor's numbers
    (tmp_path / "a.pt").write_bytes(content)
    assert torch.load(tmp_path / "a.pt", weights_only=True).keys() == state.keys()
    with pytest.raises(ValueError, match="a.pt: damaged"):
        models.read_weights(str(tmp_path / "a.pt"))


@pytest.mark.parametrize("arch", ["resnet18", "vit_small"])
def test_folded_weights_make_of_an_image_what_the_file_makes_of_the_normalised_one(
        small, tmp_path, arch):
    """For a ResNet: in the middle of its map, as the image's rim meets zeros that mean black."""
    torch.manual_seed(0)
    network = models.build(arch, 3, 224, 14)
    if arch == "resnet18":
        torch.nn.init.normal_(network.bn1.running_mean)
        torch.nn.init.uniform_(network.bn1.running_var, 0.5, 2)
    torch.save(models.export_backbone(network), tmp_path / "a.pt")
    mean, std = ["0.485", "0.456", "0.406"], ["0.229", "0.224", "0.225"]
    models.main(["fold", str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), "--mean", *mean, "--std",
                 *std])
    folded = models.build_from(tmp_path / "b.pt").double()
    network = network.eval().double()
    x = torch.rand(2, 3, 224, 224, dtype=torch.float64)
    shift = torch.tensor([float(m) for m in mean]).double()[:, None, None]
    scale = torch.tensor([float(s) for s in std]).double()[:, None, None]
    normalised = (x - shift) / scale
    with torch.no_grad():
        if arch == "resnet18":
            ours = folded.bn1(folded.conv1(x))[..., 2:-2, 2:-2]
            theirs = network.bn1(network.conv1(normalised))[..., 2:-2, 2:-2]
        else:
            ours, theirs = folded(x), network(normalised)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("numbers, message", [
    (["--mean", "0", "--std", "1"], "3 channels, but 1 means and 1 deviations"),
    (["--mean", "0", "0", "0", "--std", "1", "1", "0"], "must be above 0")])
def test_means_and_deviations_that_do_not_fit_are_refused_and_nothing_is_written(
        tmp_path, numbers, message):
    torch.save(models.export_backbone(models.build("resnet18", 3)), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        models.main(["fold", str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), *numbers])
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]
