"""How a run stands: asked of its server, else read from its files."""

from __future__ import annotations

import datetime
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from dispatcher.client import WorkClient
from dispatcher.errors import CorruptJournalError, DispatcherError
from dispatcher.remedies import options_that_go_on
from dispatcher.runs.found import FoundRun, number, section
from dispatcher.runs.lines import count_errors
from dispatcher.runs.reading import JournalEnd, Owner, patiently, read_end, read_owner
from dispatcher.storage.run_state import STARTING

State = Literal["complete", "running", "stopped", "unreadable"]

_ANSWER_S = 2.0


@dataclass(slots=True)
class Standing:
    """How a run stands. `total` is None when nothing tells it.

    `errors` counts the `__ERROR__` lines by kind, as far as kinds are known: their sum may be
    less than `failed`. `note` says what could not be found out, or what else there is to do.
    """

    run: FoundRun
    state: State
    done: int | None = None
    total: int | None = None
    total_is_exact: bool = False
    failed: int | None = None
    errors: dict[str, int] = field(default_factory=dict)
    ended_at: str | None = None
    last_active_at: str | None = None
    owner: str | None = None
    note: str | None = None

    @property
    def percent(self) -> float | None:
        """How much of it is done."""
        if self.done is None or self.total is None:
            return None
        return 100.0 * self.done / self.total if self.total else 100.0


def look(
    run: FoundRun, *, scan: bool = False, turn: AbstractContextManager[Any] | None = None
) -> Standing:
    """Find out how a run stands, changing nothing.

    `scan` reads the output, to count its errors by kind. Files are read within `turn`, so that of
    many looks at once only one has a journal in memory.
    """
    if run.problem is not None:
        return Standing(run, "unreadable", note=run.problem)
    standing = _look(run, turn or nullcontext())
    if scan:
        try:
            _scan_errors(standing)
        except DispatcherError as error:
            standing.note = str(error)
    return standing


def _look(run: FoundRun, turn: AbstractContextManager[Any]) -> Standing:
    if run.is_complete:
        return _complete(run)
    owner = read_owner(run.state_dir)
    state: State = "running" if owner is not None and owner.is_alive else "stopped"
    standing = Standing(run, state)
    _note_owner(standing, owner)
    if state == "running" and _ask_server(standing):
        return standing
    try:
        with turn:
            run, end = patiently(lambda: _read_files(run))
    except DispatcherError as error:
        standing.note = str(error)
        return standing
    if run.is_complete:
        return _complete(run)  # meanwhile
    if end is None:
        standing.note = _no_journal(standing)
        return standing
    queue = end.queue
    total, exact = _estimate_total(end, run.input_bytes)
    _count(standing, msgspec.to_builtins(queue.counters), total, exact=exact)
    if queue.pause is not None:
        standing.note = f"{queue.pause}; it goes on with {options_that_go_on(queue.pause.by)}"
    return standing


def _read_files(run: FoundRun) -> tuple[FoundRun, JournalEnd | None]:
    """Return the journal's end; a run that was completed meanwhile has none, and says so."""
    try:
        end = read_end(run.state_dir)
    except CorruptJournalError:
        if (now := run.reread()).is_complete:
            return now, None
        raise
    return (run, end) if end is not None else (run.reread(), None)


def _complete(run: FoundRun) -> Standing:
    ended_at = run.content.get("ended_at")
    standing = Standing(run, "complete", ended_at=str(ended_at) if ended_at else None)
    _count(standing, run.summary, number(run.summary.get("done")), exact=True)
    if section(run.content, "merged"):
        standing.note = "a merge into the output was interrupted: give the same --merge again"
    return standing


def _note_owner(standing: Standing, owner: Owner | None) -> None:
    if owner is None:
        return
    seen_at = datetime.datetime.fromtimestamp(owner.seen_at, datetime.UTC)
    standing.last_active_at = seen_at.isoformat(timespec="seconds")
    if owner.is_alive:
        standing.owner = str(owner.identity)


def _ask_server(standing: Standing) -> bool:
    """Fill in what the run's server says; False when there is none, or it does not answer."""
    try:
        with WorkClient(f"@{standing.run.state_dir}", timeout_s=_ANSWER_S) as client:
            status = client.status()
    except DispatcherError:
        return False  # a token of somebody else's: the files tell, too
    if status.get("run") != standing.run.run_id:
        return False
    _count(standing, status, number(status.get("total")), exact=bool(status.get("total_is_exact")))
    if paused := status.get("paused"):
        standing.note = str(paused.get("message", "paused"))
    if status.get("output_error"):
        standing.note = f"output paused: {status['output_error']}"
    return True


def _count(standing: Standing, counters: dict[str, Any], total: int, *, exact: bool) -> None:
    standing.done = number(counters.get("done"))
    standing.failed = number(counters.get("failed"))
    # Before the first line was read, nothing tells how many there are.
    standing.total, standing.total_is_exact = (total if total or exact else None), exact
    standing.errors = known_errors(counters)


def known_errors(counters: dict[str, Any]) -> dict[str, int]:
    """Return the errors by kind: all that are counted, else at least the server's own."""
    counted, tombstones = section(counters, "errors"), section(counters, "tombstones")
    kinds = {**tombstones, **counted}
    most = {k: max(number(counted.get(k)), number(tombstones.get(k))) for k in kinds}
    return {kind: count for kind, count in most.items() if count > 0}


def _estimate_total(end: JournalEnd, input_bytes: int | None) -> tuple[int, bool]:
    """Estimate the number of lines from the bytes read so far; exact once all were read.

    0, and not exact, where nothing tells the size of the input.
    """
    queue = end.queue
    if input_bytes is None:
        return 0, False
    if queue.next_offset >= input_bytes or not queue.next_offset:
        return queue.next_work_id, queue.next_offset >= input_bytes
    return round(queue.next_work_id * input_bytes / queue.next_offset), False


def _no_journal(standing: Standing) -> str:
    if standing.run.content.get("state") == STARTING:
        return "it was not begun: no line was handed out yet"
    if standing.state == "running":
        return "it is being started: there is no journal yet"
    return "its journal is gone, so how far it got is unknown"


def _scan_errors(standing: Standing) -> None:
    standing.errors = count_errors(standing.run.output)
    standing.failed = max(sum(standing.errors.values()), standing.failed or 0)
