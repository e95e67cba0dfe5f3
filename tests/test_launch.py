"""Launches: what the driver is given, in what order; on a GPU streams, graphs, threads, bits, large addresses."""

import threading

import numpy as np
import pytest
import torch

import numba_moe as moe
from numba_moe import reference
from numba_moe.verify import testing

# A driver that notes what it is given: the grid's stream, the device and context at the time, the first two addresses.
FAKE_DRIVER = """
import contextlib, ctypes, threading, types
import torch
from numba_moe.ops.count import Counts, Offsets, scan_experts
from numba_moe.runtime import launch

noted, loads, answers = [], [], []
here = types.SimpleNamespace(device=0, contexts={})

def cuLaunchKernelEx(config, kernel, parameters, extra):
    values = [ctypes.cast(parameters[i], ctypes.POINTER(ctypes.c_int64))[0] for i in (0, 2)]
    noted.append((config._obj.stream, kernel.value, here.device, values))
    return answers.pop(0) if answers else 0

def load(kernel, specialisation, device):
    loads.append(device)
    return 77, True

@contextlib.contextmanager
def on(device):
    before, here.device = here.device, device
    yield
    here.device = before

launch._libcuda = lambda: types.SimpleNamespace(cuLaunchKernelEx=cuLaunchKernelEx)
launch._load = load
launch._current_device = lambda: here.device
launch._current_stream = lambda device: 1000 + device
launch._bind_context = lambda device: noted.append(f"bound {device}")
torch.cuda.device = on
arrays = [
    {"counts": torch.zeros(8, dtype=torch.int32), "offset": torch.zeros(9, dtype=torch.int64)} for _ in range(3)
]
addresses = [[part.data_ptr() for part in pair.values()] for pair in arrays]

def scan(index=0):
    records = Counts(torch.int32, 8), Offsets(torch.int64, 1)
    return launch.Launch(scan_experts, torch.device("cuda", index), 1, 32, *records)
"""


@pytest.fixture
def with_fake_driver(without_simulator):
    """Return a function that runs a program beside a driver that launches nothing."""
    return lambda program: without_simulator(FAKE_DRIVER + program)


@pytest.mark.slow
def test_parameters_are_packed_after_a_kernel_was_compiled(with_fake_driver):
    program = """
def compile_and_launch_another(*arguments):
    if not loads:
        loads.append(0)
        scan()(**arrays[1])
    return load(*arguments)
launch._load = compile_and_launch_another
scan()(**arrays[0])
print([values for *_, values in noted] == [addresses[1], addresses[0]])
"""
    assert with_fake_driver(program).split() == ["True"]


@pytest.mark.slow
def test_what_runs_between_packing_and_launching_has_memory_of_its_own(with_fake_driver):
    program = """
outer, inner = scan(), scan()
pack = outer._pack
def pack_and_be_interrupted(*arguments):
    pack(*arguments)
    inner(**arrays[1])
outer._pack = pack_and_be_interrupted
for _ in range(2):
    outer(**arrays[0])
print([values for *_, values in noted] == 2 * [addresses[1], addresses[0]], len(launch._idle))
"""
    assert with_fake_driver(program).split() == ["True", "2"]


@pytest.mark.slow
def test_threads_share_memory_for_parameters_one_after_another(with_fake_driver):
    program = """
launches = [scan() for _ in arrays]
def work(index):
    for _ in range(300):
        launches[index](**arrays[index])
threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
found = [values for *_, values in noted]
print(all(found.count(pair) == 300 for pair in addresses), len(launch._idle) <= 3)
"""
    assert with_fake_driver(program).split() == ["True", "True"]


@pytest.mark.slow
def test_a_launch_works_on_its_own_device_whatever_the_thread_works_on(with_fake_driver):
    program = """
first, second = scan(0), scan(1)
for launched in (first, second, first, second):
    launched(**arrays[0])
here.device = 1
first(**arrays[0])
print([(stream, device) for stream, _, device, _ in noted], here.device)
"""
    turns = [(1000, 0), (1001, 1)] * 2 + [(1000, 0)]
    assert with_fake_driver(program).strip() == f"{turns} 1"


