"""Kill a small training again and again, resume it, and compare its end with a run left alone.

    python tests/lab/kill.py --kills 50            about a second a kill; the last line is JSON

SIGKILL falls in turn at a random moment of the steps, of writing a checkpoint, and of the start.
After each kill every checkpoint in the folder is read.  Exit code 1 if one cannot be read, or if
the end differs in a bit.
"""
import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401        # which the first optimiser imports; here, forks have it
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))
import data  # noqa: E402
import model  # noqa: E402
import pretrain  # noqa: E402

FLAGS = ["--modality", "s1", "--arch", "vit_tiny", "--img-size", "12", "--patch-size", "6",
         "--hidden", "16", "--batch-size", "4", "--accum", "2", "--epochs", "1000", "--save-every",
         "2", "--log-every", "1", "--drop-path", "0.1"]


def train(folder, out, *flags):
    """pretrain.py with a tiny ViT in folder/out; what it prints goes to folder/out.txt."""
    model.VITS["vit_tiny"] = dict(width=32, depth=2, heads=1)     # steps of milliseconds
    sys.stderr = open(os.devnull, "w")
    sys.stdout = open(f"{folder}/{out}.txt", "a")
    with sys.stdout:
        pretrain.main([*FLAGS, "--data", f"{folder}/world", "--out", f"{folder}/{out}", *flags])


def start(*args):
    """`train` in a forked process, so that a run begins without loading torch anew."""
    process = multiprocessing.get_context("fork").Process(target=train, args=args)
    process.start()
    return process


def written(path):
    """When the file was last written; None if it is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def equal(a, b):
    """Are two states, of tensors, dicts, lists and numbers, the same to the bit?"""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def wait_for_writes(process, path, count):
    """Returns when the file was written at least `count` times, or the process has ended."""
    for _ in range(count):
        before = written(path)
        while process.is_alive() and written(path) in (None, before):
            time.sleep(0.0002)


def kill_at_random(process, out, kind, per_step, rng):
    """Kills the process at a random moment.  Returns False if it had ended by itself.

    kind: "steps", up to four steps after one of the first three lines of the log;
          "saving", up to 5 ms after one of the first three writes of last.pt.part;
          "start", in the first 0.3 s.
    """
    if kind == "steps":
        wait_for_writes(process, out / "log.jsonl", rng.randint(1, 3))
        time.sleep(rng.uniform(0, 4 * per_step))
    elif kind == "saving":
        wait_for_writes(process, out / "last.pt.part", rng.randint(1, 3))
        time.sleep(rng.uniform(0, 0.005))
    else:
        time.sleep(rng.uniform(0, 0.3))
    alive = process.is_alive()
    process.kill()
    process.join()
    return alive


def read_checkpoints(out):
    """Reads what the run left.  Returns the step of last.pt, or None, and a list of complaints."""
    step = None
    complaints = []
    for name in ("last.pt", "backbone.pt"):
        if not (out / name).exists():
            continue
        try:
            state = torch.load(out / name, weights_only=True)
        except Exception as error:
            complaints.append(f"{name}: {error}")
            continue
        if name == "last.pt":
            step = state["step"]
    return step, complaints


def kill_and_resume(folder, flags, kills, per_step, rng):
    """Kills the run folder/killed `kills` times, resumes it each time, then lets it end."""
    out = Path(folder, "killed")
    steps = set()
    complaints = []
    done = 0
    while_saving = 0
    while done < kills:
        part_before = written(out / "last.pt.part")
        process = start(folder, "killed", *flags, "--resume")
        kind = ("steps", "saving", "start")[done % 3]
        if not kill_at_random(process, out, kind, per_step, rng):
            break                                         # it reached its end: too few steps
        done += 1
        if written(out / "last.pt.part") not in (None, part_before):
            while_saving += 1
        step, problems = read_checkpoints(out)
        complaints += problems
        if step is not None:
            steps.add(step)
    start(folder, "killed", *flags, "--resume").join()
    return {"kills": done, "while_saving": while_saving, "unreadable": len(complaints),
            "different_steps": len(steps)}


def same_end(folder):
    """Do both runs have the same checkpoints and the same log of losses?"""
    whole = Path(folder, "whole")
    killed = Path(folder, "killed")
    for name in ("last.pt", "backbone.pt"):
        states = [torch.load(out / name, weights_only=True) for out in (whole, killed)]
        if not equal(*states):
            return False
    return losses_of(whole) == losses_of(killed)


def losses_of(out):
    """[[step, loss, InfoNCE], ...] of a run's log."""
    lines = (out / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [[row["step"], row["loss"], row["info_nce"]] for row in rows]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", default="1", help="reading processes; 0: keep all in memory")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())     # one for each process; a killed one keeps a shared one

    steps = 5 * args.kills + 10
    flags = ["--max-steps", str(steps), "--workers", args.workers]
    if args.workers != "0":
        flags += ["--cache", "0"]
    # cleanup errors: reading processes whose trainer was killed may still write
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        data.make_toy(f"{folder}/world", 24, 12, seed=1)
        clock = time.monotonic()
        start(folder, "whole", *flags).join()
        per_step = (time.monotonic() - clock) / steps
        result = kill_and_resume(folder, flags, args.kills, per_step, random.Random(args.seed))
        result |= {"steps": steps, "identical": same_end(folder)}
    print(json.dumps(result))
    fine = result["kills"] == args.kills and not result["unreadable"] and result["identical"]
    sys.exit(not fine)


if __name__ == "__main__":
    main()
