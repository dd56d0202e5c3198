"""Who works on what, who pays when it goes wrong, and what is done: the work queue alone."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dispatcher.core.events import (
    Event,
    Finished,
    Issued,
    IssuedFresh,
    Joined,
    LeaseEnded,
    Opened,
    QueueState,
    Tombstoned,
)
from dispatcher.core.items import Item
from dispatcher.core.work_queue import (
    CRASH,
    MAX_RETRIES_EXCEEDED,
    WORK_TIMEOUT,
    Grant,
    QueuePolicy,
    Renewal,
    Verdict,
    WorkQueue,
    lease_id,
    parse_lease_id,
)
from dispatcher.core.workers import PROGRESS_UNKNOWN
from dispatcher.models import Outcome, StepOutcome
from tests.support.queues import arrivals, lease_fresh

TERM_S = 30.0
GONE_S = TERM_S + 1.0
TIMEOUT_S = 1200.0
LINE_BYTES = 10
DONE = b'{"answer": 1}'
OTHER = b'{"answer": 2}'


def queue_of(lines: int, **limits: Any) -> WorkQueue:
    """Give a queue into which `lines` lines, the whole input, were read."""
    queue = WorkQueue(QueuePolicy(work_timeout_s=TIMEOUT_S, lease_term_s=TERM_S, **limits))
    open_lines(queue, lines)
    queue.end_of_input()
    return queue


def open_lines(queue: WorkQueue, lines: int) -> list[int]:
    first = queue.open_lines(queue.next_offset, [LINE_BYTES] * lines)
    return list(range(first, first + lines))


def key(grant: Grant) -> tuple[int, int]:
    named = parse_lease_id(grant.lease)
    assert named is not None
    return named


def serial(grant: Grant) -> int:
    return key(grant)[1]


def lease_one(queue: WorkQueue, worker: str, now: float) -> Grant:
    (grant,) = queue.lease_ready(worker, 1, now)
    return grant


def beat(
    queue: WorkQueue,
    worker: str,
    held: dict[Grant, int] | None = None,
    *,
    now: float,
    up: bool = True,
) -> Verdict:
    named = {key(grant): progress for grant, progress in (held or {}).items()}
    return queue.heartbeat(worker, named, backend_up=up, now=now)


def start_one(queue: WorkQueue, worker: str, now: float) -> Grant:
    """Let a worker that sends heartbeats take one item and begin it."""
    beat(queue, worker, now=now)
    grant = lease_one(queue, worker, now)
    beat(queue, worker, {grant: 1}, now=now)
    return grant


def give_back(
    queue: WorkQueue,
    grant: Grant,
    *,
    charge: bool,
    reason: str = "sigterm",
    keep_yields: int | None = None,
    now: float = 0.0,
) -> bool:
    return queue.release(
        grant.work_id, serial(grant), charge=charge, reason=reason, keep_yields=keep_yields, now=now
    )


def finish(queue: WorkQueue, grant: Grant, now: float = 0.0, result: bytes = DONE) -> Outcome:
    return queue.finish(grant.work_id, serial(grant), result, now=now)


def bury(queue: WorkQueue, now: float = 0.0) -> list[int]:
    """Write the tombstones that are due, as the service does."""
    buried = queue.condemned_ids()
    for work_id in buried:
        queue.tombstone(work_id, MAX_RETRIES_EXCEEDED, b'{"__ERROR__": {}}', now)
    return buried


def restarted(queue: WorkQueue, now: float) -> WorkQueue:
    """Give the queue that a new server rebuilds from all of this queue's events."""
    fresh = WorkQueue(queue.policy)
    for event in queue.take_events():
        fresh.apply(event, now)
    if queue.input_ended:
        fresh.end_of_input()
    fresh.begin_again(now)
    return fresh


def crash_while_running(queue: WorkQueue, worker: str, now: float) -> Grant:
    grant = start_one(queue, worker, now)
    give_back(queue, grant, charge=False, reason=CRASH, now=now)
    return grant


def last_end(queue: WorkQueue) -> LeaseEnded:
    return [event for event in queue.take_events() if isinstance(event, LeaseEnded)][-1]


def costs(queue: WorkQueue, work_id: int = 0) -> tuple[int, int, int]:
    item = queue.items[work_id]
    return item.retries, item.crashes, item.releases


# -------------------------------------------------------------------- who pays: the table's rows


def test_the_work_timeout_is_charged_to_a_client_without_heartbeats_from_hand_out_on() -> None:
    queue = queue_of(1)
    lease_one(queue, "", now=5.0)

    queue.expire(5.0 + TIMEOUT_S - 0.1)
    assert costs(queue) == (0, 0, 0)
    assert not queue.ready_count or not queue.items[0].queued

    queue.expire(5.0 + TIMEOUT_S)
    assert costs(queue) == (1, 0, 0)
    assert queue.items[0].queued
    assert queue.counters.expired == 1
    end = last_end(queue)
    assert (end.kind, end.reason, end.keep_yields) == ("charged", WORK_TIMEOUT, None)


def test_the_work_timeout_is_charged_to_a_client_that_has_a_name_but_no_heartbeats() -> None:
    queue = queue_of(1)
    lease_one(queue, "curl", now=0.0)

    queue.expire(GONE_S)  # it is not watched, so it cannot vanish
    assert len(queue.leases) == 1
    queue.expire(TIMEOUT_S)

    assert costs(queue) == (1, 0, 0)


def test_the_work_timeout_counts_from_the_last_progress_of_a_worker_with_heartbeats() -> None:
    queue = queue_of(1)
    grant = start_one(queue, "a", now=0.0)
    beat(queue, "a", {grant: 2}, now=1000.0)

    for now in range(1000, 2200, 20):  # alive, but the item stands still
        beat(queue, "a", {grant: 2}, now=float(now))
        queue.expire(float(now))
        assert costs(queue) == (0, 0, 0)
    beat(queue, "a", {grant: 2}, now=2200.0)
    queue.expire(2200.0)

    assert costs(queue) == (1, 0, 0)


def test_the_work_timeout_pauses_while_the_workers_backend_is_down() -> None:
    queue = queue_of(1)
    grant = start_one(queue, "a", now=0.0)

    for now in range(20, 5000, 20):
        beat(queue, "a", {grant: 1}, now=float(now), up=False)
        queue.expire(float(now))
    assert costs(queue) == (0, 0, 0)

    beat(queue, "a", {grant: 1}, now=5000.0)
    for now in range(5000, 6200, 20):
        beat(queue, "a", {grant: 1}, now=float(now))
        queue.expire(float(now))
        assert costs(queue) == (0, 0, 0)
    beat(queue, "a", {grant: 1}, now=6200.0)
    queue.expire(6200.0)
    assert costs(queue) == (1, 0, 0)


def test_an_item_held_past_the_work_timeout_without_being_started_is_not_charged() -> None:
    queue = queue_of(1)
    beat(queue, "a", now=0.0)
    grant = lease_one(queue, "a", now=0.0)

    for now in range(0, 1201, 20):
        beat(queue, "a", {grant: 0}, now=float(now))
        queue.expire(float(now))

    assert costs(queue) == (0, 0, 0)
    assert queue.items[0].queued
    assert queue.counters.returned == 1


def test_a_task_that_asks_for_a_retry_is_charged_and_its_steps_are_dropped() -> None:
    queue = queue_of(1)
    grant = start_one(queue, "a", now=0.0)

    assert give_back(queue, grant, charge=True, reason="task_retry", keep_yields=0)

    assert costs(queue) == (1, 0, 0)
    assert last_end(queue).keep_yields == 0
    assert queue.items[0].history[0].reason == "task_retry"
    again = lease_one(queue, "a", now=1.0)
    assert (again.retries, again.attempt) == (1, 2)


def test_an_exception_nobody_caught_is_charged_at_every_try_and_in_the_history() -> None:
    queue = queue_of(1, max_retries=1)
    for _ in range(2):
        give_back(queue, start_one(queue, "a", 0.0), charge=True, reason="KeyError: 'x'")

    assert queue.condemned_ids() == [0]
    history = [(end.attempt, end.worker, end.reason) for end in queue.items[0].history]
    assert history == [(1, "a", "KeyError: 'x'"), (2, "a", "KeyError: 'x'")]


def test_a_task_that_broke_its_contract_gets_its_error_line_without_a_reissue() -> None:
    queue = queue_of(1)
    grant = start_one(queue, "a", now=0.0)

    outcome = queue.finish(0, serial(grant), b'{"__ERROR__": {}}', error="x", now=1.0)

    assert outcome is Outcome.ACCEPTED
    assert queue.is_complete
    assert (queue.counters.done, queue.counters.failed, queue.counters.charged) == (1, 1, 0)


def test_a_worker_that_vanished_costs_its_running_item_a_crash_and_no_charge() -> None:
    queue = queue_of(1)
    start_one(queue, "a", now=0.0)

    queue.expire(TERM_S)
    assert len(queue.leases) == 1  # one term is not over
    queue.expire(GONE_S)

    assert costs(queue) == (0, 1, 0)
    assert queue.items[0].queued
    end = last_end(queue)
    assert (end.kind, end.keep_yields) == ("crashed", None)


def test_a_model_server_that_died_costs_its_running_item_a_crash_and_no_charge() -> None:
    queue = queue_of(1)

    crash_while_running(queue, "a", now=0.0)

    assert costs(queue) == (0, 1, 0)
    assert last_end(queue).keep_yields is None
    assert lease_one(queue, "a", now=1.0).retries == 0


