"""One run through the service: what it promises is on disk, in order, once."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
import yaml

from dispatcher import service as service_module
from dispatcher.config import RunSettings
from dispatcher.core.work_queue import CRASH, QueuePolicy, WorkQueue
from dispatcher.errors import (
    DispatcherError,
    RunLockedError,
    StateError,
    StorageError,
    StorageFullError,
    SyncFailedError,
)
from dispatcher.models import (
    HeartbeatRequest,
    Outcome,
    ReleaseItem,
    ResultItem,
    StepItem,
    StepOutcome,
    WorkItem,
    WorkStatus,
)
from dispatcher.service import AwakeClock, DispatchService
from dispatcher.storage import writer as writer_module
from dispatcher.storage.files import Files
from dispatcher.storage.journal import JOURNAL_DIR
from dispatcher.storage.ownership import CONFIRM_WITHIN_S, OWNERS_DIR, Identity, Ownership
from tests.storage.broken_files import BROKEN, FULL, BrokenFiles, owned_by_the_dead

ERROR_KEYS = {"error", "work_id", "original_content", "attempts"}


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine, for at most 15 s."""
    asyncio.run(asyncio.wait_for(coroutine, 15))


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    return RunSettings(
        infile=tmp_path / "in.jsonl",
        outfile=tmp_path / "out.jsonl",
        state_dir=tmp_path / "out.jsonl.dispatch",
        policy=QueuePolicy(max_retries=1),
        retry_s=7.0,
    )


@pytest.fixture(autouse=True)
def no_pause_after_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "_FULL_PAUSE_S", 0.0)


def give_input(settings: RunSettings, lines: int) -> None:
    text = "".join(f'{{"n": {number}}}\n' for number in range(lines))
    settings.infile.write_text(text)


def line(number: int) -> str:
    return f'{{"result": {number}}}'


def answer(item: WorkItem, result: str | None = None) -> ResultItem:
    text = line(item.work_id) if result is None else result
    return ResultItem(item.work_id, text, item.run, item.lease)


def give_back(item: WorkItem, *, charge: bool = False) -> ReleaseItem:
    return ReleaseItem(item.work_id, item.lease, charge, "sigterm")


async def drop(service: DispatchService) -> None:
    """End the service as a kill does: nothing more is written, and its claim stays."""
    await asyncio.sleep(0)  # a task that never began would leave its coroutine behind
    for task in service._tasks:
        task.cancel()
    await asyncio.gather(*service._tasks, return_exceptions=True)
    for thread in (service._write_thread, service._read_thread, service._claim_thread):
        thread.shutdown()
    service._ownership._lock.release()
    if service._writer is not None:
        service._writer.close()
    if service._source is not None:
        service._source.close()


@contextlib.asynccontextmanager
async def serving(
    settings: RunSettings, files: Files | None = None, **options: Any
) -> AsyncIterator[DispatchService]:
    """A started service; whatever is left of it afterwards is dropped."""
    options.setdefault("ownership", owned_by_the_dead(settings.state_dir, files))
    service = DispatchService(settings, files=files, **options)
    try:
        await service.start()
        yield service
    finally:
        await drop(service)


async def take(service: DispatchService, count: int, worker: str = "w") -> list[WorkItem]:
    return (await service.get_work(worker, count)).items


async def completed(service: DispatchService) -> None:
    await asyncio.wait_for(service.finished.wait(), 5)


async def finish_everything(service: DispatchService) -> None:
    while items := await take(service, 100):
        await service.submit([answer(item) for item in items])
    await completed(service)


def output(settings: RunSettings) -> list[Any]:
    return [json.loads(text) for text in settings.outfile.read_text().splitlines()]


def expected(lines: Iterable[int]) -> list[Any]:
    return [json.loads(line(number)) for number in lines]


def durable(service: DispatchService) -> Any:
    return msgspec.to_builtins(service.queue.checkpoint())


def journal_bytes(settings: RunSettings) -> dict[str, bytes]:
    directory = settings.state_dir / JOURNAL_DIR
    return {path.name: path.read_bytes() for path in directory.glob("*.journal")}


async def settle_loop() -> None:
    """Let everything that can go on do so."""
    for _ in range(20):
        await asyncio.sleep(0)


async def until(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 5)


# -------------------------------------------------------------------- a run


def test_results_stand_at_the_position_of_their_line_whatever_order_they_came_in(
    settings: RunSettings,
) -> None:
    give_input(settings, 50)

    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 100)
            assert [item.content for item in items] == [f'{{"n": {n}}}' for n in range(50)]
            Random(1).shuffle(items)
            for item in items:
                assert await service.submit([answer(item)]) == [Outcome.ACCEPTED]
            await completed(service)
            reply = await service.get_work("w", 1)
            assert reply.status is WorkStatus.ALL_WORK_COMPLETE
            assert service.workers_told == {"w"}

    run(scenario())
    assert output(settings) == expected(range(50))


def test_a_complete_run_says_so_in_run_yaml_and_leaves_no_journal(settings: RunSettings) -> None:
    give_input(settings, 3)

    async def scenario() -> None:
        async with serving(settings) as service:
            await finish_everything(service)
            assert service.status()["state"] == "complete"

    run(scenario())
    content = yaml.safe_load((settings.state_dir / "run.yaml").read_text())
    assert content["state"] == "complete"
    assert content["output_bytes"] == settings.outfile.stat().st_size
    assert content["summary"]["done"] == 3
    assert list((settings.state_dir / "journal").iterdir()) == []


def test_a_journal_left_by_a_process_that_died_while_completing_goes_at_the_next_start(
    settings: RunSettings,
) -> None:
    give_input(settings, 3)
    run(complete_run(settings))
    (settings.state_dir / "journal" / "00000001-000001.journal").write_bytes(b"left behind")
    before = settings.outfile.read_bytes()

    run(complete_run(settings))

    assert list((settings.state_dir / "journal").iterdir()) == []
    assert settings.outfile.read_bytes() == before


