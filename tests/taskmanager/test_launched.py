"""A launched model server that dies or hangs: started again while requests wait, up to a budget."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from dispatcher.errors import BackendError
from dispatcher.taskmanager.backend.fake import FakeBackend
from dispatcher.taskmanager.backend.launched import LaunchOptions, RestartBudget
from dispatcher.taskmanager.backend.process import ServerProcess
from dispatcher.taskmanager.backend.request import Request, Response
from tests.taskmanager.doubles import run, until

START_S = 15.0


class CountingBackend(FakeBackend):
    """Counts launches; from the second one on, the server gets `again_with` as arguments."""

    launches = 0
    again_with: list[str] | None = None

    async def run_process(self, process: ServerProcess) -> None:
        self.launches += 1
        self.running = process
        await super().run_process(process)
        if self.again_with is not None:
            self._arguments = self.again_with


@asynccontextmanager
async def backend(
    tmp_path: Path,
    *arguments: str,
    rules: list[dict[str, Any]] | None = None,
    restarts: int = 4,
    hang_timeout_s: float = 60.0,
    again_with: list[str] | None = None,
) -> AsyncIterator[CountingBackend]:
    if rules is not None:
        (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
        arguments = (*arguments, "--rules", str(tmp_path / "rules.yaml"))
    options = LaunchOptions(
        log_dir=tmp_path,
        startup_timeout_s=START_S,
        engine_restarts=restarts,
        hang_timeout_s=hang_timeout_s,
    )
    made = CountingBackend(options, model="m", arguments=arguments)
    made.again_with = again_with
    await made.start()
    try:
        yield made
    finally:
        await made.close()


def question(text: str) -> Request:
    return Request({"messages": [{"role": "user", "content": text}]})


def engine_pid(made: CountingBackend) -> int:
    """Return the process id of the server itself, which the guard has for its only child."""
    assert made.running._process is not None
    guard = made.running._process.pid
    return int(Path(f"/proc/{guard}/task/{guard}/children").read_text().split()[0])


def ask(made: CountingBackend, *texts: str) -> list[asyncio.Task[Response]]:
    return [
        asyncio.ensure_future(made.process(question(text), order))
        for order, text in enumerate(texts)
    ]


class Blame:
    """Notes the orders that were in flight when a server failed."""

    def __init__(self, verdict: bool = False) -> None:
        self.orders: list[set[int]] = []
        self.verdict = verdict

    async def __call__(self, orders: set[int]) -> bool:
        self.orders.append(orders)
        return self.verdict


def test_requests_of_a_server_that_is_killed_are_answered_by_the_next_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with backend(tmp_path, "--latency-s", "0.5") as made:
            made.on_crash = blame = Blame()
            tasks = ask(made, "a", "b", "c")
            await until(lambda: made.requests_in_flight == 3, "requests in flight", 5)
            await asyncio.sleep(0.1)
            os.kill(engine_pid(made), signal.SIGKILL)
            await until(lambda: not made.healthy(), "it to notice", 5)

            answers = await asyncio.gather(*tasks)
            assert all(answer.is_success for answer in answers)
            assert made.launches == 2
            assert blame.orders == [{0, 1, 2}]
            assert made.healthy()

    run(scenario(), 2 * START_S)


@pytest.mark.parametrize("how", ["it hangs", "it is stopped"])
def test_a_server_that_hangs_is_killed_and_started_again(tmp_path: Path, how: str) -> None:
    rules = [{"match": "poison", "hang": True}, {"after_calls": 1, "hang": True}]

    async def scenario() -> None:
        arguments = {"rules": rules} if how == "it hangs" else {"rules": []}
        async with backend(
            tmp_path, "--latency-s", "0.1", hang_timeout_s=1.0, again_with=[], **arguments
        ) as made:
            made.on_crash = blame = Blame()
            first = engine_pid(made)
            if how == "it is stopped":
                os.killpg(os.getpgid(first), signal.SIGSTOP)
            answers = await asyncio.gather(*ask(made, "poison", "b"))

            assert all(answer.is_success for answer in answers)
            assert made.launches == 2
            assert blame.orders == [{0, 1}]
            await until(lambda: not Path(f"/proc/{first}").exists(), "the first is gone", 5)

    run(scenario(), 2 * START_S)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyError("No space left on device")]
)
def test_requests_end_when_nobody_is_left_to_start_the_server_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def fail(self: CountingBackend) -> None:
        raise error

    async def scenario() -> None:
        async with backend(tmp_path, "--latency-s", "0.5") as made:
            monkeypatch.setattr(CountingBackend, "launch", fail)
            tasks = ask(made, "a", "b")
            await until(lambda: made.requests_in_flight == 2, "requests in flight", 5)
            os.kill(engine_pid(made), signal.SIGKILL)
            for task in tasks:
                with pytest.raises(BackendError, match="No space left on device"):
                    await task

    run(scenario(), START_S)


def test_an_idle_server_is_left_alone(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with backend(tmp_path, rules=[{"hang": True}], hang_timeout_s=0.3) as made:
            await asyncio.sleep(2)
            assert made.launches == 1

    run(scenario(), START_S)


def test_a_burst_that_makes_it_slow_is_no_hang(tmp_path: Path) -> None:
    async def scenario() -> None:
        slow = ("--capacity", "2", "--latency-s", "0.4")
        async with backend(tmp_path, *slow, hang_timeout_s=1.0) as made:
            answers = await asyncio.gather(*ask(made, *map(str, range(20))))
            assert all(answer.is_success for answer in answers)
            assert made.launches == 1

    run(scenario(), START_S)


def test_beyond_the_budget_every_request_gets_the_error_with_the_end_of_the_log(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with backend(tmp_path, rules=[{"exit": 7}], restarts=2) as made:
            waiting = ask(made, "a", "b")
            for task in waiting:
                with pytest.raises(BackendError) as caught:
                    await task
                text = str(caught.value)
                assert text.startswith(
                    "the model server failed again after 2 restarts within an hour "
                    "(--engine-restarts): fakellm ended with exit code 7; its log "
                )
                assert f"{tmp_path / 'fakellm.log'} ends with:\nfakellm ready at" in text
                assert text.count("fakellm ready") == 1  # of the last one only
            assert made.launches == 3
            assert not made.healthy()
            assert (tmp_path / "fakellm.log").read_text().count("fakellm ready") == 3

    run(scenario(), 2 * START_S)


def test_requests_of_a_server_that_hangs_beyond_the_budget_get_the_error_too(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        rules = [{"hang": True}]
        async with backend(tmp_path, rules=rules, restarts=0, hang_timeout_s=1.0) as made:
            # They wait for an answer, not to be sent; only the end of the server lets them go.
            for task in ask(made, "a", "b"):
                with pytest.raises(BackendError, match=r"after 0 restarts .* fakellm hangs: for "):
                    await task

    run(scenario(), START_S)


@pytest.mark.parametrize("restarts", [0, 1])
def test_the_deaths_of_servers_that_one_item_had_alone_do_not_count(
    tmp_path: Path, restarts: int
) -> None:
    async def scenario() -> None:
        async with backend(tmp_path, "--latency-s", "0.5", restarts=restarts) as made:
            made.on_crash = blame = Blame(verdict=True)
            for _ in range(3):
                (task,) = ask(made, "poison")
                await until(lambda: made.requests_in_flight == 1, "a request in flight", 5)
                os.kill(engine_pid(made), signal.SIGKILL)
                assert (await task).is_success
            assert made.launches == 4
            assert blame.orders == [{0}] * 3

    run(scenario(), 3 * START_S)


def test_requests_go_on_only_when_it_is_decided_whose_they_are(tmp_path: Path) -> None:
    async def scenario() -> None:
        decided = asyncio.Event()

        async def blame(orders: set[int]) -> bool:
            await decided.wait()
            return False

        rules = [{"match": "poison", "exit": 7}]
        async with backend(tmp_path, rules=rules, again_with=[]) as made:
            made.on_crash = blame
            (task,) = ask(made, "poison")
            log = tmp_path / "fakellm.log"
            await until(lambda: log.read_text().count(" ready at ") == 2, "the second", START_S)
            await asyncio.sleep(0.5)
            assert not task.done()
            assert not made.healthy()
            decided.set()
            assert (await task).is_success

    run(scenario(), 2 * START_S)


def test_launches_that_fail_count_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        wrong = ["--no-such-option"]
        async with backend(tmp_path, rules=[{"exit": 7}], restarts=2, again_with=wrong) as made:
            with pytest.raises(BackendError, match=r"(?s)after 2 restarts .*--no-such-option"):
                await asyncio.gather(*ask(made, "a"))
            assert made.launches == 3

    run(scenario(), 2 * START_S)


def test_a_server_that_does_not_start_at_first_is_an_error_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(BackendError, match="fakellm ended with exit code 2"):
            async with backend(tmp_path, "--no-such-option"):
                pass

    run(scenario(), START_S)


def test_closing_while_it_is_being_restarted_leaves_no_process(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with backend(tmp_path, rules=[{"exit": 7}]) as made:
            tasks = ask(made, "a")
            await until(lambda: made.launches == 2, "a restart", START_S)
            for task in tasks:
                task.cancel()
        # It may not even have begun to start.
        process = made.running._process
        assert process is None or not group_exists(process.pid)

    run(scenario(), START_S)


def group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_restarts_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def scenario() -> None:
        async with backend(tmp_path, rules=[{"exit": 7}], again_with=[]) as made:
            await asyncio.gather(*ask(made, "a"))

    run(scenario(), 2 * START_S)
    said = [record.getMessage() for record in caplog.records]
    assert any(
        re.match(
            r"starting it again \(3 more restarts within this hour\): fakellm ended with exit "
            r"code 7; its log ",
            line,
        )
        for line in said
    ), said
    assert any(re.match(r"the model server is back after \d+ s", line) for line in said), said


def test_its_slots_are_the_clients(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with backend(tmp_path, "--latency-s", "0.2") as made:
            made.slots.set_limit(1)
            tasks = ask(made, "a", "b", "c")
            await until(lambda: made.requests_in_flight == 1, "a request", 5)
            assert made.room() == -2
            await asyncio.gather(*tasks)
            assert made.accounts()["m"].requests == 3

    run(scenario(), START_S)


def test_a_budget_is_renewed_as_time_passes() -> None:
    budget = RestartBudget(2, period_s=3600)
    assert [budget.spend(now) for now in (0, 100, 200, 3599)] == [True, True, False, False]
    assert budget.spend(3600)
    assert not budget.spend(3650)
    assert budget.left(3650) == 0
    assert budget.spend(3701)


def test_what_was_put_back_can_be_spent_again() -> None:
    budget = RestartBudget(1)
    assert budget.spend(0)
    budget.refund()
    assert budget.spend(1)
    assert not budget.spend(2)
