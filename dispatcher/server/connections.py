"""Limits on connections: how many, and how long each may take to say what it wants.

    accepted --> HEADER --it is whole--> BUSY --answered--> IDLE --first byte--> HEADER
    closed after header_s      408 after body_s       closed after idle_s

A `Connection` stands between the socket and aiohttp's protocol and sees the bytes come; that a
request has begun and that it is answered it hears from app.py. No request sets a timer: one task
looks at all connections now and then.

With TLS, an `Arrival` comes before it: it counts as a connection from the first moment on, which
the loop's own TLS servers do only once the handshake is done, and knows plain HTTP by its first
byte, so that whoever speaks it is told.

    accepted --first bytes--> handshake --it is done--> HEADER
    closed after header_s, both together
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import socket
import ssl
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import cast

from aiohttp import StreamReader, web

log = logging.getLogger(__name__)

HEADER_BYTES = 8190
"""Longest line of a request's header."""
_ALL_HEADERS_BYTES = 2 << 20
"""All lines together; far above what reading ahead takes in before a request has begun."""
_HEADER, _BUSY, _IDLE = range(3)
_LOOKS_PER_LIMIT = 8
_LONGEST_PAUSE_S = 1.0
_FILES_BESIDE = 128
"""Descriptors kept for the journal, the input, the output and whatever libraries open."""
_TLS_HANDSHAKE = 0x16
"""The first byte of every TLS connection; no request begins with it."""
_GOODBYE_S = 3600.0
"""For what is unsent and the end of TLS; the limits end it long before."""
_NOT_TLS = (
    "this server speaks TLS and reads nothing of a call without it; give --dispatcher "
    "@STATE/server.json, or https://HOST:PORT with the SHA-256 fingerprint of the server's "
    "certificate, which it says at its start, in --server-fingerprint or DISPATCHER_FINGERPRINT"
)


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """At most so many connections; seconds for a request's header, its body, and between two.

    `header_s` is also the time from a connection's first moment to the end of its TLS handshake.
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
    """One connection: passes everything on to aiohttp's protocol, and knows its deadline.

    `below` is the transport that carries TLS, where there is one.
    """

    __slots__ = (
        "_below",
        "_body",
        "_clock",
        "_connections",
        "_deadline",
        "_early",
        "_header_bytes",
        "_inner",
        "_limits",
        "_state",
        "_transport",
        "_unsent",
    )

    def __init__(
        self,
        inner: web.RequestHandler,
        connections: Connections,
        below: asyncio.Transport | None = None,
    ) -> None:
        self._inner = inner
        self._below = below
        self._early = b""
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
        if self._early:
            self.data_received(self._early)
            self._early = b""

    def data_received(self, data: bytes) -> None:
        """Pass bytes on; the first ones after an answer begin the next request's header."""
        if self._transport is None:
            self._early += data  # came together with the end of the handshake
            return
        if self._state != _BUSY:
            if self._state == _IDLE:
                self._state = _HEADER
                self._header_bytes = 0
                self._deadline = self._clock() + self._limits.header_s
            self._header_bytes += len(data)
            if self._header_bytes > _ALL_HEADERS_BYTES:
                self._transport.abort()  # not every version of aiohttp ends that
                return
        try:
            self._inner.data_received(data)
        except ValueError:  # what some versions of aiohttp raise for a URL that is none
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
        if self._below is not None:
            unsent += self._below.get_write_buffer_size()
        if unsent and unsent != self._unsent:  # the client is reading the last answer
            self._unsent = unsent
            self._deadline = now + self._limits.idle_s
            return
        self._transport.abort()


