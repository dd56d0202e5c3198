"""GET /metrics: the run's figures for Prometheus, read from the queue at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from dispatcher.models import LATENCY_BOUNDS_S, Histogram, ModelStats
from dispatcher.service import DispatchService


class RunCollector(Collector):
    """Turns the service's state into metric families; keeps no numbers of its own."""

    def __init__(self, service: DispatchService, connections: int) -> None:
        self._service = service
        self._connections = connections

    def collect(self) -> Iterable[Metric]:
        """Return the metrics as they are now."""
        queue, status = self._service.queue, self._service.status()
        done = CounterMetricFamily(
            "dispatcher_items", "Items with their line of output, by result.", labels=["result"]
        )
        done.add_metric(["ok"], status["done"] - status["failed"])
        done.add_metric(["error"], status["failed"])
        yield done
        ended = CounterMetricFamily(
            "dispatcher_leases_ended", "Leases that ended without a result.", labels=["kind"]
        )
        for kind in ("charged", "crashed", "released", "returned"):
            ended.add_metric([kind], status[kind])
        yield ended
        yield CounterMetricFamily(
            "dispatcher_tokens_completion",
            "Tokens generated since this server started, as reported by workers.",
            status["completion_tokens"],
        )
        yield CounterMetricFamily(
            "dispatcher_steps_recorded", "Answered requests that were recorded.", status["steps"]
        )
        yield CounterMetricFamily(
            "dispatcher_step_mismatches",
            "Times a task asked something else than was recorded.",
            status["step_mismatches"],
        )
        yield CounterMetricFamily(
            "dispatcher_slow_steps",
            "Stretches of task code between two requests that held others up.",
            status["slow_steps"],
        )
        gauges = {
            "dispatcher_steps_bytes": (
                "Bytes of the recorded steps of unfinished items.",
                status["step_bytes"],
            ),
            "dispatcher_items_leased": ("Leases that are live.", len(queue.leases)),
            "dispatcher_items_ready": ("Items waiting to be handed out again.", queue.ready_count),
            "dispatcher_results_waiting": (
                "Results waiting behind an open line.",
                queue.waiting_count,
            ),
            "dispatcher_workers": ("Workers that are alive.", status["workers"]),
            "dispatcher_connections": ("Connections that are open.", self._connections),
            "dispatcher_longest_step_seconds": (
                "The longest stretch of task code between two requests.",
                status["longest_step_s"],
            ),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value)
        yield from _model_metrics(self._service.reported().models)


_MODEL_COUNTERS: dict[str, tuple[str, Callable[[ModelStats], int]]] = {
    "requests": ("Requests that the model answered.", lambda of: of.requests),
    "errors": ("Requests whose task got an error instead of an answer.", lambda of: of.errors),
    "retries": ("Tries that failed and were repeated.", lambda of: of.retried),
    "overloads": ("Replies that said that there were too many requests.", lambda of: of.overloads),
    "engine_restarts": ("Times its engine was started again.", lambda of: of.restarts),
}
_MODEL_GAUGES: dict[str, tuple[str, Callable[[ModelStats], int]]] = {
    "requests_in_flight": ("Requests being answered.", lambda of: of.in_flight),
    "requests_limit": ("Requests that may be in flight at once.", lambda of: of.limit),
}
_MODEL_HISTOGRAMS: dict[str, tuple[str, Callable[[ModelStats], Histogram]]] = {
    "request_duration": ("From sending a request to its whole answer.", lambda of: of.latency),
    "time_to_first_token": ("From sending a request to its first token.", lambda of: of.ttft),
}
_BOUNDS = [*map(str, LATENCY_BOUNDS_S), "+Inf"]


def _model_metrics(models: dict[str, ModelStats]) -> Iterable[Metric]:
    """Return what the workers reported of each model, since this server started."""
    for name, (text, count) in _MODEL_COUNTERS.items():
        counter = CounterMetricFamily(f"dispatcher_model_{name}", text, labels=["model"])
        for model, stats in models.items():
            counter.add_metric([model], count(stats))
        yield counter
    tokens = CounterMetricFamily(
        "dispatcher_model_tokens", "Tokens read and generated.", labels=["model", "kind"]
    )
    for model, stats in models.items():
        tokens.add_metric([model, "prompt"], stats.prompt_tokens)
        tokens.add_metric([model, "completion"], stats.completion_tokens)
    yield tokens
    for name, (text, count) in _MODEL_GAUGES.items():
        gauge = GaugeMetricFamily(f"dispatcher_model_{name}", text, labels=["model"])
        for model, stats in models.items():
            gauge.add_metric([model], count(stats))
        yield gauge
    for name, (text, measured) in _MODEL_HISTOGRAMS.items():
        family = HistogramMetricFamily(
            f"dispatcher_model_{name}_seconds", text, labels=["model"], unit="seconds"
        )
        for model, stats in models.items():
            if (histogram := measured(stats)).counts:
                buckets = list(zip(_BOUNDS, accumulate(histogram.counts), strict=True))
                family.add_metric([model], buckets, histogram.total)
        yield family


def render_metrics(service: DispatchService, connections: int) -> tuple[bytes, str]:
    """Return the exposition and its content type."""
    registry = CollectorRegistry()
    registry.register(RunCollector(service, connections))
    return generate_latest(registry), CONTENT_TYPE_LATEST
