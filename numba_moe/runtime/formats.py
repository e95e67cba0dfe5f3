"""What files of arrays hold, read without running code from them and without more memory than they justify.

A file's numbers may ask for far more memory than it has bytes: a header that claims a large shape, an array that
compresses well, a tensor with strides of 0, a largest id. `check_memory` bounds what they ask for.
"""

import csv
import decimal
import io
import json
import math
import os
import pickle
import pickletools
import re
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from numba_moe.runtime import checks, files

ROUTING_FORMATS = (".npy", ".npz", ".safetensors", ".pt", ".pth")
CSV_HEADER = "layer_id,expert_id,count"
# A file may ask for 64 MiB, or for 200 times its size if that is more.
ALWAYS_ALLOWED = 64 << 20
MOST_TIMES = 200
# No header of an array that NumPy reads is longer.
MOST_HEADER = 1 << 16
# `torch.save` needs no later one.
TORCH_PROTOCOL = 2
STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}


def read(path: Path, suffixes: Sequence[str]) -> Any:
    """Read what a file holds, as it is; arrays are NumPy's, and floats that NumPy lacks become float32."""
    checks.choice("path", path.suffix, suffixes)
    with files.reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            return _READERS[path.suffix](file, size)
        except Exception as error:  # readers raise what they like
            found = f"{path.name} of {size} bytes ({type(error).__name__}: {error})"
            raise ValueError(f"`path` must be a whole {path.suffix} file, got {found}") from error


def check_memory(argument: str, what: str, wanted: int, size: int) -> None:
    """Check that what is made of a file of `size` bytes takes no more memory than the file justifies."""
    most = max(ALWAYS_ALLOWED, MOST_TIMES * size)
    rule = f"small enough for {what} to take at most {most} bytes (64 MiB, or {MOST_TIMES} times the file)"
    checks.holds(argument, rule, wanted <= most, f"{wanted} bytes")


def array(name: str, value: Any, ndims: Sequence[int], dtype: str = "int64", empty: bool = False) -> np.ndarray:
    """Return an array of a file, integers also if they are written as floats.

    Anything else is a wrong value: the caller gave a file of the right type.
    """
    if empty and 1 in ndims and isinstance(value, list) and not value:  # as JSON has it, without a type
        return np.zeros(0, dtype)
    if dtype == "int64":
        value = _whole(name, value)
    try:
        return checks.host_array(name, value, dtype, ndims, empty)
    except TypeError as error:
        raise ValueError(str(error)) from error


def counts(name: str, value: Any, ndims: Sequence[int], empty: bool = False) -> np.ndarray:
    """Return the counts of a file: not negative, and together within int64."""
    found = array(name, value, ndims, empty=empty)
    checks.counts(name, found)
    return found


def _whole(name: str, value: Any) -> Any:
    """Return whole floats as integers, and what has other kinds of elements, or too large ones, as it is."""
    try:
        found = np.asarray(value)
    except ValueError:
        return value  # rows of several lengths, which `array` refuses
    if found.dtype.kind != "f" or not found.size:
        return value
    are_whole = found == np.floor(found)
    if not are_whole.all():
        checks.holds(name, "whole numbers", False, found[~are_whole][0])
    return found.astype(np.int64) if (np.abs(found) < 2.0**63).all() else value


def integer(name: str, value: Any, lowest: int, highest: int = checks.LARGEST_INT64) -> int:
    """Return a number of a file; what is none is a wrong value, as for `array`."""
    try:
        return checks.integer(name, value, lowest, highest)
    except TypeError as error:
        raise ValueError(str(error)) from error