async def complete_run(settings: RunSettings) -> None:
    async with serving(settings) as service:
        await finish_everything(service)
        assert service.finished.is_set()


def test_a_worker_that_finds_nothing_ready_is_told_when_to_ask_again(
    settings: RunSettings,
) -> None:
    give_input(settings, 1)

    async def scenario() -> None:
        async with serving(settings) as service:
            await take(service, 1)
            reply = await service.get_work("", 1)
            assert (reply.status, reply.retry_in, reply.items) == (WorkStatus.RETRY, 7.0, [])

    run(scenario())


def test_a_waiting_worker_gets_an_item_as_soon_as_another_gives_it_back(
    settings: RunSettings,
) -> None:
    give_input(settings, 1)

    async def scenario() -> None:
        async with serving(settings) as service:
            (item,) = await take(service, 1, "a")
            waiting = asyncio.create_task(service.get_work("b", 1, wait_s=10.0))
            await settle_loop()
            assert not waiting.done()
            assert await service.release([give_back(item)]) == 1
            (again,) = (await asyncio.wait_for(waiting, 5)).items
            assert (again.work_id, again.retry_count, again.attempt) == (0, 0, 1)
            assert again.lease != item.lease

    run(scenario())


def test_a_waiting_worker_is_told_as_soon_as_the_run_is_complete(settings: RunSettings) -> None:
    give_input(settings, 1)

    async def scenario() -> None:
        async with serving(settings) as service:
            (item,) = await take(service, 1, "a")
            waiting = asyncio.create_task(service.get_work("b", 1, wait_s=10.0))
            await settle_loop()
            await service.submit([answer(item)])
            reply = await asyncio.wait_for(waiting, 5)
            assert reply.status is WorkStatus.ALL_WORK_COMPLETE

    run(scenario())


def test_a_draining_service_hands_out_nothing_and_takes_results(settings: RunSettings) -> None:
    give_input(settings, 2)

    async def scenario() -> None:
        async with serving(settings) as service:
            (item,) = await take(service, 1)
            waiting = asyncio.create_task(service.get_work("b", 1, wait_s=0.0))
            await waiting
            await service.drain()
            assert (await service.get_work("w", 1, wait_s=10.0)).status is WorkStatus.RETRY
            assert await service.submit([answer(item)]) == [Outcome.ACCEPTED]

    run(scenario())


def test_one_reply_holds_a_bounded_amount_of_text_but_always_an_item(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "REPLY_BYTES", 20)
    give_input(settings, 10)

    async def scenario() -> None:
        async with serving(settings) as service:
            assert [item.work_id for item in await take(service, 10)] == [0, 1, 2]

    run(scenario())


def test_an_item_that_ran_out_of_reissues_leaves_its_line_and_history_in_the_output(
    settings: RunSettings,
) -> None:
    give_input(settings, 2)

    async def scenario() -> None:
        async with serving(settings) as service:
            for _ in range(2):
                (item,) = await take(service, 1)
                await service.release([give_back(item, charge=True)])
            await finish_everything(service)
            assert service.status()["tombstones"] == {"max_retries_exceeded": 1}

    run(scenario())
    first, second = output(settings)
    assert set(first["__ERROR__"]) == ERROR_KEYS
    assert first["__ERROR__"]["error"] == "max_retries_exceeded"
    assert first["__ERROR__"]["work_id"] == 0
    assert first["__ERROR__"]["original_content"] == '{"n": 0}'
    assert [end["reason"] for end in first["__ERROR__"]["attempts"]] == ["sigterm"] * 2
    assert second == {"result": 1}


def test_items_that_run_out_of_reissues_in_one_call_all_get_their_line(
    settings: RunSettings,
) -> None:
    settings = replace(settings, policy=QueuePolicy(max_retries=0))
    give_input(settings, 5)

    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 5)
            assert await service.release([give_back(i, charge=True) for i in items]) == 5
            await completed(service)

    run(scenario())
    assert [value["__ERROR__"]["work_id"] for value in output(settings)] == list(range(5))


def test_a_result_that_arrives_while_tombstones_are_being_made_is_kept(
    settings: RunSettings,
) -> None:
    settings = replace(settings, policy=QueuePolicy(max_retries=0))
    give_input(settings, 2)

    async def scenario() -> None:
        async with serving(settings) as service:
            first, second = await take(service, 2)
            reading, go_on = hold_reader(service)
            released = asyncio.create_task(
                service.release([give_back(i, charge=True) for i in (first, second)])
            )
            await until(reading)
            late = asyncio.create_task(service.submit([answer(second)]))
            await settle_loop()
            go_on.set()
            assert await released == 2
            assert await late == [Outcome.ACCEPTED]
            await completed(service)

    run(scenario())
    assert output(settings)[1] == {"result": 1}


@pytest.mark.parametrize("got_one_before", [False, True])
def test_an_item_that_became_solo_while_lines_were_read_still_goes_out_alone(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch, got_one_before: bool
) -> None:
    monkeypatch.setattr(service_module, "_SCAN_LINES", 1)
    give_input(settings, 5)

    async def scenario() -> None:
        async with serving(settings) as service:
            (item,) = await take(service, 1, "a")
            await service.release([crash(item)])
            (item,) = await take(service, 1, "a")
            if got_one_before:
                (other,) = await take(service, 1, "a")
                await service.release([give_back(other)])
            reading, go_on = hold_reader(service)
            asking = asyncio.create_task(service.get_work("b", 3))
            await until(reading)
            releasing = asyncio.create_task(service.release([crash(item)]))
            await settle_loop()
            go_on.set()
            assert await releasing == 1
            replies = [(await asking).items, await take(service, 3, "b"), await take(service, 3)]
            (alone,) = [reply for reply in replies if any(item.solo for item in reply)]
            assert [item.work_id for item in alone] == [0]

    run(scenario())


