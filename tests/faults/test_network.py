"""Workers and a server with a bad network between them: nothing is lost, repeated or charged.

The server is the real application on a real socket, the workers are the real task manager with
its heartbeat thread; only the model is a stand-in, and times are tenths of a second. Repeat a
failure with DISPATCHER_TEST_SEED set to the seed that it names: runs count up from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest
import uvloop

from dispatcher.client import AsyncWorkClient, WorkClient
from dispatcher.config import RunSettings, default_state_dir
from dispatcher.core.work_queue import QueuePolicy
from dispatcher.errors import ServerLostError
from dispatcher.models import (
    BatchResultResponse,
    BatchWorkResponse,
    HeartbeatRequest,
    HeartbeatResponse,
    Outcome,
    ReleaseItem,
    ReleaseWorkResponse,
    WorkerStats,
    WorkItem,
    WorkStatus,
)
from dispatcher.server.access import Gate
from dispatcher.server.app import listen, make_app, stop_listening
from dispatcher.service import DispatchService
from dispatcher.taskmanager.backend.base import SimpleBackend
from dispatcher.taskmanager.backend.request import Request, Response
from dispatcher.taskmanager.manager import Manager
from dispatcher.taskmanager.step_threads import THREAD_NAME
from dispatcher.taskmanager.task import GeneratorTask
from dispatcher.taskmanager.tasksource import dispatcher as worker_source
from dispatcher.taskmanager.tasksource import leased
from dispatcher.taskmanager.tasksource.dispatcher import DispatcherTaskSource
from tests.faults.oracle import Ledger, input_line, result_of
from tests.faults.proxy import LONGEST_HANG_S, LOOPBACK, FaultyProxy, Kind, Schedule, read_message
from tests.support.processes import wait_until
from tests.taskmanager.doubles import until

SEED = int(os.environ.get("DISPATCHER_TEST_SEED", "20240607"))
SEEDS = 20
AT_ONCE = 10
"""Runs that go on side by side, as most of a run is waiting; too many answer each other late."""

LINES = 60
LEASE_TERM_S = 0.6
PATIENCE_S = 0.4
LIMIT_S = 25.0
"""Far above what a run takes, so that only a hang reaches it."""

MAX_RETRIES = 3
MOST_TIMES = 5
MOST_RECOMPUTED = 0.3
"""Of all lines: what is computed again because a worker was cut off for longer than a term."""
_nonces = count()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the worker's waits be tenths of a second: what hangs costs no more."""
    monkeypatch.setattr(
        worker_source, "AsyncWorkClient", partial(AsyncWorkClient, timeout_s=PATIENCE_S)
    )
    monkeypatch.setattr(worker_source, "_HEARTBEAT_TIMEOUT_S", 0.3)
    monkeypatch.setattr(worker_source, "_FIRST_TERM_S", LEASE_TERM_S)
    monkeypatch.setattr(leased, "POLL_S", 0.3)
    monkeypatch.setattr(leased, "_FIRST_DELAY_S", 0.02)
    monkeypatch.setattr(leased, "_LONGEST_DELAY_S", 0.2)


# --- the worker's side --------------------------------------------------------------------------


class Ask(GeneratorTask):
    """One question; the answer is the result."""

    def task_generator(self) -> Generator[Any, Any, Any]:
        response = yield Request({"messages": [], "line": self.data["id"]})
        return response.content


class Computing(SimpleBackend):
    """Answers after a while, now and then a long one, and counts what it computed."""

    def __init__(self, worker: str, rng: Random, computed: Counter[int]) -> None:
        super().__init__(limit=4)
        self._worker = worker
        self._rng = rng
        self._computed = computed

    async def answer(self, request: Request) -> Response:
        line: int = request.content["line"]
        longest_s = 0.3 if self._rng.random() < 0.1 else 0.02
        await asyncio.sleep(self._rng.uniform(0.0, longest_s))
        self._computed[line] += 1
        return Response(request, {"id": line, "worker": self._worker, "nonce": next(_nonces)})


