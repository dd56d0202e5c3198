"""The ordered output, and where the results that must wait are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from dispatcher.core.events import Counters, QueueState
from dispatcher.errors import StateError, StorageError, SyncFailedError
from dispatcher.storage.files import Files
from dispatcher.storage.journal import Checkpoint, Location
from dispatcher.storage.output import OrderedOutput, WaitingIndex
from tests.storage.broken_files import BROKEN, FULL, BrokenFiles


def output_of(directory: Path, files: Files | None = None) -> OrderedOutput:
    return OrderedOutput(directory / "out.jsonl", files or Files())


def checkpoint_of(output: OrderedOutput) -> Checkpoint:
    state = QueueState(output.written, output.written, 0, 1, Counters(), [])
    return Checkpoint(state, output.written, output.size_bytes, output.tail_crc)


def written_in_two_steps(directory: Path, lines: int = 3) -> tuple[Checkpoint, Checkpoint]:
    """Write lines, a checkpoint, more lines, a checkpoint, and lines after it."""
    output = output_of(directory)
    output.open([])
    checkpoints = []
    for step in range(2):
        output.append([b'{"step": %d, "line": %d}' % (step, n) for n in range(lines)])
        output.sync()
        checkpoints.append(checkpoint_of(output))
    output.append([b'"after"'])
    output.close()
    return checkpoints[0], checkpoints[1]


def test_lines_are_appended_in_order_each_with_one_line_feed(tmp_path: Path) -> None:
    output = output_of(tmp_path)
    output.open([])
    output.append([b"{}", b"[1]"])
    output.append(['"ä"'.encode()])
    output.close()

    assert output.path.read_bytes() == '{}\n[1]\n"ä"\n'.encode()
    assert (output.written, output.size_bytes) == (3, 12)


def test_a_new_outputs_directory_entry_is_synced(tmp_path: Path) -> None:
    files = BrokenFiles()
    output = output_of(tmp_path, files)
    output.open([])
    output.close()
    assert f"sync_dir {tmp_path.name}" in files.log


def test_bytes_count_as_unsynced_until_a_sync(tmp_path: Path) -> None:
    output = output_of(tmp_path)
    output.open([])
    output.append([b"{}"])
    assert output.unsynced_bytes == 3
    output.sync()
    assert output.unsynced_bytes == 0
    output.close()


@pytest.mark.parametrize("lines", [3, 400])  # less and more than the tail that is checked
def test_the_output_is_cut_to_its_newest_checkpoint(tmp_path: Path, lines: int) -> None:
    older, newer = written_in_two_steps(tmp_path, lines)
    output = output_of(tmp_path)

    output.open([newer, older])

    assert output.path.stat().st_size == newer.output_bytes
    assert (output.written, output.size_bytes) == (2 * lines, newer.output_bytes)
    assert output.tail_crc == newer.tail_crc
    output.append([b'"next"'])
    output.close()
    assert output.path.read_bytes().splitlines()[-2:] == [
        b'{"step": 1, "line": %d}' % (lines - 1),
        b'"next"',
    ]


def test_an_output_shorter_than_the_newest_checkpoint_goes_on_from_the_one_before(
    tmp_path: Path,
) -> None:
    older, newer = written_in_two_steps(tmp_path)
    output = output_of(tmp_path)
    whole = output.path.read_bytes()
    output.path.write_bytes(whole[: newer.output_bytes - 1])

    output.open([newer, older])

    assert output.written == 3
    output.close()
    assert output.path.read_bytes() == whole[: older.output_bytes]


def test_an_output_whose_newest_part_is_not_ours_goes_on_from_the_one_before(
    tmp_path: Path,
) -> None:
    older, newer = written_in_two_steps(tmp_path)
    output = output_of(tmp_path)
    whole = output.path.read_bytes()
    output.path.write_bytes(whole[: older.output_bytes] + bytes(200))
    output.open([newer, older])
    output.close()
    assert output.path.read_bytes() == whole[: older.output_bytes]


def test_an_output_shorter_than_both_checkpoints_is_refused_and_not_touched(
    tmp_path: Path,
) -> None:
    older, newer = written_in_two_steps(tmp_path)
    output = output_of(tmp_path)
    kept = output.path.read_bytes()[: older.output_bytes - 1]
    output.path.write_bytes(kept)

    with pytest.raises(StateError, match=r"out\.jsonl"):
        output.open([newer, older])

    output.close()
    assert output.path.read_bytes() == kept


def test_somebody_elses_output_is_refused_and_not_touched(tmp_path: Path) -> None:
    older, newer = written_in_two_steps(tmp_path)
    output = output_of(tmp_path)
    output.path.write_bytes(b"x" * 10_000)
    with pytest.raises(StateError):
        output.open([newer, older])
    output.close()
    assert output.path.read_bytes() == b"x" * 10_000


def test_without_checkpoints_only_an_empty_output_is_taken(tmp_path: Path) -> None:
    output = output_of(tmp_path)
    output.path.write_bytes(b"")
    output.open([])
    output.close()

    output.path.write_bytes(b"precious")
    with pytest.raises(StateError):
        output.open([])
    output.close()
    assert output.path.read_bytes() == b"precious"


def test_a_failed_append_counts_nothing_and_is_made_good_by_the_next(tmp_path: Path) -> None:
    files = BrokenFiles()
    output = output_of(tmp_path, files)
    output.open([])
    output.append([b'"one"'])
    before = checkpoint_of(output)
    files.fail_write = FULL
    with pytest.raises(OSError, match="No space"):
        output.append([b'"a long line that does not fit"', b'"two"'])
    assert checkpoint_of(output) == before

    files.heal()
    output.append([b'"a long line that does not fit"'])
    output.append([b'"two"'])
    output.close()

    assert output.path.read_bytes() == b'"one"\n"a long line that does not fit"\n"two"\n'


def test_a_failed_sync_of_the_output_is_told(tmp_path: Path) -> None:
    files = BrokenFiles()
    output = output_of(tmp_path, files)
    output.open([])
    output.append([b"{}"])
    files.fail_sync = BROKEN
    with pytest.raises(SyncFailedError, match=r"out\.jsonl"):
        output.sync()
    assert output.unsynced_bytes == 3
    output.close()


def test_an_output_in_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    output = OrderedOutput(tmp_path / "missing" / "out.jsonl", Files())
    with pytest.raises(StorageError, match="missing"):
        output.open([])


# -------------------------------------------------------------------- the index


def test_a_waiting_result_is_found_and_others_are_not() -> None:
    index = WaitingIndex(10)
    index.set(12, Location(3, 77, 5))
    index.set(9, Location(3, 88, 5))  # before the base: written long ago

    assert index.get(12) == Location(3, 77, 5)
    assert [index.get(i) for i in (-1, 0, 9, 10, 11, 13, 10**9)] == [None] * 7


def test_a_later_result_for_the_same_item_replaces_the_place() -> None:
    index = WaitingIndex()
    index.set(1, Location(1, 50, 5))
    index.set(1, Location(2, 60, 7))
    assert index.get(1) == Location(2, 60, 7)


def test_large_segment_numbers_offsets_and_lengths_are_kept_exactly() -> None:
    index = WaitingIndex()
    location = Location(9_999_999, (1 << 40) - 1, (1 << 32) - 1)
    index.set(0, location)
    assert index.get(0) == location


def test_what_is_written_is_forgotten_and_the_rest_stays_found() -> None:
    index = WaitingIndex()
    lines = 70_000
    for work_id in range(lines):
        index.set(work_id, Location(1, work_id + 1, 2))
    index.forget_before(lines - 5)

    assert index.get(lines - 6) is None
    assert [index.get(i) for i in range(lines - 5, lines)] == [
        Location(1, i + 1, 2) for i in range(lines - 5, lines)
    ]
    index.set(lines + 3, Location(2, 9, 9))
    assert index.get(lines + 3) == Location(2, 9, 9)
    assert index.get(lines) is None


def test_forgetting_far_beyond_what_is_known_leaves_a_working_index() -> None:
    index = WaitingIndex()
    index.set(3, Location(1, 1, 1))
    index.forget_before(200_000)
    index.set(200_001, Location(1, 2, 3))
    assert index.get(200_001) == Location(1, 2, 3)
    assert index.get(200_000) is None
