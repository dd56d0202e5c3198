"""What a run says by itself of its failed lines and its pauses, when they begin and end."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from dispatcher.core.failures import FailureTrend
from dispatcher.core.pausing import Pause
from dispatcher.core.work_queue import WorkQueue
from dispatcher.remedies import how_to_go_on

log = logging.getLogger(__name__)


class Alarms:
    """Looks at a queue, again and again.

    `pause` is the one that was told last, None while the run goes on; `paused` is set meanwhile.
    `state_dir` is where commands find the run.
    """

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self.trend = FailureTrend()
        self.paused = asyncio.Event()
        self.pause: Pause | None = None

    def look(self, queue: WorkQueue) -> None:
        """Say it when lines suddenly fail, and when the run is paused, for another reason too."""
        counters, trend = queue.counters, self.trend
        before = trend.jump
        trend.note(counters.done, counters.failed, counters.errors, queue.latest_failed)
        if trend.jump is not None and before is None:
            log.warning("suddenly more lines fail: %s", trend.jump)
        elif trend.jump is None and before is not None:
            log.info("lines fail as rarely again as before")
        if queue.pause == self.pause:
            return
        self.pause = queue.pause
        if queue.pause is not None:
            self.paused.set()
            log.warning("%s; %s", queue.pause, how_to_go_on(queue.pause.by, self._state_dir))
        else:
            self.paused.clear()
            log.info("the run goes on")
