"""What `numba-moe export` writes is what its manifest says, and enough to launch a kernel without Python's packages."""

import hashlib
import json
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

import numba_moe
from numba_moe import cli
from numba_moe.runtime import compile, export

EXPORT = """
import json, sys
from numba_moe import cli
from numba_moe.runtime import compile
compile.KERNEL_PACKAGES = tuple(f"numba_moe.{name}" for name in sys.argv[1].split(","))
every = compile.specialisations
def few(kernel):
    constants = lambda specialisation: [choice for choice in specialisation if isinstance(choice, int)]
    return [found for found in every(kernel) if constants(found) in ([], [0], [8], [8, 0])][-2:]
compile.specialisations = few
assert cli.main(sys.argv[2:]) == 0
print(json.dumps({kernel.py_func.__name__: [parameter.name for parameter in compile.parameters(kernel)]
                  for kernel in compile.kernels()}))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory, without_simulator):
    """Return a folder that held other files before, its manifest, and the names of every kernel's parameters."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "notes.txt").write_text("stay")
    (folder / "manifest.json").write_text("of an earlier export")
    printed = without_simulator(
        EXPORT,
        "ops.count,ops.sort.count_and_place,ops.gating.warp_per_token,ops.gating.long_rows,ops.permute.move_rows",
        "export",
        "--arch",
        "sm_80,sm_90,sm_80",
        str(folder),
    )
    said, names = printed.splitlines()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert said == f"{len(manifest['kernels'])} kernels and manifest.json in {folder}"
    return folder, manifest, json.loads(names)


@pytest.mark.slow
def test_the_folder_holds_what_the_manifest_lists(exported):
    folder, manifest, names = exported
    assert manifest["schema"] == 1
    assert manifest["package"] == {"numba-moe": numba_moe.__version__}
    assert set(manifest["compilers"]) >= {"numba-cuda", "nvidia-nvvm"}
    kernels = manifest["kernels"]
    assert {(kernel["kernel"], kernel["arch"]) for kernel in kernels} == {
        (name, arch) for name in names for arch in ("sm_80", "sm_90")
    }
    files = [kernel["file"] for kernel in kernels]
    assert sorted(file.name for file in folder.iterdir()) == sorted([*files, "manifest.json", "notes.txt"])
    assert (folder / "notes.txt").read_text() == "stay"
    for kernel in kernels:
        assert hashlib.sha256((folder / kernel["file"]).read_bytes()).hexdigest() == kernel["sha256"]


@pytest.mark.slow
def test_parameters_are_those_of_the_cubin(exported):
    folder, manifest, names = exported
    for kernel in manifest["kernels"]:
        cubin = (folder / kernel["file"]).read_bytes()
        sections = export._sections(cubin)
        assert kernel["entry"] in [name for name, _ in export._symbols(cubin, sections)]
        assert f".text.{kernel['entry']}" in sections
        info = sections[f".nv.info.{kernel['entry']}"]
        records = export._attributes(cubin[info.offset : info.offset + info.size])
        # Of each parameter: index, ordinal, offset, and a word whose upper 14 bits are the size.
        found = sorted(struct.unpack("<IHHI", value)[1:] for attribute, value in records if attribute == 0x17)
        assert [word >> 18 for _, _, word in found] == [parameter["size"] for parameter in kernel["parameters"]]
        listed = [parameter["name"] for parameter in kernel["parameters"]]
        assert listed == [name for name in names[kernel["kernel"]] if name not in kernel["constants"]]


def of_kernel(manifest, name):
    return [kernel for kernel in manifest["kernels"] if kernel["kernel"] == name]


