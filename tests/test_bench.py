"""The benchmark: what it computes from times, what it refuses to time, its options and files."""

import argparse
import lzma
import os
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from numba_moe import cli, reference
from numba_moe.bench import command as bench
from numba_moe.bench import contenders, measure, ratios
from numba_moe.bench.contenders import OURS
from numba_moe.bench.measure import Row
from numba_moe.commands import bench_options
from numba_moe.verify import testing


def parse(*arguments):
    parser = argparse.ArgumentParser()
    bench_options(parser)
    return parser.parse_args(arguments)


def rows_of_two_shapes():
    return [
        Row("topk_softmax", "a", 1, "float32", OURS, 2.0, 9.0, 0.5),
        Row("topk_softmax", "a", 1, "float32", "vllm", 4.0, 10.0, 0.25),
        Row("topk_softmax", "a", 1, "float32", "sglang", 5.0, 9.0, 0.2),
        Row("topk_softmax", "b", 64, "float32", OURS, 8.0, 4.0, 0.5),
        Row("topk_softmax", "b", 64, "float32", "vllm", 1.0, 1.0, 0.5),
        Row("topk_softmax", "b", 64, "float32", "sglang", None, None, None, True, "row 3"),
    ]


def test_ratios_are_to_the_best_peer_of_the_same_case():
    rows = rows_of_two_shapes()
    assert ratios.ratios(rows) == {rows[0].key: (0.5, 1.0), rows[3].key: (8.0, 4.0)}
    alone = rows[0]._replace(dtype="bfloat16")
    assert ratios.ratios([*rows, alone])[alone.key] == (None, None)


def test_geometric_means():
    count, device, host = ratios.means(rows_of_two_shapes())["topk_softmax"]
    assert count == 2
    assert device == pytest.approx(2.0)
    assert host == pytest.approx(2.0)
    assert ratios.means(rows_of_two_shapes()[:1]) == {}


def test_table():
    first, vllm, *_, wrong = ratios.table(rows_of_two_shapes()).splitlines()[2:]
    assert first.split() == ["topk_softmax", "a", "float32", OURS, "2.0", "9.0", "50%", "0.50", "1.00"]
    assert vllm.split()[-2:] == ["-", "-"]
    assert wrong.split()[4:] == ["-", "-", "-", "-", "-", "WRONG", "row", "3"]
    refused = Row("topk_softmax", "a", 1, "float32", "vllm", message="RuntimeError: too many experts")
    assert ratios.table([refused]).split()[-1] == "refused"


def test_table_beside_an_older_run(tmp_path):
    rows = rows_of_two_shapes()
    older = [rows[0]._replace(device_us=8.0, host_us=6.0), rows[4]._replace(shape="c")]
    ratios.write_report(tmp_path / "old.json", older, {"device": "some GPU"})
    old = ratios.read_report(tmp_path / "old.json")
    assert old == {row.key: row for row in older}
    lines = ratios.table(rows, old).splitlines()[2:]
    assert lines[0].split()[-4:] == ["8.0", "0.25", "6.0", "1.50"]
    assert lines[4].split()[-4:] == ["-", "-", "-", "-"]


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": [{"speed": 1}]}', '{"environment": {}}'])
def test_a_file_that_is_no_report(tmp_path, text):
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"old\.json is no report"):
        ratios.read_report(path)


def test_bytes_of_alignment():
    chosen = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32)
    blocks = reference.moe_align_block_size(chosen.numpy(), 4, 3)
    arguments = {"topk_ids": chosen, "block_size": 4, "num_experts": 3}
    # reads 4 ids; writes 4 + 3 * 3 positions, ceil(13 / 4) experts and 1 count; 4 bytes each
    moved = measure.bytes_moved(arguments, tuple(map(torch.from_numpy, blocks)))
    assert moved == 4 * (4 + 13 + 4 + 1)


