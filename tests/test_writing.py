"""What an op writes is noticed by autograd, and is memory that belongs to nothing else in the call."""

import functools

import numpy as np
import pytest
import torch

import numba_moe as moe
from numba_moe import placement, recorder
from numba_moe.interop import into, sglang, sglang_kernels, sglang_srt, vllm, vllm_ops
from numba_moe.verify.verification import OPS

IDS = torch.tensor([[0, 1], [1, 2], [3, 0]], dtype=torch.int32)
LOGITS = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
TABLE = torch.tensor([3, 2, 1, 0], dtype=torch.int32)


def ints(size, value=0):
    return torch.full((size,), value, dtype=torch.int32)


def align_out():
    sizes = moe.align_sizes(6, 2, 4)
    return tuple(map(ints, (sizes.sorted_token_ids, sizes.expert_ids, 1)))


def selection_memory():
    return {"identity_weights": torch.zeros(3), "counts": ints(4)}


# Every public function that writes: its arguments, and memory for all that it can write.
WRITING = {
    "moe_align_block_size": (
        functools.partial(moe.moe_align_block_size, IDS, 2, 4),
        lambda: {"out": align_out(), "inv_sorted_idx": IDS.clone(), "counts": ints(4), "workspace": ints(64)},
    ),
    "select_experts": (functools.partial(moe.select_experts, LOGITS, 2, num_zero_experts=1), selection_memory),
    "weigh_experts": (functools.partial(moe.weigh_experts, LOGITS, IDS, num_zero_experts=1), selection_memory),
    "route": (functools.partial(moe.route, LOGITS, 2, 2, num_zero_experts=1), selection_memory),
    "dispatch_ids": (
        functools.partial(placement.dispatch_ids, IDS, TABLE),
        lambda: {"out": torch.empty_like(IDS), "counts": ints(4)},
    ),
    "add_expert_counts": (
        functools.partial(recorder.add_expert_counts, IDS),
        lambda: {"counts": torch.zeros(4, dtype=torch.int64)},
    ),
}
WRITTEN = [(name, keyword) for name, (_, memory) in WRITING.items() for keyword in memory()]


def required(name, given):
    """Return the memory that a function cannot do without, and that of these keywords."""
    memory = WRITING[name][1]()
    return {keyword: memory[keyword] for keyword in memory if keyword in given or name == "add_expert_counts"}


def parts(value):
    return value if isinstance(value, tuple) else (value,)


def test_every_op_that_writes_is_here():
    ops = (getattr(OPS[name], name).declaration for name in OPS)
    writes = {
        op.name: {*op.writes, *([op.out] if op.own_out else [])} for op in ops
    }  # and `out`, if it is as the result; see test_out.py
    assert {name: set(memory()) for name, (_, memory) in WRITING.items()} == {
        name: keywords for name, keywords in writes.items() if keywords
    }


def way(through):
    """Return what calls a function eagerly, by its op as for a parameter, or compiled."""
    if through == "op":
        return lambda call, **memory: call.func(
            call.args[0].as_subclass(Other), *call.args[1:], **call.keywords, **memory
        )
    if through == "compiled":
        torch._dynamo.reset()
        return lambda call, **memory: torch.compile(lambda: call(**memory), backend="aot_eager", fullgraph=True)()
    return lambda call, **memory: call(**memory)


class Other(torch.Tensor):
    """A tensor of another class, which takes the way through torch's dispatcher."""


@pytest.mark.sweep(20)
@pytest.mark.parametrize("through", ["eager", "op", "compiled"])
@pytest.mark.parametrize(("name", "keyword"), WRITTEN)
def test_what_is_written_counts_up_its_version(name, keyword, through):
    memory = required(name, {keyword})
    before = [part._version for part in parts(memory[keyword])]
    way(through)(WRITING[name][0], **memory)
    assert all(part._version > one for part, one in zip(parts(memory[keyword]), before, strict=True))


