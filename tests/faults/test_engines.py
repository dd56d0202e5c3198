"""Model servers that die, hang, are stopped or fail to start in the middle of a run.

fakellm is the engine, launched by the real command; the server's own figures and the oracle judge.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults.oracle import Ledger, input_line
from tests.support.processes import Process, Server, dispatcher_server, running, wait_until

pytestmark = pytest.mark.slow

TASK = "tests/faults/engine_task.py:TwoStepTask"
LINES = 200
END_S = 90.0
TERM_S = 5.0

FLAKY = """
import os, sys
from pathlib import Path
count = Path(sys.argv[1])
launches = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(launches))
if launches in (2, 3):
    sys.exit(f"launch {launches}: no GPU memory is free")
os.execv(sys.executable, [sys.executable, "-m", "dispatcher.fakellm", *sys.argv[2:]])
"""


@dataclass
class Run:
    """A server, and one worker that launches its own engine."""

    server: Server
    worker: Process
    lines: list[str]
    outfile: Path
    mark: str

    def status(self) -> dict[str, Any]:
        with self.server.client() as client:
            return client.status()

    def done(self) -> int:
        return int(self.status().get("done", 0))

    def engines(self) -> list[int]:
        """Return the ids of the engine's processes, the guard among them."""
        return [pid for pid in processes_with(self.mark) if pid != self.worker.pid]

    def check_complete(self) -> None:
        """Wait for the end; every line must be answered, and nobody pay."""
        assert self.worker.wait(END_S) == 0, self.worker.output
        assert self.server.process.wait() == 0
        output = self.outfile.read_bytes()
        assert Ledger(0).problems(self.lines, output) == []
        # No tombstone: with --max-retries 0 the first charge would have been the end of an item.
        assert b"__ERROR__" not in output
        self.check_gone()

    def check_gone(self) -> None:
        wait_until(lambda: not processes_with(self.mark), "all processes to be gone", 15)


def processes_with(text: str) -> list[int]:
    """Return the ids of living processes whose command line holds `text`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().decode("utf-8", "replace")
                state = (entry / "stat").read_text().rpartition(") ")[2][0]
            except OSError:
                continue
            if text in command and state not in "ZX":
                found.append(int(entry.name))
    return found


@contextmanager
def run_of(
    tmp_path: Path,
    *flags: str,
    fakellm: str = "--latency-s 0.1",
    rules: list[dict[str, Any]] | None = None,
    command: str | None = None,
    lines: int = LINES,
) -> Iterator[Run]:
    """Start a run; `command` launches an engine of another kind, as a vLLM of the user's."""
    infile, outfile, rules_file = (tmp_path / n for n in ("in.jsonl", "out.jsonl", "rules.yaml"))
    texts = [input_line(number) for number in range(lines)]
    infile.write_text("\n".join(texts) + "\n")
    rules_file.write_text(yaml.safe_dump(rules or []))
    engine = f"{fakellm} --rules {rules_file}"
    files = ("--infile", infile, "--outfile", outfile)
    with dispatcher_server(*files, "--max-retries", "0", "--lease-term", str(TERM_S)) as server:
        argv = [sys.executable, "-m", "dispatcher.taskmanager.cli", "--task", TASK]
        argv += ["--dispatcher", server.at, "--workers", "8", *flags]
        if command is None:
            argv += ["--backend", "fake", f"--fakellm-args={engine}"]
        else:
            argv += ["--model", "m", "--vllm-command", command, f"--vllm-extra-args={engine}"]
        with running(*argv) as worker:
            yield Run(server, worker, texts, outfile, str(rules_file))


def test_an_engine_that_exits_again_and_again_costs_nobody_anything(tmp_path: Path) -> None:
    rules = [{"after_calls": 60, "exit": 9}]
    with run_of(tmp_path, "--engine-restarts", "20", rules=rules) as run:
        run.check_complete()
        assert run.worker.output.count("the model server is back") >= 3


def test_an_engine_that_hangs_while_its_health_page_answers_is_found(tmp_path: Path) -> None:
    rules = [{"after_calls": 100, "hang": True}]
    with run_of(tmp_path, "--hang-timeout", "2", rules=rules) as run:
        run.check_complete()
        told = r"fakellm hangs: for \d+ s it made no progress, with \d+ requests unanswered, and"
        assert re.search(told, run.worker.output)


