"""The kernels equal the reference over all named cases, and the verification notices when they do not."""

import collections
import functools
import importlib
import inspect
import json

import numpy as np
import pytest
import torch

import numba_moe
from numba_moe import cli, parallel, placement, recorder, reference, training
from numba_moe.device import simulator
from numba_moe.ops import dispatch
from numba_moe.runtime import formats
from numba_moe.verify import cases, faults, testing, verification

ON_GPU = torch.cuda.is_available()
LEVEL = "quick" if ON_GPU else "simulator"
CASES = [*cases.model_cases(LEVEL), *cases.edge_cases()]


@pytest.mark.sweep(60)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}: {case.name}")
def test_kernels_equal_the_reference(case):
    outcome = verification.run_case(case, seed=1, device="cuda" if ON_GPU else "cpu")
    assert outcome.passed, outcome


@pytest.mark.slow
def test_every_op_and_every_kernel_option_has_cases():
    assert {case.op for case in CASES} == set(verification.OPS)
    assert len({(case.op, case.name) for case in CASES}) == len(CASES)
    assert len(list(cases.model_cases("full"))) + len(list(cases.edge_cases())) >= 200


FIRST_OF_MODULE = {module: name for name, (module, *_) in reversed(faults.FAULTS.items())}.values()


@pytest.mark.parametrize(
    "fault", [name if name in FIRST_OF_MODULE else pytest.param(name, marks=pytest.mark.slow) for name in faults.FAULTS]
)
def test_a_wrong_kernel_is_caught(fault):
    if ON_GPU and fault in faults.WRITES_OUTSIDE:
        pytest.skip("would write outside its arrays; the simulator catches that")
    if ON_GPU and fault in faults.NEEDS_BLOCKS:
        pytest.skip("these cases need one block only; in the simulator they need several")
    chosen = [
        c
        for c in CASES
        if c.op in faults.ops_of(fault)
        and c.name.split()[0] in ("Mixtral-8x7B", "OLMoE", "several", "-1", "skipped", "swiglu_oai", "top", "48")
    ]
    assert chosen
    with faults.planted(fault):
        outcomes = (verification.run_case(case, seed=0, device="cuda" if ON_GPU else "cpu") for case in chosen)
        failed = next((outcome for outcome in outcomes if not outcome.passed), None)
    assert failed, fault
    assert not failed.message.startswith(("AttributeError", "NameError", "TypeError")), "the fault itself is wrong"


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_a_fault_is_of_the_text_that_the_kernel_has(fault):
    module, function, old, new = faults.FAULTS[fault]
    assert old != new
    assert old in inspect.getsource(getattr(importlib.import_module(f"numba_moe.{module}"), function).py_func)


def test_an_input_that_a_kernel_writes_is_caught(monkeypatch):
    def writes(topk_ids, num_experts, expert_map=None):
        result = count(topk_ids, num_experts, expert_map)
        topk_ids[0, 0] = -1
        return result

    count = numba_moe.count_tokens_per_expert
    monkeypatch.setattr(numba_moe, "count_tokens_per_expert", writes)
    [case] = [c for c in CASES if c.op == "count_tokens_per_expert" and c.name == "one slot"]
    outcome = verification.run_case(case, seed=0, device="cuda" if ON_GPU else "cpu")
    assert not outcome.arguments_as_expected
    assert not outcome.passed


def test_a_result_that_changes_is_caught(monkeypatch):
    results = iter([np.array([1, 0]), np.array([0, 1])])
    monkeypatch.setattr(numba_moe, "count_tokens_per_expert", lambda **_: torch.from_numpy(next(results).astype("i4")))
    monkeypatch.setattr(testing, "time_on_device", lambda call: 0.0)
    ids = {"topk_ids": np.array([[0]], np.int32), "num_experts": 2}
    outcome = verification.run_case(cases.Case("count_tokens_per_expert", "", lambda _: ids), 0, "cpu")
    assert outcome.mismatches == 0
    assert not outcome.repeats_equal
    assert not outcome.passed


