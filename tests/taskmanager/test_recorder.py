"""When steps leave for the server, and what happens to those that cannot. Time is virtual here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest

from dispatcher.errors import AccessDeniedError, BadRequestError, UsageError
from dispatcher.models import StepItem, StepOutcome, StepsResponse, WorkItem, WorkStatus
from dispatcher.taskmanager import recorder
from dispatcher.taskmanager.backend.request import Response
from dispatcher.taskmanager.recorder import StepRecorder
from dispatcher.taskmanager.steps import Asked, StepLog
from tests.faults.sim_loop import VirtualLoop
from tests.taskmanager.doubles import answer, ask

PROMISED_S = 0.25


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test's coroutine on a loop whose time is virtual; nothing in it may have failed."""
    loop = VirtualLoop(1_000_000)
    try:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(main())
        assert not loop.defects
    finally:
        asyncio.set_event_loop(None)
        loop.close()


class Desk:
    """A server that takes steps: `calls` are those that arrived, `taken` the steps with when."""

    def __init__(self) -> None:
        self.up = True
        self.latency_s = 0.01
        self.loses_replies = 0
        self.recording = True
        self.error: Exception | None = None
        self.judge: Callable[[StepItem], StepOutcome] = lambda _: StepOutcome.ACCEPTED
        self.tries = 0
        self.calls: list[list[StepItem]] = []
        self.taken: list[tuple[float, StepItem]] = []

    async def __call__(self, steps: Sequence[StepItem]) -> StepsResponse:
        self.tries += 1
        await asyncio.sleep(self.latency_s)
        if self.error is not None:
            raise self.error
        if not self.up:
            return StepsResponse(WorkStatus.SERVER_UNAVAILABLE)
        self.calls.append(list(steps))
        self.taken += [(now(), step) for step in steps]
        if self.loses_replies:
            self.loses_replies -= 1
            return StepsResponse(WorkStatus.SERVER_UNAVAILABLE)
        outcomes = [self.judge(step) for step in steps]
        return StepsResponse(WorkStatus.OK, outcomes, self.recording)

    @property
    def places(self) -> list[tuple[int, tuple[int, int]]]:
        """Line and position of what was taken, in the order of its arrival."""
        return [(step.work_id, step.pos) for _, step in self.taken]


class Running:
    """An item at work: its task asks, is answered, and computes."""

    def __init__(self, recorder: StepRecorder, number: int = 0, of_run: str | None = "r") -> None:
        self.item = WorkItem(number, "{}", run=of_run, lease=f"{number}.1", attempt=2)
        self.log = StepLog(model="m")
        self.recorder = recorder
        self.yields = 0
        self.open: list[Asked] = []
        self.happened: list[float] = []

    def asks(self, count: int = 1) -> None:
        self.open += [self.log.ask(ask("?"), (self.yields, place)) for place in range(count)]
        self.yields += 1

    def is_answered(self, text: str = "yes", content: Any = None) -> Response:
        asked = self.open.pop(0)
        response = answer(asked.request, text)
        if content is not None:
            response.content = content
        self.recorder.offer(self.item, self.log, asked, response)
        self.happened.append(now())
        return response

    def computes(self) -> None:
        self.log.taken = self.log.answered

    def steps_on(self, text: str = "yes") -> None:
        """It is answered and asks again at once."""
        self.is_answered(text)
        self.computes()
        self.asks()


@asynccontextmanager
async def recording(desk: Desk) -> AsyncIterator[StepRecorder]:
    recorder = StepRecorder(desk)
    running = asyncio.ensure_future(recorder.run())
    try:
        yield recorder
        assert not running.done(), running
    finally:
        running.cancel()


def now() -> float:
    return asyncio.get_running_loop().time()


def asking(recorder: StepRecorder, number: int = 0) -> Running:
    item = Running(recorder, number)
    item.asks()
    return item


# --- when ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["asks again", "computes"])
def test_a_step_is_on_its_way_within_a_quarter_of_a_second(then: str) -> None:
    worst = 0.0

    async def main() -> None:
        nonlocal worst
        desk = Desk()
        desk.latency_s = 0.0
        async with recording(desk) as recorder:
            rng = Random(1)
            for number in range(300):
                item = asking(recorder, number)
                item.is_answered()
                item.computes()
                if then == "asks again":
                    item.asks()
                happened = now()
                while not desk.taken or desk.taken[-1][1].work_id != number:
                    await asyncio.sleep(0.001)
                    assert now() - happened < 1.0
                worst = max(worst, now() - happened)
                await asyncio.sleep(rng.uniform(0.0, 0.3))

    run(main)
    print(f"300 steps, the slowest left after {1000 * worst:.0f} ms")
    assert worst <= PROMISED_S


