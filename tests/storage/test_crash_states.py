"""Every state a crash may leave on disk: what was acknowledged comes back, nothing else does.

A run is driven through its life on a disk in memory (recording_disk.py) that knows what a crash
behind any of its operations may leave. From each such state the run is opened again, compared
with what was acknowledged by then, opened once more, and finished.
"""

from __future__ import annotations

import errno
import functools
import gc
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from dispatcher.config import RunSettings
from dispatcher.core.events import Finished, Position, QueueState
from dispatcher.core.pausing import Pause
from dispatcher.core.work_queue import MAX_RETRIES_EXCEEDED, Grant, QueuePolicy, WorkQueue
from dispatcher.core.workers import PROGRESS_UNKNOWN
from dispatcher.errors import CorruptJournalError, DispatcherError, StateError, StorageFullError
from dispatcher.storage import opening, run_state, writer
from dispatcher.storage.journal import Journal
from dispatcher.storage.opening import open_run, utc_now
from dispatcher.storage.records import Checkpoint, OutputPosition, RunHeader, encode_records
from dispatcher.storage.run_state import save_run_file
from dispatcher.storage.source import LineSource
from dispatcher.storage.waiting import places_path
from dispatcher.storage.writer import Batch
from tests.faults.oracle import Ledger, input_line
from tests.storage.recording_disk import Change, DiskPath, Image, RecordingDisk, image_key
from tests.support.queues import arrivals, lease_fresh

SEED = int(os.environ.get("DISPATCHER_TEST_SEED", "7"))
LINES = [input_line(number) for number in range(48)]
POLICY = QueuePolicy(max_retries=1, lease_term_s=1000.0, work_timeout_s=1000.0)
STALLED = {5: 26, 33: 200}
"""Lines whose result comes late, by batch, so that most others wait behind them."""


Steps = dict[tuple[int, Position], tuple[str, bytes]]
"""Hash and answer of every recorded step, by line and position."""


@dataclass(frozen=True)
class Point:
    """What the run was told to be, from operation `began` on; it was acknowledged at `told`."""

    began: int
    told: int
    state: QueueState
    results: dict[int, bytes]
    steps: Steps
    pause: Pause | None


@dataclass
class History:
    """What clients were told, and when, in operations of the disk."""

    points: list[Point] = field(default_factory=list)

    def candidates(self, count: int) -> list[Point]:
        """Return what may be on disk when the machine dies behind operation `count`."""
        told = max((n for n, p in enumerate(self.points) if p.told <= count), default=0)
        return [p for p in self.points[told:] if p.began <= count]

    def up_to(self, count: int) -> History:
        """Return the history of a run that was killed behind operation `count`."""
        return History([p for p in self.points if p.began <= count])


