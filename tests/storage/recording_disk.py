"""A disk in memory that records what is done to it, and can crash after any operation.

What a crash may leave behind of what was not synced:

- of a file's writes and truncations since its last sync: all, none, the first few, the last write
  torn at a byte, any subset of its 512-byte sectors, or a grown file full of zeros;
- of a directory's changes (creation, rename, removal) since its last sync: the first few, as a
  file system with a journal of its own keeps them, or with `ordered=False` any subset.

Files and directories lose independently of one another.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PosixPath
from typing import Any

from dispatcher.storage.files import Files

SECTOR_BYTES = 512

Image = dict[str, bytes]
"""What is on a disk that nobody uses: content by path."""


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes were written into a file."""

    inode: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Truncate:
    """A file was cut, or grown with zeros."""

    inode: int
    length: int


@dataclass(frozen=True, slots=True)
class Sync:
    """A file's data and size are on stable storage."""

    inode: int


@dataclass(frozen=True, slots=True)
class Change:
    """A directory's entries changed together; None takes a name away."""

    directory: str
    entries: dict[str, int | None]


@dataclass(frozen=True, slots=True)
class SyncDir:
    """A directory's entries are on stable storage."""

    directory: str


Operation = Write | Truncate | Sync | Change | SyncDir


@dataclass
class _Durable:
    """What is on stable storage after some operations, and what is not yet."""

    contents: dict[int, bytes] = field(default_factory=dict)
    entries: dict[str, dict[str, int]] = field(default_factory=dict)
    pending: dict[int, list[Write | Truncate]] = field(default_factory=dict)
    changes: dict[str, list[Change]] = field(default_factory=dict)

    def do(self, operation: Operation) -> None:
        if isinstance(operation, Write | Truncate):
            self.pending.setdefault(operation.inode, []).append(operation)
        elif isinstance(operation, Sync):
            if done := self.pending.pop(operation.inode, None):
                before = self.contents.get(operation.inode, b"")
                self.contents[operation.inode] = applied(before, done)
        elif isinstance(operation, Change):
            self.changes.setdefault(operation.directory, []).append(operation)
        else:
            entries = self.entries.setdefault(operation.directory, {})
            for change in self.changes.pop(operation.directory, []):
                _change(entries, change)

    def image(self, contents: dict[int, bytes], kept: dict[str, Sequence[Change]]) -> Image:
        image: Image = {}
        for directory in self.entries.keys() | kept.keys():
            entries = dict(self.entries.get(directory, {}))
            for change in kept.get(directory, ()):
                _change(entries, change)
            for name, inode in entries.items():
                content = contents.get(inode)
                if content is None:
                    content = self.contents.get(inode, b"")
                image[f"{directory}/{name}"] = content
        return image


