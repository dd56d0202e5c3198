"""Of two servers on one run at most one acknowledges anything, locks or not."""

from __future__ import annotations

import errno
import itertools
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from dispatcher.errors import DispatcherError, RunLockedError, StateError, StorageError
from dispatcher.storage import ownership as ownership_module
from dispatcher.storage.files import Files
from dispatcher.storage.ownership import (
    CONFIRM_WITHIN_S,
    OWNERS_DIR,
    REFRESH_S,
    SETTLE_S,
    TAKEOVER_AFTER_S,
    Claim,
    Identity,
    Ownership,
    PathLock,
    awake_or_not_s,
)
from tests.storage.broken_files import FULL, BrokenFiles

SEED = int(os.environ.get("DISPATCHER_TEST_SEED", "7"))
SCHEDULES = 400


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class NoLocks:
    """A file system without locks."""

    def acquire(self) -> bool:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    def release(self) -> None:
        pass


def identity(name: str, *, pid: int = 1, host: str | None = None) -> Identity:
    """Return a process on a host of its own, unless told otherwise."""
    return Identity(host or f"host-{name}", "boot", "namespace", pid, "started")


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    path = tmp_path / "state"
    path.mkdir()
    return path


@pytest.fixture
def clock() -> Clock:
    return Clock()


def server(
    state_dir: Path,
    clock: Clock,
    name: str,
    *,
    files: Files | None = None,
    takeover: bool = False,
    who: Identity | None = None,
) -> Ownership:
    return Ownership(
        state_dir,
        files or Files(),
        takeover=takeover,
        identity=who or identity(name),
        lock=NoLocks(),
        clock=clock,
    )


def owner(state_dir: Path, clock: Clock, name: str, **options: object) -> Ownership:
    """Return a server that has the run."""
    one = server(state_dir, clock, name, **options)  # type: ignore[arg-type]
    assert one.try_take(0) == 0
    return one


def take_in_time(one: Ownership, clock: Clock, *, every: Callable[[], object] = int) -> float:
    """Try until the run is ours; return how long that took."""
    began = clock.now
    while wait_s := one.try_take(0):
        clock.now += wait_s
        every()
        assert clock.now < began + 300
    return clock.now - began


def claim_path(state_dir: Path, epoch: int) -> Path:
    return state_dir / OWNERS_DIR / f"{epoch:06d}"


# -------------------------------------------------------------------- one after the other


def test_the_first_server_has_the_run_at_once(state_dir: Path, clock: Clock) -> None:
    first = server(state_dir, clock, "a")
    assert not first.is_confirmed
    assert first.try_take(0) == 0
    assert first.is_confirmed
    assert first.epoch == 1
    first.confirm()


def test_an_epoch_is_above_every_segment_that_was_ever_written(
    state_dir: Path, clock: Clock
) -> None:
    first = server(state_dir, clock, "a")
    assert first.try_take(epoch_floor=41) == 0
    assert first.epoch == 42


def test_after_an_owner_that_ended_the_next_one_has_the_run_at_once(
    state_dir: Path, clock: Clock
) -> None:
    first = owner(state_dir, clock, "a")
    first.release()
    second = owner(state_dir, clock, "b")
    assert second.epoch == first.epoch + 1
    assert os.listdir(state_dir / OWNERS_DIR) == ["000002"]


def test_a_silent_owner_on_another_host_is_waited_for(state_dir: Path, clock: Clock) -> None:
    first = owner(state_dir, clock, "a")
    second = server(state_dir, clock, "b")
    waited_s = take_in_time(second, clock)
    assert 0 <= waited_s - TAKEOVER_AFTER_S - SETTLE_S <= 1
    assert second.is_confirmed
    assert not first.is_confirmed


def test_a_living_owner_on_another_host_is_named(state_dir: Path, clock: Clock) -> None:
    first = owner(state_dir, clock, "a")
    second = server(state_dir, clock, "b")
    refreshes = iter(range(1000))

    def refresh() -> None:
        if next(refreshes) % 10 == 0:
            first.confirm()

    with pytest.raises(RunLockedError, match="process 1 on host-a"):
        take_in_time(second, clock, every=refresh)
    assert second.epoch == 0
    assert first.is_confirmed


def test_a_refused_server_refuses_again_when_it_is_asked_again(
    state_dir: Path, clock: Clock
) -> None:
    first = owner(state_dir, clock, "a")
    second = server(state_dir, clock, "b")
    assert second.try_take(0) > 0
    for _ in range(3):
        first.confirm()
        with pytest.raises(RunLockedError):
            second.try_take(0)


