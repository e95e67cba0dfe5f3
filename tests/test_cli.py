"""The command line as shells and people meet it: one line for what is wrong, no tracebacks of signals and pipes."""

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

import numba_moe
from numba_moe import cli, commands, recorder
from numba_moe.bench import contenders, grid_shapes
from numba_moe.lab import own
from numba_moe.placement import rebalance, simulate_command, simulation
from numba_moe.recorder import merging, report
from numba_moe.runtime import text
from numba_moe.verify import testing, verification
from numba_moe.verify.cases import inputs

RUN = [sys.executable, "-c", "import sys; from numba_moe.cli import main; sys.exit(main(sys.argv[1:]))"]
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and pipes of POSIX")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Be in a folder with a dump, with what is no dump, and with a pipe."""
    monkeypatch.chdir(tmp_path)
    np.savez("dump.npz", logical_count=np.random.default_rng(0).integers(1, 90, (4, 2, 8)))
    np.save("ids.npy", np.array([[0, 1], [2, 0]]))
    (tmp_path / "empty.npz").touch()
    (tmp_path / "damaged.npz").write_bytes((tmp_path / "dump.npz").read_bytes()[:100])
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "there").mkdir()
    (tmp_path / "there.npz").mkdir()
    os.mkfifo(tmp_path / "pipe.npz")
    return tmp_path


INPUTS = ["gone.npz", "there", "there.npz", "text.txt", "empty.npz", "damaged.npz", "pipe.npz", "", "x" * 300 + ".npz"]
COMMANDS = {
    "merge": ["merge", "dump.npz", "{}", "--out", "sum.npz"],
    "report": ["report", "{}"],
    "rebalance": ["rebalance", "{}", "--gpus", "2"],
    "rebalance --location": ["rebalance", "dump.npz", "--gpus", "2", "--location", "{}"],
    "verify": ["verify", "--input", "{}"],
}


@POSIX
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("path", INPUTS)
def test_a_file_that_cannot_be_read_is_one_line(command, path, folder, capsys):
    before = sorted(os.listdir(folder))
    assert cli.main([part.format(path) for part in COMMANDS[command]]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"numba-moe {command.split()[0]}: ")
    assert len(printed.err.splitlines()) == 1
    assert sorted(os.listdir(folder)) == before


OUTPUTS = {
    "merge --out": ["merge", "dump.npz", "dump.npz", "--out", "{}.npz"],
    "report --out": ["report", "dump.npz", "--out", "{}"],
    "rebalance --json": ["rebalance", "dump.npz", "--gpus", "2", "--json", "{}"],
    "rebalance --plot": ["rebalance", "dump.npz", "--gpus", "2", "--plot", "{}.png"],
    "rebalance --out": ["rebalance", "dump.npz", "--gpus", "2", "--out", "{}.npz"],
    "verify --json": ["verify", "--op", "expert_offsets", "--json", "{}"],
}


