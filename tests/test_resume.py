"""A run is gone on with by naming its state directory, from anywhere, and only as what it was."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from dispatcher import child, launch
from dispatcher.config import Parser, add_run_limits, parse, policy_of
from dispatcher.errors import DispatcherError, QuotaExhaustedError, StateError, UsageError
from dispatcher.run_command import (
    LOCAL_RUN,
    SERVER,
    TASK_RUN,
    Start,
    handing_over,
    note_start,
    read_start,
)
from dispatcher.server import cli as server_cli
from dispatcher.storage.files import Files
from dispatcher.storage.run_state import load_run_file, save_run_file
from dispatcher.storage.same_run import check_command, going_on
from dispatcher.taskmanager import cli as worker_cli
from dispatcher.taskmanager.backend.options import describe_model
from dispatcher.taskmanager.backend.reading import backends_of
from dispatcher.taskmanager.task.loading import describe_task, find_task
from tests.support.processes import ROOT, Process, running, wait_until

TASK = """
import json
from dispatcher.taskmanager.task import GeneratorTask

WORD = "first"


class Ask(GeneratorTask):
    def task_generator(self):
        reply = yield self.ask()
        return {"id": self.data["id"], "word": WORD, "args": dict(self.args)}

    def ask(self):
        from dispatcher.taskmanager.backend.request import Request
        return Request({"messages": [{"role": "user", "content": str(self.data["id"])}]})
"""
INTERMEDIATE = ("journal", "input.spool", "input.partial", "owners", "lock", "spool")
PROGRAMS = {
    LOCAL_RUN: (sys.executable, "-m", "dispatcher.cli", "run"),
    TASK_RUN: (sys.executable, "-m", "dispatcher.taskmanager.cli"),
    SERVER: (sys.executable, "-m", "dispatcher.server"),
}


class Run:
    """A run's files in a directory, and commands on it from there or from elsewhere."""

    def __init__(self, directory: Path, lines: int = 60) -> None:
        self.directory = directory / "here"
        self.elsewhere = directory / "elsewhere"
        self.directory.mkdir()
        self.elsewhere.mkdir()
        self.task_file = self.directory / "my_task.py"
        self.task_file.write_text(TASK)
        self.infile, self.outfile = self.directory / "in.jsonl", self.directory / "out.jsonl"
        self.infile.write_text("".join(json.dumps({"id": n}) + "\n" for n in range(lines)))
        self.lines = lines
        self.state_dir = self.directory / "out.jsonl.dispatch"

    def arguments(self, *more: str) -> list[str]:
        """Return relative arguments, as a person types them."""
        files = ["--input", "in.jsonl", "--output", "out.jsonl", "--task", "my_task.py:Ask"]
        return [*files, "--backend", "fake", "--workers", "4", *more]

    def begin(self, program: str, *arguments: str) -> Process:
        return self._start(self.directory, *PROGRAMS[program], *arguments)

    def resume(self, program: str, *more: str) -> Process:
        return self._start(self.elsewhere, *PROGRAMS[program], "--resume", self.state_dir, *more)

    def _start(self, directory: Path, *command: str | Path) -> Process:
        enter = ["sh", "-c", 'cd "$0" && exec "$@"', directory]
        return Process(*enter, *command, env={"PYTHONPATH": str(ROOT)})

    @property
    def run_file(self) -> dict[str, Any]:
        return load_run_file(self.state_dir, Files()) or {}

    @property
    def results(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.outfile.read_text().splitlines()]

    @property
    def written(self) -> int:
        return self.outfile.read_bytes().count(b"\n") if self.outfile.exists() else 0

    def check_complete(self) -> None:
        assert [result["id"] for result in self.results] == list(range(self.lines))
        assert self.run_file["state"] == "complete"
        assert self.run_file["summary"]["done"] == self.lines
        assert {"started_at", "ended_at", "fingerprint", "command"} <= self.run_file.keys()
        left = [name for name in INTERMEDIATE if (self.state_dir / name).exists()]
        assert left == []
        assert not list(self.state_dir.glob(".*"))


@contextmanager
def ending(process: Process) -> Iterator[Process]:
    try:
        yield process
    finally:
        process.kill()


def interrupt(process: Process, within_s: float = 20.0) -> None:
    """Press Ctrl-C. It takes 5 s at most, and far longer only on a busy machine or in a hang."""
    asked_at = time.monotonic()
    process.signal(signal.SIGINT)
    code = process.wait(deadline_s=30)
    assert time.monotonic() - asked_at < within_s
    assert code == 3, process.output


