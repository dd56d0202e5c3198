"""Clients that take items and hand in results while their server dies again and again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections import Counter
from dataclasses import dataclass, field
from random import Random

from dispatcher.client import AsyncWorkClient
from dispatcher.models import (
    BatchWorkResponse,
    HeartbeatRequest,
    Outcome,
    ReleaseItem,
    WorkItem,
    WorkStatus,
)
from tests.faults.oracle import Ledger, result_of

AGAIN_S = 0.03
_SETTLED = (Outcome.ACCEPTED, Outcome.DUPLICATE)


def make_client(address: str, worker: str | None = None) -> AsyncWorkClient:
    """Return a client of the server at `address`; all clients of the tests are made here."""
    return AsyncWorkClient(address, worker, timeout_s=10.0)


@dataclass
class Run:
    """What the clients of one run share: where it is, and what all of them were told.

    An item is worked on for `longest_work_s` at most. With `nobody_pays`, an item that was
    charged for anything is a problem. `all_done` is set when a client was told that the run is
    complete, `has_ended` when there will be no server again.
    """

    address: str
    ledger: Ledger
    nobody_pays: bool
    longest_work_s: float = 0.15
    told_done: dict[int, float] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    all_done: bool = False
    has_ended: bool = False

    def complain(self, problem: str) -> None:
        """Note something that must not be."""
        self.ledger.wrong.append(problem)

    def note_work(self, reply: BatchWorkResponse, asked_at: float) -> None:
        """Items were handed out in answer to a call that left at `asked_at`."""
        for item in reply.items:
            number = item.work_id
            self.ledger.note_grant(number, item.content, item.retry_count, item.attempt)
            if self.told_done.get(number, asked_at) < asked_at:
                self.complain(f"item {number} was done and was handed out again")
            if self.nobody_pays and (item.retry_count, item.attempt) != (0, 1):
                self.complain(f"item {number} has retry_count {item.retry_count}, nobody at fault")

    def note_outcome(self, number: int, result: str, outcome: Outcome, now: float) -> None:
        """A client that had been handed the item was told what became of its result."""
        self.counts[str(outcome)] += 1
        self.ledger.note_outcome(number, result, str(outcome))
        if outcome in _SETTLED:
            self.told_done.setdefault(number, now)
        else:
            self.complain(f"the result of item {number} was answered {outcome}")


class Client:
    """A worker as the protocol wants it: heartbeats, results with `want`, releases.

    It sends some results a second time, with another text, and after a release of its own. A call
    that got no answer is made again, as one or another of the calls it could make then.
    """

    slowness = 1

    def __init__(self, run: Run, name: str, seed: str) -> None:
        self.run = run
        self.name = f"{name}-{secrets.token_hex(4)}"
        self.rng = Random(f"{seed} {name}")
        self.client = make_client(run.address, self.name)
        self.held: dict[str, WorkItem] = {}
        self.texts: dict[int, str] = {}
        self.settled: list[WorkItem] = []
        self.let_go: set[str] = set()
        self.told_all_done = False
        self._nonce = 0

    @property
    def is_over(self) -> bool:
        """True when there is nothing more to do, or nobody to do it for."""
        return self.told_all_done or self.run.has_ended

    async def run_to_the_end(self) -> None:
        """Work until the server says that every line has its result."""
        try:
            await self.work()
        finally:
            await self.client.close()

    async def work(self) -> None:
        """Act, with heartbeats beside it."""
        await self._beat_until_heard()
        beating = asyncio.ensure_future(self._beat_forever())
        try:
            while not self.is_over:
                await self.act()
        finally:
            beating.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await beating

    async def act(self) -> None:
        """Do one thing a worker does."""
        if not self.held:
            await self.ask(self.rng.randint(1, 12))
            return
        await asyncio.sleep(self.rng.uniform(0, self.run.longest_work_s * self.slowness))
        if not self.held:
            return  # a heartbeat's reply said that all of it is done
        some = self.rng.sample(list(self.held.values()), self.rng.randint(1, len(self.held)))
        dice = self.rng.random()
        if dice < 0.05:
            await self.give_back(some, charge=False)
        elif dice < 0.1 and self.settled:
            await self.hand_in_again()
        else:
            await self.hand_in(some, want=self.rng.choice((0, 1, len(some), 8)))

    async def ask(self, count: int) -> None:
        """Ask for work."""
        asked_at = _now()
        self.take(await self.client.get_work(count, self.rng.choice((0.0, 0.3))), asked_at)

    def take(self, reply: BatchWorkResponse, asked_at: float) -> None:
        """Hold what a reply hands out."""
        self.run.note_work(reply, asked_at)
        for item in reply.items:
            self.held[self.key_of(item)] = item
        if reply.status is WorkStatus.ALL_WORK_COMPLETE:
            self.told_all_done = self.run.all_done = True

    async def hand_in(self, items: list[WorkItem], want: int) -> None:
        """Hand in results; without an answer the items stay held."""
        for item in items:
            item.set_result(self.text_for(item))
        asked_at = _now()
        reply = await self.client.submit_results(items, want)
        if reply.status is WorkStatus.SERVER_UNAVAILABLE:
            await asyncio.sleep(AGAIN_S)
            return
        for item, outcome in zip(items, reply.outcomes, strict=True):
            self.run.note_outcome(item.work_id, item.result or "", outcome, _now())
            self.held.pop(self.key_of(item), None)
            self.texts.pop(item.work_id, None)
            self.settled = [*self.settled[-20:], item]
        if reply.work is not None:
            self.take(reply.work, asked_at)

    async def hand_in_again(self) -> None:
        """Hand in other results for items that have theirs.

        Of an item that only a heartbeat called done nobody may have a result: it can be a tombstone
        that is not written yet, which a late result replaces.
        """
        items = [
            WorkItem(item.work_id, "", self.new_text(item), run=item.run, lease=item.lease)
            for item in self.settled
        ]
        had_theirs = {item.work_id for item in items if item.work_id in self.run.told_done}
        reply = await self.client.submit_results(items)
        for item, outcome in zip(items, reply.outcomes, strict=False):
            self.run.note_outcome(item.work_id, item.result or "", outcome, _now())
            if outcome is not Outcome.DUPLICATE and item.work_id in had_theirs:
                self.run.complain(f"a second result of item {item.work_id} was {outcome}")

    async def give_back(self, items: list[WorkItem], *, charge: bool) -> None:
        """Release items; some of their results are handed in all the same."""
        leases = [ReleaseItem(i.work_id, i.lease, charge, "enough of it") for i in items]
        self.let_go |= {self.key_of(item) for item in items}
        reply = await self.client.release_work(items=leases)
        if reply.status is WorkStatus.SERVER_UNAVAILABLE:
            await asyncio.sleep(AGAIN_S)
            return
        self.run.counts["released"] += reply.released_count
        late = [item for item in items if self.rng.random() < 0.3]
        for item in items:
            if item not in late:
                self.held.pop(self.key_of(item), None)
                self.texts.pop(item.work_id, None)
        if late:
            await self.hand_in(late, want=0)

    async def beat(self) -> bool:
        """Send a heartbeat; say whether it was answered."""
        held = dict.fromkeys(self.held, 1 + self._nonce)
        reply = await self.client.heartbeat(HeartbeatRequest(self.name, held))
        if self.run.nobody_pays and (lost := set(reply.lost) - self.let_go):
            self.run.complain(f"{self.name} lost leases it had never let go of: {lost}")
        for key in reply.done:
            if (item := self.held.get(key)) is not None and self.rng.random() < 0.5:
                self.held.pop(key)
                self.settled.append(item)
        return reply.status is WorkStatus.OK

    async def _beat_until_heard(self) -> None:
        while True:
            if await self.beat() or self.is_over:
                return
            await asyncio.sleep(AGAIN_S)

    async def _beat_forever(self) -> None:
        while True:
            was_heard = await self.beat()
            await asyncio.sleep(0.2 if was_heard else AGAIN_S)

    def key_of(self, item: WorkItem) -> str:
        """Return the lease's name."""
        assert item.lease is not None
        return item.lease

    def text_for(self, item: WorkItem) -> str:
        """Return the item's result, the same one until it is answered."""
        return self.texts.setdefault(item.work_id, self.new_text(item))

    def new_text(self, item: WorkItem) -> str:
        """Return a result nobody else hands in; now and then a large one."""
        self._nonce += 1
        content = item.content or json.dumps({"id": item.work_id})
        text = result_of(content, self.name, self._nonce)
        padding = self.rng.choice((0,) * 30 + (3_000, 50_000, 300_000))
        return f'{text[:-1]}, "pad": "{"x" * padding}"}}' if padding else text


