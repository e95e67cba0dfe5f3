"""Commands over HTTP that reach all ranks of a group. The file runs itself in the processes, rank 0 with a server."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from numba_moe import reference
from numba_moe.recorder import ExpertDistributionRecorder, load
from numba_moe.recorder.all_ranks import Part, added, ranks_of

uvicorn = pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")

LAYERS, EXPERTS = 2, 8
TIMEOUT, SHORT = 30.0, 2.0  # seconds: a busy machine is no failure, and nobody waits long for a rank that is gone
NAMES = {name: f"/{name}_expert_distribution_record" for name in ("start", "stop", "dump", "status")}


def ids_of(rank, number, layer):
    return np.random.default_rng((rank, number, layer)).integers(-1, EXPERTS, (5 + rank, 2))


def count(rank, number):
    rows = (ids_of(rank, number, layer) for layer in range(LAYERS))
    return np.stack([reference.add_expert_counts(ids, counts=np.zeros(EXPERTS, np.int64)) for ids in rows])


def main(rank, ranks, folder):
    """Run the passes that lines of the standard input ask for, while rank 0 serves."""
    place = folder / "port of the store"
    while rank and not place.exists():
        time.sleep(0.02)
    store = dist.TCPStore("127.0.0.1", int(place.read_text()) if rank else 0, ranks, not rank, wait_for_workers=False)
    if not rank:
        (folder / "half").write_text(str(store.port))
        (folder / "half").rename(place)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    recorders = {
        mode: ExpertDistributionRecorder(LAYERS, EXPERTS, mode=mode, device="cpu", process_group=dist.group.WORLD)
        for mode in ("stat", "per_pass")
    }
    serve(recorders, rank, folder)
    replace = os.replace
    for line in sys.stdin:
        if line in ("fill the disk\n", "empty the disk\n"):
            os.replace = full_disk if line.startswith("fill") else replace
            print("done", flush=True)
            continue
        mode, first, passes, pause, together = json.loads(line)
        for number in range(first, first + passes):
            with recorders[mode].with_forward_pass(number):
                for layer in range(LAYERS):
                    with recorders[mode].with_current_layer(layer):
                        recorders[mode].on_select_experts(torch.from_numpy(ids_of(rank, number, layer)))
                if together:  # as layers of a model are
                    dist.all_reduce(torch.ones(1))
                time.sleep(pause)
        print("done", flush=True)


def full_disk(*_):
    raise OSError(28, "No space left on device")


def serve(recorders, rank, folder):
    from starlette.applications import Starlette
    from starlette.routing import Mount

    from numba_moe.recorder import follow, make_app

    if rank:
        for recorder in recorders.values():
            follow(recorder)
        print("ready", flush=True)
        return
    apps = [
        Mount(f"/{mode}/{seconds:g}", make_app(one, folder, timeout=seconds))
        for mode, one in recorders.items()
        for seconds in (TIMEOUT, SHORT)
    ]
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=apps), port=0, log_level="warning"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.02)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)


class Group:
    """The processes, as a test talks to them."""

    def __init__(self, ranks, folder):
        self.ranks, self.folder, self.first = ranks, folder, 0
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), str(ranks), str(folder)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        ready = [process.stdout.readline() for process in self.processes]
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{int(ready[0])}", timeout=60)

    def ask(self, name, mode="stat", timeout=TIMEOUT, **parameters):
        """Return the HTTP status, the answer, and the seconds that it took."""
        begin, path = time.monotonic(), f"/{mode}/{timeout:g}{NAMES[name]}"
        answer = self.client.get(path) if name == "status" else self.client.post(path, json=parameters)
        assert answer.text.count("\n") == 1
        return answer.status_code, answer.json(), time.monotonic() - begin

    def begin(self, passes, mode="stat", pauses=(0.0,), together=False, ranks=None):
        """Let ranks begin passes, with ids that nobody has had; return these."""
        for rank in range(self.ranks) if ranks is None else ranks:
            about = mode, self.first, passes, pauses[rank % len(pauses)], together
            print(json.dumps(about), file=self.processes[rank].stdin, flush=True)
        self.first += passes
        return range(self.first - passes, self.first)

    def wait(self, ranks=None):
        for rank in range(self.ranks) if ranks is None else ranks:
            assert self.processes[rank].stdout.readline() == "done\n"

    def run(self, passes, **options):
        numbers = self.begin(passes, **options)
        self.wait(options.get("ranks"))
        return numbers

    def total(self, number):
        return sum(count(rank, number) for rank in range(self.ranks)).tolist()

    def dumped(self, mode="stat", **parameters):
        status, answer, _ = self.ask("dump", mode, **parameters)
        assert status == 200, answer
        return load(self.folder / answer["file"])

    def close(self):
        self.client.close()
        for process in self.processes:
            with process:
                process.kill()


@pytest.fixture(scope="module", params=[pytest.param(size, marks=pytest.mark.slow) for size in (2, 4)])
def group(request, tmp_path_factory):
    group = Group(request.param, tmp_path_factory.mktemp("ranks"))
    yield group
    group.close()


@pytest.mark.parametrize("together", [True, False], ids=["collectives", "own pace"])
def test_all_ranks_switch_at_the_same_pass(group, together):
    """Every recorded pass has the counts of all ranks, also where one rank is far ahead of the others."""
    group.begin(120, pauses=(0.002, 0.006), together=together)
    time.sleep(0.1)
    _, started, _ = group.ask("start")
    time.sleep(0.1)
    _, stopped, _ = group.ask("stop")
    group.wait()
    assert started["recording"]
    assert not stopped["recording"]
    dump = group.dumped()
    numbers = list(range(started["from_pass"], stopped["from_pass"]))
    assert len(numbers) > 3
    assert dump.forward_pass_id.tolist() == numbers
    assert dump.logical_count.tolist() == [group.total(number) for number in numbers]
    by_rank = [sum(count(rank, number) for number in numbers).tolist() for rank in range(group.ranks)]
    assert dump.rank_physical_count.tolist() == by_rank


def test_dumps_beside_passes_have_each_pass_once(group):
    assert group.ask("start")[1]["from_pass"] <= group.first
    numbers = group.begin(120, pauses=(0.004, 0.002))
    answers = []
    for _ in range(4):
        answers.append(group.ask("dump"))
        time.sleep(0.05)
    group.wait()
    answers += [group.ask("dump"), group.ask("dump")]
    assert {status for status, _, _ in answers} == {200}
    assert answers[-1][1] == {"file": None}
    dumps = [load(group.folder / answer["file"]) for _, answer, _ in answers if answer["file"]]
    assert len(dumps) > 1
    assert np.concatenate([dump.forward_pass_id for dump in dumps]).tolist() == list(numbers)
    counted = np.concatenate([dump.logical_count for dump in dumps]).tolist()
    assert counted == [group.total(number) for number in numbers]


def test_each_rank_writes_its_own_records(group):
    group.ask("start", "per_pass")
    numbers = group.run(3, mode="per_pass")
    status, answer, _ = group.ask("dump", "per_pass", format="json")
    assert (status, len(answer["files"])) == (200, group.ranks)
    for rank, name in enumerate(answer["files"]):
        dump = load(group.folder / name)
        assert dump.rank == rank
        assert dump.logical_count.tolist() == [count(rank, number).tolist() for number in numbers]
    assert group.ask("stop", "per_pass")[1]["recording"] is False


def test_the_status_says_what_each_rank_does(group):
    group.ask("start")
    numbers = group.run(2)
    status, answer, _ = group.ask("status")
    assert (status, answer["recording"], answer["mode"]) == (200, True, "stat")
    assert [about["rank"] for about in answer["ranks"]] == list(range(group.ranks))
    for about in answer["ranks"]:
        assert (about["passes"], about["last_pass"], about["in_pass"], about["pending"]) == (2, numbers[-1], False, [])
    group.dumped()


def test_a_rank_that_is_late_is_named_and_nothing_is_lost(group):
    """Rank 1 has not come to the pass that others have ended, and later it has."""
    group.ask("start")
    others = [rank for rank in range(group.ranks) if rank != 1]
    (number,) = group.run(1, ranks=others)
    status, answer, seconds = group.ask("dump", timeout=SHORT)
    assert (status, answer["missing"]) == (504, [1])
    assert "rank 1 has not begun pass" in answer["error"]
    assert seconds < SHORT + 2
    group.first = number
    group.run(1, ranks=[1])
    dump = group.dumped()
    assert dump.forward_pass_id.tolist() == [number]
    assert dump.logical_count.tolist() == [group.total(number)]


def test_a_rank_that_comes_in_time_is_waited_for(group):
    others = [rank for rank in range(group.ranks) if rank != 1]
    (number,) = group.run(1, ranks=others)
    group.first = number
    threading.Timer(1.0, group.begin, (1,), {"ranks": [1]}).start()
    assert group.dumped().logical_count.tolist() == [group.total(number)]
    group.wait([1])


def test_partial_dumps_wait_for_no_pass(group):
    others = [rank for rank in range(group.ranks) if rank != 1]
    (number,) = group.run(1, ranks=others)
    dump = group.dumped(partial=True)
    assert dump.logical_count.tolist() == [sum(count(rank, number) for rank in others).tolist()]
    group.first = number
    group.run(1, ranks=[1])
    assert group.dumped().logical_count.tolist() == [count(1, number).tolist()]


def test_a_rank_that_hangs_is_named_and_may_come_back(group):
    stopped = group.processes[1]
    group.ask("start")
    numbers = group.run(1)
    stopped.send_signal(signal.SIGSTOP)
    try:
        for name in ("stop", "dump", "status"):
            status, answer, seconds = group.ask(name, timeout=SHORT)
            assert (status, answer["missing"]) == (504, [1])
            assert SHORT <= seconds < SHORT + 2
        assert [about["recording"] for about in answer["ranks"]] == [True] * (group.ranks - 1)
    finally:
        stopped.send_signal(signal.SIGCONT)
    assert [about["recording"] for about in group.ask("status")[1]["ranks"]] == [True] * group.ranks
    assert group.dumped().logical_count.tolist() == [group.total(number) for number in numbers]
    assert group.ask("stop")[0] == 200


def test_a_dump_that_fails_on_one_rank_is_no_dump(group):
    """The records of all ranks are in the next one."""
    group.ask("start", "per_pass")
    numbers = group.run(1, mode="per_pass")
    before = set(group.folder.iterdir())
    for text in ("fill", "empty"):
        print(text, "the disk", file=group.processes[1].stdin, flush=True)
        group.wait([1])
        if text == "fill":
            status, answer, _ = group.ask("dump", "per_pass")
    assert (status, answer) == (500, {"error": "the dump was not written: on rank 1: No space left on device"})
    assert set(group.folder.iterdir()) == before
    dump = group.dumped("per_pass")
    assert dump.forward_pass_id.tolist() == list(numbers)


# What one rank does, without others.


def member_of(mode="stat"):
    recorder = ExpertDistributionRecorder(1, EXPERTS, mode=mode, device="cpu")
    ranks_of(recorder)
    return recorder, recorder._member


def one_pass(recorder, number, begun=None):
    with recorder.with_forward_pass(number), recorder.with_current_layer(0):
        if begun is not None:
            begun.set()
        recorder.on_select_experts(torch.zeros(1, 1, dtype=torch.int32))


@pytest.mark.parametrize("go", [True, False, None], ids=["decided", "taken back", "leader gone"])
def test_a_pass_waits_for_a_decision_about_it(go):
    recorder, member = member_of()
    one_pass(recorder, 3)
    assert member.hear({"do": "next_switch"}) == 4
    assert member.hear({"do": "agree", "on": True, "at": 5, "seconds": 60.0 if go is not None else 0.2}) == 5
    one_pass(recorder, 4)  # it waits for nothing
    begun = threading.Event()
    thread = threading.Thread(target=one_pass, args=(recorder, 5, begun))
    thread.start()
    if go is not None:
        assert not begun.wait(0.2)
        assert member.hear({"do": "decide", "go": go})
    thread.join()
    assert bool(recorder.recording) is bool(go)
    assert member.hear({"do": "decide", "go": True}) is False  # too late
    found = recorder.dump_record("object") if go else None
    assert not go or found.forward_pass_id.tolist() == [5]


def test_a_rank_that_has_begun_the_pass_names_a_later_one():
    recorder, member = member_of()
    with recorder.with_forward_pass(7):
        assert member.hear({"do": "agree", "on": True, "at": 7, "seconds": 1.0}) == 8
        assert member.hear({"do": "agree", "on": True, "at": 9, "seconds": 1.0}) == 9
        assert member.hear({"do": "next_dump"}) == 7
    member.hear({"do": "decide", "go": True})
    assert member.hear({"do": "status"})["pending"] == [{"recording": True, "from_pass": 9}]
    assert member.hear({"do": "next_switch"}) == 9  # the switch before comes first
    for number in (8, 9, 10):
        one_pass(recorder, number)
    assert recorder.dump_record("object").forward_pass_id.tolist() == [9, 10]


def test_a_switch_takes_effect_where_ids_start_over():
    recorder, member = member_of()
    one_pass(recorder, 50)
    member.hear({"do": "agree", "on": True, "at": 99, "seconds": 1.0})
    member.hear({"do": "decide", "go": True})
    for number in (51, 0, 1):
        one_pass(recorder, number)
    assert recorder.dump_record("object").forward_pass_id.tolist() == [0, 1]


@pytest.mark.parametrize("end", ["leader gone", "taken back", "decided"])
def test_a_dump_takes_the_passes_before_one(end):
    """Those after it stay, with their map, and if the dump ends in nothing, the others too."""
    recorder, member = member_of()
    recorder.start_record()
    one_pass(recorder, 1)
    other = np.arange(EXPERTS)[None, ::-1]
    recorder.set_physical_to_logical_map(other)
    for number in (2, 3):
        one_pass(recorder, number)
    assert member.hear({"do": "take", "before": 2, "wait": True, "seconds": 0.05}) == {"passes": 1}
    assert member.held.dump.forward_pass_id.tolist() == [1]
    if end == "leader gone":
        time.sleep(0.1)
        member.look_at_clock()
        with pytest.raises(RuntimeError, match="took too long"):
            member.hear({"do": "part", "begin": 0, "seconds": 1.0})
    else:
        assert member.hear({"do": "decide", "go": end == "decided"})
    found = recorder.dump_record("object")
    assert found.forward_pass_id.tolist() == ([2, 3] if end == "decided" else [1, 2, 3])
    assert found.logical_count[-1, 0].tolist() == [0] * (EXPERTS - 1) + [1]


def test_parts_add_up_by_pass_and_map():
    recorder, member = member_of()
    recorder.start_record()
    for number in (1, 2, 2):
        one_pass(recorder, number)
    member.hear({"do": "take", "before": 3, "wait": True, "seconds": 1.0})
    dump = member.held.dump
    mine = Part(*(getattr(dump, name) for name in Part._fields))
    turned = mine._replace(physical_to_logical_maps=mine.physical_to_logical_maps[:, :, ::-1].copy())
    shorter = Part(mine[0][:1], mine[1], mine[2][:1], mine[3][:1])
    total = added([mine, turned, shorter], dump)
    assert total.forward_pass_id.tolist() == [1, 2, 2, 1, 2, 2]
    assert total.logical_count[:, 0, 0].tolist() == [2, 1, 1, 0, 0, 0]
    assert total.logical_count[:, 0, -1].tolist() == [0, 0, 0, 1, 1, 1]
    assert total.rank_physical_count[:, 0, 0].tolist() == [3, 3, 1]
    large = mine._replace(global_physical_count=np.full_like(mine.global_physical_count, 2**62))
    with pytest.raises(ValueError, match="`counts` must be small enough for their sums over ranks to fit int64"):
        added([large, large], dump)
    member.let_go(False)


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named_and_the_others_go_on(group):
    """The last test, as the rank is gone."""
    group.ask("start")
    numbers = group.run(2)
    last = group.ranks - 1
    others = list(range(last))
    group.processes[last].kill()
    group.processes[last].wait()
    for name in ("start", "stop", "dump", "status"):
        status, answer, seconds = group.ask(name, timeout=SHORT)
        assert (status, answer["missing"]) == (504, [last]), answer
        assert seconds < SHORT + 2
    numbers = [*numbers, *group.run(1, ranks=others)]
    status, answer, _ = group.ask("dump", timeout=SHORT, partial=True)
    assert (status, answer["missing"]) == (200, [last])
    counted = [sum(count(rank, number) for rank in others).tolist() for number in numbers]
    assert load(group.folder / answer["file"]).logical_count.tolist() == counted
    status, answer, _ = group.ask("stop", timeout=SHORT, partial=True)
    assert (status, answer["recording"], answer["missing"]) == (200, False, [last])
    group.run(1, ranks=others)
    assert group.ask("dump", timeout=SHORT, partial=True)[1] == {"file": None, "missing": [last]}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
