"""Who gets a request slot, and that none is ever lost."""

from __future__ import annotations

import asyncio
import random

import pytest

from dispatcher.taskmanager.backend.slots import RequestSlots
from tests.taskmanager.doubles import run, turns


async def taken(limit: int) -> RequestSlots:
    """Return slots that are all in use."""
    slots = RequestSlots(limit)
    for order in range(limit):
        await slots.acquire(order)
    return slots


def test_no_more_than_the_limit_hold_a_slot() -> None:
    async def scenario() -> None:
        slots = await taken(3)
        waiter = asyncio.ensure_future(slots.acquire(0))
        await turns()

        assert not waiter.done()
        assert (slots.in_use, slots.demand) == (3, 4)

        slots.release()
        await waiter
        assert (slots.in_use, slots.demand) == (3, 3)

    run(scenario())


def test_waiters_are_served_by_their_order_and_equal_ones_in_turn() -> None:
    async def scenario() -> None:
        slots = await taken(1)
        served: list[str] = []

        async def wait(order: int, name: str) -> None:
            await slots.acquire(order)
            served.append(name)
            slots.release()

        waiters = []
        for order, name in [(7, "7a"), (2, "2a"), (9, "9a"), (2, "2b"), (7, "7b"), (1, "1a")]:
            waiters.append(asyncio.ensure_future(wait(order, name)))
            await turns()
        slots.release()
        await asyncio.gather(*waiters)

        assert served == ["1a", "2a", "2b", "7a", "7b", "9a"]
        assert (slots.in_use, slots.demand) == (0, 0)

    run(scenario())


def test_a_slot_that_was_passed_on_cannot_be_taken_by_a_newcomer() -> None:
    async def scenario() -> None:
        slots = await taken(1)
        first = asyncio.ensure_future(slots.acquire(5))
        await turns()

        slots.release()  # to the waiter, who has not run yet
        newcomer = asyncio.ensure_future(slots.acquire(0))
        await turns()

        assert first.done()
        assert not newcomer.done()
        slots.release()
        await newcomer

    run(scenario())


def test_a_waiter_that_is_cancelled_leaves_the_queue() -> None:
    async def scenario() -> None:
        slots = await taken(1)
        waiters = [asyncio.ensure_future(slots.acquire(order)) for order in (1, 2, 3)]
        await turns()

        waiters[0].cancel()
        await turns()
        assert slots.demand == 3

        slots.release()
        await turns()
        assert waiters[1].done()
        assert not waiters[2].done()

    run(scenario())


def test_a_waiter_cancelled_after_it_was_given_the_slot_passes_it_on() -> None:
    async def scenario() -> None:
        slots = await taken(1)
        first = asyncio.ensure_future(slots.acquire(1))
        second = asyncio.ensure_future(slots.acquire(2))
        await turns()

        slots.release()
        first.cancel()
        await turns()

        assert first.cancelled()
        assert second.done()
        slots.release()
        assert (slots.in_use, slots.demand) == (0, 0)

    run(scenario())


def test_a_slot_freed_while_its_next_waiter_is_being_cancelled_goes_to_the_one_behind() -> None:
    async def scenario() -> None:
        slots = await taken(1)
        first = asyncio.ensure_future(slots.acquire(1))
        second = asyncio.ensure_future(slots.acquire(2))
        await turns()

        first.cancel()  # its future is cancelled now, its coroutine runs later
        slots.release()
        await asyncio.wait([first, second], timeout=1)

        assert first.cancelled()
        assert second.done()
        slots.release()
        assert (slots.in_use, slots.demand) == (0, 0)

    run(scenario())


@pytest.mark.parametrize("seed", range(5))
def test_no_slot_is_lost_however_holders_and_waiters_are_cancelled(seed: int) -> None:
    async def scenario() -> None:
        rng = random.Random(seed)
        slots = RequestSlots(4)
        most = 0

        async def hold(order: int, turns_held: int) -> None:
            nonlocal most
            await slots.acquire(order)
            try:
                most = max(most, slots.in_use)
                await turns(turns_held)
            finally:
                slots.release()

        tasks: list[asyncio.Task[None]] = []
        for order in range(200):
            tasks.append(asyncio.ensure_future(hold(order, rng.randrange(6))))
            for task in rng.sample(tasks, min(len(tasks), rng.randrange(3))):
                task.cancel()
            if rng.random() < 0.5:
                await turns(rng.randrange(3))
        ends = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)

        odd = [end for end in ends if end and not isinstance(end, asyncio.CancelledError)]
        assert not odd
        assert most == 4
        assert (slots.in_use, slots.demand) == (0, 0)

    run(scenario())
