"""Experts with few slots each, by tensor cores: every tile against float64, and which calls they serve."""

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numba_moe.reference.activation import RULES

import numba_moe as moe
from numba_moe.device import simulator
from numba_moe.device.tiles import TILES
from numba_moe.ops import experts, experts_by_tile
from numba_moe.runtime import plans
from numba_moe.runtime.launch import Launch
from numba_moe.verify import testing

ON_GPU = torch.cuda.is_available() and not simulator.ENABLED
DEVICE = "cuda" if ON_GPU else "cpu"
# Relative to the norm: one rounding between the matrices, and one of the result.
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 7e-4}
ACTIVATIONS = ("silu", "swiglu_oai", "gelu", "gelu_tanh")


def running():
    return simulator.running() if simulator.ENABLED else contextlib.nullcontext()


def transposed(matrices):
    return matrices.transpose(1, 2).contiguous().transpose(1, 2)


def drawn(tokens, num_experts, top_k, hidden, width, dtype=torch.bfloat16, local=None, bias=False, halves=2):
    """Draw the arguments of a call, some of whose ids are no expert's."""
    torch.manual_seed(tokens + hidden)
    local = local or num_experts
    ids = torch.rand(tokens, num_experts).topk(top_k).indices.int()
    ids[torch.rand(ids.shape) < 0.15] = -1
    found = {
        "hidden_states": torch.randn(tokens, hidden),
        "gate_up_proj": torch.randn(local, halves * width, hidden) / hidden**0.5,
        "down_proj": torch.randn(local, hidden, width) / width**0.5,
    }
    if bias:
        found |= {"gate_up_bias": torch.randn(local, halves * width), "down_bias": torch.randn(local, hidden)}
    found = {name: tensor.to(DEVICE, dtype) for name, tensor in found.items()}
    return {**found, "topk_weights": torch.rand(tokens, top_k, device=DEVICE), "topk_ids": ids.to(DEVICE)}


def exact(given, **options):
    """Return the reference's answer to float64 arguments, which rounds nothing."""
    arguments = {
        name: value.cpu().double().numpy() if value.is_floating_point() else value.cpu().numpy()
        for name, value in given.items()
    }
    options = {name: value.cpu().numpy() if torch.is_tensor(value) else value for name, value in options.items()}
    return torch.from_numpy(moe.reference.fused_experts(**arguments, **options))


def assert_close(found, wanted):
    error = float((found.cpu().double() - wanted).norm() / wanted.norm())
    assert error <= TOLERANCE[found.dtype], error


@pytest.fixture
def with_tiles(monkeypatch):
    """Return a function that has both products made of these tiles."""

    def force(*tiles):
        monkeypatch.setattr(experts, "tiles_for", lambda *_: tiles)
        plans.forget()

    yield force
    plans.forget()


@pytest.mark.parametrize(
    "number",
    [pytest.param(number, marks=[] if number in (3, 6, 10) else [pytest.mark.slow]) for number in range(len(TILES))],
)
def test_a_tile_multiplies_as_float64_does(number, with_tiles):
    """Depths and columns that no tile divides, two blocks of one expert, an expert without slots, ids of none."""
    tile = TILES[number]
    dtype, activation = (torch.bfloat16, torch.float16)[number % 2], ACTIVATIONS[number % 4]
    # chunks of depth to pass by all stages, or in the simulator one of them and a part
    hidden, width = (4 * tile.depth + 72, 88) if ON_GPU else (tile.depth + 24, 40)
    given = drawn(tile.tokens + 3, 3, 1, hidden, width, dtype, bias=number % 3 != 0)
    given["topk_ids"][given["topk_ids"] == 1] = 0
    wanted = exact(given, activation=activation)
    if tile.transposed:
        given |= {name: transposed(given[name]) for name in ("gate_up_proj", "down_proj")}
    with_tiles(number, number)
    out = torch.full_like(given["hidden_states"], torch.nan)
    with running(), testing.poisoned_memory():
        found = moe.fused_experts(**given, activation=activation, out=out)
    assert found is out
    assert_close(found, wanted)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
