"""Claims about model.py's networks, against definitions re-stated from the state dict."""
import math

import pytest
import torch
import torch.nn.functional as F

import losses
import model as models
from conftest import seeded


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The same architectures with fewer blocks."""
    torch.manual_seed(0)
    monkeypatch.setitem(models.VITS, "vit_tiny", dict(width=24, depth=4, heads=3))
    for arch, bottleneck in (("resnet18", False), ("resnet50", True)):
        monkeypatch.setitem(models.RESNETS, arch, dict(depths=(1, 2, 1, 1), bottleneck=bottleneck))


def fill(model, scale=0.2):
    """Random weights everywhere, so that no norm, bias or factor is 1 or 0; returns the model."""
    for i, (name, tensor) in enumerate(model.state_dict().items()):
        if name.endswith(("running_var", "bn1.weight")):
            tensor.copy_(torch.rand(tensor.shape, generator=seeded(i)) + 0.5)
        elif tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=seeded(i)) * scale)
    return model.double()


# ----------------------------------------------------------------------------------------- ResNet


def resnet_maps(s, x, convs, stride_at):
    """torchvision's forward in eval mode; of a block's convs the stride_at-th has the stride."""

    def conv_bn(x, conv, bn, stride=1):
        weight = s[f"{conv}.weight"]
        x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2)
        return F.batch_norm(x, *[s[f"{bn}.{key}"] for key in (
            "running_mean", "running_var", "weight", "bias")])

    maps = []
    x = F.max_pool2d(conv_bn(x, "conv1", "bn1", 2).clamp(min=0), 3, 2, 1)
    for i, depth in enumerate((1, 2, 1, 1), 1):
        for j in range(depth):
            block = f"layer{i}.{j}"
            stride = 2 if i > 1 and j == 0 else 1
            y = x
            for c in range(1, convs + 1):
                y = y if c == 1 else y.clamp(min=0)
                strided = stride if c == stride_at else 1
                y = conv_bn(y, f"{block}.conv{c}", f"{block}.bn{c}", strided)
            if f"{block}.downsample.0.weight" in s:
                x = conv_bn(x, f"{block}.downsample.0", f"{block}.downsample.1", stride)
            x = (x + y).clamp(min=0)
        maps.append(x)
    return maps


@pytest.mark.parametrize("arch, convs, stride_at", [("resnet50", 3, 2), ("resnet18", 2, 1)])
def test_a_resnet_computes_torchvisions_definition_with_the_stride_on_the_3x3(
        arch, convs, stride_at):
    m = fill(models.build(arch, 2), 0.05).eval()
    x = torch.rand(2, 2, 32, 32, generator=seeded()).double()
    maps = resnet_maps(m.state_dict(), x, convs, stride_at)
    torch.testing.assert_close(m.feature_maps(x), maps, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(m(x), maps[-1].mean((2, 3)), rtol=1e-9, atol=1e-9)


# -------------------------------------------------------------------------------------------- ViT


def attend(s, name, y, alive):
    """Attention one head at a time, in which nobody looks at tokens that are not alive (n,)."""
    D = y.shape[1]
    q, k, v = (y @ s[f"{name}.qkv.weight"].T + s[f"{name}.qkv.bias"]).split(D, 1)
    mixed = []
    for c in torch.arange(D).split(D // 3):                                       # 3 heads
        scores = q[:, c] @ k[:, c].T / math.sqrt(D // 3)
        mixed.append(scores.masked_fill(~alive, -math.inf).softmax(1) @ v[:, c])
    return torch.cat(mixed, 1) @ s[f"{name}.proj.weight"].T + s[f"{name}.proj.bias"]


def norm(s, name, y):
    y = y - y.mean(1, keepdim=True)
    y = y / (y.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return y * s[f"{name}.weight"] + s[f"{name}.bias"]


def run_block(s, i, y, alive):
    """Block i of a ViT on all tokens y (n,D) of one image."""
    block = f"blocks.{i}"
    scale1, scale2 = [s.get(f"{block}.{name}.gamma", 1) for name in ("ls1", "ls2")]
    y = y + attend(s, f"{block}.attn", norm(s, f"{block}.norm1", y), alive) * scale1
    z = norm(s, f"{block}.norm2", y) @ s[f"{block}.mlp.fc1.weight"].T + s[f"{block}.mlp.fc1.bias"]
    z = z * (1 + torch.erf(z / math.sqrt(2))) / 2
    return y + (z @ s[f"{block}.mlp.fc2.weight"].T + s[f"{block}.mlp.fc2.bias"]) * scale2


def first_tokens(s, image, registers):
    """CLS, registers and all patches of an image (C,H,W): (1+R+N, D)."""
    weight = s["patch_embed.proj.weight"]
    patches = F.conv2d(image[None], weight, s["patch_embed.proj.bias"], stride=weight.shape[-1])[0]
    _, h, w = patches.shape
    table = s["pos_embed"][:, 1:].mT.unflatten(2, (4, 4))                         # (1, D, 4, 4)
    if registers and (h, w) != (4, 4):
        table = F.interpolate(table, size=(h, w), mode="bicubic", antialias=True)
    elif (h, w) != (4, 4):
        scale = ((h + 0.1) / 4, (w + 0.1) / 4)
        table = F.interpolate(table, scale_factor=scale, mode="bicubic")
    cls = s["cls_token"][0] + s["pos_embed"][0, :1]
    extra = s["register_tokens"][0] if registers else cls[:0]
    return torch.cat([cls, extra, (patches + table[0]).flatten(1).T])


def vit_tokens(s, x, registers, keep=None):
    """DINOv2's forward; patches that are not in keep (B,n) are there but nobody looks at them."""
    outputs = []
    for b, image in enumerate(x):
        y = first_tokens(s, image, registers)
        alive = torch.ones(len(y), dtype=torch.bool)
        if keep is not None:
            alive[1 + registers:] = False
            alive[1 + registers + keep[b]] = True
        for i in range(4):
            y = run_block(s, i, y, alive)
        outputs.append(norm(s, "norm", y)[alive])
    return torch.stack(outputs)


