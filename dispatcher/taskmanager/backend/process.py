"""A model server as a child process: started in its own group, logged to a file, ended whole."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dispatcher.errors import BackendError
from dispatcher.taskmanager.backend.guard import STDIN_OPTION

_LAST_LINES = 20
_SHOWN_LINES = 15
"""Fewer: who shows the last lines of a process that shows this must see what it says of them."""

_POLL_S = 0.1
_READ_BYTES = 1 << 20


class ServerProcess:
    """One server process and its children. `name` stands in messages, `log_path` gets its output.

    Lines of it that match `noise` are not shown when it fails. `stdin_fd` is what it has for
    standard input (none: nothing).
    `backend/guard.py` runs in between and ends the group when this process dies.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log_path: Path,
        env: Mapping[str, str],
        noise: str | None = None,
        stdin_fd: int | None = None,
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._command = list(command)
        self._env = dict(env)
        self._stdin_fd = stdin_fd
        self._process: asyncio.subprocess.Process | None = None
        self._noise = re.compile(noise) if noise else None
        self._log_start = 0
        self._is_stopped = False

    @property
    def exit_code(self) -> int | None:
        """Exit code of the process, or None while it runs."""
        return self._process.returncode if self._process is not None else None

    async def start(self) -> None:
        """Launch it. Raises BackendError when it cannot be launched."""
        guard = [sys.executable, "-m", "dispatcher.taskmanager.backend.guard"]
        # Where it has standard input: that of the guard is what ties it to this process.
        handed = os.dup(self._stdin_fd) if self._stdin_fd is not None else None
        if handed is not None:
            guard.append(f"{STDIN_OPTION}{handed}")
        try:
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            with self.log_path.open("ab") as log:
                self._log_start = log.tell()
                self._process = await asyncio.create_subprocess_exec(
                    *guard,
                    *self._command,
                    pass_fds=() if handed is None else (handed,),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **self._env},
                    start_new_session=True,
                )
        except OSError as error:
            raise BackendError(f"cannot launch {self.name}: {error}") from error
        finally:
            if handed is not None:
                os.close(handed)

    async def wait_for_line(self, pattern: str, timeout_s: float) -> re.Match[str]:
        """Return the first match in its output. Raises BackendError when it ends before."""
        compiled = re.compile(pattern)
        try:
            async with asyncio.timeout(timeout_s):
                while (match := compiled.search(self.tail())) is None:
                    self.check_alive()
                    await asyncio.sleep(_POLL_S)
                return match
        except TimeoutError:
            raise self.failure(f"was not ready within {timeout_s:.0f} s") from None

    def check_alive(self) -> None:
        """Raise BackendError, with the last lines of its log, when it has ended."""
        assert self._process is not None
        if (code := self._process.returncode) is not None:
            raise self.failure(f"ended with exit code {code}")

    def failure(self, what: str) -> BackendError:
        """Return the error that says what became of it, with the last lines of its log."""
        lines = self.last_lines().splitlines()[-_SHOWN_LINES:]
        hint = "\n".join([f"; its log {self.log_path} ends with:", *lines]) if lines else ""
        return BackendError(f"{self.name} {what}{hint}")

    async def wait(self) -> int:
        """Return its exit code when it ends."""
        assert self._process is not None
        return await self._process.wait()

    async def stop(self, grace_s: float = 5.0) -> None:
        """End the whole process group: SIGTERM, and after `grace_s` SIGKILL. Again: harmless."""
        if self._process is None or self._is_stopped:
            return
        # Once, as the group's number may be another's when all of it is gone.
        self._is_stopped = True
        group = self._process.pid
        with contextlib.suppress(ProcessLookupError, TimeoutError):
            os.killpg(group, signal.SIGTERM)
            async with asyncio.timeout(grace_s):
                await self._process.wait()
        # What outlived the server (its workers, say) goes now.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        await self._process.wait()

    def last_lines(self) -> str:
        """Return the end of its log."""
        lines = self.tail().splitlines()
        if self._noise is not None:
            lines = [line for line in lines if not self._noise.search(line)]
        return "\n".join(lines[-_LAST_LINES:])

    def tail(self) -> str:
        """Return what it wrote, at most the last mebibyte of it."""
        with contextlib.suppress(OSError), self.log_path.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, end - _READ_BYTES))
            return log.read(_READ_BYTES).decode("utf-8", "replace")
        return ""
