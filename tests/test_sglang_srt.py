"""SGLang's MoE slice under its own names: each parameter says something, or is refused by name."""

import argparse
import csv
import inspect
import math
import types
import warnings

import pytest
import torch
from numba_moe.reference.dispatch import DispatchTables

import numba_moe as moe
from numba_moe import placement
from numba_moe.interop import sglang_srt as srt

HIDDEN = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
LOGITS = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
BIAS = torch.linspace(-0.3, 0.3, 8)
IDS = torch.tensor([[3, 1], [0, 3], [-1, 2], [3, 0]], dtype=torch.int32)
BOTH = (HIDDEN, LOGITS)


@pytest.fixture(autouse=True)
def no_recorder():
    yield
    srt.set_global_expert_distribution_recorder(None)


def renormalised(weights):
    return weights / weights.sum(1, keepdim=True)


def test_parameters_come_in_the_order_of_the_origin():
    grouped = "hidden_states gating_output topk renormalize num_expert_group topk_group n_share_experts_fusion "
    grouped += "routed_scaling_factor num_token_non_padded"
    biased = "hidden_states gating_output correction_bias topk renormalize num_expert_group topk_group compiled "
    biased += "n_share_experts_fusion routed_scaling_factor num_token_non_padded"
    chosen = "hidden_states router_logits top_k use_grouped_topk renormalize topk_group num_expert_group "
    chosen += "custom_routing_function correction_bias torch_native routed_scaling_factor num_token_non_padded"
    permuted = "hidden_states topk_idx num_experts fp8_dtype use_fp8_w8a8 use_block_quant"
    reordered = "down_output output src2dst topk_ids topk_weights topk hidden_size routed_scaling_factor"
    for function, names in (
        *((srt.fused_topk, "hidden_states gating_output topk renormalize"), (srt.grouped_topk, grouped)),
        *((srt.biased_grouped_topk, biased), (srt.select_experts, chosen), (srt.deepep_permute, permuted)),
        *((srt.deepep_post_reorder, reordered), (srt.BumpAllocator, "buffer_size dtype device")),
    ):
        assert list(inspect.signature(function).parameters)[: len(names.split())] == names.split()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_fused_topk_chooses_and_renormalises(scoring):
    scores = LOGITS.softmax(1) if scoring == "softmax" else LOGITS.sigmoid()
    if scoring == "sqrtsoftplus":
        scores = torch.nn.functional.softplus(LOGITS).sqrt()
    chosen = (scores + BIAS.half()).topk(2).indices
    weights, ids = srt.fused_topk(*BOTH, 2, True, scoring_func=scoring, correction_bias=BIAS.half())
    assert torch.equal(ids, chosen.int())
    torch.testing.assert_close(weights, renormalised(scores.gather(1, chosen)))
    weights, ids = srt.fused_topk(*BOTH, 2, False, scoring_func=scoring)
    torch.testing.assert_close((weights, ids.long()), tuple(scores.topk(2)))


def test_fused_topk_scales_where_asked_and_packs():
    plain, _ = srt.fused_topk(*BOTH, 2, True, routed_scaling_factor=2.5)
    assert torch.equal(plain, moe.topk_softmax(LOGITS, 2, True).topk_weights)
    packed = torch.empty(5, 2, dtype=torch.int32)
    options = {"routed_scaling_factor": 2.5, "apply_routed_scaling_factor_on_output": True, "packed_out": packed}
    weights, ids = srt.fused_topk(*BOTH, 2, True, **options)
    torch.testing.assert_close(weights, 2.5 * plain)
    assert torch.equal(packed >> 16, ids)
    assert torch.equal((packed & 0xFFFF).to(torch.int16).view(torch.bfloat16), weights.bfloat16())
    with pytest.raises(ValueError, match=r"`scoring_func` must be one of .*, got 'relu'"):
        srt.fused_topk(*BOTH, 2, True, scoring_func="relu")
    with pytest.raises(ValueError, match="`gating_output` must be of 4 tokens, like `hidden_states`, got 5"):
        srt.fused_topk(HIDDEN[:4], LOGITS, 2, True)


