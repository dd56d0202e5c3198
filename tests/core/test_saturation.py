"""The controller behind `--workers auto`: its rules, and before an engine with a batch and a KV
cache, in virtual time.
"""

from __future__ import annotations

import math
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.core.saturation import EngineLoad, Saturation


def full(saturation: Saturation, running: int, waiting: int, kv_usage: float | None = None) -> int:
    """Sample an engine at which as much is in flight as the limit allows."""
    load = EngineLoad(running, waiting, kv_usage)
    return saturation.sample(load, saturation.limit, 0.0)


def test_it_doubles_while_nothing_waits_and_the_limit_is_used() -> None:
    saturation = Saturation(first=16, most=100)
    assert [full(saturation, saturation.limit, 0) for _ in range(4)] == [32, 64, 100, 100]


def test_it_stays_while_there_is_too_little_to_do() -> None:
    saturation = Saturation(first=16)
    assert saturation.sample(EngineLoad(14, 0), 14, 0.0) == 16
    assert saturation.sample(EngineLoad(15, 0), 15, 1.0) == 32


def test_it_does_not_grow_again_before_the_engine_shows_the_last_growth() -> None:
    saturation = Saturation(first=16)
    assert full(saturation, 7, 0) == 16
    assert full(saturation, 8, 0) == 32


def test_it_grows_to_a_small_queue_where_one_begins() -> None:
    saturation = Saturation(first=66)
    assert full(saturation, 64, 2) == 72
    assert full(saturation, 64, 8) == 72
    assert full(saturation, 64, 16) == 72
    assert full(Saturation(first=5), 4, 1) == 8


@pytest.mark.parametrize("waiting", [0, 3])
def test_it_does_not_grow_where_the_kv_cache_is_nearly_full(waiting: int) -> None:
    saturation = Saturation(first=64)
    assert full(saturation, 64, waiting, kv_usage=0.95) == 64
    assert full(saturation, 64, waiting, kv_usage=0.94) > 64


def test_a_long_queue_is_cut_to_a_small_one_only_when_it_stands_for_seconds() -> None:
    saturation = Saturation(first=200)
    limits = [saturation.sample(EngineLoad(64, 136), 200, now) for now in range(6)]
    assert limits == [200, 200, 200, 200, 200, 72]


def test_of_a_long_queue_that_changes_what_always_stood_is_cut() -> None:
    saturation = Saturation(first=200)
    for now, waiting in enumerate([136, 30, 136, 100, 136, 136]):
        saturation.sample(EngineLoad(64, waiting), 200, now)
    assert saturation.limit == 200 - (30 - 8)


def test_a_burst_of_prompts_costs_nothing() -> None:
    saturation = Saturation(first=200)
    for now in range(60):
        saturation.sample(EngineLoad(64, 136 if now % 5 else 10), 200, now)
    assert saturation.limit == 200


def test_requests_that_are_still_above_an_earlier_cut_cause_no_second_one() -> None:
    saturation = Saturation(first=200)
    in_flight = 200
    for now in range(60):  # requests take minutes: hardly one ends
        saturation.sample(EngineLoad(64, in_flight - 64), in_flight, now)
        in_flight -= now % 2
    assert saturation.limit == 72


def test_preemptions_lower_the_limit_a_little_once_in_five_seconds() -> None:
    saturation = Saturation(first=100)
    limits = [
        saturation.sample(EngineLoad(100, 0, 0.96, preemptions=7 * now), 100, now)
        for now in range(8)
    ]
    assert limits == [100, 95, 95, 95, 95, 95, 90, 90]


def once_preempted() -> Saturation:
    saturation = Saturation(first=134)
    saturation.sample(EngineLoad(134, 0, 0.96, preemptions=0), 134, 0.0)
    saturation.sample(EngineLoad(134, 0, 0.96, preemptions=1), 134, 0.0)
    assert saturation.limit == 127
    return saturation


def test_a_batch_that_was_just_emptied_costs_no_more_than_half() -> None:
    saturation = Saturation(first=100)
    saturation.sample(EngineLoad(100, 0, 0.96, preemptions=0), 100, 0.0)
    assert saturation.sample(EngineLoad(2, 98, 0.02, preemptions=98), 100, 1.0) == 47


def test_after_preemptions_growth_is_careful_up_from_where_they_ended() -> None:
    saturation = once_preempted()
    limits = [
        saturation.sample(EngineLoad(saturation.limit, 0, 0.9, 1), saturation.limit, now)
        for now in range(1, 12)
    ]
    assert limits == [127, 127, 127, 127, 128, 128, 128, 128, 128, 130, 130]


def test_careful_growth_is_at_an_end_when_requests_have_become_small() -> None:
    saturation = once_preempted()
    for now in range(1, 61):  # just after preemptions the cache may be empty, too
        saturation.sample(EngineLoad(saturation.limit, 0, 0.49, 1), saturation.limit, now)
    careful = saturation.limit
    assert careful < 160
    assert saturation.sample(EngineLoad(careful, 0, 0.51, 1), careful, 61.0) == careful
    assert saturation.sample(EngineLoad(careful, 0, 0.49, 1), careful, 62.0) == 2 * careful


def test_preemptions_of_before_it_began_do_not_count() -> None:
    saturation = Saturation(first=100)
    assert saturation.sample(EngineLoad(100, 0, 0.5, preemptions=5000), 100, 0.0) == 200


