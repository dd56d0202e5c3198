"""A model server that is away for a minute in the middle: `python -m tests.bench.outage`.

A server and a worker run 5,000 lines against `fakellm`, one of which is always answered 500. In the
middle fakellm is killed; a minute later another one listens on its port. Prints what became of the
lines, and how long the run went on without answers.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dispatcher.client import WorkClient
from tests.bench.measure import ROOT, started

BAD = "always refused"
_RULES = [{"match": BAD, "status": 500}]
_WAIT_S = 300.0


@dataclass(frozen=True)
class Outcome:
    """What became of the run."""

    lines: list[dict[str, object]]
    charged: int
    crashed: int
    exit_code: int
    away_s: float

    @property
    def errors(self) -> list[int]:
        """The lines that have no answer."""
        return [number for number, line in enumerate(self.lines) if "__ERROR__" in line]


def measure(directory: Path, items: int, away_s: float) -> Outcome:
    """Run `items` lines, line 7 of them bad, with the model server away for `away_s`."""
    infile, outfile = directory / "in.jsonl", directory / "out.jsonl"
    prompts = [BAD if number == 7 else f"question {number}" for number in range(items)]
    lines = ({"messages": [{"role": "user", "content": prompt}]} for prompt in prompts)
    infile.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "rules.json").write_text(json.dumps(_RULES))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    fake = ["dispatcher.fakellm", "--port", port, "--latency-s", "0.1"]
    fake += ["--rules", directory / "rules.json"]
    files = ["--infile", infile, "--outfile", outfile, "--port", "0"]
    command = [sys.executable, "-m", "dispatcher.taskmanager.cli"]
    command += ["--task", "examples/chat_task.py:ChatTask", "--dispatcher", f"@{outfile}.dispatch"]
    command += ["--backend", "openai", "--base-url", f"http://127.0.0.1:{port}/v1"]
    command += ["--model", "m", "--workers", "64"]
    ready = r"ready at (http\S+)"
    with started("dispatcher.server", *files, ready=r"at (http\S+)"):
        client = WorkClient(f"@{outfile}.dispatch")
        with running(command) as worker:
            with started(*map(str, fake), ready=ready, kill=True):
                wait_for(client, worker, items // 2)
            began = time.monotonic()
            time.sleep(away_s)
            with started(*map(str, fake), ready=ready):
                away_s = time.monotonic() - began
                status = wait_for(client, worker, items)
                code = worker.wait(_WAIT_S)
    client.close()
    written = [json.loads(line) for line in outfile.read_text().splitlines()]
    return Outcome(written, int(status["charged"]), int(status["crashed"]), code, away_s)


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command; end it in any case."""
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(client: WorkClient, worker: subprocess.Popen[bytes], done: int) -> dict[str, int]:
    """Return the status once so many lines are done. Raises RuntimeError when they never are."""
    end = time.monotonic() + _WAIT_S
    status = client.status()
    while status.get("done", 0) < done:
        if time.monotonic() > end or (worker.poll() is not None and worker.returncode):
            raise RuntimeError(f"the worker ended, or hangs, at {status}")
        time.sleep(0.05)
        status = client.status() or status
    return status


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=5000)
    parser.add_argument("--away-s", type=float, default=60.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dispatcher-bench-") as directory:
        outcome = measure(Path(directory), args.items, args.away_s)
    print(
        f"{len(outcome.lines)} lines, the model server away for {outcome.away_s:.1f} s: errors at "
        f"{outcome.errors} (line 7 is always answered 500), {outcome.charged} charged, "
        f"{outcome.crashed} crashed, worker exit code {outcome.exit_code}"
    )


if __name__ == "__main__":
    main()
