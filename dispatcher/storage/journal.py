"""The append-only journal: frames in segments.

A frame is one header line and a body of whole JSON lines, one a record:

    @ seq(12 digits) length(10 digits) previous-checksum(8 hex) checksum(8 hex) LF
    body: `length` bytes

The checksum is the CRC-32 of the header's first three fields and the body; a header also names
the checksum of the frame before it, so frames form a chain, through all segments. The next frame
is written only when the one before is on disk: at most the very last frame can be torn.

Segments are files named `number-epoch.journal`. The first frame of each holds the run's header
and a checkpoint, the whole state of the queue there, so that a restart reads only the last
segment; the older ones are kept for the results in them (storage/waiting.py knows where).
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dispatcher.errors import CorruptJournalError, StorageFullError, SyncFailedError
from dispatcher.storage.files import Files
from dispatcher.storage.records import Location, Record, decode_record

_HEADER = re.compile(rb"@(\d{12}) (\d{10}) ([0-9a-f]{8}) ([0-9a-f]{8})\n")
_CHECKED_BYTES = 33  # of the header: everything before its own checksum
HEADER_BYTES = 43
JOURNAL_DIR = "journal"
_SEGMENT_NAME = re.compile(r"(\d{8})-(\d{6})\.journal")
_READERS_KEPT = 16


@dataclass(frozen=True, slots=True)
class Entry:
    """One replayed record, and at which byte of its segment it ends."""

    record: Record
    end: int


@dataclass(frozen=True, slots=True)
class Frame:
    """A whole frame: its place in the chain, and where its body stands in the segment."""

    seq: int
    previous_crc: int
    crc: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Segment:
    """One file of the journal."""

    number: int
    epoch: int
    path: Path


class Journal:
    """The journal of one run, in one directory. Not thread-safe: one writer calls it."""

    def __init__(self, directory: Path, files: Files) -> None:
        self._directory = directory
        self._files = files
        self._segments = {s.number: s for s in _find_segments(directory, files)}
        self._readers: dict[int, int] = {}
        self._checked: set[int] = set()
        self._fd = -1
        self._number = 0
        self._size = 0
        self._next_seq = 1
        self._last_crc = 0

    @property
    def is_empty(self) -> bool:
        """True when there is no segment at all."""
        return not self._segments

    @property
    def segment_bytes(self) -> int:
        """Size of the segment being written, or read last."""
        return self._size

    @property
    def current_segment(self) -> int:
        """Number of the segment being written, or read last."""
        return self._number

    @property
    def older_segments(self) -> list[Segment]:
        """The segments before the current one, oldest first."""
        return [s for n, s in sorted(self._segments.items()) if n < self._number]

    def segment(self, number: int) -> Segment:
        """Return a segment by its number."""
        return self._segments[number]

    def find_segment(self, number: int) -> Segment | None:
        """Return a segment by its number; None for one that was dropped."""
        return self._segments.get(number)

    # ---------------------------------------------------------------- writing

    def begin_segment(self, epoch: int, body: bytes) -> None:
        """Start a new segment whose first frame holds `body`: the header and a checkpoint.

        The old segment stays the current one when this fails with StorageFullError.
        """
        number = max(self._segments, default=0) + 1
        path = self._directory / f"{number:08d}-{epoch:06d}.journal"
        head, crc = self._head(body)
        try:
            fd = self._files.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except OSError as error:
            raise StorageFullError(f"cannot create {path}: {error.strerror}") from error
        try:
            self._files.write_at(fd, head + body, 0)
        except OSError as error:
            self._files.close(fd)
            self._files.unlink(path)
            raise StorageFullError(f"cannot write {path}: {error.strerror}") from error
        self._sync(fd, path)
        try:
            self._files.sync_dir(self._directory)
        except OSError as error:
            raise SyncFailedError(f"cannot sync {self._directory}: {error.strerror}") from error
        if self._fd >= 0:
            self._files.close(self._fd)
        self._segments[number] = Segment(number, epoch, path)
        self._checked.add(number)
        self._fd, self._number, self._size = fd, number, len(head) + len(body)
        self._next_seq, self._last_crc = self._next_seq + 1, crc

    def append(self, body: bytes | bytearray) -> int:
        """Write one frame and return when it is on disk; where its body begins comes back.

        `body` is whole lines. Raises StorageFullError when nothing was changed, SyncFailedError
        when what is on disk is unknown.
        """
        head, crc = self._head(body)
        path = self._segments[self._number].path
        try:
            self._files.write_at(self._fd, head + body, self._size)
        except OSError as error:
            self._cut_back(path)
            raise StorageFullError(f"cannot write {path}: {error.strerror}") from error
        self._sync(self._fd, path)
        start = self._size + HEADER_BYTES
        self._size = start + len(body)
        self._next_seq, self._last_crc = self._next_seq + 1, crc
        return start

    def drop_before(self, number: int) -> list[Segment]:
        """Delete the segments before this one, and return them."""
        dropped = [s for n, s in sorted(self._segments.items()) if n < number]
        for segment in dropped:
            self._close_reader(segment.number)
            self._checked.discard(segment.number)
            del self._segments[segment.number]
        if dropped:
            # By name, so that what the loser of a takeover began goes too: left alone, it would
            # be taken for one of ours later.
            for segment in _all_segments(self._directory, self._files):
                if segment.number < number:
                    self._files.unlink(segment.path)
        return dropped

    def close(self) -> None:
        """Let go of all descriptors."""
        for number in list(self._readers):
            self._close_reader(number)
        if self._fd >= 0:
            self._files.close(self._fd)
            self._fd = -1

    # ---------------------------------------------------------------- reading

    def read(self, location: Location) -> bytes:
        """Return the bytes at a location.

        A segment of an earlier process is checked whole before the first byte of it is used.
        Raises CorruptJournalError when it is damaged.
        """
        number = location.segment
        if number not in self._segments:
            raise CorruptJournalError(f"segment {number} of {self._directory} is missing")
        if number not in self._checked:
            for _ in self.scan(number):
                pass
        path = self._segments[number].path
        try:
            fd = self._readers.get(number)
            if fd is None:
                if len(self._readers) >= _READERS_KEPT:
                    self._close_reader(next(iter(self._readers)))
                fd = self._readers[number] = self._files.open(path, os.O_RDONLY)
            return self._files.read_at(fd, location.length, location.offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error

    def replay_last(self) -> Iterator[Entry]:
        """Yield every record of the last segment; afterwards `begin_segment` goes on from there.

        A torn last frame is set aside and cut off; a segment that holds nothing else goes, and
        the one before it is the last. Raises CorruptJournalError for a damaged frame that has
        good ones behind it.
        """
        while self._segments:
            self._number = max(self._segments)
            data, frames = self._settle_end(self._segments[self._number])
            if frames:
                self._next_seq, self._last_crc = frames[-1].seq + 1, frames[-1].crc
                self._size = frames[-1].end
                self._checked.add(self._number)
                for frame in frames:
                    yield from self._decode_body(self._segments[self._number], data, frame)
                return
            # The process died while it began this segment; nothing in it was acknowledged.
            self._files.unlink(self._segments.pop(self._number).path)

    def size_of(self, number: int) -> int:
        """Return a segment's size in bytes. Raises CorruptJournalError when it cannot be read."""
        path = self._segments[number].path
        try:
            fd = self._files.open(path, os.O_RDONLY)
            try:
                return self._files.size(fd)
            finally:
                self._files.close(fd)
        except OSError as error:
            raise _unreadable(path, error) from error

    def scan(self, number: int) -> Iterator[Entry]:
        """Check an older segment against the one after it, then yield its records."""
        segment = self._segments[number]
        data = self._read_segment(segment)
        frames = list(_frames(data))
        following = self._segments[min(n for n in self._segments if n > number)]
        first = self._first_frame(following)
        # Frames beyond the place where a later epoch took over are those of a server that did
        # not know yet; it acknowledged none of them.
        place = next((n for n, f in enumerate(frames) if (f.seq + 1, f.crc) == first[:2]), None)
        if place is None:
            offset = frames[-1].end if frames else 0
            raise _damaged(segment.path, offset, "its end is missing or does not fit")
        if frames[place].end < len(data) and following.epoch == segment.epoch:
            raise _damaged(segment.path, frames[place].end, "there is more than was written")
        self._checked.add(number)
        for frame in frames[: place + 1]:
            yield from self._decode_body(segment, data, frame)

    # ---------------------------------------------------------------- inside

    def _settle_end(self, segment: Segment) -> tuple[bytes, list[Frame]]:
        """Return the last segment's good frames; a torn one behind them is cut off for good."""
        fd = self._open_for_repair(segment.path)
        try:
            data = self._files.read_at(fd, self._files.size(fd), 0)
            frames = list(_frames(data))
            end = frames[-1].end if frames else 0
            if end < len(data):
                self._judge_bad_frame(segment.path, data, end)
                self._set_aside(segment.path, data[end:])
                self._files.truncate(fd, end)
            if frames:
                # What was read may not have been synced by the process that wrote it.
                self._sync(fd, segment.path)
            return data[:end] if end < len(data) else data, frames
        except OSError as error:
            raise _unreadable(segment.path, error) from error
        finally:
            self._files.close(fd)

    def _open_for_repair(self, path: Path) -> int:
        try:
            return self._files.open(path, os.O_RDWR)
        except OSError as error:
            raise _unreadable(path, error) from error

    def _read_segment(self, segment: Segment) -> bytes:
        try:
            data = self._files.read_whole(segment.path)
        except OSError as error:
            raise _unreadable(segment.path, error) from error
        if data is None:
            raise CorruptJournalError(
                f"{segment.path} is missing although results in it are needed; restore it from a "
                "backup, or start a new run with another --state and output"
            )
        return data

    def _first_frame(self, segment: Segment) -> tuple[int, int]:
        """Return the sequence number of a segment's first frame, and the checksum before it."""
        try:
            fd = self._files.open(segment.path, os.O_RDONLY)
            try:
                header = _HEADER.match(self._files.read_at(fd, HEADER_BYTES, 0))
            finally:
                self._files.close(fd)
        except OSError as error:
            raise _unreadable(segment.path, error) from error
        if header is None:
            raise _damaged(segment.path, 0, "its first frame has no header")
        return int(header[1]), int(header[3], 16)

    def _decode_body(self, segment: Segment, data: bytes, frame: Frame) -> Iterator[Entry]:
        start = frame.start
        while start < frame.end:
            stop = data.index(b"\n", start)
            try:
                record = decode_record(data[start:stop])
            except ValueError as error:
                raise CorruptJournalError(
                    f"{segment.path} holds a record at byte {start} that this version cannot "
                    f"read ({error}); go on with the version that wrote it"
                ) from error
            yield Entry(record, stop)
            start = stop + 1

    def _judge_bad_frame(self, path: Path, data: bytes, offset: int) -> None:
        """Tell a torn end from damage: behind a torn frame there is nothing good."""
        for match in _HEADER.finditer(data, offset):
            if _frame_at(data, match.start()) is not None:
                raise _damaged(path, offset, "although good data follows")

    def _set_aside(self, path: Path, torn: bytes) -> None:
        try:
            self._files.write_whole(path.with_suffix(".torn"), torn)
        except OSError:
            # Only a courtesy to whoever investigates; a torn frame was never acknowledged.
            return

    def _head(self, body: bytes | bytearray) -> tuple[bytes, int]:
        head = b"@%012d %010d %08x" % (self._next_seq, len(body), self._last_crc)
        crc = zlib.crc32(body, zlib.crc32(head))
        return b"%s %08x\n" % (head, crc), crc

    def _cut_back(self, path: Path) -> None:
        try:
            self._files.truncate(self._fd, self._size)
        except OSError as error:
            raise SyncFailedError(
                f"cannot undo a failed write to {path}: {error.strerror}"
            ) from error

    def _sync(self, fd: int, path: Path) -> None:
        try:
            self._files.sync(fd)
        except OSError as error:
            raise SyncFailedError(
                f"cannot sync {path} ({error.strerror}): what is on disk is unknown; check the "
                "file system, then start the same command again"
            ) from error

    def _close_reader(self, number: int) -> None:
        if (fd := self._readers.pop(number, None)) is not None:
            self._files.close(fd)


