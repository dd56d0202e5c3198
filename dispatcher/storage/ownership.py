"""Which process has the run: of two servers on one run, at most one acknowledges anything.

A file lock settles it where the file system has locks that reach all nodes; many cluster file
systems have none, or locks that end at the node. So there is also a claim: the file
`owners/<epoch>`, created exclusively, one number higher for each start. Its owner rewrites it
every REFRESH_S seconds (with a count, because clocks and time stamps of nodes differ) after
looking for a higher one, and stops acknowledging when it could not do so for CONFIRM_WITHIN_S.
Another process takes over at once when the owner ended or is known to be dead. Else it watches for
TAKEOVER_AFTER_S, claims when it saw no new count, and waits SETTLE_S more before it reads anything:
by then the owner, should it still live, has noticed or acknowledges nothing. Half a minute in all.
(A lease with a fencing number: C. Gray and D. Cheriton, "Leases", SOSP 1989.)
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
from filelock import FileLock, Timeout

from dispatcher.errors import RunLockedError, StateError, StorageError
from dispatcher.storage.files import Files

OWNERS_DIR = "owners"
REFRESH_S = 5.0
CONFIRM_WITHIN_S = 10.0
TAKEOVER_AFTER_S = 20.0
SETTLE_S = CONFIRM_WITHIN_S + 1.0
_LOOK_AGAIN_S = 0.5
_CONFIRM_TRIES = 3
_CLAIM_BYTES = 512


class Identity(msgspec.Struct, frozen=True):
    """One process on one machine, for good: neither a reboot nor a reused pid looks like it.

    `namespace` is that of process ids: two containers of one machine cannot see each other's.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: str

    @classmethod
    def of_this_process(cls) -> Identity:
        """Return who we are."""
        return cls(
            socket.gethostname(),
            _first_line(Path("/proc/sys/kernel/random/boot_id")),
            _link("/proc/self/ns/pid"),
            os.getpid(),
            _start_time(os.getpid()),
        )

    def knows_dead(self, other: Identity) -> bool:
        """Say whether we can tell, from here, that the other process has ended."""
        here = (self.host, self.boot, self.namespace)
        if (other.host, other.boot, other.namespace) != here or "" in here:
            return False
        return _start_time(other.pid) != other.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Claim(msgspec.Struct, frozen=True):
    """What a claim file holds. `count` grows with every refresh; `ended` lets the next one in.

    While not `settled`, the owner before may still acknowledge, whatever became of this one.
    """

    owner: Identity
    count: int
    ended: bool = False
    settled: bool = True


class Lock(Protocol):
    """A lock on the run that other processes of this machine, perhaps of others, respect."""

    def acquire(self) -> bool:
        """Take it; False when another process has it. Raises OSError where there are none."""

    def release(self) -> None:
        """Let go of it."""


