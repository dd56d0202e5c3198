"""`fakellm` as a backend: started for you, for rehearsals without a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dispatcher.taskmanager.backend.launched import LaunchedBackend
from dispatcher.taskmanager.backend.openai_compatible import Endpoint
from dispatcher.taskmanager.backend.process import ServerProcess


class FakeBackend(LaunchedBackend):
    """Launches `python -m dispatcher.fakellm` with the user's arguments on a free port."""

    def __init__(
        self,
        *,
        model: str,
        arguments: Sequence[str],
        startup_timeout_s: float,
        request_timeout_s: float,
        log_dir: Path,
    ) -> None:
        super().__init__()
        self._model = model
        self._arguments = list(arguments)
        self._startup_timeout_s = startup_timeout_s
        self._request_timeout_s = request_timeout_s
        self._log_dir = log_dir

    async def launch(self) -> Endpoint:
        """Start the server process."""
        command = [sys.executable, "-m", "dispatcher.fakellm", "--port", "0", *self._arguments]
        process = ServerProcess("fakellm", command, self._log_dir / "fakellm.log", {})
        await self.run_process(process)
        ready = await process.wait_for_line(
            r"fakellm ready at (http://[^\s/]+)", self._startup_timeout_s
        )
        return Endpoint(f"{ready[1]}/v1", self._model, request_timeout_s=self._request_timeout_s)
