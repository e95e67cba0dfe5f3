"""The recorder on a device: captured graphs go by the flag, nothing synchronises, and what that costs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from numba_moe.recorder import (
    ExpertDistributionRecorder,
    add_expert_counts,
    coactivation,
    expert_entropy,
    logical_counts,
    traffic_matrix,
    utilization,
)

pytestmark = pytest.mark.gpu

LAYERS, EXPERTS, TOP_K = 61, 256, 8


def make(mode, **options):
    return ExpertDistributionRecorder(LAYERS, EXPERTS, mode=mode, top_k=TOP_K, **options)


def draw(num_tokens, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    scores = torch.rand((LAYERS, num_tokens, EXPERTS), device="cuda", generator=generator)
    weights, ids = scores.topk(TOP_K)
    return ids.int(), weights


def show(recorder, ids, weights=None):
    for layer in range(LAYERS):
        with recorder.with_current_layer(layer):
            recorder.on_select_experts(ids[layer], None if weights is None else weights[layer])


def counts_of(ids):
    first = torch.arange(LAYERS, device="cuda")[:, None, None] * EXPERTS
    return torch.bincount((ids + first).ravel(), minlength=LAYERS * EXPERTS).reshape(LAYERS, EXPERTS).cpu().numpy()


def capture(recorder, ids, weights=None):
    """Return a graph of the hooks, captured with recording off."""
    recorder.start_record()
    with recorder.with_forward_pass(0):
        show(recorder, ids, weights)  # compiles
    recorder.stop_record()
    recorder.reset()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        show(recorder, ids, weights)
    return graph


@pytest.mark.parametrize("mode", ["stat", "per_pass"])
def test_a_graph_captured_with_recording_off(mode):
    recorder = make(mode)
    ids, _ = draw(300)
    graph = capture(recorder, ids)
    for number, on in enumerate((True, False, True)):
        (recorder.start_record if on else recorder.stop_record)()
        with recorder.with_forward_pass(number, num_tokens=100 if number == 2 else None):
            graph.replay()
    found = recorder.dump_record(output_mode="object")
    assert found.forward_pass_id.tolist() == [0, 2]
    assert (found.logical_count == [counts_of(ids), counts_of(ids[:, :100])]).all()


def test_tokens_of_a_graph():
    recorder = make("per_token", chunk_tokens=512)
    ids, weights = draw(300)
    graph = capture(recorder, ids, weights)
    recorder.start_record()
    seen = []
    for number, num_tokens in enumerate((300, 7, None, 1000)):
        drawn = draw(300, number)
        ids.copy_(drawn[0])
        weights.copy_(drawn[1])
        with recorder.with_forward_pass(number, num_tokens):
            if num_tokens == 1000:  # as eager calls in between
                drawn = draw(1000, number)
                show(recorder, *drawn)
            else:
                graph.replay()
        seen.append([part[:, :num_tokens].cpu().numpy() for part in drawn])
    found = recorder.dump_record(output_mode="object")
    assert found.num_tokens.tolist() == [300, 7, 300, 1000]
    for record, (wanted_ids, wanted_weights) in zip(found.records(), seen, strict=True):
        assert np.array_equal(record["topk_ids_of_layer"], wanted_ids)
        assert np.array_equal(record["topk_weights_of_layer"], wanted_weights)


def resident_bytes():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) * 1024


def test_a_million_tokens(tmp_path):
    passes, num_tokens, chunk = 64, 15_625, 4096

    def draw_pass(number):
        generator = torch.Generator("cuda").manual_seed(number)
        shape = (LAYERS, num_tokens, TOP_K)
        ids = torch.randint(-1, EXPERTS, shape, dtype=torch.int32, device="cuda", generator=generator)
        return ids, torch.rand(shape, device="cuda", generator=generator)

    recorder = make("per_token", chunk_tokens=chunk, spill_directory=tmp_path)
    recorder.start_record()
    with recorder.with_forward_pass(0):
        show(recorder, *draw_pass(0))
    torch.cuda.synchronize()
    before = most = resident_bytes()
    for number in range(1, passes):
        with recorder.with_forward_pass(number):
            show(recorder, *draw_pass(number))
        most = max(most, resident_bytes())
    found = recorder.dump_record(output_mode="object")
    bytes_of_chunk = chunk * LAYERS * TOP_K * 8
    assert most - before < 8 * bytes_of_chunk < passes * num_tokens * LAYERS * TOP_K * 8 / 20
    assert found.num_tokens.tolist() == [num_tokens] * passes
    for number, record in enumerate(found.records()):
        for name, wanted in zip(("topk_ids_of_layer", "topk_weights_of_layer"), draw_pass(number), strict=True):
            assert torch.equal(torch.from_numpy(np.ascontiguousarray(record[name])).cuda(), wanted), (number, name)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("mode", ["stat", "per_pass", "per_token", "stat_approx"])
def test_nothing_synchronises(mode):
    ids, weights = draw(64)
    loads = torch.ones(EXPERTS, dtype=torch.int64, device="cuda")
    places = np.arange(EXPERTS)[None].repeat(LAYERS, axis=0)
    try:
        torch.cuda.set_sync_debug_mode("error")
        recorder = make(mode, num_gpus=8)
        recorder.start_record()
        recorder.reset()
        for number in range(20):
            if number == 10:
                recorder.set_physical_to_logical_map(places)
            with recorder.with_forward_pass(number, num_tokens=number):
                show(recorder, ids, weights)
                with recorder.with_current_layer(3):
                    recorder.on_dispatch_counts(loads)
                    recorder.on_dispatch_counts([1] * EXPERTS)
        if mode != "per_token":
            recorder.metrics((1, 15))
            coactivation(ids[0], EXPERTS)
            traffic_matrix(loads[None, None], 8)
        recorder.stop_record()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = recorder.dump_record(output_mode="object")
    if mode == "stat_approx":
        assert (found.logical_count[:, 3] == 2).all()
    else:
        assert found.logical_count.sum(axis=(1, 2)).tolist() == [number * TOP_K * LAYERS for number in range(20)]


def test_counts_pass_the_largest_int32():
    counts = torch.zeros(4, dtype=torch.int64, device="cuda")
    ids = torch.full((100_000_000,), 2, dtype=torch.int32, device="cuda")
    for _ in range(25):
        add_expert_counts(ids, counts=counts)
    assert counts.tolist() == [0, 0, 2_500_000_000, 0]


def test_sums_past_int64_are_its_largest():
    """On a device nobody looks at data, so there is no error."""
    huge = torch.full((2, 8), 2**62, dtype=torch.int64, device="cuda")
    places = torch.zeros((2, 8), dtype=torch.int64, device="cuda")
    assert logical_counts(huge, places, 2).tolist() == [[2**63 - 1, 0]] * 2
    assert traffic_matrix(huge[None], 2).tolist() == [[[2**63 - 1] * 2]] * 2
    assert utilization(huge, 2).tolist() == [1, 1]
    assert expert_entropy(huge).tolist() == [1, 1]


def test_inference_mode_is_no_obstacle():
    ids, weights = draw(300)
    for mode in ("stat", "per_pass", "per_token"):
        with torch.inference_mode():
            recorder = make(mode, chunk_tokens=128)
        recorder.start_record()
        for number in range(6):
            with torch.inference_mode(number % 2 == 0), recorder.with_forward_pass(number):
                show(recorder, ids, weights)
        assert (recorder.dump_record(output_mode="object").logical_count == counts_of(ids)).all()
