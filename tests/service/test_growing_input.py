"""Lines are handed out while the copy of their input still grows."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dispatcher import service as service_module
from dispatcher.config import RunSettings
from dispatcher.core.work_queue import WorkQueue
from dispatcher.errors import (
    DispatcherError,
    RunLockedError,
    StateError,
    StorageError,
    UsageError,
)
from dispatcher.models import ResultItem, WorkStatus
from dispatcher.runs.cli import main
from dispatcher.runs.found import the_run
from dispatcher.runs.look import look
from dispatcher.server.item_view import ItemView
from dispatcher.server.overview import full_status
from dispatcher.service import DispatchService
from dispatcher.storage.files import Files
from dispatcher.storage.inputs import growing
from dispatcher.storage.inputs.growing import GrowingCopy, GrowingSource
from dispatcher.storage.ownership import OWNERS_DIR, Ownership
from dispatcher.storage.run_state import load_run_file
from tests.service.support import (
    answer,
    completed,
    expected,
    give_back,
    line,
    output,
    run,
    serving,
    settle_loop,
    take,
    until,
)
from tests.storage.broken_files import BROKEN, FULL, BrokenFiles
from tests.support.held_input import HeldInput, hold

PIECES = (b'{"n": 0}\n{"n": 1}\n{"n"', b': 2}\n{"n": 3}\n', b'{"n": 4}\n', b'{"n": 5}')
"""Six lines; two, four, five of them are whole after the pieces before the last."""


@pytest.fixture
def settings(settings: RunSettings) -> RunSettings:
    return replace(settings, infile=settings.infile.with_name("in.jsonl.gz"))


@pytest.fixture
def held(settings: RunSettings, monkeypatch: pytest.MonkeyPatch) -> HeldInput:
    held = hold(monkeypatch, settings.infile, *PIECES)
    held.let(1)
    return held


async def when(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def copied(service: DispatchService) -> int:
    assert service._source is not None
    return service._source.available_bytes


async def copied_to(service: DispatchService, pieces: int) -> None:
    """Return when the lines of so many pieces may be read."""
    end = b"".join(PIECES[:pieces]).rindex(b"\n") + 1
    await when(lambda: copied(service) >= end)


async def failed(service: DispatchService) -> DispatcherError:
    await asyncio.wait_for(service.stopped.wait(), 10)
    assert service.failure is not None
    assert "\n" not in str(service.failure)
    return service.failure


# -------------------------------------------------------------------- handing out


def test_lines_are_handed_out_as_the_copy_grows_and_the_end_is_the_true_one(
    settings: RunSettings, held: HeldInput
) -> None:
    async def scenario() -> None:
        async with serving(settings) as service:
            for pieces, lines in ((1, [0, 1]), (2, [2, 3]), (3, [4])):
                held.let(pieces)
                work = await service.get_work("w", 100, 10.0)
                assert [item.work_id for item in work.items] == lines
                assert [item.content for item in work.items] == [f'{{"n": {n}}}' for n in lines]
                await service.submit([answer(item) for item in work.items])
                work = await service.get_work("w", 100)
                assert (work.status, work.items) == (WorkStatus.RETRY, [])
                assert not service.queue.is_complete
                assert not service.finished.is_set()
            held.let_all()
            work = await service.get_work("w", 100, 10.0)
            assert [item.work_id for item in work.items] == [5]  # which has no line end
            await service.submit([answer(item) for item in work.items])
            await completed(service)
            assert (await service.get_work("w", 1)).status is WorkStatus.ALL_WORK_COMPLETE

    run(scenario())
    assert output(settings) == expected(range(6))
    run_file = load_run_file(settings.state_dir, Files())
    assert run_file is not None
    assert run_file["fingerprint"]["size"] == len(b"".join(PIECES))
    assert run_file["fingerprint"]["original"] == held.fingerprint
    assert held.reads == 1


def test_a_call_that_waits_is_answered_by_what_is_copied_and_not_by_the_clock(
    settings: RunSettings, held: HeldInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "_TICK_S", 3600.0)
    settings = replace(settings, policy=replace(settings.policy, lease_term_s=1e6))

    async def scenario() -> None:
        async with serving(settings) as service:
            await take(service, 100)
            waiting = asyncio.ensure_future(service.get_work("w", 100, 60.0))
            await settle_loop()
            held.let(2)
            assert [item.work_id for item in (await waiting).items] == [2, 3]

    run(scenario())


def test_a_client_that_cannot_wait_asks_again_soon_while_the_copy_is_behind(
    settings: RunSettings, held: HeldInput
) -> None:
    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 100)
            assert (await service.get_work("plain", 1)).retry_in == 1.0
            held.let_all()
            await when(lambda: service._source is not None and service._source.is_whole)
            items += await take(service, 100)
            assert (await service.get_work("plain", 1)).retry_in == settings.retry_s
            await service.submit([answer(item) for item in items])
            await completed(service)

    run(scenario())


def test_a_run_whose_last_line_was_answered_is_complete_when_the_copy_is_whole(
    settings: RunSettings, held: HeldInput
) -> None:
    held.pieces = [b"".join(PIECES), b"\n"]

    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 100)
            assert len(items) == 5
            held.let_all()
            items += (await service.get_work("w", 1, 10.0)).items
            await service.submit([answer(item) for item in items])
            await completed(service)

    run(scenario())
    held.pieces = [b"".join(PIECES) + b"\n"]
    held.let(1)
    again = replace(settings, state_dir=settings.state_dir / "b", outfile=settings.outfile / "b")
    again.outfile.parent.unlink()
    again.outfile.parent.mkdir()

    async def nobody_asks() -> None:
        async with serving(again) as service:
            await service.submit([answer(item) for item in await take(service, 100)])
            assert service.status()["done"] == 6
            assert not service.finished.is_set()
            held.let_all()
            await completed(service)

    run(nobody_asks())
    assert output(again) == expected(range(6))


def test_copies_of_long_running_lines_are_not_given_because_the_copy_is_behind(
    settings: RunSettings, held: HeldInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    given = WorkQueue.lease_backup

    def lease_backup(queue: WorkQueue, worker: str, *args: Any) -> Any:
        asked.append(worker)
        return given(queue, worker, *args)

    monkeypatch.setattr(WorkQueue, "lease_backup", lease_backup)

    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 100)
            assert not await take(service, 1, "idle")
            assert asked == []
            held.let_all()
            await when(lambda: service._source is not None and service._source.is_whole)
            items += await take(service, 100)
            assert not await take(service, 1, "idle")
            assert asked == ["idle"]

    run(scenario())


def test_status_tells_how_far_the_copy_is_and_how_many_lines_that_makes(
    settings: RunSettings, held: HeldInput
) -> None:
    async def scenario() -> None:
        async with serving(settings) as service:
            held.let(2)
            await copied_to(service, 2)
            status = full_status(service)
            assert (status["total"], status["total_is_exact"]) == (8, False)  # four in a half
            assert status["copying"] == {
                "bytes": len(b"".join(PIECES[:2])),
                "share": 0.5,
                "problem": None,
            }
            held.known_lines = 6
            assert full_status(service)["total"] == 6
            held.let_all()
            await finish_everything_as_it_comes(service)
            assert full_status(service)["copying"] is None
            assert full_status(service)["total_is_exact"]

    run(scenario())


async def finish_everything_as_it_comes(service: DispatchService) -> None:
    while items := (await service.get_work("w", 100, 10.0)).items:
        await service.submit([answer(item) for item in items])
    await completed(service)


def test_an_empty_input_and_one_that_is_copied_at_once_are_whole_before_the_run_begins(
    settings: RunSettings, held: HeldInput
) -> None:
    held.pieces = []
    held.let_all()

    async def scenario() -> None:
        async with serving(settings) as service:
            assert not isinstance(service._source, GrowingSource)
            await completed(service)

    run(scenario())


def test_a_line_and_a_run_are_shown_while_the_copy_is_not_whole(
    settings: RunSettings, held: HeldInput, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with serving(settings) as service:
            await take(service, 2)
            found = await ItemView(service).look("1")
            assert found is not None
            assert found["input"]["text"] == '{"n": 1}'
            assert await ItemView(service).look("5") is None  # nothing of it is there yet

    run(scenario())
    standing = look(the_run(settings.state_dir, 0))
    assert (standing.done, standing.total, standing.total_is_exact) == (0, None, False)
    assert main([str(settings.state_dir), "--item", "1"]) == 0
    assert main([str(settings.state_dir), "--item", "5"]) == 2
    assert "3 lines were copied so far" in capsys.readouterr().err
    assert main([str(settings.state_dir)]) == 0
    assert "100" not in capsys.readouterr().out.replace(str(settings.state_dir), "")


# -------------------------------------------------------------------- going on


def test_a_run_that_is_killed_while_the_copy_grows_goes_on_behind_what_it_handed_out(
    settings: RunSettings, held: HeldInput
) -> None:
    async def scenario() -> None:
        held.let(2)
        async with serving(settings) as service:
            await copied_to(service, 2)
            items = await take(service, 3)
            await service.submit([answer(items[0])])
            await service.release([give_back(items[1])])
        held.let(1)  # not as far as the lines that were handed out
        service_2 = DispatchService(settings)
        starting = asyncio.ensure_future(service_2.start())
        partial = settings.state_dir / "input.partial"
        await when(lambda: held.reads == 2 and partial.stat().st_size == len(PIECES[0]))
        await settle_loop()
        assert not starting.done()
        held.let(2)
        await starting
        again = await take(service_2, 100)
        assert [item.work_id for item in again] == [1, 3]
        assert [item.content for item in again] == ['{"n": 1}', '{"n": 3}']
        held.let_all()
        await service_2.submit([answer(item) for item in (*again, items[2])])
        await finish_everything_as_it_comes(service_2)
        await service_2.close()

    run(scenario())
    assert output(settings) == expected(range(6))
    assert not [p for p in settings.state_dir.iterdir() if p.name.startswith("input.")]


@pytest.mark.parametrize("times", [1, 2])
def test_the_copy_that_was_not_finished_is_not_needed_to_go_on(
    times: int, settings: RunSettings, held: HeldInput
) -> None:
    async def scenario() -> None:
        for number in range(times):
            async with serving(settings) as service:
                assert len(await take(service, 1)) == 1, number
                await when(lambda: copied(service))
            (settings.state_dir / "input.partial").unlink()
        held.let_all()
        async with serving(settings) as service:
            await service.submit([answer(item) for item in await take(service, 100)])
            await finish_everything_of(service)

    run(scenario())
    assert output(settings) == expected(range(6))


async def finish_everything_of(service: DispatchService) -> None:
    """Finish the run, whoever has what."""
    while not service.queue.is_complete:
        await service.submit([ResultItem(n, line(n)) for n in list(service.queue.items)])
        await service.get_work("w", 100, 0.05)
    await completed(service)


def test_a_run_goes_on_with_a_copy_that_is_whole_at_once_this_time(
    settings: RunSettings, held: HeldInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with serving(settings) as service:
            await take(service, 2)
        monkeypatch.setattr(growing, "FIRST_AFTER_S", 60.0)
        held.let_all()
        for _ in range(2):
            async with serving(settings) as service:
                assert not isinstance(service._source, GrowingSource)
                assert service._run_file["fingerprint"]["size"] == len(b"".join(PIECES))
        async with serving(settings) as service:
            await finish_everything_of(service)

    run(scenario())
    assert output(settings) == expected(range(6))


def test_an_input_that_gives_other_lines_than_were_handed_out_is_refused(
    settings: RunSettings, held: HeldInput
) -> None:
    async def scenario() -> None:
        async with serving(settings) as service:
            await take(service, 2)
        right = held.pieces
        held.let_all()
        for wrong in ([b'{"n": 0}\n{"n": 7}\n{"n"', *right[1:]], [b'{"n": 0}\n'], []):
            held.pieces = wrong
            with pytest.raises(StateError, match="does not give the lines that this run handed"):
                async with serving(settings):
                    pass
        held.pieces = [right[0], b': 2}\n{"n": 3}\n{"n": 4}\n{"n": 5}\n']  # the same so far
        async with serving(settings) as service:
            await finish_everything_of(service)

    run(scenario())
    assert output(settings) == expected(range(6))


def test_a_changed_original_is_refused_before_anything_is_read_again(
    settings: RunSettings, held: HeldInput
) -> None:
    async def scenario() -> None:
        async with serving(settings) as service:
            await take(service, 1)
        held.fingerprint = {"size": 2}
        with pytest.raises(StateError, match=r"its size \(1 bytes then, 2 now\) changed"):
            async with serving(settings):
                pass
        assert held.reads == 1
        held.fingerprint = {"size": 1}
        held.let_all()
        async with serving(settings) as service:
            await finish_everything_of(service)

    run(scenario())
    assert output(settings) == expected(range(6))


def test_without_the_sums_of_what_was_handed_out_a_run_does_not_go_on(
    settings: RunSettings, held: HeldInput
) -> None:
    async def scenario() -> None:
        async with serving(settings) as service:
            await take(service, 1)
        sums = settings.state_dir / "input.sums"
        kept = sums.read_bytes()
        for left in (b"", kept[:-3]):
            sums.write_bytes(left)
            with pytest.raises(StateError, match=r"input\.sums does not tell which lines"):
                async with serving(settings):
                    pass
        sums.write_bytes(kept + b'{"size":999,')  # the next one was torn
        held.let_all()
        async with serving(settings) as service:
            await finish_everything_of(service)

    run(scenario())


def test_a_grown_copy_that_is_damaged_afterwards_is_noticed_and_made_anew(
    settings: RunSettings, held: HeldInput
) -> None:
    spool = settings.state_dir / "input.spool"

    async def scenario() -> None:
        async with serving(settings) as service:
            await take(service, 1)
            held.let_all()
            await when(lambda: service._source is not None and service._source.is_whole)
        spool.write_bytes(spool.read_bytes()[:-1] + b"]")
        with pytest.raises(StateError, match=r"input\.spool, the copy .*; remove it, and start"):
            async with serving(settings):
                pass
        spool.unlink()
        async with serving(settings) as service:
            await take(service, 1)
        async with serving(settings) as service:  # the whole copy of the start before
            assert not isinstance(service._source, GrowingSource)
            await finish_everything_of(service)

    run(scenario())
    assert output(settings) == expected(range(6))


def test_a_run_that_began_with_a_whole_copy_gets_it_whole_again(
    settings: RunSettings, held: HeldInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    held.let_all()

    async def scenario() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(growing, "FIRST_AFTER_S", 60.0)
            async with serving(settings) as service:
                await take(service, 1)
                assert not isinstance(service._source, GrowingSource)
        (settings.state_dir / "input.spool").unlink()
        right = held.pieces
        held.pieces = [*right[:-1], b'{"n": 9}']
        with pytest.raises(StateError, match=r"input\.spool, the copy"):
            async with serving(settings):
                pass
        (settings.state_dir / "input.spool").unlink()
        held.pieces = right
        async with serving(settings) as service:
            assert not isinstance(service._source, GrowingSource)
            await finish_everything_of(service)

    run(scenario())


# -------------------------------------------------------------------- failing


def test_a_damaged_input_stops_the_run_and_what_was_answered_stays(
    settings: RunSettings, held: HeldInput
) -> None:
    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 2)
            await service.submit([answer(items[0])])
            held.failure = UsageError(f"the input {settings.infile} is cut off")
            failure = await failed(service)
            assert isinstance(failure, UsageError)
            assert str(failure).startswith(f"the input {settings.infile} is cut off; its first")
            assert "a new run with another output" in str(failure)
            with pytest.raises(UsageError):
                await service.submit([answer(items[1])])
        async with serving(settings) as service:  # and it does so again
            assert service.status()["done"] == 1
            assert isinstance(await failed(service), UsageError)

    run(scenario())


def test_an_original_that_changes_while_it_is_copied_stops_the_run(
    settings: RunSettings, held: HeldInput
) -> None:
    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 2)
            await service.submit([answer(item) for item in items])
            held.fingerprint = {"size": 2}
            held.let_all()
            failure = await failed(service)
            assert isinstance(failure, UsageError)
            assert "was changed while it was copied; restore it and start the same" in str(failure)
        assert not (settings.state_dir / "input.spool").exists()
        held.fingerprint = {"size": 1}
        async with serving(settings) as service:
            assert service.status()["done"] == 2
            await finish_everything_of(service)

    run(scenario())
    assert output(settings) == expected(range(6))


def test_a_full_disk_makes_the_copy_wait_and_not_the_run(
    settings: RunSettings, held: HeldInput, caplog: pytest.LogCaptureFixture
) -> None:
    files = BrokenFiles()
    files.only = "input."

    async def scenario() -> None:
        async with serving(settings, files) as service:
            items = await take(service, 2)
            files.fail_write = FULL
            held.let_all()
            await when(lambda: (service.status()["copying"] or {}).get("problem"))
            problem = service.status()["copying"]["problem"]
            assert "No space left on device" in problem
            assert str(settings.infile) in problem
            assert str(settings.state_dir / "input.partial") in problem
            assert "it goes on by itself" in problem
            await service.submit([answer(item) for item in items])
            files.heal()
            await finish_everything_as_it_comes(service)
            assert service.failure is None

    with caplog.at_level(logging.WARNING):
        run(scenario())
    said = [r.getMessage() for r in caplog.records if "copy of the input" in r.getMessage()]
    assert len(said) == 2
    assert "there is room again" in said[1]
    assert output(settings) == expected(range(6))


def test_a_whole_copy_is_not_lost_for_a_disk_that_is_full_when_it_gets_its_name(
    settings: RunSettings, held: HeldInput
) -> None:
    files = BrokenFiles()
    files.only = "input.origin"

    async def scenario() -> None:
        async with serving(settings, files) as service:
            files.fail_open = FULL
            held.let_all()
            await when(lambda: (service.status()["copying"] or {}).get("problem"))
            files.heal()
            await finish_everything_as_it_comes(service)
            assert held.reads == 1

    run(scenario())
    assert output(settings) == expected(range(6))


def test_a_claim_that_cannot_be_confirmed_for_a_moment_does_not_end_the_copy(
    settings: RunSettings, held: HeldInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with serving(settings) as service:
            confirm, failures = service._ownership.confirm, iter([True, True])

            def sometimes() -> None:
                if next(failures, False):
                    raise StorageError("not now")
                confirm()

            assert isinstance(service._source, GrowingSource)
            copying = replace(service._source.copy._copying, confirm=sometimes)
            monkeypatch.setattr(service._source.copy, "_copying", copying)
            held.let_all()
            await finish_everything_as_it_comes(service)
            assert next(failures, None) is None

    run(scenario())


def test_a_run_whose_copy_waits_for_room_can_be_ended(
    settings: RunSettings, held: HeldInput
) -> None:
    files = BrokenFiles()
    files.only = "input.partial"

    async def scenario() -> None:
        service = DispatchService(settings, files=files)
        await service.start()
        files.fail_write = FULL
        held.let_all()
        await when(lambda: (service.status()["copying"] or {}).get("problem"))
        await service.close()
        assert service.failure is None

    run(scenario())


@pytest.mark.parametrize("part", ["write", "sync"])
def test_a_broken_disk_stops_the_run_with_the_place_and_a_second_start_goes_on(
    part: str, settings: RunSettings, held: HeldInput
) -> None:
    files = BrokenFiles()
    files.only = "input.partial"

    async def scenario() -> None:
        async with serving(settings, files) as service:
            await take(service, 2)
            setattr(files, f"fail_{part}", BROKEN)
            held.let_all()
            failure = await failed(service)
            assert isinstance(failure, StorageError)
            assert f"cannot copy the input {settings.infile} to" in str(failure)
            assert "Input/output error" in str(failure)
            assert "start the same command again" in str(failure)
        async with serving(settings) as service:
            await finish_everything_of(service)

    run(scenario())
    assert output(settings) == expected(range(6))


def test_a_copy_that_is_removed_while_it_is_made_stops_the_run_and_is_made_anew(
    settings: RunSettings, held: HeldInput
) -> None:
    async def scenario() -> None:
        async with serving(settings) as service:
            await take(service, 2)
            (settings.state_dir / "input.partial").unlink()
            held.let(2)
            failure = await failed(service)
            assert isinstance(failure, StorageError)
            assert "input.partial, the copy of the input" in str(failure)
            assert "makes it anew" in str(failure)
        held.let_all()
        async with serving(settings) as service:
            await finish_everything_of(service)

    run(scenario())
    assert output(settings) == expected(range(6))


def test_who_lost_the_run_copies_no_more_and_leaves_the_winners_copy(
    settings: RunSettings, held: HeldInput
) -> None:
    partial = settings.state_dir / "input.partial"

    async def scenario() -> None:
        async with serving(settings) as service:
            await take(service, 2)
            owners = settings.state_dir / OWNERS_DIR
            (owners / f"{service.epoch + 1:06d}").write_bytes(b"")
            partial.unlink()
            partial.write_bytes(b"the winner's")
            held.let_all()
            assert isinstance(await failed(service), RunLockedError)
        assert partial.read_bytes() == b"the winner's"
        assert not (settings.state_dir / "input.spool").exists()

    run(scenario())


def test_a_drained_or_closed_service_waits_for_no_more_of_the_copy(
    settings: RunSettings, held: HeldInput
) -> None:
    async def scenario() -> None:
        service = DispatchService(settings)
        await service.start()
        items = await take(service, 2)
        assert isinstance(service._source, GrowingSource)
        copy = service._source.copy
        await service.drain()
        await when(copy.has_ended.is_set)
        await service.submit([answer(item) for item in items])
        await service.close()
        assert service.failure is None
        held.let_all()
        async with serving(settings) as service:
            assert service.status()["done"] == 2
            await finish_everything_as_it_comes(service)
        assert output(settings) == expected(range(6))

    run(scenario())


def test_who_closes_a_service_waits_until_nothing_writes_the_copy(
    settings: RunSettings, held: HeldInput
) -> None:
    files = BrokenFiles()
    files.only = "input.partial"
    ended_first: list[bool] = []

    class Claim(Ownership):
        def release(self) -> None:
            ended_first.append(copy.has_ended.is_set())
            super().release()

    async def scenario() -> None:
        nonlocal copy
        service = DispatchService(settings, files=files, ownership=Claim(settings.state_dir, files))
        await service.start()
        assert isinstance(service._source, GrowingSource)
        copy = service._source.copy
        files.hold_sync.clear()
        held.let(2)
        await until(files.sync_waits)
        closing = asyncio.ensure_future(service.close())
        await settle_loop()
        assert not closing.done()
        files.hold_sync.set()
        await closing
        assert ended_first == [True]

    copy: GrowingCopy
    run(scenario())


def test_a_start_that_is_cancelled_while_it_reads_again_leaves_no_thread_behind(
    settings: RunSettings, held: HeldInput
) -> None:
    async def scenario() -> None:
        held.let(2)
        async with serving(settings) as service:
            await copied_to(service, 2)
            await take(service, 4)
        held.let(1)
        starting = asyncio.ensure_future(DispatchService(settings).start())
        await when(lambda: held.reads == 2)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert not (settings.state_dir / "input.partial").exists()
        held.let_all()
        async with serving(settings) as service:
            await finish_everything_of(service)

    run(scenario())
    assert output(settings) == expected(range(6))


def test_a_start_that_fails_while_the_copy_grows_leaves_no_thread_behind(
    settings: RunSettings, held: HeldInput
) -> None:
    files = BrokenFiles()
    files.only, files.fail_open = "run.yaml", FULL

    async def scenario() -> None:
        with pytest.raises(StorageError, match=r"run\.yaml"):
            await DispatchService(settings, files=files).start()
        assert "copy" not in {thread.name for thread in threading.enumerate()}

    run(scenario())


def test_the_state_directory_is_as_it_was_before_once_the_run_is_complete(
    settings: RunSettings, held: HeldInput
) -> None:
    async def scenario() -> None:
        service = DispatchService(settings)
        await service.start()
        held.let_all()
        await finish_everything_as_it_comes(service)
        await service.close()

    run(scenario())
    assert sorted(p.name for p in Path(settings.state_dir).iterdir()) == ["run.yaml"]