def test_a_takeover_waits_until_the_owner_may_acknowledge_nothing_more(
    state_dir: Path, clock: Clock
) -> None:
    first = owner(state_dir, clock, "a")
    second = server(state_dir, clock, "b", takeover=True)
    both: list[bool] = []
    waited_s = take_in_time(
        second, clock, every=lambda: both.append(first.is_confirmed and second.try_take(0) == 0)
    )
    assert CONFIRM_WITHIN_S < waited_s <= CONFIRM_WITHIN_S + 1
    assert not any(both)
    with pytest.raises(RunLockedError, match=r"process 1 on host-b.*took over"):
        first.confirm()


def test_a_taker_looks_once_more_when_its_wait_is_over(state_dir: Path, clock: Clock) -> None:
    """While it waits, somebody else may take over from it in turn."""
    owner(state_dir, clock, "a")
    second = server(state_dir, clock, "b", takeover=True)
    assert second.try_take(0) > 0
    clock.now += 2
    third = server(state_dir, clock, "c", takeover=True)
    assert third.try_take(0) > 0
    with pytest.raises(RunLockedError, match="process 1 on host-c"):
        take_in_time(second, clock)
    take_in_time(third, clock)
    assert third.is_confirmed
    assert not second.is_confirmed


def test_a_taker_that_gave_up_while_it_waited_lets_nobody_in_beside_the_owner(
    state_dir: Path, clock: Clock
) -> None:
    first = owner(state_dir, clock, "a")
    taker = server(state_dir, clock, "b", takeover=True)
    assert taker.try_take(0) > 0
    taker.release()
    third = server(state_dir, clock, "c")
    take_in_time(third, clock)
    assert not (first.is_confirmed and third.is_confirmed)


def test_a_taker_that_died_while_it_waited_lets_nobody_in_beside_the_owner(
    state_dir: Path, clock: Clock
) -> None:
    first = owner(state_dir, clock, "a")
    me = Identity.of_this_process()
    dead = replace_identity(me, started="1")
    taker = server(state_dir, clock, "b", takeover=True, who=dead)
    assert taker.try_take(0) > 0
    third = server(state_dir, clock, "c", who=me)
    take_in_time(third, clock)
    assert not (first.is_confirmed and third.is_confirmed)


def test_a_takeover_of_a_run_that_ended_waits_for_nobody(state_dir: Path, clock: Clock) -> None:
    owner(state_dir, clock, "a").release()
    assert server(state_dir, clock, "b", takeover=True).try_take(0) == 0


def test_an_owner_that_was_stopped_for_a_minute_looks_first(state_dir: Path, clock: Clock) -> None:
    first = owner(state_dir, clock, "a")
    clock.now += 60
    assert not first.is_confirmed
    first.confirm()
    assert first.is_confirmed


def test_an_owner_that_was_stopped_for_a_minute_names_the_winner(
    state_dir: Path, clock: Clock
) -> None:
    first = owner(state_dir, clock, "a")
    second = server(state_dir, clock, "b")
    take_in_time(second, clock)
    for _ in range(2):
        with pytest.raises(RunLockedError, match="process 1 on host-b"):
            first.confirm()
        assert not first.is_confirmed
    first.release()
    second.confirm()
    assert second.is_confirmed


def test_the_confirmation_counts_from_before_the_look(state_dir: Path, clock: Clock) -> None:
    """A slow file system must not lengthen the time in which others are kept out."""

    class Slow(Files):
        def sync(self, fd: int) -> None:
            super().sync(fd)
            clock.now += CONFIRM_WITHIN_S + 1

    first = owner(state_dir, clock, "a", files=Slow())
    assert not first.is_confirmed
    with pytest.raises(StorageError, match="too slow"):
        first.confirm()
    assert not first.is_confirmed


def test_a_refresh_comes_often_enough() -> None:
    assert REFRESH_S * 2 <= CONFIRM_WITHIN_S
    assert min(TAKEOVER_AFTER_S, SETTLE_S) > CONFIRM_WITHIN_S


# -------------------------------------------------------------------- who is dead


def test_a_dead_owner_on_the_same_host_is_followed_at_once(state_dir: Path, clock: Clock) -> None:
    me = Identity.of_this_process()
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    )
    started = ownership_module._start_time(child.pid)
    theirs = replace_identity(me, pid=child.pid, started=started)
    owner(state_dir, clock, "a", who=theirs)
    second = server(state_dir, clock, "b", who=me)
    assert second.try_take(0) > 0
    child.communicate(timeout=20)
    assert second.try_take(0) == 0


