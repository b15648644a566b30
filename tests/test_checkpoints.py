"""Claims about checkpoint files: every family loads, every tensor is accounted for, ours go out.

Files are made here from key and shape lists written out by hand, in each family's own naming and
nesting. The backbones are narrow (48) and shallow, and a ResNet-50 is a ResNet-18 where only the
nesting matters; full-size lists are compared without numbers.
"""
import argparse
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F

import model as models


@pytest.fixture
def small(monkeypatch):
    """The same architectures, narrow and shallow, told apart by their depth."""
    for arch, depth in (("vit_small", 2), ("vit_base", 3), ("vit_pera_g", 4)):
        monkeypatch.setitem(models.VITS, arch, dict(width=48, depth=depth, heads=6))
    for arch, bottleneck in (("resnet50", True), ("resnet18", False)):
        shape = dict(depths=(1, 1, 1, 1), bottleneck=bottleneck)
        monkeypatch.setitem(models.RESNETS, arch, shape)


# ------------------------------------------------------------------------------ key and shape lists


def vit(depth=2, D=48, chans=3, patch=14, size=56, ls=True, mask=True, registers=0):
    """Keys and shapes of DINOv2's ViT."""
    shapes = {"cls_token": (1, 1, D), "pos_embed": (1, 1 + (size // patch) ** 2, D),
              "patch_embed.proj.weight": (D, chans, patch, patch), "patch_embed.proj.bias": (D,),
              "norm.weight": (D,), "norm.bias": (D,)}
    if mask:
        shapes["mask_token"] = (1, D)
    if registers:
        shapes["register_tokens"] = (1, registers, D)
    for i in range(depth):
        block = {"norm1.weight": (D,), "norm1.bias": (D,), "norm2.weight": (D,), "norm2.bias": (D,),
                 "attn.qkv.weight": (3 * D, D), "attn.qkv.bias": (3 * D,),
                 "attn.proj.weight": (D, D), "attn.proj.bias": (D,), "mlp.fc1.weight": (4 * D, D),
                 "mlp.fc1.bias": (4 * D,), "mlp.fc2.weight": (D, 4 * D), "mlp.fc2.bias": (D,)}
        if ls:
            block |= {"ls1.gamma": (D,), "ls2.gamma": (D,)}
        shapes |= {f"blocks.{i}.{key}": shape for key, shape in block.items()}
    return shapes


BARE = dict(ls=False, mask=False, patch=16, size=64)             # a ViT as timm and MoCo v3 have it


def resnet(chans=3, depths=(1, 1, 1, 1), bottleneck=True):
    """Keys and shapes of torchvision's ResNet without fc."""
    shapes = {}

    def conv_bn(conv, bn, c_in, c_out, kernel):
        shapes[f"{conv}.weight"] = (c_out, c_in, kernel, kernel)
        for key in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{bn}.{key}"] = (c_out,)
        shapes[f"{bn}.num_batches_tracked"] = ()

    conv_bn("conv1", "bn1", chans, 64, 7)
    c_in = 64
    for i, depth in enumerate(depths):
        c = 64 * 2 ** i
        c_out = 4 * c if bottleneck else c
        for j in range(depth):
            block = f"layer{i + 1}.{j}"
            convs = [(c_in, c, 3), (c, c, 3)]
            if bottleneck:
                convs = [(c_in, c, 1), (c, c, 3), (c, c_out, 1)]
            for n, (before, after, kernel) in enumerate(convs, 1):
                conv_bn(f"{block}.conv{n}", f"{block}.bn{n}", before, after, kernel)
            if j == 0 and (i > 0 or bottleneck):
                conv_bn(f"{block}.downsample.0", f"{block}.downsample.1", c_in, c_out, 1)
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


@pytest.mark.parametrize("arch, args, shapes, parameters", [
    ("vit_small", dict(img_size=518), vit(12, 384, size=518), 22_056_576),        # DINOv2's files
    ("vit_base", dict(img_size=518, registers=4), vit(12, 768, size=518, registers=4), 86_583_552),
    ("vit_large", dict(img_size=518), vit(24, 1024, size=518), 304_368_640),
    ("vit_base", dict(in_chans=13), vit(12, 768, 13, size=224), 87_230_976),      # SoftCon's
    ("vit_pera_g", dict(img_size=448, patch_size=16),
     vit(40, 1024, 3, 16, 448, ls=False, mask=False), 505_443_328),
    ("resnet50", {}, resnet(3, (3, 4, 6, 3)), 25_557_032 - 2048 * 1000 - 1000),   # less fc
    ("resnet18", {}, resnet(3, (2, 2, 2, 2), False), 11_689_512 - 512 * 1000 - 1000),
])
def test_full_size_models_have_exactly_the_released_files_keys_and_shapes(
        arch, args, shapes, parameters):
    with torch.device("meta"):
        model = models.build(arch, **{"in_chans": 3, **args})
    assert {key: tuple(x.shape) for key, x in model.state_dict().items()} == shapes
    assert sum(p.numel() for p in model.parameters()) == parameters


# ----------------------------------------------------------------------------------------- families


def at(prefix, state):
    return {prefix + key: tensor for key, tensor in state.items()}


def heads(*names):
    """Tensors that are no part of a backbone."""
    return {name: torch.ones(2, 2) for name in names}


ADAM = {"state": {0: {"step": torch.tensor(1.), "exp_avg": torch.ones(3)}},
        "param_groups": [{"lr": 0.1}]}


def chunks(state):
    """DINOv2 trained with block_chunks: blocks.CHUNK.BLOCK.name, blocks counted through."""
    chunked = {}
    for key, tensor in state.items():
        if key.startswith("blocks."):
            key = key.replace("blocks.", f"blocks.{int(key.split('.')[1]) // 2}.", 1)
        chunked[key] = tensor
    return chunked


def timm(state):
    """timm's naming; with registers cls_token holds its position and the table has no CLS row."""
    state = dict(state)
    state.pop("mask_token", None)
    if "register_tokens" in state:
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    return state


# Each takes the backbone that the authors evaluate and another copy, and returns what they gave to
# torch.save.


def flat(state, other):
    return state


def torchvision_file(state, other):
    return state | heads("fc.weight", "fc.bias")


def state_dict_only(state, other):
    return {"state_dict": state}


def mae(state, other):
    return {"model": state | heads("decoder_pos_embed", "decoder_blocks.0.norm1.weight")
            | {"mask_token": torch.ones(1, 1, 32)}}                     # of the decoder's width


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
    radar = other | {"conv1.weight": other["conv1.weight"][:, :2].clone()}
    return {"model": at("module.backbone_1.", radar) | at("module.backbone_2.", state)
            | heads("module.projector1.0.weight")}


def pera_training(state, other):
    return {"model": {"s_mask_token": torch.ones(1, 1, 48)} | at("student.backbone.", other)
            | at("teacher.backbone.", state) | heads("teacher.cls_head.last_layer.weight_v",
                                                     "student.pred_head.mlp0.mlp.0.weight"),
            "optimizer": ADAM, "scaler": {}, "best_loss": 0.5, "epoch": 42}


def our_last(state, other):
    return {"student": at("backbone.", other) | heads("projector.0.weight", "predictor.0.weight"),
            "teacher": at("backbone.", state) | heads("projector.0.weight"),
            "optimiser": ADAM, "step": 9, "flags": {"arch": "vit_small", "seed": 0}}


def timm_training(state, other):
    return {"state_dict": other, "state_dict_ema": state, "optimizer": ADAM, "epoch": 5}


FAMILIES = {
    "DINOv2": ("vit_small", flat, vit()),
    "DINOv2 reg4": ("vit_small", flat, vit(registers=4)),
    "DINOv2 chunks": ("vit_base", lambda state, other: chunks(state), vit(3)),
    "timm": ("vit_small", lambda state, other: timm(state), vit(mask=False)),
    "timm reg4": ("vit_small", lambda state, other: timm(state), vit(registers=4, mask=False)),
    "timm training": ("vit_small", timm_training, vit(**BARE)),
    "MAE": ("vit_small", mae, vit(**BARE)),
    "DINO ViT training": ("vit_small", dino_training, vit(**BARE)),
    "DINO RN50 training": ("resnet18", dino_training, resnet(bottleneck=False)),
    "torchvision RN18": ("resnet18", torchvision_file, resnet(bottleneck=False)),
    "torchvision RN50": ("resnet50", torchvision_file, resnet()),
    "SoftCon RN50": ("resnet50", flat, resnet(13)),
    "SoftCon ViT": ("vit_small", flat, vit(chans=2)),
    "SoftCon ViT enc": ("vit_small", flat, vit(chans=13, mask=False)),
    "SSL4EO MoCo v2": ("resnet18", moco_v2, resnet(13, bottleneck=False)),
    "SSL4EO MoCo v3": ("vit_small", moco_v3, vit(chans=13, **BARE)),
    "SSL4EO backbone": ("resnet18", state_dict_only, resnet(13, bottleneck=False)),
    "DeCUR": ("resnet18", decur, resnet(13, bottleneck=False)),
    "PerA": ("vit_pera_g", pera_training, vit(4, **BARE)),
    "last.pt": ("vit_small", our_last, vit(chans=2)),
}


def count_tensors(node):
    if isinstance(node, torch.Tensor):
        return 1
    if isinstance(node, dict):
        return sum(count_tensors(value) for value in node.values())
    return 0


def write(path, name, change=None):
    """Writes a family's file; returns its backbone and the other copy, under upstream keys."""
    _, nest, shapes = FAMILIES[name]
    state = fill(shapes)
    other = fill(shapes, seed=1)
    changed = dict(state)
    if change:
        change(changed)
    torch.save(nest(changed, other), path)
    return state, other


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_of_every_family_builds_itself_with_every_tensor_accounted_for(
        name, small, tmp_path, capsys):
    path = tmp_path / "x.bin"
    state, _ = write(path, name)
    chans = next(shape[1] for shape in FAMILIES[name][2].values() if len(shape) == 4)
    net = models.build_from(path, chans)
    assert capsys.readouterr().out == ""
    assert (net.spec["arch"], net.in_chans, net.training) == (FAMILIES[name][0], chans, False)
    assert torch.isfinite(net(torch.rand(1, chans, 112, 112))).all()
    copy = models.build(**net.spec)
    report = models.load_pretrained(copy, path)
    if name == "timm reg4":                                  # CLS and its position are one vector
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = F.pad(state["pos_embed"][:, 1:], (0, 0, 1, 0))
    assert sorted(report["loaded"]) == sorted(state)
    for key, tensor in state.items():
        assert torch.equal(copy.state_dict()[key], tensor), key
        assert torch.equal(net.state_dict()[key], tensor), key
    assert report["resampled"] == report["adapted"] == []
    assert set(report["fresh"]) == set(copy.state_dict()) - set(state)
    assert set(report["fresh"]) <= {"mask_token"}
    content = torch.load(path, weights_only=False)
    assert len(report["loaded"]) + len(report["ignored"]) == count_tensors(content)
    assert f"{len(state)} loaded" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["missing", "renamed", "mis-shaped"])
@pytest.mark.parametrize("name, key", [
    ("DINOv2", "pos_embed"), ("DINOv2", "patch_embed.proj.weight"), ("DINOv2", "norm.bias"),
    ("DINOv2", "blocks.1.attn.qkv.weight"), ("DINOv2", "blocks.1.ls2.gamma"),
    ("SSL4EO backbone", "conv1.weight"), ("SSL4EO backbone", "layer1.0.conv1.weight"),
    ("SSL4EO backbone", "bn1.bias"), ("torchvision RN18", "layer4.0.bn2.running_var")])
def test_a_missing_renamed_or_mis_shaped_tensor_is_named(name, key, how, small, tmp_path):

    def change(state):
        tensor = state.pop(key)
        if how == "renamed":
            state[key + "_"] = tensor
        if how == "mis-shaped":
            state[key] = torch.ones(5)

    write(tmp_path / "x", name, change)
    with pytest.raises(models.CheckpointError) as error:
        models.build_from(tmp_path / "x", 13)
    assert key in str(error.value)
    assert f"{tmp_path}/x: " in str(error.value)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------- which of several backbones


def test_the_averaged_or_published_copy_is_taken_and_the_report_names_both(small, tmp_path):
    shapes = vit(chans=2)
    state = fill(shapes)
    other = fill(shapes, seed=1)
    for taken, left in (("teacher", "student"), ("model_ema", "model"), ("ema", "net"),
                        ("state_dict_ema", "state_dict"), ("module.encoder_q", "module.encoder_k"),
                        ("module.base_encoder", "module.momentum_encoder"), ("ema", "teacher"),
                        ("teacher", "schema")):
        torch.save(at(f"{left}.", other) | at(f"{taken}.", state), tmp_path / "x")
        model = models.build("vit_small", 2, 56)
        report = models.load_pretrained(model, tmp_path / "x", quiet=True)
        assert torch.equal(model.norm.bias, state["norm.bias"]), taken
        assert report["notes"] == [f"took {taken}.*; the file also has {left}.*"]


def test_of_decurs_two_backbones_the_one_nearest_in_channels_is_taken(small, tmp_path):
    state, other = write(tmp_path / "x", "DeCUR")
    for chans, taken, adapted in ((13, state, []), (12, state, ["conv1.weight"]), (2, other, [])):
        model = models.build("resnet18", chans)
        report = models.load_pretrained(model, tmp_path / "x", quiet=True)
        assert torch.equal(model.bn1.weight, taken["bn1.weight"])
        assert report["adapted"] == adapted


def test_weights_that_have_been_read_are_not_read_again(small, tmp_path):
    torch.save(fill(vit(registers=4)), tmp_path / "x")
    weights = models.read_weights(tmp_path / "x")
    assert (weights.registers, weights.layerscale) == (4, True)
    model = models.build("vit_small", 3, 56, registers=4)
    models.load_pretrained(model, "no such file", weights=weights, quiet=True)
    assert torch.equal(model.norm.bias, weights.tensors["norm.bias"])


# ------------------------------------------------------------------- what changes while loading


@pytest.mark.parametrize("registers", [0, 4])
def test_positions_are_resampled_to_the_models_size(registers, small, tmp_path):
    torch.save(fill(vit(size=518, registers=registers)), tmp_path / "x")
    whole = models.build_from(tmp_path / "x")
    model = models.build("vit_small", 3, registers=registers).eval()
    report = models.load_pretrained(model, tmp_path / "x")
    assert report["resampled"] == ["pos_embed"]
    x = torch.rand(1, 3, 224, 224)
    assert torch.allclose(model(x), whole(x), atol=1e-6)


def test_a_vit_without_layerscale_loads_with_factors_of_one(small, tmp_path):
    torch.save(fill(vit(ls=False)), tmp_path / "x")
    model = models.build("vit_small", 3, 56)
    report = models.load_pretrained(model, tmp_path / "x")
    assert len(report["fresh"]) == 4
    assert (model.blocks[1].ls1.gamma == 1).all()


def test_half_precision_and_files_of_the_old_format_load(small, tmp_path):
    state = {key: tensor.half() for key, tensor in fill(vit()).items()}
    torch.save(state, tmp_path / "x", _use_new_zipfile_serialization=False)
    net = models.build_from(tmp_path / "x")
    assert torch.equal(net.norm.bias, state["norm.bias"].float())


@pytest.mark.parametrize("adapt", ["random", "rgb"])
@pytest.mark.parametrize("arch, shapes", [("resnet18", resnet(13, bottleneck=False)),
                                          ("vit_small", vit(chans=13))])
def test_12_and_13_bands_cross_by_name_whatever_adapt_says(adapt, arch, shapes, small, tmp_path):
    """13 to 12 gives the file's output at B10 = 0, 12 to 13 its output whatever B10 is."""
    key = models.input_layer(shapes)
    state = fill(shapes)
    torch.save(state, tmp_path / "13")
    twelve = models.build(arch, 12, 56)
    report = models.load_pretrained(twelve, tmp_path / "13", adapt, (3, 2, 1), quiet=True)
    assert report["adapted"] == [key]
    kept = [band for band in range(13) if band != 10]
    assert torch.equal(twelve.state_dict()[key], state[key][:, kept])
    torch.save(models.export_backbone(twelve), tmp_path / "12")
    thirteen = models.build(arch, 13, 56)
    models.load_pretrained(thirteen, tmp_path / "12", adapt, (3, 2, 1), quiet=True)
    assert torch.equal(thirteen.state_dict()[key][:, kept], state[key][:, kept])
    assert not thirteen.state_dict()[key][:, 10].any()


def test_random_keeps_the_fresh_layer_mean_the_output_for_grey_and_rgb_the_named_bands():
    weight = torch.randn(8, 3, 7, 7)
    fresh = torch.randn(8, 13, 7, 7)
    assert models.adapt_input(weight, fresh, "random") is fresh
    grey = torch.rand(1, 1, 7, 7)
    mean = models.adapt_input(weight, fresh, "mean")
    assert torch.allclose(F.conv2d(grey.expand(1, 13, 7, 7), mean),
                          F.conv2d(grey.expand(1, 3, 7, 7), weight), atol=1e-4)
    rgb = models.adapt_input(weight, fresh, "rgb", [6, 4, 2])
    assert torch.equal(rgb[:, [6, 4, 2]], weight)
    untouched = [band for band in range(13) if band not in (6, 4, 2)]
    assert torch.equal(rgb[:, untouched], fresh[:, untouched])


@pytest.mark.parametrize("chans, red_green_blue, chosen", [
    (3, (3, 2, 1), "rgb"), (3, (), "mean"), (2, (3, 2, 1), "mean")])
def test_auto_is_rgb_where_file_and_sensor_have_red_green_and_blue_and_mean_elsewhere(
        chans, red_green_blue, chosen, small, tmp_path):
    state = fill(vit(chans=chans))
    torch.save(state, tmp_path / "x")
    model = models.build("vit_small", 13, 56)
    fresh = model.patch_embed["proj"].weight.clone()
    models.load_pretrained(model, tmp_path / "x", "auto", red_green_blue, quiet=True)
    wanted = models.adapt_input(state["patch_embed.proj.weight"], fresh, chosen, (3, 2, 1))
    assert torch.equal(model.patch_embed["proj"].weight, wanted)


@pytest.mark.parametrize("arch, norm, mean, std", [
    ("resnet18", "imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ("vit_small", "imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ("vit_small", "half", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])
def test_with_norm_a_network_makes_of_an_image_what_the_file_makes_of_the_normalised_one(
        arch, norm, mean, std, small, tmp_path):
    """For a ResNet: in the middle of its map, as the image's rim meets zeros that mean black."""
    torch.save(fill(resnet(bottleneck=False) if arch == "resnet18" else vit()), tmp_path / "x")
    as_in_file = models.build_from(tmp_path / "x").double()
    folded = models.build(arch, 3, 56)
    report = models.load_pretrained(folded, tmp_path / "x", norm=norm, quiet=True)
    assert report["notes"] == []
    folded.eval().double()
    x = torch.rand(2, 3, 56, 56, dtype=torch.float64)
    mean = torch.tensor(mean, dtype=torch.float64)[:, None, None]
    std = torch.tensor(std, dtype=torch.float64)[:, None, None]
    with torch.no_grad():
        if arch == "resnet18":
            one = folded.bn1(folded.conv1(x))[..., 2:-2, 2:-2]
            two = as_in_file.bn1(as_in_file.conv1((x - mean) / std))[..., 2:-2, 2:-2]
        else:
            one = folded(x)
            two = as_in_file((x - mean) / std)
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    for_13_bands = models.build(arch, 13, 56)
    models.load_pretrained(for_13_bands, tmp_path / "x", "rgb", (3, 2, 1), norm, quiet=True)
    key = models.input_layer(folded.state_dict())
    adapted = for_13_bands.state_dict()[key][:, [3, 2, 1]]
    assert torch.equal(adapted, folded.float().state_dict()[key])


@pytest.mark.parametrize("chans, adapt, told", [(3, "random", True), (13, "rgb", True),
                                                (13, "auto", True), (13, "mean", False),
                                                (13, "random", False)])
def test_who_keeps_red_green_and_blue_is_told_of_their_normalisation(
        chans, adapt, told, small, tmp_path):
    torch.save(fill(vit()), tmp_path / "x")
    model = models.build("vit_small", chans, 56)
    report = models.load_pretrained(model, tmp_path / "x", adapt, (3, 2, 1))
    assert (len(report["notes"]) == 1) == told
    assert all("(x - mean) / std; --init-norm imagenet|half" in line for line in report["notes"])


# ------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("arch, args, shapes", [
    ("vit_small", {}, vit()), ("vit_small", dict(registers=4), vit(registers=4)),
    ("vit_pera_g", {}, vit(4, ls=False, mask=False)), ("resnet18", {}, resnet(bottleneck=False))])
def test_exported_keys_and_shapes_are_upstreams_and_timms_and_come_back_the_same(
        arch, args, shapes, small, tmp_path):
    model = models.build(arch, 3, 56, **args).eval()
    model.load_state_dict(fill(shapes))
    exported = models.export_backbone(model)
    assert {key: tuple(tensor.shape) for key, tensor in exported.items()} == shapes
    for_timm = models.export_backbone(model, timm=True)
    wanted = timm(fill(shapes)) if "vit" in arch else fill(shapes)
    assert set(for_timm) == set(wanted)
    assert all(torch.equal(for_timm[key], tensor) for key, tensor in wanted.items())
    x = torch.rand(1, 3, 56, 56)
    for state in (exported, for_timm):
        torch.save(state, tmp_path / "x")
        assert torch.allclose(models.build_from(tmp_path / "x")(x), model(x), atol=1e-5)


# ------------------------------------------------------------------------------------- odd files


class Bomb:
    def __reduce__(self):
        return print, ("code has run",)


def endless():
    """A dictionary that contains itself, twice."""
    loop = {}
    loop["a"] = loop
    loop["b"] = loop
    return loop


def doubling():
    """2 ** 60 dictionaries, most of them the same."""
    nested = {}
    for _ in range(60):
        nested = {"a": nested, "b": nested}
    return nested


def file_with(**changes):
    return fill(vit()) | {key.replace("__", "."): tensor for key, tensor in changes.items()}


ONE = torch.zeros(1, 1, 1)

# what: (content of the file, None for no file; expected words)
ODD_FILES = {
    "missing": (None, "No such file"),
    "empty": (b"", "not a PyTorch checkpoint"),
    "a web page": (b"<!DOCTYPE html><html>Access denied</html>" * 100, "not a PyTorch checkpoint"),
    "zip": (b"PK" + bytes(60), "not a PyTorch checkpoint"),
    "pickled code": (pickle.dumps(Bomb(), 2), "refused, it wants to run code"),
    "saved code": ({"model": Bomb()}, "refused, it wants to run code"),
    "a list": ([fill(vit())], "no ViT or ResNet"),
    "a number": (3, "no ViT or ResNet"),
    "nothing": ({"a": torch.ones(1)}, "no ViT or ResNet"),
    "endless": (endless(), "no ViT or ResNet"),
    "doubling": (doubling(), "no ViT or ResNet"),
    "4 TB in 4 bytes": (file_with(pos_embed=ONE.expand(1, 10 ** 12, 48)),
                        "the numbers of pos_embed are not in the file"),
    "without numbers": (file_with(norm__bias=torch.empty(48, device="meta")),
                        "the numbers of norm.bias are not"),
    "sparse": (file_with(norm__bias=torch.ones(48).to_sparse()), "the numbers of norm.bias are"),
    "other depth": (fill(vit(depth=9)), "none of resnet18, .* has {'width': 48, 'depth': 9}"),
    "other ResNet": (fill(resnet(depths=(1, 2, 1, 1), bottleneck=False)), "of resnet18, .*depths"),
    "norm before": (file_with(norm_pre__weight=torch.ones(48)),
                    "has norm_pre.weight, which the model lacks"),
    "integers": (file_with(norm__bias=torch.ones(48, dtype=torch.int8)),
                 r"norm.bias is \(48,\) torch.int8, the model's is \(48,\) torch.float32"),
    "no positions": (file_with(pos_embed=torch.ones(1, 1, 48)), r"pos_embed is \(1, 1, 48\)"),
    "no square": (file_with(pos_embed=torch.ones(1, 200, 48)), r"pos_embed is \(1, 200, 48\)"),
    "two tables": (file_with(pos_embed=torch.ones(2, 17, 48)), r"pos_embed is \(2, 17, 48\)"),
    "narrow table": (file_with(pos_embed=torch.ones(1, 17, 24)), r"pos_embed is \(1, 17, 24\)"),
    "oblong patches": (file_with(patch_embed__proj__weight=torch.ones(48, 3, 14, 7)),
                       r"patch_embed.proj.weight is \(48, 3, 14, 7\)"),
}


@pytest.mark.parametrize("content, words", ODD_FILES.values(), ids=ODD_FILES)
def test_odd_and_hostile_files_end_in_one_line_and_run_no_code(
        content, words, small, tmp_path, capsys):
    path = tmp_path / "x.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(models.CheckpointError, match=words) as error:
        models.build_from(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert "code has run" not in capsys.readouterr().out


@pytest.mark.parametrize("old_format", [False, True])
def test_a_file_cut_off_anywhere_is_refused_by_its_name(old_format, tmp_path):
    torch.save(fill(vit(1)), tmp_path / "whole", _use_new_zipfile_serialization=not old_format)
    content = (tmp_path / "whole").read_bytes()
    for length in [*range(1, 1500, 23), *range(1500, len(content), 20011), len(content) - 3]:
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(models.CheckpointError, match="cut: "):
            models.read_weights(tmp_path / "cut")


@pytest.mark.parametrize("arch, args, other, message", [
    ("vit_small", {}, vit(3), "holds a vit_base, take --arch vit_base; the model is a vit_small"),
    ("vit_small", {}, resnet(bottleneck=False), "holds a resnet18, take --arch resnet18"),
    ("resnet18", {}, resnet(), "holds a resnet50, take --arch resnet50"),
    ("vit_small", dict(adapt="rgb"), vit(), "adapt=rgb does not lead from 3 to 13 channels"),
    ("vit_small", dict(adapt="rgb", red_green_blue=(2, 1, 0)), vit(chans=2), "from 2 to 13 chan"),
    ("vit_small", dict(norm="half"), vit(chans=13), "has 13 channels, the normalisation half is"),
])
def test_a_file_that_does_not_lead_to_the_model_says_why(arch, args, other, message, small,
                                                         tmp_path):
    torch.save(fill(other), tmp_path / "x")
    with pytest.raises(models.CheckpointError, match=f"x: .*{message}"):
        models.load_pretrained(models.build(arch, 13, 56), tmp_path / "x", **args)


# ------------------------------------------------------------------------------------------ inspect


def test_inspect_says_what_a_file_is_and_how_it_loads_in_a_few_lines(tmp_path, capsys):
    state = fill(vit(12, 192, chans=13, patch=16, size=64, mask=False, registers=2))
    extra = heads("head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias", "queue")
    torch.save(at("teacher.", state | extra) | at("student.", state), tmp_path / "x")
    models.main(["inspect", str(tmp_path / "x")])
    out = capsys.readouterr().out
    parameters = sum(tensor.numel() for tensor in state.values()) + 192            # mask token
    for text in ("'vit_tiny'", "'in_chans': 13", "'img_size': 64", "'patch_size': 16",
                 "'registers': 2", f"{parameters:,} parameters", f"{len(state)} loaded",
                 "1 fresh: mask_token", f"student.* ({len(state)})", "head.* (4)", "queue.* (1)",
                 "took teacher.*; the file also has student.*"):
        assert text in out, text
    assert len(out.splitlines()) <= 8