class Drive:
    """One process that works on the run: what the service does, without clients and threads."""

    def __init__(self, settings: RunSettings, disk: RecordingDisk, epoch: int) -> None:
        DiskPath.disk = disk
        self.disk = disk
        self.settings = settings
        self.run = open_run(settings, disk, epoch, now=0.0)
        self.queue = self.run.queue
        self.results: dict[int, bytes] = {}
        self.steps: Steps = {}

    def close(self) -> None:
        self.run.writer.close()

    def stored_steps(self) -> Steps:
        """Read back what would be handed out with the open items."""
        found = self.run.writer.read_steps(self.queue.items)
        return {(n, at): step for n, steps in found.items() for at, step in steps.items()}

    def void_steps(self, work_id: int, first: Position = (0, 0)) -> None:
        """From this position on nothing is recorded any more."""
        self.steps = {(n, at): s for (n, at), s in self.steps.items() if n != work_id or at < first}

    def record(self, work_id: int, at: Position, hash_: str, answer: bytes) -> None:
        """Keep a step as the item's oldest lease; the same request again changes nothing."""
        item = self.queue.items[work_id]
        about = (work_id, item.leases[0].serial, item.attempt, at)
        if self.queue.record_step(*about, hash_, answer) == "accepted":
            known = self.steps.get((work_id, at))
            if known is None or known[0] != hash_:
                if known is not None:
                    self.void_steps(work_id, at)
                self.steps[work_id, at] = (hash_, answer)

    def cut(self, work_id: int, at: Position) -> None:
        item = self.queue.items[work_id]
        if self.queue.cut_steps(work_id, item.leases[0].serial, item.attempt, at) == "accepted":
            self.void_steps(work_id, at)

    def open_lines(self, count: int) -> None:
        lines = self.run.source.scan(self.queue.next_offset, count, 1 << 20)
        if lines:
            self.queue.open_lines(lines.offset, lines.sizes)
        if self.queue.next_offset >= self.run.source.size_bytes:
            self.queue.end_of_input()

    def lease(self, worker: str, count: int) -> list[tuple[int, int]]:
        return [named(grant) for grant in self.queue.lease_ready(worker, count, now=0.0)]

    def lease_fresh(self, worker: str, count: int) -> list[tuple[int, int]]:
        lines = self.run.source.scan(self.queue.next_offset, count, 1 << 20)
        return [named(x) for x in lease_fresh(self.queue, worker, lines.sizes, now=0.0)]

    def finish(self, work_id: int, serial: int | None, nonce: str) -> None:
        result = result_line(work_id, nonce)
        if self.queue.finish(work_id, serial, result, now=0.0) == "accepted":
            self.results[work_id] = result
            self.void_steps(work_id)

    def finish_all(self, nonce: str) -> None:
        results = {work_id: result_line(work_id, nonce) for work_id in self.queue.items}
        came = [(n, None, result, "") for n, result in results.items()]
        self.queue.finish_all(arrivals(*came), 0.0)
        self.results |= results
        self.steps.clear()

    def bury_condemned(self) -> None:
        for work_id in self.queue.condemned_ids():
            error = {"error": MAX_RETRIES_EXCEEDED, "work_id": work_id, "attempts": []}
            result = msgspec.json.encode({"__ERROR__": error})
            self.queue.tombstone(work_id, MAX_RETRIES_EXCEEDED, result, now=0.0)
            self.results[work_id] = result
            self.void_steps(work_id)

    def next_batch(self, *, sync: bool = False) -> Batch:
        batch = Batch()
        for event in self.queue.take_events():
            batch.add(event)
        batch.prefix = self.queue.first_open
        self.queue.note_written(batch.prefix)
        if self.run.writer.segment_is_full:
            batch.state = self.queue.checkpoint()
        batch.sync_output = sync or batch.state is not None
        return batch

    def finish_everything(self, nonce: str) -> bytes:
        """Answer every line that is still open; return the output."""
        self.open_lines(1 << 20)
        self.bury_condemned()
        self.finish_all(nonce)
        self.run.writer.write(self.next_batch(sync=True))
        size = self.run.writer.finish_output()
        output = self.disk.image()[str(self.settings.outfile)]
        assert len(output) == size
        return output

    def complete(self) -> None:
        """Do what the service does when every line has its result."""
        size = self.run.writer.finish_output()
        run_file = self.run.run_file | {
            "state": "complete",
            "ended_at": utc_now(),
            "output_bytes": size,
            "summary": msgspec.to_builtins(self.queue.counters),
        }
        save_run_file(self.settings.state_dir, run_file, self.disk)
        self.run.writer.remove_journal()


