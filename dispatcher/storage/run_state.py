"""What is known of a run besides its journal: the lock on it and run.yaml."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from dispatcher.errors import RunLockedError, StateError, StorageError, UsageError
from dispatcher.storage.files import Files

RUN_FILE = "run.yaml"
JOURNAL_DIR = "journal"


class RunLock:
    """Keeps a second process off the run, where the file system has locks."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        # Taken in one thread and released in another.
        self._lock = FileLock(state_dir / "lock", thread_local=False)

    def acquire(self) -> None:
        """Take the lock. Raises RunLockedError when another process holds it."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise RunLockedError(
                f"another process works on the run in {self._state_dir}; wait for it to end, or "
                "stop it first"
            ) from error
        except (NotImplementedError, OSError):
            # Some cluster file systems have no locks; that alone is no reason not to run.
            return

    def release(self) -> None:
        """Let the next process have the run."""
        with contextlib.suppress(OSError):
            self._lock.release()


def make_state_dir(path: Path) -> None:
    """Create the state directory. Raises UsageError or StorageError."""
    if path.is_file():
        raise UsageError(
            f"{path} is a file, but the state of a run is a directory; an older checkpoint file "
            "cannot be read: give another path, or leave the option out"
        )
    try:
        (path / JOURNAL_DIR).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot create the state directory {path}: {error.strerror}; give --state a path "
            "you may write to"
        ) from error


def load_run_file(state_dir: Path) -> dict[str, Any] | None:
    """Return what run.yaml says, or None when there is none."""
    path = state_dir / RUN_FILE
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise StateError(f"cannot read {path}: {error}; restore or remove it") from error
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
