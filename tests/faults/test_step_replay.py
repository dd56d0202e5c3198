"""What is asked again when workers and servers of tasks with several steps are killed.

The model server's call log is the witness: it outlives every kill, and tells for each step when it
was asked and when it was answered. The journal, as each kill left it, tells what was recorded.
"""

from __future__ import annotations

import http.client
import json
import re
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from dispatcher.core.events import Finished, LeaseEnded, Stepped, StepsCut
from dispatcher.storage.files import Files
from dispatcher.storage.journal import Journal
from dispatcher.storage.records import Checkpoint
from tests.faults.step_tasks import STEPS_AT_ONCE, STEPS_IN_TURN
from tests.faults.test_kills import SEED, RunFiles, fakellm, serving, status_of, words
from tests.support.processes import Process, running, wait_until

TASKS = "tests/faults/step_tasks.py"
LATE_S = 0.25
"""How long after its answer a step may still be lost."""

END_S = 120.0
_AT_WORK = re.compile("^at work")
_SERVING = re.compile(r"dispatcher-server: run \S+ at \S+")

Key = tuple[int, int, int]
"""A step: its line, its yield, its place there."""


# -------------------------------------------------------------------- the witnesses


@dataclass
class Call:
    """One request as the model server saw it; `answered_at` is None when it had no answer."""

    key: Key
    at: float
    answered_at: float | None = None


def read_calls(call_log: Path) -> list[Call]:
    """Return the calls in the order they came."""
    calls: dict[tuple[str, int], Call] = {}
    for text in call_log.read_text().splitlines():
        line = json.loads(text)
        call = line["server"], line["call"]  # several servers may share the log
        if line["event"] == "call":
            of_line, of_yield, place = map(int, line["prompt"].split()[:3])
            calls[call] = Call((of_line, of_yield, place), line["t"])
        elif line["status"] == 200:
            calls[call].answered_at = line["t"]
    return list(calls.values())


@dataclass
class Recorded:
    """What a server would know that started now: the steps of open lines, and the lines done."""

    steps: set[Key] = field(default_factory=set)
    done: set[int] = field(default_factory=set)
    cuts: int = 0

    def cut(self, of_line: int, position: tuple[int, int]) -> None:
        """Forget the line's steps from this position on."""
        self.cuts += 1
        self.steps = {key for key in self.steps if key[0] != of_line or key[1:] < position}


def read_recorded(files: RunFiles) -> Recorded:
    """Read the journal as it stands, also while it is being written."""
    found = Recorded()
    with TemporaryDirectory() as name:
        # A copy, because reading cuts off a torn end; the last segment may just be beginning.
        for path in sorted((files.state_dir / "journal").glob("*.journal"))[-2:]:
            with suppress(FileNotFoundError):  # no longer needed, and deleted
                (Path(name) / path.name).write_bytes(path.read_bytes())
        for entry in Journal(Path(name), Files()).replay_last():
            match entry.record:
                case Checkpoint(queue):
                    items = {item.work_id: item for item in queue.items}
                    found.done = set(range(queue.next_work_id)) - items.keys()
                    found.steps = {
                        (item.work_id, *step.position)
                        for item in queue.items
                        for step in item.steps
                    }
                case Stepped(work_id, _, position):
                    found.steps.add((work_id, *position))
                case Finished(work_ids):
                    found.done |= set(work_ids)
                case StepsCut(work_id, position):
                    found.cut(work_id, position)
                case LeaseEnded(work_id, keep_yields=int(first)):
                    found.cut(work_id, (first, 0))
    found.steps = {key for key in found.steps if key[0] not in found.done}
    return found


@dataclass
class Kill:
    """The end of a process: asked for at `at`; at `until` nothing of it was under way any more.

    `recorded` is what the journal held then.
    """

    what: str
    at: float
    until: float
    recorded: Recorded


# -------------------------------------------------------------------- the run


