"""What an attempt is answered from the record, and that it sees there what it saw live."""

from __future__ import annotations

import datetime
import math
import unicodedata
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest

from dispatcher.errors import TaskRetry
from dispatcher.models import Step, WorkItem
from dispatcher.taskmanager.backend.request import Request, Response
from dispatcher.taskmanager.execution import Answered, Attempt, Outcome, Raised, WantsRetry
from dispatcher.taskmanager.steps import StepLog, request_hash, response_text
from dispatcher.taskmanager.task import GeneratorTask, Task
from tests.taskmanager.doubles import TaskGenerator, answer, ask, said, task_of

LONE = "\ud83d"
ROOM = 1 << 20

Reply = Callable[[Request], Response]


@dataclass
class Played:
    """One attempt: how it ended, what the model was asked, what is recorded after it."""

    outcome: Outcome
    asked: list[str]
    steps: list[Step]
    log: StepLog
    attempt: Attempt


class Model:
    """Never answers twice the same."""

    def __init__(self) -> None:
        self.answers = 0

    def __call__(self, request: Request) -> Response:
        self.answers += 1
        return answer(request, f"{said(request)}: {self.answers}")


def play(
    task: Callable[[Any], Any] | type[Task],
    recorded: Iterable[Step] = (),
    *,
    reply: Reply | None = None,
    model: str | None = "m",
    most: int = 1 << 30,
    backwards: bool = False,
    context: Any = None,
) -> Played:
    """Run an attempt until it ends or the model gave `most` answers, one by one."""
    task_class = task if isinstance(task, type) else task_of(task)
    recorded = list(recorded)
    log = StepLog(recorded, model)
    attempt = Attempt(lambda: task_class({"n": 1}, context), log)
    reply = reply or Model()
    asked: list[str] = []
    steps = {step.pos: step for step in recorded}
    step = attempt.begin()
    open_ = list(step) if isinstance(step, list) else []
    while isinstance(step, list) and len(asked) < most:
        one = open_.pop(-1 if backwards else 0)
        asked.append(said(one.request))
        response = reply(one.request)
        if log.cut_at is not None:
            steps = {at: kept for at, kept in steps.items() if at < log.cut_at}
            log.cut_at = None
        if one.hash is not None and (text := response_text(response, ROOM)) is not None:
            steps[one.position] = Step(one.position, one.hash, text)
        step = attempt.answer([response])
        open_ += step if isinstance(step, list) else []
    ended = step if not isinstance(step, list) else Raised("killed", "")
    return Played(ended, asked, [steps[at] for at in sorted(steps)], log, attempt)


def chain(self: Any) -> TaskGenerator:
    """Each prompt holds the answer before: a list in the middle."""
    first = yield ask("a")
    second = yield [ask(f"b{n} {first.get_text()}") for n in range(4)]
    third = yield ask("c " + " ".join(response.get_text() for response in second))
    return {"answers": [first.get_text(), *(r.get_text() for r in second), third.get_text()]}


# --- by position and hash -----------------------------------------------------------------------


def test_a_task_that_is_begun_again_gets_all_its_answers_from_the_record() -> None:
    live = play(chain)

    again = play(chain, live.steps)

    assert again.outcome == live.outcome
    assert again.asked == []
    assert again.log.replayed == 6
    assert [step.pos for step in live.steps] == [(0, 0), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0)]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("killed_after", range(7))
def test_wherever_a_worker_is_killed_only_the_rest_is_asked(
    killed_after: int, backwards: bool
) -> None:
    model = Model()
    before = play(chain, most=killed_after, reply=model, backwards=backwards)

    after = play(chain, before.steps, reply=model)

    assert len(before.asked) == killed_after
    assert len(after.asked) == 6 - killed_after
    assert not set(before.asked) & set(after.asked)
    assert after.log.cut_at is None
    assert play(chain, after.steps).outcome == after.outcome


