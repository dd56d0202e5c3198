"""The input, line by line.

A line ends at LF only; a last line without one counts. The size is fixed when the source is
opened, so that a file which grows meanwhile does not change the run. Positions are byte offsets:
`scan` reads on from one, `fetch` reads a single line again, and no content is kept.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from dispatcher.errors import StateError, UsageError
from dispatcher.storage.inputs.fingerprints import fingerprint_of
from dispatcher.storage.lines import InputLine, Lines

_CHUNK_BYTES = 1 << 20
_PLAIN_BYTES = 1 << 18
_BOM = b"\xef\xbb\xbf"


class LineSource:
    """A regular file of lines. Not thread-safe.

    `origin` says of a copy what it was made of; it is part of the fingerprint. What is not
    `is_whole` yet can be read up to `available_bytes`, where a line ends, and grows.
    """

    is_whole = True

    def __init__(
        self, path: Path, max_line_bytes: int, origin: dict[str, Any] | None = None
    ) -> None:
        self.path = path
        self.max_line_bytes = max_line_bytes
        self.origin = origin
        try:
            self._file: BinaryIO = path.open("rb", buffering=_CHUNK_BYTES)
        except OSError as error:
            raise UsageError(f"cannot read the input {path}: {error.strerror}") from error
        if stat.S_ISDIR(os.fstat(self._file.fileno()).st_mode):
            raise UsageError(f"the input {path} is a directory; name a file of lines")
        self.available_bytes = os.fstat(self._file.fileno()).st_size

    @property
    def size_bytes(self) -> int:
        """Where the input ends, which only a whole one tells."""
        assert self.is_whole
        return self.available_bytes

    def scan(self, offset: int, max_lines: int, max_bytes: int) -> Lines:
        """Return the next lines from `offset`: at least one unless there are no more."""
        lines = self._scan_plain(offset, max_lines, max_bytes) if offset else Lines(offset)
        if lines:
            return lines
        self._file.seek(offset)
        end = min(offset + max_bytes, self.available_bytes)
        while len(lines) < max_lines and offset < end:
            line = self._read_line(offset, self.max_line_bytes)
            lines.append(line)
            offset = line.next_offset
        return lines

    def _scan_plain(self, offset: int, max_lines: int, max_bytes: int) -> Lines:
        """Return the next lines up to the first that needs a closer look: most files have none."""
        left = self.available_bytes - offset
        data = os.pread(self._file.fileno(), min(_PLAIN_BYTES, max_bytes, left), offset)
        data = data[: data.rfind(b"\n") + 1]
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            text = data[: data.rfind(b"\n", 0, error.start) + 1].decode()
        texts = text.split("\n", max_lines)
        texts.pop()  # what follows the last line end, or the last line asked for
        if not texts:
            return Lines(offset)
        raw = texts if data.isascii() else data.split(b"\n", len(texts))[: len(texts)]
        sizes = [size + 1 for size in map(len, raw)]
        if "" in texts or any(map(str.isspace, texts)) or max(sizes) > self.max_line_bytes:
            odd = next(
                place
                for place, (text, size) in enumerate(zip(texts, sizes, strict=True))
                if not text.strip() or size > self.max_line_bytes
            )
            texts, sizes = texts[:odd], sizes[:odd]
        return Lines(offset, texts, sizes)

    def fetch(self, offset: int) -> InputLine:
        """Return the line that begins at `offset`, whole: it was within the limit once."""
        self._file.seek(offset)
        return self._read_line(offset, self.available_bytes)

    def fingerprint(self) -> dict[str, Any]:
        """Return size and hashes by which a changed input is told; reads at most 1.2 MiB."""
        return fingerprint_of(self._file.fileno(), self.size_bytes) | (self.origin or {})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read_line(self, offset: int, max_bytes: int) -> InputLine:
        left = self.available_bytes - offset
        limit = max_bytes + 1
        raw = self._read_part(offset, min(limit, left))
        next_offset = offset + len(raw)
        if len(raw) == limit and not raw.endswith(b"\n"):
            next_offset = self._skip_line(next_offset)
            shown = raw[:200].decode("utf-8", "replace")
            return InputLine(offset, next_offset, shown, "line_too_long")
        if offset == 0:
            raw = raw.removeprefix(_BOM)
        raw = raw.removesuffix(b"\n")
        if not raw.strip():
            return InputLine(offset, next_offset, "", "blank_line")
        try:
            return InputLine(offset, next_offset, raw.decode("utf-8"))
        except UnicodeDecodeError:
            shown = raw.decode("utf-8", "replace")
            return InputLine(offset, next_offset, shown, "undecodable_line")

    def _read_part(self, offset: int, limit: int) -> bytes:
        """Read to the end of the line or `limit` bytes; less than both means a shorter file."""
        part = self._file.readline(limit)
        if len(part) < limit and not part.endswith(b"\n"):
            raise StateError(
                f"the input {self.path} was cut to {offset + len(part)} bytes while the run was "
                "using it; restore it and start the same command again"
            )
        return part

    def _skip_line(self, offset: int) -> int:
        while offset < self.available_bytes:
            part = self._read_part(offset, min(_CHUNK_BYTES, self.available_bytes - offset))
            offset += len(part)
            if part.endswith(b"\n"):
                break
        return offset