@pytest.mark.slow
def test_a_thread_without_a_context_is_given_one_and_launches_again(with_fake_driver):
    program = """
answers[:] = [201, 0, 0]
once = scan()
once(**arrays[0])
once(**arrays[0])
print([note if isinstance(note, str) else "launched" for note in noted])
answers[:] = [201, 700]
try: once(**arrays[0])
except RuntimeError as error: print(error)
answers[:] = [700]
try: once(**arrays[0])
except RuntimeError as error: print(error)
print(noted[-2] != "bound 0")
"""
    lines = with_fake_driver(program).splitlines()
    error = "the launch of scan_experts failed: CUDA_ERROR_ILLEGAL_ADDRESS"
    assert lines == ["['launched', 'bound 0', 'launched', 'launched']", error, error, "True"]


def routing(seed, tokens=700, experts=60, top_k=6):
    ids = testing.random_ids(np.random.default_rng(seed), tokens, experts, top_k, "zipf")
    return torch.from_numpy(ids).cuda(), reference.moe_align_block_size(ids, 16, experts)


def assert_equal(blocks, expected):
    for part, wanted in zip(blocks, expected, strict=True):
        assert torch.equal(part.cpu(), torch.from_numpy(wanted))


def whole_block(hidden, logits):
    """Gating, alignment, permutation and combination, as a model calls them."""
    weights, ids = moe.topk_softmax(logits, 8, True)
    blocks = moe.moe_align_block_size(ids, 16, logits.shape[1])
    permuted = moe.moe_permute(hidden, ids, logits.shape[1])
    combined = moe.moe_unpermute(permuted.permuted_hidden_states, weights, permuted.inv_permuted_idx)
    return (weights, ids, *blocks, *permuted[:5], combined)


