"""A run that is begun again, and by whom."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import yaml

from dispatcher import service as service_module
from dispatcher.config import RunSettings
from dispatcher.core.work_queue import QueuePolicy
from dispatcher.errors import (
    RunLockedError,
    StateError,
    StorageError,
    SyncFailedError,
)
from dispatcher.models import (
    Outcome,
    ReleaseItem,
    WorkItem,
    WorkStatus,
)
from dispatcher.service import DispatchService
from dispatcher.storage import writer as writer_module
from dispatcher.storage.files import Files
from dispatcher.storage.journal import JOURNAL_DIR
from dispatcher.storage.ownership import CONFIRM_WITHIN_S, OWNERS_DIR, Identity, Ownership
from dispatcher.storage.run_state import load_run_file
from tests.service.support import (
    VERBS,
    Verb,
    answer,
    completed,
    drop,
    expected,
    finish_everything,
    finish_everything_but,
    give_back,
    give_input,
    journal_bytes,
    output,
    run,
    serving,
    settle_loop,
    take,
    until,
)
from tests.storage.broken_files import BROKEN, FULL, BrokenFiles, owned_by_the_dead

# -------------------------------------------------------------------- going on


def test_a_killed_run_goes_on_and_takes_late_results_of_before(settings: RunSettings) -> None:
    give_input(settings, 10)

    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 6)
            await service.submit([answer(i) for i in (items[0], items[3])])
            run_id, epoch = service.run_id, service.epoch
        async with serving(settings) as service:
            assert (service.run_id, service.epoch) == (run_id, epoch + 1)
            assert await service.submit([answer(items[3])]) == [Outcome.DUPLICATE]
            assert await service.submit([answer(items[1])]) == [Outcome.ACCEPTED]
            rest = await take(service, 10)
            assert [i.work_id for i in rest] == [6, 7, 8, 9]  # the others are still leased
            late = [answer(i) for i in (*items[2:3], *items[4:], *rest)]
            await service.submit(late)
            await completed(service)

    run(scenario())
    assert output(settings) == expected(range(10))


def test_an_output_longer_than_its_checkpoint_is_cut_and_written_again(
    settings: RunSettings,
) -> None:
    settings = replace(settings, checkpoint_every_s=0.0)
    give_input(settings, 6)

    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 6)
            for item in items[:4]:
                await service.submit([answer(item)])
            await service._in_writer(lambda: None)
        with settings.outfile.open("ab") as file:
            file.write(b'{"half a li')
        async with serving(settings) as service:
            assert b"half" not in settings.outfile.read_bytes()
            await service.submit([answer(i) for i in items[4:]])
            await completed(service)

    run(scenario())
    assert output(settings) == expected(range(6))


def test_a_closed_run_goes_on_where_it_was(settings: RunSettings) -> None:
    give_input(settings, 4)

    async def scenario() -> None:
        service = DispatchService(settings)
        await service.start()
        items = await take(service, 2)
        await service.submit([answer(items[1])])
        await service.close()
        assert service.stopped.is_set()
        async with serving(settings) as service:
            assert await service.submit([answer(items[0])]) == [Outcome.ACCEPTED]
            await finish_everything(service)

    run(scenario())
    assert output(settings) == expected(range(4))


def test_after_close_the_next_start_need_not_wait_for_anybody(settings: RunSettings) -> None:
    give_input(settings, 1)

    async def scenario() -> None:
        epochs = []
        for _ in range(3):  # each claims the run for this very process, which lives on
            service = DispatchService(settings)
            await asyncio.wait_for(service.start(), 5)
            epochs.append(service.epoch)
            await service.close()
        assert epochs == [1, 2, 3]

    run(scenario())


def test_after_close_of_a_run_that_failed_the_next_start_need_not_wait_either(
    settings: RunSettings,
) -> None:
    give_input(settings, 2)
    files = BrokenFiles()

    async def scenario() -> None:
        service = DispatchService(settings, files=files)
        await service.start()
        (item, _) = await take(service, 2)
        files.fail_sync, files.only = BROKEN, "journal"
        with pytest.raises(SyncFailedError):
            await service.submit([answer(item)])
        await service.close()
        service = DispatchService(settings)
        await asyncio.wait_for(service.start(), 5)
        await service.close()

    run(scenario())


def test_after_a_refused_start_the_next_one_need_not_wait_either(settings: RunSettings) -> None:
    give_input(settings, 1)
    settings.outfile.write_text("precious\n")

    async def scenario() -> None:
        with pytest.raises(StateError):
            await DispatchService(settings).start()
        settings.outfile.unlink()
        service = DispatchService(settings)
        await asyncio.wait_for(service.start(), 5)
        await finish_everything(service)
        await service.close()

    run(scenario())
    assert output(settings) == expected(range(1))


def test_closing_while_the_run_completes_ends(settings: RunSettings) -> None:
    give_input(settings, 1)
    files = BrokenFiles()

    async def scenario() -> None:
        service = DispatchService(settings, files=files)
        await service.start()
        (item,) = await take(service, 1)
        files.hold_sync_dir.clear()
        await service.submit([answer(item)])
        await until(files.sync_dir_waits)  # the output's directory entry is being synced
        closing = asyncio.create_task(service.close())
        await settle_loop()
        files.hold_sync_dir.set()
        try:
            await asyncio.wait_for(closing, 3)
        finally:
            await drop(service)

    run(scenario())
    assert output(settings) == expected(range(1))


def test_a_second_process_on_the_same_run_is_refused(settings: RunSettings) -> None:
    give_input(settings, 1)

    async def scenario() -> None:
        async with serving(settings) as service:
            second = DispatchService(settings)
            with pytest.raises(RunLockedError):
                await second.start()
            await drop(second)
            await finish_everything(service)

    run(scenario())


def test_limits_and_timeouts_may_change_between_two_starts(settings: RunSettings) -> None:
    give_input(settings, 1)
    other = replace(settings, policy=QueuePolicy(max_retries=5, work_timeout_s=1.0), retry_s=1.0)

    async def scenario() -> None:
        async with serving(settings) as service:
            await take(service, 1)
        async with serving(other) as service:
            assert service.status()["max_retries"] == 5
            await service.release([ReleaseItem(0, "0.1")])
            (item,) = await take(service, 1)
            assert item.max_retries == 5

    run(scenario())


def test_an_open_line_is_handed_out_whole_or_refused_after_the_line_limit_shrank(
    settings: RunSettings,
) -> None:
    content = json.dumps({"text": "x" * 500})
    settings.infile.write_text(content + "\n")

    async def scenario() -> None:
        async with serving(settings) as service:
            (item,) = await take(service, 1)
            await service.release([give_back(item)])
        async with serving(replace(settings, max_line_bytes=300)) as service:
            for item in await take(service, 1):
                assert item.content == content

    run(scenario())


def test_a_run_killed_in_the_first_frame_of_its_first_start_begins_anew(
    settings: RunSettings,
) -> None:
    give_input(settings, 2)
    journal = settings.state_dir / "journal"
    journal.mkdir(parents=True)
    (journal / "00000001-000001.journal").write_bytes(b"@00000000")

    async def scenario() -> None:
        async with serving(settings) as service:
            await finish_everything(service)

    run(scenario())
    assert output(settings) == expected(range(2))


def test_a_complete_run_is_not_touched_again(settings: RunSettings) -> None:
    give_input(settings, 3)

    def bytes_of_everything() -> dict[str, bytes]:
        return {
            str(path): path.read_bytes()
            for path in [settings.outfile, *settings.state_dir.rglob("*")]
            if path.is_file() and path.name != "lock" and path.parent.name != OWNERS_DIR
        }

    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 3)
            await service.submit([answer(i) for i in items])
            await completed(service)
        before, times = bytes_of_everything(), settings.outfile.stat().st_mtime_ns
        for _ in range(2):
            async with serving(settings) as service:
                assert service.finished.is_set()
                reply = await service.get_work("w", 5)
                assert reply.status is WorkStatus.ALL_WORK_COMPLETE
                assert await service.submit([answer(items[0], "{}")]) == [Outcome.DUPLICATE]
                assert service.status()["done"] == 3
        assert bytes_of_everything() == before
        assert settings.outfile.stat().st_mtime_ns == times

    run(scenario())


def test_a_complete_run_whose_output_changed_is_refused(settings: RunSettings) -> None:
    give_input(settings, 1)

    async def scenario() -> None:
        async with serving(settings) as service:
            await finish_everything(service)
        settings.outfile.write_text("{}\n")
        service = DispatchService(settings)
        with pytest.raises(StateError, match=r"out\.jsonl"):
            await service.start()
        await drop(service)
        assert settings.outfile.read_text() == "{}\n"

    run(scenario())


def test_an_output_without_its_state_is_refused_and_not_touched(settings: RunSettings) -> None:
    give_input(settings, 1)
    settings.outfile.write_text("precious\n")

    async def scenario() -> None:
        service = DispatchService(settings)
        with pytest.raises(StateError, match="--state"):
            await service.start()
        await drop(service)

    run(scenario())
    assert settings.outfile.read_text() == "precious\n"


def test_a_state_directory_without_its_journal_is_refused_and_the_output_not_touched(
    settings: RunSettings,
) -> None:
    give_input(settings, 2)

    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 2)
            await service.submit([answer(items[0])])
            run_id = service.run_id
        before = settings.outfile.read_bytes()
        for path in (settings.state_dir / JOURNAL_DIR).iterdir():
            path.unlink()
        with pytest.raises(StateError, match=f"the journal of run {run_id} is gone"):
            await DispatchService(settings).start()
        assert settings.outfile.read_bytes() == before

    run(scenario())


def test_an_empty_output_without_state_is_taken(settings: RunSettings) -> None:
    give_input(settings, 1)
    settings.outfile.write_text("")

    async def scenario() -> None:
        async with serving(settings) as service:
            await finish_everything(service)

    run(scenario())
    assert output(settings) == expected(range(1))


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize(
    ("content", "said"),
    [('{"n": 0}\n{"n": 1}\n{"n": 2}\n', "size"), ('{"n": 0}\n{"n": 9}\n', "content")],
)
def test_a_changed_input_is_refused_with_what_changed(
    settings: RunSettings, complete: bool, content: str, said: str
) -> None:
    give_input(settings, 2)

    async def scenario() -> None:
        async with serving(settings) as service:
            if complete:
                await finish_everything(service)
            else:
                await take(service, 1)
        before = settings.outfile.read_bytes()
        settings.infile.write_text(content)
        service = DispatchService(settings)
        with pytest.raises(StateError, match=said):
            await service.start()
        await drop(service)
        assert settings.outfile.read_bytes() == before

    run(scenario())


@pytest.mark.parametrize("seed", range(6))
def test_however_often_it_is_killed_the_output_is_whole_and_in_order(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(writer_module, "SEGMENT_BYTES", 3000)
    rng = Random(seed)
    lines = 250
    settings = replace(
        settings,
        policy=QueuePolicy(max_retries=-1),
        checkpoint_every_s=0.0 if seed % 2 else 5.0,
        checkpoint_every_bytes=300,
    )
    give_input(settings, lines)
    acknowledged: set[int] = set()
    pending: list[WorkItem] = []

    async def live(service: DispatchService) -> None:
        for _ in range(rng.randint(1, 25)):
            pending.extend(await take(service, rng.randint(1, 12), rng.choice(["", "a", "b"])))
            rng.shuffle(pending)
            batch, pending[:] = pending[:4], pending[4:]
            outcomes = await service.submit([answer(i) for i in batch])
            for item, outcome in zip(batch, outcomes, strict=True):
                again = item.work_id in acknowledged
                assert outcome is (Outcome.DUPLICATE if again else Outcome.ACCEPTED)
                acknowledged.add(item.work_id)
            if pending and rng.random() < 0.3:
                await service.release([give_back(pending.pop(), charge=rng.random() < 0.5)])

    async def scenario() -> None:
        for _ in range(5):
            async with serving(settings) as service:
                if not service.finished.is_set():
                    await live(service)
            found = load_run_file(settings.state_dir, Files()) or {}
            # The garbage of a torn write is not appended to what was complete by chance.
            if found.get("state") != "complete" and rng.random() < 0.5:
                with settings.outfile.open("ab") as file:
                    file.write(b"{}\n" * rng.randint(0, 3))
        async with serving(settings) as service:
            await finish_everything_but(service, pending)

    run(scenario())
    assert output(settings) == expected(range(lines))


# -------------------------------------------------------------------- who has the run


class Standstill:
    """A clock that stands still until a test says how long this process did."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class NoLock:
    """A file system without locks."""

    def acquire(self) -> bool:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    def release(self) -> None:
        return