@pytest.mark.parametrize(("name", "keyword"), WRITTEN)
def test_kernels_count_up_versions_too(name, keyword, device):
    memory = {key: tuple(part.to(device) for part in parts(value)) for key, value in required(name, {keyword}).items()}
    memory = {key: value if key == "out" and len(value) > 1 else value[0] for key, value in memory.items()}
    before = [part._version for part in parts(memory[keyword])]
    call = WRITING[name][0]
    call.func(
        *(arg.to(device) if isinstance(arg, torch.Tensor) else arg for arg in call.args), **call.keywords, **memory
    )
    assert all(part._version > one for part, one in zip(parts(memory[keyword]), before, strict=True))


def test_autograd_refuses_what_was_written_over():
    weights, ids = moe.topk_softmax(LOGITS.clone().requires_grad_(), 2)
    placement.dispatch_ids(ids, TABLE, out=ids)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weights.sum().backward()


def test_inference_tensors_are_written_without_a_version():
    with torch.inference_mode():
        counts = ints(4)
    moe.moe_align_block_size(IDS, 2, 4, counts=counts)
    assert counts.tolist() == [2, 2, 1, 1]


@pytest.mark.parametrize("name", ["select_experts", "weigh_experts", "route"])
def test_what_is_written_has_no_gradient(name):
    weights = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="`identity_weights` must be without a gradient, as it is written"):
        WRITING[name][0](identity_weights=weights)
    with torch.no_grad():
        WRITING[name][0](identity_weights=weights)


def test_numpy_arrays_are_written_in_place():
    counts = np.zeros(4, np.int32)
    moe.moe_align_block_size(IDS.numpy(), 2, 4, counts=counts)
    assert counts.tolist() == [2, 2, 1, 1]
    with pytest.raises(ValueError, match="`counts` must be of this machine's byte order, got dtype >i4"):
        moe.moe_align_block_size(IDS.numpy(), 2, 4, counts=counts.astype(">i4"))


def overlapping(one, other):
    """Return tensors like these, the second of which begins inside the first."""
    buffer = torch.zeros(one.nbytes + other.nbytes, dtype=torch.uint8)
    start = max(one.nbytes - one.itemsize, 0) // other.itemsize * other.itemsize
    views = buffer[: one.nbytes].view(one.dtype), buffer[start : start + other.nbytes].view(other.dtype)
    return views[0].view(one.shape), views[1].view(other.shape)


PAIRS = [
    (name, first, second)
    for name, (_, memory) in WRITING.items()
    for index, first in enumerate(memory())
    for second in list(memory())[index + 1 :]
]


@pytest.mark.parametrize("device", ["reference", "kernels"])
@pytest.mark.parametrize(("name", "first", "second"), PAIRS)
def test_memory_that_overlaps_is_refused(name, first, second, device, request):
    if device == "kernels":
        request.getfixturevalue("device")
    memory = required(name, {first, second})
    ends = parts(memory[first])
    one, other = overlapping(ends[0], memory[second])
    if second == "workspace":  # which has to be aligned
        other, one = overlapping(memory[second], ends[0])
    memory[first], memory[second] = (one, *ends[1:]) if len(ends) > 1 else one, other
    with pytest.raises(ValueError, match="must be in memory of its own, got an array that overlaps"):
        WRITING[name][0](**memory)


@pytest.mark.parametrize(("name", "keyword"), WRITTEN)
def test_memory_of_an_input_is_refused(name, keyword):
    memory = required(name, {keyword})
    call = WRITING[name][0]
    written = parts(memory[keyword])
    given = call.args[0]
    buffer = torch.zeros(4 * 64, dtype=torch.uint8)
    size = min(given.itemsize, 4)
    inside = buffer[: written[0].nbytes].view(written[0].dtype).view(written[0].shape)
    moved = buffer[size * 2 : size * 2 + given.nbytes].view(given.dtype).view(given.shape).copy_(given)
    memory[keyword] = (inside, *written[1:]) if len(written) > 1 else inside
    named = "out\\[0\\]" if len(written) > 1 else keyword
    own = {"moe_align_block_size": "topk_ids", "dispatch_ids": "topk_ids", "add_expert_counts": "topk_ids"}
    with pytest.raises(
        ValueError, match=f"`{named}` must be in memory of its own, got an array that overlaps"
    ) as found:
        call.func(moved, *call.args[1:], **call.keywords, **memory)
    assert own.get(name, "gating_output") in str(found.value)


