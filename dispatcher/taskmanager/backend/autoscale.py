"""`--workers auto`: the limit of a backend follows what its engine tells at `/metrics`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

import aiohttp

from dispatcher.core.saturation import Saturation
from dispatcher.taskmanager.backend.engine_metrics import engine_load
from dispatcher.taskmanager.backend.slots import RequestSlots

PAUSE_S = 1.0
_PATIENCE = 30

log = logging.getLogger(__name__)


class AutoScaler:
    """Asks for the page every `pause_s` seconds and sets the limit of `slots`.

    `fetch` returns the page, None when there is none; `in_flight` how many requests are at the
    engine. Until the first page came, and while none comes, the limit stays as it is; give
    `saturation` the limit of `slots` to begin with.
    """

    def __init__(
        self,
        fetch: Callable[[], Awaitable[str | None]],
        slots: RequestSlots,
        in_flight: Callable[[], int],
        saturation: Saturation,
        *,
        pause_s: float = PAUSE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch = fetch
        self._slots = slots
        self._in_flight = in_flight
        self._saturation = saturation
        self._pause_s = pause_s
        self._clock = clock
        # Polls without an answer until something is said about it; None: one came, or it was said.
        self._patience: int | None = _PATIENCE

    async def run(self) -> None:
        """Follow the engine until cancelled, through its restarts."""
        while True:
            await self._poll()
            await asyncio.sleep(self._pause_s)

    async def _poll(self) -> None:
        try:
            page = await self._fetch()
        except (aiohttp.ClientError, OSError):  # a time-out is an OSError
            page = None
        load = engine_load(page) if page is not None else None
        if load is None:
            self._note_miss()
            return
        self._patience = None
        limit = self._saturation.sample(load, self._in_flight(), self._clock())
        if limit != self._slots.limit:
            log.debug("%s: %d requests may be in flight", load, limit)
            self._slots.set_limit(limit)

    def _note_miss(self) -> None:
        if self._patience is None:
            return
        self._patience -= 1
        if self._patience == 0:
            self._patience = None
            log.warning(
                "the model server tells nothing of its load at /metrics: "
                "%d requests at a time, as long as it does not",
                self._slots.limit,
            )