def take_over(settings: RunSettings) -> Ownership:
    """Claim the run for a server on another machine."""
    winner = Identity("node9", "its boot", "its pids", 7, "then")
    options: dict[str, Any] = {"identity": winner, "lock": NoLock(), "takeover": True}
    ownership = Ownership(settings.state_dir, Files(), **options)
    ownership.try_take(0)
    return ownership


def told_when_confirming(ownership: Ownership) -> threading.Event:
    """Give an event that is set when the next try to confirm the claim has ended."""
    tried, confirm = threading.Event(), ownership.confirm

    def tell() -> None:
        try:
            confirm()
        finally:
            tried.set()

    ownership.confirm = tell  # type: ignore[method-assign]
    return tried


@pytest.mark.parametrize("verb", VERBS)
def test_nothing_is_written_or_answered_while_the_claim_cannot_be_confirmed(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch, verb: Verb
) -> None:
    monkeypatch.setattr(service_module, "_CONFIRM_AGAIN_S", 0.01)
    give_input(settings, 5)
    files, clock = BrokenFiles(), Standstill()
    ownership = owned_by_the_dead(settings.state_dir, files, clock=clock)

    async def scenario() -> None:
        async with serving(settings, files, ownership=ownership) as service:
            items = await take(service, 2)
            before = journal_bytes(settings)
            files.fail_reopen = BROKEN
            clock.now_s += CONFIRM_WITHIN_S + 1
            tried = told_when_confirming(ownership)
            reply = asyncio.create_task(verb(service, items))
            await until(tried)
            await settle_loop()
            assert not reply.done()
            assert journal_bytes(settings) == before
            files.heal()
            await asyncio.wait_for(reply, 5)
            assert service.failure is None

    run(scenario())


