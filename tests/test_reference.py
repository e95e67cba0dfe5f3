"""The reference against numbers typed by hand and loops that spell the definition out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from numba_moe import reference

ROUTINGS = hnp.arrays(
    np.int32, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=12), elements=st.integers(-2, 7)
)


@settings(deadline=None)
@given(ids=ROUTINGS, block_size=st.integers(1, 5), pad=st.booleans(), ignore=st.booleans(), data=st.data())
def test_alignment_by_loops(ids, block_size, pad, ignore, data):
    num_experts = 6
    maps = st.none() | hnp.arrays(np.int32, num_experts, elements=st.integers(-1, num_experts - 1))
    expert_map = data.draw(maps)
    expected, blocks = [], []
    for expert in range(num_experts):
        slots = []
        for slot, given_id in enumerate(ids.ravel().tolist()):
            if not 0 <= given_id < num_experts:
                continue
            mapped = given_id if expert_map is None or not ignore else int(expert_map[given_id])
            if mapped == expert:
                slots.append(slot)
        while len(slots) % block_size:
            slots.append(ids.size)
        expected += slots
        name = expert if expert_map is None or ignore else int(expert_map[expert])
        blocks += [name] * (len(slots) // block_size)

    got = reference.moe_align_block_size(ids, block_size, num_experts, expert_map, pad, ignore, inactive_expert_id=-5)
    used = len(expected)
    assert got.num_tokens_post_padded.tolist() == [used]
    assert got.sorted_token_ids[:used].tolist() == expected
    assert (got.sorted_token_ids[used:] == ids.size).all()
    assert got.expert_ids.tolist() == blocks + [-5] * (len(got.expert_ids) - len(blocks))
    assert len(got.expert_ids) * block_size >= len(got.sorted_token_ids) > (len(got.expert_ids) - 1) * block_size
    assert got.sorted_token_ids.dtype == got.expert_ids.dtype == got.num_tokens_post_padded.dtype == np.int32


def test_names_that_int32_cannot_hold_are_no_experts():
    local = np.array([2, -5, 2**32, 2**31 - 1, 2**31, -(2**63)])
    ids = np.array([0, 1, 2, 3, 4, 5, 2**32, -(2**32), 6])
    blocks = reference.moe_align_block_size(ids, 2, 6, local)
    assert blocks.expert_ids.tolist() == [2, -1, -1, 2**31 - 1, -1, -1, -1, -1]
    assert blocks.num_tokens_post_padded.tolist() == [12]
    blocks = reference.moe_align_block_size(ids, 2, 6, local, ignore_invalid_experts=True)
    assert blocks.sorted_token_ids[:2].tolist() == [0, 9]
    assert blocks.num_tokens_post_padded.tolist() == [2]
    assert reference.count_tokens_per_expert(ids, 6, local).tolist() == [0, 0, 1, 0, 0, 0]


def test_alignment_into_given_memory():
    ids = np.array([[2, 0], [0, -1], [2, 1]], np.int32)
    out = np.full(13, 77, np.int32), np.full(4, 77, np.int32), np.full(1, 77, np.int32)
    inverse, counts = np.full((3, 2), 77, np.int32), np.full(3, 77, np.int32)
    blocks = reference.moe_align_block_size(ids, 4, 3, out=out, inv_sorted_idx=inverse, counts=counts)
    assert [part.tolist() for part in out] == [[1, 2, 6, 6, 5, 6, 6, 6, 0, 4, 6, 6, 6], [0, 1, 2, -1], [12]]
    assert all(part is given for part, given in zip(blocks, out, strict=True))
    assert inverse.tolist() == [[8, 0], [1, -1], [9, 4]]
    assert counts.tolist() == [2, 1, 2]


@settings(deadline=None)
@given(sizes=st.lists(st.integers(-2, 9), max_size=9), most=st.integers(0, 7), block_size=st.integers(1, 5))
def test_batched_alignment_by_loops(sizes, most, block_size):
    expected, blocks = [], []
    for expert, size in enumerate(sizes):
        rows = [expert * most + row for row in range(min(max(size, 0), most))]
        while len(rows) % block_size:
            rows.append(len(sizes) * most)
        expected += rows
        blocks += [expert] * (len(rows) // block_size)
    got = reference.batched_moe_align_block_size(most, block_size, np.array(sizes, np.int32))
    used = len(expected)
    assert got.num_tokens_post_padded.tolist() == [used]
    assert got.sorted_token_ids[:used].tolist() == expected
    assert (got.sorted_token_ids[used:] == len(sizes) * most).all()
    assert got.expert_ids.tolist() == blocks + [-1] * (len(got.expert_ids) - len(blocks))
    assert (
        len(got.sorted_token_ids)
        == len(got.expert_ids) * block_size
        == len(sizes) * -(-most // block_size) * block_size
    )
    assert {part.dtype.name for part in got} == {"int32"}


@settings(deadline=None)
@given(
    ids=ROUTINGS,
    block_size=st.integers(1, 5),
    pad=st.booleans(),
    enabled=st.none() | st.lists(st.integers(0, 1), min_size=3, max_size=4),
    lora_ids=st.none() | st.lists(st.integers(-1, 4), max_size=4),
    data=st.data(),
)
def test_alignment_of_adapters_by_loops(ids, block_size, pad, enabled, lora_ids, data):
    adapters = data.draw(hnp.arrays(np.int32, len(ids), elements=st.integers(-1, 4)))
    expert_map = data.draw(st.none() | hnp.arrays(np.int32, 6, elements=st.integers(-1, 5)))
    got = reference.moe_lora_align_block_size(
        ids, adapters, block_size, 6, 3, None if enabled is None else np.array(enabled, np.int32),
        None if lora_ids is None else np.array(lora_ids, np.int32), expert_map, pad, inactive_expert_id=-5,
    )  # fmt: skip
    for adapter in range(3):
        expected, blocks = [], []
        in_use = (enabled is None or enabled[adapter]) and (lora_ids is None or adapter in lora_ids)
        for expert in range(6):
            slots = []
            for slot, given_id in enumerate(ids.ravel().tolist()):
                if in_use and adapters[slot // ids.shape[1]] == adapter and 0 <= given_id < 6:
                    mapped = given_id if expert_map is None else int(expert_map[given_id])
                    slots += [slot] if mapped == expert else []
            while len(slots) % block_size:
                slots.append(ids.size)
            expected += slots
            blocks += [expert] * (len(slots) // block_size)
        slots, experts = got.sorted_token_ids[adapter], got.expert_ids[adapter]
        assert got.num_tokens_post_padded[adapter] == len(expected)
        assert slots.tolist() == expected + [ids.size] * (len(slots) - len(expected))
        assert experts.tolist() == blocks + [-5] * (len(experts) - len(blocks))
    assert {part.dtype.name for part in got} == {"int32"}


def test_published_ragged_metadata():
    ragged = reference.make_ragged_metadata(np.array([15, 17, 0, 127], np.int32), 159)
    assert ragged.slice_sizes.tolist() == [15, 17, 0, 127]
    assert ragged.slice_offsets.tolist() == [0, 15, 32, 32, 159]
    assert ragged.block_offsets.tolist() == [[0, 1, 3, 3, 11], [0, 1, 2, 2, 6], [0, 1, 2, 2, 4], [0, 1, 2, 2, 3]]
    assert ragged.block_schedule.shape == (4, 13)
    of_last = [block << 16 | 3 for block in range(8)]
    assert ragged.block_schedule[0].tolist() == [0, 1, 1 << 16 | 1, *of_last, -1, -1]
    assert ragged.block_schedule[3].tolist() == [0, 1, 3] + [-1] * 10
    assert {part.dtype.name for part in ragged} == {"int32"}


@settings(deadline=None)
@given(sizes=st.lists(st.integers(-3, 70), max_size=9), spare=st.integers(0, 60))
def test_a_block_schedule_has_every_block_once(sizes, spare):
    rows = sum(max(size, 0) for size in sizes)
    ragged = reference.make_ragged_metadata(np.array(sizes, np.int32), rows + spare)
    for block_size, offsets, schedule in zip((16, 32, 64, 128), *ragged[2:], strict=True):
        blocks = [
            block << 16 | index
            for index, size in enumerate(sizes)
            for block in range(max(size, 0))
            if block * block_size < size
        ]
        assert schedule.tolist() == blocks + [-1] * (len(schedule) - len(blocks))
        assert offsets[-1] == len(blocks)


def test_a_wide_block_schedule():
    wide = reference.make_ragged_metadata(np.array([17, 20]), 2**19 + 1)
    assert wide.block_schedule.dtype == np.int64
    assert wide.block_schedule[0, :5].tolist() == [0, 1 << 32, 1, 1 << 32 | 1, -1]
    hot = reference.make_ragged_metadata(np.array([0, 2**19]), 2**19)
    assert hot.block_schedule.dtype == np.int32
    assert hot.block_schedule[0, 2**15 - 1] == (2**15 - 1) << 16 | 1


def test_length_of_sorted_token_ids():
    from numba_moe.reference.align import max_sorted_slots

    # num_slots + num_experts * (block_size - 1), but at most num_slots * block_size below num_experts slots
    assert max_sorted_slots(8, 16, 256) == 128
    assert max_sorted_slots(32768, 64, 256) == 48896
    assert max_sorted_slots(33, 16, 2) == 63
    assert max_sorted_slots(33, 16, 2, pad_sorted_ids=True) == 64
    assert max_sorted_slots(0, 16, 8) == 0


@settings(deadline=None)
@given(ids=ROUTINGS)
def test_counts_and_offsets_by_loops(ids):
    counts = reference.count_tokens_per_expert(ids, 6)
    assert counts.tolist() == [sum(value == expert for value in ids.ravel().tolist()) for expert in range(6)]
    assert counts.dtype == np.int32
    offsets = reference.expert_offsets(counts, 4)
    assert offsets.dtype == np.int64
    position = 0
    for expert in range(6):
        assert offsets[expert] == position
        while position < offsets[expert] + counts[expert] or position % 4:
            position += 1
    assert offsets[6] == position


@settings(deadline=None)
@given(
    logits=hnp.arrays(np.float32, (3, 12), elements=st.floats(-30, 30, width=32) | st.just(np.nan)),
    top_k=st.integers(2, 6),
    scoring_func=st.sampled_from(["softmax", "sigmoid", "softplus_sqrt", "raw"]),
    group_score=st.sampled_from(["max", "top2_sum", "topk_sum"]),
    bias=st.none() | hnp.arrays(np.float32, 12, elements=st.floats(-2, 2, width=32)),
    renormalize=st.booleans(),
)
def test_grouped_choice_by_loops(logits, top_k, scoring_func, group_score, bias, renormalize):
    got = reference.grouped_topk(
        logits, top_k, 4, 2, renormalize, scoring_func=scoring_func, correction_bias=bias, group_score=group_score,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    for row, weights, ids in zip(logits.astype(np.float64), *got, strict=True):
        scores, ranks = [], []
        for expert, logit in enumerate(row):
            score, rank = 0.0, -np.inf
            if scoring_func == "softmax":
                if np.isnan(row).any():
                    rank = 0.0
                else:
                    score, rank = np.exp(logit) / np.exp(row).sum(), logit
            elif scoring_func == "raw":
                score = rank = -np.inf if np.isnan(logit) else logit
            elif not np.isnan(logit):
                rank = logit
                score = 1 / (1 + np.exp(-logit)) if scoring_func == "sigmoid" else np.sqrt(np.log1p(np.exp(logit)))
            scores.append(score)
            ranks.append(rank if bias is None else np.float32(score) + bias[expert])
        values = []
        for group in range(4):
            members = sorted(range(3 * group, 3 * group + 3), key=lambda e: (-ranks[e], e))
            picks = {"max": 1, "top2_sum": 2, "topk_sum": top_k // 2}[group_score]
            total = np.float32(0)
            for expert in members[:picks]:
                total += np.float32(scores[expert]) if bias is None else ranks[expert]
            values.append(ranks[members[0]] if picks == 1 else total)
        groups = sorted(range(4), key=lambda g: (-values[g], g))[:2]
        chosen = sorted((e for e in range(12) if e // 3 in groups), key=lambda e: (-ranks[e], e))[:top_k]
        assert ids.tolist() == chosen
        scores = [0.0 if score == -np.inf else score for score in scores]
        total = sum(scores[e] for e in chosen) if renormalize else 1.0
        wanted = [2.5 * scores[e] / (total if total > 0 else 1.0) for e in chosen]
        np.testing.assert_allclose(weights, wanted, rtol=1e-5, atol=np.finfo(np.float32).smallest_subnormal)


def test_ungrouped_choice_is_the_grouped_one_with_one_group():
    logits = np.random.default_rng(0).standard_normal((50, 24)).astype(np.float32)
    for scoring_func in reference.gating.SCORING:
        wanted = getattr(reference, f"topk_{scoring_func}")(logits, 5, True)
        grouped = reference.grouped_topk(logits, 5, 1, 1, True, scoring_func=scoring_func)
        selected = reference.select_experts(logits, 5, renormalize=True, scoring_func=scoring_func)
        for result in (grouped, selected):
            assert [part.tolist() for part in result] == [part.tolist() for part in wanted]


def test_softmax_row_without_softmax_chooses_the_first_experts_with_weight_zero():
    weights, ids = reference.topk_softmax(np.array([[1.0, np.nan, 3.0], [-np.inf] * 3, [0, np.inf, 0]]), 2, True)
    assert ids.tolist() == [[0, 1]] * 3
    assert weights.tolist() == [[0, 0]] * 3


def test_what_is_not_finite_comes_last_and_weighs_nothing():
    logits = np.array([[np.inf, -1.0, np.nan, -2.0, -np.inf]])
    weights, ids = reference.topk_raw(logits, 5)
    assert ids.tolist() == [[1, 3, 0, 2, 4]]
    assert weights.tolist() == [[-1.0, -2.0, 0.0, 0.0, 0.0]]
    assert reference.topk_raw(logits, 5, True).topk_weights.tolist() == weights.tolist(), "the sum is negative"
    biased = reference.topk_raw(logits, 3, correction_bias=np.array([9.0, 0.0, 9.0, 1.5, 9.0]))
    assert biased.topk_ids.tolist() == [[3, 1, 0]]
    weights, ids = reference.topk_softplus_sqrt(logits, 5)
    assert ids.tolist() == [[1, 3, 0, 2, 4]]
    assert weights[0, 2:].tolist() == [0.0, 0.0, 0.0]


def test_masked_experts_come_last():
    weights, ids = reference.topk_softmax(np.array([[-np.inf, 1.0, -np.inf, 1.0]]), 3)
    assert ids.tolist() == [[1, 3, 0]]
    assert weights.tolist() == [[0.5, 0.5, 0.0]]


@settings(deadline=None)
@given(ids=ROUTINGS.filter(lambda ids: ids.shape[1] > 0), alignment=st.none() | st.integers(1, 5), data=st.data())
def test_permute_and_unpermute_by_loops(ids, alignment, data):
    num_experts, step = 6, alignment or 1
    expert_map = data.draw(st.none() | hnp.arrays(np.int32, num_experts, elements=st.integers(-1, num_experts - 1)))
    rows = np.arange(ids.shape[0] * 2, dtype=np.float32).reshape(-1, 2) + 1
    got = reference.moe_permute(rows, ids, num_experts, expert_map, scales=rows[:, 0], alignment=alignment)
    known = [-1 if not 0 <= e < num_experts else e if expert_map is None else expert_map[e] for e in ids.ravel()]
    slots, experts = [], []
    for expert in range(num_experts):
        assert got.expert_first_token_offset[expert] == len(slots)
        mine = [slot for slot, chosen in enumerate(known) if chosen == expert]
        padding = -len(mine) % step
        assert got.counts[expert] == len(mine)
        slots += mine + [ids.size] * padding
        experts += [expert] * len(mine) + [-1] * padding
    assert got.expert_first_token_offset[num_experts] == len(slots)
    unused = len(got.permuted_idx) - len(slots)
    assert got.permuted_idx.tolist() == slots + [ids.size] * unused
    assert (got.m_indices is None) == (alignment is None)
    assert alignment is None or got.m_indices.tolist() == experts + [-1] * unused
    moved = [rows[slot // ids.shape[1]].tolist() if slot < ids.size else [0, 0] for slot in got.permuted_idx]
    assert got.permuted_hidden_states.tolist() == moved
    assert got.permuted_scales.tolist() == [row[0] for row in moved]
    kept = (np.array(known) >= 0).reshape(ids.shape)
    assert ((got.inv_permuted_idx >= 0) == kept).all()
    assert (got.permuted_idx[got.inv_permuted_idx[kept]] == np.flatnonzero(kept)).all()
    combined = reference.moe_unpermute(
        got.permuted_hidden_states, np.ones(ids.shape, np.float32), got.inv_permuted_idx, routed_scaling_factor=2.0
    )
    assert combined.tolist() == (2 * rows * kept.sum(1, keepdims=True)).tolist()
    by_slot = np.repeat(rows, ids.shape[1], axis=0).reshape(*ids.shape, 2)
    assert reference.moe_sum(by_slot, np.where(kept, 0, -1), routed_scaling_factor=2.0).tolist() == combined.tolist()
    reordered = reference.moe_reorder(ids, num_experts, expert_map)
    if alignment is None:
        assert reordered.src2dst.tolist() == got.inv_permuted_idx.ravel().tolist()
        assert reordered.reorder_topk_ids.tolist() == experts + [-1] * unused
        assert reordered.seg_indptr.tolist() == got.expert_first_token_offset.tolist()


@settings(deadline=None)
@given(ids=ROUTINGS.filter(lambda ids: ids.shape[1] > 0), max_m=st.integers(1, 9), batches=st.integers(1, 6))
def test_batches_by_loops(ids, max_m, batches):
    rows = np.arange(len(ids), dtype=np.float32)[:, None] + 1
    got = reference.moe_permute_masked(rows, ids, 6, max_m, num_local_experts=batches, scales=rows)
    inverse = np.full(ids.size, -1)
    for expert in range(batches):
        mine = [slot for slot, chosen in enumerate(ids.ravel()) if chosen == expert][:max_m]
        unused = max_m - len(mine)
        assert got.masked_m[expert] == len(mine)
        assert got.permuted_idx[expert].tolist() == mine + [ids.size] * unused
        moved = [[slot // ids.shape[1] + 1] for slot in mine] + [[0]] * unused
        assert got.permuted_hidden_states[expert].tolist() == got.permuted_scales[expert].tolist() == moved
        inverse[mine] = expert * max_m + np.arange(len(mine))
    assert got.inv_permuted_idx.ravel().tolist() == inverse.tolist()
    assert {part.dtype.name for part in got[1:4]} == {"int32"}


def test_unpermute_rounds_once():
    rows = np.array([[1.0], [2.0**-11], [2.0**-11]], np.float16)
    weights = np.ones((1, 3), np.float32)
    assert reference.moe_unpermute(rows, weights, np.array([[0, 1, 2]], np.int32)).item() == 1 + 2.0**-10


def test_no_shape_is_too_small():
    empty = np.zeros((0, 2), np.int32)
    assert [part.tolist() for part in reference.moe_align_block_size(empty, 4, 3)] == [[], [], [0]]
    assert reference.count_tokens_per_expert(empty, 3).tolist() == [0, 0, 0]
    assert reference.topk_softmax(np.zeros((0, 3), np.float32), 2).topk_ids.shape == (0, 2)
    assert reference.moe_permute(np.zeros((0, 5), np.float32), empty, 3).permuted_hidden_states.shape == (0, 5)


@pytest.mark.parametrize("num_experts", [1, 257, 2048])
def test_any_number_of_experts(num_experts):
    ids = np.random.default_rng(0).integers(0, num_experts, (300, 2)).astype(np.int32)
    sorted_ids, expert_ids, used = reference.moe_align_block_size(ids, 16, num_experts)
    for block, expert in enumerate(expert_ids[: used[0] // 16]):
        slots = sorted_ids[16 * block : 16 * block + 16]
        assert (ids.ravel()[slots[slots < ids.size]] == expert).all()
