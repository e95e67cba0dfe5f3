"""What the package's code was when it was imported; and numba-cuda, which kernels are written for, as `numba.cuda`."""

import contextlib
import hashlib
import importlib
import importlib.util
import os
from pathlib import Path

PACKAGE = Path(__file__).parents[1]

# A .pth file makes `numba.cuda` numba-cuda, but not in a folder made by `pip install --target`.
with contextlib.suppress(ModuleNotFoundError):
    importlib.import_module("_numba_cuda_redirector")


def digest() -> str | None:
    """Return a digest of the files that the package is imported from: None in an archive, or if one cannot be read."""
    reference = importlib.util.find_spec("numba_moe.reference")  # not within the package where that is editable
    beside = (reference and reference.submodule_search_locations) or ()
    roots = dict.fromkeys((str(PACKAGE), *(place for place in beside if PACKAGE not in Path(place).parents)))
    digest, count = hashlib.sha256(), 0
    for root in roots:
        for place, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if name != "__pycache__")
            for name in sorted(name for name in names if name.endswith((".py", ".pyc"))):
                path = os.path.join(place, name)
                try:
                    with open(path, "rb") as file:
                        content = file.read()
                except OSError:  # an upgrade removes it just now
                    return None
                digest.update(f"{os.path.relpath(path, root)}\0{len(content)}\0".encode() + content)
                count += 1
    return digest.hexdigest() if count else None


# Taken when the first kernel's file is imported: what runs is what lay there then.
IMPORTED = digest()
