"""Claims about a run that is killed, stopped, starved of disk, or fed files that cannot be read."""
import builtins
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import losses
import model
import pretrain
from conftest import ROOT
from kill import equal

FLAGS = ["--modality", "s1", "--arch", "vit_tiny", "--img-size", "12", "--patch-size", "6",
         "--hidden", "16", "--batch-size", "4", "--epochs", "50", "--log-every", "1",
         "--save-every", "100", "--workers", "0", "--holdout", "0.1"]
PERA = ["--method", "pera", "--prototypes", "16", "--local-size", "0", "--crops", "2", "0",
        "--ratios", "0.25", "0.25", "0.5", "--drop-path", "0.2", "--soft-weight", "0.3"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """30 scenes of 12 px."""
    return data.make_toy(str(tmp_path_factory.mktemp("toy") / "world"), 30, 12, seed=2, workers=1)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(model.VITS, "vit_tiny", (32, 2, 1))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")               # the same bits here and in a script
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(world, out, *flags):
    pretrain.main([*FLAGS, "--data", str(world), "--out", str(out), *map(str, flags)])
    return torch.load(out / "last.pt", weights_only=True)


def command(world, out, *flags, torchrun=()):
    """Start the script itself, its net made tiny by a line before it."""
    script = out.parent / "tiny.py"
    script.write_text("import model, pretrain, sys\nmodel.VITS['vit_tiny'] = (32, 2, 1)\n"
                      "sys.argv[0] = 'pretrain.py'\n"
                      + (ROOT / "pretrain.py").read_text().split("\n\n\n")[-1].replace(
                          "main(", "pretrain.main(").replace("listen", "pretrain.listen"))
    said = open(f"{out}.txt", "w")                                     # a pipe would fill up
    return subprocess.Popen([*(torchrun or [sys.executable]), str(script), *FLAGS, "--data", world,
                             "--out", str(out), *map(str, flags)], stdout=said, stderr=said)


def ended(process, out, seconds=90):
    """(exit code, what it said), without the progress bar"""
    code = process.wait(seconds)
    lines = Path(f"{out}.txt").read_text().splitlines()
    return code, "\n".join(x for x in lines if "it/s" not in x)


def wait_for(found, process, seconds=60):
    end = time.monotonic() + seconds
    while not found() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert found()


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
        data.pack(data.open_data(world, "s1", f"{world}/ssl4eo_multilabel.json"),
                  str(tmp_path / "packed"))
        world, flags = str(tmp_path / "packed"), flags[:-1]
    whole = run(world, tmp_path / "a", *flags, "--max-steps", 5)
    run(world, tmp_path / "b", *flags, "--max-steps", 3)
    parts = run(world, tmp_path / "b", *flags, "--max-steps", 5, "--resume")
    assert parts["step"] == 5 and equal(whole, parts)
    assert equal(*(torch.load(tmp_path / n / "backbone.pt", weights_only=True) for n in "ab"))


def test_killed_at_any_moment_and_resumed_a_run_ends_in_the_same_bits():
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "kill.py"), "--kills", "6"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == 6
    assert result["unreadable"] == 0 and result["identical"] and result["resumed_from"] > 1


@pytest.mark.parametrize("harm", ["cut", "garbage", "one bit", "gone", "empty"])
def test_of_a_damaged_checkpoint_the_one_before_is_taken_and_the_end_is_the_same(
        world, tmp_path, harm, capsys):
    whole = run(world, tmp_path / "a", "--save-every", 2, "--max-steps", 5)
    run(world, tmp_path / "b", "--save-every", 2, "--max-steps", 4)
    path, whole_bytes = tmp_path / "b" / "last.pt", (tmp_path / "b" / "last.pt").read_bytes()
    flipped = bytearray(whole_bytes)
    flipped[len(flipped) // 2] ^= 1
    path.write_bytes({"cut": whole_bytes[:-1000], "garbage": os.urandom(5000), "empty": b"",
                      "one bit": flipped, "gone": b""}[harm])
    if harm == "gone":                                     # killed between the two renames
        path.unlink()
    capsys.readouterr()
    assert equal(whole, run(world, tmp_path / "b", "--max-steps", 5, "--save-every", 2, "--resume"))
    said = [x for x in capsys.readouterr().out.splitlines() if "not a whole checkpoint" in x]
    assert len(said) == (harm != "gone") and all(f"{path}: " in x for x in said)
    assert torch.load(tmp_path / "b" / "last_1.pt", weights_only=True)["step"] == 4
    assert (tmp_path / "b" / "last.pt.damaged").exists() == (harm != "gone")
    for name in ("last.pt", "last_1.pt"):
        (tmp_path / "b" / name).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="last_1.pt: not a whole checkpoint of a run"):
        run(world, tmp_path / "b", "--max-steps", 5, "--resume")


