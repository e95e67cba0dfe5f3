"""torch's default dtype and default device are the user's, for tensors of his own: results do not depend on them."""

import contextlib

import numpy as np
import pytest
import torch

import numba_moe as moe
from numba_moe import placement, recorder, tiny
from numba_moe.device import simulator
from numba_moe.interop import sglang, vllm
from numba_moe.placement import ExpertDispatch, ExpertLocation
from numba_moe.verify import cases, verification

ON_GPU = torch.cuda.is_available() and not simulator.ENABLED
# A device that is wrong for everyone, and dtypes that are wrong for most.
DEFAULTS = {"float64": torch.float64, "bfloat16": torch.bfloat16, "meta": torch.device("meta")}


@contextlib.contextmanager
def default(value):
    before = torch.get_default_dtype()
    try:
        if isinstance(value, torch.dtype):
            torch.set_default_dtype(value)
        else:
            torch.set_default_device(value)
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


@pytest.fixture(params=DEFAULTS)
def another_default(request):
    return default(DEFAULTS[request.param])


def largest(value):
    if isinstance(value, tuple):
        return max(map(largest, value))
    return value.size if isinstance(value, np.ndarray) else value if isinstance(value, int) else 0


def some_cases():
    """Return up to three small cases of every op."""
    by_op = {}
    for case in (*cases.model_cases("simulator"), *cases.edge_cases()):
        if largest(tuple(case.arguments(np.random.default_rng(1)).values())) < 200:
            by_op.setdefault(case.op, []).append(case)
    return [case for found in by_op.values() for case in found[:: -(-len(found) // 3)]]


@pytest.mark.slow
def test_kernels_equal_the_reference(another_default):
    with another_default:
        outcomes = [verification.run_case(case, 1, "cuda" if ON_GPU else "cpu", timed=False) for case in some_cases()]
    assert {outcome.op for outcome in outcomes} == set(verification.OPS)
    assert [outcome for outcome in outcomes if not outcome.passed] == []


def floats(*shape, grad=False, dtype=torch.float32):
    drawn = np.random.default_rng(len(shape)).standard_normal(shape, np.float32)
    return torch.from_numpy(drawn).to(dtype).requires_grad_(grad)


def chosen(tokens=6, experts=5, top_k=2):
    drawn = np.random.default_rng(0).random((tokens, experts)).argsort(1)[:, :top_k]
    return torch.from_numpy(drawn.astype(np.int32))


def gradients():
    """Gradients of all ops that have them, on the CPU."""
    ids, weights = chosen(), floats(6, 2).abs()
    for dtype in (torch.float32, torch.bfloat16):
        scores, rows = floats(6, 5, grad=True, dtype=dtype), floats(6, 8, grad=True, dtype=dtype)
        for choose in (moe.topk_softmax, moe.topk_sigmoid, moe.topk_softplus_sqrt, moe.topk_raw, moe.select_experts):
            yield torch.autograd.grad((choose(scores, 2).topk_weights ** 2).sum(), scores)
        permuted = moe.moe_permute(rows, ids, 5)
        yield torch.autograd.grad((permuted.permuted_hidden_states**2).sum(), rows)
        yield torch.autograd.grad((moe.moe_permute_masked(rows, ids, 5, 4).permuted_hidden_states ** 2).sum(), rows)
        slots, weights = floats(12, 8, grad=True, dtype=dtype), floats(6, 2, grad=True)
        combined = moe.moe_unpermute(slots, weights, permuted.inv_permuted_idx)
        yield torch.autograd.grad((combined**2).sum(), (slots, weights))
        triple = floats(6, 2, 8, grad=True, dtype=dtype)
        yield torch.autograd.grad((moe.moe_sum(triple) ** 2).sum(), triple)
        yield torch.autograd.grad((moe.moe_activation(rows) ** 2).sum(), rows)
        experts = floats(5, 12, 8, grad=True, dtype=dtype), floats(5, 8, 6, grad=True, dtype=dtype)
        found = moe.fused_experts(rows, *experts, weights.detach(), ids)
        yield torch.autograd.grad((found**2).sum(), (rows, *experts))
        constants, own = floats(2, 8, grad=True, dtype=dtype), weights.detach().requires_grad_()
        found = moe.constant_experts(rows, own, ids, 1, num_copies=2, constants=constants)
        yield torch.autograd.grad((found**2).sum(), (rows, own, constants))


def blocks():
    """Blocks whose dtype and device are said, their gradients, and the same compiled."""
    options = {"correction_bias": True, "bias": True, "shared_size": 4, "scoring_func": "sigmoid"}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        block = moe.MoEBlock(8, 6, 5, 2, dtype=dtype, device="cpu", **options)
        rows = floats(6, 8, grad=True, dtype=dtype)
        yield torch.autograd.grad((block(rows) ** 2).sum(), (rows, *block.parameters()))
        with torch.autocast("cpu", torch.bfloat16):
            yield block(rows).detach()


def compiled():
    def step(scores, rows):
        weights, ids = moe.topk_softmax(scores, 2, True)
        permuted = moe.moe_permute(rows, ids, num_experts=5)
        return moe.moe_unpermute(permuted.permuted_hidden_states, weights, permuted.inv_permuted_idx)

    torch.compiler.reset()
    yield torch.compile(step, backend="aot_eager", fullgraph=True)(floats(6, 5), floats(6, 8))
    with torch.no_grad():
        for result in (
            torch.ops.numba_moe.topk_softmax(floats(6, 5), 2),
            torch.ops.numba_moe.expert_offsets(chosen()[0]),
        ):
            yield [(part.dtype, str(part.device)) for part in (result if isinstance(result, tuple) else (result,))]


def other_arrays():
    """NumPy arrays, which are answered in kind."""
    logits, ids = floats(6, 5).numpy(), chosen().numpy()
    yield moe.topk_softmax(logits, 2), moe.moe_align_block_size(ids, 4, 5), moe.moe_permute(logits, ids, 5)


def places():
    """Dispatch by every algorithm, and again after a change; where experts go, and how they get there."""
    location = ExpertLocation.from_mapping([[0, 1, 2, 3, 4, 0]] * 2, num_gpus=2)
    for algorithm in ("static", "dynamic", "hash", "fake"):
        dispatch = ExpertDispatch(location, rank=1, device="cpu", algorithm=algorithm)
        load = torch.zeros(6, dtype=torch.int64, device="cpu")
        yield dispatch(chosen(), layer=1, counts=load), load
        dispatch.update(ExpertLocation.from_mapping([[0, 1, 2, 3, 0, 4]] * 2, num_gpus=2))
        yield dispatch(chosen(), layer=1)
    counts = torch.from_numpy(np.random.default_rng(0).integers(1, 90, (2, 12)))
    for algorithm in ("deepseek", "refined"):
        found = placement.rebalance_experts(counts, 16, 1, 1, 4, algorithm=algorithm)
        yield tuple(found), placement.balancedness(counts, found[0], num_gpus=4)
    old, new = ExpertLocation.trivial(2, 3), ExpertLocation.from_mapping([[2, 0, 1], [1, 2, 0]])
    weights = [[floats(3, 4)], [floats(3, 4)]]
    yield list(placement.migrate_in_chunks(weights, old, new, verify=True)), weights


def recordings(folder):
    """Every mode of the recorder, through every format of files, and what the counts say."""
    for mode in ("stat", "stat_approx", "per_pass", "per_token"):
        options = {"buffer_size": 2} if mode == "per_token" else {}
        of = recorder.ExpertDistributionRecorder(2, 5, mode=mode, device="cpu", **options)
        of.start_record()
        for number in range(3):
            with of.with_forward_pass(number):
                for layer in range(2):
                    with of.with_current_layer(layer):
                        if mode == "stat_approx":
                            of.on_dispatch_counts(torch.bincount(chosen().flatten(), minlength=5).int())
                        else:
                            of.on_select_experts(chosen(), floats(6, 2).abs())
        dump = of.dump_record(output_mode="object")
        yield [part for part in vars(dump).values() if isinstance(part, np.ndarray)]
        for suffix in ("npz", "safetensors", "json", "pt"):
            path = folder / f"{mode}.{suffix}"
            dump.save(path)
            yield recorder.load(path).logical_count
    counts = torch.from_numpy(np.random.default_rng(0).integers(0, 900, (2, 6)))
    yield recorder.utilization(counts, 2), recorder.expert_entropy(counts), recorder.traffic_matrix(counts[None], 2)
    many = torch.from_numpy(np.random.default_rng(1).random((777, 5)).argsort(1)[:, :2].astype(np.int32))
    yield recorder.coactivation(many, 5)


def peers():
    """Functions under the peers' names."""
    yield vllm.fused_topk(floats(6, 8), floats(6, 5), 2, True), vllm.moe_align_block_size(chosen(), 4, 5)
    yield vllm.count_expert_num_tokens(chosen(), 5, None)
    weights, ids = torch.empty(6, 2, dtype=torch.float32, device="cpu"), chosen()
    sglang.topk_softmax(weights, ids, floats(6, 5), True)
    yield weights, ids


def small_models():
    """Losses of a language model that learns."""
    settings = tiny.Settings(layers=1, hidden=8, heads=2, experts=3, top_k=2, width=8, length=6, batch=2, steps=2)
    yield tiny.train(settings, "cpu").losses


SCENES = (gradients, blocks, compiled, other_arrays, places, recordings, peers, small_models)


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(found, tuple | list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(found, torch.Tensor):
        assert (found.dtype, found.device) == (expected.dtype, expected.device)
        assert torch.equal(found, expected)
    elif isinstance(found, np.ndarray):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


@pytest.mark.sweep(8)
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_the_same_is_found(scene, another_default, tmp_path):
    folder = (tmp_path,) if scene is recordings else ()
    expected = list(scene(*folder))
    with another_default:
        found = list(scene(*folder))
    assert_same(found, expected)


def test_experts_of_transformers_models(another_default):
    pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

    from numba_moe.interop import transformers as interop

    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=8, intermediate_size=6, num_local_experts=5, num_experts_per_tok=2)
    experts = MixtralExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    given = floats(6, 8), chosen().long(), floats(6, 2).abs()
    expected = experts(*given)
    with another_default:
        assert interop.find_gate(experts).activation == "silu"
        found = interop.experts_forward(experts, *given)
    torch.testing.assert_close(found, expected)


def test_a_block_whose_dtype_is_not_said_has_the_default_one(another_default):
    with another_default:
        parameters = list(moe.MoEBlock(8, 6, 5, 2).parameters())
        expected = torch.empty(1)
    assert {(p.dtype, p.device) for p in parameters} == {(expected.dtype, expected.device)}
