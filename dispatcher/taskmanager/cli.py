"""`dispatcher-task-run`: run a task over a server's items, or over a file."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import hashlib
import logging
import os
import secrets
import shlex
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop

from dispatcher.config import Parser, add_run_limits, number, run_settings_of
from dispatcher.errors import DispatcherError, ExitCode, UsageError
from dispatcher.models import WorkerStats
from dispatcher.run_command import (
    TASK_RUN,
    Start,
    add_resume_options,
    note_start,
    read_start,
    resume_hint,
)
from dispatcher.server_file import TOKEN_VARIABLE, token_given
from dispatcher.taskmanager.backend.base import Backend
from dispatcher.taskmanager.backend.fake import FakeBackend
from dispatcher.taskmanager.backend.local import DEFAULT_MODEL, MAX_PARALLEL, LocalBackend
from dispatcher.taskmanager.backend.openai_compatible import Endpoint, OpenAICompatibleBackend
from dispatcher.taskmanager.backend.vllm import VLLMBackend, VLLMSettings
from dispatcher.taskmanager.manager import Manager
from dispatcher.taskmanager.step_threads import THREAD_NAME
from dispatcher.taskmanager.task.base import Task
from dispatcher.taskmanager.task.loading import (
    describe_task,
    find_task,
    load_task,
    parse_task_args,
)
from dispatcher.taskmanager.tasksource.dispatcher import DispatcherTaskSource
from dispatcher.taskmanager.tasksource.file import FileTaskSource
from dispatcher.taskmanager.tasksource.leased import LeasedSource

BACKENDS = ("vllm", "openai", "local", "fake")
DEFAULT_WORKERS = 64
FAKE_MODEL = "fake"
_THREAD_END_S = 0.1
BASE_URL_VARIABLE = "OPENAI_BASE_URL"
OPENAI_URL = "https://api.openai.com/v1"


def build_parser() -> Parser:
    """Return the command's options."""
    parser = Parser(
        prog="dispatcher-task-run",
        description="Run a task against a model server: over the items of a dispatcher server "
        "(--dispatcher), or over a file (--input, --output).",
    )
    add_task_options(parser)
    source = parser.add_argument_group("work")
    source.add_argument(
        "--dispatcher",
        metavar="ADDRESS",
        help="server to take work from: @STATE/server.json, HOST:PORT or a URL",
    )
    source.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="file with the server's token (default: the one in server.json, if that is named, "
        "else the variable DISPATCHER_TOKEN)",
    )
    source.add_argument("--input", type=Path, metavar="FILE", help="file mode: input")
    source.add_argument("--output", type=Path, metavar="FILE", help="file mode: output")
    source.add_argument(
        "--state", type=Path, metavar="DIR", help="file mode: state (default: OUTPUT.dispatch)"
    )
    source.add_argument(
        "--server-timeout",
        type=number(float, 1),
        default=600.0,
        metavar="S",
        help="seconds without an answer from the server before this worker gives up",
    )
    source.add_argument("--config", type=Path, metavar="FILE", help="YAML file of these options")
    add_resume_options(parser, has_task=True)
    add_backend_options(parser)
    add_run_limits(parser)
    return parser


def add_task_options(parser: Parser) -> None:
    """Add what says which task runs, with which parameters."""
    task = parser.add_argument_group("task")
    task.add_argument(
        "--task",
        required=True,
        metavar="SPEC",
        help="module:Class, module.Class or path/file.py:Class",
    )
    task.add_argument(
        "--task-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter of the task (self.args); repeatable",
    )
    task.add_argument(
        "--task-args", type=Path, metavar="FILE", help="YAML file of the task's parameters"
    )


