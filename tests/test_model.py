"""Claims about model.py: upstream names and sizes, dropped tokens, loading, exporting."""
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model as models


def size(m):
    return sum(p.numel() for p in m.parameters())


# ------------------------------------------------------------------------------- names and sizes

BATCH_NORM = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
VIT_BLOCK = ["norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight",
             "attn.proj.bias", "ls1.gamma", "norm2.weight", "norm2.bias", "mlp.fc1.weight",
             "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias", "ls2.gamma"]


@pytest.mark.parametrize("arch, args, keys, parameters", [
    ("vit_small", dict(in_chans=3, img_size=518), 175, 22_056_576),          # DINOv2's own files
    ("vit_base", dict(in_chans=3, img_size=518), 175, 86_580_480),
    ("vit_large", dict(in_chans=3, img_size=518), 343, 304_368_640),
    ("vit_giant2", dict(in_chans=3, img_size=518), 567, 1_136_480_768),
    ("vit_base", dict(in_chans=3, img_size=518, registers=4), 176, 86_580_480 + 4 * 768),
    ("vit_small", dict(in_chans=13), 175, 22_381_824),                       # SoftCon's
    ("vit_base", dict(in_chans=13), 175, 87_230_976),
    ("vit_pera_g", dict(in_chans=3, img_size=448, patch_size=16), 486, 505_443_328),
    ("resnet50", dict(in_chans=3), 318, 25_557_032 - 2048 * 1000 - 1000),    # torchvision's less fc
    ("resnet18", dict(in_chans=3), 120, 11_689_512 - 512 * 1000 - 1000),
])
def test_architectures_have_the_upstream_number_of_keys_and_parameters(
        arch, args, keys, parameters):
    with torch.device("meta"):
        m = models.build(arch, **args)
    assert len(m.state_dict()) == keys
    assert size(m) == parameters


def test_vit_keys_are_dinov2s():
    with torch.device("meta"):
        state = models.build("vit_small", 13, registers=4).state_dict()
    expected = {"cls_token", "pos_embed", "register_tokens", "mask_token", "norm.weight",
                "norm.bias", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    for i in range(12):
        expected |= {f"blocks.{i}.{key}" for key in VIT_BLOCK}
    assert set(state) == expected
    assert tuple(state["pos_embed"].shape) == (1, 257, 384)
    assert tuple(state["patch_embed.proj.weight"].shape) == (384, 13, 14, 14)


def test_resnet_keys_are_torchvisions():
    with torch.device("meta"):
        state = models.build("resnet50", 13).state_dict()
    expected = {"conv1.weight"}
    expected |= {f"bn1.{key}" for key in BATCH_NORM}
    for layer, depth in enumerate((3, 4, 6, 3), 1):
        for j in range(depth):
            for c in (1, 2, 3):
                expected |= {f"layer{layer}.{j}.conv{c}.weight"}
                expected |= {f"layer{layer}.{j}.bn{c}.{key}" for key in BATCH_NORM}
        expected |= {f"layer{layer}.0.downsample.0.weight"}
        expected |= {f"layer{layer}.0.downsample.1.{key}" for key in BATCH_NORM}
    assert set(state) == expected


def test_an_unknown_architecture_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown arch 'resnet34'; choose from resnet18, "):
        models.build("resnet34", 3)
    features = models.build("resnet18", 3)(torch.rand(2, 3, 32, 32))
    assert math.isfinite(features.sum().item())


# --------------------------------------------------------------------------------- what they do


def test_dropped_tokens_are_as_if_they_had_never_been_in_the_sequence():
    """Re-stated: convolve, add positions, delete tokens, run the blocks on what is left."""
    torch.manual_seed(0)
    m = models.build("vit_tiny", 3, 32, 8, registers=2).eval()
    x = torch.rand(2, 3, 32, 32)
    keep = torch.tensor([[0, 3, 5, 15], [1, 2, 3, 4]])
    with torch.no_grad():
        proj = m.patch_embed["proj"]
        patches = F.conv2d(x, proj.weight, proj.bias, stride=8).flatten(2).transpose(1, 2)
        patches = patches + m.pos_embed[:, 1:]
        rows = []
        for b in range(2):
            cls = m.cls_token[0] + m.pos_embed[0, :1]
            y = torch.cat([cls, m.register_tokens[0], patches[b, keep[b]]])
            for block in m.blocks:
                y = block(y, [(1, 7)])
            rows.append(m.norm(y))
        assert torch.allclose(m.tokens(x, keep), torch.stack(rows), atol=1e-5)
        assert torch.allclose(m.tokens(x, torch.arange(16).expand(2, 16)), m.tokens(x), atol=1e-6)
        assert torch.equal(m(x, keep), m.tokens(x, keep)[:, 0])


def test_last_blocks_ends_with_what_tokens_gives():
    m = models.build("vit_tiny", 3, 32, 8, registers=2).eval()
    x = torch.rand(2, 3, 32, 32)
    outputs = m.last_blocks(x, 4)
    tokens = m.tokens(x)
    assert len(outputs) == 4
    assert outputs[0][1].shape == (2, 16, 192)
    assert torch.equal(outputs[-1][0], tokens[:, 0])
    assert torch.equal(outputs[-1][1], tokens[:, 3:])
    assert not torch.equal(outputs[0][0], outputs[1][0])


@pytest.mark.parametrize("registers", [0, 4])
def test_other_sizes_and_shapes_run_and_the_native_size_resamples_nothing(registers):
    m = models.build("vit_tiny", 2, 56, 14, registers=registers)
    assert m(torch.rand(1, 2, 98, 154)).shape == (1, 192)
    assert m.positions(4, 4) is m.pos_embed
    with pytest.raises(ValueError, match="50 x 56 is not divisible by patch size 14"):
        m(torch.rand(1, 2, 50, 56))
    with pytest.raises(ValueError, match="input has 3 channels, the model takes 2"):
        m(torch.rand(1, 3, 56, 56))


@pytest.mark.parametrize("shape, pytorchs", [((6, 4), nn.BatchNorm1d),
                                             ((6, 4, 3, 3), nn.BatchNorm2d)])
def test_batch_norm_is_pytorchs_own_on_one_rank_for_rows_and_images(shape, pytorchs):
    ours = models.BatchNorm(4)
    theirs = pytorchs(4)
    x = torch.randn(shape)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var)