def crash(item: WorkItem) -> ReleaseItem:
    return ReleaseItem(item.work_id, item.lease, False, CRASH)


def hold_reader(service: DispatchService) -> tuple[threading.Event, threading.Event]:
    """Let the next read of the input wait; tells that it does, and how to let it go on."""
    reading, go_on = threading.Event(), threading.Event()
    source = service._source
    assert source is not None
    fetch, scan = source.fetch, source.scan

    def wait() -> None:
        reading.set()
        assert go_on.wait(10)

    def slow_fetch(*args: Any) -> Any:
        wait()
        return fetch(*args)

    def slow_scan(*args: Any) -> Any:
        wait()
        return scan(*args)

    source.fetch, source.scan = slow_fetch, slow_scan  # type: ignore[method-assign]
    return reading, go_on


# -------------------------------------------------------------------- what is taken


@pytest.mark.parametrize(
    "result",
    [
        None,
        "",
        " ",
        "{",
        "{}}",
        "{} {}",
        "NaN",
        '{"a": NaN}',
        '{"a": Infinity}',
        '{"a":\n1}',
        '{"a":\r1}',
        "{'a': 1}",
        "[1,]",
        "01",
        '"\x00"',
        '"a\tb"',
        '"\ud800"',
        '"\\ud800"',
        '{"__ERROR__": }',
        "x" * 200,
    ],
)
def test_a_result_that_is_not_json_on_one_line_ends_its_lease_charged_and_nothing_else(
    settings: RunSettings, result: str | None
) -> None:
    settings = replace(settings, max_result_bytes=100)
    give_input(settings, 3)

    async def scenario() -> None:
        async with serving(settings) as service:
            one, two, three = await take(service, 3)
            invalid = ResultItem(two.work_id, result, two.run, two.lease)
            outcomes = await service.submit([answer(one), invalid, answer(three)])
            assert outcomes == [Outcome.ACCEPTED, Outcome.INVALID, Outcome.ACCEPTED]
            assert service.invalid_results == 1
            (again,) = await take(service, 3)
            assert (again.work_id, again.retry_count) == (1, 1)

    run(scenario())


def test_a_result_nested_too_deeply_is_invalid_and_the_rest_of_the_batch_counts(
    settings: RunSettings,
) -> None:
    give_input(settings, 3)
    deep = "[" * 100_000 + "]" * 100_000

    async def scenario() -> None:
        async with serving(settings) as service:
            one, two, three = await take(service, 3)
            outcomes = await service.submit([answer(one), answer(two, deep), answer(three)])
            assert outcomes[::2] == [Outcome.ACCEPTED, Outcome.ACCEPTED]
            assert outcomes[1] is Outcome.INVALID

    run(scenario())


def test_a_result_of_exactly_the_largest_size_is_taken(settings: RunSettings) -> None:
    settings = replace(settings, max_result_bytes=100)
    give_input(settings, 2)

    async def scenario() -> None:
        async with serving(settings) as service:
            one, two = await take(service, 2)
            largest, larger = '"' + "x" * 98 + '"', '"' + "x" * 99 + '"'
            outcomes = await service.submit([answer(one, largest), answer(two, larger)])
            assert outcomes == [Outcome.ACCEPTED, Outcome.INVALID]

    run(scenario())


def test_a_result_is_written_as_the_worker_spaced_it(settings: RunSettings) -> None:
    give_input(settings, 1)
    text = '{ "a":1.50 , "b": "\\u00e4ä\u2028" }'

    async def scenario() -> None:
        async with serving(settings) as service:
            (item,) = await take(service, 1)
            await service.submit([answer(item, f"  {text} ")])
            await completed(service)

    run(scenario())
    assert settings.outfile.read_text() == text + "\n"


def test_an_item_of_another_run_changes_nothing(settings: RunSettings) -> None:
    give_input(settings, 1)

    async def scenario() -> None:
        async with serving(settings) as service:
            (item,) = await take(service, 1)
            before = durable(service)
            other = ResultItem(0, line(0), "another-run", item.lease)
            invalid = ResultItem(0, "not json", "another-run", item.lease)
            outcomes = await service.submit([other, invalid])
            assert outcomes == [Outcome.WRONG_RUN, Outcome.WRONG_RUN]
            assert await service.submit([other]) == [Outcome.WRONG_RUN]
            assert durable(service) == before

    run(scenario())


def test_an_old_client_without_run_lease_and_name_can_do_everything(
    settings: RunSettings,
) -> None:
    give_input(settings, 2)

    async def scenario() -> None:
        async with serving(settings) as service:
            await take(service, 2, "")
            assert await service.release([ReleaseItem(1)]) == 1
            assert await service.submit([ResultItem(0, line(0))]) == [Outcome.ACCEPTED]
            assert await service.submit([ResultItem(0, line(0))]) == [Outcome.DUPLICATE]
            assert await service.submit([ResultItem(7, line(0))]) == [Outcome.UNKNOWN]
            assert await service.submit([ResultItem(7, "bad")]) == [Outcome.UNKNOWN]
            (again,) = await take(service, 2, "")
            assert (again.work_id, again.retry_count) == (1, 1)  # charged, as it expects
            await service.submit([ResultItem(1, line(1))])
            await completed(service)

    run(scenario())
    assert output(settings) == expected(range(2))


def test_a_garbled_lease_releases_nothing(settings: RunSettings) -> None:
    give_input(settings, 1)

    async def scenario() -> None:
        async with serving(settings) as service:
            await take(service, 1, "")
            assert await service.release([ReleaseItem(0, "nonsense")]) == 0
            assert await service.release([ReleaseItem(0, "0.99")]) == 0

    run(scenario())


# -------------------------------------------------------------------- input that cannot be used