def test_under_a_steady_load_no_step_is_late_and_calls_are_few() -> None:
    async def main() -> None:
        desk = Desk()
        desk.latency_s = 0.02
        async with recording(desk) as recorder:
            items = [asking(recorder, number) for number in range(100)]
            rng = Random(2)
            happened: dict[tuple[int, tuple[int, int]], float] = {}
            for _ in range(5000):
                item = rng.choice(items)
                happened[item.item.work_id, item.open[0].position] = now()
                item.steps_on()
                await asyncio.sleep(0.001)
            await asyncio.sleep(1.0)

            assert sorted(desk.places) == sorted(happened)
            late = [at - happened[step.work_id, step.pos] for at, step in desk.taken]
            print(f"5000 steps in {len(desk.calls)} calls, at most {1000 * max(late):.0f} ms late")
            assert max(late) <= PROMISED_S
            assert len(desk.calls) < 60

    run(main)


@pytest.mark.parametrize("wait_s", [0.0, 0.05, 0.3, 1.5])
def test_the_last_step_of_an_item_is_not_sent_however_long_it_waits_for_a_thread(
    wait_s: float,
) -> None:
    async def main() -> None:
        desk = Desk()
        async with recording(desk) as recorder:
            for number in range(50):
                item = asking(recorder, number)
                item.is_answered()
                await asyncio.sleep(wait_s)
                item.computes()
                await asyncio.sleep(0.01)
                recorder.forget(item.item)
            await asyncio.sleep(1.0)

            assert desk.tries == 0
            assert not recorder.is_waiting_for({f"{number}.1" for number in range(50)})

    run(main)


def test_a_step_does_not_wait_for_a_thread_for_ever() -> None:
    async def main() -> None:
        desk = Desk()
        async with recording(desk) as steps:
            asking(steps).is_answered()
            await asyncio.sleep(recorder.LONGEST_FIRST_HOLD_S - 0.01)
            assert not desk.taken
            await asyncio.sleep(PROMISED_S)
            assert desk.places == [(0, (0, 0))]

    run(main)


def test_where_tasks_ask_again_a_step_waits_for_no_thread() -> None:
    async def main() -> None:
        desk = Desk()
        async with recording(desk) as steps:
            other = asking(steps, 1)
            other.steps_on()
            other.is_answered()
            desk.taken.clear()
            asking(steps, 2).is_answered()
            await asyncio.sleep(0.26)
            assert (2, (0, 0)) in desk.places

    run(main)


def test_once_it_is_clear_that_tasks_ask_only_once_nothing_is_kept_of_their_answers() -> None:
    async def main() -> None:
        desk = Desk()
        async with recording(desk) as steps:
            for number in range(64):
                item = asking(steps, number)
                item.is_answered()
                steps.note_end(item.log)
                steps.forget(item.item)
            item = asking(steps, 64)
            item.is_answered()
            assert not steps.is_waiting_for({item.item.lease})

            item.asks()  # after all
            item.is_answered()
            assert not steps.is_waiting_for({item.item.lease}), "what follows a gap"
            another = asking(steps, 65)
            another.is_answered()
            assert steps.is_waiting_for({another.item.lease})

    run(main)


def test_answers_to_a_list_are_sent_while_others_are_out() -> None:
    async def main() -> None:
        desk = Desk()
        async with recording(desk) as recorder:
            item = Running(recorder)
            item.asks(3)
            item.is_answered()
            item.is_answered()
            await asyncio.sleep(PROMISED_S)
            assert desk.places == [(0, (0, 0)), (0, (0, 1))]

            item.is_answered()  # the last one: now it may be all over
            await asyncio.sleep(0.01)
            assert len(desk.taken) == 2
            recorder.forget(item.item)
            await asyncio.sleep(3.0)
            assert len(desk.taken) == 2

    run(main)


def test_a_step_says_whose_it_is_and_holds_the_answer_as_it_was_received() -> None:
    async def main() -> None:
        desk = Desk()
        async with recording(desk) as recorder:
            item = asking(recorder, 7)
            asked = item.open[0]
            response = item.is_answered("the answer")
            response.content["choices"].pop()  # type: ignore[index]
            asked.request.content["messages"].append("more")
            item.asks()
            await asyncio.sleep(PROMISED_S)

            [(_, step)] = desk.taken
            assert (step.work_id, step.lease, step.attempt, step.run) == (7, "7.1", 2, "r")
            assert (step.pos, step.hash) == ((0, 0), asked.hash)
            assert "the answer" in (step.response or "")

    run(main)


