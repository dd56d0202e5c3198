"""The `__ERROR__` lines that a run writes itself, for lines that no worker answered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from dispatcher.core.events import Ended
from dispatcher.core.work_queue import MAX_RETRIES_EXCEEDED


def refused_line(work_id: int, defect: str, text: str, max_line_bytes: int) -> bytes:
    """Return the line for an input line that cannot be handed out; `text` is what was read."""
    said = {
        "blank_line": "the line is blank",
        "undecodable_line": "the line is not UTF-8",
        "line_too_long": (
            f"the line is longer than --max-line-bytes {max_line_bytes}; original_content holds "
            "its beginning"
        ),
    }
    return _error_line(defect, work_id, message=said[defect], original_content=text)


def tombstone(work_id: int, text: str, history: Sequence[Ended]) -> bytes:
    """Return the line for an item that ran out of reissues; `history` is what became of each."""
    attempts = [msgspec.structs.asdict(ended) for ended in history]
    return _error_line(MAX_RETRIES_EXCEEDED, work_id, original_content=text, attempts=attempts)


def _error_line(kind: str, work_id: int, **more: Any) -> bytes:
    line = {"__ERROR__": {"error": kind, "work_id": work_id, **more}}
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "replace")
