"""Results that the server does not take, kept in the run's spool in case this process ends.

They stay queued in memory, too, and are handed in from there as soon as the server answers.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import TypeVar

from dispatcher.errors import StorageError
from dispatcher.models import WorkItem
from dispatcher.storage.spool import SpoolWriter

_AFTER_S = 8.0
"""How long the server may acknowledge nothing before results are written."""

_LOOK_S = 1.0
_LIMIT_S = 5.0
_AGAIN_S = 30.0
_PAUSE_FACTOR = 20.0
"""After a write it rests so many times as long as that took: a twentieth of the time, at most."""

T = TypeVar("T")
log = logging.getLogger(__name__)


class Spooler:
    """Keeps a worker's queue of `results` in the spool while the server does not take them.

    The queue is appended to at its end, and taken from at its front: `note_acknowledged` says so.
    Results are counted from the first one that was ever queued.
    """

    def __init__(self, writer: SpoolWriter, results: deque[WorkItem]) -> None:
        self._writer = writer
        self._results = results
        self._acknowledged = 0
        self._spooled = 0
        self._not_before_s = 0.0
        self._has_tried = False
        self._has_complained = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> asyncio.Task[None]:
        """Begin to watch the queue."""
        self._task = asyncio.ensure_future(self._watch())
        return self._task

    def note_acknowledged(self, count: int) -> None:
        """The server has these results, the first of the queue, which are gone from it."""
        self._acknowledged += count

    async def save_now(self) -> None:
        """Have all that is queued in the spool, or give up after a few seconds."""
        if self._has_unsaved:
            await self._within_limit(self._save())

    async def end(self) -> None:
        """Leave in the spool what the server did not take, and nothing if it took everything.

        Says what becomes of it. To be called when nothing is queued or handed in any more.
        """
        if self._task is not None:
            self._task.cancel()
        if not self._results:
            if self._has_tried:
                await self._within_limit(self._remove())
            return
        await self.save_now()
        kept = max(0, self._spooled - self._acknowledged)
        if kept:
            log.warning(
                "%d finished results that the server did not take are kept in %s, where it finds "
                "them when it is back",
                kept,
                self._writer.paths[-1],
            )
        if lost := len(self._results) - kept:
            log.warning(
                "%d finished results are lost with this worker: no place to keep them", lost
            )

    async def _watch(self) -> None:
        time = asyncio.get_running_loop().time
        acknowledged, since_s = self._acknowledged, time()
        while True:
            await asyncio.sleep(_LOOK_S)
            now = time()
            if not self._results or acknowledged != self._acknowledged:
                acknowledged, since_s = self._acknowledged, now
                if self._writer.paths and acknowledged >= self._spooled:
                    await self._remove()
            elif self._has_unsaved and now - since_s >= _AFTER_S and now >= self._not_before_s:
                await self._save()

    @property
    def _has_unsaved(self) -> bool:
        return self._acknowledged + len(self._results) > self._spooled

    async def _save(self) -> None:
        self._has_tried = True
        time = asyncio.get_running_loop().time
        began_s, first, items = time(), self._acknowledged, list(self._results)
        try:
            count = await _in_thread(lambda: self._writer.write(items))
        except StorageError as error:
            self._complain(str(error))
            self._not_before_s = time() + _AGAIN_S
            return
        self._spooled = first + count
        self._not_before_s = time() + _PAUSE_FACTOR * (time() - began_s)
        if count < len(items):
            self._complain(f"{self._writer.paths[-1]} is as large as it may get")
            self._not_before_s += _AGAIN_S

    async def _remove(self) -> None:
        await _in_thread(self._writer.remove)

    async def _within_limit(self, work: Coroutine[None, None, None]) -> None:
        try:
            async with asyncio.timeout(_LIMIT_S):
                await work
        except TimeoutError:
            self._complain(f"the state directory does not answer within {_LIMIT_S:g} s")

    def _complain(self, problem: str) -> None:
        if not self._has_complained:
            self._has_complained = True
            log.warning(
                "results that the server does not take are kept in memory only, and are lost when "
                "this worker ends before it does: %s",
                problem,
            )


async def _in_thread(call: Callable[[], T]) -> T:
    """Return what `call` does, in a thread that holds up no end of this process.

    A file system that hangs would.
    """
    future: Future[T] = Future()

    def work() -> None:
        future.set_running_or_notify_cancel()
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 (handed to whoever waits)
            future.set_exception(error)

    threading.Thread(target=work, name="spool", daemon=True).start()
    return await asyncio.wrap_future(future)
