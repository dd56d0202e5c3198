"""What all workers of a run counted, added up: those that live and those that are gone."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from dispatcher.models import OTHER_MODELS, Histogram, ModelStats, WorkerStats

MAX_RUN_MODELS = 200
"""Models that a run tells apart; further ones are added up under the name OTHER_MODELS."""

_STATUS_QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
_SUMMARY_QUANTILES = {"p50": 0.5, "p95": 0.95}


class WorkerTotals:
    """The last word of every worker, and the sum of what those said that were forgotten.

    A worker tells its totals since it started, again and again, so the newest replace the older.
    """

    def __init__(self) -> None:
        self._by_worker: dict[str, WorkerStats] = {}
        self._departed = WorkerStats()
        self._models: set[str] = set()

    def note(self, worker: str, stats: WorkerStats) -> None:
        """Take a worker's totals in place of its earlier ones."""
        models: dict[str, ModelStats] = {}
        for name, counts in stats.models.items():
            models.setdefault(self._known(name), ModelStats()).add(counts)
        stats.models = models
        self._by_worker[worker] = stats

    def forget_all_but(self, present: Container[str]) -> None:
        """Keep the totals of the workers that are not among these, but not the workers."""
        for worker in [name for name in self._by_worker if name not in present]:
            _add(self._departed, self._by_worker.pop(worker), is_alive=False)

    @property
    def completion_tokens(self) -> int:
        """The tokens that all workers generated."""
        living = sum(stats.completion_tokens for stats in self._by_worker.values())
        return self._departed.completion_tokens + living

    def of(self, worker: str) -> WorkerStats | None:
        """Return the last word of a worker that was not forgotten."""
        return self._by_worker.get(worker)

    def total(self, alive: Container[str]) -> WorkerStats:
        """Return the sum over all workers; only those that are alive have requests in flight."""
        total = WorkerStats()
        _add(total, self._departed, is_alive=False)
        for worker, stats in self._by_worker.items():
            _add(total, stats, is_alive=worker in alive)
        return total

    def _known(self, name: str) -> str:
        """Return the name to count under: always the same one, as totals must not shrink."""
        if name not in self._models and len(self._models) >= MAX_RUN_MODELS:
            return OTHER_MODELS
        self._models.add(name)
        return name


def _add(total: WorkerStats, stats: WorkerStats, *, is_alive: bool) -> None:
    total.requests += stats.requests
    total.prompt_tokens += stats.prompt_tokens
    total.completion_tokens += stats.completion_tokens
    total.replayed += stats.replayed
    total.slow_steps += stats.slow_steps
    total.longest_step_s = max(total.longest_step_s, stats.longest_step_s)
    if is_alive:
        total.in_flight += stats.in_flight
    for name, counts in stats.models.items():
        sums = total.models.setdefault(name, ModelStats())
        if is_alive:
            sums.add(counts)
        else:
            sums.add_totals(counts)


def models_in_status(models: dict[str, ModelStats]) -> dict[str, Any]:
    """Return the models as `/status` has them: latencies in seconds, null where none was."""
    return {
        name: {
            **_counts(counts),
            "retried": counts.retried,
            "overloads": counts.overloads,
            "in_flight": counts.in_flight,
            "limit": counts.limit,
            "restarts": counts.restarts,
            "ttft_s": _seconds(counts.ttft, _STATUS_QUANTILES),
            "latency_s": _seconds(counts.latency, _STATUS_QUANTILES),
        }
        for name, counts in models.items()
    }


def models_in_summary(models: dict[str, ModelStats]) -> dict[str, Any]:
    """Return the models as the summary in run.yaml has them, without what was not measured."""
    found = {}
    for name, counts in models.items():
        found[name] = _counts(counts)
        for key, histogram in (("latency_s", counts.latency), ("ttft_s", counts.ttft)):
            if (seconds := _seconds(histogram, _SUMMARY_QUANTILES)) is not None:
                found[name][key] = seconds
    return found


def _counts(counts: ModelStats) -> dict[str, Any]:
    return {
        "requests": counts.requests,
        "errors": counts.errors,
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.completion_tokens,
    }


def _seconds(histogram: Histogram, quantiles: dict[str, float]) -> dict[str, float] | None:
    mean = histogram.mean
    if mean is None:
        return None
    found = {name: histogram.quantile(share) or 0.0 for name, share in quantiles.items()}
    return {name: float(f"{value:.3g}") for name, value in {**found, "mean": mean}.items()}
