"""An input's copy in the state directory: whole and on disk, or not there."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from dispatcher.errors import StorageError, UsageError
from dispatcher.storage.files import Files
from dispatcher.storage.inputs.reader import CopyStop, InputReader
from dispatcher.storage.run_state import PARTIAL_SPOOL_FILE, SPOOL_FILE, SPOOL_ORIGIN_FILE

T = TypeVar("T")
log = logging.getLogger(__name__)

TELL_EVERY_S = 5.0
_SYNC_BYTES = 256 << 20
FULL = (errno.ENOSPC, errno.EDQUOT)
"""The errors of a full disk."""


@dataclass(frozen=True, slots=True)
class Copying:
    """What a copy goes by: how it is stopped, whether the run is still ours, the disk."""

    stop: CopyStop = field(default_factory=CopyStop)
    confirm: Callable[[], None] = lambda: None
    files: Files = field(default_factory=Files)


class Progress:
    """Says now and then how far a copy is, also while nothing comes."""

    def __init__(self, reader: InputReader, every_s: float = TELL_EVERY_S) -> None:
        self.every_s = every_s
        self.bytes = self.lines = 0
        self.share: float | None = None
        self._reader = reader
        self._has_said = False
        self._ended = threading.Event()

    def add(self, block: bytes) -> None:
        """Another block was written."""
        self.bytes += len(block)
        self.lines += block.count(b"\n")
        self.share = self._reader.share_read()

    def __enter__(self) -> Progress:
        threading.Thread(target=self._tell, name="copy-progress", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def say_end(self) -> None:
        """Say that the copy is whole, if anything was said before."""
        if self._has_said:
            log.info("copied the input %s: %s", self._reader.name, self)

    @property
    def whole(self) -> str:
        """How large the copy is going to be, in words."""
        whole = self.bytes / self.share / 2**20 if self.share else 0
        return f"about {whole:,.0f} MiB" if whole else "more than that"

    def __str__(self) -> str:
        return f"{self.lines:,} lines, {self.bytes / 2**20:,.1f} MiB"

    def _tell(self) -> None:
        while not self._ended.wait(self.every_s):
            self._has_said = True
            part = f", {100 * self.share:.0f} % of it read" if self.share is not None else ""
            log.info("copying the input %s: %s%s", self._reader.name, self, part)


def copy_input(
    reader: InputReader, state_dir: Path, original: dict[str, Any] | None, copying: Copying
) -> None:
    """Copy an input into the state directory, and beside it what the original is told by.

    Raises StartStoppedError when it was stopped, UsageError for what is no input, StorageError.
    """
    files, partial = copying.files, state_dir / PARTIAL_SPOOL_FILE
    files.unlink(partial)  # of a start that was killed, or of another process: then it keeps it
    files.unlink(state_dir / SPOOL_FILE)
    fd = _attempt(reader, partial, Progress(reader), lambda: create_partial(partial, files))
    try:
        with Progress(reader) as written:
            _write(reader, fd, partial, copying, written)
        if original is not None and original != origin_now(reader):
            raise UsageError(
                f"the input {reader.name} was changed while it was copied; start the same command "
                "again when nobody writes to it any more"
            )
        copying.confirm()
        _attempt(reader, partial, written, lambda: keep_copy(fd, state_dir, original, files))
        written.say_end()
    except BaseException:  # whatever ended it, half a copy is of no use
        # One that another process made is not ours.
        with contextlib.suppress(OSError):
            if files.leads_to(partial, fd):
                files.unlink(partial)
        raise
    finally:
        files.close(fd)


def origin_now(reader: InputReader, before: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Return what a run keeps of an original, and compares when it is started again.

    None for one that is read once. With `before`, what was kept, no other machine is asked.
    Raises UsageError, StorageError.
    """
    try:
        known = (before or {}).get("original")
        original = reader.fingerprint() if known is None else reader.fingerprint_beside(known)
    except OSError as error:
        where = error.filename or reader.name
        raise StorageError(f"cannot read the input {where}: {error.strerror or error}") from error
    return None if original is None else {"kind": reader.kind, "original": original}


def origin_of_copy(state_dir: Path, files: Files) -> dict[str, Any] | None:
    """Return what the copy's original was told by; None when nothing says so."""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        text = files.read_whole(state_dir / SPOOL_ORIGIN_FILE)
        if text is not None:
            return msgspec.json.decode(text, type=dict[str, Any])
    return None


def create_partial(partial: Path, files: Files) -> int:
    """Open a new file for a copy: nobody else writes to it, whoever still copies elsewhere."""
    return files.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)


def _write(
    reader: InputReader, fd: int, partial: Path, copying: Copying, progress: Progress
) -> None:
    files = copying.files
    synced = 0
    blocks = reader.blocks(copying.stop)
    while (block := next_block(reader, blocks)) is not None:
        try:
            files.write_at(fd, block, progress.bytes)
            if progress.bytes - synced >= _SYNC_BYTES:
                files.sync(fd)  # or the one at the end would take minutes
                synced = progress.bytes
        except OSError as error:
            raise cannot_write(reader, partial, progress, error) from error
        progress.add(block)
    try:
        files.sync(fd)
    except OSError as error:
        raise cannot_write(reader, partial, progress, error) from error


def next_block(reader: InputReader, blocks: Iterator[bytes]) -> bytes | None:
    """Return what is read next; None at the end. Raises StorageError, and what readers raise."""
    try:
        return next(blocks, None)
    except OSError as error:
        raise StorageError(
            f"cannot read the input {reader.name}: {error.strerror or error}; mend that, and "
            "start the same command again"
        ) from error


def keep_copy(fd: int, state_dir: Path, original: dict[str, Any] | None, files: Files) -> None:
    """Give a whole copy its name, and say beside it what it was made of. Raises OSError."""
    partial = state_dir / PARTIAL_SPOOL_FILE
    if original is None:
        files.unlink(state_dir / SPOOL_ORIGIN_FILE)
    else:
        files.write_whole(state_dir / SPOOL_ORIGIN_FILE, msgspec.json.encode(original))
    if not files.leads_to(partial, fd):
        raise OSError(errno.ESTALE, "another process copies it as well")
    files.rename(partial, state_dir / SPOOL_FILE)
    files.sync_dir(state_dir)


def _attempt(reader: InputReader, partial: Path, progress: Progress, act: Callable[[], T]) -> T:
    try:
        return act()
    except OSError as error:
        raise cannot_write(reader, partial, progress, error) from error


def cannot_write(
    reader: InputReader, partial: Path, progress: Progress, error: OSError
) -> StorageError:
    """Return the error that says why a copy cannot be written, and what to do."""
    copy = partial.with_name(SPOOL_FILE)
    again = "start the same command again"
    if not reader.can_be_read_again:
        again = "start the run again with the whole input"
    remedy = "mend that"
    if error.errno in FULL:
        remedy = f"make room for {progress.whole} there, or name a larger place with --state"
    return StorageError(
        f"cannot copy the input {reader.name} to {copy}: {error.strerror} after "
        f"{progress.bytes / 2**20:,.1f} MiB; {remedy}, and {again}"
    )
