"""The jobs of a run as Slurm shows them, and which of them to end; nothing here calls Slurm."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from dispatcher.slurm.settings import WORKERS

SQUEUE_FORMAT = "%i|%T|%M|%L|%r|%N|%o"
SQUEUE_MORE_FORMAT = "JobArrayID:64,RestartCnt:16"
SACCT_FORMAT = "JobID,State,Elapsed,ExitCode,NodeList"

_WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"}
_OVER = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL"),
    *("DEADLINE", "OUT_OF_MEMORY", "REVOKED"),
}
_ELAPSED = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")


class Submission(msgspec.Struct, frozen=True, omit_defaults=True):
    """A job, or an array of `count` jobs, as sbatch took it. `script` is the rendered one."""

    job: str
    role: str
    script: str
    submitted_at: str
    count: int = 1
    cluster: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One job, or one element of an array."""

    id: str
    role: str
    state: str
    elapsed: str = ""
    left: str = ""
    reason: str = ""
    node: str = ""
    restarts: str = ""
    cluster: str | None = None

    @property
    def array(self) -> str:
        """The number of the array that it is in, or its own."""
        return self.id.partition("_")[0]

    @property
    def element(self) -> int:
        """Its place in the array."""
        place = self.id.partition("_")[2]
        return int(place) if place.isdecimal() else 0

    @property
    def is_waiting(self) -> bool:
        """Whether its script has not begun, or not begun again."""
        return self.state in _WAITING

    @property
    def is_over(self) -> bool:
        """Whether it has ended and does not begin again."""
        return self.state in _OVER

    @property
    def elapsed_s(self) -> int:
        """Seconds since it began."""
        match = _ELAPSED.fullmatch(self.elapsed)
        if match is None:
            return 0
        days, hours, minutes, seconds = (int(part) for part in match.groups("0"))
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


# -------------------------------------------------------------------- what Slurm's commands say


def parse_job_id(text: str) -> tuple[str, str | None]:
    """Return number and cluster from `sbatch --parsable`. Raises ValueError."""
    lines = text.split()
    number, _, cluster = lines[-1].partition(";") if lines else ("", "", "")
    if not number.isdecimal():
        raise ValueError(text)
    return number, cluster or None


def parse_squeue(text: str, submissions: Iterable[Submission]) -> list[Job]:
    """Return the jobs of these submissions among those that squeue shows in SQUEUE_FORMAT.

    A job of the same number that runs another script is none of them: numbers begin anew when a
    cluster is set up anew.
    """
    by_number = {submission.job: submission for submission in submissions}
    jobs = []
    for line in text.splitlines():
        fields = line.split("|", SQUEUE_FORMAT.count("|"))
        submission = by_number.get(fields[0].partition("_")[0])
        if submission is None or len(fields) <= SQUEUE_FORMAT.count("|"):
            continue
        name, state, elapsed, left, reason, node, command = fields
        if command in (submission.script, "", "(null)"):
            words = (elapsed, left, "" if reason == "None" else reason, node)
            jobs.append(Job(name, submission.role, state, *words, cluster=submission.cluster))
    return jobs


def parse_restarts(text: str) -> dict[str, str]:
    """Return how often each job was requeued, from squeue in SQUEUE_MORE_FORMAT."""
    pairs = [line.split() for line in text.splitlines()]
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def parse_sacct(text: str, submissions: Iterable[Submission]) -> list[Job]:
    """Return the jobs of these submissions that sacct knows, in SACCT_FORMAT."""
    by_number = {submission.job: submission for submission in submissions}
    jobs = []
    for line in text.splitlines():
        fields = line.split("|")
        submission = by_number.get(fields[0].partition("_")[0])
        is_step = "." in fields[0]
        if submission is None or is_step or len(fields) != SACCT_FORMAT.count(",") + 1:
            continue
        name, state, elapsed, code, node = fields
        reason = "" if code == "0:0" else f"exit code {code.partition(':')[0]}"
        state = state.split()[0]  # CANCELLED by 1000
        jobs.append(
            Job(name, submission.role, state, elapsed, "", reason, node, cluster=submission.cluster)
        )
    return jobs


# -------------------------------------------------------------------- which to end


def alive(jobs: Iterable[Job]) -> list[Job]:
    """Return the jobs that wait, run or are ending."""
    return [job for job in jobs if not job.is_over]


def to_remove(jobs: Iterable[Job], count: int) -> list[Job]:
    """Return the worker jobs to cancel so that there are `count` fewer.

    Those that wait first, the last of them before the others; then those that run, the youngest
    first. Those that are ending already do not count.
    """
    workers = [job for job in jobs if job.role == WORKERS and not job.is_over]
    waiting = [job for job in workers if job.is_waiting]
    running = [job for job in workers if not job.is_waiting and job.state != "COMPLETING"]
    waiting.sort(key=lambda job: (int(job.array), job.element), reverse=True)
    running.sort(key=lambda job: (job.elapsed_s, -int(job.array), -job.element))
    return [*waiting, *running][:count]


def to_stop(jobs: Sequence[Job], told: set[str]) -> tuple[list[Job], list[Job]]:
    """Return whom to cancel now and whom to interrupt, so that in the end nobody is left.

    Workers before the server, which takes what they give back; `told` are the ids of those that
    run and know it. A job that waits is cancelled, also one that was requeued just now.
    """
    living = alive(jobs)
    waiting = [job for job in living if job.is_waiting]
    running = [job for job in living if not job.is_waiting and job.state != "COMPLETING"]
    untold = [job for job in running if job.id not in told]
    workers = [job for job in untold if job.role == WORKERS]
    if any(job.role == WORKERS for job in living):
        return [*waiting, *workers], []
    return waiting, [job for job in untold if job.role != WORKERS]
