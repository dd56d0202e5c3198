"""The adaptive limiter, in virtual time: its rules one by one, and before a server that queues."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.core.limiter import AdaptiveLimiter, LimiterPolicy

SLOW_S = 9.0


class Driven:
    """A limiter to which one thing a second happens."""

    def __init__(self, **policy: float | None) -> None:
        self.limiter = AdaptiveLimiter(LimiterPolicy(**policy))  # type: ignore[arg-type]
        self.now = 0.0

    @property
    def limit(self) -> int:
        return self.limiter.limit

    def fast(self, times: int = 1) -> None:
        for _ in range(times):
            self.now += 1
            self.limiter.note_answer(self.now - 0.5, self.now, 0.5)

    def slow(self, times: int = 1) -> None:
        for _ in range(times):
            self.now += 1
            self.limiter.note_answer(self.now - 0.5, self.now, SLOW_S)

    def failed(self, times: int = 1) -> None:
        for _ in range(times):
            self.now += 1
            self.limiter.note_failure(self.now - 0.5, self.now)

    def refused(self, times: int = 1) -> None:
        for _ in range(times):
            self.now += 1
            self.limiter.note_overload(self.now - 0.5, self.now)


def settled(limit: int = 40, **policy: float | None) -> Driven:
    """Return a limiter that was refused once above `limit`, and has grown by one since."""
    driven = Driven(max_concurrent=200, **policy)
    driven.fast(math.ceil(limit / 0.8) - driven.limit)
    driven.refused()
    driven.fast(10)
    return driven


# ---------------------------------------------------------------- the rules


def test_every_fast_answer_raises_the_limit_while_the_server_is_unknown() -> None:
    driven = Driven(max_concurrent=100)
    assert driven.limit == 32
    driven.fast(32)
    assert driven.limit == 64


def test_the_first_limit_is_half_of_a_small_maximum_and_never_below_the_minimum() -> None:
    assert Driven(max_concurrent=8).limit == 4
    assert Driven(max_concurrent=1).limit == 1
    assert Driven(min_concurrent=40, max_concurrent=50).limit == 40


def test_one_refusal_takes_a_fifth() -> None:
    driven = Driven(max_concurrent=100)
    driven.refused()
    assert driven.limit == 25


def test_a_burst_of_refusals_costs_one_decrease() -> None:
    limiter = AdaptiveLimiter(LimiterPolicy(max_concurrent=64))
    for number in range(32):
        limiter.note_overload(1.0 + number / 1000, 2.0 + number / 100)
    assert limiter.limit == 25


def test_a_request_sent_after_the_decrease_causes_the_next_one() -> None:
    limiter = AdaptiveLimiter(LimiterPolicy(max_concurrent=64))
    limiter.note_overload(1.0, 2.0)
    limiter.note_overload(2.0, 2.1)  # sent in the same moment: of the same burst
    assert limiter.limit == 25
    limiter.note_overload(2.1, 2.2)
    assert limiter.limit == 20


def test_after_a_decrease_it_grows_by_one_for_each_row_of_fast_answers() -> None:
    driven = settled(40, recover_threshold=10)
    assert driven.limit == 41
    driven.fast(9)
    assert driven.limit == 41
    driven.fast()
    assert driven.limit == 42


def test_a_slow_answer_interrupts_the_row() -> None:
    driven = settled(40)
    driven.fast(9)
    driven.slow()
    driven.fast(9)
    assert driven.limit == 41
    driven.fast()
    assert driven.limit == 42


def test_answers_sent_before_the_decrease_raise_nothing() -> None:
    limiter = AdaptiveLimiter(LimiterPolicy(max_concurrent=64))
    limiter.note_overload(1.0, 2.0)
    for _ in range(100):
        limiter.note_answer(1.9, 300.0, 0.1)  # they took their time
    assert limiter.limit == 25


def test_an_answer_that_was_not_streamed_is_fast() -> None:
    driven = Driven()
    driven.limiter.note_answer(0.1, 500.0, None)
    assert driven.limit == 33


def test_without_a_threshold_no_first_token_is_slow() -> None:
    driven = Driven(ttft_threshold_s=None)
    driven.slow(20)
    assert driven.limit == 52


def test_a_first_token_at_the_threshold_is_fast_and_one_above_it_is_slow() -> None:
    limiter = AdaptiveLimiter(LimiterPolicy(ttft_threshold_s=2.0))
    for number in range(10):
        limiter.note_answer(number + 1, number + 2, 2.0)
    assert limiter.limit == 42
    for number in range(20, 24):
        limiter.note_answer(number, number + 1, 2.001)
    assert limiter.limit == 33


@pytest.mark.parametrize("happens", [Driven.slow, Driven.failed])
def test_one_slow_answer_or_error_among_many_costs_nothing(
    happens: Callable[[Driven], None],
) -> None:
    driven = settled(40)
    for _ in range(30):
        happens(driven)
        driven.fast(9)  # too few to grow
    assert driven.limit == 41


@pytest.mark.parametrize("happens", [Driven.slow, Driven.failed])
def test_four_slow_answers_or_errors_in_a_row_are_an_overload(
    happens: Callable[[Driven, int], None],
) -> None:
    driven = settled(40)
    happens(driven, 3)
    assert driven.limit == 41
    happens(driven, 1)
    assert driven.limit == 32


def test_one_slow_answer_in_three_is_seen_within_twenty_answers() -> None:
    driven = settled(40)
    for _ in range(7):
        driven.slow()
        driven.fast(2)
    assert driven.limit < 41


def test_after_an_outage_the_limit_doubles_to_where_it_was_before_and_goes_on_by_ones() -> None:
    driven = settled(100)
    before = driven.limit
    driven.refused(40)
    assert driven.limit == 1
    driven.fast(9)
    assert driven.limit == 1
    driven.fast(80)
    assert driven.limit == int(before * 0.8) + 1
    driven.fast(10)
    assert driven.limit == int(before * 0.8) + 2


def test_after_an_outage_at_the_very_start_the_limit_doubles_without_bound() -> None:
    driven = Driven(max_concurrent=200)
    driven.refused(40)
    driven.fast(9 + 150)
    assert driven.limit == 151


def test_slow_answers_of_before_a_decrease_do_not_add_up_to_the_next_one() -> None:
    driven = settled(40)
    driven.slow(3)
    driven.refused()
    driven.slow(3)
    assert driven.limit == 32


def test_a_stray_answer_during_an_outage_does_not_make_the_limit_forget_where_it_was() -> None:
    driven = settled(100)
    for _ in range(20):
        driven.refused()
        driven.fast()
    driven.fast(9 + 79)
    assert driven.limit >= 80


def test_a_server_that_bears_less_after_an_outage_is_not_run_over_again_and_again() -> None:
    driven = settled(100)
    driven.refused(40)
    refusals = 0
    for _ in range(2000):
        if driven.limit > 8:
            driven.refused()
            refusals += 1
        else:
            driven.fast()
    assert refusals < 2000 / 20


@pytest.mark.parametrize(
    "policy",
    [{"min_concurrent": 0}, {"min_concurrent": 65}, {"recover_threshold": 0}],
)
def test_bounds_that_contradict_each_other_are_refused(policy: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(policy))):
        LimiterPolicy(**policy)


# ---------------------------------------------------------------- whatever happens

_EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["fast", "slow", "unstreamed", "failure", "overload"]),
        st.floats(0, 100),  # seconds since the event before
        st.floats(0, 1000),  # seconds since it was sent
    ),
    max_size=300,
)


@given(events=_EVENTS, least=st.integers(1, 40), more=st.integers(0, 60))
@settings(max_examples=300, deadline=None)
def test_the_limit_stays_within_its_bounds_and_only_news_lowers_it(
    events: list[tuple[str, float, float]], least: int, more: int
) -> None:
    most = least + more
    limiter = AdaptiveLimiter(LimiterPolicy(min_concurrent=least, max_concurrent=most))
    now, decreased_at = 0.0, -math.inf
    for kind, later_s, age_s in events:
        now += later_s
        sent_at, before = now - age_s, limiter.limit
        if kind == "overload":
            limiter.note_overload(sent_at, now)
        elif kind == "failure":
            limiter.note_failure(sent_at, now)
        else:
            ttft_s = {"fast": 0.1, "slow": SLOW_S, "unstreamed": None}[kind]
            limiter.note_answer(sent_at, now, ttft_s)
        assert least <= limiter.limit <= most
        assert limiter.limit <= before + 1
        if sent_at <= decreased_at:
            assert limiter.limit == before
        if limiter.limit < before:
            assert kind in ("overload", "failure", "slow")
            decreased_at = now


# ---------------------------------------------------------------- before a server


class Server:
    """Answers after a time that rises with its load, and refuses above `most` at once."""

    def __init__(
        self,
        base_s: float,
        per_request_s: float,
        most: float = math.inf,
        outage: tuple[float, float] = (math.inf, math.inf),
        noise: float = 0.0,
    ) -> None:
        self.base_s, self.per_request_s, self.most = base_s, per_request_s, most
        self.outage, self.noise = outage, noise
        self.in_flight = 0

    def latency_s(self, rng: Random) -> float:
        if rng.random() < self.noise:
            return SLOW_S
        return (self.base_s + self.per_request_s * (self.in_flight - 1)) * rng.uniform(0.9, 1.1)


class Run:
    """A client that always has as many requests in flight as it may; refused ones wait a second."""

    def __init__(self, server: Server, limiter: AdaptiveLimiter | int, until_s: float) -> None:
        self.answered: list[float] = []
        self.limits: list[tuple[float, int]] = []
        self.refused: list[float] = []
        rng = Random(7)
        ends: list[tuple[float, int, float, str]] = []
        now, ticket, waits_until = 0.0, 0, [0.0] * 4000  # when each request may be sent
        heapq.heapify(waits_until)
        in_use = 0
        while now < until_s:
            limit = limiter if isinstance(limiter, int) else limiter.limit
            self.limits.append((now, limit))
            while in_use < limit and waits_until[0] <= now:
                heapq.heappop(waits_until)
                in_use += 1
                ticket += 1
                if server.outage[0] <= now < server.outage[1] or server.in_flight >= server.most:
                    end = (now + 0.002, ticket, now, "refused")
                else:
                    server.in_flight += 1
                    end = (now + server.latency_s(rng), ticket, now, "answered")
                heapq.heappush(ends, end)
            if not ends:
                now = waits_until[0]
                continue
            now, _, sent_at, what = heapq.heappop(ends)
            in_use -= 1
            if what == "refused":
                self.refused.append(now)
                heapq.heappush(waits_until, now + 1.0)
                if not isinstance(limiter, int):
                    limiter.note_overload(sent_at, now)
            else:
                server.in_flight -= 1
                self.answered.append(now)
                heapq.heappush(waits_until, now)
                if not isinstance(limiter, int):
                    limiter.note_answer(sent_at, now, now - sent_at)

    def rate(self, since_s: float, until_s: float) -> float:
        return sum(since_s <= at < until_s for at in self.answered) / (until_s - since_s)

    def limit_at(self, when_s: float) -> int:
        return [limit for at, limit in self.limits if at <= when_s][-1]


@pytest.mark.parametrize(
    ("base_s", "per_request_s", "most"),
    [(0.2, 0.02, 24), (0.5, 0.0, 24), (2.0, 0.1, 24), (0.3, 0.001, 3), (1.0, 0.002, 700)],
)
def test_it_settles_near_the_best_throughput_of_a_server_that_refuses(
    base_s: float, per_request_s: float, most: int
) -> None:
    limiter = AdaptiveLimiter(LimiterPolicy(max_concurrent=1000))
    adaptive = Run(Server(base_s, per_request_s, most), limiter, 180)
    best = Run(Server(base_s, per_request_s, most), most, 180)
    # The sawtooth between 0.8 and 1 has a mean of 0.9, where throughput rises with every request.
    assert adaptive.rate(60, 180) > 0.88 * best.rate(60, 180)
    refused = sum(at >= 60 for at in adaptive.refused)
    assert refused < adaptive.rate(60, 180) * 120 / 10


def test_it_keeps_the_first_token_near_the_threshold_of_a_server_that_only_gets_slower() -> None:
    limiter = AdaptiveLimiter(LimiterPolicy(max_concurrent=1000, ttft_threshold_s=2.0))
    run = Run(Server(0.2, 0.02), limiter, 300)
    best = Run(Server(0.2, 0.02), 90, 300)  # 2 s for the first token
    assert run.rate(60, 300) > 0.9 * best.rate(60, 300)
    assert all(50 <= limit <= 115 for at, limit in run.limits if at > 100)


def test_one_answer_in_fifty_that_is_slow_by_chance_costs_little() -> None:
    limiter = AdaptiveLimiter(LimiterPolicy(max_concurrent=200))
    run = Run(Server(0.5, 0.0, noise=0.02), limiter, 300)
    late = [limit for at, limit in run.limits if at > 60]
    assert sum(late) / len(late) > 180


@pytest.mark.parametrize(("base_s", "most"), [(0.5, 24), (2.0, 24), (2.0, 800)])
def test_it_is_back_within_a_minute_of_an_outage(base_s: float, most: int) -> None:
    limiter = AdaptiveLimiter(LimiterPolicy(max_concurrent=1000))
    run = Run(Server(base_s, 0.0, most, outage=(120, 150)), limiter, 240)
    assert run.limit_at(149) == 1
    assert run.rate(210, 240) > 0.8 * run.rate(90, 120)


def test_an_overload_is_seen_within_one_round_trip() -> None:
    limiter = AdaptiveLimiter(LimiterPolicy(max_concurrent=200, ttft_threshold_s=2.0))
    server = Server(0.5, 0.0)
    Run(server, limiter, 60)
    assert limiter.limit == 200
    for number in range(200):
        limiter.note_answer(60.5 + number / 1e6, 64.0 + number / 1e6, 3.5)
    assert limiter.limit == 160


def test_a_limit_that_is_not_used_does_not_grow() -> None:
    limiter = AdaptiveLimiter(LimiterPolicy(min_concurrent=1, max_concurrent=1000))
    begun = limiter.limit
    for number in range(1000):
        limiter.note_answer(number, number + 0.5, 0.1, in_flight=begun // 2 - 1)
    assert limiter.limit == begun

    limiter.note_answer(1000, 1000.5, 0.1, in_flight=begun // 2)
    assert limiter.limit > begun
