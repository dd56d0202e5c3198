"""A model server that somebody else runs goes away and comes back; one request always fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.outage import measure


@pytest.mark.slow
def test_while_the_model_server_is_away_nothing_is_charged_and_nothing_fails(
    tmp_path: Path,
) -> None:
    outcome = measure(tmp_path, items=1500, away_s=12)

    assert len(outcome.lines) == 1500
    assert outcome.errors == [7]  # always answered 500, while all others were not
    assert "HTTP 500" in str(outcome.lines[7])
    assert (outcome.charged, outcome.crashed, outcome.exit_code) == (0, 0, 0)
    for number, line in enumerate(outcome.lines):
        assert f"question {number}" in str(line) or number == 7
