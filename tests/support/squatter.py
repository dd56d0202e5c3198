"""A stranger's process on the port that was the server's."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from dispatcher.server.tls import Tls


class Squatter:
    """Has the port that was the server's, answers as it likes, and keeps every byte it is sent.

    `heard` is what came outside of TLS, or inside once its handshake was done.
    """

    def __init__(self, kind: str, context: ssl.SSLContext, host: str, port: int) -> None:
        self._kind = kind
        self._context = context
        self._listener = socket.create_server((host, port))
        self._listener.settimeout(0.05)
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        self._ends = threading.Event()
        self._threads: list[threading.Thread] = []
        self.heard = b""
        self.met = 0
        self._start(self._accept)

    def close(self) -> None:
        """Return once nothing more can be heard."""
        self._ends.set()
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._ends.is_set():
            with suppress(TimeoutError):
                connection, _ = self._listener.accept()
                self.met += 1
                self._start(self._listen_to, connection)

    def _listen_to(self, connection: socket.socket) -> None:
        connection.settimeout(5.0)
        with suppress(OSError):
            if "certificate" in self._kind:
                connection = self._context.wrap_socket(connection, server_side=True)
            body = b'{"status": "OK", "items": [{"work_id": 0, "content": "x"}]}'
            reply = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            with connection:
                if self._kind == "speaks first":
                    connection.sendall(reply)
                while part := connection.recv(1 << 16):
                    self.heard += part
                    if self._kind != "silent":
                        connection.sendall(reply)


SQUATTERS = ["another certificate", "plain HTTP", "speaks first", "silent"]


@contextmanager
def squatting(kind: str, theirs: Tls, port: int = 0, host: str = "127.0.0.1") -> Iterator[Squatter]:
    """Have a squatter with a certificate of its own; one kind shows it, the others do not."""
    squatter = Squatter(kind, theirs.context, host, port)
    try:
        yield squatter
    finally:
        squatter.close()