@dataclass
class Run:
    """A run of one worker, both of which are ended again and again, at moments drawn by `rng`."""

    files: RunFiles
    task: str
    base_url: str
    call_log: Path
    rng: Random
    slots: int = 32
    longest_work_s: float = 1.2
    kills: list[Kill] = field(default_factory=list)
    done_at_last_kill: int = 0

    def torment(self, order: list[str]) -> dict[str, Any]:
        """Kill what `order` names, one after the other; return the run's last status."""
        self._server = self._start_server()
        self._worker = self._start_worker()
        try:
            for what in order:
                self._let_work(may_be_starting=what == "KILL")
                if what == "server":
                    self._kill_server()
                else:
                    self._end_worker(what)
            wait_until(lambda: status_of(self.files).get("state") == "complete", "the end", END_S)
            status = status_of(self.files)
            assert self._worker.wait(30) == 0, self._worker.output
            assert self._server.wait(30) == 0, self._server.output
        finally:
            self._worker.kill()
            self._server.kill()
        return status

    def _let_work(self, *, may_be_starting: bool) -> None:
        if may_be_starting and self.rng.random() < 0.15:
            time.sleep(self.rng.uniform(0, 1))
            return
        if not _AT_WORK.search(self._worker.output):
            self._worker.wait_for_line(_AT_WORK, deadline_s=30)
        time.sleep(self.rng.uniform(0, self.longest_work_s))

    def _end_worker(self, how: str) -> None:
        at = time.time()
        if how == "TERM":
            self._worker.stop()
            assert self._worker.wait() == 3, self._worker.output
        else:
            self._worker.kill()
            assert self._worker.wait() == -signal.SIGKILL, self._worker.output
        # What it had sent is in the log before what the next one sends.
        wait_until(lambda: self._in_flight() == 0, "the model server to notice")
        self._note("worker", at)
        self._worker = self._start_worker()

    def _kill_server(self) -> None:
        at = time.time()
        self._server.kill()
        assert self._server.wait() == -signal.SIGKILL, self._server.output
        self._note("server", at)
        self._server = self._start_server()
        # What was answered while there was no server can be told only now. It is no cost of the
        # next kill that a worker had nobody to tell.
        steps_then = self._steps()
        wait_until(lambda: self._steps() > steps_then, "steps after a restart", 30)
        time.sleep(2 * LATE_S)

    def _steps(self) -> int:
        return int(status_of(self.files).get("steps", 0))

    def _note(self, what: str, at: float) -> None:
        kill = Kill(what, at, time.time(), read_recorded(self.files))
        self.kills.append(kill)
        self.done_at_last_kill = len(kill.recorded.done)

    def _start_server(self) -> Process:
        server = self.files.start_server()
        server.wait_for_line(_SERVING)
        return server

    def _start_worker(self) -> Process:
        command = [sys.executable, "-m", "dispatcher.taskmanager.cli"]
        command += ["--task", f"{TASKS}:{self.task}", "--dispatcher", self.files.address]
        command += ["--backend", "openai", "--base-url", self.base_url, "--model", "m"]
        return Process(*command, "--workers", str(self.slots), "--batch-size", "4")

    def _in_flight(self) -> int:
        where = urlsplit(self.base_url)
        connection = http.client.HTTPConnection(where.netloc, timeout=10)
        try:
            connection.request("GET", "/calls")
            return int(json.loads(connection.getresponse().read())["in_flight"])
        finally:
            connection.close()


# -------------------------------------------------------------------- the judgement


def needlessly_asked(calls: list[Call], kill: Kill) -> list[Key]:
    """Return what was asked after a kill although the journal had it then."""
    steps, done = kill.recorded.steps, kill.recorded.done
    later = [call.key for call in calls if call.at > kill.until]
    return [key for key in later if key in steps or key[0] in done]


