"""The lines that a run answered, also when the copy of them is gone with the end of the run."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dispatcher.errors import StateError, StorageError
from dispatcher.input_options import InputOptions
from dispatcher.runs.found import FoundRun, section
from dispatcher.storage.files import Files
from dispatcher.storage.inputs.copying import Copying, copy_input, origin_now
from dispatcher.storage.inputs.opening import is_there, reader_of
from dispatcher.storage.run_state import SPOOL_FILE
from dispatcher.storage.source import LineSource


@contextmanager
def input_lines(run: FoundRun, directory: Path, files: Files) -> Iterator[Path]:
    """Give the file of a run's input lines; a copy is made anew in `directory`, for as long.

    Raises StateError when it is not what the run began with, UsageError or StorageError.
    """
    fingerprint = section(run.content, "fingerprint")
    if run.input.is_file() and (run.has_copy or "original" not in fingerprint):
        _check(run.input, run, "its content changed; restore it")
        yield run.input
        return
    given = run.given_input
    if "original" not in fingerprint:
        raise StateError(
            f"the input {given} of the run in {run.state_dir} is not a file (any more), so its "
            "lines cannot be written; restore it (what came through a pipe is kept only until the "
            "run is complete)"
        )
    if not is_there(given):
        raise StateError(
            f"the input {given} of the run in {run.state_dir} is not there any more, so its "
            "lines cannot be written; restore it"
        )
    reader = reader_of(given, _options_of(run))
    origin = None if reader is None else origin_now(reader, fingerprint)
    if reader is None or origin is None or origin != _origin_part(fingerprint):
        raise StateError(
            f"the input {given} is not the one that the run in {run.state_dir} began with: "
            "its kind or content changed; restore it"
        )
    try:
        made = Path(tempfile.mkdtemp(prefix=".dispatcher-input-", dir=directory))
    except OSError as error:
        raise StorageError(f"cannot write to {directory}: {error.strerror}") from error
    try:
        copy_input(reader, made, None, Copying(files=files))
        _check(
            made / SPOOL_FILE,
            run,
            "the same rows are written as other lines now, perhaps by another version of the "
            "package that reads them; use the one of the run",
        )
        yield made / SPOOL_FILE
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _check(path: Path, run: FoundRun, why: str) -> None:
    before = {
        key: value
        for key, value in section(run.content, "fingerprint").items()
        if key not in ("kind", "original")
    }
    if not before:
        return  # it was copied while the run began, and only its original is known
    source = LineSource(path, 1)
    try:
        same = source.fingerprint() == before
    finally:
        source.close()
    if not same:
        raise StateError(
            f"the input {run.given_input} is not the one that the run in {run.state_dir} began "
            f"with: {why}"
        )


def _origin_part(fingerprint: dict[str, Any]) -> dict[str, Any]:
    return {key: fingerprint.get(key) for key in ("kind", "original")}


def _options_of(run: FoundRun) -> InputOptions:
    settings = section(run.content, "settings")
    return InputOptions(
        settings.get("input_subset"),
        settings.get("input_split"),
        bool(settings.get("input_streaming")),
    )
