"""One attempt at one item: the only place where task code is called and its errors are caught.

`begin` and `answer` run on a step thread and return either requests to send or how it ended.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dispatcher.errors import TaskFailed, TaskRetry
from dispatcher.models import WorkItem
from dispatcher.taskmanager.backend.request import Request, Response
from dispatcher.taskmanager.steps import Asked, StepLog
from dispatcher.taskmanager.task.base import Task

MAX_RESULT_BYTES = 16 << 20
_SHOWN_CHARACTERS = 4000


@dataclass(frozen=True, slots=True)
class Answered:
    """The item has its line of output: one JSON value on one line."""

    result: str


@dataclass(frozen=True, slots=True)
class WantsRetry:
    """The task asked to be tried again; `keep_steps`: only its last yield is to be asked anew."""

    reason: str
    keep_steps: bool = False


@dataclass(frozen=True, slots=True)
class Raised:
    """The task let an exception out; `message` and `place` say which and where."""

    message: str
    place: str


Outcome = Answered | WantsRetry | Raised
Step = list[Asked] | Outcome


class Attempt:
    """Drives one task through the Task interface.

    `log` holds what its requests were answered before, None when nothing is recorded. `yields` is
    how often the task asked, which for a generator is the number of its yields so far.
    """

    def __init__(self, build: Callable[[], Task | Answered], log: StepLog | None = None) -> None:
        self._build = build
        self._log = log
        self._unanswered = 0
        self.yields = 0
        self.task: Task | None = None

    def begin(self) -> Step:
        """Build the task and run it to its first requests."""
        return self._guarded(self._begin)

    def answer(self, responses: Sequence[Response]) -> Step:
        """Hand responses to the task and run it on."""
        return self._guarded(lambda: self._answer(responses))

    def _begin(self) -> Step:
        built = self._build()
        if isinstance(built, Answered):
            return built
        self.task = built
        if not built.record_steps:
            self._log = None
        return self._proceed(built)

    def _answer(self, responses: Sequence[Response]) -> Step:
        assert self.task is not None
        if self._log is not None:
            self._log.taken += len(responses)
        for response in responses:
            self._unanswered -= 1
            self.task.process_result(response)
        return self._proceed(self.task)

    def _proceed(self, task: Task) -> Step:
        to_ask: list[Asked] = []
        while new := self._take_requests(task):
            left = self._replay(task, new)
            to_ask += left
            if len(left) == len(new):
                break  # nothing was answered, so the task has nothing more to ask
        if task.is_done():
            return self._end(task)
        if not self._unanswered:
            return Answered(
                error_line("task_stuck", "the task is not done but asks nothing", task.data)
            )
        return to_ask

    def _take_requests(self, task: Task) -> list[Asked]:
        """Return what the task asks now."""
        new: list[Asked] = []
        while (request := task.get_next_request()) is not None:
            if not isinstance(request, Request):
                raise TypeError(f"get_next_request returned {type(request).__name__}, no Request")
            position = (self.yields, len(new))
            new.append(self._log.ask(request, position) if self._log else Asked(request, position))
        self.yields += bool(new)
        self._unanswered += len(new)
        return new

    def _replay(self, task: Task, asked: list[Asked]) -> list[Asked]:
        """Answer what was answered before; return what is left for the model."""
        if self._log is None:
            return asked
        left: list[Asked] = []
        for one in asked:
            if (response := self._log.replay(one)) is None:
                left.append(one)
            else:
                self._unanswered -= 1
                task.process_result(response)
        return left

    def _end(self, task: Task) -> Outcome:
        if task.should_retry():
            reason = str(getattr(task, "retry_reason", ""))
            return WantsRetry(reason, bool(getattr(task, "keep_steps", False)))
        result, _ = task.get_result()
        return Answered(result_line(result, task.data))

    def _guarded(self, call: Callable[[], Step]) -> Step:
        try:
            try:  # the texts of these two are the author's too, and may not be texts
                return call()
            except TaskFailed as failure:
                data = self.task.data if self.task is not None else None
                return Answered(error_line(str(failure.error_type), str(failure.message), data))
            except TaskRetry as retry:
                return WantsRetry(str(retry.message), bool(retry.keep_steps))
        except BaseException as error:  # noqa: BLE001
            # Task code may raise anything, SystemExit included; one item pays, nothing else.
            return Raised(f"{type(error).__name__}: {_text_of(error)}", _place_of(error))


def task_of_line(task_class: type[Task], item: WorkItem) -> Task | Answered:
    """Build the task of a work item from a fresh parse of its line.

    A line that is no JSON object has its answer already: an `__ERROR__` line.
    """
    try:
        data = json.loads(item.content)
    except (ValueError, RecursionError) as error:
        return Answered(_bad_line("invalid_json", f"the line is not JSON: {error}", item))
    if not isinstance(data, dict):
        kind = type(data).__name__
        return Answered(_bad_line("not_an_object", f"the line is a JSON {kind}, no object", item))
    return task_class(data, item)


def result_line(result: Any, data: dict[str, Any]) -> str:
    """Return a task's result as a line, or the `__ERROR__` line of a result that cannot be one."""
    if not isinstance(result, dict):
        return error_line(
            "result_not_dict", f"the task returned {type(result).__name__}, not a dict", data
        )
    try:
        line = json.dumps(result, ensure_ascii=False, allow_nan=False)
        size = len(line.encode())
    except (TypeError, ValueError, RecursionError) as error:
        return error_line("result_not_json", f"the task's result is not JSON: {error}", data)
    if size > MAX_RESULT_BYTES:
        message = f"the task's result has {size} bytes; the limit is {MAX_RESULT_BYTES}"
        return error_line("result_too_large", message, None)
    return line


def exception_line(raised: Raised, item: WorkItem) -> str:
    """Return the `__ERROR__` line of an item whose last attempt raised."""
    error = {
        "error": "task_exception",
        "message": raised.message,
        "place": raised.place,
        "work_id": item.work_id,
        "original_content": item.content,
    }
    return _dump({"__ERROR__": error})


def error_line(error_type: str, message: str, data: dict[str, Any] | None) -> str:
    """Return an `__ERROR__` line that carries the task's data where that is JSON."""
    error: dict[str, Any] = {"error": error_type, "message": message, "task_data": data}
    try:
        line = json.dumps({"__ERROR__": error}, ensure_ascii=False, allow_nan=False)
        if len(line.encode()) <= MAX_RESULT_BYTES:
            return line
    except (TypeError, ValueError, RecursionError):
        pass
    error["task_data"] = None
    return _dump({"__ERROR__": error})


def _bad_line(error_type: str, message: str, item: WorkItem) -> str:
    error = {
        "error": error_type,
        "message": message,
        "work_id": item.work_id,
        "original_content": item.content,
    }
    return _dump({"__ERROR__": error})


def _dump(value: Any) -> str:
    # An exception's message may hold half a surrogate pair, which UTF-8 cannot.
    line = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode()
    if len(line) <= MAX_RESULT_BYTES // 4:
        return line
    error = value["__ERROR__"]
    for key, text in error.items():
        if isinstance(text, str):
            error[key] = text[:_SHOWN_CHARACTERS]
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode()


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as second:  # noqa: BLE001 (the author's __str__ may raise anything)
        return f"(its message cannot be had: {type(second).__name__})"


def _place_of(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    last = frames[-1]
    return f"{last.filename}:{last.lineno} in {last.name}"
