"""What each command of `numba-moe` is called, what it does and which options it has.

Nothing here imports torch, NumPy or Numba, so that help takes no time. What a command does is in the module that it
names, which is imported when the command runs.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# What the modules of the commands know as well; `tests/test_cli.py` compares them.
ALGORITHMS = ("deepseek", "refined")
BANDWIDTH = 50.0
GRIDS = (
    "topk_softmax",
    "topk_sigmoid",
    "grouped_topk",
    "moe_align_block_size",
    "moe_sum",
    "moe_permute",
    "moe_unpermute",
)
LIBRARIES = ("torch", "numpy", "numba", "cupy")
PEERS = ("vllm", "sglang", "torch", "triton", "triton_kernels")
ROUTINGS = ("uniform", "zipf", "one_hot")
TOP_K = 8


class Command(NamedTuple):
    """A command; `prepare` names a module and its function, which checks all and returns what works."""

    text: str
    about: str
    examples: str
    options: Callable[[argparse.ArgumentParser], None]
    prepare: str


def verify_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verification."""
    parser.add_argument("--op", action="append", metavar="PATTERN", help="only these ops; * and ? match")
    parser.add_argument("--case", action="append", metavar="PATTERN", help="only cases whose name contains this")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default 0)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="up to 100 tokens")
    size.add_argument("--full", action="store_true", help="up to 65536 tokens; without a GPU, every case there is")
    parser.add_argument("--input", type=Path, metavar="FILE", help="topk_ids or logits to verify on instead")
    parser.add_argument("--num-experts", type=int, metavar="N", help="of topk_ids in --input (default: largest id + 1)")
    text = f"for logits in --input (default {TOP_K}, or all experts if they are fewer)"
    parser.add_argument("--top-k", type=int, metavar="K", help=text)
    parser.add_argument("--block-size", type=int, metavar="ROWS", help="for --input (default 64)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes there too")
    parser.add_argument("--verbose", action="store_true", help="print every case, not only those that fail")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    _own_kernel_options(parser)


def _own_kernel_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options that name a kernel of one's own."""
    group = parser.add_argument_group("a kernel of your own, instead of the library's")
    group.add_argument("--module", metavar="FILE.py:NAME", help="a function, or a @cuda.jit kernel, in a file")
    group.add_argument("--like", metavar="OP", help="the op that it is like, whose cases it is run on")
    group.add_argument("--library", choices=LIBRARIES, help="whose arrays it takes (default: found out)")
    group.add_argument("--grid", type=_grid, metavar="BLOCKS,THREADS", help="of a kernel")
    group.add_argument("--fill", type=float, metavar="NUMBER", help="what a kernel's results hold before (else poison)")


def _grid(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"must be two numbers like 64,128, got {text!r}")
    return tuple(map(int, numbers))


def bench_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the benchmark."""
    parser.add_argument("--op", action="append", metavar="PATTERN", help="only these ops; * and ? match")
    parser.add_argument("--shape", action="append", metavar="TEXT", help="only shapes whose name contains this")
    parser.add_argument(
        "--routing", type=_among(ROUTINGS), default=["uniform"], metavar="NAMES", help=f"of {','.join(ROUTINGS)}"
    )
    parser.add_argument("--peers", type=_among(PEERS), metavar="NAMES", help=f"of {','.join(PEERS)}")
    parser.add_argument(
        "--peer-lib", type=Path, action="append", default=[], metavar="FILE", help="op library to load, .so or .so.xz"
    )
    parser.add_argument(
        "--peer-tree", type=Path, action="append", default=[], metavar="FOLDER", help="with packages of peers to import"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="show the times of an earlier run beside")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw time over tokens, of a grid the ratios")
    parser.add_argument("--patched", action="store_true", help="what `patch` puts into peers, beside the peers' own")
    _grid_options(parser)


def _among(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a parser of names with commas between them."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"must be among {', '.join(allowed)}, got {name!r}")
        return names

    return parse


def _grid_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the grid."""
    grid = parser.add_argument_group("grid", "shapes drawn from the product of axes, instead of those that are listed")
    grid.add_argument(
        "--grid", nargs="*", metavar="OP", help=f"of these ops, * and ? match; of all: {', '.join(GRIDS)}"
    )
    grid.add_argument("--shapes", type=int, default=300, metavar="N", help="shapes of each op (300)")
    grid.add_argument("--seed", type=int, default=0, help="what decides which shapes and which numbers (0)")
    grid.add_argument("--part", type=_part, default=(1, 1), metavar="I/N", help="the I-th of N equal parts of them")
    grid.add_argument("--seconds", type=float, default=float("inf"), help="begin no shape after so long")
    grid.add_argument("--merge", type=Path, nargs="+", metavar="JSON", help="measure nothing: gather these runs")


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"must be I/N with 1 <= I <= N, got {text!r}")
    return int(part), int(parts)


