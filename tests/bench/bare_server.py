"""The least a server can do with the same bodies: decode, encode, nothing kept.

`python -m tests.bench.bare_server ITEMS` prints where it listens, as dispatcher-server does. It
is what `server_cost.py` measures beside it.
"""

from __future__ import annotations

import asyncio
import socket
import sys

import msgspec
import uvloop
from aiohttp import web

from dispatcher.models import (
    BatchResultResponse,
    BatchWorkResponse,
    Outcome,
    WorkItem,
    WorkStatus,
)
from dispatcher.server.access import Submission
from tests.bench.server_cost import LINE


class BareServer:
    """Hands out `items` times the same line and believes every result."""

    def __init__(self, items: int) -> None:
        self._left = items
        self._next = 0

    def work(self, count: int) -> BatchWorkResponse:
        """Return the next items."""
        count = min(count, self._left)
        self._left -= count
        if not count:
            return BatchWorkResponse(WorkStatus.ALL_WORK_COMPLETE)
        first, self._next = self._next, self._next + count
        items = [
            WorkItem(first + n, LINE, max_retries=3, run="r", lease=f"{first + n}.1")
            for n in range(count)
        ]
        return BatchWorkResponse(WorkStatus.OK, items=items)

    async def get_work(self, request: web.Request) -> web.Response:
        """GET /work"""
        return _json(self.work(int(request.query.get("batch_size", "1"))))

    async def post_results(self, request: web.Request) -> web.Response:
        """POST /results"""
        body = msgspec.json.decode(await request.read(), type=Submission)
        outcomes = [Outcome.ACCEPTED] * len(body.items)
        work = self.work(body.want) if body.want else None
        return _json(BatchResultResponse(WorkStatus.OK, len(outcomes), outcomes, work))


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


async def main(items: int) -> None:
    """Serve until the process is ended."""
    server = BareServer(items)
    app = web.Application(client_max_size=64 << 20)
    app.add_routes([web.get("/work", server.get_work), web.post("/results", server.post_results)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    await web.SockSite(runner, listener, backlog=4096).start()
    print(f"bare server at http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
