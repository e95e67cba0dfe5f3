"""Group the slots by expert, step 6: what the library ships.

New: from Hopper on blocks of one cluster read each other's counts, so that one launch serves 32,768 slots; where it
takes several, each starts while the one before it ends. The serial sum became one over warps. `numba_moe/ops/sort/`
has it.
"""

from numba_moe import lab

lab.use_simulator_without_gpu()

from numba_moe import moe_align_block_size

if __name__ == "__main__":
    assert lab.check(moe_align_block_size, like="moe_align_block_size", library="numba", cases="rows").passed
    lab.roofline(moe_align_block_size, like="moe_align_block_size", library="numba")
