"""The examples do what their docstrings say: the data, the tasks, the batch program."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from dispatcher.client import WorkClient
from dispatcher.errors import BadRequestError
from dispatcher.models import (
    BatchResultResponse,
    BatchWorkResponse,
    ReleaseItem,
    ReleaseWorkResponse,
    WorkItem,
    WorkStatus,
)
from dispatcher.taskmanager.backend.request import Request, Response
from dispatcher.taskmanager.task import GeneratorTask

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PROMPTS = EXAMPLES / "data" / "prompts.jsonl"


def load_example(name: str) -> ModuleType:
    # By path: a wheel somewhere in the environment may install a package named `examples`.
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


chat_task = load_example("chat_task")
example_task = load_example("example_task")
generator_and_judge = load_example("generator_and_judge")
inference = load_example("inference")


# --- data/prompts.jsonl ---------------------------------------------------------------------


def prompts() -> list[dict[str, Any]]:
    text = PROMPTS.read_bytes().decode("utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text[:-1].split("\n")]


def test_the_prompts_are_one_hundred_lines_of_one_shape() -> None:
    lines = prompts()
    assert len(lines) == 100
    for line in lines:
        assert list(line) == ["id", "topic", "messages"]
        assert all(set(message) == {"role", "content"} for message in line["messages"])
        assert all(message["content"].strip() for message in line["messages"])


def test_every_prompt_is_a_conversation_that_waits_for_an_answer() -> None:
    for line in prompts():
        roles = [message["role"] for message in line["messages"]]
        spoken = roles[1:] if roles[0] == "system" else roles
        assert spoken == [("user", "assistant")[n % 2] for n in range(len(spoken))]
        assert spoken[-1] == "user"


def test_no_prompt_stands_in_the_file_twice() -> None:
    lines = prompts()
    assert len({line["id"] for line in lines}) == 100
    assert len({line["messages"][-1]["content"].casefold() for line in lines}) == 100


def test_the_prompts_are_varied() -> None:
    lines = prompts()
    topics = Counter(line["topic"] for line in lines)
    assert len(topics) >= 12
    assert max(topics.values()) <= 10
    roles = [[message["role"] for message in line["messages"]] for line in lines]
    assert sum("system" in line for line in roles) >= 3
    assert sum("assistant" in line for line in roles) >= 3
    raw = PROMPTS.read_text("utf-8")
    assert all(part in raw for part in ("\\n", '\\"', "\\ud83c", "👋", "¿", "请"))


# --- the tasks ------------------------------------------------------------------------------


def answer_to(request: Request, text: str | None) -> Response:
    return Response(request, {"choices": [{"message": {"role": "assistant", "content": text}}]})


def drive(task: GeneratorTask, *replies: str | Exception | None) -> list[Request]:
    """Answer the task's requests in the order asked; an exception is a failed request."""
    asked: list[Request] = []
    waiting = list(replies)
    while not task.is_done():
        batch: list[Request] = []
        while (request := task.get_next_request()) is not None:
            batch.append(request)
        if task.is_done():
            break
        assert batch, "the task is not done and asks nothing"
        for request in batch:
            reply = waiting.pop(0)
            if isinstance(reply, Exception):
                task.process_result(Response.from_error(request, reply))
            else:
                task.process_result(answer_to(request, reply))
        asked += batch
    assert not waiting, "the task asked less than it was expected to"
    return asked


def context(retry_count: int = 0, max_retries: int | None = 3) -> SimpleNamespace:
    return SimpleNamespace(work_id=0, content="", retry_count=retry_count, max_retries=max_retries)


def line(**more: Any) -> dict[str, Any]:
    return {"id": "q1", "messages": [{"role": "user", "content": "Why is the sky blue?"}], **more}


def test_the_chat_task_adds_the_response_to_the_line() -> None:
    task = chat_task.ChatTask(line(topic="facts"), context())
    (request,) = drive(task, "Light scatters.")
    assert request.content == {"messages": line()["messages"], "max_tokens": 64}
    assert task.get_result()[0] == line(topic="facts", response="Light scatters.")


def test_the_chat_task_takes_max_tokens_from_its_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chat_task.ChatTask, "args", {"max_tokens": 7})
    (request,) = drive(chat_task.ChatTask(line(), context()), "Light scatters.")
    assert request.content["max_tokens"] == 7


