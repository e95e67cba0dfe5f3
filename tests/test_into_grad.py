"""Gradients of the experts' matrices that backward adds to `.grad` itself."""

import contextlib
import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import numba_moe as moe
from numba_moe import parallel, training
from numba_moe.device import simulator
from numba_moe.ops import grouped_products

ON_GPU = torch.cuda.is_available() and not simulator.ENABLED
DEVICE = "cuda" if ON_GPU else "cpu"
HIDDEN, WIDTH, EXPERTS, TOP_K = 16, 8, 5, 2
MATRICES = ("gate_up_proj", "down_proj")


def pair(**options):
    """Return two equal blocks; backward of the second adds to `.grad` itself."""
    torch.manual_seed(0)
    plain = moe.MoEBlock(HIDDEN, WIDTH, EXPERTS, TOP_K, device=DEVICE, **options)
    ours = moe.MoEBlock(HIDDEN, WIDTH, EXPERTS, TOP_K, device=DEVICE, accumulate_into_grad=True, **options)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def rows(seed=1, tokens=9, dtype=torch.float32):
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def step(block, call=None, seeds=(1, 2, 3), dtype=torch.float32, autocast=None):
    """Run some passes, and return the gradients of the inputs."""
    found = []
    for seed in seeds:
        given = rows(seed, dtype=dtype).requires_grad_()
        with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
            out = (block if call is None else call)(given)
        out.float().square().sum().backward()
        found.append(given.grad)
    return found