def test_what_changes_the_maths_is_refused_by_its_name_unless_it_is_named(world, tmp_path, capsys):
    out, other = tmp_path / "r", tmp_path / "labels.json"
    run(world, out, "--max-steps", 1)
    table = json.loads((world_labels := os.path.join(world, "ssl4eo_multilabel.json"))
                       and open(world_labels).read())
    other.write_text(json.dumps({i: {p: ["1"] for p in mine} for i, mine in table.items()}))
    tree = tmp_path / "tree"
    shutil.copytree(world, tree)
    gone = next(i for i in sorted(os.listdir(tree / "s1")) if not data.held_out([i], 0.1)[0])
    for modality in ("s1", "s2c"):
        shutil.rmtree(tree / modality / gone)
    del table[gone]
    (tree / "ssl4eo_multilabel.json").write_text(json.dumps(table))
    for flags, name in ((["--tau", 0.1], "tau"), (["--holdout", 0.2], "holdout"),
                        (["--labels", other], "labels"), (["--data", tree], "data")):
        with pytest.raises(ValueError, match=f"^--{name} .*: the run in .* has .*; to change it: "
                                             f"--resume-with-changes {name}( data| labels)*$"):
            run(world, out, "--resume", "--max-steps", 2, *flags)
    with pytest.raises(ValueError, match="^--resume-with-changes tua: no flag that"):
        run(world, out, "--resume", "--tau", 0.1, "--resume-with-changes", "tau", "tua")
    run(world, out, "--resume", "--max-steps", 2, "--tau", 0.1, "--labels", other,
        "--resume-with-changes", "tau", "labels")
    assert "at step 1, changed: tau, labels" in capsys.readouterr().out and steps(out) == [1, 2]
    with pytest.raises(ValueError, match="last.pt: student does not fit"):
        run(world, out, "--resume", "--max-steps", 3, "--tau", 0.1, "--labels", other, "--hidden",
            32, "--resume-with-changes", "hidden")
    again = run(world, out, "--resume", "--max-steps", 2, "--tau", 0.1, "--labels", other)
    assert again["step"] == 2                                  # at its end already: nothing to do


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_saved_and_with_the_line_that_resumes(
        world, tmp_path, number):
    out = tmp_path / "r"
    process = command(world, out, "--max-steps", 10000, "--workers", 1, "--cache", 0)
    wait_for(lambda: len(steps(out)) > 2, process)
    os.kill(process.pid, number)
    code, said = ended(process, out)
    assert code == 0, said
    said = said.splitlines()
    step = torch.load(out / "last.pt", weights_only=True)["step"]
    assert said[-2] == f"stopped at step {step}, saved; to go on:" and steps(out)[-1] == step
    assert said[-1].startswith("python pretrain.py --modality s1") and said[-1].endswith("--resume")
    again = run(world, out, *said[-1].split()[-1:], "--max-steps", step + 2)
    assert equal(again, run(world, tmp_path / "whole", "--max-steps", step + 2))


def test_a_second_signal_ends_the_run_at_once(tmp_path):
    """In a step that lasts for ever: the first signal waits for its end, the second does not; one
    that follows at once, as torchrun passes it on, counts with the first."""
    process = subprocess.Popen([sys.executable, "-c", "import pretrain, time\npretrain.listen()\n"
                                "print('ready', flush=True)\nwhile True: time.sleep(0.01)"],
                               stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.terminate()
    time.sleep(0.1)
    process.terminate()
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 128 + signal.SIGINT


def children(pid):
    return [int(x) for x in open(f"/proc/{pid}/task/{pid}/children").read().split()]


def test_two_ranks_stop_together_resume_exactly_and_outlive_the_death_of_one(world, tmp_path):
    """One run left alone; one stopped by SIGTERM and resumed; one whose second rank is killed."""
    out = tmp_path / "b"
    process = command(world, out, "--max-steps", 300, "--workers", 1, "--cache", 0,
                      torchrun=TORCHRUN)
    wait_for(lambda: len(steps(out)) > 2, process)
    process.terminate()
    said = ended(process, out)[1]
    step = torch.load(out / "last.pt", weights_only=True)["step"]
    assert f"stopped at step {step}, saved; to go on:\ntorchrun --nproc-per-node 2 " in said
    assert 2 < step < 300
    end = ["--max-steps", step + 30]
    process = command(world, out, *end, "--resume", torchrun=TORCHRUN)
    assert ended(process, out)[0] == 0
    whole = command(world, tmp_path / "a", *end, torchrun=TORCHRUN)
    assert ended(whole, tmp_path / "a")[0] == 0
    whole = torch.load(tmp_path / "a" / "last.pt", weights_only=True)
    assert equal(whole, torch.load(out / "last.pt", weights_only=True))

    out = tmp_path / "c"
    process = command(world, out, *end, "--save-every", 2,
                      torchrun=[*TORCHRUN, "--max-restarts", "1"])
    wait_for(lambda: len(steps(out)) > 4, process)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    code, said = ended(process, out)
    assert code == 0, said
    assert f"resumed {out}/last.pt at step" in said
    assert equal(whole, torch.load(out / "last.pt", weights_only=True))


def test_the_death_of_a_rank_ends_the_others_and_shows_why(world, tmp_path):
    process = command(world, tmp_path / "r", "--max-steps", 10000, torchrun=TORCHRUN)
    wait_for(lambda: len(steps(tmp_path / "r")) > 1, process)
    ranks = children(process.pid)
    os.kill(ranks[1], signal.SIGKILL)
    code, said = ended(process, tmp_path / "r")
    assert code != 0 and "Signal 9 (SIGKILL)" in said
    assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks)


