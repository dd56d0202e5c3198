"""Work from a file, without a server: the same service in this process."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
from collections.abc import Callable, Iterable, Sequence

from dispatcher.config import RunSettings
from dispatcher.core.pausing import Pause
from dispatcher.errors import RunPausedError, StorageFullError
from dispatcher.models import (
    BatchResultResponse,
    BatchWorkResponse,
    HeartbeatRequest,
    HeartbeatResponse,
    Outcome,
    ReleaseItem,
    ReleaseWorkResponse,
    ResultItem,
    StepItem,
    StepsResponse,
    WorkerStats,
    WorkItem,
    WorkStatus,
)
from dispatcher.remedies import options_that_go_on
from dispatcher.service import DispatchService
from dispatcher.taskmanager.task.base import Task
from dispatcher.taskmanager.tasksource.base import Assignment
from dispatcher.taskmanager.tasksource.leased import LeasedSource

_BEATS_PER_TERM = 3


class ServiceLink:
    """The client's calls on a service in this process. A full disk is a server that is away."""

    def __init__(self, service: DispatchService, worker: str) -> None:
        self._service = service
        self._worker = worker

    async def get_work(self, batch_size: int = 1, wait_s: float = 0.0) -> BatchWorkResponse:
        """Ask for work."""
        try:
            return await self._service.get_work(self._worker, batch_size, wait_s)
        except StorageFullError:
            return BatchWorkResponse(WorkStatus.SERVER_UNAVAILABLE)

    async def submit_results(self, items: Sequence[WorkItem], want: int = 0) -> BatchResultResponse:
        """Hand results in."""
        results = [ResultItem(i.work_id, i.result, i.run, i.lease) for i in items]
        work = None
        try:
            if want:
                outcomes, work = await self._service.exchange(results, self._worker, want)
            else:
                outcomes = await self._service.submit(results)
        except StorageFullError:
            return BatchResultResponse(WorkStatus.SERVER_UNAVAILABLE)
        settled = sum(o in (Outcome.ACCEPTED, Outcome.DUPLICATE) for o in outcomes)
        return BatchResultResponse(WorkStatus.OK, settled, outcomes, work)

    async def release_work(
        self, work_ids: Iterable[int] = (), items: Iterable[ReleaseItem] = ()
    ) -> ReleaseWorkResponse:
        """Give items back."""
        by_id = [ReleaseItem(work_id, steps="drop") for work_id in work_ids]
        try:
            return await self._service.take_back([*by_id, *items], self._worker)
        except StorageFullError:
            return ReleaseWorkResponse(WorkStatus.SERVER_UNAVAILABLE)

    async def record_steps(self, steps: Sequence[StepItem]) -> StepsResponse:
        """Hand in what running items' tasks were answered."""
        try:
            outcomes = await self._service.record_steps(steps)
        except StorageFullError:
            return StepsResponse(WorkStatus.SERVER_UNAVAILABLE)
        return StepsResponse(WorkStatus.OK, outcomes, self._service.records_steps)

    async def heartbeat(self, request: HeartbeatRequest) -> HeartbeatResponse:
        """Say what is held."""
        try:
            return await self._service.heartbeat(request)
        except StorageFullError:
            return HeartbeatResponse(WorkStatus.SERVER_UNAVAILABLE)

    async def close(self) -> None:
        """The source closes the service."""


class FileTaskSource(LeasedSource):
    """The lines of one file; results go to another, in order, resumable."""

    def __init__(
        self,
        settings: RunSettings,
        task_class: type[Task],
        *,
        worker: str,
        model: str | None = None,
        batch_size: int,
        backend_up: Callable[[], bool],
        stats: Callable[[], WorkerStats],
    ) -> None:
        self.service = DispatchService(settings)
        super().__init__(
            ServiceLink(self.service, worker),
            task_class,
            worker=worker,
            model=model,
            batch_size=batch_size,
            server_timeout_s=float("inf"),
            backend_up=backend_up,
            stats=stats,
        )
        self._beats: asyncio.Task[None] | None = None
        self._pausing: asyncio.Task[None] | None = None

    async def start(self, wanted: Callable[[], int]) -> None:
        """Take up the run where it stands; `open` was called before."""
        self._beats = asyncio.ensure_future(self._beat_forever())
        self._pausing = asyncio.ensure_future(self._end_when_paused())
        self._pausing.add_done_callback(self._note_end)
        await super().start(wanted)

    async def open(self) -> None:
        """Open the run's files, before anything expensive is started.

        Raises RunPausedError when it is paused.
        """
        await self.service.start()
        if (pause := self.service.alarms.pause) is not None:
            error = self._paused_error(pause)
            await self.service.close()
            raise error

    async def give_back(self, assignments: list[Assignment], reason: str) -> None:
        """Release everything and write a checkpoint."""
        await super().give_back(assignments, reason)
        await self._end()

    async def close(self) -> None:
        """Return when the output is whole."""
        await super().close()
        ending = [self.service.finished.wait(), self.service.stopped.wait()]
        tasks = [asyncio.ensure_future(wait) for wait in ending]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        failure = self.service.failure
        await self._end()
        if failure is not None:
            raise failure

    async def _end(self) -> None:
        if self._pausing is not None:
            self._pausing.cancel()
        if self._beats is not None:
            self._beats.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._beats
        await self.service.close()

    async def _end_when_paused(self) -> None:
        """End the worker: a server would wait for somebody who looks, but here nobody can speak."""
        while (pause := self.service.alarms.pause) is None:
            await self.service.paused.wait()
        raise self._paused_error(pause)

    def _paused_error(self, pause: Pause) -> RunPausedError:
        mend = "mend the cause, then " if "failures" in pause.by else ""
        return RunPausedError(
            f"{pause}; {mend}start the same command, or --resume "
            f"{shlex.quote(str(self.service.settings.state_dir))}, with "
            f"{options_that_go_on(pause.by)}"
        )

    async def _beat_forever(self) -> None:
        while True:
            reply = await self._link.heartbeat(self.heartbeat_request())
            if reply.status is WorkStatus.OK:
                self.take_verdict(reply)
            await asyncio.sleep(self.service.queue.policy.lease_term_s / _BEATS_PER_TERM)
