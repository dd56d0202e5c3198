"""The output file: result lines in input order, appended at a tracked offset."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

from dispatcher.errors import StateError, StorageError, SyncFailedError
from dispatcher.storage.files import Files
from dispatcher.storage.records import OutputPosition

_TAIL_BYTES = 4096


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

    def open(self, positions: list[OutputPosition]) -> OutputPosition | None:
        """Open the file and return the newest of these positions that it reaches, changing nothing.

        `positions` are newest first; without any, the file must be empty. Raises StateError when
        the file is shorter than all of them or holds something else.
        """
        try:
            self._fd = self._files.open(self.path, os.O_RDWR | os.O_CREAT)
            # Also when it exists: who created it may have been killed before it got this far.
            self._files.sync_dir(self.path.parent)
            size = self._files.size(self._fd)
            chosen = next((p for p in positions if self._matches(p, size)), None)
            if chosen is None and (positions or size):
                raise StateError(
                    f"the output {self.path} is not what this run wrote ({size} bytes; the run "
                    f"had written {positions[0].size_bytes if positions else 0}); restore it, "
                    "or start a new run with another output"
                )
        except OSError as error:
            raise self._unusable(error) from error
        return chosen

    def cut(self, position: OutputPosition | None) -> None:
        """Cut the file to a position, or to nothing, and go on from there."""
        if position is not None:
            self.written, self.size_bytes = position.lines, position.size_bytes
        try:
            self._files.truncate(self._fd, self.size_bytes)
            self._tail = self._read_tail(self.size_bytes)
        except OSError as error:
            raise self._unusable(error) from error
        self.sync()

    @property
    def position(self) -> OutputPosition:
        """Where the output ends now."""
        return OutputPosition(self.written, self.size_bytes, zlib.crc32(self._tail))

    @property
    def unsynced_bytes(self) -> int:
        """How much was written since the last sync."""
        return self.size_bytes - self.synced_bytes

    @property
    def is_in_place(self) -> bool:
        """False when the file, or its directory, was removed or replaced under its name."""
        return self._files.leads_to(self.path, self._fd)

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

    def _unusable(self, error: OSError) -> StorageError:
        return StorageError(
            f"cannot write the output {self.path}: {error.strerror}; name an output in a "
            "directory you may write to"
        )

    def _matches(self, position: OutputPosition, size: int) -> bool:
        if size < position.size_bytes:
            return False
        return zlib.crc32(self._read_tail(position.size_bytes)) == position.tail_crc

    def _read_tail(self, end: int) -> bytes:
        start = max(0, end - _TAIL_BYTES)
        return self._files.read_at(self._fd, end - start, start)
