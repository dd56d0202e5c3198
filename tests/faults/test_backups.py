"""What backups are worth: a run with one slow worker, in virtual time.

32 workers of 32 slots take 10,000 items; one of the workers is 20 times slower than the others.
The service, the queue and the workers' source are the real ones (see simulation.py).
"""

from __future__ import annotations

from random import Random

import pytest

from dispatcher.config import RunSettings
from dispatcher.core.work_queue import QueuePolicy
from tests.faults.oracle import Ledger, input_line
from tests.faults.sim_disk import SimDisk, SimLocks, path_class
from tests.faults.sim_loop import VirtualLoop, until
from tests.faults.sim_world import Conduct, Server, Worker, World
from tests.faults.simulation import input_of, run_in_virtual_time

ITEMS = 10_000
SLOTS = 32
ITEM_S = 20.0
SLOWER = 20.0


def make_world(loop: VirtualLoop, *, backups: bool) -> World:
    disk = SimDisk(Random("backups disk"), loop.time)
    path = path_class(disk)
    disk.make_dirs("host", "/run")
    settings = RunSettings(
        infile=input_of(ITEMS),
        outfile=path("/run/out.jsonl"),
        state_dir=path("/run/state"),
        policy=QueuePolicy(backups=backups),
    )
    return World(
        Random("backups"),
        settings,
        disk,
        SimLocks("working"),
        Ledger(max_retries=3),
        Conduct(),
        ITEM_S,
        beat_s=5.0,
    )


def seconds_for(workers: int, *, slow: int, backups: bool) -> float:
    """Return how long a run takes with so many workers, of which `slow` are slow."""

    async def run(loop: VirtualLoop) -> float:
        world = make_world(loop, backups=backups)
        Server(world, "host")
        for number in range(workers):
            slowness = SLOWER if number < slow else 1.0
            Worker(world, number, slots=SLOTS, slowness=slowness, ahead=SLOTS // 4)
        await until(lambda: world.is_complete, every_s=0.1)
        took_s = loop.time()
        await until(lambda: not world.living_servers and not world.living_workers)
        output = world.disk.content(world.settings.outfile) or b""
        lines = [input_line(number) for number in range(ITEMS)]
        assert world.problems_at_the_end(lines, output) == []
        return took_s

    result = run_in_virtual_time(run)
    assert isinstance(result, float)
    return result


@pytest.mark.slow
def test_a_slow_worker_hardly_delays_a_run_with_backups() -> None:
    # given
    without_slow_s = seconds_for(31, slow=0, backups=True)

    # when
    auto_s = seconds_for(32, slow=1, backups=True)
    off_s = seconds_for(32, slow=1, backups=False)

    # then
    print(
        f"{ITEMS} items of {ITEM_S:.0f} s: 31 workers {without_slow_s:.1f} s; with a slow one "
        f"beside them {auto_s:.1f} s with backups ({auto_s / without_slow_s:.3f} times) and "
        f"{off_s:.1f} s without ({off_s / without_slow_s:.3f} times)"
    )
    assert auto_s <= 1.15 * without_slow_s
    assert off_s > auto_s
