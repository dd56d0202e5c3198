"""`slurm/server.sbatch` and `slurm/workers.sbatch`: jobs that come and go beside each other."""

from __future__ import annotations

import http.client
import json
import ssl
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from dispatcher.server.tls import own_tls
from dispatcher.server_file import fingerprint_of, read_server_file
from tests.slurm.cluster import Cluster, Job
from tests.slurm.runs import SlurmRun
from tests.support.processes import wait_until
from tests.support.squatter import SQUATTERS, squatting

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

ENGINE = """\
#!/bin/sh
# Plays vLLM's server; notes how it was started.
{{ echo "$@"; echo "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"; }} >"{directory}/engine.$$"
# fakellm knows nothing of GPUs.
for word; do
    shift
    case $before in --tensor-parallel-size) ;; *)
        [ "$word" = --tensor-parallel-size ] || set -- "$@" "$word" ;;
    esac
    before=$word
done
exec {python} -m dispatcher.fakellm --api-key-env VLLM_API_KEY "$@"
"""

OF_THE_PROTOCOL = [
    *(("GET", path) for path in ("/healthz", "/status", "/metrics", "/work", "/nothing")),
    *(("POST", path) for path in ("/work", "/results", "/release", "/heartbeat", "/steps")),
    ("POST", "/work_timeout"),
]


def submit_server(cluster: Cluster, run: SlurmRun) -> Job:
    return cluster.sbatch("server.sbatch", cwd=run.directory, **run.settings)


def submit_workers(cluster: Cluster, run: SlurmRun, *options: str, **settings: str) -> Job:
    return cluster.sbatch(
        "workers.sbatch", *options, cwd=run.directory, **{**run.settings, **settings}
    )


def node_of(job: Job) -> str:
    return job.show()["NodeList"]


@pytest.mark.parametrize("first", ["server", "workers"])
def test_a_requeued_server_is_found_on_another_node_and_lost_workers_are_made_up_for(
    cluster: Cluster, tmp_path: Path, first: str
) -> None:
    run = SlurmRun(tmp_path / "run", 2500)
    if first == "server":
        server, workers = submit_server(cluster, run), submit_workers(cluster, run, "--array=1-4")
    else:
        workers = submit_workers(cluster, run, "--array=1-4")
        wait_until(lambda: len(workers.elements()) == 4, "four workers", 60)
        for element in workers.elements():
            element.wait_for_log("the server does not answer; waiting for it")
        server = submit_server(cluster, run)
    run.until_done(300)
    elements = workers.elements()
    assert len(elements) == 4
    node = node_of(server)
    cluster.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
    cluster.run("scontrol", "requeue", server.id)
    server.wait_for("PENDING")
    run.note_recorded("the server's requeue")
    before = len(run.noted[0].recorded.done)
    server.wait_for("RUNNING")
    assert node_of(server) != node

    run.until_done(before + 300)
    for element in elements[:2]:
        cluster.run("scancel", element.id)
    run.note_recorded("the end of two workers")

    assert server.wait() == 0, server.log
    assert [element.wait() for element in elements[2:]] == [0, 0]
    assert [element.state for element in elements[:2]] == ["CANCELLED"] * 2
    run.check()
    assert server.restarts == 1
    assert run.kept() > 0


def test_workers_that_start_after_the_end_exit_0_at_once(cluster: Cluster, tmp_path: Path) -> None:
    run = SlurmRun(tmp_path / "run", 20)
    server = submit_server(cluster, run)
    submit_workers(cluster, run).wait()
    assert server.wait() == 0, server.log

    # An engine that never gets ready: it must not even be waited for.
    late = submit_workers(cluster, run, BACKEND="vllm", MODEL="m", WORKER_ARGS="--vllm-command cat")
    assert late.wait(60) == 0, late.log
    assert late.state == "COMPLETED"
    assert "the run is complete, there is nothing to do" in late.log
    assert not (run.state_dir / "logs" / f"{late.id}.0").exists()


