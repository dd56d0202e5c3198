"""What is known of a run besides its journal: its directory and run.yaml."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import Any

import yaml

from dispatcher.errors import StateError, StorageError, UsageError
from dispatcher.storage.files import Files
from dispatcher.storage.journal import JOURNAL_DIR
from dispatcher.storage.ownership import OWNERS_DIR, may_be_anothers
from dispatcher.storage.spool import SPOOL_DIR

RUN_FILE = "run.yaml"
STARTING = "starting"
"""The state in a run.yaml that says what was begun, by whom nobody had the run yet."""

SPOOL_FILE = "input.spool"
PARTIAL_SPOOL_FILE = "input.partial"
SPOOL_ORIGIN_FILE = "input.origin"
SPOOL_SUMS_FILE = "input.sums"
"""The copy of an input that cannot be read by offset, while it is made, what it was made of, and
what was read of it before it was whole."""

_LOCK_FILE = "lock"


def make_state_dir(path: Path, files: Files) -> None:
    """Create the state directory. Raises UsageError or StorageError."""
    if path.is_file():
        raise UsageError(
            f"{path} is a file, but the state of a run is a directory; an older checkpoint file "
            "cannot be read: give another path, or leave the option out"
        )
    try:
        files.make_dir(path / JOURNAL_DIR)
        files.make_dir(path / SPOOL_DIR)  # workers write there, but never create it
        files.sync_dir(path)
        files.sync_dir(path.parent)
    except OSError as error:
        raise StorageError(
            f"cannot create the state directory {path}: {error.strerror}; give --state a path "
            "you may write to"
        ) from error


def copy_of_input(state_dir: Path) -> Path | None:
    """Return the copy of the input that there is, whole or not; None when there is none."""
    # It may be whole, and have its other name, between two looks.
    for name in (SPOOL_FILE, PARTIAL_SPOOL_FILE, SPOOL_FILE):
        if (path := state_dir / name).exists():
            return path
    return None


def load_run_file(state_dir: Path, files: Files) -> dict[str, Any] | None:
    """Return what run.yaml says, or None when there is none. Raises StateError."""
    path = state_dir / RUN_FILE
    try:
        text = files.read_whole(path)
    except NotADirectoryError:
        return None
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror}") from error
    if text is None:
        return None
    remedy = "restore it, or remove it and give the run's whole command again, which goes on"
    try:
        content = yaml.safe_load(text.decode())
    except (yaml.YAMLError, ValueError) as error:
        raise StateError(f"{path} is damaged ({_in_one_line(error)}); {remedy}") from error
    if not isinstance(content, dict):
        raise StateError(f"{path} does not hold a run's description; {remedy}")
    return content


def _in_one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())


def note_start(state_dir: Path, content: dict[str, Any], files: Files) -> None:
    """Write a first run.yaml, unless somebody had the run before: then it is its owner's alone.

    So a run can be resumed that is stopped before its owner came to write one. Of two that start
    it at a time, the one that comes to own it writes its own (opening.py). Nothing else rests on
    it, and where it cannot be written the run says so itself.
    """
    path = state_dir / RUN_FILE
    with contextlib.suppress(OSError, StateError, StorageError):
        known = load_run_file(state_dir, files)
        if known is not None:
            if known.get("state") == STARTING and not may_be_anothers(state_dir, files):
                save_run_file(state_dir, content, files)
            return
        partial = path.with_name(f".{RUN_FILE}.{secrets.token_hex(8)}.tmp")
        try:
            files.write_whole(partial, _encode(content))
            os.link(partial, path)  # which, unlike a renaming, replaces nothing
        finally:
            files.unlink(partial)
        files.sync_dir(state_dir)


def save_run_file(state_dir: Path, content: dict[str, Any], files: Files) -> None:
    """Write run.yaml atomically and durably."""
    try:
        files.write_whole(state_dir / RUN_FILE, _encode(content))
    except OSError as error:
        raise StorageError(f"cannot write {state_dir / RUN_FILE}: {error.strerror}") from error


def remove_intermediate(state_dir: Path, epoch: int, files: Files) -> None:
    """Remove what a complete run needs no more, as its owner of this epoch, who let go of it.

    What is left behind costs room but does no harm, so that a failure is no error.
    """
    names = [SPOOL_FILE, PARTIAL_SPOOL_FILE, SPOOL_ORIGIN_FILE, SPOOL_SUMS_FILE]
    halves = tuple(f".{name}." for name in (RUN_FILE, SPOOL_ORIGIN_FILE, SPOOL_SUMS_FILE))
    names += [name for name in files.names(state_dir) if name.startswith(halves)]
    with contextlib.suppress(OSError):
        for name in names:
            files.unlink(state_dir / name)
        (state_dir / JOURNAL_DIR).rmdir()
    owners = state_dir / OWNERS_DIR
    with contextlib.suppress(OSError):
        files.unlink(owners / f"{epoch:06d}")
        owners.rmdir()  # fails when another process has a claim, whose lock must stay
        files.unlink(state_dir / _LOCK_FILE)


def _encode(content: dict[str, Any]) -> bytes:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode()
