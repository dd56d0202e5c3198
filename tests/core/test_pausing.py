"""A pause by an operator: beside that for failed lines, across restarts, until it is lifted."""

from __future__ import annotations

import msgspec
import pytest

from dispatcher.core.events import (
    FailuresAccepted,
    FailuresPaused,
    FailureState,
    OperatorPaused,
    OperatorResumed,
    QueueState,
    StartHeard,
)
from dispatcher.core.failures import NO_LIMIT
from dispatcher.core.pausing import Pause
from dispatcher.core.work_queue import QueuePolicy, WorkQueue
from dispatcher.storage.records import decode_record, encode_records
from tests.core.test_failures import FINE, NOW, Run, serial_of

BOTH = (
    "paused by an operator (the disk is needed) and as 3 of 6 finished lines failed, more than "
    "--max-failures 2 allows; most often no_answer (3, line 2 for one)"
)


def from_checkpoint(run: Run) -> WorkQueue:
    queue = WorkQueue(run.policy)
    queue.restore(run.queue.checkpoint(), NOW)
    queue.end_of_input()
    queue.begin_again(NOW)
    return queue


def test_a_run_that_an_operator_paused_hands_out_nothing_until_it_is_resumed() -> None:
    run = Run(20, NO_LIMIT)
    run.queue.pause_for_operator("")
    assert run.take(5) == []
    assert not run.queue.may_open()
    assert str(run.queue.pause) == "paused by an operator"

    run.queue.resume()

    assert run.queue.pause is None
    assert len(run.take(5)) == 5


def test_a_run_that_an_operator_paused_takes_results_and_calls_back_what_is_not_begun() -> None:
    run = Run(20, NO_LIMIT)
    queue = run.queue
    queue.heartbeat("w", {}, backend_up=True, now=NOW)
    begun, unbegun, done = run.take(3)
    held = {(begun.work_id, serial_of(begun)): 1, (unbegun.work_id, serial_of(unbegun)): 0}
    queue.heartbeat("w", {**held, (done.work_id, serial_of(done)): 1}, backend_up=True, now=1.0)
    queue.pause_for_operator("")
    assert queue.finish(done.work_id, serial_of(done), FINE, now=2.0) == "accepted"

    queue.expire(3.0)

    assert queue.heartbeat("w", held, backend_up=True, now=4.0).back == [unbegun.lease]


def test_an_operators_pause_survives_a_restart_and_a_checkpoint() -> None:
    run = Run(20, NO_LIMIT)
    run.queue.pause_for_operator("the disk is needed")
    for queue in (
        run.restarted(),
        run.restarted(QueuePolicy(max_failures="9%")),
        from_checkpoint(run),
    ):
        assert str(queue.pause) == "paused by an operator (the disk is needed)"
        assert queue.lease_ready("w", 1, NOW) == []


def test_a_lifted_pause_does_not_come_back_with_a_restart() -> None:
    run = Run(20, NO_LIMIT)
    run.queue.pause_for_operator("")
    run.queue.resume()
    assert run.restarted().pause is None
    assert from_checkpoint(run).pause is None


def test_what_is_said_twice_is_recorded_once() -> None:
    run = Run(20, NO_LIMIT)
    run.queue.take_events()
    run.queue.resume()
    run.queue.pause_for_operator("why")
    run.queue.pause_for_operator("why")
    run.queue.pause_for_operator("")
    run.queue.pause_for_operator("because")
    run.queue.resume()
    run.queue.resume()
    assert run.queue.take_events() == [
        OperatorPaused("why"),
        OperatorPaused("because"),
        OperatorResumed(),
    ]


def paused_by_both() -> Run:
    run = Run(20, "2")
    grants = run.take(6)
    run.queue.pause_for_operator("the disk is needed")
    run.finish(grants, failed=3)
    return run


def test_a_run_may_be_paused_for_both_reasons_and_names_both() -> None:
    run = paused_by_both()
    assert str(run.queue.pause) == BOTH
    assert str(run.restarted().pause) == BOTH


@pytest.mark.parametrize("first", ["operator", "failures"])
def test_both_pauses_must_be_lifted(first: str) -> None:
    run = paused_by_both()
    lifts = [run.queue.resume, run.queue.accept_failures]
    lifts = lifts if first == "operator" else lifts[::-1]
    lifts[0]()
    assert run.queue.pause is not None
    assert run.queue.pause.by == ("failures" if first == "operator" else "operator",)
    assert run.take(1) == []
    assert run.restarted().pause == run.queue.pause
    lifts[1]()
    assert run.queue.pause is None
    assert len(run.take(1)) == 1


def test_a_limit_that_is_named_does_not_lift_an_operators_pause() -> None:
    run = paused_by_both()
    run.queue.set_max_failures("90%")
    assert run.queue.pause == Pause(("operator",), "the disk is needed")
    assert run.restarted(QueuePolicy(max_failures="off")).pause == run.queue.pause


# --- what a start is told to do once --------------------------------------------------------


def test_a_start_accepts_and_resumes_as_it_is_told() -> None:
    run = paused_by_both()
    assert run.queue.hear_start("", accept_failures=True, resume=True)
    assert run.queue.pause is None


def test_a_start_that_is_told_nothing_changes_nothing() -> None:
    run = paused_by_both()
    run.queue.take_events()
    assert run.queue.hear_start("job 7", accept_failures=False, resume=False)
    assert run.queue.take_events() == []


def test_a_start_of_the_same_name_is_heard_once() -> None:
    run = paused_by_both()
    assert run.queue.hear_start("job 7", accept_failures=True, resume=True)
    run.finish(run.take(3), failed=3)
    run.queue.pause_for_operator("again")

    run.queue = run.restarted()  # as when Slurm starts the job again

    assert not run.queue.hear_start("job 7", accept_failures=True, resume=True)
    assert run.queue.pause is not None
    assert run.queue.pause.by == ("failures", "operator")
    assert not from_checkpoint(run).hear_start("job 7", accept_failures=True, resume=False)
    assert run.queue.hear_start("job 8", accept_failures=True, resume=True)
    assert run.queue.pause is None


def test_a_start_without_a_name_is_heard_each_time() -> None:
    run = paused_by_both()
    for _ in range(2):
        run.queue.pause_for_operator("again")
        assert run.queue.hear_start("", accept_failures=False, resume=True)
        assert run.queue.pauses.operator is None


# --- the journal ----------------------------------------------------------------------------


def test_what_older_versions_wrote_is_read() -> None:
    old = b'{"first_open":3,"next_work_id":3,"next_offset":30,"next_serial":4,"counters":{"done":3,'
    old += b'"failed":3},"items":[],"failures":[1,1,"5%","2"]}'
    state = msgspec.json.decode(old, type=QueueState)
    assert state.failures == FailureState(1, 1, "5%", "2")
    assert (state.operator, state.heard) == (None, "")
    assert decode_record(b'["accept",200,20]') == FailuresAccepted(200, 20)


def test_what_is_remembered_of_a_pause_is_written_as_it_is_read() -> None:
    run = paused_by_both()
    run.queue.hear_start("job 7", accept_failures=False, resume=True)
    run.queue.pause_for_operator("the disk is needed")
    events = run.queue.take_events()
    kinds = {type(event) for event in events}
    assert {FailuresPaused, OperatorPaused, OperatorResumed, StartHeard} <= kinds
    assert [decode_record(line) for line in encode_records(*events).splitlines()] == events
    state = run.queue.checkpoint()
    assert msgspec.json.decode(msgspec.json.encode(state), type=QueueState) == state