def test_the_generator_and_the_judge_are_asked_by_their_names() -> None:
    task = generator_and_judge.GenerateAndJudgeTask(line(), context())
    asked = drive(task, "Light scatters.", " 4.\n")
    assert [request.content["model"] for request in asked] == ["generator", "judge"]
    assert asked[0].content["messages"] == line()["messages"]
    (message,) = asked[1].content["messages"]
    assert "Why is the sky blue?" in message["content"]
    assert "Light scatters." in message["content"]
    assert task.get_result()[0] == line(response="Light scatters.", score=4)


@pytest.mark.parametrize("judgement", ["good", "", "6", "45", None])
def test_a_judgement_without_a_score_makes_an_error_line(judgement: str | None) -> None:
    task = generator_and_judge.GenerateAndJudgeTask(line(), context())
    drive(task, "Light scatters.", judgement)
    assert task.get_result()[0]["__ERROR__"]["error"] == "no_score"


def test_the_names_in_the_example_file_are_those_the_task_asks_for() -> None:
    named = yaml.safe_load((EXAMPLES / "generator_and_judge.yaml").read_text())["backends"]
    assert list(named) == ["generator", "judge"]


def test_a_failed_request_of_the_chat_task_makes_an_error_line() -> None:
    task = chat_task.ChatTask(line(), context())
    drive(task, RuntimeError("400: too long"))
    assert task.get_result()[0] == {
        "__ERROR__": {"error": "model_error", "message": "400: too long", "task_data": line()}
    }


def test_two_answers_are_asked_for_at_once_and_the_judged_one_is_chosen() -> None:
    task = example_task.CompareTwoResponsesTask(line(), context())
    first, second, judge = drive(task, "Because of rain.", "Light scatters.", "B")
    assert first.content["messages"] == second.content["messages"] == line()["messages"]
    assert first.content["seed"] != second.content["seed"]
    assert first.content["temperature"] != second.content["temperature"]
    (question,) = judge.content["messages"]
    assert "Why is the sky blue?" in question["content"]
    assert "Answer A:\nBecause of rain." in question["content"]
    assert "Answer B:\nLight scatters." in question["content"]
    assert task.get_result()[0] == line(
        response_a="Because of rain.",
        response_b="Light scatters.",
        verdict="B",
        chosen="Light scatters.",
    )


@pytest.mark.parametrize(
    ("said", "verdict"),
    [("A", "A"), (" b.\n", "B"), ("**A**", "A"), ("Answer: B", "B"), ("The answer is A.", "A")],
)
def test_a_letter_on_its_own_is_a_verdict(said: str, verdict: str) -> None:
    assert example_task.read_verdict(said) == verdict


@pytest.mark.parametrize("said", ["", None, "C", "A or B", "A good answer is", "Both are fine."])
def test_anything_else_than_a_or_b_is_an_unclear_verdict(said: str | None) -> None:
    task = example_task.CompareTwoResponsesTask(line(), context())
    drive(task, "one", "two", said)
    error = task.get_result()[0]["__ERROR__"]
    assert error["error"] == "unclear_verdict"
    assert error["task_data"] == line()


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failed_request_of_the_comparison_makes_an_error_line(failing: int) -> None:
    replies: list[str | Exception] = ["one", "two", "A"]
    replies[failing] = RuntimeError("engine says no")
    # The judge is not asked about an answer that is missing.
    task = example_task.CompareTwoResponsesTask(line(), context())
    drive(task, *(replies if failing == 2 else replies[:2]))
    error = task.get_result()[0]["__ERROR__"]
    assert (error["error"], error["message"]) == ("model_error", "engine says no")


def test_a_valid_answer_is_kept_with_its_metadata() -> None:
    task = example_task.ValidatedResponseTask(line(), context(retry_count=1))
    drive(task, "Light scatters.")
    assert not task.should_retry()
    assert task.get_result()[0] == line(
        response="Light scatters.",
        task_metadata={"success": True, "retry_count": 1, "max_retries": 3},
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "0 word(s)"),
        (None, "0 word(s)"),
        ("Scattering.", "1 word(s)"),
        (" why is the SKY\nblue?", "repeats the prompt"),
        ("blue " * 301, "at most 300"),
    ],
)
def test_an_answer_that_is_not_valid_is_tried_again_for_a_reason(
    text: str | None, reason: str
) -> None:
    task = example_task.ValidatedResponseTask(line(), context())
    drive(task, text)
    assert task.should_retry()
    assert reason in task.retry_reason


