"""Every test of the service has a run of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from dispatcher import service as service_module
from dispatcher.config import RunSettings
from dispatcher.core.work_queue import QueuePolicy


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    return RunSettings(
        infile=tmp_path / "in.jsonl",
        outfile=tmp_path / "out.jsonl",
        state_dir=tmp_path / "out.jsonl.dispatch",
        policy=QueuePolicy(max_retries=1),
        retry_s=7.0,
    )


@pytest.fixture(autouse=True)
def no_pause_after_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "_FULL_PAUSE_S", 0.0)
