"""What `dispatcher slurm run` and `start` are told: flags over YAML over the environment.

The settings are those at the top of the scripts in slurm/, and some of sbatch's own options. What
nobody gives keeps the default that the script says.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dispatcher.config import OwnList, Parser, absolute_spec, default_state_dir, number, seconds
from dispatcher.errors import UsageError
from dispatcher.input_options import (
    InputOptions,
    absolute_input,
    check_input_options,
    data_set_directory,
    input_path,
    is_data_set,
    is_standard_input,
)
from dispatcher.slurm.render import SBATCH_OPTION

RUN, SERVER, WORKERS = "run", "server", "workers"
SCRIPTS_OF = {"run": (RUN,), "start": (SERVER, WORKERS)}
"""The scripts that a command submits."""

_INFILE_OF_SCRIPTS = "examples/data/prompts.jsonl"
_OUTFILE = "output-slurm.jsonl"
_BACKENDS = ("vllm", "fake", "local", "openai", "cerebras")


@dataclass(frozen=True, slots=True)
class Setting:
    """An option, the script's variable that it sets, and its help."""

    flag: str
    variable: str
    metavar: str
    help: str
    kind: Callable[[str], str] = str
    choices: Sequence[str] | None = None

    @property
    def dest(self) -> str:
        """Its name among the parsed options."""
        return self.flag.removeprefix("--").replace("-", "_")


def _checked(convert: Callable[[str], Any], but: str = "") -> Callable[[str], str]:
    """Return an argparse type: what `convert` takes, or this word, as it was typed."""

    def check(text: str) -> str:
        if text != but:
            convert(text)
        return text

    return check


_at_least_0 = _checked(number(int, 0))
_at_least_1 = _checked(number(int, 1))
_at_least_1_or_auto = _checked(number(int, 1), "auto")
_at_least_minus_1 = _checked(number(int, -1))
_seconds = _checked(seconds(0.001))

_TASK = "module:Class or FILE.py:Class (default: that of examples/chat_task.py)"
_INFILE = """input, as dispatcher-server takes it, but for standard input (default:
    examples/data/prompts.jsonl)"""
_SUBSET = "of an input that is a data set, the subset (default: none)"
_SPLIT = "of an input that is a data set, the split (default: the only one, or train)"
_STATE = "state directory, seen by all nodes (default: OUTFILE.dispatch)"
_MODEL = "model, a name or a directory (default: the quick start's, on the CPU)"
_BACKEND = f"one of {', '.join(_BACKENDS)} (default: vllm with --model, else local)"
_TENSOR_PARALLEL = "GPUs that a model is spread over (default: 1)"
_GPUS_PER_TASK = "GPUs of each task manager (default: --tensor-parallel)"
_MAX_MODEL_LEN = "context length in tokens (default: the model's)"
_WORKERS = "requests in flight of a task manager, or auto (default: auto for vllm)"
_BATCH_SIZE = "items a task manager keeps ready (default: its own)"
_WORK_TIMEOUT = "seconds an item may take without progress (default: 1200)"
_MAX_RETRIES = "charged reissues of an item; -1: no limit (default: 3)"
_SERVER_TIMEOUT = "seconds without the server before a worker job gives up (default: 3600)"
_WORKER_ARGS = """further options of dispatcher-task-run, as in
    --worker-args='--task-arg temperature=0' (default: none)"""
_SERVER_ARGS = """further options of dispatcher-server, as in
    --server-args='--window 100000' (default: none)"""
_WORKER_CONFIG = """YAML file of dispatcher-task-run's options; may hold task, model, backends
    and so on (default: none)"""
_SERVER_CONFIG = "YAML file of dispatcher-server's options (default: none)"
_CONTAINER = "image to run in, with Apptainer or Singularity (default: none)"
_MODULES = "modules to load first, separated by spaces (default: none)"
_VENV = """virtual environment to run in without a container (default: the one that this command
    runs in)"""

