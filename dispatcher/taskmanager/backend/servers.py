"""The servers that answer for one model: which of them are there, and which one is asked next."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from dispatcher.errors import BackendError
from dispatcher.taskmanager.backend.http import Endpoint, Transport

_FIRST_PROBE_PAUSE_S = 0.25

log = logging.getLogger(__name__)


class Servers:
    """Requests wait here while no server answers; one probe asks for all of them.

    `next_delay_s(n)` is how long to wait before the n-th further probe of a server that is away.
    """

    def __init__(self, next_delay_s: Callable[[int], float]) -> None:
        self._next_delay_s = next_delay_s
        self._all: list[Transport] = []
        self._serving: list[Transport] = []
        self._recovering: dict[Transport, asyncio.Task[None]] = {}
        self._probes: dict[Transport, asyncio.Task[bool]] = {}
        self._open = asyncio.Event()
        self._is_held = False
        self.dead: BackendError | None = None
        self.answered_at = 0.0

    def open(self, endpoints: Sequence[Endpoint]) -> None:
        """Make the connection pools; all servers are believed to be there."""
        self._all = [Transport(endpoint) for endpoint in endpoints]
        self._serving = list(self._all)
        self._open.set()

    @property
    def first(self) -> Transport:
        """The connections to the first server."""
        return self._all[0]

    @property
    def is_open(self) -> bool:
        """Whether some server is believed to answer."""
        return bool(self._serving)

    async def close(self) -> None:
        """Close all connections."""
        for task in (*self._recovering.values(), *self._probes.values()):
            task.cancel()
        for server in self._all:
            await server.close()

    # ---------------------------------------------------------------- which one

    async def wait(self) -> None:
        """Return when a server is there. Raises BackendError when none will ever be."""
        await self._open.wait()
        if self.dead is not None:
            raise self.dead

    def pick(self) -> Transport | None:
        """Return the server that has the fewest requests; None while there is none."""
        if self.dead is not None:
            raise self.dead
        serving = self._serving
        if len(serving) == 1:
            return serving[0]
        return min(serving, key=lambda server: server.in_flight) if serving else None

    async def wait_for_first(self, timeout_s: float) -> None:
        """Return when a server answers. Raises BackendError after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while not any([await answers(server) for server in self._all]):  # noqa: ASYNC110
                    await asyncio.sleep(_FIRST_PROBE_PAUSE_S)  # there is nothing to be told by
        except TimeoutError:
            urls = " or ".join(server.base_url for server in self._all)
            raise BackendError(
                f"no model server answers at {urls} within {timeout_s:.0f} s; check the address, "
                "and that the server is running"
            ) from None

    async def metrics(self) -> str | None:
        """Return the `/metrics` pages of all servers that are there, one behind the other."""
        pages = [await server.get("//metrics") for server in list(self._serving)]
        texts = [p.body.decode("utf-8", "replace") for p in pages if p and p.status == 200]
        return "\n".join(texts) if texts else None

    # ---------------------------------------------------------------- what becomes of them

    async def lives(self, server: Transport) -> bool:
        """Ask a server that let a request down whether it answers at all.

        Thousands may be let down together: one probe tells all of them.
        """
        if server not in self._serving:
            return False
        probe = self._probes.get(server)
        if probe is None:
            probe = self._probes[server] = asyncio.ensure_future(answers(server))
            probe.add_done_callback(lambda _: self._probes.pop(server, None))
        return await asyncio.shield(probe)

    def note_outage(self, server: Transport, problem: object) -> None:
        """A server does not answer: nothing is sent to it until it does again."""
        if server not in self._serving or self.dead is not None:
            return
        log.warning("the model server at %s is away (%s); waiting", server.base_url, problem)
        self._take_away(server)
        self._recovering[server] = asyncio.ensure_future(self._recover(server))

    def declare_away(self, reason: object) -> None:
        """All servers are away until `move_to` names a new one."""
        self._is_held = True
        for server in list(self._serving):
            log.warning("the model server at %s is away: %s", server.base_url, reason)
            self._take_away(server)

    def declare_dead(self, error: BackendError) -> None:
        """No server will ever be there again: whoever waits, or asks, gets the error."""
        self.dead = error
        self._open.set()

    async def move_to(self, endpoint: Endpoint) -> None:
        """There is one server now, at this endpoint."""
        gone, self._all = self._all, [Transport(endpoint)]
        for task in self._recovering.values():
            task.cancel()
        self._recovering.clear()
        self._is_held = False
        self._serving = list(self._all)
        self._open.set()
        for server in gone:
            await server.close()

    # ---------------------------------------------------------------- inside

    def _take_away(self, server: Transport) -> None:
        self._serving.remove(server)
        if not self._serving and self.dead is None:
            self._open.clear()

    async def _recover(self, server: Transport) -> None:
        tries = 0
        while self._is_held or not await answers(server):
            tries += 1
            await asyncio.sleep(self._next_delay_s(tries))
        log.warning("the model server at %s answers again", server.base_url)
        self._recovering.pop(server, None)
        self._serving.append(server)
        self._open.set()


async def answers(server: Transport) -> bool:
    """Say whether a server answers at all, and does not call itself dead."""
    reply = await server.get("/models")
    if reply is None or reply.status >= 500:
        return False
    if not server.endpoint.is_local:
        return True
    # vLLM lists its models for a moment after its engine core died, and answers 500 to requests.
    health = await server.get("//health")
    return health is not None and health.status != 503
