"""From the journal on disk back to the state of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from dispatcher.core.work_queue import QueuePolicy, WorkQueue
from dispatcher.errors import CorruptJournalError
from dispatcher.storage.files import Files
from dispatcher.storage.journal import Entry, Journal
from dispatcher.storage.records import Checkpoint, OutputPosition, RunHeader, payloads
from dispatcher.storage.step_index import StepIndex
from dispatcher.storage.waiting import SegmentPlaces, WaitingIndex, load_places

_POSITIONS_KEPT = 2


@dataclass(slots=True)
class Retention:
    """Which segments are still needed: the last one, and those with a result not safely written.

    Safely written is what stood in the output at the older of its last two positions.
    """

    positions: list[OutputPosition] = field(default_factory=list)
    last_result: dict[int, int] = field(default_factory=dict)

    def note_result(self, segment: int, work_id: int) -> None:
        """A result stands in this segment."""
        self.last_result[segment] = max(work_id, self.last_result.get(segment, -1))

    def note_position(self, position: OutputPosition) -> None:
        """The output is on disk up to here."""
        self.positions = [*self.positions, position][-_POSITIONS_KEPT:]

    @property
    def safe_lines(self) -> int:
        """How many lines no restart will need from the journal again."""
        return self.positions[0].lines if self.positions else 0

    def first_needed(self, current: int) -> int:
        """Return the oldest segment that must stay; `current` is the one being written."""
        holding = [s for s, last in self.last_result.items() if last >= self.safe_lines]
        needed = min([current, *holding])
        self.last_result = {s: last for s, last in self.last_result.items() if s >= needed}
        return needed

    def newest_first(self) -> list[OutputPosition]:
        """Return the last positions of the output, the newest one first."""
        return self.positions[::-1]


@dataclass(slots=True)
class Recovered:
    """What a journal says about its run; `places` are those of the last segment."""

    queue: WorkQueue
    index: WaitingIndex
    places: SegmentPlaces
    steps: StepIndex
    retention: Retention
    header: RunHeader


def recover(journal: Journal, policy: QueuePolicy, now: float, files: Files) -> Recovered | None:
    """Replay the last segment; None when the first start died before its first frame was whole.

    Raises CorruptJournalError when the journal is damaged or does not hold a run.
    """
    queue = WorkQueue(policy)
    places = SegmentPlaces()
    steps = StepIndex()
    retention = Retention()
    header: RunHeader | None = None
    begun = False
    for entry in journal.replay_last():
        record = entry.record
        if isinstance(record, RunHeader):
            header = record
        elif isinstance(record, Checkpoint):
            queue.restore(record.queue, now)
            retention.positions = list(record.positions)
            steps = StepIndex(record.steps)
            begun = True
        elif isinstance(record, OutputPosition):
            retention.note_position(record)
        elif begun:
            queue.apply(record, now)
            steps.note(record, journal.current_segment, entry.end)
            _note_places(entry, places)
    if journal.is_empty:
        return None
    if header is None or not begun:
        raise CorruptJournalError(
            "the journal holds no run; remove the state directory and the output to start anew"
        )
    index = WaitingIndex(retention.safe_lines)
    _index_older_segments(journal, index, retention, files)
    places.enter(index, journal.current_segment)
    retention.note_result(journal.current_segment, places.last_work_id)
    queue.begin_again(now)
    return Recovered(queue, index, places, steps, retention, header)


def index_whole(journal: Journal, recovered: Recovered) -> None:
    """Find every result in the older segments, also those that did not have to wait.

    Needed when the output had to be taken back to a position before the last one.
    """
    for segment in journal.older_segments:
        read_places(journal, segment.number).enter(recovered.index, segment.number)
    recovered.places.enter(recovered.index, journal.current_segment)


def read_places(journal: Journal, number: int) -> SegmentPlaces:
    """Read an older segment for the places of its results."""
    places = SegmentPlaces()
    for entry in journal.scan(number):
        _note_places(entry, places)
    return places


def _note_places(entry: Entry, places: SegmentPlaces) -> None:
    work_ids, offsets, results = payloads(entry.record, entry.end)
    if results:
        places.extend(work_ids, offsets, [len(result) for result in results])


def _index_older_segments(
    journal: Journal, index: WaitingIndex, retention: Retention, files: Files
) -> None:
    # The output will go on from its last position, if it reaches that far.
    first_needed = retention.positions[-1].lines if retention.positions else 0
    for segment in journal.older_segments:
        size = journal.size_of(segment.number)
        places = load_places(segment.path, first_needed, size, files)
        if places is None:
            places = read_places(journal, segment.number)
        places.enter(index, segment.number)
        retention.note_result(segment.number, places.last_work_id)
