"""A user's own routing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from numba_moe import reference, testing
from numba_moe.cases.draws import Case, floats, given


def input_cases(path: Path, num_experts: int | None, top_k: int, block_size: int) -> Iterator[Case]:
    """Yield every op that applies to a user's own routing; nothing in the file is executed."""
    for name, array in load_routing(path).items():
        label = f"{path.name}: {name}"
        if np.issubdtype(array.dtype, np.floating):
            # float16 keeps its dtype; the rest becomes float32 before either side sees it
            logits = array if array.dtype == np.float16 else array.astype(np.float32)
            experts = logits.shape[1]
            count = min(top_k, experts)
            for op in ("topk_softmax", "topk_sigmoid"):
                yield Case(op, label, given(gating_output=logits, top_k=count, renormalize=True))
            chosen = reference.topk_softmax(logits, count).topk_ids
        else:
            chosen = array if array.dtype in (np.int32, np.int64) else array.astype(np.int64)
            experts = num_experts or int(chosen.max(initial=0)) + 1
        align = given(topk_ids=chosen, block_size=block_size, num_experts=experts)
        yield Case("moe_align_block_size", label, align)
        yield Case("count_tokens_per_expert", label, given(topk_ids=chosen, num_experts=experts))
        if chosen.ndim == 2:
            rows = floats(len(chosen), 64)
            yield Case("moe_permute", label, given(hidden_states=rows, topk_ids=chosen, num_experts=experts))


def load_routing(path: Path) -> dict[str, np.ndarray]:
    """Read topk_ids and gating logits from .npy, .npz, .safetensors or .pt, without running code from the file."""
    loaded: Any
    if path.suffix == ".npy":
        loaded = {"array": np.load(path, allow_pickle=False)}
    elif path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            loaded = dict(file)
    elif path.suffix == ".safetensors":
        from safetensors.torch import load_file

        loaded = load_file(path)
    elif path.suffix in (".pt", ".pth"):
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        loaded = loaded if isinstance(loaded, dict) else {"tensor": loaded}
    else:
        raise ValueError(f"`--input` must be a .npy, .npz, .safetensors or .pt file, got {path.name}")
    usable = {}
    for name, value in loaded.items():
        array = testing.to_numpy(value) if isinstance(value, torch.Tensor) else value
        if isinstance(array, np.ndarray) and (
            (np.issubdtype(array.dtype, np.integer) and array.ndim in (1, 2))
            or (np.issubdtype(array.dtype, np.floating) and array.ndim == 2)
        ):
            usable[str(name)] = np.ascontiguousarray(array)
    if not usable:
        raise ValueError(f"{path.name} holds no topk_ids (integers, 1 or 2 dimensions) and no logits (floats, 2)")
    return usable