@pytest.mark.parametrize("verb", VERBS)
def test_what_took_long_to_write_is_not_answered_before_the_claim_is_confirmed(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch, verb: Verb
) -> None:
    monkeypatch.setattr(service_module, "_CONFIRM_AGAIN_S", 0.01)
    give_input(settings, 5)
    files, clock = BrokenFiles(), Standstill()
    ownership = owned_by_the_dead(settings.state_dir, files, clock=clock)

    async def scenario() -> None:
        async with serving(settings, files, ownership=ownership) as service:
            items = await take(service, 2)
            files.only = "journal"
            files.hold_sync.clear()
            reply = asyncio.create_task(verb(service, items))
            await until(files.sync_waits)
            clock.now_s += CONFIRM_WITHIN_S + 1
            files.fail_reopen, files.only = BROKEN, None
            tried = told_when_confirming(ownership)
            files.hold_sync.set()
            await until(tried)
            await settle_loop()
            assert not reply.done()
            files.heal()
            await asyncio.wait_for(reply, 5)

    run(scenario())


@pytest.mark.parametrize("verb", VERBS)
def test_a_service_that_stood_still_while_another_took_over_ends_with_the_winners_name(
    settings: RunSettings, verb: Verb
) -> None:
    give_input(settings, 5)
    clock = Standstill()
    ownership = owned_by_the_dead(settings.state_dir, clock=clock)

    async def scenario() -> None:
        async with serving(settings, ownership=ownership) as service:
            items = await take(service, 2)
            before = journal_bytes(settings)
            winner = take_over(settings)
            clock.now_s += CONFIRM_WITHIN_S + 1
            with pytest.raises(RunLockedError, match=r"\(process 7 on node9\) took over"):
                await asyncio.wait_for(verb(service, items), 5)
            await asyncio.wait_for(service.stopped.wait(), 5)
            assert isinstance(service.failure, RunLockedError)
            for again in VERBS:
                with pytest.raises(RunLockedError):
                    await asyncio.wait_for(again(service, items), 5)
            await service.close()
            assert journal_bytes(settings) == before
            winner.confirm()  # the loser left the winner's claim alone

    run(scenario())


