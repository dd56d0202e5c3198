"""Rate limits, as the headers and bodies of Cerebras, OpenAI and others tell them."""

from __future__ import annotations

import math
import time
from email.utils import formatdate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from dispatcher.taskmanager.backend.rate_limits import (
    LONGEST_WAIT_S,
    RateLimit,
    read_limits,
)

NOW = 1_800_000_000.0
TOO_MANY = {"type": "too_many_requests_error", "param": "quota"}


def cerebras(**spent: str) -> dict[str, str]:
    """The 18 headers of every answer; `requests_day="12.5"`: none left, back in 12.5 s."""
    headers = {}
    for kind in ("requests", "tokens"):
        for period in ("minute", "hour", "day"):
            reset = spent.get(f"{kind}_{period}")
            headers[f"x-ratelimit-limit-{kind}-{period}"] = "1000"
            headers[f"x-ratelimit-remaining-{kind}-{period}"] = "990" if reset is None else "0"
            headers[f"x-ratelimit-reset-{kind}-{period}"] = reset or "26.28409242630005"
    return headers


def limits(
    headers: dict[str, str] | None = None,
    error: dict[str, Any] | None = None,
    status: int = 200,
    now: float = NOW,
) -> RateLimit:
    return read_limits(CIMultiDict(headers or {}), error, status, now)


# ---- An answer


def test_an_answer_of_a_local_engine_says_nothing_of_limits() -> None:
    assert limits({"content-type": "application/json"}) == RateLimit()


def test_an_answer_with_something_left_of_every_limit_asks_for_no_pause() -> None:
    assert limits(cerebras()) == RateLimit()


def test_a_spent_minute_is_a_pause_until_its_reset() -> None:
    found = limits(cerebras(tokens_minute="11.382867097854614"))
    assert found.pause_s == pytest.approx(11.382867)
    assert not found.is_quota_exhausted
    assert found.what == "x-ratelimit-remaining-tokens-minute is 0"


def test_of_two_spent_limits_the_later_reset_counts() -> None:
    found = limits(cerebras(tokens_minute="11.4", requests_hour="900.5", requests_minute="20"))
    assert found.pause_s == 900.5
    assert "requests-hour" in found.what


@pytest.mark.parametrize("kind", ["requests", "tokens"])
def test_a_spent_day_is_a_quota_and_tells_when_it_comes_back(kind: str) -> None:
    found = limits(cerebras(**{f"{kind}_day": "33011.4", "tokens_minute": "9"}))
    assert found.is_quota_exhausted
    assert found.quota_exhausted_s == found.pause_s == 33011.4
    assert found.what == f"x-ratelimit-remaining-{kind}-day is 0"


def test_a_spent_day_is_a_quota_even_when_its_reset_is_near_or_not_said() -> None:
    assert limits(cerebras(requests_day="30")).is_quota_exhausted
    found = limits({"x-ratelimit-remaining-requests-day": "0"})
    assert found.is_quota_exhausted
    assert found.quota_exhausted_s is None


@pytest.mark.parametrize(
    ("reset", "pause_s"),
    [
        ("1s", 1.0),
        ("6m0s", 360.0),
        ("120ms", 0.12),
        ("2m59.56s", 179.56),
        ("1m26.4s", 86.4),
        ("9µs", 9e-6),
        ("7.66", 7.66),
        ("5.3e-05", 5.3e-05),
    ],
)
def test_the_resets_of_openai_groq_and_cerebras_are_read(reset: str, pause_s: float) -> None:
    headers = {"X-RateLimit-Remaining-Tokens": "0", "X-RateLimit-Reset-Tokens": reset}
    assert limits(headers).pause_s == pytest.approx(pause_s)


def test_a_pause_above_an_hour_is_a_quota() -> None:
    headers = {"x-ratelimit-remaining-requests": "0"}
    assert not limits({**headers, "x-ratelimit-reset-requests": "1h"}).is_quota_exhausted
    found = limits({**headers, "x-ratelimit-reset-requests": "7h12m0s"})
    assert found.is_quota_exhausted
    assert found.quota_exhausted_s == 25920.0


