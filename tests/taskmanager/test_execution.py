"""Every way an attempt can end: each is one item's end, and none is an exception."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from dispatcher.errors import TaskFailed, TaskRetry
from dispatcher.models import WorkItem
from dispatcher.taskmanager import execution
from dispatcher.taskmanager.backend.request import Request, Response
from dispatcher.taskmanager.execution import (
    Answered,
    Attempt,
    Outcome,
    Raised,
    Step,
    WantsRetry,
    exception_line,
    result_line,
    task_of_line,
)
from dispatcher.taskmanager.task import GeneratorTask, Task
from tests.taskmanager.doubles import TaskGenerator, answer, ask, said, task_of

LONE = "\ud83d"  # half of an emoji, as a text cut in the middle has it


def play(
    generator: Callable[[Any], Any] | type[Task],
    line: str = '{"n": 1}',
    reply: Callable[[Request], Response] = answer,
) -> Outcome:
    """Run an attempt at a line to its end, with every request answered in turn."""
    task_class = generator if isinstance(generator, type) else task_of(generator)
    attempt = Attempt(lambda: task_of_line(task_class, WorkItem(5, line)))
    step: Step = attempt.begin()
    while isinstance(step, list):
        assert step, "a task that waits for nothing must have ended"
        step = attempt.answer([reply(asked.request) for asked in step])
    return step


def requests_of(step: Step) -> list[Request]:
    """Return what the task asks."""
    assert isinstance(step, list), step
    return [asked.request for asked in step]


def value(outcome: Outcome) -> Any:
    """Return the JSON value of an answered item; it is one line that UTF-8 can hold."""
    assert isinstance(outcome, Answered), outcome
    assert "\n" not in outcome.result
    outcome.result.encode()
    return json.loads(outcome.result, parse_constant=pytest.fail)


def error(outcome: Outcome) -> Any:
    return value(outcome)["__ERROR__"]


# --- results ------------------------------------------------------------------------------------


def test_what_the_generator_returns_is_the_items_line() -> None:
    def generator(self: Any) -> TaskGenerator:
        response = yield ask("a")
        return {"n": self.data["n"], "text": response.get_text(), "ü": "ä\nb"}

    outcome = play(generator)

    assert value(outcome) == {"n": 1, "text": "yes", "ü": "ä\nb"}
    assert isinstance(outcome, Answered)
    assert "ü" in outcome.result  # as text, not as an escape


def test_a_task_that_yields_nothing_has_its_result_at_once() -> None:
    def generator(self: Any) -> TaskGenerator:
        return {"doubled": self.data["n"] * 2}
        yield

    assert value(play(generator)) == {"doubled": 2}


def test_a_plain_function_is_a_task_too() -> None:
    assert value(play(lambda self: {"doubled": self.data["n"] * 2})) == {"doubled": 2}


@pytest.mark.parametrize("result", [None, [1, 2], "text", 3, True])
def test_a_result_that_is_no_dict_is_an_error_line(result: Any) -> None:
    found = error(play(lambda self: result))

    assert found["error"] == "result_not_dict"
    assert type(result).__name__ in found["message"]
    assert found["task_data"] == {"n": 1}


@pytest.mark.parametrize(
    "result",
    [
        {"x": math.nan},
        {"x": [math.inf]},
        {"x": LONE},
        {LONE: 1},
        {"x": {1, 2}},
        {("a", 1): 1},
        {"x": b"bytes"},
        {"x": 10**5000},
    ],
    ids=["nan", "inf", "surrogate", "surrogate key", "set", "tuple key", "bytes", "huge"],
)
def test_a_result_that_is_no_json_is_an_error_line(result: Any) -> None:
    found = error(play(lambda self: result))

    assert found["error"] == "result_not_json"
    assert found["task_data"] == {"n": 1}


def test_a_result_that_contains_itself_is_an_error_line() -> None:
    result: dict[str, Any] = {}
    result["again"] = result

    assert error(play(lambda self: result))["error"] == "result_not_json"


def test_a_result_nested_too_deep_for_json_is_an_error_line() -> None:
    result: dict[str, Any] = {}
    for _ in range(100_000):
        result = {"deeper": result}

    assert error(play(lambda self: result))["error"] == "result_not_json"


def test_a_result_above_the_limit_is_an_error_line_and_one_at_it_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(execution, "MAX_RESULT_BYTES", 1000)
    overhead = len('{"x": ""}')

    fits = play(lambda self: {"x": "ü" * ((1000 - overhead) // 2)})
    too_large = error(play(lambda self: {"x": "ü" * 600}))

    assert len(value(fits)["x"]) == 495
    assert too_large["error"] == "result_too_large"
    assert too_large["task_data"] is None
    assert "1000" in too_large["message"]


def test_an_error_line_is_bounded_however_large_the_tasks_data_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(execution, "MAX_RESULT_BYTES", 1000)
    line = json.dumps({"text": "x" * 2000})

    found = error(play(lambda self: None, line))

    assert found["error"] == "result_not_dict"
    assert found["task_data"] is None


def test_an_error_line_leaves_data_out_that_is_no_json() -> None:
    def generator(self: Any) -> None:
        self.data["seen"] = {1, 2}

    found = error(play(generator))

    assert found["error"] == "result_not_dict"
    assert found["task_data"] is None


# --- the line -----------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["{not json", "", "{} {}", "[" * 100_000, '{"a": 1e', "nul"])
def test_a_line_that_is_no_json_is_an_error_line_that_holds_it(line: str) -> None:
    found = error(play(lambda self: pytest.fail("no task is built of it"), line))

    assert found["error"] == "invalid_json"
    assert found["work_id"] == 5
    assert found["original_content"] == line


@pytest.mark.parametrize("line", ["[1]", "3", '"text"', "null", "true"])
def test_a_line_that_is_no_object_is_an_error_line_that_holds_it(line: str) -> None:
    found = error(play(lambda self: pytest.fail("no task is built of it"), line))

    assert found["error"] == "not_an_object"
    assert found["original_content"] == line


def test_every_attempt_starts_from_a_fresh_parse_of_the_line() -> None:
    item = WorkItem(0, '{"list": []}')

    def generator(self: Any) -> dict[str, Any]:
        self.data["list"].append(1)
        return {"length": len(self.data["list"])}

    ends = [Attempt(lambda: task_of_line(task_of(generator), item)).begin() for _ in range(2)]

    assert ends == [Answered('{"length": 1}')] * 2


def test_the_task_sees_the_work_item_as_its_context() -> None:
    item = WorkItem(7, "{}", retry_count=2, max_retries=3)
    attempt = Attempt(
        lambda: task_of_line(
            task_of(lambda self: {"id": self.context.work_id, "retry": self.context.retry_count}),
            item,
        )
    )

    assert attempt.begin() == Answered('{"id": 7, "retry": 2}')


# --- what a task raises -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raised",
    [
        KeyError("name"),
        SystemExit(3),
        KeyboardInterrupt(),
        asyncio.CancelledError(),
        RecursionError("deep"),
        GeneratorExit(),
        StopIteration(1),
    ],
    ids=lambda raised: type(raised).__name__,
)
@pytest.mark.parametrize("after", ["before the first request", "after an answer"])
def test_whatever_a_task_raises_ends_its_attempt_alone(raised: BaseException, after: str) -> None:
    def generator(self: Any) -> TaskGenerator:
        if after == "after an answer":
            yield ask("a")
        raise raised
        yield

    outcome = play(generator)

    assert isinstance(outcome, Raised)
    # Python itself turns a StopIteration inside a generator into a RuntimeError.
    name = "RuntimeError" if isinstance(raised, StopIteration) else type(raised).__name__
    assert outcome.message.startswith(f"{name}: ")


def test_a_raised_exception_tells_its_message_and_its_place() -> None:
    outcome = play(lambda self: {"x": self.data["missing"]})

    assert isinstance(outcome, Raised)
    assert outcome.message == "KeyError: 'missing'"
    assert __file__ in outcome.place


def test_an_exception_in_the_tasks_constructor_ends_its_attempt_alone() -> None:
    class Broken(GeneratorTask):
        def __init__(self, data: dict[str, Any], context: Any = None) -> None:
            raise SystemExit("no")

        def task_generator(self) -> TaskGenerator:
            yield ask()

    assert isinstance(play(Broken), Raised)


class _Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even its message can be had")


def test_an_exception_whose_message_cannot_be_had_ends_its_attempt_alone() -> None:
    def generator(self: Any) -> dict[str, Any]:
        raise _Unprintable

    outcome = play(generator)

    assert isinstance(outcome, Raised)
    assert "_Unprintable" in outcome.message


@pytest.mark.parametrize("yielded", ["text", {"messages": []}, [ask(), None], 3, None])
def test_yielding_anything_but_requests_is_the_tasks_mistake(yielded: Any) -> None:
    def generator(self: Any) -> TaskGenerator:
        yield yielded
        return {}

    outcome = play(generator)

    assert isinstance(outcome, Raised)
    assert "yield a Request" in outcome.message


def test_task_failed_is_an_error_line_with_its_type_and_the_tasks_data() -> None:
    def generator(self: Any) -> TaskGenerator:
        yield ask()
        raise TaskFailed("no answer fits", "no_fit")

    assert play(generator) == Answered(
        '{"__ERROR__": {"error": "no_fit", "message": "no answer fits", "task_data": {"n": 1}}}'
    )


def test_task_failed_in_a_plain_function_is_an_error_line() -> None:
    def plain(self: Any) -> dict[str, Any]:
        raise TaskFailed("no")

    assert error(play(plain)) == {
        "error": "task_logic_error",
        "message": "no",
        "task_data": {"n": 1},
    }


def test_task_retry_asks_for_another_attempt_with_its_message() -> None:
    def generator(self: Any) -> TaskGenerator:
        yield ask()
        raise TaskRetry("the model rambled")

    def plain(self: Any) -> dict[str, Any]:
        raise TaskRetry("at once")

    assert play(generator) == WantsRetry("the model rambled")
    assert play(plain) == WantsRetry("at once")


class _Raises(Task):
    """A task without generators whose first call raises."""

    error: BaseException

    def get_next_request(self) -> Request | None:
        raise self.error

    def process_result(self, result: Response) -> None: ...

    def is_done(self) -> bool:
        return False

    def get_result(self) -> tuple[dict[str, Any], Any]:
        return {}, None


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(TaskFailed("no", "why"), Answered), (TaskRetry("again"), WantsRetry), (OSError(), Raised)],
)
def test_a_task_without_a_generator_may_raise_the_same(
    raised: Exception, expected: type[Outcome]
) -> None:
    outcome = play(type("AnyTask", (_Raises,), {"error": raised}))

    assert isinstance(outcome, expected)


def test_a_task_failed_whose_message_is_no_text_is_still_one_items_end() -> None:
    cause: Any = ValueError("what was caught")

    outcome = play(type("AnyTask", (_Raises,), {"error": TaskFailed(cause)}))

    assert "what was caught" in error(outcome)["message"]


def test_a_generators_task_failed_whose_message_is_no_text_keeps_its_type() -> None:
    def generator(self: Any) -> dict[str, Any]:
        try:
            return {"x": int("not a number")}
        except ValueError as cause:
            raise TaskFailed(cause, "no_number") from cause  # type: ignore[arg-type]

    assert error(play(generator))["error"] == "no_number"


class _Stuck(Task):
    """Asks one thing, then nothing, and is never done."""

    asked = False

    def get_next_request(self) -> Request | None:
        self.asked, asked = True, self.asked
        return None if asked else ask()

    def process_result(self, result: Response) -> None: ...

    def is_done(self) -> bool:
        return False

    def get_result(self) -> tuple[dict[str, Any], Any]:
        raise AssertionError


def test_a_task_that_is_not_done_but_asks_nothing_is_an_error_line() -> None:
    found = error(play(_Stuck))

    assert found["error"] == "task_stuck"
    assert found["task_data"] == {"n": 1}


def test_a_task_that_hands_out_something_else_than_a_request_ends_its_attempt_alone() -> None:
    class HandsOutADict(_Stuck):
        def get_next_request(self) -> Any:
            self.asked, asked = True, self.asked
            return None if asked else {"messages": []}

    attempt = Attempt(lambda: task_of_line(HandsOutADict, WorkItem(0, "{}")))

    assert isinstance(attempt.begin(), Raised)


def test_the_last_attempts_exception_is_an_error_line_that_holds_the_line() -> None:
    found = json.loads(exception_line(Raised("E: m", "f.py:3 in g"), WorkItem(5, '{"n": 1}')))

    assert found == {
        "__ERROR__": {
            "error": "task_exception",
            "message": "E: m",
            "place": "f.py:3 in g",
            "work_id": 5,
            "original_content": '{"n": 1}',
        }
    }


def test_an_exception_line_can_be_written_whatever_the_message_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half = exception_line(Raised(f"E: {LONE}\n", "p"), WorkItem(5, "{}"))
    monkeypatch.setattr(execution, "MAX_RESULT_BYTES", 100_000)
    long = exception_line(Raised("E: " + "m" * 90_000, "p"), WorkItem(5, "c" * 90_000))

    assert value(Answered(half))["__ERROR__"]["message"] == "E: ?\n"
    assert len(long) < 10_000
    assert json.loads(long)["__ERROR__"]["work_id"] == 5


def test_a_result_that_is_a_kind_of_dict_is_a_result() -> None:
    class Kind(dict[str, Any]):
        pass

    assert result_line(Kind(a=1), {}) == '{"a": 1}'


# --- yields and their answers -------------------------------------------------------------------


def test_a_yielded_list_is_answered_in_the_order_yielded_whatever_order_answers_come_in() -> None:
    count = 700

    def generator(self: Any) -> TaskGenerator:
        responses = yield [ask(f"q{n}") for n in range(count)]
        again = yield [ask(f"{response.get_text()}!") for response in responses]
        return {"texts": [response.get_text() for response in again]}

    attempt = Attempt(lambda: task_of(generator)({}))
    rng = random.Random(1)
    pending: list[Request] = []
    step = attempt.begin()
    while isinstance(step, list):
        pending += [asked.request for asked in step]
        rng.shuffle(pending)
        batch, pending = pending[:37], pending[37:]
        step = attempt.answer([answer(request, said(request)) for request in batch])

    assert value(step)["texts"] == [f"q{n}!" for n in range(count)]


def test_a_list_of_one_is_a_list_and_answers_for_its_only_member() -> None:
    seen: list[Any] = []

    def generator(self: Any) -> TaskGenerator:
        responses = yield [ask()]
        seen.append(responses)
        return {}

    play(generator)

    assert isinstance(seen[0], list)
    assert len(seen[0]) == 1
    assert seen[0].get_text() == seen[0][0].get_text() == "yes"
    assert seen[0].is_success


def test_a_longer_list_says_that_it_is_no_response() -> None:
    def generator(self: Any) -> TaskGenerator:
        responses = yield [ask("a"), ask("b")]
        return {"text": responses.get_text()}

    outcome = play(generator)

    assert isinstance(outcome, Raised)
    assert "a list of 2 responses" in outcome.message


def test_a_tuple_is_a_list_too() -> None:
    def generator(self: Any) -> TaskGenerator:
        first, second = yield ask("a"), ask("b")
        return {"texts": [first.get_text(), second.get_text()]}

    outcome = play(generator, reply=lambda request: answer(request, said(request)))

    assert value(outcome) == {"texts": ["a", "b"]}


def test_an_empty_list_is_answered_with_an_empty_list_at_once() -> None:
    def generator(self: Any) -> TaskGenerator:
        before = yield []
        between = yield ask("a")
        after = yield []
        return {"lists": [before, after], "text": between.get_text()}

    assert value(play(generator)) == {"lists": [[], []], "text": "yes"}


def test_one_request_object_yielded_twice_is_asked_twice_and_answered_twice() -> None:
    asked: list[Request] = []

    def generator(self: Any) -> TaskGenerator:
        request = ask("same")
        responses = yield [request, ask("other"), request]
        return {"texts": [response.get_text() for response in responses]}

    def reply(request: Request) -> Response:
        asked.append(request)
        return answer(request, f"{said(request)} {len(asked)}")

    outcome = play(generator, reply=reply)

    assert [said(request) for request in asked] == ["same", "other", "same"]
    assert value(outcome) == {"texts": ["same 1", "other 2", "same 3"]}


def test_one_request_object_may_be_yielded_again_later() -> None:
    def generator(self: Any) -> TaskGenerator:
        request = ask("same")
        first = yield request
        second = yield request
        return {"texts": [first.get_text(), second.get_text()]}

    assert value(play(generator)) == {"texts": ["yes", "yes"]}


def test_a_failed_request_is_a_response_and_the_task_decides() -> None:
    def generator(self: Any) -> TaskGenerator:
        response = yield ask()
        return {"ok": response.is_success, "error": response.error, "text": response.get_text()}

    outcome = play(generator, reply=lambda request: Response.from_error(request, "HTTP 400: no"))

    assert value(outcome) == {"ok": False, "error": "HTTP 400: no", "text": None}


def test_a_list_that_is_partly_answered_asks_nothing_anew() -> None:
    def generator(self: Any) -> TaskGenerator:
        yield [ask("a"), ask("b"), ask("c")]
        return {}

    attempt = Attempt(lambda: task_of(generator)({}))
    requests = requests_of(attempt.begin())

    assert attempt.answer([answer(requests[2])]) == []
    assert attempt.answer([answer(requests[0])]) == []
    assert attempt.answer([answer(requests[1])]) == Answered("{}")


def test_tasks_that_ask_beside_what_is_unanswered_are_driven_too() -> None:
    """A Task, unlike a generator, may ask anew while earlier requests are out."""

    class Rolling(Task):
        def __init__(self, data: dict[str, Any], context: Any = None) -> None:
            super().__init__(data, context)
            self.to_ask: list[Request] = [ask("a"), ask("b")]
            self.answered: list[str] = []

        def get_next_request(self) -> Request | None:
            return self.to_ask.pop(0) if self.to_ask else None

        def process_result(self, result: Response) -> None:
            self.answered.append(said(result.request))
            if said(result.request) == "a":
                self.to_ask.append(ask("c"))

        def is_done(self) -> bool:
            return len(self.answered) == 3

        def get_result(self) -> tuple[dict[str, Any], Any]:
            return {"answered": self.answered}, None

    attempt = Attempt(lambda: Rolling({}))
    first = requests_of(attempt.begin())
    second = requests_of(attempt.answer([answer(first[0])]))

    assert [said(request) for request in second] == ["c"]
    assert attempt.answer([answer(second[0])]) == []
    assert attempt.answer([answer(first[1])]) == Answered('{"answered": ["a", "c", "b"]}')


def test_responses_are_handed_on_whole() -> None:
    seen: Sequence[Response] = []

    def generator(self: Any) -> TaskGenerator:
        nonlocal seen
        seen = yield [Request({"prompt": "p"}, context={"mine": 1})]
        return {}

    play(generator, reply=lambda request: Response(request, {"usage": {"x": 1}}, None, "m"))

    assert seen[0].request.context == {"mine": 1}
    assert seen[0].content == {"usage": {"x": 1}}
    assert seen[0].model_name == "m"
