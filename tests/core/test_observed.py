"""What is kept for those who watch a run: bounded, and only what is true."""

from __future__ import annotations

import json

import msgspec

from dispatcher.core.events import Finished, Tombstoned
from dispatcher.core.observed import MOST_ERRORS, MOST_MARKS, LineMarks, Mark, Observed
from dispatcher.core.observed import error_message as message
from dispatcher.core.workers import Lease
from tests.support.queues import arrivals


def error(**fields: object) -> bytes:
    return json.dumps({"__ERROR__": fields}).encode()


def finished(results: dict[int, bytes], kinds: dict[str, list[int]]) -> Finished:
    raw = [msgspec.Raw(result) for result in results.values()]
    return Finished([*results], [0] * len(results), kinds, raw)


def test_the_latest_failed_lines_are_told_newest_first_and_no_other() -> None:
    observed = Observed()
    results = {3: b"{}", 4: error(error="bad", message="why"), 5: b"1"}
    observed.see([finished(results, {"bad": [4]})], 100.0)
    observed.see([finished({6: b"{}"}, {})], 101.0)
    blank = error(error="blank_line", message="the line is blank")
    observed.see([Tombstoned(7, "blank_line", msgspec.Raw(blank))], 102.0)
    assert [(f.line, f.kind, f.message, f.at) for f in observed.latest_failed()] == [
        (7, "blank_line", "the line is blank", 102.0),
        (4, "bad", "why", 100.0),
    ]


def test_who_gave_the_result_is_known_where_the_lease_was() -> None:
    observed = Observed()
    bad = error(error="bad")
    lease = Lease(9, 4, "node1", True, False, 0.0, 0.0, 0.0)
    came = arrivals((4, 9, bad, "bad"), (5, None, bad, "bad"), (6, 9, b"{}", ""))
    observed.meet(came, {9: lease})
    observed.see([finished({4: bad, 5: bad}, {"bad": [4, 5]})], 1.0)
    assert [(f.line, f.worker) for f in observed.latest_failed()] == [(5, ""), (4, "node1")]
    assert observed.giver_of(4) == "node1"
    assert observed.giver_of(99) == ""


def test_however_many_lines_fail_few_are_kept_and_little_of_each() -> None:
    observed = Observed()
    lease = Lease(1, 0, "w", True, False, 0.0, 0.0, 0.0)
    large = error(error="bad", message="m" * 100_000)
    for line in range(1000):
        observed.meet(arrivals(*[(line, 1, large, "bad")] * 3), {1: lease})
        observed.see([finished({line: large}, {"bad": [line]})], 0.0)
    latest = observed.latest_failed()
    assert [each.line for each in latest] == [*range(999, 999 - MOST_ERRORS, -1)]
    assert max(len(each.message) for each in latest) == 300
    kept = sum(len(said) for _, _, said, _, _ in observed._failed)
    assert kept <= MOST_ERRORS * 4096
    for line in range(5000):  # duplicates, which no event tells
        observed.meet(arrivals((line, 1, large, "bad")), {1: lease})
    assert len(observed._givers) <= MOST_ERRORS + 1


def test_an_error_without_a_message_tells_its_last_try_or_nothing() -> None:
    tries = [{"kind": "charged", "reason": "first"}, {"kind": "crashed", "reason": "gone"}]
    assert message(error(error="max_retries_exceeded", attempts=tries)) == (
        "the last attempt: crashed, gone"
    )
    assert message(error(error="bad", message={"code": 3})) == "{'code': 3}"
    for odd in (b"{}", b"[" * 5000, b'{"__ERROR__": 3}', b"\xff", error(error="bad")):
        assert message(odd) == ""


def test_any_line_is_found_from_a_mark_before_it() -> None:
    marks = LineMarks()
    assert marks.before(10**9) == Mark(0, 0)
    for line in range(0, 10_000, 7):
        marks.note(line, line * 100)
    for line in (0, 1, 255, 300, 5000, 9_999, 10**9):
        mark = marks.before(line)
        assert mark.line <= line
        assert mark.offset == mark.line * 100
        assert min(line, 9_000) - mark.line < 600


def test_a_billion_lines_have_no_more_marks_than_fit() -> None:
    marks = LineMarks()
    for line in range(0, 10**9, 50_000):
        marks.note(line, line)
    assert len(marks._marks) <= MOST_MARKS
    for line in (10**6, 5 * 10**8, 10**9):
        assert line - marks.before(line).line < 10**6
