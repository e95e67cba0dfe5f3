"""Functions of ours under the names of `sglang.kernels.ops.moe`: every parameter says something."""

import pytest
import torch

import numba_moe as moe
from numba_moe.interop import sglang_kernels as kernels
from numba_moe.runtime.launch import Launch

LOGITS = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
BIAS = torch.linspace(-0.3, 0.3, 8)
IDS = torch.tensor([[3, 1], [0, 3], [-1, 2], [3, 0]], dtype=torch.int32)


def ints(*shape):
    return torch.full(shape, -77, dtype=torch.int32)


def scores_of(scoring, logits=LOGITS):
    if scoring == "softmax":
        return logits.softmax(1)
    return logits.sigmoid() if scoring == "sigmoid" else torch.nn.functional.softplus(logits).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scoring", ["sigmoid", "sqrtsoftplus", "Sigmoid"])
def test_gate_chooses_by_scores_and_a_bias_of_any_dtype(scoring, dtype):
    weights, ids = kernels.moe_fused_gate(LOGITS, BIAS.to(dtype), 3, scoring)
    scores = scores_of(scoring.lower())
    expected = (scores + BIAS.to(dtype).float()).topk(3).indices
    assert torch.equal(ids, expected.int())
    taken = scores.gather(1, expected)
    torch.testing.assert_close(weights, taken / taken.sum(1, keepdim=True))
    plain = kernels.moe_fused_gate(LOGITS, BIAS.to(dtype), 3, scoring, renormalize=False)
    torch.testing.assert_close(plain[0], taken)


def test_gate_of_a_softmax_has_cap_and_bias_in_its_weights():
    capped = 2 * torch.tanh(LOGITS / 2) + BIAS
    weights, ids = kernels.moe_fused_gate(LOGITS, BIAS, 2, "softmax", 0, False, moe_softcapping=2.0)
    torch.testing.assert_close((weights, ids.long()), tuple(capped.softmax(1).topk(2)))
    weights, ids = kernels.moe_fused_gate(LOGITS, None, 2, "softmax", 0, False)
    torch.testing.assert_close((weights, ids.long()), tuple(LOGITS.softmax(1).topk(2)))
    with pytest.raises(ValueError, match=r"`moe_softcapping` must be 0 for 'sigmoid' scores, got 2\.0"):
        kernels.moe_fused_gate(LOGITS, BIAS, 2, moe_softcapping=2.0)
    with pytest.raises(ValueError, match="`bias` must be given but for a softmax, got None"):
        kernels.moe_fused_gate(LOGITS, None, 2)
    with pytest.raises(ValueError, match=r"`scoring_func` must be one of 'sigmoid', 'sqrtsoftplus', .*, got 'relu'"):
        kernels.moe_fused_gate(LOGITS, BIAS, 2, "relu")


def test_gates_are_one_launch(device, monkeypatch):
    launched, launch = [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self, **arrays: (launched.append(self), launch(self, **arrays)))
    logits, bias = LOGITS.to(device), BIAS.to(device)
    kernels.moe_fused_gate(logits, bias, 4, "sigmoid", 2, True, 2.5, renormalize_epsilon=1e-20)
    kernels.moe_fused_gate(logits, bias, 4, "sigmoid", 2, False, 2.5)
    kernels.gemma4_fused_routing(logits, torch.ones(8, device=device), 3)
    assert len(launched) == 3


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("on_output", [True, False])
def test_gate_gives_shared_experts_a_weight_of_their_own(renormalize, on_output, epsilon):
    weights, ids = kernels.moe_fused_gate(
        *(LOGITS, BIAS, 4, "sigmoid", 2, renormalize, 2.5, on_output), renormalize_epsilon=epsilon
    )
    chosen = (LOGITS.sigmoid() + BIAS).topk(2).indices
    taken = LOGITS.sigmoid().gather(1, chosen)
    routed = taken / (taken.sum(1, keepdim=True) + epsilon) if renormalize else taken
    assert ids.tolist() == [[*row, 8, 9] for row in chosen.tolist()]
    torch.testing.assert_close(weights[:, :2], routed * (2.5 if on_output else 1.0))
    torch.testing.assert_close(weights[:, 2:], torch.full((5, 2), 1.0 if on_output else 0.4))


def test_gate_scales_only_where_it_is_asked_to():
    plain = kernels.moe_fused_gate(LOGITS, BIAS, 2, routed_scaling_factor=2.5)[0]
    scaled = kernels.moe_fused_gate(LOGITS, BIAS, 2, "sigmoid", 0, True, 2.5, True)[0]
    torch.testing.assert_close(scaled, 2.5 * plain)
    nothing = kernels.moe_fused_gate(LOGITS, BIAS, 2, "sigmoid", 0, True, None, None, 0.0, 1, None)[0]
    assert torch.equal(nothing, plain)


