"""The report: a page that holds everything, and says what the counts say."""

import contextlib
import re

import numpy as np
import pytest
import torch

from numba_moe import cli
from numba_moe.recorder import ExpertDistributionRecorder, dump_files


@pytest.fixture
def dump(tmp_path):
    """Write 12 passes of 2 layers, 4 experts, 2 ranks; expert 3 of layer 1 is hot."""
    pytest.importorskip("matplotlib")
    counts = np.full((12, 2, 4), 10)
    counts[:, 1, 3] = 70
    np.savez(tmp_path / "hot<b>.npz", logical_count=counts)
    return tmp_path / "hot<b>.npz"


def test_the_page_is_whole(dump, capsys):
    out, pictures = dump.parent / "report.html", dump.parent / "pictures"
    pictures.mkdir()
    arguments = ["report", str(dump), "--out", str(out), "--gpus", "2", "--png", str(pictures)]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == f"{out}: 12 passes on 2 ranks\n"
    text = out.read_text()
    assert text.startswith("<!doctype html>")
    assert "<h1>hot&lt;b&gt;.npz</h1>" in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in re.sub(r'src="[^"]*"', "", text)
    assert "<td>1</td><td>3</td><td>840</td><td>2.80</td>" in text  # the hottest: 70 of a mean of 25
    assert "<td>as recorded</td><td>0.813</td><td>0.625</td>" in text  # (1 + 50 / 80) / 2
    assert sorted(path.name for path in pictures.iterdir()) == [
        "balance.png",
        "experts.png",
        "ranks.png",
        "rebalanced.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures.iterdir())


def test_traffic_is_drawn_where_ranks_are_known(dump, tmp_path):
    found = dump_files.load(dump)
    sources = np.stack([found.logical_count[0], found.logical_count[1]])
    dump_files.dataclasses.replace(found, num_gpus=2, rank_physical_count=sources).save(tmp_path / "two.npz")
    out = tmp_path / "report.html"
    assert cli.main(["report", str(tmp_path / "two.npz"), "--out", str(out)]) == 0
    assert "Choices from rank to rank" in out.read_text()


@pytest.mark.parametrize("records", [0, 1, 3])
def test_a_report_of_nothing_says_so(records, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    recorder = ExpertDistributionRecorder(2, 8, mode="stat", device="cpu")
    recorder.start_record()
    for number in range(records):
        with recorder.with_forward_pass(number), recorder.with_current_layer(0):
            recorder.on_select_experts(torch.full((2, 2), -1))
    with contextlib.nullcontext() if records else pytest.warns(RuntimeWarning, match="nothing to dump"):
        recorder.dump_record(output_mode="object").save(tmp_path / "zero.npz")
    out, pictures = tmp_path / "report.html", tmp_path / "pictures"
    pictures.mkdir()
    assert cli.main(["report", str(tmp_path / "zero.npz"), "--out", str(out), "--png", str(pictures)]) == 0
    passes = {0: "0 passes", 1: "1 pass", 3: "3 passes"}[records]
    assert capsys.readouterr().out == f"{out}: nothing was counted in {passes} on 1 rank\n"
    text = out.read_text()
    assert "Nothing was counted" in text
    assert "<img" not in text
    assert "Hottest" not in text
    assert list(pictures.iterdir()) == []


BAD = {
    "no dump": (["gone.npz"], "No such file"),
    "no folder": (["hot<b>.npz", "--out", "gone/x.html"], "`--out` must be in a folder"),
    "no folder for pictures": (["hot<b>.npz", "--png", "gone"], "`--png` must be in a folder"),
    "a folder": (["hot<b>.npz", "--out", "."], "`--out` must be a file, got the folder ."),
    "no name": (["hot<b>.npz", "--out", ""], "`--out` must be a file, got the folder ."),
    "no ranks": (["hot<b>.npz", "--gpus", "0"], "`--gpus` must be at least 1, got 0"),
    "another kind": (["dump.txt"], "`DUMP` must be one of 'npz', 'safetensors', 'json', 'csv', 'pt', got 'txt'"),
    "ranks": (["hot<b>.npz", "--gpus", "3"], "`--gpus` must be a divisor of the number of slots = 4, got 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name, dump, monkeypatch, capsys):
    monkeypatch.chdir(dump.parent)
    arguments, message = BAD[name]
    assert cli.main(["report", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""
    assert [path.name for path in dump.parent.iterdir()] == ["hot<b>.npz"]
