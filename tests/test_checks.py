"""Bad arguments get an error that names the argument, the rule and the value, before any launch."""

import inspect
import math
import tracemalloc
import typing

import numpy as np
import pytest
import torch

import numba_moe as moe
from numba_moe import placement, recorder
from numba_moe.placement import DispatchTables, ExpertDispatch, ExpertLocation, dispatch_ids
from numba_moe.runtime import arrays, checks

IDS = torch.zeros(4, 2, dtype=torch.int32)
LOGITS = torch.zeros(4, 8)
ROWS = torch.zeros(4, 16)
WEIGHTS = torch.zeros(4, 2)
UP, DOWN = torch.zeros(8, 8, 16), torch.zeros(8, 16, 4)
INTS = torch.zeros(64, dtype=torch.int32)
MANY = torch.zeros(2**15 + 1, dtype=torch.int32)
FROZEN = np.frombuffer(bytes(32), np.int32)
TABLE = torch.zeros(8, dtype=torch.int32)
META = torch.zeros(8, dtype=torch.int32, device="meta")

BAD = {
    "ids of floats": (lambda: moe.count_tokens_per_expert(LOGITS, 8), TypeError, "`topk_ids` must be of dtype int32 or int64, got float32"),
    "ids as a list": (lambda: moe.count_tokens_per_expert([[0, 1]], 8), TypeError, "`topk_ids` must be a torch tensor, .* got builtins.list"),
    "no ids": (lambda: moe.moe_align_block_size(None, 4, 8), TypeError, "`topk_ids` must be a torch tensor, .* got .*NoneType"),
    "ids of text": (lambda: moe.count_tokens_per_expert(np.array(["a"]), 8), TypeError, "`topk_ids` must be a torch tensor, .* got numpy.ndarray"),
    "ids of rank 3": (lambda: moe.moe_align_block_size(IDS[None], 4, 8), ValueError, r"`topk_ids` must be of 1 or 2 dimensions, got shape \(1, 4, 2\)"),
    "ids of rank 1 to permute": (lambda: moe.moe_permute(ROWS, IDS[0], 8), ValueError, r"`topk_ids` must be of 2 dimensions, got shape \(2,\)"),
    "strided ids": (lambda: moe.count_tokens_per_expert(IDS[:, :1], 8), ValueError, r"`topk_ids` must be contiguous, got shape \(4, 1\) with strides \(2, 1\)"),
    "no experts": (lambda: moe.moe_align_block_size(IDS, 4, 0), ValueError, "`num_experts` must be at least 1, got 0"),
    "half an expert": (lambda: moe.count_tokens_per_expert(IDS, 8.5), TypeError, "`num_experts` must be an integer, got float"),
    "block_size 0": (lambda: moe.moe_align_block_size(IDS, 0, 8), ValueError, "`block_size` must be at least 1, got 0"),
    "block_size True": (lambda: moe.moe_align_block_size(IDS, True, 8), TypeError, "`block_size` must be an integer, got bool"),
    "flag as a number": (lambda: moe.moe_align_block_size(IDS, 4, 8, None, 1), TypeError, "`pad_sorted_ids` must be True or False, got 1"),
    "inactive id past int32": (lambda: moe.moe_align_block_size(IDS, 4, 8, inactive_expert_id=2**31), ValueError, "`inactive_expert_id` must be at most 2147483647, got 2147483648"),
    "positions past int32": (lambda: moe.moe_align_block_size(torch.zeros(100, dtype=torch.int32), 2**30, 8), ValueError, r"`topk_ids` must be small enough for the number of padded positions to fit int32 \(2147483647\)"),
    "map of another length": (lambda: moe.count_tokens_per_expert(IDS, 7, torch.zeros(8, dtype=torch.int32)), ValueError, r"`expert_map` must be of shape \(num_experts,\) = \(7,\), got shape \(8,\)"),
    "map of another library": (lambda: moe.count_tokens_per_expert(IDS, 8, np.zeros(8, np.int32)), TypeError, "`expert_map` must be of the same library as `topk_ids`, got numpy.ndarray"),
    "map on another device": (lambda: moe.count_tokens_per_expert(IDS, 8, META), ValueError, "`expert_map` must be on a CUDA device or the CPU, got meta"),
    "counts of rank 2": (lambda: moe.expert_offsets(IDS), ValueError, "`counts` must be of 1 dimensions"),
    "alignment 0": (lambda: moe.expert_offsets(IDS[0], 0), ValueError, "`alignment` must be at least 1, got 0"),
    "out as a list": (lambda: moe.moe_align_block_size(IDS, 4, 8, out=[IDS]), TypeError, "`out` must be a tuple of 3 arrays, got builtins.list"),
    "out of two": (lambda: moe.moe_align_block_size(IDS, 4, 8, out=(IDS, IDS)), ValueError, "`out` must be a tuple of 3 arrays, got 2"),
    "out of int64": (lambda: moe.moe_align_block_size(IDS, 4, 8, out=(IDS[0].long(),) * 3), TypeError, "`out.sorted_token_ids` must be of dtype int32, got int64"),
    "short out": (lambda: moe.moe_align_block_size(IDS, 4, 8, out=(META[:5], META[:2], META[:1])), ValueError, "`out.sorted_token_ids` must be on a CUDA device or the CPU"),
    "out too short": (lambda: moe.moe_align_block_size(IDS, 4, 8, out=(INTS[:31], INTS[:8], INTS[:1])), ValueError, r"`len\(out.sorted_token_ids\)` must be at least what any routing needs = 32, got 31"),
    "out of other blocks": (lambda: moe.moe_align_block_size(IDS, 4, 8, out=(INTS[:33], INTS[:8], INTS[:1])), ValueError, r"`out.expert_ids` must be of shape \(blocks of `out.sorted_token_ids`,\) = \(9,\), got shape \(8,\)"),
    "out of two sizes": (lambda: moe.moe_align_block_size(IDS, 4, 8, out=(INTS[:32], INTS[:8], INTS[:2])), ValueError, r"`out.num_tokens_post_padded` must be of shape \(1,\) = \(1,\), got shape \(2,\)"),
    "inverse of another shape": (lambda: moe.moe_align_block_size(IDS, 4, 8, inv_sorted_idx=INTS[:8]), ValueError, r"`inv_sorted_idx` must be of shape `topk_ids`.shape = \(4, 2\), got shape \(8,\)"),
    "counts of another length": (lambda: moe.moe_align_block_size(IDS, 4, 8, counts=INTS[:7]), ValueError, r"`counts` must be of shape \(num_experts,\) = \(8,\), got shape \(7,\)"),
    "workspace too small": (lambda: moe.moe_align_block_size(MANY, 4, 8, workspace=INTS), ValueError, r"`len\(workspace\)` must be at least what `align_sizes` says = \d+, got 64"),
    "workspace that is not aligned": (lambda: moe.moe_align_block_size(IDS, 4, 8, workspace=INTS[1:]), ValueError, "`workspace` must be at an address that is a multiple of 16 bytes, got 4 more"),
    "read-only counts": (lambda: moe.moe_align_block_size(IDS.numpy(), 4, 8, counts=FROZEN), ValueError, "`counts` must be writable and contiguous, got an array that is read-only or strided"),
    "strided out": (lambda: moe.moe_align_block_size(IDS.numpy(), 4, 8, out=(np.zeros(64, np.int32)[::-2], FROZEN, FROZEN)), ValueError, "`out` must be writable and contiguous"),
    "sizes of no experts": (lambda: moe.align_sizes(8, 4, 0), ValueError, "`num_experts` must be at least 1, got 0"),
    "sizes of negative slots": (lambda: moe.align_sizes(-1, 4, 8), ValueError, "`num_slots` must be at least 0, got -1"),
    "batches as floats": (lambda: moe.batched_moe_align_block_size(4, 4, LOGITS[0]), TypeError, "`expert_num_tokens` must be of dtype int32 or int64, got float32"),
    "batches of negative length": (lambda: moe.batched_moe_align_block_size(-1, 4, IDS[0]), ValueError, "`max_tokens_per_batch` must be at least 0, got -1"),
    "batches past int32": (lambda: moe.batched_moe_align_block_size(2**30, 4, IDS[:, 0].contiguous()), ValueError, "`expert_num_tokens` must be small enough for the number of padded positions to fit int32"),
    "adapters of other tokens": (lambda: moe.moe_lora_align_block_size(IDS, IDS[0], 4, 8, 2), ValueError, r"`token_lora_mapping` must be of shape \(num_tokens,\) = \(4,\), got shape \(2,\)"),
    "no adapters": (lambda: moe.moe_lora_align_block_size(IDS, INTS[:4], 4, 8, 0), ValueError, "`max_loras` must be at least 1, got 0"),
    "too few flags": (lambda: moe.moe_lora_align_block_size(IDS, INTS[:4], 4, 8, 3, INTS[:2]), ValueError, r"`len\(adapter_enabled\)` must be at least max_loras = 3, got 2"),
    "adapters of int64": (lambda: moe.moe_lora_align_block_size(IDS, INTS[:4], 4, 8, 3, None, INTS.long()), TypeError, "`lora_ids` must be of dtype int32, got int64"),
    "too many virtual experts": (lambda: moe.moe_lora_align_block_size(IDS, INTS[:4], 4, 2**20, 2**20), ValueError, "`max_loras` must be small enough for max_loras \\* num_experts to fit int32"),
    "adapters past int32": (lambda: moe.moe_lora_align_block_size(IDS, INTS[:4], 2**20, 8, 2**10), ValueError, "`topk_ids` must be small enough for the number of padded positions to fit int32"),
    "slices of rank 2": (lambda: moe.make_ragged_metadata(IDS, 8), ValueError, "`slice_sizes` must be of 1 dimensions"),
    "negative rows": (lambda: moe.make_ragged_metadata(IDS[0], -8), ValueError, "`num_rows` must be at least 0, got -8"),
    "logits of doubles": (lambda: moe.topk_softmax(LOGITS.double(), 2), TypeError, "`gating_output` must be of dtype float32 or float16 or bfloat16, got float64"),
    "logits of rank 1": (lambda: moe.topk_softmax(LOGITS[0], 2), ValueError, r"`gating_output` must be of 2 dimensions, got shape \(8,\)"),
    "transposed logits": (lambda: moe.topk_softmax(LOGITS.T, 2), ValueError, r"`gating_output` must be contiguous in its last dimension, got strides \(1, 8\)"),
    "no columns": (lambda: moe.topk_softmax(LOGITS[:, :0], 1), ValueError, "`num_experts .*` must be at least 1, got 0"),
    "top_k 0": (lambda: moe.topk_sigmoid(LOGITS, 0), ValueError, "`top_k` must be at least 1, got 0"),
    "top_k above the experts": (lambda: moe.topk_sigmoid(LOGITS, 9), ValueError, "`top_k` must be at most num_experts = 8, got 9"),
    "half a bias": (lambda: moe.topk_softmax(LOGITS, 2, False, torch.zeros(8).half()), TypeError, "`correction_bias` must be of dtype float32, got float16"),
    "short bias": (lambda: moe.topk_softmax(LOGITS, 2, False, torch.zeros(7)), ValueError, r"`correction_bias` must be of shape \(num_experts,\) = \(8,\), got shape \(7,\)"),
    "renormalize as text": (lambda: moe.topk_softmax(LOGITS, 2, "yes"), TypeError, "`renormalize` must be True or False, got 'yes'"),
    "groups that do not divide": (lambda: moe.grouped_topk(LOGITS, 2, 3, 1), ValueError, "`num_expert_group` must be a divisor of num_experts = 8, got 3"),
    "more groups than there are": (lambda: moe.grouped_topk(LOGITS, 2, 4, 5), ValueError, "`topk_group` must be at most num_expert_group = 4, got 5"),
    "more experts than the groups hold": (lambda: moe.grouped_topk(LOGITS, 3, 4, 1), ValueError, "`top_k` must be at most the 2 experts of 1 groups, got 3"),
    "unknown scoring": (lambda: moe.grouped_topk(LOGITS, 2, 4, 2, scoring_func="relu"), ValueError, "`scoring_func` must be one of 'softmax', 'sigmoid', 'softplus_sqrt', 'raw', got 'relu'"),
    "unknown group score": (lambda: moe.grouped_topk(LOGITS, 2, 4, 2, group_score="min"), ValueError, "`group_score` must be one of 'max', 'top2_sum', 'topk_sum', got 'min'"),
    "a sum of no experts": (lambda: moe.grouped_topk(LOGITS, 1, 4, 2, group_score="topk_sum"), ValueError, "`top_k` must be at least topk_group = 2, got 1"),
    "selecting by unknown scores": (lambda: moe.select_experts(LOGITS, 2, scoring_func="tanh"), ValueError, "`scoring_func` must be one of .* got 'tanh'"),
    "selecting more than there are": (lambda: moe.select_experts(LOGITS, 9), ValueError, "`top_k` must be at most the 8 experts of 1 groups, got 9"),
    "a negative cap": (lambda: moe.select_experts(LOGITS, 2, softcap=-1.0), ValueError, "`softcap` must be 0 or more, got -1.0"),
    "an unknown use of the bias": (lambda: moe.select_experts(LOGITS, 2, bias_mode="both"), ValueError, "`bias_mode` must be one of 'choice', 'logits', got 'both'"),
    "more zero experts than experts": (lambda: moe.select_experts(LOGITS, 2, num_zero_experts=9), ValueError, "`num_zero_experts` must be at most num_experts = 8, got 9"),
    "an epsilon below 0": (lambda: moe.select_experts(LOGITS, 2, renormalize_epsilon=-1.0), ValueError, "`renormalize_epsilon` must be 0, or at least 1e-30, got -1.0"),
    "scales of other experts": (lambda: moe.select_experts(LOGITS, 2, expert_scale=LOGITS[0, :2].clone()), ValueError, r"`expert_scale` must be of shape \(num_experts,\)"),
    "scales of another dtype": (lambda: moe.weigh_experts(LOGITS, IDS, expert_scale=LOGITS[0].double()), TypeError, "`expert_scale` must be of dtype float32, got float64"),
    "a shared weight as text": (lambda: moe.select_experts(LOGITS, 2, shared_expert_weight="1"), TypeError, "`shared_expert_weight` must be a number, got str"),
    "shared weights over 0": (lambda: moe.select_experts(LOGITS, 2, num_fused_shared_experts=1, apply_routed_scaling_factor_on_output=False, routed_scaling_factor=0.0), ValueError, "`routed_scaling_factor` must be other than 0 .*, got 0.0"),
    "identity of doubles": (lambda: moe.select_experts(LOGITS, 2, identity_weights=torch.zeros(4).double()), TypeError, "`identity_weights` must be of dtype float32, got float64"),
    "identity of other tokens": (lambda: moe.select_experts(LOGITS, 2, identity_weights=torch.zeros(5)), ValueError, r"`identity_weights` must be of shape \(num_tokens,\) = \(4,\), got shape \(5,\)"),
    "padding on the host": (lambda: moe.select_experts(LOGITS, 2, num_token_non_padded=3), TypeError, "`num_token_non_padded` must be of the same library as `gating_output`, got builtins.int"),
    "two numbers of tokens": (lambda: moe.select_experts(LOGITS, 2, num_token_non_padded=INTS[:2]), ValueError, r"`num_token_non_padded` must be of shape \(\) or \(1,\) = \(1,\), got shape \(2,\)"),
    "padding as numbers": (lambda: moe.select_experts(LOGITS, 2, is_padding=INTS[:4]), TypeError, "`is_padding` must be of dtype bool, got int32"),
    "a table alone": (lambda: moe.select_experts(LOGITS, 2, dispatch=INTS[:8]), TypeError, "`dispatch` must be a tuple of 5 arrays, got an array"),
    "a table of too few experts": (lambda: moe.select_experts(LOGITS, 2, dispatch=DispatchTables(INTS[:7])), ValueError, r"`len\(dispatch.physical_map\)` must be at least experts = 8, got 7"),
    "a table without its counts": (lambda: moe.select_experts(LOGITS, 2, dispatch=DispatchTables(INTS.view(8, 8), algorithm="hash")), TypeError, "`num_valid` must be of the same library"),
    "counts of chosen as floats": (lambda: moe.select_experts(LOGITS, 2, counts=LOGITS[0]), TypeError, "`counts` must be of dtype int32 or int64, got float32"),
    "three rows of counts": (lambda: moe.select_experts(LOGITS, 2, counts=INTS[:6].view(3, 2)), ValueError, "`counts` must be of a power of two of rows, got 3 rows"),
    "a flag of int64": (lambda: moe.select_experts(LOGITS, 2, counts_enabled=INTS[:1].long()), TypeError, "`counts_enabled` must be of dtype int32, got int64"),
    "ids of another dtype": (lambda: moe.select_experts(LOGITS, 2, indices_dtype=torch.uint8), ValueError, "`indices_dtype` must be one of 'int32', 'int64', 'int16', got 'uint8'"),
    "ids too narrow": (lambda: moe.select_experts(torch.zeros(1, 2**15 + 1), 2, indices_dtype="int16"), ValueError, "`indices_dtype` must be wide enough for expert 32768, got int16"),
    "options and a gradient": (lambda: moe.select_experts(LOGITS.clone().requires_grad_(), 2, identity_weights=torch.zeros(4)), ValueError, "`identity_weights` must be None where a gradient is wanted, as what is written has none, got memory to write"),
    "given ids of floats": (lambda: moe.weigh_experts(LOGITS, LOGITS), TypeError, "`topk_ids` must be of dtype int32 or int64 or int16, got float32"),
    "given ids of other tokens": (lambda: moe.weigh_experts(LOGITS, IDS[:3]), ValueError, r"`topk_ids` must be of shape \(num_tokens, top_k\) = \(4, 2\), got shape \(3, 2\)"),
    "token ids of other tokens": (lambda: moe.weigh_experts(LOGITS, IDS, input_ids=INTS[:3]), ValueError, r"`input_ids` must be of shape \(num_tokens,\) = \(4,\), got shape \(3,\)"),
    "a short bias of logits": (lambda: moe.weigh_experts(LOGITS, IDS, logit_bias=torch.zeros(7)), ValueError, r"`logit_bias` must be of shape \(num_experts,\) = \(8,\), got shape \(7,\)"),
    "routing to blocks of 0": (lambda: moe.route(LOGITS, 2, 0), ValueError, "`block_size` must be at least 1, got 0"),
    "routing by a short map": (lambda: moe.route(LOGITS, 2, 4, expert_map=INTS[:7]), ValueError, r"`expert_map` must be of shape \(experts that slots are sorted by,\) = \(8,\), got shape \(7,\)"),
    "routing to unknown places": (lambda: moe.route(LOGITS, 2, 4, dispatch=DispatchTables(INTS)), ValueError, "`num_physical_experts` must be given with `dispatch`, and with it alone, got None"),
    "raw scores of doubles": (lambda: moe.topk_raw(LOGITS.double(), 2), TypeError, "`gating_output` must be of dtype float32 or float16 or bfloat16, got float64"),
    "softplus of rank 1": (lambda: moe.topk_softplus_sqrt(LOGITS[0], 2), ValueError, "`gating_output` must be of 2 dimensions"),
    "doubles that require a gradient": (lambda: moe.topk_softmax(LOGITS.double().requires_grad_(), 2), TypeError, "`gating_output` must be of dtype"),
    "factor as text": (lambda: moe.grouped_topk(LOGITS, 2, 4, 2, routed_scaling_factor="2"), TypeError, "`routed_scaling_factor` must be a number, got str"),
    "rows of integers": (lambda: moe.moe_permute(IDS, IDS, 8), TypeError, "`hidden_states` must be of dtype"),
    "ids of other tokens": (lambda: moe.moe_permute(ROWS[:3], IDS, 8), ValueError, r"`topk_ids` must be of shape \(num_tokens, top_k\) = \(3, 2\), got shape \(4, 2\)"),
    "top_k of no columns": (lambda: moe.moe_permute(ROWS, IDS[:, :0].contiguous(), 8), ValueError, "`top_k .*` must be at least 1, got 0"),
    "scales of doubles": (lambda: moe.moe_permute(ROWS, IDS, 8, scales=ROWS.double()), TypeError, "`scales` must be of dtype float32 or .* got float64"),
    "scales of other tokens": (lambda: moe.moe_permute(ROWS, IDS, 8, scales=ROWS[:3]), ValueError, r"`scales` must be of shape \(num_tokens, ...\) = \(4, 16\), got shape \(3, 16\)"),
    "scales in columns": (lambda: moe.moe_permute(ROWS, IDS, 8, scales=torch.zeros(6, 4).T), ValueError, "`scales` must be contiguous in its last dimension"),
    "rows aligned to nothing": (lambda: moe.moe_permute(ROWS, IDS, 8, alignment=0), ValueError, "`alignment` must be at least 1, got 0"),
    "rows past int32": (lambda: moe.moe_permute(ROWS, IDS, 8, alignment=2**30), ValueError, "`topk_ids` must be small enough for the number of rows to fit int32"),
    "padding as a number": (lambda: moe.moe_permute(ROWS, IDS, 8, zero_padding=0), TypeError, "`zero_padding` must be True or False, got 0"),
    "doubles to permute in a graph": (lambda: moe.moe_permute(ROWS.double().requires_grad_(), IDS, 8), TypeError, "`hidden_states` must be of dtype"),
    "batches of no rows": (lambda: moe.moe_permute_masked(ROWS, IDS, 8, 0), ValueError, "`max_m` must be at least 1, got 0"),
    "rows of batches past int32": (lambda: moe.moe_permute_masked(ROWS, IDS, 8, 2**30), ValueError, "`max_m` must be small enough for the number of rows to fit int32"),
    "more batches than experts": (lambda: moe.moe_permute_masked(ROWS, IDS, 8, 4, num_local_experts=9), ValueError, "`num_local_experts` must be at most num_experts = 8, got 9"),
    "ids of floats to reorder": (lambda: moe.moe_reorder(LOGITS, 8), TypeError, "`topk_ids` must be of dtype int32 or int64, got float32"),
    "a sum of matrices": (lambda: moe.moe_sum(ROWS), ValueError, r"`hidden_states` must be of 3 dimensions, got shape \(4, 16\)"),
    "a sum with other ids": (lambda: moe.moe_sum(ROWS[:, None], IDS), ValueError, r"`topk_ids` must be of shape \(num_tokens, top_k\) = \(4, 1\), got shape \(4, 2\)"),
    "a sum of integers": (lambda: moe.moe_sum(ROWS[:, None], out_dtype="int32"), ValueError, "`out_dtype` must be one of float32, float16, bfloat16, got int32"),
    "copies below 0": (lambda: moe.constant_experts(ROWS, WEIGHTS, IDS, 2, num_copies=-1), ValueError, "`num_copies` must be .* got -1"),
    "constants of another width": (lambda: moe.constant_experts(ROWS, WEIGHTS, IDS, 2, constants=LOGITS.reshape(-1, 1)), ValueError, r"`constants` must be of shape \(num_constants, hidden\)"),
    "constants of another dtype": (lambda: moe.constant_experts(ROWS, WEIGHTS, IDS, 2, constants=ROWS.half()), TypeError, "`constants` must be of dtype float32, got float16"),
    "other combined rows": (lambda: moe.constant_experts(ROWS, WEIGHTS, IDS, 2, combined=ROWS[:2]), ValueError, r"`combined` must be of shape `hidden_states`.shape"),
    "an unknown dtype": (lambda: moe.moe_unpermute(ROWS, WEIGHTS, IDS, out_dtype="floaty"), ValueError, "`out_dtype` must be a torch dtype or the name of one, got 'floaty'"),
    "a dtype as a number": (lambda: moe.moe_unpermute(ROWS, WEIGHTS, IDS, out_dtype=32), TypeError, "`out_dtype` must be a torch dtype or the name of one, got int"),
    "a combination's factor as text": (lambda: moe.moe_unpermute(ROWS, WEIGHTS, IDS, routed_scaling_factor="2"), TypeError, "`routed_scaling_factor` must be a number, got str"),
    "weights of another shape": (lambda: moe.moe_unpermute(ROWS, WEIGHTS[:3], IDS), ValueError, r"`inv_permuted_idx` must be of shape `topk_weights`.shape = \(3, 2\), got shape \(4, 2\)"),
    "an unknown activation": (lambda: moe.moe_activation(ROWS, activation="relu"), ValueError, "`activation` must be one of 'silu', .* got 'relu'"),
    "gates of integers": (lambda: moe.moe_activation(IDS), TypeError, "`gate_up` must be of dtype"),
    "half a pair": (lambda: moe.moe_activation(ROWS[:, :5].contiguous()), ValueError, "`gate_up` must be of an even number of columns, got 5"),
    "strided gates": (lambda: moe.moe_activation(ROWS[:, :4]), ValueError, "`gate_up` must be contiguous"),
    "a bias without offsets": (lambda: moe.moe_activation(ROWS, None, ROWS), ValueError, "`bias` must be None without `expert_first_token_offset`, got an array"),
    "offsets of int32": (lambda: moe.moe_activation(ROWS, INTS[:3]), TypeError, "`expert_first_token_offset` must be of dtype int64, got int32"),
    "offsets of no expert": (lambda: moe.moe_activation(ROWS, INTS[:1].long()), ValueError, r"`len\(expert_first_token_offset\)` must be at least num_experts \+ 1 = 2, got 1"),
    "biases of other experts": (lambda: moe.moe_activation(ROWS, INTS[:3].long(), ROWS), ValueError, r"`bias` must be of shape \(num_experts, columns of `gate_up`\) = \(2, 16\), got shape \(4, 16\)"),
    "a bias of another dtype": (lambda: moe.moe_activation(ROWS, INTS[:5].long(), ROWS.half()), TypeError, "`bias` must be of dtype float32, got float16"),
    "a limit of 0": (lambda: moe.moe_activation(ROWS, limit=0), ValueError, "`limit` must be above 0, got 0"),
    "a beta of another activation": (lambda: moe.moe_activation(ROWS, activation="gelu", beta=1.0), ValueError, "`beta` must be None for 'gelu', got 1.0"),
    "an alpha of another activation": (lambda: moe.moe_activation(ROWS, activation="relu2", alpha=1.0), ValueError, "`alpha` must be None for 'relu2', got 1.0"),
    "a linear_beta of another activation": (lambda: moe.moe_activation(ROWS, linear_beta=1.0), ValueError, "`linear_beta` must be None for 'silu', got 1.0"),
    "a limit of none": (lambda: moe.moe_activation(ROWS, activation="none", limit=1.0), ValueError, "`limit` must be None for 'none', got 1.0"),
    "a beta of 0": (lambda: moe.moe_activation(ROWS, activation="situ", beta=0), ValueError, "`beta` must be above 0, got 0"),
    "an infinite linear_beta": (lambda: moe.moe_activation(ROWS, activation="situ", linear_beta=float("inf")), ValueError, "`linear_beta` must be a finite number that float32 holds, got inf"),
    "gates in turns with nothing": (lambda: moe.moe_activation(ROWS, activation="relu2_no_mul", interleaved=True), ValueError, "`interleaved` must be None or False for 'relu2_no_mul', which has no ups, got True"),
    "ups that are not multiplied": (lambda: moe.fused_experts(ROWS, UP, DOWN, WEIGHTS, IDS, activation="relu2_no_mul"), ValueError, r"`gate_up_proj` must be of shape \(num_experts, width, hidden\)"),
    "a block of an unknown option": (lambda: moe.MoEBlock(8, 8, 4, 2, activation_options={"gamma": 1}), ValueError, "`activation_options` must be one of 'interleaved', .* got 'gamma'"),
    "a limit as text": (lambda: moe.moe_activation(ROWS, limit="7"), TypeError, "`limit` must be a number, got str"),
    "interleaved as a number": (lambda: moe.moe_activation(ROWS, interleaved=1), TypeError, "`interleaved` must be True or False, got 1"),
    "experts without an activation": (lambda: moe.fused_experts(ROWS, UP, DOWN, WEIGHTS, IDS, activation="none"), ValueError, "`activation` must be one of .* got 'none'"),
    "experts of rank 2": (lambda: moe.fused_experts(ROWS, UP[0], DOWN, WEIGHTS, IDS), ValueError, "`gate_up_proj` must be of 3 dimensions"),
    "experts of another dtype": (lambda: moe.fused_experts(ROWS, UP.half(), DOWN, WEIGHTS, IDS), TypeError, "`gate_up_proj` must be of dtype float32, got float16"),
    "strided experts": (lambda: moe.fused_experts(ROWS, UP[::2], DOWN[::2], WEIGHTS, IDS), ValueError, "`gate_up_proj` must be contiguous, or the transpose of what is, got strides"),
    "experts of another width": (lambda: moe.fused_experts(ROWS, UP, DOWN[:, :, :3].contiguous(), WEIGHTS, IDS), ValueError, r"`gate_up_proj` must be of shape \(num_experts, 2 \* width, hidden\) = \(8, 6, 16\)"),
    "a bias of another width": (lambda: moe.fused_experts(ROWS, UP, DOWN, WEIGHTS, IDS, down_bias=ROWS), ValueError, r"`down_bias` must be of shape \(num_experts, columns of its matrix\) = \(8, 16\), got shape \(4, 16\)"),
    "a map of too few experts": (lambda: moe.fused_experts(ROWS, UP, DOWN, WEIGHTS, IDS, expert_map=TABLE[:7]), ValueError, r"`len\(expert_map\)` must be at least the experts of `down_proj` = 8, got 7"),
    "ids of fewer tokens": (lambda: moe.fused_experts(ROWS, UP, DOWN, WEIGHTS, IDS[:3]), ValueError, r"`topk_ids` must be of shape \(num_tokens, top_k\) = \(4, 2\), got shape \(3, 2\)"),
    "weights of fewer tokens": (lambda: moe.fused_experts(ROWS, UP, DOWN, WEIGHTS[:3], IDS), ValueError, r"`topk_weights` must be of shape `topk_ids`.shape = \(4, 2\), got shape \(3, 2\)"),
    "a block on no device": (lambda: moe.MoEBlock(8, 8, 4, 2, device="gpu"), ValueError, "`device` must be a CUDA device, an ordinal of one, or the CPU, got 'gpu'"),
    "a block on a list": (lambda: moe.MoEBlock(8, 8, 4, 2, device=["cpu"]), TypeError, "`device` must be .*, got list"),
    "tables on no device": (lambda: ExpertDispatch(ExpertLocation.trivial(1, 4), 0, "gpu"), ValueError, "`device` must be a CUDA device, .*, got 'gpu'"),
    "a block of too few experts": (lambda: moe.MoEBlock(8, 8, 2, 3), ValueError, "`top_k` must be at most num_experts = 2, got 3"),
    "a block of an unknown activation": (lambda: moe.MoEBlock(8, 8, 4, 2, activation="relu"), ValueError, "`activation` must be one of 'silu', .* got 'relu'"),
    "dispatch by an unknown algorithm": (lambda: dispatch_ids(IDS, TABLE, algorithm="lp"), ValueError, "`algorithm` must be one of 'static', 'dynamic', 'hash', 'fake', got 'lp'"),
    "a table of int64": (lambda: dispatch_ids(IDS, TABLE.long()), TypeError, "`physical_map` must be of dtype int32, got int64"),
    "a table of replicas without a choice": (lambda: dispatch_ids(IDS, TABLE[None]), ValueError, r"`physical_map` must be of 1 dimensions, got shape \(1, 8\)"),
    "a table without replicas": (lambda: dispatch_ids(IDS, TABLE, algorithm="hash"), ValueError, r"`physical_map` must be of 2 dimensions, got shape \(8,\)"),
    "an empty table": (lambda: dispatch_ids(IDS, TABLE[:0]), ValueError, r"`physical_map` must be not empty, got shape \(0,\)"),
    "no numbers of replicas": (lambda: dispatch_ids(IDS, TABLE[None], algorithm="hash"), TypeError, "`num_valid` must be of the same library as `topk_ids`, got builtins.NoneType"),
    "numbers of other experts": (lambda: dispatch_ids(IDS, TABLE[None], TABLE, algorithm="hash"), ValueError, r"`num_valid` must be of shape \(num_experts,\) = \(1,\), got shape \(8,\)"),
    "numbers for static": (lambda: dispatch_ids(IDS, TABLE, TABLE), ValueError, "`num_valid` must be None with the algorithm 'static', got an array"),
    "no step": (lambda: dispatch_ids(IDS, TABLE[None], TABLE[:1], algorithm="dynamic"), TypeError, "`step` must be of the same library as `topk_ids`, got builtins.NoneType"),
    "a step as a number": (lambda: dispatch_ids(IDS, TABLE[None], TABLE[:1], algorithm="dynamic", step=3), TypeError, "`step` must be of the same library as `topk_ids`, got builtins.int"),
    "a step for fake": (lambda: dispatch_ids(IDS, TABLE, algorithm="fake", step=TABLE), ValueError, "`step` must be None with the algorithm 'fake', got an array"),
    "a number of tokens on the host": (lambda: dispatch_ids(IDS, TABLE, num_token_non_padded=3), TypeError, "`num_token_non_padded` must be of the same library as `topk_ids`, got builtins.int"),
    "several numbers of tokens": (lambda: dispatch_ids(IDS, TABLE, num_token_non_padded=IDS[0]), ValueError, r"`num_token_non_padded` must be of shape \(\) or \(1,\) = \(1,\), got shape \(2,\)"),
    "a seed below 0": (lambda: dispatch_ids(IDS, TABLE, seed=-1), ValueError, "`seed` must be at least 0, got -1"),
    "counters of floats": (lambda: dispatch_ids(IDS, TABLE, counts=LOGITS[0]), TypeError, "`counts` must be of dtype int32 or int64, got float32"),
    "out of another dtype": (lambda: dispatch_ids(IDS, TABLE, out=IDS.long()), TypeError, "`out` must be of dtype int32, got int64"),
    "out of another shape": (lambda: dispatch_ids(IDS, TABLE, out=IDS[:2]), ValueError, r"`out` must be of shape `topk_ids`.shape = \(4, 2\), got shape \(2, 2\)"),
    "index of int64": (lambda: moe.moe_unpermute(ROWS, WEIGHTS, IDS.long()), TypeError, "`inv_permuted_idx` must be of dtype int32, got int64"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name, device, monkeypatch):
    monkeypatch.setattr(arrays, "empty", lambda *_, **__: pytest.fail("allocated before checking"))
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def takes_float(parameter):
    return float in (parameter.annotation, *typing.get_args(parameter.annotation))


def is_called(value):
    """Whether something public is a function, or a class that is neither an exception nor a tuple of results."""
    return callable(value) and not (isinstance(value, type) and issubclass(value, Exception | tuple))


FLOAT_OPTIONS = [
    (name, option)
    for package in (moe, placement, recorder)
    for name in package.__all__
    if is_called(getattr(package, name))
    for option, parameter in inspect.signature(getattr(package, name)).parameters.items()
    if takes_float(parameter)
]
LOCATION = ExpertLocation.trivial(1, 4)
# What each function with such an option takes besides.
CALLS = {
    "Balancer": lambda **option: placement.Balancer(
        [{"w": torch.ones(4, 2)}], lambda: np.ones((1, 4), int), placement.ExpertDispatch(LOCATION, 0, "cpu"), **option
    ),
    "MoEBlock": lambda **option: moe.MoEBlock(8, 8, 4, 2, **option),
    "fused_experts": lambda **option: moe.fused_experts(ROWS, UP, DOWN, WEIGHTS, IDS, **option),
    "grouped_topk": lambda **option: moe.grouped_topk(LOGITS, 2, 4, 2, **option),
    "layers_worth_moving": lambda **option: placement.layers_worth_moving(
        np.ones((1, 4)), LOCATION, LOCATION, **option
    ),
    "make_app": lambda **option: recorder.make_app(
        recorder.ExpertDistributionRecorder(1, 4, mode="stat", device="cpu"), ".", **option
    ),
    "moe_activation": lambda **option: moe.moe_activation(ROWS, **option),
    "moe_sum": lambda **option: moe.moe_sum(ROWS[:, None], **option),
    "moe_unpermute": lambda **option: moe.moe_unpermute(ROWS, WEIGHTS, IDS, **option),
    "route": lambda **option: moe.route(LOGITS, 2, 4, **option),
    "select_experts": lambda **option: moe.select_experts(LOGITS, 2, **option),
    "simulate": lambda **option: placement.simulate(np.ones((1, 1, 4)), 4, 1, 1, 2, **option),
    "weigh_experts": lambda **option: moe.weigh_experts(LOGITS, IDS, **option),
}
NO_LIMIT = ("limit", "softcap")  # which infinity stands for


@pytest.mark.parametrize(("name", "option"), FLOAT_OPTIONS)
def test_a_float_past_float32_is_refused_by_name(name, option):
    values = [1e39, -1e39, 10**400, -(10**5000), math.nan, -math.inf]
    for value in values if option in NO_LIMIT else [*values, math.inf]:
        with pytest.raises(ValueError, match=f"^`{option}` must be "):
            CALLS[name](**{option: value})
    with pytest.raises(TypeError, match=f"^`{option}` must be a number, got str"):
        CALLS[name](**{option: "1"})


@pytest.mark.parametrize(("name", "option"), [pair for pair in FLOAT_OPTIONS if pair[1] in NO_LIMIT])
def test_an_infinite_limit_is_none(name, option):
    none = None if option == "limit" else 0.0
    found, wanted = (CALLS[name](**{option: value}) for value in (math.inf, none))
    for part, expected in zip(*map(torch.utils._pytree.tree_leaves, (found, wanted)), strict=True):
        assert torch.equal(part, expected)


def test_a_cap_that_float32_makes_0_is_refused():
    with pytest.raises(ValueError, match="`softcap` must be 0, or what float32 holds above 0, got 1e-60"):
        moe.select_experts(LOGITS, 2, softcap=1e-60)
    with pytest.raises(ValueError, match="`routed_scaling_factor` must be large enough for float32 to hold 1 over it"):
        moe.select_experts(
            *(LOGITS, 2),
            num_fused_shared_experts=1,
            apply_routed_scaling_factor_on_output=False,
            routed_scaling_factor=1e-39,
        )


NAMES = {
    "scoring_func": lambda value: moe.grouped_topk(LOGITS, 2, 4, 2, scoring_func=value),
    "group_score": lambda value: moe.grouped_topk(LOGITS, 2, 4, 2, group_score=value),
    "bias_mode": lambda value: moe.select_experts(LOGITS, 2, bias_mode=value),
    "algorithm": lambda value: dispatch_ids(IDS, TABLE, algorithm=value),
    "activation": lambda value: moe.moe_activation(ROWS, activation=value),
}


@pytest.mark.parametrize("value", [np.array(["max", "choice"]), torch.zeros(2), np.zeros(1), ["max"], 3], ids=repr)
@pytest.mark.parametrize("argument", NAMES)
def test_what_is_no_text_is_no_name(argument, value):
    with pytest.raises(TypeError, match=f"^`{argument}` must be one of '.*, got {type(value).__name__}"):
        NAMES[argument](value)


def test_a_memoryview_is_no_array_and_no_name():
    view = memoryview(bytearray(16))  # which has no hash, and says so by a ValueError
    with pytest.raises(TypeError, match=r"^`topk_ids` must be a torch tensor, .*, got builtins.memoryview"):
        moe.count_tokens_per_expert(view, 8)
    with pytest.raises(TypeError, match=r"^`expert_map` must be of the same library as `topk_ids`, got .*memoryview"):
        moe.count_tokens_per_expert(IDS, 8, view)
    with pytest.raises(TypeError, match=r"^`num_experts` must be an integer, got memoryview"):
        moe.count_tokens_per_expert(IDS, view)
    with pytest.raises(TypeError, match=r"^`scoring_func` must be one of .*, got memoryview"):
        moe.select_experts(LOGITS, 2, scoring_func=view)


@pytest.mark.parametrize("value", [np.zeros(2), torch.zeros(1), False, np.bool_(False), [0]], ids=repr)
@pytest.mark.parametrize(
    "option",
    ["softcap", "num_fused_shared_experts", "num_zero_experts", "zero_expert_id"],
)
def test_an_array_or_a_flag_is_no_number(option, value):
    moe.select_experts(LOGITS, 2)  # whose plan is not that of what only equals its options
    for function in (moe.select_experts, moe.weigh_experts, moe.route):
        arguments = {moe.select_experts: (2,), moe.weigh_experts: (IDS,), moe.route: (2, 4)}[function]
        with pytest.raises(TypeError, match=f"^`{option}` must be "):
            function(LOGITS, *arguments, **{option: value})


@pytest.mark.parametrize("sizes", [[2**40], [2**31 - 1, 2**31 - 1], [2**62] * 4, [1, -5, 2**31 - 1]])
def test_slices_past_int32_are_refused_before_memory_is_asked_for(sizes):
    dtypes = [torch.int64] if max(sizes) >= 2**31 else [torch.int64, torch.int32]
    for dtype in dtypes:
        with pytest.raises(ValueError, match="`slice_sizes` must be of no more rows together than int32 holds"):
            moe.make_ragged_metadata(torch.tensor(sizes, dtype=dtype), 10)


def test_memory_of_a_schedule_follows_from_its_length():
    tracemalloc.start()
    ragged = moe.make_ragged_metadata(torch.tensor([5, 2**31 - 6]), 40)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert ragged.slice_offsets.tolist() == [0, 5, 2**31 - 1]
    assert ragged.block_schedule[0].tolist() == [0, 1, 1 << 16 | 1, 2 << 16 | 1]
    assert peak < 2**20
    rows, offset = torch.ones(2, 8), torch.tensor([0, 1, 2**40])
    tracemalloc.start()
    assert moe.moe_activation(rows, offset, torch.ones(2, 8), activation="none").tolist() == [[2.0] * 8] * 2
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_too_many_slots():
    checks.fits_int32("topk_ids", 2**31 - 1, "the number of slots")
    with pytest.raises(ValueError, match="got the number of slots = 2147483648"):
        checks.fits_int32("topk_ids", 2**31, "the number of slots")
    huge = torch.zeros(1, dtype=torch.int32).expand(2**31)
    with pytest.raises(ValueError, match="`topk_ids` must be contiguous"):
        moe.count_tokens_per_expert(huge, 8)


ROUTED = torch.tensor([[3, 1], [0, -1], [-1, -1], [2, 0]], dtype=torch.int32)
BAD_DATA = {
    "out of range": (3, 1, 8, r"`topk_ids` must be -1 or in \[0, num_experts = 8\), got another id at token 3, k 1"),
    "below -1": (1, 1, -2, "got another id at token 1, k 1"),
    "twice": (3, 1, 2, "`topk_ids` must be distinct experts for each token, got an expert again at token 3, k 1"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_validation_names_the_first_bad_token(name, device, monkeypatch):
    token, k, value, message = BAD_DATA[name]
    ids = ROUTED.clone()
    ids[token, k] = value
    moe.count_tokens_per_expert(ids.to(device), 8)
    monkeypatch.setattr(checks, "VALIDATE", True)
    moe.count_tokens_per_expert(ROUTED.to(device), 8)
    with pytest.raises(ValueError, match=message):
        moe.count_tokens_per_expert(ids.to(device), 8)
    if name != "twice":
        with pytest.raises(ValueError, match=f"another id at slot {2 * token + k}"):
            moe.moe_align_block_size(ids.ravel().to(device), 4, 8)


def test_validation_names_the_first_bad_logit(device, monkeypatch):
    logits = LOGITS.clone()
    logits[2, 5] = torch.nan
    moe.topk_softmax(logits.to(device), 2)
    monkeypatch.setattr(checks, "VALIDATE", True)
    moe.topk_softmax(LOGITS.to(device), 2)
    with pytest.raises(ValueError, match="`gating_output` must be finite, got another value at token 2, expert 5"):
        moe.topk_softmax(logits.to(device), 2)


def test_numbers_of_other_libraries_are_numbers():
    assert moe.count_tokens_per_expert(IDS, np.int64(8)).tolist() == [8, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.gpu
def test_mixed_devices_name_both():
    with pytest.raises(ValueError, match="`expert_map` must be on the device of `topk_ids`, cuda:0, got cpu"):
        moe.count_tokens_per_expert(IDS.cuda(), 8, torch.zeros(8, dtype=torch.int32))
    with pytest.raises(ValueError, match="`correction_bias` must be on the device of `gating_output`, cpu, got cuda:0"):
        moe.topk_softmax(LOGITS, 2, False, torch.zeros(8, device="cuda"))


def test_validation_follows_the_environment(device, monkeypatch):
    ids = ROUTED.clone()
    ids[1, 1] = 8
    moe.count_tokens_per_expert(ids.to(device), 8)
    monkeypatch.setenv("NUMBA_MOE_VALIDATE", "1")
    with pytest.raises(ValueError, match="another id at token 1, k 1"):
        moe.count_tokens_per_expert(ids.to(device), 8)
    monkeypatch.setenv("NUMBA_MOE_VALIDATE", "0")
    moe.count_tokens_per_expert(ids.to(device), 8)
    monkeypatch.delenv("NUMBA_MOE_VALIDATE")
    moe.count_tokens_per_expert(ids.to(device), 8)
