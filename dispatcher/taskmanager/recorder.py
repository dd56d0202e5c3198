"""Hands the steps of running items to the server, shortly after they happened, many in one call.

A step is sent when its task has more to do: when it asked again, or waits for other answers, or
has been computing for a moment. When its item ends before that, it was the item's last and nobody
needs it. Once many items have ended so, and none has asked twice, answers are not even kept.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass

from dispatcher.errors import DispatcherError
from dispatcher.models import StepItem, StepOutcome, StepsResponse, WorkItem, WorkStatus
from dispatcher.taskmanager.backend.request import Response
from dispatcher.taskmanager.steps import Asked, Position, StepLog, response_text

HOLD_S = 0.05
"""How long a step waits at least before it is sent, and its task computes; about 200 ms at most."""

LONGEST_HOLD_S = 0.15
"""How long a step waits at most for a thread to run its task on, if tasks are known to ask more."""

LONGEST_FIRST_HOLD_S = 2.0
"""The same as long as no task has asked a second time."""

STEP_BYTES = 1 << 20
"""A larger answer is not recorded, and nothing of its item after it."""

_TICK_S = 0.1
_TRY_AGAIN_S = 0.25
_LONGEST_PAUSE_S = 2.0
_CALL_STEPS = 4096
_CALL_CHARACTERS = 8 << 20
_WAITING_CHARACTERS = 64 << 20
_CHARACTERS_BESIDE = 512  # what a step costs in memory beside its answer
_ITEMS_TO_BE_SURE = 64

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Waiting:
    """A step that is not on the server yet.

    It was the `number`-th of its attempt that the model answered, and `answered` of the task's
    requests had an answer then. `computing_since` is when its task was first seen at work with it.
    """

    step: StepItem
    log: StepLog
    happened_at: float
    answered: int
    number: int
    computing_since: float | None = None

    @property
    def size(self) -> int:
        return len(self.step.response or "") + _CHARACTERS_BESIDE

    def is_due(self, now: float, longest_hold_s: float) -> bool:
        if self.computing_since is None and self.log.taken >= self.number:
            self.computing_since = now
        waited_s = now - self.happened_at
        if waited_s < HOLD_S:
            return False
        if self.step.response is None or self.log.asked > self.answered:
            return True
        if self.computing_since is None:
            return waited_s >= longest_hold_s
        return now - self.computing_since >= HOLD_S


class StepRecorder:
    """Holds the steps that are not on the server yet. `send` makes the call, once."""

    def __init__(self, send: Callable[[list[StepItem]], Awaitable[StepsResponse]]) -> None:
        self._send = send
        # By lease, in the order they happened.
        self._waiting: dict[str, list[_Waiting]] = {}
        self._held_back: set[str] = set()
        self._size = 0
        self._something = asyncio.Event()
        self._one_call = asyncio.Lock()
        # What is known of this worker's tasks: did one ask twice, how many ended without.
        self._tasks_ask_again = False
        self._ended_at_once = 0
        self.is_on = True

    # ---------------------------------------------------------------- what happens to items

    def offer(self, item: WorkItem, log_: StepLog, asked: Asked, response: Response) -> None:
        """A request of a running item was answered."""
        log_.answered += 1
        if log_.asked > 1:
            self._tasks_ask_again = True
        elif not self._tasks_ask_again and self._ended_at_once >= _ITEMS_TO_BE_SURE:
            log_.is_open = False
        if not self.is_on or item.lease is None or not log_.is_open:
            return
        text = response_text(response, STEP_BYTES) if asked.hash is not None else None
        if text is None or self._size > _WAITING_CHARACTERS:
            # What is recorded stays a beginning: nothing may follow what is left out.
            log_.is_open = False
            return
        self._add(_step(item, asked.position, asked.hash or "", text), log_)

    def cut(self, item: WorkItem, log_: StepLog, position: Position) -> None:
        """The item's task asks something else than recorded, from this position on."""
        if self.is_on and item.lease is not None:
            self._add(_step(item, position, log_.void_hash or "0", None), log_)

    def forget(self, item: WorkItem, keep_yields: int | None = 0) -> None:
        """The item's lease ends: only steps of its first `keep_yields` yields (None: all) count.

        That a task asked something else than recorded is told in any case.
        """
        if keep_yields is None or (waiting := self._waiting.get(item.lease or "")) is None:
            return
        self._remove(
            [w for w in waiting if w.step.response is not None and w.step.pos[0] >= keep_yields]
        )

    def hold(self, leases: Iterable[str]) -> None:
        """Send no steps of these leases from now on: they are about to end, and may be renewed."""
        self._held_back.update(leases)

    def let_go(self, leases: Iterable[str]) -> None:
        """It is known what became of these leases: their steps may be sent again."""
        self._held_back.difference_update(leases)

    def rename(self, lease: str, item: WorkItem) -> None:
        """The item goes on under another lease than this: so do its steps that are not sent yet."""
        waiting = self._waiting.pop(lease, [])
        for each in waiting:
            each.step.lease, each.step.attempt = item.lease or "", item.attempt
        if waiting:
            self._waiting.setdefault(item.lease or "", []).extend(waiting)

    def note_end(self, log_: StepLog) -> None:
        """An item has its result."""
        self._ended_at_once += log_.asked <= 1

    def is_waiting_for(self, leases: Iterable[str | None]) -> bool:
        """Say whether steps of these leases must be sent before the leases end."""
        return bool(self._waiting) and not self._waiting.keys().isdisjoint(leases)

    # ---------------------------------------------------------------- sending

    async def run(self) -> None:
        """Send what is due, for ever."""
        pause_s = 0.0
        while True:
            await self._something.wait()
            await asyncio.sleep(_TICK_S + pause_s)
            away = not await self._send_due()
            pause_s = min(max(_TRY_AGAIN_S, 2 * pause_s), _LONGEST_PAUSE_S) if away else 0.0
            if not self._waiting:
                self._something.clear()

    async def _send_due(self) -> bool:
        now = asyncio.get_running_loop().time()
        hold_s = LONGEST_HOLD_S if self._tasks_ask_again else LONGEST_FIRST_HOLD_S
        return await self._deliver(lambda waiting: waiting.is_due(now, hold_s))

    async def flush(self, leases: Collection[str | None] | None = None) -> bool:
        """Send what there is now of these leases, or of all; False when the server is away."""
        now = asyncio.get_running_loop().time()
        return await self._deliver(
            lambda waiting: (
                waiting.happened_at <= now and (leases is None or waiting.step.lease in leases)
            )
        )

    async def _deliver(self, is_due: Callable[[_Waiting], bool]) -> bool:
        async with self._one_call:
            while batch := self._due(is_due):
                try:
                    reply = await self._send([waiting.step for waiting in batch])
                except DispatcherError as error:
                    # The calls that matter will fail, too, and say so; without this one, items
                    # are only begun anew.
                    self._turn_off(f"steps are not recorded any more: {error}")
                    return True
                if reply.status is WorkStatus.SERVER_UNAVAILABLE:
                    return False
                self._take_reply(batch, reply)
        return True

    def _due(self, is_due: Callable[[_Waiting], bool]) -> list[_Waiting]:
        batch: list[_Waiting] = []
        size = 0
        for lease, of_lease in self._waiting.items():
            if lease in self._held_back:
                continue
            for waiting in of_lease:
                if len(batch) == _CALL_STEPS or size > _CALL_CHARACTERS:
                    return batch
                if not is_due(waiting):
                    break
                batch.append(waiting)
                size += waiting.size
        return batch

    def _take_reply(self, batch: list[_Waiting], reply: StepsResponse) -> None:
        self._remove(batch)
        if not reply.recording:
            self._turn_off(None)
            return
        for waiting, outcome in zip(batch, reply.outcomes, strict=False):
            step = waiting.step
            if outcome is not StepOutcome.ACCEPTED and step.response is not None:
                waiting.log.is_open = False
                self._remove([w for w in self._waiting.get(step.lease, []) if w.step.response])

    # ---------------------------------------------------------------- inside

    def _add(self, step: StepItem, log_: StepLog) -> None:
        now = asyncio.get_running_loop().time()
        waiting = _Waiting(step, log_, now, log_.replayed + log_.answered, log_.answered)
        self._waiting.setdefault(step.lease, []).append(waiting)
        self._size += waiting.size
        self._something.set()

    def _remove(self, gone: list[_Waiting]) -> None:
        ids = {id(waiting) for waiting in gone}
        for lease in dict.fromkeys(waiting.step.lease for waiting in gone):
            before = self._waiting.pop(lease, [])
            kept = [waiting for waiting in before if id(waiting) not in ids]
            if kept:
                self._waiting[lease] = kept
            self._size -= sum(w.size for w in before) - sum(w.size for w in kept)

    def _turn_off(self, why: str | None) -> None:
        self.is_on = False
        self._waiting.clear()
        self._size = 0
        if why is not None:
            log.warning("%s", why)


def _step(item: WorkItem, position: Position, hash_: str, text: str | None) -> StepItem:
    return StepItem(item.work_id, item.lease or "", item.attempt, position, hash_, text, item.run)
