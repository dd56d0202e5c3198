"""The worker's side of the protocol: what it fetches, reports and gives back, and when."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dispatcher.config import RunSettings
from dispatcher.errors import (
    AccessDeniedError,
    BackendError,
    BadRequestError,
    ServerLostError,
    TaskRetry,
)
from dispatcher.models import (
    BatchResultResponse,
    HeartbeatRequest,
    HeartbeatResponse,
    ReleaseItem,
    ReleaseWorkResponse,
    RenewedLease,
    Step,
    StepItem,
    StepOutcome,
    StepsResponse,
    WorkerStats,
    WorkItem,
    WorkStatus,
)
from dispatcher.service import DispatchService
from dispatcher.taskmanager.execution import Answered, Attempt, Raised, WantsRetry
from dispatcher.taskmanager.steps import StepLog, response_text
from dispatcher.taskmanager.tasksource import leased
from dispatcher.taskmanager.tasksource.base import Assignment
from dispatcher.taskmanager.tasksource.file import ServiceLink
from dispatcher.taskmanager.tasksource.leased import LeasedSource
from tests.taskmanager.doubles import (
    StubBackend,
    StubLink,
    TaskGenerator,
    answer,
    ask,
    managed,
    run,
    task_of,
    turns,
    until,
)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask a server that is away again after milliseconds, not seconds."""
    monkeypatch.setattr(leased, "_FIRST_DELAY_S", 0.005)
    monkeypatch.setattr(leased, "_LONGEST_DELAY_S", 0.02)


def line(number: int, **fields: Any) -> WorkItem:
    return WorkItem(number, f'{{"key": "i{number}"}}', lease=f"{number}.1", run="r", **fields)


def lines(count: int) -> list[WorkItem]:
    return [line(number) for number in range(count)]


def question(self: Any) -> TaskGenerator:
    response = yield ask(self.data["key"])
    return {"key": self.data["key"], "text": response.get_text()}


def source_of(
    link: StubLink,
    generator: Callable[[Any], Any] = question,
    *,
    batch_size: int = 4,
    server_timeout_s: float = 5.0,
) -> LeasedSource:
    return LeasedSource(
        link,
        task_of(generator),
        worker="w",
        batch_size=batch_size,
        server_timeout_s=server_timeout_s,
        backend_up=lambda: True,
        stats=WorkerStats,
    )


@asynccontextmanager
async def started(
    link: StubLink, wanted: Callable[[], int] = lambda: 0, **options: Any
) -> AsyncIterator[LeasedSource]:
    """Run a source whose test takes items itself, and end it."""
    source = source_of(link, **options)
    await source.start(wanted)
    try:
        yield source
    finally:
        for task in (source._exchange, source._poll):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])


async def finish(source: LeasedSource, item: Assignment, outcome: Any = None) -> None:
    await source.finish(item, Attempt(item.build), outcome or Answered('{"done": true}'))


async def begin(source: LeasedSource) -> Assignment:
    """Take the next item as the manager does."""
    item = await source.next()
    assert item is not None
    item.progress = 1
    return item


async def take_all(source: LeasedSource) -> None:
    """Take items for ever."""
    while True:
        await source.next()


def released(link: StubLink) -> dict[int, ReleaseItem]:
    counts = Counter(item.work_id for item in link.released)
    assert set(counts.values()) <= {1}, "each is released once"
    return {item.work_id: item for item in link.released}


async def work_through(source: LeasedSource, workers: int = 4) -> None:
    await managed(source, StubBackend(), workers=workers).run()


# --- fetching -----------------------------------------------------------------------------------


def test_every_line_is_answered_once_and_then_the_connection_is_closed() -> None:
    async def scenario() -> None:
        link = StubLink(*lines(500))

        await work_through(source_of(link))

        assert sorted(item.work_id for item in link.submitted) == list(range(500))
        assert all(
            json.loads(item.result or "") == {"key": f"i{item.work_id}", "text": "yes"}
            for item in link.submitted
        )
        assert {(item.lease, item.run) for item in link.submitted} == {
            (f"{n}.1", "r") for n in range(500)
        }
        assert not link.released
        assert link.closed

    run(scenario())


def test_it_keeps_a_batch_ahead_of_what_the_manager_could_start() -> None:
    async def scenario() -> None:
        link = StubLink(*lines(100))
        async with started(link, lambda: 3, batch_size=8) as source:
            await until(lambda: link.asked, "the first call")
            assert link.asked[0][0] == 11

            await until(lambda: len(source.heartbeat_request().held) >= 11, "the items")
            await asyncio.sleep(0.02)
            assert len(source.heartbeat_request().held) == 11  # and no more than that

    run(scenario())


def test_it_asks_again_when_half_of_what_was_ready_is_taken_not_for_every_item() -> None:
    async def scenario() -> None:
        link = StubLink(*lines(100))
        async with started(link, batch_size=8) as source:
            await until(lambda: len(source.heartbeat_request().held) == 8, "the items")
            for _ in range(3):
                await source.next()
            await asyncio.sleep(0.02)
            assert [count for count, _ in link.asked] == [8]

            await source.next()
            await until(lambda: len(link.asked) == 2, "another call")
            assert link.asked[1][0] == 4

    run(scenario())


def test_a_call_for_work_is_held_open_by_the_server_and_there_is_only_one() -> None:
    async def scenario() -> None:
        link = StubLink()
        link.open = {0}  # somebody else works on the last line
        async with started(link) as source:
            taking = asyncio.ensure_future(source.next())
            await until(lambda: link.asked, "the call")
            await asyncio.sleep(0.03)
            assert link.asked == [(4, leased.POLL_S)]

            link.work.append(line(7))
            item = await asyncio.wait_for(taking, 2)
            assert item is not None
            assert item.key == "7.1"

    run(scenario())


def test_when_results_go_out_the_want_for_more_rides_on_them() -> None:
    async def scenario() -> None:
        link = StubLink(*lines(100))
        under_way, go_on = asyncio.Event(), asyncio.Event()
        submit = link.submit_results

        async def slowly(items: Any, want: int = 0) -> Any:
            under_way.set()
            await go_on.wait()
            return await submit(items, want)

        link.submit_results = slowly  # type: ignore[method-assign]
        async with started(link, batch_size=8) as source:
            first = await begin(source)
            await finish(source, first)
            await under_way.wait()
            later = [await begin(source) for _ in range(5)]  # while that report is under way
            await finish(source, later[0])
            go_on.set()
            await until(lambda: len(link.submitted) == 2, "both results")
            await until(lambda: len(source.heartbeat_request().held) == 12, "six more items")

            assert link.wants == [0, 6]
            assert len(link.asked) == 1  # the very first call

    run(scenario())


def test_results_that_are_ready_together_go_in_one_call() -> None:
    async def scenario() -> None:
        link = StubLink(*lines(50))
        async with started(link, batch_size=50) as source:
            items = [await begin(source) for _ in range(50)]
            for item in items:
                await finish(source, item)
            await until(lambda: len(link.submitted) == 50, "the results")

            assert len(link.wants) <= 2

    run(scenario())


