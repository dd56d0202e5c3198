"""Why a run hands out nothing now, and what was said about that: it survives every restart.

A run pauses when more lines failed than may (core/failures.py), and when an operator says so. Each
of the two lasts until somebody lifts it: counts that look better later, a restart, or the end of
the other pause do not. The queue changes what is remembered here by events alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from dispatcher.core.events import (
    Counters,
    FailureLimitSet,
    FailuresAccepted,
    FailuresPaused,
    FailureState,
    OperatorPaused,
    OperatorResumed,
    QueueState,
    StartHeard,
)
from dispatcher.core.failures import Cause, commonest, parse_failure_limit, percent

PausingEvent = (
    FailureLimitSet
    | FailuresAccepted
    | FailuresPaused
    | OperatorPaused
    | OperatorResumed
    | StartHeard
)

By = Literal["failures", "operator"]
"""Who paused a run: the limit of failed lines, a person."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Nothing is handed out.

    By `failures`: of `done` lines `failed` did when it began, which was more than `limit` allows.
    By an `operator`, who may have given a `reason`. By both: both are to be lifted.
    """

    by: tuple[By, ...]
    reason: str = ""
    limit: str | None = None
    failed: int | None = None
    done: int | None = None
    cause: Cause | None = None

    def __str__(self) -> str:
        said = "paused"
        if "operator" in self.by:
            said += " by an operator" + (f" ({self.reason})" if self.reason else "")
        if self.limit is None or self.failed is None or self.done is None:
            return said
        said += " and" if "operator" in self.by else ","
        share = f" ({percent(self.failed, self.done)})" if self.limit.endswith("%") else ""
        cause = f"; {self.cause}" if self.cause is not None else ""
        return (
            f"{said} as {self.failed} of {self.done} finished lines failed{share}, more than "
            f"--max-failures {self.limit} allows{cause}"
        )


class Pauses:
    """What a run remembers of its pauses. `current` is the one it is in, None when it goes on."""

    def __init__(self) -> None:
        self.failures = FailureState()
        self.operator: OperatorPaused | None = None
        self.heard = ""
        self.current: Pause | None = None

    def restore(self, state: QueueState) -> None:
        """Take over what a checkpoint says."""
        self.failures, self.operator, self.heard = state.failures, state.operator, state.heard
        self.current = self._current()

    def apply(self, event: PausingEvent) -> None:
        """Take what happened. A limit that is named, and accepted failures, end their pause."""
        said, replace = self.failures, msgspec.structs.replace
        if isinstance(event, FailureLimitSet):
            said = replace(said, limit=event.limit, instead_of=event.instead_of, paused=None)
        elif isinstance(event, FailuresAccepted):
            said = replace(
                said,
                accepted_done=event.done,
                accepted_failed=event.failed,
                accepted_errors=event.errors,
                paused=None,
            )
        elif isinstance(event, FailuresPaused):
            said = replace(said, paused=event)
        elif isinstance(event, StartHeard):
            self.heard = event.start
        else:
            self.operator = event if isinstance(event, OperatorPaused) else None
        self.failures = said
        self.current = self._current()

    def limit(self, begun_with: str) -> str:
        """Return the limit in force in a run that was started with the limit `begun_with`."""
        said = self.failures
        return said.limit if said.limit and said.instead_of == begun_with else begun_with

    def too_many(
        self, begun_with: str, counters: Counters, lines: Mapping[str, int]
    ) -> FailuresPaused | None:
        """Return the pause that so many failed lines call for, if they do and there is none yet.

        `lines` has a failed line of each kind of error.
        """
        said = self.failures
        if said.paused is not None:
            return None
        done, failed = counters.done - said.accepted_done, counters.failed - said.accepted_failed
        limit = self.limit(begun_with)
        if not parse_failure_limit(limit).is_exceeded(failed, done):
            return None
        accepted = said.accepted_errors
        errors = {kind: n - accepted.get(kind, 0) for kind, n in counters.errors.items()}
        return FailuresPaused(limit, failed, done, commonest(errors, lines))

    def _current(self) -> Pause | None:
        by: list[By] = []
        about: dict[str, Any] = {}
        if (found := self.failures.paused) is not None:
            by.append("failures")
            about |= msgspec.structs.asdict(found)
        if self.operator is not None:
            by.append("operator")
            about["reason"] = self.operator.reason
        return Pause(tuple(by), **about) if by else None
