"""Inputs that are no plain files: their lines, their copies, how a changed one is told."""

from __future__ import annotations

import errno
import os
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dispatcher.config import RunSettings
from dispatcher.errors import StartStoppedError, StateError, StorageError, UsageError
from dispatcher.input_options import absolute_input, input_path
from dispatcher.storage.inputs import compressed
from dispatcher.storage.inputs.copying import Copying, copy_input, origin_now
from dispatcher.storage.inputs.opening import open_source, reader_of
from dispatcher.storage.inputs.pipe import PipeReader
from dispatcher.storage.inputs.reader import CopyStop, InputReader, without_waiting
from dispatcher.storage.lines import InputLine
from dispatcher.storage.same_run import check_input
from dispatcher.storage.source import LineSource
from tests.storage.broken_files import BrokenFiles
from tests.support.kinds import COMPRESSED, write_gzip, write_plain, write_zstd
from tests.support.processes import wait_until

LIMIT = 1 << 16
MAKERS = pytest.mark.parametrize("make", COMPRESSED.values(), ids=COMPRESSED)
LINES = b"".join(b'{"id": %d}\n' % number for number in range(1000))


def text_of(path: Path) -> bytes:
    reader = reader_of(path)
    assert reader is not None
    return b"".join(reader.blocks(CopyStop()))


def refusal_of(path: Path) -> str:
    with pytest.raises(UsageError) as refused:
        text_of(path)
    said = str(refused.value)
    assert str(path) in said
    assert "\n" not in said
    return said


def opened(path: Path, state: Path, **options: Any) -> tuple[list[InputLine], dict[str, Any]]:
    state.mkdir(exist_ok=True)
    source = open_source(path, state, LIMIT, **options)
    try:
        return [*source.scan(0, 1 << 20, 1 << 30)], source.fingerprint()
    finally:
        source.close()


# -------------------------------------------------------------------- compressed lines


@MAKERS
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b'{"a": 1}\n\n{"b": 2}\n',
        b'\xef\xbb\xbf{"a": 1}\r\n{"b": 2}\r\n',
        b'{"a": 1}\nno line end',
        b"\xff\xfe\n",
    ],
    ids=["empty", "one blank", "a blank", "mark and CRLF", "open end", "no UTF-8"],
)
def test_the_text_is_what_was_compressed(
    make: Callable[[Path, bytes], Path], content: bytes, tmp_path: Path
) -> None:
    assert text_of(make(tmp_path, content)) == content


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(lines=st.lists(st.sampled_from([b"", b" ", b"{}", b"\xff", b"x" * 9, b"y\r"]), max_size=9))
def test_the_lines_are_those_of_a_plain_file(tmp_path: Path, lines: list[bytes]) -> None:
    content = b"\n".join(lines)
    plain = LineSource(write_plain(tmp_path, content), LIMIT)
    expected = [*plain.scan(0, 100, 1 << 20)]
    plain.close()
    for make in COMPRESSED.values():
        state = tmp_path / "state"
        found, _ = opened(make(tmp_path, content), state, is_begun=False)
        assert found == expected


@pytest.mark.parametrize("name", ["in.GZ", "in.json.gz", "in.gz", "in.jsonl.Gz"])
def test_a_suffix_tells_the_kind_in_any_case(name: str, tmp_path: Path) -> None:
    path = write_gzip(tmp_path, LINES).rename(tmp_path / name)
    assert text_of(path) == LINES


@MAKERS
def test_a_file_that_is_not_what_its_name_says_is_refused(
    make: Callable[[Path, bytes], Path], tmp_path: Path
) -> None:
    path = make(tmp_path, LINES)
    path.write_bytes(LINES)
    kind = "gzip" if path.suffix == ".gz" else "zstd"
    assert f"no {kind} file" in refusal_of(path)


@MAKERS
def test_a_file_that_was_cut_off_says_how_far_it_was_readable(
    make: Callable[[Path, bytes], Path], tmp_path: Path
) -> None:
    path = make(tmp_path, LINES)
    path.write_bytes(path.read_bytes()[:-20])
    said = refusal_of(path)
    assert "cut off" in said or "damaged" in said
    assert "bytes of text that could be read" in said


@MAKERS
def test_of_a_file_that_was_cut_off_before_any_text_nobody_doubts_the_name(
    make: Callable[[Path, bytes], Path], tmp_path: Path
) -> None:
    path = make(tmp_path, LINES)
    path.write_bytes(path.read_bytes()[:8])
    said = refusal_of(path)
    assert "cut off, and none of its text could be read; copy or make it anew" in said
    assert "name it" not in said


