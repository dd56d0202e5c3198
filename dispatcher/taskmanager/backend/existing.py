"""A model server that somebody else started: a hosted endpoint, or vLLM that runs already."""

from __future__ import annotations

from typing import Any

from dispatcher.taskmanager.backend.openai_compatible import OpenAICompatibleBackend


class ExistingServer(OpenAICompatibleBackend):
    """Waits for a server, at most `startup_timeout_s`, and uses it."""

    def __init__(self, *args: Any, startup_timeout_s: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._startup_timeout_s = startup_timeout_s

    async def start(self) -> None:
        """Return when it answers. Raises BackendError after the start-up time-out."""
        await super().start()
        await self.wait_until_serving(self._startup_timeout_s)
