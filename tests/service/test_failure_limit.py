"""A run in which too many lines fail: it pauses, says why, loses nothing, and goes on."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace
from typing import Any

import pytest

from dispatcher.config import RunSettings
from dispatcher.core.work_queue import QueuePolicy
from dispatcher.models import HeartbeatRequest, WorkStatus
from dispatcher.service import DispatchService
from dispatcher.steering import change_failure_limit
from tests.service.support import (
    answer,
    expected,
    finish_everything,
    give_back,
    give_input,
    output,
    run,
    serving,
    take,
)

FAILED = json.dumps({"__ERROR__": {"error": "no_answer", "message": "secret prompt"}})


def limited(settings: RunSettings, limit: str, **more: Any) -> RunSettings:
    return replace(settings, policy=QueuePolicy(max_retries=1, max_failures=limit), **more)


async def fail(service: DispatchService, count: int) -> None:
    items = await take(service, count)
    await service.submit([answer(item, FAILED) for item in items])


def test_a_paused_run_answers_that_there_is_nothing_now(settings: RunSettings) -> None:
    async def scenario() -> None:
        async with serving(limited(settings, "2")) as service:
            held = await take(service, 2, "other")
            await fail(service, 3)

            reply = await service.get_work("w", 5)
            assert (reply.status, reply.items) == (WorkStatus.RETRY, [])
            # What is under way ends as it would have.
            outcomes, work = await service.exchange([answer(item) for item in held], "other", 5)
            assert [outcome.value for outcome in outcomes] == ["accepted", "accepted"]
            assert work.items == []

    give_input(settings, 20)
    run(scenario())


def test_the_status_of_a_paused_run_says_so_and_why(settings: RunSettings) -> None:
    async def scenario() -> None:
        async with serving(limited(settings, "2")) as service:
            assert service.status()["state"] == "running"
            assert service.status()["paused"] is None
            assert service.status()["max_failures"] == "2"
            await fail(service, 3)
            status = service.status()
            assert status["state"] == "paused"
            assert status["paused"]["cause"] == {"kind": "no_answer", "count": 3, "line": 2}
            assert "--max-failures 2" in status["paused"]["message"]
            json.dumps(status)

    give_input(settings, 20)
    run(scenario())


def test_a_pause_is_logged_once_with_the_remedy_and_without_what_lines_hold(
    settings: RunSettings, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with serving(limited(settings, "2")) as service:
            items = await take(service, 6)
            await service.submit([answer(item, FAILED) for item in items[:3]])
            await service.submit([answer(item, FAILED) for item in items[3:]])

    give_input(settings, 20)
    with caplog.at_level(logging.WARNING):
        run(scenario())
    said = [record.getMessage() for record in caplog.records if "paused" in record.getMessage()]
    assert len(said) == 1
    assert "--accept-failures" in said[0]
    assert f"dispatcher unpause @{settings.state_dir} --accept-failures; or start" in said[0]
    assert "secret" not in said[0]


def test_a_worker_hears_of_a_pause_with_its_heartbeat(settings: RunSettings) -> None:
    async def scenario() -> None:
        async with serving(limited(settings, "0")) as service:
            assert not (await service.heartbeat(HeartbeatRequest("w", {}))).pause
            await fail(service, 1)
            assert (await service.heartbeat(HeartbeatRequest("w", {}))).pause

    give_input(settings, 20)
    run(scenario())


def test_a_file_of_bad_lines_pauses_a_run_that_nobody_worked_on(settings: RunSettings) -> None:
    async def scenario() -> None:
        async with serving(limited(settings, "30")) as service:
            assert await take(service, 5) == []
            assert service.status()["state"] == "paused"
            assert service.queue.counters.failed < 200

    settings.infile.write_text("\n" * 10_000)
    run(scenario())


def test_a_call_for_work_that_waits_is_answered_when_the_run_goes_on(settings: RunSettings) -> None:
    async def scenario() -> None:
        async with serving(limited(settings, "0")) as service:
            await fail(service, 1)
            asking = asyncio.ensure_future(service.get_work("w", 1, wait_s=10.0))
            await asyncio.sleep(0.05)
            assert not asking.done()

            said = await change_failure_limit(service, None, accept=True)

            assert said.startswith("the run goes on: the lines that failed so far are accepted")
            assert len((await asking).items) == 1

    give_input(settings, 20)
    run(scenario())


def test_a_limit_that_is_not_enough_is_answered_with_the_pause(settings: RunSettings) -> None:
    async def scenario() -> None:
        async with serving(limited(settings, "0")) as service:
            await fail(service, 3)
            said = await change_failure_limit(service, "2", accept=False)
            assert said.startswith("still paused, as 3 of 3 finished lines failed")
            said = await change_failure_limit(service, "3", accept=False)
            assert said == "the run goes on: the limit is 3 now"
            assert service.status()["state"] == "running"

    give_input(settings, 20)
    run(scenario())


def test_a_restart_finds_a_run_paused_until_its_failures_are_accepted(
    settings: RunSettings,
) -> None:
    limited_settings = limited(settings, "2")

    async def scenario() -> None:
        async with serving(limited_settings) as service:
            await fail(service, 3)
        async with serving(limited_settings) as service:
            assert service.paused.is_set()
            assert await take(service, 1) == []
        async with serving(replace(limited_settings, accept_failures=True)) as service:
            (item,) = await take(service, 1)
            await service.release([give_back(item)])
        async with serving(limited_settings) as service:  # which does not have to be said again
            assert service.status()["state"] == "running"
            await finish_everything(service)

    give_input(settings, 20)
    run(scenario())
    assert output(settings)[3:] == expected(range(3, 20))


def test_a_limit_that_was_set_by_a_call_survives_a_restart(settings: RunSettings) -> None:
    async def scenario() -> None:
        async with serving(limited(settings, "2")) as service:
            await fail(service, 3)
            await change_failure_limit(service, "50", accept=False)
        async with serving(limited(settings, "2")) as service:
            assert service.status()["max_failures"] == "50"
            assert len(await take(service, 1)) == 1

    give_input(settings, 20)
    run(scenario())


def test_a_jump_of_failures_is_logged_and_in_the_status_until_it_is_over(
    settings: RunSettings, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with serving(settings) as service:
            items = await take(service, 1200)
            for first in range(0, 600, 30):
                await service.submit([answer(item) for item in items[first : first + 30]])
            assert service.status()["failure_warning"] is None
            for first in range(600, 800, 20):
                await service.submit([answer(item, FAILED) for item in items[first : first + 20]])
            warning = service.status()["failure_warning"]
            assert warning["before"] == 0.0
            assert warning["cause"]["kind"] == "no_answer"
            for first in range(800, 1200, 20):
                await service.submit([answer(item) for item in items[first : first + 20]])
            assert service.status()["failure_warning"] is None

    give_input(settings, 1300)
    with caplog.at_level(logging.INFO):
        run(scenario())
    said = [record.getMessage() for record in caplog.records]
    assert sum("suddenly more lines fail" in text for text in said) == 1
    assert sum("as rarely again" in text for text in said) == 1
