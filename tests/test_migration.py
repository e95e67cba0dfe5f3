"""Moving weights: the plan by hand and by brute force, and what processes hold after a move.

This file is also the program that those processes run: a role, a rank, the number of ranks, a folder to meet in.
"""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist

from numba_moe.placement import CorruptedWeightsError, ExpertLocation, migrate, migrate_in_chunks, plan_migration
from numba_moe.placement.migration import checksum, copies_of

PAIRS = {2: 500, 4: 500}


def one_layer(*places, **ranks):
    return [ExpertLocation.from_mapping([place], max(map(max, places)) + 1, **ranks) for place in places]


def test_plan_by_hand():
    # Three ranks of two slots: 0 1 | 0 2 | 1 3.
    old, new = one_layer([0, 1, 0, 2, 1, 3], [0, 3, 3, 2, 1, 0], num_gpus=3)
    assert plan_migration(old, new, 0).tolist() == [0, 5, 5, 3, 4, 0]
    old, new = one_layer([0, 1, 0, 2, 1, 3], [1, 0, 2, 1, 3, 1], num_gpus=3)
    assert plan_migration(old, new, 0).tolist() == [1, 0, 3, 4, 5, 4], "own slots first, then the next rank"


def test_sends_are_spread_over_replicas():
    # Ranks 0 and 1 hold expert 0, four others want it: each sends two.
    ranks = {"num_gpus": 6, "slots_per_rank": [1, 1, 2, 2, 2, 2]}
    old, new = one_layer([0, 0, 1, 2, 1, 2, 1, 2, 1, 2], [0, 0, 1, 0, 1, 0, 1, 0, 2, 0], **ranks)
    plan = plan_migration(old, new, 0)
    assert plan.tolist() == [0, 1, 2, 0, 4, 1, 6, 0, 9, 1]
    # A replica on the own node goes first, however much it sends.
    old, new = one_layer([0, 0, 1, 2, 1, 2, 1, 2, 1, 2], [0, 0, 1, 0, 1, 2, 1, 0, 1, 0], **ranks, num_nodes=2)
    assert old.node_of_slot.tolist() == [0] * 4 + [1] * 6
    old, new = one_layer([0, 1, 1, 2, 0, 2, 1, 2, 1, 2], [0, 1, 1, 2, 0, 2, 1, 0, 1, 0], **ranks, num_nodes=2)
    assert plan_migration(old, new, 0).tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 8, 4]


def test_a_rank_gets_an_expert_once_and_a_rank_without_experts_sends():
    old = ExpertLocation.from_mapping([[0, 1, 0, 1, 2, 2]], num_gpus=3)
    new = ExpertLocation.from_mapping([[2, 2, 0, 1, -1, -1]], num_gpus=3)
    plan = plan_migration(old, new, 0)
    assert plan.tolist() == [4, 4, 2, 3, -1, -1]
    assert [tuple(copy) for copy in copies_of(plan, old.rank_of_slot)] == [(2, 4, 0, [0, 1])]
    assert plan_migration(new, old, 0).tolist() == [2, 3, 2, 3, 0, 0], "no slot without an expert is read"


def random_pair(rng, num_gpus, num_layers=1):
    """Return two locations of random sizes: replicas, uneven ranks, nodes, ranks without experts in either."""
    num_experts = int(rng.integers(1, 9))
    sizes = rng.integers(1, 6, num_gpus)
    while sizes.sum() < num_experts:
        sizes[rng.integers(num_gpus)] += 1
    rank_of_slot = np.repeat(np.arange(num_gpus), sizes)
    num_nodes = int(rng.integers(1, num_gpus + 1))

    def places():
        active = rng.random(num_gpus) < 0.8
        if sizes[active].sum() < num_experts:
            active[:] = True
        slots = rng.permutation(np.flatnonzero(active[rank_of_slot]))
        place = np.full(len(rank_of_slot), -1)
        place[slots] = rng.integers(0, num_experts, len(slots))
        place[slots[:num_experts]] = np.arange(num_experts)
        return place

    old = [places() for _ in range(num_layers)]
    new = [np.where((rng.random(len(place)) < 0.3) & (place >= 0), place, -2) for place in old]
    for layer, kept in enumerate(new):
        fresh = places()
        merged = np.where((kept >= 0) & (fresh >= 0), kept, fresh)
        whole = np.isin(np.arange(num_experts), merged).all()
        new[layer] = merged if whole else fresh
    make = {"num_experts": num_experts, "num_gpus": num_gpus, "num_nodes": num_nodes, "slots_per_rank": sizes}
    return ExpertLocation.from_mapping(old, **make), ExpertLocation.from_mapping(new, **make)


