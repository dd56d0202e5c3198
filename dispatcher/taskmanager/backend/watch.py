"""Whether a model server makes progress: a health page that answers is not life.

A server is hung when requests have been in flight for the whole of a time-out in which none of its
counters moved and no answer came, and a request for one token, sent then, was not answered either.
One that is busy moves its counters; one that is idle is left alone.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Hashable
from typing import Protocol

import aiohttp
import msgspec

from dispatcher.taskmanager.backend.engine_metrics import progress_mark
from dispatcher.taskmanager.backend.openai_compatible import OpenAICompatibleBackend

_PROBE_TIMEOUT_S = 60.0
_POLLS = 20
_MARKS = 4
_SHORTEST_POLL_S = 0.2
_SHORTEST_MARK_S = 1.0
# Counts with every token; its other counters move when an answer is whole.
_LLAMA_CPP = re.compile(r"^llamacpp:n_decode_total \S+", re.MULTILINE)
_LONGEST_POLL_S = 5.0


class HangDetector:
    """The decision, without I/O. `longest_step_s` bounds what one look adds to the quiet time.

    With that bound the time in which this process itself was stopped is not the server's.
    """

    def __init__(self, timeout_s: float, longest_step_s: float) -> None:
        self._timeout_s = timeout_s
        self._longest_step_s = longest_step_s
        self._looked_at: float | None = None
        self._mark: Hashable | None = None
        self.quiet_s = 0.0

    def look(self, now: float, *, in_flight: int, idle_s: float, mark: Hashable | None) -> bool:
        """Note what is seen at `now`; return whether it is time to ask for a sign of life.

        `idle_s` is the time since the last answer; `mark` changes when the server gets on, and is
        None when it does not tell.
        """
        step_s = now - self._looked_at if self._looked_at is not None else 0.0
        self._looked_at = now
        # Requests that timed out wait a while before they are sent again: the time in which none
        # is in flight is not counted, but does not prove anything either.
        if in_flight:
            self.quiet_s += min(step_s, self._longest_step_s)
        self.quiet_s = min(self.quiet_s, idle_s)
        if mark is not None and mark != self._mark:
            self._mark = mark
            self.quiet_s = 0.0
        return self.quiet_s >= self._timeout_s

    def note_life(self) -> None:
        """The server answered when it was asked."""
        self.quiet_s = 0.0


class Engine(Protocol):
    """What is watched."""

    def in_flight(self) -> int:
        """Return the requests being answered now."""

    def idle_s(self) -> float:
        """Return the seconds since the last answer."""

    async def mark(self, timeout_s: float) -> Hashable | None:
        """Return what changes when it gets on; None when it does not say."""

    async def probe(self, timeout_s: float) -> bool:
        """Ask for one token; return whether an answer came."""


async def until_hung(
    engine: Engine, timeout_s: float, clock: Callable[[], float] = time.monotonic
) -> str:
    """Watch a server; return what it does, as in "hangs: ...", once it hangs."""
    poll_s = min(max(timeout_s / _POLLS, _SHORTEST_POLL_S), _LONGEST_POLL_S)
    mark_timeout_s = min(max(timeout_s / _MARKS, _SHORTEST_MARK_S), _LONGEST_POLL_S)
    detector = HangDetector(timeout_s, 2 * (poll_s + mark_timeout_s))

    async def look() -> bool:
        mark = await engine.mark(mark_timeout_s)
        return detector.look(
            clock(), in_flight=engine.in_flight(), idle_s=engine.idle_s(), mark=mark
        )

    while True:
        await asyncio.sleep(poll_s)
        if not await look():
            continue
        if await engine.probe(min(timeout_s, _PROBE_TIMEOUT_S)):
            detector.note_life()
        elif await look():  # else it got on in the meantime
            return (
                f"hangs: for {detector.quiet_s:.0f} s it made no progress, with "
                f"{engine.in_flight()} requests unanswered, and it did not answer one for a single "
                "token (--hang-timeout)"
            )


class HttpEngine:
    """A server seen through the connections that its requests take."""

    def __init__(self, client: OpenAICompatibleBackend) -> None:
        self._client = client

    def in_flight(self) -> int:
        """Return the requests that wait for it, if only for it to stop saying 503."""
        return self._client.unanswered

    def idle_s(self) -> float:
        """Return the seconds since the last answer."""
        return self._client.idle_s()

    async def mark(self, timeout_s: float) -> Hashable | None:
        """Return the counters of its metrics page; None when it has no such page."""
        page = await self._client.transport.get("//metrics", timeout_s)
        if page is None or page.status != 200:
            return None
        return mark_of(page.body.decode("utf-8", "replace"))

    async def probe(self, timeout_s: float) -> bool:
        """Ask for one token; a refusal is an answer, too."""
        transport = self._client.transport
        body = {"model": self._client.model, "prompt": "1", "max_tokens": 1}
        try:
            async with asyncio.timeout(timeout_s):
                reply = await transport.post("/completions", msgspec.json.encode(body))
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False
        return reply.status < 500


def mark_of(page: str) -> Hashable | None:
    """Return the counters of a metrics page, of vLLM's kind or llama.cpp's; None without any."""
    return progress_mark(page) or tuple(_LLAMA_CPP.findall(page)) or None
