"""What the queue believes about the workers: who is alive, how fast, and what each one holds.

None of this is durable. After a restart it is rebuilt from the leases in the journal and from
the next heartbeats.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import msgspec

PROGRESS_UNKNOWN = -1
"""Progress of a lease restored after a restart, until its worker speaks again."""

_PACE_WEIGHT = 0.2


class Lease(msgspec.Struct, eq=False, gc=False):
    """The right of one worker to work on one item for a while.

    `progress` is 0 while the item waits on the worker and grows with every step. `running_since`
    is when work on the item began, as far as is known: when it was handed out, until its worker
    says that it is `started`.
    """

    serial: int
    work_id: int
    worker: str
    heartbeats: bool
    solo: bool
    issued_at: float
    progressed_at: float
    running_since: float
    progress: int = 0
    started: bool = False
    missed_heartbeats: int = 0
    recalled: bool = False

    @property
    def unstarted(self) -> bool:
        """True when the worker is known to hold the item without working on it."""
        return self.heartbeats and self.progress == 0


@dataclass(slots=True, eq=False)
class Worker:
    """One client that names itself. Only one that sends heartbeats has its leases watched."""

    name: str
    last_seen_at: float
    heartbeats: bool = False
    vanished_at: float | None = None
    backend_up: bool = True
    backend_up_since: float = 0.0
    idle_want: int = 0
    pace_s: float | None = None
    last_finish_at: float | None = None
    finished: int = 0
    leases: dict[int, Lease] = field(default_factory=dict)
    # What its vanishing ended, to be given back should it return.
    cut_off: dict[int, tuple[int, bool]] = field(default_factory=dict)

    def note_finishes(self, count: int, now: float) -> None:
        """Update the smoothed seconds between two of this worker's results."""
        self.finished += count
        if self.last_finish_at is not None:
            gap_s = (now - self.last_finish_at) / count
            old = gap_s if self.pace_s is None else self.pace_s
            kept = (1 - _PACE_WEIGHT) ** count
            self.pace_s = kept * old + (1 - kept) * gap_s
        self.last_finish_at = now

    def seconds_to_clear(self, now: float) -> float:
        """Estimate how long this worker needs for what it holds, at its present pace."""
        idle_s = now - (self.last_finish_at or self.last_seen_at)
        return len(self.leases) * max(self.pace_s or 0.0, idle_s / (1 + self.finished))


class Durations:
    """How long items took lately, to tell which ones take far longer."""

    def __init__(self, size: int = 512, least: int = 10) -> None:
        self._recent_s: deque[float] = deque(maxlen=size)
        self._least = least

    def extend(self, seconds: list[float]) -> None:
        """Record the durations of items."""
        self._recent_s.extend(seconds)

    def quantile_s(self, share: float) -> float | None:
        """Return the duration that `share` of the recent items stayed under; None if unknown."""
        if len(self._recent_s) < self._least:
            return None
        ordered = sorted(self._recent_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
