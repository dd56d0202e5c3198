"""What existing clients, servers and tasks rely on, kept to the letter.

Written from the compatibility page alone, in its order: imports, tasks, requests and responses,
the task manager, the client, the wire as an older client speaks it, the commands.
"""

from __future__ import annotations

import argparse
import http.client
import importlib
import inspect
import json
import re
import signal
import socket
import threading
import tomllib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

import dispatcher.server.cli
import dispatcher.taskmanager.cli
from dispatcher.client import WorkClient
from dispatcher.models import (
    BatchResultResponse,
    BatchResultSubmission,
    BatchWorkResponse,
    ReleaseWorkRequest,
    ReleaseWorkResponse,
    WorkItem,
    WorkStatus,
)
from dispatcher.taskmanager.backend.base import BackendManager
from dispatcher.taskmanager.backend.request import Request, Response
from dispatcher.taskmanager.task import GeneratorTask, Task, TaskFailed, TaskRetry
from dispatcher.taskmanager.taskmanager import TaskManager
from dispatcher.taskmanager.tasksource.base import TaskSource
from tests.support.processes import (
    ROOT,
    Server,
    dispatcher_server,
    run_python,
    wait_until,
)

TaskGenerator = Generator[Any, Any, Any]

# --- imports --------------------------------------------------------------------------------

IMPORTS = [
    *(
        (module, name)
        for module in ("dispatcher.taskmanager.task", "dispatcher.taskmanager.task.base")
        for name in ("Task", "GeneratorTask", "TaskFailed", "TaskRetry")
    ),
    ("dispatcher.taskmanager.backend.request", "Request"),
    ("dispatcher.taskmanager.backend.request", "Response"),
    ("dispatcher.taskmanager.backend.base", "BackendManager"),
    ("dispatcher.taskmanager.tasksource.base", "TaskSource"),
    ("dispatcher.taskmanager.taskmanager", "TaskManager"),
    ("dispatcher.client", "WorkClient"),
    *(
        ("dispatcher.models", name)
        for name in (
            "WorkItem",
            "WorkStatus",
            "BatchWorkResponse",
            "BatchResultSubmission",
            "BatchResultResponse",
            "ReleaseWorkRequest",
            "ReleaseWorkResponse",
        )
    ),
]


@pytest.mark.parametrize(("module", "name"), IMPORTS)
def test_every_import_path_leads_to_a_class(module: str, name: str) -> None:
    assert inspect.isclass(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("name", ["Task", "GeneratorTask", "TaskFailed", "TaskRetry"])
def test_both_import_paths_of_a_task_class_lead_to_the_same_one(name: str) -> None:
    package = importlib.import_module("dispatcher.taskmanager.task")
    module = importlib.import_module("dispatcher.taskmanager.task.base")
    assert getattr(package, name) is getattr(module, name)


def test_every_import_path_works_as_the_first_import_of_a_process() -> None:
    # An import cycle shows only when its module comes first, so each starts from nothing.
    script = """
import importlib, sys
for module, name in {imports}:
    for loaded in [m for m in sys.modules if m.partition(".")[0] == "dispatcher"]:
        del sys.modules[loaded]
    getattr(importlib.import_module(module), name)
print("all there")
"""
    code, output = run_python("-c", script.format(imports=IMPORTS))
    assert (code, output) == (0, "all there\n")


@pytest.mark.parametrize(
    "module", ["dispatcher.taskmanager.task", "dispatcher.taskmanager.task.base"]
)
def test_the_import_of_a_task_author_loads_no_network_library(module: str) -> None:
    script = (
        f"from {module} import GeneratorTask, Task, TaskFailed, TaskRetry\n"
        "import sys\n"
        "print(sorted({'aiohttp', 'openai'} & set(sys.modules)))"
    )
    code, output = run_python("-c", script)
    assert (code, output) == (0, "[]\n")


# --- signatures -----------------------------------------------------------------------------

REQUIRED = inspect.Parameter.empty
SIGNATURES: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (Task.__init__, {"data": REQUIRED, "context": None}),
    (GeneratorTask.__init__, {"data": REQUIRED, "context": None}),
    (TaskFailed.__init__, {"message": REQUIRED, "error_type": "task_logic_error"}),
    (TaskRetry.__init__, {"message": ""}),
    (GeneratorTask.build_result, {"success": True, "error": None, "error_type": None}),
    (GeneratorTask.is_last_retry_attempt, {}),
    (GeneratorTask.task_generator, {}),
    (Task.get_next_request, {}),
    (Task.process_result, {"result": REQUIRED}),
    (Task.is_done, {}),
    (Task.get_result, {}),
    (Task.should_retry, {}),
    (Request.__init__, {"content": REQUIRED, "context": None}),
    (
        Response.__init__,
        {"request": REQUIRED, "content": None, "error": None, "model_name": None},
    ),
    (Response.from_error, {"request": REQUIRED, "error": REQUIRED, "model_name": None}),
    (Response.get_text, {"n": None}),
    (WorkClient.get_work, {"batch_size": 1}),
    (WorkClient.submit_results, {"items": REQUIRED}),
    (WorkItem.set_result, {"result": REQUIRED}),
    (BackendManager.process, {"request": REQUIRED}),
    (BackendManager.is_healthy, {}),
    (TaskManager.process_tasks, {"task_source": REQUIRED, "backend_manager": REQUIRED}),
]


@pytest.mark.parametrize(
    ("function", "expected"), SIGNATURES, ids=[f.__qualname__ for f, _ in SIGNATURES]
)
def test_parameters_and_defaults_are_as_written_and_added_ones_are_optional(
    function: Callable[..., Any], expected: dict[str, Any]
) -> None:
    parameters = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name != "self" and parameter.kind is not parameter.VAR_KEYWORD
    ]
    known, added = parameters[: len(expected)], parameters[len(expected) :]
    assert [parameter.name for parameter in known] == list(expected)
    for parameter in known:
        # What had to be given may have got a default since: no existing call notices.
        if expected[parameter.name] is not REQUIRED:
            assert parameter.default == expected[parameter.name]
    assert all(parameter.default is not REQUIRED for parameter in added)


def test_build_result_takes_its_own_parameters_by_keyword_only() -> None:
    parameters = inspect.signature(GeneratorTask.build_result).parameters
    for name in ("success", "error", "error_type"):
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY


def test_the_task_manager_takes_its_limits_by_position_and_by_name() -> None:
    for manager in (TaskManager(3, 7), TaskManager(num_workers=3, max_active_tasks=7)):
        assert callable(manager.process_tasks)
    assert list(inspect.signature(TaskManager).parameters)[:2] == [
        "num_workers",
        "max_active_tasks",
    ]


@pytest.mark.parametrize("interface", [Task, GeneratorTask, BackendManager, TaskSource])
def test_an_interface_cannot_be_used_without_its_methods(interface: type) -> None:
    with pytest.raises(TypeError):
        interface({}) if issubclass(interface, Task) else interface()


@pytest.mark.parametrize("missing", ["process", "is_healthy"])
def test_a_backend_manager_must_have_both_methods(missing: str) -> None:
    methods = {"process": lambda self, request: None, "is_healthy": lambda self: True}
    del methods[missing]
    with pytest.raises(TypeError):
        type("Half", (BackendManager,), methods)()


@pytest.mark.parametrize("missing", ["get_next_tasks", "save_task_result", "is_exhausted"])
def test_a_task_source_must_have_all_three_members(missing: str) -> None:
    members: dict[str, Any] = {
        "get_next_tasks": lambda self: [],
        "save_task_result": lambda self, task: None,
        "is_exhausted": property(lambda self: True),
    }
    del members[missing]
    with pytest.raises(TypeError):
        type("Half", (TaskSource,), members)()


# --- tasks ----------------------------------------------------------------------------------


class Scripted(GeneratorTask):
    """A task whose generator is given with the data, so that each test shows its own."""

    def task_generator(self) -> TaskGenerator:
        return self.data["script"](self)


def scripted(script: Callable[[GeneratorTask], Any], context: Any = None, **data: Any) -> Scripted:
    return Scripted({**data, "script": script}, context)


