"""The results of a run over another run's failed lines, put back at their positions.

The new output is written whole beside the old one and then takes its name, so that there is
always one whole output. run.yaml must say the same as the output; what may be interrupted
between the two is settled by the next merge:

    run.yaml gets `merged`: what it is going to say   -> still the old output: forgotten
    the new output takes the old one's name           -> the new output: what `merged` says holds
    run.yaml says it                                  -> done

Which of the two outputs is there is told by the file itself (its inode number and size), as the
sizes may be equal.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dispatcher.config import default_state_dir
from dispatcher.core.events import Counters
from dispatcher.core.results import error_kind
from dispatcher.errors import DispatcherError, StateError, StorageError, UsageError
from dispatcher.runs.failed import Origin, read_origin, sha256_of
from dispatcher.runs.found import FoundRun, number, quoted, section, the_run
from dispatcher.runs.lines import LineReader, unreadable
from dispatcher.storage.files import Files
from dispatcher.storage.journal import last_epoch
from dispatcher.storage.opening import utc_now
from dispatcher.storage.ownership import REFRESH_S, Ownership
from dispatcher.storage.run_state import remove_intermediate, save_run_file
from dispatcher.storage.source import LineSource

_BUFFER_BYTES = 1 << 20
_SYNC_BYTES = 256 << 20
_MERGED = "merged"
_MERGES = "merges"


@dataclass(slots=True)
class Merged:
    """What a merge did.

    `replaced` lines got another one, `still_failed` of them another error; `kept` lines of the
    second run were not wanted. `again` is set when it had been done before, `finished` when only
    the end of an interrupted one was left to do.
    """

    output: Path
    replaced: int = 0
    still_failed: int = 0
    kept: int = 0
    errors_left: int = 0
    again: str | None = None
    finished: bool = False


def merge(
    run: FoundRun,
    place: Path,
    *,
    failed: Path | None,
    keep_old_errors: bool,
    files: Files,
) -> Merged:
    """Put the results of the run at `place`, an output or a state directory, into `run`'s output.

    `failed` is its input, if not the one it names. Raises UsageError, StateError or StorageError;
    the output is then as it was, or a second call settles what is left to do.
    """
    second = _second_run(place)
    for each in (run, second):
        _check_complete(each)
    if run.original is not None:
        raise UsageError(
            f"{run.state_dir} is a copy of {run.original}, whose run has the same output; name "
            "that one, or remove it first"
        )
    with _owned(run, files) as owner:
        run = run.reread()
        run, finished = _settle_interrupted(run, owner, files)
        work = Merge(run, second, failed, keep_old_errors, owner, files)
        merged = work.done_before() or work.run_all()
        merged.finished = finished and merged.again is not None
        return merged


@contextmanager
def _owned(run: FoundRun, files: Files) -> Iterator[Ownership]:
    """Have the run while its files change, as a server has it."""
    owner = Ownership(run.state_dir, files)
    try:
        while wait_s := owner.try_take(last_epoch(run.state_dir, files)):
            time.sleep(wait_s)
        yield owner
    finally:
        owner.release()
        if run.is_complete and owner.epoch:
            remove_intermediate(run.state_dir, owner.epoch, files)


def _second_run(place: Path) -> FoundRun:
    """Find the run that wrote an output."""
    run_dir = place if place.is_dir() else default_state_dir(place)
    if not run_dir.is_dir():
        what = "no state directory of its run is beside it" if place.exists() else "is not there"
        raise UsageError(
            f"--merge {place}: {what}; name the output of the run over the failed lines, or that "
            "run's state directory"
        )
    run = the_run(run_dir, 0)
    if place.is_file() and not (run.output.exists() and place.samefile(run.output)):
        raise UsageError(f"--merge {place}: the run in {run_dir} wrote {run.output}, not this")
    return run


# -------------------------------------------------------------------- an interrupted merge


def _settle_interrupted(run: FoundRun, owner: Ownership, files: Files) -> tuple[FoundRun, bool]:
    """Finish a merge that was interrupted after the new output got its name, forget another."""
    intention = section(run.content, _MERGED)
    if not intention:
        return run, False
    content = {key: value for key, value in run.content.items() if key != _MERGED}
    _check_size(run)  # of a third output nothing can be told, so nothing is forgotten
    there = _stat(run.output)
    before, after = number(content.get("output_bytes")), number(intention.get("output_bytes"))
    is_new = (there.st_size, there.st_ino) == (after, number(intention.get("inode")))
    # A copy of the directory has other inode numbers; but then the size may tell.
    is_new = is_new or (there.st_size == after != before)
    if is_new:
        content |= _outcome(intention)
        content[_MERGES] = [*_merges(run), section(intention, "merge")]
        _sync_name(run.output.resolve(), files)
    owner.confirm()
    save_run_file(run.state_dir, content, files)
    return FoundRun(run.state_dir, content), is_new


def _outcome(intention: dict[str, Any]) -> dict[str, Any]:
    return {key: intention[key] for key in ("output_bytes", "summary") if key in intention}


def _merges(run: FoundRun) -> list[dict[str, Any]]:
    known = run.content.get(_MERGES)
    return [entry for entry in known if isinstance(entry, dict)] if isinstance(known, list) else []


# -------------------------------------------------------------------- one merge


@dataclass(slots=True)
class Merge:
    """One merge, from its checks to its end; the first run is `owner`'s."""

    run: FoundRun
    second: FoundRun
    failed: Path | None
    keep_old_errors: bool
    owner: Ownership
    files: Files
    errors: Counter[str] = field(default_factory=Counter)

    def done_before(self) -> Merged | None:
        """Return that this was done before, if it was."""
        entry = self._entry()
        same = ("run", "its_merges", "kept_old_errors")
        for other in _merges(self.run):
            if all(other.get(name) == entry[name] for name in same):
                left = number(self.run.summary.get("failed"))
                return Merged(self.run.output, errors_left=left, again=str(other.get("at")))
        return None

    def run_all(self) -> Merged:
        """Check, write the new output, and let it take the old one's place."""
        origin = self._check()
        target = self.run.output.resolve()
        partial = target.with_name(f".{target.name}.merging")
        try:
            self.files.unlink(partial)  # of a merge that was interrupted: the run is ours
            return self._replace(target, partial, origin)
        except OSError as error:
            raise StorageError(
                f"cannot write {error.filename or partial}: {error.strerror}; {target} is "
                f"unchanged: make room for {self.run.content.get('output_bytes')} bytes more in "
                f"{quoted(target.parent)}, then give the same command again"
            ) from error
        finally:
            # Whatever ended it: it has its name by now, or nobody needs it.
            with contextlib.suppress(OSError):
                self.files.unlink(partial)

    # ---------------------------------------------------------------- checks

    def _check(self) -> Origin:
        """Return which positions the second run's lines have. Raises what does not fit."""
        for run in (self.run, self.second):
            _check_size(run)
        file = self.failed if self.failed is not None else self.second.input
        origin = read_origin(file)
        if origin.run != self.run.run_id:
            raise UsageError(
                f"the lines of {file} are those of run {origin.run} in {origin.state}, not of run "
                f"{self.run.run_id} in {self.run.state_dir}; name that run's state directory"
            )
        self._check_input(file, origin)
        lines, answers = len(origin.work_ids), number(self.second.summary.get("done"))
        if lines != answers:
            raise StateError(f"{file} has {lines} lines, but {self.second.output} {answers}")
        places = origin.work_ids
        if any(b <= a for a, b in itertools.pairwise(places)) or (
            places and not 0 <= places[0] <= places[-1] < number(self.run.summary.get("done"))
        ):
            raise StateError(
                f"{file}.origin names lines that the run does not have, or not in order"
            )
        return origin

    def _check_input(self, file: Path, origin: Origin) -> None:
        """Make sure that the second run answered these very lines."""
        source = LineSource(file, 1)
        try:
            same = source.fingerprint() == self.second.content.get("fingerprint")
        finally:
            source.close()
        if not same:
            raise StateError(
                f"{file} is not the input that {self.second.output} answers, or was changed since; "
                "restore it, or name the right one with --failed"
            )
        if sha256_of(file) != origin.sha256:
            raise StateError(
                f"{file} is not what --failed-to wrote: line by line it may belong elsewhere now; "
                "write the failed lines anew and run them again"
            )

    # ---------------------------------------------------------------- writing

    def _replace(self, target: Path, partial: Path, origin: Origin) -> Merged:
        merged = Merged(target)
        with _NewFile(partial, target.stat().st_mode, self.owner, self.files) as new:
            self._weave(new, origin, merged)
            new.flush()
            inode = new.sync()
        summary = self._new_summary()
        merged.errors_left = number(summary.get("failed"))
        intention = {
            "output_bytes": new.size,
            "inode": inode,
            "summary": summary,
            "merge": {**self._entry(), "at": utc_now(), "lines": merged.replaced},
        }
        content = self.run.content
        if merged.replaced:
            self._save({**content, _MERGED: intention})
            self.owner.confirm()
            self.files.rename(partial, target)
            _sync_name(target, self.files)
        entries = [*_merges(self.run), intention["merge"]]
        self._save({**content, **_outcome(intention), _MERGES: entries})
        return merged

    def _weave(self, new: _NewFile, origin: Origin, merged: Merged) -> None:
        """Write the first output with lines of the second one in it."""
        wanted = iter(origin.work_ids)
        work_id = next(wanted, -1)
        with LineReader(self.run.output) as old, LineReader(self.second.output) as fresh:
            place = 0
            while head := old.begin():
                replacement = b""
                if place == work_id:
                    replacement = self._replacement(head, fresh, place, merged)
                    work_id = next(wanted, -1)
                if replacement:
                    new.write(replacement)
                else:
                    self._count(head)
                    new.write(head)
                    for piece in old.rest():
                        new.write(piece)
                place += 1
            left_over = fresh.begin()
        self._check_counts(place, old, fresh, left_over=bool(left_over) or work_id >= 0)

    def _replacement(self, head: bytes, fresh: LineReader, place: int, merged: Merged) -> bytes:
        """Return the next line of the second output if it replaces one that begins so, or b""."""
        first = fresh.begin()
        index = fresh.lines - first.endswith(b"\n")
        kind = error_kind(first)
        if not error_kind(head) or (kind and self.keep_old_errors):
            merged.kept += 1
            return b""
        line = fresh.whole(first)
        if kind:
            line = _renumbered(line, index, place)
            merged.still_failed += 1
        self._count(line)
        merged.replaced += 1
        return line

    def _count(self, head: bytes) -> None:
        if kind := error_kind(head):
            self.errors[kind] += 1

    def _check_counts(
        self, lines: int, old: LineReader, fresh: LineReader, *, left_over: bool
    ) -> None:
        expected = number(self.run.summary.get("done"))
        if (lines, old.lines) != (expected, expected):
            raise StateError(
                f"{self.run.output} has {lines} lines, but its run had {expected}; restore it"
            )
        answers = number(self.second.summary.get("done"))
        if left_over or fresh.lines != answers:
            raise StateError(
                f"{self.second.output} does not have the {answers} lines that its run wrote; "
                "restore it"
            )

    def _new_summary(self) -> dict[str, Any]:
        """Return the first run's totals with the errors that its output has now."""
        counted = Counters()
        for kind, count in self.errors.items():
            counted.add_errors(kind, count)
        servers_own = {
            kind for run in (self.run, self.second) for kind in section(run.summary, "tombstones")
        }
        tombstones = {kind: self.errors[kind] for kind in servers_own if self.errors[kind]}
        return {
            **self.run.summary,
            "failed": counted.failed,
            "tombstones": tombstones,
            "errors": counted.errors,
        }

    def _entry(self) -> dict[str, Any]:
        """Return what tells this merge from others: one is told anew when its output changed."""
        return {
            "run": self.second.run_id,
            "its_merges": len(_merges(self.second)),
            "output": os.fsencode(self.second.output).decode("utf-8", "backslashreplace"),
            "kept_old_errors": self.keep_old_errors,
        }

    def _save(self, content: dict[str, Any]) -> None:
        self.owner.confirm()
        try:
            save_run_file(self.run.state_dir, content, self.files)
        except DispatcherError as error:
            raise StorageError(f"{error}; make room, then give the same command again") from error


