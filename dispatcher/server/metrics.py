"""GET /metrics: the run's figures for Prometheus, read from the queue at each scrape."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

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
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value)


def render_metrics(service: DispatchService, connections: int) -> tuple[bytes, str]:
    """Return the exposition and its content type."""
    registry = CollectorRegistry()
    registry.register(RunCollector(service, connections))
    return generate_latest(registry), CONTENT_TYPE_LATEST
