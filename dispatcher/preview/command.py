"""Run the first lines of an input through a task and show what happened; leave nothing behind."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import uvloop
from rich.console import Console
from rich.text import Text

from dispatcher.config import Parser, input_options_of, number
from dispatcher.errors import ExitCode, UsageError
from dispatcher.preview.record import LineRecord
from dispatcher.preview.source import PreviewSource, TimedBackend
from dispatcher.preview.text import SHOWN_CHARACTERS, Row, Writer, summary
from dispatcher.run_command import Start
from dispatcher.storage.inputs.beginning import beginning_of
from dispatcher.storage.inputs.opening import reader_of
from dispatcher.storage.lines import InputLine
from dispatcher.storage.source import LineSource
from dispatcher.taskmanager.backend.making import check_keys, make_backend
from dispatcher.taskmanager.backend.reading import backends_of
from dispatcher.taskmanager.backend.settings import Backends
from dispatcher.taskmanager.manager import Manager
from dispatcher.taskmanager.task.base import Task
from dispatcher.taskmanager.task.loading import load_task, parse_task_args

MOST_LINES = 10_000
_SCAN_BYTES = 4 << 20


def add_preview_options(parser: Parser) -> None:
    """Add what asks for a preview instead of a run."""
    group = parser.add_argument_group("rehearsal")
    group.add_argument(
        "--preview",
        type=number(int, 1, MOST_LINES),
        metavar="N",
        help="run the first N lines only, print the input, requests, responses and result of "
        "each, and end: no output is written, no state is kept, --output is not needed",
    )
    group.add_argument(
        "--preview-full",
        action="store_true",
        help=f"--preview: print texts whole, not their first {SHOWN_CHARACTERS} characters",
    )


@dataclass(frozen=True, slots=True)
class Beginning:
    """The first lines of an input, and how many it has in all, estimated unless `is_exact`.

    0 where nothing tells.
    """

    lines: list[InputLine]
    in_all: float
    is_exact: bool


def preview(start: Start) -> int:
    """Preview what a command would run; return its exit code.

    Raises DispatcherError with what cannot work.
    """
    args = start.args
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    backends = backends_of(args, os.environ)
    check_keys(backends, os.environ)
    with tempfile.TemporaryDirectory(prefix="dispatcher-preview-") as directory:
        beginning = _read(args, Path(directory))
        task_args = parse_task_args(args.task_arg, args.task_args, start.task_args)
        task_class = load_task(args.task, task_args)
        return uvloop.run(_run(args, backends, task_class, beginning, Path(directory)))


def _read(args: argparse.Namespace, directory: Path) -> Beginning:
    options = replace(input_options_of(args, args.input), streaming=True)
    reader = reader_of(args.input, options)
    if reader is None:
        source = LineSource(args.input, args.max_line_bytes)
        try:
            return _first_lines(source, str(args.input), args.preview, source.size_bytes)
        finally:
            source.close()
    with beginning_of(reader, directory, args.max_line_bytes, args.preview) as part:
        is_part = not part.is_whole
        return _first_lines(
            part.source, reader.name, args.preview, part.size_bytes, is_part=is_part
        )


def _first_lines(
    source: LineSource,
    name: str,
    count: int,
    size_bytes: float | None,
    *,
    is_part: bool = False,
) -> Beginning:
    lines: list[InputLine] = []
    offset = 0
    while len(lines) < count:
        more = source.scan(offset, count - len(lines), _SCAN_BYTES)
        if not more:
            break
        lines += more
        offset = more.end
    if not lines:
        raise UsageError(f"the input {name} is empty; there is nothing to preview")
    in_all = len(lines) * size_bytes / offset if size_bytes is not None else 0
    return Beginning(lines, in_all, is_exact=offset >= source.size_bytes and not is_part)


class _Printer:
    """Prints blocks in the order of their lines, each as soon as it is its turn."""

    def __init__(self, *, full: bool) -> None:
        self._writer = Writer(None if full else SHOWN_CHARACTERS)
        self._console = Console(highlight=False, markup=False, soft_wrap=True, emoji=False)
        self._ended: dict[int, LineRecord] = {}
        self._next = 0

    def take(self, record: LineRecord) -> None:
        """Take a line that has ended."""
        self._ended[record.work_id] = record
        while self._next in self._ended:
            self._print(self._writer.block(self._ended[self._next]))
            self._next += 1

    def end(self, beginning: Beginning) -> int:
        """Print what is left, if the preview was cut short, and the summary; return a code."""
        for work_id in sorted(self._ended):
            if work_id >= self._next:
                self._print(self._writer.block(self._ended[work_id]))
        records = [self._ended[work_id] for work_id in sorted(self._ended)]
        if records:
            for line in summary(records, beginning.in_all, is_exact=beginning.is_exact):
                self._console.print(Text(line))
        failed = any(record.error is not None for record in records)
        return ExitCode.COMPLETE_WITH_ERRORS if failed else ExitCode.COMPLETE

    def _print(self, rows: list[Row]) -> None:
        for row in rows:
            for place, line in enumerate(row.lines()):
                # Of what a model or a file said only the first line, which is ours, has a colour.
                self._console.print(Text(line, style=row.style if place == 0 else ""))
        self._console.print()


async def _run(
    args: argparse.Namespace,
    backends: Backends,
    task_class: type[Task],
    beginning: Beginning,
    directory: Path,
) -> int:
    printer = _Printer(full=args.preview_full)
    with _stopped_by_signals() as stopped:
        backend = TimedBackend(make_backend(backends, args.log_dir or directory))
        try:
            await backend.start()
            source = PreviewSource(
                task_class, beginning.lines, args.max_retries, backend.seconds_of, printer.take
            )
            await Manager(source, backend).run()
        except asyncio.CancelledError:
            if not stopped:
                raise
            running = asyncio.current_task()
            assert running is not None
            running.uncancel()
            printer.end(beginning)
            print("dispatcher run: the preview was stopped", file=sys.stderr)
            return ExitCode.STOPPED
        finally:
            await backend.close()
    return printer.end(beginning)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[list[int]]:
    """Cancel the task that runs when a signal asks to end; the list then holds its number."""
    running = asyncio.current_task()
    assert running is not None
    stopped: list[int] = []

    def stop(signum: int) -> None:
        if not stopped:
            stopped.append(signum)
            running.cancel()

    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop, signum)
    yield stopped