def test_another_number_of_ranks_goes_on_and_says_what_is_not_exact(world, tmp_path, capsys):
    out = tmp_path / "r"
    state = run(world, out, "--max-steps", 2)
    torch.save(state | {"world": 4}, out / "last.pt")
    assert run(world, out, "--max-steps", 3, "--resume")["world"] == 1
    said = capsys.readouterr().out
    assert "1 ranks instead of 4: data, draws and schedules go on; not exact are" in said


@pytest.mark.parametrize("name", ["last.pt", "backbone.pt", "log.jsonl"])
def test_a_full_disk_is_said_in_one_line_and_leaves_the_old_checkpoints(
        world, tmp_path, name, monkeypatch):
    """/dev/full, where every write fails for want of space, in place of the file beside."""
    out = tmp_path / "r"
    run(world, out, "--max-steps", 2, "--save-every", 1)
    before = {n: (out / n).read_bytes() for n in ("last.pt", "last_1.pt", "backbone.pt")}
    (out / f"{name}.part").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=f"r/{name}: not written; what was there") as error:
        run(world, out, "--max-steps", 4, "--save-every", 1, "--resume")
    assert "\n" not in str(error.value) and not list(out.glob("*.part"))
    assert all((out / n).read_bytes() == b for n, b in before.items() if name != "last.pt"
               or n != "backbone.pt")
    run(world, out, "--max-steps", 4, "--save-every", 1, "--resume")
    assert equal(torch.load(out / "last.pt", weights_only=True),
                 run(world, tmp_path / "whole", "--max-steps", 4))


def test_a_line_of_the_log_that_cannot_be_written_names_the_log(world, tmp_path, monkeypatch):
    replace = os.replace

    def and_fill(part, path):
        replace(part, path)
        if path.name == "log.jsonl" if hasattr(path, "name") else False:
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
def broken(tmp_path):
    """120 scenes, some 108 to train on, of which one lacks a band in every season."""
    tree = tmp_path / "tree"
    data.make_toy(str(tree), 120, 12, seed=2, workers=1)
    scene = [i for i in sorted(os.listdir(tree / "s1")) if not data.held_out([i], 0.1)[0]][7]
    for product in (tree / "s1" / scene).iterdir():
        (product / "VH.tif").unlink()
    return tree, scene


def test_a_bad_file_stops_the_run_by_its_name_and_with_skip_is_replaced(
        broken, tmp_path, capsys):
    tree, scene = broken
    for cache in (4, 0):
        with pytest.raises(ValueError, match=f"s1/{scene}/.*/VH.tif: missing"):
            run(tree, tmp_path / "stop", "--cache", cache, "--max-steps", 30)
    capsys.readouterr()
    products = sorted((tree / "s1" / scene).iterdir())
    for product in products[1:]:                        # one file of some 108 scenes is below 1 %
        shutil.copy(product / "VV.tif", product / "VH.tif")
    flags = ["--on-bad", "skip", "--max-steps", 30]
    one = run(tree, tmp_path / "a", *flags)
    said = [x for x in capsys.readouterr().out.splitlines() if x.startswith("--on-bad skip")]
    assert said == [f"--on-bad skip: {products[0]}/VH.tif: missing"]
    assert equal(one, run(tree, tmp_path / "b", *flags, "--workers", 2, "--cache", 0))
    other = [i for i in sorted(os.listdir(tree / "s1")) if not data.held_out([i], 0.1)[0]][9]
    for product in (tree / "s1" / other).iterdir():
        (product / "VH.tif").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="--on-bad skip: 2 bad files are more than 1 % of"):
        run(tree, tmp_path / "c", *flags)


