"""Somebody who pauses the simulated run now and then, and tells it to go on.

What must hold: from the moment at which the pause is acknowledged until somebody sends for its
end, no call for work that begins brings anything, whatever happens to servers meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

from dispatcher import steering
from dispatcher.models import BatchWorkResponse
from dispatcher.service import DispatchService
from tests.faults.sim_loop import Process

AGAIN_S = 10.0
"""How often a run that is to go on is told so: a pause that was sent twice may arrive late."""


class PauseLedger:
    """When a pause holds for sure, as its operator was told."""

    def __init__(self, complain: Callable[[str], None]) -> None:
        self._complain = complain
        self._since: float | None = None

    def note_acknowledged(self, now: float) -> None:
        """The pause is on disk."""
        self._since = now

    def note_lifting(self) -> None:
        """From here on the run may go on."""
        self._since = None

    def note_work(self, reply: BatchWorkResponse, asked_at: float) -> None:
        """This came of a call for work that began then."""
        if reply.items and self._since is not None and asked_at > self._since:
            self._complain(f"item {reply.items[0].work_id} was handed out in a paused run")

    def note_start(self, service: DispatchService) -> None:
        """A server begins to answer."""
        if (
            self._since is not None
            and service.queue.pause is None
            and not service.finished.is_set()
        ):
            self._complain(f"epoch {service.epoch} does not know that the run is paused")


class Operator:
    """Pauses the run at some of `moments`, each for a while; then sees to it that it goes on."""

    def __init__(self, world: Any, call: Any, rng: Random, moments: list[float]) -> None:
        self._world = world
        self._rng = rng
        self._moments = moments
        self.process = Process("operator", "desk")
        self.is_cut_off = False
        self._call = call(self)
        self.process.run_main(self._run())

    async def _run(self) -> str:
        world, rng = self._world, self._rng
        for moment in self._moments:
            await asyncio.sleep(max(0.0, moment - world.now))
            await self._until_told(lambda service: steering.pause(service, "a look"))
            if world.is_complete:
                break
            world.pauses.note_acknowledged(world.now)
            world.counts["pauses by an operator"] += 1
            world.trace("operator", "paused the run")
            await asyncio.sleep(rng.uniform(2.0, 60.0))
            world.pauses.note_lifting()
            await self._until_told(steering.resume)
            world.trace("operator", "resumed the run")
        while not world.is_complete:
            await self._until_told(steering.resume)
            await asyncio.sleep(AGAIN_S)
        return "complete"

    async def _until_told(self, act: Callable[[DispatchService], Awaitable[Any]]) -> None:
        while not self._world.is_complete:
            if await self._call(act, 5.0) is not None:
                return
            await asyncio.sleep(self._rng.uniform(0.5, 3.0))
