"""Whole runs in virtual time in which every line is a task of several recorded steps.

The thousand seeds of test_simulation.py have such lines among others, and the same judge.
"""

from __future__ import annotations

import pytest

from tests.faults import sim_steps
from tests.faults.test_simulation import FIRST_SEED, run_seeds

FEW = 10
MANY = 100


def run_full_of_steps(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(sim_steps, "EVERY", 1)

    counts = run_seeds(FIRST_SEED, count)

    assert counts["step accepted"] > 100 * count
    assert counts["steps replayed"] > 2 * count


def test_no_step_that_was_acknowledged_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    run_full_of_steps(monkeypatch, FEW)


@pytest.mark.slow
def test_no_step_that_was_acknowledged_is_asked_again_in_many_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_full_of_steps(monkeypatch, MANY)
