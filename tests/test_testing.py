"""The comparator rejects wrong answers, and the input makers make what they say."""

import numpy as np
import pytest
import torch

from numba_moe import reference
from numba_moe.runtime import arrays
from numba_moe.verify import testing


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (torch.tensor([1, 2], dtype=torch.int32), np.array([1, 3], np.int32)),
        (torch.tensor([1, 2], dtype=torch.int32), np.array([1, 2], np.int64)),
        (torch.tensor([1, 2], dtype=torch.int32), np.array([1], np.int32)),
        (torch.tensor([1.0, 2.0]), np.array([1.0, 2.001], np.float32)),
        (torch.tensor([1.0, torch.nan]), np.array([1.0, 2.0], np.float32)),
        (torch.tensor([1.0, 2.0]), np.array([1.0, np.nan], np.float32)),
        (torch.tensor([torch.inf]), np.array([1.0], np.float32)),
        (torch.tensor([1.0], dtype=torch.bfloat16), np.array([1.02], np.float32)),
        (torch.zeros(0, 3), np.zeros((0, 4), np.float32)),
    ],
)
def test_wrong_results_are_rejected(got, expected):
    comparison = testing.compare(got, expected)
    assert comparison.mismatches > 0
    assert comparison.error > 1
    assert comparison.message


def test_right_results_are_accepted():
    for values in ([1.0, -2.5, 0.0], [np.nan, np.inf, -np.inf]):
        array = np.array(values, np.float32)
        assert testing.compare(torch.from_numpy(array), array) == (0, 0.0, "")
    near = torch.tensor([1.0 + 2**-8], dtype=torch.float32).bfloat16()
    assert testing.compare(near, np.array([1.0], np.float32)).mismatches == 0


def test_exact_results_allow_no_rounding():
    almost = torch.tensor([1.0 + 2**-23])
    assert testing.compare(almost, np.array([1.0], np.float32)).mismatches == 0
    assert testing.compare(almost, np.array([1.0], np.float32), exact=True).mismatches == 1


GATING = {"gating_output": np.array([[0.0, 1.0, 2.0, 3.0]], np.float32), "top_k": 2}


def wrong_order(arguments, ids):
    expected = reference.topk_sigmoid(**arguments)
    weights = reference.gating.sigmoid(arguments["gating_output"].astype(np.float64))[0, ids].astype(np.float32)
    got = reference.TopK(torch.from_numpy(weights[None]), torch.tensor([ids], dtype=torch.int32))
    return sum(c.mismatches for c in testing.compare_topk(got, expected, arguments, "sigmoid"))


@pytest.mark.parametrize("ids", [[2, 3], [3, 1], [3, 3], [3, 4], [-1, 3]])
@pytest.mark.parametrize("bias", [None, np.zeros(4, np.float32)])
def test_wrong_experts_are_rejected(ids, bias):
    arguments = GATING if bias is None else {**GATING, "correction_bias": bias}
    if max(ids) < 4:
        assert wrong_order(arguments, ids) > 0
    else:
        got = reference.TopK(torch.ones(1, 2), torch.tensor([ids], dtype=torch.int32))
        comparisons = testing.compare_topk(got, reference.topk_sigmoid(**arguments), arguments, "sigmoid")
        assert sum(c.mismatches for c in comparisons) > 0


def test_only_rounding_of_a_bias_excuses_other_experts():
    logits = np.array([[0.0, 1e-8, -9.0, -9.0]], np.float32)
    bias = np.array([0.0, 0.0, 0.0, 0.0], np.float32)
    assert wrong_order({"gating_output": logits, "top_k": 2}, [0, 1]) > 0, "logits alone decide without a bias"
    assert wrong_order({"gating_output": logits, "top_k": 2, "correction_bias": bias}, [1, 0]) == 0
    tied = np.array([[1.0, 1.0, -9.0, -9.0]], np.float32)
    assert wrong_order({"gating_output": tied, "top_k": 2, "correction_bias": bias}, [1, 0]) > 0, "a tie is no rounding"


