"""torch.compile, torch.export and the dispatcher see the ops as they are called, and eager calls see none of it."""

import inspect

import pytest
import torch
from torch._dynamo.exc import TorchRuntimeError
from torch._dynamo.testing import CompileCounterWithBackend

import numba_moe as moe
from numba_moe import reference, sizes
from numba_moe.interop import torch_ops as torch_ops  # which registers all
from numba_moe.placement import dispatch_ids
from numba_moe.recorder import add_expert_counts
from numba_moe.runtime import arrays, torch_library
from numba_moe.runtime.declaration import DECLARATIONS
from numba_moe.verify import testing, verification

pytestmark = pytest.mark.filterwarnings(  # of torch's compiler about torch
    "ignore:.torch.jit.script:DeprecationWarning",
    "ignore:.isinstance.treespec:FutureWarning",
    "ignore:The CUDA Graph is empty:UserWarning",
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EXPERTS, TOP_K, HIDDEN = 8, 2, 16
OPS = torch.ops.numba_moe


def ids(tokens, device="cpu", dtype=torch.int32):
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
    return chosen.to(dtype).to(device)


def logits(tokens, device="cpu", grad=False):
    drawn = torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(tokens))
    return drawn.to(device).requires_grad_(grad)


def wide(rows):
    """Return rows that lie inside wider ones."""
    return torch.nn.functional.pad(rows, (0, 3))[:, : rows.shape[1]]


def ints(size, device, value=0):
    return torch.full((size,), value, dtype=torch.int32, device=device)


def align_out(tokens, device):
    sizes = moe.align_sizes(tokens * TOP_K, 4, EXPERTS)
    return [ints(size, device) for size in (sizes.sorted_token_ids, sizes.expert_ids, 1)]


