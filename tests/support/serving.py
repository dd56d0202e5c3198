"""A server in this process, with limits in tenths of seconds, and a client byte by byte."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvloop

from dispatcher.config import RunSettings
from dispatcher.server.access import Gate
from dispatcher.server.app import CONNECTIONS, listen, make_app, stop_listening
from dispatcher.server.connections import ConnectionLimits
from dispatcher.server.tls import Tls
from dispatcher.service import DispatchService

TLS: Tls | None = None
"""What the servers speak; a file of tests sets it to run all of them with TLS as well."""
QUICK = ConnectionLimits(header_s=0.4, body_s=0.4, idle_s=0.4, linger_s=0.2)
SOON_S = 3.0
"""Far above every limit of QUICK, as the machine may be busy."""
LONG_S = 10.0
"""What is not closed by then is not going to be."""


def head(method: str, path: str, *headers: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: h", *headers, "", ""]).encode()


class Running:
    """A server in this process."""

    def __init__(
        self, port: int, open_connections: Callable[[], int], tls: Tls | None = None
    ) -> None:
        self.port = port
        self.open_connections = open_connections
        self._tls = tls

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def has_connections(self, count: int) -> None:
        """Return once so many are open."""
        async with asyncio.timeout(LONG_S):
            while self.open_connections() != count:  # noqa: ASYNC110 (nobody tells)
                await asyncio.sleep(0.01)

    async def first_status(self, data: bytes) -> str:
        """Send bytes over a connection of their own; return the reply's status, "" for none."""
        peer = await self.connect()
        peer.send(data)
        try:
            return (await peer.whole_reply()).partition(b" ")[2][:3].decode("latin-1")
        finally:
            peer.close()

    async def connect(self) -> Peer:
        """Connect, and speak TLS if the server does; one that hangs up on that is read as such."""
        if self._tls is None:
            return await self.connect_plainly()
        try:
            return Peer(*await asyncio.open_connection("127.0.0.1", self.port, ssl=_trusting()))
        except OSError:
            return await self.connect_plainly()

    def connect_blocking(self) -> socket.socket:
        """Connect without asyncio, and speak TLS if the server does."""
        peer = socket.create_connection(("127.0.0.1", self.port), LONG_S)
        return peer if self._tls is None else _trusting().wrap_socket(peer)

    async def connect_plainly(self) -> Peer:
        """Connect, and leave it to the caller what is spoken."""
        return Peer(*await asyncio.open_connection("127.0.0.1", self.port))


def _trusting() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


class Peer:
    """The client's end of a connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def reply(self) -> tuple[int, dict[str, str], Any]:
        """Read one reply: status, headers, JSON."""
        async with asyncio.timeout(LONG_S):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode().splitlines()
            headers = {k.lower(): v for k, v in (line.split(": ") for line in head[1:] if line)}
            body = await self._reader.readexactly(int(headers["content-length"]))
        return int(head[0].split()[1]), headers, json.loads(body) if body[:1] == b"{" else body

    async def whole_reply(self) -> bytes:
        """Return everything until the server hangs up."""
        got = b""
        try:
            async with asyncio.timeout(LONG_S):
                while part := await self._reader.read(1 << 16):
                    got += part
        except ConnectionResetError:
            pass
        return got

    async def closed_after(self) -> float:
        """Return the seconds until the server hung up, without another word."""
        start = time.monotonic()
        try:
            async with asyncio.timeout(LONG_S):
                assert await self._reader.read() == b""
        except ConnectionResetError:
            pass
        return time.monotonic() - start

    async def keep_sending(self, data: bytes, pause_s: float) -> None:
        """Send `data` again and again until the server has enough: ConnectionError."""
        async with asyncio.timeout(LONG_S):
            while True:
                self.send(data)
                await self._writer.drain()
                await asyncio.sleep(pause_s)

    def close(self) -> None:
        self._writer.close()


@asynccontextmanager
async def serving(
    directory: Path, limits: ConnectionLimits, gate: Gate | None = None
) -> AsyncIterator[Running]:
    infile = directory / "in.jsonl"
    if not infile.exists():
        infile.write_text('{"n": 1}\n' * 3)
    state_dir = directory / "state"
    service = DispatchService(RunSettings(infile, directory / "out.jsonl", state_dir))
    await service.start()
    listener = socket.create_server(("127.0.0.1", 0))
    app = make_app(service, limits)
    tls = TLS
    runner = await listen(app, gate or Gate(), listener, tls.context if tls else None)
    try:
        yield Running(listener.getsockname()[1], lambda: len(app[CONNECTIONS]), tls)
    finally:
        await stop_listening(runner)
        await service.close()
        listener.close()


Scenario = Callable[[Running], Awaitable[None]]


def run(
    directory: Path,
    scenario: Scenario,
    limits: ConnectionLimits = QUICK,
    gate: Gate | None = None,
    *,
    deadline_s: float = 20.0,
) -> None:
    """Run a scenario against a server in this process."""

    async def whole() -> None:
        async with serving(directory, limits, gate) as server:
            await scenario(server)

    # With TLS, on the loop that the server command uses: what it does there is its own.
    loop_factory = uvloop.new_event_loop if TLS is not None else None
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(asyncio.wait_for(whole(), deadline_s))
