"""The inhabitants of the simulation: servers, the network, and workers of two kinds.

The servers run the real DispatchService, most workers the real LeasedSource. What stands between
them, the network, and what stands around them, the task manager and the main function of the
server, are models in a few lines.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from dispatcher.client import RENEW_TIMEOUT_S
from dispatcher.config import RunSettings
from dispatcher.errors import DispatcherError, RunLockedError, ServerLostError, StorageError
from dispatcher.models import (
    BatchResultResponse,
    BatchWorkResponse,
    HeartbeatRequest,
    HeartbeatResponse,
    Outcome,
    ReleaseItem,
    ReleaseWorkResponse,
    RenewedLease,
    ResultItem,
    StepItem,
    StepOutcome,
    StepsResponse,
    WorkerStats,
    WorkItem,
    WorkStatus,
)
from dispatcher.service import DispatchService
from dispatcher.storage.journal import JOURNAL_DIR
from dispatcher.storage.ownership import OWNERS_DIR, Ownership
from dispatcher.taskmanager.execution import Answered, Attempt, Raised, WantsRetry
from dispatcher.taskmanager.steps import Asked
from dispatcher.taskmanager.tasksource.base import Assignment
from dispatcher.taskmanager.tasksource.leased import LeasedSource
from tests.faults.oracle import Ledger, result_of
from tests.faults.sim_disk import ProcessFiles, SimDisk, SimLocks, identity_of
from tests.faults.sim_loop import Process, SteppedThread, VirtualThread, until
from tests.faults.sim_operator import Operator, PauseLedger
from tests.faults.sim_steps import SimTask, StepLedger, yields_of

CALL_TIMEOUT_S = 60.0
HEARTBEAT_TIMEOUT_S = 10.0
SERVER_TIMEOUT_S = 300.0
LINGER_S = 15.0
DRAIN_S = 20.0
_SETTLED = (Outcome.ACCEPTED, Outcome.DUPLICATE)
_FRAME = re.compile(rb"@\d{12} (\d{10}) [0-9a-f]{8} [0-9a-f]{8}\n")
_NAMED = re.compile(r"process (\d+) on \w+")


@dataclass
class Conduct:
    """How workers and the network misbehave while faults last: chances per item and per call."""

    invalid: float = 0.0
    retry: float = 0.0
    raises: float = 0.0
    sits: float = 0.0
    rewords: float = 0.0
    lost_request: float = 0.0
    lost_reply: float = 0.0
    twice: float = 0.0
    slow_call: float = 0.0


@dataclass
class World:
    """What all processes of one simulation share, and what is noted about them."""

    rng: Random
    settings: RunSettings
    disk: SimDisk
    locks: SimLocks
    ledger: Ledger
    conduct: Conduct
    mean_s: float
    beat_s: float = 10.0
    stepped: bool = False
    nobody_pays: bool = False
    servers: list[Server] = field(default_factory=list)
    workers: list[Worker | OldClient] = field(default_factory=list)
    announced: Server | None = None
    is_complete: bool = False
    faults_last: bool = True
    contact_is_sure: bool = True
    counts: Counter[str] = field(default_factory=Counter)
    events: list[str] = field(default_factory=list)
    leases: dict[str, tuple[int, str]] = field(default_factory=dict)
    granted_at: dict[str, float] = field(default_factory=dict)
    crashed_leases: set[str | None] = field(default_factory=set)
    renewed_by: dict[str, tuple[str, object]] = field(default_factory=dict)
    charges: Counter[int] = field(default_factory=Counter)
    told_done: dict[int, float] = field(default_factory=dict)
    acknowledging_epoch: int = 0
    final_status: dict[str, Any] = field(default_factory=dict)
    steps: StepLedger = field(init=False)
    pauses: PauseLedger = field(init=False)

    def __post_init__(self) -> None:
        self.pauses = PauseLedger(self.complain)
        self.steps = StepLedger(self.complain, self.counts, lambda: self.now)

    @property
    def now(self) -> float:
        return self.disk.now()

    def trace(self, who: str, what: str) -> None:
        self.events.append(f"{self.now:10.4f} {who:14} {what}")

    @property
    def digest(self) -> str:
        return hashlib.blake2b("\n".join(self.events).encode(), digest_size=8).hexdigest()

    def complain(self, problem: str) -> None:
        """Note something that must not be."""
        self.trace("PROBLEM", problem)
        self.ledger.wrong.append(f"at {self.now:.3f} s: {problem}")

    def is_dead(self, pid: int) -> bool:
        return not self.servers[pid - 1].process.is_alive

    @property
    def living_servers(self) -> list[Server]:
        return [server for server in self.servers if server.process.is_alive]

    @property
    def living_workers(self) -> list[Worker | OldClient]:
        return [worker for worker in self.workers if worker.process.is_alive]

    # ---------------------------------------------------------------- what clients are told

    def note_work(self, worker: str, reply: BatchWorkResponse, asked_at: float) -> None:
        self.pauses.note_work(reply, asked_at)
        for item in reply.items:
            number = item.work_id
            self.counts["grants"] += 1
            self.ledger.note_grant(number, item.content, item.retry_count, item.attempt)
            serial = (item.lease or "").partition(".")[2]
            if self.leases.setdefault(serial, (number, worker)) != (number, worker):
                self.complain(f"lease {item.lease} was given twice")
            if item.lease is not None:
                self.granted_at[item.lease] = self.now
                self.steps.note_granted(item, asked_at)
            if self.told_done.get(number, asked_at) < asked_at:
                self.complain(f"item {number} was done and was handed out again")
            if self.nobody_pays and (item.retry_count, item.attempt) != (0, 1):
                self.complain(f"item {number} has retry_count {item.retry_count}, nobody at fault")

    def note_renewing(self, renewed: Iterable[RenewedLease], call: object) -> None:
        """The server renewed leases because of a call; its reply may still get lost."""
        for each in renewed:
            self.renewed_by.setdefault(each.lease, (each.renewed, call))

    def note_told_again(
        self, asked: Iterable[ReleaseItem], reply: ReleaseWorkResponse, call: object
    ) -> None:
        """Count what a worker was told whose earlier call had renewed a lease, without its news."""
        told = {each.lease: each.renewed for each in reply.renewed or ()}
        for item in asked:
            renewed, by = self.renewed_by.get(item.lease or "", ("", call))
            if by is not call:
                known = told.get(item.lease or "") == renewed
                self.counts["renewals told again" if known else "renewals told too late"] += 1

    def note_renewed(self, worker: str, renewed: Iterable[RenewedLease], asked_at: float) -> None:
        for each in renewed:
            number, serial = each.work_id, each.renewed.partition(".")[2]
            self.counts["leases renewed"] += each.renewed not in self.granted_at
            if self.leases.get(each.lease.partition(".")[2]) != (number, worker):
                self.complain(f"lease {each.lease} was renewed for {worker}, whose it was not")
            if self.leases.setdefault(serial, (number, worker)) != (number, worker):
                self.complain(f"lease {each.renewed} was given twice")
            self.granted_at.setdefault(each.renewed, self.now)
            self.steps.note_renewed(each.lease, each.renewed)
            if self.told_done.get(number, asked_at) < asked_at:
                self.complain(f"item {number} was done and its lease was renewed")

    def note_outcomes(self, items: Sequence[ResultItem], outcomes: Sequence[Outcome]) -> None:
        for item, outcome in zip(items, outcomes, strict=True):
            self.counts[str(outcome)] += 1
            self.ledger.note_outcome(item.work_id, item.result or "", str(outcome))
            if outcome in _SETTLED:
                self.told_done.setdefault(item.work_id, self.now)
            elif outcome is not Outcome.INVALID:
                self.complain(f"the result of item {item.work_id} was answered {outcome}")

    def problems_at_the_end(self, lines: Sequence[str], output: bytes) -> list[str]:
        """Judge the complete run."""
        found = self.ledger.problems(lines, output)
        if not found:  # every line is JSON
            found += self.ledger.attempts_problems(output)
        limit = self.settings.policy.max_retries
        if limit >= 0 and not self.settings.policy.backups:
            found += [
                f"item {number} was charged {count} times"
                for number, count in self.charges.items()
                if count > limit + 1
            ]
        status = self.final_status
        errors = output.count(b'\n{"__ERROR__"') + output.startswith(b'{"__ERROR__"')
        tombstones = output.count(b'"error": "max_retries_exceeded"')
        counted = (status["done"], status["failed"], sum(status["tombstones"].values()))
        if counted != (len(lines), errors, tombstones):
            found.append(
                f"the counters say {counted}, not {(len(lines), errors, tombstones)} "
                "(done, failed, tombstones)"
            )
        if self.nobody_pays and status["charged"]:
            found.append(f"{status['charged']} attempts were charged, nobody at fault")
        for process in [c.process for c in (*self.servers, *self.workers)]:
            if process.is_alive or process.open_tasks:
                found.append(f"{process.name} did not end: {process.open_tasks}")
        return found


# -------------------------------------------------------------------- servers


class Server:
    """One start of the server: the real service, and a main function like the command's."""

    def __init__(self, world: World, host: str, *, takeover: bool = False) -> None:
        self._world = world
        pid = len(world.servers) + 1
        self.process = Process(f"server{pid}@{host}", host, pid)
        self.rng = Random(f"{world.rng.random()} server")
        self.files = ProcessFiles(world.disk, self.process, self.rng)
        self.ready_at = self.ended_at = 0.0
        self.is_listening = False
        self.was_beside_another = bool(world.living_servers)
        self.open_calls: dict[_Exchange, None] = {}
        for other in world.living_servers:
            other.was_beside_another = True
        world.servers.append(self)
        self.process.at_end.append(self._note_end)
        self.stop_asked = asyncio.Event()
        self.service: DispatchService
        world.trace(self.process.name, "starts")
        self.process.run_main(self._run(takeover))

    async def _run(self, takeover: bool) -> object:
        world, process = self._world, self.process
        clock = asyncio.get_running_loop().time
        ownership = Ownership(
            world.settings.state_dir,
            self.files,
            takeover=takeover,
            identity=identity_of(process, world.is_dead),
            lock=world.locks.of(process),
            clock=clock,
        )
        kind = SteppedThread if world.stepped else VirtualThread
        self.service = DispatchService(
            world.settings,
            files=self.files,
            clock=clock,
            ownership=ownership,
            make_thread=lambda _: kind(process, self.rng, self.files.take_slept_s),
        )
        try:
            await self.service.start()
            self._begin_to_listen()
            return await self._serve()
        except DispatcherError as error:
            return error

    def _begin_to_listen(self) -> None:
        world, service = self._world, self.service
        self.is_listening = True
        self.ready_at = world.now
        if world.announced is None or service.epoch > world.announced.service.epoch:
            world.announced = self
        world.trace(self.process.name, f"ready, epoch {service.epoch}")
        world.counts["server starts"] += 1
        world.pauses.note_start(service)
        self._check_files()

    def _check_files(self) -> None:
        """Nothing torn is left by a start: the output is whole lines, segments whole frames."""
        world = self._world
        if self.was_beside_another:
            return  # the other one may be writing still
        output = world.disk.content(world.settings.outfile) or b""
        if output and not output.endswith(b"\n"):
            world.complain("after a start the output does not end with a line end")
        if b"\0" in output:
            world.complain("after a start the output has a hole")
        written = self.service.status()["written"]
        # A start ends a moment after the first write began; in the middle of one they may differ.
        is_still = self.service._writing is None and not self.service.finished.is_set()
        if is_still and output.count(b"\n") != written:
            world.complain(f"after a start the output has more than its {written} lines")
        if any(server.was_beside_another for server in world.servers):
            return  # the one that lost may have left a segment behind
        for name, data in world.disk.contents(world.settings.state_dir / JOURNAL_DIR):
            if name.endswith(".journal") and _torn_at(data) is not None:
                world.complain(f"after a start {name} is torn at byte {_torn_at(data)}")

    async def _serve(self) -> object:
        world, service = self._world, self.service
        await _first_of(self.stop_asked, service.finished, service.stopped)
        ending: object = "stopped"
        if service.failure is not None:
            ending = service.failure
        elif service.finished.is_set():
            self._note_complete()
            await _first_of(self.stop_asked, timeout_s=LINGER_S)
            ending = "complete"
        else:
            await service.drain()
            last_s = world.now + DRAIN_S
            await until(
                lambda: not service.queue.leases or world.now > last_s or service.stopped.is_set()
            )
            if service.finished.is_set():
                self._note_complete()
                ending = "complete"
        self.is_listening = False
        await service.close()
        return ending

    def listened_since(self, moment: float) -> float:
        """Return for how many seconds of the time since then this server could be reached."""
        if not self.ready_at:
            return 0.0
        until = self._world.now if self.process.is_alive else self.ended_at
        return until - max(self.ready_at, moment)

    def _note_complete(self) -> None:
        world = self._world
        world.is_complete = True
        world.final_status = self.service.status()
        world.trace(self.process.name, "complete")

    def _note_end(self) -> None:
        world, ending = self._world, self.process.ending
        self.is_listening = False
        self.ended_at = world.now
        world.trace(self.process.name, f"ended: {ending!r}")
        if isinstance(ending, RunLockedError):
            self._check_refusal(str(ending))
        elif isinstance(ending, Exception) and not (
            isinstance(ending, StorageError) and self.files.was_hit
        ):
            world.complain(f"{self.process.name} ended: {ending!r}")
        for call in list(self.open_calls):
            call.note_server_gone()

    def _claim_is_torn(self) -> bool:
        claims = self._world.disk.contents(self._world.settings.state_dir / OWNERS_DIR)
        try:
            return not json.loads(claims[-1][1])
        except ValueError:
            return True

    def _check_refusal(self, text: str) -> None:
        world = self._world
        world.counts["refused starts and lost runs"] += 1
        if not self.was_beside_another:
            world.complain(f"{self.process.name} was alone and was refused: {text}")
        named = _NAMED.search(text)
        if named is None and (world.locks.kind != "absent" or self._claim_is_torn()):
            return  # the claim is not written yet, or its owner died writing it
        if named is None or int(named[1]) == self.process.pid:
            world.complain(f"the refusal of {self.process.name} names nobody: {text}")


