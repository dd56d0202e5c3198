"""The work queue against a model of it: random lives, and after every step both say the same.

The model is the table "who pays" of the design and docs/protocol.md written down in the plainest
way: a list of lines, each with its live leases, looked through from end to end at every question.
It knows no heaps, no deadlines kept ahead, no events. Beside the queue runs a second one that gets
nothing but the queue's events, through JSON as the journal writes them; it must be the same too.

Sequences are repeated by DISPATCHER_TEST_SEED, a failure also by the blob that is printed: put it
as a decorator on the class of the machine. DISPATCHER_TEST_SEQUENCES asks for more of them.
"""

from __future__ import annotations

import copy
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import msgspec
import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dispatcher.core import failures
from dispatcher.core.events import Event, Issued, LeaseEnded, Position, QueueState
from dispatcher.core.work_queue import (
    CRASH,
    MAX_RETRIES_EXCEEDED,
    Grant,
    QueuePolicy,
    WorkQueue,
    lease_id,
    parse_lease_id,
)
from dispatcher.models import Outcome, StepOutcome
from tests.support.queues import arrivals, lease_fresh

SEED = int(os.environ.get("DISPATCHER_TEST_SEED", "20250701"))
SEQUENCES = int(os.environ.get("DISPATCHER_TEST_SEQUENCES", "2100"))
STEPS = 40

TERM_S = 30.0
FREE_RELEASES = 2
CRASHES_BEFORE_SOLO = 2
MASS_LEAST = 3
FORGET_AFTER_S = 20 * TERM_S
LEAST_DURATIONS = 10
LEAST_LINES = 4
"""A share of failures counts from so few lines on here."""
BACKUP_FACTOR = 1.5
UNKNOWN = -1
STEP_BYTES, ITEM_STEP_BYTES, RUN_STEP_BYTES = 12, 30, 60

DONE = b'{"answer": 1}'
ERROR = b'{"__ERROR__": {}}'
STRANGERS = ("", "curl")
WORKERS = ("a", "b", "c", "d", "e")
CROWD = (*WORKERS, "f", "g", "h", "i")

encode = msgspec.json.Encoder().encode
decode_event = msgspec.json.Decoder(Event).decode
decode_state = msgspec.json.Decoder(QueueState).decode
ran = {"sequences": 0, "steps": 0}
met: Counter[str] = Counter()


# -------------------------------------------------------------------- the model


@dataclass(eq=False)
class Ending:
    """How a lease ended that was charged, or crashed; `costs` unless it is taken back."""

    attempt: int
    worker: str
    kind: str
    costs: bool
    vanished: bool


@dataclass(eq=False)
class Held:
    """A live lease."""

    work_id: int
    serial: int
    worker: str
    watched: bool
    solo: bool
    since: float
    moved_at: float
    progress: int = 0
    began_at: float | None = None
    missed: int = 0
    recall: str = "no"  # called back: no, maybe (which ones is the queue's choice), yes

    @property
    def unstarted(self) -> bool:
        return self.watched and self.progress == 0

    @property
    def running_since(self) -> float:
        return self.since if self.began_at is None else self.began_at


@dataclass(eq=False)
class Line:
    offset: int
    size: int
    fate: str = "open"  # open, done, tombstone (a late result may replace it), refused
    condemned: bool = False
    crashes: int = 0
    releases: int = 0
    attempt: int = 1
    owed: list[Ending] = field(default_factory=list)
    paid: list[list[Ending]] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    history: list[Ending] = field(default_factory=list)
    fresh: bool = True  # never handed out by this server
    was_solo: bool = False
    steps: dict[Position, tuple[str, int]] = field(default_factory=dict)  # hash, bytes
    fresh_starts: int = 0

    @property
    def ready(self) -> bool:
        return self.fate == "open" and not self.held and not self.condemned

    @property
    def retries(self) -> int:
        return len(self.paid) - self.condemned

    @property
    def solo(self) -> bool:
        return self.crashes >= CRASHES_BEFORE_SOLO

    @property
    def step_bytes(self) -> int:
        return sum(size for _, size in self.steps.values())

    def cut(self, first: Position) -> None:
        """Forget the steps from a position on."""
        self.steps = {at: step for at, step in self.steps.items() if at < first}


@dataclass(eq=False)
class Client:
    """A client with a name."""

    seen_at: float
    up_since: float
    watched: bool = False
    up: bool = True
    gone_at: float | None = None
    idle: int = 0
    cut_off: dict[int, tuple[int, bool]] = field(default_factory=dict)


