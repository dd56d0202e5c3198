"""Tokens a second of a real vLLM: `python -m tests.bench.vllm_throughput --model DIR`.

One vLLM (the environment variable DISPATCHER_TEST_VLLM_PYTHON names its Python) serves all. A plain
aiohttp load generator is run at several numbers of requests in flight; its best one is then run
in turn with dispatcher-server + dispatcher-task-run at the same number and with `--workers auto`,
for a task of one request and for one of three in turn. Every round is printed, then the medians
of their ratios. A run is measured from its first request to its last answer; without --model the
tiny model of the tests is made and served.

vLLM leaves one CPU to its API server; on a machine of two, VLLM_CPU_OMP_THREADS_BIND=0-1 lets it
compute on both. Where the CPU knows no bfloat16, --dtype float32 is several times as fast.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from dispatcher.taskmanager.backend.ports import lease_port
from tests.bench.measure import ROOT, started
from tests.bench.vllm_task import TOKENS, body, next_question

_PLAIN = "--plain"
_WORKERS = ("fixed", "auto")
_START_S = 600.0
_runs = itertools.count()


# -------------------------------------------------------------------- the plain generator


async def plain(
    url: str, model: str, first_questions: list[str], steps: int, in_flight: int
) -> float:
    """Ask what the task asks with nothing around it; return the seconds it took."""
    import aiohttp

    questions = iter(first_questions)
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def ask(question: str) -> str:
            content = {"model": model, **body(question)}
            async with session.post(f"{url}/chat/completions", json=content) as reply:
                answer = json.loads(await reply.read())
            assert answer["usage"]["completion_tokens"] == TOKENS, answer
            return str(answer["choices"][0]["message"]["content"])

        async def client() -> None:
            for first in questions:
                question = first
                for step in range(steps):
                    question = next_question(first, step, await ask(question))

        began_at = time.time()
        await asyncio.gather(*(client() for _ in range(in_flight)))
        return time.time() - began_at


# -------------------------------------------------------------------- the engine


@contextmanager
def vllm(model: Path, dtype: str, log_path: Path) -> Iterator[int]:
    """Serve the model; yield the port once it answers."""
    python = os.environ["DISPATCHER_TEST_VLLM_PYTHON"]
    lease = lease_port()
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--dtype", dtype, "--max-model-len", "1024"]
    command += ["--host", "127.0.0.1", "--port", str(lease.port)]
    offline = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    guard = [sys.executable, "-m", "dispatcher.taskmanager.backend.guard", *command]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            guard,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**os.environ, **offline},
            start_new_session=True,
        )
    try:
        end = time.monotonic() + _START_S
        while not _answers(lease.port):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"vLLM did not start:\n{log_path.read_text()[-2000:]}")
            time.sleep(0.5)
        yield lease.port
    finally:
        assert process.stdin is not None
        process.stdin.close()  # the guard ends the whole group
        process.wait(30)
        lease.release()


def _answers(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (URLError, OSError):
        return False


# -------------------------------------------------------------------- the two contestants


class Bench:
    """The figures of one engine, in tokens a second."""

    def __init__(self, directory: Path, model: str, port: int, requests: int) -> None:
        self._directory = directory
        self._model = model
        self._port = port
        self._requests = requests

    def plain(self, steps: int, in_flight: int) -> float:
        """Run the plain generator in a process of its own."""
        url = f"http://127.0.0.1:{self._port}/v1"
        infile = self._make_input(steps)
        command = [sys.executable, "-m", "tests.bench.vllm_throughput", _PLAIN, url]
        command += ["--model", self._model, "--infile", str(infile), "--steps", str(steps)]
        command += ["--in-flight", str(in_flight)]
        output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        return self._tokens(steps) / float(output.stdout)

    def ours(self, steps: int, workers: str) -> float:
        """Run a server and a worker of it."""
        infile = self._make_input(steps)
        outfile = infile.with_suffix(".out")
        files = ["--infile", infile, "--outfile", outfile, "--port", "0"]
        command = [sys.executable, "-m", "dispatcher.taskmanager.cli", "--no-launch"]
        command += ["--task", "tests.bench.vllm_task:ChainTask", "--task-arg", f"steps={steps}"]
        command += ["--port", str(self._port), "--model", self._model, "--workers", workers]
        command += ["--dispatcher", f"@{outfile}.dispatch"]
        with started("dispatcher.server", *files, ready=r"at (http\S+)"):
            subprocess.run(
                command,
                cwd=ROOT,
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        lines = [json.loads(line) for line in outfile.read_text().splitlines()]
        began_at = min(line["began_at"] for line in lines)
        return self._tokens(steps) / (max(line["ended_at"] for line in lines) - began_at)

    def _tokens(self, steps: int) -> int:
        return self._requests // steps * steps * TOKENS

    def _make_input(self, steps: int) -> Path:
        # Each run asks something new: what the engine remembers of earlier ones is worth nothing.
        run = next(_runs)
        path = self._directory / f"in-{run}.jsonl"
        lines = (
            json.dumps({"question": f"{run}.{n}: what is {n} times {run + 7}?"})
            for n in range(self._requests // steps)
        )
        path.write_text("\n".join(lines) + "\n")
        return path


def compare(name: str, rounds: int, runs: Mapping[str, Callable[[], float]]) -> None:
    """Run all in turn, forwards and backwards; print each round and the medians of the ratios.

    The ratios are those of the second to the first, and of the third to the second.
    """
    names = list(runs)
    ratios: dict[str, list[float]] = {f"{b} : {a}": [] for a, b in pairwise(names)}
    for number in range(rounds):
        order = names if number % 2 == 0 else names[::-1]
        found = {each: runs[each]() for each in order}
        for a, b in pairwise(names):
            ratios[f"{b} : {a}"].append(found[b] / found[a])
        figures = "  ".join(f"{each} {found[each]:6.1f}" for each in names)
        quotients = "  ".join(f"{each} {values[-1]:.3f}" for each, values in ratios.items())
        print(f"{name}  round {number + 1}: {figures} tokens/s  {quotients}", flush=True)
    for each, values in ratios.items():
        print(f"{name}  {each}  median of {rounds}: {statistics.median(values):.3f}", flush=True)


def measure(
    bench: Bench, rounds: int, in_flight: list[int], steps: list[int], ours: list[str]
) -> None:
    """Find the plain generator's best, then compare."""
    bench.plain(1, in_flight[0])  # the engine compiles on its first requests
    for count in steps:
        found = {n: bench.plain(count, n) for n in in_flight}
        for n, figure in found.items():
            print(f"steps {count}  plain at {n:4} in flight: {figure:7.1f} tokens/s", flush=True)
        best = max(found, key=lambda n: found[n])
        runs = {"plain": partial(bench.plain, count, best)}
        for each in ours:
            runs[each] = partial(bench.ours, count, str(best) if each == "fixed" else each)
        compare(f"steps {count}, {best} in flight", rounds, runs)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a model directory, as scripts/make_smollm2.py makes one")
    parser.add_argument("--requests", type=int, default=192, help="requests in one run")
    parser.add_argument("--dtype", default="bfloat16", help="what vLLM computes in")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--workers", choices=_WORKERS, nargs="+", default=_WORKERS)
    parser.add_argument("--infile", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(_PLAIN, metavar="URL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain:
        import uvloop

        (steps,), (in_flight,) = args.steps, args.in_flight
        questions = [json.loads(line)["question"] for line in args.infile.open()]
        print(uvloop.run(plain(args.plain, args.model, questions, steps, in_flight)))
        return
    with tempfile.TemporaryDirectory(prefix="dispatcher-bench-") as name:
        directory = Path(name)
        model = Path(args.model).absolute() if args.model else make_tiny(directory / "model")
        with vllm(model, args.dtype, directory / "vllm.log") as port:
            bench = Bench(directory, str(model), port, args.requests)
            measure(bench, args.rounds, args.in_flight, args.steps, args.workers)


def make_tiny(directory: Path) -> Path:
    """Make the tiny model of the tests."""
    python = os.environ["DISPATCHER_TEST_VLLM_PYTHON"]
    subprocess.run([python, "tests/support/tiny_model.py", str(directory)], cwd=ROOT, check=True)
    return directory


if __name__ == "__main__":
    main()