def _torn_at(segment: bytes) -> int | None:
    """Return where a segment is not made of whole frames; see storage/journal.py for the format."""
    offset = 0
    while offset < len(segment):
        header = _FRAME.match(segment, offset)
        if header is None or header.end() + int(header[1]) > len(segment):
            return offset
        offset = header.end() + int(header[1])
    return None


async def _first_of(*events: asyncio.Event, timeout_s: float | None = None) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


# -------------------------------------------------------------------- the network


class _Exchange:
    """One call on its way: one or two requests, and the first reply that arrives."""

    def __init__(
        self,
        world: World,
        client: Worker | OldClient | Operator,
        server: Server,
        act: Callable[[DispatchService], Awaitable[Any]],
    ) -> None:
        self._world, self._client, self._server, self._act = world, client, server, act
        self._loop = asyncio.get_running_loop()
        self._handlers: list[asyncio.Task[None]] = []
        self.reply: asyncio.Future[Any] = self._loop.create_future()

    async def run(self, timeout_s: float) -> Any:
        """Return the reply, or None when there was none."""
        conduct, rng = self._world.conduct, self._world.rng
        self._server.open_calls[self] = None
        try:
            for _ in range(2 if rng.random() < conduct.twice else 1):
                if rng.random() >= conduct.lost_request and not self._client.is_cut_off:
                    self._later(self._server.process, self._arrive)
            timer = self._loop.call_later(timeout_s, _settle, self.reply, None)
            try:
                return await self.reply
            finally:
                timer.cancel()
        finally:
            self._server.open_calls.pop(self, None)
            self._leave()

    def note_server_gone(self) -> None:
        """The connection is reset, unless the reset is lost too."""
        if not self._client.is_cut_off and self._world.rng.random() < 0.9:
            self._later(self._client.process, _settle, self.reply, None)

    def _later(self, where: Process, callback: Callable[..., None], *args: Any) -> None:
        rng = self._world.rng
        delay_s = rng.uniform(0.0002, 0.02)
        if rng.random() < self._world.conduct.slow_call:
            delay_s += rng.uniform(0.1, 3.0)
        self._loop.call_later(delay_s, callback, *args, context=where.context.copy())

    def _arrive(self) -> None:
        if not self._server.is_listening:
            self._later(self._client.process, _settle, self.reply, None)
        elif self._server.process.is_alive:
            self._handlers.append(self._server.process.spawn(self._handle()))

    async def _handle(self) -> None:
        server, world = self._server, self._world
        try:
            value = await self._act(server.service)
        except DispatcherError:  # 503 or 507: the client sees a server that is away
            value = None
        if not server.process.is_alive:
            return
        if value is not None and _tells_state(value):
            epoch = server.service.epoch
            if epoch < world.acknowledging_epoch:
                world.complain(f"epoch {epoch} acknowledged after {world.acknowledging_epoch} did")
            world.acknowledging_epoch = epoch
        if world.rng.random() >= world.conduct.lost_reply and not self._client.is_cut_off:
            self._later(self._client.process, _settle, self.reply, value)

    def _leave(self) -> None:
        """The client hangs up: the server ends what it still does for it, when it notices."""
        for handler in self._handlers:
            if not handler.done() and self._server.process.is_alive:
                self._later(self._server.process, handler.cancel)


