"""What became of one line in a preview, as values; nothing here runs or prints."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from dispatcher.taskmanager.backend.request import Request, Response

ERROR = "__ERROR__"


@dataclass(slots=True)
class Exchange:
    """A request and its response. `seconds` is until the answer, a wait for a slot included."""

    request: Request
    response: Response
    seconds: float
    attempt: int = 1

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens in and out, as the server counted them."""
        content = self.response.content
        usage = content.get("usage") if isinstance(content, dict) else None
        usage = usage if isinstance(usage, dict) else {}
        return _whole(usage.get("prompt_tokens")), _whole(usage.get("completion_tokens"))


@dataclass(slots=True)
class LineRecord:
    """One line: what was asked and answered in each attempt, and how it ended.

    `result` is the line of output that a run would write, `notes` what happened besides.
    """

    work_id: int
    text: str
    exchanges: list[Exchange] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    result: str = ""
    seconds: float = 0.0

    @property
    def error(self) -> dict[str, Any] | None:
        """What the `__ERROR__` line says; None when the line went well."""
        value = parsed(self.result)
        error = value.get(ERROR) if isinstance(value, dict) else None
        return error if isinstance(error, dict) else None

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens in and out of all requests."""
        each = [exchange.tokens for exchange in self.exchanges]
        return sum(tokens[0] for tokens in each), sum(tokens[1] for tokens in each)


def parsed(text: str) -> Any:
    """Return the JSON value in a text, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0
