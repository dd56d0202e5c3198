"""Whole runs with real processes, killed for real, against fakellm."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import (
    ROOT,
    Process,
    Server,
    dispatcher_server,
    running,
    wait_until,
)

CHAT = "examples/chat_task.py:ChatTask"
READY = re.compile(r"fakellm ready at (\S+)")


def write_prompts(path: Path, count: int) -> None:
    lines = (
        json.dumps({"id": n, "messages": [{"role": "user", "content": f"question {n}"}]})
        for n in range(count)
    )
    path.write_text("\n".join(lines) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    assert data.endswith(b"\n")
    # As bytes, which end a line where the output does: a model may well answer with U+2028.
    return [json.loads(line) for line in data.splitlines()]


def asked_prompts(call_log: Path) -> list[str]:
    lines = (json.loads(line) for line in call_log.read_text().splitlines())
    return [line["prompt"] for line in lines if line["event"] == "call"]


@contextmanager
def fakellm(*flags: str | Path) -> Iterator[str]:
    with running(sys.executable, "-m", "dispatcher.fakellm", "--port", "0", *flags) as process:
        yield process.wait_for_line(READY)[1]


@contextmanager
def task_manager(server: Server, base_url: str, *flags: str | Path) -> Iterator[Process]:
    command = [sys.executable, "-m", "dispatcher.taskmanager.cli", "--dispatcher", server.at]
    command += ["--backend", "openai", "--base-url", base_url, "--model", "m", *map(str, flags)]
    with running(*command) as process:
        yield process


def done(server: Server) -> int:
    with server.client() as client:
        return int(client.status().get("done", 0))


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


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
            if text in command and state != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_twenty_thousand_lines_survive_the_death_of_a_worker_and_of_the_server(
    tmp_path: Path,
) -> None:
    infile, outfile = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_prompts(infile, 20_000)
    files = ("--infile", infile, "--outfile", outfile, "--lease-term", "5")
    flags = ("--task", CHAT, "--workers", "128")
    with ExitStack() as stack:
        base_url = stack.enter_context(fakellm("--latency-s", "0.1"))
        server = stack.enter_context(dispatcher_server(*files))
        first = stack.enter_context(task_manager(server, base_url, *flags))
        second = stack.enter_context(task_manager(server, base_url, *flags))
        wait_until(lambda: done(server) >= 10_000, "half of the lines", deadline_s=120)

        first.kill()
        server.process.kill()
        port = server.address.rpartition(":")[2]
        again = stack.enter_context(dispatcher_server(*files, "--port", port))

        assert second.wait(deadline_s=180) == 0
        assert again.process.wait(deadline_s=30) == 0
    assert [line["id"] for line in read_lines(outfile)] == list(range(20_000))


@pytest.mark.slow
def test_after_ctrl_c_the_same_command_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    infile, outfile, calls = (tmp_path / n for n in ("in.jsonl", "out.jsonl", "calls.jsonl"))
    write_prompts(infile, 120)
    command = [sys.executable, "-m", "dispatcher.cli", "run", "--task", CHAT]
    command += ["--input", str(infile), "--output", str(outfile), "--backend", "fake"]
    command += ["--workers", "4", f"--fakellm-args=--latency-s 0.3 --call-log {calls}"]
    with running(*command) as first:
        wait_until(
            lambda: outfile.exists() and outfile.read_bytes().count(b"\n") >= 40,
            "a third of the lines",
            deadline_s=60,
        )
        asked_at = time.monotonic()
        first.signal(signal.SIGINT)
        assert first.wait() == 3
        assert time.monotonic() - asked_at < 6
        assert f"go on with: dispatcher run --resume {outfile}.dispatch" in first.output
    written = {line["messages"][0]["content"] for line in read_lines(outfile)}
    asked_before = len(asked_prompts(calls))
    assert 40 <= len(written) < 120

    with running(*command) as second:
        assert second.wait(deadline_s=60) == 0

    assert [line["id"] for line in read_lines(outfile)] == list(range(120))
    assert not written & set(asked_prompts(calls)[asked_before:])
    assert processes_with(str(tmp_path)) == []


@pytest.mark.slow
def test_a_complete_run_says_so_and_leaves_the_output_alone(tmp_path: Path) -> None:
    infile, outfile = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_prompts(infile, 5)
    command = [sys.executable, "-m", "dispatcher.cli", "run", "--task", CHAT, "--backend", "fake"]
    command += ["--input", str(infile), "--output", str(outfile)]
    with running(*command) as first:
        assert first.wait(deadline_s=60) == 0
    before = outfile.read_bytes(), outfile.stat().st_mtime_ns
    with running(*command) as second:
        assert second.wait(deadline_s=60) == 0
        assert "complete: 5 lines" in second.output
    assert (outfile.read_bytes(), outfile.stat().st_mtime_ns) == before


@pytest.mark.slow
def test_the_rehearsal_of_the_comparison_in_the_readme_gives_a_verdict_on_every_line(
    tmp_path: Path,
) -> None:
    outfile, calls = tmp_path / "compared.jsonl", tmp_path / "calls.jsonl"
    command = [sys.executable, "-m", "dispatcher.cli", "run", "--backend", "fake"]
    command += ["--task", "examples/example_task.py:CompareTwoResponsesTask"]
    command += ["--input", "examples/data/prompts.jsonl", "--output", str(outfile)]
    rules = f"--rules examples/data/fake_judge.yaml --call-log {calls}"
    with running(*command, f"--fakellm-args={rules}") as run:
        assert run.wait(deadline_s=60) == 0, run.output
        tokens = re.search(r"(\d+) tokens generated", run.output)
    assert tokens is not None
    assert int(tokens[1]) > 0
    assert {line["verdict"] for line in read_lines(outfile)} == {"A", "B"}
    assert len(asked_prompts(calls)) >= 300


@pytest.mark.slow
def test_bad_lines_become_errors_at_their_positions_and_the_others_are_done(
    tmp_path: Path,
) -> None:
    infile, outfile = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = b'{"messages": [{"role": "user", "content": "hello"}]}'
    long = b'{"messages": [{"role": "user", "content": "' + b"x" * 3000 + b'"}]}'
    infile.write_bytes(b"\n".join([good, b"\xff\xfe", good, b"", b"no json", good, long, good]))
    command = [sys.executable, "-m", "dispatcher.cli", "run", "--task", CHAT, "--backend", "fake"]
    command += ["--input", str(infile), "--output", str(outfile), "--max-line-bytes", "2000"]
    with running(*command) as process:
        assert process.wait(deadline_s=60) == 4
    lines = read_lines(outfile)
    kinds = [line.get("__ERROR__", {}).get("error") for line in lines]
    expected = [None, "undecodable_line", None, "blank_line", "invalid_json", None, "line_too_long"]
    assert kinds == [*expected, None]
    assert all(line["response"] for line in lines if "response" in line)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["file", "server"])
def test_tasks_that_misbehave_harm_no_other_line(mode: str, tmp_path: Path) -> None:
    kinds = ["plain", "key_error", "nothing", "one", "slow", "none", "plain", "one"] * 15
    kinds[40] = kinds[80] = "blocking"
    infile, outfile = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    seconds = {"slow": 2, "blocking": 40}
    infile.write_text(
        "".join(
            json.dumps({"id": n, "kind": kind, "seconds": seconds.get(kind, 0)}) + "\n"
            for n, kind in enumerate(kinds)
        )
    )
    # The lease term is far below the 40 s: heartbeats must not depend on the task's code.
    flags = ["--task", "tests/support/odd_tasks.py:OddTask", "--workers", "8"]
    limits = ["--max-retries", "1", "--lease-term", "5"]
    with ExitStack() as stack:
        if mode == "server":
            files = ("--infile", infile, "--outfile", outfile)
            server = stack.enter_context(dispatcher_server(*files, *limits))
            base_url = stack.enter_context(fakellm())
            worker = stack.enter_context(task_manager(server, base_url, *flags))
        else:
            command = [sys.executable, "-m", "dispatcher.taskmanager.cli", "--backend", "fake"]
            command += ["--input", str(infile), "--output", str(outfile), *flags, *limits]
            worker = stack.enter_context(running(*command))
        assert worker.wait(deadline_s=100) == 0
    lines = read_lines(outfile)
    assert len(lines) == len(kinds)
    for number, (kind, line) in enumerate(zip(kinds, lines, strict=True)):
        if kind == "key_error":
            assert line["__ERROR__"]["error"] == "task_exception"
            assert "missing" in line["__ERROR__"]["message"]
            assert "odd_tasks.py" in line["__ERROR__"]["place"]
        elif kind == "none":
            assert line["__ERROR__"]["error"] == "result_not_dict"
        else:
            assert line["id"] == number
            assert line["text"]


@pytest.mark.slow
def test_a_worker_that_is_told_to_stop_gives_everything_back_uncharged(tmp_path: Path) -> None:
    infile, outfile = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_prompts(infile, 200)
    with ExitStack() as stack:
        base_url = stack.enter_context(fakellm("--latency-s", "30"))
        server = stack.enter_context(
            dispatcher_server("--infile", infile, "--outfile", outfile, "--retry", "1")
        )
        worker = stack.enter_context(task_manager(server, base_url, "--task", CHAT))
        client = stack.enter_context(server.client())
        wait_until(lambda: client.status()["requests_in_flight"] >= 32, "requests", deadline_s=30)
        asked_at = time.monotonic()
        worker.stop()
        assert worker.wait() == 3, worker.output
        assert time.monotonic() - asked_at < 5
        status = client.status()
        assert (status["issued"], status["charged"], status["crashed"]) == (0, 0, 0)
        assert status["released"] > 0
        again = client.get_work(200)
        assert [item.retry_count for item in again.items] == [0] * 200


@pytest.mark.slow
def test_a_worker_that_starts_after_the_run_is_complete_ends_without_starting_a_model(
    tmp_path: Path,
) -> None:
    infile, outfile = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    infile.write_text("\n")
    calls = tmp_path / "calls.jsonl"
    with dispatcher_server("--infile", infile, "--outfile", outfile) as server:
        with server.client("w") as client:
            wait_until(lambda: client.get_work().status == "all_work_complete", "completion")
        command = [sys.executable, "-m", "dispatcher.taskmanager.cli", "--backend", "fake"]
        command += [
            "--task",
            CHAT,
            "--dispatcher",
            server.at,
            f"--fakellm-args=--call-log {calls}",
        ]
        with running(*command) as worker:
            assert worker.wait() == 0
    assert "nothing to do" in worker.output
    assert not calls.exists()


@pytest.mark.slow
def test_a_killed_worker_takes_its_model_server_along(tmp_path: Path) -> None:
    infile, outfile = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_prompts(infile, 50)
    mark = f"--call-log={tmp_path / 'calls.jsonl'}"
    command = [sys.executable, "-m", "dispatcher.taskmanager.cli", "--backend", "fake"]
    command += ["--task", CHAT, "--input", str(infile), "--output", str(outfile)]
    with running(*command, f"--fakellm-args=--latency-s 60 {mark}") as worker:
        wait_until((tmp_path / "calls.jsonl").exists, "a request", deadline_s=30)
        worker.kill()
    wait_until(lambda: not processes_with(mark), "the model server to end", deadline_s=15)


@pytest.mark.slow
def test_a_task_manager_that_dies_in_a_run_is_started_again(tmp_path: Path) -> None:
    infile, outfile = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_prompts(infile, 200)
    command = [sys.executable, "-m", "dispatcher.cli", "run", "--task", CHAT, "--backend", "fake"]
    command += ["--input", str(infile), "--output", str(outfile), "--workers", "4"]
    command += ["--lease-term", "3", "--fakellm-args=--latency-s 0.2"]
    with running(*command) as run:
        wait_until(lambda: outfile.exists() and outfile.stat().st_size > 0, "output", deadline_s=60)
        logs = f"{outfile}.dispatch/logs/task-manager-0"
        guarded = [p for p in processes_with(logs) if "backend.guard" not in command_of(p)]
        (worker,) = [pid for pid in guarded if "dispatcher.taskmanager.cli" in command_of(pid)]
        os.kill(worker, signal.SIGKILL)
        assert run.wait(deadline_s=90) == 0
        assert "starting it again" in run.output
    assert [line["id"] for line in read_lines(outfile)] == list(range(200))


@pytest.mark.slow
def test_a_line_that_kills_every_model_server_ends_as_a_tombstone_and_costs_no_other_line(
    tmp_path: Path,
) -> None:
    infile, outfile, rules = (tmp_path / n for n in ("in.jsonl", "out.jsonl", "rules.yaml"))
    write_prompts(infile, 500)
    rules.write_text('- {match: "question 123$", exit: 1}\n')
    command = [sys.executable, "-m", "dispatcher.cli", "run", "--task", CHAT, "--backend", "fake"]
    command += ["--input", str(infile), "--output", str(outfile), "--workers", "16"]
    command += ["--max-retries", "1", f"--fakellm-args=--latency-s 0.2 --rules {rules}"]
    with running(*command) as run:
        assert run.wait(deadline_s=120) == 4, run.output
    lines = read_lines(outfile)
    assert [line.get("id") for line in lines] == [n if n != 123 else None for n in range(500)]
    tombstone = lines[123]["__ERROR__"]
    assert tombstone["error"] == "max_retries_exceeded"
    assert [attempt["kind"] for attempt in tombstone["attempts"]] == ["crashed"] * 4
    # Two crashes in company, then alone, where each is charged; nobody else pays.
    assert "2 charged reissues" in run.output


@pytest.mark.model
def test_the_quick_start_answers_a_hundred_prompts(tmp_path: Path) -> None:
    outfile = tmp_path / "out.jsonl"
    with running("bash", "scripts/quickstart.sh", "--output", outfile) as run:
        assert run.wait(deadline_s=300) in (0, 4), run.output
    prompts = read_lines(ROOT / "examples" / "data" / "prompts.jsonl")
    answers = read_lines(outfile)
    assert len(answers) == len(prompts) == 100
    texts = []
    for prompt, answer in zip(prompts, answers, strict=True):
        if "__ERROR__" not in answer:
            assert answer["id"] == prompt["id"]
            assert answer["response"] != prompt["messages"][-1]["content"]
            texts.append(answer["response"].strip())
    assert sum(bool(text) for text in texts) >= 95
    assert len(set(texts)) >= 90
