"""What every kind of input is read by when it is no plain file of lines."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from dispatcher.errors import StartStoppedError, UsageError

T = TypeVar("T")

BLOCK_BYTES = 1 << 20


class CopyStop:
    """Lets another thread end the copying of an input."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """Have the copying end."""
        self._event.set()

    def wait(self, timeout_s: float) -> bool:
        """Wait; return whether it is to end by then."""
        return self._event.wait(timeout_s)

    def check(self) -> None:
        """Raise StartStoppedError once it is to end."""
        if self._event.is_set():
            raise StartStoppedError(
                "stopped while the input was copied, before anything was handed out; the same "
                "command begins the copy again"
            )


class InputReader(ABC):
    """The lines of an input that cannot be read by offset, from its beginning, once.

    `name` is what messages call it, `kind` what run.yaml does. Reading raises UsageError for what
    cannot be an input, and OSError where the system failed.
    """

    kind: str
    name: str

    @abstractmethod
    def fingerprint(self) -> dict[str, Any] | None:
        """Return what a changed original is told by; None when there is none to come back to."""

    @abstractmethod
    def blocks(self, stop: CopyStop) -> Iterator[bytes]:
        """Yield the lines, in blocks that end anywhere, each of some mebibytes at most.

        Raises StartStoppedError soon after `stop` was set.
        """

    def share_read(self) -> float | None:
        """Return which share of the original has been read, 0 to 1, if that can be told."""
        return None

    @property
    def known_lines(self) -> int | None:
        """How many lines there are in all, if the original says so; told once reading began."""
        return None

    def fingerprint_beside(self, before: dict[str, Any]) -> dict[str, Any] | None:
        """Return the fingerprint to compare with one of before, without asking other machines."""
        return self.fingerprint()

    @property
    def can_be_read_again(self) -> bool:
        """Whether the original can be read by another start."""
        return True

    @property
    def is_here(self) -> bool:
        """Whether reading it again needs no other machine, and finds what was there before."""
        return self.can_be_read_again


def missing_package(what: str, package: str, extra: str) -> UsageError:
    """Return the error that says which package a kind of file needs."""
    return UsageError(
        f"{what} needs the Python package {package}, which is not installed: pip install {package} "
        f"(or Dispatcher with its extra {extra})"
    )


def without_waiting(make: Callable[[], Iterator[T]], stop: CopyStop) -> Iterator[T]:
    """Yield from an iterator that may wait for a network, on a thread that nobody waits for."""
    room = threading.Semaphore(2)
    filled = threading.Semaphore(0)
    handed: list[tuple[T] | BaseException | None] = []

    def fill() -> None:
        try:
            for block in make():
                room.acquire()
                handed.append((block,))
                filled.release()
            handed.append(None)
        except BaseException as error:  # noqa: BLE001 (raised where the blocks are taken)
            handed.append(error)
        filled.release()

    threading.Thread(target=fill, name="input-reader", daemon=True).start()
    while True:
        while not filled.acquire(timeout=_LOOK_EVERY_S):
            stop.check()
        stop.check()
        found = handed.pop(0)
        if found is None:
            return
        if isinstance(found, BaseException):
            raise found
        room.release()
        yield found[0]


_LOOK_EVERY_S = 0.2
