"""What the server costs: `python -m tests.bench.server_cost`.

For batch 1, 8 and 64 over 1, 16 and 64 connections, with and without `want`, with and without a
token: items a second, CPU microseconds an item (user and system, all threads, which a busy
machine changes less than the wall clock), peak memory, and the seconds from a start after
`kill -9` to the first item handed out. Every acknowledgement waits for fdatasync, as always.
Beside each, in the same run, a server that only decodes and encodes the same bodies
(bare_server.py), and how many times its CPU time ours takes.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from dispatcher.server_file import read_server_file, server_file_in
from tests.bench.measure import cpu_seconds, peak_mib, started

READY = r"at (http\S+)"
LINE = json.dumps({"messages": [{"role": "user", "content": "word " * 40}]})
_RESULT = json.dumps({"response": "word " * 40})
_SPARE_LINES = 8192
"""More than the clients can hold: what a restarted server has left to hand out."""


@dataclass(frozen=True)
class Setting:
    """How the clients ask."""

    batch: int
    connections: int
    want: bool
    token: bool

    @property
    def is_quoted(self) -> bool:
        """Whether the project quotes this setting."""
        return self.want and (self.batch, self.connections) in ((1, 64), (64, 16))

    def __str__(self) -> str:
        words = ("want" if self.want else "    ", "token" if self.token else "     ")
        return f"{self.batch:5} {self.connections:5} {words[0]} {words[1]}"


@dataclass(frozen=True)
class Cost:
    """What a server needed for `items` items."""

    items: int
    wall_s: float
    cpu_s: float
    peak_mib: float

    @property
    def us(self) -> float:
        """CPU microseconds an item."""
        return self.cpu_s / self.items * 1e6


async def answer(url: str, setting: Setting, items: int, headers: dict[str, str]) -> int:
    """Answer at least `items` items over the setting's connections; return how many it were."""
    answered = 0
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:

        async def client() -> None:
            nonlocal answered
            held: list[dict[str, object]] = []
            while answered < items:
                if not held:
                    async with session.get(f"{url}/work?batch_size={setting.batch}") as reply:
                        held = (await reply.json())["items"]
                    if not held:
                        return
                body = {"items": [{**item, "result": _RESULT} for item in held]}
                body |= {"want": setting.batch} if setting.want else {}
                async with session.post(f"{url}/results", json=body) as reply:
                    said = await reply.json()
                assert said["count"] == len(held)
                answered += len(held)
                held = said["work"]["items"] if setting.want else []

        await asyncio.gather(*(client() for _ in range(setting.connections)))
    return answered


def measure(url: str, pid: int, setting: Setting, items: int, headers: dict[str, str]) -> Cost:
    """Have items answered by the server `pid` and return what it took."""
    before, began = cpu_seconds(pid), time.perf_counter()
    answered = asyncio.run(answer(url, setting, items, headers))
    wall_s = time.perf_counter() - began
    return Cost(answered, wall_s, cpu_seconds(pid) - before, peak_mib(pid))


def bare_cost(setting: Setting, items: int) -> Cost:
    """Measure the server that does nothing else."""
    with started("tests.bench.bare_server", str(items + _SPARE_LINES), ready=READY) as (pid, url):
        return measure(url, pid, setting, items, {})


@contextmanager
def server(directory: Path, setting: Setting, *, kill: bool) -> Iterator[tuple[int, str]]:
    """Run a server on the directory's input; yield its process id and URL."""
    files = ["--infile", directory / "in.jsonl", "--outfile", directory / "out.jsonl"]
    flags = ["--port", "0", "--retry", "1", *([] if setting.token else ["--no-auth"])]
    with started("dispatcher.server", *files, *flags, ready=READY, kill=kill) as running:
        yield running


def headers_for(directory: Path, setting: Setting) -> dict[str, str]:
    """Return the header with the run's token, if the setting wants one."""
    if not setting.token:
        return {}
    token = read_server_file(server_file_in(directory / "out.jsonl.dispatch")).token
    return {"Authorization": f"Bearer {token}"}


def our_cost(setting: Setting, items: int) -> tuple[Cost, float]:
    """Measure the real server; return also the seconds of a restart to the first item."""
    with tempfile.TemporaryDirectory(prefix="dispatcher-bench-") as name:
        directory = Path(name)
        (directory / "in.jsonl").write_text(f"{LINE}\n" * (items + _SPARE_LINES))
        with server(directory, setting, kill=True) as (pid, url):
            cost = measure(url, pid, setting, items, headers_for(directory, setting))
        began = time.perf_counter()
        with server(directory, setting, kill=True) as (_, url):
            asyncio.run(first_item(url, headers_for(directory, setting)))
            return cost, time.perf_counter() - began


async def first_item(url: str, headers: dict[str, str]) -> int:
    """Return the work id of the first item that the server hands out."""
    async with aiohttp.ClientSession(headers=headers) as session:
        while True:
            async with session.get(f"{url}/work?batch_size=1") as reply:
                if items := (await reply.json())["items"]:
                    return int(items[0]["work_id"])
            await asyncio.sleep(0.01)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=4000, help="items at batch 1")
    parser.add_argument("--quoted", action="store_true", help="only the settings quoted in notes")
    args = parser.parse_args()
    print("batch conns want token    items/s  us/item   bare  ratio  peak MiB  restart s")
    for batch, connections, want, token in itertools.product(
        (1, 8, 64), (1, 16, 64), (True, False), (True, False)
    ):
        setting = Setting(batch, connections, want, token)
        if args.quoted and not setting.is_quoted:
            continue
        items = args.items * {1: 1, 8: 4, 64: 16}[batch]
        bare = bare_cost(setting, items)
        ours, restart_s = our_cost(setting, items)
        print(
            f"{setting} {ours.items / ours.wall_s:10.0f} {ours.us:8.1f} {bare.us:6.1f}"
            f" {ours.us / bare.us:6.2f} {ours.peak_mib:9.0f} {restart_s:10.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
