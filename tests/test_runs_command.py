"""`dispatcher runs`: the list, one line's history, failed lines out and their results back in."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
import yaml

from dispatcher.config import RunSettings
from dispatcher.core.events import (
    Absolved,
    Event,
    Finished,
    Issued,
    LeaseEnded,
    Opened,
    QueueState,
)
from dispatcher.core.work_queue import (
    CRASH,
    MAX_RETRIES_EXCEEDED,
    VANISHED,
    QueuePolicy,
    WorkQueue,
)
from dispatcher.errors import DispatcherError, StorageError
from dispatcher.models import HeartbeatRequest, ReleaseItem, ResultItem, StepItem, WorkItem
from dispatcher.runs import lines as lines_module
from dispatcher.runs import merge as merge_module
from dispatcher.runs.cli import main
from dispatcher.runs.found import FoundRun, the_run
from dispatcher.runs.history import Follower
from dispatcher.runs.lines import LineReader
from dispatcher.runs.look import look
from dispatcher.runs.merge import merge
from dispatcher.runs.reading import ReadOnlyFiles
from dispatcher.service import DispatchService
from dispatcher.storage import writer as writer_module
from dispatcher.storage.files import Files
from dispatcher.storage.ownership import Claim, Identity
from dispatcher.storage.records import Checkpoint, RunHeader
from tests.support.processes import dispatcher_server, run_python, running, wait_until

Answer = Callable[[int], str | None]
"""The result of a line by its number; None leaves it open."""


def good(number: int) -> str:
    return json.dumps({"answer": number})


def error(kind: str, number: int = 0) -> str:
    return json.dumps({"__ERROR__": {"error": kind, "message": f"at {number}"}})


def fails_at(*numbers: int, kind: str = "model_error") -> Answer:
    return lambda number: error(kind, number) if number in numbers else good(number)


def answer(item: WorkItem, result: str) -> ResultItem:
    return ResultItem(item.work_id, result, run=item.run, lease=item.lease)


def settings_of(directory: Path, name: str = "out", infile: Path | None = None) -> RunSettings:
    outfile = directory / f"{name}.jsonl"
    return RunSettings(
        infile=infile or directory / "in.jsonl",
        outfile=outfile,
        state_dir=directory / f"{name}.jsonl.dispatch",
        policy=QueuePolicy(max_retries=1),
    )


def write_input(path: Path, lines: int) -> Path:
    path.write_text("".join(f'{{"n": {number}}}\n' for number in range(lines)))
    return path


def carry_out(settings: RunSettings, answers: Answer, hold: int = 64) -> None:
    """Work on a run until it is complete, or until nothing but open lines is left."""

    async def whole() -> None:
        service = DispatchService(settings)
        await service.start()
        while not service.finished.is_set():
            work = await service.get_work("worker-1", hold)
            known = [(item, answers(item.work_id)) for item in work.items]
            results = [answer(item, result) for item, result in known if result is not None]
            await service.submit(results)
            if work.items and not results:
                break
            if not work.items:
                await asyncio.sleep(0.01)
                if service.queue.leases:
                    break
        await service.close()

    asyncio.run(asyncio.wait_for(whole(), 15))


def make_run(
    directory: Path, answers: Answer = good, *, lines: int = 10, name: str = "out"
) -> RunSettings:
    directory.mkdir(exist_ok=True)
    settings = settings_of(directory, name)
    write_input(settings.infile, lines)
    carry_out(settings, answers)
    return settings


def scenario(settings: RunSettings, play: Callable[[DispatchService], Any]) -> None:
    """Let a test play a part of a run by hand; what is on disk then is left."""

    async def whole() -> None:
        service = DispatchService(settings)
        await service.start()
        await play(service)
        await service.close()

    asyncio.run(asyncio.wait_for(whole(), 15))


def run_file(settings: RunSettings) -> dict[str, Any]:
    content = yaml.safe_load((settings.state_dir / "run.yaml").read_text())
    assert isinstance(content, dict)
    return content


def change_run_file(settings: RunSettings, **changes: Any) -> None:
    content = run_file(settings) | changes
    text = yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False)
    (settings.state_dir / "run.yaml").write_text(text)


def listing(directory: Path) -> dict[str, tuple[int, int, int, str]]:
    """Return everything under a directory, with what would tell that it was changed."""
    found = {}
    for path in sorted([directory, *directory.rglob("*")]):
        about = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        name = str(path.relative_to(directory))
        found[name] = (about.st_mtime_ns, about.st_ino, about.st_mode, content)
    return found


@pytest.fixture
def runs(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs the command, which must succeed, and returns what it printed."""

    def call(*words: str | Path) -> str:
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        return out

    return call


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Return a function that runs the command, which must fail with one line."""

    def call(*words: str | Path) -> tuple[int, str]:
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        assert out == ""
        assert code != 0
        assert err.startswith("dispatcher runs: ")
        assert err.count("\n") == 1
        return code, err

    return call


Runs = Callable[..., str]
Refused = Callable[..., tuple[int, str]]


def test_a_name_that_nothing_can_have_is_refused(refused: Refused) -> None:
    long = "x" * 300
    for words in ([""], [long], ["out", "--merge", long], ["out", "--failed-to", ""]):
        code, said = refused(*words)
        assert code == 2
        assert "the value is empty" in said or "has 300 bytes" in said


def as_json(runs: Runs, *words: str | Path) -> Any:
    return json.loads(runs(*words, "--json"))


# -------------------------------------------------------------------- lines


@pytest.mark.parametrize("piece_bytes", [2, 3, 5, 1 << 20])
def test_lines_are_read_and_skipped_as_they_stand(
    piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines_module, "_PIECE_BYTES", piece_bytes)
    path = tmp_path / "lines"
    for text in (b"", b"\n", b"a", b"a\n", b"abcd\n\nef\nghijk\n\n\nl\n", b"abc\ndefgh\n\nxyz"):
        path.write_bytes(text)
        lines = text.splitlines(keepends=True)
        for first in range(len(lines) + 2):
            for read in (0, 1):
                with LineReader(path) as reader:
                    if read:
                        reader.begin()  # the rest of it goes with the next call
                    reader.skip(first)
                    expected = lines[first + read :]
                    rest = [reader.whole(head) for head in iter(reader.begin, b"")]
                    assert rest == expected
                    assert reader.lines == text.count(b"\n")
                    assert reader.ends_open == bool(text and not text.endswith(b"\n"))


# -------------------------------------------------------------------- the list


def test_a_complete_run_is_listed_with_its_errors_by_kind(tmp_path: Path, runs: Runs) -> None:
    kinds = {3: "model_error", 5: "task_exception", 7: "model_error"}
    settings = make_run(tmp_path, lambda n: error(kinds[n]) if n in kinds else good(n))

    (found,) = as_json(runs, tmp_path)

    assert found["state_dir"] == str(settings.state_dir)
    assert (found["state"], found["done"], found["total"]) == ("complete", 10, 10)
    assert (found["percent"], found["failed"]) == (100.0, 3)
    assert found["errors"] == {"model_error": 2, "task_exception": 1}
    assert found["ended_at"] >= found["started_at"]
    assert found["resume"] is None
    text = runs(settings.state_dir)
    assert "10 of 10 lines (100.0%)" in text
    assert "3: model_error 2, task_exception 1" in text
    assert f"dispatcher runs {settings.state_dir} --failed-to FILE" in text
    assert text.endswith("1 run: 1 complete\n")


def test_a_stopped_run_is_listed_with_how_far_it_got_and_how_to_go_on(
    tmp_path: Path, runs: Runs
) -> None:
    directory = tmp_path / "my runs"
    settings = make_run(directory, lambda n: None if n >= 80 else fails_at(4)(n), lines=1000)
    change_run_file(settings, command={"program": "dispatcher run", "directory": "/"})

    (found,) = as_json(runs, tmp_path)

    assert (found["state"], found["done"], found["failed"]) == ("stopped", 80, 1)
    assert found["errors"] == {"model_error": 1}
    assert not found["total_is_exact"]
    assert 900 < found["total"] < 1100
    assert found["resume"] == f"dispatcher run --resume '{settings.state_dir}'"
    assert found["last_active_at"] >= found["started_at"]
    text = runs(settings.outfile)  # the output stands for its state directory
    assert "80 of about" in text
    assert found["resume"] in text


def test_a_run_that_was_stopped_at_its_start_is_not_said_to_be_done(
    tmp_path: Path, runs: Runs
) -> None:
    settings = settings_of(tmp_path)
    write_input(settings.infile, 3)

    async def play(_: DispatchService) -> None:
        pass

    scenario(settings, play)
    (found,) = as_json(runs, tmp_path)
    assert (found["done"], found["total"], found["percent"]) == (0, None, None)
    text = runs(tmp_path)
    assert "0 lines; how many there are is not known yet" in text
    assert "%" not in text


def test_a_run_of_an_earlier_version_is_resumed_by_the_same_command(
    tmp_path: Path, runs: Runs
) -> None:
    settings = make_run(tmp_path, lambda n: good(n) if n < 3 else None)
    change_run_file(settings, command=None)
    (found,) = as_json(runs, tmp_path)
    assert found["resume"] is None
    assert "give the same command again" in runs(tmp_path)


def test_nothing_of_a_stopped_run_changes_when_it_is_looked_at(
    tmp_path: Path, runs: Runs, refused: Refused
) -> None:
    settings = make_run(tmp_path / "run", lambda n: None if n > 6 else fails_at(2)(n))
    (segment,) = (settings.state_dir / "journal").glob("*.journal")
    with segment.open("ab") as journal:  # torn, as by a machine that went down
        journal.write(b"@000000000099 0000001000 00000000 00000000\n[half a")
    before = listing(tmp_path / "run")

    (found,) = as_json(runs, tmp_path)
    for item in range(10):
        runs(settings.state_dir, "--item", str(item))
    refused(settings.state_dir, "--item", "10")
    runs(settings.state_dir, "--scan")
    runs(settings.state_dir, "--failed-to", tmp_path / "again.jsonl")

    assert (found["state"], found["done"], found["note"]) == ("stopped", 7, None)
    assert listing(tmp_path / "run") == before


def test_what_may_only_be_read_is_opened_for_reading(tmp_path: Path) -> None:
    files = ReadOnlyFiles()
    (tmp_path / "there").touch(mode=0o444)
    fd = files.open(tmp_path / "there", os.O_RDWR)
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    files.close(fd)
    with pytest.raises(FileNotFoundError):
        files.open(tmp_path / "new", os.O_RDWR | os.O_CREAT)
    files.write_whole(tmp_path / "new", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_segment_that_was_only_being_begun_hides_nothing(tmp_path: Path, runs: Runs) -> None:
    settings = make_run(tmp_path, lambda n: None if n > 6 else good(n))
    (settings.state_dir / "journal" / "00000002-000001.journal").write_bytes(b"@0000")
    before = listing(tmp_path)
    (found,) = as_json(runs, tmp_path)
    assert (found["state"], found["done"]) == ("stopped", 7)
    assert listing(tmp_path) == before


def test_a_damaged_journal_is_said_and_hides_no_other_run(
    tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dispatcher.runs.reading._TRY_AGAIN_S", 0.0)
    settings = make_run(tmp_path / "a", lambda n: None if n > 6 else good(n))
    make_run(tmp_path / "b")
    (segment,) = (settings.state_dir / "journal").glob("*.journal")
    data = bytearray(segment.read_bytes())
    data[60] ^= 1
    segment.write_bytes(data)
    first, second = as_json(runs, tmp_path)
    assert (first["state"], first["done"]) == ("stopped", None)
    assert "is damaged at byte 0" in first["note"]
    assert second["state"] == "complete"


def test_a_journal_that_is_gone_is_said(tmp_path: Path, runs: Runs) -> None:
    settings = make_run(tmp_path, lambda n: None if n > 6 else good(n))
    shutil.rmtree(settings.state_dir / "journal")
    (found,) = as_json(runs, tmp_path)
    assert (found["state"], found["done"]) == ("stopped", None)
    assert "its journal is gone" in found["note"]


def test_a_run_that_is_being_written_is_read_whole_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "SEGMENT_RESULTS", 40)
    settings = settings_of(tmp_path)
    write_input(settings.infile, 1200)
    seen: list[tuple[str, int]] = []
    worker = threading.Thread(target=carry_out, args=(settings, fails_at(*range(0, 1200, 10)), 8))
    worker.start()
    wait_until((settings.state_dir / "run.yaml").exists, "the run")
    run = the_run(settings.state_dir, 0)
    while worker.is_alive():
        standing = look(run)
        assert standing.note in (None, "it is being started: there is no journal yet")
        if standing.done is not None:
            assert standing.failed == sum(standing.errors.values())
            seen.append((standing.state, standing.done))
    worker.join()
    assert seen == sorted(seen, key=lambda pair: pair[1])
    assert len({done for _, done in seen}) > 5
    assert {state for state, _ in seen} <= {"running", "complete"}
    assert look(run.reread()).done == 1200


def test_a_running_server_is_asked_and_one_that_was_killed_is_stopped(
    tmp_path: Path, runs: Runs
) -> None:
    infile, outfile = write_input(tmp_path / "in.jsonl", 5), tmp_path / "out.jsonl"
    with dispatcher_server("--infile", infile, "--outfile", outfile) as server:
        with server.client("w") as client:
            client.get_work(2)
            (found,) = as_json(runs, tmp_path)
        assert (found["state"], found["done"], found["total"]) == ("running", 0, 5)
        assert f"process {server.process.pid} on" in found["owner"]
        assert "state     running, process" in runs(tmp_path)
        server.process.kill()
        (found,) = as_json(runs, tmp_path)
        assert (found["state"], found["owner"], found["done"]) == ("stopped", None, 0)


@pytest.mark.parametrize(("age_s", "state"), [(5, "running"), (60, "stopped")])
def test_the_claim_of_another_machine_counts_while_it_is_fresh(
    age_s: int, state: str, tmp_path: Path, runs: Runs
) -> None:
    settings = make_run(tmp_path, lambda n: None if n > 6 else good(n))
    (claim,) = (settings.state_dir / "owners").iterdir()
    elsewhere = Identity("far-away", "b", "n", 1, "1")
    claim.write_bytes(msgspec.json.encode(Claim(elsewhere, 7)))
    os.utime(claim, (time.time() - age_s,) * 2)
    (found,) = as_json(runs, tmp_path)
    assert (found["state"], found["done"]) == (state, 7)


def test_two_hundred_runs_are_listed_in_order(tmp_path: Path, runs: Runs) -> None:
    stopped = make_run(tmp_path / "template", lambda n: None if n > 6 else good(n))
    for number in range(200):
        shutil.copytree(stopped.state_dir, tmp_path / f"many/{number:03d}.dispatch")
    found = as_json(runs, tmp_path / "many")
    assert [Path(run["state_dir"]).name for run in found] == [
        f"{number:03d}.dispatch" for number in range(200)
    ]
    assert {run["done"] for run in found} == {7}


def test_a_directory_without_runs_says_so(tmp_path: Path, runs: Runs) -> None:
    (tmp_path / "run.yaml").write_text("jobs: [another, program]\n")
    assert runs(tmp_path).startswith(f"no runs in {tmp_path}")
    assert as_json(runs, tmp_path) == []


def test_what_is_no_directory_is_refused_by_name(tmp_path: Path, refused: Refused) -> None:
    code, said = refused(tmp_path / "nothing")
    assert (code, f"{tmp_path}/nothing does not exist" in said) == (2, True)
    (tmp_path / "file").touch()
    assert "file is not a directory" in refused(tmp_path / "file")[1]


def test_links_in_a_circle_end_and_list_each_run_once(tmp_path: Path, runs: Runs) -> None:
    make_run(tmp_path / "a")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert len(as_json(runs, tmp_path, tmp_path / "a")) == 1


def test_runs_deeper_than_asked_for_are_not_looked_for(tmp_path: Path, runs: Runs) -> None:
    (tmp_path / "1" / "2").mkdir(parents=True)
    make_run(tmp_path / "1" / "2" / "3")
    assert len(as_json(runs, tmp_path, "--depth", "4")) == 1
    assert as_json(runs, tmp_path, "--depth", "3") == []


def test_a_broken_run_file_is_listed_as_unreadable(tmp_path: Path, runs: Runs) -> None:
    settings = make_run(tmp_path)
    (settings.state_dir / "run.yaml").write_text("{{{")
    (found,) = as_json(runs, tmp_path)
    assert found["state"] == "unreadable"
    assert f"{settings.state_dir / 'run.yaml'}" in found["note"]
    assert "1 unreadable" in runs(tmp_path)


def test_errors_that_were_not_counted_are_counted_on_demand(tmp_path: Path, runs: Runs) -> None:
    settings = make_run(tmp_path, fails_at(1, 2, 6))
    summary = run_file(settings)["summary"]
    del summary["errors"]
    change_run_file(settings, summary=summary | {"tombstones": {"model_error": 1}})
    assert "3: model_error 1, 2 of other kinds (--scan counts them)" in runs(tmp_path)
    assert "3: model_error 3\n" in runs(tmp_path, "--scan")


def test_a_run_that_nobody_came_to_have_is_listed_with_how_to_begin_it(
    tmp_path: Path, runs: Runs, refused: Refused
) -> None:
    state_dir = tmp_path / "out.jsonl.dispatch"
    (state_dir / "journal").mkdir(parents=True)
    options = {"input": str(tmp_path / "in.jsonl"), "output": str(tmp_path / "out.jsonl")}
    command = {"program": "dispatcher run", "directory": "/", "options": options}
    content = {"state": "starting", "started_at": "2026-01-01T00:00:00+00:00", "command": command}
    (state_dir / "run.yaml").write_text(yaml.safe_dump(content))
    (found,) = as_json(runs, tmp_path)
    assert (found["state"], found["done"], found["run"]) == ("stopped", None, None)
    assert found["resume"] == f"dispatcher run --resume {state_dir}"
    assert found["output"] == options["output"]
    assert "it was not begun" in found["note"]
    assert "it was not begun" in runs(tmp_path)
    assert "no result yet" in runs(state_dir, "--item", "0")
    assert "cannot read" in refused(state_dir, "--failed-to", tmp_path / "again")[1]


def test_names_that_are_not_utf_8_are_found_again(tmp_path: Path, runs: Runs) -> None:
    directory = tmp_path / os.fsdecode(b"odd \xff")
    settings = make_run(directory, fails_at(2))
    runs(settings.state_dir, "--failed-to", tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_text() == '{"n": 2}\n'
    assert "odd " in runs(tmp_path)


# -------------------------------------------------------------------- one line


async def lease_one(service: DispatchService, worker: str) -> WorkItem:
    (item,) = (await service.get_work(worker, 1)).items
    return item


def test_an_open_line_tells_its_attempts_workers_and_steps(tmp_path: Path, runs: Runs) -> None:
    settings = settings_of(tmp_path)
    write_input(settings.infile, 3)

    async def play(service: DispatchService) -> None:
        first = await lease_one(service, "worker-a")
        await service.heartbeat(HeartbeatRequest("worker-a", {str(first.lease): 1}))
        step = StepItem(0, str(first.lease), first.attempt, (0, 0), "ab", '{"text": 1}')
        await service.record_steps([step])
        given_back = ReleaseItem(0, first.lease, charge=False, reason="preempted")
        await service.release([given_back])
        second = await lease_one(service, "worker-b")
        await service.submit([answer(second, "no json")])
        await lease_one(service, "worker-c")

    scenario(settings, play)

    found = as_json(runs, settings.state_dir, "--item", "0")
    assert [
        (a["attempt"], a["worker"], a["end"], a["reason"], a["steps"]) for a in found["attempts"]
    ] == [
        (1, "worker-a", "released", "preempted", 1),
        (1, "worker-b", "charged", "the result is not JSON on one line", 0),
        (2, "worker-c", None, "", 0),
    ]
    assert found["result"] is None
    text = runs(settings.state_dir, "--item", "0")
    assert "it is with worker-c" in text
    assert "attempt 1, worker-a; 1 step recorded; released: preempted" in text
    assert "attempt 2, worker-c; goes on" in text
    assert "it was not handed out yet" in runs(settings.state_dir, "--item", "2")


def test_the_history_of_a_line_goes_through_all_segments(
    tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "SEGMENT_RESULTS", 2)
    settings = settings_of(tmp_path)
    write_input(settings.infile, 40)

    async def play(service: DispatchService) -> None:
        first = await lease_one(service, "worker-a")
        for _ in range(6):
            others = (await service.get_work("worker-b", 5)).items
            await service.submit([answer(item, good(item.work_id)) for item in others])
        await service.release([ReleaseItem(0, first.lease, charge=True, reason="odd")])
        await lease_one(service, "worker-c")

    scenario(settings, play)

    assert len(list((settings.state_dir / "journal").glob("*.journal"))) > 3
    found = as_json(runs, settings.state_dir, "--item", "0")
    assert [(a["worker"], a["end"]) for a in found["attempts"]] == [
        ("worker-a", "charged"),
        ("worker-c", None),
    ]
    waiting = as_json(runs, settings.state_dir, "--item", "4")
    assert "waits for those of earlier lines" in waiting["where"]
    assert waiting["result"] == good(4)
    assert waiting["attempts"][0]["end"] == "result"


def test_a_line_of_a_complete_run_tells_what_went_wrong_before(tmp_path: Path, runs: Runs) -> None:
    settings = settings_of(tmp_path)
    write_input(settings.infile, 3)

    async def play(service: DispatchService) -> None:
        items = (await service.get_work("worker-a", 3)).items
        await service.submit([answer(items[0], "no json"), answer(items[1], good(1))])
        await service.submit([answer(items[2], "no json")])
        again = (await service.get_work("worker-b", 3)).items
        await service.submit([answer(again[0], good(0)), answer(again[1], "no json")])
        await asyncio.wait_for(service.finished.wait(), 10)

    scenario(settings, play)

    mended = as_json(runs, settings.state_dir, "--item", "0")
    assert [(a["attempt"], a["worker"], a["end"]) for a in mended["attempts"]] == [
        (1, "worker-a", "charged"),
        (2, "worker-b", "result"),
    ]
    assert mended["result"] == good(0)
    plain = as_json(runs, settings.state_dir, "--item", "1")
    assert plain["attempts"] == []
    assert "the journal, which tells of all, is deleted" in plain["missing"]
    tombstone = as_json(runs, settings.state_dir, "--item", "2")
    assert [a["worker"] for a in tombstone["attempts"]] == ["worker-a", "worker-b"]
    assert tombstone["error"] == "max_retries_exceeded"
    (settings.state_dir / "history.jsonl").unlink()
    from_output = as_json(runs, settings.state_dir, "--item", "2")
    assert from_output["source"] == "the output"
    assert [a["worker"] for a in from_output["attempts"]] == ["worker-a", "worker-b"]


def test_a_line_beyond_the_input_is_refused(tmp_path: Path, refused: Refused) -> None:
    complete = make_run(tmp_path / "a", lines=3)
    stopped = make_run(tmp_path / "b", lambda n: None, lines=300)
    for settings, lines in ((complete, 3), (stopped, 300)):
        code, said = refused(settings.state_dir, "--item", str(lines))
        assert code == 2
        assert f"has {lines} lines, numbered 0 to {lines - 1}" in said
    with stopped.infile.open("a") as file:
        file.write("a last line without an end")
    assert "has 301 lines" in refused(stopped.state_dir, "--item", "301")[1]


def test_one_run_must_be_named_for_a_line(tmp_path: Path, refused: Refused) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    assert "holds 2 runs" in refused(tmp_path, "--item", "1")[1]
    assert "holds no run" in refused(tmp_path / "a", "--item", "1", "--depth", "0")[1]
    assert "needs one run" in refused(tmp_path / "a", tmp_path / "b", "--item", "1")[1]


def followed(work_id: int, start: QueueState, events: Iterable[Event]) -> Follower:
    follower = Follower(work_id)
    follower.see(RunHeader("r", 1, {}, {"max_retries": 2}))
    follower.see(Checkpoint(start, []))
    for event in events:
        follower.see(event)
    return follower


def test_a_crash_that_was_none_is_taken_back_and_the_lease_goes_on() -> None:
    result = msgspec.Raw(b"{}")
    events: list[Event] = [
        Opened(0, 0, [5, 5]),
        Issued("a", True, False, 1, [0, 1]),
        LeaseEnded(1, 2, "crashed", VANISHED),
        Issued("b", True, False, 3, [1]),
        Absolved(1, "a"),
        Issued("c", True, False, 4, [1]),
        LeaseEnded(1, 3, "returned", "not begun"),
        Issued("b", True, False, 3, [1]),
        Finished([0, 1], [1, 4], {}, [result, result]),
    ]
    tries = followed(1, WorkQueue(QueuePolicy()).checkpoint(), events).tries
    assert [(t.worker, t.end, t.taken_back) for t in tries] == [
        ("a", "crashed", True),
        ("b", "in vain", False),
        ("c", "result", False),
    ]


def drive(queue: WorkQueue, chance: Random) -> None:
    """Let something happen to a queue."""
    worker = chance.choice(["a", "b", "c"])
    held = [(x.work_id, x.serial) for x in queue.leases.values()]
    match chance.randrange(7):
        case 0 if queue.next_work_id < 12 and chance.random() < 0.5:
            queue.open_lines(queue.next_offset, [10] * chance.randint(1, 3))
        case 0 if queue.next_work_id < 12:
            sizes = [10] * chance.randint(1, 3)
            queue.lease_fresh(worker, queue.next_offset, sizes, 0.0)
        case 1 | 2:
            queue.lease_ready(worker, chance.randint(1, 3), 0.0)
        case 3 if held:
            queue.fail(*chance.choice(held), "odd", 0.0)
        case 4 if held:
            charge, reason = chance.choice([(True, "x"), (False, "y"), (False, CRASH)])
            work_id, serial = chance.choice(held)
            queue.release(work_id, serial, charge=charge, reason=reason, keep_yields=None, now=0.0)
        case 5 if held and chance.random() < 0.3:
            queue.finish(*chance.choice(held), b"{}", error=chance.choice(["", "e"]), now=0.0)
        case 6 if queue.condemned and chance.random() < 0.3:
            for work_id in queue.condemned_ids():
                queue.tombstone(work_id, MAX_RETRIES_EXCEEDED, b"{}", 0.0)
        case _:
            pass


@pytest.mark.parametrize("seed", range(20))
def test_a_line_followed_by_itself_is_as_it_is_in_the_whole_queue(seed: int) -> None:
    chance, queue = Random(seed), WorkQueue(QueuePolicy(max_retries=2))
    for _ in range(chance.choice([0, 40])):
        drive(queue, chance)
    queue.take_events()
    start = queue.checkpoint()
    for _ in range(120):
        drive(queue, chance)
    events = queue.take_events()
    whole = {item.work_id: item for item in queue.checkpoint().items}
    for work_id in range(queue.next_work_id):
        follower = followed(work_id, start, events)
        alone = follower.queue.checkpoint().items
        expected = [msgspec.structs.replace(whole[work_id], offset=0)] if work_id in whole else []
        assert [msgspec.structs.replace(item, offset=0) for item in alone] == expected
        assert follower.is_open == (work_id in whole)
        if work_id in whole:
            live = [t for t in follower.tries if t.end is None]
            assert [t.serial for t in live] == [x.serial for x in whole[work_id].leases]
            charged = [t for t in follower.tries if t.end in ("charged", "crashed")]
            assert [(t.attempt, t.worker, t.end, t.reason) for t in charged] == [
                (x.attempt, x.worker, x.kind, x.reason) for x in whole[work_id].history
            ]


# -------------------------------------------------------------------- failed lines out


def test_failed_lines_are_written_byte_for_byte_with_where_they_belong(
    tmp_path: Path, runs: Runs
) -> None:
    settings = settings_of(tmp_path)
    lines = [
        b'\xef\xbb\xbf{"n":0}\r\n',
        b'{ "n" : 1 }  \n',
        b"\xff\xfe\n",
        b"\n",
        b'{"n":"\xc3\xa9"}',
    ]
    settings.infile.write_bytes(b"".join(lines))
    carry_out(settings, fails_at(0, 4))
    target = tmp_path / "again.jsonl"

    said = runs(settings.state_dir, "--failed-to", target)

    assert target.read_bytes() == b"".join([lines[0], lines[2], lines[3], lines[4]])
    origin = json.loads((tmp_path / "again.jsonl.origin").read_text())
    assert origin["work_ids"] == [0, 2, 3, 4]
    assert origin["run"] == run_file(settings)["run"]
    assert origin["sha256"] == hashlib.sha256(target.read_bytes()).hexdigest()
    assert "4 failed lines" in said
    assert f"dispatcher runs {settings.state_dir} --merge" in said
    assert {path.name for path in tmp_path.iterdir()} == {
        "in.jsonl",
        "out.jsonl",
        "out.jsonl.dispatch",
        "again.jsonl",
        "again.jsonl.origin",
    }


def test_only_lines_of_the_kinds_asked_for_are_written(
    tmp_path: Path, runs: Runs, refused: Refused
) -> None:
    kinds = {3: "x", 5: "y", 7: "z"}
    settings = make_run(tmp_path, lambda n: error(kinds[n]) if n in kinds else good(n))
    target = tmp_path / "again.jsonl"
    assert (
        "there are: x (1), y (1), z (1)"
        in refused(settings.state_dir, "--failed-to", target, "--kind", "w")[1]
    )
    assert not target.exists()
    runs(settings.state_dir, "--failed-to", target, "--kind", "z", "--kind", "x")
    assert target.read_text() == '{"n": 3}\n{"n": 7}\n'


def test_a_file_that_cannot_be_read_is_told_with_what_to_do(
    tmp_path: Path, refused: Refused
) -> None:
    settings = make_run(tmp_path, fails_at(1))
    settings.outfile.unlink()
    said = f"cannot read the output {settings.outfile}: No such file or directory; restore it"
    assert said in refused(settings.state_dir, "--failed-to", tmp_path / "again.jsonl")[1]
    assert "No such file or directory; restore it" in refused(settings.state_dir, "--item", "1")[1]


@pytest.mark.parametrize("error", [PermissionError, OSError])
def test_no_file_is_to_be_restored_that_is_there(error: type[OSError]) -> None:
    said = str(lines_module.unreadable("a.jsonl", error(errno.EIO, "odd")))
    assert said.startswith("cannot read a.jsonl: odd; ")
    assert "restore" not in said


@pytest.mark.parametrize("name", ["again.jsonl.gz", "again.JSONL.ZST", "again.parquet"])
def test_failed_lines_get_no_name_of_another_kind_of_file(
    name: str, tmp_path: Path, refused: Refused
) -> None:
    settings = make_run(tmp_path, fails_at(1))
    code, said = refused(settings.state_dir, "--failed-to", tmp_path / name)
    assert (code, "let the name end in .jsonl" in said) == (2, True)
    assert not list(tmp_path.glob("again*"))


def test_an_existing_file_is_never_overwritten(tmp_path: Path, refused: Refused) -> None:
    settings = make_run(tmp_path, fails_at(1))
    target = tmp_path / "again.jsonl"
    target.write_text("precious")
    code, said = refused(settings.state_dir, "--failed-to", target)
    assert (code, "exists and is not overwritten" in said) == (2, True)
    code, said = refused(settings.state_dir, "--failed-to", tmp_path / "none" / "again.jsonl")
    assert (code, "none does not exist; make it" in said) == (2, True)
    assert target.read_text() == "precious"
    assert not (tmp_path / "again.jsonl.origin").exists()


def test_a_run_without_failed_lines_says_so(tmp_path: Path, runs: Runs) -> None:
    settings = make_run(tmp_path)
    said = runs(settings.state_dir, "--failed-to", tmp_path / "again.jsonl")
    assert "has no failed lines: nothing was written" in said
    assert not (tmp_path / "again.jsonl").exists()


def test_of_a_run_that_is_not_complete_what_the_output_holds_is_written(
    tmp_path: Path, runs: Runs
) -> None:
    settings = make_run(tmp_path, lambda n: None if n == 6 else fails_at(2, 8)(n))
    with settings.outfile.open("ab") as output:
        output.write(error("half")[:-4].encode())  # a line that is just being written
    said = runs(settings.state_dir, "--failed-to", tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_text() == '{"n": 2}\n'
    assert "the run is not complete" in said


def test_an_input_or_output_that_changed_since_is_refused(tmp_path: Path, refused: Refused) -> None:
    settings = make_run(tmp_path, fails_at(2))
    target = tmp_path / "again.jsonl"
    settings.infile.write_text(settings.infile.read_text().replace("2", "3"))
    assert "its content changed" in refused(settings.state_dir, "--failed-to", target)[1]
    with settings.outfile.open("a") as output:
        output.write("x\n")
    assert "is not the one that the run" in refused(settings.state_dir, "--failed-to", target)[1]
    assert list(tmp_path.glob("*again*")) == []


def test_lines_that_came_through_a_pipe_are_kept_only_until_the_run_is_complete(
    tmp_path: Path, runs: Runs, refused: Refused
) -> None:
    def settings_with_pipe(name: str) -> RunSettings:
        pipe = tmp_path / f"{name}.pipe"
        os.mkfifo(pipe)
        text = "".join(f'{{"n": {number}}}\n' for number in range(5))
        threading.Thread(target=pipe.write_text, args=(text,)).start()
        return settings_of(tmp_path, name, pipe)

    stopped, complete = settings_with_pipe("stopped"), settings_with_pipe("complete")
    carry_out(stopped, lambda n: None if n == 3 else fails_at(1)(n))
    carry_out(complete, fails_at(1))
    runs(stopped.state_dir, "--failed-to", tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_text() == '{"n": 1}\n'
    said = refused(complete.state_dir, "--failed-to", tmp_path / "others.jsonl")[1]
    assert "is not a file" in said


# -------------------------------------------------------------------- results back in


def rerun(settings: RunSettings, answers: Answer, name: str = "again") -> RunSettings:
    """Run the failed lines of a run, numbered as in its file, and return the second run."""
    directory = settings.outfile.parent
    failed = directory / f"{name}-in.jsonl"
    assert main([str(settings.state_dir), "--failed-to", str(failed)]) == 0
    second = settings_of(directory, name, failed)
    carry_out(second, answers)
    return second


def test_failed_lines_run_again_and_merged_give_the_output_of_a_run_that_never_failed(
    tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = make_run(tmp_path / "never", lines=50)
    first = make_run(tmp_path / "failed", fails_at(0, 7, 8, 49), lines=50)
    first.outfile.chmod(0o640)
    places = [0, 7, 8, 49]
    second = rerun(first, lambda n: good(places[n]))
    capsys.readouterr()

    said = runs(first.state_dir, "--merge", second.outfile)

    assert first.outfile.read_bytes() == whole.outfile.read_bytes()
    assert "4 lines of" in said
    assert "has 0 failed lines now" in said
    content = run_file(first)
    assert content["output_bytes"] == first.outfile.stat().st_size
    assert (content["summary"]["failed"], content["summary"]["errors"]) == (0, {})
    assert "merged" not in content
    assert first.outfile.stat().st_mode & 0o777 == 0o640
    carry_out(first, good)  # the same command finds its run complete
    assert "was merged at" in runs(first.state_dir, "--merge", second.state_dir)
    assert first.outfile.read_bytes() == whole.outfile.read_bytes()


def test_a_line_that_fails_again_gets_its_new_error_with_its_own_number(
    tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make_run(tmp_path, fails_at(3, 6, 9))
    tombstone = json.dumps({"__ERROR__": {"error": "worse", "work_id": 1, "message": "é"}})
    second = rerun(first, lambda n: [good(3), tombstone, error("same")][n])
    capsys.readouterr()

    kept = runs(first.state_dir, "--merge", second.outfile, "--keep-old-errors")
    assert "1 line of" in kept
    assert "2 kept as they were" in kept
    assert run_file(first)["summary"]["errors"] == {"model_error": 2}

    said = runs(first.state_dir, "--merge", second.outfile)
    assert "2 lines of" in said
    assert "2 of them by another error" in said
    lines = [json.loads(line) for line in first.outfile.read_text().splitlines()]
    assert lines[3] == {"answer": 3}
    assert lines[6]["__ERROR__"] == {"error": "worse", "work_id": 6, "message": "é"}
    assert run_file(first)["summary"]["errors"] == {"worse": 1, "same": 1}
    assert run_file(first)["summary"]["failed"] == 2
    (found,) = [x for x in as_json(runs, tmp_path) if x["run"] == run_file(first)["run"]]
    assert found["errors"] == {"worse": 1, "same": 1}


def test_a_line_that_is_no_error_any_more_is_never_replaced(
    tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make_run(tmp_path, fails_at(3, 6))
    second = rerun(first, lambda n: good([3, 6][n]), "second")
    third = rerun(first, lambda n: '"another"', "third")
    capsys.readouterr()
    runs(first.state_dir, "--merge", second.outfile)
    before = first.outfile.read_bytes()
    assert "0 lines of" in runs(first.state_dir, "--merge", third.outfile)
    assert first.outfile.read_bytes() == before


def test_an_output_behind_a_link_is_replaced_where_it_is(
    tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make_run(tmp_path, fails_at(3))
    second = rerun(first, lambda n: good(3))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    first.outfile.rename(elsewhere / "real.jsonl")
    first.outfile.symlink_to(elsewhere / "real.jsonl")
    capsys.readouterr()
    runs(first.state_dir, "--merge", second.outfile)
    assert first.outfile.is_symlink()
    assert b"__ERROR__" not in (elsewhere / "real.jsonl").read_bytes()


def change_nothing(first: RunSettings, second: RunSettings) -> None:
    pass


def stop_the_second(first: RunSettings, second: RunSettings) -> None:
    change_run_file(second, state="running", command={"program": "dispatcher run"})


def change_the_failed_lines(first: RunSettings, second: RunSettings) -> None:
    second.infile.write_text(second.infile.read_text().replace("3", "4"))


def swap_the_failed_lines(first: RunSettings, second: RunSettings) -> None:
    lines = second.infile.read_text().splitlines(keepends=True)
    second.infile.write_text("".join(reversed(lines)))
    for name in ("again.jsonl", "again.jsonl.dispatch"):
        path = second.outfile.parent / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    carry_out(second, good)


def lose_the_origin(first: RunSettings, second: RunSettings) -> None:
    (second.infile.parent / "again-in.jsonl.origin").unlink()


def cut_the_second_output(first: RunSettings, second: RunSettings) -> None:
    second.outfile.write_text(second.outfile.read_text()[:-10])


def join_lines_of_the_second_output(first: RunSettings, second: RunSettings) -> None:
    text = second.outfile.read_text()
    second.outfile.write_text(text.replace("\n", " ", 1))


def join_lines_of_the_first_output(first: RunSettings, second: RunSettings) -> None:
    text = first.outfile.read_text()
    first.outfile.write_text(text.replace("\n", " ", 1))


def lengthen_the_first_output(first: RunSettings, second: RunSettings) -> None:
    with first.outfile.open("a") as output:
        output.write("{}\n")


def be_another_run(first: RunSettings, second: RunSettings) -> None:
    change_run_file(first, run="0123456789abcdef")


def name_lines_beyond_the_end(first: RunSettings, second: RunSettings) -> None:
    path = second.infile.parent / "again-in.jsonl.origin"
    path.write_text(path.read_text().replace("[3,6]", "[3,10]"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (stop_the_second, "is not complete.*dispatcher run --resume"),
        (change_the_failed_lines, "is not the input that"),
        (swap_the_failed_lines, "is not what --failed-to wrote"),
        (lose_the_origin, "origin is missing"),
        (cut_the_second_output, "is not the one that the run in"),
        (join_lines_of_the_second_output, "does not have the 2 lines"),
        (join_lines_of_the_first_output, "has 9 lines, but its run had 10"),
        (lengthen_the_first_output, "is not the one that the run in"),
        (be_another_run, "not of run 0123456789abcdef"),
        (name_lines_beyond_the_end, "lines that the run does not have"),
    ],
)
def test_what_does_not_fit_together_is_not_merged(
    change: Callable[[RunSettings, RunSettings], None],
    says: str,
    tmp_path: Path,
    refused: Refused,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = make_run(tmp_path, fails_at(3, 6))
    second = rerun(first, lambda n: good([3, 6][n]))
    change(first, second)
    capsys.readouterr()
    before = first.outfile.read_bytes(), (first.state_dir / "run.yaml").read_bytes()

    _, said = refused(first.state_dir, "--merge", second.outfile)

    assert re.search(says, said), said
    assert (first.outfile.read_bytes(), (first.state_dir / "run.yaml").read_bytes()) == before
    assert list(tmp_path.glob(".*")) == []


def test_outputs_that_are_not_there_or_another_runs_are_refused(
    tmp_path: Path, refused: Refused
) -> None:
    first = make_run(tmp_path / "a", fails_at(3))
    assert "is not there" in refused(first.state_dir, "--merge", tmp_path / "no.jsonl")[1]
    (tmp_path / "lone.jsonl").touch()
    lone = refused(first.state_dir, "--merge", tmp_path / "lone.jsonl")[1]
    assert "no state directory of its run is beside it" in lone
    other = make_run(tmp_path / "b")
    other.outfile.rename(tmp_path / "moved.jsonl")
    other.outfile.touch()
    (tmp_path / "moved.jsonl.dispatch").symlink_to(other.state_dir)
    assert "not this" in refused(first.state_dir, "--merge", tmp_path / "moved.jsonl")[1]


def test_nothing_is_merged_into_a_copy_of_a_run(
    tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make_run(tmp_path, fails_at(3))
    second = rerun(first, lambda n: good(3))
    capsys.readouterr()
    shutil.copytree(first.state_dir, tmp_path / "copy")
    assert "is a copy of" in refused(tmp_path / "copy", "--merge", second.outfile)[1]


def test_nothing_is_merged_into_a_run_that_a_server_has(
    tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make_run(tmp_path, fails_at(3))
    second = rerun(first, lambda n: good(3))
    capsys.readouterr()
    flags = ("--infile", str(first.infile), "--outfile", str(first.outfile), "--port", "0")
    with running(sys.executable, "-m", "dispatcher.server", *flags) as server:
        wait_until(lambda: "the run is complete" in server.output, "the server")
        _, said = refused(first.state_dir, "--merge", second.outfile)
    assert f"process {server.pid}" in said
    assert "works on the run" in said


class CountingFiles(Files):
    """Files that count the operations that change something, and end or fail at one of them."""

    def __init__(self, at: int = -1, number: int = 0) -> None:
        self.log: list[str] = []
        self._at = at
        self._errno = number

    def _step(self, name: str) -> None:
        self.log.append(name)
        if len(self.log) - 1 == self._at:
            if not self._errno:
                os._exit(9)
            raise OSError(self._errno, os.strerror(self._errno))

    def open(self, path: Path, flags: int, mode: int = 0o644) -> int:
        if flags & os.O_CREAT:
            self._step(f"create {path.name}")
        return super().open(path, flags, mode)

    def write_at(self, fd: int, data: bytes | bytearray, offset: int) -> None:
        half = len(data) // 2
        super().write_at(fd, data[:half], offset)
        self._step("write")
        super().write_at(fd, data[half:], offset + half)

    def sync(self, fd: int) -> None:
        self._step("sync")
        super().sync(fd)

    def sync_dir(self, path: Path) -> None:
        self._step("sync_dir")
        super().sync_dir(path)

    def rename(self, source: Path, target: Path) -> None:
        self._step(f"rename {target.name}")
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._step(f"unlink {path.name}")
        super().unlink(path)


class Case:
    """A run with failed lines and the run that answered them, to be merged again and again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "case"
        self.first = make_run(self.directory, fails_at(3, 6))
        self.second = rerun(self.first, lambda n: good([3, 6][n]))
        self.old = self.first.outfile.read_bytes()
        self.new = "".join(good(n) + "\n" for n in range(10)).encode()
        self._saved = directory / "saved"
        shutil.copytree(self.directory, self._saved)

    def reset(self) -> None:
        shutil.rmtree(self.directory)
        shutil.copytree(self._saved, self.directory)

    @property
    def run(self) -> FoundRun:
        return the_run(self.first.state_dir, 0)

    def merge(self, files: Files) -> None:
        merge(self.run, self.second.outfile, failed=None, keep_old_errors=False, files=files)

    def check_whole(self) -> None:
        assert self.first.outfile.read_bytes() in (self.old, self.new)
        size = self.first.outfile.stat().st_size
        assert size in self.run.output_sizes

    def check_merged(self) -> None:
        assert self.first.outfile.read_bytes() == self.new
        content = run_file(self.first)
        assert content["output_bytes"] == len(self.new)
        assert (content["summary"]["failed"], content["summary"]["done"]) == (0, 10)
        assert len(content["merges"]) == 1
        assert "merged" not in content
        assert [path.name for path in self.directory.glob(".*")] == []