@pytest.mark.gpu
def test_a_graph_replays_with_new_inputs():
    hidden = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16)
    logits = torch.randn(300, 64, device="cuda")
    whole_block(hidden, logits)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = whole_block(hidden, logits)
    for _ in range(20):
        hidden.normal_()
        logits.normal_()
        graph.replay()
        for part, wanted in zip(captured, whole_block(hidden, logits), strict=True):
            assert torch.equal(part, wanted)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_synchronises():
    hidden = torch.randn(300, 256, device="cuda")
    logits = torch.randn(300, 64, device="cuda")
    whole_block(hidden, logits)
    try:
        torch.cuda.set_sync_debug_mode("error")
        whole_block(hidden, logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_the_current_stream_is_used():
    stream = torch.cuda.Stream()
    ids, expected = routing(0)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = torch.full_like(ids, -1)
        torch.cuda._sleep(20_000_000)
        late.copy_(ids)
        blocks = moe.moe_align_block_size(late, 16, 60)
    stream.synchronize()
    assert_equal(blocks, expected)


@pytest.mark.gpu
def test_bits_repeat():
    ids, _ = routing(3, tokens=20000)
    hidden = torch.randn(20000, 64, device="cuda", dtype=torch.bfloat16)
    logits = torch.randn(20000, 60, device="cuda")
    first = (*moe.moe_align_block_size(ids, 16, 60), *whole_block(hidden, logits))
    for _ in range(20):
        again = (*moe.moe_align_block_size(ids, 16, 60), *whole_block(hidden, logits))
        assert all(map(torch.equal, first, again))


@pytest.mark.gpu
def test_payload_past_int32_elements():
    tokens, hidden = 150_000, 16_384  # 2.5e9 elements: int32 addresses would wrap
    rows = torch.empty(tokens, hidden, dtype=torch.bfloat16, device="cuda").normal_()
    ids = torch.arange(tokens, device="cuda", dtype=torch.int32).flip(0).remainder(16)[:, None].contiguous()
    permuted = moe.moe_permute(rows, ids, 16)
    order = ids.flatten().argsort(stable=True)
    assert torch.equal(permuted.permuted_idx.long(), order)
    for begin in range(0, tokens, 30_000):
        part = slice(begin, begin + 30_000)
        assert torch.equal(permuted.permuted_hidden_states[part], rows[order[part]])
    weights = torch.ones(tokens, 1, device="cuda")
    combined = moe.moe_unpermute(permuted.permuted_hidden_states, weights, permuted.inv_permuted_idx)
    assert torch.equal(combined, rows)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # Numba's advice on small grids
def test_kernels_launch_by_hand_on_numba_arrays():
    from numba import cuda

    from numba_moe.ops.count import Counts, Offsets, scan_experts

    counts = cuda.to_device(np.array([3, 0, 5], np.int32))
    offset = cuda.device_array(4, np.int64)
    scan_experts[1, 32](Counts(counts, 3), Offsets(offset, 4))
    assert offset.copy_to_host().tolist() == [0, 4, 4, 12]


FIRST_CALLS = """
import sys
import numpy as np
import torch
from numba_moe.verify import testing, verification
from numba_moe.verify.cases import edge_cases
from numba_moe.runtime import compile

cases = {}
for case in edge_cases():
    if case.op != "fused_experts":  # without torch's grouped GEMM the host reads where rows begin
        cases.setdefault(case.op, case)
square = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
torch.cuda.current_stream().synchronize()
square @ square  # torch's own first call of its libraries is its own affair
for name, case in cases.items():
    def given():
        payload = {"dtype": case.dtype, "strided": case.strided}
        return {
            key: testing.to_device(value, "cuda", **payload if key in verification.PAYLOADS else {})
            for key, value in case.arguments(np.random.default_rng(0)).items()
        }
    op = getattr(verification.OPS[name], name)
    arguments, again = given(), given()
    before = sum(compile.statistics.values())
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode=sys.argv[1]):
        captured = op(**arguments)
    loaded = sum(compile.statistics.values()) - before
    graph.replay()
    torch.cuda.synchronize()
    print(name, loaded, verification._same_bits(captured, op(**again)))
"""


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["global", "thread_local"])
def test_the_first_call_of_every_op_can_be_captured(mode, without_simulator, monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_MOE_CACHE_DIR", str(tmp_path))
    for _ in range(2):  # compiled within the capture; read from the cache within it
        outcomes = [line.split() for line in without_simulator(FIRST_CALLS, mode).splitlines()]
        assert len(outcomes) > 20
        assert [name for name, _, same in outcomes if same != "True"] == []
        assert sum(int(loaded) for _, loaded, _ in outcomes) > 12


@pytest.mark.gpu
def test_the_first_call_works_while_another_thread_captures(without_simulator):
    program = """
import threading
import torch
import numba_moe as moe
counts = torch.tensor([3, 0, 5], device="cuda", dtype=torch.int32)
scratch = torch.zeros(8, device="cuda")
found = []
def call():  # on the default stream, where torch has memory and need not ask the driver for more
    found.append(moe.expert_offsets(counts, 4))
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph, capture_error_mode="global"):
    scratch += 1
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
graph.replay()
torch.cuda.synchronize()
print(found[0].tolist(), scratch[0].item())
"""
    assert without_simulator(program).strip() == "[0, 4, 4, 12] 1.0"


@pytest.mark.gpu
def test_a_thread_whose_context_was_popped_still_launches():
    from cuda.bindings import driver

    ids, expected = routing(5)
    assert_equal(moe.moe_align_block_size(ids, 16, 60), expected)
    found = []

    def call():
        found.append(moe.moe_align_block_size(ids, 16, 60))
        status, _ = driver.cuCtxPopCurrent()
        assert status == driver.CUresult.CUDA_SUCCESS
        found.append(moe.moe_align_block_size(ids, 16, 60))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert len(found) == 2
    for blocks in found:
        assert_equal(blocks, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_devices_take_turns_in_one_thread():
    ids, expected = routing(6)
    for turn in range(4):
        for current in ("cuda:0", "cuda:1"):
            with torch.cuda.device(current):
                blocks = moe.moe_align_block_size(ids.to(f"cuda:{turn % 2}"), 16, 60)
            assert blocks.sorted_token_ids.device.index == turn % 2
            assert_equal(blocks, expected)
