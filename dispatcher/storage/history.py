"""`history.jsonl`: what finished lines went through that did not go well at the first attempt.

It is for people and survives the run; nothing is decided by it. So it is written after the
journal, is not waited for, and a disk without room for it costs only the history.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from dispatcher.core.events import Past
from dispatcher.storage.files import Files

HISTORY_FILE = "history.jsonl"


class HistoryFile:
    """Appends to the file, which is opened when there is something to write."""

    def __init__(self, path: Path, files: Files) -> None:
        self._path = path
        self._files = files
        self._fd = -1
        self._size = 0

    def append(self, pasts: list[Past]) -> None:
        """Write a line for each. Raises OSError."""
        if self._fd < 0:
            self._open()
        data = b"".join(_line(past) for past in pasts)
        self._files.write_at(self._fd, data, self._size)
        self._size += len(data)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            self._files.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        self._fd = self._files.open(self._path, os.O_RDWR | os.O_CREAT)
        self._size = self._files.size(self._fd)
        # A process that died while it wrote may have left half a line.
        if self._size and self._files.read_at(self._fd, 1, self._size - 1) != b"\n":
            self._files.write_at(self._fd, b"\n", self._size)
            self._size += 1


def _line(past: Past) -> bytes:
    attempts = [msgspec.structs.asdict(ended) for ended in past.attempts]
    return msgspec.json.encode({**msgspec.structs.asdict(past), "attempts": attempts}) + b"\n"
