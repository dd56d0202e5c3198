"""When failed lines are too many to go on, and when they suddenly become more."""

from __future__ import annotations

import re
from typing import Any

import pytest

from dispatcher.core.events import Event, FailureLimitSet, FailuresAccepted
from dispatcher.core.failures import (
    LEAST_LINES,
    NO_LIMIT,
    Cause,
    FailureLimit,
    FailureTrend,
    commonest,
    parse_failure_limit,
)
from dispatcher.core.grants import Grant, parse_lease_id
from dispatcher.core.work_queue import MAX_RETRIES_EXCEEDED, QueuePolicy, WorkQueue
from tests.support.queues import arrivals

FINE = b'{"answer": 1}'
FAILED = b'{"__ERROR__": {"error": "no_answer"}}'
NOW = 0.0


# --- the limit ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("200", FailureLimit(count=200)),
        ("0", FailureLimit(count=0)),
        ("5%", FailureLimit(share=0.05)),
        ("0.5%", FailureLimit(share=0.005)),
        ("100%", FailureLimit(share=1.0)),
        (NO_LIMIT, FailureLimit()),
    ],
)
def test_a_limit_is_a_number_a_share_or_off(text: str, limit: FailureLimit) -> None:
    assert parse_failure_limit(text) == limit


@pytest.mark.parametrize(
    "text", ["", "%", "5 percent", "-1", "-1%", "101%", "nan%", "inf%", "0.05", "5%%", "5%5", "on"]
)
def test_what_is_no_limit_is_refused_with_what_would_be_one(text: str) -> None:
    with pytest.raises(ValueError, match="as 200, nor a share, as 5%, nor off"):
        parse_failure_limit(text)


def test_a_count_is_exceeded_by_one_more_than_it() -> None:
    limit = parse_failure_limit("3")
    assert not limit.is_exceeded(3, 3)
    assert limit.is_exceeded(4, 4)


def test_a_share_counts_from_a_hundred_lines_on() -> None:
    limit = parse_failure_limit("5%")
    assert not limit.is_exceeded(LEAST_LINES - 1, LEAST_LINES - 1)
    assert limit.is_exceeded(6, LEAST_LINES)
    assert not limit.is_exceeded(5, LEAST_LINES)


def test_no_limit_is_never_exceeded() -> None:
    assert not parse_failure_limit(NO_LIMIT).is_exceeded(10**6, 10**6)


# --- the queue pauses -----------------------------------------------------------------------


class Run:
    """A queue, and what a journal would hold of it."""

    def __init__(self, lines: int, max_failures: str, **limits: Any) -> None:
        self.policy = QueuePolicy(max_failures=max_failures, **limits)
        self.queue = WorkQueue(self.policy)
        self.events: list[Event] = []
        self.queue.open_lines(0, [10] * lines)
        self.queue.end_of_input()

    def take(self, count: int, worker: str = "w") -> list[Grant]:
        return self.queue.lease_ready(worker, count, NOW)

    def finish(self, grants: list[Grant], failed: int = 0) -> None:
        """The first `failed` of them fail."""
        came = [
            (grant.work_id, serial_of(grant), FAILED, "no_answer")
            if place < failed
            else (grant.work_id, serial_of(grant), FINE, "")
            for place, grant in enumerate(grants)
        ]
        self.queue.finish_all(arrivals(*came), NOW)

    def restarted(self, policy: QueuePolicy | None = None) -> WorkQueue:
        """Replay everything that happened, as a start of the server does."""
        self.events += self.queue.take_events()
        queue = WorkQueue(policy or self.policy)
        for event in self.events:
            queue.apply(event, NOW)
        queue.end_of_input()
        queue.begin_again(NOW)
        return queue


def serial_of(grant: Grant) -> int:
    named = parse_lease_id(grant.lease)
    assert named is not None
    return named[1]


def test_a_run_pauses_when_more_lines_failed_than_may() -> None:
    run = Run(20, "2")
    run.finish(run.take(5), failed=2)
    assert run.queue.pause is None
    assert len(run.take(1)) == 1

    run.finish(run.take(1), failed=1)

    assert run.queue.pause is not None
    assert run.take(5) == []
    assert not run.queue.may_open()


def test_a_pause_says_how_many_failed_why_most_of_them_and_where_one_is() -> None:
    run = Run(20, "2")
    run.finish(run.take(6), failed=3)
    said = str(run.queue.pause)
    assert said == (
        "paused, as 3 of 6 finished lines failed, more than --max-failures 2 allows; most often "
        "no_answer (3, line 2 for one)"
    )