def test_a_report_is_bounded_in_items_and_in_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leased, "_REPORT_ITEMS", 10)
    monkeypatch.setattr(leased, "_REPORT_CHARACTERS", 5000)

    async def scenario() -> None:
        link = StubLink(*lines(40))
        sizes: list[tuple[int, int]] = []
        submit = link.submit_results

        async def noting(items: Any, want: int = 0) -> Any:
            sizes.append((len(items), sum(len(item.result) for item in items)))
            return await submit(items, want)

        link.submit_results = noting  # type: ignore[method-assign]
        async with started(link, batch_size=40) as source:
            for number in range(40):
                item = await begin(source)
                result = json.dumps({"x": "y" * (2000 if number < 20 else 1)})
                await finish(source, item, Answered(result))
            await until(lambda: len(link.submitted) == 40, "the results")

            assert max(count for count, _ in sizes) == 10
            assert max(size for _, size in sizes) < 5000 + 2 * 2100

    run(scenario())


def test_the_server_may_send_the_worker_away_for_a_while() -> None:
    async def scenario() -> None:
        link = StubLink()
        link.open, link.retry_in = {0}, 0.15
        async with started(link) as source:
            taking = asyncio.ensure_future(source.next())
            await until(lambda: link.asked, "the first call")
            start = time.monotonic()
            await asyncio.sleep(0.1)
            assert len(link.asked) == 1

            link.work.append(line(0))
            await asyncio.wait_for(taking, 2)
            assert len(link.asked) == 2
            assert time.monotonic() - start >= 0.14

    run(scenario())


def test_results_go_out_while_the_worker_is_sent_away_and_ask_for_nothing() -> None:
    async def scenario() -> None:
        link = StubLink(line(0))
        link.open.add(1)
        link.retry_in = 30.0
        async with started(link) as source:
            item = await begin(source)
            await until(lambda: len(link.asked) == 2, "it is sent away")
            await finish(source, item)
            await until(lambda: link.submitted, "the result")

            assert link.wants == [0]

    run(scenario())


def test_an_older_servers_items_without_leases_go_by_their_line() -> None:
    async def scenario() -> None:
        link = StubLink(*(WorkItem(n, f'{{"key": "i{n}"}}') for n in range(20)))

        await work_through(source_of(link))

        assert sorted(item.work_id for item in link.submitted) == list(range(20))
        assert {item.lease for item in link.submitted} == {None}

    run(scenario())


def test_a_line_that_needs_the_engine_for_itself_says_so() -> None:
    async def scenario() -> None:
        async with started(StubLink(line(0, solo=True), line(1))) as source:
            assert [(await begin(source)).solo for _ in range(2)] == [True, False]

    run(scenario())


def test_when_all_work_is_complete_what_is_held_is_dropped() -> None:
    """Others answered it; a result that is finished here is reported all the same."""

    async def scenario() -> None:
        link = StubLink(*lines(3))
        async with started(link, lambda: 4, batch_size=3) as source:
            cancelled: list[str] = []
            items = [await begin(source) for _ in range(3)]
            for item in items:
                item.cancel = lambda key=item.key: cancelled.append(key)  # type: ignore[misc]
            await finish(source, items[0])
            link.open.clear()

            assert await asyncio.wait_for(source.next(), 2) is None
            assert sorted(cancelled) == ["1.1", "2.1"]
            assert source.heartbeat_request().held == {}
            await until(lambda: link.submitted, "the result")
            await source.close()
            assert not link.released

    run(scenario())


# --- how an attempt's end is reported -----------------------------------------------------------


async def report(item: WorkItem, outcome: Any) -> StubLink:
    """Report one item's end and return what the server was told."""
    link = StubLink(item)
    async with started(link) as source:
        await finish(source, await begin(source), outcome)
        await until(lambda: link.submitted or link.released, "the report")
        assert source.heartbeat_request().held == {}
    return link


def test_a_task_that_wants_another_attempt_is_released_charged_without_its_steps() -> None:
    link = run(report(line(0), WantsRetry("the model rambled")))

    assert link.released == [
        ReleaseItem(0, "0.1", True, "task_retry: the model rambled", "drop", 0, fresh_start=True)
    ]
    assert not link.submitted


@pytest.mark.parametrize("retries", [(0, 3), (2, 3), (50, -1), (5, None)])
def test_an_exception_is_released_charged_while_attempts_are_left(
    retries: tuple[int, int | None],
) -> None:
    item = line(0, retry_count=retries[0], max_retries=retries[1])
    link = run(report(item, Raised("KeyError: 'x'", "t.py:3 in f")))

    [release] = link.released
    assert (release.work_id, release.lease, release.charge) == (0, "0.1", True)
    assert release.reason == "task_exception: KeyError: 'x' (t.py:3 in f)"
    assert not link.submitted


@pytest.mark.parametrize("retries", [(3, 3), (0, 0), (4, 3)])
def test_the_last_attempts_exception_is_the_lines_error_line(retries: tuple[int, int]) -> None:
    item = line(0, retry_count=retries[0], max_retries=retries[1])
    link = run(report(item, Raised("KeyError: 'x'", "t.py:3 in f")))

    assert not link.released
    error = json.loads(link.submitted[0].result or "")["__ERROR__"]
    assert error["error"] == "task_exception"
    assert error["message"] == "KeyError: 'x'"
    assert error["place"] == "t.py:3 in f"
    assert error["original_content"] == '{"key": "i0"}'


def test_a_retry_in_the_last_attempt_is_the_servers_to_judge() -> None:
    link = run(report(line(0, retry_count=3, max_retries=3), WantsRetry("again")))

    assert [release.charge for release in link.released] == [True]


@pytest.mark.parametrize(
    "outcome", [WantsRetry("half a \ud83d"), Raised("ValueError: half a \ud83d", "p")]
)
def test_a_reason_that_quotes_half_a_surrogate_pair_can_be_sent(outcome: Any) -> None:
    link = run(report(line(0), outcome))

    assert b"half a " in msgspec.json.encode(link.released)


def test_a_long_reason_is_cut() -> None:
    link = run(report(line(0), WantsRetry("x" * 10_000)))

    assert len(link.released[0].reason) == 500


# --- the server goes away -----------------------------------------------------------------------


def test_while_the_server_is_away_work_goes_on_and_every_result_arrives_once() -> None:
    async def scenario() -> None:
        link = StubLink(*lines(60))
        source = source_of(link, batch_size=30)
        backend = StubBackend(delay_s=0.002)
        working = asyncio.ensure_future(managed(source, backend, workers=2).run())
        await until(lambda: len(link.submitted) >= 5, "the first results")
        link.up = False
        reported, asked = len(link.submitted), len(backend.log)
        await until(lambda: len(backend.log) >= asked + 15, "work goes on")
        assert len(link.submitted) == reported
        link.up = True
        await asyncio.wait_for(working, 5)

        assert sorted(item.work_id for item in link.submitted) == list(range(60))

    run(scenario())


def test_a_report_whose_reply_was_lost_is_sent_again() -> None:
    async def scenario() -> None:
        link = StubLink(*lines(10))
        link.loses_replies = 2

        await work_through(source_of(link))

        counts = Counter(item.work_id for item in link.submitted)
        assert set(counts) == set(range(10))
        assert not link.open

    run(scenario())


def test_releases_wait_for_the_server_too() -> None:
    async def scenario() -> None:
        link = StubLink(*lines(2))
        async with started(link) as source:
            items = [await begin(source) for _ in range(2)]
            link.up = False
            for item in items:
                await finish(source, item, WantsRetry("again"))
            attempts = link.attempts
            await until(lambda: link.attempts > attempts + 3, "it keeps trying")
            link.up = True
            await until(lambda: len(link.released) == 2, "the releases")

            assert sorted(released(link)) == [0, 1]

    run(scenario())