def test_an_empty_input_completes_at_once(settings: RunSettings) -> None:
    settings.infile.write_bytes(b"")

    async def scenario() -> None:
        async with serving(settings) as service:
            await completed(service)
            reply = await service.get_work("w", 1)
            assert reply.status is WorkStatus.ALL_WORK_COMPLETE

    run(scenario())
    assert settings.outfile.read_bytes() == b""


def test_an_input_of_blank_lines_only_is_all_error_lines(settings: RunSettings) -> None:
    settings.infile.write_bytes(b"\n \n\r\n")

    async def scenario() -> None:
        async with serving(settings) as service:
            reply = await service.get_work("w", 1)
            assert reply.status is WorkStatus.ALL_WORK_COMPLETE
            await completed(service)

    run(scenario())
    assert [value["__ERROR__"]["error"] for value in output(settings)] == ["blank_line"] * 3


def test_a_run_whose_last_lines_are_blank_completes(settings: RunSettings) -> None:
    settings.infile.write_bytes(b'{"n": 0}\n\n\n')

    async def scenario() -> None:
        async with serving(settings) as service:
            (item,) = await take(service, 1)
            await service.submit([answer(item)])
            assert not service.queue.is_complete
            reply = await service.get_work("w", 1)
            assert reply.status is WorkStatus.ALL_WORK_COMPLETE
            await completed(service)

    run(scenario())
    assert [v.get("__ERROR__", v).get("error") for v in output(settings)] == [
        None,
        "blank_line",
        "blank_line",
    ]


def test_lines_that_cannot_be_handed_out_are_error_lines_at_their_position(
    settings: RunSettings,
) -> None:
    settings = replace(settings, max_line_bytes=20)
    settings.infile.write_bytes(b'{"n": 0}\n\n\xff\xfe\n' + b"x" * 500 + b'\n{"n": 4}\n\xc3\xa4\n')

    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 10)
            assert [(i.work_id, i.content) for i in items] == [
                (0, '{"n": 0}'),
                (4, '{"n": 4}'),
                (5, "ä"),
            ]
            await service.submit([answer(item) for item in items])
            await completed(service)

    run(scenario())
    values = output(settings)
    errors = [value["__ERROR__"] for value in values[1:4]]
    assert [(e["error"], e["work_id"]) for e in errors] == [
        ("blank_line", 1),
        ("undecodable_line", 2),
        ("line_too_long", 3),
    ]
    assert [values[0], *values[4:]] == expected([0, 4, 5])


def test_an_input_cut_during_the_run_stops_it_with_a_sentence(settings: RunSettings) -> None:
    give_input(settings, 3)

    async def scenario() -> None:
        async with serving(settings) as service:
            settings.infile.write_bytes(b"")
            with pytest.raises(StateError, match="was cut"):
                await service.get_work("w", 1)
            assert service.stopped.is_set()
            with pytest.raises(StateError, match="was cut"):
                await service.submit([])

    run(scenario())


def test_an_input_cut_while_a_batch_is_being_written_is_still_what_stopped_the_run(
    settings: RunSettings,
) -> None:
    give_input(settings, 3)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(settings, files) as service:
            items = await take(service, 2)
            await service.release([give_back(items[1])])
            files.hold_sync.clear()
            submitting = asyncio.create_task(service.submit([answer(items[0])]))
            await until(files.sync_waits)
            settings.infile.write_bytes(b"")
            with pytest.raises(StateError, match="was cut"):
                await service.get_work("w", 1)
            files.hold_sync.set()
            await asyncio.gather(submitting, return_exceptions=True)
            await asyncio.to_thread(lambda: None)
            await settle_loop()
            await service._in_writer(lambda: None)
            await settle_loop()
            assert isinstance(service.failure, StateError), service.failure

    run(scenario())


# -------------------------------------------------------------------- acknowledge after durable


async def ask_for_work(service: DispatchService, _: list[WorkItem]) -> Any:
    return await service.get_work("w", 1)


async def submit_first(service: DispatchService, items: list[WorkItem]) -> Any:
    return await service.submit([answer(items[0])])


async def release_first(service: DispatchService, items: list[WorkItem]) -> Any:
    return await service.release([give_back(items[0])])


async def fail_first(service: DispatchService, items: list[WorkItem]) -> Any:
    return await service.submit([answer(items[0], "not json")])


async def beat_without_old_lease(service: DispatchService, items: list[WorkItem]) -> Any:
    for lease in service.queue.leases.values():
        lease.issued_at -= 1000.0
        lease.missed_heartbeats = 1
    return await service.heartbeat(HeartbeatRequest("w"))


async def record_first(service: DispatchService, items: list[WorkItem]) -> Any:
    return await service.record_steps([step(items[0], (0, 0))])


Verb = Callable[[DispatchService, list[WorkItem]], Coroutine[Any, Any, Any]]
VERBS = [
    ask_for_work,
    submit_first,
    release_first,
    fail_first,
    record_first,
    beat_without_old_lease,
]


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


async def finish_everything_but(service: DispatchService, items: list[WorkItem]) -> None:
    """Finish the run, whoever has what."""
    await service.submit([ResultItem(item.work_id, line(item.work_id)) for item in items])
    while True:
        await service.submit(
            [ResultItem(work_id, line(work_id)) for work_id in list(service.queue.items)]
        )
        if not await take(service, 10):
            break
    await completed(service)


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
    lines = 150
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
            if settings.outfile.exists() and rng.random() < 0.5:
                with settings.outfile.open("ab") as file:
                    file.write(b"{}\n" * rng.randint(0, 3))
        async with serving(settings) as service:
            await finish_everything_but(service, pending)

    if seed % 3 == 2:
        # The garbage of a torn write is not appended to a run that was complete.
        lines = 400
        give_input(settings, lines)
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


# -------------------------------------------------------------------- time


