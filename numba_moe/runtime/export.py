"""Kernels as files that any program with a CUDA driver can load: a cubin each, and `manifest.json` that describes them.

The manifest is a JSON object of

- `schema`: version of this format, 1. It changes when a field changes its meaning or goes, not when one is added;
- `package`, `compilers`: versions of numba_moe, and of what compiled the kernels, by distribution;
- `kernels`: a list, with one object for each specialisation of a kernel and each architecture.

A kernel's object has

- `kernel`, `arch`: its name in its source, and the GPUs that run it: "sm_90" is compute capability 9.0 and later minor
  versions of 9;
- `file`, `sha256`: the cubin beside the manifest, and the digest of its bytes in hexadecimal;
- `entry`: its name in the cubin, for cuModuleGetFunction;
- `constants`: values that this specialisation was compiled for, by name; they are no parameters;
- `parameters`: what cuLaunchKernel takes, in this order. Each has a `name`, a `kind` ("pointer" to device memory, or
  "scalar"), a `dtype`, of the elements or of the scalar (NumPy's name, or "bfloat16"), its `size` in bytes, and a
  pointer has `optional`, true where null says that the array is absent. `record` names the record that it is a field
  of in the kernel's source, null for none, and `doc` is what the source says of it: the shape of an array, for
  instance;
- `max_threads_per_block`: the launch bound that it was compiled with, or 1024, or what its registers allow;
- `static_shared_bytes`: shared memory of its own arrays, without what the driver keeps for itself in each block;
- `max_dynamic_shared_bytes`: the most dynamic shared memory that this library launches with. More than 48 KiB of shared
  memory in all needs CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES raised first;
- `registers`: those of a thread;
- `doc`: what it does, its grid, and its dynamic shared memory. The function that launches it chooses the grid.

From sm_90 on a kernel begins by waiting for the one ahead of it on the stream, so it may be launched with
CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, as this library does; it need not.

Kernels read some arrays 16 bytes at a time from their beginning, where memory from cuMemAlloc is aligned well enough.
"""

import ast
import functools
import hashlib
import inspect
import io
import json
import os
import struct
import textwrap
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from numba_moe.runtime import cache, compile, files

SCHEMA = 1
MANIFEST = "manifest.json"
POINTER_BYTES = 8
MOST_THREADS = 1024
# Of a block, on every GPU since sm_80; a thread takes eight at a time, and warps come by four.
MOST_REGISTERS = 64 * 1024

# Of a cubin's ELF: the registers of a function, and how much of its shared memory is the driver's own.
REGISTER_COUNT = 0x2F
RESERVED_SHARED = 1024


def export(folder: str | os.PathLike[str], compute_capabilities: Iterable[tuple[int, int]]) -> int:
    """Write every specialisation of every kernel as a cubin, and a manifest of them, with a progress bar.

    Parameters
    ----------
    folder : path
        Made if need be. Files of the same names are replaced, each at once; others stay. The manifest comes last.
    compute_capabilities : iterable of (major, minor)
        What to compile for.

    Returns
    -------
    int
        Number of cubins.

    Raises
    ------
    OSError
        The folder cannot be made or written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    described = []
    for kernel, entry in compile.every_compiled(compute_capabilities):
        description = describe(kernel, entry)
        _write(folder / description["file"], entry.cubin)
        described.append(description)
    manifest = {
        "schema": SCHEMA,
        "package": {"numba-moe": cache.version("numba-moe")},
        "compilers": cache.compilers(),
        "kernels": described,
    }
    _write(folder / MANIFEST, json.dumps(manifest, indent=2).encode() + b"\n")
    return len(described)


def describe(kernel: Any, entry: cache.Entry) -> dict[str, Any]:
    """Return a kernel's object in the manifest."""
    parameters: list[dict[str, Any]] = []
    constants = {}
    for parameter, choice in compile.chosen(kernel, entry.specialisation):
        if parameter.is_constant:
            constants[parameter.name] = choice
            continue
        if parameter.is_array:
            about = {"kind": "pointer", "dtype": choice, "size": POINTER_BYTES, "optional": None in parameter.options}
        else:
            about = {"kind": "scalar", "dtype": choice, "size": np.dtype(str(choice)).itemsize}
        record = parameter.owner.__name__ if isinstance(parameter.owner, type) else None
        said = {"record": record, "doc": comments(parameter.owner)[parameter.name]}
        parameters.append({"name": parameter.name, **about, **said})
    arch = int(entry.arch.removeprefix("sm_"))
    static_shared_bytes, registers = _resources(entry.cubin, entry.entry_name, arch)
    bounds = compile.launch_bounds(kernel, entry.specialisation, divmod(arch, 10)) or MOST_THREADS
    most_threads = bounds if isinstance(bounds, int) else bounds[0]
    threads_allowed = MOST_REGISTERS // (-(-registers // 8) * 8) // 128 * 128
    return {
        "kernel": entry.kernel,
        "arch": entry.arch,
        "file": "-".join(map(str, (entry.kernel, entry.arch, *entry.specialisation))) + ".cubin",
        "sha256": hashlib.sha256(entry.cubin).hexdigest(),
        "entry": entry.entry_name,
        "constants": constants,
        "parameters": parameters,
        "max_threads_per_block": min(most_threads, threads_allowed),
        "static_shared_bytes": static_shared_bytes,
        "max_dynamic_shared_bytes": compile.MOST_SHARED_BYTES,
        "registers": registers,
        "doc": inspect.getdoc(kernel.py_func) or "",
    }


