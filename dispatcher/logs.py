"""What processes log: lines for people, or JSON objects for programs.

Every line names the run, the worker and the line of the input (`work_id`), where they are known.
A record that belongs to one line has `extra={"work_id": N}`. What may quote a line or an answer
goes into `extra={"content": text}` and is shown only when somebody asked for it.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from dispatcher.config import Parser

_known: dict[str, str] = {}


def add_log_options(parser: Parser) -> None:
    """Add the options of every command that logs."""
    group = parser.add_argument_group("log")
    group.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="lines for people, or a JSON object a line with time, level, message and, where "
        "known, run, worker and work_id",
    )
    group.add_argument(
        "--log-content",
        action="store_true",
        help="let the log quote messages of tasks, which may hold text of prompts and answers",
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


def _facts(record: logging.LogRecord) -> dict[str, object]:
    found: dict[str, object] = dict(_known)
    for name in ("run", "worker", "work_id"):
        if (value := getattr(record, name, None)) is not None:
            found[name] = value
    return found


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
        known = " ".join(f"{name}={value}" for name, value in _facts(record).items())
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
