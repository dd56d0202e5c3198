"""What `dispatcher run` does about a paused run: wait and say so, or end and say so."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dispatcher.errors import RunPausedError
from dispatcher.progress import Display
from dispatcher.remedies import command_that_goes_on, options_that_go_on


class PauseNotes:
    """Says once of each pause what it is. `resume` is the command that goes on with the run."""

    def __init__(self, state_dir: Path, display: Display, resume: str) -> None:
        self._state_dir = state_dir
        self._display = display
        self._resume = resume
        self._said = ""

    def look(self, status: Mapping[str, Any]) -> None:
        """Note an operator's pause, and its end: whoever said it will say when to go on.

        Raises RunPausedError when too many lines failed, as nobody may be there to be asked.
        """
        paused = status["paused"] if status.get("state") == "paused" else None
        if paused is None:
            if self._said:
                self._display.note("the run goes on")
            self._said = ""
            return
        by, message = paused["by"], paused["message"]
        options = options_that_go_on(by)
        if "failures" in by:
            line = (paused.get("cause") or {}).get("line")
            words = ["dispatcher", "runs", str(self._state_dir)]
            look = shlex.join(words if line is None else [*words, "--item", str(line)])
            raise RunPausedError(
                f"{message}; look with: {look}; mend the cause, then go on with: "
                f"{self._resume} {options}"
            )
        if message != self._said:
            self._display.note(
                f"{message}; it waits for: {command_that_goes_on(by, self._state_dir)}; or end it "
                f"with Ctrl-C, then go on with: {self._resume} {options}"
            )
        self._said = message
