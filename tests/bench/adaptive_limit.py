"""The adaptive limiter: `python -m tests.bench.adaptive_limit`.

The server is `fakellm`, whose time to the first token rises with its load and which answers 429
above 24 requests in flight. A plain aiohttp client tries fixed numbers of requests in flight;
its best one is then compared, in alternated pairs, with the real backend and its limiter, which
knows nothing of the server. Then the server answers 503 for a while: how long until the limiter
is back? Last, the server's own log of calls is held against the limits that the client had.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import tempfile
import time
from bisect import bisect_left, bisect_right
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from dispatcher.core.limiter import AdaptiveLimiter, LimiterPolicy
from dispatcher.taskmanager.backend.bodies import Sending
from dispatcher.taskmanager.backend.http import Endpoint
from dispatcher.taskmanager.backend.openai_compatible import OpenAICompatibleBackend
from dispatcher.taskmanager.backend.request import Request
from tests.bench.measure import started

MOST_IN_FLIGHT = 24
SERVER = ("dispatcher.fakellm", "--port", "0", "--latency-s", "0.1", "--max-words", "16")
LOADED = ("--ttft-per-request-s", "0.01", "--max-in-flight", str(MOST_IN_FLIGHT))
FIXED = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32)
POLICY = LimiterPolicy(min_concurrent=2, max_concurrent=64)
DIP_S = (15.0, 35.0)  # of the server's time
WARM_UP_S = 1.0  # of each measurement: the first requests start together
TRAVEL_S = 0.05  # from the moment a request is sent until the server has logged it

_number = itertools.count()


@contextmanager
def serving(*options: str | Path) -> Iterator[str]:
    """Run fakellm; yield its base URL."""
    with started(*SERVER, *options, ready=r"ready at (http\S+)") as (_, url):
        yield url


def content() -> dict[str, Any]:
    """Return a new question."""
    said = f"question {next(_number)}"
    return {"model": "m", "messages": [{"role": "user", "content": said}], "stream": True}


async def plain_rate(url: str, in_flight: int, run_s: float) -> float:
    """Return the answers a second of a loop around aiohttp; a refused request waits as told."""
    answered: list[float] = []
    begun = time.time()

    async def client(session: aiohttp.ClientSession) -> None:
        while time.time() < begun + run_s:
            async with session.post(f"{url}/chat/completions", json=content()) as reply:
                async for _ in reply.content:
                    pass
            if reply.status == 200:
                answered.append(time.time())
            else:
                await asyncio.sleep(float(reply.headers["Retry-After"]))

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(session) for _ in range(in_flight)))
    return rate(answered, begun + WARM_UP_S, begun + run_s)


class NotedLimiter(AdaptiveLimiter):
    """Keeps all limits it had, each with the time from which it held."""

    def __init__(self, policy: LimiterPolicy) -> None:
        self.limits: list[tuple[float, int]] = []
        super().__init__(policy)

    def __setattr__(self, name: str, value: object) -> None:
        if name == "limit":
            self.limits.append((time.time(), int(str(value))))
        super().__setattr__(name, value)

    def highest(self, since: float, until: float) -> int:
        """Return the highest limit that held at some time between the two."""
        first = bisect_right(self.limits, (since, 1 << 30)) - 1
        last = bisect_left(self.limits, (until, 0))
        return max(limit for _, limit in self.limits[max(0, first) : last])


@asynccontextmanager
async def adaptive(url: str, limiter: AdaptiveLimiter) -> AsyncIterator[OpenAICompatibleBackend]:
    """Yield the real backend with a limiter, streaming."""
    backend = OpenAICompatibleBackend(
        Endpoint(url, "m"), limiter=limiter, sending=Sending(stream=True)
    )
    await backend.start()
    try:
        yield backend
    finally:
        await backend.close()


async def drive(
    backend: OpenAICompatibleBackend, run_s: float, demand: int = 2 * POLICY.max_concurrent
) -> list[float]:
    """Ask for a while with more requests than may be in flight; return when each was answered."""
    answered: list[float] = []
    until = time.time() + run_s

    async def client() -> None:
        while time.time() < until:
            response = await backend.process(Request(content()))
            assert response.is_success, response.error
            answered.append(time.time())

    # Whoever waits at the end for its turn is not waited for.
    tasks = [asyncio.ensure_future(client()) for _ in range(demand)]
    _, late = await asyncio.wait(tasks, timeout=run_s)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    return answered


def rate(answered: list[float], since: float, until: float) -> float:
    """Return the answers a second between two times."""
    return sum(since <= at < until for at in answered) / (until - since)


async def best_fixed(url: str, fixed: tuple[int, ...], run_s: float) -> int:
    """Print what each fixed number of requests in flight brings; return the best."""
    rates = {}
    for in_flight in fixed:
        rates[in_flight] = await plain_rate(url, in_flight, run_s)
        print(f"{in_flight:5} in flight, fixed {rates[in_flight]:8.1f} answers/s", flush=True)
    return max(rates, key=lambda in_flight: rates[in_flight])


async def compare(url: str, backend: OpenAICompatibleBackend, fixed: int, args: Any) -> float:
    """Print alternated pairs; return the median of their ratios."""
    ratios = []
    for number in range(args.pairs):
        plain = await plain_rate(url, fixed, args.run_s)
        begun = time.time()
        answered = await drive(backend, args.run_s, 4 * max(fixed, backend.limit))
        ours = rate(answered, begun + WARM_UP_S, begun + args.run_s)
        ratios.append(ours / plain)
        print(
            f"pair {number + 1}: fixed at {fixed} {plain:7.1f}  ours {ours:7.1f} answers/s  "
            f"ratio {ratios[-1]:.3f}  limit {backend.limit}",
            flush=True,
        )
    median = statistics.median(ratios)
    print(f"median of {len(ratios)} ratios: {median:.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    return median


async def settle(log: Path, args: Any) -> None:
    """The first figure: throughput beside the best fixed one."""
    with serving(*LOADED) as url:
        fixed = await best_fixed(url, FIXED, args.run_s / 2)
        print(f"best fixed: {fixed}", flush=True)
    with serving(*LOADED, "--call-log", log) as url:
        limiter = NotedLimiter(POLICY)
        async with adaptive(url, limiter) as backend:
            await drive(backend, args.settle_s)
            await compare(url, backend, fixed, args)
        lowest = min(limit for _, limit in limiter.limits)
        print(f"limits {lowest} to {max(limit for _, limit in limiter.limits)}", flush=True)


async def dip(directory: Path, log: Path) -> None:
    """The second: how long after 503 for a while the throughput is back."""
    rules = directory / "rules.json"
    away = {"after_s": DIP_S[0], "until_s": DIP_S[1], "status": 503, "retry_after_s": 1}
    rules.write_text(json.dumps([away]))
    with serving(*LOADED, "--call-log", log, "--rules", rules) as url:
        begun = time.time()
        limiter = NotedLimiter(POLICY)
        async with adaptive(url, limiter) as backend:
            answered = await drive(backend, DIP_S[1] + 60)
        before = rate(answered, begun + 5, begun + DIP_S[0])
        ended = begun + DIP_S[1]
        # The end of the first whole second that is good again.
        tenths = (tenth / 10 for tenth in range(600))
        back = next(
            (t + 1 for t in tenths if rate(answered, ended + t, ended + t + 1) >= 0.8 * before),
            None,
        )
        lowest = min(limit for at, limit in limiter.limits if at > begun + DIP_S[0])
        print(
            f"503 for {DIP_S[1] - DIP_S[0]:.0f} s: {before:.1f} answers/s before, limit "
            f"{lowest} in it (its minimum is {POLICY.min_concurrent}), 0.8 of that throughput "
            + ("not within a minute" if back is None else f"{back:.1f} s after its end"),
            flush=True,
        )
        check_log(log, limiter)


def check_log(log: Path, limiter: NotedLimiter) -> None:
    """The third: print the calls that the server saw above the limit of their time."""
    open_calls = highest = calls = above = 0
    for line in log.read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "answer":
            open_calls -= 1
            continue
        open_calls += 1  # refused ones, too: they are in flight until the client knows
        calls += 1
        highest = max(highest, open_calls)
        above += open_calls > limiter.highest(event["t"] - TRAVEL_S, event["t"])
    print(
        f"call log: {calls} calls, at most {highest} in flight, {above} of them above the limit "
        f"of the {TRAVEL_S * 1000:.0f} ms before",
        flush=True,
    )


async def measure(directory: Path, args: Any) -> None:
    """Run and print all of it."""
    await settle(directory / "settle.jsonl", args)
    await dip(directory, directory / "dip.jsonl")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--run-s", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--settle-s", type=float, default=20.0, help="before the first pair")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dispatcher-bench-") as directory:
        uvloop.run(measure(Path(directory), args))


if __name__ == "__main__":
    main()
