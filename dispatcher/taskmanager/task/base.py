"""The interface every task has: what the task manager calls, in this order.

    get_next_request() until None  ->  each response to process_result()  ->  again, until
    is_done()  ->  should_retry(), else get_result()

All of it is the task author's code and may raise anything; it is caught at one place, where
the task manager runs a task (taskmanager/execution.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from random import Random
from typing import Any, ClassVar

from dispatcher.errors import TaskFailed, TaskRetry
from dispatcher.taskmanager.backend.request import Request, Response

__all__ = ["Task", "TaskFailed", "TaskRetry"]


class Task(ABC):
    """One work item's workflow.

    `data` is the parsed input line, `context` has `work_id`, `content`, `retry_count` and
    `max_retries`. `args` holds the parameters given by `--task-arg` and `--task-args`.
    """

    args: ClassVar[Mapping[str, Any]] = {}

    record_steps: ClassVar[bool] = False
    """Whether the task asks the same when it is run again with the same answers, so that an item
    that is handed out again need not be begun anew. A class may say False."""

    def __init__(self, data: dict[str, Any], context: Any = None) -> None:
        self.data = data
        self.context = context
        self.retry_reason: str = ""
        self.keep_steps = False

    @cached_property
    def rng(self) -> Random:
        """Random numbers that are the same whenever the item is begun again.

        A task that draws from `random` asks something else then, and recorded answers are void.
        These numbers depend on the run, the line and the number of times the task raised TaskRetry
        to begin anew (with `keep_steps` they stay the same, as the kept steps must fit).
        """
        of_item = [getattr(self.context, name, None) for name in ("run", "work_id")]
        return Random(f"{of_item} {getattr(self.context, 'fresh_starts', 0)}")

    @classmethod  # noqa: B027 (optional hook)
    def setup(cls, args: Mapping[str, Any]) -> None:
        """Run once a process before the first item: load templates, open indexes."""

    @abstractmethod
    def get_next_request(self) -> Request | None:
        """Return a request that can be sent now, or None when there is none at the moment."""

    @abstractmethod
    def process_result(self, result: Response) -> None:
        """Take the response to one of the requests handed out before."""

    @abstractmethod
    def is_done(self) -> bool:
        """Say whether the task has its result, or wants to be retried."""

    @abstractmethod
    def get_result(self) -> tuple[dict[str, Any], Any]:
        """Return the result and the task's context."""

    def should_retry(self) -> bool:
        """Say whether the item should be handed out again instead of being finished."""
        return False


def __getattr__(name: str) -> Any:
    # Existing tasks import GeneratorTask from here; the class lives in its own file.
    if name == "GeneratorTask":
        from dispatcher.taskmanager.task.generator import GeneratorTask

        return GeneratorTask
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