def _settle(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)


def _tells_state(value: Any) -> bool:
    """Say whether a reply tells of a change, so that only the owner of the run may send it."""
    match value:
        case BatchWorkResponse(items=items):
            return bool(items)
        case ReleaseWorkResponse(renewed=renewed):
            return bool(renewed)
        case StepsResponse(outcomes=outcomes):
            return StepOutcome.ACCEPTED in outcomes
        case (outcomes, work):
            return Outcome.ACCEPTED in outcomes or (work is not None and bool(work.items))
    return False


class SimLink:
    """The calls of a worker, over the simulated network; see tasksource/leased.py, Link."""

    def __init__(self, world: World, client: Worker | OldClient | Operator, name: str) -> None:
        self._world, self._client, self._name = world, client, name
        self._server: Server | None = None

    async def get_work(self, batch_size: int = 1, wait_s: float = 0.0) -> BatchWorkResponse:
        world, asked_at = self._world, self._world.now
        reply = await self.call(
            lambda service: service.get_work(self._name, batch_size, wait_s),
            CALL_TIMEOUT_S + wait_s,
        )
        if reply is None:
            over = world.is_complete and not self._client.is_cut_off
            status = WorkStatus.ALL_WORK_COMPLETE if over else WorkStatus.SERVER_UNAVAILABLE
            return BatchWorkResponse(status)
        assert isinstance(reply, BatchWorkResponse)
        world.note_work(self._name, reply, asked_at)
        return reply

    async def submit_results(self, items: Sequence[WorkItem], want: int = 0) -> BatchResultResponse:
        world, asked_at = self._world, self._world.now
        results = [ResultItem(i.work_id, i.result, i.run, i.lease) for i in items]

        async def submit(
            service: DispatchService,
        ) -> tuple[list[Outcome], BatchWorkResponse | None]:
            work = None
            if want:
                outcomes, work = await service.exchange(results, self._name, want)
            else:
                outcomes = await service.submit(results)
            for item, outcome in zip(results, outcomes, strict=True):
                if outcome is Outcome.DUPLICATE and item.work_id in service.queue.items:
                    world.complain(f"item {item.work_id} is open, its result was no duplicate")
            return outcomes, work

        voiding = world.steps.note_results(results)
        reply = await self.call(submit, CALL_TIMEOUT_S)
        if reply is None:
            return BatchResultResponse(WorkStatus.SERVER_UNAVAILABLE)
        world.steps.note_reply(voiding)
        outcomes, work = reply
        world.note_outcomes(results, outcomes)
        if work is not None:
            world.note_work(self._name, work, asked_at)
        settled = sum(o in _SETTLED for o in outcomes)
        return BatchResultResponse(WorkStatus.OK, settled, outcomes, work)

    async def release_work(
        self, work_ids: Iterable[int] = (), items: Iterable[ReleaseItem] = ()
    ) -> ReleaseWorkResponse:
        released = list(items)
        world, asked_at = self._world, self._world.now
        world.crashed_leases |= {item.lease for item in released if item.renew}
        voiding = world.steps.note_releasing(released)
        call = object()

        async def take_back(service: DispatchService) -> ReleaseWorkResponse:
            reply = await service.take_back(released, self._name)
            world.note_renewing(reply.renewed or (), call)
            return reply

        renews = any(item.renew for item in released)
        reply = await self.call(take_back, RENEW_TIMEOUT_S if renews else CALL_TIMEOUT_S)
        if reply is None:
            return ReleaseWorkResponse(WorkStatus.SERVER_UNAVAILABLE)
        assert isinstance(reply, ReleaseWorkResponse)
        world.steps.note_reply(voiding)
        world.note_told_again([item for item in released if item.renew], reply, call)
        world.note_renewed(self._name, reply.renewed or (), asked_at)
        if reply.released_count == len(released):
            world.charges.update(item.work_id for item in released if item.charge)
        return reply

    async def record_steps(self, steps: Sequence[StepItem]) -> StepsResponse:
        ledger, sent_at = self._world.steps, self._world.now
        ledger.note_handing_in(steps)

        async def record(service: DispatchService) -> StepsResponse:
            return StepsResponse(WorkStatus.OK, await service.record_steps(steps))

        reply = await self.call(record, CALL_TIMEOUT_S)
        if reply is None:
            return StepsResponse(WorkStatus.SERVER_UNAVAILABLE)
        assert isinstance(reply, StepsResponse)
        ledger.note_taken(steps, reply.outcomes, sent_at)
        return reply

    async def heartbeat(self, request: HeartbeatRequest) -> HeartbeatResponse:
        async def beat(service: DispatchService) -> HeartbeatResponse:
            reply = await service.heartbeat(request)
            self._client.note_heard(service)
            return reply

        reply = await self.call(beat, HEARTBEAT_TIMEOUT_S)
        if reply is None:
            return HeartbeatResponse(WorkStatus.SERVER_UNAVAILABLE)
        assert isinstance(reply, HeartbeatResponse)
        return reply

    async def close(self) -> None:
        """There is no connection to let go of."""

    async def call(
        self, act: Callable[[DispatchService], Awaitable[Any]], timeout_s: float
    ) -> Any | None:
        """Call the server that was there last; look for another one when it does not answer."""
        server = self._server = self._server or self._world.announced
        reply = None
        if server is not None and (server.is_listening or server.process.is_stopped):
            reply = await _Exchange(self._world, self._client, server, act).run(timeout_s)
        else:
            await asyncio.sleep(0.01)
        if reply is None:
            self._server = None
        return reply


