"""Everything that can happen to a work item and must survive a restart, as values.

The work queue changes its durable state only by applying one of these; the journal writes them
in the same order; a restart applies them again. What is not here (who is alive, deadlines,
progress) is rebuilt from what workers do next.
"""

from __future__ import annotations

from typing import Literal

import msgspec

EndKind = Literal["returned", "released", "charged", "crashed"]
"""How a lease ended without a result.

returned: the item was held but not worked on, or nobody is to blame; costs nothing.
released: given back on request (preemption, SIGTERM, Ctrl-C); free, a bounded number of times.
charged:  counts as one of the item's reissues.
crashed:  a worker or its model server died while the item was running.
"""


class Opened(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="open"):
    """The next input line was read: it stands at `offset`, the line after it at `next_offset`."""

    work_id: int
    offset: int
    next_offset: int


class Issued(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="issue"):
    """A lease was given. `heartbeats` says whether its worker is known to send them."""

    work_id: int
    serial: int
    worker: str
    heartbeats: bool
    solo: bool


class Finished(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="result"):
    """A worker's result was taken; `failed` marks an `__ERROR__` line the worker wrote."""

    work_id: int
    serial: int
    failed: bool
    result: msgspec.Raw


class Tombstoned(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="tombstone"):
    """The server wrote the item's `__ERROR__` line; `error` is its kind."""

    work_id: int
    error: str
    result: msgspec.Raw


class LeaseEnded(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="end"):
    """A lease ended without a result; `reason` goes into the item's history."""

    work_id: int
    serial: int
    kind: EndKind
    reason: str
    keep_steps: bool = True


class Absolved(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="absolve"):
    """A crash counted against the item was none: its worker was cut off, not dead.

    `charged` says whether that crash had cost one of its reissues.
    """

    work_id: int
    charged: bool


class Watched(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="watch"):
    """The first heartbeat of the lease's worker came after the lease was given."""

    work_id: int
    serial: int


Event = Opened | Issued | Watched | Finished | Tombstoned | LeaseEnded | Absolved


class Ended(msgspec.Struct, frozen=True, array_like=True):
    """One line of an item's history."""

    attempt: int
    worker: str
    kind: EndKind
    reason: str


class LeaseState(msgspec.Struct, frozen=True, array_like=True):
    """A live lease in a checkpoint."""

    serial: int
    worker: str
    heartbeats: bool
    solo: bool


class ItemState(msgspec.Struct, frozen=True, array_like=True):
    """An open item in a checkpoint."""

    work_id: int
    offset: int
    line_bytes: int
    retries: int
    crashes: int
    releases: int
    attempt: int
    owes_charge: bool
    condemned: bool
    leases: list[LeaseState]
    history: list[Ended]


class Counters(msgspec.Struct):
    """Totals since the run began.

    `done` lines have their result, `failed` of them an `__ERROR__` line. `charged` counts the
    attempts that cost one of an item's reissues, the others leases that ended so.
    """

    done: int = 0
    failed: int = 0
    issued: int = 0
    charged: int = 0
    crashed: int = 0
    released: int = 0
    returned: int = 0
    expired: int = 0
    tombstones: dict[str, int] = msgspec.field(default_factory=dict)


class QueueState(msgspec.Struct, frozen=True):
    """The durable half of the queue, whole: what a checkpoint holds.

    Every line before `first_open` has its result; every line from `next_work_id` on, which
    begins at byte `next_offset` of the input, was never handed out; of those between, the ones
    in `items` are open and the others have their result, which for those in `tombstoned` is a
    tombstone that a late result may still replace.
    """

    first_open: int
    next_work_id: int
    next_offset: int
    next_serial: int
    counters: Counters
    items: list[ItemState]
    tombstoned: list[int] = []