@pytest.mark.slow
def test_plan_by_brute_force():
    rng = np.random.default_rng(0)
    kinds = np.zeros(5, int)
    for _ in range(2000):
        old, new = random_pair(rng, int(rng.integers(1, 7)))
        before, after = old.physical_to_logical_map[0], new.physical_to_logical_map[0]
        ranks, nodes = old.rank_of_slot, old.node_of_slot
        plan = plan_migration(old, new, 0)
        received, sends = {}, np.zeros(old.num_gpus, int)
        for slot in range(len(plan)):
            holders = [other for other in range(len(plan)) if before[other] == after[slot]]
            if after[slot] < 0:
                allowed, kind = [-1], 0
            elif slot in holders:
                allowed, kind = [slot], 1
            elif near := [other for other in holders if ranks[other] == ranks[slot]]:
                allowed, kind = near[:1], 2
            else:
                near = [other for other in holders if nodes[other] == nodes[slot]]
                allowed, kind = near or holders, 3 if near else 4
                first = (ranks[slot], after[slot]) not in received
                assert received.setdefault((ranks[slot], after[slot]), plan[slot]) == plan[slot]
                if first:
                    assert sends[ranks[plan[slot]]] == min(sends[ranks[other]] for other in allowed)
                    sends[ranks[plan[slot]]] += 1
            assert plan[slot] in allowed
            kinds[kind] += 1
        remote = [copy for copy in copies_of(plan, ranks) if copy.sender != copy.receiver]
        assert len(remote) == len(received)
    assert (kinds > 500).all()


