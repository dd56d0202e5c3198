"""Pausing, going on and draining, as people meet it: calls, commands, and what is shown."""

from __future__ import annotations

import http.client
import json
import re
import sys
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import pytest

from dispatcher.client import WorkClient
from dispatcher.server_file import read_server_file
from tests.support.processes import (
    Process,
    Server,
    dispatcher_server,
    run_python,
    running,
    wait_until,
)
from tests.test_watch import scraped

CLI = (sys.executable, "-m", "dispatcher.cli")
FICKLE = "tests/support/fickle_tasks.py:FickleTask"
END_S = 60.0


def told(state_dir: Path, path: str, body: Any) -> tuple[int, str]:
    """Make a call with the admin token; return status and message."""
    address = read_server_file(state_dir).url.removeprefix("http://")
    token = (state_dir / "admin.token").read_text().strip()
    return asked(address, path, body, token)


def asked(address: str, path: str, body: Any, token: str | None) -> tuple[int, str]:
    connection = http.client.HTTPConnection(address, timeout=10)
    try:
        headers = {"Authorization": f"Bearer {token}"}
        connection.request("POST", path, json.dumps(body), headers)
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())["message"]
    finally:
        connection.close()


def health(server: Server) -> int:
    connection = http.client.HTTPConnection(server.address, timeout=10)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.fixture
def files(tmp_path: Path) -> tuple[str | Path, ...]:
    (tmp_path / "in.jsonl").write_text('{"q": 1, "how": "fine"}\n' * 40)
    return ("--infile", tmp_path / "in.jsonl", "--outfile", tmp_path / "out.jsonl")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl.dispatch"


def state_of(server: Server) -> str:
    with server.client("looker") as client:
        return str(client.status()["state"])


# --- a server -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "body"), [("/pause", {"paused": True}), ("/drain", {})])
def test_pausing_and_draining_want_the_admin_token(
    files: tuple[str | Path, ...], path: str, body: dict[str, bool]
) -> None:
    with dispatcher_server(*files) as server:
        status, said = asked(server.address, path, body, server.token)
        assert status == 403
        assert "admin.token" in said
        assert state_of(server) == "running"


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/pause", {}, "paused"),
        ("/pause", {"paused": "yes"}, "paused"),
        ("/pause", [], "object"),
        ("/pause", {"paused": True, "reason": 7}, "reason"),
        ("/pause", {"paused": True, "reason": "two\nlines"}, "reason"),
        ("/pause", {"paused": True, "reason": "\x1b[2J"}, "reason"),
        ("/pause", {"paused": True, "reason": "x" * 501}, "at most 500"),
        ("/drain", [], "object"),
    ],
)
def test_what_is_no_order_is_refused_with_what_is_wrong(
    files: tuple[str | Path, ...], state: Path, path: str, body: Any, named: str
) -> None:
    with dispatcher_server(*files) as server:
        status, said = told(state, path, body)
        assert status == 400
        assert named in said
        assert state_of(server) == "running"


def test_a_pause_is_shown_everywhere_and_outlives_a_server_that_is_killed(
    files: tuple[str | Path, ...], state: Path
) -> None:
    why = "paused by an operator (maintenance at noon)"
    with dispatcher_server(*files) as server:
        gauge = "dispatcher_run_paused"
        assert [scraped(server)[gauge, by] for by in ("failures", "operator")] == [0, 0]
        order = {"paused": True, "reason": "maintenance at noon"}
        status, said = told(state, "/pause", order)
        assert (status, said.partition(";")[0]) == (200, why)
        assert told(state, "/pause", order) == (200, said)
        assert [scraped(server)[gauge, by] for by in ("failures", "operator")] == [0, 1]
        assert why in run_python(*CLI[1:], "runs", state)[1]
        server.process.kill()
    assert f"{why}; it goes on with --unpause" in run_python(*CLI[1:], "runs", state)[1]
    with dispatcher_server(*files) as server, server.client("w") as client:
        assert client.get_work(5).items == []
        assert client.status()["paused"]["message"] == why
        assert why in server.process.output
        watching = (*CLI, "watch", server.at, "--every", "0.1")
        with running(*watching) as process:
            # Nobody has begun yet: that the run is paused is said all the same.
            process.wait_for_line(re.compile(re.escape(why)))
        assert told(state, "/pause", {"paused": False}) == (200, "the run goes on")
        assert len(client.get_work(5).items) == 5
    with dispatcher_server(*files) as server, server.client("w") as client:
        assert client.status()["state"] == "running"


def test_a_run_that_an_operator_paused_is_gone_on_with_by_an_option(
    files: tuple[str | Path, ...], state: Path
) -> None:
    with dispatcher_server(*files):
        told(state, "/pause", {"paused": True})
    with dispatcher_server(*files, "--unpause") as server, server.client("w") as client:
        assert len(client.get_work(5).items) == 5


def test_what_holds_for_one_start_is_neither_kept_nor_taken_from_a_file(
    files: tuple[str | Path, ...], state: Path, tmp_path: Path
) -> None:
    with dispatcher_server(*files, "--unpause"):
        assert "unpause" not in (state / "run.yaml").read_text()
    config = tmp_path / "run.yaml"
    config.write_text("unpause: true\n")
    code, said = run_python("-m", "dispatcher.server", *files, "--config", config)
    assert (code, said.count("\n")) == (2, 1)
    assert "unknown option 'unpause'" in said


