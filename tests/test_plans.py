"""A call is planned once and remembered; whether its arguments are accepted does not depend on the calls before it."""

import inspect

import numpy as np
import pytest
import torch

import numba_moe as moe
from numba_moe import placement
from numba_moe.runtime import plans

LOGITS = torch.arange(24, dtype=torch.float32).reshape(3, 8)
IDS = torch.tensor([[0, 1], [2, 0], [1, 3]], dtype=torch.int32)
ROWS = torch.arange(24, dtype=torch.float32).reshape(3, 8)
EXPERTS = {"gate_up_proj": torch.ones(4, 8, 8), "down_proj": torch.ones(4, 8, 4)}
DISPATCH = placement.DispatchTables(torch.arange(9, dtype=torch.int32), None, "static", 1, None)
OPTIONS = {
    "softcap": 1.0,
    "num_fused_shared_experts": 1,
    "apply_routed_scaling_factor_on_output": True,
    "num_zero_experts": 1,
    "zero_expert_id": 1,
    "routed_scaling_factor": 1.0,
    "renormalize": True,
    "dispatch": DISPATCH,
}
# Ones and zeros, where an integer, a float and a boolean are equal.
CALLS = {
    "topk_softmax": (LOGITS, {"top_k": 1, "renormalize": True}),
    "topk_sigmoid": (LOGITS, {"top_k": 1, "renormalize": False}),
    "grouped_topk": (LOGITS, {"top_k": 1, "num_expert_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}),
    "select_experts": (LOGITS, {"top_k": 1, "num_expert_group": 1, "topk_group": 1, **OPTIONS}),
    "weigh_experts": (LOGITS, {"topk_ids": IDS, **OPTIONS}),
    "route": (LOGITS, {"top_k": 1, "block_size": 1, "inactive_expert_id": 0, "num_physical_experts": 9, **OPTIONS}),
    "moe_align_block_size": (IDS, {"block_size": 1, "num_experts": 4, "pad_sorted_ids": True, "inactive_expert_id": 1}),
    "moe_permute": (ROWS, {"topk_ids": IDS, "num_experts": 4, "alignment": 1, "zero_padding": True}),
    "moe_permute_masked": (ROWS, {"topk_ids": IDS, "num_experts": 4, "max_m": 1, "num_local_experts": 1}),
    "count_tokens_per_expert": (IDS, {"num_experts": 1}),
    "expert_offsets": (IDS[0], {"alignment": 1}),
    "make_ragged_metadata": (IDS[0], {"num_rows": 1}),
    "moe_activation": (ROWS, {"expert_first_token_offset": torch.tensor([0, 3]), "limit": 1.0, "alpha": 1.0}),
    "moe_sum": (ROWS[None], {"routed_scaling_factor": 1.0}),
    "constant_experts": (
        ROWS,
        {"topk_weights": torch.ones(3, 2), "topk_ids": IDS, "num_experts": 1, "num_copies": 1},
    ),
    "topk_raw": (LOGITS, {"top_k": 1, "renormalize": True}),
    "topk_softplus_sqrt": (LOGITS, {"top_k": 1, "renormalize": True}),
    "moe_lora_align_block_size": (
        IDS,
        {"token_lora_mapping": torch.tensor([0, 1, 0]), "block_size": 1, "num_experts": 4, "max_loras": 1},
    ),
    "batched_moe_align_block_size": (1, {"block_size": 1, "expert_num_tokens": IDS[0]}),
    "moe_reorder": (IDS, {"num_experts": 1}),
    "moe_unpermute": (
        ROWS,
        {"topk_weights": torch.ones(3, 2), "inv_permuted_idx": IDS, "routed_scaling_factor": 1.0},
    ),
    "fused_experts": (ROWS, {**EXPERTS, "topk_weights": torch.ones(3, 2), "topk_ids": IDS, "limit": 1.0, "alpha": 1.0}),
}


def outcome(call):
    """Return what a call gives, as bytes, or the error that it raises."""
    try:
        result = call()
    except (TypeError, ValueError) as error:
        return type(error), str(error)
    parts = result if isinstance(result, tuple) else (result,)
    return [part.float().numpy().tobytes() for part in parts if isinstance(part, torch.Tensor)]


def variants(value):
    """Return what is equal to a number and of another type, and lists and arrays, which cannot be keys."""
    kinds = (int, float, bool, np.int64, np.float64, np.bool_)
    return [kind(value) for kind in kinds if type(value) is not kind] + [[value], np.array([value])]


NUMBERS = [
    (op, name, number)
    for op, (_, options) in CALLS.items()
    for name, value in options.items()
    if isinstance(value, int | float) and value in (0, 1)
    for number in range(len(variants(value)))
]


@pytest.mark.parametrize(("op", "name", "number"), NUMBERS)
def test_an_argument_is_judged_the_same_after_one_that_equals_it(op, name, number):
    first, options = CALLS[op]
    function = getattr(moe, op)
    wrong = options | {name: variants(options[name])[number]}
    plans.forget()
    alone = outcome(lambda: function(first, **wrong))
    plans.forget()
    assert isinstance(outcome(lambda: function(first, **options)), list)
    assert outcome(lambda: function(first, **wrong)) == alone
    plans.forget()
    outcome(lambda: function(first, **wrong))
    assert isinstance(outcome(lambda: function(first, **options)), list), "nor does the right one depend on the wrong"


@pytest.mark.parametrize("op", ["select_experts", "weigh_experts", "route"])
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("softcap", False),
        ("num_fused_shared_experts", 0.0),
        ("num_fused_shared_experts", False),
        ("apply_routed_scaling_factor_on_output", 1),
        ("num_zero_experts", 0.0),
        ("num_zero_experts", False),
        ("zero_expert_id", -1.0),
    ],
)
def test_what_equals_a_default_and_is_of_another_type_is_refused(op, name, wrong):
    first, options = CALLS[op]
    needed = {key: value for key, value in options.items() if key in ("top_k", "topk_ids", "block_size")}
    with pytest.raises(TypeError, match=f"`{name}` must be"):
        getattr(moe, op)(first, **needed, **{name: wrong})