def test_a_stopped_server_charges_nobody_for_the_time_it_slept() -> None:
    times = iter([0.0, 1.0, 1000.0, 1002.0, 1001.0])
    clock = AwakeClock(lambda: next(times), longest_s=5.0)
    assert [clock.now() for _ in range(4)] == [1.0, 6.0, 8.0, 8.0]


def test_the_state_on_disk_replays_to_the_state_in_memory(settings: RunSettings) -> None:
    give_input(settings, 8)

    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 6)
            await service.submit([answer(items[4]), answer(items[1], "bad")])
            await service.release([give_back(items[2])])
            memory = durable(service)
        async with serving(settings) as service:
            assert isinstance(service.queue, WorkQueue)
            assert durable(service) == memory

    run(scenario())


# ---------------------------------------------------------------- what people are told


def test_errors_are_counted_by_kind_also_after_a_restart(settings: RunSettings) -> None:
    give_input(settings, 4)
    with settings.infile.open("a") as infile:
        infile.write("\n")

    def failed(item: WorkItem, kind: str) -> ResultItem:
        return answer(item, json.dumps({"__ERROR__": {"error": kind}}))

    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 5)
            await service.submit([failed(items[0], "no_answer"), failed(items[1], "no_answer")])
            await service.submit([failed(items[2], "too_long")])
            expected = {"no_answer": 2, "too_long": 1, "blank_line": 1}
            assert service.status()["errors"] == expected
            await drop(service)
        async with serving(settings) as service:
            assert service.status()["errors"] == expected
            assert service.status()["failed"] == 4

    run(scenario())


def test_kinds_of_errors_without_end_do_not_fill_the_memory(settings: RunSettings) -> None:
    give_input(settings, 150)

    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 150)
            await service.submit(
                [
                    answer(item, json.dumps({"__ERROR__": {"error": f"kind{item.work_id}"}}))
                    for item in items
                ]
            )
            errors = service.status()["errors"]
            assert len(errors) == 101
            assert errors["other"] == 50

    run(scenario())


def test_the_history_tells_of_lines_that_needed_more_than_one_attempt(
    settings: RunSettings,
) -> None:
    give_input(settings, 3)

    async def scenario() -> None:
        async with serving(settings) as service:
            first, second, third = await take(service, 3, "node1")
            await service.release([give_back(first, charge=True), give_back(second)])
            again = await take(service, 2, "node2")
            await service.submit([answer(item) for item in [*again, third]])

    run(scenario())

    (told,) = (settings.state_dir / "history.jsonl").read_text().splitlines()
    told = json.loads(told)
    assert (told["work_id"], told["outcome"], told["worker"]) == (0, "ok", "node2")
    assert [(a["attempt"], a["worker"], a["kind"]) for a in told["attempts"]] == [
        (1, "node1", "charged")
    ]


# -------------------------------------------------------------------- recorded steps


def step(
    item: WorkItem, pos: tuple[int, int], response: str | None = '"yes"', hash_: str = "abc"
) -> StepItem:
    return StepItem(item.work_id, str(item.lease), item.attempt, pos, hash_, response, item.run)


def steps_of(item: WorkItem) -> dict[tuple[int, int], tuple[str, str]]:
    """Return what an item carries: hash and answer by position, which come in order."""
    steps = item.steps or []
    assert [s.pos for s in steps] == sorted({s.pos for s in steps})
    return {s.pos: (s.hash, s.response) for s in steps}


async def again(service: DispatchService, item: WorkItem, **how: Any) -> WorkItem:
    """Give an item back, and return it as it is handed out next."""
    how = {"charge": False, "reason": "x", **how}
    assert await service.release([ReleaseItem(item.work_id, item.lease, **how)]) == 1
    (item,) = await take(service, 1)
    return item


async def copy_of(service: DispatchService, worker: str) -> asyncio.Task[Any]:
    """Let a worker ask when every item that runs has run for too long."""
    queue = service.queue
    queue._find_overdue = lambda now: list(queue.leases.values())  # type: ignore[method-assign]
    await service.heartbeat(HeartbeatRequest(worker))
    return asyncio.create_task(service.get_work(worker, 10))


THREE = {(0, 0): ("a1", '"yes"'), (1, 0): ("b2", '{"n": [1, 2]}'), (1, 1): ("c3", '"\u20ac"')}


async def record_three(service: DispatchService, item: WorkItem) -> None:
    steps = [step(item, pos, answer, hash_) for pos, (hash_, answer) in THREE.items()]
    outcomes = await service.record_steps(steps[:0:-1])
    outcomes += await service.record_steps(steps[:1])
    assert outcomes == [StepOutcome.ACCEPTED] * 3


def test_an_item_that_is_handed_out_again_carries_its_steps_as_they_were_recorded(
    settings: RunSettings,
) -> None:
    give_input(settings, 3)

    async def scenario() -> None:
        async with serving(settings) as service:
            item, other = await take(service, 2)
            assert item.steps is None
            await record_three(service, item)
            item = await again(service, item)
            assert steps_of(item) == THREE
            assert (await again(service, other)).steps is None
            await service.record_steps([step(item, (2, 0), "  7\t")])
            assert steps_of(await again(service, item)) == THREE | {(2, 0): ("abc", "7")}

    run(scenario())


KEPT_BY: dict[str, tuple[dict[str, Any], list[tuple[int, int]]]] = {
    "a free release": ({}, list(THREE)),
    "a charged release": ({"charge": True}, list(THREE)),
    "a crash": ({"reason": CRASH}, list(THREE)),
    "a release that drops them": ({"charge": True, "steps": "drop"}, []),
    "a release that drops them, whatever else it says": ({"steps": "drop", "keep_yields": 5}, []),
    "a release that keeps one yield": ({"keep_yields": 1}, [(0, 0)]),
    "a release that keeps two yields": ({"steps": "keep", "keep_yields": 2}, list(THREE)),
    "a release that keeps none": ({"keep_yields": 0}, []),
    "a release that keeps fewer than none": ({"keep_yields": -(2**70)}, []),
    "a release that keeps more than there are": ({"keep_yields": 2**70}, list(THREE)),
}


