"""Clients of the dispatcher server: one description of the wire, two transports.

`Wire` turns calls into HTTP messages and replies into typed objects, without I/O; `WorkClient`
sends them with the standard library and blocks, `AsyncWorkClient` sends them with aiohttp.
A server that cannot be reached is an answer (SERVER_UNAVAILABLE), not an exception.
"""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import msgspec

from dispatcher.errors import BadRequestError, UsageError
from dispatcher.models import (
    BatchResultResponse,
    BatchResultSubmission,
    BatchWorkResponse,
    HeartbeatRequest,
    HeartbeatResponse,
    ReleaseItem,
    ReleaseWorkRequest,
    ReleaseWorkResponse,
    WorkItem,
    WorkStatus,
)

if TYPE_CHECKING:
    import aiohttp

R = TypeVar("R")

DEFAULT_TIMEOUT_S = 60.0
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Call(Generic[R]):
    """One HTTP call: what to send, and what its reply is decoded to.

    `unavailable` is the reply when the server cannot be reached or cannot answer now;
    `when_missing` the one when it does not know the call (404).
    """

    method: str
    path: str
    body: bytes | None
    reply: type[R]
    unavailable: R
    when_missing: R
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Address:
    """Where the server is; `prefix` is the path before its calls."""

    host: str
    port: int
    prefix: str

    @classmethod
    def parse(cls, address: str) -> Address:
        """Parse `host:port` or `http://host:port[/prefix]`. Raises UsageError."""
        url = address if "://" in address else f"http://{address}"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme != "http" or not parts.hostname or port is None:
            raise UsageError(f"{address!r} is not the address of a server; give HOST:PORT")
        return cls(parts.hostname, port, parts.path.rstrip("/"))

    @property
    def url(self) -> str:
        """The server's base URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}{self.prefix}"


class Wire:
    """The calls of the protocol (server/PROTOCOL.md), without I/O."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def get_work(
        self, batch_size: int, worker: str | None, wait_s: float
    ) -> Call[BatchWorkResponse]:
        """Ask for work; a server that does not know the call has none left (COMPAT)."""
        query: dict[str, Any] = {"batch_size": batch_size}
        if worker is not None:
            query["worker"] = worker
        if wait_s:
            query["wait"] = f"{wait_s:g}"
        return Call(
            "GET",
            f"/work?{urlencode(query, quote_via=quote)}",
            None,
            BatchWorkResponse,
            BatchWorkResponse(WorkStatus.SERVER_UNAVAILABLE),
            BatchWorkResponse(WorkStatus.ALL_WORK_COMPLETE),
            self._timeout_s + wait_s,
        )

    def submit_results(
        self, items: Sequence[WorkItem], worker: str | None, want: int
    ) -> Call[BatchResultResponse]:
        """Hand in results, and with `want` ask for more items in the same call."""
        body = BatchResultSubmission(list(items), worker, want)
        return Call(
            "POST",
            "/results",
            _encode_lone_surrogates_too(body),
            BatchResultResponse,
            BatchResultResponse(WorkStatus.SERVER_UNAVAILABLE),
            BatchResultResponse(WorkStatus.SERVER_UNAVAILABLE),
            self._timeout_s,
        )

    def release_work(
        self, work_ids: Iterable[int], items: Iterable[ReleaseItem], worker: str | None
    ) -> Call[ReleaseWorkResponse]:
        """Give items back unfinished."""
        body = ReleaseWorkRequest(list(work_ids), list(items), worker)
        return Call(
            "POST",
            "/release",
            _encode_lone_surrogates_too(body),
            ReleaseWorkResponse,
            ReleaseWorkResponse(WorkStatus.SERVER_UNAVAILABLE),
            ReleaseWorkResponse(WorkStatus.SERVER_UNAVAILABLE),
            self._timeout_s,
        )

    def heartbeat(self, request: HeartbeatRequest) -> Call[HeartbeatResponse]:
        """Say what the worker holds; an older server without the call needs none."""
        return Call(
            "POST",
            "/heartbeat",
            _encode(request),
            HeartbeatResponse,
            HeartbeatResponse(WorkStatus.SERVER_UNAVAILABLE),
            HeartbeatResponse(WorkStatus.OK),
            self._timeout_s,
        )

    def status(self) -> Call[dict[str, Any]]:
        """Ask for the run's state."""
        return Call("GET", "/status", None, dict[str, Any], {}, {}, self._timeout_s)


def decode_reply(call: Call[R], status: int, body: bytes) -> R:
    """Turn a reply into its object. Raises BadRequestError when the server refused the call."""
    if status == 404:
        return call.when_missing
    if status >= 500:
        return call.unavailable
    if status >= 400:
        raise BadRequestError(f"the server refused {call.method} {call.path}: {_sentence(body)}")
    try:
        return msgspec.json.decode(body, type=call.reply)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return call.unavailable  # cut off, or not a dispatcher server


