"""`dispatcher slurm`: submits a run's jobs, shows them, adds and removes workers, stops them."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dispatcher.config import OwnList, Parser, default_state_dir, number, parse, seconds
from dispatcher.errors import DispatcherError, ExitCode, SlurmError, StateError, UsageError
from dispatcher.run_paths import place_option
from dispatcher.runs.found import FoundRun, find_runs, quoted
from dispatcher.runs.look import look
from dispatcher.runs.show import standing_text
from dispatcher.slurm import commands, show
from dispatcher.slurm.jobs import Job, Submission, alive, to_remove, to_stop
from dispatcher.slurm.record import Record, find_record
from dispatcher.slurm.render import log_of, render
from dispatcher.slurm.settings import (
    RUN,
    SCRIPTS_OF,
    SERVER,
    WORKERS,
    Settings,
    build_parser,
    check_files,
    check_sbatch_option,
    settings_of,
)

_PROGRAM = "dispatcher slurm"
_POLL_S = 2.0
_STOP_S = 180.0

_EXAMPLES = f"""\
usage: {_PROGRAM} COMMAND [options]

Submit a run to Slurm with the scripts of slurm/, look at its jobs, stop them.

  run             the run as one job
  start           a server job and an array of worker jobs
  status          the jobs, and how far the run is
  add-workers     submit more worker jobs
  remove-workers  end worker jobs: those that wait first, then the youngest
  stop            end all of it, so that it can be gone on with

examples:
  {_PROGRAM} run --model org/model --task my_tasks.py:MyTask --infile prompts.jsonl \\
      --outfile answers.jsonl --nodes 4 --tasks-per-node 8 --gpus-per-node 8
  {_PROGRAM} start --config run.yaml --worker-jobs 16 --dry-run
  {_PROGRAM} status answers.jsonl
  {_PROGRAM} add-workers answers.jsonl 8
  {_PROGRAM} stop answers.jsonl

{_PROGRAM} COMMAND --help tells the options of one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_EXAMPLES)
        return ExitCode.COMPLETE if words else ExitCode.USAGE
    if words[0] not in _COMMANDS:
        names = ", ".join(_COMMANDS)
        print(f"{_PROGRAM}: there is no command {words[0]!r}; there are {names}", file=sys.stderr)
        return ExitCode.USAGE
    try:
        code = _COMMANDS[words[0]](words[1:])
        sys.stdout.flush()
        return code
    except DispatcherError as error:
        print(f"{_PROGRAM} {words[0]}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{_PROGRAM} {words[0]}: interrupted; see {_PROGRAM} status", file=sys.stderr)
        return ExitCode.STOPPED
    except BrokenPipeError:  # who reads this has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.COMPLETE


# -------------------------------------------------------------------- run, start


def _run(argv: Sequence[str]) -> ExitCode:
    return _submit("run", argv)


def _start(argv: Sequence[str]) -> ExitCode:
    return _submit("start", argv)


def _submit(command: str, argv: Sequence[str]) -> ExitCode:
    def recorded(path: Path) -> tuple[Mapping[str, Any], Path]:
        return _recorded(path, command)

    args = parse(build_parser(command), argv, recorded)
    scripts_dir = _scripts_dir()
    has_examples = (scripts_dir.parent / "examples" / "data" / "prompts.jsonl").is_file()
    environment = os.environ if args.resume is None else {}
    settings = settings_of(args, command, environment, _virtual_env())
    check_files(settings, has_examples=has_examples)
    scripts = {name: _rendered(name, settings, scripts_dir) for name in SCRIPTS_OF[command]}
    record = Record(settings.state_dir)
    arrays = {WORKERS: settings.worker_jobs} if WORKERS in scripts else {}
    wanted = [name for name in scripts if arrays.get(name) != 0]
    if args.dry_run:
        for name in wanted:
            line = shlex.join(commands.sbatch_command(record.script(name), _array(arrays, name)))
            print(f"# ==== {line}\n{scripts[name]}", end="")
        return ExitCode.COMPLETE
    if (run := _the_run(record.state_dir)) is not None and run.is_complete:
        print(f"the run in {record.state_dir} is complete: {run.output}; nothing was submitted")
        return ExitCode.COMPLETE
    with record.begin():
        before = _living_workers(record)
        for name, text in scripts.items():
            record.write_script(name, text)
        record.write_settings(command, settings.recorded)
        done: list[Submission] = []
        for name in wanted:
            try:
                options = _array(arrays, name)
                done.append(_submit_one(record, name, options, arrays.get(name, 1)))
            except DispatcherError as error:
                raise _undone(error, done) from error
    for submission in done:
        print(_submitted_text(submission, scripts[submission.role]))
    if before:
        print(f"  worker jobs from before go on beside them: {show.ids_text(before)}")
    place = _place_of(settings)
    print(f"  {_PROGRAM} status {place}   shows how it goes")
    print(f"  {_PROGRAM} stop {place}     stops it; nothing that is finished is lost")
    return ExitCode.COMPLETE


