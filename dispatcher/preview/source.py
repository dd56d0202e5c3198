"""The first lines of an input as work of a manager: no run, no state, nothing reported."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from dispatcher.models import ModelStats, WorkItem
from dispatcher.preview.record import Exchange, LineRecord
from dispatcher.storage.lines import InputLine
from dispatcher.taskmanager.backend.base import Backend, CrashHandler
from dispatcher.taskmanager.backend.request import Request, Response
from dispatcher.taskmanager.execution import (
    Answered,
    Attempt,
    Outcome,
    Raised,
    WantsRetry,
    error_line,
    exception_line,
    task_of_line,
)
from dispatcher.taskmanager.steps import Asked
from dispatcher.taskmanager.task.base import Task
from dispatcher.taskmanager.tasksource.base import Assignment, WorkSource

_MOST_TRIES = 20


class TimedBackend(Backend):
    """Another backend, which also notes how long each request took."""

    def __init__(self, inner: Backend) -> None:
        super().__init__()
        self._inner = inner
        self._seconds: dict[int, float] = {}

    def seconds_of(self, request: Request) -> float:
        """Return how long it took to answer this request, once."""
        return self._seconds.pop(id(request), 0.0)

    async def start(self) -> None:
        """Start the backend."""
        await self._inner.start()

    async def process(self, request: Request, order: int = 0) -> Response:
        """Answer one request."""
        begun_at = time.perf_counter()
        response = await self._inner.process(request, order)
        self._seconds[id(request)] = time.perf_counter() - begun_at
        return response

    @property
    def limit(self) -> int:
        """How many requests may be in flight now."""
        return self._inner.limit

    @property
    def requests_in_flight(self) -> int:
        """Requests being answered now."""
        return self._inner.requests_in_flight

    def room(self) -> int:
        """Return how many more items may be started now."""
        return self._inner.room()

    def watch(self, on_growth: Callable[[], None], on_crash: CrashHandler) -> None:
        """Have the manager told what happens."""
        self._inner.watch(on_growth, on_crash)

    def healthy(self) -> bool:
        """Say whether the model server is believed to be serving."""
        return self._inner.healthy()

    def accounts(self) -> Mapping[str, ModelStats]:
        """Return what each model answered."""
        return self._inner.accounts()

    async def close(self) -> None:
        """Close the backend."""
        await self._inner.close()


class PreviewSource(WorkSource):
    """Gives each line to the manager, again when its task asks for that, and keeps what happens.

    `on_end` is called with each record when its line has ended.
    """

    def __init__(
        self,
        task_class: type[Task],
        lines: Sequence[InputLine],
        max_retries: int,
        seconds_of: Callable[[Request], float],
        on_end: Callable[[LineRecord], None],
    ) -> None:
        self._task_class = task_class
        self._max_retries = max_retries
        self._seconds_of = seconds_of
        self._on_end = on_end
        self._records: dict[str, LineRecord] = {}
        self._begun_at: dict[str, float] = {}
        self._waiting: deque[WorkItem] = deque()
        self._open = 0
        self._changed = asyncio.Event()
        for work_id, line in enumerate(lines):
            record = self._records[str(work_id)] = LineRecord(work_id, line.text)
            if line.defect is None:
                self._waiting.append(
                    WorkItem(work_id, line.text, max_retries=max_retries, attempt=1)
                )
                self._open += 1
            else:
                record.result = error_line(line.defect, "the line cannot be handed out", None)
                on_end(record)

    async def start(self, wanted: Callable[[], int]) -> None:
        """All lines are here already."""

    async def next(self) -> Assignment | None:
        """Return the next line, or None when all have ended."""
        while not self._waiting:
            if not self._open:
                return None
            self._changed.clear()
            await self._changed.wait()
        item = self._waiting.popleft()
        key = str(item.work_id)
        self._begun_at[key] = time.perf_counter()
        return Assignment(key, partial(task_of_line, self._task_class, item), item=item)

    def record(self, assignment: Assignment, asked: Asked, response: Response) -> None:
        """Keep an answer."""
        seconds = self._seconds_of(asked.request)
        item: WorkItem = assignment.item
        self._records[assignment.key].exchanges.append(
            Exchange(asked.request, response, seconds, item.retry_count + 1)
        )

    async def finish(self, assignment: Assignment, attempt: Attempt, outcome: Outcome) -> None:
        """Keep how an attempt ended; begin the next one where the task asked for it."""
        record, item = self._records[assignment.key], assignment.item
        record.seconds += time.perf_counter() - self._begun_at[assignment.key]
        match outcome:
            case Answered(result):
                record.result = result
            case WantsRetry(reason):
                if not self._may_retry(item):
                    record.notes.append(f"attempt {item.retry_count + 1} ended: {reason}")
                    record.result = error_line(
                        "max_retries_exceeded", f"the task asked for one more try: {reason}", None
                    )
                else:
                    record.notes.append(
                        f"attempt {item.retry_count + 1} ended, to be tried again: {reason}"
                    )
                    item.retry_count += 1
                    item.attempt = item.retry_count + 1
                    item.fresh_starts += 1
                    self._waiting.append(item)
                    self._changed.set()
                    return
            case Raised():
                record.result = exception_line(outcome, item)
        self._open -= 1
        self._changed.set()
        self._on_end(record)

    async def give_back(self, assignments: list[Assignment], reason: str) -> None:
        """Nobody waits for them."""

    async def close(self) -> None:
        """Nothing is reported to anybody."""

    def _may_retry(self, item: WorkItem) -> bool:
        # "No limit" is none for a run of days, but would be one for a person who waits.
        limit = self._max_retries if self._max_retries >= 0 else _MOST_TRIES
        return item.retry_count < limit
