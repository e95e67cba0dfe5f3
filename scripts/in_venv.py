"""Run a command in the project's own virtual environment, made on first use; needs Python and pip only.

    python3 scripts/in_venv.py python scripts/verify.py
    python3 scripts/in_venv.py pytest

The environment lies in .venv (NUMBA_MOE_VENV moves it) and holds the package, editable, with what its tests need, at
the versions of constraints.txt. It is made again when those change.
"""

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(os.environ.get("NUMBA_MOE_VENV", ROOT / ".venv"))
SOURCES = ("constraints.txt", "pyproject.toml", "setup.cfg")


def executables() -> Path:
    return FOLDER / ("Scripts" if os.name == "nt" else "bin")


def install() -> None:
    """Make the environment unless it stands as the sources ask."""
    wanted = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in SOURCES) + sys.version.encode()).hexdigest()
    stamp = FOLDER / "installed-from"
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    print(f"Installing into {FOLDER}; this takes a minute or two.", file=sys.stderr, flush=True)
    venv.create(FOLDER, clear=True, with_pip=True)
    python = executables() / "python"
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--progress-bar", "off"]
    subprocess.run(
        [*command, "--constraint", str(ROOT / "constraints.txt"), "--editable", f"{ROOT}[cu13,plot,test]"], check=True
    )
    stamp.write_text(wanted)


def main() -> int:
    """Install if need be, then run the command and return its exit status."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 0 if len(sys.argv) > 1 else 2
    install()
    os.environ["PATH"] = f"{executables()}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ["VIRTUAL_ENV"] = str(FOLDER)
    return subprocess.run(sys.argv[1:], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