@pytest.mark.parametrize("renormalize", [True, False])
def test_groups_are_chosen_by_their_best_or_with_a_bias_by_their_best_two(renormalize):
    plain = srt.grouped_topk(*BOTH, 2, renormalize, 4, 2)
    assert all(map(torch.equal, plain, moe.grouped_topk(LOGITS, 2, 4, 2, renormalize, group_score="max")))
    sigmoid = srt.grouped_topk(*BOTH, 2, renormalize, 4, 2, scoring_func="sigmoid")
    options = {"scoring_func": "sigmoid", "group_score": "max"}
    assert all(map(torch.equal, sigmoid, moe.grouped_topk(LOGITS, 2, 4, 2, renormalize, **options)))
    for compiled in (True, False):
        found = srt.biased_grouped_topk(*BOTH, BIAS.bfloat16(), 2, renormalize, 4, 2, compiled, 0, 2.5)
        options = {"scoring_func": "sigmoid", "correction_bias": BIAS.bfloat16().float()}
        assert all(map(torch.equal, found, moe.grouped_topk(LOGITS, 2, 4, 2, renormalize, **options)))
    scaled = srt.biased_grouped_topk(
        *(*BOTH, BIAS, 2, True, 4, 2), routed_scaling_factor=2.5, apply_routed_scaling_factor_on_output=True
    )
    torch.testing.assert_close(scaled[0].sum(1), torch.full((5,), 2.5))
    with pytest.raises(TypeError, match="`compiled` must be True or False, got 3"):
        srt.biased_grouped_topk(*BOTH, BIAS, 2, True, 4, 2, 3)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("name", ["n_share_experts_fusion", "num_fused_shared_experts"])
def test_a_replica_of_the_shared_expert_is_drawn_for_each_token(name, renormalize):
    many = LOGITS.repeat(40, 1)
    torch.manual_seed(1)
    weights, ids = srt.grouped_topk(many, many, 3, renormalize, 4, 2, routed_scaling_factor=2.5, **{name: 3})
    routed = moe.grouped_topk(many, 2, 4, 2, renormalize, group_score="max")
    assert torch.equal(ids[:, :2], routed.topk_ids)
    assert sorted(set(ids[:, 2].tolist())) == [8, 9, 10]
    torch.testing.assert_close(weights[:, :2], routed.topk_weights)
    torch.testing.assert_close(weights[:, 2], routed.topk_weights.sum(1) / 2.5)
    with pytest.raises(ValueError, match=r"`routed_scaling_factor` must be a number other than 0 .*, got None"):
        srt.grouped_topk(many, many, 3, renormalize, 4, 2, **{name: 3})


def test_shared_experts_by_both_names_are_refused():
    both = {"n_share_experts_fusion": 1, "num_fused_shared_experts": 2, "routed_scaling_factor": 2.5}
    with pytest.raises(ValueError, match="`num_fused_shared_experts` must be 0 with `n_share_experts_fusion`, got 2"):
        srt.biased_grouped_topk(*BOTH, BIAS, 3, True, 4, 2, **both)


@pytest.mark.parametrize("number", [3, torch.tensor(3), torch.tensor([3], dtype=torch.int32)])
@pytest.mark.parametrize("shared", [0, 2])
def test_padding_is_a_number_or_a_tensor(number, shared):
    options = {"num_token_non_padded": number, "routed_scaling_factor": 2.5, "num_fused_shared_experts": shared}
    for weights, ids in (
        srt.fused_topk(*BOTH, 3, True, **options),
        srt.grouped_topk(*BOTH, 3, True, 4, 2, **options),
        srt.biased_grouped_topk(*BOTH, BIAS, 3, True, 4, 2, **options),
        srt.select_experts(*BOTH, 3, True, True, 2, 4, correction_bias=BIAS, **options),
    ):
        assert (ids[:3] >= 0).all()
        assert ids[3:].tolist() == [[-1] * 3] * 2
        assert weights[3:].tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("shared", [0, 1])
def test_ids_become_places(shared):
    places = torch.arange(9, dtype=torch.int32).flip(0) + 20
    theirs = types.SimpleNamespace(ep_dispatch_algorithm="static", partial_logical_to_rank_dispatch_physical_map=places)
    options = {"num_fused_shared_experts": shared, "routed_scaling_factor": 2.5}
    logical = srt.fused_topk(*BOTH, 3, True, **options)[1]
    for info in (theirs, DispatchTables(places)):
        found = srt.fused_topk(*BOTH, 3, True, expert_location_dispatch_info=info, **options)[1]
        assert torch.equal(found, places[logical.long()])
    theirs.ep_dispatch_algorithm = "lp"
    with pytest.raises(ValueError, match=r"`expert_location_dispatch_info` must be DispatchTables, .*, got lp"):
        srt.fused_topk(*BOTH, 3, True, expert_location_dispatch_info=theirs)
    with pytest.raises(ValueError, match=r"`expert_location_dispatch_info` must be DispatchTables, .*, got dict"):
        srt.fused_topk(*BOTH, 3, True, expert_location_dispatch_info={})


