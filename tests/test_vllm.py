"""Real vLLM on the CPU, launched by the task manager: killed, stopped, two at once, and gone."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import VLLM_PYTHON
from tests.faults.oracle import Ledger
from tests.support.processes import Process, Server, dispatcher_server, running, wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

START_S = 240.0
"""Far above what the start of the tiny model takes while all cores are busy."""

ENGINE = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("vllm") / "tiny-model"
    with running(os.environ[VLLM_PYTHON], "tests/support/tiny_model.py", directory) as maker:
        assert maker.wait(120) == 0, maker.output
    return directory


def write_lines(path: Path, count: int) -> list[str]:
    lines = [
        json.dumps({"id": n, "messages": [{"role": "user", "content": f"Tell story {n}."}]})
        for n in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return lines


def vllm_options(model: Path, log_dir: Path) -> list[str]:
    python = os.environ[VLLM_PYTHON]
    options = ["--model", str(model)]
    options += ["--vllm-command", f"{python} -m vllm.entrypoints.openai.api_server"]
    options += ["--max-model-len", "1024", "--enforce-eager", "--workers", "4"]
    options += ["--vllm-extra-args=--dtype bfloat16", "--log-dir", str(log_dir)]
    return [*options, "--startup-timeout", str(START_S)]


API_SERVER = "vllm.entrypoints.openai.api_server"


def processes_of(model: Path) -> dict[int, list[str]]:
    """Return the command lines of the living processes of all engines that serve the model, by id.

    An engine's own processes have other names and no arguments, but are of the same group.
    """
    found: dict[int, tuple[int, list[str]]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            state, _, group = (entry / "stat").read_text().rpartition(") ")[2].split()[:3]
        except OSError:
            continue
        if state not in "ZX":
            found[int(entry.name)] = int(group), command
    groups = {
        group for group, command in found.values() if {API_SERVER, str(model)} <= set(command)
    }
    return {pid: command for pid, (group, command) in found.items() if group in groups}


def of_kind(model: Path, kind: str) -> int:
    """Return the id of the engine's one process that has `kind` in its command line."""
    guard = "dispatcher.taskmanager.backend.guard"
    processes = processes_of(model)
    found = [pid for pid, words in processes.items() if kind in words and guard not in words]
    assert len(found) == 1, processes
    return found[0]


def kill_api_server(model: Path) -> None:
    os.kill(of_kind(model, API_SERVER), signal.SIGKILL)


def kill_engine_core(model: Path) -> None:
    os.kill(of_kind(model, "VLLM::EngineCore"), signal.SIGKILL)


def stop_engine(model: Path) -> None:
    os.killpg(os.getpgid(of_kind(model, API_SERVER)), signal.SIGSTOP)


def check_answers(lines: list[str], outfile: Path) -> None:
    output = outfile.read_bytes()
    assert Ledger(0).problems(lines, output) == []
    for line in output.splitlines():  # as bytes: a model may well answer with U+2028
        assert isinstance(json.loads(line)["response"], str)


class Tormented:
    """One worker of one server, whose engine suffers one fault after the other."""

    def __init__(self, server: Server, worker: Process, model: Path) -> None:
        self.server = server
        self.worker = worker
        self.model = model
        self.last_status: dict[str, Any] = {}

    def status(self) -> dict[str, Any]:
        with self.server.client() as client:
            return client.status()

    def suffer(self, fault: Callable[[Path], None]) -> None:
        """Do it while requests are in flight; return when lines are done again."""
        before = self.status()["done"]
        self._wait(lambda: self.status()["done"] > before, "lines that are done")
        engines = set(processes_of(self.model))
        fault(self.model)
        self._wait(lambda: not engines & set(processes_of(self.model)), "the old engine to go")
        done = self.status()["done"]
        self._wait(lambda: self.status()["done"] > done, "lines that are done again")

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        def met() -> bool:
            assert not self.worker.has_ended, self.worker.output
            return condition()

        wait_until(met, what, START_S)