@pytest.fixture
def case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Case:
    built = Case(tmp_path)
    capsys.readouterr()
    return built


def operations(case: Case) -> tuple[list[str], range]:
    """Return what a merge does, and which of it is its own; the rest is the claim on the run."""
    files = CountingFiles()
    case.merge(files)
    case.check_merged()
    case.reset()
    last = len(files.log) - files.log[::-1].index("rename run.yaml")
    return files.log, range(files.log.index("create .out.jsonl.merging"), last + 2)


def crash_at(case: Case, place: int) -> None:
    """Merge in a process that ends before one operation, without a chance to tidy up."""
    child = os.fork()
    if child == 0:
        try:
            case.merge(CountingFiles(place))
        finally:
            os._exit(8)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9


@pytest.mark.slow
def test_a_merge_that_died_anywhere_is_finished_by_the_same_command(case: Case, runs: Runs) -> None:
    names, own = operations(case)
    assert [name for name in names if name.startswith("rename")] == [
        "rename run.yaml",
        "rename out.jsonl",
        "rename run.yaml",
    ]
    for place in own:
        crash_at(case, place)
        case.check_whole()
        (said,) = as_json(runs, case.first.state_dir)
        assert said["state"] == "complete"
        case.merge(Files())
        case.check_merged()
        case.merge(Files())
        case.check_merged()
        case.reset()


