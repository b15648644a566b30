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