def test_an_item_that_a_vanished_worker_held_without_starting_it_pays_nothing() -> None:
    queue = queue_of(1)
    beat(queue, "a", now=0.0)
    grant = lease_one(queue, "a", now=0.0)
    beat(queue, "a", {grant: 0}, now=1.0)

    queue.expire(1.0 + GONE_S)

    assert costs(queue) == (0, 0, 0)
    assert queue.items[0].queued
    assert queue.counters.returned == 1


def test_a_preempted_item_pays_nothing_a_hundred_times_and_the_next_time_is_charged() -> None:
    queue = queue_of(1)
    for number in range(100):
        assert give_back(queue, lease_one(queue, "a", float(number)), charge=False)
    assert costs(queue) == (0, 0, 100)

    give_back(queue, lease_one(queue, "a", 101.0), charge=False)

    assert costs(queue) == (1, 0, 100)
    assert "100" in queue.items[0].history[-1].reason
    assert queue.items[0].queued


def test_a_server_restart_charges_nobody() -> None:
    queue = queue_of(3)
    old_client = lease_one(queue, "", now=0.0)
    started = start_one(queue, "a", now=0.0)
    beat(queue, "b", now=0.0)
    held = lease_one(queue, "b", now=0.0)

    queue = restarted(queue, now=5000.0)
    queue.expire(5000.0)
    beat(queue, "a", {started: 1}, now=5001.0)
    beat(queue, "b", {held: 0}, now=5001.0)
    queue.expire(5001.0)

    assert [costs(queue, i) for i in range(3)] == [(0, 0, 0)] * 3
    assert set(queue.leases) == {serial(g) for g in (old_client, started, held)}


def test_an_old_clients_release_is_charged_and_drops_the_steps() -> None:
    queue = queue_of(1)
    lease_one(queue, "", now=0.0)

    released = queue.release(0, None, charge=True, reason="released", keep_yields=0, now=1.0)

    assert released
    assert costs(queue) == (1, 0, 0)
    assert last_end(queue).keep_yields == 0


# -------------------------------------------------------------------- the end of all reissues


def test_an_item_charged_at_retry_count_equal_to_max_retries_becomes_a_tombstone() -> None:
    queue = queue_of(1, max_retries=3)
    for retries in range(4):
        grant = lease_one(queue, "", now=float(retries))
        assert (grant.retries, grant.attempt) == (retries, retries + 1)
        assert queue.condemned_ids() == []
        give_back(queue, grant, charge=True)

    assert queue.items[0].retries == 3
    assert queue.lease_ready("", 1, now=9.0) == []
    assert not queue.is_complete
    assert bury(queue) == [0]

    assert queue.is_complete
    assert queue.condemned_ids() == []
    assert queue.counters.tombstones == {MAX_RETRIES_EXCEEDED: 1}
    assert (queue.counters.done, queue.counters.failed) == (1, 1)


def test_max_retries_zero_condemns_at_the_first_charge() -> None:
    queue = queue_of(1, max_retries=0)
    give_back(queue, lease_one(queue, "", now=0.0), charge=True)
    assert queue.condemned_ids() == [0]


def test_max_retries_minus_one_never_gives_up() -> None:
    queue = queue_of(1, max_retries=-1)
    for retries in range(500):
        grant = lease_one(queue, "", now=0.0)
        assert grant.retries == retries
        give_back(queue, grant, charge=True)

    assert queue.condemned_ids() == []
    assert queue.items[0].queued
    assert len(queue.items[0].history) == queue.policy.history_limit


def test_a_condemned_item_stays_condemned_over_a_restart() -> None:
    queue = queue_of(1, max_retries=0)
    give_back(queue, lease_one(queue, "", now=0.0), charge=True)
    from_checkpoint = WorkQueue(queue.policy)
    from_checkpoint.restore(queue.checkpoint(), now=0.0)

    from_events = restarted(queue, now=0.0)

    assert from_events.condemned_ids() == [0]
    assert from_checkpoint.condemned_ids() == [0]
    assert from_checkpoint.lease_ready("", 1, now=0.0) == []


def test_a_condemned_item_is_handed_out_again_after_a_restart_with_a_higher_limit() -> None:
    queue = queue_of(1, max_retries=1)
    for _ in range(2):
        give_back(queue, lease_one(queue, "", now=0.0), charge=True)
    higher = WorkQueue(QueuePolicy(max_retries=2))

    higher.restore(queue.checkpoint(), now=0.0)

    assert higher.condemned_ids() == []
    assert lease_one(higher, "", now=0.0).retries == 2


def test_a_tombstone_for_an_item_that_got_its_result_first_changes_nothing() -> None:
    queue = queue_of(1, max_retries=0)
    grant = lease_one(queue, "", now=0.0)
    give_back(queue, grant, charge=True)
    assert finish(queue, grant) is Outcome.ACCEPTED
    queue.take_events()

    queue.tombstone(0, MAX_RETRIES_EXCEEDED, b"{}", now=1.0)

    assert queue.take_events() == []
    assert queue.condemned_ids() == []
    assert (queue.counters.done, queue.counters.failed) == (1, 0)


# -------------------------------------------------------------------- results


def test_a_late_result_is_accepted_after_its_lease_ended() -> None:
    queue = queue_of(1)
    grant = lease_one(queue, "", now=0.0)
    queue.expire(TIMEOUT_S)
    assert queue.items[0].queued

    assert finish(queue, grant, now=TIMEOUT_S + 1) is Outcome.ACCEPTED

    assert queue.is_complete
    assert queue.lease_ready("", 1, now=TIMEOUT_S + 2) == []


def test_a_late_result_wins_over_the_worker_that_has_the_item_now() -> None:
    queue = queue_of(1)
    late = lease_one(queue, "", now=0.0)
    queue.expire(TIMEOUT_S)
    current = lease_one(queue, "", now=TIMEOUT_S)

    assert finish(queue, late, now=TIMEOUT_S + 1) is Outcome.ACCEPTED
    assert finish(queue, current, now=TIMEOUT_S + 2, result=OTHER) is Outcome.DUPLICATE

    taken = [event for event in queue.take_events() if isinstance(event, Finished)]
    assert [bytes(result) for event in taken for result in event.results] == [DONE]
    assert queue.leases == {}
    assert queue.counters.done == 1


def test_a_late_result_after_a_restart_is_kept() -> None:
    queue = queue_of(1)
    grant = lease_one(queue, "", now=0.0)

    queue = restarted(queue, now=0.0)

    assert finish(queue, grant, now=1.0) is Outcome.ACCEPTED
    assert queue.is_complete


def test_the_second_result_of_an_item_is_a_duplicate_and_makes_no_event() -> None:
    queue = queue_of(2)
    grant = lease_one(queue, "", now=0.0)
    finish(queue, grant)
    queue.take_events()

    assert finish(queue, grant, result=OTHER) is Outcome.DUPLICATE
    assert queue.finish(0, None, OTHER, now=1.0) is Outcome.DUPLICATE

    assert queue.take_events() == []
    assert queue.counters.done == 1


def test_a_result_without_a_lease_is_taken_for_its_item() -> None:
    queue = queue_of(1)
    lease_one(queue, "", now=0.0)
    assert queue.finish(0, None, DONE, now=1.0) is Outcome.ACCEPTED
    assert queue.leases == {}


@pytest.mark.parametrize("work_id", [-1, 1, 2, 10**15])
def test_a_result_for_a_line_that_was_never_read_is_unknown(work_id: int) -> None:
    queue = queue_of(1)
    queue.take_events()
    assert queue.finish(work_id, None, DONE, now=0.0) is Outcome.UNKNOWN
    assert queue.take_events() == []


def condemned_behind_an_open_line() -> tuple[WorkQueue, Grant]:
    """Line 0 is still open, so the tombstone of line 1 cannot be in the output yet."""
    queue = queue_of(2, max_retries=0)
    _, grant = queue.lease_ready("", 2, now=0.0)
    give_back(queue, grant, charge=True)
    bury(queue)
    return queue, grant


def test_a_result_beats_a_tombstone_that_is_not_written_yet() -> None:
    queue, grant = condemned_behind_an_open_line()
    queue.note_written(queue.first_open)

    assert finish(queue, grant, now=1.0) is Outcome.ACCEPTED

    assert (queue.counters.done, queue.counters.failed) == (1, 0)
    assert sum(queue.counters.tombstones.values()) == 0
    assert finish(queue, grant, now=2.0) is Outcome.DUPLICATE


def test_a_result_does_not_beat_a_written_tombstone() -> None:
    queue, grant = condemned_behind_an_open_line()
    queue.finish(0, None, DONE, now=1.0)
    queue.note_written(queue.first_open)
    queue.take_events()

    assert finish(queue, grant, now=2.0) is Outcome.DUPLICATE

    assert queue.take_events() == []
    assert queue.counters.failed == 1


def test_a_result_beats_an_unwritten_tombstone_after_a_restart_from_a_checkpoint() -> None:
    queue, grant = condemned_behind_an_open_line()
    fresh = WorkQueue(queue.policy)

    fresh.restore(queue.checkpoint(), now=0.0)
    fresh.note_written(0)

    assert finish(fresh, grant, now=1.0) is Outcome.ACCEPTED
    assert (fresh.counters.done, fresh.counters.failed) == (1, 0)


