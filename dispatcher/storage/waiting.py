"""Where the results are that must wait for an earlier line.

Results arrive in any order. Those that continue the output are appended to it; the others stay
in the journal, and only their place there is kept (12 bytes each) until their turn comes. So a
million finished lines behind an open one cost disk, not memory.

When a segment is full, the places in it are saved beside it (`number-epoch.waiting`), so that a
restart need not read the segment. Such a file is a copy: when it is lost, damaged, older than its
segment or does not reach back far enough, the segment is read instead.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from dispatcher.storage.files import Files
from dispatcher.storage.records import Location

_OFFSET_BITS = 40
_TRIM_ITEMS = 1 << 16


class WaitingIndex:
    """Work id -> place of its result in the journal, for results that are not dropped yet."""

    def __init__(self, base: int = 0) -> None:
        self._base = base
        self._places = array("Q")  # segment << 40 | offset; 0 where there is no result
        self._lengths = array("I")

    def set_all(
        self,
        segment: int,
        work_ids: Sequence[int],
        offsets: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
        """Remember where results in a segment are; a later one for the same item replaces it."""
        if not work_ids:
            return
        base, packed_segment = self._base, segment << _OFFSET_BITS
        if (missing := max(work_ids) - base + 1 - len(self._places)) > 0:
            self._places.frombytes(bytes(missing * self._places.itemsize))
            self._lengths.frombytes(bytes(missing * self._lengths.itemsize))
        places, stored = self._places, self._lengths
        for work_id, offset, length in zip(work_ids, offsets, lengths, strict=True):
            if (place := work_id - base) >= 0:
                places[place] = packed_segment | offset
                stored[place] = length

    def get(self, work_id: int) -> Location | None:
        """Return where a result is, or None."""
        place = work_id - self._base
        if not 0 <= place < len(self._places) or not self._places[place]:
            return None
        packed = self._places[place]
        offset = packed & ((1 << _OFFSET_BITS) - 1)
        return Location(packed >> _OFFSET_BITS, offset, self._lengths[place])

    def count_from(self, work_id: int) -> int:
        """Return how many results are known from this line on."""
        places = self._places[max(0, work_id - self._base) :]
        return len(places) - places.count(0)

    def forget_before(self, work_id: int) -> None:
        """Results before this one are on disk in the output."""
        unneeded = min(work_id - self._base, len(self._places))
        if unneeded >= _TRIM_ITEMS:
            del self._places[:unneeded]
            del self._lengths[:unneeded]
            self._base += unneeded


@dataclass(slots=True)
class SegmentPlaces:
    """The results in one segment: work ids, offsets and lengths, in the order they came."""

    work_ids: array[int] = field(default_factory=lambda: array("Q"))
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    lengths: array[int] = field(default_factory=lambda: array("I"))
    last_work_id: int = -1

    def extend(self, work_ids: list[int], offsets: list[int], lengths: list[int]) -> None:
        """Results stand in the segment; there is at least one."""
        self.work_ids.extend(work_ids)
        self.offsets.extend(offsets)
        self.lengths.extend(lengths)
        self.last_work_id = max(self.last_work_id, *work_ids)

    def enter(self, index: WaitingIndex, segment: int) -> None:
        """Tell the index of every result here."""
        index.set_all(segment, self.work_ids, self.offsets, self.lengths)


class _SavedHeader(msgspec.Struct, frozen=True):
    count: int
    first_waiting: int
    last_work_id: int
    segment_bytes: int


def save_places(
    path: Path, places: SegmentPlaces, first_waiting: int, segment_bytes: int, files: Files
) -> None:
    """Save the places of the results from line `first_waiting` on. Raises OSError."""
    waiting = [n for n, work_id in enumerate(places.work_ids) if work_id >= first_waiting]
    kept = SegmentPlaces()
    for column, all_of_it in (
        (kept.work_ids, places.work_ids),
        (kept.offsets, places.offsets),
        (kept.lengths, places.lengths),
    ):
        column.extend(all_of_it[n] for n in waiting)
    header = _SavedHeader(len(waiting), first_waiting, places.last_work_id, segment_bytes)
    columns = kept.work_ids.tobytes() + kept.offsets.tobytes() + kept.lengths.tobytes()
    body = msgspec.json.encode(header) + b"\n" + columns
    files.write_whole(places_path(path), b"%08x\n" % zlib.crc32(body) + body)


def load_places(
    path: Path, first_needed: int, segment_bytes: int, files: Files
) -> SegmentPlaces | None:
    """Return the places of the results from line `first_needed` on that were saved for a segment.

    None when the segment, of this size, must be read instead.
    """
    try:
        data = files.read_whole(places_path(path)) or b""
    except OSError:
        return None
    crc, _, body = data.partition(b"\n")
    if crc != b"%08x" % zlib.crc32(body):
        return None
    head, _, columns = body.partition(b"\n")
    header = msgspec.json.decode(head, type=_SavedHeader)
    if header.segment_bytes != segment_bytes or header.first_waiting > first_needed:
        return None
    places = SegmentPlaces(last_work_id=header.last_work_id)
    ids, offsets = header.count * 8, header.count * 16
    places.work_ids.frombytes(columns[:ids])
    places.offsets.frombytes(columns[ids:offsets])
    places.lengths.frombytes(columns[offsets:])
    return places


def places_path(segment_path: Path) -> Path:
    """Return the name of the file beside a segment."""
    return segment_path.with_suffix(".waiting")