def test_gate_chooses_in_groups_by_their_best_two():
    weights, ids = kernels.moe_fused_gate(LOGITS, BIAS, 2, num_expert_group=4, topk_group=2)
    options = {"scoring_func": "sigmoid", "correction_bias": BIAS, "group_score": "top2_sum"}
    assert all(map(torch.equal, (weights, ids), moe.grouped_topk(LOGITS, 2, 4, 2, True, **options)))
    best = moe.grouped_topk(LOGITS, 2, 4, 1, True, group_score="top2_sum")
    assert torch.equal(kernels.moe_fused_gate(LOGITS, None, 2, "softmax", num_expert_group=4)[1], best.topk_ids)


def test_gate_has_a_second_bias_for_the_tokens_of_an_id():
    tokens, other = torch.tensor([1, 7, 7, 2, 1]), (4 * BIAS.flip(0)).bfloat16()
    options = {"bias_alt": other, "input_ids": tokens, "bias_alt_token_id": 7}
    found = kernels.moe_fused_gate(LOGITS, BIAS, 2, "sqrtsoftplus", **options)
    of_id = tokens == 7
    for mask, bias in ((of_id, other), (~of_id, BIAS)):
        expected = kernels.moe_fused_gate(LOGITS, bias, 2, "sqrtsoftplus")
        assert all(torch.equal(part[mask], wanted[mask]) for part, wanted in zip(found, expected, strict=True))
    without = kernels.moe_fused_gate(LOGITS, BIAS, 2, "sqrtsoftplus", bias_alt=other, bias_alt_token_id=7)
    assert torch.equal(without[1], kernels.moe_fused_gate(LOGITS, BIAS, 2, "sqrtsoftplus")[1])
    with pytest.raises(ValueError, match="`bias_alt` must be given with `input_ids`, got None"):
        kernels.moe_fused_gate(LOGITS, BIAS, 2, input_ids=tokens, bias_alt_token_id=7)
    with pytest.raises(TypeError, match="`bias_alt_token_id` must be an integer, got NoneType"):
        kernels.moe_fused_gate(LOGITS, BIAS, 2, input_ids=tokens, bias_alt=other)


@pytest.mark.parametrize("renormalize", [True, False])
def test_gate_leaves_padding_out_and_packs_what_it_found(renormalize):
    packed = ints(5, 3)
    weights, ids = kernels.moe_fused_gate(
        *(LOGITS, BIAS, 3, "sigmoid", 1, renormalize), num_token_non_padded=torch.tensor(3), packed_out=packed
    )
    assert ids[3:].tolist() == [[-1] * 3] * 2
    assert weights[3:].tolist() == [[0.0] * 3] * 2
    assert torch.equal(packed >> 16, ids)
    bits = (packed & 0xFFFF).to(torch.int16).view(torch.bfloat16)
    assert torch.equal(bits, weights.bfloat16())


def test_gate_takes_either_rounding_of_softplus_as_the_exact_one():
    logits = torch.tensor([[-30.0, -20.0, 0.5]])
    both = [kernels.moe_fused_gate(logits, torch.zeros(3), 3, "sqrtsoftplus", 0, False, sqrtsoftplus_log1p=flag)
            for flag in (True, False)]  # fmt: skip
    assert torch.equal(both[0][0], both[1][0])
    torch.testing.assert_close(both[0][0].flip(1).double(), logits.double().exp().log1p().sqrt())
    with pytest.raises(TypeError, match="`sqrtsoftplus_log1p` must be True or False, got 1"):
        kernels.moe_fused_gate(logits, torch.zeros(3), 3, sqrtsoftplus_log1p=1)


def test_tiny_align_counts_blocks_without_an_expert_where_asked():
    given = ints(8 + 5 * 3 + 1), ints(6), ints(2)
    kernels.moe_align_small_numel(IDS, 5, 4, *given, write_inactive_prefix_count=True)
    assert given[2].tolist() == [20, 1]
    assert given[1].tolist() == [-1, 0, 1, 2, 3, -1]
    assert given[0][:20].tolist() == [4, 8, 8, 8, 2, 7, 8, 8, 1, 8, 8, 8, 5, 8, 8, 8, 0, 3, 6, 8]
    given[2].fill_(-77)
    kernels.moe_align_small_numel(IDS, 5, 4, *given)
    assert given[2].tolist() == [20, -77]
    message = r"`len\(num_tokens_post_pad\)` must be 2 with `write_inactive_prefix_count`, got 1"
    with pytest.raises(ValueError, match=message):
        kernels.moe_align_small_numel(IDS, 5, 4, *given[:2], ints(1), write_inactive_prefix_count=True)


