"""Why a run hands out nothing now, and what was said about that: it survives every restart.

A run pauses when more lines failed than may (core/failures.py), and when an operator says so. Each
of the two lasts until somebody lifts it: counts that look better later, a restart, or the end of
the other pause do not. The queue changes what is remembered here by events alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec

from dispatcher.core.events import (
    Counters,
    FailureLimitSet,
    FailuresAccepted,
    FailuresPaused,
    FailureState,
)
from dispatcher.core.failures import Cause, commonest, parse_failure_limit, percent

PausingEvent = FailureLimitSet | FailuresAccepted | FailuresPaused

By = Literal["failures"]
"""Who paused a run: the limit of failed lines."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Nothing is handed out.

    By `failures`: of `done` lines `failed` did when it began, which was more than `limit` allows.
    """

    by: tuple[By, ...]
    limit: str
    failed: int
    done: int
    cause: Cause | None

    def __str__(self) -> str:
        share = f" ({percent(self.failed, self.done)})" if self.limit.endswith("%") else ""
        cause = f"; {self.cause}" if self.cause is not None else ""
        return (
            f"paused, as {self.failed} of {self.done} finished lines failed{share}, more than "
            f"--max-failures {self.limit} allows{cause}"
        )


class Pauses:
    """What a run remembers of its pauses. `current` is the one it is in, None when it goes on."""

    def __init__(self, failures: FailureState | None = None) -> None:
        self.failures = failures or FailureState()
        self.current = self._current()

    def apply(self, event: PausingEvent) -> None:
        """Take what happened. A limit that is named, and accepted failures, end their pause."""
        said, replace = self.failures, msgspec.structs.replace
        if isinstance(event, FailureLimitSet):
            said = replace(said, limit=event.limit, instead_of=event.instead_of, paused=None)
        elif isinstance(event, FailuresAccepted):
            said = replace(
                said, accepted_done=event.done, accepted_failed=event.failed, paused=None
            )
        else:
            said = replace(said, paused=event)
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
        return FailuresPaused(limit, failed, done, commonest(counters.errors, lines))

    def _current(self) -> Pause | None:
        found = self.failures.paused
        if found is None:
            return None
        return Pause(("failures",), found.limit, found.failed, found.done, found.cause)