def test_ema_moves_the_teacher_by_exactly_one_minus_m_of_the_difference():
    student = models.Branch(models.build("resnet18", 2), 16, True, 8)
    teacher = models.Branch(models.build("resnet18", 2), 16, False, 8).requires_grad_(False)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    source = dict(student.named_parameters())
    models.ema_update(teacher, student, 0.9)
    after = {name: p.clone() for name, p in teacher.named_parameters()}
    for name, p in after.items():
        assert torch.allclose(p, 0.9 * before[name] + 0.1 * source[name], atol=1e-7), name
    models.ema_update(teacher, student, 1.0)
    for name, p in teacher.named_parameters():
        assert torch.equal(p, after[name]), name


def test_drop_path_drops_whole_samples_of_each_group_keeps_the_expectation_and_is_off_in_eval():
    torch.manual_seed(0)
    block = models.ViTBlock(8, heads=2, swiglu=False, layerscale=True, drop_path=0.5)
    groups = [(4, 3), (6, 2)]
    x = torch.randn(24, 8)
    in_eval = block.eval()(x, groups)
    block.train()
    for _ in range(20):
        added = block.residual(x, groups, lambda v, g: torch.ones_like(v)) - x
        for y in models.unpack(added, groups):
            per_sample = y.mean((1, 2))
            half = len(y) // 2
            assert torch.allclose(y, per_sample[:, None, None].expand_as(y), atol=1e-5)
            assert sorted(per_sample.round(decimals=4).tolist()) == [0.0] * half + [2.0] * half
    assert torch.equal(block.eval()(x, groups), in_eval)


def test_sequences_of_unlike_lengths_run_together_as_they_would_alone():
    torch.manual_seed(0)
    block = models.ViTBlock(12, heads=3, swiglu=False, layerscale=True, drop_path=0.0)
    sequences = [torch.randn(4, 7, 12), torch.randn(10, 2, 12)]
    packed, groups = models.pack(sequences)
    together = models.unpack(block(packed, groups), groups)
    for x, y in zip(sequences, together):
        alone = block(*models.pack([x])).view_as(x)
        assert torch.allclose(y, alone, atol=1e-6)


# --------------------------------------------------------------------------------------- loading


