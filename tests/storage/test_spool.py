"""The spool: what a worker leaves there is read back as it was, or it is refused, never guessed."""

from __future__ import annotations

import os
import random
import zlib
from pathlib import Path
from typing import Any

import pytest

from dispatcher.errors import SpoolFileError, SpoolUnreadableError, StorageError
from dispatcher.models import ResultItem, WorkItem
from dispatcher.server_file import ServerFile, write_server_file
from dispatcher.storage import spool as spool_module
from dispatcher.storage.files import Files
from dispatcher.storage.spool import SPOOL_DIR, Spool, SpoolWriter
from tests.storage.broken_files import BROKEN, FULL, BrokenFiles
from tests.storage.recording_disk import RecordingDisk

RUN = "0123456789abcdef"


def item(work_id: int, result: str | None = None, **fields: Any) -> WorkItem:
    fields = {"run": RUN, "lease": f"{work_id}.{work_id + 1}", **fields}
    return WorkItem(work_id, "", f'{{"n": {work_id}}}' if result is None else result, **fields)


def items(count: int, first: int = 0) -> list[WorkItem]:
    return [item(number) for number in range(first, first + count)]


def expected(results: list[WorkItem]) -> list[ResultItem]:
    return [ResultItem(i.work_id, i.result, i.run, i.lease) for i in results]


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    """A state directory as a server that runs, or was killed, left it."""
    directory = tmp_path / "state"
    (directory / SPOOL_DIR).mkdir(parents=True)
    announce(directory)
    return directory


def announce(directory: Path, *, run: str = RUN, state: str = "running") -> None:
    content = ServerFile("http://127.0.0.1:1", None, run, 1, 1, state)
    write_server_file(directory / "server.json", content)


def writer(state_dir: Path, worker: str = "w", files: Files | None = None) -> SpoolWriter:
    return SpoolWriter(state_dir / "server.json", worker, files)


def names(state_dir: Path) -> list[str]:
    return Spool(state_dir, Files()).names()


def read(state_dir: Path, name: str, run: str = RUN) -> list[ResultItem]:
    """Read a file to its end. Raises SpoolFileError."""
    results, problem = read_as_far_as_possible(state_dir, name, run)
    if problem is not None:
        raise problem
    return results


def read_as_far_as_possible(
    state_dir: Path, name: str, run: str = RUN
) -> tuple[list[ResultItem], SpoolFileError | None]:
    results: list[ResultItem] = []
    try:
        file = Spool(state_dir, Files()).open(name, run)
    except SpoolFileError as error:
        return [], error
    assert file is not None
    try:
        while some := file.next_results():
            results += some
    except SpoolFileError as error:
        return results, error
    finally:
        file.close()
    return results, None


def refused(state_dir: Path, name: str) -> str:
    """Return the sentence with which a file is refused."""
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(SpoolFileError) as refusal:
        Spool(state_dir, Files()).open(name, RUN)
    assert set(os.listdir("/proc/self/fd")) == before, "it is closed"
    assert str(state_dir / SPOOL_DIR / name) in str(refusal.value)
    return str(refusal.value)


# --- writing and reading ------------------------------------------------------------------------


def test_what_a_worker_left_is_read_back_as_it_was_and_for_its_owner_alone(state_dir: Path) -> None:
    left = [*items(40), item(99, '"\\n \\" \u20ac \U0001f600"'), item(98, "[]"), item(97, " 1 ")]

    assert writer(state_dir, "node-7-abc").write(left) == len(left)

    [name] = names(state_dir)
    assert name.startswith("node-7-abc.")
    assert read(state_dir, name) == expected(left)
    assert (state_dir / SPOOL_DIR / name).stat().st_mode & 0o777 == 0o600
    assert os.listdir(state_dir / SPOOL_DIR) == [name]


