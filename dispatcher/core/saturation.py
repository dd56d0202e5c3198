"""How many requests keep an engine busy that tells its own state: `--workers auto`.

An engine with continuous batching gets faster with every request until its batch or its KV cache
is full; those above that wait in its queue. So the limit doubles while nothing waits there, and
then keeps a small queue, from which the engine fills each place in the batch at once. A little
too much costs nothing, too little costs throughput: growth is quick and shrinking slow.

Only a standing queue is cut, as in CoDel (K. Nichols, V. Jacobson, "Controlling Queue Delay",
2012): the shortest that was seen for some seconds. A longer one may just be a burst of prompts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_FULL_KV = 0.95
_LEAST_QUEUE = 4
_QUEUE_SHARE = 8  # the queue is this part of the batch: so many may end in one step
_STANDING_S = 5.0
# An engine that preempts computes those requests twice. What a change does to its KV cache shows
# when requests have ended, and the new ones have got longer.
_PREEMPTED = 0.95
_STEP_SHARE = 64
_CARE_S = 5.0
_FORGET_S = 60.0
_ROOMY_KV = 0.5


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine says of itself: requests in its batch and in its queue.

    `kv_usage` is the used share of its KV cache, None when it does not tell; `preemptions` counts
    since its start.
    """

    running: int
    waiting: int
    kv_usage: float | None = None
    preemptions: int = 0


class Saturation:
    """Follows one engine, sample by sample; `limit` requests may be in flight at it.

    The limit begins at `first` and stays between 1 and `most`.
    """

    def __init__(self, first: int = 16, most: int = 4096) -> None:
        self._most = max(1, most)
        self.limit = min(max(1, first), self._most)
        self._preemptions: int | None = None
        # From here on growth is careful: the KV cache was too small once. None: not known.
        self._careful_from: int | None = None
        self._changed_at = -math.inf  # with care
        self._preempted_at = -math.inf
        self._long_since: float | None = None
        self._shortest = 0

    def sample(self, load: EngineLoad, in_flight: int, now: float) -> int:
        """Take in the engine's state while `in_flight` requests of ours are at it, at time `now`
        in seconds; return the new limit.
        """
        queue = max(_LEAST_QUEUE, load.running // _QUEUE_SHARE)
        excess = self._standing_excess(load.waiting, queue, now)
        if now - self._preempted_at > _FORGET_S and (load.kv_usage or 1.0) < _ROOMY_KV:
            self._careful_from = None  # the requests have become smaller
        if self._has_preempted(load):
            self._preempted_at = now
            limit = self._relieved(load.running, now)
        elif excess and in_flight > queue:
            # Not from the limit: requests that are above an earlier cut may still be in flight. And
            # not below the queue: what stands there beside so few is another worker's.
            limit = min(self.limit, max(queue, in_flight - excess))
        elif load.waiting < queue and self._may_grow(load, in_flight):
            limit = self._grown(load, queue, now)
        else:
            limit = self.limit
        self.limit = min(max(1, limit), self._most)
        return self.limit

    def _standing_excess(self, waiting: int, queue: int, now: float) -> int:
        """Return by how much the queue was too long all the last seconds."""
        if waiting <= 2 * queue:
            self._long_since = None
            return 0
        if self._long_since is None:
            self._long_since, self._shortest = now, waiting
        self._shortest = min(self._shortest, waiting)
        if now - self._long_since < _STANDING_S:
            return 0
        self._long_since = None
        return max(0, self._shortest - queue)

    def _has_preempted(self, load: EngineLoad) -> bool:
        before, self._preemptions = self._preemptions, load.preemptions
        # Fewer than before: another engine, which was started in its place.
        return before is not None and load.preemptions > before

    def _relieved(self, running: int, now: float) -> int:
        """Return a limit at which the KV cache is a little less full."""
        if now - self._changed_at < _CARE_S:
            return self.limit
        self._changed_at = now
        # What runs is what fits; but one sample may see a batch that was just emptied.
        fits = min(self.limit, max(running, self.limit // 2))
        self._careful_from = limit = int(fits * _PREEMPTED)
        return limit

    def _may_grow(self, load: EngineLoad, in_flight: int) -> bool:
        if load.kv_usage is not None and load.kv_usage >= _FULL_KV:
            return False
        is_used = in_flight * 10 >= self.limit * 9
        # Until the engine shows the last growth, another would be blind.
        is_seen = (load.running + load.waiting) * 2 >= in_flight
        return is_used and is_seen

    def _grown(self, load: EngineLoad, queue: int, now: float) -> int:
        if self._careful_from is not None and self.limit >= self._careful_from:
            if now - self._changed_at < _CARE_S:
                return self.limit
            self._changed_at = now
            return self.limit + max(1, self.limit // _STEP_SHARE)
        if load.waiting:
            return self.limit + queue - load.waiting
        return self.limit * 2
