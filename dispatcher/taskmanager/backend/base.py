"""What every model backend promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from dispatcher.taskmanager.backend.request import Request, Response


@dataclass(slots=True)
class Usage:
    """Totals of one backend since it started."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Backend(ABC):
    """A model server, asynchronous: what the task manager drives.

    `process` answers every request, with `Response.error` at worst; a backend that cannot be
    reached makes it wait, never fail. It may be cancelled at any await.
    """

    def __init__(self) -> None:
        self.usage = Usage()

    async def start(self) -> None:  # noqa: B027 (a backend without a process has nothing to start)
        """Launch or connect; return when requests can be served. Raises BackendError."""

    @abstractmethod
    async def process(self, request: Request) -> Response:
        """Answer one request."""

    def healthy(self) -> bool:
        """Say, without I/O, whether the model server is believed to be serving."""
        return True

    async def close(self) -> None:  # noqa: B027 (see start)
        """Let go of connections and end the processes this backend started."""


class BackendManager(ABC):
    """The older, synchronous interface; subclasses run through `compat.SyncBackend`."""

    @abstractmethod
    def process(self, request: Request) -> Response:
        """Answer one request; may block; is called from several threads."""

    @abstractmethod
    def is_healthy(self) -> bool:
        """Say whether requests can be served."""
