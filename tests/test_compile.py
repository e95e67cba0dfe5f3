"""Every specialisation of every kernel compiles, on a machine with or without a GPU; for other GPUs, some of each."""

import json

import pytest

PROGRAM = """
import json, sys
from numba_moe.runtime import compile
report = {}
for kernel in compile.kernels():
    specialisations = compile.specialisations(kernel)
    for specialisation in specialisations[:: int(sys.argv[2])] + specialisations[-1:]:
        code = compile.ptx(kernel, specialisation, tuple(json.loads(sys.argv[1])))
        assert compile.entry_name(code), code
        [_, entry] = code.split(".visible .entry ")
        touching = ("ld.global", "ld.volatile", "ld.shared", "st.", "atom.", "red.", "griddepcontrol")
        words = [word for word in entry.split() if word.startswith(touching) and not word.startswith("st.local")]
        waits = words[0].startswith("griddepcontrol.wait") and code.count("griddepcontrol.wait") == 1
        if kernel.py_func.__name__ == "multiply_slots":  # which reads matrices before it waits
            waits = any(word.startswith("griddepcontrol.wait") for word in words)
        assert waits == (json.loads(sys.argv[1])[0] >= 9), code[:5000]
        calls = [line for line in code.splitlines() if ".extern .func" in line or "call.uni" in line]
        report.setdefault(kernel.py_func.__name__, []).append(calls)
print(json.dumps(report))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("compute_capability", "step"), [((8, 0), 5), ((9, 0), 1), ((10, 0), 5)])
def test_specialisations_compile_to_ptx(compute_capability, step, without_simulator):
    report = json.loads(without_simulator(PROGRAM, json.dumps(compute_capability), str(step)))
    assert set(report) == {
        "choose_by_lanes",
        "choose_experts",
        "choose_for_many",
        "choose_from_memory",
        "activate_rows",
        "add_counts",
        "add_rows",
        "combine_constants",
        "combine_rows",
        "count_ids",
        "count_slots",
        "differentiate_activation",
        "differentiate_rows",
        "differentiate_weighted",
        "differentiate_weights",
        "fetch_rows",
        "fill_batches",
        "find_destinations",
        "gather_rows",
        "invert_index",
        "lay_out_rows",
        "map_ids",
        "multiply_slots",
        "pair_slots",
        "place_few",
        "place_slots",
        "publish",
        "route_tokens",
        "scan_blocks",
        "scan_experts",
        "schedule_blocks",
        "spread_adapters",
        "store_tokens",
        "weigh_given",
        "sum_expert_rows",
        "add_losses",
        "count_slots_by_sequence",
        "differentiate_losses",
        "differentiate_selection",
        "move_biases",
        "sum_losses",
        "sum_rows",
        "tell_ranks",
        "wait_for_ranks",
    }
    for kernel, calls in report.items():
        assert not any(calls), f"{kernel} calls a function that was not inlined: {calls}"


@pytest.mark.slow
def test_how_many_blocks_are_to_fit_is_said_from_hopper_on(without_simulator):
    program = """
from numba_moe.ops.permute import move_rows
from numba_moe.runtime import compile
first, *_ = compile.specialisations(move_rows.combine_rows)
for capability in ((8, 0), (9, 0)):
    code = compile.ptx(move_rows.combine_rows, first, capability)
    print(".maxntid 256" in code, ".minnctapersm 6" in code)
"""
    assert without_simulator(program).splitlines() == ["False False", "True True"]


@pytest.mark.slow
def test_a_dtype_outside_the_signature_is_refused(without_simulator):
    program = """
from numba_moe.ops.sort import count_and_place
from numba_moe.runtime import compile
try:
    compile.specialisation_for(count_and_place.scan_blocks, {"block_counts": "float32"})
except TypeError as error:
    print(error)
"""
    assert without_simulator(program).startswith("kernel scan_blocks takes ('int16',) for block_counts, got float32")


@pytest.mark.slow
def test_a_kernel_waits_for_the_one_ahead_before_it_reads_or_writes_or_lets_the_next_one_start(without_simulator):
    program = """
from numba_moe.runtime import compile
from numba_moe.ops.count import scan_experts
for capability in ((8, 0), (9, 0)):
    code = compile.ptx(scan_experts, compile.specialisations(scan_experts)[0], capability)
    statements = [one.split() for one in code.split(".visible .entry ")[1].split("{", 1)[1].split(";")]
    words = [word for one in statements for word in one if word.startswith(("ld.", "st.", "atom.", "red.", "griddep"))]
    print(*(word for word in words if not word.startswith("ld.param")))
"""
    before, since = (line.split() for line in without_simulator(program).splitlines())
    assert not any("griddepcontrol" in word for word in before), "nothing of the kind before Hopper"
    assert since == ["griddepcontrol.wait", "griddepcontrol.launch_dependents", *before]


@pytest.mark.slow
def test_a_process_compiles_for_one_gpu_after_another(without_simulator):
    program = """
