"""A disk in memory that loses what was not synced, as the real ones may.

Every file and directory has what is durable and, on top of it, what was only written: a crash of
the host keeps, drops or tears that. A process that is merely killed loses nothing.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PosixPath
from random import Random
from typing import Any

from dispatcher.storage.files import Files
from dispatcher.storage.ownership import Identity
from tests.faults.sim_loop import Process, ProcessKilled

_SECTOR_BYTES = 512


@dataclass(slots=True, eq=False)
class Inode:
    """A file. `pending` are the writes and cuts since the last sync: (host, offset, data)."""

    name: str
    content: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    pending: list[tuple[str, int, bytes | None]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Directory:
    """Names. `pending` are the changes since the last sync: (host, [(name, node or None)])."""

    entries: dict[str, Inode | Directory] = field(default_factory=dict)
    durable: dict[str, Inode | Directory] = field(default_factory=dict)
    pending: list[tuple[str, list[tuple[str, Inode | Directory | None]]]] = field(
        default_factory=list
    )

    def change(self, host: str, *changes: tuple[str, Inode | Directory | None]) -> None:
        self.pending.append((host, list(changes)))
        _change(self.entries, changes)


class SimDisk:
    """What all hosts share. Faults are switched on and off, or armed for the next operation.

    `fail_next_sync` is a part of the name of the file whose next sync fails.
    """

    def __init__(self, rng: Random, now: Callable[[], float]) -> None:
        self._rng = rng
        self.now = now
        self._root = Directory()
        self.is_full = False
        self.slow_sync_s = 0.0
        self.fail_next_write = False
        self.fail_next_sync: str | None = None
        self.injected: Counter[str] = Counter()

    # ---------------------------------------------------------------- the tree

    def directory(self, path: str) -> Directory:
        node: Inode | Directory = self._root
        for part in path.split("/"):
            if part:
                if not isinstance(node, Directory) or part not in node.entries:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
                node = node.entries[part]
        if not isinstance(node, Directory):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        return node

    def make_dirs(self, host: str, path: str) -> None:
        node = self._root
        for part in path.split("/"):
            if part:
                if part not in node.entries:
                    node.change(host, (part, Directory()))
                below = node.entries[part]
                assert isinstance(below, Directory)
                node = below

    def find(self, path: str) -> Inode | None:
        parent, _, name = path.rpartition("/")
        try:
            node = self.directory(parent).entries.get(name)
        except OSError:
            return None
        return node if isinstance(node, Inode) else None

    def content(self, path: Path) -> bytes | None:
        """Return a file as a reader sees it now, or None."""
        inode = self.find(str(path))
        return None if inode is None else bytes(inode.content)

    def contents(self, path: Path) -> list[tuple[str, bytes]]:
        """Return the names and contents of a directory's files as a reader sees them now."""
        entries = self.directory(str(path)).entries
        files = ((name, node) for name, node in entries.items() if isinstance(node, Inode))
        return sorted((name, bytes(inode.content)) for name, inode in files)

    def settle(self) -> None:
        """Make everything durable, as a system does in time."""
        for node in _walk(self._root):
            if isinstance(node, Directory):
                node.durable, node.pending = dict(node.entries), []
            else:
                node.durable, node.pending = bytes(node.content), []

    # ---------------------------------------------------------------- crashes

    def crash(self, host: str) -> None:
        """The host loses power: its unsynced changes are kept, dropped or torn, as drawn."""
        rng = self._rng
        keep = rng.choice([0.0, 0.3, 0.7, 1.0])
        in_order = rng.random() < 0.7
        for node in _walk(self._root):
            if not node.pending:
                continue
            lives = True
            kept: list[Any] = []
            for change in node.pending:
                if change[0] != host:
                    kept.append(change)
                    continue
                lives = (lives or not in_order) and rng.random() < keep
                if lives:
                    kept.append(change)
                elif isinstance(node, Inode) and rng.random() < 0.5:
                    kept += self._torn(change)
            self._rebuild(node, kept, host)

    def lose_pending(self, inode: Inode) -> None:
        """A sync failed: each of the changes got to the disk or is gone."""
        kept = []
        for change in inode.pending:
            draw = self._rng.random()
            kept += [change] if draw < 0.4 else self._torn(change) if draw < 0.6 else []
        content = bytearray(inode.durable)
        for change in kept:
            _write(content, change[1], change[2])
        inode.content, inode.durable, inode.pending = content, bytes(content), []

    def _torn(self, change: tuple[str, int, bytes | None]) -> list[tuple[str, int, bytes | None]]:
        host, offset, data = change
        if data is None or len(data) < 2:
            return []
        if self._rng.random() < 0.5:
            return [(host, offset, data[: self._rng.randrange(1, len(data))])]
        # The size got to the disk, one of the sectors did not.
        torn = bytearray(data)
        start = self._rng.randrange(len(data)) // _SECTOR_BYTES * _SECTOR_BYTES
        hole = torn[start : start + _SECTOR_BYTES]
        torn[start : start + _SECTOR_BYTES] = bytes(len(hole))
        return [(host, offset, bytes(torn))]

    def _rebuild(self, node: Inode | Directory, kept: list[Any], host: str) -> None:
        """The crashed host's kept changes are durable; those of others still pend."""
        node.pending = [change for change in kept if change[0] != host]
        if isinstance(node, Directory):
            entries = dict(node.durable)
            for _, changes in kept:
                _change(entries, changes)
            node.entries = entries
            if not node.pending:
                node.durable = dict(entries)
        else:
            content = bytearray(node.durable)
            for _, offset, data in kept:
                _write(content, offset, data)
            node.content = content
            if not node.pending:
                node.durable = bytes(content)


