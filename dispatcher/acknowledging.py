"""The calls that wait until one batch is on disk."""

from __future__ import annotations

import asyncio

from dispatcher.errors import DispatcherError


class Acknowledgement:
    """Tells all calls that wait for one batch what became of it.

    Each has a future of its own, as each may be cancelled by itself: a client leaves, and the
    others still wait.
    """

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[None]] = []

    def wait(self) -> asyncio.Future[None]:
        """Return a future that is done when the batch is on disk, or fails with it."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        return future

    def give(self) -> None:
        """The batch is on disk."""
        for future in self._take_waiting():
            future.set_result(None)

    def refuse(self, error: DispatcherError) -> None:
        """The batch is not on disk, and will not be."""
        for future in self._take_waiting():
            future.set_exception(error)
            future.exception()  # seen, even when its call is cancelled before it hears of it

    def _take_waiting(self) -> list[asyncio.Future[None]]:
        waiting, self._waiting = self._waiting, []
        return [future for future in waiting if not future.done()]
