"""A run's journal and claim, read while another process may be writing them; nothing is changed.

The journal's own code reads it, and repairs what a start has to repair: a torn last frame is cut
off, a segment without a whole frame is removed. Here it is given files on which none of that
happens, so that it only passes over them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from dispatcher.core.work_queue import QueuePolicy, WorkQueue
from dispatcher.errors import CorruptJournalError
from dispatcher.storage.files import Files
from dispatcher.storage.journal import JOURNAL_DIR, Journal
from dispatcher.storage.ownership import OWNERS_DIR, TAKEOVER_AFTER_S, Claim, Identity
from dispatcher.storage.records import Checkpoint, OutputPosition, Record, RunHeader

T = TypeVar("T")

_TRIES = 5
_TRY_AGAIN_S = 0.2


class ReadOnlyFiles(Files):
    """Files that can be read; repairs are left undone, for they are the owner's."""

    def open(self, path: Path, flags: int, mode: int = 0o644) -> int:
        """Open for reading, whatever else was asked for."""
        return super().open(path, os.O_RDONLY)

    def write_at(self, fd: int, data: bytes | bytearray, offset: int) -> None:
        """Write nothing."""

    def truncate(self, fd: int, length: int) -> None:
        """Cut nothing."""

    def sync(self, fd: int) -> None:
        """Nothing was written."""

    def sync_dir(self, path: Path) -> None:
        """Nothing was written."""

    def make_dir(self, path: Path) -> None:
        """Create nothing."""

    def rename(self, source: Path, target: Path) -> None:
        """Rename nothing."""

    def unlink(self, path: Path) -> None:
        """Remove nothing."""

    def write_whole(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        """Write nothing."""


@dataclass(slots=True)
class JournalEnd:
    """What the last segment says: the queue's state, and how many lines the output had for sure."""

    queue: WorkQueue
    header: RunHeader
    written: int


def read_end(state_dir: Path) -> JournalEnd | None:
    """Replay the last segment; None when there is no journal.

    Raises CorruptJournalError when it cannot be read, also because it was being dropped.
    """
    queue = WorkQueue(QueuePolicy())
    header: RunHeader | None = None
    written = 0
    for entry in _journal(state_dir).replay_last():
        record = entry.record
        match record:
            case RunHeader():
                header = record
                queue = WorkQueue(policy_of(record))
            case Checkpoint():
                queue.restore(record.queue, 0.0)
                written = record.positions[-1].lines if record.positions else 0
            case OutputPosition():
                written = record.lines
            case _:
                queue.apply(record, 0.0)
    return JournalEnd(queue, header, written) if header is not None else None


def read_records(state_dir: Path) -> Iterator[Record]:
    """Yield the records of all segments still there, oldest first.

    Raises CorruptJournalError as `read_end` does.
    """
    journal = _journal(state_dir)
    last = journal.replay_last()
    first = next(last, None)  # from here on the journal knows which segments come before
    if first is None:
        return
    for segment in journal.older_segments:
        yield from (entry.record for entry in journal.scan(segment.number))
    yield first.record
    yield from (entry.record for entry in last)


def patiently(read: Callable[[], T]) -> T:
    """Return what `read` returns, trying again when it fails.

    A segment may go between its being found and its being read, and a file system may show a
    write half done for a moment.
    """
    for _ in range(_TRIES - 1):
        try:
            return read()
        except CorruptJournalError:
            time.sleep(_TRY_AGAIN_S)
    return read()


def policy_of(header: RunHeader) -> QueuePolicy:
    """Return the limits under which a segment was written."""
    names = {field.name for field in fields(QueuePolicy)}
    known: dict[str, Any] = {k: v for k, v in header.settings.items() if k in names}
    return QueuePolicy(**known)


def _journal(state_dir: Path) -> Journal:
    return Journal(state_dir / JOURNAL_DIR, ReadOnlyFiles())


# -------------------------------------------------------------------- whose run it is


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that claimed the run last; `seen_at` is when it last said so (time of day)."""

    identity: Identity
    seen_at: float
    is_alive: bool


def read_owner(state_dir: Path) -> Owner | None:
    """Return who has the run or had it last; None when that cannot be told."""
    try:
        names = [name for name in os.listdir(state_dir / OWNERS_DIR) if name.isdecimal()]
        with (state_dir / OWNERS_DIR / max(names, key=int)).open("rb") as file:
            # Of the opened file: on a network file system that is looked up anew, not remembered.
            seen_at = os.fstat(file.fileno()).st_mtime
            claim = msgspec.json.decode(file.read(), type=Claim)
    except (OSError, ValueError):  # none, gone meanwhile, or just being written
        return None
    return Owner(claim.owner, seen_at, not claim.ended and _lives(claim.owner, seen_at))


def _lives(owner: Identity, seen_at: float) -> bool:
    here = Identity.of_this_process()
    if here.knows_dead(owner):
        return False
    if (owner.host, owner.boot, owner.namespace) == (here.host, here.boot, here.namespace):
        return True
    return abs(time.time() - seen_at) < TAKEOVER_AFTER_S