def parse_json(text: str | bytes) -> Any:
    """Parse JSON in which no object has a key twice: which of the two counts would be a guess."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
        return found

    return json.loads(text, object_pairs_hook=unique)


def read_csv(path: Path, num_layers: int | None = None, num_experts: int | None = None) -> np.ndarray:
    """Read lines of layer, expert and count as counts [L, E]; lines of one expert add up.

    The sizes are by default those of the largest numbers. There may be a byte-order mark, and lines with nothing.
    """
    with files.reading(path) as file:
        data = file.read()
    try:
        text = io.StringIO(data.decode("utf-8-sig"), newline="")
        lines = [line for line in csv.reader(text) if any(map(str.strip, line))]
        known = bool(lines) and ",".join(map(str.strip, lines[0])) == CSV_HEADER
        checks.holds("path", f"a file with the header {CSV_HEADER}", known, path.name)
        table = np.array([_three_numbers(line) for line in lines[1:]], np.int64).reshape(-1, 3)
    except (UnicodeDecodeError, OverflowError, csv.Error, _BadLineError) as error:
        raise ValueError(f"`path` must be a whole .csv file, got {path.name} ({error})") from error
    checks.holds("path", "a file of counts, none negative", bool(len(table) and (table >= 0).all()), path.name)
    checks.counts("path", table[:, 2])
    sizes = []
    for column, (name, size) in enumerate({"num_layers": num_layers, "num_experts": num_experts}.items()):
        least = int(table[:, column].max()) + 1
        if size is not None:
            checks.at_least(name, checks.integer(name, size, 1), least, f"what {path.name} names")
        sizes.append(size or least)
    check_memory("path", "its counts", 8 * math.prod(sizes), len(data))
    count = np.zeros(sizes, np.int64)
    np.add.at(count, (table[:, 0], table[:, 1]), table[:, 2])
    return count


class _BadLineError(Exception):
    """A line that is not three numbers."""


def _three_numbers(line: list[str]) -> list[int]:
    is_number = re.compile(r"-?[0-9]{1,20}(\.[0-9]{0,30})?([eE][+-]?[0-9]{1,2})?").fullmatch
    found = [decimal.Decimal(part.strip()) for part in line if is_number(part.strip())]
    if len(line) != 3 or len(found) != 3 or any(number != number.to_integral_value() for number in found):
        raise _BadLineError(f"{','.join(line)!r} is not three whole numbers")
    return [int(number) for number in found]


def _read_json(file: IO[bytes], _size: int) -> Any:
    return parse_json(file.read())


def _read_npy(file: IO[bytes], size: int) -> np.ndarray:
    """Read an array of a file or of a member of an archive, if its header claims no more bytes than there are."""
    head = io.BytesIO(file.read(MOST_HEADER))
    version = np.lib.format.read_magic(head)
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = headers[version](head)
    claimed, there = math.prod(shape) * dtype.itemsize, size - head.tell()
    if min(shape, default=0) < 0 or claimed > there:
        raise ValueError(f"its header claims shape {shape} of {dtype}, and {there} bytes follow")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Return what an archive has, if no name is there twice and all of it together is no more than it justifies."""
    members = {member.filename: member for member in archive.infolist()}
    if len(members) < len(archive.infolist()):
        raise ValueError("a name is there twice")
    if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members.values()):
        raise ValueError("it is compressed in a way that neither NumPy nor torch writes")
    check_memory("path", "what it holds", sum(member.file_size for member in members.values()), size)
    return members


def _read_npz(file: IO[bytes], size: int) -> dict[str, np.ndarray]:
    found = {}
    with zipfile.ZipFile(file) as archive:
        for name, member in _members(archive, size).items():
            if name.endswith(".npy"):
                with archive.open(member) as part:
                    found[name.removesuffix(".npy")] = _read_npy(part, member.file_size)
    return found


def _read_safetensors(file: IO[bytes], _size: int) -> dict[str, np.ndarray]:
    from safetensors.torch import load

    data = file.read()
    (length,) = struct.unpack("<Q", data[:8])
    parse_json(data[8 : 8 + length])  # raises for a name that is there twice; `load` would take the last
    return {name: _to_numpy(tensor) for name, tensor in load(data).items()}


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    known = (torch.float16, torch.float32, torch.float64)
    found: np.ndarray = (tensor.float() if tensor.is_floating_point() and tensor.dtype not in known else tensor).numpy()
    return found