def test_a_pause_by_share_says_the_share() -> None:
    run = Run(200, "5%")
    run.finish(run.take(120), failed=12)
    assert "12 of 120 finished lines failed (10.0 %), more than --max-failures 5% allows" in str(
        run.queue.pause
    )


def test_a_run_without_a_limit_never_pauses() -> None:
    run = Run(300, NO_LIMIT)
    run.finish(run.take(200), failed=200)
    assert run.queue.pause is None


def test_tombstones_count() -> None:
    run = Run(20, "1")
    grants = run.take(3)
    for grant in grants[:2]:
        run.queue.tombstone(grant.work_id, MAX_RETRIES_EXCEEDED, FAILED, NOW)
    assert run.queue.pause is not None
    assert run.queue.pause.cause == Cause(MAX_RETRIES_EXCEEDED, 2, 1)


def test_a_paused_run_takes_results_and_releases() -> None:
    run = Run(20, "0")
    grants = run.take(5)
    run.finish(grants[:1], failed=1)
    assert run.queue.pause is not None

    run.finish(grants[1:3])
    released = run.queue.release(
        grants[3].work_id, serial_of(grants[3]), charge=False, reason="", keep_yields=None, now=NOW
    )

    assert released
    assert run.queue.counters.done == 3
    assert run.queue.pause is not None  # until somebody says otherwise


def test_a_paused_run_hands_out_no_copies() -> None:
    run = Run(60, "0")
    queue = run.queue
    for name in ("w", "idle"):
        queue.heartbeat(name, {}, backend_up=True, now=NOW)
    for grant in run.take(50):
        queue.finish(grant.work_id, serial_of(grant), FINE, now=1.0)
    slow, slower, last = run.take(3)
    held = {(grant.work_id, serial_of(grant)): 1 for grant in (slow, slower)}
    queue.heartbeat("w", held, backend_up=True, now=1.0)
    assert len(queue.lease_backup("idle", 1, now=1000.0)) == 1  # and the other one would be next

    queue.finish(last.work_id, serial_of(last), FAILED, error="no_answer", now=1001.0)

    assert queue.pause is not None
    assert queue.lease_backup("idle", 1, now=1002.0) == []


def test_a_paused_run_calls_back_what_is_not_begun() -> None:
    run = Run(20, "0")
    queue = run.queue
    queue.heartbeat("w", {}, backend_up=True, now=NOW)
    begun, unbegun, failing = run.take(3)
    held = {
        (begun.work_id, serial_of(begun)): 1,
        (unbegun.work_id, serial_of(unbegun)): 0,
    }
    queue.heartbeat("w", {**held, (failing.work_id, serial_of(failing)): 1}, backend_up=True, now=1)
    run.finish([failing], failed=1)

    queue.expire(2.0)
    verdict = queue.heartbeat("w", held, backend_up=True, now=3.0)

    assert verdict.back == [unbegun.lease]


def test_a_complete_run_is_not_paused_by_its_last_line() -> None:
    run = Run(3, "0")
    grants = run.take(3)
    run.finish(grants[:2])
    run.finish(grants[2:], failed=1)
    assert run.queue.is_complete
    assert run.queue.pause is None


# --- it goes on -----------------------------------------------------------------------------


def paused_run() -> Run:
    run = Run(400, "5%")
    run.finish(run.take(200), failed=20)
    assert run.queue.pause is not None
    return run


def test_a_higher_limit_lets_a_paused_run_go_on() -> None:
    run = paused_run()
    run.queue.set_max_failures("10%")
    assert run.queue.pause is None
    assert len(run.take(3)) == 3


def test_a_limit_that_is_not_high_enough_leaves_the_run_paused() -> None:
    run = paused_run()
    run.queue.set_max_failures("9%")
    assert run.queue.pause is not None
    assert run.queue.pause.limit == "9%"


def test_a_lower_limit_pauses_a_run_that_went_well() -> None:
    run = Run(400, NO_LIMIT)
    run.finish(run.take(200), failed=20)
    run.queue.set_max_failures("19")
    assert run.queue.pause is not None


def test_what_is_no_limit_changes_nothing() -> None:
    run = paused_run()
    with pytest.raises(ValueError, match="lots"):
        run.queue.set_max_failures("lots")
    assert run.queue.max_failures == "5%"


