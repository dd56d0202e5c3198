"""Tasks written as generators: yield requests, get responses, return a dict."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections import deque
from collections.abc import Generator
from typing import Any

from dispatcher.errors import TaskFailed, TaskRetry
from dispatcher.taskmanager.backend.request import Request, Response
from dispatcher.taskmanager.task.base import Task

TaskGenerator = Generator[Any, Any, dict[str, Any]]


class Responses(list[Response]):
    """The answers to a yielded list, in the order yielded.

    Tasks exist that yield a list of one and then call `.get_text()` on what they get, so a list
    of one also answers for its only member.
    """

    def __getattr__(self, name: str) -> Any:
        if len(self) == 1 and not name.startswith("__"):
            return getattr(self[0], name)
        raise AttributeError(
            f"a list of {len(self)} responses has no attribute {name!r}; take one of them first"
        )


class GeneratorTask(Task):
    """Subclass this and write `task_generator`.

    `response = yield Request({...})` asks one thing, `a, b = yield [Request(...), Request(...)]`
    asks several at once, `return {...}` is the item's result. Raise TaskFailed to write an
    `__ERROR__` line, TaskRetry to have the item tried again from the beginning.
    """

    record_steps = True

    def __init__(self, data: dict[str, Any], context: Any = None) -> None:
        super().__init__(data, context)
        self._generator: Generator[Any, Any, Any] | None = None
        self._to_send: deque[Request] = deque()
        # The yield being answered: which place each request has, and what has come back.
        self._places: dict[int, int] = {}
        self._answers: list[Response | None] = []
        self._unanswered = 0
        self._asked_list = False
        self._result: Any = None
        self._done = False
        self._retry = False

    @abstractmethod
    def task_generator(self) -> TaskGenerator:
        """Yield a Request or a list of them; return the result as a dict."""

    def get_next_request(self) -> Request | None:
        """Return the next request of the current yield, or None."""
        if self._generator is None:
            self._generator = self._run()
            self._advance(None)
        return self._to_send.popleft() if self._to_send else None

    def process_result(self, result: Response) -> None:
        """File the response under its request; run on when the yield is answered whole."""
        place = self._places.pop(id(result.request), None)
        if place is None:
            raise ValueError("a response to a request that this task is not waiting for")
        self._answers[place] = result
        self._unanswered -= 1
        if self._unanswered:
            return
        answers = Responses(answer for answer in self._answers if answer is not None)
        self._advance(answers if self._asked_list else answers[0])

    def is_done(self) -> bool:
        """Say whether the generator has returned or raised TaskFailed or TaskRetry."""
        return self._done

    def get_result(self) -> tuple[dict[str, Any], Any]:
        """Return what the generator returned, or the `__ERROR__` of its TaskFailed."""
        return self._result, self.context

    def should_retry(self) -> bool:
        """Say whether the generator raised TaskRetry."""
        return self._retry

    def is_last_retry_attempt(self) -> bool:
        """Say whether a TaskRetry now would be the item's last; False when there is no limit."""
        max_retries = getattr(self.context, "max_retries", None)
        if max_retries is None or max_retries == -1:
            return False
        return bool(getattr(self.context, "retry_count", 0) >= max_retries)

    def build_result(
        self,
        *,
        success: bool = True,
        error: Any = None,
        error_type: str | None = None,
        **payload: Any,
    ) -> dict[str, Any]:
        """Return the input's fields, the payload, and a `task_metadata` that says how it went."""
        metadata = {
            "success": success,
            "error": error,
            "error_type": error_type,
            "retry_count": getattr(self.context, "retry_count", None),
            "max_retries": getattr(self.context, "max_retries", None),
        }
        known = {key: value for key, value in metadata.items() if value is not None}
        return {**self.data, **payload, "task_metadata": known}

    def _run(self) -> Generator[Any, Any, Any]:
        # A task_generator without a yield in it is a plain function that returns its result.
        produced: Any = self.task_generator()
        if isinstance(produced, Generator):
            return (yield from produced)
        return produced

    def _advance(self, value: Response | Responses | None) -> None:
        """Run the generator to its next yield or its end."""
        assert self._generator is not None
        try:
            requests: list[Request] = []
            while not requests:  # an empty list is answered at once, with an empty list
                yielded = self._generator.send(value)
                self._asked_list = isinstance(yielded, list | tuple)
                requests = self._checked(list(yielded) if self._asked_list else [yielded])
                value = Responses()
        except StopIteration as stop:
            self._finish(stop.value)
        except TaskFailed as failure:
            error = {
                "error": str(failure.error_type),
                "message": str(failure.message),
                "task_data": self.data,
            }
            self._finish({"__ERROR__": error})
        except TaskRetry as retry:
            self.retry_reason = retry.message
            self.keep_steps = retry.keep_steps
            self._retry = True
            self._finish(None)
        else:
            self._await(requests)

    def _await(self, requests: list[Request]) -> None:
        self._answers = [None] * len(requests)
        self._unanswered = len(requests)
        self._places = {}
        for place, request in enumerate(requests):
            if id(request) in self._places:
                # Yielded twice: each answer must find its own place, when it is replayed too.
                request = requests[place] = copy.copy(request)
            self._places[id(request)] = place
        self._to_send = deque(requests)
        # The ids stay valid: the generator's frame or _to_send keeps the requests alive, and the
        # caller keeps each one until it is answered.

    @staticmethod
    def _checked(requests: list[Any]) -> list[Request]:
        for request in requests:
            if not isinstance(request, Request):
                raise TypeError(
                    f"task_generator yielded {type(request).__name__}; "
                    "yield a Request or a list of Requests"
                )
        return requests

    def _finish(self, result: Any) -> None:
        self._result, self._done = result, True
        self._places = {}
