"""Work under leases, whoever grants them: a server over HTTP, or the service in this process.

Keeps a few items ahead of the manager so that the model server never waits, hands results in
as batches that ask for more work in the same call, and keeps trying while the server is away;
what it cannot hand in is kept in the run's spool meanwhile, where there is one (spooling.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Protocol

from dispatcher import logs
from dispatcher.core.backoff import delay_s
from dispatcher.core.work_queue import CRASH
from dispatcher.errors import ServerLostError
from dispatcher.models import (
    BatchResultResponse,
    BatchWorkResponse,
    HeartbeatRequest,
    HeartbeatResponse,
    Outcome,
    ReleaseItem,
    ReleaseWorkResponse,
    RenewedLease,
    StepItem,
    StepsResponse,
    WorkerStats,
    WorkItem,
    WorkStatus,
)
from dispatcher.storage.spool import SpoolWriter
from dispatcher.taskmanager.backend.request import Response
from dispatcher.taskmanager.execution import (
    Answered,
    Attempt,
    Raised,
    WantsRetry,
    exception_line,
    task_of_line,
)
from dispatcher.taskmanager.execution import Outcome as AttemptOutcome
from dispatcher.taskmanager.recorder import StepRecorder
from dispatcher.taskmanager.steps import Asked, StepLog
from dispatcher.taskmanager.task.base import Task
from dispatcher.taskmanager.tasksource.base import Assignment, WorkSource
from dispatcher.taskmanager.tasksource.spooling import Spooler

POLL_S = 20.0
"""How long one call for work may be held open by the server."""

_GIVE_BACK_S = 2.5
_GIVE_STEPS_S = 1.0
_TELL_CRASH_S = 10.0
_STEP_TRIES = 3
_REPORT_ITEMS = 1024
_REPORT_CHARACTERS = 8 << 20  # at most 4 bytes each, and escapes; a body may have 64 MiB
_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 5.0

log = logging.getLogger(__name__)


class Link(Protocol):
    """The calls a worker makes; AsyncWorkClient has them."""

    async def get_work(self, batch_size: int = 1, wait_s: float = 0.0) -> BatchWorkResponse:
        """Ask for work."""

    async def submit_results(self, items: Sequence[WorkItem], want: int = 0) -> BatchResultResponse:
        """Hand results in, and ask for more work."""

    async def release_work(
        self, work_ids: Iterable[int] = (), items: Iterable[ReleaseItem] = ()
    ) -> ReleaseWorkResponse:
        """Give items back."""

    async def record_steps(self, steps: Sequence[StepItem]) -> StepsResponse:
        """Hand in what running items' tasks were answered."""

    async def heartbeat(self, request: HeartbeatRequest) -> HeartbeatResponse:
        """Say what is held."""

    async def close(self) -> None:
        """Let go of connections."""


@dataclass(slots=True, eq=False)
class _CrashReport:
    """One crash of an engine: how many of its items the server has still to be told of."""

    open: int = 0
    dropped: list[Assignment] = field(default_factory=list)
    is_settled: asyncio.Event = field(default_factory=asyncio.Event)
    is_awaited: bool = True

    def note_one_settled(self) -> None:
        self.open -= 1
        if not self.open:
            self.is_settled.set()


