"""`dispatcher-task-run`: run a task over a server's items, or over a file."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop

from dispatcher import logs
from dispatcher.config import (
    Parser,
    add_input_options,
    add_run_limits,
    run_settings_of,
    seconds,
)
from dispatcher.errors import BackendRefusalError, DispatcherError, ExitCode, UsageError
from dispatcher.input_options import INPUT_HELP
from dispatcher.models import ModelStats, WorkerStats
from dispatcher.run_command import (
    TASK_RUN,
    Start,
    add_resume_options,
    check_copied,
    note_start,
    read_start,
    what_next,
)
from dispatcher.run_paths import input_option, output_option, state_option
from dispatcher.server_file import TOKEN_VARIABLE, token_given
from dispatcher.taskmanager.backend.accounts import for_heartbeat
from dispatcher.taskmanager.backend.base import Backend
from dispatcher.taskmanager.backend.making import check_keys, make_backend
from dispatcher.taskmanager.backend.options import add_backend_options, describe_model
from dispatcher.taskmanager.backend.reading import backends_of
from dispatcher.taskmanager.backend.settings import (
    AUTO,
    DEFAULT_WORKERS,
    Backends,
    HostedSettings,
    urls_of,
)
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

STOPPED = "stopped"
REFUSED = "the model server refused: "
"""What this command says last when a signal ended it, and when no restart would help."""

_THREAD_END_S = 0.1

_EXAMPLES = """\
examples:
  dispatcher-task-run --dispatcher @answers.jsonl.dispatch/server.json \\
      --task my_tasks.py:MyTask --model org/model --tensor-parallel 2
  dispatcher-task-run --dispatcher HOST:8000 --task my_tasks.py:MyTask \\
      --no-launch --port 8001 --model org/model        # a vLLM that runs already
  dispatcher-task-run --task my_tasks.py:MyTask --model org/model \\
      --input prompts.jsonl --output answers.jsonl     # no server, one file