@functools.cache
def comments(owner: Any) -> dict[str, str]:
    """Return the comments after the fields of a record, or after the parameters of a function; "" for no comment."""
    source = textwrap.dedent(inspect.getsource(owner))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    (definition,) = ast.parse(source).body
    fields: list[tuple[str, ast.AnnAssign | ast.arg]]
    if isinstance(definition, ast.ClassDef):
        fields = [(ast.unparse(node.target), node) for node in definition.body if isinstance(node, ast.AnnAssign)]
    else:
        assert isinstance(definition, ast.FunctionDef)
        fields = [(node.arg, node) for node in definition.args.args]
    return {name: by_line.get(node.end_lineno or 0, "") for name, node in fields}


def _write(path: Path, content: bytes) -> None:
    with files.replacing(path) as file:
        file.write(content)


class _Section(NamedTuple):
    name: str
    offset: int
    size: int


def _text(content: bytes, start: int) -> str:
    return content[start : content.index(b"\0", start)].decode()


def _sections(cubin: bytes) -> dict[str, _Section]:
    """Return the sections of a 64-bit little-endian ELF file by name."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + index * entry_size) for index in range(count)]
    found = (_Section(_text(cubin, headers[names][4] + name), *rest) for name, _, _, _, *rest in headers)
    return {section.name: section for section in found}


def _symbols(cubin: bytes, sections: dict[str, _Section]) -> list[tuple[str, int]]:
    """Return the name and the value of every symbol."""
    table, names = sections[".symtab"], sections[".strtab"]
    symbols = struct.iter_unpack("<IBBHQQ", cubin[table.offset : table.offset + table.size])
    return [(_text(cubin, names.offset + name), value) for name, _, _, _, value, _ in symbols]


def _attributes(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the records of a section `.nv.info` that have more than four bytes: attribute and value."""
    # A record is its format, its attribute and 16 bits, which in format 4 are the size of a value that follows.
    position = 0
    while position < len(content):
        form, attribute, size = struct.unpack_from("<BBH", content, position)
        position += 4
        if form == 4:
            yield attribute, content[position : position + size]
            position += size


def _resources(cubin: bytes, entry_name: str, arch: int) -> tuple[int, int]:
    """Return a kernel's static shared memory in bytes, and the registers of its threads."""
    sections = _sections(cubin)
    symbols = _symbols(cubin, sections)
    shared = sections.get(f".nv.shared.{entry_name}")
    # From sm_90 on, the section of a kernel that has one begins with the driver's part.
    static_shared_bytes = shared.size - (RESERVED_SHARED if arch >= 90 else 0) if shared else 0
    info = sections[".nv.info"]
    records = _attributes(cubin[info.offset : info.offset + info.size])
    counts = (struct.unpack("<II", value) for attribute, value in records if attribute == REGISTER_COUNT)
    registers = {symbols[symbol][0]: count for symbol, count in counts}
    return static_shared_bytes, registers[entry_name]