def test_a_result_that_was_being_written_when_another_took_over_is_not_acknowledged(
    settings: RunSettings,
) -> None:
    give_input(settings, 5)
    files, clock = BrokenFiles(), Standstill()
    ownership = owned_by_the_dead(settings.state_dir, files, clock=clock)

    async def scenario() -> None:
        async with serving(settings, files, ownership=ownership) as service:
            items = await take(service, 2)
            files.only = "journal"
            files.hold_sync.clear()
            reply = asyncio.create_task(service.submit([answer(items[0])]))
            await until(files.sync_waits)
            take_over(settings)
            clock.now_s += CONFIRM_WITHIN_S + 1
            files.hold_sync.set()
            with pytest.raises(RunLockedError, match="node9"):
                await asyncio.wait_for(reply, 5)

    run(scenario())


def test_a_service_that_hung_in_its_journal_leaves_the_winners_output_alone(
    settings: RunSettings,
) -> None:
    give_input(settings, 5)
    files, clock = BrokenFiles(), Standstill()
    ownership = owned_by_the_dead(settings.state_dir, files, clock=clock)

    async def scenario() -> None:
        async with serving(settings, files, ownership=ownership) as service:
            items = await take(service, 2)
            files.only = "journal"
            files.hold_sync.clear()
            reply = asyncio.create_task(service.submit([answer(items[0])]))
            await until(files.sync_waits)
            take_over(settings)
            settings.outfile.write_text('{"from": "the winner"}\n')
            clock.now_s += CONFIRM_WITHIN_S + 1
            files.hold_sync.set()
            with pytest.raises(RunLockedError):
                await asyncio.wait_for(reply, 5)
            await service.close()

    run(scenario())
    assert settings.outfile.read_text() == '{"from": "the winner"}\n'


