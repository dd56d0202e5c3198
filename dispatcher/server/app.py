"""The routes: decode, one call of the service, encode. docs/protocol.md describes them."""

from __future__ import annotations

import logging
import socket
import ssl
import time
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from dispatcher import steering
from dispatcher.config import MOST_SECONDS
from dispatcher.core.buckets import CALL_BOUNDS_S, Buckets
from dispatcher.errors import (
    AccessDeniedError,
    BadRequestError,
    BodyTooLargeError,
    DispatcherError,
    StorageFullError,
    UnsupportedTypeError,
)
from dispatcher.models import (
    BatchResultResponse,
    HeartbeatRequest,
    Outcome,
    ReleaseItem,
    ReleaseWorkRequest,
    StepOutcome,
    StepsResponse,
    WorkStatus,
)
from dispatcher.server import access
from dispatcher.server.access import ADMIN, STRANGER, Gate, is_for_everybody
from dispatcher.server.connections import (
    HEADER_BYTES,
    BodyTooLateError,
    ConnectionLimits,
    Connections,
)
from dispatcher.server.item_view import ItemView
from dispatcher.server.metrics import render_metrics
from dispatcher.server.overview import Overview, full_status
from dispatcher.server.page import OPEN_PAGE, PAGE, PageFiles
from dispatcher.service import DispatchService

SERVICE = web.AppKey("service", DispatchService)
GATE = web.AppKey("gate", Gate)
CONNECTIONS = web.AppKey("connections", Connections)
OVERVIEW = web.AppKey("overview", Overview)
ITEMS = web.AppKey("items", ItemView)
PAGE_FILES = web.AppKey("page_files", PageFiles)
CALL_TIMES = web.AppKey("call_times", dict[str, Buckets])
Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
Call = Callable[[DispatchService, web.BaseRequest], Awaitable[web.Response]]
_encode = msgspec.json.Encoder().encode
_NEVER_S = 1e9
_TIMED_CALLS = (
    *("/work", "/results", "/release", "/heartbeat", "/steps"),
    *("/status", "/metrics", "/overview"),
)
log = logging.getLogger(__name__)


class WorkTimeout(msgspec.Struct):
    """Body of POST /work_timeout."""

    timeout: float


class MaxFailures(msgspec.Struct):
    """Body of POST /max_failures."""

    limit: str | int | None = None
    accept: bool = False


class PauseOrder(msgspec.Struct):
    """Body of POST /pause."""

    paused: bool
    reason: str = ""


class DrainOrder(msgspec.Struct):
    """Body of POST /drain."""


def make_app(service: DispatchService, limits: ConnectionLimits | None = None) -> web.Application:
    """Build the application around one run."""
    app = web.Application()
    app[SERVICE] = service
    app[CONNECTIONS] = Connections(limits or ConnectionLimits())
    app[OVERVIEW], app[ITEMS], app[PAGE_FILES] = Overview(service), ItemView(service), PageFiles()
    app[CALL_TIMES] = {path: Buckets(CALL_BOUNDS_S) for path in _TIMED_CALLS}
    for (method, path), call in _CALLS_OF_WORKERS.items():
        app.router.add_route(method, path, _routed(call))  # not HEAD, which would take work
    app.add_routes(
        [
            web.get("/status", get_status),
            web.get("/overview", get_overview),
            web.get("/items/{line}", get_item),
            web.post("/work_timeout", post_work_timeout),
            web.post("/max_failures", post_max_failures),
            web.post("/pause", post_pause),
            web.post("/drain", post_drain),
            web.get("/metrics", get_metrics),
            web.get("/healthz", get_health),
            web.get("/", get_page),
            web.get("/page/{name}", get_page),
        ]
    )
    return app


