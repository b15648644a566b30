"""Kill a small run again and again, resume it each time, and compare its end with a run left alone.

    python tests/kill.py --kills 50                 about a second per kill; the last line is JSON

SIGKILL falls in turn at a random moment of the start, of the steps, and of writing a checkpoint.
After each kill every checkpoint that lies in the folder is read.  Exit code 1 if one cannot be, or
if the end differs in a bit.
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
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import model  # noqa: E402
import pretrain  # noqa: E402

FLAGS = ["--modality", "s1", "--arch", "vit_tiny", "--img-size", "12", "--patch-size", "6",
         "--hidden", "16", "--batch-size", "4", "--accum", "2", "--epochs", "1000", "--save-every",
         "2", "--log-every", "1", "--drop-path", "0.1"]


def train(folder, out, *flags):
    model.VITS["vit_tiny"] = (32, 3, 1)                      # tinier still: steps of milliseconds
    sys.stderr = open(os.devnull, "w")
    with open(f"{folder}/{out}.txt", "a") as sys.stdout:
        pretrain.main([*FLAGS, "--data", f"{folder}/world", "--out", f"{folder}/{out}", *flags])


def start(*args):
    """A forked process, so that a run begins without loading torch anew."""
    process = multiprocessing.get_context("fork").Process(target=train, args=args)
    process.start()
    return process


def stamp(path):
    """When the file was last written; None if it is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def read(path):
    """The file's content, None if there is no such file; raises if it is not whole."""
    return torch.load(path, weights_only=True) if path.exists() else None


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", default="1", help="reading processes; 0: keep all in memory")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())     # of each process: a killed one takes a shared one with it
    rng, unreadable = random.Random(args.seed), []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:     # orphans may write
        data.make_toy(f"{folder}/world", 24, 12, seed=1)
        steps = 5 * args.kills + 10
        flags = ["--max-steps", str(steps), "--workers", args.workers,
                 *(["--cache", "0"] if args.workers != "0" else [])]
        process, clock = start(folder, "whole", *flags), time.monotonic()
        process.join()
        per_step = (time.monotonic() - clock) / steps
        out, kills, done, saving = Path(folder, "killed"), [], 0, 0

        def resume():
            """Between two renames of a save there is only the older one."""
            return ["--resume"] * ((out / "last.pt").exists() or (out / "last_1.pt").exists())
        while done < args.kills:
            part = stamp(out / "last.pt.part")
            process = start(folder, "killed", *flags, *resume())
            watched = out / ("log.jsonl", "last.pt.part", "")[done % 3]
            for _ in range(rng.randint(1, 3) if done % 3 < 2 else 0):        # 1 to 3 steps or saves
                before = stamp(watched)
                while process.is_alive() and stamp(watched) in (None, before):
                    time.sleep(0.0002)
            time.sleep(rng.uniform(0, (4 * per_step, 0.005, 0.3)[done % 3]))
            if not process.is_alive():
                break                                         # it reached its end: too few steps
            process.kill()
            process.join()
            done += 1
            saving += stamp(out / "last.pt.part") not in (None, part)
            for name in ("last.pt", "last_1.pt", "backbone.pt"):
                try:
                    state = read(out / name)
                    kills += [state["step"]] if state and name == "last.pt" else []
                except Exception as error:
                    unreadable.append(f"{name}: {error}")
        process = start(folder, "killed", *flags, *resume())
        process.join()
        same = all(equal(read(Path(folder, "whole", name)), read(out / name))
                   for name in ("last.pt", "backbone.pt"))
        logs = [[{k: v for k, v in json.loads(x).items() if k in ("step", "loss", "info_nce")}
                 for x in Path(folder, n, "log.jsonl").read_text().splitlines()]
                for n in ("whole", "killed")]
    result = {"kills": done, "while_saving": saving, "steps": steps, "unreadable": len(unreadable),
              "resumed_from": len(set(kills)), "identical": same and logs[0] == logs[1]}
    print(json.dumps(result))
    sys.exit(done < args.kills or bool(unreadable) or not result["identical"])


if __name__ == "__main__":
    main()