class Scenario:
    """The life of a run, with a history of what was acknowledged when."""

    def __init__(self, settings: RunSettings, seed: int) -> None:
        self.settings = settings
        self.rng = random.Random(seed)
        self.disk = RecordingDisk()
        self.history = History()
        self.batches = 0
        self.seen: Counter[str] = Counter()
        self.leases: list[tuple[int, int]] = []
        self._start(1)

    def _start(self, epoch: int) -> None:
        began = len(self.disk.operations)
        results, steps = (self.drive.results, self.drive.steps) if epoch > 1 else ({}, {})
        self.drive = Drive(self.settings, self.disk, epoch)
        self.drive.results, self.drive.steps = results, steps
        if epoch == 1:
            self._note(began)
        else:
            assert same(self.drive.queue.checkpoint(), self.history.points[-1].state)
            assert self.drive.queue.pause == self.history.points[-1].pause
            assert self.drive.stored_steps() == steps

    def restart(self, epoch: int, *, cleanly: bool) -> None:
        if cleanly:
            self.drive.close()
        self._start(epoch)

    def _note(self, began: int) -> None:
        drive = self.drive
        told, state = len(self.disk.operations), drive.queue.checkpoint()
        self.history.points.append(
            Point(began, told, state, dict(drive.results), dict(drive.steps), drive.queue.pause)
        )

    def commit(self) -> None:
        self.batches += 1
        began = len(self.disk.operations)
        segment = self.drive.run.writer._journal.current_segment
        self.drive.run.writer.write(self.drive.next_batch(sync=self.batches % 4 == 0))
        self.seen["rotations"] += self.drive.run.writer._journal.current_segment != segment
        self._note(began)

    def fail_to_commit(self, word: str) -> None:
        """The disk is full: the batch is undone, as the service does it."""
        drive, rng = self.drive, self.rng
        results, steps = dict(drive.results), dict(drive.steps)
        self.act(rng)
        self.disk.fail = {word: errno.ENOSPC}
        with pytest.raises(StorageFullError):
            drive.run.writer.write(drive.next_batch())
        self.disk.fail = {}
        recovered = drive.run.writer.read_journal(POLICY, 0.0)
        assert recovered is not None
        drive.queue, drive.results, drive.steps = recovered.queue, results, steps
        drive.queue.note_written(drive.run.writer.output.written)
        self.leases = [(x.work_id, x.serial) for x in drive.queue.leases.values()]
        assert same(drive.queue.checkpoint(), self.history.points[-1].state)
        assert drive.stored_steps() == steps
        self.seen["full disk"] += 1

    def act(self, rng: random.Random) -> None:
        drive, queue = self.drive, self.drive.queue
        if queue.next_work_id < len(LINES) and len(queue.items) < 12:
            if rng.random() < 0.5 or queue.pause is not None:
                drive.open_lines(rng.randrange(1, 5))
            else:
                self.leases += drive.lease_fresh(rng.choice("ab"), rng.randrange(1, 5))
                self.seen["fresh leases"] += 1
        self.leases += drive.lease(rng.choice("ab"), rng.randrange(1, 4))
        rng.shuffle(self.leases)
        self.record_some(rng)
        for _ in range(min(len(self.leases), rng.randrange(1, 4))):
            work_id, serial = self.leases.pop()
            kind = rng.choice(["finished"] * 6 + ["released", "charged", "charged", "crashed"])
            if self.batches < STALLED.get(work_id, 0):
                kind = "released"
            if kind == "finished":
                drive.finish(work_id, serial, f"batch {self.batches}")
            elif kind == "charged":
                queue.fail(work_id, serial, "not JSON", now=0.0)
                drive.void_steps(work_id)
            else:
                reason = "crash" if kind == "crashed" else "preempted"
                kept = rng.choice([None, None, None, 1])
                queue.release(
                    work_id, serial, charge=False, reason=reason, keep_yields=kept, now=0.0
                )
                if kept is not None:
                    drive.void_steps(work_id, (kept, 0))
            self.seen[kind] += 1
        self.seen["tombstones"] += len(queue.condemned_ids())
        drive.bury_condemned()
        if rng.random() < 0.2 and (buried := queue.checkpoint().tombstoned):
            drive.finish(buried[0], None, f"late {self.batches}")
            self.seen["late results"] += 1

    def record_some(self, rng: random.Random) -> None:
        """Some leased items report steps; now and then one asks something else than before."""
        counters = self.drive.queue.counters
        for work_id, _ in self.leases[:2]:
            for _ in range(rng.randrange(3)):
                at = (rng.randrange(3), rng.randrange(2))
                answer = msgspec.json.encode({"id": work_id, "a": "\u20ac" * rng.randrange(9)})
                self.drive.record(work_id, at, rng.choice("aab"), answer)
            if rng.random() < 0.1:
                self.drive.cut(work_id, (1, 0))
        self.seen["steps"], self.seen["mismatches"] = counters.steps, counters.step_mismatches

    def live(self) -> None:
        """Go through the whole life of the run."""
        while len(self.drive.results) < len(LINES) - 1:
            if self.batches in (21, 28):  # and a restart finds it so
                self.drive.queue.pause_for_operator(f"batch {self.batches}")
                self.seen["pauses"] += 1
            if self.batches in (23, 29):
                self.drive.queue.hear_start("job 7", accept_failures=True, resume=True)
                self.drive.queue.hear_start(
                    f"job {self.batches}", accept_failures=True, resume=True
                )
            self.act(self.rng)
            self.commit()
            if self.batches == 6:
                self.fail_to_commit(".journal")
            if self.batches == 12:
                self.restart(2, cleanly=True)
            if self.batches == 22:
                self.restart(3, cleanly=False)
            assert self.batches < 200
        self.drive.finish_all("at last")
        self.commit()
        self.drive.complete()
        self.drive.close()


def named(grant: Grant) -> tuple[int, int]:
    return grant.work_id, int(grant.lease.split(".")[1])


def result_line(work_id: int, nonce: str) -> bytes:
    return msgspec.json.encode({"id": work_id, "nonce": nonce})


def same(one: QueueState, other: QueueState) -> bool:
    """Compare states; in which order open items are listed does not matter."""
    return _ordered(one) == _ordered(other)


def _ordered(state: QueueState) -> QueueState:
    return msgspec.structs.replace(state, items=sorted(state.items, key=lambda item: item.work_id))


