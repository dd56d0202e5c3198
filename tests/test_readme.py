"""What README promises: one command each, a task that works as printed, links that lead."""

from __future__ import annotations

import re
from typing import Any

import pytest

from dispatcher.models import WorkItem
from dispatcher.taskmanager.backend.request import Response
from tests.support.processes import ROOT

README = (ROOT / "README.md").read_text()


def first_block(heading: str) -> list[str]:
    """Return the lines of the first fenced block under a heading."""
    section = README.split(f"\n## {heading}\n", 1)[1]
    return section.split("```", 2)[1].splitlines()[1:]


@pytest.mark.parametrize(
    ("heading", "command"),
    [("Quick start", "bash scripts/quickstart.sh"), ("Tests", "bash scripts/test.sh")],
)
def test_the_first_block_of_a_section_is_one_command_that_exists(
    heading: str, command: str
) -> None:
    assert first_block(heading) == [command]
    assert (ROOT / command.split()[1]).is_file()


def test_continuous_integration_calls_the_test_command_of_the_readme() -> None:
    (command,) = first_block("Tests")
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_task_in_the_readme_works_as_printed() -> None:
    code = README.split("```python\n", 1)[1].split("```", 1)[0]
    scope: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), scope)
    data = {"messages": [{"role": "user", "content": "hello"}], "id": 7}
    task = scope["ChatTask"](data, WorkItem(0, ""))

    request = task.get_next_request()
    assert request.content["messages"] == data["messages"]
    task.process_result(Response(request, {"choices": [{"message": {"content": "hi"}}]}))

    assert task.is_done()
    assert task.get_result()[0] == {**data, "response": "hi"}


def test_every_file_the_readme_names_exists() -> None:
    named = set(re.findall(r"\]\(([\w./-]+)\)", README))
    named |= set(re.findall(r"\b(?:examples|scripts)/[\w/]+\.\w+", README))
    assert len(named) >= 5
    assert [name for name in named if not (ROOT / name).exists()] == []
