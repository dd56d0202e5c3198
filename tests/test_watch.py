"""`dispatcher watch`: the same facts as everywhere else, and none of the run's business."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path
from urllib.request import ProxyHandler, Request, build_opener

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from dispatcher import watch
from dispatcher.models import WorkItem
from tests.support.processes import Server, dispatcher_server, run_python, running, wait_until

LINES, FAILING = 100, 8
CAUSES = "bad_answer 6, timeout 2"


def answer(item: WorkItem) -> str:
    """Return the result of a line: of the first ones an error, of two kinds."""
    if item.work_id >= FAILING:
        return '{"ok": true}'
    kind = "timeout" if item.work_id < 2 else "bad_answer"
    return json.dumps({"__ERROR__": {"error": kind, "message": "m"}})


@pytest.fixture
def files(tmp_path: Path) -> tuple[str | Path, ...]:
    (tmp_path / "in.jsonl").write_text('{"n": 1}\n' * LINES)
    return ("--infile", tmp_path / "in.jsonl", "--outfile", tmp_path / "out.jsonl")


def scraped(server: Server) -> dict[tuple[str, ...], float]:
    """Return the values of /metrics by their name and labels."""
    request = Request(f"{server.url}/metrics", headers=server.headers)
    with build_opener(ProxyHandler({})).open(request, timeout=10) as reply:
        text = reply.read().decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_watch_status_metrics_and_summary_agree_on_a_run_with_failing_lines(
    files: tuple[str | Path, ...], tmp_path: Path
) -> None:
    with dispatcher_server(*files) as server, server.client("w") as client:
        command = (sys.executable, "-m", "dispatcher.cli", "watch", server.at, "--every", "0.1")
        with running(*command) as watching:
            items = client.get_work(LINES).items
            for item in items:
                item.set_result(answer(item))
            client.submit_results(items[:50])
            watching.wait_for_line(re.compile(rf"of {LINES} lines: \d+ done"))
            client.submit_results(items[50:])
            wait_until(lambda: client.status().get("state") == "complete", "the run is complete")
            status, metrics = client.status(), scraped(server)
            assert watching.wait(30) == 0
        said = watching.output
        server.process.wait(30)
    state_dir = tmp_path / "out.jsonl.dispatch"
    summary = yaml.safe_load((state_dir / "run.yaml").read_text())["summary"]

    assert (status["done"], status["failed"]) == (LINES, FAILING)
    assert (summary["done"], summary["failed"]) == (LINES, FAILING)
    assert summary["errors"] == status["errors"] == {"bad_answer": 6, "timeout": 2}
    assert metrics["dispatcher_items_total", "ok"] == LINES - FAILING
    assert metrics["dispatcher_items_total", "error"] == FAILING
    assert metrics["dispatcher_result_batch_items_count",] == 2
    assert metrics["dispatcher_result_batch_items_sum",] == LINES
    causes = {name[1]: n for name, n in metrics.items() if name[0] == "dispatcher_error_lines"}
    assert causes == status["errors"]
    assert f"of {LINES} lines: {LINES} done, {FAILING} with errors ({CAUSES})" in said
    assert f"the run is complete: {LINES} lines, {FAILING} with errors\nerrors: {CAUSES}\n" in said
    code, later = run_python("-m", "dispatcher.cli", "watch", f"@{state_dir}")
    assert code == 0
    assert f"{LINES} lines, {FAILING} with errors\nerrors: {CAUSES}\n" in later


def test_the_summary_of_a_local_run_names_the_causes_that_run_yaml_has(tmp_path: Path) -> None:
    infile, outfile = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    infile.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(LINES)))
    (tmp_path / "failing_task.py").write_text(
        "from dispatcher.taskmanager.task import GeneratorTask, TaskFailed\n"
        "class Failing(GeneratorTask):\n"
        "    def task_generator(self):\n"
        f"        if self.data['n'] < {FAILING}:\n"
        "            raise TaskFailed('m', 'timeout' if self.data['n'] < 2 else 'bad_answer')\n"
        "        return {'ok': True}\n"
        "        yield\n"
    )
    task = f"{tmp_path / 'failing_task.py'}:Failing"
    files = ("--input", infile, "--output", outfile)
    code, said = run_python(
        *("-m", "dispatcher.cli", "run", "--task", task, *files, "--backend", "fake"),
        deadline_s=90,
    )
    assert code == 4, said
    summary = yaml.safe_load((tmp_path / "out.jsonl.dispatch/run.yaml").read_text())["summary"]
    assert summary["errors"] == {"bad_answer": 6, "timeout": 2}
    assert f"complete: {LINES} lines, {FAILING} with errors" in said
    assert f"errors: {CAUSES}; to run these lines again" in said


def test_a_server_that_is_away_is_waited_for(files: tuple[str | Path, ...], tmp_path: Path) -> None:
    state_dir = tmp_path / "out.jsonl.dispatch"
    with dispatcher_server(*files) as server:
        server.process.stop()
        assert server.process.wait(40) == 3
    command = (sys.executable, "-m", "dispatcher.cli", "watch", f"@{state_dir}", "--every", "0.1")
    with running(*command) as watching:
        watching.wait_for_line(re.compile("the server was stopped; waiting"))
        with dispatcher_server(*files), running(*command):
            watching.wait_for_line(re.compile("the server answers again"))
            watching.signal(signal.SIGINT)
            assert watching.wait(15) == 0
        assert "Traceback" not in watching.output


def test_what_names_no_run_is_refused_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert watch.main([f"@{tmp_path}/nothing/server.json"]) == 2
    said = capsys.readouterr().err
    assert "there is no directory" in said
    assert "Traceback" not in said
