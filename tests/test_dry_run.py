"""Claims about tests/lab/dry_run.py: it shows the real step, counts right, leaves nothing."""
import contextlib
import functools
import io
import os
import re
import sys

import numpy as np
import pytest
import tifffile
import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import pretrain
from conftest import SMALL
from lab import dry_run
from programs import script

PERA = ["--method", "pera", "--arch", "vit_tiny", *SMALL, "--local-size", "12", "--crops", "2", "3",
        "--prototypes", "64", "--soft-weight", "0.1"]


def printed(*flags):
    """What a dry run prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        dry_run.main(list(flags))
    return out.getvalue()


printed_once = functools.cache(printed)                   # for tests that look at the same dry run


def depth(line):
    return len(line) - len(line.lstrip())


def tensors(text, function):
    """{name: [shape, ...]} of the tensors that the lines of a function make, in its first call."""
    lines = text.splitlines()
    start = 0
    while not re.search(rf" in (\S+\.)?{function}:$", lines[start]):
        start += 1
    found = {}
    for i in range(start, len(lines)):
        line = lines[i]
        next_function = i > start and re.search(r" in \S+:$", line)
        if depth(line) < depth(lines[start]):
            break
        if depth(line) == depth(lines[start]) and not next_function:
            made = re.split("  +", line.strip())[0]
            for name, numbers in re.findall(r"(\S+) \(([\d,]*)\)", made):
                shape = tuple(int(n) for n in numbers.split(",") if n)
                found.setdefault(name, []).append(shape)
    return found


def number(pattern, text):
    return float(re.search(pattern, text)[1])


# ---------------------------------------------------------------------------------- what it shows


def test_softcon_with_a_vit_shows_every_tensor_of_its_step(toy, few_blocks):
    """24 px, patches of 6: 16 patches, of which 30 %, 5, are masked."""
    out = printed("--modality", "s2c", "--data", toy, "--arch", "vit_tiny", *SMALL)
    step = tensors(out, "softcon_step")
    assert step["x"] == [(8, 2, 13, 24, 24)] and step["y"] == [(8, 2, 9)]
    assert step["keep"] == [(16, 11)] and (16, 13, 24, 24) in step["views"]
    assert step["k"] == step["q"] == [(16, 256)] and step["features"] == [(16, 192)]
    assert step["k1"] == step["q1"] == [(8, 256)] and step["loss1"] == [()]
    assert tensors(out, "info_nce")["logits"] == [(8, 8)]
    assert tensors(out, "soft_contrastive")["s"] == [(8, 8)]
    assert "qkv (16,17,576)" in out and "qkv (16,12,576)" in out     # all tokens; those that stay
    assert "z (16,256)" in out and "# (2B,256)" in out               # and the lines themselves
    assert "student: parameters in millions" in out and ", predictor 0.0" in out
    assert "tokens of a view, CLS included: teacher 17, student 12\n" in out


def test_softcon_with_a_resnet_shows_the_greyed_views_and_no_tokens(toy):
    out = printed("--modality", "s1", "--data", toy, "--arch", "resnet18", *SMALL)
    assert tensors(out, "blank_patches")["x"] == [(16, 2, 24, 24)]
    assert re.search(r"x \(16,2,24,24\) +in ResNet.feature_maps:$", out, re.M)
    assert re.search(r"x \(16,64,6,6\) +in \w*Block.forward:$", out, re.M)
    assert "tokens of a view, CLS included: none" in out
    assert "backbone 11.17, projector 0.03" in out


def test_pera_shows_crops_sets_of_patches_and_tokens_before_and_after_the_middle(
        toy, few_blocks):
    out = printed_once("--modality", "s1", "--data", toy, *PERA)
    pairs = tensors(out, "aligned_pairs")                            # 2 global crops of 8 images
    assert [pairs[name][0] for name in ("keep", "unseen", "others")] == [(16, 3), (16, 3), (16, 10)]
    step = tensors(out, "pera_step")
    assert step["z"] == step["z_t"] == [(40, 384)] and step["features"] == [(40, 192)]
    assert step["guess"] == [(16, 3, 72)] and step["prototypes"] == [(64, 384)]
    assert "(8,384)" in out and "(8,64)" in out                      # a crop and its scores
    assert "(16,3,192)" in out and "in soft_contrastive:" in out
    assert re.search("^student: .*, cls_head .*, pred_head ", out, re.M)
    assert "included: teacher 11 and 3, student 4 and 2, student 7 and 2\n" in out


def test_preset_and_flags_stand_on_top(toy, few_blocks):
    flags = ["--modality", "s1", "--data", toy, *PERA]
    out = printed_once(*flags)
    top = " ".join(out[:out.index("parameters in millions")].split())
    assert "pera, full" in top and "batch_size 8 instead of 192" in top
    for name, value in vars(pretrain.parse(flags)).items():
        if name != "sensor":
            assert f"{name} {value}" in top


# -------------------------------------------------------------------------------- what it counts


def real_step(flags, x):
    """A namespace of networks and a function that computes SoftCon's loss on real numbers."""
    args = pretrain.parse(flags)
    args.amp = "off"
    net = pretrain.networks(args, torch.device("cpu"))
    draws = pretrain.StepRandomness(0, 0, 0, 0, 1)
    y = torch.ones(len(x), 2, 9)
    return net, lambda: pretrain.softcon_step(net, x, y, args, draws, {})[0]