def test_accepted_failures_count_no_more() -> None:
    run = paused_run()
    run.queue.accept_failures()
    assert run.queue.pause is None

    run.finish(run.take(LEAST_LINES), failed=5)
    assert run.queue.pause is None
    run.finish(run.take(10), failed=10)

    assert run.queue.pause is not None
    assert (run.queue.pause.failed, run.queue.pause.done) == (15, 110)


def test_a_count_begins_anew_after_accepted_failures() -> None:
    run = Run(50, "3")
    run.finish(run.take(10), failed=4)
    run.queue.accept_failures()
    run.finish(run.take(3), failed=3)
    assert run.queue.pause is None
    run.finish(run.take(1), failed=1)
    assert run.queue.pause is not None


# --- a restart ------------------------------------------------------------------------------


def test_a_restart_finds_the_run_paused() -> None:
    assert paused_run().restarted().pause is not None


def fallen_below_the_limit() -> Run:
    """Return a run that 5 % paused, with good lines that were under way in since: 4 % failed."""
    run = Run(600, "5%")
    grants = run.take(500)
    run.finish(grants[:200], failed=20)
    run.finish(grants[200:])
    assert (run.queue.counters.failed, run.queue.counters.done) == (20, 500)
    return run


def test_a_share_that_fell_below_the_limit_meanwhile_does_not_end_a_pause_at_a_restart() -> None:
    run = fallen_below_the_limit()
    queue = run.restarted()
    assert queue.pause is not None
    assert str(queue.pause) == str(run.queue.pause)
    assert queue.lease_ready("w", 1, NOW) == []


def test_a_checkpoint_holds_a_pause_whose_share_fell_below_the_limit() -> None:
    run = fallen_below_the_limit()
    queue = WorkQueue(run.policy)
    queue.restore(run.queue.checkpoint(), NOW)
    queue.begin_again(NOW)
    assert str(queue.pause) == str(run.queue.pause)


def test_whoever_names_a_limit_is_told_by_the_counts_of_then() -> None:
    run = fallen_below_the_limit()
    run.queue.set_max_failures("3%")
    assert run.queue.pause is not None
    assert (run.queue.pause.limit, run.queue.pause.done) == ("3%", 500)
    run.queue.set_max_failures("5%")
    assert run.queue.pause is None


def test_a_pause_that_another_limit_ended_at_a_start_is_over_for_good() -> None:
    run = fallen_below_the_limit()
    run.queue = run.restarted(QueuePolicy(max_failures="4%"))
    assert run.queue.pause is None
    assert run.restarted(run.policy).pause is None


def test_a_restart_with_a_higher_limit_goes_on() -> None:
    queue = paused_run().restarted(QueuePolicy(max_failures="20%"))
    assert queue.pause is None
    assert len(queue.lease_ready("w", 2, NOW)) == 2


def test_a_restart_remembers_accepted_failures() -> None:
    run = paused_run()
    run.queue.accept_failures()
    queue = run.restarted()
    assert queue.pause is None
    assert queue.pauses.failures == run.queue.pauses.failures


def test_a_restart_with_the_same_limit_keeps_the_one_that_was_set_meanwhile() -> None:
    run = paused_run()
    run.queue.set_max_failures("50%")
    assert run.restarted().max_failures == "50%"


def test_a_restart_with_another_limit_goes_by_that() -> None:
    run = paused_run()
    run.queue.set_max_failures("50%")
    queue = run.restarted(QueuePolicy(max_failures="1%"))
    assert queue.max_failures == "1%"
    assert queue.pause is not None


def test_what_was_said_of_failures_is_in_a_checkpoint() -> None:
    run = paused_run()
    run.queue.set_max_failures("50%")
    run.queue.accept_failures()
    queue = WorkQueue(run.policy)
    queue.restore(run.queue.checkpoint(), NOW)
    queue.begin_again(NOW)
    assert queue.pauses.failures == run.queue.pauses.failures
    assert queue.max_failures == "50%"


def test_what_was_said_of_failures_is_made_durable() -> None:
    run = paused_run()
    run.queue.take_events()
    run.queue.set_max_failures("50%")
    run.queue.accept_failures()
    assert run.queue.take_events() == [
        FailureLimitSet("50%", "5%"),
        FailuresAccepted(200, 20, {"no_answer": 20}),
    ]