@pytest.mark.parametrize("end", KEPT_BY)
def test_what_an_item_still_carries_after(end: str, settings: RunSettings) -> None:
    how, kept = KEPT_BY[end]
    give_input(settings, 1)

    async def scenario() -> None:
        async with serving(settings) as service:
            (item,) = await take(service, 1)
            await record_three(service, item)
            item = await again(service, item, **how)
            assert list(steps_of(item)) == kept
            memory = durable(service)
        async with serving(settings) as service:
            assert durable(service) == memory
            assert list(steps_of(await again(service, item))) == kept

    run(scenario())


def test_a_result_that_is_none_and_an_old_clients_release_drop_the_steps(
    settings: RunSettings,
) -> None:
    settings = replace(settings, policy=QueuePolicy(max_retries=5))
    give_input(settings, 1)

    async def scenario() -> None:
        async with serving(settings) as service:
            (item,) = await take(service, 1)
            await record_three(service, item)
            await service.submit([answer(item, "not json")])
            (item,) = await take(service, 1, "")
            assert item.steps is None
            await record_three(service, item)
            await service.release([ReleaseItem(0, steps="drop")])
            (item,) = await take(service, 1)
            assert item.steps is None
            assert item.retry_count == 2

    run(scenario())


def test_steps_survive_kills_and_the_segments_that_hold_them(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every batch begins another segment, most of which hold a step of one of the items."""
    monkeypatch.setattr(writer_module, "SEGMENT_BYTES", 1)
    settings = replace(settings, checkpoint_every_s=0.0)
    give_input(settings, 40)
    wanted: dict[int, dict[tuple[int, int], tuple[str, str]]] = {0: {}, 39: {}}

    async def live(life: int) -> None:
        async with serving(settings) as service:
            if life == 0:
                await take(service, 40)
            for work_id in wanted:
                (lease,) = service.queue.items[work_id].leases
                item = WorkItem(work_id, "", lease=f"{work_id}.{lease.serial}")
                for number in range(3):
                    pos = (life, number)
                    value = (f"h{life}{number}", f'"{work_id}: {pos}"')
                    outcomes = await service.record_steps([step(item, pos, value[1], value[0])])
                    assert outcomes == [StepOutcome.ACCEPTED]
                    wanted[work_id][pos] = value
                item = await again(service, item)
                assert steps_of(item) == wanted[work_id]
            for work_id in range(1 + 5 * life, 6 + 5 * life):
                await service.submit([ResultItem(work_id, line(work_id))])

    async def scenario() -> None:
        for life in range(5):
            await live(life)
        assert len(journal_bytes(settings)) > 30
        async with serving(settings) as service:
            await service.submit([ResultItem(n, line(n)) for n in range(26)])
            await service._barrier(service.queue, force=True)
            await service._barrier(service.queue, force=True)
            assert steps_of(await again(service, WorkItem(39, "", lease=the_lease(service, 39))))
            status = service.status()
            assert (status["steps"], status["step_mismatches"]) == (30, 0)
            await service.submit([ResultItem(39, line(39))])
            for _ in range(3):
                await service._barrier(service.queue, force=True)
            # No step is left; what waits for line 26 stands in the segments since.
            assert len(service.queue.steps) == service.queue.steps.size == 0
            assert len(journal_bytes(settings)) < 10
            await finish_everything_but(service, [])
            assert service.status()["step_bytes"] == 0

    run(scenario())
    assert output(settings) == expected(range(40))
    assert yaml.safe_load((settings.state_dir / "run.yaml").read_text())["summary"]["steps"] == 30


def the_lease(service: DispatchService, work_id: int) -> str:
    (lease,) = service.queue.items[work_id].leases
    return f"{work_id}.{lease.serial}"


def test_a_copy_gets_the_steps_and_may_add_none(settings: RunSettings) -> None:
    give_input(settings, 1)

    async def scenario() -> None:
        async with serving(settings) as service:
            (item,) = await take(service, 1)
            await record_three(service, item)
            (copy,) = (await (await copy_of(service, "idle"))).items
            assert copy.lease != item.lease
            assert steps_of(copy) == THREE
            about = [step(copy, (2, 0)), step(item, (2, 0)), step(copy, (0, 0), None)]
            stale, accepted = StepOutcome.STALE, StepOutcome.ACCEPTED
            assert await service.record_steps(about) == [stale, accepted, stale]

    run(scenario())


def test_a_copy_never_gets_an_answer_under_the_hash_of_another_request(
    settings: RunSettings,
) -> None:
    """The older lease changes a step while the copy is on its way."""
    give_input(settings, 1)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(settings, files) as service:
            (item,) = await take(service, 1)
            await service.record_steps([step(item, (0, 0), '"for A"', "A")])
            await service.heartbeat(HeartbeatRequest("idle"))
            files.hold_sync.clear()
            asking = await copy_of(service, "idle")
            await until(files.sync_waits)
            assert service._writing is not None

            def change_it(_: object) -> None:
                """Do what a call does that comes just when the copy's lease is on disk."""
                (serial,) = (x.serial for x in service.queue.leases.values() if x.worker == "w")
                outcome = service.queue.record_step(0, serial, 1, (0, 0), "B", b'"for B"')
                assert outcome is StepOutcome.ACCEPTED

            service._writing.add_done_callback(change_it)
            files.hold_sync.set()
            (copy,) = (await asking).items
            assert service.queue.counters.steps == 2
            assert steps_of(copy) in (
                {},
                {(0, 0): ("A", '"for A"')},
                {(0, 0): ("B", '"for B"')},
            )

    run(scenario())


def test_a_step_that_is_sent_twice_is_not_acknowledged_before_it_is_on_disk(
    settings: RunSettings,
) -> None:
    give_input(settings, 1)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(settings, files) as service:
            (item,) = await take(service, 1)
            files.hold_sync.clear()
            first = asyncio.create_task(service.record_steps([step(item, (0, 0))]))
            await until(files.sync_waits)
            second = asyncio.create_task(service.record_steps([step(item, (0, 0))]))
            await settle_loop()
            assert not second.done()
            files.hold_sync.set()
            assert await first == await second == [StepOutcome.ACCEPTED]
            assert service.queue.counters.steps == 1

    run(scenario())


def test_steps_of_a_failed_write_are_not_there_and_those_before_are(
    settings: RunSettings,
) -> None:
    give_input(settings, 1)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(settings, files) as service:
            (item,) = await take(service, 1)
            await record_three(service, item)
            files.fail_write, files.only = FULL, "journal"
            both = [
                service.record_steps([step(item, (1, 0), '"lost"', "other")]),
                service.record_steps([step(item, (5, 0))]),
            ]
            failed = await asyncio.gather(*both, return_exceptions=True)
            assert [type(error) for error in failed] == [StorageFullError] * 2
            files.heal()
            assert service.queue.counters.steps == 3
            assert service.queue.counters.step_mismatches == 0
            assert steps_of(await again(service, item)) == THREE

    run(scenario())


def test_every_step_of_a_call_is_judged_for_itself(settings: RunSettings) -> None:
    give_input(settings, 2)

    async def scenario() -> None:
        async with serving(settings) as service:
            item, other = await take(service, 2)
            calls = [
                (step(item, (0, 0)), "accepted"),
                (replace_step(step(item, (1, 0)), run="another"), "wrong_run"),
                (replace_step(step(item, (1, 0)), run=None), "accepted"),
                (step(item, (2, 0), "{"), "invalid"),
                (step(item, (2, 0), "1\n"), "invalid"),
                (step(item, (-1, 0)), "invalid"),
                (step(item, (0, 2**31)), "invalid"),
                (step(item, (2, 0), hash_=""), "invalid"),
                (step(item, (2, 0), hash_="a b"), "invalid"),
                (step(item, (2, 0), None, hash_="x" * 65), "invalid"),
                (step(item, (2, 0), hash_="x" * 64), "accepted"),
                (replace_step(step(item, (3, 0)), lease=other.lease), "stale"),
                (replace_step(step(item, (3, 0)), lease="?"), "stale"),
                (replace_step(step(item, (3, 0)), work_id=7), "stale"),
                (replace_step(step(item, (3, 0)), attempt=2), "stale"),
                (step(other, (0, 0)), "accepted"),
            ]
            assert await service.record_steps([sent for sent, _ in calls]) == [x for _, x in calls]
            assert list(steps_of(await again(service, item))) == [(0, 0), (1, 0), (2, 0)]

    run(scenario())


def replace_step(step: StepItem, **changes: Any) -> StepItem:
    return msgspec.structs.replace(step, **changes)


def test_another_request_at_a_recorded_place_and_a_cut_are_counted_for_good(
    settings: RunSettings,
) -> None:
    give_input(settings, 1)

    async def scenario() -> None:
        async with serving(settings) as service:
            (item,) = await take(service, 1)
            await record_three(service, item)
            await service.record_steps([step(item, (1, 0), '"other"', "d4")])
            await service.record_steps([step(item, (1, 0), None, "d4")] * 2)
            status = service.status()
        async with serving(settings) as service:
            for told in (status, service.status()):
                assert (told["steps"], told["step_mismatches"]) == (4, 2)
                assert told["step_bytes"] == len('"yes"')
            assert list(steps_of(await again(service, item))) == [(0, 0)]

    run(scenario())


def test_the_steps_of_a_finished_item_are_gone_and_no_late_one_comes_back(
    settings: RunSettings,
) -> None:
    give_input(settings, 2)

    async def scenario() -> None:
        async with serving(settings) as service:
            item, other = await take(service, 2)
            await record_three(service, other)
            await service.submit([answer(other)])
            assert await service.record_steps([step(other, (2, 0))]) == [StepOutcome.STALE]
            for _ in range(2):
                await record_three(service, item) if not item.retry_count else None
                await service.release([ReleaseItem(0, item.lease, True, "x")])
                for found in await take(service, 1):
                    item = found
            assert service.queue.counters.tombstones == {"max_retries_exceeded": 1}
            assert service.status()["step_bytes"] == 0
            assert len(service.queue.steps) == 0
            await completed(service)

    run(scenario())


def test_a_draining_service_still_takes_steps(settings: RunSettings) -> None:
    give_input(settings, 2)

    async def scenario() -> None:
        async with serving(settings) as service:
            (item,) = await take(service, 1)
            await service.drain()
            await record_three(service, item)
            await service.close()
        async with serving(settings) as service:
            assert steps_of(await again(service, item)) == THREE

    run(scenario())


def test_sixteen_mib_of_steps_go_out_with_their_item_and_no_more_are_taken(
    settings: RunSettings,
) -> None:
    give_input(settings, 2)
    large = [f'"{n:x}' + "\u20ac" * 349_524 + '"' for n in range(16)]

    async def scenario() -> None:
        async with serving(settings) as service:
            (item,) = await take(service, 1)
            most = [step(item, (n, 0), text + " " * 9) for n, text in enumerate(large)]
            assert await service.record_steps(most) == [StepOutcome.ACCEPTED] * 16
            assert service.queue.steps.size == 16 * ((1 << 20) - 1)
            for text in ("1" * 17, "1" * ((1 << 20) + 1)):
                assert await service.record_steps([step(item, (16, 0), text)]) == ["full"]
            assert await service.record_steps([step(item, (16, 0), "1" * 16)]) == ["accepted"]
            assert await service.record_steps([step(item, (17, 0), "1")]) == ["full"]
        async with serving(settings) as service:
            found = steps_of(await again(service, item))
            assert [text for _, text in found.values()] == [*large, "1" * 16]

    run(scenario())


def bytes_of(item: WorkItem) -> int:
    return len(item.content) + 1 + sum(len(step.response) for step in item.steps or [])


def assert_within(items: list[WorkItem], limit: int) -> None:
    assert sum(map(bytes_of, items[:-1])) < limit, "more items than the reply has room for"


async def with_steps_of(service: DispatchService, items: list[WorkItem], size: int) -> None:
    steps = [step(item, (0, 0), "1" * size) for item in items]
    assert set(await service.record_steps(steps)) == {StepOutcome.ACCEPTED}


def test_one_reply_holds_a_bounded_amount_of_steps_but_always_an_item(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "REPLY_BYTES", 1000)
    give_input(settings, 8)

    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 5)
            await with_steps_of(service, items[:4], 600)
            await with_steps_of(service, items[4:], 2000)
            await service.release([give_back(item) for item in items])
            replies = [await take(service, 10) for _ in range(4)]
            numbers = [[item.work_id for item in reply] for reply in replies]
            assert numbers == [[0, 1], [2, 3], [4], [5, 6, 7]]

    run(scenario())


