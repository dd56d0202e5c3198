"""Who may speak to a server: tokens, where they are kept, and who gets to see them."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from dispatcher.client import WorkClient
from dispatcher.errors import AccessDeniedError
from dispatcher.models import WorkStatus
from dispatcher.server_file import read_server_file, write_private
from tests.support.processes import (
    Process,
    Server,
    dispatcher_server,
    run_python,
    running,
    wait_until,
)

CHAT = "examples/chat_task.py:ChatTask"
FAKELLM_READY = re.compile(r"fakellm ready at (\S+)")
GIVEN, OTHER = "given-token-" + "g" * 30, "other-token-" + "o" * 30
CALLS = [
    ("GET", "/work"),
    ("POST", "/results"),
    ("POST", "/release"),
    ("POST", "/heartbeat"),
    ("POST", "/work_timeout"),
    ("POST", "/max_failures"),
    ("POST", "/pause"),
    ("POST", "/drain"),
    ("GET", "/status"),
    ("GET", "/metrics"),
    ("GET", "/overview"),
    ("GET", "/items/0"),
    ("GET", "/nowhere"),
    ("GET", "/page"),
    ("POST", "/page/main.js"),
    ("GET", "/work/"),
    ("GET", "//healthz"),
    ("POST", "/healthz"),
    ("POST", "/"),
    ("DELETE", "/status"),
]


@pytest.fixture(autouse=True)
def no_token_of_this_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPATCHER_TOKEN", raising=False)


def files(directory: Path, lines: int = 3) -> tuple[str | Path, ...]:
    infile = directory / "in.jsonl"
    infile.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n' * lines)
    return ("--infile", infile, "--outfile", directory / "out.jsonl", "--retry", "1")


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def ask(
    server: Server,
    method: str,
    path: str,
    headers: dict[str, str],
    body: bytes | None = None,
) -> tuple[int, Any, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(server.address, timeout=10)
    try:
        connection.request(method, path, body, headers)
        reply = connection.getresponse()
        text = reply.read()
        return reply.status, json.loads(text) if text[:1] == b"{" else text, reply
    finally:
        connection.close()


def start_lines(server: Server) -> list[str]:
    """Return the three lines that a server says at its start."""
    process = server.process
    wait_until(lambda: process.output.count("\n") >= 3, "the server's first lines")
    return process.output.splitlines()[:3]


def status_of(server: Server, method: str, path: str, headers: dict[str, str]) -> int:
    return ask(server, method, path, headers)[0]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Share one server between tests that change nothing."""
    with dispatcher_server(*files(tmp_path_factory.mktemp("shared"))) as shared:
        yield shared


# --- the wire -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_without_a_token_every_call_is_refused(server: Server, method: str, path: str) -> None:
    status, body, reply = ask(server, method, path, {})
    assert status == 401
    assert reply.headers["WWW-Authenticate"] == "Bearer"
    assert reply.headers["Connection"] == "close"
    assert "server.json" in body["message"]
    assert "--no-auth" in body["message"]


@pytest.mark.parametrize("kind", ["shorter", "longer", "other", "empty", "basic", "bare", "odd"])
def test_what_is_not_the_token_is_refused_and_not_repeated(server: Server, kind: str) -> None:
    assert server.token is not None
    shown = {
        "shorter": f"Bearer {server.token[:-1]}",
        "longer": f"Bearer {server.token}x",
        "other": f"Bearer {OTHER}",
        "empty": "Bearer ",
        "basic": f"Basic {server.token}",
        "bare": server.token,
        "odd": "Bearer \xe4\xff",
    }[kind]
    status, body, _ = ask(server, "GET", "/status", {"Authorization": shown})
    assert status == 401
    assert server.token[:-1] not in json.dumps(body)
    assert OTHER not in json.dumps(body)


def test_with_the_token_the_calls_are_open(server: Server) -> None:
    for method, path, expected in (
        ("GET", "/status", 200),
        ("GET", "/metrics", 200),
        ("GET", "/nowhere", 404),
        ("DELETE", "/status", 405),
        ("POST", "/heartbeat", 400),
    ):
        assert status_of(server, method, path, server.headers) == expected
    assert server.token is not None
    for scheme in ("bearer", "BEARER", "Bearer "):
        shown = {"Authorization": f"{scheme} {server.token}"}
        assert status_of(server, "GET", "/status", shown) == 200


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/", "/healthz", "/page/main.js", "/page/page.css"])
def test_life_and_the_page_are_for_everybody(server: Server, method: str, path: str) -> None:
    for headers in ({}, bearer(OTHER), server.headers):
        assert status_of(server, method, path, headers) == 200