async def listen(
    app: web.Application, gate: Gate, listener: socket.socket, tls: ssl.SSLContext | None = None
) -> web.AppRunner:
    """Accept the calls that `gate` lets through, over TLS if given, until `stop_listening`."""
    app[GATE] = gate
    connections = app[CONNECTIONS]
    http_log = logging.getLogger(f"{__name__}.http")
    http_log.addFilter(_is_not_the_clients_fault)
    runner = web.AppRunner(
        app,
        access_log=None,
        logger=http_log,
        shutdown_timeout=1.0,
        # A call that waits for work must end with its client, or it would take items for
        # nobody. What a cancelled call had decided is written all the same.
        handler_cancellation=True,
        # Times between requests are the business of connections.py.
        keepalive_timeout=_NEVER_S,
        max_line_size=HEADER_BYTES,
        max_field_size=HEADER_BYTES,
        lingering_time=connections.limits.linger_s,
    )
    await runner.setup()
    server = runner.server
    assert server is not None
    call_times = app[CALL_TIMES]
    server.request_handler = FrontDoor(
        server.request_handler, app[SERVICE], gate, connections, call_times
    )
    await connections.start(server, listener, tls)
    return runner


async def stop_listening(runner: web.AppRunner) -> None:
    """Accept no more calls and end those that wait."""
    await runner.app[CONNECTIONS].stop()
    await runner.cleanup()


class FrontDoor:
    """Every request comes through here, before it has a route and before its body is read.

    Lets in who may speak, and answers what the project raises on purpose with a sentence. It
    is no middleware because one runs only after the client was asked for its body
    (`Expect: 100-continue`), and costs more.
    """

    def __init__(
        self,
        inside: Handler,
        service: DispatchService,
        gate: Gate,
        connections: Connections,
        times: dict[str, Buckets],
    ) -> None:
        self._inside = inside
        self._service = service
        self._gate = gate
        self._connections = connections.open
        self._times = times

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        began = time.perf_counter()
        body = request.content
        is_here = body.is_eof()
        connection = self._connections.get(request.protocol)
        if connection is not None:
            connection.request_began(None if is_here else body)
        try:
            shown = request.headers.get(hdrs.AUTHORIZATION)
            role = self._gate.role(shown)
            if role is STRANGER and not is_for_everybody(request.method, request.path):
                return _unauthorized(access.WRONG_TOKEN if shown else access.NO_TOKEN)
            if not is_here and (request.content_length or 0) > access.BODY_BYTES:
                raise BodyTooLargeError(access.TOO_LARGE)
            if request.method == hdrs.METH_POST:
                headers = request.headers
                access.check_is_json(headers.get(hdrs.CONTENT_TYPE), headers.get(hdrs.ORIGIN))
            # The router also asks for a body that is held back (`Expect: 100-continue`).
            call = _CALLS_OF_WORKERS.get((request.method, request.path)) if is_here else None
            if call is not None:
                reply: web.StreamResponse = await call(self._service, request)
            else:
                reply = await self._inside(request)
            if (times := self._times.get(request.path)) is not None:
                times.observe(time.perf_counter() - began)
            return reply
        except BadRequestError as error:
            return _problem(400, str(error))
        except UnsupportedTypeError as error:
            return _closing(_problem(415, str(error)))
        except BodyTooLargeError as error:
            return _closing(_problem(413, str(error)))
        except AccessDeniedError as error:
            return _problem(403, str(error))
        except StorageFullError as error:
            return _problem(507, str(error))
        except DispatcherError as error:
            return _problem(503, str(error))
        except web.HTTPException as error:  # the framework's own, such as an unknown path
            return _http_problem(error)
        except BodyTooLateError:
            return _closing(_problem(408, "the body took too long to arrive"))
        except (HttpProcessingError, web.RequestPayloadError) as error:
            return _closing(_problem(400, f"the body cannot be read: {error}"))
        except ConnectionError:
            return _closing(_problem(400, "the client left"))  # nobody is there to read it
        except Exception:  # a defect of ours, whatever it is: the log has it, the run goes on
            log.exception("%s %s could not be answered", request.method, request.path)
            return _problem(500, "a defect of the server; its log has more")
        finally:
            if connection is not None:
                connection.request_ended()