def test_a_result_that_beat_a_tombstone_counts_once_when_replayed_over_a_checkpoint() -> None:
    queue, grant = condemned_behind_an_open_line()
    queue.take_events()
    state = queue.checkpoint()
    finish(queue, grant, now=1.0)

    fresh = WorkQueue(queue.policy)
    fresh.restore(state, now=0.0)
    for event in queue.take_events():
        fresh.apply(event, now=0.0)

    assert fresh.counters == queue.counters


def test_a_refused_line_keeps_its_error_whoever_sends_a_result_for_it() -> None:
    queue = WorkQueue(QueuePolicy())
    open_lines(queue, 2)
    queue.tombstone(1, "blank_line", b'{"__ERROR__": {}}', now=0.0)

    outcome = queue.finish(1, None, DONE, now=1.0)

    assert outcome is not Outcome.ACCEPTED
    assert queue.counters.tombstones == {"blank_line": 1}
    assert (queue.counters.done, queue.counters.failed) == (1, 1)


def test_an_invalid_result_ends_only_its_own_lease_charged() -> None:
    queue = queue_of(3)
    first, second = queue.lease_ready("", 2, now=0.0)

    queue.fail(second.work_id, serial(second), "not JSON", now=1.0)

    assert [costs(queue, i) for i in range(3)] == [(0, 0, 0), (1, 0, 0), (0, 0, 0)]
    assert set(queue.leases) == {serial(first)}


def test_an_invalid_result_of_an_ended_lease_charges_nobody() -> None:
    queue = queue_of(1)
    ended = lease_one(queue, "", now=0.0)
    give_back(queue, ended, charge=False)
    current = lease_one(queue, "", now=1.0)

    queue.fail(0, serial(ended), "not JSON", now=2.0)

    assert costs(queue)[0] == 0
    assert set(queue.leases) == {serial(current)}


def test_a_lease_named_for_another_item_ends_nothing() -> None:
    queue = queue_of(2)
    first, second = queue.lease_ready("", 2, now=0.0)

    queue.fail(first.work_id, serial(second), "not JSON", now=1.0)

    assert not queue.release(
        second.work_id, serial(first), charge=True, reason="x", keep_yields=None, now=1.0
    )
    assert len(queue.leases) == 2


# -------------------------------------------------------------------- leases


def test_lines_are_handed_out_lowest_first_and_reissues_before_later_lines() -> None:
    queue = queue_of(5)
    grants = queue.lease_ready("", 3, now=0.0)
    assert [g.work_id for g in grants] == [0, 1, 2]
    assert [g.offset for g in grants] == [0, 10, 20]

    give_back(queue, grants[1], charge=False)

    assert [g.work_id for g in queue.lease_ready("", 9, now=1.0)] == [1, 3, 4]


def test_a_lease_id_is_never_reused() -> None:
    queue = queue_of(1, max_retries=-1)
    seen = set()
    for number in range(5):
        grant = lease_one(queue, "", now=0.0)
        seen.add(grant.lease)
        give_back(queue, grant, charge=True)
        if number == 2:
            queue = restarted_from_checkpoint(queue)
    assert len(seen) == 5


def restarted_from_checkpoint(queue: WorkQueue, now: float = 0.0) -> WorkQueue:
    fresh = WorkQueue(queue.policy)
    fresh.restore(queue.checkpoint(), now)
    fresh.begin_again(now)
    return fresh


def test_a_released_lease_cannot_be_released_twice() -> None:
    queue = queue_of(1)
    grant = lease_one(queue, "", now=0.0)
    assert give_back(queue, grant, charge=True)
    assert not give_back(queue, grant, charge=True)
    assert costs(queue) == (1, 0, 0)


def test_an_old_clients_release_by_id_ends_its_own_lease_and_not_that_of_a_worker() -> None:
    queue = queue_of(2)
    lease_one(queue, "", now=0.0)
    running = start_one(queue, "a", now=0.0)

    def release(work_id: int) -> bool:
        return queue.release(work_id, None, charge=True, reason="released", keep_yields=0, now=1.0)

    assert not release(running.work_id)
    assert release(0)
    assert not release(0)
    assert not release(77)
    assert set(queue.leases) == {serial(running)}


@pytest.mark.parametrize(
    "text", ["", "1", "1.", ".1", "a.1", "1.b", "-1.2", "1.2.3", "1." + "9" * 40, "1 .2"]
)
def test_what_never_was_a_lease_id_names_nothing(text: str) -> None:
    assert parse_lease_id(text) is None


def test_a_lease_id_tells_its_item() -> None:
    assert parse_lease_id(lease_id(7, 12)) == (7, 12)


# -------------------------------------------------------------------- heartbeats


def test_a_heartbeat_says_done_for_finished_items_and_lost_for_open_ones_without_that_lease() -> (
    None
):
    queue = queue_of(3)
    beat(queue, "a", now=0.0)
    finished, taken_away, kept = queue.lease_ready("a", 3, now=0.0)
    finish(queue, finished)
    give_back(queue, taken_away, charge=False)

    verdict = beat(queue, "a", {finished: 1, taken_away: 1, kept: 1}, now=1.0)

    assert verdict == Verdict(done=[finished.lease], lost=[taken_away.lease], back=[])


def test_a_heartbeat_for_another_workers_lease_is_answered_lost() -> None:
    queue = queue_of(1)
    grant = start_one(queue, "a", now=0.0)

    assert beat(queue, "b", {grant: 5}, now=1.0).lost == [grant.lease]

    assert queue.leases[serial(grant)].progress == 1


def test_a_heartbeat_naming_leases_of_a_line_never_read_is_harmless() -> None:
    queue = queue_of(1)
    verdict = queue.heartbeat("a", {(99, 12345): 3}, backend_up=True, now=0.0)
    assert verdict.done == ["99.12345"]
    assert queue.leases == {}


def test_two_heartbeats_that_do_not_name_an_old_lease_return_it_uncharged() -> None:
    queue = queue_of(1)
    beat(queue, "a", now=0.0)
    lease_one(queue, "a", now=0.0)

    beat(queue, "a", now=GONE_S)
    assert len(queue.leases) == 1
    beat(queue, "a", now=GONE_S + 1)

    assert queue.leases == {}
    assert costs(queue) == (0, 0, 0)
    assert queue.items[0].queued


def test_a_lease_younger_than_one_term_is_not_returned_for_being_unnamed() -> None:
    queue = queue_of(1)
    beat(queue, "a", now=0.0)
    grant = lease_one(queue, "a", now=0.0)

    for now in (1.0, 2.0, 3.0, TERM_S):
        beat(queue, "a", now=now)
    assert len(queue.leases) == 1

    beat(queue, "a", {grant: 0}, now=TERM_S + 1)  # it had been on its way
    beat(queue, "a", now=TERM_S + 2)
    assert len(queue.leases) == 1


def test_heartbeats_that_name_a_lease_start_the_count_of_missing_ones_again() -> None:
    queue = queue_of(1)
    beat(queue, "a", now=0.0)
    grant = lease_one(queue, "a", now=0.0)
    for now in (40.0, 60.0, 80.0):
        beat(queue, "a", now=now)
        beat(queue, "a", {grant: 1}, now=now + 10)
    assert len(queue.leases) == 1


def test_unnamed_leases_of_one_worker_are_not_returned_by_anothers_heartbeats() -> None:
    queue = queue_of(1)
    beat(queue, "a", now=0.0)
    lease_one(queue, "a", now=0.0)
    for now in (29.0, 31.0, 32.0, 33.0):
        beat(queue, "b", now=now)
    assert len(queue.leases) == 1


# -------------------------------------------------------------------- vanished workers


def test_after_a_restart_unknown_progress_of_a_worker_that_stays_away_is_free() -> None:
    queue = queue_of(2)
    start_one(queue, "a", now=0.0)
    beat(queue, "b", now=0.0)
    lease_one(queue, "b", now=0.0)

    queue = restarted(queue, now=100.0)
    assert {x.progress for x in queue.leases.values()} == {PROGRESS_UNKNOWN}
    queue.expire(100.0 + TERM_S)
    assert len(queue.leases) == 2  # a fresh term for everybody
    queue.expire(100.0 + GONE_S)

    assert [costs(queue, i) for i in range(2)] == [(0, 0, 0)] * 2
    assert all(item.queued for item in queue.items.values())


def test_after_a_restart_a_lease_from_before_its_workers_first_heartbeat_is_free_too() -> None:
    queue = queue_of(1)
    grant = lease_one(queue, "a", now=0.0)  # the first call of a fresh worker
    beat(queue, "a", {grant: 1}, now=1.0)

    queue = restarted(queue, now=100.0)
    for now in (100.0 + GONE_S, 100.0 + TIMEOUT_S):
        queue.expire(now)

    assert costs(queue) == (0, 0, 0)
    assert queue.items[0].queued


def test_a_worker_that_speaks_after_a_restart_and_vanishes_then_is_blamed() -> None:
    queue = queue_of(1)
    grant = start_one(queue, "a", now=0.0)
    queue = restarted(queue, now=100.0)
    beat(queue, "a", {grant: 4}, now=101.0)

    queue.expire(101.0 + GONE_S)

    assert costs(queue) == (0, 1, 0)


def fleet(queue: WorkQueue, size: int, now: float = 0.0) -> list[Grant]:
    return [start_one(queue, f"w{number}", now) for number in range(size)]


