"""What a worker keeps in the spool while nobody takes its results, and when it takes it back."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dispatcher.errors import AccessDeniedError, ServerLostError
from dispatcher.models import WorkerStats, WorkItem
from dispatcher.server_file import ServerFile, write_server_file
from dispatcher.storage.files import Files
from dispatcher.storage.spool import SPOOL_DIR, Spool, SpoolWriter
from dispatcher.taskmanager.tasksource import leased, spooling
from dispatcher.taskmanager.tasksource.dispatcher import DispatcherTaskSource
from dispatcher.taskmanager.tasksource.leased import LeasedSource
from dispatcher.taskmanager.tasksource.spooling import Spooler
from tests.storage.broken_files import FULL, BrokenFiles
from tests.taskmanager.doubles import (
    StubBackend,
    StubLink,
    TaskGenerator,
    ask,
    managed,
    run,
    task_of,
    until,
)

RUN = "0123456789abcdef"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let seconds be hundredths."""
    monkeypatch.setattr(leased, "_FIRST_DELAY_S", 0.005)
    monkeypatch.setattr(leased, "_LONGEST_DELAY_S", 0.02)
    monkeypatch.setattr(spooling, "_LOOK_S", 0.005)
    monkeypatch.setattr(spooling, "_AFTER_S", 0.03)
    monkeypatch.setattr(spooling, "_AGAIN_S", 0.05)
    monkeypatch.setattr(spooling, "_PAUSE_FACTOR", 1.0)


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "state"
    (directory / SPOOL_DIR).mkdir(parents=True)
    content = ServerFile("http://127.0.0.1:1", None, RUN, 1, 1, "running")
    write_server_file(directory / "server.json", content)
    return directory


def lines(count: int) -> list[WorkItem]:
    return [
        WorkItem(number, f'{{"key": "i{number}"}}', lease=f"{number}.1", run=RUN)
        for number in range(count)
    ]


def question(self: Any) -> TaskGenerator:
    response = yield ask(self.data["key"])
    return {"key": self.data["key"], "text": response.get_text()}


def source_of(
    link: StubLink,
    state_dir: Path | None,
    *,
    files: Files | None = None,
    server_timeout_s: float = 9.0,
    batch_size: int = 4,
) -> LeasedSource:
    spool = SpoolWriter(state_dir / "server.json", "w", files) if state_dir is not None else None
    return LeasedSource(
        link,
        task_of(question),
        worker="w",
        batch_size=batch_size,
        server_timeout_s=server_timeout_s,
        backend_up=lambda: True,
        stats=WorkerStats,
        spool=spool,
    )


def spooled(state_dir: Path) -> list[int]:
    """Return the lines that a server would find in the spool."""
    spool = Spool(state_dir, Files())
    found: list[int] = []
    for name in spool.names():
        file = spool.open(name, RUN)
        if file is None:
            continue
        while results := file.next_results():
            found += [result.work_id for result in results]
        file.close()
    return found


def sentences(caplog: pytest.LogCaptureFixture, word: str) -> list[str]:
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    return [text for text in said if word in text]


class Working:
    """A worker with two items at a time, whose server goes away after five results."""

    def __init__(self, link: StubLink, source: LeasedSource) -> None:
        self.link = link
        self.backend = StubBackend(delay_s=0.002)
        self.task = asyncio.ensure_future(managed(source, self.backend, workers=2).run())

    async def until_away(self) -> None:
        await until(lambda: len(self.link.submitted) >= 5, "the first results")
        self.link.up = False

    async def end(self) -> BaseException | None:
        await asyncio.wait([self.task], timeout=8)
        assert self.task.done()
        return None if self.task.cancelled() else self.task.exception()

    @property
    def acknowledged(self) -> set[int]:
        return {item.work_id for item in self.link.submitted}

    @property
    def finished(self) -> set[int]:
        """The lines that the model answered: of a task of one request, all that end."""
        return {int(text[1:]) for text in self.backend.log}


# --- while the server is away -------------------------------------------------------------------


def test_what_is_not_taken_for_a_while_is_spooled_and_handed_in_once_when_the_server_is_back(
    state_dir: Path,
) -> None:
    async def scenario() -> None:
        link = StubLink(*lines(60))
        working = Working(link, source_of(link, state_dir, batch_size=30))
        await working.until_away()
        await until(lambda: len(spooled(state_dir)) >= 20, "results in the spool")
        assert not set(spooled(state_dir)) & working.acknowledged
        assert len(Spool(state_dir, Files()).names()) == 1

        link.up = True
        await until(lambda: not Spool(state_dir, Files()).names(), "the file is taken back")
        assert await working.end() is None

        assert Counter(item.work_id for item in link.submitted) == Counter(range(60))
        assert not list((state_dir / SPOOL_DIR).iterdir())

    run(scenario())