class Model:
    def __init__(self, policy: QueuePolicy) -> None:
        self.max_retries, self.window = policy.max_retries, policy.window
        self.backups, self.timeout_s = policy.backups, policy.work_timeout_s
        self.lines: list[Line] = []
        self.clients: dict[str, Client] = {}
        self.blamed: dict[str, list[tuple[int, Ending]]] = {}
        self.durations: list[float] = []
        self.enough_since = float("inf")
        self.input_ended = False
        self.written = 0
        self.operator: str | None = None  # the reason of a pause
        self.too_many: tuple[str, int, int] | None = None  # limit, failed, done when it began
        self.begun_with, self.said = policy.max_failures, ("", "")  # a limit, instead of which
        self.accepted = (0, 0)  # failed, done
        self.heard = ""
        names = "issued charged crashed released returned expired steps step_mismatches"
        self.counts = dict.fromkeys(names.split(), 0)

    # ---- what is asked of it

    @property
    def first_open(self) -> int:
        opened = [i for i, line in enumerate(self.lines) if line.fate == "open"]
        return opened[0] if opened else len(self.lines)

    @property
    def room(self) -> int:
        """How many more lines may be read."""
        ahead = len(self.lines) - self.first_open
        return 0 if self.input_ended else self.window - ahead if self.window else 100

    @property
    def paused(self) -> bool:
        return self.operator is not None or self.too_many is not None

    @property
    def limit(self) -> str:
        limit, instead_of = self.said
        return limit if limit and instead_of == self.begun_with else self.begun_with

    @property
    def failed_of(self) -> tuple[int, int]:
        """Return how many lines failed, of how many that have their result."""
        fates = [line.fate for line in self.lines]
        failed = sum(fate in ("tombstone", "refused", "failed") for fate in fates)
        return failed, len(fates) - fates.count("open")

    @property
    def is_complete(self) -> bool:
        return self.input_ended and all(line.fate != "open" for line in self.lines)

    @property
    def may_open(self) -> bool:
        return self.room > 0 and not self.paused

    @property
    def ready(self) -> list[int]:
        return [i for i, line in enumerate(self.lines) if line.ready]

    @property
    def condemned(self) -> list[int]:
        return [i for i, x in enumerate(self.lines) if x.fate == "open" and x.condemned]

    @property
    def leases(self) -> list[Held]:
        return [lease for line in self.lines for lease in line.held]

    def leases_of(self, worker: str) -> list[Held]:
        return [lease for lease in self.leases if lease.worker == worker]

    def find(self, work_id: int, serial: int | None) -> Held | None:
        """Find a live lease; a client that names none means its own, which nobody watches."""
        held = self.lines[work_id].held if 0 <= work_id < len(self.lines) else []
        for lease in held:
            if lease.serial == serial or (serial is None and not lease.watched):
                return lease
        return None

    # ---- handing out

    def hand_outs(self, count: int, max_bytes: int) -> list[list[int]]:
        """Return the acceptable answers to a call for work.

        What was handed out before goes first, then lines in their order. An item whose crashes
        were taken back may still go out alone, although it need not.
        """
        if self.paused:
            return [[]]
        ready = sorted(self.ready, key=lambda i: (self.lines[i].fresh, i))
        alone = [i for i in ready if self.lines[i].solo]
        forgiven = [i for i in ready if self.lines[i].was_solo and i not in alone]
        first = alone[:1] or self._fill(ready, count, max_bytes)
        return [first, *([i] for i in forgiven)]

    def _fill(self, ready: list[int], count: int, max_bytes: int) -> list[int]:
        given: list[int] = []
        for work_id in ready[:count]:
            if sum(self.lines[i].size + self.lines[i].step_bytes for i in given) < max_bytes:
                given.append(work_id)
        return given

    def grant(self, work_id: int, serial: int, worker: str, now: float) -> None:
        client = self.know(worker, now) if worker else None
        if client is not None:
            client.idle, client.gone_at = 0, None
        watched = client is not None and client.watched
        self._give(work_id, serial, worker, watched, self.lines[work_id].solo, now)

    def _give(
        self, work_id: int, serial: int, worker: str, watched: bool, solo: bool, now: float
    ) -> None:
        self.counts["issued"] += 1
        met["handed out solo"] += solo
        self.lines[work_id].fresh = False
        met["a copy handed out"] += bool(self.lines[work_id].held)
        self.lines[work_id].held.append(Held(work_id, serial, worker, watched, solo, now, now))

    def may_copy(self, lease: Held, worker: str, now: float) -> bool:
        """Say whether the queue may give a second copy of this lease's item to a worker."""
        client = self.clients.get(worker)
        return (
            self.backups
            and not self.paused
            and client is not None
            and client.watched
            and len(self.lines[lease.work_id].held) == 1
            and lease.worker != worker
            and not lease.unstarted
            and not lease.solo
            and lease.progress != UNKNOWN
            and len(self.durations) >= LEAST_DURATIONS
            and now - lease.running_since > BACKUP_FACTOR * min(self.durations)
        )

    def must_copy(self, lease: Held, worker: str, now: float) -> bool:
        """Say whether it has to: the item runs for very long, and has done so for a second."""
        before = now - 1.0
        return (
            self.may_copy(lease, worker, now)
            and before >= max(self.enough_since, lease.moved_at, lease.running_since)
            and before - lease.running_since > BACKUP_FACTOR * max(self.durations)
        )

    # ---- pauses

    def judge(self) -> None:
        """Pause when too many lines failed; whatever comes in later ends no pause."""
        failed, done = (now - then for now, then in zip(self.failed_of, self.accepted, strict=True))
        if self.too_many is not None:
            met["failed again while paused for it"] += 1
            return
        share, percent, _ = self.limit.partition("%")
        if self.limit != "off" and (
            failed > int(share) / 100 * done and done >= LEAST_LINES
            if percent
            else failed > int(share)
        ):
            met["paused for failures"] += 1
            met["paused for both"] += self.operator is not None
            self.too_many = (self.limit, failed, done)

    def set_limit(self, limit: str) -> None:
        self.said, self.too_many = (limit, self.begun_with), None
        if not self.is_complete:
            self.judge()

    def accept(self) -> None:
        met["a pause ended by accepted failures"] += self.too_many is not None
        self.accepted, self.too_many = self.failed_of, None
        if not self.is_complete:
            self.judge()

    # ---- taking back

    def finish(self, work_id: int, serial: int | None, failed: bool, now: float) -> Outcome:
        if not 0 <= work_id < len(self.lines):
            return Outcome.UNKNOWN
        line = self.lines[work_id]
        final = line.fate == "tombstone" and work_id < self.written
        if line.fate in ("done", "failed", "refused") or final:
            return Outcome.DUPLICATE
        met["a late result over a tombstone"] += line.fate == "tombstone"
        met["a result for a condemned item"] += line.condemned
        met["a result for an item that was ready"] += line.ready
        for lease in line.held:
            if lease.serial == serial:
                self.durations.append(now - lease.running_since)
                if len(self.durations) == LEAST_DURATIONS:
                    self.enough_since = now
        self.settle(work_id, "failed" if failed else "done")
        return Outcome.ACCEPTED

    def settle(self, work_id: int, fate: str) -> None:
        line = self.lines[work_id]
        met["steps of an item that got its line"] += bool(line.steps)
        line.fate = fate
        line.condemned = False
        line.held.clear()
        line.steps.clear()
        if fate != "done" and not self.is_complete:
            self.judge()

    def release(
        self,
        lease: Held,
        charge: bool,
        reason: str,
        recalled: bool,
        keep_yields: int | None,
        fresh_start: bool,
    ) -> None:
        line = self.lines[lease.work_id]
        line.fresh_starts += fresh_start
        if charge:
            self.end(lease, "charged", keep_yields=keep_yields)
        elif recalled:
            met["given back because called back"] += 1
            self.end(lease, "returned", keep_yields=keep_yields)
        elif reason == CRASH:
            self.end(lease, "crashed", keep_yields=keep_yields)
        elif line.releases < FREE_RELEASES:
            self.end(lease, "released", keep_yields=keep_yields)
        else:
            met["released too often"] += 1
            self.end(lease, "charged", keep_yields=keep_yields)

    def renew(self, lease: Held, worker: str, again: bool) -> bool:
        """The engine of a worker crashed, which lives; say whether it keeps the item."""
        line = self.lines[lease.work_id]
        attempt = line.attempt
        met["renewed though called back"] += lease.recall == "yes"
        self.end(lease, "crashed")
        may = again and worker == lease.worker != "" and not line.held and not line.solo
        return may and not line.condemned and line.attempt == attempt

    def grant_renewed(self, old: Held, serial: int, now: float) -> None:
        """The worker goes on with what it was running, for as long as any lease lets it."""
        self._give(old.work_id, serial, old.worker, old.watched, False, now)
        young = self.lines[old.work_id].held[-1]
        young.progress, young.began_at = max(1, old.progress), old.running_since

    def end(
        self, lease: Held, kind: str, vanished: bool = False, keep_yields: int | None = None
    ) -> None:
        """End a lease without a result; who pays is decided when it was the item's last."""
        line = self.lines[lease.work_id]
        before = len(line.steps)
        if keep_yields is not None:
            line.cut((keep_yields, 0))
        met["some steps kept, others dropped"] += 0 < len(line.steps) < before
        met["steps of a lease that ended kept"] += len(line.steps) > 0
        met["steps of a worker that vanished kept"] += len(line.steps) > 0 and vanished
        line.held.remove(lease)
        met["a crash while solo"] += kind == "crashed" and lease.solo
        met["one of two leases ended"] += bool(line.held)
        if kind in ("charged", "crashed"):
            costs = kind == "charged" or lease.solo
            ending = Ending(line.attempt, lease.worker, kind, costs, vanished)
            line.history.append(ending)
            if vanished:
                self.blamed.setdefault(lease.worker, []).append((lease.work_id, ending))
            if costs:
                line.owed.append(ending)
                met["two costs charged once"] += len(line.owed) == 2
                met["a cost that waits for a copy"] += bool(line.held)
        if kind != "charged":
            self.counts[kind] += 1
        line.crashes += kind == "crashed"
        line.releases += kind == "released"
        if not line.held:
            if line.owed:
                self.counts["charged"] += 1
                line.paid.append(line.owed)
                line.owed = []
                line.attempt += 1
                line.condemned = 0 <= self.max_retries < len(line.paid)
                met["condemned"] += line.condemned
            line.was_solo |= line.solo

    def absolve(self, worker: str) -> None:
        """The worker was cut off, not dead: its crashes were none."""
        for work_id, ending in self.blamed.pop(worker, []):
            line = self.lines[work_id]
            if line.fate != "open":
                continue
            met["a crash taken back"] += 1
            line.crashes -= 1
            line.history.remove(ending)
            if ending.costs:
                self.take_back(line, ending)

    def take_back(self, line: Line, cost: Ending) -> None:
        """An attempt is charged as long as one of its costs is left."""
        if cost in line.owed:
            met["a cost taken back while a copy runs"] += 1
            line.owed.remove(cost)
            return
        (paid,) = [paid for paid in line.paid if cost in paid]
        paid.remove(cost)
        if not paid:
            met["a charge taken back"] += 1
            met["a condemned item open again"] += line.condemned
            self.counts["charged"] -= 1
            line.condemned = False
            line.paid.remove(paid)

    # ---- steps

    def may_record(self, work_id: int, serial: int, attempt: int) -> bool:
        """The item's oldest live lease, in its present attempt, which is not charged yet."""
        line = self.lines[work_id] if 0 <= work_id < len(self.lines) else None
        if line is None or not any(lease.serial == serial for lease in line.held):
            met["a step of a lease that is gone"] += 1
            return False
        met["a step of a copy"] += line.held[0].serial != serial
        met["a step of another attempt"] += attempt != line.attempt
        met["a step of an attempt that is charged already"] += bool(line.owed)
        return line.held[0].serial == serial and attempt == line.attempt and not line.owed

    def record(
        self, named: tuple[int, int], attempt: int, at: Position, hash_: str, size: int
    ) -> StepOutcome:
        if not self.may_record(*named, attempt):
            return StepOutcome.STALE
        line = self.lines[named[0]]
        known = line.steps.get(at)
        if known is not None and known[0] == hash_:
            met["a step recorded already"] += 1
            return StepOutcome.ACCEPTED
        of_run = sum(x.step_bytes for x in self.lines)
        limits = [STEP_BYTES - size, ITEM_STEP_BYTES - line.step_bytes - size]
        limits.append(RUN_STEP_BYTES - of_run - size)
        if min(limits) < 0:
            met["a step too large, for " + ("step", "item", "run")[limits.index(min(limits))]] += 1
            return StepOutcome.FULL
        if known is not None:
            met["another request at a recorded place"] += 1
            self.counts["step_mismatches"] += 1
            line.cut(at)
        line.steps[at] = (hash_, size)
        self.counts["steps"] += 1
        return StepOutcome.ACCEPTED

    def cut(self, named: tuple[int, int], attempt: int, at: Position) -> StepOutcome:
        if not self.may_record(*named, attempt):
            return StepOutcome.STALE
        line = self.lines[named[0]]
        before = len(line.steps)
        line.cut(at)
        met["steps cut off"] += len(line.steps) < before
        self.counts["step_mismatches"] += len(line.steps) < before
        return StepOutcome.ACCEPTED

    # ---- workers and time

    def know(self, worker: str, now: float) -> Client:
        client = self.clients.setdefault(worker, Client(now, now))
        client.seen_at = now
        return client

    def heartbeat(
        self, worker: str, held: dict[tuple[int, int], int], up: bool, now: float
    ) -> tuple[list[str], list[str], list[Held]]:
        """Return what is done, what is lost, and the unstarted leases that may be called back."""
        client = self.know(worker, now)
        client.watched, client.gone_at = True, None
        if up and not client.up:
            # The time without progress begins anew, it does not go on from where it stood.
            client.up_since = now
        client.up = up
        self.absolve(worker)
        for work_id, serial in held:
            cut_id, solo = client.cut_off.get(serial, (None, False))
            if cut_id == work_id and self.lines[work_id].ready:
                met["kept by a worker that came back"] += 1
                self._give(work_id, serial, worker, True, solo, now)
        client.cut_off.clear()
        done, lost, back = [], [], []
        for (work_id, serial), progress in held.items():
            lease = self.find(work_id, serial)
            if lease is None or lease.worker != worker:
                is_open = work_id < len(self.lines) and self.lines[work_id].fate == "open"
                (lost if is_open else done).append(lease_id(work_id, serial))
                continue
            lease.watched, lease.missed = True, 0
            if progress != lease.progress:
                lease.progress, lease.moved_at = progress, now
                if progress > 0 and lease.began_at is None:
                    lease.began_at = now
            if lease.unstarted:
                back.append(lease)
            else:
                lease.recall = "no"
        for lease in self.leases_of(worker):
            if (lease.work_id, lease.serial) not in held:
                lease.missed += 1
                if lease.missed >= 2 and now - lease.since > TERM_S:
                    met["returned because nobody named it"] += 1
                    self.end(lease, "returned")
        return done, lost, back

    def expire(self, now: float) -> None:
        for lease in self.leases:
            if self._is_late(lease, now):
                if lease.unstarted:
                    met["held too long without being started"] += 1
                    self.end(lease, "returned")
                else:
                    met["work timeout"] += 1
                    met["work timeout of a watched lease"] += lease.watched
                    self.end(lease, "charged")
                    self.counts["expired"] += 1
        self._let_vanish(now)
        for name, client in list(self.clients.items()):
            if now - client.seen_at > FORGET_AFTER_S and not self.leases_of(name):
                met["a client forgotten"] += 1
                del self.clients[name]
                if client.watched:
                    self.blamed.pop(name, None)
        self._call_back()

    def _is_late(self, lease: Held, now: float) -> bool:
        if not lease.watched:
            return now - lease.since >= self.timeout_s
        client = self.clients[lease.worker]
        return client.up and now - max(lease.moved_at, client.up_since) >= self.timeout_s

    def _let_vanish(self, now: float) -> None:
        watched = {name: client for name, client in self.clients.items() if client.watched}
        going = {
            name: client
            for name, client in watched.items()
            if client.gone_at is None and now - client.seen_at > TERM_S
        }
        for client in going.values():
            client.gone_at = now
        gone = {
            name
            for name, client in watched.items()
            if client.gone_at is not None and now - client.gone_at <= TERM_S
        }
        present = [x for x in watched.values() if x.gone_at is None]
        mass = len(gone) >= MASS_LEAST and len(gone) > (len(gone) + len(present)) / 3
        for name, client in going.items():
            client.idle = 0
            for lease in self.leases_of(name):
                client.cut_off[lease.serial] = (lease.work_id, lease.solo)
                met["vanished with " + ("many" if mass else "few")] += 1
                if lease.progress > 0 and not mass:
                    met["vanished while running"] += 1
                    self.end(lease, "crashed", vanished=True)
                else:
                    self.end(lease, "returned")
        if going and mass:
            for name in gone:
                met["absolved because so many went"] += name in self.blamed
                self.absolve(name)

    def _call_back(self) -> None:
        """Which items are called back, from whom, is the queue's choice; how many is not.

        While the run is paused they are all that nobody has begun.
        """
        if self.paused:
            for lease in self.leases:
                met["called back by a pause"] += lease.unstarted and lease.recall != "yes"
                lease.recall = "yes" if lease.unstarted else lease.recall
            return
        idle = {name: client.idle for name, client in self.clients.items() if client.idle}
        if not self.backups or self.ready or self.may_open or not idle:
            return
        sure = sum(lease.recall == "yes" for lease in self.leases)
        perhaps = sum(lease.recall == "maybe" for lease in self.leases)
        could = [
            lease
            for lease in self.leases
            if lease.unstarted and lease.worker not in idle and lease.recall != "yes"
        ]
        wanted = sum(idle.values()) - sure
        for lease in could:
            if wanted - perhaps >= len(could):
                lease.recall = "yes"
                met["called back for sure"] += 1
            elif wanted > 0:
                met["perhaps called back"] += 1
                lease.recall = "maybe"

    def begin_again(self, now: float) -> None:
        """Another server took over: it knows the leases and who sends heartbeats.

        Everybody gets a fresh term.
        """
        watched = [name for name, client in self.clients.items() if client.watched]
        self.clients = {name: Client(now, now, watched=True) for name in watched}
        self.blamed = {}
        for work_id, line in enumerate(self.lines):
            for ending in line.history if line.fate == "open" else []:
                if ending.vanished:
                    self.blamed.setdefault(ending.worker, []).append((work_id, ending))
        self.durations, self.enough_since = [], float("inf")
        for lease in self.leases:
            lease.since = lease.moved_at = now
            lease.progress, lease.began_at = UNKNOWN, None
            lease.missed, lease.recall = 0, "no"
            if lease.worker:
                client = self.know(lease.worker, now)
                client.watched = client.watched or lease.watched
        if self.too_many is not None:
            met["paused for failures at a restart"] += 1
            failed, done = self.failed_of
            met["whose share was below the limit"] += self.limit == "50%" and 2 * failed <= done
            if self.too_many[0] != self.limit:
                met["another limit named at a restart"] += 1
                self.said, self.too_many = (self.limit, self.begun_with), None
        met["paused by an operator at a restart"] += self.operator is not None
        self.judge()

    def adopt(self, others: dict[str, Client], now: float) -> None:
        for name, other in others.items():
            client = self.know(name, now)
            client.watched, client.up = other.watched, other.up

    # ---- what it looks like from outside

    def durable(self) -> dict[str, Any]:
        fates = [line.fate for line in self.lines]
        buried, refused = fates.count("tombstone"), fates.count("refused")
        tombstones = {MAX_RETRIES_EXCEEDED: buried, "blank_line": refused}
        last = self.lines[-1] if self.lines else Line(0, 0)
        return {
            "first_open": self.first_open,
            "next_work_id": len(self.lines),
            "next_offset": last.offset + last.size,
            "counters": self.counts
            | {
                "done": len(fates) - fates.count("open"),
                "failed": buried + refused + fates.count("failed"),
                "tombstones": {error: n for error, n in tombstones.items() if n},
                "errors": {
                    error: n
                    for error, n in (tombstones | {"x": fates.count("failed")}).items()
                    if n
                },
            },
            "tombstoned": [
                i for i, fate in enumerate(fates) if fate == "tombstone" and i >= self.first_open
            ],
            "workers": sorted(name for name, client in self.clients.items() if client.watched),
            "pauses": (self.operator, self.too_many, self.accepted, self.said, self.heard),
            "items": {
                work_id: {
                    "place": (line.offset, line.size),
                    "retries": line.retries,
                    "crashes": line.crashes,
                    "releases": line.releases,
                    "attempt": line.attempt,
                    "owes_charge": bool(line.owed),
                    "condemned": line.condemned,
                    "leases": sorted((x.serial, x.worker, x.watched, x.solo) for x in line.held),
                    "history": sorted((x.attempt, x.worker, x.kind) for x in line.history),
                    "steps": line.steps,
                    "fresh_starts": line.fresh_starts,
                }
                for work_id, line in enumerate(self.lines)
                if line.fate == "open"
            },
        }


