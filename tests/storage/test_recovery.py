"""From the journal back to a run, and which segments a run still needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from dispatcher.core.events import Opened
from dispatcher.core.work_queue import QueuePolicy, WorkQueue
from dispatcher.core.workers import PROGRESS_UNKNOWN
from dispatcher.errors import CorruptJournalError, DispatcherError, StateError
from dispatcher.storage import writer as writer_module
from dispatcher.storage.files import Files
from dispatcher.storage.journal import Journal
from dispatcher.storage.records import OutputPosition, RunHeader, encode_records
from dispatcher.storage.recovery import Recovered, Retention, recover
from dispatcher.storage.writer import Batch, RunWriter
from tests.storage.broken_files import BROKEN, FULL, BrokenFiles
from tests.support.queues import arrivals

POLICY = QueuePolicy()
HEADER = RunHeader("run-1", 1, {"size": 1}, {})


class Run:
    """A writer and its queue, driven by hand as the service drives them."""

    def __init__(self, directory: Path, epoch: int = 1, files: Files | None = None) -> None:
        self.journal_dir = directory / "journal"
        self.journal_dir.mkdir(exist_ok=True)
        self.outfile = directory / "out.jsonl"
        self.writer = RunWriter(self.journal_dir, self.outfile, files or Files())
        self.queue = WorkQueue(POLICY)
        if recovered := self.writer.read_journal(POLICY, now=0.0):
            self.queue = recovered.queue
        header = RunHeader("run-1", epoch, {"size": 1}, {})
        self.writer.begin(header, self.queue.checkpoint(), recovered)

    def open_lines(self, count: int) -> None:
        self.queue.open_lines(self.queue.next_offset, [10] * count)

    def finish(self, *work_ids: int) -> None:
        self.queue.finish_all(arrivals(*((i, None, line(i), "") for i in work_ids)), now=0.0)

    def write(self, *, sync_output: bool = False) -> None:
        """Write what queued; a full segment is followed by another one."""
        batch = Batch()
        for event in self.queue.take_events():
            batch.add(event)
        batch.prefix = self.queue.first_open
        batch.state = self.queue.checkpoint() if self.writer.segment_is_full else None
        batch.sync_output = sync_output or batch.state is not None
        self.writer.write(batch)

    def segments(self) -> list[int]:
        return sorted(int(path.name[:8]) for path in self.journal_dir.glob("*.journal"))

    def output(self) -> list[bytes]:
        return self.outfile.read_bytes().splitlines()


def line(work_id: int) -> bytes:
    return b'{"line": %d}' % work_id


def recovered(run: Run) -> Recovered:
    state = recover(Journal(run.journal_dir, Files()), POLICY, 5.0, Files())
    assert state is not None
    return state


def test_a_recovered_queue_is_the_one_that_wrote_the_journal(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.open_lines(4)
    (first, second) = run.queue.lease_ready("a", 2, now=0.0)
    run.queue.release(first.work_id, 1, charge=True, reason="x", keep_yields=None, now=0.0)
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
    assert recover(journal, POLICY, 0.0, Files()) is None
    journal.begin_segment(1, encode_records(HEADER))
    journal.append(encode_records(Opened(0, 0, [1])))
    journal.close()
    with pytest.raises(CorruptJournalError, match="holds no run"):
        recover(Journal(tmp_path, Files()), POLICY, 0.0, Files())


def test_results_that_wait_behind_an_open_line_reach_the_output_after_a_restart(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path)
    run.open_lines(5)
    for work_id in (4, 1, 2):
        run.finish(work_id)
    run.write(sync_output=True)
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


def test_the_output_is_cut_to_its_position_and_written_again_from_the_journal(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path)
    run.open_lines(6)
    run.finish(0)
    run.write()
    run.write(sync_output=True)
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


def test_the_output_is_synced_before_a_position_that_names_it_is_written(
    tmp_path: Path,
) -> None:
    files = BrokenFiles()
    run = Run(tmp_path, files=files)
    run.open_lines(1)
    run.finish(0)
    run.write()
    files.log.clear()

    run.write(sync_output=True)
    run.writer.close()

    journal = "00000001-000001.journal"
    assert files.log == ["sync out.jsonl", f"write {journal}", f"sync {journal}"]


def test_an_output_lost_after_its_last_position_is_written_again_from_the_one_before(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path)
    run.open_lines(4)
    for work_id in range(3):
        run.finish(work_id)
        run.write()
        run.write(sync_output=True)
    run.writer.close()
    run.outfile.write_bytes(run.outfile.read_bytes()[:-1])  # shorter than the last position

    run = Run(tmp_path, epoch=2)
    assert run.output() == [line(0), line(1)]
    run.write()
    run.writer.close()
    assert run.output() == [line(0), line(1), line(2)]


def test_an_output_shorter_than_both_positions_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.open_lines(4)
    for work_id in range(3):
        run.finish(work_id)
        run.write()
        run.write(sync_output=True)
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


def test_a_full_segment_is_followed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "SEGMENT_BYTES", 2000)
    run = Run(tmp_path)
    run.open_lines(300)
    run.finish(*range(1, 300))
    run.write()
    assert run.segments() == [1]
    run.write()
    assert run.segments() == [1, 2]
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
        run.write(sync_output=work_id % 10 == 9)
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
        run.write(sync_output=True)
    assert run.segments()[0] == 1
    run.writer.close()

    run = Run(tmp_path, epoch=2)
    run.finish(0)
    run.write(sync_output=True)
    for _ in range(3):
        run.write(sync_output=True)
    assert run.output() == [line(n) for n in range(60)]
    assert run.segments()[0] > 1
    run.writer.close()


def test_many_results_fill_a_segment_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "SEGMENT_RESULTS", 5)
    run = Run(tmp_path)
    run.open_lines(9)
    run.finish(*range(1, 7))
    run.write()
    run.write()
    assert run.segments() == [1, 2]
    run.finish(7)
    run.write()
    run.write()
    assert run.segments() == [1, 2]  # counted anew in each segment
    run.writer.close()


def runs_over_three_segments(
    directory: Path, monkeypatch: pytest.MonkeyPatch, files: Files | None = None
) -> Run:
    """Finish lines over three segments; the output's last two positions are 4 and 8 of 12."""
    monkeypatch.setattr(writer_module, "SEGMENT_RESULTS", 0)
    run = Run(directory, files=files)
    run.open_lines(12)
    for first in (0, 4):
        run.finish(first + 2, first + 1, first)
        run.finish(first + 3)
        run.write()
        run.write(sync_output=True)
    run.finish(8, 9, 10)
    run.write()
    monkeypatch.setattr(writer_module, "SEGMENT_RESULTS", 1000)
    return run