def add_backend_options(parser: Parser) -> None:
    """Add what says which model server answers, and how many requests it gets."""
    model = parser.add_argument_group("model server")
    model.add_argument("--backend", choices=BACKENDS, default="vllm", help="kind of model server")
    model.add_argument(
        "--model", metavar="NAME", help=f"model name or path (default of local: {DEFAULT_MODEL})"
    )
    model.add_argument(
        "--base-url",
        metavar="URL",
        help=f"--backend openai: the server's URL with /v1 (default: OPENAI_BASE_URL, "
        f"else {OPENAI_URL})",
    )
    model.add_argument(
        "--api-key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="--backend openai: environment variable that holds the API key",
    )
    model.add_argument(
        "--no-launch", action="store_true", help="use a model server that runs at --host, --port"
    )
    model.add_argument("--host", default="127.0.0.1", help="--no-launch: the server's host")
    model.add_argument(
        "--port", type=number(int, 1, 65535), default=8000, help="--no-launch: the server's port"
    )
    model.add_argument(
        "--startup-timeout",
        type=number(float, 1),
        default=1800.0,
        metavar="S",
        help="seconds the model server may take to start",
    )
    model.add_argument(
        "--request-timeout",
        type=number(float, 0.1),
        default=600.0,
        metavar="S",
        help="seconds one model request may take",
    )
    model.add_argument(
        "--workers",
        type=number(int, 1, 65536),
        metavar="N",
        help=f"model requests in flight (default: {DEFAULT_WORKERS}; local: {MAX_PARALLEL})",
    )
    model.add_argument(
        "--batch-size",
        type=number(int, 1, 4096),
        metavar="N",
        help="items kept ready ahead of need (default: a quarter of --workers)",
    )
    model.add_argument(
        "--max-model-len", type=number(int, 1), metavar="TOKENS", help="context length limit"
    )
    model.add_argument(
        "--fakellm-args",
        default="",
        metavar="ARGS",
        help="--backend fake: options of fakellm, as in --fakellm-args='--latency-s 0.2'",
    )
    model.add_argument(
        "--log-dir",
        type=Path,
        metavar="DIR",
        help="where logs go (default: a temporary directory; of dispatcher run: STATE/logs)",
    )
    vllm = parser.add_argument_group("vLLM")
    vllm.add_argument(
        "--tensor-parallel",
        type=number(int, 1),
        default=1,
        metavar="GPUS",
        help="GPUs to spread the model over",
    )
    vllm.add_argument("--chat-template", metavar="FILE", help="chat template to use")
    vllm.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    vllm.add_argument("--silence-vllm-logs", action="store_true", help="log warnings only")
    vllm.add_argument(
        "--vllm-extra-args",
        default="",
        metavar="ARGS",
        help="options of vLLM, as in --vllm-extra-args='--seed 1'",
    )
    vllm.add_argument(
        "--vllm-command",
        metavar="COMMAND",
        help="command that starts vLLM's server (default: vllm serve, or its module form)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    # Thousands of requests in flight are many live objects; looking for cycles among them after
    # every few hundred allocations costs more than it frees.
    gc.set_threshold(20_000, 20, 50)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    try:
        start = read_start(TASK_RUN, build_parser(), argv)
        _check(start.args)
        command = None if start.args.dispatcher is not None else describe_command(start)
        task_class = _load_task(start, command)
        code = uvloop.run(run(start.args, task_class, command))
    except DispatcherError as error:
        print(f"dispatcher-task-run: {error}", file=sys.stderr)
        code = int(error.exit_code)
    except KeyboardInterrupt:  # before the signal was taken over: nothing was begun
        code = ExitCode.STOPPED
    sys.stdout.flush()
    sys.stderr.flush()
    if _task_code_still_runs():
        # It blocks, perhaps for good; tearing the interpreter down under it could crash.
        os._exit(code)
    return code


def describe_command(start: Start) -> dict[str, Any] | None:
    """Return what run.yaml keeps of a command that owns a run and its task.

    None when the run is complete and the task not looked at. Raises TaskLoadError.
    """
    if start.is_complete:
        return None
    args = start.args
    task_args = parse_task_args(args.task_arg, args.task_args, start.task_args)
    if args.backend == "openai" and args.base_url is None and BASE_URL_VARIABLE in os.environ:
        start.record("base_url", os.environ[BASE_URL_VARIABLE])
    task = describe_task(args.task, find_task(args.task), task_args)
    return start.describe(task, describe_model(args))


def describe_model(args: argparse.Namespace) -> dict[str, Any]:
    """Return a model's name and, where this machine serves it, what its files look like."""
    filled = argparse.Namespace(**vars(args))
    check_backend(filled)
    described: dict[str, Any] = {"name": filled.model}
    if filled.model is None or filled.no_launch or filled.backend not in ("vllm", "local"):
        return described
    path = Path(filled.model).absolute()
    if not path.exists():
        return described | {"files": None}
    return described | {"path": str(path), "files": _fingerprint(path)}


def _fingerprint(path: Path) -> str:
    """Return a hash over the names and sizes of a model's files."""
    hashed = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        name = file.relative_to(path.parent)
        hidden = any(part.startswith(".") for part in name.parts[1:])  # a download's notes
        if not hidden and file.is_file():
            hashed.update(f"{os.fsencode(name).hex()} {file.stat().st_size}\n".encode())
    return hashed.hexdigest()


def _load_task(start: Start, command: dict[str, Any] | None) -> type[Task]:
    args = start.args
    if command is None:
        task_args = parse_task_args(args.task_arg, args.task_args, start.task_args)
        return load_task(args.task, task_args)
    # The task's own preparations may take long; from here on the run can be resumed.
    note_start(run_settings_of(args, args.input, args.output, command))
    return load_task(args.task, command["task"]["args"])


def _task_code_still_runs() -> bool:
    """Say whether a thread of task code did not end when its manager did."""
    threads = [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]
    for thread in threads:
        thread.join(_THREAD_END_S)
    return any(thread.is_alive() for thread in threads)


def _check(args: argparse.Namespace) -> None:
    """Refuse combinations that argparse cannot."""
    has_files = args.input is not None or args.output is not None
    if args.resume is not None and args.dispatcher is not None:
        raise UsageError(
            "--resume goes on with a run over a file; a worker of a server (--dispatcher) has "
            "nothing to resume and is just started again"
        )
    if (args.dispatcher is not None) == has_files:
        raise UsageError("give either --dispatcher ADDRESS or --input FILE --output FILE")
    if has_files and (args.input is None or args.output is None):
        raise UsageError("file mode needs both --input FILE and --output FILE")
    check_backend(args)


def check_backend(args: argparse.Namespace) -> None:
    """Refuse backend options that cannot work together, and fill in defaults."""
    if args.model is None:
        args.model = {"local": DEFAULT_MODEL, "fake": FAKE_MODEL}.get(args.backend)
    if args.model is None and not args.no_launch:
        raise UsageError(f"--backend {args.backend} needs --model NAME")
    if args.no_launch and args.backend in ("local", "fake"):
        raise UsageError(f"--no-launch does not go with --backend {args.backend}")
    if args.workers is None:
        args.workers = MAX_PARALLEL if args.backend == "local" else DEFAULT_WORKERS
    if args.batch_size is None:
        args.batch_size = max(2, args.workers // 4)


async def run(
    args: argparse.Namespace, task_class: type[Task], command: dict[str, Any] | None = None
) -> int:
    """Start the backend, run the manager until the work is done, end everything.

    `command` is what run.yaml keeps of the command in file mode.
    """
    stopping = asyncio.Event()
    main_task = asyncio.current_task()
    assert main_task is not None

    def stop() -> None:
        if not stopping.is_set():
            stopping.set()
            main_task.cancel()

    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop)
    with contextlib.ExitStack() as stack:
        log_dir = args.log_dir or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="dispatcher-"))
        )
        backend = make_backend(args, log_dir)
        try:
            await _run_manager(args, task_class, backend, command)
        except asyncio.CancelledError:
            if not stopping.is_set():
                raise
            main_task.uncancel()
            print(f"dispatcher-task-run: stopped; {_what_next(args)}")
            return ExitCode.STOPPED
        finally:
            await backend.close()
    return ExitCode.COMPLETE


