"""A copy that is read while it grows: only what is on disk, and never other lines than before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dispatcher.errors import StateError, StorageError
from dispatcher.storage.files import Files
from dispatcher.storage.inputs import growing
from dispatcher.storage.inputs.copying import Copying, origin_of_copy
from dispatcher.storage.inputs.growing import (
    Begun,
    GrowingSource,
    fingerprint_of_grown,
    open_growing,
    read_sums,
)
from dispatcher.storage.inputs.reader import CopyStop, InputReader
from dispatcher.storage.source import LineSource
from tests.storage.broken_files import FULL, BrokenFiles

PIECES = (b"one\ntwo\nth", b"ree\n", b"four is lo", b"ng\nfive\n", b"six")
CONTENT = b"".join(PIECES)
ORIGIN = {"kind": "pieces", "original": {"size": 1}}


class Pieces(InputReader):
    """An input of pieces; `between` is called before each, and at the end."""

    kind, name = "pieces", "the pieces"

    def __init__(self, *pieces: bytes, between: Callable[[int], None] = lambda _: None) -> None:
        self._pieces = pieces
        self._between = between

    def fingerprint(self) -> dict[str, Any]:
        return dict(ORIGIN["original"])  # type: ignore[call-overload, no-any-return]

    def blocks(self, stop: CopyStop) -> Iterator[bytes]:
        for number, piece in enumerate(self._pieces):
            self._between(number)
            stop.check()
            yield piece
        self._between(len(self._pieces))
        stop.check()


@pytest.fixture(autouse=True)
def _reads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "FIRST_AFTER_S", 0.0)
    monkeypatch.setattr(growing, "EVERY_S", 0.0)


def begin(
    reader: InputReader, state_dir: Path, next_offset: int = 0, files: Files | None = None
) -> LineSource:
    copying = Copying(files=files or Files())
    return open_growing(reader, state_dir, 1 << 16, ORIGIN, copying, Begun(next_offset))


def texts(source: LineSource) -> list[str]:
    return [line.text for line in source.scan(0, 100, 1 << 20)]


class Watched(BrokenFiles):
    """Files that know how much of each was synced."""

    def __init__(self) -> None:
        super().__init__()
        self.synced: dict[str, int] = {}

    def sync(self, fd: int) -> None:
        super().sync(fd)
        self.synced[self._names[fd]] = self.size(fd)


def test_only_whole_lines_that_are_on_disk_with_their_sum_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Watched()
    seen: list[int] = []

    def let_read(source: GrowingSource, end: int) -> None:
        if end:
            assert CONTENT[:end].endswith(b"\n")
            assert files.synced["input.partial"] >= end
            sums = read_sums(tmp_path, files)
            assert sums[-1].size >= end
            written = (tmp_path / "input.sums").stat().st_size
            assert max(n for name, n in files.synced.items() if "sums" in name) == written
            seen.append(end)
        source.__dict__["available_bytes"] = end

    monkeypatch.setattr(
        GrowingSource,
        "available_bytes",
        property(lambda source: source.__dict__["available_bytes"], let_read),
        raising=False,
    )
    source = begin(Pieces(*PIECES), tmp_path, files=files)
    assert isinstance(source, GrowingSource)
    source.copy.has_ended.wait(10)
    assert source.copy.failure is None
    assert seen == [8, 14, 14, 32, 32]
    monkeypatch.undo()
    source.close()


def test_what_is_read_is_the_beginning_until_the_copy_is_whole(tmp_path: Path) -> None:
    source = begin(Pieces(*PIECES), tmp_path)
    assert isinstance(source, GrowingSource)
    assert source.copy.has_ended.wait(10)
    assert source.fingerprint() == ORIGIN
    assert not source.is_whole
    assert texts(source) == ["one", "two", "three", "four is long", "five"]

    source.become_whole()

    assert texts(source) == ["one", "two", "three", "four is long", "five", "six"]
    assert source.size_bytes == len(CONTENT)
    assert source.path == tmp_path / "input.spool"
    assert origin_of_copy(tmp_path, Files()) == ORIGIN
    whole = LineSource(source.path, 1 << 16, ORIGIN)
    assert source.fingerprint() == whole.fingerprint()
    assert fingerprint_of_grown(tmp_path, Files()) | ORIGIN == whole.fingerprint()
    whole.close()
    source.close()


def killed_at(state_dir: Path, pieces: int) -> None:
    """Leave what a process leaves that is killed when so many pieces may be read."""
    stop = CopyStop()

    def between(number: int) -> None:
        if number == pieces:
            stop.set()

    copying = Copying(stop=stop)
    reader = Pieces(*PIECES, between=between)
    source = open_growing(reader, state_dir, 1 << 16, ORIGIN, copying, Begun())
    assert isinstance(source, GrowingSource)
    source.copy.has_ended.wait(10)
    LineSource.close(source)


def test_every_other_byte_before_what_was_handed_out_is_refused(tmp_path: Path) -> None:
    killed_at(tmp_path, 4)
    sums = (tmp_path / "input.sums").read_bytes()
    ends = [found.size for found in read_sums(tmp_path, Files())]
    assert ends == [10, 14, 24, 32]
    for next_offset in (4, 8, 14, 27, 32):
        owed = next(end for end in ends if end >= next_offset)
        for place in range(len(CONTENT)):
            changed = bytearray(CONTENT)
            changed[place] ^= 1
            (tmp_path / "input.sums").write_bytes(sums)
            reader = Pieces(bytes(changed[:7]), bytes(changed[7:]))  # cut otherwise, too
            if place < owed:
                with pytest.raises(StateError, match="the pieces does not give the lines"):
                    begin(reader, tmp_path, next_offset)
                assert (tmp_path / "input.sums").read_bytes() == sums
                assert not (tmp_path / "input.partial").exists()
            else:
                source = begin(reader, tmp_path, next_offset)
                assert source.available_bytes >= next_offset
                source.close()


@pytest.mark.parametrize("length", range(0, 32, 3))
def test_an_input_that_ends_before_what_was_handed_out_is_refused(
    length: int, tmp_path: Path
) -> None:
    killed_at(tmp_path, 5)
    with pytest.raises(StateError, match="does not give the lines"):
        begin(Pieces(CONTENT[:length]), tmp_path, 32)


def test_nothing_that_an_earlier_start_copied_beyond_its_last_line_is_held_against_the_next(
    tmp_path: Path,
) -> None:
    killed_at(tmp_path, 5)
    other = Pieces(CONTENT[:14], b"quite ", b"another\n", b"end\n")
    source = begin(other, tmp_path, 14)
    assert isinstance(source, GrowingSource)
    source.copy.has_ended.wait(10)
    source.close()
    again = begin(other, tmp_path, 28)  # which was no end of a line in the first one
    assert again.available_bytes >= 28
    again.close()


def test_a_copy_that_is_whole_soon_is_not_read_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growing, "FIRST_AFTER_S", 3600.0)
    source = begin(Pieces(*PIECES), tmp_path)
    assert not isinstance(source, GrowingSource)
    assert source.is_whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["input.origin", "input.spool"]
    source.close()


def test_a_disk_that_is_full_before_anything_was_read_is_told_at_once(tmp_path: Path) -> None:
    files = BrokenFiles()
    files.fail_write = FULL
    with pytest.raises(StorageError, match="No space left on device after"):
        begin(Pieces(*PIECES), tmp_path, files=files)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_closed_leaves_no_thread_that_writes(tmp_path: Path) -> None:
    copying = Copying()

    def between(number: int) -> None:
        if number == 2:
            assert copying.stop.wait(10)

    reader = Pieces(*PIECES, between=between)
    source = open_growing(reader, tmp_path, 1 << 16, ORIGIN, copying, Begun())
    assert isinstance(source, GrowingSource)
    source.close()
    assert source.copy.has_ended.is_set()
    assert (tmp_path / "input.partial").read_bytes() == b"".join(PIECES[:2])
    assert not (tmp_path / "input.spool").exists()