@dataclass
class Judgement:
    """Holds the call log against the journals that the kills left."""

    calls: list[Call]
    kills: list[Kill]
    repeats: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    latest_s: float = 0.0

    def __post_init__(self) -> None:
        self._judge_what_was_recorded()
        self._judge_what_was_not()

    @cached_property
    def by_key(self) -> dict[Key, list[Call]]:
        found: dict[Key, list[Call]] = defaultdict(list)
        for call in self.calls:
            found[call.key].append(call)
        return found

    def _judge_what_was_recorded(self) -> None:
        for number, kill in enumerate(self.kills):
            name = f"kill {number} ({kill.what})"
            if kill.recorded.cuts:
                self.problems.append(f"{name}: the journal drops steps")
            for key in needlessly_asked(self.calls, kill):
                self.problems.append(f"{name}: {key} was in the journal and was asked again")

    def _judge_what_was_not(self) -> None:
        lost: Counter[int] = Counter()
        for key, calls in self.by_key.items():
            for before, again in pairwise(calls):
                number = self._kill_between(before, again)
                if number is None:
                    self.problems.append(f"{key} was asked twice, and nothing killed between")
                    continue
                lost[number] += 1
                self.repeats[self._kind(before, self.kills[number])] += 1
        begun_at = 0.0
        for number, kill in enumerate(self.kills):
            of_worker = [call for call in self.calls if begun_at < call.at <= kill.until]
            kinds = Counter(self._kind(call, kill) for call in of_worker)
            allowed = kinds["in flight"] + kinds["just answered"]
            if lost[number] > allowed:
                self.problems.append(
                    f"kill {number} ({kill.what}): {lost[number]} steps asked again, "
                    f"{allowed} were in flight or just answered"
                )
            if kill.what == "worker":
                self._note_lateness(of_worker, kill)
                begun_at = kill.until

    def _kill_between(self, before: Call, again: Call) -> int | None:
        """Return the kill that cost the first of two calls its worth."""
        between = [n for n, k in enumerate(self.kills) if before.at <= k.until < again.at]
        workers = [n for n in between if self.kills[n].what == "worker"]
        return (workers or between or [None])[0]

    @staticmethod
    def _kind(call: Call, kill: Kill) -> str:
        if call.answered_at is None or call.answered_at > kill.at:
            return "in flight"
        return "just answered" if call.answered_at > kill.at - LATE_S else "answered"

    def _note_lateness(self, calls: list[Call], kill: Kill) -> None:
        for call in calls:
            if call.answered_at is None or call.answered_at > kill.at:
                continue
            if call.key[0] not in kill.recorded.done and call.key not in kill.recorded.steps:
                self.latest_s = max(self.latest_s, kill.at - call.answered_at)


@contextmanager
def run_of(
    tmp_path: Path, task: str, line_count: int, name: str, *fakellm_flags: str
) -> Iterator[Run]:
    # With three dead workers within a term none of them is blamed, so that no item has to run
    # alone; nothing is ever given up.
    files = RunFiles(tmp_path, line_count, ("--lease-term", "8", "--max-retries", "-1"))
    call_log = tmp_path / "calls.jsonl"
    with fakellm("--call-log", str(call_log), *fakellm_flags) as base_url:
        yield Run(files, task, base_url, call_log, Random(f"{SEED} {name}"))


def undisturbed(files: RunFiles, task: str) -> bytes:
    """Return the output of the same input when nobody is killed."""
    output = files.directory / "undisturbed.jsonl"
    with fakellm() as base_url:
        command = [sys.executable, "-m", "dispatcher.taskmanager.cli", "--task", f"{TASKS}:{task}"]
        command += ["--input", str(files.infile), "--output", str(output), "--backend", "openai"]
        with running(*command, "--base-url", base_url, "--model", "m") as process:
            assert process.wait(END_S) == 0, process.output
    return output.read_bytes()


