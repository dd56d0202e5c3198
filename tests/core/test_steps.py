"""Recorded steps in the queue: who may add them, what ends them, and what they may cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec
import pytest

from dispatcher.core.events import Event, Position, QueueState, Stepped, StepsCut
from dispatcher.core.work_queue import (
    CRASH,
    MAX_RETRIES_EXCEEDED,
    Grant,
    QueuePolicy,
    WorkQueue,
    parse_lease_id,
)
from dispatcher.models import StepOutcome
from tests.support.queues import arrivals

ACCEPTED, STALE, FULL = StepOutcome.ACCEPTED, StepOutcome.STALE, StepOutcome.FULL
DONE = b'{"answer": 1}'
ERROR = b'{"__ERROR__": {}}'
THREE: list[Position] = [(0, 0), (1, 0), (1, 1)]
"""What `with_steps` records: one request, then a list of two."""

encode = msgspec.json.Encoder().encode
decode_event = msgspec.json.Decoder(Event).decode
decode_state = msgspec.json.Decoder(QueueState).decode


def queue_of(lines: int, **policy: Any) -> WorkQueue:
    queue = WorkQueue(QueuePolicy(**policy))
    queue.open_lines(0, [10] * lines)
    return queue


def lease(queue: WorkQueue, worker: str = "", now: float = 0.0) -> Grant:
    (grant,) = queue.lease_ready(worker, 1, now)
    return grant


def serial(grant: Grant) -> int:
    named = parse_lease_id(grant.lease)
    assert named is not None
    return named[1]


def record(
    queue: WorkQueue,
    grant: Grant,
    position: Position,
    request_hash: str = "h",
    response: bytes = b'"yes"',
    attempt: int | None = None,
) -> StepOutcome:
    attempt = grant.attempt if attempt is None else attempt
    return queue.record_step(
        grant.work_id, serial(grant), attempt, position, request_hash, response
    )


def cut(queue: WorkQueue, grant: Grant, position: Position) -> StepOutcome:
    return queue.cut_steps(grant.work_id, serial(grant), grant.attempt, position)


def give_back(
    queue: WorkQueue,
    grant: Grant,
    *,
    charge: bool = False,
    reason: str = "sigterm",
    keep_yields: int | None = None,
) -> None:
    assert queue.release(
        grant.work_id,
        serial(grant),
        charge=charge,
        reason=reason,
        keep_yields=keep_yields,
        now=1.0,
    )


def recorded(queue: WorkQueue, work_id: int = 0) -> dict[Position, str]:
    return {position: note.hash for position, note in queue.steps.of(work_id).items()}


def with_steps(worker: str = "", **policy: Any) -> tuple[WorkQueue, Grant]:
    """One line, leased, with three steps."""
    queue = queue_of(1, **policy)
    if worker:
        queue.heartbeat(worker, {}, backend_up=True, now=0.0)
    grant = lease(queue, worker)
    assert [record(queue, grant, position) for position in THREE] == [ACCEPTED] * 3
    return queue, grant


def with_a_copy() -> tuple[WorkQueue, Grant, Grant]:
    """One line that runs for so long that another worker got a copy of it."""
    queue = queue_of(11)
    for worker in ("slow", "idle"):
        queue.heartbeat(worker, {}, backend_up=True, now=0.0)
    slow = lease(queue, "slow")
    queue.heartbeat("slow", {(slow.work_id, serial(slow)): 1}, backend_up=True, now=0.0)
    for quick in queue.lease_ready("", 10, 0.0):
        queue.finish(quick.work_id, serial(quick), DONE, now=1.0)
    (copy,) = queue.lease_backup("idle", 1, 20.0)
    return queue, slow, copy


def assert_empty(queue: WorkQueue) -> None:
    assert len(queue.steps) == 0
    assert queue.steps.size == 0
    assert queue.steps.size_of(0) == 0
    assert all(not item.steps for item in queue.checkpoint().items)


# -------------------------------------------------------------------- who may add


def test_a_copy_adds_no_steps_as_long_as_the_older_lease_lives() -> None:
    queue, slow, copy = with_a_copy()
    queue.take_events()

    assert record(queue, copy, (0, 0)) is STALE
    assert cut(queue, copy, (0, 0)) is STALE
    assert queue.take_events() == []
    assert record(queue, slow, (0, 0)) is ACCEPTED


def test_a_copy_goes_on_with_the_steps_when_the_older_lease_ends_free() -> None:
    queue, slow, copy = with_a_copy()
    record(queue, slow, (0, 0), "first")
    give_back(queue, slow)

    assert record(queue, copy, (1, 0), "second") is ACCEPTED
    assert recorded(queue) == {(0, 0): "first", (1, 0): "second"}


@pytest.mark.parametrize("who", ["slow", "copy"])
def test_an_attempt_that_is_charged_already_adds_no_steps(who: str) -> None:
    queue, slow, copy = with_a_copy()
    record(queue, slow, (0, 0))
    ended, left = (slow, copy) if who == "slow" else (copy, slow)
    give_back(queue, ended, charge=True)

    assert record(queue, left, (1, 0)) is STALE
    assert cut(queue, left, (0, 0)) is STALE
    assert list(recorded(queue)) == [(0, 0)]


def test_the_oldest_lease_is_still_the_oldest_after_a_restart() -> None:
    queue, slow, copy = with_a_copy()
    again = WorkQueue(queue.policy)
    again.restore(decode_state(encode(queue.checkpoint())), 0.0)

    assert record(again, copy, (0, 0)) is STALE
    assert record(again, slow, (0, 0)) is ACCEPTED


Late = Callable[[WorkQueue, Grant], object]
TOO_LATE: dict[str, Late] = {
    "the lease was given back": give_back,
    "the lease was given back, charged": lambda q, g: give_back(q, g, charge=True),
    "the lease was given back, and the item handed out again": (
        lambda q, g: (give_back(q, g), lease(q))
    ),
    "the next attempt began": lambda q, g: (give_back(q, g, charge=True), lease(q)),
    "what it sent was no result": lambda q, g: q.fail(0, serial(g), "x", 1.0),
    "the item is done": lambda q, g: q.finish(0, serial(g), DONE, now=1.0),
    "the item is done by another one": lambda q, g: q.finish(0, None, DONE, now=1.0),
    "the item was given up": lambda q, g: q.tombstone(0, MAX_RETRIES_EXCEEDED, ERROR, 1.0),
    "the time is over": lambda q, g: q.expire(5000.0),
}


@pytest.mark.parametrize("when", TOO_LATE)
def test_a_step_is_stale_when(when: str) -> None:
    queue, grant = with_steps()
    TOO_LATE[when](queue, grant)
    left = recorded(queue)
    queue.take_events()

    assert record(queue, grant, (2, 0)) is STALE
    assert cut(queue, grant, (0, 0)) is STALE

    assert queue.take_events() == []
    assert recorded(queue) == left


@pytest.mark.parametrize("attempt", [0, 2, -1, 2**70])
def test_a_step_of_another_attempt_is_stale(attempt: int) -> None:
    queue, grant = with_steps()
    assert record(queue, grant, (2, 0), attempt=attempt) is STALE


@pytest.mark.parametrize("work_id", [-1, 1, 2, 2**70])
@pytest.mark.parametrize("number", [None, 0, 1, -1, 2**70])
def test_a_step_of_no_lease_is_stale(work_id: int, number: int | None) -> None:
    queue = queue_of(2)
    lease(queue)
    assert queue.record_step(work_id, number, 1, (0, 0), "h", b"1") is STALE
    assert queue.cut_steps(work_id, number, 1, (0, 0)) is STALE
    assert_empty(queue)


def test_the_next_attempt_goes_on_with_the_steps_that_were_kept() -> None:
    queue, grant = with_steps()
    give_back(queue, grant, charge=True, keep_yields=1)
    again = lease(queue)

    assert again.attempt == 2
    assert record(queue, again, (1, 0), "another") is ACCEPTED
    assert recorded(queue) == {(0, 0): "h", (1, 0): "another"}
    assert queue.counters.step_mismatches == 0


# -------------------------------------------------------------------- what is recorded twice


def test_a_step_that_is_recorded_already_is_accepted_and_makes_no_event() -> None:
    queue, grant = with_steps()
    queue.take_events()

    assert record(queue, grant, (1, 0), "h", b'"the same request, answered otherwise"') is ACCEPTED

    assert queue.take_events() == []
    assert queue.counters.steps == 3
    assert queue.steps.size == 3 * len(b'"yes"')


def test_another_request_at_a_recorded_position_voids_what_follows_and_is_counted() -> None:
    queue, grant = with_steps()
    record(queue, grant, (2, 0))
    queue.take_events()

    assert record(queue, grant, (1, 0), "other", b"1234") is ACCEPTED

    assert recorded(queue) == {(0, 0): "h", (1, 0): "other"}
    cut_at, stepped = queue.take_events()
    assert cut_at == StepsCut(0, (1, 0))
    assert isinstance(stepped, Stepped)
    assert (queue.counters.steps, queue.counters.step_mismatches) == (5, 1)
    assert queue.steps.size == len(b'"yes"') + 4


def test_a_cut_drops_what_stands_there_and_after_it() -> None:
    queue, grant = with_steps()
    assert cut(queue, grant, (1, 1)) is ACCEPTED
    assert list(recorded(queue)) == [(0, 0), (1, 0)]
    assert cut(queue, grant, (0, 0)) is ACCEPTED
    assert_empty(queue)
    assert queue.counters.step_mismatches == 2


def test_a_cut_behind_the_last_step_changes_and_counts_nothing() -> None:
    queue, grant = with_steps()
    queue.take_events()
    assert cut(queue, grant, (1, 2)) is ACCEPTED
    assert cut(queue, grant, (2, 0)) is ACCEPTED
    assert queue.take_events() == []
    assert queue.counters.step_mismatches == 0


def test_the_steps_of_a_list_may_come_in_any_order() -> None:
    queue = queue_of(1)
    grant = lease(queue)
    for position in [(0, 2), (0, 0), (1, 5), (0, 1), (1, 0)]:
        assert record(queue, grant, position) is ACCEPTED
    cut(queue, grant, (0, 2))
    assert sorted(recorded(queue)) == [(0, 0), (0, 1)]


# -------------------------------------------------------------------- what ends them

KEPT: dict[str, tuple[Callable[[WorkQueue, Grant], object], list[Position]]] = {
    "a preemption": (give_back, THREE),
    "a crash": (lambda q, g: give_back(q, g, reason=CRASH), THREE),
    "a charged release": (lambda q, g: give_back(q, g, charge=True), THREE),
    "the work timeout": (lambda q, g: q.expire(5000.0), THREE),
    "TaskRetry": (lambda q, g: give_back(q, g, charge=True, keep_yields=0), []),
    "an exception in the second yield": (
        lambda q, g: give_back(q, g, charge=True, keep_yields=1),
        [(0, 0)],
    ),
    "an exception in the third yield": (
        lambda q, g: give_back(q, g, charge=True, keep_yields=2),
        THREE,
    ),
    "an exception in a yield beyond all": (
        lambda q, g: give_back(q, g, charge=True, keep_yields=2**70),
        THREE,
    ),
    "a result that is none": (lambda q, g: q.fail(0, serial(g), "not JSON", 1.0), []),
    "a result": (lambda q, g: q.finish(0, serial(g), DONE, now=1.0), []),
    "a result of somebody else": (lambda q, g: q.finish(0, None, DONE, now=1.0), []),
    "a tombstone": (lambda q, g: q.tombstone(0, MAX_RETRIES_EXCEEDED, ERROR, 1.0), []),
}


@pytest.mark.parametrize("end", KEPT)
def test_what_is_left_of_the_steps_after(end: str) -> None:
    make, left = KEPT[end]
    queue, grant = with_steps()

    make(queue, grant)

    assert sorted(recorded(queue)) == left
    assert queue.steps.size == len(left) * len(b'"yes"') == queue.steps.size_of(0)
    assert queue.counters.step_mismatches == 0


@pytest.mark.parametrize("progress", [0, 1], ids=["waiting", "running"])
def test_the_steps_stay_when_the_worker_vanishes(progress: int) -> None:
    queue, grant = with_steps("w")
    queue.heartbeat("w", {(0, serial(grant)): progress}, backend_up=True, now=0.0)
    queue.expire(31.0)

    assert queue.counters.crashed == progress
    assert sorted(recorded(queue)) == THREE
    assert sorted(recorded(queue, lease(queue, now=32.0).work_id)) == THREE


def test_a_worker_that_comes_back_in_time_goes_on_adding_steps() -> None:
    queue, grant = with_steps("w")
    queue.heartbeat("w", {(0, serial(grant)): 1}, backend_up=True, now=0.0)
    queue.expire(31.0)
    assert record(queue, grant, (2, 0)) is STALE
    queue.heartbeat("w", {(0, serial(grant)): 1}, backend_up=True, now=32.0)

    assert record(queue, grant, (2, 0)) is ACCEPTED


def test_the_last_of_many_free_releases_is_charged_and_keeps_the_steps() -> None:
    queue, grant = with_steps(max_free_releases=1)
    give_back(queue, grant)
    give_back(queue, lease(queue))
    assert queue.counters.charged == 1
    assert sorted(recorded(queue)) == THREE


def test_an_item_out_of_reissues_has_no_steps_once_it_has_its_line() -> None:
    queue, grant = with_steps(max_retries=0)
    give_back(queue, grant, charge=True)
    (condemned,) = queue.condemned_ids()
    assert record(queue, grant, (2, 0)) is STALE
    queue.tombstone(condemned, MAX_RETRIES_EXCEEDED, ERROR, 1.0)

    assert_empty(queue)
    queue.finish(0, serial(grant), DONE, now=2.0)  # late, over the tombstone
    assert_empty(queue)


def test_the_end_of_one_item_leaves_the_steps_of_the_others() -> None:
    queue = queue_of(3)
    grants = queue.lease_ready("", 3, 0.0)
    for grant in grants:
        record(queue, grant, (0, 0), "h", b"1" * (grant.work_id + 1))
    queue.finish_all(arrivals((1, None, DONE, "")), 1.0)
    assert [work_id for work_id, _ in queue.steps] == [0, 2]
    assert (queue.steps.size, queue.steps.size_of(1)) == (1 + 3, 0)


# -------------------------------------------------------------------- limits

SMALL = {"step_bytes": 10, "item_step_bytes": 25, "run_step_bytes": 40}


def test_a_step_of_exactly_the_limit_is_taken_and_one_byte_more_is_not() -> None:
    queue = queue_of(1, **SMALL)
    grant = lease(queue)
    assert record(queue, grant, (0, 0), response=b"1" * 11) is FULL
    assert record(queue, grant, (0, 0), response=b"1" * 10) is ACCEPTED


def test_an_item_and_a_run_take_exactly_their_limit() -> None:
    queue = queue_of(2, **SMALL)
    first, second = queue.lease_ready("", 2, 0.0)

    sizes = [10, 10, 6, 5, 1]
    outcomes = [record(queue, first, (n, 0), response=b"1" * s) for n, s in enumerate(sizes)]
    assert outcomes == [ACCEPTED, ACCEPTED, FULL, ACCEPTED, FULL]

    sizes = [10, 6, 5, 1]
    outcomes = [record(queue, second, (n, 0), response=b"1" * s) for n, s in enumerate(sizes)]
    assert outcomes == [ACCEPTED, FULL, ACCEPTED, FULL]
    assert queue.steps.size == 40

    queue.finish(0, None, DONE, now=1.0)
    assert record(queue, second, (9, 0), response=b"1") is ACCEPTED


def test_what_was_recorded_before_stays_when_a_step_is_too_much() -> None:
    queue = queue_of(1, **SMALL)
    grant = lease(queue)
    for number in range(2):
        record(queue, grant, (number, 0), response=b"1" * 10)
    queue.take_events()

    assert record(queue, grant, (2, 0), response=b"1" * 10) is FULL
    assert record(queue, grant, (0, 0), "other", b"1" * 11) is FULL

    assert queue.take_events() == []
    assert recorded(queue) == {(0, 0): "h", (1, 0): "h"}
    assert queue.counters.step_mismatches == 0


def test_a_run_that_records_nothing_takes_no_step() -> None:
    queue = queue_of(1, run_step_bytes=0)
    grant = lease(queue)
    assert record(queue, grant, (0, 0), response=b"1") is FULL
    assert cut(queue, grant, (0, 0)) is ACCEPTED
    assert queue.take_events()[2:] == []
    assert_empty(queue)


def test_the_limits_of_the_design_are_those_of_a_run() -> None:
    policy = QueuePolicy()
    assert (policy.step_bytes, policy.item_step_bytes) == (1 << 20, 16 << 20)
    assert policy.run_step_bytes > 0


def test_many_tiny_steps_of_an_item_cost_a_bounded_time() -> None:
    queue = queue_of(1)
    grant = lease(queue)
    began = time.monotonic()
    outcomes = [record(queue, grant, (number, 0), response=b"1") for number in range(16_384)]
    assert time.monotonic() - began < 3.0
    assert outcomes[0] is ACCEPTED
    assert queue.steps.size == outcomes.count(ACCEPTED)


# -------------------------------------------------------------------- handing out


def test_a_hand_out_counts_the_bytes_of_recorded_steps() -> None:
    queue = queue_of(4)
    for grant in queue.lease_ready("", 4, 0.0):
        record(queue, grant, (0, 0), response=b"1" * 100)
        give_back(queue, grant)
    assert [g.work_id for g in queue.lease_ready("", 4, 0.0, 111)] == [0, 1]
    assert [g.work_id for g in queue.lease_ready("", 4, 0.0, 110)] == [2]
    assert [g.work_id for g in queue.lease_ready("", 4, 0.0, 1)] == [3]


def test_a_hand_out_of_copies_counts_bytes_too() -> None:
    queue = queue_of(13)
    for worker in ("slow", "idle"):
        queue.heartbeat(worker, {}, backend_up=True, now=0.0)
    slow = queue.lease_ready("slow", 3, 0.0)
    held = {(grant.work_id, serial(grant)): 1 for grant in slow}
    queue.heartbeat("slow", held, backend_up=True, now=0.0)
    for grant in slow:
        record(queue, grant, (0, 0), response=b"1" * 100)
    for quick in queue.lease_ready("", 10, 0.0):
        queue.finish(quick.work_id, serial(quick), DONE, now=1.0)

    copies = queue.lease_backup("idle", 3, 20.0, 111)

    assert [grant.work_id for grant in copies] == [0, 1]


# -------------------------------------------------------------------- after a restart


def test_a_checkpoint_and_the_events_after_it_tell_all_about_steps() -> None:
    """Whatever happened, at any cut between checkpoint and events, the same steps are there."""
    lives = steps = 0
    for seed in range(60):
        rng = Random(seed)
        queue = queue_of(4, step_bytes=8, item_step_bytes=40, run_step_bytes=90)
        events: list[bytes] = []
        states = [(0, encode(queue.checkpoint()))]
        for _ in range(40):
            act(queue, rng)
            events += [encode(event) for event in queue.take_events()]
            states.append((len(events), encode(queue.checkpoint())))
            assert queue.steps.size == sum(
                note.size for _, notes in queue.steps for note in notes.values()
            )
            for work_id, notes in queue.steps:
                assert notes
                assert queue.steps.size_of(work_id) == sum(n.size for n in notes.values())
                assert work_id in queue.items, "steps of a finished item"
            assert queue.steps.size <= 90
        for known, state in states[::5]:
            again = WorkQueue(queue.policy)
            again.restore(decode_state(state), 0.0)
            for record_ in events[known:]:
                again.apply(decode_event(record_), 0.0)
            assert dict(again.steps) == dict(queue.steps)
            assert again.steps.size == queue.steps.size
            assert again.counters == queue.counters
        lives, steps = lives + 1, steps + queue.counters.steps
        for work_id in list(queue.items):
            queue.finish(work_id, None, DONE, now=9.0)
        assert_empty(queue)
    print(f"{lives} lives with {steps} recorded steps")
    assert steps > 400


def act(queue: WorkQueue, rng: Random) -> None:
    grants = [*queue.leases.values()]
    kind = rng.choice(["lease", "record", "record", "record", "record", "cut", "end", "finish"])
    if kind == "lease" or not grants:
        queue.lease_ready("", 2, 0.0)
        return
    held = rng.choice(grants)
    about = (held.work_id, held.serial, queue.items[held.work_id].attempt)
    position = (rng.randrange(4), rng.randrange(2))
    if kind == "record":
        queue.record_step(*about, position, rng.choice("hhg"), b"1" * rng.randrange(1, 10))
    elif kind == "cut":
        queue.cut_steps(*about, position)
    elif kind == "end":
        keep = rng.choice([None, None, 0, 1, 2])
        charge = rng.random() < 0.2
        queue.release(
            held.work_id, held.serial, charge=charge, reason="x", keep_yields=keep, now=1.0
        )
    elif rng.random() < 0.15:
        queue.finish(held.work_id, held.serial, DONE, now=1.0)
    for work_id in queue.condemned_ids():
        queue.tombstone(work_id, MAX_RETRIES_EXCEEDED, ERROR, 1.0)
