"""Clients of the dispatcher server: one description of the wire, two transports.

`Wire` turns calls into HTTP messages and replies into typed objects, without I/O; `WorkClient`
sends them with the standard library and blocks, `AsyncWorkClient` sends them with aiohttp.
A server that cannot be reached is an answer (SERVER_UNAVAILABLE), not an exception.

An address is HOST:PORT, a URL, or @PATH of the server's server.json (or of the state directory
that holds it), which also has the token and is read again when the server moved.

Where the fingerprint of the server's certificate is known, from that file or from the user, TLS
is spoken with that certificate or not at all, and nothing is sent before it was shown. Who shows
another one has a port that was the server's, so the server is away, not refusing. An https URL
without a fingerprint leaves it to the certificate authorities that this system trusts.
"""

from __future__ import annotations

import asyncio
import functools
import http.client
import json
import logging
import ssl
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import msgspec

from dispatcher.errors import AccessDeniedError, BadRequestError, UsageError
from dispatcher.models import (
    BatchResultResponse,
    BatchResultSubmission,
    BatchWorkResponse,
    HeartbeatRequest,
    HeartbeatResponse,
    ReleaseItem,
    ReleaseWorkRequest,
    ReleaseWorkResponse,
    StepItem,
    StepsResponse,
    StepsSubmission,
    WorkItem,
    WorkStatus,
)
from dispatcher.server_file import (
    check_token,
    fingerprint_given,
    fingerprint_of,
    read_server_file,
    token_given,
)

if TYPE_CHECKING:
    import aiohttp

R = TypeVar("R")

DEFAULT_TIMEOUT_S = 60.0
RENEW_TIMEOUT_S = 10.0
"""How long a release that renews leases waits for its reply, at most.

When that is lost nobody knows the new leases, and no heartbeat names them, so that they live for
one lease term (30 s unless the server is told otherwise). The call must be made again before.
"""

_SPEAKS_TLS = 426
_MAYBE_ELSEWHERE = (401, 404, _SPEAKS_TLS)
_LATER = (408, 425, 429)
_NOT_TLS = ("WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE", "BAD_RECORD_TYPE")
"""What OpenSSL, in its versions, says of an answer that is no TLS."""
_WHICH_TOKEN = (
    " (is the token that of another run? name it as @STATE/server.json, or give the token with "
    "--token-file or in DISPATCHER_TOKEN)"
)
_encode = msgspec.json.Encoder().encode
log = logging.getLogger(__name__)


class OtherCertificateError(OSError):
    """Raised where a server shows another certificate than the one that is meant."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said to an order: the HTTP status, a sentence, and how the run is then.

    `state` is that of `/status`; empty with a refusal, and from an older server.
    """

    status: int
    message: str
    state: str = ""


@dataclass(frozen=True, slots=True)
class Call(Generic[R]):
    """One HTTP call: what to send, and what its reply is decoded to.

    `unavailable` is the reply when the server cannot be reached or cannot answer now;
    `when_missing` the one when it does not know the call (404); `when_over` the one when it is
    gone and its server.json says that the run is complete.
    """

    method: str
    path: str
    body: bytes | None
    reply: type[R]
    unavailable: R
    when_missing: R
    timeout_s: float
    when_over: R | None = None