def test_a_half_answered_list_is_answered_half_and_each_answer_has_its_place() -> None:
    def generator(self: Any) -> TaskGenerator:
        responses = yield [ask(letter) for letter in "abcde"]
        return {"texts": [response.get_text() for response in responses]}

    steps = [step for step in play(generator).steps if step.pos[1] in (1, 3)]
    again = play(generator, steps, reply=lambda request: answer(request, "new"))

    assert again.asked == ["a", "c", "e"]
    assert again.outcome == Answered('{"texts": ["new", "b: 2", "new", "d: 4", "new"]}')


def test_a_request_that_differs_voids_the_record_from_there_on() -> None:
    recorded = play(chain).steps

    def changed(self: Any) -> TaskGenerator:
        first = yield ask("a")
        second = yield [ask(f"b{n} {first.get_text()}" + "!" * (n == 2)) for n in range(4)]
        third = yield ask("c " + " ".join(response.get_text() for response in second))
        return {"answers": [third.get_text()]}

    played = play(changed, recorded, reply=lambda request: answer(request, "new"))

    assert played.asked == ["b2 a: 1!", "b3 a: 1", "c b0 a: 1: 2 b1 a: 1: 3 new new"]
    assert played.log.replayed == 3
    again = play(changed, played.steps)
    assert (again.asked, again.outcome) == ([], played.outcome)


def test_a_mismatch_says_where_it_was() -> None:
    log = StepLog(play(chain).steps, "m")
    log.replay(log.ask(ask("a"), (0, 0)))
    assert log.cut_at is None

    assert log.replay(log.ask(ask("else"), (1, 1))) is None
    assert log.cut_at == (1, 1)
    assert log.replay(log.ask(ask("b3 a: 1"), (1, 3))) is None
    assert log.cut_at == (1, 1)
    assert log.replayed == 1


def test_a_task_that_now_asks_for_more_than_was_recorded_goes_on_live() -> None:
    def longer(self: Any) -> TaskGenerator:
        result = yield from chain(self)
        last = yield ask("d")
        return {**result, "last": last.get_text()}

    played = play(longer, play(chain).steps)

    assert played.asked == ["d"]
    assert played.log.cut_at is None


def test_the_order_of_keys_makes_no_other_request() -> None:
    one = Request({"a": 1, "messages": [{"role": "user", "content": "?"}], "b": {"x": 1, "y": 2}})
    two = Request({"b": {"y": 2, "x": 1}, "messages": [{"content": "?", "role": "user"}], "a": 1})

    assert request_hash(one, "m") == request_hash(two, "m") is not None


DIFFERENT: list[Any] = [
    0,
    1,
    1.0,
    True,
    "1",
    None,
    [],
    {},
    [1, 2],
    [2, 1],
    {"a": None},
    {"a": {"b": 1}},
    "ä",
    unicodedata.normalize("NFD", "ä"),
    2**64,
    2**64 + 1,
    0.1,
    0.1 + 2**-55,
    -0.0,
    "a\nb",
    "a\\nb",
]


def test_what_differs_in_any_value_is_another_request() -> None:
    hashes = [request_hash(Request({"x": value}), "m") for value in DIFFERENT]
    hashes += [request_hash(Request({}), "m"), request_hash(Request({"y": 0}), "m")]

    assert None not in hashes
    assert len(set(hashes)) == len(DIFFERENT) + 2


def test_a_request_that_names_no_model_is_of_the_workers_model() -> None:
    unnamed, named = ask("?"), ask("?", model="judge")

    assert request_hash(unnamed, "a") != request_hash(unnamed, "b")
    assert request_hash(named, "a") == request_hash(named, "b")
    assert request_hash(named, "a") != request_hash(ask("?", model="generator"), "a")

    steps = play(chain, model="a").steps
    assert len(play(chain, steps, model="a").asked) == 0
    assert len(play(chain, steps, model="b").asked) == 6


@pytest.mark.parametrize(
    "content",
    [{"x": LONE}, {"x": object()}, {"x": 10**5000}, {("a", 1): 2}],
    ids=["surrogate", "object", "huge number", "tuple key"],
)
def test_what_is_no_json_is_asked_every_time_and_harms_nothing(content: dict[Any, Any]) -> None:
    def generator(self: Any) -> TaskGenerator:
        yield ask("a")
        yield ask("odd", extra=content)
        yield ask("b")
        return {"done": True}

    live = play(generator)
    again = play(generator, live.steps)

    assert live.outcome == again.outcome == Answered('{"done": true}')
    assert again.asked == ["odd"]


