"""Tasks that compute or sleep between requests: others go on, and the server hears of it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.faults.heavy_tasks import HEAVY_REQUESTS, SLEPT_S
from tests.faults.test_kills import fakellm
from tests.support.processes import Process, Server, dispatcher_server, running, wait_until

TASK = "tests/faults/heavy_tasks.py:HeavyTask"
LATENCY_S = 0.2
LEASE_TERM_S = 3
END_S = 90.0


@contextmanager
def worker_on(
    directory: Path, kinds: Sequence[str], *flags: str
) -> Iterator[tuple[Server, Process]]:
    """Serve a line of each kind to one worker; yield the server and the worker."""
    lines = [json.dumps({"id": number, "kind": kind}) for number, kind in enumerate(kinds)]
    infile = directory / "in.jsonl"
    infile.write_text("".join(line + "\n" for line in lines))
    files = ("--infile", infile, "--outfile", directory / "out.jsonl")
    model_flags = ("--latency-s", str(LATENCY_S), "--call-log", str(directory / "calls.jsonl"))
    with (
        fakellm(*model_flags) as base_url,
        dispatcher_server(*files, "--lease-term", str(LEASE_TERM_S)) as server,
    ):
        command = [sys.executable, "-m", "dispatcher.taskmanager.cli", "--task", TASK]
        command += ["--dispatcher", server.at, "--backend", "openai", "--base-url", base_url]
        with running(*command, "--model", "m", *flags) as worker:
            yield server, worker


def status_of(server: Server) -> dict[str, Any]:
    with server.client() as client:
        return client.status()


def ends_well(directory: Path, server: Server, worker: Process, lines: int) -> dict[str, Any]:
    """Wait for the end; no lease may have been lost. Return the last status."""
    assert worker.wait(END_S) == 0, worker.output
    status = status_of(server)
    ended = {kind: status[kind] for kind in ("charged", "crashed", "released", "returned")}
    assert ended == dict.fromkeys(ended, 0), worker.output
    answers = [json.loads(line) for line in (directory / "out.jsonl").read_text().splitlines()]
    assert answers == [{"id": number} for number in range(lines)]
    return status


def spans(call_log: Path, kind: str) -> list[tuple[float, float]]:
    """Return from when to when each request of a kind was at the model server."""
    begun: dict[int, float] = {}
    found = []
    for text in call_log.read_text().splitlines():
        line = json.loads(text)
        if line["event"] == "call" and line["prompt"].startswith(kind):
            begun[line["call"]] = line["t"]
        elif line["event"] == "answer" and line["call"] in begun:
            found.append((begun.pop(line["call"]), line["t"]))
    return found


def share_in_flight(calls: list[tuple[float, float]], start: float, end: float, of: int) -> float:
    """Return how much of `of` requests at a time these were, on average from start to end."""
    held_s = sum(max(0.0, min(b, end) - max(a, start)) for a, b in calls)
    return held_s / ((end - start) * of)


@pytest.mark.slow
def test_tasks_that_compute_leave_the_model_server_to_those_that_do_not(tmp_path: Path) -> None:
    slots, heavies, lights = 16, 4, 500
    kinds = ["heavy"] * heavies + ["light"] * lights
    with worker_on(tmp_path, kinds, "--workers", str(slots)) as (server, worker):
        status = ends_well(tmp_path, server, worker, len(kinds))

    heavy = spans(tmp_path / "calls.jsonl", "heavy")
    light = spans(tmp_path / "calls.jsonl", "light")
    assert (len(heavy), len(light)) == (heavies * HEAVY_REQUESTS, lights)
    # From when the first one computed to when one of both kinds had no more to do.
    start = min(begin for begin, _ in light)
    end = min(max(begin for begin, _ in heavy), sorted(begin for begin, _ in light)[-slots])
    share = share_in_flight(light, start, end, slots)
    print(f"light requests: {share:.0%} of {slots} in flight for {end - start:.1f} s of computing")
    assert share > 0.35, worker.output
    assert status["workers"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sleeper", "silent"])
def test_tasks_without_an_immediate_request_do_not_make_the_manager_fetch_without_end(
    tmp_path: Path, kind: str
) -> None:
    slots, batch = 4, 4
    flags = ("--workers", str(slots), "--batch-size", str(batch))
    most = 0
    with worker_on(tmp_path, [kind] * 400, *flags) as (server, worker):
        wait_until(lambda: status_of(server)["issued"], "the worker takes items", 30)
        end = time.monotonic() + 2 * SLEPT_S
        while time.monotonic() < end and not worker.has_ended:
            most = max(most, status_of(server)["issued"])
            time.sleep(0.02)
    # Four active items for each slot, those kept ready, and one reply on its way.
    assert 0 < most <= 4 * slots + 2 * batch


@pytest.mark.slow
def test_slow_steps_are_told_to_the_server_and_warned_about(tmp_path: Path) -> None:
    kinds = ["light", "sleeper"]
    with worker_on(tmp_path, kinds, "--workers", "2") as (server, worker):
        status = ends_well(tmp_path, server, worker, len(kinds))

    assert status["slow_steps"] >= 1
    assert SLEPT_S <= status["longest_step_s"] < SLEPT_S + 30
    assert "a task computed or slept for 2." in worker.output
