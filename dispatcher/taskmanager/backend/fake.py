"""`fakellm` as a backend: started for you, for rehearsals without a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dispatcher.taskmanager.backend.http import Endpoint
from dispatcher.taskmanager.backend.launched import LaunchedBackend, LaunchOptions
from dispatcher.taskmanager.backend.process import ServerProcess


class FakeBackend(LaunchedBackend):
    """Launches `python -m dispatcher.fakellm` with the user's arguments on a free port."""

    def __init__(self, options: LaunchOptions, *, model: str, arguments: Sequence[str]) -> None:
        super().__init__(options)
        self._model = model
        self._arguments = list(arguments)

    async def launch(self) -> Endpoint:
        """Start the server process."""
        options = self.options
        command = [sys.executable, "-m", "dispatcher.fakellm", "--port", "0", *self._arguments]
        process = ServerProcess("fakellm", command, options.log_dir / "fakellm.log", {})
        await self.run_process(process)
        ready = await process.wait_for_line(
            r"fakellm ready at (http://[^\s/]+)", options.startup_timeout_s
        )
        return Endpoint(f"{ready[1]}/v1", self._model, request_timeout_s=options.request_timeout_s)