BIG_BATCH = ["--modality", "s2c", "--arch", "resnet18", *SMALL, "--batch-size", "32"]


def test_parameters_operations_and_memory_are_those_of_a_real_step(toy, few_blocks):
    """Operations against a count on real numbers; memory against the networks themselves."""
    flags = [*BIG_BATCH, "--data", toy]
    out = printed_once(*flags)
    net, loss = real_step(flags, torch.randint(256, (32, 2, 13, 24, 24), dtype=torch.uint8))
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    flops = re.search(r"operations: (\S+) TFLOP a micro-batch of 32 scenes, (\S+) TFLOP", out)
    assert flops[1] == flops[2] == f"{counter.get_total_flops() / 1e12:.4g}"
    student = sum(p.numel() for p in net.student.parameters())
    teacher = sum(p.numel() for p in net.teacher.parameters())
    assert f"student: parameters in millions {student / 1e6:.2f}, backbone" in out
    assert (f"parameters {4e-9 * student:.2f}, gradients {4e-9 * student:.2f}, "
            f"AdamW {8e-9 * student:.2f}, teacher {4e-9 * teacher:.2f}, activations") in out


def test_two_micro_batches_have_the_operations_of_one_batch(toy, few_blocks):
    out = printed("--modality", "s1", "--data", toy, "--arch", "resnet18", *SMALL,
                  "--accum", "2")
    part, whole = re.search(r"operations: (\S+) TFLOP.*, (\S+) TFLOP", out).groups()
    assert abs(2 * float(part) / float(whole) - 1) < 1e-3


def test_attention_is_counted_among_the_operations(tmp_path, monkeypatch):
    """A ViT's count is at least what its matrix products alone take, for teacher and student."""
    monkeypatch.chdir(tmp_path)
    out = printed("--modality", "s1", "--arch", "vit_tiny", *SMALL, "--img-size", "96")
    flops = number(r"operations: (\S+) TFLOP", out) * 1e12
    D = 192
    images = 16

    def block(tokens):
        weights = 12 * D * D                                # of qkv, projection and both MLP layers
        return 2 * tokens * weights + 4 * tokens * tokens * D        # and q k, attention v
    # the teacher sees 257 tokens, the student 180; backward costs twice what forward does
    expected = images * 12 * (block(257) + 3 * block(180))
    assert 0.97 < flops / expected < 1.06                            # embedding, heads, loss


def test_activations_are_what_autograd_keeps(toy, few_blocks):
    """Against the unique storages kept by the same step on real numbers."""
    flags = [*BIG_BATCH, "--data", toy]
    out = printed_once(*flags)
    net, loss = real_step(flags, torch.randint(256, (32, 2, 13, 24, 24), dtype=torch.uint8))
    parameters = [*net.student.parameters(), *net.teacher.parameters()]
    weights = {p.data_ptr() for p in parameters}
    sizes = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        assert loss().requires_grad
    expected = sum(sizes.values()) / 1e9
    assert abs(number(r"activations ([\d.]+)", out) - expected) < 0.006 + 0.1 * expected


