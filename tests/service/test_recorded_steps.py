"""Recorded steps through the service: kept, handed out again, dropped."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import yaml

from dispatcher import line_feed
from dispatcher import service as service_module
from dispatcher.config import RunSettings
from dispatcher.core.work_queue import CRASH, QueuePolicy
from dispatcher.errors import (
    StorageFullError,
)
from dispatcher.models import (
    HeartbeatRequest,
    ReleaseItem,
    ResultItem,
    StepItem,
    StepOutcome,
    WorkItem,
)
from dispatcher.service import DispatchService
from dispatcher.storage import writer as writer_module
from dispatcher.storage.journal import JOURNAL_DIR
from tests.service.support import (
    again,
    answer,
    completed,
    durable,
    expected,
    finish_everything,
    finish_everything_but,
    give_back,
    give_input,
    hold_reader,
    journal_bytes,
    line,
    output,
    run,
    serving,
    settle_loop,
    step,
    take,
    until,
)
from tests.storage.broken_files import BROKEN, FULL, BrokenFiles


def steps_of(item: WorkItem) -> dict[tuple[int, int], tuple[str, str]]:
    """Return what an item carries: hash and answer by position, which come in order."""
    steps = item.steps or []
    assert [s.pos for s in steps] == sorted({s.pos for s in steps})
    return {s.pos: (s.hash, s.response) for s in steps}


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
            writing = service._writing
            assert writing is not None
            give = writing.give

            def change_it() -> None:
                """Do what a call does that comes just when the copy's lease is on disk."""
                (serial,) = (x.serial for x in service.queue.leases.values() if x.worker == "w")
                outcome = service.queue.record_step(0, serial, 1, (0, 0), "B", b'"for B"')
                assert outcome is StepOutcome.ACCEPTED
                give()

            writing.give = change_it  # type: ignore[method-assign]
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
    monkeypatch.setattr(line_feed, "_SCAN_LINES", 3)
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
