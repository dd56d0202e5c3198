"""The lines of the input, read by a thread of its own a little before they are asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

from dispatcher.errors import DispatcherError, StateError
from dispatcher.storage.lines import InputLine, Lines, ReadAhead
from dispatcher.storage.source import LineSource

T = TypeVar("T")

_SCAN_LINES = 1024
_SCAN_BYTES = 4 << 20


class LineFeed:
    """Reads on from byte `offset` of a source; what it read waits until it is taken.

    When the input cannot be read (it is gone, or was cut), nothing can be handed out any more:
    `stop` is told so, and the call raises the same.
    """

    def __init__(
        self,
        source: LineSource,
        offset: int,
        thread: Executor,
        stop: Callable[[DispatcherError], None],
    ) -> None:
        self._source = source
        self._thread = thread
        self._stop = stop
        self._lock = asyncio.Lock()
        self._ahead = ReadAhead(Lines(offset))

    @property
    def is_behind(self) -> bool:
        """Whether no line can be taken before more are read."""
        return not self._ahead

    @property
    def has_more(self) -> bool:
        """Whether there are lines that were not taken yet, as far as the source can be read."""
        return self._ahead.offset < self._source.available_bytes

    @property
    def is_at_end(self) -> bool:
        """Whether all lines there will ever be were taken."""
        return self._source.is_whole and not self.has_more

    def take(self, count: int, max_bytes: int) -> Lines:
        """Take some of the next lines, as ReadAhead does; it must not be behind."""
        return self._ahead.take(count, max_bytes)

    def go_back(self, offset: int) -> None:
        """Begin again at this byte: what was taken from there on was never handed out."""
        self._ahead = ReadAhead(Lines(offset))

    async def read_ahead(self) -> None:
        """Read on, unless another call did meanwhile."""
        async with self._lock:
            if self._ahead:
                return
            before = self._ahead
            lines = await self._read(self._source.scan, before.offset, _SCAN_LINES, _SCAN_BYTES)
            if self._ahead is before:
                self._ahead = ReadAhead(lines)

    async def fetch(self, offsets: Sequence[int]) -> list[InputLine]:
        """Read the lines at these bytes again."""
        return await self._read(lambda: [self._source.fetch(offset) for offset in offsets])

    async def _read(self, call: Callable[..., T], *args: Any) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)
        except StateError as error:
            self._stop(error)
            raise
        except OSError as error:
            failure = StateError(f"cannot read the input {self._source.path}: {error}")
            self._stop(failure)
            raise failure from error
