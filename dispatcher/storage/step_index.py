"""Where the answers of recorded steps stand in the journal: memory holds no answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from dispatcher.core.events import Event, Position, Stepped
from dispatcher.core.steps import StepMap
from dispatcher.storage.records import Location, StepPlace, step_place


class StepIndex(StepMap[Location]):
    """The place of each recorded step of each open item."""

    def __init__(self, places: Iterable[StepPlace] = ()) -> None:
        super().__init__()
        self._in_segment: Counter[int] = Counter()
        for place in places:
            location = Location(place.segment, place.offset, place.length)
            self.add(place.work_id, place.position, location)

    def note(self, event: Event, segment: int, end: int) -> None:
        """Follow an event whose record ends at byte `end` of a segment."""
        if isinstance(event, Stepped):
            offset, length = step_place(event, end)
            self.add(event.work_id, event.position, Location(segment, offset, length))
        else:
            self.apply(event)

    def add(self, work_id: int, position: Position, value: Location) -> None:
        """A step was recorded."""
        super().add(work_id, position, value)
        self._in_segment[value.segment] += 1

    def apply(self, event: Event) -> list[Location]:
        """Drop the steps that the event ends."""
        dropped = super().apply(event)
        for location in dropped:
            self._in_segment[location.segment] -= 1
            if not self._in_segment[location.segment]:
                del self._in_segment[location.segment]
        return dropped

    def first_needed(self, current: int) -> int:
        """Return the oldest segment that holds a step; `current` is the one being written."""
        return min(self._in_segment, default=current)

    def places(self) -> list[StepPlace]:
        """Return the place of every step, for a checkpoint."""
        return [
            StepPlace(work_id, position, at.segment, at.offset, at.length)
            for work_id, steps in self
            for position, at in steps.items()
        ]
