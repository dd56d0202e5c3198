"""A backend whose model server this process launches, and ends."""

from __future__ import annotations

import asyncio
import contextlib
from abc import abstractmethod

from dispatcher.errors import BackendError
from dispatcher.taskmanager.backend.base import Backend
from dispatcher.taskmanager.backend.openai_compatible import Endpoint, OpenAICompatibleBackend
from dispatcher.taskmanager.backend.process import ServerProcess
from dispatcher.taskmanager.backend.request import Request, Response

STOP_GRACE_S = 2.0


class LaunchedBackend(Backend):
    """Owns a server process and talks to it. When that dies, requests raise BackendError."""

    def __init__(self) -> None:
        super().__init__()
        self._process: ServerProcess | None = None
        self._client: OpenAICompatibleBackend | None = None
        self._watching: asyncio.Task[None] | None = None

    @abstractmethod
    async def launch(self) -> Endpoint:
        """Start the server through `run_process` and return where it answers."""

    async def run_process(self, process: ServerProcess) -> None:
        """Start a process that `close` will end, replacing one that did not get ready."""
        if self._process is not None:
            await self._process.stop(STOP_GRACE_S)
        self._process = process
        await process.start()

    async def start(self) -> None:
        """Launch the server and return when it answers. Raises BackendError."""
        endpoint = await self.launch()
        assert self._process is not None
        self._client = OpenAICompatibleBackend(endpoint)
        self.usage = self._client.usage
        await self._client.start()
        self._watching = asyncio.ensure_future(self._watch(self._process, self._client))

    async def process(self, request: Request) -> Response:
        """Answer one request."""
        assert self._client is not None
        return await self._client.process(request)

    def healthy(self) -> bool:
        """Say whether the server answered when it was last needed."""
        return self._client is not None and self._client.healthy()

    async def close(self) -> None:
        """Close connections and end the server with all its children."""
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
        if self._client is not None:
            await self._client.close()
        if self._process is not None:
            await self._process.stop(STOP_GRACE_S)

    async def _watch(self, process: ServerProcess, client: OpenAICompatibleBackend) -> None:
        await process.wait()
        try:
            process.check_alive()
        except BackendError as error:
            client.declare_dead(error)
