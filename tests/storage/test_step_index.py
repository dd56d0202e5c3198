"""Where recorded steps stand in the journal: found again to the byte, and kept as long as needed.

The queue and the index follow the same events, each for itself. Beside both runs a plain idea of
what is recorded; and what the index says is looked up in the journal's files, line by line.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import msgspec
import pytest

from dispatcher.core.events import Finished, LeaseEnded, Position, Stepped, StepsCut, Tombstoned
from dispatcher.core.work_queue import QueuePolicy, WorkQueue
from dispatcher.errors import CorruptJournalError, StorageFullError
from dispatcher.models import StepOutcome
from dispatcher.storage import writer as writer_module
from dispatcher.storage.files import Files
from dispatcher.storage.records import Location, RunHeader, StepPlace
from dispatcher.storage.step_index import StepIndex
from dispatcher.storage.writer import Batch, RunWriter
from tests.storage.broken_files import BROKEN, FULL, BrokenFiles
from tests.support.queues import arrivals

POLICY = QueuePolicy()
Recorded = dict[Position, tuple[str, bytes]]


class Run:
    """A run with its queue, driven by hand, and what is recorded of each item."""

    def __init__(self, directory: Path, epoch: int = 1, files: Files | None = None) -> None:
        self.journal_dir = directory / "journal"
        self.journal_dir.mkdir(exist_ok=True)
        self.writer = RunWriter(self.journal_dir, directory / "out.jsonl", files or Files())
        self.queue = WorkQueue(POLICY)
        if recovered := self.writer.read_journal(POLICY, now=0.0):
            self.queue = recovered.queue
        header = RunHeader("run-1", epoch, {}, {})
        self.writer.begin(header, self.queue.checkpoint(), recovered)

    def open_lines(self, count: int) -> None:
        self.queue.open_lines(self.queue.next_offset, [10] * count)

    def lease(self, count: int = 1) -> dict[int, int]:
        """Lease items; return their serials."""
        grants = self.queue.lease_ready("", count, 0.0)
        return {grant.work_id: int(grant.lease.split(".")[1]) for grant in grants}

    def record(self, work_id: int, position: Position, answer: bytes, hash_: str = "h") -> None:
        item = self.queue.items[work_id]
        outcome = self.queue.record_step(
            work_id, item.leases[0].serial, item.attempt, position, hash_, answer
        )
        assert outcome is StepOutcome.ACCEPTED

    def finish(self, *work_ids: int, size: int = 5) -> None:
        came = [(n, None, b"1" * size, "") for n in work_ids]
        self.queue.finish_all(arrivals(*came), now=0.0)

    def batch(self) -> Batch:
        batch = Batch()
        for event in self.queue.take_events():
            batch.add(event)
        batch.prefix = self.queue.first_open
        return batch

    def write(self, *, sync: bool = False, rotate: bool = False) -> None:
        batch = self.batch()
        batch.state = self.queue.checkpoint() if rotate else None
        batch.sync_output = sync or rotate
        self.writer.write(batch)

    def recorded(self, work_id: int) -> Recorded:
        return self.writer.read_steps([work_id])[work_id]

    @property
    def segments(self) -> list[int]:
        return sorted(int(path.name[:8]) for path in self.journal_dir.glob("*.journal"))

    @property
    def index(self) -> StepIndex:
        return self.writer._steps

    def close(self) -> None:
        self.writer.close()


def in_the_files(run: Run) -> dict[int, list[tuple[Position, str, int, int]]]:
    """Read all steps that were ever written, by segment: position, hash, work id, length."""
    found: dict[int, list[tuple[Position, str, int, int]]] = {}
    for path in run.journal_dir.glob("*.journal"):
        steps = found.setdefault(int(path.name[:8]), [])
        for line in path.read_bytes().splitlines():
            if line.startswith(b'["step"'):
                _, work_id, _, (first, second), hash_, answer = json.loads(line)
                size = len(json.dumps(answer, ensure_ascii=False).encode())
                steps.append(((first, second), hash_, work_id, size))
    return found


# -------------------------------------------------------------------- the index by itself


def stepped(work_id: int, position: Position, answer: bytes = b"1") -> Stepped:
    return Stepped(work_id, 1, position, "h", msgspec.Raw(answer))


def test_the_index_drops_what_an_event_ends_and_nothing_else() -> None:
    index = StepIndex()
    for work_id in range(3):
        for position in [(0, 0), (1, 0), (1, 1)]:
            index.note(stepped(work_id, position), segment=work_id + 4, end=100)

    index.note(LeaseEnded(0, 1, "released", "x"), 9, 0)
    assert list(index.of(0)) == [(0, 0), (1, 0), (1, 1)]
    index.note(LeaseEnded(0, 1, "charged", "x", 1), 9, 0)
    assert list(index.of(0)) == [(0, 0)]
    index.note(StepsCut(1, (1, 1)), 9, 0)
    assert list(index.of(1)) == [(0, 0), (1, 0)]
    assert index.first_needed(9) == 4
    index.note(Tombstoned(0, "x", msgspec.Raw(b"1")), 9, 0)
    assert index.first_needed(9) == 5
    index.note(Finished([1, 7], [0, 0], {}, []), 9, 0)
    assert [work_id for work_id, _ in index] == [2]
    assert index.first_needed(9) == 6
    index.note(StepsCut(2, (0, 0)), 9, 0)
    assert len(index) == 0
    assert index.first_needed(9) == 9


def test_the_index_is_made_again_from_its_places() -> None:
    index = StepIndex()
    index.note(stepped(3, (0, 1), b'"abc"'), segment=2, end=1000)
    index.note(stepped(3, (2, 0), b"17"), segment=5, end=77)

    again = StepIndex(index.places())

    assert dict(again) == dict(index)
    assert again.first_needed(9) == 2
    again.note(StepsCut(3, (0, 0)), 9, 0)
    assert again.first_needed(9) == 9


def test_a_place_of_a_checkpoint_is_the_one_that_was_noted() -> None:
    index = StepIndex([StepPlace(3, (0, 1), 2, 500, 7)])
    assert index.of(3) == {(0, 1): Location(2, 500, 7)}
    assert index.places() == [StepPlace(3, (0, 1), 2, 500, 7)]


# -------------------------------------------------------------------- read back

ANSWERS = [
    b"1",
    b'""',
    b'{"text": "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80"}',
    b'{"a": [1, 2, {"b": "]]"}], "c": "\\",\\""}',
    b'"[\\"step\\",0,1]"',
    b'{"deep": ' + b"[" * 300 + b"]" * 300 + b"}",
    b'"' + b"x" * 100_000 + b'"',
    b"1e999",
    b'"\\ud83d\\ude00 \\u0000 \\n"',
]


def test_every_answer_is_read_back_to_the_byte_with_the_hash_of_its_request(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path)
    run.open_lines(2)
    run.lease(2)
    run.write()
    wanted: dict[int, Recorded] = {0: {}, 1: {}}
    for number, answer in enumerate(ANSWERS * 2):
        work_id, position = number % 2, (number // 4, number % 4)
        hash_ = f"{number:x}" * (1 + number % 5)
        run.record(work_id, position, answer, hash_)
        wanted[work_id][position] = (hash_, answer)
        if number % 3 == 0:  # alone, or many in a frame; with the output's position, or not
            run.write(sync=number % 2 == 0)
    run.write()

    assert {n: run.recorded(n) for n in (0, 1)} == wanted
    run.write(rotate=True)
    assert {n: run.recorded(n) for n in (0, 1)} == wanted
    run.close()
    for epoch in (2, 3):
        again = Run(tmp_path, epoch)
        assert {n: again.recorded(n) for n in (0, 1)} == wanted
        again.close()


def test_an_item_without_steps_has_none(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.open_lines(1)
    assert run.recorded(0) == {}
    assert run.recorded(12345) == {}
    run.close()


def test_what_is_not_written_yet_is_not_read_with_another_ones_hash(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.open_lines(1)
    run.lease()
    run.record(0, (0, 0), b'"of A"', "A")
    run.write()
    run.record(0, (0, 0), b'"of B"', "B")  # decided, and on its way to the disk

    assert run.recorded(0) == {(0, 0): ("A", b'"of A"')}
    run.write()
    assert run.recorded(0) == {(0, 0): ("B", b'"of B"')}
    run.close()


# -------------------------------------------------------------------- segments


def test_the_segment_of_a_live_step_stays_and_goes_when_nothing_needs_it(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.open_lines(10)
    run.lease(10)
    for work_id in range(3):
        run.record(work_id, (0, 0), b'"%d"' % work_id)
        run.write(rotate=True)
    assert run.segments == [1, 2, 3, 4]
    run.finish(*range(3, 10))
    run.write(rotate=True)
    assert run.recorded(1) == {(0, 0): ("h", b'"1"')}

    # The results after the first lines wait for these in segment 4.
    for work_id, left in [(0, [2, 3, 4, 5]), (1, [3, 4, 5]), (2, [5])]:
        run.finish(work_id)
        for _ in range(3):  # the output's older position counts
            run.write(sync=True)
        assert run.segments == left
    assert run.index.first_needed(5) == 5
    run.close()


@pytest.mark.parametrize("end", ["cut", "dropped", "tombstone", "result"])
def test_the_segment_of_steps_goes_when_they_are_void(end: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.open_lines(1)
    serial = run.lease()[0]
    run.record(0, (0, 0), b"1")
    for _ in range(3):
        run.write(rotate=True)
    assert run.segments == [1, 2, 3, 4]

    if end == "cut":
        run.queue.cut_steps(0, serial, 1, (0, 0))
    elif end == "tombstone":
        run.queue.tombstone(0, "x", b"{}", now=0.0)
    elif end == "result":
        run.finish(0)
    else:
        run.queue.release(0, serial, charge=True, reason="x", keep_yields=0, now=0.0)
    for _ in range(3):
        run.write(sync=True)

    assert run.segments == [4]
    assert len(run.index) == len(run.queue.steps) == 0
    run.close()


def test_steps_in_many_segments_survive_restarts_that_each_begin_another_one(
    tmp_path: Path,
) -> None:
    wanted: Recorded = {}
    for epoch in range(1, 25):
        run = Run(tmp_path, epoch)
        if epoch == 1:
            run.open_lines(1)
            run.lease()
        run.record(0, (epoch, 0), b'"%d"' % epoch, f"h{epoch}")
        wanted[epoch, 0] = (f"h{epoch}", b'"%d"' % epoch)
        run.write(sync=True)
        assert run.recorded(0) == wanted
        run.close()
    assert run.segments == list(range(1, 25))


def test_a_full_segment_that_cannot_be_followed_by_another_one_loses_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "SEGMENT_BYTES", 100)
    files = BrokenFiles()
    run = Run(tmp_path, files=files)
    run.open_lines(1)
    run.lease()
    run.record(0, (0, 0), b'"before"')
    files.fail_open = FULL
    run.write(rotate=True)
    run.record(0, (1, 0), b'"meanwhile"')
    run.write(rotate=True)
    files.heal()
    run.record(0, (2, 0), b'"after"')
    run.write(rotate=True)

    wanted = {(n, 0): ("h", b'"%b"' % x) for n, x in enumerate([b"before", b"meanwhile", b"after"])}
    assert run.recorded(0) == wanted
    run.close()
    again = Run(tmp_path, 2)
    assert again.recorded(0) == wanted
    again.close()


# -------------------------------------------------------------------- failures


def test_after_a_failed_write_the_index_is_that_of_the_journal(tmp_path: Path) -> None:
    files = BrokenFiles()
    run = Run(tmp_path, files=files)
    run.open_lines(1)
    run.lease()
    run.record(0, (0, 0), b'"kept"', "A")
    run.write()
    before = dict(run.index)
    run.record(0, (0, 0), b'"lost"', "B")
    run.record(0, (1, 0), b'"lost, too"', "C")
    files.fail_write = FULL
    with pytest.raises(StorageFullError):
        run.write()
    files.heal()
    recovered = run.writer.read_journal(POLICY, 0.0)
    assert recovered is not None
    run.queue = recovered.queue

    assert dict(run.index) == before
    assert run.recorded(0) == {(0, 0): ("A", b'"kept"')}
    assert run.queue.steps.size == len(b'"kept"')
    assert run.queue.counters.steps == 1
    run.record(0, (1, 0), b'"again"', "C")
    run.write()
    assert run.recorded(0)[1, 0] == ("C", b'"again"')
    run.close()


def run_with_an_older_step(directory: Path) -> Run:
    """A run that was killed, whose only step stands in a segment before the last one."""
    run = Run(directory)
    run.open_lines(1)
    run.lease()
    run.record(0, (0, 0), b'"yes"')
    run.write(rotate=True)
    run.close()
    return run


def test_a_damaged_segment_is_noticed_before_a_step_of_it_is_handed_out(tmp_path: Path) -> None:
    run = run_with_an_older_step(tmp_path)
    (path,) = run.journal_dir.glob("00000001-*.journal")
    path.write_bytes(path.read_bytes().replace(b'"yes"', b'"yet"'))

    again = Run(tmp_path, 2)

    with pytest.raises(CorruptJournalError, match="is damaged at byte"):
        again.recorded(0)
    again.close()


def test_a_missing_segment_is_noticed_when_a_step_of_it_is_wanted(tmp_path: Path) -> None:
    run = run_with_an_older_step(tmp_path)
    (path,) = run.journal_dir.glob("00000001-*.journal")
    path.unlink()

    again = Run(tmp_path, 2)

    with pytest.raises(CorruptJournalError, match="missing"):
        again.recorded(0)
    again.finish(0)
    again.write(sync=True)
    again.close()


def test_a_segment_that_cannot_be_read_is_an_error_of_the_file_system(tmp_path: Path) -> None:
    files = BrokenFiles()
    run = Run(tmp_path, files=files)
    run.open_lines(1)
    run.lease()
    run.record(0, (0, 0), b"1")
    run.write()
    files.fail_read = BROKEN
    with pytest.raises(OSError, match="Input/output"):
        run.recorded(0)
    files.heal()
    assert run.recorded(0) == {(0, 0): ("h", b"1")}
    run.close()


# -------------------------------------------------------------------- any life


class Plain:
    """What is recorded, in the plainest way: all steps of all items in one table."""

    def __init__(self) -> None:
        self.steps: dict[tuple[int, Position], tuple[str, bytes]] = {}

    def cut(self, work_id: int, first: Position) -> None:
        self.steps = {
            (item, position): step
            for (item, position), step in self.steps.items()
            if item != work_id or position < first
        }

    def of(self, work_id: int) -> Recorded:
        return {position: step for (item, position), step in self.steps.items() if item == work_id}


def live(run: Run, plain: Plain, rng: Random) -> None:
    """Let one thing happen to an item."""
    queue = run.queue
    if queue.next_work_id < 12 and len(queue.items) < 5:
        run.open_lines(1)
    run.lease(2)
    if not queue.leases:
        return
    lease = rng.choice([*queue.leases.values()])
    item = queue.items[lease.work_id]
    position = (rng.randrange(4), rng.randrange(3))
    kind = rng.choices(["step", "cut", "end", "finish"], [12, 1, 3, 1])[0]
    if kind == "step":
        hash_, answer = rng.choice("ab"), rng.choice(ANSWERS[:5])
        known = plain.of(item.work_id).get(position)
        run.record(item.work_id, position, answer, hash_)
        if known is None or known[0] != hash_:
            if known is not None:
                plain.cut(item.work_id, position)
            plain.steps[item.work_id, position] = (hash_, answer)
    elif kind == "cut":
        queue.cut_steps(item.work_id, lease.serial, item.attempt, position)
        plain.cut(item.work_id, position)
    elif kind == "end":
        keep = rng.choice([None, None, 0, 1, 2])
        queue.release(
            item.work_id, lease.serial, charge=False, reason="x", keep_yields=keep, now=0.0
        )
        if keep is not None:
            plain.cut(item.work_id, (keep, 0))
    else:
        run.finish(item.work_id, size=rng.randrange(1, 200))
        plain.cut(item.work_id, (0, 0))


def assert_all_agree(run: Run, plain: Plain) -> None:
    notes = {work_id: dict(found) for work_id, found in run.queue.steps}
    places = {work_id: dict(found) for work_id, found in run.index}
    assert {n: list(x) for n, x in notes.items()} == {n: list(x) for n, x in places.items()}
    steps = plain.steps
    assert {(n, position) for n, found in notes.items() for position in found} == steps.keys()
    assert run.queue.steps.size == sum(len(answer) for _, answer in steps.values())
    for work_id in run.queue.items:
        assert run.recorded(work_id) == plain.of(work_id)
    written = in_the_files(run)
    used = {at.segment for found in places.values() for at in found.values()}
    assert used <= written.keys(), "a segment with a live step is gone"
    for work_id, found in places.items():
        for position, at in found.items():
            hash_, answer = steps[work_id, position]
            assert any(
                step[:3] == (position, hash_, work_id) and json.loads(answer) is not None
                for step in written[at.segment]
            )
    current = max(written)
    assert run.index.first_needed(current) == min(used, default=current)


def test_index_queue_and_journal_agree_whatever_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "SEGMENT_BYTES", 1500)
    lives = restarts = rotations = failures = steps = 0
    for seed in range(6):
        rng = Random(seed)
        directory = tmp_path / str(seed)
        directory.mkdir()
        files = BrokenFiles()
        run, plain = Run(directory, 1, files), Plain()
        for turn in range(60):
            for _ in range(rng.randrange(1, 5)):
                live(run, plain, rng)
            segment = max(run.segments)
            run.write(sync=turn % 4 == 0, rotate=run.writer.segment_is_full)
            rotations += max(run.segments) > segment
            kept = dict(plain.steps)
            if rng.random() < 0.1:
                live(run, plain, rng)
                files.fail_write = FULL
                if (batch := run.batch()).body:
                    with pytest.raises(StorageFullError):
                        run.writer.write(batch)
                    failures += 1
                files.heal()
                recovered = run.writer.read_journal(POLICY, 0.0)
                assert recovered is not None
                run.queue, plain.steps = recovered.queue, kept
                run.queue.note_written(run.writer.output.written)
            if rng.random() < 0.1:
                run.close()
                run = Run(directory, run_epoch(directory) + 1, files)
                restarts += 1
            if turn % 6 == 0:
                assert_all_agree(run, plain)
        assert_all_agree(run, plain)
        steps += run.queue.counters.steps
        run.finish(*run.queue.items)
        for _ in range(3):
            run.write(sync=True)
        assert run.queue.steps.size == len(run.queue.steps) == len(run.index) == 0
        assert len(run.segments) == 1
        run.close()
        lives += 1
    print(f"{lives} lives, {steps} steps, {rotations} segments followed, {restarts} restarts,")
    print(f"{failures} failed writes")
    assert min(steps // 100, rotations // 10, restarts // 10, failures // 5) > 0


def run_epoch(directory: Path) -> int:
    return max(int(path.name[9:15]) for path in (directory / "journal").glob("*.journal"))
