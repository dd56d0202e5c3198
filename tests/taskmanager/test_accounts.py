"""What a worker counts of its requests to a model, and what it tells of it."""

from __future__ import annotations

import json
from bisect import bisect_left
from random import Random
from typing import Any

import msgspec
import pytest

from dispatcher.models import (
    LATENCY_BOUNDS_S,
    MAX_MODEL_NAME,
    MAX_MODELS,
    Histogram,
    ModelStats,
    WorkerStats,
)
from dispatcher.taskmanager.backend.accounts import Account, for_heartbeat

BUCKETS = len(LATENCY_BOUNDS_S) + 1


def usage(prompt: Any, completion: Any) -> dict[str, Any]:
    return {"usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


def histogram(*seconds: float) -> Histogram:
    """Return what an account measures of answers that took so long."""
    account = Account()
    for value in seconds:
        account.note_answer({}, value, None)
    return account.stats(0, 0).latency


# --- an account ---------------------------------------------------------------------------------


def test_answers_are_counted_with_their_tokens_and_times() -> None:
    account = Account()
    account.note_answer(usage(10, 100), 0.3, 0.02)
    account.note_answer(usage(5, 50), 4.0, None)

    stats = account.stats(in_flight=7, limit=64, restarts=2)

    assert (stats.requests, stats.prompt_tokens, stats.completion_tokens) == (2, 15, 150)
    assert (stats.in_flight, stats.limit, stats.restarts) == (7, 64, 2)
    assert (stats.latency.count, stats.ttft.count) == (2, 1)
    assert stats.latency.total == pytest.approx(4.3)
    assert stats.ttft.total == pytest.approx(0.02)


def test_what_went_wrong_is_counted_apart_from_what_was_answered() -> None:
    account = Account()
    account.note_error()
    for _ in range(2):
        account.note_retry()
    for _ in range(3):
        account.note_overload()

    assert account.stats(0, 0) == ModelStats(errors=1, retried=2, overloads=3)


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"usage": None},
        {"usage": "many"},
        {"usage": [1, 2]},
        usage(None, None),
        usage("7", 7.5),
        usage(-3, -1),
        usage(True, True),
        usage(10**30, 1 << 60),
        usage([1], {"n": 1}),
    ],
)
def test_nonsense_for_usage_counts_no_tokens_and_spoils_nothing(answer: dict[str, Any]) -> None:
    account = Account()
    account.note_answer(answer, 1.0, None)
    account.note_answer(usage(1, 2), 1.0, None)

    stats = account.stats(0, 0)
    assert (stats.requests, stats.prompt_tokens, stats.completion_tokens) == (2, 1, 2)


@pytest.mark.parametrize("bound", LATENCY_BOUNDS_S)
def test_a_bucket_holds_what_took_as_long_as_its_bound_and_no_longer(bound: float) -> None:
    place = LATENCY_BOUNDS_S.index(bound)
    expected = [0] * BUCKETS
    expected[place] = expected[place + 1] = 1
    assert histogram(bound, bound * 1.001).counts == expected


def test_stats_stay_as_they_were_when_more_is_counted() -> None:
    account = Account()
    account.note_answer({}, 1.0, 1.0)
    before = account.stats(0, 0)
    shown = msgspec.to_builtins(before)
    account.note_answer({}, 1.0, 1.0)
    assert msgspec.to_builtins(before) == shown


# --- histograms ---------------------------------------------------------------------------------


def test_of_nothing_there_is_no_quantile_and_no_mean() -> None:
    assert (Histogram().quantile(0.5), Histogram().mean, Histogram().count) == (None, None, 0)


def test_a_quantile_lies_in_the_bucket_of_the_true_one() -> None:
    rng = Random(5)
    seconds = sorted(rng.lognormvariate(0, 1.5) for _ in range(2000))
    measured = histogram(*seconds)
    assert measured.mean == pytest.approx(sum(seconds) / 2000)
    for share in (0.01, 0.25, 0.5, 0.9, 0.95, 0.99, 1.0):
        true = seconds[min(1999, round(share * 2000))]
        estimate = measured.quantile(share)
        assert estimate is not None
        apart = bisect_left(LATENCY_BOUNDS_S, estimate) - bisect_left(LATENCY_BOUNDS_S, true)
        assert abs(apart) <= 1, share  # one, when the true one is next to a bound
        if apart == 0:
            assert 0.4 < estimate / true < 2.5


def test_a_quantile_is_linear_within_its_bucket() -> None:
    one_bucket = histogram(*[0.3] * 100)  # between 0.25 and 0.5
    assert one_bucket.quantile(0.5) == pytest.approx(0.375)
    assert one_bucket.quantile(0.1) == pytest.approx(0.275)
    assert one_bucket.quantile(1.0) == pytest.approx(0.5)
    two_buckets = histogram(*[0.3] * 50, *[0.7] * 50)
    assert two_buckets.quantile(0.5) == pytest.approx(0.5)
    assert two_buckets.quantile(0.75) == pytest.approx(0.75)


def test_what_is_beyond_the_last_bound_counts_as_the_last_bound() -> None:
    assert histogram(5000.0).quantile(0.5) == LATENCY_BOUNDS_S[-1]
    assert histogram(5000.0).mean == 5000.0


def test_two_histograms_add_up_to_that_of_all_measurements() -> None:
    one, other = histogram(0.1, 3.0), histogram(3.0, 9000.0)
    both = Histogram()
    both.add(one)
    both.add(other)
    both.add(Histogram())

    assert both == histogram(0.1, 3.0, 3.0, 9000.0)
    assert one == histogram(0.1, 3.0)  # not changed by what was added to the sum


# --- what a heartbeat carries -------------------------------------------------------------------


def test_what_was_not_counted_takes_no_room_in_a_heartbeat() -> None:
    account = Account()
    account.note_answer(usage(1, 1), 0.3, None)
    told = msgspec.json.encode(WorkerStats(models={"m": account.stats(0, 0)}))

    assert "errors" not in json.loads(told)["models"]["m"]
    assert json.loads(told)["models"]["m"]["ttft"] == {}
    assert len(told) < 200
    back = msgspec.json.decode(told, type=WorkerStats)
    assert back.models["m"] == account.stats(0, 0)


def test_few_models_are_told_as_they_are() -> None:
    models = {"org/model-é": ModelStats(requests=1), "m": ModelStats(requests=2)}
    assert for_heartbeat(models) == models


def test_models_that_are_too_many_are_added_up() -> None:
    models = {f"model-{number}": ModelStats(requests=number) for number in range(100)}
    told = for_heartbeat(models)

    assert len(told) == MAX_MODELS
    assert told["model-30"].requests == 30
    assert told["other"].requests == sum(range(31, 100))
    assert models["model-31"] == ModelStats(requests=31)


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 5000, "\ud800", "tab\tand\x00"])
def test_a_name_that_the_server_would_refuse_is_changed(name: str) -> None:
    told = for_heartbeat({name: ModelStats(requests=3)})
    ((shown, stats),) = told.items()
    assert 0 < len(shown) <= MAX_MODEL_NAME
    assert shown.isprintable()
    assert stats.requests == 3
    msgspec.json.encode(told)


def test_names_that_become_one_are_added_up() -> None:
    long = "x" * MAX_MODEL_NAME
    told = for_heartbeat({long + "a": ModelStats(requests=1), long + "b": ModelStats(requests=2)})
    assert told == {long: ModelStats(requests=3)}
