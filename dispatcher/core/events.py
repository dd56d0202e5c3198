"""Everything that can happen to a work item and must survive a restart, as values.

The work queue changes its durable state only by applying one of these; the journal writes them
in the same order; a restart applies them again. What is not here (who is alive, deadlines,
progress) is rebuilt from what workers do next.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from dispatcher.core.failures import Cause

EndKind = Literal["returned", "released", "charged", "crashed"]
"""How a lease ended without a result.

returned: the item was held but not worked on, or nobody is to blame; costs nothing.
released: given back on request (preemption, SIGTERM, Ctrl-C); free, a bounded number of times.
charged:  counts as one of the item's reissues.
crashed:  a worker or its model server died while the item was running.
"""


OTHER_ERRORS = "other"
_MOST_KINDS = 100

Position = tuple[int, int]
"""Where a request stands in its task: number of the yield, place in the list that was yielded."""


class Opened(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="open"):
    """The next input lines were read: the first is `work_id` and stands at byte `offset`.

    `sizes` holds the bytes of each line, its line end included.
    """

    work_id: int
    offset: int
    sizes: list[int]


class Issued(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="issue"):
    """Leases were given to one worker: number `serial` for the first item, then one up each.

    `heartbeats` says whether the worker is known to send them.
    """

    worker: str
    heartbeats: bool
    solo: bool
    serial: int
    work_ids: list[int]


class IssuedFresh(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="fresh"):
    """The next input lines were read and leased to one worker at once, as most lines are.

    The first is `work_id`, stands at byte `offset` and is leased under number `serial`; the others
    count up from there. `sizes` and `heartbeats` are those of Opened and Issued.
    """

    worker: str
    heartbeats: bool
    serial: int
    work_id: int
    offset: int
    sizes: list[int]

    def parts(self) -> tuple[Opened, Issued]:
        """Return the two events that it stands for."""
        work_ids = [*range(self.work_id, self.work_id + len(self.sizes))]
        opened = Opened(self.work_id, self.offset, self.sizes)
        return opened, Issued(self.worker, self.heartbeats, False, self.serial, work_ids)


class Finished(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="results"):
    """Workers' results were taken, `results[i]` for line `work_ids[i]` under lease `serials[i]`.

    The serial is 0 when the client named no lease. `errors` names, by the kind of error, the
    lines among them whose result is an `__ERROR__` line.
    """

    work_ids: list[int]
    serials: list[int]
    errors: dict[str, list[int]]
    results: list[msgspec.Raw]


class Tombstoned(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="tombstone"):
    """The server wrote the item's `__ERROR__` line; `error` is its kind."""

    work_id: int
    error: str
    result: msgspec.Raw


class LeaseEnded(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="end"):
    """A lease ended without a result; `reason` goes into the item's history.

    Of the item's recorded steps those of the first `keep_yields` yields stay (None: all).
    `fresh_start` says that the task asked to begin anew.
    """

    work_id: int
    serial: int
    kind: EndKind
    reason: str
    keep_yields: int | None = None
    fresh_start: bool = False


class Stepped(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="step"):
    """A request of the item's task was answered; `hash` is that of the request."""

    work_id: int
    serial: int
    position: Position
    hash: str
    response: msgspec.Raw


class StepsCut(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="cut"):
    """From this position on the task asks something else than recorded: those steps are void."""

    work_id: int
    position: Position


class Absolved(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="absolve"):
    """A crash counted against the item was none: its worker was cut off, not dead."""

    work_id: int
    worker: str


class FailureLimitSet(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="limit"):
    """Somebody changed how many lines may fail while the run went on.

    It holds as long as a start of the run names the limit that it took the place of.
    """

    limit: str
    instead_of: str


class FailuresAccepted(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="accept"):
    """The lines that failed so far count no more against the limit: `failed` of `done` lines.

    `errors` counts them by kind.
    """

    done: int
    failed: int
    errors: dict[str, int] = {}


class FailuresPaused(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="too-many"):
    """More lines failed than may: of `done` lines `failed` did, which `limit` does not allow.

    Nothing is handed out until a limit is named or the failures are accepted; whoever finishes
    lines meanwhile may bring their share below the limit again, and that changes nothing.
    """

    limit: str
    failed: int
    done: int
    cause: Cause | None = None


class OperatorPaused(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="pause"):
    """Somebody said that nothing is to be handed out, until somebody says otherwise.

    `reason` is what they gave for it, or empty.
    """

    reason: str


