"""`sbatch slurm/run.sbatch` on four nodes: undisturbed, killed, requeued, preempted, stopped."""

from __future__ import annotations

import http.client
import json
import os
import signal
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from dispatcher.client import WorkClient
from dispatcher.server_file import read_server_file
from tests.slurm.cluster import Cluster, Job
from tests.slurm.runs import SlurmRun
from tests.support.processes import wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

LINES = 5000
ON_FOUR_NODES = ("--nodes=4", "--exclusive")


def submit(cluster: Cluster, run: SlurmRun, *options: str, **settings: str) -> Job:
    run_settings = {**run.settings, **settings}
    return cluster.sbatch("run.sbatch", *ON_FOUR_NODES, *options, cwd=run.directory, **run_settings)


def workers_of(run: SlurmRun) -> set[str]:
    """Return the fake model servers that were asked: one for each start of a task manager."""
    lines = run.call_log.read_text().splitlines()
    return {json.loads(line)["server"] for line in lines if '"call"' in line}


@pytest.fixture(scope="module")
def undisturbed(
    whole_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SlurmRun, Job]:
    """Take one run to its end that nothing happens to."""
    run = SlurmRun(tmp_path_factory.mktemp("undisturbed"), LINES, latency_s=0.02)
    job = submit(whole_cluster, run)
    job.wait()
    return run, job


@pytest.fixture(scope="module")
def reference(undisturbed: tuple[SlurmRun, Job]) -> bytes:
    """Return the output of an undisturbed run."""
    return undisturbed[0].outfile.read_bytes()


def test_a_run_over_four_nodes_is_complete_and_in_order(
    undisturbed: tuple[SlurmRun, Job],
) -> None:
    run, job = undisturbed
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 0), job.log
    run.check()
    assert run.history() == []
    assert run.repeated() == 0
    assert len(workers_of(run)) == 4


def test_killed_tasks_are_started_again_and_nobody_pays(
    cluster: Cluster, tmp_path: Path, reference: bytes
) -> None:
    run = SlurmRun(tmp_path / "run", LINES)
    job = submit(cluster, run)
    run.until_done(500)
    os.kill(job.task_managers()[2], signal.SIGKILL)
    run.note_recorded("the kill of one task manager")
    job.wait_for_log("starting it again in 1 s (1 of 3)")

    run.until_done(1500)
    cluster.run("scancel", "--signal=KILL", f"{job.id}.0")
    job.wait_for_log("the task managers were killed (code 137); starting them again")
    run.note_recorded("the kill of the whole step")
    assert run.done() < LINES

    assert job.wait() == 0, job.log
    assert job.restarts == 0
    run.check(reference)
    assert run.kept() > 0
    assert len(workers_of(run)) >= 8


def test_a_requeued_run_goes_on_after_its_recorded_steps(
    cluster: Cluster, tmp_path: Path, reference: bytes
) -> None:
    run = SlurmRun(tmp_path / "run", LINES)
    job = submit(cluster, run)
    run.until_done(1500)
    cluster.run("scontrol", "requeue", job.id)
    job.wait_for("PENDING")
    wait_until(lambda: not cluster.processes(SLURM_JOB_ID=job.id), "the job's end", 60)
    run.note_recorded("the requeue")
    assert len(run.noted[0].recorded.done) < LINES

    assert job.wait() == 0, job.log
    assert job.restarts == 1
    run.check(reference)
    assert run.kept() > 0


def test_a_preempted_run_gives_its_items_back_and_has_itself_requeued(
    cluster: Cluster, tmp_path: Path, reference: bytes
) -> None:
    run = SlurmRun(tmp_path / "run", LINES)
    job = submit(cluster, run)
    run.until_done(1500)
    other = cluster.run(
        *("sbatch", "--parsable", "--partition=high", "--nodes=4", "--exclusive"),
        *("--output=/dev/null", "--wrap=sleep 3"),
    )
    job.wait_for("PENDING")
    wait_until(lambda: not cluster.processes(SLURM_JOB_ID=job.id), "the job's end", 60)
    run.note_recorded("the preemption")
    assert len(run.noted[0].recorded.done) < LINES
    # Nobody was killed: all of it ended within the grace period.
    assert job.log.count("what was not finished was given back") == 4
    assert "not complete; requeued, to go on where it was" in job.log

    assert job.wait() == 0, job.log
    assert job.restarts == 1
    assert Job(cluster, other, tmp_path).state == "COMPLETED"
    summary = run.check(reference)
    assert run.kept() > 0
    assert summary["released"] + summary["returned"] > 50
    assert run.history() == []


def test_a_run_near_its_time_limit_has_itself_requeued(cluster: Cluster, tmp_path: Path) -> None:
    run = SlurmRun(tmp_path / "run", 800)
    job = submit(cluster, run)
    run.until_done(100)
    # What Slurm does then, by --signal=B:TERM@120.
    cluster.run("scancel", "--batch", "--signal=TERM", job.id)
    job.wait_for("PENDING")
    assert job.log.count("what was not finished was given back") == 4
    assert job.wait() == 0, job.log
    assert job.restarts == 1
    run.check()


