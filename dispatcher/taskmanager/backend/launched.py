"""A backend whose model server this process launches, starts again when it fails, and ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from dispatcher.core.backoff import delay_s
from dispatcher.core.saturation import Saturation
from dispatcher.errors import BackendError
from dispatcher.models import ModelStats
from dispatcher.taskmanager.backend.base import DEFAULT_LIMIT, Backend
from dispatcher.taskmanager.backend.bodies import Sending
from dispatcher.taskmanager.backend.http import Endpoint
from dispatcher.taskmanager.backend.openai_compatible import OpenAICompatibleBackend, RetryPolicy
from dispatcher.taskmanager.backend.process import ServerProcess
from dispatcher.taskmanager.backend.request import Request, Response
from dispatcher.taskmanager.backend.watch import HttpEngine, until_hung

DEFAULT_RESTARTS = 4
DEFAULT_HANG_TIMEOUT_S = 180.0
STOP_GRACE_S = 2.0
_BUDGET_PERIOD_S = 3600.0
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_SHORT_HANG_S = 60.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOptions:
    """What all launched model servers have in common.

    `engine_restarts` is how often within an hour a server that died or hung is started again;
    `hang_timeout_s` is how long one may make no progress with requests in flight.
    """

    log_dir: Path
    limit: int = DEFAULT_LIMIT
    saturation: Saturation | None = None
    startup_timeout_s: float = 1800.0
    request_timeout_s: float = 600.0
    engine_restarts: int = DEFAULT_RESTARTS
    hang_timeout_s: float = DEFAULT_HANG_TIMEOUT_S
    retries: RetryPolicy = field(default_factory=RetryPolicy)
    sending: Sending = field(default_factory=Sending)


class RestartBudget:
    """How often something may be started again: `restarts` times within `period_s`."""

    def __init__(self, restarts: int, period_s: float = _BUDGET_PERIOD_S) -> None:
        self.restarts = restarts
        self._period_s = period_s
        self._spent_at: deque[float] = deque()

    def left(self, now: float) -> int:
        """Return how many are left."""
        while self._spent_at and self._spent_at[0] <= now - self._period_s:
            self._spent_at.popleft()
        return self.restarts - len(self._spent_at)

    def spend(self, now: float) -> bool:
        """Take one restart out of the budget; False when there is none left."""
        if self.left(now) <= 0:
            return False
        self._spent_at.append(now)
        return True

    def refund(self) -> None:
        """Put the last one back."""
        self._spent_at.pop()


class LaunchedBackend(Backend):
    """Owns a server process and talks to it.

    When that dies or hangs, requests wait while it is started again. Beyond the budget of restarts
    they raise BackendError.
    """

    def __init__(self, options: LaunchOptions) -> None:
        super().__init__(options.limit)
        self.options = options
        self._budget = RestartBudget(options.engine_restarts)
        self._rng = Random()
        self._process: ServerProcess | None = None
        self._client: OpenAICompatibleBackend | None = None
        self._minding: asyncio.Task[None] | None = None

    @abstractmethod
    async def launch(self) -> Endpoint:
        """Start the server through `run_process` and return where it answers."""

    async def run_process(self, process: ServerProcess) -> None:
        """Start a process that `close` will end, replacing the one before it."""
        await self._end_process()
        self._process = process
        await process.start()

    # ---------------------------------------------------------------- life

    async def start(self) -> None:
        """Launch the server and return when it answers. Raises BackendError."""
        endpoint = await self.launch()
        self._client = OpenAICompatibleBackend(
            endpoint,
            saturation=self.options.saturation,
            # One set of them, so that whoever sets this backend's limit sets the client's.
            slots=self.slots,
            retries=self.options.retries,
            sending=self.options.sending,
        )
        await self._client.start()
        self._minding = asyncio.ensure_future(self._mind(self._client))

    async def close(self) -> None:
        """Close connections and end the server with all its children."""
        if self._minding is not None:
            self._minding.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._minding
        if self._client is not None:
            await self._client.close()
        await self._end_process()

    async def _end_process(self) -> None:
        if self._process is not None:
            await self._process.stop(STOP_GRACE_S)

    # ---------------------------------------------------------------- what the manager asks

    @property
    def client(self) -> OpenAICompatibleBackend | None:
        """What talks to the server; None before `start`."""
        return self._client

    async def process(self, request: Request, order: int = 0) -> Response:
        """Answer one request."""
        assert self._client is not None
        return await self._client.process(request, order)

    def room(self) -> int:
        """Return how many more items may be started now."""
        return self._client.room() if self._client is not None else super().room()

    def healthy(self) -> bool:
        """Say whether the server answered when it was last needed; not while it is restarted."""
        return self._client is not None and self._client.healthy()

    def accounts(self) -> Mapping[str, ModelStats]:
        """Return what the model answered."""
        return self._client.accounts() if self._client is not None else {}

    # ---------------------------------------------------------------- dead, hung, and back again

    async def _mind(self, client: OpenAICompatibleBackend) -> None:
        """Start the server again whenever it dies or hangs, until the budget is used up."""
        try:
            while True:
                problem = await self._until_trouble(client)
                client.declare_away("it is started again")
                await client.move_to(await self._revive(client, problem))
        except BackendError as error:
            client.declare_dead(error)
        except OSError as error:  # a full disk, say, where its log is to go
            client.declare_dead(BackendError(f"the model server cannot be started again: {error}"))
        except Exception as error:  # a defect: requests would wait for ever, and nobody know why
            log.exception("the model server is not watched any more")
            client.declare_dead(BackendError(f"the model server is not watched any more: {error}"))

    async def _until_trouble(self, client: OpenAICompatibleBackend) -> BackendError:
        """Return what went wrong with the server, once something did."""
        process = self._process
        assert process is not None
        ends = asyncio.ensure_future(process.wait())
        hangs = asyncio.ensure_future(until_hung(HttpEngine(client), self._hang_timeout_s()))
        try:
            await asyncio.wait((ends, hangs), return_when=asyncio.FIRST_COMPLETED)
            if not ends.done():
                return process.failure(hangs.result())
            return process.failure(f"ended with exit code {process.exit_code}")
        finally:
            for task in (ends, hangs):
                task.cancel()
            await asyncio.gather(ends, hangs, return_exceptions=True)

    def _hang_timeout_s(self) -> float:
        # A request that times out at a hung server is tried again, a few times: the hang must be
        # found before the tries run out.
        longest_s = max(self.options.request_timeout_s, _SHORT_HANG_S)
        return min(self.options.hang_timeout_s, longest_s)

    async def _revive(self, client: OpenAICompatibleBackend, problem: BackendError) -> Endpoint:
        """Launch the server again and return where it answers now.

        Raises BackendError when it failed too often.
        """
        blaming = asyncio.ensure_future(self._blame(client.orders_in_flight()))
        try:
            # At once: a hung server would keep its requests for as long as they may take.
            await self._end_process()
            spent = self._budget.spend(time.monotonic())
            if not spent and not await blaming:
                raise self._given_up(problem)
            endpoint = await self._relaunch(problem)
            # Before requests go on: an item that must run alone now must not be asked with others.
            if await blaming and spent:
                self._budget.refund()
            return endpoint
        finally:
            blaming.cancel()

    async def _blame(self, orders: set[int]) -> bool:
        """Tell whose requests the server had; return whether it was one item's own doing."""
        if self.on_crash is None or not orders:
            return False
        return await self.on_crash(orders)

    async def _relaunch(self, problem: BackendError) -> Endpoint:
        tries = 0
        while True:
            left = self._budget.left(time.monotonic())
            log.warning("starting it again (%d more restarts within this hour): %s", left, problem)
            began_at = time.monotonic()
            try:
                endpoint = await self.launch()
            except BackendError as error:
                problem = error
            else:
                log.info("the model server is back after %.0f s", time.monotonic() - began_at)
                return endpoint
            if not self._budget.spend(time.monotonic()):
                raise self._given_up(problem)
            tries += 1
            await asyncio.sleep(
                delay_s(tries, initial_s=_FIRST_PAUSE_S, max_s=_LONGEST_PAUSE_S, rng=self._rng)
            )

    def _given_up(self, problem: BackendError) -> BackendError:
        return BackendError(
            f"the model server failed again after {self._budget.restarts} restarts within an hour "
            f"(--engine-restarts): {problem}"
        )