@MAKERS
def test_a_damaged_file_is_refused(make: Callable[[Path, bytes], Path], tmp_path: Path) -> None:
    path = make(tmp_path, os.urandom(20_000).hex().encode())
    whole = bytearray(path.read_bytes())
    half = len(whole) * 3 // 4
    whole[half : half + 20] = bytes(20)
    path.write_bytes(whole)
    assert "damaged" in refusal_of(path)


@MAKERS
def test_what_stands_behind_the_end_is_not_taken_for_nothing(
    make: Callable[[Path, bytes], Path], tmp_path: Path
) -> None:
    path = make(tmp_path, LINES)
    path.write_bytes(path.read_bytes() + b"and more")
    assert "damaged" in refusal_of(path)


def test_skippable_zstd_frames_and_gzip_padding_are_passed_over(tmp_path: Path) -> None:
    path = write_zstd(tmp_path, LINES)
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    path.write_bytes(skippable + path.read_bytes() + skippable)
    assert text_of(path) == LINES
    padded = write_gzip(tmp_path, LINES)
    padded.write_bytes(padded.read_bytes() + bytes(512))
    assert text_of(padded) == LINES


@MAKERS
def test_a_large_file_is_never_whole_in_memory(
    make: Callable[[Path, bytes], Path], tmp_path: Path
) -> None:
    path = make(tmp_path, b"%s\n" % (b"x" * 99) * 600_000)
    reader = reader_of(path)
    assert reader is not None
    tracemalloc.start()
    try:
        total = sum(len(block) for block in reader.blocks(CopyStop()))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == 60_000_000
    assert peak < 40_000_000


def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_zstd(tmp_path, LINES)
    monkeypatch.setitem(compressed.sys.modules, "zstandard", None)
    if compressed.sys.version_info < (3, 14):
        assert "pip install zstandard" in refusal_of(path)


# -------------------------------------------------------------------- copies


@MAKERS
def test_a_copy_is_made_once_and_used_again(
    make: Callable[[Path, bytes], Path], tmp_path: Path
) -> None:
    path, state = make(tmp_path, LINES), tmp_path / "state"
    lines, fingerprint = opened(path, state, is_begun=False)
    assert [line.text for line in lines] == LINES.decode().splitlines()
    made = (state / "input.spool").stat()

    for is_begun in (False, True):
        again, same = opened(path, state, is_begun=is_begun)
        assert (again, same) == (lines, fingerprint)
    assert (state / "input.spool").stat().st_ino == made.st_ino
    assert fingerprint["kind"] in ("gzip", "zstd")
    assert fingerprint["size"] == len(LINES)
    assert fingerprint["original"]["size"] == path.stat().st_size
    assert sorted(p.name for p in state.iterdir()) == ["input.origin", "input.spool"]


@MAKERS
def test_a_changed_original_is_told_although_the_copy_is_there(
    make: Callable[[Path, bytes], Path], tmp_path: Path
) -> None:
    path, state = make(tmp_path, LINES), tmp_path / "state"
    _, before = opened(path, state, is_begun=False)
    make(tmp_path, LINES + b"{}\n")
    lines, now = opened(path, state, is_begun=True)

    run = RunSettings(path, tmp_path / "out", state)
    with pytest.raises(StateError, match=r"its size \(\d+ bytes then, \d+ now\)"):
        check_input(run, before, now)
    assert len(lines) == 1000  # what it began with


def test_a_damaged_copy_is_named_and_made_anew_once_it_is_removed(tmp_path: Path) -> None:
    path, state = write_gzip(tmp_path, LINES), tmp_path / "state"
    run = RunSettings(path, tmp_path / "out", state)
    _, before = opened(path, state, is_begun=False)
    (state / "input.spool").write_bytes(LINES[:-20])
    with pytest.raises(StateError, match=r"input\.spool, the copy .*; remove it, and start"):
        check_input(run, before, opened(path, state, is_begun=True)[1])
    (state / "input.spool").unlink()
    check_input(run, before, opened(path, state, is_begun=True)[1])


