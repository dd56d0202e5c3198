"""Whole runs in virtual time, a thousand of them, each with the faults that its seed draws.

A failure names the seeds; `python -m tests.faults.simulation SEED --trace` repeats one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.simulation import SERVER_FAULTS, WORKER_FAULTS, Verdict, run_seed

FIRST_SEED = int(os.environ.get("DISPATCHER_TEST_SEED", "1"))
BLOCKS = 4
SEEDS_IN_BLOCK = 250
QUICK_SEEDS = 20


def run_seeds(first: int, count: int) -> Counter[str]:
    """Run so many seeds; return the counts of all, or fail with what is wrong."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for seed in range(first, first + count):
        verdict = run_seed(seed)
        counts += verdict.counts
        if verdict.problems:
            wrong.append(f"seed {seed}: {'; '.join(verdict.problems[:3])}")
    print(f"{count} seeds from {first} on, {len(wrong)} with problems")
    print(", ".join(f"{kind}: {number}" for kind, number in sorted(counts.items())))
    repeat = "repeat one with: python -m tests.faults.simulation SEED --trace"
    assert not wrong, "\n".join([*wrong, repeat])
    return counts


def test_a_few_seeds_keep_every_promise() -> None:
    counts = run_seeds(FIRST_SEED, QUICK_SEEDS)
    assert counts["accepted"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("block", range(BLOCKS))
def test_a_thousand_seeds_keep_every_promise(block: int) -> None:
    # when
    counts = run_seeds(FIRST_SEED + block * SEEDS_IN_BLOCK, SEEDS_IN_BLOCK)

    # then every kind of fault was among them
    assert [kind for kind in (*SERVER_FAULTS, *WORKER_FAULTS) if not counts[kind]] == []
    assert counts["renewals told again"] > 0
    assert counts["pauses by an operator"] > 0


def trace_of(verdict: Verdict) -> tuple[str, float]:
    return verdict.digest, verdict.virtual_s


def test_a_seed_does_the_same_again_in_another_process() -> None:
    # given
    seeds = range(FIRST_SEED, FIRST_SEED + 5)
    here = [trace_of(run_seed(seed)) for seed in seeds]
    script = (
        "from tests.faults.simulation import run_seed\n"
        f"print([(v.digest, v.virtual_s) for v in map(run_seed, {list(seeds)})])"
    )

    # when
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    # then
    assert done.stdout.strip() == str(here)
