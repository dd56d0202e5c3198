"""What processes log: lines for people, or JSON objects for programs.

Every line names the run, the worker and the line of the input (`work_id`): in JSON with null for
what there is none of, in text where there is one. A record that belongs to one line of the input
has `extra={"work_id": N}`; what task code logs has it by `on_line`. What may quote a line or an
answer goes into `extra={"content": text}` and is shown only when somebody asked for it.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TypeVar

from dispatcher.config import Parser

T = TypeVar("T")

_NAMES = ("run", "worker", "work_id")
_known: dict[str, str] = {}
_line: ContextVar[int | None] = ContextVar("line", default=None)


def add_log_options(parser: Parser) -> None:
    """Add the options of every command that logs."""
    group = parser.add_argument_group("log")
    group.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="lines for people, or a JSON object a line with time, level, logger, message, run, "
        "worker and work_id, null where there is none (default: text)",
    )
    group.add_argument(
        "--log-content",
        action="store_true",
        help="let the log quote messages of tasks, which may hold text of prompts and answers "
        "(default: only the kind and the place of an error)",
    )


def start_logging(log_format: str, *, with_content: bool) -> None:
    """Log to standard error from here on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter(with_content) if log_format == "json" else TextFormatter(with_content)
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def know(*, run: str | None = None, worker: str | None = None) -> None:
    """Name the run, the worker or both in every line from here on."""
    if run:
        _known["run"] = run
    if worker:
        _known["worker"] = worker


def on_line(work_id: int | None, step: Callable[[], T]) -> T:
    """Return what `step` returns; what it logs meanwhile in this thread belongs to the line."""
    before = _line.set(work_id)
    try:
        return step()
    finally:
        _line.reset(before)


def _facts(record: logging.LogRecord) -> dict[str, object]:
    known = {**_known, "work_id": _line.get()}
    return {name: getattr(record, name, known.get(name)) for name in _NAMES}


class TextFormatter(logging.Formatter):
    """A line for people: `12:00:00 WARNING message [run=.. worker=.. work_id=..]`."""

    def __init__(self, with_content: bool = False) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
        self._with_content = with_content

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line without a traceback."""
        text = super().formatMessage(record)
        if self._with_content and (content := getattr(record, "content", None)) is not None:
            text += f": {content}"
        facts = _facts(record).items()
        known = " ".join(f"{name}={value}" for name, value in facts if value is not None)
        return f"{text} [{known}]" if known else text


class JsonFormatter(logging.Formatter):
    """A JSON object a line."""

    def __init__(self, with_content: bool = False) -> None:
        super().__init__()
        self._with_content = with_content

    def format(self, record: logging.LogRecord) -> str:
        """Return the object."""
        at = datetime.fromtimestamp(record.created, UTC)
        entry: dict[str, object] = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_facts(record),
        }
        if self._with_content and (content := getattr(record, "content", None)) is not None:
            entry["content"] = content
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=True, default=str)