def asked_by_a_stranger(host: str, port: int, method: str, path: str) -> tuple[int, str]:
    """Return the status that one gets who knows only the port, and the server's fingerprint."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    connection = http.client.HTTPSConnection(host, port, timeout=10, context=context)
    try:
        connection.request(method, path, "{}" if method == "POST" else None)
        shown = connection.sock.getpeercert(binary_form=True)
        return connection.getresponse().status, fingerprint_of(shown)
    finally:
        connection.close()


def test_a_stranger_is_told_nothing_and_who_takes_the_port_of_a_server_that_left_hears_nothing(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = SlurmRun(tmp_path / "run", 800)
    server, workers = submit_server(cluster, run), submit_workers(cluster, run, "--array=1-2")
    run.until_done(50)
    found = read_server_file(run.state_dir)
    address = urlsplit(found.url)
    assert address.scheme == "https"
    assert address.hostname
    assert address.port
    for method, path in OF_THE_PROTOCOL:
        status, shown = asked_by_a_stranger(address.hostname, address.port, method, path)
        assert (status, shown) == (200 if path == "/healthz" else 401, found.fingerprint)

    elements = workers.elements()
    cluster.run("scancel", server.id)
    wait_until(lambda: not cluster.processes(SLURM_JOB_ID=server.id), "the server's end", 60)
    for kind in SQUATTERS[:2]:
        theirs = own_tls(tmp_path)
        with squatting(kind, theirs, address.port, "0.0.0.0") as squatter:
            wait_until(lambda s=squatter: s.met >= 3, f"three calls to {kind}", 60)
        assert found.token is not None
        for secret in (found.token, "HTTP/1.1", "Authorization", "line "):
            assert secret.encode() not in squatter.heard

    again = submit_server(cluster, run)
    assert again.wait() == 0, again.log
    assert [element.wait() for element in elements] == [0, 0]
    run.check()


@pytest.mark.parametrize("bound_by", ["the launcher", "Slurm"])
def test_two_task_managers_on_one_node_have_gpus_and_ports_of_their_own(
    cluster: Cluster, tmp_path: Path, bound_by: str
) -> None:
    engine = tmp_path / "engine.sh"
    engine.write_text(ENGINE.format(directory=tmp_path, python=sys.executable))
    run = SlurmRun(tmp_path / "run", 400)
    gpus = {"the launcher": "--gpus-per-node=4", "Slurm": "--gpus-per-task=2"}[bound_by]
    job = cluster.sbatch(
        *("run.sbatch", "--nodes=1", "--ntasks-per-node=2", gpus),
        cwd=run.directory,
        **{
            **run.settings,
            "BACKEND": "vllm",
            "MODEL": "some/model",
            "TENSOR_PARALLEL": "2",
            "WORKER_ARGS": f"--vllm-command 'sh {engine}' "
            f"--vllm-extra-args='--latency-s 0.1 --call-log {run.call_log}'",
        },
    )
    assert job.wait() == 0, job.log
    run.check()
    started = [path.read_text().splitlines() for path in tmp_path.glob("engine.[0-9]*")]
    arguments = [words.split() for words, _ in started]
    assert len(started) == 2
    assert [words[words.index("--tensor-parallel-size") + 1] for words in arguments] == ["2", "2"]
    assert len({words[words.index("--port") + 1] for words in arguments}) == 2
    devices = sorted(line.partition("=")[2] for _, line in started)
    assert devices == ["0,1", "2,3"]


def test_a_client_program_is_run_as_an_array(cluster: Cluster, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import json, os, sys, time\n"
        "from dispatcher.client import WorkClient\n"
        "at = sys.argv[sys.argv.index('--dispatcher_server') + 1]\n"
        "client = WorkClient(at, f'program-{os.getpid()}')\n"
        "while (reply := client.get_work(10, 2)).status != 'all_work_complete':\n"
        "    for item in reply.items:\n"
        "        item.set_result(json.dumps({'asked': item.content, 'argv': sys.argv[3:]}))\n"
        "    client.submit_results(reply.items) if reply.items else time.sleep(0.1)\n"
    )
    run = SlurmRun(tmp_path / "run", 200)
    server = submit_server(cluster, run)
    programs = cluster.sbatch(
        *("inference.sbatch", "--array=1-2"),
        cwd=run.directory,
        **{
            **run.settings,
            "MODEL": "org/model",
            "PROGRAM": str(program),
            "PROGRAM_ARGS": "--stop_word 'THE END'",
        },
    )
    assert server.wait() == 0, f"{server.log}\n{programs.log}"
    results = [json.loads(line) for line in run.outfile.open()]
    assert [result["asked"] for result in results] == run.infile.read_text().splitlines()
    assert results[0]["argv"] == (
        [
            "--model_path",
            "org/model",
            "--tensor_parallel_size",
            "1",
            "--batch_size",
            "8",
            "--stop_word",
            "THE END",
        ]
    )
