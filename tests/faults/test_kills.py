"""Real processes, killed and stopped at random moments, while a run goes on."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest

from dispatcher.client import WorkClient
from dispatcher.core.events import Absolved, Event, Issued, IssuedFresh, LeaseEnded
from dispatcher.models import HeartbeatRequest
from dispatcher.storage.records import decode_record
from tests.faults.kill_clients import Client, Dropper, OldClient, Plodder, Run, Sitter, make_client
from tests.faults.oracle import Ledger, input_line
from tests.support.processes import Process, running, wait_until

SEED = os.environ.get("DISPATCHER_TEST_SEED", "7")
RUN_S = 200.0
"""Far above what a run takes, even on a busy machine."""
_SERVING = re.compile(r"dispatcher-server: (?:run \S+ at \S+|the run is complete)")
_AT_WORK = re.compile("^at work")
_FAKELLM = re.compile(r"fakellm ready at (\S+)")


def free_port() -> int:
    """Return a port below those that the system gives to outgoing connections.

    A server that is started again needs its port free, and a client that keeps connecting to an
    ephemeral port while nobody listens there may be given that very port as its own.
    """
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def has_ended(process: Process) -> bool:
    try:
        process.wait(0)
    except subprocess.TimeoutExpired:
        return False
    return True


@dataclass
class RunFiles:
    """A run's files, its input of `line_count` lines, and how its server is started."""

    directory: Path
    line_count: int
    flags: tuple[str, ...]

    def __post_init__(self) -> None:
        self.directory.mkdir(exist_ok=True)
        self.port = free_port()
        self.lines = [input_line(number) for number in range(self.line_count)]
        self.infile.write_text("".join(line + "\n" for line in self.lines))

    @property
    def infile(self) -> Path:
        return self.directory / "in.jsonl"

    @property
    def outfile(self) -> Path:
        return self.directory / "out.jsonl"

    @property
    def state_dir(self) -> Path:
        return self.directory / "out.jsonl.dispatch"

    @property
    def address(self) -> str:
        """Return what clients and workers find the server by, and its token."""
        return f"@{self.state_dir / 'server.json'}"

    def start_server(self) -> Process:
        command = [sys.executable, "-m", "dispatcher.server", "--port", str(self.port)]
        command += ["--infile", str(self.infile), "--outfile", str(self.outfile), *self.flags]
        return Process(*command)


# -------------------------------------------------------------------- the server is killed


@dataclass
class ServerKiller:
    """Starts the server of one run and kills it, at moments drawn from `rng`."""

    files: RunFiles
    run: Run
    rng: Random
    kills: Counter[str] = field(default_factory=Counter)
    torn_frames: set[str] = field(default_factory=set)
    start_s: float = 0.5

    def __post_init__(self) -> None:
        self._client = make_client(self.files.address)

    async def kill_often(self, times: int) -> None:
        """Kill it while it serves and while it starts; fewer times when the run ends before."""
        for number in range(times):
            if self.run.all_done:
                return
            # A fast machine must not be through before it was killed often enough.
            is_ahead = len(self.run.told_done) > 0.7 * self.files.line_count
            self.run.longest_work_s = 1.0 if is_ahead else 0.15
            started_at = time.monotonic()
            server = self.files.start_server()
            when = "starting" if self.rng.random() < 0.3 else "serving"
            try:
                if when == "starting":
                    await asyncio.sleep(self.start_s * self.rng.uniform(0.5, 1.05))
                else:
                    await asyncio.to_thread(server.wait_for_line, _SERVING)
                    self.start_s = time.monotonic() - started_at
                    # Once long enough for the checkpoint that is due after 5 s.
                    longest_s = 5.3 if number == times // 2 else 0.5
                    await asyncio.sleep(self.rng.uniform(longest_s - 0.48, longest_s))
            finally:
                self._kill(server, when)

    async def kill_at_the_end(self, times: int) -> None:
        """Kill it when the last results come, when the run gets complete, and when it is."""
        for number in range(times):
            server = self.files.start_server()
            try:
                await asyncio.to_thread(server.wait_for_line, _SERVING)
                await self._until_few_are_open(server, 40 if number == 0 else 2)
                await asyncio.sleep(self.rng.uniform(0, 0.04))
            finally:
                self._kill(server, "completing")

    async def let_it_end(self) -> dict[str, Any]:
        """Start it once more; return its last status when it has ended as it should."""
        server = self.files.start_server()
        try:
            await asyncio.to_thread(server.wait_for_line, _SERVING)
            status = await self._until_few_are_open(server, 0)
            while status.get("state") != "complete":
                status = await self._status(server)
            if self.rng.random() < 0.6:  # else it lingers, and ends by itself
                server.stop()
            assert await asyncio.to_thread(server.wait, 30) == 0, server.output
        finally:
            self.run.has_ended = True
            await asyncio.to_thread(server.kill)
            await self._client.close()
        return status

    async def _until_few_are_open(self, server: Process, few: int) -> dict[str, Any]:
        status: dict[str, Any] = {}
        while status.get("done", 0) < self.files.line_count - few:
            status = await self._status(server)
        return status

    async def _status(self, server: Process) -> dict[str, Any]:
        assert not has_ended(server), server.output
        await asyncio.sleep(0.01)
        return await self._client.status()

    def _kill(self, server: Process, when: str) -> None:
        server.signal(signal.SIGKILL)
        code = server.wait()
        if code != -signal.SIGKILL:
            self.run.complain(f"the server ended with {code} while {when}: {server.output}")
        if wrong := self.run.ledger.wrong:
            raise AssertionError(f"{len(wrong)} problems, no need to go on")
        self.kills[when] += 1
        self.torn_frames |= {
            path.name for path in (self.files.state_dir / "journal").glob("*.torn")
        }


