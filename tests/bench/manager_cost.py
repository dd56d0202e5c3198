"""Task manager CPU a request: `python -m tests.bench.manager_cost`.

A worker of a server runs a task of one request a line, and one of three requests in turn (recorded
on the server), against `fakellm` with 0.2 s latency and 512 requests in flight. Beside each, in
turns, a plain aiohttp client asks the same against the same fakellm, with nothing around it; every
pair is printed, and the median of their ratios. The CPU time is that of the whole process, its
start included. Last, 4,096 requests in flight, and file mode, where journal and output are in the
measured process, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.measure import ROOT, started

_FAKELLM = ("dispatcher.fakellm", "--port", "0", "--latency-s", "0.2")
_PLAIN = "--plain"
_TASKS = {1: "examples/chat_task.py:ChatTask", 3: "tests.bench.steps_cost:RecordedTask"}


def child_cpu_seconds(arguments: list[str | Path]) -> float:
    """Run a Python module to its end; return the CPU time it used."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


async def plain(url: str, requests: int, in_flight: int) -> None:
    """Ask with nothing around it."""
    import aiohttp

    numbers = iter(range(requests))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def client() -> None:
            for number in numbers:
                content = {"model": "m", "messages": _messages(number), "max_tokens": 64}
                async with session.post(f"{url}/chat/completions", json=content) as reply:
                    json.loads(await reply.read())

        await asyncio.gather(*(client() for _ in range(in_flight)))


def _messages(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"question {number}"}]


class Bench:
    """One fakellm, and what is measured against it."""

    def __init__(self, directory: Path, url: str, requests: int) -> None:
        self._directory = directory
        self._url = url
        self._requests = requests
        self._runs = 0

    def plain_us(self, in_flight: int) -> float:
        """Return the microseconds a request of the plain client."""
        arguments: list[str | Path] = ["tests.bench.manager_cost", _PLAIN, self._url]
        arguments += ["--requests", str(self._requests), "--in-flight", str(in_flight)]
        return child_cpu_seconds(arguments) / self._requests * 1e6

    def worker_us(self, steps: int, in_flight: int) -> float:
        """Return the microseconds a request of a worker of a server."""
        infile, outfile = self._files(steps)
        files = ["--infile", infile, "--outfile", outfile, "--port", "0"]
        with started("dispatcher.server", *files, ready=r"at (http\S+)"):
            source: list[str | Path] = ["--dispatcher", f"@{outfile}.dispatch"]
            return self._manager_us(steps, in_flight, source)

    def file_mode_us(self, in_flight: int) -> float:
        """Return the microseconds a request of file mode."""
        infile, outfile = self._files(1)
        return self._manager_us(1, in_flight, ["--input", infile, "--output", outfile])

    def _manager_us(self, steps: int, in_flight: int, source: list[str | Path]) -> float:
        command: list[str | Path] = ["dispatcher.taskmanager.cli", "--task", _TASKS[steps]]
        command += ["--backend", "openai", "--model", "m", "--base-url", self._url]
        command += ["--workers", str(in_flight)]
        command += ["--task-arg", f"steps={steps}"] if steps > 1 else []
        return child_cpu_seconds([*command, *source]) / self._requests * 1e6

    def _files(self, steps: int) -> tuple[Path, Path]:
        self._runs += 1
        infile = self._directory / f"in{steps}.jsonl"
        lines = ({"id": n, "messages": _messages(n)} for n in range(self._requests // steps))
        infile.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return infile, self._directory / f"out{self._runs}.jsonl"


def compare(bench: Bench, steps: int, in_flight: int, pairs: int) -> None:
    """Measure and print pairs, and the median of their ratios."""
    ratios = []
    for number in range(pairs):
        if number % 2:
            ours = bench.worker_us(steps, in_flight)
            bare = bench.plain_us(in_flight)
        else:
            bare = bench.plain_us(in_flight)
            ours = bench.worker_us(steps, in_flight)
        ratios.append(ours / bare)
        print(f"  {ours:5.0f} us, plain {bare:5.0f} us: {ratios[-1]:.2f}", flush=True)
    what = f"{steps} request{'s in turn' if steps > 1 else ''} a line, {in_flight} in flight"
    print(f"{what}: median {statistics.median(ratios):.2f} times plain", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=15_000, help="requests a run")
    parser.add_argument("--in-flight", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument(_PLAIN, metavar="URL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain:
        import uvloop

        uvloop.run(plain(args.plain, args.requests, args.in_flight))
        return
    with (
        tempfile.TemporaryDirectory(prefix="dispatcher-bench-") as directory,
        started(*_FAKELLM, ready=r"ready at (http\S+)") as (_, url),
    ):
        bench = Bench(Path(directory), url, args.requests)
        for steps in _TASKS:
            compare(bench, steps, args.in_flight, args.pairs)
        compare(bench, 1, 4096, 1)
        print(f"file mode: {bench.file_mode_us(args.in_flight):.0f} us")


if __name__ == "__main__":
    main()
