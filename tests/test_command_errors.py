"""What goes wrong at the start is one clear sentence on stderr and the right exit code."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.processes import ROOT, wait_until

TASK = "examples/chat_task.py:ChatTask"


def ended(*arguments: str | Path) -> tuple[int, str]:
    """Run a module of the package to its end; return exit code and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.returncode, done.stderr


def assert_one_sentence(stderr: str, *words: str) -> None:
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1, stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture
def infile(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    return path


def server(infile: Path, outfile: Path, *more: str) -> list[str | Path]:
    return ["dispatcher.server", "--infile", infile, "--outfile", outfile, "--port", "0", *more]


def file_mode(infile: Path, outfile: Path, task: str = TASK) -> list[str | Path]:
    files = ["--input", infile, "--output", outfile]
    return ["dispatcher.taskmanager.cli", "--task", task, "--backend", "fake", *files]


def local_run(infile: Path, outfile: Path, task: str = TASK) -> list[str | Path]:
    files = ["--input", infile, "--output", outfile]
    return ["dispatcher.cli", "run", "--task", task, "--backend", "fake", *files]


COMMANDS = [server, file_mode, local_run]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_input_is_named(command: object, tmp_path: Path) -> None:
    assert callable(command)
    code, stderr = ended(*command(tmp_path / "nowhere.jsonl", tmp_path / "out.jsonl"))
    assert code == 2
    assert_one_sentence(stderr, "nowhere.jsonl", "input")


UNUSABLE = [
    ("input", ""),
    ("input", "hf:"),
    ("input", "x" * 256),
    ("output", ""),
    ("output", "."),
    ("output", "/"),
    ("output", "x" * 250),
    ("state", ""),
    ("state", "x" * 256),
    ("state", "d/" * 2500),
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("option", "value"), UNUSABLE)
def test_a_path_that_names_nothing_is_refused_by_its_option(
    command: object, option: str, value: str, tmp_path: Path, infile: Path
) -> None:
    assert callable(command)
    given = {"input": infile, "output": tmp_path / "out.jsonl", "state": tmp_path / "s"}
    given[option] = value  # type: ignore[assignment]
    code, stderr = ended(*command(given["input"], given["output"]), f"--state={given['state']}")
    assert code == 2
    file = f"--{option[:-3]}file" if command is server and option != "state" else f"--{option}"
    assert_one_sentence(stderr, f"argument {file}: ")
    assert list(tmp_path.iterdir()) == [infile]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_cannot_be_written_is_named(
    command: object, infile: Path, tmp_path: Path
) -> None:
    assert callable(command)
    (tmp_path / "file").write_text("")
    code, stderr = ended(*command(infile, tmp_path / "file" / "out.jsonl"))
    assert code == 1
    assert_one_sentence(stderr, str(tmp_path / "file"), "cannot")


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_is_a_directory_is_named(
    command: object, infile: Path, tmp_path: Path
) -> None:
    assert callable(command)
    (tmp_path / "folder").mkdir()
    code, stderr = ended(*command(infile, tmp_path / "folder"))
    assert code == 1
    assert_one_sentence(stderr, "folder")


@pytest.mark.parametrize("command", COMMANDS)
def test_an_input_that_is_a_directory_is_named(command: object, tmp_path: Path) -> None:
    assert callable(command)
    (tmp_path / "folder").mkdir()
    code, stderr = ended(*command(tmp_path / "folder", tmp_path / "out.jsonl"))
    assert code == 2
    assert_one_sentence(stderr, "folder", "directory")


@pytest.mark.parametrize("command", [file_mode, local_run])
@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("examples/chat_task.py:NoSuchTask", ["NoSuchTask", "ChatTask"]),
        ("examples/nowhere.py:ChatTask", ["nowhere.py"]),
        ("no.such.module:Task", ["no module"]),
        ("json:JSONDecoder", ["JSONDecoder", "Task"]),
    ],
)
def test_an_unknown_task_is_named(
    command: object, task: str, words: Sequence[str], infile: Path, tmp_path: Path
) -> None:
    assert callable(command)
    code, stderr = ended(*command(infile, tmp_path / "out.jsonl", task))
    assert code == 2
    assert_one_sentence(stderr, *words)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_port_in_use_is_named(infile: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, stderr = ended(*server(infile, tmp_path / "out.jsonl", "--port", port))
    assert code == 1
    assert_one_sentence(stderr, port, "in use")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_backend_that_cannot_start_is_named(infile: Path, tmp_path: Path) -> None:
    vllm = [*file_mode(infile, tmp_path / "out.jsonl"), "--backend", "vllm", "--model", "m"]
    code, stderr = ended(*vllm, "--vllm-command", "/nowhere/vllm serve")
    assert code == 1
    assert "Traceback (most recent call last)" not in stderr.partition("vLLM")[0]
    assert "vLLM ended" in stderr


def test_a_run_with_a_backend_that_cannot_start_says_so_and_ends(
    infile: Path, tmp_path: Path
) -> None:
    code, stderr = ended(
        *local_run(infile, tmp_path / "out.jsonl"), "--fakellm-args=--no-such-option"
    )
    assert code == 1
    assert "Traceback" not in stderr
    assert "task-manager-0 ended" in stderr


def test_a_second_command_on_the_same_run_is_refused(infile: Path, tmp_path: Path) -> None:
    from tests.support.processes import dispatcher_server

    files = ("--infile", infile, "--outfile", tmp_path / "out.jsonl")
    with dispatcher_server(*files):
        code, stderr = ended(*server(infile, tmp_path / "out.jsonl"))
    assert code == 1
    assert_one_sentence(stderr, "another server", "out.jsonl.dispatch")


def test_an_unknown_key_of_a_configuration_file_is_named(infile: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("max_retrys: 5\n")
    command = server(infile, tmp_path / "out.jsonl", "--config", str(config))
    code, stderr = ended(*command)
    assert code == 2
    assert_one_sentence(stderr, "max_retrys", "config.yaml")


@pytest.mark.parametrize("command", [file_mode, local_run])
@pytest.mark.parametrize(
    ("content", "flags", "words"),
    [
        ("backends: {a: {kind: fake, modle: x}}", [], ["backends.a", "'modle'", "model"]),
        ("backends: {a: {kind: fake}}", ["--model", "m"], ["--model", "section backends"]),
        ("models_to_run: [{name: a}]", ["--backend", "fake"], ["models_to_run", "hosted"]),
        ("concurrency: {max: 3}", ["--backend", "fake"], ["concurrency", "'max'"]),
        ("generation: {seed: 1}", ["--backend", "cerebras"], ["--backend cerebras", "--model"]),
        (
            "generation: {seed: 1}",
            ["--backend", "cerebras", "--model", "m", "--api-key-env", "NOT_SET_ANYWHERE"],
            ["NOT_SET_ANYWHERE", "not set"],
        ),
    ],
)
def test_model_servers_that_cannot_be_used_are_named_before_anything_is_begun(
    command: object,
    content: str,
    flags: list[str],
    words: Sequence[str],
    infile: Path,
    tmp_path: Path,
) -> None:
    assert callable(command)
    config = tmp_path / "config.yaml"
    config.write_text(content)
    whole = [word for word in command(infile, tmp_path / "out.jsonl") if word != "--backend"]
    whole.remove("fake")
    code, stderr = ended(*whole, "--config", config, *flags)
    assert code == 2
    assert_one_sentence(stderr, *words)
    assert not (tmp_path / "out.jsonl.dispatch").exists()


def test_an_option_that_cannot_be_right_is_named_without_a_page_of_usage(
    infile: Path, tmp_path: Path
) -> None:
    code, stderr = ended(*local_run(infile, tmp_path / "out.jsonl"), "--workers", "zero")
    assert code == 2
    assert_one_sentence(stderr, "--workers", "zero", "--help")


def test_standard_input_is_refused_by_a_run_that_could_not_read_it(tmp_path: Path) -> None:
    code, stderr = ended(*local_run(Path("/dev/stdin"), tmp_path / "out.jsonl"))
    assert code == 2
    assert_one_sentence(stderr, "/dev/stdin", "not a file")


def test_help_of_every_command_names_its_options() -> None:
    for command, option in (("run", "--task-managers"), ("server", "--infile"), ("task-run", "-")):
        done = subprocess.run(
            [sys.executable, "-m", "dispatcher.cli", command, "--help"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        assert option in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_a_stop_while_standard_input_is_copied_says_that_all_of_it_is_needed_again(
    command: object, tmp_path: Path
) -> None:
    assert callable(command)
    outfile = tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.dispatch" / "input.partial"
    with subprocess.Popen(
        [sys.executable, "-m", *map(str, command(Path("-"), outfile))],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        wait_until(partial.exists, "a copy was begun")
        process.send_signal(signal.SIGINT)
        # Its standard input stays open: a stop does not wait for the end of that.
        assert process.wait(20) == 3
        assert process.stdout is not None
        said = process.stdout.read()
    assert "give the whole command again, with the whole of standard input" in said
    assert "--resume" not in said
