"""Functions of ours under the peers' names do what theirs do, and take their places in an installed peer."""

import re
import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch

import numba_moe as moe
from numba_moe import reference
from numba_moe.interop import sglang, sglang_kernels, vllm, vllm_ops

IDS = torch.tensor([[3, 1], [0, 3], [-1, 2], [3, 0]], dtype=torch.int32)
LOGITS = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
BIAS = torch.linspace(-0.3, 0.3, 8)
ROWS = torch.arange(64, dtype=torch.float32).view(4, 16)
LOCAL = torch.tensor([-1, 0, -1, 1], dtype=torch.int32)


def ints(*shape):
    return torch.full(shape, -77, dtype=torch.int32)


def choice_memory():
    return torch.full((5, 2), torch.nan), ints(5, 2)


def test_vllm_aligns_with_its_arguments_and_tails():
    found = vllm.moe_align_block_size(IDS, 4, 4, LOCAL, True)
    expected = reference.moe_align_block_size(IDS.numpy(), 4, 4, LOCAL.numpy(), True)
    assert type(found) is tuple
    assert [part.tolist() for part in found] == [part.tolist() for part in expected]
    found = vllm.moe_align_block_size(IDS.to(torch.uint32), 4, 4, ignore_invalid_experts=True, expert_map=LOCAL)
    assert found[1].tolist() == [0, 1, -1, -1, -1]
    batched = vllm.batched_moe_align_block_size(3, 2, torch.tensor([2, 0, 3]))
    assert batched[1].tolist() == [0, 2, 2, -1, -1, -1]


def test_vllm_op_of_alignment_groups_by_local_ids_in_given_memory():
    given = ints(20), ints(5), ints(1)
    scatter = ints(8)
    vllm_ops.moe_align_block_size(IDS, 4, 4, *given, LOCAL, scatter)
    expected = reference.moe_align_block_size(IDS.numpy(), 4, 4, LOCAL.numpy(), True, True)
    assert [part.tolist() for part in given] == [part.tolist() for part in expected]
    assert scatter.tolist() == [0, 1, -1, 3, -1, -1, 6, -1]
    vllm_ops.aligning(0)(IDS, 4, 4, *given, LOCAL)
    assert given[1].tolist() == [0, 1, 0, 0, 0]


def test_vllm_op_of_batched_alignment():
    given = ints(12), ints(6), ints(1)
    vllm_ops.batched_moe_align_block_size(3, 2, torch.tensor([2, 0, 3]), *given)
    expected = reference.batched_moe_align_block_size(3, 2, np.array([2, 0, 3]))
    assert [part.tolist() for part in given] == [part.tolist() for part in expected]


