"""The ordered output: lines in order, cut back to where it is known to be whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from dispatcher.errors import StateError, StorageError, SyncFailedError
from dispatcher.storage.files import Files
from dispatcher.storage.output import OrderedOutput
from dispatcher.storage.records import OutputPosition
from tests.storage.broken_files import BROKEN, FULL, BrokenFiles


def open_at(output: OrderedOutput, positions: list[OutputPosition]) -> OutputPosition | None:
    """Open the output and cut it, as a start does."""
    chosen = output.open(positions)
    output.cut(chosen)
    return chosen


def output_of(directory: Path, files: Files | None = None) -> OrderedOutput:
    return OrderedOutput(directory / "out.jsonl", files or Files())


def written_in_two_steps(directory: Path, lines: int = 3) -> tuple[OutputPosition, OutputPosition]:
    """Write and sync lines twice, and one after that; return where it was synced."""
    output = output_of(directory)
    open_at(output, [])
    positions = []
    for step in range(2):
        output.append([b'{"step": %d, "line": %d}' % (step, n) for n in range(lines)])
        output.sync()
        positions.append(output.position)
    output.append([b'"after"'])
    output.close()
    return positions[0], positions[1]


def test_lines_are_appended_in_order_each_with_one_line_feed(tmp_path: Path) -> None:
    output = output_of(tmp_path)
    open_at(output, [])
    output.append([b"{}", b"[1]"])
    output.append(['"ä"'.encode()])
    output.close()

    assert output.path.read_bytes() == '{}\n[1]\n"ä"\n'.encode()
    assert (output.written, output.size_bytes) == (3, 12)


def test_a_new_outputs_directory_entry_is_synced(tmp_path: Path) -> None:
    files = BrokenFiles()
    output = output_of(tmp_path, files)
    open_at(output, [])
    output.close()
    assert f"sync_dir {tmp_path.name}" in files.log


def test_bytes_count_as_unsynced_until_a_sync(tmp_path: Path) -> None:
    output = output_of(tmp_path)
    open_at(output, [])
    output.append([b"{}"])
    assert output.unsynced_bytes == 3
    output.sync()
    assert output.unsynced_bytes == 0
    output.close()


@pytest.mark.parametrize("lines", [3, 400])  # less and more than the tail that is checked
def test_the_output_is_cut_to_its_newest_position(tmp_path: Path, lines: int) -> None:
    older, newer = written_in_two_steps(tmp_path, lines)
    output = output_of(tmp_path)

    assert open_at(output, [newer, older]) == newer

    assert output.path.stat().st_size == newer.size_bytes
    assert output.written == 2 * lines
    assert output.position == newer
    output.append([b'"next"'])
    output.close()
    assert output.path.read_bytes().splitlines()[-2:] == [
        b'{"step": 1, "line": %d}' % (lines - 1),
        b'"next"',
    ]


def test_an_output_shorter_than_the_newest_position_goes_on_from_the_one_before(
    tmp_path: Path,
) -> None:
    older, newer = written_in_two_steps(tmp_path)
    output = output_of(tmp_path)
    whole = output.path.read_bytes()
    output.path.write_bytes(whole[: newer.size_bytes - 1])

    assert open_at(output, [newer, older]) == older

    assert output.written == 3
    output.close()
    assert output.path.read_bytes() == whole[: older.size_bytes]


def test_an_output_whose_newest_part_is_not_ours_goes_on_from_the_one_before(
    tmp_path: Path,
) -> None:
    older, newer = written_in_two_steps(tmp_path)
    output = output_of(tmp_path)
    whole = output.path.read_bytes()
    output.path.write_bytes(whole[: older.size_bytes] + bytes(200))
    open_at(output, [newer, older])
    output.close()
    assert output.path.read_bytes() == whole[: older.size_bytes]


def test_an_output_shorter_than_both_positions_is_refused_and_not_touched(
    tmp_path: Path,
) -> None:
    older, newer = written_in_two_steps(tmp_path)
    output = output_of(tmp_path)
    kept = output.path.read_bytes()[: older.size_bytes - 1]
    output.path.write_bytes(kept)

    with pytest.raises(StateError, match=r"out\.jsonl"):
        open_at(output, [newer, older])

    output.close()
    assert output.path.read_bytes() == kept


def test_somebody_elses_output_is_refused_and_not_touched(tmp_path: Path) -> None:
    older, newer = written_in_two_steps(tmp_path)
    output = output_of(tmp_path)
    output.path.write_bytes(b"x" * 10_000)
    with pytest.raises(StateError):
        open_at(output, [newer, older])
    output.close()
    assert output.path.read_bytes() == b"x" * 10_000


def test_without_positions_only_an_empty_output_is_taken(tmp_path: Path) -> None:
    output = output_of(tmp_path)
    output.path.write_bytes(b"")
    assert open_at(output, []) is None
    output.close()

    output.path.write_bytes(b"precious")
    with pytest.raises(StateError):
        open_at(output, [])
    output.close()
    assert output.path.read_bytes() == b"precious"


def test_a_failed_append_counts_nothing_and_is_made_good_by_the_next(tmp_path: Path) -> None:
    files = BrokenFiles()
    output = output_of(tmp_path, files)
    open_at(output, [])
    output.append([b'"one"'])
    before = output.position
    files.fail_write = FULL
    with pytest.raises(OSError, match="No space"):
        output.append([b'"a long line that does not fit"', b'"two"'])
    assert output.position == before

    files.heal()
    output.append([b'"a long line that does not fit"'])
    output.append([b'"two"'])
    output.close()

    assert output.path.read_bytes() == b'"one"\n"a long line that does not fit"\n"two"\n'


def test_a_failed_sync_of_the_output_is_told(tmp_path: Path) -> None:
    files = BrokenFiles()
    output = output_of(tmp_path, files)
    open_at(output, [])
    output.append([b"{}"])
    files.fail_sync = BROKEN
    with pytest.raises(SyncFailedError, match=r"out\.jsonl"):
        output.sync()
    assert output.unsynced_bytes == 3
    output.close()


def test_an_output_in_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    output = OrderedOutput(tmp_path / "missing" / "out.jsonl", Files())
    with pytest.raises(StorageError, match="missing"):
        open_at(output, [])


@pytest.mark.parametrize("fault", ["fail_open", "fail_read", "fail_truncate"])
def test_an_output_that_cannot_be_opened_is_one_sentence_and_not_touched(
    tmp_path: Path, fault: str
) -> None:
    older, newer = written_in_two_steps(tmp_path)
    files = BrokenFiles()
    output = output_of(tmp_path, files)
    before = output.path.read_bytes()
    setattr(files, fault, BROKEN)

    with pytest.raises(StorageError, match=r"cannot write the output .*out\.jsonl"):
        open_at(output, [newer, older])

    output.close()
    assert output.path.read_bytes() == before


# -------------------------------------------------------------------- is it still there?


def opened(directory: Path) -> OrderedOutput:
    output = output_of(directory)
    open_at(output, [])
    output.append([b'"one"'])
    return output


def test_an_output_that_was_moved_away_is_missed_until_it_is_back(tmp_path: Path) -> None:
    output = opened(tmp_path)
    assert output.is_in_place
    aside = output.path.rename(tmp_path / "aside.jsonl")
    assert not output.is_in_place

    aside.rename(output.path)

    assert output.is_in_place
    output.append([b'"two"'])
    output.close()
    assert output.path.read_bytes() == b'"one"\n"two"\n'


def test_an_output_whose_directory_was_moved_away_is_missed_until_it_is_back(
    tmp_path: Path,
) -> None:
    (tmp_path / "results").mkdir()
    output = opened(tmp_path / "results")
    aside = (tmp_path / "results").rename(tmp_path / "aside")
    assert not output.is_in_place

    aside.rename(tmp_path / "results")

    assert output.is_in_place
    output.close()


def test_another_file_under_the_outputs_name_is_not_taken_for_it(tmp_path: Path) -> None:
    output = opened(tmp_path)
    content = output.path.read_bytes()
    output.path.rename(tmp_path / "aside.jsonl")
    output.path.write_bytes(content)
    assert not output.is_in_place
    output.close()
