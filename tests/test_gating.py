"""Gating: every kernel on every case, and the rows where keys do not decide."""

import contextlib
import itertools

import numpy as np
import pytest
import torch

import numba_moe as moe
from numba_moe import reference
from numba_moe.device import simulator
from numba_moe.interop import into
from numba_moe.ops.gating import lane_table, lanes, which_kernel
from numba_moe.recorder import ExpertDistributionRecorder
from numba_moe.runtime import arrays, checks
from numba_moe.verify import cases, testing, verification

CASES = [case for case in cases.edge_cases() if case.op in testing.GATING]
ON_GPU = torch.cuda.is_available() and not simulator.ENABLED
MANY = 32 if simulator.ENABLED else 5000
FEW = 4 if simulator.ENABLED else 5000


@pytest.fixture(
    params=[pytest.param(k, marks=pytest.mark.slow) if k == "long_rows" else k for k in which_kernel.KERNELS]
)
def kernel(request):
    with which_kernel.preferring(request.param):
        yield request.param


def run(op, *args, **kwargs):
    """Call an op where kernels run, on NumPy arrays."""

    def give(value):
        return torch.from_numpy(value).to("cuda" if ON_GPU else "cpu") if isinstance(value, np.ndarray) else value

    with simulator.running() if simulator.ENABLED else contextlib.nullcontext():
        return getattr(moe, op)(*map(give, args), **{name: give(value) for name, value in kwargs.items()})


def assert_as_reference(op, *args, **kwargs):
    result = run(op, *args, **kwargs)
    wanted = getattr(reference, op)(*args, **kwargs)
    assert np.array_equal(testing.to_numpy(result.topk_ids), wanted.topk_ids)
    comparison = testing.compare(result.topk_weights, wanted.topk_weights)
    assert not comparison.mismatches, comparison


# Of these cases verification runs in the simulator what their sizes ask for: by warps, and long rows from memory.
@pytest.mark.sweep(12)
@pytest.mark.parametrize(
    "kernel", ["lanes", "eight_lanes", pytest.param("long_rows", marks=pytest.mark.gpu)], indirect=True
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}: {case.name}")
def test_the_kernels_for_more_equal_the_reference(case, kernel):
    outcome = verification.run_case(case, seed=1, device="cuda" if ON_GPU else "cpu")
    assert outcome.passed, outcome


def nearly_tied(experts, bits):
    """Return logits that differ in their lowest bits alone: keys with ids of more bits cannot tell them apart."""
    rng = np.random.default_rng(0)
    words = np.float32(1.0).view(np.int32) + rng.integers(0, 1 << bits, (MANY, experts))
    return words.astype(np.int32).view(np.float32)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("experts", [20, 64, 200])
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_ranks_that_differ_in_their_lowest_bits(kernel, experts, top_k):
    assert_as_reference("topk_softmax", nearly_tied(experts, 9), top_k, True)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("values", [1, 2, 5])
def test_a_few_values_only(kernel, values):
    logits = np.random.default_rng(values).integers(0, values, (MANY, 96)).astype(np.float32)
    assert_as_reference("topk_softmax", logits, 6, True)
    grouped = {"scoring_func": "sigmoid", "group_score": "max"}
    assert_as_reference("grouped_topk", logits, 6, 8, 3, True, **grouped)


