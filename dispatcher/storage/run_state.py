"""What is known of a run besides its journal: its directory and run.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dispatcher.errors import StateError, StorageError, UsageError
from dispatcher.storage.files import Files
from dispatcher.storage.journal import JOURNAL_DIR

RUN_FILE = "run.yaml"


def make_state_dir(path: Path, files: Files) -> None:
    """Create the state directory. Raises UsageError or StorageError."""
    if path.is_file():
        raise UsageError(
            f"{path} is a file, but the state of a run is a directory; an older checkpoint file "
            "cannot be read: give another path, or leave the option out"
        )
    try:
        files.make_dir(path / JOURNAL_DIR)
        files.sync_dir(path)
        files.sync_dir(path.parent)
    except OSError as error:
        raise StorageError(
            f"cannot create the state directory {path}: {error.strerror}; give --state a path "
            "you may write to"
        ) from error


def load_run_file(state_dir: Path, files: Files) -> dict[str, Any] | None:
    """Return what run.yaml says, or None when there is none."""
    path = state_dir / RUN_FILE
    try:
        text = files.read_whole(path)
        content = yaml.safe_load(text.decode()) if text is not None else None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise StateError(f"cannot read {path}: {error}; restore or remove it") from error
    if text is None:
        return None
    if not isinstance(content, dict):
        raise StateError(f"{path} does not hold a run's description; restore or remove it")
    return content


def save_run_file(state_dir: Path, content: dict[str, Any], files: Files) -> None:
    """Write run.yaml atomically and durably."""
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    try:
        files.write_whole(state_dir / RUN_FILE, text.encode())
    except OSError as error:
        raise StorageError(f"cannot write {state_dir / RUN_FILE}: {error.strerror}") from error
