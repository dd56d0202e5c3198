"""Stand-ins for what surrounds the worker's parts, and the loop they run on."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Generator, Iterable, Sequence
from typing import Any, TypeVar

from dispatcher.models import (
    BatchResultResponse,
    BatchWorkResponse,
    HeartbeatRequest,
    HeartbeatResponse,
    Outcome,
    ReleaseItem,
    ReleaseWorkResponse,
    StepItem,
    StepOutcome,
    StepsResponse,
    WorkItem,
    WorkStatus,
)
from dispatcher.taskmanager.backend.base import Backend
from dispatcher.taskmanager.backend.request import Request, Response
from dispatcher.taskmanager.execution import Attempt
from dispatcher.taskmanager.execution import Outcome as AttemptOutcome
from dispatcher.taskmanager.manager import Manager
from dispatcher.taskmanager.task import GeneratorTask
from dispatcher.taskmanager.tasksource.base import Assignment, WorkSource

T = TypeVar("T")
TaskGenerator = Generator[Any, Any, Any]

LIMIT_S = 10.0
"""Far above what any of these tests takes, so that only a hang reaches it."""


def run(coroutine: Coroutine[Any, Any, T], limit_s: float = LIMIT_S) -> T:
    """Run a test's coroutine; no callback or forgotten task of its loop may have failed."""
    problems: list[str] = []

    async def bounded() -> T:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: problems.append(f"{context['message']}: {context.get('exception')}")
        )
        return await asyncio.wait_for(coroutine, limit_s)

    result = asyncio.run(bounded())
    assert not problems, problems
    return result


async def until(condition: Callable[[], object], what: str, limit_s: float = 5.0) -> None:
    """Return once the condition holds; AssertionError with `what` when it never does."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not within {limit_s:g} s: {what}"
        await asyncio.sleep(0.002)


async def turns(count: int = 5) -> None:
    """Let everything that is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)


def ask(text: str = "?", **fields: Any) -> Request:
    """Return a chat request."""
    return Request({"messages": [{"role": "user", "content": text}], **fields})


def said(request: Request) -> str:
    """Return what a request of `ask` asks."""
    text = request.content["messages"][0]["content"]
    assert isinstance(text, str)
    return text


def answer(request: Request, text: str = "yes") -> Response:
    """Return a successful chat response."""
    return Response(request, {"choices": [{"message": {"role": "assistant", "content": text}}]})


def task_of(generator: Callable[[Any], Any]) -> type[GeneratorTask]:
    """Return a task class whose `task_generator` is this function of `self`."""
    return type("AnyTask", (GeneratorTask,), {"task_generator": generator})


def assignment(
    key: str, generator: Callable[[Any], Any], data: Any = None, *, solo: bool = False
) -> Assignment:
    """Return an item that runs `generator`."""
    return Assignment(key, lambda: task_of(generator)(data or {"key": key}), solo)


def one_question(self: Any) -> TaskGenerator:
    """A task of one request, named after its item."""
    response = yield ask(self.data["key"])
    return {"text": response.get_text()}


class StubSource(WorkSource):
    """Hands out a list of items and notes what it is told."""

    def __init__(self, items: Iterable[Assignment]) -> None:
        self.items = deque(items)
        self.ends: dict[str, AttemptOutcome] = {}
        self.given_back: list[str] | None = None
        self.reason = ""
        self.closed = False
        self.on_next: Callable[[], None] = lambda: None

    async def start(self, wanted: Callable[[], int]) -> None:
        self.wanted = wanted

    async def next(self) -> Assignment | None:
        self.on_next()
        return self.items.popleft() if self.items else None

    async def finish(
        self, assignment: Assignment, attempt: Attempt, outcome: AttemptOutcome
    ) -> None:
        assert assignment.key not in self.ends, "an item may end once"
        self.ends[assignment.key] = outcome

    async def give_back(self, assignments: list[Assignment], reason: str) -> None:
        assert self.given_back is None, "giving back happens once"
        self.given_back = [assignment.key for assignment in assignments]
        self.reason = reason

    async def close(self) -> None:
        self.closed = True