@pytest.fixture(scope="module")
def tormented(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Tormented:
    """A run that is over, in which the engine was killed in two ways and stopped."""
    tmp_path = tmp_path_factory.mktemp("tormented")
    lines = write_lines(tmp_path / "in.jsonl", 60)
    files = ("--infile", tmp_path / "in.jsonl", "--outfile", tmp_path / "out.jsonl")
    command = [sys.executable, "-m", "dispatcher.taskmanager.cli", "--hang-timeout", "4"]
    command += ["--task", "examples/chat_task.py:ChatTask", "--task-arg", "max_tokens=400"]
    command += vllm_options(model, tmp_path / "logs")
    with ExitStack() as stack:
        server = stack.enter_context(dispatcher_server(*files, "--max-retries", "0"))
        command += ["--dispatcher", server.at]
        worker = stack.enter_context(running(*command, env=ENGINE))
        run = Tormented(server, worker, model)
        run._wait(lambda: run.status().get("done", 0) > 0, "the first line")
        for fault in (kill_api_server, kill_engine_core, stop_engine):
            run.suffer(fault)
            run.last_status = run.status()
        assert worker.wait(START_S) == 0, worker.output
        assert server.process.wait() == 0
    check_answers(lines, tmp_path / "out.jsonl")
    return run


def test_an_engine_that_is_killed_or_stopped_is_started_again_and_every_line_is_answered(
    tormented: Tormented,
) -> None:
    said = tormented.worker.output
    assert said.count("vLLM ended with exit code") == 2
    assert said.count("vLLM hangs: for") == 1
    assert said.count("the model server is back") == 3


def test_nothing_is_charged_for_an_engine_that_failed(tormented: Tormented) -> None:
    # Beside the answers: with --max-retries 0 a charge would have been a tombstone.
    assert tormented.last_status["charged"] == 0
    assert tormented.last_status["crashed"] >= 3


def test_the_start_of_an_engine_is_told_while_it_takes_long(tormented: Tormented) -> None:
    assert "vLLM is starting (15 s): " in tormented.worker.output


def test_no_process_is_left_of_engines_that_were_killed_or_ended(tormented: Tormented) -> None:
    wait_until(lambda: not processes_of(tormented.model), "the engines to be gone", 15)


def test_two_engines_on_one_machine_share_the_work_and_are_gone_afterwards(
    model: Path, tmp_path: Path
) -> None:
    infile, outfile = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = write_lines(infile, 60)
    command = [sys.executable, "-m", "dispatcher.cli", "run", "--task-managers", "2"]
    command += ["--input", str(infile), "--output", str(outfile)]
    # Nothing is asked before both engines serve: else the first might do all the work alone.
    place = tmp_path / "meeting"
    place.mkdir()
    command += ["--task", "tests/support/meeting_task.py:MeetingTask"]
    command += ["--task-arg", f"place={place}", "--task-arg", "workers=2"]
    command += vllm_options(model, tmp_path / "logs")
    with running(*command, env=ENGINE) as run:
        assert run.wait(START_S + 60) == 0, run.output
    check_answers(lines, outfile)
    for number in range(2):
        log = (tmp_path / "logs" / f"task-manager-{number}" / "vllm.log").read_text()
        assert "POST /v1/chat/completions" in log  # neither was idle
    wait_until(lambda: not processes_of(model), "the engines to be gone", 15)


@pytest.mark.model
def test_the_readmes_command_answers_the_example_prompts_with_smollm2(tmp_path: Path) -> None:
    readme = Path("README.md").read_text()
    block = readme.partition("**Real vLLM without a GPU**")[2].partition("**A rehearsal")[0]
    commands = "".join(line[4:] + "\n" for line in block.splitlines() if line.startswith("    "))
    _, make, run = commands.replace("\\\n", "").splitlines()
    python = os.environ[VLLM_PYTHON]
    model, outfile = tmp_path / "smollm2", tmp_path / "output.jsonl"

    def words(command: str) -> list[str]:
        changed = {
            "./smollm2": str(model),
            "smollm2": str(model),
            "output-vllm.jsonl": str(outfile),
        }
        split = (changed.get(word, word) for word in shlex.split(command))
        return [word.replace(".venv-vllm/bin/python", python) for word in split]

    with running(*words(make)) as maker:
        assert maker.wait(240) == 0, maker.output
    name, *arguments = words(run)
    assert name == "dispatcher"
    with running(sys.executable, "-m", "dispatcher.cli", *arguments, env=ENGINE) as command:
        assert command.wait(START_S + 420) == 0, command.output
    answers = [json.loads(line)["response"] for line in outfile.read_bytes().splitlines()]
    assert len(answers) == 100
    assert len(set(answers)) > 90
    wait_until(lambda: not processes_of(model), "the engine to be gone", 15)
