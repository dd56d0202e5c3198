"""What lifts a pause, told in the same words wherever one is told."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from pathlib import Path

from dispatcher.core.pausing import By

UNPAUSE = "--unpause"
ACCEPT_FAILURES = "--accept-failures"


def options_that_go_on(by: Collection[str]) -> str:
    """Return the options of a start that goes on with a run which is paused by these."""
    lifts: dict[By, str] = {
        "operator": UNPAUSE,
        "failures": f"{ACCEPT_FAILURES} (or a higher --max-failures)",
    }
    return " and ".join(option for who, option in lifts.items() if who in by)


def command_that_goes_on(by: Collection[str], state_dir: Path) -> str:
    """Return the command that tells the server of a run which is paused by these to go on."""
    words = ["dispatcher", "unpause", f"@{state_dir}"]
    return shlex.join([*words, ACCEPT_FAILURES] if "failures" in by else words)


def how_to_go_on(by: Collection[str], state_dir: Path) -> str:
    """Return what to do about a pause by these, where a server is running."""
    mend = "mend the cause, then " if "failures" in by else ""
    return (
        f"what is under way may finish; {mend}tell the running server by: "
        f"{command_that_goes_on(by, state_dir)}; or start the run again with "
        f"{options_that_go_on(by)}"
    )
