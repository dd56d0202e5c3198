"""A preview shows what a run would ask, get and write, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dispatcher.preview.record import Exchange, LineRecord
from dispatcher.preview.source import PreviewSource, TimedBackend
from dispatcher.preview.text import SHOWN_CHARACTERS, Writer, printable, summary
from dispatcher.storage.lines import InputLine
from dispatcher.taskmanager.backend.base import SimpleBackend
from dispatcher.taskmanager.backend.request import Request, Response
from dispatcher.taskmanager.manager import Manager
from tests.support.fickle_tasks import FickleTask
from tests.support.kinds import write_gzip
from tests.support.processes import run_python, running, wait_until

FICKLE = "tests/support/fickle_tasks.py:FickleTask"
MARK = "__ERROR__"


def text_of(record: LineRecord, shown: int | None = SHOWN_CHARACTERS) -> str:
    return "\n".join(line for row in Writer(shown).block(record) for line in row.lines())


def chat(text: str, reason: str = "stop", **message: Any) -> dict[str, Any]:
    return {
        "choices": [
            {"finish_reason": reason, "message": {"role": "assistant", "content": text, **message}}
        ],
        "usage": {"prompt_tokens": 21, "completion_tokens": 40},
    }


def asked(content: dict[str, Any], answer: dict[str, Any] | None, error: Any = None) -> Exchange:
    request = Request(content)
    return Exchange(request, Response(request, answer, error), 0.41)


QUESTION = {"messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 64}


# --- as text --------------------------------------------------------------------------------


def test_a_block_shows_input_request_response_and_result_beside_their_names() -> None:
    record = LineRecord(3, '{"q": 1}', [asked(QUESTION, chat("It is\na tree."))], [], "", 0.5)
    record.result = '{"q": 1, "answer": "It is a tree."}'
    assert text_of(record).splitlines() == [
        "line 3        ok: 1 request, 21 tokens in, 40 out, 0.50 s",
        '  input       {"q": 1}',
        "  request     max_tokens=64",
        "    user      What is it?",
        "  response    stop, 21 tokens in, 40 out, 0.41 s",
        "              It is",
        "              a tree.",
        '  result      {"answer": "It is a tree."} and 1 field of the input as it was',
    ]


def test_requests_of_one_line_are_numbered() -> None:
    exchanges = [asked(QUESTION, chat("a")), asked({"prompt": "b"}, chat("c"))]
    text = text_of(LineRecord(0, "{}", exchanges, [], "{}"))
    assert all(word in text for word in ("request 1", "response 1", "request 2", "response 2"))


def test_an_error_is_shown_with_its_kind_message_and_place() -> None:
    error = {"error": "task_exception", "message": "KeyError: 'q'", "place": "my_task.py:7 in ask"}
    text = text_of(LineRecord(0, "{}", [], [], json.dumps({MARK: error})))
    assert "line 0        ERROR task_exception" in text
    assert "error       KeyError: 'q' at my_task.py:7 in ask" in text


def test_a_request_that_failed_shows_its_error() -> None:
    text = text_of(LineRecord(0, "{}", [asked(QUESTION, None, "500: overloaded")], [], "{}"))
    assert "response    0.41 s: 500: overloaded" in text


def test_thoughts_and_tool_calls_are_shown() -> None:
    answer = chat("yes", reasoning_content="let me see", tool_calls=[{"id": "t1"}])
    text = text_of(LineRecord(0, "{}", [asked(QUESTION, answer)], [], "{}"))
    assert "thinking  let me see" in text
    assert 'tools     [{"id": "t1"}]' in text


def test_several_choices_embeddings_and_odd_answers_are_shown() -> None:
    two = {"choices": [{"text": "a", "finish_reason": "stop"}, {"text": "b"}]}
    vectors = {"data": [{"embedding": [0.0]}, {"embedding": [1.0]}]}
    texts = [
        text_of(LineRecord(0, "{}", [asked({"prompt": "x"}, answer)], [], "{}"))
        for answer in (two, vectors, {"odd": 1}, {"choices": [7], "usage": []})
    ]
    assert "              a\n" in texts[0]
    assert "              b\n" in texts[0]
    assert "2 embeddings" in texts[1]
    assert "no choices" in texts[2]
    assert "no choices" in texts[3]


def test_a_long_text_is_cut_with_a_sign_unless_all_is_asked_for() -> None:
    record = LineRecord(0, json.dumps({"q": "x" * 2000}), [], [], "{}")
    assert " … (+1,609 characters)" in text_of(record)
    assert "…" not in text_of(record, None)
    assert "x" * 2000 in text_of(record, None)


def test_messages_that_are_no_messages_are_shown_as_they_are() -> None:
    odd = {"messages": ["hello", {"role": "tool", "tool_call_id": "t1"}, {"content": None}]}
    text = text_of(LineRecord(0, "{}", [asked(odd, chat("a"))], [], "{}"))
    assert "message   hello" in text
    assert "tool_call_id t1" in text


def test_nothing_that_is_shown_can_move_the_cursor() -> None:
    evil = "\x1b[2J\r\b\u202egnp.exe\u0007"
    record = LineRecord(
        0, evil, [asked({"messages": [{"role": evil, "content": evil}]}, None, evil)]
    )
    record.notes, record.result = [evil], json.dumps({MARK: {"error": evil, "message": evil}})
    text = text_of(record)
    assert not any(c in text for c in "\x1b\r\b\u202e\u0007")
    assert "\\u001b[2J" in text


def test_texts_of_every_script_stay_readable() -> None:
    text = "naïve 请 👩‍🚀 שלום\tnext\nline　wide"
    assert printable(text) == text


def test_the_summary_counts_errors_and_says_what_the_whole_input_comes_to() -> None:
    fine = LineRecord(0, "{}", [asked(QUESTION, chat("a"))], [], '{"a": 1}')
    bad = LineRecord(1, "{}", [], [], json.dumps({MARK: {"error": "no_good"}}))
    first, second = summary([fine, bad], 2000.0, is_exact=False)
    assert first.startswith("2 lines, 1 with errors (no_good 1); 1 request, 21 tokens in, 40 out")
    assert "about 2,000 lines, comes at this rate to 1,000 requests, 21,000 tokens in" in second
    assert "--expect-bytes-per-line 23" in second
    assert len(summary([fine], 1.0, is_exact=True)) == 1


# --- the source -----------------------------------------------------------------------------


class Echo(SimpleBackend):
    """Answers with what it was asked."""

    async def answer(self, request: Request) -> Response:
        await asyncio.sleep(0.01)
        messages = request.content.get("messages") or [{"content": request.content.get("prompt")}]
        return Response(request, chat(messages[0]["content"]))


def previewed(*lines: dict[str, Any] | InputLine, max_retries: int = 3) -> list[LineRecord]:
    given = [
        line if isinstance(line, InputLine) else InputLine(0, 1, json.dumps(line)) for line in lines
    ]
    ended: list[LineRecord] = []

    async def scenario() -> None:
        backend = TimedBackend(Echo())
        source = PreviewSource(FickleTask, given, max_retries, backend.seconds_of, ended.append)
        await asyncio.wait_for(Manager(source, backend).run(), 15)

    asyncio.run(scenario())
    return sorted(ended, key=lambda record: record.work_id)


def test_each_line_comes_with_its_requests_answers_and_result() -> None:
    one, two = previewed({"q": "a"}, {"q": "b", "how": "twice"})
    assert json.loads(one.result) == {"q": "a", "answer": "a"}
    assert [exchange.request.content["messages"][0]["content"] for exchange in one.exchanges] == [
        "a"
    ]
    assert one.exchanges[0].seconds >= 0.005
    assert one.error is None
    assert len(two.exchanges) == 2
    assert json.loads(two.result)["other"] == "and you?"


def test_a_task_that_asks_for_another_try_gets_it_and_each_is_shown() -> None:
    (record,) = previewed({"q": "a", "how": "retry"}, max_retries=2)
    assert record.error is None
    assert [exchange.attempt for exchange in record.exchanges] == [1, 2, 3]
    assert len(record.notes) == 2
    assert "not this time" in record.notes[0]
    assert "(attempt 3)" in text_of(record)


def test_a_task_that_never_has_enough_ends_as_in_a_run() -> None:
    (record,) = previewed({"q": "a", "how": "retry"}, max_retries=-1)
    assert record.error is not None
    assert record.error["error"] == "max_retries_exceeded"


def test_failures_and_exceptions_end_their_line_alone() -> None:
    failed, raised, fine = previewed(
        {"q": "a", "how": "fail"}, {"q": "b", "how": "raise"}, {"q": "c"}
    )
    assert failed.error is not None
    assert (failed.error["error"], failed.error["message"]) == ("no_good", "it is no good")
    assert raised.error is not None
    assert "fickle_tasks.py" in raised.error["place"]
    assert fine.error is None


def test_a_line_that_cannot_be_handed_out_is_an_error_line() -> None:
    blank, fine = previewed(InputLine(0, 1, "", "blank_line"), {"q": "a"})
    assert blank.error is not None
    assert blank.error["error"] == "blank_line"
    assert fine.error is None


# --- the command ----------------------------------------------------------------------------


def command(directory: Path, lines: Sequence[dict[str, Any]], *more: str) -> list[str]:
    infile = directory / "in.jsonl"
    infile.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["-m", "dispatcher.cli", "run", "--task", FICKLE, "--input", str(infile)]
    return [*given, "--backend", "fake", *more]


def names_in(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def test_a_preview_runs_the_first_lines_and_leaves_nothing_behind(tmp_path: Path) -> None:
    place, scratch = tmp_path / "run", tmp_path / "tmp"
    place.mkdir()
    scratch.mkdir()
    words = command(place, [{"q": f"question {n:02}"} for n in range(50)], "--preview", "3")
    code, output = run_python(*words, env={"TMPDIR": str(scratch)}, deadline_s=60)

    assert code == 0, output
    assert output.index("line 0  ") < output.index("line 1  ") < output.index("line 2  ")
    assert "line 3" not in output
    assert "question 02" in output
    assert "3 lines, none with an error; 3 requests" in output
    assert "about 50 lines" in output
    assert "\x1b" not in output  # no colours where there is no terminal
    assert names_in(place) == {"in.jsonl"}
    assert names_in(scratch) == set()


def test_a_preview_does_not_touch_an_output_that_is_there(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("precious\n")
    words = command(tmp_path, [{"q": "a"}], "--preview", "1", "--output", str(out))
    code, output = run_python(*words, deadline_s=60)
    assert code == 0, output
    assert out.read_text() == "precious\n"
    assert names_in(tmp_path) == {"in.jsonl", "out.jsonl"}


def test_a_preview_with_errors_says_where_and_ends_with_code_4(tmp_path: Path) -> None:
    lines = [{"q": "a"}, {"q": "b", "how": "raise"}, {"q": "c", "how": "fail"}]
    code, output = run_python(*command(tmp_path, lines, "--preview", "9"), deadline_s=60)
    assert code == 4, output
    assert "line 1        ERROR task_exception" in output
    assert "KeyError: 'nowhere' at" in output
    assert "fickle_tasks.py" in output
    assert "2 with errors (task_exception 1, no_good 1)" in output


def test_a_preview_takes_the_options_and_arguments_of_its_task(tmp_path: Path) -> None:
    words = command(
        tmp_path, [{"q": "a", "how": "fail"}], "--preview", "1", "--task-arg", "mended=true"
    )
    code, output = run_python(*words, deadline_s=60)
    assert code == 0, output


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--preview", "0"], ["--preview", "0", "1"]),
        (["--preview", "x"], ["--preview", "'x'"]),
        ([], ["--output", "required"]),
    ],
)
def test_what_cannot_be_previewed_is_refused_in_one_sentence(
    flags: list[str], words: list[str], tmp_path: Path
) -> None:
    code, output = run_python(*command(tmp_path, [{"q": "a"}], *flags))
    assert code == 2
    assert output.startswith("dispatcher run: ")
    assert len(output.splitlines()) == 1
    assert all(word in output for word in words)


def test_an_empty_input_cannot_be_previewed(tmp_path: Path) -> None:
    code, output = run_python(*command(tmp_path, [], "--preview", "1"))
    assert code == 2
    assert "is empty" in output


def test_an_empty_input_that_is_no_plain_file_is_named_as_it_was_given(tmp_path: Path) -> None:
    infile = write_gzip(tmp_path, b"")
    code, output = run_python(
        *("-m", "dispatcher.cli", "run", "--task", FICKLE, "--backend", "fake"),
        *("--input", infile, "--preview", "1"),
    )
    assert code == 2
    assert f"the input {infile} is empty" in output


def test_a_preview_that_is_interrupted_ends_its_model_server_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    place, scratch = tmp_path / "run", tmp_path / "tmp"
    place.mkdir()
    scratch.mkdir()
    words = command(
        place, [{"q": "a"}], "--preview", "1", "--fakellm-args=--latency-s 600",
        "--log-dir", str(tmp_path / "logs"),
    )  # fmt: skip
    with running(sys.executable, *words, env={"TMPDIR": str(scratch)}) as process:
        log = tmp_path / "logs"
        wait_until(lambda: log.exists() and any(log.iterdir()), "the model server's log", 30)
        wait_until(lambda: any(p.stat().st_size for p in log.iterdir()), "it says something", 30)
        process.signal(signal.SIGINT)
        code = process.wait(30)
    assert code == 3, process.output
    assert names_in(scratch) == set()
    assert names_in(place) == {"in.jsonl"}
