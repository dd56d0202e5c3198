"""Whatever stands in an input file or comes from a client has one exact outcome, and only there.

Every kind of bad input is a row of a table: a sentence and what must come of it. A line stands
at its place of the output; a bad item ends as it must while its neighbours count; a refused call
is one sentence and changes nothing; and after each of them the run can still be completed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
from aiohttp import ClientSession
from yarl import URL

from dispatcher.config import RunSettings, default_state_dir
from dispatcher.core.work_queue import QueuePolicy
from dispatcher.errors import DispatcherError, StateError, UsageError
from dispatcher.models import WorkerStats, WorkItem
from dispatcher.server.access import Gate
from dispatcher.server.app import listen, make_app, stop_listening
from dispatcher.service import DispatchService
from dispatcher.taskmanager.execution import Answered, Attempt, task_of_line
from dispatcher.taskmanager.tasksource.file import FileTaskSource
from tests.taskmanager.doubles import StubBackend, TaskGenerator, managed, task_of

MIB = 1 << 20
LONGEST_LINE = 1_200_000
DEEP = 100_000
BUSY_S = 3.0
"""Seconds of computing for which a client may have to wait while another one sends rubbish."""


def run(coroutine: Coroutine[Any, Any, Any], limit_s: float = 30.0) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, limit_s))


def nested(depth: int = DEEP) -> str:
    return "[" * depth + "]" * depth


def assert_one_sentence(message: object) -> None:
    assert isinstance(message, str)
    assert message
    assert "\n" not in message
    assert "Traceback" not in message


# -------------------------------------------------------------------- lines of the input


def echo(self: Any) -> TaskGenerator:
    """A task that asks no model and returns the data it was given."""
    return {"echo": self.data}
    yield


Echo = task_of(echo)
Check = Callable[[dict[str, Any], str, int], None]


def gives(data: object) -> Check:
    """The line is answered, and the task saw this."""

    def check(answer: dict[str, Any], shown: str, work_id: int) -> None:
        assert answer == {"echo": data}

    return check


def refused(kind: str, original: str | None = None) -> Check:
    """The line is an `__ERROR__` line of this kind that shows the line."""

    def check(answer: dict[str, Any], shown: str, work_id: int) -> None:
        error = answer["__ERROR__"]
        assert_one_sentence(error.pop("message"))
        assert error == {
            "error": kind,
            "work_id": work_id,
            "original_content": shown if original is None else original,
        }

    return check


def no_json_result(answer: dict[str, Any], shown: str, work_id: int) -> None:
    """The task ran, but what it returned cannot be a line of JSON."""
    error = answer["__ERROR__"]
    assert_one_sentence(error.pop("message"))
    assert error == {"error": "result_not_json", "task_data": None}


LINES: dict[str, tuple[bytes, Check]] = {
    "only spaces": (b"    ", refused("blank_line", "")),
    "nothing at all": (b"", refused("blank_line")),
    "only a carriage return": (b"\r", refused("blank_line", "")),
    "only tab, vertical tab and form feed": (b"\t\x0b\x0c", refused("blank_line", "")),
    "only a no-break space": ("\u00a0".encode(), refused("invalid_json")),
    "a carriage return at the end": (b'{"a": 1}\r', gives({"a": 1})),
    "a carriage return between two tokens": (b'{"a":\r1}', gives({"a": 1})),
    "a byte order mark in the middle of the file": (
        '\ufeff{"a": 1}'.encode(),
        refused("invalid_json"),
    ),
    "only NUL bytes": (b"\0\0\0", refused("invalid_json")),
    "a NUL byte inside a string": (b'{"a": "\0"}', refused("invalid_json")),
    "an escaped NUL": (rb'{"a": "\u0000"}', gives({"a": "\0"})),
    "a byte that is never UTF-8, at the start": (
        b'\xff{"a": 1}',
        refused("undecodable_line", '\ufffd{"a": 1}'),
    ),
    "a byte that is never UTF-8, in the middle": (
        b'{"a": "\xfe"}',
        refused("undecodable_line", '{"a": "\ufffd"}'),
    ),
    "a byte that is never UTF-8, at the end": (
        b'{"a": 1}\xff',
        refused("undecodable_line", '{"a": 1}\ufffd'),
    ),
    "half a character at the end": (
        b'{"a": "\xe2\x82',
        refused("undecodable_line", '{"a": "\ufffd'),
    ),
    "a NUL in two bytes": (
        b'{"a": "\xc0\x80"}',
        refused("undecodable_line", '{"a": "\ufffd\ufffd"}'),
    ),
    "half a surrogate pair in three bytes": (
        b'{"a": "\xed\xa0\x80"}',
        refused("undecodable_line", '{"a": "\ufffd\ufffd\ufffd"}'),
    ),
    "Latin-1": (
        '{"a": "caf\xe9"}'.encode("latin-1"),
        refused("undecodable_line", '{"a": "caf\ufffd"}'),
    ),
    "UTF-16": (b'{\0"\0a\0"\0:\x001\0}\0', refused("invalid_json")),
    "half a surrogate pair as an escape": (rb'{"a": "\ud800"}', no_json_result),
    "a surrogate pair the wrong way round": (rb'{"a": "\ude00\ud83d"}', no_json_result),
    "half a surrogate pair in a key": (rb'{"\udc00": 1}', no_json_result),
    "a whole surrogate pair as escapes": (rb'{"a": "\ud83d\ude00"}', gives({"a": "\U0001f600"})),
    "one byte more than --max-line-bytes": (
        b'{"a": "' + b"x" * (LONGEST_LINE - 8) + b'"}',
        refused("line_too_long", '{"a": "' + "x" * 193),
    ),
    "exactly --max-line-bytes": (
        b'{"a": "' + b"x" * (LONGEST_LINE - 9) + b'"}',
        gives({"a": "x" * (LONGEST_LINE - 9)}),
    ),
    "a line of one million bytes": (
        b'{"a": "' + b"y" * 1_000_000 + b'"}',
        gives({"a": "y" * 1_000_000}),
    ),
    "too long, without any UTF-8": (
        b"\xff" * (LONGEST_LINE + 1),
        refused("line_too_long", "\ufffd" * 200),
    ),
    "nested far too deep": (b'{"a": ' + nested().encode() + b"}", refused("invalid_json")),
    "nested deep": (
        b'{"a": ' + nested(100).encode() + b"}",
        gives(json.loads('{"a": ' + nested(100) + "}")),
    ),
    "the same key twice": (b'{"a": 1, "a": 2}', gives({"a": 2})),
    "a whole number of 400 digits": (b'{"a": ' + b"7" * 400 + b"}", gives({"a": int("7" * 400)})),
    "a whole number of 5000 digits": (b'{"a": ' + b"7" * 5000 + b"}", refused("invalid_json")),
    "a number beyond every float": (b'{"a": 1e999}', no_json_result),
    "NaN": (b'{"a": NaN}', no_json_result),
    "minus infinity": (b'{"a": [1, -Infinity]}', no_json_result),
    "a list": (b"[1, 2]", refused("not_an_object")),
    "a string": (b'"text"', refused("not_an_object")),
    "a number": (b"7", refused("not_an_object")),
    "null": (b"null", refused("not_an_object")),
    "true": (b"true", refused("not_an_object")),
    "text": (b"What is the capital of France?", refused("invalid_json")),
    "an object that breaks off": (b'{"a": 1', refused("invalid_json")),
    "two objects": (b'{"a": 1} {"a": 2}', refused("invalid_json")),
    "a comma too many": (b'{"a": 1,}', refused("invalid_json")),
    "single quotes": (b"{'a': 1}", refused("invalid_json")),
    "a raw tab in a string": (b'{"a": "\t"}', refused("invalid_json")),
    "a raw vertical tab in a string": (b'{"a": "\x0b"}', refused("invalid_json")),
    "a raw form feed in a string": (b'{"a": "\x0c"}', refused("invalid_json")),
    "a line separator in a string": ('{"a": "x\u2028y"}'.encode(), gives({"a": "x\u2028y"})),
    "a paragraph separator in a string": ('{"a": "x\u2029y"}'.encode(), gives({"a": "x\u2029y"})),
    "a next-line character in a string": ('{"a": "x\x85y"}'.encode(), gives({"a": "x\x85y"})),
    "file, group, record and unit separators as escapes": (
        rb'{"a": "\u001c\u001d\u001e\u001f"}',
        gives({"a": "\x1c\x1d\x1e\x1f"}),
    ),
    "a character that is none": ('{"a": "\uffff"}'.encode(), gives({"a": "\uffff"})),
    "fields named like those of a work item": (
        b'{"work_id": 99, "lease": "9.9", "result": "{}", "run": "x"}',
        gives({"work_id": 99, "lease": "9.9", "result": "{}", "run": "x"}),
    ),
    "an __ERROR__ line": (b'{"__ERROR__": {"error": "x"}}', gives({"__ERROR__": {"error": "x"}})),
}


def good_line(number: int) -> bytes:
    return b'{"good": %d}' % number


@dataclass
class Worked:
    """The output of a run over all LINES, each between two good ones."""

    lines: list[str]
    raw: bytes

    def of(self, kind: str) -> tuple[int, str]:
        place = 2 * list(LINES).index(kind) + 1
        return place, self.lines[place]


def settings_of(infile: Path, outfile: Path, **limits: Any) -> RunSettings:
    return RunSettings(infile, outfile, default_state_dir(outfile), **limits)


async def work_on(settings: RunSettings) -> bytes:
    """Run the file through the service and a manager in this process; return the output."""
    source = FileTaskSource(
        settings, Echo, worker="w", batch_size=8, backend_up=lambda: True, stats=WorkerStats
    )
    await source.open()
    await managed(source, StubBackend(), workers=4).run()
    return settings.outfile.read_bytes()


@pytest.fixture(scope="module")
def all_lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lines") / "in.jsonl"
    with path.open("wb") as file:
        for number, (line, _) in enumerate(LINES.values()):
            file.write(good_line(number) + b"\n" + line + b"\n")
        file.write(good_line(len(LINES)) + b"\n")
    return path


@pytest.fixture(scope="module")
def worked(all_lines: Path) -> Worked:
    settings = settings_of(all_lines, all_lines.with_name("out.jsonl"), max_line_bytes=LONGEST_LINE)
    raw = run(work_on(settings))
    return Worked(raw.decode().split("\n"), raw)


@pytest.mark.parametrize("kind", LINES)
def test_a_bad_line_has_its_answer_at_its_place(kind: str, worked: Worked) -> None:
    line, check = LINES[kind]
    place, answer = worked.of(kind)
    check(json.loads(answer), line.decode("utf-8", "replace"), place)


def test_the_good_lines_among_bad_ones_are_answered_at_their_place(worked: Worked) -> None:
    assert worked.lines.pop() == ""
    assert len(worked.lines) == 2 * len(LINES) + 1
    answers = [json.loads(line) for line in worked.lines[::2]]
    assert answers == [{"echo": {"good": number}} for number in range(len(LINES) + 1)]


def test_over_http_every_bad_line_has_the_same_answer(
    all_lines: Path, worked: Worked, tmp_path: Path
) -> None:
    settings = settings_of(all_lines, tmp_path / "out.jsonl", max_line_bytes=LONGEST_LINE)

    async def scenario() -> None:
        async with serving(settings) as served:
            while items := await served.take(16):
                for item in items:
                    work = msgspec.convert(item, WorkItem)
                    ended = Attempt(partial(task_of_line, Echo, work)).begin()
                    assert isinstance(ended, Answered)
                    item["result"] = ended.result
                outcomes = await served.submit(items)
                assert outcomes == ["accepted"] * len(items)
            await asyncio.wait_for(served.service.finished.wait(), 5)

    run(scenario())
    assert settings.outfile.read_bytes() == worked.raw


# -------------------------------------------------------------------- whole files


def kinds_of(answer: str) -> object:
    """Say in short what an output line is: the data a task saw, or the kind of error."""
    value = json.loads(answer)
    return value["__ERROR__"]["error"] if "__ERROR__" in value else value["echo"]


BLANK, UNDECODABLE, NO_JSON = "blank_line", "undecodable_line", "invalid_json"
A, B = {"a": 1}, {"b": 2}

FILES: dict[str, tuple[bytes, list[object]]] = {
    "an empty file": (b"", []),
    "one line end": (b"\n", [BLANK]),
    "no line end after the last line": (b'{"a": 1}\n{"b": 2}', [A, B]),
    "no line end after a last line of spaces": (b'{"a": 1}\n  ', [A, BLANK]),
    "only blank lines": (b"\n  \n\r\n\t\n", [BLANK] * 4),
    "line ends of two characters": (b'{"a": 1}\r\n{"b": 2}\r\n', [A, B]),
    "line ends of carriage returns only": (b'{"a": 1}\r{"b": 2}\r', [NO_JSON]),
    "a byte order mark at the start": (b'\xef\xbb\xbf{"a": 1}\n{"b": 2}\n', [A, B]),
    "a byte order mark and nothing else": (b"\xef\xbb\xbf", [BLANK]),
    "half a byte order mark": (b"\xef\xbb", [UNDECODABLE]),
    "two byte order marks": (b'\xef\xbb\xbf\xef\xbb\xbf{"a": 1}\n', [NO_JSON]),
    "a character that breaks off at the end of the file": (
        b'{"a": 1}\n{"b": "\xf0\x9f',
        [A, UNDECODABLE],
    ),
    "UTF-16 with a byte order mark": (
        '{"a": 1}\n{"b": 2}\n'.encode("utf-16"),
        [UNDECODABLE, NO_JSON, NO_JSON],
    ),
    "a file of zeros": (b"\0" * 10_000, [NO_JSON]),
    "five thousand blank lines and one good one": (
        b"\n" * 5000 + b'{"a": 1}\n',
        [*[BLANK] * 5000, A],
    ),
    "one endless line": (b"x" * 3_000_000, ["line_too_long"]),
    "an endless line between two good ones": (
        b'{"a": 1}\n' + b"x" * 3_000_000 + b'\n{"b": 2}\n',
        [A, "line_too_long", B],
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_bad_file_is_answered_line_by_line(kind: str, tmp_path: Path) -> None:
    content, expected = FILES[kind]
    infile = tmp_path / "in.jsonl"
    infile.write_bytes(content)
    settings = settings_of(infile, tmp_path / "out.jsonl", max_line_bytes=LONGEST_LINE)

    answers = run(work_on(settings)).decode().split("\n")

    assert answers.pop() == ""
    assert [kinds_of(answer) for answer in answers] == expected
    assert infile.read_bytes() == content


# -------------------------------------------------------------------- what is no file of lines


def a_directory(at: Path) -> Path:
    at.mkdir()
    return at


def a_missing_file(at: Path) -> Path:
    return at


def a_file_beyond_a_file(at: Path) -> Path:
    at.write_text("{}\n")
    return at / "in.jsonl"


def a_link_to_nothing(at: Path) -> Path:
    at.symlink_to(at.with_name("nothing"))
    return at


def a_link_to_itself(at: Path) -> Path:
    at.symlink_to(at)
    return at


def a_name_that_is_too_long(at: Path) -> Path:
    return at.with_name("x" * 300)


def a_file_nobody_may_read(at: Path) -> Path:
    if os.geteuid() == 0:
        pytest.skip("root may read every file")
    at.write_text("{}\n")
    at.chmod(0)
    return at


NO_INPUT = [
    a_directory,
    a_missing_file,
    a_file_beyond_a_file,
    a_link_to_nothing,
    a_link_to_itself,
    a_name_that_is_too_long,
    a_file_nobody_may_read,
]


def sentence_of(make: Callable[..., Any]) -> str:
    return make.__name__.replace("_", " ")


@pytest.mark.parametrize("make", NO_INPUT, ids=sentence_of)
def test_an_input_that_is_no_file_of_lines_is_refused_by_name(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    infile, outfile = make(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"

    with pytest.raises(UsageError) as refusal:
        run(work_on(settings_of(infile, outfile)))

    assert_one_sentence(str(refusal.value))
    assert str(infile) in str(refusal.value)
    assert not outfile.exists()


def the_input_itself(infile: Path) -> Path:
    return infile


def a_link_to_the_input(infile: Path) -> Path:
    (link := infile.with_name("link")).symlink_to(infile)
    return link


def a_second_name_of_the_input(infile: Path) -> Path:
    (name := infile.with_name("second")).hardlink_to(infile)
    return name


def a_folder(infile: Path) -> Path:
    (folder := infile.with_name("folder")).mkdir()
    return folder


def a_pipe(infile: Path) -> Path:
    os.mkfifo(pipe := infile.with_name("pipe"))
    return pipe


def a_file_of_somebody_else(infile: Path) -> Path:
    (other := infile.with_name("other")).write_text("precious\n")
    return other


def a_file_below_a_file(infile: Path) -> Path:
    (other := infile.with_name("other")).write_text("precious\n")
    return other / "out.jsonl"


NO_OUTPUT = [
    the_input_itself,
    a_link_to_the_input,
    a_second_name_of_the_input,
    a_folder,
    a_pipe,
    a_file_of_somebody_else,
    a_file_below_a_file,
]


@pytest.mark.parametrize("make", NO_OUTPUT, ids=sentence_of)
def test_an_output_that_would_destroy_something_is_refused_by_name(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    infile = tmp_path / "in.jsonl"
    infile.write_bytes(b'{"a": 1}\n')
    outfile = make(infile)
    files = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    with pytest.raises(DispatcherError) as refusal:
        run(work_on(settings_of(infile, outfile)))

    assert_one_sentence(str(refusal.value))
    assert outfile.name in str(refusal.value)
    assert {path: path.read_bytes() for path in files} == files


def test_an_empty_input_that_is_its_own_output_stays_empty(tmp_path: Path) -> None:
    infile = tmp_path / "in.jsonl"
    infile.touch()
    assert run(work_on(settings_of(infile, infile))) == b""


def test_an_output_in_a_missing_directory_is_written_there(tmp_path: Path) -> None:
    infile = tmp_path / "in.jsonl"
    infile.write_bytes(b'{"a": 1}\n')
    outfile = tmp_path / "new" / "deeper" / "out.jsonl"
    assert run(work_on(settings_of(infile, outfile))) == b'{"echo": {"a": 1}}\n'


def test_an_output_that_is_a_link_to_nothing_is_written_where_it_leads(tmp_path: Path) -> None:
    infile = tmp_path / "in.jsonl"
    infile.write_bytes(b'{"a": 1}\n')
    (outfile := tmp_path / "link").symlink_to(tmp_path / "target")
    assert run(work_on(settings_of(infile, outfile))) == b'{"echo": {"a": 1}}\n'
    assert (tmp_path / "target").exists()


def test_the_null_device_is_an_empty_input(tmp_path: Path) -> None:
    assert run(work_on(settings_of(Path(os.devnull), tmp_path / "out.jsonl"))) == b""


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    os.mkfifo(infile := tmp_path / "pipe")
    writer = threading.Thread(target=infile.write_bytes, args=(b'{"a": 1}\n\n{"b": 2}',))
    writer.start()
    answers = run(work_on(settings_of(infile, tmp_path / "out.jsonl"))).splitlines()
    writer.join()
    assert [kinds_of(answer) for answer in answers] == [A, BLANK, B]


def test_an_input_that_shrinks_meanwhile_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    infile = tmp_path / "in.jsonl"
    infile.write_bytes(b'{"a": 1}\n' * 10)

    async def scenario() -> None:
        async with serving(settings_of(infile, tmp_path / "out.jsonl")) as served:
            infile.write_bytes(b'{"a": 1}\n' * 3)
            reply = await served.ask("GET", "/work?batch_size=10")
            assert reply.status == 503
            assert "cut to 27 bytes" in reply.message
            assert isinstance(served.service.failure, StateError)

    run(scenario())


@pytest.mark.parametrize("which", ["the input", "the output"])
def test_a_file_name_that_is_not_utf_8_is_no_reason_for_a_traceback(
    which: str, tmp_path: Path
) -> None:
    odd, plain = tmp_path / os.fsdecode(b"caf\xe9.jsonl"), tmp_path / "plain.jsonl"
    infile, outfile = (odd, plain) if which == "the input" else (plain, odd)
    try:
        infile.write_bytes(b'{"a": 1}\n')
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    try:
        assert run(work_on(settings_of(infile, outfile))) == b'{"echo": {"a": 1}}\n'
    except DispatcherError as refusal:
        assert_one_sentence(str(refusal))


# -------------------------------------------------------------------- a server to send things to


@dataclass
class Reply:
    """What came back; `json` is None where the body is none."""

    status: int
    json: Any

    @property
    def message(self) -> str:
        """The sentence of a refusal, in the form that every refusal has."""
        assert isinstance(self.json, dict), f"{self.status} without a JSON body"
        assert self.json.keys() == {"status", "message"}
        assert self.json["status"] == "error"
        assert_one_sentence(self.json["message"])
        return str(self.json["message"])


@dataclass
class Served:
    """A run behind HTTP, and the result that counts for each item so far."""

    client: ClientSession
    url: URL
    service: DispatchService
    settings: RunSettings
    counted: dict[int, str] = field(default_factory=dict)

    async def ask(self, method: str, path: str, body: object = None) -> Reply:
        """Send a call; `body` is bytes, or a value to send as JSON."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        url = URL(f"{self.url}{path}", encoded=True)  # as it stands, however odd
        headers = {"Content-Type": "application/json"}
        async with self.client.request(method, url, data=data, headers=headers) as reply:
            text = await reply.read()
            try:
                return Reply(reply.status, json.loads(text))
            except ValueError:
                return Reply(reply.status, None)

    async def take(self, count: int) -> list[dict[str, Any]]:
        """Lease up to `count` items."""
        reply = await self.ask("GET", f"/work?batch_size={count}")
        assert reply.status == 200
        items: list[dict[str, Any]] = reply.json["items"]
        return items

    async def submit(self, items: list[Any] | bytes) -> list[str]:
        """Hand items in, noting those that count; return their outcomes."""
        body = items if isinstance(items, bytes) else {"items": items}
        reply = await self.ask("POST", "/results", body)
        assert reply.status == 200, reply
        outcomes: list[str] = reply.json["outcomes"]
        settled = [outcome in ("accepted", "duplicate") for outcome in outcomes]
        assert reply.json == {
            "status": "OK",
            "count": sum(settled),
            "outcomes": outcomes,
            "work": None,
        }
        if not isinstance(items, bytes):
            for item, outcome in zip(items, outcomes, strict=True):
                if outcome == "accepted":
                    self.counted[item["work_id"]] = item["result"].strip()
        return outcomes

    async def status(self) -> dict[str, Any]:
        """Return the run's figures."""
        reply = await self.ask("GET", "/status")
        assert reply.status == 200
        assert isinstance(reply.json, dict)
        return reply.json

    async def settled_status(self) -> dict[str, Any]:
        """Return the run's figures once the output has caught up with what is done."""
        while True:
            status = await self.status()
            behind = status["written"] <= status["last_processed_work_id"]
            if not behind:
                return status
            await asyncio.sleep(0.001)

    async def assert_completes(self) -> None:
        """Answer every line that has no answer, and find each result that counts at its place."""
        while await self.take(4096):
            pass
        work_ids = range((await self.status())["total"])
        missing = [
            {"work_id": i, "result": result_of(i)} for i in work_ids if i not in self.counted
        ]
        assert await self.submit(missing) == ["accepted"] * len(missing)
        await asyncio.wait_for(self.service.finished.wait(), 5)
        written = self.settings.outfile.read_bytes()
        assert written == "".join(f"{self.counted[i]}\n" for i in work_ids).encode()