# -------------------------------------------------------------------- workers


class OldClient:
    """A client of the older kind: no name, no leases, no heartbeats."""

    def __init__(self, world: World, number: int) -> None:
        self._world = world
        self.rng = Random(f"{world.rng.random()} client")
        self.process = Process(f"old{number}", f"node{number}")
        self.is_cut_off = False
        self._link = SimLink(world, self, "")
        self._nonce = 0
        world.workers.append(self)
        self.process.run_main(self._run())

    def note_heard(self, service: DispatchService) -> None:
        """It sends no heartbeats."""

    async def _run(self) -> str:
        while True:
            reply = await self._link.get_work(self.rng.randint(1, 3))
            if reply.status is WorkStatus.ALL_WORK_COMPLETE:
                return "complete"
            for item in reply.items:
                await asyncio.sleep(self.rng.uniform(0.3, 1.7) * self._world.mean_s)
                self._nonce += 1
                result = result_of(item.content, self.process.name, self._nonce)
                if not await self._submit([WorkItem(item.work_id, item.content, result)]):
                    return "complete"
            if not reply.items:
                await asyncio.sleep(self.rng.uniform(1.0, 5.0))

    async def _submit(self, items: list[WorkItem]) -> bool:
        while (await self._link.submit_results(items)).status is not WorkStatus.OK:
            if self._world.is_complete:
                return False
            await asyncio.sleep(self.rng.uniform(1.0, 5.0))
        return True