def _sentence(body: bytes) -> str:
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace") or "no reason given"


def _encode_lone_surrogates_too(body: BatchResultSubmission | ReleaseWorkRequest) -> bytes:
    try:
        return _encode(body)
    except UnicodeEncodeError:
        # A text with half a surrogate pair cannot be UTF-8; as an escape it arrives, and the
        # server judges that one item instead of this client refusing the batch.
        return json.dumps(msgspec.to_builtins(body)).encode("ascii")


class WorkClient:
    """Synchronous client; safe to share between threads (calls wait for each other)."""

    def __init__(
        self,
        address: str,
        worker: str | None = None,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self._address = Address.parse(address)
        self._worker = worker
        self._wire = Wire(timeout_s)
        self._connection: http.client.HTTPConnection | None = None
        self._lock = threading.Lock()

    def get_work(self, batch_size: int = 1, wait_s: float = 0.0) -> BatchWorkResponse:
        """Ask for up to `batch_size` items; with `wait_s`, wait so long for the first."""
        return self._send(self._wire.get_work(batch_size, self._worker, wait_s))

    def submit_results(self, items: Sequence[WorkItem], want: int = 0) -> BatchResultResponse:
        """Hand in finished items (`item.set_result(text)` was called on each)."""
        return self._send(self._wire.submit_results(items, self._worker, want))

    def release_work(
        self, work_ids: Iterable[int] = (), items: Iterable[ReleaseItem] = ()
    ) -> ReleaseWorkResponse:
        """Give items back: by id alone, which charges them, or with lease and charge."""
        return self._send(self._wire.release_work(work_ids, items, self._worker))

    def heartbeat(self, request: HeartbeatRequest) -> HeartbeatResponse:
        """Say that this worker is alive and what it holds."""
        return self._send(self._wire.heartbeat(request))

    def status(self) -> dict[str, Any]:
        """Return the run's state; empty when the server cannot be reached."""
        return self._send(self._wire.status())

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._drop_connection()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _send(self, call: Call[R]) -> R:
        with self._lock:
            # A kept connection may have been closed by the server meanwhile: try a fresh one.
            for is_fresh in (self._connection is None, True):
                try:
                    return decode_reply(call, *self._exchange(call))
                except (OSError, http.client.HTTPException):
                    self._drop_connection()
                    if is_fresh:
                        break
            return call.unavailable

    def _exchange(self, call: Call[Any]) -> tuple[int, bytes]:
        if self._connection is None:
            self._connection = http.client.HTTPConnection(self._address.host, self._address.port)
        connection = self._connection
        connection.timeout = call.timeout_s
        if connection.sock is not None:
            connection.sock.settimeout(call.timeout_s)
        headers = {"Content-Type": "application/json"} if call.body is not None else {}
        connection.request(call.method, self._address.prefix + call.path, call.body, headers)
        reply = connection.getresponse()
        return reply.status, reply.read()

    def _drop_connection(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class AsyncWorkClient:
    """Asynchronous client on aiohttp; proxy variables never apply to the dispatcher."""

    def __init__(
        self,
        address: str,
        worker: str | None = None,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self._address = Address.parse(address)
        self._worker = worker
        self._wire = Wire(timeout_s)
        self._session: aiohttp.ClientSession | None = None

    async def get_work(self, batch_size: int = 1, wait_s: float = 0.0) -> BatchWorkResponse:
        """Ask for up to `batch_size` items; with `wait_s`, wait so long for the first."""
        return await self._send(self._wire.get_work(batch_size, self._worker, wait_s))

    async def submit_results(self, items: Sequence[WorkItem], want: int = 0) -> BatchResultResponse:
        """Hand in finished items."""
        return await self._send(self._wire.submit_results(items, self._worker, want))

    async def release_work(
        self, work_ids: Iterable[int] = (), items: Iterable[ReleaseItem] = ()
    ) -> ReleaseWorkResponse:
        """Give items back: by id alone, which charges them, or with lease and charge."""
        return await self._send(self._wire.release_work(work_ids, items, self._worker))

    async def heartbeat(self, request: HeartbeatRequest) -> HeartbeatResponse:
        """Say that this worker is alive and what it holds."""
        return await self._send(self._wire.heartbeat(request))

    async def status(self) -> dict[str, Any]:
        """Return the run's state; empty when the server cannot be reached."""
        return await self._send(self._wire.status())

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _send(self, call: Call[R]) -> R:
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession(trust_env=False)
        headers = {"Content-Type": "application/json"} if call.body is not None else None
        try:
            async with self._session.request(
                call.method,
                self._address.url + call.path,
                data=call.body,
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=call.timeout_s, connect=10.0),
                allow_redirects=False,
            ) as reply:
                status, body = reply.status, await reply.read()
        except (TimeoutError, aiohttp.ClientError, OSError):
            return call.unavailable
        return decode_reply(call, status, body)