def test_bytes_of_gating():
    arguments = {"gating_output": torch.ones(3, 8, dtype=torch.bfloat16), "top_k": 2, "correction_bias": torch.ones(8)}
    # reads 24 logits of 2 bytes and 8 biases of 4; writes 6 weights and 6 ids of 4
    result = torch.ones(3, 2), torch.ones(3, 2, dtype=torch.int32)
    assert measure.bytes_moved(arguments, result) == 24 * 2 + 8 * 4 + 6 * 4 + 6 * 4
    assert measure.bytes_moved({}, result[0]) == 24


IDS = np.array([[2, 0], [0, 1], [2, 1]], np.int32)
ALIGNED = {"topk_ids": torch.from_numpy(IDS), "block_size": 4, "num_experts": 3}


def aligned(slots, experts, used):
    result = tuple(torch.tensor(part, dtype=torch.int32) for part in (slots, experts, used))
    case = next(contenders.align_cases(["uniform"]))
    return measure.fault_of(case, "vllm", result, reference.moe_align_block_size(IDS, 4, 3), ALIGNED)


def test_alignment_of_a_peer():
    right = [1, 2, 6, 6, 3, 5, 6, 6, 0, 4, 6, 6]
    assert aligned(right, [0, 1, 2], [12]) == ""
    assert aligned([2, 6, 1, 6, 5, 3, 6, 6, 4, 0, 6, 6, 99], [0, 1, 2, 99], [12]) == ""  # any order, any tail
    assert "num_tokens_post_padded" in aligned(right, [0, 1, 2], [8])
    assert "experts of the blocks" in aligned(right, [0, 2, 1], [12])
    assert "experts of the blocks" in aligned(right, [0, 1], [12])
    assert "slots of an expert" in aligned([1, 3, 6, 6, 2, 5, 6, 6, 0, 4, 6, 6], [0, 1, 2], [12])
    assert "slots of an expert" in aligned([1, 2, 6, 6, 3, 5, 6, 6, 0, 4, 6, 7], [0, 1, 2], [12])
    assert "8 positions, 12 are in use" in aligned(right[:8], [0, 1, 2], [12])


def test_alignment_of_ours_must_equal_the_reference():
    case = next(contenders.align_cases(["uniform"]))
    expected = reference.moe_align_block_size(IDS, 4, 3)
    assert measure.fault_of(case, OURS, tuple(map(torch.from_numpy, expected)), expected, ALIGNED) == ""
    swapped = expected.sorted_token_ids.copy()
    swapped[:2] = 2, 1
    ours = expected._replace(sorted_token_ids=swapped)
    assert "first at (0,)" in measure.fault_of(case, OURS, tuple(map(torch.from_numpy, ours)), expected, ALIGNED)


# softmax 0.1, 0.2, 0.3, 0.4; and a row in which experts 1 and 2 tie for the second place
LOGITS = np.log(np.array([[1, 2, 3, 4], [1, 2, 2, 5]], np.float32) / 10)


def gated(weights, chosen, logits=LOGITS):
    arguments = {"gating_output": torch.from_numpy(logits), "top_k": 2, "renormalize": True}
    expected = reference.topk_softmax(logits, 2, True)
    result = torch.tensor(weights), torch.tensor(chosen)
    return measure.fault_of(next(contenders.gating_cases("topk_softmax")), "torch", result, expected, arguments)


def test_gating_of_a_peer():
    weights = [[4 / 7, 3 / 7], [5 / 7, 2 / 7]]
    assert gated(weights, [[3, 2], [3, 1]]) == ""
    assert gated(weights, [[3, 2], [3, 2]]) == ""  # the other of the tie
    assert gated([[3 / 7, 4 / 7], [5 / 7, 2 / 7]], [[2, 3], [3, 1]]) == ""  # any order
    assert "row 1 chose [3, 0], expected [3, 1]" in gated([weights[0], [5 / 6, 1 / 6]], [[3, 2], [3, 0]])
    assert "weight (0, 0)" in gated([[0.4, 0.3], weights[1]], [[3, 2], [3, 1]])
    assert "weight (1, 1)" in gated([weights[0], [5 / 7, float("nan")]], [[3, 2], [3, 1]])
    assert "row 0 has ids twice" in gated(weights, [[3, 3], [3, 1]])
    assert "row 1 has ids twice or out of range" in gated(weights, [[3, 2], [3, -1]])
    assert "row 0 has ids twice or out of range" in gated(weights, [[3, 4], [3, 1]])
    assert "shapes" in gated(weights[:1], [[3, 2]])