def test_an_engine_that_was_started_again_counts_from_zero() -> None:
    saturation = Saturation(first=100)
    saturation.sample(EngineLoad(90, 6, 0.5, preemptions=50), 96, 0.0)
    before = saturation.limit
    assert saturation.sample(EngineLoad(0, 0, 0.0, preemptions=0), before, 1.0) == before
    assert saturation.sample(EngineLoad(before, 0, 0.5, preemptions=1), before, 2.0) < before


@given(
    samples=st.lists(
        st.tuples(
            st.integers(0, 5000),
            st.integers(0, 5000),
            st.none() | st.floats(0, 1),
            st.integers(0, 10),
            st.integers(0, 5000),
            st.floats(0, 10),
        ),
        max_size=100,
    ),
    first=st.integers(-1, 5000),
    most=st.integers(1, 4096),
)
@settings(max_examples=200, deadline=None)
def test_whatever_an_engine_says_the_limit_is_between_one_and_the_most(
    samples: list[tuple[int, int, float | None, int, int, float]], first: int, most: int
) -> None:
    saturation = Saturation(first, most)
    now = 0.0
    for running, waiting, kv_usage, preemptions, in_flight, later_s in samples:
        now += later_s
        before = saturation.limit
        load = EngineLoad(running, waiting, kv_usage, preemptions)
        limit = saturation.sample(load, in_flight, now)
        assert 1 <= limit == saturation.limit <= most
        assert limit <= max(2 * before, before + running // 8 + 4)
        if waiting >= max(4, running // 8):
            assert limit <= before


# ---------------------------------------------------------------- before an engine


class Engine:
    """Continuous batching in steps of 50 ms: a step of n requests brings each a token and costs
    `1 + n / speedup_until` of them; a request's KV grows with its tokens.
    """

    STEP_S = 0.05

    def __init__(self, places: int, kv_tokens: float, tokens: int = 200) -> None:
        self.places, self.kv_tokens, self.tokens = places, kv_tokens, tokens
        self.batch: list[int] = []  # tokens that each has
        self.queue: deque[int] = deque()
        self.preemptions = self.finished = 0
        self._credit = 0.0

    @property
    def load(self) -> EngineLoad:
        kv_usage = sum(self.batch) / self.kv_tokens
        return EngineLoad(len(self.batch), len(self.queue), kv_usage, self.preemptions)

    @property
    def in_flight(self) -> int:
        return len(self.batch) + len(self.queue)

    def send(self) -> None:
        # Prompts of different lengths, or all requests would end together.
        self.queue.append((self.finished + self.in_flight) * 37 % (self.tokens // 2))

    def step(self) -> None:
        """A step takes longer with a larger batch, but less than in proportion."""
        self._credit += 1 / (1 + len(self.batch) / 256)
        if self._credit < 1:
            return
        self._credit -= 1
        used = sum(self.batch)
        while self.queue and len(self.batch) < self.places and used < 0.98 * self.kv_tokens:
            self.batch.append(self.queue.popleft())
            used += self.batch[-1]
        while used + len(self.batch) > self.kv_tokens:
            lost = self.batch.pop()
            used -= lost
            self.queue.appendleft(0)  # computed again from its start
            self.preemptions += 1
        self.batch = [tokens + 1 for tokens in self.batch]
        self.finished += sum(tokens >= self.tokens for tokens in self.batch)
        self.batch = [tokens for tokens in self.batch if tokens < self.tokens]


def throughput(engine: Engine, limit: Saturation | int, limits: list[int] | None = None) -> float:
    """Return the requests a second from the second to the sixth minute."""
    finished = 0
    steps = round(360 / Engine.STEP_S)
    for number in range(steps):
        now = number * Engine.STEP_S
        if number % 20 == 0 and isinstance(limit, Saturation):
            limit.sample(engine.load, engine.in_flight, now)
            if limits is not None and now > 120:
                limits.append(limit.limit)
        if now == 60:
            finished = engine.finished
        while engine.in_flight < (limit if isinstance(limit, int) else limit.limit):
            engine.send()
        engine.step()
    return (engine.finished - finished) / 300


@pytest.mark.parametrize(
    ("places", "kv_tokens"),
    [(4, math.inf), (64, math.inf), (256, math.inf), (256, 9000.0), (256, 30_000.0)],
)
def test_it_is_within_a_twentieth_of_the_best_fixed_limit(places: int, kv_tokens: float) -> None:
    fixed = [4, 8, 16, 32, 48, 64, 80, 96, 128, 192, 256, 288, 512]
    best = max(throughput(Engine(places, kv_tokens), limit) for limit in fixed)
    limits: list[int] = []
    adaptive = throughput(Engine(places, kv_tokens), Saturation(most=2048), limits)
    assert adaptive > 0.95 * best
    assert max(limits) < 1.5 * min(limits)
    assert max(limits) < 1.5 * (places + 8)


def test_a_queue_of_others_does_not_take_the_limit_of_a_worker_that_asks_nothing() -> None:
    saturation = Saturation(first=16)
    for second in range(30):
        saturation.sample(EngineLoad(running=10, waiting=30), 0, float(second))
    assert saturation.limit == 16

    for second in range(30, 60):
        saturation.sample(EngineLoad(running=10, waiting=30), 16, float(second))
    assert saturation.limit == 4