def chat(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def answer(request: Request, text: str) -> Response:
    content = {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }
    return Response(request, content, model_name="tiny")


def echo(request: Request) -> Response:
    return answer(request, request.content["messages"][0]["content"].upper())


def drive(task: Task, reply: Callable[[Request], Response] = echo) -> int:
    """Do what a task manager does until the task is done; return the number of requests."""
    asked = 0
    while True:
        requests = list(iter(task.get_next_request, None))
        asked += len(requests)
        # Answered last first: the order of answers must not matter to a task.
        for request in reversed(requests):
            task.process_result(reply(request))
        if task.is_done():
            return asked
        assert requests, "the task is not done and asks nothing"


def result_of(task: Task, reply: Callable[[Request], Response] = echo) -> Any:
    drive(task, reply)
    result, context = task.get_result()
    assert context is task.context
    return result


@pytest.mark.parametrize("base", [Task, GeneratorTask])
def test_a_task_keeps_its_data_and_its_context(base: type[Task]) -> None:
    # Given a task with all it must have
    methods = ("get_next_request", "process_result", "is_done", "get_result", "task_generator")
    kind: Any = type("Plain", (base,), {name: lambda self, *_: None for name in methods})
    data, context = {"id": 1}, SimpleNamespace(work_id=7)
    # When it is made by position, by name, and without a context
    for task in (kind(data, context), kind(data=data, context=context)):
        assert task.data == {"id": 1}
        assert task.context is context
    assert kind({}).context is None
    # Then it does not want to be retried before it ran
    assert kind({}).should_retry() is False
    assert isinstance(kind({}).retry_reason, str)


def test_a_task_may_have_a_constructor_of_its_own() -> None:
    class Counting(GeneratorTask):
        def __init__(self, data: dict[str, Any], context: Any = None) -> None:
            super().__init__(data, context)
            self.turns = 0

        def task_generator(self) -> TaskGenerator:
            self.turns += 1
            yield Request(chat("hello"))
            self.turns += 1
            return {"turns": self.turns}

    assert result_of(Counting({})) == {"turns": 2}


def test_a_yielded_request_is_answered_with_its_response() -> None:
    def script(task: GeneratorTask) -> TaskGenerator:
        response = yield Request(chat(task.data["text"]))
        assert isinstance(response, Response)
        return {"said": response.get_text()}

    task = scripted(script, text="good morning")
    assert task.is_done() is False
    request = task.get_next_request()
    assert isinstance(request, Request)
    assert request.content == chat("good morning")
    assert task.get_next_request() is None
    assert task.is_done() is False
    task.process_result(echo(request))
    assert task.is_done() is True
    assert task.get_next_request() is None
    assert task.get_result() == ({"said": "GOOD MORNING"}, None)


def test_a_yielded_list_is_answered_in_its_order_whatever_came_back_first() -> None:
    def script(task: GeneratorTask) -> TaskGenerator:
        a, b = yield [Request(chat("a")), Request(chat("b"))]
        c, d, e = yield [Request(chat(letter)) for letter in "cde"]
        return {"said": [response.get_text() for response in (a, b, c, d, e)]}

    assert result_of(scripted(script)) == {"said": ["A", "B", "C", "D", "E"]}


def test_a_list_of_one_is_answered_with_a_list_that_also_speaks_for_its_member() -> None:
    def script(task: GeneratorTask) -> TaskGenerator:
        responses = yield [Request(chat("a"))]
        (only,) = responses
        return {"texts": [responses[0].get_text(), only.get_text(), responses.get_text()]}

    assert result_of(scripted(script)) == {"texts": ["A", "A", "A"]}


def test_requests_and_lists_of_requests_may_take_turns() -> None:
    def script(task: GeneratorTask) -> TaskGenerator:
        first = yield Request(chat("one"))
        pair = yield [Request(chat(first.get_text() + suffix)) for suffix in "xy"]
        last = yield Request(chat("".join(response.get_text() for response in pair)))
        return {"said": last.get_text()}

    task = scripted(script)
    assert drive(task) == 4
    assert task.get_result()[0] == {"said": "ONEXONEY"}


def test_a_task_may_return_without_having_asked_anything() -> None:
    def script(task: GeneratorTask) -> TaskGenerator:
        if task.data["skip"]:
            return {"skipped": True}
        yield Request(chat("never"))
        return {}

    task = scripted(script, skip=True)
    assert drive(task) == 0
    assert task.get_result()[0] == {"skipped": True}


def test_a_task_gets_raw_content_usage_and_its_own_request_context_back() -> None:
    def script(task: GeneratorTask) -> TaskGenerator:
        responses = yield [Request(chat(w), context={"word": w, "turn": 1}) for w in ("x", "y")]
        return {
            "words": [response.request.context["word"] for response in responses],
            "raw": responses[0].content["choices"][0]["message"]["content"],
            "tokens": responses[0].content["usage"]["total_tokens"],
        }

    assert result_of(scripted(script)) == {"words": ["x", "y"], "raw": "X", "tokens": 5}


def test_a_failed_request_reaches_the_task_as_a_response() -> None:
    def script(task: GeneratorTask) -> TaskGenerator:
        response = yield Request(chat("hello"))
        return {"ok": response.is_success, "error": response.error, "text": response.get_text()}

    result = result_of(scripted(script), lambda r: Response.from_error(r, "too long"))
    assert result == {"ok": False, "error": "too long", "text": None}


def test_task_failed_becomes_an_error_line_with_the_data_of_the_task() -> None:
    class Failing(GeneratorTask):
        def task_generator(self) -> TaskGenerator:
            yield Request(chat("hello"))
            raise TaskFailed("no answer was good enough")

    task = Failing({"id": 5, "text": "x"})
    assert result_of(task) == {
        "__ERROR__": {
            "error": "task_logic_error",
            "message": "no answer was good enough",
            "task_data": {"id": 5, "text": "x"},
        }
    }
    assert task.should_retry() is False


@pytest.mark.parametrize(
    "failure", [TaskFailed("bad", "parse_error"), TaskFailed("bad", error_type="parse_error")]
)
def test_task_failed_before_the_first_request_keeps_its_error_type(failure: TaskFailed) -> None:
    class Failing(GeneratorTask):
        def task_generator(self) -> TaskGenerator:
            raise failure
            yield

    task = Failing({"id": 5})
    assert drive(task) == 0
    assert task.get_result()[0]["__ERROR__"] == {
        "error": "parse_error",
        "message": "bad",
        "task_data": {"id": 5},
    }


def test_task_failed_may_be_raised_far_below_the_generator_and_be_caught_there() -> None:
    def check(text: str) -> None:
        if text == "BAD":
            raise TaskFailed("bad word")

    def script(task: GeneratorTask) -> TaskGenerator:
        response = yield Request(chat("bad"))
        try:
            check(response.get_text())
        except TaskFailed as failure:
            return {"caught": str(failure)}
        return {}

    assert result_of(scripted(script)) == {"caught": "bad word"}


@pytest.mark.parametrize(
    ("retry", "reason"),
    [(TaskRetry(), ""), (TaskRetry("again"), "again"), (TaskRetry(message="again"), "again")],
)
def test_task_retry_asks_for_another_try_and_tells_why(retry: TaskRetry, reason: str) -> None:
    def script(task: GeneratorTask) -> TaskGenerator:
        yield Request(chat("hello"))
        raise retry

    task = scripted(script)
    drive(task)
    assert task.is_done() is True
    assert task.should_retry() is True
    assert task.retry_reason == reason


def test_a_task_that_ended_well_does_not_ask_for_another_try() -> None:
    def script(task: GeneratorTask) -> TaskGenerator:
        yield Request(chat("hello"))
        return {}

    task = scripted(script)
    drive(task)
    assert task.should_retry() is False


class Ready(GeneratorTask):
    def task_generator(self) -> TaskGenerator:
        return self.build_result()
        yield


def test_build_result_puts_payload_over_data_and_says_success() -> None:
    task = Ready({"id": 1, "text": "x"})
    assert task.build_result(text="y", extra=[1]) == {
        "id": 1,
        "text": "y",
        "extra": [1],
        "task_metadata": {"success": True},
    }
    assert task.data == {"id": 1, "text": "x"}
    assert result_of(task) == {"id": 1, "text": "x", "task_metadata": {"success": True}}


def test_build_result_tells_errors_and_tries_when_there_are_any() -> None:
    task = Ready({"id": 1}, WorkItem(0, "{}", retry_count=0, max_retries=3))
    assert task.build_result(success=False, error="no", error_type="parse_error") == {
        "id": 1,
        "task_metadata": {
            "success": False,
            "error": "no",
            "error_type": "parse_error",
            "retry_count": 0,
            "max_retries": 3,
        },
    }


@pytest.mark.parametrize(
    ("context", "told"),
    [
        (None, {}),
        (SimpleNamespace(work_id=3), {}),
        (SimpleNamespace(retry_count=None, max_retries=None), {}),
        (SimpleNamespace(retry_count=2), {"retry_count": 2}),
        (WorkItem(0, "{}"), {"retry_count": 0}),
        (WorkItem(0, "{}", retry_count=1, max_retries=-1), {"retry_count": 1, "max_retries": -1}),
    ],
)
def test_build_result_leaves_out_what_the_context_does_not_know(
    context: Any, told: dict[str, int]
) -> None:
    assert Ready({}, context).build_result() == {"task_metadata": {"success": True, **told}}


@pytest.mark.parametrize(
    ("retry_count", "max_retries", "is_last"),
    [
        *((0, 3, False), (2, 3, False), (3, 3, True), (4, 3, True), (0, 0, True)),
        *((0, None, False), (9, None, False), (0, -1, False), (9, -1, False)),
    ],
)
def test_the_last_try_is_the_one_whose_retries_are_used_up(
    retry_count: int, max_retries: int | None, is_last: bool
) -> None:
    contexts = [
        SimpleNamespace(retry_count=retry_count, max_retries=max_retries),
        WorkItem(0, "{}", None, retry_count, max_retries),
    ]
    for context in contexts:
        assert Ready({}, context).is_last_retry_attempt() is is_last


@pytest.mark.parametrize("context", [None, SimpleNamespace(), SimpleNamespace(retry_count=5)])
def test_no_try_is_the_last_one_when_the_context_has_no_limit(context: Any) -> None:
    assert Ready({}, context).is_last_retry_attempt() is False


def test_a_task_may_change_its_data_while_it_runs() -> None:
    def script(task: GeneratorTask) -> TaskGenerator:
        del task.data["script"]
        task.data["turns"] = []
        for word in task.data.pop("words"):
            response = yield Request(chat(word))
            task.data["turns"].append(response.get_text())
        if task.data["fail"]:
            raise TaskFailed("at last")
        return task.build_result()

    assert result_of(scripted(script, words=["a", "b"], fail=False)) == {
        "fail": False,
        "turns": ["A", "B"],
        "task_metadata": {"success": True},
    }
    failed = result_of(scripted(script, words=["a"], fail=True))
    assert failed["__ERROR__"]["task_data"] == {"fail": True, "turns": ["A"]}


# --- request and response -------------------------------------------------------------------


def test_a_request_copies_its_content_deeply_and_keeps_its_context() -> None:
    # Given a conversation that a task goes on with
    content, context = chat("first"), {"turn": 1}
    request = Request(content, context=context)
    # When the task changes it after the request was made
    content["messages"][0]["content"] = "changed"
    content["messages"].append({"role": "user", "content": "second"})
    content["temperature"] = 1.0
    # Then the request still asks what it asked
    assert request.content == chat("first")
    assert request.context is context
    assert Request({}, context).context is context
    assert Request({}).context is None


@pytest.mark.parametrize(
    ("content", "error", "is_success"),
    [
        *(({"choices": []}, None, True), ({}, None, True), (None, None, False)),
        *((None, "down", False), ({"choices": []}, "cut off", False)),
    ],
)
def test_a_response_is_a_success_with_content_and_without_error(
    content: dict[str, Any] | None, error: str | None, is_success: bool
) -> None:
    assert Response(Request({}), content, error).is_success is is_success
    assert Response(Request({}), content=content, error=error).is_success is is_success


def test_a_response_holds_what_it_was_made_of() -> None:
    request = Request({}, context={"id": 3})
    bare = Response(request)
    assert (bare.content, bare.error, bare.model_name) == (None, None, None)
    full = Response(request, {"choices": []}, None, "tiny")
    assert (full.content, full.error, full.model_name) == ({"choices": []}, None, "tiny")
    assert full.request is request
    assert full.request.context == {"id": 3}


def test_from_error_makes_a_response_without_content() -> None:
    request, error = Request({}), ValueError("down")
    for response in (Response.from_error(request, error), Response.from_error(request, error, "m")):
        assert isinstance(response, Response)
        assert response.request is request
        assert response.error is error
        assert response.content is None
        assert response.is_success is False
        assert response.get_text() is None
    assert Response.from_error(request, error).model_name is None
    assert Response.from_error(request, error, "m").model_name == "m"
    assert Response.from_error(request, error, model_name="m").model_name == "m"


CHOICES = {
    "chat": [{"message": {"role": "assistant", "content": text}} for text in ("a", "b", "c")],
    "text": [{"text": text} for text in ("a", "b", "c")],
}


@pytest.mark.parametrize("kind", CHOICES)
def test_get_text_is_the_first_choice_or_the_first_n(kind: str) -> None:
    response = Response(Request({}), {"choices": CHOICES[kind]})
    assert response.get_text() == "a"
    assert response.get_text(None) == "a"
    assert response.get_text(1) == ["a"]
    assert response.get_text(2) == ["a", "b"]
    assert response.get_text(n=3) == ["a", "b", "c"]
    assert response.get_text(9) == ["a", "b", "c"]


@pytest.mark.parametrize("content", [None, {}, {"choices": []}, {"data": [{"embedding": [0.5]}]}])
@pytest.mark.parametrize("n", [None, 1, 3])
def test_get_text_is_none_when_there_is_none(content: dict[str, Any] | None, n: int | None) -> None:
    assert Response(Request({}), content).get_text(n) is None


def test_get_text_is_none_when_the_message_has_no_text() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    assert Response(Request({}), {"choices": [{"message": message}]}).get_text() is None


def test_get_text_keeps_an_empty_answer() -> None:
    assert answer(Request({}), "").get_text() == ""


# --- the task manager with a synchronous source and backend ----------------------------------


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """End what blocks the main thread: `process_tasks` has no time limit of its own."""

    def stop(signum: int, frame: object) -> None:
        raise TimeoutError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class ListSource(TaskSource):
    """Hands out tasks two at a time; a task that asks for another try is made anew."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.waiting = list(tasks)
        self.out = 0
        self.saved: list[Task] = []
        self.retried: list[tuple[Any, str]] = []

    def get_next_tasks(self) -> list[Task]:
        tasks, self.waiting = self.waiting[:2], self.waiting[2:]
        self.out += len(tasks)
        return tasks

    def save_task_result(self, task: Task) -> None:
        self.out -= 1
        if task.should_retry():
            self.retried.append((task.data["id"], task.retry_reason))
            context = SimpleNamespace(**vars(task.context))
            context.retry_count += 1
            self.waiting.append(type(task)(task.data, context))
        else:
            self.saved.append(task)

    @property
    def is_exhausted(self) -> bool:
        return not self.waiting and not self.out

    def results(self) -> dict[Any, Any]:
        return {task.data["id"]: task.get_result()[0] for task in self.saved}


class EchoBackend(BackendManager):
    """Answers in upper case and counts how many callers it has at once."""

    def __init__(self, meet: int = 1) -> None:
        # Callers wait for each other, so that too few of them at a time is an error.
        self._meeting = threading.Barrier(meet)
        self._lock = threading.Lock()
        self._now = 0
        self.most = 0
        self.asked = 0

    def process(self, request: Request) -> Response:
        with self._lock:
            self.asked += 1
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            self._meeting.wait(5)
            return echo(request)
        except threading.BrokenBarrierError:
            return Response.from_error(request, "the others did not come")
        finally:
            with self._lock:
                self._now -= 1

    def is_healthy(self) -> bool:
        return True


def process(
    source: TaskSource, backend: BackendManager, workers: int = 4, active: int = 10
) -> None:
    with within(15):
        # Annotated, because a type checker must not know better than the test.
        returned: object = TaskManager(workers, active).process_tasks(source, backend)
    assert returned is None


def test_process_tasks_returns_when_every_result_is_saved() -> None:
    # Given more tasks than may be active, with requests one by one and in lists
    def script(task: GeneratorTask) -> TaskGenerator:
        first = yield Request(chat(f"n{task.data['id']}"))
        pair = yield [Request(chat(first.get_text() + letter)) for letter in "ab"]
        return {"said": [response.get_text() for response in pair]}

    source = ListSource([scripted(script, id=n) for n in range(9)])
    backend = EchoBackend()
    # When they are processed
    process(source, backend, workers=3, active=4)
    # Then every task is saved once, done, with its own answers in the order it asked
    assert source.is_exhausted
    assert source.results() == {n: {"said": [f"N{n}A", f"N{n}B"]} for n in range(9)}
    assert all(task.is_done() for task in source.saved)
    assert len(source.saved) == 9
    assert backend.asked == 27


def test_process_tasks_takes_its_arguments_by_name() -> None:
    def script(task: GeneratorTask) -> TaskGenerator:
        response = yield Request(chat("hello"))
        return {"said": response.get_text()}

    source = ListSource([scripted(script, id=0)])
    with within(15):
        TaskManager(num_workers=1, max_active_tasks=1).process_tasks(
            task_source=source, backend_manager=EchoBackend()
        )
    assert source.results() == {0: {"said": "HELLO"}}


def test_process_tasks_with_an_exhausted_source_returns_at_once() -> None:
    source, backend = ListSource([]), EchoBackend()
    process(source, backend)
    assert source.saved == []
    assert backend.asked == 0


def test_the_requests_of_a_list_are_answered_side_by_side() -> None:
    def script(task: GeneratorTask) -> TaskGenerator:
        responses = yield [Request(chat(letter)) for letter in "abc"]
        return {"said": [response.get_text() for response in responses]}

    source, backend = ListSource([scripted(script, id=0)]), EchoBackend(meet=3)
    process(source, backend, workers=3, active=1)
    assert source.results() == {0: {"said": ["A", "B", "C"]}}
    assert backend.most == 3


def test_num_workers_is_the_number_of_requests_at_a_time() -> None:
    def script(task: GeneratorTask) -> TaskGenerator:
        responses = yield [Request(chat(letter)) for letter in "abcd"]
        return {"said": [response.get_text() for response in responses]}

    source = ListSource([scripted(script, id=n) for n in range(5)])
    backend = EchoBackend(meet=2)
    process(source, backend, workers=2, active=5)
    assert backend.most == 2
    assert source.results() == {n: {"said": ["A", "B", "C", "D"]} for n in range(5)}


def test_max_active_tasks_is_the_number_of_tasks_at_a_time() -> None:
    active: set[int] = set()
    seen: list[int] = []

    def script(task: GeneratorTask) -> TaskGenerator:
        active.add(task.data["id"])
        for _ in range(3):
            seen.append(len(active))
            yield Request(chat("x"))
        active.discard(task.data["id"])
        return {}

    source = ListSource([scripted(script, id=n) for n in range(8)])
    backend = EchoBackend()
    process(source, backend, workers=6, active=2)
    assert len(source.saved) == 8
    assert max(seen) == 2
    assert backend.most <= 2


def test_a_failed_task_is_saved_with_its_error_and_the_others_go_on() -> None:
    def script(task: GeneratorTask) -> TaskGenerator:
        del task.data["script"]
        response = yield Request(chat("x"))
        if task.data["id"] == 1:
            raise TaskFailed("not this one", "judged_bad")
        return {"said": response.get_text()}

    source = ListSource([scripted(script, id=n) for n in range(3)])
    process(source, EchoBackend())
    assert source.results() == {
        0: {"said": "X"},
        1: {
            "__ERROR__": {
                "error": "judged_bad",
                "message": "not this one",
                "task_data": {"id": 1},
            }
        },
        2: {"said": "X"},
    }


def test_a_task_that_asks_for_another_try_reaches_the_source_with_its_reason() -> None:
    # Given a task that gives up only on its last try, and a source that hands it out again
    def script(task: GeneratorTask) -> TaskGenerator:
        response = yield Request(chat("x"))
        if task.data["id"] != 1:
            return {"said": response.get_text()}
        if task.is_last_retry_attempt():
            return {"tries": task.context.retry_count + 1}
        raise TaskRetry(f"try {task.context.retry_count} was no good")

    tasks = [
        scripted(script, SimpleNamespace(retry_count=0, max_retries=2), id=n) for n in range(3)
    ]
    source = ListSource(tasks)
    # When they are processed
    process(source, EchoBackend())
    # Then save_task_result saw each try, and at the end the result
    assert source.retried == [(1, "try 0 was no good"), (1, "try 1 was no good")]
    assert source.results() == {0: {"said": "X"}, 1: {"tries": 3}, 2: {"said": "X"}}


def test_a_task_that_is_no_generator_is_run_through_its_own_methods() -> None:
    class TwoTurns(Task):
        def __init__(self, data: dict[str, Any], context: Any = None) -> None:
            super().__init__(data, context)
            self.to_ask = [Request(chat("a"), context=0), Request(chat("b"), context=1)]
            self.texts: list[tuple[int, str]] = []

        def get_next_request(self) -> Request | None:
            return self.to_ask.pop() if self.to_ask else None

        def process_result(self, result: Response) -> None:
            self.texts.append((result.request.context, result.get_text()))

        def is_done(self) -> bool:
            return len(self.texts) == 2

        def get_result(self) -> tuple[dict[str, Any], Any]:
            return {"texts": [text for _, text in sorted(self.texts)]}, self.context

    source = ListSource([TwoTurns({"id": n}, f"context {n}") for n in range(3)])
    process(source, EchoBackend())
    assert source.results() == {n: {"texts": ["A", "B"]} for n in range(3)}
    assert {task.get_result()[1] for task in source.saved} == {f"context {n}" for n in range(3)}


class Raising(Task):
    """A task that is no generator and raises what its data says when it is answered."""

    def __init__(self, data: dict[str, Any], context: Any = None) -> None:
        super().__init__(data, context)
        self.to_ask = [Request(chat("a"))]

    def get_next_request(self) -> Request | None:
        return self.to_ask.pop() if self.to_ask else None

    def process_result(self, result: Response) -> None:
        raise self.data.pop("raises")

    def is_done(self) -> bool:
        return False

    def get_result(self) -> tuple[dict[str, Any], Any]:
        return {}, self.context


def test_task_failed_of_a_task_that_is_no_generator_is_saved_as_its_error() -> None:
    source = ListSource([Raising({"id": 0, "raises": TaskFailed("bad", "parse_error")})])
    process(source, EchoBackend())
    assert source.results() == {
        0: {"__ERROR__": {"error": "parse_error", "message": "bad", "task_data": {"id": 0}}}
    }


def test_task_retry_of_a_task_that_is_no_generator_is_saved_as_a_wish_for_another_try() -> None:
    saved: list[tuple[bool, str]] = []

    class Noting(ListSource):
        def save_task_result(self, task: Task) -> None:
            self.out -= 1
            saved.append((task.should_retry(), task.retry_reason))

    process(Noting([Raising({"id": 0, "raises": TaskRetry("again")})]), EchoBackend())
    assert saved == [(True, "again")]


# --- the models -----------------------------------------------------------------------------


def test_a_work_item_has_its_fields_in_order_and_their_defaults() -> None:
    item = WorkItem(3, "line")
    assert (item.work_id, item.content) == (3, "line")
    assert (item.result, item.retry_count, item.max_retries) == (None, 0, None)
    full = WorkItem(3, "line", '{"a": 1}', 2, 5)
    assert full == WorkItem(
        work_id=3, content="line", result='{"a": 1}', retry_count=2, max_retries=5
    )
    assert (full.result, full.retry_count, full.max_retries) == ('{"a": 1}', 2, 5)


def test_set_result_attaches_the_text() -> None:
    item = WorkItem(0, "line")
    item.set_result('{"a": 1}')
    assert item.result == '{"a": 1}'


def test_the_values_of_work_status_are_the_words_on_the_wire() -> None:
    assert {status.name: status.value for status in WorkStatus} == {
        "OK": "OK",
        "ALL_WORK_COMPLETE": "all_work_complete",
        "RETRY": "retry",
        "SERVER_UNAVAILABLE": "server_unavailable",
    }
    assert WorkStatus("retry") is WorkStatus.RETRY
    assert all(status == status.value for status in WorkStatus)


def test_the_other_models_can_be_made_by_the_names_of_their_fields() -> None:
    item = WorkItem(0, "line")
    work = BatchWorkResponse(status=WorkStatus.OK, retry_in=None, items=[item])
    assert (work.status, work.retry_in, work.items) == (WorkStatus.OK, None, [item])
    later = BatchWorkResponse(status=WorkStatus.RETRY, retry_in=30)
    assert (later.retry_in, later.items) == (30, [])
    assert BatchResultSubmission(items=[item]).items == [item]
    results = BatchResultResponse(status=WorkStatus.OK, count=2)
    assert (results.status, results.count) == (WorkStatus.OK, 2)
    assert ReleaseWorkRequest(work_ids=[1, 2]).work_ids == [1, 2]
    released = ReleaseWorkResponse(status=WorkStatus.OK, released_count=2)
    assert (released.status, released.released_count) == (WorkStatus.OK, 2)


# --- servers for the tests below --------------------------------------------------------------

Serve = Callable[..., "Run"]
LINES = ['{"id": 0, "text": "zero"}', '{"id": 1, "text": "yksi ä 😀"}', '{"id": 2}']


@dataclass
class Run:
    """A real server process over a small file, and an older client's way to call it."""

    server: Server
    infile: Path
    outfile: Path

    @property
    def address(self) -> str:
        return self.server.address

    def call(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        with closing(http.client.HTTPConnection(self.address, timeout=10)) as connection:
            payload = None if body is None else json.dumps(body).encode()
            headers = {"Content-Type": "application/json"} if payload is not None else {}
            connection.request(method, path, payload, headers)
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())

    def get(self, path: str) -> Any:
        status, reply = self.call("GET", path)
        assert status == 200, reply
        return reply

    def post(self, path: str, body: object) -> Any:
        status, reply = self.call("POST", path, body)
        assert status == 200, reply
        return reply

    def output(self, count: int) -> list[Any]:
        """Return the output's lines once there are `count`."""

        def lines() -> list[bytes]:
            return self.outfile.read_bytes().split(b"\n")[:-1] if self.outfile.exists() else []

        wait_until(lambda: len(lines()) >= count, f"{count} lines of output")
        assert len(lines()) == count
        return [json.loads(line) for line in lines()]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start servers; those that still run are ended with the test."""
    open_runs: list[Any] = []

    def start(*flags: str | Path, lines: Sequence[str] = LINES) -> Run:
        infile, outfile = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        infile.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        # An older client sends no token.
        context = dispatcher_server("--infile", infile, "--outfile", outfile, "--no-auth", *flags)
        run = Run(context.__enter__(), infile, outfile)
        open_runs.append(context)
        return run

    try:
        yield start
    finally:
        for context in open_runs:
            context.__exit__(None, None, None)


@dataclass
class Peer:
    """A tiny HTTP server on a thread; `calls` is what it was asked."""

    address: str
    calls: list[tuple[str, str, Any]] = field(default_factory=list)

    @property
    def port(self) -> str:
        return self.address.rpartition(":")[2]

    def bodies(self, path: str) -> list[Any]:
        return [body for _, called, body in self.calls if urlsplit(called).path == path]


@contextmanager
def peer(answers: Callable[[str, str, Any], tuple[int, Any]], port: int = 0) -> Iterator[Peer]:
    """Serve `answers(method, path, body) -> (status, JSON)`; at the end hang up on everybody."""
    connections: list[socket.socket] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            connections.append(self.request)
            super().setup()

        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            this.calls.append((self.command, self.path, body))
            status, reply = answers(self.command, self.path, body)
            payload = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    this = Peer(f"127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield this
    finally:
        server.shutdown()
        for connection in connections:
            with suppress(OSError):  # the other side may have hung up first
                connection.shutdown(socket.SHUT_RDWR)
        server.server_close()
        thread.join(5)


def missing(method: str, path: str, body: Any) -> tuple[int, Any]:
    return 404, {"detail": "Not Found"}


class OlderServer:
    """The core of the protocol and nothing else: exact replies, 404 for every other call."""

    def __init__(self, lines: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self._waiting = [
            {"work_id": n, "content": line, "result": None, "retry_count": 0, "max_retries": 3}
            for n, line in enumerate(lines)
        ]
        self._open = len(lines)
        self.results: dict[int, Any] = {}

    def __call__(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        url = urlsplit(path)
        with self._lock:
            match method, url.path:
                case "GET", "/work":
                    return 200, self._work(int(parse_qs(url.query).get("batch_size", ["1"])[0]))
                case "POST", "/results":
                    # It validates whole items, as it did.
                    for item in body["items"]:
                        assert isinstance(item["content"], str)
                        assert self.results.get(item["work_id"]) is None
                        self.results[item["work_id"]] = json.loads(item["result"])
                        self._open -= 1
                    return 200, {"status": "OK", "count": len(body["items"])}
                case "POST", "/release":
                    return 200, {"status": "OK", "released_count": len(body["work_ids"])}
        return 404, {"detail": "Not Found"}

    def _work(self, count: int) -> dict[str, Any]:
        if not self._open:
            return {"status": "all_work_complete", "items": []}
        items, self._waiting = self._waiting[:count], self._waiting[count:]
        if not items:
            return {"status": "retry", "retry_in": 1, "items": []}
        return {"status": "OK", "retry_in": None, "items": items}


# --- the client -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["{}", "http://{}", "http://{}/"])
def test_a_client_takes_host_and_port_or_a_url(form: str) -> None:
    with peer(OlderServer(LINES)) as server:
        work = WorkClient(form.format(server.address)).get_work()
        assert work.status is WorkStatus.OK
        assert [item.work_id for item in work.items] == [0]


def test_a_client_works_through_a_real_server(serve: Serve) -> None:
    # Given a server over three lines
    run = serve("--retry", "7", "--max-retries", "2")
    client = WorkClient(run.address)
    # When items are asked for, one by default and then more
    first = client.get_work()
    assert isinstance(first, BatchWorkResponse)
    assert (first.status, first.retry_in) == (WorkStatus.OK, None)
    (zero,) = first.items
    assert isinstance(zero, WorkItem)
    assert (zero.work_id, zero.content, zero.result) == (0, LINES[0], None)
    assert (zero.retry_count, zero.max_retries) == (0, 2)
    one, two = client.get_work(batch_size=5).items
    assert (one.work_id, one.content) == (1, LINES[1])
    # Then nothing is left for the moment
    later = client.get_work()
    assert (later.status, later.retry_in, later.items) == (WorkStatus.RETRY, 7, [])
    # When one item is given back, it comes again, charged
    released = client.release_work([two.work_id])
    assert isinstance(released, ReleaseWorkResponse)
    assert (released.status, released.released_count) == (WorkStatus.OK, 1)
    (again,) = client.get_work(3).items
    assert (again.work_id, again.retry_count, again.max_retries) == (2, 1, 2)
    # When all results are in, the work is complete and the output whole and in order
    for item in (zero, one, again):
        item.set_result(json.dumps({"line": item.content}))
    submitted = client.submit_results([again, zero, one])
    assert isinstance(submitted, BatchResultResponse)
    assert (submitted.status, submitted.count) == (WorkStatus.OK, 3)
    complete = client.get_work()
    assert (complete.status, complete.items) == (WorkStatus.ALL_WORK_COMPLETE, [])
    assert run.output(3) == [{"line": line} for line in LINES]


def test_without_a_server_every_call_says_server_unavailable() -> None:
    # Given a port that is taken but where nobody listens
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        client = WorkClient(f"127.0.0.1:{nobody.getsockname()[1]}")
        # When it is called, then no call raises
        work = client.get_work(3)
        assert (work.status, work.items) == (WorkStatus.SERVER_UNAVAILABLE, [])
        submitted = client.submit_results([WorkItem(0, "x", result="{}")])
        assert (submitted.status, submitted.count) == (WorkStatus.SERVER_UNAVAILABLE, 0)
        released = client.release_work([0])
        assert (released.status, released.released_count) == (WorkStatus.SERVER_UNAVAILABLE, 0)


def test_a_client_notices_that_its_server_left_and_that_one_came_back() -> None:
    # Given a client that has talked to a server
    with peer(OlderServer(LINES)) as server:
        client = WorkClient(server.address)
        assert client.get_work().status is WorkStatus.OK
    # When the server is gone, then the next call says so
    assert client.get_work().status is WorkStatus.SERVER_UNAVAILABLE
    # And when one is there again, the same client goes on
    with peer(OlderServer(LINES), port=int(server.port)):
        assert client.get_work().status is WorkStatus.OK


def test_a_404_means_that_all_work_is_complete() -> None:
    with peer(missing) as server:
        work = WorkClient(server.address).get_work(4)
    assert (work.status, work.items) == (WorkStatus.ALL_WORK_COMPLETE, [])


def test_an_older_server_gets_what_it_knows_and_its_replies_are_understood() -> None:
    # Given a server that speaks the core of the protocol only
    older = OlderServer(LINES[:2])
    with peer(older) as server:
        client = WorkClient(server.address)
        # When a client works through it
        zero, one = client.get_work(2).items
        assert (zero.work_id, zero.content, zero.result) == (0, LINES[0], None)
        assert (zero.retry_count, zero.max_retries) == (0, 3)
        later = client.get_work()
        assert (later.status, later.retry_in) == (WorkStatus.RETRY, 1)
        assert client.release_work([1]).released_count == 1
        zero.set_result('{"a": 0}')
        one.set_result('{"a": 1}')
        assert client.submit_results([zero, one]).count == 2
        assert client.get_work().status is WorkStatus.ALL_WORK_COMPLETE
    # Then whole items went back, and ids under the known name
    assert older.results == {0: {"a": 0}, 1: {"a": 1}}
    (submission,) = server.bodies("/results")
    assert [item["content"] for item in submission["items"]] == LINES[:2]
    (release,) = server.bodies("/release")
    assert release["work_ids"] == [1]


def test_a_reply_with_more_fields_than_known_is_understood() -> None:
    reply = {
        "status": "OK",
        "retry_in": None,
        "items": [{"work_id": 4, "content": "x", "priority": 9}],
        "server_version": "9",
    }
    with peer(lambda *_: (200, reply)) as server:
        (item,) = WorkClient(server.address).get_work().items
    assert (item.work_id, item.content, item.result) == (4, "x", None)
    assert (item.retry_count, item.max_retries) == (0, None)


# --- the wire, as an older client speaks it ----------------------------------------------------

KNOWN_FIELDS = ("work_id", "content", "result", "retry_count", "max_retries")


def known(item: dict[str, Any]) -> dict[str, Any]:
    """Cut an item to the fields an older client has: it parses, and so drops all others."""
    return {name: item[name] for name in KNOWN_FIELDS}


def test_an_older_client_works_through_a_run(serve: Serve) -> None:
    # Given a server over three lines
    run = serve("--retry", "11", "--max-retries", "4")
    # When work is asked for without a size, then with one that is too large
    first = run.get("/work")
    rest = run.get("/work?batch_size=10")
    # Then the replies have every field, and one item is the default
    for reply in (first, rest):
        assert reply["status"] == "OK"
        assert reply["retry_in"] is None
    assert [known(item) for item in first["items"] + rest["items"]] == [
        {"work_id": n, "content": line, "result": None, "retry_count": 0, "max_retries": 4}
        for n, line in enumerate(LINES)
    ]
    assert len(first["items"]) == 1
    # When nothing is left but not all is done, then it says when to ask again
    later = run.get("/work?batch_size=1")
    assert later["status"] == "retry"
    assert later["retry_in"] == 11
    assert later["items"] == []
    # When whole items come back: the known fields alone, all that came, and unknown ones
    items = [known(first["items"][0]), dict(rest["items"][0]), known(rest["items"][1])]
    for item in items:
        item["result"] = json.dumps({"was": item["content"]}, ensure_ascii=False)
    items[2] |= {"duration": 1.5, "host": {"name": "n1"}, "tags": None}
    assert run.post("/results", {"items": items[1:2]})["count"] == 1
    reply = run.post("/results", {"items": [items[2], items[0]], "client_version": "0.0.1"})
    assert reply["status"] == "OK"
    assert reply["count"] == 2
    # Then the work is complete and the output in the order of the input
    complete = run.get("/work?batch_size=3")
    assert complete["status"] == "all_work_complete"
    assert complete["items"] == []
    assert run.output(3) == [{"was": line} for line in LINES]


def test_an_older_client_which_sends_no_token_needs_a_server_with_no_auth(tmp_path: Path) -> None:
    infile, outfile = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    infile.write_text("{}\n")
    files = ("--infile", infile, "--outfile", outfile)
    with dispatcher_server(*files) as server:
        status, reply = Run(server, infile, outfile).call("GET", "/work")
        assert (status, "--no-auth" in reply["message"]) == (401, True)
        assert Run(server, infile, outfile).call("POST", "/results", {"items": []})[0] == 401
        # It is told so, and takes it neither for work nor for the end of it.
    with dispatcher_server(*files, "--no-auth") as server:
        status, reply = Run(server, infile, outfile).call("GET", "/work")
        assert (status, reply["status"]) == (200, "OK")


def test_an_older_client_may_send_an_items_id_and_result_alone(serve: Serve) -> None:
    run = serve(lines=LINES[:1])
    assert run.get("/work?batch_size=1")["items"][0]["work_id"] == 0
    submission = {"items": [{"work_id": 0, "content": "", "result": '{"a": 1}'}]}
    reply = run.post("/results", submission)
    assert (reply["status"], reply["count"]) == ("OK", 1)
    assert run.output(1) == [{"a": 1}]


@pytest.mark.parametrize("size", ["0", "-1", "many", ""])
def test_a_batch_size_that_is_no_number_of_items_is_refused_and_nothing_happens(
    serve_once: Run, size: str
) -> None:
    status, _ = serve_once.call("GET", f"/work?batch_size={size}")
    assert 400 <= status < 500
    assert status != 404  # that would mean that the work is complete
    assert serve_once.get("/status")["issued"] == 0


@pytest.fixture(scope="module")
def serve_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Share one server between tests that change nothing."""
    directory = tmp_path_factory.mktemp("shared")
    infile, outfile = directory / "in.jsonl", directory / "out.jsonl"
    infile.write_text("".join(f"{line}\n" for line in LINES), encoding="utf-8")
    with dispatcher_server("--infile", infile, "--outfile", outfile, "--no-auth") as server:
        yield Run(server, infile, outfile)


def test_an_item_released_too_often_becomes_an_error_line_at_its_place(serve: Serve) -> None:
    # Given an item that may be reissued twice, between two others
    run = serve("--max-retries", "2", "--retry", "5")
    items = run.get("/work?batch_size=3")["items"]
    others = [known(item) | {"result": '"fine"'} for item in (items[0], items[2])]
    assert run.post("/results", {"items": others})["count"] == 2
    # When an older client gives it back again and again
    counts = [items[1]["retry_count"]]
    for _ in range(2):
        reply = run.post("/release", {"work_ids": [1]})
        assert (reply["status"], reply["released_count"]) == ("OK", 1)
        (item,) = run.get("/work?batch_size=3")["items"]
        assert (item["work_id"], item["content"], item["max_retries"]) == (1, LINES[1], 2)
        counts.append(item["retry_count"])
    # Then every time is charged
    assert counts == [0, 1, 2]
    # And the one after the last is the end of it
    assert run.post("/release", {"work_ids": [1]})["released_count"] == 1
    assert run.get("/work")["status"] == "all_work_complete"
    first, tombstone, last = run.output(3)
    assert (first, last) == ("fine", "fine")
    assert list(tombstone) == ["__ERROR__"]
    error = tombstone["__ERROR__"]
    assert error["error"] == "max_retries_exceeded"
    assert error["work_id"] == 1
    assert error["original_content"] == LINES[1]
    assert isinstance(error["attempts"], list)


def test_several_items_are_released_in_one_call(serve: Serve) -> None:
    run = serve("--max-retries", "-1")
    run.get("/work?batch_size=3")
    reply = run.post("/release", {"work_ids": [0, 2], "reason": "shutting down"})
    assert (reply["status"], reply["released_count"]) == ("OK", 2)
    items = run.get("/work?batch_size=3")["items"]
    assert sorted((i["work_id"], i["retry_count"], i["max_retries"]) for i in items) == [
        (0, 1, -1),
        (2, 1, -1),
    ]


def test_the_status_has_the_keys_that_scripts_read(serve: Serve) -> None:
    # Given a run of which one item is done and one is out
    run = serve()
    keys = ("last_processed_work_id", "next_work_id", "issued", "pending", "heap_size")
    fresh = run.get("/status")
    (zero,) = run.get("/work")["items"]
    run.post("/results", {"items": [known(zero) | {"result": "{}"}]})
    run.get("/work")
    status = run.get("/status")
    # Then each key is there and a number, and what they count has grown
    for reply in (fresh, status):
        assert all(type(reply[key]) is int for key in (*keys, "expired_reissues")), reply
    assert fresh["next_work_id"] == 0
    assert fresh["issued"] == 0
    assert status["next_work_id"] == 2
    assert status["last_processed_work_id"] == 0
    assert status["issued"] == 1
    assert status["expired_reissues"] == 0


def test_a_work_timeout_set_by_a_call_holds_for_items_that_are_out(serve: Serve) -> None:
    # Given an item that was handed out under a long time-out
    run = serve("--work-timeout", "3600", "--retry", "1", lines=LINES[:1])
    (item,) = run.get("/work")["items"]
    assert item["retry_count"] == 0
    # When the time-out is made short
    reply = run.post("/work_timeout", {"timeout": 0.2})
    assert reply["status"] == "OK"
    assert isinstance(reply["message"], str)
    assert reply["message"]
    # Then the item is handed out again, charged, and counted
    items: list[Any] = []
    wait_until(lambda: items.extend(run.get("/work")["items"]) or items, "the item comes again")
    assert (items[0]["work_id"], items[0]["retry_count"]) == (0, 1)
    assert run.get("/status")["expired_reissues"] == 1
    # And whoever is first with a result has done it, the older holder too
    reply = run.post("/results", {"items": [known(item) | {"result": '"late"'}]})
    assert reply["count"] == 1
    assert run.output(1) == ["late"]


# --- the commands ---------------------------------------------------------------------------

SERVER_FLAGS: dict[str, tuple[str | None, Any]] = {
    "--infile": ("in.jsonl", Path("in.jsonl")),
    "--outfile": ("out.jsonl", Path("out.jsonl")),
    "--checkpoint": ("state", Path("state")),
    "--host": ("0.0.0.0", "0.0.0.0"),
    "--port": ("9999", 9999),
    "--work-timeout": ("60", 60),
    "--max-retries": ("-1", -1),
    "--retry": ("30", 30),
}
TASK_FLAGS: dict[str, tuple[str | None, Any]] = {
    "--task": ("tasks.py:Mine", "tasks.py:Mine"),
    "--dispatcher": ("node1:9999", "node1:9999"),
    "--input": ("in.jsonl", Path("in.jsonl")),
    "--output": ("out.jsonl", Path("out.jsonl")),
    "--model": ("org/model", "org/model"),
    "--host": ("node1", "node1"),
    "--port": ("8001", 8001),
    "--no-launch": (None, True),
    "--tensor-parallel": ("4", 4),
    "--chat-template": ("chat.jinja", "chat.jinja"),
    "--max-model-len": ("4096", 4096),
    "--startup-timeout": ("900", 900),
    "--request-timeout": ("120", 120),
    "--silence-vllm-logs": (None, True),
    "--enforce-eager": (None, True),
    "--vllm-extra-args": ("--max-num-seqs 64", "--max-num-seqs 64"),
    "--workers": ("32", 32),
    "--batch-size": ("8", 8),
}


@dataclass(frozen=True)
class Command:
    """A command: how it is started, and which flags scripts give it."""

    name: str
    module: str
    build_parser: Callable[[], argparse.ArgumentParser]
    required: list[str]
    flags: dict[str, tuple[str | None, Any]]


COMMANDS = [
    Command(
        "dispatcher-server",
        "dispatcher.server",
        dispatcher.server.cli.build_parser,
        ["--infile", "in.jsonl", "--outfile", "out.jsonl"],
        SERVER_FLAGS,
    ),
    Command(
        "dispatcher-task-run",
        "dispatcher.taskmanager.cli",
        dispatcher.taskmanager.cli.build_parser,
        ["--task", "tasks.py:Mine"],
        TASK_FLAGS,
    ),
]
EVERY_COMMAND = pytest.mark.parametrize("command", COMMANDS, ids=[c.name for c in COMMANDS])
EVERY_FLAG = pytest.mark.parametrize(
    ("command", "flag"),
    [(command, flag) for command in COMMANDS for flag in command.flags],
    ids=[f"{command.name}{flag}" for command in COMMANDS for flag in command.flags],
)


def destination(command: Command, flag: str) -> str:
    parser = command.build_parser()
    (action,) = (action for action in parser._actions if flag in action.option_strings)
    return action.dest


@EVERY_FLAG
def test_a_flag_is_accepted_with_its_value(command: Command, flag: str) -> None:
    text, value = command.flags[flag]
    argv = [*command.required, flag] + ([] if text is None else [text])
    parsed = getattr(command.build_parser().parse_args(argv), destination(command, flag))
    assert parsed == value
    if isinstance(value, str):
        assert str(parsed) == value


@EVERY_COMMAND
def test_all_flags_of_a_command_are_accepted_together(command: Command) -> None:
    argv = [
        word
        for flag, (text, _) in command.flags.items()
        for word in ([flag] if text is None else [flag, text])
    ]
    args = command.build_parser().parse_args(argv)
    for flag, (_, value) in command.flags.items():
        assert getattr(args, destination(command, flag)) == value


@EVERY_COMMAND
def test_the_help_of_a_command_names_every_flag(command: Command) -> None:
    code, output = run_python("-m", command.module, "--help")
    assert code == 0
    assert command.name in output
    shown = set(re.findall(r"(?<![\w-])--[a-z-]+", output))
    assert set(command.flags) <= shown


@EVERY_COMMAND
def test_a_command_is_installed_under_its_name(command: Command) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    module, _, function = scripts[command.name].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


@EVERY_COMMAND
def test_a_command_without_what_it_needs_ends_with_the_exit_code_for_usage(
    command: Command,
) -> None:
    code, output = run_python("-m", command.module)
    assert code == 2
    assert "Traceback" not in output


def test_the_older_name_of_the_state_directory_keeps_a_run_across_restarts(
    serve: Serve, tmp_path: Path
) -> None:
    # Given a run whose state directory is named by --checkpoint and exists already
    state = tmp_path / "state"
    state.mkdir()
    run = serve("--checkpoint", state)
    (item,) = run.get("/work")["items"]
    run.post("/results", {"items": [known(item) | {"result": '"done"'}]})
    assert any(state.iterdir())
    # When the server is stopped and started with the same arguments
    run.server.process.stop()
    assert run.server.process.wait() == 3, run.server.process.output
    again = serve("--checkpoint", state)
    # Then it goes on where it was
    items = again.get("/work?batch_size=3")["items"]
    assert [item["work_id"] for item in items] == [1, 2]
    again.post("/results", {"items": [known(item) | {"result": '"new"'} for item in items]})
    assert again.output(3) == ["done", "new", "new"]
    # And the state is nowhere else
    assert {path.name for path in tmp_path.iterdir()} == {"state", "in.jsonl", "out.jsonl"}


def test_the_older_name_of_the_state_directory_may_name_a_new_one(
    serve: Serve, tmp_path: Path
) -> None:
    run = serve("--checkpoint", tmp_path / "new")
    assert run.get("/work")["items"]
    assert (tmp_path / "new").is_dir()


def test_a_checkpoint_file_of_an_older_server_is_refused_with_a_sentence(tmp_path: Path) -> None:
    # Given a checkpoint as older servers wrote it
    infile, outfile = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    infile.write_text("{}\n")
    checkpoint = tmp_path / "out.jsonl.checkpoint"
    checkpoint.write_text('{"last_processed_work_id": 4, "input_offset": 99}')
    before = checkpoint.read_bytes()
    # When a server is started with it
    flags = ("--infile", infile, "--outfile", outfile, "--checkpoint", checkpoint, "--port", "0")
    code, output = run_python("-m", "dispatcher.server", *flags)
    # Then it says what is wrong, about which file, and touches nothing
    assert code in (1, 2)
    assert "Traceback" not in output
    assert str(checkpoint) in output
    assert len(output.split()) >= 8
    assert checkpoint.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", checkpoint.name}


# --- tasks in real processes --------------------------------------------------------------------

TASK_FILE = """
import logging
import os

from dispatcher.taskmanager.backend.request import Request
from dispatcher.taskmanager.task.base import GeneratorTask, TaskFailed, TaskRetry

logger = logging.getLogger(__name__)
STYLE = os.environ["TASK_STYLE"]


class Existing(GeneratorTask):
    def task_generator(self):
        logger.info("item %s begins", self.context.work_id)
        kind = self.data.pop("kind")
        self.data["style"] = os.environ.get("TASK_STYLE")
        if kind == "fails":
            raise TaskFailed("no luck", error_type="unlucky")
        if kind == "retries once" and self.context.retry_count == 0:
            raise TaskRetry("once more")
        if kind == "gives up" and not self.is_last_retry_attempt():
            raise TaskRetry("later")
        if kind == "gives up":
            return self.build_result(success=False, error="tired", error_type="gave_up")
        if kind == "never":
            raise TaskRetry()
        messages = [{"role": "user", "content": "hello"}]
        first = yield Request({"messages": messages, "max_tokens": 4}, context={"turn": 1})
        messages.append(first.content["choices"][0]["message"])
        a, b = yield [
            Request({"messages": messages, "max_tokens": 4}, context={"turn": 2}),
            Request({"prompt": "hello", "max_tokens": 4}, context={"turn": 3}),
        ]
        answers = [first, a, b]
        return self.build_result(
            context={
                name: getattr(self.context, name)
                for name in ("work_id", "content", "retry_count", "max_retries")
            },
            turns=[answer.request.context["turn"] for answer in answers],
            good=[answer.is_success for answer in answers],
            text=[isinstance(answer.get_text(), str) for answer in answers],
            counted=["total_tokens" in answer.content["usage"] for answer in answers],
        )
"""
KINDS = ["plain", "fails", "retries once", "gives up", "never", "plain"]
TASK_LINES = [json.dumps({"id": n, "kind": kind}) for n, kind in enumerate(KINDS)]


def finished(work_id: int, retry_count: int, max_retries: int) -> dict[str, Any]:
    return {
        "id": work_id,
        "style": "terse",
        "context": {
            "work_id": work_id,
            "content": TASK_LINES[work_id],
            "retry_count": retry_count,
            "max_retries": max_retries,
        },
        "turns": [1, 2, 3],
        "good": [True] * 3,
        "text": [True] * 3,
        "counted": [True] * 3,
        "task_metadata": {
            "success": True,
            "retry_count": retry_count,
            "max_retries": max_retries,
        },
    }


def check_task_output(output: list[Any], max_retries: int) -> None:
    assert output[0] == finished(0, 0, max_retries)
    assert output[1] == {
        "__ERROR__": {
            "error": "unlucky",
            "message": "no luck",
            "task_data": {"id": 1, "style": "terse"},
        }
    }
    assert output[2] == finished(2, 1, max_retries)
    assert output[3] == {
        "id": 3,
        "style": "terse",
        "task_metadata": {
            "success": False,
            "error": "tired",
            "error_type": "gave_up",
            "retry_count": max_retries,
            "max_retries": max_retries,
        },
    }
    error = output[4]["__ERROR__"]
    assert (error["error"], error["work_id"]) == ("max_retries_exceeded", 4)
    assert error["original_content"] == TASK_LINES[4]
    assert output[5] == finished(5, 0, max_retries)
    assert len(output) == len(TASK_LINES)


@pytest.fixture
def task_spec(tmp_path: Path) -> str:
    """Return the `--task` of a file as users have it, outside any package."""
    path = tmp_path / "existing_tasks.py"
    path.write_text(TASK_FILE)
    return f"{path}:Existing"


def task_run(*flags: str | Path) -> tuple[int, str]:
    """Run `dispatcher-task-run` to its end; return exit code and output."""
    command = ("-m", "dispatcher.taskmanager.cli", *flags)
    return run_python(*command, env={"TASK_STYLE": "terse"}, deadline_s=20)


def test_an_existing_task_runs_over_a_file_with_all_of_its_context(
    task_spec: str, tmp_path: Path
) -> None:
    infile, outfile = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    infile.write_text("".join(f"{line}\n" for line in TASK_LINES))
    files = ("--input", infile, "--output", outfile)
    code, output = task_run("--task", task_spec, *files, "--backend", "fake", "--workers", "4")
    assert code == 0, output
    check_task_output([json.loads(line) for line in outfile.read_text().splitlines()], 3)
    assert "item 5 begins" in output


def tiny_model(method: str, path: str, body: Any) -> tuple[int, Any]:
    """Answer as a model server does: models, chats and completions."""
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    match urlsplit(path).path:
        case "/v1/models":
            return 200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]}
        case "/health":
            return 200, {}
        case "/v1/chat/completions":
            choice: dict[str, Any] = {"message": {"role": "assistant", "content": "hi"}}
        case "/v1/completions":
            choice = {"text": "hi"}
        case _:
            return missing(method, path, body)
    choice |= {"index": 0, "finish_reason": "stop"}
    return 200, {"id": "1", "model": "tiny", "choices": [choice], "usage": usage}


