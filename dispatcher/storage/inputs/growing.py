"""An input's copy that is read while it is still made.

What was handed out of a copy must read the same later, although the next start makes the copy
anew. So before anything of it may be read, size and hash of all bytes so far are on disk
(`input.sums`), and the next copy is not read before it has come as far with the same hash. The run
therefore needs nothing of a copy that was not finished, which may be damaged, or gone.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from dispatcher.errors import DispatcherError, StateError, StorageError, UsageError
from dispatcher.storage.files import Files
from dispatcher.storage.inputs.copying import (
    FULL,
    Copying,
    Progress,
    cannot_write,
    create_partial,
    keep_copy,
    next_block,
    origin_now,
)
from dispatcher.storage.inputs.fingerprints import fingerprint_of
from dispatcher.storage.inputs.reader import InputReader
from dispatcher.storage.run_state import PARTIAL_SPOOL_FILE, SPOOL_FILE, SPOOL_SUMS_FILE
from dispatcher.storage.source import LineSource

log = logging.getLogger(__name__)

FIRST_AFTER_S = 0.5
"""A copy that is whole by then is never read before; so a small input is checked before a run."""

EVERY_S = 1.0
_TELL_BESIDE_RUN_S = 60.0
_TRY_AGAIN_S = 2.0


class Sum(msgspec.Struct, frozen=True, omit_defaults=True):
    """The first `size` bytes of a copy have this hash; all have, where there is a fingerprint."""

    size: int
    blake2b: str
    fingerprint: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Begun:
    """What a run knows of a copy that it read while it was made.

    Lines up to `next_offset` were handed out; `check` refuses another original.
    """

    next_offset: int = 0
    check: Callable[[dict[str, Any]], None] = lambda _: None


class GrowingSource(LineSource):
    """The lines of a copy as far as it is on disk; `copy` goes on until the source is closed."""

    is_whole = False

    def __init__(self, copy: GrowingCopy, path: Path, max_line_bytes: int) -> None:
        super().__init__(path, max_line_bytes, copy.origin)
        self.available_bytes = 0
        self.copy = copy

    def become_whole(self) -> None:
        """Read to the end from now on; the copy has its name."""
        self.available_bytes = self.copy.progress.bytes
        self.path = self.path.with_name(SPOOL_FILE)
        self.is_whole = True

    def expected_lines(self) -> int:
        """Return how many lines there are in all, or about as many."""
        return self.copy.expected_lines()

    def fingerprint(self) -> dict[str, Any]:
        """Return that of the original, and of the copy once that is whole."""
        return dict(self.copy.fingerprint if self.is_whole else self.copy.origin)

    def close(self) -> None:
        """End the copying, and close the file."""
        self.copy.end()
        super().close()


class GrowingCopy:
    """Copies an input on a thread of its own.

    `has_ended` is set when nothing is written any more: the copy is whole, has its name and a
    `fingerprint`, or `failure` says why not. `problem` says what it waits for.
    """

    def __init__(
        self, reader: InputReader, state_dir: Path, origin: dict[str, Any], copying: Copying
    ) -> None:
        self.origin = origin
        self.fingerprint: dict[str, Any] = {}
        self.progress = Progress(reader)
        self.problem: str | None = None
        self.failure: DispatcherError | None = None
        self.has_ended = threading.Event()
        self._can_be_read = threading.Event()
        self._reader = reader
        self._state_dir = state_dir
        self._partial = state_dir / PARTIAL_SPOOL_FILE
        self._copying = copying
        self._hash = hashlib.blake2b(digest_size=16)
        self._owed: Sum | None = None
        self._line_end = 0
        self._sums_fd: int | None = None
        self._sums_end = 0
        self._fd = -1
        self._source: GrowingSource | None = None
        self._tell: Callable[[], object] = lambda: None
        self._thread = threading.Thread(target=self._run, name="copy", daemon=True)

    # ---------------------------------------------------------------- whoever reads it

    def start(self, max_line_bytes: int, owed: Sum | None) -> GrowingSource | None:
        """Begin; return when it can be read: as a source, or None when it is already whole.

        `owed` is what has to be reached before. Raises what ended it, StartStoppedError too.
        """
        files = self._copying.files
        files.unlink(self._partial)
        try:
            self._fd = create_partial(self._partial, files)
        except OSError as error:
            raise self._cannot_write(error) from error
        self._owed = owed
        self._source = GrowingSource(self, self._partial, max_line_bytes)
        self._thread.start()
        self._can_be_read.wait()
        if self._is_read and self.failure is None:
            return self._source
        self._source.close()
        if self.failure is not None:
            raise self.failure
        return None

    def listen(self, tell: Callable[[], object]) -> None:
        """Call this, on the copy's thread, whenever there is more to read, at the end, and now."""
        self._tell = tell
        tell()

    def expected_lines(self) -> int:
        """Return how many lines there are in all, or about as many."""
        known, copied, share = self._reader.known_lines, self.progress.lines, self.progress.share
        if known is not None or self.has_ended.is_set():
            return copied if known is None else known
        return round(copied / share) if share else copied

    def end(self) -> None:
        """Have it end, and return when its thread writes no more."""
        if not self.has_ended.is_set():
            self._copying.stop.set()
        self._thread.join()

    @property
    def _is_read(self) -> bool:
        """Whether lines of it may have been handed out."""
        return self._sums_fd is not None

    # ---------------------------------------------------------------- its thread

    def _run(self) -> None:
        try:
            with self.progress:
                self._copy()
                self._finish()
            self.progress.say_end()
        except DispatcherError as error:
            self.failure = error
        except Exception as error:  # noqa: BLE001 (raised where the copy is waited for)
            self.failure = DispatcherError(
                f"the input {self._reader.name} cannot be copied: {type(error).__name__}: {error}"
            )
        finally:
            self._close()
            self.has_ended.set()
            self._can_be_read.set()
            self._tell()

    def _copy(self) -> None:
        due_at = time.monotonic() + FIRST_AFTER_S
        blocks = self._reader.blocks(self._copying.stop)
        while (block := self._next(blocks)) is not None:
            while block:
                block = block[self._add(block) :]
            self._copying.stop.check()
            if time.monotonic() >= due_at:
                self._sync()  # also while nothing may be read yet, or one would take minutes
                if self._owed is None and self._line_end:
                    self._let_read()
                due_at = time.monotonic() + EVERY_S
        if self._owed is not None:
            raise self._not_the_same()

    def _next(self, blocks: Iterator[bytes]) -> bytes | None:
        try:
            return next_block(self._reader, blocks)
        except UsageError as error:
            if not self._is_read:
                raise
            raise UsageError(
                f"{error}; its first lines were handed out before that was found: what is answered "
                "stays in the output, and a mended input is for a new run with another output"
            ) from error

    def _add(self, block: bytes) -> int:
        """Write what of a block comes before the place to be checked; return its length."""
        written = self.progress.bytes
        if self._owed is not None:
            block = block[: self._owed.size - written]
        self._patiently(lambda: self._copying.files.write_at(self._fd, block, written))
        self._hash.update(block)
        if b"\n" in block:
            self._line_end = written + block.rindex(b"\n") + 1
        self.progress.add(block)
        if self._owed is not None and self.progress.bytes == self._owed.size:
            if self._hash.hexdigest() != self._owed.blake2b:
                raise self._not_the_same()
            self._owed = None
        return len(block)

    def _sync(self) -> None:
        try:
            self._copying.files.sync(self._fd)
        except OSError as error:
            raise self._cannot_write(error) from error

    def _let_read(self) -> None:
        """Let all whole lines that are on disk be read, once their sum is."""
        self._check_in_place()
        self._note_sum(Sum(self.progress.bytes, self._hash.hexdigest()))
        assert self._source is not None
        self._source.available_bytes = self._line_end
        self.progress.every_s = _TELL_BESIDE_RUN_S
        self._can_be_read.set()
        self._tell()

    def _finish(self) -> None:
        files = self._copying.files
        if self.origin != origin_now(self._reader):
            remedy = "start the same command again when nobody writes to it any more"
            if self._is_read:
                remedy = (
                    "restore it and start the same command again, or give it as it is now to a "
                    "new run with another output"
                )
            raise UsageError(
                f"the input {self._reader.name} was changed while it was copied; {remedy}"
            )
        self._sync()
        self._confirm()
        try:
            fingerprint = fingerprint_of(self._fd, self.progress.bytes)
            if self._is_read:
                self._note_sum(Sum(self.progress.bytes, self._hash.hexdigest(), fingerprint))
            self._check_in_place()
            self._patiently(lambda: keep_copy(self._fd, self._state_dir, self.origin, files))
            self.fingerprint = fingerprint | self.origin
        except OSError as error:
            raise self._cannot_write(error) from error

    def _note_sum(self, found: Sum) -> None:
        files, path = self._copying.files, self._state_dir / SPOOL_SUMS_FILE
        line = msgspec.json.encode(found) + b"\n"
        try:
            if self._sums_fd is None:
                # What an earlier start noted beyond its last line says nothing of this copy.
                files.write_whole(path, line)
                self._sums_fd = files.open(path, os.O_WRONLY)
            else:
                fd, end = self._sums_fd, self._sums_end
                self._patiently(lambda: files.write_at(fd, line, end))
                files.sync(fd)
        except OSError as error:
            raise self._cannot_write(error) from error
        self._sums_end += len(line)

    def _patiently(self, write: Callable[[], None]) -> None:
        """Write, again and again while the disk is full, as soon as lines were handed out."""
        while True:
            try:
                write()
            except OSError as error:
                if error.errno not in FULL or not self._is_read:
                    raise self._cannot_write(error) from error
                if self.problem is None:
                    self.problem = (
                        f"the copy of the input {self._reader.name} to {self._partial} waits: "
                        f"{error.strerror} after {self.progress.bytes / 2**20:,.1f} MiB; make room "
                        f"for {self.progress.whole} in all, and it goes on by itself"
                    )
                    log.warning("%s", self.problem)
                self._copying.stop.wait(_TRY_AGAIN_S)
                self._copying.stop.check()
            else:
                break
        if self.problem is not None:
            self.problem = None
            log.warning("there is room again: the copy of the input goes on")

    def _confirm(self) -> None:
        """Make sure that the run is still ours, for as long as it takes once it is under way."""
        while True:
            try:
                self._copying.confirm()
            except StorageError:
                if not self._is_read:
                    raise
                self._copying.stop.wait(_TRY_AGAIN_S)
                self._copying.stop.check()
            else:
                return

    def _check_in_place(self) -> None:
        if not self._copying.files.leads_to(self._partial, self._fd):
            self._copying.confirm()
            raise StorageError(
                f"{self._partial}, the copy of the input {self._reader.name}, was removed while it "
                "was made; start the same command again, which makes it anew"
            )

    def _not_the_same(self) -> StateError:
        return StateError(
            f"the input {self._reader.name} does not give the lines that this run handed out "
            "before: perhaps another version of the package that reads it writes them otherwise; "
            "use the one of then, or start a new run with another output"
        )

    def _cannot_write(self, error: OSError) -> StorageError:
        return cannot_write(self._reader, self._partial, self.progress, error)

    def _close(self) -> None:
        files = self._copying.files
        if not self._is_read and self.failure is not None:
            # Nothing was read of it, so that it is of no use; another process's is not ours.
            with contextlib.suppress(OSError):
                if files.leads_to(self._partial, self._fd):
                    files.unlink(self._partial)
        for fd in (self._fd, self._sums_fd):
            if fd is not None:
                with contextlib.suppress(OSError):
                    files.close(fd)