class StubBackend(Backend):
    """Answers at once, or, with `gated`, when the test says so."""

    def __init__(self, *, gated: bool = False, delay_s: float = 0.0) -> None:
        super().__init__()
        self.gated = gated
        self.delay_s = delay_s
        self.log: list[str] = []
        self.in_flight: Counter[str] = Counter()
        self.most = 0
        self.on_process: Callable[[Request], None] = lambda _: None
        self._gates: dict[str, tuple[Request, asyncio.Future[Response]]] = {}

    async def process(self, request: Request, order: int = 0) -> Response:
        await self.slots.acquire(order)
        try:
            return await self.reply(request)
        finally:
            self.slots.release()

    async def reply(self, request: Request) -> Response:
        text = said(request)
        self.log.append(text)
        self.in_flight[text] += 1
        self.most = max(self.most, self.in_flight.total())
        try:
            self.on_process(request)
            if self.gated:
                gate = asyncio.get_running_loop().create_future()
                self._gates[text] = (request, gate)
                return await gate
            await asyncio.sleep(self.delay_s)
            return answer(request)
        finally:
            self.in_flight[text] -= 1

    @property
    def waiting(self) -> list[str]:
        """What was asked and is not answered."""
        return [text for text, (_, gate) in self._gates.items() if not gate.done()]

    def answer(self, *texts: str) -> None:
        """Answer what is gated under these texts."""
        for text in texts:
            request, gate = self._gates[text]
            gate.set_result(answer(request))

    def open(self) -> None:
        """Answer everything, from now on at once."""
        self.gated = False
        self.answer(*self.waiting)

    def fail(self, text: str, error: BaseException) -> None:
        """Raise for what is gated under this text."""
        self._gates[text][1].set_exception(error)


def managed(
    source: WorkSource, backend: Backend, *, workers: int, max_active: int | None = None
) -> Manager:
    """Return a manager that has so many requests in flight at most."""
    backend.slots.set_limit(workers)
    return Manager(source, backend, max_active=max_active)


class StubLink:
    """A server in memory: grants leases, takes results, and can go away.

    `work` holds what it has; it is complete when every line it ever had is settled. `asked`
    are the calls for work, `wants` the ones that rode on results, `steps` what was recorded.
    """

    def __init__(self, *lines: WorkItem) -> None:
        self.work: deque[WorkItem] = deque(lines)
        self.open = {item.work_id for item in lines}
        self.up = True
        self.asked: list[tuple[int, float]] = []
        self.wants: list[int] = []
        self.submitted: list[WorkItem] = []
        self.released: list[ReleaseItem] = []
        self.steps: list[StepItem] = []
        self.attempts = 0
        self.closed = False
        self.retry_in: float | None = None
        self.loses_replies = 0
        self.latency_s = 0.0

    def _grant(self, count: int) -> BatchWorkResponse:
        items = [self.work.popleft() for _ in range(min(count, len(self.work)))]
        if items:
            return BatchWorkResponse(WorkStatus.OK, None, items)
        if not self.open:
            return BatchWorkResponse(WorkStatus.ALL_WORK_COMPLETE)
        return BatchWorkResponse(WorkStatus.RETRY, self.retry_in)

    async def record_steps(self, steps: Sequence[StepItem]) -> StepsResponse:
        if not self.up:
            return StepsResponse(WorkStatus.SERVER_UNAVAILABLE)
        self.steps += steps
        return StepsResponse(WorkStatus.OK, [StepOutcome.ACCEPTED] * len(steps))

    async def get_work(self, batch_size: int = 1, wait_s: float = 0.0) -> BatchWorkResponse:
        await asyncio.sleep(self.latency_s)
        self.attempts += 1
        if not self.up:
            return BatchWorkResponse(WorkStatus.SERVER_UNAVAILABLE)
        self.asked.append((batch_size, wait_s))
        # Held open, as a server does; unless it is told to send clients away.
        while self.up and self.retry_in is None and self.open and not self.work:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        if not self.up:
            return BatchWorkResponse(WorkStatus.SERVER_UNAVAILABLE)
        return self._grant(batch_size)

    async def submit_results(self, items: Sequence[WorkItem], want: int = 0) -> BatchResultResponse:
        await asyncio.sleep(self.latency_s)
        self.attempts += 1
        if not self.up:
            return BatchResultResponse(WorkStatus.SERVER_UNAVAILABLE)
        self.submitted += items
        self.wants.append(want)
        fresh = [item.work_id in self.open for item in items]
        self.open -= {item.work_id for item in items}
        if self.loses_replies:
            self.loses_replies -= 1
            return BatchResultResponse(WorkStatus.SERVER_UNAVAILABLE)
        outcomes = [Outcome.ACCEPTED if new else Outcome.DUPLICATE for new in fresh]
        work = self._grant(want) if want else None
        return BatchResultResponse(WorkStatus.OK, sum(fresh), outcomes, work)

    async def release_work(
        self, work_ids: Iterable[int] = (), items: Iterable[ReleaseItem] = ()
    ) -> ReleaseWorkResponse:
        await asyncio.sleep(self.latency_s)
        self.attempts += 1
        if not self.up:
            return ReleaseWorkResponse(WorkStatus.SERVER_UNAVAILABLE)
        items = list(items)
        self.released += items
        return ReleaseWorkResponse(WorkStatus.OK, len(items))

    async def heartbeat(self, request: HeartbeatRequest) -> HeartbeatResponse:
        return HeartbeatResponse(WorkStatus.OK)

    async def close(self) -> None:
        self.closed = True