def _walk(root: Directory) -> Iterator[Inode | Directory]:
    """Yield every node that can still be reached, in an order that does not change."""
    seen: dict[int, None] = {}
    waiting: list[Inode | Directory] = [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen[id(node)] = None
        yield node
        if isinstance(node, Directory):
            waiting += node.durable.values()
            for _, changes in node.pending:
                waiting += [below for _, below in changes if below is not None]


def _change(entries: dict[str, Any], changes: Any) -> None:
    for name, node in changes:
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


def _write(content: bytearray, offset: int, data: bytes | None) -> None:
    """Write `data` at `offset`, or cut there."""
    if data is None:
        del content[offset:]
        content += bytes(max(0, offset - len(content)))
        return
    content += bytes(max(0, offset - len(content)))
    content[offset : offset + len(data)] = data


class ProcessFiles(Files):
    """The file operations of one process. When it is dead they do nothing and end the call.

    `kill_in` is the number of operations after which the process dies, in the midst of one;
    `takes_host_along` says then whether its host loses power too. `act` is called before write
    number `act_in_writes` from now to the journal, or after operation number `act_in` of any kind.
    Other processes get their turn after each operation: what is asked directly before one still
    holds in it.
    """

    def __init__(self, disk: SimDisk, process: Process, rng: Random) -> None:
        self._disk = disk
        self._process = process
        self._rng = rng
        self._open: dict[int, Inode] = {}
        self._next_fd = 3
        self.slept_s = 0.0
        self.was_hit = False
        self.kill_in: int | None = None
        self.act_in = self.act_in_writes = 0
        self.act: Callable[[], None] = lambda: None
        self.takes_host_along: Callable[[], bool] = lambda: False

    def open(self, path: Path, flags: int, mode: int = 0o644) -> int:
        dies = self._begin()
        parent, _, name = str(path).rpartition("/")
        directory = self._disk.directory(parent)
        node = directory.entries.get(name)
        if node is None:
            if not flags & os.O_CREAT:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            if self._disk.is_full and self._rng.random() < 0.5:
                raise self._hit("no room for a file", errno.ENOSPC)
            node = Inode(name)
            directory.change(self._process.host, (name, node))
        elif flags & os.O_EXCL:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        if dies:
            self._die()
        assert isinstance(node, Inode)
        self._next_fd += 1
        fd = self._next_fd
        self._open[fd] = node
        self._end()
        return fd

    def close(self, fd: int) -> None:
        self._open.pop(fd, None)

    def write_at(self, fd: int, data: bytes | bytearray, offset: int) -> None:
        dies = self._begin()
        inode = self._inode(fd)
        self._act_before_write(inode)
        disk = self._disk
        fails: OSError | None = None
        if disk.fail_next_write:
            disk.fail_next_write = False
            fails = self._hit("failed write", errno.EIO)
        elif disk.is_full and offset + len(data) > len(inode.content):
            fails = self._hit("write on a full disk", errno.ENOSPC)
        data = bytes(data)
        if dies or fails:
            data = data[: self._rng.randrange(len(data) + 1)]
        if data:
            inode.pending.append((self._process.host, offset, data))
            _write(inode.content, offset, data)
        if dies:
            self._die()
        self._end()
        if fails:
            raise fails

    def read_at(self, fd: int, length: int, offset: int) -> bytes:
        if self._begin():
            self._die()
        data = bytes(self._inode(fd).content[offset : offset + length])
        self._end()
        return data

    def size(self, fd: int) -> int:
        self._check_alive()
        return len(self._inode(fd).content)

    def truncate(self, fd: int, length: int) -> None:
        dies = self._begin()
        inode = self._inode(fd)
        if length != len(inode.content):
            inode.pending.append((self._process.host, length, None))
            _write(inode.content, length, None)
        if dies:
            self._die()
        self._end()

    def sync(self, fd: int) -> None:
        dies = self._begin()
        inode, disk = self._inode(fd), self._disk
        self.slept_s += disk.slow_sync_s * self._rng.random()
        if disk.fail_next_sync is not None and disk.fail_next_sync in inode.name:
            disk.fail_next_sync = None
            disk.lose_pending(inode)
            raise self._hit("failed sync", errno.EIO)
        if not dies or self._rng.random() < 0.5:
            inode.durable, inode.pending = bytes(inode.content), []
        if dies:
            self._die()
        self._end()

    def sync_dir(self, path: Path) -> None:
        dies = self._begin()
        directory = self._disk.directory(str(path))
        self.slept_s += self._disk.slow_sync_s * self._rng.random()
        if not dies or self._rng.random() < 0.5:
            directory.durable, directory.pending = dict(directory.entries), []
        if dies:
            self._die()
        self._end()

    def names(self, path: Path) -> list[str]:
        if self._begin():
            self._die()
        try:
            names = sorted(self._disk.directory(str(path)).entries)
        except FileNotFoundError:
            names = []
        self._end()
        return names

    def make_dir(self, path: Path) -> None:
        dies = self._begin()
        self._disk.make_dirs(self._process.host, str(path))
        if dies:
            self._die()
        self._end()

    def rename(self, source: Path, target: Path) -> None:
        dies = self._begin()
        old, new = str(source), str(target)
        parent, _, name = old.rpartition("/")
        directory = self._disk.directory(parent)
        if name not in directory.entries:
            raise _error(errno.ENOENT)
        change = (new.rpartition("/")[2], directory.entries[name])
        directory.change(self._process.host, (name, None), change)
        if dies:
            self._die()
        self._end()

    def unlink(self, path: Path) -> None:
        dies = self._begin()
        parent, _, name = str(path).rpartition("/")
        directory = self._disk.directory(parent)
        if name in directory.entries:
            directory.change(self._process.host, (name, None))
        if dies:
            self._die()
        self._end()

    def leads_to(self, path: Path, fd: int) -> bool:
        self._check_alive()
        return self._disk.find(str(path)) is self._open.get(fd)

    def take_slept_s(self) -> float:
        """Return how long the syncs since the last call have taken."""
        slept_s, self.slept_s = self.slept_s, 0.0
        return slept_s

    # ---------------------------------------------------------------- inside

    def _begin(self) -> bool:
        """An operation begins; true when the process is to die in the midst of it."""
        self._check_alive()
        if self.kill_in is None:
            return False
        self.kill_in -= 1
        return self.kill_in < 0

    def _end(self) -> None:
        """An operation is over."""
        if self.act_in:
            self.act_in -= 1
            if not self.act_in:
                self.act()
        self._let_others_go_on()

    def _let_others_go_on(self) -> None:
        if self._process.stepping is not None:
            self._process.stepping.step()

    def _act_before_write(self, inode: Inode) -> None:
        if self.act_in_writes and inode.name.endswith(".journal"):
            self.act_in_writes -= 1
            if not self.act_in_writes:
                self.act()
                self._let_others_go_on()

    def _check_alive(self) -> None:
        if not self._process.is_alive:
            raise ProcessKilled

    def _die(self) -> None:
        self.kill_in = None
        self._process.kill()
        if self.takes_host_along():
            self._disk.crash(self._process.host)
        raise ProcessKilled

    def _hit(self, what: str, number: int) -> OSError:
        self.was_hit = True
        self._disk.injected[what] += 1
        return _error(number)

    def _inode(self, fd: int) -> Inode:
        inode = self._open.get(fd)
        if inode is None:
            raise _error(errno.EBADF)
        return inode


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def path_class(disk: SimDisk) -> type[PosixPath]:
    """Return a path whose looks at the file system are looks at `disk`."""

    class DiskPath(PosixPath):
        def exists(self, **_: Any) -> bool:
            return disk.find(str(self)) is not None

        def is_file(self, **_: Any) -> bool:
            return disk.find(str(self)) is not None

        def stat(self, **_: Any) -> os.stat_result:
            inode = disk.find(str(self))
            if inode is None:
                raise _error(errno.ENOENT)
            return os.stat_result((0o100644, 0, 0, 1, 0, 0, len(inode.content), 0, 0, 0))

    return DiskPath


def identity_of(process: Process, is_dead: Callable[[int], bool]) -> Identity:
    """Return who a process is; one on the same host can tell whether another has ended."""

    class SimIdentity(Identity, frozen=True):
        def knows_dead(self, other: Identity) -> bool:
            return other.host == self.host and is_dead(other.pid)

    return SimIdentity(process.host, f"boot of {process.host}", "pids", process.pid, "0")


@dataclass
class SimLocks:
    """The file locks of a run: `kind` is how far they reach."""

    kind: str
    holders: dict[str, Process] = field(default_factory=dict)

    def of(self, process: Process) -> SimLock:
        lock = SimLock(self, process)
        process.at_end.append(lock.release)
        return lock


@dataclass
class SimLock:
    """One process's view of the lock; it ends with the process."""

    locks: SimLocks
    process: Process

    @property
    def _place(self) -> str:
        return self.process.host if self.locks.kind == "node-local" else "everywhere"

    def acquire(self) -> bool:
        if self.locks.kind == "absent":
            raise _error(errno.ENOTSUP)
        holder = self.locks.holders.setdefault(self._place, self.process)
        return holder is self.process

    def release(self) -> None:
        if self.locks.holders.get(self._place) is self.process:
            del self.locks.holders[self._place]
