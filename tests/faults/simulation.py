"""A whole run in virtual time, from one seed: servers, disk, network and workers, and faults.

    python -m tests.faults.simulation SEED [--trace]

repeats one seed and tells what happened. A seed draws a scenario (size, limits, kinds of
misconduct), a plan of faults, and every latency. After a bounded time the faults end; then the
run must become complete within a bounded time, and the oracle judges what the clients were told.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

from dispatcher.config import RunSettings
from dispatcher.core.work_queue import QueuePolicy
from dispatcher.storage import ownership, writer
from tests.faults.oracle import Ledger, input_line
from tests.faults.sim_disk import SimDisk, SimLocks, path_class
from tests.faults.sim_loop import DeadlockError, SteppedLock, VirtualLoop, until
from tests.faults.sim_operator import Operator
from tests.faults.sim_world import Conduct, OldClient, Server, SimLink, Worker, World, patched

HOSTS = ("host1", "host2")
AFTER_FAULTS_S = 3000.0
MOST_STARTS = 60
MOST_CALLBACKS = 400_000
_PATH_CHARACTERS = 100


@dataclass
class Scenario:
    """What a seed draws once; `plan` holds the faults: (second, name).

    At the seconds `pauses` an operator pauses the run for a while.
    """

    seed: int
    lines: int
    workers: int
    old_clients: int
    slots: int
    mean_s: float
    policy: QueuePolicy
    checkpoint_every_s: float
    segment_results: int
    locks: str
    stepped: bool
    nobody_pays: bool
    conduct: Conduct
    fault_phase_s: float
    restart_after_s: float
    plan: list[tuple[float, str]] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)


@dataclass
class Verdict:
    """How one seed went."""

    problems: list[str]
    counts: Counter[str]
    digest: str
    events: list[str]
    virtual_s: float


SERVER_FAULTS = (
    "server killed",
    "server killed in a file operation",
    "host crashed",
    "host crashed in a file operation",
    "server stopped for a while",
    "server stopped and another one started",
    "server stopped in a file operation, another one started",
    "server stopped while it starts, another one started",
    "second server started",
    "two servers started at once",
    "disk full for a while",
    "write fails once",
    "sync fails once",
    "slow disk for a while",
    "server terminated",
)
WORKER_FAULTS = (
    "worker killed",
    "worker stopped for a while",
    "worker slow for a while",
    "worker terminated",
    "backend down for a while",
    "engine crashed",
    "one worker cut off",
    "many workers cut off",
)
_ENGINE_RESTARTED = "engine died and is started again"
_CRASHES = (
    "worker killed",
    "worker stopped for a while",
    "engine crashed",
    "one worker cut off",
    "many workers cut off",
)


_CONTESTS = (
    "server stopped in a file operation, another one started",
    "server stopped while it starts, another one started",
    "two servers started at once",
)


def draw_scenario(seed: int) -> Scenario:
    """Draw what happens in a seed."""
    rng = Random(f"scenario {seed}")
    nobody_pays = rng.random() < 0.35
    workers = rng.randint(3, 12) if rng.random() < 0.9 else rng.randint(13, 50)
    conduct = Conduct()
    if rng.random() < 0.6:
        conduct.lost_request = rng.choice([0.0, 0.02, 0.1])
        conduct.lost_reply = rng.choice([0.0, 0.02, 0.1])
        conduct.twice = rng.choice([0.0, 0.02, 0.1])
        conduct.slow_call = rng.choice([0.0, 0.05])
    old_clients = 0
    work_timeout_s = float(rng.choice([300, 600]))
    if not nobody_pays:
        conduct.invalid = rng.choice([0.0, 0.0, 0.05])
        conduct.retry = rng.choice([0.0, 0.0, 0.1, 0.3])
        conduct.raises = rng.choice([0.0, 0.0, 0.05])
        conduct.sits = rng.choice([0.0, 0.0, 0.03])
        old_clients = rng.choice([0, 0, 1, 2])
        work_timeout_s = float(rng.choice([60, 120]))
    lines = min(rng.randint(20, 120), rng.randint(20, 120))
    slots = rng.randint(1, 4) if workers <= 12 else 1
    fault_phase_s = rng.uniform(30.0, 120.0)
    # The work lasts about as long as the faults do, but no item for ever.
    mean_s = rng.uniform(0.4, 1.0) * fault_phase_s * workers * slots / lines
    scenario = Scenario(
        seed,
        lines=lines,
        workers=workers,
        old_clients=old_clients,
        slots=slots,
        mean_s=min(10.0, mean_s),
        policy=QueuePolicy(
            max_retries=rng.choice([1, 2, 3, -1]),
            work_timeout_s=work_timeout_s,
            lease_term_s=30.0,
            window=rng.choice([0, 0, rng.randint(5, 40)]),
            backups=rng.random() < 0.5,
        ),
        checkpoint_every_s=rng.choice([1.0, 5.0, 20.0]),
        segment_results=rng.choice([5, 20, 200_000]),
        locks=rng.choice(["working", "working", "absent", "node-local"]),
        stepped=rng.random() < 0.1,
        nobody_pays=nobody_pays,
        conduct=conduct,
        fault_phase_s=fault_phase_s,
        restart_after_s=rng.choice([0.5, 3.0, 20.0]),
    )
    conduct.rewords = Random(f"wording {seed}").choice([0.0, 0.0, 0.2])
    scenario.plan = _draw_plan(scenario, rng)
    scenario.plan += _draw_restarts_of_engines(scenario)
    scenario.plan.sort()
    scenario.pauses = _draw_pauses(scenario)
    if any(kind in _CONTESTS for _, kind in scenario.plan):
        scenario.stepped = rng.random() < 0.6
        scenario.locks = rng.choice(["working", "absent", "absent", "node-local"])
    return scenario


def _draw_plan(scenario: Scenario, rng: Random) -> list[tuple[float, str]]:
    kinds = rng.sample(SERVER_FAULTS, rng.randint(1, 4))
    kinds += rng.sample(WORKER_FAULTS, rng.randint(0, 4))
    plan: list[tuple[float, str]] = []
    crashes = 0
    for kind in kinds:
        for _ in range(rng.choice([1, 1, 2, 3])):
            crashes += kind in _CRASHES
            # An item that is running in three crashes is charged: not when nobody shall pay.
            if crashes <= 2 or kind not in _CRASHES or not scenario.nobody_pays:
                plan.append((rng.uniform(0.0, scenario.fault_phase_s), kind))
    if "two servers started at once" in kinds and rng.random() < 0.5:
        plan.append((0.0, "two servers started at once"))
    return sorted(plan)


def _draw_restarts_of_engines(scenario: Scenario) -> list[tuple[float, str]]:
    """Some die alone, some in the time in which something else happens, too."""
    rng = Random(f"engines {scenario.seed}")
    times = rng.choice([0, 0, 1, 2, 4, 12])
    if scenario.nobody_pays:
        times = min(times, 2 - sum(kind in _CRASHES for _, kind in scenario.plan))
    moments = [moment for moment, _ in scenario.plan]
    return [
        (
            max(0.0, rng.choice(moments) + rng.uniform(-3.0, 3.0))
            if rng.random() < 0.5
            else rng.uniform(0.0, scenario.fault_phase_s),
            _ENGINE_RESTARTED,
        )
        for _ in range(times)
    ]


def _draw_pauses(scenario: Scenario) -> list[float]:
    """Some begin about when something else happens."""
    rng = Random(f"pauses {scenario.seed}")
    moments = [moment for moment, _ in scenario.plan]
    times = rng.choice([0, 0, 0, 1, 2, 3])
    return sorted(max(0.0, rng.choice(moments) + rng.uniform(-3.0, 3.0)) for _ in range(times))


class Simulation:
    """One seed, while it runs."""

    def __init__(self, scenario: Scenario, infile: Path, loop: VirtualLoop) -> None:
        self.scenario = scenario
        self.rng = rng = Random(f"course {scenario.seed}")
        disk = SimDisk(Random(f"disk {scenario.seed}"), loop.time)
        path = path_class(disk)
        disk.make_dirs(HOSTS[0], "/run")
        disk.settle()
        settings = RunSettings(
            infile=infile,
            outfile=path("/run/out.jsonl"),
            state_dir=path("/run/state"),
            policy=scenario.policy,
            retry_s=5.0,
            checkpoint_every_s=scenario.checkpoint_every_s,
        )
        self.world = World(
            rng,
            settings,
            disk,
            SimLocks(scenario.locks),
            Ledger(scenario.policy.max_retries),
            scenario.conduct,
            scenario.mean_s,
            stepped=scenario.stepped,
            nobody_pays=scenario.nobody_pays,
        )
        self._running: dict[asyncio.Task[None], None] = {}

    # ---------------------------------------------------------------- course

    async def run(self) -> list[str]:
        """Run the seed to its end; return what is wrong, a sentence each."""
        world, scenario = self.world, self.scenario
        if (0.0, "two servers started at once") not in scenario.plan:
            self._start_server()
        for number in range(scenario.old_clients):
            OldClient(world, number)
        for number in range(scenario.workers):
            self._start_worker(number)
        if scenario.pauses:
            rng = Random(f"operator {scenario.seed}")
            Operator(world, lambda who: SimLink(world, who, "").call, rng, scenario.pauses)
        keeping = asyncio.ensure_future(self._keep_running())
        for second, kind in scenario.plan:
            await asyncio.sleep(second - world.now)
            if world.is_complete:
                break
            self._strike(kind)
        if not world.is_complete:
            await asyncio.sleep(max(0.0, scenario.fault_phase_s - world.now))
        self._end_faults()
        last_s = world.now + AFTER_FAULTS_S
        await until(lambda: self._is_over or world.now > last_s)
        keeping.cancel()
        if not world.is_complete:
            return [*world.ledger.wrong, f"not complete {AFTER_FAULTS_S:.0f} s after the faults"]
        await self._start_once_more()
        output = world.disk.content(world.settings.outfile) or b""
        lines = [input_line(number) for number in range(scenario.lines)]
        return world.problems_at_the_end(lines, output)

    @property
    def _is_over(self) -> bool:
        world = self.world
        return world.is_complete and not world.living_servers and not world.living_workers

    async def _start_once_more(self) -> None:
        """A start on the complete run says so and touches nothing."""
        world = self.world
        if self.rng.random() < 0.8:
            return
        before = world.disk.content(world.settings.outfile)
        server = Server(world, HOSTS[0])
        await until(lambda: not server.process.is_alive)
        if server.process.ending != "complete":
            world.complain(f"a start on the complete run ended: {server.process.ending!r}")
        if world.disk.content(world.settings.outfile) != before:
            world.complain("a start on the complete run changed the output")

    async def _keep_running(self) -> None:
        """Start servers and workers again, as a cluster's scheduler does."""
        world, scenario = self.world, self.scenario
        replaced = 0
        while not world.is_complete:
            await asyncio.sleep(1.0)
            if len(world.servers) == MOST_STARTS:
                world.complain(f"the server was started {MOST_STARTS} times")
                return
            if not world.living_servers and not world.is_complete:
                await asyncio.sleep(self.rng.uniform(0.0, scenario.restart_after_s))
                if not world.living_servers and not world.is_complete:
                    self._start_server()
            ended = sum(not worker.process.is_alive for worker in world.workers)
            named = [w for w in world.living_workers if isinstance(w, Worker)]
            if ended > replaced or len(named) < 2:
                replaced += 1
                if len(named) < 2 or self.rng.random() < 0.5:
                    self._start_worker(len(world.workers))

    def _end_faults(self) -> None:
        world = self.world
        world.trace("", "no more faults")
        world.faults_last = False
        conduct = world.conduct
        for name in vars(conduct):
            setattr(conduct, name, 0.0)
        for task in list(self._running):
            task.cancel()
        disk = world.disk
        disk.is_full = disk.fail_next_write = False
        disk.fail_next_sync = None
        disk.slow_sync_s = 0.0
        for server in world.servers:
            server.files.kill_in = None
            server.files.act_in = server.files.act_in_writes = 0
            server.process.go_on()
        for worker in world.workers:
            worker.is_cut_off = False
            worker.process.go_on()
            if isinstance(worker, Worker):
                worker.slowness = 1.0
                worker.set_backend(up=True)

    # ---------------------------------------------------------------- faults

    def _start_server(self, host: str | None = None, *, takeover: bool = False) -> Server:
        host = host or (HOSTS[0] if self.rng.random() < 0.7 else HOSTS[1])
        return Server(self.world, host, takeover=takeover)

    def _start_worker(self, number: int) -> None:
        slowness = 5.0 if self.rng.random() < 0.05 else 1.0
        Worker(self.world, number, slots=self.scenario.slots, slowness=slowness)

    def _strike(self, kind: str) -> None:
        if kind in SERVER_FAULTS:
            servers = self.world.living_servers
            needs = kind not in ("two servers started at once",)
            if needs and not servers:
                return
            struck = self._strike_server(kind, self.rng.choice(servers) if servers else None)
        else:
            workers = [w for w in self.world.living_workers if isinstance(w, Worker)]
            if not workers:
                return
            struck = self._strike_worker(kind, self.rng.choice(workers))
        if struck:
            self.world.counts[kind] += 1

    def _strike_server(self, kind: str, server: Server | None) -> bool:
        world, rng, disk = self.world, self.rng, self.world.disk
        name = server.process.name if server is not None else ""
        world.trace(name, kind)
        if kind == "two servers started at once":
            if server is not None:
                server.process.kill()
            for host in rng.choice([HOSTS, HOSTS[:1] * 2]):
                self._start_server(host)
            return True
        assert server is not None
        match kind:
            case "server killed":
                server.process.kill()
            case "server killed in a file operation":
                server.files.kill_in = rng.randrange(12)
            case "host crashed":
                for other in world.living_servers:
                    if other.process.host == server.process.host:
                        other.process.kill()
                disk.crash(server.process.host)
            case "host crashed in a file operation":
                server.files.takes_host_along = lambda: self._is_alone(server)
                server.files.kill_in = rng.randrange(12)
            case "server stopped for a while":
                self._stop_server(server, rng.uniform(1.0, 60.0))
            case "server stopped and another one started":
                self._stop_server(server, rng.uniform(5.0, 60.0))
                self._later(rng.uniform(0.0, 10.0), self._start_server)
            case "server stopped in a file operation, another one started":
                in_writes = rng.choice([0, rng.randint(1, 6)])
                self._stop_in_operation(
                    server, in_writes=in_writes, in_any=0 if in_writes else rng.randint(1, 15)
                )
            case "server stopped while it starts, another one started":
                server.process.kill()
                self._stop_in_operation(self._start_server(), in_any=rng.randint(1, 40))
            case "second server started":
                self._start_server(takeover=rng.random() < 0.3)
            case "disk full for a while":
                world.contact_is_sure = False
                disk.is_full = True
                self._later(rng.uniform(2.0, 40.0), self._make_room)
            case "write fails once":
                disk.fail_next_write = True
            case "sync fails once":
                disk.fail_next_sync = rng.choice(["", ".journal", "out.jsonl"])
            case "slow disk for a while":
                world.contact_is_sure = False
                disk.slow_sync_s = rng.choice([0.5, 4.0, 20.0])
                self._later(rng.uniform(5.0, 60.0), self._mend_slowness)
            case "server terminated":
                server.stop_asked.set()
        return True

    def _strike_worker(self, kind: str, worker: Worker) -> bool:
        world, rng = self.world, self.rng
        world.trace(worker.process.name, kind)
        match kind:
            case "worker killed":
                worker.process.kill()
            case "worker stopped for a while":
                worker.process.stop()
                self._later(rng.uniform(5.0, 100.0), worker.process.go_on)
            case "worker slow for a while":
                worker.slowness = rng.uniform(3.0, 8.0)
            case "worker terminated":
                worker.terminate("the worker was stopped")
            case "engine died and is started again":
                worker.crash_engine()
                self._later(rng.uniform(0.5, 60.0), functools.partial(worker.set_backend, up=True))
            case "engine crashed":
                worker.terminate("crash")
            case "backend down for a while":
                worker.set_backend(up=False)
                self._later(rng.uniform(5.0, 150.0), functools.partial(worker.set_backend, up=True))
            case "one worker cut off":
                self._cut_off([worker])
            case "many workers cut off":
                share = rng.uniform(0.34, 1.0)
                living = world.living_workers
                self._cut_off(rng.sample(living, max(1, round(share * len(living)))))
        return True

    def _cut_off(self, workers: list[Any]) -> None:
        def heal() -> None:
            for worker in workers:
                worker.is_cut_off = False

        for worker in workers:
            worker.is_cut_off = True
        self._later(self.rng.uniform(5.0, 100.0), heal)

    def _stop_server(self, server: Server, seconds: float) -> None:
        server.process.stop()
        self._later(seconds, server.process.go_on)

    def _stop_in_operation(self, server: Server, *, in_writes: int = 0, in_any: int = 0) -> None:
        """Stop it between two of its file operations, long enough for another one to take over.

        Some of the workers go with it, as when a part of the cluster has a power cut, so that
        others do their items again.
        """
        rng, loop = self.rng, asyncio.get_running_loop()
        stop_s, start_after_s = rng.uniform(35.0, 120.0), rng.uniform(0.0, 10.0)
        dying = rng.random() * (not self.scenario.nobody_pays)

        def stop() -> None:
            self.world.trace(server.process.name, "stops in a file operation")
            self.world.counts["stops in a file operation"] += 1
            server.process.stop()
            loop.call_later(stop_s, server.process.go_on)
            loop.call_later(start_after_s, self._start_if_faults_last)
            loop.call_later(0.1, kill_some)

        def kill_some() -> None:
            for worker in self.world.living_workers:
                if rng.random() < dying:
                    worker.process.kill()

        server.files.act = stop
        server.files.act_in_writes, server.files.act_in = in_writes, in_any

    def _start_if_faults_last(self) -> None:
        if self.world.faults_last and not self.world.is_complete:
            self._start_server()

    def _is_alone(self, server: Server) -> bool:
        return not any(s.process.host == server.process.host for s in self.world.living_servers)

    def _make_room(self) -> None:
        self.world.disk.is_full = False

    def _mend_slowness(self) -> None:
        self.world.disk.slow_sync_s = 0.0

    def _later(self, seconds: float, act: Callable[[], object]) -> None:
        async def wait_and_act() -> None:
            await asyncio.sleep(seconds)
            act()

        task = asyncio.ensure_future(wait_and_act())
        self._running[task] = None
        task.add_done_callback(lambda _: self._running.pop(task, None))


