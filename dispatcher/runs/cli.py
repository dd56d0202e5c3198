"""`dispatcher runs`: what runs there are, what became of a line, failed lines out and back in."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock

from dispatcher.config import Parser, number, parse
from dispatcher.errors import DispatcherError, ExitCode, UsageError
from dispatcher.run_paths import file_option, place_option
from dispatcher.runs import show
from dispatcher.runs.failed import write_failed
from dispatcher.runs.found import find_runs, the_run
from dispatcher.runs.history import item_history
from dispatcher.runs.look import look
from dispatcher.runs.merge import merge
from dispatcher.storage.files import Files

_LOOKS_AT_ONCE = 16

_DESCRIPTION = """\
List the runs in and under directories: how far each is, its errors, and how to resume it.
A run is looked at without changing anything, also while it is running.
With one run (its state directory, or its output), show what became of one line, write the
lines that failed to a new input, or put the results of that input's run back."""

_EXAMPLES = """\
examples:
  dispatcher runs .                                    # all runs below this directory
  dispatcher runs /data/runs --json                   # the same, for a program
  dispatcher runs answers.jsonl.dispatch --item 17    # what became of line 17 (the first is 0)


  # run the failed lines again, here those of one kind, and put the answers in their places
  dispatcher runs answers.jsonl.dispatch --failed-to again.jsonl --kind model_error
  dispatcher run --task my_tasks.py:MyTask --model org/model \\
      --input again.jsonl --output answers2.jsonl
  dispatcher runs answers.jsonl.dispatch --merge answers2.jsonl

exit codes: 0 done, 1 error, 2 usage, 3 interrupted (the same command goes on)"""


def build_parser() -> Parser:
    """Return the command's options."""
    parser = Parser(
        prog="dispatcher runs",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "places",
        nargs="*",
        type=place_option,
        metavar="DIR",
        help="directory with runs in or under it, a state directory, or an output "
        "(default: the current directory)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON (default: text)")
    listing = parser.add_argument_group("the list")
    listing.add_argument(
        "--depth",
        type=number(int, 0, 100),
        default=6,
        metavar="N",
        help="levels of directories to look into below DIR",
    )
    listing.add_argument(
        "--scan",
        action="store_true",
        help="read whole outputs to count errors by kind, for runs of a version that did not "
        "count them (default: no)",
    )
    one = parser.add_argument_group(
        "one run", "with --item, --failed-to or --merge (default: none, the runs are listed)"
    )
    what = one.add_mutually_exclusive_group()
    what.add_argument(
        "--item",
        type=number(int, 0),
        metavar="N",
        help="show attempts, workers, steps, errors and result of line N; the first is 0",
    )
    what.add_argument(
        "--failed-to",
        type=file_option,
        metavar="FILE",
        help="write the input lines whose result is an __ERROR__ to a new file, byte for byte and "
        "not compressed, and beside it FILE.origin, which tells where they belong",
    )
    what.add_argument(
        "--merge",
        type=place_option,
        metavar="OUTPUT2",
        help="put the results of the run over such a file (its output, or its state directory) at "
        "their positions in the first run's output. Only __ERROR__ lines are replaced, a line "
        "that failed again by its new error; both runs must be complete. May be interrupted and "
        "given again at any time",
    )
    one.add_argument(
        "--kind",
        action="append",
        default=[],
        metavar="KIND",
        help="--failed-to: only lines with this error; may be given several times (default: all)",
    )
    one.add_argument(
        "--failed",
        type=file_option,
        metavar="FILE",
        help="--merge: the file that --failed-to wrote (default: the input of OUTPUT2's run)",
    )
    one.add_argument(
        "--keep-old-errors",
        action="store_true",
        help="--merge: a line that failed again keeps its first error (default: the new one)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    try:
        args = parse(build_parser(), argv)
        _check(args)
        _command(args)
        sys.stdout.flush()
    except DispatcherError as error:
        print(f"dispatcher runs: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("dispatcher runs: interrupted; the same command goes on", file=sys.stderr)
        return ExitCode.STOPPED
    except BrokenPipeError:  # who reads this has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return ExitCode.COMPLETE


def _check(args: argparse.Namespace) -> None:
    """Refuse options without what they belong to."""
    args.places = args.places or [Path()]
    one_run = args.item is not None or args.failed_to is not None or args.merge is not None
    if one_run and len(args.places) > 1:
        raise UsageError(f"{len(args.places)} directories were given; this needs one run")
    if args.kind and args.failed_to is None:
        raise UsageError("--kind goes with --failed-to FILE")
    if (args.failed is not None or args.keep_old_errors) and args.merge is None:
        raise UsageError("--failed and --keep-old-errors go with --merge OUTPUT2")
    if args.scan and one_run:
        raise UsageError("--scan goes with the list of runs only")
    if args.json and (args.failed_to is not None or args.merge is not None):
        raise UsageError("--json goes with the list of runs and with --item")


def _command(args: argparse.Namespace) -> None:
    if args.item is not None:
        _show_item(args)
    elif args.failed_to is not None:
        _write_failed(args)
    elif args.merge is not None:
        _merge(args)
    else:
        _list(args)


def _list(args: argparse.Namespace) -> None:
    runs = find_runs(args.places, args.depth)
    # Side by side, as most of the time is spent waiting for servers and file systems.
    with ThreadPoolExecutor(_LOOKS_AT_ONCE) as threads:
        standings = list(threads.map(partial(look, scan=args.scan, turn=Lock()), runs))
    if args.json:
        _print_json([show.standing_json(standing) for standing in standings])
    elif standings:
        print(show.list_text(standings))
    else:
        places = ", ".join(map(str, args.places))
        print(f"no runs in {places}, up to {args.depth} levels down (--depth N)")


def _show_item(args: argparse.Namespace) -> None:
    run = the_run(args.places[0], args.depth)
    history = item_history(run, args.item)
    if args.json:
        _print_json(show.history_json(run, history))
    else:
        print(show.history_text(run, history))


def _write_failed(args: argparse.Namespace) -> None:
    run = the_run(args.places[0], args.depth)
    found = write_failed(run, args.failed_to, set(args.kind), Files())
    kinds = {k: n for k, n in found.kinds.items() if not args.kind or k in args.kind}
    print(show.failed_text(run, args.failed_to, len(found.work_ids), kinds))


def _merge(args: argparse.Namespace) -> None:
    run = the_run(args.places[0], args.depth)
    merged = merge(
        run,
        args.merge,
        failed=args.failed,
        keep_old_errors=args.keep_old_errors,
        files=Files(),
    )
    print(show.merged_text(args.merge, merged))


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
