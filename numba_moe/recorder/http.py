"""Control of a recorder over HTTP: an ASGI app to mount in a server; it listens to nothing by itself."""

import errno
import hmac
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numba_moe.recorder.all_ranks import BusyError, NotLeadingError, RanksMissingError, StoreGoneError, ranks_of
from numba_moe.recorder.control import ExpertDistributionRecorder
from numba_moe.recorder.dump_files import FORMATS
from numba_moe.recorder.hooks import MODES
from numba_moe.runtime import checks, formats

if TYPE_CHECKING:
    from starlette.requests import Request

MOST_BODY = 1 << 16  # bytes
STATUS: dict[type[Exception], int]  # that answers to errors have
STATUS = {RanksMissingError: 504, BusyError: 503, NotLeadingError: 409, StoreGoneError: 503}


class RefusedError(Exception):
    """A request that is not followed, and the HTTP status that says so."""

    def __init__(self, status: int, message: str, **about: Any) -> None:
        super().__init__(message)
        self.status, self.content = status, {"error": message, **about}


def make_app(
    recorder: ExpertDistributionRecorder,
    directory: str | os.PathLike[str],
    *,
    timeout: float = 30.0,
    allow_get: bool = False,
    token: str | None = None,
) -> Any:
    """Return an ASGI app with the endpoints that SGLang's servers have.

    Parameters
    ----------
    recorder : ExpertDistributionRecorder
        What to control. If it has a process group, commands reach all ranks: serve the app of rank 0, and call this or
        `follow` on every other rank.
    directory : path
        Where dumps go, and nowhere else: a request names a format, not a place. All ranks write to this path if they
        write files of their own, as with "per_pass".
    timeout : float
        Seconds to wait for ranks: until all have answered and come to the pass, and then again for each 4 MiB of a
        rank's counts, or for its file.
    allow_get : bool
        Whether GET starts, stops and dumps as well, as in SGLang. A link or a preview of it then changes something.
    token : str, optional
        What each request must bring as ``Authorization: Bearer <token>``. By default anybody may call.

    Returns
    -------
    starlette.applications.Starlette
        Three endpoints for ``POST`` and one for ``GET``. Errors are one line of JSON, ``{"error": ...}``.

        ``/start_expert_distribution_record`` and ``/stop_expert_distribution_record`` answer ``{"recording": true}``,
        with a group ``{"recording": true, "from_pass": 7}``: this is the first pass for which it holds, on all ranks.

        ``/dump_expert_distribution_record`` with ``format``, "npz" by default, answers ``{"file": name}``, null if
        nothing was recorded, and ``{"file": name, "files": [...]}`` where each rank writes its own.

        ``/status_expert_distribution_record`` says of each rank what it records, its number of passes, the last pass,
        and the switches that wait for a later one.

        Parameters are in the query, or in a JSON object as the body. With ``partial=true`` a command leaves out ranks
        that do not answer, names them as ``missing``, and a dump takes the passes that each rank has finished.

    Raises
    ------
    ImportError
        Starlette is not there: ``pip install numba-moe[http]``.
    TypeError
        An argument of the wrong type.
    ValueError
        The directory is not there; a timeout that is not positive; an empty token.

    Notes
    -----
    The HTTP status of an error is 400 for parameters, 401 for a token, 404 and 405 for paths and methods, 409 for a
    recorder without a mode and for a rank that follows, 413 and 415 for bodies, 500 for a file that could not be
    written, 503 if another command is at work or the group's store is gone, and 504 for ranks that are gone or late,
    which ``missing`` names. After an error nothing has changed on any rank, and no record is lost, unless the error
    says that other ranks have followed. Requests run in threads, one command at a time.

    Examples
    --------
    >>> from numba_moe.recorder import ExpertDistributionRecorder
    >>> recorder = ExpertDistributionRecorder(1, 3, mode="stat", device="cpu")
    >>> app = make_app(recorder, directory=".")       # server.mount("/experts", app)
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    checks.instance("recorder", recorder, ExpertDistributionRecorder)
    place = checks.path("directory", directory).resolve()
    checks.holds("directory", "a directory", place.is_dir(), directory)
    checks.boolean("allow_get", allow_get)
    check_token("token", token)
    commands = _Commands(recorder, place, checks.seconds("timeout", timeout))

    def route(name: str, parameters: dict[str, tuple[Any, ...]], methods: set[str]) -> Any:
        follow = getattr(commands, name)

        async def answer(request: Request) -> Response:
            try:
                _check_token(request, token)
                given = await _parameters(request, parameters)
                return _line(200, await run_in_threadpool(_followed, follow, given))
            except RefusedError as error:
                return _line(error.status, error.content, {"WWW-Authenticate": "Bearer"} if error.status == 401 else {})

        found = Route(f"/{name}_expert_distribution_record", answer)
        found.methods = methods  # without HEAD, which Starlette adds to GET
        return found

    def _line(status: int, content: dict[str, Any], headers: Any = None) -> Response:
        text = json.dumps(content) + "\n"
        return Response(text, status, headers=headers, media_type="application/json")

    async def refuse(request: Request, error: Exception) -> Response:
        """Answer for paths and methods that are not there."""
        assert isinstance(error, HTTPException)
        allowed = (error.headers or {}).get("Allow")
        text = f"{request.method} does nothing here; send {allowed}" if allowed else str(error.detail)
        return _line(error.status_code, {"error": text}, error.headers)

    async def fail(_request: Request, error: Exception) -> Response:
        """Answer for a fault of ours; Starlette raises it again, for the server's log."""
        return _line(500, {"error": " ".join(f"{type(error).__name__}: {error}".splitlines())})

    changing = {"GET", "POST"} if allow_get else {"POST"}
    partial = {"partial": (False, True)}
    routes = [
        route("start", partial, changing),
        route("stop", partial, changing),
        route("dump", {"format": FORMATS, **partial}, changing),
        route("status", {}, {"GET", "HEAD"}),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: refuse, Exception: fail})
    app.router.redirect_slashes = False
    return app


