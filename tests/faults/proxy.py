"""A network that misbehaves: an HTTP proxy on loopback between workers and a dispatcher server.

It knows where a request and a reply end, and nothing else of the protocol. A `Schedule` decides,
from a seed, which requests meet a fault and of which kind; the faults themselves draw how they
strike from the same seed. What reached the server is for the kind to say: a refused request did
not, a lost reply means that it did.

A seed repeats the decisions in the order in which requests arrive; that order is the run's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Any, TypeVar

T = TypeVar("T")

LOOPBACK = "127.0.0.1"
LONGEST_HANG_S = 1.0
"""A call that is never answered is closed after this long: every fault has an end."""


class Kind(StrEnum):
    """What can happen to a request on its way."""

    REFUSE = "refuse"
    """The connection is closed unanswered; for a while the port may take none, or close each."""
    HANG = "hang"
    """Taken and never answered; the server does not hear of it."""
    RESET = "reset"
    """Reset at any byte of the request or of the reply."""
    LOSE_REPLY = "lose_reply"
    """The server acted on it, the reply is thrown away."""
    DUPLICATE = "duplicate"
    """The server gets it twice, at the same time or later; one reply comes back."""
    DELAY = "delay"
    """Request or reply come late, the request also when the client has left by then."""
    TRUNCATE_REPLY = "truncate_reply"
    """The reply is cut in its header or body, followed by the end or by silence."""
    SLOW = "slow"
    """Request or reply come a byte at a time for a while."""
    GARBAGE = "garbage"
    """Somebody else answers; the server may have acted on it."""


def _page(
    status: str, *headers: str, body: bytes = b"<html><h1>Please log in</h1></html>"
) -> bytes:
    head = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}"]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


_HTML = "Content-Type: text/html"
_JSON = "Content-Type: application/json"
GARBAGE = (
    _page("200 OK", _HTML),
    _page("200 OK", _HTML, body=b""),
    _page("200 OK", _JSON, body=b"{}"),
    _page("200 OK", _JSON, body=b"null"),
    _page("200 OK", _JSON, body=b'{"status": "healthy"}'),
    _page("200 OK", _JSON, "Content-Encoding: gzip"),
    _page("302 Found", _HTML, "Location: http://portal.invalid/login"),
    _page("500 Internal Server Error", _HTML),
    _page("502 Bad Gateway", _HTML),
    _page("503 Service Unavailable", _HTML, "Retry-After: 1"),
    _page("504 Gateway Timeout", _HTML),
    _page("511 Network Authentication Required", _HTML),
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\noops\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nno chunk\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 30 + b"\r\n{}\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n{}",
    b"HTTP/1.1 twohundred OK\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 70_000 + b"\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.6\r\n",
    b"\x15\x03\x03\x00\x02\x02\x46",
    b"\x00" * 64,
)
"""Replies of captive portals, gateways and things that are no HTTP server at all."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One decision; `rng` is for how it strikes."""

    kind: Kind
    rng: Random


class Schedule:
    """Decides request by request: a share of them, `rate`, meets a fault.

    Without a `rate` it is drawn between 20 and 40 %, and a third of the seeds have a storm beside
    that, in which nearly all do for up to `storm_s`: only so are heartbeats kept away for longer
    than a lease term. Faults begin and end so many seconds after the first request; they end, so
    that a run that never completes is the run's fault.
    """

    def __init__(
        self,
        kinds: Sequence[Kind],
        seed: int,
        *,
        rate: float | None = None,
        storm_s: float = 1.2,
        begins_after_s: float = 0.0,
        ends_after_s: float = 4.0,
    ) -> None:
        self._kinds = tuple(kinds)
        self._rng = Random(seed)
        self._rate = self._rng.uniform(0.2, 0.4) if rate is None else rate
        begin_s = self._rng.uniform(0.05, 0.3)
        has_storm = rate is None and self._rng.random() < 1 / 3
        length_s = self._rng.uniform(0.2, 1.0) * storm_s if has_storm else 0.0
        self._storm_s = (begin_s, begin_s + length_s)
        self._faults_s = (begins_after_s, ends_after_s)
        self._began_at: float | None = None

    def next(self) -> Fault | None:
        """Decide the fate of the request that arrives now."""
        now = asyncio.get_running_loop().time()
        if self._began_at is None:
            self._began_at = now
        age_s = now - self._began_at
        rate = 0.95 if _within(age_s, self._storm_s) else self._rate
        strikes, kind = self._rng.random() < rate, self._rng.choice(self._kinds)
        rng = Random(self._rng.random())
        return Fault(kind, rng) if strikes and _within(age_s, self._faults_s) else None


def _within(age_s: float, span_s: tuple[float, float]) -> bool:
    return span_s[0] <= age_s < span_s[1]