@dataclass(frozen=True, slots=True)
class Address:
    """Where the server is; `prefix` is the path before its calls."""

    host: str
    port: int
    prefix: str
    scheme: str = "http"

    @classmethod
    def parse(cls, address: str, scheme: str = "http") -> Address:
        """Parse `host:port`, to which `scheme` applies, or `http[s]://host:port[/prefix]`.

        Raises UsageError.
        """
        url = address if "://" in address else f"{scheme}://{address}"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname or port is None:
            raise UsageError(
                f"{address!r} is not the address of a server; give HOST:PORT or @STATE/server.json"
            )
        return cls(parts.hostname, port, parts.path.rstrip("/"), parts.scheme)

    @property
    def is_encrypted(self) -> bool:
        """Whether TLS is spoken there."""
        return self.scheme == "https"

    @property
    def url(self) -> str:
        """The server's base URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.prefix}"


@dataclass(frozen=True, slots=True)
class Place:
    """A server, and the token to show it. `is_over`: its run is complete, as it left written.

    `fingerprint` is that of the one certificate it may show; there is one only with https.
    """

    address: Address
    token: str | None
    is_over: bool = False
    fingerprint: str | None = None

    def headers(self, call: Call[Any]) -> dict[str, str]:
        """Return the headers to send with a call."""
        headers = {"Content-Type": "application/json"} if call.body is not None else {}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        return headers

    def is_like(self, other: Place | None) -> bool:
        """Say whether a call to the one would be the same as to the other."""
        return other is not None and self._called() == other._called()

    def _called(self) -> tuple[Address, str | None, str | None]:
        return self.address, self.token, self.fingerprint


class Location:
    """Where `address` leads to now. `token` comes before the one that server.json holds.

    `fingerprint` is for an address that is no @PATH: that file has its own.
    """

    def __init__(
        self, address: str, token: str | None = None, fingerprint: str | None = None
    ) -> None:
        if token is not None:
            check_token(token, "the token")
        self._token = token
        self._path: Path | None = None
        self.place: Place | None = None
        self.stranger: str | None = None
        if address.startswith("@"):
            if not address[1:]:
                raise UsageError("'@' names no file; give @STATE/server.json")
            if fingerprint is not None:
                raise UsageError(
                    f"{address} has the fingerprint of the server's certificate in it; leave "
                    "--server-fingerprint out"
                )
            self._path = Path(address[1:])
        else:
            self.place = _place_given(address, token, fingerprint)

    @property
    def can_change(self) -> bool:
        """Whether there is a file that may say another place later."""
        return self._path is not None

    def look(self) -> None:
        """Read server.json; what it cannot tell stays as it was. Raises UsageError."""
        if self._path is None:
            return
        try:
            found = read_server_file(self._path)
        except OSError:
            return  # there is no server yet, or the file system is away, as a server may be
        self.place = Place(
            Address.parse(found.url),
            self._token or found.token,
            found.state == "complete",
            found.fingerprint,
        )

    def is_elsewhere(self, reply: tuple[int, bytes] | None) -> bool:
        """Say whether this reply, or none, may come from the server having moved."""
        return self.can_change and (reply is None or reply[0] in _MAYBE_ELSEWHERE)

    def outcome(self, call: Call[R], reply: tuple[int, bytes] | None) -> R:
        """Turn a reply, or none, into the call's result."""
        if reply is not None:
            return decode_reply(call, *reply)
        if self.stranger is not None:
            _say_once(f"{self.stranger}; waiting for the server")
        return call.when_over if self.is_over and call.when_over is not None else call.unavailable

    @property
    def is_over(self) -> bool:
        """Whether server.json said, when it was last read, that the run is complete."""
        return self.place is not None and self.place.is_over

    def note_failure(self, place: Place, error: BaseException | None) -> None:
        """Note as `stranger` who answers in the server's place; who is away just is."""
        self.stranger = self._who_answers(place, error) if place.address.is_encrypted else None

    def _who_answers(self, place: Place, error: BaseException | None) -> str | None:
        url = place.address.url
        if place.fingerprint is None and isinstance(error, ssl.SSLCertVerificationError):
            return (
                f"this system does not trust the certificate of {url} ({error.verify_message}), "
                "so nothing was sent to it; name the server as @STATE/server.json, or give the "
                "certificate's SHA-256 fingerprint with --server-fingerprint or in "
                "DISPATCHER_FINGERPRINT"
            )
        if isinstance(error, OtherCertificateError):
            named = f"{self._path} names" if self._path is not None else "was given"
            return (
                f"{url} shows another certificate than the one whose fingerprint {named}, so it "
                "is not this run's server and was sent nothing"
            )
        if isinstance(error, ssl.SSLError) and error.reason in _NOT_TLS:
            return f"{url} does not speak TLS, so it is not this run's server and was sent nothing"
        return None