def _array(counts: Mapping[str, int], name: str) -> list[str]:
    return [f"--array=1-{counts[name]}"] if name in counts else []


def _recorded(path: Path, command: str) -> tuple[Mapping[str, Any], Path]:
    """Return the options that the run was submitted with whose state directory `path` is."""
    record = find_record(path)
    found = record.settings()
    if found["command"] != command:
        raise UsageError(
            f"the run in {record.state_dir} was submitted by `{_PROGRAM} {found['command']}`; go "
            f"on with: {_resume_command(record)}"
        )
    # Where it is now, not where it was.
    return {**found["options"], "state": str(record.state_dir)}, record.settings_path


def _rendered(name: str, settings: Settings, scripts_dir: Path) -> str:
    path = scripts_dir / f"{name}.sbatch"
    try:
        script = path.read_text("utf-8")
    except OSError as error:
        raise StateError(
            f"cannot read {path}: {error.strerror}; install dispatcher again, its scripts are part "
            "of it"
        ) from error
    return render(
        script,
        scripts_dir=str(scripts_dir),
        variables=settings.variables,
        environment=settings.environment,
        options=settings.options[name],
    )


def _living_workers(record: Record) -> list[Job]:
    """Return the worker jobs that a run has already.

    Refuses to give it a second server: raises StateError, and SlurmError where Slurm does not say.
    """
    if not (submissions := record.submissions()):
        return []
    jobs = alive(commands.find_jobs(submissions))
    for job in jobs:
        if job.role != WORKERS:
            raise StateError(
                f"the run in {record.state_dir} has job {job.id} ({job.role}), which is "
                f"{job.state}; look at it with {_PROGRAM} status, or end it with {_PROGRAM} stop "
                f"{quoted(record.state_dir)}"
            )
    return jobs


def _submit_one(record: Record, name: str, options: Sequence[str], count: int) -> Submission:
    """Submit a script and note that it was; a job that cannot be noted is cancelled."""
    submission = commands.submit(record.script(name), name, options, count)
    try:
        record.add(submission)
    except DispatcherError as error:
        raise _undone(error, [submission]) from error
    return submission


def _undone(error: DispatcherError, submissions: Sequence[Submission]) -> DispatcherError:
    """Cancel what was submitted before an error; return the error that says so."""
    if not submissions:
        return error
    said = commands.cancel([Job(s.job, s.role, "", cluster=s.cluster) for s in submissions])
    numbers = ", ".join(submission.job for submission in submissions)
    what = f"job {numbers} was not cancelled: {said}" if said else f"job {numbers} was cancelled"
    return SlurmError(f"{error}; {what}")


def _submitted_text(submission: Submission, script: str) -> str:
    what = {
        RUN: "the run",
        SERVER: "the server",
        WORKERS: f"{submission.count} worker job{'s' * (submission.count != 1)}",
    }
    log = log_of(script) if submission.role == WORKERS else log_of(script, submission.job)
    return f"submitted job {submission.job}: {what[submission.role]}, log {log}"


