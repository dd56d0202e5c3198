"""What the tests of the service have in common."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any

import msgspec

from dispatcher.config import RunSettings
from dispatcher.core.work_queue import CRASH
from dispatcher.models import (
    HeartbeatRequest,
    ReleaseItem,
    ResultItem,
    StepItem,
    WorkItem,
)
from dispatcher.service import DispatchService
from dispatcher.storage.files import Files
from dispatcher.storage.inputs.growing import GrowingSource
from dispatcher.storage.journal import JOURNAL_DIR
from tests.storage.broken_files import owned_by_the_dead

ERROR_KEYS = {"error", "work_id", "original_content", "attempts"}


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine, for at most 15 s."""
    asyncio.run(asyncio.wait_for(coroutine, 15))


def give_input(settings: RunSettings, lines: int) -> None:
    text = "".join(f'{{"n": {number}}}\n' for number in range(lines))
    settings.infile.write_text(text)


def line(number: int) -> str:
    return f'{{"result": {number}}}'


def answer(item: WorkItem, result: str | None = None) -> ResultItem:
    text = line(item.work_id) if result is None else result
    return ResultItem(item.work_id, text, item.run, item.lease)


def give_back(item: WorkItem, *, charge: bool = False) -> ReleaseItem:
    return ReleaseItem(item.work_id, item.lease, charge, "sigterm")


async def drop(service: DispatchService) -> None:
    """End the service as a kill does: nothing more is written, and its claim stays."""
    await asyncio.sleep(0)  # a task that never began would leave its coroutine behind
    for task in service._tasks:
        task.cancel()
    await asyncio.gather(*service._tasks, return_exceptions=True)
    if isinstance(service._source, GrowingSource):
        await asyncio.to_thread(service._source.copy.end)
    for thread in (service._write_thread, service._read_thread, service._claim_thread):
        thread.shutdown()
    service._ownership._lock.release()
    if service._writer is not None:
        service._writer.close()
    if service._source is not None:
        service._source.close()


@contextlib.asynccontextmanager
async def serving(
    settings: RunSettings, files: Files | None = None, **options: Any
) -> AsyncIterator[DispatchService]:
    """A started service; whatever is left of it afterwards is dropped."""
    options.setdefault("ownership", owned_by_the_dead(settings.state_dir, files))
    service = DispatchService(settings, files=files, **options)
    try:
        await service.start()
        yield service
    finally:
        await drop(service)


async def take(service: DispatchService, count: int, worker: str = "w") -> list[WorkItem]:
    return (await service.get_work(worker, count)).items


async def completed(service: DispatchService) -> None:
    await asyncio.wait_for(service.finished.wait(), 5)


async def finish_everything(service: DispatchService) -> None:
    while items := await take(service, 100):
        await service.submit([answer(item) for item in items])
    await completed(service)


def output(settings: RunSettings) -> list[Any]:
    return [json.loads(text) for text in settings.outfile.read_text().splitlines()]


def expected(lines: Iterable[int]) -> list[Any]:
    return [json.loads(line(number)) for number in lines]


def durable(service: DispatchService) -> Any:
    return msgspec.to_builtins(service.queue.checkpoint())


def journal_bytes(settings: RunSettings) -> dict[str, bytes]:
    directory = settings.state_dir / JOURNAL_DIR
    return {path.name: path.read_bytes() for path in directory.glob("*.journal")}


async def settle_loop() -> None:
    """Let everything that can go on do so."""
    for _ in range(20):
        await asyncio.sleep(0)


async def until(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 5)


async def finish_everything_but(service: DispatchService, items: list[WorkItem]) -> None:
    """Finish the run, whoever has what."""
    await service.submit([ResultItem(item.work_id, line(item.work_id)) for item in items])
    while True:
        await service.submit(
            [ResultItem(work_id, line(work_id)) for work_id in list(service.queue.items)]
        )
        if not await take(service, 10):
            break
    await completed(service)


def hold_reader(service: DispatchService) -> tuple[threading.Event, threading.Event]:
    """Let the next read of the input wait; tells that it does, and how to let it go on."""
    reading, go_on = threading.Event(), threading.Event()
    source = service._source
    assert source is not None
    fetch, scan = source.fetch, source.scan

    def wait() -> None:
        reading.set()
        assert go_on.wait(10)

    def slow_fetch(*args: Any) -> Any:
        wait()
        return fetch(*args)

    def slow_scan(*args: Any) -> Any:
        wait()
        return scan(*args)

    source.fetch, source.scan = slow_fetch, slow_scan  # type: ignore[method-assign]
    return reading, go_on


def crash(item: WorkItem) -> ReleaseItem:
    return ReleaseItem(item.work_id, item.lease, False, CRASH)


def step(
    item: WorkItem, pos: tuple[int, int], response: str | None = '"yes"', hash_: str = "abc"
) -> StepItem:
    return StepItem(item.work_id, str(item.lease), item.attempt, pos, hash_, response, item.run)


async def again(service: DispatchService, item: WorkItem, **how: Any) -> WorkItem:
    """Give an item back, and return it as it is handed out next."""
    how = {"charge": False, "reason": "x", **how}
    assert await service.release([ReleaseItem(item.work_id, item.lease, **how)]) == 1
    (item,) = await take(service, 1)
    return item


Verb = Callable[[DispatchService, list[WorkItem]], Coroutine[Any, Any, Any]]


async def ask_for_work(service: DispatchService, _: list[WorkItem]) -> Any:
    return await service.get_work("w", 1)


async def submit_first(service: DispatchService, items: list[WorkItem]) -> Any:
    return await service.submit([answer(items[0])])


async def release_first(service: DispatchService, items: list[WorkItem]) -> Any:
    return await service.release([give_back(items[0])])


async def renew_first(service: DispatchService, items: list[WorkItem]) -> Any:
    renewing = ReleaseItem(items[0].work_id, items[0].lease, False, CRASH, renew=True)
    return await service.take_back([renewing], "w")


async def fail_first(service: DispatchService, items: list[WorkItem]) -> Any:
    return await service.submit([answer(items[0], "not json")])


async def record_first(service: DispatchService, items: list[WorkItem]) -> Any:
    return await service.record_steps([step(items[0], (0, 0))])


async def beat_without_old_lease(service: DispatchService, items: list[WorkItem]) -> Any:
    for lease in service.queue.leases.values():
        lease.issued_at -= 1000.0
        lease.missed_heartbeats = 1
    return await service.heartbeat(HeartbeatRequest("w"))


VERBS = [
    ask_for_work,
    submit_first,
    release_first,
    renew_first,
    fail_first,
    record_first,
    beat_without_old_lease,
]