def test_checksums():
    rng = np.random.default_rng(1)
    for size in (1, 7, 8, 9, 64, 1000):
        row = torch.from_numpy(rng.integers(0, 256, size, np.uint8))
        expected = checksum(row).item()
        words = np.zeros(-(-size // 8) * 8, np.uint8)
        words[:size] = row
        words = words.view(np.uint64)
        assert np.int64((words * np.arange(1, 2 * len(words), 2, dtype=np.uint64)).sum().view(np.int64)) == expected
        shifted = torch.empty(size + 3, dtype=torch.uint8)[3:].copy_(row)
        assert checksum(shifted).item() == expected
        for place in range(size):
            for bit in (1, 128):
                row[place] ^= bit
                assert checksum(row).item() != expected
                row[place] ^= bit


def contents(location, rank, dtypes, device="cpu"):
    """Return weights that name the layer, the slot and the expert they belong to."""
    slots = np.flatnonzero(location.rank_of_slot == rank)
    layers = []
    for layer, place in enumerate(location.physical_to_logical_map):
        rows = torch.tensor([[layer, slot, place[slot], index % 7] for slot in slots for index in range(3)])
        rows = rows.reshape(len(slots), 3, 4)
        tensors = {"a": rows.to(dtypes[0]), "b": rows[:, 1, 1].to(dtypes[1])}
        tensors["c"] = torch.cat([rows, rows], dim=2).to(dtypes[0])[:, :, :0]
        wide = torch.zeros(len(slots), 2, 3, 4, dtype=dtypes[2])
        wide[:, 1] = rows
        layers.append({name: tensor.to(device) for name, tensor in {**tensors, "d": wide}.items()})
        layers[-1]["d"] = layers[-1]["d"][:, 1]  # rows lie inside wider ones
    return layers if location.num_physical_experts % 2 else [list(layer.values()) for layer in layers]


def values(tensors):
    return list(tensors.values() if isinstance(tensors, dict) else tensors)


def move_random_pairs(rank, size, num_pairs, group=None, device="cpu"):
    """Move weights between random locations; check every slot, and how much was received."""
    rng = np.random.default_rng(size)
    received = []
    batch = dist.batch_isend_irecv

    def counted(operations):
        assert len({operation.peer for operation in operations}) == 1, "a rank has one peer at a time"
        received.extend(operation.tensor for operation in operations if operation.op is dist.irecv)
        return batch(operations)

    dist.batch_isend_irecv = counted
    for index in range(num_pairs):
        old, new = random_pair(rng, size, num_layers=3)
        dtypes = ((torch.float32, torch.uint8, torch.bfloat16), (torch.float64, torch.float16, torch.float8_e4m3fn))
        weights = contents(old, rank, dtypes[index % 2], device)
        layers = rng.permutation(3)[: rng.integers(1, 4)].tolist()
        verify = bool(rng.random() < 0.5)
        untouched = [[tensor.clone() for tensor in values(layer)] for layer in weights]
        received.clear()
        if rng.random() < 0.5:
            migrate(weights, old, new, group, layers=layers, verify=verify)
        else:
            chunk = int(rng.integers(1, 4))
            done = list(migrate_in_chunks(weights, old, new, group, layers=layers, chunk_layers=chunk, verify=verify))
            assert done == [layers[first : first + chunk] for first in range(0, len(layers), chunk)]
        everyone = [contents(old, other, dtypes[index % 2], device) for other in range(size)]
        first_slot = np.searchsorted(old.rank_of_slot, np.arange(size))
        expected_messages = 0
        for layer, tensors in enumerate(weights):
            plan = plan_migration(old, new, layer)
            copies = [c for c in copies_of(plan, old.rank_of_slot) if c.receiver == rank != c.sender]
            expected_messages += 3 * len(copies) * (2 if verify else 1) * (layer in layers)  # "c" is empty
            for tensor, before, *whole in zip(
                values(tensors), untouched[layer], *(values(w[layer]) for w in everyone), strict=True
            ):
                for local in range(len(tensor)):
                    slot = first_slot[rank] + local
                    source = plan[slot] if layer in layers else slot
                    if source < 0 or source == slot:
                        expected = before[local]
                    else:
                        holder = old.rank_of_slot[source]
                        expected = whole[holder][source - first_slot[holder]]
                        place = new.physical_to_logical_map[layer, slot]
                        assert old.physical_to_logical_map[layer, source] == place
                    assert torch.equal(tensor[local].float(), expected.float()), (index, layer, slot)
        assert len(received) == expected_messages
    dist.batch_isend_irecv = batch


class Damaged:
    """What waits for a transfer, and flips a bit of what arrived."""

    def __init__(self, works, tensor):
        self.works, self.tensor = works, tensor

    def wait(self):
        for work in self.works:
            work.wait()
        self.tensor.view(torch.uint8)[-1] ^= 16


def exchange(rank, size):
    """Return weights and two locations that take an expert of every rank to the next one."""
    old = ExpertLocation.from_mapping(np.tile(np.arange(2 * size), (4, 1)), num_gpus=size)
    new = ExpertLocation.from_mapping(np.roll(old.physical_to_logical_map, 2, axis=1), num_gpus=size)
    return contents(old, rank, (torch.float32, torch.uint8, torch.bfloat16)), old, new


def message_of(error, call):
    with pytest.raises(error) as found:
        call()
    assert found.type is error
    return str(found.value)


def assert_same(found, expected):
    for layer, (tensors, wanted) in enumerate(zip(found, expected, strict=True)):
        assert all(torch.equal(*pair) for pair in zip(tensors, wanted, strict=True)), f"layer {layer} has moved"


def faults(rank, size):
    """Check errors that one rank causes and all of them get."""
    weights, old, new = exchange(rank, size)
    batch = dist.batch_isend_irecv

    def damaging(operations):
        works = batch(operations)
        arriving = [operation.tensor for operation in operations if operation.op is dist.irecv]
        return [Damaged(works, arriving[0])] if arriving else works

    if rank == 1:
        dist.batch_isend_irecv = damaging
    chunks = migrate_in_chunks(weights, old, new, verify=True)
    found = message_of(CorruptedWeightsError, lambda: next(chunks))
    dist.batch_isend_irecv = batch
    if rank == 1:
        assert found.startswith(
            "rank 1 received other weights for slot 2 than slot 0 of rank 0 sent, in tensor 0 of layer 0; 1 of"
        )
    else:
        assert found == "ranks [1] received other weights than were sent, in layer 0"
    assert_same(weights, exchange(rank, size)[0])

    weights, old, new = exchange(rank, size)
    if rank == 1:
        weights = [[tensor.double() for tensor in layer] for layer in weights]
    found = message_of(ValueError, lambda: migrate(weights, old, new))
    rule = "of the same tensors and bytes per expert on every rank"
    assert found == f"`weights` must be {rule}, got others on ranks [1] than on rank 0"
    weights, old, new = exchange(rank, size)
    found = message_of(ValueError, lambda: migrate(weights, old, old if rank == 2 else new))
    assert found == "`new` must be the same on every rank, as `old`, got others on ranks [2] than on rank 0"
    found = message_of(ValueError, lambda: migrate(weights, old, new, verify=rank == 0))
    assert found.startswith("`layers` must be the same on every rank, as `chunk_layers` and `verify`, got others on")
    two = ExpertLocation.from_mapping([[0, 1]], num_gpus=2)
    found = message_of(ValueError, lambda: migrate([[]], two, two))
    assert found == f"`group` must be of 2 processes, the ranks of `old`, got {size}"
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2])]
    if rank < 2:
        migrate([[]], two, two, groups[0])
    else:
        found = message_of(ValueError, lambda: migrate([[]], two, two, groups[0]))
        assert found == "`group` must be a group that this process is in, got rank -1"
    assert_same(weights, exchange(rank, size)[0])
    migrate(weights, old, new, verify=True)
    assert [int(slot) for slot in weights[3][1]] == [(2 * rank - 2) % (2 * size), (2 * rank - 1) % (2 * size)]