class LeasedSource(WorkSource):
    """The worker's side of the protocol. `batch_size` items are kept ready ahead of need.

    `model` is what requests ask that name none; a recorded answer of another one does not count.
    `spool` is where results are kept that the server does not take; None: in memory only.
    """

    def __init__(
        self,
        link: Link,
        task_class: type[Task],
        *,
        worker: str,
        model: str | None = None,
        batch_size: int,
        server_timeout_s: float,
        backend_up: Callable[[], bool],
        stats: Callable[[], WorkerStats],
        spool: SpoolWriter | None = None,
    ) -> None:
        self.worker = worker
        self._link = link
        self._task_class = task_class
        self._batch_size = batch_size
        self._server_timeout_s = server_timeout_s
        self._backend_up = backend_up
        self._stats = stats
        self._model = model
        self._recorder = StepRecorder(link.record_steps)
        self._recording: asyncio.Task[None] | None = None
        self._wanted: Callable[[], int] = lambda: 0
        self._held: dict[str, Assignment] = {}
        self._buffer: deque[Assignment] = deque()
        self._results: deque[WorkItem] = deque()
        self._spooler = Spooler(spool, self._results) if spool is not None else None
        self._releases: deque[ReleaseItem] = deque()
        self._crashes: deque[tuple[Assignment, _CrashReport]] = deque()
        self._told: set[str] = set()  # leases that were told of as crashed, the reply is missing
        self._complete = False
        self._closing = False
        self._failure: BaseException | None = None
        self._something_to_send = asyncio.Event()
        self._something_to_take = asyncio.Event()
        self._exchange: asyncio.Task[None] | None = None
        self._poll: asyncio.Task[None] | None = None
        self._away_since: float | None = None
        self._failed_calls = 0
        self._rng = Random(worker)

    # ---------------------------------------------------------------- what the manager calls

    async def start(self, wanted: Callable[[], int]) -> None:
        """Begin to fetch."""
        self._wanted = wanted
        self._exchange = asyncio.ensure_future(self._exchange_forever())
        self._exchange.add_done_callback(self._note_end)
        self._recording = asyncio.ensure_future(self._recorder.run())
        self._recording.add_done_callback(self._note_end)
        if self._spooler is not None:
            self._spooler.start().add_done_callback(self._note_end)
        self._something_to_send.set()

    async def next(self) -> Assignment | None:
        """Return the next item, or None when the run is complete."""
        while True:
            if self._failure is not None:
                raise self._failure
            if self._buffer:
                assignment = self._buffer.popleft()
                self._something_to_send.set()
                return assignment
            if self._complete:
                return None
            self._something_to_take.clear()
            self._something_to_send.set()
            await self._something_to_take.wait()

    def record(self, assignment: Assignment, asked: Asked, response: Response) -> None:
        """Take an answer, to be recorded unless the item ends with it."""
        log_ = assignment.log
        if log_ is None:
            return
        if log_.cut_at is not None:
            self._recorder.cut(assignment.item, log_, log_.cut_at)
            log_.cut_at = None
        self._recorder.offer(assignment.item, log_, asked, response)

    async def finish(
        self, assignment: Assignment, attempt: Attempt, outcome: AttemptOutcome
    ) -> None:
        """Queue the result or the release for the next exchange."""
        item: WorkItem = assignment.item
        # What the answers of its last yield led to must not happen again.
        kept = attempt.yields - 1 if attempt.yields else None
        match outcome:
            case Answered(result):
                if assignment.log is not None:
                    self._recorder.note_end(assignment.log)
                self._queue_result(item, result)
            case WantsRetry(reason, keep_steps):
                if not keep_steps:
                    kept = 0
                self._queue_release(
                    item, f"task_retry: {reason}", keep_yields=kept, fresh_start=not keep_steps
                )
            case Raised(message, place):
                log.warning(
                    "line %d: the task raised %s (%s)",
                    item.work_id,
                    message.partition(":")[0],
                    place,
                    extra={"work_id": item.work_id, "content": message},
                )
                if _is_last_attempt(item):
                    self._queue_result(item, exception_line(outcome, item))
                else:
                    reason = f"task_exception: {message} ({place})"
                    self._queue_release(item, reason, keep_yields=kept)
        self._something_to_send.set()

    async def crashed(self, assignments: list[Assignment]) -> list[Assignment]:
        """Tell the server, which counts the crash, and keep what it leases to this worker again.

        While the server does not answer, all go on: the exchange tries again until it is told,
        under whichever lease the item has by then, and cancels what is not renewed. What ended
        meanwhile is not told of any more. An older server takes back all that it is told of, and
        one that grants no leases cannot be told.
        """
        report = _CrashReport()
        for assignment in assignments:
            held = self._held.get(assignment.key) is assignment
            if held and assignment.item is not None and assignment.item.lease is not None:
                self._crashes.append((assignment, report))
                report.open += 1
        if report.open:
            self._something_to_send.set()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(report.is_settled.wait(), _TELL_CRASH_S)
        report.is_awaited = False
        return [each for each in assignments if each not in report.dropped]

    def give_up(self, assignment: Assignment) -> None:
        """Forget an item whose lease was lost: heartbeats name it no more, nothing is reported."""
        self._forget(assignment)

    async def give_back(self, assignments: list[Assignment], reason: str) -> None:
        """Report what is finished and release the rest, within a few seconds."""
        self._closing = True
        for task in (self._exchange, self._poll, self._recording):
            if task is not None:
                task.cancel()
        if self._spooler is not None and self._away_since is not None:
            await self._spooler.save_now()  # first, as there may be little time left
        try:
            async with asyncio.timeout(_GIVE_BACK_S):
                with contextlib.suppress(TimeoutError):  # they are worth less than what follows
                    async with asyncio.timeout(_GIVE_STEPS_S):
                        await self._recorder.flush()
                # Before the releases: the reply to an earlier call may have been lost, and then
                # the leases to give back are others.
                while self._crashes and await self._send_crashes():
                    pass
                self._release_all(assignments, reason)
                while self._results and await self._send_results():
                    pass
                while self._releases and await self._send_releases():
                    pass
        except TimeoutError:
            log.warning("the server did not take back what this worker held; its lease will end")
        finally:
            if self._spooler is not None:
                await self._spooler.end()
        await self._link.close()

    def _release_all(self, assignments: list[Assignment], reason: str) -> None:
        started = {id(assignment) for assignment in assignments}
        finished = {item.lease for item in self._results}
        crashed = {id(assignment) for assignment, _ in self._crashes}
        for key, assignment in list(self._held.items()):
            if key not in finished and assignment.item is not None:
                why = reason if id(assignment) in started else "the worker was stopped"
                why = CRASH if id(assignment) in crashed else why
                self._queue_release(assignment.item, why, charge=False)

    async def close(self) -> None:
        """Return when everything finished so far is reported."""
        self._closing = True
        self._something_to_send.set()
        if self._exchange is not None:
            await asyncio.wait([self._exchange])
        if self._failure is not None:
            raise self._failure
        for task in (self._poll, self._recording):
            if task is not None:
                task.cancel()
        if self._spooler is not None:
            await self._spooler.end()
        await self._link.heartbeat(self.heartbeat_request())  # the final totals
        await self._link.close()

    # ---------------------------------------------------------------- heartbeats

    def heartbeat_request(self) -> HeartbeatRequest:
        """Describe what is held now; may be called from another thread."""
        held = dict(self._held)
        return HeartbeatRequest(
            self.worker,
            {key: assignment.progress for key, assignment in held.items()},
            backend="up" if self._backend_up() else "down",
            stats=self._stats(),
        )

    def take_verdict(self, reply: HeartbeatResponse) -> None:
        """Drop what is done elsewhere, give back what was called back and is not started.

        What is lost goes on, with a mark, as its result is welcome.
        """
        for key in reply.done:
            if (assignment := self._held.get(key)) is not None:
                self._drop(assignment)
        # The lease of one that crashed may be lost because another one follows it.
        crashed = {assignment.key for assignment, _ in self._crashes}
        for key in reply.lost:
            if (assignment := self._held.get(key)) is not None and key not in crashed:
                assignment.is_lost = True
        for key in reply.back:
            assignment = self._held.get(key)
            if assignment is not None and assignment in self._buffer:
                self._buffer.remove(assignment)
                self._queue_release(assignment.item, "called_back", charge=False)
                self._something_to_send.set()

    # ---------------------------------------------------------------- the exchange

    async def _exchange_forever(self) -> None:
        """Send what is finished, ask for what is needed; again."""
        steps_failed = 0
        while not (self._closing and not self._results and not self._releases):
            await self._something_to_send.wait()
            self._something_to_send.clear()
            # New leases that a lost reply named live for a term: nothing may hold up this question.
            retold = not self._told or await self._send_crashes()
            sent = await self._send_last_steps()
            steps_failed = 0 if sent else steps_failed + 1
            sent = sent and retold
            if self._results:
                sent = await self._send_results() and sent
            # Steps are lost with their lease; but a call that saves work may hold up none for ever.
            if steps_failed % _STEP_TRIES == 0:
                if self._crashes and retold:
                    sent = await self._send_crashes() and sent
                # One that ended meanwhile is released under the lease that its crash left it.
                if self._releases and not self._crashes:
                    sent = await self._send_releases() and sent
            if not sent:
                await self._wait_for_server()
                self._something_to_send.set()
            elif self._results or self._releases or self._crashes:
                self._something_to_send.set()
            elif self._need() and self._poll is None:
                self._poll = asyncio.ensure_future(self._poll_once())
                self._poll.add_done_callback(self._note_end)

    async def _send_last_steps(self) -> bool:
        """Send the steps whose lease is about to end: it takes none after that."""
        ending = {item.lease for item in self._results} | {item.lease for item in self._releases}
        ending |= {assignment.item.lease for assignment, _ in self._crashes}
        return not self._recorder.is_waiting_for(ending) or await self._recorder.flush(ending)

    async def _send_results(self) -> bool:
        batch: list[WorkItem] = []
        size = 0
        for item in self._results:
            batch.append(item)
            size += len(item.result or "") + len(item.content)
            if len(batch) == _REPORT_ITEMS or size > _REPORT_CHARACTERS:
                break
        want = self._need() if self._poll is None else 0
        reply = await self._link.submit_results(batch, want)
        if reply.status is WorkStatus.SERVER_UNAVAILABLE:
            return False
        self._server_answered()
        for item in batch:
            self._results.popleft()
            self._held.pop(_key(item), None)
        if self._spooler is not None:
            self._spooler.note_acknowledged(len(batch))
        bad = [outcome for outcome in reply.outcomes if outcome in (Outcome.INVALID, *_NOT_OURS)]
        if bad:
            log.warning("the server refused %d of %d results: %s", len(bad), len(batch), bad[0])
        if reply.work is not None:
            self._take_work(reply.work)
        return True

    async def _send_releases(self) -> bool:
        batch = list(self._releases)[:_REPORT_ITEMS]
        reply = await self._link.release_work(items=batch)
        if reply.status is WorkStatus.SERVER_UNAVAILABLE:
            return False
        self._server_answered()
        for _ in batch:
            self._releases.popleft()
        return True

    async def _send_crashes(self) -> bool:
        """Tell of crashes, each lease once a call: one that crashed twice is told of twice."""
        batch: dict[str, tuple[Assignment, _CrashReport]] = {}
        for assignment, report in list(self._crashes)[:_REPORT_ITEMS]:
            if assignment.key in batch:
                break
            batch[assignment.key] = assignment, report
        # A result ends every lease of its item.
        finished = {id(item) for item in self._results}
        releases = [
            ReleaseItem(assignment.item.work_id, lease, charge=False, reason=CRASH, renew=True)
            for lease, (assignment, _) in batch.items()
            if (lease in self._told or self._held.get(lease) is assignment)
            and id(assignment.item) not in finished
        ]
        renewed: dict[str, RenewedLease] = {}
        if releases:
            # A step that came between the end of the old lease and the news of the new one, also
            # if that takes several calls, would be refused, and none after it be recorded.
            leases = [str(release.lease) for release in releases]
            self._recorder.hold(leases)
            self._told.update(leases)
            reply = await self._link.release_work(items=releases)
            if reply.status is WorkStatus.SERVER_UNAVAILABLE:
                return False
            self._server_answered()
            renewed = {each.lease: each for each in reply.renewed or ()}
        for lease, (assignment, report) in batch.items():
            self._settle_crash(assignment, report, renewed.get(lease))
            self._crashes.popleft()
        self._recorder.let_go(batch)
        self._told.difference_update(batch)
        return True

    def _settle_crash(
        self, assignment: Assignment, report: _CrashReport, renewed: RenewedLease | None
    ) -> None:
        report.note_one_settled()
        item, old = assignment.item, assignment.key
        is_held = self._held.get(old) is assignment
        if renewed is None or renewed.renewed in self._held:
            if is_held and not any(result is item for result in self._results):
                report.dropped.append(assignment)
                self._forget(assignment)
                if not report.is_awaited and assignment.cancel is not None:
                    assignment.cancel()
            return
        if not is_held:
            self._pass_on(renewed)
            return
        assignment.key = item.lease = renewed.renewed
        item.attempt = renewed.attempt
        assignment.progress = max(1, assignment.progress)
        # The heartbeats' thread may see it twice for a moment, but never not at all.
        self._held[assignment.key] = assignment
        self._held.pop(old, None)
        self._recorder.rename(old, item)

    def _pass_on(self, renewed: RenewedLease) -> None:
        """The item ended here before the news of its new lease: that one is what is to be ended."""
        for release in self._releases:
            if release.lease == renewed.lease:
                release.lease = renewed.renewed
                return
        self._releases.append(
            ReleaseItem(renewed.work_id, renewed.renewed, charge=False, reason="not held any more")
        )

    async def _poll_once(self) -> None:
        """Ask for work when no result carries the question."""
        try:
            need = self._need()
            if not need:
                return
            reply = await self._link.get_work(need, POLL_S)
            if reply.status is WorkStatus.SERVER_UNAVAILABLE:
                await self._wait_for_server()
                return
            self._server_answered()
            self._take_work(reply)
            if reply.status is WorkStatus.RETRY:
                await asyncio.sleep(reply.retry_in or _FIRST_DELAY_S)
        finally:
            self._poll = None
            self._something_to_send.set()

    def _take_work(self, reply: BatchWorkResponse) -> None:
        if reply.items:
            logs.know(run=reply.items[0].run)
        for item in reply.items:
            counts = self._recorder.is_on or item.steps
            log_ = StepLog(item.steps or (), self._model) if counts else None
            item.steps = None
            build = partial(task_of_line, self._task_class, item)
            assignment = Assignment(_key(item), build, item.solo, item=item, log=log_)
            self._held[assignment.key] = assignment
            self._buffer.append(assignment)
        if reply.status is WorkStatus.ALL_WORK_COMPLETE and not self._complete:
            self._complete = True
            # Every line has its result; what is still held here was answered by others.
            finished = {_key(item) for item in self._results}
            for key, assignment in list(self._held.items()):
                if key not in finished:
                    self._drop(assignment)
        self._something_to_take.set()

    # ---------------------------------------------------------------- inside

    def _need(self) -> int:
        """How many items to ask for; 0 while enough are ready."""
        if self._complete or self._closing:
            return 0
        need = self._batch_size + self._wanted() - len(self._buffer)
        enough = self._buffer and need < max(1, self._batch_size // 2)
        return 0 if enough else max(0, need)

    def _queue_result(self, item: WorkItem, result: str) -> None:
        self._recorder.forget(item)
        item.set_result(result)
        if item.lease is not None:
            item.content = ""  # only older servers, which grant no leases, want it back
        self._results.append(item)

    def _queue_release(
        self,
        item: WorkItem,
        reason: str,
        *,
        charge: bool = True,
        keep_yields: int | None = None,
        fresh_start: bool = False,
    ) -> None:
        self._held.pop(_key(item), None)
        self._recorder.forget(item, keep_yields)
        steps = "drop" if keep_yields == 0 else "keep"
        reason = reason.encode("utf-8", "replace").decode()
        release = ReleaseItem(item.work_id, item.lease, charge, reason[:500], steps)
        release.keep_yields, release.fresh_start = keep_yields, fresh_start
        self._releases.append(release)

    def _forget(self, assignment: Assignment) -> None:
        self._held.pop(assignment.key, None)
        if assignment.item is not None:
            self._recorder.forget(assignment.item)
        if assignment in self._buffer:
            self._buffer.remove(assignment)

    def _drop(self, assignment: Assignment) -> None:
        self._forget(assignment)
        if assignment.cancel is not None:
            assignment.cancel()

    def _server_answered(self) -> None:
        if self._away_since is not None and self._failed_calls > 1:
            log.info("the server answers again")
        self._away_since, self._failed_calls = None, 0

    def server_lost(self, away_s: float) -> ServerLostError:
        """Return the error that ends a worker whose server stayed away for so long."""
        return ServerLostError(
            f"the server did not answer for {away_s:.0f} s (--server-timeout); start the worker "
            "again when the server is back"
        )

    async def _wait_for_server(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._away_since is None:
            self._away_since = now
        self._failed_calls += 1
        away_s = now - self._away_since
        if away_s > self._server_timeout_s:
            raise self.server_lost(away_s)
        if self._failed_calls == 2:
            log.warning("the server does not answer; keeping what is held and trying again")
        await asyncio.sleep(
            delay_s(
                self._failed_calls, initial_s=_FIRST_DELAY_S, max_s=_LONGEST_DELAY_S, rng=self._rng
            )
        )

    def _note_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = error
            self._something_to_take.set()
            for other in (self._exchange, self._poll, self._recording):
                if other is not None and other is not task:
                    other.cancel()


_NOT_OURS = (Outcome.WRONG_RUN, Outcome.UNKNOWN)


def _key(item: WorkItem) -> str:
    # An older server grants no leases; the line number is as good there.
    return item.lease if item.lease is not None else str(item.work_id)


def _is_last_attempt(item: WorkItem) -> bool:
    limit = item.max_retries
    return limit is not None and limit >= 0 and item.retry_count >= limit
