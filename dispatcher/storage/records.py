"""What the journal's lines hold, as values: the events of the queue, and four of storage's own.

Records are msgspec structs encoded as tagged JSON arrays. A result stands last in its record, as
the worker's own bytes, so that it can be copied from the journal to the output without a decoder.
"""

from __future__ import annotations

import itertools
from typing import Any

import msgspec

from dispatcher.core.events import (
    Absolved,
    FailureLimitSet,
    FailuresAccepted,
    FailuresPaused,
    Finished,
    Issued,
    IssuedFresh,
    Joined,
    LeaseEnded,
    Left,
    Opened,
    OperatorPaused,
    OperatorResumed,
    Position,
    QueueState,
    StartHeard,
    Stepped,
    StepsCut,
    Tombstoned,
    Watched,
)


class RunHeader(msgspec.Struct, frozen=True, array_like=True, tag="run"):
    """Which run this journal belongs to, and which server start wrote the segment."""

    run_id: str
    epoch: int
    fingerprint: dict[str, Any]
    settings: dict[str, Any]


class OutputPosition(msgspec.Struct, frozen=True, array_like=True, tag="output"):
    """How far the output was on disk: its first `lines` lines fill it up to `size_bytes`.

    `tail_crc` is the checksum of the last bytes before that.
    """

    lines: int
    size_bytes: int
    tail_crc: int


class StepPlace(msgspec.Struct, frozen=True, array_like=True):
    """Where the answer of a recorded step stands in the journal."""

    work_id: int
    position: Position
    segment: int
    offset: int
    length: int


class Checkpoint(msgspec.Struct, frozen=True, array_like=True, tag="checkpoint"):
    """The state where a segment begins: of the queue, of the output, of the recorded steps."""

    queue: QueueState
    positions: list[OutputPosition]
    steps: list[StepPlace] = []


Record = (
    RunHeader
    | Checkpoint
    | OutputPosition
    | Opened
    | Issued
    | IssuedFresh
    | Watched
    | Finished
    | Tombstoned
    | LeaseEnded
    | Stepped
    | StepsCut
    | Absolved
    | FailureLimitSet
    | FailuresAccepted
    | FailuresPaused
    | OperatorPaused
    | OperatorResumed
    | StartHeard
    | Joined
    | Left
)
_encoder = msgspec.json.Encoder()
encode_into = _encoder.encode_into
decode_record = msgspec.json.Decoder(Record).decode


def encode_records(*records: Record) -> bytes:
    """Return records as the body of a frame: a line each."""
    return _encoder.encode_lines(records)


class Location(msgspec.Struct, frozen=True, gc=False):
    """Where bytes stand in the journal."""

    segment: int
    offset: int
    length: int


def payloads(record: Record, end: int) -> tuple[list[int], list[int], list[msgspec.Raw]]:
    """Return the results in a record that ends at byte `end`: whose, where they begin, and they.

    They stand last in it, one behind the other with a comma between, before its closing brackets.
    """
    if type(record) is Finished:
        # All the places where one begins, and where the next one would.
        steps = [len(result) + 1 for result in record.results]
        first = end - len("]]") - sum(steps) + 1
        offsets = [*itertools.accumulate(steps, initial=first)]
        offsets.pop()
        return record.work_ids, offsets, record.results
    if type(record) is Tombstoned:
        return [record.work_id], [end - len("]") - len(record.result)], [record.result]
    return [], [], []


def step_place(event: Stepped, end: int) -> tuple[int, int]:
    """Return where hash and answer stand in a record that ends at byte `end`: begin and length.

    They are read back together, so that an answer never gets the hash of another request.
    """
    length = len(f'"{event.hash}",') + len(bytes(event.response))
    return end - len("]") - length, length


def split_step(stored: bytes) -> tuple[str, bytes]:
    """Return hash and answer from the bytes at a step's place."""
    _, request_hash, rest = stored.split(b'"', 2)
    return request_hash.decode(), rest[1:]
