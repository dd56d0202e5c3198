"""Is the dispatcher server of a run there, for a task manager on this machine?"""

from __future__ import annotations

import time

from dispatcher.client import WorkClient
from dispatcher.doctor.finding import Finding, ok, problem, warning

CHECK = "dispatcher server"
_ANSWER_S = 20.0


def check_server(address: str, token: str | None, fingerprint: str | None) -> Finding:
    """Ask a server how its run is. Raises AccessDeniedError or UsageError, with the remedy."""
    begun_at = time.perf_counter()
    with WorkClient(address, token=token, fingerprint=fingerprint, timeout_s=_ANSWER_S) as client:
        status = client.status()
    took_ms = 1000 * (time.perf_counter() - begun_at)
    if not status:
        return problem(
            CHECK,
            f"no answer at {address}",
            "check that the server runs, that this machine may reach it, and, over TLS, that it "
            "is this run's (--server-fingerprint)",
        )
    run, state = status.get("run", "?"), status.get("state", "?")
    found = f"{address} answers in {took_ms:.0f} ms: run {run}, {state}"
    found += f", {status.get('done', 0)} of {status.get('total', 0)} lines done"
    if state == "paused":
        why = (status.get("paused") or {}).get("message", "paused")
        return warning(CHECK, f"{found}; {why}", "it hands out nothing until it is told to go on")
    return ok(CHECK, found)
