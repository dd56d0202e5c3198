"""Open lines, and which of them wait to be handed out."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable

import msgspec

from dispatcher.core.events import Ended
from dispatcher.core.workers import Lease


class Item(msgspec.Struct, eq=False, gc=False):
    """An open line: read from the input, where it stands at `offset`, and without a result."""

    work_id: int
    offset: int
    line_bytes: int
    leases: tuple[Lease, ...] = ()
    retries: int = 0
    crashes: int = 0
    releases: int = 0
    attempt: int = 1
    owes_charge: bool = False
    condemned: bool = False
    queued: bool = False
    fresh_starts: int = 0
    history: tuple[Ended, ...] = ()


class ReadyItems:
    """The items that could be handed out now: lines never handed out, and heaps of those that were.

    An entry counts as long as its item is in `items` and `queued`; `count` of them do.
    """

    def __init__(self, items: dict[int, Item], crashes_before_solo: int) -> None:
        self._items = items
        self._crashes_before_solo = crashes_before_solo
        self._fresh: deque[int] = deque()
        self._again: list[int] = []
        self._solo: list[int] = []
        self.count = 0

    def add_fresh(self, work_ids: range) -> None:
        """New lines were read; their items are queued already."""
        self._fresh.extend(work_ids)
        self.count += len(work_ids)

    def put_back(self, item: Item) -> None:
        """The item is to be handed out again."""
        self.count += not item.queued
        item.queued = True
        heapq.heappush(self._solo if self._must_run_alone(item) else self._again, item.work_id)

    def remove(self, item: Item) -> None:
        """The item is not ready any more, though it was not taken from where it waited."""
        item.queued = False
        self.count -= 1
        # In a replay it is the first, a line that is refused is the last; another one's entry lies
        # about until its turn comes.
        work_id, fresh = item.work_id, self._fresh
        if fresh and fresh[0] == work_id:
            fresh.popleft()
        elif fresh and fresh[-1] == work_id:
            fresh.pop()

    def take_solo(self) -> Item | None:
        """Take the first item that must run alone."""
        while self._solo:
            item = self._items.get(heapq.heappop(self._solo))
            if item is not None and item.queued:
                item.queued = False
                self.count -= 1
                return item
        return None

    def take(
        self, count: int, max_bytes: int, bytes_beside: Callable[[int], int] | None = None
    ) -> list[Item]:
        """Take up to `count` items until `max_bytes` are reached: those handed out before first.

        `bytes_beside` tells what is sent with an item beside its line.
        """
        again, fresh, items = self._again, self._fresh, self._items
        taken: list[Item] = []
        while (again or fresh) and len(taken) < count and max_bytes > 0:
            item = items.get(heapq.heappop(again) if again else fresh.popleft())
            # One that must run alone waits elsewhere; this entry is from before its crashes.
            if item is None or not item.queued or item.crashes >= self._crashes_before_solo:
                continue
            item.queued = False
            taken.append(item)
            max_bytes -= item.line_bytes
            if bytes_beside is not None:
                max_bytes -= bytes_beside(item.work_id)
        self.count -= len(taken)
        return taken

    def _must_run_alone(self, item: Item) -> bool:
        return item.crashes >= self._crashes_before_solo