@pytest.mark.parametrize("remaining", ["-1", "nan", "inf", "", "none", "1", "0x0"])
def test_what_is_left_without_being_zero_is_no_limit(remaining: str) -> None:
    headers = {"x-ratelimit-remaining-tokens": remaining, "x-ratelimit-reset-tokens": "30"}
    assert limits(headers) == RateLimit()


def test_less_than_one_request_is_none() -> None:
    headers = {"x-ratelimit-remaining-requests": "0.7", "x-ratelimit-reset-requests": "3"}
    assert limits(headers).pause_s == 3.0


def test_nothing_left_of_nothing_is_no_limit() -> None:
    headers = {"x-ratelimit-remaining-requests-day": "0", "x-ratelimit-limit-requests-day": "0"}
    assert limits(headers) == RateLimit()


@pytest.mark.parametrize("reset", ["soon", "-5", "nan", "inf", "", "1s ago", "5m-3s"])
def test_a_reset_that_cannot_be_read_is_no_pause(reset: str) -> None:
    headers = {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": reset}
    assert limits(headers) == RateLimit()


@pytest.mark.parametrize("reset", [f"{NOW + 60:.0f}", f"{(NOW + 60) * 1000:.0f}"])
def test_a_reset_in_unix_time_is_the_time_until_then_by_the_servers_clock(reset: str) -> None:
    headers = {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": reset}
    assert limits(headers).pause_s == 60.0
    date = formatdate(NOW + 20, usegmt=True)
    assert limits({**headers, "date": date}, now=12.0).pause_s == 40.0


def test_retry_after_of_an_answer_is_not_heeded() -> None:
    assert limits({"Retry-After": "5"}) == RateLimit()
    assert limits({**cerebras(tokens_minute="55"), "Retry-After": "5"}).pause_s == 55.0


# ---- A refusal


def test_a_429_without_a_word_leaves_the_wait_to_the_caller() -> None:
    assert limits(status=429) == RateLimit()


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_read_in_seconds_and_in_milliseconds(status: int) -> None:
    assert limits({"retry-after": "49"}, status=status).pause_s == 49.0
    assert limits({"Retry-After": "0.5"}, status=status).pause_s == 0.5
    headers = {"retry-after": "1", "retry-after-ms": "437"}
    assert limits(headers, status=status).pause_s == 0.437


def test_retry_after_as_a_date_goes_by_the_servers_clock_if_it_shows() -> None:
    date = formatdate(NOW + 90, usegmt=True)
    assert limits({"Retry-After": date}, status=429).pause_s == 90.0
    headers = {"Retry-After": date, "Date": formatdate(NOW + 30, usegmt=True)}
    assert limits(headers, status=429, now=5.0).pause_s == 60.0
    assert limits({"Retry-After": formatdate(NOW - 9)}, status=429) == RateLimit()


def test_a_date_without_a_zone_is_gmt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        date = time.strftime("%a %b %d %H:%M:%S %Y", time.gmtime(NOW + 90))
        assert limits({"Retry-After": date}, status=429).pause_s == 90.0
    finally:
        monkeypatch.undo()
        time.tzset()


def test_retry_after_has_the_last_word_over_the_resets_of_minutes() -> None:
    headers = {**cerebras(tokens_minute="55"), "Retry-After": "7"}
    assert limits(headers, status=429).pause_s == 7.0


def test_a_retry_after_above_an_hour_is_a_quota_unless_the_server_is_away() -> None:
    found = limits({"Retry-After": "86400"}, status=429)
    assert found.is_quota_exhausted
    assert found.quota_exhausted_s == 86400.0
    away = limits({"Retry-After": "86400"}, status=503)
    assert not away.is_quota_exhausted
    assert away.pause_s == 3600.0


def test_no_wait_is_longer_than_a_month() -> None:
    for headers in ({"Retry-After": "9" * 9}, {"Retry-After-Ms": "1e300"}):
        assert limits(headers, status=429).quota_exhausted_s == LONGEST_WAIT_S


def test_the_quota_codes_of_cerebras_mean_the_minute_when_the_message_does() -> None:
    message = "Requests per minute limit exceeded - too many requests sent."
    error = {**TOO_MANY, "message": message, "code": "request_quota_exceeded"}
    assert not limits(cerebras(requests_minute="31"), error, 429).is_quota_exhausted
    assert limits(cerebras(requests_minute="31"), error, 429).pause_s == 31.0


def test_a_request_too_large_for_what_is_left_of_the_minute_waits_for_the_minute() -> None:
    message = "Tokens per minute limit exceeded - too many tokens processed."
    error = {**TOO_MANY, "message": message, "code": "token_quota_exceeded"}
    headers = {**cerebras(), "x-ratelimit-reset-tokens-minute": "17.5"}
    found = limits(headers, error, 429)
    assert (found.pause_s, found.what) == (17.5, message)
    openai = {"message": "Rate limit reached for gpt-4o on tokens per min (TPM): Limit 30000"}
    headers = {"x-ratelimit-remaining-tokens": "9", "x-ratelimit-reset-tokens": "3s"}
    assert limits(headers, openai, 429).pause_s == 3.0


@pytest.mark.parametrize(
    "message",
    [
        "Tokens per day limit exceeded - too many tokens processed.",
        "Rate limit reached for gpt-4o on requests per day (RPD): Limit 200, Used 200",
        "Number of request tokens has exceeded your daily rate limit",
        "Rate limit exceeded: free-models-per-day",
    ],
)
def test_a_429_that_speaks_of_the_day_is_a_quota(message: str) -> None:
    error = {**TOO_MANY, "message": message, "code": "token_quota_exceeded"}
    found = limits(None, error, 429)
    assert found.is_quota_exhausted
    assert found.quota_exhausted_s is None
    assert found.what == message
    assert limits({"Retry-After": "432"}, error, 429).quota_exhausted_s == 432.0


def test_the_reset_of_the_day_is_found_where_the_day_has_something_left() -> None:
    error = {"message": "Tokens per day limit exceeded - too many tokens processed."}
    headers = {**cerebras(), "x-ratelimit-reset-tokens-day": "2h"}
    assert limits(headers, error, 429).quota_exhausted_s == 7200.0


@pytest.mark.parametrize("field", ["code", "type"])
def test_no_money_is_a_quota_that_nobody_knows_the_end_of(field: str) -> None:
    error = {"message": "You exceeded your current quota.", field: "insufficient_quota"}
    found = limits({"Retry-After": "1"}, error, 429)
    assert found == RateLimit(0.0, True, "You exceeded your current quota.")
    assert limits(None, None, 402).is_quota_exhausted
    assert not limits(None, error, 500).is_quota_exhausted


# ---- Anything

_values = st.one_of(
    st.text("0123456789.,-+eE smhduµnaif:\u0663\n", max_size=20),
    st.floats().map(str),
    st.integers().map(str),
    st.from_regex(r"[0-9]{1,20}(ns|us|ms|s|m|h|d)([0-9.]{0,9}s)?", fullmatch=True),
    st.datetimes().map(lambda date: date.strftime("%a, %d %b %Y %H:%M:%S %z")),
)
_names = st.sampled_from([*cerebras(), "Retry-After", "Retry-After-Ms", "Date", "x-ratelimit-"])
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("ab day", max_size=9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.just("a"), inner, max_size=2),
    max_leaves=4,
)


@given(
    st.dictionaries(_names, _values, max_size=8),
    st.none() | st.dictionaries(st.sampled_from(["code", "type", "message"]), _json),
    st.sampled_from([200, 402, 403, 404, 429, 500, 503]),
    st.floats(0, 4e9),
)
def test_no_answer_hurts(
    headers: dict[str, str], error: dict[str, Any] | None, status: int, now: float
) -> None:
    found = limits(headers, error, status, now)
    assert math.isfinite(found.pause_s)
    assert 0 <= found.pause_s <= (LONGEST_WAIT_S if found.is_quota_exhausted else 3600.0)
