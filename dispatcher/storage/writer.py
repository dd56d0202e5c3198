"""The one writer of a run: batches of records into the journal, results into the output.

Everything here runs in the service's writer thread, one call at a time.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec

from dispatcher.core.buckets import COMMIT_BOUNDS_BYTES, SYNC_BOUNDS_S, Buckets
from dispatcher.core.events import (
    Event,
    Finished,
    LeaseEnded,
    Past,
    Position,
    QueueState,
    Stepped,
    StepsCut,
    Tombstoned,
)
from dispatcher.core.work_queue import QueuePolicy
from dispatcher.errors import CorruptJournalError, StateError, StorageFullError
from dispatcher.storage.files import Files
from dispatcher.storage.history import HISTORY_FILE, HistoryFile
from dispatcher.storage.journal import Journal
from dispatcher.storage.output import OrderedOutput
from dispatcher.storage.records import (
    Checkpoint,
    OutputPosition,
    RunHeader,
    encode_into,
    encode_records,
    payloads,
    split_step,
)
from dispatcher.storage.recovery import (
    Recovered,
    Retention,
    index_whole,
    recover,
)
from dispatcher.storage.step_index import StepIndex
from dispatcher.storage.waiting import (
    SegmentPlaces,
    WaitingIndex,
    places_path,
    save_places,
)

SEGMENT_BYTES = 64 << 20
SEGMENT_RESULTS = 200_000
_APPEND_ITEMS = 4096
_APPEND_BYTES = 8 << 20
_HOLD_RESULTS = frozenset((Finished, Tombstoned))
_CONCERN_STEPS = _HOLD_RESULTS | {Stepped, StepsCut, LeaseEnded}


@dataclass(slots=True)
class Batch:
    """Records to make durable together: `body` is their lines.

    Result `results[i]` of line `work_ids[i]` begins at byte `starts[i]` of the body. `step_events`
    are those that concern recorded steps, with the byte at which their record ends. `pasts` go
    into the history. `prefix` is
    the first line of the run without a result after this batch. `sync_output` asks to note how far
    the output is on disk; `state`, the queue's state after this batch, to begin a new segment.
    """

    body: bytearray = field(default_factory=bytearray)
    work_ids: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    results: list[msgspec.Raw] = field(default_factory=list)
    step_events: list[tuple[Event, int]] = field(default_factory=list)
    pasts: list[Past] = field(default_factory=list)
    prefix: int = 0
    sync_output: bool = False
    state: QueueState | None = None

    def add(self, event: Event) -> None:
        """Add an event as a record."""
        body, kind = self.body, type(event)
        encode_into(event, body, -1)
        if kind in _HOLD_RESULTS:
            work_ids, starts, results = payloads(event, len(body))
            self.work_ids += work_ids
            self.starts += starts
            self.results += results
        if kind in _CONCERN_STEPS:
            self.step_events.append((event, len(body)))
        body += b"\n"


class Owner(Protocol):
    """Knows whether the run is still this process's (storage/ownership.py)."""

    @property
    def is_confirmed(self) -> bool:
        """True while nobody else can have taken the run."""

    def confirm(self) -> None:
        """Make sure. Raises DispatcherError when it is not, or cannot be told."""


class _SoleOwner:
    is_confirmed = True

    def confirm(self) -> None:
        """There is nobody else."""


SOLE_OWNER = _SoleOwner()


