"""GET /items/N: one line of the run, as far as the server's memory and its files tell quickly.

The queue knows an open line; the input, the output, the journal and the history are read at the
place where the line stands, in a thread and with files opened for this alone, so that neither the
loop nor the journal waits. What would take long is not looked for; `dispatcher runs --item` does.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from dispatcher.core.items import Item
from dispatcher.core.observed import Mark
from dispatcher.core.results import error_kind
from dispatcher.core.workers import Lease
from dispatcher.errors import BadRequestError, TooFarError
from dispatcher.service import DispatchService
from dispatcher.storage.history import HISTORY_FILE
from dispatcher.storage.run_state import copy_of_input

SHOWN_BYTES = 4096
"""Of a line, a result and the like at most so much is shown."""

LONGEST_S = 5.0
"""For how long one file is searched."""

_CHUNK_BYTES = 1 << 20
_LONGEST_DIGITS = 15  # of a number that a script of the page counts with
_AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class Piece:
    """The beginning of a line and the length of all of it, in bytes."""

    data: bytes
    size: int


class ItemView:
    """Tells of one line after the other."""

    def __init__(self, service: DispatchService) -> None:
        self._service = service
        self._room = asyncio.Semaphore(_AT_ONCE)

    async def look(self, text: str) -> dict[str, Any] | None:
        """Return what is known of the line of this number; None when the input has no such line.

        Raises BadRequestError when it is no number.
        """
        if not (text.isascii() and text.isdecimal()):
            raise BadRequestError("the line must be a whole number, counted from 0")
        if len(text) > _LONGEST_DIGITS:
            return None
        line = int(text)
        async with self._room:
            return await self._look(line)

    async def _look(self, line: int) -> dict[str, Any] | None:
        service, queue = self._service, self._service.queue
        item = queue.items.get(line)
        written = service.writer.output.written if service.writer is not None else 0
        if service.finished.is_set():
            written = queue.next_work_id
        if line >= queue.next_work_id and queue.input_ended:
            return None
        found: dict[str, Any] = {"line": line, **_state(line, item, queue.next_work_id, written)}
        found |= _open_facts(item, service.now()) if item is not None else {}
        places = _Places(service, line, item)
        found["input"] = await _tried(places.input_line)
        if found["input"] is None and line >= queue.next_work_id:
            return None
        result = None
        if line < written:
            result = await _tried(places.output_line)
        elif item is None and line < queue.next_work_id:
            where = await service.find_waiting(line)
            result = await _tried(lambda: _read_at(*where)) if where is not None else None
            if result is None:  # it went into the output meanwhile
                result = await _tried(places.output_line)
        found["result"] = result
        if item is None and line < queue.next_work_id:
            found["worker"] = service.observed.giver_of(line)
            found["attempts"] = await asyncio.to_thread(places.past_attempts) or (
                _attempts_in(result) if result is not None else []
            )
        return found


class _Places:
    """Where the files of a run have a line; made on the loop, used in a thread."""

    def __init__(self, service: DispatchService, line: int, item: Item | None) -> None:
        settings = service.settings
        self._line = line
        self._input = settings.infile
        self._state_dir = settings.state_dir
        self._output = settings.outfile
        self._history = settings.state_dir / HISTORY_FILE
        observed = service.observed
        self._input_mark = (
            Mark(line, item.offset) if item is not None else observed.input_marks.before(line)
        )
        self._output_mark = observed.output_marks.before(line)

    def input_line(self) -> Piece | None:
        """Return the line of the input, or of the copy of one that could not be seeked."""
        path = copy_of_input(self._state_dir) or self._input
        return read_line(path, self._input_mark, self._line)

    def output_line(self) -> Piece | None:
        """Return the line of the output."""
        return read_line(self._output, self._output_mark, self._line)

    def past_attempts(self) -> list[dict[str, Any]]:
        """Return the attempts that history.jsonl has of the line; a later entry knows them all."""
        try:
            entry = _find_last(self._history, b'{"work_id":%d,' % self._line)
            saved = msgspec.json.decode(entry, type=_Saved) if entry else None
        except (OSError, TooFarError, msgspec.DecodeError, UnicodeDecodeError):
            return []
        if saved is None:
            return []
        attempts = [_attempt(each) for each in saved.attempts]
        if saved.outcome == "ok" or saved.worker:
            last = max((attempt["attempt"] for attempt in attempts), default=0)
            attempts.append(_ended(last + 1, saved.worker, "result", ""))
        return attempts


class _Saved(msgspec.Struct):
    outcome: str = ""
    worker: str = ""
    attempts: list[dict[str, Any]] = []


async def _tried(read: Callable[[], Piece | None]) -> dict[str, Any] | None:
    """Return what a thread read, as JSON has it, or why it could not be read; None: not there."""
    try:
        piece = await asyncio.to_thread(read)
    except TooFarError:
        return {"text": None, "problem": "too far from a known place in a large file"}
    except OSError as error:
        return {"text": None, "problem": f"cannot be read: {error.strerror}"}
    if piece is None:
        return None
    text = piece.data.decode("utf-8", "replace")
    kind = error_kind(piece.data)
    return {
        "text": text,
        "bytes": piece.size,
        "is_cut": len(piece.data) < piece.size,
        **({"error": kind} if kind else {}),
    }


# -------------------------------------------------------------------- what the queue knows


def _state(line: int, item: Item | None, next_work_id: int, written: int) -> dict[str, str]:
    """Return the state of a line in a word, and in a sentence."""
    if line >= next_work_id:
        return {"state": "unread", "says": "it was not handed out yet"}
    if item is None and line < written:
        return {"state": "written", "says": "its result is in the output"}
    if item is None:
        return {"state": "waiting", "says": "its result waits for those of earlier lines"}
    if item.leases:
        return {"state": "leased", "says": "somebody works on it, or holds it ready"}
    if item.condemned:
        return {"state": "condemned", "says": "it ran out of reissues"}
    again = item.history or item.attempt > 1 or item.releases
    return {"state": "ready", "says": f"it waits to be handed out{' again' if again else ''}"}


def _open_facts(item: Item, now: float) -> dict[str, Any]:
    return {
        "leases": [_lease(lease, now) for lease in item.leases],
        "retries": item.retries,
        "crashes": item.crashes,
        "releases": item.releases,
        "attempts": [
            _ended(ended.attempt, ended.worker, ended.kind, ended.reason, solo=ended.solo)
            for ended in item.history
        ],
    }


def _lease(lease: Lease, now: float) -> dict[str, Any]:
    return {
        "worker": lease.worker,
        "held_s": round(now - lease.issued_at, 1),
        "progressed_s": round(now - lease.progressed_at, 1),
        "is_started": not lease.unstarted,
        "solo": lease.solo,
    }


def _ended(
    attempt: int, worker: str, end: str, reason: str, *, solo: bool = False
) -> dict[str, Any]:
    return {"attempt": attempt, "worker": worker, "end": end, "reason": reason, "solo": solo}


def _attempt(saved: dict[str, Any]) -> dict[str, Any]:
    number = saved.get("attempt")
    return _ended(
        number if isinstance(number, int) else 0,
        str(saved.get("worker", "")),
        str(saved.get("kind", "")),
        str(saved.get("reason", "")),
        solo=bool(saved.get("solo")),
    )


class _Attempts(msgspec.Struct):
    attempts: list[dict[str, Any]] = []


class _Tombstone(msgspec.Struct, rename={"error": "__ERROR__"}):
    error: _Attempts


def _attempts_in(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the attempts that a tombstone names, if all of it is there."""
    try:
        tombstone = msgspec.json.decode(result.get("text") or "", type=_Tombstone)
    except (msgspec.DecodeError, RecursionError):
        return []
    return [_attempt(each) for each in tombstone.error.attempts]


