"""The loop that follows an engine's load, against pages that a test writes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import aiohttp
import pytest

from dispatcher.core.saturation import Saturation
from dispatcher.taskmanager.backend.autoscale import AutoScaler
from dispatcher.taskmanager.backend.slots import RequestSlots


def page(running: int, waiting: int) -> str:
    return f"vllm:num_requests_running {running}\nvllm:num_requests_waiting {waiting}\n"


class Engine:
    """Gives one page or error after the other, then nothing more happens."""

    def __init__(self, says: Sequence[str | Exception | None], limit: int = 16) -> None:
        self.says = list(says)
        self.slots = RequestSlots(limit)
        self.limits: list[int] = []  # at each poll but the first
        self.all_said = asyncio.Event()
        self.polls = 0

    async def fetch(self) -> str | None:
        self.polls += 1
        if self.polls > 1:
            self.limits.append(self.slots.limit)
        if not self.says:
            self.all_said.set()
            await asyncio.Event().wait()
        said = self.says.pop(0)
        if isinstance(said, Exception):
            raise said
        return said


def follow(says: Sequence[str | Exception | None], limit: int = 16) -> Engine:
    """Let a scaler follow what an engine says, as fast as it can; all slots are in use."""

    async def whole() -> Engine:
        engine = Engine(says, limit)
        scaler = AutoScaler(
            engine.fetch,
            engine.slots,
            lambda: engine.slots.limit,
            Saturation(first=limit),
            pause_s=0.0,
            clock=lambda: float(engine.polls),
        )
        task = asyncio.ensure_future(scaler.run())
        done, _ = await asyncio.wait(
            [task, asyncio.ensure_future(engine.all_said.wait())],
            timeout=20,
            return_when=asyncio.FIRST_COMPLETED,
        )
        assert task not in done, "the scaler ended"
        assert done, "the scaler stopped asking"
        task.cancel()
        return engine

    return asyncio.run(whole())


def test_the_limit_follows_the_engine_up_and_down() -> None:
    says = [page(16, 0), page(32, 0), page(40, 24), *[page(40, 24)] * 5]
    assert follow(says).limits == [32, 64, 64, 64, 64, 64, 64, 45]


def test_a_limit_that_grew_lets_requests_go() -> None:
    async def whole() -> None:
        slots = RequestSlots(1)
        await slots.acquire(0)
        waiting = asyncio.ensure_future(slots.acquire(1))

        async def fetch() -> str:
            return page(1, 0)

        scaler = AutoScaler(fetch, slots, lambda: slots.in_use, Saturation(first=1), pause_s=60)
        task = asyncio.ensure_future(scaler.run())
        await asyncio.wait_for(waiting, 20)
        assert slots.limit == 2
        task.cancel()

    asyncio.run(whole())


@pytest.mark.parametrize(
    "trouble",
    [
        None,
        TimeoutError(),
        aiohttp.ClientConnectionError(),
        ConnectionResetError(),
        "<html></html>",
    ],
)
def test_it_goes_on_when_the_engine_is_back(trouble: str | Exception | None) -> None:
    engine = follow([page(16, 0), trouble, trouble, page(0, 0), page(32, 0)])
    assert engine.limits == [32, 32, 32, 32, 64]


def test_a_server_without_such_a_page_is_mentioned_once_and_the_limit_stays(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        engine = follow([None] * 100, limit=23)
    assert set(engine.limits) == {23}
    assert len(caplog.records) == 1
    assert "/metrics" in caplog.text
    assert "23 requests" in caplog.text


def test_an_engine_that_is_only_slow_to_start_or_away_for_long_is_not_mentioned(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        engine = follow([*[None] * 29, page(16, 0), *[None] * 100])
    assert engine.limits[-1] == 32
    assert not caplog.records


def test_it_asks_once_in_a_pause() -> None:
    async def whole() -> int:
        polls = 0

        async def fetch() -> None:
            nonlocal polls
            polls += 1

        scaler = AutoScaler(fetch, RequestSlots(1), lambda: 1, Saturation(), pause_s=0.05)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(scaler.run(), 0.5)
        return polls

    assert 3 <= asyncio.run(whole()) <= 11
