"""Copy each token's row once for each of its experts, step 5: what the library ships.

New: a lane keeps several words on their way at once, warps share the columns of long rows, and rows may have scales,
gaps, padding and other ranks' experts. `numba_moe/ops/permute/move_rows.py` has it.
"""

from numba_moe import lab

lab.use_simulator_without_gpu()

from numba_moe import moe_permute

if __name__ == "__main__":
    assert lab.check(moe_permute, like="moe_permute", library="numba", cases="rows").passed
    lab.roofline(moe_permute, like="moe_permute", library="numba")