# -------------------------------------------------------------------- reading


def read_line(path: Path, begin: Mark, line: int) -> Piece | None:
    """Return line `line` of a file, searched from a place where an earlier one begins.

    None when the file has no such line. Raises TooFarError when that takes too long, OSError.
    """
    end = time.monotonic() + LONGEST_S
    fd = os.open(path, os.O_RDONLY)
    try:
        offset, left = begin.offset, line - begin.line
        while left > 0:
            chunk = os.pread(fd, _CHUNK_BYTES, offset)
            if not chunk:
                return None
            present = chunk.count(b"\n")
            if present >= left:
                offset += len(chunk) - len(chunk.split(b"\n", left)[-1])
                break
            offset, left = offset + len(chunk), left - present
            if time.monotonic() > end:
                raise TooFarError
        return _piece_at(fd, offset, end)
    finally:
        os.close(fd)


def _piece_at(fd: int, offset: int, end: float) -> Piece | None:
    """Return the beginning of the line at a byte, and its length without the line end."""
    data, size = b"", 0
    while chunk := os.pread(fd, _CHUNK_BYTES, offset + size):
        data = data or chunk[:SHOWN_BYTES]
        length = chunk.find(b"\n")
        if length >= 0:
            size += length
            return Piece(data[:size], size)
        size += len(chunk)
        if time.monotonic() > end:
            raise TooFarError
    return Piece(data, size) if size else None


def _read_at(path: Path, offset: int, length: int) -> Piece | None:
    """Return the beginning of a result in the journal; None when that was dropped."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return Piece(os.pread(fd, min(length, SHOWN_BYTES), offset), length)
    finally:
        os.close(fd)


def _find_last(path: Path, beginning: bytes) -> bytes | None:
    """Return the last line of a file that begins so, of at most a chunk; None when none does."""
    end = time.monotonic() + LONGEST_S
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        sought, found, offset, tail = b"\n" + beginning, -1, 0, b"\n"
        while chunk := os.pread(fd, _CHUNK_BYTES, offset):
            place = (tail + chunk).rfind(sought)
            if place >= 0:
                found = offset - len(tail) + place + 1
            tail = (tail + chunk)[-len(sought) :]
            offset += len(chunk)
            if time.monotonic() > end:
                raise TooFarError
        return os.pread(fd, _CHUNK_BYTES, found).split(b"\n", 1)[0] if found >= 0 else None
    finally:
        os.close(fd)