@pytest.mark.parametrize("spare", [0, 8])
def test_vllm_op_of_adapters_writes_flat_arrays(spare):
    mapping = torch.tensor([1, -1, 0, 1], dtype=torch.int32)
    length = 8 + 4 * 3 + spare
    given = ints(2 * length), ints(2 * (length // 4)), ints(2)
    enabled, lora_ids = torch.ones(3, dtype=torch.int32), torch.tensor([-1, 0, 1], dtype=torch.int32)
    vllm_ops.moe_lora_align_block_size(IDS, mapping, 4, 4, 2, length, length // 4, *given, enabled, lora_ids)
    expected = reference.moe_lora_align_block_size(IDS.numpy(), mapping.numpy(), 4, 4, 2)
    for part, wanted, padding in zip(given[:2], expected, (8, -1), strict=False):
        wide = np.pad(wanted, ((0, 0), (0, part.numel() // 2 - wanted.shape[1])), constant_values=padding)
        assert part.view(2, -1).tolist() == wide.tolist()
    assert given[2].tolist() == expected.num_tokens_post_padded.tolist()


def test_vllm_chooses_and_numbers_slots_by_column():
    weights, ids, numbers = vllm.fused_topk(torch.zeros(5, 3), LOGITS, 2, True, indices_type=torch.int64)
    expected = moe.topk_softmax(LOGITS, 2, True)
    assert torch.equal(weights, expected.topk_weights)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, expected.topk_ids.long())
    assert numbers.tolist() == [[0, 5], [1, 6], [2, 7], [3, 8], [4, 9]]
    sigmoid = vllm.fused_topk(torch.zeros(5, 3), LOGITS, 2, False, scoring_func="sigmoid")
    assert torch.equal(sigmoid[0], moe.topk_sigmoid(LOGITS, 2).topk_weights)
    with pytest.raises(ValueError, match="Unsupported scoring function: relu"):
        vllm.fused_topk(LOGITS, LOGITS, 2, True, scoring_func="relu")
    with pytest.raises(ValueError, match="`gating_output` must be of 4 tokens, like `hidden_states`, got 5"):
        vllm.fused_topk(LOGITS[:4], LOGITS, 2, True)


@pytest.mark.parametrize("op", ["topk_softmax", "topk_sigmoid"])
def test_vllm_ops_of_gating_write_what_they_are_given(op):
    weights, ids = choice_memory()
    numbers = ints(5, 2)
    padding = torch.tensor([False, True, False, False, False])
    getattr(vllm_ops, op)(weights, ids, numbers, LOGITS, True, BIAS, is_padding=padding)
    expected = getattr(moe, op)(LOGITS, 2, True, BIAS)
    kept = ~padding
    assert torch.equal(weights[kept], expected.topk_weights[kept])
    assert torch.equal(ids[kept], expected.topk_ids[kept])
    assert (ids[1].tolist(), weights[1].tolist()) == ([-1, -1], [0.0, 0.0])
    assert numbers[:, 1].tolist() == [5, 6, 7, 8, 9]


def test_vllm_chooses_in_groups():
    found = vllm.grouped_topk(LOGITS, LOGITS, 2, True, 4, 2, "sigmoid", 2.5, BIAS.double())
    options = {"scoring_func": "sigmoid", "routed_scaling_factor": 2.5, "correction_bias": BIAS}
    expected = moe.grouped_topk(LOGITS, 2, 4, 2, True, **options)
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, vllm_ops.grouped_topk(LOGITS, 4, 2, 2, True, 2.5, BIAS, 1), expected))
    raw = vllm_ops.grouped_topk(LOGITS.sigmoid(), 4, 2, 2, True, 2.5, BIAS)
    assert torch.equal(raw[1], expected.topk_ids)
    torch.testing.assert_close(raw[0], expected.topk_weights)
    best = vllm.grouped_topk(LOGITS, LOGITS, 2, False, 4, 2)
    assert all(map(torch.equal, best, moe.grouped_topk(LOGITS, 2, 4, 2, group_score="max")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_vllm_permutes_rows_and_their_scales_and_back(dtype):
    rows = ROWS.to(dtype)
    scale = torch.arange(4.0).view(4, 1)
    permuted, scales, offset, inverse, index = vllm.moe_permute(rows, scale, IDS, 4, 2, LOCAL)
    assert offset.tolist() == [0, 1, 4]
    assert index.tolist() == [1, 0, 3, 6, 8, 8, 8, 8]
    assert permuted.dtype == dtype
    assert torch.equal(permuted[:4].float(), rows[[0, 0, 1, 3]].float())
    assert scales[:4, 0].tolist() == [0.0, 0.0, 1.0, 3.0]
    assert inverse.shape == (8,)
    memory = torch.empty_like(permuted)
    again = vllm.moe_permute(rows, torch.ones(1), IDS, 4, 2, LOCAL, memory)
    assert again[0] is memory
    assert again[1].shape == (1,)
    if dtype != torch.float8_e4m3fn:
        out = torch.full_like(rows, torch.nan)
        vllm.moe_unpermute(out, permuted, torch.full((4, 2), 0.5), inverse)
        weight = torch.tensor([1.0, 0.5, 0.0, 0.5])[:, None]  # slots of this rank's experts, halved
        assert torch.equal(out, (ROWS * weight).to(dtype))
        again = torch.full_like(rows, torch.nan)
        vllm.moe_unpermute(again, permuted.view(4, 2, 16), torch.full((4, 2), 0.5), inverse)  # as some callers view it
        assert torch.equal(again, out)


def test_vllm_index_of_other_ranks_rows_is_left_out():
    out = torch.empty(1, 16)
    offset = torch.tensor([0, 1])
    vllm.moe_unpermute(out, ROWS[:2], torch.ones(1, 2), torch.tensor([0, 1], dtype=torch.int32), offset)
    assert torch.equal(out, ROWS[:1])


def test_vllm_op_of_permuting_writes_what_it_is_given():
    given = torch.full((8, 16), torch.nan), torch.full((3,), -7), ints(4, 2), ints(8)
    vllm_ops.moe_permute(ROWS, IDS, None, LOCAL, 4, 2, 2, *given)
    permuted, _, offset, inverse, index = vllm.moe_permute(ROWS, None, IDS, 4, 2, LOCAL)
    for part, wanted in zip(given, (permuted, offset, inverse.view(4, 2), index), strict=True):
        assert torch.equal(part, wanted)


def test_vllm_counts_of_local_experts():
    assert vllm.count_expert_num_tokens(IDS, 4, None).tolist() == [2, 1, 1, 3]
    assert vllm.count_expert_num_tokens(IDS, 2, LOCAL).tolist() == [1, 3]
    assert vllm.count_expert_num_tokens(IDS, 6, LOCAL).tolist() == [1, 3, 0, 0, 0, 0]


def test_vllm_sigmoid_weights_are_scaled_and_padding_named():
    weights, ids = choice_memory()
    padding = torch.tensor([False, True, False, False, False])
    vllm_ops.topk_sigmoid(weights, ids, ints(5, 2), LOGITS, True, BIAS, 2.5, is_padding=padding)
    expected = moe.topk_sigmoid(LOGITS, 2, True, BIAS)
    torch.testing.assert_close(weights[~padding], 2.5 * expected.topk_weights[~padding])
    assert ids[1].tolist() == [-1, -1]


TOKENS = torch.tensor([2, 7, 11, 12, 1], dtype=torch.int32)  # 7 to 11 are those of an image below
OTHER_BIAS = BIAS.flip(0) * 4


def test_vllm_tokens_of_an_image_go_by_the_second_bias():
    weights, ids = choice_memory()
    options = {"input_tokens": TOKENS, "bias_vl": OTHER_BIAS.half(), "image_sentinel_lo": 7}
    vllm_ops.topk_hash_softplus_sqrt(weights, ids, ints(5, 2), LOGITS, True, 2.0, BIAS.half(), **options)
    of_image = torch.tensor([False, True, True, False, False])
    for mask, bias in ((of_image, OTHER_BIAS), (~of_image, BIAS)):
        expected = moe.topk_softplus_sqrt(LOGITS, 2, True, bias.half().float())
        assert torch.equal(ids[mask], expected.topk_ids[mask])
        torch.testing.assert_close(weights[mask], 2 * expected.topk_weights[mask])
    options["image_sentinel_lo"] = 0  # no image
    vllm_ops.topk_hash_softplus_sqrt(weights, ids, ints(5, 2), LOGITS, True, 2.0, BIAS, **options)
    assert torch.equal(ids, moe.topk_softplus_sqrt(LOGITS, 2, True, BIAS).topk_ids)
    with pytest.raises(ValueError, match="`input_tokens` must be given with `bias_vl`, got None"):
        vllm_ops.topk_hash_softplus_sqrt(weights, ids, ints(5, 2), LOGITS, bias_vl=BIAS)


def test_vllm_tokens_of_an_image_pass_the_table_and_padding_passes_both():
    weights, ids = choice_memory()
    table = torch.arange(26).view(13, 2) % 8
    padding = torch.tensor([True, False, False, False, False])
    options = {"hash_indices_table": table, "is_padding": padding, "bias_vl": OTHER_BIAS, "image_sentinel_lo": 7}
    vllm_ops.topk_softplus_sqrt(weights, ids, ints(5, 2), LOGITS, input_tokens=TOKENS, **options)
    assert ids[[3, 4]].tolist() == [[0, 1], [2, 3]]
    assert torch.equal(ids[1:3], moe.topk_softplus_sqrt(LOGITS, 2, False, OTHER_BIAS).topk_ids[1:3])
    assert (ids[0].tolist(), weights[0].tolist()) == ([-1, -1], [0.0, 0.0])


@pytest.mark.parametrize("indices", [torch.int32, torch.int64])
def test_vllm_gate_of_deepseek_chooses_six(indices):
    logits = torch.randn(5, 256, generator=torch.Generator().manual_seed(5))
    bias = torch.linspace(-1, 1, 256)
    padding = torch.tensor([True, False, False, False, False])
    options = {"is_padding": padding, "input_ids": TOKENS, "bias_vl": bias.flip(0), "image_sentinel_lo": 7}
    weights, ids = vllm.dsv4_topk(logits, bias, indices, 1.5, **options)
    assert (ids.dtype, weights.shape, ids[0].tolist()) == (indices, (5, 6), [-1] * 6)
    expected = moe.topk_softplus_sqrt(logits, 6, True, bias)
    assert torch.equal(ids[3:].int(), expected.topk_ids[3:])
    torch.testing.assert_close(weights[3:], 1.5 * expected.topk_weights[3:])
    assert torch.equal(ids[1:3].int(), moe.topk_softplus_sqrt(logits, 6, True, bias.flip(0)).topk_ids[1:3])


def test_vllm_scatter_index_names_the_slots_that_are_kept():
    *blocks, scatter = vllm.moe_align_block_size(IDS, 4, 4, LOCAL, False, True, True)
    assert [part.tolist() for part in blocks] == [
        part.tolist() for part in vllm.moe_align_block_size(IDS, 4, 4, LOCAL, ignore_invalid_experts=True)
    ]
    assert scatter.tolist() == [[0], [1], [-1], [3], [-1], [-1], [6], [-1]]
    assert scatter.dtype == torch.int32
    with pytest.raises(ValueError, match=r"`ignore_invalid_experts` must be True .*, got False"):
        vllm.moe_align_block_size(IDS, 4, 4, LOCAL, return_scatter_idx=True)
    with pytest.raises(TypeError, match="`return_scatter_idx` must be True or False, got 1"):
        vllm.moe_align_block_size(IDS, 4, 4, return_scatter_idx=1)


def test_vllm_makes_received_ids_global_and_aligns_them():
    received = torch.tensor([[0, 1], [1, -1], [0, 3], [1, 1]])  # the last row is past the tokens that came
    ends = torch.tensor([2, 3], dtype=torch.int32)
    found = vllm.fused_globalize_align_block_size(received, ends, 4, 6, 2, 2, True)
    assert found[0] is received
    assert received.tolist() == [[4, 5], [5, -1], [4, -1], [-1, -1]]
    assert found[4].tolist() == [[0], [1], [2], [-1], [4], [-1], [-1], [-1]]
    expected = moe.moe_align_block_size(torch.tensor([[0, 1], [1, -1], [0, -1], [-1, -1]]), 2, 2)
    assert [part.tolist() for part in found[1:4]] == [part.tolist() for part in expected]
    again = torch.tensor([[0, 1]])
    assert len(vllm.fused_globalize_align_block_size(again, ends, 0, 1, 2, 2)) == 4
    assert again.tolist() == [[0, -1]]  # of global expert 1 there is none


class Scratch:
    """Stand for vLLM's MoEPermuteScratch."""

    num_experts, num_local_experts, reserved = 4, 2, 0
    expert_first_token_offset = torch.full((3,), -7)

    def reserve(self, rows):
        self.reserved, self.permuted_idx, self.inv_permuted_idx = rows, ints(rows + 3), ints(rows + 3)


def test_vllm_writes_into_scratch():
    scratch = Scratch()
    found = vllm.moe_permute(ROWS, None, IDS, 4, 2, LOCAL, None, scratch)
    expected = vllm.moe_permute(ROWS, None, IDS, 4, 2, LOCAL)
    assert all(map(torch.equal, (found[0], *found[2:]), (expected[0], *expected[2:])))
    assert scratch.reserved == 8
    assert torch.equal(scratch.permuted_idx[:8], expected[4])
    assert scratch.permuted_idx[8:].tolist() == [-77] * 3
    assert found[2] is scratch.expert_first_token_offset
    other = Scratch()
    offset, rows = vllm.moe_prepare_scatter(IDS, LOCAL, other)
    assert offset is other.expert_first_token_offset
    assert offset.tolist() == expected[2].tolist()
    assert rows.tolist() == expected[3].view(4, 2).tolist()
    assert rows.data_ptr() == other.inv_permuted_idx.data_ptr()
    with pytest.raises(ValueError, match=r"`scratch.num_experts` must be that of the call, 5, got 4"):
        vllm.moe_permute(ROWS, None, IDS, 5, 2, scratch=scratch)
    with pytest.raises(ValueError, match=r"`scratch.num_local_experts` must be that of the call, 4, got 2"):
        vllm.moe_permute(ROWS, None, IDS, 4, scratch=scratch)


class ScratchOfEarlierReleases:
    """Stand for a MoEPermuteScratch of release 0.27, which has its length, and memory for rows, from the start."""

    num_experts, num_local_experts = 4, 2

    def __init__(self, rows, hidden_states=None):
        self.expert_first_token_offset = torch.full((3,), -7)
        self.max_expanded_rows, self.permuted_hidden_states = rows, hidden_states
        self.permuted_idx, self.inv_permuted_idx = ints(rows), ints(rows)


def test_vllm_writes_into_scratch_of_earlier_releases():
    expected = vllm.moe_permute(ROWS, None, IDS, 4, 2, LOCAL)
    scratch = ScratchOfEarlierReleases(11, torch.full((11 * 16,), torch.nan))
    for given, memory in ((None, scratch.permuted_hidden_states), (rows := torch.full((8, 16), torch.nan), rows)):
        found = vllm.moe_permute(ROWS, None, IDS, 4, 2, LOCAL, given, scratch)
        assert found[0].data_ptr() == memory.data_ptr()
        assert all(map(torch.equal, (found[0], *found[2:]), (expected[0], *expected[2:])))
    assert torch.equal(
        vllm.moe_permute(ROWS, None, IDS, 4, 2, LOCAL, None, ScratchOfEarlierReleases(8))[0], expected[0]
    )
    with pytest.raises(
        ValueError, match=r"`scratch.max_expanded_rows` must be at least the slots of the call = 8, got 7"
    ):
        vllm.moe_permute(ROWS, None, IDS, 4, 2, LOCAL, None, ScratchOfEarlierReleases(7))


def test_vllm_ops_with_scratch_write_what_those_without_do():
    given = torch.full((8, 16), torch.nan), torch.full((3,), -7), ints(4, 2), ints(8)
    scratch = (ints(9), ints(4, 2), ints(4, 2), ints(4, 2))
    vllm_ops.moe_permute_with_scratch(ROWS, IDS, None, LOCAL, 4, 2, 2, *given, *scratch)
    expected = vllm.moe_permute(ROWS, None, IDS, 4, 2, LOCAL)
    assert torch.equal(given[0], expected[0])
    assert given[2].ravel().tolist() == expected[3].tolist()
    with pytest.raises(ValueError, match="`topk` must be the columns of `topk_ids`, 2, got 3"):
        vllm_ops.moe_permute_with_scratch(ROWS, IDS, None, LOCAL, 4, 2, 3, *given, *scratch)


@pytest.mark.parametrize("counter", [torch.int32, torch.int64])
def test_vllm_maps_to_places_and_counts_them(counter):
    replicas = torch.tensor([[4, 1], [0, -1], [3, -1], [2, -1]])
    count = torch.tensor([2, 1, 1, 1])
    load, on = torch.ones(5, dtype=counter), torch.tensor([True])
    ids = torch.tensor([[0, 1], [0, -1], [3, 2], [0, 7]])
    places = vllm.eplb_map_to_physical_and_record(ids, load, replicas, count, on, torch.tensor(3))
    expected = reference.dispatch_ids(ids.numpy(), replicas.int().numpy(), count.int().numpy(), algorithm="hash")
    assert places.tolist() == expected.tolist()
    assert places.dtype == torch.int64
    counted = np.bincount(expected[:3][expected[:3] >= 0], minlength=5)
    assert load.tolist() == (1 + counted).tolist()
    assert load.dtype == counter
    vllm.eplb_map_to_physical_and_record(ids.int(), load, replicas, count, torch.tensor([False]))
    assert load.tolist() == (1 + counted).tolist()
    vllm.eplb_map_to_physical_and_record(ids.int(), load, replicas, torch.zeros(4, dtype=torch.int64), on)
    assert load.sum() > 1 + counted.sum()  # a count of 0 is that of one place


def test_vllm_remaps_to_local_ids():
    assert vllm.remap_topk_to_local(IDS, LOCAL).tolist() == [[1, 0], [-1, 1], [-1, -1], [1, -1]]
    assert vllm.remap_topk_to_local(IDS, LOCAL.long()).dtype == torch.int64
    assert vllm.remap_topk_to_local(IDS.long(), LOCAL, out_dtype=torch.int32).dtype == torch.int32
    with pytest.raises(ValueError, match=r"`out_dtype` must be torch.int32 or torch.int64, got torch.int16"):
        vllm.remap_topk_to_local(IDS, LOCAL, out_dtype=torch.int16)


def test_vllm_weighted_sum_leaves_out_slots_and_leaves_rows_alone():
    rows, weights = torch.randn(4, 2, 16), torch.rand(4, 2)
    out = vllm.moe_fused_mul_sum(rows, weights)
    torch.testing.assert_close(out, (rows * weights[..., None]).sum(1))
    ids = torch.tensor([[3, 1], [0, 3], [-1, -1], [3, 0]])
    kept = torch.tensor([[True, True], [False, True], [False, False], [True, False]])
    rows[2] = torch.nan
    given = torch.full((4, 16), 9.0, dtype=torch.float64).float()
    assert vllm.moe_fused_mul_sum(rows, weights, given, ids, LOCAL, torch.tensor([3])) is given
    expected = torch.where(kept[..., None], rows * weights[..., None], 0).sum(1)
    torch.testing.assert_close(given[:2], expected[:2])
    assert given[2:].eq(9).all()  # no id, and past the tokens there are
    torch.testing.assert_close(vllm.moe_fused_mul_sum(rows, weights, None, ids, LOCAL), expected)
    with pytest.raises(ValueError, match="`topk_ids` must be given with `expert_map`, got None"):
        vllm.moe_fused_mul_sum(rows, weights, expert_map=LOCAL)


@pytest.mark.parametrize("skip", [True, False])
def test_vllm_rows_that_its_context_calls_padding_are_skipped(peers, skip):
    mask = torch.tensor([False, True, False, False, False, True])
    context = types.SimpleNamespace(is_padding=mask)
    module("vllm.envs", VLLM_MOE_SKIP_PADDING=skip)
    module("vllm.forward_context", is_forward_context_available=lambda: True, get_forward_context=lambda: context)
    for scoring in ("softmax", "sigmoid"):
        weights, ids, _ = vllm.fused_topk(LOGITS, LOGITS, 2, True, scoring_func=scoring)
        assert (ids[1] < 0).all() == (weights[1] == 0).all() == skip
        assert (ids[[0, 2, 3, 4]] >= 0).all()
    context.is_padding = None
    assert (vllm.fused_topk(LOGITS, LOGITS, 2, True)[1] >= 0).all()
    sys.modules["vllm.forward_context"].is_forward_context_available = lambda: False
    del sys.modules["vllm.forward_context"].get_forward_context
    assert (vllm.fused_topk(LOGITS, LOGITS, 2, True)[1] >= 0).all()
    del sys.modules["vllm.envs"].VLLM_MOE_SKIP_PADDING  # release 0.21
    assert (vllm.fused_topk(LOGITS, LOGITS, 2, True)[1] >= 0).all()


def test_vllm_softplus_by_scores_and_by_a_table():
    weights, ids = choice_memory()
    vllm_ops.topk_softplus_sqrt(weights, ids, ints(5, 2), LOGITS, True, 2.5, BIAS)
    expected = moe.topk_softplus_sqrt(LOGITS, 2, True, BIAS)
    assert torch.equal(ids, expected.topk_ids)
    torch.testing.assert_close(weights, 2.5 * expected.topk_weights)
    table, tokens = torch.tensor([[0, 1], [7, 3], [2, 5]]), torch.tensor([2, 0, 1, 1, 2])
    vllm_ops.topk_hash_softplus_sqrt(weights, ids, ints(5, 2), LOGITS, False, 2.0, None, tokens, table)
    assert torch.equal(ids, table[tokens].int())
    torch.testing.assert_close(weights, 2 * torch.nn.functional.softplus(LOGITS).sqrt().gather(1, table[tokens]))


def test_sums_of_rows():
    rows, out = torch.randn(4, 2, 16), torch.full((4, 16), torch.nan)
    vllm_ops.moe_sum(rows, out)
    torch.testing.assert_close(out, rows.sum(1))
    vllm_ops.moe_sum(rows, out, IDS, LOCAL)
    kept = torch.tensor([[True, True], [False, True], [False, False], [True, False]])
    torch.testing.assert_close(out, torch.where(kept[..., None], rows, 0).sum(1))
    sglang.moe_sum(rows, out)
    torch.testing.assert_close(out, rows.sum(1))
    half = out.half()
    sglang.moe_sum_reduce(rows.half(), half, 2.5)
    torch.testing.assert_close(half, 2.5 * rows.half().sum(1), atol=2e-3, rtol=2e-3)


def test_sglang_aligns_with_a_bucket_for_no_expert():
    given = ints(8 + 5 * 3), ints(6), ints(1)
    sglang.moe_align_block_size(IDS, 5, 4, *given, ints(6), True)
    assert given[2].item() == 20
    assert given[1].tolist() == [-1, 0, 1, 2, 3, -1]
    assert given[0][:20].tolist() == [4, 8, 8, 8, 2, 7, 8, 8, 1, 8, 8, 8, 5, 8, 8, 8, 0, 3, 6, 8]


SLOTS = torch.tensor([[0, 1], [1, 2], [2, 3]], dtype=torch.int32)
SORTED = [0, 6, 6, 6, 1, 2, 6, 6, 3, 4, 6, 6, 5, 6, 6, 6]  # by experts 0 to 3, in blocks of 4


@pytest.mark.parametrize("num_names", [5, 6, 7])  # whole blocks of 21 positions, all blocks, and one more
@pytest.mark.parametrize("spare", [0, 3])
def test_sglang_takes_memory_as_sglang_allocates_it(num_names, spare):
    given = ints(6 + 5 * 3 + spare), ints(num_names), ints(1)
    sglang.moe_align_block_size(SLOTS, 5, 4, *given, ints(6), True)
    assert given[0].tolist() == SORTED + [6] * (5 + spare)
    assert given[1].tolist() == [0, 1, 2, 3] + [-1] * (num_names - 4)
    assert given[2].item() == 16
    with_blocks = ints(2)
    ids = torch.tensor([[-1, 1], [-1, -1], [-1, 3]], dtype=torch.int32)
    sglang.moe_align_block_size(ids, 5, 3, ints(6 + 5 * 2), ints(5), with_blocks, ints(6))
    assert with_blocks.tolist() == [12, 2]


def test_sglang_refuses_fewer_names_than_blocks_by_name():
    with pytest.raises(ValueError, match=r"`len\(experts_ids\)` must be at least the blocks that any .* = 5, got 4"):
        sglang.moe_align_block_size(SLOTS, 5, 4, ints(21), ints(4), ints(1), ints(6))
    with pytest.raises(TypeError, match="`pad_sorted_token_ids` must be True or False, got None"):
        sglang.moe_align_block_size(SLOTS, 5, 4, ints(21), ints(6), ints(1), ints(6), None)


def test_sglang_leaves_ids_of_no_expert_out_where_asked():
    given = ints(8 + 5 * 3), ints(6), ints(2)
    sglang.moe_align_block_size(IDS, 5, 4, *given, ints(6), True, True)
    assert given[2].tolist() == [16, 0]
    assert given[1].tolist() == [0, 1, 2, 3, -1, -1]
    assert given[0][:16].tolist() == [2, 7, 8, 8, 1, 8, 8, 8, 5, 8, 8, 8, 0, 3, 6, 8]
    with pytest.raises(TypeError, match="`ignore_invalid_expert` must be True or False, got 1"):
        sglang.moe_align_block_size(IDS, 5, 4, *given, ints(6), True, 1)


def test_an_older_softmax_numbers_slots():
    weights, ids = choice_memory()
    numbers = ints(5, 2)
    sglang.topk_softmax_with_indices(weights, ids, numbers, LOGITS)
    assert torch.equal(weights, moe.topk_softmax(LOGITS, 2).topk_weights)
    assert numbers[:, 1].tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("num_names", [4, 5])
def test_a_call_of_an_older_sgl_kernel_loses_no_expert(num_names):
    """Counters and offsets are tensors there, and the number of experts is that of experts."""
    given = ints(6 + 4 * 3), ints(num_names), ints(1)
    sglang.moe_align_block_size(SLOTS, 4, 4, *given, ints(4 * 5), ints(5))
    assert given[0].tolist() == [*SORTED, 6, 6]
    assert given[1].tolist() == [0, 1, 2, 3] + [-1] * (num_names - 4)
    assert given[2].item() == 16


@pytest.mark.parametrize("num_names", [4, 5, 6])
def test_vllm_op_of_alignment_takes_names_as_call_sites_allocate_them(num_names):
    given = ints(6 + 4 * 3), ints(num_names), ints(1)
    vllm_ops.moe_align_block_size(SLOTS, 4, 4, *given)
    assert given[0].tolist() == [*SORTED, 6, 6]
    assert given[1].tolist() == [0, 1, 2, 3] + [-1] * (num_names - 4)


INFINITE = torch.tensor([[0.0, torch.inf, -1.0, 2.0], [torch.nan, torch.inf, -torch.inf, 1.0]])


def vllm_sigmoid_choices(logits, top_k):
    """Yield what each of vLLM's names chooses by sigmoid scores without, or with a bias of zeros."""
    yield vllm.fused_topk(logits, logits, top_k, False, scoring_func="sigmoid")[:2]
    yield vllm.grouped_topk(logits, logits, top_k, False, 1, 1, "sigmoid")
    zeros = torch.zeros(logits.shape[1])
    for bias in (None, zeros):
        weights, ids = torch.full((len(logits), top_k), torch.nan), ints(len(logits), top_k)
        vllm_ops.topk_sigmoid(weights, ids, ints(len(logits), top_k), logits, False, bias)
        yield weights, ids
    yield vllm_ops.grouped_topk(logits, 1, 1, top_k, False, 1.0, zeros, 1)


def test_an_infinite_logit_is_last_by_the_sigmoid_of_vllm_and_first_by_ours():
    for weights, ids in vllm_sigmoid_choices(INFINITE, 3):
        assert ids.tolist()[0] == [3, 0, 2]
        torch.testing.assert_close(weights[0], torch.tensor([2.0, 0.0, -1.0]).sigmoid())
        assert ids.tolist()[1] == [3, 0, 1]
        torch.testing.assert_close(weights[1], torch.tensor([torch.tensor(1.0).sigmoid(), 0.0, 0.0]))
    for weights, ids in vllm_sigmoid_choices(INFINITE[:, 1:2], 1):
        assert (weights.tolist(), ids.tolist()) == ([[0.0], [0.0]], [[0], [0]])
    assert moe.topk_sigmoid(INFINITE, 1).topk_ids.tolist() == [[1], [1]]
    assert moe.topk_sigmoid(INFINITE, 1).topk_weights.tolist() == [[1.0], [1.0]]


def test_vllm_op_of_sums_leaves_out_what_the_map_lacks():
    rows, out = torch.ones(3, 3, 16), torch.full((3, 16), torch.nan)
    ids = torch.tensor([[0, 1, 4], [2**31 - 1, -(2**31), 3], [1, 3, 2]], dtype=torch.int32)
    for local in (torch.tensor([-1, 0, -1, 1]), torch.tensor([-(2**40), 2**32, -1, 1])):
        vllm_ops.moe_sum(rows, out, ids, local)
        assert out[:, 0].tolist() == [1.0, 1.0, 2.0]


def test_sglang_caps_and_biases_logits_before_a_softmax():
    weights, ids = choice_memory()
    sglang.topk_softmax(weights, ids, LOGITS.half(), False, 2.0, BIAS)
    scores = torch.softmax(2 * torch.tanh(LOGITS.half().float() / 2) + BIAS, 1)
    expected = scores.topk(2)
    assert torch.equal(ids, expected.indices.int())
    torch.testing.assert_close(weights, expected.values)
    sglang.topk_softmax(weights, ids, LOGITS, True)
    assert torch.equal(weights, moe.topk_softmax(LOGITS, 2, True).topk_weights)


def test_sglang_sigmoid_bias_moves_the_choice_alone():
    weights, ids = choice_memory()
    sglang.topk_sigmoid(weights, ids, LOGITS, True, BIAS)
    expected = moe.topk_sigmoid(LOGITS, 2, True, BIAS)
    assert torch.equal(weights, expected.topk_weights)
    assert torch.equal(ids, expected.topk_ids)


@pytest.mark.parametrize("on_output", [False, True])
@pytest.mark.parametrize("shared", [0, 1, 2])
def test_sglang_fused_gate(shared, on_output):
    weights, ids = sglang.moe_fused_gate(LOGITS, BIAS, 4, 2, 2 + shared, shared, 2.5, on_output)
    scores = LOGITS.sigmoid()
    ranks = scores + BIAS
    groups = ranks.view(5, 4, 2).sum(2).topk(2).indices
    out = torch.ones(5, 4, dtype=torch.bool).scatter_(1, groups, False).repeat_interleave(2, 1)
    chosen = ranks.masked_fill(out, -torch.inf).topk(2).indices
    routed = scores.gather(1, chosen)
    routed = torch.cat([routed, routed.sum(1, keepdim=True).repeat(1, shared) / 2.5], 1) / routed.sum(1, keepdim=True)
    assert torch.equal(ids[:, :2], chosen.int())
    assert ids[:, 2:].tolist() == [list(range(8, 8 + shared))] * 5
    torch.testing.assert_close(weights, routed * (2.5 if on_output else 1.0))


@pytest.mark.parametrize("renormalize", [False, True])
def test_kimi_gate_scales_what_it_renormalises(renormalize):
    weights, ids = sglang.kimi_k2_moe_fused_gate(LOGITS, BIAS.half(), 3, renormalize, 2.5, True)
    expected = moe.topk_sigmoid(LOGITS, 3, renormalize, BIAS.half().float())
    assert torch.equal(ids, expected.topk_ids)
    torch.testing.assert_close(weights, expected.topk_weights * (2.5 if renormalize else 1.0))


def test_sglang_input_of_grouped_gemms():
    offsets, scales, first, second = ints(5), ints(5), ints(4, 3), ints(4, 3)
    tokens, rows = ints(8), ints(8)
    sglang.prepare_moe_input(IDS, offsets, first, second, tokens, rows, 4, 10, 32, scales)
    assert offsets.tolist() == [0, 2, 3, 4, 7]
    assert scales.tolist() == [0, 128, 256, 384, 512]
    assert first.tolist() == [[2, 20, 32], [1, 20, 32], [1, 20, 32], [3, 20, 32]]
    assert second.tolist() == [[2, 32, 10], [1, 32, 10], [1, 32, 10], [3, 32, 10]]
    assert tokens.tolist() == [1, 3, 0, 2, 0, 1, 3, 4]
    assert rows.tolist() == [4, 2, 0, 5, -1, 3, 6, 1]


def module(name, **contents):
    made = types.ModuleType(name)
    vars(made).update(contents)
    sys.modules[name] = made
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, made)
    return made


def original(*args, **kwargs):
    """Stand for whatever a peer has."""
    return "the peer's"


def other(*args, **kwargs):
    return "something else"


@pytest.fixture
def peers():
    """Put module trees with the peers' paths, and modules that import from them as theirs do, where imports look."""
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers", vllm.LAYERS, f"{vllm.LAYERS}.router"):
        module(name, __path__=[])
    for name, functions in vllm.PATCH._replacements.items():
        module(name, other=other, **{key: types.FunctionType(original.__code__, {}, key) for key in functions})
    align = sys.modules[f"{vllm.LAYERS}.moe_align_block_size"]
    # a call site that imported a function by name, one that did under another name, and one of the ops' module
    module(f"{vllm.LAYERS}.experts", moe_align_block_size=align.moe_align_block_size)
    module(f"{vllm.LAYERS}.marlin", align=align.moe_align_block_size, ops=sys.modules["vllm._custom_ops"])
    functions = {key: types.FunctionType(original.__code__, {}, key) for key in sglang.FUNCTIONS}
    module("sgl_kernel", __path__=[], **functions)
    module("sgl_kernel.moe", **functions)
    module("sglang", sgl_align=functions["moe_align_block_size"])
    yield sys.modules
    vllm.unpatch()
    sglang.unpatch()
    for name in [
        name for name in sys.modules if name.partition(".")[0] in ("vllm", "sgl_kernel", "sglang", "flashinfer")
    ]:
        del sys.modules[name]


def contents(peers):
    return {
        (name, key): value
        for name, found in peers.items()
        if name.partition(".")[0] in ("vllm", "sgl_kernel", "sglang")
        for key, value in vars(found).items()
    }


def test_patching_vllm_replaces_what_call_sites_hold_and_unpatching_restores_it(peers):
    before = contents(peers)
    replaced = vllm.patch()
    assert f"{vllm.LAYERS}.utils.count_expert_num_tokens" in replaced
    assert len(replaced) == sum(map(len, vllm.PATCH._replacements.values()))
    experts, marlin = peers[f"{vllm.LAYERS}.experts"], peers[f"{vllm.LAYERS}.marlin"]
    assert experts.moe_align_block_size is marlin.align is vllm.moe_align_block_size
    assert marlin.ops.topk_softmax is vllm_ops.topk_softmax
    assert peers[f"{vllm.LAYERS}.router.grouped_topk_router"].grouped_topk is vllm.grouped_topk
    assert peers["vllm._custom_ops"].other is other
    vllm.patch()  # again, which a plugin may do
    assert experts.moe_align_block_size(IDS, 4, 4)[2].item() == 16
    vllm.unpatch()
    assert contents(peers) == before


def test_patching_some_names_with_the_older_tail(peers):
    before = contents(peers)
    assert vllm.patch(["fused_topk", "moe_align_block_size"], inactive_expert_id=0) == [
        f"{vllm.LAYERS}.moe_align_block_size.moe_align_block_size",
        f"{vllm.LAYERS}.router.fused_topk_router.fused_topk",
        "vllm._custom_ops.moe_align_block_size",
    ]
    assert peers[f"{vllm.LAYERS}.experts"].moe_align_block_size(IDS, 4, 4)[1].tolist() == [0, 1, 2, 3, 0]
    assert peers[f"{vllm.LAYERS}.moe_permute_unpermute"].moe_permute.__name__ == "moe_permute"
    assert peers[f"{vllm.LAYERS}.moe_permute_unpermute"].moe_permute() == "the peer's"
    vllm.unpatch()
    assert contents(peers) == before
    assert vllm.moe_align_block_size(IDS, 4, 4)[1].tolist() == [0, 1, 2, 3, -1]


def test_patching_again_with_another_tail_leaves_what_was_taken_as_it_was(peers):
    before, memory = contents(peers), (ints(28), ints(7), ints(1))
    vllm.patch(inactive_expert_id=0)
    experts, ops = peers[f"{vllm.LAYERS}.experts"], peers["vllm._custom_ops"]
    taken = experts.moe_align_block_size, ops.moe_align_block_size
    vllm.patch(inactive_expert_id=7)
    assert [found.moe_align_block_size(IDS, 4, 4)[1].tolist()[-1] for found in (experts, vllm)] == [7, -1]
    assert taken[0](IDS, 4, 4)[1].tolist() == [0, 1, 2, 3, 0]
    for align, tail in ((taken[1], 0), (ops.moe_align_block_size, 7), (vllm_ops.moe_align_block_size, -1)):
        align(IDS, 4, 4, *memory)
        assert memory[1].tolist()[-1] == tail
    vllm.unpatch()
    assert contents(peers) == before
    with pytest.raises(TypeError, match="`inactive_expert_id` must be an integer, got str"):
        vllm.patch(inactive_expert_id="0")


def test_originals_are_those_of_the_last_patch(peers):
    sglang.patch()
    moe_module = peers["sgl_kernel.moe"]
    moe_module.moe_sum = other  # the module was loaded anew, or somebody else has patched it
    sglang.patch()
    assert moe_module.moe_sum is sglang.moe_sum
    sglang.unpatch()
    assert moe_module.moe_sum is other
    sglang.patch()
    moe_module.moe_sum = original
    sglang.unpatch()
    assert moe_module.moe_sum is original


def test_a_vllm_without_some_modules_is_patched_as_far_as_it_goes(peers):
    del peers[f"{vllm.LAYERS}.router"], peers[f"{vllm.LAYERS}.router.fused_topk_router"]
    del peers[f"{vllm.LAYERS}.router.grouped_topk_router"]
    assert not any("router" in name for name in vllm.patch())


def test_patching_what_is_not_there():
    with pytest.raises(ImportError, match="vllm"):
        vllm.patch()
    with pytest.raises(ImportError, match="sgl_kernel"):
        sglang.patch()


def test_unknown_names(peers):
    with pytest.raises(ValueError, match=r"`names` must be one of 'batched_moe_align_block_size', .*, got 'relu'"):
        vllm.patch(["relu"])


def test_patching_sglang(peers):
    before = contents(peers)
    assert len(sglang.patch()) == len(sglang.FUNCTIONS)
    assert peers["sglang"].sgl_align is peers["sgl_kernel"].moe_align_block_size is sglang.moe_align_block_size
    sglang.unpatch()
    assert contents(peers) == before


def test_the_plugin_patches_when_the_environment_asks(peers, monkeypatch):
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    group, name, value = re.search(r'entry-points."(.*)"]\n(\w+) = "(.*)"', text).groups()
    assert (group, name) == ("vllm.general_plugins", "numba_moe")
    plugin = EntryPoint(name, value, group).load()
    monkeypatch.delenv("NUMBA_MOE_VLLM", raising=False)
    before = contents(peers)
    assert plugin() is None
    assert contents(peers) == before
    monkeypatch.setenv("NUMBA_MOE_VLLM", "1")
    assert f"{vllm.LAYERS}.moe_align_block_size.moe_align_block_size" in plugin()


def gated(logits):
    weights, ids, numbers = torch.empty(5, 2), ints(5, 2), ints(5, 2)
    vllm_ops.topk_softmax(weights, ids, numbers, logits, True, BIAS)
    return weights, ids, numbers


COMPILED = {
    "vllm.fused_topk": lambda logits: vllm.fused_topk(logits, logits, 2, True),
    "vllm_ops.topk_softmax": gated,
    "sglang_kernels.moe_fused_gate": lambda logits: sglang_kernels.moe_fused_gate(logits, BIAS, 3, "sigmoid", 1),
}


@pytest.mark.parametrize("name", COMPILED)
def test_gates_compile_into_one_graph_where_padding_is_skipped(name, peers):
    context = types.SimpleNamespace(is_padding=torch.tensor([False, True, False, False, False]))
    module("vllm.envs", VLLM_MOE_SKIP_PADDING=True)
    module("vllm.forward_context", is_forward_context_available=lambda: True, get_forward_context=lambda: context)
    expected = COMPILED[name](LOGITS)
    found = torch.compile(COMPILED[name], fullgraph=True, backend="eager")(LOGITS)
    assert all(map(torch.equal, found, expected))
    assert (expected[1][1] < 0).all() == (name == "vllm.fused_topk")
