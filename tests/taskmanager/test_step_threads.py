"""Task code on threads: the event loop goes on, and so do the other steps."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

from dispatcher.taskmanager import step_threads
from dispatcher.taskmanager.step_threads import StepThreads
from tests.faults.heavy_tasks import compute
from tests.taskmanager.doubles import run, until

STUCK_S = 5.0
"""A step waits this long for its release, and the test has failed long before."""


@pytest.fixture(autouse=True)
def _no_pauses() -> Iterator[None]:
    """Collect no garbage meanwhile: among thousands of tests that is itself a slow step."""
    gc.disable()
    yield
    gc.enable()


_made: list[StepThreads] = []


def step_threads_of_this_test() -> StepThreads:
    """Return StepThreads that are closed also when the test fails before it does so itself."""
    _made.append(StepThreads())
    return _made[-1]


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    """Leave no thread behind: a command called in this process would take it for a stuck task."""
    yield
    while _made:
        _made.pop().close()


def test_a_step_runs_on_another_thread_and_its_value_comes_back() -> None:
    async def scenario() -> None:
        threads = step_threads_of_this_test()
        assert await threads.run(threading.get_ident) != threading.get_ident()
        assert await threads.run(lambda: {"any": "value"}) == {"any": "value"}
        threads.close()

    run(scenario())


def test_under_load_steps_run_and_come_back_in_the_order_given() -> None:
    async def scenario() -> None:
        threads = step_threads_of_this_test()
        ran: list[int] = []
        came_back: list[int] = []

        def step(number: int) -> int:
            ran.append(number)
            return number

        futures = []
        for number in range(3000):
            future = threads.run(lambda number=number: step(number))  # type: ignore[misc]
            future.add_done_callback(lambda done: came_back.append(done.result()))
            futures.append(future)
            if number % 500 == 0:
                await asyncio.sleep(0)  # results come in while steps are given
        values = await asyncio.gather(*futures)

        assert values == list(range(3000))
        assert ran == came_back == values
        threads.close()

    run(scenario())


def test_a_blocking_step_holds_neither_the_event_loop_nor_the_steps_behind_it() -> None:
    async def scenario() -> None:
        threads = step_threads_of_this_test()
        release = threading.Event()
        blocked = threads.run(lambda: release.wait(STUCK_S))
        behind = [threads.run(lambda n=n: n) for n in range(20)]  # type: ignore[misc]

        ticks = 0
        while not all(future.done() for future in behind):
            ticks += 1
            await asyncio.sleep(0.005)

        assert ticks > 1  # the loop ran meanwhile
        assert not blocked.done()
        assert await asyncio.gather(*behind) == list(range(20))
        release.set()
        assert await blocked is True
        threads.close()

    run(scenario(), STUCK_S - 1)


def test_several_blocking_steps_each_leave_a_thread_for_those_behind() -> None:
    async def scenario() -> None:
        threads = step_threads_of_this_test()
        release = threading.Event()
        blocked = [threads.run(lambda: release.wait(STUCK_S)) for _ in range(4)]

        assert await threads.run(lambda: "went on") == "went on"

        assert not any(future.done() for future in blocked)
        release.set()
        assert await asyncio.gather(*blocked) == [True] * 4
        threads.close()

    run(scenario(), STUCK_S - 1)


def test_there_are_never_more_threads_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_threads, "MAX_THREADS", 2)

    async def scenario() -> None:
        threads = step_threads_of_this_test()
        release = threading.Event()
        idents: set[int] = set()

        def block() -> None:
            idents.add(threading.get_ident())
            release.wait(STUCK_S)

        blocked = [threads.run(block) for _ in range(5)]
        await until(lambda: len(idents) == 2, "a second thread takes a step")
        await asyncio.sleep(4 * step_threads.SLOW_STEP_S)  # time for more threads, were there any

        assert len(idents) == 2
        release.set()
        await asyncio.gather(*blocked)
        assert len(idents) == 2
        threads.close()

    run(scenario(), STUCK_S - 1)


def test_a_thread_that_is_no_longer_needed_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_threads, "_IDLE_S", 0.05)

    async def scenario() -> None:
        threads = step_threads_of_this_test()
        release = threading.Event()
        seen: set[threading.Thread] = set()

        def block() -> None:
            seen.add(threading.current_thread())
            release.wait(STUCK_S)

        blocked = [threads.run(block) for _ in range(3)]
        await until(lambda: len(seen) == 3, "three threads")
        release.set()
        await asyncio.gather(*blocked)

        await until(lambda: sum(t.is_alive() for t in seen) == 1, "two threads end")
        assert await threads.run(lambda: "still served") == "still served"
        threads.close()
        await until(lambda: not any(t.is_alive() for t in seen), "the last thread ends")

    run(scenario(), STUCK_S - 1)


@pytest.mark.parametrize("error", [KeyError("k"), SystemExit(3), KeyboardInterrupt()])
def test_an_exception_travels_to_whoever_waits_and_the_thread_lives_on(
    error: BaseException,
) -> None:
    async def scenario() -> None:
        threads = step_threads_of_this_test()

        def fail() -> None:
            raise error

        failing, following = threads.run(fail), threads.run(lambda: "fine")
        with pytest.raises(type(error)) as caught:
            await failing
        assert caught.value is error
        assert await following == "fine"
        threads.close()

    run(scenario())


def test_a_step_that_was_given_up_disturbs_no_other() -> None:
    async def scenario() -> None:
        threads = step_threads_of_this_test()
        release = threading.Event()
        given_up = threads.run(lambda: release.wait(STUCK_S))
        following = threads.run(lambda: "fine")
        given_up.cancel()
        release.set()

        assert await following == "fine"
        threads.close()

    run(scenario())


def test_a_step_of_a_closed_loop_ends_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    crashes: list[object] = []
    monkeypatch.setattr(threading, "excepthook", crashes.append)
    release = threading.Event()
    worker: list[threading.Thread] = []

    def block() -> None:
        worker.append(threading.current_thread())
        release.wait(STUCK_S)

    async def scenario() -> None:
        StepThreads().run(block)
        await until(lambda: worker, "the step begins")

    run(scenario())  # closes the loop while the step still runs
    release.set()
    worker[0].join(2)

    assert not worker[0].is_alive()
    assert not crashes


def test_steps_that_wait_when_it_is_closed_never_run() -> None:
    async def scenario() -> None:
        threads = step_threads_of_this_test()
        release = threading.Event()
        ran: list[str] = []
        worker: list[threading.Thread] = []

        def block() -> None:
            worker.append(threading.current_thread())
            release.wait(STUCK_S)

        blocked = threads.run(block)
        threads.run(lambda: ran.append("a step behind it"))
        await until(lambda: worker, "the step begins")
        threads.close()
        release.set()
        await blocked
        await until(lambda: not worker[0].is_alive(), "the thread ends")

        assert not ran

    run(scenario(), STUCK_S - 1)


def test_slow_steps_are_counted_measured_and_warned_about(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(step_threads, "WARN_STEP_S", 0.06)

    async def scenario() -> None:
        threads = step_threads_of_this_test()
        with caplog.at_level(logging.WARNING):
            await threads.run(lambda: time.sleep(0.1))

        assert threads.slow_steps == 1
        assert threads.longest_step_s >= 0.1
        assert "a task computed or slept for 0." in caplog.text
        threads.close()

    run(scenario())


# --- slow owners and computing threads ----------------------------------------------------------


class Owner:
    """Whose steps they are."""


def threads_in_use(monkeypatch: pytest.MonkeyPatch, cpu_share: float) -> int:
    """Return on how many threads steps run that end never, when they use so much CPU."""
    monkeypatch.setattr(step_threads._CpuOfThreads, "share_since_last", lambda self: cpu_share)
    monkeypatch.setattr(step_threads, "COMPUTING_THREADS", {"quick": 2, "slow": 1})
    monkeypatch.setattr(step_threads, "SLOW_STEP_S", 0.01)

    async def scenario() -> int:
        threads = step_threads_of_this_test()
        release = threading.Event()
        running: list[int] = []

        def block() -> None:
            running.append(threading.get_ident())
            release.wait(STUCK_S)

        blocked = [threads.run(block) for _ in range(6)]
        await until(lambda: len(running) >= 2, "two threads")
        await asyncio.sleep(20 * step_threads.SLOW_STEP_S)  # time for more threads
        in_use = len(running)
        release.set()
        await asyncio.gather(*blocked)
        threads.close()
        return in_use

    in_use: list[int] = []

    async def noted() -> None:
        in_use.append(await scenario())

    run(noted(), STUCK_S - 1)
    return in_use[0]


def test_steps_that_compute_get_few_threads_as_they_share_one_lock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert threads_in_use(monkeypatch, cpu_share=1.0) == 2


@pytest.mark.parametrize(("share", "what"), [(0.05, "wait"), (3.0, "compute outside the lock")])
def test_steps_that_do_not_hold_the_lock_get_more_threads(
    monkeypatch: pytest.MonkeyPatch, share: float, what: str
) -> None:
    assert threads_in_use(monkeypatch, share) > 2, what


def test_who_had_a_slow_step_no_longer_holds_up_those_that_are_quick() -> None:
    async def scenario() -> None:
        threads = step_threads_of_this_test()
        owner, other = Owner(), Owner()
        release = threading.Event()
        await threads.run(lambda: time.sleep(2 * step_threads.SLOW_STEP_S), owner)
        blocked = [threads.run(lambda: release.wait(STUCK_S), owner) for _ in range(3)]

        for _ in range(20):
            await threads.run(lambda: None, other)
            await threads.run(lambda: None)

        assert not any(step.done() for step in blocked)
        assert threads._quick._threads == 1  # none had to be added to get past them
        release.set()
        await asyncio.gather(*blocked)
        threads.close()

    run(scenario(), STUCK_S - 1)


def test_while_steps_compute_the_lock_changes_hands_more_often_until_it_is_closed() -> None:
    async def scenario() -> None:
        threads = step_threads_of_this_test()
        usual_s = sys.getswitchinterval()
        computing = threads.run(lambda: compute(0.4))
        await until(lambda: sys.getswitchinterval() < usual_s, "a shorter interval")
        await computing
        threads.close()
        assert sys.getswitchinterval() == usual_s

    run(scenario())


@pytest.mark.parametrize("closed_first", [0, 1])
def test_the_lock_changes_hands_as_usual_when_the_last_of_several_is_closed(
    closed_first: int,
) -> None:
    async def scenario() -> None:
        usual_s = sys.getswitchinterval()
        both = [step_threads_of_this_test() for _ in range(2)]
        for threads in both:
            computing = threads.run(lambda: compute(0.4))
            await until(partial(getattr, threads, "_is_prompt"), "a shorter interval")
            await computing
        both.pop(closed_first).close()
        assert sys.getswitchinterval() < usual_s
        both.pop().close()
        assert sys.getswitchinterval() == usual_s

    run(scenario())


def test_an_owner_that_is_gone_is_forgotten() -> None:
    async def scenario() -> None:
        threads = step_threads_of_this_test()
        owner = Owner()
        await threads.run(lambda: time.sleep(2 * step_threads.SLOW_STEP_S), owner)
        assert len(threads._slow_owners) == 1
        del owner
        await threads.run(lambda: None)
        gc.collect()
        assert not len(threads._slow_owners)
        threads.close()

    run(scenario())
