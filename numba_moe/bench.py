"""Our ops and their peers' side by side: device time, host time, share of the copy bandwidth.

A result that is wrong is not timed. Device time is the median replay of a CUDA graph of calls; host time is that
of an eager call. Every implementation allocates its outputs inside the call, the way its users call it.

torch is a peer for plain gating alone: what it can compose for alignment and for grouped gating takes a dozen
launches, which nobody who has a choice would run.
"""

import argparse
import contextlib
import fnmatch
import functools
import importlib
import importlib.util
import itertools
import json
import lzma
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any, NamedTuple

import numpy as np
import torch
from tabulate import tabulate
from tqdm import tqdm

import numba_moe
from numba_moe import reference, testing, verification
from numba_moe.cases import Case, floats, given, ids
from numba_moe.reference.align import max_sorted_slots

OURS = "numba_moe"
# peer -> the torch.ops namespace of its ops, and the module whose import registers them
PEERS = {"vllm": ("_moe_C", "vllm._moe_C"), "sglang": ("sgl_kernel", "sgl_kernel"), "torch": ("", "torch")}
CALLS = 50  # in a captured graph and in a batch of eager calls: too few to fill the launch queue
REPLAYS = 20
BATCHES = 6

ALIGN_SHAPES = (  # tokens, experts, top_k, block_size
    (1, 64, 2, 16),
    (1, 256, 8, 16),
    (16, 256, 8, 16),
    (64, 256, 8, 16),
    (128, 8, 2, 64),
    (512, 256, 8, 64),
    (4096, 64, 2, 128),
    (4096, 256, 8, 64),
    (16384, 256, 8, 128),
    (16384, 512, 10, 128),
    (65536, 256, 8, 128),
    (131072, 128, 8, 128),
)
GATING_SHAPES = (  # tokens, experts, top_k
    (1, 64, 2),
    (1, 256, 8),
    (64, 256, 8),
    (512, 256, 8),
    (4096, 64, 8),
    (4096, 256, 8),
    (16384, 256, 8),
    (16384, 512, 10),
    (65536, 128, 8),
)
GROUPED_TOKENS = (1, 16, 64, 512, 4096, 16384, 65536)
DTYPES = ("float32", "bfloat16")


class Contender(NamedTuple):
    """One implementation of an op, ready to be called on a case's arguments."""

    name: str
    call: Callable[[], Any]
    needs: str = ""  # the op that it calls: namespace.name in torch.ops


class Op(NamedTuple):
    """What the benchmark knows of an op; to add one, fill in these three."""

    cases: Callable[[Sequence[str]], Iterator[Case]]  # of the routings asked for
    peers: Callable[..., Iterator[Contender]]  # of the arguments on the device
    fault: Callable[[Any, Any, Mapping[str, Any]], str]  # of a peer's result, given the reference's; "" if right


class Row(NamedTuple):
    """What one implementation took for one case; no times if its result is wrong or it refused the case."""

    op: str
    shape: str
    tokens: int
    dtype: str
    implementation: str
    device_us: float | None = None
    host_us: float | None = None
    copy_fraction: float | None = None
    wrong: bool = False
    message: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        return self.op, self.shape, self.dtype, self.implementation


def align_cases(routings: Sequence[str]) -> Iterator[Case]:
    for (tokens, experts, top_k, block_size), routing in itertools.product(ALIGN_SHAPES, routings):
        arguments = given(topk_ids=ids(tokens, experts, top_k, routing), block_size=block_size, num_experts=experts)
        yield Case("moe_align_block_size", f"{tokens}x{experts} top {top_k} block {block_size} {routing}", arguments)


