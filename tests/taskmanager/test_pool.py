"""Several models in one run: who is asked, and how much is started."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dispatcher.errors import BackendError
from dispatcher.models import ModelStats
from dispatcher.taskmanager.backend.pool import BackendPool
from dispatcher.taskmanager.manager import Manager
from tests.taskmanager.doubles import (
    StubBackend,
    StubSource,
    TaskGenerator,
    ask,
    assignment,
    run,
    until,
)


def pool(**limits: int) -> tuple[BackendPool, dict[str, StubBackend]]:
    """Return a pool of gated backends with these limits."""
    backends = {name: StubBackend(gated=True) for name in limits}
    for name, limit in limits.items():
        backends[name].slots.set_limit(limit)
    return BackendPool(backends, {"org/model": next(iter(limits))}), backends


def test_a_request_goes_where_its_model_says_and_else_to_the_first() -> None:
    async def scenario() -> None:
        both, backends = pool(generator=4, judge=4)
        asked = {"a": {}, "b": {"model": "judge"}, "c": {"model": "org/model"}}
        working = [asyncio.ensure_future(both.process(ask(t, **f))) for t, f in asked.items()]
        await until(lambda: both.requests_in_flight == 3, "all in flight")

        assert backends["generator"].waiting == ["a", "c"]
        assert backends["judge"].waiting == ["b"]
        for backend in backends.values():
            backend.open()
        await asyncio.gather(*working)

    run(scenario())


@pytest.mark.parametrize("model", ["unheard-of", 7, ""])
def test_an_unknown_model_is_an_error_of_that_request(model: Any) -> None:
    async def scenario() -> None:
        both, _ = pool(generator=1, judge=1)
        response = await both.process(ask(model=model))

        assert response.error == (
            f"the model {model!r} is none of this run's backends: generator, judge"
        )

    run(scenario())


def test_each_model_has_its_own_limit_and_a_busy_judge_does_not_stop_the_generator() -> None:
    def generator(self: Any) -> TaskGenerator:
        yield ask(f"{self.data['key']} generate")
        yield ask(f"{self.data['key']} judge", model="judge")
        return {}

    async def scenario() -> None:
        both, backends = pool(generator=4, judge=1)
        source = StubSource(assignment(f"i{n}", generator) for n in range(12))
        running = asyncio.ensure_future(Manager(source, both, max_active=10).run())
        for n in range(4):
            await until(lambda n=n: f"i{n} generate" in backends["generator"].waiting, "asked")
            backends["generator"].answer(f"i{n} generate")
        await until(lambda: len(backends["generator"].waiting) == 4, "the next four are generated")

        assert len(backends["judge"].waiting) == 1
        for backend in backends.values():
            backend.open()
        await running
        assert (backends["generator"].most, backends["judge"].most) == (4, 1)
        assert len(source.ends) == 12

    run(scenario())


def test_a_free_judge_does_not_make_the_manager_start_more_items() -> None:
    def generator(self: Any) -> TaskGenerator:
        yield ask(f"{self.data['key']} generate")
        yield ask(f"{self.data['key']} judge", model="judge")
        return {}

    async def scenario() -> None:
        both, backends = pool(generator=2, judge=50)
        source = StubSource(assignment(f"i{n}", generator) for n in range(30))
        manager = Manager(source, both)
        running = asyncio.ensure_future(manager.run())
        await until(lambda: len(backends["generator"].waiting) == 2, "two in flight")
        await asyncio.sleep(0.05)

        assert manager.totals.started == 2
        for backend in backends.values():
            backend.open()
        await running

    run(scenario())


def test_when_items_begin_with_another_model_its_room_counts() -> None:
    def generator(self: Any) -> TaskGenerator:
        yield ask(self.data["key"], model="judge")
        return {}

    async def scenario() -> None:
        both, backends = pool(generator=1, judge=8)
        for backend in backends.values():
            backend.open()
        source = StubSource(assignment(f"i{n}", generator) for n in range(60))
        await Manager(source, both).run()
        assert both.room() == 8

        backends["judge"].gated = True
        source = StubSource(assignment(f"j{n}", generator) for n in range(20))
        running = asyncio.ensure_future(Manager(source, both).run())
        await until(lambda: len(backends["judge"].waiting) == 8, "eight judged at once")
        backends["judge"].open()
        await running

    run(scenario())


def test_a_backend_that_does_not_start_ends_the_start_of_the_others() -> None:
    class Failing(StubBackend):
        async def start(self) -> None:
            raise BackendError("no GPU")

    class Slow(StubBackend):
        was_cancelled = False

        async def start(self) -> None:
            try:
                await asyncio.sleep(5)
            except asyncio.CancelledError:
                self.was_cancelled = True
                raise

    async def scenario() -> None:
        slow = Slow()
        with pytest.raises(BackendError, match="no GPU"):
            await BackendPool({"a": slow, "b": Failing()}, {}).start()
        assert slow.was_cancelled

    run(scenario())


def test_one_that_is_away_makes_the_whole_pool_unhealthy() -> None:
    class Away(StubBackend):
        def healthy(self) -> bool:
            return False

    assert BackendPool({"a": StubBackend()}, {}).healthy()
    assert not BackendPool({"a": StubBackend(), "b": Away()}, {}).healthy()


def test_accounts_are_told_by_the_backends_names() -> None:
    class Counting(StubBackend):
        def accounts(self) -> dict[str, ModelStats]:
            return {"real": ModelStats(requests=3), "further": ModelStats(requests=1)}

    both = BackendPool({"a": Counting(), "b": Counting()}, {})
    assert set(both.accounts()) == {"a", "a/further", "b", "b/further"}


def test_a_crash_of_any_backend_is_told_to_the_manager() -> None:
    async def scenario() -> None:
        both, backends = pool(generator=1, judge=1)

        async def handler(orders: set[int]) -> bool:
            return bool(orders)

        both.watch(lambda: None, handler)
        assert all(backend.on_crash is handler for backend in backends.values())

    run(scenario())
