"""The task manager's loop: take an item, run it, hand its end to the source; many at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from dispatcher.errors import BackendError
from dispatcher.taskmanager.backend.base import Backend
from dispatcher.taskmanager.backend.request import Response
from dispatcher.taskmanager.execution import Attempt, Outcome
from dispatcher.taskmanager.slots import RequestSlots
from dispatcher.taskmanager.step_threads import StepThreads
from dispatcher.taskmanager.steps import Asked
from dispatcher.taskmanager.tasksource.base import Assignment, WorkSource


@dataclass(slots=True)
class Totals:
    """What a manager did since it started."""

    started: int = 0
    ended: int = 0
    replayed: int = 0


class Manager:
    """Runs the items of one source against one backend until there are no more.

    `workers` is the number of model requests in flight at most. Items that compute between
    requests do not fill a slot meanwhile, so more items than slots may be active, up to
    `max_active`.
    """

    def __init__(
        self, source: WorkSource, backend: Backend, *, workers: int, max_active: int | None = None
    ) -> None:
        self._source = source
        self._backend = backend
        self._slots = RequestSlots(workers)
        self._max_active = max_active or 4 * workers
        self._active: dict[asyncio.Task[None], Assignment] = {}
        self._starting: set[Assignment] = set()
        self._crashed: list[Assignment] = []
        self._solo = False
        self._room = asyncio.Event()
        self._failure: BaseException | None = None
        self.totals = Totals()

    @property
    def requests_in_flight(self) -> int:
        """Model requests being answered now."""
        return self._slots.in_use

    async def run(self) -> None:
        """Run until the source is empty. When cancelled, give everything back, uncharged."""
        self._threads = StepThreads()
        self._feeding = asyncio.ensure_future(self._feed())
        try:
            await self._feeding
        except asyncio.CancelledError:
            self._feeding.cancel()
            await self._abandon()
            if self._failure is not None:
                raise self._failure from None
            raise
        except BaseException:  # the server is lost, or a defect: what is held goes back
            await self._abandon()
            raise
        finally:
            self._threads.close()

    async def _feed(self) -> None:
        """Start items as long as there are any, then wait for the last ones."""
        await self._source.start(self._wanted)
        while (assignment := await self._next()) is not None:
            self._start(assignment)
        await self._until(lambda: not self._active)
        await self._source.close()

    # ---------------------------------------------------------------- the three verbs

    async def _next(self) -> Assignment | None:
        """Wait until an item can be started, and for the item."""
        await self._until(lambda: self._wanted() > 0)
        assignment = await self._source.next()
        if assignment is not None and assignment.solo:
            # It was running when engines died: nothing else may run beside it.
            await self._until(lambda: not self._active)
            self._solo = True
        return assignment

    def _start(self, assignment: Assignment) -> None:
        self._starting.add(assignment)
        self.totals.started += 1
        order = self.totals.started
        task = asyncio.ensure_future(self._run_item(assignment, order))
        self._active[task] = assignment
        assignment.progress = 1
        assignment.cancel = task.cancel
        task.add_done_callback(self._ended)

    async def _run_item(self, assignment: Assignment, order: int) -> None:
        attempt = Attempt(assignment.build, assignment.log)
        outcome = await self._attempt(attempt, assignment, order)
        await self._source.finish(assignment, attempt, outcome)

    # ---------------------------------------------------------------- inside

    async def _attempt(self, attempt: Attempt, assignment: Assignment, order: int) -> Outcome:
        """Alternate between task code and model requests until the attempt ends."""
        answers: asyncio.Queue[tuple[Asked, Response]] = asyncio.Queue()
        asking: set[asyncio.Task[None]] = set()
        try:
            try:
                step = await self._threads.run(attempt.begin)
            finally:
                self._starting.discard(assignment)
            while isinstance(step, list):
                if len(step) == 1 and not asking:
                    answered = [(step[0], await self._ask(step[0], order))]
                else:
                    asking |= {self._ask_beside(asked, order, answers) for asked in step}
                    answered = [await answers.get()]
                    while not answers.empty():
                        answered.append(answers.get_nowait())
                    asking = {task for task in asking if not task.done()}
                assignment.progress += len(answered)
                for asked, response in answered:
                    self._source.record(assignment, asked, response)
                responses = [response for _, response in answered]
                step = await self._threads.run(partial(attempt.answer, responses))
                self._room.set()
            return step
        finally:
            for task in asking:
                task.cancel()
            if assignment.log is not None:
                self.totals.replayed += assignment.log.replayed

    async def _ask(self, asked: Asked, order: int) -> Response:
        await self._slots.acquire(order)
        try:
            return await self._backend.process(asked.request)
        except Exception as error:
            self._fail(error)  # before the slot gets free: nothing else may start in it
            raise
        finally:
            self._slots.release()
            self._room.set()

    def _ask_beside(
        self, asked: Asked, order: int, answers: asyncio.Queue[tuple[Asked, Response]]
    ) -> asyncio.Task[None]:
        async def ask() -> None:
            with contextlib.suppress(Exception):  # _ask told it, and the manager ends
                answers.put_nowait((asked, await self._ask(asked, order)))

        return asyncio.ensure_future(ask())

    def _wanted(self) -> int:
        """How many items should be started now: enough to fill the slots, started ones first."""
        if self._solo:
            return 0
        free_slots = self._slots.limit - self._slots.demand - len(self._starting)
        return max(0, min(free_slots, self._max_active - len(self._active)))

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._room.clear()
            await self._room.wait()

    def _ended(self, task: asyncio.Task[None]) -> None:
        assignment = self._active.pop(task)
        self._starting.discard(assignment)
        self._solo = self._solo and bool(self._active)
        self.totals.ended += 1
        self._room.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._crashed.append(assignment)
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._feeding.cancel()

    async def _abandon(self) -> None:
        held = [*self._active.values(), *self._crashed]
        tasks = list(self._active)
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
        reason = "crash" if isinstance(self._failure, BackendError) else "the worker was stopped"
        await self._source.give_back(held, reason)
