"""Install the package beside the oldest, the pinned and the newest releases of what it needs, and try it there.

    python scripts/try_versions.py --folder /tmp/versions                      # a row of docs/versions.md each
    python scripts/try_versions.py --folder /tmp/versions oldest@3.10 newest@3.13

The oldest are the bounds of pyproject.toml with CUDA 12, the pinned are those of constraints.txt, the newest are what
pip chooses, both with CUDA 13. Each Python from 3.10 to 3.14 on PATH, or among pyenv's, tries the pinned; the first
tries the oldest and the last the newest. A try compiles one specialisation of every kernel to machine code for sm_90
and runs the quick tests, where torch's private names are used and where they are not. Environments are made in the
folder one after another and deleted again: with a CUDA build of torch each takes some 8 GB and several minutes.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = tuple(f"3.{minor}" for minor in range(10, 15))
# What the columns of the table are: packages, of which an environment has one.
COLUMNS = {
    "torch": ("torch",),
    "Numba": ("numba",),
    "numba-cuda": ("numba-cuda",),
    "cuda-core": ("cuda-core",),
    "CUDA's compiler": ("nvidia-nvvm", "nvidia-cuda-nvcc-cu12"),
    "NumPy": ("numpy",),
    "transformers": ("transformers",),
}
QUICK = (
    *("package", "docs", "arrays", "array_libraries", "torch_private", "torch_ops", "transformers"),
    *("recorder_files", "recorder_http"),
)
COMPILE = """
from numba_moe.runtime import compile
for kernel in compile.kernels():
    compile.compiled(kernel, compile.specialisations(kernel)[0], (9, 0))
print(compile.statistics["compiled"])
"""


def oldest() -> str:
    """Return the lower bounds of pyproject.toml as constraints; which release of CUDA, torch says."""
    bounds = re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    others = ("setuptools", "cuda-toolkit")
    return "\n".join(sorted({f"{name}=={version}" for name, version in bounds if name not in others}))


# Of each set of releases: its constraints, and the extra that brings CUDA's packages.
SETS: dict[str, tuple[Callable[[], str], str]] = {
    "oldest": (oldest, "cu12"),
    "pinned": (lambda: (ROOT / "constraints.txt").read_text(), "cu13"),
    "newest": (lambda: "", "cu13"),
}


class Try(NamedTuple):
    """A set of releases on a Python."""

    releases: str
    python: str


def interpreter(version: str) -> Path | None:
    """Return the newest Python of a version that runs, of pyenv's and the one on PATH."""
    found = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    on_path = shutil.which(f"python{version}")
    for path in [*reversed(found), *([Path(on_path)] if on_path else [])]:
        if subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:  # pyenv's shims may lead nowhere
            return path
    return None


def wanted(names: list[str]) -> list[Try]:
    """Return the tries that are named, or those that the Pythons here allow."""
    if names:
        return [Try(*name.split("@")) for name in names]
    there = [version for version in PYTHONS if interpreter(version)]
    pinned = [Try("pinned", version) for version in there]
    return [Try("oldest", there[0]), *pinned, Try("newest", there[-1])] if there else []


def run(command: list[str], log: Path, **environment: str) -> str:
    """Run a command, write its output to the log, and return the last line that says something."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n{done.stdout}\n")
    last = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "")
    return last if done.returncode in (0, 1) else f"status {done.returncode}: {last}"


def attempt(one: Try, folder: Path) -> list[str]:
    """Make an environment, try the package in it, and return the row of the table."""
    name = f"{one.releases}-{one.python}"
    here, log = folder / name, folder / f"{name}.log"
    log.unlink(missing_ok=True)
    constraints, extra = SETS[one.releases]
    constraints_file = folder / f"{name}.txt"
    constraints_file.write_text(constraints())
    python = str(here / "bin" / "python")
    run(
        [str(interpreter(one.python)), "-m", "venv", "--clear", "--upgrade-deps", str(here)], log
    )  # an old pip takes long
    pip = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--constraint",
        str(constraints_file),
    ]
    installed = run([*pip, "--editable", f"{ROOT}[{extra},plot,test]"], log)
    if "ERROR" in installed:
        return [one.python, one.releases, *["" for _ in COLUMNS], "", installed]
    listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], capture_output=True, text=True).stdout
    versions = {package["name"].lower().replace("_", "-"): package["version"] for package in json.loads(listed)}
    columns = (next((versions[p] for p in packages if p in versions), "-") for packages in COLUMNS.values())
    cache = {"NUMBA_MOE_CACHE_DIR": str(here / "cache")}
    compiled = run([python, "-c", COMPILE], log, **cache)
    tests = [f"tests/test_{test}.py" for test in QUICK]
    tested = run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], log, **cache)
    return [
        one.python,
        one.releases,
        *columns,
        compiled,
        re.sub(r" in [\d.]+s.*|, \d+ skipped", "", tested).strip("= "),
    ]


def main() -> int:
    """Try what is asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where environments are made, and logs kept")
    parser.add_argument("--keep", action="store_true", help="do not delete environments")
    parser.add_argument("tries", nargs="*", metavar="SET@PYTHON", help=f"sets: {', '.join(SETS)}")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    header = ["Python", "releases", *COLUMNS, "kernels compiled", "quick tests"]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    for one in wanted(options.tries):
        print(f"| {' | '.join(attempt(one, options.folder))} |", flush=True)
        if not options.keep:
            shutil.rmtree(options.folder / f"{one.releases}-{one.python}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
