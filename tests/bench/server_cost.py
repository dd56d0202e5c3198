"""Server CPU an item: `python -m tests.bench.server_cost`.

Starts `dispatcher-server` on a temporary file, lets connections take items and hand in results,
and prints the CPU time the server used an item (user and system, all threads), which a busy
machine changes less than the wall clock. Every acknowledgement waits for fdatasync, as always.
In the same run, a server that only decodes and encodes the same bodies (bare_server.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from pathlib import Path

import aiohttp

from tests.bench.measure import cpu_seconds, peak_mib, started

READY = r"at (http\S+)"
LINE = json.dumps({"messages": [{"role": "user", "content": "word " * 40}]})
_RESULT = json.dumps({"response": "word " * 40})


async def drain(url: str, connections: int, batch: int, *, want: bool) -> int:
    """Answer every item over `connections` connections; return how many there were."""
    answered = 0
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def client() -> None:
            nonlocal answered
            items: list[dict[str, object]] = []
            while True:
                if not items:
                    async with session.get(f"{url}/work?batch_size={batch}") as reply:
                        items = (await reply.json())["items"]
                    if not items:
                        return
                body = {"items": [{**item, "result": _RESULT} for item in items]}
                body |= {"want": batch} if want else {}
                async with session.post(f"{url}/results", json=body) as reply:
                    answer = await reply.json()
                assert answer["count"] == len(items)
                answered += len(items)
                items = answer["work"]["items"] if want else []

        await asyncio.gather(*(client() for _ in range(connections)))
    return answered


def measure(items: int, connections: int, batch: int, *, want: bool) -> None:
    """Run one setting on both servers and print their figures."""
    asked = f"batch {batch:3d}  connections {connections:3d}  want {'yes' if want else 'no ':3}"
    with started("tests.bench.bare_server", str(items), ready=READY) as (pid, url):
        bare_us = cost_us(pid, url, items, connections, batch, want=want)
    with tempfile.TemporaryDirectory(prefix="dispatcher-bench-") as directory:
        infile, outfile = Path(directory, "in.jsonl"), Path(directory, "out.jsonl")
        infile.write_text(f"{LINE}\n" * items)
        arguments = ["--infile", infile, "--outfile", outfile, "--port", "0", "--retry", "1"]
        with started("dispatcher.server", *arguments, ready=READY) as (pid, url):
            used_us = cost_us(pid, url, items, connections, batch, want=want)
            print(
                f"{asked}  {used_us:7.1f} us CPU an item  bare {bare_us:7.1f}"
                f"  ratio {used_us / bare_us:4.2f}  {peak_mib(pid):6.0f} MiB",
                flush=True,
            )


def cost_us(pid: int, url: str, items: int, connections: int, batch: int, *, want: bool) -> float:
    """Have every item answered; return the server's CPU microseconds an item."""
    before = cpu_seconds(pid)
    answered = asyncio.run(drain(url, connections, batch, want=want))
    assert answered == items
    return (cpu_seconds(pid) - before) / items * 1e6


def main() -> None:
    """Measure the settings that the project quotes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=20_000, help="items at batch 1")
    items = parser.parse_args().items
    for want in (False, True):
        measure(items, 64, 1, want=want)
        measure(items * 10, 16, 64, want=want)


if __name__ == "__main__":
    main()