def test_more_than_a_third_of_the_workers_vanishing_at_once_blames_nobody() -> None:
    queue = queue_of(9)
    grants = fleet(queue, 9)
    for number in range(4, 9):
        beat(queue, f"w{number}", {grants[number]: 2}, now=25.0)

    queue.expire(GONE_S)

    assert [costs(queue, i) for i in range(9)] == [(0, 0, 0)] * 9
    assert [queue.items[i].queued for i in range(9)] == [True] * 4 + [False] * 5


def test_a_third_of_the_workers_vanishing_is_still_blamed() -> None:
    queue = queue_of(9)
    grants = fleet(queue, 9)
    for number in range(3, 9):
        beat(queue, f"w{number}", {grants[number]: 2}, now=25.0)

    queue.expire(GONE_S)

    assert [costs(queue, i)[1] for i in range(9)] == [1, 1, 1, 0, 0, 0, 0, 0, 0]


def test_workers_vanishing_one_after_another_within_one_term_take_the_blame_back() -> None:
    queue = queue_of(9)
    grants = fleet(queue, 9)

    def beat_from(number: int, now: float) -> None:
        for other in range(number, 9):
            beat(queue, f"w{other}", {grants[other]: int(now)}, now=now)

    for lost in range(4):  # one worker more is silent every five seconds
        beat_from(lost, now=2.0 + 5.0 * lost)
    for now in (20.0, 25.0, 30.0, 33.0, 38.0, 43.0):
        beat_from(4, now=now)
        queue.expire(now)
    assert sum(queue.items[i].crashes for i in range(3)) == 3

    beat_from(4, now=48.0)
    queue.expire(48.0)

    assert [costs(queue, i) for i in range(9)] == [(0, 0, 0)] * 9


def test_the_blame_is_taken_back_when_the_worker_turns_out_to_be_alive() -> None:
    queue = queue_of(1)
    grant = start_one(queue, "a", now=0.0)
    queue.expire(GONE_S)
    assert costs(queue) == (0, 1, 0)

    beat(queue, "a", {grant: 5}, now=GONE_S + 1)

    assert costs(queue) == (0, 0, 0)


def test_a_charged_crash_is_taken_back_too_when_the_worker_turns_out_to_be_alive() -> None:
    queue = queue_of(1)
    for _ in range(2):
        crash_while_running(queue, "a", now=0.0)
    grant = start_one(queue, "a", now=0.0)
    assert grant.solo
    queue.expire(GONE_S)
    assert costs(queue) == (1, 3, 0)

    beat(queue, "a", {grant: 5}, now=GONE_S + 1)

    assert costs(queue) == (0, 2, 0)


def test_an_item_condemned_by_a_worker_that_comes_back_is_open_again() -> None:
    queue = queue_of(1, max_retries=0)
    for _ in range(2):
        crash_while_running(queue, "a", now=0.0)
    grant = start_one(queue, "a", now=0.0)
    queue.expire(GONE_S)
    assert queue.items[0].condemned

    beat(queue, "a", {grant: 5}, now=GONE_S + 1)

    assert queue.condemned_ids() == []
    assert not queue.items[0].condemned
    assert finish(queue, grant, now=GONE_S + 2) is Outcome.ACCEPTED


def test_a_copys_crash_that_did_not_yet_cost_anything_takes_no_older_charge_with_it() -> None:
    queue, slow = with_one_slow_item()
    work_id = slow.work_id
    for name in ("x", "y"):  # two copies crash: the next copy is solo
        give_back(queue, copy_to(queue, name, 100.0), charge=False, reason=CRASH, now=100.0)
    copy = copy_to(queue, "z", 100.0)
    assert copy.solo
    beat(queue, "z", {copy: 1}, now=100.0)
    for name in ("fast", "x", "y"):
        beat(queue, name, now=125.0)
    beat(queue, "slow", {slow: 2}, now=125.0)
    queue.expire(100.0 + GONE_S)  # z vanished, the first lease still runs
    assert queue.items[work_id].crashes == 3
    beat(queue, "slow", {slow: 3}, now=100.0 + GONE_S)

    beat(queue, "z", {copy: 2}, now=100.0 + GONE_S + 1)  # z was only cut off
    give_back(queue, slow, charge=False, now=100.0 + GONE_S + 2)

    assert queue.items[work_id].retries == 0


def test_a_worker_that_comes_back_keeps_what_nobody_else_has() -> None:
    queue = queue_of(2)
    beat(queue, "a", now=0.0)
    kept, taken = queue.lease_ready("a", 2, now=0.0)
    beat(queue, "a", {kept: 1, taken: 1}, now=0.0)
    queue.expire(GONE_S)
    give_back(queue, lease_one(queue, "b", GONE_S), charge=False)  # line 0 is ready again
    (other,) = [g for g in queue.lease_ready("b", 2, now=GONE_S) if g.work_id == 1]
    queue.release(0, None, charge=False, reason="x", keep_yields=None, now=GONE_S)

    verdict = beat(queue, "a", {kept: 2, taken: 2}, now=GONE_S + 1)

    assert verdict.lost == [taken.lease]
    assert queue.leases[serial(kept)].worker == "a"
    assert queue.leases[serial(other)].worker == "b"
    assert not queue.items[0].queued
    assert queue.lease_ready("c", 5, now=GONE_S + 2) == []


def test_what_a_returned_worker_keeps_is_watched_again() -> None:
    queue = queue_of(1)
    grant = start_one(queue, "a", now=0.0)
    queue.expire(GONE_S)
    beat(queue, "a", {grant: 2}, now=50.0)

    for now in range(60, 1240, 10):
        beat(queue, "a", {grant: 2}, now=float(now))
        queue.expire(float(now))
    assert len(queue.leases) == 1
    beat(queue, "a", {grant: 2}, now=50.0 + TIMEOUT_S)
    queue.expire(50.0 + TIMEOUT_S)
    assert costs(queue) == (1, 0, 0)


def test_a_solo_item_that_its_returned_worker_keeps_is_still_solo() -> None:
    queue = queue_of(1)
    for _ in range(2):
        crash_while_running(queue, "a", now=0.0)
    grant = start_one(queue, "a", now=0.0)
    queue.expire(GONE_S)
    beat(queue, "a", {grant: 5}, now=GONE_S + 1)

    give_back(queue, grant, charge=False, reason=CRASH, now=GONE_S + 2)

    assert costs(queue)[0] == 1  # a crash while solo is charged


def test_a_worker_that_asks_for_work_after_vanishing_can_vanish_again() -> None:
    queue = queue_of(2)
    start_one(queue, "a", now=0.0)
    queue.expire(GONE_S)
    lease_one(queue, "a", now=GONE_S + 1)  # before its next heartbeat

    queue.expire(GONE_S + 1 + GONE_S)

    assert queue.leases == {}


def test_a_worker_that_was_forgotten_starts_anew() -> None:
    queue = queue_of(1)
    grant = start_one(queue, "a", now=0.0)
    queue.expire(GONE_S)
    queue.expire(100 * TERM_S)
    assert queue.workers == {}

    assert beat(queue, "a", {grant: 1}, now=100 * TERM_S + 1).lost == [grant.lease]
    assert finish(queue, grant, now=100 * TERM_S + 2) is Outcome.ACCEPTED


# -------------------------------------------------------------------- crashes and solo


def test_two_crashes_make_an_item_solo_and_a_crash_while_solo_is_charged() -> None:
    queue = queue_of(1, max_retries=1)
    for crashes in range(2):
        grant = crash_while_running(queue, "a", now=0.0)
        assert not grant.solo
        assert costs(queue) == (0, crashes + 1, 0)

    grant = crash_while_running(queue, "a", now=0.0)
    assert grant.solo
    assert costs(queue) == (1, 3, 0)
    grant = crash_while_running(queue, "b", now=0.0)
    assert grant.solo

    assert queue.condemned_ids() == [0]
    assert [end.kind for end in queue.items[0].history] == ["crashed"] * 4


def test_a_solo_item_is_handed_out_alone() -> None:
    queue = queue_of(4)
    for _ in range(2):
        crash_while_running(queue, "a", now=0.0)

    (alone,) = queue.lease_ready("a", 4, now=1.0)
    together = queue.lease_ready("b", 4, now=1.0)

    assert (alone.work_id, alone.solo) == (0, True)
    assert [(g.work_id, g.solo) for g in together] == [(1, False), (2, False), (3, False)]


def test_a_solo_item_stays_solo_over_a_restart() -> None:
    queue = queue_of(2)
    for _ in range(2):
        crash_while_running(queue, "a", now=0.0)

    (grant,) = restarted_from_checkpoint(queue).lease_ready("a", 2, now=0.0)

    assert grant.solo


def test_a_solo_item_that_is_preempted_is_not_charged() -> None:
    queue = queue_of(1)
    for _ in range(2):
        crash_while_running(queue, "a", now=0.0)
    give_back(queue, start_one(queue, "a", 0.0), charge=False)
    assert costs(queue) == (0, 2, 1)


# -------------------------------------------------------------------- backups


