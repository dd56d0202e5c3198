"""A process that `dispatcher run` has started: its command, its end, what it said last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dispatcher.errors import ExitCode
from dispatcher.server_file import DRAINED
from dispatcher.taskmanager.backend.process import ServerProcess
from dispatcher.taskmanager.cli import STOPPED


@dataclass(slots=True)
class Child:
    """One process of the run.

    `restarts` counts how often it was started again without the run getting on; `run_had` is how
    far the run was the last time. With `reads_input` it has this process's standard input.
    """

    name: str
    argv: list[str]
    log_path: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    reads_input: bool = False
    process: ServerProcess = field(init=False)
    restarts: int = 0
    run_had: int = 0

    def __post_init__(self) -> None:
        self.process = self._make_process()

    async def start(self) -> None:
        """Start it, anew if it ran before."""
        self.process = self._make_process()
        await self.process.start()

    def _make_process(self) -> ServerProcess:
        stdin_fd = 0 if self.reads_input else None
        return ServerProcess(
            self.name, self.argv, self.log_path, self.environment, stdin_fd=stdin_fd
        )

    @property
    def stopped_by_itself(self) -> bool:
        """Whether it ended to be gone on with later, and not because of a signal."""
        stopped = self.process.exit_code == ExitCode.STOPPED
        return stopped and not self.last_words().startswith(STOPPED)

    @property
    def is_drained_server(self) -> bool:
        """Whether it was asked to end, as a server is by POST /drain: not to be started again."""
        stopped = self.process.exit_code == ExitCode.STOPPED
        return stopped and self.last_words().startswith(DRAINED)

    def last_words(self) -> str:
        """Return what it said last, without the name it says it under."""
        return _last_words(self.process.tail().splitlines())


def _last_words(lines: Sequence[str]) -> str:
    lines = [line.strip() for line in lines if line.strip()]
    said = [line for line in lines if line.startswith("dispatcher-")]
    _, _, text = (said or lines or [": it said nothing"])[-1].partition(": ")
    # The end of an engine's log may follow its sentence; the last line of that mostly says why.
    return f"{text} {lines[-1]}" if said and text.endswith(":") and lines[-1] != said[-1] else text
