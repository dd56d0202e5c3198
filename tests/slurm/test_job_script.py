"""slurm/server.sbatch beside commands that play Slurm's: what its job does when its server ends."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dispatcher.client import WorkClient
from dispatcher.server_file import read_server_file
from tests.support.kinds import save_data_set
from tests.support.processes import ROOT, Process, running, wait_until

SCRIPT = ROOT / "slurm" / "server.sbatch"
END_S = 60.0
FAILED = '{"__ERROR__": {"error": "no_answer"}}'


@dataclass
class Jobs:
    """Runs the server's script as the job of a run of 20 lines, as Slurm would."""

    directory: Path

    @property
    def state_dir(self) -> Path:
        return self.directory / "out.dispatch"

    @property
    def requeued(self) -> list[str]:
        """What was asked of scontrol."""
        asked = self.directory / "asked"
        return asked.read_text().splitlines() if asked.exists() else []

    def env(
        self, job: int = 7, restarts: int = 0, server_args: str = "", **settings: str
    ) -> dict[str, str]:
        """What a job's script finds in its environment."""
        return {
            "PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}",
            "VENV": sys.prefix,
            "DISPATCHER_SLURM_DIR": str(SCRIPT.parent),
            "SLURM_JOB_ID": str(job),
            "SLURM_RESTART_COUNT": str(restarts),
            "INPUT": str(self.directory / "in"),
            "OUTPUT": str(self.directory / "out"),
            "SERVER_ARGS": f"--host 127.0.0.1 {server_args}",
            **settings,
        }

    @contextmanager
    def serving(self, *of_job: Any, **settings: Any) -> Iterator[tuple[Process, WorkClient]]:
        """The script of a job, as `env` has it, once its server answers; and a client of that."""
        before = self._announced()
        env = self.env(*of_job, **settings)
        with running("bash", SCRIPT, env=env, cwd=self.directory) as script:
            try:
                wait_until(lambda: self._announced() != before, "server.json", END_S)
                with WorkClient(f"@{self.state_dir}", worker="w") as client:
                    wait_until(client.status, "an answer", END_S)
                    yield script, client
            finally:
                # Its server has a process group of its own.
                if not script.has_ended:
                    with suppress(OSError):
                        os.kill(read_server_file(self.state_dir).pid, signal.SIGKILL)

    def _announced(self) -> str:
        path = self.state_dir / "server.json"
        return path.read_text() if path.exists() else ""

    def tell(self, path: str, body: Any) -> str:
        """Make a call with the admin token; return the message."""
        address = read_server_file(self.state_dir).url.removeprefix("http://")
        token = (self.state_dir / "admin.token").read_text().strip()
        connection = http.client.HTTPConnection(address, timeout=10)
        headers = {"Authorization": f"Bearer {token}"}
        connection.request("POST", path, json.dumps(body), headers)
        reply = connection.getresponse()
        said = str(json.loads(reply.read())["message"])
        assert reply.status == 200, said
        return said


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    (tmp_path / "in").write_text('{"n": 1}\n' * 20)
    (tmp_path / "bin").mkdir()
    for name, does in (
        ("squeue", "echo RUNNING"),
        ("scontrol", f'echo "$*" >>{tmp_path / "asked"}'),
    ):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return Jobs(tmp_path)


def fail(client: WorkClient, count: int) -> None:
    items = client.get_work(count).items
    assert len(items) == count
    for item in items:
        item.set_result(FAILED)
    client.submit_results(items)


# --- its input ---------------------------------------------------------------------------------


def test_a_job_reads_the_part_of_a_data_set_that_its_settings_name(jobs: Jobs) -> None:
    parts = {split: [{"of": split}] * 3 for split in ("train", "test")}
    data = save_data_set(jobs.directory / "data", **parts)
    with jobs.serving(INPUT=str(data), INPUT_SPLIT="test") as (_, client):
        assert {item.content for item in client.get_work(5).items} == {'{"of":"test"}'}