def torment_with_kills(run: Run, steps_a_line: int) -> Judgement:
    """Kill the worker 20 times and the server 5 times; judge and print what came of it."""
    order = ["KILL"] * 20 + ["server"] * 5
    run.rng.shuffle(order)
    status = run.torment(order)
    judged = Judgement(read_calls(run.call_log), run.kills)
    kept = sum(len(kill.recorded.steps) for kill in run.kills)
    steps = run.files.line_count * steps_a_line
    print(
        f"{run.task}: {words(Counter(order))} while {run.done_at_last_kill} of "
        f"{run.files.line_count} lines got done; {steps} steps, {len(judged.calls)} asked, "
        f"repeated: {words(judged.repeats)}; steps of open lines in the journals at the kills: "
        f"{kept}; at most {judged.latest_s * 1000:.0f} ms from an answer to the journal; "
        f"{status['crashed']} crashed, {status['charged']} charged; "
        f"{len(judged.problems)} problems; seed {SEED}"
    )
    assert judged.problems == []
    assert len(judged.by_key) == steps
    assert len(judged.calls) == steps + judged.repeats.total()
    assert run.files.outfile.read_bytes() == undisturbed(run.files, run.task)
    assert run.done_at_last_kill < run.files.line_count, "the run was over before the last kill"
    assert kept > 1000, "hardly anything was recorded at the kills: they show nothing"
    assert status["failed"] == 0
    return judged


@pytest.mark.slow
def test_of_eight_steps_in_turn_no_kill_has_a_recorded_one_asked_again(tmp_path: Path) -> None:
    with run_of(tmp_path, "InTurnTask", 2000, "in turn", "--latency-s", "0.06") as run:
        torment_with_kills(run, STEPS_IN_TURN)


@pytest.mark.slow
def test_of_four_steps_at_once_no_kill_has_a_recorded_one_asked_again(tmp_path: Path) -> None:
    flags = ("--latency-s", "0.05", "--latency-jitter-s", "0.15")
    with run_of(tmp_path, "AtOnceTask", 2000, "at once", *flags) as run:
        torment_with_kills(run, STEPS_AT_ONCE + 1)


@pytest.mark.slow
def test_a_worker_that_is_asked_to_end_loses_no_finished_step(tmp_path: Path) -> None:
    flags = ("--latency-s", "0.05", "--latency-jitter-s", "0.15")
    with run_of(tmp_path, "InTurnTask", 300, "asked to end", *flags) as run:
        run.longest_work_s = 0.6
        status = run.torment(["TERM"] * 6)
        calls = read_calls(run.call_log)
        judged = Judgement(calls, run.kills)
        finished = 0
        for number, stop in enumerate(run.kills):
            before = [call for call in calls if call.at <= stop.at]
            asked_then = {call.key for call in before}
            asked_later = {call.key for call in calls if call.at > stop.until}
            # A task that has asked its next step had the answer to this one in its hands.
            in_hand = {
                (line, step, place)
                for line, step, place in asked_then
                if (line, step + 1, place) in asked_then
            }
            finished += len(in_hand)
            assert not in_hand & asked_later, f"stop {number} of seed {SEED} lost steps"
        print(
            f"{len(run.kills)} SIGTERMs, {finished} steps finished before them; "
            f"repeated: {words(judged.repeats)}; seed {SEED}"
        )
        assert judged.problems == []
        assert run.done_at_last_kill < run.files.line_count
        assert (status["charged"], status["crashed"], status["failed"]) == (0, 0, 0)
        assert run.files.outfile.read_bytes() == undisturbed(run.files, run.task)