def test_jit_align_puts_ids_of_no_expert_where_it_is_told():
    ids = torch.tensor([[9, 1], [-5, 3]], dtype=torch.int32)
    given = ints(4 + 5), ints(5), ints(2)
    options = {"write_inactive_prefix_count": True, "pad_expert_ids": True}
    kernels.jit_moe_align_block_size(ids, 5, 2, *given, ints(6), True, map_invalid_experts_to_sentinel=True, **options)
    assert given[2].tolist() == [6, 1]
    assert given[1].tolist() == [-1, 1, 3, -1, -1]
    assert given[0][:6].tolist() == [0, 2, 1, 4, 3, 4]
    kernels.jit_moe_align_block_size(ids, 5, 2, *given, ints(6), **options)
    assert given[2].tolist() == [4, 0]  # skipped
    for name in ("pad_sorted_token_ids", "pad_expert_ids", "map_invalid_experts_to_sentinel"):
        with pytest.raises(TypeError, match=f"`{name}` must be True or False, got None"):
            kernels.jit_moe_align_block_size(ids, 5, 2, *given, ints(6), **{name: None})


def test_one_token_has_a_block_for_each_expert():
    found = kernels.moe_align_single_token(IDS[2:3], 4)
    assert [part.tolist() for part in found] == [[0, 2, 2, 2, 1, 2, 2, 2], [-1, 2], [8]]
    assert {part.dtype for part in found} == {torch.int32}
    assert kernels.moe_align_single_token(IDS[2:3], 4, return_inactive_prefix_count=True)[2].tolist() == [8, 1]
    with pytest.raises(ValueError, match=r"`len\(topk_ids\)` must be 1, the one token, got 4"):
        kernels.moe_align_single_token(IDS, 4)


@pytest.mark.parametrize("transposed", [False, True])
def test_input_of_grouped_gemms_has_token_0_behind_the_last_row(transposed):
    offsets, scales, first, second = ints(5), ints(5), ints(4, 3), ints(4, 3)
    tokens, rows = ints(8), ints(8)
    given = (offsets, first, second, tokens, rows)
    kernels.cutlass_prepare_moe_input(IDS, *given, 4, 10, 32, scales, transpose_problem_sizes=transposed)
    assert offsets.tolist() == [0, 2, 3, 4, 7]
    assert scales.tolist() == [0, 128, 256, 384, 512]
    order = [1, 0, 2] if transposed else [0, 1, 2]
    assert first[:, order].tolist() == [[2, 20, 32], [1, 20, 32], [1, 20, 32], [3, 20, 32]]
    assert second[:, order].tolist() == [[2, 32, 10], [1, 32, 10], [1, 32, 10], [3, 32, 10]]
    assert tokens.tolist() == [1, 3, 0, 2, 0, 1, 3, 0]
    assert rows.tolist() == [4, 2, 0, 5, -1, 3, 6, 1]


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("shared", [0, 1])
def test_sigmoid_of_the_kernels_scales_what_it_renormalises(renormalize, shared):
    weights, ids = torch.full((5, 2 + shared), torch.nan), ints(5, 2 + shared)
    kernels.topk_sigmoid(weights, ids, LOGITS, renormalize, BIAS.half(), 2.5, shared)
    expected = moe.topk_sigmoid(LOGITS, 2, renormalize, BIAS.half().float())
    assert torch.equal(ids[:, :2], expected.topk_ids)
    torch.testing.assert_close(weights[:, :2], expected.topk_weights * (2.5 if renormalize else 1.0))
    if shared:
        assert ids[:, 2].tolist() == [8] * 5
        last = torch.ones(5) if renormalize else expected.topk_weights.sum(1) / 2.5
        torch.testing.assert_close(weights[:, 2], last)


def test_gemmas_router_multiplies_by_the_scales_of_experts():
    scale = torch.linspace(0.5, 2, 8).bfloat16()
    weights, ids = kernels.gemma4_fused_routing(LOGITS.bfloat16(), scale, 3)
    best = LOGITS.bfloat16().float().topk(3)
    assert torch.equal(ids, best.indices.int())
    torch.testing.assert_close(weights, best.values.softmax(1) * scale.float()[best.indices])
    with pytest.raises(ValueError, match="`per_expert_scale` must be of num_experts = 8, got 7"):
        kernels.gemma4_fused_routing(LOGITS, scale[1:], 3)


