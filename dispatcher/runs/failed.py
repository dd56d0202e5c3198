"""The failed lines of a run as a new input, and beside it where they came from."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import secrets
from array import array
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from dispatcher.errors import StateError, StorageError, UsageError
from dispatcher.runs.found import FoundRun, quoted
from dispatcher.runs.inputs import input_lines
from dispatcher.runs.lines import LineReader, error_lines, unreadable
from dispatcher.storage.files import Files

ORIGIN_SUFFIX = ".origin"
_OTHER_KINDS = (".gz", ".zst", ".parquet")
_BUFFER_BYTES = 1 << 20
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class Origin(msgspec.Struct, frozen=True):
    """Where the lines of a file came from: line `i` of it is line `work_ids[i]` of the run.

    `kinds` are the errors that were asked for (None: all), `sha256` is the file's checksum.
    """

    run: str
    state: str
    output: str
    kinds: list[str] | None
    sha256: str
    work_ids: list[int]


@dataclass(slots=True)
class FailedLines:
    """The failed lines of a run: which ones, and the counts of all errors there are, by kind."""

    work_ids: array[int] = field(default_factory=lambda: array("Q"))
    kinds: Counter[str] = field(default_factory=Counter)


def write_failed(run: FoundRun, target: Path, kinds: Collection[str], files: Files) -> FailedLines:
    """Write the input lines whose result is an error, of these kinds or any, to a new file.

    Returns what was found; nothing is written when that is no line. Raises UsageError when the
    file exists or its name is not one of a file of lines, StateError when the run's files are not
    what it wrote, StorageError.
    """
    _check_kind(target)
    _check_new(target)
    _check_output(run)
    found = find_failed(run, kinds)
    if kinds and found.kinds and not found.work_ids:
        there = ", ".join(f"{kind} ({count})" for kind, count in sorted(found.kinds.items()))
        raise UsageError(f"no line failed with {' or '.join(sorted(kinds))}; there are: {there}")
    if found.work_ids:
        with input_lines(run, target.absolute().parent, files) as lines:
            _write(run, lines, target, kinds, found.work_ids, files)
    return found


def find_failed(run: FoundRun, kinds: Collection[str]) -> FailedLines:
    """Read the output for its `__ERROR__` lines."""
    found = FailedLines()
    with LineReader(run.output) as reader:
        for work_id, kind in error_lines(reader):
            found.kinds[kind] += 1
            if not kinds or kind in kinds:
                found.work_ids.append(work_id)
    return found


def origin_path(file: Path) -> Path:
    """Return the name of the file beside it that tells where its lines came from."""
    return file.with_name(file.name + ORIGIN_SUFFIX)


def read_origin(file: Path) -> Origin:
    """Read where a file's lines came from. Raises UsageError."""
    path = origin_path(file)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Origin)
    except FileNotFoundError as error:
        raise UsageError(
            f"{path} is missing, so where the lines of {file} came from is unknown; name the file "
            "that --failed-to wrote with --failed"
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}; write the failed lines anew") from error


def sha256_of(path: Path) -> str:
    """Return a file's checksum. Raises StorageError."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error


# -------------------------------------------------------------------- inside: checks


def _check_kind(target: Path) -> None:
    """Refuse a name that a run takes for another kind of file than one of lines."""
    if target.suffix.lower() in _OTHER_KINDS:
        raise UsageError(
            f"--failed-to {target}: the lines are written as they are, neither compressed nor as "
            "Parquet; let the name end in .jsonl"
        )


def _check_new(target: Path) -> None:
    if not target.parent.is_dir():
        raise UsageError(
            f"--failed-to {target}: the directory {target.parent} does not exist; make it, or name "
            "a file elsewhere"
        )
    if os.path.lexists(target):
        raise UsageError(f"--failed-to {target} exists and is not overwritten; name a new file")


def _check_output(run: FoundRun) -> None:
    """A complete run's output must be the one it wrote; of another, what is there is taken."""
    if not run.is_complete:
        return
    try:
        size = run.output.stat().st_size
    except OSError as error:
        raise unreadable(f"the output {run.output}", error) from error
    if size not in run.output_sizes:
        raise StateError(
            f"the output {run.output} is not the one that the run in {run.state_dir} wrote "
            f"({size} bytes, not {run.output_sizes[0] if run.output_sizes else 0}); restore it"
        )


# -------------------------------------------------------------------- inside: writing


def _write(
    run: FoundRun,
    lines: Path,
    target: Path,
    kinds: Collection[str],
    work_ids: array[int],
    files: Files,
) -> None:
    partial = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        try:
            sha256 = _copy_lines(lines, partial, work_ids)
            origin = Origin(
                run.run_id,
                os.fsencode(run.state_dir).decode("utf-8", "backslashreplace"),
                os.fsencode(run.output).decode("utf-8", "backslashreplace"),
                sorted(kinds) or None,
                sha256,
                work_ids.tolist(),
            )
            files.write_whole(origin_path(target), msgspec.json.encode(origin) + b"\n")
            # Last: there is no such file without its origin, and none that is not whole.
            _give_name(partial, target, files)
        finally:
            files.unlink(partial)
    except OSError as error:
        raise StorageError(
            f"cannot write {error.filename or target}: {error.strerror}; nothing was changed, "
            f"make room or name a file elsewhere than in {quoted(target.parent)}"
        ) from error


def _copy_lines(source: Path, target: Path, work_ids: array[int]) -> str:
    """Copy lines of the input byte for byte; return the checksum of the copy."""
    digest = hashlib.sha256()
    position = 0
    with LineReader(source) as reader, target.open("xb", buffering=_BUFFER_BYTES) as copy:
        for work_id in work_ids:
            reader.skip(work_id - position)
            piece = reader.begin()
            if not piece:
                raise StateError(f"the input {source} has no line {work_id}; restore it")
            for part in itertools.chain([piece], reader.rest()):
                digest.update(part)
                copy.write(part)
            position = work_id + 1
        copy.flush()
        os.fsync(copy.fileno())
    return digest.hexdigest()


def _give_name(partial: Path, target: Path, files: Files) -> None:
    """Rename, but never over a file that another process made meanwhile."""
    try:
        os.link(partial, target, follow_symlinks=False)
    except FileExistsError:
        _check_new(target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _check_new(target)  # a file system without links: the next best
        files.rename(partial, target)
    files.sync_dir(target.parent)
