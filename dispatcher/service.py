"""The queue's verbs over storage, without HTTP: the server and file mode both call these.

Each verb decides at once, in memory (core/work_queue.py), queues the events that came of it for
the writer thread, and answers when they are on disk. Many callers share one write: what queues
while a batch is being written forms the next batch (group commit).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

from dispatcher.acknowledging import Acknowledgement
from dispatcher.alarms import Alarms
from dispatcher.config import RunSettings
from dispatcher.core.buckets import BATCH_BOUNDS, Buckets
from dispatcher.core.failures import Jump
from dispatcher.core.observed import Observed
from dispatcher.core.pausing import Pause
from dispatcher.core.results import error_kind, error_kinds, lease_serials, valid_results
from dispatcher.core.work_queue import (
    CRASH,
    MAX_RETRIES_EXCEEDED,
    Arrivals,
    Grant,
    WorkQueue,
    lease_id,
    lease_ids,
    parse_lease_id,
)
from dispatcher.core.worker_totals import WorkerTotals, models_in_status, models_in_summary
from dispatcher.error_lines import refused_line, tombstone
from dispatcher.errors import (
    CorruptJournalError,
    DispatcherError,
    StartStoppedError,
    StateError,
    StorageError,
    StorageFullError,
)
from dispatcher.line_feed import LineFeed
from dispatcher.models import (
    BatchWorkResponse,
    HeartbeatRequest,
    HeartbeatResponse,
    Outcome,
    ReleaseItem,
    ReleaseWorkResponse,
    RenewedLease,
    ResultItem,
    Step,
    StepItem,
    StepOutcome,
    WorkerStats,
    WorkItem,
    WorkStatus,
)
from dispatcher.spool_intake import SpoolIntake
from dispatcher.storage.files import Files
from dispatcher.storage.inputs.growing import GrowingSource
from dispatcher.storage.inputs.reader import CopyStop
from dispatcher.storage.journal import last_epoch
from dispatcher.storage.lines import Lines
from dispatcher.storage.opening import OpenRun, open_run, utc_now
from dispatcher.storage.ownership import REFRESH_S, Ownership
from dispatcher.storage.run_state import make_state_dir, remove_intermediate, save_run_file
from dispatcher.storage.source import LineSource
from dispatcher.storage.spool import Spool
from dispatcher.storage.writer import Batch, RunWriter

T = TypeVar("T")
log = logging.getLogger(__name__)

REPLY_BYTES = 32 << 20
"""Input text handed out in one reply, at most (but always one item)."""

_TICK_S = 1.0
_FULL_PAUSE_S = 1.0
_POLL_AGAIN_S = 0.2
_COPY_RETRY_S = 1.0
_DRAINING_RETRY_S = 2.0
_CONFIRM_AGAIN_S = 1.0
_LONGEST_GAP_S = 5.0
_MOST_YIELDS = 1 << 31
_LONGEST_HASH = 64


def one_thread(name: str) -> Executor:
    """Return a thread that runs one call after the other."""
    return ThreadPoolExecutor(1, thread_name_prefix=name)


class AwakeClock:
    """Seconds this process was really running: a stopped or overloaded server charges nobody."""

    def __init__(self, clock: Callable[[], float], longest_s: float) -> None:
        self._clock = clock
        self._longest_s = longest_s
        self._last = clock()
        self._now = 0.0

    def now(self) -> float:
        """Return the time; a gap between two calls counts as `longest_s` at most."""
        current = self._clock()
        gap_s = current - self._last
        if gap_s > 0:
            self._now += gap_s if gap_s < self._longest_s else self._longest_s
        self._last = current
        return self._now


class DispatchService:
    """One run: hands out its lines, takes its results, keeps it on disk.

    `finished` is set when the output is complete and synced. `failure` is set when the run
    cannot go on in this process; every verb raises it from then on. `paused` is set while nothing
    is handed out until somebody says so, `drain_asked` when somebody wants the server to end.
    """

    def __init__(
        self,
        settings: RunSettings,
        *,
        files: Files | None = None,
        clock: Callable[[], float] = time.monotonic,
        ownership: Ownership | None = None,
        make_thread: Callable[[str], Executor] = one_thread,
    ) -> None:
        self.settings = settings
        self.run_id = ""
        self.epoch = 0
        self.finished = asyncio.Event()
        self.failure: DispatcherError | None = None
        self.stopped = asyncio.Event()
        self.workers_told: set[str] = set()
        self.worker_totals = WorkerTotals()
        self.alarms = Alarms(settings.state_dir)
        self.failure_trend, self.paused = self.alarms.trend, self.alarms.paused
        self.drain_asked = asyncio.Event()
        self.observed = Observed()
        self.queue = WorkQueue(settings.policy)
        self.invalid_results = 0
        self.duplicate_results = 0
        self.items_handed_out = Buckets(BATCH_BOUNDS)
        self.results_taken = Buckets(BATCH_BOUNDS)
        self._monotonic = clock
        self._clock = AwakeClock(clock, min(_LONGEST_GAP_S, settings.policy.lease_term_s / 4))
        self._files = files or Files()
        self._ownership = ownership or Ownership(settings.state_dir, self._files)
        self._writer: RunWriter | None = None
        self._source: LineSource | None = None
        self._copy_stop = CopyStop()
        self._feed: LineFeed | None = None
        self._write_thread = make_thread("journal")
        self._read_thread = make_thread("input")
        self._intake = SpoolIntake(
            Spool(settings.state_dir, self._files),
            self._read_thread,
            self.submit,
            lambda: self._ownership.is_confirmed,
        )
        # A claim must be seen to be kept also while a slow file system holds up the journal.
        self._claim_thread = make_thread("claim")
        self._batch = Batch()
        self._batch_done: Acknowledgement | None = None
        self._writing: Acknowledgement | None = None
        self._work_queued = asyncio.Event()
        self._changed: asyncio.Future[None] | None = None
        self._checkpoint_at = 0.0
        self._synced_at_bytes = 0
        self._bytes_written = 0
        self._full_until = 0.0
        self._draining = False
        self._closed = False
        self._tasks: list[asyncio.Task[None]] = []
        self._run_file: dict[str, Any] = {}

    # ---------------------------------------------------------------- life

    async def start(self) -> None:
        """Make the run ours, read what is on disk, and go on from there.

        When another process had the run and may still live, this takes up to half a minute; when
        the input has to be copied whole, as long as that takes. May be cancelled.
        Raises UsageError, StateError or StorageError with what to do about it.
        """
        try:
            await self._take_run()
            run = await self._open_taken()
        except BaseException:  # whatever it was, the claim must not stay behind
            await self.close()
            raise
        self.run_id, self.epoch, self.queue = run.run_id, run.epoch, run.queue
        self._source, self._writer, self._run_file = run.source, run.writer, run.run_file
        if run.is_complete:
            self.finished.set()
            return
        assert run.source is not None
        self._feed = LineFeed(run.source, run.queue.next_offset, self._read_thread, self._stop)
        self._hear_start()
        self._note_input_end()
        self.alarms.look(self.queue)
        self.observe()
        self._tasks += [
            asyncio.create_task(self._guard(self._commit_forever())),
            asyncio.create_task(self._guard(self._tick_forever())),
            asyncio.create_task(self._guard(self._intake.take_forever(self.run_id))),
        ]
        if isinstance(self._source, GrowingSource):
            self._tasks.append(asyncio.create_task(self._guard(self._follow_copy(self._source))))
        self._work_queued.set()
        await self._intake.until_seen(self.stopped)

    def _hear_start(self) -> None:
        said = self.settings
        if not self.queue.hear_start(
            said.start, accept_failures=said.accept_failures, resume=said.unpause
        ):
            log.warning(_HEARD_BEFORE, said.start)

    async def drain(self) -> None:
        """Hand out nothing more; results and releases are still taken."""
        self._draining = True
        self._copy_stop.set()
        self._notify()

    async def close(self) -> None:
        """Write what is queued and a checkpoint, and let go of the run. May be called twice."""
        if self._closed:
            return
        self._closed = self._draining = True
        if isinstance(self._source, GrowingSource):
            await asyncio.to_thread(self._source.copy.end)  # or it would write what is another's
        if self._writer is not None and self.failure is None and not self.finished.is_set():
            self._checkpoint_at = float("-inf")
            with contextlib.suppress(DispatcherError):
                await self._barrier(self.queue, force=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._notify()
        if self._writer is not None:
            await self._save_last_words()
            await self._in_writer(self._writer.close)
        await self._in_claim_thread(self._ownership.release)
        for thread in (self._write_thread, self._read_thread, self._claim_thread):
            thread.shutdown()
        if self._source is not None:
            self._source.close()
        if self.finished.is_set() and self.failure is None:
            self._intake.spool.remove_all(self.run_id)
            remove_intermediate(self.settings.state_dir, self.epoch, self._files)
        self.stopped.set()

    async def _take_run(self) -> None:
        state_dir = self.settings.state_dir
        await self._in_writer(make_state_dir, state_dir, self._files)
        floor = await self._in_writer(last_epoch, state_dir, self._files)
        waits = False
        while True:
            wait_s = await self._in_claim_thread(self._ownership.try_take, floor)
            if not wait_s:
                break
            if not waits:
                waits = True
                log.warning(
                    "another process had the run in %s and may still live: waiting up to 30 s "
                    "for a sign of it",
                    state_dir,
                )
            await asyncio.sleep(wait_s)
        self._tasks = [asyncio.create_task(self._guard(self._confirm_forever()))]

    async def _open_taken(self) -> OpenRun:
        opening = asyncio.ensure_future(self._in_writer(self._open))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            self._copy_stop.set()
            await asyncio.wait([opening])  # or it would write on when the run is another's
            if opening.exception() is None:
                await self._in_writer(opening.result().close)
            raise
        except StartStoppedError as stopped:
            raise self.failure or stopped from None
        except StateError:
            # What looks like damage may be the work of another process that took over meanwhile.
            await self._in_claim_thread(self._ownership.confirm)
            raise

    def _open(self) -> OpenRun:
        owner, now = self._ownership, self._clock.now()
        return open_run(self.settings, self._files, owner.epoch, now, owner, self._copy_stop)

    # ---------------------------------------------------------------- verbs

    async def get_work(self, worker: str, count: int, wait_s: float = 0.0) -> BatchWorkResponse:
        """Hand out up to `count` items, waiting up to `wait_s` for the first one."""
        self._check_usable()
        queue = self.queue
        items = await self._hand_out(worker, count)
        if not items and wait_s > 0:
            queue, items = await self._wait_for_work(worker, count, wait_s)
        await self._barrier(queue)
        if items:
            self.items_handed_out.observe(len(items))
            if len(queue.steps):
                await self._attach_steps(items, queue)
            return BatchWorkResponse(WorkStatus.OK, items=items)
        if self.queue.is_complete:
            self.workers_told.add(worker)
            return BatchWorkResponse(WorkStatus.ALL_WORK_COMPLETE)
        retry_s = _POLL_AGAIN_S if wait_s else self.settings.retry_s
        if self.queue.may_open():  # there is more, as soon as it is copied
            retry_s = min(retry_s, _COPY_RETRY_S)
        if self._draining:  # by then this server is away, and another one perhaps back
            retry_s = min(self.settings.retry_s, _DRAINING_RETRY_S)
        return BatchWorkResponse(WorkStatus.RETRY, retry_in=retry_s)

    async def _wait_for_work(
        self, worker: str, count: int, wait_s: float
    ) -> tuple[WorkQueue, list[WorkItem]]:
        """Hand out what becomes ready, and return it with the queue that decided it."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        queue, items = self.queue, list[WorkItem]()
        try:
            while not (items or self.queue.is_complete or self._draining):
                left_s = deadline - loop.time()
                if left_s <= 0:
                    break
                self.queue.note_idle(worker, count)
                await self._wait_for_change(left_s)
                self._check_usable()
                queue = self.queue
                items = await self._hand_out(worker, count)
        finally:
            self.queue.note_idle(worker, 0)  # answered, or cancelled because the client left
        return queue, items

    async def submit(self, items: Sequence[ResultItem]) -> list[Outcome]:
        """Take results, each for itself; return what became of each, in order."""
        queue = self.queue
        outcomes = await self._take_results(items)
        await self._barrier(queue)
        return outcomes

    async def exchange(
        self, items: Sequence[ResultItem], worker: str, want: int
    ) -> tuple[list[Outcome], BatchWorkResponse]:
        """Take results and hand out up to `want` items; one wait for the disk covers both."""
        queue = self.queue
        outcomes = await self._take_results(items)
        work = await self.get_work(worker, want)
        if queue is not self.queue:
            raise StorageFullError(_NOT_KEPT)
        return outcomes, work

    async def release(self, items: Sequence[ReleaseItem]) -> int:
        """Take leases back unfinished; return how many there were."""
        return (await self.take_back(items)).released_count

    async def take_back(
        self, items: Sequence[ReleaseItem], worker: str = ""
    ) -> ReleaseWorkResponse:
        """Take leases back unfinished, and renew those that `worker` may go on with.

        A server that drains renews none: what goes on would have nobody to report to.
        """
        self._check_usable()
        queue, now = self.queue, self._clock.now()
        released = 0
        renewed: list[RenewedLease] = []
        for item in items:
            named = parse_lease_id(item.lease) if item.lease is not None else None
            if item.lease is not None and named is None:
                continue
            if named is not None and _may_renew(item):
                renewal = queue.renew(
                    item.work_id, named[1], worker, item.reason, now, again=not self._draining
                )
                released += renewal.ended
                if renewal.lease is not None:
                    lease = lease_id(item.work_id, named[1])
                    renewed.append(
                        RenewedLease(item.work_id, lease, renewal.lease, renewal.attempt)
                    )
                continue
            released += queue.release(
                item.work_id,
                named[1] if named else None,
                charge=item.charge,
                reason=item.reason[:500],
                keep_yields=_yields_kept(item),
                fresh_start=item.fresh_start,
                now=now,
            )
        await self._settle()
        await self._barrier(queue)
        return ReleaseWorkResponse(WorkStatus.OK, released, renewed or msgspec.UNSET)

    async def record_steps(self, steps: Sequence[StepItem]) -> list[StepOutcome]:
        """Keep answers that tasks got, each for itself; return what became of each, in order."""
        self._check_usable()
        queue = self.queue
        texts = [step.response or "" for step in steps]
        answers = valid_results(texts, self.settings.max_result_bytes)
        outcomes: list[StepOutcome] = []
        for step, answer in zip(steps, answers, strict=True):
            named = parse_lease_id(step.lease)
            serial = named[1] if named else None
            about = (step.work_id, serial, step.attempt, step.pos)
            if step.run is not None and step.run != self.run_id:
                outcomes.append(StepOutcome.WRONG_RUN)
            elif not _is_sound(step):
                outcomes.append(StepOutcome.INVALID)
            elif step.response is None:
                outcomes.append(queue.cut_steps(*about, step.hash))
            elif answer is None:
                outcomes.append(StepOutcome.INVALID)
            else:
                outcomes.append(queue.record_step(*about, step.hash, answer))
        await self._barrier(queue)
        return outcomes

    @property
    def records_steps(self) -> bool:
        """Whether steps are kept in this run at all."""
        return self.settings.policy.run_step_bytes > 0

    async def heartbeat(self, request: HeartbeatRequest) -> HeartbeatResponse:
        """Note that a worker is alive and what it holds; say what it should let go of."""
        self._check_usable()
        queue = self.queue
        held = {
            lease: progress
            for text, progress in request.held.items()
            if (lease := parse_lease_id(text)) is not None
        }
        verdict = queue.heartbeat(
            request.worker, held, backend_up=request.backend != "down", now=self._clock.now()
        )
        if request.stats is not None:
            self.worker_totals.note(request.worker, request.stats)
        await self._settle()
        await self._barrier(queue)
        return HeartbeatResponse(
            WorkStatus.OK,
            lease_term_s=queue.policy.lease_term_s,
            done=verdict.done,
            lost=verdict.lost,
            back=verdict.back,
            pause=queue.pause is not None,
        )

    def set_work_timeout(self, timeout_s: float) -> None:
        """Change the work timeout, also for items already handed out."""
        self.queue.set_work_timeout(timeout_s, self._clock.now())

    async def decide(self, change: Callable[[WorkQueue], None]) -> None:
        """Let what a person said change the queue; return when that is on disk."""
        self._check_usable()
        queue = self.queue
        change(queue)
        self.alarms.look(queue)
        self._notify()
        await self._barrier(queue)

    @property
    def writer(self) -> RunWriter | None:
        """The writer, for its figures; None before the start and when there is nothing to write."""
        return self._writer

    @property
    def run_file(self) -> Mapping[str, Any]:
        """What run.yaml says of the run."""
        return self._run_file

    def now(self) -> float:
        """Return the time by which leases and workers are judged, in awake seconds."""
        return self._clock.now()

    async def find_waiting(self, work_id: int) -> tuple[Path, int, int] | None:
        """Return where a result is that waits for an earlier line: file, offset, length."""
        if self._writer is None or self.finished.is_set():
            return None
        return await self._in_writer(self._writer.find_waiting, work_id)

    def reported(self) -> WorkerStats:
        """Return what the workers reported since this server started, added up."""
        workers = self.queue.workers.values()
        return self.worker_totals.total({w.name for w in workers if w.vanished_at is None})

    def status(self) -> dict[str, Any]:
        """Return what a person wants to know; the first six names are those of older servers."""
        queue, counters, reported = self.queue, self.queue.counters, self.reported()
        return {
            "last_processed_work_id": queue.first_open - 1,
            "next_work_id": queue.next_work_id,
            "issued": len(queue.leases),
            "pending": queue.waiting_count,
            "heap_size": queue.ready_count,
            "expired_reissues": counters.expired,
            "state": self.state,
            "run": self.run_id,
            "epoch": self.epoch,
            "done": counters.done,
            "failed": counters.failed,
            "total": self._total(),
            "total_is_exact": queue.input_ended,
            "written": self._writer.output.written if self._writer else 0,
            "waiting_for": queue.first_open if queue.waiting_count else None,
            "workers": sum(w.vanished_at is None for w in queue.workers.values()),
            "charged": counters.charged,
            "crashed": counters.crashed,
            "released": counters.released,
            "returned": counters.returned,
            "tombstones": counters.tombstones,
            "errors": counters.errors,
            "steps": counters.steps,
            "step_mismatches": counters.step_mismatches,
            "step_bytes": queue.steps.size,
            "steps_replayed": reported.replayed,
            "duplicate_results": self.duplicate_results,
            "invalid_results": self.invalid_results,
            "spooled_results": self._intake.taken,
            "requests": reported.requests,
            "prompt_tokens": reported.prompt_tokens,
            "completion_tokens": reported.completion_tokens,
            "requests_in_flight": reported.in_flight,
            "models": models_in_status(reported.models),
            "slow_steps": reported.slow_steps,
            "longest_step_s": reported.longest_step_s,
            "work_timeout_s": queue.policy.work_timeout_s,
            "max_retries": queue.policy.max_retries,
            "max_failures": queue.max_failures,
            "paused": None if self.finished.is_set() else _facts_of(queue.pause),
            "failure_warning": _facts_of(self.failure_trend.jump),
            "output_error": self._writer.output_error if self._writer else None,
            "copying": self._copying(),
        }

    @property
    def is_draining(self) -> bool:
        """Whether nothing more is handed out because this server is about to end."""
        return self._draining and not self.finished.is_set()

    @property
    def state(self) -> str:
        """How the run is: `running`, `paused`, `draining` or `complete`."""
        if self.finished.is_set():
            return "complete"
        if self._draining:
            return "draining"
        return "paused" if self.queue.pause is not None else "running"

    def _copying(self) -> dict[str, Any] | None:
        source = self._source
        if not isinstance(source, GrowingSource) or source.is_whole:
            return None
        progress = source.copy.progress
        return {"bytes": progress.bytes, "share": progress.share, "problem": source.copy.problem}

    def _total(self) -> int:
        """Estimate the number of lines from the bytes read so far; exact once all were read."""
        queue = self.queue
        if isinstance(self._source, GrowingSource) and not queue.input_ended:
            return max(queue.next_work_id, self._source.expected_lines())
        if queue.input_ended or self._source is None or not queue.next_offset:
            return queue.next_work_id
        return round(queue.next_work_id * self._source.size_bytes / queue.next_offset)

    # ---------------------------------------------------------------- handing out

    async def _hand_out(self, worker: str, count: int) -> list[WorkItem]:
        """Hand out items that were handed out before, or else new lines, or else copies."""
        queue, feed, now = self.queue, self._feed, self._clock.now()
        if feed is None:
            return []  # the run was complete before this start
        grants: list[Grant] = []
        fresh: list[WorkItem] = []
        left, left_bytes = count, REPLY_BYTES
        looked = not queue.ready_count
        while left > 0 and left_bytes > 0 and not (self._draining or _is_solo(grants)):
            if not looked:
                looked = True
                grants = queue.lease_ready(worker, count, now, REPLY_BYTES)
                left, left_bytes = count - len(grants), REPLY_BYTES - _bytes_of(grants, queue)
            elif not queue.may_open():
                break
            elif not feed.is_behind:
                size, items = self._hand_out_fresh(worker, left, left_bytes, now)
                left, left_bytes = left - len(items), left_bytes - size
                fresh += items
            elif feed.has_more:
                await feed.read_ahead()
                if queue is not self.queue:
                    raise StorageFullError(_NOT_KEPT)
                looked = bool(grants or fresh)  # what came back meanwhile goes first
            else:
                break  # the copy of the input is behind
        if not (grants or fresh or self._draining or queue.may_open()):
            grants = queue.lease_backup(worker, count, now, REPLY_BYTES)
        return [*await self._with_texts(grants), *fresh] if grants else fresh

    def _hand_out_fresh(
        self, worker: str, count: int, max_bytes: int, now: float
    ) -> tuple[int, list[WorkItem]]:
        """Hand out up to `count` of the lines read ahead until `max_bytes` are reached.

        Returns how many bytes they have, and them: none when they are refused instead.
        """
        assert self._feed is not None
        queue = self.queue
        lines = self._feed.take(min(count, queue.window_room()), max_bytes)
        if lines.defects:
            self._refuse(lines, now)
            return 0, []
        first, serial = queue.lease_fresh(worker, lines.offset, lines.sizes, now)
        self._note_input_end()
        limit, run_id = queue.policy.max_retries, self.run_id
        work_ids = range(first, first + len(lines))
        items = [
            WorkItem(work_id, text, None, 0, limit, run_id, lease)
            for work_id, text, lease in zip(
                work_ids, lines.texts, lease_ids(work_ids, serial), strict=True
            )
        ]
        return sum(lines.sizes), items

    def _refuse(self, lines: Lines, now: float) -> None:
        """Give lines that cannot be handed out their tombstones at once."""
        queue, limit = self.queue, self.settings.max_line_bytes
        first = queue.open_lines(lines.offset, lines.sizes)
        self._note_input_end()
        for place, defect in lines.defects.items():
            refused = refused_line(first + place, defect, lines.texts[place], limit)
            queue.tombstone(first + place, defect, refused, now)

    async def _with_texts(self, grants: Sequence[Grant]) -> list[WorkItem]:
        """Read the lines of items that were read before."""
        self._queue_events()  # they can be written while the lines are read
        assert self._feed is not None
        lines = await self._feed.fetch([grant.offset for grant in grants])
        limit, run_id = self.queue.policy.max_retries, self.run_id
        return [
            WorkItem(
                grant.work_id,
                line.text,
                None,
                grant.retries,
                limit,
                run_id,
                grant.lease,
                grant.attempt,
                grant.solo,
                None,
                grant.fresh_starts,
            )
            for grant, line in zip(grants, lines, strict=True)
        ]

    async def _attach_steps(self, items: list[WorkItem], queue: WorkQueue) -> None:
        """Let items carry the answers that are recorded for them."""
        assert self._writer is not None
        wanted = [item.work_id for item in items if queue.steps.of(item.work_id)]
        if not wanted:
            return
        try:
            found = await self._in_writer(self._writer.read_steps, wanted)
        except (OSError, CorruptJournalError) as error:
            # Only work is lost: the model is asked again.
            log.warning("recorded steps cannot be read: %s", error)
            return
        for item in items:
            if steps := found.get(item.work_id):
                item.steps = [
                    Step(position, request_hash, answer.decode())
                    for position, (request_hash, answer) in sorted(steps.items())
                ]

    def _note_input_end(self) -> None:
        if self._feed is not None and self._feed.is_at_end:
            self.queue.end_of_input()

    async def _follow_copy(self, source: GrowingSource) -> None:
        """Let waiting calls look again when the copy grew; take note when it is whole."""
        loop, copy, news = asyncio.get_running_loop(), source.copy, asyncio.Event()
        copy.listen(lambda: loop.call_soon_threadsafe(news.set))
        while not copy.has_ended.is_set():
            await news.wait()
            news.clear()
            self._notify()
        if copy.failure is not None:
            if not isinstance(copy.failure, StartStoppedError):
                raise copy.failure
            return  # this process is about to end
        self._run_file["fingerprint"] = copy.fingerprint
        with contextlib.suppress(StorageError):  # a full disk: it is written again at the end
            await self._in_claim_thread(self._ownership.confirm)
            await self._in_writer(
                save_run_file, self.settings.state_dir, self._run_file, self._files
            )
        source.become_whole()
        self._note_input_end()
        self._work_queued.set()  # every line may have its result
        self._notify()

    # ---------------------------------------------------------------- taking back

    async def _take_results(self, items: Sequence[ResultItem]) -> list[Outcome]:
        self._check_usable()
        queue, run_id, now = self.queue, self.run_id, self._clock.now()
        work_ids = [item.work_id for item in items]
        serials = lease_serials(work_ids, [item.lease for item in items])
        texts = [item.result or "" for item in items]
        results = valid_results(texts, self.settings.max_result_bytes)
        if all(results) and {item.run for item in items} <= {None, run_id}:  # no result is empty
            good = cast(list[msgspec.Raw], results)
            arrivals = Arrivals(work_ids, serials, good, error_kinds(texts))
            self.observed.meet(arrivals, queue.leases)
            outcomes = queue.finish_all(arrivals, now)
        else:
            outcomes = self._take_one_by_one(items, serials, results, now)
        self.duplicate_results += outcomes.count(Outcome.DUPLICATE)
        self.results_taken.observe(len(items))
        await self._settle()
        return outcomes

    def _take_one_by_one(
        self,
        items: Sequence[ResultItem],
        serials: Sequence[int | None],
        results: Sequence[msgspec.Raw | None],
        now: float,
    ) -> list[Outcome]:
        """Take results some of which are none, in the order they stand: some may be of one item."""
        outcomes: list[Outcome] = []
        for item, serial, result in zip(items, serials, results, strict=True):
            if item.run is not None and item.run != self.run_id:
                outcomes.append(Outcome.WRONG_RUN)
            elif result is None:
                outcomes.append(self._refuse_result(item, serial, now))
            else:
                kind = error_kind(bytes(result))
                arrivals = Arrivals([item.work_id], [serial], [result], [kind])
                self.observed.meet(arrivals, self.queue.leases)
                outcomes += self.queue.finish_all(arrivals, now)
        return outcomes

    def _refuse_result(self, item: ResultItem, serial: int | None, now: float) -> Outcome:
        if not 0 <= item.work_id < self.queue.next_work_id:
            return Outcome.UNKNOWN
        self.invalid_results += 1
        self.queue.fail(item.work_id, serial, "the result is not JSON on one line", now)
        return Outcome.INVALID

    async def _settle(self) -> None:
        """Give condemned items their tombstone, and let waiting calls see what became ready."""
        if self.queue.condemned:
            await self._bury_condemned()
        self.alarms.look(self.queue)
        if self._changed is not None and (self.queue.ready_count or self.queue.is_complete):
            self._notify()

    async def _bury_condemned(self) -> None:
        queue = self.queue
        for work_id in queue.condemned_ids():
            item = queue.items.get(work_id)
            if item is None:
                continue  # its result came while another one's line was read
            assert self._feed is not None
            (line,) = await self._feed.fetch([item.offset])
            if queue is not self.queue:
                return
            if item.condemned:
                result = tombstone(work_id, line.text, item.history)
                queue.tombstone(work_id, MAX_RETRIES_EXCEEDED, result, self._clock.now())

    # ---------------------------------------------------------------- waiting

    async def _wait_for_change(self, timeout_s: float) -> None:
        if self._changed is None or self._changed.done():
            self._changed = asyncio.get_running_loop().create_future()
        await asyncio.wait([self._changed], timeout=timeout_s)

    def _notify(self) -> None:
        """Let waiting calls for work look again."""
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    async def _barrier(self, decided_in: WorkQueue, *, force: bool = False) -> None:
        """Return when everything decided so far is on disk.

        Raises StorageFullError when it is not: a failed write has replaced the queue that
        decided it. Raises what ended the run.
        """
        if self.failure is not None:
            raise self.failure
        if self.finished.is_set():
            return  # the output holds everything, and nothing is decided any more
        self._queue_events()
        if self._batch.body or force:
            if self._batch_done is None:
                self._batch_done = Acknowledgement()
                self._work_queued.set()
            await self._batch_done.wait()
        elif self._writing is not None:
            await self._writing.wait()
        if decided_in is not self.queue:
            raise StorageFullError(_NOT_KEPT)

    def _check_usable(self) -> None:
        if self.failure is not None:
            raise self.failure
        if self._monotonic() < self._full_until:
            raise StorageFullError(_NOT_KEPT)

    # ---------------------------------------------------------------- writing

    def _queue_events(self) -> None:
        batch, events = self._batch, self.queue.take_events()
        if events:
            for event in events:
                batch.add(event)
            self.observed.see(events, time.time())
            batch.pasts += self.queue.take_pasts()
            self._work_queued.set()

    async def _commit_forever(self) -> None:
        """Swap the batch, write it, tell everybody who waits for it; again."""
        assert self._writer is not None
        while not self.finished.is_set():
            await self._work_queued.wait()
            batch, done = self._swap_batch()
            self._work_queued.clear()
            self._writing = done
            await self._until_confirmed()
            try:
                await self._in_writer(self._writer.write, batch)
            except StorageFullError as error:
                await self._undo(done, error)
            else:
                # Nobody may be told of what another server, which took over, does not know.
                await self._until_confirmed()
                done.give()
                self._bytes_written += len(batch.body)
                if batch.sync_output:
                    self._synced_at_bytes = self._bytes_written
            # Any other error leaves `done` to _stop, which tells whoever waits for it.
            self._writing = None
            await self._after_write()

    def _swap_batch(self) -> tuple[Batch, Acknowledgement]:
        self._queue_events()
        batch, done = self._batch, self._batch_done
        self._batch, self._batch_done = Batch(), None
        batch.prefix = self.queue.first_open
        # From here on a tombstone of the prefix may be in the output, so no result replaces it.
        self.queue.note_written(batch.prefix)
        assert self._writer is not None
        now = self._clock.now()
        due = now - self._checkpoint_at >= self.settings.checkpoint_every_s
        many = self._writer.output.unsynced_bytes >= self.settings.checkpoint_every_bytes
        news = self._bytes_written > self._synced_at_bytes or self._writer.output_error is not None
        if self._writer.segment_is_full:
            batch.state = self.queue.checkpoint()
        if batch.state is not None or many or (due and news):
            batch.sync_output = True
            self._checkpoint_at = now
        return batch, done or Acknowledgement()

    async def _after_write(self) -> None:
        assert self._writer is not None
        writer = self._writer
        behind = writer.output.written < self.queue.first_open
        # The writer rests meanwhile, so that the two figures are of one moment.
        self.observed.output_marks.note(writer.output.written, writer.output.size_bytes)
        if behind and writer.output_error is None:
            self._work_queued.set()
        if self.queue.is_complete and not behind and not self._batch.body:
            await self._complete()

    async def _undo(self, done: Acknowledgement, error: StorageFullError) -> None:
        """The batch is not on disk: go back to what the journal says."""
        assert self._writer is not None
        self._full_until = self._monotonic() + _FULL_PAUSE_S
        now = self._clock.now()
        recovered = await self._in_writer(self._writer.read_journal, self.queue.policy, now)
        assert recovered is not None
        recovered.queue.adopt_workers(self.queue.workers.values(), now)
        # Calls that went on with the old queue meanwhile decided on what never happened; they
        # see that `self.queue` is another one, or fail with the batch they wait for.
        failed_too, self._batch, self._batch_done = self._batch_done, Batch(), None
        self.queue = recovered.queue
        self.queue.note_written(self._writer.output.written)
        assert self._feed is not None
        self._feed.go_back(self.queue.next_offset)
        self._note_input_end()
        done.refuse(error)
        if failed_too is not None:
            failed_too.refuse(error)

    async def _complete(self) -> None:
        assert self._writer is not None
        size = await self._in_writer(self._writer.finish_output)
        counters = self.queue.counters
        self._run_file |= {
            "state": "complete",
            "ended_at": utc_now(),
            "output_bytes": size,
            "summary": msgspec.to_builtins(counters),
        }
        await self._save_summary()
        await self._in_writer(self._writer.remove_journal)
        self.finished.set()
        if self._batch_done is not None:
            self._batch_done.give()  # asked for while the run was being completed
        self._notify()

    async def _save_summary(self) -> None:
        if models := models_in_summary(self.reported().models):
            self._run_file["summary"]["models"] = models
        await self._in_writer(save_run_file, self.settings.state_dir, self._run_file, self._files)

    async def _save_last_words(self) -> None:
        """Put into the summary what workers reported after the last result was in."""
        if self._source is None or not self.finished.is_set() or self.failure is not None:
            return  # it is not for this process to say how the run went
        before = self._run_file["summary"].get("models", {})
        if models_in_summary(self.reported().models) != before:
            with contextlib.suppress(DispatcherError):  # the output is whole without it
                await self._in_claim_thread(self._ownership.confirm)
                await self._save_summary()

    # ---------------------------------------------------------------- time

    async def _tick_forever(self) -> None:
        """Let deadlines pass on the server's own clock, not only when somebody polls."""
        while True:
            await asyncio.sleep(min(_TICK_S, self.queue.policy.lease_term_s / 4))
            now = self._clock.now()
            self.observe()
            if self._monotonic() < self._full_until:
                continue
            self.queue.expire(now)
            self.worker_totals.forget_all_but(self.queue.workers)
            await self._bury_condemned()
            self.alarms.look(self.queue)
            self._queue_events()
            assert self._writer is not None
            if (
                self._writer.output.written < self.queue.first_open
                or now - self._checkpoint_at >= self.settings.checkpoint_every_s
            ):
                self._work_queued.set()
            self._notify()  # an idle worker may get a copy of an item that runs too long

    def observe(self) -> None:
        """Let those who watch see how far the run is, in true seconds."""
        tokens = self.worker_totals.completion_tokens
        self.observed.look(self._monotonic(), self.queue, tokens)

    async def _confirm_forever(self) -> None:
        """Let others see that this process has the run, and notice when it has it no more."""
        while True:
            await asyncio.sleep(REFRESH_S)
            with contextlib.suppress(StorageError):  # tried again before it matters
                await self._in_claim_thread(self._ownership.confirm)

    async def _until_confirmed(self) -> None:
        """Return when nobody else can have taken the run.

        After a standstill (a stopped process, a hanging file system) that must be looked up.
        """
        while not self._ownership.is_confirmed:
            try:
                await self._in_claim_thread(self._ownership.confirm)
            except StorageError:
                if self._closed:
                    raise  # what waits was not acknowledged; the next start takes it up
                await asyncio.sleep(_CONFIRM_AGAIN_S)

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a background loop; what ends it ends the run in this process."""
        try:
            await work
        except DispatcherError as error:
            self._stop(error)
        except Exception as error:
            # A defect of ours: stop acknowledging, tell every caller, and let it be seen.
            self._stop(DispatcherError(f"the run stopped: {type(error).__name__}: {error}"))
            raise

    def _stop(self, failure: DispatcherError) -> None:
        self.failure = self.failure or failure  # the first one is the cause of the others
        self._copy_stop.set()
        for waiting in (self._writing, self._batch_done):
            if waiting is not None:
                waiting.refuse(self.failure)
        self.stopped.set()
        self._notify()

    # ---------------------------------------------------------------- threads

    async def _in_writer(self, call: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._write_thread, call, *args)

    async def _in_claim_thread(self, call: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._claim_thread, call, *args)


def _facts_of(found: Pause | Jump | None) -> dict[str, Any] | None:
    return asdict(found) | {"message": str(found)} if found is not None else None


_HEARD_BEFORE = (
    "%s was heard before: --accept-failures and --unpause hold for the first time that it starts "
    "the run, and not when it is started again"
)

_NOT_KEPT = "the journal cannot be written (is the disk full?); nothing was changed, try again"


def _is_solo(grants: Sequence[Grant]) -> bool:
    return bool(grants) and grants[0].solo  # one that is has no other beside it


def _bytes_of(grants: Sequence[Grant], queue: WorkQueue) -> int:
    size = sum([grant.line_bytes for grant in grants])
    if len(queue.steps):
        size += sum(queue.steps.size_of(grant.work_id) for grant in grants)
    return size


def _may_renew(item: ReleaseItem) -> bool:
    # Where answers are dropped the task begins again, so that there is nothing to go on with.
    return (
        item.renew
        and item.reason == CRASH
        and not item.charge
        and not item.fresh_start
        and _yields_kept(item) is None
    )


def _yields_kept(item: ReleaseItem) -> int | None:
    if item.steps == "drop":
        return 0
    return None if item.keep_yields is None else max(0, item.keep_yields)


def _is_sound(step: StepItem) -> bool:
    yield_number, place = step.pos
    return (
        0 <= yield_number < _MOST_YIELDS
        and 0 <= place < _MOST_YIELDS
        and len(step.hash) <= _LONGEST_HASH
        and step.hash.isalnum()
        and step.hash.isascii()
    )
