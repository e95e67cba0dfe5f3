"""The report: a page that holds everything, says what the counts say and no more, and that everybody can read."""

import base64
import contextlib
import json
import re
import shutil
import struct
import subprocess
import zlib
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from numba_moe import cli
from numba_moe.placement import balancedness, rebalance_experts
from numba_moe.recorder import ExpertDistributionRecorder, dump_files
from numba_moe.recorder import report_colours as colours
from numba_moe.recorder.report_charts import Charts, round_ticks, whole_ticks
from numba_moe.recorder.report_findings import Findings, in_bins
from numba_moe.recorder.report_page import page, style

VOID = {"meta", "image", "path", "br", "img", "link"}
SCRIPT = Path(dump_files.__file__).with_name("report.js")


class Parsed(HTMLParser):
    """The elements of a page: their names, attributes and ancestors, and the text in them."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        assert len(attributes) == len(dict(attributes)), f"an attribute is there twice: {tag} {attributes}"
        element = {"tag": tag, "inside": [parent["tag"] for parent in self.open], "text": "", **dict(attributes)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, *tags):
        return [element for element in self.elements if element["tag"] in tags]


def check_page(text):
    """Check what axe-core checks in the structure of a page; return its elements."""
    assert text.startswith("<!doctype html>\n")
    parsed = Parsed(text)
    [html] = parsed.all("html")
    assert html["lang"] == "en"
    [title] = parsed.all("title")
    [heading] = parsed.all("h1")
    assert title["text"] == heading["text"] != ""
    [viewport] = [meta["content"] for meta in parsed.all("meta") if meta.get("name") == "viewport"]
    assert viewport == "width=device-width, initial-scale=1", "and everybody may zoom"
    levels = [int(element["tag"][1]) for element in parsed.all(*(f"h{level}" for level in range(1, 7)))]
    assert all(after <= before + 1 for before, after in zip([0, *levels], levels, strict=False))
    assert (
        Counter(element["tag"] for element in parsed.all("header", "main", "footer", "nav")).most_common(1)[0][1] == 1
    )
    for element in parsed.all("p", "h1", "h2", "table", "figure", "ul", "details"):
        assert {"header", "main", "footer", "nav"} & {*element["inside"]}, "all content is in a landmark"
    names = Counter(element["id"] for element in parsed.elements if "id" in element)
    assert all(count == 1 for count in names.values())
    for link in parsed.all("a"):
        assert link["text"].strip()
        assert link["href"].startswith("data:") or link["href"][1:] in names
    for element in parsed.elements:
        if "aria-labelledby" in element:
            assert element["aria-labelledby"] in names
        if "tabindex" in element:
            assert element["tabindex"] == "0"
            assert element["role"] in ("group", "region")
            assert element["aria-label"].strip()
    for picture in parsed.all("svg"):
        assert picture.get("aria-hidden") == "true" or (picture["role"] == "img" and picture["aria-label"].strip())
    for table in parsed.all("table"):
        assert table["inside"][-1] == "div"
    names_of_landmarks = [heading["text"] for heading in parsed.all("h2")]
    names_of_landmarks += [frame["aria-label"] for frame in parsed.all("div") if frame.get("role") == "region"]
    assert max(Counter(names_of_landmarks).values()) == 1
    tables = len(parsed.all("table"))
    assert len([caption for caption in parsed.all("caption") if caption["text"].strip()]) == tables
    assert len(parsed.all("thead")) == tables
    assert all(cell["scope"] == "col" and cell["text"].strip() for cell in parsed.all("th"))
    for fold in parsed.all("details"):
        assert fold["text"].strip()
    assert len(parsed.all("summary")) == len(parsed.all("details"))
    assert all(set(figure["inside"]) >= {"main", "section"} for figure in parsed.all("figure"))
    assert len(parsed.all("figcaption")) == len(parsed.all("figure"))
    for words in ("NaN", "Infinity", ">nan", " nan", " inf<", ">None<"):
        assert words not in text, words
    data = [json.loads(script["text"]) for script in parsed.all("script") if script.get("type") == "application/json"]
    charts = {element["data-chart"] for element in parsed.elements if "data-chart" in element}
    assert charts == (set(data[0]) if data else set())
    outside = re.findall(r'(?:src|href)=(?!"data:|"#|x )|https?:|@import|url\(', text)
    assert outside == [], "nothing outside of the page is asked for"
    return parsed


def write(path, counts, num_gpus=1, **changes):
    """Write counts of passes as a dump."""
    np.savez(path, logical_count=counts)
    found = dump_files.dataclasses.replace(dump_files.load(path), num_gpus=num_gpus, **changes)
    found.save(path)
    return path


def reported(path, *arguments):
    out = path.with_suffix(".html")
    assert cli.main(["report", str(path), "--out", str(out), *arguments]) == 0
    return out.read_text()


@pytest.fixture
def dump(tmp_path):
    """Write 12 passes of 2 layers, 4 experts, 2 ranks; expert 3 of layer 1 is hot."""
    counts = np.full((12, 2, 4), 10)
    counts[:, 1, 3] = 70
    np.savez(tmp_path / "hot<b>.npz", logical_count=counts)
    return tmp_path / "hot<b>.npz"


def test_the_page_is_whole(dump, capsys):
    text = reported(dump, "--gpus", "2")
    assert capsys.readouterr().out == f"{dump.with_suffix('.html')}: 12 passes on 2 ranks\n"
    parsed = check_page(text)
    assert "<h1>hot&lt;b&gt;.npz</h1>" in text
    assert "<td>1</td><td>3</td><td>840</td><td>2.80</td>" in text  # the hottest: 70 of a mean of 25
    assert "<td>as recorded</td><td>0.813</td><td>0.625</td>" in text  # (1 + 50 / 80) / 2
    assert "Expert 3 of layer 1 is the busiest, at 2.80 times the mean." in text
    assert "Every expert was chosen at least once." in text
    for fact in ("<td>mode</td><td>stat</td>", "<td>12, ids 0 to 11</td>", "<td>2, numbers 0 to 1</td>", " UTC</td>"):
        assert fact in text
    assert {element["id"] for element in parsed.all("figure")} == {
        "map", "curve", "layer-balance", "evenness", "gpu-load", "gpu-map", "balance", "drift", "hot", "gpu-map-after"
    }  # fmt: skip


@pytest.mark.slow
def test_pictures_are_files_where_they_are_asked_for(dump):
    pytest.importorskip("matplotlib")
    folder = dump.parent / "pictures"
    folder.mkdir()
    reported(dump, "--gpus", "2", "--png", str(folder))
    names = ["balance.png", "experts.png", "ranks.png", "rebalanced.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())


@pytest.mark.slow
def test_the_page_needs_no_drawing_library(dump, without_simulator):
    program = "import sys; from numba_moe.cli import main; main(sys.argv[1:]); print('matplotlib' in sys.modules)"
    printed = without_simulator(program, "report", str(dump), "--gpus", "2", "--out", str(dump.with_suffix(".html")))
    assert printed.endswith("\nFalse\n")


def test_traffic_is_drawn_where_ranks_are_known(dump, tmp_path):
    found = dump_files.load(dump)
    sources = np.stack([found.logical_count[0], found.logical_count[1]])
    path = write(tmp_path / "two.npz", found.logical_count, 2, rank_physical_count=sources)
    text = reported(path)
    check_page(text)
    assert "Choices from rank to rank" in text
    assert '<th scope="col">to 1</th>' in text


@pytest.mark.parametrize("records", [0, 1, 3])
def test_a_report_of_nothing_says_so(records, tmp_path, capsys):
    recorder = ExpertDistributionRecorder(2, 8, mode="stat", device="cpu")
    recorder.start_record()
    for number in range(records):
        with recorder.with_forward_pass(number), recorder.with_current_layer(0):
            recorder.on_select_experts(torch.full((2, 2), -1))
    with contextlib.nullcontext() if records else pytest.warns(RuntimeWarning, match="nothing to dump"):
        recorder.dump_record(output_mode="object").save(tmp_path / "zero.npz")
    text = reported(tmp_path / "zero.npz")
    passes = {0: "0 passes", 1: "1 pass", 3: "3 passes"}[records]
    assert capsys.readouterr().out == f"{tmp_path / 'zero.html'}: nothing was counted in {passes} on 1 rank\n"
    assert check_page(text).all("figure", "script", "img") == []
    assert "Nothing was counted" in text
    assert "Hottest" not in text


def test_one_gpu_has_no_balance_and_the_page_asks_for_the_number(dump):
    text = reported(dump)
    parsed = check_page(text)
    charts = {element["id"] for element in parsed.all("figure")}
    assert charts == {"map", "curve", "evenness", "drift", "hot"}
    assert "alancedness" not in parsed.all("main")[0]["text"]
    assert "<code>numba-moe report hot&lt;b&gt;.npz --gpus N</code>" in text
    assert "does not say on how many GPUs" in text


LARGE = np.full((2, 1, 4), 2**58)
LARGE[:, :, 0] = 2**59
RNG = np.random.default_rng(0)
IDLE = np.array([1, 0, 1])[:, None] * np.array([1, 0, 1, 1, 1])[:, None, None]
INPUTS = {
    "one expert": (np.full((3, 2, 1), 7), 1),
    "one pass": (RNG.integers(0, 50, (1, 3, 8)), 4),
    "one layer": (RNG.integers(0, 50, (6, 1, 8)), 2),
    "all but nothing": (np.eye(8, dtype=int)[None, :1], 4),
    "large": (LARGE, 4),
    "an idle layer and an idle pass": (RNG.integers(1, 50, (5, 3, 8)) * IDLE, 2),
    "nothing in the first half": (RNG.integers(1, 50, (6, 2, 8)) * np.array([0, 0, 0, 1, 1, 1])[:, None, None], 4),
    "nothing in the second half": (RNG.integers(1, 50, (6, 2, 8)) * np.array([1, 1, 1, 0, 0, 0])[:, None, None], 4),
    "many layers and passes": (RNG.poisson(RNG.pareto(1, (61, 16)) * 9, (700, 61, 16)), 8),
    "an expert for each GPU": (RNG.integers(0, 50, (9, 2, 8)), 8),
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", INPUTS)
def test_every_kind_of_counts_makes_a_page(name, tmp_path):
    counts, num_gpus = INPUTS[name]
    text = reported(write(tmp_path / "counts.npz", counts, num_gpus))
    parsed = check_page(text)
    main = parsed.all("main")[0]["text"]
    assert f"{counts.sum():,}" in main
    if name == "an idle layer and an idle pass":
        assert "Nothing was counted in 1 layer; they are left out" in main
        used = counts.sum(axis=0)[[0, 2]].reshape(2, 2, 4).sum(axis=2)
        assert f"Balancedness of 2 GPUs is {(used.mean(axis=1) / used.max(axis=1)).mean():.3f}" in main
    if name.startswith("nothing in") or name == "one pass":
        assert "All numbers are in hindsight" in main
    if name == "one pass":
        assert "There is one pass, so nothing changes over time." in main
    if name == "all but nothing":
        assert "Never chosen: 7 of 8 experts" in main


@pytest.mark.slow
def test_the_largest_page_is_small(tmp_path):
    """61 layers, 256 experts, 1,000 passes."""
    rng = np.random.default_rng(1)
    base = rng.zipf(1.3, (61, 256)).clip(0, 3000) * 2.0
    few = rng.poisson(base, (8, 61, 256))
    path = write(tmp_path / "large.npz", few[rng.integers(0, 8, 1000)])
    text = reported(path, "--gpus", "32")
    check_page(text)
    assert len(text.encode()) < 2_000_000
    assert "each point is the mean of up to 5" in text


def test_axes_end_at_round_numbers():
    charts = Charts()
    for values, last in (([0.0, 1e-17], "1"), ([0.0, 0.23], "0.25"), ([3.0, 41.0], "50"), ([None, 2.0], "2")):
        text = charts.lines("line", "Line", {"a": values}, ["0", "1"], ("y", "x"))
        assert re.findall(r'<span style="top:0.00%">([^<]*)</span>', text) == [last]
        text = charts.bars("bar", "Bar", values, ["0", "1"], ("y", "x"))
        assert re.findall(r'<span style="top:0.00%">([^<]*)</span>', text) == [last]


def test_every_layer_that_is_placed_ticks(tmp_path):
    found = Findings(dump_files.load(write(tmp_path / "x.npz", RNG.integers(1, 9, (4, 3, 8)), 4)), 4)
    ticks = []
    found.placements("deepseek", lambda: ticks.append(1))
    assert len(ticks) == found.layers_to_place


def test_a_map_of_too_many_values_is_a_picture_alone():
    charts = Charts()
    assert "data-chart" in charts.heat("small", "Small", np.ones((3, 4)), "a", "b", "x")
    large = charts.heat("large", "Large", np.ones((400, 400)), "a", "b", "x")
    assert 'role="img"' in large
    assert "tabindex" not in large
    assert list(charts.data) == ["small"]


def test_counts_may_be_whole_floats(tmp_path, capsys):
    np.savez(tmp_path / "floats.npz", logical_count=np.full((2, 1, 4), 3.0))
    check_page(reported(tmp_path / "floats.npz"))
    np.savez(tmp_path / "halves.npz", logical_count=np.full((2, 1, 4), 3.5))
    assert cli.main(["report", str(tmp_path / "halves.npz"), "--out", str(tmp_path / "x.html")]) == 2
    assert "`logical_count` must be whole numbers, got 3.5" in capsys.readouterr().err


def test_names_of_files_are_text(tmp_path):
    counts = RNG.integers(1, 50, (2, 1, 4))
    path = write(tmp_path / "x.npz", counts, gatherer_key=["<img src=x onerror=1>", "</script><script>"])
    text = reported(path.rename(tmp_path / "a&b'<i>.npz"))
    parsed = check_page(text)
    assert parsed.all("img", "i") == []
    assert "&lt;img src=x onerror=1&gt;" in text
    assert len(parsed.all("script")) == 2


def test_placements_say_what_public_functions_say(tmp_path):
    rng = np.random.default_rng(3)
    base = rng.pareto(1, (2, 16))
    dump = dump_files.load(write(tmp_path / "x.npz", rng.poisson(base * 40, (20, 2, 16)), 4))
    now, *tried = Findings(dump, 4).placements("refined")
    assert [(p.name, p.slots_per_gpu) for p in tried] == [
        (name, slots) for slots in (4, 5, 6) for name in ("refined", "deepseek")
    ]
    counts = dump.logical_count.astype(float)
    first, second = counts[:10].sum(axis=0), counts[10:].sum(axis=0)
    trivial = np.tile(np.arange(16), (2, 1))
    assert now.balance == pytest.approx(balancedness(counts.sum(axis=0), trivial, 4).mean())
    assert now.held_out == pytest.approx(balancedness(second, trivial, 4).mean())
    for placement in tried[1::2]:
        size = 4 * placement.slots_per_gpu
        places = rebalance_experts(first, size, 1, 1, 4).physical_to_logical_map
        assert placement.held_out == pytest.approx(balancedness(second, places, 4).mean())
    text = page(Findings(dump, 4), "x", "", [now, *tried])
    best = next(p for p in tried if p.held_out > max(p.held_out for p in tried) - 0.01)
    assert best.slots_per_gpu > 4
    assert f"{best.name} has {best.held_out:.3f}; that takes {best.slots_per_gpu / 4 - 1:.1%} more memory" in text


def test_pairs_by_hand(tmp_path):
    recorder = ExpertDistributionRecorder(1, 4, mode="per_token", device="cpu")
    recorder.start_record()
    ids = [[0, 1]] * 6 + [[2, 3]] * 3 + [[0, 2], [1, -1]]
    with recorder.with_forward_pass(0), recorder.with_current_layer(0):
        recorder.on_select_experts(torch.tensor(ids))
    dump = recorder.dump_record(output_mode="object")
    together = Findings(dump, 1).together()
    assert (together.counted, together.recorded) == (11, 11)
    # 4 and 3 tokens of 11 chose experts 2 and 3, 7 and 7 chose 0 and 1; 0 and 2 are together less than by chance.
    assert [pair[1:4] for pair in together.pairs] == [(2, 3, 3), (0, 1, 6)]
    assert together.pairs[1].expected == pytest.approx(7 * 7 / 11) == together.pairs[1].tokens / together.ratio[1, 0]
    assert (together.ratio == together.ratio.T).all()
    assert together.ratio[1, 2] == together.ratio[0, 0] == 0
    text = page(Findings(dump, 1), "x", "")
    check_page(text)
    assert "<td>0</td><td>0</td><td>1</td><td>6</td><td>4.5</td><td>1.35</td>" in text


def test_replicas_are_listed(tmp_path):
    dump = dump_files.load(write(tmp_path / "x.npz", RNG.integers(1, 9, (2, 1, 3))))
    maps = np.array([[[0, 1, 2, 0]]])
    dump = dump_files.dataclasses.replace(dump, physical_to_logical_maps=maps).with_counts(np.full((2, 1, 4), 3))
    found = Findings(dump, 2)
    assert found.replicas.tolist() == [[2, 1, 1]]
    text = page(found, "x", "", found.placements("deepseek"))
    check_page(text)
    assert "<td>0</td><td>0</td><td>2</td><td>1.50</td><td>0.75</td>" in text


def test_counts_can_be_taken_home(dump):
    [link] = [link for link in check_page(reported(dump)).all("a") if "download" in link]
    lines = base64.b64decode(link["href"].partition(",")[2]).decode().splitlines()
    assert lines[0] == "layer_id,expert_id,count"
    assert lines[-1] == "1,3,840"
    (dump.parent / "again.csv").write_text("\n".join(lines))
    again = dump_files.load(dump.parent / "again.csv").logical_count
    assert again.tolist() == dump_files.load(dump).logical_count.sum(axis=0)[None].tolist()


# What is drawn on what, and the least contrast that WCAG 2.2 AA asks for: 4.5 of text, 3 of graphics.
IN_USE = [(text, ground, 4.5) for text in ("text", "muted", "link") for ground in ("page", "panel")]
IN_USE += [("page", "text", 4.5)]  # the label of a value
IN_USE += [(f"series-{number}", "page", 3.0) for number in range(1, 6)] + [("axis", "page", 3.0), ("link", "page", 3.0)]


def contrast(one, other):
    """Return the contrast of two colours as WCAG defines it, 1 to 21."""

    def luminance(colour):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["LIGHT", "DARK"])
def test_every_pair_of_colours_has_the_contrast_of_wcag_aa(scheme):
    known = getattr(colours, scheme)
    for drawn, ground, least in IN_USE:
        assert contrast(known[drawn], known[ground]) >= least, (drawn, ground)


def test_the_style_uses_no_other_colours():
    rules = re.sub(r":root\{[^}]*\}", "", style())
    assert re.findall(r"#[0-9a-f]{3,8}\b|rgb|hsl", rules) == []
    drawn = set(re.findall(r"(?:[^-]color|fill|stroke): *var\(--([a-z0-9-]+)\)", rules))
    grounds = set(re.findall(r"background: *var\(--([a-z0-9-]+)\)", rules))
    in_use = {(name, ground) for name, ground, _ in IN_USE}
    assert grounds == {"page", "panel", "text"}
    for name in drawn - {"page"}:
        assert (name, "page") in in_use, name
    assert {"text", "muted", "link", "series-1", "series-5"} <= drawn
    assert "prefers-color-scheme: dark" in style()


def test_colours_of_a_map_by_hand():
    values = np.array([[0.0, 0.5, 1.0], [2.0, 4.0, 400.0]])
    data = colours.png(values, colours.Scale(0.5, 4.0))
    chunks, at = {}, 8
    while at < len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        name, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(name + body)
        chunks[name], at = body, at + 12 + size
    assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (3, 2)
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(2, 4)
    assert lines[:, 1:].tolist() == [[0, 1, 86], [170, 255, 255]]
    assert len(chunks[b"PLTE"]) == 3 * 256
    assert "#" + chunks[b"PLTE"][:3].hex() == colours.NOTHING not in colours.shades(255)


def test_scales_clip_what_is_rare():
    values = np.concatenate([np.full(996, 1.0), np.full(4, 5000.0)])
    assert colours.Scale.of(values) == colours.Scale(0.5, 2.0)
    assert colours.Scale.of(np.zeros(4)) == colours.Scale(0.5, 2.0)
    assert colours.Scale.of(np.array([1e-12, 1.0, 1e9])) == colours.Scale(1 / 64, 64.0)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 61, 256, 1000, 12345])
def test_ticks_are_whole_and_few(count):
    ticks = whole_ticks(count)
    assert ticks[0] == 0
    assert ticks[-1] < count
    assert len(ticks) <= 6
    assert all(isinstance(tick, int) for tick in ticks)
    for high in (count, count / 7, count * 1e-9):
        ticks = round_ticks(high)
        assert ticks[-1] >= high * (1 - 1e-9)
        assert len(ticks) <= 8


def test_parts_of_passes_are_sums():
    values = np.arange(10)[:, None]
    assert in_bins(values, 3).tolist() == [[0 + 1 + 2], [3 + 4 + 5], [6 + 7 + 8 + 9]]
    assert in_bins(values, 40)[:, 0].tolist() == list(range(10))


PROGRAM = """
const charts = {
  map: {kind: "heat", rows: "layer", columns: "expert", unit: "x", values: [[1, 2, 3], [4, 5, 6]]},
  line: {kind: "lines", columns: "pass", labels: ["3", "4 to 5"], series: {a: [1, null]}},
  bars: {kind: "bars", columns: "GPU", labels: ["0", "1"], series: {load: [0.5, 1.5]}},
};
console.log(JSON.stringify([
  at(charts.map, 0.99, 0.6), at(charts.map, 1, 1), at(charts.map, -1, 0),
  describe(charts.map, [2, 1]), at(charts.line, 0.7, 0.5), describe(charts.line, [1, 0]),
  at(charts.bars, 0.6, 0.1), describe(charts.bars, [1, 0]), place(charts.map, [1, 0]),
  moved(charts.map, [0, 0], "ArrowDown"), moved(charts.map, [0, 0], "ArrowLeft"), moved(charts.map, [0, 0], "End"),
  moved(charts.map, [0, 0], "x"),
]));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_finds_values(tmp_path):
    subprocess.run(["node", "--check", str(SCRIPT)], check=True, capture_output=True)
    (tmp_path / "try.js").write_text(SCRIPT.read_text() + PROGRAM)
    done = subprocess.run(["node", str(tmp_path / "try.js")], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == [
        [2, 1], [2, 1], [0, 0], "layer 1, expert 2: 6 x", [1, 0], "pass 4 to 5: a not known", [1, 0],
        "GPU 1: load 1.5", [0.5, 0.25], [0, 1], [0, 0], [2, 0], None,
    ]  # fmt: skip


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