def grouped(weights, chosen, logits):
    logits, bias = np.array([logits], np.float32), np.zeros(4, np.float32)
    options = {"top_k": 1, "num_expert_group": 2, "topk_group": 1, "renormalize": True, "scoring_func": "sigmoid"}
    expected = reference.grouped_topk(logits, **options, correction_bias=bias)
    arguments = {"gating_output": torch.from_numpy(logits), "correction_bias": torch.from_numpy(bias), **options}
    result = torch.tensor([weights]), torch.tensor([chosen])
    return measure.fault_of(next(contenders.grouped_cases()), "vllm", result, expected, arguments)


def test_grouped_gating_of_a_peer():
    assert grouped([1.0], [3], [3, -3, 1, 2]) == ""
    assert "row 0 chose [0], expected [3]" in grouped([1.0], [0], [3, -3, 1, 2])  # its group has the lower sum
    assert grouped([1.0], [2], [2, 1, 2, 1]) == ""  # of two equal groups either will do
    assert "weight (0, 0)" in grouped([0.5], [3], [3, -3, 1, 2])


def test_gating_and_alignment_of_a_peer():
    logits = np.random.default_rng(0).standard_normal((5, 12), np.float32)
    given = {"gating_output": torch.from_numpy(logits), "top_k": 3, "block_size": 4, "renormalize": True}
    expected = reference.route(logits, 3, 4, renormalize=True)
    fault = contenders.OPS["route"].fault
    topk, blocks = (tuple(map(torch.from_numpy, part)) for part in expected)
    assert fault((topk, blocks), expected, given) == ""
    assert "weight" in fault(((topk[0] * 1.1, topk[1]), blocks), expected, given)
    assert "differ" in fault((topk, (blocks[0], blocks[1] + 1, blocks[2])), expected, given)
    other = topk[0].flip(1), topk[1].flip(1)
    assert fault((other, (blocks[0] * 0, blocks[1], blocks[2])), expected, given) == ""


def test_torch_is_a_right_peer():
    logits = np.random.default_rng(0).standard_normal((50, 40), np.float32)
    bias = np.linspace(0, 1, 40, dtype=np.float32)
    for op, more in (("topk_softmax", {}), ("topk_sigmoid", {}), ("topk_sigmoid", {"correction_bias": bias})):
        arguments = {"gating_output": torch.from_numpy(logits), "top_k": 6, "renormalize": True}
        arguments |= {name: torch.from_numpy(value) for name, value in more.items()}
        expected = getattr(reference, op)(logits, 6, True, **more)
        (call,) = [peer.call for peer in contenders.OPS[op].peers(**arguments) if peer.name == "torch"]
        weights, chosen = call()
        assert contenders.OPS[op].fault((weights, chosen), expected, arguments) == ""
        assert contenders.OPS[op].fault((weights, (chosen + 1) % 40), expected, arguments) != ""


def test_cases():
    every = bench.select_cases(parse())
    assert len(every) == 13 + 3 * 4 + 1 + 4 + 6 + 5 + 5 + 20 * 2 * 2 + 7 * 2 + 8 * 2 + 3 * 4
    assert len({(case.op, case.name, case.dtype) for case in every}) == len(every)
    chosen = bench.select_cases(parse("--op", "moe_align*", "--shape", "16384x512", "--routing", "uniform,zipf"))
    assert [case.name for case in chosen] == [
        f"16384x512 top 10 block 128 {routing}" for routing in ("uniform", "zipf")
    ]


def test_options(capsys):
    options = parse("--peers", "torch,vllm", "--peer-lib", "a.so", "--peer-lib", "b.so.xz")
    assert options.peers == ["torch", "vllm"]
    assert [path.name for path in options.peer_lib] == ["a.so", "b.so.xz"]
    for bad in (("--peers", "vllm,cublas"), ("--routing", "round_robin")):
        with pytest.raises(SystemExit):
            parse(*bad)
        assert f"got '{bad[1].split(',')[-1]}'" in capsys.readouterr().err


