"""Flags and YAML files -> frozen settings.

A command builds an argparse parser; `parse` lets a YAML file (`--config`) set the same options
under the same names, and flags win over it. Unknown keys are refused by name.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from dispatcher.core.failures import LEAST_LINES, NO_LIMIT, parse_failure_limit
from dispatcher.core.work_queue import QueuePolicy
from dispatcher.errors import UsageError
from dispatcher.help_text import HelpFormatter
from dispatcher.input_options import InputOptions, absolute_input, check_input_options

NOT_IN_A_FILE = (
    *("--help", "--config", "--resume", "--accept-changes", "--accept-failures", "--unpause"),
    *("--preview", "--preview-full"),
)
"""Options that only a command line can hold: each is about that one start."""


MOST_SECONDS = 10 * 365 * 24 * 3600.0
"""Ten years: nobody waits longer, so that more, or `inf`, is a slip."""

START_VARIABLE = "DISPATCHER_START"
"""Names a start of a run, where something repeats a command by itself, as Slurm does with a job."""


@dataclass(frozen=True, slots=True)
class RunSettings:
    """One run: its files, its limits. Times are in seconds, sizes in bytes.

    `command` is how the run was started, as run.yaml keeps it (run_command.py); None where nobody
    says. With `accept_changes` a run goes on although its task is another one now, with
    `accept_failures` its failed lines are counted anew, with `unpause` an operator's pause is over;
    the latter two hold once for each name of a `start`, if it has one.
    """

    infile: Path
    outfile: Path
    state_dir: Path
    policy: QueuePolicy = field(default_factory=QueuePolicy)
    retry_s: float = 300.0
    max_line_bytes: int = 16 << 20
    max_result_bytes: int = 16 << 20
    checkpoint_every_s: float = 5.0
    checkpoint_every_bytes: int = 64 << 20
    command: Mapping[str, Any] | None = None
    accept_changes: bool = False
    accept_failures: bool = False
    unpause: bool = False
    start: str = ""
    input_options: InputOptions = field(default_factory=InputOptions)


def default_state_dir(outfile: Path) -> Path:
    """Return the state directory of a run unless `--state` names another."""
    return outfile.with_name(outfile.name + ".dispatch")


def absolute_spec(spec: str) -> str:
    """Return a `--task` that names the same class from another directory, if it names a file."""
    path, colon, class_name = spec.rpartition(":")
    return f"{Path(path).absolute()}:{class_name}" if colon and path.endswith(".py") else spec


class Parser(argparse.ArgumentParser):
    """argparse with whole option names only, so that an added option never breaks a script."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", HelpFormatter)
        options.setdefault("allow_abbrev", False)
        super().__init__(**options)
        self.sections: tuple[str, ...] = ()

    def add_sections(self, *names: str) -> None:
        """Let a file hold these beside the options; they are taken as they stand there.

        Each is an attribute of the parsed options; None where no file has it.
        """
        self.sections += names
        self.set_defaults(**dict.fromkeys(names))

    def error(self, message: str) -> NoReturn:
        """End the command with one sentence; the usage is long, and --help shows it."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class OwnList(argparse._AppendAction):
    """A repeatable option whose flags replace the list that stands in a file."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Take one more value."""
        if getattr(namespace, self.dest) is self.default:
            setattr(namespace, self.dest, [])
        super().__call__(parser, namespace, values, option_string)


def parse(
    parser: Parser,
    argv: Sequence[str] | None,
    recorded: Callable[[Path], tuple[Mapping[str, Any], Path]] | None = None,
) -> argparse.Namespace:
    """Parse the flags over the YAML file that `--config` names, if any.

    `recorded` returns the options of the run that `--resume` names, and the file they stand in;
    the file of `--config`, and flags, win over them.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name need not be printable
            stream.reconfigure(errors="backslashreplace")
    probe = Parser(prog=parser.prog, add_help=False)
    probe.add_argument("--config", type=Path)
    if recorded is not None:
        probe.add_argument("--resume", type=Path)
    known, _ = probe.parse_known_args(argv)
    if recorded is not None and known.resume is not None:
        options, path = recorded(known.resume)
        given = {key: value for key, value in options.items() if value is not None}
        _set_defaults(parser, given, str(path))
    if known.config is not None:
        _set_defaults(parser, _read_config_file(known.config), f"--config {known.config}")
    return parser.parse_args(argv)


class _Loader(yaml.SafeLoader):
    """YAML, but 12:00:00 is that text and not the number 43200."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> Any:
        """Return a whole number, or what has colons in it as it stands."""
        return node.value if ":" in node.value else super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _read_config_file(path: Path) -> dict[Any, Any]:
    try:
        content = yaml.load(path.read_text("utf-8"), _Loader)
    except OSError as error:
        raise UsageError(f"cannot read --config {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"--config {path} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} must hold `option: value` lines")
    return content


def _set_defaults(parser: Parser, options: Mapping[Any, Any], source: str) -> None:
    """Let options that stand in a file be the parser's defaults."""
    actions = {
        option.removeprefix("--").replace("-", "_"): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and option not in NOT_IN_A_FILE
    }
    for key, value in options.items():
        if key in parser.sections:
            if value is None:
                raise UsageError(f"{source}: the section {key} is empty; fill it or leave it out")
            parser.set_defaults(**{key: value})
            continue
        action = actions.get(str(key).replace("-", "_"))
        if action is None:
            raise UsageError(f"{source}: unknown option {key!r}; see --help for the names")
        _set_default(parser, action, key, value, source)