class Judge:
    """Opens the run from what a crash left, and says what is wrong with it."""

    def __init__(self, settings: RunSettings, history: History) -> None:
        self.settings = settings
        self.history = history
        self.states = 0
        self._known: dict[int, tuple[QueueState, Steps, Pause | None, bytes]] = {}

    def problem(self, count: int, image: Image, history: History | None = None) -> str | None:
        """Return what is wrong with the run after a crash behind operation `count`."""
        self.states += 1
        try:
            key = image_key(image)
            if key not in self._known:
                self._known[key] = self._reopen(image)
            state, steps, pause, output = self._known[key]
        except (DispatcherError, AssertionError, LookupError, ValueError, OSError) as error:
            return f"{type(error).__name__}: {error}"
        candidates = (history or self.history).candidates(count)
        point = next((p for p in candidates if same(p.state, state)), None)
        if point is None:
            return f"the queue is in none of {len(candidates)} states it may be in: {state}"
        if pause != point.pause:
            return f"the run is {pause or 'not paused'}, and was {point.pause or 'not paused'}"
        if steps != point.steps:
            return f"the steps {steps} are handed out, not those recorded by then: {point.steps}"
        wanted = [point.results.get(n) or result_line(n, "afterwards") for n in range(len(LINES))]
        if output != b"\n".join(wanted) + b"\n":
            return f"the output is not the one of the results acknowledged by then: {output!r}"
        return None

    @property
    def images(self) -> int:
        """How many different contents of the disk were opened."""
        return len(self._known)

    def _reopen(self, image: Image) -> tuple[QueueState, Steps, Pause | None, bytes]:
        """Open the run twice, finish it; return state, recorded steps, pause, finished output."""
        disk = RecordingDisk(image)
        drive = Drive(self.settings, disk, epoch=50)
        if drive.run.is_complete:
            drive.close()
            last = self.history.points[-1]
            return last.state, last.steps, last.pause, image[str(self.settings.outfile)]
        state = drive.queue.checkpoint()
        assert all(x.progress == PROGRESS_UNKNOWN for x in drive.queue.leases.values())
        output = disk.image()[str(self.settings.outfile)]
        assert output.count(b"\n") == drive.run.writer.output.written <= state.first_open
        steps, pause = drive.stored_steps(), drive.queue.pause
        drive.close()

        drive = Drive(self.settings, disk, epoch=51)
        assert same(drive.queue.checkpoint(), state), "a second start finds something else"
        assert drive.stored_steps() == steps, "a second start finds other steps"
        assert disk.image()[str(self.settings.outfile)] == output
        finished = drive.finish_everything("afterwards")
        assert finished.startswith(output)
        drive.close()
        assert not disk.open_files
        if self.states % 16 == 0:
            assert not Ledger(POLICY.max_retries).problems(LINES, finished)
        return state, steps, pause, finished


