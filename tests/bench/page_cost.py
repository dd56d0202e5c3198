"""What an open page costs the server: `python -m tests.bench.page_cost`.

The calls are those that the page makes, as it makes them: `GET /overview?since=NEXT` two seconds
after the last reply. The same items are answered with and without it, in pairs whose order
alternates, as the machine's speed drifts; printed are the medians over the pairs of two ratios,
with to without: items a second, and CPU time of the server an item. The server knows 64 workers
and 8 models, and 50 lines of it have failed.

On a machine with other work these ratios scatter. So each server is looked at many more times at
the end, when it has nothing else to do: CPU time of one look, as a share of the interval between
two, is what a busy server loses to an open page. A look of which nothing is reused is what is
measured there; `--pages` of them at once share most of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import aiohttp

from dispatcher.server.overview import PAGE_LOOKS_EVERY_S, REUSED_FOR_S
from tests.bench.measure import cpu_seconds
from tests.bench.scrape_cost import report
from tests.bench.server_cost import LINE, Cost, Setting, headers_for, measure, server

_SETTING = Setting(batch=64, connections=16, want=True, token=True)
_SPARE_LINES = 8192
_EVERY_S = PAGE_LOOKS_EVERY_S
_FAILED_LINES = 50


class OpenPage(threading.Thread):
    """Looks as a page does, every two seconds, until `end`."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._headers = headers
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        self._ended = threading.Event()
        self._next = ""
        self.looks = 0
        self.reply_bytes = 0

    def run(self) -> None:
        """Look."""
        while not self._ended.wait(_EVERY_S):
            self.look()

    def look(self) -> None:
        """Look once."""
        since = f"?since={self._next}" if self._next else ""
        request = urllib.request.Request(f"{self._url}/overview{since}", headers=self._headers)
        with self._open(request, timeout=10) as reply:
            body = reply.read()
        self._next = json.loads(body)["next"]
        self.looks += 1
        self.reply_bytes = len(body)

    def end(self) -> None:
        """Look no more."""
        self._ended.set()
        self.join()


async def fail_lines(url: str, headers: dict[str, str]) -> None:
    """Let the first lines fail, so that there is something to list."""
    failed = json.dumps({"__ERROR__": {"error": "bad_answer", "message": "it is no good " * 8}})
    async with aiohttp.ClientSession(headers=headers) as session:
        async with session.get(f"{url}/work?batch_size={_FAILED_LINES}") as reply:
            items = (await reply.json())["items"]
        body = {"items": [{**item, "result": failed} for item in items]}
        async with session.post(f"{url}/results", json=body) as reply:
            reply.raise_for_status()


def cost(items: int, pages: int, looks_alone: int) -> tuple[Cost, int, float, int]:
    """Return what a server needed, looks meanwhile, CPU seconds of a look, bytes of its reply."""
    with tempfile.TemporaryDirectory(prefix="dispatcher-bench-") as name:
        directory = Path(name)
        (directory / "in.jsonl").write_text(f"{LINE}\n" * (items + _SPARE_LINES))
        with server(directory, _SETTING, kill=True) as (pid, url):
            headers = headers_for(directory, _SETTING)
            asyncio.run(report(url, headers))
            asyncio.run(fail_lines(url, headers))
            opened = [OpenPage(url, headers) for _ in range(pages)]
            for page in opened:
                page.start()
            found = measure(url, pid, _SETTING, items, headers)
            for page in opened:
                page.end()
            looks = sum(page.looks for page in opened)
            alone = OpenPage(url, headers)
            alone.look()
            return found, looks, _cpu_of_a_look(alone, pid, looks_alone), alone.reply_bytes


def _cpu_of_a_look(page: OpenPage, pid: int, count: int) -> float:
    """Return CPU seconds of a look of which nothing is reused, less what an idle server needs."""
    span_s = count * (REUSED_FOR_S + 0.05)
    before = cpu_seconds(pid)
    time.sleep(span_s)
    idle_s = cpu_seconds(pid) - before
    before, began = cpu_seconds(pid), time.monotonic()
    for _ in range(count):
        page.look()
        time.sleep(REUSED_FOR_S + 0.05)
    took_s = time.monotonic() - began
    return (cpu_seconds(pid) - before - idle_s * took_s / span_s) / count


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=1_500_000, help="items a measurement")
    parser.add_argument("--pairs", type=int, default=5, help="measurements of each kind")
    parser.add_argument("--pages", type=int, default=1, help="pages open at once")
    parser.add_argument("--looks", type=int, default=40, help="looks at a server without work")
    args = parser.parse_args()
    rates, cpus, alone = [], [], []
    print("pair  items/s without, with  us/item without, with  looks  bytes a look")
    for pair in range(args.pairs):
        found: dict[int, tuple[Cost, int, float, int]] = {}
        for pages in (0, args.pages) if pair % 2 else (args.pages, 0):
            found[pages] = cost(args.items, pages, args.looks)
        (plain, _, first, _), (loaded, looks, second, size) = found[0], found[args.pages]
        alone += [first, second]
        rates.append((loaded.items / loaded.wall_s) / (plain.items / plain.wall_s))
        cpus.append(loaded.us / plain.us)
        print(
            f"{pair:4} {plain.items / plain.wall_s:15.0f} {loaded.items / loaded.wall_s:7.0f}"
            f" {plain.us:15.1f} {loaded.us:7.1f} {looks:6} {size:13}",
            flush=True,
        )
    print(
        f"with {args.pages} open: {statistics.median(rates):.3f} times the items a second, "
        f"{statistics.median(cpus):.3f} times the CPU time an item (medians); a look takes "
        f"{statistics.median(alone) * 1000:.1f} ms of CPU, "
        f"{statistics.median(alone) / _EVERY_S:.2%} of the {_EVERY_S:g} s between two"
    )


if __name__ == "__main__":
    main()