def rebalance_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the simulation."""

    def interval(text: str) -> int:
        return 0 if text == "once" else int(text)

    def size(text: str) -> int:
        try:
            return int(float(text))
        except OverflowError as error:
            raise ValueError from error

    add = parser.add_argument
    text = "logical_count or topk_ids, in .npz, .json, .pt, .npy or .safetensors, or counts in .csv"
    add("dump", type=Path, metavar="DUMP", help=text)
    add("--gpus", type=int, required=True, metavar="N", help="ranks of all nodes together")
    add("--nodes", type=int, default=1, metavar="N", help="(default 1)")
    add("--groups", type=int, default=1, metavar="N", help="groups of experts that stay on a node (default 1)")
    text = "slots of a layer, comma-separated (default: one for each expert, rounded up to a multiple of the GPUs)"
    add("--replicas", type=_listed(int, "whole numbers"), metavar="LIST", help=text)
    text = f"comma-separated (default {','.join(ALGORITHMS)})"
    add("--algorithm", type=_listed(str, "names"), default=list(ALGORITHMS), metavar="LIST", help=text)
    text = "steps between rebalances, comma-separated; once: one rebalance by the whole dump, in hindsight (default)"
    add("--interval", type=_listed(interval, "whole numbers, or once,"), metavar="LIST", help=text)
    text = "steps after which experts move once, by the loads of these steps, and then stay; comma-separated"
    add("--once-after", type=_listed(int, "whole numbers"), default=[], metavar="LIST", help=text)
    add("--search", action="store_true", help="try several numbers of slots and intervals where none are given")
    add("--max-moves", type=int, metavar="N", help="most slots of a layer that refined may change at a time")
    add("--location", type=Path, metavar="FILE", help="where experts are now (default: expert i %% E in slot i)")
    add("--bytes-per-expert", type=size, metavar="BYTES", help="weights of one expert of one layer")
    add("--step-ms", type=float, metavar="MS", help="time of all experts at an average step in perfect balance")
    text = f"GB/s into and out of a rank (default {BANDWIDTH:g})"
    add("--bandwidth", type=float, default=BANDWIDTH, metavar="GB/s", help=text)
    _sizes_of_dump(parser)
    add("--tokens-per-step", type=int, metavar="N", help="divide topk_ids into steps of N tokens")
    add("--detail", action="store_true", help="print every layer and rank over time")
    add("--json", type=Path, metavar="FILE", help="write all numbers there too")
    add("--out", type=Path, metavar="LOCATION", help="write the best location there: .json, .npz or .pt")
    add("--plot", type=Path, metavar="FILE.png", help="draw balancedness, time and ranks over the steps")


def _listed(convert: Callable[[str], Any], what: str) -> Callable[[str], list[Any]]:
    """Return a parser of values with commas between them."""

    def parse(text: str) -> list[Any]:
        try:
            return [convert(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be {what} with commas between, got {text!r}") from error

    return parse


def _sizes_of_dump(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "of a layer, where a .csv or ids alone cannot say (default: largest id + 1)"
    add("--experts", "--num-experts", dest="num_experts", type=int, metavar="N", help=text)
    text = "where a .csv cannot say (default: largest layer + 1)"
    add("--layers", "--num-layers", dest="num_layers", type=int, metavar="N", help=text)


def report_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the report."""
    parser.add_argument("dump", type=Path, metavar="DUMP", help="what `recorder.load` reads: .npz, .safetensors, ...")
    parser.add_argument("--out", type=Path, metavar="FILE", default=Path("report.html"), help="default: report.html")
    text = "write each picture to this folder as well (needs matplotlib)"
    parser.add_argument("--png", type=Path, metavar="DIR", help=text)
    parser.add_argument("--gpus", type=int, metavar="N", help="ranks that share the slots (default: as recorded)")
    text = "whose loads are drawn after a rebalance (default: deepseek); the table has both"
    parser.add_argument("--algorithm", choices=ALGORITHMS, default=ALGORITHMS[0], help=text)
    _sizes_of_dump(parser)


def merge_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the sum."""
    parser.add_argument("dumps", type=Path, nargs="+", metavar="DUMP", help="what `recorder.load` reads, of each rank")
    text = "where the sum goes: .npz, .safetensors, .json, .csv or .pt"
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=text)
    _sizes_of_dump(parser)


def serve_demo_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the demonstration."""
    parser.add_argument("--host", default="127.0.0.1", metavar="NAME", help="where to listen (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one (default: 8000)")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes that each run the model")
    parser.add_argument("--seconds", type=float, default=0.2, metavar="S", help="time of a pass (default: 0.2)")
    parser.add_argument("--directory", type=Path, default=Path(), metavar="DIR", help="for dumps (default: this one)")
    parser.add_argument("--timeout", type=float, default=5.0, metavar="S", help="to wait for ranks (default: 5)")
    parser.add_argument("--token", metavar="WORD", help="what requests must bring as Authorization: Bearer WORD")
    parser.add_argument("--allow-get", action="store_true", help="let GET change things too, as SGLang does")


