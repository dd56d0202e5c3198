"""What a person is told of a run: one place, so that all displays and the summary agree.

Everything comes from `/status`, as the page has it too, or, once the run is complete, from the
summary in run.yaml.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_WINDOW_S = 30.0


class Rates:
    """Items and tokens a second over the last 30 seconds."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int, int]] = deque()

    def add(self, now: float, done: int, tokens: int) -> None:
        """Record the totals at a time."""
        self._samples.append((now, done, tokens))
        while len(self._samples) > 2 and now - self._samples[0][0] > _WINDOW_S:
            self._samples.popleft()

    def per_second(self) -> tuple[float, float]:
        """Return items and tokens a second."""
        if len(self._samples) < 2:
            return 0.0, 0.0
        (start, done_0, tokens_0), (end, done_1, tokens_1) = self._samples[0], self._samples[-1]
        seconds = max(end - start, 1e-9)
        # A server that was started again has forgotten the tokens, though not the items.
        return (done_1 - done_0) / seconds, max(0, tokens_1 - tokens_0) / seconds

    @property
    def span_s(self) -> float:
        """The seconds that the rates are taken over."""
        return self._samples[-1][0] - self._samples[0][0] if self._samples else 0.0


@dataclass(frozen=True)
class RunFacts:
    """How a run stands. `left_s` is None where nothing says it; its pace is over `basis_s`.

    `waiting_for` is the line behind which `waiting` results wait. `errors` are counts by cause.
    `paused` says why nothing is handed out, `input_problem` why no more of the input is copied, or
    they are empty.
    """

    state: str
    done: int
    failed: int
    total: int
    total_is_exact: bool = True
    errors: Mapping[str, int] = field(default_factory=dict)
    in_flight: int = 0
    ready: int = 0
    workers: int = 0
    waiting: int = 0
    waiting_for: int | None = None
    blocked_by_window: bool = False
    charged: int = 0
    crashed: int = 0
    items_s: float = 0.0
    tokens_s: float = 0.0
    left_s: float | None = None
    basis_s: float = 0.0
    output_error: str | None = None
    paused: str = ""
    input_problem: str = ""
    has_begun: bool = True

    @property
    def causes(self) -> str:
        """The errors by cause, the most frequent first: `bad_answer 7, timeout 1`."""
        return causes_text(self.errors, self.failed)

    @property
    def behind(self) -> str:
        """What the output waits for; empty when it does not."""
        if self.waiting_for is None or not self.waiting:
            return ""
        held = "; no new line before it is done (--window)" if self.blocked_by_window else ""
        return f"{self.waiting} results wait behind line {self.waiting_for}{held}"

    @property
    def basis(self) -> str:
        """What the time left is reckoned from."""
        return f"at the pace of the last {clock(self.basis_s)}"


def facts_of(status: Mapping[str, Any], rates: Rates) -> RunFacts:
    """Gather the facts from a reply of `/status`; `rates` serve where the server tells none."""
    items_s, tokens_s = rates.per_second()
    left = status["total"] - status["done"]
    left_s, basis_s = (left / items_s if items_s > 0 and left > 0 else None), rates.span_s
    if told := status.get("rate"):
        items_s, tokens_s = told["items_per_s"], told["tokens_per_s"]
    if "time_left" in status:
        estimate = status["time_left"] or {}
        left_s, basis_s = estimate.get("seconds") or None, estimate.get("over_s", 0.0)
    return RunFacts(
        state=status.get("state", "running"),
        done=status["done"],
        failed=status["failed"],
        total=status["total"],
        total_is_exact=status["total_is_exact"],
        errors=status.get("errors", {}),
        in_flight=status["issued"],
        ready=status.get("heap_size", 0),
        workers=status.get("workers", 0),
        waiting=status.get("pending", 0),
        waiting_for=status.get("waiting_for"),
        blocked_by_window=status.get("blocked_by_window", False),
        charged=status.get("charged", 0),
        crashed=status.get("crashed", 0),
        items_s=items_s,
        tokens_s=tokens_s,
        left_s=left_s,
        basis_s=basis_s,
        output_error=status["output_error"],
        paused=(status.get("paused") or {}).get("message", ""),
        input_problem=(status.get("copying") or {}).get("problem") or "",
        has_begun=bool(status["next_work_id"] or status["done"]),
    )


def facts_of_summary(summary: Mapping[str, Any]) -> RunFacts:
    """Gather the facts from the summary that run.yaml has of a complete run."""
    done = summary.get("done", 0)
    return RunFacts(
        state="complete",
        done=done,
        failed=summary.get("failed", 0),
        total=done,
        errors=summary.get("errors", {}),
        charged=summary.get("charged", 0),
        crashed=summary.get("crashed", 0),
    )


def causes_text(errors: Mapping[str, int], failed: int) -> str:
    """Return errors by cause, the most frequent first; `failed` counts those of any cause."""
    kinds = sorted(errors.items(), key=lambda pair: (-pair[1], pair[0]))
    parts = [f"{kind} {count}" for kind, count in kinds]
    if (others := failed - sum(errors.values())) > 0:
        parts.append(f"{others} of other kinds")
    return ", ".join(parts)


def clock(seconds: float) -> str:
    """Return a duration as 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
