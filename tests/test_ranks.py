"""Two gloo processes with half the batch each compute what one process computes with all of it."""
import json

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import losses
import model
import pretrain
from conftest import SMALL
from programs import end_well, rank_environments, script_with_few_blocks, take_few_blocks

pytestmark = pytest.mark.usefixtures("few_blocks")

B = 8


def join_ranks(rank, folder):
    """Make this process one of two that meet through a file in `folder`."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)


def run_on_two_ranks(start, function, *arguments):
    """Two programs that call function(rank, *arguments)."""
    end_well([start(function, rank, *arguments) for rank in (0, 1)])


def half(rank):
    return slice(rank * B // 2, (rank + 1) * B // 2)


# ------------------------------------------------------------------------------- loss and gradients


def branch(arch):
    torch.manual_seed(0)
    backbone = model.build(arch, 2, 32, 8)
    return model.Branch(backbone, 32, True, 16).double()


def batch():
    """Images x (B,2,32,32), keys k (B,16), labels y (B,2,9) of both views."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(B, 2, 32, 32, generator=generator).double()
    k = torch.randn(B, 16, generator=generator).double()
    y = (torch.rand(B, 2, 9, generator=generator) < 0.3).float()
    y[:3, 0] = 0                                 # unlabelled rows, unevenly over the ranks
    return x, k, y


def step(net, x, k, y):
    """SoftCon's loss in all forms of the soft term, (3,), and the gradients of their sum."""
    q, _ = net(x)
    keys = losses.gather(k)
    all_y2 = losses.gather(y)[:, 1]
    values = []
    for form in losses.SOFT_TAU:
        loss, _, _ = losses.softcon_loss(q, keys, y[:, 0], all_y2, 0.2, 0.7, form)
        values.append(loss)
    values = torch.stack(values)
    values.sum().backward()
    return values.detach()


def train_rank(rank, arch, folder):
    join_ranks(rank, folder)
    take_few_blocks()
    net = DistributedDataParallel(branch(arch))
    x, k, y = batch()
    rows = half(rank)
    loss = step(net, x[rows], k[rows], y[rows])
    dist.all_reduce(loss)
    gradients = {name: p.grad for name, p in net.module.named_parameters() if p.requires_grad}
    buffers = dict(net.module.named_buffers())
    torch.save({"loss": loss / 2, "gradients": gradients, "buffers": buffers},
               f"{folder}/{rank}.pt")
    del net                                      # as pretrain.main: DDP goes before its group
    dist.destroy_process_group()


@pytest.mark.parametrize("arch", ["resnet18", "vit_tiny"])
def test_two_ranks_equal_one_rank_in_loss_gradients_and_batch_statistics(arch, tmp_path, start):
    run_on_two_ranks(start, train_rank, arch, str(tmp_path))
    net = branch(arch)
    loss = step(net, *batch())
    for rank in (0, 1):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.allclose(got["loss"], loss, atol=1e-6, rtol=0)
        for name, p in net.named_parameters():
            if p.requires_grad:
                gradient = got["gradients"][name]
                assert torch.allclose(gradient, p.grad, atol=1e-6, rtol=1e-5), name
        for name, buffer in net.named_buffers():
            assert torch.allclose(got["buffers"][name], buffer, atol=1e-6), name


# ----------------------------------------------------------------------- gather, and what is logged


def embeddings():
    return torch.randn(B, 16, generator=torch.Generator().manual_seed(2), requires_grad=True)


def two_parts(q, rows):
    """Two losses of which each row's gradient differs."""
    scale = torch.arange(1.0, B + 1)[rows, None]
    return (q * scale).sum(), (q ** 2 * scale ** 2).sum()


def gather_rank(rank, folder):
    join_ranks(rank, folder)
    rows = half(rank)
    q = embeddings()
    for whole in (q, q.bfloat16(), (100 * q).to(torch.uint8), q.reshape(B, 4, 4).mT):
        gathered = losses.gather(whole[rows])
        assert torch.equal(gathered, whole)
        assert not gathered.requires_grad
    part = q[rows]
    result = [*losses.collapse(part), losses.soft_share(part, *two_parts(part, rows))]
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_all_ranks_get_all_rows_in_rank_order_and_log_what_one_rank_logs(tmp_path, start):
    run_on_two_ranks(start, gather_rank, str(tmp_path))
    q = embeddings()
    want = [*losses.collapse(q), losses.soft_share(q, *two_parts(q, slice(0, B)))]
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(want, abs=1e-5)


def test_one_rank_gathers_its_rows_without_a_copy_and_without_gradient():
    q = embeddings()
    gathered = losses.gather(q)
    assert torch.equal(gathered, q)
    assert gathered.data_ptr() == q.data_ptr()
    assert not gathered.requires_grad


# --------------------------------------------------------------------------------------- the script


def logs_on_one_rank_and_on_two(start, folder, flags):
    """What pretrain.py logs in this process, and what it logs as two programs."""
    ranks = []
    for place in rank_environments(2):
        ranks.append(start(script_with_few_blocks, "pretrain.py", *flags, "--out", folder / "2",
                           environment=place))
    pretrain.main([*flags, "--out", str(folder / "1")])
    end_well(ranks)
    logs = []
    for name in ("1", "2"):
        lines = (folder / name / "log.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    return logs


@pytest.mark.parametrize("arch", ["resnet18", "vit_tiny"])
def test_the_script_on_two_ranks_follows_one_rank(arch, toy, tmp_path, start):
    """Seasons, crops, masks and loss are the same: the first steps agree to rounding."""
    flags = ["--modality", "s1", "--data", toy, "--arch", arch, *SMALL, "--max-steps", "3"]
    logs = logs_on_one_rank_and_on_two(start, tmp_path, flags)
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]] == [1, 2, 3]
    for one, two in zip(*logs):
        for name in ("loss", "soft"):
            assert abs(one[name] - two[name]) < 2e-3 * one[name], name
        for name in ("soft_share", "feature_std", "effective_rank"):
            assert abs(one[name] - two[name]) < 1e-2 * one[name], name


# ------------------------------------------------------------------------------------------- PerA


def centre_after(rows):
    """PerA's centre after four steps, of which a rank sees these rows of six."""
    generator = torch.Generator().manual_seed(2)
    centre = losses.Centre(5)
    for scores in torch.randn(4, 6, 5, generator=generator):
        centre.update(scores[rows])
    return centre.value


def centre_rank(rank, folder):
    join_ranks(rank, folder)
    torch.save(centre_after(slice(3 * rank, 3 * rank + 3)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_the_centre_of_two_ranks_is_that_of_one(tmp_path, start):
    run_on_two_ranks(start, centre_rank, str(tmp_path))
    for rank in (0, 1):
        value = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.allclose(value, centre_after(slice(0, 6)), atol=1e-6)


def test_the_script_on_two_ranks_follows_one_rank_up_to_koleo(toy, tmp_path, start):
    """KoLeo looks for neighbours within a rank, as released; views, masks, dino, pixels agree."""
    flags = ["--method", "pera", "--modality", "s1", "--data", toy, "--arch", "vit_tiny", *SMALL,
             "--local-size", "12", "--crops", "2", "3", "--prototypes", "64", "--batch-size", "4",
             "--drop-path", "0", "--soft-weight", "0.1", "--max-steps", "1"]
    (one,), (two,) = logs_on_one_rank_and_on_two(start, tmp_path, flags)
    for name in ("dino", "pixel", "soft", "feature_std", "effective_rank"):
        assert abs(one[name] - two[name]) < 1e-4 * one[name], name