def test_a_call_that_raises_fails_and_says_why(monkeypatch, capsys):
    def fails(**_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(numba_moe, "expert_offsets", fails)
    assert cli.main(["verify", "--op", "expert_offsets", "--case", "2048 experts"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED RuntimeError: no such kernel" in printed
    assert printed.splitlines()[-1] == "0 passed, 1 failed"


def test_command_prints_a_table_and_writes_json(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert cli.main(["verify", "--op", "expert_*", "--case", "no experts", "--seed", "3", "--json", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "CUDA" in lines[0] or "NVIDIA" in lines[0]
    assert lines[-2].split() == ["expert_offsets", "1", "0", "0", "0"]
    assert lines[-1] == "1 passed, 0 failed"
    [outcome] = json.loads(path.read_text())["outcomes"]
    assert outcome["op"] == "expert_offsets"
    assert outcome["passed"] is True


def test_only_what_fails_is_printed_case_by_case_unless_all_is_asked_for(capsys):
    asked = ["verify", "--op", "expert_offsets", "--case", "no experts"]
    assert cli.main(asked) == 0
    assert "no experts" not in capsys.readouterr().out
    assert cli.main([*asked, "--verbose"]) == 0
    assert "no experts" in capsys.readouterr().out


ONLY_IN_SIMULATOR = pytest.mark.skipif(ON_GPU, reason="on a GPU all cases run")


@ONLY_IN_SIMULATOR
@pytest.mark.parametrize(
    ("options", "takes_few"), [("", True), ("--quick", True), ("--full", False), ("--op dispatch_ids", False)]
)
def test_the_simulator_runs_a_few_cases_unless_others_are_asked_for(options, takes_few, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(verification, "few", lambda cases, call: [3, 5])
    monkeypatch.setattr(
        verification, "run_case", lambda case, *_: verification.Outcome(*case[:2], 0, 0, 1, 1, 0, 0, "")
    )
    monkeypatch.setattr(verification, "MOST_PROCESSES", 1)
    report = tmp_path / "report.json"
    assert cli.main(["verify", *options.split(), "--json", str(report)]) == 0
    printed = capsys.readouterr().out.splitlines()
    asked = [case for case in CASES if options != "--op dispatch_ids" or case.op == "dispatch_ids"]
    run = [CASES[3], CASES[5]] if takes_few else asked
    assert [(o["op"], o["case"]) for o in json.loads(report.read_text())["outcomes"]] == [case[:2] for case in run]
    left_out = f"{len(CASES) - 2} cases left out, which take minutes in the simulator; --full runs them too."
    assert (left_out in printed) == takes_few
    assert printed[-1] == f"{len(run)} passed, 0 failed"


@ONLY_IN_SIMULATOR
def test_a_few_cases_launch_what_all_of_that_size_do():
    chosen = cases.few(CASES, verification.call)
    found = []
    for case in CASES:
        arguments = case.arguments(np.random.default_rng(0))
        launched, threads = cases.simulated.launches_of(functools.partial(verification.call, case, arguments))
        found.append({(case.op, one) for one in launched} if threads <= cases.simulated.MOST_THREADS else set())
    assert set().union(*(found[number] for number in chosen)) == set().union(*found)
    ops = collections.Counter(CASES[number].op for number in chosen)
    assert set(ops) == set(verification.OPS)
    assert min(ops.values()) >= cases.simulated.LEAST
    assert len(chosen) < len(CASES) / 2
    assert cases.few(CASES, verification.call) == chosen


@ONLY_IN_SIMULATOR
def test_what_a_case_launches_is_known_and_nothing_runs(monkeypatch):
    ids, counts = np.array([[1, 0, 1]], np.int32), np.zeros(2, np.int64)
    given = verification.on_device(
        cases.Case("add_expert_counts", "", None), {"topk_ids": ids, "counts": counts}, "cpu"
    )
    call = functools.partial(recorder.add_expert_counts, **given)
    [one], threads = cases.simulated.launches_of(call)
    assert one.kernel == "count_ids"
    assert not one.many_blocks
    assert threads % 32 == 0
    assert not given["counts"].any()
    with simulator.running():
        call()
    assert given["counts"].tolist() == [1, 2]


@pytest.mark.slow
@ONLY_IN_SIMULATOR
def test_processes_share_the_cases_and_keep_their_order(monkeypatch, tmp_path):
    outcomes = []
    for processes in (1, 2):
        monkeypatch.setattr(verification, "MOST_PROCESSES", processes)
        monkeypatch.setattr("os.cpu_count", lambda: 2)
        path = tmp_path / f"{processes}.json"
        assert cli.main(["verify", "--op", "dispatch_ids", "--op", "add_*", "--json", str(path)]) == 0
        outcomes.append(json.loads(path.read_text())["outcomes"])
        for outcome in outcomes[-1]:
            del outcome["reference_us"]
    assert outcomes[0] == outcomes[1]
    assert len(outcomes[0]) > 2 * verification.CASES_OF_A_PROCESS


def test_command_lists_cases(capsys):
    assert cli.main(["verify", "--list", "--op", "grouped_topk"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(line.startswith("grouped_topk: ") for line in lines)


NOTHING = {
    "an op": ("--op nope", "nope"),
    "a case": ("--case nope", "nope"),
    "one of two ops": ("--op topk_softmax --op nope*", "nope*"),
    "one of two cases": ("--case one --case nope", "nope"),
    "an op without such a case": ("--op grouped_topk --case Mixtral --list", "grouped_topk with Mixtral"),
    "an op of an input": ("--input ids.npy --op topk_softmax", "topk_softmax"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_matches_nothing_is_named(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("ids.npy", np.array([[0, 1]]))
    options, pattern = NOTHING[name]
    assert cli.main(["verify", *options.split()]) == 2
    assert tuple(capsys.readouterr()) == ("", f"numba-moe verify: nothing matches {pattern!r}; --list names them\n")


@pytest.mark.parametrize(
    "suffix", [".npy", *(pytest.param(s, marks=pytest.mark.slow) for s in (".npz", ".safetensors", ".pt"))]
)
def test_own_routing_is_verified(suffix, tmp_path, capsys):
    rng = np.random.default_rng(0)
    ids = testing.random_ids(rng, 5, 12, 2, "zipf")
    logits = testing.random_floats(rng, (4, 12))
    path = tmp_path / f"routing{suffix}"
    if suffix == ".npy":
        np.save(path, ids)
    elif suffix == ".npz":
        np.savez(path, topk_ids=ids, router_logits=logits)
    elif suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file({"topk_ids": ids, "router_logits": logits}, path)
    else:
        torch.save({"topk_ids": torch.from_numpy(ids), "router_logits": torch.from_numpy(logits).bfloat16()}, path)
    assert cli.main(["verify", "--input", str(path), "--num-experts", "12", "--top-k", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == ("3" if suffix == ".npy" else "8") + " passed, 0 failed"


EXPERTS = "the number of experts of logits.npy: array = 16"
WRONG_SIZES = {
    "top k": ("logits.npy --top-k 99", f"`--top-k` must be at most {EXPERTS}, got 99"),
    "no expert": ("logits.npy --top-k 0", "`--top-k` must be at least 1, got 0"),
    "an id": (
        "ids.npy --num-experts 3",
        "`--num-experts` must be at least 1 more than the largest id of ids.npy: array = 16, got 3",
    ),
    "logits": ("logits.npy --num-experts 3", f"`--num-experts` must be {EXPERTS}, got 3"),
    "no experts": ("ids.npy --num-experts 0", "`--num-experts` must be at least 1, got 0"),
    "no rows": ("ids.npy --block-size 0", "`--block-size` must be at least 1, got 0"),
    "a seed": ("ids.npy --seed -1", "`--seed` must be at least 0, got -1"),
}


@pytest.mark.parametrize("name", WRONG_SIZES)
def test_sizes_that_do_not_fit_the_input_are_refused(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("ids.npy", np.array([[0, 15], [3, 4]]))
    np.save("logits.npy", np.zeros((2, 16), np.float32))
    options, message = WRONG_SIZES[name]
    assert cli.main(["verify", "--input", *options.split()]) == 2
    assert tuple(capsys.readouterr()) == ("", f"numba-moe verify: {message}\n")


def test_few_experts_have_no_more_to_choose_by_default(tmp_path, capsys):
    np.save(tmp_path / "logits.npy", np.zeros((2, 4), np.float32))
    assert cli.main(["verify", "--input", str(tmp_path / "logits.npy")]) == 0
    assert capsys.readouterr().out.endswith("\n5 passed, 0 failed\n")


def test_a_file_that_cannot_be_read_is_named(tmp_path, capsys):
    assert cli.main(["verify", "--input", str(tmp_path / "missing.npy")]) == 2
    assert "missing.npy" in capsys.readouterr().err


def test_a_file_without_routing_is_refused(tmp_path):
    np.save(tmp_path / "text.npy", np.array(["a"]))
    with pytest.raises(ValueError, match="holds no topk_ids"):
        formats.load_routing(tmp_path / "text.npy")
    with pytest.raises(ValueError, match=r"must be a \.npy"):
        formats.load_routing(tmp_path / "routing.csv")


def test_reference_and_public_names_agree():
    packages = (parallel, placement, recorder, training)
    elsewhere = {name for package in packages for name in package.__all__} | {"DispatchLayout", "DispatchedTokens"}
    besides = {"BumpAllocator", "MoEBlock", "align_sizes", "set_log_level"}
    assert set(reference.__all__) - elsewhere | besides == set(numba_moe.__all__) - elsewhere
    assert set(cases.draws.DISPATCH) == set(dispatch.ALGORITHMS)
