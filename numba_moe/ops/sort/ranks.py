"""Rank a slot among the slots of its expert in the block: those before it in its warp, and those in earlier warps."""

from numba_moe.device.dialect import cuda, int32, uint32
from numba_moe.device.instructions import atomic_or
from numba_moe.device.primitives import ALL_LANES, count_lanes, lanes_below


@cuda.jit(device=True)
def mark_lane(experts, first, size, row, masks, ranks):
    """Mark in masks[row + expert] the lanes of this warp that have a slot of each expert, and rank this lane's slot."""
    expert = int32(experts[0] - first)
    counted = expert >= 0 and expert < size
    if counted:
        atomic_or(masks, int32(row + expert), uint32(1 << cuda.laneid))
    cuda.syncwarp()
    if counted:
        ranks[0] = count_lanes(masks[int32(row + expert)] & lanes_below())


@cuda.jit(device=True)
def rank_in_warp(experts, items, num_experts, first, size, row, in_warps, peers, ranks):
    """Count the slots of experts [first, first + size) of this warp from in_warps[row] on, and rank them."""
    for item in range(items):
        peers[item] = ALL_LANES
    bit = int32(1)
    while 0 < bit <= num_experts:  # one vote per bit of an id: faster than match_any_sync for many ids
        for item in range(items):
            is_set = (experts[item] & bit) != 0
            votes = cuda.ballot_sync(ALL_LANES, is_set)
            if not is_set:
                votes = votes ^ ALL_LANES
            peers[item] = peers[item] & votes
        bit = int32(bit << 1)
    for item in range(items):
        expert = int32(experts[item] - first)
        counted = expert >= 0 and expert < size
        earlier = count_lanes(peers[item] & lanes_below())
        if counted:
            ranks[item] = in_warps[row + expert] + earlier
        cuda.syncwarp()
        if counted and earlier == 0:
            in_warps[row + expert] += count_lanes(peers[item])
        cuda.syncwarp()


@cuda.jit(device=True)
def sum_warps(in_warps, masks, items, warps, chunk, expert):
    """Replace an expert's counts (or masks) by warp with its counts in earlier warps; return its count in all warps."""
    counts = cuda.local.array(4, int32)
    before = int32(0)
    cell = expert
    end = int32(warps * chunk)
    while cell < end:
        for i in range(4):
            if items == 1:
                counts[i] = count_lanes(masks[int32(cell + i * chunk)])
            else:
                counts[i] = in_warps[int32(cell + i * chunk)]
        for i in range(4):
            if items == 1:
                masks[int32(cell + i * chunk)] = before
            else:
                in_warps[int32(cell + i * chunk)] = before
            before = int32(before + counts[i])
        cell = int32(cell + 4 * chunk)
    return before