def test_gates_and_ups_lie_either_way(interleaved, swapped, with_tiles):
    given = drawn(3, 2, 1, 48, 40, torch.float16, bias=True)
    options = {"activation": "silu", "interleaved": interleaved, "limit": 0.75, "alpha": 1.25}
    wanted = exact(given, **options)
    with_tiles(7 if swapped else 1, 1)
    if swapped:
        given["gate_up_proj"] = transposed(given["gate_up_proj"])
    with running():
        assert_close(moe.fused_experts(**given, **options), wanted)


OTHERS = {
    "swiglu_step": {"limit": 0.75},
    "situ": {"beta": 0.5, "linear_beta": 0.75},
    "situ interleaved": {"interleaved": True},
    "relu2": {"limit": 1.0},
    "silu_no_mul": {"alpha": 1.25},
    "gelu_no_mul": {},
    "gelu_tanh_no_mul": {},
    "relu2_no_mul": {},
}


@pytest.mark.sweep(5)
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("swapped", [False, True])
def test_tiles_have_every_activation(name, swapped, with_tiles):
    """Also of matrices without ups, whose width no tile divides."""
    activation, dtype = name.split()[0], (torch.float16, torch.bfloat16)[len(name) % 2]
    given = drawn(9, 2, 1, 48, 40, dtype, bias=True, halves=RULES[activation].halves)
    wanted = exact(given, activation=activation, **OTHERS[name])
    if swapped:
        given["gate_up_proj"] = transposed(given["gate_up_proj"])
    with_tiles(7 if swapped else 1, 1)
    with running(), testing.poisoned_memory():
        assert_close(moe.fused_experts(**given, activation=activation, **OTHERS[name]), wanted)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_one_token_is_not_sorted(ids_dtype, monkeypatch):
    monkeypatch.setattr(experts_by_tile.counting_sort, "sort", lambda *_: pytest.fail("sorted"))
    given = drawn(1, 8, 6, 40, 24, local=4, bias=True)
    far = 2**40 if ids_dtype == torch.int64 else 2**30
    given["topk_ids"] = torch.tensor([[5, -1, 2, far, 0, 2]], dtype=ids_dtype, device=DEVICE)
    expert_map = torch.tensor([3, -1, 0, 9, 1, 2, 2**31 - 1, -7], dtype=ids_dtype, device=DEVICE)
    wanted = exact(given, expert_map=expert_map)
    given["topk_weights"][0, 1] = torch.nan  # of no expert
    with running(), testing.poisoned_memory():
        assert_close(moe.fused_experts(**given, expert_map=expert_map), wanted)


@pytest.mark.parametrize(("tokens", "launches"), [(1, 3), (5, 4)])
def test_launches_are_few(tokens, launches, monkeypatch):
    seen, launch = [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self, **arrays: (seen.append(self), launch(self, **arrays)))
    with running():
        moe.fused_experts(**drawn(tokens, 4, 2, 16, 8))
    assert len(seen) == launches


def test_slots_of_other_ranks_add_nothing_and_rows_may_be_strided():
    given = drawn(6, 8, 3, 40, 24, torch.float16, local=4, bias=True)
    expert_map = torch.tensor([3, -1, 0, 9, 1, 2, -1, -7], device=DEVICE)
    wanted = exact(given, expert_map=expert_map)
    given["hidden_states"] = torch.nn.functional.pad(given["hidden_states"], (0, 8), value=torch.nan)[:, :40]
    with running(), testing.poisoned_memory():
        assert_close(moe.fused_experts(**given, expert_map=expert_map), wanted)


def test_what_is_not_finite_stays_where_it_is():
    """A NaN of a token or an expert reaches the tokens that it concerns, though tiles hold others beside it."""
    given = drawn(7, 4, 1, 40, 24)
    given["topk_ids"][:, 0] = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    given["hidden_states"][3] = torch.nan
    given["down_proj"][2] = torch.inf
    given["gate_up_proj"][3] = torch.nan  # of an expert without slots
    with running():
        found = moe.fused_experts(**given)
    assert found.isfinite().all(dim=1).tolist() == [True, True, False, False, True, False, True]


