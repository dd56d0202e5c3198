"""How vLLM is launched: its command line, its environment, its key, and what is said meanwhile.

fakellm plays the engine where a process is needed: it takes the same options.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from dispatcher.errors import BackendError, UsageError
from dispatcher.taskmanager.backend import vllm
from dispatcher.taskmanager.backend.launched import LaunchOptions
from dispatcher.taskmanager.backend.ports import PortLease
from dispatcher.taskmanager.backend.request import Request
from dispatcher.taskmanager.backend.vllm import (
    VLLMBackend,
    VLLMSettings,
    launch_command,
    launch_environment,
    stage_of,
)
from tests.taskmanager.doubles import run

START_S = 20.0
FAKE = (sys.executable, "-m", "dispatcher.fakellm", "--api-key-env", "VLLM_API_KEY")
OPEN = (sys.executable, "-m", "dispatcher.fakellm")

SERVE_SCRIPT = """#!/bin/sh
# Plays `vllm serve` of a wheel that is called otherwise: it says why it cannot, and ends.
echo "importlib.metadata.PackageNotFoundError: No package metadata was found for vllm" >&2
exit 1
"""
MODULE_PYTHON = """#!/bin/sh
# Plays `python -m vllm.entrypoints.openai.api_server ARGUMENTS`.
[ "$1 $2" = "-m vllm.entrypoints.openai.api_server" ] || exit 64
shift 2
exec {python} -m dispatcher.fakellm --api-key-env VLLM_API_KEY "$@"
"""
RENAMING = """#!/bin/sh
# Drops `--model NAME` and serves another name, as vLLM does with --served-model-name.
shift 2
exec {python} -m dispatcher.fakellm --api-key-env VLLM_API_KEY --model other "$@"
"""


def options(tmp_path: Path, startup_timeout_s: float = START_S) -> LaunchOptions:
    return LaunchOptions(log_dir=tmp_path, startup_timeout_s=startup_timeout_s, engine_restarts=0)


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def command_lines() -> str:
    """Return the command lines of all processes."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(entry.read_bytes().decode(errors="replace"))
    return "\n".join(found)


async def ask(backend: VLLMBackend) -> None:
    answer = await backend.process(Request({"prompt": "hello", "max_tokens": 4}))
    assert answer.is_success, answer.error


# -------------------------------------------------------------------- the command line


def test_the_command_is_vllm_serve_where_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = write_script(tmp_path / "bin" / "vllm", SERVE_SCRIPT)
    monkeypatch.setenv("PATH", str(script.parent))
    assert launch_command(VLLMSettings("some/model"), 81) == (
        [str(script), "serve", "some/model", "--host", "127.0.0.1", "--port", "81"]
    )


def test_the_command_is_the_module_form_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert launch_command(VLLMSettings("some/model"), 81)[:5] == (
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "some/model"]
    )


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["apptainer", "exec", "x.sif", "vllm", "serve"], ["serve", "m", "--host"]),
        (["python3", "-m", "my.server"], ["my.server", "--model", "m", "--host"]),
    ],
)
def test_a_command_of_the_users_gets_the_model_as_it_wants_it(
    command: list[str], expected: list[str]
) -> None:
    made = launch_command(VLLMSettings("m", command=command), 81)
    place = len(command) - 1
    assert made[:place] == command[:-1]
    assert made[place : place + len(expected)] == expected


def test_options_become_the_engines_and_the_users_own_come_last() -> None:
    settings = VLLMSettings(
        "m",
        tensor_parallel=4,
        max_model_len=2048,
        chat_template="t.jinja",
        enforce_eager=True,
        extra_args=["--seed", "1"],
        command=["x"],
    )
    assert launch_command(settings, 81)[-9:] == [
        "--tensor-parallel-size",
        "4",
        "--max-model-len",
        "2048",
        "--chat-template",
        "t.jinja",
        "--enforce-eager",
        "--seed",
        "1",
    ]


# -------------------------------------------------------------------- the environment


def test_the_key_is_in_the_environment_and_telemetry_is_off() -> None:
    assert launch_environment(VLLMSettings("m"), "secret", {}) == {
        "VLLM_API_KEY": "secret",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


def test_what_the_user_set_about_telemetry_stays() -> None:
    env = {"VLLM_NO_USAGE_STATS": "0", "DO_NOT_TRACK": "0"}
    assert launch_environment(VLLMSettings("m"), "k", env) == {"VLLM_API_KEY": "k"}


def test_an_engine_on_rocm_gets_the_variable_it_reads() -> None:
    env = {"ROCR_VISIBLE_DEVICES": "4,5"}
    assert launch_environment(VLLMSettings("m"), "k", env)["HIP_VISIBLE_DEVICES"] == "0,1"


def test_a_quiet_engine_logs_warnings_only() -> None:
    env = launch_environment(VLLMSettings("m", quiet=True), "k", {})
    assert env["VLLM_LOGGING_LEVEL"] == "WARNING"


def test_too_few_gpus_are_told_before_anything_is_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UsageError, match="--tensor-parallel 4 needs 4 GPUs"):
        VLLMBackend(VLLMSettings("m", tensor_parallel=4), options(tmp_path))


# -------------------------------------------------------------------- launches


