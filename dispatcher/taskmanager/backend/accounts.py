"""What a worker counts of its requests to each model; heartbeats carry it to the server."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

from dispatcher.models import (
    LATENCY_BOUNDS_S,
    MAX_MODEL_NAME,
    MAX_MODELS,
    OTHER_MODELS,
    Histogram,
    ModelStats,
)

_MOST_TOKENS = 1 << 30
"""No request has so many: a larger number in an answer is nonsense, and would spoil the sums."""

_BUCKETS = len(LATENCY_BOUNDS_S) + 1


class Account:
    """The counts of one model. Plain numbers, because every request passes here."""

    __slots__ = (
        "_completion_tokens",
        "_errors",
        "_latencies",
        "_latency_s",
        "_overloads",
        "_prompt_tokens",
        "_requests",
        "_retried",
        "_ttft_s",
        "_ttfts",
    )

    def __init__(self) -> None:
        self._requests = self._errors = self._retried = self._overloads = 0
        self._prompt_tokens = self._completion_tokens = 0
        self._latencies, self._latency_s = [0] * _BUCKETS, 0.0
        self._ttfts, self._ttft_s = [0] * _BUCKETS, 0.0

    def note_answer(self, answer: dict[str, Any], latency_s: float, ttft_s: float | None) -> None:
        """Count an answered request: the tokens of its `usage`, if it has one, and its times."""
        self._requests += 1
        self._latencies[bisect_left(LATENCY_BOUNDS_S, latency_s)] += 1
        self._latency_s += latency_s
        if ttft_s is not None:
            self._ttfts[bisect_left(LATENCY_BOUNDS_S, ttft_s)] += 1
            self._ttft_s += ttft_s
        usage = answer.get("usage")
        if type(usage) is dict:
            # Endpoints put null and worse here. A bool is an int too, but no number of tokens.
            prompt = usage.get("prompt_tokens")
            if type(prompt) is int and 0 < prompt < _MOST_TOKENS:
                self._prompt_tokens += prompt
            completion = usage.get("completion_tokens")
            if type(completion) is int and 0 < completion < _MOST_TOKENS:
                self._completion_tokens += completion

    def note_error(self) -> None:
        """Count a request whose task gets an error instead of an answer."""
        self._errors += 1

    def note_retry(self) -> None:
        """Count a try that failed and is repeated."""
        self._retried += 1

    def note_overload(self) -> None:
        """Count a reply that said that there were too many requests."""
        self._overloads += 1

    def stats(self, in_flight: int, limit: int, restarts: int = 0) -> ModelStats:
        """Return the totals as they are now, beside what only the backend knows."""
        return ModelStats(
            requests=self._requests,
            errors=self._errors,
            retried=self._retried,
            overloads=self._overloads,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            in_flight=in_flight,
            limit=limit,
            restarts=restarts,
            ttft=_histogram(self._ttfts, self._ttft_s),
            latency=_histogram(self._latencies, self._latency_s),
        )


def for_heartbeat(accounts: Mapping[str, ModelStats]) -> dict[str, ModelStats]:
    """Return what the server takes: MAX_MODELS models at most, with names of bounded length.

    Tasks may name any model. A heartbeat must not be refused for it, as the worker would be
    believed dead: names are cut and made printable, and what is too much is added up as "other".
    """
    bounded: dict[str, ModelStats] = {}
    for name, stats in accounts.items():
        shown = "".join(c if c.isprintable() else "?" for c in name[:MAX_MODEL_NAME])
        if shown not in bounded and len(bounded) >= MAX_MODELS - 1:
            shown = OTHER_MODELS
        bounded.setdefault(shown or OTHER_MODELS, ModelStats()).add(stats)
    return bounded


def _histogram(counts: list[int], total_s: float) -> Histogram:
    return Histogram(counts.copy(), total_s) if any(counts) else Histogram()