def open_growing(
    reader: InputReader,
    state_dir: Path,
    max_line_bytes: int,
    origin: dict[str, Any],
    copying: Copying,
    begun: Begun,
) -> LineSource:
    """Begin to copy an input, and return it as soon as it can be read.

    Raises UsageError, StateError, StorageError, and StartStoppedError.
    """
    begun.check(origin)
    sums = read_sums(state_dir, copying.files)
    owed = next((found for found in sums if found.size >= begun.next_offset), None)
    if not begun.next_offset:
        owed = None
    elif owed is None:
        raise StateError(
            f"{state_dir / SPOOL_SUMS_FILE} does not tell which lines of the input {reader.name} "
            "were handed out before; restore it from a backup, or start a new run with another "
            "output"
        )
    source = GrowingCopy(reader, state_dir, origin, copying).start(max_line_bytes, owed)
    return source or LineSource(state_dir / SPOOL_FILE, max_line_bytes, origin)


def read_sums(state_dir: Path, files: Files) -> list[Sum]:
    """Return what is known of the copy of an input that was read while it was made."""
    try:
        text = files.read_whole(state_dir / SPOOL_SUMS_FILE) or b""
    except OSError as error:
        raise StorageError(
            f"cannot read {state_dir / SPOOL_SUMS_FILE}: {error.strerror or error}; mend that, and "
            "start the same command again"
        ) from error
    found: list[Sum] = []
    for line in text.splitlines():
        with contextlib.suppress(msgspec.DecodeError):  # the last may be torn: nobody read so far
            found.append(msgspec.json.decode(line, type=Sum))
    return found


def fingerprint_of_grown(state_dir: Path, files: Files) -> dict[str, Any]:
    """Return the fingerprint of a copy when it became whole; nothing where that is unknown."""
    known = [found.fingerprint for found in read_sums(state_dir, files) if found.fingerprint]
    return known[-1] if known else {}
