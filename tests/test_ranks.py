"""Two processes with half of the batch each compute what one process computes with all of it.

Two processes are started once, as torchrun would start them.  They do all that is claimed here, on
the same seeded numbers, and leave their results in files.
"""
import copy
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
import losses
import model
import pretrain
from conftest import TINY, seeded, step_flags

B = 8


def use_tiny_networks():
    """Before anything else, in both processes and in the one that they are compared with."""
    torch.set_default_dtype(torch.float64)
    model.VITS["vit_tiny"] = TINY
    pretrain.KOLEO_WEIGHT = 0            # see below


# -------------------------------------------------------------------------- what every process does


def remove_batch_norms(module):
    """On GPUs torch's SyncBatchNorm takes the statistics of all ranks; the CPU has none."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d):
            setattr(module, name, nn.Identity())
        remove_batch_norms(child)


def train(method, rank, world):
    """Some steps of two micro-batches -> all that they leave."""
    args = step_flags(method, sensor=data.SENSORS["s1"], clip=1.0, warmup=0.0, drop_path=0.0,
                      seed=1)
    torch.manual_seed(0)
    net = pretrain.networks(args, torch.device("cpu"))
    remove_batch_norms(net.student)
    remove_batch_norms(net.teacher)
    if world > 1:
        net.ddp = DistributedDataParallel(net.student)
    optimiser = pretrain.adamw(net.student, args)
    g = seeded(1)
    numbers = []
    spread = []
    for step in range(2):
        batch = []
        for _ in range(2):
            x = torch.randint(256, (B, pretrain.VIEWS[method], 2, 30, 30), generator=g)
            y = (torch.rand(B, pretrain.VIEWS[method], 9, generator=g) < 0.3).float()
            y[:3, 0] = 0                         # unlabelled scenes, unevenly over the ranks
            mine = slice(rank * B // world, (rank + 1) * B // world)
            batch.append((x[mine].to(torch.uint8), y[mine]))
        values = pretrain.schedules(args, step, 10)
        result = pretrain.train_step(net, optimiser, batch, args, step, values, rank, world, True)
        result.terms.pop("koleo", None)          # its neighbours are those of a rank, as released
        means = torch.stack([result.loss, *result.terms.values()])
        if world > 1:
            dist.all_reduce(means)
        numbers.append([*(means / world).tolist(), float(result.gradient_norm),
                        result.soft_share or 0.0])
        spread.append(losses.collapse(result.features))
    moments = [optimiser.state[p]["exp_avg"] for p in net.student.parameters() if p.requires_grad]
    left = {"numbers": [torch.tensor(numbers)], "spread": torch.tensor(spread), "moments": moments,
            "student": list(net.student.parameters()), "teacher": list(net.teacher.parameters())}
    if method == "pera":
        left["centre"] = [net.centre.value]
    net.ddp = None                               # as pretrain.main: DDP goes before its group
    return copy.deepcopy(left)


METHODS = ["softcon", "pera"]


def gather_rows(rank):
    """What `gather` makes of tensors of several types, each rank giving its half of the rows."""
    g = seeded(2)
    q = torch.randn(B, 16, generator=g, requires_grad=True)
    mine = slice(rank * B // 2, (rank + 1) * B // 2)
    whole = [q, q.bfloat16(), (100 * q).to(torch.uint8), q.reshape(B, 4, 4).mT]
    for x in whole:
        gathered = losses.gather(x[mine])
        assert torch.equal(gathered, x) and not gathered.requires_grad
    assert pretrain.largest_of_ranks(rank) == 1


def script(rank, flags, folder):
    """A run of the script that stops since rank 1 alone got a signal, and the rest of it."""
    ports = os.environ["PORTS"].split()          # a port is free again some time after its run
    os.environ["MASTER_PORT"] = ports[0]
    if rank == 1:
        pretrain.signal_times.append(0)
    pretrain.main([*flags, "--out", f"{folder}/two"])
    pretrain.signal_times.clear()
    os.environ["MASTER_PORT"] = ports[1]
    pretrain.main([*flags, "--out", f"{folder}/two", "--resume"])


def both_ranks(rank, folder, flags):
    use_tiny_networks()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    gather_rows(rank)
    results = {method: train(method, rank, 2) for method in METHODS}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    script(rank, flags, folder)


if __name__ == "__main__":
    both_ranks(int(os.environ["RANK"]), sys.argv[1], sys.argv[2:])


# ------------------------------------------------------------------------------------------ claims


@pytest.fixture(scope="module")
def flags(packs):
    words = ("--modality s1 --method pera --preset full --arch vit_tiny --img-size 24 "
             "--patch-size 6 --local-size 12 --hidden 16 --prototypes 20 --batch-size 8 --accum 2 "
             "--epochs 1 --max-steps 2 --log-every 1 --device cpu --drop-path 0")
    return [*words.split(), "--data", packs["s1"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, flags):
    """What two processes and one left."""
    folder = tmp_path_factory.mktemp("ranks")
    free = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = " ".join(str(server.getsockname()[1]) for server in free)
    for server in free:
        server.close()
    ranks = []
    for rank in (0, 1):
        place = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank),
                 "MASTER_ADDR": "127.0.0.1", "PORTS": ports}
        command = [sys.executable, __file__, str(folder), *flags]
        output = open(folder / f"{rank}.txt", "w")
        ranks.append(subprocess.Popen(command, env=os.environ | place, stdout=output,
                                      stderr=output))
    for rank, process in enumerate(ranks):
        assert process.wait(300) == 0, (folder / f"{rank}.txt").read_text()
    return folder


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(pretrain, "KOLEO_WEIGHT", pretrain.KOLEO_WEIGHT)     # back afterwards
    monkeypatch.setitem(model.VITS, "vit_tiny", None)
    use_tiny_networks()
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_equal_one_rank_but_for_batch_norm_and_koleo(folder, method):
    """Gradient norms before clipping, moments of AdamW, student, teacher, centre; in float64."""
    one = train(method, 0, 1)
    for rank in (0, 1):
        two = torch.load(folder / f"{rank}.pt", weights_only=True)[method]
        assert torch.allclose(two.pop("spread"), one["spread"], rtol=1e-4)     # made in float32
        for name in two:
            for a, b in zip(two[name], one[name], strict=True):
                assert torch.allclose(a, b, rtol=1e-6, atol=1e-7), name


def test_a_stop_asked_of_one_rank_stops_both_and_resumed_they_end_as_one_rank_does(folder, flags):
    """In what they log and in what they save; the optimiser's moments are of both steps."""
    said = (folder / "0.txt").read_text()
    assert "stopped at step 1, saved; the same command with --resume goes on" in said
    assert f"resumed {folder}/two/last.pt at step 1" in said
    pretrain.main([*flags, "--out", str(folder / "one")])
    one, two = [(folder / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert len(one) == len(two) == 2
    for a, b in zip(map(json.loads, one), map(json.loads, two)):
        for name in a.keys() - {"images_per_s", "data_wait", "peak_memory_gb", "koleo"}:
            assert abs(a[name] - b[name]) <= 2e-6, name
    saved = [torch.load(folder / name / "last.pt", weights_only=True) for name in ("one", "two")]
    for part in ("student", "teacher", "centre", "optimiser"):
        parts = [state[part] for state in saved]
        torch.testing.assert_close(*parts, rtol=1e-5, atol=1e-7)
