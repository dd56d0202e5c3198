"""Real processes for tests: start one, wait for what it says, end it by its id."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

from dispatcher.client import WorkClient
from dispatcher.server_file import read_server_file, server_file_in

ROOT = Path(__file__).resolve().parents[2]
START_S = 15.0
"""Far above what a start takes, so that only a hang reaches it."""

_READY = re.compile(r"dispatcher-server: run (\S+) at (\S+)")


def wait_until(condition: Callable[[], object], what: str, deadline_s: float = 10.0) -> None:
    """Poll `condition` until it is true; AssertionError with `what` after `deadline_s`."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not within {deadline_s:g} s: {what}"
        time.sleep(0.01)


class Process:
    """A running command; its output, both streams together, is read as it comes."""

    def __init__(
        self, *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT
    ) -> None:
        # A session of its own, so that what the command starts can be ended with it.
        self._popen = subprocess.Popen(
            [str(argument) for argument in arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            start_new_session=True,
        )
        self.output = ""
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Return its process id."""
        return self._popen.pid

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            self.output += line
            self._lines.put(line)
        self._lines.put(None)

    def wait_for_line(self, pattern: re.Pattern[str], deadline_s: float = START_S) -> re.Match[str]:
        """Return the match of the first line that has one."""
        end = time.monotonic() + deadline_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                line = None
            assert line is not None, f"no line like {pattern.pattern!r} in:\n{self.output}"
            if match := pattern.search(line):
                return match

    @property
    def has_ended(self) -> bool:
        """Say whether it has ended."""
        return self._popen.poll() is not None

    def stop(self) -> None:
        """Ask it to end (SIGTERM)."""
        self.signal(signal.SIGTERM)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the command itself, not to what it started."""
        self._popen.send_signal(number)

    def wait(self, deadline_s: float = START_S) -> int:
        """Return its exit code once it has ended and all its output is read."""
        code = self._popen.wait(deadline_s)
        self._reader.join(deadline_s)
        return code

    def kill(self) -> None:
        """End it and what it started, at once; harmless when it has ended."""
        with suppress(ProcessLookupError, PermissionError):
            # Until it is waited for, its process group cannot be another's.
            if self._popen.returncode is None:
                os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait(START_S)
        self._reader.join(START_S)


@contextmanager
def running(
    *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> Iterator[Process]:
    """Run a command and end it, whatever happens."""
    process = Process(*arguments, env=env, cwd=cwd)
    try:
        yield process
    finally:
        process.kill()


def run_python(
    *arguments: str | Path, env: Mapping[str, str] | None = None, deadline_s: float = START_S
) -> tuple[int, str]:
    """Run this Python with `arguments`; return exit code and output."""
    with running(sys.executable, *arguments, env=env) as process:
        try:
            code = process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"it did not end:\n{process.output}") from None
        return code, process.output


@dataclass
class Server:
    """A dispatcher server that answers at `url` and wants `token`, if it wants any."""

    url: str
    process: Process
    state_file: Path
    token: str | None

    @property
    def address(self) -> str:
        """Return `host:port`."""
        return urlsplit(self.url).netloc

    @property
    def at(self) -> str:
        """Return the `@PATH` by which workers find this server and its token."""
        return f"@{self.state_file}"

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers that let a call in."""
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}

    @property
    def admin_headers(self) -> dict[str, str]:
        """Return the headers that let a call in that changes settings."""
        admin_token = self.state_file.with_name("admin.token").read_text().strip()
        return {"Authorization": f"Bearer {admin_token}"}

    def client(self, worker: str | None = None) -> WorkClient:
        """Return a client that this server lets in."""
        return WorkClient(self.address, worker, token=self.token)


@contextmanager
def dispatcher_server(*flags: str | Path, env: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Run `python -m dispatcher.server` on a free port; yield once it says where it is."""
    command = (sys.executable, "-m", "dispatcher.server", "--port", "0", *flags)
    with running(*command, env=env) as process:
        match = process.wait_for_line(_READY)
        state_file = server_file_in(_state_dir(flags))
        yield Server(match[2], process, state_file, read_server_file(state_file).token)


def _state_dir(flags: Sequence[str | Path]) -> Path:
    given = dict(pairwise(flags))
    state = given.get("--state") or given.get("--checkpoint")
    return Path(state) if state else Path(f"{given['--outfile']}.dispatch")


def kill_tree(process: Process) -> None:
    """End a command and everything it started, in whatever session, at once (SIGKILL)."""
    family = [process.pid]
    parents = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            parents[int(entry.name)] = int(
                (entry / "stat").read_text().rpartition(") ")[2].split()[1]
            )
    for parent in family:
        family += [child for child, its in parents.items() if its == parent]
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.kill()