def test_a_zombie_is_dead(state_dir: Path, clock: Clock) -> None:
    me = Identity.of_this_process()
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    )
    started = ownership_module._start_time(child.pid)
    theirs = replace_identity(me, pid=child.pid, started=started)
    assert not me.knows_dead(theirs)
    assert child.stdin is not None
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert me.knows_dead(theirs)
    child.wait(20)
    assert me.knows_dead(theirs)


def test_a_reused_pid_is_another_process() -> None:
    me = Identity.of_this_process()
    assert not me.knows_dead(me)
    assert me.knows_dead(replace_identity(me, started=str(int(me.started) - 1)))


@pytest.mark.parametrize("field", ["host", "boot", "namespace"])
def test_nothing_is_known_of_processes_elsewhere(field: str) -> None:
    me = Identity.of_this_process()
    dead = replace_identity(me, pid=1 << 22, started="5")
    assert me.knows_dead(dead)
    assert not me.knows_dead(replace_identity(dead, **{field: "another"}))
    assert not replace_identity(me, **{field: ""}).knows_dead(replace_identity(dead, **{field: ""}))


def replace_identity(who: Identity, **changes: object) -> Identity:
    return msgspec.structs.replace(who, **changes)


# -------------------------------------------------------------------- locks


class HeldLock:
    """A lock that works; `holder` is whoever has it."""

    holder: list[HeldLock]

    def __init__(self, holder: list[HeldLock]) -> None:
        self.holder = holder

    def acquire(self) -> bool:
        if self.holder and self.holder != [self]:
            return False
        self.holder[:] = [self]
        return True

    def release(self) -> None:
        self.holder.clear()


def test_a_lock_that_works_refuses_at_once_and_names_the_owner(
    state_dir: Path, clock: Clock
) -> None:
    holder: list[HeldLock] = []
    first, second = (
        Ownership(state_dir, Files(), identity=identity(name), lock=HeldLock(holder), clock=clock)
        for name in "ab"
    )
    assert first.try_take(0) == 0
    with pytest.raises(RunLockedError, match="process 1 on host-a"):
        second.try_take(0)
    first.release()
    assert second.try_take(0) == 0


def test_a_lock_file_of_two_processes_refuses_the_second(state_dir: Path) -> None:
    first, second = PathLock(state_dir / "lock"), PathLock(state_dir / "lock")
    assert first.acquire()
    assert not second.acquire()
    first.release()
    assert second.acquire()
    second.release()


def test_a_lock_that_is_released_in_another_thread_is_released(state_dir: Path) -> None:
    first = PathLock(state_dir / "lock")
    taker = threading.Thread(target=first.acquire)
    taker.start()
    taker.join()
    first.release()
    second = PathLock(state_dir / "lock")
    assert second.acquire()
    second.release()


def test_the_clock_is_one_that_passes_while_a_process_is_stopped() -> None:
    before = awake_or_not_s()
    assert awake_or_not_s() >= before > 0


# -------------------------------------------------------------------- failing disks


def test_a_vanished_state_directory_is_told(state_dir: Path, clock: Clock) -> None:
    first = owner(state_dir, clock, "a")
    claim_path(state_dir, 1).unlink()
    with pytest.raises(StateError, match="gone"):
        first.confirm()
    (state_dir / OWNERS_DIR).rmdir()
    clock.now += CONFIRM_WITHIN_S + 1
    with pytest.raises(StateError, match="gone"):
        first.confirm()
    assert not first.is_confirmed
    first.release()


@pytest.mark.parametrize("fault", ["fail_write", "fail_sync", "fail_read"])
def test_a_claim_that_cannot_be_told_is_tried_again(
    state_dir: Path, clock: Clock, fault: str
) -> None:
    files = BrokenFiles()
    first = owner(state_dir, clock, "a", files=files)
    setattr(files, fault, FULL)
    clock.now += CONFIRM_WITHIN_S + 1
    if fault != "fail_read":
        with pytest.raises(StorageError, match="cannot confirm"):
            first.confirm()
        assert not first.is_confirmed
    files.heal()
    first.confirm()
    assert first.is_confirmed
    second = server(state_dir, clock, "b")
    assert second.try_take(0) > 0


@pytest.mark.parametrize("fault", ["fail_write", "fail_sync", "fail_sync_dir", "fail_open"])
def test_a_run_that_cannot_be_claimed_is_not_taken(
    state_dir: Path, clock: Clock, fault: str
) -> None:
    files = BrokenFiles()
    first = server(state_dir, clock, "a", files=files)
    setattr(files, fault, FULL)
    with pytest.raises(StorageError, match="cannot claim"):
        first.try_take(0)
    assert not first.is_confirmed
    first.release()
    files.heal()
    second = server(state_dir, clock, "b")
    take_in_time(second, clock)
    assert second.is_confirmed


