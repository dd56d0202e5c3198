"""Several models in one run: each request goes to the backend that its `model` names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from dispatcher.models import ModelStats
from dispatcher.taskmanager.backend.base import Backend, CrashHandler
from dispatcher.taskmanager.backend.request import Request, Response

_WEIGHT = 0.02
_SELDOM = 0.05


class BackendPool(Backend):
    """Backends by name. A request that names no model goes to the first one.

    `names` maps further names, such as a backend's real model, to its name here.
    """

    def __init__(self, backends: Mapping[str, Backend], names: Mapping[str, str]) -> None:
        super().__init__()
        self._backends = dict(backends)
        self._names = {**names, **{name: name for name in backends}}
        self._first = next(iter(self._backends))
        # How often an item's first request goes to each: where room for new items is needed.
        self._begins_with = dict.fromkeys(self._backends, 0.0) | {self._first: 1.0}
        self._last_order = -1

    async def start(self) -> None:
        """Start all, side by side. Raises BackendError when one cannot be started."""
        starting = [asyncio.ensure_future(each.start()) for each in self._backends.values()]
        try:
            await asyncio.gather(*starting)
        except BaseException:  # the first failure, or a signal: the others need not go on
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
            raise

    async def process(self, request: Request, order: int = 0) -> Response:
        """Answer one request with the backend it names."""
        content = request.content
        asked = content.get("model") if isinstance(content, dict) else None
        name = self._first if asked is None else self._names.get(str(asked))
        if name is None:
            known = ", ".join(self._backends)
            return Response.from_error(
                request, f"the model {asked!r} is none of this run's backends: {known}", str(asked)
            )
        if order > self._last_order:
            self._last_order = order
            self._note_beginning(name)
        return await self._backends[name].process(request, order)

    @property
    def limit(self) -> int:
        """How many requests may be in flight now, all models together."""
        return sum(backend.limit for backend in self._backends.values())

    @property
    def requests_in_flight(self) -> int:
        """Requests being answered now."""
        return sum(backend.requests_in_flight for backend in self._backends.values())

    def room(self) -> int:
        """Return how many items may be started now: room where items begin counts.

        A free place at a model that is only asked in the middle of an item is filled by items
        that are under way.
        """
        often = min(_SELDOM, max(self._begins_with.values()))
        return max(
            backend.room()
            for name, backend in self._backends.items()
            if self._begins_with[name] >= often
        )

    def watch(self, on_growth: Callable[[], None], on_crash: CrashHandler) -> None:
        """Have the manager told what happens to any of them."""
        for backend in self._backends.values():
            backend.watch(on_growth, on_crash)

    def healthy(self) -> bool:
        """Say whether all model servers are believed to be serving."""
        return all(backend.healthy() for backend in self._backends.values())

    def accounts(self) -> Mapping[str, ModelStats]:
        """Return what each backend answered, by its name and, where it has several, its models."""
        found: dict[str, ModelStats] = {}
        for name, backend in self._backends.items():
            for model, stats in backend.accounts().items():
                found[name if name not in found else f"{name}/{model}"] = stats
        return found

    async def close(self) -> None:
        """Close all."""
        await asyncio.gather(*(backend.close() for backend in self._backends.values()))

    def _note_beginning(self, begun_with: str) -> None:
        for name in self._begins_with:
            share = self._begins_with[name] * (1 - _WEIGHT)
            self._begins_with[name] = share + _WEIGHT * (name == begun_with)