@dataclass
class Verdict:
    """What came of one run."""

    problems: list[str]
    status: dict[str, Any]
    kills: Counter[str]
    told: Counter[str]


MakeClients = Callable[[Run, str], list[Client]]


async def torment_one_run(files: RunFiles, run: Run, seed: str, make: MakeClients) -> Verdict:
    """Take one run to its end while its server is killed again and again."""
    killer = ServerKiller(files, run, Random(f"{seed} killer"))
    ledger = run.ledger
    try:
        async with asyncio.timeout(RUN_S), asyncio.TaskGroup() as group:
            for client in make(run, seed):
                group.create_task(client.run_to_the_end())
            await killer.kill_often(22)
            run.longest_work_s = 0.01
            await killer.kill_at_the_end(4)
            status = await killer.let_it_end()
    except (TimeoutError, ExceptionGroup) as error:
        raise AssertionError(f"seed {seed}: {error!r}; problems: {ledger.wrong[:20]}") from error
    output = files.outfile.read_bytes()
    problems = ledger.problems(files.lines, output) or ledger.attempts_problems(output)
    failed = output.count(b'{"__ERROR__"')
    if (status["done"], status["failed"]) != (files.line_count, failed):
        problems.append(f"done and failed are counted wrongly: {status}")
    run.counts.update(lines=files.line_count, grants=ledger.grants, tombstones=failed)
    run.counts.update(charged=status["charged"], crashed=status["crashed"])
    run.counts.update({"torn frames": len(killer.torn_frames)})
    return Verdict(problems, status, killer.kills, run.counts)


def torment_two_runs(
    tmp_path: Path, *flags: str, max_retries: int, nobody_pays: bool, make: MakeClients
) -> list[Verdict]:
    """Judge two runs, beside each other; print what happened."""

    async def both() -> list[Verdict]:
        limit = ("--max-retries", str(max_retries), "--retry", "0.05")
        running_ones = []
        for name in ("first", "second"):
            files = RunFiles(tmp_path / name, 3500, (*flags, *limit))
            run = Run(files.address, Ledger(max_retries), nobody_pays)
            running_ones.append(torment_one_run(files, run, f"{SEED} {name}", make))
        return await asyncio.gather(*running_ones)

    verdicts = asyncio.run(both())
    kills = sum((v.kills for v in verdicts), Counter[str]())
    told = sum((v.told for v in verdicts), Counter[str]())
    problems = sum(len(v.problems) for v in verdicts)
    print(
        f"server: {kills.total()} SIGKILLs ({words(kills)}): {words(told)}; "
        f"{problems} problems; seed {SEED}"
    )
    return verdicts


