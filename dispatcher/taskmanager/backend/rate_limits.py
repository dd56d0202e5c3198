"""What a hosted model server says about its limits: when to send nothing, and when to give up.

    Cerebras    x-ratelimit-remaining-{requests,tokens}-{minute,hour,day}, x-ratelimit-reset-… in
                seconds, with every answer; 429 with `"code": "request_quota_exceeded"` or
                `"token_quota_exceeded"` for the minute as for the day, only the message tells
    OpenAI      x-ratelimit-remaining-{requests,tokens}, x-ratelimit-reset-… as `6m0s` or `120ms`,
                for the minute or the day; 429 with Retry-After and retry-after-ms, or with
                `"code": "insufficient_quota"` when there is no money left
    Azure       -1 remaining where there is no limit
    others      x-ratelimit-reset-… as Unix time, in seconds or milliseconds

A limit a minute or an hour is a pause. A limit a day, money, and any pause above an hour is a
quota: waiting for it would hold a machine for nothing. What cannot be understood is not there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any

__all__ = ["RateLimit", "read_limits"]

LONGEST_PAUSE_S = 3600.0
LONGEST_WAIT_S = 31 * 86400.0  # for a quota; a longer one is cut to this
_UNIX_TIME_FROM = 1e9  # seconds; a wait of 31 years is none
_UNIX_TIME_MS_FROM = 1e12
_QUOTED_CHARACTERS = 200

_REMAINING = "x-ratelimit-remaining-"
_UNITS_S = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
    "d": 86400.0,
}
_DURATION_PART = re.compile(r"(\d{1,15}(?:\.\d{0,15})?)(ns|us|µs|ms|s|m|h|d)")
_DURATION = re.compile(rf"(?:{_DURATION_PART.pattern}){{1,8}}")
_PER_DAY = re.compile(r"\bper[ -]day\b|\bdaily\b|\b[RT]PD\b", re.IGNORECASE)
_PER_TIME = re.compile(r"\b(request|token)s? per (min|hour|day)", re.IGNORECASE)
_NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached")


@dataclass(frozen=True, slots=True)
class RateLimit:
    """Nothing should be sent for `pause_s` seconds; `what` says on whose word, for a log line.

    With `is_quota_exhausted` nothing more can be had today, and `pause_s` is the time until it can,
    0 when that is unknown.
    """

    pause_s: float = 0.0
    is_quota_exhausted: bool = False
    what: str = ""

    @property
    def quota_exhausted_s(self) -> float | None:
        """The seconds until the quota comes back; None when unknown, or when there is quota."""
        return (self.pause_s or None) if self.is_quota_exhausted else None


_NO_LIMIT = RateLimit()


def read_limits(
    headers: Mapping[str, str], body_error: Mapping[str, Any] | None, status: int, now: float
) -> RateLimit:
    """Say what an answer tells about limits; it never raises.

    `headers` finds names in any case, as aiohttp's do. `body_error` is the `error` object of a
    refusal. `now` is Unix time; it counts only where the answer names a date and has no `Date`
    header, whose clock is the one that the date is meant by.
    """
    spent = [
        name
        for name in headers
        if name[: len(_REMAINING)].lower() == _REMAINING and _is_spent(headers, name)
    ]
    if not spent and status < 400:
        return _NO_LIMIT
    return _Answer(headers, body_error or {}, status, now).limit(spent)


def _is_spent(headers: Mapping[str, str], name: str) -> bool:
    remaining = _number(headers[name])
    if remaining is None or remaining >= 1:
        return False
    limit = _number(headers.get(_related(name, "limit"), ""))
    return limit is None or limit > 0  # 0 of 0, with an answer: there is no such limit


def _related(name: str, word: str) -> str:
    return name.lower().replace("remaining", word, 1)


class _Answer:
    def __init__(
        self, headers: Mapping[str, str], error: Mapping[str, Any], status: int, now: float
    ) -> None:
        self._headers = headers
        self._error = error
        self._status = status
        self._now = now

    def limit(self, spent: list[str]) -> RateLimit:
        message = str(self._error.get("message") or "")[:_QUOTED_CHARACTERS]
        no_money = any(self._error.get(key) in _NO_MONEY for key in ("code", "type"))
        if self._status == 402 or (self._status in (403, 429) and no_money):
            return RateLimit(0.0, True, message or f"HTTP {self._status}")
        asked_s = self._retry_after_s() if self._status in (429, 503) else None
        if self._status == 503 and asked_s is not None:
            # A server that is away is no quota; however long it means to be, it is asked again.
            return RateLimit(min(asked_s, LONGEST_PAUSE_S), False, "Retry-After of HTTP 503")
        of_day = [name for name in spent if "day" in name.lower()]
        if of_day:
            wait_s = max(self._reset_s(name) or 0.0 for name in of_day)
            return RateLimit(wait_s or asked_s or 0.0, True, f"{of_day[0].lower()} is 0")
        if self._status == 429 and _PER_DAY.search(message):
            return RateLimit(asked_s or self._named_reset_s(message), True, message)
        if asked_s is not None:
            return _pause(asked_s, message or "Retry-After")
        waits = [(self._reset_s(name) or 0.0, f"{name.lower()} is 0") for name in spent]
        if self._status == 429 and not waits:
            waits = [(self._named_reset_s(message), message)]
        return _pause(*max(waits)) if waits else _NO_LIMIT

    def _retry_after_s(self) -> float | None:
        """The wait a refusal asks for: `retry-after-ms`, or Retry-After in seconds or as a date."""
        in_ms = _number(self._headers.get("Retry-After-Ms"))
        if in_ms is not None:
            return min(in_ms / 1000, LONGEST_WAIT_S)
        text = self._headers.get("Retry-After")
        wait_s = _duration_s(text)
        if wait_s is None:
            date_s = _date_s(text)
            wait_s = None if date_s is None else date_s - self._server_time_s()
        return None if wait_s is None else self._bounded(wait_s)

    def _reset_s(self, name: str) -> float | None:
        wait_s = _duration_s(self._headers.get(_related(name, "reset")))
        return None if wait_s is None else self._bounded(wait_s)

    def _named_reset_s(self, message: str) -> float:
        """When a limit comes back that a request was too large for, although it is not spent."""
        named = _PER_TIME.search(message)
        if named is None:
            return 0.0
        kind = f"{_REMAINING}{named[1].lower()}s"
        period = {"min": "minute"}.get(named[2].lower(), named[2].lower())
        return self._reset_s(f"{kind}-{period}") or self._reset_s(kind) or 0.0

    def _bounded(self, wait_s: float) -> float:
        """Return the wait from 0 to LONGEST_WAIT_S, of a number that may be Unix time instead."""
        if wait_s >= _UNIX_TIME_FROM:
            scale = 1000 if wait_s >= _UNIX_TIME_MS_FROM else 1
            wait_s = wait_s / scale - self._server_time_s()
        return min(max(wait_s, 0.0), LONGEST_WAIT_S)

    def _server_time_s(self) -> float:
        date_s = _date_s(self._headers.get("Date"))
        return self._now if date_s is None else date_s


def _pause(wait_s: float, what: str) -> RateLimit:
    return RateLimit(wait_s, wait_s > LONGEST_PAUSE_S, what) if wait_s else _NO_LIMIT


def _number(text: str | None) -> float | None:
    """Return a number from 0 up; None for -1, NaN, infinity and what is none."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _duration_s(text: str | None) -> float | None:
    """Return `1.5`, `120ms` or `6m0s` in seconds, None for anything else."""
    value = _number(text)
    if value is None and text and _DURATION.fullmatch(text):
        parts = _DURATION_PART.findall(text)
        value = math.fsum(float(number) * _UNITS_S[unit] for number, unit in parts)
    return value


def _date_s(text: str | None) -> float | None:
    """Return an HTTP date as Unix time, None if it is none."""
    try:
        date = parsedate_to_datetime(text or "")
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
