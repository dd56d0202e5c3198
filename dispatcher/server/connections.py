"""Limits on connections: how many, and how long each may take to say what it wants.

    accepted --> HEADER --it is whole--> BUSY --answered--> IDLE --first byte--> HEADER
    closed after header_s      408 after body_s       closed after idle_s

A `Connection` stands between the socket and aiohttp's protocol and sees the bytes come; that a
request has begun and that it is answered it hears from app.py. No request sets a timer: one task
looks at all connections now and then.
"""

from __future__ import annotations

import asyncio
import resource
import socket
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import cast

from aiohttp import StreamReader, web

HEADER_BYTES = 8190
"""Longest line of a request's header."""
_ALL_HEADERS_BYTES = 2 << 20
"""All lines together; far above what reading ahead takes in before a request has begun."""
_HEADER, _BUSY, _IDLE = range(3)
_LOOKS_PER_LIMIT = 8
_LONGEST_PAUSE_S = 1.0
_FILES_BESIDE = 128
"""Descriptors kept for the journal, the input, the output and whatever libraries open."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """At most so many connections; seconds for a request's header, its body, and between two.

    `linger_s` is how long the rest of a body that nobody wants is read and dropped, so that its
    sender sees the answer and not a reset connection.
    """

    max_connections: int = 8192
    header_s: float = 30.0
    body_s: float = 120.0
    idle_s: float = 75.0
    linger_s: float = 1.0


class BodyTooLateError(TimeoutError):
    """Raised where a handler reads a body that did not arrive in time."""


class Connection(asyncio.Protocol):
    """One connection: passes everything on to aiohttp's protocol, and knows its deadline."""

    __slots__ = (
        "_body",
        "_clock",
        "_connections",
        "_deadline",
        "_header_bytes",
        "_inner",
        "_limits",
        "_state",
        "_transport",
        "_unsent",
    )

    def __init__(self, inner: web.RequestHandler, connections: Connections) -> None:
        self._inner = inner
        self._connections = connections
        self._limits = connections.limits
        self._clock = connections.clock
        self._transport: asyncio.Transport | None = None
        self._body: StreamReader | None = None
        self._state = _HEADER
        self._header_bytes = 0
        self._unsent = 0
        self._deadline = inf

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for the first request, or hang up when there are too many connections."""
        self._transport = cast(asyncio.Transport, transport)
        if not self._connections.add(self._inner, self):
            self._transport.abort()
            self._transport = None
            return
        self._deadline = self._clock() + self._limits.header_s
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Pass bytes on; the first ones after an answer begin the next request's header."""
        if self._state != _BUSY:
            if self._state == _IDLE:
                self._state = _HEADER
                self._header_bytes = 0
                self._deadline = self._clock() + self._limits.header_s
            self._header_bytes += len(data)
            if self._header_bytes > _ALL_HEADERS_BYTES and self._transport is not None:
                self._transport.abort()  # not every version of aiohttp ends that
                return
        try:
            self._inner.data_received(data)
        except ValueError:  # what some versions of aiohttp raise for a URL that is none
            if self._transport is not None:
                self._transport.abort()

    def eof_received(self) -> bool | None:
        """Pass it on."""
        self._inner.eof_received()
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass it on, unless it was never taken in."""
        if self._transport is not None:
            self._connections.remove(self._inner)
            self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        """Pass it on."""
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        """Pass it on."""
        self._inner.resume_writing()

    def request_began(self, body: StreamReader | None) -> None:
        """A request's header is whole. Its body, if not all here, has a time to arrive in."""
        self._state = _BUSY
        if body is None:
            self._deadline = inf
        else:
            self._body = body
            self._deadline = self._clock() + self._limits.body_s

    def request_ended(self) -> None:
        """The request has its answer; the next one may come, after what is left of its body."""
        if self._body is None or self._body.is_eof():
            self._state = _IDLE
        self._body = None
        self._deadline = self._clock() + self._limits.idle_s

    def look(self, now: float) -> None:
        """End what is past its deadline."""
        if now < self._deadline or self._transport is None:
            return
        if self._body is not None:
            if not self._body.is_eof():
                self._body.set_exception(BodyTooLateError())
            self._body = None
            self._deadline = inf
            return
        unsent = self._transport.get_write_buffer_size()
        if unsent and unsent != self._unsent:  # the client is reading the last answer
            self._unsent = unsent
            self._deadline = now + self._limits.idle_s
            return
        self._transport.abort()


class Connections:
    """All connections of a server, within their limits; `open` has them by aiohttp's protocol."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self.open: dict[asyncio.BaseProtocol, Connection] = {}
        self.clock = asyncio.get_running_loop().time
        self._server: asyncio.Server | None = None
        self._watch: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """How many are open."""
        return len(self.open)

    async def start(self, server: web.Server, listener: socket.socket) -> None:
        """Accept connections for aiohttp's `server` from now on."""
        self._server = await asyncio.get_running_loop().create_server(
            lambda: Connection(server(), self), sock=listener, backlog=4096
        )
        self._watch = asyncio.create_task(self._watch_forever())

    async def stop(self) -> None:
        """Accept no more, and watch no longer; what is open stays with aiohttp's server."""
        if self._server is not None:
            self._server.close()
        if self._watch is not None:
            self._watch.cancel()
            with suppress(asyncio.CancelledError):
                await self._watch

    def add(self, inner: asyncio.BaseProtocol, connection: Connection) -> bool:
        """Count a connection in; False when there are as many as may be."""
        if len(self.open) >= self.limits.max_connections:
            return False
        self.open[inner] = connection
        return True

    def remove(self, inner: asyncio.BaseProtocol) -> None:
        """Count a connection out."""
        self.open.pop(inner, None)

    async def _watch_forever(self) -> None:
        shortest_s = min(self.limits.header_s, self.limits.body_s, self.limits.idle_s)
        pause_s = min(shortest_s / _LOOKS_PER_LIMIT, _LONGEST_PAUSE_S)
        while True:
            await asyncio.sleep(pause_s)
            now = self.clock()
            for connection in list(self.open.values()):
                connection.look(now)


def raise_file_limit(max_connections: int) -> int:
    """Let this process open as many files as that takes; return how many connections fit.

    Without descriptors to spare, accepting a connection would fail, and with it the journal.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + _FILES_BESIDE
    if soft != resource.RLIM_INFINITY and soft < wanted:
        more = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
            soft = more
    if soft == resource.RLIM_INFINITY:
        return max_connections
    return max(1, min(max_connections, soft - _FILES_BESIDE))