class _TorchFile(pickle.Unpickler):
    """The content of a file of `torch.save`, made of containers, numbers, text and arrays alone.

    torch's own reader takes sizes, strides and lengths of storages as the file has them: one flipped byte makes it
    ask for terabytes, or read past what it has.
    """

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self.archive, self.members, self.size = archive, _members(archive, size), size
        (description,) = (name for name in self.members if name.endswith("/data.pkl"))
        self.root = description.removesuffix("data.pkl")
        data = archive.read(description)
        for opcode, argument, _ in pickletools.genops(data):
            # The unpickler makes a table as long as the largest place that something is put in.
            place = argument if "PUT" in opcode.name and argument is not None else 0
            if opcode.proto > TORCH_PROTOCOL or opcode.name == "BUILD" or place > len(data):
                raise pickle.UnpicklingError(f"{opcode.name} {argument} is nothing that torch.save writes")
        super().__init__(io.BytesIO(data))
        self.buffers: dict[str, bytearray] = {}
        self.wanted = 0  # bytes of all tensors
        # Nothing here copies what it is given: it may be given the same many times.
        self.known = {
            "collections.OrderedDict": lambda: OrderedDict(),
            "torch.Size": lambda sizes: sizes,
            "_codecs.encode": lambda text, encoding: text,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor_of_bytes,
            "torch.storage.UntypedStorage": torch.uint8,
        }

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in self.known:
            return self.known[f"{module}.{name}"]
        dtype = STORAGES.get(name, vars(torch).get(name))
        if module != "torch" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return dtype

    def persistent_load(self, saved: Any) -> tuple[bytearray, torch.dtype]:
        _, dtype, key, _, length = saved
        member = self.members[f"{self.root}data/{key}"]
        if length * dtype.itemsize != member.file_size:
            raise pickle.UnpicklingError(f"a storage of {length} x {dtype} has {member.file_size} bytes")
        if key not in self.buffers:
            self.buffers[key] = bytearray(self.archive.read(member))
        return self.buffers[key], dtype

    def _tensor(self, storage: Any, offset: Any, sizes: Any, strides: Any, *about: Any) -> np.ndarray:
        """Return an array of a storage; `about` is what autograd needs, and last what is done to values when read."""
        buffer, dtype = storage
        if any(about[2:]):
            raise pickle.UnpicklingError(f"a tensor is more than its storage: {about[2:]}")
        self.wanted += math.prod(sizes) * dtype.itemsize
        check_memory("path", "its tensors", self.wanted, self.size)
        flat = torch.frombuffer(buffer, dtype=dtype) if buffer else torch.empty(0, dtype=dtype, device="cpu")
        return _to_numpy(flat.as_strided(sizes, strides, offset))  # which stays within the buffer

    def _tensor_of_bytes(
        self, storage: Any, offset: Any, sizes: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *about: Any
    ) -> np.ndarray:
        return self._tensor((storage[0], dtype), offset, sizes, strides, grad, hooks, *about)

    def read(self) -> Any:
        order = self.root + "byteorder"
        if order in self.members and self.archive.read(order).decode() != sys.byteorder:
            raise ValueError("it has the byte order of another machine")
        content = self.load()
        self._check_repeats(content, [0, 0])
        return content

    def _check_repeats(self, value: Any, seen: list[int]) -> None:
        """Count values and bytes as often as they are there: a list of a list twice, and so on, doubles."""
        if isinstance(value, np.ndarray):
            seen[1] += value.nbytes
            check_memory("path", "its tensors", seen[1], self.size)
        elif isinstance(value, dict | list | tuple):
            seen[0] += len(value)
            if seen[0] > self.size:
                raise ValueError("it has more values than bytes")
            for part in value.values() if isinstance(value, dict) else value:
                self._check_repeats(part, seen)


def _read_pt(file: IO[bytes], size: int) -> Any:
    with zipfile.ZipFile(file) as archive:
        return _TorchFile(archive, size).read()


_READERS = {
    ".json": _read_json,
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".pt": _read_pt,
    ".pth": _read_pt,
    ".safetensors": _read_safetensors,
}


def write_pt(file: IO[bytes], content: Any) -> None:
    """Write what torch reads, arrays as tensors; a disk that is full is an OSError, as it is of any other format."""
    try:
        torch.save(_with_tensors(content), file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch's writer reports it as an unexpected position
            raise error.__context__ from error
        raise


def _with_tensors(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _with_tensors(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_with_tensors(value) for value in content]
    return torch.from_numpy(np.array(content)) if isinstance(content, np.ndarray) else content


def load_routing(path: Path) -> dict[str, np.ndarray]:
    """Read topk_ids and gating logits from .npy, .npz, .safetensors or .pt, without running code from the file."""
    checks.holds("path", "a .npy, .npz, .safetensors or .pt file", path.suffix in ROUTING_FORMATS, path.name)
    loaded = read(path, ROUTING_FORMATS)
    usable = {}
    for name, found in (loaded if isinstance(loaded, dict) else {"array": loaded}).items():
        if not isinstance(found, np.ndarray):
            continue
        if np.issubdtype(found.dtype, np.integer) and found.ndim in (1, 2):
            array(str(name), found, (1, 2), empty=True)  # which refuses what int64 cannot hold
            usable[str(name)] = np.ascontiguousarray(found)
        elif np.issubdtype(found.dtype, np.floating) and found.ndim == 2:
            usable[str(name)] = np.ascontiguousarray(found)
    if not usable:
        raise ValueError(f"{path.name} holds no topk_ids (integers, 1 or 2 dimensions) and no logits (floats, 2)")
    return usable
