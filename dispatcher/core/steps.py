"""Recorded steps: the answers an item's task already got, so that no model is asked for them again.

A step is known by its position in the task: which yield it belongs to, and its place in the list
that was yielded. `StepMap` holds one value for each; the queue keeps what it decides by, storage
where the answer stands in the journal. Both change by the same events, so they agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import msgspec

from dispatcher.core.events import Event, Finished, LeaseEnded, Position, StepsCut, Tombstoned

V = TypeVar("V")


class StepMap(Generic[V]):
    """A value for each recorded step of each open item."""

    def __init__(self) -> None:
        self._items: dict[int, dict[Position, V]] = {}

    def __len__(self) -> int:
        """How many items have steps."""
        return len(self._items)

    def __iter__(self) -> Iterator[tuple[int, dict[Position, V]]]:
        """Each item that has steps, with them."""
        return iter(self._items.items())

    def of(self, work_id: int) -> dict[Position, V]:
        """Return the item's steps."""
        return self._items.get(work_id, {})

    def add(self, work_id: int, position: Position, value: V) -> None:
        """A step was recorded; there is none at this position yet."""
        self._items.setdefault(work_id, {})[position] = value

    def apply(self, event: Event) -> list[V]:
        """Drop the steps that the event ends, and return what was kept of them."""
        if not self._items:
            return []
        match event:
            case Finished():
                return self._drop(event.work_ids)
            case Tombstoned():
                return self._drop([event.work_id])
            case LeaseEnded() if event.keep_yields is not None:
                return self._cut(event.work_id, (event.keep_yields, 0))
            case StepsCut():
                return self._cut(event.work_id, event.position)
            case _:
                return []

    def _drop(self, work_ids: Iterable[int]) -> list[V]:
        dropped: list[V] = []
        for work_id in work_ids:
            if (steps := self._items.pop(work_id, None)) is not None:
                self._dropped(work_id, [*steps.values()])
                dropped += steps.values()
        return dropped

    def _dropped(self, work_id: int, dropped: list[V]) -> None:
        """An item lost some of its steps, or all."""

    def _cut(self, work_id: int, first: Position) -> list[V]:
        steps = self._items.get(work_id, {})
        dropped = [steps.pop(position) for position in list(steps) if position >= first]
        if not steps:
            self._items.pop(work_id, None)
        if dropped:
            self._dropped(work_id, dropped)
        return dropped


class StepNote(msgspec.Struct, frozen=True, gc=False):
    """What the queue knows of a step: the hash of its request, and the bytes of its answer."""

    hash: str
    size: int


class StepBook(StepMap[StepNote]):
    """The queue's view of all recorded steps; `size` is the bytes of all their answers."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0
        self._sizes: dict[int, int] = {}

    def size_of(self, work_id: int) -> int:
        """Return the bytes of the item's answers."""
        return self._sizes.get(work_id, 0)

    def add(self, work_id: int, position: Position, value: StepNote) -> None:
        """A step was recorded."""
        super().add(work_id, position, value)
        self.size += value.size
        self._sizes[work_id] = self.size_of(work_id) + value.size

    def _dropped(self, work_id: int, dropped: list[StepNote]) -> None:
        size = sum(note.size for note in dropped)
        self.size -= size
        self._sizes[work_id] -= size
        if not self.of(work_id):
            del self._sizes[work_id]