def _architecture_option(parser: argparse.ArgumentParser) -> None:
    text = "comma-separated, like sm_90,sm_100 (default: those of the devices here)"
    parser.add_argument("--arch", metavar="LIST", type=_architectures, help=text)


def export_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the export."""
    _architecture_option(parser)
    text = "made if need be; files of the same names are replaced"
    parser.add_argument("folder", metavar="DIR", type=Path, help=text)


def _architectures(text: str) -> list[tuple[int, int]]:
    found = []
    for name in text.split(","):
        number = name.removeprefix("sm_")
        if not (name.startswith("sm_") and number.isdecimal() and len(number) >= 2):
            raise argparse.ArgumentTypeError(f"must be names like sm_90, got {name!r}")
        found.append((int(number[:-1]), int(number[-1])))
    return list(dict.fromkeys(found))


COMMANDS = {
    "verify": Command(
        "compare the kernels with the reference",
        "Verify every op over named cases against the NumPy reference, and print a line for each.\n\n"
        "On a machine without a CUDA device the same kernels run in Numba's CUDA simulator, on the smallest cases that "
        "launch every kernel.",
        """
        numba-moe verify --op 'topk_*'
        numba-moe verify --input my_topk_ids.npy --num-experts 256
        numba-moe verify --module mine.py:my_topk --like topk_softmax
        """,
        verify_options,
        "numba_moe.lab.own_kernels:prepare",
    ),
    "bench": Command(
        "time the ops beside other implementations",
        "Time our ops and their peers' side by side: device time, host time, share of the copy bandwidth.\n\n"
        "A result that is wrong is not timed. Device time is the median replay of a CUDA graph of calls, and host time "
        "is that of an eager call. Every implementation allocates its outputs inside the call, as its users call it.",
        """
        numba-moe bench --op topk_softmax --peers torch --json today.json
        numba-moe bench --compare yesterday.json
        numba-moe bench --grid 'moe_*' --shapes 100 --plot map.png
        numba-moe bench --patched --peer-lib vllm_moe.so.xz --peer-tree triton_peers
        """,
        bench_options,
        "numba_moe.bench.command:prepare",
    ),
    "rebalance": Command(
        "replay recorded loads against ways of placing experts, to see whether moving them pays",
        "Replay recorded loads against locations of experts, before a cluster is touched: balancedness over time, the "
        "time of a step, what leaves a GPU, and whether a move pays.",
        """
        numba-moe rebalance dump.npz --gpus 32 --search
        numba-moe rebalance counts.csv --experts 256 --gpus 8 --replicas 256,288 --out location.json
        """,
        rebalance_options,
        "numba_moe.placement.simulate_command:prepare",
    ),
    "report": Command(
        "draw what a recorder dumped: hot experts, loads of ranks, balance over time, what a rebalance would change",
        "Write one HTML page with everything in it: which experts are hot, the loads of GPUs, balance over time, and "
        "what moving experts would change.",
        """
        numba-moe report dump.npz --gpus 32
        numba-moe report counts.csv --experts 256 --layers 61 --out monday.html
        """,
        report_options,
        "numba_moe.recorder.report:prepare",
    ),
    "merge": Command(
        "add the dumps that ranks, or one run after another, wrote",
        "Add the dumps that ranks wrote, or one run after another, pass by pass.",
        """
        numba-moe merge rank0.npz rank1.npz --out all.npz
        numba-moe merge monday.csv tuesday.csv --experts 256 --layers 61 --out week.csv
        """,
        merge_options,
        "numba_moe.recorder.merging:prepare",
    ),
    "serve-demo": Command(
        "control a recorder on a tiny model over HTTP, to try it",
        "Serve a recorder on a tiny model of random weights, to try how it is controlled over HTTP. It runs on the "
        "CPU, and an interrupt ends it.",
        """
        numba-moe serve-demo --ranks 2
        curl -X POST http://127.0.0.1:8000/start_expert_distribution_record
        """,
        serve_demo_options,
        "numba_moe.serve_demo:prepare",
    ),
    "warmup": Command(
        "compile every kernel ahead of its first use, also on a machine without a GPU",
        "Compile every kernel ahead of its first use, also on a machine without a GPU.",
        """
        numba-moe warmup
        numba-moe warmup --arch sm_90,sm_100
        """,
        _architecture_option,
        "numba_moe.kernel_commands:prepare_warmup",
    ),
    "export": Command(
        "write every kernel as a cubin, and manifest.json that describes them, for programs without Python",
        "Write every kernel as a cubin, and manifest.json that describes them, for programs without Python.",
        """
        numba-moe export kernels --arch sm_90
        """,
        export_options,
        "numba_moe.kernel_commands:prepare_export",
    ),
    "info": Command(
        "print versions, devices, and what the cache of compiled kernels holds",
        "Print versions, devices, and what the cache of compiled kernels holds.",
        """
        numba-moe info
        """,
        lambda _parser: None,
        "numba_moe.kernel_commands:prepare_info",
    ),
}
