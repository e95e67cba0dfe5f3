"""The course runs: steps pass the cases of their ops, lessons run, and checks tell right solutions from wrong ones."""

import importlib.util
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import cuda

import numba_moe
from numba_moe import lab, reference
from numba_moe.device import simulator

ROOT = Path(__file__).parents[1]
COURSE = ROOT / "docs" / "course"
STEPS = sorted(COURSE.glob("steps/*/*.py"))
# Of each op some cases, which are small and differ.
CASES = {
    "count_tokens_per_expert": ["Mixtral", "-1 rows", "zero", "hot", "int64", "1100"],
    "moe_align_block_size": ["Mixtral-8x7B 3 tokens zipf", "-1 rows", "zero tokens", "hot", "block_size 3"],
    "topk_softmax": ["Mixtral", "Qwen3", "ties", "non-finite", "signed", "strided", "zero tokens", "saturated"],
    "moe_sum": ["top 5", "strided rows of 33 float32", "48 float16", "OLMoE"],
    "moe_permute": ["top 5", "strided rows of 33 float32", "-1 rows", "hidden 0", "OLMoE", "zero tokens"],
}
LONGEST = 80  # lines of a step
FAILS = "03_atomics_lose_the_order"


def load(path):
    spec = importlib.util.spec_from_file_location(f"course_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def label(path):
    return f"{path.parent.name}/{path.stem}"


QUICK = ("counting/03_atomics", "gating/03_warp_per_token", "moe_sum/02_thread_per_element", f"alignment/{FAILS}")


@pytest.mark.parametrize(
    "path", [path if label(path) in QUICK else pytest.param(path, marks=pytest.mark.slow) for path in STEPS], ids=label
)
def test_a_step_passes_the_cases_of_its_op(path):
    module = load(path)
    [op] = [name for name in CASES if hasattr(module, name)]
    assert len(path.read_text().splitlines()) <= LONGEST
    if path.stem.endswith("shipped"):
        assert getattr(module, op) is getattr(numba_moe, op)
        return
    report = lab.check(getattr(module, op), like=op, cases=CASES[op], library="numba", show=False)
    if path.stem == FAILS:
        assert "one hot expert" in report.failed
    else:
        assert report.passed, report.failed
        assert len(report.outcomes) > 3


def test_every_family_ends_with_what_is_shipped():
    families = {path.parent for path in STEPS}
    assert len(families) == 5
    for family in families:
        assert sorted(family.glob("*.py"))[-1].stem.endswith("shipped")


@pytest.mark.slow
@pytest.mark.skipif(not simulator.ENABLED, reason="on a GPU times are measured by hand")
def test_the_script_shows_every_step(capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import course_times

    assert course_times.main(["counting", "moe_sum"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("counting ") == 7
    assert course_times.main(["nothing"]) == 2


LESSONS = sorted(COURSE.glob("lessons/[01]*.py"))


@pytest.fixture(scope="module")
def lessons():
    """Put the folder of the lessons where a lesson that is run finds its neighbours."""
    sys.path.insert(0, str(COURSE / "lessons"))
    yield
    sys.path.remove(str(COURSE / "lessons"))
    for name in ("checks", "pictures", "solutions"):
        sys.modules.pop(name, None)


def test_there_are_twelve_lessons():
    assert [int(path.name[:2]) for path in LESSONS] == list(range(1, 13))
    text = (COURSE / "index.md").read_text()
    assert all(path.stem in text for path in LESSONS)


@pytest.mark.skipif(not simulator.ENABLED, reason="one of them turns the simulator on")
@pytest.mark.parametrize(
    "path", [p if p.stem[:2] in ("02", "05") else pytest.param(p, marks=pytest.mark.slow) for p in LESSONS], ids=label
)
def test_a_lesson_runs_and_its_exercise_is_still_to_do(path, lessons, capsys):
    runpy.run_path(str(path))
    printed = capsys.readouterr().out
    assert "\nNot yet. " in printed
    assert "Error" not in printed.rpartition("Not yet.")[2]
    text = path.read_text()
    assert "# **Exercise.**" in text
    assert 'pictures.show("' in text
    assert "You will " in text.partition("#\n")[2]


def launched(kernel):
    """Return a function that launches a kernel of an array and a result like it."""

    def call(values, *more):
        result = np.zeros_like(values) if not more else np.zeros(more[0], np.int32)
        if values.size:
            kernel[-(-values.size // 64), 64](values, result)
        return result

    return call


@cuda.jit
def doubles_past_the_end(values, result):
    result[cuda.grid(1)] = 2 * values[cuda.grid(1)]


@cuda.jit
def doubles_one_block(values, result):
    if cuda.threadIdx.x < min(values.size, 64) and cuda.blockIdx.x == 0:
        result[cuda.threadIdx.x] = 2 * values[cuda.threadIdx.x]


@cuda.jit
def shifts_past_the_end(values, result):
    if cuda.grid(1) < values.size:
        result[cuda.grid(1)] = values[cuda.grid(1) + 1]


@cuda.jit
def shifts_and_keeps_the_last(values, result):
    index = cuda.grid(1)
    if index < values.size:
        result[index] = values[min(index + 1, values.size - 1)]


@cuda.jit
def shifts_the_other_way(values, result):
    index = cuda.grid(1)
    if index < values.size:
        result[index] = values[index - 1]


@cuda.jit
def counts_without_atomics(ids, counts):
    slot = cuda.grid(1)
    if slot < ids.size and 0 <= ids[slot] < counts.size:
        counts[ids[slot]] += 1


@cuda.jit
def counts_below_zero(ids, counts):
    slot = cuda.grid(1)
    if slot < ids.size and ids[slot] < counts.size:
        cuda.atomic.add(counts, ids[slot], 1)


@cuda.jit
def adds_half_a_warp(values, result):
    value = values[cuda.laneid]
    for distance in (8, 4, 2, 1):
        value += cuda.shfl_xor_sync(0xFFFFFFFF, value, distance)
    result[cuda.laneid] = value


@cuda.jit
def adds_in_shared_memory(values, result):
    shared = cuda.shared.array(32, np.float32)
    shared[cuda.laneid] = values[cuda.laneid]
    cuda.syncthreads()
    total = np.float32(0)
    for lane in range(32):
        total += shared[lane]
    result[cuda.laneid] = total


@cuda.jit
def adds_downwards(values, result):
    value = values[cuda.laneid]
    for distance in (16, 8, 4, 2, 1):
        value += cuda.shfl_down_sync(0xFFFFFFFF, value, distance)
    result[cuda.laneid] = cuda.shfl_sync(0xFFFFFFFF, value, 0)


def one_warp(kernel):
    def call(values):
        result = np.zeros_like(values)
        kernel[1, 32](values, result)
        return result

    return call


@cuda.jit
def double_in_strides(values, result):
    for index in range(cuda.grid(1), values.size, cuda.gridsize(1)):
        result[index] = values[index] + values[index]


def doubles_in_place(values):
    double_in_strides[2, 32](values, values)
    return values


def doubles_in_strides(values):
    result = cuda.device_array(values.shape, values.dtype)
    double_in_strides[2, 32](cuda.to_device(values), result)
    return result


@cuda.jit
def count_slot(ids, counts):
    slot = cuda.grid(1)
    if slot < ids.size and 0 <= ids[slot] < counts.size:
        cuda.atomic.add(counts, ids[slot], 1)


def counts_into(allocate):
    def call(ids, num_experts):
        counts = allocate(num_experts, np.int32)
        count_slot[8, 64](ids, counts)
        return counts

    return call


counts_into_new_memory = counts_into(np.empty)


def places_of(order):
    def call(ids, num_experts):
        result = np.empty(ids.size, np.int32)
        result[order(ids)] = np.arange(ids.size)
        return result

    return call


def topk(logits, top_k, renormalize):
    return reference.topk_softmax(np.asarray(logits), top_k, renormalize)


WRONG = {
    "active_share": [lambda n, k: n / k, lambda n, k: k // n, lambda n, k: 1 / n],
    "num_skipped": [
        lambda ids, n: len({one for one in ids.ravel() if not 0 <= one < n}),
        lambda ids, n: int(((ids < 0) | (ids >= n)).any(axis=1).sum()),
        lambda ids, n: int((ids < 0).sum()),
        lambda ids, n: int((ids == -1).sum()),
        lambda ids, n: int(((ids < 0) | (ids > n)).sum()),
    ],
    "doubled": [
        *(launched(doubles_past_the_end), launched(doubles_one_block), doubles_in_place),
        *(lambda values: values + 2, lambda values: values * 2),
    ],
    "shifted": [launched(shifts_past_the_end), launched(shifts_and_keeps_the_last), launched(shifts_the_other_way)],
    "histogram": [
        counts_into_new_memory,
        launched(counts_without_atomics),
        launched(counts_below_zero),
        lambda ids, n: np.bincount(ids[ids >= 0], minlength=n),
    ],
    "places": [
        places_of(lambda ids: np.argsort(-ids, kind="stable")),
        places_of(lambda ids: np.lexsort((-np.arange(ids.size), ids))),
        lambda ids, n: np.argsort(ids, kind="stable").astype(np.int32),
    ],
    "sum_in_every_lane": [
        *(one_warp(adds_half_a_warp), one_warp(adds_in_shared_memory)),
        *(lambda values: values.sum(), lambda values: np.full(32, values.sum(), np.float32)),
    ],
    "topk_softmax": [
        lambda gating_output, top_k, renormalize=False: topk(gating_output, top_k, False),
        lambda gating_output, top_k, renormalize=False: topk(np.nan_to_num(gating_output), top_k, renormalize),
        lambda gating_output, top_k: topk(gating_output, top_k, False),
    ],
    "least_us": [
        lambda tokens, hidden, k, size, speed: k * tokens * hidden * size / speed / 1e3,
        lambda tokens, hidden, k, size, speed: 2 * k * tokens * hidden * size / speed / 1e3,
        lambda tokens, hidden, k, size, speed: (1 + k) * tokens * hidden * size / speed,
    ],
    "time_of": [
        lambda calls, host, device: calls * (host + device),
        lambda calls, host, device: calls * max(host, device),
        lambda calls, host, device: host + calls * device,
    ],
    "is_right": [
        lambda count: True,
        lambda count: False,
        lambda count: count(np.array([0, 1, 1, 2]), 3).tolist() == [1, 2, 1],
    ],
    "expert_map": [
        lambda rank, ranks, n: np.arange(n, dtype=np.int32),
        lambda rank, ranks, n: np.where(np.arange(n) % ranks == rank, np.arange(n) // ranks, -1).astype(np.int32),
        lambda rank, ranks, n: np.where(np.arange(n) // (n // ranks) == rank, np.arange(n), -1).astype(np.int32),
    ],
}


# Right in another way than the solutions.
OTHERS = {
    "active_share": [lambda num_experts, top_k: np.float64(top_k) / num_experts],
    "num_skipped": [lambda ids, n: ids.size - reference.count_tokens_per_expert(ids, n).sum()],
    "doubled": [doubles_in_strides],
    "histogram": [counts_into(lambda n, dtype: cuda.to_device(np.zeros(n, dtype)))],
    "places": [lambda ids, n: np.argsort(np.argsort(ids, kind="stable"), kind="stable").astype(np.int32)],
    "sum_in_every_lane": [one_warp(adds_downwards)],
    "is_right": [
        lambda count: all(
            count(np.array(ids), 4).tolist() == wanted
            for ids, wanted in (([0, 3, 3], [1, 0, 0, 2]), ([-1, 4, 1], [0, 1, 0, 0]), ([-1, 0], [1, 0, 0, 0]))
        )
    ],
}


@pytest.mark.parametrize(
    "exercise",
    [name if name in ("histogram", "is_right") else pytest.param(name, marks=pytest.mark.slow) for name in WRONG],
)
def test_a_check_accepts_the_solution_and_rejects_what_is_wrong(exercise, lessons):
    import checks
    import solutions

    assert set(checks.CHECKS) == set(WRONG)
    assert checks.fault_of(exercise, getattr(solutions, exercise)) == ""
    assert len(WRONG[exercise]) >= 3
    for wrong in WRONG[exercise]:
        assert checks.fault_of(exercise, wrong) != ""
    for other in OTHERS.get(exercise, []):
        assert checks.fault_of(exercise, other) == ""


@pytest.mark.slow
def test_the_kernel_of_lesson_eight_passes_every_case_it_takes(lessons):
    import solutions

    report = lab.check(solutions.topk_softmax, like="topk_softmax", library="numba", show=False)
    assert report.passed, report.failed
    assert {why for _, why in report.left_out} == {"topk_softmax does not take correction_bias"}


def test_every_picture_is_drawn_and_shown(lessons):
    from xml.etree import ElementTree

    import pictures

    texts = "".join(path.read_text() for path in LESSONS)
    for name in pictures.PICTURES:
        drawn = ElementTree.fromstring(pictures.draw(name))
        assert drawn.find("{*}title").text == pictures.PICTURES[name][0]
        assert f'pictures.show("{name}")' in texts