def test_a_service_that_hung_while_it_completed_leaves_the_winners_run_alone(
    settings: RunSettings,
) -> None:
    settings = replace(settings, checkpoint_every_s=1000.0)
    give_input(settings, 1)
    files, clock = BrokenFiles(), Standstill()
    ownership = owned_by_the_dead(settings.state_dir, files, clock=clock)
    segment = settings.state_dir / JOURNAL_DIR / "00000002-000002.journal"

    async def scenario() -> None:
        async with serving(settings, files, ownership=ownership) as service:
            (item,) = await take(service, 1)
            files.only = "out.jsonl"
            files.hold_sync.clear()
            await service.submit([answer(item)])
            await until(files.sync_waits)
            take_over(settings)
            segment.write_bytes(b"the winner's")
            clock.now_s += CONFIRM_WITHIN_S + 1
            files.hold_sync.set()
            await asyncio.wait_for(service.stopped.wait(), 5)
            assert isinstance(service.failure, RunLockedError)

    run(scenario())
    assert segment.read_bytes() == b"the winner's"
    assert yaml.safe_load((settings.state_dir / "run.yaml").read_text())["state"] == "running"


def test_a_start_that_hung_while_another_took_over_leaves_the_winners_run_alone(
    settings: RunSettings,
) -> None:
    give_input(settings, 3)
    files, clock = BrokenFiles(), Standstill()

    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 3)
            await service.submit([answer(items[0])])
        files.only = "journal"
        files.hold_sync.clear()
        ownership = owned_by_the_dead(settings.state_dir, files, clock=clock)
        service = DispatchService(settings, files=files, ownership=ownership)
        starting = asyncio.create_task(service.start())
        await until(files.sync_waits)  # what the one before wrote
        take_over(settings)
        with settings.outfile.open("a") as file:
            file.write('{"from": "the winner"}\n')
        output_before, journal_before = settings.outfile.read_bytes(), journal_bytes(settings)
        clock.now_s += CONFIRM_WITHIN_S + 1
        files.hold_sync.set()
        try:
            with pytest.raises(RunLockedError, match="node9"):
                await asyncio.wait_for(starting, 5)
        finally:
            await drop(service)
        assert settings.outfile.read_bytes() == output_before
        assert journal_bytes(settings) == journal_before

    run(scenario())


