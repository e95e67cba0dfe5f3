"""What Prometheus and TensorBoard are told is what was counted, through dumps, resets and rebalances."""

import threading

import numpy as np
import pytest
import torch

from numba_moe import reference
from numba_moe.recorder import ExpertDistributionRecorder, PrometheusExport, TensorBoardExport

LAYERS, EXPERTS = 2, 5
MAPS = [np.array([[0, 1, 2, 3, 4, 0]] * LAYERS), np.array([[4, 3, 2, 1, 0, 0]] * LAYERS)]


def make(**options):
    options = {"mode": "stat", "physical_to_logical_map": MAPS[0], "num_gpus": 2, **options}
    return ExpertDistributionRecorder(LAYERS, EXPERTS, device="cpu", **options)


def run(recorder, seed):
    """Record a pass, and return the counts of its slots [L, P]."""
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, 6, (LAYERS, 9, 2)))
    with recorder.with_forward_pass(seed):
        for layer in range(LAYERS):
            with recorder.with_current_layer(layer):
                recorder.on_select_experts(ids[layer])
    return np.stack([np.bincount(rows.ravel(), minlength=6) for rows in ids.numpy()])


def logical(counts, places):
    return np.stack([np.bincount(places[layer], counts[layer], EXPERTS) for layer in range(LAYERS)]).astype(int)


def scraped(registry):
    return {(s.name, *s.labels.values()): s.value for family in registry.collect() for s in family.samples}


def test_prometheus():
    client = pytest.importorskip("prometheus_client")
    recorder, registry = make(), client.CollectorRegistry()
    run(recorder, 0)  # is not recorded
    export = PrometheusExport(recorder, registry)
    total = np.zeros((LAYERS, EXPERTS), int)
    with recorder.recording():
        for seed in range(4):
            slots = run(recorder, seed)
            total += logical(slots, MAPS[seed >= 2])
            if seed == 0:
                recorder.reset()
            if seed == 1:
                recorder.set_physical_to_logical_map(MAPS[1])
                recorder.dump_record("object")
    found = scraped(registry)
    assert found["numba_moe_passes_total",] == 4
    balance, entropy = reference.utilization(slots, 2), reference.expert_entropy(total)
    for layer in range(LAYERS):
        label = str(layer)
        assert found["numba_moe_slots_total", label] == 4 * 18
        assert found["numba_moe_balancedness", label] == balance[layer]
        assert found["numba_moe_entropy", label] == entropy[layer]
        assert found["numba_moe_busiest_expert", label] == total[layer].argmax()
        assert found["numba_moe_busiest_expert_load", label] == total[layer].max() / total[layer].mean()
        for expert in range(EXPERTS):
            assert found["numba_moe_expert_slots_total", label, str(expert)] == total[layer, expert]
    text = client.generate_latest(registry).decode()
    assert f'numba_moe_expert_slots_total{{expert="3",layer="1"}} {float(total[1, 3])}' in text
    export.close()
    export.close()
    assert scraped(registry) == {}
    assert recorder.after_pass == []


def test_prometheus_has_a_bounded_number_of_series():
    client = pytest.importorskip("prometheus_client")
    recorder = make()
    for options, wanted in (
        ({"max_series": 10}, 10),
        ({"max_series": 9}, 0),
        ({"layers": [1]}, 5),
        ({"layers": [0, 1], "experts": [4, 2], "max_series": 4}, 4),
    ):
        registry = client.CollectorRegistry()
        export = PrometheusExport(recorder, registry, **options)
        assert sum(key[0] == "numba_moe_expert_slots_total" for key in scraped(registry)) == wanted
        export.close()
    registry = client.CollectorRegistry()
    for options, text in (
        ({"max_series": 1}, "`max_series` must be at least 2"),
        ({"max_series": 9, "layers": [0, 1]}, "`max_series` must be at least 10"),
        ({"experts": [5]}, "`experts` must be"),
    ):
        with pytest.raises(ValueError, match=text):
            PrometheusExport(recorder, registry, **options)
    with pytest.raises(ValueError, match="`recorder` must be of a mode that counts"):
        PrometheusExport(make(mode="per_token"), registry)
    PrometheusExport(recorder, registry)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        PrometheusExport(recorder, registry)
    assert len(recorder.after_pass) == 1


def test_prometheus_while_passes_run():
    client = pytest.importorskip("prometheus_client")
    recorder, registry = make(), client.CollectorRegistry()
    PrometheusExport(recorder, registry)
    seen, done = [], threading.Event()

    def scrape():
        while not done.is_set():
            seen.append(scraped(registry))

    thread = threading.Thread(target=scrape)
    thread.start()
    with recorder.recording():
        for seed in range(50):
            run(recorder, seed)
    done.set()
    thread.join()
    for found in [*seen, scraped(registry)]:
        assert found["numba_moe_slots_total", "0"] == 18 * found["numba_moe_passes_total",]
    assert scraped(registry)["numba_moe_passes_total",] == 50


class Writer:
    """Keeps what a SummaryWriter would write."""

    def __init__(self):
        self.scalars, self.histograms = {}, {}

    def add_scalar(self, tag, value, global_step=None):
        assert isinstance(value, float)
        self.scalars[tag, global_step] = value

    def add_histogram(self, tag, values, global_step=None):
        self.histograms[tag, global_step] = values.tolist()


def test_tensorboard():
    recorder, writer = make(mode="per_pass"), Writer()
    export = TensorBoardExport(recorder, writer, every=2, max_layers=1, prefix="moe")
    with recorder.recording():
        slots = [run(recorder, seed) for seed in range(5)]
    assert {step for _, step in writer.scalars} == {2, 4}
    for step in (2, 4):
        counts = sum(logical(part, MAPS[0]) for part in slots[step - 2 : step])
        assert writer.histograms["moe/layer_0/slots", step] == counts[0].tolist()
        assert writer.scalars["moe/entropy", step] == reference.expert_entropy(counts).mean()
        assert writer.scalars["moe/layer_0/entropy", step] == reference.expert_entropy(counts)[0]
        balance = reference.utilization(slots[step - 1], 2)
        assert writer.scalars["moe/balancedness", step] == balance.mean()
        assert writer.scalars["moe/layer_0/busiest_load", step] == counts[0].max() / counts[0].mean()
    assert not any("layer_1" in tag for tag, _ in writer.scalars)
    export.write()
    export.write()
    assert writer.histograms["moe/layer_0/slots", 5] == logical(slots[4], MAPS[0])[0].tolist()
    export.close()
    assert recorder.after_pass == []


def test_tensorboards_own_writer(tmp_path):
    tensorboard = pytest.importorskip(
        "torch.utils.tensorboard", reason="tensorboard is not there", exc_type=ImportError
    )
    recorder = make()
    with tensorboard.SummaryWriter(str(tmp_path)) as writer, recorder.recording():
        TensorBoardExport(recorder, writer, every=1)
        run(recorder, 0)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 100


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"every": 0}, ValueError, "`every` must be at least 1"),
        ({"every": 1.5}, TypeError, "`every` must be an integer"),
        ({"writer": object()}, TypeError, "`writer` must be an object with add_scalar, got object"),
    ],
)
def test_what_tensorboard_cannot_be_told(options, error, text):
    recorder = make()
    options = {"writer": Writer(), **options}
    with pytest.raises(error, match=text):
        TensorBoardExport(recorder, options.pop("writer"), **options)
    assert recorder.after_pass == []