class Arrival(asyncio.Protocol):
    """A connection that is to speak TLS, until it does."""

    def __init__(
        self, server: web.Server, connections: Connections, context: ssl.SSLContext
    ) -> None:
        self._server = server
        self._connections = connections
        self._context = context
        self._limits = connections.limits
        self._transport: asyncio.Transport | None = None
        self._handshake: asyncio.Task[None] | None = None
        self._is_refused = False
        self._deadline = inf

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for the first byte, or hang up when there are too many connections."""
        self._transport = cast(asyncio.Transport, transport)
        if not self._connections.arrives(self):
            self._transport.abort()
            return
        self._deadline = self._connections.clock() + self._limits.header_s

    def data_received(self, data: bytes) -> None:
        """Have the handshake done with these first bytes, or tell who does not begin one."""
        assert self._transport is not None
        if self._is_refused or self._handshake is not None:
            return
        if data[0] != _TLS_HANDSHAKE:
            self._refuse()
            return
        self._transport.pause_reading()
        self._handshake = asyncio.create_task(self._shake_hands(self._transport))
        # After the task's first step, in which the transport gets the protocol of TLS.
        asyncio.get_running_loop().call_soon(self._pass_on, data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Count it out; during a handshake it is the protocol of TLS that hears of this."""
        self._connections.leaves(self)

    def look(self, now: float) -> None:
        """Hang up when it is past its deadline."""
        if now >= self._deadline and self._transport is not None:
            self._transport.abort()

    async def _shake_hands(self, below: asyncio.Transport) -> None:
        connection = Connection(self._server(), self._connections, below)
        try:
            transport = await asyncio.get_running_loop().start_tls(
                below,
                connection,
                self._context,
                server_side=True,
                ssl_handshake_timeout=self._limits.header_s,
                ssl_shutdown_timeout=_GOODBYE_S,
            )
        except OSError as error:  # an ssl.SSLError, too
            log.debug("a TLS handshake failed: %s", error)
            return
        finally:
            self._connections.leaves(self)
        if transport is not None and not transport.is_closing():
            connection.connection_made(transport)

    def _pass_on(self, data: bytes) -> None:
        assert self._transport is not None
        protocol = self._transport.get_protocol()
        if not isinstance(protocol, Arrival) and protocol is not None:
            _feed(protocol, data)

    def _refuse(self) -> None:
        assert self._transport is not None
        self._is_refused = True
        # What else was sent is read and dropped for a moment, or the answer might be lost.
        self._deadline = self._connections.clock() + self._limits.linger_s
        body = json.dumps({"status": "error", "message": _NOT_TLS}).encode()
        head = (
            "HTTP/1.1 426 Upgrade Required\r\nUpgrade: TLS/1.2\r\nConnection: Upgrade, close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._transport.write(head.encode("ascii") + body)


class Connections:
    """All connections of a server, within their limits; `open` has them by aiohttp's protocol."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self.open: dict[asyncio.BaseProtocol, Connection] = {}
        self._arriving: set[Arrival] = set()
        self.clock = asyncio.get_running_loop().time
        self._server: asyncio.Server | None = None
        self._watch: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """How many are open."""
        return len(self.open) + len(self._arriving)

    async def start(
        self, server: web.Server, listener: socket.socket, tls: ssl.SSLContext | None = None
    ) -> None:
        """Accept connections for aiohttp's `server` from now on, over TLS if it is given."""

        def accepted() -> asyncio.Protocol:
            return Connection(server(), self) if tls is None else Arrival(server, self, tls)

        self._server = await asyncio.get_running_loop().create_server(
            accepted, sock=listener, backlog=4096
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
        for arrival in tuple(self._arriving):
            arrival.look(inf)

    def add(self, inner: asyncio.BaseProtocol, connection: Connection) -> bool:
        """Count a connection in; False when there are as many as may be."""
        if len(self) >= self.limits.max_connections:
            return False
        self.open[inner] = connection
        return True

    def arrives(self, arrival: Arrival) -> bool:
        """Count in a connection that is to speak TLS; False when there are as many as may be."""
        if len(self) >= self.limits.max_connections:
            return False
        self._arriving.add(arrival)
        return True

    def leaves(self, arrival: Arrival) -> None:
        """Count it out: it speaks TLS now, or is gone."""
        self._arriving.discard(arrival)

    def remove(self, inner: asyncio.BaseProtocol) -> None:
        """Count a connection out."""
        self.open.pop(inner, None)

    async def _watch_forever(self) -> None:
        shortest_s = min(self.limits.header_s, self.limits.body_s, self.limits.idle_s)
        pause_s = min(shortest_s / _LOOKS_PER_LIMIT, _LONGEST_PAUSE_S)
        while True:
            await asyncio.sleep(pause_s)
            now = self.clock()
            looked_at: list[Connection | Arrival] = [*self.open.values(), *self._arriving]
            for connection in looked_at:
                connection.look(now)


def _feed(protocol: asyncio.BaseProtocol, data: bytes) -> None:
    """Give bytes to a transport's protocol as if they had just come."""
    if isinstance(protocol, asyncio.Protocol):
        protocol.data_received(data)
        return
    receiver = cast(asyncio.BufferedProtocol, protocol)
    while data:
        buffer = memoryview(receiver.get_buffer(len(data)))
        part = data[: len(buffer)]
        buffer[: len(part)] = part
        receiver.buffer_updated(len(part))
        data = data[len(part) :]


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
