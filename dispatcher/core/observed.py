"""What is kept of a run for those who watch it: rates, the latest failed lines, where lines stand.

Nothing is decided by any of it, none of it is durable, and all of it is bounded.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from dispatcher.core.events import Event, Finished, Tombstoned
from dispatcher.core.rates import RunRates, WorkerRates
from dispatcher.core.work_queue import Arrivals, WorkQueue
from dispatcher.core.workers import Lease

MOST_ERRORS = 50
MOST_MARKS = 8192
_SMALL_BYTES = 4096
_MESSAGE_CHARACTERS = 300


class FailedLine(msgspec.Struct):
    """A line that failed: the kind of its error, what the error says, and the time of day.

    `worker` gave that result; it is "" where nobody did or it gave no name.
    """

    line: int
    kind: str
    message: str
    at: float
    worker: str = ""


class Mark(NamedTuple):
    """Line `line` of a file begins at byte `offset`."""

    line: int
    offset: int


class LineMarks:
    """Where some lines of a file begin, so that any other one is found without reading it all."""

    def __init__(self) -> None:
        self._marks: list[Mark] = [Mark(0, 0)]
        self._every_lines = 256

    def note(self, line: int, offset: int) -> None:
        """Line `line` begins at byte `offset`; lines come in order, and few of them are kept."""
        if line < self._marks[-1].line + self._every_lines:
            return
        if len(self._marks) >= MOST_MARKS:
            del self._marks[1::2]
            self._every_lines *= 2
        self._marks.append(Mark(line, offset))

    def before(self, line: int) -> Mark:
        """Return the last mark that is not behind this line."""
        return self._marks[bisect_right(self._marks, line, key=lambda mark: mark.line) - 1]


class Observed:
    """Takes totals every second, and every event.

    Whoever writes the output notes in `output_marks` where its next line begins.
    """

    def __init__(self) -> None:
        self.rates = RunRates()
        self.worker_rates = WorkerRates()
        self.input_marks = LineMarks()
        self.output_marks = LineMarks()
        self._failed: deque[tuple[int, str, bytes | str, float, str]] = deque(maxlen=MOST_ERRORS)
        self._givers: dict[int, str] = {}

    def look(self, now: float, queue: WorkQueue, tokens: int) -> None:
        """Take the totals: call it every second."""
        counters = queue.counters
        self.rates.note(now, counters.done, counters.failed, tokens)
        self.worker_rates.note(now, queue.workers.values())
        self.input_marks.note(queue.next_work_id, queue.next_offset)

    def meet(self, arrivals: Arrivals, leases: Mapping[int, Lease]) -> None:
        """Note whose results these are, as long as their leases are known, if lines fail by them.

        They may still turn out to be duplicates, which no event tells.
        """
        work_ids, serials, _, kinds = arrivals
        if not any(kinds):
            return
        for work_id, serial, kind in zip(work_ids, serials, kinds, strict=True):
            if kind and (lease := leases.get(serial or 0)) is not None:
                if len(self._givers) > MOST_ERRORS:
                    self._givers.pop(next(iter(self._givers)))
                self._givers[work_id] = lease.worker

    def see(self, events: Iterable[Event], at: float) -> None:
        """Note which lines failed by these events, at a time of day."""
        for event in events:
            if type(event) is Finished:
                if event.errors:
                    self._see_finished(event, at)
            elif type(event) is Tombstoned:
                self._keep(event.work_id, event.error, bytes(event.result), at)

    def latest_failed(self) -> list[FailedLine]:
        """Return the lines that failed last, the newest first."""
        return [
            FailedLine(line, kind, _told(said), at, giver)
            for line, kind, said, at, giver in reversed(self._failed)
        ]

    def giver_of(self, line: int) -> str:
        """Return the worker whose result made a line fail; "" where it is not known any more."""
        return next((giver for failed, *_, giver in self._failed if failed == line), "")

    def _see_finished(self, event: Finished, at: float) -> None:
        kinds = {line: kind for kind, lines in event.errors.items() for line in lines}
        for line, result in zip(event.work_ids, event.results, strict=True):
            if (kind := kinds.get(line)) is not None:
                self._keep(line, kind, bytes(result), at)

    def _keep(self, line: int, kind: str, result: bytes, at: float) -> None:
        # Most are never shown, so a small one is kept as it is and read when somebody looks.
        told = result if len(result) <= _SMALL_BYTES else error_message(result)
        self._failed.append((line, kind, told, at, self._givers.pop(line, "")))


class _Ended(msgspec.Struct):
    kind: str = ""
    reason: str = ""


class _Error(msgspec.Struct):
    message: object = ""
    attempts: list[_Ended] = []


class _ErrorLine(msgspec.Struct, rename={"error": "__ERROR__"}):
    error: _Error


_decode = msgspec.json.Decoder(_ErrorLine).decode


def error_message(result: bytes) -> str:
    """Return what an `__ERROR__` line says, cut; "" where it says nothing."""
    try:
        error = _decode(result).error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    text = str(error.message or "")
    if not text and error.attempts:
        last = error.attempts[-1]
        text = f"the last attempt: {last.kind}, {last.reason}"
    return text if len(text) <= _MESSAGE_CHARACTERS else text[: _MESSAGE_CHARACTERS - 1] + "…"


def _told(said: bytes | str) -> str:
    return said if isinstance(said, str) else error_message(said)