def pauses_of(state: QueueState) -> tuple[Any, ...]:
    said, operator = state.failures, state.operator
    too_many = said.paused and (said.paused.limit, said.paused.failed, said.paused.done)
    accepted = (said.accepted_failed, said.accepted_done)
    reason = operator.reason if operator is not None else None
    return reason, too_many, accepted, (said.limit, said.instead_of), state.heard


def durable(state: QueueState) -> dict[str, Any]:
    """Say what a checkpoint says, in the model's words."""
    counters = msgspec.structs.asdict(state.counters)
    return {
        "first_open": state.first_open,
        "next_work_id": state.next_work_id,
        "next_offset": state.next_offset,
        "counters": counters
        | {"tombstones": {error: n for error, n in counters["tombstones"].items() if n}},
        "tombstoned": sorted(state.tombstoned),
        "workers": sorted(state.workers),
        "pauses": pauses_of(state),
        "items": {
            item.work_id: {
                "place": (item.offset, item.line_bytes),
                "retries": item.retries,
                "crashes": item.crashes,
                "releases": item.releases,
                "attempt": item.attempt,
                "owes_charge": item.owes_charge,
                "condemned": item.condemned,
                "leases": sorted((x.serial, x.worker, x.heartbeats, x.solo) for x in item.leases),
                "history": sorted((x.attempt, x.worker, x.kind) for x in item.history),
                "steps": {step.position: (step.hash, step.size) for step in item.steps},
                "fresh_starts": item.fresh_starts,
            }
            for item in state.items
        },
    }