async def get_work(service: DispatchService, request: web.BaseRequest) -> web.Response:
    """GET /work?batch_size=N&worker=NAME&wait=S"""
    query = request.query
    count = access.whole_number(query.get("batch_size"), "batch_size", 1)
    wait_s = min(access.seconds(query.get("wait"), "wait", 0.0), access.MAX_WAIT_S)
    worker = access.worker_name(query.get("worker"))
    work = await service.get_work(worker, min(count, access.MAX_BATCH), wait_s)
    return _json(work)


async def post_results(service: DispatchService, request: web.BaseRequest) -> web.Response:
    """POST /results"""
    submission, unreadable = access.decode_submission(await access.read_body(request.content))
    worker = access.worker_name(submission.worker)
    work = None
    if submission.want > 0:
        want = min(submission.want, access.MAX_BATCH)
        outcomes, work = await service.exchange(submission.items, worker, want)
    else:
        outcomes = await service.submit(submission.items)
    for place in unreadable:
        outcomes.insert(place, Outcome.INVALID)
    settled = outcomes.count(Outcome.ACCEPTED) + outcomes.count(Outcome.DUPLICATE)
    return _json(BatchResultResponse(WorkStatus.OK, settled, outcomes, work))


async def post_release(service: DispatchService, request: web.BaseRequest) -> web.Response:
    """POST /release"""
    body = access.decode(await access.read_body(request.content), ReleaseWorkRequest)
    access.check_length(body.work_ids, "work_ids", access.MAX_ITEMS)
    access.check_length(body.items, "items", access.MAX_ITEMS)
    # Existing clients name ids alone: charged, and what was recorded is dropped.
    by_id = [ReleaseItem(work_id, steps="drop") for work_id in body.work_ids]
    return _json(await service.take_back([*by_id, *body.items], body.worker or ""))


async def post_heartbeat(service: DispatchService, request: web.BaseRequest) -> web.Response:
    """POST /heartbeat"""
    body = access.decode(await access.read_body(request.content), HeartbeatRequest)
    access.check_length(body.held, "held", access.MAX_HELD)
    if not access.worker_name(body.worker):
        raise BadRequestError('"worker" is missing')
    if body.stats is not None:
        access.check_counts(body.stats)
    return _json(await service.heartbeat(body))


async def post_steps(service: DispatchService, request: web.BaseRequest) -> web.Response:
    """POST /steps"""
    steps, unreadable = access.decode_steps(await access.read_body(request.content))
    outcomes = await service.record_steps(steps)
    for place in unreadable:
        outcomes.insert(place, StepOutcome.INVALID)
    return _json(StepsResponse(WorkStatus.OK, outcomes, service.records_steps))


_CALLS_OF_WORKERS: dict[tuple[str, str], Call] = {
    ("GET", "/work"): get_work,
    ("POST", "/results"): post_results,
    ("POST", "/release"): post_release,
    ("POST", "/heartbeat"): post_heartbeat,
    ("POST", "/steps"): post_steps,
}
"""These come by the thousand a second, mostly with their body; FrontDoor spares those the router,
which costs a tenth of the rest of such a call."""


def _routed(call: Call) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        return await call(request.app[SERVICE], request)

    return handle


async def get_status(request: web.Request) -> web.Response:
    """GET /status"""
    return _json(full_status(request.app[SERVICE]))


async def get_overview(request: web.Request) -> web.Response:
    """GET /overview?since=NEXT"""
    body = request.app[OVERVIEW].reply(request.query.get("since"))
    return web.Response(body=body, content_type="application/json", headers=_NOT_KEPT)


async def get_item(request: web.Request) -> web.Response:
    """GET /items/N"""
    found = await request.app[ITEMS].look(request.match_info["line"])
    if found is None:
        return _problem(404, "the input has no such line; they are counted from 0")
    return web.Response(body=_encode(found), content_type="application/json", headers=_NOT_KEPT)


