"""The append-only journal: frames in segments.

A frame is one header line and a body of whole JSON lines, one a record:

    @ seq(12 digits) length(10 digits) previous-checksum(8 hex) checksum(8 hex) LF
    body: `length` bytes

The checksum is the CRC-32 of the header's first three fields and the body; a header also names
the checksum of the frame before it, so frames form a chain. The next frame is written only when
the one before is on disk: at most the very last frame can be torn. Segments are numbered files;
the first frame of each holds the run's header and a checkpoint, so that replay can begin at any
segment and the older ones can go when nothing needs them.

Records are msgspec structs encoded as tagged arrays. A result stands last in its record, as the
worker's own bytes, so that it can be copied from the journal to the output without a decoder.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from dispatcher.core.events import (
    Absolved,
    Finished,
    Issued,
    LeaseEnded,
    Opened,
    QueueState,
    Tombstoned,
    Watched,
)
from dispatcher.errors import CorruptJournalError, StorageFullError, SyncFailedError
from dispatcher.storage.files import Files

SEGMENT_BYTES = 64 << 20
_HEADER = re.compile(rb"@(\d{12}) (\d{10}) ([0-9a-f]{8}) ([0-9a-f]{8})\n")
_CHECKED_BYTES = 33  # of the header: everything before its own checksum
_HEADER_BYTES = 43
_SEGMENT_NAME = re.compile(r"(\d{8})-(\d{6})\.journal")
_READERS_KEPT = 16


class RunHeader(msgspec.Struct, frozen=True, array_like=True, tag="run"):
    """Which run this journal belongs to, and which server start wrote the segment."""

    run_id: str
    epoch: int
    fingerprint: dict[str, Any]
    settings: dict[str, Any]


class Checkpoint(msgspec.Struct, frozen=True, array_like=True, tag="checkpoint"):
    """The queue's state here, and how far the output was on disk.

    The first `written` lines of the run fill the output up to `output_bytes`; `tail_crc` is the
    checksum of the output's last bytes there.
    """

    queue: QueueState
    written: int
    output_bytes: int
    tail_crc: int


Record = (
    RunHeader
    | Checkpoint
    | Opened
    | Issued
    | Watched
    | Finished
    | Tombstoned
    | LeaseEnded
    | Absolved
)
encode_record = msgspec.json.Encoder().encode
_decode_record = msgspec.json.Decoder(Record).decode


class Location(msgspec.Struct, frozen=True, gc=False):
    """Where bytes stand in the journal."""

    segment: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One replayed record; `payload` locates the result in it, if it has one."""

    record: Record
    segment: int
    payload: Location | None


