"""Every task in docs/tasks.md runs as printed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.processes import ROOT, run_python

GUIDE = (ROOT / "docs" / "tasks.md").read_text()
TASKS = [part.split("```", 1)[0] for part in GUIDE.split("```python\n")[1:]]
LINES = 12


@pytest.mark.slow
@pytest.mark.parametrize("code", TASKS, ids=lambda code: re.findall(r"class (\w+)", code)[0])
def test_a_task_of_the_guide_answers_every_line(code: str, tmp_path: Path) -> None:
    task, infile, outfile = (tmp_path / name for name in ("task.py", "in.jsonl", "out.jsonl"))
    task.write_text(code)
    lines = [json.dumps({"id": n, "text": f"text {n}"}) + "\n" for n in range(LINES)]
    infile.write_text("".join(lines))
    (name,) = re.findall(r"^class (\w+)", code, re.MULTILINE)
    files = ("--input", infile, "--output", outfile)
    command = ("-m", "dispatcher.cli", "run", "--task", f"{task}:{name}", *files)
    returned, said = run_python(*command, "--backend", "fake", deadline_s=60)

    assert returned == 0, said
    answers = [json.loads(line) for line in outfile.read_text().splitlines()]
    assert [answer.get("id", answer.get("number")) for answer in answers] == list(range(LINES))


def test_the_guide_shows_tasks() -> None:
    assert len(TASKS) >= 5