def with_one_slow_item(**limits: Any) -> tuple[WorkQueue, Grant]:
    """Give a queue where twenty items took a second each, and one runs for a hundred."""
    queue = queue_of(21, **limits)
    beat(queue, "slow", now=0.0)
    beat(queue, "fast", now=0.0)
    slow = lease_one(queue, "slow", now=0.0)
    beat(queue, "slow", {slow: 1}, now=0.0)
    for number in range(20):
        grant = lease_one(queue, "fast", now=float(number))
        beat(queue, "fast", {grant: 1}, now=float(number))
        finish(queue, grant, now=number + 1.0)
    for name in ("slow", "fast"):
        beat(queue, name, {slow: 2} if name == "slow" else None, now=100.0)
    return queue, slow


def copy_to(queue: WorkQueue, worker: str, now: float) -> Grant:
    beat(queue, worker, now=now)
    (copy,) = queue.lease_backup(worker, 5, now)
    return copy


def test_an_item_that_runs_far_longer_than_others_gets_one_copy_on_another_worker() -> None:
    queue, slow = with_one_slow_item()

    assert queue.lease_backup("slow", 5, now=100.0) == []
    copy = copy_to(queue, "fast", now=100.0)

    assert copy.work_id == slow.work_id
    assert copy.lease != slow.lease
    beat(queue, "third", now=102.0)
    assert queue.lease_backup("third", 5, now=102.0) == []


def test_a_worker_without_heartbeats_gets_no_copies() -> None:
    queue, _ = with_one_slow_item()
    assert queue.lease_backup("", 5, now=100.0) == []
    assert queue.lease_backup("stranger", 5, now=100.0) == []


def test_without_backups_nothing_is_handed_out_twice() -> None:
    queue, _ = with_one_slow_item(backups=False)
    assert queue.lease_backup("fast", 5, now=100.0) == []


def test_an_item_that_runs_no_longer_than_others_gets_no_copy() -> None:
    queue, _ = with_one_slow_item()
    give_back(queue, next_slow := copy_to(queue, "fast", 100.0), charge=False, now=100.0)
    assert next_slow.work_id == 0

    other = queue_of(21)
    beat(other, "a", now=0.0)
    beat(other, "b", now=0.0)
    for number in range(20):
        grant = lease_one(other, "b", now=float(number))
        beat(other, "b", {grant: 1}, now=float(number))
        finish(other, grant, now=number + 1.0)
    young = lease_one(other, "a", now=20.0)
    beat(other, "a", {young: 1}, now=20.0)
    assert other.lease_backup("b", 5, now=21.0) == []


def test_an_item_that_was_not_started_gets_no_copy() -> None:
    queue = queue_of(21)
    beat(queue, "a", now=0.0)
    held = lease_one(queue, "a", now=0.0)
    beat(queue, "a", {held: 0}, now=0.0)
    beat(queue, "b", now=0.0)
    for number in range(20):
        grant = lease_one(queue, "b", now=float(number))
        beat(queue, "b", {grant: 1}, now=float(number))
        finish(queue, grant, now=number + 1.0)
    assert queue.lease_backup("b", 5, now=500.0) == []


def test_the_first_result_of_two_copies_wins_and_the_other_is_told_to_drop_it() -> None:
    queue, slow = with_one_slow_item()
    copy = copy_to(queue, "fast", now=100.0)

    assert finish(queue, copy, now=101.0) is Outcome.ACCEPTED
    assert finish(queue, slow, now=102.0, result=OTHER) is Outcome.DUPLICATE

    assert beat(queue, "slow", {slow: 3}, now=103.0).done == [slow.lease]
    assert queue.is_complete
    assert queue.leases == {}


def test_the_end_of_one_of_two_leases_ends_that_one_alone() -> None:
    queue, slow = with_one_slow_item()
    copy = copy_to(queue, "fast", now=100.0)

    give_back(queue, copy, charge=True, now=101.0)

    assert set(queue.leases) == {serial(slow)}
    assert queue.items[0].retries == 0
    assert queue.lease_ready("fast", 5, now=102.0) == []


def test_an_item_with_two_leases_is_charged_once_when_the_last_one_ends() -> None:
    queue, slow = with_one_slow_item()
    copy = copy_to(queue, "fast", now=100.0)

    give_back(queue, slow, charge=True, now=101.0)
    assert queue.items[0].retries == 0
    give_back(queue, copy, charge=True, now=102.0)

    assert queue.items[0].retries == 1
    assert queue.items[0].attempt == 2
    assert queue.items[0].queued


def test_a_charge_is_remembered_when_the_last_of_two_leases_ends_free() -> None:
    queue, slow = with_one_slow_item()
    copy = copy_to(queue, "fast", now=100.0)
    give_back(queue, slow, charge=True, now=101.0)

    queue = restarted_from_checkpoint(queue, now=101.0)
    give_back(queue, copy, charge=False, now=102.0)

    assert queue.items[0].retries == 1


# -------------------------------------------------------------------- called back


def slow_and_idle(unstarted: int = 4) -> tuple[WorkQueue, list[Grant]]:
    """Give a queue whose items are all on one slow worker while another one is idle."""
    queue = queue_of(unstarted + 1)
    for name in ("slow", "idle"):
        beat(queue, name, now=0.0)
    grants = queue.lease_ready("slow", unstarted + 1, now=0.0)
    beat(queue, "slow", {g: int(g.work_id == 0) for g in grants}, now=1.0)
    assert queue.lease_ready("idle", 2, now=1.0) == []
    return queue, grants


def test_unstarted_items_are_called_back_from_a_slow_worker_when_another_is_idle() -> None:
    queue, grants = slow_and_idle()
    queue.note_idle("idle", 2)

    queue.expire(2.0)
    verdict = beat(queue, "slow", {g: int(g.work_id == 0) for g in grants}, now=3.0)

    assert verdict.back == [grants[3].lease, grants[4].lease]  # those it would reach last
    for grant in grants[3:]:
        give_back(queue, grant, charge=False, reason="called back", now=4.0)
    assert [g.work_id for g in queue.lease_ready("idle", 2, now=5.0)] == [3, 4]
    assert costs(queue, 3) == (0, 0, 0)  # it was our wish, so it is none of its free releases
    assert queue.counters.returned == 2


def test_nothing_is_called_back_while_nobody_is_idle() -> None:
    queue, grants = slow_and_idle()
    queue.expire(2.0)
    assert beat(queue, "slow", dict.fromkeys(grants, 0), now=3.0).back == []


def test_nothing_is_called_back_while_there_is_more_input() -> None:
    queue = WorkQueue(QueuePolicy())
    open_lines(queue, 3)
    for name in ("slow", "idle"):
        beat(queue, name, now=0.0)
    grants = queue.lease_ready("slow", 3, now=0.0)
    queue.lease_ready("idle", 3, now=0.0)
    queue.note_idle("idle", 3)

    queue.expire(2.0)

    assert beat(queue, "slow", dict.fromkeys(grants, 0), now=3.0).back == []


def test_a_started_item_is_not_called_back() -> None:
    queue, grants = slow_and_idle(unstarted=1)
    queue.note_idle("idle", 2)
    queue.expire(2.0)

    verdict = beat(queue, "slow", dict.fromkeys(grants, 1), now=3.0)

    assert verdict.back == []


def test_an_idle_workers_wish_is_forgotten_once_it_got_something() -> None:
    queue, grants = slow_and_idle()
    queue.note_idle("idle", 2)
    queue.note_idle("idle", 0)
    queue.expire(2.0)
    assert beat(queue, "slow", dict.fromkeys(grants, 0), now=3.0).back == []


# -------------------------------------------------------------------- window, prefix, timeouts


def test_the_window_limits_how_far_lines_are_read_past_the_first_open_one() -> None:
    queue = WorkQueue(QueuePolicy(window=3))
    opened = 0
    while queue.may_open():
        open_lines(queue, 1)
        opened += 1
    assert opened == 3

    queue.finish(1, None, DONE, now=0.0)
    assert not queue.may_open()
    queue.finish(0, None, DONE, now=0.0)
    assert queue.first_open == 2
    assert queue.may_open()
    open_lines(queue, 2)
    assert not queue.may_open()
    queue.finish(2, None, DONE, now=0.0)
    queue.end_of_input()
    assert not queue.may_open()


def test_the_prefix_grows_only_over_lines_that_have_their_result() -> None:
    queue = queue_of(4)
    steps = []
    for work_id in (2, 1, 0, 3):
        queue.finish(work_id, None, DONE, now=0.0)
        steps.append((queue.first_open, queue.waiting_count))
    assert steps == [(0, 1), (0, 2), (3, 0), (4, 0)]
    assert queue.is_complete


def test_an_empty_input_is_complete_at_its_end_and_not_before() -> None:
    queue = WorkQueue(QueuePolicy())
    assert not queue.is_complete
    queue.end_of_input()
    assert queue.is_complete


def test_a_long_run_forgets_what_is_written_and_still_tells_duplicates() -> None:
    queue = WorkQueue(QueuePolicy())
    lines = 70_000
    for work_id in open_lines(queue, lines):
        queue.finish(work_id, None, DONE, now=0.0)
    queue.note_written(lines)
    (fresh,) = open_lines(queue, 1)

    assert queue.finish(0, None, OTHER, now=0.0) is Outcome.DUPLICATE
    assert queue.finish(lines - 1, None, OTHER, now=0.0) is Outcome.DUPLICATE
    assert queue.finish(fresh, None, DONE, now=0.0) is Outcome.ACCEPTED
    assert queue.first_open == lines + 1


