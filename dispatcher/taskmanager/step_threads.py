"""Threads for task code, so that no task can block the event loop.

Steps of all tasks run one after the other on one thread, which costs two thread switches a
*batch* of steps under load. When a step takes long, the steps behind it move on to another
thread, as Go's scheduler takes the processor from a goroutine stuck in a system call.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

SLOW_STEP_S = 0.05
"""A step longer than this holds others up; the steps behind it get another thread."""

WARN_STEP_S = 1.0
MAX_THREADS = 64
THREAD_NAME = "task-steps"
_IDLE_S = 10.0

log = logging.getLogger(__name__)


class StepThreads:
    """Runs callables on a thread and hands their results back to the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        # None tells one thread to end.
        self._jobs: queue.SimpleQueue[tuple[asyncio.Future[Any], Callable[[], Any]] | None] = (
            queue.SimpleQueue()
        )
        self._results: deque[tuple[asyncio.Future[Any], Any, BaseException | None]] = deque()
        self._delivery_due = False
        self._busy_since: dict[int, float] = {}
        self._threads = 0
        self._lock = threading.Lock()
        self._watch: asyncio.TimerHandle | None = None
        self._closed = False
        self.slow_steps = 0
        self.longest_step_s = 0.0

    def run(self, step: Callable[[], T]) -> asyncio.Future[T]:
        """Run `step` on a thread; the future gets what it returns or raises."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._jobs.put((future, step))
        if self._threads == 0:
            self._add_thread()
        if self._watch is None:
            self._watch = self._loop.call_later(SLOW_STEP_S, self._look_for_slow_steps)
        return future

    def close(self) -> None:
        """Forget waiting steps. A step that still runs ends with the process, at the latest."""
        self._closed = True
        if self._watch is not None:
            self._watch.cancel()
        for _ in range(self._threads):
            self._jobs.put(None)

    # ---------------------------------------------------------------- on the event loop

    def _look_for_slow_steps(self) -> None:
        """Add a thread when steps wait and every thread is held by a slow one."""
        self._watch = None
        waiting = not self._jobs.empty()
        now = time.monotonic()
        starts = list(self._busy_since.values())
        all_slow = len(starts) >= self._threads and all(now - s > SLOW_STEP_S for s in starts)
        if waiting and all_slow and self._threads < MAX_THREADS:
            self._add_thread()
        if waiting or starts:
            self._watch = self._loop.call_later(SLOW_STEP_S, self._look_for_slow_steps)

    def _add_thread(self) -> None:
        with self._lock:
            self._threads += 1
        # A daemon: a task that blocks for good must not keep the process from ending.
        threading.Thread(target=self._work, name=THREAD_NAME, daemon=True).start()

    def _deliver(self) -> None:
        self._delivery_due = False
        while self._results:
            future, value, error = self._results.popleft()
            if future.done():
                continue  # its item was given up meanwhile
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)

    # ---------------------------------------------------------------- on the threads

    def _work(self) -> None:
        ident = threading.get_ident()
        while not self._closed:
            try:
                job = self._jobs.get(timeout=_IDLE_S)
            except queue.Empty:
                with self._lock:
                    if self._threads > 1:
                        self._threads -= 1
                        return
                continue
            if job is None:
                return
            future, step = job
            start = self._busy_since[ident] = time.monotonic()
            value, error = None, None
            try:
                value = step()
            except BaseException as caught:  # noqa: BLE001 (handed to whoever waits)
                error = caught
            del self._busy_since[ident]
            self._note_duration(time.monotonic() - start)
            self._results.append((future, value, error))
            if not self._delivery_due:
                self._delivery_due = True
                try:
                    self._loop.call_soon_threadsafe(self._deliver)
                except RuntimeError:
                    return  # the loop is closed: the process is ending

    def _note_duration(self, seconds: float) -> None:
        self.longest_step_s = max(self.longest_step_s, seconds)
        if seconds <= SLOW_STEP_S:
            return
        self.slow_steps += 1
        if seconds > WARN_STEP_S and self.slow_steps & (self.slow_steps - 1) == 0:
            log.warning(
                "a task computed or slept for %.1f s between two requests (%d slow steps so "
                "far); it holds one of %d threads meanwhile",
                seconds,
                self.slow_steps,
                MAX_THREADS,
            )