def test_a_request_without_a_dict_has_no_hash() -> None:
    assert request_hash(Request([1]), "m") is None  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "{", "null", "[1]", '"text"', '{"model": 3}', "[" * 10_000])
def test_a_record_that_cannot_be_read_is_void_and_the_model_is_asked(text: str) -> None:
    live = play(chain)
    live.steps[1].response = text

    again = play(chain, live.steps)

    assert [said_.split()[0] for said_ in again.asked] == ["b0", "b1", "b2", "b3", "c"]
    assert isinstance(again.outcome, Answered)


# --- the same as live ---------------------------------------------------------------------------

CONTENTS: list[Any] = [
    {"choices": [{"message": {"content": "text"}}], "usage": {"prompt_tokens": 3}},
    {"choices": [{"text": "Zoë 🦀 \u2028 \x00 \x1f \\ \" ' </script>"}]},
    {"choices": []},
    {"choices": [{"message": {"content": None, "tool_calls": [{"id": 1}]}}]},
    {},
    None,
    {"data": [{"embedding": [0.1, -0.0, 1e-308, 5e-324, 1.7976931348623157e308, 1 / 3, 1.0]}]},
    {"seed": 2**63, "more": [2**64 - 1, -(2**63), 0, 10**30]},
    {"keys": {"": 1, "a b": 2, "ä": 3, "1": 4}},
    {"order": {"z": 1, "a": 2, "m": 3}},
    {"true": True, "one": 1, "float": 1.0, "null": None},
    {"deep": [[[[[[[[{"x": [{}]}]]]]]]]]},
    {"logprobs": {"top": [{"token": "x", "bytes": [1, 2], "logprob": -12.345678901234567}] * 50}},
]


@pytest.mark.parametrize("content", CONTENTS, ids=repr)
def test_a_replayed_answer_is_what_it_was_live(content: Any) -> None:
    seen: list[tuple[Any, ...]] = []

    def generator(self: Any) -> TaskGenerator:
        mine = object()
        request = ask("a", temperature=0.7)
        request.context = mine
        response = yield request
        seen.append(
            (
                repr(response.content),
                response.error,
                response.model_name,
                response.is_success,
                response.get_text(),
                response.get_text(2),
                response.request is request,
                response.request.context is mine,
                response.request.content,
                type(response),
            )
        )
        return {}

    steps = play(generator, reply=lambda request: Response(request, content, None, "served")).steps
    again = play(generator, steps)

    assert again.asked == []
    assert seen[0] == seen[1]
    assert seen[1][2] == "served"


@pytest.mark.parametrize("error", ["HTTP 400: too long", {"code": 400, "message": "ü"}, 7, ""])
def test_a_replayed_error_is_what_it_was_live(error: Any) -> None:
    seen: list[tuple[Any, ...]] = []

    def generator(self: Any) -> TaskGenerator:
        response = yield ask("a")
        seen.append((response.error, response.content, response.is_success, response.model_name))
        return {}

    steps = play(generator, reply=lambda request: Response.from_error(request, error)).steps

    assert play(generator, steps).asked == []
    assert seen[0] == seen[1] == (error, None, False, None)


@pytest.mark.parametrize(
    "content",
    [
        {"x": math.nan},
        {"x": [math.inf]},
        {"x": -math.inf},
        {"x": (1, 2)},
        {"x": {1: 2}},
        {"x": b"bytes"},
        {"x": {1}},
        {"x": LONE},
        {"x": datetime.date(2020, 1, 1)},
        {"x": object()},
        {"x": 10**5000},
    ],
    ids=[
        "nan",
        "inf",
        "-inf",
        "tuple",
        "number key",
        "bytes",
        "set",
        "lone",
        "date",
        "object",
        "huge",
    ],
)
def test_an_answer_that_would_come_back_as_something_else_is_not_recorded(content: Any) -> None:
    assert response_text(Response(ask(), content), ROOM) is None
    assert response_text(Response(ask(), {"y": [content]}), ROOM) is None