def test_results_of_any_number_and_size_are_read_piece_by_piece(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "READ_BYTES", 1 << 16)
    rng = random.Random(5)
    sizes = [rng.choice([1, 100, 5000, 70_000, 3_000_000]) for _ in range(60)]
    left = [item(n, f'"{"x" * size}"') for n, size in enumerate(sizes)]
    writer(state_dir).write(left)

    file = Spool(state_dir, Files()).open(names(state_dir)[0], RUN)
    assert file is not None
    pieces = []
    while piece := file.next_results():
        pieces.append(piece)
    file.close()

    assert [result for piece in pieces for result in piece] == expected(left)
    assert all(sum(len(r.result or "") for r in piece[:-1]) < 1 << 16 for piece in pieces)


def test_a_worker_has_one_file_with_all_that_it_wrote_last(state_dir: Path) -> None:
    one, other = writer(state_dir, "one"), writer(state_dir, "other")
    one.write(items(2))
    other.write(items(1, first=50))
    first = set(names(state_dir))
    one.write(items(5))

    assert len(names(state_dir)) == 2
    [new] = set(names(state_dir)) - first  # a file never changes under its name
    assert read(state_dir, new) == expected(items(5))

    one.remove()
    [left] = names(state_dir)
    assert read(state_dir, left) == expected(items(1, first=50))


def test_the_state_directory_itself_may_be_what_a_worker_was_given(state_dir: Path) -> None:
    SpoolWriter(state_dir, "w").write(items(1))
    assert len(names(state_dir)) == 1


def test_a_name_that_is_no_file_name_becomes_one(state_dir: Path) -> None:
    for name in ("../../a b\n/" + "x" * 400, "...", "", "\u20ac"):
        writer(state_dir, name).write(items(1))
    assert len(names(state_dir)) == 4
    assert os.listdir(state_dir.parent) == ["state"]


@pytest.mark.parametrize(
    "other",
    [
        item(1, run="of another run"),
        item(1, run=None),
        item(1, lease=None),
        item(1, result="half a \ud83d pair"),
        item(1, lease="1 .2"),
    ],
)
def test_what_can_be_no_result_of_the_run_is_left_out(state_dir: Path, other: WorkItem) -> None:
    assert writer(state_dir).write([item(0), other, item(2)]) == 3
    assert read(state_dir, names(state_dir)[0]) == expected([item(0), item(2)])


def test_a_file_is_bounded_and_the_worker_told_how_much_is_in_it(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "FILE_BYTES", 3000)
    left = [item(n, f'"{"x" * 900}"') for n in range(10)]

    assert writer(state_dir).write(left) == 3

    assert read(state_dir, names(state_dir)[0]) == expected(left[:3])


# --- a worker that cannot write -----------------------------------------------------------------


def test_a_full_disk_leaves_what_was_there_and_nothing_half_done(state_dir: Path) -> None:
    files = BrokenFiles()
    spool = writer(state_dir, files=files)
    spool.write(items(3))
    before = os.listdir(state_dir / SPOOL_DIR)
    for fault in ("fail_write", "fail_sync", "fail_open"):
        setattr(files, fault, FULL)
        with pytest.raises(StorageError, match="No space left"):
            spool.write(items(5))
        files.heal()
        assert os.listdir(state_dir / SPOOL_DIR) == before

    spool.write(items(7))
    assert read(state_dir, names(state_dir)[0]) == expected(items(7))
    assert len(names(state_dir)) == 1


def test_a_directory_that_cannot_be_synced_costs_no_file(state_dir: Path) -> None:
    files = BrokenFiles()
    spool = writer(state_dir, files=files)
    spool.write(items(3))
    files.fail_sync_dir = BROKEN
    with pytest.raises(StorageError, match="Input/output error"):
        spool.write(items(5))
    assert len(names(state_dir)) == 2  # which of them survives a crash is not known

    files.heal()
    spool.write(items(5))
    assert len(names(state_dir)) == 1


@pytest.mark.parametrize("gone", ["spool", "state"])
def test_a_vanished_directory_is_not_made_again(state_dir: Path, gone: str) -> None:
    spool = writer(state_dir)
    (state_dir / SPOOL_DIR).rmdir()
    if gone == "state":
        (state_dir / "server.json").unlink()
        state_dir.rmdir()
    with pytest.raises(StorageError, match="No such file or directory"):
        spool.write(items(1))
    assert not (state_dir / SPOOL_DIR).exists()


