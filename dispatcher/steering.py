"""What people tell a run while it goes on: how many lines may fail, to pause, to go on, to end.

Each word is on disk before it is answered. Said twice, it is answered twice and done once.
"""

from __future__ import annotations

from dispatcher.core.work_queue import WorkQueue
from dispatcher.remedies import command_that_goes_on
from dispatcher.service import DispatchService

_COMPLETE = "the run is complete"


def change_work_timeout(service: DispatchService, timeout_s: float) -> str:
    """Let an item take so long without progress, until this server ends; return what to answer."""
    if service.finished.is_set():
        return f"{_COMPLETE}, no line is worked on any more"
    service.set_work_timeout(timeout_s)
    return f"the work timeout is {timeout_s:g} seconds now"


async def change_failure_limit(service: DispatchService, limit: str | None, *, accept: bool) -> str:
    """Let so many lines fail from now on, or accept those that failed so far, or both.

    Return what to answer. Raises ValueError for what is no limit.
    """

    def change(queue: WorkQueue) -> None:
        if limit is not None:
            queue.set_max_failures(limit)
        if accept:
            queue.accept_failures()

    if service.finished.is_set():
        return f"{_COMPLETE}, no line can fail any more"
    was_paused = service.queue.pause is not None
    await service.decide(change)
    if service.queue.pause is not None:
        return f"still {_with_remedy(service)}"
    said = f"the limit is {service.queue.max_failures} now"
    if accept:
        said = f"the lines that failed so far are accepted, {said}"
    return f"the run goes on: {said}" if was_paused else said


async def pause(service: DispatchService, reason: str) -> str:
    """Hand out nothing more until `resume`, after restarts too; return what to answer."""
    if not service.finished.is_set():
        await service.decide(lambda queue: queue.pause_for_operator(reason))
    if service.finished.is_set():  # now, perhaps
        return f"{_COMPLETE}, there is nothing to pause"
    said = _with_remedy(service)
    if service.is_draining:
        return f"{said}; this server is ending, and the run stays paused when it is started again"
    return said


async def resume(service: DispatchService) -> str:
    """Lift the operator's pause; return what to answer, with the pause that is left if any."""
    if service.finished.is_set():
        return _COMPLETE
    was_paused = service.queue.pause is not None
    await service.decide(lambda queue: queue.resume())
    if service.queue.pause is not None:
        return f"still {_with_remedy(service)}"
    if service.is_draining:
        return "the run is not paused, but this server is ending: it goes on when started again"
    return "the run goes on" if was_paused else "the run was not paused"


async def drain(service: DispatchService) -> str:
    """Have the server end as SIGTERM has it: return what to answer."""
    if service.finished.is_set():
        return f"{_COMPLETE}, and this server ends by itself"
    service.drain_asked.set()
    await service.drain()
    return (
        "nothing more is handed out; the server takes results for some seconds, ends with code 3, "
        "and says how to go on"
    )


def _with_remedy(service: DispatchService) -> str:
    """Return what the run is paused by, and what lifts that."""
    if (found := service.queue.pause) is None:  # somebody was quicker
        return "the run goes on"
    return f"{found}; to go on: {command_that_goes_on(found.by, service.settings.state_dir)}"
