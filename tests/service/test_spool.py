"""What workers spooled while no server answered them: taken in once, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dispatcher import spool_intake
from dispatcher.config import RunSettings
from dispatcher.core.work_queue import QueuePolicy
from dispatcher.errors import DispatcherError
from dispatcher.models import Outcome, WorkItem
from dispatcher.server_file import ServerFile, write_server_file
from dispatcher.service import DispatchService
from dispatcher.storage import spool as spool_module
from dispatcher.storage.files import Files
from dispatcher.storage.ownership import CONFIRM_WITHIN_S
from dispatcher.storage.spool import SPOOL_DIR, SpoolWriter
from tests.service.support import (
    answer,
    completed,
    drop,
    expected,
    finish_everything,
    give_back,
    give_input,
    line,
    output,
    run,
    serving,
    take,
    until,
)
from tests.storage.broken_files import BROKEN, FULL, BrokenFiles, owned_by_the_dead


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_intake, "SPOOL_LOOK_S", 0.02)


def leave(
    settings: RunSettings, items: Iterable[WorkItem], worker: str = "w", **fields: Any
) -> Path:
    """Spool results as a worker does, and return the file."""
    items = list(items)
    server_file = settings.state_dir / "server.json"
    run_id = items[0].run
    assert run_id is not None
    write_server_file(server_file, ServerFile("http://127.0.0.1:1", None, run_id, 1, 1, "running"))
    writer = SpoolWriter(server_file, worker)
    assert writer.write([spooled(item, **fields) for item in items]) == len(items)
    [path] = writer.paths
    return path


def spooled(item: WorkItem, result: str | None = None) -> WorkItem:
    text = line(item.work_id) if result is None else result
    return WorkItem(item.work_id, "", text, run=item.run, lease=item.lease)


async def when(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def gone(path: Path) -> None:
    """Return when the server has taken the file."""
    await when(lambda: not path.exists())


async def some_looks(service: DispatchService, count: int = 3) -> None:
    """Return when the spool was looked at a few more times."""
    names, looks = service._intake.spool.names, 0

    def counted() -> list[str]:
        nonlocal looks
        looks += 1
        return names()

    service._intake.spool.names = counted  # type: ignore[method-assign]
    await when(lambda: looks > count)


def sentences(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# --- taking in ----------------------------------------------------------------------------------


def test_a_start_takes_the_spool_in_before_it_hands_anything_out(settings: RunSettings) -> None:
    give_input(settings, 6)

    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 4)
        paths = [leave(settings, items[1:3], "a"), leave(settings, items[3:], "b")]
        async with serving(settings) as service:
            assert not any(path.exists() for path in paths)
            assert {x.work_id for x in service.queue.leases.values()} == {0}
            assert [item.work_id for item in await take(service, 10)] == [4, 5]
            assert service.status()["spooled_results"] == 3
            assert service.status()["done"] == 3
            await service.submit([answer(items[0])])
            await service.submit([answer(WorkItem(n, "")) for n in (4, 5)])
            await completed(service)

    run(scenario())
    assert output(settings) == expected(range(6))


def test_a_running_server_takes_in_what_is_spooled_now(settings: RunSettings) -> None:
    give_input(settings, 3)

    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 3)
            await gone(leave(settings, items[:2]))
            await gone(leave(settings, items[2:], "another"))
            await completed(service)
            assert service.status()["charged"] == 0

    run(scenario())
    assert output(settings) == expected(range(3))


def test_the_first_result_of_a_line_wins_in_whichever_way_it_came(settings: RunSettings) -> None:
    give_input(settings, 3)

    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 2)
            await service.submit([answer(items[0])])
            await gone(leave(settings, items, result='"late"'))
            assert await service.submit([answer(items[1])]) == [Outcome.DUPLICATE]
            assert service.status()["spooled_results"] == 1
            await finish_everything(service)

    run(scenario())
    assert output(settings) == [json.loads(line(0)), "late", json.loads(line(2))]


def test_a_spooled_result_replaces_a_tombstone_that_is_not_in_the_output_yet(
    settings: RunSettings,
) -> None:
    settings = replace(settings, policy=QueuePolicy(max_retries=0))
    give_input(settings, 3)

    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 3)
            await service.release([give_back(items[1], charge=True)])
            assert service.status()["tombstones"] == {"max_retries_exceeded": 1}
            await gone(leave(settings, items[1:2]))
            await service.submit([answer(items[0]), answer(items[2])])
            await completed(service)

    run(scenario())
    assert output(settings) == expected(range(3))


def test_what_is_no_result_harms_no_other(settings: RunSettings) -> None:
    give_input(settings, 4)

    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 3)
            unknown = WorkItem(900, "", run=items[0].run, lease="900.1")
            server_file = settings.state_dir / "server.json"
            leave(settings, items[:1], "first")  # for server.json
            bad = [spooled(items[1], "no json"), spooled(unknown), spooled(items[2])]
            writer = SpoolWriter(server_file, "second")
            writer.write(bad)
            await gone(writer.paths[0])
            assert service.status()["done"] == 2
            assert service.status()["invalid_results"] == 1
            assert service.status()["charged"] == 1  # as for a result that is handed in
            await finish_everything(service)

    run(scenario())
    assert output(settings) == expected(range(4))


def test_a_large_spool_is_read_beside_the_loop_and_taken_in_pieces(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "READ_BYTES", 50_000)
    give_input(settings, 200)
    threads: set[int] = set()
    next_results = spool_module.SpoolFile.next_results

    def noted(self: Any) -> Any:
        threads.add(threading.get_ident())
        return next_results(self)

    monkeypatch.setattr(spool_module.SpoolFile, "next_results", noted)

    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 200)
            submit, sizes = service.submit, []

            async def noted_submit(results: Any) -> Any:
                sizes.append(len(results))
                return await submit(results)

            service._intake._submit = noted_submit
            await gone(leave(settings, items, result=f'"{"x" * 5000}"'))
            await completed(service)
            assert sum(sizes) == 200
            assert max(sizes) <= 10
            assert threading.get_ident() not in threads

    run(scenario())
    assert output(settings) == ["x" * 5000] * 200


def test_a_start_waits_for_a_slow_spool_only_so_long(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_intake, "SPOOL_AT_START_S", 0.05)
    give_input(settings, 3)
    go_on = threading.Event()
    names = spool_module.Spool.names

    def slow(self: Any) -> list[str]:
        assert go_on.wait(10)
        return names(self)

    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 3)
        path = leave(settings, items)
        monkeypatch.setattr(spool_module.Spool, "names", slow)
        async with serving(settings) as service:
            assert service.status()["done"] == 0
            go_on.set()
            await gone(path)
            await completed(service)

    run(scenario())
    assert output(settings) == expected(range(3))


# --- what is refused ----------------------------------------------------------------------------


def test_a_file_of_another_run_is_named_once_left_alone_and_holds_up_nothing(
    settings: RunSettings, caplog: pytest.LogCaptureFixture
) -> None:
    give_input(settings, 3)

    async def scenario() -> None:
        service = DispatchService(settings)
        await service.start()
        items = await take(service, 1)
        stranger = WorkItem(0, "", run="f" * 16, lease="0.1")
        path = leave(settings, [stranger], "stranger", result='"of another run"')
        await some_looks(service)
        [sentence] = sentences(caplog)
        assert str(path) in sentence
        assert "another run" in sentence
        await gone(leave(settings, items))
        await finish_everything(service)
        await service.close()
        assert path.exists()

    run(scenario())
    assert output(settings) == expected(range(3))


def test_of_a_torn_file_the_whole_results_count_and_the_rest_is_answered_again(
    settings: RunSettings, caplog: pytest.LogCaptureFixture
) -> None:
    give_input(settings, 5)

    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 4)
        path = leave(settings, items)
        content = path.read_bytes()
        path.write_bytes(content[: content.index(line(2).encode()) + 3])
        async with serving(settings) as service:
            await some_looks(service)
            [sentence] = sentences(caplog)
            assert f"{path} is damaged or cut off behind its result 2" in sentence
            assert service.status()["done"] == 2
            assert path.exists()
            await service.submit([answer(item) for item in items[2:]])
            await finish_everything(service)

    run(scenario())
    assert output(settings) == expected(range(5))


def put_pipe(path: Path) -> None:
    os.mkfifo(path, 0o600)


def put_link(path: Path) -> None:
    path.symlink_to("/dev/zero")


def put_huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)
    path.chmod(0o600)


def put_loose(path: Path) -> None:
    path.write_bytes(b"anything")
    path.chmod(0o666)


@pytest.mark.parametrize("put", [put_pipe, put_link, put_huge, put_loose, Path.mkdir])
def test_whatever_lies_in_the_spool_the_run_goes_on(
    settings: RunSettings, caplog: pytest.LogCaptureFixture, put: Callable[[Path], None]
) -> None:
    give_input(settings, 3)

    async def scenario() -> None:
        service = DispatchService(settings)
        await service.start()
        items = await take(service, 2)
        put(settings.state_dir / SPOOL_DIR / "a.results")
        await gone(leave(settings, items, "b"))
        await some_looks(service)
        assert [text for text in sentences(caplog) if "a.results" in text] == sentences(caplog)
        assert len(sentences(caplog)) == 1
        await finish_everything(service)
        await service.close()

    run(scenario())
    assert output(settings) == expected(range(3))


def test_a_spool_that_cannot_be_listed_is_said_once_and_holds_up_nothing(
    settings: RunSettings, caplog: pytest.LogCaptureFixture
) -> None:
    give_input(settings, 3)

    async def scenario() -> None:
        async with serving(settings) as service:
            (settings.state_dir / SPOOL_DIR).rmdir()
            (settings.state_dir / SPOOL_DIR).write_text("not a directory")
            await some_looks(service)
            assert len(sentences(caplog)) == 1
            assert "cannot list" in sentences(caplog)[0]
            await finish_everything(service)

    run(scenario())
    assert output(settings) == expected(range(3))


# --- durable before deleted, and by the owner alone -----------------------------------------------


def test_a_file_is_deleted_when_the_journal_has_its_results_and_not_before(
    settings: RunSettings,
) -> None:
    give_input(settings, 3)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(settings, files) as service:
            items = await take(service, 2)
            files.only = "journal"
            files.hold_sync.clear()
            path = leave(settings, items)
            await until(files.sync_waits)
            await asyncio.sleep(0.05)
            assert path.exists()
            files.hold_sync.set()
            await gone(path)
        async with serving(settings) as service:
            assert service.status()["done"] == 2

    run(scenario())


def test_on_a_full_disk_the_spool_waits(settings: RunSettings) -> None:
    give_input(settings, 3)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(settings, files) as service:
            items = await take(service, 2)
            files.fail_write, files.only = FULL, "journal"
            path = leave(settings, items)
            await some_looks(service)
            # Not at once: what was taken counts until the journal's write has failed.
            await when(lambda: service.status()["done"] == 0)
            assert path.exists()
            files.heal()
            await gone(path)
            assert service.status()["done"] == 2
            assert service.status()["spooled_results"] == 2
            await finish_everything(service)

    run(scenario())
    assert output(settings) == expected(range(3))


@pytest.mark.parametrize("failing", ["fail_read", "fail_reopen"])
def test_a_file_that_cannot_be_read_now_is_said_once_and_taken_in_later(
    settings: RunSettings, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    """A network file system may lose sight of a file for a moment."""
    give_input(settings, 3)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(settings, files) as service:
            items = await take(service, 2)
            setattr(files, failing, BROKEN)
            files.only = "results"
            path = leave(settings, items)
            await some_looks(service)
            assert path.exists()
            [sentence] = sentences(caplog)
            assert f"{path}: Input/output error; what is in it waits" in sentence
            files.heal()
            await gone(path)
            assert service.status()["spooled_results"] == 2
            await finish_everything(service)

    run(scenario())
    assert output(settings) == expected(range(3))


class Standstill:
    """A clock that a test moves."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_who_may_have_lost_the_run_deletes_nothing(settings: RunSettings) -> None:
    settings = replace(settings, checkpoint_every_s=1000.0)
    give_input(settings, 3)
    clock = Standstill()
    ownership = owned_by_the_dead(settings.state_dir, clock=clock)

    async def scenario() -> None:
        async with serving(settings, ownership=ownership) as service:
            items = await take(service, 2)
            await service.submit([answer(item) for item in items])
            clock.now_s += CONFIRM_WITHIN_S + 1
            path = leave(settings, items)  # nothing new in it: there is nothing to be written
            await some_looks(service)
            assert path.exists()
            await asyncio.to_thread(ownership.confirm)
            await gone(path)

    run(scenario())