from numba_moe.runtime import compile
from numba_moe.ops.sort import count_and_place
first, *_ = compile.specialisations(count_and_place.place_slots)
for capability in ((8, 0), (9, 0), (8, 0)):
    code = compile.ptx(count_and_place.place_slots, first, capability)
    print("trap;" in code, "mapa.u64" in code, "barrier.cluster" in code)
"""
    lines = without_simulator(program).splitlines()
    assert lines == ["True False False", "False True True", "True False False"], "before Hopper there are no clusters"


@pytest.mark.slow
def test_reads_of_a_cluster_are_done_before_the_next_barrier_lets_others_on(without_simulator):
    program = """
import re
from numba_moe.runtime import compile
from numba_moe.ops.gating import choose_and_sort
from numba_moe.ops.sort import count_and_place
for kernel in (count_and_place.place_slots, choose_and_sort.route_tokens):
    first, *_ = compile.specialisations(kernel)
    print(*sorted(set(re.findall("barrier.cluster.[a-z.]+", compile.ptx(kernel, first, (9, 0))))))
"""
    ordered = "barrier.cluster.arrive.release.aligned barrier.cluster.wait.acquire.aligned"
    assert without_simulator(program).splitlines() == [ordered] * 2


WHILE_OTHERS_COMPILE = """
import threading
from numba import cuda
from numba.cuda import dispatcher
from numba_moe.ops.count import scan_experts
from numba_moe.runtime import compile
from numba_moe.ops.sort.count_and_place import scan_blocks

before = dispatcher.get_current_device
seen, ended = set(), threading.Event()

def look():
    while not ended.is_set():
        seen.add(dispatcher.get_current_device)

watching = threading.Thread(target=look)
watching.start()
works = [
    threading.Thread(target=compile.ptx, args=(kernel, compile.specialisations(kernel)[0], capability))
    for kernel, capability in ((scan_experts, (9, 0)), (scan_blocks, (8, 0)))
]
for work in works: work.start()
for work in works: work.join()
ended.set()
watching.join()
print(seen == {before}, dispatcher.get_current_device is before)
"""


@pytest.mark.slow
def test_other_threads_find_numba_as_it_is_while_two_compile(without_simulator):
    assert without_simulator(WHILE_OTHERS_COMPILE).split() == ["True", "True"]


SETTINGS = {
    "NUMBA_CUDA_DEBUGINFO": "1",
    "NUMBA_DEBUGINFO": "1",
    "NUMBA_OPT": "0",
    "NUMBA_DISABLE_JIT": "1",
    "CUDA_HOME": "/nowhere",
    "CUDA_PATH": "/nowhere",
}


@pytest.mark.slow
def test_settings_of_numba_and_cuda_change_nothing_of_a_kernel(without_simulator, monkeypatch):
    program = """
import re, warnings
warnings.simplefilter("error")
from numba_moe.runtime import compile
from numba_moe.ops.count import scan_experts
code = compile.ptx(scan_experts, compile.specialisations(scan_experts)[0], (9, 0))
print(re.sub("_ZN[A-Za-z0-9_]+", "name", code))
"""
    monkeypatch.setenv("NUMBA_MOE_CACHE", "0")
    expected = without_simulator(program)
    for name, value in SETTINGS.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert without_simulator(program) == expected, name


WITHOUT_PTH_FILES = """
import json, subprocess, sys
program = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); " + sys.argv[1]
paths = json.dumps([path for path in sys.path if path] + sys.argv[2:])
done = subprocess.run([sys.executable, "-S", "-c", program, paths], capture_output=True, text=True)
print(done.stdout, done.stderr[-500:])
"""


@pytest.mark.slow
def test_numba_cuda_is_found_where_no_pth_file_says_so(without_simulator, package_copy):
    """As after `pip install --target`: Python reads no .pth files there."""
    look = """
import numba_moe.ops.count
from numba_moe.device import dialect
dialect.resolve(vars(numba_moe.ops.count))
print(numba_moe.ops.count.cuda.implementation, type(numba_moe.ops.count.scan_experts).__module__)
"""
    source = str(package_copy.parent)
    assert without_simulator(WITHOUT_PTH_FILES, look, source).split() == ["NVIDIA", "numba.cuda.dispatcher"]
    printed = without_simulator(WITHOUT_PTH_FILES, "import numba.cuda\n" + look, source)
    assert "`numba.cuda` must be numba-cuda, got Numba's own" in printed


@pytest.mark.slow
def test_a_compiler_that_is_missing_is_named_with_the_ways_to_have_one(without_simulator):
    program = """
from cuda.pathfinder import DynamicLibNotFoundError
from numba_moe.ops.count import scan_experts
from numba_moe.device import numba_compiler
from numba_moe.runtime import compile
def without_nvvm(*_, **__):
    raise DynamicLibNotFoundError("libnvvm.so")
numba_compiler.cuda.compile = without_nvvm
try: compile.ptx(scan_experts, compile.specialisations(scan_experts)[0], (9, 0))
except RuntimeError as error: print(error)
"""
    printed = without_simulator(program)
    assert printed.startswith("CUDA's compiler was not found, install numba-moe[cu13] or")
    assert "set CUDA_HOME" in printed