def test_a_softcap_of_integer_zero_is_none():
    assert moe.select_experts(LOGITS, 2, softcap=0).topk_ids.tolist() == [[7, 6]] * 3


@pytest.mark.parametrize("op", CALLS)
def test_a_call_is_planned_once(op):
    first, options = CALLS[op]
    plans.forget()
    getattr(moe, op)(first, **options)
    before = [plan.cache_info() for plan in plans._remembered]
    getattr(moe, op)(first, **options)
    after = [plan.cache_info() for plan in plans._remembered]
    assert sum(info.misses for info in after) == sum(info.misses for info in before)
    assert sum(info.hits for info in after) > sum(info.hits for info in before)


def counted(function):
    """Return a planned function and the list of its runs."""
    runs = []

    def run(*args):
        runs.append(args)
        return function(*args)

    return plans.planned(run), runs


def test_a_planner_that_raises_runs_once_and_its_error_is_the_one_seen():
    plan, runs = counted(lambda size: 1 + "a bug")
    with pytest.raises(TypeError, match="unsupported operand"):
        plan(3)
    assert runs == [(3,)]


@pytest.mark.parametrize("argument", [[3], {}, {3}, ([3],), np.zeros(2)])
def test_an_argument_without_a_hash_is_planned_once_a_call(argument):
    plan, runs = counted(lambda value: "planned")
    assert [plan(argument), plan(argument)] == ["planned", "planned"]
    assert len(runs) == 2


@pytest.mark.parametrize("nest", [lambda value: (value,), lambda value: ("name", (None, value))])
def test_a_number_within_a_tuple_keeps_its_type(nest):
    plan, runs = counted(lambda value: value)
    assert [repr(plan(nest(value))) for value in (1, 1.0, True, 1)] == [repr(nest(v)) for v in (1, 1.0, True, 1)]
    assert len(runs) == 4


def test_layouts_within_a_tuple_are_remembered():
    plan, runs = counted(lambda *values: values)
    for _ in range(2):
        plan((plans.layout(IDS), None), plans.layout(ROWS), "name")
    assert len(runs) == 1


def test_every_op_is_tried_here():
    functions = {name for name in moe.__all__ if inspect.isfunction(getattr(moe, name))}
    assert functions - {"align_sizes", "set_log_level"} == set(CALLS)
