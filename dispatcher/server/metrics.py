"""GET /metrics: the run's figures for Prometheus, read from the queue at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from dispatcher import __version__
from dispatcher.core.buckets import Buckets
from dispatcher.models import LATENCY_BOUNDS_S, Histogram, ModelStats
from dispatcher.service import DispatchService


class RunCollector(Collector):
    """Turns the service's state into metric families; keeps no numbers of its own.

    No worker, line or client is a label: there may be any number of them.
    """

    def __init__(
        self, service: DispatchService, connections: int, call_times: dict[str, Buckets]
    ) -> None:
        self._service = service
        self._connections = connections
        self._call_times = call_times

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
        yield from self._run_metrics(status)
        yield from self._batch_metrics()
        yield from self._journal_metrics()
        yield from _model_metrics(self._service.reported().models)

    def _run_metrics(self, status: dict[str, Any]) -> Iterable[Metric]:
        run = {"run": self._service.run_id, "version": __version__}
        yield InfoMetricFamily("dispatcher_run", "The run that this server serves.", run)
        yield CounterMetricFamily(
            "dispatcher_items_read", "Lines read of the input.", status["next_work_id"]
        )
        yield CounterMetricFamily(
            "dispatcher_items_written", "Lines written into the output.", status["written"]
        )
        yield GaugeMetricFamily(
            "dispatcher_items_expected",
            "Lines of the input; an estimate until all were read.",
            status["total"],
        )
        errors = GaugeMetricFamily(
            "dispatcher_error_lines",
            "Lines whose result is an error; fewer when a late result replaces one.",
            labels=["kind"],
        )
        for kind, count in status["errors"].items():
            errors.add_metric([kind], count)
        yield errors
        results = CounterMetricFamily(
            "dispatcher_results_unused",
            "Results handed in to this server that were not taken.",
            labels=["reason"],
        )
        for reason in ("duplicate", "invalid"):
            results.add_metric([reason], status[f"{reason}_results"])
        yield results
        yield CounterMetricFamily(
            "dispatcher_results_spooled",
            "Results that this server found in the spool.",
            status["spooled_results"],
        )
        alive = [w for w in self._service.queue.workers.values() if w.vanished_at is None]
        backends = GaugeMetricFamily(
            "dispatcher_worker_backends",
            "Workers that are alive, by the state of their model server.",
            labels=["state"],
        )
        up = sum(worker.backend_up for worker in alive)
        backends.add_metric(["up"], up)
        backends.add_metric(["down"], len(alive) - up)
        yield backends
        paused_by = (status["paused"] or {}).get("by", ())
        paused = GaugeMetricFamily(
            "dispatcher_run_paused",
            "1 while nothing is handed out, as the failure limit or an operator said.",
            labels=["by"],
        )
        for who in ("failures", "operator"):
            paused.add_metric([who], float(who in paused_by))
        yield paused
        yield GaugeMetricFamily(
            "dispatcher_output_paused",
            "1 while the output cannot be written, and results are kept in the journal.",
            float(status["output_error"] is not None),
        )

    def _batch_metrics(self) -> Iterable[Metric]:
        calls = HistogramMetricFamily(
            "dispatcher_call_duration_seconds",
            "From a call's head to its reply; of /work, with the time it waited for work.",
            labels=["call"],
            unit="seconds",
        )
        for path, times in self._call_times.items():
            calls.add_metric([path[1:]], times.cumulative(), times.total)
        yield calls
        service = self._service
        yield _histogram(
            "dispatcher_work_batch_items", "Lines handed out in a reply.", service.items_handed_out
        )
        yield _histogram(
            "dispatcher_result_batch_items", "Results handed in at once.", service.results_taken
        )

    def _journal_metrics(self) -> Iterable[Metric]:
        writer = self._service.writer
        if writer is None:
            return
        yield _histogram(
            "dispatcher_journal_sync_duration_seconds",
            "From writing a commit to the journal until it is on disk.",
            writer.sync_seconds,
        )
        yield _histogram(
            "dispatcher_journal_commit_size_bytes",
            "What was made durable at once.",
            writer.commit_bytes,
        )
        yield GaugeMetricFamily(
            "dispatcher_journal_segment_bytes",
            "The size of the journal's segment that is being written.",
            writer.journal_bytes,
        )
        yield GaugeMetricFamily(
            "dispatcher_output_unsynced_bytes",
            "What was appended to the output since it was last synced.",
            writer.output.unsynced_bytes,
        )


def _histogram(name: str, text: str, buckets: Buckets) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, text)
    family.add_metric([], buckets.cumulative(), buckets.total)
    return family


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


def render_metrics(
    service: DispatchService, connections: int, call_times: dict[str, Buckets]
) -> tuple[bytes, str]:
    """Return the exposition and its content type."""
    registry = CollectorRegistry()
    registry.register(RunCollector(service, connections, call_times))
    ProcessCollector(registry=registry)
    return generate_latest(registry), CONTENT_TYPE_LATEST
