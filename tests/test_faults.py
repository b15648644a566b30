"""Claims about a run that is killed, stopped, starved of disk, or fed files that cannot be read."""
import builtins
import errno
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.run

import data
import losses
import model
import pretrain
from conftest import run_script
from lab.kill import equal
from programs import end_well, rank_environments, script

FLAGS = ["--modality", "s1", "--arch", "vit_tiny", "--img-size", "12", "--patch-size", "6",
         "--hidden", "16", "--batch-size", "4", "--epochs", "50", "--log-every", "1",
         "--save-every", "100", "--workers", "0", "--holdout", "0.1",
         "--preset", "full"]
PERA = ["--method", "pera", "--prototypes", "16", "--local-size", "0", "--crops", "2", "0",
        "--ratios", "0.25", "0.25", "0.5", "--drop-path", "0.2", "--soft-weight", "0.3"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """30 scenes of 12 px."""
    return data.make_toy(str(tmp_path_factory.mktemp("toy") / "world"), 30, 12, seed=2, workers=1)


TINY = {"width": 32, "depth": 2, "heads": 1}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(model.VITS, "vit_tiny", TINY)


def flags_of(world, out, *flags):
    return [*FLAGS, "--data", str(world), "--out", str(out), *map(str, flags)]


def run(world, out, *flags):
    pretrain.main(flags_of(world, out, *flags))
    return torch.load(out / "last.pt", weights_only=True)


def tiny_script(name, *flags):
    """What a program does: a script with the tiny net."""
    model.VITS["vit_tiny"] = TINY
    script(name, *flags)


def wait_for(found, program, seconds=60):
    end = time.monotonic() + seconds
    while not found():                            # once is enough: what is found may pass
        assert time.monotonic() < end and (program.running() or found())
        time.sleep(0.01)


def steps(out):
    log = out / "log.jsonl"
    return [json.loads(x)["step"] for x in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.parametrize("flags", [
    ["--accum", 2, "--save-every", 2],
    ["--workers", 2, "--cache", 0],                                   # read from TIFF, in processes
    ["--clip", 1, "--drop-path", 0.3, "--jitter", 0.4],
    [*PERA, "--accum", 2],
    [*PERA, "--workers", 1, "--cache", 0],
    ["--workers", 2, "--cache", 0, "--packed"]],
    ids=["accum", "tiff", "drop", "pera", "pera-tiff", "packed"])
def test_a_run_resumed_in_the_middle_of_an_epoch_ends_in_the_same_bits(world, tmp_path, flags):
    if flags[-1] == "--packed":
        data.pack(data.open_data(world, data.SENSORS["s1"], f"{world}/ssl4eo_multilabel.json"),
                  str(tmp_path / "packed"))
        world, flags = str(tmp_path / "packed"), flags[:-1]
    whole = run(world, tmp_path / "a", *flags, "--max-steps", 5)
    run(world, tmp_path / "b", *flags, "--max-steps", 3)
    parts = run(world, tmp_path / "b", *flags, "--max-steps", 5, "--resume")
    assert parts["step"] == 5 and equal(whole, parts)
    assert equal(*(torch.load(tmp_path / n / "backbone.pt", weights_only=True) for n in "ab"))


def test_killed_at_any_moment_and_resumed_a_run_ends_in_the_same_bits():
    # two kills while the training starts, two amid its steps, two while it saves
    status, output = run_script("kill.py", "--kills", 6)
    assert status == 0, output[-2000:]
    result = json.loads(output.splitlines()[-1])
    assert result["kills"] == 6
    assert result["unreadable"] == 0 and result["identical"] and result["different_steps"] > 1


@pytest.mark.parametrize("harm", ["cut", "garbage", "one bit", "empty"])
def test_a_damaged_checkpoint_is_named_and_left_and_without_it_resume_starts_anew(
        world, tmp_path, harm):
    out = tmp_path / "b"
    run(world, out, "--max-steps", 2)
    whole = (out / "last.pt").read_bytes()
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 1
    damaged = {"cut": whole[:-1000], "garbage": os.urandom(5000), "empty": b"",
               "one bit": bytes(flipped)}[harm]
    (out / "last.pt").write_bytes(damaged)
    with pytest.raises(ValueError, match="b/last.pt: not a whole checkpoint of a run") as error:
        run(world, out, "--max-steps", 3, "--resume")
    assert "\n" not in str(error.value) and (out / "last.pt").read_bytes() == damaged
    (out / "last.pt").unlink()
    assert equal(run(world, out, "--max-steps", 3, "--resume"),
                 run(world, tmp_path / "a", "--max-steps", 3))


def test_a_resumed_run_refuses_other_flags_by_name(world, tmp_path):
    out = tmp_path / "r"
    run(world, out, "--max-steps", 1)
    before = (out / "last.pt").read_bytes()
    for flags, message in ((["--tau", 0.1], "--tau 0.1: the run in .* has 0.2"),
                           (["--holdout", 0.2], "--holdout 0.2: the run in .* has 0.1"),
                           (["--hidden", 32], "--hidden 32: the run in .* has 16")):
        with pytest.raises(ValueError, match=message):
            run(world, out, "--resume", "--max-steps", 2, *flags)
    assert (out / "last.pt").read_bytes() == before and steps(out) == [1]
    state = torch.load(out / "last.pt", weights_only=True)
    del state["student"]["backbone.norm.weight"]
    torch.save(state, out / "last.pt")
    with pytest.raises(ValueError, match="last.pt: student does not fit"):
        run(world, out, "--resume", "--max-steps", 2)


def test_a_resumed_run_says_that_scenes_or_labels_are_others_and_goes_on(world, tmp_path, capsys):
    out = tmp_path / "r"
    run(world, out, "--max-steps", 1)
    table = json.loads(Path(world, "ssl4eo_multilabel.json").read_text())
    for products in table.values():
        products |= {name: ["1"] for name in products}
    other = tmp_path / "labels.json"
    other.write_text(json.dumps(table))
    capsys.readouterr()
    run(world, out, "--resume", "--max-steps", 2, "--labels", other)
    said = capsys.readouterr().out
    assert "other labels than before" in said and "other scenes" not in said
    assert steps(out) == [1, 2]

    tree = tmp_path / "tree"
    shutil.copytree(world, tree)
    gone = next(i for i in sorted(os.listdir(tree / "s1")) if not data.held_out([i], 0.1)[0])
    for modality in ("s1", "s2c"):
        shutil.rmtree(tree / modality / gone)
    del table[gone]
    (tree / "ssl4eo_multilabel.json").write_text(json.dumps(table))
    assert run(tree, out, "--resume", "--max-steps", 3, "--labels",
               tree / "ssl4eo_multilabel.json")["step"] == 3
    said = re.search(r"other scenes than before: (\d+) scenes, .* were (\d+) scenes,",
                     capsys.readouterr().out)
    assert int(said[1]) == int(said[2]) - 1
    assert run(tree, out, "--resume", "--max-steps", 3)["step"] == 3       # nothing left to do


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_saved_and_says_how_to_go_on(
        world, tmp_path, number, start):
    out = tmp_path / "r"
    flags = flags_of(world, out, "--max-steps", 10000, "--workers", 1, "--cache", 0)
    program = start(tiny_script, "pretrain.py", *flags)
    wait_for(lambda: len(steps(out)) > 2, program)
    os.kill(program.pid, number)
    done = program.end()
    assert done.code == 0, done.err
    step = torch.load(out / "last.pt", weights_only=True)["step"]
    assert done.out.splitlines()[-1] == (
        f"stopped at step {step}, saved; the same command with --resume goes on")
    assert steps(out)[-1] == step
    again = run(world, out, "--resume", "--max-steps", step + 2)
    assert equal(again, run(world, tmp_path / "whole", "--max-steps", step + 2))


def endless_step():
    pretrain.catch_signals()
    print("ready", flush=True)
    while True:
        time.sleep(0.01)


def test_a_second_signal_ends_the_run_at_once(start):
    """In a step that lasts for ever: the first signal waits for its end, the second does not; one
    that follows at once, as torchrun passes it on, counts with the first."""
    program = start(endless_step)
    wait_for(lambda: "ready" in program.out(), program)
    os.kill(program.pid, signal.SIGTERM)
    time.sleep(0.1)
    os.kill(program.pid, signal.SIGTERM)
    time.sleep(1.2)
    assert program.running()
    os.kill(program.pid, signal.SIGINT)
    assert program.end().code == 128 + signal.SIGINT


# ------------------------------------------------------------------------------------ several ranks


def train_on_two_ranks(start, *flags):
    """Two programs that know of each other, to their end."""
    ranks = []
    for place in rank_environments(2):
        ranks.append(start(tiny_script, "pretrain.py", *flags, environment=place))
    end_well(ranks)


def torchrun(*words):
    """What a program does that is torchrun with two ranks."""
    torch.distributed.run.main(["--standalone", "--nproc-per-node", "2", *map(str, words)])


def children(pid):
    return [int(x) for x in open(f"/proc/{pid}/task/{pid}/children").read().split()]


@pytest.fixture
def tiny_file(tmp_path):
    """pretrain.py with the tiny net, as a file for torchrun."""
    path = tmp_path / "tiny.py"
    path.write_text("import sys\n"
                    "import test_faults\n"
                    "test_faults.tiny_script('pretrain.py', *sys.argv[1:])\n")
    return path


def test_the_death_of_a_rank_ends_the_others_and_shows_why(world, tmp_path, tiny_file, start):
    """torchrun starts new processes, as for users.  Of forked ranks it may name the survivor."""
    out = tmp_path / "r"
    program = start(torchrun, tiny_file, *flags_of(world, out, "--max-steps", 10000))
    wait_for(lambda: len(steps(out)) > 1, program)
    ranks = children(program.pid)
    os.kill(ranks[1], signal.SIGKILL)
    done = program.end()
    assert done.code != 0 and "Signal 9 (SIGKILL)" in done.err
    assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks)


# torchrun's ranks are forks of it that run the file themselves: none imports PyTorch again
FORKED = ["--run-path", "--start-method", "fork"]


def test_two_ranks_start_again_after_the_death_of_one_and_end_in_the_same_bits(
        world, tmp_path, tiny_file, start):
    """Compared with a run that nobody killed, of two programs without torchrun."""
    end = ["--max-steps", 20, "--save-every", 3]
    out = tmp_path / "b"
    program = start(torchrun, *FORKED, "--max-restarts", 1, tiny_file, *flags_of(world, out, *end))
    wait_for(lambda: len(steps(out)) > 4, program)
    os.kill(children(program.pid)[1], signal.SIGKILL)
    done = program.end()
    assert done.code == 0, done.err
    assert f"resumed {out}/last.pt at step" in done.out
    train_on_two_ranks(start, *flags_of(world, tmp_path / "a", *end))
    whole = torch.load(tmp_path / "a" / "last.pt", weights_only=True)
    assert equal(whole, torch.load(out / "last.pt", weights_only=True))


def test_two_ranks_under_torchrun_stop_together_and_resume_exactly(
        world, tmp_path, tiny_file, start):
    """torchrun starts new processes, as for users.  Forked ranks that have ended wait until it has
    read what they returned, and a stopped torchrun does not: it kills them after 30 seconds."""
    out = tmp_path / "b"
    flags = flags_of(world, out, "--max-steps", 10000, "--workers", 1, "--cache", 0)
    program = start(torchrun, tiny_file, *flags)
    wait_for(lambda: len(steps(out)) > 2, program)
    os.kill(program.pid, signal.SIGTERM)
    done = program.end()                          # its exit status says that it was stopped
    step = torch.load(out / "last.pt", weights_only=True)["step"]
    assert f"stopped at step {step}, saved" in done.out
    assert 2 < step < 10000

    end = ["--max-steps", step + 10]
    flags = flags_of(world, out, *end, "--resume")
    done = start(torchrun, *FORKED, tiny_file, *flags).end()
    assert done.code == 0, done.err
    train_on_two_ranks(start, *flags_of(world, tmp_path / "a", *end))
    whole = torch.load(tmp_path / "a" / "last.pt", weights_only=True)
    assert equal(whole, torch.load(out / "last.pt", weights_only=True))


def test_another_number_of_ranks_goes_on_and_says_what_is_not_exact(world, tmp_path, capsys):
    out = tmp_path / "r"
    state = run(world, out, "--max-steps", 2)
    torch.save(state | {"world": 4}, out / "last.pt")
    assert run(world, out, "--max-steps", 3, "--resume")["world"] == 1
    said = capsys.readouterr().out
    assert "1 ranks instead of 4: data, draws and schedules go on; not exact are" in said


# ------------------------------------------------------------ disks, files and numbers that fail


@pytest.mark.parametrize("name", ["last.pt", "backbone.pt", "log.jsonl"])
def test_a_full_disk_is_said_in_one_line_and_leaves_the_old_checkpoints(
        world, tmp_path, name, monkeypatch):
    """/dev/full, where every write fails for want of space, in place of the file beside."""
    out = tmp_path / "r"
    run(world, out, "--max-steps", 2, "--save-every", 1)
    before = (out / "last.pt").read_bytes()
    (out / f"{name}.part").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=f"r/{name}: not written; what was there") as error:
        run(world, out, "--max-steps", 4, "--save-every", 1, "--resume")
    assert "\n" not in str(error.value) and not list(out.glob("*.part"))
    assert (out / "last.pt").read_bytes() == before
    run(world, out, "--max-steps", 4, "--save-every", 1, "--resume")
    assert equal(torch.load(out / "last.pt", weights_only=True),
                 run(world, tmp_path / "whole", "--max-steps", 4))