def _what_next(args: argparse.Namespace) -> str:
    if args.dispatcher is not None:
        return "what was not finished was given back"
    state_dir = run_settings_of(args, args.input, args.output).state_dir
    return f"go on with: {resume_hint(TASK_RUN, state_dir)}"


async def _run_manager(
    args: argparse.Namespace,
    task_class: type[Task],
    backend: Backend,
    command: dict[str, Any] | None,
) -> None:
    manager: Manager | None = None

    def stats() -> WorkerStats:
        usage = backend.usage
        in_flight = manager.requests_in_flight if manager is not None else 0
        replayed = manager.totals.replayed if manager is not None else 0
        return WorkerStats(
            usage.requests, usage.prompt_tokens, usage.completion_tokens, in_flight, replayed
        )

    worker = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    source: LeasedSource
    if args.dispatcher is not None:
        source = from_server = DispatcherTaskSource(
            args.dispatcher,
            task_class,
            worker=worker,
            token=_token(args),
            model=args.model,
            batch_size=args.batch_size,
            server_timeout_s=args.server_timeout,
            backend_up=backend.healthy,
            stats=stats,
        )
        if await from_server.is_over():
            print("dispatcher-task-run: the run is complete, there is nothing to do")
            return
    else:
        source = from_file = FileTaskSource(
            run_settings_of(args, args.input, args.output, command),
            task_class,
            worker=worker,
            model=args.model,
            batch_size=args.batch_size,
            backend_up=backend.healthy,
            stats=stats,
        )
        await from_file.open()
        if from_file.service.finished.is_set():
            print(f"dispatcher-task-run: the run is complete, {args.output} is whole")
            await from_file.service.close()
            return
    try:
        await backend.start()
    except BaseException:  # a signal, too: the run's files and connections are let go of
        await source.give_back([], "the backend did not start")
        raise
    manager = Manager(source, backend, workers=args.workers)
    await manager.run()


