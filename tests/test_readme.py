"""What README promises: one command each, a task that works as printed, links that lead."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from dispatcher.config import Parser, parse
from dispatcher.models import WorkItem
from dispatcher.taskmanager.backend.options import add_backend_options
from dispatcher.taskmanager.backend.reading import backends_of
from dispatcher.taskmanager.backend.request import Response
from dispatcher.taskmanager.backend.settings import Concurrency, Generation, LoadMonitoring
from tests.support.processes import ROOT, run_python

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


def test_the_sections_in_the_readme_can_be_used_as_printed(tmp_path: Path) -> None:
    blocks = [part.split("```", 1)[0] for part in README.split("```yaml\n")[1:]]
    assert len(blocks) == 2
    for number, flags in enumerate([[], ["--backend", "cerebras"]]):
        config = tmp_path / "config.yaml"
        config.write_text(blocks[number])
        parser = Parser()
        parser.add_argument("--config", type=Path)
        add_backend_options(parser)
        backends = backends_of(parse(parser, ["--config", str(config), *flags]), {})
        assert len(backends.by_name) == 2


def test_the_defaults_in_the_readme_are_those_of_the_settings() -> None:
    block = yaml.safe_load(README.split("```yaml\n")[2].split("```", 1)[0])
    for section, kind in (("concurrency", Concurrency), ("load_monitoring", LoadMonitoring)):
        assert block[section] == msgspec.structs.asdict(kind())
    assert set(block["generation"]) == set(Generation.__struct_fields__)


def commands_in(heading: str) -> list[list[str]]:
    """Return the commands of a section's indented blocks, each as its words."""
    section = README.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    text = section.replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith("    dispatcher")]


def test_the_commands_before_a_run_do_what_the_readme_says(tmp_path: Path) -> None:
    commands = commands_in("Before a run")
    assert [command[1] for command in commands] == ["doctor", "run", "run"]
    for _, *words in commands:
        moved = [str(tmp_path / word) if word == "checked.jsonl" else word for word in words]
        code, output = run_python("-m", "dispatcher.cli", *moved, deadline_s=90)
        assert code == 0, output
    assert len((tmp_path / "checked.jsonl").read_text().splitlines()) == 100


def test_every_file_the_readme_names_exists() -> None:
    named = set(re.findall(r"\]\(([\w./-]+)\)", README))
    named |= set(re.findall(r"\b(?:examples|scripts)/[\w/]+\.\w+", README))
    assert len(named) >= 5
    assert [name for name in named if not (ROOT / name).exists()] == []