class RunWriter:
    """Owns the journal and the output of one run, as long as the run is this process's.

    Any call may hang in the file system for so long that another process takes over; so nothing
    is cut, overwritten or deleted after a wait before `owner` was asked.
    """

    def __init__(
        self, journal_dir: Path, outfile: Path, files: Files, owner: Owner = SOLE_OWNER
    ) -> None:
        self._owner = owner
        self._journal_dir = journal_dir
        self._files = files
        self._journal = Journal(journal_dir, files)
        self._history = HistoryFile(journal_dir.parent / HISTORY_FILE, files)
        self.output = OrderedOutput(outfile, files)
        self._index = WaitingIndex()
        self._places = SegmentPlaces()
        self._steps = StepIndex()
        self._retention = Retention()
        self._header: RunHeader | None = None
        self._bytes_limit, self._results_limit = SEGMENT_BYTES, SEGMENT_RESULTS
        self._output_lost = False
        self.output_error: str | None = None
        self.sync_seconds = Buckets(SYNC_BOUNDS_S)
        self.commit_bytes = Buckets(COMMIT_BOUNDS_BYTES)

    @property
    def journal_bytes(self) -> int:
        """The size of the segment that is being written."""
        return self._journal.segment_bytes

    @property
    def segment_is_full(self) -> bool:
        """True when the next batch should bring the state that begins a new segment."""
        return (
            self._journal.segment_bytes > self._bytes_limit
            or len(self._places.work_ids) > self._results_limit
        )

    def read_journal(self, policy: QueuePolicy, now: float) -> Recovered | None:
        """Replay the journal into a queue, also after a failed write, to undo what it held.

        None when there is nothing of an earlier start.
        """
        recovered = recover(self._journal, policy, now, self._files)
        if recovered is None:
            return None
        self._index, self._places = recovered.index, recovered.places
        self._steps = recovered.steps
        self._retention, self._header = recovered.retention, recovered.header
        return recovered

    def begin(self, header: RunHeader, state: QueueState, recovered: Recovered | None) -> None:
        """Cut the output to where its last positions say, and start this epoch's segment.

        Raises StateError, and then nothing was changed, when the output or a result is missing.
        """
        positions = self._retention.newest_first()
        chosen = self.output.open(positions)
        if recovered is not None:
            if chosen is not positions[0]:
                index_whole(self._journal, recovered)
            self._check_nothing_is_missing(recovered, chosen.lines if chosen is not None else 0)
        self._owner.confirm()
        self.output.cut(chosen)
        if recovered is not None:
            self._save_places(self.output.written)
        self._retention.positions = [self.output.position]
        self._begin_segment(header, state)

    def write(self, batch: Batch) -> None:
        """Make a batch durable, then carry on with the output.

        Raises StorageFullError when the batch is not in the journal and nothing was changed,
        SyncFailedError when the process must end.
        """
        position = self._sync_output() if batch.sync_output else None
        if position is not None:
            encode_into(position, batch.body, -1)
            batch.body += b"\n"
        offsets: list[int] = []
        if batch.body:
            began = time.perf_counter()
            start = self._journal.append(batch.body)
            self.sync_seconds.observe(time.perf_counter() - began)
            self.commit_bytes.observe(len(batch.body))
            offsets = self._note_results(batch, start)
            for event, end in batch.step_events:
                self._steps.note(event, self._journal.current_segment, start + end)
        if batch.pasts:
            with contextlib.suppress(OSError):  # nothing depends on it
                self._history.append(batch.pasts)
        if position is not None:
            self._retention.note_position(position)
        if not self._owner.is_confirmed:
            # The output may be another one's by now; it goes on once that is settled.
            self._note_waiting(batch, offsets)
            return
        self._append_output(batch.prefix, dict(zip(batch.work_ids, batch.results, strict=True)))
        self._note_waiting(batch, offsets)
        if batch.state is not None:
            self._rotate(batch.state)
        if position is not None:
            self._drop_unneeded()

    def read_steps(self, work_ids: Iterable[int]) -> dict[int, dict[Position, tuple[str, bytes]]]:
        """Return what is recorded for these items: hash and answer by position.

        Raises OSError or CorruptJournalError when the journal cannot be read.
        """
        return {
            work_id: {
                position: split_step(self._journal.read(place))
                for position, place in self._steps.of(work_id).items()
            }
            for work_id in work_ids
        }

    def find_waiting(self, work_id: int) -> tuple[Path, int, int] | None:
        """Return where a result is that is not in the output yet: file, offset, length.

        The file goes when it is needed no more, which is when the result is in the output.
        """
        place = self._index.get(work_id)
        segment = self._journal.find_segment(place.segment) if place is not None else None
        if place is None or segment is None:
            return None
        return segment.path, place.offset, place.length

    def finish_output(self) -> int:
        """Return the output's size once all of it is on disk, under its name.

        Raises StateError when it is not there: the journal must stay then.
        """
        self.output.sync()
        if not self.output.is_in_place:
            raise StateError(self._note_lost_output())
        self._files.sync_dir(self.output.path.parent)
        self._owner.confirm()
        return self.output.size_bytes

    def remove_journal(self) -> None:
        """Delete all segments; the run is complete and run.yaml says so."""
        self._owner.confirm()
        self._journal.close()
        for name in self._files.names(self._journal_dir):
            self._files.unlink(self._journal_dir / name)

    def close(self) -> None:
        """Close all files."""
        self._journal.close()
        self._history.close()
        self.output.close()

    # ---------------------------------------------------------------- inside: results

    def _note_results(self, batch: Batch, start: int) -> list[int]:
        """Remember what the segment holds now; return where each result of the batch is in it."""
        offsets = [start + place for place in batch.starts]
        if offsets:
            lengths = [len(result) for result in batch.results]
            self._places.extend(batch.work_ids, offsets, lengths)
            self._retention.note_result(self._journal.current_segment, self._places.last_work_id)
        return offsets

    def _note_waiting(self, batch: Batch, offsets: list[int]) -> None:
        """Index the results that could not be written yet."""
        written = self.output.written
        if max(batch.work_ids, default=-1) < written:
            return
        waiting = [n for n, work_id in enumerate(batch.work_ids) if work_id >= written]
        self._index.set_all(
            self._journal.current_segment,
            [batch.work_ids[n] for n in waiting],
            [offsets[n] for n in waiting],
            [len(batch.results[n]) for n in waiting],
        )

    def _append_output(self, prefix: int, fresh: dict[int, msgspec.Raw]) -> None:
        """Write the next results of the prefix; the rest follows with the next batches."""
        first = self.output.written
        if self._output_lost or first >= prefix:
            return
        results: list[bytes] = []
        size = 0
        try:
            for work_id in range(first, min(prefix, first + _APPEND_ITEMS)):
                result = fresh.get(work_id) or self._read(work_id)
                results.append(result)
                size += len(result)
                if size > _APPEND_BYTES:
                    break
        except OSError as error:
            self.output_error = (
                f"cannot read back a result from {error.filename or self._journal_dir}: "
                f"{error.strerror}; mend that, and the output goes on by itself"
            )
        if not results:
            return
        try:
            self.output.append(results)
            self.output_error = None
        except OSError as error:
            # The results are safe in the journal; the output goes on when there is room again.
            self.output_error = (
                f"cannot write {self.output.path}: {error.strerror}; mend that, and the output "
                "goes on by itself (results are kept meanwhile)"
            )

    def _read(self, work_id: int) -> bytes:
        location = self._index.get(work_id)
        if location is None:
            raise self._missing(work_id)
        return self._journal.read(location)

    def _check_nothing_is_missing(self, recovered: Recovered, written: int) -> None:
        """Raise CorruptJournalError when a line is finished but its result is nowhere."""
        queue = recovered.queue
        if queue.finished_from(written) > self._index.count_from(written):
            finished = (n for n in range(written, queue.next_work_id) if n not in queue.items)
            raise self._missing(next(n for n in finished if self._index.get(n) is None))

    def _missing(self, work_id: int) -> CorruptJournalError:
        return CorruptJournalError(
            f"the result of line {work_id} is in no segment of {self._journal_dir}: one is "
            "missing; restore it from a backup, or start a new run with another --state and "
            "output"
        )

    # ---------------------------------------------------------------- inside: segments

    def _sync_output(self) -> OutputPosition | None:
        """Return how far the output is on disk; None when it is not where it should be."""
        self._output_lost = not self.output.is_in_place
        if self._output_lost:
            self.output_error = self._note_lost_output()
            return None
        self.output.sync()
        return self.output.position

    def _note_lost_output(self) -> str:
        return (
            f"the output {self.output.path} was removed or replaced while the run was writing "
            "it; put the file back where it was (results are kept meanwhile)"
        )

    def _rotate(self, state: QueueState) -> None:
        assert self._header is not None
        try:
            self._save_places(self._retention.positions[-1].lines)
            self._begin_segment(self._header, state)
        except StorageFullError:
            # The old segment grows until there is room for a new one.
            self._bytes_limit += SEGMENT_BYTES // 8
            self._results_limit += SEGMENT_RESULTS // 8

    def _save_places(self, first_waiting: int) -> None:
        number = self._journal.current_segment
        path = self._journal.segment(number).path
        size = self._journal.segment_bytes
        with contextlib.suppress(OSError):  # it only spares a restart the reading
            save_places(path, self._places, first_waiting, size, self._files)

    def _begin_segment(self, header: RunHeader, state: QueueState) -> None:
        checkpoint = Checkpoint(state, self._retention.positions, self._steps.places())
        self._journal.begin_segment(header.epoch, encode_records(header, checkpoint))
        self._header, self._places = header, SegmentPlaces()
        self._bytes_limit = self._journal.segment_bytes + SEGMENT_BYTES
        self._results_limit = SEGMENT_RESULTS

    def _drop_unneeded(self) -> None:
        current = self._journal.current_segment
        needed = min(self._retention.first_needed(current), self._steps.first_needed(current))
        for segment in self._journal.drop_before(needed):
            self._files.unlink(places_path(segment.path))
        self._index.forget_before(self._retention.safe_lines)
