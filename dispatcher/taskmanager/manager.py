"""The task manager's loop: take an item, run it, hand its end to the source; many at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from dispatcher import logs
from dispatcher.taskmanager.backend.base import Backend
from dispatcher.taskmanager.backend.request import Response
from dispatcher.taskmanager.execution import Attempt, Outcome
from dispatcher.taskmanager.step_threads import StepThreads
from dispatcher.taskmanager.steps import Asked
from dispatcher.taskmanager.tasksource.base import Assignment, WorkSource

_ACTIVE_PER_SLOT = 4
_LOOK_FOR_LOST_S = 1.0


@dataclass(slots=True)
class Totals:
    """What a manager did since it started."""

    started: int = 0
    ended: int = 0
    replayed: int = 0


@dataclass(frozen=True, slots=True)
class _Running:
    """An item under way; lower `order` goes first at the backend."""

    order: int
    assignment: Assignment
    task: asyncio.Task[None]


class Manager:
    """Runs the items of one source against one backend until there are no more.

    The backend bounds the model requests in flight. Items that compute between requests do not
    fill a slot meanwhile, so more items than that may be active, up to `max_active` (None: four
    times as many).
    """

    def __init__(
        self, source: WorkSource, backend: Backend, *, max_active: int | None = None
    ) -> None:
        self._source = source
        self._backend = backend
        self._max_active = max_active
        self._active: dict[int, _Running] = {}
        self._starting: set[Assignment] = set()
        self._failed: list[Assignment] = []
        self._solo = False
        self._threads: StepThreads | None = None
        self._room = asyncio.Event()
        self._failure: BaseException | None = None
        self.totals = Totals()

    @property
    def slow_steps(self) -> int:
        """How often task code took so long between two requests that others were held up."""
        return self._threads.slow_steps if self._threads is not None else 0

    @property
    def longest_step_s(self) -> float:
        """The longest that task code took between two requests, in seconds."""
        return self._threads.longest_step_s if self._threads is not None else 0.0

    async def run(self) -> None:
        """Run until the source is empty. When cancelled, give everything back, uncharged."""
        self._threads = threads = StepThreads()
        self._backend.watch(self._room.set, self._take_crash)
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
            threads.close()

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
            await self._until_alone()
            self._solo = True
        return assignment

    def _start(self, assignment: Assignment) -> None:
        self._starting.add(assignment)
        self.totals.started += 1
        order = self.totals.started
        task = asyncio.ensure_future(self._run_item(assignment, order))
        self._active[order] = _Running(order, assignment, task)
        assignment.progress = 1
        assignment.cancel = task.cancel
        task.add_done_callback(partial(self._ended, order))

    async def _run_item(self, assignment: Assignment, order: int) -> None:
        attempt = Attempt(assignment.build, assignment.log)
        outcome = await self._attempt(attempt, assignment, order)
        await self._source.finish(assignment, attempt, outcome)

    # ---------------------------------------------------------------- inside

    async def _attempt(self, attempt: Attempt, assignment: Assignment, order: int) -> Outcome:
        """Alternate between task code and model requests until the attempt ends."""
        answers: asyncio.Queue[tuple[Asked, Response]] = asyncio.Queue()
        asking: set[asyncio.Task[None]] = set()
        threads = self._threads
        assert threads is not None
        work_id = getattr(assignment.item, "work_id", None)  # an older source's items have none
        try:
            try:
                step = await threads.run(partial(logs.on_line, work_id, attempt.begin), attempt)
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
                go_on = partial(attempt.answer, responses)
                step = await threads.run(partial(logs.on_line, work_id, go_on), attempt)
                self._room.set()
            return step
        finally:
            for task in asking:
                task.cancel()
            if assignment.log is not None:
                self.totals.replayed += assignment.log.replayed

    async def _ask(self, asked: Asked, order: int) -> Response:
        try:
            return await self._backend.process(asked.request, order)
        except Exception as error:
            self._fail(error)  # at once: nothing else may be started
            raise
        finally:
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
        most = self._max_active or _ACTIVE_PER_SLOT * self._backend.limit
        room = self._backend.room() - len(self._starting)
        return max(0, min(room, most - len(self._active)))

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._room.clear()
            await self._room.wait()

    async def _until_alone(self) -> None:
        """Wait until nothing is active.

        What is lost may finish, but is not waited for: it is lost, for one, when it never ends.
        """
        while self._active:
            for running in self._active.values():
                if running.assignment.is_lost:
                    self._source.give_up(running.assignment)
                    running.task.cancel()
            self._room.clear()
            with contextlib.suppress(TimeoutError):  # nobody says when the server calls one lost
                await asyncio.wait_for(self._room.wait(), _LOOK_FOR_LOST_S)

    async def _take_crash(self, orders: set[int]) -> bool:
        """A model server died under these items; go on with those that the source lets us keep.

        Returns whether one that ran alone is to blame.
        """
        hit = [self._active[order] for order in sorted(orders & self._active.keys())]
        if not hit:
            return False
        kept = await self._source.crashed([running.assignment for running in hit])
        for running in hit:
            if running.assignment not in kept:
                running.task.cancel()
        return any(running.assignment.solo for running in hit)

    def _ended(self, order: int, task: asyncio.Task[None]) -> None:
        assignment = self._active.pop(order).assignment
        self._starting.discard(assignment)
        self._solo = self._solo and bool(self._active)
        self.totals.ended += 1
        self._room.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed.append(assignment)
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._feeding.cancel()

    async def _abandon(self) -> None:
        held = [*(running.assignment for running in self._active.values()), *self._failed]
        tasks = [running.task for running in self._active.values()]
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._source.give_back(held, "the worker was stopped")
