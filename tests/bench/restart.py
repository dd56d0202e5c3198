"""Restarts of very large runs: `python -m tests.bench.restart`.

Two runs as `kill -9` leaves them: a million results of 1 KB that wait behind one unfinished line,
and ten million short lines that are done. Prints the seconds from the start of the server to the
first item handed out, and its peak memory; for the first, that nothing acknowledged is missing
once the line is answered.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

import aiohttp

from dispatcher.config import RunSettings
from dispatcher.core.work_queue import WorkQueue
from dispatcher.server_file import read_server_file, server_file_in
from dispatcher.storage.files import Files
from dispatcher.storage.opening import open_run
from dispatcher.storage.run_state import make_state_dir
from dispatcher.storage.writer import Batch, RunWriter
from tests.bench.measure import peak_mib, started
from tests.bench.server_cost import READY, first_item
from tests.support.queues import arrivals

_BATCH = 2048
_SPARE_LINES = 1000
_LINE = '{"id": 1}\n'


def write_batch(queue: WorkQueue, writer: RunWriter, *, sync: bool = False) -> None:
    """Write what the queue decided, as the service does."""
    batch = Batch()
    for event in queue.take_events():
        batch.add(event)
    batch.prefix = queue.first_open
    queue.note_written(batch.prefix)
    if writer.segment_is_full:
        batch.state = queue.checkpoint()
    batch.sync_output = sync or batch.state is not None
    writer.write(batch)


def make_run(settings: RunSettings, lines: int, result: bytes, *, stuck: bool) -> None:
    """Answer `lines` lines, all but the first if `stuck`, and let go without any goodbye."""
    make_state_dir(settings.state_dir, Files())
    run = open_run(settings, Files(), 1, 0.0)
    queue, writer = run.queue, run.writer
    if stuck:
        queue.open_lines(0, [len(_LINE)])
        queue.lease_ready("", 1, 0.0)
    while queue.next_work_id < lines:
        queue.open_lines(queue.next_offset, [len(_LINE)] * min(_BATCH, lines - queue.next_work_id))
        grants = queue.lease_ready("", _BATCH, 0.0)
        came = [(grant.work_id, None, result, "") for grant in grants]
        queue.finish_all(arrivals(*came), 1.0)
        write_batch(queue, writer)
    while writer.output.written < queue.first_open:
        write_batch(queue, writer)
    write_batch(queue, writer, sync=True)
    writer.close()
    run.source.close()


async def finish(url: str, headers: dict[str, str], lines: int, result: str) -> None:
    """Answer line 0 and wait until every line that waited for it is written."""
    async with aiohttp.ClientSession(headers=headers) as session:
        body = {"items": [{"work_id": 0, "result": result}]}
        async with session.post(f"{url}/results", json=body) as reply:
            assert (await reply.json())["outcomes"] == ["accepted"]
        while True:
            async with session.get(f"{url}/status") as reply:
                if (await reply.json())["written"] >= lines:
                    return
            await asyncio.sleep(0.1)


def measure(name: str, lines: int, result_bytes: int, *, stuck: bool) -> None:
    """Make a run, start a server on it, and print how that went."""
    result = '{"r":"' + "x" * (result_bytes - 8) + '"}'
    with tempfile.TemporaryDirectory(prefix="dispatcher-bench-") as temporary:
        directory = Path(temporary)
        infile, outfile = directory / "in.jsonl", directory / "out.jsonl"
        with infile.open("w") as file:
            file.writelines(_LINE for _ in range(lines + _SPARE_LINES))
        settings = RunSettings(infile, outfile, directory / "state")
        make_run(settings, lines, result.encode(), stuck=stuck)
        began = time.perf_counter()
        flags = ["--infile", infile, "--outfile", outfile, "--state", settings.state_dir]
        with started("dispatcher.server", *flags, "--port", "0", ready=READY, kill=True) as (
            pid,
            url,
        ):
            token = read_server_file(server_file_in(settings.state_dir)).token
            headers = {"Authorization": f"Bearer {token}"}
            first = asyncio.run(first_item(url, headers))
            print(
                f"{name}: item {first} after {time.perf_counter() - began:.2f} s, "
                f"{peak_mib(pid):.0f} MiB",
                flush=True,
            )
            if stuck:
                asyncio.run(finish(url, headers, lines, result))
                print(f"  all written, peak {peak_mib(pid):.0f} MiB", flush=True)
        count = sum(1 for _ in outfile.open("rb"))
        print(f"  {count} lines of output", flush=True)
        assert count >= lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--waiting", type=int, default=1_000_000, help="results that wait")
    parser.add_argument("--short", type=int, default=10_000_000, help="short lines")
    args = parser.parse_args()
    measure(f"{args.waiting} results of 1 KB behind line 0", args.waiting, 1024, stuck=True)
    measure(f"{args.short} short lines", args.short, 16, stuck=False)


if __name__ == "__main__":
    main()