def test_a_reply_of_copies_holds_a_bounded_amount_too(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "REPLY_BYTES", 1000)
    give_input(settings, 6)

    async def scenario() -> None:
        async with serving(settings) as service:
            await with_steps_of(service, await take(service, 10), 600)
            items = (await (await copy_of(service, "idle"))).items
            assert_within(items, 1000)
            assert len(items) == 2

    run(scenario())


def test_a_reply_stays_bounded_when_items_with_steps_come_back_while_lines_are_read(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "REPLY_BYTES", 1000)
    monkeypatch.setattr(service_module, "_SCAN_LINES", 3)
    give_input(settings, 30)

    async def scenario() -> None:
        async with serving(settings) as service:
            held = await take(service, 3)
            await with_steps_of(service, held, 900)
            reading, go_on = hold_reader(service)
            asking = asyncio.create_task(service.get_work("other", 20))
            await until(reading)
            await service.release([give_back(item) for item in held])
            go_on.set()
            items = (await asking).items
            assert [item.work_id for item in items][:2] == [0, 1]
            assert_within(items, 1000)

    run(scenario())


def test_a_run_that_records_nothing_says_so(settings: RunSettings) -> None:
    settings = replace(settings, policy=QueuePolicy(run_step_bytes=0))
    give_input(settings, 1)

    async def scenario() -> None:
        async with serving(settings) as service:
            assert not service.records_steps
            (item,) = await take(service, 1)
            assert await service.record_steps([step(item, (0, 0), "1")]) == [StepOutcome.FULL]
            assert service.queue.counters.steps == 0
            assert (await again(service, item)).steps is None

    run(scenario())


