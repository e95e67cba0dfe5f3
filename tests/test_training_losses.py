"""Losses of a router against the formulas that the peers compute, and their gradients against torch's in float64."""

import contextlib
import itertools

import numpy as np
import pytest
import torch
from numba_moe.reference import training as twin

from numba_moe import reference, training
from numba_moe.device import simulator
from numba_moe.interop import torch_ops as torch_ops  # which registers all
from numba_moe.ops.router_losses import router_losses
from numba_moe.verify import testing

ON_GPU = torch.cuda.is_available() and not simulator.ENABLED
SCORING = ("softmax", "sigmoid", "softplus_sqrt")
TOKENS, EXPERTS, TOP_K = 12, 20, 3


def running():
    return simulator.running() if simulator.ENABLED else contextlib.nullcontext()


def drawn(seed=0, tokens=TOKENS, experts=EXPERTS, top_k=TOP_K):
    logits = 2 * np.random.default_rng(seed).standard_normal((tokens, experts))
    return logits.astype(np.float32), np.argsort(-logits, 1)[:, :top_k].astype(np.int32).copy()


def tensors(*arrays, device="cpu"):
    return [torch.from_numpy(array).to(device) for array in arrays]


def scores_of(logits, scoring_func):
    if scoring_func == "softmax":
        return logits.softmax(-1)
    scores = logits.sigmoid() if scoring_func == "sigmoid" else torch.nn.functional.softplus(logits).sqrt()
    return scores / scores.sum(-1, keepdim=True)


def counted(ids, experts=EXPERTS):
    return torch.nn.functional.one_hot(ids.long(), experts).sum((0, 1)).double()


def megatron(scores, ids, coefficient=1.0, total=None, counts=None):
    """Megatron-LM's switch_load_balancing_loss_func, and TransformerEngine's fused_moe_aux_loss."""
    total = len(ids) if total is None else total
    counts = counted(ids) if counts is None else counts
    return (scores.sum(0) * counts).sum() * (scores.shape[1] * coefficient / (ids.shape[1] * total * total))


def deepseek(scores, ids, num_sequences, alpha):
    """Compute the sequence-wise balance loss of DeepSeek-V3's report, equations 17 to 20."""
    losses = []
    for score, one in zip(scores.chunk(num_sequences), ids.chunk(num_sequences), strict=True):
        f = scores.shape[1] / (ids.shape[1] * len(one)) * counted(one)
        losses.append(alpha * (f * score.mean(0)).sum())
    return sum(losses) / num_sequences


