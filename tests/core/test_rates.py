"""How fast a run goes, and what the time left rests on."""

from __future__ import annotations

import pytest

from dispatcher.core.rates import LEVELS, RATE_OVER_S, RunRates, TimeLeft, WorkerRates
from dispatcher.core.workers import Worker


def at_a_pace(
    rates: RunRates, seconds: int, per_second: float, *, begin: int = 0, done: float = 0
) -> float:
    """Note every second; return what is done by then."""
    for second in range(begin, begin + seconds + 1):
        rates.note(second, int(done), int(done) // 10, int(done) * 100)
        done += per_second
    return done - per_second


def test_nothing_is_known_before_the_second_look() -> None:
    rates = RunRates()
    assert rates.per_second() == (0.0, 0.0)
    assert rates.time_left(5) is None
    assert rates.points_after(0) == []
    rates.note(7.0, 3, 0, 0)
    assert rates.per_second() == (0.0, 0.0)
    assert rates.time_left(5) is None


def test_the_rate_is_that_of_the_last_half_minute() -> None:
    rates = RunRates()
    done = at_a_pace(rates, 100, 50)
    at_a_pace(rates, 31, 2, begin=100, done=done)
    items, tokens = rates.per_second()
    assert items == pytest.approx(2, rel=0.05)
    assert tokens == pytest.approx(200, rel=0.05)
    assert rates.in_status(0)["rate"] == {
        "items_per_s": round(items, 3),
        "tokens_per_s": round(tokens, 1),
    }


def test_looks_that_follow_each_other_closely_are_one() -> None:
    rates = RunRates()
    for look in range(100_000):
        rates.note(look * 0.001, look, 0, 0)
    assert rates.per_second()[0] == pytest.approx(1000, rel=0.01)
    assert len(rates._recent) < 2 * RATE_OVER_S / 0.5 + 3


def test_the_time_left_is_at_the_pace_of_the_last_ten_minutes() -> None:
    rates = RunRates()
    done = at_a_pace(rates, 1000, 1)
    at_a_pace(rates, 700, 4, begin=1000, done=done)
    assert rates.time_left(400) == TimeLeft(pytest.approx(100), pytest.approx(4), 600)


def test_a_slow_run_is_judged_by_more_than_ten_minutes() -> None:
    rates = RunRates()
    at_a_pace(rates, 5000, 0.002)  # a line in 500 seconds
    left = rates.time_left(10)
    assert left is not None
    assert left.over_s > 3000
    assert left.seconds == pytest.approx(5000, rel=0.2)


def test_the_time_before_the_first_line_is_nobodys_pace() -> None:
    """Engines load for minutes; a start of the server goes on with lines that are done."""
    rates = RunRates()
    at_a_pace(rates, 300, 0, done=1000)
    at_a_pace(rates, 60, 10, begin=301, done=1000)
    left = rates.time_left(600)
    assert left is not None
    assert left.seconds == pytest.approx(60, rel=0.05)
    assert left.over_s <= 61


@pytest.mark.parametrize(("seconds", "per_second"), [(9, 100), (600, 0), (1000, 0.004)])
def test_too_little_says_nothing_of_the_time_left(seconds: int, per_second: float) -> None:
    rates = RunRates()
    at_a_pace(rates, seconds, per_second)
    assert rates.time_left(100) is None
    assert rates.in_status(100)["time_left"] is None


def test_a_run_without_lines_left_has_no_time_left() -> None:
    rates = RunRates()
    at_a_pace(rates, 60, 10)
    assert rates.time_left(0) is None
    assert rates.time_left(-3) is None


def test_what_is_taken_back_is_no_negative_rate() -> None:
    rates = RunRates()
    rates.note(0, 100, 10, 5000)
    rates.note(10, 90, 5, 0)
    assert rates.per_second() == (0.0, 0.0)
    assert all(min(point[2:]) >= 0 for *_, points in rates.points_after(0) for point in points)


def test_points_are_fine_lately_coarse_before_and_never_more_than_are_kept() -> None:
    rates = RunRates()
    at_a_pace(rates, 9 * 86400, 1)
    found = {every_s: points for every_s, _, points in rates.points_after(0)}
    assert {every_s: len(points) for every_s, points in found.items()} == dict(LEVELS)
    for every_s, points in found.items():
        assert points[-1].at_s - points[0].at_s == pytest.approx(every_s * (len(points) - 1))
        assert points[-1].items == pytest.approx(1, rel=0.1)
        assert points[-1].failed == pytest.approx(0.1, rel=0.5)


def test_whoever_looks_again_gets_only_what_is_new() -> None:
    rates = RunRates()
    at_a_pace(rates, 31, 1)
    seq = rates.seq
    assert seq == 7  # six after five seconds each, one after thirty
    assert [points for *_, points in rates.points_after(seq)] == [[], [], []]
    at_a_pace(rates, 5, 1, begin=32, done=32)
    (point,) = rates.points_after(seq)[0][2]
    assert point.seq == rates.seq == seq + 1
    assert len(rates.points_after(0)[0][2]) == 7


def test_a_workers_rate_does_not_depend_on_how_its_results_come() -> None:
    rates, worker = WorkerRates(), Worker("w", 0.0)
    assert rates.of(worker, 0.0) is None
    for second in range(61):
        worker.finished += 100 if second % 10 == 0 else 0  # ten a second, in batches of 100
        rates.note(second, [worker])
    assert rates.of(worker, 60.0) == pytest.approx(10, rel=0.35)
    assert rates.of(Worker("new", 0.0), 60.0) is None
