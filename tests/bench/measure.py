"""What the benchmarks share: CPU time of other processes, and processes that end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """Return the user and system time a process has used, all threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def peak_mib(pid: int) -> float:
    """Return the most memory a process has had resident, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


@contextmanager
def started(*arguments: str | Path, ready: str, kill: bool = False) -> Iterator[tuple[int, str]]:
    """Run a Python module; yield its process id and the URL in the line that matches `ready`.

    It is ended with SIGTERM, or with SIGKILL.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.search(ready, line):
                yield process.pid, match[1]
                break
        else:
            raise RuntimeError(f"{arguments[0]} ended with exit code {process.wait()}")
    finally:
        process.kill() if kill else process.terminate()
        process.communicate(timeout=30)
