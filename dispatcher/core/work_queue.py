"""The life of every work item: all transitions are here, and only here.

    unread --open_lines--> ready --lease--> leased --finish--> done
                             ^               |
                             |               +--release, fail, expire, heartbeat-->
                            |                        the lease ends: who pays?
                            +--- retries left -------------+
                                                           +--- none left: condemned
                                                                --tombstone--> done

Most lines go from unread to leased at once (`lease_fresh`).

Two kinds of state. The durable half (which lines are done, open items with their counts and
leases) changes only in `apply`, by an event; every event made since the last `take_events` is
handed to the caller, who writes it to the journal before telling anybody. Replaying the events
rebuilds that half. The volatile half (workers, deadlines, progress) is in core/workers.py.

Nothing here does I/O or reads a clock: `now` is any number of seconds that never goes back.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec

from dispatcher.core.events import (
    Absolved,
    Counters,
    Ended,
    EndKind,
    Event,
    FailureLimitSet,
    FailuresAccepted,
    FailuresPaused,
    Finished,
    Issued,
    IssuedFresh,
    ItemState,
    Joined,
    LeaseEnded,
    LeaseState,
    Left,
    Opened,
    OperatorPaused,
    OperatorResumed,
    Past,
    Position,
    QueueState,
    StartHeard,
    Stepped,
    StepsCut,
    StepState,
    Tombstoned,
    Watched,
)
from dispatcher.core.failures import parse_failure_limit
from dispatcher.core.grants import (
    Grant,
    QueuePolicy,
    Renewal,
    Verdict,
    lease_id,
    lease_ids,
    parse_lease_id,
)
from dispatcher.core.items import Item, ReadyItems
from dispatcher.core.line_states import LineStates
from dispatcher.core.pausing import Pause, Pauses, PausingEvent
from dispatcher.core.steps import StepBook, StepNote
from dispatcher.core.workers import PROGRESS_UNKNOWN, Durations, Lease, Worker
from dispatcher.models import Outcome, StepOutcome

__all__ = [
    "CRASH",
    "MAX_RETRIES_EXCEEDED",
    "VANISHED",
    "WORK_TIMEOUT",
    "Arrivals",
    "Grant",
    "QueuePolicy",
    "Renewal",
    "Verdict",
    "WorkQueue",
    "lease_id",
    "lease_ids",
    "parse_lease_id",
]

_FORGET_AFTER_TERMS = 20
_UNLIMITED = 1 << 62
_BEFORE_ALL: Position = (-1, 0)

CRASH = "crash"
"""The release reason by which a worker says that its model server died under the item."""


class Arrivals(NamedTuple):
    """Results as they came, in columns: whose, the serials of the leases they name, the lines.

    `kinds` are those of their errors, "" for a line that is none. All four are equally long.
    """

    work_ids: list[int]
    serials: list[int | None]
    results: list[msgspec.Raw]
    kinds: list[str]

    def at(self, places: Collection[int]) -> Arrivals:
        """Return those at these places."""
        return Arrivals(
            [self.work_ids[n] for n in places],
            [self.serials[n] for n in places],
            [self.results[n] for n in places],
            [self.kinds[n] for n in places],
        )


class WorkQueue:
    """Decides who works on what, who pays when it goes wrong, and what is done."""

    def __init__(self, policy: QueuePolicy) -> None:
        self.policy = policy
        # Durable, changed by apply() alone.
        self.next_offset = 0
        self.next_serial = 1
        self.counters = Counters()
        self.pauses = Pauses()
        self.items: dict[int, Item] = {}
        self.steps = StepBook()
        self._lines = LineStates()
        # Volatile.
        self.input_ended = False
        self.pause: Pause | None = None  # that of `pauses`: every call for work looks at it
        self.latest_failed: dict[str, int] = {}  # kind of error -> the last line that has it
        self.workers: dict[str, Worker] = {}
        self.leases: dict[int, Lease] = {}
        self.condemned: list[int] = []
        # Worker -> items its vanishing counted a crash for, to be taken back should it return.
        self._blamed: dict[str, list[int]] = {}
        self._ready = ReadyItems(self.items, policy.crashes_before_solo)
        # Heap of (deadline, serial of the first lease, how many leases were given with it).
        self._deadlines: list[tuple[float, int, int]] = []
        self._durations = Durations()
        self._overdue: tuple[float, list[Lease]] = (float("-inf"), [])
        self._pasts: list[Past] = []
        self._events: list[Event] = []
        self._appliers: dict[type[Event], Callable[[Any, float], None]] = {
            Opened: self._apply_opened,
            Issued: self._apply_issued,
            IssuedFresh: self._apply_issued_fresh,
            Watched: self._apply_watched,
            Finished: self._apply_finished,
            Tombstoned: self._apply_tombstoned,
            LeaseEnded: self._apply_ended,
            Stepped: self._apply_stepped,
            StepsCut: self._apply_cut,
            Absolved: self._apply_absolved,
            FailureLimitSet: self._apply_pausing,
            FailuresAccepted: self._apply_pausing,
            FailuresPaused: self._apply_pausing,
            OperatorPaused: self._apply_pausing,
            OperatorResumed: self._apply_pausing,
            StartHeard: self._apply_pausing,
            Joined: self._apply_joined,
            Left: self._apply_left,
        }

    # ---------------------------------------------------------------- what the caller asks

    @property
    def first_open(self) -> int:
        """The first line without a result; all before it have theirs."""
        return self._lines.first_open

    @property
    def next_work_id(self) -> int:
        """How many lines were read."""
        return self._lines.end

    @property
    def is_complete(self) -> bool:
        """True when every line of the input has its result."""
        return self.input_ended and self.first_open == self.next_work_id

    @property
    def ready_count(self) -> int:
        """How many items could be handed out now without reading a new line."""
        return self._ready.count

    @property
    def waiting_count(self) -> int:
        """How many finished items wait behind an open line for their turn in the output."""
        return self.next_work_id - self.first_open - len(self.items)

    def may_open(self) -> bool:
        """Say whether a new line may be read: input left, within the window, not paused."""
        return not self.input_ended and self.pause is None and self.window_room() > 0

    def window_room(self) -> int:
        """How many more lines the window lets be read; more than anybody asks for without one."""
        window = self.policy.window
        return window - (self.next_work_id - self.first_open) if window else _UNLIMITED

    def take_events(self) -> list[Event]:
        """Return the events since the last call, oldest first; the caller makes them durable."""
        events, self._events = self._events, []
        return events

    def take_pasts(self) -> list[Past]:
        """Return what the lines finished since the last call went through, for people to read."""
        pasts, self._pasts = self._pasts, []
        return pasts

    # ---------------------------------------------------------------- handing out

    def open_lines(self, offset: int, sizes: list[int]) -> int:
        """Take the next input lines into the queue, ready; return the work id of the first.

        They begin at byte `offset` of the input; `sizes` holds the bytes of each.
        """
        work_id = self.next_work_id
        self._record(Opened(work_id, offset, sizes), now=0.0)
        return work_id

    def lease_fresh(
        self, worker: str, offset: int, sizes: list[int], now: float
    ) -> tuple[int, int]:
        """Take the next input lines into the queue, leased to a worker at once.

        They stand in the input as for `open_lines`, and `may_open`. Returns the work id of the
        first and the serial of its lease; those of the others count up from there.
        """
        known = self._know(worker, now) if worker else None
        beats = known is not None and known.heartbeats
        work_id, serial = self.next_work_id, self.next_serial
        self._record(IssuedFresh(worker, beats, serial, work_id, offset, sizes), now)
        self._note_leased(known, serial, len(sizes), now)
        return work_id, serial

    def lease_ready(
        self, worker: str, count: int, now: float, max_bytes: int = 1 << 62
    ) -> list[Grant]:
        """Lease up to `count` ready items until `max_bytes` are reached.

        Items handed out before go first, lowest line first. One that was running when engines
        died goes out alone, so that the worker can run nothing else beside it. While the run is
        paused there are none.
        """
        if self.pause is not None:
            return []
        if item := self._ready.take_solo():
            return self._lease([item], worker, now)
        beside = self.steps.size_of if len(self.steps) else None
        return self._lease(self._ready.take(count, max_bytes, beside), worker, now)

    def lease_backup(
        self, worker: str, count: int, now: float, max_bytes: int = 1 << 62
    ) -> list[Grant]:
        """Lease second copies of items that run far longer than others do, to another worker.

        Call it only when nothing is ready: a copy costs nothing but idle time then (J. Dean and
        S. Ghemawat, "MapReduce", OSDI 2004, section 3.6, "backup tasks").
        """
        known = self.workers.get(worker)
        if self.pause is not None or not self.policy.backups:
            return []
        if known is None or not known.heartbeats:
            return []
        grants: list[Grant] = []
        for lease in self._find_overdue(now):
            item = self.items.get(lease.work_id)
            if len(grants) == count or max_bytes <= 0:
                break
            if item is None or item.leases != (lease,) or lease.worker == worker:
                continue
            grants += self._lease([item], worker, now)
            max_bytes -= item.line_bytes + self.steps.size_of(item.work_id)
        return grants

    def note_idle(self, worker: str, want: int) -> None:
        """Remember that this worker asked for `want` items and got none (0: no longer)."""
        if known := self.workers.get(worker):
            known.idle_want = want

    def end_of_input(self) -> None:
        """The last line was opened."""
        self.input_ended = True

    # ---------------------------------------------------------------- taking back

    def finish(
        self, work_id: int, serial: int | None, result: bytes, *, error: str = "", now: float
    ) -> Outcome:
        """Take one result, as `finish_all` does."""
        arrivals = Arrivals([work_id], [serial], [msgspec.Raw(result)], [error])
        return self.finish_all(arrivals, now)[0]

    def finish_all(self, arrivals: Arrivals, now: float) -> list[Outcome]:
        """Take results. The first valid one of an item wins, whoever sends it, however late."""
        named = set(arrivals.work_ids)
        taken = arrivals
        outcomes = [Outcome.ACCEPTED] * len(arrivals.work_ids)
        if len(named) < len(outcomes) or not named <= self.items.keys():
            taken, outcomes = self._sort_out(arrivals)
        work_ids, serials, results, kinds = taken
        if not work_ids:
            return outcomes
        errors = _lines_by_kind(work_ids, kinds) if any(kinds) else {}
        event = Finished(work_ids, [serial or 0 for serial in serials], errors, results)
        leases, storied = self._close(event)  # what `apply` does, which tells nothing
        self._events.append(event)
        self._note_paces(leases, now)
        for item in storied:
            self._note_past(item, kinds[work_ids.index(item.work_id)] or "ok")
        if errors:
            self._pause_if_too_many_failed()
        return outcomes

    def _sort_out(self, arrivals: Arrivals) -> tuple[Arrivals, list[Outcome]]:
        """Return which of the results are wanted, and what becomes of each."""
        taken: dict[int, int] = {}  # work id -> place
        outcomes: list[Outcome] = []
        for place, work_id in enumerate(arrivals.work_ids):
            if work_id not in taken and (
                work_id in self.items or self._lines.is_replaceable(work_id)
            ):
                taken[work_id] = place
                outcomes.append(Outcome.ACCEPTED)
            else:
                known = 0 <= work_id < self.next_work_id
                outcomes.append(Outcome.DUPLICATE if known else Outcome.UNKNOWN)
        return arrivals.at(taken.values()), outcomes

    def _note_paces(self, ended: Sequence[Lease], now: float) -> None:
        """Learn how fast workers are, and how long items take."""
        self._durations.extend([now - lease.running_since for lease in ended])
        names = [lease.worker for lease in ended]
        for name in set(names):
            if worker := self.workers.get(name):
                worker.note_finishes(names.count(name), now)

    def fail(self, work_id: int, serial: int | None, reason: str, now: float) -> None:
        """End a lease, charged: what its worker sent is no result."""
        if lease := self._find_lease(work_id, serial):
            self._end(lease, "charged", reason, now, keep_yields=0)

    def release(
        self,
        work_id: int,
        serial: int | None,
        *,
        charge: bool,
        reason: str,
        keep_yields: int | None,
        fresh_start: bool = False,
        now: float,
    ) -> bool:
        """Give a lease back. False when there is no such lease (any more).

        `keep_yields` and `fresh_start` are those of LeaseEnded.
        """
        lease = self._find_lease(work_id, serial)
        if lease is None:
            return False
        kind: EndKind = "charged"
        if not charge:
            free = self.items[work_id].releases < self.policy.max_free_releases
            if lease.recalled:
                kind = "returned"
            elif reason == CRASH:
                kind = "crashed"
            elif free:
                kind = "released"
            else:
                reason = f"released more than {self.policy.max_free_releases} times: {reason}"
        self._end(lease, kind, reason, now, keep_yields=keep_yields, fresh_start=fresh_start)
        return True

    def renew(
        self, work_id: int, serial: int, worker: str, reason: str, now: float, *, again: bool = True
    ) -> Renewal:
        """End a lease as a crash of the worker's engine, and lease the item to it again at once.

        The worker goes on with the item where it is, under the new lease. Not when the crash leaves
        the item to run alone, when it was charged, when a copy of it still runs, or when it is not
        to be leased `again`. A second call for the same lease, made because the reply to the first
        one was lost, ends nothing and is told what the first one was.
        """
        lease, item = self._find_lease(work_id, serial), self.items.get(work_id)
        if item is None:
            return Renewal(ended=False)
        if lease is None:
            # A renewed lease is younger, and no other worker's.
            own = [x for x in item.leases if worker and x.worker == worker and x.serial > serial]
            if not own:
                return Renewal(ended=False)
            return Renewal(False, lease_id(work_id, own[-1].serial), item.attempt)
        attempt = item.attempt
        self._end(lease, "crashed", reason, now)
        may_go_on = (
            again
            and bool(worker)
            and lease.worker == worker
            and item.queued
            and item.attempt == attempt
            and item.crashes < self.policy.crashes_before_solo
        )
        if not may_go_on:
            return Renewal(ended=True)
        renewed = self.next_serial
        self._record(Issued(worker, lease.heartbeats, False, renewed, [work_id]), now)
        young = self.leases[renewed]
        # It was running, and long since: nobody may call it back, and should the worker vanish
        # before it says so again, that is a crash.
        young.progress = max(1, lease.progress)
        young.started, young.running_since = True, lease.running_since
        heapq.heappush(self._deadlines, (self._deadline(young, now), renewed, 1))
        return Renewal(True, lease_id(work_id, renewed), item.attempt)

    # ---------------------------------------------------------------- steps

    def record_step(
        self,
        work_id: int,
        serial: int | None,
        attempt: int,
        position: Position,
        request_hash: str,
        response: bytes,
    ) -> StepOutcome:
        """Keep an answer that an item's task got, for the next lease of the item."""
        if not self._may_record(work_id, serial, attempt):
            return StepOutcome.STALE
        known = self.steps.of(work_id).get(position)
        if known is not None and known.hash == request_hash:
            return StepOutcome.ACCEPTED  # the reply to an earlier call was lost
        policy, size = self.policy, len(response)
        if (
            size > policy.step_bytes
            or len(self.steps.of(work_id)) >= policy.item_steps
            or self.steps.size_of(work_id) + size > policy.item_step_bytes
            or self.steps.size + size > policy.run_step_bytes
        ):
            return StepOutcome.FULL
        if known is not None:
            self._record(StepsCut(work_id, position), now=0.0)
        raw = msgspec.Raw(response)
        self._record(Stepped(work_id, serial or 0, position, request_hash, raw), now=0.0)
        return StepOutcome.ACCEPTED

    def cut_steps(
        self,
        work_id: int,
        serial: int | None,
        attempt: int,
        position: Position,
        void_hash: str | None = None,
    ) -> StepOutcome:
        """The task asks something else than recorded: drop what is recorded from there on.

        Unless something else than `void_hash` stands there by now: then this call came twice.
        """
        if not self._may_record(work_id, serial, attempt):
            return StepOutcome.STALE
        steps = self.steps.of(work_id)
        known = steps.get(position)
        if void_hash is not None and (known is None or known.hash != void_hash):
            return StepOutcome.ACCEPTED
        if position <= max(steps, default=_BEFORE_ALL):
            self._record(StepsCut(work_id, position), now=0.0)
        return StepOutcome.ACCEPTED

    def _may_record(self, work_id: int, serial: int | None, attempt: int) -> bool:
        """Say whether this is the item's oldest lease, in an attempt that still goes on.

        One that is charged already will be begun again, so that copies still at work on it have
        nothing to add.
        """
        item = self.items.get(work_id)
        return (
            item is not None
            and bool(item.leases)
            and item.leases[0].serial == serial
            and item.attempt == attempt
            and not item.owes_charge
        )

    def condemned_ids(self) -> list[int]:
        """Return the items that ran out of reissues and have no tombstone yet."""
        waiting = [i for i in self.condemned if i in self.items and self.items[i].condemned]
        self.condemned = waiting
        return waiting

    def tombstone(self, work_id: int, error: str, result: bytes, now: float) -> None:
        """Give an open item its `__ERROR__` line; nothing happens when it got a result first."""
        if (item := self.items.get(work_id)) is not None:
            if item.history:
                self._note_past(item, error)
            self._record(Tombstoned(work_id, error, msgspec.Raw(result)), now)
            self._pause_if_too_many_failed()

    def _note_past(self, item: Item, outcome: str) -> None:
        worker = item.leases[0].worker if item.leases else ""
        self._pasts.append(Past(item.work_id, outcome, worker, list(item.history)))

    def finished_from(self, work_id: int) -> int:
        """Return how many lines from this one on have their result."""
        open_lines = sum(open_id >= work_id for open_id in self.items)
        return self.next_work_id - work_id - open_lines

    def note_written(self, first_unwritten: int) -> None:
        """Lines before this one stand in the output, where a tombstone is final."""
        self._lines.note_written(first_unwritten)

    # ---------------------------------------------------------------- pauses

    @property
    def max_failures(self) -> str:
        """How many lines may fail before the run pauses, as text: a count, a share, or off."""
        return self.pauses.limit(self.policy.max_failures)

    def set_max_failures(self, limit: str) -> None:
        """Let so many lines fail from now on; a paused run goes on if that is enough.

        Raises ValueError for what is no limit.
        """
        parse_failure_limit(limit)
        self._record(FailureLimitSet(limit, self.policy.max_failures), now=0.0)
        self._pause_if_too_many_failed()

    def accept_failures(self) -> None:
        """Count failed lines anew from here, as if none had failed; a paused run goes on."""
        counters = self.counters
        accepted = FailuresAccepted(counters.done, counters.failed, dict(counters.errors))
        self._record(accepted, now=0.0)
        self._pause_if_too_many_failed()

    def pause_for_operator(self, reason: str) -> None:
        """Hand out nothing until `resume`, also after a restart; another reason replaces the one
        given before, none does not."""
        before = self.pauses.operator
        if before is None or reason not in ("", before.reason):
            self._record(OperatorPaused(reason), now=0.0)

    def resume(self) -> None:
        """Lift the operator's pause; one for failed lines stays."""
        if self.pauses.operator is not None:
            self._record(OperatorResumed(), now=0.0)

    def hear_start(self, start: str, *, accept_failures: bool, resume: bool) -> bool:
        """Do what a start of the run was told to do once; say whether it is done.

        It is not when the start has a name and was heard before: Slurm, say, repeats a command
        whenever it starts its job again, and nobody has asked anew then.
        """
        if not accept_failures and not resume:
            return True
        if start and start == self.pauses.heard:
            return False
        if accept_failures:
            self.accept_failures()
        if resume:
            self.resume()
        if start:
            self._record(StartHeard(start), now=0.0)
        return True

    def _pause_if_too_many_failed(self) -> None:
        """Once paused, a run stays so until somebody who looked at the cause says otherwise."""
        begun_with, counters = self.policy.max_failures, self.counters
        if self.is_complete:
            return
        if paused := self.pauses.too_many(begun_with, counters, self.latest_failed):
            self._record(paused, now=0.0)

    # ---------------------------------------------------------------- workers and time

    def heartbeat(
        self, name: str, held: Mapping[tuple[int, int], int], *, backend_up: bool, now: float
    ) -> Verdict:
        """A worker is alive; `held` maps (work_id, serial) to progress, prefetched included."""
        worker = self._know(name, now)
        if not worker.heartbeats:
            self._record(Joined(name), now)
        if backend_up and not worker.backend_up:
            worker.backend_up_since = now
        worker.backend_up = backend_up
        if worker.vanished_at is not None or worker.cut_off or name in self._blamed:
            self._welcome_back(worker, held, now)
        verdict = Verdict()
        for (work_id, serial), progress in held.items():
            lease = self.leases.get(serial)
            if lease is None or lease.work_id != work_id or lease.worker != name:
                is_open = work_id in self.items
                (verdict.lost if is_open else verdict.done).append(lease_id(work_id, serial))
                continue
            if not lease.heartbeats:
                self._record(Watched(work_id, serial), now)
            lease.missed_heartbeats = 0
            if progress != lease.progress:
                if progress > 0 and not lease.started:
                    lease.started, lease.running_since = True, now
                lease.progress, lease.progressed_at = progress, now
            if lease.recalled:
                if lease.unstarted:
                    verdict.back.append(lease_id(work_id, serial))
                else:
                    lease.recalled = False
        self._return_unnamed(worker, held, now)
        return verdict

    def expire(self, now: float) -> None:
        """Let time act: deadlines, vanished workers, items to call back. Call it every second."""
        self._expire_deadlines(now)
        self._expire_workers(now)
        self._call_back(now)

    def set_work_timeout(self, timeout_s: float, now: float) -> None:
        """Change the time an item may take without progress, for leases already given too."""
        self.policy = replace(self.policy, work_timeout_s=timeout_s)
        self._deadlines = [(self._deadline(x, now), serial, 1) for serial, x in self.leases.items()]
        heapq.heapify(self._deadlines)

    # ---------------------------------------------------------------- durable state

    def apply(self, event: Event, now: float) -> None:
        """Change the durable state by one event; the only place that does."""
        self._appliers[type(event)](event, now)

    def checkpoint(self) -> QueueState:
        """Return the durable state, whole."""
        return QueueState(
            first_open=self.first_open,
            next_work_id=self.next_work_id,
            next_offset=self.next_offset,
            next_serial=self.next_serial,
            counters=self.counters.copy(),
            items=[self._item_state(item) for item in self.items.values()],
            tombstoned=self._lines.tombstones(),
            workers=sorted(w.name for w in self.workers.values() if w.heartbeats),
            failures=self.pauses.failures,
            operator=self.pauses.operator,
            heard=self.pauses.heard,
        )

    def _item_state(self, item: Item) -> ItemState:
        leases = [LeaseState(x.serial, x.worker, x.heartbeats, x.solo) for x in item.leases]
        steps = self.steps.of(item.work_id).items()
        return ItemState(
            item.work_id,
            item.offset,
            item.line_bytes,
            item.retries,
            item.crashes,
            item.releases,
            item.attempt,
            item.owes_charge,
            item.condemned,
            leases,
            [*item.history],
            item.fresh_starts,
            [StepState(position, note.hash, note.size) for position, note in steps],
        )

    def restore(self, state: QueueState, now: float) -> None:
        """Take over a checkpoint; every lease in it gets a fresh term."""
        self._lines = LineStates(state.first_open, state.next_work_id, state.tombstoned)
        self.next_offset, self.next_serial = state.next_offset, state.next_serial
        self.counters = state.counters.copy()
        self.pauses.restore(state)
        self.pause = self.pauses.current
        for name in state.workers:
            self._know(name, now).heartbeats = True
        for saved in state.items:
            item = Item(
                saved.work_id,
                saved.offset,
                saved.line_bytes,
                retries=saved.retries,
                crashes=saved.crashes,
                releases=saved.releases,
                attempt=saved.attempt,
                owes_charge=saved.owes_charge,
                fresh_starts=saved.fresh_starts,
                history=tuple(saved.history),
            )
            for step in saved.steps:
                self.steps.add(saved.work_id, step.position, StepNote(step.hash, step.size))
            self.items[saved.work_id] = item
            self._lines.reopen(saved.work_id)
            for was in saved.leases:
                lease = Lease(
                    was.serial, item.work_id, was.worker, was.heartbeats, was.solo, now, now, now
                )
                item.leases += (lease,)
                self.leases[was.serial] = lease
                if known := self.workers.get(was.worker):
                    known.leases[was.serial] = lease
            if saved.condemned:
                self._condemn(item)
            elif not item.leases:
                self._ready.put_back(item)

    def begin_again(self, now: float) -> None:
        """After a replay: nobody has spoken yet, so every lease and worker gets a fresh term."""
        for lease in self.leases.values():
            lease.issued_at = lease.progressed_at = lease.running_since = now
            lease.progress = PROGRESS_UNKNOWN
            if lease.worker:
                worker = self._know(lease.worker, now)
                worker.heartbeats = worker.heartbeats or lease.heartbeats
        for item in self.items.values():
            for ended in item.history:
                if _is_blame(ended, ended.worker):
                    self._blamed.setdefault(ended.worker, []).append(item.work_id)
        self.set_work_timeout(self.policy.work_timeout_s, now)
        paused, limit = self.pauses.failures.paused, self.max_failures
        if paused is not None and paused.limit != limit:  # this start names another one
            self._record(FailureLimitSet(limit, self.policy.max_failures), now)
        self._pause_if_too_many_failed()

    def adopt_workers(self, others: Iterable[Worker], now: float) -> None:
        """After a rebuild in a living process: keep what was known of the workers."""
        for other in others:
            worker = self._know(other.name, now)
            if other.heartbeats and not worker.heartbeats:
                self._record(Joined(other.name), now)
            worker.backend_up = other.backend_up
            worker.pace_s, worker.finished = other.pace_s, other.finished

    # ---------------------------------------------------------------- inside: events

    def _record(self, event: Event, now: float) -> None:
        self._appliers[type(event)](event, now)
        self._events.append(event)

    def _end(
        self,
        lease: Lease,
        kind: EndKind,
        reason: str,
        now: float,
        *,
        keep_yields: int | None = None,
        fresh_start: bool = False,
    ) -> None:
        ended = LeaseEnded(
            lease.work_id, lease.serial, kind, reason, keep_yields, fresh_start=fresh_start
        )
        self._record(ended, now)

    def _apply_opened(self, event: Opened, now: float) -> None:
        items, work_id, offset = self.items, event.work_id, event.offset
        for size in event.sizes:
            items[work_id] = Item(work_id, offset, size, queued=True)
            work_id += 1
            offset += size
        self._ready.add_fresh(range(event.work_id, work_id))
        self._lines.open(len(event.sizes))
        self.next_offset = offset

    def _apply_finished(self, event: Finished, now: float) -> None:
        self._close(event)

    def _close(self, event: Finished) -> tuple[list[Lease], list[Item]]:
        """These items have their result; whoever still works on one works in vain.

        Return the leases under which the results came, and the items that have a history.
        """
        take_item, leases, workers = self.items.pop, self.leases, self.workers
        came_under: list[Lease] = []
        storied: list[Item] = []
        for work_id, serial in zip(event.work_ids, event.serials, strict=True):
            item = take_item(work_id, None)
            if item is None:
                if self._lines.had_tombstone(work_id):
                    self._undo_tombstone_count()
                continue
            if item.queued:
                self._ready.remove(item)
            for lease in item.leases:
                if lease.serial == serial:
                    came_under.append(lease)
                del leases[lease.serial]
                if lease.worker and (worker := workers.get(lease.worker)):
                    worker.leases.pop(lease.serial, None)
            if item.history:
                storied.append(item)
        self._lines.finish(event.work_ids)
        self.counters.done += len(event.work_ids)
        for kind, failed in event.errors.items():
            self.counters.add_errors(kind, len(failed))
            self._note_failed(kind, failed[-1])
        self.steps.apply(event)
        return came_under, storied

    def _apply_tombstoned(self, event: Tombstoned, now: float) -> None:
        self.counters.done += 1
        self.counters.add_errors(event.error, 1)
        self._note_failed(event.error, event.work_id)
        by_error = self.counters.tombstones
        by_error[event.error] = by_error.get(event.error, 0) + 1
        # A line that was refused stays so; only an item out of reissues may still get a late
        # result.
        replaceable = event.error == MAX_RETRIES_EXCEEDED
        if item := self.items.pop(event.work_id, None):
            self._let_go(item)
        self.steps.apply(event)
        if replaceable:
            self._lines.bury(event.work_id)
        else:
            self._lines.finish([event.work_id])

    def _note_failed(self, kind: str, work_id: int) -> None:
        if kind in self.counters.errors:  # which are bounded
            self.latest_failed[kind] = work_id

    def _apply_pausing(self, event: PausingEvent, now: float) -> None:
        self.pauses.apply(event)
        self.pause = self.pauses.current

    def _apply_watched(self, event: Watched, now: float) -> None:
        if lease := self.leases.get(event.serial):
            lease.heartbeats = True

    def _apply_issued(self, event: Issued, now: float) -> None:
        items, leases = self.items, self.leases
        serial, worker = event.serial, event.worker
        known = self.workers.get(worker) if worker else None
        for work_id in event.work_ids:
            if (item := items.get(work_id)) is not None:
                if item.queued:
                    self._ready.remove(item)
                elif item.condemned:  # in a replay only: the limit was lowered since
                    item.condemned = False
                    item.retries += 1
                lease = Lease(serial, work_id, worker, event.heartbeats, event.solo, now, now, now)
                item.leases += (lease,)
                leases[serial] = lease
                if known is not None:
                    known.leases[serial] = lease
            serial += 1
        self.counters.issued += len(event.work_ids)
        self.next_serial = max(self.next_serial, serial)

    def _apply_issued_fresh(self, event: IssuedFresh, now: float) -> None:
        # As `event.parts()` one after the other, at half the cost.
        items, leases = self.items, self.leases
        worker, beats, offset = event.worker, event.heartbeats, event.offset
        known = self.workers.get(worker) if worker else None
        work_id, serial = event.work_id, event.serial
        for size in event.sizes:
            lease = Lease(serial, work_id, worker, beats, False, now, now, now)
            items[work_id] = Item(work_id, offset, size, (lease,))
            leases[serial] = lease
            if known is not None:
                known.leases[serial] = lease
            work_id += 1
            serial += 1
            offset += size
        self._lines.open(len(event.sizes))
        self.next_offset = offset
        self.counters.issued += len(event.sizes)
        self.next_serial = max(self.next_serial, serial)

    def _apply_ended(self, event: LeaseEnded, now: float) -> None:
        lease = self.leases.get(event.serial)
        if lease is None:
            return
        self._drop_lease(lease)
        self.steps.apply(event)
        item = self.items[event.work_id]
        item.leases = tuple(other for other in item.leases if other is not lease)
        item.fresh_starts += event.fresh_start
        counters = self.counters
        counters.returned += event.kind == "returned"
        counters.released += event.kind == "released"
        counters.crashed += event.kind == "crashed"
        counters.expired += event.reason == WORK_TIMEOUT
        item.releases += event.kind == "released"
        item.crashes += event.kind == "crashed"
        if event.kind in ("charged", "crashed"):
            ended = Ended(item.attempt, lease.worker, event.kind, event.reason, lease.solo)
            item.history = (*item.history, ended)[-self.policy.history_limit :]
            item.owes_charge = item.owes_charge or _costs(ended)
        if item.leases:
            return  # a copy still runs; the attempt is judged when the last one ends
        if item.owes_charge:
            item.owes_charge = False
            item.attempt += 1
            counters.charged += 1
            if 0 <= self.policy.max_retries <= item.retries:
                self._condemn(item)
                return
            item.retries += 1
        self._ready.put_back(item)

    def _apply_stepped(self, event: Stepped, now: float) -> None:
        note = StepNote(event.hash, len(bytes(event.response)))
        self.steps.add(event.work_id, event.position, note)
        self.counters.steps += 1

    def _apply_cut(self, event: StepsCut, now: float) -> None:
        self.steps.apply(event)
        self.counters.step_mismatches += 1

    def _apply_absolved(self, event: Absolved, now: float) -> None:
        item = self.items.get(event.work_id)
        for_it = [e for e in item.history if _is_blame(e, event.worker)] if item else []
        if item is None or not for_it:
            return
        taken_back = for_it[-1]
        item.history = tuple(ended for ended in item.history if ended is not taken_back)
        item.crashes = max(0, item.crashes - 1)
        others = [e for e in item.history if e.attempt == taken_back.attempt and _costs(e)]
        if not _costs(taken_back) or others:
            return  # it had cost nothing, or the attempt is charged for something else, too
        if item.owes_charge:
            item.owes_charge = False  # a copy still runs, so the charge was only noted
            return
        self.counters.charged -= 1
        if item.condemned:
            item.condemned = False
            self._ready.put_back(item)
        else:
            item.retries = max(0, item.retries - 1)

    def _condemn(self, item: Item) -> None:
        if 0 <= self.policy.max_retries <= item.retries:
            item.condemned = True
            if item.work_id not in self.condemned:
                self.condemned.append(item.work_id)
        else:  # the limit was raised since
            item.retries += 1
            self._ready.put_back(item)

    def _apply_joined(self, event: Joined, now: float) -> None:
        self._know(event.worker, now).heartbeats = True

    def _apply_left(self, event: Left, now: float) -> None:
        self.workers.pop(event.worker, None)
        self._blamed.pop(event.worker, None)

    def _let_go(self, item: Item) -> None:
        """The item has its line of output; whoever still works on it works in vain."""
        if item.queued:
            self._ready.remove(item)
        for lease in item.leases:
            self._drop_lease(lease)

    def _undo_tombstone_count(self) -> None:
        # A late result replaces a tombstone that is not written yet.
        self.counters.done -= 1
        self.counters.add_errors(MAX_RETRIES_EXCEEDED, -1)
        by_error = self.counters.tombstones
        if by_error.get(MAX_RETRIES_EXCEEDED):
            by_error[MAX_RETRIES_EXCEEDED] -= 1

    def _drop_lease(self, lease: Lease) -> None:
        self.leases.pop(lease.serial, None)
        if lease.worker and (worker := self.workers.get(lease.worker)):
            worker.leases.pop(lease.serial, None)

    # ---------------------------------------------------------------- inside: handing out

    def _lease(self, items: list[Item], worker: str, now: float) -> list[Grant]:
        if not items:
            return []
        known = self._know(worker, now) if worker else None
        serial = self.next_serial
        solo = items[0].crashes >= self.policy.crashes_before_solo
        beats = known is not None and known.heartbeats
        work_ids = [item.work_id for item in items]
        self._record(Issued(worker, beats, solo, serial, work_ids), now)
        self._note_leased(known, serial, len(items), now)
        return [
            Grant(
                item.work_id,
                lease,
                item.offset,
                item.line_bytes,
                item.retries,
                item.attempt,
                solo,
                item.fresh_starts,
            )
            for item, lease in zip(items, lease_ids(work_ids, serial), strict=True)
        ]

    def _note_leased(self, known: Worker | None, serial: int, count: int, now: float) -> None:
        deadline = self._deadline(self.leases[serial], now)
        heapq.heappush(self._deadlines, (deadline, serial, count))
        if known is not None:
            known.idle_want = 0
            known.vanished_at = None

    def _find_lease(self, work_id: int, serial: int | None) -> Lease | None:
        """Find a live lease; a client that names none means its oldest anonymous one."""
        if serial is not None:
            lease = self.leases.get(serial)
            return lease if lease is not None and lease.work_id == work_id else None
        item = self.items.get(work_id)
        leases = item.leases if item is not None else ()
        return next((lease for lease in leases if not lease.heartbeats), None)

    # ---------------------------------------------------------------- inside: workers

    def _know(self, name: str, now: float) -> Worker:
        worker = self.workers.get(name)
        if worker is None:
            worker = self.workers[name] = Worker(name, last_seen_at=now, backend_up_since=now)
            worker.leases = {s: x for s, x in self.leases.items() if x.worker == name}
        worker.last_seen_at = now
        return worker

    def _return_unnamed(
        self, worker: Worker, held: Mapping[tuple[int, int], int], now: float
    ) -> None:
        """Take back leases the worker does not know of: the reply that gave them was lost."""
        if len(worker.leases) == sum(serial in worker.leases for _, serial in held):
            return
        named = {serial for _, serial in held}
        for lease in [x for x in worker.leases.values() if x.serial not in named]:
            lease.missed_heartbeats += 1
            old = now - lease.issued_at > self.policy.lease_term_s
            if lease.missed_heartbeats >= 2 and old:
                self._end(lease, "returned", "the reply that handed it out was lost", now)

    def _expire_workers(self, now: float) -> None:
        term_s = self.policy.lease_term_s
        watched = [w for w in self.workers.values() if w.heartbeats]
        overdue = [w for w in watched if w.vanished_at is None and now - w.last_seen_at > term_s]
        if overdue:
            for worker in overdue:
                worker.vanished_at = now
            recent = [w for w in watched if w.vanished_at is not None]
            recent = [w for w in recent if now - (w.vanished_at or 0) <= term_s]
            present = [w for w in watched if w.vanished_at is None]
            # When so many go at once it is the network, the scheduler or this server.
            mass = len(recent) >= self.policy.mass_vanish_least and (
                len(recent) * 3 > len(recent) + len(present)
            )
            for worker in overdue:
                self._end_vanished(worker, blame=not mass, now=now)
            if mass:
                for worker in recent:
                    self._absolve(worker, now)
        forget_before = now - _FORGET_AFTER_TERMS * term_s
        gone = [w for w in self.workers.values() if w.last_seen_at < forget_before]
        for worker in gone:
            if worker.leases:
                continue
            if worker.heartbeats:
                self._record(Left(worker.name), now)
            else:
                del self.workers[worker.name]

    def _end_vanished(self, worker: Worker, *, blame: bool, now: float) -> None:
        for lease in list(worker.leases.values()):
            worker.cut_off[lease.serial] = (lease.work_id, lease.solo)
            if blame and lease.progress > 0:
                self._blamed.setdefault(worker.name, []).append(lease.work_id)
                self._end(lease, "crashed", VANISHED, now)
            else:
                self._end(lease, "returned", VANISHED, now)
        worker.idle_want = 0

    def _welcome_back(
        self, worker: Worker, held: Mapping[tuple[int, int], int], now: float
    ) -> None:
        """The worker was cut off, not dead: take blame back, let it keep what nobody else has."""
        worker.vanished_at = None
        self._absolve(worker, now)
        for work_id, serial in held:
            item = self.items.get(work_id)
            cut_id, solo = worker.cut_off.get(serial, (-1, False))
            if item is not None and cut_id == work_id and item.queued:
                self._record(Issued(worker.name, True, solo, serial, [work_id]), now)
                deadline = self._deadline(self.leases[serial], now)
                heapq.heappush(self._deadlines, (deadline, serial, 1))
        worker.cut_off.clear()

    def _absolve(self, worker: Worker, now: float) -> None:
        for work_id in self._blamed.pop(worker.name, []):
            if work_id in self.items:
                self._record(Absolved(work_id, worker.name), now)

    def _call_back(self, now: float) -> None:
        """Ask slow workers for unstarted items when others are idle and nothing else is left.

        While the run is paused, ask all workers for all of them: what is not begun cannot fail.
        """
        if self.pause is not None:
            for lease in self.leases.values():
                lease.recalled = lease.recalled or lease.unstarted
            return
        if not self.policy.backups or self.ready_count or self.may_open():
            return
        idle = {w.name: w.idle_want for w in self.workers.values() if w.idle_want}
        wanted = sum(idle.values()) - sum(lease.recalled for lease in self.leases.values())
        if not idle or wanted <= 0:
            return
        busy = [w for w in self.workers.values() if w.leases and w.name not in idle]
        for worker in sorted(busy, key=lambda w: -w.seconds_to_clear(now)):
            for lease in reversed(worker.leases.values()):
                if wanted and lease.unstarted and not lease.recalled:
                    lease.recalled = True
                    wanted -= 1

    # ---------------------------------------------------------------- inside: time

    def _deadline(self, lease: Lease, now: float) -> float:
        worker = self.workers.get(lease.worker) if lease.heartbeats else None
        if worker is None:
            return lease.issued_at + self.policy.work_timeout_s
        since = max(lease.progressed_at, worker.backend_up_since if worker.backend_up else now)
        return since + self.policy.work_timeout_s

    def _expire_deadlines(self, now: float) -> None:
        due = self._deadlines
        while due and due[0][0] <= now:
            _, first, count = heapq.heappop(due)
            for serial in range(first, first + count):
                if (lease := self.leases.get(serial)) is None:
                    continue
                deadline = self._deadline(lease, now)
                if deadline > now:  # progress was made since this entry was pushed
                    heapq.heappush(due, (deadline, serial, 1))
                elif lease.unstarted:
                    self._end(lease, "returned", "held too long without being started", now)
                else:
                    self._end(lease, "charged", WORK_TIMEOUT, now)

    def _find_overdue(self, now: float) -> Iterable[Lease]:
        """Leases of started items that run far longer than others did, longest first."""
        computed_at, overdue = self._overdue
        if now - computed_at >= 1.0:
            usual_s = self._durations.quantile_s(self.policy.backup_quantile)
            overdue = []
            if usual_s is not None:
                limit_s = self.policy.backup_factor * usual_s
                overdue = [
                    lease
                    for lease in self.leases.values()
                    if not lease.unstarted
                    and not lease.solo
                    and lease.progress != PROGRESS_UNKNOWN
                    and now - lease.running_since > limit_s
                ]
                overdue.sort(key=lambda lease: lease.running_since)
            self._overdue = (now, overdue)
        return overdue


VANISHED = "the worker vanished"
"""The end reason of a lease whose worker sent no heartbeat for a lease term."""

WORK_TIMEOUT = "work_timeout"
"""The end reason of a lease whose item made no progress for `work_timeout_s`."""

MAX_RETRIES_EXCEEDED = "max_retries_exceeded"
"""The error of the tombstone an item gets when it runs out of reissues."""


def _lines_by_kind(work_ids: Sequence[int], kinds: Sequence[str]) -> dict[str, list[int]]:
    """Return the lines that have an error, by its kind."""
    errors: dict[str, list[int]] = {}
    for work_id, kind in zip(work_ids, kinds, strict=True):
        if kind:
            errors.setdefault(kind, []).append(work_id)
    return errors


def _is_blame(ended: Ended, worker: str) -> bool:
    return ended.kind == "crashed" and ended.reason == VANISHED and ended.worker == worker


def _costs(ended: Ended) -> bool:
    """Say whether the attempt is charged for this; crashes in company are nobody's."""
    return ended.kind == "charged" or ended.solo