async def post_work_timeout(request: web.Request) -> web.Response:
    """POST /work_timeout"""
    _check_admin(request)
    timeout_s = access.decode(await access.read_body(request.content), WorkTimeout).timeout
    if not 0 < timeout_s <= MOST_SECONDS:
        raise BadRequestError(f'"timeout" must be seconds above 0 and at most {MOST_SECONDS:.0f}')
    service = request.app[SERVICE]
    return _done(service, steering.change_work_timeout(service, timeout_s))


async def post_max_failures(request: web.Request) -> web.Response:
    """POST /max_failures"""
    _check_admin(request)
    body = access.decode(await access.read_body(request.content), MaxFailures)
    if body.limit is None and not body.accept:
        raise BadRequestError('give "limit", as 200, "5%" or "off", or "accept": true, or both')
    limit = str(body.limit) if body.limit is not None else None
    service = request.app[SERVICE]
    try:
        said = await steering.change_failure_limit(service, limit, accept=body.accept)
    except ValueError as error:
        raise BadRequestError(f'"limit": {error}') from error
    return _done(service, said)


async def post_pause(request: web.Request) -> web.Response:
    """POST /pause"""
    _check_admin(request)
    body = access.decode(await access.read_body(request.content), PauseOrder)
    service = request.app[SERVICE]
    if body.paused:
        said = await steering.pause(service, access.reason(body.reason))
    else:
        said = await steering.resume(service)
    return _done(service, said)


async def post_drain(request: web.Request) -> web.Response:
    """POST /drain"""
    _check_admin(request)
    access.decode(await access.read_body(request.content), DrainOrder)
    service = request.app[SERVICE]
    return _done(service, await steering.drain(service))


def _done(service: DispatchService, said: str) -> web.Response:
    """Answer who told the run something: what came of it, and how the run is now."""
    return _json({"status": "OK", "message": said, "state": service.state})


def _check_admin(request: web.Request) -> None:
    if request.app[GATE].role(request.headers.get(hdrs.AUTHORIZATION)) is not ADMIN:
        raise AccessDeniedError(access.NOT_ADMIN)


async def get_metrics(request: web.Request) -> web.Response:
    """GET /metrics"""
    call_times = request.app[CALL_TIMES]
    connections = len(request.app[CONNECTIONS])
    body, content_type = render_metrics(request.app[SERVICE], connections, call_times)
    return web.Response(body=body, headers={"Content-Type": content_type})


async def get_health(request: web.Request) -> web.Response:
    """GET /healthz: the process answers; with 503, it does not take work any more."""
    service = request.app[SERVICE]
    if service.failure is not None or service.is_draining:
        return web.Response(status=503, text="stopping\n")
    return web.Response(text="ok\n")


async def get_page(request: web.Request) -> web.Response:
    """GET /, GET /page/NAME"""
    page = OPEN_PAGE if request.app[GATE].is_open else PAGE
    return request.app[PAGE_FILES].reply(request, request.match_info.get("name", page))


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(body=_encode(value), status=status, content_type="application/json")


_NOT_KEPT = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


def _http_problem(error: web.HTTPException) -> web.Response:
    hint = "docs/protocol.md has every call of this server"
    reply = _problem(error.status, f"{error.reason}: {hint}")
    if "Allow" in error.headers:
        reply.headers["Allow"] = error.headers["Allow"]
    return reply


def _unauthorized(message: str) -> web.Response:
    reply = _problem(401, message)
    reply.headers[hdrs.WWW_AUTHENTICATE] = "Bearer"
    return _closing(reply)


def _problem(status: int, message: str) -> web.Response:
    return _json({"status": "error", "message": message}, status)


def _closing(reply: web.Response) -> web.Response:
    """Hang up after this reply: what else the client sends is not read as another request."""
    reply.force_close()
    return reply


def _is_not_the_clients_fault(record: logging.LogRecord) -> bool:
    # A malformed request is answered 400. Its log entry would quote it, tokens included, and let
    # anybody who reaches the port fill the disk.
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError | web.RequestPayloadError)
