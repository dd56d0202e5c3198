"""The file operations that durability rests on, in one object, so that tests can break them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


class Files:
    """Plain POSIX calls; every method raises OSError as the system does."""

    def open(self, path: Path, flags: int, mode: int = 0o644) -> int:
        """Open a file and return its descriptor."""
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def write_at(self, fd: int, data: bytes, offset: int) -> None:
        """Write all of `data` at `offset`."""
        view = memoryview(data)
        while view:
            written = os.pwrite(fd, view, offset)
            view = view[written:]
            offset += written

    def read_at(self, fd: int, length: int, offset: int) -> bytes:
        """Read up to `length` bytes at `offset`; fewer only at the end of the file."""
        parts: list[bytes] = []
        while length > 0 and (part := os.pread(fd, length, offset)):
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def size(self, fd: int) -> int:
        """Return the file's size in bytes."""
        return os.fstat(fd).st_size

    def truncate(self, fd: int, length: int) -> None:
        """Cut the file to `length` bytes."""
        os.ftruncate(fd, length)

    def sync(self, fd: int) -> None:
        """Return when the file's data and size are on stable storage."""
        os.fdatasync(fd)

    def sync_dir(self, path: Path) -> None:
        """Return when the directory's entries are on stable storage."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def unlink(self, path: Path) -> None:
        """Remove a file; a missing one is no error."""
        with contextlib.suppress(FileNotFoundError):
            path.unlink()

    def write_whole(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        """Replace a small file atomically and durably."""
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        fd = self.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        try:
            self.write_at(fd, data, 0)
            self.sync(fd)
        finally:
            self.close(fd)
        partial.replace(path)
        self.sync_dir(path.parent)
