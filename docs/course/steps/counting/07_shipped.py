"""Count the slots of each expert, step 7: what the library ships.

New: all of the above at once, in `numba_moe/ops/count.py`: counters in shared memory, several slots to a thread, the
best number of blocks, and a launch that costs microseconds. It also checks its arguments, and takes a map of experts.
"""

from numba_moe import lab

lab.use_simulator_without_gpu()

from numba_moe import count_tokens_per_expert

if __name__ == "__main__":
    assert lab.check(count_tokens_per_expert, like="count_tokens_per_expert", library="numba", cases="rows").passed
    lab.roofline(count_tokens_per_expert, like="count_tokens_per_expert", library="numba")
