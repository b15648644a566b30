"""Claims about --dry-run: it shows the real step, counts right, and leaves nothing behind."""
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import tifffile
import torch

import data
import pretrain
from conftest import ROOT, SMALL

PERA = ["--method", "pera", "--arch", "vit_tiny", *SMALL, "--local-size", "12", "--crops", "2", "3",
        "--prototypes", "64", "--soft-weight", "0.1"]


def said(capsys, *flags):
    pretrain.main([*flags, "--dry-run"])
    return capsys.readouterr().out


def shown(text, function):
    """{tensor: shapes} that the lines of `function` make, from its first call on."""
    lines = text.splitlines()
    start = next(i for i, x in enumerate(lines) if re.search(rf" in (\S+\.)?{function}:$", x))
    found, indent = {}, len(lines[start]) - len(lines[start].lstrip())
    for i, x in enumerate(lines[start:]):
        depth = len(x) - len(x.lstrip())
        if depth < indent:
            break
        if depth == indent and not (i and re.search(r" in \S+:$", x)):
            for name, shape in re.findall(r"(\S+) \(([\d,]*)\)", re.split("  +", x.strip())[0]):
                found.setdefault(name, []).append(tuple(map(int, filter(None, shape.split(",")))))
    return found


def test_softcon_with_a_vit_shows_every_tensor_of_its_step(toy, capsys):
    """24 px, patches of 6: 16 patches, of which 30 %, 5, are masked."""
    out = said(capsys, "--modality", "s2c", "--data", toy, "--arch", "vit_tiny", *SMALL)
    step = shown(out, "softcon_step")
    assert step["x"] == [(8, 2, 13, 24, 24)] and step["y"] == [(8, 2, 9)]
    assert step["keep"] == [(16, 11)] and (16, 13, 24, 24) in step["views"]
    assert step["k"] == step["q"] == [(16, 256)] and step["features"] == [(16, 192)]
    assert step["k1"] == step["q1"] == [(8, 256)] and step["loss"] == [()]
    assert shown(out, "info_nce")["logits"] == [(8, 8)]
    assert shown(out, "soft_contrastive")["s"] == [(8, 8)]
    assert "qkv (16,17,576)" in out and "qkv (16,12,576)" in out           # all tokens; those kept
    assert "z (16,256)" in out and "# (2B,256)" in out                    # and the lines themselves
    assert "student: parameters in millions" in out and ", predictor 0.0" in out
    assert "tokens of a view, CLS included: teacher 17, student 12\n" in out


def test_softcon_with_a_resnet_shows_the_greyed_views_and_no_tokens(toy, capsys):
    out = said(capsys, "--modality", "s1", "--data", toy, "--arch", "resnet18", *SMALL)
    assert shown(out, "softcon_step")["masked"] == [(16, 2, 24, 24)]
    assert re.search(r"x \(16,2,24,24\) +in ResNet.forward:$", out, re.M)
    assert re.search(r"x \(16,64,6,6\) +in Block.forward:$", out, re.M)
    assert "tokens of a view, CLS included: none" in out and "backbone 11.17, projector 0.03" in out


def test_pera_shows_crops_three_sets_of_patches_and_tokens_before_and_after_the_middle(
        toy, capsys):
    out = said(capsys, "--modality", "s1", "--data", toy, *PERA)
    masks = shown(out, "pairs")
    assert (masks["masks[0]"][-1], masks["masks[1]"][-1], masks["masks[2]"][-1]) == (
        (16, 3), (16, 3), (16, 10))                                           # 2 global crops of 8
    step = shown(out, "pera_step")
    assert step["z"] == step["z_t"] == [(40, 384)] and step["cls"] == [(40, 192)]
    assert step["guess"] == [(16, 3, 72)] and step["matrices[0]"] == [(64, 384)]
    one = shown(out, "one")                                              # a crop and its scores
    assert one["z"] == [(8, 384)] and one["s"] == [(8, 64)]
    assert "asked (16,3,192)" in out and "soft_contrastive" in out
    assert re.search("^student: .*, cls_head .*, pred_head ", out, re.M)
    assert "included: teacher 11 and 3, student 4 and 2, student 7 and 2\n" in out


@pytest.mark.parametrize("flags, text", [
    (["--method", "pera"], "teacher 119 and 23, student 40 and 8, student 79 and 8"),
    ([], "teacher 257, student 180"), (["--arch", "resnet50"], "(512,2048,7,7)")])
def test_the_full_presets_are_quick_and_allocate_next_to_nothing(flags, text, tmp_path):
    (tmp_path / "a").mkdir()
    tifffile.imwrite(tmp_path / "a" / "0.tif", np.zeros((264, 264, 3), np.uint8))
    for i in range(1, 300):
        os.link(tmp_path / "a" / "0.tif", tmp_path / "a" / f"{i}.tif")
    code = ("import pretrain, resource, sys\npretrain.main(sys.argv[1:])\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    done = subprocess.run([sys.executable, "-c", code, "--modality", "rgb", "--data",
                           str(tmp_path), *flags, "--dry-run"], capture_output=True, text=True,
                          timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 1e6                                # kilobytes
    assert text in done.stdout and ("(131072,384)" in done.stdout) == ("pera" in flags)


