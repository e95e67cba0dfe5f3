"""What kernels take: few parameters and records of few fields, each with a name of its own, and each is read."""

import ast
import inspect
import textwrap
from typing import NamedTuple, get_type_hints

import pytest
import torch

from numba_moe.device.dialect import cuda
from numba_moe.device.instructions import present
from numba_moe.device.types import Ids, Int32, Int32Array, OptionalInt32Array
from numba_moe.runtime import compile
from numba_moe.runtime.launch import Launch

MOST = 12


def is_kernel(node):
    """Whether a node is a function that is decorated as a kernel, not as a device function."""
    if not isinstance(node, ast.FunctionDef):
        return False
    decorators = map(ast.unparse, node.decorator_list)
    return any(text.startswith("cuda.jit") and "device=True" not in text for text in decorators)


def every_kernel():
    for module in compile.kernel_modules():
        for node in ast.parse(inspect.getsource(module)).body:
            if is_kernel(node):
                yield getattr(module, node.name)


KERNELS = {kernel.py_func.__name__: kernel for kernel in every_kernel()}


def is_record(annotation):
    return isinstance(annotation, type) and hasattr(annotation, "_fields")


def records_of(owner):
    """Yield the records among a function's parameters, and those within them."""
    for hint in get_type_hints(owner).values():
        if is_record(hint):
            yield hint
            yield from records_of(hint)


def called_function(kernel):
    """Return the Python function of a kernel or a device function, also in the simulator."""
    return kernel.py_func if hasattr(kernel, "py_func") else kernel.fn


def definition(function):
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    return node


def fields_read(function, parameter, record, seen=frozenset()):
    """Return the fields of a record, as (record, name), that a function reads, or that device functions read for it.

    A record that goes anywhere else than to a device function counts as read whole.
    """
    if (function, parameter) in seen:
        return set()
    seen = seen | {(function, parameter)}
    tree = definition(function)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found = set()
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Name) and node.id == parameter):
            continue
        kind = record
        while is_record(kind) and isinstance(parents[node], ast.Attribute):
            node = parents[node]
            found.add((kind, node.attr))
            kind = get_type_hints(kind)[node.attr]
        if is_record(kind):
            found |= passed_on(function, node, parents, kind, seen)
    return found


def passed_on(function, node, parents, record, seen):
    """Return the fields that are read where a record stands whole: of a device function's argument, or all of them."""
    call = parents[node]
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and node in call.args:
        called = function.__globals__.get(call.func.id)
        if hasattr(called, "py_func") or hasattr(called, "fn"):
            called = called_function(called)
            return fields_read(called, list(inspect.signature(called).parameters)[call.args.index(node)], record, seen)
    return {(owner, field) for owner in (record, *records_of(record)) for field in owner._fields}


def unread(function):
    """Return the fields of a kernel's records that it does not read, but for arrays that may be absent."""
    found = set()
    for name, hint in get_type_hints(function).items():
        if is_record(hint):
            found |= fields_read(function, name, hint)
    return [
        f"{record.__name__}.{name}"
        for record in records_of(function)
        for name, hint in get_type_hints(record, include_extras=True).items()
        if (record, name) not in found and None not in getattr(hint, "__metadata__", ())
    ]


def test_every_kernel_waits_for_the_one_ahead_first():
    for name, kernel in KERNELS.items():
        if name == "multiply_slots":  # which reads matrices before it waits
            continue
        _, first, *_ = definition(called_function(kernel)).body  # after the docstring
        assert ast.unparse(first) == "wait_for_earlier()", kernel.py_func.__name__


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_takes_few_parameters_and_records_of_few_fields(name):
    function = KERNELS[name].py_func
    assert len(inspect.signature(function).parameters) <= MOST
    for record in records_of(function):
        assert len(record._fields) <= MOST, record
        assert record.__doc__, record
        assert not record.__doc__.startswith(f"{record.__name__}("), f"{record} has no docstring"


@pytest.mark.parametrize("name", KERNELS)
def test_fields_of_a_kernel_have_names_of_their_own(name):
    names = [parameter.name for parameter in compile.parameters(KERNELS[name])]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_reads_every_field_and_says_what_it_does(name):
    function = KERNELS[name].py_func
    assert unread(function) == []
    assert function.__doc__


class Numbers(NamedTuple):
    """Two numbers."""

    first: Int32
    second: Int32


class Inputs(NamedTuple):
    """A record that has another."""

    ids: Ids
    numbers: Numbers
    flags: OptionalInt32Array


@cuda.jit(device=True)
def sum_of(numbers, also):
    return numbers.first + numbers.second + also


@cuda.jit(device=True)
def one_of(numbers):
    return numbers.second


@cuda.jit
def adds(inputs: Inputs, total: Int32Array):
    total[0] = sum_of(inputs.numbers, inputs.ids[0])
    if present(inputs.flags):
        total[0] = -1


@cuda.jit
def forgets(inputs: Inputs, total: Int32Array):
    total[0] = one_of(inputs.numbers)


def test_a_field_that_nothing_reads_is_found():
    assert unread(called_function(adds)) == []
    assert unread(called_function(forgets)) == ["Inputs.ids", "Numbers.first"]


def test_names_that_two_fields_share_are_refused():
    @cuda.jit
    def twice(numbers: Numbers, first: Int32Array):
        first[0] = numbers.first

    with pytest.raises(TypeError, match=r"kernel twice has two fields named \['first'\]"):
        compile.parameters(twice)


NUMBERS = Numbers(1, 2)


def launch(inputs, total=torch.int32):
    return Launch(adds, torch.device("cpu"), 1, 32, inputs, total)


def test_a_launch_takes_the_records_of_its_kernel():
    with pytest.raises(TypeError, match=r"kernel adds takes Inputs for inputs, got Numbers"):
        launch(NUMBERS)
    with pytest.raises(TypeError, match=r"kernel adds takes Numbers for numbers, got \(1, 2\)"):
        launch(Inputs(torch.int32, (1, 2), None))
    with pytest.raises(TypeError, match=r"kernel adds takes \('int32', 'int64'\) for ids, got float32"):
        launch(Inputs(torch.float32, NUMBERS, None))
    with pytest.raises(TypeError, match=r"kernel adds takes \('int32',\) for total, got None"):
        launch(Inputs(torch.int32, NUMBERS, None), None)


@pytest.mark.parametrize("flags", [None, torch.zeros(1, dtype=torch.int32)])
def test_a_launch_is_by_name_and_absent_arrays_may_be_left_out(device, flags):
    if device == "cuda":
        pytest.skip("kernels of tests run in the simulator alone")
    ids, total = torch.tensor([4], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    planned = launch(Inputs(ids, NUMBERS, flags), total)
    given = {} if flags is None else {"flags": flags}
    planned(total=total, ids=ids, **given)
    assert total.tolist() == [7 if flags is None else -1]


def test_an_array_that_was_not_planned_is_refused(device):
    if device == "cuda":
        pytest.skip("the simulator checks what a launch on a GPU takes on trust")
    ids = torch.zeros(1, dtype=torch.int32)
    planned = launch(Inputs(ids, NUMBERS, None))
    with pytest.raises(TypeError, match=r"adds: flags was planned as None, got tensor"):
        planned(total=ids, ids=ids, flags=ids)
