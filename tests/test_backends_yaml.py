"""Several model servers in one run, hosted ones among them, with real processes."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.processes import Process, running, wait_until

READY = re.compile(r"fakellm ready at (http://\S+)")
TASK = "examples/generator_and_judge.py:GenerateAndJudgeTask"
CHAT = "examples/chat_task.py:ChatTask"
KEY = "very-secret-key"


class Case:
    """A run's files, and the command that runs it."""

    def __init__(self, directory: Path, lines: int = 20) -> None:
        self.infile, self.outfile = directory / "in.jsonl", directory / "out.jsonl"
        self.config = directory / "run.yaml"
        self.state_dir = directory / "out.jsonl.dispatch"
        content = [
            {"id": n, "messages": [{"role": "user", "content": f"{n}?"}]} for n in range(lines)
        ]
        self.infile.write_text("".join(json.dumps(line) + "\n" for line in content))

    def command(self, task: str, *flags: str | Path) -> list[str]:
        files = ["--input", str(self.infile), "--output", str(self.outfile)]
        return [
            sys.executable,
            "-m",
            "dispatcher.cli",
            "run",
            "--task",
            task,
            *files,
            *map(str, flags),
        ]

    def resume(self, *flags: str | Path) -> list[str]:
        command = [sys.executable, "-m", "dispatcher.cli", "run"]
        return [*command, "--resume", str(self.state_dir), *map(str, flags)]

    def configure(self, **sections: Any) -> None:
        self.config.write_text(yaml.safe_dump(sections))

    @property
    def results(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.outfile.read_text().splitlines()]

    @property
    def written(self) -> int:
        return self.outfile.read_bytes().count(b"\n") if self.outfile.exists() else 0


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@contextmanager
def fakellm(*flags: str | Path, key: str = "") -> Iterator[str]:
    env = {"FAKE_KEY": key} if key else {}
    asked = ["--api-key-env", "FAKE_KEY"] if key else []
    command = [sys.executable, "-m", "dispatcher.fakellm", "--port", "0", *asked, *flags]
    with running(*command, env=env) as process:
        yield process.wait_for_line(READY)[1].rstrip("/").removesuffix("/v1") + "/v1"


def ended(process: Process) -> int:
    return process.wait(deadline_s=90)


def calls(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextmanager
def refusing(status: int, error: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Serve an endpoint that refuses every request; yield its URL, and the paths asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, {"data": []})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.path)
            self.reply(status, {"error": error})

        def reply(self, status: int, content: object) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


def two(generator: str, judge: str, **judges: Any) -> dict[str, Any]:
    hosted = {"kind": "openai", "model": "big-judge", "base_url": judge, "api_key_env": "JUDGE_KEY"}
    small = {"kind": "openai", "model": "small-writer", "base_url": [generator], "workers": 16}
    return {"generator": small, "judge": {**hosted, **judges}}


@pytest.mark.slow
def test_a_generator_and_a_judge_answer_one_run_each_within_its_own_limit(
    case: Case, tmp_path: Path
) -> None:
    writer_log, judge_log = tmp_path / "writer.jsonl", tmp_path / "judge.jsonl"
    rules = tmp_path / "rules.yaml"
    rules.write_text('- {match: "Reply with one digit", choose: ["4"]}\n')
    with (
        fakellm("--latency-s", "0.05", "--call-log", writer_log) as writer,
        fakellm(
            *("--latency-s", "0.02", "--rules", rules, "--call-log", judge_log), key=KEY
        ) as judge,
    ):
        backends = two(writer, judge, concurrency={"max_concurrent_requests": 2})
        case.configure(backends=backends, generation={"max_completion_tokens": 12, "seed": 5})
        command = case.command(TASK, "--config", case.config)
        with running(*command, env={"JUDGE_KEY": KEY}) as process:
            assert ended(process) == 0, process.output
    assert [result["id"] for result in case.results] == list(range(20))
    assert {result["score"] for result in case.results} == {4}
    assert all(len(result["response"].split()) <= 12 for result in case.results)
    assert len([call for call in calls(writer_log) if "status" not in call]) == 20
    arrivals = [call for call in calls(judge_log) if "status" not in call]
    assert len(arrivals) == 20
    assert max(call["in_flight"] for call in arrivals) <= 2

    run = yaml.safe_load((case.state_dir / "run.yaml").read_text())
    assert run["command"]["options"]["backends"] == backends
    assert run["command"]["model"] == {"name": "generator: small-writer, judge: big-judge"}
    for file in case.state_dir.rglob("*"):
        assert file.is_dir() or KEY.encode() not in file.read_bytes(), file
    assert KEY not in process.output