@dataclass(frozen=True, slots=True)
class Peer:
    """One end of a connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        if self.writer.is_closing():
            raise ConnectionResetError("the other side has left")
        self.writer.write(data)
        await self.writer.drain()

    async def dribble(self, data: bytes, count: int, pause_s: float) -> None:
        """Send the first `count` bytes one by one, then the rest."""
        for byte in data[:count]:
            await self.send(bytes([byte]))
            await asyncio.sleep(pause_s)
        await self.send(data[count:])

    def reset(self) -> None:
        """Close with an RST instead of a FIN."""
        linger = struct.pack("ii", 1, 0)
        with contextlib.suppress(OSError):
            connection = self.writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()

    async def left(self) -> None:
        """Return when the other side has gone, or speaks before it has its answer."""
        with contextlib.suppress(OSError):
            await self.reader.read(1)


class _Line:
    """A connection to the server that is kept as long as it works."""

    def __init__(self, dial: Callable[[], Awaitable[Peer]]) -> None:
        self._dial = dial
        self._server: Peer | None = None

    async def ask(self, request: bytes) -> bytes | None:
        """Return the reply, or None when there is none. Cancelling this cuts the connection."""
        reply = None
        try:
            if self._server is None:
                self._server = await self._dial()
            await self._server.send(request)
            reply = await read_message(self._server.reader)
        except (OSError, EOFError):
            return None
        finally:
            if reply is None:
                self.close()
        return reply

    def close(self) -> None:
        if self._server is not None:
            self._server.writer.close()
            self._server = None


async def read_message(reader: asyncio.StreamReader) -> bytes | None:
    """Return one whole request or reply as it came; None at the end of the connection.

    Raises EOFError for one that is cut short. A reply that only the end of its connection ends,
    or with 1xx, is not known here: dispatcher servers send neither.
    """
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as cut:
        if cut.partial:
            raise
        return None
    headers = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(b":") for line in head.split(b"\r\n")[1:])
    }
    if b"chunked" in headers.get(b"transfer-encoding", b"").lower():
        return head + await _read_chunks(reader)
    return head + await reader.readexactly(int(headers.get(b"content-length", b"0")))


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    parts = []
    while True:
        size_line = await reader.readuntil(b"\r\n")
        size = int(size_line.split(b";")[0], 16)
        parts.append(size_line)
        if not size:
            break
        parts.append(await reader.readexactly(size + 2))
    while (trailer := await reader.readuntil(b"\r\n")) != b"\r\n":
        parts.append(trailer)
    return b"".join([*parts, b"\r\n"])


class FaultyProxy:
    """Stands before a server; set `upstream`, the server's port, also when it changes.

    `patience_s` is how long the clients wait for a reply: delays are drawn up to twice that.
    `counts` says how many requests met each kind, `requests` how many there were.
    """

    def __init__(self, schedule: Schedule, *, patience_s: float) -> None:
        self.upstream = 0
        self.counts: Counter[Kind] = Counter()
        self.requests = 0
        self._schedule = schedule
        self._patience_s = patience_s
        self._listener: asyncio.Server | None = None
        self._closes_all_until = 0.0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False
        # Never listens: keeps the port this proxy's own while nobody listens on it.
        self._keeper = _bound(0)
        self._faults: dict[Kind, Callable[[bytes, Peer, Random], Awaitable[bool]]] = {
            Kind.REFUSE: self._refuse,
            Kind.HANG: self._hang,
            Kind.RESET: self._reset,
            Kind.LOSE_REPLY: self._lose_reply,
            Kind.DUPLICATE: self._duplicate,
            Kind.DELAY: self._delay,
            Kind.TRUNCATE_REPLY: self._truncate_reply,
            Kind.SLOW: self._slow,
            Kind.GARBAGE: self._garbage,
        }

    @property
    def address(self) -> str:
        """Return `host:port` for clients."""
        return f"{LOOPBACK}:{self._keeper.getsockname()[1]}"

    async def start(self) -> None:
        """Begin to take connections."""
        listener = _bound(self._keeper.getsockname()[1])
        listener.listen(256)
        self._listener = await asyncio.start_server(self._connected, sock=listener)

    async def close(self) -> None:
        """Cut every connection and stop."""
        self._closing = True
        if self._listener is not None:
            self._listener.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._keeper.close()

    # ---------------------------------------------------------------- connections

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._closing or asyncio.get_running_loop().time() < self._closes_all_until:
            writer.close()
        else:
            self._spawn(self._serve(Peer(reader, writer)))

    async def _serve(self, client: Peer) -> None:
        line = _Line(self._dial)
        try:
            while (request := await read_message(client.reader)) is not None:
                self.requests += 1
                fault = self._schedule.next()
                if fault is None:
                    reply = await self._while_there(client, line.ask(request))
                    goes_on = await self._answer(client, reply)
                else:
                    self.counts[fault.kind] += 1
                    goes_on = await self._faults[fault.kind](request, client, fault.rng)
                if not goes_on:
                    return
        except (OSError, EOFError):
            return  # the client left
        finally:
            line.close()
            client.writer.close()

    async def _answer(self, client: Peer, reply: bytes | None) -> bool:
        if reply is None:
            return False
        await client.send(reply)
        return True

    async def _deliver(self, request: bytes, after_s: float = 0.0) -> bytes | None:
        """Bring a request to the server; return the reply, None when there is none.

        Cancelling this cuts the connection, as a client that leaves would.
        """
        if after_s:
            await asyncio.sleep(after_s)
        line = _Line(self._dial)
        try:
            return await line.ask(request)
        finally:
            line.close()

    async def _dial(self) -> Peer:
        return Peer(*await asyncio.open_connection(LOOPBACK, self.upstream))

    async def _while_there(self, client: Peer, work: Coroutine[Any, Any, T]) -> T | None:
        """Return the outcome of `work`; end it and return None when the client leaves first."""
        working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(client.left())
        try:
            await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else None
        finally:
            working.cancel()
            leaving.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)

    async def _hold(self, client: Peer) -> None:
        """Say nothing until the client gives up."""
        await self._while_there(client, asyncio.sleep(LONGEST_HANG_S))

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # ---------------------------------------------------------------- faults
    # Each says whether the connection may go on.

    async def _refuse(self, request: bytes, client: Peer, rng: Random) -> bool:
        pause_s = rng.uniform(0.02, 0.15)
        way = rng.choice(["this one", "no listener", "each one"])
        if way == "each one":
            self._closes_all_until = asyncio.get_running_loop().time() + pause_s
        elif way == "no listener" and self._listener is not None:
            self._listener.close()
            self._listener = None
            self._spawn(self._listen_again(pause_s))
        return False

    async def _listen_again(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        await self.start()

    async def _hang(self, request: bytes, client: Peer, rng: Random) -> bool:
        await self._hold(client)
        return False

    async def _reset(self, request: bytes, client: Peer, rng: Random) -> bool:
        if rng.random() < 0.5:
            with contextlib.suppress(OSError):
                server = await self._dial()
                await server.send(request[: rng.randint(0, len(request))])
                await asyncio.sleep(rng.choice([0.0, 0.005]))
                server.reset()
        else:
            reply = await self._deliver(request)
            if reply is not None:
                await client.send(reply[: rng.randint(0, len(reply))])
        client.reset()
        return False

    async def _lose_reply(self, request: bytes, client: Peer, rng: Random) -> bool:
        await self._deliver(request)
        if rng.random() < 0.3:
            await self._hold(client)
        return False

    async def _duplicate(self, request: bytes, client: Peer, rng: Random) -> bool:
        if rng.random() < 0.5:
            self._spawn(self._deliver(request))
            return await self._answer(client, await self._deliver(request))
        reply = await self._deliver(request)
        self._spawn(self._deliver(request, rng.uniform(0.0, self._patience_s)))
        return await self._answer(client, reply)

    async def _delay(self, request: bytes, client: Peer, rng: Random) -> bool:
        late_s = rng.uniform(0.1, 2.0) * self._patience_s
        if rng.random() < 0.5:
            # Under way whether or not the client is still there.
            delivery = self._spawn(self._deliver(request, late_s))
            return await self._answer(client, await asyncio.shield(delivery))
        reply = await self._deliver(request)
        await asyncio.sleep(late_s)
        return await self._answer(client, reply)

    async def _truncate_reply(self, request: bytes, client: Peer, rng: Random) -> bool:
        reply = await self._deliver(request)
        if reply is not None:
            head_bytes = reply.index(b"\r\n\r\n") + 4
            in_head = rng.random() < 0.3
            cut = rng.randrange(head_bytes) if in_head else rng.randrange(head_bytes, len(reply))
            await client.send(reply[:cut])
            if rng.random() < 0.3:
                await self._hold(client)
        return False

    async def _slow(self, request: bytes, client: Peer, rng: Random) -> bool:
        count, pause_s = rng.randint(10, 150), rng.uniform(0.001, 0.004)
        if rng.random() < 0.5:
            reply = await self._deliver(request)
            if reply is None:
                return False
            await client.dribble(reply, count, pause_s)
            return True
        try:
            server = await self._dial()
        except OSError:
            return False
        try:
            await server.dribble(request, count, pause_s)
            return await self._answer(client, await read_message(server.reader))
        finally:
            server.writer.close()

    async def _garbage(self, request: bytes, client: Peer, rng: Random) -> bool:
        if rng.random() < 0.3:
            await self._deliver(request)
        reply = rng.choice(GARBAGE)
        await client.send(reply)
        return False


def _bound(port: int) -> socket.socket:
    """Return a socket bound to the port, which others of ours may be bound to as well."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((LOOPBACK, port))
    sock.setblocking(False)
    return sock
