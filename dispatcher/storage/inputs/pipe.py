"""Standard input, and what else can be read only once: a pipe, a device."""

from __future__ import annotations

import os
import select
import stat
import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path

from dispatcher.errors import UsageError
from dispatcher.input_options import is_standard_input
from dispatcher.storage.inputs.compressed import FIRST_BYTES
from dispatcher.storage.inputs.reader import BLOCK_BYTES, CopyStop, InputReader

CLOSED = "the input - is standard input, but that is closed; write lines to it, or name a file"
_LOOK_EVERY_MS = 200
_TELLING_BYTES = max(map(len, FIRST_BYTES))
_PLAIN = {".gz": "zcat", ".zst": "zstdcat"}
"""What writes such a file as text."""


class PipeReader(InputReader):
    """What a pipe brings until its writers are gone."""

    kind = "pipe"

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = "standard input" if is_standard_input(path) else str(path)

    def fingerprint(self) -> None:
        """Nothing tells: it is read once."""

    @property
    def can_be_read_again(self) -> bool:
        """Whether the original can be read by another start."""
        return False

    def blocks(self, stop: CopyStop) -> Iterator[bytes]:
        """Yield what comes, without ever waiting longer than until `stop` is looked at.

        Raises UsageError when it is compressed: as lines, all of it would be errors.
        """
        head = b""
        with closing(self._pieces(stop)) as pieces:
            for piece in pieces:
                head += piece
                if len(head) >= _TELLING_BYTES:
                    break
            self._check_is_text(head)
            if head:
                yield head
            yield from pieces

    def _check_is_text(self, head: bytes) -> None:
        for magic, (kind, suffix) in FIRST_BYTES.items():
            if head.startswith(magic):
                raise UsageError(
                    f"{self.name} is {kind} by its first bytes, where lines are wanted: start the "
                    f"command as {_PLAIN[suffix]} FILE | ..., or name the file itself, with "
                    f"{suffix} at its end"
                )

    def _pieces(self, stop: CopyStop) -> Generator[bytes]:
        fd = self._open()
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            while True:
                # A pipe that nobody has opened for writing yet tells of nothing.
                while not poll.poll(_LOOK_EVERY_MS):
                    stop.check()
                stop.check()
                try:
                    block = os.read(fd, BLOCK_BYTES)
                except BlockingIOError:
                    continue
                if not block:
                    return
                yield block
        finally:
            os.close(fd)

    def _open(self) -> int:
        if not is_standard_input(self._path):
            # Or the opening would wait for a writer, whatever happens meanwhile.
            return os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if sys.__stdin__ is None:
            raise UsageError(CLOSED)
        try:
            fd = os.dup(sys.__stdin__.fileno())
        except (OSError, ValueError) as error:
            raise UsageError(CLOSED) from error
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            os.close(fd)
            raise UsageError("standard input is a directory; write lines to it, or name a file")
        return fd