def test_schedules_are_shown_at_start_middle_and_end_and_steps_when_data_are_known(
        toy, few_blocks):
    flags = ["--modality", "s1", "--data", toy, *PERA]
    out = printed_once(*flags)
    train = (~data.held_out([f"{i:07d}" for i in range(60)], 0.1)).sum()
    total = 4 * (train // 8)
    assert f"steps: {total}, {train // 8} an epoch\n" in out
    rows = {}
    for step, values in re.findall(r"^step (\d+): (.*)$", out, re.M):
        rows[int(step)] = dict(value.split() for value in values.split(", "))
    assert list(rows) == [0, total // 2, total - 1]
    assert rows[0]["lr"] == "0" and rows[0]["teacher_tau"] == "0.03"
    assert rows[0]["weight_decay"] == "0.04" and rows[0]["momentum"] == "0.992"
    for step, row in rows.items():
        now = pretrain.schedules(pretrain.parse(flags), step, total)
        assert row == {name: f"{value:.4g}" for name, value in now.items()}


# ---------------------------------------------------------------------------------- what it leaves


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 300 RGB images of 264 px."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "a").mkdir()
    tifffile.imwrite(folder / "a" / "0.tif", np.zeros((264, 264, 3), np.uint8))
    for i in range(1, 300):
        os.link(folder / "a" / "0.tif", folder / "a" / f"{i}.tif")
    return str(folder)


def measured_script(*words):
    """Runs a script and says how much memory the process ever had, in kB.

    VmHWM is that of the process alone; ru_maxrss would count the process that started it.
    """
    script(*words)
    print(re.search(r"VmHWM:\s*(\d+) kB", open("/proc/self/status").read())[1])


def test_the_script_ends_with_0_writes_nothing_and_needs_no_memory_for_131072_prototypes(
        images, tmp_path, start):
    """The weights of PerA's student and teacher alone would take 1.2 GB."""
    done = start(measured_script, "tests/lab/dry_run.py", "--modality", "rgb", "--data", images,
                 "--method", "pera", "--preset", "full", folder=tmp_path).end()
    assert done.code == 0 and not done.err and not os.listdir(tmp_path)
    assert "(131072,384)" in done.out
    assert "teacher 119 and 23, student 40 and 8, student 79 and 8" in done.out
    kilobytes = int(done.out.splitlines()[-1])
    assert kilobytes < 1e6


@pytest.mark.parametrize("flags, shown", [
    ([], "teacher 257, student 180"), (["--arch", "resnet50"], "(512,2048,7,7)")])
def test_the_full_presets_of_softcon_show_their_tokens_and_maps(images, flags, shown):
    assert shown in printed("--modality", "rgb", "--data", images, "--preset", "full", *flags)


@pytest.mark.parametrize("flags", [
    ["--modality", "s1", "--arch", "resnet18", *SMALL],
    ["--modality", "s2c", "--method", "pera", "--prototypes", "64", "--crops", "1", "0"]])
def test_it_wants_no_data_and_leaves_the_process_and_the_folder_as_they_were(
        flags, tmp_path, monkeypatch, few_blocks):
    """Nothing is traced afterwards, and autocast is the training's own."""
    monkeypatch.chdir(tmp_path)
    before = sys.gettrace(), pretrain.autocast
    assert "an epoch (a guess: no data are here yet)" in printed(*flags)
    assert (sys.gettrace(), pretrain.autocast) == before and not os.listdir(tmp_path)


def test_only_the_first_rank_prints_and_of_its_own_share(toy, monkeypatch, few_blocks):
    flags = ["--modality", "s1", "--data", toy, "--arch", "vit_tiny", *SMALL]
    monkeypatch.setenv("WORLD_SIZE", "2")                            # as torchrun does
    monkeypatch.setenv("RANK", "1")
    assert printed(*flags) == ""
    monkeypatch.setenv("RANK", "0")
    out = printed(*flags)
    assert tensors(out, "softcon_step")["x"] == [(4, 2, 2, 24, 24)]
    part, whole = re.search(r"operations: (\S+) TFLOP.*, (\S+) TFLOP", out).groups()
    assert abs(2 * float(part) / float(whole) - 1) < 1e-3


def test_what_cannot_run_is_refused_and_a_run_that_exists_does_not_matter(
        toy, tmp_path, few_blocks):
    flags = ["--modality", "s1", "--data", toy, "--arch", "resnet18", *SMALL]
    with pytest.raises(ValueError, match="25 x 25 is not divisible"):
        printed(*flags, "--img-size", "25")
    (tmp_path / "last.pt").write_bytes(b"a run")
    assert "in softcon_step:" in printed(*flags, "--out", str(tmp_path))
    assert os.listdir(tmp_path) == ["last.pt"]
