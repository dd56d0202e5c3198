"""`dispatcher slurm` on a real Slurm: a run is started, watched, grown, shrunk, stopped, ended."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, Job
from tests.slurm.runs import SlurmRun, kinds_of
from tests.slurm.test_render import NASTY
from tests.support.processes import ROOT, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

FLAGS = {
    "TASK": "--task",
    "INPUT": "--infile",
    "OUTPUT": "--outfile",
    "BACKEND": "--backend",
    "WORKERS": "--workers",
    "BATCH_SIZE": "--batch-size",
    "WORKER_ARGS": "--worker-args",
    "SERVER_ARGS": "--server-args",
}


class Commands:
    """`dispatcher slurm` for one run, called from its directory, or from another one."""

    def __init__(self, cluster: Cluster, run: SlurmRun) -> None:
        self.cluster = cluster
        self.run = run
        self.settings = [f"{flag}={run.settings[name]}" for name, flag in FLAGS.items()]
        self.settings += ["--env=WORKER_PAUSE_S=1", "--time=30"]

    def __call__(self, *words: str, cwd: Path | None = None) -> str:
        return self.cluster.run(
            *(sys.executable, "-m", "dispatcher.cli", "slurm", *words),
            env={"PYTHONPATH": str(ROOT)},
            cwd=cwd or self.run.directory,
        )

    def rows(self) -> list[list[str]]:
        """Return the jobs that `status` shows: id, role, state and what follows."""
        _, heading, table = self("status", "out.jsonl").partition("JOB  ")
        assert heading
        lines = table.split("\n\n")[0].splitlines()[1:]
        return [line.split() for line in lines]

    def until_running(self, role: str, count: int) -> None:
        def running() -> bool:
            return sum(row[1:3] == [role, "RUNNING"] for row in self.rows()) == count

        wait_until(running, f"{count} running jobs: {role}", 60)

    def job(self, role: str) -> Job:
        """Return the last job of a role."""
        ids = [row[0].partition("_")[0] for row in self.rows() if row[1] == role]
        return Job(self.cluster, max(ids, key=int), self.run.directory)


def test_a_run_is_started_watched_grown_shrunk_stopped_and_gone_on_with(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = SlurmRun(tmp_path / "my-$run", 3000, latency_s=0.4)
    slurm = Commands(cluster, run)
    odd = [f"--sbatch-arg=--comment={NASTY}"]
    said = slurm("start", *slurm.settings, *odd, "--worker-jobs", "2")
    assert said.startswith("submitted job ")
    slurm.until_running("server", 1)
    slurm.until_running("workers", 2)
    server, workers = slurm.job("server"), slurm.job("workers")
    about = cluster.run("scontrol", "show", "job", f"{workers.id}_1").splitlines()
    shown = [line.strip() for line in about]
    assert f"Comment={NASTY}" in shown
    assert f"WorkDir={run.directory}" in shown
    run.until_done(100)
    status = slurm("status", "out.jsonl")
    assert "state     running, process" in status
    assert re.search(r"  done      [1-9]\d* of (about )?\d+ lines", status)
    with pytest.raises(AssertionError, match=f"has job {server.id} .server., which is RUNNING"):
        slurm("start", *slurm.settings)

    slurm("add-workers", str(run.outfile), "2", cwd=tmp_path)
    slurm.until_running("workers", 4)
    youngest = f"{slurm.job('workers').id}_2"
    slurm("add-workers", "out.jsonl", "1", "--sbatch-arg=--hold")
    held = slurm.job("workers").id
    said = slurm("remove-workers", "out.jsonl", "2")
    assert f"cancelled before they ran: {held}_1" in said
    assert f"giving back what they have begun: {youngest}" in said
    slurm.until_running("workers", 3)
    assert Job(cluster, youngest, run.directory).wait_for("CANCELLED", "COMPLETING")

    run.until_done(300)
    said = slurm("stop", "out.jsonl")
    run.note_recorded("the stop")
    assert len(run.noted[0].recorded.done) < run.line_count
    assert not cluster.run("squeue", "--noheader")
    assert server.state == "FAILED"  # by its own exit code
    assert server.exit_code == 3
    assert server.restarts == 0
    assert "state     stopped" in said
    assert f"go on with: dispatcher slurm start --resume '{run.state_dir}'" in said
    assert "no job of the run is waiting or running" in slurm("status", "out.jsonl")
    assert all(kinds_of(past) <= {"released", "returned"} for past in run.history())

    slurm("start", "--resume", str(run.state_dir), "--worker-jobs", "4", cwd=tmp_path)
    assert slurm.job("server").wait() == 0
    run.check()
    assert run.kept() > 0
    said = slurm("start", "--resume", str(run.state_dir), cwd=tmp_path)
    assert "is complete" in said
    assert "state     complete" in slurm("status", "out.jsonl")


def test_a_run_in_one_job_is_stopped_and_gone_on_with(cluster: Cluster, tmp_path: Path) -> None:
    run = SlurmRun(tmp_path / "run", 800)
    slurm = Commands(cluster, run)
    slurm("run", *slurm.settings, "--nodes", "3")
    run.until_done(100)
    job = slurm.job("run")
    slurm("stop", "out.jsonl")
    assert (job.exit_code, job.restarts) == (3, 0), job.log
    assert job.log.count("what was not finished was given back") == 3
    slurm("run", "--resume", "out.jsonl.dispatch")
    again = slurm.job("run")
    assert again.wait() == 0, again.log
    run.check()


def test_a_requeued_job_is_still_the_runs_and_its_restarts_are_shown(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = SlurmRun(tmp_path / "run", 600)
    slurm = Commands(cluster, run)
    slurm("start", *slurm.settings)
    run.until_done(50)
    server = slurm.job("server")
    cluster.run("scontrol", "requeue", server.id)
    server.wait_for("PENDING")
    (row,) = (row for row in slurm.rows() if row[1] == "server")
    assert row == [server.id, "server", "PENDING", "1", "BeginTime"]
    assert server.wait() == 0
    run.check()


def test_what_slurm_refuses_is_told_in_its_words(cluster: Cluster, tmp_path: Path) -> None:
    run = SlurmRun(tmp_path / "run", 10)
    slurm = Commands(cluster, run)
    with pytest.raises(AssertionError, match="invalid partition specified: nowhere"):
        slurm("start", *slurm.settings, "--partition", "nowhere", "--server-partition", "main")
    wait_until(lambda: not cluster.run("squeue", "--noheader"), "no job", 30)