def test_a_second_absence_with_fewer_results_than_the_first_has_them_spooled_too(
    state_dir: Path,
) -> None:
    async def scenario() -> None:
        results = lines(7)
        for item in results:
            item.set_result('"done"')
        queue = deque(results[:5])
        spooler = Spooler(SpoolWriter(state_dir / "server.json", "w"), queue)
        await spooler.save_now()
        assert spooled(state_dir) == [0, 1, 2, 3, 4]

        queue.clear()
        spooler.note_acknowledged(5)
        queue.extend(results[5:])
        await spooler.save_now()
        assert spooled(state_dir) == [5, 6]

    run(scenario())


def test_a_server_that_acknowledges_nothing_has_results_spooled_too(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It need not refuse calls: one that hangs looks the same to who waits for it."""
    monkeypatch.setattr(leased, "_GIVE_BACK_S", 0.05)

    async def scenario() -> None:
        link = StubLink(*lines(4))

        async def never(*_: Any, **__: Any) -> Any:
            await asyncio.Event().wait()

        link.submit_results = never  # type: ignore[method-assign]
        working = Working(link, source_of(link, state_dir))
        await until(lambda: sorted(spooled(state_dir)) == [0, 1, 2, 3], "results in the spool")
        working.task.cancel()
        await working.end()

    run(scenario())


def test_while_the_server_takes_results_nothing_is_spooled(state_dir: Path) -> None:
    async def scenario() -> None:
        writes = 0
        write = SpoolWriter.write

        def noted(self: SpoolWriter, items: Any) -> int:
            nonlocal writes
            writes += 1
            return write(self, items)

        link = StubLink(*lines(200))
        source = source_of(link, state_dir)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SpoolWriter, "write", noted)
            patch.setattr(spooling, "_AFTER_S", 2.0)
            await managed(source, StubBackend(delay_s=0.002), workers=4).run()
        assert writes == 0

    run(scenario())


def test_a_worker_that_was_given_no_file_keeps_everything_in_memory(state_dir: Path) -> None:
    async def scenario() -> None:
        link = StubLink(*lines(20))
        working = Working(link, source_of(link, None))
        await working.until_away()
        await asyncio.sleep(0.1)
        link.up = True
        assert await working.end() is None
        assert not spooled(state_dir)

    run(scenario())


@pytest.mark.parametrize("by_path", [True, False])
def test_who_came_by_the_file_knows_the_spool_and_who_came_by_an_address_does_not(
    state_dir: Path, by_path: bool
) -> None:
    async def scenario() -> None:
        source = DispatcherTaskSource(
            f"@{state_dir / 'server.json'}" if by_path else "127.0.0.1:1",
            task_of(question),
            worker="w",
            batch_size=1,
            server_timeout_s=9.0,
            backend_up=lambda: True,
            stats=WorkerStats,
        )
        item = lines(1)[0]
        item.set_result('"done"')
        source._results.append(item)
        await source.give_back([], "stopped")
        assert spooled(state_dir) == ([0] if by_path else [])

    run(scenario())


# --- when the worker ends -----------------------------------------------------------------------


def test_a_lost_server_finds_every_finished_result_in_the_spool(
    state_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        link = StubLink(*lines(60))
        working = Working(link, source_of(link, state_dir, batch_size=10, server_timeout_s=0.3))
        await working.until_away()

        assert isinstance(await working.end(), ServerLostError)

        assert sorted(spooled(state_dir)) == sorted(working.finished - working.acknowledged)
        [sentence] = sentences(caplog, "finished results")
        assert f"{len(spooled(state_dir))} finished results" in sentence
        assert str(state_dir / SPOOL_DIR) in sentence

    run(scenario())


def test_a_worker_that_is_stopped_while_the_server_is_away_spools_what_it_finished(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spooling, "_AFTER_S", 1000.0)

    async def scenario() -> None:
        link = StubLink(*lines(60))
        working = Working(link, source_of(link, state_dir, batch_size=10))
        await working.until_away()
        count = len(working.backend.log)
        await until(lambda: len(working.backend.log) > count + 4, "some more results")
        assert not spooled(state_dir)
        working.task.cancel()
        await working.end()

        left = set(spooled(state_dir))
        assert len(left) >= 4
        assert not left & working.acknowledged
        assert left <= working.finished

    run(scenario())


def test_it_spools_first_when_it_knows_that_the_server_is_away(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preemption may leave a moment only."""
    monkeypatch.setattr(spooling, "_AFTER_S", 1000.0)

    async def scenario() -> None:
        link = StubLink(*lines(60))
        source = source_of(link, state_dir, batch_size=10)
        working = Working(link, source)
        await working.until_away()
        await until(lambda: source._away_since is not None, "it notices")
        await until(lambda: source._results, "a result")
        found: list[list[int]] = []

        async def look(*_: Any, **__: Any) -> Any:
            found.append(spooled(state_dir))
            await asyncio.Event().wait()

        link.submit_results = look  # type: ignore[method-assign]
        monkeypatch.setattr(leased, "_GIVE_BACK_S", 0.05)
        if source._exchange is not None:
            source._exchange.cancel()
        working.task.cancel()
        await working.end()
        assert found
        assert found[0]

    run(scenario())


def test_stopping_beside_a_server_that_answers_leaves_nothing_in_the_spool(state_dir: Path) -> None:
    async def scenario() -> None:
        link = StubLink(*lines(60))
        working = Working(link, source_of(link, state_dir, batch_size=10))
        await working.until_away()
        await until(lambda: spooled(state_dir), "results in the spool")
        link.up = True
        working.task.cancel()
        await working.end()
        assert not list((state_dir / SPOOL_DIR).iterdir())

    run(scenario())


def test_a_server_that_lets_this_worker_in_no_more_does_not_cost_its_results(
    state_dir: Path,
) -> None:
    """Another one may have got the port of ours, which is gone."""

    async def scenario() -> None:
        link = StubLink(*lines(10))

        async def refuse(*_: Any, **__: Any) -> Any:
            await asyncio.sleep(0.02)
            raise AccessDeniedError("not this token")

        link.submit_results = refuse  # type: ignore[method-assign]
        working = Working(link, source_of(link, state_dir))
        assert isinstance(await working.end(), AccessDeniedError)
        assert spooled(state_dir)

    run(scenario())


# --- a file system that fails -------------------------------------------------------------------


def fill(files: BrokenFiles, state_dir: Path) -> None:
    files.fail_write = FULL


def vanish(files: BrokenFiles, state_dir: Path) -> None:
    state_dir.rename(state_dir.with_name("gone"))


def make_read_only(files: BrokenFiles, state_dir: Path) -> None:
    files.fail_open = 30  # EROFS


@pytest.mark.parametrize("fault", [fill, vanish, make_read_only])
def test_a_state_directory_that_cannot_be_written_is_said_once_and_costs_nothing_else(
    state_dir: Path,
    caplog: pytest.LogCaptureFixture,
    fault: Callable[[BrokenFiles, Path], None],
) -> None:
    async def scenario() -> None:
        link, files = StubLink(*lines(60)), BrokenFiles()
        working = Working(link, source_of(link, state_dir, files=files, batch_size=30))
        await working.until_away()
        fault(files, state_dir)
        await until(lambda: sentences(caplog, "in memory only"), "the sentence")
        await asyncio.sleep(0.2)  # it tries again
        link.up = True
        assert await working.end() is None

        assert len(sentences(caplog, "in memory only")) == 1
        assert str(state_dir) in sentences(caplog, "in memory only")[0]
        assert working.acknowledged == set(range(60))

    run(scenario())


def test_what_is_lost_at_the_end_is_counted(
    state_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        link, files = StubLink(*lines(20)), BrokenFiles()
        source = source_of(link, state_dir, files=files, server_timeout_s=0.2)
        working = Working(link, source)
        await working.until_away()
        files.fail_write = FULL
        assert isinstance(await working.end(), ServerLostError)
        lost = len(working.finished - working.acknowledged)
        assert sentences(caplog, "are lost with this worker:")[0].startswith(f"{lost} finished")

    run(scenario())


def test_a_file_system_that_hangs_holds_up_neither_the_work_nor_the_end(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(spooling, "_LIMIT_S", 0.05)
    go_on = threading.Event()

    class Hanging(Files):
        def sync(self, fd: int) -> None:
            assert go_on.wait(20)

    async def scenario() -> None:
        link = StubLink(*lines(60))
        working = Working(link, source_of(link, state_dir, files=Hanging(), batch_size=30))
        await working.until_away()
        count = len(working.backend.log)
        await until(lambda: any(t.name == "spool" for t in threading.enumerate()), "a write")
        await until(lambda: len(working.backend.log) >= count + 20, "work goes on")
        start = time.monotonic()
        working.task.cancel()
        await working.end()
        assert time.monotonic() - start < 5
        assert sentences(caplog, "does not answer within")

    try:
        run(scenario())
    finally:
        go_on.set()
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "spool")