class Plodder(Client):
    """Works on its items for seconds, so that its leases outlive several servers."""

    slowness = 30


class Sitter(Client):
    """Holds items past the work timeout, without heartbeats, and hands them in late."""

    async def work(self) -> None:
        """Act, without heartbeats."""
        while not self.is_over:
            await self.act()

    async def act(self) -> None:
        """Sit on items for longer than they may take, mostly."""
        if not self.held:
            await self.ask(3)
            return
        await asyncio.sleep(self.rng.choice((0.01, 0.3, 0.8, 1.5)))
        await self.hand_in(list(self.held.values()), want=self.rng.choice((0, 2)))


class Dropper(Client):
    """Goes silent past the lease term, comes back under its name, and charges what it returns."""

    async def work(self) -> None:
        """Act, with heartbeats and without."""
        while not self.is_over:
            await self._beat_until_heard()
            for _ in range(self.rng.randint(1, 10)):
                await self.act()
            await asyncio.sleep(self.rng.choice((0.0, 0.2, 1.5)))

    async def act(self) -> None:
        """Do what a worker does, or give items back charged, or hand in rubbish."""
        dice = self.rng.random()
        if self.held and dice < 0.1:
            await self.give_back(list(self.held.values()), charge=True)
        elif self.held and dice < 0.2:
            await self.hand_in_rubbish()
        else:
            await super().act()

    async def hand_in_rubbish(self) -> None:
        """Hand in what is no result; the lease ends and is charged."""
        _, item = self.held.popitem()
        item.set_result("no json")
        reply = await self.client.submit_results([item])
        if reply.outcomes and reply.outcomes[0] is not Outcome.INVALID:
            self.run.complain(f"rubbish for item {item.work_id} was {reply.outcomes[0]}")
        self.texts.pop(item.work_id, None)
        self.run.counts["rubbish"] += len(reply.outcomes)


class OldClient(Client):
    """An existing client: without a name, a lease, or a run; it releases by line number."""

    def __init__(self, run: Run, name: str, seed: str) -> None:
        super().__init__(run, name, seed)
        self.client = make_client(run.address)

    async def work(self) -> None:
        """Act, without heartbeats."""
        while not self.is_over:
            await self.act()

    async def give_back(self, items: list[WorkItem], *, charge: bool) -> None:
        """Release items by their numbers, which charges them."""
        reply = await self.client.release_work([item.work_id for item in items])
        self.run.counts["released"] += reply.released_count
        for item in items:
            self.held.pop(self.key_of(item), None)
            self.texts.pop(item.work_id, None)

    def take(self, reply: BatchWorkResponse, asked_at: float) -> None:
        """Hold what a reply hands out, of which it knows only the older fields."""
        for item in reply.items:
            item.run = item.lease = None
        super().take(reply, asked_at)

    def key_of(self, item: WorkItem) -> str:
        """Return the line number."""
        return str(item.work_id)


def _now() -> float:
    return asyncio.get_running_loop().time()