def same(plain, ours, **tolerance):
    for (name, one), (_, other) in zip(plain.named_parameters(), ours.named_parameters(), strict=True):
        assert one.grad.dtype == other.grad.dtype, name
        torch.testing.assert_close(other.grad, one.grad, **tolerance)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "activation": "relu2_no_mul"}, {"apply_router_weight_on_input": True}]
)
def test_the_gradients_of_autograd(options, passes):
    plain, ours = pair(**options)
    seeds = range(passes)
    for one, other in zip(step(plain, seeds=seeds), step(ours, seeds=seeds), strict=True):
        assert torch.equal(one, other)
    if passes == 1:
        same(plain, ours, rtol=0, atol=0)
    else:
        same(plain, ours, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("main", [False, True])
def test_with_a_dispatcher_too(main, autocast):
    dtype = autocast or torch.float32
    sizes = {"num_experts": EXPERTS, "top_k": TOP_K, "hidden": HIDDEN, "max_tokens": 16, "dtype": dtype}
    plain, ours = pair(bias=True, dispatcher=parallel.TokenDispatcher(**sizes, device=DEVICE))
    for name in MATRICES if main else ():
        getattr(ours, name).main_grad = torch.zeros_like(getattr(ours, name))
    for one, other in zip(step(plain, autocast=autocast), step(ours, autocast=autocast), strict=True):
        assert torch.equal(one, other)
    for name in MATRICES:
        matrix, wanted = getattr(ours, name), getattr(plain, name).grad
        assert (matrix.grad is None) == main
        torch.testing.assert_close(matrix.main_grad if main else matrix.grad, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    plain, ours = pair()
    step(plain, autocast=dtype)
    step(ours, autocast=dtype)
    assert ours.down_proj.grad.dtype == torch.float32
    same(plain, ours, rtol=1e-6, atol=1e-6)
    plain, ours = pair(dtype=dtype)
    step(plain, dtype=dtype)
    step(ours, dtype=dtype)
    eps = torch.finfo(dtype).eps
    same(plain, ours, rtol=4 * eps, atol=eps)


def test_a_main_grad_is_added_to_and_grad_stays_none():
    exact, ours = pair(dtype=torch.bfloat16)
    for name in MATRICES:
        matrix = getattr(ours, name)
        matrix.main_grad = torch.ones(matrix.shape, dtype=torch.float32, device=DEVICE)
        matrix.grad_added_to_main_grad = False
    wanted = {name: torch.ones_like(getattr(ours, name).main_grad) for name in MATRICES}
    for seed in (1, 2):
        exact.zero_grad()
        step(exact, seeds=[seed], dtype=torch.bfloat16)
        for name in MATRICES:
            wanted[name] += getattr(exact, name).grad
    step(ours, seeds=(1, 2), dtype=torch.bfloat16)
    for name in MATRICES:
        matrix = getattr(ours, name)
        assert matrix.grad is None
        assert matrix.grad_added_to_main_grad
        torch.testing.assert_close(matrix.main_grad, wanted[name], rtol=1e-6, atol=1e-6)


def test_frozen_matrices_get_none_and_others_the_same():
    for frozen in (("gate_up_proj",), ("down_proj",), MATRICES):
        plain, ours = pair()
        for block in (plain, ours):
            for name in frozen:
                getattr(block, name).requires_grad_(False)
            step(block)
        for name in MATRICES:
            one, other = (getattr(block, name).grad for block in (plain, ours))
            assert (one is None) == (other is None) == (name in frozen)
            if one is not None:
                torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(plain(rows()), ours(rows()))


def test_a_transposed_matrix_has_a_gradient_of_its_layout():
    plain, ours = pair()
    for block in (plain, ours):
        for name in MATRICES:
            flipped = getattr(block, name).detach().transpose(1, 2).contiguous().transpose(1, 2)
            setattr(block, name, torch.nn.Parameter(flipped))
        step(block)
    same(plain, ours, rtol=1e-6, atol=1e-6)
    assert all(getattr(ours, name).grad.stride() == getattr(plain, name).grad.stride() for name in MATRICES)


def test_a_matrix_of_two_layers_has_the_sum():
    plain, ours = pair()
    for block in (plain, ours):
        block(block(rows())).square().sum().backward()
    same(plain, ours, rtol=1e-6, atol=1e-6)


def test_only_the_matrices_want_a_gradient():
    _, ours = pair()
    ours.router.weight.requires_grad_(False)
    ours(rows()).sum().backward()
    assert all(getattr(ours, name).grad.any() for name in MATRICES)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_passes_are_added_once(reentrant):
    plain, ours = pair()
    step(plain)
    for context in ({}, {"context_fn": training.same_routing}) if not reentrant else ({},):
        ours.zero_grad()
        step(ours, lambda given, context=context: checkpoint(ours, given, use_reentrant=reentrant, **context))
        same(plain, ours, rtol=1e-6, atol=1e-6)


def test_a_graph_that_is_kept_adds_again_and_one_that_is_left_out_does_not():
    _, ours = pair()
    given = rows().requires_grad_()
    total = ours(given).sum()
    total.backward(retain_graph=True)
    first = ours.down_proj.grad.clone()
    total.backward(retain_graph=True)
    torch.testing.assert_close(ours.down_proj.grad, 2 * first, rtol=1e-6, atol=1e-6)
    (by_rows,) = torch.autograd.grad(total, given, retain_graph=True)
    torch.testing.assert_close(by_rows, given.grad / 2)
    torch.testing.assert_close(ours.down_proj.grad, 2 * first, rtol=1e-6, atol=1e-6)
    total.backward(inputs=[given], retain_graph=True)
    torch.testing.assert_close(ours.down_proj.grad, 2 * first, rtol=1e-6, atol=1e-6)
    second = torch.autograd.grad(total, [getattr(ours, name) for name in MATRICES], retain_graph=True)[1]
    torch.testing.assert_close(second, first)
    torch.testing.assert_close(ours.down_proj.grad, 2 * first, rtol=1e-6, atol=1e-6)
    (by_rows,) = torch.autograd.grad(total, given, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated no further"):
        by_rows.sum().backward()


def test_a_hook_gets_none_and_one_after_accumulation_finds_the_sum():
    plain, ours = pair()
    for block in (plain, ours):
        ran = []
        block.down_proj.register_hook(lambda grad, ran=ran: ran.append(grad))
        block.down_proj.register_post_accumulate_grad_hook(lambda matrix, ran=ran: ran.append(matrix.grad.clone()))
        step(block, seeds=[1])
        by_hook, after = ran
        assert torch.equal(after, plain.down_proj.grad)
        assert (by_hook is None) == (block is ours)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch asks for it where a graph goes on
def test_compiled_code_breaks_its_graph_or_refuses():
    plain, ours = pair()
    step(plain)
    step(ours, torch.compile(ours, backend="aot_eager"))
    same(plain, ours, rtol=1e-6, atol=1e-6)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="fused_experts_into_grad"):
        torch.compile(ours, backend="aot_eager", fullgraph=True)(rows())


def test_places_of_other_ranks_and_ids_without_experts(device):
    torch.manual_seed(0)
    shapes = (3, 2 * WIDTH, HIDDEN), (3, HIDDEN, WIDTH)
    matrices = [torch.randn(shape, device=device) for shape in shapes]
    ids = torch.tensor([[0, 4], [1, -1], [5, 2], [3, 1]], dtype=torch.int32, device=device)
    where = torch.tensor([2, -1, 7, 0, 3, 1], dtype=torch.int32, device=device)
    weights, given = torch.rand(4, 2, device=device), torch.randn(4, HIDDEN, device=device)
    found = []
    for call in (moe.fused_experts, training.fused_experts_into_grad):
        own = [matrix.clone().requires_grad_() for matrix in matrices]
        call(given, *own, weights, ids, expert_map=where).square().sum().backward()
        found.append([matrix.grad for matrix in own])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@contextlib.contextmanager
def largest_allocation():
    """Yield a list that gets the bytes of each allocation within."""
    sizes = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield sizes
    events = profile.profiler.kineto_results.events()
    sizes += [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


@pytest.mark.skipif(ON_GPU, reason="a grouped GEMM makes its product first")
@pytest.mark.parametrize("main", [False, True])
def test_a_second_pass_allocates_nothing_of_the_size_of_a_matrix(main):
    torch.manual_seed(0)
    options = {"hidden_size": 64, "intermediate_size": 48, "num_experts": 32, "top_k": 1}
    plain = moe.MoEBlock(**options)
    for block, adds in ((plain, False), (moe.MoEBlock(accumulate_into_grad=True, **options), True)):
        given = torch.randn(4, 64, requires_grad=True)
        for name in MATRICES if main and adds else ():
            getattr(block, name).main_grad = torch.zeros(getattr(block, name).shape, dtype=torch.float64)
        block(given).sum().backward()
        out = block(given).sum()
        with largest_allocation() as sizes:
            out.backward()
        assert (max(sizes) >= block.down_proj.nbytes) != adds


@pytest.mark.parametrize("same_dtype", [True, False])
def test_sums_of_experts_without_rows_stay(same_dtype):
    grad, given, ends = torch.randn(5, 3), torch.randn(5, 4), torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    sums = torch.randn(4, 3, 4).to(torch.float32 if same_dtype else torch.float64)
    before = sums.clone()
    grouped_products.add_outer_by_expert(grad, given, ends, sums)
    wanted = before + grouped_products.outer_by_expert(grad, given, ends)
    torch.testing.assert_close(sums, wanted)
    assert torch.equal(sums[[0, 2]], before[[0, 2]])


def test_bad_arguments():
    _, ours = pair()
    given, (weights, ids) = rows(), ours.router(rows())
    call = training.fused_experts_into_grad
    with pytest.raises(ValueError, match="`down_proj` must be a parameter, or another leaf of the graph"):
        call(given, ours.gate_up_proj, 2 * ours.down_proj, weights, ids)
    with pytest.raises(TypeError, match="`gate_up_proj` must be"):
        call(given, [1.0], ours.down_proj, weights, ids)
    with pytest.raises(ValueError, match="`hidden_states` must be outside of"):
        torch.func.grad(lambda x: ours(x).sum())(given)
    with pytest.raises(ValueError, match="`down_proj` must be of shape"):
        call(given, ours.gate_up_proj, ours.down_proj.detach()[:, :3].contiguous().requires_grad_(), weights, ids)
    with pytest.raises(TypeError, match="`accumulate_into_grad` must be"):
        moe.MoEBlock(8, 8, 4, 2, accumulate_into_grad=1)
    dispatcher = parallel.TokenDispatcher(num_experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN, max_tokens=16)
    matrices = ours.gate_up_proj, 2 * ours.down_proj
    with pytest.raises(ValueError, match="`down_proj` must be a parameter, or another leaf of the graph"):
        parallel.fused_experts(given, *matrices, weights, ids, dispatcher, accumulate_into_grad=True)
    assert "accumulate_into_grad=True" in repr(copy.deepcopy(ours))
