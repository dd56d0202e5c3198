"""`STATE/slurm/`: the scripts of a run as submitted, with which settings, as which jobs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml
from filelock import FileLock, Timeout

from dispatcher.config import default_state_dir
from dispatcher.errors import StateError, StorageError, UsageError
from dispatcher.slurm.jobs import Submission
from dispatcher.storage.files import Files

DIRECTORY = "slurm"
_SETTINGS_FILE = "settings.yaml"
_JOBS_FILE = "jobs.jsonl"


class Record:
    """What is kept of a run's jobs in its state directory."""

    def __init__(self, state_dir: Path, files: Files | None = None) -> None:
        self.state_dir = state_dir
        self.directory = state_dir / DIRECTORY
        self.settings_path = self.directory / _SETTINGS_FILE
        self._files = files or Files()

    # ---------------------------------------------------------------- writing

    @contextlib.contextmanager
    def begin(self) -> Iterator[None]:
        """Make the directory and keep other submissions of the same run out meanwhile.

        Raises UsageError, StateError or StorageError.
        """
        if self.state_dir.is_file():
            raise UsageError(
                f"{self.state_dir} is a file, but the state of a run is a directory; give another "
                "path with --state"
            )
        try:
            self._files.make_dir(self.directory)
        except OSError as error:
            raise StorageError(
                f"cannot create the directory {self.directory}: {error.strerror}; give --state a "
                "path you may write to"
            ) from error
        lock = FileLock(self.directory / "lock")
        with contextlib.ExitStack() as stack:
            try:
                # Where a file system has no locks it does without.
                with contextlib.suppress(NotImplementedError, OSError):
                    lock.acquire(timeout=0)
                    stack.callback(lock.release)
            except Timeout:
                raise StateError(
                    f"another `dispatcher slurm` submits jobs of the run in {self.state_dir} just "
                    "now; look at them with dispatcher slurm status"
                ) from None
            yield

    def write_script(self, name: str, text: str) -> Path:
        """Write a rendered script; return where it is. Raises StorageError."""
        path = self.script(name)
        self._write(path, os.fsencode(text))
        return path

    def write_settings(self, command: str, options: Mapping[str, Any]) -> None:
        """Keep what `--resume` goes by. Raises StorageError."""
        content = {"command": command, "options": dict(options)}
        text = yaml.safe_dump(content, sort_keys=False)
        self._write(self.settings_path, text.encode())

    def add(self, submission: Submission) -> None:
        """Note jobs that were submitted. Raises StorageError."""
        lines = [msgspec.json.encode(s) + b"\n" for s in [*self.submissions(), submission]]
        self._write(self.directory / _JOBS_FILE, b"".join(lines))

    def _write(self, path: Path, content: bytes) -> None:
        try:
            self._files.write_whole(path, content)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}") from error

    # ---------------------------------------------------------------- reading

    def script(self, name: str) -> Path:
        """Return where a rendered script is, or would be."""
        return self.directory / f"{name}.sbatch"

    def submissions(self) -> list[Submission]:
        """Return what was submitted, oldest first. Raises StateError."""
        path = self.directory / _JOBS_FILE
        try:
            lines = (self._files.read_whole(path) or b"").splitlines()
            return [msgspec.json.decode(line, type=Submission) for line in lines]
        except OSError as error:
            raise StateError(f"cannot read {path}: {error.strerror}") from error
        except msgspec.DecodeError as error:
            raise StateError(
                f"{path} is damaged ({error}); look at the run's jobs with squeue, and remove it"
            ) from error

    def settings(self) -> dict[str, Any]:
        """Return the command that was submitted last, and its options. Raises StateError."""
        path = self.settings_path
        remedy = "give the whole command again"
        try:
            content = yaml.safe_load(self._files.read_whole(path) or b"")
            return {"command": str(content["command"]), "options": dict(content["options"])}
        except OSError as error:
            raise StateError(f"cannot read {path}: {error.strerror}; {remedy}") from error
        except (yaml.YAMLError, TypeError, KeyError, ValueError) as error:
            raise StateError(f"{path} is damaged; {remedy}") from error


def find_record(place: Path) -> Record:
    """Return the record of the run that is meant by its output or its state directory.

    Raises UsageError when nothing was submitted for it.
    """
    place = place.absolute()
    for state_dir in (place, default_state_dir(place)):
        record = Record(state_dir)
        if (record.directory / _JOBS_FILE).is_file():
            return record
    raise UsageError(
        f"{place} has no jobs: nothing was submitted for it by `dispatcher slurm run` or `start`; "
        "name the run's output, or its state directory"
    )
