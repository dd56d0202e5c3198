"""Work from a dispatcher server, with heartbeats from a thread of their own.

The thread has its own connection and event-loop-free client, so that a task which holds up this
process's event loop does not cost the worker its leases.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dispatcher import logs
from dispatcher.client import AsyncWorkClient, WorkClient
from dispatcher.errors import AccessDeniedError, BadRequestError, DispatcherError, UsageError
from dispatcher.models import HeartbeatRequest, HeartbeatResponse, WorkerStats, WorkStatus
from dispatcher.storage.spool import SpoolWriter
from dispatcher.taskmanager.task.base import Task
from dispatcher.taskmanager.tasksource.base import Assignment
from dispatcher.taskmanager.tasksource.leased import LeasedSource

_HEARTBEAT_TIMEOUT_S = 10.0
_BEATS_PER_TERM = 3
_LONGEST_PAUSE_S = 5.0
_FIRST_TERM_S = 30.0
_SAY_AFTER_S = 2.0

log = logging.getLogger(__name__)


class Heartbeats:
    """Sends a heartbeat three times a lease term, at least every 5 s, until stopped.

    A server that does not let this worker in ends them: `on_refusal` gets the error.
    """

    def __init__(
        self,
        address: str,
        token: str | None,
        describe: Callable[[], HeartbeatRequest],
        on_reply: Callable[[HeartbeatResponse], None],
        on_refusal: Callable[[DispatcherError], None],
        fingerprint: str | None = None,
    ) -> None:
        self._client = WorkClient(
            address, token=token, fingerprint=fingerprint, timeout_s=_HEARTBEAT_TIMEOUT_S
        )
        self._describe = describe
        self._on_reply = on_reply
        self._on_refusal = on_refusal
        self._loop = asyncio.get_running_loop()
        self._stop = threading.Event()
        self._lag_s = 0.0
        self.first_taken = asyncio.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin; the first heartbeat leaves at once."""
        self._thread.start()

    def stop(self) -> None:
        """Send no more; a call under way is not waited for."""
        self._stop.set()

    def _beat(self) -> None:
        term_s = _FIRST_TERM_S
        while not self._stop.is_set():
            request = self._describe()
            request.lag_s = round(self._lag_s, 3)
            try:
                reply = self._client.heartbeat(request)
            except BadRequestError as error:
                log.warning("%s", error)
                reply = HeartbeatResponse(WorkStatus.SERVER_UNAVAILABLE)
            except (AccessDeniedError, UsageError) as error:
                with contextlib.suppress(RuntimeError):  # the process is ending
                    self._loop.call_soon_threadsafe(self._give_up, error)
                break
            if reply.status is WorkStatus.OK:
                term_s = reply.lease_term_s
            try:
                self._loop.call_soon_threadsafe(self._deliver, reply, time.monotonic())
            except RuntimeError:
                return  # the loop is closed: the process is ending
            answered = reply.status is WorkStatus.OK
            pause_s = min(term_s / _BEATS_PER_TERM, _LONGEST_PAUSE_S)
            self._stop.wait(pause_s if answered else min(1.0, term_s / 10))
        self._client.close()

    def _give_up(self, error: DispatcherError) -> None:
        self.first_taken.set()
        if not self._stop.is_set():
            self._on_refusal(error)

    def _deliver(self, reply: HeartbeatResponse, sent_at: float) -> None:
        self._lag_s = time.monotonic() - sent_at
        if reply.status is WorkStatus.OK:
            self.first_taken.set()
            self._on_reply(reply)


class DispatcherTaskSource(LeasedSource):
    """Items of a dispatcher server at `address`, which may be @PATH (see client.py)."""

    def __init__(
        self,
        address: str,
        task_class: type[Task],
        *,
        worker: str,
        token: str | None = None,
        model: str | None = None,
        batch_size: int,
        server_timeout_s: float,
        backend_up: Callable[[], bool],
        stats: Callable[[], WorkerStats],
        fingerprint: str | None = None,
    ) -> None:
        self._client = AsyncWorkClient(address, worker, token=token, fingerprint=fingerprint)
        super().__init__(
            self._client,
            task_class,
            worker=worker,
            model=model,
            batch_size=batch_size,
            server_timeout_s=server_timeout_s,
            backend_up=backend_up,
            stats=stats,
            # Whoever came by the file in the state directory may reach the spool beside it.
            spool=SpoolWriter(Path(address[1:]), worker) if address.startswith("@") else None,
        )
        self._heartbeats = Heartbeats(
            address, token, self.heartbeat_request, self.take_verdict, self._fail, fingerprint
        )

    async def is_over(self) -> bool:
        """Say whether the run is complete, before a model is loaded for nothing."""
        try:
            status = await self._client.status()
        except BaseException:  # refused, or stopped by a signal: nothing was begun
            await self._client.close()
            raise
        logs.know(run=status.get("run"))
        is_over = status["state"] == "complete" if "state" in status else self._client.left_complete
        if not is_over:
            return False
        await self._client.close()
        return True

    async def start(self, wanted: Callable[[], int]) -> None:
        """Make this worker known to the server, then begin to fetch."""
        self._heartbeats.start()
        # Leases given before the first heartbeat would be those of a client without any.
        taken = self._heartbeats.first_taken.wait()
        waiting = asyncio.get_running_loop().call_later(
            _SAY_AFTER_S, log.warning, "the server does not answer; waiting for it"
        )
        try:
            await asyncio.wait_for(taken, self._server_timeout_s)
        except TimeoutError:
            raise self.server_lost(self._server_timeout_s) from None
        finally:
            waiting.cancel()
        if self._failure is not None:
            raise self._failure
        await super().start(wanted)

    async def give_back(self, assignments: list[Assignment], reason: str) -> None:
        """Stop heartbeats and release everything."""
        self._heartbeats.stop()
        try:
            await super().give_back(assignments, reason)
        except (AccessDeniedError, UsageError) as error:
            # Why this worker ends, most likely; there is nobody to give anything back to.
            log.warning("%s", error)
        finally:
            await self._client.close()

    async def close(self) -> None:
        """Return when everything is reported."""
        await super().close()
        self._heartbeats.stop()

    def _fail(self, error: DispatcherError) -> None:
        """End the work: the manager gets `error` when it asks for the next item."""
        self._failure = self._failure or error
        self._something_to_take.set()
        for task in (self._exchange, self._poll, self._recording):
            if task is not None:
                task.cancel()
