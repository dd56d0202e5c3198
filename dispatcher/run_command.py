"""How a run was started: kept in run.yaml, so that `--resume DIR` needs to be told nothing else.

Secrets are not kept: of an API key only the name of its variable, of a token its file. What
cannot be told apart from an ordinary value, a task's argument say, stands there as it was given.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import yaml

from dispatcher import __version__
from dispatcher.config import Parser, RunSettings, absolute_spec, default_state_dir, parse
from dispatcher.errors import UsageError
from dispatcher.input_options import absolute_input, is_standard_input
from dispatcher.storage import run_state
from dispatcher.storage.files import Files
from dispatcher.storage.inputs.opening import check_apart, is_there
from dispatcher.storage.opening import utc_now
from dispatcher.storage.run_state import (
    RUN_FILE,
    SPOOL_FILE,
    STARTING,
    load_run_file,
    make_state_dir,
)

LOCAL_RUN = "dispatcher run"
SERVER = "dispatcher-server"
TASK_RUN = "dispatcher-task-run"

_HANDED_OVER = "DISPATCHER_RUN_COMMAND"
_OF_ONE_START = {
    *("help", "config", "resume", "accept_changes", "accept_failures", "unpause", "takeover"),
    *("preview", "preview_full"),
}
_OF_THE_TASK = {"task", "task_arg", "task_args"}
_INPUTS = ("input", "infile")
_NOT_OPTIONS = _OF_ONE_START | _OF_THE_TASK
_PACKAGES = ("vllm", "aiohttp", "msgspec", "openai")
_SECRET_WORD = re.compile(
    r"--?(api|hf)[-_](key|token)(=.*)?|[A-Z0-9_]*(TOKEN|API_KEY|SECRET|PASSWORD)=.*", re.DOTALL
)


def add_resume_options(parser: Parser, *, has_task: bool) -> None:
    """Add `--resume DIR`, and for a command that runs a task `--accept-changes`."""
    group = parser.add_argument_group("going on with a run")
    group.add_argument(
        "--resume",
        type=Path,
        metavar="DIR",
        help="go on with the run whose state directory this is, with the options it was started "
        "with; no other option is needed, and those given here win",
    )
    if has_task:
        group.add_argument(
            "--accept-changes",
            action="store_true",
            help="go on although the task's file or arguments are not those the run began with; "
            "lines that are finished stay as they are",
        )


@dataclass(slots=True)
class Start:
    """A command as it was started: its options, and those of the run that it resumes.

    `options` are what run.yaml keeps; `before` is the run.yaml that `--resume` named.
    """

    program: str
    args: argparse.Namespace
    options: dict[str, Any]
    left_out: list[str]
    directory: str
    before: dict[str, Any] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing left to do but to say so."""
        return self.before.get("state") == "complete"

    @property
    def task_args(self) -> dict[str, Any]:
        """The task's arguments of the run that is resumed."""
        task = self.before.get("command", {}).get("task")
        args = task.get("args") if isinstance(task, dict) else None
        return dict(args) if isinstance(args, dict) else {}

    def record(self, option: str, value: Any) -> None:
        """Keep a value that came from elsewhere, the environment say, as if it had been given."""
        self.options[option], left_out = _cleaned(value)
        self.left_out += [f"{secret} of {option}" for secret in left_out]

    def describe(
        self, task: Mapping[str, Any] | None = None, model: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return what run.yaml keeps of this command."""
        described: dict[str, Any] = {
            "program": self.program,
            "directory": self.directory,
            "options": self.options,
        }
        if self.left_out:
            described["left_out"] = self.left_out
        if task is not None:
            described["task"] = dict(task)
        if model is not None:
            described["model"] = dict(model)
        return described | {"versions": _versions()}


def read_start(
    program: str, parser: Parser, argv: Sequence[str] | None, output: str = "output"
) -> Start:
    """Parse a command line; with `--resume`, over the options of that run, in its directory.

    `output` is the option that names the output. Raises UsageError or StateError when the run
    cannot be resumed by this command.
    """
    found: list[tuple[Path, dict[str, Any]]] = []

    def recorded(path: Path) -> tuple[Mapping[str, Any], Path]:
        state_dir, content = _find_run(path, program)
        found.append((state_dir, content))
        return _options_of(content["command"]), state_dir / RUN_FILE

    args = parse(parser, argv, recorded)
    directory = str(Path.cwd())
    if not found:
        options, left_out = _recorded_options(parser, args)
        return Start(program, args, options, left_out, directory)
    state_dir, before = found[0]
    _make_paths_absolute(args)
    _check_same_files(args, state_dir, before, output)
    args.state = state_dir
    directory = _enter(before["command"].get("directory"), directory)
    options, left_out = _recorded_options(parser, args)
    missed = [name for name in before["command"].get("left_out", []) if name not in left_out]
    if missed:
        print(
            f"{program}: {state_dir / RUN_FILE} keeps no secrets; if this run still needs them, "
            f"give again beside --resume: {', '.join(missed)}",
            file=sys.stderr,
        )
    return Start(program, args, options, left_out + missed, directory, before)


def check_copied(start: Start, infile: Path) -> None:
    """Refuse to go on with standard input whose copy was not finished. Raises UsageError.

    What a resumed command has for standard input is hardly the same, and mostly nothing.
    """
    if not start.before or start.is_complete or not is_standard_input(infile):
        return
    if not (Path(start.args.state) / SPOOL_FILE).exists():
        raise UsageError(
            f"the run in {start.args.state} was stopped before all of standard input was copied; "
            "give its whole command again, with the whole input"
        )


def note_start(settings: RunSettings) -> None:
    """Write down that the run is being started, unless it was before: now it can be resumed.

    Raises UsageError or StorageError when the state directory cannot be made, or must not be
    where it is.
    """
    files = Files()
    if is_there(settings.infile):
        written = settings.outfile, settings.state_dir
        check_apart(settings.infile, settings.input_options, *written)
    make_state_dir(settings.state_dir, files)
    content = {
        "state": STARTING,
        "version": __version__,
        "started_at": utc_now(),
        "command": dict(settings.command or {}),
    }
    run_state.note_start(settings.state_dir, content, files)


def resume_hint(program: str, state_dir: Path) -> str:
    """Return the command that goes on with a run."""
    return f"{program} --resume {shlex.quote(str(state_dir))}"


def what_next(program: str, state_dir: Path, infile: Path) -> str:
    """Return how a run goes on that was stopped, also while standard input was still copied."""
    if is_standard_input(infile) and not (state_dir / SPOOL_FILE).exists():
        return "give the whole command again, with the whole of standard input"
    return f"go on with: {resume_hint(program, state_dir)}"


# -------------------------------------------------------------------- from parent to child


@dataclass(frozen=True, slots=True)
class Handed:
    """What the processes of a `dispatcher run` are given beside flags.

    `environment` is the server's. `task_args` is a file of the task's arguments, `config` one of
    the sections of `--config`; each is None where there is nothing in it.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    task_args: Path | None = None
    config: Path | None = None


@contextmanager
def handing_over(
    command: Mapping[str, Any] | None,
    accept_changes: bool,
    sections: Mapping[str, Any] | None = None,
) -> Iterator[Handed]:
    """Keep in private files what the server writes into run.yaml, and what workers go by.

    `sections` are those of `--config` as they stand there, with the secrets that run.yaml lacks.
    """
    if command is None:
        yield Handed()
        return
    with tempfile.TemporaryDirectory(prefix="dispatcher-run-") as directory:
        content = {"command": dict(command), "accept": accept_changes}
        args = command.get("task", {}).get("args", {})
        handed = Path(directory) / "command.yaml"
        handed.write_text(yaml.safe_dump(content, sort_keys=False))
        task_args = Path(directory) / "task-args.yaml"
        task_args.write_text(yaml.safe_dump(args, sort_keys=False))
        config: Path | None = None
        if sections:
            config = Path(directory) / "config.yaml"
            config.write_text(yaml.safe_dump(dict(sections), sort_keys=False))
        yield Handed({_HANDED_OVER: str(handed)}, task_args, config)


def take_handed_over() -> tuple[dict[str, Any], bool] | None:
    """Return what `handing_over` kept for this process; None when a user started it."""
    path = os.environ.pop(_HANDED_OVER, None)
    if path is None:
        return None
    try:
        content = yaml.safe_load(Path(path).read_text())
        return dict(content["command"]), bool(content["accept"])
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise UsageError(f"{_HANDED_OVER} is not meant to be set by hand: {error!r}") from error


# -------------------------------------------------------------------- finding the run


def _find_run(path: Path, program: str) -> tuple[Path, dict[str, Any]]:
    """Return the state directory that `--resume` means, and what its run.yaml says."""
    path = path.absolute()
    state_dir = path.parent if path.name == RUN_FILE and not path.is_dir() else path
    if not state_dir.is_dir():
        meant = default_state_dir(path)
        if state_dir.exists() and (meant / RUN_FILE).exists():
            raise UsageError(f"--resume {path} is no state directory; it is --resume {meant}")
        raise UsageError(
            f"--resume {path}: there is no such directory; give the state directory of a run "
            "(the output's name with .dispatch unless --state named another)"
        )
    content = load_run_file(state_dir, Files())
    if content is None:
        raise UsageError(
            f"--resume {path}: there is no {RUN_FILE} in it, so no run was begun there; give the "
            "whole command to begin one"
        )
    command = content.get("command")
    if not isinstance(command, dict) or not isinstance(command.get("options"), dict):
        raise UsageError(
            f"{state_dir / RUN_FILE} does not say how the run was started (an older version may "
            "have written it); give the whole command, which goes on with the run"
        )
    if command.get("program") != program:
        raise UsageError(
            f"the run in {state_dir} was started with {command.get('program')}; go on with "
            f"{resume_hint(str(command.get('program')), state_dir)}"
        )
    _check_no_copy(state_dir, content)
    return state_dir, content


def _check_no_copy(state_dir: Path, content: Mapping[str, Any]) -> None:
    settings = content.get("settings")
    recorded = Path(str(settings.get("state"))) if isinstance(settings, dict) else state_dir
    if recorded.is_dir() and not recorded.samefile(state_dir):
        raise UsageError(
            f"{state_dir} is a copy of {recorded}, whose run writes to the same output; go on "
            "with that one, or remove it first"
        )


def _options_of(command: Mapping[str, Any]) -> dict[str, Any]:
    options = {key: value for key, value in command["options"].items() if key not in _NOT_OPTIONS}
    task = command.get("task")
    if isinstance(task, dict):
        options["task"] = task.get("spec")
    return options


def _check_same_files(
    args: argparse.Namespace, state_dir: Path, before: Mapping[str, Any], output: str
) -> None:
    """Refuse another output or state directory; another place of the input is no other input."""
    if args.state is not None and not _is_same_path(args.state, state_dir):
        recorded = before["command"]["options"].get("state")
        if recorded is None or not _is_same_path(args.state, Path(recorded)):
            raise UsageError(
                f"--state {args.state} is not the state directory {state_dir} that --resume "
                "names; leave it out"
            )
    was = before["command"]["options"].get(output)
    now = getattr(args, output)
    if was is not None and not _is_same_path(now, Path(was)):
        raise UsageError(
            f"--{output} {now} is not the output of the run in {state_dir}, which is {was}; leave "
            "it out, or begin a new run without --resume"
        )


def _is_same_path(one: Path, other: Path) -> bool:
    try:
        return one == other or one.resolve() == other.resolve()
    except OSError:
        return False


def _enter(recorded: object, current: str) -> str:
    """Go where the run was started, so that what its task opens is found; return the place."""
    if isinstance(recorded, str):
        try:
            os.chdir(recorded)
        except OSError:
            return current
        return recorded
    return current


def _make_paths_absolute(args: argparse.Namespace) -> None:
    for name, value in vars(args).items():
        if isinstance(value, Path):
            setattr(args, name, absolute_input(value) if name in _INPUTS else value.absolute())
    if isinstance(getattr(args, "task", None), str):
        args.task = absolute_spec(args.task)


# -------------------------------------------------------------------- what is kept


def _recorded_options(parser: Parser, args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Return every option and section, and the names of the secrets that were left out."""
    options: dict[str, Any] = {}
    left_out: list[str] = []
    named = {
        action.dest: action.option_strings[0]
        for action in parser._actions
        if action.option_strings and action.dest not in _NOT_OPTIONS
    }
    for dest, name in [*named.items(), *((name, name) for name in parser.sections)]:
        value = getattr(args, dest)
        if value is None and dest in parser.sections:
            continue
        if dest in _INPUTS and isinstance(value, Path):
            options[dest] = str(absolute_input(value))
            continue
        options[dest], secrets = _cleaned(value)
        left_out += [f"{secret} of {name}" for secret in secrets]
    return options, left_out


def _cleaned(value: Any) -> tuple[Any, list[str]]:
    """Return a value as run.yaml keeps it, and the secrets that were left out, at any depth."""
    if isinstance(value, Path):
        return str(value.absolute()), []
    if isinstance(value, str):
        return _without_secrets(value)
    if isinstance(value, list):
        parts = [_cleaned(part) for part in value]
        return [part for part, _ in parts], [name for _, names in parts for name in names]
    if isinstance(value, dict):
        cleaned = {key: _cleaned(part) for key, part in value.items()}
        left_out = [f"{name} of {key}" for key, (_, names) in cleaned.items() for name in names]
        return {key: part for key, (part, _) in cleaned.items()}, left_out
    return value, []


def _without_secrets(text: str) -> tuple[str, list[str]]:
    """Return an option's value without keys and passwords, and what was left out."""
    if "://" in text and "@" in text and not any(map(str.isspace, text)):
        parts = urlsplit(text)
        if parts.username is None:
            return text, []
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])), ["the password"]
    if not _SECRET_WORD.search(text):
        return text, []
    return _without_secret_words(text)


def _without_secret_words(text: str) -> tuple[str, list[str]]:
    try:
        words = shlex.split(text)
    except ValueError:
        return text, []  # which the command that splits it refuses
    kept: list[str] = []
    left_out: list[str] = []
    dropping = False
    for word in words:
        if _SECRET_WORD.fullmatch(word):
            left_out.append(word.partition("=")[0])
            dropping = "=" not in word
        elif not dropping or word.startswith("-"):
            dropping = False
            kept.append(word)
    return (shlex.join(kept), left_out) if left_out else (text, [])


def _versions() -> dict[str, str]:
    versions = {"dispatcher": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