def _place_given(address: str, token: str | None, fingerprint: str | None) -> Place:
    """Return the place that a user named without a server.json. Raises UsageError."""
    fingerprint = fingerprint_given(fingerprint)
    parsed = Address.parse(address, "https" if fingerprint is not None else "http")
    if fingerprint is not None and not parsed.is_encrypted:
        raise UsageError(
            f"{address} is not encrypted, although the fingerprint of its certificate is given "
            "(--server-fingerprint or DISPATCHER_FINGERPRINT); write https:// or leave that out"
        )
    return Place(parsed, token or token_given(None), fingerprint=fingerprint)


@functools.lru_cache(maxsize=64)
def _say_once(sentence: str) -> None:
    # Once in a process: a worker has two clients, which meet the same stranger again and again.
    log.warning("%s", sentence)


class Wire:
    """The calls of the protocol (docs/protocol.md), without I/O."""

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
            BatchWorkResponse(WorkStatus.ALL_WORK_COMPLETE),
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
        timeout_s = self._timeout_s
        if any(item.renew for item in body.items):
            timeout_s = min(timeout_s, RENEW_TIMEOUT_S)
        return Call(
            "POST",
            "/release",
            _encode_lone_surrogates_too(body),
            ReleaseWorkResponse,
            ReleaseWorkResponse(WorkStatus.SERVER_UNAVAILABLE),
            ReleaseWorkResponse(WorkStatus.SERVER_UNAVAILABLE),
            timeout_s,
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

    def record_steps(self, steps: Sequence[StepItem], worker: str | None) -> Call[StepsResponse]:
        """Hand in steps of items; an older server without the call records none."""
        return Call(
            "POST",
            "/steps",
            _encode_lone_surrogates_too(StepsSubmission(list(steps), worker)),
            StepsResponse,
            StepsResponse(WorkStatus.SERVER_UNAVAILABLE),
            StepsResponse(WorkStatus.OK, recording=False),
            self._timeout_s,
        )

    def status(self) -> Call[dict[str, Any]]:
        """Ask for the run's state."""
        return Call("GET", "/status", None, dict[str, Any], {}, {}, self._timeout_s)

    def order(self, path: str, body: Mapping[str, Any]) -> Call[dict[str, Any]]:
        """Tell the run something; what is answered is for `Answer`."""
        encoded = _encode_lone_surrogates_too(body)
        return Call("POST", path, encoded, dict[str, Any], {}, {}, self._timeout_s)


def decode_reply(call: Call[R], status: int, body: bytes) -> R:
    """Turn a reply into its object.

    Raises AccessDeniedError or BadRequestError when the server refused the call.
    """
    if status == 404:
        return call.when_missing
    if status >= 500 or status in _LATER:
        return call.unavailable
    what = f"{call.method} {call.path}"
    if status in (401, 403):
        raise AccessDeniedError(f"the server refused {what}: {_sentence(body)}{_WHICH_TOKEN}")
    if status == _SPEAKS_TLS:
        raise AccessDeniedError(f"the server refused {what}: {_sentence(body)}")
    if status >= 400:
        raise BadRequestError(f"the server refused {what}: {_sentence(body)}")
    try:
        return msgspec.json.decode(body, type=call.reply)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return call.unavailable  # cut off, or not a dispatcher server


def decode_answer(status: int, body: bytes) -> Answer | None:
    """Turn a reply to an order into what it says; None: no dispatcher server says so."""
    if status != 200:
        return Answer(status, _sentence(body))
    try:
        said = json.loads(body)
        return Answer(status, str(said["message"]), str(said.get("state", "")))
    except (ValueError, KeyError, TypeError):
        return None


def _sentence(body: bytes) -> str:
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace") or "no reason given"


def _encode_lone_surrogates_too(body: object) -> bytes:
    try:
        return _encode(body)
    except UnicodeEncodeError:
        # A text with half a surrogate pair cannot be UTF-8; as an escape it arrives, and the
        # server judges that one item instead of this client refusing the batch.
        return json.dumps(msgspec.to_builtins(body)).encode("ascii")


class _PinnedConnection(http.client.HTTPSConnection):
    """A connection on which nothing is sent before the one right certificate was shown."""

    def __init__(self, host: str, port: int, fingerprint: str) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # Who signed it does not matter, nor for which name: it is this one or none.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        super().__init__(host, port, context=context)
        self._fingerprint = fingerprint

    def connect(self) -> None:
        """Connect, and hang up on another certificate. Raises OtherCertificateError."""
        super().connect()
        shown = self.sock.getpeercert(binary_form=True)
        if shown is None or fingerprint_of(shown) != self._fingerprint:
            self.close()
            raise OtherCertificateError("another certificate")


def _connection_to(place: Place) -> http.client.HTTPConnection:
    address = place.address
    if place.fingerprint is not None:
        return _PinnedConnection(address.host, address.port, place.fingerprint)
    if address.is_encrypted:
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(address.host, address.port, context=context)
    return http.client.HTTPConnection(address.host, address.port)


class WorkClient:
    """Synchronous client; safe to share between threads (calls wait for each other).

    `token` is needed unless the address is @PATH or DISPATCHER_TOKEN holds it; `fingerprint`, the
    SHA-256 of the server's certificate, where the server speaks TLS with one of its own, unless
    the address is @PATH or DISPATCHER_FINGERPRINT holds it. Calls raise AccessDeniedError when
    the server wants another token, and UsageError when PATH cannot be trusted.
    """

    def __init__(
        self,
        address: str,
        worker: str | None = None,
        *,
        token: str | None = None,
        fingerprint: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self._location = Location(address, token, fingerprint)
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

    def record_steps(self, steps: Sequence[StepItem]) -> StepsResponse:
        """Hand in answers that tasks got, so that nobody asks for them again."""
        return self._send(self._wire.record_steps(steps, self._worker))

    def heartbeat(self, request: HeartbeatRequest) -> HeartbeatResponse:
        """Say that this worker is alive and what it holds."""
        return self._send(self._wire.heartbeat(request))

    def status(self) -> dict[str, Any]:
        """Return the run's state; empty when the server cannot be reached."""
        return self._send(self._wire.status())

    def order(self, path: str, body: Mapping[str, Any]) -> Answer | None:
        """Tell the run something, with the admin token; None when nobody answers."""
        reply = self._reply(self._wire.order(path, body))
        return decode_answer(*reply) if reply is not None else None

    @property
    def stranger(self) -> str | None:
        """Who answered in the server's place at the last call, in a sentence, if anybody did."""
        return self._location.stranger

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
        return self._location.outcome(call, self._reply(call))

    def _reply(self, call: Call[Any]) -> tuple[int, bytes] | None:
        with self._lock:
            if self._location.place is None:
                self._location.look()
            asked = self._location.place
            reply = self._ask(call, asked)
            if self._location.is_elsewhere(reply):
                self._location.look()
                now = self._location.place
                if now is not None and not now.is_like(asked):
                    self._drop_connection()
                    reply = self._ask(call, now)
            return reply

    def _ask(self, call: Call[Any], place: Place | None) -> tuple[int, bytes] | None:
        """Return status and body of the reply, or None when there is none to be had."""
        if place is None:
            return None
        # A kept connection may have been closed by the server meanwhile: try a fresh one.
        for is_fresh in (self._connection is None, True):
            try:
                return self._exchange(call, place)
            except (OSError, http.client.HTTPException, ValueError, OverflowError) as error:
                # The last two: a length in the reply that is no length.
                self._drop_connection()
                self._location.note_failure(place, error)
                if is_fresh:
                    break
        return None

    def _exchange(self, call: Call[Any], place: Place) -> tuple[int, bytes]:
        address = place.address
        if self._connection is None:
            self._connection = _connection_to(place)
        connection = self._connection
        connection.timeout = call.timeout_s
        if connection.sock is not None:
            connection.sock.settimeout(call.timeout_s)
        path = address.prefix + call.path
        connection.request(call.method, path, call.body, place.headers(call))
        reply = connection.getresponse()
        return reply.status, reply.read()

    def _drop_connection(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class AsyncWorkClient:
    """Asynchronous client on aiohttp; proxy variables never apply to the dispatcher.

    `token`, `fingerprint` and what calls raise is as for WorkClient.
    """

    def __init__(
        self,
        address: str,
        worker: str | None = None,
        *,
        token: str | None = None,
        fingerprint: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self._location = Location(address, token, fingerprint)
        self._worker = worker
        self._wire = Wire(timeout_s)
        self._session: aiohttp.ClientSession | None = None
        self._trust: tuple[Place, ssl.SSLContext | aiohttp.Fingerprint | bool] | None = None

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

    async def record_steps(self, steps: Sequence[StepItem]) -> StepsResponse:
        """Hand in answers that tasks got, so that nobody asks for them again."""
        return await self._send(self._wire.record_steps(steps, self._worker))

    async def heartbeat(self, request: HeartbeatRequest) -> HeartbeatResponse:
        """Say that this worker is alive and what it holds."""
        return await self._send(self._wire.heartbeat(request))

    async def status(self) -> dict[str, Any]:
        """Return the run's state; empty when the server cannot be reached."""
        return await self._send(self._wire.status())

    @property
    def left_complete(self) -> bool:
        """Whether the server, when it left, wrote into server.json that its run is complete."""
        return self._location.is_over

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _send(self, call: Call[R]) -> R:
        # The file may be on a slow shared file system: it is read in a thread.
        if self._location.place is None:
            await asyncio.to_thread(self._location.look)
        asked = self._location.place
        reply = await self._ask(call, asked)
        if self._location.is_elsewhere(reply):
            await asyncio.to_thread(self._location.look)
            now = self._location.place
            if now is not None and not now.is_like(asked):
                reply = await self._ask(call, now)
        return self._location.outcome(call, reply)

    async def _ask(self, call: Call[Any], place: Place | None) -> tuple[int, bytes] | None:
        """Return status and body of the reply, or None when there is none to be had."""
        import aiohttp

        if place is None:
            return None
        if self._session is None:
            self._session = aiohttp.ClientSession(trust_env=False)
        try:
            async with self._session.request(
                call.method,
                place.address.url + call.path,
                data=call.body,
                headers=place.headers(call),
                ssl=self._trusted(place),
                timeout=aiohttp.ClientTimeout(total=call.timeout_s, connect=10.0),
                allow_redirects=False,
            ) as reply:
                return reply.status, await reply.read()
        except aiohttp.ServerFingerprintMismatch:
            self._location.note_failure(place, OtherCertificateError("another certificate"))
            return None
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            self._location.note_failure(place, error.__cause__)
            return None

    def _trusted(self, place: Place) -> ssl.SSLContext | aiohttp.Fingerprint | bool:
        """Return what aiohttp is to check before it sends anything; the same for the same place.

        It keeps connections by that, and by where they lead.
        """
        import aiohttp

        if self._trust is None or not place.is_like(self._trust[0]):
            what: ssl.SSLContext | aiohttp.Fingerprint | bool = True
            if place.fingerprint is not None:
                what = aiohttp.Fingerprint(bytes.fromhex(place.fingerprint))
            elif place.address.is_encrypted:
                what = ssl.create_default_context()
            self._trust = (place, what)
        return self._trust[1]