def test_unpacking(tmp_path):
    plain, packed = tmp_path / "ops.so", tmp_path / "ops.so.xz"
    plain.write_bytes(b"ELF" * 1000)
    packed.write_bytes(lzma.compress(plain.read_bytes()))
    with contenders.unpacked(plain) as path:
        assert path == plain
    with contenders.unpacked(packed) as path:
        assert path.name == "ops.so"
        assert path.read_bytes() == plain.read_bytes()
    assert not path.exists()
    assert plain.exists()


def test_peers_that_are_not_there(monkeypatch, capsys):
    monkeypatch.setattr(
        contenders, "PEERS", {"vllm": ("_no_such_C", "no_such_package"), "torch": contenders.PEERS["torch"]}
    )
    assert contenders.load_peers(None, []) == {"torch": version("torch")}
    with pytest.raises(ValueError, match="peer vllm is neither installed nor in a --peer-lib"):
        contenders.load_peers(["vllm"], [])


def test_a_peer_that_does_not_load(monkeypatch, capsys, tmp_path):
    (tmp_path / "broken_peer.py").write_text("raise ImportError('another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(contenders, "PEERS", {"vllm": ("_no_such_C", "broken_peer")})
    assert contenders.load_peers(None, []) == {}
    assert "does not load: another torch" in capsys.readouterr().err
    with pytest.raises(ValueError, match="does not load: another torch"):
        contenders.load_peers(["vllm"], [])


def test_registered_ops():
    assert contenders.is_registered("")
    assert contenders.is_registered("aten.topk")
    assert not contenders.is_registered("aten.topk_softmax")
    assert not contenders.is_registered("_no_such_C.topk_softmax")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu(capsys):
    assert cli.main(["bench"]) == 2
    streams = capsys.readouterr()
    assert streams.err == "numba-moe bench: no CUDA device here, and nothing to time without one\n"
    assert streams.out == ""


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [*rows_of_two_shapes(), rows_of_two_shapes()[0]._replace(op="grouped_topk")]
    ratios.plot(tmp_path / "times.png", rows)
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def on_cpu(monkeypatch):
    """Measure on the CPU, where the reference answers, with a clock that tells 2 and 3 us."""
    to_device = testing.to_device
    monkeypatch.setattr(testing, "to_device", lambda value, device, *more: to_device(value, "cpu", *more))
    monkeypatch.setattr(measure, "device_time", lambda call: 2.0)
    monkeypatch.setattr(measure, "host_time", lambda call: 3.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measure, "copy_bandwidth", lambda: 100.0)
    monkeypatch.setattr(measure, "environment", lambda peers: {"device": "none"})


def test_only_right_results_are_timed(on_cpu, monkeypatch):
    def refuse():
        raise RuntimeError("too many experts")

    def peers(gating_output, top_k, renormalize):
        right = tuple(gating_output.float().softmax(1).topk(top_k))
        yield contenders.Contender("vllm", refuse)
        yield contenders.Contender("sglang", lambda: right)  # not renormalised
        yield contenders.Contender("torch", lambda: (right[0] / right[0].sum(1, keepdim=True), right[1]))
        yield contenders.Contender("torch", refuse, "_no_such_C.topk_softmax")

    monkeypatch.setitem(contenders.OPS, "topk_softmax", contenders.OPS["topk_softmax"]._replace(peers=peers))
    (case,) = (c for c in contenders.gating_cases("topk_softmax") if c.name == "64x256 top 8" and c.dtype == "bfloat16")
    ours, vllm, sglang, right = measure.measure(case, ("vllm", "sglang", "torch"), 100.0)
    moved = 64 * 256 * 2 + 64 * 8 * (4 + 4)
    assert ours == Row("topk_softmax", "64x256 top 8", 64, "bfloat16", OURS, 2.0, 3.0, moved / 2 / 100)
    assert vllm == ours._replace(
        implementation="vllm",
        device_us=None,
        host_us=None,
        copy_fraction=None,
        message="RuntimeError: too many experts",
    )
    assert sglang.wrong
    assert sglang.device_us is None
    assert "weight (0, 0)" in sglang.message
    assert right == ours._replace(implementation="torch")
    assert [row.implementation for row in measure.measure(case, (), 100.0)] == [OURS]


@pytest.mark.parametrize("op", [name for name in contenders.OPS if "align" in name or "ragged" in name])
def test_alignment_and_its_variants_are_timed(on_cpu, op):
    small = [
        case for case in contenders.OPS[op].cases(["zipf"]) if not case.name.startswith(("16384", "65536", "131072"))
    ]
    rows = [row for case in small for row in measure.measure(case, (), 100.0)]
    assert [row.implementation for row in rows] == [OURS] * len(small)
    assert not any(row.wrong for row in rows), rows


@pytest.fixture
def vllm_by_the_reference(monkeypatch):
    """Answer vLLM's ops by the reference, in the peer's shapes, so that what the bench does with them is tested."""

    def write(out, result):
        for part, found in zip(out, result, strict=True):
            part[: found.size] = torch.from_numpy(found.reshape(-1))

    def align(ids, experts, block_size, slots, blocks, used, expert_map):
        maps = {} if expert_map is None else {"expert_map": expert_map.numpy(), "ignore_invalid_experts": True}
        write((slots, blocks, used), reference.moe_align_block_size(ids.numpy(), block_size, experts, **maps))

    def batched(most, block_size, sizes, *out):
        write(out, reference.batched_moe_align_block_size(most, block_size, sizes.numpy()))

    def lora(ids, mapping, experts, block_size, max_loras, length, num_blocks, *rest):
        *out, enabled, lora_ids, _ = rest
        assert [len(part) for part in out] == [max_loras * length, max_loras * num_blocks, max_loras]
        which = (enabled.numpy(), lora_ids.numpy(), None, True)
        arguments = (ids.numpy(), mapping.numpy(), block_size, experts, max_loras, *which)
        write(out, reference.moe_lora_align_block_size(*arguments))

    ops = {
        "moe_align_block_size": align,
        "batched_moe_align_block_size": batched,
        "moe_lora_align_block_size": lora,
    }
    monkeypatch.setattr(torch.ops, "_moe_C", argparse.Namespace(**ops), raising=False)


@pytest.mark.parametrize("op", [name for name in contenders.OPS if "align" in name])
def test_peers_of_alignment_get_their_own_arguments(on_cpu, vllm_by_the_reference, op):
    small = [
        case for case in contenders.OPS[op].cases(["zipf"]) if not case.name.startswith(("16384", "65536", "131072"))
    ]
    rows = [row for case in small for row in measure.measure(case, ("vllm",), 100.0)]
    without_peer = [case for case in small if "inverse" in case.name]
    assert len([row for row in rows if row.implementation == "vllm"]) == len(small) - len(without_peer)
    assert [row for row in rows if row.wrong or row.message] == []


def test_adapters_of_a_peer():
    ids = np.array([[0, 1], [0, 1], [1, 0]])
    arguments = {"topk_ids": torch.from_numpy(ids), "block_size": 2, "max_loras": 2}
    expected = reference.moe_lora_align_block_size(ids, np.array([1, -1, 1]), 2, 2, 2)
    slots, experts, used = (part.ravel().tolist() for part in expected)

    def fault(*parts):
        result = tuple(torch.tensor(part, dtype=torch.int32) for part in parts)
        return contenders.lora_fault(result, expected, arguments)

    assert fault(slots, experts, used) == ""
    assert fault([9] * 8 + [5, 0, 4, 1, 9, 9, 9, 9], [9] * 4 + [0, 1, 9, 9], used) == ""  # any order, any tail
    assert "adapter 1: the slots" in fault([9] * 8 + [5, 1, 4, 0, 9, 9, 9, 9], experts, used)
    assert "adapter 0: num_tokens_post_padded" in fault(slots, experts, [2, 4])


def test_exit_status_is_about_our_results(on_cpu, monkeypatch, capsys):
    options = ["bench", "--op", "topk_softmax", "--shape", "1x64 top 2", "--peers", "torch"]
    assert cli.main(options) == 0
    assert "WRONG" not in capsys.readouterr().out
    monkeypatch.setattr(measure.numba_moe, "topk_softmax", lambda gating_output, **options: 1 / 0)
    assert cli.main(options) == 1
    assert "WRONG ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--op", "gemm"), "no op and shape is called that"),
        (("--json", "no_such_folder/new.json"), "no folder for"),
        (("--plot", "plot.txt"), "`--plot` must be one of '.png', '.svg', '.pdf', got '.txt'"),
        (("--compare", "no_such_file.json"), "No such file"),
        (("--compare", "pipe"), "`--compare` must be a regular file, got pipe"),
        (("--compare", "damaged.so.xz"), "damaged.so.xz is no report of this benchmark"),
        (("--peer-lib", "no_such_file.so.xz"), "No such file"),
        (("--peer-lib", "damaged.so.xz"), "`--peer-lib` must be a whole .so.xz file"),
        (("--peer-lib", "damaged.so"), "damaged.so"),
        (("--peer-lib", "pipe.xz"), "must be a regular file, got pipe.xz"),
    ],
)
def test_what_cannot_run_is_said_before_anything_is_measured(on_cpu, options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pipe", "pipe.xz"):
        os.mkfifo(name)
    for name in ("damaged.so", "damaged.so.xz"):
        Path(name).write_bytes(b"no library")
    assert cli.main(["bench", *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1


@pytest.mark.gpu
def test_end_to_end(tmp_path, capsys):
    path = tmp_path / "new.json"
    options = ["bench", "--op", "topk_softmax", "--shape", "1x64 top 2", "--peers", "torch", "--json", str(path)]
    assert cli.main(options) == 0
    assert "driver: " in capsys.readouterr().out
    rows = list(ratios.read_report(path).values())
    assert [(row.dtype, row.implementation) for row in rows] == [
        (dtype, name) for dtype in ("float32", "bfloat16") for name in (OURS, "torch")
    ]
    for row in rows:
        assert row.message == ""
        assert 0.1 < row.device_us < 1000
        assert 0.1 < row.host_us < 10000
        assert 0 < row.copy_fraction < 10
    assert cli.main([*options, "--compare", str(path)]) == 0
    assert "old device us" in capsys.readouterr().out


def test_what_is_wrong_with_permuted_rows():
    ids = np.array([[1, 0], [-1, 1], [1, 0]], np.int32)
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    expected = reference.moe_permute(rows, ids, 2)
    arguments = {"hidden_states": torch.from_numpy(rows), "topk_ids": torch.from_numpy(ids), "num_experts": 2}

    def fault(order, swap=(), offset=(0, 2, 5)):
        slots = torch.tensor([*order, 6], dtype=torch.int32)
        moved = arguments["hidden_states"][slots.clamp(max=5) // 2]
        moved[list(swap)] = moved[list(swap)[::-1]]
        inverse = torch.full((6,), -1)
        inverse[slots[:5].long()] = torch.arange(5)
        return contenders.permute_fault((moved, torch.tensor(offset), slots, inverse.view(3, 2)), expected, arguments)

    assert fault([1, 5, 0, 3, 4]) == ""
    assert fault([5, 1, 4, 0, 3]) == "", "any order inside an expert"
    assert fault([1, 0, 5, 3, 4]) == "the slots of an expert differ"
    assert fault([1, 5, 0, 3, 4], swap=(0, 1)) == "a row is not that of its slot"
    assert fault([1, 5, 0, 3, 4], offset=(0, 1, 5)) == "the offsets of the experts differ"


def test_what_is_wrong_with_sums():
    rows = torch.ones(3, 2, 4, dtype=torch.bfloat16)
    expected = reference.moe_sum(rows.float().numpy())
    (torch_sum,) = (peer.call for peer in contenders.OPS["moe_sum"].peers(rows) if peer.name == "torch")
    assert contenders.combine_fault(torch_sum(), expected, {}) == ""
    assert contenders.combine_fault(1.1 * torch_sum(), expected, {}).startswith("first at (0, 0): got")
