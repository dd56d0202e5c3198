"""The one writer of a run: journal first, then output. Runs in its own thread.

A batch is everything that queued while the batch before it was being written. `write` returns
when its records are on disk; only then may anybody be told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dispatcher.core.events import QueueState
from dispatcher.core.work_queue import QueuePolicy
from dispatcher.errors import StorageFullError
from dispatcher.storage.files import Files
from dispatcher.storage.journal import (
    SEGMENT_BYTES,
    Checkpoint,
    Journal,
    Location,
    RunHeader,
    encode_record,
)
from dispatcher.storage.output import OrderedOutput, WaitingIndex
from dispatcher.storage.recovery import Recovered, Retention, recover

_APPEND_ITEMS = 4096
_APPEND_BYTES = 8 << 20


@dataclass(slots=True)
class Batch:
    """Records to make durable together, and the results among them by work id.

    `prefix` is the first line of the run without a result after this batch; with `state`, the
    queue's state at that point, a checkpoint is due.
    """

    records: list[bytes] = field(default_factory=list)
    results: list[tuple[int, int, bytes]] = field(default_factory=list)
    prefix: int = 0
    state: QueueState | None = None

    def add(self, record: bytes) -> None:
        """Add a record without a result."""
        self.records.append(record)

    def add_result(self, record: bytes, work_id: int, result: bytes) -> None:
        """Add a record that ends with a result."""
        self.results.append((len(self.records), work_id, result))
        self.records.append(record)


class RunWriter:
    """Owns the journal and the output of one run."""

    def __init__(self, journal_dir: Path, outfile: Path, files: Files) -> None:
        self._journal_dir = journal_dir
        self._files = files
        self._journal = Journal(journal_dir, files)
        self.output = OrderedOutput(outfile, files)
        self._index = WaitingIndex()
        self._retention = Retention()
        self._header: RunHeader | None = None
        self.output_error: str | None = None

    @property
    def segment_is_full(self) -> bool:
        """True when the next checkpoint will begin a new segment."""
        return self._journal.segment_bytes > SEGMENT_BYTES

    def read_journal(self, policy: QueuePolicy, now: float) -> Recovered | None:
        """Replay the journal into a queue, also after a failed write, to undo what it held.

        None when there is nothing of an earlier start.
        """
        recovered = recover(self._journal, policy, now) if not self._journal.is_empty else None
        if recovered is None:
            return None
        self._index, self._retention = recovered.index, recovered.retention
        self._header = recovered.header
        return recovered

    def begin(self, header: RunHeader, state: QueueState) -> None:
        """Open the output where the checkpoints say, and start this epoch's segment."""
        self.output.open(self._retention.newest_first())
        self._begin_segment(header, state)

    def write(self, batch: Batch) -> None:
        """Make a batch durable, then carry on with the output.

        Raises StorageFullError when the batch is not in the journal and nothing was changed,
        SyncFailedError when the process must end.
        """
        if batch.state is not None:
            self.output.sync()
            batch.add(encode_record(self._checkpoint(batch.state)))
        fresh: dict[int, bytes] = {}
        if batch.records:
            offsets = self._journal.append(batch.records)
            segment = self._journal.current_segment
            for place, work_id, result in batch.results:
                # A result ends its record, just before the closing bracket.
                at = offsets[place] + len(batch.records[place]) - 1 - len(result)
                self._index.set(work_id, Location(segment, at, len(result)))
                self._retention.note_result(segment, work_id)
                fresh[work_id] = result
        if batch.state is not None:
            self._retention.note_checkpoint(
                self._journal.current_segment, self._checkpoint(batch.state)
            )
            if self.segment_is_full:
                self._rotate(batch.state)
            self._drop_unneeded()
        self._append_output(batch.prefix, fresh.get)

    def complete(self) -> int:
        """Sync the output, and return its size: the journal is not needed any more."""
        self.output.sync()
        self._files.sync_dir(self.output.path.parent)
        return self.output.size_bytes

    def remove_journal(self) -> None:
        """Delete all segments; the run is complete and run.yaml says so."""
        self._journal.close()
        for path in self._journal_dir.iterdir():
            self._files.unlink(path)

    def close(self) -> None:
        """Close all files."""
        self._journal.close()
        self.output.close()

    # ---------------------------------------------------------------- inside

    def _append_output(self, prefix: int, fresh: Callable[[int], bytes | None]) -> None:
        """Write the next results of the prefix; the rest follows with the next batches."""
        results: list[bytes] = []
        size = 0
        for work_id in range(self.output.written, min(prefix, self.output.written + _APPEND_ITEMS)):
            result = fresh(work_id) or self._read(work_id)
            results.append(result)
            size += len(result)
            if size > _APPEND_BYTES:
                break
        if not results:
            return
        try:
            self.output.append(results)
            self.output_error = None
        except OSError as error:
            # The results are safe in the journal; the output goes on when there is room again.
            self.output_error = f"cannot write {self.output.path}: {error.strerror}"

    def _read(self, work_id: int) -> bytes:
        location = self._index.get(work_id)
        if location is None:
            raise AssertionError(f"the result of item {work_id} is in no segment")
        return self._journal.read(location)

    def _checkpoint(self, state: QueueState) -> Checkpoint:
        output = self.output
        return Checkpoint(state, output.written, output.size_bytes, output.tail_crc)

    def _begin_segment(self, header: RunHeader, state: QueueState) -> None:
        checkpoint = self._checkpoint(state)
        records: list[Any] = [header, checkpoint]
        self._journal.begin_segment(header.epoch, [encode_record(r) for r in records])
        self._header = header
        self._retention.note_checkpoint(self._journal.current_segment, checkpoint)

    def _rotate(self, state: QueueState) -> None:
        assert self._header is not None
        try:
            self._begin_segment(self._header, state)
        except StorageFullError:
            return  # the old segment grows until there is room for a new one

    def _drop_unneeded(self) -> None:
        self._journal.drop_before(self._retention.first_needed())
        oldest = self._retention.checkpoints[0][1]
        self._index.forget_before(oldest.written)
