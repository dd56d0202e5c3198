"""Imports run one way; server and task manager do not know each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dispatcher"

# The first prefix that fits gives a module its floor; a module imports from its own floor or
# lower ones only.
FLOORS = [
    ("dispatcher.models", 0),
    ("dispatcher.errors", 0),
    ("dispatcher.taskmanager.backend.request", 0),
    ("dispatcher.help_text", 0),
    ("dispatcher.input_options", 1),
    ("dispatcher.run_paths", 1),
    ("dispatcher.fakellm", 0),
    ("dispatcher.core", 1),
    ("dispatcher.config", 1),
    ("dispatcher.storage", 2),
    ("dispatcher.client", 2),
    ("dispatcher.server_file", 2),
    ("dispatcher.run_facts", 1),
    ("dispatcher.logs", 1),
    ("dispatcher.progress", 2),
    ("dispatcher.run_command", 2),
    ("dispatcher.taskmanager.task", 2),
    ("dispatcher.taskmanager.backend", 2),
    ("dispatcher.remedies", 1),
    ("dispatcher.acknowledging", 2),
    ("dispatcher.alarms", 2),
    ("dispatcher.error_lines", 2),
    ("dispatcher.line_feed", 2),
    ("dispatcher.spool_intake", 2),
    ("dispatcher.service", 3),
    ("dispatcher.steering", 3),
    ("dispatcher.runs.cli", 5),
    ("dispatcher.runs", 3),
    ("dispatcher.export.cli", 5),
    ("dispatcher.export", 3),
    ("dispatcher.slurm.cli", 5),
    ("dispatcher.slurm", 3),
    ("dispatcher.server.cli", 5),
    ("dispatcher.server.__main__", 5),
    ("dispatcher.server", 4),
    ("dispatcher.taskmanager.cli", 5),
    ("dispatcher.taskmanager", 4),
    ("dispatcher.preview", 5),
    ("dispatcher.doctor", 6),
    ("dispatcher.child", 6),
    ("dispatcher.pause_notes", 6),
    ("dispatcher.launch", 6),
    ("dispatcher.watch", 6),
    ("dispatcher.orders", 6),
    ("dispatcher.cli", 6),
]


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports_of(path: Path) -> set[str]:
    """Return the project's modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name for name in names if name.split(".")[0] == "dispatcher"} - {"dispatcher"}


def is_in(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def floor_of(module: str) -> int:
    return next(floor for prefix, floor in FLOORS if is_in(module, prefix))


MODULES = modules()


@pytest.mark.parametrize("module", [name for name in MODULES if name != "dispatcher"])
def test_a_module_imports_from_its_own_floor_or_below(module: str) -> None:
    above = {name for name in imports_of(MODULES[module]) if floor_of(name) > floor_of(module)}
    assert not above


def test_server_and_task_manager_do_not_import_each_other() -> None:
    for module, path in MODULES.items():
        for one, other in (("server", "taskmanager"), ("taskmanager", "server")):
            if is_in(module, f"dispatcher.{one}"):
                crossing = {n for n in imports_of(path) if is_in(n, f"dispatcher.{other}")}
                assert not crossing, module


def test_the_core_has_no_io_no_clock_and_no_asyncio() -> None:
    forbidden = {"asyncio", "time", "os", "pathlib", "socket", "threading", "datetime", "logging"}
    for module, path in MODULES.items():
        if is_in(module, "dispatcher.core"):
            tree = ast.parse(path.read_text())
            used = {
                name.name.split(".")[0]
                for node in ast.walk(tree)
                if isinstance(node, ast.Import)
                for name in node.names
            } | {
                (node.module or "").split(".")[0]
                for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom)
            }
            assert not used & forbidden, module
