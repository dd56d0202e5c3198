"""An input that is no plain file and comes as far as a test lets it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dispatcher.input_options import InputOptions
from dispatcher.storage.inputs import growing, opening
from dispatcher.storage.inputs.reader import CopyStop, InputReader


class HeldInput:
    """Pieces of an input; every reader of it waits where `let` ends, and raises `failure` there.

    `fingerprint` is what the original is told by, `known_lines` what it says of itself.
    """

    def __init__(self, path: Path, *pieces: bytes) -> None:
        self.path = path
        self.pieces = list(pieces)
        self.fingerprint: dict[str, Any] = {"size": 1}
        self.known_lines: int | None = None
        self.failure: Exception | None = None
        self.reads = 0
        self._let = 0
        self._changed = threading.Condition()
        path.touch()

    def let(self, pieces: int) -> None:
        """Let so many pieces be read, and the end if there are no more."""
        with self._changed:
            self._let = pieces
            self._changed.notify_all()

    def let_all(self) -> None:
        """Let everything be read."""
        self.let(len(self.pieces) + 1)

    def may_read(self, piece: int, stop: CopyStop) -> None:
        with self._changed:
            while not self._changed.wait_for(lambda: piece < self._let, 0.01):
                stop.check()
                if self.failure is not None and piece == self._let:
                    raise self.failure


class HeldReader(InputReader):
    """One reading of a held input."""

    kind = "gzip"

    def __init__(self, held: HeldInput) -> None:
        self.name = str(held.path)
        self._held = held
        self._read = 0

    def fingerprint(self) -> dict[str, Any]:
        return dict(self._held.fingerprint)

    def blocks(self, stop: CopyStop) -> Iterator[bytes]:
        held = self._held
        held.reads += 1
        for number, piece in enumerate(held.pieces):
            held.may_read(number, stop)
            self._read = number + 1
            yield piece
        held.may_read(len(held.pieces), stop)

    def share_read(self) -> float | None:
        return self._read / len(self._held.pieces) if self._held.pieces else None

    @property
    def known_lines(self) -> int | None:
        return self._held.known_lines


def hold(monkeypatch: pytest.MonkeyPatch, path: Path, *pieces: bytes) -> HeldInput:
    """Have a path be read as a held input, and copies be read as soon as there is a line."""
    held = HeldInput(path, *pieces)

    def reader_of(_path: Path, _options: InputOptions | None = None) -> InputReader:
        return HeldReader(held)

    monkeypatch.setattr(opening, "reader_of", reader_of)
    monkeypatch.setattr(growing, "FIRST_AFTER_S", 0.0)
    monkeypatch.setattr(growing, "EVERY_S", 0.0)
    monkeypatch.setattr(growing, "_TRY_AGAIN_S", 0.01)
    return held
