"""GET /items/N: one line, wherever it is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dispatcher.client import WorkClient
from dispatcher.config import RunSettings
from dispatcher.core.observed import Mark
from dispatcher.errors import TooFarError
from dispatcher.models import HeartbeatRequest, ResultItem
from dispatcher.server import item_view
from dispatcher.server.item_view import SHOWN_BYTES, ItemView, Piece, read_line
from dispatcher.service import DispatchService
from tests.server.test_access_control import ask
from tests.support.processes import Server, dispatcher_server, wait_until

LINES = 40
LARGE = 7  # its line and its result are larger than what is shown
Run = tuple[Server, WorkClient]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    infile = tmp_path / "in.jsonl"
    sizes = [10_000 if n == LARGE else 3 for n in range(LINES)]
    infile.write_text(
        "".join(json.dumps({"q": n, "x": "ä" * s}) + "\n" for n, s in enumerate(sizes))
    )
    files = ("--infile", infile, "--outfile", tmp_path / "out.jsonl")
    with (
        dispatcher_server(*files, "--max-retries", "1", "--retry", "1") as server,
        server.client("n1-7-0123abcd") as client,
    ):
        yield server, client


def look(server: Server, line: object) -> tuple[int, Any]:
    status, found, _ = ask(server, "GET", f"/items/{line}", server.headers)
    return status, found


def known(server: Server, line: int) -> Any:
    status, found = look(server, line)
    assert status == 200, found
    return found


def when(server: Server, line: int, holds: Callable[[Any], bool]) -> Any:
    wait_until(lambda: holds(known(server, line)), f"line {line} to be so")
    return known(server, line)


def test_a_line_is_told_from_before_it_is_handed_out_to_when_it_is_written(run: Run) -> None:
    server, client = run
    found = known(server, 1)
    assert (found["state"], found["result"]) == ("unread", None)
    assert json.loads(found["input"]["text"])["q"] == 1

    items = client.get_work(3).items
    found = known(server, 1)
    assert found["state"] == "leased"
    (lease,) = found["leases"]
    assert lease["worker"] == "n1-7-0123abcd"
    assert lease["held_s"] >= 0

    items[1].set_result('{"__ERROR__": {"error": "bad", "message": "why"}}')
    client.submit_results([items[1]])
    found = known(server, 1)
    assert (found["state"], found["result"]["error"]) == ("waiting", "bad")
    assert json.loads(found["result"]["text"])["__ERROR__"]["message"] == "why"
    assert found["worker"] == "n1-7-0123abcd"

    items[0].set_result('{"first": true}')
    client.submit_results([items[0]])
    found = when(server, 1, lambda now: now["state"] == "written")
    assert found["result"]["error"] == "bad"
    assert known(server, 0)["result"]["text"] == '{"first": true}'
    assert known(server, 2)["state"] == "leased"


def test_long_texts_are_cut_and_said_to_be(run: Run) -> None:
    server, client = run
    items = client.get_work(LARGE + 1).items
    for item in items:
        item.set_result(json.dumps({"text": "r" * (9000 if item.work_id == LARGE else 1)}))
    client.submit_results(items)
    found = when(server, LARGE, lambda now: now["state"] == "written")
    for part in ("input", "result"):
        assert found[part]["is_cut"]
        assert found[part]["bytes"] > 9000
        assert len(found[part]["text"]) <= SHOWN_BYTES
    assert not known(server, LARGE - 1)["result"]["is_cut"]


def test_tries_are_told_with_cause_and_worker_while_open_and_after(run: Run) -> None:
    server, client = run
    client.release_work([client.get_work(1).items[0].work_id])
    found = known(server, 0)
    assert (found["state"], found["retries"]) == ("ready", 1)
    assert found["says"] == "it waits to be handed out again"
    assert [(t["end"], t["reason"]) for t in found["attempts"]] == [("charged", "released")]
    client.release_work([client.get_work(1).items[0].work_id])
    found = when(server, 0, lambda now: now["state"] == "written")
    assert found["result"]["error"] == "max_retries_exceeded"
    assert [t["attempt"] for t in found["attempts"]] == [1, 2]
    assert {t["worker"] for t in found["attempts"]} == {"n1-7-0123abcd"}


def test_a_line_that_went_well_at_the_second_try_has_both(run: Run) -> None:
    server, client = run
    client.release_work([client.get_work(1).items[0].work_id])
    (item,) = client.get_work(1).items
    item.set_result("1")
    client.submit_results([item])
    found = when(server, 0, lambda now: len(now["attempts"]) == 2)
    assert [t["end"] for t in found["attempts"]] == ["charged", "result"]


def test_a_held_line_that_is_not_begun_is_told_apart(run: Run) -> None:
    server, client = run
    client.heartbeat(HeartbeatRequest("n1-7-0123abcd"))
    items = client.get_work(2).items
    held = {str(items[0].lease): 0, str(items[1].lease): 3}
    client.heartbeat(HeartbeatRequest("n1-7-0123abcd", held))
    assert [known(server, n)["leases"][0]["is_started"] for n in (0, 1)] == [False, True]


@pytest.mark.parametrize("line", ["x", "-1", "1.5", "%31%zz", "9" * 16, "%D9%A3", "1e3", "%20"])
def test_what_is_no_number_is_refused(run: Run, line: str) -> None:
    status, said = look(run[0], line)
    assert status in (400, 404)
    assert said["status"] == "error"


def test_a_line_that_the_input_has_not_is_not_found(run: Run) -> None:
    server, client = run
    for line in (LINES, LINES + 5, 10**14, 10**30):
        assert look(server, line)[0] == 404
    client.get_work(LINES)
    assert look(server, LINES)[0] == 404
    assert look(server, LINES - 1)[0] == 200


def test_every_line_of_a_larger_run_is_found_at_its_place(tmp_path: Path) -> None:
    count = 6000
    infile = tmp_path / "in.jsonl"
    infile.write_text("".join(f'{{"q": {n}}}\n' for n in range(count)))
    files = ("--infile", infile, "--outfile", tmp_path / "out.jsonl")
    with dispatcher_server(*files) as server, server.client("w") as client:
        while items := client.get_work(500).items:
            for item in items:
                item.set_result(f'{{"a": {item.work_id}}}')
            client.submit_results(items)
            ask(server, "GET", "/status", server.headers)  # where it stands now is noted
            if items[-1].work_id >= 4999:
                break
        for line in (0, 1, 255, 256, 257, 1234, 4096, 4999):
            found = when(server, line, lambda now: now["state"] == "written")
            assert found["input"]["text"] == f'{{"q": {line}}}'
            assert found["result"]["text"] == f'{{"a": {line}}}'
        assert known(server, 5999)["input"]["text"] == '{"q": 5999}'


def test_lines_of_a_run_that_is_complete_are_told_as_well(run: Run) -> None:
    server, client = run
    items = client.get_work(LINES).items
    for item in items:
        item.set_result(f'{{"a": {item.work_id}}}')
    client.submit_results(items)
    found = known(server, LINES - 1)
    assert found["result"]["text"] == f'{{"a": {LINES - 1}}}'
    assert json.loads(found["input"]["text"])["q"] == LINES - 1


def test_a_start_that_finds_the_run_complete_tells_of_its_lines(tmp_path: Path) -> None:
    infile = tmp_path / "in.jsonl"
    infile.write_text('{"q": 0}\n{"q": 1}\n')
    settings = RunSettings(infile, tmp_path / "out.jsonl", tmp_path / "state")

    async def scenario() -> None:
        service = DispatchService(settings)
        await service.start()
        items = (await service.get_work("w", 2)).items
        results = [ResultItem(item.work_id, '{"a": 1}', lease=item.lease) for item in items]
        await service.submit(results)
        await service.finished.wait()
        await service.close()
        again = DispatchService(settings)
        await again.start()
        found = await ItemView(again).look("1")
        assert found is not None
        assert (found["state"], found["result"]["text"]) == ("written", '{"a": 1}')
        assert found["input"]["text"] == '{"q": 1}'
        assert await ItemView(again).look("2") is None
        await again.close()

    asyncio.run(scenario())


def test_an_input_that_cannot_be_read_is_told_and_harms_nothing(run: Run, tmp_path: Path) -> None:
    server, client = run
    client.get_work(1)
    (tmp_path / "in.jsonl").rename(tmp_path / "gone.jsonl")
    assert known(server, 0)["input"]["problem"] == "cannot be read: No such file or directory"


# --- reading ------------------------------------------------------------------------------------


def test_a_line_is_read_from_any_mark(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"a\n\nccc\nlast")
    lines = [Piece(b"a", 1), Piece(b"", 0), Piece(b"ccc", 3), Piece(b"last", 4), None]
    for line, expected in enumerate(lines):
        assert read_line(path, Mark(0, 0), line) == expected
    assert read_line(path, Mark(2, 3), 3) == Piece(b"last", 4)
    path.write_bytes(b"a\n")
    assert read_line(path, Mark(0, 0), 1) is None


def test_lines_longer_than_what_is_read_at_once_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_view, "_CHUNK_BYTES", 7)
    path = tmp_path / "lines"
    lines = [b"x" * n for n in (0, 6, 7, 8, 13, 14, 15, 50, 1)]
    path.write_bytes(b"\n".join(lines) + b"\n")
    for number, line in enumerate(lines):
        found = read_line(path, Mark(0, 0), number)
        assert found is not None
        assert found.size == len(line)
        assert line.startswith(found.data)


def test_a_search_that_takes_too_long_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_view, "_CHUNK_BYTES", 2)
    monkeypatch.setattr(item_view, "LONGEST_S", -1.0)
    path = tmp_path / "lines"
    path.write_bytes(b"a\n" * 50)
    with pytest.raises(TooFarError):
        read_line(path, Mark(0, 0), 40)
