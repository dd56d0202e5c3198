"""How many requests a server bears that tells only by refusing and by getting slow.

Additive increase, multiplicative decrease (D. Chiu, R. Jain, "Analysis of the Increase and
Decrease Algorithms for Congestion Avoidance in Computer Networks", 1989): several workers that
share a server come to equal parts of what it bears. As in TCP (RFC 5681) the limit doubles every
round trip as long as nothing is known about the server, and after a dip up to where it was.

What counts, and what follows:

    429, 503                        the server says it: one is enough
    slow first token, 5xx, no answer may be chance: it takes more than a fifth of the answers
    fast                            growth

An answer counts only if its request was sent after the last decrease. The others tell of the
load that the decrease was for: however many they are, a burst costs one decrease.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# What remains of the limit. A sawtooth between 0.8 and 1 of what a server bears uses 90 % of it.
# TCP halves, because a lost packet says that a whole router's buffer is full; CUBIC (RFC 9438)
# keeps 0.7, Netflix's AIMDLimit (concurrency-limits) 0.9. A server in real trouble sees further
# decreases, one a round trip.
_DECREASE = 0.8
# A cumulative sum (E. S. Page, "Continuous Inspection Schemes", 1954): it drifts up when more
# than one answer in five is bad. Four in a row are an alarm; of answers that are bad by chance,
# one in twenty, there is a false alarm about once in 100,000.
_BAD_WEIGHT = 4
_ALARM = 16
_MOST_AT_FIRST = 32


@dataclass(frozen=True, slots=True)
class LimiterPolicy:
    """The bounds of the limit, and what a fast answer is.

    After `recover_threshold` fast answers in a row the limit grows. An answer is fast when its
    first token came within `ttft_threshold_s`, or when nothing is known about that.
    """

    min_concurrent: int = 1
    max_concurrent: int = 64
    recover_threshold: int = 10
    ttft_threshold_s: float | None = 5.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_concurrent <= self.max_concurrent:
            raise ValueError(
                f"min_concurrent ({self.min_concurrent}) must be at least 1 and at most "
                f"max_concurrent ({self.max_concurrent})"
            )
        if self.recover_threshold < 1:
            raise ValueError(f"recover_threshold ({self.recover_threshold}) must be at least 1")


class AdaptiveLimiter:
    """Follows one server: `limit` requests may be in flight now. Times are in seconds."""

    def __init__(self, policy: LimiterPolicy) -> None:
        self.policy = policy
        self.limit = max(policy.min_concurrent, min(policy.max_concurrent // 2, _MOST_AT_FIRST))
        self._threshold_s = math.inf if policy.ttft_threshold_s is None else policy.ttft_threshold_s
        self._decreased_at = -math.inf
        # Fast answers in a row. At the start none has to be waited for.
        self._streak = policy.recover_threshold
        self._badness = 0
        self._grew = False
        # Below this the limit doubles every round trip.
        self._doubles_below = policy.max_concurrent

    def note_answer(
        self, sent_at: float, now: float, ttft_s: float | None, in_flight: int | None = None
    ) -> None:
        """A whole answer came to a request; `ttft_s` is None when it was not streamed.

        With less than half of the limit in flight it tells nothing of a higher one, as of TCP's
        window (RFC 7661).
        """
        if ttft_s is not None and ttft_s > self._threshold_s:
            self.note_failure(sent_at, now)
        elif sent_at > self._decreased_at:
            self._badness = max(0, self._badness - 1)
            if in_flight is not None and in_flight * 2 < self.limit:
                return
            self._streak += 1
            if self._streak >= self.policy.recover_threshold:
                self._grow()

    def note_failure(self, sent_at: float, now: float) -> None:
        """No answer, or an error of the server that need not come from its load (5xx)."""
        if sent_at > self._decreased_at:
            self._streak = 0
            self._badness += _BAD_WEIGHT
            if self._badness >= _ALARM:
                self._decrease(now)

    def note_overload(self, sent_at: float, now: float) -> None:
        """The server refused a request because of its load (429, 503)."""
        if sent_at > self._decreased_at:
            self._decrease(now)

    def _grow(self) -> None:
        if self.limit >= self.policy.max_concurrent:
            return
        self.limit += 1
        self._grew = True
        if self.limit > self._doubles_below:
            self._streak = 0  # else every further fast answer counts, which doubles the limit

    def _decrease(self, now: float) -> None:
        lower = max(self.policy.min_concurrent, int(self.limit * _DECREASE))
        # Decreases without growth between them are one dip: the server may be gone altogether,
        # and what it bore before is then the best guess of what it bears afterwards.
        if self._grew:
            self._doubles_below = lower
        self.limit = lower
        self._decreased_at = now
        self._streak = self._badness = 0
        self._grew = False