class RecordingDisk(Files):
    """Files in memory. `operations` holds everything that was done to them, in order.

    `fail` maps a word of a path to an errno: writing to such a file stops halfway with it.
    """

    def __init__(self, image: Image | None = None) -> None:
        self.operations: list[Operation] = []
        self.fail: dict[str, int] = {}
        self._inodes = itertools.count(1)
        self._content: dict[int, bytearray] = {}
        self._entries: dict[str, dict[str, int]] = {}
        self._open: dict[int, tuple[int, str]] = {}
        self._next_fd = 1000
        self._start = _Durable()
        for path, content in (image or {}).items():
            directory, _, name = path.rpartition("/")
            inode = next(self._inodes)
            self._content[inode] = bytearray(content)
            self._entries.setdefault(directory, {})[name] = inode
            self._start.contents[inode] = bytes(content)
            self._start.entries.setdefault(directory, {})[name] = inode

    @property
    def open_files(self) -> list[str]:
        """The paths of all descriptors nobody closed."""
        return [path for _, path in self._open.values()]

    def image(self) -> Image:
        """Return what a process that starts now finds."""
        return {
            f"{directory}/{name}": bytes(self._content[inode])
            for directory, entries in self._entries.items()
            for name, inode in entries.items()
        }

    def killed_after(self, count: int) -> RecordingDisk:
        """Return the disk as it was after `count` operations: its user died, not the machine.

        What was not synced then is still not synced.
        """
        disk = RecordingDisk()
        disk._start = self._start
        disk.operations = self.operations[:count]
        disk._content = {n: bytearray(c) for n, c in self._start.contents.items()}
        disk._entries = {d: dict(e) for d, e in self._start.entries.items()}
        for operation in disk.operations:
            if isinstance(operation, Write | Truncate):
                content = disk._content.get(operation.inode, b"")
                disk._content[operation.inode] = bytearray(applied(bytes(content), [operation]))
            elif isinstance(operation, Change):
                entries = disk._entries.setdefault(operation.directory, {})
                _change(entries, operation)
                for inode in operation.entries.values():
                    if inode is not None:
                        disk._content.setdefault(inode, bytearray())
        disk._inodes = itertools.count(max(disk._content, default=0) + 1)
        return disk

    # ---------------------------------------------------------------- what the storage calls

    def open(self, path: Path, flags: int, mode: int = 0o644) -> int:
        directory, name = _split(path)
        entries = self._entries.setdefault(directory, {})
        inode = entries.get(name)
        if inode is None:
            if not flags & os.O_CREAT:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            inode = entries[name] = next(self._inodes)
            self._content[inode] = bytearray()
            self.operations.append(Change(directory, {name: inode}))
        elif flags & os.O_EXCL:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        self._next_fd += 1
        self._open[self._next_fd] = (inode, str(path))
        return self._next_fd

    def close(self, fd: int) -> None:
        del self._open[fd]

    def write_at(self, fd: int, data: bytes | bytearray, offset: int) -> None:
        inode, path = self._open[fd]
        error = next((code for word, code in self.fail.items() if word in path), 0)
        if error:
            data = data[: len(data) // 2]
        content = self._content[inode]
        if offset > len(content):
            content += bytes(offset - len(content))
        content[offset : offset + len(data)] = data
        self.operations.append(Write(inode, offset, bytes(data)))
        if error:
            raise OSError(error, os.strerror(error), path)

    def read_at(self, fd: int, length: int, offset: int) -> bytes:
        return bytes(self._content[self._open[fd][0]][offset : offset + length])

    def size(self, fd: int) -> int:
        return len(self._content[self._open[fd][0]])

    def truncate(self, fd: int, length: int) -> None:
        inode, _ = self._open[fd]
        content = self._content[inode]
        if length == len(content):
            return
        self._content[inode] = bytearray(applied(bytes(content), [Truncate(inode, length)]))
        self.operations.append(Truncate(inode, length))

    def sync(self, fd: int) -> None:
        self.operations.append(Sync(self._open[fd][0]))

    def sync_dir(self, path: Path) -> None:
        self.operations.append(SyncDir(str(path)))

    def names(self, path: Path) -> list[str]:
        return sorted(self._entries.get(str(path), ()))

    def make_dir(self, path: Path) -> None:
        self._entries.setdefault(str(path), {})

    def rename(self, source: Path, target: Path) -> None:
        directory, name = _split(source)
        _, new_name = _split(target)
        entries = self._entries[directory]
        inode = entries.pop(name)
        entries[new_name] = inode
        self.operations.append(Change(directory, {name: None, new_name: inode}))

    def unlink(self, path: Path) -> None:
        directory, name = _split(path)
        if self._entries.get(directory, {}).pop(name, None) is not None:
            self.operations.append(Change(directory, {name: None}))

    def leads_to(self, path: Path, fd: int) -> bool:
        directory, name = _split(path)
        return self._entries.get(directory, {}).get(name) == self._open[fd][0]

    # ---------------------------------------------------------------- crashes

    def crashes(
        self, rng: random.Random, *, first: int = 0, most: int = 60, ordered: bool = True
    ) -> Iterator[tuple[int, Image]]:
        """Yield (k, image): what may be left after a crash behind operation k, from `first` on.

        At most `most` images for each k, all different; the plain ones (everything kept,
        everything lost, one file or directory lost) always.
        """
        durable = _Durable(
            dict(self._start.contents), {d: dict(e) for d, e in self._start.entries.items()}
        )
        for operation in self.operations[:first]:
            durable.do(operation)
        for count in range(first, len(self.operations) + 1):
            if count > first:
                durable.do(self.operations[count - 1])
            for image in _images(durable, rng, most, ordered):
                yield count, image


def applied(content: bytes, operations: Sequence[Write | Truncate]) -> bytes:
    """Return a file's content after these operations."""
    data = bytearray(content)
    for operation in operations:
        if isinstance(operation, Truncate):
            del data[operation.length :]
            data += bytes(operation.length - len(data))
        else:
            data += bytes(max(0, operation.offset - len(data)))
            data[operation.offset : operation.offset + len(operation.data)] = operation.data
    return bytes(data)


def image_key(image: Image) -> int:
    """Return a number that equal images share; the random part of temporary names is left out."""
    return hash(
        frozenset(
            (path if not path.endswith(".tmp") else path.split(".")[-3], content)
            for path, content in image.items()
        )
    )


def _change(entries: dict[str, int], change: Change) -> None:
    for name, inode in change.entries.items():
        if inode is None:
            entries.pop(name, None)
        else:
            entries[name] = inode


def _split(path: Path) -> tuple[str, str]:
    directory, _, name = str(path).rpartition("/")
    return directory, name


def _images(durable: _Durable, rng: random.Random, most: int, ordered: bool) -> Iterator[Image]:
    files = {
        n: _contents(durable.contents.get(n, b""), ops, rng) for n, ops in durable.pending.items()
    }
    directories = {d: _changes(c, rng, ordered) for d, c in durable.changes.items()}
    seen: set[int] = set()
    choices = _choices(files, directories, rng)
    for chosen_files, chosen_changes in itertools.islice(choices, most * 3):
        image = durable.image(chosen_files, chosen_changes)
        if (key := image_key(image)) not in seen:
            seen.add(key)
            yield image
        if len(seen) >= most:
            return


def _choices(
    files: dict[int, list[bytes]], directories: dict[str, list[list[Change]]], rng: random.Random
) -> Iterator[tuple[dict[int, bytes], dict[str, Sequence[Change]]]]:
    """Yield what is left of each file and directory; the first variant of each keeps all of it,
    the second one nothing.
    """
    variants: list[tuple[Any, list[Any]]] = [*files.items(), *directories.items()]
    count = len(files)

    def choose(picked: list[int]) -> tuple[dict[int, bytes], dict[str, Sequence[Change]]]:
        chosen = [(key, left[n]) for (key, left), n in zip(variants, picked, strict=True)]
        return dict(chosen[:count]), dict(chosen[count:])

    kept, lost = [0] * len(variants), [1] * len(variants)
    yield choose(kept)
    yield choose(lost)
    others = [
        [n if place == at else base[at] for at in range(len(variants))]
        for base in (kept, lost)
        for place, (_, left) in enumerate(variants)
        for n in range(len(left))
    ]
    plain = [picked for picked in others if max(picked) <= 1]
    rest = [picked for picked in others if max(picked) > 1]
    rng.shuffle(rest)
    for picked in plain + rest:
        yield choose(picked)
    while len(variants) > 1:
        yield choose([rng.randrange(len(left)) for _, left in variants])


def _changes(changes: list[Change], rng: random.Random, ordered: bool) -> list[list[Change]]:
    """Return what may be left of a directory's changes."""
    left = [list(changes), []]
    if ordered:
        return left + [changes[:n] for n in range(1, len(changes))]
    if len(changes) <= 4:
        subsets = [
            [c for c, keep in zip(changes, bits, strict=True) if keep]
            for bits in itertools.product((False, True), repeat=len(changes))
        ]
    else:
        subsets = [[c for c in changes if rng.random() < 0.5] for _ in range(16)]
    return left + subsets


def _contents(before: bytes, operations: list[Write | Truncate], rng: random.Random) -> list[bytes]:
    """Return what may be left of a file after writes and truncations that were not synced."""
    whole = applied(before, operations)
    left = [whole, before]
    left += [applied(before, operations[:n]) for n in range(1, len(operations))]
    if any(isinstance(operation, Truncate) for operation in operations):
        writes = [op for op in operations if isinstance(op, Write)]
        cuts = [op for op in operations if isinstance(op, Truncate)]
        left += [applied(before, writes), applied(before, cuts)]
    last = operations[-1]
    if isinstance(last, Write):
        base = applied(before, operations[:-1])
        left += [_torn(base, last, n) for n in _torn_lengths(len(last.data), rng)]
        left += _sectors(base, last, rng)
    if len(whole) > len(before):
        left.append(before + bytes(len(whole) - len(before)))
        if isinstance(last, Write) and last.offset >= len(before):
            left.append(whole[: last.offset] + bytes(len(whole) - last.offset))
    return left


def _torn(base: bytes, write: Write, length: int) -> bytes:
    return applied(base, [Write(write.inode, write.offset, write.data[:length])])


def _torn_lengths(size: int, rng: random.Random) -> list[int]:
    edges = {1, 20, 42, 43, 44, size // 2, size - 2, size - 1}
    sample = {rng.randrange(1, size) for _ in range(24)} if size > 1 else set()
    return sorted(n for n in edges | sample if 0 < n < size)


def _sectors(base: bytes, write: Write, rng: random.Random) -> list[bytes]:
    """Return the file with only some of the sectors of a write on disk, grown or not."""
    end = write.offset + len(write.data)
    starts = range(write.offset // SECTOR_BYTES * SECTOR_BYTES, end, SECTOR_BYTES)
    if len(starts) < 2:
        return []
    if len(starts) <= 4:
        subsets = list(itertools.product((False, True), repeat=len(starts)))
    else:
        subsets = [tuple(rng.random() < 0.5 for _ in starts) for _ in range(16)]
    left = []
    for subset in subsets:
        parts = []
        for start, keep in zip(starts, subset, strict=True):
            if keep:
                begin, stop = max(start, write.offset), min(start + SECTOR_BYTES, end)
                data = write.data[begin - write.offset : stop - write.offset]
                parts.append(Write(write.inode, begin, data))
        some = applied(base, parts)
        left.append(some)
        left.append(some + bytes(max(0, end - len(some))))
    return left


class DiskPath(PosixPath):
    """A path that is looked up on a recording disk where code asks the path and not `Files`."""

    disk: RecordingDisk

    def exists(self, **_: Any) -> bool:
        directory, name = _split(self)
        return name in DiskPath.disk._entries.get(directory, {})

    def is_file(self, **_: Any) -> bool:
        return self.exists()

    def stat(self, **_: Any) -> os.stat_result:
        directory, name = _split(self)
        inode = DiskPath.disk._entries.get(directory, {}).get(name)
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        size = len(DiskPath.disk._content[inode])
        return os.stat_result((0o100644, inode, 0, 1, 0, 0, size, 0, 0, 0))