def test_tables_of_a_dispatch_are_inputs():
    table = ints(8)
    tables = placement.DispatchTables(table[:4]) if hasattr(placement, "DispatchTables") else None
    tables = tables or moe.reference.dispatch.DispatchTables(table[:4], None, "static", 0, None)
    with pytest.raises(ValueError, match="`counts` must be in memory of its own, got an array that overlaps `dispatch"):
        moe.select_experts(LOGITS, 2, dispatch=tables, counts=table[2:6])


def test_ids_may_be_dispatched_where_they_are_and_not_elsewhere_in_them():
    ids = torch.cat([IDS.ravel(), IDS.ravel()])
    placement.dispatch_ids(ids[:6], TABLE, out=ids[:6])
    assert ids.tolist() == [3, 2, 2, 1, 0, 3, 0, 1, 1, 2, 3, 0]
    with pytest.raises(ValueError, match="`out` must be in memory of its own, got an array that overlaps `topk_ids`"):
        placement.dispatch_ids(ids[:6], TABLE, out=ids[1:7])


def test_arrays_beside_strided_rows_do_not_overlap_them():
    buffer = torch.zeros(5, 8)
    buffer[:, :4] = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    between = buffer[1, 4:8]
    found = moe.select_experts(buffer[:4, :4], 2, num_zero_experts=2, identity_weights=between)
    want = torch.zeros(4)
    assert torch.equal(
        found.topk_ids,
        moe.select_experts(buffer[:4, :4].clone(), 2, num_zero_experts=2, identity_weights=want).topk_ids,
    )
    assert torch.equal(between, want)
    with pytest.raises(ValueError, match="`identity_weights` must be in memory of its own"):
        moe.select_experts(buffer[:4, :4], 2, num_zero_experts=2, identity_weights=buffer[1, 3:7])


def test_a_plan_that_is_known_does_not_let_memory_overlap():
    buffer = ints(64)
    moe.moe_align_block_size(IDS, 2, 4, counts=buffer[:4], inv_sorted_idx=buffer[16:22].view(3, 2))
    with pytest.raises(ValueError, match="`inv_sorted_idx` must be in memory of its own, got an array that overlaps"):
        moe.moe_align_block_size(IDS, 2, 4, counts=buffer[16:20], inv_sorted_idx=buffer[16:22].view(3, 2))


def test_numpy_memory_that_overlaps_is_refused():
    buffer = np.zeros(16, np.int32)
    with pytest.raises(
        ValueError, match="`inv_sorted_idx` must be in memory of its own, got an array that overlaps `counts`"
    ):
        moe.moe_align_block_size(IDS.numpy(), 2, 4, counts=buffer[:4], inv_sorted_idx=buffer[2:8].reshape(3, 2))