def call(tokens, num_experts, top_k, hidden, width, dtype=torch.bfloat16, strides=None):
    def layout(*shape, strides=None):
        return plans.Layout(torch.Size(shape), dtype, torch.device("cuda"), strides, 0)

    return SimpleNamespace(
        hidden_states=layout(tokens, hidden),
        gate_up_proj=layout(num_experts, 2 * width, hidden, strides=strides),
        down_proj=layout(num_experts, hidden, width, strides=strides),
        topk_ids=layout(tokens, top_k),
        gate_up_bias=None,
        down_bias=None,
    )


def test_tiles_go_by_slots_of_an_expert():
    def tokens_of(*sizes, **layout):
        tiles = experts_by_tile.tiles_for(call(*sizes, **layout), sizes[1])
        return tiles and tuple(TILES[tile].tokens for tile in tiles)

    qwen = (128, 8, 2048, 768)
    assert [tokens_of(tokens, *qwen) for tokens in (1, 16, 64, 256)] == [(8, 8), (8, 8), (16, 16), (32, 32)]
    assert tokens_of(2048, *qwen) is None, "torch's grouped GEMM"
    assert tokens_of(1, 1, 1, 64, 64) == (8, 8)
    assert tokens_of(64, *qwen, strides=(1, 2, 3)) == (16, 16)
    tiles = experts_by_tile.tiles_for(call(64, *qwen, strides=(1, 2, 3)), 128)
    assert all(TILES[tile].transposed for tile in tiles)


@pytest.mark.parametrize("kind", ["float32", "odd width", "odd hidden", "no tokens", "strides", "address"])
def test_what_tiles_do_not_serve_goes_the_other_way(kind):
    sizes = {"odd width": (5, 4, 2, 16, 12), "odd hidden": (5, 4, 2, 12, 16), "no tokens": (0, 4, 2, 16, 16)}
    dtype = torch.float32 if kind == "float32" else torch.float16
    given = drawn(*sizes.get(kind, (5, 4, 2, 16, 16)), dtype)
    wanted = exact(given)
    if kind == "strides":
        given["hidden_states"] = torch.nn.functional.pad(given["hidden_states"], (0, 3))[:, :16]
    if kind == "address":
        memory = torch.empty(given["down_proj"].numel() + 1, dtype=dtype, device=DEVICE)
        given["down_proj"] = memory[1:].view(given["down_proj"].shape).copy_(given["down_proj"])
    assert not experts_by_tile.serves(SimpleNamespace(**plans_of(given), gate_up_bias=None, down_bias=None))
    with running():
        found = moe.fused_experts(**given)
    if kind != "no tokens":
        np.testing.assert_allclose(found.cpu().double(), wanted, rtol=4e-3, atol=4e-3)


def plans_of(given):
    return {name: plans.layout(value) for name, value in given.items()}


PROGRAM = """
import json
from numba_moe.device.tiles import TILES
from numba_moe.runtime.compile import MOST_SHARED_BYTES
print(json.dumps([[tile.shared_bytes <= MOST_SHARED_BYTES, tile.tokens % 8, tile.along_rows > 1 or tile.transposed]
                  for tile in TILES]))
"""


@pytest.mark.slow
def test_tiles_fit_shared_memory(without_simulator):
    assert all(found == [True, 0, True] for found in json.loads(without_simulator(PROGRAM)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_a_graph_captures_and_repeats_have_the_same_bits(tokens, dtype):
    given = drawn(tokens, 16, 4, 256, 128, dtype)
    wanted = moe.fused_experts(**given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = moe.fused_experts(**given)
    for _ in range(20):
        result.fill_(torch.nan)
        graph.replay()
        assert torch.equal(result, wanted)