@pytest.fixture(autouse=True)
def no_garbage_collection() -> Iterator[None]:
    """Thousands of small disks live and die here; looking for cycles would cost a fifth."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunSettings:
    """A run of 48 short lines whose segments are full after a few batches."""
    monkeypatch.setattr(writer, "SEGMENT_BYTES", 1000)
    monkeypatch.setattr(writer, "SEGMENT_RESULTS", 14)
    infile = tmp_path / "in.jsonl"
    infile.write_text("".join(line + "\n" for line in LINES))
    # Reading YAML and the input's fingerprint would take longer than all the rest of a start.
    monkeypatch.setattr(run_state, "yaml", _RememberingYaml())
    monkeypatch.setattr(opening, "open_source", _one_source(infile))
    return RunSettings(infile, DiskPath("/run/out.jsonl"), Path("/run/state"), POLICY)


class _RememberingYaml:
    YAMLError = yaml.YAMLError

    def __init__(self) -> None:
        self.safe_load = functools.lru_cache(maxsize=64)(yaml.safe_load)
        self._dumped: dict[str, str] = {}

    def safe_dump(self, content: dict[str, Any], **options: Any) -> str:
        key = repr(content)
        if key not in self._dumped:
            self._dumped[key] = yaml.safe_dump(content, **options)
        return self._dumped[key]


def _one_source(infile: Path) -> Callable[..., LineSource]:
    source = LineSource(infile, 1 << 20)
    fingerprint = source.fingerprint()
    source.fingerprint = lambda: fingerprint  # type: ignore[method-assign]
    source.close = lambda: None  # type: ignore[method-assign]  # the next start has it, too
    return lambda *_, **__: source


def lived(settings: RunSettings, seed: int = SEED) -> Scenario:
    scenario = Scenario(settings, seed)
    scenario.live()
    return scenario


# -------------------------------------------------------------------- crashes


def report(problems: list[str]) -> str:
    return f"{len(problems)} problems with DISPATCHER_TEST_SEED={SEED}:\n" + "\n".join(problems[:5])


def problems_of(scenario: Scenario, judge: Judge, *, most: int, ordered: bool = True) -> list[str]:
    rng = random.Random(SEED)
    return [
        f"behind operation {count}, with {sorted(image)}: {problem}"
        for count, image in scenario.disk.crashes(rng, most=most, ordered=ordered)
        if (problem := judge.problem(count, image)) is not None
    ]


def test_a_life_holds_everything_a_run_does(settings: RunSettings) -> None:
    scenario = lived(settings)

    names = [
        name for op in scenario.disk.operations if isinstance(op, Change) for name in op.entries
    ]
    assert min(scenario.seen.values()) > 0
    assert scenario.seen["rotations"] >= 4
    assert len({n for n in names if n.endswith(".waiting")}) >= 4
    assert {n[9:15] for n in names if n.endswith(".journal")} == {"000001", "000002", "000003"}
    assert max(p.state.next_work_id - p.state.first_open for p in scenario.history.points) > 30
    assert max(len(p.steps) for p in scenario.history.points) > 5
    assert scenario.seen["steps"] > 40
    output = scenario.disk.image()[str(settings.outfile)]
    assert not Ledger(POLICY.max_retries).problems(LINES, output)
    assert not [path for path in scenario.disk.image() if path.endswith((".journal", ".waiting"))]


@pytest.mark.slow
def test_after_any_crash_every_acknowledged_result_is_there_and_no_other(
    settings: RunSettings,
) -> None:
    problems: list[str] = []
    states = images = 0
    for life in range(5):
        scenario = lived(settings, SEED + life)
        judge = Judge(settings, scenario.history)
        problems += [f"life {SEED + life}, {p}" for p in problems_of(scenario, judge, most=60)]
        states, images = states + judge.states, images + judge.images
    print(f"{states} crash states ({images} different disks) reopened, {len(problems)} problems")
    assert not problems, report(problems)
    assert states >= 20_000


@pytest.mark.slow
def test_a_crash_while_the_run_is_opened_again_changes_nothing(settings: RunSettings) -> None:
    scenario = lived(settings)
    rng = random.Random(SEED)
    judge = Judge(settings, scenario.history)
    problems: list[str] = []
    crashes = list(scenario.disk.crashes(rng, most=12))
    for count, image in rng.sample(crashes, 80):
        disk = RecordingDisk(image)
        Drive(settings, disk, epoch=40)
        for again, image_again in disk.crashes(rng, most=10):
            if (problem := judge.problem(count, image_again)) is not None:
                problems.append(f"operation {count}, then {again} of the reopening: {problem}")
    print(f"{judge.states} crash states of a reopening after a crash, {len(problems)} problems")
    assert not problems, report(problems)
    assert judge.states >= 3000


@pytest.mark.slow
def test_a_power_failure_after_a_killed_process_was_started_again_loses_nothing(
    settings: RunSettings,
) -> None:
    scenario = lived(settings)
    rng = random.Random(SEED)
    judge = Judge(settings, scenario.history)
    problems: list[str] = []
    end = len(scenario.disk.operations)
    for killed in [*range(20), *range(20, end, 6)]:
        disk = scenario.disk.killed_after(killed)
        history = scenario.history.up_to(killed)
        drive = Drive(settings, disk, epoch=40)
        if drive.run.is_complete:
            continue
        state = drive.queue.checkpoint()
        before = next(p for p in history.candidates(killed) if same(p.state, state))
        told = len(disk.operations)
        history.points.append(
            Point(killed, told, state, before.results, before.steps, before.pause)
        )
        for _ in range(3):
            began = len(disk.operations)
            drive.open_lines(3)
            drive.finish_all("after the kill")
            drive.run.writer.write(drive.next_batch(sync=True))
            told, results = len(disk.operations), before.results | drive.results
            history.points.append(
                Point(began, told, drive.queue.checkpoint(), results, {}, drive.queue.pause)
            )
        for count, image in disk.crashes(rng, first=killed + 1, most=5):
            if (problem := judge.problem(count, image, history)) is not None:
                problems.append(f"killed behind {killed}, crash behind {count}: {problem}")
    print(f"{judge.states} crash states after a kill and a new start, {len(problems)} problems")
    assert not problems, report(problems)
    assert judge.states >= 3000


def test_removals_that_a_crash_undid_in_any_order_do_not_stop_the_run(
    settings: RunSettings,
) -> None:
    scenario = lived(settings)
    judge = Judge(settings, scenario.history)
    disk, rng = scenario.disk, random.Random(SEED)
    removals = {
        count
        for count, operation in enumerate(disk.operations, 1)
        if isinstance(operation, Change) and list(operation.entries.values()) == [None]
    }
    problems = [
        f"behind operation {count}, with {sorted(image)}: {problem}"
        for count, image in disk.crashes(rng, most=20, ordered=False)
        if count in removals and (problem := judge.problem(count, image)) is not None
    ]
    print(f"{judge.states} crash states with removals undone, {len(problems)} problems")
    assert not problems, report(problems)
    assert judge.states >= 100


# -------------------------------------------------------------------- damage in the last segment

FIRST, LAST = (f"/j/{name}-000001.journal" for name in ("00000001", "00000002"))
_FIELDS = {"mark": 0, "seq": 5, "length": 20, "before": 26, "checksum": 36, "line end": 42}


@dataclass(frozen=True)
class Filled:
    """A journal of two segments; frame n of the last one ends at byte `ends[n]`."""

    image: Image
    ends: list[int]


def filled(before: int, frames: int) -> Filled:
    """Write segments of a first frame and so many others with a result each."""
    disk = RecordingDisk()
    journal = Journal(Path("/j"), disk)
    header = RunHeader("run-1", 1, {}, {})
    checkpoint = Checkpoint(WorkQueue(POLICY).checkpoint(), [OutputPosition(0, 0, 0)])
    journal.begin_segment(1, encode_records(header, checkpoint))
    for work_id in range(before):
        journal.append(encode_records(result_record(1000 + work_id)))
    journal.begin_segment(1, encode_records(header, checkpoint))
    ends = [journal.segment_bytes]
    for work_id in range(frames):
        journal.append(encode_records(result_record(work_id)))
        ends.append(journal.segment_bytes)
    journal.close()
    return Filled(disk.image(), ends)


def result_record(work_id: int) -> Finished:
    return Finished([work_id], [work_id], {}, [msgspec.Raw(b"%d" % work_id)])


def replayed(disk: RecordingDisk) -> tuple[Journal, list[int]]:
    """Replay a journal; return it, and the lines that have a result in its last segment."""
    journal = Journal(Path("/j"), disk)
    records = [entry.record for entry in journal.replay_last()]
    return journal, [n for r in records if isinstance(r, Finished) for n in r.work_ids]


@pytest.mark.slow
def test_the_last_segment_cut_at_any_length_comes_back_up_to_the_cut() -> None:
    before, ends = filled(140, 70).image, filled(140, 70).ends
    whole = before[LAST]
    for length in range(len(whole) + 1):
        disk = RecordingDisk(before | {LAST: whole[:length]})
        frames = sum(end <= length for end in ends)

        journal, found = replayed(disk)

        wanted = list(range(frames - 1)) if frames else list(range(1000, 1140))
        assert found == wanted, f"cut to {length} bytes"
        assert len(disk.image().get(LAST, b"")) == (ends[frames - 1] if frames else 0)
        if length % 50 == 0:
            journal.begin_segment(2, encode_records(result_record(5000)))
            journal.append(encode_records(result_record(5001)))
            assert replayed(disk)[1] == [5000, 5001]
    print(f"{len(whole) + 1} lengths of a segment of {len(ends)} frames")


def flips(start: int, end: int, rng: random.Random) -> Iterator[tuple[int, int]]:
    """Yield (byte, bit): one in each field of the frame's header, and some in its body."""
    for offset in _FIELDS.values():
        yield start + offset, rng.randrange(8)
    for _ in range(6):
        yield rng.randrange(start, end), rng.randrange(8)