@pytest.mark.slow
def test_a_resumed_run_uses_its_sections_and_a_changed_file_wins(
    case: Case, tmp_path: Path
) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text('- {match: "Reply with one digit", choose: ["2"]}\n')
    moved_log = tmp_path / "moved.jsonl"
    with (
        fakellm("--latency-s", "0.4") as writer,
        fakellm("--rules", rules) as judge,
        fakellm("--rules", rules, "--call-log", moved_log) as moved,
    ):
        case.configure(backends=two(writer, judge, api_key_env="PATH"), concurrency={})
        flags = ("--config", case.config, "--batch-size", "2")
        first = two(writer, judge, api_key_env="PATH")
        first["generator"]["workers"] = 2
        case.configure(backends=first)
        with running(*case.command(TASK, *flags)) as process:
            wait_until(lambda: case.written >= 4, "some lines", deadline_s=60)
            process.stop()
            assert ended(process) == 3, process.output
        case.config.unlink()  # the run knows what stood there
        with running(*case.resume()) as process:
            wait_until(lambda: case.written >= 8, "some more lines", deadline_s=60)
            process.stop()
            assert ended(process) == 3, process.output
        case.configure(backends=two(writer, moved, api_key_env="PATH"))
        with running(*case.resume("--config", case.config)) as process:
            assert ended(process) == 0, process.output
    assert [result["id"] for result in case.results] == list(range(20))
    assert calls(moved_log)
    run = yaml.safe_load((case.state_dir / "run.yaml").read_text())
    assert run["command"]["options"]["backends"]["judge"]["base_url"] == moved


@pytest.mark.slow
def test_a_request_for_a_model_nobody_named_is_an_error_line(case: Case) -> None:
    case.configure(backends={"only": {"kind": "fake"}})
    command = case.command(CHAT, "--config", case.config, "--task-arg", "model=other")
    with running(*command) as process:
        assert ended(process) == 4, process.output
    assert {result["__ERROR__"]["error"] for result in case.results} == {"model_error"}
    assert "none of this run's backends: only" in case.results[0]["__ERROR__"]["message"]


@pytest.mark.slow
def test_models_to_run_share_an_endpoint_and_each_request_goes_to_the_least_loaded(
    case: Case, tmp_path: Path
) -> None:
    logs = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    with (
        fakellm("--latency-s", "0.1", "--call-log", logs[0]) as one,
        fakellm("--latency-s", "0.1", "--call-log", logs[1]) as two_,
    ):
        case.configure(models_to_run=[{"name": "first"}, {"name": "second"}])
        hosted = ("--backend", "cerebras", "--base-url", one, "--base-url", two_)
        command = case.command(CHAT, "--config", case.config, *hosted, "--workers", "8")
        with running(*command) as process:
            assert ended(process) == 0, process.output
    arrivals = [[call for call in calls(log) if "status" not in call] for log in logs]
    assert sum(map(len, arrivals)) == 20
    assert min(map(len, arrivals)) >= 5


@pytest.mark.slow
def test_a_refused_key_ends_the_run_at_once_and_is_never_shown(case: Case) -> None:
    with fakellm(key="the-right-one") as url:
        hosted = ("--backend", "openai", "--base-url", url, "--model", "m")
        with running(*case.command(CHAT, *hosted), env={"OPENAI_API_KEY": KEY}) as process:
            assert ended(process) == 1, process.output
    assert "OPENAI_API_KEY" in process.output
    assert url in process.output
    assert "--resume" in process.output
    assert "starting it again" not in process.output
    assert KEY not in process.output
    assert case.written == 0


@pytest.mark.slow
def test_a_quota_that_is_used_up_stops_the_run_to_be_gone_on_with(case: Case) -> None:
    error = {"message": "You exceeded your current quota", "code": "insufficient_quota"}
    with refusing(429, error) as (url, asked):
        hosted = ("--backend", "openai", "--base-url", url, "--model", "m", "--workers", "2")
        managers = ("--task-managers", "2")
        with running(*case.command(CHAT, *hosted, *managers)) as process:
            assert ended(process) == 3, process.output
    assert "quota" in process.output
    assert f"--resume {case.state_dir}" in process.output
    assert "starting it again" not in process.output
    assert len(asked) <= 8

    with fakellm() as url, running(*case.resume("--base-url", url)) as process:
        assert ended(process) == 0, process.output
    assert len(case.results) == 20
    summary = yaml.safe_load((case.state_dir / "run.yaml").read_text())["summary"]
    assert (summary["done"], summary["charged"]) == (20, 0)


@pytest.mark.parametrize(
    ("gpus", "flags", "words"),
    [
        ("0", ("--task-managers", "2"), ["task manager 2", "CUDA_VISIBLE_DEVICES=0"]),
        (
            "0,1,2",
            ("--task-managers", "2", "--tensor-parallel", "2"),
            ["task manager 2", "GPUs 3 to 4"],
        ),
    ],
)
def test_more_task_managers_than_gpus_are_refused(
    gpus: str, flags: tuple[str, ...], words: list[str], case: Case
) -> None:
    with running(
        *case.command(CHAT, "--model", "m", *flags), env={"CUDA_VISIBLE_DEVICES": gpus}
    ) as process:
        assert ended(process) == 2, process.output
    (said,) = process.output.splitlines()
    for word in words:
        assert word in said
    assert not case.state_dir.exists()


@pytest.mark.slow
def test_each_task_manager_gets_its_own_gpus(case: Case, tmp_path: Path) -> None:
    engine = tmp_path / "engine.sh"
    engine.write_text(f'echo "$CUDA_VISIBLE_DEVICES" >> {tmp_path}/seen; exit 1\n')
    flags = ("--model", "m", "--task-managers", "2", "--tensor-parallel", "2")
    command = case.command(CHAT, *flags, "--vllm-command", f"sh {engine}")
    seen = tmp_path / "seen"
    with running(*command, env={"CUDA_VISIBLE_DEVICES": "4,5,6,7"}) as process:
        assert ended(process) == 1, process.output
    assert set(seen.read_text().split()) <= {"4,5", "6,7"}
    assert seen.read_text().split()
