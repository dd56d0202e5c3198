"""Can the task be imported, and what does it ask first?"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from dispatcher.doctor.finding import Finding, ok, problem, warning
from dispatcher.models import WorkItem
from dispatcher.preview.text import printable
from dispatcher.storage.lines import InputLine
from dispatcher.taskmanager.execution import Answered, Attempt, Raised, WantsRetry, task_of_line
from dispatcher.taskmanager.task.loading import load_task

CHECK = "task"
_SHOWN_CHARACTERS = 300


def check_task(
    spec: str, task_args: Mapping[str, Any], line: InputLine | None, max_retries: int
) -> Finding:
    """Load the task and give it a line, without a model. Raises TaskLoadError."""
    begun_at = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # which a task may print to
        task_class = load_task(spec, task_args)
        took = f"loaded in {time.perf_counter() - begun_at:.1f} s"
        if line is None:
            return ok(CHECK, f"{spec} {took}; there is no line to try it with")
        item = WorkItem(0, line.text, max_retries=max_retries)
        step = Attempt(partial(task_of_line, task_class, item)).begin()
    match step:
        case Raised(message, place):
            return problem(
                CHECK, f"{spec} {took}, but raised {_cut(message)} at {place}", "mend it there"
            )
        case WantsRetry(reason):
            return warning(
                CHECK,
                f"{spec} {took}, but asks to be tried again before it asked anything: "
                f"{_cut(reason)}",
                "a retry helps only after an answer",
            )
        case Answered(result) if result.startswith('{"__ERROR__"'):
            return problem(CHECK, f"{spec} {took}, but failed: {_cut(result)}", "mend it")
        case Answered(result):
            return ok(CHECK, f"{spec} {took}; answers without a model: {_cut(result)}")
    content = json.dumps(step[0].request.content, ensure_ascii=False, default=repr)
    more = f" and {len(step) - 1} more at once" if len(step) > 1 else ""
    return ok(CHECK, f"{spec} {took}; asks first{more}: {_cut(content)}")


def _cut(text: str) -> str:
    text = " ".join(printable(text).split())
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return f"{text[:_SHOWN_CHARACTERS]} … (+{len(text) - _SHOWN_CHARACTERS:,} characters)"