def lose_rank_1(rank, size, how):
    """Lose rank 1 between two chunks, while the others wait for it, and print what they get."""
    weights, old, new = exchange(rank, size)
    group = dist.new_group(timeout=timedelta(seconds=4 if how == "hang" else 60))
    chunks = migrate_in_chunks(weights, old, new, group, chunk_layers=2)
    next(chunks)
    dist.barrier()
    if rank == 1:
        time.sleep(2 if how == "kill" else 12)
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    try:
        next(chunks)
    except RuntimeError as error:
        print(error)
    print(f"{time.monotonic() - begin:.1f} s", flush=True)
    os._exit(0)  # what is left of the group has nobody to say goodbye to


def main(role, rank, size, folder):
    rank, size = int(rank), int(size)
    device = f"cuda:{rank}" if role == "nccl" else "cpu"
    if role == "nccl":
        torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store", size)
    backend = "nccl" if role == "nccl" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    if role in ("pairs", "nccl"):
        move_random_pairs(rank, size, PAIRS[size], device=device)
        if size == 4:  # groups number their ranks themselves
            halves = [dist.new_group(ranks) for ranks in ([1, 3], [0, 2])]
            half = halves[0 if rank in (1, 3) else 1]
            move_random_pairs(dist.get_rank(half), 2, 20, half)
    elif role == "faults":
        faults(rank, size)
    else:
        lose_rank_1(rank, size, how=role)
    dist.destroy_process_group()


