"""A run that somebody pauses: it waits, says so, and no restart goes on with it unasked."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace

import pytest

from dispatcher import steering
from dispatcher.config import RunSettings
from dispatcher.core.work_queue import QueuePolicy
from dispatcher.errors import StorageFullError
from dispatcher.models import HeartbeatRequest, WorkStatus
from tests.service.support import (
    answer,
    expected,
    finish_everything,
    give_input,
    output,
    run,
    serving,
    take,
)
from tests.service.test_failure_limit import FAILED, fail
from tests.storage.broken_files import FULL, BrokenFiles

WHY = "the nodes are needed"


def lifting(settings: RunSettings) -> str:
    return f"dispatcher unpause @{settings.state_dir}"


def test_a_paused_run_hands_out_nothing_takes_what_is_under_way_and_says_so(
    settings: RunSettings,
) -> None:
    async def scenario() -> None:
        async with serving(settings) as service:
            held = await take(service, 2)
            said = await steering.pause(service, WHY)
            assert said == f"paused by an operator ({WHY}); to go on: {lifting(settings)}"

            reply = await service.get_work("w", 5)
            assert (reply.status, reply.items) == (WorkStatus.RETRY, [])
            outcomes, work = await service.exchange([answer(item) for item in held], "w", 5)
            assert [str(outcome) for outcome in outcomes] == ["accepted", "accepted"]
            assert work.items == []
            assert (await service.heartbeat(HeartbeatRequest("w", {}))).pause
            status = service.status()
            assert status["state"] == "paused"
            assert status["paused"] == {
                "message": f"paused by an operator ({WHY})",
                "by": ("operator",),
                "reason": WHY,
                **dict.fromkeys(("limit", "failed", "done", "cause")),
            }
            json.dumps(status)

    give_input(settings, 20)
    run(scenario())


def test_a_call_for_work_that_waits_is_answered_when_the_run_is_resumed(
    settings: RunSettings,
) -> None:
    async def scenario() -> None:
        async with serving(settings) as service:
            await steering.pause(service, "")
            asking = asyncio.ensure_future(service.get_work("w", 1, wait_s=10.0))
            await asyncio.sleep(0.05)
            assert not asking.done()
            assert await steering.resume(service) == "the run goes on"
            assert len((await asking).items) == 1
            assert await steering.resume(service) == "the run was not paused"

    give_input(settings, 20)
    run(scenario())


def test_a_server_that_is_killed_is_followed_by_one_that_stays_paused(
    settings: RunSettings, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with serving(settings) as service:
            await steering.pause(service, WHY)
        caplog.clear()
        async with serving(settings) as service:
            assert service.paused.is_set()
            assert await take(service, 1) == []
        async with serving(replace(settings, unpause=True)) as service:
            assert service.status()["state"] == "running"
            await service.submit([answer(item) for item in await take(service, 1)])
        async with serving(settings) as service:  # it does not have to be said again
            await finish_everything(service)

    give_input(settings, 20)
    with caplog.at_level(logging.WARNING):
        run(scenario())
    said = [record.getMessage() for record in caplog.records if "paused" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith(f"paused by an operator ({WHY}); what is under way may finish; tell ")
    assert lifting(settings) in said[0]
    assert said[0].endswith("start the run again with --unpause")
    assert output(settings) == expected(range(20))


def test_both_pauses_must_be_lifted_and_each_answer_names_what_is_left(
    settings: RunSettings, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        limited = replace(settings, policy=QueuePolicy(max_failures="0"))
        async with serving(limited) as service:
            held = await take(service, 1)
            await steering.pause(service, "")
            await service.submit([answer(item, FAILED) for item in held])
            said = await steering.pause(service, "")
            assert said.endswith(f"; to go on: {lifting(settings)} --accept-failures")
            assert "by an operator and as 1 of 1 finished lines failed" in said

            said = await steering.resume(service)
            assert said.startswith("still paused, as 1 of 1 finished lines failed")
            said = await steering.change_failure_limit(service, None, accept=True)
            assert said.startswith("the run goes on: the lines that failed so far are accepted")
            assert len(await take(service, 1)) == 1

    give_input(settings, 20)
    with caplog.at_level(logging.WARNING):
        run(scenario())
    last = [record.getMessage() for record in caplog.records if "paused" in record.getMessage()]
    assert "--unpause and --accept-failures" in last[1]


@pytest.mark.parametrize("option", ["accept_failures", "unpause"])
def test_what_a_start_is_told_holds_once_when_its_job_is_started_again(
    settings: RunSettings, option: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As Slurm does with a job that is requeued: the same command, and nobody asked anew."""

    async def scenario() -> None:
        limited = replace(settings, policy=QueuePolicy(max_failures="0"))
        told = replace(limited, **{option: True, "start": "job 7"})
        for _ in range(2):
            async with serving(told) as service:
                assert service.status()["state"] == "running"
                await service.release([])  # what was heard is on disk
        async with serving(told) as service:
            if option == "unpause":
                await steering.pause(service, WHY)
            else:
                await fail(service, 1)
        assert caplog.messages.count(HEARD) == 2
        async with serving(told) as service:
            assert service.status()["state"] == "paused"
            assert await take(service, 1) == []
        async with serving(replace(told, start="job 8")) as service:
            assert len(await take(service, 1)) == 1

    give_input(settings, 20)
    with caplog.at_level(logging.WARNING):
        run(scenario())
    assert caplog.messages.count(HEARD) == 3


HEARD = (
    "job 7 was heard before: --accept-failures and --unpause hold for the first time that it "
    "starts the run, and not when it is started again"
)


def test_a_pause_that_cannot_be_written_is_refused_and_is_none(settings: RunSettings) -> None:
    async def scenario() -> None:
        files = BrokenFiles()
        async with serving(settings, files) as service:
            files.fail_write = FULL
            with pytest.raises(StorageFullError):
                await steering.pause(service, WHY)
            files.fail_write = 0
            assert service.queue.pause is None
            assert len(await take(service, 1)) == 1

    give_input(settings, 20)
    run(scenario())


def test_a_complete_run_is_not_paused_and_not_drained(settings: RunSettings) -> None:
    async def scenario() -> None:
        async with serving(settings) as service:
            await finish_everything(service)
            assert await steering.pause(service, "") == (
                "the run is complete, there is nothing to pause"
            )
            assert await steering.resume(service) == "the run is complete"
            assert "the run is complete" in await steering.drain(service)
            assert not service.drain_asked.is_set()
            assert service.status()["state"] == "complete"

    give_input(settings, 3)
    run(scenario())


def test_a_run_that_drains_is_paused_for_its_next_start(settings: RunSettings) -> None:
    async def scenario() -> None:
        async with serving(settings) as service:
            for _ in range(2):  # it may be said twice
                assert "ends with code 3" in await steering.drain(service)
            assert service.drain_asked.is_set()
            assert await take(service, 1) == []
            assert "stays paused when it is started again" in await steering.pause(service, WHY)
            assert service.status()["state"] == "draining"
        async with serving(settings) as service:
            assert service.status()["state"] == "paused"
            await steering.drain(service)
            assert "goes on when started again" in await steering.resume(service)
        async with serving(settings) as service:
            assert service.status()["state"] == "running"

    give_input(settings, 3)
    run(scenario())