def test_parameters_operations_and_memory_are_those_of_a_real_step(toy, capsys):
    """Operations against a count on real numbers; memory against the networks themselves."""
    flags = ["--modality", "s2c", "--data", toy, "--arch", "resnet18", *SMALL]
    out = said(capsys, *flags)
    args = pretrain.parse(flags)
    args.amp, net = "off", pretrain.networks(args, "cpu")
    x = torch.randint(256, (8, 2, 13, 24, 24), dtype=torch.uint8)
    with pretrain.FlopCounterMode(display=False) as counter:
        pretrain.softcon_step(net, x, torch.ones(8, 2, 9), args, pretrain.Dice(0, 0, 0, 0, 1),
                              {})[0].backward()
    flops = re.search(r"operations: (\S+) TFLOP a micro-batch of 8 scenes, (\S+) TFLOP", out)
    assert flops[1] == flops[2] == f"{counter.get_total_flops() / 1e12:.4g}"
    n, m = (sum(p.numel() for p in side.parameters()) for side in (net.student, net.teacher))
    assert f"student: parameters in millions {n / 1e6:.2f}, backbone" in out
    assert (f"parameters {4e-9 * n:.2f}, gradients {4e-9 * n:.2f}, AdamW {8e-9 * n:.2f}, teacher "
            f"{4e-9 * m:.2f}, activations") in out
    half = said(capsys, *flags, "--accum", "2")
    small, whole = (re.search(r"operations: (\S+) TFLOP.*, (\S+) TFLOP", half)[i] for i in (1, 2))
    assert abs(2 * float(small) / float(whole) - 1) < 1e-3


def test_attention_is_counted_among_the_operations(capsys):
    """A ViT's count is at least what its matrix products alone take, for teacher and student."""
    out = said(capsys, "--modality", "s1", "--arch", "vit_tiny", *SMALL, "--img-size", "96")
    flops = float(re.search(r"operations: (\S+) TFLOP", out)[1]) * 1e12
    n, kept, d, images = 257, 180, 192, 16
    block = {t: 24 * t * d * d + 4 * t * t * d for t in (n, kept)}         # 12 D^2 weights, q k, a v
    want = images * 12 * (block[n] + 3 * block[kept])
    assert 0.97 < flops / want < 1.06                                      # embedding, heads, loss


def test_activations_are_what_autograd_keeps(toy, capsys):
    """Against the unique storages kept by the same step on real numbers."""
    flags = ["--modality", "s2c", "--data", toy, "--arch", "resnet18", *SMALL, "--batch-size", "32"]
    out = said(capsys, *flags)
    args = pretrain.parse(flags)
    args.amp, net, kept = "off", pretrain.networks(args, "cpu"), {}
    weights = {p.data_ptr() for side in (net.student, net.teacher) for p in side.parameters()}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    x = torch.randint(256, (32, 2, 13, 24, 24), dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = pretrain.softcon_step(net, x, torch.ones(32, 2, 9), args,
                                     pretrain.Dice(0, 0, 0, 0, 1), {})[0]
    want = sum(v for k, v in kept.items() if k not in weights) / 1e9
    assert loss.requires_grad
    assert abs(float(re.search(r"activations ([\d.]+)", out)[1]) - want) < 0.006 + 0.1 * want


def test_schedules_are_shown_at_start_middle_and_end_and_steps_when_data_are_known(toy, capsys):
    out = said(capsys, "--modality", "s1", "--data", toy, *PERA)
    n = int((~data.held_out([f"{i:07d}" for i in range(60)], 0.1)).sum())
    total = 4 * (n // 8)
    assert f"steps: {total}, {n // 8} an epoch\n" in out
    rows = {int(a): dict(x.split() for x in b.split(", "))
            for a, b in re.findall(r"^step (\d+): (.*)$", out, re.M)}
    assert list(rows) == [0, total // 2, total - 1]
    assert rows[0]["lr"] == "0" and rows[0]["teacher_tau"] == "0.03" and (
        rows[0]["weight_decay"], rows[0]["momentum"]) == ("0.04", "0.992")
    for step, row in rows.items():
        assert row == {k: f"{v:.4g}" for k, v in pretrain.schedules(pretrain.parse(
            ["--modality", "s1", "--data", toy, *PERA]), step, total).items()}


@pytest.mark.parametrize("flags", [["--modality", "s1"], ["--modality", "s2c", "--method", "pera"]])
def test_it_ends_with_0_writes_nothing_and_wants_no_data(flags, tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "pretrain.py"), *flags, "--dry-run"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and not os.listdir(tmp_path)
    assert "an epoch (a guess: no data are here yet)" in done.stdout
    assert not sys.gettrace()


def test_only_the_first_rank_speaks_and_of_its_own_share(toy, tmp_path):
    done = subprocess.run([
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(ROOT / "pretrain.py"), "--modality", "s1", "--data", toy, "--arch", "vit_tiny", *SMALL,
        "--dry-run"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not os.listdir(tmp_path)
    assert done.stdout.count("x (4,2,2,24,24)") == 2 and done.stdout.count("in softcon_step:") == 1
    small, whole = re.search(r"operations: (\S+) TFLOP.*, (\S+) TFLOP", done.stdout).groups()
    assert abs(2 * float(small) / float(whole) - 1) < 1e-3


def test_what_cannot_run_is_refused_as_ever_and_a_run_that_exists_does_not_matter(
        toy, tmp_path, capsys):
    flags = ["--modality", "s1", "--data", toy, "--arch", "resnet18", *SMALL]
    with pytest.raises(ValueError, match="25 x 25 is not divisible"):
        said(capsys, *flags, "--img-size", "25")
    (tmp_path / "last.pt").write_bytes(b"a run")
    assert "in softcon_step:" in said(capsys, *flags, "--out", str(tmp_path))
    assert os.listdir(tmp_path) == ["last.pt"]
