"""The lines of files that may be larger than memory, and the `__ERROR__` lines among them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from dispatcher.core.results import error_kind
from dispatcher.errors import StorageError

_PIECE_BYTES = 1 << 20


def unreadable(path: Path | str, error: OSError) -> StorageError:
    """Return what to raise for a file of a run that cannot be read, with what to do."""
    remedy = "give the command again once it can be"
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        remedy = "restore it"
    elif isinstance(error, PermissionError):
        remedy = "get the right to read it"
    return StorageError(f"cannot read {path}: {error.strerror or error}; {remedy}")


class LineReader:
    """A file's lines, one after the other, each in pieces, so that none need fit in memory.

    Ends where the file ended when it was opened, or at byte `end`. `lines` counts the line ends
    passed so far. Calls raise StorageError when the file cannot be read.
    """

    def __init__(self, path: Path, end: int | None = None) -> None:
        self.path = path
        self.lines = 0
        try:
            self._file = path.open("rb", buffering=_PIECE_BYTES)
            size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise unreadable(path, error) from error
        self._left = size if end is None else min(end, size)
        self._within = self._open_end = False

    def begin(self) -> bytes:
        """Pass over what is left of the line and return the next one's first piece, or b""."""
        for _ in self.rest():
            pass
        return self._read()

    def rest(self) -> Iterator[bytes]:
        """Yield the pieces of the line behind those that were read."""
        while self._within and (piece := self._read()):
            yield piece

    def whole(self, first: bytes) -> bytes:
        """Return the whole line of which `first` is the first piece, with its line end."""
        return b"".join([first, *self.rest()])

    def start_at(self, offset: int) -> None:
        """Go on at a byte where a line begins; lines count from there."""
        self._left = max(0, self._left - offset)
        self._file.seek(offset)

    @property
    def ends_open(self) -> bool:
        """Whether the last line read had no line end."""
        return self._open_end

    def skip(self, count: int) -> None:
        """Pass over so many lines, or all there are."""
        for _ in self.rest():
            pass
        while count > 0 and self._left:
            data = self._guarded(self._file.read)
            present = data.count(b"\n")
            if present >= count:
                behind = len(data.split(b"\n", count)[-1])
                self._file.seek(-behind, os.SEEK_CUR)
                self._left += behind
                self._open_end = False
            elif data:
                self._open_end = not data.endswith(b"\n")
            self.lines += min(present, count)
            count -= min(present, count)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> LineReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> bytes:
        piece = self._guarded(self._file.readline)
        ends = piece.endswith(b"\n")
        self.lines += ends
        self._within = bool(piece) and not ends
        self._open_end = self._within or (not piece and self._open_end)
        return piece

    def _guarded(self, read: Callable[[int], bytes]) -> bytes:
        """Return up to a piece of what is left, as `read` reads it."""
        try:
            data = read(min(_PIECE_BYTES, self._left))
        except OSError as error:
            raise unreadable(self.path, error) from error
        # A file that was cut meanwhile ends here.
        self._left = self._left - len(data) if data else 0
        return data


def error_lines(reader: LineReader) -> Iterator[tuple[int, str]]:
    """Yield number and kind of each `__ERROR__` line; one that is still being written is none."""
    while first := reader.begin():
        if kind := error_kind(first):
            number = reader.lines - first.endswith(b"\n")
            for _ in reader.rest():
                pass
            if reader.lines > number:
                yield number, kind


def count_errors(output: Path) -> dict[str, int]:
    """Count an output's `__ERROR__` lines by kind, reading all of it. Raises StorageError."""
    with LineReader(output) as reader:
        return Counter(kind for _, kind in error_lines(reader))