# -------------------------------------------------------------------- the machine

some = st.integers(0, 9)
few = st.integers(1, 3)
yes_or_no = st.booleans()
anybody = st.sampled_from([*STRANGERS, "a", "b", *WORKERS])
worker_names = st.sampled_from(["a", "b", *WORKERS])
seconds = st.sampled_from([0, 1, 2, 10, 19, 20, 29, 30, 31, 60, 100, 700])
ENDS = ("silence", "back", "charge", "charge the copy", "stop")
reasons = st.sampled_from(["sigterm", CRASH])
failure_limits = st.sampled_from(["50%", "50%", "20%", "0", "2", "off"])
AFTER_FAILURES = ("nothing", "pause", "accept", "restart", "another limit", "lost")
yields_kept = st.sampled_from([None, None, 0, 1, 2])
positions = st.tuples(st.integers(0, 2), st.integers(0, 1))
hashes = st.sampled_from("aab")
answer_bytes = st.sampled_from([1, 4, 6, 12, 13])


def key(grant: Grant) -> tuple[int, int]:
    named = parse_lease_id(grant.lease)
    assert named is not None
    return named


class Life(RuleBasedStateMachine):
    """A server's calls in any order."""

    limits: ClassVar[dict[str, Any]] = {}
    has_people = False
    """Whether somebody pauses the run and changes its limits."""

    def __init__(self) -> None:
        super().__init__()
        policy = QueuePolicy(
            lease_term_s=TERM_S,
            max_free_releases=FREE_RELEASES,
            history_limit=10_000,
            step_bytes=STEP_BYTES,
            item_step_bytes=ITEM_STEP_BYTES,
            run_step_bytes=RUN_STEP_BYTES,
            **{"work_timeout_s": 100.0, **self.limits},
        )
        self.now = 0.0
        self.queue = WorkQueue(policy)
        self.shadow = WorkQueue(policy)
        self.model = Model(policy)
        self.events: list[bytes] = []
        self.grants: list[tuple[str, int, int]] = []
        self.saved: list[tuple[int, bytes]] = [(0, encode(self.queue.checkpoint()))]
        self.synced = (0, copy.deepcopy(self.model), 0)

    # ---- helpers

    def take_events(self) -> list[Any]:
        """Keep the queue's events as the journal does, and let the second queue follow."""
        events: list[Any] = self.queue.take_events()
        for event in events:
            record = encode(event)
            self.events.append(record)
            self.shadow.apply(decode_event(record), self.now)
        return events

    def note_grants(self, worker: str, grants: list[Grant]) -> None:
        model = self.model
        for grant in grants:
            line = model.lines[grant.work_id]
            named = key(grant)
            assert named[0] == grant.work_id
            assert named not in [(x, y) for _, x, y in self.grants], "a lease id is used again"
            assert (grant.offset, grant.line_bytes) == (line.offset, line.size)
            assert (grant.retries, grant.attempt) == (line.retries, line.attempt), grant
            assert grant.fresh_starts == line.fresh_starts
            met["handed out with steps"] += bool(line.steps)
            assert grant.solo == line.solo
            assert not grant.solo or len(grants) == 1 or line.held
            assert model.max_retries < 0 or grant.retries <= model.max_retries
            assert not line.condemned
            self.grants.append((worker, *named))
            model.grant(*named, worker, self.now)

    def pick(self, nth: int) -> tuple[str, int, int]:
        """Return a lease that was given some time: an even number picks among the live ones."""
        alive = {(x.work_id, x.serial) for x in self.model.leases}
        living = [grant for grant in self.grants if grant[1:] in alive]
        among = living if nth % 2 == 0 and living else self.grants
        return among[-1 - (nth // 2) % len(among)]

    def open_lines(self, sizes: list[int]) -> int:
        lines = self.model.lines
        if not sizes:
            return len(lines)
        offset = lines[-1].offset + lines[-1].size if lines else 0
        first = self.queue.open_lines(offset, sizes)
        assert first == len(lines)
        for size in sizes:
            lines.append(Line(offset, size))
            offset += size
        self.take_events()
        return first

    def beat(self, worker: str, held: dict[tuple[int, int], int], up: bool = True) -> None:
        verdict = self.queue.heartbeat(worker, held, backend_up=up, now=self.now)
        done, lost, may_be_back = self.model.heartbeat(worker, held, up, self.now)
        assert sorted(verdict.done) == sorted(done)
        assert sorted(verdict.lost) == sorted(lost)
        names = {lease_id(x.work_id, x.serial): x for x in may_be_back}
        for name in verdict.back:
            assert name in names, "a started item is called back"
            assert names[name].recall != "no", "called back without a reason"
        for name, lease in names.items():
            assert lease.recall != "yes" or name in verdict.back, "the call back is forgotten"
            lease.recall = "yes" if name in verdict.back else "no"
        self.take_events()

    def pass_time(self, step_s: float) -> None:
        self.now += step_s
        self.queue.expire(self.now)
        self.model.expire(self.now)
        self.take_events()

    def ask_ready(self, worker: str, count: int, max_bytes: int = 1 << 62) -> list[Grant]:
        expected = self.model.hand_outs(count, max_bytes)
        grants = self.queue.lease_ready(worker, count, self.now, max_bytes)
        given = [grant.work_id for grant in grants]
        assert given in expected, f"{given} were handed out, not {expected[0]}"
        self.note_grants(worker, grants)
        self.take_events()
        return grants

    def copies_for(self, worker: str, count: int = 1) -> list[tuple[int, int]]:
        leases = self.model.leases
        may = {x.work_id for x in leases if self.model.may_copy(x, worker, self.now)}
        must = {x.work_id for x in leases if self.model.must_copy(x, worker, self.now)}
        grants = self.queue.lease_backup(worker, count, self.now)
        given = {grant.work_id for grant in grants}
        assert len(given) == len(grants) <= count
        assert given <= may
        assert must <= given or len(given) == count
        met["a copy that had to be given"] += len(must & given)
        self.note_grants(worker, grants)
        self.take_events()
        return [key(grant) for grant in grants]

    def hand_in(self, work_id: int, serial: int | None, failed: bool = False) -> None:
        expected = self.model.finish(work_id, serial, failed, self.now)
        result = ERROR if failed else DONE
        error = "x" if failed else ""
        outcome = self.queue.finish(work_id, serial, result, error=error, now=self.now)
        assert outcome is expected
        self.take_events()

    def leases_of(self, worker: str, moving: bool = False) -> dict[tuple[int, int], int]:
        """Name all that a worker has, with the progress it told last or one step more."""
        return {
            (x.work_id, x.serial): max(0, x.progress) + moving for x in self.model.leases_of(worker)
        }

    def let_live(self, workers: list[str], moving: bool) -> None:
        """Let time pass while these workers say that they are there."""
        for worker in workers:
            client = self.model.clients.get(worker)
            up = client is None or client.up
            self.beat(worker, self.leases_of(worker, moving), up)
        self.pass_time(19.0)

    def rebuilt(self, known: int, state: bytes) -> WorkQueue:
        queue = WorkQueue(self.queue.policy)
        queue.restore(decode_state(state), self.now)
        for record in self.events[known:]:
            queue.apply(decode_event(record), self.now)
        return queue

    def take_over(self, queue: WorkQueue) -> None:
        assert queue.ready_count == len(self.model.ready)
        assert set(queue.condemned_ids()) == set(self.model.condemned)
        queue.begin_again(self.now)
        if self.model.input_ended:
            queue.end_of_input()
        queue.note_written(self.model.written)
        self.model.begin_again(self.now)
        self.queue = queue

    # ---- lines and work

    @initialize(lines=st.integers(0, 8))
    def begin(self, lines: int) -> None:
        self.open_lines([10] * min(lines, self.model.room))

    @precondition(lambda self: self.model.may_open)
    @rule(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4), blank=st.integers(0, 5))
    def read_lines(self, sizes: list[int], blank: int) -> None:
        sizes = sizes[: self.model.room]
        first = self.open_lines(sizes)
        if blank < len(sizes):
            self.queue.tombstone(first + blank, "blank_line", ERROR, self.now)
            self.model.settle(first + blank, "refused")

    @precondition(lambda self: not self.model.input_ended)
    @rule()
    def end_of_input(self) -> None:
        self.queue.end_of_input()
        self.model.input_ended = True

    @rule(worker=anybody, count=few, max_bytes=st.sampled_from([1 << 62, 15]))
    def ask_for_work(self, worker: str, count: int, max_bytes: int) -> None:
        self.ask_ready(worker, count, max_bytes)

    @precondition(lambda self: self.model.may_open)
    @rule(worker=anybody, sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4))
    def ask_for_fresh_work(self, worker: str, sizes: list[int]) -> None:
        sizes = sizes[: self.model.room]
        grants = lease_fresh(self.queue, worker, sizes, self.now)
        for grant in grants:
            self.model.lines.append(Line(grant.offset, grant.line_bytes))
        self.note_grants(worker, grants)
        self.take_events()

    @rule(worker=worker_names, count=few)
    def start_an_item(self, worker: str, count: int) -> None:
        """A worker as it lives: it says that it is there, asks, and begins with what it got."""
        mine = self.leases_of(worker)
        self.beat(worker, mine)
        mine |= {key(grant): 1 for grant in self.ask_ready(worker, count)}
        self.beat(worker, mine)

    @rule(lines=st.sampled_from([2, 10]))
    def answer_some_quickly(self, lines: int) -> None:
        """From ten durations on the queue knows which items run for too long."""
        for _ in range(lines):
            self.open_lines([10] * min(1, self.model.room))
            grants = self.ask_ready("", 1)
            self.now += 0.5
            for grant in grants:
                self.hand_in(*key(grant))

    @rule(slow=worker_names, crashes=st.integers(0, 2), then=st.permutations(ENDS))
    def let_an_item_run_long(self, slow: str, crashes: int, then: list[str]) -> None:
        """It gets copies; those on some workers crash, the last one is cut off, and so on."""
        self.start_an_item(slow, 1)
        self.answer_some_quickly(10)
        others = [name for name in WORKERS if name != slow]
        self.let_live([slow, *others], moving=True)
        for worker in others[:crashes]:
            for named in self.copies_for(worker):
                self.give_back(*named, False, CRASH)
        last = others[-1]
        for named in self.copies_for(last):
            self.beat(last, {named: 1})
        for end in then[: then.index("stop")]:
            alive = [slow, *others[:-1]]
            if end == "silence":
                self.let_live(alive, moving=False)
                self.let_live(alive, moving=False)
            elif end == "back":
                self.come_back(last, 2)
            else:
                for lease in self.model.leases_of(slow if end == "charge" else last)[:1]:
                    self.give_back(lease.work_id, lease.serial, True, "task_retry")

    @rule(worker=worker_names, count=few)
    def ask_for_a_copy(self, worker: str, count: int) -> None:
        self.copies_for(worker, count)

    @rule(worker=anybody, want=st.integers(0, 3))
    def note_idle(self, worker: str, want: int) -> None:
        self.queue.note_idle(worker, want)
        if client := self.model.clients.get(worker):
            client.idle = want

    @rule(busy=worker_names, idle=worker_names, want=few, obeys=yes_or_no)
    def let_one_have_all_and_another_wait(
        self, busy: str, idle: str, want: int, obeys: bool
    ) -> None:
        self.beat(idle, self.leases_of(idle))
        mine = self.leases_of(busy)
        self.beat(busy, mine)
        while grants := self.ask_ready(busy, 3):
            mine |= {key(grant): 0 for grant in grants}
        self.beat(busy, mine)
        self.note_idle(idle, want)
        self.pass_time(1.0)
        self.beat(busy, mine)
        if obeys:
            for lease in [x for x in self.model.leases_of(busy) if x.recall == "yes"]:
                self.give_back(lease.work_id, lease.serial, False, "called back")

    @rule(worker=worker_names, times=few, reason=reasons)
    def give_an_item_back_often(self, worker: str, times: int, reason: str) -> None:
        for _ in range(times):
            self.start_an_item(worker, 1)
            for lease in self.model.leases_of(worker)[-1:]:
                self.give_back(lease.work_id, lease.serial, False, reason)

    # ---- results and leases that come back

    @precondition(lambda self: self.grants)
    @rule(nth=some, named=st.sampled_from(["own", "own", "none", "other"]), failed=yes_or_no)
    def finish(self, nth: int, named: str, failed: bool) -> None:
        _, work_id, serial = self.pick(nth)
        other = self.pick(nth + 2)[2]
        self.hand_in(work_id, {"own": serial, "none": None, "other": other}[named], failed)

    @precondition(lambda self: self.grants)
    @rule(nths=st.lists(some, min_size=2, max_size=5))
    def finish_many(self, nths: list[int]) -> None:
        """Results come in one call, and some of them twice."""
        came = [(*self.pick(nth)[1:], DONE, "") for nth in nths]
        expected = [self.model.finish(*arrival[:2], False, self.now) for arrival in came]
        assert self.queue.finish_all(arrivals(*came), self.now) == expected
        self.take_events()

    @rule(nth=some)
    def answer_what_is_buried(self, nth: int) -> None:
        buried = [i for i, line in enumerate(self.model.lines) if line.fate == "tombstone"]
        if buried:
            work_id = buried[nth % len(buried)]
            self.hand_in(work_id, max(s for _, x, s in self.grants if x == work_id))

    @rule(work_id=st.integers(-1, 12))
    def finish_by_number(self, work_id: int) -> None:
        self.hand_in(work_id, None)

    @precondition(lambda self: self.grants)
    @rule(nth=some, named=yes_or_no)
    def send_nonsense(self, nth: int, named: bool) -> None:
        _, work_id, serial = self.pick(nth)
        self.refuse(work_id, serial if named else None)

    def refuse(self, work_id: int, serial: int | None) -> None:
        lease = self.model.find(work_id, serial)
        self.queue.fail(work_id, serial, "not JSON", self.now)
        if lease is not None:
            self.model.end(lease, "charged", keep_yields=0)
        self.take_events()

    @rule(late=yes_or_no)
    def use_an_item_up(self, late: bool) -> None:
        """Every try ends charged; when it is given up, a first result may come."""
        first = self.ask_ready("", 1)
        for grant in first:
            self.refuse(*key(grant))
            for _ in range(self.model.max_retries):
                for again in self.ask_ready("", 1):
                    self.refuse(*key(again))
        self.bury()
        for grant in first if late else []:
            self.hand_in(*key(grant))

    @precondition(lambda self: self.grants)
    @rule(
        nth=some,
        named=st.sampled_from([True, True, False]),
        charge=yes_or_no,
        reason=reasons,
        keep_yields=yields_kept,
        fresh_start=yes_or_no,
    )
    def release(
        self,
        nth: int,
        named: bool,
        charge: bool,
        reason: str,
        keep_yields: int | None,
        fresh_start: bool,
    ) -> None:
        _, work_id, serial = self.pick(nth)
        self.give_back(work_id, serial if named else None, charge, reason, keep_yields, fresh_start)

    @precondition(lambda self: self.grants)
    @rule(
        nth=some,
        worker=st.sampled_from(["its", "its", "its", *STRANGERS, *WORKERS]),
        again=st.integers(0, 5),
    )
    def renew(self, nth: int, worker: str, again: int) -> None:
        """The engine died under an item; 0: the server is ending."""
        owner, work_id, serial = self.pick(nth)
        self.renew_for(owner if worker == "its" else worker, work_id, serial, again > 0)

    @precondition(lambda self: self.model.leases)
    @rule(nth=some, times=st.integers(1, 3))
    def let_engines_die_under_an_item(self, nth: int, times: int) -> None:
        """Each time the first reply is lost, and the worker asks again under the old lease."""
        lease = self.model.leases[nth % len(self.model.leases)]
        work_id, serial, worker = lease.work_id, lease.serial, lease.worker
        for _ in range(times):
            renewed = self.renew_for(worker, work_id, serial)
            assert self.renew_for(worker, work_id, serial) == renewed
            if renewed is None:
                break
            serial = renewed
            met["renewed"] += 1

    def renew_for(self, worker: str, work_id: int, serial: int, again: bool = True) -> int | None:
        lease = self.model.find(work_id, serial)
        line = self.model.lines[work_id]
        renewal = self.queue.renew(work_id, serial, worker, CRASH, self.now, again=again)
        assert renewal.ended == (lease is not None)
        told = parse_lease_id(renewal.lease) if renewal.lease is not None else None
        if lease is None:
            assert self.take_events() == []
            own = [x.serial for x in line.held if x.worker == worker != "" and x.serial > serial]
            assert told == ((work_id, own[-1]) if own else None)
        elif self.model.renew(lease, worker, again):
            assert told is not None
            assert told[0] == work_id
            events = self.take_events()
            assert [type(event) for event in events] == [LeaseEnded, Issued]
            assert told not in [(x, y) for _, x, y in self.grants], "a lease id is used again"
            self.model.grant_renewed(lease, told[1], self.now)
            self.grants.append((worker, *told))
        else:
            assert told is None
            assert [type(event) for event in self.take_events()] == [LeaseEnded]
        assert told is None or renewal.attempt == line.attempt
        return told[1] if told else None

    @precondition(lambda self: self.model.leases)
    @rule(nth=some, kind=st.sampled_from(["crash", "crash", "task_retry"]))
    def end_a_live_lease(self, nth: int, kind: str) -> None:
        lease = self.model.leases[nth % len(self.model.leases)]
        self.give_back(lease.work_id, lease.serial, kind == "task_retry", kind)

    def give_back(
        self,
        work_id: int,
        serial: int | None,
        charge: bool,
        reason: str,
        keep_yields: int | None = None,
        fresh_start: bool = False,
    ) -> None:
        lease = self.model.find(work_id, serial)
        released = self.queue.release(
            work_id,
            serial,
            charge=charge,
            reason=reason,
            keep_yields=keep_yields,
            fresh_start=fresh_start,
            now=self.now,
        )
        assert released == (lease is not None)
        events = self.take_events()
        assert [type(event) for event in events] == [LeaseEnded] * released
        if lease is not None:
            recalled = lease.recall == "yes"
            if lease.recall == "maybe":
                recalled = events[0].kind == "returned"
            self.model.release(lease, charge, reason, recalled, keep_yields, fresh_start)

    # ---- steps

    @precondition(lambda self: self.grants)
    @rule(
        nth=some,
        steps=st.lists(st.tuples(positions, hashes, answer_bytes), min_size=1, max_size=4),
        attempt=st.sampled_from([0, 0, 0, 0, -1, 1]),
    )
    def record_steps(self, nth: int, steps: list[tuple[Position, str, int]], attempt: int) -> None:
        _, work_id, serial = self.pick(nth)
        for at, hash_, size in steps:
            self.add_step((work_id, serial), at, hash_, size, attempt)

    def add_step(
        self, named: tuple[int, int], at: Position, hash_: str, size: int, attempt: int = 0
    ) -> None:
        attempt += self.model.lines[named[0]].attempt
        expected = self.model.record(named, attempt, at, hash_, size)
        assert self.queue.record_step(*named, attempt, at, hash_, b"1" * size) is expected
        self.take_events()

    @precondition(lambda self: self.grants)
    @rule(nth=some, at=positions, attempt=st.sampled_from([0, 0, 0, 1]))
    def cut_steps(self, nth: int, at: Position, attempt: int) -> None:
        _, work_id, serial = self.pick(nth)
        self.cut_at((work_id, serial), at, attempt)

    def cut_at(self, named: tuple[int, int], at: Position, attempt: int = 0) -> None:
        attempt += self.model.lines[named[0]].attempt
        expected = self.model.cut(named, attempt, at)
        assert self.queue.cut_steps(*named, attempt, at) is expected
        self.take_events()

    @rule(worker=worker_names, yields=few, keep_yields=yields_kept, charge=yes_or_no)
    def run_a_task_and_begin_it_again(
        self, worker: str, yields: int, keep_yields: int | None, charge: bool
    ) -> None:
        """A task asks, a few times or once more; its lease ends, and it asks the same again."""
        for times in (yields, yields + 1):
            self.start_an_item(worker, 1)
            for lease in self.model.leases_of(worker)[-1:]:
                named = (lease.work_id, lease.serial)
                for number in range(times):
                    self.add_step(named, (number, 0), "a", 6)
                self.give_back(*named, charge, "sigterm", keep_yields)

    @rule(worker=worker_names, hash_=hashes, cut_at=st.none() | positions)
    def ask_something_else_than_recorded(
        self, worker: str, hash_: str, cut_at: Position | None
    ) -> None:
        self.start_an_item(worker, 1)
        for lease in self.model.leases_of(worker)[-1:]:
            named = (lease.work_id, lease.serial)
            for at in [(0, 0), (1, 0), (1, 1)]:
                self.add_step(named, at, "a", 4)
            self.add_step(named, (1, 0), hash_, 6)
            if cut_at is not None:
                self.cut_at(named, cut_at)

    @rule(worker=worker_names, size=answer_bytes)
    def record_until_it_is_too_much(self, worker: str, size: int) -> None:
        self.open_lines([10] * min(2, self.model.room))
        self.start_an_item(worker, 3)
        for lease in self.model.leases_of(worker)[-3:]:
            for number in range(3):
                self.add_step((lease.work_id, lease.serial), (number, 0), "a", size)

    @rule(slow=worker_names, others=st.permutations(WORKERS), charge=yes_or_no)
    def record_with_a_copy_beside_it(self, slow: str, others: list[str], charge: bool) -> None:
        """Both may send steps; then the older one ends, and the copy goes on."""
        self.start_an_item(slow, 1)
        self.answer_some_quickly(10)
        others = [name for name in others if name != slow]
        self.let_live([slow, *others], moving=True)
        copies = self.copies_for(others[0])
        for lease in [*self.model.leases_of(slow), *self.model.leases_of(others[0])]:
            self.add_step((lease.work_id, lease.serial), (0, 0), "a", 4)
        for lease in self.model.leases_of(slow)[-1:]:
            self.give_back(lease.work_id, lease.serial, charge, "sigterm")
        for named in copies:
            self.add_step(named, (1, 0), "b", 4)

    # ---- workers and time

    @rule(
        worker=worker_names,
        named=st.sampled_from(["all", "all", "some", "none", "wrong"]),
        progress=st.integers(0, 3),
        up=st.sampled_from([True, True, False]),
    )
    def heartbeat(self, worker: str, named: str, progress: int, up: bool) -> None:
        mine = [(work_id, serial) for name, work_id, serial in self.grants if name == worker][-8:]
        held = {
            key: (progress + nth) % 4
            for nth, key in enumerate(mine)
            if named in ("all", "wrong") or (named == "some" and nth % 2)
        }
        if named == "wrong":
            held |= {(work_id, serial): 1 for _, work_id, serial in self.grants[-2:]}
            held[9999, 123456] = 1
        self.beat(worker, held, up)

    @rule(alive=st.sets(st.sampled_from(WORKERS)), beats=st.integers(1, 6), moving=yes_or_no)
    def live_on(self, alive: set[str], beats: int, moving: bool) -> None:
        """Time passes while some workers go on as they should."""
        for _ in range(beats):
            self.let_live(sorted(alive), moving=moving)

    @rule(alive=st.integers(0, len(CROWD)))
    def lose_some_at_once(self, alive: int) -> None:
        """All workers run something; within one term most of them, or a few, are silent."""
        self.open_lines([10] * min(3, self.model.room))
        for worker in reversed(CROWD):
            self.start_an_item(worker, 1)
        self.pass_time(16.0)
        for worker in CROWD[:alive]:
            self.beat(worker, self.leases_of(worker, moving=True))
        self.pass_time(16.0)

    @rule(worker=worker_names, beats=st.integers(1, 6))
    def lose_a_model_server(self, worker: str, beats: int) -> None:
        """It is down for a while; the worker says so and waits."""
        self.start_an_item(worker, 1)
        self.beat(worker, self.leases_of(worker), up=False)
        for _ in range(beats):
            self.let_live([worker], moving=False)
        self.beat(worker, self.leases_of(worker), up=True)
        self.pass_time(1.0)

    @rule(worker=worker_names, crashes=few, back_after_s=st.sampled_from([1, 40, None]))
    def cut_one_off(self, worker: str, crashes: int, back_after_s: int | None) -> None:
        """A worker runs something and is silent, all others speak; it may be heard again."""
        self.give_an_item_back_often(worker, crashes - 1, CRASH)
        self.start_an_item(worker, 1)
        others = [name for name, x in self.model.clients.items() if x.watched and name != worker]
        self.let_live(others, moving=False)
        self.let_live(others, moving=False)
        if back_after_s is not None:
            self.pass_time(back_after_s)
            self.come_back(worker, 2)

    @rule(worker=worker_names, names=st.lists(yes_or_no, min_size=3, max_size=4))
    def lose_a_reply(self, worker: str, names: list[bool]) -> None:
        """A worker does not know at once, or never, what it was given."""
        self.start_an_item(worker, 1)
        for knows in names:
            self.pass_time(16.0)
            self.beat(worker, self.leases_of(worker) if knows else {})

    @rule(worker=worker_names, progress=st.integers(0, 3))
    def come_back(self, worker: str, progress: int) -> None:
        """A worker speaks, late or not, and names all it ever got."""
        self.beat(worker, {x[1:]: progress for x in self.grants if x[0] == worker})

    @rule(step_s=seconds)
    def let_time_pass(self, step_s: float) -> None:
        self.pass_time(step_s)

    @rule()
    def let_the_work_timeout_pass(self) -> None:
        self.pass_time(self.model.timeout_s - 1)
        self.pass_time(1)

    @rule(timeout_s=st.sampled_from([5.0, 20.0, 100.0, 300.0]))
    def change_the_timeout(self, timeout_s: float) -> None:
        self.queue.set_work_timeout(timeout_s, self.now)
        self.model.timeout_s = timeout_s

    # ---- the service's part

    @rule()
    def bury(self) -> None:
        condemned = set(self.queue.condemned_ids())
        assert condemned == set(self.model.condemned)
        for work_id in sorted(condemned):
            self.queue.tombstone(work_id, MAX_RETRIES_EXCEEDED, ERROR, self.now)
            self.model.settle(work_id, "tombstone")
        assert self.queue.condemned_ids() == []
        self.take_events()

    @precondition(lambda self: self.model.lines)
    @rule(nth=some)
    def bury_what_has_its_line(self, nth: int) -> None:
        work_id = nth % len(self.model.lines)
        if self.model.lines[work_id].fate != "open":
            self.queue.tombstone(work_id, MAX_RETRIES_EXCEEDED, ERROR, self.now)
            assert self.take_events() == []

    @rule()
    def note_written(self) -> None:
        self.model.written = self.model.first_open
        self.queue.note_written(self.model.written)

    @rule()
    def save_a_checkpoint(self) -> None:
        self.note_written()  # the service does so before
        self.saved.append((len(self.events), encode(self.queue.checkpoint())))

    @rule(nth=some, new_process=yes_or_no)
    def restart(self, nth: int, new_process: bool) -> None:
        """Another server goes on, from the first state or a later checkpoint; nobody pays."""
        known, state = self.saved[nth % len(self.saved)]
        met["restarted from a checkpoint" if known else "restarted from the beginning"] += 1
        for line in self.model.lines[: decode_state(state).next_work_id]:
            line.fresh = False
        if new_process:
            self.now = 0.0  # its clock begins anew
        fresh = self.rebuilt(known, state)
        assert fresh.checkpoint() == self.queue.checkpoint()
        self.take_over(fresh)

    @precondition(lambda self: self.has_people)
    @rule(nth=some, limit=failure_limits)
    def restart_with_another_limit(self, nth: int, limit: str) -> None:
        known, state = self.saved[nth % len(self.saved)]
        for line in self.model.lines[: decode_state(state).next_work_id]:
            line.fresh = False
        fresh = self.rebuilt(known, state)
        fresh.policy = replace(fresh.policy, max_failures=limit)
        self.model.begun_with = limit
        self.take_over(fresh)

    # ---- what people say

    @precondition(lambda self: self.has_people)
    @rule(reason=st.sampled_from(["", "a", "b"]))
    def pause(self, reason: str) -> None:
        self.queue.pause_for_operator(reason)
        met["paused by an operator"] += self.model.operator is None
        self.model.operator = reason or self.model.operator or ""

    @precondition(lambda self: self.has_people)
    @rule()
    def resume(self) -> None:
        self.queue.resume()
        self.model.operator = None

    @precondition(lambda self: self.has_people)
    @rule(limit=failure_limits)
    def set_the_limit_of_failures(self, limit: str) -> None:
        self.queue.set_max_failures(limit)
        self.model.set_limit(limit)

    @precondition(lambda self: self.has_people)
    @rule(failed=st.integers(1, 5), fine=st.integers(0, 6), then=st.sampled_from(AFTER_FAILURES))
    def let_lines_fail_while_others_are_under_way(self, failed: int, fine: int, then: str) -> None:
        """The run goes on, some lines fail, and others that were handed out before do not."""
        self.resume()
        self.set_the_limit_of_failures("50%")
        self.queue.accept_failures()
        self.model.accept()
        self.open_lines([10] * max(0, min(failed + fine, self.model.room)))
        grants = self.ask_ready("", failed + fine)
        if then == "pause":
            self.pause("a")
        for nth, grant in enumerate(grants):
            self.hand_in(*key(grant), failed=nth < failed)
        if then == "accept":
            self.hear_a_start("", True, False)
        elif then == "restart":
            self.restart(0, True)
        elif then == "another limit":
            self.restart_with_another_limit(0, "20%")
        elif then == "lost":
            self.sync_the_journal()
            self.lose_what_was_not_synced()

    @precondition(lambda self: self.has_people)
    @rule(start=st.sampled_from(["", "job 1", "job 2"]), accept=yes_or_no, lift=yes_or_no)
    def hear_a_start(self, start: str, accept: bool, lift: bool) -> None:
        model = self.model
        knows = (accept or lift) and start != "" and start == model.heard
        met["a start heard before"] += knows
        assert self.queue.hear_start(start, accept_failures=accept, resume=lift) == (not knows)
        if knows or not (accept or lift):
            return
        if accept:
            model.accept()
        if lift:
            model.operator = None
        model.heard = start or model.heard

    @rule()
    def sync_the_journal(self) -> None:
        self.synced = (len(self.events), copy.deepcopy(self.model), len(self.grants))

    @rule()
    def lose_what_was_not_synced(self) -> None:
        """A write failed: the queue is built anew from what is on disk, in the same process."""
        others, workers = self.model.clients, self.queue.workers.values()
        timeout_s, input_ended = self.model.timeout_s, self.model.input_ended
        begun_with = self.model.begun_with
        events, model, grants = self.synced
        met["a failed write undone"] += 1
        self.model = copy.deepcopy(model)
        self.model.timeout_s, self.model.input_ended = timeout_s, input_ended
        self.model.begun_with = begun_with
        del self.events[events:]
        del self.grants[grants:]
        self.saved = [(known, state) for known, state in self.saved if known <= events]
        self.shadow = self.rebuilt(*self.saved[0])
        self.take_over(self.rebuilt(*self.saved[0]))
        self.queue.adopt_workers(workers, self.now)
        self.model.adopt(others, self.now)
        self.take_events()
        self.synced = (len(self.events), copy.deepcopy(self.model), len(self.grants))

    # ---- what always holds

    @invariant()
    def both_say_the_same(self) -> None:
        ran["steps"] += 1
        self.take_events()
        queue, model = self.queue, self.model
        state = queue.checkpoint()
        says, expected = durable(state), model.durable()
        for part, value in expected.items():
            assert says[part] == value, part
        assert queue.ready_count == len(model.ready)
        assert queue.may_open() == model.may_open
        assert (queue.pause is not None) == model.paused
        assert queue.max_failures == model.limit
        assert queue.steps.size == sum(line.step_bytes for line in model.lines) <= RUN_STEP_BYTES
        assert len(queue.steps) == sum(bool(line.steps) for line in model.lines)
        assert not any(line.steps for line in model.lines if line.fate != "open")
        assert self.shadow.steps.size == queue.steps.size
        waiting = [x for x in model.lines[model.first_open :] if x.fate != "open"]
        assert queue.waiting_count == len(waiting)
        all_done = all(line.fate != "open" for line in model.lines)
        assert queue.is_complete == (model.input_ended and all_done)
        for work_id, line in enumerate(model.lines):
            assert line.fate == "open" or not line.held
            assert [line.ready, bool(line.held), line.condemned, line.fate != "open"].count(
                True
            ) == 1, f"item {work_id} is in two states"
            assert len(line.held) <= 2
            names = [lease.worker for lease in line.held]
            assert len(set(names)) == len(names)
        assert self.shadow.checkpoint() == state, "the events tell another story"
        assert self.shadow.ready_count == queue.ready_count
        encoded = encode(state)
        assert decode_state(encoded) == state
        restored = WorkQueue(queue.policy)
        restored.restore(decode_state(encoded), self.now)
        assert restored.checkpoint() == state, "a checkpoint does not tell everything"
        assert restored.ready_count == queue.ready_count
        assert restored.steps.size == queue.steps.size

    def teardown(self) -> None:
        """Whatever happened, the rest of the input can be done."""
        ran["sequences"] += 1
        if sys.exc_info()[0] is not None:
            return  # it would hide the failure
        self.queue.end_of_input()
        self.model.input_ended = True
        self.set_the_limit_of_failures("off")
        self.resume()
        for lease in self.model.leases:
            if lease in self.model.lines[lease.work_id].held:
                self.hand_in(lease.work_id, lease.serial)
        for _ in range(2 * len(self.model.lines)):
            self.bury()
            for grant in self.ask_ready("last", 2):
                self.hand_in(*key(grant))
        self.both_say_the_same()
        assert self.queue.is_complete
        assert len(self.queue.steps) == self.queue.steps.size == 0
        assert self.queue.lease_ready("last", 9, self.now) == []
        known, state = self.saved[0]
        assert self.rebuilt(known, state).checkpoint() == self.queue.checkpoint()