def test_after_the_last_retry_an_invalid_answer_is_kept_and_marked() -> None:
    task = example_task.ValidatedResponseTask(line(), context(retry_count=3))
    drive(task, "Scattering.")
    assert not task.should_retry()
    result = task.get_result()[0]
    assert result["response"] == "Scattering."
    assert result["task_metadata"]["success"] is False
    assert result["task_metadata"]["error_type"] == "validation_failed"
    assert "1 word(s)" in result["task_metadata"]["error"]


def test_without_a_limit_on_retries_an_invalid_answer_is_always_tried_again() -> None:
    task = example_task.ValidatedResponseTask(line(), context(retry_count=99, max_retries=-1))
    drive(task, "Scattering.")
    assert task.should_retry()


def test_a_failed_request_is_not_a_matter_of_validation() -> None:
    task = example_task.ValidatedResponseTask(line(), context())
    drive(task, RuntimeError("engine says no"))
    assert not task.should_retry()
    assert task.get_result()[0]["__ERROR__"]["error"] == "model_error"


def test_the_tasks_accept_every_prompt_of_the_data_file() -> None:
    for data in prompts():
        drive(chat_task.ChatTask(data, context()), "fine, thanks")
        drive(example_task.CompareTwoResponsesTask(data, context()), "one", "two", "A")
        drive(example_task.ValidatedResponseTask(data, context()), "fine, thanks")


# --- inference.py: from a line to a prompt --------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (".", []),
        (".prompt", ["prompt"]),
        (".messages[0].content", ["messages", 0, "content"]),
        (".a.b[-1][2]", ["a", "b", -1, 2]),
        (".[3]", [3]),
        (".two words.über-key", ["two words", "über-key"]),
    ],
)
def test_a_path_is_keys_and_indices(text: str, path: list[str | int]) -> None:
    assert inference.parse_path(text) == path


@pytest.mark.parametrize("text", ["", "messages", "..a", ".a[", ".a[x]", ".a[]", ".a[0]b", ".a."])
def test_a_path_that_cannot_be_read_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"\.messages\[0\]\.content"):
        inference.parse_path(text)


@pytest.mark.parametrize(
    ("path", "found"),
    [(".", {"a": [{"b": 1}, 2]}), (".a[0].b", 1), (".a[-1]", 2)],
)
def test_a_path_leads_to_a_value(path: str, found: Any) -> None:
    assert inference.follow_path({"a": [{"b": 1}, 2]}, inference.parse_path(path)) == found


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (".c", "at . the line has an object without the key 'c'"),
        (".a[2]", "at .a the line has a list of 2, without element [2]"),
        (".a[-3]", "at .a the line has a list of 2, without element [-3]"),
        (".a.b", "at .a the line has a list, so it has no key 'b'"),
        (".a[0].b.c", "at .a[0].b the line has a number, so it has no key 'c'"),
        (".a[0][0]", "at .a[0] the line has an object, so it has no element [0]"),
    ],
)
def test_a_path_that_leads_nowhere_names_the_step_that_failed(path: str, message: str) -> None:
    with pytest.raises(inference.LineError) as caught:
        inference.follow_path({"a": [{"b": 1}, 2]}, inference.parse_path(path))
    assert caught.value.kind == "no_prompt"
    assert str(caught.value) == message


def test_in_chat_mode_a_string_becomes_a_message_and_a_list_is_taken_as_messages() -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert inference.find_prompt({"p": "Hi"}, ["p"], "chat") == [{"role": "user", "content": "Hi"}]
    assert inference.find_prompt({"p": chat}, ["p"], "chat") == chat


def test_in_completion_mode_the_string_stays_as_it_is() -> None:
    assert inference.find_prompt({"p": "Hi"}, ["p"], "completion") == "Hi"


@pytest.mark.parametrize(
    ("value", "mode"),
    [
        (None, "chat"),
        (7, "chat"),
        ({"role": "user"}, "chat"),
        ([], "chat"),
        (["Hi"], "chat"),
        ([{"content": "Hi"}], "chat"),
        ([{"role": "user", "content": "Hi"}], "completion"),
    ],
)
def test_a_prompt_of_the_wrong_kind_is_refused(value: Any, mode: str) -> None:
    with pytest.raises(inference.LineError) as caught:
        inference.find_prompt({"p": value}, ["p"], mode)
    assert caught.value.kind == "no_prompt"