def dinov2_file(path, img_size=518, width=192, registers=0, chans=3):
    """DINOv2's keys, written out by hand, random weights; small width, true image size."""
    D = width
    shapes = {"cls_token": (1, 1, D), "pos_embed": (1, 1 + (img_size // 14) ** 2, D),
              "mask_token": (1, D), "patch_embed.proj.weight": (D, chans, 14, 14),
              "patch_embed.proj.bias": (D,), "norm.weight": (D,), "norm.bias": (D,)}
    if registers:
        shapes["register_tokens"] = (1, registers, D)
    block = {"norm1.weight": (D,), "norm1.bias": (D,), "attn.qkv.weight": (3 * D, D),
             "attn.qkv.bias": (3 * D,), "attn.proj.weight": (D, D), "attn.proj.bias": (D,),
             "ls1.gamma": (D,), "norm2.weight": (D,), "norm2.bias": (D,),
             "mlp.fc1.weight": (4 * D, D), "mlp.fc1.bias": (4 * D,), "mlp.fc2.weight": (D, 4 * D),
             "mlp.fc2.bias": (D,), "ls2.gamma": (D,)}
    for i in range(12):
        shapes |= {f"blocks.{i}.{key}": shape for key, shape in block.items()}
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(s, generator=generator) * 0.02 for key, s in shapes.items()}
    torch.save(state, path)
    return state


@pytest.mark.parametrize("chans", [13, 2, 3])
def test_a_dinov2_file_at_518_loads_at_224_with_every_key_accounted_for(tmp_path, chans, capsys):
    state = dinov2_file(tmp_path / "any_name.pth")
    m = models.build("vit_tiny", chans)
    fresh = m.patch_embed["proj"].weight.clone()
    report = models.load_pretrained(m, tmp_path / "any_name.pth")
    loaded = m.state_dict()
    filled = report["loaded"] + report["resampled"] + report["adapted"] + report["fresh"]
    assert sorted(filled) == sorted(loaded)
    assert report["ignored"] == []
    assert report["resampled"] == ["pos_embed"]
    assert all(torch.equal(loaded[key], state[key]) for key in report["loaded"])
    if chans == 3:
        assert report["fresh"] == []
    else:
        assert report["fresh"] == ["patch_embed.proj.weight"]
        assert torch.equal(loaded["patch_embed.proj.weight"], fresh)
    grid = state["pos_embed"][:, 1:].reshape(1, 37, 37, 192).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic")
    assert torch.equal(loaded["pos_embed"][:, 1:], grid.flatten(2).transpose(1, 2))
    assert "1 resampled" in capsys.readouterr().out


@pytest.mark.parametrize("arch", ["vit_tiny", "resnet18"])
def test_same_architecture_and_channels_load_exactly_and_export_is_what_was_loaded(arch, tmp_path):
    a = models.build(arch, 13, 56, 14)
    b = models.build(arch, 13, 56, 14)
    torch.save(models.export_backbone(a), tmp_path / "x.pt")
    report = models.load_pretrained(b, tmp_path / "x.pt")
    assert len(report["loaded"]) == len(a.state_dict())
    for key, tensor in models.export_backbone(b).items():
        assert torch.equal(tensor, a.state_dict()[key])
    c = models.build_from(tmp_path / "x.pt")
    assert c.spec["arch"] == arch
    assert c.in_chans == 13
    assert torch.equal(next(c.parameters()), next(a.parameters()))


def test_build_from_gives_a_network_that_is_ready_to_embed(tmp_path):
    """In train mode a feature would depend on the other images of its batch."""
    torch.save(models.export_backbone(models.build("resnet18", 2)), tmp_path / "x.pt")
    net = models.build_from(tmp_path / "x.pt")
    x = torch.rand(4, 2, 32, 32)
    assert torch.allclose(net(x)[:1], net(x[:1]), atol=1e-5)


def test_mean_keeps_the_output_scale_and_rgb_copies_into_b4_b3_b2():
    weight = torch.randn(8, 3, 7, 7)
    fresh = torch.randn(8, 13, 7, 7)
    mean = models.adapt_input(weight, fresh, "mean")
    grey = torch.rand(1, 1, 7, 7)
    assert torch.allclose(F.conv2d(grey.expand(1, 13, 7, 7), mean),
                          F.conv2d(grey.expand(1, 3, 7, 7), weight), atol=1e-4)
    rgb = models.adapt_input(weight, fresh, "rgb")
    assert torch.equal(rgb[:, [3, 2, 1]], weight)
    assert torch.equal(rgb[:, 4:], fresh[:, 4:])
    with pytest.raises(ValueError, match="adapt=rgb does not lead from 3 to 2"):
        models.adapt_input(weight, torch.randn(8, 2, 7, 7), "rgb")


def test_a_dino_resnet50_file_loads_into_13_channels(tmp_path):
    source = models.build("resnet50", 3)
    teacher = {f"module.backbone.{key}": x for key, x in source.state_dict().items()}
    student = {key: x + 1 for key, x in teacher.items()}
    teacher["module.head.last_layer.weight_v"] = torch.zeros(4, 4)
    torch.save({"teacher": teacher, "student": student, "epoch": 3}, tmp_path / "dino.pth")
    target = models.build("resnet50", 13)
    report = models.load_pretrained(target, tmp_path / "dino.pth", "mean")
    assert report["adapted"] == ["conv1.weight"]
    assert torch.equal(target.layer4[2].conv3.weight, source.layer4[2].conv3.weight)
    assert "teacher.module.head.last_layer.weight_v" in report["ignored"]


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("blocks.3.ls1.gamma"), "no tensor blocks.3.ls1.gamma"),
    (lambda s: s.update({"blocks.3.attn.qkv.weight": torch.zeros(3, 3)}),
     "attn.qkv.weight is \\(3, 3\\)"),
    (lambda s: s.update({"norm.wieght": s.pop("norm.weight")}), "no tensor norm.weight"),
])
def test_a_missing_renamed_or_misshaped_tensor_is_named(tmp_path, change, message):
    state = dinov2_file(tmp_path / "x.pth", 56)
    change(state)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        models.load_pretrained(models.build("vit_tiny", 3, 56, 14), tmp_path / "x.pth")


