"""Pictures of the page in four states: `python -m tests.dashboard.screenshots DIRECTORY`.

A real server and clients that play workers: fresh, busy, with failures, complete; each light and
dark, on a desktop and on a phone. For people to look at, and for the README.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dispatcher.client import AsyncWorkClient
from dispatcher.models import (
    HeartbeatRequest,
    Histogram,
    ModelStats,
    ReleaseItem,
    WorkerStats,
    WorkItem,
)
from tests.dashboard.browser import DESKTOP, PHONE, Tab, chromium
from tests.support.processes import Server, dispatcher_server

if TYPE_CHECKING:
    from playwright.sync_api import Browser

LINES = 60_000
IN_README = {"busy": ("light-desktop", 700), "failures": ("dark-desktop", 1195)}
"""Of which pictures the README has how much, in pixels from the top."""

STATES = ["fresh", "busy", "failures", "complete"]
_BEAT_S = 2.0
_DIES_AFTER_S = 120.0
_MODEL = "meta-llama/Llama-3.1-8B-Instruct"
_TOPICS = (
    "photosynthesis",
    "sorting algorithms",
    "the tides",
    "bread",
    "prime numbers",
    "glaciers",
)
_FAILURES = (
    ("answer_not_json", "the answer is not JSON: Expecting ',' delimiter: line 1 column 214"),
    ("answer_too_short", "3 words, and at least 20 are wanted"),
    ("answer_too_short", "11 words, and at least 20 are wanted"),
    ("model_error", "400: This model's maximum context length is 8192 tokens"),
)


def _load() -> float:
    """Return how slow everything is just now, as it is in life."""
    now = time.monotonic()
    return 1 + 0.18 * math.sin(now / 31) + 0.1 * math.sin(now / 7)


class Fleet:
    """Clients that answer lines as workers would, `pause_s` apart; `fails` is the share that fails.

    Where more than 5 % do, more goes wrong: a slow line, tries that fail, a worker that dies.
    """

    def __init__(self, server: Server, workers: int, fails: float, pause_s: float) -> None:
        self._server = server
        self._workers = workers
        self._fails = fails
        self._pause_s = pause_s
        self._chance = random.Random(7)

    @property
    def _goes_wrong(self) -> bool:
        return self._fails > 0.05

    async def work(self) -> None:
        """Answer lines until there are none; where it goes wrong, never one of the first."""
        await asyncio.gather(*map(self._worker, range(self._workers)))

    async def _worker(self, number: int) -> None:
        name = f"gpu-{number // 4 + 11:02}-{41000 + 37 * number}-{0x9F3A02BC + 7919 * number:08x}"
        client = AsyncWorkClient(self._server.at, name)
        stats = ModelStats(
            limit=256, latency=Histogram([0, 0, 1, 4, 60, 300, 800, 200, 20, *[0] * 8])
        )
        stats.ttft = Histogram([0, 20, 300, 700, 300, 60, 5, *[0] * 10])
        held: list[WorkItem] = []
        beat_at, began = 0.0, time.monotonic()
        try:
            while True:
                if time.monotonic() >= beat_at:
                    beat_at = time.monotonic() + _BEAT_S
                    is_down = number == self._workers - 2 and self._fails > 0
                    await self._beat(client, name, held, stats, is_down=is_down)
                work = await client.get_work(48 - len(held) if len(held) < 48 else 1)
                held += work.items
                if work.status == "all_work_complete" and not held:
                    return
                await asyncio.sleep(self._pause_s * self._chance.uniform(0.6, 1.4) * _load())
                if self._goes_wrong and len(held) > 20 and self._chance.random() < 0.04:
                    given_back = held.pop()
                    reason = "TaskRetry: the answer names no year"
                    lease = ReleaseItem(given_back.work_id, given_back.lease, reason=reason)
                    await client.release_work(items=[lease])
                if self._goes_wrong and number == 5 and time.monotonic() - began > _DIES_AFTER_S:
                    return  # without a word
                # One is kept back, so that later results wait behind it.
                is_slow = number == 3 and self._goes_wrong
                ready = held[1:9] if is_slow else held[:8]
                held = [item for item in held if item not in ready]
                for item in ready:
                    item.set_result(self._answer(item, stats))
                await client.submit_results(ready)
        finally:
            await client.close()

    async def _beat(
        self,
        client: AsyncWorkClient,
        name: str,
        held: list[WorkItem],
        stats: ModelStats,
        *,
        is_down: bool,
    ) -> None:
        stats.in_flight = len(held)
        totals = WorkerStats(
            stats.requests,
            stats.prompt_tokens,
            stats.completion_tokens,
            len(held),
            models={_MODEL: stats},
        )
        leases = {item.lease: 1 for item in held if item.lease}
        backend = "down" if is_down else "up"
        await client.heartbeat(HeartbeatRequest(name, leases, backend, stats=totals))

    def _answer(self, item: WorkItem, stats: ModelStats) -> str:
        line = json.loads(item.content)
        stats.requests += 1
        stats.prompt_tokens += 180
        stats.completion_tokens += self._chance.randrange(120, 420)
        if self._chance.random() >= self._fails:
            return json.dumps({**line, "response": "It begins with light. " * 6})
        kind, message = self._chance.choice(_FAILURES)
        return json.dumps({"__ERROR__": {"error": kind, "message": message, "task_data": line}})


def write_prompts(path: Path, lines: int) -> None:
    """Write an input that looks like one."""
    with path.open("w") as file:
        for number in range(lines):
            topic = _TOPICS[number % len(_TOPICS)]
            content = (
                f"Explain {topic} to a curious ten-year-old, in about {50 + number % 90} words."
            )
            messages = [{"role": "user", "content": content}]
            file.write(json.dumps({"id": number, "messages": messages}) + "\n")


class Camera:
    """Opens the page of a server in every way, and takes a picture of each when told."""

    def __init__(self, browser: Browser, server: Server) -> None:
        self._tabs: dict[str, Tab] = {}
        for scheme in ("light", "dark"):
            for device, viewport in (("desktop", DESKTOP), ("phone", PHONE)):
                tab = Tab(browser, viewport=viewport, color_scheme=scheme)
                tab.open(server.url, server.token)
                self._tabs[f"{scheme}-{device}"] = tab

    def take(
        self, directory: Path, state: str, prepare: Callable[[Tab], None] | None = None
    ) -> None:
        """Take the pictures of a state: the whole page, or what is seen of it once prepared."""
        for name, tab in self._tabs.items():
            tab.page.bring_to_front()
            tab.page.wait_for_timeout(2500)
            if prepare is not None:
                prepare(tab)
            tab.page.screenshot(path=directory / f"{state}-{name}.png", full_page=prepare is None)
            if prepare is None and IN_README.get(state, ("", 0))[0] == name:
                clip = {"x": 0, "y": 0, "width": DESKTOP["width"], "height": IN_README[state][1]}
                path = directory / f"page-{state}.png"
                tab.page.screenshot(path=path, full_page=True, clip=clip)


def show_a_line(tab: Tab) -> None:
    """Open the history of the line that failed last."""
    tab.page.locator("#errors button").first.click()
    tab.page.get_by_role("heading", name="Input").wait_for()


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seconds", type=float, default=75, help="how long the busy run is busy")
    parser.add_argument("--states", nargs="+", default=STATES, choices=STATES)
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="runs-") as name:
        asyncio.run(_all(Path(name), args.directory, args.seconds, args.states))


async def _all(runs: Path, pictures: Path, seconds: float, wanted: list[str]) -> None:
    for state, lines, workers, fails in (
        ("fresh", LINES, 0, 0.0),
        ("busy", LINES, 8, 0.004),
        ("failures", LINES, 8, 0.08),
        ("complete", 5000, 8, 0.01),
    ):
        if state not in wanted:
            continue
        place = runs / state
        place.mkdir()
        write_prompts(place / "prompts.jsonl", lines)
        files = ("--infile", place / "prompts.jsonl", "--outfile", place / "answers.jsonl")
        with dispatcher_server(*files, "--lease-term", "15", "--quiet") as server:
            fleet = Fleet(server, workers, fails, 0.35)
            working = asyncio.create_task(fleet.work())
            await asyncio.to_thread(_take, server, pictures, state, seconds if workers else 3)
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)


def _take(server: Server, pictures: Path, state: str, seconds: float) -> None:
    with chromium() as browser:
        camera = Camera(browser, server)
        if state == "complete":
            run_file = server.state_file.with_name("run.yaml")
            while "state: complete" not in run_file.read_text():
                time.sleep(0.1)
        else:
            time.sleep(seconds)
        camera.take(pictures, state)
        if state == "failures":
            camera.take(pictures, "line", show_a_line)


if __name__ == "__main__":
    main()