# -------------------------------------------------------------------- status


def _status_parser() -> Parser:
    return _place_parser("status", "Show the jobs of a run, and how far the run is.", "")


def _status(argv: Sequence[str]) -> ExitCode:
    record = find_record(parse(_status_parser(), argv).place)
    submissions = record.submissions()
    jobs = commands.find_jobs(submissions, more=True)
    print(_progress_text(record))
    known = {job.array for job in jobs}
    if jobs:
        print(f"\n{show.table_text(jobs)}")
    if not any(not job.is_over for job in jobs):
        print("\nno job of the run is waiting or running")
        for last in {submission.role: submission for submission in submissions}.values():
            if last.job not in known:
                print(f"  {show.submission_text(last)}")
        if (run := _the_run(record.state_dir)) is None or not run.is_complete:
            print(f"  go on with: {_resume_command(record)}")
    return ExitCode.COMPLETE


def _progress_text(record: Record) -> str:
    run = _the_run(record.state_dir)
    if run is None:
        return f"{record.state_dir}\n  state     not begun: no server has started yet"
    return standing_text(look(run), resume=False)


def _the_run(state_dir: Path) -> FoundRun | None:
    """Return the run in a state directory; None before a server has begun it."""
    if not state_dir.is_dir():
        return None
    found = find_runs([state_dir], 0)
    return found[0] if found else None


# -------------------------------------------------------------------- add-workers, remove-workers


def _add_workers_parser() -> Parser:
    parser = _place_parser(
        "add-workers",
        "Submit more worker jobs, as an array of their own.",
        " 8 --sbatch-arg=--partition=preempt",
    )
    _add_count(parser)
    parser.add_argument(
        "--sbatch-arg",
        action=OwnList,
        default=[],
        metavar="OPTION",
        help="option of sbatch for these jobs alone, as in --sbatch-arg=--partition=preempt; may "
        "be given several times (default: none)",
    )
    return parser


def _add_workers(argv: Sequence[str]) -> ExitCode:
    args = parse(_add_workers_parser(), argv)
    record = find_record(args.place)
    script = record.script(WORKERS)
    if not script.is_file():
        raise StateError(
            f"the run in {record.state_dir} was submitted as one job; only one that was submitted "
            f"by `{_PROGRAM} start` takes more workers"
        )
    for option in args.sbatch_arg:
        check_sbatch_option(option, "--sbatch-arg")
    with record.begin():
        if all(job.role == WORKERS for job in alive(commands.find_jobs(record.submissions()))):
            raise StateError(
                f"the run in {record.state_dir} has no server job that is waiting or running; go "
                f"on with: {_resume_command(record)} --worker-jobs {args.count}"
            )
        options = [*args.sbatch_arg, *_array({WORKERS: args.count}, WORKERS)]
        submission = _submit_one(record, WORKERS, options, args.count)
    print(_submitted_text(submission, script.read_text("utf-8", "surrogateescape")))
    return ExitCode.COMPLETE


def _remove_workers_parser() -> Parser:
    parser = _place_parser(
        "remove-workers",
        "End worker jobs: those that wait first, then the youngest. What they have begun is given "
        "back and goes to others, uncharged.",
        " 8",
    )
    _add_count(parser)
    return parser


def _remove_workers(argv: Sequence[str]) -> ExitCode:
    args = parse(_remove_workers_parser(), argv)
    record = find_record(args.place)
    jobs = to_remove(commands.find_jobs(record.submissions()), args.count)
    if not jobs:
        raise StateError(f"the run in {record.state_dir} has no worker job to remove")
    if said := commands.cancel(jobs):
        raise SlurmError(said)
    waiting = [job for job in jobs if job.is_waiting]
    running = [job for job in jobs if not job.is_waiting]
    if waiting:
        print(f"cancelled before they ran: {show.ids_text(waiting)}")
    if running:
        print(f"ending, giving back what they have begun: {show.ids_text(running)}")
    if len(jobs) < args.count:
        print(f"there were no more than {len(jobs)}")
    return ExitCode.COMPLETE


