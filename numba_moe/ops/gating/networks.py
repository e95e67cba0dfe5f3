"""Sorting networks: short lists in registers put in order, highest first, without branches."""

from numba_moe.device.dialect import cuda


@cuda.jit(device=True)
def put_in_order(keys, i, j):
    higher = max(keys[i], keys[j])
    keys[j] = min(keys[i], keys[j])
    keys[i] = higher


@cuda.jit(device=True)
def settle_four(keys, at):
    """Sort keys[at : at + 4], which rise and then fall, or fall and then rise."""
    put_in_order(keys, at, at + 2)
    put_in_order(keys, at + 1, at + 3)
    put_in_order(keys, at, at + 1)
    put_in_order(keys, at + 2, at + 3)


@cuda.jit(device=True)
def sort_four(keys, at):
    """Sort keys[at : at + 4]."""
    put_in_order(keys, at, at + 1)
    put_in_order(keys, at + 2, at + 3)
    put_in_order(keys, at, at + 2)
    put_in_order(keys, at + 1, at + 3)
    put_in_order(keys, at + 1, at + 2)


@cuda.jit(device=True)
def sort_eight(keys):
    """Sort keys[:8]."""
    sort_four(keys, 0)
    sort_four(keys, 4)
    for i in range(4):
        put_in_order(keys, i, 7 - i)
    settle_four(keys, 0)
    settle_four(keys, 4)


@cuda.jit(device=True)
def keep_best_four(best, others):
    """Keep the best four of two sorted lists of four."""
    for i in range(4):
        best[i] = max(best[i], others[3 - i])
    settle_four(best, 0)


@cuda.jit(device=True)
def keep_best_eight(best, others):
    """Keep the best eight of two sorted lists of eight."""
    for i in range(8):
        best[i] = max(best[i], others[7 - i])
    for i in range(4):
        put_in_order(best, i, i + 4)
    settle_four(best, 0)
    settle_four(best, 4)


@cuda.jit(device=True)
def highest_left_out(best, others):
    """Return the highest key that `keep_best_eight` will not keep."""
    highest = min(best[0], others[7])
    for i in range(1, 8):
        highest = max(highest, min(best[i], others[7 - i]))
    return highest
