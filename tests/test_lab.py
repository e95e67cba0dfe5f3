"""A kernel of one's own is checked as ours are: what is wrong with it is named, whatever arrays it takes."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import cuda

import numba_moe
from numba_moe import cli, lab, reference
from numba_moe.device import simulator
from numba_moe.verify import cases, faults, testing

ON_GPU = torch.cuda.is_available()
IN_SIMULATOR = pytest.mark.skipif(not simulator.ENABLED, reason="runs in Numba's CUDA simulator")
HERE = Path(__file__)


def topk(gating_output, top_k, renormalize=False, correction_bias=None):
    return reference.topk_softmax(gating_output, top_k, renormalize, correction_bias)


def count(topk_ids, num_experts, expert_map=None):
    return reference.count_tokens_per_expert(topk_ids, num_experts, expert_map)


# What is wrong, what it is like, the function, and cases that must be named.
WRONG = {}


def wrong(like, *named):
    def keep(function):
        WRONG[function.__name__] = (like, function, named)
        return function

    return keep


def softmax_of(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def chosen(scores, ranks, top_k, renormalize):
    ids = reference.gating.best(ranks, top_k)
    return reference.gating.weigh(scores, ids, renormalize)


@wrong("topk_softmax", "ties", "all logits equal")
def the_higher_id_wins_a_tie(gating_output, top_k, renormalize=False):
    logits = gating_output[:, ::-1]
    weights, ids = topk(logits, top_k, renormalize)
    return weights, (gating_output.shape[1] - 1 - ids).astype(np.int32)


@wrong("topk_softmax", "non-finite logits")
def nan_is_not_thought_of(gating_output, top_k, renormalize=False):
    with np.errstate(all="ignore"):
        scores = softmax_of(gating_output.astype(np.float64))
    return chosen(np.nan_to_num(scores), np.nan_to_num(gating_output), top_k, renormalize)


@wrong("topk_softmax", "saturated")
def exponentials_overflow(gating_output, top_k, renormalize=False):
    with np.errstate(all="ignore"):
        powers = np.exp(gating_output.astype(np.float32))
        return chosen(powers / powers.sum(1, keepdims=True), gating_output, top_k, renormalize)


@wrong("topk_softmax", "ties bias", "saturated bias")
def the_bias_is_in_the_weights(gating_output, top_k, renormalize=False, correction_bias=None):
    if correction_bias is None:
        return topk(gating_output, top_k, renormalize)
    _, ranks = reference.gating.score_and_rank(gating_output, "softmax", correction_bias)
    return chosen(ranks, ranks, top_k, renormalize)


@wrong("topk_softmax", "300 tokens")
def only_256_tokens(gating_output, top_k, renormalize=False):
    weights, ids = np.empty((len(gating_output), top_k), np.float32), np.empty((len(gating_output), top_k), np.int32)
    weights[:256], ids[:256] = topk(gating_output[:256], top_k, renormalize)
    return weights, ids


@wrong("topk_softmax", "strided rows")
def rows_are_taken_to_be_dense(gating_output, top_k, renormalize=False):
    memory = np.lib.stride_tricks.as_strided(gating_output, (gating_output.size,), (gating_output.itemsize,))
    return topk(np.nan_to_num(memory.reshape(gating_output.shape)), top_k, renormalize)


@wrong("count_tokens_per_expert", "-1 rows", "all ids -1")
def minus_one_is_the_last_expert(topk_ids, num_experts):
    counts = np.zeros(num_experts, np.int32)
    np.add.at(counts, topk_ids[topk_ids < num_experts] % num_experts, 1)
    return counts


@wrong("count_tokens_per_expert", "int64 ids past int32")
def ids_are_cut_to_32_bits(topk_ids, num_experts):
    return count(topk_ids.astype(np.int32), num_experts)


@wrong("count_tokens_per_expert", "zero tokens", "empty experts")
def counters_are_not_cleared(topk_ids, num_experts):
    counts = np.empty(num_experts, np.int32)
    found = count(topk_ids, num_experts)
    counts[found > 0] = found[found > 0]
    return counts


@wrong("moe_align_block_size", "several tiles", "one hot expert")
def the_order_is_not_stable(topk_ids, block_size, num_experts):
    blocks = reference.moe_align_block_size(topk_ids, block_size, num_experts)
    ids, used = blocks.sorted_token_ids, int(blocks.num_tokens_post_padded[0])
    ids[:used] = np.sort(ids[:used].reshape(-1, block_size), axis=1)[:, ::-1].reshape(-1)
    return ids, blocks.expert_ids, blocks.num_tokens_post_padded


@wrong("moe_sum", "top 40", "top 5")
def sums_are_rounded_at_every_step(hidden_states):
    total = np.zeros(hidden_states[:, 0].shape, np.float16)
    for k in range(hidden_states.shape[1]):
        total = (total + hidden_states[:, k]).astype(np.float16)
    return total.astype(hidden_states.dtype)


@wrong("moe_sum", "1030 columns")
def only_1024_columns(hidden_states):
    out = np.empty_like(hidden_states[:, 0])
    out[:, :1024] = reference.moe_sum(hidden_states)[:, :1024]
    return out


@wrong("expert_offsets", "int64 counts past int32")
def sums_are_of_32_bits(counts, alignment=1):
    padded = -(-counts.astype(np.int32) // alignment) * alignment
    return np.concatenate([[0], np.cumsum(padded, dtype=np.int32)]).astype(np.int64)


@pytest.mark.parametrize("name", WRONG)
def test_the_case_that_a_wrong_function_fails_is_named(name, capsys):
    like, function, named = WRONG[name]
    report = lab.check(function, like=like, device="cpu")
    printed = capsys.readouterr().out
    assert report.passed is False
    for case in named:
        assert case in report.failed
        assert any(line.strip().startswith(case) and "FAILED" in line for line in printed.splitlines())
    assert len(report.failed) < len(report.outcomes), "a fault has cases that it does not touch"
    if like == "topk_softmax":
        failed = next(outcome for outcome in report.outcomes if outcome.case == named[0])
        assert failed.message.startswith(("topk_weights first at", "topk_ids first at"))
    assert f"{len(report.failed)} failed" in printed


@pytest.mark.parametrize(("like", "function"), [("topk_softmax", topk), ("count_tokens_per_expert", count)])
def test_a_right_function_passes(like, function):
    report = lab.check(function, like=like, device="cpu", show=False)
    assert report.passed is True
    assert report.failed == []
    assert report.left_out == []
    assert report.library == "numpy"


@cuda.jit
def count_slots_by_hand(topk_ids, num_experts, counts_of_experts):
    slot = cuda.grid(1)
    if slot < topk_ids.size:
        expert = topk_ids[slot // topk_ids.shape[1], slot % topk_ids.shape[1]]
        if 0 <= expert < num_experts:
            cuda.atomic.add(counts_of_experts, expert, 1)


@cuda.jit
def count_without_atomics(topk_ids, num_experts, counts_of_experts):
    slot = cuda.grid(1)
    if slot < topk_ids.size:
        expert = topk_ids[slot // topk_ids.shape[1], slot % topk_ids.shape[1]]
        if 0 <= expert < num_experts:
            counts_of_experts[expert] += 1


def slots_grid(topk_ids):
    return -(-topk_ids.size // 64), 64


SOME = ["one", "-1", "zero", "300", "1100"]


def test_a_raw_kernel_is_launched_with_its_grid():
    report = lab.check(count_slots_by_hand, "count_tokens_per_expert", SOME[:3], grid=slots_grid, fill=0, show=False)
    assert report.passed
    assert report.library == "numba"
    fixed = lab.check(count_slots_by_hand[20, 64], "count_tokens_per_expert", "hot", fill=0, show=False)
    assert fixed.passed


def test_what_a_kernel_does_not_clear_is_poison(capsys):
    report = lab.check(count_slots_by_hand, like="count_tokens_per_expert", cases="one slot", grid=slots_grid)
    assert report.failed == ["one slot"]
    assert "wants `fill=0`" in capsys.readouterr().out


@IN_SIMULATOR
def test_updates_that_are_no_atomics_are_lost():
    report = lab.check(count_without_atomics, "count_tokens_per_expert", "one hot", grid=slots_grid, fill=0, show=False)
    assert report.failed == ["one hot expert"]


def in_torch(gating_output, top_k, renormalize=False):
    weights, ids = torch.topk(torch.softmax(gating_output.float(), 1), top_k)
    weights = weights / weights.sum(1, keepdim=True) if renormalize else weights
    return weights, ids.to(torch.int32)


def in_numba(topk_ids, num_experts):
    counts = cuda.to_device(np.zeros(num_experts, np.int32))
    if topk_ids.size:
        count_slots_by_hand[slots_grid(topk_ids)](topk_ids, num_experts, counts)
    return counts


def test_the_library_of_arrays_is_found_out():
    report = lab.check(in_torch, like="topk_softmax", cases="tokens float32", device="cpu", show=False)
    assert report.passed
    assert report.library == "torch"
    for library in ("numba", *([] if ON_GPU else ["numpy"])):
        assert lab.check(in_numba, "count_tokens_per_expert", "one slot", library=library, show=False).passed


RESULTS = {
    "a dtype": (lambda topk_ids, num_experts: np.zeros(num_experts, np.int64), "`result` must be int32, got int64"),
    "a shape": (lambda topk_ids, num_experts: count(topk_ids, num_experts)[None], "must be of shape (8,), got shape"),
    "nothing": (lambda topk_ids, num_experts: None, "must be an array, got None"),
    "too many": (lambda topk_ids, num_experts: (topk_ids, topk_ids), "must be an array, got a tuple of 2"),
    "a list": (lambda topk_ids, num_experts: [0] * num_experts, "must be an array, got a list of 8"),
    "no memory": (
        lambda topk_ids, num_experts: torch.zeros(num_experts, dtype=torch.int32).to_sparse(),
        "`result` must be an array whose every element is in memory, got torch.sparse_coo on cpu",
    ),
    "an error": (lambda topk_ids, num_experts: 1 // 0, "ZeroDivisionError"),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_of_another_kind_fails_and_says_why(name):
    function, message = RESULTS[name]
    report = lab.check(function, like="count_tokens_per_expert", cases="one slot", device="cpu", show=False)
    assert not report.passed
    assert message in report.outcomes[0].message


def test_a_changed_input_and_a_changing_result_fail():
    def writes(topk_ids, num_experts):
        found = count(topk_ids, num_experts)
        topk_ids[...] = 0
        return found

    calls = iter(range(99))

    def changes(topk_ids, num_experts):
        return count(topk_ids, num_experts) + np.int32(next(calls))

    given = {"like": "count_tokens_per_expert", "cases": "one slot", "device": "cpu", "show": False}
    assert "`topk_ids` was changed, which it must not be" in lab.check(writes, **given).outcomes[0].message
    assert "two calls" in lab.check(changes, library="numpy", **given).outcomes[0].message


def test_cases_that_give_what_it_does_not_take_are_left_out():
    report = lab.check(in_torch, like="topk_softmax", cases="saturated", device="cpu", show=False)
    assert report.left_out == [("saturated bias", "in_torch does not take correction_bias")]
    nothing = lab.check(lambda: 0, like="topk_softmax", cases="saturated", device="cpu", show=False)
    assert nothing.passed is False


def test_an_option_that_no_case_gives_alone_is_tried(capsys):
    def forgets_the_factor(hidden_states, routed_scaling_factor=1.0):
        return reference.moe_sum(hidden_states)

    report = lab.check(forgets_the_factor, like="moe_sum", device="cpu", show=False)
    assert report.failed == ["33 float32 to float32 without out_dtype"]

    def weighs(gating_output, topk_ids, is_padding=None):
        return reference.weigh_experts(gating_output, topk_ids)

    report = lab.check(weighs, like="weigh_experts", device="cpu")
    assert report.untried == ["is_padding"]
    assert "no case that it takes gives is_padding" in capsys.readouterr().out


def test_every_array_of_a_result_is_named():
    def rows_of_slots(hidden_states, topk_ids, num_experts):
        found = reference.moe_permute(hidden_states, topk_ids, num_experts)
        return found._replace(permuted_hidden_states=-found.permuted_hidden_states)

    report = lab.check(rows_of_slots, like="moe_permute", cases="top 5", device="cpu", show=False)
    assert report.outcomes[0].message.startswith("permuted_hidden_states first at (0, 0)")


@IN_SIMULATOR
@pytest.mark.parametrize("grid", [(1, 256), (256, 1)])
def test_an_order_that_is_chance_shows(grid):
    @cuda.jit
    def align(topk_ids, block_size, num_experts, sorted_token_ids, expert_ids, num_tokens_post_padded):
        slot = cuda.grid(1)
        if slot < topk_ids.size:
            place = cuda.atomic.add(num_tokens_post_padded, 0, 1)
            sorted_token_ids[place] = slot

    report = lab.check(align, "moe_align_block_size", "one hot", grid=grid, fill=0, show=False)
    assert "two calls with equal arguments have different results" in report.outcomes[0].message


@IN_SIMULATOR
def test_a_launch_leaves_the_next_one_its_own_grid():
    bound = count_slots_by_hand[1, 4]
    count_slots_by_hand[1, 1, 0, 64](np.array([[1]]), 2, np.zeros(2, np.int32))
    counts = np.zeros(2, np.int32)
    bound(np.array([[1, 0, 1]]), 2, counts)
    assert counts.tolist() == [1, 2]
    with pytest.raises(TypeError, match="`grid` must be"):
        lab.check(count_slots_by_hand, "count_tokens_per_expert", "one slot", fill=0)


def test_ones_own_case_is_run():
    ids = np.array([[3, 1]], np.int32)
    case = cases.Case("count_tokens_per_expert", "mine", cases.draws.given(topk_ids=ids, num_experts=4))
    report = lab.check(count, like="count_tokens_per_expert", cases=[case], device="cpu", show=False)
    assert [outcome.case for outcome in report.outcomes] == ["mine"]
    assert report.passed


REFUSED = {
    "an op": (lambda: lab.check(count, like="count"), "`like` must be one of"),
    "a case": (lambda: lab.check(count, like="expert_offsets", cases="nope"), "`cases` must be in the names of cases"),
    "no function": (lambda: lab.check(3, like="route"), "`function` must be callable, got int"),
    "no grid": (lambda: lab.check(broken_grid, like="count_tokens_per_expert"), "`grid` must be"),
    "parameters": (lambda: lab.check(count_slots_by_hand, like="topk_softmax", grid=(1, 1)), "the parameters of"),
    "a library": (lambda: lab.check(count, like="route", library="jax"), "`library` must be one of"),
    "no cases": (lambda: lab.check(count, like="route", cases=[]), "`cases` must be at least one, got none"),
    "a number of cases": (lambda: lab.check(count, like="route", cases=3), "`cases` must be parts of names, or cases"),
    "a grid of a function": (lambda: lab.check(count, like="route", grid=(1, 1)), "`grid` must be None for a function"),
    "a short grid": (lambda: launched(grid=(8,)), r"`grid` must be \(blocks, threads\), got"),
    "no blocks": (lambda: launched(grid=(0, 64)), "`grid: blocks` must be at least 1, got 0"),
    "half a thread": (lambda: launched(grid=(1, 1.5)), "`grid: threads` must be an integer, got float"),
    "a large block": (
        lambda: launched(grid=(1, (64, 32))),
        "`grid` must be of at most 1024 threads to a block, got 2048",
    ),
    "a fill": (lambda: launched(grid=(1, 1), fill="0"), "`fill` must be a number, got str"),
    "a kernel's library": (lambda: launched(grid=(1, 1), library="torch"), "`library` must be 'numba' for a kernel"),
    "faults": (lambda: lab.planted(count, "count_tokens_per_expert", ["a"], "one slot"), "`faults` must be a mapping"),
    "no program": (
        lambda: lab.planted(count, "count_tokens_per_expert", {"a": ("topk_ids", "topk_ids[")}, "one slot"),
        "`faults` must leave a program",
    ),
    "no def": (
        lambda: lab.planted(functools.partial(count, expert_map=None), "count_tokens_per_expert", None, "one slot"),
        "`function` must be written with def, got count",
    ),
    "a device": (lambda: lab.check(count, like="route", device="tpu"), "`device` must be one of"),
}


def launched(**options):
    return lab.check(broken_grid, "count_tokens_per_expert", "one slot", **options)


@cuda.jit
def broken_grid(topk_ids, num_experts, out):
    out[0] = 1


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_checked_is_refused(name):
    call, message = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@IN_SIMULATOR
def test_planted_faults_in_ones_own_kernel_are_caught(capsys):
    given = {"like": "count_tokens_per_expert", "cases": ["Mixtral", "-1 rows"], "grid": slots_grid, "fill": 0}
    planted = lab.planted(count_slots_by_hand, **given)
    assert planted.passed, planted.missed
    assert len(planted.caught) > 6
    assert any("is no atomic" in fault for fault in planted.caught)
    assert "0 missed" in capsys.readouterr().out
    named = {"the bound": ("0 <= expert < num_experts", "expert < num_experts"), "nothing": ("slot", "slot")}
    planted = lab.planted(count_slots_by_hand, faults=named, **given, show=False)
    assert planted.caught == {"the bound": "-1 rows", "nothing": None}
    assert planted.missed == ["nothing"]
    with pytest.raises(ValueError, match="`faults` must be pieces of count_slots_by_hand"):
        lab.planted(count_slots_by_hand, faults={"gone": ("not there", "x")}, **given)


@IN_SIMULATOR
def test_a_fault_of_one_text_is_planted_in_each_place():
    planted = lab.planted(
        count_slots_by_hand, "count_tokens_per_expert", cases="-1", grid=slots_grid, fill=0, show=False
    )
    twice = [fault for fault in planted.caught if fault.endswith(": 1 becomes 2 (2)")]
    assert len(twice) == 1  # both of topk_ids.shape[1]


@IN_SIMULATOR
def test_planted_faults_need_a_function_that_passes():
    with pytest.raises(ValueError, match="must pass a case before faults are planted"):
        lab.planted(broken_grid, like="count_tokens_per_expert", grid=(1, 1), fill=0, cases="one slot")


@pytest.mark.slow
@IN_SIMULATOR
def test_the_librarys_own_faults_are_shown(capsys):
    planted = lab.planted(like="count_tokens_per_expert")
    assert set(planted.caught) <= set(faults.FAULTS)
    planted = lab.planted(like="batched_moe_align_block_size", show=False)
    assert planted.caught == {"one row too many": planted.caught["one row too many"]}
    assert planted.passed


def test_the_bridge_copies_nothing():
    counts = np.zeros(3, np.int32)
    lab.as_tensor(counts)[1] = 5
    assert counts.tolist() == [0, 5, 0]
    tensor = torch.zeros(2, 3, device="cuda" if ON_GPU else "cpu")
    array = lab.as_device_array(tensor[:, :2])
    assert array.shape == (2, 2)
    back = lab.as_tensor(array)
    back[1, 1] = 7
    assert float(tensor[1, 1]) == 7
    assert lab.as_device_array(tensor.bfloat16()).dtype == np.uint16
    assert lab.as_tensor(tensor) is tensor
    with pytest.raises(TypeError, match="`array` must be an array"):
        lab.as_tensor([1, 2])


@IN_SIMULATOR
def test_accesses_are_counted():
    ids, counts = np.array([[1, 0, 1]], np.int32), np.zeros(2, np.int32)
    with lab.counting() as outer, lab.counting() as inner:
        count_slots_by_hand[1, 4](ids, 2, counts)
    assert counts.tolist() == [1, 2]
    assert (inner.launches, inner.threads, inner.loads, inner.stores, inner.atomics) == (1, 4, 3, 0, 3)
    assert inner.bytes_moved == 24
    assert vars(inner) == vars(outer)
    with simulator.running(), lab.counting() as counted:
        numba_moe.count_tokens_per_expert(torch.from_numpy(ids), 2)
    assert counted.atomics == 3
    assert counted.barriers > 0


@IN_SIMULATOR
def test_shared_memory_and_local_memory_hold_no_zeros_and_threads_are_named():
    @cuda.jit
    def read(out):
        shared, local = cuda.shared.array(4, np.int32), cuda.local.array(1, np.int32)
        out[cuda.threadIdx.x] = min(shared[cuda.threadIdx.x], local[0])

    out = np.zeros(4, np.int32)
    read[1, 4](out)
    assert (out > 1 << 20).all()
    with pytest.raises(IndexError, match="thread 4 of block 0: index 4 is out of bounds"):
        read[1, 5](np.zeros(5, np.int32))


@IN_SIMULATOR
def test_what_a_gpu_would_not_compile_is_an_error():
    @cuda.jit
    def returns(out):
        return out[0]

    @cuda.jit
    def shares_much(out):
        shared = cuda.shared.array((100, 128), np.float32)
        out[0] = shared[0, 0]

    with pytest.raises(TypeError, match="thread 0 of block 0: a kernel must return nothing, got 0"):
        returns[1, 1](np.zeros(1, np.int32))
    with pytest.raises(ValueError, match="shared memory of a fixed size must be at most 49152 bytes, got 51200"):
        shares_much[1, 1](np.zeros(1, np.float32))


@IN_SIMULATOR
def test_a_missing_barrier_shows():
    @cuda.jit
    def reverse(values, out):
        place = cuda.threadIdx.x
        shared = cuda.shared.array(64, np.int32)
        shared[place] = values[place]
        out[place] = shared[63 - place]

    out = np.zeros(64, np.int32)
    reverse[1, 64](np.arange(64, dtype=np.int32), out)
    assert out.tolist() != list(range(63, -1, -1))


@IN_SIMULATOR
def test_the_roofline_counts_bytes():
    found = lab.roofline(like="count_tokens_per_expert", case="hot", show=False)
    assert found.bytes_moved >= found.bytes_needed > 0
    assert 0 < found.share <= 1
    assert "barriers: " in found.accesses
    nothing = lab.roofline(functools.partial(count, expert_map=None), like="count_tokens_per_expert", show=False)
    assert np.isnan(nothing.share)
    assert nothing.accesses == "no kernel ran"
    assert nothing.name == "count"


@pytest.mark.gpu
def test_ones_own_kernel_is_timed():
    rows = lab.bench(in_torch, like="topk_softmax", shapes="4096x64", peers=[], library="torch", show=False)
    assert {row.implementation for row in rows} == {"numba_moe", "in_torch"}
    assert all(row.device_us > 0 for row in rows)
    rows = lab.bench(
        *(count_slots_by_hand, "count_tokens_per_expert", "512x256", []),
        grid=slots_grid,
        fill=0,
        show=False,
    )
    assert all(row.device_us > 0 for row in rows)
    found = lab.roofline(count_slots_by_hand, "count_tokens_per_expert", "512x256", grid=slots_grid, fill=0, show=False)
    assert 0 < found.share < 1


@pytest.mark.skipif(ON_GPU, reason="there is something to time")
def test_without_a_gpu_nothing_is_timed():
    with pytest.raises(ValueError, match="no CUDA device here"):
        lab.bench(count, like="count_tokens_per_expert")


MINE = """
from numba import cuda