def words(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


@pytest.mark.slow
def test_no_kill_of_the_server_loses_a_result_repeats_a_line_or_costs_a_retry(
    tmp_path: Path,
) -> None:
    def make(run: Run, seed: str) -> list[Client]:
        kinds = [Client] * 5 + [Plodder] * 2
        return [kind(run, f"{kind.__name__}{n}", seed) for n, kind in enumerate(kinds)]

    verdicts = torment_two_runs(
        tmp_path, "--lease-term", "2", max_retries=1, nobody_pays=True, make=make
    )
    assert [verdict.problems for verdict in verdicts] == [[], []]
    assert sum(verdict.kills.total() for verdict in verdicts) >= 50
    for verdict in verdicts:
        for paid in ("charged", "crashed", "expired_reissues", "failed"):
            assert verdict.status[paid] == 0, f"{paid}, but nobody was at fault"


@pytest.mark.slow
def test_no_kill_of_the_server_harms_a_run_of_clients_that_sit_drop_and_send_rubbish(
    tmp_path: Path,
) -> None:
    def make(run: Run, seed: str) -> list[Client]:
        kinds = [Client, Client, Client, Dropper, Dropper, Sitter, OldClient]
        return [kind(run, f"{kind.__name__}{n}", seed) for n, kind in enumerate(kinds)]

    flags = ("--lease-term", "0.5", "--work-timeout", "0.4")
    verdicts = torment_two_runs(tmp_path, *flags, max_retries=2, nobody_pays=False, make=make)
    assert [verdict.problems for verdict in verdicts] == [[], []]
    assert sum(verdict.kills.total() for verdict in verdicts) >= 50
    for verdict in verdicts:
        assert verdict.status["charged"] > 0, "nobody was charged: the clients are too well-behaved"


# -------------------------------------------------------------------- workers are killed

TASK = "tests/faults/kill_task.py:TwoStepTask"
HOLDER = "holder"
LEASE_TERM_S = 1.5
STOP_S = 6.0


@contextmanager
def fakellm(*flags: str) -> Iterator[str]:
    with running(sys.executable, "-m", "dispatcher.fakellm", "--port", "0", *flags) as process:
        yield process.wait_for_line(_FAKELLM)[1]


@contextmanager
def serving(files: RunFiles) -> Iterator[Process]:
    server = files.start_server()
    try:
        server.wait_for_line(_SERVING)
        yield server
    finally:
        server.kill()


@contextmanager
def holding_the_first_line(files: RunFiles) -> Iterator[Callable[[], None]]:
    """Hold line 0 as a worker that does not start it; yield what hands in its result.

    So the run cannot end before, nor its journal, which tells who paid for what, be deleted.
    """
    with WorkClient(files.address, HOLDER) as client:
        client.heartbeat(HeartbeatRequest(HOLDER))
        (item,) = client.get_work().items
        let_go = threading.Event()

        def beat() -> None:
            while not let_go.wait(LEASE_TERM_S / 5):
                client.heartbeat(HeartbeatRequest(HOLDER, {str(item.lease): 0}))

        def finish() -> None:
            item.set_result(item.content)
            assert client.submit_results([item]).outcomes == ["accepted"]

        beating = threading.Thread(target=beat)
        beating.start()
        try:
            yield finish
        finally:
            let_go.set()
            beating.join()


def status_of(files: RunFiles) -> dict[str, Any]:
    with WorkClient(files.address) as client:
        return client.status()


def pid_of(process: Process) -> int:
    return process._popen.pid


def processes_of_sessions(sessions: set[int]) -> list[int]:
    """Return the living processes of these sessions: each worker leads one."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            state, _, _, session = (entry / "stat").read_text().rpartition(") ")[2].split()[:4]
            if int(session) in sessions and state != "Z":
                found.append(int(entry.name))
    return found


@dataclass
class WorkerKiller:
    """Starts task managers and ends or stops them, at moments drawn from the seed."""

    files: RunFiles
    base_url: str
    signals: deque[str]
    workers: list[Process] = field(default_factory=list)
    fates: dict[int, set[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def start(self, slots: int) -> Process:
        command = [sys.executable, "-m", "dispatcher.taskmanager.cli", "--task", TASK]
        command += ["--dispatcher", self.files.address, "--log-dir", str(self.files.directory)]
        command += ["--backend", "openai", "--base-url", self.base_url, "--model", "m"]
        command += ["--workers", str(slots), "--batch-size", "3"]
        worker = Process(*command)
        self.workers.append(worker)
        self.fates[pid_of(worker)] = set()
        return worker

    def torment(self, name: str) -> None:
        """Keep one worker going, and send it signals, until there are no more to send."""
        rng = Random(f"{SEED} {name}")
        worker = self.start(slots=12)
        while True:
            if rng.random() < 0.25:
                time.sleep(rng.uniform(0.1, 1.2))  # while it starts, perhaps
            elif not self.fates[pid_of(worker)]:
                worker.wait_for_line(_AT_WORK)
            time.sleep(rng.uniform(0, 1.5))
            try:
                signal_name = self.signals.popleft()
            except IndexError:
                return
            if self._send(worker, signal_name, rng.uniform(1.1, 1.8) * LEASE_TERM_S):
                worker = self.start(slots=12)

    def _send(self, worker: Process, name: str, stop_s: float) -> bool:
        """Send one signal, or a pair of them; say whether the worker is gone."""
        fate = self.fates[pid_of(worker)]
        fate.add(name)
        if name.startswith("STOP"):
            worker.signal(signal.SIGSTOP)
            time.sleep(stop_s)
        if name == "STOP, CONT":
            worker.signal(signal.SIGCONT)
            return False
        if name == "TERM":
            worker.stop()
            self._judge_end(worker, fate)
        else:
            worker.signal(signal.SIGKILL)
            worker.wait()
        return True

    def _judge_end(self, worker: Process, fate: set[str]) -> None:
        try:
            code = worker.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.problems.append(f"a worker did not end within {STOP_S:g} s: {worker.output}")
            worker.kill()
            return
        if code == -signal.SIGTERM:
            fate.add("never began")  # Python was still starting
        elif code != 3:
            self.problems.append(f"a worker that was stopped ended with {code}: {worker.output}")

    def judge_payments(self, events: list[Event]) -> int:
        """Hold the journal against the table of who pays; return how many charges it leads to."""
        workers: dict[int, str] = {}
        alone: set[int] = set()
        blamed: dict[tuple[int, str], list[bool]] = {}
        split = [part for x in events for part in (x.parts() if type(x) is IssuedFresh else (x,))]
        for event in split:
            match event:
                case Issued(worker, _, solo, serial, work_ids):
                    leases = range(serial, serial + len(work_ids))
                    workers |= dict.fromkeys(leases, worker)
                    alone |= set(leases) if solo else set()
                    if worker != HOLDER and "never began" in self._fate_of(worker):
                        self.problems.append(f"{worker} took work before it had begun")
                case LeaseEnded(work_id, serial, kind):
                    worker = workers[serial]
                    died = self._fate_of(worker) - {"TERM"}
                    if kind == "charged" or (kind == "crashed" and not died):
                        self.problems.append(f"wrongly {kind}, {worker}: {event}")
                    if kind == "crashed":
                        blamed.setdefault((work_id, worker), []).append(serial in alone)
                case Absolved(work_id, worker):
                    if crashes := blamed.get((work_id, worker)):
                        crashes.pop()
                    else:
                        self.problems.append(f"absolved of nothing: {event}")
        return sum(sum(crashes) for crashes in blamed.values())

    def _fate_of(self, worker_name: str) -> set[str]:
        _, pid, _ = worker_name.rsplit("-", 2)  # host, process, a random part
        return self.fates[int(pid)]

    def kill_all(self) -> None:
        for worker in self.workers:
            worker.kill()


def read_journal(files: RunFiles) -> list[Event]:
    """Return the events in the journal: its lines that are not a frame's header."""
    segments = sorted((files.state_dir / "journal").glob("*.journal"))
    lines = [line for path in segments for line in path.read_bytes().split(b"\n")]
    records = [decode_record(line) for line in lines if line.startswith(b"[")]
    return [record for record in records if isinstance(record, Event)]


@pytest.mark.slow
def test_workers_that_are_killed_and_stopped_at_random_moments_cost_no_line_a_retry(
    tmp_path: Path,
) -> None:
    signals = ["KILL"] * 20 + ["TERM"] * 15 + ["STOP, CONT"] * 15 + ["STOP, KILL"] * 4
    Random(SEED).shuffle(signals)
    flags = ("--lease-term", f"{LEASE_TERM_S:g}", "--max-retries", "3")
    files = RunFiles(tmp_path, 1500, flags)
    with ExitStack() as stack:
        base_url = stack.enter_context(fakellm("--latency-s", "0.25", "--latency-jitter-s", "0.5"))
        server = stack.enter_context(serving(files))
        finish = stack.enter_context(holding_the_first_line(files))
        killer = WorkerKiller(files, base_url, deque(signals))
        stack.callback(killer.kill_all)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(killer.torment, [f"worker {n}" for n in range(4)]))
        done_then = status_of(files)["done"]
        killer.start(slots=64)
        wait_until(
            lambda: status_of(files)["done"] == files.line_count - 1,
            "all lines but the first",
            deadline_s=60,
        )
        charges = killer.judge_payments(read_journal(files))
        status = status_of(files)
        finish()

        survivors = [worker for worker in killer.workers if not has_ended(worker)]
        assert len(survivors) >= 5
        assert [worker.wait(30) for worker in survivors] == [0] * len(survivors)
        assert server.wait(30) == 0
        assert processes_of_sessions(set(killer.fates)) == []
    output = files.outfile.read_bytes()
    problems = [*killer.problems, *Ledger(3).problems(files.lines, output)]
    sent = Counter(signals)
    print(
        f"workers: {sent.total()} times {words(sent)} while {done_then} of {files.line_count} "
        f"lines got done; {status['crashed']} crashed, {status['returned']} returned, "
        f"{status['released']} released, {charges} charged; {len(problems)} problems; seed {SEED}"
    )
    assert problems == []
    assert done_then < files.line_count - 1, "the run was over before the last signal"
    assert status["charged"] == charges
    assert status["expired_reissues"] == 0
    assert status["failed"] == 0


