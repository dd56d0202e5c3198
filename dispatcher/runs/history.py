"""What one line of the input went through: its attempts, its workers, its steps, its result."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from dispatcher.core.events import (
    Absolved,
    Ended,
    Finished,
    Issued,
    IssuedFresh,
    ItemState,
    LeaseEnded,
    Opened,
    QueueState,
    Stepped,
    StepsCut,
    Tombstoned,
)
from dispatcher.core.results import error_kind
from dispatcher.core.work_queue import VANISHED, WorkQueue
from dispatcher.errors import DispatcherError, UsageError
from dispatcher.runs.found import FoundRun, number
from dispatcher.runs.lines import LineReader
from dispatcher.runs.reading import patiently, policy_of, read_records
from dispatcher.storage.history import HISTORY_FILE
from dispatcher.storage.records import Checkpoint, Record, RunHeader

_SHOWN_BYTES = 400


@dataclass(slots=True)
class Try:
    """One time that the line was handed out.

    `attempt` is 0 where it is not known. `end` is how it ended: a kind of EndKind, `result`,
    `in vain` (another one's result came first), or None while it goes on. `steps` were recorded
    in it; `taken_back` says that its crash was none.
    """

    attempt: int
    worker: str
    end: str | None = None
    reason: str = ""
    solo: bool = False
    steps: int = 0
    taken_back: bool = False
    serial: int = 0


@dataclass(slots=True)
class ItemHistory:
    """What is known of a line.

    `where` says in words how it stands; `result` is the beginning of its line of output and
    `result_bytes` its length. `source` names what told the attempts, and `missing` what it
    cannot tell.
    """

    work_id: int
    where: str = ""
    source: str = ""
    missing: str = ""
    tries: list[Try] = field(default_factory=list)
    recorded_steps: int = 0
    error: str = ""
    result: str | None = None
    result_bytes: int = 0


def item_history(run: FoundRun, work_id: int) -> ItemHistory:
    """Return what became of line `work_id`, changing nothing.

    Raises UsageError when there is no such line, StorageError or CorruptJournalError when what
    tells of it cannot be read.
    """
    followed = None
    if not run.is_complete:
        followed = patiently(functools.partial(_follow, run.state_dir, work_id))
        run = run.reread()
    history = ItemHistory(work_id)
    _show_result(history, run, followed)
    if history.result is None:
        _check_exists(run, work_id, followed)
    _tell_attempts(history, run, followed)
    return history


# -------------------------------------------------------------------- from the journal


class Follower:
    """Follows one line through the records of the journal.

    A queue of this line alone takes the events, as the queue of the whole run took them, and so
    knows the attempts as the run knew them.
    """

    def __init__(self, work_id: int) -> None:
        self.work_id = work_id
        self.tries: list[Try] = []
        self.payload: bytes | None = None
        self.began_late = False
        self.next_work_id = 0
        self.next_offset = 0
        self._header: RunHeader | None = None
        self._queue: WorkQueue | None = None

    @property
    def queue(self) -> WorkQueue:
        """The queue of this line."""
        assert self._queue is not None
        return self._queue

    @property
    def began(self) -> bool:
        """Whether there was a journal to follow."""
        return self._queue is not None

    @property
    def is_open(self) -> bool:
        """Whether the line has no result for sure."""
        return self.work_id in self.queue.items or self.work_id >= self.next_work_id

    def see(self, record: Record) -> None:
        """Take the next record."""
        match record:
            case RunHeader():
                self._header = record
            case Checkpoint():
                self._note_checkpoint(record.queue)
            case Opened():
                self.next_work_id = record.work_id + len(record.sizes)
                self.next_offset = record.offset + sum(record.sizes)
                place = self.work_id - record.work_id
                if 0 <= place < len(record.sizes):
                    self._apply(Opened(self.work_id, 0, [record.sizes[place]]))
            case Issued() if self.work_id in record.work_ids:
                self._note_issue(record)
            case IssuedFresh():
                for part in record.parts():
                    self.see(part)
            case Finished() if self.work_id in record.work_ids:
                self._note_result(record)
            case Tombstoned() if record.work_id == self.work_id:
                self.payload = bytes(record.result)
                self._end_others(0)
                self._apply(record)
            case LeaseEnded() if record.work_id == self.work_id:
                self._note_end(record)
            case Stepped() if record.work_id == self.work_id:
                if found := self._find(record.serial):
                    found.steps += 1
                self._apply(record)
            case StepsCut() if record.work_id == self.work_id:
                self._apply(record)
            case Absolved() if record.work_id == self.work_id:
                self._note_absolution(record.worker)
                self._apply(record)
            case _:
                pass

    def _note_checkpoint(self, state: QueueState) -> None:
        self.next_work_id, self.next_offset = state.next_work_id, state.next_offset
        if self._queue is not None:
            return  # what came before is known
        assert self._header is not None
        line = self.work_id
        item = next((item for item in state.items if item.work_id == line), None)
        known = line < state.next_work_id
        self._queue = WorkQueue(policy_of(self._header))
        self._queue.restore(
            QueueState(
                first_open=line,
                next_work_id=line + known,
                next_offset=0,
                next_serial=1,
                counters=state.counters,
                items=[item] if item is not None else [],
                tombstoned=[line] if known and item is None else [],
            ),
            0.0,
        )
        if item is not None:
            self._note_before(item)
        self.began_late = known

    def _note_before(self, item: ItemState) -> None:
        """Take over what the oldest checkpoint tells; of what cost nothing it tells no more."""
        self.tries += [_try_of(ended) for ended in item.history]
        self.tries += [
            Try(item.attempt, lease.worker, solo=lease.solo, serial=lease.serial)
            for lease in item.leases
        ]

    def _note_issue(self, event: Issued) -> None:
        serial = event.serial + event.work_ids.index(self.work_id)
        self._apply(Issued(event.worker, event.heartbeats, event.solo, serial, [self.work_id]))
        before = self._find(serial)
        if before is not None:  # its worker had only been cut off, and keeps it
            before.end, before.reason = None, ""
            return
        item = self.queue.items.get(self.work_id)
        attempt = item.attempt if item is not None else 0
        self.tries.append(Try(attempt, event.worker, solo=event.solo, serial=serial))

    def _note_result(self, event: Finished) -> None:
        place = event.work_ids.index(self.work_id)
        serial, result = event.serials[place], event.results[place]
        self.payload = bytes(result)
        errors = {kind: [self.work_id] for kind, ids in event.errors.items() if self.work_id in ids}
        self._apply(Finished([self.work_id], [serial], errors, [result]))
        found = self._find(serial) if serial else self._only_live()
        if found is not None:
            late = f"after it had ended ({found.end})" if found.end is not None else ""
            found.end, found.reason = "result", late
        self._end_others(found.serial if found is not None else 0)

    def _note_end(self, event: LeaseEnded) -> None:
        if found := self._find(event.serial):
            found.end, found.reason = event.kind, event.reason
        self._apply(event)

    def _note_absolution(self, worker: str) -> None:
        for found in reversed(self.tries):
            if (found.worker, found.end, found.reason) == (worker, "crashed", VANISHED):
                found.taken_back = True
                return

    def _end_others(self, serial: int) -> None:
        for other in self.tries:
            if other.end is None and other.serial != serial:
                other.end = "in vain"

    def _find(self, serial: int) -> Try | None:
        return next((t for t in self.tries if serial and t.serial == serial), None)

    def _only_live(self) -> Try | None:
        """Return whose result it is when the client named no lease."""
        live = [found for found in self.tries if found.end is None]
        return live[0] if len(live) == 1 else None

    def _apply(self, event: Any) -> None:
        self.queue.apply(event, 0.0)


def _follow(state_dir: Path, work_id: int) -> Follower | None:
    """Follow a line through all segments; None when there is no journal."""
    follower = Follower(work_id)
    for record in read_records(state_dir):
        follower.see(record)
    return follower if follower.began else None


def _try_of(ended: Ended) -> Try:
    return Try(ended.attempt, ended.worker, ended.kind, ended.reason, ended.solo)


# -------------------------------------------------------------------- from what stays


class _SavedLine(msgspec.Struct):
    """A line of history.jsonl; `worker` had the line when `outcome` came."""

    work_id: int
    outcome: str = ""
    worker: str = ""
    attempts: list[dict[str, Any]] = []


def _tell_attempts(history: ItemHistory, run: FoundRun, followed: Follower | None) -> None:
    """Fill in the attempts from what tells most of them."""
    if followed is not None and followed.tries:
        history.source, history.tries = "the journal", followed.tries
        history.recorded_steps = len(followed.queue.steps.of(history.work_id))
        if followed.began_late:
            history.missing = "attempts that cost nothing, before the journal's oldest segment"
        return
    if tries := _saved_tries(run, history.work_id):
        history.source, history.tries = HISTORY_FILE, tries
        history.missing = "attempts that cost nothing, and steps"
    elif history.error and (tries := _tries_in_result(run, history.work_id)):
        history.source, history.tries = "the output", tries
        history.missing = "attempts that cost nothing, and steps"
    elif history.result is not None:
        history.missing = (
            "nothing tells of an attempt that failed; the journal, which tells of all, is "
            "deleted once its lines are safe in the output"
        )


def _saved_tries(run: FoundRun, work_id: int) -> list[Try]:
    path = run.state_dir / HISTORY_FILE
    if not path.exists():
        return []
    tries: list[Try] = []
    with LineReader(path) as reader:
        while first := reader.begin():
            # A line half written when its process died is not JSON.
            saved = _decode_saved(reader.whole(first)) if b"%d" % work_id in first else None
            if saved is not None and saved.work_id == work_id:
                tries = _tries_of(saved.attempts)  # a later line knows what an earlier one knew
                if saved.outcome == "ok" or saved.worker:
                    last = max((found.attempt for found in tries), default=0)
                    tries.append(Try(last + 1, saved.worker, "result"))
    return tries


def _decode_saved(line: bytes) -> _SavedLine | None:
    try:
        return msgspec.json.decode(line, type=_SavedLine)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _tries_in_result(run: FoundRun, work_id: int) -> list[Try]:
    """Return the attempts that a tombstone names."""
    with LineReader(run.output) as reader:
        reader.skip(work_id)
        line = reader.whole(reader.begin())
    if not error_kind(line):
        return []
    try:
        error = msgspec.json.decode(line)["__ERROR__"]
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError):
        return []
    attempts = error.get("attempts") if isinstance(error, dict) else None
    return _tries_of(attempts) if isinstance(attempts, list) else []


def _tries_of(attempts: list[Any]) -> list[Try]:
    return [
        Try(
            number(a.get("attempt")),
            str(a.get("worker", "")),
            str(a.get("kind", "")),
            str(a.get("reason", "")),
            bool(a.get("solo")),
        )
        for a in attempts
        if isinstance(a, dict)
    ]


# -------------------------------------------------------------------- its result


def _show_result(history: ItemHistory, run: FoundRun, followed: Follower | None) -> None:
    """Fill in where the line stands, and the beginning of its result."""
    is_open = followed is not None and followed.is_open
    line, size = (None, 0) if is_open else _output_line(run, history.work_id)
    if line is not None:
        history.where = f"its result is line {history.work_id + 1} of {run.output}"
    elif followed is not None and followed.payload is not None:
        line, size = followed.payload, len(followed.payload)
        history.where = "its result is in the journal and waits for those of earlier lines"
    elif followed is not None:
        history.where = _where_open(followed)
    if line is not None:
        history.error = error_kind(line)
        history.result = line[:_SHOWN_BYTES].decode("utf-8", "replace")
        history.result_bytes = size


def _output_line(run: FoundRun, work_id: int) -> tuple[bytes | None, int]:
    """Return the beginning of a whole line of the output, and its length."""
    try:
        with LineReader(run.output) as reader:
            reader.skip(work_id)
            first = reader.begin()
            size = len(first) + sum(len(piece) for piece in reader.rest())
            if reader.lines > work_id:
                return first.removesuffix(b"\n"), size - 1
    except DispatcherError:
        if run.is_complete:
            raise  # before, there need not be an output
    return None, 0


def _where_open(followed: Follower) -> str:
    item = followed.queue.items.get(followed.work_id)
    if item is None:
        waits = followed.work_id < followed.next_work_id
        return "it has its result, which is being written" if waits else "it was not handed out yet"
    if item.leases:
        holders = ", ".join(lease.worker or "a worker without a name" for lease in item.leases)
        return f"it is with {holders}"
    return "it ran out of reissues" if item.condemned else "it waits to be handed out"


def _check_exists(run: FoundRun, work_id: int, followed: Follower | None) -> None:
    """Raise UsageError when the input has no such line."""
    if run.is_complete:
        total = number(run.summary.get("done"))
    elif followed is None or work_id < followed.next_work_id:
        return
    else:
        with LineReader(run.input) as reader:
            reader.start_at(followed.next_offset)
            reader.skip(work_id - followed.next_work_id)
            if reader.begin():
                return
            total = followed.next_work_id + reader.lines + reader.ends_open
        if run.is_copied_in_part:
            raise UsageError(
                f"--item {work_id}: of the input of the run in {run.state_dir} {total} lines were "
                "copied so far; ask again later"
            )
    raise UsageError(
        f"--item {work_id}: the input of the run in {run.state_dir} has {total} lines"
        + (f", numbered 0 to {total - 1}" if total else "")
    )