SETTINGS = (
    Setting("--task", "TASK", "CLASS", _TASK),
    Setting("--infile", "INPUT", "FILE", _INFILE),
    Setting("--input-subset", "INPUT_SUBSET", "NAME", _SUBSET),
    Setting("--input-split", "INPUT_SPLIT", "NAME", _SPLIT),
    Setting("--outfile", "OUTPUT", "FILE", f"output, one result a line (default: {_OUTFILE})"),
    Setting("--state", "STATE", "DIR", _STATE),
    Setting("--model", "MODEL", "NAME", _MODEL),
    Setting("--backend", "BACKEND", "KIND", _BACKEND, choices=_BACKENDS),
    Setting("--tensor-parallel", "TENSOR_PARALLEL", "N", _TENSOR_PARALLEL, _at_least_1),
    Setting("--gpus-per-task", "GPUS_PER_TASK", "N", _GPUS_PER_TASK, _at_least_0),
    Setting("--max-model-len", "MAX_MODEL_LEN", "N", _MAX_MODEL_LEN, _at_least_1),
    Setting("--workers", "WORKERS", "N", _WORKERS, _at_least_1_or_auto),
    Setting("--batch-size", "BATCH_SIZE", "N", _BATCH_SIZE, _at_least_1),
    Setting("--work-timeout", "WORK_TIMEOUT", "S", _WORK_TIMEOUT, _seconds),
    Setting("--max-retries", "MAX_RETRIES", "N", _MAX_RETRIES, _at_least_minus_1),
    Setting("--server-timeout", "SERVER_TIMEOUT", "S", _SERVER_TIMEOUT, _seconds),
    Setting("--worker-args", "WORKER_ARGS", "OPTIONS", _WORKER_ARGS),
    Setting("--server-args", "SERVER_ARGS", "OPTIONS", _SERVER_ARGS),
    Setting("--worker-config", "CONFIG", "FILE", _WORKER_CONFIG),
    Setting("--server-config", "SERVER_CONFIG", "FILE", _SERVER_CONFIG),
    Setting("--container", "CONTAINER", "IMAGE", _CONTAINER),
    Setting("--modules", "MODULES", "NAMES", _MODULES),
    Setting("--venv", "VENV", "DIR", _VENV),
)

_FILES = ("worker_config", "server_config")
_PATHS = (*_FILES, "outfile", "state", "venv")
_NAMES_OR_PATHS = ("model", "container")
_WORDS = ("worker_args", "server_args")
_OF_ONE_START = ("--accept-failures", "--unpause")  # of the server; --resume does not repeat them
_ONLY_START = ("server_timeout",)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a command was told, made ready for the scripts; paths are absolute.

    `variables` are the scripts' by name, `environment` what is exported beside them, `options`
    those of sbatch for each script. `recorded` is what `--resume` goes by.
    """

    outfile: Path
    state_dir: Path
    variables: Mapping[str, str]
    environment: Mapping[str, str]
    options: Mapping[str, Sequence[str]]
    worker_jobs: int
    recorded: Mapping[str, Any]


_EPILOG = """\
What no option and no file says is taken from the environment under the script's name of it (MODEL,
CONTAINER, ...), then from the script; --resume asks the environment for nothing. The scripts are
written to STATE/slurm/.

examples:
  dispatcher slurm {command} --infile prompts.jsonl --outfile answers.jsonl \\
      --task my_tasks.py:MyTask --model org/model --gpus-per-node 8 {shape}
  dispatcher slurm {command} --config {config} --dry-run  # print what would be submitted
  dispatcher slurm {command} --resume answers.jsonl.dispatch  # go on with the same settings

