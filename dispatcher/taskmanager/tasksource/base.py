"""What the task manager asks of a source of work, and the older, synchronous interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dispatcher.taskmanager.backend.request import Response
from dispatcher.taskmanager.execution import Answered, Attempt, Outcome
from dispatcher.taskmanager.steps import Asked, StepLog
from dispatcher.taskmanager.task.base import Task


@dataclass(slots=True, eq=False)
class Assignment:
    """One item a worker holds. `progress` is 0 until it is started, then grows with each step.

    `log` has the steps recorded for it; None when its source records none. `is_lost`: its lease
    ended without this worker; its result is welcome all the same, but nobody waits for it here.
    """

    key: str
    build: Callable[[], Task | Answered]
    solo: bool = False
    progress: int = 0
    is_lost: bool = False
    item: Any = None
    log: StepLog | None = None
    cancel: Callable[[], object] | None = field(default=None, repr=False)


class WorkSource(ABC):
    """Asynchronous source of assignments: what the manager drives."""

    @abstractmethod
    async def start(self, wanted: Callable[[], int]) -> None:
        """Begin to fetch. `wanted` says how many items the manager could start right now."""

    @abstractmethod
    async def next(self) -> Assignment | None:
        """Return the next item, or None when there will be no more."""

    def record(  # noqa: B027 (a source may have no use for it)
        self, assignment: Assignment, asked: Asked, response: Response
    ) -> None:
        """Take an answer that the item's task is about to get; returns at once."""

    @abstractmethod
    async def finish(self, assignment: Assignment, attempt: Attempt, outcome: Outcome) -> None:
        """Take the end of an attempt; returns at once, reporting goes on in the background."""

    def give_up(self, assignment: Assignment) -> None:  # noqa: B027 (a source may have no use)
        """Forget a started item that is lost; the caller ends it, and it is not reported."""

    async def crashed(self, assignments: list[Assignment]) -> list[Assignment]:
        """The model server died or hung while it answered requests of these started items.

        Returns those that may go on, asking again what was not answered. The source has forgotten
        the others, and the caller ends them: they are to run alone, or their attempt is over. A
        source whose items are nobody else's keeps all.
        """
        return assignments

    @abstractmethod
    async def give_back(self, assignments: list[Assignment], reason: str) -> None:
        """Give items back unfinished and uncharged, also those not handed to the manager yet."""

    @abstractmethod
    async def close(self) -> None:
        """Return when everything finished so far is reported."""


class TaskSource(ABC):
    """The older, synchronous interface; subclasses run through `compat.SyncSource`."""

    @abstractmethod
    def get_next_tasks(self) -> list[Task]:
        """Return tasks to run; an empty list when there are none at the moment."""

    @abstractmethod
    def save_task_result(self, task: Task) -> None:
        """Take a finished task."""

    @property
    @abstractmethod
    def is_exhausted(self) -> bool:
        """True when there will be no more tasks."""
