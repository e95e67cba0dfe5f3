"""Choose the experts of each token, step 6: what the library ships.

New: a row is read once and stays in registers, a table of measurements says how many lanes serve a token, the best key
of a warp comes from one instruction (`redux`), and eight logits are loaded at a time. `numba_moe/ops/gating/` has it
all.
"""

from numba_moe import lab

lab.use_simulator_without_gpu()

from numba_moe import topk_softmax

if __name__ == "__main__":
    assert lab.check(topk_softmax, like="topk_softmax", library="numba", cases="rows").passed
    lab.roofline(topk_softmax, like="topk_softmax", library="numba")
