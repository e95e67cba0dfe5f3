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
        calls = [line for line in code.splitlines() if ".extern .func" in line or "call.uni" in line]
        report.setdefault(kernel.py_func.__name__, []).append(calls)
print(json.dumps(report))
"""


@pytest.mark.parametrize(("compute_capability", "step"), [((8, 0), 5), ((9, 0), 1), ((10, 0), 5)])
def test_specialisations_compile_to_ptx(compute_capability, step, without_simulator):
    report = json.loads(without_simulator(PROGRAM, json.dumps(compute_capability), str(step)))
    assert set(report) == {
        "choose_experts",
        "choose_for_many",
        "choose_from_memory",
        "activate_rows",
        "add_counts",
        "combine_rows",
        "count_ids",
        "count_slots",
        "differentiate_activation",
        "differentiate_rows",
        "differentiate_weights",
        "fill_batches",
        "gather_rows",
        "invert_index",
        "lay_out_rows",
        "map_ids",
        "pair_slots",
        "place_slots",
        "route_tokens",
        "scan_blocks",
        "scan_experts",
        "schedule_blocks",
        "spread_adapters",
        "store_tokens",
        "weigh_given",
        "sum_expert_rows",
    }
    for kernel, calls in report.items():
        assert not any(calls), f"{kernel} calls a function that was not inlined: {calls}"


def test_how_many_blocks_are_to_fit_is_said_from_hopper_on(without_simulator):
    program = """
from numba_moe.permute import rows
from numba_moe.runtime import compile
first, *_ = compile.specialisations(rows.combine_rows)
for capability in ((8, 0), (9, 0)):
    code = compile.ptx(rows.combine_rows, first, capability)
    print(".maxntid 256" in code, ".minnctapersm 6" in code)
"""
    assert without_simulator(program).splitlines() == ["False False", "True True"]


def test_a_dtype_outside_the_signature_is_refused(without_simulator):
    program = """
from numba_moe.sorting import kernels
from numba_moe.runtime import compile
try:
    compile.specialisation_for(kernels.scan_blocks, {"block_counts": "float32"})
except TypeError as error:
    print(error)
"""
    assert without_simulator(program).startswith("kernel scan_blocks takes ('int16',) for block_counts, got float32")