@cuda.jit
def count(topk_ids, num_experts, out):
    slot = cuda.grid(1)
    while slot < topk_ids.size:
        expert = topk_ids[slot // topk_ids.shape[1], slot % topk_ids.shape[1]]
        if 0 <= expert < num_experts:
            cuda.atomic.add(out, expert, {added})
        slot += cuda.gridsize(1)
"""


def test_the_command_verifies_ones_own_kernel(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(MINE.format(added=1))
    asked = f"verify --module {path}:count --like count_tokens_per_expert --grid 2,64 --fill 0".split()
    assert cli.main([*asked, "--case", "one slot", "--json", str(tmp_path / "report.json")]) == 0
    assert capsys.readouterr().out.endswith("1 passed, 0 failed\n")
    assert json.loads((tmp_path / "report.json").read_text())["outcomes"][0]["passed"] is True
    path.write_text(MINE.format(added=2))
    assert cli.main([*asked, "--case", "one slot"]) == 1
    assert "FAILED" in capsys.readouterr().out


WRONG_COMMANDS = {
    "no op": ("--module {mine}:count", "`--module` must be given with --like"),
    "no module": ("--like route", "`--like` must be given with --module"),
    "no file": ("--module nope.py:count --like route", "'nope.py', which is no file"),
    "no name": ("--module {mine}:sum --like route", "'sum', which"),
    "no grid": ("--module {mine}:count --like count_tokens_per_expert", "`grid` must be"),
    "an error": ("--module {broken}:count --like route", "fails when it is imported: NameError"),
    "a case": ("--module {mine}:count --like count_tokens_per_expert --grid 1,1 --case nope", "`cases` must be"),
}


@pytest.mark.parametrize("name", WRONG_COMMANDS)
def test_a_command_that_cannot_be_is_refused_in_a_line(name, tmp_path, capsys):
    mine, broken = tmp_path / "mine.py", tmp_path / "broken.py"
    mine.write_text(MINE.format(added=1))
    broken.write_text("count = nothing")
    options, message = WRONG_COMMANDS[name]
    assert cli.main(["verify", *options.format(mine=mine, broken=broken).split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


SWITCH = {
    "in time": ("from numba_moe import lab; lab.use_simulator(); from numba import cuda; cuda.to_device([1])", ""),
    "after numba": ("import numba; from numba_moe import lab; lab.use_simulator()", "first in the program"),
    "after the library": (
        "import numba_moe; numba_moe.topk_softmax; from numba_moe import lab; lab.use_simulator()",
        "first in the program",
    ),
    "set by hand, late": (
        "import numba, os; os.environ['NUMBA_ENABLE_CUDASIM'] = '1'; import numba_moe; numba_moe.topk_softmax",
        "too late to turn on Numba's simulator",
    ),
    "told once": (
        "from numba_moe import lab; lab.use_simulator(); import numba_moe, numpy as np; ids = np.zeros((1, 2), int);"
        "numba_moe.count_tokens_per_expert(ids, 3); numba_moe.count_tokens_per_expert(ids, 3)",
        "The reference answers NumPy arrays",
    ),
}


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    "name", [n if n in ("in time", "told once") else pytest.param(n, marks=pytest.mark.slow) for n in SWITCH]
)
def test_the_simulators_switch(name):
    program, message = SWITCH[name]
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(Path.home())}
    done = subprocess.run([sys.executable, "-c", program], env=clean, capture_output=True, text=True)
    assert done.stderr.count(message) == 1 if message else done.stderr == ""
    assert (done.returncode == 0) == (name in ("in time", "told once"))


def test_the_script_times_alignment(capsys, monkeypatch):
    monkeypatch.syspath_prepend(HERE.parents[1] / "scripts")
    import time_align

    assert time_align.main(["--tokens", "60", "--experts", "8", "--top-k", "2", "--block-size", "16"]) == 0
    assert capsys.readouterr().out.startswith("Duration: 0.")


@pytest.mark.parametrize("top_k", [2, np.int64(2)])
@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor])
def test_the_other_order_of_arguments_is_named(convert, top_k):
    ids = convert(np.zeros((4, 2), np.int32))
    with pytest.raises(
        TypeError, match=r"the order is \(topk_ids, block_size, num_experts, expert_map\), not \(topk_ids"
    ):
        numba_moe.moe_align_block_size(ids, 64, 128, top_k)


def test_what_libraries_allocate_is_poisoned():
    with testing.poisoned_libraries():
        assert np.isnan(np.empty(3)).all()
        assert torch.empty(2).isnan().all()
        assert (np.empty_like(np.zeros(2, np.int16)) > 100).all()
        assert np.empty(2, bool).all()
        assert cuda.device_array(3, np.int32).copy_to_host()[0] > 1 << 20