def test_nothing_is_left_for_a_run_that_is_complete_or_another_one(state_dir: Path) -> None:
    announce(state_dir, state="complete")
    with pytest.raises(StorageError, match="is complete"):
        writer(state_dir).write(items(1))

    announce(state_dir, run="fedcba9876543210")
    with pytest.raises(StorageError, match="is that of another run, fedcba9876543210"):
        writer(state_dir).write(items(1))
    assert not names(state_dir)


def test_a_server_json_that_cannot_be_trusted_leads_nowhere(state_dir: Path) -> None:
    (state_dir / "server.json").chmod(0o644)
    with pytest.raises(StorageError, match="others can read"):
        writer(state_dir).write(items(1))


@pytest.mark.parametrize("ordered", [True, False])
def test_no_crash_of_the_machine_takes_what_was_written(
    state_dir: Path, tmp_path: Path, ordered: bool
) -> None:
    disk = RecordingDisk()
    disk.make_dir(state_dir / SPOOL_DIR)
    spool = writer(state_dir, files=disk)
    told: list[tuple[int, int]] = []
    for count in (2, 5, 9):
        assert spool.write(items(count)) == count
        told.append((len(disk.operations), count))

    looked = 0
    for number, (done, image) in enumerate(disk.crashes(random.Random(3), ordered=ordered)):
        there = tmp_path / str(number)
        (there / SPOOL_DIR).mkdir(parents=True)
        for path, content in image.items():
            copy = there / SPOOL_DIR / Path(path).name
            copy.write_bytes(content)
            copy.chmod(0o600)
        found = {r.work_id for name in names(there) for r in read(there, name)}
        assert found >= set(range(max((n for at, n in told if at <= done), default=0)))
        looked += 1
    assert looked > 20


# --- what a server refuses ----------------------------------------------------------------------


def test_of_a_file_cut_anywhere_the_whole_results_come_first_and_then_the_error(
    state_dir: Path,
) -> None:
    writer(state_dir).write(items(4))
    [name] = names(state_dir)
    path = state_dir / SPOOL_DIR / name
    content = path.read_bytes()
    ends = [content.index(b'{"n": %d}\n' % n) + len('{"n": 0}\n') for n in range(4)]
    for length in range(len(content)):
        path.write_bytes(content[:length])
        results, problem = read_as_far_as_possible(state_dir, name)
        assert results == expected(items(sum(end <= length for end in ends)))
        assert problem is not None
        assert str(path) in str(problem)


def test_no_flipped_bit_becomes_a_result(state_dir: Path) -> None:
    writer(state_dir).write(items(3))
    [name] = names(state_dir)
    path = state_dir / SPOOL_DIR / name
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            results, problem = read_as_far_as_possible(state_dir, name)
            assert results == expected(items(len(results)))
            assert problem is not None, (place, bit)


def test_a_length_beyond_all_bounds_is_not_read(state_dir: Path) -> None:
    def line(text: str) -> bytes:
        return b"%b%08x\n" % (text.encode(), zlib.crc32(text.encode()))

    path = state_dir / SPOOL_DIR / "x.results"
    path.write_bytes(line(f"@spool 1 {RUN} ") + line("@1 1.2 9999999999 "))
    path.chmod(0o600)
    results, problem = read_as_far_as_possible(state_dir, path.name)
    assert not results
    assert "damaged" in str(problem)


def test_results_of_another_run_are_refused(state_dir: Path) -> None:
    writer(state_dir).write(items(2))
    [name] = names(state_dir)
    with pytest.raises(SpoolFileError, match=f"of another run, {RUN}"):
        Spool(state_dir, Files()).open(name, "fedcba9876543210")


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"x" * 5000, b"@spool 2 abc 00000000\n"])
def test_what_is_no_file_of_results_is_refused(state_dir: Path, content: bytes) -> None:
    path = state_dir / SPOOL_DIR / "x.results"
    path.write_bytes(content)
    path.chmod(0o600)
    assert "is not a file of results" in refused(state_dir, "x.results")