def ended(process: Process, deadline_s: float = 60) -> tuple[int, str]:
    with ending(process):
        return process.wait(deadline_s), process.output


def assert_one_sentence(output: str, *words: str) -> None:
    lines = [line for line in output.splitlines() if line.strip()]
    assert len(lines) == 1, output
    for word in words:
        assert word in lines[0], output


# -------------------------------------------------------------------- with real processes


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["at the start", "in the middle", "near the end"])
def test_after_ctrl_c_a_run_is_finished_from_another_directory(moment: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    reached = {
        "at the start": lambda: (run.state_dir / "run.yaml").exists(),
        "in the middle": lambda: run.written >= 15,
        "near the end": lambda: run.written >= 50,
    }[moment]
    slowly = "--fakellm-args=--latency-s 0.3 --call-log calls.jsonl"
    with ending(run.begin(LOCAL_RUN, *run.arguments("--task-arg", "a=1", slowly))) as first:
        wait_until(reached, moment, deadline_s=60)
        interrupt(first)
        assert f"dispatcher run --resume {run.state_dir}" in first.output
    assert run.run_file["state"] != "complete"

    code, output = ended(run.resume(LOCAL_RUN))

    assert code == 0, output
    run.check_complete()
    assert {result["args"]["a"] for result in run.results} == {1}
    command = run.run_file["command"]
    assert command["program"] == LOCAL_RUN
    assert command["directory"] == str(run.directory)
    assert command["task"]["args"] == {"a": 1}
    assert command["task"]["file"] == str(run.task_file)
    assert command["model"] == {"name": "fake"}
    assert command["options"]["input"] == str(run.infile)
    assert {"dispatcher", "python", "msgspec", "aiohttp"} <= command["versions"].keys()
    # What the options name by a relative path was found where the run was begun.
    assert (run.directory / "calls.jsonl").exists()
    assert list(run.elsewhere.iterdir()) == []

    code, output = ended(run.resume(LOCAL_RUN))
    assert code == 0
    assert f"complete: {run.lines} lines" in output


@pytest.mark.slow
def test_file_mode_is_resumed_and_limits_may_change(tmp_path: Path) -> None:
    run = Run(tmp_path)
    arguments = run.arguments("--fakellm-args=--latency-s 0.3", "--max-retries", "5")
    with ending(run.begin(TASK_RUN, *arguments)) as first:
        wait_until(lambda: run.written >= 10, "some lines", deadline_s=60)
        interrupt(first)
        assert f"dispatcher-task-run --resume {run.state_dir}" in first.output

    code, output = ended(run.resume(TASK_RUN, "--workers", "16", "--work-timeout", "60"))

    assert code == 0, output
    run.check_complete()
    options = run.run_file["command"]["options"]
    assert (options["workers"], options["max_retries"]) == (16, 5)
    assert run.run_file["settings"]["work_timeout_s"] == 60
    assert run.run_file["command"]["program"] == TASK_RUN


@pytest.mark.slow
def test_a_server_is_resumed_and_keeps_its_token_out_of_run_yaml(tmp_path: Path) -> None:
    run = Run(tmp_path)
    files = ["--infile", "in.jsonl", "--outfile", "out.jsonl", "--port", "0"]
    served = run.state_dir / "server.json"
    with ending(run.begin(SERVER, *files)) as first:
        wait_until(served.exists, "the server", deadline_s=30)
        token = json.loads(served.read_text())["token"]
        interrupt(first)
        assert f"dispatcher-server --resume {run.state_dir}" in first.output
    with ending(run.resume(SERVER)) as second:
        worker = [*PROGRAMS[TASK_RUN], "--dispatcher", f"@{served}", "--backend", "fake"]
        with running(*worker, "--task", f"{run.task_file}:Ask") as manager:
            assert manager.wait(deadline_s=60) == 0, manager.output
        assert second.wait(deadline_s=30) == 0, second.output
    run.check_complete()
    assert json.loads(served.read_text())["token"] == token
    assert token not in (run.state_dir / "run.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("program", [LOCAL_RUN, TASK_RUN])
def test_a_changed_task_file_is_named_and_goes_on_when_that_is_accepted(
    program: str, tmp_path: Path
) -> None:
    run = Run(tmp_path)
    arguments = run.arguments("--fakellm-args=--latency-s 0.3")
    with ending(run.begin(program, *arguments)) as first:
        wait_until(lambda: run.written >= 10, "some lines", deadline_s=60)
        interrupt(first)
    begun = run.written
    run.task_file.write_text(TASK.replace("first", "second"))

    for again in (lambda: run.resume(program), lambda: run.begin(program, *arguments)):
        code, output = ended(again())
        assert code == 1
        assert_one_sentence(output, "my_task.py", "changed", "--accept-changes")
    assert run.written == begun
    code, output = ended(run.resume(program, "--accept-changes"))

    assert code == 0, output
    run.check_complete()
    assert {result["word"] for result in run.results} == {"first", "second"}
    (change,) = run.run_file["accepted_changes"]
    assert "my_task.py" in change["change"]


@pytest.mark.slow
def test_another_model_input_or_output_is_named_and_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with ending(run.begin(TASK_RUN, *run.arguments("--fakellm-args=--latency-s 0.3"))) as first:
        wait_until(lambda: run.written >= 5, "some lines", deadline_s=60)
        interrupt(first)
    before = run.outfile.read_bytes()
    precious = run.directory / "precious.txt"
    precious.write_text("not to be lost\n")

    code, output = ended(run.resume(TASK_RUN, "--model", "bigger"))
    assert code == 1
    assert_one_sentence(output, "the model is bigger", "fake")
    code, output = ended(run.resume(TASK_RUN, "--model", "bigger", "--accept-changes"))
    assert code == 1  # the answers of two models do not go into one output
    code, output = ended(run.resume(TASK_RUN, "--output", str(precious)))
    assert code == 2
    assert_one_sentence(output, str(precious), str(run.outfile))
    named = ["--output", str(precious), "--state", str(run.state_dir)]
    code, output = ended(run.begin(TASK_RUN, *run.arguments(*named)))
    assert code == 1
    assert_one_sentence(output, str(precious), str(run.outfile))
    code, output = ended(run.resume(TASK_RUN, "--task-arg", "a=2"))
    assert code == 1
    assert_one_sentence(output, "a is new", "--accept-changes")
    moved = run.infile.rename(run.elsewhere / "in.jsonl")
    run.infile.write_text("other\n")
    code, output = ended(run.resume(TASK_RUN))
    assert code == 1
    assert_one_sentence(output, str(run.infile), "its size")

    assert run.outfile.read_bytes() == before
    assert precious.read_text() == "not to be lost\n"
    code, output = ended(run.resume(TASK_RUN, "--input", str(moved)))
    assert code == 0, output
    run.check_complete()


@pytest.mark.slow
def test_a_complete_run_over_a_pipe_does_not_wait_for_the_pipe_again(tmp_path: Path) -> None:
    run = Run(tmp_path)
    pipe = run.directory / "pipe"
    os.mkfifo(pipe)
    content = run.infile.read_bytes()
    slowly = "--fakellm-args=--latency-s 0.3"
    writer = threading.Thread(target=pipe.write_bytes, args=(content,), daemon=True)
    writer.start()
    arguments = run.arguments(slowly)
    arguments[1] = "pipe"
    with ending(run.begin(LOCAL_RUN, *arguments)) as first:
        wait_until(lambda: run.written >= 10, "some lines", deadline_s=60)
        assert (run.state_dir / "input.spool").exists()
        interrupt(first)
    pipe.unlink()

    code, output = ended(run.resume(LOCAL_RUN))
    assert code == 0, output
    run.check_complete()
    os.mkfifo(pipe)
    for again in (lambda: run.resume(LOCAL_RUN), lambda: run.begin(LOCAL_RUN, *arguments)):
        code, output = ended(again())
        assert code == 0, output
        assert f"complete: {run.lines} lines" in output


@pytest.mark.slow
def test_neither_tokens_nor_keys_are_in_run_yaml(tmp_path: Path) -> None:
    run = Run(tmp_path, lines=3)
    secrets = {"DISPATCHER_TOKEN": "t" * 40, "OPENAI_API_KEY": "k" * 40, "MY_KEY": "m" * 40}
    given = "--vllm-extra-args=--seed 1 --hf-token " + "h" * 40
    command = [*PROGRAMS[LOCAL_RUN], "--input", run.infile, "--output", run.outfile]
    command += ["--task", f"{run.task_file}:Ask", "--backend", "fake", "--api-key-env", "MY_KEY"]
    with running(*command, given, env=secrets) as process:
        assert process.wait(deadline_s=60) == 0, process.output
    said = (run.state_dir / "run.yaml").read_text()
    options = run.run_file["command"]["options"]
    assert options["api_key_env"] == "MY_KEY"
    assert options["vllm_extra_args"] == "--seed 1"
    assert run.run_file["command"]["left_out"] == ["--hf-token of --vllm-extra-args"]
    tokens = [json.loads((run.state_dir / "server.json").read_text())["token"]]
    tokens.append((run.state_dir / "admin.token").read_text().strip())
    for secret in [*secrets.values(), *tokens, "h" * 40]:
        assert secret not in said


# -------------------------------------------------------------------- what --resume refuses


MAINS = {LOCAL_RUN: launch.main, TASK_RUN: worker_cli.main, SERVER: server_cli.main}


@pytest.mark.parametrize("program", list(MAINS))
def test_a_directory_that_holds_no_resumable_run_is_one_clear_sentence(
    program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state_dir = tmp_path / "out.jsonl.dispatch"
    path = state_dir / "run.yaml"

    def refusal(expected: int, at: Path = state_dir) -> str:
        assert MAINS[program](["--resume", str(at)]) == expected
        said = capsys.readouterr().err
        assert_one_sentence(said, str(at))
        return said

    assert "no such directory" in refusal(2)
    state_dir.mkdir()
    assert "no run was begun" in refusal(2)
    (tmp_path / "out.jsonl").write_text("x\n")
    path.write_text("run: [broken\nthere: }\n")
    assert "is damaged (line " in refusal(1)
    assert "is damaged" in refusal(1, path)
    assert str(state_dir) in refusal(2, tmp_path / "out.jsonl")
    path.write_bytes(b"\xff\xfe")
    assert "is damaged" in refusal(1)
    path.write_text("just text")
    assert "does not hold a run's description" in refusal(1)
    for older in ("run: abc\nstate: running\n", "command: [a]\n", "command: {options: 3}\n"):
        path.write_text(older)
        assert "does not say how the run was started" in refusal(2)
    path.write_text("command: {program: make coffee, options: {}}\n")
    assert "go on with make coffee --resume" in refusal(2)


@pytest.mark.parametrize("program", list(MAINS))
def test_a_run_is_resumed_by_the_program_that_began_it(
    program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for begun_with in MAINS.keys() - {program}:
        content = {"command": {"program": begun_with, "options": {}}}
        save_run_file(tmp_path, content, Files())
        assert MAINS[program](["--resume", str(tmp_path)]) == 2
        assert_one_sentence(capsys.readouterr().err, f"{begun_with} --resume {tmp_path}")


def test_a_copy_of_a_run_that_still_exists_is_refused(begun: Begun, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    content = load_run_file(begun.state_dir, Files())
    assert content is not None
    content["settings"] = {"state": str(begun.state_dir)}
    save_run_file(copy, content, Files())
    with pytest.raises(UsageError, match="is a copy of"):
        read_start(TASK_RUN, worker_cli.build_parser(), ["--resume", str(copy)])
    begun.state_dir.rename(tmp_path / "renamed")  # so that it was moved, not copied
    assert read_start(TASK_RUN, worker_cli.build_parser(), ["--resume", str(copy)]).before


def test_a_worker_of_a_server_has_nothing_to_resume(
    begun: Begun, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--resume", str(begun.state_dir), "--dispatcher", "127.0.0.1:1"]
    assert worker_cli.main(argv) == 2
    assert_one_sentence(capsys.readouterr().err, "--dispatcher", "nothing to resume")


def test_another_state_directory_beside_resume_is_refused(begun: Begun) -> None:
    argv = ["--resume", str(begun.state_dir), "--state", "other"]
    with pytest.raises(UsageError, match="--state"):
        read_start(TASK_RUN, worker_cli.build_parser(), argv)


def test_an_option_that_this_version_does_not_know_is_named(begun: Begun) -> None:
    content = load_run_file(begun.state_dir, Files())
    assert content is not None
    content["command"]["options"]["colour"] = "red"
    save_run_file(begun.state_dir, content, Files())
    with pytest.raises(UsageError, match=r"run\.yaml: unknown option 'colour'"):
        read_start(TASK_RUN, worker_cli.build_parser(), ["--resume", str(begun.state_dir)])


# -------------------------------------------------------------------- what is kept


class Begun:
    """A run of `dispatcher-task-run` that was noted in run.yaml and went no further."""

    def __init__(self, directory: Path, *more: str) -> None:
        self.directory = directory
        run = Run(directory)
        os.chdir(run.directory)
        arguments = run.arguments(*more)
        self.start = read_start(TASK_RUN, worker_cli.build_parser(), arguments)
        self.command = worker_cli.describe_command(self.start)
        settings = worker_cli.run_settings_of(
            self.start.args, self.start.args.input, self.start.args.output, self.command
        )
        note_start(settings)
        self.run, self.state_dir = run, run.state_dir

    def resumed(self, *more: str) -> Start:
        os.chdir(self.run.elsewhere)
        argv = ["--resume", str(self.state_dir), *more]
        return read_start(TASK_RUN, worker_cli.build_parser(), argv)


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Begun:
    monkeypatch.chdir(tmp_path)
    return Begun(tmp_path)


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--max-retries=-1", "--window", "10", "--backup-tasks", "off", "--record-steps", "off"],
        ["--enforce-eager", "--vllm-extra-args=--seed 1", "--log-dir", "logs", "--workers", "9"],
        ["--step-gib", "0.5", "--work-timeout", "1e-1", "--fakellm-args=--latency-s 1"],
        ["--task-arg", "a=1.0e-05", "--task-arg", "when=2024-05-06", "--task-arg", "t='1'"],
        ["--task-arg", "n=.nan", "--task-arg", "l=[1, {x: null}]", "--task-arg", "s=ä: \\n"],
    ],
    ids=str,
)
def test_a_resumed_command_has_the_options_and_arguments_it_was_begun_with(
    more: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    begun = Begun(tmp_path, *more)

    again = begun.resumed()

    assert Path.cwd() == begun.run.directory
    assert begun.command is not None
    described = worker_cli.describe_command(again)
    assert described is not None
    assert check_command(begun.command, described, accept_changes=False) == []
    began = begun.command["options"] | {"state": str(begun.state_dir)}
    assert {key: described[key] for key in ("program", "directory", "options")} == {
        "program": TASK_RUN,
        "directory": str(begun.run.directory),
        "options": began,
    }


def test_what_is_given_beside_resume_is_about_the_directory_it_is_given_in(begun: Begun) -> None:
    again = begun.resumed("--log-dir", "logs", "--task", "other.py:Ask", "--workers", "2")
    assert again.args.log_dir == begun.run.elsewhere / "logs"
    assert again.args.task == f"{begun.run.elsewhere / 'other.py'}:Ask"
    assert again.args.workers == 2


def test_a_run_whose_directory_is_gone_is_resumed_from_where_one_is(begun: Begun) -> None:
    content = load_run_file(begun.state_dir, Files())
    assert content is not None
    content["command"]["directory"] = "/no/such/directory"
    save_run_file(begun.state_dir, content, Files())
    assert begun.resumed().directory == str(begun.run.elsewhere)


@pytest.mark.parametrize("name", ["odd \udc80 name", "with\nnewline", "- dash: [", "ünïcode"])
def test_a_state_directory_of_any_name_is_kept(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    odd = tmp_path / os.fsdecode(os.fsencode(name))
    odd.mkdir()
    begun = Begun(odd)
    assert begun.resumed().args.output == begun.run.outfile


@pytest.mark.parametrize(
    ("given", "kept", "left_out"),
    [
        ("http://h:1/v1", "http://h:1/v1", []),
        ("http://me:word@h:1/v1", "http://h:1/v1", ["the password"]),
        ("--seed 1 --api-key abc --x 'a b'", "--seed 1 --x 'a b'", ["--api-key"]),
        ("--hf_token=abc --seed 1", "--seed 1", ["--hf_token"]),
        ("--api-key a b --seed 1", "--seed 1", ["--api-key"]),
        ("env HF_TOKEN=abc vllm serve", "env vllm serve", ["HF_TOKEN"]),
        ("--ssl-keyfile k.pem", "--ssl-keyfile k.pem", []),
    ],
)
def test_secrets_in_an_option_are_left_out(
    given: str, kept: str, left_out: list[str], begun: Begun
) -> None:
    begun.start.left_out.clear()
    begun.start.record("vllm_command", given)
    assert begun.start.options["vllm_command"] == kept
    assert begun.start.left_out == [f"{name} of vllm_command" for name in left_out]


def test_who_resumes_is_told_which_secrets_were_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    begun = Begun(tmp_path, "--vllm-extra-args=--hf-token abc")
    begun.resumed()
    assert_one_sentence(capsys.readouterr().err, "--hf-token of --vllm-extra-args")
    begun.resumed("--vllm-extra-args=--hf-token abc")
    assert capsys.readouterr().err == ""


def test_the_address_of_the_model_server_is_kept_when_it_came_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://there:1/v1")
    begun = Begun(tmp_path, "--backend", "openai", "--model", "m")
    monkeypatch.delenv("OPENAI_BASE_URL")
    assert begun.resumed().args.base_url == ["http://there:1/v1"]


SECTIONS = """
backends:
  a: {kind: openai, model: m, base_url: ['http://me:word@h:1/v1']}
  b: {kind: vllm, model: n, vllm_extra_args: --seed 1 --hf-token abc}
  3: {kind: cerebras, model: o}
generation: {seed: 3}
"""


def begun_with_sections(directory: Path) -> tuple[Run, Start]:
    run = Run(directory)
    os.chdir(run.directory)
    (run.directory / "it.yaml").write_text(SECTIONS)
    arguments = [*run.arguments()[:6], "--config", "it.yaml"]
    start = read_start(TASK_RUN, worker_cli.build_parser(), arguments)
    command = worker_cli.describe_command(start)
    note_start(worker_cli.run_settings_of(start.args, start.args.input, start.args.output, command))
    return run, start


def test_sections_of_the_file_are_kept_without_secrets_and_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CEREBRAS_BASE_URL", "http://there:1/v1")
    run, start = begun_with_sections(tmp_path)
    monkeypatch.delenv("CEREBRAS_BASE_URL")
    assert start.args.backends["b"]["vllm_extra_args"].endswith("abc")  # what this start uses
    said = (run.state_dir / "run.yaml").read_text()
    assert "me:word" not in said
    assert "abc" not in said

    os.chdir(run.elsewhere)
    argv = ["--resume", str(run.state_dir)]
    again = read_start(TASK_RUN, worker_cli.build_parser(), argv)
    assert again.args.backends == {
        "a": {"kind": "openai", "model": "m", "base_url": ["http://h:1/v1"]},
        "b": {"kind": "vllm", "model": "n", "vllm_extra_args": "--seed 1"},
        3: {"kind": "cerebras", "model": "o", "base_url": ["http://there:1/v1"]},
    }
    assert again.args.generation == {"seed": 3}
    missed = ["the password of base_url of a of backends", "--hf-token of vllm_extra_args of b"]
    assert_one_sentence(capsys.readouterr().err, *missed)
    assert worker_cli.describe_command(again) is not None


def test_the_file_beside_resume_wins_section_by_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run, _ = begun_with_sections(tmp_path)
    (run.directory / "it.yaml").write_text("generation: {seed: 4}\n")
    argv = ["--resume", str(run.state_dir), "--config", "it.yaml"]
    again = read_start(TASK_RUN, worker_cli.build_parser(), argv)
    assert again.args.generation == {"seed": 4}
    assert list(again.args.backends) == ["a", "b", 3]
    assert again.options["generation"] == {"seed": 4}
    with pytest.raises(UsageError, match="--model cannot go with the section backends"):
        worker_cli._check(
            read_start(TASK_RUN, worker_cli.build_parser(), [*argv, "--model", "x"]).args
        )


def test_workers_of_a_run_get_the_sections_with_their_secrets_in_a_private_file(
    tmp_path: Path,
) -> None:
    sections = {"backends": {"a": {"vllm_extra_args": "--hf-token abc"}}}
    with handing_over({"task": {}}, False, sections) as handed:
        assert handed.config is not None
        assert yaml.safe_load(handed.config.read_text()) == sections
        assert handed.config.parent.stat().st_mode & 0o077 == 0
        args = launch.build_parser().parse_args(
            ["--task", "t", "--input", "i", "--output", str(tmp_path / "o"), "--workers", "auto"]
        )
        argv = launch.LocalRun(args, handed)._worker_argv(tmp_path)
        assert f"--config={handed.config}" in argv
        assert "--workers=auto" in argv
    assert not handed.config.exists()
    with handing_over({"task": {}}, False, {}) as handed:
        assert handed.config is None


def test_a_start_that_got_nowhere_does_not_bind_the_next_one(begun: Begun) -> None:
    arguments = begun.run.arguments("--workers", "7")
    os.chdir(begun.run.directory)
    start = read_start(TASK_RUN, worker_cli.build_parser(), arguments)
    command = worker_cli.describe_command(start)
    note_start(worker_cli.run_settings_of(start.args, start.args.input, start.args.output, command))
    assert begun.resumed().args.workers == 7


def test_a_run_that_somebody_has_is_not_noted_anew(begun: Begun) -> None:
    content = load_run_file(begun.state_dir, Files())
    assert content is not None
    save_run_file(begun.state_dir, content | {"state": "running"}, Files())
    args = begun.start.args
    note_start(worker_cli.run_settings_of(args, args.input, args.output, {"program": "other"}))
    again = load_run_file(begun.state_dir, Files())
    assert again == content | {"state": "running"}
    assert not list(begun.state_dir.glob(".*"))


# -------------------------------------------------------------------- whether it is the same


def task(**changes: Any) -> dict[str, Any]:
    same = {"spec": "a.py:T", "class": "T", "file": "/a.py", "sha256": "x", "args": {"n": 1}}
    return {"task": same | changes, "model": {"name": "m"}}


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (task(sha256="y", file="/b.py"), ["task file /b.py", "content changed"]),
        (task(spec="a.py:U", **{"class": "U"}), ["the task is a.py:U", "a.py:T"]),
        (task(args={"n": 2}), ["n is 2 and was 1"]),
        (task(args={"n": "1"}), ["n is '1' and was 1"]),
        (task(args={}), ["n is gone"]),
        (task(args={"n": 1, "k": 0}), ["k is new"]),
        (task(sha256="y", args={}), ["content changed", "n is gone"]),
        (task(args={"n": "x" * 500}), ["n is xxxx", "..."]),
    ],
)
def test_a_changed_task_is_named_and_may_be_accepted(now: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(StateError, match="--accept-changes") as caught:
        check_command(task(), now, accept_changes=False)
    for word in words:
        assert word in str(caught.value)
    assert check_command(task(), now, accept_changes=True)


def test_long_arguments_are_compared_to_their_end() -> None:
    old, new = task(args={"n": "x" * 500 + "y"}), task(args={"n": "x" * 500 + "z"})
    with pytest.raises(StateError):
        check_command(old, new, accept_changes=False)
    nan = task(args={"n": [float("nan")]})
    again = task(args={"n": [float("nan")]})
    assert check_command(nan, again, accept_changes=False) == []


def test_the_same_task_in_another_place_is_no_other_task() -> None:
    moved = task(spec="/there/b.py:T", file="/there/b.py")
    assert check_command(task(), moved, accept_changes=False) == []
    unknown = task(spec="b:T", sha256=None)
    with pytest.raises(StateError, match="b:T"):
        check_command(task(sha256=None), unknown, accept_changes=False)


def test_what_one_of_two_commands_does_not_say_is_not_compared_and_is_kept() -> None:
    plain = {"program": SERVER}
    assert check_command(None, task(), False) == check_command(task(), None, False) == []
    assert check_command(task(), plain, False) == check_command({"task": 3}, task(), False) == []
    assert going_on(task(), plain) == task() | plain
    assert going_on(task(), None) == task()
    assert going_on(None, plain) == plain
    assert going_on(None, None) is None


def test_a_model_is_told_by_its_name_and_its_files(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "deep").mkdir(parents=True)
    (model / "weights.bin").write_bytes(b"1234")
    (model / ".cache").mkdir()

    def described() -> dict[str, Any]:
        argv = ["--task", "t", "--model", str(model)]
        args = worker_cli.build_parser().parse_args(argv)
        return {"model": describe_model(backends_of(args, {}))}

    before = described()
    (model / ".cache" / "notes").write_text("x")
    assert check_command(before, described(), False) == []
    (model / "deep" / "more.bin").write_bytes(b"")
    with pytest.raises(StateError, match=f"the model {model} is not the one"):
        check_command(before, described(), True)
    (model / "deep" / "more.bin").unlink()
    assert check_command(before, described(), False) == []
    (model / "weights.bin").write_bytes(b"12345")
    with pytest.raises(StateError, match="sizes of its files"):
        check_command(before, described(), True)
    model.rename(tmp_path / "gone")
    with pytest.raises(StateError, match="the model"):
        check_command(before, described(), True)


def test_the_file_that_defines_the_class_is_what_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "defines_it.py").write_text(TASK)
    (tmp_path / "names_it.py").write_text("from defines_it import Ask\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    described = describe_task("names_it:Ask", find_task("names_it:Ask"), {})
    assert described["file"] == str(tmp_path / "defines_it.py")
    assert described["spec"] == "names_it:Ask"


# -------------------------------------------------------------------- beside it


def test_recorded_steps_can_be_limited_or_switched_off() -> None:
    def limit(*flags: str) -> int:
        parser = Parser()
        add_run_limits(parser)
        return policy_of(parse(parser, flags)).run_step_bytes

    assert limit() == 64 << 30
    assert limit("--step-gib", "0.5") == 1 << 29
    assert limit("--record-steps", "off", "--step-gib", "9") == 0


def test_a_server_that_dies_before_its_first_answer_is_started_again(
    begun: Begun, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    async def start(process: launch.Child) -> None:
        started.append(process.name)

    monkeypatch.setattr(launch.Child, "start", start)
    monkeypatch.setattr(launch, "_RESTART_DELAY_S", 0.0)
    monkeypatch.setattr(child.ServerProcess, "exit_code", property(lambda _: 137))
    args = launch.build_parser().parse_args(begun.run.arguments())
    asyncio.run(launch.LocalRun(args)._mend())
    assert started == ["the server"]


class Ended:
    """Stands for the processes of a run that ended with these codes and last words."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, server: int | None, *workers: tuple[int | None, str]
    ) -> None:
        self.started: list[str] = []
        ends = {"the server": (server, "")}
        ends |= {f"task-manager-{number}": end for number, end in enumerate(workers)}

        async def start(process: launch.Child) -> None:
            self.started.append(process.name)

        monkeypatch.setattr(launch.Child, "start", start)
        monkeypatch.setattr(launch.Child, "last_words", lambda process: ends[process.name][1])
        monkeypatch.setattr(launch, "_RESTART_DELAY_S", 0.0)
        process = child.ServerProcess
        monkeypatch.setattr(process, "exit_code", property(lambda self: ends[self.name][0]))
        args = launch.build_parser().parse_args(["--task", "t", "--input", "i", "--output", "o"])
        self.run = launch.LocalRun(args)
        self.run._status = {"next_work_id": 9, "done": 3}
        self.run._workers = [
            launch.Child(name, [], Path("log")) for name in ends if name != "the server"
        ]

    def mend(self) -> list[str]:
        asyncio.run(self.run._mend())
        return self.started


QUOTA = "the quota of m at http://h is used up: start again in 3.0 h"


def test_a_worker_whose_quota_is_used_up_is_not_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert Ended(monkeypatch, None, (3, QUOTA), (None, "")).mend() == []
    assert Ended(monkeypatch, None, (3, QUOTA), (137, "")).mend() == ["task-manager-1"]


@pytest.mark.parametrize("other", [(3, QUOTA), (0, "")])
def test_the_run_stops_when_no_worker_is_left_for_want_of_quota(
    other: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(QuotaExhaustedError) as caught:
        Ended(monkeypatch, None, (3, QUOTA), other).mend()
    assert caught.value.exit_code == 3
    assert QUOTA in str(caught.value)
    assert "dispatcher run --resume" in str(caught.value)


def test_a_server_that_was_drained_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Ended(monkeypatch, 3, (None, "")).mend() == ["the server"]  # it was told by a signal
    ended = Ended(monkeypatch, 3, (None, ""))
    words = "drained; go on with: dispatcher run --resume here"
    monkeypatch.setattr(launch.Child, "last_words", lambda _: words)
    assert ended.mend() == []
    assert not asyncio.run(ended.run._may_begin())


def test_a_worker_that_somebody_stopped_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    words = f"{worker_cli.STOPPED}; what was not finished was given back"
    assert Ended(monkeypatch, None, (3, words)).mend() == ["task-manager-0"]


def test_a_refused_key_ends_the_run_and_no_restart_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = f"{worker_cli.REFUSED}set MINE to a valid one"
    ended = Ended(monkeypatch, None, (1, words), (None, ""))
    with pytest.raises(DispatcherError, match="set MINE to a valid one") as caught:
        ended.mend()
    assert caught.value.exit_code == 1
    assert ended.started == []
    assert Ended(monkeypatch, None, (1, "it broke")).mend() == ["task-manager-0"]


def test_the_last_words_of_a_task_manager_hold_why_its_engine_ended() -> None:
    said = "dispatcher-task-run: fakellm ended with exit code 2; its log /x.log ends with:"
    words = child._last_words(["at work", said, "fakellm: r.yaml: No such file or directory", ""])
    assert words == (
        "fakellm ended with exit code 2; its log /x.log ends with: "
        "fakellm: r.yaml: No such file or directory"
    )
    assert child._last_words(["dispatcher-server: the disk is full", "noise"]) == "the disk is full"
    assert child._last_words([]) == "it said nothing"
