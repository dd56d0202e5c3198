#!/usr/bin/env python3
"""Plays sbatch, squeue, scancel and sacct, by the name under which it is called.

`FAKE_SLURM` names its directory: `calls.jsonl` gets every argument list, `jobs.json` holds the
jobs, and a file `NAME.refuses` has the command NAME print it and fail.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

PLACE = Path(os.environ["FAKE_SLURM"])
SHOWN = ("id", "state", "elapsed", "left", "reason", "node", "command")


def given(words: list[str], name: str) -> str:
    return next((w.partition("=")[2] for w in words if w.startswith(f"--{name}=")), "")


def load() -> list[dict[str, Any]]:
    path = PLACE / "jobs.json"
    return json.loads(path.read_text()) if path.exists() else []


def save(jobs: list[dict[str, Any]]) -> None:
    (PLACE / "jobs.json").write_text(json.dumps(jobs))


def sbatch(words: list[str]) -> None:
    jobs = load()
    number = 1 + max((int(job["id"].partition("_")[0]) for job in jobs), default=10)
    count = int(given(words, "array").partition("-")[2] or 0)
    ids = [f"{number}_{n + 1}" for n in range(count)] if count else [str(number)]
    about = {"elapsed": "0:00", "left": "4:00:00", "reason": "Priority", "node": ""}
    jobs += [{"id": i, "state": "PENDING", **about, "command": words[-1]} for i in ids]
    save(jobs)
    cluster = PLACE / "cluster"
    print(number, end=f";{cluster.read_text()}\n" if cluster.exists() else "\n")


def squeue(words: list[str]) -> None:
    for job in load():
        if given(words, "Format"):
            print(f"{job['id']:<64}{job.get('restarts', 0):<16}")
        elif not job.get("forgotten"):
            print("|".join(job[name] for name in SHOWN))


def scancel(words: list[str]) -> None:
    ids = [word for word in words if not word.startswith("-")]
    jobs = load()
    for job in jobs:
        if job["id"] in ids or job["id"].partition("_")[0] in ids:
            # A script that was only told ends by itself, here at once.
            job["state"] = "FAILED" if given(words, "signal") else "CANCELLED"
            job["reason"] = "None"
    save(jobs)


def sacct(words: list[str]) -> None:
    for job in load():
        if job["id"].partition("_")[0] in given(words, "jobs").split(","):
            print("|".join((job["id"], f"{job['state']} by 0", "0:10", "3:0", job["node"])))
            print("|".join((f"{job['id']}.batch", "COMPLETED", "0:10", "0:0", "n9")))


def main() -> int:
    name, words = Path(sys.argv[0]).name, sys.argv[1:]
    with (PLACE / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps([name, *words]) + "\n")
    refusal = PLACE / f"{name}.refuses"
    if refusal.exists():
        print(refusal.read_text(), file=sys.stderr)
        return 1
    {"sbatch": sbatch, "squeue": squeue, "scancel": scancel, "sacct": sacct}[name](words)
    return 0


if __name__ == "__main__":
    sys.exit(main())