def result_of(work_id: int) -> str:
    return f'{{"answer": {work_id}}}'


def answered(item: dict[str, Any]) -> dict[str, Any]:
    return {**item, "result": result_of(item["work_id"])}


@contextlib.asynccontextmanager
async def serving(settings: RunSettings) -> AsyncIterator[Served]:
    """Serve the run as the command does, to everybody, from this process."""
    service = DispatchService(settings)
    await service.start()
    listener = socket.create_server(("127.0.0.1", 0))
    runner = await listen(make_app(service), Gate(), listener)
    try:
        url = URL.build(scheme="http", host="127.0.0.1", port=listener.getsockname()[1])
        async with ClientSession() as client:
            yield Served(client, url, service, settings)
    finally:
        await stop_listening(runner)
        await service.close()


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    """A run of eleven lines."""
    infile = tmp_path / "in.jsonl"
    infile.write_bytes(b"".join(good_line(number) + b"\n" for number in range(11)))
    return settings_of(infile, tmp_path / "out.jsonl", policy=QueuePolicy(max_retries=3))


def on_a_server(
    settings: RunSettings, scenario: Callable[[Served], Coroutine[Any, Any, None]]
) -> None:
    """Run a scenario, and then the run to its end."""

    async def whole() -> None:
        async with serving(settings) as served:
            await scenario(served)
            await served.assert_completes()

    run(whole())