@pytest.mark.parametrize("part", ["subset", "split"])
def test_a_part_of_what_is_no_data_set_is_refused_by_the_job(jobs: Jobs, part: str) -> None:
    env = jobs.env(**{f"INPUT_{part.upper()}": "x"})
    with running("bash", SCRIPT, env=env, cwd=jobs.directory) as script:
        assert script.wait(END_S) == 2
        assert f"--input-{part} goes with a data set" in script.output


# --- the end of the server ----------------------------------------------------------------------


def test_a_job_near_its_time_limit_has_itself_requeued(jobs: Jobs) -> None:
    with jobs.serving() as (script, _):
        script.stop()
        assert script.wait(END_S) == 3, script.output
    assert jobs.requeued == ["requeue 7"]


def test_a_server_that_somebody_else_stopped_has_its_job_requeued(jobs: Jobs) -> None:
    with jobs.serving() as (script, _):
        os.kill(read_server_file(jobs.state_dir).pid, signal.SIGTERM)
        assert script.wait(END_S) == 3, script.output
    assert jobs.requeued == ["requeue 7"]


def test_a_drained_server_ends_its_job_for_good(jobs: Jobs) -> None:
    with jobs.serving() as (script, _):
        jobs.tell("/drain", {})
        assert script.wait(END_S) == 3, script.output
        assert "the server was drained; sbatch the same again to go on" in script.output
    assert jobs.requeued == []
    # Submitted again, it goes on, and is requeued like any other.
    with jobs.serving(8) as (script, client):
        assert client.status()["state"] == "running"
        script.stop()
        assert script.wait(END_S) == 3, script.output
    assert jobs.requeued == ["requeue 8"]


def test_a_job_that_is_told_to_end_while_its_server_drains_is_not_requeued(jobs: Jobs) -> None:
    with jobs.serving() as (script, client):
        (item,) = client.get_work(1).items  # for which the server waits
        jobs.tell("/drain", {})
        script.stop()
        script.wait_for_line(re.compile("asked to end"))
        item.set_result(FAILED)
        assert client.submit_results([item]).count == 1
        assert script.wait(END_S) == 3, script.output
    assert jobs.requeued == []


# --- what is said once --------------------------------------------------------------------------

ACCEPTING = "--max-failures 2 --accept-failures --unpause"


def test_failures_that_a_job_was_told_to_accept_are_accepted_once_however_often_it_starts(
    jobs: Jobs,
) -> None:
    with jobs.serving(7, 0, "--max-failures 2") as (script, client):
        fail(client, 3)
        assert client.status()["state"] == "paused"
        script.stop()
        script.wait(END_S)
    with jobs.serving(8, 0, ACCEPTING) as (script, client):
        assert client.status()["state"] == "running"
        fail(client, 3)
        script.stop()
        script.wait(END_S)
    with jobs.serving(8, 1, ACCEPTING) as (script, client):
        assert client.status()["state"] == "paused"
        assert "Slurm job 8 was heard before: --accept-failures" in script.output
        # Nor when the server of the job dies and the script starts it again.
        first = read_server_file(jobs.state_dir).pid
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: read_server_file(jobs.state_dir).pid != first, "another server", END_S)
        wait_until(client.status, "an answer", END_S)
        assert client.status()["state"] == "paused"
        script.stop()
        script.wait(END_S)
    with jobs.serving(9, 0, ACCEPTING) as (_, client):  # somebody submitted it anew
        assert client.status()["state"] == "running"


def test_a_pause_is_not_lifted_by_a_job_that_is_started_again(jobs: Jobs) -> None:
    with jobs.serving(7, 0, "--unpause") as (script, client):
        jobs.tell("/pause", {"paused": True, "reason": "a look"})
        script.stop()
        assert script.wait(END_S) == 3
    assert jobs.requeued == ["requeue 7"]  # where it waits, and answers
    with jobs.serving(7, 1, "--unpause") as (_, client):
        assert client.status()["state"] == "paused"
        assert client.get_work(1).items == []
        assert jobs.tell("/pause", {"paused": False}) == "the run goes on"
        assert len(client.get_work(1).items) == 1