def test_a_drained_server_takes_what_is_under_way_ends_with_3_and_can_be_gone_on_with(
    files: tuple[str | Path, ...], state: Path
) -> None:
    with dispatcher_server(*files) as server, server.client("w") as client:
        items = client.get_work(3).items
        status, said = told(state, "/drain", {})
        assert status == 200
        assert "ends with code 3" in said
        assert client.get_work(3).items == []
        assert told(state, "/drain", {})[0] == 200
        assert state_of(server) == "draining"
        assert health(server) == 503
        for item in items:
            item.set_result('{"ok": true}')
        assert client.submit_results(items).count == 3
        assert server.process.wait(END_S) == 3
        assert "dispatcher-server: drained; go on with: dispatcher-server --resume" in (
            server.process.output
        )
    assert read_server_file(state).state == "drained"
    with dispatcher_server(*files) as server, server.client("w") as client:
        assert read_server_file(state).state == "running"
        assert client.status()["done"] == 3
        assert len(client.get_work(100).items) == 37


def children_of(process: Process) -> int:
    return len(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())


def looks(state_dir: Path) -> float:
    """Return how often a run's server was asked for its status."""
    found = read_server_file(state_dir)
    request = Request(f"{found.url}/metrics", headers={"Authorization": f"Bearer {found.token}"})
    with build_opener(ProxyHandler({})).open(request, timeout=10) as reply:
        text = reply.read().decode()
    count = re.search(r'^dispatcher_call_duration_seconds_count{call="status"} (.*)$', text, re.M)
    assert count is not None
    return float(count[1])


# --- dispatcher run -----------------------------------------------------------------------------


def local_run(tmp_path: Path, lines: int = 300) -> tuple[str | Path, ...]:
    text = "".join(json.dumps({"q": n, "how": "fine"}) + "\n" for n in range(lines))
    (tmp_path / "in").write_text(text)
    given = ("--task", FICKLE, "--input", tmp_path / "in", "--output", tmp_path / "out")
    slow = "--fakellm-args=--latency-s 0.05"
    return (*CLI, "run", *given, "--backend", "fake", "--workers", "4", "--batch-size", "4", slow)


def until_begun(process: Process, state: Path) -> WorkClient:
    wait_until((state / "server.json").exists, process.output or "server.json", END_S)
    client = WorkClient(f"@{state}/server.json")
    wait_until(lambda: client.status().get("done", 0) > 20, "some lines", END_S)
    return client


def test_dispatcher_run_waits_while_an_operator_has_it_paused_and_goes_on_when_told(
    tmp_path: Path,
) -> None:
    state = tmp_path / "out.dispatch"
    with running(*local_run(tmp_path)) as process, until_begun(process, state) as client:
        assert told(state, "/pause", {"paused": True, "reason": "a look"})[0] == 200
        said = process.wait_for_line(re.compile(r"^paused by an operator \(a look\); it waits for"))
        assert f"dispatcher unpause @{state}; or" in said.string
        assert f"dispatcher run --resume {state} --unpause" in said.string
        wait_until(lambda: client.status()["issued"] == 0, "what is under way", END_S)
        assert not process.has_ended
        assert told(state, "/pause", {"paused": False}) == (200, "the run goes on")
        process.wait_for_line(re.compile("^the run goes on"))
        assert process.wait(END_S) == 0, process.output
    assert len((tmp_path / "out").read_text().splitlines()) == 300


def test_dispatcher_run_on_a_run_that_an_operator_paused_starts_no_model_until_it_is_told(
    tmp_path: Path,
) -> None:
    state = tmp_path / "out.dispatch"
    with running(*local_run(tmp_path)) as process, until_begun(process, state):
        told(state, "/pause", {"paused": True})
        process.wait_for_line(re.compile(r"^paused by an operator; it waits for"), END_S)
        process.stop()
        assert process.wait(END_S) == 3, process.output
        assert process.output.rstrip().endswith(f"dispatcher run --resume {state} --unpause")
    with running(*CLI, "run", "--resume", state) as process:
        process.wait_for_line(re.compile(r"^paused by an operator; it waits for"), END_S)
        looked = looks(state)
        wait_until(lambda: looks(state) >= looked + 4, "more looks at the run", END_S)
        assert children_of(process) == 1, "beside the server something was started"
        process.stop()
        assert process.wait(END_S) == 3, process.output
    with running(*CLI, "run", "--resume", state, "--unpause") as process:
        assert process.wait(END_S) == 0, process.output
    assert len((tmp_path / "out").read_text().splitlines()) == 300


def test_dispatcher_run_ends_with_its_drained_server_and_does_not_start_it_again(
    tmp_path: Path,
) -> None:
    state = tmp_path / "out.dispatch"
    with running(*local_run(tmp_path)) as process, until_begun(process, state):
        assert told(state, "/drain", {})[0] == 200
        assert process.wait(END_S) == 3, process.output
        assert "starting it again" not in process.output
        last = process.output.splitlines()[-1]
        assert last.startswith("drained (somebody asked the server to end) after ")
        assert f"go on with: dispatcher run --resume {state}" in last
    with running(*CLI, "run", "--resume", state) as process:
        assert process.wait(END_S) == 0, process.output
    assert len((tmp_path / "out").read_text().splitlines()) == 300
