"""Places of waiting results: in memory, and saved beside a segment as a copy that may be bad."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest

from dispatcher.storage.files import Files
from dispatcher.storage.records import Location
from dispatcher.storage.waiting import (
    SegmentPlaces,
    WaitingIndex,
    load_places,
    places_path,
    save_places,
)
from tests.storage.broken_files import FULL, BrokenFiles

SEGMENT = "00000003-000001.journal"
SEGMENT_BYTES = 5000


def some_places() -> SegmentPlaces:
    places = SegmentPlaces()
    for work_id, offset, length in ((12, 100, 20), (7, 300, 5), (30, 700, 4000), (9, 4800, 1)):
        places.extend([work_id], [offset], [length])
    return places


def saved(directory: Path, first_waiting: int = 0) -> Path:
    segment = directory / SEGMENT
    save_places(segment, some_places(), first_waiting, SEGMENT_BYTES, Files())
    return segment


def rows(places: SegmentPlaces | None) -> list[tuple[int, int, int]] | None:
    if places is None:
        return None
    return list(zip(places.work_ids, places.offsets, places.lengths, strict=True))


# -------------------------------------------------------------------- the index


def put(index: WaitingIndex, work_id: int, segment: int, offset: int, length: int) -> None:
    index.set_all(segment, [work_id], [offset], [length])


def test_a_place_is_found_again_and_other_lines_have_none() -> None:
    index = WaitingIndex()
    put(index, 5, 3, 70, 10)
    assert index.get(5) == Location(3, 70, 10)
    assert [index.get(n) for n in (-1, 0, 4, 6, 1 << 40)] == [None] * 5


def test_a_later_result_of_the_same_line_replaces_the_earlier_one() -> None:
    index = WaitingIndex()
    put(index, 5, 3, 70, 10)
    put(index, 5, 4, 43, 2)
    assert index.get(5) == Location(4, 43, 2)


def test_lines_before_the_base_are_in_the_output_and_not_kept() -> None:
    index = WaitingIndex(100)
    put(index, 99, 1, 43, 5)
    put(index, 100, 1, 50, 6)
    assert index.get(99) is None
    assert index.get(100) == Location(1, 50, 6)


def test_the_largest_places_fit() -> None:
    index = WaitingIndex()
    largest = Location((1 << 24) - 1, (1 << 40) - 1, (1 << 32) - 1)
    put(index, 0, largest.segment, largest.offset, largest.length)
    assert index.get(0) == largest


def test_an_index_that_forgets_answers_as_one_that_does_not() -> None:
    rng = random.Random(3)
    forgetting, wanted = WaitingIndex(), {}
    first = 0
    for step in range(60_000):
        work_id = first + rng.randrange(200_000)
        put(forgetting, work_id, 1 + step % 9, 43 + step, step)
        wanted[work_id] = Location(1 + step % 9, 43 + step, step)
        if step % 5000 == 4999:
            first += rng.randrange(60_000)
            forgetting.forget_before(first)
    asked = range(first, first + 260_000, 7)
    assert [forgetting.get(n) for n in asked] == [wanted.get(n) for n in asked]


def test_forgetting_frees_memory_and_a_forgotten_line_cannot_come_back() -> None:
    index = WaitingIndex()
    put(index, 200_000, 1, 43, 5)
    index.forget_before(150_000)
    put(index, 10, 1, 43, 5)
    assert index.get(10) is None
    assert index.get(200_000) == Location(1, 43, 5)
    assert len(index._places) == 50_001


def test_forgetting_more_than_there_is_leaves_an_index_that_goes_on() -> None:
    index = WaitingIndex()
    put(index, 70_000, 1, 43, 5)
    index.forget_before(1_000_000)
    put(index, 1_000_003, 2, 44, 6)
    assert index.get(70_000) is None
    assert index.get(1_000_003) == Location(2, 44, 6)


def test_results_that_come_together_are_entered_as_if_one_by_one() -> None:
    index = WaitingIndex(10)
    index.set_all(4, [30, 9, 11, 30], [43, 50, 60, 70], [1, 2, 3, 4])
    index.set_all(5, [], [], [])
    assert [index.get(n) for n in (9, 10, 11, 30)] == [
        None,
        None,
        Location(4, 60, 3),
        Location(4, 70, 4),
    ]


def test_results_are_counted_from_a_line_on() -> None:
    index = WaitingIndex(10)
    index.set_all(4, [30, 11, 12, 30], [43, 50, 60, 70], [1, 2, 3, 4])
    assert [index.count_from(n) for n in (0, 10, 12, 13, 30, 31, 99)] == [3, 3, 2, 1, 1, 0, 0]


# -------------------------------------------------------------------- places of a segment


def test_places_that_came_one_by_one_and_together_are_the_same() -> None:
    together = SegmentPlaces()
    together.extend([12, 7], [100, 300], [20, 5])
    together.extend([30, 9], [700, 4800], [4000, 1])
    assert rows(some_places()) == rows(together)
    assert some_places().last_work_id == together.last_work_id == 30


def test_a_segment_enters_its_places_in_the_order_they_came() -> None:
    places = SegmentPlaces()
    places.extend([4], [100], [5])
    places.extend([4], [200], [6])
    index = WaitingIndex()
    places.enter(index, 8)
    assert index.get(4) == Location(8, 200, 6)


# -------------------------------------------------------------------- saved places


def test_saved_places_come_back_from_the_first_waiting_line_on(tmp_path: Path) -> None:
    segment = saved(tmp_path, first_waiting=9)
    loaded = load_places(segment, 31, SEGMENT_BYTES, Files())
    assert rows(loaded) == [(12, 100, 20), (30, 700, 4000), (9, 4800, 1)]


def test_saved_places_tell_the_last_line_of_the_segment_also_when_it_need_not_wait(
    tmp_path: Path,
) -> None:
    segment = saved(tmp_path, first_waiting=31)
    loaded = load_places(segment, 31, SEGMENT_BYTES, Files())
    assert loaded is not None
    assert (rows(loaded), loaded.last_work_id) == ([], 30)


def test_a_segment_without_results_has_saved_places_too(tmp_path: Path) -> None:
    segment = tmp_path / SEGMENT
    save_places(segment, SegmentPlaces(), 0, SEGMENT_BYTES, Files())
    loaded = load_places(segment, 31, SEGMENT_BYTES, Files())
    assert loaded is not None
    assert (rows(loaded), loaded.last_work_id) == ([], -1)


def test_places_saved_from_a_later_line_on_than_is_needed_are_not_used(tmp_path: Path) -> None:
    segment = saved(tmp_path, first_waiting=9)
    assert load_places(segment, 8, SEGMENT_BYTES, Files()) is None
    assert load_places(segment, 9, SEGMENT_BYTES, Files()) is not None


def test_a_missing_file_means_that_the_segment_must_be_read(tmp_path: Path) -> None:
    assert load_places(tmp_path / SEGMENT, 0, SEGMENT_BYTES, Files()) is None


def test_an_unreadable_file_means_that_the_segment_must_be_read(tmp_path: Path) -> None:
    segment = saved(tmp_path)
    files = BrokenFiles()
    files.fail_read = errno.EIO
    assert load_places(segment, 31, SEGMENT_BYTES, files) is None


def test_places_saved_for_a_longer_segment_are_not_used(tmp_path: Path) -> None:
    assert load_places(saved(tmp_path), 0, SEGMENT_BYTES - 1, Files()) is None


def test_places_saved_before_the_segment_grew_are_not_used(tmp_path: Path) -> None:
    """More results may have come into the segment, which these places do not know."""
    assert load_places(saved(tmp_path), 0, SEGMENT_BYTES + 1, Files()) is None


def test_places_cut_at_any_length_are_not_used(tmp_path: Path) -> None:
    segment = saved(tmp_path)
    path = places_path(segment)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert load_places(segment, 31, SEGMENT_BYTES, Files()) is None, length
    path.write_bytes(whole + b"x")
    assert load_places(segment, 31, SEGMENT_BYTES, Files()) is None


def test_places_with_any_flipped_bit_are_not_used_or_say_the_same(tmp_path: Path) -> None:
    segment = saved(tmp_path)
    path = places_path(segment)
    whole = path.read_bytes()
    for place in range(len(whole) * 8):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        loaded = load_places(segment, 31, SEGMENT_BYTES, Files())
        if loaded is not None:
            assert rows(loaded) == rows(some_places()), f"bit {place}: {bytes(damaged[:80])!r}"
            assert loaded.last_work_id == 30, f"bit {place}: {bytes(damaged[:80])!r}"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"{}\n",
        b"[]\n",
        b"null\n",
        b'{"count":-1,"segment_bytes":0,"last_work_id":1,"crc":0}\n',
        b'{"count":1000000000000000000,"segment_bytes":0,"last_work_id":1,"crc":0}\n',
        b'{"count":0,"segment_bytes":"x","last_work_id":1,"crc":0}\n',
        b"\xff\xfe\x00" * 100,
        bytes(4096),
    ],
)
def test_a_file_that_holds_something_else_is_not_used(tmp_path: Path, content: bytes) -> None:
    segment = tmp_path / SEGMENT
    places_path(segment).write_bytes(content)
    assert load_places(segment, 31, SEGMENT_BYTES, Files()) is None


def test_places_that_cannot_be_saved_leave_those_from_before(tmp_path: Path) -> None:
    segment = saved(tmp_path)
    before = places_path(segment).read_bytes()
    files = BrokenFiles()
    files.fail_write = FULL
    with pytest.raises(OSError, match="No space"):
        save_places(segment, SegmentPlaces(), 0, SEGMENT_BYTES, files)
    assert places_path(segment).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [places_path(segment).name]


def test_saved_places_are_on_disk_before_their_name_is(tmp_path: Path) -> None:
    files = BrokenFiles()
    save_places(tmp_path / SEGMENT, some_places(), 0, SEGMENT_BYTES, files)
    assert [entry.split()[0] for entry in files.log] == ["write", "sync", "sync_dir"]
