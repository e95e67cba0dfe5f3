"""Counts of several processes: their sums, and who sends to whom. Runs itself in the processes of a group."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from numba_moe import reference
from numba_moe.recorder import ExpertDistributionRecorder, load, traffic_matrix

LAYERS, EXPERTS = 2, 8
# Rank 1 lacks some passes of the others, and has one of its own; in the second dump rank 2 has nothing.
PASSES = {0: [3, 4, 5], 1: [4, 6], 2: [3, 4, 5], 3: [3, 4, 5]}


def ids_of(rank, number, layer):
    return np.random.default_rng((rank, number, layer)).integers(-1, EXPERTS, (5 + rank, 2))


def count(rank, number):
    rows = (ids_of(rank, number, layer) for layer in range(LAYERS))
    return np.stack([reference.add_expert_counts(ids, counts=np.zeros(EXPERTS, np.int64)) for ids in rows])


def run_passes(recorder, rank, numbers):
    for number in numbers:
        with recorder.with_forward_pass(number):
            for layer in range(LAYERS):
                with recorder.with_current_layer(layer):
                    ids = torch.from_numpy(ids_of(rank, number, layer))
                    recorder.on_select_experts(ids.to(recorder.device))


def main(backend, ranks, rank, folder):
    """Record different passes on the ranks, and dump."""
    device = f"cuda:{rank}" if backend == "nccl" else "cpu"
    if backend == "nccl":
        torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    options = {"device": device, "process_group": dist.group.WORLD}
    recorder = ExpertDistributionRecorder(LAYERS, EXPERTS, mode="stat", **options)
    recorder.start_record()
    run_passes(recorder, rank, PASSES[rank])
    found = recorder.metrics((100,))
    print(*found.hottest_counts[:, 0].tolist(), flush=True)
    path = recorder.dump_record(directory=folder)
    assert (path is not None) == (rank == 0)
    if rank == 0:
        path.rename(f"{folder}/stat.npz")
    # As objects everywhere.
    run_passes(recorder, rank, [] if rank == 2 else [7])
    whole = recorder.dump_record(output_mode="object")
    assert whole.logical_count.tolist() == [sum(count(r, 7) for r in range(ranks) if r != 2).tolist()]

    detail = ExpertDistributionRecorder(LAYERS, EXPERTS, mode="per_pass", **options)
    detail.start_record()
    run_passes(detail, rank, [3])
    detail.dump_record(directory=folder).rename(f"{folder}/rank{rank}.npz")

    check_recurring_ids(options, rank, ranks)
    check_what_one_rank_cannot(options, rank, ranks, folder)
    if rank == ranks - 1:
        recorder.set_physical_to_logical_map(np.tile(np.arange(EXPERTS)[::-1], (LAYERS, 1)))
    run_passes(recorder, rank, [9])
    try:
        recorder.dump_record(output_mode="object")
    except ValueError as error:
        print(error)
    dist.destroy_process_group()


def counted(ids, num_slots):
    return reference.add_expert_counts(ids, counts=np.zeros(num_slots, np.int64))


def check_recurring_ids(options, rank, ranks):
    """Let ids of passes recur, on some ranks more often than on others, while maps change in between."""
    rng = np.random.default_rng(5)
    for _ in range(2):
        maps = [np.stack([rng.permutation(EXPERTS) for _ in range(LAYERS)]) for _ in range(3)]
        recorder = ExpertDistributionRecorder(LAYERS, EXPERTS, mode="stat", physical_to_logical_map=maps[0], **options)
        recorder.start_record()
        expected = {}
        for index, places in enumerate(maps):
            if index:
                recorder.set_physical_to_logical_map(places)
            for other in range(ranks):
                seen = {}
                for number in rng.integers(0, 3, rng.integers(0, 5)).tolist():
                    ids = rng.integers(0, EXPERTS, (LAYERS, 3, 2))
                    seen[number] = seen.get(number, -1) + 1
                    key = number, index, seen[number]
                    slots = np.stack([counted(rows, EXPERTS) for rows in ids])
                    expected[key] = expected.get(key, 0) + reference.logical_counts(slots, places, EXPERTS)
                    if other == rank:
                        with recorder.with_forward_pass(number):
                            for layer in range(LAYERS):
                                with recorder.with_current_layer(layer):
                                    recorder.on_select_experts(torch.from_numpy(ids[layer]).to(recorder.device))
        total = sum(expected.values())
        assert recorder.metrics((100,)).hottest_counts.tolist() == np.sort(total, axis=1)[:, ::-1].tolist()
        whole = recorder.dump_record(output_mode="object")
        about = whole.forward_pass_id.tolist(), whole.map_of_pass.tolist(), whole.logical_count.tolist()
        assert sorted(zip(*about, strict=True)) == sorted(
            (number, index, count.tolist()) for (number, index, _), count in expected.items()
        )


def check_what_one_rank_cannot(options, rank, ranks, folder):
    """See that what fails on one rank fails on all, and that all then have what they had."""
    recorder = ExpertDistributionRecorder(LAYERS, EXPERTS, mode="stat", **options)
    recorder.start_record()
    run_passes(recorder, rank, [3])
    with pytest.raises(FileNotFoundError, match="gone"):
        recorder.dump_record(directory=folder if rank else f"{folder}/gone")
    whole = recorder.dump_record(output_mode="object")
    assert whole.logical_count.tolist() == [sum(count(r, 3) for r in range(ranks)).tolist()]
    with recorder.with_forward_pass(4):
        recorder.layer_counts(0)[0, 0] += 2**62
    for call in (recorder.metrics, recorder.dump_record):
        with pytest.raises(ValueError, match="`counts` must be small enough for their sums over ranks to fit int64"):
            call()


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "ranks"), [("gloo", 4), pytest.param("nccl", 2, marks=[pytest.mark.gpu, TWO_GPUS])]
)
def test_processes(backend, ranks, tmp_path):
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, backend, str(ranks)]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    try:
        printed = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    finally:
        for process in processes:
            with process:  # waits for its end
                process.kill()
    assert [process.returncode for process in processes] == [0] * ranks
    numbers = sorted({number for rank in range(ranks) for number in PASSES[rank]})
    stat = load(tmp_path / "stat.npz")
    assert stat.forward_pass_id.tolist() == numbers
    expected = [sum(count(rank, number) for rank in range(ranks) if number in PASSES[rank]) for number in numbers]
    assert stat.logical_count.tolist() == np.stack(expected).tolist()
    assert stat.num_gpus == ranks
    of_ranks = [sum(count(rank, number) for number in PASSES[rank]) for rank in range(ranks)]
    assert stat.rank_physical_count.tolist() == np.stack(of_ranks).tolist()
    traffic = traffic_matrix(stat.rank_physical_count, ranks)
    assert traffic[1, 0].tolist() == of_ranks[0][1].reshape(ranks, -1).sum(axis=1).tolist()
    hottest = " ".join(map(str, sum(expected).max(axis=1).tolist()))
    for rank, (first, second) in enumerate(printed):
        assert first == hottest
        assert second.startswith("`physical_to_logical_map` must be the same maps")
        assert load(tmp_path / f"rank{rank}.npz").logical_count.tolist() == [count(rank, 3).tolist()]
        assert load(tmp_path / f"rank{rank}.npz").rank == rank


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
