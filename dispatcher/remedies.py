"""What lifts a pause, told in the same words wherever one is told."""

from __future__ import annotations

from collections.abc import Collection

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


def calls_that_go_on(by: Collection[str]) -> str:
    """Return the calls by which the server of a run which is paused by these is told to go on."""
    lifts: dict[By, str] = {
        "operator": 'POST /pause {"paused": false}',
        "failures": "POST /max_failures",
    }
    return " and ".join(call for who, call in lifts.items() if who in by)


def how_to_go_on(by: Collection[str]) -> str:
    """Return what to do about a pause by these, where a server is running."""
    mend = "mend the cause, then " if "failures" in by else ""
    return (
        f"what is under way may finish; {mend}tell the running server by {calls_that_go_on(by)} "
        f"(docs/protocol.md), or start the run again with {options_that_go_on(by)}"
    )
