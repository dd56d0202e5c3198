"""Failed lines: when there are too many to go on, and when they suddenly become more.

A line failed when its line of output is an `__ERROR__` line, whoever wrote it: the task, the
worker, or the server (a tombstone, a line that cannot be read).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

NO_LIMIT = "off"
LEAST_LINES = 100
"""A share of fewer finished lines than this says too little to pause a run."""

_RECENT_LINES = 100
_RECENT_SAMPLES = 4
_JUMP_LEAST_LINES = 10
_JUMP_LEAST_SHARE = 0.05
_JUMP_FACTOR = 3.0
_JUMP_DEVIATIONS = 8.0
_CALM_SHARE = 0.025
_CALM_FACTOR = 1.5


@dataclass(frozen=True, slots=True)
class FailureLimit:
    """How many lines may fail: a count, or a share (0.05 is 5 %) of the finished ones."""

    share: float | None = None
    count: int | None = None

    def is_exceeded(self, failed: int, done: int) -> bool:
        """Say whether more lines failed than may; a share of too few lines never is."""
        if self.count is not None:
            return failed > self.count
        return self.share is not None and done >= LEAST_LINES and failed > self.share * done


def parse_failure_limit(text: str) -> FailureLimit:
    """Parse `200`, `5%` or `off`. Raises ValueError with a sentence."""
    if text == NO_LIMIT:
        return FailureLimit()
    number, percent, rest = text.partition("%")
    try:
        if percent and not rest and 0 <= float(number) <= 100:
            return FailureLimit(share=float(number) / 100)
        if not percent and int(number) >= 0:
            return FailureLimit(count=int(number))
    except ValueError:
        pass
    raise ValueError(f"{text!r} is neither a number of lines, as 200, nor a share, as 5%, nor off")


@dataclass(frozen=True, slots=True)
class Cause:
    """The commonest kind of error among some failed lines, and one line that has it, if known."""

    kind: str
    count: int
    line: int | None = None

    def __str__(self) -> str:
        example = f", line {self.line} for one" if self.line is not None else ""
        return f"most often {self.kind} ({self.count}{example})"


@dataclass(frozen=True, slots=True)
class Jump:
    """Of the last `done` lines `failed` did, far more than of those before; `before` is a share.

    `before` is None when they were the first lines of all.
    """

    failed: int
    done: int
    before: float | None
    cause: Cause | None

    def __str__(self) -> str:
        then = f", {percent(self.before, 1)} of those before" if self.before is not None else ""
        cause = f"; {self.cause}" if self.cause is not None else ""
        share = percent(self.failed, self.done)
        return f"{self.failed} of the last {self.done} lines failed ({share}{then}){cause}"


def percent(part: float, whole: float) -> str:
    """Return a share for people: 8.3 %."""
    return f"{100 * part / max(1, whole):.1f} %"


def commonest(errors: Mapping[str, int], lines: Mapping[str, int]) -> Cause | None:
    """Return the kind of error that is most frequent; `lines` has a line of each kind."""
    if not errors or max(errors.values()) <= 0:
        return None
    kind = max(errors, key=lambda name: errors[name])
    return Cause(kind, errors[kind], lines.get(kind))


@dataclass(frozen=True, slots=True)
class _Sample:
    done: int
    failed: int
    errors: Mapping[str, int]


class FailureTrend:
    """Compares the lines that ended lately with all that ended before them.

    `jump` is the present one, with the figures of the last lines, None while there is none. It
    lasts until lines fail about as rarely again as before it. Counts of lines, and no clock,
    decide: a slow run is judged by as many lines as a quick one.
    """

    def __init__(self) -> None:
        self.jump: Jump | None = None
        self._samples: deque[_Sample] = deque()

    def note(
        self, done: int, failed: int, errors: Mapping[str, int], lines: Mapping[str, int]
    ) -> None:
        """Take the totals as they are now: call it every second or so.

        `errors` counts the failed lines by kind, `lines` has an example of each kind.
        """
        samples = self._samples
        if not samples or done < samples[-1].done:  # a failed write took lines back
            samples.clear()
            samples.append(_Sample(done, failed, dict(errors)))
            return
        if done - samples[-1].done < _RECENT_LINES // _RECENT_SAMPLES:
            return
        samples.append(_Sample(done, failed, dict(errors)))
        while len(samples) > 2 and done - samples[1].done >= _RECENT_LINES:
            samples.popleft()
        self._judge(samples[0], samples[-1], lines)

    def _judge(self, before: _Sample, now: _Sample, lines: Mapping[str, int]) -> None:
        done, failed = now.done - before.done, now.failed - before.failed
        if done < _RECENT_LINES:
            return
        if self.jump is not None:
            usual = self.jump.before
            is_one = failed >= max(_CALM_SHARE, _CALM_FACTOR * (usual or 0.0)) * done
        else:
            usual = before.failed / before.done if before.done >= _RECENT_LINES else None
            is_one = failed >= _least_of_a_jump(done, (usual or 0.0) * done)
        grown = {kind: n - before.errors.get(kind, 0) for kind, n in now.errors.items()}
        self.jump = Jump(failed, done, usual, commonest(grown, lines)) if is_one else None


def _least_of_a_jump(done: int, expected: float) -> float:
    """Return how many of `done` lines must fail where `expected` ones usually do.

    Several deviations of chance more, also where next to nothing is expected.
    """
    return max(
        _JUMP_LEAST_LINES,
        _JUMP_LEAST_SHARE * done,
        _JUMP_FACTOR * expected,
        expected + _JUMP_DEVIATIONS * math.sqrt(expected + 1),
    )
