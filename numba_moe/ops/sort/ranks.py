"""Where a slot is among those of its expert in its block: before it in its warp, and in earlier warps."""

from numba_moe.device.dialect import cuda, int32, uint32
from numba_moe.device.instructions import atomic_or
from numba_moe.device.primitives import ALL_LANES, count_lanes, lanes_below


@cuda.jit(device=True)
def mark_lane(experts, first, size, row, masks, ranks):
    """Mark in masks[row + expert] which lanes of this warp have a slot of each expert, and rank this lane's slot."""
    expert = int32(experts[0] - first)
    counted = expert >= 0 and expert < size
    if counted:
        atomic_or(masks, int32(row + expert), uint32(1 << cuda.laneid))
    cuda.syncwarp()
    if counted:
        ranks[0] = count_lanes(masks[int32(row + expert)] & lanes_below())


@cuda.jit(device=True)
def rank_in_warp(experts, items, num_experts, first, size, row, in_warps, peers, ranks):
    """Count the experts [first, first + size) of this warp from in_warps[row] on, and rank its slots among them."""
    for item in range(items):
        peers[item] = ALL_LANES
    bit = int32(1)
    while 0 < bit <= num_experts:  # a vote for each bit of an id: less than match_any_sync takes for many ids
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
    """Turn an expert's counts by warp, or masks, into its slots in earlier warps; return its slots in all of them."""
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