def test_a_damaged_copy_of_a_pipe_cannot_be_made_anew(tmp_path: Path) -> None:
    path, state = tmp_path / "pipe", tmp_path / "state"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(LINES,))
    writer.start()
    _, before = opened(path, state, is_begun=False)
    writer.join()
    (state / "input.spool").write_bytes(LINES[:-20])
    now = opened(path, state, is_begun=True)[1]
    with pytest.raises(StateError, match=r"input\.spool, the copy .*; restore it"):
        check_input(RunSettings(path, tmp_path / "out", state), before, now)


@MAKERS
def test_before_a_run_began_a_changed_original_is_copied_anew(
    make: Callable[[Path, bytes], Path], tmp_path: Path
) -> None:
    path, state = make(tmp_path, LINES), tmp_path / "state"
    opened(path, state, is_begun=False)
    make(tmp_path, b"{}\n")
    lines, fingerprint = opened(path, state, is_begun=False)
    assert [line.text for line in lines] == ["{}"]
    assert fingerprint["original"]["size"] == path.stat().st_size


def test_a_copy_serves_when_its_original_is_gone(tmp_path: Path) -> None:
    path, state = write_gzip(tmp_path, LINES), tmp_path / "state"
    before = opened(path, state, is_begun=False)
    path.unlink()
    assert opened(path, state, is_begun=True) == before


def test_an_original_that_changes_while_it_is_copied_is_refused(tmp_path: Path) -> None:
    path, state = write_gzip(tmp_path, LINES), tmp_path / "state"
    state.mkdir()
    reader = reader_of(path)
    assert reader is not None
    with pytest.raises(UsageError, match="was changed while it was copied"):
        copy_input(reader, state, {"kind": "gzip", "original": {"size": 1}}, Copying())
    assert list(state.iterdir()) == []


@pytest.mark.parametrize("part", ["write", "sync"])
def test_a_full_disk_ends_the_copy_with_the_remedy_and_leaves_nothing(
    part: str, tmp_path: Path
) -> None:
    path, state = write_gzip(tmp_path, LINES), tmp_path / "state"
    files = BrokenFiles()
    setattr(files, f"fail_{part}", errno.ENOSPC)
    with pytest.raises(StorageError) as failed:
        opened(path, state, copying=Copying(files=files), is_begun=False)
    said = str(failed.value)
    assert str(path) in said
    assert str(state / "input.spool") in said
    assert "No space left" in said
    assert "--state" in said
    assert list(state.iterdir()) == []

    files.heal()
    lines, _ = opened(path, state, copying=Copying(files=files), is_begun=False)
    assert len(lines) == 1000


def test_the_copy_is_on_disk_before_it_has_its_name(tmp_path: Path) -> None:
    path, state = write_gzip(tmp_path, LINES), tmp_path / "state"
    files = BrokenFiles()
    opened(path, state, copying=Copying(files=files), is_begun=False)
    assert files.log[-1] == "sync_dir state"
    assert files.log.index("sync input.partial") > files.log.index("write input.partial")

    files.fail_sync_dir = errno.EIO
    (state / "input.spool").unlink()
    with pytest.raises(StorageError):
        opened(path, state, copying=Copying(files=files), is_begun=False)
    assert not (state / "input.spool").exists()


def test_half_a_copy_of_a_killed_start_is_not_used(tmp_path: Path) -> None:
    path, state = write_gzip(tmp_path, LINES), tmp_path / "state"
    state.mkdir()
    (state / "input.partial").write_bytes(LINES[:500])
    lines, _ = opened(path, state, is_begun=False)
    assert len(lines) == 1000
    assert not (state / "input.partial").exists()


def test_who_lost_the_run_neither_names_nor_removes_the_copy_of_the_winner(tmp_path: Path) -> None:
    path, state = write_gzip(tmp_path, LINES), tmp_path / "state"

    def another_copies() -> None:
        (state / "input.partial").unlink()
        (state / "input.partial").write_bytes(b"the winner's")

    with pytest.raises(StorageError, match="another process copies it"):
        opened(path, state, copying=Copying(confirm=another_copies), is_begun=False)
    assert (state / "input.partial").read_bytes() == b"the winner's"
    assert not (state / "input.spool").exists()


# -------------------------------------------------------------------- pipes, and being stopped


def test_a_pipe_that_nobody_writes_to_can_be_stopped(tmp_path: Path) -> None:
    pipe, state = tmp_path / "pipe", tmp_path / "state"
    os.mkfifo(pipe)
    copying = Copying()
    ended: list[BaseException] = []

    def copy() -> None:
        try:
            opened(pipe, state, copying=copying)
        except StartStoppedError as error:
            ended.append(error)

    thread = threading.Thread(target=copy)
    thread.start()
    wait_until((state / "input.partial").exists, "the copying")
    copying.stop.set()
    thread.join(10)
    assert len(ended) == 1
    assert list(state.iterdir()) == []