exit codes: 0 submitted, or complete already, 1 error, 2 usage"""


def build_parser(command: str) -> Parser:
    """Return the options of `dispatcher slurm run` or `start`."""
    is_start = command == "start"
    what = (
        "Submit a run as a server job and an array of worker jobs, which Slurm starts, preempts "
        "and requeues each by itself"
        if is_start
        else "Submit a run as one job: the server on its first node, task managers on all"
    )
    config = "answers.yaml" if is_start else "job.yaml"
    shape = "--worker-jobs 16" if is_start else "--nodes 4 --tasks-per-node 8"
    parser = Parser(
        prog=f"dispatcher slurm {command}",
        description=f"{what}. The same command, or --resume, goes on with a run that was stopped.",
        epilog=_EPILOG.format(command=command, shape=shape, config=config),
    )
    group = parser.add_argument_group("the run")
    for setting in SETTINGS:
        if is_start or setting.dest not in _ONLY_START:
            group.add_argument(
                setting.flag,
                metavar=setting.metavar,
                type=setting.kind,
                choices=setting.choices,
                help=setting.help,
            )
    group.add_argument(
        "--env",
        action=OwnList,
        default=[],
        metavar="NAME=VALUE",
        help="another variable of the jobs, such as CONTAINER_BINDS or HF_HOME; may be given "
        "several times. It is written into the scripts: export secrets instead, sbatch hands "
        "them on (default: none)",
    )
    if is_start:
        group.add_argument(
            "--worker-jobs",
            type=number(int, 0, 100_000),
            default=1,
            metavar="N",
            help="worker jobs to begin with; 0: none yet",
        )
    _add_slurm_options(parser, is_start)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of these options")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="STATE",
        help="go on with the run whose state directory this is; other options win over what was "
        "recorded there (default: none)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the scripts and the sbatch commands; write and submit nothing (default: no)",
    )
    return parser


def _add_slurm_options(parser: Parser, is_start: bool) -> None:
    group = parser.add_argument_group(
        "of sbatch", "for the worker jobs; the server's are those named so" if is_start else None
    )
    job, both = ("worker job", "; the server job's, too") if is_start else ("job", "")
    group.add_argument("--nodes", metavar="N", help=f"nodes of a {job} (default: 1)")
    group.add_argument(
        "--tasks-per-node",
        type=number(int, 1),
        metavar="N",
        help="task managers on a node (default: 1)",
    )
    group.add_argument("--gpus-per-node", metavar="N", help="GPUs on a node (default: none)")
    group.add_argument(
        "--time", metavar="TIME", help=f"time limit of a {job}, as sbatch takes it (default: 4 h)"
    )
    for name in ("partition", "account", "qos"):
        group.add_argument(f"--{name}", metavar="NAME", help=f"{name}{both} (default: the site's)")
    group.add_argument(
        "--job-name",
        metavar="NAME",
        help="name of the jobs, followed by -server or -workers (default: dispatcher)"
        if is_start
        else "name of the job (default: dispatcher)",
    )
    group.add_argument(
        "--chdir",
        type=Path,
        metavar="DIR",
        help="directory in which the jobs run and write their logs (default: the current one)",
    )
    group.add_argument(
        "--sbatch-arg",
        action=OwnList,
        default=[],
        metavar="OPTION",
        help="any other option of sbatch, as in --sbatch-arg=--mem=0; may be given several times "
        "(default: none)",
    )
    if is_start:
        group.add_argument(
            "--server-partition",
            metavar="NAME",
            help="partition of the server job, which needs no GPU (default: --partition)",
        )
        group.add_argument(
            "--server-time",
            metavar="TIME",
            help="time limit of the server job (default: 24 h)",
        )
        group.add_argument(
            "--server-sbatch-arg",
            action=OwnList,
            default=[],
            metavar="OPTION",
            help="as --sbatch-arg, for the server job (default: none)",
        )


# -------------------------------------------------------------------- parsed -> settings


def settings_of(
    args: argparse.Namespace,
    command: str,
    environment: Mapping[str, str],
    virtual_env: str | None,
) -> Settings:
    """Make what was given ready for the scripts. Raises UsageError.

    `virtual_env` is the one that this command runs in.
    """
    given = _given(args, environment)
    outfile = Path(given["outfile"])
    state_dir = Path(given.setdefault("state", str(default_state_dir(outfile))))
    directory = (args.chdir or Path()).absolute()
    variables = {s.variable: given[s.dest] for s in SETTINGS if s.dest in given}
    if virtual_env is not None and not {"VENV", "CONTAINER"} & variables.keys():
        variables["VENV"] = virtual_env
    return Settings(
        outfile=outfile,
        state_dir=state_dir,
        variables=variables,
        environment=dict(_named(args.env)),
        options={name: _sbatch_options(args, name, directory) for name in SCRIPTS_OF[command]},
        worker_jobs=getattr(args, "worker_jobs", 0),
        recorded=_recorded(args, given, directory),
    )


def _given(args: argparse.Namespace, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that somebody gave, as text, with absolute paths."""
    given: dict[str, str] = {}
    for setting in SETTINGS:
        if not hasattr(args, setting.dest):
            continue
        value = getattr(args, setting.dest)
        text = _checked_variable(setting, environment) if value is None else value
        if text:
            given[setting.dest] = text
    given.setdefault("outfile", _OUTFILE)
    if "infile" in given:
        given["infile"] = str(absolute_input(input_path(given["infile"])))
    for name, text in given.items():
        if name in _PATHS or (name in _NAMES_OR_PATHS and Path(text).exists()):
            given[name] = str(Path(text).absolute())
    if "task" in given:
        given["task"] = absolute_spec(given["task"])
    for name in _WORDS:
        try:
            shlex.split(given.get(name, ""))
        except ValueError:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} has a quote that is not closed: {given[name]}") from None
    return given


def _checked_variable(setting: Setting, environment: Mapping[str, str]) -> str:
    """Return what the environment says of a setting, if anything. Raises UsageError."""
    text = environment.get(setting.variable, "")
    try:
        if text:
            setting.kind(text)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"the variable {setting.variable}: {error}") from None
    if text and setting.choices is not None and text not in setting.choices:
        choices = ", ".join(setting.choices)
        raise UsageError(
            f"the variable {setting.variable} is {text!r}, but must be one of {choices}"
        )
    return text


