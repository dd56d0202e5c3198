"""A run through the service: what is handed out, what is taken, what people are told."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from random import Random
from typing import Any

import msgspec
import pytest
import yaml

from dispatcher import line_feed
from dispatcher import service as service_module
from dispatcher.config import RunSettings
from dispatcher.core.work_queue import QueuePolicy, WorkQueue
from dispatcher.errors import (
    StateError,
)
from dispatcher.models import (
    Outcome,
    ReleaseItem,
    ResultItem,
    WorkItem,
    WorkStatus,
)
from dispatcher.service import AwakeClock
from tests.service.support import (
    ERROR_KEYS,
    answer,
    completed,
    crash,
    drop,
    durable,
    expected,
    finish_everything,
    give_back,
    give_input,
    hold_reader,
    line,
    output,
    run,
    serving,
    settle_loop,
    take,
    until,
)
from tests.storage.broken_files import BrokenFiles

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
    monkeypatch.setattr(line_feed, "_SCAN_LINES", 1)
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


# -------------------------------------------------------------------- what people are told


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


# -------------------------------------------------------------------- an engine that died


def renewing(item: WorkItem, **fields: Any) -> ReleaseItem:
    release = ReleaseItem(item.work_id, item.lease, False, "crash", renew=True)
    return msgspec.structs.replace(release, **fields)


def test_a_renewed_lease_is_on_disk_when_the_reply_leaves_and_survives_a_restart(
    settings: RunSettings,
) -> None:
    give_input(settings, 2)

    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 2)
            reply = await service.take_back([renewing(item) for item in items], "w")
            assert reply.released_count == 2
            before = durable(service)
        async with serving(settings) as service:
            assert durable(service)["items"] == before["items"]
            again = await service.take_back([renewing(item) for item in items], "w")
            assert (again.released_count, again.renewed) == (0, reply.renewed)
            assert await take(service, 9) == []
            assert service.queue.counters.crashed == 2
            for item, grant in zip(items, reply.renewed or (), strict=True):
                item.lease = grant.renewed
            await service.submit([answer(item) for item in items])
            await completed(service)

    run(scenario())
    assert output(settings) == expected(range(2))


def test_a_server_that_ends_renews_nothing_but_tells_what_it_renewed(
    settings: RunSettings,
) -> None:
    give_input(settings, 2)

    async def scenario() -> None:
        async with serving(settings) as service:
            before, after = await take(service, 2)
            told = await service.take_back([renewing(before)], "w")
            await service.drain()

            assert await service.take_back([renewing(before)], "w") == msgspec.structs.replace(
                told, released_count=0
            )
            assert (await service.take_back([renewing(after)], "w")).renewed is msgspec.UNSET
            assert service.queue.counters.crashed == 2

    run(scenario())


@pytest.mark.parametrize(
    "fields",
    [
        {"reason": "sigterm"},
        {"charge": True},
        {"steps": "drop"},
        {"keep_yields": 1},
        {"fresh_start": True},
        {"renew": False},
    ],
)
def test_only_a_plain_crash_is_renewed(settings: RunSettings, fields: dict[str, Any]) -> None:
    give_input(settings, 1)

    async def scenario() -> None:
        async with serving(settings) as service:
            (item,) = await take(service, 1)
            reply = await service.take_back([renewing(item, **fields)], "w")
            assert (reply.released_count, reply.renewed) == (1, msgspec.UNSET)
            assert not service.queue.leases

    run(scenario())
