"""The command `numba-moe`."""

import argparse
import os
import sys
from collections.abc import Sequence


def use_simulator_without_gpu() -> None:
    """Turn Numba's CUDA simulator on where there is no CUDA device; Numba reads the switch when imported."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["verify"]:
        use_simulator_without_gpu()  # before anything imports numba
    from numba_moe import bench, verification
    from numba_moe.placement import command as rebalancing
    from numba_moe.recorder import report

    parser = argparse.ArgumentParser("numba-moe", description="Mixture-of-Experts routing as Numba CUDA kernels.")
    commands = parser.add_subparsers(dest="command", required=True)
    text = "compare the kernels with the reference"
    verify = commands.add_parser("verify", help=text, description=verification.__doc__)
    verification.add_arguments(verify)
    verify.set_defaults(run=verification.run)
    text = "time the ops beside other implementations"
    timing = commands.add_parser("bench", help=text, description=bench.__doc__)
    bench.add_arguments(timing)
    timing.set_defaults(run=bench.run)
    text = "replay recorded loads against ways of placing experts, to see whether moving them pays"
    rebalance = commands.add_parser("rebalance", help=text, description=rebalancing.__doc__)
    rebalancing.add_arguments(rebalance)
    rebalance.set_defaults(run=rebalancing.run)
    text = "draw what a recorder dumped: hot experts, loads of ranks, balance over time, what a rebalance would change"
    drawing = commands.add_parser("report", help=text, description=report.__doc__)
    report.add_arguments(drawing)
    drawing.set_defaults(run=report.run)
    text = "compile every kernel ahead of its first use, also on a machine without a GPU"
    warmup = commands.add_parser("warmup", help=text, description=f"{text.capitalize()}.")
    text = "comma-separated, like sm_90,sm_100 (default: those of the devices here)"
    warmup.add_argument("--arch", metavar="LIST", type=_architectures, help=text)
    warmup.set_defaults(run=_warmup)
    description = "write every kernel as a cubin, and manifest.json that describes them, for programs without Python"
    export = commands.add_parser("export", help=description, description=f"{description.capitalize()}.")
    export.add_argument("--arch", metavar="LIST", type=_architectures, help=text)
    export.add_argument("folder", metavar="DIR", help="made if need be; files of the same names are replaced")
    export.set_defaults(run=_export)
    text = "print versions, devices, and what the cache of compiled kernels holds"
    info = commands.add_parser("info", help=text, description=f"{text.capitalize()}.")
    info.set_defaults(run=_info)
    options = parser.parse_args(given)
    status: int = options.run(options)
    return status


def _architectures(text: str) -> list[tuple[int, int]]:
    found = []
    for name in text.split(","):
        number = name.removeprefix("sm_")
        if not (name.startswith("sm_") and number.isdecimal() and len(number) >= 2):
            raise argparse.ArgumentTypeError(f"must be names like sm_90, got {name!r}")
        found.append((int(number[:-1]), int(number[-1])))
    return list(dict.fromkeys(found))


def _devices() -> dict[str, tuple[int, int]]:
    import torch

    return {
        f"{index}: {torch.cuda.get_device_name(index)}": torch.cuda.get_device_capability(index)
        for index in range(torch.cuda.device_count())
    }


def _wanted(options: argparse.Namespace) -> list[tuple[int, int]]:
    wanted: list[tuple[int, int]] = options.arch or sorted(set(_devices().values()))
    if not wanted:
        message = "no CUDA device here; name what to compile for with --arch"
        print(f"numba-moe {options.command}: {message}", file=sys.stderr)
    return wanted


def _warmup(options: argparse.Namespace) -> int:
    from numba_moe.runtime import cache, compile

    wanted = _wanted(options)
    if not wanted:
        return 2
    if not cache.enabled():
        print("numba-moe warmup: the cache is off (NUMBA_MOE_CACHE=0)", file=sys.stderr)
        return 2
    if cache.folder() is None:
        print("numba-moe warmup: there is no home directory; set NUMBA_MOE_CACHE_DIR", file=sys.stderr)
        return 2
    count = compile.compile_all(wanted)
    print(f"{count} kernels ready in {cache.folder()}, {compile.statistics['compiled']} of them compiled now")
    return 0


def _export(options: argparse.Namespace) -> int:
    from numba_moe.runtime import export

    wanted = _wanted(options)
    if not wanted:
        return 2
    try:
        count = export.export(options.folder, wanted)
    except OSError as error:
        print(f"numba-moe export: {error}", file=sys.stderr)
        return 2
    print(f"{count} kernels and {export.MANIFEST} in {options.folder}")
    return 0


def _info(options: argparse.Namespace) -> int:
    import platform
    from collections import Counter

    from tabulate import tabulate

    from numba_moe.runtime import cache
    from numba_moe.verification import PACKAGES

    versions = [("python", platform.python_version()), *((name, cache.version(name)) for name in PACKAGES)]
    print(tabulate(versions, ("package", "version")), end="\n\n")
    devices = [(name, "sm_{}{}".format(*capability)) for name, capability in _devices().items()]
    print(tabulate(devices, ("device", "arch")) if devices else "no CUDA device", end="\n\n")
    found = list(cache.entries())
    size = sum(path.stat().st_size for path, _ in found)
    state = "" if cache.enabled() else ", off (NUMBA_MOE_CACHE=0)"
    where = cache.folder() or "no folder, as there is no home directory"
    print(f"cache: {where}, {len(found)} kernels, {size / 1024:.0f} KiB{state}")
    current = Counter(
        (entry.kernel, entry.arch)
        for path, entry in found
        if path == cache.path_of(entry.kernel, entry.specialisation, entry.arch)
    )
    if current:
        rows = [(*name, count) for name, count in sorted(current.items())]
        print("\n" + tabulate(rows, ("kernel of this version", "arch", "specialisations")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