class Worker:
    """A task manager in a few lines, over the real source of leased work."""

    def __init__(
        self, world: World, number: int, *, slots: int, slowness: float = 1.0, ahead: int = 1
    ) -> None:
        self._world = world
        self.rng = Random(f"{world.rng.random()} worker")
        self.process = Process(f"worker{number}", f"node{number}")
        self.is_cut_off = False
        self.slowness = slowness
        self._slots = slots
        self._active: dict[asyncio.Task[None], Assignment] = {}
        self._room = asyncio.Event()
        self._solo = False
        self._nonce = 0
        self._backend = asyncio.Event()
        self._backend.set()
        self._engine = 1
        self._asking: set[Assignment] = set()
        self._telling: list[asyncio.Task[None]] = []
        self._heard_at = 0.0
        self._cut_off_until = 0.0
        self._ended: set[str] = set()
        self._why_stopped: str | None = None
        self._first_beat = asyncio.Event()
        self._feeding: asyncio.Task[None] | None = None
        self._link = SimLink(world, self, self.process.name)
        rewords = self.rng.randrange(3) if self.rng.random() < world.conduct.rewords else None
        self.source = LeasedSource(
            self._link,
            type("SimTask", (SimTask,), {"ledger": world.steps, "rewords": rewords}),
            worker=self.process.name,
            batch_size=ahead,
            server_timeout_s=SERVER_TIMEOUT_S,
            backend_up=self._backend.is_set,
            stats=WorkerStats,
        )
        world.workers.append(self)
        self.process.run_main(self._run())

    # ---------------------------------------------------------------- what befalls it

    def terminate(self, reason: str) -> None:
        """SIGTERM, or with the reason "crash", the end of its model server."""
        self._why_stopped = reason
        if self._feeding is not None:
            self._feeding.cancel()

    def crash_engine(self) -> None:
        """The model server dies; this worker lives, and will start another one."""
        if self._why_stopped is not None:
            return
        self._engine += 1
        self._backend.clear()
        hit = list(self._asking)
        self._world.counts["items in flight on a dead engine"] += len(hit)
        self._telling.append(self.process.spawn(self._tell_crash(hit)))

    async def _tell_crash(self, hit: list[Assignment]) -> None:
        kept = await self.source.crashed(hit)
        for task, assignment in list(self._active.items()):
            if assignment in hit and assignment not in kept:
                task.cancel()

    def set_backend(self, *, up: bool) -> None:
        if up:
            self._backend.set()
        else:
            self._backend.clear()

    # ---------------------------------------------------------------- life

    async def _run(self) -> object:
        if self._world.is_complete:
            return "complete"  # it asks before it loads a model
        beating = asyncio.ensure_future(self._beat_forever())
        self._feeding = asyncio.ensure_future(self._feed())
        if self._why_stopped is not None:
            self._feeding.cancel()
        await asyncio.wait([self._feeding])
        ending: object = "complete"
        if self._feeding.cancelled():
            ending = self._why_stopped
        elif (error := self._feeding.exception()) is not None:
            ending = error
        beating.cancel()
        for telling in self._telling:
            telling.cancel()
        if ending != "complete":
            held = list(self._active.values())
            for task in list(self._active):
                task.cancel()
            await self.source.give_back(held, self._why_stopped or "the worker was stopped")
        if isinstance(ending, Exception) and not isinstance(ending, DispatcherError):
            self._world.complain(f"{self.process.name} ended: {ending!r}")
        self._world.trace(self.process.name, f"ended: {ending!r}")
        return ending

    async def _feed(self) -> None:
        try:
            async with asyncio.timeout(SERVER_TIMEOUT_S):
                await self._first_beat.wait()
        except TimeoutError:
            raise ServerLostError("no heartbeat was answered") from None
        await self.source.start(self._wanted)
        while (assignment := await self._next()) is not None:
            self._start(assignment)
        await self._until(lambda: not self._active)
        await self.source.close()

    async def _next(self) -> Assignment | None:
        await self._until(lambda: self._wanted() > 0)
        assignment = await self.source.next()
        if assignment is not None and assignment.solo:
            await self._until_alone()
            self._solo = True
        return assignment

    async def _until_alone(self) -> None:
        """Wait until nothing else runs; what is lost may never end, and is given up."""
        while self._active:
            for task, assignment in self._active.items():
                if assignment.is_lost:
                    self._world.counts["lost items given up"] += 1
                    self.source.give_up(assignment)
                    task.cancel()
            self._room.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._room.wait(), 1.0)

    def _start(self, assignment: Assignment) -> None:
        task = asyncio.ensure_future(self._work(assignment))
        self._active[task] = assignment
        assignment.progress = 1
        assignment.cancel = task.cancel
        task.add_done_callback(self._note_done)

    def _note_done(self, task: asyncio.Task[None]) -> None:
        self._active.pop(task)
        self._solo = self._solo and bool(self._active)
        self._room.set()

    def _wanted(self) -> int:
        return 0 if self._solo else self._slots - len(self._active)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._room.clear()
            await self._room.wait()

    async def _work(self, assignment: Assignment) -> None:
        world, rng, item = self._world, self.rng, assignment.item
        draw, conduct = rng.random(), world.conduct
        attempt = Attempt(assignment.build, assignment.log)
        outcome = await self._attempt(attempt, assignment)
        for share, kind in self._misconduct(conduct):
            draw -= share
            if draw < 0:
                world.counts[kind] += 1
                if kind == "sitter":
                    await asyncio.get_running_loop().create_future()
                outcome = {
                    "invalid result": Answered(rng.choice(["{", "[NaN]", '{"id":\n0}'])),
                    "task retry": WantsRetry("once more", rng.random() < 0.5),
                }.get(kind, Raised("ValueError: no", "task.py:1"))
                break
        else:
            assert isinstance(outcome, Answered), outcome
            self._nonce += 1
            outcome = Answered(result_of(item.content, self.process.name, self._nonce))
        self._ended.add(assignment.key)
        await self.source.finish(assignment, attempt, outcome)

    async def _attempt(
        self, attempt: Attempt, assignment: Assignment
    ) -> Answered | WantsRetry | Raised:
        """Let the model answer, one request after the other, those of a list in any order."""
        world, rng, log = self._world, self.rng, assignment.log
        assert log is not None
        share = 2.0 if yields_of(assignment.item.work_id) == 1 else 1.0
        step = attempt.begin()
        waiting: list[Asked] = []
        while isinstance(step, list):
            waiting += step
            await self._wait_for_the_model(assignment, share)
            assignment.progress += 1
            asked = waiting.pop(rng.randrange(len(waiting)))
            response = world.steps.answer(assignment.key, assignment.item.work_id, log, asked)
            self.source.record(assignment, asked, response)
            step = attempt.answer([response])
        world.counts["steps replayed"] += log.replayed
        return step

    async def _wait_for_the_model(self, assignment: Assignment, share: float) -> None:
        """A request that was in flight on an engine that died is asked again of the next one."""
        mean_s = share * self._world.mean_s * self.slowness
        self._asking.add(assignment)
        try:
            engine = 0
            while engine != self._engine:
                engine = self._engine
                await asyncio.sleep(self.rng.uniform(0.15, 0.85) * mean_s)
                await self._backend.wait()
        finally:
            self._asking.discard(assignment)

    @staticmethod
    def _misconduct(conduct: Conduct) -> Iterator[tuple[float, str]]:
        yield conduct.sits, "sitter"
        yield conduct.invalid, "invalid result"
        yield conduct.retry, "task retry"
        yield conduct.raises, "task exception"

    # ---------------------------------------------------------------- heartbeats

    async def _beat_forever(self) -> None:
        beat_s = self._world.beat_s
        while True:
            request = self.source.heartbeat_request()
            reply = await self._link.heartbeat(request)
            if reply.status is WorkStatus.OK:
                self._first_beat.set()
                self._check_lost(reply.lost)
                self.source.take_verdict(reply)
                await asyncio.sleep(beat_s)
            else:
                await asyncio.sleep(1.0)

    def note_heard(self, service: DispatchService) -> None:
        """A heartbeat was answered; called in the server."""
        world = self._world
        now, term_s = world.now, world.settings.policy.lease_term_s
        if any(s.listened_since(self._heard_at) > 0.8 * term_s for s in world.servers):
            self._cut_off_until = now
        self._heard_at = now

    def _check_lost(self, lost: list[str]) -> None:
        """While the server hears a worker, its leases live."""
        world = self._world
        for key in lost:
            granted_at = world.granted_at[key]
            if key in world.crashed_leases:
                continue  # it is being told of a crash, and holds another one soon
            if key in self._ended or key not in self.source.heartbeat_request().held:
                continue
            held_s = world.now - granted_at
            if (
                world.contact_is_sure
                and self._cut_off_until < granted_at
                and held_s < world.settings.policy.work_timeout_s
            ):
                world.complain(f"{self.process.name} lost lease {key} although it was heard")


@contextlib.contextmanager
def patched(target: Any, **values: Any) -> Iterator[None]:
    """Set attributes for a while."""
    before = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)