def test_what_somebody_else_may_have_written_is_refused(
    state_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer(state_dir).write(items(1))
    [name] = names(state_dir)
    path = state_dir / SPOOL_DIR / name
    for mode in (0o640, 0o604, 0o620, 0o602, 0o666):
        path.chmod(mode)
        assert f"its mode is {mode:04o}" in refused(state_dir, name)
    path.chmod(0o600)

    real = os.stat(path)
    stranger = os.stat_result((*real[:4], real.st_uid + 4321, *real[5:10]))
    monkeypatch.setattr(os, "fstat", lambda _: stranger)
    assert "belongs to another user" in refused(state_dir, name)
    monkeypatch.undo()

    (tmp_path / "elsewhere").write_bytes(path.read_bytes())
    (tmp_path / "elsewhere").chmod(0o600)
    (state_dir / SPOOL_DIR / "link.results").symlink_to(tmp_path / "elsewhere")
    assert "is a symbolic link" in refused(state_dir, "link.results")
    (state_dir / SPOOL_DIR / "lost.results").symlink_to(tmp_path / "nowhere")
    assert "is a symbolic link" in refused(state_dir, "lost.results")


def test_what_is_not_a_plain_file_or_huge_is_refused_at_once(state_dir: Path) -> None:
    directory = state_dir / SPOOL_DIR
    os.mkfifo(directory / "pipe.results", 0o600)
    assert "is not a regular file" in refused(state_dir, "pipe.results")
    (directory / "dir.results").mkdir(0o700)
    assert "is not a regular file" in refused(state_dir, "dir.results")
    with (directory / "huge.results").open("wb") as huge:
        huge.truncate(1 << 40)
    (directory / "huge.results").chmod(0o600)
    assert "is larger than any file" in refused(state_dir, "huge.results")


def test_a_file_that_is_gone_by_now_is_no_error(state_dir: Path) -> None:
    assert Spool(state_dir, Files()).open("x.results", RUN) is None


def test_a_file_that_cannot_be_read_now_may_be_later(state_dir: Path) -> None:
    writer(state_dir).write(items(1))
    files = BrokenFiles()
    [name] = names(state_dir)
    files.fail_read = BROKEN
    with pytest.raises(SpoolUnreadableError, match="Input/output error"):
        Spool(state_dir, files).open(name, RUN)
    files.heal()
    files.fail_reopen = BROKEN
    with pytest.raises(SpoolUnreadableError, match="Input/output error"):
        Spool(state_dir, files).open(name, RUN)
    files.heal()
    file = Spool(state_dir, files).open(name, RUN)
    assert file is not None
    assert [result.work_id for result in file.next_results()] == [0]
    file.close()


def test_only_whole_files_count(state_dir: Path) -> None:
    for name in (".w.1.results.0123.tmp", ".w.1.results", "w.1.results~", "notes.txt"):
        (state_dir / SPOOL_DIR / name).touch()
    assert names(state_dir) == []
    assert Spool(state_dir / "no such place", Files()).names() == []


# --- the end ------------------------------------------------------------------------------------


def test_with_the_run_goes_what_its_workers_left_and_nothing_else(state_dir: Path) -> None:
    directory = state_dir / SPOOL_DIR
    spool = Spool(state_dir, Files())
    writer(state_dir, "a").write(items(2))
    writer(state_dir, "b").write(items(2))
    (directory / ".c.1.results.0123.tmp").write_bytes(b"half")
    announce(state_dir, run="fedcba9876543210")
    writer(state_dir, "other-run").write([item(1, run="fedcba9876543210")])
    (directory / "notes.txt").touch()

    spool.remove_all(RUN)
    note, other = sorted(os.listdir(directory))
    assert (note, other[:10]) == ("notes.txt", "other-run.")

    spool.remove_all("fedcba9876543210")
    (directory / "notes.txt").unlink()
    spool.remove_all(RUN)
    assert not directory.exists()
    spool.remove_all(RUN)  # once more, as after a crash
