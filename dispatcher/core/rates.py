"""How fast a run goes, now and before: what its displays draw, and what the time left rests on.

Totals come in every second or so; kept are points, fine ones of the last minutes and coarser ones
further back, so that a run of days costs as much memory as one of an hour.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from dispatcher.core.workers import Worker

RATE_OVER_S = 30.0
"""What "now" means in a rate: long enough for three heartbeats, which bring the tokens."""

LEVELS = ((5.0, 120), (30.0, 240), (600.0, 1152))
"""Seconds between two points, and how many are kept: 10 minutes, 2 hours, 8 days."""

_LEAST_GAP_S = 0.5
_LEAST_LINES = 5
_LEAST_SPAN_S = 10.0


class Totals(NamedTuple):
    """What had become of the run at a time."""

    at_s: float
    done: int = 0
    failed: int = 0
    tokens: int = 0


class Point(NamedTuple):
    """The rates, per second, up to a time. `seq` grows from point to point of all levels."""

    seq: int
    at_s: float
    items: float
    failed: float
    tokens: float


@dataclass(frozen=True, slots=True)
class TimeLeft:
    """An estimate: `seconds` at `items_per_s`, the pace of the last `over_s` seconds."""

    seconds: float
    items_per_s: float
    over_s: float


class _Level:
    """Points `every_s` seconds apart, the last `keep` of them, and the totals at each."""

    def __init__(self, every_s: float, keep: int, begin: Totals) -> None:
        self.every_s = every_s
        self.keep = keep
        self.points: deque[Point] = deque(maxlen=keep)
        self.totals: deque[Totals] = deque([begin], maxlen=keep + 1)


class RunRates:
    """Keeps rates from totals. `now` is any number of seconds that never goes back."""

    def __init__(self) -> None:
        self.seq = 0
        self._recent: deque[Totals] = deque()
        self._levels: list[_Level] = []
        self._idle_until = Totals(0.0)

    def note(self, now: float, done: int, failed: int, tokens: int) -> None:
        """Take the totals as they are now: call it every second or so."""
        totals = Totals(now, done, failed, tokens)
        recent = self._recent
        if not recent:
            self._levels = [_Level(*level, totals) for level in LEVELS]
            self._idle_until = totals
        if done <= self._idle_until.done and not self._has_progress:
            self._idle_until = totals  # engines load for minutes: that is nobody's pace
        if len(recent) > 1 and now - recent[-2].at_s < _LEAST_GAP_S:
            recent[-1] = totals
        else:
            recent.append(totals)
        while len(recent) > 2 and now - recent[1].at_s >= RATE_OVER_S:
            recent.popleft()
        for level in self._levels:
            if now - level.totals[-1].at_s >= level.every_s:
                self._close(level, totals)

    def per_second(self) -> tuple[float, float]:
        """Return items and tokens a second over the last RATE_OVER_S seconds."""
        if len(self._recent) < 2:
            return 0.0, 0.0
        items, _, tokens = _rates(self._recent[0], self._recent[-1])
        return items, tokens

    def time_left(self, lines_left: int) -> TimeLeft | None:
        """Estimate the time for so many lines; None where hardly a line was finished yet.

        By the pace of the last ten minutes, or of longer where in these hardly a line was.
        """
        if not self._recent or lines_left <= 0:
            return None
        now = self._recent[-1]
        for level in self._levels:
            begin = max(level.totals[0], self._idle_until)
            span_s, done = now.at_s - begin.at_s, now.done - begin.done
            if span_s >= _LEAST_SPAN_S and done >= _LEAST_LINES:
                return TimeLeft(lines_left * span_s / done, done / span_s, span_s)
        return None

    def in_status(self, lines_left: int) -> dict[str, Any]:
        """Return `rate` and `time_left` as `/status` has them; 0 lines left: no estimate."""
        items, tokens = self.per_second()
        left = self.time_left(lines_left)
        return {
            "rate": {"items_per_s": round(items, 3), "tokens_per_s": round(tokens, 1)},
            "time_left": {
                "seconds": round(left.seconds, 1),
                "items_per_s": round(left.items_per_s, 3),
                "over_s": round(left.over_s, 1),
            }
            if left is not None
            else None,
        }

    def points_after(self, seq: int) -> list[tuple[float, int, list[Point]]]:
        """Return for each level its seconds, how many points it keeps, and those after `seq`."""
        found: list[tuple[float, int, list[Point]]] = []
        for level in self._levels:
            new: list[Point] = []
            for point in reversed(level.points):
                if point.seq <= seq:
                    break
                new.append(point)
            found.append((level.every_s, level.keep, new[::-1]))
        return found

    @property
    def _has_progress(self) -> bool:
        return bool(self._recent) and self._recent[-1].done > self._idle_until.done

    def _close(self, level: _Level, now: Totals) -> None:
        begin = level.totals[-1] if level.every_s >= RATE_OVER_S else self._recent[0]
        self.seq += 1
        level.points.append(Point(self.seq, now.at_s, *_rates(begin, now)))
        level.totals.append(now)


class WorkerRates:
    """How many lines each worker finishes a second, from how many it had finished before.

    Results come in batches, so that the time between two of them says little.
    """

    _EVERY_S = 5.0
    _KEPT = 7  # so that the oldest is RATE_OVER_S seconds old at least, in the end

    def __init__(self) -> None:
        self._samples: deque[tuple[float, dict[str, int]]] = deque(maxlen=self._KEPT)

    def note(self, now: float, workers: Iterable[Worker]) -> None:
        """Take what the workers have finished: call it every second or so."""
        if not self._samples or now - self._samples[-1][0] >= self._EVERY_S:
            self._samples.append((now, {worker.name: worker.finished for worker in workers}))

    def of(self, worker: Worker, now: float) -> float | None:
        """Return a worker's lines a second; None for one that was only just seen first."""
        for at, finished in self._samples:
            before = finished.get(worker.name)
            if before is not None and now - at >= self._EVERY_S:
                return max(0, worker.finished - before) / (now - at)
        return None


def _rates(begin: Totals, end: Totals) -> tuple[float, float, float]:
    """Return items, failed ones among them, and tokens a second; none of them is negative.

    A failed write takes lines back, and a server that was started again has forgotten tokens.
    """
    seconds = max(end.at_s - begin.at_s, 1e-9)
    return (
        max(0, end.done - begin.done) / seconds,
        max(0, end.failed - begin.failed) / seconds,
        max(0, end.tokens - begin.tokens) / seconds,
    )