def test_the_page_shows_nothing_of_the_run(server: Server) -> None:
    status = ask(server, "GET", "/status", server.headers)[1]
    parts = [*re.findall(r'(?:src|href)="(page/[\w.]+)"', ask(server, "GET", "/", {})[1].decode())]
    assert "page/main.js" in parts
    for path in ("/", *(f"/{part}" for part in parts)):
        text = ask(server, "GET", path, {})[1].decode()
        assert status["run"] not in text
        assert server.token is not None
        assert server.token not in text


def test_what_changes_settings_wants_the_admin_token(server: Server) -> None:
    body = b'{"timeout": 77}'
    status, reply, _ = ask(server, "POST", "/work_timeout", server.headers, body)
    assert status == 403
    assert "admin.token" in reply["message"]
    assert ask(server, "GET", "/status", server.headers)[1]["work_timeout_s"] == 1200
    assert ask(server, "POST", "/work_timeout", server.admin_headers, body)[0] == 200
    # And it opens everything else too.
    assert ask(server, "GET", "/status", server.admin_headers)[1]["work_timeout_s"] == 77


def test_how_many_lines_may_fail_is_changed_with_the_admin_token_alone(server: Server) -> None:
    body = b'{"limit": 7, "accept": true}'
    status, reply, _ = ask(server, "POST", "/max_failures", server.headers, body)
    assert status == 403
    assert "admin.token" in reply["message"]
    assert ask(server, "GET", "/status", server.headers)[1]["max_failures"] == "off"
    status, reply, _ = ask(server, "POST", "/max_failures", server.admin_headers, body)
    said = "the lines that failed so far are accepted, the limit is 7 now"
    assert (status, reply["message"], reply["state"]) == (200, said, "running")
    assert ask(server, "GET", "/status", server.headers)[1]["max_failures"] == "7"


def test_a_client_with_the_wrong_token_is_told_what_to_give(server: Server) -> None:
    for client in (WorkClient(server.address), WorkClient(server.address, token=OTHER)):
        with client, pytest.raises(AccessDeniedError, match=r"@STATE/server\.json"):
            client.get_work()


# --- where tokens come from and where they go ---------------------------------------------------


def test_tokens_have_256_bits_and_are_in_files_of_their_owner_alone(server: Server) -> None:
    admin_file = server.state_file.with_name("admin.token")
    tokens = [server.token, admin_file.read_text().strip()]
    assert len(set(tokens)) == 2
    for token in tokens:
        assert token is not None
        assert re.fullmatch(r"[A-Za-z0-9_-]{43}", token)
    for path in (server.state_file, admin_file):
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600


def test_the_server_says_how_workers_connect_and_what_older_clients_need(server: Server) -> None:
    first, second, _ = start_lines(server)
    assert re.fullmatch(r"dispatcher-server: run [0-9a-f]+ at http://127\.0\.0\.1:\d+", first)
    assert f"--dispatcher @{server.state_file}" in second
    assert "--no-auth" in second


def test_tokens_are_nowhere_but_in_their_files(tmp_path: Path) -> None:
    with dispatcher_server(*files(tmp_path)) as server:
        with server.client("w") as client:
            (item, *_) = client.get_work(1).items
            item.set_result("1")
            client.submit_results([item])
            ask(server, "GET", "/status", {"Authorization": f"Bearer {server.token}\0"})
            shown = json.dumps(client.status())
        shown += ask(server, "GET", "/metrics", server.headers)[1].decode()
        command = Path(f"/proc/{server.process.pid}/cmdline").read_text()
        server.process.stop()
        assert server.process.wait() == 3
    admin_token = server.state_file.with_name("admin.token").read_text().strip()
    for token, home in ((server.token, "server.json"), (admin_token, "admin.token")):
        assert token is not None
        assert token not in shown + command + server.process.output
        holders = [p for p in tmp_path.rglob("*") if p.is_file() and token in holds(p)]
        assert [path.name for path in holders] == [home]


