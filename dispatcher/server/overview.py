"""GET /overview: all that the page shows, in one reply that costs about as much for ten pages."""

from __future__ import annotations

import heapq
import re
import time
from typing import Any

import msgspec

from dispatcher.core.workers import Worker
from dispatcher.errors import BadRequestError
from dispatcher.server.shown_settings import shown_settings
from dispatcher.service import DispatchService

MOST_WORKERS = 500
PAGE_LOOKS_EVERY_S = 2.0
"""How often a page that somebody has before their eyes looks."""

REUSED_FOR_S = 0.9
"""How long a reply serves other pages, too: below the interval at which one page looks."""

_OUR_NAMES = re.compile(r"(.+)-\d+-[0-9a-f]{8}")
_SINCE = re.compile(r"([0-9]{1,18})\.([0-9]{1,18})")
_encode = msgspec.json.Encoder().encode


class Overview:
    """Makes the replies about one run.

    `asked_at` is when somebody last looked, by time.monotonic.
    """

    def __init__(self, service: DispatchService) -> None:
        self.asked_at = float("-inf")
        self._service = service
        self._common = b""
        self._made_at = float("-inf")

    def reply(self, since: str | None) -> bytes:
        """Return the JSON of a reply: what is new since the reply whose `next` is `since`.

        Without one, or with one of a server before this, all points and the settings are new.
        """
        service = self._service
        epoch, seq = _parse_since(since)
        self.asked_at = time.monotonic()
        is_first = epoch != service.epoch
        own: dict[str, Any] = {"points": self._points(0 if is_first else seq)}
        if is_first:
            own["settings"] = shown_settings(service.run_file)
        if time.monotonic() - self._made_at >= REUSED_FOR_S:
            self._common = _encode(self._describe())
            self._made_at = time.monotonic()
        own["next"] = f"{service.epoch}.{service.observed.rates.seq}"
        return _encode(own)[:-1] + b"," + self._common[1:]

    def _points(self, seq: int) -> list[dict[str, Any]]:
        """Return new points of each level; their times are negative: seconds before now."""
        now = time.monotonic()
        return [
            {
                "every_s": every_s,
                "keep": keep,
                "new": [
                    [
                        round(point.at_s - now, 1),
                        round(point.items, 3),
                        round(point.failed, 3),
                        round(point.tokens, 1),
                    ]
                    for point in points
                ],
            }
            for every_s, keep, points in self._service.observed.rates.points_after(seq)
        ]

    def _describe(self) -> dict[str, Any]:
        service = self._service
        queue, observed = service.queue, service.observed
        return {
            "status": full_status(service),
            "workers": self._workers(),
            "errors": {
                "latest": observed.latest_failed(),
                "line_of_kind": queue.latest_failed,
            },
            "time": time.time(),
        }

    def _workers(self) -> dict[str, Any]:
        """Return the workers, those with problems first, then by name, and how many there are."""
        service = self._service
        now, workers = service.now(), service.queue.workers
        chosen = heapq.nsmallest(MOST_WORKERS, workers.values(), key=_by_need)
        named = sum(len(worker.leases) for worker in workers.values())
        return {
            "listed": [self._worker(worker, now) for worker in chosen],
            "count": len(workers),
            "in_flight_without_name": len(service.queue.leases) - named,
        }

    def _worker(self, worker: Worker, now: float) -> dict[str, Any]:
        stats = self._service.worker_totals.of(worker.name)
        vanished_at = worker.vanished_at
        items_per_s = self._service.observed.worker_rates.of(worker, time.monotonic())
        return {
            "name": worker.name,
            "node": node_of(worker.name),
            "in_flight": len(worker.leases),
            "requests_in_flight": stats.in_flight if stats and vanished_at is None else None,
            "finished": worker.finished,
            "items_per_s": round(items_per_s, 3) if items_per_s is not None else None,
            "completion_tokens": stats.completion_tokens if stats else None,
            "seen_s": round(now - worker.last_seen_at, 1),
            "backend": ("up" if worker.backend_up else "down") if worker.heartbeats else "unknown",
            "vanished_s": round(now - vanished_at, 1) if vanished_at is not None else None,
        }


def full_status(service: DispatchService) -> dict[str, Any]:
    """Return what `/status` tells."""
    queue = service.queue
    blocked = queue.policy.window > 0 and not queue.input_ended and queue.window_room() <= 0
    service.observe()
    status = service.status()
    left = status["total"] - status["done"] if status["state"] == "running" else 0
    rates = service.observed.rates.in_status(left)
    return {**status, "blocked_by_window": blocked, **rates}


def node_of(worker: str) -> str | None:
    """Return the node in the names that task managers give themselves; None in others."""
    found = _OUR_NAMES.fullmatch(worker)
    return found[1] if found else None


def _by_need(worker: Worker) -> tuple[bool, bool, str]:
    return (worker.vanished_at is None, worker.backend_up, worker.name)


def _parse_since(since: str | None) -> tuple[int, int]:
    if since is None:
        return -1, 0
    found = _SINCE.fullmatch(since)
    if found is None:
        raise BadRequestError('"since" must be what an earlier reply has as "next"')
    return int(found[1]), int(found[2])