def _set_default(
    parser: Parser, action: argparse.Action, key: str, value: Any, source: str
) -> None:
    is_switch = action.nargs == 0
    word = {True: "on", False: "off"}.get(value) if isinstance(value, bool) else None
    words = action.choices if action.choices is not None else str(action.metavar).split("|")
    if word is not None and word in words:
        value = word  # YAML takes the words for truth values
    if is_switch != isinstance(value, bool):
        kind = "true or false" if is_switch else "a value"
        raise UsageError(f"{source}: {key} needs {kind}, not {value!r}")
    if not is_switch:
        if isinstance(action, argparse._AppendAction) and not isinstance(value, list):
            value = [value]
        if isinstance(value, list) and isinstance(action, argparse._AppendAction):
            value = [str(part) for part in value]
        elif isinstance(value, str | int | float):
            value = str(value)  # argparse converts a default that is a string
        else:
            raise UsageError(f"{source}: {key} needs a value, not {value!r}")
        if action.choices is not None and value not in action.choices:
            choices = ", ".join(map(str, action.choices))
            raise UsageError(f"{source}: {key} is {value!r}, but must be one of {choices}")
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
            upper = f" to {most:.15g}" if most != float("inf") else " or more"
            raise argparse.ArgumentTypeError(f"{text} is out of range; allowed: {least:g}{upper}")
        return value

    return convert


def seconds(least: float) -> Callable[[str], Any]:
    """Return an argparse type: seconds from `least` to ten years."""
    return number(float, least, MOST_SECONDS)


def failure_limit(text: str) -> str:
    """Check a `--max-failures`. Raises argparse.ArgumentTypeError."""
    try:
        parse_failure_limit(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def add_server_address(parser: Parser) -> None:
    """Add what names the server of a run to a command that speaks to it."""
    parser.add_argument(
        "address",
        metavar="URL|@PATH",
        help="the run's server: @STATE/server.json or @STATE, HOST:PORT or a URL",
    )
    parser.add_argument(
        "--server-fingerprint",
        metavar="SHA256",
        help="SHA-256 fingerprint of the certificate of a server that speaks TLS (default: the "
        "one in server.json, if that is named, else the variable DISPATCHER_FINGERPRINT)",
    )


def add_input_options(group: argparse._ArgumentGroup) -> None:
    """Add what says which part of a data set the input is."""
    group.add_argument(
        "--input-subset",
        metavar="NAME",
        help="data sets of Hugging Face: the subset (configuration), if there are several",
    )
    group.add_argument(
        "--input-split",
        metavar="NAME",
        help="data sets of Hugging Face: the split (default: the only one, or train)",
    )
    group.add_argument(
        "--input-streaming",
        action="store_true",
        help="data sets of Hugging Face: copy the rows as they are downloaded, without keeping "
        "the files that they come in (default: no)",
    )


def input_options_of(args: argparse.Namespace, infile: Path) -> InputOptions:
    """Return what says which part of a data set the input is. Raises UsageError."""
    names = ("input_subset", "input_split", "input_streaming")
    subset, split, streaming = (getattr(args, name, None) for name in names)
    options = InputOptions(subset, split, bool(streaming))
    check_input_options(infile, options)
    return options


def add_run_limits(parser: Parser) -> None:
    """Add the options every command that owns a run has: server, file mode and `run`."""
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--work-timeout",
        type=seconds(0.001),
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
        "--max-failures",
        type=failure_limit,
        default=NO_LIMIT,
        metavar="N|P%|off",
        help="pause the run when more lines than this became __ERROR__ lines: a number, as 200, "
        f"or a share of the lines finished so far, as 5%%, which counts from {LEAST_LINES} lines "
        "on; a server then hands out nothing more until it is told to go on, a command without "
        "one ends with exit code 3",
    )
    group.add_argument(
        "--accept-failures",
        action="store_true",
        help="go on with a run that --max-failures paused: the lines that failed until this start "
        "stay as they are, and count no more",
    )
    group.add_argument(
        "--unpause",
        action="store_true",
        help="go on with a run that an operator paused (dispatcher pause); otherwise it stays "
        "paused when it is started again",
    )
    group.add_argument(
        "--lease-term",
        type=seconds(0.1),
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
    group.add_argument(
        "--record-steps",
        choices=("on", "off"),
        default="on",
        help="keep each model answer of an unfinished line, so that a line that is begun again "
        "asks the model only for what it has not had",
    )
    group.add_argument(
        "--step-gib",
        type=number(float, 0, 1 << 20),
        default=64.0,
        metavar="GIB",
        help="GiB that the recorded steps of unfinished lines may take on disk; beyond it no more "
        "are recorded until lines are finished",
    )


def policy_of(args: argparse.Namespace) -> QueuePolicy:
    """Build the queue's policy from the options of `add_run_limits`."""
    return QueuePolicy(
        max_retries=args.max_retries,
        max_failures=args.max_failures,
        work_timeout_s=args.work_timeout,
        lease_term_s=args.lease_term,
        window=args.window,
        backups=args.backup_tasks == "auto",
        run_step_bytes=int(args.step_gib * (1 << 30)) if args.record_steps == "on" else 0,
    )


def run_settings_of(
    args: argparse.Namespace,
    infile: Path,
    outfile: Path,
    command: Mapping[str, Any] | None = None,
) -> RunSettings:
    """Build a run's settings from parsed options; paths become absolute."""
    outfile = outfile.absolute()
    state: Path | None = getattr(args, "state", None)
    return RunSettings(
        infile=absolute_input(infile),
        outfile=outfile,
        state_dir=state.absolute() if state is not None else default_state_dir(outfile),
        policy=policy_of(args),
        input_options=input_options_of(args, infile),
        retry_s=getattr(args, "retry", 300.0),
        max_line_bytes=args.max_line_bytes,
        command=command,
        accept_changes=getattr(args, "accept_changes", False),
        accept_failures=args.accept_failures,
        unpause=args.unpause,
        start=os.environ.get(START_VARIABLE, ""),
    )
