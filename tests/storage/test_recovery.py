"""From the journal back to a run, and which segments a run still needs."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from dispatcher.core.events import Finished, Opened, Tombstoned
from dispatcher.core.work_queue import QueuePolicy, WorkQueue
from dispatcher.core.workers import PROGRESS_UNKNOWN
from dispatcher.errors import CorruptJournalError, StateError
from dispatcher.storage import writer as writer_module
from dispatcher.storage.files import Files
from dispatcher.storage.journal import Checkpoint, Journal, RunHeader, encode_record
from dispatcher.storage.recovery import Recovered, Retention, recover
from dispatcher.storage.writer import Batch, RunWriter
from tests.storage.broken_files import BrokenFiles

POLICY = QueuePolicy()
HEADER = RunHeader("run-1", 1, {"size": 1}, {})


class Run:
    """A writer and its queue, driven by hand."""

    def __init__(self, directory: Path, epoch: int = 1, files: Files | None = None) -> None:
        self.journal_dir = directory / "journal"
        self.journal_dir.mkdir(exist_ok=True)
        self.outfile = directory / "out.jsonl"
        self.writer = RunWriter(self.journal_dir, self.outfile, files or Files())
        self.queue = WorkQueue(POLICY)
        if recovered := self.writer.read_journal(POLICY, now=0.0):
            self.queue = recovered.queue
        self.writer.begin(RunHeader("run-1", epoch, {"size": 1}, {}), self.queue.checkpoint())

    def open_lines(self, count: int) -> None:
        for _ in range(count):
            self.queue.open_line(self.queue.next_offset, self.queue.next_offset + 10)

    def finish(self, work_id: int, result: bytes | None = None) -> None:
        result = b'{"line": %d}' % work_id if result is None else result
        self.queue.finish(work_id, None, result, failed=False, now=0.0)

    def write(self, *, checkpoint: bool = False) -> None:
        batch = Batch()
        for event in self.queue.take_events():
            if isinstance(event, Finished | Tombstoned):
                batch.add_result(encode_record(event), event.work_id, bytes(event.result))
            else:
                batch.add(encode_record(event))
        batch.prefix = self.queue.first_open
        batch.state = self.queue.checkpoint() if checkpoint else None
        self.writer.write(batch)

    def segments(self) -> list[int]:
        return sorted(int(path.name[:8]) for path in self.journal_dir.glob("*.journal"))

    def output(self) -> list[bytes]:
        return self.outfile.read_bytes().splitlines()


def line(work_id: int) -> bytes:
    return b'{"line": %d}' % work_id


def recovered(run: Run) -> Recovered:
    return recover(Journal(run.journal_dir, Files()), POLICY, now=5.0)


def test_a_recovered_queue_is_the_one_that_wrote_the_journal(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.open_lines(4)
    (first, second) = run.queue.lease_ready("a", 2, now=0.0)
    run.queue.release(first.work_id, 1, charge=True, reason="x", keep_steps=True, now=0.0)
    run.finish(2)
    run.write()
    run.writer.close()

    state = recovered(run)

    assert state.queue.checkpoint() == run.queue.checkpoint()
    assert state.header.run_id == "run-1"
    (lease,) = state.queue.leases.values()
    assert (lease.work_id, lease.progress) == (second.work_id, PROGRESS_UNKNOWN)
    assert (lease.issued_at, lease.progressed_at) == (5.0, 5.0)  # a fresh term


def test_a_journal_without_a_checkpoint_holds_no_run(tmp_path: Path) -> None:
    journal = Journal(tmp_path, Files())
    assert recover(journal, POLICY, now=0.0) is None
    journal.begin_segment(1, [encode_record(HEADER)])
    journal.append([encode_record(Opened(0, 0, 1))])
    journal.close()
    with pytest.raises(CorruptJournalError, match="holds no run"):
        recover(Journal(tmp_path, Files()), POLICY, now=0.0)


def test_results_that_wait_behind_an_open_line_reach_the_output_after_a_restart(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path)
    run.open_lines(5)
    for work_id in (4, 1, 2):
        run.finish(work_id)
    run.write(checkpoint=True)
    assert run.output() == []
    run.writer.close()

    run = Run(tmp_path, epoch=2)
    run.finish(0)
    run.write()
    assert run.output() == [line(0), line(1), line(2)]
    run.finish(3)
    run.write()
    run.writer.close()

    assert run.output() == [line(n) for n in range(5)]


def test_the_output_is_cut_to_its_checkpoint_and_written_again_from_the_journal(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path)
    run.open_lines(6)
    run.finish(0)
    run.write()
    run.write(checkpoint=True)
    for work_id in (1, 2, 3):
        run.finish(work_id)
    run.write()
    run.writer.close()
    whole = run.outfile.read_bytes()
    run.outfile.write_bytes(whole[:-7] + b"garbage of a torn write")

    run = Run(tmp_path, epoch=2)
    assert run.output() == [line(0)]
    run.write()
    run.writer.close()

    assert run.outfile.read_bytes() == whole


def test_the_output_is_synced_before_a_checkpoint_that_names_it_is_written(
    tmp_path: Path,
) -> None:
    files = BrokenFiles()
    run = Run(tmp_path, files=files)
    run.open_lines(1)
    run.finish(0)
    run.write()
    files.log.clear()

    run.write(checkpoint=True)
    run.writer.close()

    journal = "00000001-000001.journal"
    assert files.log == ["sync out.jsonl", f"write {journal}", f"sync {journal}"]


def test_an_output_lost_after_the_last_checkpoint_is_written_again_from_the_one_before(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path)
    run.open_lines(4)
    for work_id in range(3):
        run.finish(work_id)
        run.write()
        run.write(checkpoint=True)
    run.writer.close()
    run.outfile.write_bytes(run.outfile.read_bytes()[:-1])  # shorter than the last checkpoint

    run = Run(tmp_path, epoch=2)
    assert run.output() == [line(0), line(1)]
    run.write()
    run.writer.close()
    assert run.output() == [line(0), line(1), line(2)]


def test_an_output_shorter_than_both_checkpoints_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.open_lines(4)
    for work_id in range(3):
        run.finish(work_id)
        run.write()
        run.write(checkpoint=True)
    run.writer.close()
    run.outfile.write_bytes(b"")

    with pytest.raises(StateError, match="is not what this run wrote"):
        Run(tmp_path, epoch=2)


def test_a_late_result_that_beat_a_tombstone_is_the_one_in_the_output(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.open_lines(2)
    run.queue.tombstone(1, "max_retries_exceeded", b'{"__ERROR__": {}}', now=0.0)
    run.write()
    run.finish(1)
    run.write()
    run.writer.close()

    run = Run(tmp_path, epoch=2)
    run.finish(0)
    run.write()
    run.writer.close()

    assert run.output() == [line(0), line(1)]


# -------------------------------------------------------------------- segments


def test_a_full_segment_is_followed_by_another_at_the_next_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "SEGMENT_BYTES", 2000)
    run = Run(tmp_path)
    run.open_lines(100)
    run.write()
    assert run.segments() == [1]
    run.write(checkpoint=True)
    assert 2 in run.segments()
    run.writer.close()
    assert recovered(run).queue.checkpoint() == run.queue.checkpoint()


def test_a_long_run_keeps_only_the_segments_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "SEGMENT_BYTES", 2000)
    run = Run(tmp_path)
    most = 0
    for work_id in range(400):
        run.open_lines(1)
        run.finish(work_id)
        run.write(checkpoint=work_id % 10 == 9)
        most = max(most, len(run.segments()))
    assert run.segments()[0] > 10
    assert most <= 4
    run.writer.close()

    run = Run(tmp_path, epoch=2)
    run.write()
    run.writer.close()
    assert run.output() == [line(n) for n in range(400)]


def test_a_segment_stays_while_a_result_in_it_waits_for_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "SEGMENT_BYTES", 500)
    run = Run(tmp_path)
    run.open_lines(60)
    for work_id in range(1, 60):
        run.finish(work_id)
        run.write(checkpoint=True)
    assert run.segments()[0] == 1
    run.writer.close()

    run = Run(tmp_path, epoch=2)
    run.finish(0)
    run.write(checkpoint=True)
    for _ in range(3):
        run.write(checkpoint=True)
    assert run.output() == [line(n) for n in range(60)]
    assert run.segments()[0] > 1
    run.writer.close()


def test_retention_needs_the_older_of_the_last_two_checkpoints_and_waiting_results() -> None:
    def checkpoint(written: int) -> Checkpoint:
        return Checkpoint(WorkQueue(POLICY).checkpoint(), written, written * 10, 0)

    retention = Retention()
    for segment, written in ((1, 0), (2, 5), (3, 10)):
        retention.note_checkpoint(segment, checkpoint(written))
    retention.note_result(1, 4)
    assert retention.first_needed() == 2
    retention.note_result(1, 7)
    retention.note_result(1, 3)
    assert retention.first_needed() == 1
    retention.note_checkpoint(4, checkpoint(12))
    assert retention.first_needed() == 3
    assert [c.written for c in retention.newest_first()] == [12, 10]


def test_records_carry_a_result_as_the_workers_own_bytes() -> None:
    raw = b'{"a":  1}'
    record = encode_record(Finished(1, 2, False, msgspec.Raw(raw)))
    assert record.endswith(raw + b"]")
