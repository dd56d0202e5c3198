"""Two real servers on one run: one of them works, the other one says who."""

from __future__ import annotations

import json
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from dispatcher.client import WorkClient
from dispatcher.models import Outcome, WorkItem
from tests.faults.oracle import Ledger, input_line, result_of
from tests.support.processes import Process, running

READY = re.compile(r"dispatcher-server: run (\S+) at (\S+)")
LINES = 40


class Run:
    """The files of one run, and what its clients were told."""

    def __init__(self, directory: Path) -> None:
        self.infile, self.outfile = directory / "in.jsonl", directory / "out.jsonl"
        self.lines = [input_line(number) for number in range(LINES)]
        self.infile.write_text("\n".join(self.lines) + "\n")
        self.ledger = Ledger(max_retries=3)
        self.address = f"@{self.outfile}.dispatch/server.json"

    @contextmanager
    def server(self, host: str, *flags: str) -> Iterator[Process]:
        """Start a server that has no file locks and believes it is on `host`."""
        files = ("--infile", self.infile, "--outfile", self.outfile, "--port", "0", "--retry", "1")
        command = (sys.executable, "-m", "tests.faults.lockless_server", host)
        with running(*command, *files, *flags) as process:
            yield process

    def take(self, client: WorkClient, count: int) -> list[WorkItem]:
        reply = client.get_work(count)
        for item in reply.items:
            self.ledger.note_grant(item.work_id, item.content, item.retry_count, item.attempt)
        return reply.items

    def answer(self, client: WorkClient, items: list[WorkItem], worker: str) -> list[Outcome]:
        for item in items:
            item.set_result(result_of(item.content, worker, 0))
        outcomes = client.submit_results(items).outcomes
        for item, outcome in zip(items, outcomes, strict=False):
            assert item.result is not None
            self.ledger.note_outcome(item.work_id, item.result, outcome)
        return outcomes

    def finish(self, server: Process, unfinished: list[WorkItem]) -> None:
        """Answer what is left and judge the output."""
        with WorkClient(self.address, timeout_s=20.0) as client:
            self.answer(client, unfinished, "the end")
            while items := self.take(client, 10):
                self.answer(client, items, "the end")
        assert server.wait(deadline_s=30) == 0, server.output
        assert self.ledger.problems(self.lines, self.outfile.read_bytes()) == []


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def stop_for_good(server: Process) -> None:
    server.signal(signal.SIGKILL)
    server.wait()


@pytest.mark.slow
def test_of_two_servers_started_at_the_same_moment_one_works_and_the_other_names_it(
    run: Run,
) -> None:
    for number in range(4):
        with ExitStack() as stack:
            both = [stack.enter_context(run.server(host)) for host in ("node-a", "node-b")]
            while not any(process.has_ended for process in both):
                time.sleep(0.05)
            (loser,) = [process for process in both if process.has_ended]
            (winner,) = [process for process in both if process is not loser]
            assert loser.wait() == 1
            name = "node-a" if winner is both[0] else "node-b"
            assert re.search(rf"another server \(process \d+ on {name}\) works on", loser.output)
            assert READY.search(winner.output), winner.output
            assert "Traceback" not in loser.output
            if number == 3:
                run.finish(winner, [])
            winner.stop()
            winner.wait()


@pytest.mark.slow
def test_a_server_that_stood_still_for_a_minute_is_replaced_and_harms_nothing(run: Run) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(run.server("node-a"))
        first.wait_for_line(READY)
        with WorkClient(run.address, timeout_s=90.0) as old, ExitStack() as late:
            held = run.take(old, 10)
            assert set(run.answer(old, held[:5], "before")) == {Outcome.ACCEPTED}
            first.signal(signal.SIGSTOP)

            # A result that is on its way to the server that stands still.
            outcomes: list[Outcome] = []
            sending = threading.Thread(
                target=lambda: outcomes.extend(run.answer(old, held[5:], "late"))
            )
            sending.start()
            late.callback(sending.join, 60)

            began = time.monotonic()
            second = stack.enter_context(run.server("node-b"))
            second.wait_for_line(READY, deadline_s=60)
            assert time.monotonic() - began > 29
            with WorkClient(run.address, timeout_s=20.0) as new:
                mine = run.take(new, 10)
                run.answer(new, mine, "after")
                assert run.answer(new, held[5:7], "after") == [Outcome.ACCEPTED] * 2

            first.signal(signal.SIGCONT)
            assert first.wait(deadline_s=30) == 1
            assert re.search(r"another server \(process \d+ on node-b\) took over", first.output)
        run.finish(second, held[7:])


@pytest.mark.slow
def test_a_takeover_lets_the_living_server_notice_first(run: Run) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(run.server("node-a"))
        first.wait_for_line(READY)
        with WorkClient(run.address, timeout_s=20.0) as client:
            held = run.take(client, 5)
        began = time.monotonic()
        second = stack.enter_context(run.server("node-b", "--takeover"))

        assert first.wait(deadline_s=20) == 1
        assert "on node-b) took over" in first.output
        second.wait_for_line(READY, deadline_s=30)
        assert time.monotonic() - began > 10
        run.finish(second, held)


@pytest.mark.slow
def test_the_server_of_another_node_that_was_killed_is_replaced_after_half_a_minute(
    run: Run,
) -> None:
    with run.server("node-a") as first:
        first.wait_for_line(READY)
        stop_for_good(first)
    began = time.monotonic()
    with run.server("node-b") as second:
        second.wait_for_line(READY, deadline_s=60)
        assert time.monotonic() - began > 29
        assert "may still live" in second.output
        run.finish(second, [])


def test_the_server_of_this_node_that_was_killed_is_replaced_at_once(run: Run) -> None:
    with run.server("node-a") as first:
        first.wait_for_line(READY)
        epoch = json.loads(Path(run.address[1:]).read_bytes())["epoch"]
        stop_for_good(first)
    with run.server("node-a") as second:
        second.wait_for_line(READY)
        assert "may still live" not in second.output
        assert json.loads(Path(run.address[1:]).read_bytes())["epoch"] > epoch
        run.finish(second, [])