def test_a_pause_after_failures_were_accepted_counts_only_those_since_by_cause() -> None:
    run = paused_run()
    run.queue.accept_failures()
    run.finish(run.take(150), failed=11)
    assert run.queue.pause is not None
    assert (run.queue.pause.failed, run.queue.pause.done) == (11, 150)
    assert run.queue.pause.cause is not None
    assert run.queue.pause.cause.count == 11
    assert run.restarted().pause == run.queue.pause


# --- failures jump --------------------------------------------------------------------------


class Totals:
    """Lines that end in batches of `batch`, as the tick of a server sees them."""

    def __init__(self, batch: int = 10) -> None:
        self.trend = FailureTrend()
        self.batch = batch
        self.done = self.failed = 0
        self.errors: dict[str, int] = {}
        self.jumps: list[int] = []

    def go_on(self, lines: int, share: float, kind: str = "no_answer") -> None:
        """Let lines end, of which `share` fails, evenly spread."""
        wanted, begun_with = 0.0, self.failed
        for _ in range(lines // self.batch):
            self.done += self.batch
            wanted += share * self.batch
            failed = round(wanted) - (self.failed - begun_with)
            self.failed += failed
            self.errors[kind] = self.errors.get(kind, 0) + failed
            self.trend.note(self.done, self.failed, self.errors, {kind: self.done - 1})
            if self.trend.jump is not None:
                self.jumps.append(self.done)


@pytest.mark.parametrize("batch", [1, 10, 1000])
def test_lines_that_suddenly_fail_are_noticed_within_two_hundred_lines(batch: int) -> None:
    totals = Totals(batch)
    totals.go_on(10_000, 0.01)
    assert totals.jumps == []

    totals.go_on(max(200, 2 * batch), 0.5, "timeout")

    assert totals.trend.jump is not None
    assert totals.trend.jump.before == pytest.approx(0.01, rel=0.5)
    assert totals.trend.jump.cause is not None
    assert totals.trend.jump.cause.kind == "timeout"


@pytest.mark.parametrize("share", [0.0, 0.01, 0.04])
@pytest.mark.parametrize("batch", [10, 5000])
def test_a_steady_share_of_failures_is_no_jump(share: float, batch: int) -> None:
    totals = Totals(batch)
    totals.go_on(100_000, share)
    assert totals.jumps == []


def test_a_run_that_fails_from_its_first_line_is_noticed() -> None:
    totals = Totals()
    totals.go_on(150, 1.0)
    assert totals.trend.jump is not None
    assert totals.trend.jump.before is None
    assert re.match(r"(\d+) of the last \1 lines failed \(100.0 %\)", str(totals.trend.jump))


def test_a_jump_is_over_when_lines_fail_as_rarely_again_as_before() -> None:
    totals = Totals()
    totals.go_on(5000, 0.01)
    totals.go_on(300, 0.6)
    assert totals.trend.jump is not None
    totals.go_on(300, 0.01)
    assert totals.trend.jump is None


def test_a_jump_lasts_while_lines_go_on_failing() -> None:
    totals = Totals()
    totals.go_on(1000, 0.01)
    totals.go_on(50_000, 0.3)
    assert totals.trend.jump is not None
    assert totals.trend.jump.failed == pytest.approx(0.3 * totals.trend.jump.done, abs=3)


def test_a_jump_says_how_many_failed_lately_and_before() -> None:
    totals = Totals()
    totals.go_on(10_000, 0.01)
    totals.go_on(200, 0.5)
    said = str(totals.trend.jump)
    assert "of the last 1" in said
    assert "of those before" in said
    assert "most often no_answer" in said


def test_counts_that_a_failed_write_took_back_are_no_jump() -> None:
    totals = Totals()
    totals.go_on(1000, 0.0)
    totals.done, totals.failed = 500, 0
    totals.go_on(500, 0.0)
    assert totals.jumps == []


def test_a_restart_compares_with_all_that_was_before_it() -> None:
    totals = Totals()
    totals.done, totals.failed = 100_000, 8_000
    totals.go_on(5_000, 0.08)
    assert totals.jumps == []


def test_the_commonest_cause_is_named_with_a_line_if_one_is_known() -> None:
    assert commonest({}, {}) is None
    assert commonest({"a": 0}, {}) is None
    assert commonest({"a": 1, "b": 3}, {"b": 7}) == Cause("b", 3, 7)
    assert str(commonest({"a": 1}, {})) == "most often a (1)"
