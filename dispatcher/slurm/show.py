"""Jobs as text for people."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from dispatcher.slurm.jobs import Job, Submission

_HEADINGS = ("JOB", "ROLE", "STATE", "NODE", "ELAPSED", "LEFT", "RESTARTS", "REASON")


def table_text(jobs: Iterable[Job]) -> str:
    """Return the jobs, one a line; those of an array that all wait, or are over, in one line."""
    rows = [_HEADINGS]
    for _, group in groupby(jobs, key=_alike):
        members = list(group)
        job = members[0]
        shown = members_text(members)
        runs = len(members) == 1 and not job.is_waiting
        times = (job.elapsed if runs else "", job.left if runs and not job.is_over else "")
        node = job.node if len(members) == 1 else ""
        rows.append((shown, job.role, job.state, node, *times, job.restarts, job.reason))
    widths = [max(len(row[n]) for row in rows) for n in range(len(_HEADINGS))]
    lines = [
        "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def _alike(job: Job) -> tuple[str, ...]:
    if job.is_waiting or job.is_over:
        return (job.array, job.state, job.reason, job.restarts)
    return (job.id,)


def members_text(members: list[Job]) -> str:
    """Return the id of a job, or those of elements of one array: 13_[1-4,7]."""
    if len(members) == 1:
        return members[0].id
    return f"{members[0].array}_[{ranges_text(member.element for member in members)}]"


def ranges_text(numbers: Iterable[int]) -> str:
    """Return numbers in short: 1-4,7."""
    parts = []
    # What grows as its place does belongs together.
    for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        several = [number for _, number in run]
        first, last = several[0], several[-1]
        parts.append(f"{first}" if first == last else f"{first}-{last}")
    return ",".join(parts)


def ids_text(jobs: Iterable[Job]) -> str:
    """Return the ids of jobs, those of an array together."""
    ordered = sorted(jobs, key=lambda job: (int(job.array), job.element))
    groups = [list(group) for _, group in groupby(ordered, key=lambda job: job.array)]
    return ", ".join(map(members_text, groups))


def submission_text(submission: Submission) -> str:
    """Return a job that Slurm no longer knows."""
    count = f", {submission.count} jobs" if submission.count > 1 else ""
    return (
        f"{submission.job} ({submission.role}{count}, submitted {submission.submitted_at}) is "
        "over: Slurm no longer knows it"
    )