class OperatorResumed(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="resume"):
    """Somebody lifted the operator's pause."""


class StartHeard(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="heard"):
    """What the start of this name was told to do once is done: it is not done again for it."""

    start: str


class Watched(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="watch"):
    """The first heartbeat of the lease's worker came after the lease was given."""

    work_id: int
    serial: int


class Joined(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="join"):
    """A worker sent its first heartbeat: after a restart, too, its leases are watched at once."""

    worker: str


class Left(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="leave"):
    """A worker has been silent for so long that it is forgotten."""

    worker: str


Event = (
    Opened
    | Issued
    | IssuedFresh
    | Watched
    | Finished
    | Tombstoned
    | LeaseEnded
    | Stepped
    | StepsCut
    | Absolved
    | FailureLimitSet
    | FailuresAccepted
    | FailuresPaused
    | OperatorPaused
    | OperatorResumed
    | StartHeard
    | Joined
    | Left
)


class Ended(msgspec.Struct, frozen=True, array_like=True):
    """One line of an item's history; `solo` tells that nothing else ran beside it."""

    attempt: int
    worker: str
    kind: EndKind
    reason: str
    solo: bool = False


class Past(msgspec.Struct, frozen=True):
    """What a finished line went through that did not go well at the first attempt.

    `outcome` is `ok` or the kind of its `__ERROR__`; `worker` had the oldest lease then, "" when
    nobody had one. `attempts` are those that failed.
    """

    work_id: int
    outcome: str
    worker: str
    attempts: list[Ended]


class LeaseState(msgspec.Struct, frozen=True, array_like=True):
    """A live lease in a checkpoint."""

    serial: int
    worker: str
    heartbeats: bool
    solo: bool


class StepState(msgspec.Struct, frozen=True, array_like=True):
    """A recorded step in a checkpoint: its answer has `size` bytes."""

    position: Position
    hash: str
    size: int


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
    fresh_starts: int = 0
    steps: list[StepState] = []


class Counters(msgspec.Struct):
    """Totals since the run began.

    `done` lines have their result, `failed` of them an `__ERROR__` line, `errors` by kind (the
    first hundred kinds; OTHER_ERRORS for the rest). `charged` counts the
    attempts that cost one of an item's reissues, the others leases that ended so. `steps` were
    recorded; `step_mismatches` counts how often a task asked something else than recorded.
    """

    done: int = 0
    failed: int = 0
    issued: int = 0
    charged: int = 0
    crashed: int = 0
    released: int = 0
    returned: int = 0
    expired: int = 0
    steps: int = 0
    step_mismatches: int = 0
    tombstones: dict[str, int] = msgspec.field(default_factory=dict)
    errors: dict[str, int] = msgspec.field(default_factory=dict)

    def copy(self) -> Counters:
        """Return the totals as they are now."""
        return msgspec.structs.replace(
            self, tombstones=dict(self.tombstones), errors=dict(self.errors)
        )

    def add_errors(self, kind: str, count: int) -> None:
        """Count `__ERROR__` lines of one kind; `count` is below 0 when one is replaced."""
        if kind not in self.errors and len(self.errors) >= _MOST_KINDS:
            kind = OTHER_ERRORS
        self.failed += count
        left = self.errors.get(kind, 0) + count
        if left > 0:
            self.errors[kind] = left
        else:
            self.errors.pop(kind, None)


class FailureState(msgspec.Struct, frozen=True, array_like=True):
    """What was said about failed lines while the run went on; see the three events."""

    accepted_done: int = 0
    accepted_failed: int = 0
    limit: str = ""
    instead_of: str = ""
    paused: FailuresPaused | None = None
    accepted_errors: dict[str, int] = {}


class QueueState(msgspec.Struct, frozen=True):
    """The durable half of the queue, whole: what a checkpoint holds.

    Every line before `first_open` has its result; every line from `next_work_id` on, which
    begins at byte `next_offset` of the input, was never handed out; of those between, the ones
    in `items` are open and the others have their result, which for those in `tombstoned` is a
    tombstone that a late result may still replace. `workers` names those that send heartbeats,
    `heard` the start that was heard last.
    """

    first_open: int
    next_work_id: int
    next_offset: int
    next_serial: int
    counters: Counters
    items: list[ItemState]
    tombstoned: list[int] = []
    workers: list[str] = []
    failures: FailureState = FailureState()
    operator: OperatorPaused | None = None
    heard: str = ""