def test_a_shorter_work_timeout_holds_for_items_already_handed_out() -> None:
    queue = queue_of(1)
    lease_one(queue, "", now=0.0)

    queue.set_work_timeout(10.0, now=1.0)
    queue.expire(9.0)
    assert len(queue.leases) == 1
    queue.expire(10.0)

    assert costs(queue) == (1, 0, 0)


def test_a_longer_work_timeout_holds_for_items_already_handed_out() -> None:
    queue = queue_of(1)
    lease_one(queue, "", now=0.0)

    queue.set_work_timeout(2 * TIMEOUT_S, now=1.0)
    queue.expire(TIMEOUT_S)
    assert len(queue.leases) == 1
    queue.expire(2 * TIMEOUT_S)

    assert costs(queue) == (1, 0, 0)


def test_a_server_that_rebuilt_its_queue_still_knows_who_sends_heartbeats() -> None:
    queue = queue_of(2)
    grant = start_one(queue, "a", now=0.0)
    rebuilt = restarted(queue, now=1.0)

    rebuilt.adopt_workers(queue.workers.values(), now=1.0)
    beat(rebuilt, "a", {grant: 2}, now=2.0)
    rebuilt.expire(2.0 + GONE_S)

    assert costs(rebuilt) == (0, 1, 0)


# -------------------------------------------------------------------- random lives

WORKERS = ("", "a", "b", "c", "d")
VERBS = [
    *("open", "lease", "lease", "lease", "backup", "finish", "finish", "by_id"),
    *(
        "finish_many",
        "fail",
        "release",
        "release_id",
        "crash",
        "beat",
        "beat",
        "beat",
        "pass",
        "vanish",
    ),
    *("doom", "bury", "refuse", "written", "timeout", "idle", "checkpoint"),
]
Move = tuple[str, int, int, int]
move = st.tuples(st.sampled_from(VERBS), st.integers(0, 15), st.integers(0, 15), st.integers(0, 15))
moves: st.SearchStrategy[list[Move]] = st.integers(0, 60).flatmap(
    lambda length: st.lists(move, min_size=length, max_size=length)
)


class Life:
    """Plays random calls of a server, and keeps its own account of what they led to."""

    def __init__(self, max_retries: int) -> None:
        self.policy = QueuePolicy(
            max_retries=max_retries,
            work_timeout_s=100.0,
            lease_term_s=TERM_S,
            max_free_releases=2,
            history_limit=3,
            backup_quantile=0.5,
            backup_factor=1.0,
        )
        self.queue = WorkQueue(self.policy)
        self.queue._durations._least = 2
        self.now = 0.0
        self.grants: list[tuple[str, Grant]] = []
        self.events: list[Event] = []
        self.checkpoints: list[tuple[int, QueueState]] = [(0, self.queue.checkpoint())]
        self.refused: set[int] = set()
        self.settled: dict[int, str] = {}
        self.written = 0

    def play(self, script: list[Move]) -> None:
        for verb, x, y, z in script:
            getattr(self, f"do_{verb}")(x, y, z)
            self.collect()
            self.check()

    def collect(self) -> None:
        for event in self.queue.take_events():
            self.events.append(event)
            match event:
                case Finished(work_ids):
                    for work_id in work_ids:
                        before = self.settled.get(work_id)
                        assert before is None or (before == "tombstone" and work_id >= self.written)
                        self.settled[work_id] = "result"
                case Tombstoned(work_id):
                    assert work_id not in self.settled
                    self.settled[work_id] = "tombstone"

    def check(self) -> None:
        queue = self.queue
        assert set(queue.items) == set(range(queue.next_work_id)) - set(self.settled)
        assert queue.counters.done == len(self.settled)
        assert queue.first_open == min(queue.items, default=queue.next_work_id)
        for item in queue.items.values():
            # Nothing is lost: every open item is in exactly one place.
            assert [item.queued, bool(item.leases), item.condemned].count(True) == 1, item
            assert self.policy.max_retries < 0 or item.retries <= self.policy.max_retries
            assert len({lease.worker for lease in item.leases if lease.worker}) == len(
                [lease for lease in item.leases if lease.worker]
            )
        assert queue.ready_count == sum(item.queued for item in queue.items.values())
        held = [lease.serial for item in queue.items.values() for lease in item.leases]
        assert sorted(held) == sorted(queue.leases)
        for name, worker in queue.workers.items():
            mine = {s for s, lease in queue.leases.items() if lease.worker == name}
            assert set(worker.leases) == mine

    def pick(self, x: int) -> tuple[str, Grant] | None:
        return self.grants[-1 - x % len(self.grants)] if self.grants else None

    def do_open(self, x: int, y: int, z: int) -> None:
        open_lines(self.queue, 1 + x % 3)

    def do_refuse(self, x: int, y: int, z: int) -> None:
        (work_id,) = open_lines(self.queue, 1)
        self.queue.tombstone(work_id, "blank_line", b"{}", self.now)
        self.refused.add(work_id)

    def do_lease(self, x: int, y: int, z: int) -> None:
        worker = WORKERS[x % len(WORKERS)]
        grants = self.queue.lease_ready(worker, 1 + y % 3, self.now)
        if not grants and self.queue.may_open() and z % 2:
            grants = lease_fresh(self.queue, worker, [10] * (1 + z % 3), self.now)
        self.grants += [(worker, grant) for grant in grants]

    def do_doom(self, x: int, y: int, z: int) -> None:
        """Charge an item for all it has."""
        grants = self.queue.lease_ready("a", 1, self.now)
        while grants and self.policy.max_retries >= 0:
            self.grants += [("a", grants[0])]
            self.queue.fail(grants[0].work_id, serial(grants[0]), "no", self.now)
            grants = [g for g in self.queue.lease_ready("a", 1, self.now) if y < 8]
        bury(self.queue, self.now)

    def do_backup(self, x: int, y: int, z: int) -> None:
        worker = WORKERS[x % len(WORKERS)]
        grants = self.queue.lease_backup(worker, 1 + y % 3, self.now)
        self.grants += [(worker, grant) for grant in grants]

    def do_finish(self, x: int, y: int, z: int) -> None:
        if picked := self.pick(x):
            finish(self.queue, picked[1], self.now)

    def do_finish_many(self, x: int, y: int, z: int) -> None:
        picked = [found[1] for n in range(1 + y % 4) if (found := self.pick(x + n))]
        came = [(g.work_id, serial(g), DONE, "x" * (z % 2)) for g in picked]
        before = {g.work_id for g in picked} & set(self.queue.items)
        outcomes = self.queue.finish_all(arrivals(*came), self.now)
        accepted = [
            g.work_id for g, o in zip(picked, outcomes, strict=True) if o is Outcome.ACCEPTED
        ]
        assert len(set(accepted)) == len(accepted)
        assert before <= set(accepted)

    def do_by_id(self, x: int, y: int, z: int) -> None:
        work_id = x - 1
        if work_id not in self.refused:
            self.queue.finish(work_id, None, DONE, error="x" * (y % 2), now=self.now)

    def do_fail(self, x: int, y: int, z: int) -> None:
        if picked := self.pick(x):
            grant = picked[1]
            self.queue.fail(grant.work_id, serial(grant) if y % 2 else None, "no", self.now)

    def do_release(self, x: int, y: int, z: int) -> None:
        if picked := self.pick(x):
            give_back(self.queue, picked[1], charge=bool(y % 2), now=self.now)

    def do_release_id(self, x: int, y: int, z: int) -> None:
        self.queue.release(x, None, charge=True, reason="x", keep_yields=0, now=self.now)

    def do_crash(self, x: int, y: int, z: int) -> None:
        if picked := self.pick(x):
            give_back(self.queue, picked[1], charge=False, reason=CRASH, now=self.now)

    def do_beat(self, x: int, y: int, z: int) -> None:
        worker = WORKERS[1 + x % (len(WORKERS) - 1)]
        mine = [grant for name, grant in self.grants if name == worker][-6:]
        held = {key(g): (z + n) % 4 for n, g in enumerate(mine) if (y >> (n % 4)) & 1}
        self.queue.heartbeat(worker, held, backend_up=z != 5, now=self.now)

    def do_pass(self, x: int, y: int, z: int) -> None:
        self.now += x
        self.queue.expire(self.now)

    def do_vanish(self, x: int, y: int, z: int) -> None:
        self.now += GONE_S
        self.queue.expire(self.now)

    def do_bury(self, x: int, y: int, z: int) -> None:
        bury(self.queue, self.now)

    def do_written(self, x: int, y: int, z: int) -> None:
        self.written = self.queue.first_open
        self.queue.note_written(self.written)

    def do_timeout(self, x: int, y: int, z: int) -> None:
        self.queue.set_work_timeout(50.0 + 10 * x, self.now)

    def do_idle(self, x: int, y: int, z: int) -> None:
        self.queue.note_idle(WORKERS[x % len(WORKERS)], y)

    def do_checkpoint(self, x: int, y: int, z: int) -> None:
        self.do_written(x, y, z)  # as the service does
        self.checkpoints.append((len(self.events), self.queue.checkpoint()))


def durable(queue: WorkQueue) -> Any:
    """Give the durable state, and what is ready or condemned by it."""
    ready = {item.work_id for item in queue.items.values() if item.queued}
    return msgspec.to_builtins(queue.checkpoint()), ready, queue.condemned_ids()


ItemStateFields = [
    field.name for field in msgspec.structs.fields(type(queue_of(1).checkpoint().items[0]))
]

