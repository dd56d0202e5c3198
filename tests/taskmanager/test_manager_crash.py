"""What the manager does with its items when a model server dies under them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from dispatcher.taskmanager.tasksource.base import Assignment
from tests.taskmanager.doubles import (
    StubBackend,
    StubSource,
    assignment,
    managed,
    one_question,
    run,
    until,
)


class CrashSource(StubSource):
    """Keeps the items that the test names, and notes which ones crashed."""

    def __init__(self, items: Iterable[Assignment], kept: set[str]) -> None:
        super().__init__(items)
        self.kept = kept
        self.hit: list[str] = []

    async def crashed(self, assignments: list[Assignment]) -> list[Assignment]:
        self.hit += [each.key for each in assignments]
        return [each for each in assignments if each.key in self.kept]


async def _crash(
    keys: list[str], kept: set[str], orders: set[int], *, solo: bool = False
) -> tuple[CrashSource, StubBackend, bool]:
    """Run items, let a server die under some of them, then answer everything."""
    items = [assignment(key, one_question, solo=solo) for key in keys]
    source, backend = CrashSource(items, kept), StubBackend(gated=True)
    running = asyncio.ensure_future(managed(source, backend, workers=len(keys)).run())
    begun = 1 if solo else len(keys)
    await until(lambda: len(backend.waiting) == begun, "they are in flight")
    assert backend.on_crash is not None
    are_to_blame = await backend.on_crash(orders)
    backend.open()
    await asyncio.wait_for(running, 5)
    return source, backend, are_to_blame


def test_items_that_the_source_keeps_go_on_and_the_others_are_dropped() -> None:
    async def scenario() -> None:
        keys = [f"i{n}" for n in range(5)]
        source, backend, are_to_blame = await _crash(keys, {"i0", "i3"}, {1, 2, 4})

        assert source.hit == ["i0", "i1", "i3"]
        assert sorted(source.ends) == ["i0", "i2", "i3", "i4"]
        assert source.given_back is None
        assert not are_to_blame
        assert backend.requests_in_flight == 0

    run(scenario())


def test_a_crash_under_nobody_is_not_told() -> None:
    async def scenario() -> None:
        source, _, are_to_blame = await _crash(["a", "b"], set(), {77})

        assert source.hit == []
        assert sorted(source.ends) == ["a", "b"]
        assert not are_to_blame

    run(scenario())


def test_an_item_that_ran_alone_is_to_blame() -> None:
    async def scenario() -> None:
        source, _, are_to_blame = await _crash(["alone", "next"], set(), {1}, solo=True)

        assert source.hit == ["alone"]
        assert are_to_blame
        assert sorted(source.ends) == ["next"]

    run(scenario())