def test_an_idle_service_notices_by_itself_that_another_took_over(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "REFRESH_S", 0.02)
    give_input(settings, 1)

    async def scenario() -> None:
        async with serving(settings) as service:
            take_over(settings)
            await asyncio.wait_for(service.stopped.wait(), 5)
            assert isinstance(service.failure, RunLockedError)

    run(scenario())


def test_a_service_whose_state_directory_was_removed_ends_with_a_sentence(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "REFRESH_S", 0.02)
    give_input(settings, 1)

    async def scenario() -> None:
        async with serving(settings) as service:
            settings.state_dir.rename(settings.state_dir.with_name("aside"))
            await asyncio.wait_for(service.stopped.wait(), 5)
            assert isinstance(service.failure, StateError)
            assert str(settings.state_dir) in str(service.failure)

    run(scenario())


def test_a_claim_that_fails_now_and_then_is_tried_again_before_it_matters(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "REFRESH_S", 0.02)
    give_input(settings, 2)
    files = BrokenFiles()
    ownership = owned_by_the_dead(settings.state_dir, files)

    async def scenario() -> None:
        async with serving(settings, files, ownership=ownership) as service:
            files.fail_reopen = BROKEN
            for _ in range(3):
                await until(told_when_confirming(ownership))
            items = await take(service, 2)
            assert await service.submit([answer(items[0])]) == [Outcome.ACCEPTED]
            files.heal()
            await until(told_when_confirming(ownership))
            assert service.failure is None

    run(scenario())


def test_closing_ends_although_the_claim_cannot_be_confirmed(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "_CONFIRM_AGAIN_S", 0.01)
    give_input(settings, 2)
    files, clock = BrokenFiles(), Standstill()
    ownership = owned_by_the_dead(settings.state_dir, files, clock=clock)

    async def scenario() -> None:
        async with serving(settings, files, ownership=ownership) as service:
            await take(service, 1)
            files.fail_reopen = BROKEN
            clock.now_s += CONFIRM_WITHIN_S + 1
            await asyncio.wait_for(service.close(), 5)

    run(scenario())


@pytest.mark.parametrize("fault", ["fail_open", "fail_write", "fail_sync", "fail_sync_dir"])
def test_a_claim_that_cannot_be_written_at_the_start_is_one_sentence(
    settings: RunSettings, fault: str
) -> None:
    give_input(settings, 1)
    files = BrokenFiles()
    files.only = "000001"
    setattr(files, fault, FULL)

    async def scenario() -> None:
        service = DispatchService(settings, files=files)
        with pytest.raises(StorageError) as caught:
            await asyncio.wait_for(service.start(), 5)
        assert str(settings.state_dir) in str(caught.value)
        assert "No space left on device" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert service.stopped.is_set()
        assert not settings.outfile.exists()

    run(scenario())


@pytest.mark.parametrize("fault", ["fail_open", "fail_write", "fail_sync"])
def test_a_claim_that_could_not_be_written_does_not_hold_up_the_next_start(
    settings: RunSettings, fault: str
) -> None:
    give_input(settings, 1)
    files = BrokenFiles()
    files.only = "000001"
    setattr(files, fault, FULL)

    async def scenario() -> None:
        with pytest.raises(StorageError):
            await DispatchService(settings, files=files).start()
        service = DispatchService(settings)
        try:
            await asyncio.wait_for(service.start(), 5)
        finally:
            await service.close()

    run(scenario())