exit codes: 0 complete, 1 error, 2 usage, 3 stopped and resumable,
5 the server stayed away too long"""


def build_parser() -> Parser:
    """Return the command's options."""
    parser = Parser(
        prog="dispatcher-task-run",
        description="Run a task against a model server: over the items of a dispatcher server "
        "(--dispatcher), or over a file (--input, --output).",
        epilog=_EXAMPLES,
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
    source.add_argument(
        "--server-fingerprint",
        metavar="SHA256",
        help="SHA-256 fingerprint of the certificate of a server that speaks TLS, without which "
        "nothing is sent to it (default: the one in server.json, if that is named, else the "
        "variable DISPATCHER_FINGERPRINT; without any, a server at https:// must have a "
        "certificate that this system trusts)",
    )
    source.add_argument(
        "--input", type=input_option, metavar="INPUT", help=f"file mode: {INPUT_HELP}"
    )
    add_input_options(source)
    source.add_argument("--output", type=output_option, metavar="FILE", help="file mode: output")
    source.add_argument(
        "--state",
        type=state_option,
        metavar="DIR",
        help="file mode: state (default: OUTPUT.dispatch)",
    )
    source.add_argument(
        "--server-timeout",
        type=seconds(1),
        default=600.0,
        metavar="S",
        help="seconds without an answer from the server before this worker gives up (exit code 5); "
        "finished results that it could not hand in are then in STATE/spool, where the server "
        "finds them, if --dispatcher is @STATE/server.json",
    )
    source.add_argument("--config", type=Path, metavar="FILE", help="YAML file of these options")
    add_resume_options(parser, has_task=True)
    add_backend_options(parser)
    add_run_limits(parser)
    logs.add_log_options(parser)
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    # Thousands of requests in flight are many live objects; looking for cycles among them after
    # every few hundred allocations costs more than it frees.
    gc.set_threshold(20_000, 20, 50)
    try:
        start = read_start(TASK_RUN, build_parser(), argv)
        logs.start_logging(start.args.log_format, with_content=start.args.log_content)
        backends = _check(start.args)
        if start.args.input is not None:
            check_copied(start, start.args.input)
        if not start.is_complete:
            check_keys(backends, os.environ)
        command = None if start.args.dispatcher is not None else describe_command(start)
        task_class = _load_task(start, command)
        code = uvloop.run(run(start.args, backends, task_class, command))
    except BackendRefusalError as error:
        print(f"dispatcher-task-run: {REFUSED}{error}", file=sys.stderr)
        code = int(error.exit_code)
    except DispatcherError as error:
        print(f"dispatcher-task-run: {error}", file=sys.stderr)
        code = int(error.exit_code)
    except KeyboardInterrupt:  # before the signal was taken over: nothing was begun
        code = ExitCode.STOPPED
    sys.stdout.flush()
    sys.stderr.flush()
    if task_code_still_runs():
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
    backends = backends_of(args, os.environ)
    _record_addresses(start, backends)
    task = describe_task(args.task, find_task(args.task), task_args)
    return start.describe(task, describe_model(backends))


def _record_addresses(start: Start, backends: Backends) -> None:
    """Keep the addresses that came from the environment as if they had been given."""
    for name, settings in backends.by_name.items():
        if not isinstance(settings, HostedSettings) or settings.url_variable not in os.environ:
            continue
        urls = list(urls_of(settings))
        if (named := start.options.get("backends")) is None:
            start.record("base_url", urls)
            continue
        # A name need not be text in the file.
        found = {
            key: {**entry, "base_url": urls} for key, entry in named.items() if str(key) == name
        }
        start.record("backends", {**named, **found})


def _load_task(start: Start, command: dict[str, Any] | None) -> type[Task]:
    args = start.args
    if command is None:
        task_args = parse_task_args(args.task_arg, args.task_args, start.task_args)
        return load_task(args.task, task_args)
    # The task's own preparations may take long; from here on the run can be resumed.
    note_start(run_settings_of(args, args.input, args.output, command))
    return load_task(args.task, command["task"]["args"])


def task_code_still_runs() -> bool:
    """Say whether a thread of task code did not end when its manager did."""
    threads = [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]
    for thread in threads:
        thread.join(_THREAD_END_S)
    return any(thread.is_alive() for thread in threads)


def _check(args: argparse.Namespace) -> Backends:
    """Refuse combinations that argparse cannot; return the backends that were asked for."""
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
    return backends_of(args, os.environ)


def _batch_size(args: argparse.Namespace, backends: Backends) -> int:
    """Return how many items are kept ready: as asked for, or what the requests in flight need."""
    if args.batch_size is not None:
        return int(args.batch_size)
    workers = backends.first.workers
    return max(2, workers // 4) if workers != AUTO else DEFAULT_WORKERS


async def run(
    args: argparse.Namespace,
    backends: Backends,
    task_class: type[Task],
    command: dict[str, Any] | None = None,
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
        backend = make_backend(backends, log_dir)
        try:
            await _run_manager(args, backends, task_class, backend, command)
        except asyncio.CancelledError:
            if not stopping.is_set():
                raise
            main_task.uncancel()
            print(f"dispatcher-task-run: {STOPPED}; {_what_next(args)}")
            return ExitCode.STOPPED
        finally:
            await backend.close()
    return ExitCode.COMPLETE


def _what_next(args: argparse.Namespace) -> str:
    if args.dispatcher is not None:
        return "what was not finished was given back"
    settings = run_settings_of(args, args.input, args.output)
    return what_next(TASK_RUN, settings.state_dir, settings.infile)


async def _run_manager(
    args: argparse.Namespace,
    backends: Backends,
    task_class: type[Task],
    backend: Backend,
    command: dict[str, Any] | None,
) -> None:
    manager: Manager | None = None

    def stats() -> WorkerStats:
        return _stats(backend, manager)

    worker = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    logs.know(worker=worker)
    source: LeasedSource
    if args.dispatcher is not None:
        source = from_server = DispatcherTaskSource(
            args.dispatcher,
            task_class,
            worker=worker,
            token=_token(args),
            fingerprint=args.server_fingerprint,
            model=backends.first.model,
            batch_size=_batch_size(args, backends),
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
            model=backends.first.model,
            batch_size=_batch_size(args, backends),
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
    manager = Manager(source, backend)
    await manager.run()
    if args.dispatcher is None and from_file.service.finished.is_set():
        done = from_file.service.queue.counters
        print(f"dispatcher-task-run: complete, {done.done} lines, {done.failed} with errors")


def _stats(backend: Backend, manager: Manager | None) -> WorkerStats:
    """Return what this worker did since it started."""
    models = for_heartbeat(backend.accounts())
    whole = ModelStats()
    for model in models.values():
        whole.add(model)
    return WorkerStats(
        requests=whole.requests,
        prompt_tokens=whole.prompt_tokens,
        completion_tokens=whole.completion_tokens,
        in_flight=backend.requests_in_flight,
        replayed=manager.totals.replayed if manager is not None else 0,
        slow_steps=manager.slow_steps if manager is not None else 0,
        longest_step_s=manager.longest_step_s if manager is not None else 0.0,
        models=models,
    )


def _token(args: argparse.Namespace) -> str | None:
    """Return the token that the user gave; None leaves it to server.json."""
    from_variable = token_given(None)
    # Neither the task nor the model server that is started next needs it.
    os.environ.pop(TOKEN_VARIABLE, None)
    if args.token_file is not None:
        return token_given(args.token_file)
    return None if args.dispatcher.startswith("@") else from_variable


if __name__ == "__main__":
    sys.exit(main())