def test_a_replacement_depends_on_the_key_alone_and_comes_from_the_training_scenes(world):
    scenes, train = data.open_data(world, "s1"), np.arange(3, 9)
    good = scenes[5, (0, 0, 5)]
    spare = pretrain.Spare(scenes, train)
    x, y, reasons = spare[[(5, (0, 0, 5)), (4, (0, 0, 4))]]
    assert np.array_equal(x[0], good[0]) and np.array_equal(y[0], good[1]) and not reasons
    scenes.files[5] = ["nowhere"] * 4
    taken = set()
    for epoch in range(20):
        key = (5, (0, epoch, 5))
        x, y, reasons = spare[[key]]
        assert reasons[0].splitlines()[0] == "nowhere/VV.tif: missing"
        assert np.array_equal(x, spare[[key]][0])
        match = [i for i in range(len(scenes)) if i != 5 and np.array_equal(
            x[0], scenes[i, (0, epoch, 5)][0])]
        assert len(match) == 1
        taken |= set(match)
    assert taken == set(train.tolist()) - {5}


@pytest.mark.parametrize("harm", ["deleted", "garbage"])
def test_a_file_lost_during_the_run_is_named_or_replaced(world, tmp_path, harm, monkeypatch):
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
    """It occurs in step 3, of which nothing is logged; it is noticed in step 5, which is."""
    out, seen, real, Adam = tmp_path / "r", [], losses.softcon_loss, torch.optim.AdamW
    flags = ["--log-every", 3, "--max-steps", 9, "--save-every", 3, "--accum", 1]
    optimisers, calls = [], []

    def spoilt(q, *rest):
        calls.append(0)
        loss, *parts = real(q, *rest)
        if len(calls) in (7, 8):                                      # two directions a step
            loss = loss + torch.inf if what == "loss" else loss + (q * 0).pow(0.5).sum()
        return loss, *parts
    monkeypatch.setattr(losses, "softcon_loss", spoilt)
    monkeypatch.setattr(torch.optim, "AdamW",
                        lambda *a, **k: optimisers.append(Adam(*a, **k)) or optimisers[0])
    with pytest.raises(ValueError, match="step 3: loss .*, gradient norm .*; stopped before the "
                                         "weights changed") as error:
        run(world, out, *flags)
    assert ("inf" if what == "loss" else "nan") in str(error.value)
    dump = json.loads((out / "bad_step.json").read_text())
    scenes = data.open_data(world, "s1")
    order = np.random.default_rng([0, 0]).permutation(
        np.flatnonzero(~data.held_out(scenes.ids, 0.1)))
    assert dump["step"] == 3 and dump["scenes"] == [scenes.ids[i] for i in order[12:16]]
    good = torch.load(out / "last.pt", weights_only=True)
    assert good["step"] == 3 and len(calls) == 12
    assert equal(optimisers[0].state_dict()["state"], good["optimiser"]["state"])
    weights = [p for g in optimisers[0].param_groups for p in g["params"]]
    net = [v for k, v in good["student"].items()]
    assert all(any(torch.equal(p, v) for v in net) for p in weights)


def test_collapse_is_said_once_after_ten_logged_steps(world, tmp_path, capsys, monkeypatch):
    low = iter([1] * 9 + [0] + [1] * 12)
    monkeypatch.setattr(losses, "collapse", lambda f: (0.01, 1.2) if next(low) else (0.5, 9.0))
    run(world, tmp_path / "r", "--max-steps", 22, "--warmup", 0)
    said = [x for x in capsys.readouterr().out.splitlines() if "features collapse" in x]
    assert len(said) == 1 and said[0].startswith("step 20: ")


def test_a_killed_probe_leaves_whole_features_or_none_and_the_next_one_ends_in_the_same(
        toy, tmp_path):
    path, cache = tmp_path / "b.pt", tmp_path / "cache"
    torch.save(model.export_backbone(model.build("resnet18", 2)), path)
    command = [sys.executable, str(ROOT / "probe.py"), "--ckpt", str(path), "--data", toy,
               "--holdout", "0.4", "--img-size", "64", "--workers", "0", "--seeds", "3", "--cache",
               str(cache)]
    wait = np.random.default_rng(0).uniform(2, 5, 3)
    for seconds in wait:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        process.kill()
        process.wait()
        for file in cache.glob("*.npy") if cache.exists() else ():
            assert np.isfinite(np.load(file)).all()
    again = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=True).stdout
    fresh = subprocess.run(command[:-2], capture_output=True, text=True, check=True).stdout
    assert again == fresh and len(list(cache.glob("*.npy"))) == 5