def test_an_output_that_lost_its_end_is_written_again_from_older_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs_over_three_segments(tmp_path, monkeypatch)
    run.writer.close()
    whole = run.output()
    run.outfile.write_bytes(b"\n".join(whole[:6]) + b"\n")

    run = Run(tmp_path, epoch=2)
    assert run.output() == whole[:4]
    run.write()
    run.writer.close()

    assert run.output() == whole == [line(n) for n in range(11)]


def test_a_start_that_took_the_output_back_may_be_killed_before_it_caught_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs_over_three_segments(tmp_path, monkeypatch)
    run.writer.close()
    whole = run.output()
    run.outfile.write_bytes(b"\n".join(whole[:6]) + b"\n")

    Run(tmp_path, epoch=2).writer.close()
    run = Run(tmp_path, epoch=3)
    run.write()
    run.writer.close()

    assert run.output() == whole


def test_a_segment_that_cannot_be_begun_leaves_the_old_one_which_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "SEGMENT_RESULTS", 8)
    files = BrokenFiles()
    run = Run(tmp_path, files=files)
    run.open_lines(30)
    run.finish(*range(1, 12))
    run.write()

    files.fail_open, files.only = FULL, ".journal"
    run.write(sync_output=True)
    run.finish(*range(12, 20))
    run.write()
    assert run.segments() == [1]
    files.heal()
    run.write()
    assert run.segments() == [1, 2]
    run.finish(0, *range(20, 25))
    run.write()
    run.writer.close()
    assert run.output() == [line(n) for n in range(25)]

    run.outfile.write_bytes(b"")
    run = Run(tmp_path, epoch=2)
    run.finish(*range(25, 30))
    run.write()
    run.writer.close()
    assert run.output() == [line(n) for n in range(30)]


def test_after_a_segment_that_could_not_be_begun_it_is_not_tried_at_every_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "SEGMENT_RESULTS", 80)
    files = BrokenFiles()
    run = Run(tmp_path, files=files)
    run.open_lines(200)
    run.finish(*range(1, 90))
    run.write()
    assert run.writer.segment_is_full
    files.fail_open, files.only = FULL, ".journal"

    run.write()
    assert not run.writer.segment_is_full
    run.finish(*range(90, 100))
    run.write()
    assert run.writer.segment_is_full
    run.writer.close()


