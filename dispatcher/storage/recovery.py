"""From the journal on disk back to the state of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from dispatcher.core.events import Finished, Tombstoned
from dispatcher.core.work_queue import QueuePolicy, WorkQueue
from dispatcher.errors import CorruptJournalError
from dispatcher.storage.journal import Checkpoint, Entry, Journal, RunHeader
from dispatcher.storage.output import WaitingIndex


@dataclass(slots=True)
class Retention:
    """Which segments are still needed: by the last two checkpoints, or by a waiting result."""

    checkpoints: list[tuple[int, Checkpoint]] = field(default_factory=list)
    last_result: dict[int, int] = field(default_factory=dict)

    def note_result(self, segment: int, work_id: int) -> None:
        """A result stands in this segment."""
        self.last_result[segment] = max(work_id, self.last_result.get(segment, -1))

    def note_checkpoint(self, segment: int, checkpoint: Checkpoint) -> None:
        """A checkpoint stands in this segment."""
        self.checkpoints = [*self.checkpoints[-1:], (segment, checkpoint)]

    def first_needed(self) -> int:
        """Return the oldest segment that must stay."""
        segment, older = self.checkpoints[0]
        holding = [s for s, last in self.last_result.items() if last >= older.written]
        needed = min([segment, *holding])
        self.last_result = {s: last for s, last in self.last_result.items() if s >= needed}
        return needed

    def newest_first(self) -> list[Checkpoint]:
        """Return the last two checkpoints, the last one first."""
        return [checkpoint for _, checkpoint in reversed(self.checkpoints)]


@dataclass(slots=True)
class Recovered:
    """What a journal says about its run."""

    queue: WorkQueue
    index: WaitingIndex
    retention: Retention
    header: RunHeader


def recover(journal: Journal, policy: QueuePolicy, now: float) -> Recovered | None:
    """Replay the journal; None when the first start died before its first frame was whole.

    Raises CorruptJournalError when it does not hold a run.
    """
    queue = WorkQueue(policy)
    index = WaitingIndex()
    retention = Retention()
    header: RunHeader | None = None
    begun = False
    for entry in journal.replay():
        record = entry.record
        if isinstance(record, RunHeader):
            header = record
        elif isinstance(record, Checkpoint):
            if not begun:
                # The state before the oldest segment; from here on the events tell it.
                queue.restore(record.queue, now)
                index = WaitingIndex(min(record.written, record.queue.first_open))
                begun = True
            retention.note_checkpoint(entry.segment, record)
        elif begun:
            queue.apply(record, now)
            _locate(entry, index, retention)
    if journal.is_empty:
        return None
    if header is None or not begun:
        raise CorruptJournalError(
            "the journal holds no run; remove the state directory and the output to start anew"
        )
    queue.begin_again(now)
    return Recovered(queue, index, retention, header)


def _locate(entry: Entry, index: WaitingIndex, retention: Retention) -> None:
    record = entry.record
    if isinstance(record, Finished | Tombstoned) and entry.payload is not None:
        index.set(record.work_id, entry.payload)
        retention.note_result(entry.segment, record.work_id)