@pytest.mark.parametrize("length", [0, 1, 40, 100, 511])
def test_a_torn_claim_belongs_to_somebody_who_may_live(
    state_dir: Path, clock: Clock, length: int
) -> None:
    owner(state_dir, clock, "a")
    path = claim_path(state_dir, 1)
    path.write_bytes(path.read_bytes()[:length].rstrip())
    second = server(state_dir, clock, "b")
    assert take_in_time(second, clock) >= TAKEOVER_AFTER_S
    assert second.epoch == 2


def test_an_owner_mends_its_torn_claim(state_dir: Path, clock: Clock) -> None:
    first = owner(state_dir, clock, "a")
    path = claim_path(state_dir, 1)
    path.write_bytes(b"")
    second = server(state_dir, clock, "b")
    assert second.try_take(0) > 0
    first.confirm()
    assert msgspec.json.decode(path.read_bytes(), type=Claim).owner == identity("a")
    with pytest.raises(RunLockedError, match="host-a"):
        second.try_take(0)


# -------------------------------------------------------------------- at the same instant


class Stepping(Files):
    """Real files; `before` is called with a number before each operation on the claims."""

    def __init__(self, before: Callable[[int], None]) -> None:
        self._before = before
        self.steps = 0

    def _step(self) -> None:
        self.steps += 1
        self._before(self.steps)

    def open(self, path: Path, flags: int, mode: int = 0o644) -> int:
        self._step()
        return super().open(path, flags, mode)

    def write_at(self, fd: int, data: bytes | bytearray, offset: int) -> None:
        self._step()
        super().write_at(fd, data, offset)

    def read_at(self, fd: int, length: int, offset: int) -> bytes:
        self._step()
        return super().read_at(fd, length, offset)

    def sync(self, fd: int) -> None:
        self._step()
        super().sync(fd)

    def sync_dir(self, path: Path) -> None:
        self._step()
        super().sync_dir(path)

    def names(self, path: Path) -> list[str]:
        self._step()
        return super().names(path)

    def unlink(self, path: Path) -> None:
        self._step()
        super().unlink(path)


def tried(one: Ownership) -> bool:
    """Try once; say whether the run is ours, and confirmed by a second look."""
    try:
        if one.try_take(0):
            return False
        one.confirm()
    except DispatcherError:
        return False
    return one.is_confirmed


@pytest.mark.parametrize("found", ["nothing", "an ended run", "a torn claim of a dead owner"])
def test_of_two_that_start_at_the_same_instant_exactly_one_has_the_run(
    tmp_path: Path, clock: Clock, found: str
) -> None:
    """The rival does all it does between any two operations of the first one."""
    cases = 0
    for rival_at in range(1, 100):
        state_dir = tmp_path / str(rival_at)
        state_dir.mkdir()
        if found != "nothing":
            owner(state_dir, clock, "before").release()
        if found == "a torn claim of a dead owner":
            claim_path(state_dir, 1).write_bytes(b"{")
        has_it: dict[str, bool] = {}
        rival = server(state_dir, clock, "b")

        def now(step: int, at: int = rival_at) -> None:
            if step == at:
                has_it["b"] = tried(rival)  # noqa: B023

        files = Stepping(now)
        first = server(state_dir, clock, "a", files=files)
        if found == "a torn claim of a dead owner":
            first.try_take(0)
            rival.try_take(0)
            clock.now += TAKEOVER_AFTER_S + 1
            files.steps = 0
        has_it["a"] = tried(first)
        if "b" not in has_it:
            assert cases >= 10
            break
        cases += 1
        if found == "a torn claim of a dead owner":
            # Who may still live is given time to notice.
            clock.now += SETTLE_S
            has_it = {"a": tried(first), "b": tried(rival)}
        for one, name in ((first, "a"), (rival, "b")):
            try:
                one.confirm()
            except DispatcherError:
                has_it[name] = False
        assert sorted(has_it.values()) == [False, True], f"rival at operation {rival_at}: {has_it}"
        assert [first.epoch, rival.epoch].count(0) <= 1
    print(f"{cases} places for a rival in a start that found {found}")