def test_places_saved_before_a_rotation_that_failed_are_not_taken_for_the_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "SEGMENT_RESULTS", 80)
    files = BrokenFiles()
    run = Run(tmp_path, files=files)
    run.open_lines(101)
    run.finish(*range(1, 90))
    run.write()
    files.fail_open, files.only = FULL, ".journal"
    run.write()  # the places were saved, but the next segment could not be begun
    run.finish(*range(90, 100))
    run.write()
    files.fail_open, files.only = FULL, ".waiting"
    run.write()  # and now the other way round
    assert run.segments() == [1, 2]
    run.writer.close()

    run = Run(tmp_path, epoch=2)
    run.finish(0)
    run.write()
    run.writer.close()

    assert run.output() == [line(n) for n in range(100)]


@pytest.mark.parametrize("fault", ["fail_read", "fail_reopen"])
def test_a_waiting_result_that_cannot_be_read_is_written_when_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(writer_module, "SEGMENT_RESULTS", 3)
    files = BrokenFiles()
    run = Run(tmp_path, files=files)
    run.open_lines(6)
    run.finish(1, 2, 3, 4)
    run.write()
    run.write()
    assert run.segments() == [1, 2]
    setattr(files, fault, BROKEN)

    run.finish(0)
    for _ in range(2):
        run.write()
    assert "Input/output error" in (run.writer.output_error or "")
    assert run.output() == [line(0)]  # what could be read
    files.heal()
    run.write()

    assert run.writer.output_error is None
    assert run.output() == [line(n) for n in range(5)]
    run.writer.close()


def test_an_older_segment_that_cannot_be_read_at_the_start_is_named_and_nothing_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "SEGMENT_RESULTS", 3)
    run = Run(tmp_path)
    run.open_lines(6)
    run.finish(1, 2, 3, 4)
    run.write()
    run.write()
    run.writer.close()
    (run.journal_dir / "00000001-000001.waiting").unlink()
    files = BrokenFiles()
    files.fail_reopen, files.only = BROKEN, "00000001-000001.journal"

    with pytest.raises(DispatcherError, match=r"00000001-000001\.journal"):
        Run(tmp_path, epoch=2, files=files)

    run = Run(tmp_path, epoch=2)
    run.finish(0)
    run.write()
    run.writer.close()
    assert run.output() == [line(n) for n in range(5)]


@pytest.mark.parametrize("number", [2, 3])
def test_a_start_without_a_segment_that_it_needs_is_refused_and_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(writer_module, "SEGMENT_RESULTS", 0)
    run = Run(tmp_path)
    run.open_lines(5)
    for work_id in (0, 2, 3):
        run.finish(work_id)
        run.write()
        run.write(sync_output=True)
    monkeypatch.setattr(writer_module, "SEGMENT_RESULTS", 1000)
    run.finish(1)
    run.write()
    run.writer.close()
    assert run.output() == [line(n) for n in range(4)]  # further than its last position
    assert run.segments() == [2, 3, 4]
    path = run.journal_dir / f"{number:08d}-000001.journal"
    segment, before = path.read_bytes(), run.outfile.read_bytes()
    path.unlink()
    names = sorted(run.journal_dir.iterdir())

    with pytest.raises(CorruptJournalError, match="one is missing"):
        Run(tmp_path, epoch=2)

    assert run.outfile.read_bytes() == before
    assert sorted(run.journal_dir.iterdir()) == names
    path.write_bytes(segment)
    run = Run(tmp_path, epoch=2)
    run.finish(4)
    run.write()
    run.writer.close()
    assert run.output() == [line(n) for n in range(5)]


def test_retention_needs_what_was_not_safely_written_at_the_older_of_two_positions() -> None:
    retention = Retention()
    assert retention.first_needed(current=1) == 1
    for segment, last in ((1, 4), (2, 9), (3, 30)):
        retention.note_result(segment, last)
    retention.note_result(2, 6)  # results come in any order
    for lines in (3, 5, 10):
        retention.note_position(OutputPosition(lines, lines * 10, 0))

    assert retention.safe_lines == 5
    assert retention.newest_first() == [OutputPosition(10, 100, 0), OutputPosition(5, 50, 0)]
    assert retention.first_needed(current=4) == 2
    retention.note_position(OutputPosition(12, 120, 0))
    assert retention.first_needed(current=4) == 3
    retention.note_position(OutputPosition(31, 310, 0))
    retention.note_position(OutputPosition(31, 310, 0))
    assert retention.first_needed(current=4) == 4