def test_a_merge_for_which_there_is_no_room_changes_nothing(case: Case) -> None:
    names, own = operations(case)
    renamed = names.index("rename out.jsonl")
    for place in own:
        with contextlib.suppress(DispatcherError):
            case.merge(CountingFiles(place, errno.ENOSPC))
        case.check_whole()
        if place <= renamed:
            assert case.first.outfile.read_bytes() == case.old
            assert [path.name for path in case.directory.glob(".*")] == []
        case.merge(Files())
        case.check_merged()
        case.reset()


def test_a_full_disk_is_said_in_one_sentence_and_nothing_is_left(
    case: Case, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    class FullFiles(Files):
        def write_at(self, fd: int, data: bytes | bytearray, offset: int) -> None:
            if os.readlink(f"/proc/self/fd/{fd}").endswith(".merging"):
                super().write_at(fd, data[: len(data) // 2], offset)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().write_at(fd, data, offset)

    before = listing(case.directory)
    with pytest.raises(StorageError, match=r"No space left on device; .*out.jsonl is unchanged"):
        case.merge(FullFiles())
    after = listing(case.directory)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    # Who merges has the run meanwhile, as a server has.
    assert {name for name in changed if "owners" not in name} <= {".", "out.jsonl.dispatch"}


def test_a_merge_that_was_interrupted_is_told_in_the_list(case: Case, runs: Runs) -> None:
    place = operations(case)[0].index("rename out.jsonl") + 1
    crash_at(case, place)
    assert case.first.outfile.read_bytes() == case.new
    assert "a merge into the output was interrupted" in runs(case.first.state_dir)
    said = runs(case.first.state_dir, "--merge", case.second.outfile)
    assert "that was interrupted is finished; " in said
    case.check_merged()


def test_an_output_that_is_neither_the_old_nor_the_new_one_settles_nothing(
    case: Case, refused: Refused, runs: Runs
) -> None:
    crash_at(case, operations(case)[0].index("rename out.jsonl") + 1)
    case.first.outfile.rename(case.directory / "kept")
    for restore in (lambda: None, lambda: case.first.outfile.write_text("x\n")):
        restore()
        refused(case.first.state_dir, "--merge", case.second.outfile)
        assert "merged" in run_file(case.first)
    (case.directory / "kept").rename(case.first.outfile)
    runs(case.first.state_dir, "--merge", case.second.outfile)
    case.check_merged()


def test_a_run_that_is_not_complete_is_not_even_claimed_for_a_merge(
    tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make_run(tmp_path, lambda n: None if n == 8 else fails_at(3)(n))
    second = rerun(first, lambda n: good(3))
    capsys.readouterr()
    before = listing(tmp_path)
    assert "is not complete" in refused(first.state_dir, "--merge", second.outfile)[1]
    assert listing(tmp_path) == before


def test_a_merge_keeps_its_claim_on_the_run_while_it_writes(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_module, "_BUFFER_BYTES", 1)
    monkeypatch.setattr(merge_module, "_SYNC_BYTES", 1)
    monkeypatch.setattr(merge_module, "REFRESH_S", 0.0)
    files = CountingFiles()
    case.merge(files)
    case.check_merged()
    assert files.log.count("sync") > 20


def test_lines_of_many_megabytes_are_copied_and_merged(tmp_path: Path, runs: Runs) -> None:
    settings = settings_of(tmp_path)
    long = json.dumps({"text": "x" * (3 << 20)})
    settings.infile.write_text(f"{long}\n{long}\n{{}}\n{{}}\n")
    carry_out(settings, lambda n: [error("e"), error("e"), long, error("e")][n])
    again = json.dumps({"__ERROR__": {"error": "e", "work_id": 2, "text": "y" * (3 << 20)}})
    second = rerun(settings, lambda n: [long, long, again][n])
    assert second.infile.read_text() == f"{long}\n{long}\n{{}}\n"
    runs_output = main([str(settings.state_dir), "--merge", str(second.outfile)])
    assert runs_output == 0
    there = settings.outfile.read_text().splitlines()
    assert there[:3] == [long] * 3
    assert json.loads(there[3])["__ERROR__"]["work_id"] == 3


# -------------------------------------------------------------------- the command


def test_options_without_what_they_belong_to_are_refused(tmp_path: Path, refused: Refused) -> None:
    for words in (
        ("--kind", "x"),
        ("--failed", "x"),
        ("--keep-old-errors",),
        ("--item", "1", "--merge", "x"),
        ("--item", "-1"),
        ("--scan", "--item", "1"),
        ("--json", "--merge", "x"),
    ):
        assert refused(tmp_path, *words)[0] == 2


@pytest.mark.slow
def test_a_run_of_real_processes_is_mended_by_its_failed_lines(tmp_path: Path) -> None:
    infile, outfile = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"messages": [{"role": "user", "content": f"question {n}"}]} for n in range(30)]
    infile.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rules = tmp_path / "rules.yaml"
    rules.write_text('- {match: "question 1[0-9]$", status: 400}\n')
    run = ["-m", "dispatcher.cli", "run", "--task", "examples/chat_task.py:ChatTask"]
    run += ["--backend", "fake"]
    files: tuple[str | Path, ...] = ("--input", infile, "--output", outfile)
    code, said = run_python(*run, *files, f"--fakellm-args=--rules {rules}", deadline_s=60)
    assert code == 4, said
    state, again = f"{outfile}.dispatch", tmp_path / "again.jsonl"
    command = ["-m", "dispatcher.cli", "runs", state]
    assert run_python(*command, "--failed-to", again)[0] == 0
    assert len(again.read_text().splitlines()) == 10
    answers = tmp_path / "answers.jsonl"
    files = ("--input", again, "--output", answers)
    assert run_python(*run, *files, deadline_s=60)[0] == 0
    code, said = run_python(*command, "--merge", answers)
    assert (code, "10 lines of" in said) == (0, True)
    merged = [json.loads(line) for line in outfile.read_text().splitlines()]
    assert [line["messages"] for line in merged] == [line["messages"] for line in lines]
    files = ("--input", infile, "--output", outfile)
    code, said = run_python(*run, *files, deadline_s=60)
    assert (code, "complete: 30 lines, 0 with errors" in said) == (0, True)