@pytest.mark.slow
def test_constants_kinds_and_optional_arrays(exported):
    _, manifest, _ = exported
    for kernel in of_kernel(manifest, "count_slots"):
        assert kernel["constants"] == {"items": 8}
        parameters = {parameter.pop("name"): parameter for parameter in map(dict, kernel["parameters"])}
        slots = {"record": "Slots", "doc": "[num_slots]"}
        assert parameters["topk_ids"] == {"kind": "pointer", "dtype": "int64", "size": 8, "optional": False, **slots}
        assert parameters["num_slots"] == {"kind": "scalar", "dtype": "int32", "size": 4, **slots, "doc": ""}
        assert parameters["stride"]["record"] == "Counted"
        optional = {name for name, parameter in parameters.items() if parameter.get("optional")}
        assert optional == {"expert_map", "block_counts", "counts", "sorted_slots"}
        assert kernel["doc"].startswith("Count the slots of each expert; ")
    for kernel in of_kernel(manifest, "place_slots"):
        [chunk] = [parameter for parameter in kernel["parameters"] if parameter["name"] == "chunk"]
        assert (chunk["record"], chunk["doc"]) == (None, "number of experts that a block counts at a time")
    of_logits = {"float16": 0, "bfloat16": 0}
    for kernel in of_kernel(manifest, "choose_experts"):
        parameters = {parameter["name"]: parameter for parameter in kernel["parameters"]}
        of_logits[parameters["gating_output"]["dtype"]] += 1
        assert parameters["routed_scaling_factor"]["size"] == 4
        assert kernel["constants"] == {"columns": 8, "role": 0}
    assert of_logits == {"float16": 2, "bfloat16": 2}


@pytest.mark.slow
def test_resources(exported):
    _, manifest, _ = exported
    shared = {"count_slots": 4 * 1024, "scan_blocks": 0, "scan_experts": 8 * 32}  # int32 [1024], none, int64 [32]
    for kernel in manifest["kernels"]:
        name, threads = kernel["kernel"], kernel["max_threads_per_block"]
        assert kernel["static_shared_bytes"] == shared.get(name, kernel["static_shared_bytes"])
        assert kernel["max_dynamic_shared_bytes"] == compile.MOST_SHARED_BYTES
        assert threads % 128 == 0
        assert 128 <= threads <= 1024
        assert 0 < kernel["registers"] * threads <= 64 * 1024
        if name in ("count_slots", "place_slots"):
            assert threads == 1024
        bounds = {"gather_rows": 256, "add_rows": 256, "combine_rows": 256, "choose_from_memory": 128}
        if name in bounds and kernel["arch"] == "sm_90":
            assert threads == bounds[name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("export --arch sm_90", "the following arguments are required: DIR"),
        ("export --arch 9.0 folder", "argument --arch: must be names like sm_90, got '9.0'"),
        ("export --arch sm_90, folder", "argument --arch: must be names like sm_90, got ''"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments.split())
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_device_an_arch_is_needed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert cli.main(["export", str(tmp_path / "folder")]) == 2
    assert capsys.readouterr().err.startswith("numba-moe export: no CUDA device here; name what to compile for")
    assert not (tmp_path / "folder").exists()


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "folder"):
        assert cli.main(["export", "--arch", "sm_90", str(folder)]) == 2
        assert capsys.readouterr().err.startswith("numba-moe export: [Errno ")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "a.cubin").mkdir()
    with pytest.raises(OSError, match=r"a\.cubin"):
        export._write(tmp_path / "a.cubin", b"content")
    assert [file.name for file in tmp_path.iterdir()] == ["a.cubin"]