def test_select_experts_goes_the_way_it_is_asked_to():
    options = {"routed_scaling_factor": 2.5}
    for found, expected in (
        (srt.select_experts(*BOTH, 2, False, True), srt.fused_topk(*BOTH, 2, True)),
        (srt.select_experts(*BOTH, 2, False, True, torch_native=True), srt.fused_topk(*BOTH, 2, True)),
        (
            srt.select_experts(*BOTH, 2, False, True, correction_bias=BIAS, scoring_func="sigmoid"),
            srt.fused_topk(*BOTH, 2, True, correction_bias=BIAS, scoring_func="sigmoid"),
        ),
        (srt.select_experts(*BOTH, 2, True, True, 2, 4, **options), srt.grouped_topk(*BOTH, 2, True, 4, 2)),
        (
            srt.select_experts(*BOTH, 2, True, False, 2, 4, None, BIAS, False, 2.5),
            srt.biased_grouped_topk(*BOTH, BIAS, 2, False, 4, 2),
        ),
    ):
        assert all(map(torch.equal, found, expected))
    with pytest.raises(ValueError, match="`num_expert_group` must be given with `use_grouped_topk`, got None"):
        srt.select_experts(*BOTH, 2, True, True, 2)
    with pytest.raises(TypeError, match="`torch_native` must be True or False, got None"):
        srt.select_experts(*BOTH, 2, torch_native=None)
    with pytest.raises(TypeError, match="`top_k` must be an integer, got NoneType"):
        srt.select_experts(*BOTH)


def test_a_routing_function_of_the_callers_is_asked_by_keyword():
    given = {}

    def route(hidden_states, gating_output, topk, renormalize):
        given.update(locals())
        return torch.full((5, topk), 0.5), torch.arange(5 * topk, dtype=torch.int32).view(5, topk)

    options = {"routed_scaling_factor": 4.0, "apply_routed_scaling_factor_on_output": True, "num_token_non_padded": 4}
    table = DispatchTables(torch.arange(10, dtype=torch.int32).flip(0).contiguous())
    options |= {"custom_routing_function": route, "expert_location_dispatch_info": table}
    weights, ids = srt.select_experts(*BOTH, 2, False, False, **options)
    assert given["hidden_states"] is HIDDEN
    assert (given["topk"], given["renormalize"]) == (2, False)
    assert ids.tolist() == [[9, 8], [7, 6], [5, 4], [3, 2], [-1, -1]]
    assert weights.tolist() == [[2.0, 2.0]] * 4 + [[0.0, 0.0]]
    with pytest.raises(ValueError, match="`num_fused_shared_experts` must be 0 with `custom_routing_function`, got 1"):
        srt.select_experts(*BOTH, 2, custom_routing_function=route, num_fused_shared_experts=1)


def test_rules_may_come_in_one_object():
    names = dict.fromkeys(srt.CONFIGURED)
    config = types.SimpleNamespace(**names | {"top_k": 2, "use_grouped_topk": True, "topk_group": 2})
    vars(config).update(num_expert_group=4, renormalize=True, num_fused_shared_experts=0, torch_native=False)
    vars(config).update(apply_routed_scaling_factor_on_output=False, scoring_func="softmax", correction_bias=BIAS)
    found = srt.select_experts(hidden_states=HIDDEN, router_logits=LOGITS, topk_config=config, num_token_non_padded=4)
    expected = srt.biased_grouped_topk(*BOTH, BIAS, 2, True, 4, 2, num_token_non_padded=4)
    assert torch.equal(found.topk_weights, expected[0])
    assert torch.equal(found.topk_ids, expected[1])
    assert found.router_logits is LOGITS
    with pytest.raises(ValueError, match="`top_k` must be None with `topk_config`, got 2"):
        srt.select_experts(*BOTH, 2, topk_config=config)