def test_an_answer_that_contains_itself_or_is_too_long_or_failed_oddly_is_not_recorded() -> None:
    around: dict[str, Any] = {}
    around["again"] = around
    assert response_text(Response(ask(), around), ROOM) is None
    assert response_text(Response(ask(), {"x": "ü" * 60}), 100) is None
    assert response_text(Response(ask(), {"x": "u" * 60}), 100) is not None
    assert response_text(Response.from_error(ask(), ValueError("no")), ROOM) is None


# --- shapes of tasks ----------------------------------------------------------------------------


@pytest.mark.parametrize("recorded_of_two", [(0,), (1,), (0, 1)])
def test_one_request_object_yielded_twice_has_two_answers_each_in_its_place(
    recorded_of_two: tuple[int, ...],
) -> None:
    def generator(self: Any) -> TaskGenerator:
        request = ask("same")
        first = yield [request, request]
        second = yield [request, ask("other"), request]
        return {"texts": [response.get_text() for response in [*first, *second]]}

    # given answers that came in another order than they were asked for
    live = play(generator, backwards=True)
    kept = [step for step in live.steps if step.pos[0] > 0 or step.pos[1] in recorded_of_two]

    again = play(generator, kept, reply=lambda request: answer(request, "new"))

    assert isinstance(live.outcome, Answered)
    texts = ["same: 2", "same: 1", "same: 5", "other: 4", "same: 3"]
    assert live.outcome.result == f'{{"texts": {texts}}}'.replace("'", '"')
    expected = [t if n > 1 or n in recorded_of_two else "new" for n, t in enumerate(texts)]
    assert again.outcome == Answered(f'{{"texts": {expected}}}'.replace("'", '"'))


def test_empty_lists_and_lists_of_one_are_replayed_too() -> None:
    def generator(self: Any) -> TaskGenerator:
        nothing = yield []
        one = yield [ask("a")]
        nothing_again = yield []
        alone = yield ask("b")
        return {
            "lists": [nothing, nothing_again],
            "texts": [one.get_text(), one[0].get_text(), alone.get_text()],
            "length": len(one),
        }

    live = play(generator)
    again = play(generator, live.steps)

    assert again.asked == []
    assert again.outcome == live.outcome
    assert [step.pos for step in live.steps] == [(0, 0), (1, 0)]
    assert play(generator, live.steps[:1]).asked == ["b"]


def test_a_thousand_requests_at_once_are_replayed_each_in_its_place() -> None:
    def generator(self: Any) -> TaskGenerator:
        responses = yield [ask(f"q{n}") for n in range(1000)]
        return {"texts": [response.get_text() for response in responses]}

    live = play(generator, backwards=True)
    again = play(generator, [step for step in live.steps if step.pos[1] % 10])

    assert again.log.replayed == 900
    assert again.asked == [f"q{n}" for n in range(0, 1000, 10)]
    assert play(generator, live.steps).outcome == live.outcome


def test_a_thousand_steps_in_turn_are_replayed_at_once() -> None:
    def generator(self: Any) -> TaskGenerator:
        text = ""
        for _ in range(1000):
            text = (yield ask(f"after {text[:20]}")).get_text()
        return {"text": text}

    live = play(generator)

    assert len(live.asked) == 1000
    assert play(generator, live.steps).outcome == live.outcome
    assert len(play(generator, live.steps[:-1]).asked) == 1


def test_a_task_that_asks_nothing_is_as_before() -> None:
    def nothing(self: Any) -> TaskGenerator:
        return {"n": self.data["n"]}
        yield

    for task in (nothing, lambda self: {"n": self.data["n"]}):
        assert play(task).outcome == Answered('{"n": 1}')


def test_a_class_may_say_that_its_steps_are_not_to_be_recorded() -> None:
    class Forgetful(GeneratorTask):
        record_steps = False

        def task_generator(self) -> Generator[Any, Any, Any]:
            return (yield from chain(self))

    recorded = play(chain).steps
    played = play(Forgetful, recorded)

    assert len(played.asked) == 6
    assert played.steps == recorded
    assert played.log.replayed == 0