@pytest.mark.sweep(1)
def test_the_last_experts_of_chosen_groups_come_before_those_of_others(kernel):
    logits = np.full((MANY, 24), -np.inf, np.float32)
    logits[:, [5, 15]] = 1.0  # of groups 1 and 5, whose other experts are no better than all the rest
    call = {"num_expert_group": 8, "topk_group": 2, "renormalize": False, "scoring_func": "sigmoid"}
    assert_as_reference("grouped_topk", logits, 6, **call)
    assert run("grouped_topk", logits, 6, **call).topk_ids[0].tolist() == [5, 15, 3, 4, 16, 17]


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("biased", [False, True])
def test_any_number_of_lanes_serves_a_token(number, biased):
    rng = np.random.default_rng(number)
    for experts in (number, 2 * number + 1, 8 * number, 12 * number, 32 * number):
        logits = rng.standard_normal((FEW, experts)).astype(np.float32)
        logits[1] = logits[1].round()  # few values
        logits[2] = np.where(logits[2] > 1, logits[2], -np.inf)
        logits[3, experts // 2] = np.nan
        bias = rng.standard_normal(experts).astype(np.float32) if biased else None
        with which_kernel.preferring("lanes", (number, 8)):
            assert_as_reference("topk_softmax", logits, 1, True, bias)
            assert_as_reference("topk_softmax", logits, min(number, 6), False, bias)
            assert_as_reference("topk_sigmoid", logits, number, True, bias)
            assert_as_reference("topk_sigmoid", logits, 1, False, bias)


def test_every_call_has_lanes_that_can_hold_it():
    for lines in lane_table.LANES.values():
        tokens = [tokens for tokens, *_ in lines]
        assert tokens == sorted(set(tokens))
        assert tokens[-1] == checks.LARGEST_INT32
        assert all(0 < warps <= lanes.MOST_WARPS_IN_BLOCK for *_, warps in lines)
    for experts, top_k, needs in itertools.product((1, 3, 8, 60, 384, 1024, 1025, 5000), (1, 2, 6, 32, 33), (0, 1, 2)):
        for tokens in (1, 3000, 10**9):
            number, _ = which_kernel.lanes_for(tokens, experts, top_k, needs)
            assert number in (0, 1, 2, 4, 8, 16, 32)
            assert number == 0 or (top_k <= number and experts <= 32 * number)


def test_lanes_are_those_of_the_nearest_measurement(monkeypatch):
    measured = {(8, 1, 0): ((100, 1, 8), (checks.LARGEST_INT32, 0, 4)), (128, 4, 2): ((checks.LARGEST_INT32, 16, 4),)}
    monkeypatch.setattr(lane_table, "LANES", measured)
    which_kernel.lanes_by_tokens.cache_clear()
    try:
        assert which_kernel.lanes_for(100, 16, 1, which_kernel.LOGITS) == (1, 8)
        assert which_kernel.lanes_for(101, 16, 1, which_kernel.LOGITS) == (0, 4)
        assert which_kernel.lanes_for(1, 16, 2, which_kernel.LOGITS) == (2, 8)  # a lane for each pick
        assert which_kernel.lanes_for(1, 100, 2, which_kernel.BIASED) == (16, 4)
        assert which_kernel.lanes_for(1, 1000, 2, which_kernel.BIASED) == (32, 4)
        assert which_kernel.lanes_for(1, 32, 2, which_kernel.SOFTMAX) == (16, 4)  # measured with more picks, not fewer
    finally:
        which_kernel.lanes_by_tokens.cache_clear()


@pytest.mark.sweep(2)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scoring_func", ["softplus_sqrt", "raw"])
def test_other_scores(kernel, scoring_func, biased):
    rng = np.random.default_rng(3)
    logits = 5 * rng.standard_normal((MANY, 64), np.float32)
    logits[rng.random(logits.shape) < 0.1] = np.inf
    logits[rng.random(logits.shape) < 0.1] = np.nan
    bias = np.linspace(0, 2, 64, dtype=np.float32) if biased else None
    arguments = {"gating_output": logits, "top_k": 6, "scoring_func": scoring_func, "correction_bias": bias}
    for groups in ({}, {"num_expert_group": 8, "topk_group": 3, "group_score": "top2_sum"}):
        result, wanted = run("select_experts", **arguments, **groups), reference.select_experts(**arguments, **groups)
        for comparison in testing.compare_results("select_experts", result, wanted, {**arguments, **groups}):
            assert not comparison.mismatches, comparison


@pytest.mark.sweep(4)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_softplus_is_precise_for_any_size_of_logits(kernel, scale):
    logits = np.linspace(-scale, scale, MANY * 8, dtype=np.float32).reshape(MANY, 8)
    assert_as_reference("topk_softplus_sqrt", logits, 8, True)


@pytest.mark.sweep(1)
def test_one_lane_has_all_the_best(kernel):
    logits = np.random.default_rng(2).standard_normal((MANY, 256)).astype(np.float32)
    logits[:, 72:80] += 20.0  # neighbours, that lie with one lane
    assert_as_reference("topk_softmax", logits, 8, True)
    assert_as_reference("topk_sigmoid", logits, 8)


def test_llama_4_weighs_by_the_sigmoid_of_the_chosen_logit(kernel):
    logits = np.random.default_rng(4).standard_normal((MANY, 16), np.float32)
    result = run("select_experts", logits, 1, scoring_func="sigmoid")
    assert np.array_equal(testing.to_numpy(result.topk_ids)[:, 0], logits.argmax(axis=1))
    best = torch.from_numpy(logits.max(axis=1))
    assert not testing.compare(result.topk_weights[:, 0], torch.sigmoid(best).numpy()).mismatches


@pytest.mark.sweep(1)
def test_recorded_experts_weigh_what_they_did(kernel):
    logits = np.random.default_rng(5).standard_normal((MANY, 40), np.float32)
    options = {"renormalize": True, "softcap": 8.0, "routed_scaling_factor": 2.0}
    chosen = run("select_experts", logits, 5, **options, indices_dtype="int16")
    again = run("weigh_experts", logits, testing.to_numpy(chosen.topk_ids), **options, indices_dtype="int16")
    assert torch.equal(chosen.topk_ids, again.topk_ids)
    assert not testing.compare(again.topk_weights, testing.to_numpy(chosen.topk_weights)).mismatches


@pytest.mark.sweep(1)
def test_tables_send_as_dispatch_does(kernel):
    rng = np.random.default_rng(6)
    logits = rng.standard_normal((MANY, 24), np.float32)
    physical_map, num_valid = rng.integers(0, 40, (24, 3)).astype(np.int32), rng.integers(1, 4, 24).astype(np.int32)
    step = np.array([7])
    ids = reference.select_experts(logits, 4).topk_ids
    for algorithm, draws in (("hash", None), ("dynamic", step)):
        counts = torch.zeros(40, dtype=torch.int64, device="cuda" if ON_GPU else "cpu")
        tables = reference.DispatchTables(
            *(torch.from_numpy(part).to(counts.device) for part in (physical_map, num_valid)),
            *(algorithm, 3, None if draws is None else torch.from_numpy(draws).to(counts.device)),
        )
        result = run("select_experts", logits, 4, dispatch=tables, counts=counts)
        rules = {"algorithm": algorithm, "seed": 3, "step": draws}
        wanted = reference.dispatch_ids(ids, physical_map, num_valid, **rules)
        assert np.array_equal(testing.to_numpy(result.topk_ids), wanted)
        assert counts.tolist() == np.bincount(wanted.ravel(), minlength=40).tolist()


def test_a_recorder_counts_by_gating():
    recorder = ExpertDistributionRecorder(2, 16, mode="stat", device="cuda" if ON_GPU else "cpu")
    logits = np.random.default_rng(7).standard_normal((MANY, 16), np.float32)
    counting = {"counts": recorder.layer_counts(1), "counts_enabled": recorder.enabled}
    run("select_experts", logits, 3, **counting)
    assert recorder.layer_counts(1).sum() == 0
    recorder.start_record()
    ids = run("select_experts", logits, 3, **counting).topk_ids
    wanted = np.bincount(testing.to_numpy(ids).ravel(), minlength=16)
    assert recorder.layer_counts(1).sum(dim=0).tolist() == wanted.tolist()
    assert recorder.dump_record(output_mode="object").logical_count[0, 1].tolist() == wanted.tolist()


def test_an_infinite_cap_is_none(kernel):
    logits = np.array([[0.0, 1.0, 3.0, -np.inf], [np.nan, 2.0, -1.0, 0.5]] * 2, np.float32)
    for options in ({}, {"num_fused_shared_experts": 1}, {"bias_mode": "logits", "correction_bias": logits[0]}):
        capped, plain = (run("select_experts", logits, 2, softcap=cap, **options) for cap in (np.inf, 0.0))
        assert all(map(torch.equal, capped, plain))
        capped, plain = (reference.select_experts(logits, 2, softcap=cap, **options) for cap in (np.inf, 0.0))
        assert all(map(np.array_equal, capped, plain))
    leaf = torch.from_numpy(logits[:1]).requires_grad_()
    assert moe.select_experts(leaf, 2, softcap=np.inf).topk_weights.requires_grad


@pytest.mark.parametrize("softcap", [1e-45, 0.5])
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_caps_of_any_size_leave_infinities_alone(kernel, scoring_func, softcap):
    special = [np.inf, 3.0, -np.inf, np.nan, -2.0, 0.0, 1.0, 8.0]
    logits = np.array([special, special[::-1], [*special[4:], *special[4:]], [-np.inf] * 8], np.float32)
    assert_as_reference("select_experts", logits, 4, scoring_func=scoring_func, softcap=softcap)
    if scoring_func == "sigmoid":
        assert run("select_experts", logits, 1, scoring_func="sigmoid", softcap=softcap).topk_weights[0].item() == 1.0


@pytest.mark.parametrize(
    ("logit", "weight"),
    [(-57.5, 0.5), (-75.0, 0.5), (-82.0, 2.44e-36)],  # scores of 1.1e-25, 2.7e-33 and 2.44e-36
)
@pytest.mark.parametrize("renormalizing", ["select_experts", "weigh_experts"])
def test_scores_are_renormalised_unless_they_sum_to_next_to_nothing(kernel, renormalizing, logit, weight):
    logits = np.full((FEW, 8), logit, np.float32)
    chosen = 2 if renormalizing == "select_experts" else np.tile(np.array([3, 5]), (FEW, 1))
    weights = run(renormalizing, logits, chosen, scoring_func="sigmoid", renormalize=True).topk_weights.cpu()
    assert torch.allclose(weights.double(), torch.tensor(weight).double(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("renormalize", [False, True])
def test_roots_of_softplus_keep_their_digits_far_below_zero(kernel, renormalize):
    logits = np.linspace(-160, -20, FEW * 4, dtype=np.float32).reshape(FEW, 4)
    weights = run("topk_softplus_sqrt", logits, 4, renormalize).topk_weights.cpu().double()
    scores = torch.from_numpy(logits).double().exp().log1p().sqrt().flip(1)
    wanted = scores / scores.sum(1, keepdim=True) if renormalize else scores
    assert torch.allclose(weights, wanted, rtol=3e-5, atol=0)


def test_sigmoid_scores_and_slopes_keep_their_digits():
    logits = torch.linspace(-100, 100, 4001, dtype=torch.float64).requires_grad_()
    wanted = torch.sigmoid(logits)
    found = reference.gating.sigmoid(logits.detach().numpy())
    np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-14)
    slopes = reference.gating.slopes(logits.detach().numpy(), "sigmoid")
    np.testing.assert_allclose(slopes, (wanted * torch.sigmoid(-logits)).detach().numpy(), rtol=1e-14)
    narrow = logits.detach().numpy().astype(np.float32)[:: 200 if simulator.ENABLED else 1, None]
    weights = reference.topk_sigmoid(narrow, 1).topk_weights[:, 0]
    exact = torch.sigmoid(torch.from_numpy(narrow[:, 0]).double()).numpy()
    np.testing.assert_allclose(weights, exact, rtol=1e-7, atol=np.finfo(np.float32).smallest_subnormal)
    normal = exact > np.finfo(np.float32).tiny
    on_device = run("topk_sigmoid", narrow, 1).topk_weights[:, 0].cpu().numpy()
    np.testing.assert_allclose(on_device[normal], exact[normal], rtol=1e-5)


@pytest.mark.parametrize("algorithm", ["static", "fake"])
def test_a_place_that_the_dtype_of_ids_cannot_hold_is_none(kernel, algorithm):
    logits = np.tile(np.array([3.0, 2.0, 1.0, 0.0], np.float32), (FEW, 1))
    places = np.array([40000, 32767, -5, 32768], np.int32)
    tables = reference.DispatchTables(torch.from_numpy(places).to("cuda" if ON_GPU else "cpu"), algorithm=algorithm)
    counts = np.zeros(32769, np.int32)
    given = torch.from_numpy(counts.copy()).to("cuda" if ON_GPU else "cpu")
    ids = run("select_experts", logits, 4, dispatch=tables, counts=given, indices_dtype="int16").topk_ids
    wanted = reference.DispatchTables(places, algorithm=algorithm)
    options = {"dispatch": wanted, "counts": counts, "indices_dtype": "int16"}
    assert np.array_equal(testing.to_numpy(ids), reference.select_experts(logits, 4, **options).topk_ids)
    assert ids[0].tolist() == [-1, 32767, -1, -1]
    assert given.tolist() == counts.tolist()
    assert counts.sum() == counts[32767] == FEW


@pytest.mark.parametrize("flag", [-1, 1, 0])
def test_any_flag_but_0_lets_counts_be_counted(kernel, flag):
    logits = np.random.default_rng(1).standard_normal((FEW, 8), np.float32)
    counts = torch.zeros(8, dtype=torch.int32, device="cuda" if ON_GPU else "cpu")
    run("select_experts", logits, 3, counts=counts, counts_enabled=np.array([flag], np.int32))
    assert counts.sum().item() == (3 * FEW if flag else 0)


def test_padding_has_no_identity_weight(kernel):
    logits = np.random.default_rng(2).standard_normal((FEW, 8), np.float32)
    padding = np.arange(FEW) % 2 == 1
    identity = torch.full((FEW,), torch.nan, device="cuda" if ON_GPU else "cpu")
    options = {"num_zero_experts": 4, "is_padding": padding}
    run("select_experts", logits, 3, identity_weights=identity, **options)
    wanted = np.full(FEW, np.nan, np.float32)
    reference.select_experts(logits, 3, identity_weights=wanted, **options)
    assert not wanted[padding].any()
    assert not testing.compare(identity, wanted).mismatches
    identity.fill_(torch.nan)
    ids = np.tile(np.array([7, 0, 5]), (FEW, 1))
    run("weigh_experts", logits, ids, identity_weights=identity, **options)
    assert not identity.cpu()[padding].any()
    assert identity.isfinite().all()


@pytest.mark.parametrize("on_output", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("num_zero", [0, 1])
def test_shared_experts_by_hand(kernel, renormalize, on_output, num_zero):
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]] * FEW, np.float32))
    options = {"renormalize": renormalize, "apply_routed_scaling_factor_on_output": on_output, "softcap": 0.0}
    options |= {"num_fused_shared_experts": 2, "num_zero_experts": num_zero, "routed_scaling_factor": 4.0}
    # Two of four are chosen, of which the scores are 0.5 and 0.3: 0.8 in all.
    routed = [0.625, 0.375] if renormalize else [0.5, 0.3]
    shared = (1.0 if renormalize else 0.8) / (1.0 if on_output else 4.0)
    wanted = [weight * (4.0 if on_output else 1.0) for weight in routed] + [shared, shared]
    real = 4 - num_zero
    chosen = np.tile(np.array([0, 1]), (FEW, 1))
    found = [run("select_experts", logits, 2, **options), run("weigh_experts", logits, chosen, **options)]
    found.append(reference.select_experts(logits, 2, **options))
    for weights, ids in found:
        assert ids.tolist() == [[0, 1, real, real + 1]] * FEW
        np.testing.assert_allclose(np.asarray(weights.tolist()), [wanted] * FEW, rtol=1e-5)


