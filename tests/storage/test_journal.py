"""The journal: what was acknowledged comes back, and damage is told from a torn end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from dispatcher.core.events import (
    Absolved,
    Counters,
    Ended,
    Finished,
    Issued,
    IssuedFresh,
    ItemState,
    LeaseEnded,
    LeaseState,
    Opened,
    QueueState,
    Tombstoned,
    Watched,
)
from dispatcher.errors import CorruptJournalError, StorageFullError, SyncFailedError
from dispatcher.storage.files import Files
from dispatcher.storage.journal import JOURNAL_DIR, Entry, Journal, last_epoch
from dispatcher.storage.records import (
    Checkpoint,
    Location,
    OutputPosition,
    Record,
    RunHeader,
    encode_records,
    payloads,
)
from tests.storage.broken_files import BROKEN, FULL, BrokenFiles

HEADER = RunHeader("run-1", 1, {"size": 12, "head": "00ff"}, {"max_retries": 3})
STATE = QueueState(
    first_open=2,
    next_work_id=5,
    next_offset=50,
    next_serial=9,
    counters=Counters(done=3, failed=1, tombstones={"blank_line": 1}),
    items=[
        ItemState(
            2,
            20,
            9,
            1,
            2,
            3,
            4,
            True,
            False,
            [LeaseState(8, "wörker", True, False)],
            [Ended(1, "w", "charged", 'it said "no"\n')],
        )
    ],
)
CHECKPOINT = Checkpoint(STATE, [OutputPosition(1, 40, 7), OutputPosition(2, 99, 0xDEADBEEF)])
FIRST_FRAME = encode_records(HEADER, CHECKPOINT)
RESULT = '{"text": "ä ] \\" \\n 😀"}'.encode()
EVENTS: list[Record] = [
    Opened(5, 50, [10, 7, 1]),
    Issued("a", True, False, 9, [5, 6]),
    IssuedFresh("b", False, 11, 8, 68, [10, 7]),
    Watched(5, 9),
    OutputPosition(3, 120, 1),
    Finished([5, 9], [9, 0], {"x": [9]}, [msgspec.Raw(RESULT), msgspec.Raw(b"[ ]")]),
    Tombstoned(6, "blank_line", msgspec.Raw(b'{"__ERROR__": {}}')),
    LeaseEnded(7, 10, "charged", "line one\nline two", 0),
    Absolved(7, "wörker"),
]


def start(directory: Path, files: Files | None = None) -> Journal:
    journal = Journal(directory, files or Files())
    journal.begin_segment(1, FIRST_FRAME)
    return journal


def append(journal: Journal, *records: Record) -> int:
    return journal.append(encode_records(*records))


def everything_in(journal: Journal) -> list[tuple[int, Entry]]:
    """Read all segments, oldest first; the last one first settles where the journal ends."""
    last = [(journal.current_segment, entry) for entry in journal.replay_last()]
    older = [(s.number, e) for s in journal.older_segments for e in journal.scan(s.number)]
    return older + last


def replayed(directory: Path, files: Files | None = None) -> list[Record]:
    return [entry.record for _, entry in everything_in(Journal(directory, files or Files()))]


def locations_in(journal: Journal) -> list[Location]:
    """Give the place of every result in the journal."""
    return [
        Location(number, offset, len(result))
        for number, entry in everything_in(journal)
        for _, offset, result in zip(*payloads(entry.record, entry.end), strict=True)
    ]


def results_of(records: list[Record]) -> list[int]:
    return [i for record in records if isinstance(record, Finished) for i in record.work_ids]


def finished(work_id: int) -> Finished:
    return Finished([work_id], [work_id + 1], {}, [msgspec.Raw(b'{"line": %d}' % work_id)])


def three_frames(directory: Path) -> tuple[Path, list[int]]:
    """Write three frames into one segment; return the file, and where each one ends."""
    journal = start(directory)
    ends = [journal.segment_bytes]
    for work_id in (1, 2):
        append(journal, Issued("a", False, False, work_id + 1, [work_id]), finished(work_id))
        ends.append(journal.segment_bytes)
    journal.close()
    (path,) = directory.glob("*.journal")
    assert path.stat().st_size == ends[-1]
    return path, ends


def test_every_kind_of_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    journal = start(tmp_path)
    append(journal, *EVENTS)
    journal.close()

    records = replayed(tmp_path)

    assert [encode_records(r) for r in records] == [
        encode_records(r) for r in [HEADER, CHECKPOINT, *EVENTS]
    ]
    assert records[0] == HEADER
    assert records[1] == CHECKPOINT


def test_frames_over_several_segments_come_back_in_order(tmp_path: Path) -> None:
    journal = start(tmp_path)
    for work_id in range(12):
        if work_id in (4, 8):
            journal.begin_segment(1, FIRST_FRAME)
        append(journal, Opened(work_id, 0, [1]), finished(work_id))
    assert journal.current_segment == 3
    journal.close()

    records = replayed(tmp_path)

    assert [r.work_id for r in records if isinstance(r, Opened)] == list(range(12))
    assert results_of(records) == list(range(12))
    assert sum(isinstance(record, RunHeader) for record in records) == 3
    places = locations_in(Journal(tmp_path, Files()))
    assert [place.segment for place in places] == [1] * 4 + [2] * 4 + [3] * 4


def test_the_location_of_a_result_gives_its_exact_bytes(tmp_path: Path) -> None:
    journal = start(tmp_path)
    append(journal, *EVENTS)
    journal.begin_segment(1, FIRST_FRAME)
    append(journal, Finished([8], [1], {"x": [8]}, [msgspec.Raw(b"[]")]), finished(9))
    journal.close()

    journal = Journal(tmp_path, Files())
    results = [journal.read(location) for location in locations_in(journal)]
    journal.close()

    assert results == [RESULT, b"[ ]", b'{"__ERROR__": {}}', b"[]", b'{"line": 9}']


def test_append_tells_where_the_records_begin(tmp_path: Path) -> None:
    journal = start(tmp_path)
    append(journal, Opened(1, 2, [3]))
    begin = append(journal, *EVENTS)
    size = journal.segment_bytes
    journal.close()
    (path,) = tmp_path.glob("*.journal")

    assert path.read_bytes()[begin:] == encode_records(*EVENTS)
    assert size == path.stat().st_size


def test_a_results_own_bytes_are_kept_however_the_worker_spaced_them(tmp_path: Path) -> None:
    spaced = [b'{ "a" :1.50,\t"b": [ ] , "u": "\\u00e4" }', b"1", b'"]],["']
    journal = start(tmp_path)
    append(journal, Finished([1, 3, 2], [1, 2, 3], {}, [msgspec.Raw(text) for text in spaced]))
    journal.close()
    journal = Journal(tmp_path, Files())
    assert [journal.read(location) for location in locations_in(journal)] == spaced
    journal.close()


def test_a_restarted_journal_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    for start_number in range(4):
        journal = Journal(tmp_path, Files())
        assert journal.is_empty == (start_number == 0)
        list(journal.replay_last())
        journal.begin_segment(start_number + 1, FIRST_FRAME)
        append(journal, finished(start_number))
        journal.close()

    assert results_of(replayed(tmp_path)) == [0, 1, 2, 3]


def test_a_frame_is_synced_before_append_returns(tmp_path: Path) -> None:
    files = BrokenFiles()
    journal = start(tmp_path, files)
    assert files.log[-1] == f"sync_dir {tmp_path.name}"
    files.log.clear()

    append(journal, finished(1))

    name = "00000001-000001.journal"
    assert files.log == [f"write {name}", f"sync {name}"]
    journal.close()


def test_what_a_dead_process_wrote_is_synced_before_the_journal_goes_on(tmp_path: Path) -> None:
    three_frames(tmp_path)
    files = BrokenFiles()

    replayed(tmp_path, files)

    assert files.log == ["sync 00000001-000001.journal"]


# -------------------------------------------------------------------- torn ends and damage


def test_a_last_frame_torn_at_any_byte_is_cut_off_and_the_rest_comes_back(tmp_path: Path) -> None:
    path, ends = three_frames(tmp_path)
    whole = path.read_bytes()
    first_frames = replayed(tmp_path)[:4]

    for length in range(ends[1], ends[2]):
        path.write_bytes(whole[:length])
        records = replayed(tmp_path)

        assert records == first_frames, length
        assert path.stat().st_size == ends[1], length


def test_the_journal_goes_on_after_a_torn_frame(tmp_path: Path) -> None:
    path, ends = three_frames(tmp_path)
    path.write_bytes(path.read_bytes()[: ends[2] - 1])
    journal = Journal(tmp_path, Files())
    list(journal.replay_last())

    journal.begin_segment(2, FIRST_FRAME)
    append(journal, finished(7))
    journal.close()

    assert results_of(replayed(tmp_path)) == [1, 7]


def test_a_torn_frame_is_set_aside_for_whoever_investigates(tmp_path: Path) -> None:
    path, ends = three_frames(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])

    replayed(tmp_path)

    assert path.with_suffix(".torn").read_bytes() == whole[ends[1] : -1]


def test_zeros_behind_the_last_frame_are_cut_off(tmp_path: Path) -> None:
    path, ends = three_frames(tmp_path)
    path.write_bytes(path.read_bytes() + bytes(5000))  # a file system extended the file first

    assert len(replayed(tmp_path)) == 6
    assert path.stat().st_size == ends[2]


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x01]) + data[at + 1 :]


def test_any_bit_flip_in_a_middle_frame_is_refused_with_file_and_offset(tmp_path: Path) -> None:
    path, ends = three_frames(tmp_path)
    whole = path.read_bytes()

    for at in range(ends[0], ends[1]):
        path.write_bytes(flipped(whole, at))
        with pytest.raises(CorruptJournalError) as caught:
            replayed(tmp_path)
        assert str(path) in str(caught.value)
        assert f"byte {ends[0]} " in str(caught.value)
        assert path.read_bytes() == flipped(whole, at)  # nothing was repaired away


def test_any_bit_flip_in_the_first_frame_is_refused(tmp_path: Path) -> None:
    path, ends = three_frames(tmp_path)
    whole = path.read_bytes()
    for at in range(0, ends[0], 3):
        path.write_bytes(flipped(whole, at))
        with pytest.raises(CorruptJournalError):
            replayed(tmp_path)


def test_any_bit_flip_in_the_last_frame_cuts_it_off(tmp_path: Path) -> None:
    path, ends = three_frames(tmp_path)
    whole = path.read_bytes()

    for at in range(ends[1], ends[2]):
        path.write_bytes(flipped(whole, at))
        assert len(replayed(tmp_path)) == 4, at
        assert path.stat().st_size == ends[1]


def test_a_missing_frame_in_the_middle_is_refused(tmp_path: Path) -> None:
    path, ends = three_frames(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: ends[0]] + whole[ends[1] :])
    with pytest.raises(CorruptJournalError):
        replayed(tmp_path)


def test_a_torn_end_of_a_segment_that_others_follow_is_refused(tmp_path: Path) -> None:
    journal = start(tmp_path)
    append(journal, finished(1))
    journal.begin_segment(1, FIRST_FRAME)
    append(journal, finished(2))
    journal.close()
    first = min(tmp_path.glob("*.journal"))
    torn = first.read_bytes()[:-1]
    first.write_bytes(torn)

    with pytest.raises(CorruptJournalError):
        replayed(tmp_path)
    assert first.read_bytes() == torn


def test_a_segment_of_another_run_with_the_same_numbers_is_refused(tmp_path: Path) -> None:
    for name, work_id in (("mine", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        journal = start(tmp_path / name)
        append(journal, finished(work_id))
        journal.begin_segment(1, FIRST_FRAME)
        journal.close()
    second = "00000002-000001.journal"
    (tmp_path / "mine" / second).write_bytes((tmp_path / "other" / second).read_bytes())

    with pytest.raises(CorruptJournalError):
        replayed(tmp_path / "mine")


def test_segments_before_a_missing_one_were_being_deleted_and_do_not_count(
    tmp_path: Path,
) -> None:
    journal = start(tmp_path)
    for work_id in range(3):
        append(journal, finished(work_id))
        journal.begin_segment(1, FIRST_FRAME)
    append(journal, finished(3))
    journal.close()
    (tmp_path / "00000002-000001.journal").unlink()

    journal = Journal(tmp_path, Files())

    assert results_of([entry.record for _, entry in everything_in(journal)]) == [2, 3]
    assert [segment.number for segment in journal.older_segments] == [3]


def test_a_record_of_a_newer_version_is_refused_and_kept(tmp_path: Path) -> None:
    journal = start(tmp_path)
    journal.append(b'["gateway",1,2]\n')
    journal.close()
    (path,) = tmp_path.glob("*.journal")
    before = path.read_bytes()

    with pytest.raises(CorruptJournalError, match="version"):
        replayed(tmp_path)

    assert path.read_bytes() == before


def torn_starts(frame: bytes) -> Iterator[bytes]:
    yield b""
    yield frame[:20]
    yield frame[:43]
    yield frame[:-1]


@pytest.mark.parametrize("number", range(4))
def test_when_the_first_frame_of_a_segment_is_torn_the_segment_before_goes_on(
    tmp_path: Path, number: int
) -> None:
    journal = start(tmp_path)
    append(journal, finished(1))
    journal.begin_segment(1, FIRST_FRAME)
    journal.close()
    _, second = sorted(tmp_path.glob("*.journal"))
    second.write_bytes(list(torn_starts(second.read_bytes()))[number])

    journal = Journal(tmp_path, Files())
    assert len(list(journal.replay_last())) == 3
    assert journal.current_segment == 1
    assert not second.exists()
    journal.begin_segment(1, FIRST_FRAME)
    append(journal, finished(2))
    journal.close()

    assert results_of(replayed(tmp_path)) == [1, 2]


# -------------------------------------------------------------------- older segments


def two_segments(directory: Path, *, epoch: int = 1) -> tuple[Path, Path]:
    """Write two frames each into two segments, the second one for this epoch."""
    journal = start(directory)
    append(journal, finished(0))
    append(journal, finished(1))
    journal.begin_segment(epoch, FIRST_FRAME)
    append(journal, finished(2))
    journal.close()
    first, second = sorted(directory.glob("*.journal"))
    return first, second


def test_a_restart_reads_the_last_segment_only(tmp_path: Path) -> None:
    first, _ = two_segments(tmp_path)
    first.write_bytes(b"nothing of a journal")
    journal = Journal(tmp_path, Files())

    assert results_of([entry.record for entry in journal.replay_last()]) == [2]

    assert [segment.number for segment in journal.older_segments] == [1]


def test_a_damaged_older_segment_is_refused_before_the_first_of_its_bytes_is_used(
    tmp_path: Path,
) -> None:
    first, _ = two_segments(tmp_path)
    places = locations_in(Journal(tmp_path, Files()))
    whole = first.read_bytes()

    for at in range(len(whole)):  # also where the result itself is whole
        first.write_bytes(flipped(whole, at))
        journal = Journal(tmp_path, Files())
        list(journal.replay_last())
        with pytest.raises(CorruptJournalError, match=first.name):
            journal.read(places[0])
        journal.close()


def test_an_older_segment_that_lost_its_last_frame_is_refused(tmp_path: Path) -> None:
    first, _ = two_segments(tmp_path)
    places = locations_in(Journal(tmp_path, Files()))
    whole = first.read_bytes()
    first.write_bytes(whole[: whole.index(b"@000000000003")])
    journal = Journal(tmp_path, Files())
    list(journal.replay_last())

    with pytest.raises(CorruptJournalError, match="its end is missing"):
        journal.read(places[0])


def test_an_older_segment_that_is_missing_is_named(tmp_path: Path) -> None:
    first, _ = two_segments(tmp_path)
    places = locations_in(Journal(tmp_path, Files()))
    journal = Journal(tmp_path, Files())
    list(journal.replay_last())
    first.unlink()

    with pytest.raises(CorruptJournalError, match=f"{first.name} is missing"):
        journal.read(places[0])
    with pytest.raises(CorruptJournalError, match=first.name):
        journal.size_of(1)


@pytest.mark.parametrize("fault", ["fail_read", "fail_reopen"])
def test_a_segment_that_cannot_be_read_is_named(tmp_path: Path, fault: str) -> None:
    first, second = two_segments(tmp_path)
    before = second.read_bytes()
    files = BrokenFiles()
    journal = Journal(tmp_path, files)
    setattr(files, fault, BROKEN)

    with pytest.raises(CorruptJournalError, match=second.name):
        list(journal.replay_last())
    with pytest.raises(CorruptJournalError, match=first.name):
        list(journal.scan(1))

    assert second.read_bytes() == before


def test_the_last_epoch_is_that_of_the_newest_start_that_wrote_a_segment(tmp_path: Path) -> None:
    directory = tmp_path / JOURNAL_DIR
    assert last_epoch(tmp_path, Files()) == 0
    directory.mkdir()
    assert last_epoch(tmp_path, Files()) == 0
    two_segments(directory, epoch=7)
    assert last_epoch(tmp_path, Files()) == 7


# -------------------------------------------------------------------- two servers


def test_frames_that_a_server_wrote_after_another_one_took_over_do_not_count(
    tmp_path: Path,
) -> None:
    loser = start(tmp_path)
    append(loser, finished(1))
    winner = Journal(tmp_path, Files())
    list(winner.replay_last())
    winner.begin_segment(2, FIRST_FRAME)
    append(winner, finished(2))
    append(loser, finished(3))  # it does not know yet, and acknowledges nothing
    loser.close()
    winner.close()

    assert results_of(replayed(tmp_path)) == [1, 2]


def test_frames_behind_the_place_where_the_same_server_went_on_are_damage(tmp_path: Path) -> None:
    first, _ = two_segments(tmp_path, epoch=1)
    with first.open("ab") as file:
        file.write(first.read_bytes())
    with pytest.raises(CorruptJournalError, match="more than was written"):
        replayed(tmp_path)


def test_a_segment_that_the_loser_began_at_the_same_number_does_not_count(tmp_path: Path) -> None:
    loser = start(tmp_path)
    append(loser, finished(1))
    winner = Journal(tmp_path, Files())
    list(winner.replay_last())
    winner.begin_segment(2, FIRST_FRAME)
    append(winner, finished(2))
    loser.begin_segment(1, FIRST_FRAME)
    append(loser, finished(3))
    loser.close()
    winner.close()

    assert results_of(replayed(tmp_path)) == [1, 2]


def test_segments_that_the_loser_began_behind_those_of_the_winner_do_not_count(
    tmp_path: Path,
) -> None:
    loser = start(tmp_path)
    append(loser, finished(1))
    winner = Journal(tmp_path, Files())
    list(winner.replay_last())
    winner.begin_segment(2, FIRST_FRAME)
    append(winner, finished(2))
    for work_id in (3, 4):
        loser.begin_segment(1, FIRST_FRAME)
        append(loser, finished(work_id))
    loser.close()
    assert len(list(tmp_path.glob("*.journal"))) == 4

    assert results_of(replayed(tmp_path)) == [1, 2]
    winner.begin_segment(2, FIRST_FRAME)  # at the number of the loser's last one
    append(winner, finished(5))
    winner.close()

    assert results_of(replayed(tmp_path)) == [1, 2, 5]


def test_after_a_winner_that_died_in_its_first_frame_the_loser_still_does_not_count(
    tmp_path: Path,
) -> None:
    loser = start(tmp_path)
    append(loser, finished(1))
    (tmp_path / "00000002-000002.journal").write_bytes(b"@0000000")
    loser.begin_segment(1, FIRST_FRAME)
    append(loser, finished(2))
    loser.close()

    journal = Journal(tmp_path, Files())
    assert results_of([entry.record for entry in journal.replay_last()]) == [1]
    journal.begin_segment(3, FIRST_FRAME)
    append(journal, finished(3))
    journal.close()

    assert results_of(replayed(tmp_path)) == [1, 3]


# -------------------------------------------------------------------- failing disks


@pytest.mark.parametrize("error", [FULL, BROKEN])
def test_a_failed_write_leaves_the_file_as_it_was_and_the_next_one_succeeds(
    tmp_path: Path, error: int
) -> None:
    files = BrokenFiles()
    journal = start(tmp_path, files)
    append(journal, finished(1))
    (path,) = tmp_path.glob("*.journal")
    before = path.read_bytes()

    files.fail_write = error
    for _ in range(2):
        with pytest.raises(StorageFullError, match=r"\.journal"):
            append(journal, finished(2))
        assert path.read_bytes() == before
    files.heal()
    append(journal, finished(3))
    journal.close()

    assert results_of(replayed(tmp_path)) == [1, 3]


def test_after_a_failed_write_the_living_journal_can_be_replayed_and_goes_on(
    tmp_path: Path,
) -> None:
    files = BrokenFiles()
    journal = start(tmp_path, files)
    append(journal, finished(1))
    files.fail_write = FULL
    with pytest.raises(StorageFullError):
        append(journal, finished(2))
    files.heal()

    assert len(list(journal.replay_last())) == 3
    append(journal, finished(3))
    journal.close()

    assert results_of(replayed(tmp_path)) == [1, 3]


def test_a_failed_write_that_cannot_be_undone_is_a_sync_failure(tmp_path: Path) -> None:
    files = BrokenFiles()
    journal = start(tmp_path, files)
    files.fail_write, files.fail_truncate = FULL, BROKEN
    with pytest.raises(SyncFailedError):
        append(journal, finished(1))
    journal.close()


def test_a_failed_sync_is_told_and_not_tried_again(tmp_path: Path) -> None:
    files = BrokenFiles()
    journal = start(tmp_path, files)
    files.fail_sync = BROKEN
    files.log.clear()

    with pytest.raises(SyncFailedError, match="what is on disk is unknown"):
        append(journal, finished(1))

    assert [line.split()[0] for line in files.log] == ["write", "sync"]
    journal.close()


@pytest.mark.parametrize("fault", ["fail_write", "fail_open"])
def test_a_segment_that_cannot_be_begun_leaves_the_old_one_current(
    tmp_path: Path, fault: str
) -> None:
    files = BrokenFiles()
    journal = start(tmp_path, files)
    append(journal, finished(1))
    setattr(files, fault, FULL)
    with pytest.raises(StorageFullError):
        journal.begin_segment(1, FIRST_FRAME)
    files.heal()

    assert len(list(tmp_path.glob("*.journal"))) == 1
    append(journal, finished(2))
    journal.begin_segment(1, FIRST_FRAME)
    append(journal, finished(3))
    journal.close()

    assert results_of(replayed(tmp_path)) == [1, 2, 3]


@pytest.mark.parametrize("fault", ["fail_sync", "fail_sync_dir"])
def test_a_segment_whose_first_sync_fails_is_a_sync_failure(tmp_path: Path, fault: str) -> None:
    files = BrokenFiles()
    journal = start(tmp_path, files)
    setattr(files, fault, BROKEN)
    with pytest.raises(SyncFailedError):
        journal.begin_segment(1, FIRST_FRAME)
    journal.close()


# -------------------------------------------------------------------- dropping


def test_dropped_segments_are_gone_and_the_rest_replays(tmp_path: Path) -> None:
    journal = start(tmp_path)
    append(journal, finished(1))
    for work_id in (2, 3):
        journal.begin_segment(1, FIRST_FRAME)
        append(journal, finished(work_id))

    journal.drop_before(2)
    assert len(list(tmp_path.glob("*.journal"))) == 2
    journal.drop_before(2)  # nothing more to drop
    append(journal, finished(4))
    journal.close()

    assert results_of(replayed(tmp_path)) == [2, 3, 4]


def test_more_segments_than_readers_are_kept_can_be_read(tmp_path: Path) -> None:
    journal = start(tmp_path)
    for work_id in range(40):
        journal.begin_segment(1, FIRST_FRAME)
        append(journal, finished(work_id))
    journal.close()

    journal = Journal(tmp_path, Files())
    places = locations_in(journal)
    assert [journal.read(p) for p in places + places[::-1]] == [
        b'{"line": %d}' % n for n in [*range(40), *reversed(range(40))]
    ]
    journal.close()


def test_other_files_in_the_directory_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.journal").write_text("mine")
    (tmp_path / "00000001-000001.torn").write_text("old")
    journal = start(tmp_path)
    append(journal, finished(1))
    journal.close()
    assert len(replayed(tmp_path)) == 3
    assert (tmp_path / "notes.journal").read_text() == "mine"