@pytest.mark.parametrize("routing", [*testing.ROUTINGS, "half_empty"])
def test_random_ids_are_distinct_and_skewed_as_asked(routing):
    ids = testing.random_ids(np.random.default_rng(0), 500, 32, 4, routing)
    assert ids.shape == (500, 4)
    assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all()
    counts = np.sort(np.bincount(ids.ravel(), minlength=32))
    assert (counts[-1] == 500) == (routing == "one_hot")
    assert (counts[:16].sum() == 0) == (routing == "half_empty")
    assert (counts[-1] > 3 * counts[16]) == (routing in ("zipf", "one_hot"))


def test_poisoned_memory_fills_what_is_allocated():
    with testing.poisoned_memory():
        assert arrays.empty(*arrays.contiguous(torch.float32, 3)).isnan().all()
        assert (arrays.empty(*arrays.contiguous(torch.int32, 3, 2)) > 1 << 20).all()
        assert (arrays.empty(*arrays.contiguous(torch.uint8, 3)) > 0).all()
    empty = arrays.empty(*arrays.contiguous(torch.int32, 2, 0, 3))
    assert empty.shape == (2, 0, 3)
    assert empty.is_contiguous()


def test_strided_rows_lie_between_poison():
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = testing.to_device(matrix, "cpu", "bfloat16", strided=True)
    assert tensor.stride() == (11, 1)
    assert tensor.dtype == torch.bfloat16
    assert tensor.float().numpy().tolist() == matrix.tolist()
    assert tensor._base.isnan().sum() == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("off", "mismatches"), [(1e-6, 0), (1e-3, 1)])
def test_sums_are_judged_by_the_size_of_their_terms(off, mismatches, dtype):
    rows = np.array([[[3.0], [-3.0 + 2.0**-12]]], np.float32)  # which cancel
    calls = {
        "moe_sum": {"hidden_states": rows},
        "moe_unpermute": {
            "permuted": rows[0],
            "topk_weights": np.ones((1, 2), np.float32),
            "inv_permuted_idx": np.array([[0, 1]], np.int32),
        },
    }
    for name, arguments in calls.items():
        expected = getattr(reference, name)(**arguments)
        result = torch.from_numpy(expected + np.float32(off)).to(dtype)
        (comparison,) = testing.compare_results(name, result, expected, arguments)
        assert comparison.mismatches == mismatches


@pytest.mark.parametrize(("factor", "mismatches"), [(1.0, 0), (0.99, 1)])
def test_experts_round_between_their_steps(factor, mismatches):
    # A gate of -16 - 2^-7 is -16 in float16, of which silu is larger by 0.8 %.
    arguments = {
        "hidden_states": np.array([[-16, -0.99 * 2.0**-7]], np.float16),
        "gate_up_proj": np.array([[[1, 1], [-2000, 0]]], np.float16),
        "down_proj": np.ones((1, 2, 1), np.float16),
        "topk_weights": np.ones((1, 1), np.float32),
        "topk_ids": np.zeros((1, 1), np.int32),
    }
    silu = torch.nn.functional.silu(torch.tensor(-16.0)) * 32000
    result = (silu * factor).half().expand(1, 2)
    expected = reference.fused_experts(**arguments)
    (comparison,) = testing.compare_results("fused_experts", result, expected, arguments)
    assert comparison.mismatches == 2 * mismatches


@pytest.mark.parametrize(("second", "mismatches"), [(0.0, 0), (0.5, 1)])
def test_scores_below_the_normal_numbers_may_count_as_none(second, mismatches):
    logits = np.array([[-79.0, -88.0]], np.float32)  # sigmoids of 5e-35 and 6e-39
    arguments = {"gating_output": logits, "top_k": 2, "renormalize": True}
    expected = reference.topk_sigmoid(**arguments)
    assert expected.topk_weights[0, 1] > 1e-4
    result = type(expected)(torch.tensor([[1.0, second]]), torch.from_numpy(expected.topk_ids))
    weights, ids = testing.compare_results("topk_sigmoid", result, expected, arguments)
    assert (weights.mismatches, ids.mismatches) == (mismatches, 0)
