"""`dispatcher pause`, `unpause`, `set` and `drain`: what the page can, from a terminal."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from dispatcher import orders
from dispatcher.client import WorkClient
from dispatcher.models import WorkItem
from dispatcher.server.tls import Tls, own_tls
from dispatcher.server_file import ServerFile, new_token, write_private, write_server_file
from dispatcher.storage.ownership import Claim, Identity
from tests.support.processes import Server, dispatcher_server, run_python, wait_until
from tests.support.scripted import scripted

COMMANDS = {
    "pause": orders.pause,
    "unpause": orders.unpause,
    "set": orders.set_limits,
    "drain": orders.drain,
}
EVERY = [["pause"], ["unpause"], ["set", "--max-failures", "5"], ["drain"]]
LINES = 40
END_S = 60.0
FAILED = '{"__ERROR__": {"error": "bad", "message": "m"}}'
Say = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def nothing_of_this_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOKEN", "ADMIN_TOKEN", "FINGERPRINT"):
        monkeypatch.delenv(f"DISPATCHER_{name}", raising=False)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str | Path, ...]:
    (tmp_path / "in.jsonl").write_text('{"n": 1}\n' * LINES)
    return ("--infile", tmp_path / "in.jsonl", "--outfile", tmp_path / "out.jsonl")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl.dispatch"


@pytest.fixture
def server(files: tuple[str | Path, ...]) -> Iterator[Server]:
    with dispatcher_server(*files) as running:
        yield running


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Return what runs a command in this process: its exit code, and what it wrote where."""

    def run(command: str, *arguments: str | Path) -> tuple[int, str, str]:
        try:
            code = COMMANDS[command]([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse ends a command so
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def told_nobody(said: tuple[int, str, str], *words: str, code: int = 1) -> None:
    """Check that a command failed with one sentence that names these."""
    returned, out, err = said
    assert (returned, out, err.count("\n")) == (code, "", 1), said
    for word in words:
        assert word in err


def finish(client: WorkClient, items: list[WorkItem], result: str = '{"ok": true}') -> None:
    for item in items:
        item.set_result(result)
    assert client.submit_results(items).count == len(items)


# --- what they do -------------------------------------------------------------------------------


def test_a_run_is_paused_and_goes_on_by_commands(server: Server, state: Path) -> None:
    command = ("-m", "dispatcher.cli")
    with server.client("w") as client:
        held = client.get_work(3).items
        code, said = run_python(*command, "pause", f"@{state}", "--reason", "a look at results")
        assert code == 0
        paused = "paused by an operator (a look at results)"
        assert said == f"{paused}; to go on: dispatcher unpause @{state}\n"
        assert client.get_work(3).items == []
        finish(client, held)
        assert client.status()["paused"]["reason"] == "a look at results"
        assert run_python(*command, "unpause", server.at) == (0, "the run goes on\n")
        assert len(client.get_work(LINES).items) == LINES - 3


def test_orders_go_over_tls_to_the_one_certificate(
    files: tuple[str | Path, ...], state: Path, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dispatcher_server(*files, "--tls", "on") as server:
        assert server.url.startswith("https://")
        with WorkClient(server.at) as client:
            assert say("pause", server.at)[0] == 0
            assert client.get_work(1).items == []
            assert say("unpause", f"@{state}")[1] == "the run goes on\n"

            fingerprint = json.loads(server.state_file.read_text())["fingerprint"]
            told = ("--server-fingerprint", fingerprint)
            given = ("--admin-token-file", state / "admin.token")
            assert say("pause", server.url, *told, *given)[0] == 0
            assert client.status()["state"] == "paused"
            monkeypatch.setenv("DISPATCHER_ADMIN_TOKEN", (state / "admin.token").read_text()[:-1])
            monkeypatch.setenv("DISPATCHER_FINGERPRINT", fingerprint)
            assert say("unpause", server.url)[0] == 0
            assert client.status()["state"] == "running"

            other = ("--server-fingerprint", "0" * 64)
            told_nobody(say("pause", server.url, *other), "another certificate", "sent nothing")
            plain = server.url.replace("https", "http")
            monkeypatch.delenv("DISPATCHER_FINGERPRINT")
            told_nobody(say("pause", plain), "426", "speaks TLS")
            assert client.status()["state"] == "running"


def test_a_drained_server_takes_what_is_under_way_and_ends_with_3(
    server: Server, state: Path, say: Say
) -> None:
    with server.client("w") as client:
        held = client.get_work(3).items
        code, said, _ = say("drain", server.at)
        assert code == 0
        assert "ends with code 3" in said
        assert client.get_work(1).items == []
        finish(client, held)
        assert server.process.wait(END_S) == 3
    assert json.loads(server.state_file.read_text())["state"] == "drained"
    told_nobody(say("pause", server.at), "was drained", f"dispatcher runs {state}")


def test_limits_are_set_one_or_both(server: Server, say: Say) -> None:
    with server.client() as client:
        code, said, _ = say("set", server.at, "--work-timeout", "77.5")
        assert (code, said) == (0, "the work timeout is 77.5 seconds now\n")
        assert client.status()["work_timeout_s"] == 77.5
        say("pause", server.at)  # which changes nothing of what is said
        code, said, _ = say("set", server.at, "--work-timeout", "60", "--max-failures", "5%")
        assert (code, said.splitlines()[0]) == (0, "the work timeout is 60 seconds now")
        status = client.status()
        assert (status["work_timeout_s"], status["max_failures"]) == (60, "5%")


def test_a_run_with_too_many_failed_lines_goes_on_only_when_they_are_accepted(
    files: tuple[str | Path, ...], say: Say
) -> None:
    with dispatcher_server(*files, "--max-failures", "1") as server, server.client("w") as client:
        finish(client, client.get_work(2).items, FAILED)
        say("pause", server.at)
        told_nobody(say("unpause", server.at), "still paused, as 2 of 2 finished lines failed")
        assert client.get_work(1).items == []
        say("pause", server.at)
        code, said, _ = say("unpause", server.at, "--accept-failures")
        assert (code, said.count("\n")) == (0, 1)
        assert said.startswith("the run goes on: the lines that failed so far are accepted")
        finish(client, client.get_work(2).items, FAILED)
        assert client.status()["state"] == "paused"
        code, said, _ = say("set", server.at, "--max-failures", "off")
        assert (code, said) == (0, "the run goes on: the limit is off now\n")
        assert len(client.get_work(1).items) == 1


def test_a_server_without_tokens_is_told_without_one(
    files: tuple[str | Path, ...], state: Path, say: Say
) -> None:
    with dispatcher_server(*files, "--no-auth") as server, server.client() as client:
        assert not (state / "admin.token").exists()
        assert say("pause", server.at)[0] == 0
        assert client.status()["state"] == "paused"
        assert say("unpause", server.address)[:2] == (0, "the run goes on\n")


# --- nobody is told -----------------------------------------------------------------------------


def test_another_token_is_refused_and_its_place_named(
    server: Server, tmp_path: Path, say: Say
) -> None:
    other = tmp_path / "other.token"
    write_private(other, new_token().encode())
    for command in EVERY:
        for where in (server.at, server.url):
            refused = say(*command, where, "--admin-token-file", other)
            told_nobody(refused, f"token of {other}", server.url, "admin.token")
    with server.client() as client:
        status = client.status()
        assert (status["state"], status["max_failures"]) == ("running", "off")


def test_the_run_s_own_token_is_none_to_change_it_with(
    server: Server, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.token is not None
    wanted = ("wants the admin token", "@STATE/server.json", "DISPATCHER_ADMIN_TOKEN")
    told_nobody(say("pause", server.url), *wanted)
    monkeypatch.setenv("DISPATCHER_TOKEN", server.token)
    told_nobody(say("pause", server.url), *wanted)
    monkeypatch.setenv("DISPATCHER_ADMIN_TOKEN", server.token)
    told_nobody(say("pause", server.url), "token of DISPATCHER_ADMIN_TOKEN", "admin.token")


def test_a_missing_admin_token_is_named_with_what_makes_one(
    files: tuple[str | Path, ...], server: Server, state: Path, say: Say
) -> None:
    (state / "admin.token").unlink()
    token = ("no admin token", str(state / "admin.token"), "start the server again")
    told_nobody(say("drain", server.at), *token)
    server.process.kill()
    with dispatcher_server(*files) as again:
        assert say("pause", again.at)[0] == 0


def test_an_admin_token_that_others_can_read_is_not_used(
    server: Server, state: Path, say: Say
) -> None:
    (state / "admin.token").chmod(0o640)
    told_nobody(say("pause", server.at), str(state / "admin.token"), "0640", "chmod 600", code=2)
    with server.client() as client:
        assert client.status()["state"] == "running"


def test_a_server_that_is_gone_is_said_to_be(
    server: Server, state: Path, tmp_path: Path, say: Say
) -> None:
    server.process.kill()
    killed = f"{state} (process {server.process.pid} on {socket.gethostname()}) has ended"
    told_nobody(say("pause", server.at), killed, f"dispatcher runs {state}")
    (tmp_path / "token").write_text((state / "admin.token").read_text())
    (tmp_path / "token").chmod(0o600)
    token = ("--admin-token-file", tmp_path / "token")
    nobody = f"no dispatcher server answers at {server.url}"
    told_nobody(say("pause", server.url, *token), nobody)
    # Of a run that came from elsewhere with its files nobody knows who had it.
    shutil.rmtree(state / "owners")
    told_nobody(say("pause", server.at), nobody)


def test_a_stopped_run_is_named_with_how_to_look_at_it(
    server: Server, state: Path, say: Say
) -> None:
    server.process.stop()
    assert server.process.wait(END_S) == 3
    told_nobody(say("unpause", f"@{state}"), f"{state} was stopped", f"dispatcher runs {state}")


def test_a_complete_run_cannot_be_told_anything(server: Server, state: Path, say: Say) -> None:
    commands = [*EVERY, ["set", "--work-timeout", "5"]]
    token = ("--admin-token-file", state / "admin.token")
    with server.client("w") as client:
        finish(client, client.get_work(LINES).items)
        wait_until(lambda: client.status()["state"] == "complete", "the run is complete")
        # It answers for some seconds more, so that workers hear of it.
        for command in commands:
            told_nobody(say(*command, server.url, *token), "the run is complete")
    server.process.stop()
    assert server.process.wait(END_S) == 0
    for command in commands:
        told_nobody(say(*command, server.at), f"the run in {state} is complete")


def test_a_run_that_no_server_ever_had_is_told_apart_from_no_run(tmp_path: Path, say: Say) -> None:
    told_nobody(say("pause", f"@{tmp_path}"), f"there is no {tmp_path}/server.json: no server")
    told_nobody(say("pause", f"@{tmp_path}/out"), f"there is no {tmp_path}/out: no server")
    told_nobody(say("pause", f"@{tmp_path}/x/server.json"), "no directory", code=2)
    told_nobody(say("pause", "@" + "x" * 300), "name too long")


def test_an_older_server_is_told_apart_from_one_that_refuses(say: Say) -> None:
    with scripted() as script:
        script.replies = [(404, b'{"message": "Not Found"}')]
        told_nobody(say("drain", script.address), "does not know POST /drain", "older")
        script.replies = [(200, b"<html>welcome</html>")]
        told_nobody(say("drain", script.address), "no dispatcher server answers at")
        script.replies = [(507, b'{"message": "the disk is full"}')]
        told_nobody(say("drain", script.address), "answered 507: the disk is full")
        # One of before says no state with its answer.
        script.replies = [(200, b'{"status": "OK", "message": "it is 5 now"}')]
        said = say("set", script.address, "--work-timeout", "5")
        assert said == (0, "it is 5 now\n", "")
        assert script.sent == {"timeout": 5}


def test_what_cannot_be_meant_is_refused_as_usage(server: Server, say: Say) -> None:
    where = server.at
    told_nobody(say("set", where), "--work-timeout", "--max-failures", code=2)
    told_nobody(say("set", where, "--work-timeout", "0"), "--work-timeout", "range", code=2)
    told_nobody(say("set", where, "--max-failures", "lots"), "--max-failures", "as 200", code=2)
    told_nobody(say("pause", where, "--reason", "two\nlines"), "printable", code=2)
    told_nobody(say("pause", where, "--reason", "not UTF-8: \udcff"), "refused it", code=2)
    told_nobody(say("pause", "answers.jsonl"), "answers.jsonl", "@STATE/server.json", code=2)
    with server.client() as client:
        assert client.status()["state"] == "running"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tls, Tls]:
    """Return the run's certificate and a stranger's."""
    ours, theirs = (own_tls(tmp_path_factory.mktemp(name)) for name in ("ours", "theirs"))
    return ours, theirs


def test_who_took_the_port_of_a_server_that_is_gone_hears_no_admin_token(
    certificates: tuple[Tls, Tls], tmp_path: Path, say: Say, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = certificates
    write_private(tmp_path / "admin.token", new_token().encode())
    with scripted(theirs.context) as stranger:
        url = f"https://{stranger.address}"
        place: Any = (url, new_token(), "run", 1, os.getpid(), "running", ours.fingerprint)
        write_server_file(tmp_path / "server.json", ServerFile(*place))
        told_nobody(say("drain", f"@{tmp_path}"), url, "another certificate", "sent nothing")
        assert stranger.calls == []
    assert caplog.messages == []  # which is for those who wait


def test_who_has_the_port_of_a_server_on_loopback_elsewhere_hears_no_admin_token(
    tmp_path: Path, say: Say
) -> None:
    write_private(tmp_path / "admin.token", new_token().encode())
    (tmp_path / "owners").mkdir()
    owner = replace(Identity.of_this_process(), host="node7", boot="another")
    (tmp_path / "owners/000001").write_bytes(msgspec.json.encode(Claim(owner, 1)))
    with scripted() as stranger:
        place: Any = (f"http://{stranger.address}", new_token(), "run", 1, os.getpid(), "running")
        write_server_file(tmp_path / "server.json", ServerFile(*place))
        told_nobody(say("drain", f"@{tmp_path}"), "its own machine alone, node7: say it there")
        assert stranger.calls == []