def test_it_asks_an_absent_server_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leased, "_FIRST_DELAY_S", 0.02)
    monkeypatch.setattr(leased, "_LONGEST_DELAY_S", 5.0)

    async def scenario() -> None:
        link = StubLink(line(0))
        link.up = False
        async with started(link):
            await asyncio.sleep(0.2)
            assert 2 <= link.attempts <= 5

    run(scenario())


@pytest.mark.parametrize("has_results", [False, True])
def test_a_server_that_stays_away_for_longer_than_the_time_out_is_lost(has_results: bool) -> None:
    async def scenario() -> None:
        link = StubLink(*lines(2))
        async with started(link, server_timeout_s=0.1, batch_size=1) as source:
            item = await begin(source)
            link.up = False
            start = time.monotonic()
            if has_results:
                await finish(source, item)
            with pytest.raises(ServerLostError, match=r"--server-timeout"):
                await asyncio.wait_for(take_all(source), 2)

            assert time.monotonic() - start > 0.1

    run(scenario())


def test_a_lost_server_ends_the_manager_too() -> None:
    async def scenario() -> None:
        link = StubLink(*lines(50))
        source = source_of(link, server_timeout_s=0.1)
        working = asyncio.ensure_future(
            managed(source, StubBackend(delay_s=0.002), workers=2).run()
        )
        await until(lambda: len(link.submitted) >= 5, "the first results")
        link.up = False
        await asyncio.wait([working], timeout=4)

        assert isinstance(working.exception(), ServerLostError)
        assert link.closed

    run(scenario())


def test_a_server_that_was_away_and_came_back_may_be_away_again_as_long() -> None:
    async def scenario() -> None:
        link = StubLink(line(0))
        link.open.add(9)
        async with started(link, server_timeout_s=0.15) as source:
            await begin(source)
            for number in range(1, 4):
                link.up = False
                await asyncio.sleep(0.09)
                link.up = True
                link.work.append(line(number))
                await asyncio.wait_for(begin(source), 2)

    run(scenario())


def test_a_server_lost_while_the_last_results_are_reported_is_told_by_close() -> None:
    async def scenario() -> None:
        link = StubLink(line(0))
        async with started(link, server_timeout_s=0.1) as source:
            item = await begin(source)
            link.up = False
            await finish(source, item)
            with pytest.raises(ServerLostError):
                await asyncio.wait_for(source.close(), 3)

    run(scenario())


# --- verdicts -----------------------------------------------------------------------------------


def verdict(**keys: Iterable[str]) -> HeartbeatResponse:
    return HeartbeatResponse(WorkStatus.OK, **{k: list(v) for k, v in keys.items()})


def test_a_heartbeat_names_everything_held_with_its_progress() -> None:
    async def scenario() -> None:
        link = StubLink(*lines(3))
        link.open.add(9)
        async with started(link, batch_size=3) as source:
            first = await begin(source)
            await until(lambda: len(source.heartbeat_request().held) == 3, "the items")
            first.progress = 5
            request = source.heartbeat_request()

            assert request.worker == "w"
            assert request.held == {"0.1": 5, "1.1": 0, "2.1": 0}
            assert request.backend == "up"
            assert request.stats == WorkerStats()

            await finish(source, first)
            await until(lambda: link.submitted, "the result")
            await turns()
            assert "0.1" not in source.heartbeat_request().held

    run(scenario())


def test_a_heartbeat_says_when_the_model_server_is_down() -> None:
    async def scenario() -> None:
        source = source_of(StubLink())
        source._backend_up = lambda: False
        assert source.heartbeat_request().backend == "down"

    run(scenario())


def test_what_is_done_elsewhere_is_dropped_started_or_not() -> None:
    async def scenario() -> None:
        link = StubLink(*lines(4))
        link.open.add(9)
        async with started(link, batch_size=4) as source:
            cancelled: list[str] = []
            first = await begin(source)
            first.cancel = lambda: cancelled.append(first.key)
            await until(lambda: len(source.heartbeat_request().held) == 4, "the items")

            source.take_verdict(verdict(done=["0.1", "2.1", "not mine"]))

            assert cancelled == ["0.1"]
            assert set(source.heartbeat_request().held) == {"1.1", "3.1"}
            assert [(await begin(source)).key for _ in range(2)] == ["1.1", "3.1"]
            await asyncio.sleep(0.02)
            assert not link.released  # their leases ended already

    run(scenario())


def test_what_is_called_back_is_given_back_uncharged_unless_it_is_started() -> None:
    async def scenario() -> None:
        link = StubLink(*lines(3))
        link.open.add(9)
        async with started(link, batch_size=3) as source:
            await begin(source)
            await until(lambda: len(source.heartbeat_request().held) == 3, "the items")

            source.take_verdict(verdict(back=["0.1", "1.1", "not mine"]))
            await until(lambda: link.released, "the release")

            assert link.released == [ReleaseItem(1, "1.1", False, "called_back", "keep")]
            assert set(source.heartbeat_request().held) == {"0.1", "2.1"}
            assert (await begin(source)).key == "2.1"

    run(scenario())


def test_what_is_lost_goes_on_and_its_result_is_sent() -> None:
    async def scenario() -> None:
        link = StubLink(*lines(2))
        link.open.add(9)
        async with started(link) as source:
            first = await begin(source)
            first.cancel = lambda: pytest.fail("it goes on")
            source.take_verdict(verdict(lost=["0.1", "1.1"]))

            assert (await begin(source)).key == "1.1"
            await finish(source, first)
            await until(lambda: link.submitted, "the result")

    run(scenario())


def test_a_lost_item_that_is_given_up_is_named_and_reported_no_more() -> None:
    async def scenario() -> None:
        link = StubLink(*lines(2))
        async with started(link) as source:
            items = [await begin(source) for _ in range(2)]
            source.take_verdict(verdict(lost=["1.1", "7.7"]))
            assert [item.is_lost for item in items] == [False, True]

            source.give_up(items[1])

            assert held(source) == {"0.1": 1}
            await source.give_back(items, "stopped")
            assert [item.lease for item in link.released] == ["0.1"]

    run(scenario())


def test_an_old_lease_that_is_lost_while_a_new_one_follows_says_nothing_of_its_item() -> None:
    async def scenario() -> None:
        link = CrashLink(*lines(1))
        link.gate = asyncio.Event()
        async with started(link) as source:
            item = await begin(source)
            telling = asyncio.ensure_future(source.crashed([item]))
            await until(lambda: link.crashes, "the server knows, the worker does not yet")
            source.take_verdict(verdict(lost=["0.1"]))
            link.gate.set()

            assert await telling == [item]
            assert not item.is_lost
            source.take_verdict(verdict(lost=["0.2"]))
            assert item.is_lost

    run(scenario())


def test_a_verdict_on_running_items_frees_their_slots_for_others() -> None:
    async def scenario() -> None:
        link = StubLink(*lines(12))
        source = source_of(link)
        backend = StubBackend(gated=True)
        working = asyncio.ensure_future(managed(source, backend, workers=2).run())
        await until(lambda: len(backend.waiting) == 2, "two in flight")
        link.open -= {0, 1}
        source.take_verdict(verdict(done=["0.1", "1.1"]))
        await until(lambda: {"i2", "i3"} <= set(backend.waiting), "the next two in flight")
        backend.open()
        await asyncio.wait_for(working, 5)

        assert sorted(item.work_id for item in link.submitted) == list(range(2, 12))

    run(scenario())