thorough = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@thorough
@given(script=moves, max_retries=st.sampled_from([0, 1, 3, -1]), cut=st.integers(0, 1000))
def test_replaying_the_events_gives_the_same_state(
    script: list[Move], max_retries: int, cut: int
) -> None:
    life = Life(max_retries)
    life.play(script)

    from_start = WorkQueue(life.policy)
    for event in life.events:
        from_start.apply(event, now=0.0)
    assert durable(from_start) == durable(life.queue)

    known, state = life.checkpoints[cut % len(life.checkpoints)]
    decoded = msgspec.json.decode(msgspec.json.encode(state), type=QueueState)
    from_checkpoint = WorkQueue(life.policy)
    from_checkpoint.restore(decoded, now=0.0)
    for event in life.events[known:]:
        from_checkpoint.apply(event, now=0.0)
    assert durable(from_checkpoint) == durable(life.queue)


@thorough
@given(script=moves, max_retries=st.sampled_from([0, 1, 3, -1]), restart=st.booleans())
def test_no_item_is_done_twice_and_none_is_lost(
    script: list[Move], max_retries: int, restart: bool
) -> None:
    life = Life(max_retries)
    life.play(script)
    if restart:
        fresh = WorkQueue(life.policy)
        for event in life.events:
            fresh.apply(event, life.now)
        fresh.begin_again(life.now)
        fresh.note_written(life.written)
        life.queue = fresh
        life.check()

    queue = life.queue
    queue.end_of_input()
    for lease in list(queue.leases.values()):
        queue.finish(lease.work_id, lease.serial, DONE, now=life.now)
    for _ in itertools.takewhile(lambda _: queue.items, range(1000)):
        bury(queue, life.now)
        for grant in queue.lease_ready("last", 10, life.now):
            assert finish(queue, grant, life.now) is Outcome.ACCEPTED
    life.collect()
    life.check()

    assert queue.is_complete
    assert set(life.settled) == set(range(queue.next_work_id))
    assert queue.leases == {}


def test_an_item_is_described_whole_in_a_checkpoint() -> None:
    """Whoever adds a durable field to Item must carry it through ItemState too."""
    volatile = {"queued"}
    assert {*Item.__struct_fields__, "steps"} - volatile == set(ItemStateFields)


def test_the_ready_count_is_exact_whatever_became_of_an_item() -> None:
    queue = WorkQueue(QueuePolicy())
    open_lines(queue, 6)
    assert queue.ready_count == 6

    queue.lease_ready("", 2, now=0.0)
    for answered_while_ready in (5, 3):
        queue.finish(answered_while_ready, None, b"{}", now=0.0)
    assert queue.ready_count == 2

    queue.release(0, None, charge=True, reason="x", keep_yields=None, now=0.0)
    assert queue.ready_count == 3
    assert [grant.work_id for grant in queue.lease_ready("", 9, now=0.0)] == [0, 2, 4]
    assert queue.ready_count == 0


def test_ready_items_are_leased_until_their_lines_fill_a_reply_but_at_least_one() -> None:
    queue = WorkQueue(QueuePolicy())
    queue.open_lines(0, [100] * 4)
    assert [g.work_id for g in queue.lease_ready("", 9, now=0.0, max_bytes=150)] == [0, 1]
    assert [g.work_id for g in queue.lease_ready("", 9, now=0.0, max_bytes=1)] == [2]


# -------------------------------------------------------------------- many in one event


def test_lines_read_together_are_one_event_and_each_knows_its_place() -> None:
    queue = WorkQueue(QueuePolicy())
    assert queue.open_lines(0, [7, 1]) == 0
    assert queue.open_lines(8, [30, 5]) == 2

    assert queue.take_events() == [Opened(0, 0, [7, 1]), Opened(2, 8, [30, 5])]
    assert queue.next_offset == 43
    grants = queue.lease_ready("", 9, now=0.0)
    assert [(g.work_id, g.offset, g.line_bytes) for g in grants] == [
        (0, 0, 7),
        (1, 7, 1),
        (2, 8, 30),
        (3, 38, 5),
    ]


def test_items_handed_out_together_are_one_event_and_each_has_its_own_lease() -> None:
    queue = queue_of(3)
    lease_one(queue, "", now=0.0)
    queue.take_events()
    beat(queue, "a", now=0.0)

    second, third = queue.lease_ready("a", 5, now=0.0)

    assert queue.take_events() == [Joined("a"), Issued("a", True, False, 2, [1, 2])]
    assert [second.lease, third.lease] == ["1.2", "2.3"]
    assert queue.next_serial == 4
    assert queue.counters.issued == 3


@pytest.mark.parametrize("worker", ["", "silent", "beating"])
def test_lines_leased_as_they_are_read_are_as_lines_read_first_and_leased_then(worker: str) -> None:
    at_once, one_by_one = queue_of(2), queue_of(2)
    for queue in (at_once, one_by_one):
        beat(queue, "beating", now=0.0)
        queue.lease_ready("other", 2, now=0.0)
    grants = lease_fresh(at_once, worker, [10, 20, 30], now=1.0)
    one_by_one.open_lines(one_by_one.next_offset, [10, 20, 30])

    assert grants == one_by_one.lease_ready(worker, 3, now=1.0)
    assert at_once.checkpoint() == one_by_one.checkpoint()
    assert at_once.leases.keys() == one_by_one.leases.keys()
    for name, known in one_by_one.workers.items():
        assert at_once.workers[name].leases.keys() == known.leases.keys()
    assert restarted(at_once, 1.0).checkpoint() == restarted(one_by_one, 1.0).checkpoint()


def test_lines_leased_as_they_are_read_are_one_event_that_tells_of_its_parts() -> None:
    queue = queue_of(1)
    queue.lease_ready("", 1, now=0.0)
    queue.take_events()
    lease_fresh(queue, "a", [10, 20], now=1.0)
    (event,) = queue.take_events()
    assert event == IssuedFresh("a", False, 2, 1, LINE_BYTES, [10, 20])
    assert event.parts() == (
        Opened(1, LINE_BYTES, [10, 20]),
        Issued("a", False, False, 2, [1, 2]),
    )


def test_a_worker_that_gets_lines_as_they_are_read_is_idle_no_more() -> None:
    queue = queue_of(0)
    beat(queue, "a", now=0.0)
    queue.note_idle("a", 4)
    lease_fresh(queue, "a", [10], now=5.0)
    assert queue.workers["a"].idle_want == 0
    assert queue.workers["a"].last_seen_at == 5.0


def test_lines_leased_as_they_are_read_time_out_like_others() -> None:
    queue = queue_of(0)
    lease_fresh(queue, "", [10, 10], now=0.0)
    queue.expire(TIMEOUT_S - 1)
    assert len(queue.leases) == 2
    queue.expire(TIMEOUT_S)
    assert (len(queue.leases), queue.ready_count, queue.counters.charged) == (0, 2, 2)


def test_results_taken_together_are_one_event_and_each_is_answered_for_itself() -> None:
    queue = queue_of(5)
    first, second, third = queue.lease_ready("", 3, now=0.0)
    finish(queue, first)
    queue.take_events()

    outcomes = queue.finish_all(
        arrivals(
            (second.work_id, serial(second), DONE, ""),
            (first.work_id, serial(first), OTHER, ""),
            (third.work_id, None, b'{"__ERROR__": {}}', "x"),
            (second.work_id, serial(second), OTHER, "x"),
            (99, None, DONE, ""),
        ),
        now=1.0,
    )

    assert outcomes == [
        Outcome.ACCEPTED,
        Outcome.DUPLICATE,
        Outcome.ACCEPTED,
        Outcome.DUPLICATE,
        Outcome.UNKNOWN,
    ]
    (event,) = queue.take_events()
    assert isinstance(event, Finished)
    assert (event.work_ids, event.serials, event.errors) == (
        [1, 2],
        [serial(second), 0],
        {"x": [2]},
    )
    assert [bytes(result) for result in event.results] == [DONE, b'{"__ERROR__": {}}']
    assert (queue.counters.done, queue.counters.failed) == (3, 1)
    assert queue.leases == {}
    assert queue.first_open == 3


def test_results_that_change_nothing_make_no_event() -> None:
    queue = queue_of(1)
    finish(queue, grant := lease_one(queue, "", now=0.0))
    queue.take_events()
    twice = arrivals((0, serial(grant), OTHER, ""))
    assert queue.finish_all(twice, now=1.0) == [Outcome.DUPLICATE]
    assert queue.finish_all(arrivals(), now=1.0) == []
    assert queue.take_events() == []


def test_nothing_ready_makes_no_event() -> None:
    queue = WorkQueue(QueuePolicy())
    assert queue.lease_ready("a", 5, now=0.0) == []
    assert queue.take_events() == []
    assert queue.next_serial == 1


def test_of_items_handed_out_together_only_the_one_that_stands_still_pays() -> None:
    queue = queue_of(3)
    beat(queue, "a", now=0.0)
    still, moving, done = queue.lease_ready("a", 3, now=0.0)
    beat(queue, "a", {still: 1, moving: 1, done: 1}, now=0.0)
    finish(queue, done, now=1.0)

    for now in range(20, 1201, 20):
        beat(queue, "a", {still: 1, moving: now}, now=float(now))
        queue.expire(float(now))
    assert [costs(queue, i) for i in range(2)] == [(1, 0, 0), (0, 0, 0)]

    for now in range(1220, 2401, 20):  # now the other one stands still, too
        beat(queue, "a", {moving: 1200}, now=float(now))
        queue.expire(float(now))
    assert costs(queue, 1) == (1, 0, 0)


