"""Every specialisation of every kernel compiles, on a machine with or without a GPU."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
from numba_moe.runtime import compile
report = {}
for kernel in compile.kernels():
    for specialisation in compile.specialisations(kernel):
        code = compile.ptx(kernel, specialisation, tuple(json.loads(sys.argv[1])))
        assert compile.entry_name(code), code
        calls = [line for line in code.splitlines() if ".extern .func" in line or "call.uni" in line]
        report.setdefault(kernel.py_func.__name__, []).append(calls)
print(json.dumps(report))
"""


def without_simulator(program, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
    done = subprocess.run([sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("compute_capability", [(8, 0), (9, 0), (10, 0)])
def test_every_specialisation_compiles_to_ptx(compute_capability):
    report = json.loads(without_simulator(PROGRAM, json.dumps(compute_capability)))
    assert set(report) == {
        "choose_experts",
        "combine_rows",
        "count_slots",
        "fill_padding",
        "gather_rows",
        "place_slots",
        "scan_experts",
        "scan_tiles",
    }
    for kernel, calls in report.items():
        assert not any(calls), f"{kernel} calls a function that was not inlined: {calls}"


def test_a_dtype_outside_the_signature_is_refused():
    program = """
from numba_moe import counting
from numba_moe.runtime import compile
try:
    compile.signature(counting.scan_tiles, ("float32", "int32"))
except TypeError as error:
    print(error)
"""
    assert without_simulator(program).startswith("kernel scan_tiles takes ('int32',) here, got float32")
