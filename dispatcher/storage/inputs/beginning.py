"""The first lines of an input, without copying all of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dispatcher.errors import StorageError
from dispatcher.storage.inputs.reader import CopyStop, InputReader
from dispatcher.storage.source import LineSource

_LEAST_SHARE = 1e-9


@dataclass(frozen=True, slots=True)
class Beginning:
    """The first lines of an input as a source, and the size of all, estimated unless `is_whole`.

    `size_bytes` is None where nothing tells it.
    """

    source: LineSource
    is_whole: bool
    size_bytes: float | None


@contextmanager
def beginning_of(
    reader: InputReader,
    directory: Path,
    max_line_bytes: int,
    least_lines: int,
    least_bytes: int = 0,
) -> Iterator[Beginning]:
    """Read so many lines and bytes at least, if there are, into a file in `directory`.

    Raises UsageError for what is no input, StorageError.
    """
    part = directory / "beginning.jsonl"
    lines = size = 0
    last_end = 0
    is_whole = True
    share: float | None = None
    blocks = reader.blocks(CopyStop())
    try:
        with part.open("wb") as file:
            for block in blocks:
                file.write(block)
                lines += block.count(b"\n")
                if b"\n" in block:
                    last_end = size + block.rindex(b"\n") + 1
                size += len(block)
                share = reader.share_read()
                if lines >= least_lines and size >= least_bytes:
                    # A pipe may have nothing more for hours.
                    is_whole = reader.can_be_read_again and next(blocks, None) is None
                    break
            if not is_whole:
                file.truncate(last_end)
    except OSError as error:
        raise StorageError(f"cannot read the input {reader.name}: {error.strerror}") from error
    finally:
        if hasattr(blocks, "close"):
            blocks.close()
    in_all: float | None = size if is_whole else None
    if in_all is None and share is not None:
        in_all = size / max(share, _LEAST_SHARE)
    source = LineSource(part, max_line_bytes)
    try:
        yield Beginning(source, is_whole, in_all)
    finally:
        source.close()