class Told:
    """A worker's link to the server, with a note of every reply that arrives."""

    def __init__(self, link: leased.Link, run: Run) -> None:
        self._link = link
        self._run = run

    async def get_work(self, batch_size: int = 1, wait_s: float = 0.0) -> BatchWorkResponse:
        reply = await self._link.get_work(batch_size, wait_s)
        self._run.note_work(reply)
        return reply

    async def submit_results(self, items: Sequence[WorkItem], want: int = 0) -> BatchResultResponse:
        reply = await self._link.submit_results(items, want)
        self._run.note_outcomes(items, reply)
        return reply

    async def release_work(
        self, work_ids: Iterable[int] = (), items: Iterable[ReleaseItem] = ()
    ) -> ReleaseWorkResponse:
        return await self._link.release_work(work_ids, items)

    async def heartbeat(self, request: HeartbeatRequest) -> HeartbeatResponse:
        return await self._link.heartbeat(request)

    async def close(self) -> None:
        await self._link.close()


async def work(
    run: Run, name: str, *, address: str | None = None, server_timeout_s: float = LIMIT_S
) -> None:
    """Be a task manager until there is nothing more to do."""
    source = DispatcherTaskSource(
        address or run.proxy.address,
        Ask,
        worker=name,
        batch_size=3,
        server_timeout_s=server_timeout_s,
        backend_up=lambda: True,
        stats=WorkerStats,
    )
    source._link = Told(source._link, run)
    await Manager(source, Computing(name, Random(name), run.computed)).run()


def work_plainly(run: Run, name: str | None) -> None:
    """Be a simple client: no heartbeats, and without a name an older one, which echoes no lease."""
    rng = Random(f"{run.seed} {name}")
    with WorkClient(run.proxy.address, name, timeout_s=PATIENCE_S) as client:
        while not run.is_over():
            reply = client.get_work(5)
            run.note_work(reply)
            if reply.status is WorkStatus.ALL_WORK_COMPLETE:
                return
            items = [_answered(item, name, rng, run.computed) for item in reply.items]
            while items and not run.is_over():
                outcome = client.submit_results(items)
                run.note_outcomes(items, outcome)
                if outcome.status is WorkStatus.OK:
                    break
                time.sleep(0.02)
            if not items:
                time.sleep(reply.retry_in or 0.02)


def _answered(item: WorkItem, name: str | None, rng: Random, computed: Counter[int]) -> WorkItem:
    time.sleep(rng.uniform(0.0, 0.005))
    computed[item.work_id] += 1
    answered = item if name is not None else WorkItem(item.work_id, item.content)
    answered.set_result(result_of(item.content, str(name), next(_nonces)))
    return answered


# --- the server's side --------------------------------------------------------------------------


class Server:
    """The application on a socket of its own, as the command serves it; may be started again."""

    def __init__(self, settings: RunSettings) -> None:
        self._settings = settings
        self.port = 0

    async def start(self) -> None:
        self.service = DispatchService(self._settings)
        await self.service.start()
        listener = socket.create_server((LOOPBACK, 0))
        self._runner = await listen(make_app(self.service), Gate(), listener)
        self.port = listener.getsockname()[1]

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    async def stop(self) -> None:
        await self.service.drain()
        await stop_listening(self._runner)
        await self.service.close()


# --- a run --------------------------------------------------------------------------------------


