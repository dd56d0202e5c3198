"""docs/reference.md says what the code says, of every command and with every default."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from dispatcher.cli import COMMANDS
from scripts.make_reference import REFERENCE, parsers, reference
from tests.support.processes import ROOT

PARSERS: Mapping[str, argparse.ArgumentParser] = parsers()


def test_the_reference_is_what_the_code_says() -> None:
    remedy = "run: python scripts/make_reference.py"
    assert REFERENCE.read_text() == reference(), remedy


def test_the_reference_is_made_from_any_directory(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "make_reference.py"), "--check"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_command_is_in_the_reference() -> None:
    named = {name.split()[1] for name in PARSERS if name.startswith("dispatcher ")}
    assert named == set(COMMANDS)


@pytest.mark.parametrize("name", PARSERS)
def test_every_option_says_what_it_is_and_its_default(name: str) -> None:
    formatter = PARSERS[name]._get_formatter()
    for action in PARSERS[name]._actions:
        if action.option_strings and not action.required and action.dest != "help":
            told = formatter._expand_help(action)
            assert "(default" in told, f"{action.option_strings[0]} does not tell its default"
            assert not told.startswith("(default"), f"{action.option_strings[0]} says nothing"


@pytest.mark.parametrize("name", PARSERS)
def test_every_help_has_an_example(name: str) -> None:
    assert f"\n  {PARSERS[name].prog} " in (PARSERS[name].epilog or "")