def calls(tokens, device):
    """Yield an op with arguments, of every op: a call with the fewest arguments, and one with all of them."""
    chosen, scores = ids(tokens, device), logits(tokens, device)
    half = torch.tensor([-1, 0, 1, -1, 2, -1, 3, -1], device=device)
    rows = torch.arange(tokens * HIDDEN, dtype=torch.float32, device=device).view(tokens, HIDDEN)
    bias = torch.linspace(-0.1, 0.1, EXPERTS, device=device)
    sizes = torch.bincount(chosen.ravel(), minlength=EXPERTS)
    adapters = torch.arange(tokens, device=device) % 3 - 1
    yield OPS.moe_align_block_size, (chosen, 4, EXPERTS), {}
    yield OPS.moe_align_block_size, (chosen.long(), 4, EXPERTS, half, True, True), {"inactive_expert_id": 0}
    written = {"out": align_out(tokens, device), "counts": ints(EXPERTS, device), "inv_sorted_idx": chosen.clone()}
    yield OPS.moe_align_block_size_out, (chosen, 4, EXPERTS), {"out": align_out(tokens, device)}
    yield OPS.moe_align_block_size_out, (chosen, 4, EXPERTS, half), {**written, "workspace": ints(64, device)}
    yield OPS.batched_moe_align_block_size, (tokens, 4, sizes), {}
    yield OPS.moe_lora_align_block_size, (chosen, adapters, 4, EXPERTS, 2), {}
    options = ints(3, device, 1), torch.tensor([1, -1], dtype=torch.int32, device=device), half, True
    yield OPS.moe_lora_align_block_size, (chosen, adapters, 4, EXPERTS, 2, *options), {"inactive_expert_id": 0}
    yield OPS.make_ragged_metadata, (sizes, tokens * TOP_K), {}
    yield OPS.count_tokens_per_expert, (chosen, EXPERTS), {}
    yield OPS.count_tokens_per_expert, (chosen.ravel(), EXPERTS, half), {}
    yield OPS.dispatch_layout, (chosen, ints(EXPERTS, device, 1), 2), {}
    yield OPS.expert_offsets, (sizes, 4), {}
    for name in ("topk_softmax", "topk_sigmoid", "topk_softplus_sqrt", "topk_raw"):
        yield getattr(OPS, name), (scores, TOP_K), {}
        yield getattr(OPS, name), (wide(scores).requires_grad_(), TOP_K, True, bias), {}
    yield OPS.grouped_topk, (scores, TOP_K, 4, 2), {}
    options = {"scoring_func": "sigmoid", "correction_bias": bias, "routed_scaling_factor": 2.5}
    yield OPS.grouped_topk, (wide(scores).requires_grad_(), TOP_K, 4, 2, True), {**options, "group_score": "max"}
    yield OPS.select_experts, (scores.bfloat16().requires_grad_(), TOP_K), {}
    table = torch.arange(EXPERTS + 1, dtype=torch.int32, device=device)
    counts = torch.zeros(EXPERTS, dtype=torch.int64, device=device)
    options = {"num_fused_shared_experts": 1, "indices_dtype": "int64", "routed_scaling_factor": 2.5, "softcap": 3.0}
    options |= {"num_token_non_padded": torch.tensor([tokens // 2], device=device), "renormalize": True}
    routed = {"dispatch_physical_map": table, "scoring_func": "sigmoid", **options}
    yield OPS.select_experts, (scores, TOP_K), {**options, "bias_mode": "logits", "correction_bias": bias}
    zero = {"num_zero_experts": 2, "identity_weights": torch.zeros(tokens, device=device)}
    yield OPS.select_experts_writing, (scores, TOP_K), {**routed, "counts": counts}
    yield OPS.select_experts_writing, (scores, TOP_K), {**zero, "counts": None}
    wanting = scores.clone().requires_grad_()
    yield OPS.select_experts, (wanting, TOP_K), {**routed}
    yield OPS.weigh_experts, (scores, chosen), {}
    yield OPS.weigh_experts, (wanting, chosen), {**routed}
    yield OPS.weigh_experts_writing, (scores, chosen), {**routed, "counts": counts, "counts_enabled": ints(1, device)}
    yield OPS.route, (scores, TOP_K, 4), {}
    yield OPS.route_writing, (scores, TOP_K, 4), {**zero, "counts": counts, "pad_sorted_ids": True}
    yield OPS.moe_permute, (rows, chosen, EXPERTS), {}
    scaled = {"scales": torch.ones(tokens, 3, device=device), "alignment": 4}
    yield OPS.moe_permute, (wide(rows).bfloat16().requires_grad_(), chosen, EXPERTS, half), scaled
    yield OPS.moe_permute_masked, (rows, chosen, EXPERTS, 5), {}
    masked = {"num_local_experts": 4, "scales": torch.ones(tokens, device=device)}
    yield OPS.moe_permute_masked, (wide(rows).requires_grad_(), chosen, EXPERTS, 5, half), masked
    yield OPS.moe_reorder, (chosen, EXPERTS, half), {}
    triple = torch.randn(tokens, TOP_K, HIDDEN, device=device)
    yield OPS.moe_sum, (triple,), {}
    options = {"routed_scaling_factor": 2.0, "out_dtype": torch.float32}
    yield OPS.moe_sum, (triple.bfloat16().requires_grad_(), chosen - 1), options
    inverse = torch.arange(tokens * TOP_K, dtype=torch.int32, device=device).view(tokens, TOP_K)
    weights = torch.full((tokens, TOP_K), 0.5, device=device)
    yield OPS.moe_unpermute, (wide(rows.repeat(TOP_K, 1)).half(), weights, inverse), {}
    moved = rows.repeat(TOP_K, 1).requires_grad_(), weights.requires_grad_(), inverse
    yield OPS.moe_unpermute, moved, {"routed_scaling_factor": 2.0, "out_dtype": torch.bfloat16}
    offset = torch.tensor([0, tokens // 2, tokens], device=device)
    options = {"activation": "swiglu_oai", "limit": 3.0}
    yield OPS.moe_activation, (rows[:, :6].contiguous(),), {}
    bias = torch.ones(2, 6, device=device, requires_grad=True)
    yield OPS.moe_activation, (rows[:, :6].clone().requires_grad_(), offset, bias), options
    bent = {"activation": "situ", "beta": 2.0, "linear_beta": 5.0}
    yield OPS.moe_activation, (rows[:, :6].clone().requires_grad_(), offset, bias), bent
    yield OPS.moe_activation, (rows[:, :5].clone().requires_grad_(),), {"activation": "relu2_no_mul"}
    up, down = torch.ones(EXPERTS, 6, HIDDEN, device=device), torch.ones(EXPERTS, HIDDEN, 3, device=device)
    yield OPS.fused_experts, (wide(rows), up, down, weights.detach(), chosen), {}
    biases = {"gate_up_bias": up[:, :, 0].contiguous(), "down_bias": down[:, :, 0].contiguous()}
    given = (rows, up[:4].mT.contiguous().mT, down[:4], weights.detach(), chosen)
    local = {name: bias[:4] for name, bias in biases.items()}
    yield OPS.fused_experts, given, {**local, "expert_map": half, "activation": "swiglu_oai", "limit": 3.0}
    yield OPS.constant_experts, (wide(rows).bfloat16(), weights.detach(), chosen, 3), {"num_copies": 2}
    constants = torch.ones(2, HIDDEN, device=device, requires_grad=True)
    yield OPS.constant_experts, (rows.detach(), weights, chosen, 3, 1, constants, rows.detach()), {}
    replicas = half.int().view(-1, 2)
    yield OPS.dispatch_ids, (chosen, table), {"num_token_non_padded": ints(1, device, tokens - 1)}
    drawn = {"algorithm": "dynamic", "seed": 3, "step": torch.tensor([5], device=device)}
    few = chosen % len(replicas), replicas, ints(len(replicas), device, 2)
    yield OPS.dispatch_ids_out, few, {**drawn, "out": chosen.clone(), "counts": counts}
    yield OPS.add_expert_counts, (chosen,), {"counts": counts}
    switches = {"enabled": ints(1, device, 1), "num_tokens": ints(1, device, tokens), "first_row": 0}
    yield OPS.add_expert_counts, (chosen,), {"counts": counts, **switches}


def name_of(op):
    return op._qualified_op_name.removeprefix("numba_moe::")


NAMES = sorted({name_of(op) for op, *_ in calls(1, "cpu")})


def test_every_op_is_registered_with_its_names_and_defaults():
    for name in verification.OPS:
        declaration = DECLARATIONS[name]
        wanted = {key: p.default for key, p in declaration.parameters.items() if key != "dispatch"}
        for variant in torch_library.variants(declaration).values():
            whole = getattr(OPS, variant.name).default._schema.arguments
            found = {a.name: a.default_value if a.has_default_value() else inspect.Parameter.empty for a in whole}
            tables = {key for key in found if key.startswith("dispatch_")}
            assert len(tables) == (5 if "dispatch" in declaration.parameters else 0)
            left_out = {declaration.out, *declaration.written} - set(variant.written)
            kept = wanted.keys() - left_out - {declaration.out}
            assert found.keys() - tables - {declaration.out} == kept
            assert {key: found[key] for key in kept} == {key: wanted[key] for key in kept}
            assert {a.name for a in whole if a.alias_info and a.alias_info.is_write} == set(variant.written)
    variants = {v.name for name in verification.OPS for v in torch_library.variants(DECLARATIONS[name]).values()}
    assert set(NAMES) <= variants
    assert {name for name in verification.OPS if name not in NAMES} == set()


@pytest.mark.sweep(12)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [0, 1, 70])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, tokens, device):
    for op, args, kwargs in calls(tokens, device):
        if name_of(op) == name:
            torch.library.opcheck(op.default, args, kwargs)
            if "without_gradient" in op.overloads():
                without = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
                torch.library.opcheck(op.without_gradient, without, kwargs)


def block(scores, rows):
    """Route rows, do nothing with them, and combine them again; return all that comes by."""
    weights, chosen = moe.topk_softmax(scores, top_k=TOP_K, renormalize=True)
    counts = torch.zeros(EXPERTS, dtype=torch.int32, device=scores.device)
    blocks = moe.moe_align_block_size(chosen, 4, EXPERTS, counts=counts)
    permuted = moe.moe_permute(rows, chosen, num_experts=EXPERTS)
    ragged = moe.make_ragged_metadata(counts, chosen.numel())
    load = torch.zeros(EXPERTS, dtype=torch.int64, device=scores.device)
    table = torch.arange(EXPERTS, dtype=torch.int32, device=scores.device)
    places = dispatch_ids(chosen, table, counts=add_expert_counts(chosen, counts=load))
    combined = moe.moe_unpermute(permuted.permuted_hidden_states, weights, permuted.inv_permuted_idx)
    return combined, chosen, blocks, moe.moe_align_block_size(chosen, 4, EXPERTS), counts, ragged, load, places


def arguments(tokens, device="cpu", grad=False):
    return logits(tokens, device, grad), torch.arange(tokens * HIDDEN, device=device).view(tokens, HIDDEN).half()


def assert_equal(found, expected):
    leaves = zip(*map(torch.utils._pytree.tree_leaves, (found, expected)), strict=True)
    assert all(torch.equal(left, right) for left, right in leaves)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_block_compiles_whole_and_once_for_any_number_of_tokens(backend, device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for tokens in (7, 12, 5, 3, 2, 100):  # more slots than experts and fewer
        found, expected = compiled(*arguments(tokens, device)), block(*arguments(tokens, device))
        assert_equal(found, expected)
        assert [type(part) for part in found] == [type(part) for part in expected]
    assert counter.frame_count == 2  # for seven tokens, and for any number of them
    targets = {node.target for graph in counter.graphs for node in graph.graph.nodes}
    targets = {getattr(target, "overloadpacket", target) for target in targets}
    assert {OPS.topk_softmax, OPS.moe_align_block_size, OPS.moe_align_block_size_out, OPS.dispatch_ids_out} <= targets


def test_no_graph_breaks():
    torch._dynamo.reset()
    explained = torch._dynamo.explain(block)(*arguments(7))
    assert explained.graph_break_count == 0
    assert explained.graph_count == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_weights_have_their_gradient_when_compiled(dynamic, device):
    def loss(scores):
        softmax = moe.topk_softmax(scores, 2, True).topk_weights
        options = {"scoring_func": "sigmoid", "routed_scaling_factor": 2.5}
        return (softmax**2).sum() + (moe.grouped_topk(scores, 2, 4, 2, **options).topk_weights ** 3).sum()

    torch._dynamo.reset()
    compiled, eager = logits(9, device, grad=True), logits(9, device, grad=True)
    torch.compile(loss, fullgraph=True, dynamic=dynamic)(compiled).backward()
    loss(eager).backward()
    torch.testing.assert_close(compiled.grad, eager.grad)


def square(scores):
    return (moe.topk_softmax(scores, 2).topk_weights ** 2).sum()


class Square(torch.nn.Module):
    """What `square` returns."""

    def forward(self, scores):
        return square(scores)


def test_a_gradient_that_is_wanted_later_is_there():
    expected = logits(9, grad=True)
    square(expected).backward()
    torch._dynamo.reset()
    compiled = torch.compile(square, backend="aot_eager", fullgraph=True)
    scores = logits(9)
    compiled(scores)
    with torch.no_grad():
        compiled(scores.requires_grad_())
    compiled(scores).backward()
    torch.testing.assert_close(scores.grad, expected.grad)

    def inside(scores):
        leaf = scores.detach().requires_grad_()
        return torch.autograd.grad(square(leaf), leaf)[0]

    torch.testing.assert_close(torch.compile(inside, backend="aot_eager")(logits(9)), expected.grad)
    for strict in (False, True):
        scores.grad = None
        torch.export.export(Square(), (logits(9),), strict=strict).module()(scores).backward()
        torch.testing.assert_close(scores.grad, expected.grad)
    with pytest.raises(TorchRuntimeError, match="topk_softmax") as refusal:
        torch.compile(torch.func.grad(square), backend="aot_eager", fullgraph=True)(logits(9))
    assert "was not registered" not in str(refusal.value)  # what torch warns of where there is none


@pytest.mark.sweep(2)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_moe_block_compiles_whole_with_its_gradients(bias, device):
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rule = {"renormalize": True, "bias": bias, "shared_size": 8, "activation": "swiglu_oai" if bias else "silu"}
    layer = moe.MoEBlock(16, 8, EXPERTS, TOP_K, device=device, dtype=dtype, **rule)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    parameters = list(layer.parameters())
    for tokens in (7, 12, 5):
        rows = torch.randn(tokens, 16, device=device, dtype=dtype, requires_grad=True)
        found, expected = compiled(rows), layer(rows)
        torch.testing.assert_close(found, expected)
        cotangent = torch.randn_like(expected)
        gradients = (torch.autograd.grad(result, (rows, *parameters), cotangent) for result in (found, expected))
        for got, wanted in zip(*gradients, strict=True):
            relative, absolute = testing.TOLERANCES[dtype]
            error = (got.double() - wanted.double()).abs().max()
            assert error <= absolute + testing.EXPERT_ROUNDINGS * relative * wanted.abs().max(), float(error)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(layer)(rows)
    assert explained.graph_break_count == 0
    assert explained.graph_count == 1


def test_experts_are_one_op_unless_a_gradient_is_wanted():
    layer = moe.MoEBlock(16, 8, EXPERTS, TOP_K)
    found = []
    for grad in (False, True):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        with torch.set_grad_enabled(grad):
            rows = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
            torch.testing.assert_close(torch.compile(layer, backend=counter, fullgraph=True)(rows), layer(rows))
        found.append({node.target for graph in counter.graphs for node in graph.graph.nodes})
    assert [OPS.fused_experts.without_gradient in targets for targets in found] == [True, False]
    assert [OPS.fused_experts_keeping.default in targets for targets in found] == [False, True]
    assert [OPS.select_experts.without_gradient in targets for targets in found] == [True, False]
    assert [OPS.select_experts.default in targets for targets in found] == [False, True]
    parameter = torch.nn.Parameter(torch.ones(EXPERTS, 16, 16))
    with pytest.raises(RuntimeError, match="the op `fused_experts` has no gradient"):
        OPS.fused_experts(rows, parameter, torch.ones(EXPERTS, 16, 8), torch.ones(5, TOP_K), ids(5))


class Block(torch.nn.Module):
    """The combined rows of a block."""

    def forward(self, scores, rows):
        return block(scores, rows)[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strict", [False, True])
def test_export_for_any_number_of_tokens(strict, device, tmp_path):
    tokens = torch.export.Dim("tokens", min=1, max=1024)
    exported = torch.export.export(
        Block(), arguments(7, device), dynamic_shapes=({0: tokens}, {0: tokens}), strict=strict
    )
    assert "numba_moe.moe_align_block_size" in exported.graph_module.code
    torch.export.save(exported, tmp_path / "block.pt2")
    loaded = torch.export.load(tmp_path / "block.pt2").module()
    for tokens in (7, 3, 1, 100):
        assert_equal(loaded(*arguments(tokens, device)), block(*arguments(tokens, device))[0])


LOAD = """
import sys, torch
import numba_moe.interop.torch_ops
given, expected = torch.load(sys.argv[2])
torch.testing.assert_close(torch._inductor.aoti_load_package(sys.argv[1])(*given), expected)
"""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.slow
def test_ahead_of_time_inductor(device, tmp_path, without_simulator):
    given = arguments(7, device)
    exported = torch.export.export(Block(), given)
    package = torch._inductor.aoti_compile_and_package(
        exported,
        package_path=str(tmp_path / "block.pt2"),
        inductor_configs={"aot_inductor.precompile_headers": False},  # which tests at the same time would share
    )
    torch.save((given, block(*given)[0]), tmp_path / "expected.pt")
    without_simulator(LOAD, package, str(tmp_path / "expected.pt"))  # in a process that has not compiled it


@pytest.mark.gpu
def test_reduce_overhead_captures_and_replays():
    torch._dynamo.reset()
    compiled = torch.compile(block, mode="reduce-overhead", fullgraph=True)
    scores, rows = arguments(64, "cuda")
    for step in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        given = scores.roll(step, 0).contiguous(), rows
        assert_equal(compiled(*given), block(*given))
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


def test_eager_calls_pass_the_dispatcher_by(monkeypatch):
    monkeypatch.setattr(torch_library, "call", lambda *_: pytest.fail("dispatched"))
    block(*arguments(7))
    block(*arguments(7, grad=True))


def test_fake_tensors_and_parameters_are_dispatched():
    with torch._subclasses.FakeTensorMode():
        combined, _, blocks, *_ = block(*(torch.empty(part.shape, dtype=part.dtype) for part in arguments(7)))
    assert combined.shape == (7, HIDDEN)
    assert blocks.sorted_token_ids.shape == block(*arguments(7))[2].sorted_token_ids.shape
    parameter = torch.nn.Parameter(logits(5))
    weights, _ = moe.topk_sigmoid(parameter, 2)
    weights.sum().backward()
    scores = logits(5, grad=True)
    moe.topk_sigmoid(scores, 2).topk_weights.sum().backward()
    assert torch.equal(parameter.grad, scores.grad)


@pytest.mark.slow
def test_importing_the_package_registers_nothing_and_compiling_does(without_simulator):
    program = (
        "import torch, numba_moe\n"
        "ids = torch.zeros(3, 2, dtype=torch.int32)\n"
        "numba_moe.count_tokens_per_expert(ids, 4)\n"
        "print(hasattr(torch.ops.numba_moe, 'count_tokens_per_expert'))\n"
        "print(torch.compile(lambda ids: numba_moe.expert_offsets(numba_moe.count_tokens_per_expert(ids, 4)),"
        " backend='eager', fullgraph=True)(ids).tolist())\n"
    )
    assert without_simulator(program) == "False\n[0, 6, 6, 6, 6]\n"


@pytest.mark.parametrize("pad", [False, True])
def test_sizes_for_symbols_are_those_of_the_reference(pad):
    for num_slots in range(40):
        for block_size in (1, 4, 7):
            for num_experts in (1, 8, 20):
                given = (num_slots, block_size, num_experts, pad)
                assert sizes.sorted_slots(*given) == reference.align.max_sorted_slots(*given)
        for num_slices in range(50):
            assert sizes.scheduled_blocks(num_slices, num_slots) == reference.ragged.max_blocks(num_slices, num_slots)


def test_ops_see_the_simulated_kernels(device, monkeypatch):
    launched = []
    empty = arrays.empty
    monkeypatch.setattr(arrays, "empty", lambda *description: launched.append(description) or empty(*description))
    assert OPS.count_tokens_per_expert(ids(5, device), EXPERTS).sum() == 10
    assert launched