ROWS = torch.randn(3, 8, generator=torch.Generator().manual_seed(4))
SORTED = [("sorted_token_ids", (10,)), ("experts_ids", (5,)), ("num_tokens_post_pad", (1,))]
CHOICE = [("topk_weights", (3, 2)), ("topk_ids", (3, 2))]
VLLM_CHOICE = [*CHOICE, ("token_expert_indices", (3, 2))]
PROBLEMS = ["expert_offsets", "problem_sizes1", "problem_sizes2", "input_permutation", "output_permutation"]
SOFTMAX = {"scoring_func": "softmax"}
BUCKETS = [("sorted_token_ids", (12,)), ("expert_ids", (6,)), ("num_tokens_post_pad", (1,))]
REORDERED = {
    "down_output": ROWS.repeat(2, 1),
    "src2dst": torch.arange(6, dtype=torch.int32),
    "topk_ids": IDS,
    "topk_weights": torch.ones(3, 2),
    "topk": 2,
    "hidden_size": 8,
}
# The peers' functions that write: what they write, of 32 bits, with its shape, and their other arguments.
PEERS = {
    vllm_ops.moe_align_block_size: (
        [*SORTED, ("scatter_idx", (6,))],
        {"topk_ids": IDS, "num_experts": 4, "block_size": 2},
    ),
    vllm_ops.batched_moe_align_block_size: (
        [("sorted_ids", (8,)), ("expert_ids", (4,)), ("num_tokens_post_pad", (1,))],
        {"max_tokens_per_batch": 2, "block_size": 2, "expert_num_tokens": ints(4, 1)},
    ),
    vllm_ops.moe_lora_align_block_size: (
        [("sorted_token_ids", (20,)), ("experts_ids", (10,)), ("num_tokens_post_pad", (2,))],
        {
            "topk_ids": IDS,
            "token_lora_mapping": ints(3),
            "num_experts": 4,
            "block_size": 2,
            "max_loras": 2,
            "max_num_tokens_padded": 10,
            "max_num_m_blocks": 5,
            "adapter_enabled": ints(3, 1),
            "lora_ids": torch.tensor([0, 1], dtype=torch.int32),
        },
    ),
    vllm_ops.topk_softmax: (VLLM_CHOICE, {"gating_output": LOGITS}),
    vllm_ops.topk_sigmoid: (VLLM_CHOICE, {"gating_output": LOGITS}),
    vllm_ops.topk_hash_softplus_sqrt: (
        [("topk_weights", (3, 2)), ("topk_indices", (3, 2)), ("token_expert_indices", (3, 2))],
        {"gating_output": LOGITS},
    ),
    vllm_ops.fused_globalize_align_block_size: (
        [("sorted_ids", (10,)), ("expert_ids", (5,)), ("num_tokens_post_pad", (1,)), ("scatter_idx", (6,))],
        {
            "topk_idx": IDS.long(),
            "psum": ints(1, 3),
            "rank_expert_offset": 0,
            "global_num_experts": 4,
            "local_num_experts": 4,
            "block_size": 2,
        },
    ),
    vllm_ops.moe_prepare_scatter: (
        [("expert_first_token_offset", (5,)), ("scatter_idx", (3, 2))],
        {
            "topk_ids": IDS,
            "token_expert_indices": None,
            "expert_map": None,
            "n_expert": 4,
            "n_local_expert": -1,
            **dict.fromkeys(("sort_workspace", "permuted_experts_id", "sorted_row_idx", "topk_ids_for_sort")),
        },
    ),
    vllm_ops.moe_sum: ([("output", (3, 8))], {"input": ROWS.view(3, 1, 8)}),
    vllm_ops.moe_permute: (
        [
            *[("permuted_hidden_states", (6, 8)), ("expert_first_token_offset", (5,))],
            *[("inv_permuted_idx", (3, 2)), ("permuted_idx", (6,))],
        ],
        {
            "hidden_states": ROWS,
            "topk_ids": IDS,
            "token_expert_indices": IDS,
            "expert_map": None,
            "n_expert": 4,
            "n_local_expert": -1,
            "topk": 2,
        },
    ),
    vllm_ops.moe_unpermute: (
        [("hidden_states", (3, 8))],
        {
            "permuted_hidden_states": ROWS.repeat(2, 1),
            "topk_weights": torch.ones(3, 2),
            "topk": 2,
            "inv_permuted_idx": torch.arange(6, dtype=torch.int32).view(3, 2),
            "expert_first_token_offset": None,
        },
    ),
    vllm.moe_fused_mul_sum: ([("outputs", (3, 8))], {"inputs": ROWS.view(3, 1, 8), "topk_weights": torch.ones(3, 1)}),
    vllm.eplb_map_to_physical_and_record: (
        [("expert_load_view", (4,))],
        {
            "topk_ids": IDS,
            "logical_to_physical_map": torch.arange(4, dtype=torch.int32)[:, None],
            "logical_replica_count": ints(4, 1),
            "record_enabled": torch.tensor([True]),
        },
    ),
    vllm.moe_permute: (
        [("permuted_hidden_states", (6, 8))],
        {"hidden_states": ROWS, "a1q_scale": None, "topk_ids": IDS, "n_expert": 4},
    ),
    vllm.moe_unpermute: (
        [("out", (3, 8))],
        {
            "permuted_hidden_states": ROWS.repeat(2, 1),
            "topk_weights": torch.ones(3, 2),
            "inv_permuted_idx": torch.arange(6, dtype=torch.int32),
        },
    ),
    sglang.moe_align_block_size: (
        [("sorted_token_ids", (12,)), ("experts_ids", (6,)), ("num_tokens_post_pad", (1,))],
        {"topk_ids": IDS, "num_experts": 5, "block_size": 2, "cumsum_buffer": ints(6)},
    ),
    sglang.moe_align_block_size_with_counters: (
        [("sorted_token_ids", (10,)), ("experts_ids", (5,)), ("num_tokens_post_pad", (1,))],
        {"topk_ids": IDS, "num_experts": 4, "block_size": 2, "token_cnts_buffer": None, "cumsum_buffer": None},
    ),
    sglang.topk_softmax_with_indices: (VLLM_CHOICE, {"gating_output": LOGITS}),
    sglang_kernels.moe_fused_gate: ([("packed_out", (3, 2))], {"scores": LOGITS, "bias": None, "topk": 2, **SOFTMAX}),
    sglang_kernels.moe_align_small_numel: (BUCKETS, {"topk_ids": IDS, "num_experts": 5, "block_size": 2}),
    sglang_kernels.jit_moe_align_block_size: (
        BUCKETS,
        {"topk_ids": IDS, "num_experts": 5, "block_size": 2, "cumsum_buffer": None},
    ),
    sglang_kernels.moe_fused_mul_sum: (
        [("outputs", (3, 8))],
        {"inputs": ROWS.view(3, 1, 8), "topk_weights": torch.ones(3, 1)},
    ),
    sglang_kernels.moe_sum_reduce_triton: (
        [("output", (3, 8))],
        {"input": ROWS.view(3, 1, 8), "routed_scaling_factor": 2.0},
    ),
    sglang_kernels.moe_topk_sum: ([("out", (3, 8))], {"x": ROWS.view(3, 1, 8)}),
    sglang_kernels.fused_topk_deepseek: (
        [("topk_values", (3, 2)), ("topk_indices", (3, 2)), ("routing_replay_out", (3, 2))],
        {
            "scores": LOGITS,
            "bias": torch.zeros(4),
            "n_group": 2,
            "topk_group": 1,
            "topk": 2,
            "routed_scaling_factor": 1.0,
        },
    ),
    sglang_kernels.topk_sigmoid: (CHOICE, {"gating_output": LOGITS}),
    sglang_kernels.cutlass_prepare_moe_input: (
        [*zip(PROBLEMS, [(5,), (4, 3), (4, 3), (6,), (6,)], strict=True), ("blockscale_offsets", (5,))],
        {"topk_ids": IDS, "num_experts": 4, "n": 16, "k": 8},
    ),
    sglang_srt.fused_topk: (
        [("packed_out", (3, 2))],
        {"hidden_states": ROWS, "gating_output": LOGITS, "topk": 2, "renormalize": True},
    ),
    sglang_srt.simulate_balanced_routing: (CHOICE, {"num_experts": 4, "random": False}),
    sglang_srt.pre_reorder_for_cutlass_moe: (
        [("gateup_input", (6, 8))],
        {
            "input": ROWS,
            "src2dst": torch.arange(6, dtype=torch.int32),
            "topk_ids": IDS,
            "a1_scales": None,
            "num_local_experts": 4,
            "topk": 2,
            "num_tokens": 3,
            "hidden_size": 8,
        },
    ),
    sglang_srt.post_reorder_for_cutlass_moe: (
        [("output", (3, 8))],
        {**REORDERED, "num_local_experts": 4, "num_tokens": 3},
    ),
    sglang_srt.deepep_post_reorder: ([("output", (3, 8))], REORDERED),
    sglang.topk_softmax: (CHOICE, {"gating_output": LOGITS}),
    sglang.topk_sigmoid: (CHOICE, {"gating_output": LOGITS}),
    sglang.moe_sum: ([("output_tensor", (3, 8))], {"input_tensor": ROWS.view(3, 1, 8)}),
    sglang.moe_sum_reduce: ([("output_tensor", (3, 8))], {"input_tensor": ROWS.view(3, 1, 8)}),
    sglang.prepare_moe_input: (
        [*zip(PROBLEMS, [(5,), (4, 3), (4, 3), (6,), (6,)], strict=True), ("blockscale_offsets", (5,))],
        {"topk_ids": IDS, "num_experts": 4, "n": 16, "k": 8},
    ),
}
FLOATS = {
    "topk_values",
    "topk_weights",
    "output",
    "output_tensor",
    "permuted_hidden_states",
    "hidden_states",
    "out",
    "outputs",
    "gateup_input",
}
PLACES = [(function, name) for function, (written, _) in PEERS.items() for name, _ in written]


