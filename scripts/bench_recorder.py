"""What recording costs on a GPU: device and host microseconds for a layer, beside counting the naive way.

python scripts/bench_recorder.py --layers 61 --experts 256 --tokens 4096 --top-k 8
"""

import argparse
import functools
from collections.abc import Callable

import torch

from numba_moe import TopK, fused_experts, select_experts
from numba_moe.bench.measure import device_time, host_time
from numba_moe.recorder import ExpertDistributionRecorder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 61), ("experts", 256), ("tokens", 4096), ("top-k", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    logits = torch.randn(given.tokens, given.experts, dtype=torch.float32, device="cuda")
    ids = logits.topk(given.top_k).indices.int()
    counts = torch.zeros(given.experts, dtype=torch.int64, device="cuda")
    ones = torch.ones(ids.numel(), dtype=torch.int64, device="cuda")

    def naive() -> None:
        chosen = ids.ravel()
        mask = chosen >= 0
        counts.index_add_(0, chosen.clamp(min=0).long(), ones * mask)

    def report(name: str, hook: Callable[[], object]) -> None:
        device, host = device_time(hook), host_time(hook)
        print(f"{name:32} {device:8.2f} us of the device, {host:8.2f} us of the host, for a layer")

    def of_mode(mode: str | None) -> None:
        recorder = ExpertDistributionRecorder(given.layers, given.experts, mode=mode, top_k=given.top_k)
        recorder.start_record()
        with recorder.with_forward_pass(0), recorder.with_current_layer(0):
            if mode is not None:
                report(f"mode {mode}", lambda: recorder.on_select_experts(ids))
            else:
                hook = host_time(lambda: recorder.on_select_experts(ids))
                print(f"{'mode None':32} {0:8.2f} us of the device, {hook:8.2f} us of the host, for a layer")

    def of_gating(dtype: torch.dtype) -> None:
        recorder = ExpertDistributionRecorder(given.layers, given.experts, mode="stat")
        recorder.start_record()
        gate = functools.partial(select_experts, logits.to(dtype), given.top_k, renormalize=True)

        def counting() -> TopK:
            return gate(counts=recorder.layer_counts(0), counts_enabled=recorder.enabled)

        name = f"gating of {dtype}".replace("torch.", "")
        report(name, gate)
        report(f"{name}, counting", counting)
        report("  and small experts behind it", lambda: fused_experts(rows, up, down, *gate()))
        report("  and small experts, counting", lambda: fused_experts(rows, up, down, *counting()))

    rows, up, down = (
        torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        for shape in ((given.tokens, 1024), (given.experts, 512, 1024), (given.experts, 1024, 256))
    )
    of_mode("stat")
    of_mode(None)
    report("index_add_", naive)
    of_gating(torch.float32)
    of_gating(torch.bfloat16)


if __name__ == "__main__":
    main()