@dataclass
class Run:
    """One input, one server, one proxy, and what came of it."""

    title: str
    seed: int
    directory: Path
    schedule: Schedule
    policy: QueuePolicy = field(
        default_factory=lambda: QueuePolicy(max_retries=MAX_RETRIES, lease_term_s=LEASE_TERM_S)
    )
    may_charge: bool = False
    retry_s: float = 0.05
    ledger: Ledger = field(default_factory=lambda: Ledger(MAX_RETRIES))
    computed: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    took_s: float = 0.0
    turned_away: int = 0
    _over: bool = False

    def is_over(self) -> bool:
        """Say to threads that they must end, whatever they wait for."""
        return self._over

    def note_work(self, reply: BatchWorkResponse) -> None:
        self.turned_away += reply.status is WorkStatus.RETRY
        for item in reply.items:
            self.ledger.note_grant(item.work_id, item.content, item.retry_count, item.attempt)
            if not self.may_charge and (item.retry_count, item.attempt) != (0, 1):
                self.problems.append(f"item {item.work_id} was charged: {item}")

    def note_outcomes(self, items: Sequence[WorkItem], reply: BatchResultResponse) -> None:
        for item, outcome in zip(items, reply.outcomes, strict=bool(reply.outcomes)):
            self.ledger.note_outcome(item.work_id, item.result or "", outcome)
            if outcome not in (Outcome.ACCEPTED, Outcome.DUPLICATE):
                self.problems.append(f"the result of item {item.work_id} was called {outcome}")
        if reply.work is not None:
            self.note_work(reply.work)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Serve the run through the proxy; afterwards, judge it."""
        self.proxy = FaultyProxy(self.schedule, patience_s=PATIENCE_S)
        self.directory.mkdir()
        self.lines = [input_line(number) for number in range(LINES)]
        self.settings = RunSettings(
            infile=self.directory / "in.jsonl",
            outfile=self.directory / "out.jsonl",
            state_dir=default_state_dir(self.directory / "out.jsonl"),
            policy=self.policy,
            retry_s=self.retry_s,
        )
        self.settings.infile.write_text("".join(f"{line}\n" for line in self.lines))
        self.server = Server(self.settings)
        await self.server.start()
        self.proxy.upstream = self.server.port
        await self.proxy.start()
        began_at = time.monotonic()
        try:
            yield
            self.took_s = time.monotonic() - began_at
            await self._judge()
        except TimeoutError:
            status = self.server.service.status()
            shown = {name: status[name] for name in ("state", "done", "issued", "heap_size")}
            self.problems.append(f"it did not end: {shown}")
        finally:
            self._over = True
            await self.proxy.close()
            await self.server.stop()

    async def _judge(self) -> None:
        await asyncio.wait_for(self.server.service.finished.wait(), 5)
        self.status = self.server.service.status()
        output = self.settings.outfile.read_bytes()
        self.problems += self.ledger.problems(self.lines, output)
        self.problems += self.ledger.attempts_problems(output)
        if not self.may_charge and (self.status["charged"] or self.status["tombstones"]):
            self.problems.append(f"somebody was charged: {self.status}")

    async def restart_server(self, away_s: float = 0.0) -> None:
        """Stop the server and start it again on what it left, at another port."""
        await self.server.stop()
        await asyncio.sleep(away_s)
        await self.server.start()
        self.proxy.upstream = self.server.port

    async def until_done(self, lines: float) -> None:
        """Return when that many lines have their result."""
        counters = self.server.service.queue.counters
        await until(lambda: counters.done >= lines, f"{lines} lines are done", LIMIT_S)

    @property
    def recomputed(self) -> int:
        """Return how many computations were made of lines that had been computed before."""
        return self.computed.total() - len(self.computed)


async def go_through(run: Run) -> None:
    """Let two or three workers work until the run is complete."""
    async with run.serving(), asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
        for number in range(2 + run.seed % 2):
            group.create_task(work(run, f"{run.seed}-{number}"))


async def go_through_while_workers_come_and_go(run: Run) -> None:
    """Stop one of three workers midway, as a preemption does; another one comes instead."""
    async with run.serving(), asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
        for number in range(2):
            group.create_task(work(run, f"{run.seed}-{number}"))
        leaver = asyncio.ensure_future(work(run, f"{run.seed}-leaver"))
        await run.until_done(LINES / 3)
        leaver.cancel()
        await asyncio.wait([leaver])
        if not leaver.cancelled():
            leaver.result()
        group.create_task(work(run, f"{run.seed}-late"))


async def go_through_restarts(run: Run) -> None:
    """Restart the server twice."""
    rng = Random(run.seed)
    async with run.serving(), asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
        for number in range(3):
            group.create_task(work(run, f"{run.seed}-{number}"))
        for share in (0.25, 0.5):
            await run.until_done(LINES * share)
            await run.restart_server(away_s=rng.uniform(0.0, 0.3))


async def go_on_after_a_drain(run: Run) -> None:
    """Let a worker ask for work while the server drains, then start the server again."""
    async with run.serving(), asyncio.timeout(5.0), asyncio.TaskGroup() as group:
        await run.server.service.drain()
        group.create_task(work(run, f"{run.seed}-0"))
        await until(lambda: run.turned_away, "the worker is told to ask later")
        await run.restart_server()


async def go_through_plainly(run: Run) -> None:
    """Let two simple clients work until the run is complete."""
    names = [f"{run.seed}-{number}" if run.seed % 2 else None for number in range(2)]
    async with run.serving(), asyncio.timeout(LIMIT_S):
        await asyncio.gather(*(asyncio.to_thread(work_plainly, run, name) for name in names))


async def lose_a_worker_for_good(run: Run) -> None:
    """Let one worker lose the server; another one, which reaches it, does the rest."""
    async with run.serving(), asyncio.timeout(LIMIT_S):
        with pytest.raises(ServerLostError):
            await work(run, f"{run.seed}-lost", server_timeout_s=0.5)
        await work(run, f"{run.seed}-near", address=run.server.address)


# --- many runs ----------------------------------------------------------------------------------


class Complaints(logging.Handler):
    """What was logged as an error: nothing of this may end there."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(self.format(record))