def test_a_line_of_the_log_that_cannot_be_written_names_the_log(world, tmp_path, monkeypatch):
    replace = os.replace

    def and_fill(part, path):
        replace(part, path)
        if Path(path).name == "log.jsonl":
            path.unlink()
            path.symlink_to("/dev/full")
    monkeypatch.setattr(os, "replace", and_fill)
    with pytest.raises(ValueError, match="log.jsonl: not written .*No space left"):
        run(world, tmp_path / "r", "--max-steps", 2)


@pytest.mark.parametrize("after", [0, 5000])
def test_a_write_that_fails_half_way_leaves_the_old_checkpoints(
        world, tmp_path, after, monkeypatch):
    out = tmp_path / "r"
    run(world, out, "--max-steps", 2, "--save-every", 1)
    before = {p.name: p.read_bytes() for p in out.glob("last*.pt")}
    save = torch.save

    def half(state, file):
        save(state, path := f"{tmp_path}/whole.pt")
        file.write(open(path, "rb").read()[:after])
        raise OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(ValueError, match="backbone.pt: not written.*Input/output error"):
        run(world, out, "--max-steps", 4, "--resume")
    assert before == {p.name: p.read_bytes() for p in out.glob("last*.pt")}
    assert not list(out.glob("*.part"))


def test_a_folder_that_cannot_be_written_is_named(world, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/r"):
        run(world, tmp_path / "file" / "r", "--max-steps", 1)
    real = builtins.open

    def read_only(path, mode="r", *rest, **more):
        if str(path).startswith(str(tmp_path / "r")) and mode[0] != "r":
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, mode, *rest, **more)
    monkeypatch.setattr(builtins, "open", read_only)
    with pytest.raises(ValueError, match="r/config.json: not written.*Read-only file system"):
        run(world, tmp_path / "r", "--max-steps", 1)


