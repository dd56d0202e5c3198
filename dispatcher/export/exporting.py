"""One export, from its checks to the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import msgspec

from dispatcher.config import default_state_dir
from dispatcher.errors import StateError, UsageError
from dispatcher.export.lines import ERROR, OutputLine, OutputLines
from dispatcher.export.targets import (
    SUFFIXES,
    columns_of,
    new_file,
    open_text,
    pyarrow_modules,
    write_parquet,
)
from dispatcher.input_options import data_set_directory, is_data_set
from dispatcher.runs.found import FoundRun, number, the_run
from dispatcher.runs.reading import read_owner
from dispatcher.storage.files import Files


@dataclass(slots=True)
class Exported:
    """What an export did; `json_columns` names the places that are kept as JSON text, and why."""

    output: Path
    rows: int = 0
    errors: int = 0
    json_columns: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be exported, and where to.

    `__ERROR__` lines are left out with `skip_errors`, and go to `errors_to` if that is a file.
    """

    target: Path
    skip_errors: bool = False
    errors_to: Path | None = None
    force: bool = False
    is_partial: bool = False


def export(place: Path, wish: Wish, files: Files, tell: Callable[[int], None]) -> Exported:
    """Export the run at `place`, an output or a state directory. `tell` hears of every line.

    Raises UsageError, StateError or StorageError; there is then no new file.
    """
    output, run = _output_of(place, wish)
    _check_targets(wish)
    for target in _targets(wish):
        _check_spares(target, output, run)
    if _is_parquet(wish.target):
        pyarrow_modules(f"the export to {wish.target}")
    lines = OutputLines(output)
    with closing(lines):
        return _Export(lines, wish, files, tell).run()


class _Export:
    def __init__(
        self, lines: OutputLines, wish: Wish, files: Files, tell: Callable[[int], None]
    ) -> None:
        self._lines = lines
        self._wish = wish
        self._files = files
        self._tell = tell
        self._done = Exported(lines.path)

    def run(self) -> Exported:
        wish, files = self._wish, self._files
        errors: AbstractContextManager[BinaryIO | None] = nullcontext()
        if wish.errors_to is not None:
            errors = new_file(wish.errors_to, files, force=wish.force)
        # The errors' file comes to be last, so that a second try finds no half of the first.
        with errors as errors_file, new_file(wish.target, files, force=wish.force) as file:
            if _is_parquet(wish.target):
                columns = columns_of(self._lines, self._rows())
                self._done.json_columns = [
                    each for each in columns.mixed() if "(errors)" not in each
                ]
                write_parquet(file, self._lines, self._rows(), columns)
            else:
                with open_text(file, wish.target) as text:
                    for line in self._rows():
                        text.write(line.text + b"\n")
            if errors_file is not None and wish.errors_to is not None:
                with open_text(errors_file, wish.errors_to) as text:
                    for line in self._lines:
                        if line.is_error:
                            text.write(self._numbered(line))
        return self._done

    def _rows(self) -> Iterator[OutputLine]:
        without_errors = self._wish.skip_errors or self._wish.errors_to is not None
        self._done.rows = self._done.errors = 0
        for line in self._lines:
            self._tell(line.work_id)
            self._done.errors += line.is_error
            if not (without_errors and line.is_error):
                self._done.rows += 1
                yield line

    def _numbered(self, line: OutputLine) -> bytes:
        """Return an error with the number of its line, which the file alone does not tell."""
        error = self._lines.error_of(line)
        return msgspec.json.encode({"work_id": line.work_id, ERROR: error}) + b"\n"


def _is_parquet(target: Path) -> bool:
    return target.suffix.lower() == ".parquet"


def _output_of(place: Path, wish: Wish) -> tuple[Path, FoundRun | None]:
    """Return the output to be read, having made sure of it, and its run if that is known."""
    state_dir = place if place.is_dir() else default_state_dir(place)
    if not place.is_dir() and not state_dir.is_dir():
        if not place.is_file():
            raise UsageError(f"{place} does not exist; name a run's output or state directory")
        if not wish.is_partial:
            raise UsageError(
                f"{state_dir} is not there, so whether {place} is whole is unknown; name the "
                "state directory of its run, or give --partial to export what is there"
            )
        return place, None
    run = the_run(state_dir, 0)
    if place.is_file() and not (run.output.exists() and place.samefile(run.output)):
        raise UsageError(f"the run in {state_dir} wrote {run.output}, not {place}")
    _check_whole(run, wish)
    return run.output, run


def _check_whole(run: FoundRun, wish: Wish) -> None:
    if not run.is_complete and not wish.is_partial:
        raise StateError(
            f"the run in {run.state_dir} {_what_is_left(run)}, or give --partial to export the "
            "lines that are there"
        )
    if not run.output.is_file():
        when = "; restore it" if run.is_complete else " yet; wait until the run has written a line"
        raise StateError(f"the output {run.output} is not there{when}")
    if not run.is_complete:
        return
    size = run.output.stat().st_size
    if size not in run.output_sizes:
        raise StateError(
            f"the output {run.output} is not the one that the run in {run.state_dir} wrote "
            f"({size} bytes, not {number(run.content.get('output_bytes'))}); restore it"
        )


def _what_is_left(run: FoundRun) -> str:
    owner = read_owner(run.state_dir)
    if owner is not None and owner.is_alive:
        return "is running; wait until it is complete"
    hint = f"; finish it with: {run.resume_command}" if run.resume_command else ""
    return f"is not complete{hint}"


def _targets(wish: Wish) -> list[Path]:
    return [wish.target, *([wish.errors_to] if wish.errors_to is not None else [])]


def _check_spares(target: Path, output: Path, run: FoundRun | None) -> None:
    """Refuse a target that is one of the run's own files, also with --force."""
    if _is_same(target, output):
        raise UsageError(f"{target} is the output itself; name another file")
    if run is None:
        return
    place = target.resolve()
    if place.is_relative_to(run.state_dir.resolve()):
        raise UsageError(
            f"{target} is in the state directory {run.state_dir} of the run; name a file elsewhere"
        )
    given = run.given_input
    source = (data_set_directory(given) if is_data_set(given) else None) or given
    is_part = source.is_dir() and target.exists() and place.is_relative_to(source.resolve())
    if is_part or _is_same(target, source):
        raise UsageError(f"{target} is the input of the run, or part of it; name another file")


def _is_same(target: Path, other: Path) -> bool:
    return target.exists() and other.exists() and target.samefile(other)


def _check_targets(wish: Wish) -> None:
    if not wish.target.name.lower().endswith(SUFFIXES):
        raise UsageError(
            f"--to {wish.target} says no kind of file; let its name end in {', '.join(SUFFIXES)}"
        )
    if wish.target.name.lower() in SUFFIXES:
        raise UsageError(f"--to {wish.target} is a kind of file only; put a name before it")
    if wish.errors_to is not None and _is_parquet(wish.errors_to):
        raise UsageError(f"--errors-to {wish.errors_to}: errors are written as JSON lines")
    if wish.errors_to is not None and wish.target.absolute() == wish.errors_to.absolute():
        raise UsageError(f"--to and --errors-to name the same file {wish.target}")
