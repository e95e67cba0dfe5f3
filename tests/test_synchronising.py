"""No op, module or recorder waits for the device: torch's own watch raises an error where anything does."""

import contextlib

import numpy as np
import pytest
import torch

import numba_moe as moe
from numba_moe import placement
from numba_moe.recorder import ExpertDistributionRecorder, add_expert_counts
from numba_moe.verify import testing
from numba_moe.verify.cases import edge_cases
from numba_moe.verify.verification import OPS, PAYLOADS

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")]

TOKENS, EXPERTS, TOP_K, HIDDEN = 200, 64, 8, 256


@contextlib.contextmanager
def watched():
    """Let torch raise an error where the host waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def twice(call):
    """Call once for what happens once in a process (kernels are compiled and loaded), and once watched."""
    call()
    with watched():
        call()


def choices(seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    logits = torch.randn(TOKENS, EXPERTS, device="cuda", generator=generator)
    return moe.topk_softmax(logits, TOP_K, True)


def test_the_watch_sees_what_waits():
    with watched(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.zeros(1, device="cuda").item()


# Without torch's grouped GEMM the host reads where the rows of experts begin, as the docstring says.
CASES = [case for case in edge_cases() if case.op != "fused_experts"]


@pytest.mark.parametrize("op", sorted({case.op for case in CASES}))
def test_no_op_waits(op):
    for case in (case for case in CASES if case.op == op):
        arguments = {
            name: testing.to_device(value, "cuda", *((case.dtype, case.strided) if name in PAYLOADS else ()))
            for name, value in case.arguments(np.random.default_rng(0)).items()
        }
        twice(lambda arguments=arguments: getattr(OPS[op], op)(**arguments))


@pytest.mark.parametrize("shared_size", [0, 128])
@pytest.mark.parametrize("bias", [False, True])
def test_a_block_and_its_backward_do_not_wait(bias, shared_size):
    options = {"correction_bias": True, "bias": bias, "shared_size": shared_size, "scoring_func": "sigmoid"}
    block = moe.MoEBlock(HIDDEN, 128, EXPERTS, TOP_K, device="cuda", dtype=torch.bfloat16, **options)
    rows = torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    twice(lambda: block(rows).float().square().mean().backward())
    with torch.no_grad():
        twice(lambda: block(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_of_every_op_do_not_wait(dtype):
    logits = torch.randn(TOKENS, EXPERTS, device="cuda", dtype=dtype, requires_grad=True)
    rows = torch.randn(TOKENS, HIDDEN, device="cuda", dtype=dtype, requires_grad=True)

    def call():
        weights, ids = moe.topk_softmax(logits, TOP_K, True)
        permuted = moe.moe_permute(rows, ids, EXPERTS)
        activated = moe.moe_activation(permuted.permuted_hidden_states, permuted.expert_first_token_offset)
        combined = moe.moe_unpermute(activated, weights, permuted.inv_permuted_idx)
        summed = moe.moe_sum(combined[:, None].expand(-1, 2, -1).contiguous())
        summed.float().square().mean().backward()

    twice(call)


@pytest.mark.parametrize("algorithm", ["static", "dynamic", "hash", "fake"])
def test_dispatch_does_not_wait(algorithm):
    generator = np.random.default_rng(0)
    location = placement.ExpertLocation.from_mapping(
        [np.concatenate([np.arange(EXPERTS), generator.permutation(EXPERTS)[:16]]).tolist()], num_gpus=8
    )
    dispatch = placement.ExpertDispatch(location, rank=1, device="cuda", algorithm=algorithm)
    counts = torch.zeros(location.num_physical_experts, dtype=torch.int64, device="cuda")
    _, ids = choices()

    def call():
        dispatch(ids, layer=0, counts=counts)
        dispatch.advance()

    twice(call)


@pytest.mark.parametrize("mode", ["stat", "stat_approx", "per_pass", "per_token"])
def test_hooks_and_passes_of_recorders_do_not_wait(mode):
    recorder = ExpertDistributionRecorder(2, EXPERTS, mode=mode, top_k=TOP_K)
    weights, ids = choices()
    counts = torch.bincount(ids.ravel(), minlength=EXPERTS)

    def call():
        for number in range(3):
            with recorder.with_forward_pass(number, num_tokens=TOKENS - number):
                for layer in range(2):
                    with recorder.with_current_layer(layer):
                        if mode == "stat_approx":
                            recorder.on_dispatch_counts(counts)
                        else:
                            recorder.on_select_experts(ids, weights)

    recorder.start_record()
    twice(call)
    recorder.stop_record()
    assert recorder.dump_record("object").logical_count.sum() > 0


def test_metrics_of_a_recorder_do_not_wait():
    recorder = ExpertDistributionRecorder(2, EXPERTS, mode="stat", num_gpus=8)
    weights, ids = choices()
    recorder.start_record()
    for number in range(5):
        with recorder.with_forward_pass(number), recorder.with_current_layer(0):
            recorder.on_select_experts(ids, weights)
    twice(lambda: recorder.metrics(windows=(1, 3)))


def test_counts_of_experts_do_not_wait():
    counts = torch.zeros(EXPERTS, dtype=torch.int64, device="cuda")
    _, ids = choices()
    twice(lambda: add_expert_counts(ids, counts=counts))
