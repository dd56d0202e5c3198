"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's: what was looked at, what was found, what to do about it.

    A `problem` keeps a run from working, a `warning` may cost it time or results.
    """

    check: str
    status: Status
    found: str
    fix: str = ""

    def __str__(self) -> str:
        fix = f"; {self.fix}" if self.fix else ""
        return f"{self.status:<8} {self.check}: {self.found}{fix}"


def ok(check: str, found: str, fix: str = "") -> Finding:
    """Return what is as it should be; `fix` is then a hint."""
    return Finding(check, "ok", found, fix)


def warning(check: str, found: str, fix: str) -> Finding:
    """Return what may cost time or results."""
    return Finding(check, "warning", found, fix)


def problem(check: str, found: str, fix: str) -> Finding:
    """Return what keeps a run from working."""
    return Finding(check, "problem", found, fix)


def size_text(size_bytes: float) -> str:
    """Return a number of bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:,.1f} TiB"