def _sync_name(output: Path, files: Files) -> None:
    try:
        files.sync_dir(output.parent)
    except OSError as error:
        raise StorageError(
            f"cannot sync {output.parent} ({error.strerror}): whether the new output is there for "
            "good is unknown; check the file system, then give the same command again"
        ) from error


def _check_complete(run: FoundRun) -> None:
    if not run.is_complete:
        remedy = run.resume_command or "give its command again"
        raise StateError(
            f"the run in {run.state_dir} is not complete, and only whole outputs are merged; "
            f"finish it first: {remedy}"
        )


def _check_size(run: FoundRun) -> None:
    if (size := _stat(run.output).st_size) not in run.output_sizes:
        raise StateError(
            f"the output {run.output} is not the one that the run in {run.state_dir} wrote "
            f"({size} bytes, not {' or '.join(map(str, run.output_sizes))}); restore it"
        )


def _stat(output: Path) -> os.stat_result:
    try:
        return output.stat()
    except OSError as error:
        raise unreadable(f"the output {output}", error) from error


def _renumbered(line: bytes, index: int, place: int) -> bytes:
    """Let an error name the line it stands at now instead of the one it had in its own run."""
    try:
        value = json.loads(line)
        error = value["__ERROR__"]
        if error["work_id"] != index:
            return line
        error["work_id"] = place
    except (ValueError, KeyError, TypeError, RecursionError):
        return line
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


