"""What `--resume` goes on with before a run has begun: what its owner was started with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dispatcher.config import RunSettings
from dispatcher.errors import StartStoppedError
from dispatcher.run_command import note_start
from dispatcher.storage.files import Files
from dispatcher.storage.inputs.reader import CopyStop
from dispatcher.storage.opening import open_run
from dispatcher.storage.ownership import Ownership
from dispatcher.storage.run_state import load_run_file


def settings_for(directory: Path, name: str) -> RunSettings:
    command = {"program": "dispatcher run", "options": {"input": name}}
    state_dir = directory / "state"
    return RunSettings(directory / name, directory / "out.jsonl", state_dir, command=command)


def noted(directory: Path) -> Any:
    run_file = load_run_file(directory / "state", Files())
    assert run_file is not None
    assert run_file["state"] == "starting"
    return run_file["command"]["options"]["input"]


def test_a_start_that_will_be_refused_leaves_what_the_owner_was_started_with(
    tmp_path: Path,
) -> None:
    note_start(settings_for(tmp_path, "first.jsonl"))
    owner = Ownership(tmp_path / "state", Files())
    assert owner.try_take(0) == 0
    note_start(settings_for(tmp_path, "second.jsonl"))
    assert noted(tmp_path) == "first.jsonl"
    owner.release()
    note_start(settings_for(tmp_path, "second.jsonl"))
    assert noted(tmp_path) == "second.jsonl"


def test_of_two_starts_before_anybody_owns_the_run_its_owner_is_gone_on_with(
    tmp_path: Path,
) -> None:
    first = settings_for(tmp_path, "first.fifo")
    os.mkfifo(first.infile)
    note_start(first)
    note_start(settings_for(tmp_path, "second.jsonl"))
    assert noted(tmp_path) == "second.jsonl"
    stop = CopyStop()
    stop.set()
    with pytest.raises(StartStoppedError):  # while it copies
        open_run(first, Files(), 1, 0.0, stop=stop)
    assert noted(tmp_path) == "first.fifo"