# --- giving back --------------------------------------------------------------------------------


def test_giving_back_releases_all_that_is_held_uncharged_with_its_steps() -> None:
    async def scenario() -> None:
        link = StubLink(*lines(6))
        async with started(link, batch_size=6) as source:
            running = [await begin(source) for _ in range(2)]
            await until(lambda: len(source.heartbeat_request().held) == 6, "the items")

            await source.give_back(running, "crash")

            told = released(link)
            assert sorted(told) == list(range(6))
            assert {(item.charge, item.steps) for item in told.values()} == {(False, "keep")}
            assert {told[n].reason for n in (0, 1)} == {"crash"}
            assert {told[n].reason for n in range(2, 6)} == {"the worker was stopped"}
            assert link.closed

    run(scenario())


def test_giving_back_reports_first_what_is_finished() -> None:
    async def scenario() -> None:
        link = StubLink(*lines(3))
        async with started(link, batch_size=3) as source:
            items = [await begin(source) for _ in range(3)]
            await finish(source, items[0])
            await source.give_back(items[1:], "stopped")

            assert [item.work_id for item in link.submitted] == [0]
            assert sorted(released(link)) == [1, 2]

    run(scenario())


def test_giving_back_asks_for_no_more_work() -> None:
    """What it were given then would be nobody's until its lease ends."""

    async def scenario() -> None:
        link = StubLink(*lines(30))
        free_slots = 0
        async with started(link, lambda: free_slots, batch_size=4) as source:
            await until(lambda: len(source.heartbeat_request().held) == 4, "the items")
            await turns()
            await finish(source, await begin(source))
            free_slots = 8  # nothing runs any more

            await source.give_back([], "the worker was stopped")

            assert link.wants == [0]
            settled = [item.work_id for item in link.submitted] + list(released(link))
            assert sorted(settled) == [0, 1, 2, 3]
            assert len(link.work) == 26

    run(scenario())


def test_giving_back_keeps_the_charges_that_were_due_before() -> None:
    async def scenario() -> None:
        link = StubLink(*lines(2))
        async with started(link) as source:
            items = [await begin(source) for _ in range(2)]
            await finish(source, items[0], WantsRetry("again"))
            await source.give_back([items[1]], "stopped")

            told = released(link)
            assert told[0].charge
            assert not told[1].charge

    run(scenario())


def test_giving_back_to_a_server_that_is_away_takes_no_time() -> None:
    async def scenario() -> None:
        link = StubLink(*lines(4))
        async with started(link) as source:
            await begin(source)
            link.up = False
            await asyncio.wait_for(source.give_back([], "stopped"), 1)
            assert link.closed

    run(scenario())


def test_giving_back_to_a_server_that_does_not_answer_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leased, "_GIVE_BACK_S", 0.05)

    async def scenario() -> None:
        link = StubLink(*lines(4))

        async def never(*_: Any, **__: Any) -> Any:
            await asyncio.Event().wait()

        async with started(link) as source:
            await begin(source)
            link.release_work = never  # type: ignore[method-assign]
            await asyncio.wait_for(source.give_back([], "stopped"), 1)
            assert link.closed

    run(scenario())


def test_a_stopped_manager_leaves_no_line_unsettled() -> None:
    async def scenario() -> None:
        link = StubLink(*lines(300))
        source = source_of(link, batch_size=16)
        working = asyncio.ensure_future(
            managed(source, StubBackend(delay_s=0.001), workers=8).run()
        )
        await until(lambda: len(link.submitted) > 40, "some results")
        working.cancel()
        await asyncio.wait([working])

        assert working.cancelled()
        granted = set(range(300)) - {item.work_id for item in link.work}
        settled = [item.work_id for item in link.submitted] + list(released(link))
        assert sorted(settled) == sorted(granted)
        assert not any(item.charge for item in link.released)

    run(scenario())


# --- an engine that died under a worker that lives ------------------------------------------------


class CrashLink(StubLink):
    """Renews crashed leases, but those of the lines in `takes_back`; keeps their present leases.

    `loses_releases` replies to releases get lost; `on_release` is called before each reply. A
    server that does not `renews_now` cannot answer such calls now. `calls` is what was called.
    """

    def __init__(self, *lines: WorkItem, takes_back: Iterable[int] = ()) -> None:
        super().__init__(*lines)
        self.takes_back = set(takes_back)
        self.leases = {item.work_id: str(item.lease) for item in lines}
        self.crashes: list[str] = []
        self.loses_releases = 0
        self.renews_now = True
        self.calls: list[str] = []
        self.stale: list[StepItem] = []
        self.attempt = 1
        self.on_release: Callable[[], None] = lambda: None
        self.gate: asyncio.Event | None = None

    async def release_work(
        self, work_ids: Iterable[int] = (), items: Iterable[ReleaseItem] = ()
    ) -> ReleaseWorkResponse:
        items = list(items)
        renews = any(item.renew for item in items)
        self.calls.append("crash" if renews else "release")
        if renews and not self.renews_now:
            return ReleaseWorkResponse(WorkStatus.SERVER_UNAVAILABLE)
        reply = await super().release_work(work_ids, items)
        if reply.status is not WorkStatus.OK:
            return reply
        renewed = [grant for item in items if (grant := self._renew(item)) is not None]
        self.on_release()
        if self.gate is not None:
            await self.gate.wait()
        if self.loses_releases:
            self.loses_releases -= 1
            return ReleaseWorkResponse(WorkStatus.SERVER_UNAVAILABLE)
        return ReleaseWorkResponse(WorkStatus.OK, len(items), renewed)

    async def record_steps(self, steps: Sequence[StepItem]) -> StepsResponse:
        alive = [self.leases.get(step.work_id) == step.lease for step in steps]
        self.steps += [step for step, is_alive in zip(steps, alive, strict=True) if is_alive]
        self.stale += [step for step, is_alive in zip(steps, alive, strict=True) if not is_alive]
        outcomes = [StepOutcome.ACCEPTED if each else StepOutcome.STALE for each in alive]
        return StepsResponse(WorkStatus.OK, outcomes)

    async def submit_results(self, items: Sequence[WorkItem], want: int = 0) -> BatchResultResponse:
        self.calls.append("results")
        return await super().submit_results(items, want)

    def _renew(self, item: ReleaseItem) -> RenewedLease | None:
        number, lease = item.work_id, str(item.lease)
        ends = self.leases.get(number) == lease
        if ends and item.reason == "crash":
            self.crashes.append(lease)
        if not item.renew:
            if ends:
                del self.leases[number]
            return None
        assert (item.reason, item.charge, item.steps, item.keep_yields) == (
            *("crash", False, "keep"),
            None,
        )
        if ends and number in self.takes_back:
            del self.leases[number]
        elif ends:
            self.leases[number] = f"{number}.{int(lease.partition('.')[2]) + 1}"
        now = self.leases.get(number)
        return None if now is None else RenewedLease(number, lease, now, self.attempt)


def held(source: LeasedSource) -> dict[str, int]:
    return dict(source.heartbeat_request().held)


