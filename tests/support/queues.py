"""What tests of the work queue, and of storage below it, hand in and get."""

from __future__ import annotations

import msgspec

from dispatcher.core.work_queue import Arrivals, Grant, WorkQueue, lease_id


def arrivals(*rows: tuple[int, int | None, bytes, str]) -> Arrivals:
    """Return results (work id, serial, line, kind of its error) as the queue takes them."""
    return Arrivals(
        [work_id for work_id, *_ in rows],
        [serial for _, serial, *_ in rows],
        [msgspec.Raw(result) for _, _, result, _ in rows],
        [kind for *_, kind in rows],
    )


def lease_fresh(queue: WorkQueue, worker: str, sizes: list[int], now: float) -> list[Grant]:
    """Have the queue read and lease the next lines, and return them as it returns others."""
    offset = queue.next_offset
    first, serial = queue.lease_fresh(worker, offset, sizes, now)
    grants = []
    for place, size in enumerate(sizes):
        lease = lease_id(first + place, serial + place)
        grants.append(Grant(first + place, lease, offset, size, 0, 1, False, 0))
        offset += size
    return grants
