"""The manager's loop: how much runs at once, in which order, and what happens when it ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from dispatcher.errors import BackendError, ServerLostError
from dispatcher.models import WorkItem
from dispatcher.taskmanager import manager as manager_module
from dispatcher.taskmanager.backend.request import Request, Response
from dispatcher.taskmanager.execution import Answered, Raised, WantsRetry, task_of_line
from dispatcher.taskmanager.manager import Manager
from dispatcher.taskmanager.task import TaskRetry
from dispatcher.taskmanager.tasksource.base import Assignment
from tests.taskmanager.doubles import (
    StubBackend,
    StubSource,
    TaskGenerator,
    ask,
    assignment,
    managed,
    one_question,
    run,
    said,
    task_of,
    turns,
    until,
)

STUCK_S = 5.0


def asks(count: int, times: int = 1) -> Callable[[Any], TaskGenerator]:
    """Return a generator that yields a list of `count` requests, `times` times."""

    def generator(self: Any) -> TaskGenerator:
        key = self.data["key"]
        got = 0
        for time in range(times):
            responses = yield [ask(f"{key}.{time}.{n}") for n in range(count)]
            got += sum(response.is_success for response in responses)
        return {"got": got}

    return generator


def in_turn(count: int) -> Callable[[Any], TaskGenerator]:
    """Return a generator that asks `count` requests one after the other."""

    def generator(self: Any) -> TaskGenerator:
        for n in range(count):
            yield ask(f"{self.data['key']}.{n}")
        return {}

    return generator


async def abandoned(manager: Manager) -> BaseException:
    """Return what the manager's run raises, which it must."""
    try:
        await asyncio.wait_for(manager.run(), 5)
    except TimeoutError:
        raise AssertionError("the manager hangs") from None
    except BaseException as error:  # noqa: BLE001 (whatever it is, the test looks at it)
        return error
    raise AssertionError("it ended as if nothing had happened")


async def asks_for(backend: StubBackend, text: str) -> None:
    """Return once this request is in flight."""
    await until(lambda: text in backend.waiting, f"{text} is in flight")


async def _contended(
    active: int,
) -> tuple[StubSource, StubBackend, list[Assignment], asyncio.Future[None]]:
    """Run items on one slot: i0 holds it, the other active ones wait for it, in order."""
    go_on = {f"i{n}": threading.Event() for n in range(8)}

    def generator(self: Any) -> TaskGenerator:
        yield ask(f"{self.data['key']}.0")
        go_on[self.data["key"]].wait(STUCK_S)
        yield ask(f"{self.data['key']}.1")
        return {}

    items = [assignment(key, generator) for key in go_on]
    source, backend = StubSource(items), StubBackend()
    manager = managed(source, backend, workers=1, max_active=active)
    running = asyncio.ensure_future(manager.run())
    await until(
        lambda: len(backend.log) == active and not backend.requests_in_flight,
        "all of them are begun and have their first answer",
    )
    backend.gated = True
    for demand, event in enumerate(go_on.values(), 1):
        event.set()
        if demand <= active:
            await until(lambda: backend.slots.demand == demand, "it asks again")  # noqa: B023
    assert backend.waiting == ["i0.1"]
    return source, backend, items, running


# --- items to their ends ------------------------------------------------------------------------


def test_every_item_runs_to_its_end_once_and_the_source_is_closed() -> None:
    async def scenario() -> None:
        source = StubSource(assignment(f"i{n}", one_question) for n in range(300))
        backend = StubBackend()
        manager = managed(source, backend, workers=16)

        await manager.run()

        assert source.ends == {f"i{n}": Answered('{"text": "yes"}') for n in range(300)}
        assert source.closed
        assert source.given_back is None
        assert (manager.totals.started, manager.totals.ended) == (300, 300)
        assert backend.requests_in_flight == 0

    run(scenario())


