"""`--workers auto` beside fixed numbers of workers: `python -m tests.bench.auto_workers`.

The engine is `fakellm` that works on K requests at a time while the others wait, and says so at
/metrics as vLLM does. A plain aiohttp client tries fixed numbers of requests in flight; its best
one is compared, in alternated pairs, with the real backend that follows the metrics and does not
know K. Last, what it costs to read a page as long as a real one.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import uvloop
from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dispatcher.core.saturation import Saturation
from dispatcher.taskmanager.backend.bodies import Sending
from dispatcher.taskmanager.backend.engine_metrics import engine_load
from dispatcher.taskmanager.backend.http import Endpoint
from dispatcher.taskmanager.backend.openai_compatible import OpenAICompatibleBackend
from tests.bench.adaptive_limit import best_fixed, compare, drive
from tests.bench.measure import started

SERVER = ("dispatcher.fakellm", "--port", "0", "--max-words", "16")
LATENCY = ("--latency-s", "0.4", "--latency-jitter-s", "0.2")
METRICS_OF_ENGINE = 12
HISTOGRAMS = 20  # of 22 lines each: together the lines of a page of vLLM 0.32


async def measure(capacity: int, args: Any) -> None:
    """Print the figures for one engine."""
    options = (*LATENCY, "--capacity", str(capacity))
    with started(*SERVER, *options, ready=r"ready at (http\S+)") as (_, url):
        print(f"an engine of {capacity} places", flush=True)
        tried = sorted({capacity * part // 4 for part in (1, 2, 3, 4, 5, 6, 8)})
        fixed = await best_fixed(url, tuple(tried), args.run_s / 2)
        backend = OpenAICompatibleBackend(
            Endpoint(url, "m"), saturation=Saturation(), sending=Sending(stream=True)
        )
        await backend.start()
        try:
            await drive(backend, args.settle_s, demand=4 * capacity)
            await compare(url, backend, fixed, args)
        finally:
            await backend.close()


def page() -> str:
    """Return a page of about 500 lines."""
    registry = CollectorRegistry()
    labels = ["model_name", "engine"]
    names = ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"]
    names += [f"other_{number}" for number in range(METRICS_OF_ENGINE - len(names))]
    for name in names:
        Gauge(f"vllm:{name}", "What it is.", labels, registry=registry).labels("m", "0").set(3)
    for number in range(HISTOGRAMS):
        buckets = [float(2**power) for power in range(18)]
        histogram = Histogram(
            f"vllm:seconds_{number}", "What it is.", labels, registry=registry, buckets=buckets
        )
        histogram.labels("m", "0").observe(7)
    return generate_latest(registry).decode()


def reading() -> None:
    """Print the time to read one page, here and with prometheus_client."""
    text = page()
    for name, read in (
        ("engine_metrics", engine_load),
        ("prometheus_client", lambda text: list(text_string_to_metric_families(text))),
    ):
        times = []
        for _ in range(21):
            begun = time.process_time()
            read(text)
            times.append(time.process_time() - begun)
        median_us = sorted(times)[10] * 1e6
        print(f"{len(text.splitlines())} lines read by {name:18} {median_us:8.0f} us")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--run-s", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--settle-s", type=float, default=12.0, help="before the first pair")
    parser.add_argument("--capacities", type=int, nargs="+", default=[10, 48, 200])
    args = parser.parse_args()
    for capacity in args.capacities:
        uvloop.run(measure(capacity, args))
    reading()


if __name__ == "__main__":
    main()