@seed(SEED)
class WithReissues(Life):
    limits: ClassVar = {"max_retries": 3}


@seed(SEED + 1)
class WithoutReissues(Life):
    limits: ClassVar = {"max_retries": 0}


@seed(SEED + 2)
class InASmallWindow(Life):
    limits: ClassVar = {"max_retries": 1, "window": 4}


@seed(SEED + 3)
class WithoutEnd(Life):
    limits: ClassVar = {"max_retries": -1, "backups": False}


@seed(SEED + 4)
class WithOneReissue(Life):
    limits: ClassVar = {"max_retries": 1, "work_timeout_s": 20.0}


@seed(SEED + 5)
class WithPeople(Life):
    limits: ClassVar = {"max_retries": 1, "max_failures": "50%"}
    has_people = True


MACHINES = [WithReissues, WithoutReissues, InASmallWindow, WithoutEnd, WithOneReissue, WithPeople]

thorough = settings(
    max_examples=SEQUENCES // len(MACHINES),
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    print_blob=True,
)


@pytest.fixture(scope="module", autouse=True)
def _counted() -> Iterator[None]:
    usual, failures.LEAST_LINES = failures.LEAST_LINES, LEAST_LINES
    yield
    failures.LEAST_LINES = usual
    for situation, times in sorted(met.items()):
        print(f"{times:8} {situation}")
    print(f"\nwork queue against its model: {ran['sequences']} sequences, {ran['steps']} steps")


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.__name__)
def test_the_queue_does_in_any_order_of_calls_what_the_table_of_charges_says(
    machine: type[Life],
) -> None:
    before = dict(ran)
    run_state_machine_as_test(machine, settings=thorough)
    count = {name: ran[name] - before[name] for name in ran}
    print(f"{machine.__name__}: {count['sequences']} sequences, {count['steps']} steps, 0 problems")