# -------------------------------------------------------------------- stop


def _stop_parser() -> Parser:
    parser = _place_parser(
        "stop",
        "End all jobs of a run: the workers, then the server. Nothing that is finished is lost, "
        "and what was begun is no try.",
        " --timeout 600",
    )
    parser.add_argument(
        "--timeout",
        type=seconds(0),
        default=_STOP_S,
        metavar="S",
        help="seconds to wait until all jobs have ended",
    )
    return parser


def _stop(argv: Sequence[str]) -> ExitCode:
    args = parse(_stop_parser(), argv)
    record = find_record(args.place)
    submissions = record.submissions()
    living = alive(commands.find_jobs(submissions))
    if living:
        print(f"ending {show.ids_text(living)}", flush=True)
        left, said = _end(submissions, args.timeout)
        if left:
            raise SlurmError(
                f"{show.ids_text(left)} did not end within {args.timeout:g} s"
                + (f" ({said})" if said else "")
                + "; wait for it with the same command, or scancel it, which costs no result either"
            )
    else:
        print("no job of the run is waiting or running")
    print(_progress_text(record))
    if (run := _the_run(record.state_dir)) is None or not run.is_complete:
        print(f"go on with: {_resume_command(record)}")
    return ExitCode.COMPLETE


def _end(submissions: Sequence[Submission], timeout_s: float) -> tuple[list[Job], str]:
    """End the jobs in the right order; return those that are left in the end, and why."""
    told: set[str] = set()
    said = ""
    end = time.monotonic() + timeout_s
    while True:
        jobs = commands.find_jobs(submissions)
        if not (left := alive(jobs)):
            return [], ""
        to_cancel, to_interrupt = to_stop(jobs, told)
        for call, some in ((commands.cancel, to_cancel), (commands.interrupt, to_interrupt)):
            if some and (complaint := call(some)):
                said = complaint  # it is tried again
            else:
                told |= {job.id for job in some if not job.is_waiting}
        if time.monotonic() > end:
            return left, said
        time.sleep(_POLL_S)


# -------------------------------------------------------------------- small things


def _place_parser(command: str, description: str, example: str) -> Parser:
    parser = Parser(
        prog=f"{_PROGRAM} {command}",
        description=description,
        epilog=f"example:\n  {_PROGRAM} {command} answers.jsonl{example}",
    )
    parser.add_argument(
        "place",
        type=place_option,
        metavar="OUTFILE",
        help="the run's output, or its state directory",
    )
    return parser


def _add_count(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("count", type=number(int, 1, 100_000), metavar="N", help="worker jobs")


def _place_of(settings: Settings) -> str:
    is_beside = settings.state_dir == default_state_dir(settings.outfile)
    return quoted(settings.outfile if is_beside else settings.state_dir)


def _resume_command(record: Record) -> str:
    return f"{_PROGRAM} {record.settings()['command']} --resume {quoted(record.state_dir)}"


def _scripts_dir() -> Path:
    """Return where the batch scripts are: slurm/ of the repository, in a wheel a copy of it."""
    return (Path(__file__).parent / "scripts").resolve()


def _virtual_env() -> str | None:
    """Return the virtual environment that this command runs in."""
    prefix = Path(sys.prefix)
    is_one = sys.prefix != sys.base_prefix or (prefix / "conda-meta").is_dir()
    return str(prefix) if is_one else None


_COMMANDS: dict[str, Callable[[Sequence[str]], ExitCode]] = {
    "run": _run,
    "start": _start,
    "status": _status,
    "add-workers": _add_workers,
    "remove-workers": _remove_workers,
    "stop": _stop,
}


def parsers() -> dict[str, Parser]:
    """Return the options of each command by its name."""
    return {
        "run": build_parser("run"),
        "start": build_parser("start"),
        "status": _status_parser(),
        "add-workers": _add_workers_parser(),
        "remove-workers": _remove_workers_parser(),
        "stop": _stop_parser(),
    }


if __name__ == "__main__":
    sys.exit(main())