# -------------------------------------------------------------------- running seeds


@functools.cache
def _input_dir() -> Path:
    holder = tempfile.TemporaryDirectory(prefix="simulation-")
    _kept.append(holder)  # removed when the process ends
    return Path(holder.name)


_kept: list[Any] = []


@functools.cache
def input_of(lines: int) -> Path:
    """Return a file of so many input lines, one for all seeds.

    The length of its path is always the same, because the run's files hold it.
    """
    directory = _input_dir()
    stem = f"in-{lines}-"
    path = directory / stem.ljust(_PATH_CHARACTERS - len(str(directory)), "x")
    path.write_text("".join(input_line(number) + "\n" for number in range(lines)))
    return path


def run_in_virtual_time(main: Callable[[VirtualLoop], Coroutine[Any, Any, Any]]) -> Any:
    """Run a coroutine on a loop whose time is virtual."""
    loop = VirtualLoop()
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(main(loop))
    finally:
        asyncio.set_event_loop(None)
        loop.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("dispatcher")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def run_seed(seed: int, scenario: Scenario | None = None) -> Verdict:
    """Run one seed and judge it."""
    scenario = scenario or draw_scenario(seed)
    loop = VirtualLoop(MOST_CALLBACKS)
    simulation = Simulation(scenario, input_of(scenario.lines), loop)
    small_segments = patched(writer, SEGMENT_RESULTS=scenario.segment_results)
    stepped_locks = patched(ownership, threading=SimpleNamespace(Lock=SteppedLock))
    with _quiet(), small_segments, stepped_locks:
        asyncio.set_event_loop(loop)
        try:
            problems = loop.run_until_complete(simulation.run())
        except DeadlockError as error:
            problems = [*simulation.world.ledger.wrong, str(error)]
        finally:
            for process in [
                c.process for c in (*simulation.world.servers, *simulation.world.workers)
            ]:
                process.kill()
            asyncio.set_event_loop(None)
            loop.close()
    world = simulation.world
    counts = world.counts + world.disk.injected
    return Verdict(problems + loop.defects, counts, world.digest, world.events, loop.time())


def main() -> int:
    """Repeat one seed, or a range of seeds, from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("seed", type=int)
    parser.add_argument("--trace", action="store_true", help="print what happened")
    parser.add_argument("--seeds", type=int, default=1, help="run so many, from SEED on")
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    failed = 0
    for seed in range(args.seed, args.seed + args.seeds):
        verdict = run_seed(seed)
        counts += verdict.counts
        failed += bool(verdict.problems)
        if args.trace:
            print("\n".join(verdict.events))
        if args.seeds == 1:
            print(draw_scenario(seed))
            print(f"{verdict.virtual_s:.0f} virtual seconds, trace {verdict.digest}")
        for problem in verdict.problems[:5]:
            print(f"seed {seed}: {problem}")
    print(f"{args.seeds} seeds, {failed} with problems; {dict(sorted(counts.items()))}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
