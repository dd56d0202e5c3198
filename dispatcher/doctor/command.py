"""`dispatcher doctor`: every check, one line each."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from dispatcher.config import (
    Parser,
    add_input_options,
    add_run_limits,
    default_state_dir,
    input_options_of,
    number,
    parse,
)
from dispatcher.doctor.finding import Finding, problem
from dispatcher.doctor.lines import Sample, check_input
from dispatcher.doctor.machine import check_gpus, check_open_files, check_versions
from dispatcher.doctor.models import check_models
from dispatcher.doctor.places import (
    MOUNTS,
    Places,
    Probe,
    check_clock,
    check_file_system,
    check_locks,
    check_output,
    check_space,
    check_writing,
)
from dispatcher.doctor.server import check_server
from dispatcher.doctor.task import check_task
from dispatcher.errors import DispatcherError, ExitCode
from dispatcher.input_options import INPUT_HELP
from dispatcher.run_paths import input_option, output_option, state_option
from dispatcher.server_file import token_given
from dispatcher.taskmanager.backend.making import check_keys, gpus_needed
from dispatcher.taskmanager.backend.options import add_backend_options
from dispatcher.taskmanager.backend.reading import backends_of
from dispatcher.taskmanager.cli import add_task_options, task_code_still_runs
from dispatcher.taskmanager.task.loading import parse_task_args

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}

_EXAMPLES = """\
example:
  dispatcher doctor --task my_tasks.py:MyTask --input prompts.jsonl --output answers.jsonl \\
      --no-launch --port 8001 --model org/model

exit codes: 0 no problem, 1 a problem, 2 usage"""


def build_parser() -> Parser:
    """Return the command's options: those of `dispatcher run`, none of them required."""
    parser = Parser(
        prog="dispatcher doctor",
        description="Look at everything a run needs before it is begun, and say what to mend, a "
        "line a check. Takes the options of dispatcher run, also by their names in "
        "dispatcher-server and dispatcher-task-run, and checks what they name; nothing is left "
        "behind, and no model is asked to generate.",
        epilog=_EXAMPLES,
    )
    add_task_options(parser)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--input", "--infile", type=input_option, metavar="INPUT", help=f"the run's {INPUT_HELP}"
    )
    add_input_options(files)
    files.add_argument(
        "--output", "--outfile", type=output_option, metavar="FILE", help="the run's output"
    )
    files.add_argument(
        "--state",
        type=state_option,
        metavar="DIR",
        help="state directory (default: OUTPUT.dispatch)",
    )
    files.add_argument(
        "--expect-bytes-per-line",
        type=number(float, 0),
        metavar="BYTES",
        help="bytes that a line of output will have, by which the space is judged; "
        "dispatcher run --preview tells it (default: twice a line of input)",
    )
    files.add_argument("--config", type=Path, metavar="FILE", help="YAML file of the run's options")
    parser.add_argument(
        "--task-managers",
        type=number(int, 1, 256),
        default=1,
        metavar="N",
        help="task managers of the run on this machine, each with its own GPUs",
    )
    server = parser.add_argument_group("dispatcher server of a task manager")
    server.add_argument(
        "--dispatcher", metavar="ADDRESS", help="@STATE/server.json, HOST:PORT or a URL"
    )
    server.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="file with its token (default: as dispatcher-task-run)",
    )
    server.add_argument(
        "--server-fingerprint",
        metavar="SHA256",
        help="fingerprint of its certificate (default: as dispatcher-task-run)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    add_backend_options(parser)
    add_run_limits(parser)
    for action in parser._actions:
        action.required = False
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    try:
        args = parse(build_parser(), argv)
    except DispatcherError as error:
        print(f"dispatcher doctor: {error}", file=sys.stderr)
        return error.exit_code
    findings: list[Finding] = []
    console = Console(highlight=False, markup=False, soft_wrap=True, emoji=False)
    for finding in Examination(args).findings():
        findings.append(finding)
        if not args.json:
            _print(console, finding)
    problems = sum(finding.status == "problem" for finding in findings)
    warnings = sum(finding.status == "warning" for finding in findings)
    if args.json:
        checks = [asdict(finding) for finding in findings]
        print(json.dumps({"ok": not problems, "checks": checks}, indent=2))
    else:
        counts = (problems, "problem"), (warnings, "warning"), (len(findings), "check")
        said = [f"{count} {what}{'s' * (count != 1)}" for count, what in counts]
        console.print(Text(", ".join(said)))
    code = ExitCode.ERROR if problems else ExitCode.COMPLETE
    sys.stdout.flush()
    sys.stderr.flush()
    if task_code_still_runs():
        os._exit(code)
    return code


def _print(console: Console, finding: Finding) -> None:
    text = Text(str(finding))
    text.stylize(_STYLES[finding.status], 0, len(finding.status))
    console.print(text)


class Examination:
    """All checks of a set-up, one after the other; a later one uses what earlier ones found."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._sample: Sample | None = None
        self._gpus_wanted = 0

    def findings(self) -> Iterator[Finding]:
        """Check what the options name; what a check cannot do is what it found."""
        args = self._args
        yield check_versions()
        yield check_open_files()
        if args.input is not None:
            yield from _checked("input", self._input)
        if args.output is not None:
            yield from self._places()
        if args.task is not None:
            yield from _checked("task", self._task)
        if args.dispatcher is not None:
            yield from _checked("dispatcher server", self._server)
        named = (args.backend, args.model, args.backends, args.models_to_run)
        if args.no_launch or any(each is not None for each in named):
            yield from _checked("model server", self._models)
        yield check_gpus(os.environ, self._gpus_wanted)

    def _input(self) -> list[Finding]:
        args = self._args
        options = input_options_of(args, args.input)
        finding, self._sample = check_input(args.input, args.max_line_bytes, options)
        return [finding]

    def _places(self) -> Iterator[Finding]:
        args = self._args
        output: Path = args.output.absolute()
        state: Path | None = args.state
        state_dir = state.absolute() if state is not None else default_state_dir(output)
        places = Places(output, state_dir)
        yield from _checked("output", lambda: [check_output(places)])
        mounts = MOUNTS.read_text("utf-8", "replace") if MOUNTS.exists() else ""
        probes = [Probe(directory) for directory in places.directories]
        for probe in probes:
            yield check_writing(probe)
            yield check_file_system(probe.directory, mounts)
            if probe.sync_s:
                yield check_locks(probe.directory)
        yield check_clock(probes)
        per_line = args.expect_bytes_per_line
        yield from _checked("space", lambda: [check_space(places, self._sample, per_line)])

    def _task(self) -> list[Finding]:
        args = self._args
        line = self._sample.first if self._sample is not None else None
        task_args = parse_task_args(args.task_arg, args.task_args)
        return [check_task(args.task, task_args, line, args.max_retries)]

    def _server(self) -> list[Finding]:
        args = self._args
        by_file = args.dispatcher.startswith("@") and args.token_file is None
        token = None if by_file else token_given(args.token_file)
        return [check_server(args.dispatcher, token, args.server_fingerprint)]

    def _models(self) -> list[Finding]:
        backends = backends_of(self._args, os.environ)
        self._gpus_wanted = gpus_needed(backends) * self._args.task_managers
        check_keys(backends, os.environ)
        return asyncio.run(check_models(backends, os.environ))


def _checked(check: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return look()
    except DispatcherError as error:
        return [problem(check, str(error), "")]
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        return [problem(check, f"{error.strerror or error}{where}", "see that it can be read")]
