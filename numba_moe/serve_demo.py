"""Serve a recorder on a tiny model of random weights, to try how it is controlled over HTTP; it runs on the CPU."""

import argparse
import functools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

MOST_RANKS = 16
SIZES: dict[str, Any] = {"layers": 2, "hidden": 32, "heads": 2, "experts": 8, "top_k": 2, "width": 32, "length": 32}


def prepare(options: argparse.Namespace) -> Callable[[], int]:
    """Check everything and take the port; return what serves."""
    from numba_moe.recorder.http import check_token
    from numba_moe.runtime import checks

    checks.installed("the server", "http", "starlette", "uvicorn")
    checks.integer("--port", options.port, 0, 65535)
    checks.integer("--ranks", options.ranks, 1, MOST_RANKS)
    for name in ("seconds", "timeout"):
        checks.seconds(f"--{name}", getattr(options, name))
    check_token("--token", options.token)
    is_place = options.directory.is_dir() and os.access(options.directory, os.W_OK)
    checks.holds("--directory", "a folder that can be written", is_place, options.directory)
    checks.holds("--host", "a name or an address", bool(options.host), "none")  # which would be all addresses
    try:
        family, *_, place = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(place[:2], family=family)  # what comes before the server waits for it
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        what = f"`--host` and `--port` must be free, got {options.host}:{options.port} ({why})"
        raise ValueError(what) from error
    return functools.partial(serve, options, listening)


def serve(options: argparse.Namespace, listening: socket.socket) -> int:
    """Run the model on all ranks, and the server on this one, until a signal; return the exit status."""
    import torch.distributed as dist
    import uvicorn

    from numba_moe.recorder import make_app

    begin, children, store, ended = time.time(), [], None, threading.Event()
    model = None
    try:
        if options.ranks > 1:
            store = dist.TCPStore("127.0.0.1", 0, options.ranks, True, wait_for_workers=False)  # type: ignore[attr-defined]
            for rank in range(1, options.ranks):
                words = [str(word) for word in (rank, options.ranks, store.port, begin, options.seconds)]
                command = [sys.executable, "-m", "numba_moe.serve_demo", *words]
                children.append(subprocess.Popen(command, stdin=subprocess.PIPE))
        recorder = _recorder(0, options.ranks, store)
        app = make_app(
            recorder, options.directory, timeout=options.timeout, allow_get=options.allow_get, token=options.token
        )
        model = threading.Thread(target=_run_model, args=(recorder, begin, options.seconds, ended), daemon=True)
        model.start()
        for rank, child in enumerate(children, 1):
            print(f"rank {rank} is process {child.pid}")
        host, port = listening.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(f"http://{host}:{port}/status_expert_distribution_record", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
        return 0
    finally:
        ended.set()
        if model is not None:
            model.join()
        for child in children:
            with child:
                child.terminate()


def _recorder(rank: int, ranks: int, store: Any) -> Any:
    import torch.distributed as dist

    from numba_moe.recorder import ExpertDistributionRecorder

    if ranks > 1:
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    group = dist.group.WORLD if ranks > 1 else None
    return ExpertDistributionRecorder(SIZES["layers"], SIZES["experts"], mode="stat", device="cpu", process_group=group)


def _run_model(recorder: Any, begin: float, seconds: float, ended: threading.Event) -> None:
    """Run a pass after the other. The clock says their ids, so that ranks keep step, and go on when one is gone."""
    import torch

    from numba_moe.block import Router
    from numba_moe.tiny import Settings, TinyModel, batches

    torch.set_num_threads(1)
    settings = Settings(**SIZES, batch=2, steps=sys.maxsize, seed=recorder.rank)
    model = TinyModel(settings)

    def count(layer: int, routed: Any) -> None:
        with recorder.with_current_layer(layer):
            recorder.on_select_experts(routed.topk_ids)

    for layer, router in enumerate(module for module in model.modules() if isinstance(module, Router)):
        router.register_forward_hook(lambda _router, _given, routed, layer=layer: count(layer, routed))
    last = -1
    for passages in batches(settings, "cpu"):
        number = max(int((time.time() - begin) / seconds), last + 1)
        if ended.wait(max(begin + number * seconds - time.time(), 0.0)):
            return
        with torch.no_grad(), recorder.with_forward_pass(number):
            model(passages[:, :-1])
        last = number


def _follow(rank: str, ranks: str, port: str, begin: str, seconds: str) -> None:
    """Be one of the other ranks, for as long as the first one is there."""
    import torch.distributed as dist

    from numba_moe.recorder import follow

    def end_with_parent() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    store = dist.TCPStore("127.0.0.1", int(port), int(ranks), False, wait_for_workers=False)  # type: ignore[attr-defined]
    recorder = _recorder(int(rank), int(ranks), store)
    follow(recorder)
    _run_model(recorder, float(begin), float(seconds), threading.Event())


if __name__ == "__main__":
    _follow(*sys.argv[1:])