def test_the_run_takes_no_more_steps_than_its_limit(settings: RunSettings) -> None:
    settings = replace(settings, policy=QueuePolicy(run_step_bytes=10))
    give_input(settings, 2)

    async def scenario() -> None:
        async with serving(settings) as service:
            assert service.records_steps
            one, other = await take(service, 2)
            assert await service.record_steps(
                [step(one, (0, 0), "1" * 9), step(other, (0, 0), "22"), step(other, (0, 0), "2")]
            ) == ["accepted", "full", "accepted"]
            await service.submit([answer(one)])
            assert await service.record_steps([step(other, (1, 0), "2" * 9)]) == ["accepted"]

    run(scenario())


def test_an_item_whose_steps_cannot_be_read_goes_out_without_them(settings: RunSettings) -> None:
    give_input(settings, 2)
    files = BrokenFiles()

    async def scenario() -> None:
        async with serving(settings, files) as service:
            (item,) = await take(service, 1)
            await record_three(service, item)
            files.fail_read = BROKEN
            item = await again(service, item)
            assert item.steps is None
            files.heal()
            item = await again(service, item)
            assert steps_of(item) == THREE
            await service.submit([answer(item)])
            await finish_everything(service)

    run(scenario())


@pytest.mark.parametrize("harm", ["missing", "damaged"])
def test_an_item_whose_segment_of_steps_is_lost_goes_out_without_them(
    harm: str, settings: RunSettings
) -> None:
    give_input(settings, 2)

    async def scenario() -> None:
        async with serving(settings) as service:
            (item,) = await take(service, 1)
            await record_three(service, item)
        async with serving(settings):
            pass
        (path, *_) = sorted((settings.state_dir / JOURNAL_DIR).glob("*.journal"))
        whole = path.read_bytes()
        path.unlink()
        if harm == "damaged":
            path.write_bytes(whole.replace(b'"yes"', b'"yet"'))
        async with serving(settings) as service:
            item = await again(service, item)
            assert item.steps is None
            await service.submit([answer(item)])
            await finish_everything(service)

    run(scenario())
    assert output(settings) == expected(range(2))


def test_an_answer_nested_as_deep_as_is_taken_survives_a_restart(settings: RunSettings) -> None:
    give_input(settings, 1)

    async def scenario() -> None:
        async with serving(settings) as service:
            (item,) = await take(service, 1)
            taken, refused = 1, 100_000
            while refused - taken > 1:
                depth = (taken + refused) // 2
                text = "[" * depth + "]" * depth
                (outcome,) = await service.record_steps([step(item, (0, 0), text, f"h{depth}")])
                if outcome == "accepted":
                    taken, deepest = depth, text
                else:
                    assert outcome == "invalid"
                    refused = depth
            assert taken > 100
        async with serving(settings) as service:
            assert [text for _, text in steps_of(await again(service, item)).values()] == [deepest]

    run(scenario())