async def assert_refused(
    served: Served, method: str, path: str, body: object, words: str, status: int = 400
) -> None:
    """The call is refused with a sentence that holds `words`, and nothing changes."""
    before = await served.settled_status()
    reply = await served.ask(method, path, body)
    assert reply.status == status, reply
    assert words in reply.message
    assert await served.status() == before


# -------------------------------------------------------------------- results


INVALID, ACCEPTED = "invalid", "accepted"

RESULTS: dict[str, tuple[Any, str]] = {
    "null": (None, INVALID),
    "a number": (7, INVALID),
    "true": (True, INVALID),
    "an object instead of a string": ({"answer": 1}, INVALID),
    "a list instead of a string": (["{}"], INVALID),
    "an empty string": ("", INVALID),
    "only white space": (" \t ", INVALID),
    "a line feed between tokens": ('{"a":\n1}', INVALID),
    "a line feed at the end": ("{}\n", INVALID),
    "a carriage return": ('{"a":\r1}', INVALID),
    "half a surrogate pair": ('"\ud800"', INVALID),
    "half a surrogate pair as an escape of the result": (r'"\ud800"', INVALID),
    "NaN": ("NaN", INVALID),
    "NaN inside": ('{"a": [NaN]}', INVALID),
    "infinity": ("Infinity", INVALID),
    "minus infinity": ("-Infinity", INVALID),
    "an object that breaks off": ('{"a": 1', INVALID),
    "a string that breaks off": ('"abc', INVALID),
    "an escape that breaks off": (r'"\u12', INVALID),
    "an escape that is none": (r'"\q"', INVALID),
    "two values": ('{"a": 1} {"a": 2}', INVALID),
    "a comma too many": ("[1,]", INVALID),
    "a comment": ("{} // done", INVALID),
    "single quotes": ("{'a': 1}", INVALID),
    "a leading zero": ("01", INVALID),
    "a plus sign": ("+1", INVALID),
    "a word": ("yes", INVALID),
    "a byte order mark": ("\ufeff{}", INVALID),
    "a raw tab in a string": ('"a\tb"', INVALID),
    "a raw NUL in a string": ('"a\0b"', INVALID),
    "a raw escape character in a string": ('"\x1b[0m"', INVALID),
    "a NUL after the value": ("{}\0", INVALID),
    "nested 100,000 deep": (nested(), INVALID),
    "one byte more than 16 MiB": ('"' + "x" * (16 * MIB - 1) + '"', INVALID),
    "more than 16 MiB in bytes, not in characters": ('"' + "\u20ac" * (6 * MIB) + '"', INVALID),
    "exactly 16 MiB": ('"' + "x" * (16 * MIB - 2) + '"', ACCEPTED),
    "white space around the value": ('  {"a": 1}\t', ACCEPTED),
    "a line separator in a string": ('"x\u2028y\x85z"', ACCEPTED),
    "a surrogate pair as escapes": (r'"\ud83d\ude00"', ACCEPTED),
    "a whole number of 5000 digits": ("7" * 5000, ACCEPTED),
    "a number beyond every float": ("1e999", ACCEPTED),
    "the same key twice": ('{"a": 1, "a": 2}', ACCEPTED),
    "null as JSON": ("null", ACCEPTED),
    "an __ERROR__ line": ('{"__ERROR__": {"error": "mine"}}', ACCEPTED),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_a_bad_result_costs_its_own_lease_only(kind: str, settings: RunSettings) -> None:
    result, expected = RESULTS[kind]

    async def scenario(served: Served) -> None:
        before, bad, after = await served.take(3)
        items = [answered(before), {**bad, "result": result}, answered(after)]

        outcomes = await served.submit(items)

        assert outcomes == [ACCEPTED, expected, ACCEPTED]
        again = [(i["work_id"], i["retry_count"], i["attempt"]) for i in await served.take(1)]
        charged = (bad["work_id"], 1, 2)
        assert (again == [charged]) is (expected == INVALID)
        status = await served.status()
        assert status["invalid_results"] == status["charged"] == (expected == INVALID)
        assert status["failed"] == ("__ERROR__" in kind)

    on_a_server(settings, scenario)


def test_a_result_that_stays_bad_becomes_an_error_line_that_says_so(settings: RunSettings) -> None:
    async def scenario(served: Served) -> None:
        for _ in range(4):
            (item,) = await served.take(1)
            assert item["work_id"] == 0
            assert await served.submit([{**item, "result": "NaN"}]) == [INVALID]
        written = settings.outfile.read_text().splitlines()
        error = json.loads(written[0])["__ERROR__"]
        reasons = [attempt["reason"] for attempt in error.pop("attempts")]
        assert reasons == ["the result is not JSON on one line"] * 4
        assert error == {
            "error": "max_retries_exceeded",
            "work_id": 0,
            "original_content": good_line(0).decode(),
        }
        served.counted[0] = written[0]

    on_a_server(settings, scenario)


# -------------------------------------------------------------------- items of a batch

Item = dict[str, Any]
HELD, CHARGED, DONE = "held", "charged", "done"


def changed(**fields: Any) -> Callable[[Item, Item], Any]:
    return lambda item, other: {**item, **fields}


def without(name: str) -> Callable[[Item, Item], Any]:
    return lambda item, other: {key: value for key, value in item.items() if key != name}


def instead(value: Any) -> Callable[[Item, Item], Any]:
    return lambda item, other: value


ITEMS: dict[str, tuple[Callable[[Item, Item], Any], str, str]] = {
    "a negative work id": (changed(work_id=-1), "unknown", HELD),
    "the id of a line that was not handed out": (changed(work_id=10), "unknown", HELD),
    "the id of a line that does not exist": (changed(work_id=1000), "unknown", HELD),
    "a work id beyond 64 bits": (changed(work_id=2**70), "unknown", HELD),
    "a work id far below 64 bits": (changed(work_id=-(2**70)), "unknown", HELD),
    "a work id of 400 digits": (changed(work_id=10**400), "unknown", HELD),
    "an unknown id with a bad result": (changed(work_id=-1, result="NaN"), "unknown", HELD),
    "a work id that is a string": (changed(work_id="1"), INVALID, HELD),
    "a work id that is a float": (changed(work_id=1.0), INVALID, HELD),
    "a work id that is true": (changed(work_id=True), INVALID, HELD),
    "a work id that is null": (changed(work_id=None), INVALID, HELD),
    "a work id that is NaN": (changed(work_id=float("nan")), INVALID, HELD),
    "a work id that is a list": (changed(work_id=[1]), INVALID, HELD),
    "no work id": (without("work_id"), INVALID, HELD),
    "no result": (without("result"), INVALID, CHARGED),
    "the lease of another item": (lambda i, o: {**i, "lease": o["lease"]}, ACCEPTED, DONE),
    "the lease of another item, and a bad result": (
        lambda i, o: {**i, "lease": o["lease"], "result": "NaN"},
        INVALID,
        HELD,
    ),
    "a lease that never was": (changed(lease="1.999999"), ACCEPTED, DONE),
    "a lease that never was, and a bad result": (
        changed(lease="1.999999", result="NaN"),
        INVALID,
        HELD,
    ),
    "a lease that is no lease": (changed(lease="\x00 or so"), ACCEPTED, DONE),
    "a lease that is no lease, and a bad result": (
        changed(lease="\x00 or so", result="NaN"),
        INVALID,
        HELD,
    ),
    "a lease of 10,000 characters": (changed(lease="1." + "9" * 9998), ACCEPTED, DONE),
    "an empty lease": (changed(lease=""), ACCEPTED, DONE),
    "a lease that is a number": (changed(lease=7), INVALID, HELD),
    "no lease": (without("lease"), ACCEPTED, DONE),
    "no lease, and a bad result": (
        lambda i, o: {"work_id": i["work_id"], "result": "NaN"},
        INVALID,
        CHARGED,
    ),
    "another run": (changed(run="0123456789abcdef"), "wrong_run", HELD),
    "another run, and a bad result": (changed(run="another", result="NaN"), "wrong_run", HELD),
    "another run, and an id that does not exist": (
        changed(run="another", work_id=-1),
        "wrong_run",
        HELD,
    ),
    "an empty run": (changed(run=""), "wrong_run", HELD),
    "a run that is a number": (changed(run=7), INVALID, HELD),
    "no run": (without("run"), ACCEPTED, DONE),
    "no content": (without("content"), ACCEPTED, DONE),
    "another content": (changed(content={"not": "a string"}), ACCEPTED, DONE),
    "fields nobody knows": (changed(color="red", nested=[{"deep": [1]}]), ACCEPTED, DONE),
    "a negative retry count": (changed(retry_count=-5, max_retries="many"), ACCEPTED, DONE),
    "an item that is null": (instead(None), INVALID, HELD),
    "an item that is a number": (instead(1), INVALID, HELD),
    "an item that is a string": (instead("{}"), INVALID, HELD),
    "an item that is a list": (instead([1, "{}"]), INVALID, HELD),
    "an item without fields": (instead({}), INVALID, HELD),
    "an item that is half a surrogate pair": (instead("\ud800"), INVALID, HELD),
    "a work id that is half a surrogate pair": (changed(work_id="\ud800"), INVALID, HELD),
    "a run that is half a surrogate pair": (changed(run="\ud800"), "wrong_run", HELD),
    "a lease that is half a surrogate pair": (changed(lease="\ud800"), ACCEPTED, DONE),
    "a field that is half a surrogate pair": (changed(content="\ud800"), ACCEPTED, DONE),
}


@pytest.mark.parametrize("kind", ITEMS)
def test_a_bad_item_is_told_apart_and_the_others_count(kind: str, settings: RunSettings) -> None:
    make, expected, fate = ITEMS[kind]

    async def scenario(served: Served) -> None:
        items = await served.take(10)  # of eleven lines, so that one was never handed out
        before, bad, after, *held = items
        others = [answered(before), answered(after)]

        outcomes = await served.submit([others[0], make(answered(bad), held[0]), others[1]])

        assert outcomes == [ACCEPTED, expected, ACCEPTED]
        again = [(item["work_id"], item["retry_count"]) for item in await served.take(11)]
        assert again == ([(1, 1)] if fate == CHARGED else []) + [(10, 0)]
        status = await served.status()
        # Ten were handed out, two of them answered; the last line and what came back since.
        assert status["issued"] == 8 + 1 - (fate == DONE)
        assert status["done"] == 2 + (fate == DONE)

    on_a_server(settings, scenario)


BAD_ITEMS: dict[str, Callable[[Item], Any]] = {
    "with a bad result": lambda item: {**item, "result": "NaN"},
    "that cannot be read": lambda item: "no item",
}


@pytest.mark.parametrize("kind", BAD_ITEMS)
@pytest.mark.parametrize("place", range(11))
def test_one_bad_item_among_ten_good_ones_harms_none_of_them(
    place: int, kind: str, settings: RunSettings
) -> None:
    async def scenario(served: Served) -> None:
        items: list[Any] = [answered(item) for item in await served.take(11)]
        items[place] = BAD_ITEMS[kind](items[place])

        outcomes = await served.submit(items)

        assert outcomes == [INVALID if n == place else ACCEPTED for n in range(11)]

    on_a_server(settings, scenario)


def test_a_number_that_python_refuses_to_read_harms_its_own_item_only(
    settings: RunSettings,
) -> None:
    async def scenario(served: Served) -> None:
        item, _ = await served.take(2)
        good = json.dumps(answered(item)).encode()

        reply = await served.ask(
            "POST",
            "/results",
            b'{"items": [%s, {"work_id": %s, "result": "{}"}]}' % (good, b"1" * 5000),
        )

        assert reply.status == 200, reply
        assert reply.json["outcomes"][0] == ACCEPTED
        assert reply.json["outcomes"][1] in (INVALID, "unknown")
        served.counted[0] = result_of(0)

    on_a_server(settings, scenario)


def test_the_same_item_twice_in_a_batch_counts_once(settings: RunSettings) -> None:
    async def scenario(served: Served) -> None:
        (item,) = await served.take(1)
        second = {**item, "result": '"another"'}
        assert await served.submit([answered(item), second]) == [ACCEPTED, "duplicate"]
        assert await served.submit([second, second]) == ["duplicate"] * 2
        assert (await served.status())["duplicate_results"] == 3

    on_a_server(settings, scenario)


def test_a_bad_result_and_a_good_one_of_an_item_in_a_batch_count_as_they_come(
    settings: RunSettings,
) -> None:
    async def scenario(served: Served) -> None:
        first, second = await served.take(2)
        bad_then_good = [{**first, "result": "NaN"}, answered(first)]
        good_then_bad = [answered(second), {**second, "result": "NaN"}]
        assert await served.submit(bad_then_good) == [INVALID, ACCEPTED]
        assert await served.submit(good_then_bad) == [ACCEPTED, INVALID]
        status = await served.status()
        assert (status["done"], status["issued"], status["invalid_results"]) == (2, 0, 2)

    on_a_server(settings, scenario)


def test_an_empty_batch_changes_nothing(settings: RunSettings) -> None:
    async def scenario(served: Served) -> None:
        before = await served.status()
        assert await served.submit([]) == []
        assert await served.status() == before

    on_a_server(settings, scenario)


def test_five_thousand_items_in_a_batch_are_judged_one_by_one(tmp_path: Path) -> None:
    infile = tmp_path / "in.jsonl"
    infile.write_bytes(b"".join(good_line(number) + b"\n" for number in range(5000)))
    settings = settings_of(infile, tmp_path / "out.jsonl")

    async def scenario(served: Served) -> None:
        items: list[Any] = [
            answered(i) for i in [*await served.take(4096), *await served.take(4096)]
        ]
        assert len(items) == 5000
        for place in range(0, 5000, 10):
            items[place] = {**items[place], "result": None}
        items[7] = "no item"
        outcomes = await served.submit(items)
        bad = {7, *range(0, 5000, 10)}
        assert outcomes == [INVALID if n in bad else ACCEPTED for n in range(5000)]
        again = await served.take(5000)
        assert [item["work_id"] for item in again] == list(range(0, 5000, 10))

    on_a_server(settings, scenario)


def test_what_clients_made_up_does_not_spoil_the_journal(settings: RunSettings) -> None:
    odd_leases = ["0." + "9" * 4300, "1." + "9" * 400, "2.-5", "3.18446744073709551616", "4.\u0663"]

    async def make_up() -> None:
        async with serving(settings) as served:
            for name in ("\u0663\u00e9", "x" * 128):
                await served.ask("GET", f"/work?batch_size=3&worker={quote(name)}")
                stats = {"requests": 2**52}
                await served.ask("POST", "/heartbeat", {"worker": name, "stats": stats})
            odd_steps = [
                {"hash": "a\n", "response": "1"},
                {"hash": "\ud800", "response": "1"},
                {"hash": '"],', "response": "1"},
                {"hash": "a", "response": "1]\n"},
                {"hash": "a", "response": "\u2028"},
                {"hash": "a", "response": '"\u2028\x7f\u0085"'},
                {"hash": "a", "response": nested(300)},
                {"hash": "a", "response": None, "pos": [2**30, 0]},
            ]
            named = {"work_id": 5, "lease": "5.6", "attempt": 1}
            reply = await served.ask(
                "POST",
                "/steps",
                {"steps": [{**named, "pos": [n, 0], **x} for n, x in enumerate(odd_steps)]},
            )
            assert reply.json["outcomes"] == [INVALID] * 5 + [ACCEPTED] * 3
            reason = "\u2028\x00\x85" + "x" * 100_000
            named |= {"reason": reason, "keep_yields": 2**70, "charge": False}
            await served.ask("POST", "/release", {"items": [named]})
            odd = [
                {"work_id": work_id, "result": result_of(work_id), "lease": lease}
                for work_id, lease in enumerate(odd_leases)
            ]
            assert await served.submit(odd) == [ACCEPTED] * 5

    async def go_on(served: Served) -> None:
        served.counted = {work_id: result_of(work_id) for work_id in range(5)}
        assert (await served.status())["done"] == 5
        (item,) = await served.take(1)
        assert item["work_id"] == 5
        assert [step["response"] for step in item["steps"]] == ['"\u2028\x7f\u0085"', nested(300)]

    run(make_up())
    on_a_server(settings, go_on)


TINY_STEP = b'{"work_id":0,"lease":"0.1","attempt":1,"pos":[%d,0],"hash":"a","response":"1"}'
CUT = b'{"work_id":0,"lease":"0.1","attempt":1,"pos":[9999999,0],"hash":"a"}'

FLOODS: dict[str, tuple[str, bytes]] = {
    "bad steps": ("/steps", b'{"steps": [' + b"7," * (2 * MIB) + b"7]}"),
    "tiny steps": ("/steps", b'{"steps": [%b]}' % b",".join(TINY_STEP % n for n in range(4096))),
    "very many tiny steps": (
        "/steps",
        b'{"steps": [%b]}' % b",".join(TINY_STEP % n for n in range(16_384)),
    ),
    "tiny steps, and cuts behind them": (
        "/steps",
        b'{"steps": [%b]}' % b",".join([*(TINY_STEP % n for n in range(4096)), *[CUT] * 12_288]),
    ),
    "bad items": ("/results", b'{"items": [' + b"7," * (2 * MIB) + b"7]}"),
    "unknown ids": ("/release", b'{"work_ids": [' + b"7," * (2 * MIB) + b"7]}"),
    "leases that never were": (
        "/heartbeat",
        b'{"worker": "w", "held": {%s}}' % b", ".join(b'"%d.9":1' % n for n in range(MIB // 2)),
    ),
}


@pytest.mark.parametrize("kind", FLOODS)
def test_a_body_of_very_many_entries_keeps_no_other_client_waiting(
    kind: str, settings: RunSettings
) -> None:
    path, body = FLOODS[kind]

    async def scenario(served: Served) -> None:
        assert (await served.take(1))[0]["lease"] == "0.1"
        flood = asyncio.create_task(served.ask("POST", path, body))
        longest_s = 0.0
        while not flood.done():
            began = time.process_time()  # of the server, which is in this process
            assert (await served.ask("GET", "/healthz")).status == 200
            longest_s = max(longest_s, time.process_time() - began)
        assert flood.result().status in (200, 400, 413)
        assert longest_s < BUSY_S, f"another client waited for {longest_s:.1f} s of computing"

    on_a_server(settings, scenario)


# -------------------------------------------------------------------- bodies

VALID_BODIES: dict[str, Any] = {
    "/results": {"items": [{"work_id": 0, "result": "{}"}]},
    "/release": {"work_ids": [0]},
    "/heartbeat": {"worker": "w", "held": {"0.1": 1}},
    "/steps": {
        "steps": [
            {
                "work_id": 0,
                "lease": "0.1",
                "attempt": 1,
                "pos": [0, 0],
                "hash": "a",
                "response": "1",
            }
        ]
    },
    "/work_timeout": {"timeout": 5},
    "/max_failures": {"limit": "5%"},
    "/pause": {"paused": True},
    "/drain": {},
}

BODIES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda valid: b"",
    "only a line end": lambda valid: b"\n",
    "no JSON": lambda valid: b"hello",
    "JSON that breaks off": lambda valid: valid[:-1],
    "two objects": lambda valid: valid + valid,
    "an empty list": lambda valid: b"[]",
    "a list with the object": lambda valid: b"[" + valid + b"]",
    "null": lambda valid: b"null",
    "a string": lambda valid: b'"text"',
    "a number": lambda valid: b"1e5",
    "NaN": lambda valid: b"NaN",
    "no UTF-8": lambda valid: b"\xff\xfe" + valid,
    "a raw NUL": lambda valid: valid + b"\0",
    "a form instead of JSON": lambda valid: b"items=1&worker=w",
    "nested 100,000 deep": lambda valid: nested().encode(),
    "a field nobody knows that is nested 100,000 deep": (
        lambda valid: b'{"x": ' + nested().encode() + b", " + valid[1:]
    ),
    "nested without an end": lambda valid: b'{"x": ' + b"[" * DEEP,
}


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("path", VALID_BODIES)
def test_a_body_that_is_not_what_a_call_takes_is_refused(
    path: str, kind: str, settings: RunSettings
) -> None:
    body = BODIES[kind](json.dumps(VALID_BODIES[path]).encode())

    async def scenario(served: Served) -> None:
        await served.take(2)
        await assert_refused(served, "POST", path, body, words="")

    on_a_server(settings, scenario)


@pytest.mark.parametrize("path", VALID_BODIES)
def test_a_body_of_more_than_64_mib_is_too_large(path: str, settings: RunSettings) -> None:
    async def scenario(served: Served) -> None:
        body = b" " * (64 * MIB + 1)
        await assert_refused(served, "POST", path, body, words="64 MiB", status=413)

    on_a_server(settings, scenario)


def results(**fields: Any) -> tuple[str, Any]:
    return "/results", {"items": [{"work_id": 0, "result": "{}"}], **fields}


def release(**fields: Any) -> tuple[str, Any]:
    return "/release", fields


def release_of(**fields: Any) -> tuple[str, Any]:
    return "/release", {"items": [{"work_id": 1, "lease": "1.2"}, {"work_id": 0, **fields}]}


def beat(**fields: Any) -> tuple[str, Any]:
    return "/heartbeat", {"worker": "w", **fields}


def raw(path: str, body: bytes) -> tuple[str, Any]:
    return path, body


FIELDS: dict[str, tuple[tuple[str, Any], str]] = {
    "results without items": (("/results", {}), "items"),
    "results whose items are null": (results(items=None), "items"),
    "results whose items are an object": (results(items={"0": "{}"}), "items"),
    "results whose items are a string": (results(items="[]"), "items"),
    "results whose items are a number": (results(items=1), "items"),
    "results of a worker without a name": (results(worker=""), "worker"),
    "results of a worker with a name of 129 characters": (results(worker="x" * 129), "worker"),
    "results of a worker with a line end in its name": (results(worker="a\nb"), "worker"),
    "results of a worker with an escape in its name": (results(worker="\x1b[31m"), "worker"),
    "results of a worker whose name is half a pair": (results(worker="\ud800"), "worker"),
    "results of a worker whose name is a number": (results(worker=7), "worker"),
    "results that want a string": (results(want="3"), "want"),
    "results that want a fraction": (results(want=1.5), "want"),
    "results that want null": (results(want=None), "want"),
    "a release of ids that are strings": (release(work_ids=["0"]), "work_ids"),
    "a release of ids that are no list": (release(work_ids=0), "work_ids"),
    "a release of one bad id among good ones": (release(work_ids=[0, None, 1]), "work_ids"),
    "a release of items that are ids": (release(items=[0]), "items"),
    "a release of items that are no list": (release(items={"work_id": 0}), "items"),
    "a release of an item without id": (release(items=[{"lease": "0.1"}]), "work_id"),
    "a release with a lease that is a number": (release_of(lease=1), "lease"),
    "a release with a charge that is a word": (release_of(charge="no"), "charge"),
    "a release with a charge that is a number": (release_of(charge=0), "charge"),
    "a release with a reason that is null": (release_of(reason=None), "reason"),
    "a release with steps that are a list": (release_of(steps=[]), "steps"),
    "a release that keeps a fraction": (release_of(keep_yields=1.5), "keep_yields"),
    "a release that keeps a word": (release_of(keep_yields="all"), "keep_yields"),
    "a release that keeps true": (release_of(keep_yields=True), "keep_yields"),
    "a release that begins anew a number of times": (release_of(fresh_start=2), "fresh_start"),
    "steps without steps": (("/steps", {"worker": "w"}), "steps"),
    "steps that are null": (("/steps", {"steps": None}), "steps"),
    "steps that are an object": (("/steps", {"steps": {"0": {}}}), "steps"),
    "steps that are a string": (("/steps", {"steps": "[]"}), "steps"),
    "20,000 steps": (("/steps", {"steps": [7] * 20_000}), "steps"),
    "a heartbeat without a worker": (("/heartbeat", {"held": {}}), "worker"),
    "a heartbeat of a worker without a name": (beat(worker=""), "worker"),
    "a heartbeat of null": (beat(worker=None), "worker"),
    "a heartbeat of a worker whose name is a number": (beat(worker=7), "worker"),
    "a heartbeat of a worker with a name of 129 characters": (beat(worker="x" * 129), "worker"),
    "a heartbeat of a worker with control characters": (beat(worker="\0\x07"), "worker"),
    "a heartbeat that holds a list": (beat(held=["0.1"]), "held"),
    "a heartbeat that holds null": (beat(held=None), "held"),
    "a heartbeat with progress that is a string": (beat(held={"0.1": "1"}), "held"),
    "a heartbeat with progress that is a fraction": (beat(held={"0.1": 0.5}), "held"),
    "a heartbeat with progress that is null": (beat(held={"0.1": None}), "held"),
    "a heartbeat with progress that is true": (beat(held={"0.1": True}), "held"),
    "a heartbeat with a backend that is a number": (beat(backend=1), "backend"),
    "a heartbeat with lag that is a string": (beat(lag_s="late"), "lag_s"),
    "a heartbeat with stats that are a list": (beat(stats=[1, 2]), "stats"),
    "a heartbeat with requests that are a string": (beat(stats={"requests": "1"}), "requests"),
    "a limit of failures that is a fraction": (("/max_failures", {"limit": 0.05}), "limit"),
    "a limit of failures that is no number": (("/max_failures", {"limit": "lots"}), "as 200"),
    "a limit of failures below 0": (("/max_failures", {"limit": -1}), "as 200"),
    "a limit of failures that is true": (("/max_failures", {"limit": True}), "limit"),
    "no limit of failures": (("/max_failures", {}), "limit"),
    "failures accepted by a number": (("/max_failures", {"accept": 1}), "accept"),
    "a pause that is a word": (("/pause", {"paused": "yes"}), "paused"),
    "a pause that is a number": (("/pause", {"paused": 1}), "paused"),
    "a pause that is null": (("/pause", {"paused": None}), "paused"),
    "no pause": (("/pause", {}), "paused"),
    "a reason that is no text": (("/pause", {"paused": True, "reason": 7}), "reason"),
    "a reason of two lines": (("/pause", {"paused": True, "reason": "a\nb"}), "reason"),
    "a reason that moves the cursor": (("/pause", {"paused": True, "reason": "\x1b[2J"}), "reason"),
    "a reason without an end": (("/pause", {"paused": True, "reason": "x" * 501}), "500"),
    "a work timeout of 0": (("/work_timeout", {"timeout": 0}), "timeout"),
    "a negative work timeout": (("/work_timeout", {"timeout": -1}), "timeout"),
    "a work timeout of minus zero": (("/work_timeout", {"timeout": -0.0}), "timeout"),
    "a work timeout of more than ten years": (("/work_timeout", {"timeout": 4e8}), "315360000"),
    "a work timeout that is a string": (("/work_timeout", {"timeout": "5"}), "timeout"),
    "a work timeout that is true": (("/work_timeout", {"timeout": True}), "timeout"),
    "a work timeout that is null": (("/work_timeout", {"timeout": None}), "timeout"),
    "no work timeout": (("/work_timeout", {}), "timeout"),
    "a work timeout that is NaN": (raw("/work_timeout", b'{"timeout": NaN}'), "JSON"),
    "a work timeout that is infinite": (raw("/work_timeout", b'{"timeout": Infinity}'), "JSON"),
    "a work timeout beyond every float": (raw("/work_timeout", b'{"timeout": 1e999}'), "timeout"),
    "a work timeout of 400 digits": (
        raw("/work_timeout", b'{"timeout": ' + b"9" * 400 + b"}"),
        "timeout",
    ),
}


@pytest.mark.parametrize("kind", FIELDS)
def test_a_bad_field_is_named_and_nothing_changes(kind: str, settings: RunSettings) -> None:
    (path, body), words = FIELDS[kind]

    async def scenario(served: Served) -> None:
        await served.take(3)
        await assert_refused(served, "POST", path, body, words)

    on_a_server(settings, scenario)


# -------------------------------------------------------------------- queries

QUERIES: dict[str, tuple[str, int | str]] = {
    "nothing": ("", 1),
    "a batch size of 0": ("batch_size=0", "batch_size"),
    "a batch size of -1": ("batch_size=-1", "batch_size"),
    "a batch size of minus zero": ("batch_size=-0", "batch_size"),
    "a batch size of a milliard": ("batch_size=1000000000", 11),
    "a batch size of 100 digits": ("batch_size=" + "9" * 100, 11),
    "a batch size that is a word": ("batch_size=abc", "batch_size"),
    "a batch size that is a fraction": ("batch_size=1.5", "batch_size"),
    "a batch size with an exponent": ("batch_size=1e3", "batch_size"),
    "a batch size with an underscore": ("batch_size=1_0", "batch_size"),
    "a batch size with a plus sign": ("batch_size=%2B5", "batch_size"),
    "a batch size with a space": ("batch_size=+5", "batch_size"),
    "a batch size in Arabic digits": ("batch_size=%D9%A3", "batch_size"),
    "a batch size in superscript": ("batch_size=%C2%B2", "batch_size"),
    "a batch size without a value": ("batch_size=", "batch_size"),
    "a batch size without an equals sign": ("batch_size", "batch_size"),
    "a batch size with a NUL": ("batch_size=1%00", "batch_size"),
    "two batch sizes, of which the first counts": ("batch_size=2&batch_size=0", 2),
    "a batch size under another name": ("BATCH_SIZE=0", 1),
    "a wait of -1": ("wait=-1", "wait"),
    "a wait that is NaN": ("wait=nan", "wait"),
    "an infinite wait": ("wait=inf", "wait"),
    "a wait beyond every float": ("wait=1e999", "wait"),
    "a wait that is a word": ("wait=forever", "wait"),
    "a wait without a value": ("wait=", "wait"),
    "a wait in Arabic digits": ("wait=%D9%A3", "wait"),
    "a wait with an underscore": ("wait=1_0", "wait"),
    "a wait of aeons": ("wait=1e300", 1),
    "a wait of minus zero": ("wait=-0.0", 1),
    "a worker without a name": ("worker=", "worker"),
    "a worker with a name of 128 characters": ("worker=" + "x" * 128, 1),
    "a worker with a name of 129 characters": ("worker=" + "x" * 129, "worker"),
    "a worker with a line end in its name": ("worker=a%0Ab", "worker"),
    "a worker with a NUL in its name": ("worker=%00", "worker"),
    "a worker with an escape in its name": ("worker=%1B%5B31m", "worker"),
    "a worker with a line separator in its name": ("worker=%E2%80%A8", "worker"),
    "a worker whose name is not ASCII": ("worker=%C3%A9l%C3%A8ve", 1),
    "a parameter nobody knows": ("colour=red&batch_size=3", 3),
}


@pytest.mark.parametrize("kind", QUERIES)
def test_a_call_for_work_gives_what_its_query_asks_or_names_what_is_wrong(
    kind: str, settings: RunSettings
) -> None:
    query, expected = QUERIES[kind]

    async def scenario(served: Served) -> None:
        if isinstance(expected, str):
            await assert_refused(served, "GET", f"/work?{query}", None, expected)
        else:
            reply = await served.ask("GET", f"/work?{query}")
            assert reply.status == 200, reply
            assert [i["work_id"] for i in reply.json["items"]] == list(range(expected))

    on_a_server(settings, scenario)


# -------------------------------------------------------------------- heartbeats

HEARTBEATS: dict[str, dict[str, Any]] = {
    "with negative progress": {"held": {"0.1": -5}},
    "with progress beyond 64 bits": {"held": {"0.1": 2**70}},
    "with a backend that is neither up nor down": {"backend": "sideways"},
    "that is a year late": {"lag_s": 3e7},
    "that is early": {"lag_s": -1e300},
    "with leases that are none": {
        "held": {"": 1, ".": 1, "x.y": 1, "1": 1, "-1.-1": 1, "0.1.1": 1}
    },
    "with a lease of 10,000 characters": {"held": {"0." + "1" * 9998: 1}},
    "with fields nobody knows": {"colour": "red"},
}


@pytest.mark.parametrize("kind", HEARTBEATS)
def test_an_odd_heartbeat_keeps_the_worker_alive_and_its_leases(
    kind: str, settings: RunSettings
) -> None:
    async def scenario(served: Served) -> None:
        await served.ask("POST", "/heartbeat", {"worker": "w"})
        taken = await served.ask("GET", "/work?worker=w")
        assert taken.json["items"][0]["lease"] == "0.1"
        before = await served.settled_status()

        reply = await served.ask("POST", "/heartbeat", {"worker": "w", **HEARTBEATS[kind]})

        assert reply.status == 200
        told = {name: reply.json[name] for name in ("status", "done", "lost", "back", "pause")}
        assert told == {"status": "OK", "done": [], "lost": [], "back": [], "pause": False}
        assert await served.status() == before

    on_a_server(settings, scenario)


def test_a_heartbeat_of_100_000_leases_is_told_the_fate_of_each(settings: RunSettings) -> None:
    async def scenario(served: Served) -> None:
        items = await served.take(3)
        assert await served.submit([answered(items[0])]) == [ACCEPTED]
        held = {f"{number}.77777": 1 for number in range(100_000)}
        reply = await served.ask("POST", "/heartbeat", {"worker": "w", "held": held})
        assert reply.status == 200
        # Two lines are open and were leased by others; to all others there is nothing to do.
        assert reply.json["lost"] == ["1.77777", "2.77777"]
        assert set(reply.json["done"]) == held.keys() - {"1.77777", "2.77777"}
        assert (await served.status())["issued"] == 2

    on_a_server(settings, scenario)


STATS: dict[str, dict[str, Any]] = {
    "negative": {"requests": -5, "completion_tokens": -(10**9)},
    "beyond 64 bits": {"requests": 2**70, "prompt_tokens": 2**64, "in_flight": -(2**70)},
    "beyond every float": {"completion_tokens": 10**400},
}


@pytest.mark.parametrize("kind", STATS)
def test_figures_of_a_worker_that_cannot_be_harm_no_display(
    kind: str, settings: RunSettings
) -> None:
    async def scenario(served: Served) -> None:
        reply = await served.ask("POST", "/heartbeat", {"worker": "w", "stats": STATS[kind]})
        assert reply.status in (200, 400)
        for path in ("/status", "/metrics", "/healthz", "/"):
            assert (await served.ask("GET", path)).status == 200, path

    on_a_server(settings, scenario)


# -------------------------------------------------------------------- releases

FREE = False

RELEASES: dict[str, tuple[Callable[[Item, Item], dict[str, Any]], int, int | None]] = {
    # What is sent about the first of two leased items; how many leases that ends; and the first
    # item's retry count when it is handed out again, None when it is not.
    "nothing": (lambda i, o: {}, 0, None),
    "empty lists": (lambda i, o: {"work_ids": [], "items": []}, 0, None),
    "the same id twice": (lambda i, o: {"work_ids": [0, 0]}, 1, 1),
    "ids that do not exist": (lambda i, o: {"work_ids": [-1, 10, 2**70, -(2**70)]}, 0, None),
    "16,000 ids": (lambda i, o: {"work_ids": list(range(1000, 17_000))}, 0, None),
    "a lease twice, free and charged": (
        lambda i, o: {"items": [{**i, "charge": FREE}, {**i, "charge": True}]},
        1,
        0,
    ),
    "a lease twice, charged and free": (
        lambda i, o: {"items": [{**i, "charge": True}, {**i, "charge": FREE}]},
        1,
        1,
    ),
    "an item by id, and free by its lease": (
        lambda i, o: {"work_ids": [0], "items": [{**i, "charge": FREE}]},
        1,
        1,
    ),
    "the lease of another item": (lambda i, o: {"items": [{**i, "lease": o["lease"]}]}, 0, None),
    "a lease that never was": (lambda i, o: {"items": [{**i, "lease": "0.99"}]}, 0, None),
    "a lease that is no lease": (lambda i, o: {"items": [{**i, "lease": "?"}]}, 0, None),
    "a lease of 10,000 characters": (
        lambda i, o: {"items": [{**i, "lease": "0." * 5000}]},
        0,
        None,
    ),
    "an id that does not exist, with a lease": (
        lambda i, o: {"items": [{**i, "work_id": 2**70}]},
        0,
        None,
    ),
    "a reason of a million characters": (
        lambda i, o: {"items": [{**i, "charge": FREE, "reason": "x" * 1_000_000}]},
        1,
        0,
    ),
    "a crash that is to be charged": (
        lambda i, o: {"items": [{**i, "charge": True, "reason": "crash"}]},
        1,
        1,
    ),
    "a crash that is free": (
        lambda i, o: {"items": [{**i, "charge": FREE, "reason": "crash"}]},
        1,
        0,
    ),
    "steps that are neither kept nor dropped": (
        lambda i, o: {"items": [{**i, "charge": FREE, "steps": "sideways"}]},
        1,
        0,
    ),
    "fewer yields to keep than none": (
        lambda i, o: {"items": [{**i, "charge": FREE, "keep_yields": -(2**70)}]},
        1,
        0,
    ),
    "more yields to keep than there can be": (
        lambda i, o: {"items": [{**i, "charge": FREE, "keep_yields": 10**300}]},
        1,
        0,
    ),
    "fields nobody knows": (lambda i, o: {"items": [{**i, "colour": "red"}], "x": 1}, 1, 1),
}


@pytest.mark.parametrize("kind", RELEASES)
def test_an_odd_release_ends_the_leases_it_names_once(kind: str, settings: RunSettings) -> None:
    make, ended, retries = RELEASES[kind]

    async def scenario(served: Served) -> None:
        first, second = (
            {name: item[name] for name in ("work_id", "lease")} for item in await served.take(2)
        )

        reply = await served.ask("POST", "/release", make(first, second))

        assert reply.status == 200, reply
        assert reply.json == {"status": "OK", "released_count": ended}
        assert (await served.status())["issued"] == 2 - ended
        again = [(i["work_id"], i["retry_count"]) for i in await served.take(1)]
        assert again == [(2, 0) if retries is None else (0, retries)]

    on_a_server(settings, scenario)


def test_a_release_whose_reason_is_no_text_is_refused_or_freed_of_it(
    settings: RunSettings,
) -> None:
    async def scenario(served: Served) -> None:
        (item,) = await served.take(1)
        named = {"work_id": 0, "lease": item["lease"], "charge": False, "reason": "\ud800"}
        before = await served.settled_status()
        reply = await served.ask("POST", "/release", {"items": [named]})
        assert reply.status in (200, 400)
        if reply.status == 400:
            assert_one_sentence(reply.message)
            assert await served.status() == before

    on_a_server(settings, scenario)


# -------------------------------------------------------------------- calls that are none

NO_CALLS: dict[str, tuple[str, str, int]] = {
    "a call nobody knows": ("GET", "/nothing", 404),
    "the call of a later protocol": ("POST", "/later", 404),
    "steps by GET": ("GET", "/steps", 405),
    "a path into the file system": ("GET", "/../../etc/passwd", 404),
    "a path with a NUL": ("GET", "/work%00", 404),
    "a path with two slashes": ("GET", "//work", 404),
    "a path of 5000 characters": ("GET", "/" + "x" * 5000, 404),
    "a call with another method": ("GET", "/results", 405),
    "work by POST": ("POST", "/work", 405),
    "a method that deletes": ("DELETE", "/work", 405),
    "a method that mends": ("PATCH", "/status", 405),
}


@pytest.mark.parametrize("kind", NO_CALLS)
def test_what_is_no_call_is_refused_with_a_sentence(kind: str, settings: RunSettings) -> None:
    method, path, status = NO_CALLS[kind]

    async def scenario(served: Served) -> None:
        await served.take(1)
        await assert_refused(served, method, path, None, words="", status=status)

    on_a_server(settings, scenario)


def test_asking_for_the_head_of_a_call_for_work_takes_none(settings: RunSettings) -> None:
    async def scenario(served: Served) -> None:
        before = await served.settled_status()
        reply = await served.ask("HEAD", "/work?batch_size=5")
        assert reply.status < 500
        assert await served.status() == before

    on_a_server(settings, scenario)


def test_there_are_more_than_forty_kinds_of_bad_input() -> None:
    tables = {
        "lines": LINES,
        "files": FILES,
        "inputs": NO_INPUT,
        "outputs": NO_OUTPUT,
        "results": RESULTS,
        "items": ITEMS,
        "bodies": BODIES,
        "fields": FIELDS,
        "queries": QUERIES,
        "heartbeats": HEARTBEATS,
        "stats": STATS,
        "releases": RELEASES,
        "calls": NO_CALLS,
    }
    print(
        "kinds of bad input:",
        sum(map(len, tables.values())),
        {k: len(v) for k, v in tables.items()},
    )
    assert sum(map(len, tables.values())) > 40
