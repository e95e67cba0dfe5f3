"""Add up what a token's experts gave, step 4: what the library ships.

New: 16 bytes to a load, of any dtype; the slots of a token are unrolled so that their loads are on their way
together; slots that were skipped are not read. `numba_moe/ops/permute/move_rows.py` has it.
"""

from numba_moe import lab

lab.use_simulator_without_gpu()

from numba_moe import moe_sum

if __name__ == "__main__":
    assert lab.check(moe_sum, like="moe_sum", library="numba", cases="rows").passed
    lab.roofline(moe_sum, like="moe_sum", library="numba")
