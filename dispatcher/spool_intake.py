"""Results that workers left in the spool: taken in while a server runs, as if handed in."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

from dispatcher.errors import SpoolFileError, SpoolUnreadableError, StorageFullError
from dispatcher.models import Outcome, ResultItem
from dispatcher.storage.spool import Spool, SpoolFile

T = TypeVar("T")
log = logging.getLogger(__name__)

SPOOL_LOOK_S = 5.0
"""How often the spool is looked at for results of workers that cannot reach this process."""

SPOOL_AT_START_S = 10.0
"""How long a start waits for the spool to be taken in; what is left of it follows."""


class SpoolIntake:
    """Takes in what workers spooled while no server answered them, and what they spool now.

    `submit` takes results and returns when they are on disk, `may_remove` says whether this process
    has the run for sure; files are read in `thread`. `taken` counts the results that were new.
    """

    def __init__(
        self,
        spool: Spool,
        thread: Executor,
        submit: Callable[[Sequence[ResultItem]], Awaitable[list[Outcome]]],
        may_remove: Callable[[], bool],
    ) -> None:
        self.spool = spool
        self.taken = 0
        self._thread = thread
        self._submit = submit
        self._may_remove = may_remove
        self._refused: set[str] = set()
        self._complaints: set[str] = set()
        self._seen = asyncio.Event()

    async def take_forever(self, run_id: str) -> None:
        """Take in the results of this run, again and again."""
        while True:
            try:
                for name in await self._call(self.spool.names):
                    if name not in self._refused:
                        await self._take_file(name, run_id)
            except SpoolUnreadableError as error:
                self._say_once("", error)
            except StorageFullError:
                pass  # what was not taken in is still there at the next look
            self._seen.set()
            await asyncio.sleep(SPOOL_LOOK_S)

    async def until_seen(self, stopped: asyncio.Event) -> None:
        """Return when spooled results are in, as their lines are not to be handed out again.

        Or when the run stopped, or after SPOOL_AT_START_S.
        """
        ends = [asyncio.ensure_future(event.wait()) for event in (self._seen, stopped)]
        try:
            await asyncio.wait(ends, timeout=SPOOL_AT_START_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()

    async def _take_file(self, name: str, run_id: str) -> None:
        """Take results from a file as if they were handed in, then delete it.

        A process that dies before that leaves what the next one will find to be duplicates.
        """
        file: SpoolFile | None = None
        accepted = count = 0
        try:
            file = await self._call(self.spool.open, name, run_id)
            if file is None:
                return
            while results := await self._call(file.next_results):
                new = (await self._submit(results)).count(Outcome.ACCEPTED)
                self.taken += new
                accepted += new
                count += len(results)
        except SpoolUnreadableError as error:  # a network file system may do better next time
            self._say_once(name, error)
        except SpoolFileError as error:
            self._refused.add(name)
            self._say_once(name, error)
        else:
            if self._may_remove():  # else the next look, or the next owner, does it
                await self._call(self.spool.remove, name)
        finally:
            if file is not None:
                self._thread.submit(file.close)  # behind a read that was given up
        if accepted or (count and name not in self._complaints):
            log.info("%d results from the spool file %s, %d of them new", count, name, accepted)

    def _say_once(self, name: str, error: SpoolFileError) -> None:
        """Say what is wrong with a file, or the directory; it lies there, and the run goes on."""
        if name not in self._complaints:
            self._complaints.add(name)
            log.warning("%s", error)

    async def _call(self, call: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)
