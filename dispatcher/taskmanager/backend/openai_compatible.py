"""Any server that speaks OpenAI's HTTP interface; the hot path of the task manager.

aiohttp directly, because a client library costs several times the CPU of the request itself and
thousands are in flight. Who is to blame for a failed request decides what happens:

    cannot connect, 429, 503            the server: wait for it, however long; nothing is lost
    5xx, time-out, cut off, no JSON     ask the server whether it lives. If not: as above. If so,
                                        the request is at fault: TRIES tries, then an error
    other 4xx                           the request is at fault: an error at once
"""

from __future__ import annotations

import asyncio
import logging
import re
from dataclasses import dataclass, field
from random import Random
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec

from dispatcher.core.backoff import delay_s
from dispatcher.errors import BackendError, UsageError
from dispatcher.taskmanager.backend.base import Backend
from dispatcher.taskmanager.backend.request import Request, Response

TRIES = 3
_PROBE_TIMEOUT_S = 5.0
_FIRST_DELAY_S = 0.25
_LONGEST_DELAY_S = 10.0
_ERROR_CHARACTERS = 2000

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and as whom to ask. `model` is filled in where a request names none."""

    base_url: str
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    request_timeout_s: float = 600.0

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
class _Reply:
    status: int
    body: bytes
    retry_after_s: float | None = None


class OpenAICompatibleBackend(Backend):
    """Answers requests from one endpoint; waits while it is away or overloaded."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__()
        self._endpoint = endpoint
        self._base_url = endpoint.base_url.rstrip("/")
        self._session: aiohttp.ClientSession | None = None
        self._serving = asyncio.Event()
        self._serving.set()
        self._recovering: asyncio.Task[None] | None = None
        self._dead: BackendError | None = None
        self._rng = Random()

    async def start(self) -> None:
        """Open the connection pool."""
        headers = {"Content-Type": "application/json"}
        if self._endpoint.api_key:
            headers["Authorization"] = f"Bearer {self._endpoint.api_key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            timeout=aiohttp.ClientTimeout(total=self._endpoint.request_timeout_s),
            headers=headers,
            trust_env=not self._endpoint.is_local,
            auto_decompress=True,
        )

    async def wait_until_serving(self, timeout_s: float) -> None:
        """Return when the endpoint answers. Raises BackendError after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while not await self._probe():  # noqa: ASYNC110 (a probe is all there is)
                    await asyncio.sleep(_FIRST_DELAY_S)
        except TimeoutError:
            raise BackendError(
                f"no model server answers at {self._base_url} within {timeout_s:.0f} s; check "
                "the address, and that the server is running"
            ) from None

    def healthy(self) -> bool:
        """Say whether the endpoint answered when it was last needed."""
        return self._serving.is_set() and self._dead is None

    def declare_dead(self, error: BackendError) -> None:
        """The server's process ended: every request, waiting ones too, raises this from now."""
        self._dead = error
        self._serving.set()

    async def close(self) -> None:
        """Close all connections."""
        if self._recovering is not None:
            self._recovering.cancel()
        if self._session is not None:
            await self._session.close()

    async def process(self, request: Request) -> Response:
        """Answer one request. Raises BackendError only when the server is gone for good."""
        content, model = request.content, self._endpoint.model
        try:
            if not isinstance(content, dict):
                raise TypeError(f"its content is {type(content).__name__}, not a dict")
            if "model" not in content and model is not None:
                content = {**content, "model": model}
            model = content.get("model")
            path, body = _path_of(content), msgspec.json.encode(content)
        except (ValueError, TypeError, RecursionError) as error:
            return Response.from_error(request, f"the request cannot be sent: {error}", model)
        faults = overloads = 0
        while True:
            await self._serving.wait()
            if self._dead is not None:
                raise self._dead
            try:
                reply = await self._post(path, body)
            except aiohttp.ClientConnectorError as error:
                self._note_outage(error)
                continue
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                problem = f"{type(error).__name__}: {error}".rstrip(": ")
            else:
                if reply.status in (429, 503):
                    overloads += 1
                    await asyncio.sleep(self._overload_delay_s(reply, overloads))
                    continue
                if 400 <= reply.status < 500:
                    return Response.from_error(request, _describe(reply), model)
                if reply.status < 400 and (answer := _answer_of(reply)) is not None:
                    self._count(answer)
                    return Response(request, answer, model_name=model)
                problem = _describe(reply)
            if not await self._probe():
                self._note_outage(problem)
                continue
            faults += 1
            if faults == TRIES:
                text = f"{problem} (in {TRIES} tries, while the server was answering)"
                return Response.from_error(request, text, model)
            await asyncio.sleep(self._delay_s(faults))

    # ---------------------------------------------------------------- inside

    async def _post(self, path: str, body: bytes) -> _Reply:
        assert self._session is not None
        async with self._session.post(self._base_url + path, data=body) as reply:
            return _Reply(reply.status, await reply.read(), _retry_after_s(reply))

    async def _probe(self) -> bool:
        """Say whether the server answers at all."""
        assert self._session is not None
        try:
            async with self._session.get(
                f"{self._base_url}/models", timeout=aiohttp.ClientTimeout(total=_PROBE_TIMEOUT_S)
            ) as reply:
                return reply.status < 500
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    def _note_outage(self, problem: object) -> None:
        """Let every request wait until the server answers again; one task asks for all."""
        if self._serving.is_set() and self._dead is None:
            log.warning("the model server at %s is away (%s); waiting", self._base_url, problem)
            self._serving.clear()
            self._recovering = asyncio.ensure_future(self._recover())

    async def _recover(self) -> None:
        tries = 0
        while not await self._probe():
            tries += 1
            await asyncio.sleep(self._delay_s(tries))
        log.warning("the model server at %s answers again", self._base_url)
        self._serving.set()

    def _overload_delay_s(self, reply: _Reply, times: int) -> float:
        return max(self._delay_s(times), reply.retry_after_s or 0.0)

    def _delay_s(self, times: int) -> float:
        return delay_s(times, initial_s=_FIRST_DELAY_S, max_s=_LONGEST_DELAY_S, rng=self._rng)

    def _count(self, answer: dict[str, Any]) -> None:
        self.usage.requests += 1
        usage = answer.get("usage")
        if isinstance(usage, dict):
            self.usage.prompt_tokens += _whole(usage.get("prompt_tokens"))
            self.usage.completion_tokens += _whole(usage.get("completion_tokens"))


def _path_of(content: dict[str, Any]) -> str:
    if "messages" in content:
        return "/chat/completions"
    if "prompt" in content:
        return "/completions"
    if "input" in content:
        return "/embeddings"
    raise ValueError("it has neither `messages` (chat), `prompt` (completion) nor `input`")


def _answer_of(reply: _Reply) -> dict[str, Any] | None:
    try:
        answer = msgspec.json.decode(reply.body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return answer if isinstance(answer, dict) else None


def _describe(reply: _Reply) -> str:
    text = reply.body[:_ERROR_CHARACTERS].decode("utf-8", "replace")
    error: Any = (_answer_of(reply) or {}).get("error")
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        text = error["message"]
    return f"HTTP {reply.status}: {text}"


def _retry_after_s(reply: aiohttp.ClientResponse) -> float | None:
    try:
        return min(float(reply.headers["Retry-After"]), 3600.0)
    except (KeyError, ValueError):
        return None


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0
