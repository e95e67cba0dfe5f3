"""Patch real vLLM and SGLang trees, and reach every function that is replaced from call sites that are theirs.

    python scripts/try_peers.py TREE [TREE ...] [--peer-lib LIBRARY]

A tree is a folder with an unpacked wheel of vllm, sglang or sglang-kernel (`unzip -q WHEEL -d TREE`), of one release
each. Nothing of it need be installed: see scripts/peer_imports.py. For each replaced function all its call sites in the
trees are looked up, by reading them, and the form of each call is compared with the parameters of ours. Then callers of
theirs run (scripts/peer_calls.py); at each call that arrives ours and the peer's own function get the same arguments,
and what they return and write is compared. On a GPU the compiled ops come from --peer-lib, as for `numba-moe bench`;
without a GPU ours is the NumPy reference, Triton's kernels are interpreted if Triton is installed, and compiled ops are
not there to compare with. Differences that docs/put-it-in.md lists are none.

The status is 1 if a function differs, is not reached although the trees have call sites, or has a call site with
parameters that ours lacks, or if a caller fails.
"""

import argparse
import ast
import copy
import functools
import gc
import inspect
import itertools
import os
import sys
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peer_imports
import torch
from tabulate import tabulate


class Site(NamedTuple):
    """A place in a tree where a function is called, or looked up by its name."""

    file: str
    line: int
    is_call: bool
    fault: str  # what ours lacks of the call's parameters


# ---- Call sites, by reading -----------------------------------------------------------------------------------------
class Reader:
    """Finds what names mean in the files of trees, without importing them."""

    def __init__(self, trees: Sequence[Path]) -> None:
        self._trees = trees
        self._sources = {
            path: path.read_text(errors="replace")
            for tree in trees
            for peer in peer_imports.PEERS
            for path in sorted((tree / peer).rglob("*.py"))
        }

    def relative(self, path: Path) -> str:
        return next((str(path.relative_to(tree)) for tree in self._trees if path.is_relative_to(tree)), str(path))

    def module_of(self, path: Path) -> str:
        parts = Path(self.relative(path)).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def path_of(self, module: str) -> Path | None:
        for tree in self._trees:
            base = tree.joinpath(*module.split("."))
            for path in (base.with_suffix(".py"), base / "__init__.py"):
                if path in self._sources:
                    return path
        return None

    @functools.cache  # noqa: B019 - there is one reader
    def parsed(self, path: Path) -> ast.Module:
        return ast.parse(self._sources[path])

    @functools.cache  # noqa: B019
    def scopes(self, path: Path) -> dict[ast.AST, dict[str, tuple[str, str]]]:
        """Return the names that a file imports, with the modules and names behind them: of itself, and by function."""
        package = self.module_of(path).split(".")
        package = package if path.name == "__init__.py" else package[:-1]
        found: dict[ast.AST, dict[str, tuple[str, str]]] = {}

        def look(node: ast.AST, scope: ast.AST) -> None:
            if isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else []
                module = ".".join([*above, *([node.module] if node.module else [])])
                found.setdefault(scope, {}).update({one.asname or one.name: (module, one.name) for one in node.names})
            for child in ast.iter_child_nodes(node):
                look(child, child if isinstance(child, ast.FunctionDef) else scope)

        look(self.parsed(path), self.parsed(path))
        return found

    def defined(self, module: str, name: str, depth: int = 0) -> tuple[str, str]:
        """Return where a name of a module comes from, through the modules that import it."""
        path = self.path_of(module)
        if path is None or depth > 8:
            return module, name
        behind = self.scopes(path).get(self.parsed(path), {}).get(name)
        is_own = any(isinstance(one, ast.FunctionDef) and one.name == name for one in self.parsed(path).body)
        return (module, name) if behind is None or is_own else self.defined(*behind, depth + 1)

    def sites(self, module: str, name: str, ours: Callable[..., Any], theirs: Callable[..., Any]) -> list[Site]:
        """Return the places where a function is called, or looked up by its name."""
        target, found = self.defined(module, name), []
        texts = {f"{module}:{name}", f"{module.partition('.')[0]}:{name}"}

        def look(path: Path, node: ast.AST, known: Mapping[str, tuple[str, str]]) -> None:
            known = {**known, **self.scopes(path).get(node, {})}
            if isinstance(node, ast.Call) and self._behind(node.func, known) == target:
                fault = "" if misfit(node, theirs) else misfit(node, ours)  # what fits neither is no fault of ours
                found.append(Site(self.relative(path), node.lineno, True, fault))
            elif isinstance(node, ast.Constant) and node.value in texts:
                found.append(Site(self.relative(path), node.lineno, False, ""))
            for child in ast.iter_child_nodes(node):
                look(path, child, known)

        for path, source in self._sources.items():
            if name in source:
                here = self.module_of(path)
                own = {name: target} if here == target[0] else {}
                look(path, self.parsed(path), own)
        return found

    def _behind(self, node: ast.expr, known: Mapping[str, tuple[str, str]]) -> tuple[str, str] | None:
        """Return the module and name of what is called."""
        if isinstance(node, ast.Name) and node.id in known:
            return self.defined(*known[node.id])
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            return self.defined(".".join(known[node.value.id]), node.attr)
        return None


