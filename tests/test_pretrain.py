"""Claims about pretrain.py: schedules, order of the data, files, exact resume, refusals."""
import json
import os
import re
import shutil
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch

import pretrain
from conftest import ROOT, SMALL
from lab.kill import equal
from programs import script, script_with_few_blocks

pytestmark = pytest.mark.usefixtures("few_blocks")


def run(toy, out, *flags, modality="s1", arch="vit_tiny"):
    pretrain.main(["--modality", modality, "--data", toy, "--arch", arch, *SMALL,
                   "--out", str(out), *map(str, flags)])
    return torch.load(out / "last.pt", weights_only=True)


def test_cosine_climbs_from_zero_peaks_after_the_warm_up_and_ends_at_its_end():
    values = [pretrain.schedule(t, 100, 2.0, 0.5, warmup=10) for t in range(101)]
    assert values[0] == 0 and abs(values[1] - 2 / 9) < 1e-12 and values[9] == values[10] == 2.0
    assert abs(values[100] - 0.5) < 1e-12
    assert abs(values[55] - 1.25) < 1e-12 and np.all(np.diff(values[10:]) < 0)
    assert pretrain.schedule(0, 50, 0.99, 1) == 0.99 and pretrain.schedule(50, 50, 0.99, 1) == 1


def test_every_epoch_visits_each_scene_at_most_once_and_ranks_share_the_batches():
    args = pretrain.parse(["--modality", "s1", "--batch-size", "8", "--accum", "2"])
    scenes = np.arange(100, 143)                                      # 43: five batches and a rest
    one = list(pretrain.batches(scenes, args, 1, 0, 0, 10))
    assert len(one) == 20 and {len(b) for b in one} == {4}
    epoch = [i for b in one[:10] for i, _ in b]
    assert len(set(epoch)) == 40 and epoch != [i for b in one[10:] for i, _ in b]
    two = [list(pretrain.batches(scenes, args, 2, r, 0, 10)) for r in (0, 1)]
    assert [a + b for a, b in zip(*two)] == one
    assert list(pretrain.batches(scenes, args, 1, 0, 3, 10)) == one[6:]       # resuming skips ahead


def test_ranks_share_what_is_drawn_and_every_step_draws_anew():
    drawn = {"a": torch.arange(12.0), "b": torch.arange(24).view(12, 2)}           # 2 views x 6
    halves = [pretrain.StepRandomness(0, 5, 0, rank, 2).ours(drawn, 2) for rank in (0, 1)]
    assert halves[1]["a"].tolist() == [3, 4, 5, 9, 10, 11]
    for name, whole in drawn.items():
        both = torch.cat([half[name].unflatten(0, (2, 3)) for half in halves], 1).flatten(0, 1)
        assert torch.equal(both, whole)

    def first_draw(step, micro, rank):
        return torch.rand(3, generator=pretrain.StepRandomness(0, step, micro, rank, 2).generator)
    assert torch.equal(first_draw(5, 0, 0), first_draw(5, 0, 1))
    assert not torch.equal(first_draw(5, 0, 0), first_draw(6, 0, 0))
    assert not torch.equal(first_draw(5, 0, 0), first_draw(5, 1, 0))


def test_data_wait_is_the_time_the_loader_took(toy, tmp_path, monkeypatch):
    scenes = pretrain.data.Scenes
    real = scenes.__getitems__

    def slow(self, keys):
        time.sleep(0.2)
        return real(self, keys)
    monkeypatch.setattr(scenes, "__getitems__", slow)
    run(toy, tmp_path / "r", "--max-steps", 2)
    for row in map(json.loads, (tmp_path / "r" / "log.jsonl").read_text().splitlines()):
        assert row["data_wait"] * 16 / row["images_per_s"] > 0.2               # 16 images a step


