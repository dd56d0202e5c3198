"""Which lines have their result: a byte for each line from the first that is not written yet."""

from __future__ import annotations

from collections.abc import Iterable

_OPEN, _DONE, _TOMBSTONE = 0, 1, 2
_TRIM_BYTES = 1 << 16


class LineStates:
    """The lines read so far: open, done, or with a tombstone that a late result may replace.

    Every line before `first_open` has its result; `end` is the number of lines.
    """

    def __init__(self, first: int = 0, end: int = 0, tombstones: Iterable[int] = ()) -> None:
        """Lines from `first` on are done, but for tombstones and those that `reopen` names."""
        self.first_open = end
        self._base = self._written = first
        self._states = bytearray([_DONE]) * (end - first)
        for line in tombstones:
            self._states[line - first] = _TOMBSTONE

    @property
    def end(self) -> int:
        """The number of lines."""
        return self._base + len(self._states)

    def reopen(self, line: int) -> None:
        """This one is open."""
        self._states[line - self._base] = _OPEN
        self.first_open = min(self.first_open, line)

    def open(self, count: int) -> None:
        """The next lines were read."""
        self._states += bytes(count)

    def finish(self, lines: Iterable[int]) -> None:
        """These have their result, for good."""
        states, base = self._states, self._base
        for line in lines:
            if line >= base:
                states[line - base] = _DONE
        self._find_first_open()

    def bury(self, line: int) -> None:
        """This one has a tombstone that a late result may replace."""
        self._states[line - self._base] = _TOMBSTONE
        self._find_first_open()

    def had_tombstone(self, line: int) -> bool:
        """Say whether the line's result is a tombstone, or may have been one before a restart."""
        return line < self._base or self._states[line - self._base] == _TOMBSTONE

    def is_replaceable(self, line: int) -> bool:
        """Say whether the line's result is a tombstone that is not in the output yet."""
        return (
            max(self._written, self._base) <= line < self.end
            and self._states[line - self._base] == _TOMBSTONE
        )

    def tombstones(self) -> list[int]:
        """Return the lines behind an open one whose result is a tombstone."""
        found: list[int] = []
        place = max(0, self.first_open - self._base)
        while (place := self._states.find(_TOMBSTONE, place)) >= 0:
            found.append(self._base + place)
            place += 1
        return found

    def note_written(self, first_unwritten: int) -> None:
        """Lines before this one stand in the output, where a tombstone is final."""
        self._written = first_unwritten
        unneeded = min(first_unwritten, self.first_open) - self._base
        if unneeded > _TRIM_BYTES:
            del self._states[:unneeded]
            self._base += unneeded

    def _find_first_open(self) -> None:
        place = self.first_open - self._base
        if place < len(self._states) and self._states[place] != _OPEN:
            found = self._states.find(_OPEN, place)
            self.first_open = self.end if found < 0 else self._base + found