def test_items_go_on_under_the_leases_that_a_crash_leaves_them() -> None:
    async def scenario() -> None:
        link = CrashLink(*lines(3), takes_back=[1])
        async with started(link) as source:
            items = [await begin(source) for _ in range(3)]
            for item in items[:2]:
                item.progress = 7

            kept = await source.crashed(items[:2])

            assert kept == items[:1]
            assert link.crashes == ["0.1", "1.1"]
            assert items[0].item.lease == items[0].key == "0.2"
            assert held(source) == {"0.2": 7, "2.1": 1}
            await finish(source, items[0])
            await until(lambda: link.submitted, "its result")
            assert link.submitted[0].lease == "0.2"
            assert held(source) == {"2.1": 1}

    run(scenario())


def test_what_a_crash_takes_away_is_not_cancelled_behind_the_managers_back() -> None:
    async def scenario() -> None:
        link = CrashLink(*lines(1), takes_back=[0])
        async with started(link) as source:
            item = await begin(source)
            cancelled: list[str] = []
            item.cancel = lambda: cancelled.append(item.key)

            assert await source.crashed([item]) == []
            assert held(source) == {}
            assert cancelled == []

    run(scenario())


def test_an_older_server_takes_back_whatever_crashed() -> None:
    async def scenario() -> None:
        link = StubLink(*lines(2))
        async with started(link) as source:
            items = [await begin(source) for _ in range(2)]

            assert await source.crashed(items) == []
            assert {item.reason for item in link.released} == {"crash"}

    run(scenario())


def test_items_of_a_server_without_leases_go_on_and_are_not_told_of() -> None:
    async def scenario() -> None:
        link = StubLink(WorkItem(0, '{"key": "i0"}'))
        async with started(link) as source:
            item = await begin(source)

            assert await source.crashed([item]) == [item]
            assert link.released == []

    run(scenario())


def test_while_the_server_is_away_all_go_on_until_it_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(leased, "_TELL_CRASH_S", 0.02)
        link = CrashLink(*lines(3), takes_back=[1])
        async with started(link) as source:
            items = [await begin(source) for _ in range(3)]
            cancelled: list[str] = []
            for item in items:
                item.cancel = lambda item=item: cancelled.append(item.key)
            link.up = False

            assert await source.crashed(items) == items
            assert set(held(source)) == {"0.1", "1.1", "2.1"}
            await finish(source, items[2])  # nobody needs to know of its crash
            link.up = True
            await until(lambda: "0.2" in held(source), "the server is told")

            assert cancelled == ["1.1"]
            assert held(source) == {"0.2": 1}
            assert link.crashes == ["0.1", "1.1"]

    run(scenario())


def test_an_item_that_crashes_twice_before_the_server_hears_is_told_of_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(leased, "_TELL_CRASH_S", 0.02)
        link = CrashLink(*lines(2))
        async with started(link) as source:
            items = [await begin(source) for _ in range(2)]
            link.up = False
            for _ in range(2):
                assert await source.crashed(items) == items
            link.up = True
            await until(lambda: set(held(source)) == {"0.3", "1.3"}, "both are told")

            assert link.crashes == ["0.1", "1.1", "0.2", "1.2"]

    run(scenario())


def test_a_crash_whose_reply_was_lost_is_told_again_and_counts_once() -> None:
    async def scenario() -> None:
        link = CrashLink(*lines(2), takes_back=[1])
        link.loses_releases = 2
        async with started(link) as source:
            items = [await begin(source) for _ in range(2)]

            assert await source.crashed(items) == items[:1]
            assert held(source) == {"0.2": 1}
            assert link.crashes == ["0.1", "1.1"]
            assert not source._told, "they are settled"
            assert not source._recorder._held_back

    run(scenario())


@pytest.mark.parametrize("outcome", [Answered('{"done": true}'), WantsRetry("again", False)])
def test_an_item_that_ends_while_its_crash_is_told_ends_under_its_new_lease(outcome: Any) -> None:
    async def scenario() -> None:
        link = CrashLink(*lines(1))
        link.gate = asyncio.Event()
        async with started(link) as source:
            item = await begin(source)
            telling = asyncio.ensure_future(source.crashed([item]))
            await until(lambda: link.crashes, "the server knows, the worker does not yet")
            await finish(source, item, outcome)
            link.gate.set()
            await telling
            await until(lambda: not held(source), "it ended")
            await until(lambda: link.submitted or len(link.released) == 2, "it is reported")

            ends = [end.lease for end in (*link.submitted, *link.released[1:])]
            assert ends == ["0.2"]
            assert [end.charge for end in link.released[1:]] == [True] * len(link.released[1:])

    run(scenario())


@pytest.mark.parametrize("outcome", [Answered('{"done": true}'), WantsRetry("again", False)])
def test_an_item_that_ends_while_no_reply_to_its_crash_arrives_leaves_no_lease_behind(
    outcome: Any,
) -> None:
    async def scenario() -> None:
        link = CrashLink(*lines(1))
        link.loses_releases = 1_000_000
        async with started(link) as source:
            item = await begin(source)
            telling = asyncio.ensure_future(source.crashed([item]))
            await until(lambda: link.crashes, "the server knows, the worker does not")
            await finish(source, item, outcome)
            await asyncio.sleep(0.05)
            assert [end.lease for end in link.released if not end.renew] == []
            link.loses_releases = 0
            await telling
            await until(lambda: link.submitted or not link.leases, "it is reported")

            ends = [end for end in link.released if not end.renew]
            assert [(end.lease, end.charge) for end in ends] == (
                [("0.2", True)] if isinstance(outcome, WantsRetry) else []
            )
            assert link.crashes == ["0.1"]

    run(scenario())


def test_a_crash_whose_reply_was_lost_is_told_again_before_anything_else() -> None:
    """The lease that it renewed lives for a term, and a report may hang for longer than that."""

    async def scenario() -> None:
        link = CrashLink(*lines(2))
        link.loses_releases = 1
        async with started(link) as source:
            items = [await begin(source) for _ in range(2)]
            ends: list[Any] = []
            link.on_release = lambda: ends.append(asyncio.ensure_future(finish(source, items[1])))
            await source.crashed(items[:1])
            link.on_release = lambda: None
            await until(lambda: link.submitted, "the report")

            assert link.calls[:3] == ["crash", "crash", "results"]
            assert held(source) == {"0.2": 1}

    run(scenario())


@pytest.mark.parametrize("is_lost", [False, True], ids=["the reply is slow", "replies are lost"])
def test_a_step_that_comes_while_its_lease_is_renewed_is_recorded_under_the_new_one(
    is_lost: bool,
) -> None:
    async def scenario() -> None:
        link = CrashLink(*lines(1))
        gate = asyncio.Event()
        link.gate, link.loses_releases = None if is_lost else gate, 1_000_000 * is_lost
        link.attempt = 3
        source, backend = source_of(link, in_turn), StubBackend(gated=True)
        working = asyncio.ensure_future(managed(source, backend, workers=1).run())
        await until(lambda: backend.waiting, "the first request")
        assert backend.on_crash is not None
        telling = asyncio.ensure_future(backend.on_crash({1}))
        await until(lambda: link.crashes, "the server knows, the worker does not yet")
        backend.answer("i0 0")
        await until(lambda: "i0 1 yes" in backend.waiting, "the task asks again")
        await asyncio.sleep(0.4)  # far longer than a step is held otherwise
        assert link.steps == []
        link.loses_releases = 0
        gate.set()
        await telling
        await until(lambda: link.steps, "the step arrives")
        backend.answer("i0 1 yes")
        await until(lambda: len(link.steps) == 2, "so does the next one")
        backend.open()
        await working

        assert [(step.lease, step.attempt, step.pos) for step in link.steps] == [
            ("0.2", 3, (0, 0)),
            ("0.2", 3, (1, 0)),
        ]
        assert link.stale == []
        assert link.crashes == ["0.1"]

    run(scenario())


