"""File operations that fail, or wait, when a test says so, and claims of the dead."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import msgspec

from dispatcher.storage.files import Files
from dispatcher.storage.ownership import Identity, Ownership


class BrokenFiles(Files):
    """Real files; each `fail_*` set to an errno makes that operation fail with it.

    `fail_open` is for files that may have to be created, `fail_reopen` for all others. A failing
    write first writes half of its data, as a full disk does. While `hold_sync` is
    cleared, syncs wait for it; `sync_waits` tells that one does.
    """

    def __init__(self) -> None:
        self.fail_write = 0
        self.fail_sync = 0
        self.fail_truncate = 0
        self.fail_open = 0
        self.fail_reopen = 0
        self.fail_read = 0
        self.fail_sync_dir = 0
        self.only: str | None = None
        self.log: list[str] = []
        self.hold_sync = threading.Event()
        self.hold_sync.set()
        self.sync_waits = threading.Event()
        self.hold_sync_dir = threading.Event()
        self.hold_sync_dir.set()
        self.sync_dir_waits = threading.Event()
        self._names: dict[int, str] = {}

    def open(self, path: Path, flags: int, mode: int = 0o644) -> int:
        error = self.fail_open if flags & os.O_CREAT else self.fail_reopen
        if error and self._meant(path.name):
            raise OSError(error, os.strerror(error))
        fd = super().open(path, flags, mode)
        self._names[fd] = path.name
        return fd

    def write_at(self, fd: int, data: bytes | bytearray, offset: int) -> None:
        self.log.append(f"write {self._names.get(fd)}")
        if self.fail_write and self._meant(self._names.get(fd, "")):
            super().write_at(fd, data[: len(data) // 2], offset)
            raise OSError(self.fail_write, os.strerror(self.fail_write))
        super().write_at(fd, data, offset)

    def read_at(self, fd: int, length: int, offset: int) -> bytes:
        if self.fail_read and self._meant(self._names.get(fd, "")):
            raise OSError(self.fail_read, os.strerror(self.fail_read))
        return super().read_at(fd, length, offset)

    def truncate(self, fd: int, length: int) -> None:
        if self.fail_truncate:
            raise OSError(self.fail_truncate, os.strerror(self.fail_truncate))
        super().truncate(fd, length)

    def sync(self, fd: int) -> None:
        self.log.append(f"sync {self._names.get(fd)}")
        if not self.hold_sync.is_set() and self._meant(self._names.get(fd, "")):
            self.sync_waits.set()
            assert self.hold_sync.wait(10)
        if self.fail_sync and self._meant(self._names.get(fd, "")):
            raise OSError(self.fail_sync, os.strerror(self.fail_sync))
        super().sync(fd)

    def sync_dir(self, path: Path) -> None:
        self.log.append(f"sync_dir {path.name}")
        if not self.hold_sync_dir.is_set():
            self.sync_dir_waits.set()
            assert self.hold_sync_dir.wait(10)
        if self.fail_sync_dir:
            raise OSError(self.fail_sync_dir, os.strerror(self.fail_sync_dir))
        super().sync_dir(path)

    def heal(self) -> None:
        """Let everything work again."""
        self.fail_write = self.fail_sync = self.fail_truncate = 0
        self.fail_open = self.fail_reopen = self.fail_read = self.fail_sync_dir = 0

    def _meant(self, name: str) -> bool:
        return self.only is None or self.only in name


def owned_by_the_dead(state_dir: Path, files: Files | None = None, **options: Any) -> Ownership:
    """Give an ownership whose claim looks, to whoever comes next, as after a kill.

    Its process had our id before us.
    """
    owner = msgspec.structs.replace(Identity.of_this_process(), started="before")
    return Ownership(state_dir, files or Files(), identity=owner, **options)


FULL = errno.ENOSPC
BROKEN = errno.EIO