@pytest.mark.parametrize("arch", ["resnet18", "vit_tiny"])
def test_k_steps_resume_and_k_steps_equal_2k_steps_bit_for_bit(toy, tmp_path, arch):
    whole = run(toy, tmp_path / "a", "--max-steps", 4, arch=arch)
    run(toy, tmp_path / "b", "--max-steps", 2, arch=arch)
    parts = run(toy, tmp_path / "b", "--max-steps", 4, "--resume", arch=arch)
    assert whole["step"] == parts["step"] == 4 and equal(whole, parts)
    logs = [[json.loads(x) for x in (tmp_path / n / "log.jsonl").read_text().splitlines()]
            for n in "ab"]
    assert [x["loss"] for x in logs[0]] == [x["loss"] for x in logs[1]]
    assert equal(*(torch.load(tmp_path / n / "backbone.pt", weights_only=True) for n in "ab"))


def test_a_run_leaves_its_four_files_and_the_teacher_alone_moves_by_averaging(
        toy, tmp_path, capsys):
    """Four steps to the end of the only epoch."""
    state = run(toy, tmp_path / "r", "--accum", 2, "--holdout", 0.5, "--epochs", 1, modality="s2c",
                arch="resnet18")
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == [
        "backbone.pt", "config.json", "last.pt", "log.jsonl"]
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["flags"]["modality"] == "s2c" and config["torch"] == torch.__version__
    log = [json.loads(x) for x in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == state["step"] == 4 and {
        "loss", "info_nce", "soft", "soft_share", "lr", "momentum", "images_per_s", "data_wait",
        "peak_memory_gb", "gradient_norm", "feature_std", "effective_rank", "epoch"} < set(log[0])
    assert abs(log[0]["loss"] - log[0]["info_nce"] - 0.1 * log[0]["soft"]) < 1e-4
    assert 0 < log[0]["soft_share"] < 1
    backbone = torch.load(tmp_path / "r" / "backbone.pt", weights_only=True)
    assert all(torch.equal(v, state["teacher"][f"backbone.{k}"]) for k, v in backbone.items())
    assert not torch.equal(backbone["conv1.weight"], state["student"]["backbone.conv1.weight"])
    assert not list((tmp_path / "r").glob("*.part"))


def test_tensorboard_gets_the_numbers_of_every_line_of_the_log(toy, tmp_path, monkeypatch):
    """A stand-in for the package; on resuming, what a lost run wrote beyond the checkpoint goes."""
    boards = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            self.folder, self.purge_step, self.rows, self.flushed = folder, purge_step, {}, 0
            boards.append(self)

        def add_scalar(self, name, value, step):
            self.rows.setdefault(step, {})[name] = round(value, 6)

        def flush(self):
            self.flushed = len(self.rows)
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run(toy, tmp_path / "r", "--max-steps", 2)
    assert not boards
    run(toy, tmp_path / "r", "--max-steps", 4, "--resume", "--tensorboard")
    log = [json.loads(x) for x in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    assert [b.rows for b in boards] == [{row["step"]: row for row in log[2:]}] and len(log) == 4
    assert (boards[0].folder, boards[0].purge_step) == (str(tmp_path / "r"), 3)
    assert boards[0].flushed == 2


def test_a_missing_tensorboard_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)                    # import fails
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^--tensorboard: .*tensorboard.*pip install tensorboard$"):
        pretrain.main(["--modality", "s1", "--tensorboard"])
    assert not list(tmp_path.iterdir())


def test_training_changes_with_the_seed_and_with_nothing_else(toy, tmp_path):
    a, b, c = (run(toy, tmp_path / n, "--max-steps", 2, "--seed", s) for n, s in
               (("a", 0), ("b", 0), ("c", 1)))
    assert equal(a, b) and not equal(a["student"], c["student"])


def test_initial_weights_come_from_the_file_named(toy, tmp_path, capsys):
    run(toy, tmp_path / "a", "--max-steps", 1, "--holdout", 0.8, modality="s2c", arch="resnet18")
    run(toy, tmp_path / "b", "--max-steps", 1, "--lr", 0, "--momentum", 1,
        "--init", tmp_path / "a" / "backbone.pt", arch="resnet18")
    assert "1 fresh" in capsys.readouterr().out
    a, b = (torch.load(tmp_path / n / "backbone.pt", weights_only=True) for n in "ab")
    assert torch.equal(a["layer4.0.conv2.weight"], b["layer4.0.conv2.weight"])
    assert a["conv1.weight"].shape[1] == 13 and b["conv1.weight"].shape[1] == 2


def test_without_labels_info_nce_alone_is_trained(toy, tmp_path, capsys):
    shutil.copytree(f"{toy}/s1", tmp_path / "w" / "s1")
    run(str(tmp_path / "w"), tmp_path / "r", "--max-steps", 1)
    assert "no labels: the soft term is 0" in capsys.readouterr().out
    log = json.loads((tmp_path / "r" / "log.jsonl").read_text())
    assert log["soft"] == 0 and log["loss"] == log["info_nce"] and log["soft_share"] == 0


@pytest.mark.parametrize("flags, message", [
    (["--data", "/nowhere"], "/nowhere: no such folder"),
    (["--modality", "s2a"], "/s2a: no such folder"),
    (["--img-size", "25"], "image size 25 x 25 is not divisible by patch size 6"),
    (["--batch-size", "1"], "--batch-size 1: softcon needs at least 2"),
    (["--batch-size", "4", "--accum", "4"], "softcon needs at least 2"),
    (["--batch-size", "9", "--accum", "2"], "9 does not divide into 1 rank"),
    (["--batch-size", "500"], "500 exceeds the .* training scenes"),
    (["--labels", "/nowhere.json"], "/nowhere.json: no such file"),
    (["--init", "/nowhere.pth"], "/nowhere.pth: No such file"),
    (["--mask-ratio", "1"], "mask ratio 1.0 leaves no patch"),
])
def test_bad_flags_are_named_and_leave_nothing_behind(toy, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message) as error:
        pretrain.main(["--modality", "s1", "--data", toy, "--arch", "resnet18", *SMALL,
                       "--out", str(tmp_path / "r"), *flags])
    assert "\n" not in str(error.value) and not (tmp_path / "r").exists()


@pytest.mark.parametrize("flags, message", [
    (["--ratios", "0.2", "0.2", "0.6"], "--ratios: has no effect on --method softcon"),
    (["--prototypes=64"], "--prototypes: has no effect on --method softcon"),
    (["--method", "pera", "--mask-ratio", "0.3"], "--mask-ratio: has no effect on --method pera"),
    (["--method", "pera", "--mask", "0.7"], "unrecognized arguments: --mask 0.7"),
    (["--holdout", "1.5"], "--holdout: 1.5 must lie in 0 to 0.99"),
    (["--epochs", "many"], "--epochs: 'many' is no int"),
    (["--lr", "nan"], "--lr: nan must lie in 0 to"),
    (["--weight-decay", "0.1", "-1"], "--weight-decay: -1 must lie in 0 to"),
    (["--method", "pera", "--teacher-tau", "0", "0"], "--teacher-tau: 0 must lie in 0.0001 to")])
def test_flags_of_the_other_method_and_out_of_range_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        pretrain.parse(["--modality", "s1", *flags])
    assert re.search(message, capsys.readouterr().err)


def test_a_value_given_wins_over_the_presets_and_the_first_output_says_so(capsys):
    args = pretrain.parse(["--modality", "s1", "--epochs", "3"])
    assert args.epochs == 3 and args.lr == pretrain.PRESETS["softcon", "toy"]["lr"]
    said = pretrain.describe_run(args, 1, torch.device("cpu"))
    assert "preset: softcon, toy; changed: epochs 3 instead of 28\n" in said
    args = pretrain.parse(["--modality", "s1", "--method", "pera", "--preset", "full"])
    for name, value in pretrain.PRESETS["pera", "full"].items():
        assert getattr(args, name) == value
    assert "preset: pera, full; changed: nothing\n" in pretrain.describe_run(
        args, 1, torch.device("cpu"))


def test_resume_starts_a_run_that_has_no_checkpoint_yet(toy, tmp_path, capsys):
    a = run(toy, tmp_path / "a", "--max-steps", 2, "--resume")
    assert "--resume: no " in capsys.readouterr().out
    assert equal(a, run(toy, tmp_path / "b", "--max-steps", 2))


def test_fewer_scenes_than_ranks_is_named(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    with pytest.raises(ValueError, match="--batch-size 8 does not divide into 16 rank"):
        pretrain.main(["--modality", "s1", "--data", toy, *SMALL, "--out", str(tmp_path / "r")])


def test_a_run_is_never_overwritten_and_resumes_only_with_its_own_flags(toy, tmp_path):
    run(toy, tmp_path / "r", "--max-steps", 1)
    before = (tmp_path / "r" / "last.pt").read_bytes()
    with pytest.raises(ValueError, match="holds a run; --resume continues it"):
        run(toy, tmp_path / "r", "--max-steps", 1)
    with pytest.raises(ValueError, match="--tau 0.1: the run in .* has 0.2"):
        run(toy, tmp_path / "r", "--resume", "--tau", 0.1)
    assert (tmp_path / "r" / "last.pt").read_bytes() == before


@pytest.mark.parametrize("name, flags, text", [
    ("pretrain.py", ["--modality", "s1", "--data", "/nowhere"],
     "pretrain.py: error: /nowhere: no such folder"),
    ("pretrain.py", ["--modality", "s1", "--arch", "resnet34"],
     "--arch: invalid choice: 'resnet34'"),
    ("pretrain.py", ["--modality", "s1", "--soft-wieght", "1"],
     "unrecognized arguments: --soft-wieght 1"),
    ("probe.py", ["--ckpt", "/nowhere.pt"], "probe.py: error: /nowhere.pt: No such file"),
    ("data.py", ["toy", "/tmp/", "--size", "13"],
     "data.py: error: /tmp: exists and is not the toy world"),
    ("model.py", ["inspect", "/nowhere.pt"], "/nowhere.pt: No such file"),
])
def test_scripts_end_bad_input_with_one_line_and_a_nonzero_exit(name, flags, text, tmp_path, start):
    done = start(script, name, *flags, folder=tmp_path).end()
    assert done.code != 0 and text in done.err.splitlines()[-1]
    assert "Traceback" not in done.err


def test_each_script_starts_in_an_interpreter_of_its_own(tmp_path):
    """As users start them, where nothing is imported yet; all at the same time."""
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    commands = {"pretrain.py": ["--modality", "s1", "--data", "/nowhere"],
                "probe.py": ["--ckpt", "/nowhere.pt"],
                "data.py": ["check", "/nowhere", "--modality", "s1"]}
    started = []
    for name, flags in commands.items():
        started.append(subprocess.Popen([sys.executable, str(ROOT / name), *flags], cwd=tmp_path,
                                        env=bare, stderr=subprocess.PIPE, text=True))
    for process in started:
        _, said = process.communicate()
        assert process.returncode == 1 and said.count("\n") == 1 and "/nowhere" in said


def script_without_compiler(*words):
    torch._inductor.config.cpp.cxx = ("/no/compiler",)
    script_with_few_blocks(*words)


def test_compile_without_a_compiler_says_so_and_trains_as_it_would_have(toy, tmp_path, start):
    flags = ["--modality", "s1", "--data", toy, "--arch", "vit_tiny", *SMALL, "--max-steps", "1"]
    program = start(script_without_compiler, "pretrain.py", *flags, "--out", tmp_path / "a",
                    "--compile", environment={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    pretrain.main([*flags, "--out", str(tmp_path / "b")])
    done = program.end()
    assert done.code == 0 and done.out.count("--compile: not here") == 1, done.err
    a, b = (torch.load(tmp_path / n / "backbone.pt", weights_only=True) for n in "ab")
    assert equal(a, b)
