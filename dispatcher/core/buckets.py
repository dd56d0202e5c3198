"""Counts by size: what a histogram of /metrics is made of, at the cost of one bisection."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

CALL_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Of a call's answer; one that waits for work may take as long as it was allowed to wait."""

SYNC_BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Of a write that waits for the disk: a local one is at the beginning, a busy cluster's behind."""

BATCH_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Of the lines in one call."""

COMMIT_BOUNDS_BYTES = tuple(1 << power for power in range(8, 27, 2))
"""Of what is made durable at once: 256 bytes to 64 MiB."""


class Buckets:
    """How often a value lay between which bounds, and the sum of all values.

    One thread observes; another one that reads meanwhile may miss what is just being counted.
    """

    __slots__ = ("_counts", "bounds", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` are inclusive upper ones, growing; one more bucket is for what is above."""
        self.bounds = bounds
        self.total = 0.0
        self._counts = [0] * (len(bounds) + 1)

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Return by upper bound, as Prometheus writes it, how many values were not above it."""
        names = [*map(str, map(float, self.bounds)), "+Inf"]
        return list(zip(names, accumulate(self._counts.copy()), strict=True))