def judge(title: str, runs: Sequence[Run], scenario: Callable[[Run], Awaitable[None]]) -> None:
    """Go through all the runs, a few at a time; print the counts; no run may have a problem."""
    complaints = Complaints()

    async def all_of_them() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(2 * AT_ONCE))
        places = asyncio.Semaphore(AT_ONCE)

        async def one(run: Run) -> None:
            async with places:
                try:
                    await scenario(run)
                except Exception as error:  # noqa: BLE001
                    # Others are under way, and the seed must be told.
                    run.problems.append("".join(traceback.format_exception(error)))

        await asyncio.gather(*(one(run) for run in runs))

    logging.getLogger().addHandler(complaints)
    try:
        uvloop.run(all_of_them())
    finally:
        logging.getLogger().removeHandler(complaints)
    print(_summary(title, runs))
    problems = [f"{run.title}, seed {run.seed}: {text}" for run in runs for text in run.problems]
    assert not problems, "\n".join(problems[:20])
    assert not complaints.said, f"{title}, seeds from {SEED}: {complaints.said[:3]}"
    wait_until(lambda: not _left_over_threads(), "the workers' threads to end")
    assert max(max(run.computed.values(), default=0) for run in runs) <= MOST_TIMES
    assert sum(run.recomputed for run in runs) <= MOST_RECOMPUTED * LINES * len(runs)


def _left_over_threads() -> list[threading.Thread]:
    names = ("heartbeat", THREAD_NAME)
    return [thread for thread in threading.enumerate() if thread.name in names]


def _summary(title: str, runs: Sequence[Run]) -> str:
    faults: Counter[str] = sum((run.proxy.counts for run in runs), Counter())
    ended = ", ".join(
        f"{sum(run.status.get(name, 0) for run in runs)} {name}"
        for name in ("charged", "crashed", "returned")
    )
    return (
        f"{title}: {len(runs)} runs of {LINES} lines, {sum(faults.values())} faults in "
        f"{sum(run.proxy.requests for run in runs)} requests, "
        f"{sum(bool(run.problems) for run in runs)} runs with problems; "
        f"{sum(run.recomputed for run in runs)} results computed again "
        f"(at most {max(run.recomputed for run in runs)} in one run, "
        f"one line at most {max(max(run.computed.values(), default=0) for run in runs)} times), "
        f"leases ended: {ended}; slowest run {max(run.took_s for run in runs):.1f} s; "
        + ", ".join(f"{number} {kind}" for kind, number in sorted(faults.items()))
    )


def runs_of(
    kinds: Sequence[Kind], seeds: int, directory: Path, *, schedule: Any = Schedule, **options: Any
) -> list[Run]:
    """Return runs under these kinds of fault, whose seeds count up from the base."""
    title = kinds[0] if len(kinds) == 1 else "all kinds"
    return [
        Run(title, seed, directory / f"{title} {seed}", schedule(kinds, seed), **options)
        for seed in range(SEED, SEED + seeds)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(Kind))
def test_nothing_is_lost_repeated_or_charged_when_the_network_fails_in_one_way(
    kind: Kind, tmp_path: Path
) -> None:
    judge(kind, runs_of([kind], SEEDS, tmp_path), go_through)


@pytest.mark.slow
def test_nothing_is_lost_repeated_or_charged_when_it_fails_in_every_way_and_workers_come_and_go(
    tmp_path: Path,
) -> None:
    runs = runs_of(list(Kind), 10, tmp_path)

    judge("all kinds", runs, go_through_while_workers_come_and_go)


@pytest.mark.slow
def test_nothing_is_lost_repeated_or_charged_when_the_server_restarts_behind_a_bad_network(
    tmp_path: Path,
) -> None:
    judge("restarts", runs_of(list(Kind), 10, tmp_path), go_through_restarts)


def test_a_worker_that_asks_while_the_server_drains_goes_on_when_it_is_back(tmp_path: Path) -> None:
    calm = partial(Schedule, rate=0.0)
    runs = runs_of(list(Kind), 1, tmp_path, schedule=calm, retry_s=300.0)

    judge("drain", runs, go_on_after_a_drain)