# -------------------------------------------------------------------- what it found


def test_an_item_that_must_run_alone_is_not_handed_out_with_others_after_a_restart() -> None:
    life = WithReissues()
    life.begin(3)
    life.give_an_item_back_often("a", 2, CRASH)
    life.restart(0, True)

    assert [grant.work_id for grant in life.ask_ready("b", 3)] == [0]
    assert [grant.work_id for grant in life.ask_ready("b", 3)] == [1, 2]


def test_a_worker_that_a_rebuilt_queue_adopts_is_in_its_events_too() -> None:
    life = WithReissues()
    life.begin(1)
    life.come_back("d", 0)
    life.lose_what_was_not_synced()

    assert life.rebuilt(*life.saved[0]).checkpoint() == life.queue.checkpoint()


def test_a_charge_stays_when_only_the_crash_of_a_copy_is_taken_back() -> None:
    life = WithReissues()
    life.begin(1)
    life.let_an_item_run_long("a", 2, ["silence", "charge", "back", "stop"])

    assert life.queue.checkpoint().items[0].retries == 1


def test_what_was_charged_once_is_taken_back_once() -> None:
    life = WithReissues()
    life.begin(1)
    life.let_an_item_run_long("a", 2, ["silence", "stop"])
    (copied,) = life.copies_for("d")
    life.beat("d", {copied: 1})
    for _ in range(2):
        life.let_live(["a", "b", "c"], moving=True)
    (slow,) = life.leases_of("a")
    life.give_back(*slow, False, "sigterm")
    assert life.queue.checkpoint().counters.charged == 1

    life.come_back("d", 2)
    life.come_back("e", 2)

    assert life.queue.checkpoint().counters.charged == 0