@pytest.mark.parametrize("shared", [0, 2])
def test_experts_of_a_table_are_weighed(shared):
    table, tokens = torch.tensor([[0, 1], [7, 3], [2, 5]], dtype=torch.int32), torch.tensor([2, 0, 1, 1, 2])
    weights, ids = kernels.hash_topk(LOGITS, tokens, table, shared, 2.5)
    chosen = table[tokens]
    assert ids.tolist() == [[*row, *range(8, 8 + shared)] for row in chosen.tolist()]
    taken = scores_of("sqrtsoftplus").gather(1, chosen.long())
    torch.testing.assert_close(weights[:, :2], taken / taken.sum(1, keepdim=True))
    assert weights[:, 2:].allclose(torch.tensor(0.4))
    with pytest.raises(ValueError, match="`scoring_func` must be one of 'sqrtsoftplus', got 'sigmoid'"):
        kernels.hash_topk(LOGITS, tokens, table, scoring_func="sigmoid")


def test_ids_of_padding_are_masked_in_place():
    ids = IDS.clone()
    with pytest.raises(ValueError, match=r"`num_token_non_padded` must be of shape \(\) or \(1,\) = \(1,\), got shape"):
        kernels.mask_topk_ids(ids, torch.tensor([1, 2]))
    kernels.mask_topk_ids(ids, torch.tensor([2]))
    assert ids.tolist() == [[3, 1], [0, 3], [-1, -1], [-1, -1]]


def test_weighted_sum_of_the_kernels():
    rows, weights = torch.randn(4, 2, 16), torch.rand(4, 2)
    local = torch.tensor([-1, 0, -1, 1], dtype=torch.int32)
    torch.testing.assert_close(kernels.moe_fused_mul_sum(rows, weights), (rows * weights[..., None]).sum(1))
    rows[2, 0] = torch.nan
    out = torch.full((4, 16), torch.nan)
    assert kernels.moe_fused_mul_sum(rows, weights, out, IDS, local, 2.0, True) is out
    kept = torch.tensor([[True, True], [False, True], [False, False], [True, False]])
    expected = 2 * torch.where(kept[..., None], rows * weights[..., None], 0).sum(1)
    torch.testing.assert_close(out, expected)
    with pytest.raises(ValueError, match="`topk_ids` must be given with `expert_map`, got None"):
        kernels.moe_fused_mul_sum(rows, weights, expert_map=local)
    with pytest.raises(TypeError, match="`is_ep` must be True or False, got None"):
        kernels.moe_fused_mul_sum(rows, weights, is_ep=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flashinfers_gate_for_deepseek_writes_what_it_is_given(dtype):
    given = LOGITS.to(dtype), BIAS.to(dtype)
    values, ids, replay = torch.full((5, 2), torch.nan, dtype=dtype), ints(5, 2), torch.full((6, 2), -7).short()
    assert kernels.fused_topk_deepseek(*given, 4, 2, 2, 2.5, values, ids, True, replay, backend="cake") is None
    expected = moe.grouped_topk(
        *(given[0], 2, 4, 2, True),
        scoring_func="sigmoid",
        correction_bias=given[1].float(),
        routed_scaling_factor=2.5,
        group_score="top2_sum",
    )
    assert torch.equal(ids, expected.topk_ids)
    torch.testing.assert_close(values, expected.topk_weights.to(dtype))
    assert replay[:5].tolist() == ids.tolist()
    assert replay[5].tolist() == [-7, -7]
    one_group = ints(5, 2)
    kernels.fused_topk_deepseek(*given, 1, 1, 2, 1.0, values, one_group)
    assert torch.equal(one_group, (given[0].float().sigmoid() + given[1].float()).topk(2).indices.int())
    with pytest.raises(ValueError, match="`topk` must be the columns of `topk_indices`, 2, got 3"):
        kernels.fused_topk_deepseek(*given, 4, 2, 3, 1.0, values, ids)
    with pytest.raises(ValueError, match="`backend` must be"):
        kernels.fused_topk_deepseek(*given, 4, 2, 2, 1.0, values, ids, backend="trtllm")


def test_sums_of_the_kernels_write_what_they_are_given():
    rows, out = torch.randn(3, 4, 8), torch.full((3, 8), torch.nan)
    assert kernels.moe_sum_reduce_triton(rows, out, 2.5) is None
    torch.testing.assert_close(out, 2.5 * rows.sum(1))
    half = torch.full((3, 8), torch.nan).bfloat16()
    assert kernels.moe_topk_sum(rows.bfloat16(), half) is half
    torch.testing.assert_close(half, rows.bfloat16().float().sum(1).bfloat16())