@pytest.fixture
def broken(world, tmp_path):
    """30 scenes, 28 to train on, of which one lacks a band in every season."""
    tree = tmp_path / "tree"
    shutil.copytree(world, tree)
    scene = [i for i in sorted(os.listdir(tree / "s1")) if not data.held_out([i], 0.1)[0]][7]
    for product in (tree / "s1" / scene).iterdir():
        (product / "VH.tif").unlink()
    return tree, scene


def test_a_bad_file_stops_the_run_by_its_name(broken, tmp_path):
    tree, scene = broken
    for cache in (4, 0):
        with pytest.raises(ValueError, match=f"s1/{scene}/.*/VH.tif: missing"):
            run(tree, tmp_path / "stop", "--cache", cache, "--max-steps", 30)


@pytest.mark.parametrize("harm", ["deleted", "garbage"])
def test_a_file_lost_during_the_run_is_named_and_when_it_is_back_the_run_goes_on(
        world, tmp_path, harm, monkeypatch):
    tree, update = tmp_path / "tree", model.ema_update
    shutil.copytree(world, tree)
    scene = np.random.default_rng([0, 0]).permutation(np.flatnonzero(~data.held_out(
        sorted(os.listdir(tree / "s1")), 0.1)))[9]                      # seen in the third step
    products = sorted((tree / "s1" / f"{scene:07d}").iterdir())

    def and_lose(*args):
        update(*args)
        for product in products:
            if harm == "garbage":
                (product / "VV.tif").write_bytes(os.urandom(999))
            else:
                (product / "VV.tif").unlink(missing_ok=True)
    monkeypatch.setattr(model, "ema_update", and_lose)
    flags = ["--cache", 0, "--max-steps", 5, "--save-every", 1]
    with pytest.raises(ValueError, match=f"{scene:07d}/.*/VV.tif: (missing|unreadable TIFF)"):
        run(tree, tmp_path / "r", *flags)
    assert torch.load(tmp_path / "r" / "last.pt", weights_only=True)["step"] == 2
    shutil.copytree(world, tree, dirs_exist_ok=True)
    monkeypatch.setattr(model, "ema_update", update)
    assert equal(run(tree, tmp_path / "r", *flags, "--resume"), run(world, tmp_path / "a", *flags))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_number_that_is_not_finite_moves_no_weight_and_names_the_scenes(
        world, tmp_path, what, monkeypatch):
    """It occurs in step 3, counted from 0."""
    calls = []
    optimisers = []
    AdamW = torch.optim.AdamW
    softcon_loss = losses.softcon_loss

    def spoilt(q, *args, **kwargs):
        calls.append(0)
        loss, *parts = softcon_loss(q, *args, **kwargs)
        if len(calls) in (7, 8):                                      # two directions a step
            loss = loss * torch.inf if what == "loss" else loss + (q * 0).pow(0.5).sum()
        return loss, *parts

    def remembered(*args, **kwargs):
        optimisers.append(AdamW(*args, **kwargs))
        return optimisers[0]
    monkeypatch.setattr(losses, "softcon_loss", spoilt)
    monkeypatch.setattr(torch.optim, "AdamW", remembered)
    out = tmp_path / "r"
    with pytest.raises(ValueError, match="step 3: loss .*, gradient norm .*; stopped before the "
                                         "weights changed") as error:
        run(world, out, "--log-every", 3, "--max-steps", 9, "--save-every", 3)
    assert ("inf" if what == "loss" else "nan") in str(error.value)
    dump = json.loads((out / "bad_step.json").read_text())
    scenes = data.open_data(world, data.SENSORS["s1"])
    order = np.random.default_rng([0, 0]).permutation(
        np.flatnonzero(~data.held_out(scenes.ids, 0.1)))
    assert dump["step"] == 3 and dump["scenes"] == [scenes.ids[i] for i in order[12:16]]

    good = torch.load(out / "last.pt", weights_only=True)
    assert good["step"] == 3 and len(calls) == 8
    assert equal(optimisers[0].state_dict()["state"], good["optimiser"]["state"])
    for group in optimisers[0].param_groups:
        for weight in group["params"]:
            assert any(torch.equal(weight, saved) for saved in good["student"].values())