@pytest.mark.parametrize("registers, layerscale", [(0, True), (0, False), (4, True)])
@pytest.mark.parametrize("size", [(56, 56), (28, 42), (84, 98)])
@pytest.mark.parametrize("dropping", [False, True])
def test_a_vit_computes_dinov2s_definition_and_dropped_tokens_are_as_if_masked(
        registers, layerscale, size, dropping):
    """At its own size, and at others, where the positions are resampled in DINOv2's two ways."""
    m = models.build("vit_tiny", 2, 56, 14, registers, layerscale=layerscale)
    m = fill(m).eval()
    x = torch.rand(2, 2, *size, generator=seeded()).double()
    keep = None
    if dropping:
        keep = losses.block_mask(2, (size[0] // 14, size[1] // 14), 0.5, seeded())
    stated = vit_tokens(m.state_dict(), x, registers, keep)
    tokens = m.tokens(x, keep)
    tolerance = 1e-9 if size == (56, 56) else 1e-4                 # resampling is in float32
    torch.testing.assert_close(tokens, stated, rtol=tolerance, atol=tolerance)
    assert torch.equal(m(x, keep), tokens[:, 0])


def test_drop_path_skips_a_share_of_the_samples_and_scales_the_rest_to_the_same_mean():
    block = models.ViTBlock(8, heads=2, layerscale=True, drop_path=0.4).train()
    x = torch.rand(10, 3, 8) + 1
    counts = torch.zeros(10)
    computed = []

    def branch(rows):
        computed.append(len(rows))
        return rows.square()

    for _ in range(200):
        added = block.residual(x, branch) - x
        taken = added.any(2).any(1)
        assert torch.allclose(added[taken], x[taken].square() * 10 / 6, atol=1e-5)
        counts += taken
    assert computed == [6] * 200                                         # the rest is not computed
    assert (counts / 200 - 0.6).abs().max() < 0.15                       # every sample in turn
    assert torch.allclose(block.eval().residual(x, branch), x + x.square())


# --------------------------------------------------------------------------- heads and the teacher


def test_a_softcon_head_is_linear_and_batch_norm_with_relu_between():
    net = fill(models.Branch(models.build("resnet18", 2), hidden=16, predict=True, out=8))
    x = torch.rand(6, 2, 32, 32, generator=seeded()).double()
    s = net.state_dict()

    def layer(z, name, i):
        z = z @ s[f"{name}.{i}.weight"].T
        z = (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()
        if f"{name}.{i + 1}.weight" not in s:                            # the last: neither scale
            return z                                                     # nor shift, and no ReLU
        return (z * s[f"{name}.{i + 1}.weight"] + s[f"{name}.{i + 1}.bias"]).clamp(min=0)

    z, features = net(x)
    torch.testing.assert_close(features, net.backbone(x))
    stated = features
    for name, layers in (("projector", (0, 3, 6)), ("predictor", (0, 3))):
        for i in layers:
            stated = layer(stated, name, i)
    torch.testing.assert_close(z, stated, rtol=1e-9, atol=1e-9)
    teacher = models.Branch(net.backbone, hidden=16, predict=False, out=8)
    assert set(s) - set(teacher.state_dict()) == {key for key in s if key.startswith("predictor")}


def test_perAs_embeddings_have_length_one_and_prototypes_a_trained_length_of_one_at_the_start():
    head = models.PrototypeHead(12, 30, 16)
    assert torch.allclose(head(torch.randn(4, 12)).norm(dim=1), torch.ones(4), atol=1e-5)
    assert torch.allclose(head.prototypes().norm(dim=1), torch.ones(30), atol=1e-6)
    head.prototypes().sum().backward()
    assert head.weight_g.grad.shape == (30, 1)


def guesses_by_masking(net, image, patches, guessed):
    """CLS and guesses of the student on one crop with all its tokens: those that it does not see
    are never alive, mask tokens come alive in the middle block."""
    s = net.backbone.state_dict()
    y = first_tokens(s, image, 0)
    y[1 + guessed] = net.mask_token[0] + s["pos_embed"][0, 1 + guessed]
    start = y.clone()
    alive = torch.zeros(len(y), dtype=torch.bool)
    alive[0] = True
    alive[1 + patches] = True
    for i in range(4):
        if i == 2:
            y[1 + guessed] = start[1 + guessed]
            alive[1 + guessed] = True
        y = run_block(s, i, y, alive)
    y = norm(s, "norm", y)
    return y[0], net.pred_head(y[1 + guessed]) @ net.pred_head.prototypes().T


def test_peras_student_equals_a_crop_at_a_time_with_mask_tokens_from_half_depth():
    net = fill(models.SparseBranch(models.build("vit_tiny", 2, 24, 6), 32, 48, predict=True)).eval()
    crops = [torch.rand(3, 2, 24, 24).double(), torch.rand(4, 2, 12, 12).double()]
    patches, guessed_patches, _ = losses.disjoint_masks(3, 16)
    local, _, _ = losses.disjoint_masks(4, 4)
    z, cls, guess = net(crops, [patches, local], guessed_patches)
    for b in range(3):
        stated = guesses_by_masking(net, crops[0][b], patches[b], guessed_patches[b])
        torch.testing.assert_close((cls[b], guess[b]), stated, rtol=1e-9, atol=1e-9)
    assert guess.shape == (3, 3, 72)
    local_tokens = vit_tokens(net.backbone.state_dict(), crops[1], 0, local)
    torch.testing.assert_close(cls[3:], local_tokens[:, 0], rtol=1e-4, atol=1e-4)
    assert torch.equal(z, net.cls_head(cls))


def test_neither_side_of_pera_computes_patches_that_are_not_its_own():
    net = models.SparseBranch(models.build("vit_tiny", 2, 24, 6), 32, 48, predict=True).eval()
    lengths = []
    for block in net.backbone.blocks:
        block.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    student_patches, guessed_patches, teacher_patches = losses.disjoint_masks(2, 16)
    x = torch.rand(2, 2, 24, 24)
    net([x], [student_patches], guessed_patches)
    net([x], [teacher_patches])
    assert lengths == [1 + 3] * 2 + [1 + 3 + 3] * 2 + [1 + 10] * 4


@pytest.mark.parametrize("make", [
    lambda predict: models.Branch(models.build("resnet18", 2), 16, predict, 8),
    lambda predict: models.SparseBranch(models.build("vit_tiny", 2, 24, 6), 8, 8, predict)])
def test_the_teacher_moves_by_exactly_one_minus_m_of_the_difference_and_its_statistics_stay(make):
    source = fill(make(True), 0.3)
    teacher = make(False).double()
    wanted = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    for name, _ in teacher.named_parameters():
        wanted[name] = 0.75 * wanted[name] + 0.25 * source.state_dict()[name]
    for momentum in (0.75, 1.0):                                         # 1 moves nothing
        models.ema_update(teacher, source, momentum)
        torch.testing.assert_close(dict(teacher.state_dict()), wanted, rtol=0, atol=1e-15)
