"""What recording steps costs: `python -m tests.bench.steps_cost`.

A worker of a server runs a task of eight requests a line, one after the other, against `fakellm`
with 512 requests in flight, with answers of about 1 KB and of about 8 KB; and a task of a single
request a line, for which nothing is recorded. For each: task manager CPU a request (user and
system, from the first item on) with recording on and off, taken in turns, the medians and their
ratio; and the bytes that a recorded step adds to the journal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dispatcher.client import WorkClient
from dispatcher.taskmanager.backend.request import Request
from dispatcher.taskmanager.task import GeneratorTask, TaskFailed
from tests.bench.measure import ROOT, cpu_seconds, started

_FAKELLM = ("dispatcher.fakellm", "--port", "0", "--latency-s", "0.2")
_WORDS_A_KIB = 146
_MOST_PERCENT = 25
_SHOWN_CHARACTERS = 60
_WAIT_S = 300.0


class RecordedTask(GeneratorTask):
    """Asks `args["steps"]` times, each time about the answer before."""

    def task_generator(self) -> Generator[Request, Any, dict[str, Any]]:
        """Ask one after the other."""
        text = ""
        for number in range(self.args["steps"]):
            prompt = f"{self.data['id']} {number} {text[:_SHOWN_CHARACTERS]}"
            response = yield Request({"messages": [{"role": "user", "content": prompt}]})
            if not response.is_success:
                raise TaskFailed(str(response.error), "model_error")
            text = str(response.get_text())
        return {"id": self.data["id"], "answer": text}


class UnrecordedTask(RecordedTask):
    """The same, but begun anew whenever it is handed out again."""

    record_steps = False


@dataclass(frozen=True)
class Cost:
    """What a run took a request, and the size of its journal at the end."""

    us: float
    wall_s: float
    journal_bytes: int
    recorded: int


def measure(
    directory: Path, task: type[GeneratorTask], steps: int, items: int, in_flight: int, url: str
) -> Cost:
    """Run the task over `items` lines."""
    infile, outfile = directory / "in.jsonl", directory / "out.jsonl"
    infile.write_text("".join(json.dumps({"id": number}) + "\n" for number in range(items + 1)))
    files = ["--infile", infile, "--outfile", outfile, "--port", "0", "--backup-tasks", "off"]
    command = [sys.executable, "-m", "dispatcher.taskmanager.cli"]
    command += ["--task", f"tests.bench.steps_cost:{task.__name__}", "--task-arg", f"steps={steps}"]
    command += ["--backend", "openai", "--base-url", url, "--model", "m"]
    command += ["--workers", str(in_flight), "--dispatcher", f"@{outfile}.dispatch"]
    with (
        started("dispatcher.server", *files, ready=r"at (http\S+)"),
        WorkClient(f"@{outfile}.dispatch") as client,
    ):
        # The first line stays open, so that no part of the journal is deleted before the end.
        (first,) = client.get_work().items
        quiet = subprocess.DEVNULL
        worker = subprocess.Popen(command, cwd=ROOT, stdout=quiet, stderr=quiet)
        try:
            wait_for(client, worker, "issued", 2)
            before, began = cpu_seconds(worker.pid), time.perf_counter()
            status = wait_for(client, worker, "done", items)
            used_s, wall_s = cpu_seconds(worker.pid) - before, time.perf_counter() - began
            journal = sum(p.stat().st_size for p in outfile.parent.glob("*/journal/*.journal"))
            first.set_result("{}")
            client.submit_results([first])
            worker.wait(_WAIT_S)
        finally:
            worker.kill()
            worker.wait()
    return Cost(used_s / (items * steps) * 1e6, wall_s, journal, status["steps"])


def wait_for(
    client: WorkClient, worker: subprocess.Popen[bytes], name: str, least: int
) -> dict[str, Any]:
    """Return the server's status once it counts so many. Raises RuntimeError when it never will."""
    end = time.monotonic() + _WAIT_S
    while (status := client.status()).get(name, 0) < least:
        if worker.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"the worker ended, or hangs, at {status}")
        time.sleep(0.02)
    return status


def compare(name: str, steps: int, items: int, kib: int, in_flight: int, rounds: int) -> float:
    """Measure with and without recording, in turns; print both and return their ratio."""
    costs: dict[type[GeneratorTask], list[Cost]] = {RecordedTask: [], UnrecordedTask: []}
    length = str(kib * _WORDS_A_KIB)
    sizes = ("--min-words", length, "--max-words", length)
    with started(*_FAKELLM, *sizes, ready=r"ready at (http\S+)") as (_, url):
        for _ in range(rounds):
            for task, found in costs.items():
                with tempfile.TemporaryDirectory(prefix="dispatcher-bench-") as directory:
                    found.append(measure(Path(directory), task, steps, items, in_flight, url))
    on, off = costs.values()
    on_us, off_us = (statistics.median(cost.us for cost in found) for found in (on, off))
    rate = [items * steps / statistics.median(cost.wall_s for cost in found) for found in (on, off)]
    more = statistics.median(c.journal_bytes for c in on) - statistics.median(
        c.journal_bytes for c in off
    )
    a_step = more / on[-1].recorded if on[-1].recorded else 0.0
    spread = f"{min(c.us for c in on):.0f}-{max(c.us for c in on):.0f}"
    spread += f" / {min(c.us for c in off):.0f}-{max(c.us for c in off):.0f}"
    print(
        f"{name:24} {on_us:6.0f} {off_us:6.0f} {on_us / off_us:6.3f} {spread:>24}"
        f" {rate[0]:6.0f} {rate[1]:6.0f} {on[-1].recorded:9} {a_step:8.0f}",
        flush=True,
    )
    return on_us / off_us


def main() -> int:
    """Measure and print; 1 when recording costs more than it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=16_384, help="requests a run")
    parser.add_argument("--in-flight", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3, help="runs with and runs without")
    args = parser.parse_args()
    common = (args.in_flight, args.rounds)
    print(
        f"{'us CPU a request':24} {'on':>6} {'off':>6} {'ratio':>6} {'lowest-highest':>24}"
        f" {'req/s':>6} {'off':>6} {'recorded':>9} {'B a step':>8}"
    )
    ratios = [
        compare("8 steps, answers 1 KB", 8, args.requests // 8, 1, *common),
        compare("8 steps, answers 8 KB", 8, args.requests // 8, 8, *common),
    ]
    compare("1 step, answers 1 KB", 1, args.requests, 1, *common)
    return int(max(ratios) > 1 + _MOST_PERCENT / 100)


if __name__ == "__main__":
    sys.exit(main())
