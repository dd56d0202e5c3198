"""Who may have a model request in flight: at most N, items started earlier first."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable


class RequestSlots:
    """A semaphore whose limit may change, and which serves its waiters by their order number.

    Older items go before newer ones, so that items finish instead of all being half done.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_use = 0
        self.waiting = 0
        self.on_growth: Callable[[], None] = _nothing
        """Called when the limit was raised."""
        # Those that gave up stay until their turn comes, and are passed over then.
        self._turns: list[tuple[int, int, asyncio.Future[None]]] = []
        self._ticket = 0

    @property
    def demand(self) -> int:
        """Requests in flight and waiting."""
        return self.in_use + self.waiting

    def set_limit(self, limit: int) -> None:
        """Change the limit. Requests in flight above a lower one end by themselves."""
        grows = limit > self.limit
        self.limit = limit
        self._admit()
        if grows:
            self.on_growth()

    async def acquire(self, order: int) -> None:
        """Wait for a slot; the lowest `order` gets the next one."""
        if self.in_use < self.limit and not self.waiting:
            self.in_use += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._ticket += 1
        heapq.heappush(self._turns, (order, self._ticket, turn))
        self.waiting += 1
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release()  # it was its turn already
            else:
                self.waiting -= 1
            raise

    def release(self) -> None:
        """Give a slot back, to whoever waits for one."""
        self.in_use -= 1
        self._admit()

    def _admit(self) -> None:
        while self._turns and self.in_use < self.limit:
            _, _, turn = heapq.heappop(self._turns)
            if not turn.done():  # else it was cancelled, though its coroutine may not know yet
                self.waiting -= 1
                self.in_use += 1
                turn.set_result(None)


def _nothing() -> None:
    pass
