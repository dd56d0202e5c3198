"""Which runs there are: the run.yaml files under a directory."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dispatcher.config import default_state_dir
from dispatcher.errors import DispatcherError, StateError, UsageError
from dispatcher.storage.files import Files
from dispatcher.storage.journal import JOURNAL_DIR
from dispatcher.storage.run_state import (
    RUN_FILE,
    SPOOL_FILE,
    STARTING,
    copy_of_input,
    load_run_file,
)

_STATE_SUFFIX = default_state_dir(Path("output")).suffix
_ESCAPED = re.compile(rb"\\x([0-9a-f]{2})")


@dataclass(frozen=True, slots=True)
class FoundRun:
    """A run as its run.yaml describes it; `problem` is set when that cannot be read."""

    state_dir: Path
    content: dict[str, Any]
    problem: str | None = None

    @property
    def run_id(self) -> str:
        """The run's id."""
        return str(self.content.get("run", ""))

    @property
    def is_complete(self) -> bool:
        """Whether every line has its result."""
        return self.content.get("state") == "complete"

    @property
    def summary(self) -> dict[str, Any]:
        """The totals of a complete run."""
        return section(self.content, "summary")

    @property
    def output(self) -> Path:
        """The output file."""
        return self._path("output")

    @property
    def input(self) -> Path:
        """The file that holds the input, or its beginning: a copy where it is no plain file."""
        return copy_of_input(self.state_dir) or self.given_input

    @property
    def given_input(self) -> Path:
        """The input as it was given, whether there is a copy of it or not."""
        return self._path("input")

    @property
    def has_copy(self) -> bool:
        """Whether the whole copy of an input that could not be read by offset is still there."""
        return (self.state_dir / SPOOL_FILE).exists()

    @property
    def is_copied_in_part(self) -> bool:
        """Whether a run began with a copy that was not whole, and is not now."""
        return self.input_bytes is None and not self.has_copy and self.input != self.given_input

    @property
    def input_bytes(self) -> int | None:
        """The size of the input; None while nothing tells it, as its copy is not whole."""
        size = section(self.content, "fingerprint").get("size")
        return size if isinstance(size, int) else None

    @property
    def output_sizes(self) -> list[int]:
        """The sizes the output may have; two while a merge is not recorded as done."""
        merged = section(self.content, "merged")
        sizes = (self.content.get("output_bytes"), merged.get("output_bytes"))
        return [number(size) for size in sizes if size is not None]

    @property
    def original(self) -> Path | None:
        """The state directory of which this one is a copy, if that is still there."""
        recorded = self._path("state")
        there = recorded.is_absolute() and recorded.is_dir()
        return recorded if there and not recorded.samefile(self.state_dir) else None

    @property
    def resume_command(self) -> str | None:
        """The command that goes on with the run; None for one that does not know it."""
        program = section(self.content, "command").get("program")
        if not isinstance(program, str):
            return None
        return f"{program} --resume {quoted(self.state_dir)}"

    def reread(self) -> FoundRun:
        """Return what run.yaml says now. Raises StateError."""
        return _read(self.state_dir) or self

    def _path(self, name: str) -> Path:
        options = section(section(self.content, "command"), "options")
        # Of a run that nobody came to have, only the options are known.
        before = options.get(name) or options.get(f"{name.removesuffix('put')}file")
        shown = str(section(self.content, "settings").get(name) or before or "")
        path = Path(shown)
        if not path.exists():
            # A name that is not UTF-8 stands in run.yaml with its bytes written out.
            raw = _ESCAPED.sub(lambda m: bytes([int(m[1], 16)]), shown.encode())
            if os.path.exists(raw):
                path = Path(os.fsdecode(raw))
        return path


def section(content: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a part of run.yaml, empty when it is not there."""
    part = content.get(name)
    return part if isinstance(part, dict) else {}


def number(value: Any) -> int:
    """Return a figure of run.yaml, 0 for what is none."""
    return value if isinstance(value, int) else 0


def quoted(path: Path) -> str:
    """Return a path as one word of a command."""
    return shlex.quote(str(path))


def find_runs(places: Iterable[Path], depth: int) -> list[FoundRun]:
    """Return the runs in and under these directories, each once, sorted by where they are.

    An output file stands for its state directory. Raises UsageError for what is neither.
    """
    seen: set[tuple[int, int]] = set()
    found: list[FoundRun] = []
    for place in places:
        found += _walk(_directory(place), depth, seen)
    return sorted(found, key=lambda run: run.state_dir)


def the_run(place: Path, depth: int) -> FoundRun:
    """Return the one run at or under `place`. Raises UsageError, StateError."""
    found = find_runs([place], depth)
    if not found:
        raise UsageError(
            f"{place} holds no run; name the state directory of one (OUTPUT.dispatch, unless "
            "--state named another)"
        )
    if len(found) > 1:
        raise UsageError(
            f"{place} holds {len(found)} runs; name the state directory of one of them, such as "
            f"{found[0].state_dir}"
        )
    if found[0].problem is not None:
        raise StateError(found[0].problem)
    return found[0]


def _directory(place: Path) -> Path:
    if place.is_file() and default_state_dir(place).is_dir():
        place = default_state_dir(place)
    if not place.is_dir():
        what = "is not a directory" if place.exists() else "does not exist"
        raise UsageError(f"{place} {what}; name a directory with runs in it, or a state directory")
    return place.absolute()


def _walk(directory: Path, depth: int, seen: set[tuple[int, int]]) -> Iterator[FoundRun]:
    """Look into a directory and, up to `depth` levels, into those below it."""
    try:
        here = directory.stat()
        # A link may lead back up, and two places may share what is below them.
        if (here.st_dev, here.st_ino) in seen:
            return
        seen.add((here.st_dev, here.st_ino))
        names = sorted(e.name for e in os.scandir(directory) if e.is_dir() or e.name == RUN_FILE)
    except OSError:
        return  # what may not be looked into holds no run of this user's
    if RUN_FILE in names:
        run = _read_or_say(directory)
        if run is not None:
            yield run
            return
    if depth > 0:
        for name in names:
            yield from _walk(directory / name, depth - 1, seen)


def _read_or_say(state_dir: Path) -> FoundRun | None:
    try:
        return _read(state_dir)
    except DispatcherError as error:
        # A damaged file of another program's is none of our business.
        is_ours = state_dir.suffix == _STATE_SUFFIX or (state_dir / JOURNAL_DIR).is_dir()
        return FoundRun(state_dir, {}, str(error)) if is_ours else None


def _read(state_dir: Path) -> FoundRun | None:
    """Return the run that a run.yaml describes; None when it is another program's file."""
    content = load_run_file(state_dir, Files())
    if content is None:
        return None
    begun = "run" in content and bool(section(content, "settings"))
    begun = begun or (content.get("state") == STARTING and bool(section(content, "command")))
    return FoundRun(state_dir, content) if begun else None
