"""Blocks whose parameters FSDP2 spreads over two processes: they learn what one process learns."""

import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import numba_moe as moe
from numba_moe import tiny

SETTINGS = tiny.Settings(layers=2, hidden=16, heads=2, experts=6, top_k=2, width=16, length=24, batch=4, steps=8)
RANKS = 2


def train_on_ranks(_rank, _size, settings, losses, busiest):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of views that FSDP2 warns of, for instance
        report = tiny.train(settings, "cpu", sharded=True)
    np.testing.assert_allclose(report.losses, losses, rtol=1e-5)
    np.testing.assert_array_equal(report.busiest, busiest)


@pytest.mark.slow
@pytest.mark.parametrize("balance", tiny.BALANCES)
def test_the_loss_of_one_process(run_ranks, balance):
    settings = SETTINGS._replace(balance=balance, rate=3e-3)
    report = tiny.train(settings, "cpu")
    assert run_ranks(train_on_ranks, RANKS, settings, report.losses, report.busiest) == [0] * RANKS


def model(**options):
    blocks = (moe.MoEBlock(16, 8, 6, 2, bias=True, shared_size=8, correction_bias=True, **options) for _ in range(2))
    return torch.nn.Sequential(*blocks)


def rows(step):
    return torch.randn(4, 2, 16, generator=torch.Generator().manual_seed(step))


def steps(module, part, optimizer):
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        for batch in range(2):
            loss = module(part(rows(10 * step + batch))).square().mean()
            loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def start_on_meta(rank, size, options, wanted, values):
    """Shard a model without memory, draw its parameters, train, and gather its state dict."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sharded = model(device="meta", **options)
        mesh = init_device_mesh("cpu", (size,))
        for block in (*sharded, sharded):
            fully_shard(block, mesh=mesh)
        sharded.to_empty(device="cpu")
        for tensor in (*sharded.parameters(), *sharded.buffers()):
            torch.nn.init.constant_(tensor, 77)
        torch.manual_seed(0)
        for block in sharded:
            block.reset_parameters()
        optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
        losses = steps(sharded, lambda batch: batch.chunk(size)[rank], optimizer)
        dist.all_reduce(losses)
        torch.testing.assert_close(losses / size, wanted, rtol=1e-5, atol=1e-7)
        found = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        assert found.keys() == values.keys()
        for name, value in values.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("adds", [False, True])
def test_a_start_on_the_meta_device(run_ranks, adds):
    options = {"accumulate_into_grad": adds, "renormalize": True}
    torch.manual_seed(0)
    whole = model(**options)
    losses = steps(whole, lambda batch: batch, torch.optim.SGD(whole.parameters(), lr=0.1))
    assert run_ranks(start_on_meta, RANKS, options, losses, dict(whole.state_dict())) == [0] * RANKS


def train_in_ddp(rank, size, wanted):
    torch.manual_seed(0)
    ours = DistributedDataParallel(model(accumulate_into_grad=True), gradient_as_bucket_view=True)
    losses = steps(ours, lambda batch: batch.chunk(size)[rank], torch.optim.SGD(ours.parameters(), lr=0.1))
    dist.all_reduce(losses)
    torch.testing.assert_close(losses / size, wanted, rtol=1e-5, atol=1e-7)


def test_ddp_reduces_what_backward_added(run_ranks):
    torch.manual_seed(0)
    whole = model()
    losses = steps(whole, lambda batch: batch, torch.optim.SGD(whole.parameters(), lr=0.1))
    assert run_ranks(train_in_ddp, RANKS, losses) == [0] * RANKS
