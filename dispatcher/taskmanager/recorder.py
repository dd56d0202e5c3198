"""Hands the steps of running items to the server, shortly after they happened, many in one call.

A step waits a moment before it is sent: when its item ends in that time, it was the item's last
and nobody needs it. So a task with a single request is never recorded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from dispatcher.errors import DispatcherError
from dispatcher.models import StepItem, StepOutcome, StepsResponse, WorkItem, WorkStatus
from dispatcher.taskmanager.backend.request import Response
from dispatcher.taskmanager.steps import Asked, Position, response_text

HOLD_S = 0.05
"""How long a step waits at least before it is sent; about 150 ms at most."""

STEP_BYTES = 1 << 20
"""A larger answer is not recorded, and nothing of its item after it."""

_TICK_S = 0.1
_TRY_AGAIN_S = 0.25
_CALL_STEPS = 4096
_CALL_CHARACTERS = 8 << 20
_WAITING_CHARACTERS = 64 << 20

log = logging.getLogger(__name__)


class StepRecorder:
    """Holds the steps that are not on the server yet. `send` makes the call, once."""

    def __init__(self, send: Callable[[list[StepItem]], Awaitable[StepsResponse]]) -> None:
        self._send = send
        # By lease, in the order they happened, with the time at which each did.
        self._waiting: dict[str, list[tuple[float, StepItem]]] = {}
        self._characters = 0
        # Leases of which the server takes, or could use, no more.
        self._closed: set[str] = set()
        self._something = asyncio.Event()
        self._one_call = asyncio.Lock()
        self.is_on = True

    # ---------------------------------------------------------------- what happens to items

    def offer(self, item: WorkItem, asked: Asked, response: Response) -> None:
        """A request of a running item was answered."""
        lease = item.lease
        if not self.is_on or lease is None or lease in self._closed:
            return
        text = response_text(response) if asked.hash is not None else None
        if text is None or len(text) > STEP_BYTES or self._characters > _WAITING_CHARACTERS:
            # What is recorded stays a beginning: nothing may follow what is left out.
            self._closed.add(lease)
            return
        self._add(_step(item, asked.position, asked.hash or "", text))

    def cut(self, item: WorkItem, position: Position) -> None:
        """The item's task asks something else than recorded, from this position on."""
        if self.is_on and item.lease is not None:
            self._add(_step(item, position, "0", None))

    def forget(self, item: WorkItem, keep_yields: int | None = 0) -> None:
        """The item's lease ends: only steps of its first `keep_yields` yields (None: all) count.

        That a task asked something else than recorded is told in any case.
        """
        lease = item.lease or ""
        self._closed.discard(lease)
        if keep_yields is None or lease not in self._waiting:
            return
        gone = [
            step
            for _, step in self._waiting[lease]
            if step.pos[0] >= keep_yields and step.response is not None
        ]
        self._remove(gone)

    def is_waiting_for(self, leases: set[str | None]) -> bool:
        """Say whether steps of these leases must be sent before the leases end."""
        return not self._waiting.keys().isdisjoint(leases)

    # ---------------------------------------------------------------- sending

    async def run(self) -> None:
        """Send what is due, for ever."""
        while True:
            await self._something.wait()
            await asyncio.sleep(_TICK_S)
            if not await self._deliver(asyncio.get_running_loop().time() - HOLD_S):
                await asyncio.sleep(_TRY_AGAIN_S)
            if not self._waiting:
                self._something.clear()

    async def flush(self) -> bool:
        """Send everything now; False when the server cannot be reached."""
        return await self._deliver(float("inf"))

    async def _deliver(self, happened_before: float) -> bool:
        async with self._one_call:
            while batch := self._due(happened_before):
                try:
                    reply = await self._send(batch)
                except DispatcherError as error:
                    # The calls that matter will fail, too, and say so; without this one, items
                    # are only begun anew.
                    self._turn_off(f"steps are not recorded any more: {error}")
                    return True
                if reply.status is WorkStatus.SERVER_UNAVAILABLE:
                    return False
                self._take_reply(batch, reply)
        return True

    def _due(self, happened_before: float) -> list[StepItem]:
        batch: list[StepItem] = []
        characters = 0
        for steps in self._waiting.values():
            for happened_at, step in steps:
                if happened_at > happened_before or len(batch) == _CALL_STEPS:
                    break
                if batch and characters > _CALL_CHARACTERS:
                    return batch
                batch.append(step)
                characters += len(step.response or "")
        return batch

    def _take_reply(self, batch: list[StepItem], reply: StepsResponse) -> None:
        self._remove(batch)
        if not reply.recording:
            self._turn_off(None)
            return
        for step, outcome in zip(batch, reply.outcomes, strict=False):
            if outcome is not StepOutcome.ACCEPTED and step.response is not None:
                self._closed.add(step.lease)
                self._remove([s for _, s in self._waiting.get(step.lease, []) if s.response])

    # ---------------------------------------------------------------- inside

    def _add(self, step: StepItem) -> None:
        now = asyncio.get_running_loop().time()
        self._waiting.setdefault(step.lease, []).append((now, step))
        self._characters += len(step.response or "")
        self._something.set()

    def _remove(self, gone: list[StepItem]) -> None:
        ids = {id(step) for step in gone}
        for lease in {step.lease for step in gone} & self._waiting.keys():
            steps = self._waiting.pop(lease)
            kept = [(at, step) for at, step in steps if id(step) not in ids]
            if kept:
                self._waiting[lease] = kept
            removed = [step for _, step in steps if id(step) in ids]
            self._characters -= sum(len(step.response or "") for step in removed)

    def _turn_off(self, why: str | None) -> None:
        self.is_on = False
        self._waiting.clear()
        self._closed.clear()
        self._characters = 0
        if why is not None:
            log.warning("%s", why)


def _step(item: WorkItem, position: Position, hash_: str, text: str | None) -> StepItem:
    return StepItem(item.work_id, item.lease or "", item.attempt, position, hash_, text, item.run)
