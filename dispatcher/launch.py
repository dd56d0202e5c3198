"""`dispatcher run`: a server and task managers on this machine, as processes, until it is done.

Starts them, restarts one that dies, shows how it goes, and ends them all; it holds no state of
the run itself, so that stopping it anywhere loses nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import uvloop

from dispatcher import logs
from dispatcher.child import Child
from dispatcher.client import AsyncWorkClient
from dispatcher.config import (
    Parser,
    add_input_options,
    add_run_limits,
    argv_of,
    default_state_dir,
    number,
    run_settings_of,
)
from dispatcher.errors import (
    BackendError,
    DispatcherError,
    ExitCode,
    QuotaExhaustedError,
    UsageError,
)
from dispatcher.input_options import INPUT_HELP, is_data_set, is_standard_input
from dispatcher.pause_notes import PauseNotes
from dispatcher.preview.command import add_preview_options, preview
from dispatcher.progress import Display, LogDisplay, make_display, model_lines
from dispatcher.remedies import ACCEPT_FAILURES, UNPAUSE, options_that_go_on
from dispatcher.run_command import (
    LOCAL_RUN,
    Handed,
    Start,
    add_resume_options,
    check_copied,
    handing_over,
    note_start,
    read_start,
    resume_hint,
    what_next,
)
from dispatcher.run_facts import clock, facts_of_summary
from dispatcher.run_paths import input_option, output_option, state_option
from dispatcher.server_file import TOKEN_VARIABLE, page_hint, server_file_in
from dispatcher.storage.files import Files
from dispatcher.storage.inputs.pipe import CLOSED
from dispatcher.storage.run_state import PARTIAL_SPOOL_FILE, SPOOL_FILE, load_run_file
from dispatcher.taskmanager.backend.gpus import slice_environment
from dispatcher.taskmanager.backend.making import check_keys, gpus_needed
from dispatcher.taskmanager.backend.options import add_backend_options, sections_of
from dispatcher.taskmanager.backend.reading import backends_of
from dispatcher.taskmanager.cli import (
    REFUSED,
    add_task_options,
    describe_command,
    task_code_still_runs,
)

_POLL_S = 0.5
_STATUS_TIMEOUT_S = 5.0
_RESTARTS = 3
_RESTART_DELAY_S = 1.0
_SERVER_READY_S = 120.0
_LOOK_EVERY_S = 5.0
_WORKERS_STOP_S = 3.0
_SERVER_STOP_S = 1.5
_COMPLETE_STOP_S = 10.0
"""A server whose run is complete ends at once, or when an open page has seen it."""
_READY = r"dispatcher-server: (?:run \S+ at (http\S+)|(the run is complete))"

_EXAMPLES = """\
examples:
  dispatcher run --task my_tasks.py:MyTask --input prompts.jsonl --output answers.jsonl \\
      --model org/model --task-arg temperature=0
  dispatcher run --task my_tasks.py:MyTask --input prompts.jsonl --preview 3 --model org/model
  dispatcher run --task my_tasks.py:MyTask --input hf:./questions --input-split test \\
      --output answers.jsonl --model org/model
  dispatcher run --resume answers.jsonl.dispatch       # go on, from any directory
  dispatcher run --config run.yaml --task-managers 8   # options from a file, eight GPUs