# --- the server is away -------------------------------------------------------------------------


def test_while_the_server_is_away_steps_wait_and_then_arrive_in_order_once() -> None:
    async def main() -> None:
        desk = Desk()
        desk.up = False
        async with recording(desk) as recorder:
            items = [asking(recorder, number) for number in range(5)]
            for _ in range(40):
                for item in items:
                    item.steps_on()
                await asyncio.sleep(0.1)
            assert 2 <= desk.tries <= 8
            desk.up = True
            await asyncio.sleep(2.2)

            assert sorted(desk.places) == [(n, (y, 0)) for n in range(5) for y in range(40)]
            for number in range(5):
                mine = [position for work_id, position in desk.places if work_id == number]
                assert mine == sorted(mine)

    run(main)


def test_steps_whose_reply_was_lost_are_sent_again_before_later_ones() -> None:
    async def main() -> None:
        desk = Desk()
        desk.loses_replies = 2
        async with recording(desk) as recorder:
            item = asking(recorder)
            for _ in range(10):
                item.steps_on()
                await asyncio.sleep(0.2)
            await asyncio.sleep(1.0)

            seen = list(dict.fromkeys(desk.places))
            assert seen == [(0, (y, 0)) for y in range(10)]
            assert desk.places[:2] == [(0, (0, 0))] * 2
            assert len(desk.places) <= 10 + 2 * 5
            assert not recorder.is_waiting_for({"0.1"})

    run(main)


def test_what_waits_is_bounded_and_items_left_out_have_no_gap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recorder, "_WAITING_CHARACTERS", 100_000)

    async def main() -> None:
        desk = Desk()
        desk.up = False
        async with recording(desk) as steps:
            items = [asking(steps, number) for number in range(20)]
            most = 0
            for turn in range(100):
                for item in items:
                    item.steps_on("x" * (turn % 7 * 300))
                most = max(most, steps._size)
                await asyncio.sleep(0.01)
            assert most < 103_000
            desk.up = True
            await asyncio.sleep(2.2)

            assert steps._size == 0
            assert 40 < len(desk.taken) < 200
            for number in range(20):
                mine = [position[0] for work_id, position in desk.places if work_id == number]
                assert mine == list(range(len(mine)))

    run(main)


def test_answers_without_text_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "_WAITING_CHARACTERS", 100_000)

    async def main() -> None:
        desk = Desk()
        desk.up = False
        async with recording(desk) as steps:
            item = asking(steps)
            for _ in range(5000):
                item.is_answered(content={})
                item.asks()
            assert sum(map(len, steps._waiting.values())) < 200

    run(main)


def test_a_call_is_bounded_in_steps_and_in_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "_CALL_STEPS", 50)
    monkeypatch.setattr(recorder, "_CALL_CHARACTERS", 40_000)

    async def main() -> None:
        desk = Desk()
        async with recording(desk) as steps:
            small, large = asking(steps, 0), asking(steps, 1)
            for _ in range(120):
                small.steps_on()
            for _ in range(60):
                large.steps_on("x" * 5000)
            await asyncio.sleep(1.0)

            assert len(desk.taken) == 180
            assert max(len(call) for call in desk.calls) == 50
            sizes = [sum(len(step.response or "") for step in call) for call in desk.calls]
            assert 30_000 < max(sizes) < 46_000

    run(main)


# --- what the server says -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "outcome", [o for o in StepOutcome if o is not StepOutcome.ACCEPTED], ids=str
)
def test_a_lease_whose_step_was_refused_gets_no_more_and_others_do(outcome: StepOutcome) -> None:
    async def main() -> None:
        desk = Desk()
        desk.judge = lambda step: outcome if step.work_id == 0 else StepOutcome.ACCEPTED
        async with recording(desk) as recorder:
            refused, other = asking(recorder, 0), asking(recorder, 1)
            for _ in range(10):
                refused.steps_on()
                other.steps_on()
                await asyncio.sleep(0.11)
            await asyncio.sleep(1.0)

            assert 1 <= sum(work_id == 0 for work_id, _ in desk.places) <= 2
            assert sum(work_id == 1 for work_id, _ in desk.places) == 10
            assert recorder._size == 0
            assert not refused.log.is_open
            assert other.log.is_open

    run(main)


