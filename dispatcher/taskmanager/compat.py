"""Older, synchronous classes on today's manager: thin adapters, no second implementation."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dispatcher.taskmanager.backend.base import BackendManager, SimpleBackend
from dispatcher.taskmanager.backend.request import Request, Response
from dispatcher.taskmanager.execution import (
    Answered,
    Attempt,
    Outcome,
    Raised,
    WantsRetry,
)
from dispatcher.taskmanager.task.base import Task
from dispatcher.taskmanager.tasksource.base import Assignment, TaskSource, WorkSource

_POLL_AGAIN_S = 0.05


class SyncBackend(SimpleBackend):
    """A BackendManager whose `process` blocks, on as many threads as requests may be in flight."""

    def __init__(self, manager: BackendManager, threads: int) -> None:
        super().__init__(threads)
        self._manager = manager
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="backend")

    async def answer(self, request: Request) -> Response:
        """Answer one request; what the manager raises becomes the response's error."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, self._manager.process, request)
        except Exception as error:  # noqa: BLE001
            # The older interface let `process` raise anything for a request that failed.
            return Response.from_error(request, f"{type(error).__name__}: {error}")

    def healthy(self) -> bool:
        """Ask the manager."""
        return self._manager.is_healthy()

    async def close(self) -> None:
        """Let the threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class SyncSource(WorkSource):
    """A TaskSource whose calls block, on one thread of its own."""

    def __init__(self, source: TaskSource) -> None:
        self._source = source
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="task-source")
        self._ready: list[Task] = []
        self._taken = 0
        self._running = 0

    async def start(self, wanted: Callable[[], int]) -> None:
        """Nothing to prepare."""

    async def next(self) -> Assignment | None:
        """Return the next task; None when the source is exhausted and no task is running.

        A source may hand a task out again when its result is saved.
        """
        while not self._ready:
            nothing_runs = not self._running
            self._ready = list(await self._call(self._source.get_next_tasks))
            if not self._ready:
                if nothing_runs and await self._call(lambda: self._source.is_exhausted):
                    return None
                await asyncio.sleep(_POLL_AGAIN_S)
        task = self._ready.pop(0)
        self._taken += 1
        self._running += 1
        return Assignment(str(self._taken), lambda: task, item=task)

    async def finish(self, assignment: Assignment, attempt: Attempt, outcome: Outcome) -> None:
        """Hand the task to the source; one that cannot tell its end itself has it told for it."""
        task: Task = assignment.item
        match outcome:
            case Raised(message, place):
                error = {"error": "task_exception", "message": message, "place": place}
                task = _Ended(task, {"__ERROR__": error | {"task_data": task.data}})
            case Answered(result) if not task.is_done():
                task = _Ended(task, json.loads(result))
            case WantsRetry(reason) if not task.should_retry():
                task = _Ended(task, {}, retry_reason=reason)
        await self._call(lambda: self._source.save_task_result(task))
        self._running -= 1

    async def give_back(self, assignments: list[Assignment], reason: str) -> None:
        """The older interface cannot take tasks back."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def close(self) -> None:
        """Every result is saved by now."""
        self._thread.shutdown(wait=False)

    async def _call(self, call: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)


class _Ended(Task):
    """Stands in for a task whose code raised, and so cannot tell how it ended."""

    def __init__(
        self, task: Task, result: dict[str, Any], *, retry_reason: str | None = None
    ) -> None:
        super().__init__(task.data, task.context)
        self._result = result
        self._retry = retry_reason is not None
        self.retry_reason = retry_reason or ""

    def should_retry(self) -> bool:
        return self._retry

    def get_next_request(self) -> Request | None:
        return None

    def process_result(self, result: Response) -> None:
        return None

    def is_done(self) -> bool:
        return True

    def get_result(self) -> tuple[dict[str, Any], Any]:
        return self._result, self.context
