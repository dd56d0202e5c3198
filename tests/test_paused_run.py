"""A run with too many failed lines, as its user meets it: stopped, explained, gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import run_python

FICKLE = "tests/support/fickle_tasks.py:FickleTask"
LINES = 400
MENDED = {"FICKLE_IS_MENDED": "1"}
PROGRAMS = {
    "dispatcher run": ["-m", "dispatcher.cli", "run"],
    "dispatcher-task-run": ["-m", "dispatcher.taskmanager.cli"],
}


def arguments(directory: Path) -> list[str]:
    lines = [{"q": n, "how": "fail" if n % 2 else "fine"} for n in range(LINES)]
    (directory / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["--task", FICKLE, "--input", str(directory / "in"), "--output", str(directory / "out")]
    return [*given, "--backend", "fake", "--workers", "4", "--batch-size", "4"]


def results(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "out").read_text().splitlines()]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_run_that_pauses_ends_resumable_and_goes_on_when_its_failures_are_accepted(
    program: str, tmp_path: Path
) -> None:
    command, state = PROGRAMS[program], str(tmp_path / "out.dispatch")
    code, output = run_python(*command, *arguments(tmp_path), "--max-failures", "10", deadline_s=90)
    assert code == 3, output
    said = output.splitlines()[-1]
    assert said.startswith(f"{program}: paused, as ")
    assert "more than --max-failures 10 allows; most often no_good" in said
    assert state in said
    assert "--accept-failures" in said
    done = len(results(tmp_path))
    assert done < LINES

    # Nobody mended or accepted anything: it says the same, at once, and before a model is started.
    code, output = run_python(*command, "--resume", state, env=MENDED, deadline_s=90)
    assert code == 3, output
    assert "paused, as " in output.splitlines()[-1]

    code, output = run_python(
        *command, "--resume", state, "--accept-failures", env=MENDED, deadline_s=90
    )
    assert code in (0, 4), output
    found = results(tmp_path)
    assert len(found) == LINES
    failed = [n for n, result in enumerate(found) if "__ERROR__" in result]
    assert 10 < len(failed) < 80
    assert all(n % 2 for n in failed)
    assert all(found[n]["q"] == n for n in range(LINES) if n not in failed)


def test_a_share_pauses_too_and_a_higher_one_lets_it_go_on(tmp_path: Path) -> None:
    command = PROGRAMS["dispatcher run"]
    given = arguments(tmp_path)
    code, output = run_python(*command, *given, "--max-failures", "20%", deadline_s=90)
    assert code == 3, output
    assert "%), more than --max-failures 20% allows" in output.splitlines()[-1]
    code, output = run_python(*command, *given, "--max-failures", "60%", deadline_s=90)
    assert code == 4, output
    assert len(results(tmp_path)) == LINES


def test_a_limit_stands_in_a_file_of_options_as_well(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("max_failures: 5\n")
    code, output = run_python(
        *PROGRAMS["dispatcher run"], *arguments(tmp_path), "--config", config, deadline_s=90
    )
    assert code == 3, output
    assert "--max-failures 5 allows" in output


@pytest.mark.parametrize("word", ["lots", "-1", "0.05", "101%"])
def test_what_is_no_limit_is_refused(word: str, tmp_path: Path) -> None:
    code, output = run_python(
        *PROGRAMS["dispatcher run"], *arguments(tmp_path), f"--max-failures={word}"
    )
    assert code == 2
    assert len(output.splitlines()) == 1
    assert word in output
    assert "as 200, nor a share, as 5%" in output