def test_an_existing_task_runs_over_a_server_against_a_model_server_that_runs_already(
    serve: Serve, task_spec: str
) -> None:
    # Given a server of work, and a model server at a port that --port names
    run = serve("--max-retries", "1", "--retry", "1", lines=TASK_LINES)
    with peer(tiny_model) as model:
        # When a task manager works between them
        code, output = task_run(
            *("--task", task_spec, "--dispatcher", run.address, "--model", "tiny"),
            *("--no-launch", "--host", "127.0.0.1", "--port", model.port),
            *("--workers", "4", "--batch-size", "2"),
        )
    # Then all lines are there, and the model was asked as the task asked
    assert code == 0, output
    check_task_output(run.output(len(TASK_LINES)), 1)
    asked = model.bodies("/v1/chat/completions")
    assert [{"role": "user", "content": "hello"}] in [body["messages"] for body in asked]
    assert {body["model"] for body in asked} == {"tiny"}
    assert {body["prompt"] for body in model.bodies("/v1/completions")} == {"hello"}


def test_a_task_manager_works_for_an_older_server(task_spec: str) -> None:
    lines = [json.dumps({"id": n, "kind": "plain"}) for n in range(5)]
    older = OlderServer(lines)
    with peer(older) as server, peer(tiny_model) as model:
        code, output = task_run(
            *("--task", task_spec, "--dispatcher", server.address, "--model", "tiny"),
            *("--no-launch", "--port", model.port, "--workers", "2", "--batch-size", "2"),
        )
    assert code == 0, output
    assert [older.results[n]["id"] for n in range(5)] == [0, 1, 2, 3, 4]
    assert [older.results[n]["context"]["content"] for n in range(5)] == lines