@pytest.mark.parametrize(
    "text",
    ["", "plain text", '{"a": ', '{"a": NaN}', '{"a": 1e999}', '{"a": "\\ud83d"}', "[1]", "null"],
)
def test_a_line_that_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(inference.LineError) as caught:
        inference.parse_line(text)
    assert caught.value.kind == "not_json"
    str(caught.value).encode("utf-8")


# --- inference.py: the loop -----------------------------------------------------------------


class StubClient(WorkClient):
    """Hands out the scripted replies one after another and notes what it is told."""

    def __init__(self, *replies: BatchWorkResponse | WorkStatus) -> None:
        self.replies = list(replies)
        self.refusals = 0  # how many calls of submit_results find no server
        self.batch_sizes: list[int] = []
        self.submitted: list[list[Any]] = []
        self.released: list[int] = []
        self.charged: list[bool] = []

    def get_work(self, batch_size: int = 1, wait_s: float = 0.0) -> BatchWorkResponse:
        self.batch_sizes.append(batch_size)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        return reply if isinstance(reply, BatchWorkResponse) else BatchWorkResponse(reply)

    def submit_results(self, items: Sequence[WorkItem], want: int = 0) -> BatchResultResponse:
        if self.refusals:
            self.refusals -= 1
            return BatchResultResponse(WorkStatus.SERVER_UNAVAILABLE)
        self.submitted.append([json.loads(item.result or "null") for item in items])
        return BatchResultResponse(WorkStatus.OK, len(items))

    def release_work(
        self, work_ids: Iterable[int] = (), items: Iterable[ReleaseItem] = ()
    ) -> ReleaseWorkResponse:
        released = list(items)
        self.released += [item.work_id for item in released]
        self.charged += [item.charge for item in released]
        return ReleaseWorkResponse(WorkStatus.OK, len(released))