def misfit(call: ast.Call, ours: Callable[..., Any]) -> str:
    """Return why a call does not fit the parameters of a function of ours, "" if it does."""
    if any(isinstance(value, ast.Starred) for value in call.args) or any(word.arg is None for word in call.keywords):
        return ""
    try:
        inspect.signature(ours).bind(*call.args, **{str(word.arg): word.value for word in call.keywords})
    except TypeError as error:
        return str(error)
    return ""


# ---- Comparisons ----------------------------------------------------------------------------------------------------
class Outcome(NamedTuple):
    """What a call has returned, and its arguments after it."""

    returned: Any
    named: Mapping[str, Any]


def parts_of(outcome: Outcome) -> list[torch.Tensor]:
    """Return the tensors that a call has returned or may have written."""
    returned = outcome.returned if isinstance(outcome.returned, tuple) else (outcome.returned,)
    return [part for part in (*returned, *outcome.named.values()) if isinstance(part, torch.Tensor)]


def differ(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether tensors differ by more than the rounding of their dtype."""
    if ours.shape != theirs.shape:
        return True
    if not ours.is_floating_point():
        return not torch.equal(ours.long(), theirs.long())
    bits = 2**-7 if ours.dtype == torch.bfloat16 else 2**-10 if ours.dtype == torch.float16 else 1e-5
    return not torch.allclose(ours.float(), theirs.float(), rtol=2 * bits, atol=bits, equal_nan=True)


def anything(ours: Outcome, theirs: Outcome) -> str:
    """Compare all that was returned or written."""
    for place, (one, other) in enumerate(zip(parts_of(ours), parts_of(theirs), strict=True)):
        if differ(one, other):
            return f"tensor {place} differs"
    return ""


def choice(ours: Outcome, theirs: Outcome) -> str:
    """Compare the experts of each token, in whatever order of its slots, and their weights."""
    found = []
    for outcome in (ours, theirs):
        weights, ids = outcome.returned[:2] if isinstance(outcome.returned, tuple) else (None, None)
        if weights is None:
            weights, ids = (
                outcome.named["topk_weights"],
                outcome.named.get("topk_ids", outcome.named.get("topk_indices")),
            )
        order = ids.long().sort(dim=1)
        packed = outcome.named.get("packed_out")
        packed = weights if packed is None else (packed << 16).view(torch.float32)  # weights as bfloat16 has them
        found.append((order.values, weights.gather(1, order.indices), packed.gather(1, order.indices).bfloat16()))
    if differ(found[0][0], found[1][0]):
        return "other experts"
    for one in (1, 2):  # weights of padding are not written by all
        if differ(*(parts[one].masked_fill(parts[0] < 0, 0) for parts in found)):
            return ("other weights", "other packed weights")[one - 1]
    return ""


def alignment(ours: Outcome, theirs: Outcome) -> str:
    """Compare blocks in use, with the slots of an expert in any order, and what goes with them."""
    from numba_moe.reference.align import AlignedBlocks

    from numba_moe.bench import contenders
    from numba_moe.verify import testing

    block, blocks = ours.named["block_size"], []
    parts: Any
    for outcome in (ours, theirs):
        if isinstance(outcome.returned, tuple):
            parts = outcome.returned[1:] if "recv_topk_idx" in outcome.named else outcome.returned
        else:
            names = (("sorted_token_ids", "sorted_ids"), ("experts_ids", "expert_ids"), ("num_tokens_post_pad",))
            parts = [outcome.named[next(name for name in pair if name in outcome.named)] for pair in names]
        blocks.append((parts[0], parts[1], parts[2].view(-1)))
    (mine, named, used), (slots, experts, total) = blocks
    rows = used.numel() if "max_loras" in ours.named else 1
    if rows == 1 and differ(used[1:], total[1:]):
        return "another number of blocks without an expert"
    for row in range(rows):
        one = AlignedBlocks(*(testing.to_numpy(part.view(rows, -1)[row]) for part in (mine, named, used[:rows])))
        other = (slots.view(rows, -1)[row], experts.view(rows, -1)[row], total[row : row + 1])
        if fault := contenders.align_fault(other, one, {"block_size": block}):
            return fault
    extra = [outcome.named.get("scatter_idx") for outcome in (ours, theirs)]
    returned = [outcome.returned[3:] if isinstance(outcome.returned, tuple) else () for outcome in (ours, theirs)]
    pairs = [*zip(*returned, strict=True), extra]
    return "scatter_idx differs" if any(a is not None and a.dim() == 2 and differ(a, b) for a, b in pairs) else ""


def permutation(ours: Outcome, theirs: Outcome) -> str:
    """Compare rows in use, and where slots of this rank went."""
    from numba_moe.bench import comparison

    found = []
    for outcome in (ours, theirs):
        rows, _, offset, inverse, slots = outcome.returned
        found.append([rows.float(), offset, inverse, slots])
    return comparison.permute_fault(found[0], found[1], {})


def rows(ours: Outcome, theirs: Outcome) -> str:
    """Compare where experts begin, and the rows of slots of this rank."""
    (offset, mine), (other, places) = ours.returned, theirs.returned
    used = int(offset[-1])
    placed = [torch.where((part >= 0) & (part < used), part, -1) for part in (mine, places)]
    return "offsets differ" if differ(offset, other) else "rows differ" if differ(*placed) else ""


def maps(ours: Outcome, theirs: Outcome) -> str:
    """Compare sizes, and whether the two maps belong together."""
    from numba_moe.bench import comparison

    names = ["expert_offsets", "problem_sizes1", "problem_sizes2", "input_permutation", "output_permutation"]
    results = [[outcome.named[name] for name in names] for outcome in (ours, theirs)]
    return comparison.prepare_fault(results[0], results[1], {"ids": ours.named["topk_ids"]})


COMPARISONS: dict[str, Callable[[Outcome, Outcome], str]] = {
    **dict.fromkeys(("fused_topk", "grouped_topk", "dsv4_topk", "topk_softmax", "topk_sigmoid"), choice),
    **dict.fromkeys(("topk_hash_softplus_sqrt", "moe_fused_gate", "hash_topk", "gemma4_fused_routing"), choice),
    "fused_topk_deepseek": choice,
    **dict.fromkeys(("moe_align_block_size", "batched_moe_align_block_size", "moe_lora_align_block_size"), alignment),
    **dict.fromkeys(("moe_align_small_numel", "moe_align_single_token", "fused_globalize_align_block_size"), alignment),
    "moe_permute": permutation,
    "moe_prepare_scatter": rows,
    **dict.fromkeys(("prepare_moe_input", "cutlass_prepare_moe_input"), maps),
}


# ---- Calls that arrive ----------------------------------------------------------------------------------------------
class Watch:
    """A replaced function with ours in its place, which runs the peer's own on the same arguments as well."""

    inside = False  # of a peer's own function, where those that it calls are its own too

    def __init__(self, path: str, ours: Callable[..., Any], theirs: Callable[..., Any]) -> None:
        self.module, _, self.name = path.rpartition(".")
        self.ours, self.theirs = ours, theirs
        self.reached: dict[tuple[str, int], str] = {}  # where from; what differs there
        self.compared: set[tuple[str, int]] = set()
        self.absent = ""  # why the peer's own does not run here

    def stand_in(self) -> Callable[..., Any]:
        @functools.wraps(self.ours)
        def watched(*args: Any, **options: Any) -> Any:
            frame = sys._getframe(1)
            return self._call((frame.f_code.co_filename, frame.f_lineno), args, options)

        return watched

    def _call(self, site: tuple[str, int], args: Any, options: Any) -> Any:
        plain = {name: plain_tensor(value) for name, value in enumerate(args)} | {
            name: plain_tensor(value) for name, value in options.items()
        }
        copies = {name: copied(value) for name, value in plain.items()}
        mine, other = (copies, plain) if Watch.inside else (plain, copies)
        self.reached.setdefault(site, "")
        try:
            ours = self._outcome(self.ours, mine)
        except Exception as error:
            traceback.print_exc(limit=-4)
            self.reached[site] = f"ours raises {type(error).__name__}: {error}"
            raise
        before, Watch.inside = Watch.inside, True
        try:
            theirs = self._outcome(self.theirs, other)
        except Exception as error:  # for want of a compiled op or of a GPU
            self.absent = f"{type(error).__name__}: {' '.join(str(error).split())[:90]}"
            write_back(mine, other)
            return ours.returned
        finally:
            Watch.inside = before
        self.compared.add(site)
        try:
            fault = COMPARISONS.get(self.name, anything)(ours, theirs)
        except Exception as error:
            traceback.print_exc(limit=-3)
            fault = f"cannot be compared: {type(error).__name__}: {error}"
        self.reached[site] = self.reached[site] or fault
        return theirs.returned if before else ours.returned

    def _outcome(self, function: Callable[..., Any], given: Mapping[Any, Any]) -> Outcome:
        args = [value for name, value in given.items() if isinstance(name, int)]
        options = {name: value for name, value in given.items() if isinstance(name, str)}
        returned = function(*args, **options)
        return Outcome(returned, inspect.signature(self.ours).bind(*args, **options).arguments)


def plain_tensor(value: Any) -> Any:
    return value.as_subclass(torch.Tensor) if isinstance(value, peer_imports.OnDevice) else value


def copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(value)
    if type(value).__name__ == "MoEPermuteScratch":
        made = copy.copy(value)
        vars(made).update({name: copied(part) for name, part in vars(value).items()})
        return made
    return value


def write_back(source: Mapping[Any, Any], target: Mapping[Any, Any]) -> None:
    """Give one call's arguments what another has written into its own."""
    for name, value in source.items():
        if isinstance(value, torch.Tensor) and value is not target[name]:
            target[name].copy_(value)


def watch(patch: Any, replaced: Sequence[str]) -> list[Watch]:
    """Put a watch in the place of each function that a patch has replaced."""
    found = []
    for path in replaced:
        module, _, name = path.rpartition(".")
        original, ours = patch._replaced[module, name]
        made = Watch(path, ours, original)
        patch._swap(ours, made.stand_in())
        found.append(made)
    patch._changed()
    return found


def holders(watches: Sequence[Watch], patch: Any) -> list[str]:
    """Return what still holds a peer's own function after the patch, beside modules: what it calls is not ours."""
    found = []
    gc.collect()
    for one in watches:
        ours = [vars(one), *patch._replaced.values(), one]
        for holder in gc.get_referrers(one.theirs):
            if any(holder is known for known in ours) or isinstance(holder, types.FrameType | types.CellType):
                continue
            if not isinstance(holder, tuple) or holder[:2] != (one.module, one.name):  # of `patch` itself
                found.append(f"{one.module}.{one.name} is held by a {type(holder).__name__}: {str(holder)[:150]!r}")
    return found


def report(watches: Sequence[Watch], reader: Reader) -> tuple[list[list[str]], int, int, int]:
    """Return the table's rows, and how many functions were reached, differ, and are without a call site."""
    table, reached, differing, without = [], 0, 0, 0
    for one in watches:
        sites = reader.sites(one.module, one.name, one.ours, one.theirs)
        lines = {(site.file, site.line): site for site in sites}
        seen = {(reader.relative(Path(file)), line): fault for (file, line), fault in one.reached.items()}
        compared = {(reader.relative(Path(file)), line) for file, line in one.compared}
        faults = [site.fault for site in sites if site.fault] + [fault for fault in seen.values() if fault]
        reached += bool(seen)
        differing += bool(faults)
        without += not seen and not any(site.is_call for site in sites)
        for where in sorted(lines.keys() | seen.keys()) or [("no call site in these trees", 0)]:
            form = lines[where].fault if where in lines else ""
            fault = seen.get(where, "") or (f"form: {form}" if form else "")
            read = "" if where not in lines else "form read" if lines[where].is_call else "looked up by name"
            how = "compared" if where in compared else "reached" if where in seen else read
            note = fault or ("" if how != "reached" else f"theirs does not run here: {one.absent}")
            place = f"{where[0]}:{where[1]}" if where[1] else where[0]
            table.append([one.name, one.module, place, how, note])
    return table, reached, differing, without


def main(arguments: Sequence[str] | None = None) -> int:
    """Patch the trees' packages, run callers of theirs, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="+", type=Path, metavar="TREE")
    parser.add_argument("--peer-lib", action="append", type=Path, default=[], metavar="LIBRARY", help=".so or .so.xz")
    options = parser.parse_args(arguments)
    trees = [tree.resolve() for tree in options.trees]
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    peer_imports.find(trees)
    import peer_calls

    from numba_moe.bench import contenders
    from numba_moe.interop import sglang, vllm

    for path in options.peer_lib:
        with contenders.unpacked(path) as library:
            torch.ops.load_library(str(library))
    torch.manual_seed(0)
    reader, failed, held, rows = Reader(trees), [], [], []
    absent: dict[str, None] = {}
    count = dict.fromkeys(("functions", "reached", "differ", "without"), 0)
    for peer, patching in (("vllm", vllm), ("sglang", sglang)):
        packages = ("vllm",) if peer == "vllm" else ("sglang", "sgl_kernel")
        if not any((tree / package).is_dir() for tree in trees for package in packages):
            continue
        watches = watch(patching.PATCH, patching.patch())
        for route, tokens in itertools.product(peer_calls.ROUTES[peer], (12, 1)):
            peer_calls.TOKENS = tokens
            try:
                route()
            except peer_calls.NotThereError as error:
                absent[str(error)] = None
            except Exception as error:
                traceback.print_exc(limit=-6)
                failed.append(f"{route.__name__} of {tokens} tokens: {type(error).__name__}: {error}")
        table, reached, differing, without = report(watches, reader)
        rows += table
        held += holders(watches, patching.PATCH)
        for name, more in zip(count, (len(watches), reached, differing, without), strict=True):
            count[name] += more
        patching.unpatch()
    print(tabulate(rows, ["function", "module", "call site", "", "differences"], "github"))
    for name, why in sorted(peer_imports.broken.items()):
        print(f"{name} is the peer's own in part alone: {why}")
    for line in absent:
        print(f"Not in these trees: {line}")
    for line in held:
        print(line)
    for line in failed:
        print(f"A caller fails: {line}")
    print(
        f"{count['functions']} functions, {count['reached']} reached, {count['differ']} differ; "
        f"{count['without']} without a call site in these trees"
    )
    return int(
        count["differ"] > 0 or bool(failed) or count["reached"] + count["without"] < count["functions"] or not rows
    )


if __name__ == "__main__":
    sys.exit(main())