def test_a_new_lease_of_an_item_that_is_held_no_more_is_given_back() -> None:
    async def scenario() -> None:
        link = CrashLink(*lines(1))
        link.gate = asyncio.Event()
        async with started(link) as source:
            item = await begin(source)
            telling = asyncio.ensure_future(source.crashed([item]))
            await until(lambda: link.crashes, "the server knows, the worker does not yet")
            source.take_verdict(verdict(done=["0.1"]))
            link.gate.set()
            await telling
            await until(lambda: not link.leases, "it is given back")

            assert (link.released[1].lease, link.released[1].charge) == ("0.2", False)
            assert held(source) == {}

    run(scenario())


def test_verdicts_on_a_lease_that_was_renewed_do_not_drop_its_item() -> None:
    async def scenario() -> None:
        link = CrashLink(*lines(1))
        async with started(link) as source:
            item = await begin(source)
            await source.crashed([item])

            source.take_verdict(verdict(done=["0.1"], lost=["0.1"], back=["0.1"]))

            assert held(source) == {"0.2": 1}

    run(scenario())


def test_stopping_tells_of_a_crash_and_then_gives_back_the_new_lease() -> None:
    async def scenario() -> None:
        link = CrashLink(*lines(2))
        async with started(link, batch_size=2) as source:
            items = [await begin(source) for _ in range(2)]
            link.gate = asyncio.Event()
            telling = asyncio.ensure_future(source.crashed(items[:1]))
            await until(lambda: link.crashes, "the server knows, the worker does not yet")
            link.gate = None
            await source.give_back(items, "stopped")
            await telling

            assert link.crashes == ["0.1"]
            assert link.leases == {}
            given_back = [(x.lease, x.reason, x.charge) for x in link.released if not x.renew]
            assert sorted(given_back) == [("0.2", "stopped", False), ("1.1", "stopped", False)]

    run(scenario())


def test_stopping_says_crash_of_items_whose_crash_could_not_be_told() -> None:
    async def scenario() -> None:
        link = CrashLink(*lines(2))
        link.renews_now = False
        async with started(link, batch_size=2) as source:
            items = [await begin(source) for _ in range(2)]
            telling = asyncio.ensure_future(source.crashed(items[:1]))
            await until(lambda: "crash" in link.calls, "it cannot be told")
            await source.give_back(items, "stopped")
            telling.cancel()

            given_back = [(x.lease, x.reason, x.charge) for x in link.released]
            assert sorted(given_back) == [("0.1", "crash", False), ("1.1", "stopped", False)]
            assert link.crashes == ["0.1"]

    run(scenario())


def test_an_engine_that_died_is_a_crash_of_what_was_running_on_it() -> None:
    async def scenario() -> None:
        link = CrashLink(*lines(8))
        source = source_of(link)
        backend = StubBackend(gated=True)
        working = asyncio.ensure_future(managed(source, backend, workers=2).run())
        await until(lambda: len(backend.waiting) == 2, "two in flight")
        assert backend.on_crash is not None
        await backend.on_crash({1, 2})
        for text in backend.waiting:
            backend.fail(text, BackendError("the engine died too often"))
        await asyncio.wait([working], timeout=2)

        assert isinstance(working.exception(), BackendError)
        assert link.crashes == ["0.1", "1.1"]
        assert {x.lease for x in link.released if not x.renew} >= {"0.2", "1.2"}
        assert not any(item.charge for item in link.released)
        assert not set(link.leases) & {0, 1}

    run(scenario())


# --- recorded steps -----------------------------------------------------------------------------


class StepLink(StubLink):
    """Notes in `calls` what was called, in order; keeps the steps of lines as a server does."""

    def __init__(self, *lines: WorkItem) -> None:
        super().__init__(*lines)
        self.calls: list[str] = []
        self.steps_up = True
        self.step_latency_s = 0.0
        self.refusal: Exception | None = None

    async def record_steps(self, steps: Sequence[StepItem]) -> StepsResponse:
        self.calls.append("steps")
        await asyncio.sleep(self.step_latency_s)
        if self.refusal is not None:
            raise self.refusal
        if not self.steps_up:
            return StepsResponse(WorkStatus.SERVER_UNAVAILABLE)
        return await super().record_steps(steps)

    async def submit_results(self, items: Sequence[WorkItem], want: int = 0) -> BatchResultResponse:
        self.calls.append("results")
        return await super().submit_results(items, want)

    async def release_work(self, *args: Any, **options: Any) -> ReleaseWorkResponse:
        self.calls.append("release")
        return await super().release_work(*args, **options)

    @property
    def places(self) -> list[tuple[int, tuple[int, int]]]:
        return [(step.work_id, step.pos) for step in self.steps]


def in_turn(self: Any) -> TaskGenerator:
    """Three requests, each about the answer before."""
    text = ""
    for count in range(3):
        text = (yield ask(f"{self.data['key']} {count} {text}".strip())).get_text()
    return {"text": text}


def recorded_of(generator: Callable[[Any], Any], count: int, work_id: int = 0) -> list[Step]:
    """Return what is recorded of a task when the model, which says yes, answered `count` times."""
    log = StepLog()
    attempt = Attempt(lambda: task_of(generator)({"key": f"i{work_id}"}), log)
    step, steps = attempt.begin(), []
    while isinstance(step, list) and len(steps) < count:
        response = answer(step[0].request)
        text = response_text(response, 1 << 20)
        steps.append(Step(step[0].position, step[0].hash or "", text or ""))
        step = attempt.answer([response])
    return steps


@asynccontextmanager
async def stuck_after(
    link: StubLink, generator: Callable[[Any], Any], count: int
) -> AsyncIterator[asyncio.Task[None]]:
    """Run a manager whose model gives `count` answers and then none."""
    backend = StubBackend()
    calls = 0

    def hold(_: Any) -> None:
        nonlocal calls
        calls += 1
        backend.gated = calls > count

    backend.on_process = hold
    working = asyncio.ensure_future(managed(source_of(link, generator), backend, workers=4).run())
    await until(lambda: calls > count, "the request that is not answered")
    yield working
    working.cancel()
    await asyncio.wait([working])


@pytest.mark.parametrize("compute_s", [0.0, 0.001])
def test_a_thousand_items_of_one_request_make_no_call_for_steps(compute_s: float) -> None:
    """Also when the answers wait long for the one thread that runs the tasks."""

    def generator(self: Any) -> TaskGenerator:
        response = yield ask(self.data["key"])
        if compute_s:
            time.sleep(compute_s)
        return {"text": response.get_text()}

    async def scenario() -> None:
        link = StepLink(*lines(1000))
        start = time.monotonic()

        source = source_of(link, generator, batch_size=400)
        await managed(source, StubBackend(), workers=400).run()

        print(f"1000 items in {time.monotonic() - start:.2f} s, {len(link.calls)} calls")
        assert len(link.submitted) == 1000
        assert "steps" not in link.calls

    run(scenario())


