"""The server as a process, where HTTP itself matters."""

from __future__ import annotations

import http.client
import json
import re
import sys
from pathlib import Path

from dispatcher.models import ReleaseItem
from tests.support.processes import Server, dispatcher_server, running, wait_until


def ask(server: Server, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    # With the admin token, which opens every call.
    connection = http.client.HTTPConnection(server.address, timeout=10)
    try:
        headers = {"Content-Type": "application/json", **server.admin_headers}
        connection.request(method, path, body, headers)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def test_a_call_for_work_whose_client_left_takes_nothing(tmp_path: Path) -> None:
    infile = tmp_path / "in.jsonl"
    infile.write_text('{"n": 1}\n{"n": 2}\n')
    with (
        dispatcher_server("--infile", infile, "--outfile", tmp_path / "out.jsonl") as server,
        server.client("holder") as holder,
        server.client("next") as next_one,
    ):
        held = holder.get_work(2).items
        leaver = http.client.HTTPConnection(server.address)
        path = "/work?batch_size=2&worker=leaver&wait=30"
        leaver.request("GET", path, headers=server.headers)
        wait_until(lambda: holder.status()["workers"] >= 1, "the server to answer")
        assert next_one.get_work(2, wait_s=0.3).items == []  # so the leaver's call waits, too
        leaver.close()
        assert next_one.get_work(2, wait_s=0.3).items == []  # and its end has been seen

        holder.release_work(items=[ReleaseItem(i.work_id, i.lease, charge=False) for i in held])

        assert [item.work_id for item in next_one.get_work(2).items] == [0, 1]


def test_a_crash_renews_leases_for_the_worker_that_asks_for_it(tmp_path: Path) -> None:
    infile = tmp_path / "in.jsonl"
    infile.write_text('{"n": 1}\n{"n": 2}\n')
    with (
        dispatcher_server("--infile", infile, "--outfile", tmp_path / "out.jsonl") as server,
        server.client("w") as client,
    ):
        first = client.get_work(2).items[0]
        assert first.lease is not None

        def release(lease: str | None, worker: str | None, **fields: object) -> bytes:
            item = {"work_id": 0, "lease": lease, "charge": False, "reason": "crash", **fields}
            body = json.dumps({"items": [item], "worker": worker}).encode()
            status, reply = ask(server, "POST", "/release", body)
            assert status == 200
            return reply

        grant = {"work_id": 0, "lease": first.lease, "renewed": "0.3", "attempt": 1}
        renewed = json.loads(release(first.lease, "w", renew=True))
        again = json.loads(release(first.lease, "w", renew=True))
        assert renewed == {"status": "OK", "released_count": 1, "renewed": [grant]}
        assert again == {"status": "OK", "released_count": 0, "renewed": [grant]}
        plain = release("0.3", "w")
        assert json.loads(plain) == {"status": "OK", "released_count": 1}
        assert release("0.3", "w", renew=True) == plain.replace(b"1", b"0")
        assert client.status()["crashed"] == 2


def test_what_the_protocol_does_not_allow_is_answered_with_a_sentence(tmp_path: Path) -> None:
    infile = tmp_path / "in.jsonl"
    infile.write_text('{"n": 1}\n')
    with dispatcher_server("--infile", infile, "--outfile", tmp_path / "out.jsonl") as server:
        for method, path, body in (
            ("GET", "/work?batch_size=0", None),
            ("GET", "/work?batch_size=many", None),
            ("GET", "/work?wait=forever", None),
            ("GET", "/work?worker=" + "x" * 200, None),
            ("POST", "/results", b"no json"),
            ("POST", "/results", b'{"items": 7}'),
            ("POST", "/release", b'{"work_ids": ["a"]}'),
            ("POST", "/heartbeat", b'{"held": {}}'),
            ("POST", "/heartbeat", b'{"worker": "w", "stats": {"requests": -1}}'),
            ("POST", "/work_timeout", b'{"timeout": -1}'),
            ("POST", "/work_timeout", b'{"timeout": 1e999}'),
        ):
            status, reply = ask(server, method, path, body)
            assert status == 400, path
            assert json.loads(reply)["message"], path


def test_one_bad_item_does_not_harm_the_others_of_its_batch(tmp_path: Path) -> None:
    infile, outfile = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    infile.write_text('{"n": 1}\n' * 5)
    with dispatcher_server("--infile", infile, "--outfile", outfile) as server:
        status, reply = ask(server, "GET", "/work?batch_size=5")
        assert status == 200
        items = json.loads(reply)["items"]
        results = ['{"ok": 1}', "\ud800", 7, "NaN", '{"ok": 5}']
        for item, result in zip(items, results, strict=True):
            item["result"] = result
        body = json.dumps({"items": [*items, "no item", {"result": "{}"}]}).encode()
        status, reply = ask(server, "POST", "/results", body)
        assert status == 200
        outcomes = json.loads(reply)["outcomes"]
        assert outcomes == ["accepted", *["invalid"] * 3, "accepted", "invalid", "invalid"]
        with server.client() as client:
            again = client.get_work(5).items
        assert [(item.work_id, item.retry_count) for item in again] == [(1, 1), (2, 1), (3, 1)]


def test_metrics_health_and_page_answer(tmp_path: Path) -> None:
    infile = tmp_path / "in.jsonl"
    infile.write_text('{"n": 1}\n\n')
    with dispatcher_server("--infile", infile, "--outfile", tmp_path / "out.jsonl") as server:
        with server.client("w") as client:
            assert len(client.get_work(2).items) == 1
        status, text = ask(server, "GET", "/metrics")
        assert status == 200
        assert b'dispatcher_items_total{result="error"} 1.0' in text
        assert b"dispatcher_items_leased 1.0" in text
        assert ask(server, "GET", "/healthz") == (200, b"ok\n")
        status, page = ask(server, "GET", "/")
        assert status == 200
        assert b"<!doctype html>" in page


def test_a_window_holds_new_lines_back_until_the_first_one_is_done(tmp_path: Path) -> None:
    infile = tmp_path / "in.jsonl"
    infile.write_text('{"n": 1}\n' * 10)
    files = ("--infile", infile, "--outfile", tmp_path / "out.jsonl")
    with (
        dispatcher_server(*files, "--window", "4", "--retry", "1") as server,
        server.client("w") as client,
    ):
        assert client.status()["blocked_by_window"] is False
        first, *others = client.get_work(10).items
        assert len(others) == 3
        for item in others:
            item.set_result("1")
        client.submit_results(others)
        status = client.status()
        assert (status["waiting_for"], status["blocked_by_window"]) == (0, True)
        assert client.get_work(10).items == []
        first.set_result("1")
        client.submit_results([first])
        assert client.status()["blocked_by_window"] is False
        assert [item.work_id for item in client.get_work(10).items] == [4, 5, 6, 7]
        assert client.status()["blocked_by_window"] is True


def test_without_a_window_nothing_is_held_back(tmp_path: Path) -> None:
    infile = tmp_path / "in.jsonl"
    infile.write_text('{"n": 1}\n' * 10)
    files = ("--infile", infile, "--outfile", tmp_path / "out.jsonl")
    with dispatcher_server(*files) as server, server.client("w") as client:
        assert len(client.get_work(10).items) == 10
        status = client.status()
    assert (status["waiting_for"], status["blocked_by_window"]) == (None, False)


def test_fewer_open_files_than_connections_are_said_at_the_start(tmp_path: Path) -> None:
    infile = tmp_path / "in.jsonl"
    infile.write_text('{"n": 1}\n')
    flags = ("--infile", infile, "--outfile", tmp_path / "out.jsonl", "--port", "0")
    script = 'ulimit -n 200 && exec "$@"'
    command = (sys.executable, "-m", "dispatcher.server", *flags)
    with running("bash", "-c", script, "bash", *command) as process:
        match = process.wait_for_line(re.compile(r"at most (\d+) connections"))
        assert int(match[1]) < 200
        process.wait_for_line(re.compile("dispatcher-server: run"))
