"""What every model backend promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping

from dispatcher.models import ModelStats
from dispatcher.taskmanager.backend.request import Request, Response
from dispatcher.taskmanager.backend.slots import RequestSlots

DEFAULT_LIMIT = 64

CrashHandler = Callable[[set[int]], Awaitable[bool]]
"""Takes the orders of the items whose requests were in flight on a model server that died.

Returns True when the items are to blame: one that ran alone killed the server.
"""


class Backend(ABC):
    """A model server, asynchronous: what the task manager drives.

    `process` answers every request, with `Response.error` at worst; a backend that cannot be
    reached makes it wait, never fail. It may be cancelled at any await. At most `slots.limit`
    requests are in flight.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self.slots = RequestSlots(limit)
        self.on_crash: CrashHandler | None = None

    async def start(self) -> None:  # noqa: B027 (a backend without a process has nothing to start)
        """Launch or connect; return when requests can be served. Raises BackendError."""

    @abstractmethod
    async def process(self, request: Request, order: int = 0) -> Response:
        """Answer one request of the `order`-th item that was started; lower ones go first.

        Waits for a slot, and holds it only while the request is in flight. Raises BackendError
        when the model server is gone for good.
        """

    @property
    def limit(self) -> int:
        """How many requests may be in flight now."""
        return self.slots.limit

    @property
    def requests_in_flight(self) -> int:
        """Requests being answered now."""
        return self.slots.in_use

    def room(self) -> int:
        """Return how many more items may be started now so that none of their requests waits.

        Negative when requests wait already.
        """
        return self.slots.limit - self.slots.demand

    def watch(self, on_growth: Callable[[], None], on_crash: CrashHandler) -> None:
        """Have the manager told what happens besides the ends of its requests.

        `on_growth`: there may be more room. `on_crash`: a model server died.
        """
        self.slots.on_growth = on_growth
        self.on_crash = on_crash

    def healthy(self) -> bool:
        """Say, without I/O, whether the model server is believed to be serving."""
        return True

    def accounts(self) -> Mapping[str, ModelStats]:
        """Return what each model answered since this backend started."""
        return {}

    async def close(self) -> None:  # noqa: B027 (see start)
        """Let go of connections and end the processes this backend started."""


class SimpleBackend(Backend):
    """A backend that has only to answer: it is asked when a slot is free."""

    async def process(self, request: Request, order: int = 0) -> Response:
        """Answer one request when it is its turn."""
        await self.slots.acquire(order)
        try:
            return await self.answer(request)
        finally:
            self.slots.release()

    @abstractmethod
    async def answer(self, request: Request) -> Response:
        """Answer one request."""


class BackendManager(ABC):
    """The older, synchronous interface; subclasses run through `compat.SyncBackend`."""

    @abstractmethod
    def process(self, request: Request) -> Response:
        """Answer one request; may block; is called from several threads."""

    @abstractmethod
    def is_healthy(self) -> bool:
        """Say whether requests can be served."""