def test_reissues_come_before_lines_that_were_never_handed_out_in_one_reply() -> None:
    queue = queue_of(4)
    first, second = queue.lease_ready("", 2, now=0.0)
    for grant in (second, first):
        give_back(queue, grant, charge=False)

    assert [g.work_id for g in queue.lease_ready("", 3, now=1.0)] == [0, 1, 2]
    assert [g.work_id for g in queue.lease_ready("", 3, now=1.0)] == [3]


def test_a_refused_line_among_others_is_not_handed_out() -> None:
    queue = queue_of(4)
    queue.tombstone(1, "blank_line", b"{}", now=0.0)
    queue.tombstone(2, "blank_line", b"{}", now=0.0)
    assert queue.ready_count == 2
    assert [g.work_id for g in queue.lease_ready("", 9, now=0.0)] == [0, 3]


def test_after_a_replay_no_item_is_ready_twice() -> None:
    queue = queue_of(6)
    crash_while_running(queue, "a", now=0.0)
    given = queue.lease_ready("", 4, now=0.0)
    give_back(queue, given[2], charge=False)

    queue = restarted(queue, now=0.0)

    assert queue.ready_count == 3
    assert [g.work_id for g in queue.lease_ready("", 9, now=0.0)] == [2, 4, 5]
    assert queue.lease_ready("", 9, now=0.0) == []


def test_the_window_tells_how_many_more_lines_may_be_read() -> None:
    queue = WorkQueue(QueuePolicy(window=5))
    assert queue.window_room() == 5
    open_lines(queue, 3)
    assert queue.window_room() == 2
    queue.finish(0, None, DONE, now=0.0)
    assert queue.window_room() == 3
    assert WorkQueue(QueuePolicy()).window_room() > 1 << 40


# --- an engine that died under a worker that lives ------------------------------------------------


def renew(
    queue: WorkQueue, grant: Grant, worker: str = "w", *, now: float = 0.0, again: bool = True
) -> Renewal:
    return queue.renew(grant.work_id, serial(grant), worker, CRASH, now, again=again)


def under(grant: Grant, renewal: Renewal) -> Grant:
    """Give the grant of an item as it is held now."""
    assert renewal.lease is not None
    return msgspec.structs.replace(grant, lease=renewal.lease, attempt=renewal.attempt)


def test_a_worker_keeps_an_item_whose_engine_died_under_a_new_lease() -> None:
    queue = queue_of(2)
    old = start_one(queue, "w", 0.0)
    queue.take_events()

    renewal = renew(queue, old, now=1.0)

    assert renewal == Renewal(True, "0.2", 1)
    assert [type(event) for event in queue.take_events()] == [LeaseEnded, Issued]
    assert (queue.counters.crashed, queue.counters.charged) == (1, 0)
    assert [grant.work_id for grant in queue.lease_ready("v", 9, 1.0)] == [1]
    assert finish(queue, under(old, renewal)) is Outcome.ACCEPTED


def test_the_second_crash_of_an_item_sends_it_back_to_run_alone() -> None:
    queue = queue_of(1)
    first = start_one(queue, "w", 0.0)
    second = under(first, renew(queue, first))

    assert renew(queue, second) == Renewal(ended=True)

    (alone,) = queue.lease_ready("w", 1, 0.0)
    assert (alone.solo, alone.retries) == (True, 0)
    assert renew(queue, alone) == Renewal(ended=True)
    assert queue.counters.charged == 1
    assert queue.lease_ready("w", 1, 0.0)[0].retries == 1


def test_a_renewal_asked_for_again_is_told_what_it_was_and_ends_nothing() -> None:
    queue = queue_of(1)
    old = start_one(queue, "w", 0.0)
    renewal = renew(queue, old)
    queue = restarted(queue, 1.0)
    queue.take_events()

    assert renew(queue, old, again=False) == Renewal(False, renewal.lease, 1)
    assert renew(queue, old, "v") == renew(queue, old, "") == Renewal(ended=False)
    assert queue.take_events() == []
    assert queue.counters.crashed == 1


def test_a_lease_that_is_gone_is_not_renewed() -> None:
    queue = queue_of(2)
    returned, done = start_one(queue, "w", 0.0), start_one(queue, "w", 0.0)
    give_back(queue, returned, charge=False)
    finish(queue, done)
    queue.take_events()

    assert renew(queue, returned) == renew(queue, done) == Renewal(ended=False)
    # An older lease of the worker is not what an earlier call for this one gave.
    again = lease_one(queue, "w", 0.0)
    later = msgspec.structs.replace(again, lease=f"{again.work_id}.{serial(again) + 5}")
    assert renew(queue, later) == Renewal(ended=False)


@pytest.mark.parametrize("how", ["another worker", "nobody", "not again"])
def test_a_crash_is_counted_though_nothing_is_renewed(how: str) -> None:
    queue = queue_of(1)
    old = start_one(queue, "w", 0.0)
    worker = {"another worker": "v", "nobody": ""}.get(how, "w")

    renewal = renew(queue, old, worker, again=how != "not again")

    assert renewal == Renewal(ended=True)
    assert (queue.counters.crashed, queue.ready_count) == (1, 1)


def test_a_lease_with_a_copy_ends_alone_and_is_not_renewed() -> None:
    queue = queue_of(40)
    slow = start_one(queue, "slow", 0.0)
    beat(queue, "quick", now=0.0)
    for grant in queue.lease_ready("quick", 39, 0.0):
        finish(queue, grant, now=1.0)
    (copy,) = queue.lease_backup("quick", 1, 500.0)

    assert renew(queue, slow, "slow", now=500.0) == Renewal(ended=True)

    assert [lease.serial for lease in queue.leases.values()] == [serial(copy)]
    assert queue.ready_count == 0


def test_an_attempt_that_is_charged_with_the_crash_is_not_gone_on_with() -> None:
    queue = queue_of(40)
    slow = start_one(queue, "slow", 0.0)
    beat(queue, "quick", now=0.0)
    for grant in queue.lease_ready("quick", 39, 0.0):
        finish(queue, grant, now=1.0)
    (copy,) = queue.lease_backup("quick", 1, 500.0)
    give_back(queue, copy, charge=True, now=500.0)

    assert renew(queue, slow, "slow", now=500.0) == Renewal(ended=True)

    assert (queue.counters.charged, queue.ready_count) == (1, 1)


def test_a_worker_that_vanishes_right_after_a_renewal_crashed_with_the_item_running() -> None:
    queue = queue_of(1)
    old = start_one(queue, "w", 0.0)
    renew(queue, old, now=1.0)

    queue.expire(2.0 + TERM_S)

    assert queue.counters.crashed == 2
    assert queue.lease_ready("v", 1, 40.0)[0].solo


def test_a_renewed_item_is_not_called_back_though_its_worker_has_not_said_that_it_runs() -> None:
    queue = queue_of(1)
    old = start_one(queue, "w", 0.0)
    beat(queue, "idle", now=0.0)
    queue.note_idle("idle", 5)
    renewed = under(old, renew(queue, old, now=1.0))

    queue.expire(2.0)

    assert beat(queue, "w", {renewed: 1}, now=2.0) == Verdict()


def test_an_item_called_back_that_was_started_before_and_crashed_goes_on() -> None:
    queue = queue_of(1)
    beat(queue, "w", now=0.0)
    old = lease_one(queue, "w", 0.0)
    beat(queue, "idle", now=0.0)
    queue.note_idle("idle", 1)
    queue.expire(1.0)  # calls it back
    renewed = under(old, renew(queue, old, now=2.0))

    assert queue.counters.crashed == 1
    assert beat(queue, "w", {renewed: 1}, now=3.0) == Verdict()


def test_a_renewed_item_has_its_whole_time_again_and_steps_may_follow() -> None:
    queue = queue_of(1)
    old = start_one(queue, "w", 0.0)
    queue.record_step(0, serial(old), 1, (0, 0), "a", b'"x"')
    renewed = under(old, renew(queue, old, now=100.0))
    now = 100.0
    while now < TIMEOUT_S + 90.0:
        now += 10.0
        beat(queue, "w", {renewed: 1}, now=now)
        queue.expire(now)
    assert serial(renewed) in queue.leases

    assert queue.record_step(0, serial(old), 1, (1, 0), "b", b'"y"') is StepOutcome.STALE
    assert queue.record_step(0, serial(renewed), 1, (1, 0), "b", b'"y"') is StepOutcome.ACCEPTED
    assert len(queue.steps.of(0)) == 2
    beat(queue, "w", {renewed: 1}, now=now + 21.0)
    queue.expire(now + 21.0)
    assert queue.counters.expired == 1


def test_a_renewal_whose_reply_was_lost_for_good_returns_uncharged() -> None:
    queue = queue_of(1)
    old = start_one(queue, "w", 0.0)
    renew(queue, old, now=1.0)
    for now in (10.0, 20.0, 30.0, 40.0):
        assert beat(queue, "w", {old: 3}, now=now).lost == [old.lease]
    assert (queue.counters.returned, queue.counters.crashed, queue.ready_count) == (1, 1, 1)
    assert renew(queue, old, now=41.0) == Renewal(ended=False)
