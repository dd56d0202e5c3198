"""A server of scripted replies, over TLS too, and both clients behind one face."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from dispatcher.client import AsyncWorkClient, WorkClient


class Script(ThreadingHTTPServer):
    """Answers each call with the next of its replies, the last one again and again."""

    daemon_threads = True

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self._tls = tls
        self.replies: list[tuple[int, bytes]] = [(200, b"{}")]
        self.calls: list[tuple[str, str, bytes]] = []
        self.tokens: list[str | None] = []
        self.wants: str | None = None
        self.delay_s = 0.0
        self.hangs_up = False
        self.connections = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Serve one connection, in a thread of its own."""
        if self._tls is None:
            super().finish_request(request, client_address)
            return
        with suppress(OSError), self._tls.wrap_socket(request, server_side=True) as secured:
            super().finish_request(secured, client_address)

    @property
    def sent(self) -> Any:
        """The JSON value of the last call's body."""
        return json.loads(self.calls[-1][2])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Script

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server = self.server
        server.calls.append((self.command, self.path, body))
        server.tokens.append(self.headers.get("Authorization"))
        if server.wants is not None and server.tokens[-1] != f"Bearer {server.wants}":
            server.replies.insert(0, (401, b'{"message": "no entry"}'))
        status, reply = server.replies.pop(0) if len(server.replies) > 1 else server.replies[0]
        time.sleep(server.delay_s)
        if status:
            self.send_response(status)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
        self.wfile.write(reply)
        # Without a word of it, as a server that is restarted closes what it had open.
        self.close_connection = server.hangs_up or not status

    do_POST = do_GET

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def scripted(tls: ssl.SSLContext | None = None) -> Iterator[Script]:
    script = Script(tls)
    thread = threading.Thread(target=script.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield script
    finally:
        script.shutdown()
        script.server_close()
        thread.join(5)


Calls = Callable[[Any], Sequence[Any]]


def by_blocking(address: str, calls: Calls, **options: Any) -> list[Any]:
    with WorkClient(address, "w 1", **options) as client:
        return list(calls(client))


def by_asyncio(address: str, calls: Calls, **options: Any) -> list[Any]:
    async def scenario() -> list[Any]:
        client = AsyncWorkClient(address, "w 1", **options)
        try:
            return [await reply for reply in calls(client)]
        finally:
            await client.close()

    return asyncio.run(asyncio.wait_for(scenario(), 10))


both = pytest.mark.parametrize("send", [by_blocking, by_asyncio])
Send = Callable[..., list[Any]]