def test_a_vit_without_layerscale_loads_with_its_identity(tmp_path):
    state = dinov2_file(tmp_path / "x.pth", 56)
    torch.save({key: x for key, x in state.items() if "gamma" not in key}, tmp_path / "x.pth")
    m = models.build("vit_tiny", 3, 56, 14)
    report = models.load_pretrained(m, tmp_path / "x.pth")
    assert len(report["fresh"]) == 24
    assert (m.blocks[3].ls1.gamma == 1).all()


def test_a_deeper_net_or_one_without_positions_is_refused(tmp_path):
    state = dinov2_file(tmp_path / "x.pth", 56)
    state["blocks.12.norm1.weight"] = torch.ones(192)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="has blocks.12.norm1.weight, which the model lacks"):
        models.load_pretrained(models.build("vit_tiny", 3, 56, 14), tmp_path / "x.pth")
    del state["pos_embed"]
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="no 3-dimensional tensor pos_embed"):
        models.build_from(tmp_path / "x.pth")


@pytest.mark.parametrize("arch, other", [("vit_tiny", "vit_small"), ("vit_tiny", "resnet18"),
                                         ("resnet18", "resnet50"), ("resnet18", "vit_tiny")])
def test_a_file_of_another_architecture_says_which_it_is(arch, other, tmp_path):
    torch.save(models.export_backbone(models.build(other, 3, 56, 14)), tmp_path / "x.pth")
    message = f"x.pth: holds a {other}, take --arch {other}; the model is a {arch}; "
    with pytest.raises(ValueError, match=message) as error:
        models.load_pretrained(models.build(arch, 3, 56, 14), tmp_path / "x.pth")
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------- what is no checkpoint


class Bomb:
    def __reduce__(self):
        return print, ("code has run",)


@pytest.mark.parametrize("content, message", [
    (None, "No such file"), (b"", "not a PyTorch checkpoint"),
    (b"<html>404</html>", "not a PyTorch checkpoint"),
    (pickle.dumps(Bomb(), 2), "wants to run code"), ("bomb", "wants to run code"),
    ("cut", "not a PyTorch checkpoint"), ("nothing", "no ViT or ResNet"),
])
def test_what_is_no_checkpoint_is_refused_in_one_line_and_runs_nothing(
        tmp_path, capsys, content, message):
    path = tmp_path / "x.pth"
    if content == "cut":
        dinov2_file(path, 56)
        path.write_bytes(path.read_bytes()[:5000])
    elif content == "bomb":
        torch.save({"model": Bomb()}, path)
    elif content == "nothing":
        torch.save({"a": torch.ones(1)}, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        models.build_from(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert "code has run" not in capsys.readouterr().out
