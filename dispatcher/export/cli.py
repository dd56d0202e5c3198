"""`dispatcher export`: write a run's output as Parquet, or compressed."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from dispatcher.config import Parser, parse
from dispatcher.errors import DispatcherError, ExitCode
from dispatcher.export.exporting import Exported, Wish, export
from dispatcher.run_paths import file_option, place_option
from dispatcher.storage.files import Files

_TELL_EVERY_S = 5.0

_DESCRIPTION = """\
Write the output of a run as Parquet, or as JSON lines that are compressed: row i is line i. The
kind of file is told by its name: .parquet, .jsonl.zst, .jsonl.gz or .jsonl. The file has its name
only once it is whole and on disk.

Parquet has a column for each key of the answers, with the type that all values of that key have;
keys that come and go are null where they are missing. Whole numbers and others together are
floating-point numbers. Where kinds mix, as text and numbers, values are kept as JSON text, and
the command says so. An __ERROR__ line is null in all columns but __ERROR__, which holds as
JSON text what it says, or the whole line if it has other keys too. To find all that, the output is
read once before it is written. What was exported can be the --input of another run, in which JSON
text is again what it was."""

_EXAMPLES = """\
examples:
  dispatcher export answers.jsonl --to answers.parquet
  dispatcher export answers.jsonl.dispatch --to answers.jsonl.zst --errors-to failed.jsonl
  dispatcher export answers.jsonl --to so-far.jsonl.gz --partial --force

exit codes: 0 done, 1 error, 2 usage, 3 interrupted (nothing was written)"""


def build_parser() -> Parser:
    """Return the command's options."""
    parser = Parser(prog="dispatcher export", description=_DESCRIPTION, epilog=_EXAMPLES)
    parser.add_argument(
        "place", type=place_option, metavar="OUTPUT", help="output, or state directory"
    )
    parser.add_argument(
        "--to",
        type=file_option,
        required=True,
        metavar="FILE",
        help="new file: .parquet, .jsonl.zst, .jsonl.gz or .jsonl",
    )
    errors = parser.add_mutually_exclusive_group()
    errors.add_argument(
        "--skip-errors",
        action="store_true",
        help="leave __ERROR__ lines out; row i is then no longer line i (default: no)",
    )
    errors.add_argument(
        "--errors-to",
        type=file_option,
        metavar="FILE",
        help="write __ERROR__ lines to this file instead, as JSON lines of two keys: work_id, the "
        "number of the line, and __ERROR__, what it says (default: none)",
    )
    parser.add_argument(
        "--partial",
        action="store_true",
        help="export a run that is not complete as far as it is (default: no)",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace files that exist (default: no)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    try:
        args = parse(build_parser(), argv)
        wish = Wish(args.to, args.skip_errors, args.errors_to, args.force, args.partial)
        with _ended_by_sigterm():
            done = export(args.place, wish, Files(), _Teller())
        print(_said(done, wish))
    except DispatcherError as error:
        print(f"dispatcher export: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("dispatcher export: interrupted; nothing was written", file=sys.stderr)
        return ExitCode.STOPPED
    return ExitCode.COMPLETE


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does, so that no half of a file is left."""

    def end(signum: int, _: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_IGN)  # a second one would stop the cleaning up
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Teller:
    """Says every few seconds how far it is."""

    def __init__(self) -> None:
        self._said_at = time.monotonic()

    def __call__(self, line: int) -> None:
        if line % 1000 == 0 and time.monotonic() - self._said_at >= _TELL_EVERY_S:
            self._said_at = time.monotonic()
            print(f"dispatcher export: at line {line:,}", file=sys.stderr)


def _said(done: Exported, wish: Wish) -> str:
    rows = f"{done.rows} row{'s' if done.rows != 1 else ''}"
    said = [f"{rows} of {done.output} in {wish.target}"]
    if done.errors:
        where = "among them"
        if wish.errors_to is not None:
            where = f"in {wish.errors_to}"
        elif wish.skip_errors:
            where = "left out"
        said[0] += f"; errors {where}: {done.errors}"
    if done.json_columns:
        said.append(f"kept as JSON text: {', '.join(done.json_columns)}")
    return "\n".join(said)


if __name__ == "__main__":
    sys.exit(main())