def peer_memory(function):
    written, arguments = PEERS[function]
    dtypes = {name: torch.float32 if name in FLOATS else torch.int32 for name, _ in written}
    return {name: torch.zeros(shape, dtype=dtypes[name]) for name, shape in written}, dict(arguments)


def label(value):
    return value if isinstance(value, str) else f"{value.__module__.rpartition('.')[2]}.{value.__name__}"


@pytest.mark.parametrize(("function", "name"), PLACES, ids=label)
def test_what_peers_functions_write_is_noticed_and_is_memory_of_its_own(function, name):
    memory, arguments = peer_memory(function)
    before = memory[name]._version
    function(**memory, **arguments)
    assert memory[name]._version > before
    for other, value in [*memory.items(), *arguments.items()]:
        if other != name and isinstance(value, torch.Tensor) and value.itemsize == 4:
            memory, arguments = peer_memory(function)
            one, two = overlapping(memory[name], value)
            two.copy_(value)
            memory[name] = one
            (memory if other in memory else arguments)[other] = two
            rule = f"`({name}|{other})` must be in memory of its own, got an array that overlaps `({name}|{other})`"
            with pytest.raises(ValueError, match=rule):
                function(**memory, **arguments)


def test_every_function_that_writes_is_here():
    modules = (vllm, vllm_ops, sglang, sglang_kernels, sglang_srt)
    held = {name: value for module in modules for name, value in vars(module).items()}
    assert {value for name, value in held.items() if hasattr(value, "written") and name[0] != "_"} <= set(PEERS)
    names = {*vllm_ops.OF_CUSTOM_OPS, "moe_permute", "moe_unpermute"} - {"grouped_topk"}
    assert names | set(sglang.FUNCTIONS) - {"moe_fused_gate", "kimi_k2_moe_fused_gate"} <= {
        function.__name__ for function in PEERS
    }


def test_memory_of_peers_takes_results_without_copies_where_it_can():
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    plain = moe.moe_permute(rows, IDS, 4)
    whole = {"permuted_hidden_states": torch.empty(6, 8), "inv_permuted_idx": ints(6), "permuted_idx": ints(6)}
    found = into.call(moe.moe_permute, whole, rows, IDS, 4)
    for name, memory in whole.items():
        assert getattr(found, name).data_ptr() == memory.data_ptr()
        assert torch.equal(memory.view(getattr(plain, name).shape), getattr(plain, name))
    offset = torch.full((3,), -7)
    for given in (rows, rows.clone().requires_grad_()):
        into.call(moe.moe_permute, {"expert_first_token_offset": offset.fill_(-7)}, given, IDS, 4)
        assert offset.tolist() == plain.expert_first_token_offset[:3].tolist()
    for memory, error in ((ints(5), ValueError), (ints(6).long(), TypeError)):
        with pytest.raises(error, match=r"`out.permuted_idx` must be of"):
            into.call(moe.moe_permute, {"permuted_idx": memory}, rows, IDS, 4)
