"""Token rounding: the rows of each expert are a multiple of what a GEMM multiplies at a time."""

import torch

from numba_moe.ops.count import count_tokens_per_expert
from numba_moe.reference.capacity import ROUNDINGS
from numba_moe.reference.gating import TopK
from numba_moe.runtime import checks
from numba_moe.training.capacity import check_choice, keep_first


def token_rounding(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    tile: int,
    *,
    top_k: int | None = None,
    rounding: str = "nearest",
) -> TopK:
    """Round the number of slots of each expert to a multiple of a tile: some are dropped, or spare ones are added.

    Parameters
    ----------
    topk_weights : tensor of float32, float16 or bfloat16, shape [num_tokens, picks]
        By which slots are ranked.
    topk_ids : tensor of int32 or int64, of the same shape
        Contiguous, each expert of a token at most once. Ids that are no expert's are dropped too.
    num_experts : int
        Number of experts.
    tile : int
        Rows that the GEMM multiplies at a time: 64 or 128, for instance.
    top_k : int, optional
        The picks that were chosen, the first of each token; those after them are spare. By default all were chosen, and
        none can be added.
    rounding : {"nearest", "up", "down"}
        To which multiple: the nearest, of two the even one. "up" adds alone, and "down" drops alone.

    Returns
    -------
    TopK
        Of the shapes and dtypes that are given; -1 with weight 0 for slots that were dropped or not added.

    Raises
    ------
    TypeError
        An array or a dtype of the wrong kind.
    ValueError
        Wrong shape or layout, unknown `rounding`, a `tile` below 1, more `top_k` than picks.

    Notes
    -----
    SonicMoE's token rounding (arXiv 2512.14080), where all experts of a token are picks. An expert keeps what was
    chosen before what is spare, and the larger weights first, of equals the first. So a token goes to more than `top_k`
    experts, or to fewer. An expert without enough spare slots takes all, and is no multiple then.

    The same slots at every run. The weights that are kept have their gradient, those of added slots too. Nothing
    synchronises with the host.

    Examples
    --------
    Expert 0 has three tokens of its own and expert 1 has one, which goes to expert 0 too:

    >>> import torch
    >>> ids = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 0]])
    >>> weights = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.9, 0.1], [0.8, 0.2]])
    >>> token_rounding(weights, ids, 2, 2, top_k=1).topk_ids.tolist()
    [[0, -1], [0, -1], [0, -1], [-1, 0]]
    """
    checks.choice("rounding", rounding, ROUNDINGS)
    tile = checks.integer("tile", tile, 1)
    check_choice(topk_weights, topk_ids)
    checks.holds("topk_ids", "of 2 dimensions", topk_ids.dim() == 2, f"shape {tuple(topk_ids.shape)}")
    picks = topk_ids.shape[1]
    top_k = picks if top_k is None else checks.integer("top_k", top_k, 0, picks, f"the picks of a token, {picks}")
    slots = torch.arange(topk_ids.numel(), dtype=torch.int64, device=topk_ids.device).view(topk_ids.shape)
    parts = []
    for columns in (slice(top_k), slice(top_k, None)):
        largest = topk_weights.detach()[:, columns].reshape(-1).sort(descending=True, stable=True).indices
        parts.append(slots[:, columns].reshape(-1)[largest])
    numbers = count_tokens_per_expert(topk_ids[:, :top_k].contiguous(), num_experts).to(torch.int64)
    tiles, rest = numbers // tile, numbers % tile
    if rounding == "up":
        tiles = tiles + (rest > 0)
    elif rounding == "nearest":
        tiles = tiles + (2 * rest + tiles % 2 > tile)
    return keep_first(topk_weights, topk_ids, tiles * tile, torch.cat(parts))
