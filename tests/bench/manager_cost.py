"""Task manager CPU a request: `python -m tests.bench.manager_cost`.

A task of one request a line runs against `fakellm` with 0.2 s latency at 512 requests in flight,
in file mode (journal, output and all in the measured process) and as a worker of a server. The
plain figure beside it is an aiohttp client in a loop against the same fakellm in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.measure import ROOT, started

_FAKELLM = ("dispatcher.fakellm", "--port", "0", "--latency-s", "0.2")
_PLAIN = "--plain"


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


async def plain(url: str, items: int, in_flight: int) -> None:
    """Ask the same requests with nothing around them."""
    import aiohttp

    numbers = iter(range(items))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def client() -> None:
            for number in numbers:
                content = {"model": "m", "messages": _messages(number), "max_tokens": 64}
                async with session.post(f"{url}/chat/completions", json=content) as reply:
                    json.loads(await reply.read())

        await asyncio.gather(*(client() for _ in range(in_flight)))


def _messages(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"question {number}"}]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--in-flight", type=int, default=512)
    parser.add_argument(_PLAIN, metavar="URL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain:
        import uvloop

        uvloop.run(plain(args.plain, args.items, args.in_flight))
        return
    with tempfile.TemporaryDirectory(prefix="dispatcher-bench-") as directory:
        measure(Path(directory), args.items, args.in_flight)


def measure(directory: Path, items: int, in_flight: int) -> None:
    """Run the three and print their figures."""
    infile = directory / "in.jsonl"
    lines = (json.dumps({"messages": _messages(number)}) for number in range(items))
    infile.write_text("\n".join(lines) + "\n")
    common = ["dispatcher.taskmanager.cli", "--task", "examples/chat_task.py:ChatTask"]
    common += ["--backend", "openai", "--model", "m", "--workers", str(in_flight)]
    with started(*_FAKELLM, ready=r"ready at (http\S+)") as (_, fake_url):
        base = fake_url if fake_url.endswith("/v1") else f"{fake_url}/v1"
        common += ["--base-url", base]
        baseline = ["tests.bench.manager_cost", _PLAIN, base, "--items", str(items)]
        plain_s = child_cpu_seconds([*baseline, "--in-flight", str(in_flight)])
        report("plain aiohttp", plain_s, items, plain_s)
        output = ["--input", infile, "--output", directory / "file.jsonl"]
        report("file mode", child_cpu_seconds([*common, *output]), items, plain_s)
        files = ["--infile", infile, "--outfile", directory / "server.jsonl", "--port", "0"]
        with started("dispatcher.server", *files, ready=r"at (http\S+)"):
            address = f"@{directory / 'server.jsonl.dispatch'}"
            used_s = child_cpu_seconds([*common, "--dispatcher", address])
            report("worker of a server", used_s, items, plain_s)


def report(name: str, used_s: float, items: int, plain_s: float) -> None:
    """Print one figure and its ratio to the plain client."""
    print(
        f"{name:20} {used_s / items * 1e6:7.0f} us CPU a request  {used_s / plain_s:5.2f} x plain",
        flush=True,
    )


if __name__ == "__main__":
    main()