def test_a_task_that_is_no_generator_is_not_recorded_unless_it_says_so() -> None:
    class Plain(Task):
        asked = answered = 0

        def get_next_request(self) -> Request | None:
            if self.asked == 2 or self.asked > self.answered:
                return None
            self.asked += 1
            return ask(f"q{self.asked}")

        def process_result(self, result: Response) -> None:
            self.answered += 1
            self.text = result.get_text()

        def is_done(self) -> bool:
            return self.answered == 2

        def get_result(self) -> tuple[dict[str, Any], Any]:
            return {"text": self.text}, None

    class Replayable(Plain):
        record_steps = True

    assert play(Plain).steps == []
    live = play(Replayable)
    assert [step.pos for step in live.steps] == [(0, 0), (1, 0)]
    again = play(Replayable, live.steps)
    assert (again.asked, again.outcome) == ([], live.outcome)


def test_a_task_that_waits_for_nothing_after_its_replay_has_an_error_line() -> None:
    class Stuck(Task):
        record_steps = True
        asked = False

        def get_next_request(self) -> Request | None:
            asked, self.asked = self.asked, True
            return None if asked else ask("a")

        def process_result(self, result: Response) -> None:
            """It forgets the answer."""

        def is_done(self) -> bool:
            return False

        def get_result(self) -> tuple[dict[str, Any], Any]:
            return {}, None

    live = play(Stuck)
    again = play(Stuck, live.steps)

    assert again.outcome == live.outcome
    assert isinstance(again.outcome, Answered)
    assert "task_stuck" in again.outcome.result


def test_the_attempt_knows_how_often_its_task_asked_replayed_or_not() -> None:
    live = play(chain)

    assert live.attempt.yields == 3
    assert play(chain, live.steps).attempt.yields == 3
    assert play(chain, live.steps[:3], most=0).attempt.yields == 2


@pytest.mark.parametrize("keep", [False, True])
def test_a_retry_says_whether_its_steps_are_to_be_kept(keep: bool) -> None:
    def generator(self: Any) -> TaskGenerator:
        yield ask("a")
        raise TaskRetry("again", keep_steps=keep)

    assert play(generator).outcome == WantsRetry("again", keep)


# --- random numbers -----------------------------------------------------------------------------


def drawn(work_id: int = 7, run: str | None = "run", fresh_starts: int = 0) -> list[float]:
    """Return what the task of an item draws."""
    item = WorkItem(work_id, "{}", run=run, fresh_starts=fresh_starts)
    task = task_of(lambda self: {})({}, item)
    return [task.rng.random() for _ in range(3)]


def test_an_item_that_is_begun_again_draws_the_same_and_after_a_fresh_start_others() -> None:
    assert drawn() == drawn()
    assert len({tuple(drawn(fresh_starts=count)) for count in range(5)}) == 5


def test_two_items_and_two_runs_draw_different_numbers() -> None:
    assert len({tuple(drawn(work_id, run)) for work_id in range(50) for run in ("a", "b")}) == 100


def test_the_numbers_of_an_older_server_or_of_no_context_are_there_too() -> None:
    assert drawn(run=None) == drawn(run=None) != drawn(8, run=None)
    assert 0 <= task_of(lambda self: {})({}).rng.random() < 1


def test_the_numbers_are_the_same_in_every_version_and_process() -> None:
    """They depend on no salted hash: a restart of the worker must not change them."""
    assert drawn()[0] == Random("['run', 7] 0").random()


def test_a_task_that_draws_its_prompts_finds_its_answers_again() -> None:
    def generator(self: Any) -> TaskGenerator:
        for _ in range(4):
            yield ask(f"pick {self.rng.random()}")
        return {"last": self.rng.random()}

    item = WorkItem(3, "{}", run="r")
    live = play(generator, context=item)

    again = play(generator, live.steps, context=WorkItem(3, "{}", run="r"))
    assert (again.asked, again.outcome) == ([], live.outcome)
    fresh = play(generator, live.steps, context=WorkItem(3, "{}", run="r", fresh_starts=1))
    assert len(fresh.asked) == 4
