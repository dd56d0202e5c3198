"""How a run goes, for a person at a terminal or a log file."""

from __future__ import annotations

import sys
from collections import deque
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

_WINDOW_S = 30.0
_LINE_EVERY_S = 10.0
_MODELS_THAT_FIT = 3
_NAME_THAT_FITS = 16


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


class Display(Protocol):
    """Shows a run's status, again and again."""

    def show(self, status: dict[str, Any], now: float) -> None:
        """Show this status of `/status` now."""

    def note(self, text: str) -> None:
        """Say something that happened."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def make_display(stream: TextIO = sys.stderr) -> Display:
    """Return a progress bar on a terminal, plain lines anywhere else."""
    return BarDisplay(stream) if stream.isatty() else LineDisplay(stream)


def facts(status: dict[str, Any], rates: Rates) -> str:
    """Return the run's figures in one line."""
    items_s, tokens_s = rates.per_second()
    parts = [f"{status['done']} done"]
    if status["failed"]:
        parts.append(f"{status['failed']} with errors")
    parts.append(f"{status['issued']} in flight")
    parts.append(f"{items_s:.1f} items/s")
    if tokens_s:
        parts.append(f"{tokens_s:.0f} tokens/s")
    models = status.get("models", {})
    if 1 < len(models) <= _MODELS_THAT_FIT:
        parts.append("requests " + " ".join(_load(*model) for model in models.items()))
    left = status["total"] - status["done"]
    if items_s > 0 and left > 0:
        parts.append(f"{clock(left / items_s)} left")
    if status["output_error"]:
        parts.append(f"output paused: {status['output_error']}")
    return ", ".join(parts)


def _load(name: str, model: dict[str, Any]) -> str:
    short = name.rpartition("/")[2][:_NAME_THAT_FITS]
    return f"{short} {model['in_flight']}/{model['limit']}"


def model_lines(status: dict[str, Any]) -> list[str]:
    """Return a line a model, with what was asked of it and how fast it was.

    `status` is that of `/status`, or the summary in run.yaml. A server that is older than the
    models' figures gives no line.
    """
    return [_model_line(name, model) for name, model in status.get("models", {}).items()]


def _model_line(name: str, model: dict[str, Any]) -> str:
    parts = [
        f"{name}: {model['requests']} requests",
        f"{model['prompt_tokens']} tokens in, {model['completion_tokens']} out",
    ]
    if model["errors"]:
        parts.append(f"{model['errors']} errors")
    for what, key in (("latency", "latency_s"), ("first token", "ttft_s")):
        if (seconds := model.get(key)) is not None:
            parts.append(f"{what} p50 {seconds['p50']:g} s p95 {seconds['p95']:g} s")
    return ", ".join(parts)


def clock(seconds: float) -> str:
    """Return a duration as 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class BarDisplay:
    """A rich progress bar."""

    def __init__(self, stream: TextIO) -> None:
        self._rates = Rates()
        self._progress = Progress(
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.description}", markup=False),
            console=Console(file=stream),
        )
        self._task = self._progress.add_task("starting", total=None)
        self._progress.start()

    def show(self, status: dict[str, Any], now: float) -> None:
        """Move the bar."""
        self._rates.add(now, status["done"], status["completion_tokens"])
        self._progress.update(
            self._task,
            completed=status["done"],
            total=max(status["total"], 1),
            description=facts(status, self._rates),
        )

    def note(self, text: str) -> None:
        """Print above the bar."""
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Stop redrawing."""
        self._progress.stop()


class LineDisplay:
    """A plain line every ten seconds."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rates = Rates()
        self._shown_at: float | None = None

    def show(self, status: dict[str, Any], now: float) -> None:
        """Print a line when it is time."""
        self._rates.add(now, status["done"], status["completion_tokens"])
        if not status["next_work_id"] and not status["done"]:
            if self._shown_at is None:
                self.note("waiting for a task manager to be ready")
                self._shown_at = now
            return
        if self._shown_at is None or now - self._shown_at >= _LINE_EVERY_S:
            self._shown_at = now
            about = "" if status["total_is_exact"] else "about "
            self.note(f"of {about}{status['total']} lines: {facts(status, self._rates)}")

    def note(self, text: str) -> None:
        """Print a line."""
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing to undo."""
