"""Claims about checkpoint files: every family loads, every tensor is accounted for, ours go out.

Files are made here from key and shape lists that are stated again, in each family's own naming and
nesting. The backbones are narrow and shallow, and a ResNet-50 is a ResNet-18 where only the nesting
matters; full-size lists are compared without numbers.
"""
import argparse
import pickle
import re

import pytest
import torch
import torch.nn.functional as F

import model as models


@pytest.fixture
def small(monkeypatch):
    """The same architectures, narrow and shallow, told apart by their depth."""
    for arch, depth in (("vit_small", 2), ("vit_base", 3), ("vit_pera_g", 4)):
        monkeypatch.setitem(models.VITS, arch, dict(width=48, depth=depth, heads=6))
    for arch in models.RESNETS:
        monkeypatch.setitem(models.RESNETS[arch], "depths", (1, 1, 1, 1))


# ------------------------------------------------------------------------------ key and shape lists


def vit(depth=2, D=48, chans=3, patch=14, size=56, ls=True, mask=True, registers=0):
    """Keys and shapes of DINOv2's ViT."""
    shapes = {"cls_token": (1, 1, D), "pos_embed": (1, 1 + (size // patch) ** 2, D)}
    if mask:
        shapes["mask_token"] = (1, D)
    if registers:
        shapes["register_tokens"] = (1, registers, D)
    layers = {"patch_embed.proj": (D, chans, patch, patch), "norm": (D,)}
    for i in range(depth):
        layers |= {f"blocks.{i}.norm1": (D,), f"blocks.{i}.norm2": (D,),
                   f"blocks.{i}.attn.qkv": (3 * D, D), f"blocks.{i}.attn.proj": (D, D),
                   f"blocks.{i}.mlp.fc1": (4 * D, D), f"blocks.{i}.mlp.fc2": (D, 4 * D)}
        if ls:
            shapes |= {f"blocks.{i}.ls1.gamma": (D,), f"blocks.{i}.ls2.gamma": (D,)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


BARE = dict(ls=False, mask=False, patch=16, size=64)             # a ViT as timm and MoCo v3 have it


def resnet(chans=3, depths=(1, 1, 1, 1), bottleneck=False):
    """Keys and shapes of torchvision's ResNet without fc."""
    shapes = {}

    def conv_bn(conv, bn, c_in, c_out, kernel):
        shapes[f"{conv}.weight"] = (c_out, c_in, kernel, kernel)
        for key in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{bn}.{key}"] = (c_out,)
        shapes[f"{bn}.num_batches_tracked"] = ()

    conv_bn("conv1", "bn1", chans, 64, 7)
    c_in = 64
    for layer, depth in enumerate(depths, 1):
        c = 32 * 2 ** layer
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        widths = (c, c, 4 * c) if bottleneck else (c, c)
        for j in range(depth):
            block = f"layer{layer}.{j}"
            if j == 0 and (layer > 1 or bottleneck):
                conv_bn(f"{block}.downsample.0", f"{block}.downsample.1", c_in, widths[-1], 1)
            for n in range(len(kernels)):
                conv_bn(f"{block}.conv{n + 1}", f"{block}.bn{n + 1}", c_in, widths[n], kernels[n])
                c_in = widths[n]
    return shapes


def fill(shapes, seed=0):
    """Random tensors of these shapes, {key: tensor}; batch norms have counted 7 batches."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in shapes.items():
        tensors[key] = torch.rand(shape, generator=generator) * 0.1 if shape else torch.tensor(7)
    return tensors


@pytest.mark.parametrize("arch, args, shapes, parameters", [
    ("vit_small", dict(img_size=518), vit(12, 384, size=518), 22_056_576),        # DINOv2's files
    ("vit_base", dict(img_size=518, registers=4), vit(12, 768, size=518, registers=4), 86_583_552),
    ("vit_large", dict(img_size=518), vit(24, 1024, size=518), 304_368_640),
    ("vit_base", dict(in_chans=13), vit(12, 768, 13, size=224), 87_230_976),      # SoftCon's
    ("vit_pera_g", dict(img_size=448, patch_size=16),
     vit(40, 1024, 3, 16, 448, ls=False, mask=False), 505_443_328),
    ("resnet50", {}, resnet(3, (3, 4, 6, 3), True), 25_557_032 - 2048 * 1000 - 1000),   # less fc
    ("resnet18", {}, resnet(3, (2, 2, 2, 2)), 11_689_512 - 512 * 1000 - 1000),
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


def timm(state):
    """timm's naming; with registers cls_token holds its position and the table has no CLS row."""
    state = {key: tensor for key, tensor in state.items() if key != "mask_token"}
    if "register_tokens" in state:
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    return state


def chunks(state):
    """DINOv2 trained with block_chunks: blocks.CHUNK.BLOCK.name, here two blocks a chunk."""
    return {re.sub(r"blocks\.(\d)", lambda block: f"blocks.{int(block[1]) // 2}.{block[1]}", key): x
            for key, x in state.items()}


# name: (architecture, its keys, what stands before them in the file, what stands before those of
# another copy, other keys of the file); a / is a dictionary in a dictionary
FAMILIES = {
    "DINOv2": ("vit_small", vit(), "", None, ""),
    "DINOv2 reg4": ("vit_small", vit(registers=4), "", None, ""),
    "DINOv2 chunks": ("vit_base", vit(3), "", None, ""),
    "timm": ("vit_small", vit(mask=False), "", None, ""),
    "timm reg4": ("vit_small", vit(registers=4, mask=False), "", None, ""),
    "timm training": ("vit_small", vit(**BARE), "state_dict_ema/", "state_dict/", ""),
    "MAE": ("vit_small", vit(**BARE), "model/", None, "model/mask_token model/decoder_pos_embed"),
    "DINO ViT training": ("vit_small", vit(**BARE), "teacher/backbone.", "student/module.backbone.",
                          "teacher/head.mlp.0.weight dino_loss/center"),
    "DINO RN50 training": ("resnet18", resnet(), "teacher/backbone.", "student/module.backbone.",
                           "student/module.head.mlp.0.weight"),
    "torchvision RN18": ("resnet18", resnet(), "", None, "fc.weight fc.bias"),
    "torchvision RN50": ("resnet50", resnet(bottleneck=True), "", None, "fc.weight fc.bias"),
    "SoftCon RN50": ("resnet18", resnet(13), "", None, ""),
    "SoftCon ViT": ("vit_small", vit(chans=2), "", None, ""),
    "SoftCon ViT enc": ("vit_small", vit(chans=13, mask=False), "", None, ""),
    "SSL4EO MoCo v2": ("resnet18", resnet(13), "state_dict/module.encoder_q.",
                       "state_dict/module.encoder_k.", "state_dict/module.encoder_q.fc.0.weight"),
    "SSL4EO MoCo v3": ("vit_small", vit(chans=13, **BARE), "state_dict/module.base_encoder.",
                       "state_dict/module.momentum_encoder.", "state_dict/module.predictor.0.bias"),
    "SSL4EO backbone": ("resnet18", resnet(13), "state_dict/", None, ""),
    "DeCUR": ("resnet18", resnet(13), "model/module.backbone_2.", "model/module.backbone_1.", ""),
    "PerA": ("vit_pera_g", vit(4, **BARE), "model/teacher.backbone.", "model/student.backbone.",
             "model/s_mask_token model/teacher.cls_head.last_layer.weight_v"),
    "last.pt": ("vit_small", vit(chans=2), "teacher/backbone.", "student/backbone.",
                "student/projector.0.weight student/predictor.0.weight"),
}


def family(name):
    """What a family's authors gave to torch.save, its backbone and the other copy."""
    _, shapes, before, before_other, extra = FAMILIES[name]
    state = fill(shapes)
    other = fill(shapes, seed=1)
    in_file = {"DINOv2 chunks": chunks, "timm": timm, "timm reg4": timm}.get(name, dict)(state)
    tensors = at(before, in_file) | {key: torch.ones(1, 1, 32) for key in extra.split()}
    content = {"args": argparse.Namespace(lr=0.1), "epoch": 3}
    if before_other is not None:
        if name == "DeCUR":
            other["conv1.weight"] = other["conv1.weight"][:, :2].clone()             # for radar
        tensors = at(before_other, other) | tensors
        content["optimizer"] = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{}]}
    for key, tensor in tensors.items():
        folder, _, name = key.rpartition("/")
        inside = content.setdefault(folder, {}) if folder else content
        inside[name] = tensor
    return content, state, other


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_of_every_family_builds_itself_with_every_tensor_accounted_for(
        name, small, tmp_path, capsys):
    path = tmp_path / "x.bin"
    arch, shapes, *_ = FAMILIES[name]
    content, state, _ = family(name)
    torch.save(content, path)
    chans = shapes[models.input_layer(shapes)][1]
    net = models.build_from(path, chans)
    assert (net.spec["arch"], net.in_chans, net.training) == (arch, chans, False)
    if name == "timm reg4":                                  # CLS and its position are one vector
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = F.pad(state["pos_embed"][:, 1:], (0, 0, 1, 0))
    found = net.state_dict()
    for key, tensor in state.items():
        assert torch.equal(found[key], tensor), key
    report = models.load_pretrained(net, path)
    assert sorted(report["loaded"]) == sorted(state)
    assert set(report["fresh"]) == set(found) - set(state) <= {"mask_token"}
    assert not report["resampled"] and not report["adapted"]
    in_file = len(models.flatten(content))
    assert len(report["loaded"]) + len(report["ignored"]) == in_file
    assert f"{len(state)} loaded" in capsys.readouterr().out


@pytest.mark.parametrize("shapes, key", [
    (vit(), "pos_embed"), (vit(), "patch_embed.proj.weight"), (vit(), "norm.bias"),
    (vit(), "blocks.1.attn.qkv.weight"), (vit(), "blocks.1.ls2.gamma"),
    (resnet(), "conv1.weight"), (resnet(), "layer1.0.conv1.weight"),
    (resnet(), "bn1.running_mean")])
def test_a_missing_renamed_or_mis_shaped_tensor_is_named(shapes, key, small, tmp_path):
    state = fill(shapes)
    tensor = state.pop(key)
    for change in ({}, {key + "_": tensor}, {key: torch.ones(5)}):
        torch.save(state | change, tmp_path / "x")
        with pytest.raises(models.CheckpointError, match=f"x: [^\n]*{key}[^\n]*$"):
            models.build_from(tmp_path / "x")


def load(content, path, arch="vit_small", chans=3, adapt="random", rgb=(3, 2, 1), norm=None):
    """A model of 56 px that was filled from a file with this content, and the report."""
    torch.save(content, path)
    model = models.build(arch, chans, 56)
    return model, models.load_pretrained(model, path, adapt, rgb, norm)


# ----------------------------------------------------------------------- which of several backbones


def test_of_decurs_two_backbones_the_one_nearest_in_channels_is_taken(small, tmp_path):
    content, state, other = family("DeCUR")
    for chans, taken, adapted in ((13, state, []), (12, state, ["conv1.weight"]), (2, other, [])):
        model, report = load(content, tmp_path / "x", "resnet18", chans)
        assert torch.equal(model.bn1.weight, taken["bn1.weight"])
        assert report["adapted"] == adapted


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


def test_without_layerscale_in_the_file_its_factors_are_one_and_a_decoders_mask_token_stays_out(
        small, tmp_path):
    content = fill(vit(ls=False, mask=False)) | {"mask_token": torch.ones(1, 1, 32)}
    model, report = load(content, tmp_path / "x")
    assert len(report["fresh"]) == 5 and "mask_token" in report["fresh"]
    assert (model.blocks[1].ls1.gamma == 1).all() and not model.mask_token.any()


@pytest.mark.parametrize("adapt", ["random", "rgb"])
@pytest.mark.parametrize("arch, shapes", [("resnet18", resnet(13)), ("vit_small", vit(chans=13))])
def test_12_and_13_bands_cross_by_name_whatever_adapt_says(adapt, arch, shapes, small, tmp_path):
    key = models.input_layer(shapes)
    weight = fill(shapes)[key]
    kept = [band for band in range(13) if band != 10]
    twelve, report = load(fill(shapes), tmp_path / "x", arch, 12, adapt)
    assert report["adapted"] == [key]
    assert torch.equal(twelve.state_dict()[key], weight[:, kept])
    thirteen, _ = load(models.export_backbone(twelve), tmp_path / "x", arch, 13, adapt)
    assert torch.equal(thirteen.state_dict()[key][:, kept], weight[:, kept])
    assert not thirteen.state_dict()[key][:, 10].any()


def test_random_keeps_the_fresh_layer_mean_the_output_for_grey_and_rgb_the_named_bands():
    weight = torch.randn(8, 3, 7, 7)
    fresh = torch.randn(8, 13, 7, 7)
    assert models.adapt_input("x", weight, fresh, "random") is fresh
    grey = torch.rand(1, 1, 7, 7)
    mean = models.adapt_input("x", weight, fresh, "mean")
    assert torch.allclose(F.conv2d(grey.expand(1, 13, 7, 7), mean),
                          F.conv2d(grey.expand(1, 3, 7, 7), weight), atol=1e-4)
    rgb = models.adapt_input("x", weight, fresh, "rgb", [6, 4, 2])
    assert torch.equal(rgb[:, [6, 4, 2]], weight)
    untouched = [band for band in range(13) if band not in (6, 4, 2)]
    assert torch.equal(rgb[:, untouched], fresh[:, untouched])


@pytest.mark.parametrize("chans, rgb, chosen", [
    (3, (3, 2, 1), "rgb"), (3, (), "mean"), (2, (3, 2, 1), "mean")])
def test_auto_is_rgb_where_file_and_sensor_have_red_green_and_blue_and_mean_elsewhere(
        chans, rgb, chosen, small, tmp_path):
    weights = []
    for adapt in ("auto", chosen):
        torch.manual_seed(0)
        model, _ = load(fill(vit(chans=chans)), tmp_path / "x", "vit_small", 13, adapt, rgb)
        weights.append(model.patch_embed["proj"].weight)
    assert torch.equal(*weights)


@pytest.mark.parametrize("arch, norm, mean, std", [
    ("resnet18", "imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ("vit_small", "imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ("vit_small", "half", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])
def test_init_norm_folds_the_normalisation_into_the_input_layer(
        arch, norm, mean, std, small, tmp_path):
    """For a ResNet: in the middle of its map, as the image's rim meets zeros that mean black."""
    state = fill(resnet() if arch == "resnet18" else vit())
    folded, _ = load(state, tmp_path / "x", arch, norm=norm)
    as_in_file = models.build_from(tmp_path / "x")
    for_13_bands, _ = load(state, tmp_path / "x", arch, 13, "rgb", norm=norm)
    key = models.input_layer(state)
    assert torch.equal(for_13_bands.state_dict()[key][:, [3, 2, 1]], folded.state_dict()[key])
    x = torch.rand(2, 3, 56, 56, dtype=torch.float64)
    normalised = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    outputs = []
    for network, image in ((folded, x), (as_in_file, normalised)):
        network.eval().double()
        if arch == "resnet18":
            outputs.append(network.bn1(network.conv1(image))[..., 2:-2, 2:-2])
        else:
            outputs.append(network(image))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("arch, args, shapes", [
    ("vit_small", {}, vit()), ("vit_small", dict(registers=4), vit(registers=4)),
    ("vit_pera_g", {}, vit(4, ls=False, mask=False)), ("resnet18", {}, resnet())])
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


ENDLESS = {}                                          # dictionaries that contain themselves, twice
ENDLESS |= {"a": ENDLESS, "b": ENDLESS}


def file_with(**changes):
    return fill(vit()) | {key.replace("__", "."): tensor for key, tensor in changes.items()}


ONE = torch.zeros(1, 1, 1)

# what: (content of the file, None for no file; expected words)
ODD_FILES = {
    "missing": (None, "No such file"),
    "a web page": (b"<!DOCTYPE html><html>Access denied</html>" * 100, "not a PyTorch checkpoint"),
    "pickled code": (pickle.dumps(Bomb(), 2), "refused, it wants to run code"),
    "saved code": ({"model": Bomb()}, "refused, it wants to run code"),
    "endless": (ENDLESS, "no ViT or ResNet"),
    "4 TB in 4 bytes": (file_with(pos_embed=ONE.expand(1, 10 ** 12, 48)),
                        "the numbers of pos_embed are not in the file"),
    "other depth": (fill(vit(depth=9)), "none of resnet18, .* has {'width': 48, 'depth': 9}"),
    "integers": (file_with(norm__bias=torch.ones(48, dtype=torch.int8)),
                 "norm.bias is torch.int8"),
    "no square": (file_with(pos_embed=torch.ones(1, 200, 48)), r"pos_embed is \(1, 200, 48\)"),
    "narrow table": (file_with(pos_embed=torch.ones(1, 17, 24)), r"pos_embed: .*\[1, 17, 24\]"),
}


@pytest.mark.parametrize("content, words", ODD_FILES.values(), ids=ODD_FILES)
def test_odd_and_hostile_files_end_in_one_line_and_run_no_code(
        content, words, small, tmp_path, capsys):
    path = tmp_path / "x.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(models.CheckpointError, match=f"x.pth: .*{words}") as error:
        models.build_from(path)
    assert "\n" not in str(error.value)
    assert "code has run" not in capsys.readouterr().out


@pytest.mark.parametrize("old_format", [False, True])
def test_a_file_cut_off_anywhere_is_refused_by_its_name(old_format, tmp_path):
    torch.save(fill(vit(1)), tmp_path / "whole", _use_new_zipfile_serialization=not old_format)
    content = (tmp_path / "whole").read_bytes()
    for length in [*range(0, 1500, 23), *range(1500, len(content), 20011), len(content) - 3]:
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(models.CheckpointError, match="cut: "):
            models.read_weights(tmp_path / "cut")


@pytest.mark.parametrize("shapes, flags, message", [
    (vit(3), {}, "holds a vit_base, take --arch vit_base; the model is a vit_small"),
    (resnet(), {}, "holds a resnet18, take --arch resnet18"),
    (vit(), dict(adapt="rgb", rgb=()), "adapt=rgb does not lead from 3 to 13 channels"),
    (vit(chans=13), dict(norm="half"), "has 13 channels, normalisation half is for")])
def test_a_file_that_does_not_lead_to_the_model_says_why(shapes, flags, message, small, tmp_path):
    with pytest.raises(models.CheckpointError, match=f"x: .*{message}"):
        load(fill(shapes), tmp_path / "x", "vit_small", 13, **flags)
