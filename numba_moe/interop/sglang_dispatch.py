"""`TokenDispatcher` where SGLang's MoE layers look for what moves tokens between ranks.

The base class, and the tuples that go between it and the layer's kernels, are those of the release that is installed.
"""

import importlib
from typing import Any

import torch

from numba_moe.parallel.dispatcher import TokenDispatcher
from numba_moe.reference.parallel import DispatchedTokens
from numba_moe.runtime import checks

STANDARD = "sglang.srt.layers.moe.token_dispatcher.standard"
TOPK = "sglang.srt.layers.moe.topk"


def dispatcher_of(dispatcher: TokenDispatcher, layer: int = 0) -> Any:
    """Make what SGLang's `FusedMoE` takes as its `dispatcher`.

    Parameters
    ----------
    dispatcher : TokenDispatcher
        The way to the other ranks.
    layer : int
        The layer of its location.

    Returns
    -------
    BaseDispatcher
        Of the standard format: rows as they are received, with the ids of this rank's experts, -1 for others. The
        layer's kernels weigh and sum a token's rows; `combine` adds what ranks have, so that the layer must not reduce
        its result again (``reduce_results=False``). Rows travel as they are: kernels that quantise do so themselves.

    Raises
    ------
    ImportError
        SGLang is not installed, or has no standard dispatcher.
    ValueError
        A dispatcher with `reduce="source"`: SGLang's kernels sum the slots of a rank themselves. At a call: experts
        that the kernels choose themselves, which no dispatcher knows; a second `dispatch` before `combine`.
    """
    checks.holds("dispatcher", "one of `reduce='rank'`", dispatcher.reduce == "rank", dispatcher.reduce)
    standard, topk = importlib.import_module(STANDARD), importlib.import_module(TOPK)

    class Dispatcher(standard.BaseDispatcher):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self._sent: DispatchedTokens | None = None

        def dispatch(self, hidden_states: torch.Tensor, topk_output: Any) -> Any:
            is_chosen = topk.TopKOutputChecker.format_is_standard(topk_output)
            checks.holds("topk_output", "of the standard format", is_chosen, type(topk_output).__name__)
            ids, weights = topk_output.topk_ids, topk_output.topk_weights
            sent = dispatcher.dispatch(hidden_states, ids, weights, layer=layer, layout="tokens")
            self._sent = sent
            received = {"topk_ids": sent.topk_ids.to(ids.dtype), "topk_weights": sent.topk_weights}
            return standard.StandardDispatchOutput(
                hidden_states=sent.hidden_states,
                hidden_states_scale=None,
                topk_output=topk_output._replace(**received, router_logits=None),  # logits stay with their tokens
            )

        def combine(self, combine_input: Any) -> torch.Tensor:
            sent, self._sent = self._sent, None
            if sent is None:
                raise ValueError("`combine_input` must be of tokens that were dispatched, got none")
            return dispatcher.combine(combine_input.hidden_states, sent)

    return Dispatcher()