def test_a_run_that_is_stopped_for_good_is_gone_on_with_by_the_same_sbatch(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = SlurmRun(tmp_path / "run", 800)
    job = submit(cluster, run)
    run.until_done(100)
    cluster.run("scancel", "--batch", "--signal=INT", job.id)
    assert job.wait() == 3, job.log
    assert (job.state, job.restarts) == ("FAILED", 0)

    again = submit(cluster, run)
    assert again.wait() == 0, again.log
    run.check()


def told(run: SlurmRun, path: str, body: object) -> str:
    """Make a call with the run's admin token; return the message."""
    address = urlsplit(read_server_file(run.state_dir).url)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    assert address.hostname is not None
    link = http.client.HTTPSConnection(address.hostname, address.port, timeout=10, context=context)
    token = (run.state_dir / "admin.token").read_text().strip()
    link.request("POST", path, json.dumps(body), {"Authorization": f"Bearer {token}"})
    reply = link.getresponse()
    said = str(json.loads(reply.read())["message"])
    assert reply.status == 200, said
    return said


def test_a_drained_run_is_not_requeued_and_gone_on_with_by_the_same_sbatch(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = SlurmRun(tmp_path / "run", 800)
    job = submit(cluster, run)
    run.until_done(100)
    told(run, "/drain", {})
    assert job.wait() == 3, job.log
    assert (job.state, job.restarts) == ("FAILED", 0)
    assert "the server was drained; sbatch the same again to go on" in job.log

    again = submit(cluster, run)
    assert again.wait() == 0, again.log
    run.check()


def test_a_paused_run_stays_so_when_its_job_is_requeued(cluster: Cluster, tmp_path: Path) -> None:
    run = SlurmRun(tmp_path / "run", 800)
    arguments = f"{run.settings['SERVER_ARGS']} --unpause"
    job = submit(cluster, run, SERVER_ARGS=arguments)
    run.until_done(100)
    told(run, "/pause", {"paused": True, "reason": "maintenance"})
    cluster.run("scontrol", "requeue", job.id)
    job.wait_for("PENDING")
    job.wait_for("RUNNING")
    job.wait_for_log("was heard before: --accept-failures and --unpause hold for the first time")
    wait_until(lambda: WorkClient(f"@{run.state_dir}/server.json").status(), "the server", 60)
    assert WorkClient(f"@{run.state_dir}/server.json").status()["state"] == "paused"

    assert told(run, "/pause", {"paused": False}) == "the run goes on"
    assert job.wait() == 0, job.log
    run.check()


def test_a_cancelled_run_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    run = SlurmRun(tmp_path / "run", 800)
    job = submit(cluster, run)
    run.until_done(100)
    cluster.run("scancel", job.id)
    wait_until(lambda: not cluster.processes(SLURM_JOB_ID=job.id), "the job's end", 60)
    job.wait()
    assert (job.state, job.restarts) == ("CANCELLED", 0), job.log


def test_a_server_that_dies_is_started_again_beside_its_workers(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = SlurmRun(tmp_path / "run", 1200)
    job = submit(cluster, run)
    run.until_done(200)
    server = json.loads((run.state_dir / "server.json").read_text())["pid"]
    os.kill(server, signal.SIGKILL)
    job.wait_for_log("the server ended with code 137; starting it again")
    assert job.wait() == 0, job.log
    run.check()
    assert run.repeated() == 0


def test_a_dead_node_is_made_up_for_by_the_others(cluster: Cluster, tmp_path: Path) -> None:
    run = SlurmRun(tmp_path / "run", 1500)
    job = submit(cluster, run)
    run.until_done(200)
    try:
        cluster.kill_node("n3")
        job.wait_for("COMPLETED", "COMPLETING", "FAILED", deadline_s=180)
    finally:
        cluster.start_node("n3")
    assert job.wait() == 0, job.log
    assert (job.state, job.restarts) == ("COMPLETED", 0), job.log
    run.check()


def test_what_cannot_be_right_ends_the_job_with_its_code(cluster: Cluster, tmp_path: Path) -> None:
    run = SlurmRun(tmp_path / "run", 10)
    no_input = submit(cluster, run, INPUT="nothing.jsonl", OUTPUT="other.jsonl")
    assert no_input.wait() in (1, 2)
    assert "nothing.jsonl" in no_input.log
    no_task = submit(cluster, run, TASK="nothing.py:Task")
    assert no_task.wait() == 2
    assert "nothing.py" in no_task.log


@pytest.mark.model
def test_the_defaults_answer_the_example_prompts(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.sbatch("run.sbatch", cwd=tmp_path, WORKER_ARGS="--task-arg max_tokens=4")
    assert job.wait() == 0, job.log
    answers = [json.loads(line) for line in (tmp_path / "output-slurm.jsonl").open()]
    assert len(answers) == 100
    assert all(answer["response"] for answer in answers)
