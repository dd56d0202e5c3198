"""The types that travel on the wire (see docs/protocol.md for every call and reply).

The first fields of each type are what existing clients and servers know; everything added
later has a default, so either side may be older than the other.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class WorkStatus(StrEnum):
    """What a reply to a call for work means."""

    OK = "OK"
    ALL_WORK_COMPLETE = "all_work_complete"
    RETRY = "retry"
    SERVER_UNAVAILABLE = "server_unavailable"


class Outcome(StrEnum):
    """What became of one submitted result."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    INVALID = "invalid"
    WRONG_RUN = "wrong_run"
    UNKNOWN = "unknown"


class StepOutcome(StrEnum):
    """What became of one step that was handed in for recording."""

    ACCEPTED = "accepted"
    STALE = "stale"
    FULL = "full"
    INVALID = "invalid"
    WRONG_RUN = "wrong_run"


class Step(msgspec.Struct, gc=False):
    """A recorded step on its way to a worker.

    `pos` is the position of the request in its task (number of the yield, place in the list that
    was yielded, both from 0), `hash` that of the request, `response` the answer as JSON text.
    """

    pos: tuple[int, int]
    hash: str
    response: str


class WorkItem(msgspec.Struct, gc=False):
    """One input line on its way to a worker, and its result on the way back.

    `work_id` is the 0-based line number, `content` the line as text, `retry_count` how many of
    its reissues were charged, of at most `max_retries` (-1: no limit). `lease` is the right to
    work on it and must be sent back with the result; `solo` asks that nothing else runs on the
    same engine meanwhile, because the item was running when engines died. `steps` are the answers
    its task got already, `fresh_starts` how often it asked to begin anew (TaskRetry).
    """

    work_id: int
    content: str
    result: str | None = None
    retry_count: int = 0
    max_retries: int | None = None
    run: str | None = None
    lease: str | None = None
    attempt: int = 1
    solo: bool = False
    steps: list[Step] | None = None
    fresh_starts: int = 0

    def set_result(self, result: str) -> None:
        """Attach the result: a string that holds one JSON value on one line."""
        self.result = result


class BatchWorkResponse(msgspec.Struct):
    """Reply to a call for work; `retry_in` is in seconds and set when status is `retry`."""

    status: WorkStatus
    retry_in: float | None = None
    items: list[WorkItem] = msgspec.field(default_factory=list)


class ResultItem(msgspec.Struct, gc=False):
    """What the server reads of a submitted item; clients may send whole WorkItems."""

    work_id: int
    result: str | None = None
    run: str | None = None
    lease: str | None = None


class BatchResultSubmission(msgspec.Struct, omit_defaults=True):
    """Finished items; with `want`, N more items are asked for in the same call."""

    items: list[WorkItem]
    worker: str | None = None
    want: int = 0


class BatchResultResponse(msgspec.Struct):
    """`count` items have their result now; `outcomes` tells each item's fate, in order."""

    status: WorkStatus
    count: int = 0
    outcomes: list[Outcome] = msgspec.field(default_factory=list)
    work: BatchWorkResponse | None = None


class ReleaseItem(msgspec.Struct, omit_defaults=True):
    """One lease given back. `charge` says whether it counts as one of the item's reissues.

    `reason` is one word or sentence for the item's history; the reason `crash` means that the
    model server died while the item was running. `steps` is `keep` or `drop`; with `keep`, those
    of the first `keep_yields` yields stay, or all (None). `fresh_start`: the task asked to begin
    anew. `renew`, with the reason `crash`, uncharged, all steps kept: the worker lives and would
    go on with the item, under a new lease.
    """

    work_id: int
    lease: str | None = None
    charge: bool = True
    reason: str = "released"
    steps: str = "keep"
    keep_yields: int | None = None
    fresh_start: bool = False
    renew: bool = False


class ReleaseWorkRequest(msgspec.Struct, omit_defaults=True):
    """Items given back unfinished: by id alone (charged) or one by one with their leases."""

    work_ids: list[int] = msgspec.field(default_factory=list)
    items: list[ReleaseItem] = msgspec.field(default_factory=list)
    worker: str | None = None


class RenewedLease(msgspec.Struct):
    """An item that the worker keeps: what it held under `lease` it now holds under `renewed`."""

    work_id: int
    lease: str
    renewed: str
    attempt: int


class ReleaseWorkResponse(msgspec.Struct):
    """`released_count` leases ended by this call; `renewed` of their items go on (see above).

    Items that asked for it and are not in `renewed` are no longer the worker's.
    """

    status: WorkStatus
    released_count: int = 0
    renewed: list[RenewedLease] | msgspec.UnsetType = msgspec.UNSET


class StepItem(msgspec.Struct, omit_defaults=True, gc=False):
    """One step of an item handed in for recording.

    `response` is the answer as one JSON value on one line. None instead says that the task asks
    something else here than recorded, of which `hash` is the hash, and drops what is recorded
    from this position on.
    """

    work_id: int
    lease: str
    attempt: int
    pos: tuple[int, int]
    hash: str
    response: str | None = None
    run: str | None = None


