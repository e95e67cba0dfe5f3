"""Counts of several processes: their sums, and who sends to whom. Runs itself in processes of a gloo group."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from numba_moe import reference
from numba_moe.recorder import ExpertDistributionRecorder, load, traffic_matrix

RANKS, LAYERS, EXPERTS = 4, 2, 8


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
                    recorder.on_select_experts(torch.from_numpy(ids_of(rank, number, layer)))


def main(rank, folder):
    """Record different passes on the ranks, and dump."""
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    group = dist.group.WORLD
    recorder = ExpertDistributionRecorder(LAYERS, EXPERTS, mode="stat", device="cpu", process_group=group)
    recorder.start_record()
    numbers = [3, 4, 5] if rank != 1 else [4, 6]  # rank 1 lacks some, and has one of its own
    run_passes(recorder, rank, numbers)
    found = recorder.metrics((100,))
    print(*found.hottest_counts[:, 0].tolist(), flush=True)
    path = recorder.dump_record(directory=folder)
    assert (path is not None) == (rank == 0)
    if rank == 0:
        path.rename(f"{folder}/stat.npz")
    # With nothing on one rank, and as objects everywhere.
    run_passes(recorder, rank, [] if rank == 2 else [7])
    whole = recorder.dump_record(output_mode="object")
    assert whole.logical_count.tolist() == [sum(count(r, 7) for r in (0, 1, 3)).tolist()]

    detail = ExpertDistributionRecorder(LAYERS, EXPERTS, mode="per_pass", device="cpu", process_group=group)
    detail.start_record()
    run_passes(detail, rank, [3])
    detail.dump_record(directory=folder).rename(f"{folder}/rank{rank}.npz")

    if rank == 3:
        recorder.set_physical_to_logical_map(np.tile(np.arange(EXPERTS)[::-1], (LAYERS, 1)))
    run_passes(recorder, rank, [9])
    try:
        recorder.dump_record(output_mode="object")
    except ValueError as error:
        print(error)
    dist.destroy_process_group()


def test_four_processes(tmp_path):
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path)]
    processes = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in range(RANKS)
    ]
    try:
        printed = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * RANKS
    passes = {3: [0, 2, 3], 4: [0, 1, 2, 3], 5: [0, 2, 3], 6: [1]}
    stat = load(tmp_path / "stat.npz")
    assert stat.forward_pass_id.tolist() == list(passes)
    expected = [sum(count(rank, number) for rank in ranks) for number, ranks in passes.items()]
    assert stat.logical_count.tolist() == np.stack(expected).tolist()
    assert stat.num_gpus == RANKS
    of_ranks = [sum(count(rank, n) for n, ranks in passes.items() if rank in ranks) for rank in range(RANKS)]
    assert stat.rank_physical_count.tolist() == np.stack(of_ranks).tolist()
    traffic = traffic_matrix(stat.rank_physical_count, RANKS)
    assert traffic[1, 2].tolist() == of_ranks[2][1].reshape(RANKS, -1).sum(axis=1).tolist()
    hottest = " ".join(map(str, sum(expected).max(axis=1).tolist()))
    for rank, (first, second) in enumerate(printed):
        assert first == hottest
        assert second.startswith("`physical_to_logical_map` must be the same maps")
        assert load(tmp_path / f"rank{rank}.npz").logical_count.tolist() == [count(rank, 3).tolist()]
        assert load(tmp_path / f"rank{rank}.npz").rank == rank


if __name__ == "__main__":
    main(int(sys.argv[2]), Path(sys.argv[1]))