class Journal:
    """The journal of one run, in one directory. Not thread-safe: one writer calls it."""

    def __init__(self, directory: Path, files: Files) -> None:
        self._directory = directory
        self._files = files
        self._segments: dict[int, Path] = {}
        self._readers: dict[int, int] = {}
        self._fd = -1
        self._number = 0
        self._size = 0
        self._next_seq = 1
        self._last_crc = 0
        for path in sorted(directory.glob("*.journal")):
            if match := _SEGMENT_NAME.fullmatch(path.name):
                self._segments[int(match[1])] = path

    @property
    def is_empty(self) -> bool:
        """True when there is no segment at all."""
        return not self._segments

    @property
    def segment_bytes(self) -> int:
        """Size of the segment being written."""
        return self._size

    @property
    def current_segment(self) -> int:
        """Number of the segment being written."""
        return self._number

    # ---------------------------------------------------------------- writing

    def begin_segment(self, epoch: int, records: list[bytes]) -> None:
        """Start a new segment whose first frame holds `records`: the header and a checkpoint.

        The old segment stays the current one when this fails with StorageFullError.
        """
        number = max(self._segments, default=0) + 1
        path = self._directory / f"{number:08d}-{epoch:06d}.journal"
        frame = self._frame(records)
        try:
            fd = self._files.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except OSError as error:
            raise StorageFullError(f"cannot create {path}: {error.strerror}") from error
        try:
            self._files.write_at(fd, frame, 0)
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
        self._segments[number] = path
        self._fd, self._number, self._size = fd, number, len(frame)
        self._advance(frame)

    def append(self, records: list[bytes]) -> list[int]:
        """Write one frame and return when it is on disk; the offset of each record comes back.

        Raises StorageFullError when nothing was changed, SyncFailedError when what is on disk
        is unknown.
        """
        frame = self._frame(records)
        path = self._segments[self._number]
        try:
            self._files.write_at(self._fd, frame, self._size)
        except OSError as error:
            self._cut_back(path)
            raise StorageFullError(f"cannot write {path}: {error.strerror}") from error
        self._sync(self._fd, path)
        offsets: list[int] = []
        offset = self._size + _HEADER_BYTES
        for record in records:
            offsets.append(offset)
            offset += len(record) + 1
        self._size += len(frame)
        self._advance(frame)
        return offsets

    def drop_before(self, segment: int) -> None:
        """Delete the segments before this one."""
        for number in [n for n in self._segments if n < segment]:
            self._close_reader(number)
            self._files.unlink(self._segments.pop(number))

    def close(self) -> None:
        """Let go of all descriptors."""
        for number in list(self._readers):
            self._close_reader(number)
        if self._fd >= 0:
            self._files.close(self._fd)
            self._fd = -1

    # ---------------------------------------------------------------- reading

    def read(self, location: Location) -> bytes:
        """Return the bytes at a location."""
        fd = self._readers.get(location.segment)
        if fd is None:
            if len(self._readers) >= _READERS_KEPT:
                self._close_reader(next(iter(self._readers)))
            path = self._segments[location.segment]
            fd = self._readers[location.segment] = self._files.open(path, os.O_RDONLY)
        return self._files.read_at(fd, location.length, location.offset)

    def replay(self) -> Iterator[Entry]:
        """Yield every record, oldest first; afterwards `begin_segment` goes on from there.

        A torn last frame is set aside and cut off. Raises CorruptJournalError for a damaged
        frame that has good ones behind it.
        """
        self._next_seq, self._last_crc = 0, -1
        numbers = sorted(self._segments)
        for number in numbers:
            yield from self._replay_segment(number, is_last=number == numbers[-1])

    def _replay_segment(self, number: int, *, is_last: bool) -> Iterator[Entry]:
        path = self._segments[number]
        fd = self._files.open(path, os.O_RDWR)
        try:
            data = self._files.read_at(fd, self._files.size(fd), 0)
            offset = 0
            while offset < len(data):
                header = self._check_frame(data, offset)
                if header is None:
                    self._judge_bad_frame(path, data, offset, is_last=is_last)
                    self._set_aside(path, data[offset:])
                    self._files.truncate(fd, offset)
                    break
                body_at = offset + _HEADER_BYTES
                offset = body_at + int(header[2])
                self._next_seq = int(header[1]) + 1
                self._last_crc = int(header[4], 16)
                yield from self._decode_body(path, number, data, body_at, offset)
            if is_last:
                # What was read may not have been synced by the process that wrote it.
                self._sync(fd, path)
        finally:
            self._files.close(fd)
        if is_last and offset == 0:
            # The process died while it began this segment; the one before is whole.
            self._files.unlink(self._segments.pop(number))

    def _decode_body(
        self, path: Path, number: int, data: bytes, start: int, end: int
    ) -> Iterator[Entry]:
        while start < end:
            stop = data.index(b"\n", start)
            try:
                record = _decode_record(data[start:stop])
            except msgspec.MsgspecError as error:
                raise CorruptJournalError(
                    f"{path} holds a record at byte {start} that this version cannot read "
                    f"({error}); go on with the version that wrote it"
                ) from error
            payload = None
            if isinstance(record, Finished | Tombstoned):
                length = len(bytes(record.result))
                payload = Location(number, stop - 1 - length, length)
            yield Entry(record, number, payload)
            start = stop + 1

    def _check_frame(self, data: bytes, offset: int) -> re.Match[bytes] | None:
        """Return the header of a good frame that continues the chain."""
        header = _whole_frame(data, offset)
        if header is None:
            return None
        if self._last_crc >= 0 and (
            int(header[1]) != self._next_seq or int(header[3], 16) != self._last_crc
        ):
            return None
        return header

    def _judge_bad_frame(self, path: Path, data: bytes, offset: int, *, is_last: bool) -> None:
        good_behind = any(
            _whole_frame(data, match.start())
            for match in _HEADER.finditer(data, offset)
            if match.start() > offset or _whole_frame(data, offset)
        )
        if good_behind or not is_last:
            raise CorruptJournalError(
                f"{path} is damaged at byte {offset} although good data follows; restore the "
                "file from a backup, or start a new run with another --state and --outfile"
            )

    def _set_aside(self, path: Path, torn: bytes) -> None:
        try:
            self._files.write_whole(path.with_suffix(".torn"), torn)
        except OSError:
            # Only a courtesy to whoever investigates; a torn frame was never acknowledged.
            return

    # ---------------------------------------------------------------- inside

    def _frame(self, records: list[bytes]) -> bytes:
        body = b"\n".join(records) + b"\n"
        previous = max(self._last_crc, 0)
        head = b"@%012d %010d %08x" % (max(self._next_seq, 1), len(body), previous)
        crc = zlib.crc32(body, zlib.crc32(head))
        return b"%s %08x\n%s" % (head, crc, body)

    def _advance(self, frame: bytes) -> None:
        self._next_seq = int(frame[1:13]) + 1
        self._last_crc = int(frame[_CHECKED_BYTES + 1 : _HEADER_BYTES - 1], 16)

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


def _whole_frame(data: bytes, offset: int) -> re.Match[bytes] | None:
    """Return the header when a frame that is whole by its own checksum stands at `offset`."""
    header = _HEADER.match(data, offset)
    if header is None:
        return None
    body_at = offset + _HEADER_BYTES
    body = memoryview(data)[body_at : body_at + int(header[2])]
    if len(body) != int(header[2]):
        return None
    crc = zlib.crc32(body, zlib.crc32(data[offset : offset + _CHECKED_BYTES]))
    return header if crc == int(header[4], 16) else None