class Sleeps(list[float]):
    """A sleep that takes no time and remembers how long it was."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def handed_out(*contents: str, first: int = 0) -> BatchWorkResponse:
    items = [WorkItem(first + n, content) for n, content in enumerate(contents)]
    return BatchWorkResponse(WorkStatus.OK, items=items)


def options(*flags: str) -> Any:
    required = ["--model_path", "M", "--dispatcher_server", "host:1"]
    return inference.parse_options([*required, "--prompt_path", ".p", *flags])


def echo(prompts: list[Any]) -> list[list[str]]:
    return [[f"re: {prompt[-1]['content']}"] for prompt in prompts]


COMPLETE = WorkStatus.ALL_WORK_COMPLETE
AWAY = WorkStatus.SERVER_UNAVAILABLE


def test_lines_are_answered_batch_by_batch_until_all_is_complete() -> None:
    client = StubClient(
        handed_out('{"p": "one", "id": 1}', '{"p": "zwölf"}'),
        handed_out('{"p": "three"}', first=2),
        COMPLETE,
    )
    calls: list[int] = []

    def generate(prompts: list[Any]) -> list[list[str]]:
        calls.append(len(prompts))
        return echo(prompts)

    assert inference.work(client, generate, options("--batch_size", "2"), inference.Stop()) == 0
    assert calls == [2, 1]
    assert client.batch_sizes == [2, 2, 2]
    assert client.submitted == [
        [
            {"p": "one", "id": 1, "generations": ["re: one"]},
            {"p": "zwölf", "generations": ["re: zwölf"]},
        ],
        [{"p": "three", "generations": ["re: three"]}],
    ]
    assert client.released == []


def test_text_is_written_as_it_is_and_not_escaped() -> None:
    (item,) = handed_out('{"p": "zwölf 🎈"}').items
    inference.answer([item], echo, ["p"], "chat")
    assert item.result == '{"p": "zwölf 🎈", "generations": ["re: zwölf 🎈"]}'


def test_a_line_without_a_prompt_gets_an_error_and_the_others_their_answers() -> None:
    client = StubClient(handed_out("not json", '{"p": "two"}', '{"q": "three"}', first=5), COMPLETE)
    assert inference.work(client, echo, options(), inference.Stop()) == 0
    ((first, second, third),) = client.submitted
    assert first["__ERROR__"]["error"] == "not_json"
    assert first["__ERROR__"]["work_id"] == 5
    assert second == {"p": "two", "generations": ["re: two"]}
    assert third["__ERROR__"] == {
        "error": "no_prompt",
        "message": "at . the line has an object without the key 'p'",
        "work_id": 7,
    }


def test_the_engine_is_not_called_when_no_line_has_a_prompt() -> None:
    client = StubClient(handed_out("not json"), COMPLETE)

    def generate(prompts: list[Any]) -> list[list[str]]:
        raise AssertionError("called with nothing to do")

    assert inference.work(client, generate, options(), inference.Stop()) == 0


def test_a_retry_waits_for_as_long_as_the_server_says() -> None:
    sleeps = Sleeps()
    client = StubClient(
        BatchWorkResponse(WorkStatus.RETRY, retry_in=12.5),
        BatchWorkResponse(WorkStatus.RETRY),
        COMPLETE,
    )
    assert inference.work(client, echo, options(), inference.Stop(sleeps)) == 0
    assert sleeps == [12.5, inference.POLL_S]


def test_a_server_that_comes_back_costs_only_the_pauses() -> None:
    sleeps = Sleeps()
    client = StubClient(AWAY, AWAY, handed_out('{"p": "one"}'), COMPLETE)
    client.refusals = 2
    assert inference.work(client, echo, options(), inference.Stop(sleeps)) == 0
    assert sleeps == [1.0, 2.0, 1.0, 2.0]
    assert client.submitted == [[{"p": "one", "generations": ["re: one"]}]]


def test_a_server_that_stays_away_ends_the_program_with_code_five() -> None:
    sleeps = Sleeps()
    assert inference.work(StubClient(AWAY), echo, options(), inference.Stop(sleeps)) == 5
    assert max(sleeps) == inference.LONGEST_PAUSE_S
    assert sum(sleeps) == pytest.approx(inference.SERVER_PATIENCE_S, rel=0.1)


def test_when_generating_fails_the_batch_is_released_and_the_code_is_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = StubClient(handed_out('{"p": "one"}', '{"p": "two"}', first=3))

    def generate(prompts: list[Any]) -> list[list[str]]:
        raise RuntimeError("out of memory")

    assert inference.work(client, generate, options(), inference.Stop()) == 1
    assert client.released == [3, 4]
    assert client.charged == [True, True]
    assert client.submitted == []
    assert "RuntimeError: out of memory" in caplog.text


def test_a_line_that_the_engine_refuses_gets_an_error_and_the_others_their_answers() -> None:
    client = StubClient(handed_out('{"p": "one"}', '{"p": "too long"}', '{"p": "two"}'), COMPLETE)

    def generate(prompts: list[Any]) -> list[list[str]]:
        if any("long" in prompt[-1]["content"] for prompt in prompts):
            raise ValueError("the prompt has 9000 tokens")
        return echo(prompts)

    assert inference.work(client, generate, options(), inference.Stop()) == 0
    first, refused, last = client.submitted[0]
    assert first["generations"] == ["re: one"]
    assert refused["__ERROR__"]["error"] == "generation_failed"
    assert "9000 tokens" in refused["__ERROR__"]["message"]
    assert last["generations"] == ["re: two"]


def test_when_the_server_refuses_the_results_the_batch_is_released_and_the_code_is_one() -> None:
    class RefusedClient(StubClient):
        def submit_results(self, items: Sequence[WorkItem], want: int = 0) -> BatchResultResponse:
            raise BadRequestError("the server refused POST /results: too large")

    client = RefusedClient(handed_out('{"p": "one"}', first=4))
    assert inference.work(client, echo, options(), inference.Stop()) == 1
    assert client.released == [4]


def test_a_signal_while_generating_releases_the_batch_and_the_code_is_three() -> None:
    client = StubClient(handed_out('{"p": "one"}', first=8))
    stop = inference.Stop()

    def generate(prompts: list[Any]) -> list[list[str]]:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("generating went on")

    with stop.listening():
        assert inference.work(client, generate, options(), stop) == 3
    assert client.released == [8]
    assert client.charged == [False]
    assert signal.getsignal(signal.SIGTERM) != stop.on_signal


def test_a_signal_while_sleeping_ends_the_program_with_nothing_to_release() -> None:
    def sleep(seconds: float) -> None:
        stop.on_signal(signal.SIGINT, None)

    stop = inference.Stop(sleep)
    client = StubClient(BatchWorkResponse(WorkStatus.RETRY, retry_in=60))
    assert inference.work(client, echo, options(), stop) == 3
    assert client.released == []


def test_a_signal_while_lines_are_handed_out_releases_them_unanswered() -> None:
    stop = inference.Stop()

    class SignalledClient(StubClient):
        def get_work(self, *args: Any, **more: Any) -> BatchWorkResponse:
            stop.on_signal(signal.SIGTERM, None)
            return super().get_work(*args, **more)

    client = SignalledClient(handed_out('{"p": "one"}', '{"p": "two"}'))
    assert inference.work(client, echo, options(), stop) == 3
    assert client.released == [0, 1]
    assert client.submitted == []


def test_a_signal_while_results_are_handed_in_lets_them_arrive_and_takes_no_more() -> None:
    stop = inference.Stop()

    class SignalledClient(StubClient):
        def submit_results(self, *args: Any, **more: Any) -> BatchResultResponse:
            stop.on_signal(signal.SIGTERM, None)
            return super().submit_results(*args, **more)

    client = SignalledClient(handed_out('{"p": "one"}'))
    assert inference.work(client, echo, options(), stop) == 3
    assert client.submitted == [[{"p": "one", "generations": ["re: one"]}]]
    assert client.released == []
    assert len(client.batch_sizes) == 1


def test_an_engine_that_dies_of_the_same_signal_counts_as_stopped() -> None:
    stop = inference.Stop()
    client = StubClient(handed_out('{"p": "one"}'))

    def generate(prompts: list[Any]) -> list[list[str]]:
        stop.asked = True  # the signal has been noted, the engine's exception comes first
        raise RuntimeError("engine died")

    assert inference.work(client, generate, options(), stop) == 3
    assert client.released == [0]


# --- inference.py: the command line ---------------------------------------------------------


def test_no_line_is_taken_before_the_model_is_loaded() -> None:
    client = StubClient(COMPLETE)
    servers: list[str] = []

    def connect(server: str, worker: str) -> WorkClient:
        servers.append(server)
        return client

    def load(options: Any) -> Any:
        assert client.batch_sizes == []
        return echo

    flags = ["--model_path", "M", "--dispatcher_server", "host:1"]
    assert inference.main(flags, connect, load) == 0
    assert servers == ["host:1"]
    assert len(client.batch_sizes) == 1


def test_an_address_that_is_none_is_a_usage_error_before_the_model_is_loaded() -> None:
    def load(options: Any) -> Any:
        raise AssertionError("loaded a model for nothing")

    flags = ["--model_path", "M", "--dispatcher_server", "nonsense"]
    assert inference.main(flags, load=load) == 2


def test_a_signal_while_the_model_loads_ends_the_program_with_code_three() -> None:
    def load(options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("loading went on")

    flags = ["--model_path", "M", "--dispatcher_server", "host:1"]
    assert inference.main(flags, lambda server, worker: StubClient(COMPLETE), load) == 3


@pytest.mark.parametrize(
    "flags",
    [
        ["--batch_size", "0"],
        ["--prompt_path", "messages"],
        ["--mode", "poem"],
        ["--temperature", "-1"],
        ["--top_p", "0"],
        ["--min_p", "1.5"],
        ["--num_generations", "2", "--temperature", "0"],
    ],
)
def test_flags_that_cannot_be_right_are_a_usage_error(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        options(*flags)
    assert caught.value.code == 2


def test_stop_words_add_up() -> None:
    assert options().stop_word == []
    assert options("--stop_word", "\n\n", "--stop_word", "END").stop_word == ["\n\n", "END"]


def run_inference(*flags: str) -> subprocess.CompletedProcess[str]:
    # vllm=None in sys.modules makes `import vllm` fail as it does where vLLM is not installed.
    code = (
        "import runpy, sys; sys.modules['vllm'] = None; sys.argv = sys.argv[1:];"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(EXAMPLES / "inference.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_help_works_without_vllm_and_shows_every_flag_with_its_default() -> None:
    done = run_inference("--help")
    assert done.returncode == 0
    flags = {flag for action in inference.build_parser()._actions for flag in action.option_strings}
    flags -= {"-h", "--help"}
    assert len(flags) == 13
    assert all(flag in done.stdout for flag in flags)
    assert done.stdout.count("(default:") == len(flags) - 2  # two are required


def test_without_vllm_one_sentence_says_so() -> None:
    done = run_inference("--model_path", "M", "--dispatcher_server", "127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr.strip().count("\n") == 0
    assert "vLLM is not installed" in done.stderr