@pytest.mark.parametrize("top_k", [3, pytest.param(33, marks=pytest.mark.slow)])
def test_rows_of_any_size(top_k):
    rng = np.random.default_rng(top_k)
    tied = rng.integers(0, 4, (2, 1030)).astype(np.float32)
    rising = np.sort(rng.standard_normal((2, 1030), np.float32), axis=1)  # each is better than all before
    for logits in (tied, rising, -tied, rising[:, ::-1].copy()):
        assert_as_reference("topk_softmax", logits, top_k, True)
        assert_as_reference("topk_sigmoid", logits, top_k)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_long_rows_without_a_softmax(renormalize, biased):
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((5, 1030), np.float32)
    logits[0, 3], logits[1, 1029], logits[2, 500] = np.nan, np.inf, -np.inf  # the last of which is no hindrance
    logits[3] = -np.inf
    bias = rng.standard_normal(1030, np.float32) if biased else None
    assert_as_reference("topk_softmax", logits, 3, renormalize, bias)
    if not biased:
        assert run("topk_softmax", logits, 3, renormalize).topk_ids[[0, 1, 3]].tolist() == [[0, 1, 2]] * 3


@pytest.mark.gpu
def test_a_graph_reads_padding_tables_and_flags_at_each_replay():
    logits = torch.randn(8, 32, device="cuda")
    real, enabled = torch.tensor([8], device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    table, counts = (
        torch.arange(32, dtype=torch.int32, device="cuda"),
        torch.zeros(32, dtype=torch.int32, device="cuda"),
    )
    options = {"num_token_non_padded": real, "counts": counts, "counts_enabled": enabled}

    def call():
        tables = reference.DispatchTables(table)
        return moe.route(logits, 4, 8, dispatch=tables, num_physical_experts=32, **options)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        topk, blocks = call()
    real.fill_(3)
    enabled.fill_(1)
    table.copy_(31 - table)
    graph.replay()
    ids = topk.topk_ids.cpu()
    assert (ids[3:] == -1).all()
    assert (ids[:3] >= 0).all()
    assert counts.tolist() == np.bincount(ids[:3].flatten(), minlength=32).tolist()
    wanted = reference.moe_align_block_size(ids.numpy(), 8, 32)
    for part, expected in zip(blocks, wanted, strict=True):
        assert np.array_equal(part.cpu().numpy(), expected)


CHOICES = {
    "plain": (torch.int32, False, {"renormalize": True}),
    "scaled": (torch.int64, True, {"scoring_func": "sigmoid", "routed_scaling_factor": 2.5}),
    "capped": (torch.int32, True, {"softcap": 2.0, "bias_mode": "logits"}),
    "of 16 bits": (torch.int16, False, {}),
}


@pytest.mark.parametrize("rules", CHOICES)
def test_choices_go_into_memory_that_is_given(device, rules, monkeypatch):
    logits = torch.randn(6, 12, device=device)
    ids, biased, options = CHOICES[rules]
    if biased:
        options = dict(options)
        options["correction_bias"] = torch.linspace(-1, 1, 12, device=device)
        options["is_padding"] = torch.arange(6, device=device) == 2
    expected = moe.select_experts(logits, 3, **options)
    allocated, empty = [], arrays.empty
    monkeypatch.setattr(arrays, "empty", lambda *what: allocated.append(what[0]) or empty(*what))
    for pad in (0, 1):
        weights = torch.full((6, 3 + pad), torch.nan, device=device)[:, :3]
        chosen = torch.full((6, 3), -7, dtype=ids, device=device)
        allocated.clear()
        versions = weights._version, chosen._version
        into.select_experts(weights, chosen, logits, **options)
        assert torch.equal(weights, expected.topk_weights)
        assert torch.equal(chosen.int(), expected.topk_ids)
        assert (weights._version, chosen._version) > versions
        assert bool(allocated) == (pad == 1 or ids == torch.int16)
    with pytest.raises(ValueError, match=r"`out\.topk_weights` must be of shape that of the result = \(6, 3\), got"):
        into.select_experts(
            torch.zeros(5, 3, device=device), torch.zeros(6, 3, dtype=torch.int32, device=device), logits
        )