def run_processes(role, size, folder):
    """Run this file in `size` processes; return their exit statuses and what they printed."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, role]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(folder)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for rank in range(size)
    ]
    try:
        printed = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            with process:  # waits for its end
                process.kill()
    return [process.returncode for process in processes], printed


@pytest.mark.slow
@pytest.mark.parametrize("size", PAIRS)
def test_random_pairs(size, tmp_path):
    assert run_processes("pairs", size, tmp_path)[0] == [0] * size


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_random_pairs_on_gpus(tmp_path):
    assert run_processes("nccl", 2, tmp_path)[0] == [0, 0]


@pytest.mark.slow
def test_faults_of_one_rank_reach_all(tmp_path):
    assert run_processes("faults", 3, tmp_path)[0] == [0] * 3


@pytest.mark.parametrize(("how", "least", "most"), [("kill", 0, 10), ("hang", 3, 11)])
@pytest.mark.slow
def test_a_lost_process_ends_in_an_error(how, least, most, tmp_path):
    statuses, printed = run_processes(how, 3, tmp_path)
    assert statuses == [0, -signal.SIGKILL, 0]
    for rank in (0, 2):
        message, seconds = printed[rank].splitlines()
        start = (
            f"migration failed on rank {rank} in layers [2, 3]: a rank of the group is gone or late; a slot of these"
        )
        assert message.startswith(start)
        assert least < float(seconds.split()[0]) < most


def test_nothing_moves_before_the_first_step():
    old, new = one_layer([0, 1], [1, 0])
    weights = [[torch.tensor([3.0, 4.0], requires_grad=True)]]
    chunks = migrate_in_chunks(weights, old, new)
    assert weights[0][0].tolist() == [3, 4]
    assert next(chunks) == [0]
    assert weights[0][0].tolist() == [4, 3]
    assert list(chunks) == []
    migrate(weights, old, new, layers=[])
    assert weights[0][0].tolist() == [4, 3]


OLD, NEW = one_layer([0, 1, 0, 2], [1, 0, 2, 0])
OTHER = ExpertLocation.from_mapping([[0, 1, 0, 2]], num_gpus=2)
W = [[torch.zeros(4, 2)]]
BAD = {
    "no location": ((W, [[0]], NEW), {}, TypeError, "`old` must be an ExpertLocation, got list"),
    "other ranks": ((W, OLD, OTHER), {}, ValueError, "`new` must be of the same sizes, ranks and nodes, got ExpertLocation"),
    "no group": ((W, OTHER, OTHER), {}, ValueError, "`group` must be a process group, or None after init_process_group, got None"),
    "layers": ((W, OLD, NEW), {"layers": [1]}, ValueError, "`layers` must be at most num_layers - 1 = 0, got 1"),
    "layers twice": ((W, OLD, NEW), {"layers": [0, 0]}, ValueError, r"`layers` must be distinct, got \[0, 0\]"),
    "verify": ((W, OLD, NEW), {"verify": 1}, TypeError, "`verify` must be True or False, got 1"),
    "a tensor": ((W[0][0], OLD, NEW), {}, TypeError, "`weights` must be a sequence with the tensors of each layer, got Tensor"),
    "a tensor for a layer": ((W[0], OLD, NEW), {}, TypeError, "`weights` must be a mapping or a sequence of tensors for each layer, got Tensor at layer 0"),
    "arrays": (([[np.zeros((4, 2))]], OLD, NEW), {}, TypeError, "`weights` must be of torch tensors, got ndarray at layer 0, tensor 0"),
    "fewer layers": (([], OLD, NEW), {}, ValueError, "`weights` must be of 1 layers, those of `old`, got 0"),
    "fewer slots": (([{"up": torch.zeros(3, 2)}], OLD, NEW), {}, ValueError, r"`weights` must be of 4 slots, those of rank 0, got shape \(3, 2\) at layer 0, tensor up"),
    "a number": (([[torch.zeros(())]], OLD, NEW), {}, ValueError, r"`weights` must be of 4 slots, .* got shape \(\) at layer 0"),
    "transposed": (([[torch.zeros(4, 3, 2).mT]], OLD, NEW), {}, ValueError, r"`weights` must be contiguous in each slot, got strides \(6, 1, 2\) at layer 0"),
    "slots that share memory": (([[torch.zeros(9).as_strided((4, 3), (2, 1))]], OLD, NEW), {}, ValueError, r"`weights` must be of slots that share no memory, got strides \(2, 1\) at layer 0"),
    "one slot four times": (([[torch.zeros(1, 3).expand(4, 3)]], OLD, NEW), {}, ValueError, "`weights` must be of slots that share no memory"),
    "sparse": (([[torch.eye(4).to_sparse()]], OLD, NEW), {}, TypeError, "`weights` must be a tensor with memory to read, got one of layout torch.sparse_coo"),
    "conjugate": (([[torch.zeros(4, 2, dtype=torch.complex64).conj()]], OLD, NEW), {}, ValueError, "`weights` must be neither quantized"),
    "two devices": (([[W[0][0], torch.zeros(4, 2, device="meta")]], OLD, NEW), {}, ValueError, "`weights` must be all on cpu, got meta at layer 0, tensor 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    arguments, options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        migrate(*arguments, **options)


def test_bad_arguments_of_the_others():
    with pytest.raises(ValueError, match="`chunk_layers` must be at least 1, got 0"):
        migrate_in_chunks(W, OLD, NEW, chunk_layers=0)
    with pytest.raises(ValueError, match="`layers` must be at least 0, got -1"):
        plan_migration(OLD, NEW, -1)
    with pytest.raises(ValueError, match="`new` must be of the same sizes, ranks and nodes"):
        plan_migration(OLD, OTHER, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