def test_an_item_that_is_condemned_twice_is_listed_once() -> None:
    life = WithoutReissues()
    life.begin(1)
    life.cut_one_off("a", 3, 1)
    life.let_the_work_timeout_pass()

    assert life.queue.condemned_ids() == [0]


def test_a_late_result_over_a_tombstone_before_the_checkpoints_first_open_line_is_replayed() -> (
    None
):
    """As after `_undo`: the output lags behind a segment's first checkpoint."""
    life = WithoutReissues()
    life.begin(3)
    (grant,) = life.ask_ready("", 1)
    life.give_back(*key(grant), True, "task_retry")
    life.bury()
    state, known = encode(life.queue.checkpoint()), len(life.events)
    life.hand_in(*key(grant))

    again = life.rebuilt(known, state)

    again.finish(1, None, DONE, now=0.0)
    assert again.checkpoint().counters.done == 2
    assert again.first_open == 2


def test_a_lower_limit_of_reissues_condemns_no_item_that_is_being_worked_on() -> None:
    life = WithReissues()
    life.begin(1)
    for _ in range(2):
        life.give_back(*key(life.ask_ready("", 1)[0]), True, "task_retry")
    life.ask_ready("", 1)
    life.queue.policy = replace(life.queue.policy, max_retries=1)

    from_checkpoint = life.rebuilt(len(life.events), encode(life.queue.checkpoint()))
    from_events = life.rebuilt(*life.saved[0])

    assert from_checkpoint.condemned_ids() == from_events.condemned_ids() == []
