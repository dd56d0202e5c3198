"""Any server that speaks OpenAI's HTTP interface; the hot path of the task manager.

Who is to blame for a failed request decides what happens:

    cannot connect, 429, 503            the server: wait for it, however long; nothing is lost
    5xx, time-out, cut off, no JSON     ask the server whether it lives. If not: as above. If so,
                                        the request is at fault: a few tries, then an error
    401, or the model is not there      the command: the work ends, everything is given back
    the quota of the day is used up     nobody: the work ends, and goes on another day
    other 4xx                           the request is at fault: an error at once

A slot is held only while a request is in flight, never while it waits to be sent again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import aiohttp
import msgspec

from dispatcher.core.backoff import delay_s
from dispatcher.core.limiter import AdaptiveLimiter
from dispatcher.core.saturation import Saturation
from dispatcher.errors import (
    AuthenticationError,
    BackendError,
    BackendRefusalError,
    QuotaExhaustedError,
)
from dispatcher.models import ModelStats
from dispatcher.taskmanager.backend.accounts import Account
from dispatcher.taskmanager.backend.autoscale import AutoScaler
from dispatcher.taskmanager.backend.base import DEFAULT_LIMIT, Backend
from dispatcher.taskmanager.backend.bodies import Call, Sending, prepare
from dispatcher.taskmanager.backend.http import Endpoint, Reply, Transport
from dispatcher.taskmanager.backend.rate_limits import RateLimit, read_limits
from dispatcher.taskmanager.backend.request import Request, Response
from dispatcher.taskmanager.backend.servers import Servers
from dispatcher.taskmanager.backend.slots import RequestSlots
from dispatcher.taskmanager.backend.streaming import StreamError

__all__ = ["Endpoint", "OpenAICompatibleBackend", "RetryPolicy"]

OVERLOADED = (429, 503)
_ERROR_CHARACTERS = 2000

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How a request is tried again: delays double from the first to the longest, with jitter.

    `max_retries` bounds the further tries of a request whose own fault it is.
    """

    max_retries: int = 2
    initial_delay_s: float = 0.25
    max_delay_s: float = 10.0


