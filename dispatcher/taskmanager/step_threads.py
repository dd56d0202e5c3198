"""Threads for task code, so that no task can block the event loop.

Steps of all tasks run one after the other on one thread, which costs two thread switches a
*batch* of steps under load. When a step takes long, the steps behind it move on to another
thread, as Go's scheduler takes the processor from a goroutine stuck in a system call. Whoever
had a slow step gives its further ones to a lane of their own, so that quick ones need not queue
up behind them.

Threads that wait (files, sleep, the network) cost nothing, so there may be many. Those that
compute in Python share one interpreter lock with the event loop, which was measured to run 5 ms
late beside one of them, 50 ms beside 16 (1.3 s now and then) and 1.1 s beside 64, while all of
them together computed no more than one alone. So while they hold the lock only a few are
started, and the lock changes hands every 1 ms instead of every 5 ms, which made the loop 4 times
as prompt.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

SLOW_STEP_S = 0.05
"""A step longer than this holds others up; the steps behind it get another thread."""

WARN_STEP_S = 1.0

MAX_THREADS = 64
"""Threads of one lane."""

COMPUTING_THREADS = {"quick": 6, "slow": 2}
"""Threads of each lane while they hold the interpreter lock between them.

In the lane of quick steps, more: what is slow there surprises, and others must get past it.
"""

THREAD_NAME = "task-steps"
_IDLE_S = 10.0
_SWITCH_S = 0.001
_LOCK_IS_HELD = (0.3, 1.2)
"""CPU seconds a second: with fewer they wait for something, with more they compute outside it.