def check_token(argument: str, token: Any) -> None:
    """Check what requests must bring; an error does not say what it is."""
    if not isinstance(token, str | None):
        raise TypeError(f"`{argument}` must be a str or None, got {type(token).__name__}")
    good = token is None or (token.isprintable() and bool(token))
    checks.holds(argument, "of printable characters, at least one", good, "another")


class _Commands:
    """What each endpoint does, given its parameters."""

    def __init__(self, recorder: ExpertDistributionRecorder, place: Path, timeout: float) -> None:
        self._recorder, self._place, self._timeout = recorder, place, timeout
        self._ranks = ranks_of(recorder)

    def start(self, partial: bool = False) -> dict[str, Any]:
        if self._recorder.mode is None:
            raise RefusedError(409, "nothing is recorded: the recorder's mode is None")
        return self._switch(True, partial)

    def stop(self, partial: bool = False) -> dict[str, Any]:
        return {"recording": False} if self._recorder.mode is None else self._switch(False, partial)

    def _switch(self, on: bool, partial: bool) -> dict[str, Any]:
        at, missing = self._ranks.switch(on, self._timeout, partial)
        from_pass = {"from_pass": at} if self._ranks.num_ranks > 1 else {}
        return {"recording": on, **from_pass, **_named(missing)}

    def dump(self, format: str = "npz", partial: bool = False) -> dict[str, Any]:
        if self._recorder.mode is None:
            return {"file": None}
        try:
            if self._place.resolve() != self._place:
                raise OSError(errno.ENOTDIR, "the directory is a link to another one now")
            files, missing = self._ranks.dump(format, self._place, self._timeout, partial)
        except OSError as error:
            raise RefusedError(500, f"the dump was not written: {error.strerror or error}") from error
        several = {"files": files} if self._ranks.num_ranks > 1 and self._recorder.mode not in MODES[:2] else {}
        return {"file": files[0] if files else None, **several, **_named(missing)}

    def status(self) -> dict[str, Any]:
        ranks, missing = self._ranks.status(self._timeout)
        found = {"recording": all(rank["recording"] for rank in ranks), "mode": self._recorder.mode, "ranks": ranks}
        if missing:
            raise RefusedError(504, f"no answer within {self._timeout:g} s", missing=missing, **found)
        return found


def _named(missing: list[int]) -> dict[str, list[int]]:
    return {"missing": missing} if missing else {}


def _followed(command: Callable[..., dict[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
    """Do a command; what the caller or the ranks have to do with is an answer, and what is our fault an exception."""
    try:
        return command(**given)
    except tuple(STATUS) as error:
        raise RefusedError(STATUS[type(error)], str(error), **_named(getattr(error, "ranks", []))) from error


def _check_token(request: "Request", token: str | None) -> None:
    if token is not None:
        given = [value.encode("latin-1").partition(b" ") for value in request.headers.getlist("authorization")]
        right = [hmac.compare_digest(word, token.encode()) and kind.lower() == b"bearer" for kind, _, word in given]
        if right != [True]:  # compared in a time that tells nothing of the token
            raise RefusedError(401, "the header must be there once: Authorization: Bearer <token>")


async def _parameters(request: "Request", known: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Return the parameters of the query and of the body, each at most once."""
    words = {"true": True, "false": False}
    given = [(name, words.get(text, text)) for name, text in request.query_params.multi_items()]
    given += (await _body(request)).items()
    found: dict[str, Any] = {}
    for name, value in given:
        if name not in known:
            rule = f"known are {', '.join(known)}" if known else "none is known here"
            raise RefusedError(400, f"the parameter {name!r} is unknown; {rule}")
        if name in found:
            raise RefusedError(400, f"the parameter {name!r} is there twice")
        if not any(type(value) is type(option) and value == option for option in known[name]):
            options = ", ".join(json.dumps(option).strip('"') for option in known[name])
            raise RefusedError(400, f"`{name}` must be one of {options}, got {json.dumps(value)[:99]}")
        found[name] = value
    return found


async def _body(request: "Request") -> dict[str, Any]:
    """Return the JSON object of a request, an empty one without a body."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BODY:
            raise RefusedError(413, f"the body must have at most {MOST_BODY} bytes")
    if not body.strip():
        return {}
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind != "application/json":
        raise RefusedError(415, f"the body must be application/json, got {kind}")
    try:
        found = formats.parse_json(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body must be JSON: {error}") from error
    if not isinstance(found, dict):
        raise RefusedError(400, f"the body must be a JSON object, got {type(found).__name__}")
    return found
