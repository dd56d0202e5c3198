"""Who may have a model request in flight: at most N, items started earlier first."""

from __future__ import annotations

import asyncio
import heapq


class RequestSlots:
    """A semaphore that serves its waiters by their order number, lowest first.

    Older items go before newer ones, so that items finish instead of all being half done.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_use = 0
        self._waiters: list[tuple[int, int, asyncio.Future[None]]] = []
        self._ticket = 0

    @property
    def demand(self) -> int:
        """Requests in flight and waiting."""
        return self.in_use + len(self._waiters)

    async def acquire(self, order: int) -> None:
        """Wait for a slot."""
        if self.in_use < self.limit and not self._waiters:
            self.in_use += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._ticket += 1
        entry = (order, self._ticket, turn)
        heapq.heappush(self._waiters, entry)
        try:
            await turn  # release() hands its slot over, so in_use is right already
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release()
            elif entry in self._waiters:
                self._waiters.remove(entry)
                heapq.heapify(self._waiters)
            raise

    def release(self) -> None:
        """Pass the slot on, or free it."""
        while self._waiters:
            _, _, turn = heapq.heappop(self._waiters)
            if not turn.done():  # else cancelled, though its coroutine has not run yet
                turn.set_result(None)
                return
        self.in_use -= 1
