"""What must hold of every run, whatever went wrong: one judge for all fault tests.

Every acknowledged result is in the output; line i answers line i; no line is missing or there
twice; an item is handed out within its limit of charged reissues. Whether the processes end is
for the test to see.

The input lines are JSON objects with an "id"; a result carries the id of its line. `Ledger`
notes what clients were told while the run went on; `problems` compares that with the output.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

ERROR = "__ERROR__"


def input_line(number: int) -> str:
    """Return the input line whose id is its number."""
    return json.dumps({"id": number, "text": f"line {number}"})


def result_of(content: str, worker: str, nonce: int) -> str:
    """Return a result that answers `content` and tells whose work it is."""
    return json.dumps({"id": json.loads(content)["id"], "worker": worker, "nonce": nonce})


@dataclass
class Ledger:
    """What the clients of one run were told, noted as each reply arrives."""

    max_retries: int
    accepted: dict[int, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    grants: int = 0

    def note_grant(self, work_id: int, content: str, retry_count: int, attempt: int) -> None:
        """An item was handed out."""
        self.grants += 1
        if json.loads(content)["id"] != work_id:
            self.wrong.append(f"item {work_id} was handed out with another line: {content[:80]}")
        if self.max_retries >= 0 and retry_count > self.max_retries:
            self.wrong.append(f"item {work_id} was handed out with retry_count {retry_count}")
        if attempt <= retry_count:
            self.wrong.append(f"item {work_id} was handed out for attempt {attempt}")

    def note_outcome(self, work_id: int, result: str, outcome: str) -> None:
        """A client was told what became of its result."""
        if outcome != "accepted":
            return
        before = self.accepted.setdefault(work_id, result)
        if before != result:
            self.wrong.append(f"two different results of item {work_id} were accepted")

    def problems(self, lines: Sequence[str], output: bytes) -> list[str]:
        """Return what is wrong with a complete run, a sentence each; empty when all is well."""
        found = list(self.wrong)
        written = output.decode().split("\n")
        if written.pop() != "":
            found.append("the output does not end with a line end")
        if len(written) != len(lines):
            found.append(f"{len(written)} lines of output answer {len(lines)} lines of input")
        for number, (asked, answered) in enumerate(zip(lines, written, strict=False)):
            if (wrong := _wrong_answer(number, asked, answered)) is not None:
                found.append(wrong)
        for work_id, result in self.accepted.items():
            if work_id >= len(written) or written[work_id] != result.strip():
                there = written[work_id][:80] if work_id < len(written) else "nothing"
                found.append(f"the accepted result of item {work_id} is lost: there is {there}")
        return found

    def attempts_problems(self, output: bytes) -> list[str]:
        """Return the tombstones that came too early for `max_retries`."""
        found = []
        for number, text in enumerate(output.decode().splitlines()):
            try:
                error: Any = json.loads(text).get(ERROR)
            except (ValueError, AttributeError):
                continue  # `problems` tells
            if error is None or error.get("error") != "max_retries_exceeded":
                continue
            attempts = {entry["attempt"] for entry in error["attempts"]}
            if self.max_retries < 0 or max(attempts, default=0) <= self.max_retries:
                found.append(f"the tombstone of item {number} lists attempts {sorted(attempts)}")
        return found


def _wrong_answer(number: int, asked: str, answered: str) -> str | None:
    try:
        answer = json.loads(answered)
        wanted = json.loads(asked)["id"]
        error = answer.get(ERROR)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"line {number} of the output is not an answer: {answered[:80]!r}"
    given = error.get("work_id") if isinstance(error, dict) else answer.get("id")
    return None if given == wanted else f"line {number} of the output answers line {given}"