# Counts slots by expert from the manifest alone. Names ending in _v2 are what cuda.h calls cuMemAlloc and so on.
LAUNCH = """
import ctypes, json, sys

driver = ctypes.CDLL("libcuda.so.1")

def call(name, *arguments):
    status = getattr(driver, name)(*arguments)
    assert status == 0, f"{name}: {status}"

folder, arch, numbers, num_experts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
with open(folder + "/manifest.json") as file:
    kernels = json.load(file)["kernels"]

def wanted(kernel):
    dtypes = {parameter["name"]: parameter["dtype"] for parameter in kernel["parameters"]}
    return (
        (kernel["kernel"], kernel["arch"], kernel["constants"]) == ("count_slots", arch, {"items": 1})
        and (dtypes["topk_ids"], dtypes["counts"]) == ("int32", "int32")
    )

kernel = [kernel for kernel in kernels if wanted(kernel)][0]
with open(folder + "/" + kernel["file"], "rb") as file:
    image = file.read()

device, context, module, function = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
call("cuInit", 0)
call("cuDeviceGet", ctypes.byref(device), 0)
call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
call("cuCtxSetCurrent", context)
call("cuModuleLoadData", ctypes.byref(module), ctypes.create_string_buffer(image, len(image)))
call("cuModuleGetFunction", ctypes.byref(function), module, kernel["entry"].encode())

def attribute(number):
    value = ctypes.c_int()
    call("cuFuncGetAttribute", ctypes.byref(value), number, function)
    return value.value

assert attribute(0) == kernel["max_threads_per_block"], attribute(0)
assert attribute(4) == kernel["registers"], attribute(4)
# Drivers may count the 1 KiB of each block that they keep for themselves.
assert attribute(1) - kernel["static_shared_bytes"] in (0, 1024), attribute(1)

if hasattr(driver, "cuFuncGetParamInfo"):  # since CUDA 12.4
    for index, parameter in enumerate(kernel["parameters"]):
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        call("cuFuncGetParamInfo", function, ctypes.c_size_t(index), ctypes.byref(offset), ctypes.byref(size))
        assert size.value == parameter["size"], parameter

def on_device(values):
    array, pointer = (ctypes.c_int32 * len(values))(*values), ctypes.c_uint64()
    size = ctypes.c_size_t(ctypes.sizeof(array))
    call("cuMemAlloc_v2", ctypes.byref(pointer), size)
    call("cuMemcpyHtoD_v2", pointer, array, size)
    return array, pointer, size

counts, counts_pointer, counts_size = on_device([-7] * num_experts)
given = {
    "topk_ids": on_device(numbers)[1].value,
    "counts": counts_pointer.value,
    "num_slots": len(numbers),
    "num_experts": num_experts,
    "num_local": num_experts,
    "stride": -(-num_experts // 8) * 8,
    "num_positions": 0,
    "num_words": 0,
}
scalars = {"int32": ctypes.c_int32, "int64": ctypes.c_int64, "float32": ctypes.c_float}
values = []
for parameter in kernel["parameters"]:
    if parameter["kind"] == "pointer":
        assert parameter["name"] in given or parameter["optional"], parameter
        values.append(ctypes.c_uint64(given.pop(parameter["name"], 0)))
    else:
        values.append(scalars[parameter["dtype"]](given.pop(parameter["name"])))
    assert ctypes.sizeof(values[-1]) == parameter["size"], parameter
assert not given, given
addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
call("cuLaunchKernel", function, 1, 1, 1, 1024, 1, 1, 0, None, addresses, None)
call("cuCtxSynchronize")
call("cuMemcpyDtoH_v2", counts, counts_pointer, counts_size)
assert not {"numba", "numba_moe", "torch", "cuda"} & set(sys.modules)
print(json.dumps(list(counts)))
"""

EXPORT_COUNTING = """
import sys
from numba_moe import cli
from numba_moe.runtime import compile
every = compile.kernels
compile.kernels = lambda: [kernel for kernel in every() if kernel.py_func.__name__ == "count_slots"]
assert cli.main(sys.argv[1:]) == 0
"""


@pytest.mark.gpu
def test_a_kernel_is_launched_from_the_manifest_alone(tmp_path, without_simulator):
    without_simulator(EXPORT_COUNTING, "export", str(tmp_path))  # for the devices here
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(0))
    ids = np.random.default_rng(0).integers(-2, 63, 1000)
    arguments = [str(tmp_path), arch, json.dumps(ids.tolist()), "61"]
    done = subprocess.run([sys.executable, "-c", LAUNCH, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == np.bincount(ids[(ids >= 0) & (ids < 61)], minlength=61).tolist()