def test_with_the_journal_goes_the_spool_and_what_came_too_late(settings: RunSettings) -> None:
    give_input(settings, 3)

    async def scenario() -> None:
        service = DispatchService(settings)
        await service.start()
        items = await take(service, 3)
        await service.submit([answer(item) for item in items])
        await completed(service)
        await gone(leave(settings, items[:1], "while it lingers"))
        service._intake.spool.names = list  # type: ignore[assignment] # it does not look any more
        leave(settings, items[:1], "late")
        await service.close()
        assert not (settings.state_dir / SPOOL_DIR).exists()

        (settings.state_dir / SPOOL_DIR).mkdir()  # as if it had died before
        leave(settings, items[:1], "still later")
        again = DispatchService(settings)
        await again.start()
        await again.close()
        assert not (settings.state_dir / SPOOL_DIR).exists()

    run(scenario())
    assert output(settings) == expected(range(3))


# --- killed at any operation --------------------------------------------------------------------


class DyingFiles(Files):
    """Real files of a process that dies at its n-th operation after it looked at the spool.

    From there on nothing is done. A write at which it dies is half done.
    """

    def __init__(self, lasts: int) -> None:
        self._left = lasts
        self._counts = False
        self.is_dead = False
        self.done: list[str] = []

    def names(self, path: Path) -> list[str]:
        self._counts = self._counts or path.name == SPOOL_DIR
        return super().names(path)

    def _step(self, name: str) -> None:
        if not self._counts:
            return
        if self.is_dead or self._left == 0:
            self.is_dead = True
            raise OSError(5, "the process is dead")
        self._left -= 1
        self.done.append(name)

    def open(self, path: Path, flags: int, mode: int = 0o644) -> int:
        if flags & os.O_CREAT:
            self._step(f"create {path.name}")
        return super().open(path, flags, mode)

    def write_at(self, fd: int, data: bytes | bytearray, offset: int) -> None:
        was_alive = not self.is_dead
        try:
            self._step("write")
        except OSError:
            if was_alive:
                super().write_at(fd, data[: len(data) // 2], offset)
            raise
        super().write_at(fd, data, offset)

    def truncate(self, fd: int, length: int) -> None:
        self._step("truncate")
        super().truncate(fd, length)

    def sync(self, fd: int) -> None:
        self._step("sync")
        super().sync(fd)

    def sync_dir(self, path: Path) -> None:
        self._step("sync_dir")
        super().sync_dir(path)

    def make_dir(self, path: Path) -> None:
        self._step("make_dir")
        super().make_dir(path)

    def rename(self, source: Path, target: Path) -> None:
        self._step(f"rename to {target.name}")
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        if path.exists():
            self._step(f"unlink {path.name}")
        super().unlink(path)


async def take_in_until_dead(settings: RunSettings, files: DyingFiles, paths: list[Path]) -> None:
    """Be a server that takes the spool in, until it is killed or through."""
    ownership = owned_by_the_dead(settings.state_dir, files)
    service = DispatchService(settings, files=files, ownership=ownership)
    try:
        await service.start()
        await when(lambda: files.is_dead or not any(path.exists() for path in paths))
        if service.queue.is_complete:
            await when(lambda: files.is_dead or service.finished.is_set())
            if not files.is_dead:
                await service.close()
    except DispatcherError:
        assert files.is_dead
    finally:
        await drop(service)


@pytest.mark.parametrize("lines", [4, 7], ids=["and completes", "and goes on"])
def test_a_server_killed_at_any_operation_while_it_takes_the_spool_in_loses_and_repeats_nothing(
    settings: RunSettings, tmp_path: Path, lines: int
) -> None:
    give_input(settings, lines)
    copy = tmp_path / "as it was killed"
    results = [f'{{"spooled": {n}}}' for n in range(4)]

    async def prepare() -> list[Path]:
        async with serving(settings) as service:
            items = await take(service, 4)
        return [leave(settings, items[n : n + 1], f"w{n}", result=results[n]) for n in (3, 1, 2, 0)]

    async def go_on() -> None:
        service = DispatchService(settings)
        await service.start()
        assert service.queue.counters.done == 4
        handed_out = await take(service, 10)
        assert [item.work_id for item in handed_out] == list(range(4, lines))
        await service.submit([answer(item) for item in handed_out])
        await completed(service)
        assert service.queue.counters.done == lines
        await service.close()

    paths: list[Path] = asyncio.run(prepare())
    shutil.copytree(settings.state_dir, copy)
    kills, operations = 0, []
    while True:
        shutil.rmtree(settings.state_dir)
        shutil.copytree(copy, settings.state_dir)
        settings.outfile.write_bytes(b"")
        files = DyingFiles(kills)
        run(take_in_until_dead(settings, files, paths))
        run(go_on())
        wanted = [json.loads(text) for text in results] + expected(range(4, lines))
        assert output(settings) == wanted, files.done
        assert not (settings.state_dir / SPOOL_DIR).exists()
        if not files.is_dead:
            operations = files.done
            break
        kills += 1
    assert kills > 10
    assert [name for name in operations if name.startswith("unlink w")]
