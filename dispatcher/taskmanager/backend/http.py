"""HTTP to one model server: aiohttp directly, because a client library costs several times the
CPU of the request itself and thousands are in flight.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import aiohttp
import msgspec
from yarl import URL

from dispatcher.errors import UsageError
from dispatcher.taskmanager.backend.streaming import DONE, AnswerBuilder, EventParser

PROBE_TIMEOUT_S = 5.0
_IDLE_CONNECTION_S = 60.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and as whom to ask. `model` is filled in where a request names none.

    `key_source` tells a user where the key came from, or should have come from.
    """

    base_url: str
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    request_timeout_s: float = 600.0
    key_source: str = "the API key"

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(
                f"--base-url {self.base_url!r} is not a URL; give one like http://HOST:8000/v1"
            )

    @property
    def is_local(self) -> bool:
        """True for an engine of this machine or cluster, which no proxy stands before."""
        host = urlsplit(self.base_url).hostname or ""
        return "." not in host or re.fullmatch(r"[\d.]+", host) is not None


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. `ttft_s` is the time to the first token, None when it was not streamed."""

    status: int
    body: bytes
    headers: Mapping[str, str]
    ttft_s: float | None = None


class Transport:
    """The connections to one server. `in_flight` requests are being answered by it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.base_url = endpoint.base_url.rstrip("/")
        self.in_flight = 0
        # Made once: a URL is parsed anew for every request otherwise.
        self._urls: dict[str, URL] = {}
        headers = {"Content-Type": "application/json"}
        if endpoint.api_key:
            headers["Authorization"] = f"Bearer {endpoint.api_key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_CONNECTION_S),
            timeout=aiohttp.ClientTimeout(total=endpoint.request_timeout_s),
            headers=headers,
            trust_env=not endpoint.is_local,
            auto_decompress=True,
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def post(self, path: str, body: bytes) -> Reply:
        """Send a request; raises what aiohttp raises when no whole answer comes."""
        self.in_flight += 1
        try:
            async with self._session.post(self._url(path), data=body) as reply:
                return Reply(reply.status, await reply.read(), reply.headers)
        finally:
            self.in_flight -= 1

    async def post_streamed(self, path: str, body: bytes) -> Reply:
        """Send a request that asks for a stream; the answer's body is as if it had not been one.

        Raises also StreamError, for what went wrong after the answer had begun.
        """
        self.in_flight += 1
        sent_at = time.perf_counter()
        try:
            async with self._session.post(self._url(path), data=body) as reply:
                if reply.content_type != "text/event-stream":
                    return Reply(reply.status, await reply.read(), reply.headers)
                ttft_s, answer = await _gather(reply, sent_at)
                return Reply(reply.status, answer, reply.headers, ttft_s)
        finally:
            self.in_flight -= 1

    async def get(self, path: str, timeout_s: float = PROBE_TIMEOUT_S) -> Reply | None:
        """Return what stands at a path below the base URL, or from the root (a path that begins
        with `//`); None when there is no answer.
        """
        try:
            async with self._session.get(
                self._url(path), timeout=aiohttp.ClientTimeout(total=timeout_s)
            ) as reply:
                return Reply(reply.status, await reply.read(), reply.headers)
        except (aiohttp.ClientError, TimeoutError, OSError, RuntimeError):
            return None  # RuntimeError: the connections were closed meanwhile

    def _url(self, path: str) -> URL:
        if (url := self._urls.get(path)) is None:
            root = self.base_url.removesuffix("/v1")
            text = root + path[1:] if path.startswith("//") else self.base_url + path
            url = self._urls[path] = URL(text)
        return url


async def _gather(reply: aiohttp.ClientResponse, sent_at: float) -> tuple[float, bytes]:
    """Read a stream to its end; return the time to its first token and the whole answer."""
    parser, builder = EventParser(), AnswerBuilder()
    ttft_s: float | None = None
    ended = False
    async for data in reply.content.iter_any():
        for event in parser.feed(data):
            if event is DONE:
                ended = True
            else:
                builder.add(event)
        if ttft_s is None and builder.has_token:
            ttft_s = time.perf_counter() - sent_at
    if not (ended or builder.is_complete):
        raise aiohttp.ClientPayloadError("the stream ended before the answer did")
    if ttft_s is None:  # an answer without any text
        ttft_s = time.perf_counter() - sent_at
    return ttft_s, msgspec.json.encode(builder.answer())
