"""What the queue is told and what it answers: its limits, leases and how they are named."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from dispatcher.core.failures import NO_LIMIT


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """Limits and times. `max_retries` -1 means never give up; `window` 0 means unlimited.

    `step_bytes` bound one recorded answer, those of an item, and those of all open items; 0 for
    the last one: nothing is recorded. `max_failures` is a FailureLimit as text.
    """

    max_retries: int = 3
    max_failures: str = NO_LIMIT
    work_timeout_s: float = 1200.0
    lease_term_s: float = 30.0
    window: int = 0
    backups: bool = True
    max_free_releases: int = 100
    crashes_before_solo: int = 2
    history_limit: int = 20
    mass_vanish_least: int = 3
    backup_quantile: float = 0.95
    backup_factor: float = 1.5
    step_bytes: int = 1 << 20
    item_step_bytes: int = 16 << 20
    run_step_bytes: int = 64 << 30
    item_steps: int = 4096


class Grant(msgspec.Struct, frozen=True, gc=False):
    """Hand this item to the worker that asked, under this lease."""

    work_id: int
    lease: str
    offset: int
    line_bytes: int
    retries: int
    attempt: int
    solo: bool
    fresh_starts: int


@dataclass(slots=True)
class Verdict:
    """Answer to a heartbeat; the words are those of the wire."""

    done: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    back: list[str] = field(default_factory=list)


def lease_id(work_id: int, serial: int) -> str:
    """Name a lease. The work id is part of it, so that an ended lease still tells its item."""
    return f"{work_id}.{serial}"


def lease_ids(work_ids: Iterable[int], first_serial: int) -> list[str]:
    """Name the leases of these items, whose serials count up from the first."""
    return [f"{work_id}.{serial}" for serial, work_id in enumerate(work_ids, first_serial)]


def parse_lease_id(text: str) -> tuple[int, int] | None:
    """Return (work_id, serial), or None for what never was a lease."""
    work_id, dot, serial = text.partition(".")
    if dot and work_id.isdecimal() and serial.isdecimal() and len(text) <= 40:
        return int(work_id), int(serial)
    return None


class Renewal(msgspec.Struct, frozen=True, gc=False):
    """What became of a lease whose engine died: `ended` now, and `lease` the one to go on under.

    `lease` is None when the item is to be let go; `attempt` is the item's then.
    """

    ended: bool
    lease: str | None = None
    attempt: int = 0
