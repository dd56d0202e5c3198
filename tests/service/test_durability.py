"""Nobody is told what is not on disk: full disks, lost outputs, failures that end the run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dispatcher import service as service_module
from dispatcher.config import RunSettings
from dispatcher.core.work_queue import QueuePolicy
from dispatcher.errors import (
    DispatcherError,
    StateError,
    StorageFullError,
    SyncFailedError,
)
from dispatcher.models import (
    HeartbeatRequest,
    Outcome,
    WorkStatus,
)
from dispatcher.service import DispatchService
from dispatcher.storage import writer as writer_module
from dispatcher.storage.journal import JOURNAL_DIR
from tests.service.support import (
    VERBS,
    Verb,
    answer,
    completed,
    durable,
    expected,
    finish_everything_but,
    give_back,
    give_input,
    hold_reader,
    journal_bytes,
    output,
    run,
    serving,
    settle_loop,
    take,
    until,
)
from tests.storage.broken_files import BROKEN, FULL, BrokenFiles

# -------------------------------------------------------------------- acknowledge after durable


@pytest.mark.parametrize("verb", VERBS)
def test_no_reply_comes_before_its_commit(settings: RunSettings, verb: Verb) -> None:
    give_input(settings, 5)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(settings, files) as service:
            items = await take(service, 2)
            files.hold_sync.clear()
            reply = asyncio.create_task(verb(service, items))
            await until(files.sync_waits)
            await settle_loop()
            assert not reply.done()
            files.hold_sync.set()
            await asyncio.wait_for(reply, 5)

    run(scenario())


def test_a_duplicate_is_not_answered_before_the_commit_of_the_first_result(
    settings: RunSettings,
) -> None:
    give_input(settings, 5)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(settings, files) as service:
            (item,) = await take(service, 1)
            files.hold_sync.clear()
            first = asyncio.create_task(service.submit([answer(item)]))
            await until(files.sync_waits)
            second = asyncio.create_task(service.submit([answer(item)]))
            await settle_loop()
            assert not second.done()
            files.hold_sync.set()
            assert await first == [Outcome.ACCEPTED]
            assert await second == [Outcome.DUPLICATE]

    run(scenario())


def test_nobody_is_told_all_work_is_complete_before_the_last_commit(
    settings: RunSettings,
) -> None:
    give_input(settings, 1)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(settings, files) as service:
            (item,) = await take(service, 1)
            files.hold_sync.clear()
            last = asyncio.create_task(service.submit([answer(item)]))
            await until(files.sync_waits)
            asking = asyncio.create_task(service.get_work("other", 1))
            await settle_loop()
            assert not asking.done()
            files.hold_sync.set()
            await last
            assert (await asking).status is WorkStatus.ALL_WORK_COMPLETE

    run(scenario())


def test_calls_that_queue_while_a_batch_is_written_share_the_next_one(
    settings: RunSettings,
) -> None:
    give_input(settings, 20)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(settings, files) as service:
            items = await take(service, 20)
            files.hold_sync.clear()
            files.log.clear()
            calls = [asyncio.create_task(service.submit([answer(items[0])]))]
            await until(files.sync_waits)
            calls += [asyncio.create_task(service.submit([answer(i)])) for i in items[1:19]]
            await settle_loop()
            files.hold_sync.set()
            await asyncio.gather(*calls)
            journal_writes = [x for x in files.log if x.startswith("write") and "journal" in x]
            assert len(journal_writes) == 2

    run(scenario())


# -------------------------------------------------------------------- a full disk


@pytest.mark.parametrize("verb", VERBS[:5])
def test_on_a_full_disk_a_call_fails_changes_nothing_and_succeeds_later(
    settings: RunSettings, verb: Verb
) -> None:
    give_input(settings, 5)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(settings, files) as service:
            items = await take(service, 2)
            before = durable(service)
            files.fail_write, files.only = FULL, "journal"
            for _ in range(2):
                with pytest.raises(StorageFullError):
                    await verb(service, items)
                assert durable(service) == before
            files.heal()
            await verb(service, items)
            assert durable(service) != before
            assert service.failure is None
            await finish_everything_but(service, items)

    run(scenario())
    assert output(settings) == expected(range(5))


def test_calls_that_queued_behind_a_failed_write_fail_too_and_change_nothing(
    settings: RunSettings,
) -> None:
    give_input(settings, 5)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(settings, files) as service:
            items = await take(service, 3)
            before = durable(service)
            files.only = "journal"
            entered, go_on = hold_writes(files)
            first = asyncio.create_task(service.submit([answer(items[0])]))
            await until(entered)
            second = asyncio.create_task(service.submit([answer(items[1])]))
            await settle_loop()
            files.fail_write = FULL
            heal_before_undo(service, files)  # a write of the second batch would succeed
            go_on.set()
            for call in (first, second):
                with pytest.raises(StorageFullError):
                    await asyncio.wait_for(call, 5)
            assert durable(service) == before
            assert await service.submit([answer(i) for i in items]) == [Outcome.ACCEPTED] * 3
            memory = durable(service)
        async with serving(settings) as service:
            assert durable(service) == memory

    run(scenario())


def heal_before_undo(service: DispatchService, files: BrokenFiles) -> None:
    undo = service._undo

    async def heal_and_undo(*args: Any) -> None:
        files.heal()
        await undo(*args)

    service._undo = heal_and_undo  # type: ignore[method-assign]


def hold_writes(files: BrokenFiles) -> tuple[threading.Event, threading.Event]:
    """Let writes wait before they begin; tells that one does, and how to let them go on."""
    entered, go_on = threading.Event(), threading.Event()
    write_at = files.write_at

    def slow_write_at(*args: Any) -> None:
        entered.set()
        assert go_on.wait(10)
        write_at(*args)

    files.write_at = slow_write_at  # type: ignore[method-assign]
    return entered, go_on


def test_a_full_disk_at_the_first_hand_out_gives_the_same_lines_later(
    settings: RunSettings,
) -> None:
    give_input(settings, 3)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(settings, files) as service:
            files.fail_write, files.only = FULL, "journal"
            with pytest.raises(StorageFullError):
                await take(service, 2)
            files.heal()
            assert [item.work_id for item in await take(service, 5)] == [0, 1, 2]

    run(scenario())


def test_after_a_full_disk_calls_are_refused_for_a_moment(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "_FULL_PAUSE_S", 1000.0)
    give_input(settings, 3)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(settings, files) as service:
            files.fail_write, files.only = FULL, "journal"
            with pytest.raises(StorageFullError):
                await take(service, 2)
            files.heal()
            writes = len(files.log)
            with pytest.raises(StorageFullError):
                await take(service, 2)
            assert len(files.log) == writes

    run(scenario())


def test_a_hand_out_that_was_reading_when_its_batch_failed_is_not_acknowledged(
    settings: RunSettings,
) -> None:
    give_input(settings, 1)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(settings, files) as service:
            (item,) = await take(service, 1)
            await service.release([give_back(item)])
            undone = told_when_undone(service)
            files.fail_write, files.only = FULL, "journal"
            reading, go_on = hold_reader(service)
            asking = asyncio.create_task(service.get_work("w", 1))
            await until(reading)
            await undone
            files.heal()
            await settle_loop()
            go_on.set()
            with pytest.raises(StorageFullError):
                await asyncio.wait_for(asking, 5)

    run(scenario())


def test_results_that_came_with_a_wish_for_work_are_not_acknowledged_when_they_were_undone(
    settings: RunSettings,
) -> None:
    give_input(settings, 2)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(settings, files) as service:
            item, other = await take(service, 2)
            await service.release([give_back(other)])
            undone = told_when_undone(service)
            files.fail_write, files.only = FULL, "journal"
            reading, go_on = hold_reader(service)
            exchanging = asyncio.create_task(service.exchange([answer(item)], "w", 1))
            await until(reading)
            await undone
            files.heal()
            await settle_loop()
            go_on.set()
            with pytest.raises(StorageFullError):
                await asyncio.wait_for(exchanging, 5)
            assert await service.submit([answer(item)]) == [Outcome.ACCEPTED]

    run(scenario())


def test_results_and_a_wish_for_work_share_one_commit(settings: RunSettings) -> None:
    give_input(settings, 3)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(settings, files) as service:
            items = await take(service, 2)
            files.hold_sync.clear()
            exchanging = asyncio.create_task(
                service.exchange([answer(item) for item in items], "w", 1)
            )
            await until(files.sync_waits)
            await settle_loop()
            assert not exchanging.done()
            files.hold_sync.set()
            outcomes, work = await exchanging
            assert outcomes == [Outcome.ACCEPTED] * 2
            assert [item.work_id for item in work.items] == [2]

    run(scenario())


def told_when_undone(service: DispatchService) -> asyncio.Future[None]:
    """Give a future that is done when the next failed batch was undone."""
    undone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    undo = service._undo

    async def tell(*args: Any) -> None:
        await undo(*args)
        undone.set_result(None)

    service._undo = tell  # type: ignore[method-assign]
    return undone


def test_a_tombstone_in_the_output_stays_final_after_a_full_disk(settings: RunSettings) -> None:
    settings = replace(settings, policy=QueuePolicy(max_retries=0))
    give_input(settings, 4)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(settings, files) as service:
            first, second, third = await take(service, 3)
            await service.release([give_back(first, charge=True)])
            await service.submit([answer(second)])  # the tombstone is in the output by now
            assert len(settings.outfile.read_text().splitlines()) >= 1
            files.fail_write, files.only = FULL, "journal"
            with pytest.raises(StorageFullError):
                await service.submit([answer(third)])
            files.heal()

            assert await service.submit([answer(first)]) == [Outcome.DUPLICATE]

    run(scenario())


def test_a_full_disk_under_the_output_pauses_the_output_only(settings: RunSettings) -> None:
    give_input(settings, 4)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(settings, files) as service:
            items = await take(service, 4)
            files.fail_write, files.only = FULL, "out.jsonl"
            outcomes = await service.submit([answer(i) for i in items[:2]])
            assert outcomes == [Outcome.ACCEPTED] * 2
            assert await service.submit([answer(items[2])]) == [Outcome.ACCEPTED]
            assert "out.jsonl" in service.status()["output_error"]
            assert not service.stopped.is_set()
            files.heal()
            await service.submit([answer(items[3])])
            await completed(service)
            assert service.status()["output_error"] is None

    run(scenario())
    assert output(settings) == expected(range(4))


def test_a_segment_that_cannot_be_begun_is_noticed_by_nobody(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "SEGMENT_BYTES", 600)
    give_input(settings, 40)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(settings, files) as service:
            items = await take(service, 40)
            files.fail_open, files.only = FULL, ".journal"
            for item in items[1:30]:
                assert await service.submit([answer(item)]) == [Outcome.ACCEPTED]
            assert len(journal_bytes(settings)) == 1
            files.heal()
            for item in items[30:]:
                assert await service.submit([answer(item)]) == [Outcome.ACCEPTED]
            assert len(journal_bytes(settings)) > 1
            memory = durable(service)
        async with serving(settings) as service:
            assert durable(service) == memory
            await service.submit([answer(items[0])])
            await completed(service)

    run(scenario())
    assert output(settings) == expected(range(40))


def test_a_waiting_result_that_cannot_be_read_pauses_the_output_only(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "_TICK_S", 0.02)
    give_input(settings, 5)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(settings, files) as service:
            items = await take(service, 5)
            await service.submit([answer(item) for item in items[1:3]])
            files.fail_read, files.only = BROKEN, "journal"
            for item in (items[0], *items[3:]):
                assert await service.submit([answer(item)]) == [Outcome.ACCEPTED]
            await ticks(service, 3)
            assert str(settings.state_dir / JOURNAL_DIR) in service.status()["output_error"]
            assert "Input/output error" in service.status()["output_error"]
            assert not service.stopped.is_set()
            files.heal()
            await completed(service)
            assert service.status()["output_error"] is None

    run(scenario())
    assert output(settings) == expected(range(5))


# -------------------------------------------------------------------- an output that is gone


@pytest.fixture
def elsewhere(settings: RunSettings, monkeypatch: pytest.MonkeyPatch) -> RunSettings:
    """Settings whose output stands in a directory of its own, and is looked after all the time."""
    monkeypatch.setattr(service_module, "_TICK_S", 0.02)
    outfile = settings.infile.with_name("results") / "out.jsonl"
    outfile.parent.mkdir()
    return replace(settings, outfile=outfile, checkpoint_every_s=0.0)


def move_the_file(settings: RunSettings) -> Callable[[], object]:
    aside = settings.outfile.rename(settings.infile.with_name("aside"))
    return lambda: aside.rename(settings.outfile)


def move_the_directory(settings: RunSettings) -> Callable[[], object]:
    aside = settings.outfile.parent.rename(settings.infile.with_name("aside"))
    return lambda: aside.rename(settings.outfile.parent)


def replace_the_file(settings: RunSettings) -> Callable[[], object]:
    put_back = move_the_file(settings)
    settings.outfile.write_bytes(settings.infile.with_name("aside").read_bytes())
    return put_back


Loss = Callable[[RunSettings], Callable[[], object]]
LOSSES = [move_the_file, move_the_directory, replace_the_file]


@pytest.mark.parametrize("lose", LOSSES)
def test_a_lost_output_is_reported_and_nothing_is_lost_when_it_is_put_back(
    elsewhere: RunSettings, lose: Loss
) -> None:
    give_input(elsewhere, 6)

    async def scenario() -> None:
        async with serving(elsewhere) as service:
            items = await take(service, 6)
            await service.submit([answer(item) for item in items[:2]])
            put_back = lose(elsewhere)
            for item in items[2:4]:
                assert await service.submit([answer(item)]) == [Outcome.ACCEPTED]
            assert (
                f"{elsewhere.outfile} was removed or replaced" in service.status()["output_error"]
            )
            assert not service.stopped.is_set()
            put_back()
            assert await service.submit([answer(i) for i in items[4:]]) == [Outcome.ACCEPTED] * 2
            await completed(service)
            assert service.status()["output_error"] is None

    run(scenario())
    assert output(elsewhere) == expected(range(6))


@pytest.mark.parametrize("lose", LOSSES)
def test_an_output_put_back_after_the_last_result_is_completed_by_itself(
    elsewhere: RunSettings, lose: Loss
) -> None:
    give_input(elsewhere, 4)

    async def scenario() -> None:
        async with serving(elsewhere) as service:
            items = await take(service, 4)
            await service.submit([answer(items[0])])
            put_back = lose(elsewhere)
            for item in items[1:]:
                assert await service.submit([answer(item)]) == [Outcome.ACCEPTED]
            assert service.status()["output_error"]
            assert not service.finished.is_set()
            await ticks(service, 3)
            put_back()
            await completed(service)

    run(scenario())
    assert output(elsewhere) == expected(range(4))


async def ticks(service: DispatchService, count: int) -> None:
    """Return when the service looked `count` times more at what there is to write."""
    looks = 0
    swap_batch = service._swap_batch

    def counted() -> Any:
        nonlocal looks
        looks += 1
        return swap_batch()

    service._swap_batch = counted  # type: ignore[method-assign]
    while looks < count:  # noqa: ASYNC110 (the service has no event to wait for)
        await asyncio.sleep(0.01)
    service._swap_batch = swap_batch  # type: ignore[method-assign]


@pytest.mark.parametrize("lose", LOSSES)
def test_an_output_that_is_gone_at_the_end_stops_the_run_and_its_journal_stays(
    elsewhere: RunSettings, lose: Loss
) -> None:
    settings = replace(elsewhere, checkpoint_every_s=1000.0)
    give_input(settings, 4)

    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 4)
            await service.submit([answer(item) for item in items[:2]])
            put_back = lose(settings)
            outcomes = await service.submit([answer(item) for item in items[2:]])
            assert outcomes == [Outcome.ACCEPTED] * 2
            await asyncio.wait_for(service.stopped.wait(), 5)
            assert isinstance(service.failure, StateError)
            assert "put the file back" in str(service.failure)
            assert not service.finished.is_set()
        assert journal_bytes(settings)
        run_file = yaml.safe_load((settings.state_dir / "run.yaml").read_text())
        assert run_file["state"] == "running"
        put_back()
        async with serving(settings) as service:
            await completed(service)

    run(scenario())
    assert output(settings) == expected(range(4))


def test_an_idle_service_writes_nothing(elsewhere: RunSettings) -> None:
    give_input(elsewhere, 3)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(elsewhere, files) as service:
            (item, *_) = await take(service, 3)
            await service.submit([answer(item)])
            await ticks(service, 3)
            files.log.clear()
            await ticks(service, 5)
            assert [entry for entry in files.log if "journal" in entry or "out" in entry] == []

    run(scenario())


# -------------------------------------------------------------------- failures that end the run


@pytest.mark.parametrize("verb", VERBS)
def test_a_failed_sync_is_never_acknowledged_and_stops_the_run(
    settings: RunSettings, verb: Verb
) -> None:
    give_input(settings, 5)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(settings, files) as service:
            items = await take(service, 2)
            files.fail_sync = BROKEN
            files.log.clear()
            with pytest.raises(SyncFailedError):
                await asyncio.wait_for(verb(service, items), 5)
            await asyncio.wait_for(service.stopped.wait(), 5)
            assert isinstance(service.failure, SyncFailedError)
            files.heal()
            for again in VERBS:
                with pytest.raises(SyncFailedError):
                    await asyncio.wait_for(again(service, items), 5)
            assert len([x for x in files.log if x.startswith("sync")]) == 1

    run(scenario())


def test_a_call_that_was_reading_when_the_run_failed_is_answered_with_the_failure(
    settings: RunSettings,
) -> None:
    give_input(settings, 3)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(settings, files) as service:
            items = await take(service, 2)
            await service.release([give_back(items[1])])
            reading, go_on = hold_reader(service)
            asking = asyncio.create_task(service.get_work("w", 2))
            await until(reading)
            files.fail_sync = BROKEN
            with pytest.raises(SyncFailedError):
                await service.submit([answer(items[0])])
            await asyncio.wait_for(service.stopped.wait(), 5)
            go_on.set()
            with pytest.raises(SyncFailedError):
                await asyncio.wait_for(asking, 3)

    run(scenario())


def test_tombstones_that_were_being_made_when_the_run_failed_do_not_hang_their_call(
    settings: RunSettings,
) -> None:
    settings = replace(settings, policy=QueuePolicy(max_retries=0))
    give_input(settings, 3)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(settings, files) as service:
            items = await take(service, 3)
            reading, go_on = hold_reader(service)
            releasing = asyncio.create_task(service.release([give_back(items[1], charge=True)]))
            await until(reading)
            files.fail_sync = BROKEN
            submitting = asyncio.create_task(service.heartbeat(HeartbeatRequest("w")))
            service._queue_events()
            await asyncio.wait_for(service.stopped.wait(), 5)
            go_on.set()
            for call in (releasing, submitting):
                with pytest.raises(SyncFailedError):
                    await asyncio.wait_for(call, 3)

    run(scenario())


@pytest.mark.parametrize("broken", ["read", "unlink"])
def test_a_call_whose_batch_met_an_unexpected_error_is_answered(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    give_input(settings, 12)
    files = BrokenFiles()
    if broken == "unlink":
        settings = replace(settings, checkpoint_every_s=0.0)
        monkeypatch.setattr(writer_module, "SEGMENT_BYTES", 1)

    async def scenario() -> None:
        async with serving(settings, files) as service:
            items = await take(service, 12)
            await service.submit([answer(items[1])])  # waits in the journal for line 0
            if broken == "read":
                files.fail_read = BROKEN
            else:
                files.unlink = refuse_unlink  # type: ignore[method-assign]
            for item in items:  # with or without an error, but answered
                call = asyncio.create_task(service.submit([answer(item)]))
                done, _ = await asyncio.wait([call], timeout=3)
                assert done == {call}
                assert call.exception() is None or isinstance(call.exception(), DispatcherError)

    run(scenario())


def refuse_unlink(path: Path) -> None:
    raise PermissionError(1, "Operation not permitted", str(path))


def test_a_call_whose_undo_failed_is_answered_with_the_failure(settings: RunSettings) -> None:
    give_input(settings, 3)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(settings, files) as service:
            items = await take(service, 1)
            files.fail_write, files.fail_sync, files.only = FULL, BROKEN, "journal"
            with pytest.raises(DispatcherError):
                await asyncio.wait_for(service.submit([answer(items[0])]), 3)
            assert service.failure is not None

    run(scenario())