exit codes: 0 complete, 1 error, 2 usage, 3 stopped and resumable, 4 complete with __ERROR__
lines (of a preview as well)"""


def build_parser() -> Parser:
    """Return the command's options."""
    parser = Parser(
        prog="dispatcher run",
        description="Run a task over a file on this machine: starts a server and task managers, "
        "shows how it goes, and ends with the output complete. The same command, or --resume, "
        "goes on where it was stopped.",
        epilog=_EXAMPLES,
    )
    add_task_options(parser)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--input", type=input_option, required=True, metavar="INPUT", help=INPUT_HELP
    )
    add_input_options(files)
    files.add_argument(
        "--output",
        type=output_option,
        metavar="FILE",
        help="output, one result a line; required to run",
    )
    files.add_argument(
        "--state",
        type=state_option,
        metavar="DIR",
        help="state directory (default: OUTPUT.dispatch)",
    )
    files.add_argument("--config", type=Path, metavar="FILE", help="YAML file of these options")
    parser.add_argument(
        "--task-managers",
        type=number(int, 1, 256),
        default=1,
        metavar="N",
        help="task manager processes, each with a model server of its own",
    )
    add_preview_options(parser)
    add_resume_options(parser, has_task=True)
    add_backend_options(parser)
    add_run_limits(parser)
    logs.add_log_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    noted: Path | None = None
    try:
        parser = build_parser()
        start = read_start(LOCAL_RUN, parser, argv)
        logs.start_logging(start.args.log_format, with_content=start.args.log_content)
        # This run has a token of its own, which its processes find in server.json; another's is
        # none of their business, let alone of the model servers that they start.
        os.environ.pop(TOKEN_VARIABLE, None)
        if start.args.preview is not None:
            return _preview(start)
        if start.args.output is None:
            parser.error("the following arguments are required: --output")
        slices = _check(start)
        command = describe_command(start)
        if command is not None:
            note_start(run_settings_of(start.args, start.args.input, start.args.output, command))
            noted = _state_dir_of(start.args)
        sections = sections_of(start.args)
        with handing_over(command, start.args.accept_changes, sections) as handed:
            return uvloop.run(LocalRun(start.args, handed, slices).run())
    except DispatcherError as error:
        print(f"dispatcher run: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # before the signal was taken over
        hint = f"; {what_next(LOCAL_RUN, noted, start.args.input)}" if noted else ""
        print(f"dispatcher run: stopped before anything was handed out{hint}", file=sys.stderr)
        return ExitCode.STOPPED


def _preview(start: Start) -> int:
    code = preview(start)
    sys.stdout.flush()
    sys.stderr.flush()
    if task_code_still_runs():
        # It blocks, perhaps for good; tearing the interpreter down under it could crash.
        os._exit(code)
    return code


def _check(start: Start) -> list[dict[str, str]]:
    """Refuse what cannot work before any process is started.

    Return what each task manager has in its environment.
    """
    args = start.args
    backends = backends_of(args, os.environ)
    if start.is_complete:
        return []
    check_keys(backends, os.environ)
    state_dir = _state_dir_of(args)
    check_copied(start, args.input)
    has_copy = (state_dir / SPOOL_FILE).exists()
    if is_standard_input(args.input):
        if not has_copy and sys.__stdin__ is None:
            raise UsageError(CLOSED)
        if not has_copy and os.isatty(0):
            raise UsageError("the input - is standard input, but that is a terminal; name a file")
    elif not (args.input.exists() or is_data_set(args.input) or has_copy):
        raise UsageError(f"cannot read the input {args.input}: there is no such file")
    if args.input.is_char_device() or args.input.absolute().is_relative_to("/dev"):
        # It is read by a server process whose standard input is not this command's.
        raise UsageError(
            f"the input {args.input} is not a file; give - for standard input, or write it to a "
            "file first"
        )
    return _slices(args.task_managers, gpus_needed(backends))


def _slices(task_managers: int, gpus_each: int) -> list[dict[str, str]]:
    """Share the GPUs of this machine out among the task managers; one alone has them all."""
    if task_managers == 1 or gpus_each == 0:
        return [{} for _ in range(task_managers)]
    return [slice_environment(os.environ, place, gpus_each) for place in range(task_managers)]


def _state_dir_of(args: argparse.Namespace) -> Path:
    state: Path = args.state or default_state_dir(args.output)
    return state.absolute()


class LocalRun:
    """The processes of one run, from start to end.

    `handed` are the files its processes go by, `slices` what is set in the environment of each
    task manager.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        handed: Handed | None = None,
        slices: Sequence[Mapping[str, str]] = (),
    ) -> None:
        self._args = args
        self._handed = handed = handed or Handed()
        self._slices = slices
        self._state_dir = _state_dir_of(args)
        self._log_dir = args.log_dir or self._state_dir / "logs"
        # Where the server is and what token it wants: read again when it was started again.
        self._address = f"@{server_file_in(self._state_dir)}"
        self._server = Child(
            "the server", self._server_argv(), self._log("server"), handed.environment
        )
        has_copy = (self._state_dir / SPOOL_FILE).exists()
        self._server.reads_input = is_standard_input(args.input) and not has_copy
        self._workers: list[Child] = []
        self._client: AsyncWorkClient | None = None
        self._status: dict[str, Any] = {}
        is_for_programs = args.log_format == "json"
        self._display: Display = LogDisplay() if is_for_programs else make_display()
        self._pauses = PauseNotes(self._state_dir, self._display, self._resume_hint)

    async def run(self) -> int:
        """Run to the end; return the exit code."""
        start = time.monotonic()
        working = asyncio.ensure_future(self._work())
        for signum in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(signum, working.cancel)
        try:
            await working
        except asyncio.CancelledError:
            self._display.note("stopping; what is not finished is given back")
        finally:
            # However this ends, no process outlives it; a second Ctrl-C changes nothing.
            await self._end_processes()
            self._display.close()
        return self._summary(time.monotonic() - start)

    async def _work(self) -> None:
        if await self._start_server():
            self._client = AsyncWorkClient(self._address, timeout_s=_STATUS_TIMEOUT_S)
            if await self._may_begin():
                await self._start_workers()
                await self._watch()

    # ---------------------------------------------------------------- the three verbs

    async def _start_server(self) -> bool:
        """Start the server; return whether there is work, which there is not after the end."""
        await self._server.start()
        try:
            ready = await self._server_is_ready()
        except BackendError as error:
            code = self._server.process.exit_code
            failure = DispatcherError(self._server.last_words())
            failure.exit_code = ExitCode(code) if code in (1, 2, 3) else ExitCode.ERROR
            raise failure from error
        if ready[1] is None and self._server.reads_input and self._args.resume is None:
            self._display.note("the run was complete before: standard input was not read")
        self._server.reads_input = False  # all of it is in the state directory
        # Should it die and be started again, failures and pauses since this start count.
        once = (ACCEPT_FAILURES, UNPAUSE)
        self._server.argv = [word for word in self._server.argv if word not in once]
        if ready[1] is not None:
            place = server_file_in(self._state_dir)
            self._display.note(page_hint(ready[1], place, wants_token=True))
        return ready[1] is not None

    async def _server_is_ready(self) -> re.Match[str]:
        """Return what the server says when it serves; copying its input may take it hours."""
        partial = self._state_dir / PARTIAL_SPOOL_FILE
        until = time.monotonic() + _SERVER_READY_S
        while True:
            try:
                return await self._server.process.wait_for_line(_READY, _LOOK_EVERY_S)
            except BackendError:
                if self._server.process.exit_code is not None:
                    raise
                if partial.exists():
                    size = partial.stat().st_size if partial.exists() else 0
                    self._display.note(f"copying the input: {size / 2**20:,.0f} MiB so far")
                    until = time.monotonic() + _SERVER_READY_S
                elif time.monotonic() > until:
                    raise

    async def _start_workers(self) -> None:
        for number_ in range(self._args.task_managers):
            name = f"task-manager-{number_}"
            argv = self._worker_argv(self._log_dir / name)
            environment = self._slices[number_] if self._slices else {}
            self._workers.append(Child(name, argv, self._log(name), environment))
        for worker in self._workers:
            await worker.start()

    async def _may_begin(self) -> bool:
        """Wait while an operator's pause lasts, so that no model is started for nothing.

        False when there is nothing left to begin for.
        """
        while not self._server.is_drained_server:
            await self._look()
            state = self._status.get("state")
            if state not in ("paused", "draining"):
                return bool(state != "complete")
            await self._mend()
            await asyncio.sleep(_POLL_S)
        return False

    async def _watch(self) -> None:
        """Show the run until it is complete or stopped; start again what dies."""
        complete = False
        while not self._server.is_drained_server:
            ended = complete and not self._running_workers()
            await self._look()
            if ended:
                return  # and this status holds the totals that the workers left behind
            complete = self._status.get("state") == "complete"
            if not complete:
                await self._mend()
            await asyncio.sleep(_POLL_S)

    # ---------------------------------------------------------------- inside

    async def _look(self) -> None:
        """Ask the server how the run is, and show it; nothing changes when it does not answer."""
        assert self._client is not None
        if status := await self._client.status():
            self._status = status
            logs.know(run=status.get("run"))
            self._display.show(status, time.monotonic())
            self._pauses.look(status)

    def _running_workers(self) -> list[Child]:
        return [worker for worker in self._workers if worker.process.exit_code is None]

    async def _mend(self) -> None:
        """Start a process that died again, a few times; give up on one that never worked."""
        self._check_quota()
        for child in (self._server, *self._workers):
            code = child.process.exit_code
            if code is None or (code == ExitCode.COMPLETE and child is not self._server):
                continue
            if child.is_drained_server or (child is not self._server and child.stopped_by_itself):
                continue
            if child is self._server and code == ExitCode.COMPLETE:
                self._status["state"] = "complete"
                continue
            # The server did, or there would be no worker; it may have died before its first answer.
            never_worked = child is not self._server and not self._status.get("next_work_id")
            in_vain = child.restarts >= _RESTARTS and child.run_had == self._got_on()
            in_vain = in_vain or child.last_words().startswith(REFUSED)
            if in_vain or code == ExitCode.USAGE or never_worked:
                raise DispatcherError(
                    f"{child.name} ended with exit code {code}: {child.last_words()} "
                    f"(its log is {child.log_path}; go on with: {self._resume_hint})"
                )
            self._count_restart(child)
            self._display.note(f"{child.name} ended with exit code {code}; starting it again")
            await asyncio.sleep(_RESTART_DELAY_S)
            await child.start()

    def _check_quota(self) -> None:
        """Raise QuotaExhaustedError once all workers ended, one because its quota is used up."""
        stopped = [worker for worker in self._workers if worker.stopped_by_itself]
        if stopped and not self._running_workers():
            ended = {worker.process.exit_code for worker in self._workers}
            if ended <= {ExitCode.COMPLETE, ExitCode.STOPPED}:
                raise QuotaExhaustedError(
                    f"{stopped[0].last_words()} (go on with: {self._resume_hint})"
                )

    def _got_on(self) -> int:
        """Return a figure that grows whenever an item comes nearer to its end."""
        return sum(self._status.get(name, 0) for name in ("done", "charged", "crashed"))

    def _count_restart(self, child: Child) -> None:
        child.restarts = child.restarts + 1 if child.run_had == self._got_on() else 1
        child.run_had = self._got_on()

    async def _end_processes(self) -> None:
        """End the workers, which give back what they hold, then the server, which takes it."""
        await asyncio.gather(*(w.process.stop(_WORKERS_STOP_S) for w in self._workers))
        if self._client is not None:
            await self._client.close()
        is_complete = self._status.get("state") == "complete"
        await self._server.process.stop(_COMPLETE_STOP_S if is_complete else _SERVER_STOP_S)

    def _summary(self, seconds: float) -> int:
        run_file = load_run_file(self._state_dir, Files()) or {}
        if run_file.get("state") != "complete":
            ended = "stopped"
            if self._server.is_drained_server:
                ended = "drained (somebody asked the server to end)"
            paused = self._status.get("paused")
            unpause = f" {options_that_go_on(paused['by'])}" if paused else ""
            self._display.note(
                f"{ended} after {clock(seconds)} with at least {self._status.get('done', 0)} lines "
                f"done; {what_next(LOCAL_RUN, self._state_dir, self._args.input)}{unpause}"
            )
            return ExitCode.STOPPED
        summary = run_file.get("summary", {})
        facts = facts_of_summary(summary)
        tokens = self._status.get("completion_tokens", 0)
        self._display.note(
            f"complete: {facts.done} lines, {facts.failed} with errors, "
            f"{facts.charged} charged reissues, {tokens} tokens generated, "
            f"in {clock(seconds)}: {self._args.output}"
        )
        for line in model_lines(summary):
            self._display.note(line)
        if mismatches := summary.get("step_mismatches", 0):
            self._display.note(
                f"{mismatches} times a task that was begun again asked something else than was "
                "recorded, so that the model was asked anew (README, Writing tasks)"
            )
        if facts.failed:
            again = shlex.join(["dispatcher", "runs", str(self._state_dir), "--failed-to", "FILE"])
            self._display.note(f"errors: {facts.causes}; to run these lines again: {again}")
        return ExitCode.COMPLETE_WITH_ERRORS if facts.failed else ExitCode.COMPLETE

    @property
    def _resume_hint(self) -> str:
        return resume_hint(LOCAL_RUN, self._state_dir)

    def _log(self, name: str) -> Path:
        return Path(self._log_dir) / f"{name}.log"

    def _server_argv(self) -> list[str]:
        limits = Parser(add_help=False)
        add_run_limits(limits)
        logs.add_log_options(limits)
        add_input_options(limits.add_argument_group("files"))
        files = [f"--infile={self._args.input}", f"--outfile={self._args.output}"]
        command = [sys.executable, "-m", "dispatcher.server", *files]
        return [
            *command,
            f"--state={self._state_dir}",
            "--port=0",
            *argv_of(limits, self._args),
        ]

    def _worker_argv(self, log_dir: Path) -> list[str]:
        forwarded = Parser(add_help=False)
        add_task_options(forwarded)
        add_backend_options(forwarded)
        logs.add_log_options(forwarded)
        changed: dict[str, Any] = {"log_dir": log_dir}
        if self._handed.task_args is not None:
            changed |= {"task_args": self._handed.task_args, "task_arg": []}
        options = argparse.Namespace(**{**vars(self._args), **changed})
        command = [sys.executable, "-m", "dispatcher.taskmanager.cli"]
        if self._handed.config is not None:
            command.append(f"--config={self._handed.config}")
        return [*command, f"--dispatcher={self._address}", *argv_of(forwarded, options)]