def test_a_task_that_computes_for_long_has_its_answer_recorded_meanwhile() -> None:
    computing = threading.Event()
    go_on = threading.Event()

    def generator(self: Any) -> TaskGenerator:
        yield ask("a")
        computing.set()
        go_on.wait(5)
        return {}

    async def scenario() -> None:
        link = StepLink(line(0))
        working = asyncio.ensure_future(
            managed(source_of(link, generator), StubBackend(), workers=1).run()
        )
        await until(computing.is_set, "it computes")
        await until(lambda: link.steps, "the step", 2.0)
        go_on.set()
        await working

        assert link.places == [(0, (0, 0))]

    run(scenario())


def test_stopping_sends_every_step_before_it_releases_their_items() -> None:
    async def scenario() -> None:
        link = StepLink(*lines(2))
        async with stuck_after(link, in_turn, 4) as working:
            working.cancel()
            await asyncio.wait([working])

        assert len(link.steps) == 4
        assert link.calls[-1] == "release"
        assert link.calls.index("release") > max(
            n for n, call in enumerate(link.calls) if call == "steps"
        )
        assert {(item.steps, item.keep_yields, item.charge) for item in link.released} == {
            ("keep", None, False)
        }

    run(scenario())


@pytest.mark.parametrize("steps_up", [True, False])
def test_stopping_gives_back_in_time_although_steps_are_not_taken(
    monkeypatch: pytest.MonkeyPatch, steps_up: bool
) -> None:
    monkeypatch.setattr(leased, "_GIVE_STEPS_S", 0.05)
    monkeypatch.setattr(leased, "_GIVE_BACK_S", 1.0)

    async def scenario() -> None:
        link = StepLink(*lines(2))
        link.steps_up = steps_up
        link.step_latency_s = 30.0 if steps_up else 0.0
        async with stuck_after(link, in_turn, 4) as working:
            working.cancel()
            await asyncio.wait([working], timeout=2)
            assert working.done()

        assert len(link.released) == 2

    run(scenario())


def retry_at_the_end(keep: bool) -> Callable[[Any], TaskGenerator]:
    def generator(self: Any) -> TaskGenerator:
        yield from in_turn(self)
        raise TaskRetry("again", keep_steps=keep)

    return generator


def raise_at_the_end(self: Any) -> TaskGenerator:
    yield from in_turn(self)
    raise ValueError("no")


def raise_at_once(self: Any) -> TaskGenerator:
    raise ValueError("no")
    yield


@pytest.mark.parametrize(
    ("generator", "keep_yields", "fresh_start", "sent"),
    [
        (retry_at_the_end(keep=False), 0, True, 0),
        (retry_at_the_end(keep=True), 2, False, 2),
        (raise_at_the_end, 2, False, 2),
    ],
    ids=["retry", "retry that keeps steps", "exception"],
)
def test_an_attempt_that_ended_sends_the_steps_that_are_kept_first(
    generator: Any, keep_yields: int, fresh_start: bool, sent: int
) -> None:
    async def scenario() -> None:
        link = StepLink(line(0))
        working = asyncio.ensure_future(work_through(source_of(link, generator)))
        await until(lambda: link.released, "the release")
        working.cancel()
        await asyncio.wait([working])

        [release] = link.released
        assert (release.keep_yields, release.fresh_start) == (keep_yields, fresh_start)
        assert release.steps == ("keep" if keep_yields else "drop")
        assert link.places == [(0, (number, 0)) for number in range(sent)]
        if sent:
            assert link.calls.index("steps") < link.calls.index("release")

    run(scenario())


def test_an_exception_before_the_first_request_drops_no_answer() -> None:
    link = run(report_of(raise_at_once))

    assert [(r.steps, r.keep_yields, r.charge) for r in link.released] == [("keep", None, True)]


async def report_of(generator: Callable[[Any], Any]) -> StubLink:
    link = StubLink(line(0, steps=recorded_of(in_turn, 2)))
    working = asyncio.ensure_future(work_through(source_of(link, generator)))
    await until(lambda: link.released, "the release")
    working.cancel()
    await asyncio.wait([working])
    return link


def test_a_release_waits_a_little_for_its_steps_but_not_for_ever() -> None:
    async def scenario(fails: int) -> StepLink:
        link = StepLink(line(0), line(1))
        link.steps_up = False
        record = link.record_steps

        async def failing(steps: Any) -> Any:
            link.steps_up = link.calls.count("steps") >= fails
            return await record(steps)

        link.record_steps = failing  # type: ignore[method-assign]
        working = asyncio.ensure_future(work_through(source_of(link, raise_at_the_end)))
        await until(lambda: len(link.released) == 2, "the releases", 3.0)
        working.cancel()
        await asyncio.wait([working])
        return link

    link = run(scenario(1))
    assert sorted(link.places) == [(n, (y, 0)) for n in range(2) for y in range(2)]
    assert link.calls[:2] == ["steps", "steps"]
    assert run(scenario(10**6)).places == []


def test_an_item_that_brings_its_steps_is_not_asked_for_them_again() -> None:
    async def scenario() -> None:
        link = StepLink(line(0, steps=recorded_of(in_turn, 2)), line(1))
        backend = StubBackend()
        manager = managed(source_of(link, in_turn), backend, workers=4)
        await manager.run()

        assert sorted(backend.log) == ["i0 2 yes", "i1 0", "i1 1 yes", "i1 2 yes"]
        assert {item.result for item in link.submitted} == {'{"text": "yes"}'}
        assert manager.totals.replayed == 2
        assert (0, (0, 0)) not in link.places

    run(scenario())


@pytest.mark.parametrize("ends_at_once", [False, True])
def test_a_task_that_asks_something_else_than_recorded_is_told_once(ends_at_once: bool) -> None:
    def changed(self: Any) -> TaskGenerator:
        yield ask("i0 0")
        yield ask("something else")
        if not ends_at_once:
            yield ask("more")
        return {}

    async def scenario() -> None:
        link = StepLink(line(0, steps=recorded_of(in_turn, 3)), line(1))
        backend = StubBackend(delay_s=0.0 if ends_at_once else 0.15)
        await managed(source_of(link, changed), backend, workers=4).run()

        cuts = [(step.work_id, step.pos) for step in link.steps if step.response is None]
        assert cuts == [(0, (1, 0))]
        of_0 = [step.pos for step in link.steps if step.work_id == 0]
        assert of_0 == ([(1, 0)] if ends_at_once else [(1, 0), (1, 0)])
        assert backend.log.count("i0 0") == 1  # the other line asks it

    run(scenario())


@pytest.mark.parametrize("error", [AccessDeniedError("401"), BadRequestError("400")])
def test_a_server_that_refuses_steps_gets_its_results_all_the_same(error: Exception) -> None:
    async def scenario() -> None:
        link = StepLink(*lines(8))
        link.refusal = error
        source = source_of(link, in_turn)
        await managed(source, StubBackend(delay_s=0.1), workers=4).run()

        assert len(link.submitted) == 8
        assert link.calls.count("steps") == 1

    run(scenario())