Other processes may leave one that computes without pause a third of a CPU.
"""

log = logging.getLogger(__name__)


class _Job(NamedTuple):
    future: asyncio.Future[Any]
    step: Callable[[], Any]
    owner: object | None


class _Done(NamedTuple):
    job: _Job
    value: Any
    error: BaseException | None
    seconds: float


class StepThreads:
    """Runs callables on threads and hands their results back to the event loop.

    `slow_steps` counts those that took longer than SLOW_STEP_S.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._results: deque[_Done] = deque()
        self._delivery_due = False
        self._quick = _Lane(self._take_back)
        self._slow = _Lane(self._take_back)
        self._slow_owners: weakref.WeakSet[object] = weakref.WeakSet()
        self._watch: asyncio.TimerHandle | None = None
        self._cpu = _CpuOfThreads()
        self._is_prompt = False
        self.slow_steps = 0
        self.longest_step_s = 0.0

    def run(self, step: Callable[[], T], owner: object | None = None) -> asyncio.Future[T]:
        """Run `step` on a thread; the future gets what it returns or raises.

        `owner` is whose step it is: after a slow one, its further ones are expected to be slow.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        is_slow = bool(self._slow_owners) and owner in self._slow_owners
        (self._slow if is_slow else self._quick).put(_Job(future, step, owner))
        if self._watch is None:
            self._cpu.share_since_last()
            self._watch = self._loop.call_later(SLOW_STEP_S, self._look_for_slow_steps)
        return future

    def close(self) -> None:
        """Forget waiting steps. A step that still runs ends with the process, at the latest."""
        if self._watch is not None:
            self._watch.cancel()
        self._quick.close()
        self._slow.close()
        if self._is_prompt:
            self._is_prompt = False
            _prompt_switches.leave()

    # ---------------------------------------------------------------- on the event loop

    def _look_for_slow_steps(self) -> None:
        """Let lanes that are stuck have another thread, fewer when they compute."""
        least, most = _LOCK_IS_HELD
        lock_is_held = least <= self._cpu.share_since_last() <= most
        if lock_is_held and not self._is_prompt:
            self._is_prompt = True
            _prompt_switches.enter()
        for lane, name in ((self._quick, "quick"), (self._slow, "slow")):
            lane.help(COMPUTING_THREADS[name] if lock_is_held else MAX_THREADS)
        self._watch = None
        if self._quick.is_busy or self._slow.is_busy:
            self._watch = self._loop.call_later(SLOW_STEP_S, self._look_for_slow_steps)

    def _deliver(self) -> None:
        self._delivery_due = False
        while self._results:
            (future, _, owner), value, error, seconds = self._results.popleft()
            if seconds > self.longest_step_s:
                self.longest_step_s = seconds
            if seconds > SLOW_STEP_S:
                self._note_slow(owner, seconds)
            if future.done():
                continue  # its item was given up meanwhile
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)

    def _note_slow(self, owner: object | None, seconds: float) -> None:
        self.slow_steps += 1
        if owner is not None:
            self._slow_owners.add(owner)
        if seconds > WARN_STEP_S and self.slow_steps & (self.slow_steps - 1) == 0:
            log.warning(
                "a task computed or slept for %.1f s between two requests (%d slow steps so "
                "far); it holds one of %d threads meanwhile",
                seconds,
                self.slow_steps,
                MAX_THREADS,
            )

    # ---------------------------------------------------------------- on the threads

    def _take_back(self, done: _Done) -> None:
        """Take what a step came to. Raises RuntimeError when the loop is closed."""
        self._results.append(done)
        if not self._delivery_due:
            self._delivery_due = True
            self._loop.call_soon_threadsafe(self._deliver)


class _Lane:
    """A queue of steps and the threads that run them; the first step brings the first thread."""

    def __init__(self, take_back: Callable[[_Done], None]) -> None:
        self._take_back = take_back
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()  # None ends a thread
        self._busy_since: dict[int, float] = {}
        self._threads = 0
        self._lock = threading.Lock()
        self._closed = False

    @property
    def is_busy(self) -> bool:
        """True while steps run or wait."""
        return bool(self._busy_since) or not self._jobs.empty()

    def put(self, job: _Job) -> None:
        """Queue a step."""
        self._jobs.put(job)
        if self._threads == 0:
            self._add_thread()

    def help(self, most: int) -> None:
        """Add a thread, up to so many, when steps wait and every thread is held by a slow one."""
        if self._jobs.empty() or self._threads >= min(most, MAX_THREADS):
            return
        now = time.monotonic()
        starts = list(self._busy_since.values())
        if len(starts) >= self._threads and all(now - s > SLOW_STEP_S for s in starts):
            self._add_thread()

    def close(self) -> None:
        """Run nothing more."""
        self._closed = True
        for _ in range(self._threads):
            self._jobs.put(None)

    def _add_thread(self) -> None:
        with self._lock:
            self._threads += 1
        # A daemon: a task that blocks for good must not keep the process from ending.
        threading.Thread(target=self._work, name=THREAD_NAME, daemon=True).start()

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
            start = self._busy_since[ident] = time.monotonic()
            value, error = None, None
            try:
                value = job.step()
            except BaseException as caught:  # noqa: BLE001 (handed to whoever waits)
                error = caught
            del self._busy_since[ident]
            try:
                self._take_back(_Done(job, value, error, time.monotonic() - start))
            except RuntimeError:
                return  # the loop is closed: the process is ending


class _PromptSwitches:
    """The interpreter's switch interval, short from the first who wants it so to the last.

    It is one for the process: two that each put back what they found could leave it short.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted_by = 0
        self._usual_s = 0.0

    def enter(self) -> None:
        with self._lock:
            if self._wanted_by == 0:
                self._usual_s = sys.getswitchinterval()
                sys.setswitchinterval(min(self._usual_s, _SWITCH_S))
            self._wanted_by += 1

    def leave(self) -> None:
        with self._lock:
            self._wanted_by -= 1
            if self._wanted_by == 0:
                sys.setswitchinterval(self._usual_s)


_prompt_switches = _PromptSwitches()


class _CpuOfThreads:
    """CPU time of all threads of this process but the one that asks, the event loop's."""

    def __init__(self) -> None:
        self._wall_s, self._cpu_s = self._read()

    def share_since_last(self) -> float:
        """Return the CPU seconds used in a second, since the last call."""
        wall_s, cpu_s = self._read()
        share = (cpu_s - self._cpu_s) / max(wall_s - self._wall_s, 1e-9)
        self._wall_s, self._cpu_s = wall_s, cpu_s
        return share

    @staticmethod
    def _read() -> tuple[float, float]:
        return time.monotonic(), time.process_time() - time.thread_time()