def test_a_pipe_that_pauses_is_read_to_its_end(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    blocks = PipeReader(pipe).blocks(CopyStop())
    read: list[bytes] = []
    thread = threading.Thread(target=lambda: read.extend(blocks))
    thread.start()
    with pipe.open("wb", buffering=0) as writer:
        writer.write(b"one\n")
        wait_until(lambda: read == [b"one\n"], "the first line")
        writer.write(b"two")
    thread.join(10)
    assert b"".join(read) == b"one\ntwo"


@MAKERS
def test_a_pipe_of_compressed_bytes_is_refused_with_what_decompresses_them(
    make: Callable[[Path, bytes], Path], tmp_path: Path
) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    content = make(tmp_path, LINES).read_bytes()
    program = {".gz": "zcat", ".zst": "zstdcat"}[make(tmp_path, LINES).suffix]
    state = tmp_path / "state"
    refused: list[str] = []

    def copy() -> None:
        try:
            opened(pipe, state)
        except UsageError as error:
            refused.append(str(error))

    thread = threading.Thread(target=copy)
    thread.start()
    with pipe.open("wb", buffering=0) as writer:
        for byte in content[:4]:  # its kind is not told before it can be
            assert not refused
            writer.write(bytes([byte]))
        thread.join(10)
    assert len(refused) == 1
    assert f"start the command as {program} FILE | ..." in refused[0]
    assert list(state.iterdir()) == []


@pytest.mark.parametrize("text", [b"", b"1", b"12\n", b"{}\n{}"])
def test_a_pipe_of_a_few_bytes_is_read_as_it_is(text: bytes, tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    threading.Thread(target=pipe.write_bytes, args=(text,), daemon=True).start()
    assert b"".join(PipeReader(pipe).blocks(CopyStop())) == text


def test_a_reader_that_hangs_is_left_behind(tmp_path: Path) -> None:
    stop, hangs = CopyStop(), threading.Event()

    def wait() -> Any:
        yield b"first"
        hangs.wait(10)

    blocks = without_waiting(wait, stop)
    assert next(blocks) == b"first"
    stop.set()
    with pytest.raises(StartStoppedError):
        next(blocks)
    hangs.set()


def test_what_a_reader_raises_on_its_thread_is_raised_here() -> None:
    def fail() -> Any:
        yield from [b"a", b"b", b"c", b"d"]
        raise UsageError("no more")

    read: list[bytes] = []
    with pytest.raises(UsageError, match="no more"):
        read.extend(without_waiting(fail, CopyStop()))
    blocks = without_waiting(lambda: iter([b"a", b"b", b"c", b"d"]), CopyStop())
    assert list(blocks) == [b"a", b"b", b"c", b"d"]


# -------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("typed", "absolute"),
    [
        ("-", "-"),
        ("./-", "{cwd}/-"),
        ("in.jsonl", "{cwd}/in.jsonl"),
        ("hf:org/name", "hf:org/name"),
        ("hf:name", "hf:name"),
        ("hf:./data", "hf:{cwd}/data"),
        ("hf:../data", "hf:{cwd}/../data"),
        ("hf:/data/set", "hf:/data/set"),
        ("hf:there", "hf:{cwd}/there"),
        ("./hf:x", "{cwd}/hf:x"),
    ],
)
def test_a_name_means_the_same_from_elsewhere(
    typed: str, absolute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    assert str(absolute_input(input_path(typed))) == absolute.format(cwd=tmp_path)


def test_the_origin_of_what_is_read_once_is_nothing() -> None:
    assert origin_now(PipeReader(Path("-"))) is None


class Unreadable(InputReader):
    """A file system that fails."""

    kind, name = "gzip", "the file"

    def fingerprint(self) -> dict[str, Any]:
        raise OSError(errno.EIO, "Input/output error")

    def blocks(self, stop: CopyStop) -> Any:
        yield b"{}\n"
        raise OSError(errno.EIO, "Input/output error")


def test_a_file_system_that_fails_is_no_bad_input(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read the input the file: Input/output error"):
        origin_now(Unreadable())
    with pytest.raises(StorageError, match="Input/output error"):
        copy_input(Unreadable(), tmp_path, None, Copying())
    assert list(tmp_path.iterdir()) == []