def test_a_source_without_items_is_closed_at_once() -> None:
    async def scenario() -> None:
        source = StubSource([])
        await managed(source, StubBackend(), workers=1).run()
        assert source.closed

    run(scenario())


def test_one_items_trouble_is_its_own() -> None:
    def retry(self: Any) -> TaskGenerator:
        yield ask()
        raise TaskRetry("again")

    def broken(self: Any) -> TaskGenerator:
        yield [ask("a"), ask("b")]
        raise SystemExit("no")

    async def scenario() -> None:
        items = [
            assignment("fine", one_question),
            assignment("retry", retry),
            assignment("broken", broken),
            Assignment("bad line", lambda: task_of_line(task_of(one_question), WorkItem(0, "{"))),
            assignment("fine too", one_question),
        ]
        source = StubSource(items)

        await managed(source, StubBackend(), workers=2).run()

        assert source.ends["retry"] == WantsRetry("again")
        assert isinstance(source.ends["broken"], Raised)
        assert source.ends["broken"].message == "SystemExit: no"
        assert isinstance(source.ends["bad line"], Answered)
        assert source.ends["fine"] == source.ends["fine too"] == Answered('{"text": "yes"}')
        assert source.given_back is None

    run(scenario())


def test_an_exception_whose_message_cannot_be_had_does_not_end_the_manager() -> None:
    class Unprintable(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no message")

    def broken(self: Any) -> dict[str, Any]:
        raise Unprintable

    async def scenario() -> None:
        source = StubSource([assignment("broken", broken), assignment("fine", one_question)])

        await managed(source, StubBackend(), workers=2).run()

        assert isinstance(source.ends["broken"], Raised)
        assert source.ends["fine"] == Answered('{"text": "yes"}')

    run(scenario())


def test_what_the_backend_answers_reaches_the_task_error_or_not() -> None:
    class Refusing(StubBackend):
        async def reply(self, request: Request) -> Response:
            return Response.from_error(request, "HTTP 400: no")

    def generator(self: Any) -> TaskGenerator:
        response = yield ask()
        return {"error": response.error}

    async def scenario() -> None:
        source = StubSource([assignment("a", generator)])
        await managed(source, Refusing(), workers=1).run()
        assert source.ends["a"] == Answered('{"error": "HTTP 400: no"}')

    run(scenario())


def test_progress_is_zero_until_started_and_grows_with_every_answer() -> None:
    async def scenario() -> None:
        item = assignment("a", in_turn(2))
        backend = StubBackend(gated=True)
        seen = [item.progress]
        running = asyncio.ensure_future(managed(StubSource([item]), backend, workers=1).run())
        for text in ("a.0", "a.1"):
            await asks_for(backend, text)
            seen.append(item.progress)
            backend.answer(text)
        await running
        seen.append(item.progress)

        assert seen == [0, 1, 2, 3]

    run(scenario())


# --- how much runs at once ----------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3, 8])
@pytest.mark.parametrize("generator", [one_question, in_turn(3), asks(5, 2), asks(1)])
def test_requests_in_flight_reach_workers_and_never_exceed_them(
    workers: int, generator: Callable[[Any], TaskGenerator]
) -> None:
    async def scenario() -> None:
        source = StubSource(assignment(f"i{n}", generator) for n in range(30))
        backend = StubBackend(delay_s=0.0005)

        await managed(source, backend, workers=workers).run()

        assert backend.most == workers
        assert len(source.ends) == 30

    run(scenario())


def test_a_slot_is_filled_again_when_it_gets_free_while_others_are_busy() -> None:
    async def scenario() -> None:
        source = StubSource(assignment(f"i{n}", one_question) for n in range(6))
        backend = StubBackend(gated=True)
        running = asyncio.ensure_future(managed(source, backend, workers=3).run())
        for n in range(3, 6):
            await until(lambda: len(backend.waiting) == 3, "three in flight")
            backend.answer(f"i{n - 2}")  # i0 stays in flight all the time
            await asks_for(backend, f"i{n}")
        backend.open()
        await running

    run(scenario())


def test_no_item_is_started_whose_requests_could_not_be_sent() -> None:
    async def scenario() -> None:
        source = StubSource(assignment(f"i{n}", asks(10)) for n in range(5))
        backend = StubBackend(gated=True)
        manager = managed(source, backend, workers=4)
        running = asyncio.ensure_future(manager.run())
        await until(lambda: len(backend.waiting) == 4, "four in flight")
        await asyncio.sleep(0.05)

        # How many requests an item has is known once it runs; after that none is begun.
        assert manager.totals.started <= 4
        assert len(backend.waiting) == 4
        backend.open()
        await running
        assert backend.most == 4

    run(scenario())


def test_items_started_earlier_are_served_first() -> None:
    later_has_asked = threading.Event()

    def early(self: Any) -> TaskGenerator:
        yield [ask("early.0"), ask("early.1")]
        later_has_asked.wait(STUCK_S)
        yield [ask("early.2"), ask("early.3")]
        return {}

    async def scenario() -> None:
        source = StubSource([assignment("early", early), assignment("later", asks(2))])
        backend = StubBackend(gated=True)
        manager = managed(source, backend, workers=1)
        running = asyncio.ensure_future(manager.run())
        for text in ("early.0", "early.1"):
            await asks_for(backend, text)
            backend.answer(text)
        await asks_for(backend, "later.0.0")  # its other request waits already
        later_has_asked.set()
        await until(lambda: backend.slots.demand == 4, "the early item asks again")

        backend.answer("later.0.0")
        await until(lambda: backend.waiting, "the next one in flight")
        backend.open()
        await running

        assert backend.log == [
            *("early.0", "early.1", "later.0.0"),
            *("early.2", "early.3", "later.0.1"),
        ]

    run(scenario(), STUCK_S - 1)


def test_items_that_compute_leave_their_slots_to_others_up_to_max_active() -> None:
    release = threading.Event()
    computing: list[str] = []

    def generator(self: Any) -> TaskGenerator:
        yield ask(self.data["key"])
        computing.append(self.data["key"])
        release.wait(STUCK_S)
        return {}

    async def scenario() -> None:
        source = StubSource(assignment(f"i{n}", generator) for n in range(6))
        manager = managed(source, StubBackend(), workers=1, max_active=3)
        running = asyncio.ensure_future(manager.run())
        await until(lambda: len(computing) == 3, "three items compute")
        await asyncio.sleep(0.15)  # time for a fourth, were there no limit

        assert len(computing) == manager.totals.started == 3
        release.set()
        await running
        assert len(source.ends) == 6

    run(scenario(), STUCK_S - 1)


def test_max_active_may_be_below_workers() -> None:
    async def scenario() -> None:
        source = StubSource(assignment(f"i{n}", one_question) for n in range(10))
        backend = StubBackend(delay_s=0.001)

        await managed(source, backend, workers=8, max_active=2).run()

        assert backend.most == 2

    run(scenario())


def test_the_source_is_told_how_many_items_could_be_started() -> None:
    async def scenario() -> None:
        backend = StubBackend(gated=True)
        source = StubSource([assignment("a", asks(2))])
        running = asyncio.ensure_future(managed(source, backend, workers=5).run())
        await until(lambda: len(backend.waiting) == 2, "two in flight")

        assert source.wanted() == 3
        backend.open()
        await running
        assert source.wanted() == 5

    run(scenario())


# --- solo ---------------------------------------------------------------------------------------


def test_a_solo_item_runs_alone_and_what_comes_after_it_runs_as_ever() -> None:
    async def scenario() -> None:
        items = [assignment(f"before{n}", in_turn(2)) for n in range(4)]
        items += [assignment("solo", asks(2, 3), solo=True)]
        items += [assignment(f"after{n}", in_turn(2)) for n in range(4)]
        source = StubSource(items)
        backend = StubBackend(delay_s=0.001)
        begun: set[str] = set()
        beside: set[str] = set()

        def look(request: Request) -> None:
            begun.add(said(request).partition(".")[0])
            flying = {text.partition(".")[0] for text, n in backend.in_flight.items() if n}
            if "solo" in flying:
                beside.update(flying - {"solo"})
                beside.update(begun - {"solo"} - source.ends.keys())

        backend.on_process = look
        await managed(source, backend, workers=4).run()

        assert not beside
        assert len(source.ends) == 9
        order = list(dict.fromkeys(text.partition(".")[0] for text in backend.log))
        assert order.index("solo") == 4
        assert backend.most == 4

    run(scenario())


def test_two_solo_items_run_one_after_the_other() -> None:
    async def scenario() -> None:
        source = StubSource(assignment(f"s{n}", in_turn(2), solo=True) for n in range(3))
        backend = StubBackend(delay_s=0.001)

        await managed(source, backend, workers=4).run()

        assert backend.most == 1
        assert backend.log == [f"s{n}.{time}" for n in range(3) for time in range(2)]

    run(scenario())


class NotingSource(StubSource):
    """Notes which items it is to forget."""

    def __init__(self, items: Iterable[Assignment]) -> None:
        super().__init__(items)
        self.given_up: list[str] = []

    def give_up(self, assignment: Assignment) -> None:
        self.given_up.append(assignment.key)


def test_a_solo_item_does_not_wait_for_a_task_that_never_ends_once_it_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(manager_module, "_LOOK_FOR_LOST_S", 0.01)
    begun, release = threading.Event(), threading.Event()

    def blocks(self: Any) -> dict[str, Any]:
        begun.set()
        release.wait(STUCK_S)
        return {}

    async def scenario() -> None:
        items = [assignment("blocks", blocks), assignment("asks", one_question)]
        items += [assignment("solo", one_question, solo=True), assignment("next", one_question)]
        source, backend = NotingSource(items), StubBackend(gated=True)
        running = asyncio.ensure_future(managed(source, backend, workers=8).run())
        await asks_for(backend, "asks")
        await until(lambda: begun.is_set() and len(source.items) == 1, "the solo item waits")
        backend.answer("asks")
        await asyncio.sleep(0.1)
        assert list(source.ends) == ["asks"], "it waits for what is not lost"
        items[0].is_lost = True
        await asks_for(backend, "solo")
        backend.open()
        await asyncio.wait_for(running, 2)

        assert source.given_up == ["blocks"]
        assert list(source.ends) == ["asks", "solo", "next"]

    try:
        run(scenario(), STUCK_S - 1)
    finally:
        release.set()


def test_what_is_lost_goes_on_as_long_as_no_item_has_to_run_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(manager_module, "_LOOK_FOR_LOST_S", 0.01)

    async def scenario() -> None:
        items = [assignment(f"i{n}", one_question) for n in range(4)]
        source, backend = NotingSource(items), StubBackend(gated=True)
        running = asyncio.ensure_future(managed(source, backend, workers=2).run())
        await asks_for(backend, "i1")
        items[0].is_lost = items[1].is_lost = True
        backend.answer("i1")
        await asks_for(backend, "i2")
        await asyncio.sleep(0.1)
        backend.open()
        await running

        assert source.given_up == []
        assert sorted(source.ends) == ["i0", "i1", "i2", "i3"]

    run(scenario())


# --- when it is stopped -------------------------------------------------------------------------


@pytest.mark.parametrize("generator", [one_question, asks(5), in_turn(2)])
def test_when_cancelled_it_gives_everything_back(
    generator: Callable[[Any], TaskGenerator],
) -> None:
    async def scenario() -> None:
        source = StubSource(assignment(f"i{n}", generator) for n in range(20))
        backend = StubBackend(gated=True)
        manager = managed(source, backend, workers=3)
        running = asyncio.ensure_future(manager.run())
        await until(lambda: len(backend.waiting) == 3, "three in flight")
        started = [f"i{n}" for n in range(manager.totals.started)]
        running.cancel()
        [end] = await asyncio.gather(running, return_exceptions=True)

        assert isinstance(end, asyncio.CancelledError)
        assert source.given_back == started
        assert source.reason == "the worker was stopped"
        assert not source.closed
        assert not source.ends
        await turns()
        assert backend.in_flight.total() == 0

    run(scenario())


def test_when_cancelled_with_items_waiting_for_a_slot_it_is_cancelled_and_nothing_else() -> None:
    """More items want a slot than there are: what SIGTERM meets in the middle of any long run."""

    async def scenario() -> None:
        source, _, _, running = await _contended(4)
        running.cancel()
        [end] = await asyncio.gather(running, return_exceptions=True)

        assert isinstance(end, asyncio.CancelledError), repr(end)
        assert source.given_back == ["i0", "i1", "i2", "i3"]
        assert source.reason == "the worker was stopped"

    run(scenario(), STUCK_S - 1)


def test_when_cancelled_while_a_task_blocks_it_does_not_wait_for_the_task() -> None:
    release = threading.Event()
    begun = threading.Event()

    def blocks(self: Any) -> dict[str, Any]:
        begun.set()
        release.wait(STUCK_S)
        return {}

    async def scenario() -> None:
        source = StubSource([assignment("blocks", blocks)])
        running = asyncio.ensure_future(managed(source, StubBackend(), workers=1).run())
        await until(begun.is_set, "the task begins")
        running.cancel()
        await asyncio.wait([running], timeout=1)

        assert running.cancelled()
        assert source.given_back == ["blocks"]

    try:
        run(scenario(), STUCK_S - 1)
    finally:
        release.set()


@pytest.mark.parametrize("generator", [one_question, asks(3)], ids=["one", "list"])
@pytest.mark.parametrize("error", [BackendError("the engine died"), RuntimeError("a mistake")])
def test_an_error_of_the_backend_gives_everything_back_and_is_raised(
    error: Exception, generator: Callable[[Any], TaskGenerator]
) -> None:
    async def scenario() -> None:
        items = [assignment("hit", generator), assignment("beside", one_question)]
        source = StubSource([*items, assignment("next", one_question)])
        backend = StubBackend(gated=True)
        running = asyncio.ensure_future(managed(source, backend, workers=4).run())
        await until(
            lambda: {"hit", "beside"} <= {text.partition(".")[0] for text in backend.waiting},
            "both are in flight",
        )
        hit = next(text for text in backend.waiting if text.startswith("hit"))
        backend.fail(hit, error)
        await asyncio.wait([running], timeout=1)

        assert running.done(), "the item waits for ever for an answer that never comes"
        assert running.exception() is error
        assert source.given_back is not None
        assert "beside" in source.given_back
        assert source.reason == "the worker was stopped"
        await turns()
        assert backend.in_flight.total() == 0

    run(scenario())


def test_the_item_whose_engine_died_is_given_back_too() -> None:
    """It is charged a crash only if it is among what is given back as such."""

    async def scenario() -> None:
        source = StubSource([assignment("hit", one_question), assignment("beside", one_question)])
        backend = StubBackend(gated=True)
        running = asyncio.ensure_future(managed(source, backend, workers=2).run())
        await until(lambda: len(backend.waiting) == 2, "both are in flight")
        error = BackendError("the engine died")
        backend.fail("hit", error)
        backend.fail("beside", error)
        [end] = await asyncio.gather(running, return_exceptions=True)

        assert end is error
        assert sorted(source.given_back or []) == ["beside", "hit"]

    run(scenario())


def test_an_error_of_the_source_gives_everything_back_and_is_raised() -> None:
    async def scenario() -> None:
        source = StubSource([assignment("a", one_question)])
        backend = StubBackend(gated=True)
        error = ServerLostError("away")

        def lose() -> None:
            if not source.items:
                raise error

        source.on_next = lose
        end = await abandoned(managed(source, backend, workers=4))

        assert end is error
        assert source.given_back == ["a"]

    run(scenario())


# --- one item is cancelled ----------------------------------------------------------------------


async def _begin(
    items: list[Assignment], workers: int
) -> tuple[StubSource, StubBackend, Manager, asyncio.Future[None]]:
    source, backend = StubSource(items), StubBackend(gated=True)
    manager = managed(source, backend, workers=workers)
    return source, backend, manager, asyncio.ensure_future(manager.run())


def test_an_item_that_is_cancelled_in_flight_harms_no_other() -> None:
    async def scenario() -> None:
        items = [assignment(f"i{n}", one_question) for n in range(6)]
        source, backend, manager, running = await _begin(items, 2)
        await until(lambda: len(backend.waiting) == 2, "two in flight")
        assert items[0].cancel is not None
        items[0].cancel()
        await asks_for(backend, "i2")  # in the slot that got free
        backend.open()
        await running

        assert sorted(source.ends) == ["i1", "i2", "i3", "i4", "i5"]
        assert source.given_back is None
        assert source.closed
        assert manager.totals.ended == 6

    run(scenario())


def test_an_item_that_is_cancelled_with_requests_waiting_leaves_every_slot_free() -> None:
    async def scenario() -> None:
        items = [assignment("wide", asks(6)), *(assignment(f"i{n}", asks(2)) for n in range(3))]
        source, backend, _, running = await _begin(items, 2)
        await until(lambda: backend.slots.demand >= 6, "two in flight, four wait")
        assert items[0].cancel is not None
        items[0].cancel()
        await until(lambda: {"i0.0.0", "i0.0.1"} <= set(backend.waiting), "both slots are free")
        backend.open()
        await running

        assert sorted(source.ends) == ["i0", "i1", "i2"]
        assert backend.requests_in_flight == 0

    run(scenario())


def test_items_that_are_cancelled_together_harm_no_other() -> None:
    """One holds the slot, the other waits for it: what a verdict on both meets."""

    async def scenario() -> None:
        source, backend, items, running = await _contended(3)
        for item in items[:2]:
            assert item.cancel is not None
            item.cancel()
        await turns(20)
        backend.open()
        await asyncio.wait([running], timeout=1)

        assert running.done(), "the manager hangs"
        assert running.exception() is None
        assert sorted(source.ends) == ["i2", "i3", "i4", "i5", "i6", "i7"]

    run(scenario(), STUCK_S - 1)


def test_an_item_that_is_cancelled_before_it_ran_leaves_its_place_to_others() -> None:
    async def scenario() -> None:
        items = [assignment(f"i{n}", one_question) for n in range(4)]
        source = StubSource(items)

        def cancel_first() -> None:
            # Called right after i0 was started, before the event loop ran it.
            if items[0].cancel is not None and len(source.items) == 3:
                items[0].cancel()

        source.on_next = cancel_first
        manager = managed(source, StubBackend(), workers=2)
        await manager.run()

        assert sorted(source.ends) == ["i1", "i2", "i3"]
        assert source.wanted() == 2  # the place is not lost

    run(scenario())


def test_an_item_that_is_cancelled_while_its_code_runs_harms_no_other() -> None:
    begun, release = threading.Event(), threading.Event()

    def blocks(self: Any) -> dict[str, Any]:
        begun.set()
        release.wait(STUCK_S)
        return {}

    async def scenario() -> None:
        items = [assignment("blocks", blocks), assignment("fine", one_question)]
        source = StubSource(items)
        manager = managed(source, StubBackend(), workers=1)
        running = asyncio.ensure_future(manager.run())
        await until(begun.is_set, "the task begins")
        assert items[0].cancel is not None
        items[0].cancel()
        await asyncio.wait([running], timeout=2)

        assert running.done()
        assert list(source.ends) == ["fine"]
        assert source.wanted() == 1

    try:
        run(scenario(), STUCK_S - 1)
    finally:
        release.set()
