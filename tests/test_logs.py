"""What processes log: for programs every line is an object that says whose it is."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dispatcher import logs
from tests.support.processes import dispatcher_server, run_python

SECRET = "text of a prompt"
TASK = f"""
import logging
from dispatcher.taskmanager.backend.request import Request
from dispatcher.taskmanager.task import GeneratorTask

class Logging(GeneratorTask):
    def task_generator(self):
        logging.getLogger("mine").info("begun")
        yield Request({{"messages": [{{"role": "user", "content": "hello"}}]}})
        logging.getLogger("mine").info("answered")
        if self.data["n"] == 2:
            raise ValueError({SECRET!r})
        return {{"ok": True}}
"""


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_known", {})


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.Logger("tests.of.logs")
    yield logger
    logger.handlers.clear()


def written(logger: logging.Logger, formatter: logging.Formatter) -> io.StringIO:
    """Return what the logger writes from here on."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger.handlers = [handler]
    return stream


def test_every_json_line_has_run_worker_and_work_id(logger: logging.Logger) -> None:
    stream = written(logger, logs.JsonFormatter())
    logger.warning("at the start")
    logs.know(run="r1")
    logs.know(worker="w1")
    logger.warning("line %d", 7, extra={"work_id": 7})

    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["run"], first["worker"], first["work_id"]) == (None, None, None)
    assert (second["run"], second["worker"], second["work_id"]) == ("r1", "w1", 7)
    assert (second["level"], second["message"]) == ("warning", "line 7")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", second["time"])


def test_a_message_of_several_lines_and_a_traceback_are_one_json_line(
    logger: logging.Logger,
) -> None:
    stream = written(logger, logs.JsonFormatter())
    try:
        raise OSError("first\nsecond")
    except OSError:
        logger.exception("one\ntwo")
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["message"] == "one\ntwo"
    assert "OSError" in json.loads(line)["traceback"]


def test_a_text_line_names_only_what_is_known(logger: logging.Logger) -> None:
    stream = written(logger, logs.TextFormatter())
    logger.warning("at the start")
    logs.know(run="r1")
    logger.warning("later", extra={"work_id": 0})

    first, second = stream.getvalue().splitlines()
    assert first.endswith("WARNING at the start")
    assert second.endswith("WARNING later [run=r1 work_id=0]")


@pytest.mark.parametrize("formatter", [logs.JsonFormatter, logs.TextFormatter])
def test_content_is_shown_only_when_somebody_asked_for_it(
    logger: logging.Logger, formatter: Any
) -> None:
    stream = written(logger, formatter(False))
    logger.warning("the task failed", extra={"content": SECRET})
    assert SECRET not in stream.getvalue()
    stream = written(logger, formatter(True))
    logger.warning("the task failed", extra={"content": SECRET})
    assert SECRET in stream.getvalue()


def test_what_is_logged_on_a_line_belongs_to_it_and_what_comes_later_does_not(
    logger: logging.Logger,
) -> None:
    stream = written(logger, logs.JsonFormatter())
    assert logs.on_line(3, lambda: logger.warning("inside") or "value") == "value"
    logger.warning("outside")
    inside, outside = map(json.loads, stream.getvalue().splitlines())
    assert (inside["work_id"], outside["work_id"]) == (3, None)


def run_logging_task(directory: Path, *flags: str) -> tuple[list[dict[str, Any]], str]:
    """Run a worker over three lines beside a server; return its JSON lines, and all it said."""
    (directory / "in.jsonl").write_text("".join(f'{{"n": {n}}}\n' for n in range(3)))
    (directory / "logging_task.py").write_text(TASK)
    files = ("--infile", directory / "in.jsonl", "--outfile", directory / "out.jsonl")
    with dispatcher_server(*files, "--max-retries", "0") as server:
        code, said = run_python(
            *("-m", "dispatcher.taskmanager.cli", "--dispatcher", server.at),
            *("--task", f"{directory / 'logging_task.py'}:Logging", "--backend", "fake"),
            *("--log-format", "json", *flags),
            deadline_s=60,
        )
        assert code == 0, said
        server.process.wait(30)
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    return lines, said


def test_a_worker_tells_of_each_line_whose_it_is_and_quotes_nothing(tmp_path: Path) -> None:
    lines, said = run_logging_task(tmp_path)
    of_task = [line for line in lines if line["logger"] == "mine"]
    told = sorted((line["message"], line["work_id"]) for line in of_task)
    assert told == [(word, n) for word in ("answered", "begun") for n in range(3)]
    assert all(line["run"] and line["worker"] for line in of_task)
    (raised,) = [line for line in lines if "ValueError" in line["message"]]
    assert raised["work_id"] == 2
    assert raised["run"] == of_task[0]["run"]
    assert SECRET not in said


def test_a_worker_quotes_when_it_was_asked_to(tmp_path: Path) -> None:
    _, said = run_logging_task(tmp_path, "--log-content")
    assert SECRET in said


def test_a_server_tells_how_it_goes_as_json(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("{}\n")
    files = ("--infile", tmp_path / "in.jsonl", "--outfile", tmp_path / "out.jsonl")
    with dispatcher_server(*files, "--log-format", "json") as server, server.client("w") as client:
        said = server.process.wait_for_line(re.compile(r"^\{.*waiting for a task manager.*\}$"))[0]
        line = json.loads(said)
        assert line["run"]
        assert line["worker"] is None
        client.get_work(1)
        server.process.wait_for_line(re.compile(r"^\{.*1 lines: 0 done, 1 in flight.*\}$"))
