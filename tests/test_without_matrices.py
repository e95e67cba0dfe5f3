"""Experts without matrices: the kernel and its gradients against torch's functions, beside experts that have some."""

import contextlib

import pytest
import torch

import numba_moe as moe
from numba_moe.device import simulator

ON_GPU = torch.cuda.is_available() and not simulator.ENABLED
DEVICE = "cuda" if ON_GPU else "cpu"


def running():
    return simulator.running() if simulator.ENABLED else contextlib.nullcontext()


def drawn(hidden, dtype=torch.float32, constants=2):
    """Draw 9 tokens whose 5 ids are of 3 experts with matrices, 2 copies, some constants, 2 zero experts, or none."""
    torch.manual_seed(hidden)
    ids = torch.randint(-1, 7 + constants, (9, 5), dtype=torch.int32)
    found = {
        "hidden_states": torch.randn(9, hidden),
        "topk_weights": torch.rand(9, 5),
        "constants": torch.randn(constants, hidden),
        "combined": torch.randn(9, hidden),
    }
    kinds = {"topk_weights": torch.float32}
    return {name: part.to(DEVICE, kinds.get(name, dtype)).requires_grad_() for name, part in found.items()}, ids.to(
        DEVICE
    )


def by_torch(given, ids, num_experts=3, num_copies=2):
    """Return what each expert of each slot returns, summed slot by slot."""
    total = given["combined"]
    tables = (given["hidden_states"][None].expand(num_copies, -1, -1), given["constants"][:, None].expand(-1, 9, -1))
    returned = torch.cat(tables)
    for pick in range(ids.shape[1]):
        for expert, rows in enumerate(returned):
            chosen = (ids[:, pick] == num_experts + expert)[:, None]
            total = total + torch.where(chosen, given["topk_weights"][:, pick, None] * rows, 0.0)
    return total


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hidden", [24, 7])
def test_sums_and_gradients_by_torch(hidden, dtype, kernels):
    given, ids = drawn(hidden, dtype)
    exact = {name: part.detach().double().requires_grad_() for name, part in given.items()}
    wanted = by_torch(exact, ids)
    grad = torch.randn(9, hidden, device=DEVICE).to(dtype)
    with running() if kernels else contextlib.nullcontext():
        found = moe.constant_experts(topk_ids=ids, num_experts=3, num_copies=2, **given)
        gradients = torch.autograd.grad(found, list(given.values()), grad)
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    pairs = [
        (found, wanted),
        *zip(gradients, torch.autograd.grad(wanted, list(exact.values()), grad.double()), strict=True),
    ]
    for got, exactly in pairs:
        assert (got.double() - exactly).abs().max() <= tolerance * exactly.abs().max()
    for got, own in zip(gradients, given.values(), strict=True):
        assert got.dtype == own.dtype


def test_beside_experts_with_matrices():
    """Both halves of a layer take the same ids, and each leaves out those of the other."""
    given, ids = drawn(8)
    rows, weights = given["hidden_states"].detach(), given["topk_weights"].detach()
    gate_up, down = torch.randn(3, 12, 8, device=DEVICE), torch.randn(3, 8, 6, device=DEVICE)
    with running():
        with_matrices = moe.fused_experts(rows, gate_up, down, weights, ids)
        found = moe.constant_experts(rows, weights, ids, 3, num_copies=2, combined=with_matrices)
    copies = (weights * ((ids == 3) | (ids == 4))).sum(1, keepdim=True)
    torch.testing.assert_close(found, with_matrices + copies * rows)


def test_a_graph_of_gating_and_copies_trains():
    """A router learns to send a token to itself."""
    torch.manual_seed(0)
    rows = torch.randn(16, 8, device=DEVICE)
    router = torch.nn.Linear(8, 4, device=DEVICE)
    optimizer, losses = torch.optim.Adam(router.parameters(), lr=0.1), []
    for _ in range(20):
        weights, ids = moe.topk_softmax(router(rows), 2)
        loss = (moe.constant_experts(rows, weights, ids, 2, num_copies=2) - rows).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
