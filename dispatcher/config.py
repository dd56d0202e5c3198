"""Flags and YAML files -> frozen settings.

A command builds an argparse parser; `parse` lets a YAML file (`--config`) set the same options
under the same names, and flags win over it. Unknown keys are refused by name.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from dispatcher.core.work_queue import QueuePolicy
from dispatcher.errors import UsageError


@dataclass(frozen=True, slots=True)
class RunSettings:
    """One run: its files, its limits. Times are in seconds, sizes in bytes."""

    infile: Path
    outfile: Path
    state_dir: Path
    policy: QueuePolicy = field(default_factory=QueuePolicy)
    retry_s: float = 300.0
    max_line_bytes: int = 16 << 20
    max_result_bytes: int = 16 << 20
    checkpoint_every_s: float = 5.0
    checkpoint_every_bytes: int = 64 << 20


def default_state_dir(outfile: Path) -> Path:
    """Return the state directory of a run unless `--state` names another."""
    return outfile.with_name(outfile.name + ".dispatch")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show each option's default, but not where there is none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, "", argparse.SUPPRESS) or action.default == []:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with whole option names only, so that an added option never breaks a script."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", HelpFormatter)
        options.setdefault("allow_abbrev", False)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        """End the command with one sentence; the usage is long, and --help shows it."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parse(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags over the YAML file that `--config` names, if any."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name need not be printable
            stream.reconfigure(errors="backslashreplace")
    probe = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    probe.add_argument("--config", type=Path)
    known, _ = probe.parse_known_args(argv)
    if known.config is not None:
        _apply_config_file(parser, known.config)
    return parser.parse_args(argv)


def _apply_config_file(parser: Parser, path: Path) -> None:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read --config {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"--config {path} is not YAML: {error}") from error
    if content is None:
        return
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} must hold `option: value` lines")
    actions = {
        option.removeprefix("--").replace("-", "_"): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and option not in ("--help", "--config")
    }
    for key, value in content.items():
        action = actions.get(str(key).replace("-", "_"))
        if action is None:
            raise UsageError(f"--config {path}: unknown option {key!r}; see --help for the names")
        _set_default(parser, action, key, value, path)


def _set_default(parser: Parser, action: argparse.Action, key: str, value: Any, path: Path) -> None:
    is_switch = action.nargs == 0
    if value is False and action.choices is not None and "off" in action.choices:
        value = "off"  # YAML takes the word for false
    if is_switch != isinstance(value, bool):
        kind = "true or false" if is_switch else "a value"
        raise UsageError(f"--config {path}: {key} needs {kind}, not {value!r}")
    if not is_switch:
        if isinstance(action, argparse._AppendAction) and not isinstance(value, list):
            value = [value]
        if isinstance(value, list) and isinstance(action, argparse._AppendAction):
            value = [str(part) for part in value]
        elif isinstance(value, str | int | float):
            value = str(value)  # argparse converts a default that is a string
        else:
            raise UsageError(f"--config {path}: {key} needs a value, not {value!r}")
        if action.choices is not None and value not in action.choices:
            choices = ", ".join(map(str, action.choices))
            raise UsageError(f"--config {path}: {key} is {value!r}, but must be one of {choices}")
    action.required = False
    parser.set_defaults(**{action.dest: value})


def argv_of(parser: Parser, args: argparse.Namespace) -> list[str]:
    """Return the options of `parser` that differ from their defaults, as a command line.

    So a command that starts another one hands on exactly what the user set.
    """
    argv: list[str] = []
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if not action.option_strings or value is None or value == action.default:
            continue
        option = action.option_strings[0]
        if action.nargs == 0:
            argv.append(option)
        else:
            # One word, so that a value that begins with a dash is not taken for an option.
            argv += [f"{option}={v}" for v in (value if isinstance(value, list) else [value])]
    return argv


def number(
    kind: type[int] | type[float], least: float, most: float = float("inf")
) -> Callable[[str], Any]:
    """Return an argparse type: a number within bounds, refused with a sentence otherwise."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        if not least <= value <= most:
            upper = f" to {most:g}" if most != float("inf") else " or more"
            raise argparse.ArgumentTypeError(f"{text} is out of range; allowed: {least:g}{upper}")
        return value

    return convert


def add_run_limits(parser: Parser) -> None:
    """Add the options every command that owns a run has: server, file mode and `run`."""
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--work-timeout",
        type=number(float, 0.001),
        default=1200.0,
        metavar="S",
        help="seconds an item may take without progress before it is handed out again",
    )
    group.add_argument(
        "--max-retries",
        type=number(int, -1),
        default=3,
        metavar="N",
        help="charged reissues of an item before it becomes an __ERROR__ line; -1: no limit",
    )
    group.add_argument(
        "--lease-term",
        type=number(float, 0.1),
        default=30.0,
        metavar="S",
        help="seconds without a heartbeat before a worker counts as dead",
    )
    group.add_argument(
        "--max-line-bytes",
        type=number(int, 1, 1 << 30),
        default=16 << 20,
        metavar="BYTES",
        help="longer input lines become __ERROR__ lines",
    )
    group.add_argument(
        "--window",
        type=number(int, 0),
        default=0,
        metavar="N",
        help="at most so many lines between the first unfinished one and the last handed out; "
        "0: no limit",
    )
    group.add_argument(
        "--backup-tasks",
        choices=("auto", "off"),
        default="auto",
        help="near the end, hand out items that run far longer than others a second time",
    )


def policy_of(args: argparse.Namespace) -> QueuePolicy:
    """Build the queue's policy from the options of `add_run_limits`."""
    return QueuePolicy(
        max_retries=args.max_retries,
        work_timeout_s=args.work_timeout,
        lease_term_s=args.lease_term,
        window=args.window,
        backups=args.backup_tasks == "auto",
    )


def run_settings_of(args: argparse.Namespace, infile: Path, outfile: Path) -> RunSettings:
    """Build a run's settings from parsed options; paths become absolute."""
    outfile = outfile.absolute()
    state: Path | None = getattr(args, "state", None)
    return RunSettings(
        infile=infile.absolute(),
        outfile=outfile,
        state_dir=state.absolute() if state is not None else default_state_dir(outfile),
        policy=policy_of(args),
        retry_s=getattr(args, "retry", 300.0),
        max_line_bytes=args.max_line_bytes,
    )