def flipped(data: bytes, byte: int, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[byte] ^= 1 << bit
    return bytes(damaged)


@pytest.mark.slow
def test_a_flipped_bit_before_the_last_frame_is_refused_with_file_and_offset() -> None:
    rng = random.Random(SEED)
    journal = filled(1, 210)
    whole = journal.image[LAST]
    tried = 0
    for start, end in zip([0, *journal.ends[:-2]], journal.ends[:-1], strict=True):
        for byte, bit in flips(start, end, rng):
            damaged = flipped(whole, byte, bit)
            disk = RecordingDisk(journal.image | {LAST: damaged})
            with pytest.raises(CorruptJournalError) as caught:
                replayed(disk)
            assert f"{LAST} is damaged at byte {start} " in str(caught.value), (byte, bit)
            assert disk.image()[LAST] == damaged, "evidence was changed"
            tried += 1
    print(f"{tried} flipped bits in {len(journal.ends) - 1} frames refused")


def test_a_flipped_bit_in_the_last_frame_cuts_it_off_and_nothing_else() -> None:
    journal = filled(1, 40)
    whole, start = journal.image[LAST], journal.ends[-2]
    for byte in range(start, len(whole)):
        for bit in range(8):
            disk = RecordingDisk(journal.image | {LAST: flipped(whole, byte, bit)})
            assert replayed(disk)[1] == list(range(39)), (byte, bit)
            assert disk.image()[LAST] == whole[:start]


@pytest.mark.parametrize("change", ["left out", "there twice", "swapped", "of another journal"])
def test_whole_frames_that_do_not_follow_each_other_are_refused(change: str) -> None:
    journal, other = filled(1, 12), filled(2, 12)
    whole, ends = journal.image[LAST], journal.ends
    frames = [whole[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    foreign = other.image[LAST][ends[4] : ends[5]]
    for n in range(1, 11):
        before, here, after = frames[:n], frames[n], frames[n + 1 :]
        changed = {
            "left out": [*before, *after],
            "there twice": [*before, here, here, *after],
            "swapped": [*before, after[0], here, *after[1:]],
            "of another journal": [*before, foreign, *after],
        }
        disk = RecordingDisk(journal.image | {LAST: b"".join(changed[change])})
        with pytest.raises(CorruptJournalError) as caught:
            replayed(disk)
        damaged_at = ends[n] if change == "there twice" else ends[n - 1]
        assert f"{LAST} is damaged at byte {damaged_at} " in str(caught.value)


# -------------------------------------------------------------------- damage in older segments


@dataclass(frozen=True)
class Stalled:
    """A run whose lines all wait behind the first one, over several segments; nobody uses it."""

    settings: RunSettings
    image: Image
    wanted: bytes
    older: list[str]

    def outcome(self, image: Image) -> CorruptJournalError | bytes:
        """Open the run and finish it; return the output, or how it was refused."""
        try:
            drive = Drive(self.settings, RecordingDisk(image), epoch=9)
            return drive.finish_everything("afterwards")
        except CorruptJournalError as error:
            return error


@pytest.fixture
def stalled(settings: RunSettings) -> Stalled:
    lines = [input_line(number) for number in range(270)]
    settings.infile.write_text("".join(line + "\n" for line in lines))
    source = LineSource(settings.infile, 1 << 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SEGMENT_BYTES", 4500)
        patch.setattr(writer, "SEGMENT_RESULTS", 1000)
        patch.setattr(opening, "open_source", lambda *_, **__: source)
        disk = RecordingDisk()
        drive = Drive(settings, disk, epoch=1)
        drive.open_lines(len(lines))
        for work_id in range(1, len(lines)):
            drive.finish(work_id, None, "before")
            drive.run.writer.write(drive.next_batch(sync=work_id % 10 == 0))
        drive.close()
    wanted = [drive.results.get(n) or result_line(n, "afterwards") for n in range(len(lines))]
    image = disk.image()
    segments = sorted(path for path in image if path.endswith(".journal"))
    return Stalled(settings, image, b"\n".join(wanted) + b"\n", segments[:-1])


@pytest.fixture(autouse=True)
def real_source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "stalled" in request.fixturenames:
        run = request.getfixturevalue("stalled")
        monkeypatch.setattr(opening, "open_source", _one_source(run.settings.infile))


def without_saved_places(image: Image) -> Image:
    return {path: data for path, data in image.items() if not path.endswith(".waiting")}


def frames_of(data: bytes) -> list[tuple[int, int]]:
    starts = [match.start() for match in re.finditer(rb"@\d{12} \d{10} ", data)]
    return list(zip(starts, [*starts[1:], len(data)], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("with_places", [True, False], ids=["with places", "without"])
def test_a_flipped_bit_in_an_older_segment_is_refused_when_its_results_are_needed(
    stalled: Stalled, with_places: bool
) -> None:
    rng = random.Random(SEED)
    image = stalled.image if with_places else without_saved_places(stalled.image)
    assert stalled.outcome(image) == stalled.wanted
    wrong: list[str] = []
    frames = 0
    for path in stalled.older:
        for start, end in frames_of(image[path]):
            frames += 1
            for byte, bit in [*flips(start, end, rng)][frames % 3 :: 3]:
                outcome = stalled.outcome(image | {path: flipped(image[path], byte, bit)})
                if isinstance(outcome, bytes):
                    wrong.append(f"bit {bit} of byte {byte} of {path} was not noticed")
                elif f"{path} is damaged at byte {start} " not in str(outcome):
                    wrong.append(f"bit {bit} of byte {byte} of {path}: {outcome}")
    print(f"flipped bits in {frames} frames of older segments, {len(wrong)} not told by place")
    assert not wrong, report(wrong)
    assert frames >= 200


def test_an_older_segment_cut_anywhere_is_refused(stalled: Stalled) -> None:
    path = stalled.older[1]
    data = stalled.image[path]
    for image in (stalled.image, without_saved_places(stalled.image)):
        for length in range(0, len(data), 37):
            outcome = stalled.outcome(image | {path: data[:length]})
            assert isinstance(outcome, CorruptJournalError), length
            assert f"{path} is damaged at byte" in str(outcome)


@pytest.mark.parametrize("with_places", [True, False], ids=["with places", "without"])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_missing_older_segment_is_refused_when_its_results_are_needed(
    stalled: Stalled, place: int, with_places: bool
) -> None:
    path = stalled.older[place]
    image = stalled.image if with_places else without_saved_places(stalled.image)
    outcome = stalled.outcome({name: data for name, data in image.items() if name != path})
    assert isinstance(outcome, CorruptJournalError)
    assert "/run/state/journal" in str(outcome)


def test_saved_places_cut_at_any_length_are_read_from_the_segment_instead(
    stalled: Stalled,
) -> None:
    path = str(places_path(Path(stalled.older[1])))
    data = stalled.image[path]
    for length in range(0, len(data), 5):
        assert stalled.outcome(stalled.image | {path: data[:length]}) == stalled.wanted, length


def test_saved_places_with_flipped_bits_lose_no_segment_and_no_result(stalled: Stalled) -> None:
    rng = random.Random(SEED)
    for segment in stalled.older:
        path = str(places_path(Path(segment)))
        data = stalled.image[path]
        head = data.index(b"\n")
        for byte in [*range(head), *rng.sample(range(head, len(data)), 40)]:
            image = stalled.image | {path: flipped(data, byte, rng.randrange(8))}
            assert stalled.outcome(image) == stalled.wanted, (path, byte, data[:head])


def test_saved_places_older_than_their_segment_are_not_used(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills while a segment is followed by another, and again at the next attempt."""
    monkeypatch.setattr(writer, "SEGMENT_BYTES", 600)
    disk = RecordingDisk()
    drive = Drive(settings, disk, epoch=1)
    drive.open_lines(len(LINES))
    failing = iter(["00000002-000001.journal", ".waiting"])
    for work_id in range(1, len(LINES)):
        drive.finish(work_id, None, "before")
        batch = drive.next_batch()
        disk.fail = {next(failing, "nothing"): errno.ENOSPC} if batch.state is not None else {}
        drive.run.writer.write(batch)
        disk.fail = {}
    drive.close()

    drive = Drive(settings, disk, epoch=2)
    output = drive.finish_everything("afterwards")

    assert not Ledger(POLICY.max_retries).problems(LINES, output)


def test_an_output_that_lost_its_end_goes_on_from_the_position_before(
    settings: RunSettings,
) -> None:
    disk = RecordingDisk()
    drive = Drive(settings, disk, epoch=1)
    drive.open_lines(30)
    for first in range(0, 20, 4):
        for work_id in range(first, first + 4):
            drive.finish(work_id, None, "before")
        drive.run.writer.write(drive.next_batch(sync=True))
    drive.close()
    image, path = disk.image(), str(settings.outfile)
    wanted = [drive.results.get(n) or result_line(n, "afterwards") for n in range(len(LINES))]
    # Each batch noted where the output ended before it; the last two of these are kept.
    older = sum(len(line) + 1 for line in wanted[:12])
    for length in range(len(image[path]) + 1):
        disk = RecordingDisk(image | {path: image[path][:length]})
        if length < older:
            with pytest.raises(StateError, match="is not what this run wrote"):
                Drive(settings, disk, epoch=2)
        else:
            output = Drive(settings, disk, epoch=2).finish_everything("afterwards")
            assert output == b"\n".join(wanted) + b"\n", length


def test_a_segment_that_the_loser_of_a_takeover_began_never_stops_the_run(
    settings: RunSettings,
) -> None:
    """It stays behind when those that replaced it are not needed any more."""
    disk = RecordingDisk()
    drives = [Drive(settings, disk, epoch=1)]

    def write(drive: Drive, *work_ids: int, rotate: bool = False) -> None:
        for work_id in work_ids:
            drive.finish(work_id, None, "before")
        batch = drive.next_batch(sync=True)
        batch.state = drive.queue.checkpoint() if rotate else None
        drive.run.writer.write(batch)
        opened = Drive(settings, RecordingDisk(disk.image()), epoch=50)
        output = opened.finish_everything("afterwards")
        wanted = [
            drives[-1].results.get(n) or result_line(n, "afterwards") for n in range(len(LINES))
        ]
        assert output == b"\n".join(wanted) + b"\n"

    drives[0].open_lines(20)
    write(drives[0], 1)
    drives.append(Drive(settings, disk, epoch=2))
    drives[1].results |= drives[0].results
    write(drives[0], 4, rotate=True)  # the loser does not know yet, and acknowledges nothing
    write(drives[1], 0, 2, rotate=True)
    write(drives[1], 3, 10, rotate=True)
    for work_id in (12, 13, 14):
        write(drives[1], work_id)

    names = {path.split("/")[-1] for path in disk.image() if path.endswith(".journal")}
    assert {"00000003-000002.journal", "00000004-000002.journal"} <= names
    assert "00000002-000002.journal" not in names, "nothing was dropped"