@pytest.mark.parametrize("layer", [None, 3])
def test_simulated_routing_is_balanced_over_ranks_and_experts(layer):
    ids, weights = torch.empty(16, 4, dtype=torch.int64), torch.empty(16, 4)
    options = {"num_ranks": 4, "layer_id": layer}
    srt.simulate_balanced_routing(ids, weights, 16, random=False, weight_scale=2.0, **options)
    assert torch.bincount(ids.ravel()).tolist() == [4] * 16
    assert sorted((ids[0] // 4).tolist()) == [0, 1, 2, 3]  # a rank each
    assert ids[0, 0] == (12 if layer else 0)
    assert weights.eq(0.5).all()
    srt.simulate_balanced_routing(ids, weights, 16, random=False, num_token_non_padded=15, **options)
    assert (ids[15].tolist(), weights[15].tolist()) == ([-1] * 4, [0.0] * 4)
    with pytest.raises(ValueError, match="`num_ranks` must be a divisor of num_experts = 16, got 3"):
        srt.simulate_balanced_routing(ids, weights, 16, random=False, num_ranks=3)
    with pytest.raises(ValueError, match="`seed` must be None but for `random`, got 1"):
        srt.simulate_balanced_routing(ids, weights, 16, random=False, seed=1)


def test_simulated_routing_at_random_is_distinct_and_of_its_seed():
    draws = []
    for seed in (1, 1, 2):
        ids, weights = torch.empty(64, 4, dtype=torch.int32), torch.empty(64, 4)
        srt.simulate_balanced_routing(ids, weights, 16, random=True, seed=seed)
        assert all(len(set(row)) == 4 for row in ids.tolist())
        draws.append(ids)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    srt.simulate_balanced_routing(ids, weights, 16, random=True)
    assert weights.eq(0.25).all()


def test_rows_of_deepep_are_those_in_use_in_int64():
    experts, src2dst, starts = srt.deepep_run_moe_deep_preprocess(IDS, 4)
    assert experts.tolist() == [0, 0, 1, 2, 3, 3, 3]
    assert src2dst.tolist() == [4, 2, 0, 5, -1, 3, 6, 1]
    assert starts.tolist() == [0, 2, 3, 4, 7]
    assert {experts.dtype, src2dst.dtype, starts.dtype} == {torch.int64}
    found = srt.deepep_permute(HIDDEN[:4], IDS, 4)
    assert all(map(torch.equal, found[:3], (experts, src2dst, starts)))
    assert torch.equal(found[3], HIDDEN[[1, 3, 0, 2, 0, 1, 3]])
    output = torch.full((4, 16), torch.nan)
    weights = torch.rand(4, 2)
    srt.deepep_post_reorder(found[3], output, src2dst, IDS, weights, 2, 16, 2.0)
    kept = torch.where(IDS >= 0, weights, 0).sum(1, keepdim=True)
    torch.testing.assert_close(output, 2 * kept * HIDDEN[:4])
    with pytest.raises(ValueError, match="`topk` must be that of the tensors, 2, got 3"):
        srt.deepep_post_reorder(found[3], output, src2dst, IDS, weights, 3, 16)
    with pytest.raises(ValueError, match="`hidden_size` must be that of the tensors, 16, got 8"):
        srt.deepep_post_reorder(found[3], output, src2dst, IDS, weights, 2, 8)


def test_no_tokens_of_deepep_are_no_rows():
    experts, src2dst, starts, rows = srt.deepep_permute(HIDDEN[:0], IDS[:0], 4)
    assert (experts.tolist(), src2dst.tolist(), starts.tolist(), rows.shape) == ([], [], [0] * 5, (0, 16))
    assert srt.deepep_run_moe_deep_preprocess(IDS[:0], 4)[2].tolist() == [0] * 5


def test_rows_of_deepep_are_rounded_where_asked():
    eighths = torch.float8_e4m3fn
    rows = srt.deepep_permute(HIDDEN[:4], IDS, 4, eighths, True)[3]
    assert rows.dtype == eighths
    assert torch.equal(rows.float(), HIDDEN[[1, 3, 0, 2, 0, 1, 3]].to(eighths).float())
    assert srt.deepep_permute(HIDDEN[:4], IDS, 4, eighths, True, True)[3].dtype == torch.float32
    assert srt.deepep_permute(HIDDEN[:4], IDS, 4, eighths)[3].dtype == torch.float32
    with pytest.raises(TypeError, match="`fp8_dtype` must be"):
        srt.deepep_permute(HIDDEN[:4], IDS, 4, None, True)


@pytest.mark.parametrize("scales", [None, torch.tensor([2.0])])
def test_rows_go_where_the_caller_says_and_come_back(scales):
    ids = torch.where(IDS == 3, 4, IDS)  # 4 is no expert of this rank
    rows = torch.tensor([-9, 2, 0, -9, -9, 4, -9, 1])
    given = torch.full((6, 16), 7.0, dtype=torch.bfloat16)
    srt.pre_reorder_for_cutlass_moe(HIDDEN[:4], given, rows, ids, scales, 4, 2, 4, 16)
    moved = HIDDEN[:4] if scales is None else HIDDEN[:4] / 2
    assert torch.equal(given[[2, 0, 4, 1]], moved[[0, 1, 2, 3]].bfloat16())
    assert given[[3, 5]].eq(7).all()
    output, weights = torch.full((4, 16), torch.nan), torch.rand(4, 2)
    srt.post_reorder_for_cutlass_moe(given, output, rows.int(), ids, weights, 4, 2, 4, 16, 3.0)
    picked = weights[[0, 1, 2, 3], [1, 0, 1, 1]][:, None]
    torch.testing.assert_close(output, 3 * picked * given[[2, 0, 4, 1]].float())
    with pytest.raises(ValueError, match="`num_tokens` must be that of the tensors, 4, got 5"):
        srt.pre_reorder_for_cutlass_moe(HIDDEN[:4], given, rows, ids, scales, 4, 2, 5, 16)


SCORED, NUMBERS = torch.rand(4, 8), torch.tensor([2, 3])
WEIGHTS_OF_4, SHARED = torch.empty(4, 2), {"num_fused_shared_experts": 1, "routed_scaling_factor": 2.0}
ROUTE = {"custom_routing_function": lambda hidden_states, gating_output, topk, renormalize: gating_output.topk(topk)}
PACKED = torch.empty(4, 2, dtype=torch.int32)
MOVED = (HIDDEN[:2], torch.empty(3, 16), torch.tensor([2, 0, -1, 1]), torch.tensor([[1, 0], [-1, 0]]))


def fused(logits=SCORED, topk=2, **options):
    return srt.fused_topk(logits, logits, topk, True, **options)


def select(**options):
    return srt.select_experts(SCORED, SCORED, 2, **options)


def simulate(ids=PACKED, weights=WEIGHTS_OF_4, experts=8, **options):
    srt.simulate_balanced_routing(ids, weights, experts, random=True, **options)


BAD = {
    "packed rows": (lambda: fused(packed_out=PACKED[:3]), ValueError, r"`packed_out` must be of shape .* = \(4, 2\)"),
    "packed dtype": (lambda: fused(packed_out=PACKED.long()), TypeError, "`packed_out` must be of dtype int32, got"),
    "packed onto": (
        lambda: fused(SCORED, packed_out=SCORED.view(torch.int32)[:, :2]),
        ValueError,
        "`packed_out` must be in memory of its own",
    ),
    "numbers": (
        lambda: fused(**SHARED, num_token_non_padded=NUMBERS),
        ValueError,
        "`num_token_non_padded` must be of sh",
    ),
    "a float": (
        lambda: fused(**SHARED, num_token_non_padded=torch.tensor(2.0)),
        TypeError,
        "`num_token_non_padded` must be of dtype int32 or int64, got float32",
    ),
    "shared alone": (lambda: fused(**SHARED, topk=1), ValueError, "`topk` must be at least 2, got 1"),
    "bias": (lambda: select(**ROUTE, correction_bias=SCORED[0]), ValueError, "`correction_bias` must be left out with"),
    "scoring": (lambda: select(**ROUTE, scoring_func="sigmoid"), ValueError, "`scoring_func` must be left out with"),
    "groups": (lambda: select(num_expert_group=2), ValueError, "`num_expert_group` must be None without `use_grouped_"),
    "columns": (
        lambda: simulate(experts=1),
        ValueError,
        "`topk_ids` must be of at most num_experts = 1 columns, got 2",
    ),
    "weights": (lambda: simulate(weights=WEIGHTS_OF_4[:3]), ValueError, "`topk_weights` must be of shape `topk_ids`"),
    "ids": (
        lambda: simulate(ids=WEIGHTS_OF_4.clone()),
        TypeError,
        "`topk_ids` must be of dtype int32 or int64, got float32",
    ),
    "scale": (lambda: simulate(weight_scale=math.nan), ValueError, "`weight_scale` must be a finite number"),
    "scales": (
        lambda: srt.pre_reorder_for_cutlass_moe(*MOVED, torch.ones(2), 2, 2, 2, 16),
        ValueError,
        r"`a1_scales` must be of one number, got shape \(2,\)",
    ),
    "places": (
        lambda: srt.pre_reorder_for_cutlass_moe(*MOVED[:2], NUMBERS, MOVED[3], None, 2, 2, 2, 16),
        ValueError,
        "`src2dst` must be of 4 slots, as `topk_ids`, got 2",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_changes_nothing_or_does_not_fit_is_refused_by_name(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()


def test_no_tokens_are_moved_nowhere():
    given = torch.full((3, 16), 7.0)
    srt.pre_reorder_for_cutlass_moe(HIDDEN[:0], given, MOVED[2][:0], MOVED[3][:0], None, 2, 2, 0, 16)
    assert given.eq(7).all()


def test_the_allocator_hands_out_every_element_one_by_one():
    allocator = srt.BumpAllocator(buffer_size=122, dtype=torch.float32, device="cpu")
    views = [allocator.allocate(1) for _ in range(122)]
    assert [view.data_ptr() - views[0].data_ptr() for view in views] == list(range(0, 4 * 122, 4))
    assert torch.cat(views).eq(0).all()
    with pytest.raises(ValueError, match="`n` must be at most the 0 elements left of 122, got 1"):
        allocator.allocate(1)
    with pytest.raises(ValueError, match="`buffer_size` must be at least 1, got 0"):
        srt.BumpAllocator(0, torch.int32, "cpu")


def test_the_allocator_fills_nothing_where_it_is_not_asked_to(monkeypatch):
    monkeypatch.setattr(torch, "zeros", None)
    allocator = srt.BumpAllocator(4, "int32", "cpu", clear=False)
    assert allocator.allocate((2, 2)).shape == (2, 2)
    with pytest.raises(TypeError, match="`clear` must be True or False, got 0"):
        srt.BumpAllocator(4, "int32", "cpu", clear=0)


def make_recorder(mode="stat", **options):
    made = srt.ExpertDistributionRecorder(2, 4, mode=mode, device="cpu", **options)
    srt.set_global_expert_distribution_recorder(made)
    return made


def test_select_experts_tells_the_global_recorder():
    recorder = make_recorder()
    assert srt.get_global_expert_distribution_recorder() is recorder
    recorder.start_record()
    recorder.set_current_layer(1)
    chosen = srt.select_experts(HIDDEN, LOGITS[:, :4], 2, num_token_non_padded=3)[1]
    srt.select_experts(HIDDEN, LOGITS[:, :4], 2, layer_id=0)
    counts = recorder.dump_record(output_mode="object").logical_count[0]
    assert counts[1].tolist() == torch.bincount(chosen[:3].ravel(), minlength=4).tolist()
    assert counts[0].sum() == 10
    with recorder.with_current_layer(0):
        assert recorder._layer == 0
    assert recorder._layer == 1  # as it was set
    with pytest.raises(ValueError, match="`layer` must be at most num_layers - 1 = 1, got 2"):
        recorder.set_current_layer(2)


def test_start_forgets_what_was_recorded_and_reset_stops():
    recorder = make_recorder()
    recorder.set_current_layer(0)
    for ids in ([[0]], [[1]]):
        recorder.start_record()
        recorder.record_new_token(torch.tensor(ids))
        recorder.stop_record()
    assert recorder.dump_record("object").logical_count[0, 0].tolist() == [0, 1, 0, 0]
    recorder.start_record()
    with pytest.warns(RuntimeWarning, match="recording is on already"):
        recorder.start_record()
    recorder.reset()
    assert not recorder.recording


def test_dumps_are_csv_in_the_directory_that_the_environment_names(tmp_path, monkeypatch):
    monkeypatch.setenv(srt.DIRECTORY, str(tmp_path / "named"))
    (tmp_path / "named").mkdir()
    recorder = make_recorder()
    recorder.set_current_layer(1)

    def dump(**options):
        recorder.start_record()
        recorder.record_new_token(torch.tensor([[0, 2], [2, -1]]))
        recorder.stop_record()
        return recorder.dump_record(**options)

    path = dump()
    assert path.parent == tmp_path / "named"
    assert path.match("expert_distribution_*.csv")
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert list(rows[0]) == ["layer_id", "expert_id", "count"]
    assert [int(row["count"]) for row in rows if row["layer_id"] == "1"] == [1, 0, 2, 0]
    assert dump(format="pt", directory=tmp_path).parent == tmp_path
    monkeypatch.delenv(srt.DIRECTORY)
    monkeypatch.chdir(tmp_path)
    assert dump().resolve().parent == tmp_path


def test_dispatch_counts_are_taken_under_deepeps_names():
    recorder = make_recorder("stat_approx")
    recorder.start_record()
    recorder.set_current_layer(0)
    recorder.on_deepep_dispatch_normal([1, 2, 3, 4], None, None, None)
    recorder.on_deepep_dispatch_low_latency(torch.tensor([4, 3, 2, 1]))
    assert recorder.dump_record("object").logical_count[0, 0].tolist() == [5, 5, 5, 5]


@pytest.mark.parametrize(("mode", "ours"), [("none", None), (None, None), ("raw", "per_token"), ("stat", "stat")])
def test_modes_have_sglangs_names(mode, ours):
    assert make_recorder(mode).mode == ours
    with pytest.raises(ValueError, match=r"`mode` must be one of 'none', 'raw', 'stat', .*, got 'all'"):
        make_recorder("all")


def test_a_pass_takes_a_batch_or_a_number_of_tokens():
    recorder = make_recorder("per_pass")
    recorder.start_record()
    for batch in (1, types.SimpleNamespace(num_token_non_padded_cpu=1), types.SimpleNamespace(), None):
        with recorder.with_forward_pass(7, batch), recorder.with_current_layer(0):
            recorder.on_select_experts(torch.tensor([[0], [1]]))
    assert recorder.dump_record("object").logical_count[:, 0].tolist() == [[1, 0, 0, 0]] * 2 + [[1, 1, 0, 0]] * 2


def test_without_a_recorder_hooks_do_nothing_and_control_says_so():
    nothing = srt.get_global_expert_distribution_recorder()
    assert not nothing.recording
    inside = (nothing.with_forward_pass(0, None), nothing.with_current_layer(layer_idx=3), nothing.with_debug_name("a"))
    with inside[0], inside[1], inside[2], nothing.disable_this_region():
        nothing.set_current_layer(5)
        nothing.on_select_experts(topk_ids=IDS)
        nothing.record_new_token(IDS)
        nothing.on_deepep_dispatch_normal([1], None, None, None)
        nothing.on_deepep_dispatch_low_latency(IDS)
    for control in (nothing.start_record, nothing.stop_record, nothing.reset, nothing.dump_record):
        with pytest.raises(RuntimeError, match="`set_global_expert_distribution_recorder` must be called"):
            control()
    public = {name for name in vars(srt.ExpertDistributionRecorder) if not name.startswith("_")}
    assert all(hasattr(nothing, name) for name in public)


@pytest.mark.parametrize("mode", srt.MODES)
def test_options_of_a_server_make_a_recorder(mode):
    parser = argparse.ArgumentParser(exit_on_error=False)
    srt.add_cli_args(parser)
    words = ["--expert-distribution-recorder-mode", mode, "--expert-distribution-recorder-buffer-size"]
    places = placement.ExpertLocation.trivial(2, 4, 6)
    made = srt.recorder_from_args(
        parser.parse_args([*words, "3"]), 2, 4, top_k=2, device="cpu", physical_to_logical_map=places
    )
    assert made.mode == srt.MODES[mode]
    assert (made._size, made.num_slots) == (3, 6)
    assert srt.recorder_from_args(parser.parse_args([*words, "-1"]), 2, 4, device="cpu")._size is None
    with pytest.raises(argparse.ArgumentError, match="invalid choice: 'all'"):
        parser.parse_args([words[0], "all"])


def test_nothing_is_recorded_without_the_option():
    parser = argparse.ArgumentParser()
    srt.add_cli_args(parser)
    made = srt.recorder_from_args(parser.parse_args([]), 2, 4, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.on_select_experts(IDS)
    assert made.mode is None
