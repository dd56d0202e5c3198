"""Runs and histories as text for people, and as JSON for programs."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dispatcher.runs.failed import origin_path
from dispatcher.runs.found import FoundRun, quoted, section
from dispatcher.runs.history import ItemHistory, Try
from dispatcher.runs.look import Standing
from dispatcher.runs.merge import Merged

_SHOWN_CHARACTERS = 200


# -------------------------------------------------------------------- the list


def list_text(standings: list[Standing]) -> str:
    """Return the runs, a few lines each, and a count of them."""
    states = Counter(standing.state for standing in standings)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    total = f"{_number_of(len(standings), 'run')}: {counts}"
    return "\n\n".join([*map(standing_text, standings), total])


def standing_text(standing: Standing, *, resume: bool = True) -> str:
    """Return a run, a fact a line; `resume`: also how it is gone on with."""
    run = standing.run
    lines = [str(run.state_dir)]

    def add(name: str, text: str | None) -> None:
        if text:
            lines.append(f"  {name:<9} {text}")

    add("state", _state_text(standing))
    add("done", _done_text(standing))
    add("errors", _errors_text(standing))
    add("time", _time_text(standing))
    add("output", str(run.output) if run.content else None)
    add("note", standing.note)
    add("resume", _resume_text(standing) if resume else None)
    add("failed", _failed_text(standing))
    return "\n".join(lines)


def _state_text(standing: Standing) -> str:
    return f"{standing.state}, {standing.owner}" if standing.owner else standing.state


def _done_text(standing: Standing) -> str | None:
    if standing.done is None:
        return None
    if standing.percent is None:
        return f"{_number_of(standing.done, 'line')}; how many there are is not known yet"
    about = "" if standing.total_is_exact else "about "
    # Rounded down: only what is complete is 100 %.
    percent = int(standing.percent * 10) / 10
    return f"{standing.done} of {about}{standing.total} lines ({percent:.1f}%)"


def _errors_text(standing: Standing) -> str | None:
    if not standing.failed:
        return None
    kinds = sorted(standing.errors.items(), key=lambda pair: (-pair[1], pair[0]))
    parts = [f"{kind} {count}" for kind, count in kinds]
    if (others := standing.failed - sum(standing.errors.values())) > 0:
        parts.append(f"{others} of other kinds (--scan counts them)")
    return f"{standing.failed}: {', '.join(parts)}"


def _time_text(standing: Standing) -> str:
    started = standing.run.content.get("started_at")
    parts = [f"started {started}" if started else ""]
    if standing.ended_at:
        parts.append(f"ended {standing.ended_at}")
    elif standing.last_active_at and standing.state == "stopped":
        parts.append(f"last active {standing.last_active_at}")
    return ", ".join(part for part in parts if part)


def _resume_text(standing: Standing) -> str | None:
    if standing.state != "stopped":
        return None
    run = standing.run
    return run.resume_command or f"give the same command again ({run.given_input} -> {run.output})"


def _failed_text(standing: Standing) -> str | None:
    if standing.state != "complete" or not standing.failed:
        return None
    return f"dispatcher runs {quoted(standing.run.state_dir)} --failed-to FILE"


def standing_json(standing: Standing) -> dict[str, Any]:
    """Return a run as JSON; what is not known is null."""
    run = standing.run
    started = run.content.get("started_at")
    return {
        "state_dir": str(run.state_dir),
        "run": run.run_id or None,
        "state": standing.state,
        "done": standing.done,
        "total": standing.total,
        "total_is_exact": standing.total_is_exact,
        "percent": None if standing.percent is None else round(standing.percent, 3),
        "failed": standing.failed,
        "errors": standing.errors,
        "started_at": str(started) if started else None,
        "ended_at": standing.ended_at,
        "last_active_at": standing.last_active_at,
        "owner": standing.owner,
        "input": str(run.given_input) if run.content else None,
        "output": str(run.output) if run.content else None,
        "program": section(run.content, "command").get("program"),
        "resume": run.resume_command if standing.state == "stopped" else None,
        "note": standing.note,
    }


# -------------------------------------------------------------------- one line's history


def history_text(run: FoundRun, history: ItemHistory) -> str:
    """Return what became of a line."""
    lines = [f"line {history.work_id} of the run in {run.state_dir}"]
    if history.where:
        lines.append(f"  {history.where}")
    if history.tries:
        lines.append(f"  attempts, as {history.source} tells them:")
        lines += [f"    {_try_text(found)}" for found in history.tries]
    if history.recorded_steps:
        lines.append(
            f"  {_number_of(history.recorded_steps, 'step')} recorded, for its next attempt"
        )
    if history.missing:
        lines.append(f"  not known: {history.missing}" if history.tries else f"  {history.missing}")
    if history.result is not None:
        kind = f"error {history.error}" if history.error else "result"
        shown = history.result[:_SHOWN_CHARACTERS]
        dots = " ..." if history.result_bytes > len(shown.encode()) else ""
        lines.append(f"  {kind} ({history.result_bytes} bytes): {shown}{dots}")
    else:
        lines.append("  no result yet")
    return "\n".join(lines)


def _try_text(found: Try) -> str:
    parts = [f"attempt {found.attempt or '?'}, {found.worker or 'a worker without a name'}"]
    if found.solo:
        parts.append("alone on its engine")
    if found.steps:
        parts.append(f"{_number_of(found.steps, 'step')} recorded")
    ends = {None: "goes on", "result": "gave the result", "in vain": "another one's result came"}
    end = ends.get(found.end, found.end or "")
    parts.append(f"{end}: {found.reason}" if found.reason else end)
    if found.taken_back:
        parts.append("taken back, as the worker was only cut off")
    return "; ".join(parts)


def _number_of(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


def history_json(run: FoundRun, history: ItemHistory) -> dict[str, Any]:
    """Return what became of a line as JSON."""
    content = asdict(history)
    content["attempts"] = [
        {name: value for name, value in found.items() if name != "serial"}
        for found in content.pop("tries")
    ]
    return {"state_dir": str(run.state_dir), "run": run.run_id, **content}


# -------------------------------------------------------------------- failed lines


def failed_text(run: FoundRun, target: Path, written: int, kinds: dict[str, int]) -> str:
    """Return what was written, and what to do with it."""
    if not written:
        so_far = "" if run.is_complete else " so far"
        return f"the run in {run.state_dir} has no failed lines{so_far}: nothing was written"
    counts = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
    lines = [f"{_number_of(written, 'failed line')} in {target} ({counts})"]
    if not run.is_complete:
        lines.append("  the run is not complete: lines that fail later are not among them")
    lines.append(f"  where they belong is in {origin_path(target)}: keep it beside the file")
    lines.append(f"  run them again with --input {quoted(target)} --output AGAIN, then:")
    lines.append(f"  dispatcher runs {quoted(run.state_dir)} --merge AGAIN")
    return "\n".join(lines)


def merged_text(place: Path, merged: Merged) -> str:
    """Return what a merge did."""
    left = f"{merged.output} has {_number_of(merged.errors_left, 'failed line')} now"
    if merged.finished:
        return f"the merge of {place} that was interrupted is finished; {left}"
    if merged.again is not None:
        return f"{place} was merged at {merged.again} already: nothing was changed; {left}"
    text = f"{_number_of(merged.replaced, 'line')} of {merged.output} replaced"
    if merged.still_failed:
        text += f", {merged.still_failed} of them by another error"
    if merged.kept:
        text += f"; {merged.kept} kept as they were"
    return f"{text}; {left}"
