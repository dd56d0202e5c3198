"""A server that is killed for good: what its workers finish afterwards is not computed again.

The model server's call log is the witness.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from random import Random

import pytest
import yaml

from dispatcher.server_file import read_server_file
from dispatcher.storage.files import Files
from dispatcher.storage.spool import SPOOL_DIR, Spool
from tests.faults.test_kills import SEED, RunFiles, fakellm, serving, status_of
from tests.support.processes import Process, wait_until

LINES = 240
END_S = 90.0
_AWAY = re.compile("the server does not answer")
_SERVER_LOST = 5
_STOPPED = 3


@contextmanager
def worker(files: RunFiles, base_url: str, *flags: str) -> Iterator[Process]:
    command = [sys.executable, "-m", "dispatcher.taskmanager.cli"]
    command += ["--task", "tests/faults/kill_task.py:TwoStepTask", "--dispatcher", files.address]
    command += ["--backend", "openai", "--base-url", base_url, "--model", "m"]
    process = Process(*command, "--workers", "8", "--batch-size", "8", *flags)
    try:
        yield process
    finally:
        process.kill()


def spooled(files: RunFiles, run: str) -> list[int]:
    """Return the lines whose results wait in the spool."""
    spool = Spool(files.state_dir, Files())
    found: list[int] = []
    for name in spool.names():
        file = spool.open(name, run)
        assert file is not None
        while results := file.next_results():
            found += [result.work_id for result in results]
        file.close()
    return found


def asked(call_log: Path) -> Counter[str]:
    """Return how often each prompt was asked."""
    calls = [json.loads(text) for text in call_log.read_text().splitlines()]
    return Counter(call["prompt"] for call in calls if call["event"] == "call")


def gives_up(process: Process) -> None:
    assert process.wait(END_S) == _SERVER_LOST, process.output
    assert "--server-timeout" in process.output


def is_stopped(process: Process) -> None:
    process.wait_for_line(_AWAY, END_S)
    time.sleep(1.0)  # in which it finishes something
    process.stop()
    assert process.wait(END_S) == _STOPPED, process.output


def is_killed_when_it_has_spooled(process: Process) -> None:
    process.signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("how", ["gives up", "is stopped", "is killed"])
def test_what_workers_finish_without_a_server_is_in_the_output_and_not_asked_again(
    tmp_path: Path, how: str
) -> None:
    files = RunFiles(tmp_path / "run", LINES, ("--lease-term", "2"))
    call_log = tmp_path / "calls.jsonl"
    patience = ("--server-timeout", "4") if how == "gives up" else ()
    flags = ("--latency-s", "0.3", "--latency-jitter-s", "0.3", "--call-log", str(call_log))
    with fakellm(*flags) as base_url:
        with (
            serving(files) as server,
            worker(files, base_url, *patience) as one,
            worker(files, base_url, *patience) as other,
        ):
            run = read_server_file(files.state_dir / "server.json").run
            wait_until(lambda: status_of(files)["done"] >= 20, "the first results", END_S)
            server.signal(signal.SIGKILL)
            server.wait()
            if how == "is killed":
                spool = Spool(files.state_dir, Files())
                wait_until(lambda: len(spool.names()) == 2, "a file of each", END_S)
            for process in (one, other):
                {
                    "gives up": gives_up,
                    "is stopped": is_stopped,
                    "is killed": is_killed_when_it_has_spooled,
                }[how](process)
        left = sorted(set(spooled(files, run)))
        assert len(left) >= 8
        assert all(asked(call_log)[f"line {number}"] == 1 for number in left)

        rng = Random(SEED)
        for _ in range(4):  # it is killed while it starts, and while it takes them in
            again = files.start_server()
            time.sleep(rng.uniform(0.3, 1.5))
            again.kill()
        still_there = len(spooled(files, run))
        with serving(files) as server, worker(files, base_url) as last:
            assert status_of(files)["spooled_results"] <= still_there
            assert not spooled(files, run)
            assert last.wait(END_S) == 0, last.output
            assert server.wait(END_S) == 0, server.output
        for process in (one, other):
            assert len(_AWAY.findall(process.output)) == 1, process.output
            assert "Traceback" not in process.output
        print(f"{len(left)} results from the spool; seed {SEED}")

    output = [json.loads(text) for text in files.outfile.read_text().splitlines()]
    assert [line["id"] for line in output] == list(range(LINES))
    calls = asked(call_log)
    assert {number: calls[f"line {number}"] for number in left} == dict.fromkeys(left, 1)
    assert not (files.state_dir / SPOOL_DIR).exists()
    summary = yaml.safe_load((files.state_dir / "run.yaml").read_text())["summary"]
    assert summary["charged"] == 0, "an item's retry_count grew"


@contextmanager
def counting_connections(port: int) -> Iterator[list[float]]:
    """Hang up on everybody who connects; yields when they came."""
    came: list[float] = []
    with socket.create_server(("127.0.0.1", port)) as listener:

        def hang_up() -> None:
            with suppress(OSError):  # the end
                while True:
                    listener.accept()[0].close()
                    came.append(time.monotonic())

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        yield came
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(END_S)


@pytest.mark.slow
def test_a_worker_calls_an_absent_server_seldom_and_says_once_that_it_went_and_came_back(
    tmp_path: Path,
) -> None:
    files = RunFiles(tmp_path / "run", LINES, ())
    with fakellm("--latency-s", "0.3") as base_url, ExitStack() as stack:
        server = stack.enter_context(serving(files))
        one = stack.enter_context(worker(files, base_url))
        wait_until(lambda: status_of(files)["done"] >= 20, "the first results", END_S)
        server.signal(signal.SIGKILL)
        server.wait()
        with counting_connections(files.port) as came:
            one.wait_for_line(_AWAY, END_S)
            time.sleep(4.0)
        # A few calls each backing off to 5 s, and a heartbeat a second; not thousands.
        assert 3 <= len(came) <= 40, len(came)
        server = stack.enter_context(serving(files))
        assert one.wait(END_S) == 0, one.output
        assert server.wait(END_S) == 0, server.output
    assert len(_AWAY.findall(one.output)) == 1, one.output
    assert one.output.count("the server answers again") == 1, one.output
    assert "Traceback" not in one.output
    assert [json.loads(text)["id"] for text in files.outfile.open()] == list(range(LINES))