@pytest.mark.parametrize("scoring_func", SCORING)
def test_equals_megatron_and_transformer_engine(scoring_func):
    logits, ids = tensors(*drawn())
    wanted = megatron(scores_of(logits.double(), scoring_func), ids, 0.01)
    arguments = {"scoring_func": scoring_func, "coefficient": 0.01}
    assert twin.load_balancing_loss(logits.numpy(), ids.numpy(), **arguments) == pytest.approx(wanted.item(), rel=1e-9)
    found = training.load_balancing_loss(logits, ids, **arguments)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_equals_transformers_over_layers(masked):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    layers = [drawn(seed) for seed in range(3)]
    logits, ids = (tuple(map(torch.from_numpy, part)) for part in zip(*layers, strict=True))
    mask = torch.ones(2, TOKENS // 2, dtype=torch.long)
    mask[0, 4:] = mask[1, :1] = 0
    wanted = mixtral.load_balancing_loss_func(
        tuple(one.double() for one in logits), EXPERTS, TOP_K, mask if masked else None
    ).item()
    options = {"attention_mask": mask} if masked else {}
    found = training.load_balancing_loss(logits, ids, form="transformers", **options)
    assert found.item() == pytest.approx(wanted, rel=1e-6)
    padding = {"is_padding": mask.ravel().numpy() == 0} if masked else {}
    found = twin.load_balancing_loss(*zip(*layers, strict=True), form="transformers", **padding)
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("by_ids", [False, True])
def test_equals_deepseek_by_sequence(by_ids):
    logits, ids = tensors(*drawn())
    wanted = deepseek(scores_of(logits.double(), "sigmoid"), ids, 4, 1e-3).item()
    options = {"num_sequences": 4, "scoring_func": "sigmoid", "coefficient": 1e-3}
    if by_ids:  # the batch is the inner dimension, as in Megatron-LM
        order = torch.arange(TOKENS).view(4, -1).T.reshape(-1)
        logits, ids = logits[order], ids[order]
        options["sequence_ids"] = torch.arange(TOKENS, dtype=torch.int32) % 4
    assert training.load_balancing_loss(logits, ids, **options).item() == pytest.approx(wanted, rel=1e-6)
    arrays = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    assert twin.load_balancing_loss(logits.numpy(), ids.numpy(), **arrays) == pytest.approx(wanted, rel=1e-9)


def test_z_loss_is_that_of_megatron():
    logits, _ = tensors(*drawn())
    wanted = (logits.double().logsumexp(-1).square().mean() * 1e-3).item()
    assert training.z_loss(logits, coefficient=1e-3).item() == pytest.approx(wanted, rel=1e-6)
    assert twin.z_loss(logits.numpy(), coefficient=1e-3) == pytest.approx(wanted, rel=1e-9)
    assert training.z_loss((logits, logits), coefficient=1e-3).item() == pytest.approx(wanted, rel=1e-6)


def paddings(tokens):
    padding = np.arange(tokens) % 3 == 1
    return {
        "none": {},
        "is_padding": {"is_padding": padding},
        "num_token_non_padded": {"num_token_non_padded": np.array([tokens - 2])},
        "sequence_ids": {"sequence_ids": (np.arange(tokens) % 3 - 1).astype(np.int32), "num_sequences": 2},
    }


@pytest.mark.parametrize("where", paddings(6))
@pytest.mark.parametrize("scoring_func", SCORING)
def test_twin_by_finite_differences(scoring_func, where):
    logits, ids = drawn(tokens=6, experts=5, top_k=2)
    where = paddings(6)[where]
    counts, sizes = twin.count_by_sequence(ids, 5, **where)
    rules = {"top_k": 2, "scoring_func": scoring_func, "coefficient": 2.0, "z_coefficient": 0.5, **where}
    logits, step, grad = logits.astype(np.float64), 1e-6, np.array([0.7, -1.3])
    found = twin.router_losses_backward(logits, counts, sizes, grad, **rules)
    for index in np.ndindex(logits.shape):
        moved = np.zeros(logits.shape)
        moved[index] = step
        by_step = twin.router_losses(logits + moved, counts, sizes, **rules)
        by_step = (by_step - twin.router_losses(logits - moved, counts, sizes, **rules)) / (2 * step)
        assert found[index] == pytest.approx(by_step @ grad, rel=1e-6, abs=1e-8)


KERNEL_CASES = [
    (6, 8, 2, "softmax", "none", "float32"),
    (6, 8, 2, "sigmoid", "is_padding", "bfloat16"),
    (4, 300, 3, "softmax", "num_token_non_padded", "bfloat16"),
    (4, 300, 3, "softplus_sqrt", "sequence_ids", "float32"),
    (1, 1, 1, "sigmoid", "none", "float16"),
    (0, 8, 2, "softmax", "is_padding", "float32"),
    *(
        pytest.param(33, 20, 3, *rest, marks=pytest.mark.slow)
        for rest in itertools.product(SCORING, paddings(6), ["float32"])
    ),
]


@pytest.mark.parametrize(("tokens", "experts", "top_k", "scoring_func", "where", "dtype"), KERNEL_CASES)
def test_kernels_equal_the_twin(tokens, experts, top_k, scoring_func, where, dtype, device):
    logits = testing.random_floats(np.random.default_rng(0), (tokens, experts), dtype)
    ids = reference.gating.best(logits.astype(np.float32), top_k).astype(np.int32)
    where = paddings(tokens)[where]
    rows = testing.to_device(logits, device, dtype, strided=True).requires_grad_()
    given = {name: testing.to_device(value, device) for name, value in where.items()}
    counts, sizes = twin.count_by_sequence(ids, experts, **where)
    rules = {"top_k": top_k, "scoring_func": scoring_func, "coefficient": 2.0, "z_coefficient": 0.5}
    with testing.poisoned_memory():
        found = training.count_by_sequence(testing.to_device(ids, device), experts, **given)
        assert [part.tolist() for part in found] == [counts.tolist(), sizes.tolist()]
        losses = router_losses(rows, found.tokens_per_expert, **rules, **given)
        grad = torch.tensor([0.7, -1.3], device=device)
        (by_logits,) = torch.autograd.grad(losses, rows, grad)
    exact = testing.to_numpy(rows)
    np.testing.assert_allclose(losses.tolist(), twin.router_losses(exact, counts, sizes, **rules, **where), rtol=3e-6)
    wanted = twin.router_losses_backward(exact, counts, sizes, grad.cpu().numpy(), **rules, **where)
    assert by_logits.dtype == rows.dtype
    assert not testing.compare(by_logits, wanted).mismatches


@pytest.mark.sweep(1)
@pytest.mark.parametrize("scoring_func", SCORING)
def test_gradient_is_that_of_torch_in_float64(scoring_func, device):
    logits, ids = (part.to(device) for part in tensors(*drawn()))
    exact = logits.double().requires_grad_()
    (megatron(scores_of(exact, scoring_func), ids, 0.3) + 0.2 * exact.logsumexp(-1).square().mean()).backward()
    logits.requires_grad_()
    loss = training.load_balancing_loss(logits, ids, scoring_func=scoring_func, coefficient=0.3)
    (loss + training.z_loss(logits, coefficient=0.2)).backward()
    scale = exact.grad.abs().max()
    assert (logits.grad - exact.grad).abs().max() <= 1e-5 * scale


def test_padding_takes_no_part_whatever_it_holds(device):
    logits, ids = (part.to(device) for part in tensors(*drawn()))
    padding = torch.arange(TOKENS, device=device) % 4 == 3
    wanted = training.load_balancing_loss(logits[~padding], ids[~padding]), training.z_loss(logits[~padding])
    logits[padding] = torch.nan
    ids[padding] = 5
    logits.requires_grad_()
    found = training.load_balancing_loss(logits, ids, is_padding=padding), training.z_loss(logits, is_padding=padding)
    torch.testing.assert_close(found, wanted)
    sum(found).backward()
    assert not logits.grad[padding].any()
    assert logits.grad[~padding].all()


def test_a_nan_is_not_hidden(device):
    logits, ids = (part.to(device) for part in tensors(*drawn()))
    logits[3, 2] = torch.nan
    assert training.load_balancing_loss(logits, ids).isnan()
    assert training.z_loss(logits).isnan()


def test_compiled_as_eager():
    logits, ids = tensors(*drawn())

    def losses(logits, ids):
        return training.load_balancing_loss(logits, ids, num_sequences=2) + training.z_loss(logits)

    found, wanted = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    total = torch.compile(losses, backend="aot_eager", fullgraph=True)(found, ids)
    assert torch.equal(total, losses(wanted, ids))
    total.backward()
    losses(wanted, ids).backward()
    assert torch.equal(found.grad, wanted.grad)


def test_opcheck():
    logits, ids = tensors(*drawn())
    padding = {"is_padding": torch.arange(TOKENS) % 3 == 1}
    ops = torch.ops.numba_moe
    counts, sizes = training.count_by_sequence(ids, EXPERTS, num_sequences=2)
    torch.library.opcheck(ops.count_by_sequence.default, (ids, EXPERTS), {"num_sequences": 2, **padding})
    torch.library.opcheck(ops.router_losses.default, (logits.requires_grad_(), counts, sizes), {"num_sequences": 2})
    torch.library.opcheck(ops.router_losses.default, (logits,), padding)
    bias = {"correction_bias": torch.zeros(2, EXPERTS)}
    torch.library.opcheck(ops.move_correction_bias.default, (counts, 0.1), bias)


def of_rank(rank, _size):
    group = torch.distributed.group.WORLD
    logits, ids = tensors(*drawn())
    part = slice(0, 5) if rank == 0 else slice(5, TOKENS)  # of other sizes
    own = logits[part].requires_grad_()
    loss = training.load_balancing_loss(own, ids[part], group=group)
    loss.backward()
    whole = logits.double().requires_grad_()
    wanted = megatron(whole.softmax(-1), ids)
    wanted.backward()
    torch.testing.assert_close(own.grad.double(), whole.grad[part], rtol=1e-5, atol=1e-8)
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    assert total.item() == pytest.approx(wanted.item(), rel=1e-6)
    counts = training.count_by_sequence(ids[part], EXPERTS).tokens_per_expert[0]
    found = training.update_correction_bias(torch.zeros(EXPERTS), counts, 0.1, group=group)
    wanted = training.update_correction_bias(torch.zeros(EXPERTS), counted(ids).int(), 0.1)
    assert torch.equal(found, wanted)


@pytest.mark.slow
def test_counts_of_a_group_balance_the_whole_batch(run_ranks):
    assert run_ranks(of_rank, 2) == [0, 0]


def test_no_second_derivative():
    logits, ids = tensors(*drawn())
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(training.load_balancing_loss(logits, ids), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):  # though the loss is linear in what it sums
        grad.sum().backward()


@pytest.mark.parametrize("rule", ["sign", "proportional"])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("dtype", ["int32", "int64", "float32"])
def test_bias_moves_as_its_twin(rule, center, dtype, device):
    counts = np.random.default_rng(0).integers(0, 50, (3, 40)).astype(dtype)
    counts[1] = 0
    counts[2] = 7
    bias = np.random.default_rng(1).standard_normal((3, 40)).astype(np.float32)
    found = torch.from_numpy(bias.copy()).to(device)
    given = torch.from_numpy(counts).to(device)
    assert training.update_correction_bias(found, given, 0.01, rule=rule, center=center) is found
    wanted = twin.update_correction_bias(bias.copy(), counts, 0.01, rule=rule, center=center)
    np.testing.assert_allclose(found.cpu(), wanted, rtol=1e-6, atol=1e-7)
    assert np.array_equal(wanted[1:], bias[1:])
    assert not np.array_equal(wanted[0], bias[0])


def test_bias_of_deepseek_and_of_torchtitan():
    counts = torch.tensor([6, 1, 3, 2])
    bias = torch.tensor([0.1, 0.2, 0.3, 0.4])
    offset = counts.double().mean() - counts
    wanted = bias + 0.001 * offset.sign()  # and Megatron-LM's get_updated_expert_bias
    torch.testing.assert_close(training.update_correction_bias(bias.clone(), counts, 0.001).double(), wanted)
    delta = 0.001 * offset.sign()
    wanted = bias + (delta - delta.mean())
    torch.testing.assert_close(
        training.update_correction_bias(bias.clone(), counts, 0.001, center=True).double(), wanted
    )


BAD = {
    "layers": (lambda x, i: training.load_balancing_loss((x, x), i), ValueError, "`topk_ids` must be of 2 layers"),
    "no logits": (lambda x, i: training.z_loss([]), TypeError, "`gating_output` must be a tensor or a sequence"),
    "form": (lambda x, i: training.load_balancing_loss(x, i, form="gshard"), ValueError, "`form` must be one of"),
    "raw": (lambda x, i: router_losses(x, scoring_func="raw"), ValueError, "`scoring_func` must be one of"),
    "sequences": (
        lambda x, i: router_losses(x, num_sequences=5),
        ValueError,
        "`num_sequences` must be a divisor of num_",
    ),
    "counts": (lambda x, i: router_losses(x, i), ValueError, "`tokens_per_expert` must be of shape"),
    "rule": (
        lambda x, i: training.update_correction_bias(x[0], i[0], 1.0),
        ValueError,
        "`correction_bias` must be of shape",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call(*tensors(*drawn()))