def _token(args: argparse.Namespace) -> str | None:
    """Return the token that the user gave; None leaves it to server.json."""
    from_variable = token_given(None)
    # Neither the task nor the model server that is started next needs it.
    os.environ.pop(TOKEN_VARIABLE, None)
    if args.token_file is not None:
        return token_given(args.token_file)
    return None if args.dispatcher.startswith("@") else from_variable


def make_backend(args: argparse.Namespace, log_dir: Path) -> Backend:
    """Build the backend that the options describe."""
    if args.no_launch or args.backend == "openai":
        return ExistingServer(_endpoint(args), args.startup_timeout)
    common = {
        "startup_timeout_s": args.startup_timeout,
        "request_timeout_s": args.request_timeout,
        "log_dir": log_dir,
    }
    if args.backend == "fake":
        arguments = split_arguments(args.fakellm_args, "--fakellm-args")
        return FakeBackend(model=args.model, arguments=arguments, **common)
    if args.backend == "local":
        return LocalBackend(
            model=args.model, parallel=args.workers, context_tokens=args.max_model_len, **common
        )
    command = args.vllm_command
    settings = VLLMSettings(
        model=args.model,
        tensor_parallel=args.tensor_parallel,
        max_model_len=args.max_model_len,
        chat_template=args.chat_template,
        enforce_eager=args.enforce_eager,
        extra_args=split_arguments(args.vllm_extra_args, "--vllm-extra-args"),
        command=split_arguments(command, "--vllm-command") if command is not None else None,
        quiet=args.silence_vllm_logs,
    )
    return VLLMBackend(settings, **common)


class ExistingServer(OpenAICompatibleBackend):
    """A model server that somebody else started."""

    def __init__(self, endpoint: Endpoint, startup_timeout_s: float) -> None:
        super().__init__(endpoint)
        self._startup_timeout_s = startup_timeout_s

    async def start(self) -> None:
        """Return when it answers. Raises BackendError after the start-up time-out."""
        await super().start()
        await self.wait_until_serving(self._startup_timeout_s)


def _endpoint(args: argparse.Namespace) -> Endpoint:
    url = args.base_url
    if url is None and args.no_launch:
        host = f"[{args.host}]" if ":" in args.host else args.host
        url = f"http://{host}:{args.port}/v1"
    if url is None:
        url = os.environ.get(BASE_URL_VARIABLE, OPENAI_URL)
    # A key goes only where it belongs: a vLLM of one's own is not shown the hosted one's.
    key = os.environ.get("VLLM_API_KEY" if args.no_launch else args.api_key_env)
    return Endpoint(url, args.model, key, args.request_timeout)


def split_arguments(text: str, option: str) -> list[str]:
    """Split an option that holds command-line arguments, as a shell would."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{option} {text!r}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
