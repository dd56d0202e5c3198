"""A run of three steps a line on the fake backend, and what must hold of it in the end."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from dispatcher.client import WorkClient
from tests.faults.oracle import input_line
from tests.faults.test_step_replay import Kill, needlessly_asked, read_calls, read_recorded
from tests.slurm.three_step_task import STEPS
from tests.support.processes import ROOT, wait_until

TASK = f"{ROOT}/tests/slurm/three_step_task.py:ThreeStepTask"
DEADLINE_S = 120.0


@dataclass
class SlurmRun:
    """The files of one run, what its jobs are told, and what its journal held now and then."""

    directory: Path
    line_count: int
    latency_s: float = 0.15
    noted: list[Kill] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.directory.mkdir(exist_ok=True)
        lines = (input_line(number) + "\n" for number in range(self.line_count))
        self.infile.write_text("".join(lines))

    @property
    def infile(self) -> Path:
        return self.directory / "in.jsonl"

    @property
    def outfile(self) -> Path:
        return self.directory / "out.jsonl"

    @property
    def state_dir(self) -> Path:
        return self.directory / "out.jsonl.dispatch"

    @property
    def call_log(self) -> Path:
        return self.directory / "calls.jsonl"

    @property
    def settings(self) -> dict[str, str]:
        """Return the settings of the scripts."""
        fakellm = f"--latency-s {self.latency_s} --call-log {self.call_log}"
        return {
            "TASK": TASK,
            # From where sbatch is called, as most people name their files.
            "INPUT": self.infile.name,
            "OUTPUT": self.outfile.name,
            "BACKEND": "fake",
            "WORKERS": "32",
            "BATCH_SIZE": "8",
            "WORKER_ARGS": f"--fakellm-args='{fakellm}'",
            # A copy of a line near the end may ask what another one is about to record.
            "SERVER_ARGS": "--backup-tasks off --lease-term 10",
            "WORKER_PAUSE_S": "1",
        }

    # ---------------------------------------------------------------- while it runs

    @cached_property
    def _client(self) -> WorkClient:
        return WorkClient(f"@{self.state_dir}/server.json")

    def done(self) -> int:
        """Return how many lines have their result."""
        return int(self._client.status().get("done", 0))

    def until_done(self, count: int) -> None:
        """Return once so many lines have their result."""
        wait_until(lambda: self.done() >= count, f"{count} lines done", DEADLINE_S)

    def note_recorded(self, what: str) -> None:
        """Note which steps the journal holds now."""
        recorded = read_recorded(self)  # type: ignore[arg-type]
        self.noted.append(Kill(what, time.time(), time.time(), recorded))

    # ---------------------------------------------------------------- in the end

    def check(self, reference: bytes | None = None) -> dict[str, Any]:
        """Judge the whole run; return the summary in its run.yaml."""
        output = self.outfile.read_bytes()
        results = [json.loads(line) for line in output.decode().splitlines()]
        assert [result.get("id") for result in results] == list(range(self.line_count))
        assert {len(result["answers"]) for result in results} == {STEPS}
        assert reference is None or output == reference
        run_file = yaml.safe_load((self.state_dir / "run.yaml").read_text())
        assert run_file["state"] == "complete"
        charged = [past for past in self.history() if "charged" in kinds_of(past)]
        assert charged == [], "an item's retry_count grew"
        assert run_file["summary"]["charged"] == 0
        assert run_file["summary"]["failed"] == 0
        calls = read_calls(self.call_log)
        assert len({call.key for call in calls}) == STEPS * self.line_count
        for noted in self.noted:
            again = needlessly_asked(calls, noted)
            assert again == [], f"recorded, and asked again after {noted.what}: {again[:5]}"
        return dict(run_file["summary"])

    def history(self) -> list[dict[str, Any]]:
        """Return what the lines went through that needed more than one attempt."""
        path = self.state_dir / "history.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines()]

    def kept(self) -> int:
        """Return how many steps of open lines were recorded whenever that was noted."""
        return sum(len(noted.recorded.steps) for noted in self.noted)

    def repeated(self) -> int:
        """Return how many requests were made more than once."""
        return len(read_calls(self.call_log)) - STEPS * self.line_count


def kinds_of(past: dict[str, Any]) -> set[str]:
    """Return how the attempts of a line ended that failed."""
    return {attempt["kind"] for attempt in past["attempts"]}
