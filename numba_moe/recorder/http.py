"""Control of a recorder over HTTP: an ASGI app to mount in a server; it listens to nothing by itself."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numba_moe.recorder.files import FORMATS
from numba_moe.runtime import checks

if TYPE_CHECKING:
    from numba_moe.recorder.control import ExpertDistributionRecorder


def make_app(recorder: "ExpertDistributionRecorder", directory: str | os.PathLike[str]) -> Any:
    """Return an ASGI app with the endpoints that SGLang's servers have.

    Parameters
    ----------
    recorder : ExpertDistributionRecorder
        What to control. Requests run in threads and take effect between passes, one at a time.
    directory : path
        Where dumps go, and nowhere else: a request names a format, not a place.

    Returns
    -------
    starlette.applications.Starlette
        ``POST /start_expert_distribution_record``, ``POST /stop_expert_distribution_record`` and
        ``POST /dump_expert_distribution_record?format=npz``, which answers with the name of the file, null if there is
        nothing to dump. ``GET`` does the same, as it does there. Errors are 400 for a request that cannot be
        followed, 500 for a file that could not be written.

    Raises
    ------
    ImportError
        Starlette is not there: ``pip install numba-moe[http]``.
    ValueError
        The directory is not there.

    Notes
    -----
    Who may call is the server's business. A recorder that sums over ranks must be dumped on all of them together.

    Examples
    --------
    >>> from numba_moe.recorder import ExpertDistributionRecorder
    >>> recorder = ExpertDistributionRecorder(1, 3, mode="stat", device="cpu")
    >>> app = make_app(recorder, directory=".")       # server.mount("/experts", app)
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    place = Path(directory).resolve()
    checks.holds("directory", "a directory", place.is_dir(), directory)

    def switch(on: bool) -> None:
        if recorder.recording != on:
            if on:
                recorder.start_record()
            else:
                recorder.stop_record()

    async def start(request: Request) -> JSONResponse:
        await run_in_threadpool(switch, True)
        return JSONResponse({"recording": recorder.recording})

    async def stop(request: Request) -> JSONResponse:
        await run_in_threadpool(switch, False)
        return JSONResponse({"recording": recorder.recording})

    async def dump(request: Request) -> JSONResponse:
        format = request.query_params.get("format", "npz")
        unknown = set(request.query_params) - {"format"}
        if format not in FORMATS or unknown:
            rule = f"the one parameter is format, one of {', '.join(FORMATS)}"
            return JSONResponse({"error": rule}, status_code=400)
        try:
            path = await run_in_threadpool(recorder.dump_record, "file", format=format, directory=place)
        except OSError as error:
            return JSONResponse({"error": f"the dump was not written: {error.strerror}"}, status_code=500)
        return JSONResponse({"file": path.name if isinstance(path, Path) else None})

    methods = ["GET", "POST"]
    calls = {"start": start, "stop": stop, "dump": dump}
    return Starlette(
        routes=[Route(f"/{name}_expert_distribution_record", call, methods=methods) for name, call in calls.items()]
    )
