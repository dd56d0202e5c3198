"""Virtual time, and processes in it: the ground that the simulation stands on.

All processes of a simulation share one event loop whose clock jumps to the next timer. What a
process does carries it in its context, so that the loop can hold a stopped process's callbacks
back, and a killed one's calls can be denied any effect. Nothing here reads a clock or depends on
an order that is not fixed: the same seed does the same again.
"""

from __future__ import annotations

import asyncio
import heapq
import sys
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from contextvars import Context, ContextVar, copy_context
from functools import partial
from random import Random
from typing import Any, ClassVar

_current: ContextVar[Process | None] = ContextVar("process", default=None)


class DeadlockError(Exception):
    """What the simulation waits for never comes: nothing is scheduled any more, or too much was."""


class ProcessKilled(BaseException):
    """The process died inside this call; nobody may catch it and go on."""


class _Handle(asyncio.Handle):
    __slots__ = ("process",)


class _Timer(asyncio.TimerHandle):
    __slots__ = ("process",)


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop without I/O; its time passes when nothing else is left to do.

    `defects` holds what was raised where nobody was there to catch it. After `most_callbacks` it
    gives up, so that a loop that never ends is a failure and no standstill.
    """

    def __init__(self, most_callbacks: int = sys.maxsize) -> None:
        super().__init__()
        self._callbacks_left = most_callbacks
        self._now = 0.0
        self._due: deque[_Handle | _Timer] = deque()
        self._timers: list[tuple[float, int, _Timer]] = []
        self._timer_count = 0
        self.defects: list[str] = []
        self.set_task_factory(_make_task)
        self.set_exception_handler(self._note_defect)

    def time(self) -> float:
        return self._now

    def call_soon(
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> _Handle:
        context = context or copy_context()
        handle = _Handle(callback, args, self, context)
        handle.process = context.get(_current)
        self._due.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_at(
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> _Timer:
        context = context or copy_context()
        timer = _Timer(when, callback, args, self, context)
        timer.process = context.get(_current)
        self._timer_count += 1
        heapq.heappush(self._timers, (when, self._timer_count, timer))
        return timer

    def call_later(
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> _Timer:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def resume(self, handles: deque[_Handle | _Timer]) -> None:
        """Let callbacks that were held back run, in their order."""
        self._due.extend(handles)

    def _run_once(self) -> None:
        due = self._due
        if not due:
            self._pass_time()
        self._callbacks_left -= len(due)
        if self._callbacks_left < 0:
            raise DeadlockError(f"too much happens, up to {self._now:.3f} s")
        for _ in range(len(due)):
            handle = due.popleft()
            if handle._cancelled:
                continue
            process = handle.process
            if process is not None and process.held_back is not None:
                process.held_back.append(handle)
            else:
                handle._run()

    def _pass_time(self) -> None:
        timers = self._timers
        while timers:
            when, _, timer = heapq.heappop(timers)
            if not timer._cancelled:
                self._now = max(self._now, when)
                self._due.append(timer)
                return
        raise DeadlockError(f"everything waits for ever at {self._now:.3f} s")

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It stays in the heap until its time."""

    def _note_defect(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        process = _current.get()
        if process is None or process.is_alive:
            self.defects.append(f"{context.get('message')}: {context.get('exception')!r}")


def _make_task(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any
) -> asyncio.Task[Any]:
    task = asyncio.Task(coroutine, loop=loop, **options)
    if (process := _current.get()) is not None:
        process.note_task(task)
    return task


class Process:
    """One operating-system process on one host. Its end code is `ending`, "killed" included."""

    def __init__(self, name: str, host: str, pid: int = 0) -> None:
        self.name = name
        self.host = host
        self.pid = pid
        self.is_alive = True
        self.ending: Any = None
        self.held_back: deque[_Handle | _Timer] | None = None
        self.at_end: list[Callable[[], None]] = []
        self.stepping: SteppedThread | None = None
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._threads: list[SteppedThread] = []
        self.context = copy_context()
        self.context.run(_current.set, self)

    @property
    def is_stopped(self) -> bool:
        return self.held_back is not None

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine in this process, beside what it does already."""
        loop = asyncio.get_running_loop()
        return self.context.copy().run(loop.create_task, coroutine)

    def run_main(self, main: Coroutine[Any, Any, Any]) -> None:
        """Start the process; when `main` returns, the process has ended with its value."""
        self.spawn(self._main(main))

    async def _main(self, main: Coroutine[Any, Any, Any]) -> None:
        try:
            ending = await main
        except Exception as error:  # noqa: BLE001 (what ends a process, whatever it is)
            ending = error
        if self.is_alive:
            self._end(ending)

    def kill(self) -> None:
        """SIGKILL: from here on nothing that it still does has an effect on anybody else."""
        if self.is_alive:
            self._end("killed")

    def stop(self) -> None:
        """SIGSTOP."""
        if self.is_alive and self.held_back is None:
            self.held_back = deque()

    def go_on(self) -> None:
        """SIGCONT."""
        if self.held_back is not None:
            held_back, self.held_back = self.held_back, None
            asyncio.get_running_loop().resume(held_back)

    def note_task(self, task: asyncio.Task[Any]) -> None:
        self._tasks[task] = None
        task.add_done_callback(self._forget_task)

    def note_thread(self, thread: SteppedThread) -> None:
        self._threads.append(thread)

    def _forget_task(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)

    def _end(self, ending: Any) -> None:
        self.is_alive = False
        self.ending = ending
        if self.stepping is None:
            self._clear_up()
        # Otherwise it died inside a call of a thread, which is unwound first.

    def clear_up_after_step(self) -> None:
        """The call in which the process died is over."""
        self.stepping = None
        self._clear_up()

    def _clear_up(self) -> None:
        for thread in self._threads:
            thread.end()
        self.go_on()
        for task in list(self._tasks):
            task.cancel()
        for callback in self.at_end:
            callback()

    @property
    def open_tasks(self) -> list[asyncio.Task[Any]]:
        """What of it still runs; empty a moment after its end."""
        return list(self._tasks)


async def until(condition: Callable[[], bool], *, every_s: float = 1.0) -> None:
    """Return when the condition holds; looking costs nothing but virtual time."""
    while not condition():  # noqa: ASYNC110 (what is waited for knows nothing of events)
        await asyncio.sleep(every_s)


class VirtualThread(Executor):
    """Runs each call at one moment, after a latency, and tells of it after another one.

    So a kill or a stop comes before or after a call, or at one of its file operations, but no
    other process does anything between two of them.
    """

    def __init__(self, process: Process, rng: Random, slowness: Callable[[], float]) -> None:
        self._process = process
        self._rng = rng
        self._slowness = slowness
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._busy = False

    def submit(self, call: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._calls.append((future, partial(call, *args, **named)))
        if not self._process.is_alive:
            _drain(self._calls)
        elif not self._busy:
            self._busy = True
            self._later(self._begin)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """There is nothing to end."""

    def _later(self, callback: Callable[..., Any], *args: Any) -> None:
        delay_s = self._rng.uniform(0.0001, 0.004) + self._slowness()
        asyncio.get_running_loop().call_later(delay_s, callback, *args)

    def _begin(self) -> None:
        if not self._process.is_alive:
            _drain(self._calls)
            return
        future, call = self._calls.popleft()
        result, error = None, None
        if future.set_running_or_notify_cancel():
            result, error = _outcome(call)
        self._later(self._end, future, result, error)

    def _end(self, future: Future[Any], result: Any, error: BaseException | None) -> None:
        if not future.cancelled():
            _tell(self._process, future, result, error)
        if self._calls:
            self._later(self._begin)
        else:
            self._busy = False


class SteppedThread(Executor):
    """A real thread that hands over to the loop at each file operation, for a virtual latency.

    Only one of all threads ever runs. Between two of its steps other processes do theirs, and the
    process may be stopped or killed: whatever order a preemptive system can bring about.
    """

    running: ClassVar[SteppedThread | None] = None

    def __init__(self, process: Process, rng: Random, slowness: Callable[[], float]) -> None:
        self._process = process
        self._rng = rng
        self._slowness = slowness
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._call: Callable[[], Any] | None = None
        self._future: Future[Any] | None = None
        self._outcome: tuple[Any, BaseException | None] | None = None
        self._turn = threading.Semaphore(0)
        self._given_back = threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._is_over = False
        self._shut_down = False
        process.note_thread(self)

    def submit(self, call: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._calls.append((future, partial(call, *args, **named)))
        if not self._process.is_alive:
            _drain(self._calls)
        elif self._future is None:
            self._take_next()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Calls that were submitted are still run; then the thread ends."""
        self._shut_down = True
        if self._future is None:
            self.end()

    def step(self) -> None:
        """In the thread: let the others go on; return when it is our turn again."""
        self._given_back.release()
        self._turn.acquire()
        if not self._process.is_alive:
            raise ProcessKilled

    def end(self) -> None:
        """Unwind what runs and end the thread."""
        _drain(self._calls)
        self._call = None
        while self._thread is not None and not self._is_over:
            self._turn.release()
            self._given_back.acquire()
        if self._thread is not None:
            self._thread.join()
        if self._future is not None and not self._future.done():
            self._future.set_exception(OSError("the process has ended"))

    def _take_next(self) -> None:
        self._future, self._call = self._calls.popleft()
        self._outcome = None
        if self._future.set_running_or_notify_cancel():
            self._later()
        else:
            self._finish()

    def _later(self) -> None:
        delay_s = self._rng.uniform(0.0001, 0.002) + self._slowness()
        asyncio.get_running_loop().call_later(delay_s, self._go)

    def _go(self) -> None:
        process = self._process
        if not process.is_alive or self._future is None:
            return
        if self._outcome is not None:
            self._finish()
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        process.stepping = SteppedThread.running = self
        self._turn.release()
        self._given_back.acquire()
        process.stepping = SteppedThread.running = None
        if process.is_alive:
            self._later()
        else:
            process.clear_up_after_step()

    def _finish(self) -> None:
        assert self._future is not None
        future, self._future = self._future, None
        if self._outcome is not None:
            _tell(self._process, future, *self._outcome)
        if self._calls:
            self._take_next()
        elif self._shut_down:
            self.end()

    def _run(self) -> None:
        while True:
            self._turn.acquire()
            call, self._call = self._call, None
            if call is None:
                break
            self._outcome = _outcome(call)
            self._given_back.release()
        self._is_over = True
        self._given_back.release()


class SteppedLock:
    """threading.Lock for code that runs in stepped threads: who waits lets the others go on."""

    def __init__(self) -> None:
        self._is_held = False

    def __enter__(self) -> None:
        while self._is_held:
            assert SteppedThread.running is not None
            SteppedThread.running.step()
        self._is_held = True

    def __exit__(self, *_: object) -> None:
        self._is_held = False


def _drain(calls: deque[tuple[Future[Any], Callable[[], Any]]]) -> None:
    while calls:
        future, _ = calls.popleft()
        if future.set_running_or_notify_cancel():
            future.set_exception(OSError("the process has ended"))


def _outcome(call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return call(), None
    except BaseException as error:  # noqa: BLE001 (as a thread does: it goes to the caller)
        return None, error


def _tell(process: Process, future: Future[Any], result: Any, error: BaseException | None) -> None:
    if not process.is_alive:
        future.set_exception(OSError("the process has ended"))
    elif error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