def align_peers(topk_ids: torch.Tensor, block_size: int, num_experts: int) -> Iterator[Contender]:
    num_slots = topk_ids.numel()

    def blocks(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return (
            torch.empty(length, dtype=torch.int32, device=topk_ids.device),
            torch.empty(-(-length // block_size), dtype=torch.int32, device=topk_ids.device),
            torch.empty(1, dtype=torch.int32, device=topk_ids.device),
        )

    def vllm() -> Any:
        out = blocks(max_sorted_slots(num_slots, block_size, num_experts))
        torch.ops._moe_C.moe_align_block_size(topk_ids, num_experts, block_size, *out, None)
        return out

    def sglang() -> Any:
        buckets = num_experts + 1  # the first is for id -1
        longest = num_slots * block_size if num_slots < buckets else num_slots + buckets * (block_size - 1)
        out = blocks(longest)
        cumsum_buffer = torch.empty(buckets + 1, dtype=torch.int32, device=topk_ids.device)
        align = torch.ops.sgl_kernel.moe_align_block_size.default
        align(topk_ids, buckets, block_size, *out, cumsum_buffer, True)
        return out

    yield Contender("vllm", vllm, "_moe_C.moe_align_block_size")
    yield Contender("sglang", sglang, "sgl_kernel.moe_align_block_size")


def align_fault(result: Any, expected: Any, arguments: Mapping[str, Any]) -> str:
    """Compare the part in use; peers order the slots of an expert as they like and leave the rest undefined."""
    slots, experts, used = (testing.to_numpy(part) for part in result)
    length = int(expected.num_tokens_post_padded[0])
    if used.tolist() != [length]:
        return f"num_tokens_post_padded is {used.tolist()}, expected [{length}]"
    block_size = arguments["block_size"]
    wanted = expected.expert_ids[: length // block_size]
    if not np.array_equal(experts[: len(wanted)], wanted):
        return "the experts of the blocks differ"
    # the padding is the largest value, so that sorting within an expert gives the reference's order
    if len(slots) < length:
        return f"sorted_token_ids has {len(slots)} positions, {length} are in use"
    in_order = slots[:length][np.lexsort((slots[:length], np.repeat(wanted, block_size)))]
    return "" if np.array_equal(in_order, expected.sorted_token_ids[:length]) else "the slots of an expert differ"


def gating_cases(op: str) -> Iterator[Case]:
    for (tokens, experts, top_k), dtype in itertools.product(GATING_SHAPES, DTYPES):
        bias = {"correction_bias": floats(experts, scale=0.1)} if op == "topk_sigmoid" else {}
        logits = floats(tokens, experts, dtype=dtype)
        arguments = given(gating_output=logits, top_k=top_k, renormalize=True, **bias)
        yield Case(op, f"{tokens}x{experts} top {top_k}", arguments, dtype)


def gating_peers(
    scoring_func: str,
    gating_output: torch.Tensor,
    top_k: int,
    renormalize: bool,
    correction_bias: torch.Tensor | None = None,
) -> Iterator[Contender]:
    def empty(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(gating_output.shape[0], top_k, dtype=dtype, device=gating_output.device)

    def vllm() -> Any:
        out = empty(torch.float32), empty(torch.int32)
        gate = getattr(torch.ops._moe_C, f"topk_{scoring_func}")
        gate(*out, empty(torch.int32), gating_output, renormalize, correction_bias)
        return out

    def sglang() -> Any:
        out = empty(torch.float32), empty(torch.int32)
        softcapping = (0.0,) if scoring_func == "softmax" else ()
        gate = getattr(torch.ops.sgl_kernel, f"topk_{scoring_func}").default
        gate(*out, gating_output, renormalize, *softcapping, correction_bias)
        return out

    def torch_ops() -> Any:
        if scoring_func == "softmax":
            weights, chosen = torch.topk(torch.softmax(gating_output, -1, dtype=torch.float32), top_k)
        else:
            scores = torch.sigmoid(gating_output.float())
            chosen = torch.topk(scores if correction_bias is None else scores + correction_bias, top_k).indices
            weights = scores.gather(1, chosen)
        return weights / weights.sum(-1, keepdim=True) if renormalize else weights, chosen

    yield Contender("vllm", vllm, f"_moe_C.topk_{scoring_func}")
    # SGLang adds a bias to the logits before a softmax, and keeps it in the weights: another function
    if scoring_func == "sigmoid" or correction_bias is None:
        yield Contender("sglang", sglang, f"sgl_kernel.topk_{scoring_func}")
    yield Contender("torch", torch_ops)


def grouped_cases() -> Iterator[Case]:
    for tokens, dtype in itertools.product(GROUPED_TOKENS, DTYPES):
        arguments = given(
            gating_output=floats(tokens, 256, dtype=dtype),
            top_k=8,
            num_expert_group=8,
            topk_group=4,
            renormalize=True,
            scoring_func="sigmoid",
            correction_bias=floats(256, scale=0.1),
        )
        yield Case("grouped_topk", f"{tokens}x256 top 8 groups 4 of 8", arguments, dtype)


def grouped_peers(
    gating_output: torch.Tensor,
    top_k: int,
    num_expert_group: int,
    topk_group: int,
    renormalize: bool,
    scoring_func: str,
    correction_bias: torch.Tensor,
) -> Iterator[Contender]:
    def vllm() -> Any:
        groups = (num_expert_group, topk_group, top_k, renormalize, 1.0)
        weights, chosen = torch.ops._moe_C.grouped_topk(gating_output, *groups, correction_bias, 1)
        return weights.to(torch.float32), chosen.to(torch.int32)

    def sglang() -> Any:
        groups = (num_expert_group, topk_group, top_k, 0, 1.0, False)
        gate = torch.ops.sgl_kernel.moe_fused_gate.default
        return gate(gating_output.to(torch.float32), correction_bias, *groups)

    # both ops know sigmoid alone, and SGLang's always renormalises
    if scoring_func == "sigmoid":
        yield Contender("vllm", vllm, "_moe_C.grouped_topk")
        if renormalize:
            yield Contender("sglang", sglang, "sgl_kernel.moe_fused_gate")


def gating_fault(scoring_func: str, result: Any, expected: Any, arguments: Mapping[str, Any]) -> str:
    """Compare choices by what they rank, and weights with the scores of the experts that were chosen.

    Peers break ties as they like and some work in the logits' dtype, whose tolerance therefore holds throughout.
    """
    weights, chosen = (testing.to_numpy(part) for part in result)
    if not weights.shape == chosen.shape == expected.topk_ids.shape:
        return f"shapes {weights.shape} and {chosen.shape}, expected {expected.topk_ids.shape}"
    chosen = chosen.astype(np.int64)
    logits, bias = testing.to_numpy(arguments["gating_output"]), arguments.get("correction_bias")
    bias = None if bias is None else testing.to_numpy(bias)
    in_order = np.sort(chosen, axis=1)
    invalid = (in_order < 0) | (in_order >= logits.shape[1])
    invalid[:, 1:] |= np.diff(in_order, axis=1) == 0
    if invalid.any():
        row = int(np.argwhere(invalid)[0, 0])
        return f"row {row} has ids twice or out of range: {chosen[row].tolist()}"

    relative, absolute = testing.TOLERANCES[arguments["gating_output"].dtype]

    def far(got: Any, wanted: Any) -> Any:
        return ~(np.abs(got - wanted) <= absolute + relative * np.abs(wanted))

    scores, ranks = reference.gating.score_and_rank(logits, scoring_func, bias)
    wanted_ranks, got_ranks = (
        np.sort(np.take_along_axis(ranks, picks, axis=1), axis=1) for picks in (expected.topk_ids, chosen)
    )
    worse = far(got_ranks, wanted_ranks).any(axis=1)
    if "num_expert_group" in arguments:
        # where the last group taken and the first left out are nearly equal, either choice is right
        groups = reference.gating.score_groups(scores, ranks, arguments["num_expert_group"], bias, None)
        order, taken = -np.sort(-groups, axis=1), arguments["topk_group"]
        if taken < order.shape[1]:
            worse &= far(order[:, taken], order[:, taken - 1])
    if worse.any():
        row = int(np.flatnonzero(worse)[0])
        return f"row {row} chose {chosen[row].tolist()}, expected {expected.topk_ids[row].tolist()}"
    wanted = reference.gating.weigh(scores, chosen, arguments["renormalize"]).topk_weights
    if (wrong := far(weights, wanted)).any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        return f"weight {index} is {weights[index]}, expected {wanted[index]}"
    return ""


OPS = {
    "moe_align_block_size": Op(align_cases, align_peers, align_fault),
    "topk_softmax": Op(
        lambda routings: gating_cases("topk_softmax"),
        functools.partial(gating_peers, "softmax"),
        functools.partial(gating_fault, "softmax"),
    ),
    "topk_sigmoid": Op(
        lambda routings: gating_cases("topk_sigmoid"),
        functools.partial(gating_peers, "sigmoid"),
        functools.partial(gating_fault, "sigmoid"),
    ),
    "grouped_topk": Op(lambda routings: grouped_cases(), grouped_peers, functools.partial(gating_fault, "sigmoid")),
}


def is_registered(op: str) -> bool:
    """Return whether torch.ops has an op, given as namespace.name; "" stands for torch's own functions."""
    namespace, _, name = op.partition(".")
    return not op or hasattr(getattr(torch.ops, namespace), name)


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Yield a library file, unpacked to a temporary one if it ends in .xz."""
    if path.suffix != ".xz":
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / path.stem
        with lzma.open(path) as packed, target.open("wb") as file:
            shutil.copyfileobj(packed, file)
        yield target


def load_peers(wanted: Sequence[str] | None, libraries: Sequence[Path]) -> dict[str, str]:
    """Register the peers' ops and return where each peer came from; ask for none by name to get all there are."""
    for path in libraries:
        with unpacked(path) as library:
            torch.ops.load_library(str(library))  # once loaded, the file may go
    sources = {}
    for name in wanted or PEERS:
        namespace, module = PEERS[name]
        package = module.partition(".")[0]
        if namespace and is_registered(f"{namespace}.moe_align_block_size"):
            sources[name] = " ".join(path.name for path in libraries) or "loaded before"
            continue
        if importlib.util.find_spec(package) is None:
            if wanted:
                raise ValueError(f"peer {name} is neither installed nor in a --peer-lib")
            continue
        try:
            importlib.import_module(module)
        except (ImportError, OSError) as error:
            if wanted:
                raise ValueError(f"peer {name} is installed but does not load: {error}") from error
            print(f"Leaving out peer {name}, which is installed but does not load: {error}", file=sys.stderr)
            continue
        try:
            sources[name] = version({"sglang": "sglang-kernel"}.get(name, package))
        except PackageNotFoundError:  # on the path without being installed, or under an older name
            sources[name] = "of unknown version"
    return sources


def device_time(call: Callable[[], Any]) -> float:
    """Return the device microseconds of a call, from replays of a graph of many."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and loads what a capture could not
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()  # keeps the device busy until the timed replay is queued, whose launch would count otherwise
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / CALLS)
    return median(times)


def host_time(call: Callable[[], Any]) -> float:
    """Return the host microseconds of an eager call, the queue drained between batches."""
    times = []
    for batch in range(BATCHES + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        if batch > 0:  # the first warms up
            times.append((time.perf_counter() - begin) * 1e6 / CALLS)
    torch.cuda.synchronize()
    return median(times)


def copy_bandwidth() -> float:
    """Return the bytes per microsecond, read plus written, of a device-to-device copy of 1 GiB."""
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / testing.time_on_device(lambda: target.copy_(source), REPLAYS)


def bytes_moved(arguments: Mapping[str, Any], result: Any) -> int:
    """Return the bytes that an op cannot avoid: each input read once, each output written once."""
    outputs = result if isinstance(result, tuple) else (result,)
    return sum(part.nbytes for part in (*arguments.values(), *outputs) if isinstance(part, torch.Tensor))


def fault_of(case: Case, name: str, result: Any, expected: Any, arguments: Mapping[str, Any]) -> str:
    """Return what is wrong with a result, "" if nothing is: ours equals the reference, a peer's is valid."""
    if name != OURS:
        return OPS[case.op].fault(result, expected, arguments)
    on_host = {k: testing.to_numpy(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    comparisons = testing.compare_results(case.op, result, expected, on_host)
    return "; ".join(comparison.message for comparison in comparisons if comparison.mismatches)


def measure(case: Case, peers: Sequence[str], copy_bytes_per_us: float) -> Iterator[Row]:
    """Check and time every implementation of a case."""
    on_host = case.arguments(np.random.default_rng(0))
    expected = getattr(reference, case.op)(**on_host)
    arguments = {name: testing.to_device(value, "cuda") for name, value in on_host.items()}
    payload = next(iter(arguments))  # has a row a token
    if case.dtype is not None:
        arguments[payload] = arguments[payload].to(getattr(torch, case.dtype))
    row = Row(case.op, case.name, len(arguments[payload]), str(arguments[payload].dtype).removeprefix("torch."), OURS)
    ours = Contender(OURS, functools.partial(getattr(numba_moe, case.op), **arguments))
    others = (c for c in OPS[case.op].peers(**arguments) if c.name in peers and is_registered(c.needs))
    moved: int | None = None
    for name, call, _ in (ours, *others):
        row = row._replace(implementation=name)
        try:
            with testing.poisoned_memory():
                result = call()
            if message := fault_of(case, name, result, expected, arguments):
                yield row._replace(wrong=True, message=message)
                continue
            if name == OURS:
                moved = bytes_moved(arguments, result)
            device_us, host_us = device_time(call), host_time(call)
        except Exception as error:  # a peer may refuse a case; we may not
            yield row._replace(wrong=name == OURS, message=f"{type(error).__name__}: {error}")
            continue
        fraction = None if moved is None else moved / device_us / copy_bytes_per_us
        yield row._replace(device_us=device_us, host_us=host_us, copy_fraction=fraction)


def ratios(rows: Sequence[Row]) -> dict[tuple[str, ...], tuple[float | None, float | None]]:
    """Return, by the key of each row of ours, our device and host time over the best peer's."""
    found = {}
    for row in rows:
        if row.implementation == OURS:
            peers = [r for r in rows if r.key[:3] == row.key[:3] and r.implementation != OURS]
            found[row.key] = (
                _ratio(row.device_us, min((p.device_us for p in peers if p.device_us is not None), default=None)),
                _ratio(row.host_us, min((p.host_us for p in peers if p.host_us is not None), default=None)),
            )
    return found


def _ratio(new: float | None, old: float | None) -> float | None:
    return None if new is None or old is None else new / old


def means(rows: Sequence[Row]) -> dict[str, tuple[int, float, float]]:
    """Return, by op, how many shapes have a peer, and the geometric means of our device and host ratios there."""
    found: dict[str, list[tuple[float, float]]] = {}
    for key, (device, host) in ratios(rows).items():
        if device is not None and host is not None:
            found.setdefault(key[0], []).append((device, host))
    return {
        op: (len(pairs), *(geometric_mean(side) for side in zip(*pairs, strict=True)))  # type: ignore[misc]
        for op, pairs in found.items()
    }


def table(rows: Sequence[Row], old: Mapping[tuple[str, ...], Row] | None = None) -> str:
    """Format rows for a terminal, beside those of an older run if there is one."""
    headers = ["op", "shape", "dtype", "implementation", "device us", "host us", "of copy"]
    headers += ["device / best peer", "host / best peer"]
    formats = ["", "", "", "", ".1f", ".1f", ".0%", ".2f", ".2f"]
    if old is not None:
        headers += ["old device us", "new / old", "old host us", "new / old"]
        formats += [".1f", ".2f", ".1f", ".2f"]
    to_peers = ratios(rows)
    lines = []
    for row in rows:
        line = [row.op, row.shape, row.dtype, row.implementation, row.device_us, row.host_us, row.copy_fraction]
        line += to_peers.get(row.key, (None, None))
        if old is not None:
            before = old.get(row.key, row._replace(device_us=None, host_us=None))
            line += [before.device_us, _ratio(row.device_us, before.device_us)]
            line += [before.host_us, _ratio(row.host_us, before.host_us)]
        note = f"WRONG {row.message}" if row.wrong else "refused" if row.message else ""
        lines.append([*line, note])
    return tabulate(lines, [*headers, "note"], floatfmt=[*formats, ""], missingval="-")


def write_report(path: Path, rows: Sequence[Row], environment: Mapping[str, str]) -> None:
    report = {"environment": environment, "rows": [row._asdict() for row in rows]}
    path.write_text(json.dumps(report, indent=1))


def read_report(path: Path) -> dict[tuple[str, ...], Row]:
    """Read the rows of a report, by their keys."""
    try:
        return {row.key: row for row in (Row(**fields) for fields in json.loads(path.read_text())["rows"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no report of this benchmark: {error}") from error


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Draw device time over tokens: a panel per op, a line per implementation through the means over its shapes."""
    from matplotlib.figure import Figure

    ops = sorted({row.op for row in rows})
    figure = Figure(figsize=(6 * len(ops), 4.5), layout="constrained")
    panels = figure.subplots(1, len(ops), squeeze=False)[0]
    for panel, op in zip(panels, ops, strict=True):
        for name in dict.fromkeys(row.implementation for row in rows if row.op == op):
            times: dict[int, list[float]] = {}
            for row in rows:
                if row.op == op and row.implementation == name and row.device_us is not None:
                    times.setdefault(row.tokens, []).append(row.device_us)
            tokens = sorted(times)
            panel.plot(tokens, [geometric_mean(times[t]) for t in tokens], marker="o", label=name)
        panel.set(xscale="log", yscale="log", title=op, xlabel="tokens", ylabel="device us, geometric mean over shapes")
        panel.legend()
        panel.grid(alpha=0.3)
    figure.savefig(path)


def environment(peers: Mapping[str, str]) -> dict[str, str]:
    """Return what a reader needs to know to compare two runs."""
    from cuda.core import system

    where = verification.environment(on_gpu=True)
    try:
        where["driver"] = ".".join(map(str, system.get_kernel_mode_driver_version()))
    except RuntimeError as error:  # some containers lack NVML
        where["driver"] = f"unknown: {error}"
    where["CUDA"] = str(torch.version.cuda)
    where |= {f"peer {name}": source for name, source in peers.items() if name != "torch"}
    root = Path(__file__).parents[1]
    if (root / ".git").exists() and shutil.which("git"):
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        )
        if described.returncode == 0:
            where["commit"] = described.stdout.strip()
    where["command"] = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return where


def listed(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a parser of names with commas between them."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"must be among {', '.join(allowed)}, got {name!r}")
        return names

    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the benchmark."""
    routings = testing.ROUTINGS
    parser.add_argument("--op", action="append", metavar="PATTERN", help="only these ops; * and ? match")
    parser.add_argument("--shape", action="append", metavar="TEXT", help="only shapes whose name contains this")
    parser.add_argument(
        "--routing", type=listed(routings), default=["uniform"], metavar="NAMES", help=f"of {','.join(routings)}"
    )
    parser.add_argument("--peers", type=listed(tuple(PEERS)), metavar="NAMES", help=f"of {','.join(PEERS)}")
    parser.add_argument(
        "--peer-lib", type=Path, action="append", default=[], metavar="FILE", help="op library to load, .so or .so.xz"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="show the times of an earlier run beside")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw time over tokens")


def select_cases(options: argparse.Namespace) -> list[Case]:
    """Return the cases that the options ask for."""
    patterns, texts = options.op or ["*"], options.shape or [""]
    return [
        case
        for name, op in OPS.items()
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        for case in op.cases(options.routing)
        if any(text in case.name for text in texts)
    ]


def run(options: argparse.Namespace) -> int:
    """Measure, print the table, and return the exit status: 1 if a result of ours is wrong, 2 if nothing can run."""
    cases = select_cases(options)
    try:
        if not torch.cuda.is_available():
            raise ValueError("no CUDA device here, and nothing to time without one")
        if not cases:
            raise ValueError("no op and shape is called that")
        for path in (options.json, options.plot):
            if path is not None and not path.absolute().parent.is_dir():
                raise ValueError(f"no folder for {path}")
        if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--plot needs matplotlib: pip install numba-moe[plot]")
        old = None if options.compare is None else read_report(options.compare)
        peers = load_peers(options.peers, options.peer_lib)
    except (OSError, ValueError, lzma.LZMAError) as error:
        print(f"numba-moe bench: {error}", file=sys.stderr)
        return 2
    bandwidth = copy_bandwidth()
    where = {**environment(peers), "copy": f"{bandwidth / 1e3:.0f} GB/s read plus written"}
    print("\n".join(f"{name}: {value}" for name, value in where.items()))
    progress = tqdm(cases, unit="case", disable=not sys.stderr.isatty(), leave=False)
    rows = [row for case in progress for row in measure(case, tuple(peers), bandwidth)]
    print(table(rows, old))
    headers = ("op", "shapes", "device / best peer", "host / best peer")
    print(tabulate([(op, *values) for op, values in means(rows).items()], headers, floatfmt=".2f"))
    if options.json is not None:
        write_report(options.json, rows, where)
    if options.plot is not None:
        plot(options.plot, rows)
    return 1 if any(row.wrong and row.implementation == OURS for row in rows) else 0
