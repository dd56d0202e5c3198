"""A port for a model server: chosen and kept without races among the processes of one user.

Servers such as vLLM bind their port only many seconds after they were told it. So that no two task
managers of a node choose the same one meanwhile, each port has a file, and whoever holds its lock
may use the port. The kernel lets go of a lock when its process ends, however it ends. Another
user's program can still take the port, so whoever launches must be ready to try another one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import SystemRandom

from dispatcher.errors import BackendError

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST, _LAST = 10_000, 65_535
_TRIES = 500


class PortLease:
    """The right to use a port, as long as this process lives and until `release`."""

    def __init__(self, port: int, lock: int) -> None:
        self.port = port
        self._lock: int | None = lock

    def release(self) -> None:
        """Let others have it; again: harmless."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def lease_port(directory: Path | None = None, ports: Sequence[int] | None = None) -> PortLease:
    """Return a free port of the loopback interface that no other process of this user holds.

    The locks lie in `directory`, one of this user alone. Raises BackendError when that cannot be
    trusted, or no port is free.
    """
    directory = directory or Path(tempfile.gettempdir()) / f"dispatcher-ports-{os.geteuid()}"
    ports = ports if ports is not None else usable_ports()
    with contextlib.ExitStack() as stack:
        place = _open_private(directory)
        stack.callback(os.close, place)
        # In random order, so that those that start at once do not try the same ones.
        for port in SystemRandom().sample(ports, min(len(ports), _TRIES)):
            lock = _lock(place, port, directory)
            if lock is None:
                continue
            if _is_free(port):
                return PortLease(port, lock)
            os.close(lock)
    raise BackendError(
        f"no port is free for a model server: {min(len(ports), _TRIES)} of those from {min(ports)} "
        f"to {max(ports)} were tried; end the programs that hold them (ss -ltn shows them)"
    )


def usable_ports(ephemeral: Path = _EPHEMERAL) -> Sequence[int]:
    """Return the ports that the kernel does not give to outgoing connections.

    Of those it may give one away between the choice and the server's own bind. The larger of the
    two ranges around them; all, when they leave no room.
    """
    first, last = _FIRST, _LAST
    with contextlib.suppress(OSError, ValueError):
        low, high = map(int, ephemeral.read_text().split())
        below, above = range(first, min(low, last + 1)), range(max(high + 1, first), last + 1)
        if widest := max(below, above, key=len):
            return widest
    return range(first, last + 1)


def _open_private(directory: Path) -> int:
    """Open the directory, made if need be. Refuse one that somebody else can write to or swap."""
    try:
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise BackendError(
            f"cannot use {directory}, which keeps model servers off each other's ports: "
            f"{error.strerror}; remove it, or set TMPDIR to a directory of your own"
        ) from error
    found = os.fstat(place)
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        os.close(place)
        raise BackendError(
            f"{directory}, which keeps model servers off each other's ports, is open to other "
            "users; remove it, or set TMPDIR to a directory of your own"
        )
    return place


def _lock(place: int, port: int, directory: Path) -> int | None:
    """Return the held lock of a port; None when somebody else holds it."""
    # The files stay: with one that is removed while it is locked, two could hold the same port.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        lock = os.open(str(port), flags, 0o600, dir_fd=place)
    except OSError as error:
        raise BackendError(f"cannot lock {directory / str(port)}: {error.strerror}") from error
    try:
        if stat.S_ISREG(os.fstat(lock).st_mode):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
    except OSError:
        pass
    os.close(lock)
    return None


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