def check_files(settings: Settings, *, has_examples: bool) -> None:
    """Refuse now what a job could only refuse after it has waited for its nodes.

    `has_examples` says whether the examples are there that the scripts fall back on. Raises
    UsageError.
    """
    variables = settings.variables
    given = {s.dest: variables[s.variable] for s in SETTINGS if s.variable in variables}
    missing = [flag for flag in ("infile", "task") if flag not in given]
    if "worker_config" in given:
        missing = [flag for flag in missing if flag != "task"]
    if missing and not has_examples:
        raise UsageError(
            f"give --{missing[0]}: its default is an example, and those are in the repository "
            "only, not in the installed package"
        )
    infile = Path(given.get("infile", _INFILE_OF_SCRIPTS))
    if "infile" in given:
        _check_infile(infile)
    part = InputOptions(given.get("input_subset"), given.get("input_split"))
    check_input_options(infile, part)
    for name in _FILES:
        if name in given and not Path(given[name]).is_file():
            raise UsageError(f"--{name.replace('_', '-')} {given[name]}: there is no such file")
    path, colon, _ = given.get("task", "").rpartition(":")
    if colon and path.endswith(".py") and not Path(path).is_file():
        raise UsageError(f"--task {given['task']}: there is no file {path}")
    if not settings.outfile.parent.is_dir():
        raise UsageError(
            f"--outfile {settings.outfile}: there is no directory {settings.outfile.parent}"
        )


def _check_infile(infile: Path) -> None:
    if is_standard_input(infile):
        raise UsageError("--infile -: a job has no standard input; write the lines to a file")
    directory = data_set_directory(infile) if is_data_set(infile) else infile
    if directory is not None and not directory.exists():
        raise UsageError(f"--infile {infile}: there is no such file")


def _named(words: Iterable[str]) -> Iterable[tuple[str, str]]:
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UsageError(f"--env {word}: give NAME=VALUE")
        yield name, value


def _sbatch_options(args: argparse.Namespace, script: str, directory: Path) -> list[str]:
    """Return the options of sbatch that a script's job is to have."""
    is_server = script == SERVER
    name = args.job_name and (args.job_name if script == RUN else f"{args.job_name}-{script}")
    common = {"partition": args.partition, "account": args.account, "qos": args.qos}
    if is_server:
        own = {"time": args.server_time}
        common["partition"] = args.server_partition or args.partition
    else:
        own = {
            "nodes": args.nodes,
            "ntasks-per-node": args.tasks_per_node,
            "gpus-per-node": args.gpus_per_node,
            "time": args.time,
        }
    options = {"job-name": name, **own, **common, "chdir": directory}
    given = [f"--{key}={value}" for key, value in options.items() if value is not None]
    flag = "--server-sbatch-arg" if is_server else "--sbatch-arg"
    for option in args.server_sbatch_arg if is_server else args.sbatch_arg:
        check_sbatch_option(option, flag)
        given.append(option)
    for option in given:
        if not SBATCH_OPTION.fullmatch(option):  # a line break, which a script's line cannot hold
            raise UsageError(f"sbatch cannot be given {option!r}: it is more than one line")
    return given


def check_sbatch_option(option: str, flag: str) -> None:
    """Refuse what is no option of sbatch. Raises UsageError."""
    if not SBATCH_OPTION.fullmatch(option):
        raise UsageError(f"{flag} {option}: give an option of sbatch, as in {flag}=--mem=0")
    if re.match(r"--array(=| |$)|-a", option):
        raise UsageError(f"{flag} {option}: --worker-jobs and add-workers say how many jobs")


def _recorded(
    args: argparse.Namespace, given: Mapping[str, str], directory: Path
) -> dict[str, Any]:
    """Return what the same command can be given again from, wherever it is called."""
    left_out = {"config", "resume", "dry_run", *(setting.dest for setting in SETTINGS)}
    others = {
        name: value if isinstance(value, int | list) else str(value)
        for name, value in vars(args).items()
        if name not in left_out and value not in (None, [])
    }
    words = shlex.split(given.get("server_args", ""))
    kept = [word for word in words if word not in _OF_ONE_START]
    changed = {"server_args": shlex.join(kept)} if kept != words else {}
    recorded = {name: text for name, text in {**given, **changed}.items() if text}
    return {**recorded, **others, "chdir": str(directory)}
