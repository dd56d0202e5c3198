"""When a model server counts as hung, and when it is merely slow, or idle."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import pytest

from dispatcher.fakellm import FakeLLM, FakeLLMSettings, Rule
from dispatcher.taskmanager.backend.http import Endpoint
from dispatcher.taskmanager.backend.openai_compatible import OpenAICompatibleBackend, RetryPolicy
from dispatcher.taskmanager.backend.request import Request
from dispatcher.taskmanager.backend.watch import HangDetector, HttpEngine, mark_of, until_hung
from tests.taskmanager.doubles import run

TIMEOUT_S = 180.0


@dataclass
class Looks:
    """A detector that looks once a second; a look sees nothing new unless it is told."""

    detector: HangDetector = field(default_factory=lambda: HangDetector(TIMEOUT_S, 10.0))
    now: float = 1000.0
    answered_at: float = 0.0

    def look(
        self, seconds: float, *, in_flight: int = 8, mark: Callable[[float], Hashable | None]
    ) -> bool:
        asked = False
        for _ in range(int(seconds)):
            self.now += 1
            asked = self.detector.look(
                self.now,
                in_flight=in_flight,
                idle_s=self.now - self.answered_at,
                mark=mark(self.now),
            )
            if asked:
                break
        return asked


def still(_: float) -> Hashable | None:
    return "the same"


def untold(_: float) -> Hashable | None:
    return None


def test_a_server_that_stands_still_with_requests_in_flight_is_asked_after_the_time_out() -> None:
    looks = Looks()
    assert not looks.look(TIMEOUT_S, mark=still)
    assert looks.look(2, mark=still)


def test_a_server_without_counters_is_asked_when_no_answer_came_for_the_time_out() -> None:
    looks = Looks()
    assert not looks.look(TIMEOUT_S, mark=untold)
    assert looks.look(2, mark=untold)


def test_an_idle_server_is_never_asked() -> None:
    assert not Looks().look(10_000, in_flight=0, mark=still)


def test_a_busy_server_that_answers_nothing_for_long_moves_its_counters() -> None:
    assert not Looks().look(10_000, mark=lambda now: now // 100)


def test_an_answer_is_progress() -> None:
    looks = Looks()
    looks.look(TIMEOUT_S - 10, mark=untold)
    looks.answered_at = looks.now
    assert not looks.look(TIMEOUT_S - 10, mark=untold)


def test_a_page_of_counters_that_fails_now_and_then_is_no_progress() -> None:
    looks = Looks()
    flaky = {0: "the same", 1: None}
    assert looks.look(TIMEOUT_S + 5, mark=lambda now: flaky[int(now) % 2])


def test_a_server_where_requests_time_out_and_pause_before_they_are_sent_again_is_found() -> None:
    looks = Looks()
    looks.look(100, mark=still)
    looks.look(20, in_flight=0, mark=still)
    assert looks.look(100, mark=still)


def test_time_in_which_nobody_looked_is_not_the_servers() -> None:
    looks = Looks()
    looks.look(100, mark=still)
    looks.now += 10_000  # this process was stopped, say
    assert not looks.look(60, mark=still)


def test_a_sign_of_life_starts_the_time_anew() -> None:
    looks = Looks()
    assert looks.look(TIMEOUT_S + 5, mark=still)
    looks.detector.note_life()
    assert not looks.look(TIMEOUT_S - 5, mark=still)


@pytest.mark.parametrize(
    "page",
    [
        "vllm:generation_tokens_total{{}} {}\n",
        "llamacpp:n_tokens_max 31\nllamacpp:n_decode_total {}\n",
    ],
    ids=["vLLM", "llama.cpp"],
)
def test_the_counters_of_an_engine_are_told_from_what_else_its_page_holds(page: str) -> None:
    idle = "process_cpu_seconds_total {}\n" + page
    assert mark_of(idle.format(1, 7)) == mark_of(idle.format(2, 7))
    assert mark_of(idle.format(1, 7)) != mark_of(idle.format(1, 8))
    assert mark_of("process_cpu_seconds_total 1\n") is None


@dataclass
class Engine:
    """A server in virtual time, which passes in probes, or as often as somebody waits."""

    answers_probe: bool = False
    moves_in_probe: bool = False
    probes: int = 0
    counter: int = 0

    def in_flight(self) -> int:
        return 3

    def idle_s(self) -> float:
        return 1e9

    async def mark(self, timeout_s: float) -> Hashable | None:
        return self.counter

    async def probe(self, timeout_s: float) -> bool:
        self.probes += 1
        self.counter += self.moves_in_probe
        if self.probes >= 3:
            self.moves_in_probe = self.answers_probe = False
        return self.answers_probe


@pytest.mark.parametrize(
    ("engine", "probes"),
    [(Engine(), 1), (Engine(answers_probe=True), 3), (Engine(moves_in_probe=True), 3)],
    ids=["dead", "answers", "moves"],
)
def test_a_server_hangs_when_it_neither_answers_the_probe_nor_moves_meanwhile(
    engine: Engine, probes: int
) -> None:
    async def scenario() -> None:
        what = await asyncio.wait_for(until_hung(engine, 0.2), 10)
        assert what.startswith("hangs: for ")
        assert "with 3 requests unanswered" in what
        # The third probe of a server that lived until then still moved its counters.
        assert engine.probes in (probes, probes + 1)

    run(scenario())


def test_an_engine_that_refuses_everything_for_ever_hangs_though_it_answers() -> None:
    async def scenario() -> None:
        fake = FakeLLM(FakeLLMSettings(rules=(Rule(status=503),)))
        url = await fake.start()
        backend = OpenAICompatibleBackend(
            Endpoint(url, "m"), retries=RetryPolicy(initial_delay_s=0.02, max_delay_s=0.05)
        )
        await backend.start()
        asking = asyncio.ensure_future(
            backend.process(Request({"messages": [{"role": "user", "content": "?"}]}))
        )
        said = await asyncio.wait_for(until_hung(HttpEngine(backend), 0.5), 5)

        assert said.startswith("hangs: ")
        assert not asking.done()
        asking.cancel()
        await asyncio.wait([asking])
        await backend.close()
        await fake.stop()

    run(scenario())
