"""A user's own routing."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from numba_moe import reference
from numba_moe.runtime import checks, formats
from numba_moe.verify.cases.draws import Case, floats, given

TOP_K = 8  # of logits with this number of experts


def input_cases(path: Path, num_experts: int | None, top_k: int | None, block_size: int) -> Iterator[Case]:
    """Yield every op that applies to a user's own routing; nothing in the file is executed."""
    checks.integer("block_size", block_size, 1)
    for name, value in {"num_experts": num_experts, "top_k": top_k}.items():
        if value is not None:
            checks.integer(name, value, 1)
    for name, array in formats.load_routing(path).items():
        label = f"{path.name}: {name}"
        if np.issubdtype(array.dtype, np.floating):
            # float16 keeps its dtype; the rest becomes float32 before either side sees it
            logits = array if array.dtype == np.float16 else array.astype(np.float32)
            experts = logits.shape[1]
            because = f"the number of experts of {label}"
            checks.holds("num_experts", f"{because} = {experts}", num_experts in (None, experts), num_experts)
            count = checks.integer("top_k", top_k or min(TOP_K, experts), 1, experts, f"{because} = {experts}")
            for op in ("topk_softmax", "topk_sigmoid"):
                yield Case(op, label, given(gating_output=logits, top_k=count, renormalize=True))
            chosen = reference.topk_softmax(logits, count).topk_ids
        else:
            chosen = array if array.dtype in (np.int32, np.int64) else array.astype(np.int64)
            least = int(chosen.max(initial=0)) + 1
            experts = num_experts or least
            checks.at_least("num_experts", experts, least, f"1 more than the largest id of {label}")
        # Every expert may leave a block with one slot in it.
        wanted = 4 * (chosen.size + experts * block_size)
        formats.check_memory("block_size", "blocks of every expert", wanted, path.stat().st_size)
        align = given(topk_ids=chosen, block_size=block_size, num_experts=experts)
        yield Case("moe_align_block_size", label, align)
        yield Case("count_tokens_per_expert", label, given(topk_ids=chosen, num_experts=experts))
        if chosen.ndim == 2:
            rows = floats(len(chosen), 64)
            yield Case("moe_permute", label, given(hidden_states=rows, topk_ids=chosen, num_experts=experts))
