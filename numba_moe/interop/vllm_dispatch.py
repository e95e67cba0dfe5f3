"""`TokenDispatcher` where vLLM's modular kernels look for what moves tokens between ranks.

The base class is that of the release that is installed.
"""

import importlib
from typing import Any

import torch

from numba_moe.parallel.dispatcher import TokenDispatcher
from numba_moe.parallel.group_experts import local_experts
from numba_moe.reference.parallel import DispatchedTokens
from numba_moe.runtime import checks

KERNELS = "vllm.model_executor.layers.fused_moe.modular_kernel"
REDUCING = "vllm.model_executor.layers.fused_moe.topk_weight_and_reduce"


def prepare_and_finalize(dispatcher: TokenDispatcher, layer: int = 0) -> Any:
    """Make what vLLM's modular kernels take as `prepare_finalize`.

    Parameters
    ----------
    dispatcher : TokenDispatcher
        The way to the other ranks.
    layer : int
        The layer of its location, whose experts are each on one rank.

    Returns
    -------
    FusedMoEPrepareAndFinalizeModular
        Of the standard format: rows as they are received, with ids of all experts; those of other ranks are one
        expert that this rank lacks, which vLLM's `expert_map` skips. Rows travel as they are: kernels that quantise
        do so themselves, by `defer_input_quant`.

    Raises
    ------
    ImportError
        vLLM is not installed, or has no modular kernels.
    ValueError
        A dispatcher with `reduce="source"`: vLLM's kernels sum the slots of a rank themselves.
    """
    checks.holds("dispatcher", "one of `reduce='rank'`", dispatcher.reduce == "rank", dispatcher.reduce)
    vllm, reducing = importlib.import_module(KERNELS), importlib.import_module(REDUCING)
    experts = local_experts(dispatcher, layer).to(dispatcher.device)
    here = set(experts.tolist())
    elsewhere = next((expert for expert in range(dispatcher.num_experts) if expert not in here), -1)

    class PrepareAndFinalize(vllm.FusedMoEPrepareAndFinalizeModular):  # type: ignore[name-defined]
        sent: DispatchedTokens

        def __init__(self) -> None:
            """Leave the base class's configurations alone, which nothing here asks for."""

        @property
        def activation_format(self) -> Any:
            return vllm.FusedMoEActivationFormat.Standard

        def topk_indices_dtype(self) -> None:
            return None

        def max_num_tokens_per_rank(self) -> int:
            return dispatcher.max_tokens

        def num_dispatchers(self) -> int:
            return dispatcher.num_ranks

        def output_is_reduced(self) -> bool:
            return True

        def prepare(
            self,
            a1: torch.Tensor,
            topk_weights: torch.Tensor,
            topk_ids: torch.Tensor,
            num_experts: int,
            expert_map: Any,
            apply_router_weight_on_input: bool,
            quant_config: Any,
            defer_input_quant: bool = False,
        ) -> tuple[Any, ...]:
            wanted, experts_of = getattr(quant_config, "quant_dtype", None), dispatcher.num_experts
            deferred = wanted is None or defer_input_quant
            checks.holds("quant_config", "without a dtype for rows, unless deferred", deferred, wanted)
            checks.holds("num_experts", f"{experts_of}, as the dispatcher's", num_experts == experts_of, num_experts)
            if apply_router_weight_on_input:
                top_k = topk_ids.shape[1]
                checks.holds("topk_ids", "of one expert a token, where the input is weighted", top_k == 1, top_k)
                a1 = a1 * topk_weights.to(a1.dtype)
            self.sent = sent = dispatcher.dispatch(a1, topk_ids, topk_weights, layer=layer, layout="tokens")
            ids = torch.where(sent.topk_ids >= 0, experts[sent.topk_ids.clamp(min=0).long()], elsewhere)
            return sent.hidden_states, None, None, ids.to(topk_ids.dtype), sent.topk_weights

        def finalize(
            self,
            output: torch.Tensor,
            fused_expert_output: torch.Tensor,
            topk_weights: torch.Tensor,
            topk_ids: torch.Tensor,
            apply_router_weight_on_input: bool,
            weight_and_reduce_impl: Any,
        ) -> None:
            if isinstance(weight_and_reduce_impl, reducing.TopKWeightAndReduceDelegate):
                weight_and_reduce_impl = reducing.TopKWeightAndReduceContiguous()
            weighted = weight_and_reduce_impl.apply(
                output=None,
                fused_expert_output=fused_expert_output,
                topk_weights=topk_weights,
                topk_ids=topk_ids,
                apply_router_weight_on_input=apply_router_weight_on_input,
            )
            output.copy_(dispatcher.combine(weighted, self.sent))

    return PrepareAndFinalize()