def test_steps_that_an_item_brings_count_also_when_this_worker_may_record_none() -> None:
    async def scenario() -> None:
        link = StepLink(line(0))
        link.open.add(1)
        link.refusal = BadRequestError("400")
        backend = StubBackend(delay_s=0.15)
        working = asyncio.ensure_future(managed(source_of(link, in_turn), backend, workers=1).run())
        await until(lambda: link.submitted, "the first result")
        assert "steps" in link.calls
        asked = len(backend.log)
        link.work.append(line(1, steps=recorded_of(in_turn, 3, work_id=1)))
        await asyncio.wait_for(working, 5)

        assert len(link.submitted) == 2
        assert len(backend.log) == asked

    run(scenario())


def test_results_get_through_while_other_items_step_without_pause() -> None:
    """A call for steps before each result, and more steps come in every one of them."""

    def generator(self: Any) -> TaskGenerator:
        for count in range(400 if self.data["key"] in ("i0", "i1") else 2):
            yield ask(f"{self.data['key']} {count}")
        if self.data["key"] in ("i0", "i1"):
            return {}
        raise ValueError("no")

    async def scenario() -> None:
        link = StepLink(*lines(6))
        link.step_latency_s = 0.02
        backend = StubBackend(delay_s=0.002)
        working = asyncio.ensure_future(
            managed(source_of(link, generator), backend, workers=6).run()
        )
        await until(lambda: len(link.released) == 4, "the releases")
        assert not link.submitted
        working.cancel()
        await asyncio.wait([working])

    run(scenario())


# --- with the service behind it ------------------------------------------------------------------


async def killed_after(service: DispatchService, generator: Any, count: int) -> list[str]:
    """Let a worker die when its model gave `count` answers and they were sent; what it asked."""
    link = ServiceLink(service, f"w{count}")
    backend = StubBackend(gated=True)
    source = source_of(link, generator)  # type: ignore[arg-type]
    await link.heartbeat(HeartbeatRequest(f"w{count}"))
    working = asyncio.ensure_future(managed(source, backend, workers=8).run())
    for answered in range(count):
        await until(lambda: backend.waiting, "a request")
        backend.answer(backend.waiting[0])
        await until(lambda n=answered + 1: len(backend.log) > n, "another request")
    await until(lambda: not source._recorder._waiting, "the steps are sent")

    async def dies(*_: Any) -> None:
        for task in (source._exchange, source._poll, source._recording):
            if task is not None:
                task.cancel()

    source.give_back = dies  # type: ignore[method-assign]
    working.cancel()
    await asyncio.wait([working])
    service.queue.expire(service._clock.now() + 1e6)
    return backend.log[:count]


async def finished(service: DispatchService, generator: Any) -> list[str]:
    link = ServiceLink(service, "last")
    backend = StubBackend()
    await managed(source_of(link, generator), backend, workers=8).run()  # type: ignore[arg-type]
    await service.finished.wait()
    return backend.log


def run_of(path: Path, lines: int = 1) -> RunSettings:
    infile = path / "in.jsonl"
    infile.write_text("".join(f'{{"key": "i{n}"}}\n' for n in range(lines)))
    return RunSettings(infile, path / "out.jsonl", path / "state")


def ten_in_turn(self: Any) -> TaskGenerator:
    text = ""
    for count in range(10):
        text = (yield ask(f"{count} {self.rng.random()} {text}")).get_text()
    return {"text": text}


def test_an_item_goes_on_through_a_crash_of_its_engine_without_asking_twice(tmp_path: Path) -> None:
    async def scenario() -> None:
        service = DispatchService(run_of(tmp_path))
        await service.start()
        link, backend = ServiceLink(service, "w"), StubBackend(gated=True)
        await link.heartbeat(HeartbeatRequest("w"))
        source = source_of(link, ten_in_turn)  # type: ignore[arg-type]
        working = asyncio.ensure_future(managed(source, backend, workers=8).run())
        for count in range(4):
            await until(lambda n=count: len(backend.log) > n, "a request")
            if count < 3:
                backend.answer(backend.waiting[0])
        assert backend.on_crash is not None
        assert await backend.on_crash({1}) is False
        assert [x.serial for x in service.queue.leases.values()] == [2]
        backend.open()
        await working
        await service.finished.wait()

        assert [int(text.split()[0]) for text in backend.log] == list(range(10))
        status = service.status()
        assert (status["crashed"], status["charged"], status["done"]) == (1, 0, 1)
        assert status["steps"] >= 3
        await service.close()

    run(scenario())


def test_of_an_item_whose_workers_are_killed_again_and_again_no_step_is_asked_twice(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        service = DispatchService(run_of(tmp_path))
        await service.start()
        asked = await killed_after(service, ten_in_turn, 3)
        asked += await killed_after(service, ten_in_turn, 2)
        await service.close()
        service = DispatchService(run_of(tmp_path))  # the server was restarted, too
        await service.start()
        asked += await killed_after(service, ten_in_turn, 1)

        asked += await finished(service, ten_in_turn)

        assert [int(text.split()[0]) for text in asked] == list(range(10))
        status = service.status()
        assert (status["done"], status["steps"], status["step_mismatches"]) == (1, 6, 0)
        assert status["charged"] == 0
        await service.close()
        assert (tmp_path / "out.jsonl").read_text() == '{"text": "yes"}\n'

    run(scenario())


@pytest.mark.parametrize("keep", [False, True])
def test_a_retry_asks_anew_all_or_only_its_last_yield(tmp_path: Path, keep: bool) -> None:
    drawn: list[float] = []

    def generator(self: Any) -> TaskGenerator:
        drawn.append(self.rng.random())
        yield ask("a")
        yield [ask("b"), ask("c")]
        yield ask("d")
        if self.context.retry_count == 0:
            raise TaskRetry("once more", keep_steps=keep)
        return {}

    async def scenario() -> None:
        service = DispatchService(run_of(tmp_path))
        await service.start()
        asked = await finished(service, generator)
        await service.close()

        assert asked == list("abcd") + (["d"] if keep else list("abcd"))
        assert len(drawn) == 2
        assert (drawn[0] == drawn[1]) is keep

    run(scenario())


def test_an_exception_asks_anew_only_what_its_last_yield_was_answered(tmp_path: Path) -> None:
    attempts = 0

    def generator(self: Any) -> TaskGenerator:
        nonlocal attempts
        attempts += 1
        yield ask("a")
        yield [ask("b"), ask("c")]
        if attempts == 1:
            raise ValueError("of b and c")
        yield ask("d")
        if attempts == 2:
            raise ValueError("of d")
        return {}

    async def scenario() -> None:
        service = DispatchService(run_of(tmp_path))
        await service.start()
        asked = await finished(service, generator)
        await service.close()
        assert "".join(asked) == "abcbcdd"

    run(scenario())


def test_a_task_that_changed_its_mind_goes_on_live_and_the_run_counts_it(tmp_path: Path) -> None:
    wording = "old"

    def generator(self: Any) -> TaskGenerator:
        for count in range(6):
            yield ask(f"{count} {wording if count >= 2 else ''}")
        return {"wording": wording}

    async def scenario() -> None:
        nonlocal wording
        service = DispatchService(run_of(tmp_path))
        await service.start()
        await killed_after(service, generator, 4)
        wording = "new"
        asked = await killed_after(service, generator, 2)
        asked += await finished(service, generator)
        await service.close()

        assert asked == [f"{count} new" for count in range(2, 6)]
        assert service.status()["step_mismatches"] == 1
        assert json.loads((tmp_path / "out.jsonl").read_text()) == {"wording": "new"}

    run(scenario())