class PathLock:
    """A lock on a file in the state directory."""

    def __init__(self, path: Path) -> None:
        # Taken in one thread and released in another.
        self._lock = FileLock(path, thread_local=False)

    def acquire(self) -> bool:
        """Take it; False when another process has it."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        except NotImplementedError as error:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP)) from error
        return True

    def release(self) -> None:
        """Let go of it."""
        self._lock.release()


def awake_or_not_s() -> float:
    """Return seconds that also pass while the machine sleeps or this process is stopped."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Ownership:
    """This process's right to work on a run. `confirm` may be called from any thread."""

    def __init__(
        self,
        state_dir: Path,
        files: Files,
        *,
        takeover: bool = False,
        identity: Identity | None = None,
        lock: Lock | None = None,
        clock: Callable[[], float] = awake_or_not_s,
    ) -> None:
        self.epoch = 0
        self._state_dir = state_dir
        self._directory = state_dir / OWNERS_DIR
        self._files = files
        self._takeover = takeover
        self._identity = identity or Identity.of_this_process()
        self._lock = lock if lock is not None else PathLock(state_dir / "lock")
        self._locked = False
        self._clock = clock
        self._confirmed_at = float("-inf")
        self._count = 0
        self._settled = True
        self._confirming = threading.Lock()
        self._seen: tuple[int, Claim | None, float] | None = None
        self._may_begin_at = float("-inf")

    # ---------------------------------------------------------------- taking

    def try_take(self, epoch_floor: int) -> float:
        """Try to take the run, for an epoch above `epoch_floor`.

        Returns 0 when it is ours, else the seconds after which to try again. Raises
        RunLockedError when another process has it, StorageError when it cannot be claimed.
        """
        try:
            self._take_lock()
            if not self.epoch and (wait_s := self._look_at_newest(epoch_floor)):
                return wait_s
            wait_s = max(0.0, self._may_begin_at - self._clock())
            if not wait_s and not self._settled:
                self._settled = True
                self.confirm()
        except OSError as error:
            raise StorageError(
                f"cannot claim the run in {self._state_dir}: {error.strerror}; the state "
                "directory must be writable"
            ) from error
        return wait_s

    def _take_lock(self) -> None:
        if self._locked:
            return
        try:
            self._locked = self._lock.acquire()
        except OSError:
            return  # no locks here, or none can be made: the claim decides alone
        if not self._locked:
            raise self._refusal(self._read(self._newest()))

    def _look_at_newest(self, epoch_floor: int) -> float:
        now = self._clock()  # before the look: this process may be stopped at any point
        newest = self._newest()
        claim = self._read(newest)
        free = newest == 0 or (
            claim is not None and (claim.ended or self._identity.knows_dead(claim.owner))
        )
        if not free and not self._takeover and (wait_s := self._watch(newest, claim, now)):
            return wait_s
        # What is not certainly free may be somebody's who lives: it gets time to notice.
        self._settled = free and (claim is None or claim.settled)
        if not self._claim(max(newest, epoch_floor) + 1):
            return _LOOK_AGAIN_S
        if not self._settled:
            self._may_begin_at = self._clock() + SETTLE_S
        return 0.0

    def _watch(self, epoch: int, claim: Claim | None, now: float) -> float:
        """Return how long to wait before the next look; 0 when there was no sign of life."""
        before = self._seen
        if before is not None and (epoch, claim) != before[:2] and claim is not None:
            raise self._refusal(claim)
        if before is None or (epoch, claim) != before[:2]:
            self._seen = (epoch, claim, now)
        elif now - before[2] >= TAKEOVER_AFTER_S:
            return 0.0
        return _LOOK_AGAIN_S

    def _claim(self, epoch: int) -> bool:
        began = self._clock()
        path = self._directory / _name(epoch)
        self._files.make_dir(self._directory)
        try:
            fd = self._files.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return False  # somebody was faster, by less than a moment
        try:
            self._files.write_at(fd, self._encode(ended=False), 0)
            self._files.sync(fd)
        except OSError:
            self._files.unlink(path)  # or the next start would wait for nobody
            raise
        finally:
            self._files.close(fd)
        self._files.sync_dir(self._directory)
        self._files.sync_dir(self._state_dir)
        self.epoch, self._confirmed_at = epoch, began
        for older in self._epochs():
            if older < epoch:
                self._files.unlink(self._directory / _name(older))
        return True

    # ---------------------------------------------------------------- keeping

    @property
    def is_confirmed(self) -> bool:
        """True while nobody else can have taken the run."""
        return self._clock() - self._confirmed_at <= CONFIRM_WITHIN_S

    def confirm(self) -> None:
        """Make sure that the run is still ours, and let others see it.

        Raises RunLockedError when another process took over, StateError when the claim is gone,
        StorageError when it cannot be told now.
        """
        with self._confirming:
            for _ in range(_CONFIRM_TRIES):
                self._confirm()
                if self.is_confirmed:
                    return
                # It took so long that it says nothing any more.
        raise StorageError(
            f"the claim on the run in {self._state_dir} cannot be confirmed in less than "
            f"{CONFIRM_WITHIN_S:g} s: the file system is too slow"
        )

    def _confirm(self) -> None:
        began = self._clock()
        try:
            self._judge(self._newest())
            self._count += 1
            try:
                self._rewrite(ended=False)
            except FileNotFoundError:  # the one who took over has just removed it
                self._judge(self._newest())
                raise
        except OSError as error:
            raise StorageError(
                f"cannot confirm the claim on the run in {self._state_dir}: {error.strerror}"
            ) from error
        self._confirmed_at = began

    def _judge(self, newest: int) -> None:
        if newest > self.epoch:
            raise RunLockedError(
                f"{self._owner_text(self._read(newest))} took over the run in {self._state_dir} "
                f"(epoch {newest}); this process had stopped or lost touch with the state "
                "directory, and ends without harm"
            )
        if newest < self.epoch:
            raise StateError(
                f"the claim on the run in {self._state_dir} is gone: was the state directory "
                "removed? Nothing is acknowledged any more; restore the directory and start the "
                "same command again"
            )

    def release(self) -> None:
        """Let the next process have the run."""
        if self.epoch:
            with contextlib.suppress(OSError):
                if self._newest() == self.epoch:
                    self._rewrite(ended=True)
        if self._locked:
            self._locked = False
            with contextlib.suppress(OSError):
                self._lock.release()

    # ---------------------------------------------------------------- inside

    def _rewrite(self, *, ended: bool) -> None:
        # In place and of one size, so that it works on a full disk; no reader trusts a torn one.
        fd = self._files.open(self._directory / _name(self.epoch), os.O_WRONLY)
        try:
            self._files.write_at(fd, self._encode(ended=ended), 0)
            self._files.sync(fd)
        finally:
            self._files.close(fd)

    def _encode(self, *, ended: bool) -> bytes:
        text = msgspec.json.encode(Claim(self._identity, self._count, ended, self._settled))
        return text.ljust(_CLAIM_BYTES - 1) + b"\n"

    def _epochs(self) -> list[int]:
        return [int(name) for name in self._files.names(self._directory) if name.isdecimal()]

    def _newest(self) -> int:
        return max(self._epochs(), default=0)

    def _read(self, epoch: int) -> Claim | None:
        return _decode(self._files.read_whole(self._directory / _name(epoch)) or b"")

    def _refusal(self, claim: Claim | None) -> RunLockedError:
        return RunLockedError(
            f"{self._owner_text(claim)} works on the run in {self._state_dir}; wait for it to "
            "end, or stop it first"
        )

    def _owner_text(self, claim: Claim | None) -> str:
        return f"another server ({claim.owner})" if claim is not None else "another process"


def may_be_anothers(state_dir: Path, files: Files) -> bool:
    """Say whether a process claimed the run that has not ended, as far as can be told from here.

    Only a look: nothing is claimed. Raises OSError.
    """
    directory = state_dir / OWNERS_DIR
    epochs = [int(name) for name in files.names(directory) if name.isdecimal()]
    if not epochs:
        return False
    claim = _decode(files.read_whole(directory / _name(max(epochs))) or b"")
    if claim is None:
        return True
    return not (claim.ended or Identity.of_this_process().knows_dead(claim.owner))


def _name(epoch: int) -> str:
    return f"{epoch:06d}"


def _decode(content: bytes) -> Claim | None:
    try:
        return msgspec.json.decode(content, type=Claim)
    except msgspec.DecodeError:
        return None  # just being written, or torn: its owner is unknown but may well live


def _start_time(pid: int) -> str:
    """Return when a process started, in clock ticks after boot; "" when it does not run."""
    fields = _first_line(Path(f"/proc/{pid}/stat")).rpartition(") ")[2].split()
    return fields[19] if fields and fields[0] not in "ZX" else ""


def _first_line(path: Path) -> str:
    try:
        return path.read_text().split("\n")[0]
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