@pytest.mark.slow
def test_a_server_that_was_stopped_for_longer_than_the_lease_term_charges_nobody(
    tmp_path: Path,
) -> None:
    rng = Random(SEED)
    flags = ("--lease-term", f"{LEASE_TERM_S:g}", "--max-retries", "0")
    files = RunFiles(tmp_path, 600, flags)
    with ExitStack() as stack:
        base_url = stack.enter_context(fakellm("--latency-s", "0.05", "--latency-jitter-s", "0.2"))
        server = stack.enter_context(serving(files))
        killer = WorkerKiller(files, base_url, deque())
        stack.callback(killer.kill_all)
        workers = [killer.start(slots=16) for _ in range(2)]
        for terms in (1.5, 4.5):
            done = status_of(files)["done"]
            wait_until(lambda done=done: status_of(files)["done"] > done, "work", deadline_s=30)
            time.sleep(rng.uniform(0, 0.5))
            server.signal(signal.SIGSTOP)
            time.sleep(terms * LEASE_TERM_S)
            server.signal(signal.SIGCONT)
        done_then = status_of(files)["done"]
        wait_until(lambda: status_of(files)["state"] == "complete", "the run's end", deadline_s=60)
        status = status_of(files)
        assert [worker.wait(30) for worker in workers] == [0, 0]
        assert server.wait(30) == 0
        assert processes_of_sessions(set(killer.fates)) == []
    problems = Ledger(0).problems(files.lines, files.outfile.read_bytes())
    print(
        f"server: stopped twice while {done_then} of {files.line_count} lines got done; "
        f"{status['crashed']} crashed, {status['returned']} returned, {status['charged']} charged; "
        f"{len(problems)} problems; seed {SEED}"
    )
    assert problems == []
    assert (status["charged"], status["expired_reissues"], status["failed"]) == (0, 0, 0)
    assert done_then < files.line_count, "the run was over before the last stop"
