"""Lines of the input on their way into the queue."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import msgspec


class InputLine(msgspec.Struct, frozen=True, gc=False):
    """One line: its text, or why it cannot be handed out.

    `defect` is one of `blank_line`, `undecodable_line`, `line_too_long`; `text` is then what can
    be shown of it.
    """

    offset: int
    next_offset: int
    text: str
    defect: str | None = None


class Lines(msgspec.Struct):
    """Lines that stand one behind the other from byte `offset` of the input on, in columns.

    `sizes` holds the bytes of each, its line end included; `defects` says, by place and in order,
    which of them cannot be handed out and why. An object for each line would cost more than all
    else that is done to read it.
    """

    offset: int = 0
    texts: list[str] = msgspec.field(default_factory=list)
    sizes: list[int] = msgspec.field(default_factory=list)
    defects: dict[int, str] = msgspec.field(default_factory=dict)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.texts)

    def __iter__(self) -> Iterator[InputLine]:
        """Each of them by itself."""
        offset = self.offset
        for place, (text, size) in enumerate(zip(self.texts, self.sizes, strict=True)):
            yield InputLine(offset, offset + size, text, self.defects.get(place))
            offset += size

    @property
    def end(self) -> int:
        """Where the next line begins."""
        return self.offset + sum(self.sizes)

    def append(self, line: InputLine) -> None:
        """Add the next line."""
        if line.defect is not None:
            self.defects[len(self.texts)] = line.defect
        self.texts.append(line.text)
        self.sizes.append(line.next_offset - line.offset)


class ReadAhead:
    """Lines that were read and not taken yet."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._place = 0
        self._offset = lines.offset
        self._odd = [*reversed(lines.defects)]  # the next one last

    def __bool__(self) -> bool:
        """Whether there are any."""
        return self._place < len(self._lines)

    @property
    def offset(self) -> int:
        """Where the next line begins in the input."""
        return self._offset

    def take(self, count: int, max_bytes: int) -> Lines:
        """Take up to `count` of the next lines, until `max_bytes` are reached.

        Either all of them can be handed out, or each has a defect.
        """
        lines, first, odd = self._lines, self._place, self._odd
        end = min(first + count, len(lines))
        defects: dict[int, str] = {}
        if odd and odd[-1] == first:
            while odd and odd[-1] == first + len(defects) < end:
                defects[len(defects)] = lines.defects[odd.pop()]
            end = first + len(defects)
        elif odd:
            end = min(end, odd[-1])
        sizes = lines.sizes[first:end]
        if not defects and sum(sizes) > max_bytes:
            ends = itertools.accumulate(sizes)
            sizes = sizes[: 1 + next(n for n, size in enumerate(ends) if size >= max_bytes)]
        taken = Lines(self._offset, lines.texts[first : first + len(sizes)], sizes, defects)
        self._place, self._offset = first + len(sizes), taken.end
        return taken
