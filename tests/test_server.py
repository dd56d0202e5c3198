"""The server as a process, where HTTP itself matters."""

from __future__ import annotations

import http.client
import json
from pathlib import Path

from dispatcher.client import WorkClient
from dispatcher.models import ReleaseItem
from tests.support.processes import Server, dispatcher_server, wait_until


def ask(server: Server, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(server.address, timeout=10)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def test_a_call_for_work_whose_client_left_takes_nothing(tmp_path: Path) -> None:
    infile = tmp_path / "in.jsonl"
    infile.write_text('{"n": 1}\n{"n": 2}\n')
    with (
        dispatcher_server("--infile", infile, "--outfile", tmp_path / "out.jsonl") as server,
        WorkClient(server.address, worker="holder") as holder,
        WorkClient(server.address, worker="next") as next_one,
    ):
        held = holder.get_work(2).items
        leaver = http.client.HTTPConnection(server.address)
        leaver.request("GET", "/work?batch_size=2&worker=leaver&wait=30")
        wait_until(lambda: holder.status()["workers"] >= 1, "the server to answer")
        assert next_one.get_work(2, wait_s=0.3).items == []  # so the leaver's call waits, too
        leaver.close()
        assert next_one.get_work(2, wait_s=0.3).items == []  # and its end has been seen

        holder.release_work(items=[ReleaseItem(i.work_id, i.lease, charge=False) for i in held])

        assert [item.work_id for item in next_one.get_work(2).items] == [0, 1]


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
        with WorkClient(server.address) as client:
            again = client.get_work(5).items
        assert [(item.work_id, item.retry_count) for item in again] == [(1, 1), (2, 1), (3, 1)]


def test_metrics_health_and_page_answer(tmp_path: Path) -> None:
    infile = tmp_path / "in.jsonl"
    infile.write_text('{"n": 1}\n\n')
    with dispatcher_server("--infile", infile, "--outfile", tmp_path / "out.jsonl") as server:
        with WorkClient(server.address, worker="w") as client:
            assert len(client.get_work(2).items) == 1
        status, text = ask(server, "GET", "/metrics")
        assert status == 200
        assert b'dispatcher_items_total{result="error"} 1.0' in text
        assert b"dispatcher_items_leased 1.0" in text
        assert ask(server, "GET", "/healthz") == (200, b"ok\n")
        status, page = ask(server, "GET", "/")
        assert status == 200
        assert b"<!doctype html>" in page