def holds(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace")


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_tokens_survive_a_restart(end: signal.Signals, tmp_path: Path) -> None:
    with dispatcher_server(*files(tmp_path)) as first:
        admin = first.admin_headers
        first.process.signal(end)
        first.process.wait()
    with dispatcher_server(*files(tmp_path)) as second:
        assert second.token == first.token
        assert second.admin_headers == admin
        assert read_server_file(second.state_file).url == second.url


def test_a_run_of_its_own_has_a_token_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with (
        dispatcher_server(*files(tmp_path / "a")) as one,
        dispatcher_server(*files(tmp_path / "b")) as other,
    ):
        assert one.token != other.token
        assert status_of(other, "GET", "/status", one.headers) == 401
        assert status_of(other, "POST", "/work_timeout", one.admin_headers) == 401


def test_a_given_token_is_used_the_file_before_the_variable(tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    write_private(token_file, GIVEN.encode())
    variable = {"DISPATCHER_TOKEN": OTHER}
    with dispatcher_server(*files(tmp_path)) as server:
        assert server.token not in (GIVEN, OTHER)
    with dispatcher_server(*files(tmp_path), env=variable) as server:
        assert server.token == OTHER
        assert status_of(server, "GET", "/status", bearer(OTHER)) == 200
    flags = (*files(tmp_path), "--token-file", token_file)
    with dispatcher_server(*flags, env=variable) as server:
        assert server.token == GIVEN
        assert status_of(server, "GET", "/status", bearer(GIVEN)) == 200
        assert status_of(server, "GET", "/status", bearer(OTHER)) == 401


def test_server_json_says_how_the_server_left(tmp_path: Path) -> None:
    with dispatcher_server(*files(tmp_path)) as server:
        found = read_server_file(server.state_file)
        assert (found.state, found.url, found.pid) == ("running", server.url, server.process.pid)
        server.process.stop()
        assert server.process.wait() == 3
    assert read_server_file(server.state_file).state == "stopped"
    with dispatcher_server(*files(tmp_path)) as server, server.client("w") as client:
        for item in client.get_work(3).items:
            item.set_result("1")
            client.submit_results([item])
        wait_until(lambda: client.get_work().status is WorkStatus.ALL_WORK_COMPLETE, "the end")
        assert server.process.wait() == 0
    assert read_server_file(server.state_file).state == "complete"


# --- what is refused at the start ---------------------------------------------------------------


def refused(*flags: str | Path, env: dict[str, str] | None = None) -> str:
    code, output = run_python("-m", "dispatcher.server", "--port", "0", *flags, env=env)
    assert code == 2, output
    assert output.count("\n") == 1, output
    return output


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Return the state directory of a run that was stopped."""
    with dispatcher_server(*files(tmp_path)) as server:
        pass
    return server.state_file.parent


@pytest.mark.parametrize("name", ["server.json", "admin.token"])
def test_a_token_that_others_could_read_is_refused(name: str, state: Path) -> None:
    (state / name).chmod(0o644)
    output = refused(*files(state.parent))
    for words in (str(state / name), "0644", "chmod 600"):
        assert words in output


@pytest.mark.parametrize("name", ["server.json", "admin.token"])
def test_a_link_in_the_place_of_a_token_is_refused(name: str, state: Path) -> None:
    target = state.parent / "precious"
    target.write_text("precious")
    target.chmod(0o600)
    (state / name).unlink()
    (state / name).symlink_to(target)
    assert "symbolic link" in refused(*files(state.parent))
    if name == "server.json":
        assert "symbolic link" in refused(*files(state.parent), "--no-auth")
    assert target.read_text() == "precious"


def test_a_server_json_that_holds_something_else_is_refused_by_name(state: Path) -> None:
    (state / "server.json").write_text("{}")
    assert str(state / "server.json") in refused(*files(state.parent))


def test_a_token_that_is_none_is_refused(tmp_path: Path) -> None:
    assert "DISPATCHER_TOKEN must be" in refused(
        *files(tmp_path), env={"DISPATCHER_TOKEN": "short"}
    )
    loose = tmp_path / "token"
    loose.write_text(GIVEN)
    loose.chmod(0o640)
    assert "0640" in refused(*files(tmp_path), "--token-file", loose)
    assert "nowhere" in refused(*files(tmp_path), "--token-file", tmp_path / "nowhere")
    assert not (tmp_path / "out.jsonl.dispatch").exists()


# --- without authentication ---------------------------------------------------------------------


def test_no_auth_lets_everybody_in_and_says_so(tmp_path: Path) -> None:
    with dispatcher_server(*files(tmp_path), "--no-auth") as server:
        assert server.token is None
        assert "everybody who reaches this port" in start_lines(server)[1]
        for headers in ({}, bearer(OTHER)):
            assert status_of(server, "GET", "/status", headers) == 200
            body = b'{"timeout": 50}'
            assert ask(server, "POST", "/work_timeout", headers, body)[0] == 200
        with WorkClient(server.at) as client:
            assert client.get_work().status is WorkStatus.OK


def test_a_run_may_change_between_both(tmp_path: Path) -> None:
    for flags in ((), ("--no-auth",), ()):
        with dispatcher_server(*files(tmp_path), *flags) as server:
            assert (server.token is None) == bool(flags)
            with WorkClient(server.at) as client:
                assert client.status()["state"] == "running"


# --- workers ------------------------------------------------------------------------------------


@contextmanager
def worker(
    address: str, *flags: str | Path, env: dict[str, str] | None = None
) -> Iterator[Process]:
    command = [sys.executable, "-m", "dispatcher.taskmanager.cli", "--dispatcher", address]
    command += ["--task", CHAT, "--backend", "fake", "--workers", "4", *map(str, flags)]
    with running(*command, env=env) as process:
        yield process


@pytest.mark.slow
@pytest.mark.parametrize("way", ["@server.json", "@state", "token file", "variable"])
def test_a_worker_gets_the_token_in_four_ways(way: str, tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    with dispatcher_server(*files(tmp_path)) as server:
        assert server.token is not None
        write_private(token_file, server.token.encode())
        address, flags, env = {
            "@server.json": (server.at, [], {"DISPATCHER_TOKEN": OTHER}),
            "@state": (f"@{server.state_file.parent}", [], None),
            "token file": (server.address, ["--token-file", token_file], None),
            "variable": (server.url, [], {"DISPATCHER_TOKEN": server.token}),
        }[way]
        with worker(address, *flags, env=env) as process:
            assert process.wait(deadline_s=60) == 0, process.output
            assert server.token not in process.output
    assert (tmp_path / "out.jsonl").read_bytes().count(b"\n") == 3


@pytest.mark.slow
@pytest.mark.parametrize("token", [None, OTHER])
def test_a_worker_without_the_token_ends_with_a_sentence_before_a_model_is_started(
    token: str | None, tmp_path: Path
) -> None:
    env = {"DISPATCHER_TOKEN": token} if token else None
    calls = tmp_path / "calls.jsonl"
    with (
        dispatcher_server(*files(tmp_path)) as server,
        worker(server.address, f"--fakellm-args=--call-log {calls}", env=env) as process,
    ):
        assert process.wait(deadline_s=30) == 1
    (line,) = process.output.splitlines()
    assert line.startswith("dispatcher-task-run: the server refused GET /status")
    assert "@STATE/server.json" in line
    assert OTHER not in line
    assert not calls.exists()


@pytest.mark.slow
def test_a_worker_refuses_a_server_json_that_others_can_read(tmp_path: Path) -> None:
    with dispatcher_server(*files(tmp_path)) as server:
        server.state_file.chmod(0o644)
        with worker(server.at) as process:
            assert process.wait(deadline_s=30) == 2
    (line,) = process.output.splitlines()
    assert "chmod 600" in line


@pytest.mark.slow
def test_a_worker_whose_token_is_worth_nothing_any_more_ends_with_a_sentence(
    tmp_path: Path,
) -> None:
    with ExitStack() as stack:
        # Given a worker in the middle of long requests
        server = stack.enter_context(dispatcher_server(*files(tmp_path, 50)))
        assert server.token is not None
        slow = "--fakellm-args=--latency-s 2"
        env = {"DISPATCHER_TOKEN": server.token}
        process = stack.enter_context(worker(server.address, slow, env=env))
        with server.client() as client:
            wait_until(lambda: client.status()["requests_in_flight"], "requests", deadline_s=40)
        # When its server comes back with another token, at the same place
        server.process.kill()
        server.state_file.unlink()
        port = server.address.rpartition(":")[2]
        stack.enter_context(dispatcher_server(*files(tmp_path, 50), "--port", port))
        # Then it does not go on as if nothing had happened
        assert process.wait(deadline_s=30) == 1
    last = process.output.splitlines()[-1]
    assert last.startswith("dispatcher-task-run: the server refused"), process.output


@pytest.mark.slow
def test_a_worker_follows_its_server_to_another_port_and_another_token(tmp_path: Path) -> None:
    with ExitStack() as stack:
        flags = files(tmp_path, 80)
        first = stack.enter_context(dispatcher_server(*flags))
        slow = "--fakellm-args=--latency-s 0.1"
        process = stack.enter_context(worker(first.at, slow))
        with first.client() as client:
            wait_until(lambda: client.status()["done"] >= 20, "some lines", deadline_s=60)
        first.process.kill()
        first.state_file.unlink()
        second = stack.enter_context(dispatcher_server(*flags))
        assert (second.url, second.token) != (first.url, first.token)
        assert process.wait(deadline_s=90) == 0, process.output
        assert second.process.wait(deadline_s=30) == 0
    assert (tmp_path / "out.jsonl").read_bytes().count(b"\n") == 80


@pytest.mark.slow
def test_a_worker_may_be_started_before_its_server(tmp_path: Path) -> None:
    flags = files(tmp_path)
    state_dir = tmp_path / "out.jsonl.dispatch"
    logs = tmp_path / "logs"
    with worker(f"@{state_dir / 'server.json'}", "--log-dir", logs) as process:
        wait_until(logs.exists, "the worker's model server", deadline_s=30)
        with dispatcher_server(*flags):
            assert process.wait(deadline_s=60) == 0, process.output


@pytest.mark.slow
def test_a_worker_that_comes_after_the_end_finds_nothing_to_do(tmp_path: Path) -> None:
    flags = files(tmp_path)
    Path(str(flags[1])).write_text("\n")  # a blank line is an error line at once
    with dispatcher_server(*flags) as server, server.client() as client:
        wait_until(lambda: client.get_work().status is WorkStatus.ALL_WORK_COMPLETE, "the end")
        assert server.process.wait() == 0
    with worker(server.at) as process:
        assert process.wait(deadline_s=30) == 0
    assert "nothing to do" in process.output


# --- dispatcher run -----------------------------------------------------------------------------


def living_with(text: str) -> dict[int, str]:
    """Return command line and environment of the processes whose command line holds `text`."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = holds(entry / "cmdline")
                if text in command:
                    found[int(entry.name)] = command + holds(entry / "environ")
            except OSError:
                continue
    return found


@contextmanager
def run_here(directory: Path) -> Iterator[tuple[Process, Path]]:
    """Run `dispatcher run`; yield it and its server.json once a model server is there."""
    flags = files(directory, 60)
    command = [sys.executable, "-m", "dispatcher.cli", "run", "--task", CHAT, "--backend", "fake"]
    command += ["--input", str(flags[1]), "--output", str(flags[3]), "--workers", "2"]
    calls = directory / "calls.jsonl"
    command += [f"--fakellm-args=--latency-s 0.2 --call-log {calls}"]
    with running(*command, env={"DISPATCHER_TOKEN": OTHER}) as process:
        state_file = directory / "out.jsonl.dispatch" / "server.json"
        wait_until(calls.exists, "a model request", deadline_s=60)
        yield process, state_file


@pytest.mark.slow
def test_a_run_on_one_machine_is_authenticated_and_shows_no_token(tmp_path: Path) -> None:
    with run_here(tmp_path) as (process, state_file):
        found = read_server_file(state_file)
        processes = living_with(str(tmp_path))
        assert any(f"--dispatcher=@{state_file}" in shown for shown in processes.values())
        assert found.pid in processes
        assert any("-m\0dispatcher.fakellm" in shown for shown in processes.values())
        assert found.token not in (None, OTHER)
        for pid, shown in processes.items():
            assert str(found.token) not in shown
            if pid != process.pid:  # what its user gave it is its own affair
                assert OTHER not in shown
        connection = http.client.HTTPConnection(found.url.removeprefix("http://"), timeout=10)
        connection.request("GET", "/status")
        assert connection.getresponse().status == 401
        connection.close()
        assert process.wait(deadline_s=120) == 0, process.output
    logs = [path for path in (state_file.parent / "logs").rglob("*") if path.is_file()]
    assert logs
    assert not [path for path in logs if str(found.token) in holds(path)]


@pytest.mark.slow
def test_a_run_goes_on_when_its_server_is_killed_and_comes_back_at_another_port(
    tmp_path: Path,
) -> None:
    with run_here(tmp_path) as (process, state_file):
        first = read_server_file(state_file)
        outfile = tmp_path / "out.jsonl"
        wait_until(
            lambda: outfile.exists() and outfile.read_bytes().count(b"\n") >= 20,
            "a third of the output",
            deadline_s=60,
        )
        os.kill(first.pid, signal.SIGKILL)
        assert process.wait(deadline_s=120) == 0, process.output
    assert "starting it again" in process.output
    assert outfile.read_bytes().count(b"\n") == 60
    last = read_server_file(state_file)
    assert (last.token, last.run) == (first.token, first.run)
    assert last.url != first.url
