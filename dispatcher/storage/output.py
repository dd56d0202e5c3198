"""The output file: result lines in input order, and where the results that must wait are.

Results arrive in any order. Those that continue the written prefix are appended; the others stay
in the journal, and only their place there is kept (12 bytes each) until their turn comes.
"""

from __future__ import annotations

import os
import zlib
from array import array
from pathlib import Path

from dispatcher.errors import StateError, StorageError, SyncFailedError
from dispatcher.storage.files import Files
from dispatcher.storage.journal import Checkpoint, Location

_TAIL_BYTES = 4096
_OFFSET_BITS = 40
_TRIM_ITEMS = 1 << 16


class WaitingIndex:
    """Work id -> place of its result in the journal, for results that are not dropped yet."""

    def __init__(self, base: int = 0) -> None:
        self._base = base
        self._places = array("Q")  # segment << 40 | offset; 0 where there is no result
        self._lengths = array("I")

    def set(self, work_id: int, location: Location) -> None:
        """Remember where a result is; a later one for the same item replaces it."""
        place = work_id - self._base
        if place < 0:
            return
        if (missing := place + 1 - len(self._places)) > 0:
            self._places.frombytes(bytes(missing * self._places.itemsize))
            self._lengths.frombytes(bytes(missing * self._lengths.itemsize))
        self._places[place] = location.segment << _OFFSET_BITS | location.offset
        self._lengths[place] = location.length

    def get(self, work_id: int) -> Location | None:
        """Return where a result is, or None."""
        place = work_id - self._base
        if not 0 <= place < len(self._places) or not self._places[place]:
            return None
        packed = self._places[place]
        offset = packed & ((1 << _OFFSET_BITS) - 1)
        return Location(packed >> _OFFSET_BITS, offset, self._lengths[place])

    def forget_before(self, work_id: int) -> None:
        """Results before this one are on disk in the output."""
        unneeded = work_id - self._base
        if unneeded >= _TRIM_ITEMS:
            del self._places[:unneeded]
            del self._lengths[:unneeded]
            self._base = work_id


class OrderedOutput:
    """The output file, written at a tracked offset. Not thread-safe: one writer calls it."""

    def __init__(self, path: Path, files: Files) -> None:
        self.path = path
        self._files = files
        self._fd = -1
        self._tail = b""
        self.written = 0
        self.size_bytes = 0
        self.synced_bytes = 0

    def open(self, checkpoints: list[Checkpoint]) -> None:
        """Cut the file to the newest of these checkpoints it reaches, and go on from there.

        `checkpoints` are newest first; without any, the file must be empty. Raises StateError
        when the file is shorter than all of them or holds something else.
        """
        created = not self.path.exists()
        try:
            self._fd = self._files.open(self.path, os.O_RDWR | os.O_CREAT)
            if created:
                self._files.sync_dir(self.path.parent)
        except OSError as error:
            raise StorageError(
                f"cannot write the output {self.path}: {error.strerror}; give --outfile a path "
                "in a directory you may write to"
            ) from error
        size = self._files.size(self._fd)
        chosen = next((c for c in checkpoints if self._matches(c, size)), None)
        if chosen is None and (checkpoints or size):
            raise StateError(
                f"the output {self.path} is not what this run wrote ({size} bytes; the run had "
                f"written {checkpoints[0].output_bytes if checkpoints else 0}); restore it, or "
                "start a new run with another --outfile"
            )
        if chosen is not None:
            self.written, self.size_bytes = chosen.written, chosen.output_bytes
        self._files.truncate(self._fd, self.size_bytes)
        self._tail = self._read_tail(self.size_bytes)
        self.sync()

    @property
    def tail_crc(self) -> int:
        """Checksum of the last 4096 bytes written."""
        return zlib.crc32(self._tail)

    @property
    def unsynced_bytes(self) -> int:
        """How much was written since the last sync."""
        return self.size_bytes - self.synced_bytes

    def append(self, results: list[bytes]) -> None:
        """Write the next lines. Raises OSError, and then none of them counts as written."""
        data = b"\n".join(results) + b"\n"
        self._files.write_at(self._fd, data, self.size_bytes)
        self.size_bytes += len(data)
        self.written += len(results)
        self._tail = (self._tail + data[-_TAIL_BYTES:])[-_TAIL_BYTES:]

    def sync(self) -> None:
        """Return when everything written is on disk. Raises SyncFailedError."""
        try:
            self._files.sync(self._fd)
        except OSError as error:
            raise SyncFailedError(
                f"cannot sync the output {self.path} ({error.strerror}): what is on disk is "
                "unknown; check the file system, then start the same command again"
            ) from error
        self.synced_bytes = self.size_bytes

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            self._files.close(self._fd)
            self._fd = -1

    def _matches(self, checkpoint: Checkpoint, size: int) -> bool:
        if size < checkpoint.output_bytes:
            return False
        return zlib.crc32(self._read_tail(checkpoint.output_bytes)) == checkpoint.tail_crc

    def _read_tail(self, end: int) -> bytes:
        start = max(0, end - _TAIL_BYTES)
        return self._files.read_at(self._fd, end - start, start)