class Turns:
    """Lets threads go on one operation at a time, in an order that a seed decides."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._turn = threading.Condition()
        self._waiting: set[str] = set()
        self._running: set[str] = set()
        self._next = ""

    def started(self, names: list[str]) -> None:
        self._running = set(names)

    def step(self, name: str) -> None:
        with self._turn:
            self._waiting.add(name)
            self._choose()
            assert self._turn.wait_for(lambda: self._next == name, timeout=30)
            self._next = ""
            self._waiting.discard(name)

    def ended(self, name: str) -> None:
        with self._turn:
            self._running.discard(name)
            self._choose()

    def _choose(self) -> None:
        if self._waiting and self._waiting == self._running and not self._next:
            self._next = self._rng.choice(sorted(self._waiting))
            self._turn.notify_all()


@pytest.mark.slow
def test_three_at_once_in_any_order_of_operations_leave_one_owner_at_most(tmp_path: Path) -> None:
    """No order may leave two that acknowledge, and who claimed last has the run."""
    winners = 0
    for number in range(SCHEDULES):
        rng = random.Random(SEED * 1000 + number)
        clock = Clock()
        state_dir = tmp_path / str(number)
        state_dir.mkdir()
        if rng.random() < 0.5:
            owner(state_dir, clock, "before").release()
        turns = Turns(rng)
        names = ["a", "b", "c"]
        turns.started(names)
        confirmed: dict[str, Ownership] = {}

        def life(name: str) -> None:
            one = server(
                state_dir,  # noqa: B023
                clock,  # noqa: B023
                name,
                files=Stepping(lambda _: turns.step(name)),  # noqa: B023
            )
            try:
                if tried(one):
                    confirmed[name] = one  # noqa: B023
            finally:
                turns.ended(name)  # noqa: B023

        threads = [threading.Thread(target=life, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert len(confirmed) <= 1, f"{sorted(confirmed)} with schedule {SEED * 1000 + number}"
        winners += len(confirmed)
    print(f"{SCHEDULES} schedules of three starts, {winners} winners, never two")
    assert winners > SCHEDULES // 2


# -------------------------------------------------------------------- at no moment two


@dataclass
class Member:
    """A server that tries to get the run until it has it, and confirms from then on."""

    claim: Ownership
    files: BrokenFiles
    serving: bool = False

    @property
    def acknowledges(self) -> bool:
        return self.serving and self.claim.is_confirmed


class World:
    """Servers that start, stand still, lose their disk, give up and die, by a seed."""

    def __init__(self, state_dir: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.clock = Clock()
        self.state_dir = state_dir
        self.members: list[Member] = []
        self.served = 0
        self.rivals: list[int] = []
        self._numbers = itertools.count()

    def step(self) -> None:
        """Let time pass, and one server do something."""
        rng = self.rng
        self.clock.now += rng.choice([0.0, 0.1, 0.5, 1.0, 3.0, 5.0, 11.0, 31.0, 60.0])
        if len(self.members) < 3:
            self.members.append(self._newcomer())
        member = rng.choice(self.members)
        if rng.random() < 0.1:
            member.files.fail_write = 0 if member.files.fail_write else FULL
        gives_up, dies = rng.random() < 0.05, rng.random() < 0.1
        for _ in range(rng.randrange(1, 4)):
            gives_up |= not self._goes_on(member)
            owners = [m.claim.epoch for m in self.members if m.acknowledges]
            if len(owners) > 1:
                self.rivals = owners
            if gives_up:
                break
        if gives_up or dies:
            self.members.remove(member)
        if gives_up:
            member.claim.release()

    def _newcomer(self) -> Member:
        rng, files = self.rng, BrokenFiles()
        name = str(next(self._numbers))
        takeover = rng.random() < 0.4
        return Member(
            server(self.state_dir, self.clock, name, files=files, takeover=takeover), files
        )

    def _goes_on(self, member: Member) -> bool:
        try:
            if member.serving:
                member.claim.confirm()
            else:
                member.serving = member.claim.try_take(0) == 0
                self.served += member.serving
        except (RunLockedError, StateError):
            return False
        except StorageError:
            return member.serving  # a start fails; who serves tries again
        return True


@pytest.mark.slow
def test_at_no_moment_two_servers_acknowledge(tmp_path: Path) -> None:
    takeovers = 0
    for number in range(60):
        state_dir = tmp_path / str(number)
        state_dir.mkdir()
        world = World(state_dir, SEED * 1000 + number)
        for step in range(100):
            world.step()
            assert not world.rivals, f"step {step} of seed {SEED * 1000 + number}: {world.rivals}"
        takeovers += world.served
    print(f"60 worlds of 100 steps, {takeovers} owners, never two at once")
    assert takeovers > 300
