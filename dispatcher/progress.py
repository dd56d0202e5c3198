"""How a run goes, for a person at a terminal or a log file."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from dispatcher.run_facts import Rates, RunFacts, clock, facts_of

if TYPE_CHECKING:
    from rich.console import Group

LINE_EVERY_S = 60.0
_MODELS_THAT_FIT = 3
_NAME_THAT_FITS = 16
log = logging.getLogger(__name__)


class Display(Protocol):
    """Shows a run's status, again and again."""

    def show(self, status: dict[str, Any], now: float) -> None:
        """Show this status of `/status` now."""

    def show_facts(self, facts: RunFacts, models: dict[str, Any] | None = None) -> None:
        """Show these facts now, as the last ones of a run."""

    def note(self, text: str) -> None:
        """Say something that happened."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def make_display(stream: TextIO = sys.stderr) -> Display:
    """Return a live view on a terminal, a plain line a minute anywhere else."""
    return LiveDisplay(stream) if stream.isatty() else LineDisplay(stream)


def line_of(facts: RunFacts, models: dict[str, Any] | None = None) -> str:
    """Return the facts in one line."""
    parts = [f"{facts.done} done"]
    if facts.failed:
        parts.append(f"{facts.failed} with errors ({facts.causes})")
    parts.append(f"{facts.in_flight} in flight")
    parts.append(f"{facts.items_s:.1f} items/s")
    if facts.tokens_s:
        parts.append(f"{facts.tokens_s:.0f} tokens/s")
    models = models or {}
    if 1 < len(models) <= _MODELS_THAT_FIT:
        parts.append("requests " + " ".join(_load(*model) for model in models.items()))
    if facts.workers:
        parts.append(f"{facts.workers} worker{'s' if facts.workers > 1 else ''}")
    if facts.left_s is not None:
        parts.append(f"{clock(facts.left_s)} left {facts.basis}")
    if facts.behind:
        parts.append(facts.behind)
    if facts.paused:
        parts.append(facts.paused)
    if facts.input_problem:
        parts.append(facts.input_problem)
    if facts.output_error:
        parts.append(f"output paused: {facts.output_error}")
    return ", ".join(parts)


def whole_line_of(facts: RunFacts, models: dict[str, Any] | None = None) -> str:
    """Return the facts in one line that says of how many lines, too."""
    about = "" if facts.total_is_exact else "about "
    return f"of {about}{facts.total} lines: {line_of(facts, models)}"


def rows_of(facts: RunFacts) -> list[tuple[str, str]]:
    """Return the facts as names and texts, without those that there is nothing to say of."""
    about = "" if facts.total_is_exact else "about "
    speed = f"{facts.items_s:.1f} items/s"
    if facts.tokens_s:
        speed += f", {facts.tokens_s:.0f} tokens/s"
    left = f"{clock(facts.left_s)}, {facts.basis}" if facts.left_s is not None else ""
    again = f"{facts.charged} charged, {facts.crashed} by crashes"
    rows = [
        ("state", facts.state),
        ("", facts.paused),
        ("done", f"{facts.done} of {about}{facts.total} lines"),
        ("speed", speed if facts.state != "complete" else ""),
        ("time left", left),
        ("in flight", f"{facts.in_flight}, {facts.ready} to be handed out again"),
        ("workers", str(facts.workers)),
        ("errors", f"{facts.failed}: {facts.causes}" if facts.failed else "0"),
        ("reissues", again if facts.charged or facts.crashed else ""),
        ("waiting", facts.behind),
        ("input", facts.input_problem),
        ("output", f"paused: {facts.output_error}" if facts.output_error else ""),
    ]
    return [(name, text) for name, text in rows if text]


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


class LiveDisplay:
    """A view of the facts that stays where it is and changes."""

    def __init__(self, stream: TextIO) -> None:
        # Here, as a command that shows nothing need not wait for it.
        from rich.console import Console
        from rich.live import Live

        self._rates = Rates()
        self.console = Console(file=stream)
        self._live = Live(console=self.console, refresh_per_second=4)
        self._live.start()

    def show(self, status: dict[str, Any], now: float) -> None:
        """Show the facts of this status."""
        self._rates.add(now, status["done"], status["completion_tokens"])
        self.show_facts(facts_of(status, self._rates), status.get("models"))

    def show_facts(self, facts: RunFacts, models: dict[str, Any] | None = None) -> None:
        """Show these facts."""
        self._live.update(_view(facts, models or {}))

    def note(self, text: str) -> None:
        """Print above the view."""
        self.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Stop redrawing; the last view stays."""
        self._live.stop()


def _view(facts: RunFacts, models: dict[str, Any]) -> Group:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    head = Table.grid(padding=(0, 1))
    # Rounded down: only what is complete is 100 %.
    share = 100 * facts.done // facts.total if facts.total else 0
    head.add_row(
        ProgressBar(total=max(facts.total, 1), completed=facts.done, width=40), f"{share}%"
    )
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    rows = rows_of(facts)
    if not facts.has_begun and not facts.paused:
        rows.append(("", "waiting for a task manager to be ready"))
    if len(models) > 1:
        loads = ", ".join(_load(*model) for model in list(models.items())[:_MODELS_THAT_FIT])
        rows.append(("requests", loads))
    for name, text in rows:
        table.add_row(name, Text(text, style="red" if name == "errors" and facts.failed else ""))
    return Group(head, table)


class LineDisplay:
    """A plain line a minute, and at once when the run is paused or goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rates = Rates()
        self._shown_at: float | None = None
        self._said = ""  # while nothing was begun
        self._paused = ""

    def show(self, status: dict[str, Any], now: float) -> None:
        """Print a line when it is time."""
        self._rates.add(now, status["done"], status["completion_tokens"])
        facts = facts_of(status, self._rates)
        if not facts.has_begun:
            waits = facts.paused or "waiting for a task manager to be ready"
            if waits != self._said:
                self._said = waits
                self.note(waits)
            return
        is_due = self._shown_at is None or now - self._shown_at >= LINE_EVERY_S
        if is_due or facts.paused != self._paused:
            self._shown_at, self._paused = now, facts.paused
            self.show_facts(facts, status.get("models"))

    def show_facts(self, facts: RunFacts, models: dict[str, Any] | None = None) -> None:
        """Print these facts now."""
        self.note(whole_line_of(facts, models))

    def note(self, text: str) -> None:
        """Print a line."""
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing to undo."""


class LogDisplay(LineDisplay):
    """A line a minute into the log, for programs that read it."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def note(self, text: str) -> None:
        """Log it."""
        log.info("%s", text)