class _NewFile:
    """A file that is written from its beginning; the claim on the run is kept up meanwhile."""

    def __init__(self, path: Path, mode: int, owner: Ownership, files: Files) -> None:
        self.size = 0
        self._files = files
        self._owner = owner
        self._confirmed_at = time.monotonic()
        self._pending = bytearray()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        self._fd = files.open(path, flags)
        self._synced_bytes = 0
        with contextlib.suppress(OSError):  # not every file system has modes
            os.fchmod(self._fd, mode & 0o7777)

    def write(self, data: bytes) -> None:
        """Add bytes. Raises OSError."""
        self._pending += data
        if len(self._pending) >= _BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was added. Raises OSError."""
        self._files.write_at(self._fd, self._pending, self.size)
        self.size += len(self._pending)
        self._pending.clear()
        if self.size - self._synced_bytes >= _SYNC_BYTES:
            # All of it at the end could take longer than a claim may go unconfirmed.
            self._files.sync(self._fd)
            self._synced_bytes = self.size
        if time.monotonic() - self._confirmed_at >= REFRESH_S:
            self._owner.confirm()
            self._confirmed_at = time.monotonic()

    def sync(self) -> int:
        """Return the file's inode number once it is on disk."""
        self._files.sync(self._fd)
        return os.fstat(self._fd).st_ino

    def __enter__(self) -> _NewFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close(self._fd)
