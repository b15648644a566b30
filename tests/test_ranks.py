"""Two gloo processes with half the batch each compute what one process computes with all of it."""
import json
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import losses
import model
import pretrain
from conftest import ROOT, SMALL

B = 8


def branch(arch):
    torch.manual_seed(0)
    backbone = model.build(arch, 2, 32, 8)
    return model.Branch(backbone, 32, True, 16).double()


def batch():
    g = torch.Generator().manual_seed(1)
    x, k = torch.rand(B, 2, 32, 32, generator=g).double(), torch.randn(B, 16, generator=g).double()
    y = (torch.rand(2, B, 9, generator=g) < 0.3).float()
    y[0, :3] = 0                                          # unlabelled rows, unevenly over the ranks
    return x, k, y


def step(net, x, k, y):
    q, _ = net(x)
    loss = losses.softcon_loss(q, k, *y, 0.2, 0.7, "ce")[0]
    loss.backward()
    return loss.detach()


def known_keys(q, k, y):
    """The step's way: all ranks' keys and labels asked for at once, before the student's pass."""
    gathered = losses.gather_soon(k, *y)
    later = q + 0                                                      # work between start and wait
    keys, all_y1, all_y2 = gathered()
    return torch.stack(losses.softcon_loss(later, keys, y[0], all_y2, 0.2, 0.7, "ce", None, all_y1))


def both_sides(x):
    """A loss with gradients through the keys too, as in SimCLR: needs the gradient of gather."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return losses.info_nce(x, losses.gather(x.roll(1, 1)), 0.2, rank * len(x))


def worker(rank, arch, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    net = DistributedDataParallel(branch(arch))
    x, k, y = batch()
    rows = slice(rank * B // 2, (rank + 1) * B // 2)
    loss = step(net, x[rows], k[rows], y[:, rows])
    dist.all_reduce(loss)
    q = k[rows].roll(1, 1)
    assert torch.equal(known_keys(q, k[rows], y[:, rows]), torch.stack(
        losses.softcon_loss(q, k[rows], *y[:, rows], 0.2, 0.7, "ce")))
    assert torch.equal(losses.gather_soon(x[rows])()[0], x)
    leaf = k[rows].clone().requires_grad_()
    both_sides(leaf).backward()
    grads = {n: p.grad for n, p in net.module.named_parameters() if p.grad is not None}
    torch.save({"loss": loss / 2, "grads": grads, "leaf": leaf.grad / 2,
                "buffers": dict(net.module.named_buffers())}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("arch", ["resnet18", "vit_tiny"])
def test_two_ranks_equal_one_rank_in_loss_gradients_and_batch_statistics(arch, tmp_path):
    mp.spawn(worker, (arch, str(tmp_path)), nprocs=2)
    net, (x, k, y) = branch(arch), batch()
    loss = step(net, x, k, y)
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1)]
    leaf = k.clone().requires_grad_()
    both_sides(leaf).backward()
    assert torch.allclose(torch.cat([r["leaf"] for r in ranks]), leaf.grad, atol=1e-12)
    for r in ranks:
        assert abs(float(r["loss"] - loss)) < 1e-6
        for name, p in net.named_parameters():
            if p.requires_grad:
                assert torch.allclose(r["grads"][name], p.grad, atol=1e-6, rtol=1e-5), name
        for name, b in net.named_buffers():
            assert torch.allclose(r["buffers"][name], b, atol=1e-6), name


def test_keys_of_one_process_are_its_own_and_nothing_is_copied():
    x, k, y = batch()
    assert losses.gather_soon(k, *y)()[0] is k and losses.gather(k) is k
    assert torch.equal(known_keys(x.flatten(1)[:, :16], k, y), torch.stack(
        losses.softcon_loss(x.flatten(1)[:, :16], k, *y, 0.2, 0.7, "ce")))


def order_of_a_step(rank, method, folder):
    """Notes when a step gathers, waits and runs its student; -> {rank}.json"""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    pera, events = method == "pera", []
    args = pretrain.parse(["--modality", "s1", "--method", method, *SMALL, "--arch", "vit_tiny",
                           *["--local-size", "12"] * (method == "pera"), "--soft-weight", "0.3"])
    args.amp, net = "off", pretrain.networks(args, "cpu")
    real_gather, student, teacher = dist.all_gather, net.student, net.teacher

    def note(what, function):
        def call(*a, **k):
            events.append(what)
            return function(*a, **k)
        return call

    def all_gather(rows, x, async_op=False):
        work = real_gather(rows, x, async_op=async_op)
        events.append(f"gather {list(x.shape[1:])} {'soon' if async_op else 'now'}")
        return type("Work", (), {"wait": staticmethod(note("wait", work.wait))})
    dist.all_gather = all_gather
    net.ddp, net.teacher = note("student", student), note("teacher", teacher.forward)
    net.teacher.backbone = teacher.backbone
    if pera:
        net.teacher.cls_head = teacher.cls_head
    x = torch.randint(256, (4, 1 if pera else 2, 2, 24, 24), dtype=torch.uint8)
    y = torch.randint(2, (4, x.shape[1], 9), dtype=torch.uint8)
    step = pretrain.pera_step if pera else pretrain.softcon_step
    step(net, x, y, args, pretrain.Dice(0, 0, 0, rank, 2), {"teacher_tau": 0.04})[0].backward()
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(events, file)
    dist.destroy_process_group()


@pytest.mark.parametrize("method, shapes", [("softcon", ([2, 256], [2, 9])),
                                            ("pera", ([2, 192], [9]))])
def test_keys_and_labels_travel_in_one_gather_each_beside_the_students_forward(
        method, shapes, tmp_path):
    mp.spawn(order_of_a_step, (method, str(tmp_path)), nprocs=2)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [
            "teacher", *(f"gather {s} soon" for s in shapes), "student", "wait", "wait"]


@pytest.mark.parametrize("arch", ["resnet18", "vit_tiny"])
def test_the_script_on_two_ranks_follows_one_rank(arch, toy, tmp_path):
    """Same seasons, crops, masks, loss: the first steps agree to rounding."""
    logs = []
    for n in (1, 2):
        out = tmp_path / str(n)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc-per-node", n,
                   ROOT / "pretrain.py", "--modality", "s1", "--data", toy, "--arch", arch, *SMALL,
                   "--max-steps", 3, "--out", out]
        run = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        logs.append([json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()])
    assert [x["step"] for x in logs[0]] == [1, 2, 3]
    for a, b in zip(*logs):
        assert abs(a["loss"] - b["loss"]) < 2e-3 * a["loss"]
        assert abs(a["soft"] - b["soft"]) < 2e-3 * a["soft"]