@POSIX
@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("path", ["gone/x", "text.txt/x", "there", "x" * 300])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(name, path, folder, monkeypatch, capsys):
    (folder / "there.png").mkdir()
    for module in (verification, simulate_command, report, merging):
        monkeypatch.setattr(module, "run", lambda *_: pytest.fail("it worked first"))
    assert cli.main([part.format(path) for part in OUTPUTS[name]]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1


@pytest.mark.slow
def test_an_output_that_fails_after_all_is_one_line(folder, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    for name, arguments in OUTPUTS.items():
        if "--plot" in arguments or arguments[0] == "report":
            pytest.importorskip("matplotlib")
        assert cli.main([part.format("x") for part in arguments]) == 2
        assert capsys.readouterr().err == f"numba-moe {name.split()[0]}: [Errno 28] No space left on device\n"
    assert not [path for path in os.listdir(folder) if path.startswith((".", "x"))]


@pytest.mark.parametrize("error", [ValueError("a bug"), TypeError("a bug"), KeyError("a bug")])
def test_a_bug_has_its_traceback(error, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(verification, "environment", fail)
    with pytest.raises(type(error), match="a bug"):
        cli.main(["verify", "--op", "expert_offsets"])


OPTIONS = [
    "",
    "nope",
    "info nope",
    "verify --quick --full",
    "verify --seed x",
    "verify --input",
    "rebalance dump.npz",
    "rebalance dump.npz --gpus x",
    "report dump.npz --algorithm nope",
    "merge --out x.npz",
    "merge dump.npz",
    "bench --routing nope",
    "warmup --arch 9.0",
    "export --arch sm_90",
]


@pytest.mark.parametrize("options", OPTIONS)
def test_options_that_do_not_parse_are_one_line(options, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(options.split())
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("numba-moe")
    assert len(printed.err.splitlines()) == 1


# Each is answered by one line and status 2, before any work. {0} is a folder with the files of `wrong`.
WRONG = [
    "verify --op nope",
    "verify --input {0}/missing.npy",
    "verify --input {0}/folder",
    "verify --input {0}/empty.json",
    "verify --input {0}/damaged.npz",
    "verify --seed -1",
    "verify --json {0}/folder",
    "verify --json /nonexistent/x.json",
    "verify --module {0}/missing.py:f --like topk_softmax",
    "verify --module {0}/missing.py --like topk_softmax",
    "verify --like topk_softmax",
    "verify --input {0}/ids.npy --block-size 0",
    "verify --input {0}/ids.npy --top-k 0",
    "verify --input {0}/ids.npy --num-experts -3",
    "bench --op nope",
    "bench --json {0}/folder",
    "bench --plot {0}/x.txt",
    "bench --compare {0}/missing.json",
    "bench --compare {0}/damaged.npz",
    "bench --grid nope",
    "bench --grid --shapes 0",
    "bench --grid --seconds -1",
    "bench --grid --seconds nan",
    "bench --merge {0}/missing.json",
    "bench --merge {0}/empty.json",
    "bench --merge {0}/list.json",
    "bench --merge {0}/object.json",
    "rebalance {0}/missing.npz --gpus 2",
    "rebalance {0}/folder --gpus 2",
    "rebalance {0}/empty.json --gpus 2",
    "rebalance {0}/list.json --gpus 2",
    "rebalance {0}/damaged.npz --gpus 2",
    "rebalance {0}/past_int64.npz --gpus 2",
    "rebalance {0}/nan.npz --gpus 2",
    "rebalance {0}/negative.csv --gpus 2",
    "rebalance {0}/header.csv --gpus 2",
    "rebalance {0}/large.csv --gpus 2",
    "rebalance {0}/counts.npz --gpus 0",
    "rebalance {0}/counts.npz --gpus 2 --json {0}/folder",
    "rebalance {0}/counts.npz --gpus 2 --plot {0}/x.txt",
    "merge {0}/counts.npz {0}/missing.npz --out {0}/x.npz",
    "merge {0}/counts.npz {0}/damaged.npz --out {0}/x.npz",
    "merge {0}/counts.npz {0}/folder --out {0}/x.npz",
    "merge {0}/counts.npz {0}/object.json --out {0}/x.npz",
    "merge {0}/counts.npz {0}/other_size.npz --out {0}/x.npz",
    "merge {0}/past_int64.npz --out {0}/x.npz",
    "merge {0}/large.npz {0}/large.npz {0}/large.npz --out {0}/x.npz",
    "merge {0}/negative.csv --out {0}/x.npz",
    "merge {0}/counts.npz --out {0}/folder",
    "merge {0}/counts.npz --out {0}/x.txt",
    "merge {0}/counts.npz --out /nonexistent/x.npz",
    "merge {0}/counts.npz --out {0}/x.npz --experts 9",
    "merge {0}/counts.npz --out {0}/x.npz --layers 0",
    "report {0}/missing.npz",
    "report {0}/folder",
    "report {0}/negative.csv",
    "report {0}/damaged.npz",
    "report {0}/object.json",
    "report {0}/past_int64.npz",
    "report {0}/ids.npy",
    "export {0}/ids.npy --arch sm_90",
    "export /proc/x --arch sm_90",
    "verify --seed 99999999999999999999",
    "verify --input {0}/ids.npy --num-experts 4",
    "verify --input {0}/counts.npz",
    "verify --input {0}/ids.npy --block-size 99999999999",
    "verify --op expert_offsets --case nope",
    "verify --list --op nope",
    "verify --module {0}/ids.npy:f --like topk_softmax",
    "verify --module :f --like topk_softmax",
    "verify --fill 1",
    "verify --top-k 2",
    "verify --num-experts 4",
    "verify --block-size 8",
    "verify --module {0}/leaves.py:f --like topk_softmax",
    "bench --shape nope",
    "bench --compare {0}/counts.npz",
    "rebalance {0}/half.npz --gpus 2",
    "rebalance {0}/complex.npz --gpus 2",
    "rebalance {0}/many.npz --gpus 2",
    "rebalance {0}/zero.npz --gpus 2",
    "rebalance {0}/no_layers.npz --gpus 2",
    "rebalance {0}/ragged.json --gpus 2",
    "rebalance {0}/huge.json --gpus 2",
    "rebalance {0}/semicolons.csv --gpus 2",
    "rebalance {0}/large_id.csv --gpus 2",
    "rebalance {0}/some.csv --gpus 2 --experts 1",
    "rebalance {0}/counts.npz --gpus 2 --nodes 3",
    "rebalance {0}/counts.npz --gpus 2 --groups 3",
    "rebalance {0}/counts.npz --gpus 2 --replicas 7",
    "rebalance {0}/counts.npz --gpus 2 --replicas 99999999999",
    "rebalance {0}/counts.npz --gpus 2 --algorithm nope",
    "rebalance {0}/counts.npz --gpus 2 --interval 1000",
    "rebalance {0}/counts.npz --gpus 2 --max-moves -1",
    "rebalance {0}/counts.npz --gpus 2 --bytes-per-expert -1",
    "rebalance {0}/counts.npz --gpus 2 --step-ms nan",
    "rebalance {0}/counts.npz --gpus 2 --bandwidth 0",
    "rebalance {0}/counts.npz --gpus 2 --tokens-per-step 3",
    "rebalance {0}/counts.npz --gpus 2 --out {0}/x.txt",
    "rebalance {0}/counts.npz --gpus 2 --location {0}/ids.npy",
    "rebalance {0}/records.json --gpus 2 --experts 3",
    "report {0}/half.npz",
    "report {0}/complex.npz",
    "report {0}/counts.npz --gpus 3",
    "report {0}/counts.npz --experts 9",
    "report {0}/counts.npz --layers 1",
    "report {0}/some.csv --layers 0",
    "report {0}/some.csv --experts 1",
    "report {0}/records.json --experts 3",
    "report {0}/counts.npz --png {0}/ids.npy",
    "serve-demo --ranks 0",
    "serve-demo --directory {0}/ids.npy",
]


# Two passes of three tokens and one layer: ids alone, without counts or a map.
RECORDS = [{"forward_pass_id": number, "topk_ids_of_layer": [[[0, 1], [0, 3], [1, -1]]]} for number in (4, 5)]


@pytest.fixture
def wrong(tmp_path):
    """Return a folder with files that are not what a command expects."""
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "ids.npy", np.arange(16).reshape(8, 2) % 8)
    np.savez(tmp_path / "counts.npz", logical_count=np.ones((3, 2, 8), np.int64))
    np.savez(tmp_path / "other_size.npz", logical_count=np.ones((3, 2, 4), np.int64))
    np.savez(tmp_path / "large.npz", logical_count=np.full((1, 1, 2), 2**61))
    np.savez(tmp_path / "half.npz", logical_count=np.full((1, 1, 4), 0.5))
    np.savez(tmp_path / "complex.npz", logical_count=np.ones((1, 1, 4), complex))
    np.savez(tmp_path / "many.npz", logical_count=np.ones((2, 2, 2, 4), int))
    np.savez(tmp_path / "zero.npz", logical_count=np.zeros((2, 2, 4), int))
    np.savez(tmp_path / "no_layers.npz", logical_count=np.zeros((1, 0, 8), int))
    np.savez(tmp_path / "past_int64.npz", logical_count=np.full((1, 1, 4), 2**62))
    np.savez(tmp_path / "nan.npz", logical_count=np.full((1, 1, 4), np.nan))
    texts = {
        "empty.json": "",
        "list.json": "[1,2",
        "object.json": '{"a": 1}',
        "damaged.npz": "PK\x03\x04",
        "negative.csv": "layer_id,expert_id,count\n0,0,5\n0,1,-3\n",
        "header.csv": "x,y\n1,2\n",
        "large.csv": f"layer_id,expert_id,count\n0,0,{10**19}\n",
        "some.csv": "layer_id,expert_id,count\n0,0,5\n0,1,7\n",
        "leaves.py": "import sys; sys.exit(3)",
        "semicolons.csv": "layer_id;expert_id;count\n0;0;5\n",
        "large_id.csv": "layer_id,expert_id,count\n0,999999999999,5\n",
        "ragged.json": '{"logical_count": [[1, 2], [3]]}',
        "huge.json": '{"logical_count": [[1e400, 2]]}',
        "records.json": json.dumps({"records": RECORDS}),
    }
    for name, content in texts.items():
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.mark.parametrize("command", WRONG)
def test_what_is_wrong_is_one_line(command, wrong, capsys):
    before = sorted(wrong.iterdir())
    assert cli.main(command.format(wrong).split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"numba-moe {command.split()[0]}: ")
    assert len(printed.err.splitlines()) == 1
    assert "no CUDA device" not in printed.err
    assert sorted(wrong.iterdir()) == before


def test_counts_that_a_spreadsheet_wrote_as_floats_are_whole_numbers(tmp_path, capsys):
    (tmp_path / "counts.csv").write_text("layer_id,expert_id,count\n0,0,5.0\n0,1,3.\n1,0,2\n1,1,7.00\n")
    assert cli.main(["rebalance", str(tmp_path / "counts.csv"), "--gpus", "2"]) == 0
    (tmp_path / "counts.csv").write_text("layer_id,expert_id,count\n0,0,5.5\n")
    assert cli.main(["rebalance", str(tmp_path / "counts.csv"), "--gpus", "2"]) == 2
    assert "'0,0,5.5' is not three whole numbers" in capsys.readouterr().err


LIKE = {
    "counts.csv": "layer_id,expert_id,count\n0,0,4\n0,1,4\n0,3,2\n",
    "floats.csv": "layer_id,expert_id,count\n0.0,0,4e0\n0,1.,4.00\n0, 3,0.2e1\n",
    "records.json": json.dumps({"records": RECORDS}),
    "list.json": json.dumps(RECORDS),
    "ids.json": json.dumps({"topk_ids": [one["topk_ids_of_layer"] for one in RECORDS]}),
    "floats.json": json.dumps({"logical_count": [[[2.0, 2, 0, 1.0]]] * 2}),
}


@pytest.mark.parametrize("name", LIKE)
@pytest.mark.parametrize("sizes", [[], ["--experts", "6"]], ids=["found", "given"])
def test_every_command_reads_every_kind_of_dump(name, sizes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(LIKE[name])
    experts = int(sizes[-1]) if sizes and name != "floats.json" else 4  # which has all experts
    total = [4, 4, 0, 2] + [0] * (experts - 4)
    loaded = recorder.load(name, num_experts=experts)
    assert loaded.logical_count.sum(axis=0).tolist() == [total]
    sizes = [] if name == "floats.json" else sizes
    assert cli.main(["rebalance", name, "--gpus", "2", "--json", "out.json", *sizes]) == 0
    assert f"1 layer, {experts} experts" in capsys.readouterr().out
    assert cli.main(["report", name, "--gpus", "2", *sizes]) == 0
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_layers_are_given_where_a_csv_lacks_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "counts.csv").write_text(LIKE["counts.csv"])
    assert cli.main(["rebalance", "counts.csv", "--gpus", "2", "--layers", "3", "--num-experts", "8"]) == 0
    assert "3 layers, 8 experts" in capsys.readouterr().out
    assert cli.main(["report", "counts.csv", "--num-layers", "3"]) == 0


@pytest.mark.sweep(4)
@pytest.mark.parametrize("columns", [60, 80, 100])
@pytest.mark.parametrize(
    "arguments",
    [
        ["rebalance", "dump.npz", "--gpus", "2", "--search", "--detail"],
        ["verify", "--op", "expert_offsets", "--verbose"],
        ["info"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_tables_fit_the_terminal(arguments, columns, folder, monkeypatch, capsys):
    """Their rules, lines of dashes, say how wide they are."""
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    rules = [line for line in lines if line.startswith("--")]
    assert rules
    if arguments[0] == "rebalance":
        assert max(map(len, lines)) <= columns
    assert max(map(len, rules)) <= columns
    if arguments[0] == "rebalance":
        monkeypatch.delenv("COLUMNS")
        assert cli.main(arguments) == 0
        wide = capsys.readouterr().out
        assert max(len(line) for line in wide.splitlines() if line.startswith("--")) > 100


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(text, "BETWEEN_LINES", 0.0)
    assert list(text.progress("abc", "kernel")) == ["a", "b", "c"]
    assert capsys.readouterr().err.splitlines() == [
        "1 of 3 kernels, about 0 s left",
        "2 of 3 kernels, about 0 s left",
    ]


def test_what_takes_long_says_so_before_anything_is_done(capsys, monkeypatch):
    monkeypatch.setattr(text, "BETWEEN_LINES", 1.0)
    with text.ticking(4, "layer"):
        time.sleep(1.5)
    assert re.fullmatch(r"0 of 4 layers, [12] s so far\n", capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [[], *([name] for name in commands.COMMANDS)], ids=lambda words: " ".join(words))
def test_help_is_quick_and_fits(arguments):
    """It has examples, and it imports nothing that takes time."""
    program = (
        "import sys; from numba_moe.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(*sorted({'torch', 'numpy', 'numba'} & sys.modules.keys()), file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, *arguments, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "60"})
    assert (done.returncode, done.stderr) == (0, "\n")
    text, _, examples = done.stdout.partition("examples:\n")
    assert max(map(len, text.splitlines())) <= 60
    assert not arguments or f"numba-moe {arguments[0]}" in examples


def test_examples_of_the_help_parse():
    for name, command in commands.COMMANDS.items():
        for line in command.examples.splitlines():
            words = shlex.split(line)
            if words[:1] == ["numba-moe"]:
                assert cli._parser(words[1:]).parse_args(words[1:]).command == name


def test_what_commands_know_is_what_their_modules_know():
    assert commands.ALGORITHMS == rebalance.ALGORITHMS
    assert commands.BANDWIDTH == simulation.BANDWIDTH
    assert commands.GRIDS == tuple(grid_shapes.GRIDS)
    assert commands.LIBRARIES == own.LIBRARIES
    assert commands.PEERS == tuple(contenders.PEERS)
    assert commands.ROUTINGS == testing.ROUTINGS
    assert commands.TOP_K == inputs.TOP_K


def test_the_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"numba-moe {numba_moe.__version__}\n"


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_path_is_printed_in_any_encoding(encoding, tmp_path):
    np.savez(tmp_path / "counts.npz", logical_count=np.ones((1, 1, 2), np.int64))
    command = [sys.executable, "-m", "numba_moe.cli", "report", "counts.npz", "--out", b"\xc3\xbc\xff.html"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.endswith(b"\\udcff.html: 1 pass on 1 rank\n")


def test_a_fault_of_our_own_is_70_with_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_run", lambda *_: 1 / 0)
    assert cli.run(["info"]) == 70
    assert capsys.readouterr().err.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("arch", ["sm_10", "sm_999", "sm_90,sm_62"])
def test_an_arch_that_the_compiler_does_not_know_is_refused(arch, tmp_path, capsys):
    for arguments in (["warmup"], ["export", str(tmp_path / "folder")]):
        assert cli.main([*arguments, "--arch", arch]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith(f"numba-moe {arguments[0]}: `--arch` must be among sm_")
        assert printed.endswith(f", got {arch.split(',')[-1]}\n")
    assert not (tmp_path / "folder").exists()


@pytest.mark.sweep(1)
@POSIX
@pytest.mark.parametrize("arguments", [["verify", "--list"], ["--help"], ["verify", "--op", "expert_offsets"]])
def test_a_closed_pipe_is_silence(arguments):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*RUN, *arguments], stdout=write, stderr=subprocess.PIPE, text=True, timeout=600)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == (0 if "--help" in arguments else 141)  # argparse prints, and asks nobody


@pytest.fixture
def taking_interrupts():
    """Take interrupts as a terminal's programs do, also where the tests run in the background, which ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


SECONDS = (0, 0.5, 2, 5, 15)


@POSIX
@pytest.mark.parametrize("to_all", [True, False], ids=["terminal", "kill"])
@pytest.mark.parametrize("seconds", [pytest.param(s, marks=[] if s == 0.5 else pytest.mark.slow) for s in SECONDS])
def test_an_interrupt_is_silence(seconds, to_all, folder, taking_interrupts):
    """A signal while modules are imported, while kernels compile or while cases run, here or in other processes."""
    program = "print('begun', flush=True); import sys; from numba_moe.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "verify"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "begun\n"
    time.sleep(max(seconds, 0.2))  # the few modules of `cli` itself
    (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=600)  # until nobody has the pipes
    assert (process.returncode, printed) == (130, "")


def test_what_an_interrupted_import_raises_is_no_error_of_ours(taking_interrupts, monkeypatch):
    def interrupted(*_):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise AttributeError("module 'numpy' has no attribute 'ndim'") from None

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(cli, "_run", interrupted)
    assert cli.main(["info"]) == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_that_an_import_catches_is_not_lost(taking_interrupts, monkeypatch):
    def prepare(_):
        with contextlib.suppress(BaseException):  # as some modules do where something optional is absent
            signal.raise_signal(signal.SIGINT)
        return lambda: pytest.fail("went on")

    options = argparse.Namespace(prepare=prepare, command="info")
    monkeypatch.setattr(cli, "_parser", lambda _: types.SimpleNamespace(parse_args=lambda _: options))
    assert cli.main(["info"]) == 130


def test_the_cases_are_listed_and_nothing_else(capsys):
    assert cli.main(["verify", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.split(": ")[0] in verification.OPS for line in lines)
    assert len(lines) > 100