def last_epoch(state_dir: Path, files: Files) -> int:
    """Return the highest epoch that wrote a segment of the journal in a state directory."""
    names = map(_SEGMENT_NAME.fullmatch, files.names(state_dir / JOURNAL_DIR))
    return max((int(match[2]) for match in names if match), default=0)


def _all_segments(directory: Path, files: Files) -> list[Segment]:
    return [
        Segment(int(match[1]), int(match[2]), directory / name)
        for name in files.names(directory)
        if (match := _SEGMENT_NAME.fullmatch(name))
    ]


def _find_segments(directory: Path, files: Files) -> list[Segment]:
    """Return the segments that count, in order.

    After a takeover the server that lost may have begun another segment before it knew: one of
    an earlier epoch than the segment before it, or than one of the same number.
    """
    every = _all_segments(directory, files)
    newest_of = {segment.number: segment for segment in every}  # they come by number, epoch
    kept: list[Segment] = []
    for number, segment in sorted(newest_of.items()):
        if kept and segment.epoch < kept[-1].epoch:
            continue
        if kept and number != kept[-1].number + 1:
            kept = []  # those before a gap were being deleted when the process died
        kept.append(segment)
    return kept


def _frames(data: bytes) -> Iterator[Frame]:
    """Yield the frames from the beginning, as far as they are whole and form a chain."""
    before: Frame | None = None
    offset = 0
    while (frame := _frame_at(data, offset)) is not None:
        if before is not None and (frame.seq, frame.previous_crc) != (before.seq + 1, before.crc):
            return
        yield frame
        before, offset = frame, frame.end


def _frame_at(data: bytes, offset: int) -> Frame | None:
    """Return the frame at `offset` when it is whole by its own checksum."""
    header = _HEADER.match(data, offset)
    if header is None:
        return None
    start = offset + HEADER_BYTES
    end = start + int(header[2])
    if end > len(data):
        return None
    checked = zlib.crc32(data[offset : offset + _CHECKED_BYTES])
    crc = zlib.crc32(memoryview(data)[start:end], checked)
    if crc != int(header[4], 16):
        return None
    return Frame(int(header[1]), int(header[3], 16), crc, start, end)


def _damaged(path: Path, offset: int, how: str) -> CorruptJournalError:
    return CorruptJournalError(
        f"{path} is damaged at byte {offset} ({how}); restore the file from a backup, or start "
        "a new run with another --state and output"
    )


def _unreadable(path: Path, error: OSError) -> CorruptJournalError:
    return CorruptJournalError(
        f"cannot read {path}: {error.strerror}; check the file system, then start the same "
        "command again"
    )