def test_an_engine_that_stands_still_as_a_whole_is_found(tmp_path: Path) -> None:
    rules = [{"after_calls": 100, "until_calls": 101, "freeze_s": 1000}]
    with run_of(tmp_path, "--hang-timeout", "2", rules=rules) as run:
        run.check_complete()
        assert "fakellm hangs: for " in run.worker.output


def test_an_engine_whose_processes_are_stopped_is_found(tmp_path: Path) -> None:
    with run_of(tmp_path, "--hang-timeout", "2") as run:
        wait_until(lambda: run.done() > 20, "lines that are done", 30)
        stopped = run.engines()
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        run.check_complete()
        assert "fakellm hangs: for " in run.worker.output
        assert not set(stopped) & set(processes_with(run.mark))


def test_a_burst_that_makes_the_engine_slow_is_no_hang(tmp_path: Path) -> None:
    # Answers take 6 s, three times the time-out; the engine's counters move meanwhile.
    slow = "--latency-s 6"
    with run_of(tmp_path, "--hang-timeout", "2", "--workers", "64", fakellm=slow, lines=64) as run:
        run.check_complete()
        assert "hangs" not in run.worker.output
        assert "starting it again" not in run.worker.output


def test_launches_that_fail_after_a_crash_are_tried_again(tmp_path: Path) -> None:
    script = tmp_path / "flaky.py"
    script.write_text(FLAKY)
    command = [sys.executable, str(script), str(tmp_path / "launches")]
    command += ["--api-key-env", "VLLM_API_KEY"]
    with run_of(tmp_path, command=shlex.join(command)) as run:
        wait_until(lambda: run.done() > 20, "lines that are done", 30)
        for pid in run.engines():
            os.kill(pid, signal.SIGKILL)
        run.check_complete()
        said = run.worker.output
        assert said.count("no GPU memory is free") == 2
        assert "(3 more restarts within this hour): vLLM ended with exit code -9" in said
        assert "(1 more restarts within this hour): vLLM ended with exit code 1;" in said
        assert (tmp_path / "launches").read_text() == "4"


def test_beyond_the_budget_the_items_are_given_back_uncharged_and_the_worker_ends_with_1(
    tmp_path: Path,
) -> None:
    # Not as the first call: that a request never works is then the engine's doing, not its own.
    rules = [{"after_calls": 10, "exit": 9}]
    with run_of(tmp_path, "--engine-restarts", "1", rules=rules) as run:
        assert run.worker.wait(END_S) == 1, run.worker.output
        # At once; but for what the server was just handing out when the worker ended.
        wait_until(lambda: run.status()["issued"] == 0, "the items to be back", 2 * TERM_S)
        status = run.status()
        assert status["charged"] == 0
        assert 0 < status["done"] < LINES
        last = run.worker.output.rpartition("dispatcher-task-run: ")[2]
        assert last.startswith(
            "the model server failed again after 1 restarts within an hour (--engine-restarts): "
            "fakellm ended with exit code 9; its log "
        )
        assert "fakellm ready at " in last
        run.check_gone()


def test_an_engine_that_does_not_start_at_all_ends_the_worker_at_once(tmp_path: Path) -> None:
    with run_of(tmp_path, fakellm="--no-such-option") as run:
        assert run.worker.wait(END_S) == 1
        assert "dispatcher-task-run: fakellm ended with exit code 2; its log " in run.worker.output
        assert "--no-such-option" in run.worker.output
        assert run.status()["issued"] == 0
        run.check_gone()


def test_a_worker_that_is_stopped_while_its_engine_is_restarted_gives_everything_back(
    tmp_path: Path,
) -> None:
    script = tmp_path / "slow_start.py"
    script.write_text(FLAKY.replace("sys.exit(", "import time; time.sleep(60); sys.exit("))
    command = [sys.executable, str(script), str(tmp_path / "launches")]
    command += ["--api-key-env", "VLLM_API_KEY"]
    with run_of(tmp_path, command=shlex.join(command)) as run:
        wait_until(lambda: run.done() > 20, "lines that are done", 30)
        for pid in run.engines():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: (tmp_path / "launches").read_text() == "2", "a restart", 30)
        run.worker.stop()
        assert run.worker.wait(30) == 3, run.worker.output
        status = run.status()
        assert (status["issued"], status["charged"]) == (0, 0)
        run.check_gone()
