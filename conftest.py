"""Where there is no CUDA device, tests run the kernels in Numba's simulator and skip what is marked gpu.

What is marked slow runs with ``--all``, with a ``-m`` that selects it, or where the command line names it.
"""

import importlib.util

import pytest

from numba_moe.device.switch import turn_on_without_gpu

turn_on_without_gpu()  # before anything imports numba

# Numba's compiler, which its simulator does without; it has no examples.
collect_ignore = [f"numba_moe/device/{name}.py" for name in ("numba_compiler", "intrinsics", "tensor_core_intrinsics")]

# Examples that need what is no dependency.
NEEDS = {"numba_moe.recorder.http.make_app": "starlette"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the slow tests too")


def is_named(item: pytest.Item, config: pytest.Config) -> bool:
    """Whether the command line names a test, and not only the file or folder that it is in."""
    file, _, name = item.nodeid.partition("::")
    for argument in config.args:
        path, _, wanted = argument.partition("::")
        if wanted and (name + "::").startswith((f"{wanted}::", f"{wanted}[")):
            return (config.invocation_params.dir / path).resolve() == config.rootpath / file
    return False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    for item in items:
        if item.name in NEEDS and importlib.util.find_spec(NEEDS[item.name]) is None:
            item.add_marker(pytest.mark.skip(reason=f"needs {NEEDS[item.name]}"))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if not (config.option.all or config.option.markexpr):
        left_out = [item for item in items if item.get_closest_marker("slow") and not is_named(item, config)]
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]
