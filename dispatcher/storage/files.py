"""The file operations that durability rests on, in one object, so that tests can break them."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


class Files:
    """Plain POSIX calls; every method raises OSError as the system does."""

    # ---------------------------------------------------------------- what tests replace

    def open(self, path: Path, flags: int, mode: int = 0o644) -> int:
        """Open a file and return its descriptor."""
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def write_at(self, fd: int, data: bytes | bytearray, offset: int) -> None:
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

    def names(self, path: Path) -> list[str]:
        """Return the names in a directory, sorted; none when there is no such directory."""
        try:
            return sorted(os.listdir(path))
        except FileNotFoundError:
            return []

    def make_dir(self, path: Path) -> None:
        """Create a directory and those above it; an existing one is no error."""
        path.mkdir(parents=True, exist_ok=True)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file another name; what had that name is gone."""
        source.replace(target)

    def unlink(self, path: Path) -> None:
        """Remove a file; a missing one is no error."""
        path.unlink(missing_ok=True)

    def leads_to(self, path: Path, fd: int) -> bool:
        """Say whether the path still names the open file."""
        try:
            there, here = path.stat(), os.fstat(fd)
        except OSError:
            return False
        return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)

    # ---------------------------------------------------------------- made of the above

    def write_whole(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        """Replace a small file atomically and durably."""
        # A name nobody can guess or share, created here and now: no link of somebody else's is
        # followed, and two processes do not write into one file.
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        fd = self.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        try:
            try:
                self.write_at(fd, data, 0)
                self.sync(fd)
            finally:
                self.close(fd)
            self.rename(partial, path)
        except OSError:
            self.unlink(partial)
            raise
        self.sync_dir(path.parent)

    def read_whole(self, path: Path) -> bytes | None:
        """Return a small file's content, or None when there is no such file."""
        try:
            fd = self.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            return self.read_at(fd, self.size(fd), 0)
        finally:
            self.close(fd)