def test_collapse_is_said_once_after_ten_logged_steps(world, tmp_path, capsys, monkeypatch):
    low = iter([1] * 9 + [0] + [1] * 12)
    monkeypatch.setattr(losses, "collapse", lambda f: (0.01, 1.2) if next(low) else (0.5, 9.0))
    run(world, tmp_path / "r", "--max-steps", 22, "--warmup", 0)
    said = [x for x in capsys.readouterr().out.splitlines() if "features collapse" in x]
    assert len(said) == 1 and said[0].startswith("step 20: ")


def probe_with_a_slow_disk(*flags):
    """probe.py where the disk takes half a second to write a file."""
    fsync = os.fsync

    def slowly(file):
        time.sleep(0.5)
        fsync(file)
    os.fsync = slowly
    tiny_script("probe.py", *flags)


def test_a_killed_probe_leaves_whole_features_or_none_and_the_next_one_ends_in_the_same(
        toy, tmp_path, start):
    """Killed soon after its start, while it writes the first and while it writes the third of five
    files of features."""
    path, cache = tmp_path / "b.pt", tmp_path / "cache"
    torch.save(model.export_backbone(model.build("vit_tiny", 2, 24, 6)), path)
    flags = ["--ckpt", path, "--data", toy, "--holdout", 0.4, "--workers", 0, "--seeds", 3]
    with_cache = [*flags, "--cache", cache]
    fresh = start(tiny_script, "probe.py", *flags)

    def is_writing(program, whole_files):
        part = list(cache.glob(f"*.part{program.pid}"))
        return part and len(list(cache.glob("*.npy"))) >= whole_files

    for whole_files in (None, 0, 2):
        program = start(probe_with_a_slow_disk, *with_cache)
        if whole_files is None:
            time.sleep(0.3)
        else:
            wait_for(lambda: is_writing(program, whole_files), program)
        program.kill()
        for file in cache.glob("*.npy"):
            assert np.isfinite(np.load(file)).all()
    assert len(list(cache.glob("*.npy"))) == 2
    again = start(tiny_script, "probe.py", *with_cache).end()
    assert again.code == 0 and again.out == fresh.end().out
    assert len(list(cache.glob("*.npy"))) == 5