class OpenAICompatibleBackend(Backend):
    """Answers requests for one model, from one server or several that serve the same.

    The number of requests in flight is fixed by `limit`, or follows what the server bears: by its
    answers with a `limiter`, by what an engine tells of its load with a `saturation`. Whoever has
    `slots` of his own, to set their limit, gives them instead.
    """

    def __init__(
        self,
        endpoints: Endpoint | Sequence[Endpoint],
        *,
        limit: int = DEFAULT_LIMIT,
        limiter: AdaptiveLimiter | None = None,
        saturation: Saturation | None = None,
        slots: RequestSlots | None = None,
        retries: RetryPolicy | None = None,
        sending: Sending | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        follows = limiter or saturation
        super().__init__(follows.limit if follows is not None else limit)
        if slots is not None:
            self.slots = slots
        self._endpoints = [endpoints] if isinstance(endpoints, Endpoint) else list(endpoints)
        self.model = self._endpoints[0].model
        self.limiter = limiter
        self.saturation = saturation
        self._following: asyncio.Task[None] | None = None
        self._retries = retries or RetryPolicy()
        self._sending = sending or Sending()
        self._clock = clock
        self._rng = Random()
        self._servers = Servers(self._next_delay_s)
        self._accounts: dict[str, Account] = {}
        # Requests inside `process`, and those of them that do not just wait to be tried again.
        self._unanswered = self._asking = 0
        self._in_flight: Counter[int] = Counter()
        self._paused_until = 0.0
        self.restarts = 0

    # ---------------------------------------------------------------- life

    async def start(self) -> None:
        """Open the connection pools."""
        self._servers.open(self._endpoints)
        if self.saturation is not None:
            self.slots.set_limit(self.saturation.limit)
            scaler = AutoScaler(
                self._servers.metrics, self.slots, lambda: self.slots.in_use, self.saturation
            )
            self._following = asyncio.ensure_future(scaler.run())

    async def wait_until_serving(self, timeout_s: float) -> None:
        """Return when a server answers. Raises BackendError after `timeout_s`."""
        await self._servers.wait_for_first(timeout_s)

    async def close(self) -> None:
        """Close all connections."""
        if self._following is not None:
            self._following.cancel()
        await self._servers.close()

    def healthy(self) -> bool:
        """Say whether a server answered when one was last needed."""
        return self._servers.is_open and self._servers.dead is None

    def declare_away(self, reason: object) -> None:
        """The server is being started again: requests wait until `move_to`."""
        self._servers.declare_away(reason)

    def declare_dead(self, error: BackendError) -> None:
        """There is no server any more: every request, waiting ones too, raises this from now."""
        self._servers.declare_dead(error)

    async def move_to(self, endpoint: Endpoint) -> None:
        """The server answers there now."""
        self.restarts += 1
        await self._servers.move_to(endpoint)

    def orders_in_flight(self) -> set[int]:
        """Return the orders of the items whose requests the server has, or had when it went."""
        return set(self._in_flight)

    @property
    def unanswered(self) -> int:
        """Requests that are not answered yet, wherever they wait."""
        return self._unanswered

    def idle_s(self) -> float:
        """Return the seconds since a server last answered a request, if only with a refusal.

        That it is overloaded, or failed, is no answer.
        """
        return self._clock() - self._servers.answered_at

    @property
    def transport(self) -> Transport:
        """The connections to the first server."""
        return self._servers.first

    # ---------------------------------------------------------------- what the manager asks

    def room(self) -> int:
        """Return how many more items may be started now; requests that wait to be sent count."""
        return self.slots.limit - self._asking

    def accounts(self) -> Mapping[str, ModelStats]:
        """Return what each model answered."""
        limit, in_flight, restarts = self.slots.limit, self.slots.in_use, self.restarts
        found: dict[str, ModelStats] = {}
        for name, account in list(self._accounts.items()):  # asked for by another thread
            found[name] = account.stats(in_flight, limit, restarts)
            in_flight = limit = restarts = 0  # they are of all models together: shown once
        return found

    async def process(self, request: Request, order: int = 0) -> Response:
        """Answer one request.

        Raises BackendError only when no request can be answered any more.
        """
        try:
            call = prepare(request.content, self.model, self._sending)
        except (ValueError, TypeError, RecursionError) as error:
            model = request.content.get("model") if isinstance(request.content, dict) else None
            return Response.from_error(
                request, f"the request cannot be sent: {error}", model or self.model
            )
        self._asking += 1
        self._unanswered += 1
        try:
            return await self._until_answered(request, call, order)
        finally:
            self._asking -= 1
            self._unanswered -= 1

    # ---------------------------------------------------------------- one request

    async def _until_answered(self, request: Request, call: Call, order: int) -> Response:
        account = self._account(call.model)
        faults = overloads = 0
        while True:
            server = await self._turn(order)
            sent_at = self._clock()
            self._in_flight[order] += 1
            try:
                result = await self._send(server, call)
                if isinstance(result, str) and not await self._servers.lives(server):
                    # Until the server is back this counts as in flight: it may have killed it.
                    self._servers.note_outage(server, result)
                    await self._servers.wait()
                    continue
            except aiohttp.ClientConnectorError as error:
                self._servers.note_outage(server, error)
                continue
            finally:
                self._forget(order)
            now = self._clock()
            if isinstance(result, _Answer):
                account.note_answer(result.content, now - sent_at, result.reply.ttft_s)
                self._note_success(result.reply, sent_at, now)
                return Response(request, result.content, model_name=call.model)
            if isinstance(result, Reply) and result.status not in OVERLOADED:
                self._check_refusal(result, call)
                account.note_error()
                return Response.from_error(request, _describe(result), call.model)
            if isinstance(result, Reply):
                self._note_overload(result, sent_at, now)
                overloads += 1
                account.note_overload()
                await self._back_off(overloads, self._wait_of(result, call))
                continue
            self._note_failure(sent_at, now)
            faults += 1
            if faults > self._retries.max_retries:
                account.note_error()
                text = f"{result} (in {faults} tries, while the server was answering)"
                return Response.from_error(request, text, call.model)
            account.note_retry()
            await self._back_off(faults)

    async def _turn(self, order: int) -> Transport:
        """Return the server to ask, once it is this request's turn; it holds a slot then."""
        while True:
            await self._servers.wait()
            if (left_s := self._paused_until - self._clock()) > 0:
                await asyncio.sleep(left_s)
                continue
            await self.slots.acquire(order)
            if self._servers.dead is None and self._clock() >= self._paused_until:
                server = self._servers.pick()
                if server is not None:
                    return server
            self.slots.release()

    async def _send(self, server: Transport, call: Call) -> _Answer | Reply | str:
        """Return the answer, a refusal (4xx, 503), or what went wrong; give the slot back.

        Raises ClientConnectorError when there is no server to send it to.
        """
        try:
            if call.streamed:
                reply = await server.post_streamed(call.path, call.body)
            else:
                reply = await server.post(call.path, call.body)
        except aiohttp.ClientConnectorError:
            raise
        except StreamError as error:
            if error.status is None:
                return f"the stream broke off: {error}"
            body = msgspec.json.encode({"error": {"message": str(error)}})
            reply = Reply(error.status, body, {})
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return f"{type(error).__name__}: {error}".rstrip(": ")
        finally:
            self.slots.release()
        if reply.status in OVERLOADED:
            return reply
        if reply.status < 500:
            self._servers.answered_at = self._clock()
        if 400 <= reply.status < 500:
            return reply
        content = _object_in(reply.body) if reply.status < 400 else None
        return _Answer(reply, content) if content is not None else _describe(reply)

    # ---------------------------------------------------------------- what follows from it

    def _note_success(self, reply: Reply, sent_at: float, now: float) -> None:
        self._heed_headers(reply, now)
        if self.limiter is not None:
            in_flight = self.slots.in_use + 1  # this one gave its slot back already
            self.limiter.note_answer(sent_at, now, reply.ttft_s, in_flight)
            self._follow_limiter()

    def _heed_headers(self, reply: Reply, now: float) -> None:
        """Send nothing for a while when the headers say that nothing is left.

        A refusal without such headers is about one request: there are too many in flight.
        """
        limits = read_limits(reply.headers, None, 200, time.time())
        if limits.pause_s > 0 and not limits.is_quota_exhausted:  # which the next refusal tells
            self._pause(limits, now)

    def _note_overload(self, reply: Reply, sent_at: float, now: float) -> None:
        self._heed_headers(reply, now)
        if self.limiter is not None:
            self.limiter.note_overload(sent_at, now)
            self._follow_limiter()

    def _note_failure(self, sent_at: float, now: float) -> None:
        if self.limiter is not None:
            self.limiter.note_failure(sent_at, now)
            self._follow_limiter()

    def _follow_limiter(self) -> None:
        assert self.limiter is not None
        if self.limiter.limit != self.slots.limit:
            self.slots.set_limit(self.limiter.limit)

    def _wait_of(self, reply: Reply, call: Call) -> float:
        """Return the seconds an overloaded server asks to wait. Raises QuotaExhaustedError."""
        return self._check_quota(reply, call).pause_s

    def _check_quota(self, reply: Reply, call: Call) -> RateLimit:
        limits = read_limits(reply.headers, _error_in(reply), reply.status, time.time())
        if limits.is_quota_exhausted:
            error = self._quota_error(call, limits)
            self.declare_dead(error)
            raise error
        return limits

    def _pause(self, limits: RateLimit, now: float) -> None:
        """Send nothing for a while: the next request would be refused."""
        if now + limits.pause_s > self._paused_until + 1.0:
            log.info("%s: nothing is sent for %.1f s (%s)", self.model, limits.pause_s, limits.what)
        self._paused_until = max(self._paused_until, now + limits.pause_s)

    async def _back_off(self, times: int, least_s: float = 0.0) -> None:
        """Wait before the next try. Meanwhile there is room for another item."""
        self._asking -= 1
        self.slots.on_growth()
        try:
            await asyncio.sleep(max(self._next_delay_s(times), least_s))
        finally:
            self._asking += 1

    def _next_delay_s(self, times: int) -> float:
        policy = self._retries
        return delay_s(
            times, initial_s=policy.initial_delay_s, max_s=policy.max_delay_s, rng=self._rng
        )

    def _check_refusal(self, reply: Reply, call: Call) -> None:
        """Raise what ends the work: nothing that is asked of this server can succeed."""
        self._check_quota(reply, call)
        endpoint = self._endpoints[0]
        if reply.status == 401:
            error: BackendRefusalError = AuthenticationError(
                f"the model server at {endpoint.base_url} refused the key (HTTP 401: "
                f"{_message_of(reply)}); set {endpoint.key_source} to a valid one"
            )
        elif reply.status == 404 and call.model == self.model and _names_model(reply):
            error = BackendRefusalError(
                f"the model server at {endpoint.base_url} has no model {call.model!r} "
                f"({_message_of(reply)}); its names are listed at {endpoint.base_url}/models"
            )
        else:
            return
        self.declare_dead(error)
        raise error

    def _quota_error(self, call: Call, limits: RateLimit) -> QuotaExhaustedError:
        when = f"in {limits.pause_s / 3600:.1f} h" if limits.pause_s else "when it is renewed"
        return QuotaExhaustedError(
            f"the quota of {call.model} at {self._endpoints[0].base_url} is used up "
            f"({limits.what}); what was not finished was given back: start again {when}"
        )

    # ---------------------------------------------------------------- inside

    def _account(self, model: str | None) -> Account:
        name = str(model)
        account = self._accounts.get(name)
        if account is None:
            account = self._accounts[name] = Account()
        return account

    def _forget(self, order: int) -> None:
        self._in_flight[order] -= 1
        if self._in_flight[order] <= 0:
            del self._in_flight[order]


@dataclass(frozen=True, slots=True)
class _Answer:
    reply: Reply
    content: dict[str, Any]


def _object_in(body: bytes) -> dict[str, Any] | None:
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return content if isinstance(content, dict) else None


def _error_in(reply: Reply) -> dict[str, Any] | None:
    error = (_object_in(reply.body) or {}).get("error")
    return error if isinstance(error, dict) else None


def _message_of(reply: Reply) -> str:
    message = (_error_in(reply) or {}).get("message")
    if isinstance(message, str):
        return message
    return reply.body[:_ERROR_CHARACTERS].decode("utf-8", "replace")


def _describe(reply: Reply) -> str:
    return f"HTTP {reply.status}: {_message_of(reply)}"


def _names_model(reply: Reply) -> bool:
    error = _error_in(reply) or {}
    return error.get("param") == "model" or error.get("code") == "model_not_found"