@pytest.mark.slow
def test_a_task_that_asks_by_chance_finishes_right_and_its_mismatches_are_counted(
    tmp_path: Path,
) -> None:
    with run_of(tmp_path, "FickleTask", 400, "by chance", "--latency-s", "0.15") as run:
        status = run.torment(["KILL"] * 6 + ["TERM"] * 2)
        calls = read_calls(run.call_log)
    lines = [json.loads(line) for line in run.files.outfile.read_text().splitlines()]
    with fakellm() as base_url:
        wrong = [line for line in lines if answers_to(line["asked"], base_url) != line["answers"]]
    summary = yaml.safe_load((run.files.state_dir / "run.yaml").read_text())["summary"]
    asked_again = [key for kill in run.kills for key in needlessly_asked(calls, kill)]
    mismatches = status["step_mismatches"]
    print(
        f"{len(run.kills)} kills: {len(calls)} requests for {4 * len(lines)} steps, "
        f"{mismatches} mismatches; seed {SEED}"
    )
    assert [line["id"] for line in lines] == list(range(run.files.line_count))
    assert wrong == []
    # The first step is the same each time; only from the second one on is the record void.
    assert [key for key in asked_again if key[1] == 0] == []
    assert 0 < mismatches <= len([key for key in asked_again if key[1] == 1])
    assert summary["step_mismatches"] == mismatches
    assert status["failed"] == 0


def answers_to(prompts: list[str], base_url: str) -> list[str]:
    """Ask the model server itself."""
    where = urlsplit(base_url)
    connection = http.client.HTTPConnection(where.netloc, timeout=10)
    answers = []
    for prompt in prompts:
        body = {"model": "m", "messages": [{"role": "user", "content": prompt}]}
        connection.request("POST", f"{where.path}/chat/completions", json.dumps(body))
        answers.append(json.loads(connection.getresponse().read())["choices"][0]["message"])
    connection.close()
    return [answer["content"] for answer in answers]


@pytest.mark.slow
def test_a_backup_copy_starts_from_the_recorded_steps(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(json.dumps([{"match": "^7 5 ", "first": 1, "hang": True}]))
    flags = ("--latency-s", "0.2", "--rules", str(rules))
    with run_of(tmp_path, "InTurnTask", 40, "backup", *flags) as run, ExitStack() as stack:
        run.slots = 8
        stack.enter_context(serving(run.files))
        workers = [run._start_worker() for _ in range(2)]
        for worker in workers:
            stack.callback(worker.kill)
        assert [worker.wait(60) for worker in workers] == [0, 0]
    times_asked = Counter(call.key for call in read_calls(run.call_log) if call.key[0] == 7)
    # The first worker waits for its answer to this day.
    expected = {(7, step, 0): 2 if step == 5 else 1 for step in range(STEPS_IN_TURN)}
    assert times_asked == expected
    assert run.files.outfile.read_bytes() == undisturbed(run.files, run.task)


@pytest.mark.slow
def test_a_run_over_a_file_goes_on_after_its_recorded_steps(tmp_path: Path) -> None:
    with run_of(tmp_path, "InTurnTask", 300, "a file", "--latency-s", "0.06") as run:
        command = [sys.executable, "-m", "dispatcher.taskmanager.cli"]
        command += ["--task", f"{TASKS}:{run.task}"]
        command += ["--input", str(run.files.infile), "--output", str(run.files.outfile)]
        command += ["--state", str(run.files.state_dir), "--workers", str(run.slots)]
        command += ["--backend", "openai", "--base-url", run.base_url, "--model", "m"]
        for end in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
            asked_before = len(read_calls(run.call_log)) if run.call_log.exists() else 0
            with running(*command) as process:
                wait_until(
                    lambda asked=asked_before: len(read_calls(run.call_log)) > asked + 350,
                    "steps",
                )
                at = time.time()
                process.signal(end)
                assert process.wait() == (3 if end == signal.SIGINT else -end), process.output
            wait_until(lambda: run._in_flight() == 0, "the model server to notice")
            run._note("worker", at)
        with running(*command) as process:
            assert process.wait(END_S) == 0, process.output
        judged = Judgement(read_calls(run.call_log), run.kills)
        kept = sum(len(kill.recorded.steps) for kill in run.kills)
        print(
            f"a file: 3 ends, {kept} steps of open lines in the journals then; "
            f"repeated: {words(judged.repeats)}; seed {SEED}"
        )
        assert judged.problems == []
        assert kept > 100
        assert run.files.outfile.read_bytes() == undisturbed(run.files, run.task)
