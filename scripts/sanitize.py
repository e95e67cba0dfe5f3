"""Run a quick verification under compute-sanitizer, once with each tool; needs a CUDA device."""

import argparse
import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Return 1 if any tool reports an error or the verification fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tool", action="append", help="memcheck, racecheck, ... (default: these two)")
    parser.add_argument("verify", nargs="*", help="options of verify.py, after -- (default: --quick)")
    options = parser.parse_args()
    verify = [sys.executable, str(Path(__file__).with_name("verify.py")), *(options.verify or ["--quick"])]
    # API errors are left out: cuda-bindings probes for entry points that older drivers lack, and handles their absence
    failed = False
    for tool in options.tool or ["memcheck", "racecheck"]:
        command = ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "2", *verify]
        print(" ".join(command), flush=True)
        failed |= subprocess.run(command).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
