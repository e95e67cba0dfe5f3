"""Control of a recorder over HTTP: an ASGI app to mount in a server; it listens to nothing by itself."""

import contextlib
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numba_moe.recorder.dump_files import FORMATS
from numba_moe.runtime import checks

if TYPE_CHECKING:
    from numba_moe.recorder.control import ExpertDistributionRecorder

METHODS = ["GET", "POST"]


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
        nothing to dump. ``GET`` does the same, as it does there; ``HEAD`` and others are 405 and do nothing. Errors are
        400 for a request that cannot be followed, 500 for a file that could not be written.

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
            with contextlib.suppress(RuntimeWarning):  # that there is no mode, which `-W error` raises
                if on:
                    recorder.start_record()
                else:
                    recorder.stop_record()

    def write(format: str) -> Path | None:
        if place.resolve() != place:
            raise OSError(errno.ENOTDIR, "the directory is a link to another one now")
        with contextlib.suppress(RuntimeWarning):  # that there is nothing to dump
            found = recorder.dump_record("file", format=format, directory=place)
            return found if isinstance(found, Path) else None
        return None

    async def start(_request: Request) -> JSONResponse:
        await run_in_threadpool(switch, True)
        return JSONResponse({"recording": recorder.recording})

    async def stop(_request: Request) -> JSONResponse:
        await run_in_threadpool(switch, False)
        return JSONResponse({"recording": recorder.recording})

    async def dump(request: Request) -> JSONResponse:
        format = request.query_params.get("format", "npz")
        unknown = set(request.query_params) - {"format"}
        if format not in FORMATS or unknown:
            rule = f"the one parameter is format, one of {', '.join(FORMATS)}"
            return JSONResponse({"error": rule}, status_code=400)
        try:
            path = await run_in_threadpool(write, format)
        except OSError as error:
            return JSONResponse({"error": f"the dump was not written: {error.strerror or error}"}, status_code=500)
        return JSONResponse({"file": path and path.name})

    calls = {"start": start, "stop": stop, "dump": dump}
    routes = [Route(f"/{name}_expert_distribution_record", call, methods=METHODS) for name, call in calls.items()]
    for route in routes:
        route.methods = set(METHODS)  # without HEAD, which Starlette adds to GET
    return Starlette(routes=routes)
