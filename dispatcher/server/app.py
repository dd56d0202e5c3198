"""The routes: decode, one call of the service, encode. PROTOCOL.md describes them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

import msgspec
from aiohttp import web

from dispatcher.errors import BadRequestError, DispatcherError, StorageFullError
from dispatcher.models import (
    BatchResultResponse,
    HeartbeatRequest,
    Outcome,
    ReleaseItem,
    ReleaseWorkRequest,
    ReleaseWorkResponse,
    WorkStatus,
)
from dispatcher.server import access
from dispatcher.server.metrics import render_metrics
from dispatcher.service import DispatchService

SERVICE = web.AppKey("service", DispatchService)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_encode = msgspec.json.Encoder().encode


class WorkTimeout(msgspec.Struct):
    """Body of POST /work_timeout."""

    timeout: float


def make_app(service: DispatchService) -> web.Application:
    """Build the application around one run."""
    app = web.Application(client_max_size=access.BODY_BYTES)
    app[SERVICE] = service
    app.add_routes(
        [
            web.get("/work", _answered(get_work)),
            web.post("/results", _answered(post_results)),
            web.post("/release", _answered(post_release)),
            web.post("/heartbeat", _answered(post_heartbeat)),
            web.get("/status", _answered(get_status)),
            web.post("/work_timeout", _answered(post_work_timeout)),
            web.get("/metrics", get_metrics),
            web.get("/healthz", get_health),
            web.get("/", get_page),
        ]
    )
    return app


async def get_work(request: web.Request) -> web.Response:
    """GET /work?batch_size=N&worker=NAME&wait=S"""
    query = request.query
    count = access.whole_number(query.get("batch_size"), "batch_size", 1)
    wait_s = min(access.seconds(query.get("wait"), "wait", 0.0), access.MAX_WAIT_S)
    worker = access.worker_name(query.get("worker"))
    work = await request.app[SERVICE].get_work(worker, min(count, access.MAX_BATCH), wait_s)
    return _json(work)


async def post_results(request: web.Request) -> web.Response:
    """POST /results"""
    service = request.app[SERVICE]
    submission, unreadable = access.decode_submission(await request.read())
    worker = access.worker_name(submission.worker)
    work = None
    if submission.want > 0:
        want = min(submission.want, access.MAX_BATCH)
        outcomes, work = await service.exchange(submission.items, worker, want)
    else:
        outcomes = await service.submit(submission.items)
    for place in unreadable:
        outcomes.insert(place, Outcome.INVALID)
    settled = sum(o in (Outcome.ACCEPTED, Outcome.DUPLICATE) for o in outcomes)
    return _json(BatchResultResponse(WorkStatus.OK, settled, outcomes, work))


async def post_release(request: web.Request) -> web.Response:
    """POST /release"""
    body = access.decode(await request.read(), ReleaseWorkRequest)
    # Existing clients name ids alone: charged, and what was recorded is dropped.
    by_id = [ReleaseItem(work_id, steps="drop") for work_id in body.work_ids]
    released = await request.app[SERVICE].release([*by_id, *body.items])
    return _json(ReleaseWorkResponse(WorkStatus.OK, released))


async def post_heartbeat(request: web.Request) -> web.Response:
    """POST /heartbeat"""
    body = access.decode(await request.read(), HeartbeatRequest)
    if not access.worker_name(body.worker):
        raise BadRequestError('"worker" is missing')
    return _json(await request.app[SERVICE].heartbeat(body))


async def get_status(request: web.Request) -> web.Response:
    """GET /status"""
    return _json(request.app[SERVICE].status())


async def post_work_timeout(request: web.Request) -> web.Response:
    """POST /work_timeout"""
    timeout_s = access.decode(await request.read(), WorkTimeout).timeout
    if not 0 < timeout_s < float("inf"):
        raise BadRequestError('"timeout" must be seconds above 0')
    request.app[SERVICE].set_work_timeout(timeout_s)
    return _json({"status": "OK", "message": f"the work timeout is {timeout_s:g} seconds now"})


async def get_metrics(request: web.Request) -> web.Response:
    """GET /metrics"""
    body, content_type = render_metrics(request.app[SERVICE])
    return web.Response(body=body, headers={"Content-Type": content_type})


async def get_health(request: web.Request) -> web.Response:
    """GET /healthz: the process answers; with 503, it does not take work any more."""
    service = request.app[SERVICE]
    if service.failure is not None:
        return web.Response(status=503, text="stopping\n")
    return web.Response(text="ok\n")


async def get_page(request: web.Request) -> web.Response:
    """GET /"""
    page = files("dispatcher.server").joinpath("dashboard/index.html").read_bytes()
    return web.Response(
        body=page,
        content_type="text/html",
        charset="utf-8",
        headers={
            "Content-Security-Policy": (
                "default-src 'none'; connect-src 'self'; script-src 'self' 'unsafe-inline'; "
                "style-src 'self' 'unsafe-inline'"
            )
        },
    )


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(body=_encode(value), status=status, content_type="application/json")


def _answered(handler: Handler) -> Handler:
    """Answer what the project raises on purpose with a status and a sentence."""

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except BadRequestError as error:
            return _json({"status": "error", "message": str(error)}, 400)
        except StorageFullError as error:
            return _json({"status": "error", "message": str(error)}, 507)
        except DispatcherError as error:
            return _json({"status": "error", "message": str(error)}, 503)
        except web.HTTPException as error:  # the framework's own, such as a body too large
            message = error.text or error.reason
            return _json({"status": "error", "message": message}, error.status)

    return answer