@pytest.mark.slow
def test_simple_clients_lose_and_repeat_nothing_either(tmp_path: Path) -> None:
    """Without heartbeats the server cannot tell a lost reply from a dead client: it may charge."""
    policy = QueuePolicy(max_retries=MAX_RETRIES, work_timeout_s=0.8)
    runs = [
        run for kind in Kind for run in runs_of([kind], 3, tmp_path, policy=policy, may_charge=True)
    ]

    judge("simple clients", runs, go_through_plainly)


def test_a_worker_that_reaches_the_server_no_more_ends_and_others_do_its_work(
    tmp_path: Path,
) -> None:
    always = partial(Schedule, rate=1.0, begins_after_s=0.1, ends_after_s=float("inf"))
    unanswered = (Kind.REFUSE, Kind.HANG, Kind.LOSE_REPLY, Kind.TRUNCATE_REPLY, Kind.GARBAGE)
    runs = [run for kind in unanswered for run in runs_of([kind], 2, tmp_path, schedule=always)]

    judge("server lost", runs, lose_a_worker_for_good)


# --- the proxy itself ---------------------------------------------------------------------------

CALL = b"POST /results HTTP/1.1\r\nContent-Length: 20\r\n\r\n" + b"x" * 20
REPLY = b"HTTP/1.1 200 OK\r\nContent-Length: 200\r\n\r\n" + b"y" * 200


CALLS = 20


@pytest.mark.parametrize(
    ("kind", "least", "most", "comes_back"),
    [
        (Kind.REFUSE, 0, 0, "nothing"),
        (Kind.HANG, 0, 0, "nothing"),
        (Kind.RESET, 1, CALLS - 1, "a reset"),
        (Kind.LOSE_REPLY, CALLS, CALLS, "nothing"),
        (Kind.DUPLICATE, 2 * CALLS, 2 * CALLS, "the reply"),
        (Kind.DELAY, CALLS, CALLS, "the reply"),
        (Kind.TRUNCATE_REPLY, CALLS, CALLS, "a part"),
        (Kind.SLOW, CALLS, CALLS, "the reply"),
        (Kind.GARBAGE, 1, CALLS - 1, "something else"),
    ],
)
def test_a_fault_does_to_a_call_what_its_kind_says(
    kind: Kind, least: int, most: int, comes_back: str
) -> None:
    """`least` to `most` of the calls arrive."""

    async def scenario() -> None:
        arrived = 0

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal arrived
            with contextlib.suppress(OSError, EOFError):
                while await read_message(reader) is not None:
                    arrived += 1
                    writer.write(REPLY)
            writer.close()

        server = await asyncio.start_server(serve, LOOPBACK, 0)
        schedule = Schedule([kind], SEED, rate=1.0)
        proxy = FaultyProxy(schedule, patience_s=0.1)
        proxy.upstream = server.sockets[0].getsockname()[1]
        await proxy.start()

        seen = set(await asyncio.gather(*(call(proxy.address) for _ in range(CALLS))))

        await until(lambda: arrived >= least, "the calls to arrive")
        await proxy.close()
        server.close()
        assert arrived <= most
        assert comes_back in seen
        # A listener that closes resets the connections that nobody has taken yet.
        assert seen <= {comes_back, "nothing", *(["a reset"] if kind is Kind.REFUSE else [])}
        assert set(proxy.counts) == {kind}

    uvloop.run(scenario())


async def call(address: str) -> str:
    """Send CALL and say what came back; what is not answered at all is refused or reset, too."""
    host, _, port = address.partition(":")
    got = b""
    try:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(CALL)
        # A little longer than what is never answered is held.
        async with asyncio.timeout(LONGEST_HANG_S + 0.5):
            while part := await reader.read(1000):
                got += part
                if got == REPLY and await _stays_open(reader):
                    break
        writer.close()
    except ConnectionRefusedError:
        return "nothing"
    except ConnectionResetError:
        return "a reset"
    if got in (b"", REPLY):
        return "the reply" if got else "nothing"
    return "a part" if REPLY.startswith(got) else "something else"


async def _stays_open(reader: asyncio.StreamReader) -> bool:
    try:
        await asyncio.wait_for(reader.read(1), 0.1)
    except TimeoutError:
        return True
    return False