class StepsSubmission(msgspec.Struct, omit_defaults=True):
    """Steps of items that have more to do."""

    steps: list[StepItem]
    worker: str | None = None


class StepsResponse(msgspec.Struct):
    """`outcomes` tells each step's fate, in order; `recording` False: send no more of any item."""

    status: WorkStatus
    outcomes: list[StepOutcome] = msgspec.field(default_factory=list)
    recording: bool = True


LATENCY_BOUNDS_S = (
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
    *(20.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
"""Upper bounds, in seconds and inclusive, of all buckets of a Histogram but the last."""

MAX_MODELS = 32
"""Models that one worker tells apart in its heartbeats."""

MAX_MODEL_NAME = 256
"""Characters of a model's name in a heartbeat."""

OTHER_MODELS = "other"
"""The name under which the models that are too many to be told apart are added up."""


class Histogram(msgspec.Struct, omit_defaults=True):
    """How long something took, how often: `counts` by bucket of LATENCY_BOUNDS_S.

    The counts are not cumulative, and there is one more of them than bounds, for what took longer
    than the last; none at all when nothing was measured. `total` is the sum in seconds.
    """

    counts: list[int] = msgspec.field(default_factory=list)
    total: float = 0.0

    @property
    def count(self) -> int:
        """How many were measured."""
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        """The mean in seconds; None when nothing was measured."""
        return self.total / count if (count := self.count) else None

    def add(self, other: Histogram) -> None:
        """Take what the other one counted into this one."""
        if not self.counts:
            self.counts = other.counts.copy()
        elif other.counts:
            self.counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    def quantile(self, share: float) -> float | None:
        """Estimate below how many seconds a share (0 to 1) of them stayed; None when empty.

        Linear within the bucket, as Prometheus's `histogram_quantile`: what lies in the last
        bucket counts as the last bound.
        """
        rank = share * self.count
        below, low = 0, 0.0
        for count, high in zip(self.counts, LATENCY_BOUNDS_S, strict=False):
            if count and below + count >= rank:
                return low + (high - low) * (rank - below) / count
            below, low = below + count, high
        return low if self.count else None


class ModelStats(msgspec.Struct, omit_defaults=True):
    """What became of the requests to one model: totals since the worker started, and two gauges.

    `requests` were answered, `errors` were given to tasks as `Response.error`, `retried` are tries
    that failed (5xx, time-out) and were repeated, `overloads` replies that said "too much"
    (429, 503), `restarts` those of its engine. The gauges are `in_flight`, requests being answered
    now, and `limit`, how many of them there may be. `latency` is measured from sending a request
    to the end of its answer, `ttft` to its first token, where answers are streamed.
    """

    requests: int = 0
    errors: int = 0
    retried: int = 0
    overloads: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    in_flight: int = 0
    limit: int = 0
    restarts: int = 0
    ttft: Histogram = msgspec.field(default_factory=Histogram)
    latency: Histogram = msgspec.field(default_factory=Histogram)

    def add(self, other: ModelStats) -> None:
        """Take the totals and gauges of another worker into these."""
        self.add_totals(other)
        self.in_flight += other.in_flight
        self.limit += other.limit

    def add_totals(self, other: ModelStats) -> None:
        """Take the totals of a worker that is gone into these: its gauges are over."""
        self.requests += other.requests
        self.errors += other.errors
        self.retried += other.retried
        self.overloads += other.overloads
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.restarts += other.restarts
        self.ttft.add(other.ttft)
        self.latency.add(other.latency)


class WorkerStats(msgspec.Struct, omit_defaults=True):
    """A worker's totals since it started, for progress displays.

    `replayed` are recorded answers that were used again. `slow_steps` are stretches of task code
    between two requests that held others up, `longest_step_s` the longest of all stretches.
    `models` tells the requests apart by model, at most MAX_MODELS of them.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    in_flight: int = 0
    replayed: int = 0
    slow_steps: int = 0
    longest_step_s: float = 0.0
    models: dict[str, ModelStats] = msgspec.field(default_factory=dict)


class HeartbeatRequest(msgspec.Struct, omit_defaults=True):
    """A worker is alive and holds these leases.

    `held` maps each lease to its progress: 0 while the item waits on the worker, then a number
    that grows with every step. `lag_s` is how late the worker's event loop runs.
    """

    worker: str
    held: dict[str, int] = msgspec.field(default_factory=dict)
    backend: str = "up"
    lag_s: float = 0.0
    stats: WorkerStats | None = None


class HeartbeatResponse(msgspec.Struct):
    """`done`: drop it; `lost`: keep going, the result is welcome; `back`: give back if unstarted.

    `pause` asks the worker to start nothing new. `lease_term_s` is how long the server waits for
    the next heartbeat before it believes the worker dead.
    """

    status: WorkStatus
    lease_term_s: float = 30.0
    done: list[str] = msgspec.field(default_factory=list)
    lost: list[str] = msgspec.field(default_factory=list)
    back: list[str] = msgspec.field(default_factory=list)
    pause: bool = False