def test_an_answer_that_cannot_be_recorded_or_is_too_long_ends_the_record_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recorder, "STEP_BYTES", 1000)

    async def main() -> None:
        desk = Desk()
        async with recording(desk) as steps:
            odd, long, fine = (asking(steps, number) for number in range(3))
            for turn in range(6):
                odd.is_answered(content={"x": float("nan")} if turn == 2 else None)
                odd.asks()
                long.steps_on("ü" * 600 if turn == 3 else "ü" * 400)
                fine.steps_on()
            await asyncio.sleep(1.0)

            counts = [sum(work_id == n for work_id, _ in desk.places) for n in range(3)]
            assert counts == [2, 3, 6]

    run(main)


def test_an_older_server_is_asked_once_and_then_left_in_peace() -> None:
    async def main() -> None:
        desk = Desk()
        desk.recording = False
        async with recording(desk) as recorder:
            item = asking(recorder)
            for _ in range(30):
                item.steps_on()
                await asyncio.sleep(0.1)

            assert desk.tries == 1
            assert not recorder.is_on
            assert recorder._size == 0
            assert not recorder._waiting

    run(main)


@pytest.mark.parametrize("error", [AccessDeniedError, BadRequestError, UsageError])
def test_a_refused_call_ends_the_recording_and_nothing_else(
    error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        desk = Desk()
        desk.error = error("go away")
        async with recording(desk) as recorder:
            item = asking(recorder)
            for _ in range(10):
                item.steps_on()
                await asyncio.sleep(0.1)
            assert await recorder.flush()
            assert desk.tries == 1
            assert not recorder.is_on

    with caplog.at_level(logging.WARNING):
        run(main)
    assert "not recorded any more: go away" in caplog.text


def test_items_without_a_lease_are_not_recorded() -> None:
    async def main() -> None:
        desk = Desk()
        async with recording(desk) as recorder:
            item = asking(recorder)
            item.item.lease = None
            item.steps_on()
            recorder.cut(item.item, item.log, (0, 0))
            recorder.forget(item.item)
            await asyncio.sleep(1.0)
            assert desk.tries == 0

    run(main)


# --- before a lease ends ------------------------------------------------------------------------


def test_flushing_sends_at_once_what_waits_and_only_of_the_leases_named() -> None:
    async def main() -> None:
        desk = Desk()
        async with recording(desk) as recorder:
            first, second = asking(recorder, 0), asking(recorder, 1)
            first.is_answered()
            second.is_answered()

            assert await recorder.flush({"0.1"})
            assert desk.places == [(0, (0, 0))]
            assert await recorder.flush()
            assert desk.places == [(0, (0, 0)), (1, (0, 0))]
            assert now() < recorder_hold()

    def recorder_hold() -> float:
        return recorder.HOLD_S

    run(main)


def test_flushing_ends_although_steps_keep_coming() -> None:
    """Otherwise results would wait for ever behind the steps of busy items."""

    async def main() -> None:
        desk = Desk()
        async with recording(desk) as recorder:
            item = asking(recorder)

            async def go_on() -> None:
                while True:
                    item.steps_on()
                    await asyncio.sleep(0.002)

            busy = asyncio.ensure_future(go_on())
            await asyncio.sleep(0.01)
            start = now()
            for leases in (None, {"0.1"}):
                assert await asyncio.wait_for(recorder.flush(leases), 1.0)
            assert now() - start < 0.1
            busy.cancel()

    run(main)


def test_flushing_waits_for_a_call_that_is_under_way() -> None:
    async def main() -> None:
        desk = Desk()
        desk.latency_s = 0.5
        async with recording(desk) as recorder:
            item = asking(recorder)
            item.steps_on()
            await asyncio.sleep(0.2)
            assert desk.tries == 1

            assert await recorder.flush({"0.1"})
            assert desk.places == [(0, (0, 0))]

    run(main)


def test_flushing_says_when_the_server_is_away() -> None:
    async def main() -> None:
        desk = Desk()
        desk.up = False
        async with recording(desk) as recorder:
            assert await recorder.flush()
            item = asking(recorder)
            item.steps_on()
            assert not await recorder.flush()
            assert recorder.is_waiting_for({"0.1", None})
            assert not recorder.is_waiting_for({"1.1", None})

    run(main)


@pytest.mark.parametrize(("keep", "sent"), [(None, 5), (0, 0), (1, 1), (3, 3), (9, 5)])
def test_of_a_lease_that_ends_only_the_yields_that_are_kept_are_sent(
    keep: int | None, sent: int
) -> None:
    async def main() -> None:
        desk = Desk()
        desk.up = False
        async with recording(desk) as recorder:
            item = asking(recorder)
            for _ in range(5):
                item.steps_on()
            recorder.forget(item.item, keep)
            desk.up = True
            await recorder.flush()

            assert desk.places == [(0, (number, 0)) for number in range(sent)]
            assert recorder._size == 0

    run(main)


def test_a_mismatch_is_told_also_when_the_item_ends_at_once_and_is_told_once() -> None:
    async def main() -> None:
        desk = Desk()
        async with recording(desk) as recorder:
            item = asking(recorder)
            recorder.cut(item.item, item.log, (2, 1))
            item.is_answered()
            recorder.forget(item.item)
            assert recorder.is_waiting_for({"0.1"})
            await asyncio.sleep(1.0)

            assert [(s.pos, s.response) for _, s in desk.taken] == [((2, 1), None)]
            assert not recorder.is_waiting_for({"0.1"})

    run(main)


def test_a_mismatch_is_told_before_what_the_task_was_answered_instead() -> None:
    async def main() -> None:
        desk = Desk()
        desk.loses_replies = 1
        async with recording(desk) as recorder:
            item = asking(recorder)
            recorder.cut(item.item, item.log, (0, 0))
            for _ in range(3):
                item.steps_on()
            await asyncio.sleep(1.0)

            for call in desk.calls:
                assert [(step.pos, step.response is None) for step in call] == [
                    ((0, 0), True),
                    ((0, 0), False),
                    ((1, 0), False),
                    ((2, 0), False),
                ]

    run(main)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_nothing_is_kept_of_items_that_ended(seed: int) -> None:
    rng = Random(seed)

    async def main() -> None:
        desk = Desk()
        desk.judge = lambda _: rng.choice([StepOutcome.ACCEPTED] * 5 + list(StepOutcome))
        async with recording(desk) as recorder:
            items: dict[int, Running] = {}
            for number in range(400):
                desk.up = rng.random() < 0.8
                desk.loses_replies = rng.random() < 0.1
                if number < 350:
                    items[number] = asking(recorder, number)
                for item in rng.sample(list(items.values()), min(len(items), 5)):
                    item.steps_on("x" * rng.randrange(100))
                if rng.random() < 0.1 and items:
                    item = rng.choice(list(items.values()))
                    recorder.cut(item.item, item.log, (0, 0))
                if len(items) > 10 or number >= 350:
                    for ended in rng.sample(list(items), min(len(items), 2)):
                        recorder.forget(items.pop(ended).item, rng.choice([None, 0, 0, 1, 2]))
                if rng.random() < 0.1:
                    await recorder.flush({"0.1"} if rng.random() < 0.5 else None)
                waiting = [w for of_lease in recorder._waiting.values() for w in of_lease]
                assert recorder._size == sum(w.size for w in waiting)
                await asyncio.sleep(rng.uniform(0.0, 0.05))
            for item in items.values():
                recorder.forget(item.item)
            desk.up, desk.loses_replies = True, 0
            assert await recorder.flush()

            assert recorder._size == 0
            assert not recorder._waiting

    run(main)


# --- a lease that is renewed ---------------------------------------------------------------------


def test_steps_that_came_while_a_lease_was_renewed_go_out_under_the_new_one_in_order() -> None:
    async def main() -> None:
        desk = Desk()
        # The old lease ended at the server before the worker heard of the new one.
        desk.judge = lambda step: StepOutcome.STALE if step.lease == "0.1" else StepOutcome.ACCEPTED
        async with recording(desk) as recorder:
            item, other = asking(recorder), asking(recorder, 1)
            recorder.hold({"0.1"})
            item.steps_on()
            other.steps_on()
            item.steps_on()
            await asyncio.sleep(1.0)
            assert [step.lease for _, step in desk.taken] == ["1.1"]
            item.item.lease, item.item.attempt = "0.9", 3
            recorder.rename("0.1", item.item)
            recorder.let_go({"0.1"})
            item.steps_on()
            await asyncio.sleep(1.0)

        mine = [(step.lease, step.attempt, step.pos) for _, step in desk.taken if not step.work_id]
        assert mine == [("0.9", 3, (place, 0)) for place in range(3)]
        assert item.log.is_open
        assert recorder._size == 0

    run(main)


def test_steps_of_a_lease_that_was_not_renewed_after_all_go_out_as_they_are() -> None:
    async def main() -> None:
        desk = Desk()
        async with recording(desk) as recorder:
            item = asking(recorder)
            recorder.hold({"0.1"})
            item.steps_on()
            assert await recorder.flush()
            assert desk.taken == []
            recorder.let_go({"0.1"})
            await asyncio.sleep(PROMISED_S)

        assert [step.lease for _, step in desk.taken] == ["0.1"]

    run(main)