def test_its_key_is_never_on_the_command_line_and_opens_only_its_own_server(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        backend = VLLMBackend(VLLMSettings("m", command=FAKE), options(tmp_path))
        await backend.start()
        try:
            await ask(backend)
            assert backend.client is not None
            key = backend.client.transport.endpoint.api_key
            assert key
            assert key not in command_lines()
        finally:
            await backend.close()

    run(scenario(), START_S)


def test_a_server_that_anybody_may_use_is_not_taken_for_ours(tmp_path: Path) -> None:
    async def scenario() -> None:
        backend = VLLMBackend(VLLMSettings("m", command=OPEN), options(tmp_path))
        try:
            with pytest.raises(BackendError) as caught:
                await backend.start()
            assert "answers without the API key that vLLM was given" in str(caught.value)
            assert "VLLM_API_KEY" in str(caught.value)
        finally:
            await backend.close()

    run(scenario(), 3 * START_S)


def test_a_port_that_was_taken_meanwhile_is_given_up_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken, ports = other.getsockname()[1], []

        def lease() -> PortLease:
            real = real_lease()
            if not ports:
                real.port = taken
            ports.append(real.port)
            return real

        real_lease = vllm.lease_port
        monkeypatch.setattr(vllm, "lease_port", lease)

        async def scenario() -> None:
            backend = VLLMBackend(VLLMSettings("m", command=FAKE), options(tmp_path))
            await backend.start()
            try:
                await ask(backend)
            finally:
                await backend.close()

        run(scenario(), 2 * START_S)
    assert len(ports) == 2


def test_a_wheel_that_does_not_know_its_name_is_started_in_the_module_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = write_script(tmp_path / "bin" / "vllm", SERVE_SCRIPT)
    python = shlex.quote(sys.executable)
    write_script(tmp_path / "bin" / "python", MODULE_PYTHON.format(python=python))
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")

    async def scenario() -> None:
        backend = VLLMBackend(VLLMSettings("m"), options(tmp_path))
        await backend.start()
        try:
            await ask(backend)
        finally:
            await backend.close()

    run(scenario(), 2 * START_S)
    assert "starting it as `python -m vllm.entrypoints.openai.api_server`" in caplog.text


def test_an_engine_that_ends_at_start_up_shows_the_end_of_its_log_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        command = (sys.executable, "-c", "import sys; sys.exit('CUDA out of memory')")
        backend = VLLMBackend(VLLMSettings("m", command=command), options(tmp_path))
        try:
            with pytest.raises(BackendError) as caught:
                await backend.start()
            text = str(caught.value)
            assert text.startswith("vLLM ended with exit code 1; its log ")
            assert str(tmp_path / "vllm.log") in text
            assert text.count("CUDA out of memory") == 1
        finally:
            await backend.close()

    run(scenario(), START_S)


def test_an_engine_that_takes_too_long_is_told_how_far_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vllm, "_PROGRESS_S", 0.3)
    caplog.set_level("INFO")

    async def scenario() -> None:
        code = "print('Loading weights', flush=True); import time; time.sleep(60)"
        command = (sys.executable, "-c", code)
        backend = VLLMBackend(VLLMSettings("m", command=command), options(tmp_path, 3.0))
        try:
            with pytest.raises(BackendError) as caught:
                await backend.start()
            assert "vLLM was not ready within 3 s (--startup-timeout); its log " in str(
                caught.value
            )
        finally:
            await backend.close()

    run(scenario(), START_S)
    said = [r.getMessage() for r in caplog.records if "vLLM is starting" in r.getMessage()]
    assert said[-1].endswith(" s): Loading weights")
    assert len(said) >= 3


def test_a_model_served_under_another_name_is_asked_by_that(tmp_path: Path) -> None:
    renaming = write_script(tmp_path / "renaming", RENAMING.format(python=sys.executable))

    async def scenario() -> None:
        backend = VLLMBackend(VLLMSettings("m", command=[str(renaming)]), options(tmp_path))
        await backend.start()
        try:
            await ask(backend)
            assert backend.client is not None
            assert backend.client.model == "other"
        finally:
            await backend.close()

    run(scenario(), START_S)


# -------------------------------------------------------------------- what it is doing


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("", "no word from it yet"),
        (
            "(EngineCore pid=12) INFO 11-22 17:00:00 [gpu_model_runner.py:12] Starting to load "
            "model m...\n",
            "Starting to load model m...",
        ),
        (
            "Loading safetensors checkpoint shards:   0% Completed | 0/2\r"
            "Loading safetensors checkpoint shards:  50% Completed | 1/2\r",
            "Loading safetensors checkpoint shards:  50% Completed | 1/2",
        ),
        (
            "INFO 11-22 17:00:00 [backends.py:3] Compiling a graph for shape 8\n"
            "/x.py:51: DeprecationWarning: loading is deprecated\n  warnings.warn(\n",
            "Compiling a graph for shape 8",
        ),
        ("Capturing CUDA graphs: " + "#" * 200, "Capturing CUDA graphs: " + "#" * 77),
    ],
)
def test_the_last_telling_line_of_the_log_says_what_it_is_doing(output: str, expected: str) -> None:
    assert stage_of(output) == expected


def test_what_libraries_say_at_exit_and_calls_that_went_well_do_not_hide_the_reason() -> None:
    lines = [
        "(EngineCore pid=7) ERROR 11-22 17:00:00 [core.py:9] RuntimeError: no memory",
        'INFO:     127.0.0.1:5 - "POST /v1/chat/completions HTTP/1.1" 500 Internal Server Error',
        'INFO:     127.0.0.1:5 - "GET /metrics HTTP/1.1" 200 OK',
        "nanobind: leaked 64 types!",
        ' - leaked type "triton._C.libtriton.ir.location"',
        " - ... skipped remainder",
        "",
    ]
    assert [line for line in lines if not re.search(vllm._NOISE, line)] == lines[:2]
