"""Slurm's own commands: sbatch, squeue, sacct and scancel as processes."""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from dispatcher.errors import SlurmError
from dispatcher.slurm import jobs as parsing
from dispatcher.slurm.jobs import Job, Submission
from dispatcher.slurm.settings import RUN, SERVER, WORKERS

_ANSWER_S = 60.0
_IDS_AT_ONCE = 500
_ROLES = (RUN, SERVER, WORKERS)


def sbatch_command(script: Path, options: Sequence[str]) -> list[str]:
    """Return the command that submits a rendered script."""
    return ["sbatch", "--parsable", *options, str(script)]


def submit(script: Path, role: str, options: Sequence[str] = (), count: int = 1) -> Submission:
    """Submit a rendered script. Raises SlurmError."""
    said = _run(sbatch_command(script, options))
    try:
        number, cluster = parsing.parse_job_id(said)
    except ValueError:
        raise SlurmError(
            f"sbatch did not say the number of the job, but: {_one_line(said)}"
        ) from None
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Submission(number, role, str(script), now, count, cluster)


def find_jobs(submissions: Sequence[Submission], *, more: bool = False) -> list[Job]:
    """Return the jobs of these submissions that Slurm knows: by role, in the order submitted.

    `more`: also how often each was requeued, and what accounting knows, where there is any, of
    those that squeue has forgotten. Raises SlurmError.
    """
    found: list[Job] = []
    for cluster in {submission.cluster: None for submission in submissions}:
        here = [submission for submission in submissions if submission.cluster == cluster]
        queue = ["squeue", *_at(cluster), "--noheader", "--array", "--states=all"]
        # Not --jobs: one that squeue has forgotten would be an error.
        queue.append(f"--user={os.getuid()}")
        jobs = parsing.parse_squeue(_run([*queue, f"--format={parsing.SQUEUE_FORMAT}"]), here)
        if more:
            said = _run_if_it_can([*queue, f"--Format={parsing.SQUEUE_MORE_FORMAT}"])
            restarts = parsing.parse_restarts(said)
            jobs = [replace(job, restarts=restarts.get(job.id, "")) for job in jobs]
            jobs += _accounted(here, jobs, cluster)
        found += jobs
    order = {submission.job: number for number, submission in enumerate(submissions)}
    return sorted(found, key=lambda j: (_ROLES.index(j.role), order[j.array], j.element))


def cancel(jobs: Iterable[Job]) -> str:
    """End jobs: those that run get SIGTERM first. Return what scancel had against it."""
    return _scancel(jobs)


def interrupt(jobs: Iterable[Job]) -> str:
    """Ask jobs' scripts to end what they started, and for good. Return what scancel said."""
    return _scancel(jobs, "--batch", "--signal=INT")


def _scancel(jobs: Iterable[Job], *options: str) -> str:
    said: list[str] = []
    jobs = list(jobs)
    for cluster in {job.cluster: None for job in jobs}:
        ids = [job.id for job in jobs if job.cluster == cluster]
        for first in range(0, len(ids), _IDS_AT_ONCE):
            command = ["scancel", *_at(cluster), "--quiet", *options]
            try:
                _run([*command, *ids[first : first + _IDS_AT_ONCE]])
            except SlurmError as error:  # one of them may have ended just now
                said.append(str(error))
    return "; ".join(said)


def _accounted(
    submissions: Sequence[Submission], known: Iterable[Job], cluster: str | None
) -> list[Job]:
    numbers = {job.array for job in known}
    gone = [submission for submission in submissions if submission.job not in numbers]
    if not gone or shutil.which("sacct") is None:
        return []
    command = ["sacct", *_at(cluster), "--noheader", "--parsable2", "--allocations"]
    command.append(f"--jobs={','.join(submission.job for submission in gone)}")
    said = _run_if_it_can([*command, f"--format={parsing.SACCT_FORMAT}"])
    return parsing.parse_sacct(said, gone)


def _at(cluster: str | None) -> list[str]:
    return [] if cluster is None else [f"--clusters={cluster}"]


def _run_if_it_can(command: list[str]) -> str:
    """Return what a command says that may not be able to: nothing rests on it."""
    try:
        return _run(command)
    except SlurmError:
        return ""


def _run(command: list[str]) -> str:
    """Run one of Slurm's commands; return what it printed. Raises SlurmError."""
    name = command[0]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=_ANSWER_S,
            check=False,
        )
    except FileNotFoundError:
        raise SlurmError(
            f"there is no `{name}` on PATH; call this where Slurm's commands are, on a login node "
            "say, perhaps after `module load slurm`"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"`{name}` did not answer within {_ANSWER_S:g} s; look with squeue what came of it, "
            "and try again when Slurm answers"
        ) from None
    except OSError as error:
        raise SlurmError(f"cannot run `{name}`: {error.strerror}") from error
    if done.returncode != 0:
        words = _one_line(done.stderr) or f"exit code {done.returncode}"
        raise SlurmError(f"{name} refused: {words}")
    return done.stdout


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())
