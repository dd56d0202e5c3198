"""What a scrape of /metrics every second costs: `python -m tests.bench.scrape_cost`.

The same items are answered twice, once with a scrape every second and once without, in pairs whose
order alternates, as the machine's speed drifts. Printed are the medians over the pairs of two
ratios, with to without: items a second, and CPU time of the server an item. The server is as busy
as the clients can make it; it knows 64 workers and 8 models with all their histograms.

On a machine with other work these ratios scatter. So each server is scraped many more times at the
end, when it has nothing else to do: CPU time of one scrape, as a share of the second between two,
is what a busy server loses to it.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import threading
import urllib.request
from pathlib import Path

import aiohttp
import msgspec

from dispatcher.models import LATENCY_BOUNDS_S, HeartbeatRequest, Histogram, ModelStats, WorkerStats
from tests.bench.measure import cpu_seconds
from tests.bench.server_cost import LINE, Cost, Setting, headers_for, measure, server

_SETTING = Setting(batch=64, connections=16, want=True, token=True)
_SPARE_LINES = 8192
_EVERY_S = 1.0
_WORKERS, _MODELS = 64, 8
_SCRAPES_ALONE = 100


class Scraper(threading.Thread):
    """Reads /metrics every second until `end`."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        super().__init__(daemon=True)
        self._request = urllib.request.Request(f"{url}/metrics", headers=headers)
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        self._ended = threading.Event()
        self.scrapes = 0

    def run(self) -> None:
        """Scrape."""
        while not self._ended.wait(_EVERY_S):
            self.scrape()
            self.scrapes += 1

    def scrape(self) -> None:
        """Scrape once."""
        with self._open(self._request, timeout=10) as reply:
            reply.read()

    def end(self) -> None:
        """Scrape no more."""
        self._ended.set()
        self.join()


async def report(url: str, headers: dict[str, str]) -> None:
    """Let the server know workers and models, so that there is much to expose."""
    times = Histogram([1] * (len(LATENCY_BOUNDS_S) + 1), 10.0)
    stats = ModelStats(*(5,) * 9, times, times)
    models = {f"model-{number}": stats for number in range(_MODELS)}
    async with aiohttp.ClientSession(headers=headers) as session:
        for number in range(_WORKERS):
            beat = HeartbeatRequest(f"worker-{number}", {}, stats=WorkerStats(models=models))
            body = msgspec.to_builtins(beat)
            async with session.post(f"{url}/heartbeat", json=body) as reply:
                reply.raise_for_status()


def cost(items: int, *, scraped: bool) -> tuple[Cost, int, float]:
    """Return what a server needed, how often it was scraped, and CPU seconds of one scrape."""
    with tempfile.TemporaryDirectory(prefix="dispatcher-bench-") as name:
        directory = Path(name)
        (directory / "in.jsonl").write_text(f"{LINE}\n" * (items + _SPARE_LINES))
        with server(directory, _SETTING, kill=True) as (pid, url):
            headers = headers_for(directory, _SETTING)
            asyncio.run(report(url, headers))
            scraper = Scraper(url, headers)
            if scraped:
                scraper.start()
            found = measure(url, pid, _SETTING, items, headers)
            if scraped:
                scraper.end()
            before = cpu_seconds(pid)
            for _ in range(_SCRAPES_ALONE):
                scraper.scrape()
            return found, scraper.scrapes, (cpu_seconds(pid) - before) / _SCRAPES_ALONE


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=100_000, help="items a measurement")
    parser.add_argument("--pairs", type=int, default=5, help="measurements of each kind")
    args = parser.parse_args()
    rates, cpus, alone = [], [], []
    print("pair  items/s without, with  us/item without, with  scrapes")
    for pair in range(args.pairs):
        found: dict[bool, tuple[Cost, int, float]] = {}
        for scraped in (False, True) if pair % 2 else (True, False):
            found[scraped] = cost(args.items, scraped=scraped)
        (plain, _, first), (loaded, scrapes, second) = found[False], found[True]
        alone += [first, second]
        rates.append((loaded.items / loaded.wall_s) / (plain.items / plain.wall_s))
        cpus.append(loaded.us / plain.us)
        print(
            f"{pair:4} {plain.items / plain.wall_s:15.0f} {loaded.items / loaded.wall_s:7.0f}"
            f" {plain.us:15.1f} {loaded.us:7.1f} {scrapes:8}",
            flush=True,
        )
    print(
        f"with a scrape every second: {statistics.median(rates):.3f} times the items a second, "
        f"{statistics.median(cpus):.3f} times the CPU time an item (medians); a scrape takes "
        f"{statistics.median(alone) * 1000:.1f} ms of CPU, "
        f"{statistics.median(alone) / _EVERY_S:.2%} of the second between two"
    )


if __name__ == "__main__":
    main()
