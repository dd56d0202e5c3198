"""Both clients against a server of scripted replies: what each reply, or none, becomes."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dispatcher import client
from dispatcher.client import Address, AsyncWorkClient, WorkClient
from dispatcher.errors import AccessDeniedError, BadRequestError, UsageError
from dispatcher.models import (
    BatchResultResponse,
    BatchWorkResponse,
    HeartbeatRequest,
    HeartbeatResponse,
    Outcome,
    ReleaseItem,
    ReleaseWorkResponse,
    RenewedLease,
    WorkItem,
    WorkStatus,
)
from dispatcher.server_file import ServerFile, write_server_file
from tests.support.scripted import Script, Send, both, scripted

TOKEN, OTHER = "t" * 43, "o" * 43
AWAY = WorkStatus.SERVER_UNAVAILABLE

# --- addresses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address", "url"),
    [
        ("host:80", Address("host", 80, ""), "http://host:80"),
        ("127.0.0.1:8000", Address("127.0.0.1", 8000, ""), "http://127.0.0.1:8000"),
        ("http://node-7.lan:9", Address("node-7.lan", 9, ""), "http://node-7.lan:9"),
        ("http://host:80/", Address("host", 80, ""), "http://host:80"),
        ("http://host:80/a/b/", Address("host", 80, "/a/b"), "http://host:80/a/b"),
        ("host:80/proxy", Address("host", 80, "/proxy"), "http://host:80/proxy"),
        ("[::1]:8000", Address("::1", 8000, ""), "http://[::1]:8000"),
        ("https://host:80/a", Address("host", 80, "/a", "https"), "https://host:80/a"),
        ("https://[::1]:80", Address("::1", 80, "", "https"), "https://[::1]:80"),
        ("http://[fe80::1]:8000/x", Address("fe80::1", 8000, "/x"), "http://[fe80::1]:8000/x"),
    ],
)
def test_an_address_is_host_and_port_or_a_url(text: str, address: Address, url: str) -> None:
    assert Address.parse(text) == address
    assert address.url == url
    assert Address.parse(url) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        ":80",
        "host:",
        "host:port",
        "host:99999",
        "ftp://host:80",
        "https://host",
        "http://host",
        "[::1",
    ],
)
def test_what_is_no_address_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Address.parse(text)
    assert str(caught.value) == (
        f"{text!r} is not the address of a server; give HOST:PORT or @STATE/server.json"
    )


@pytest.mark.parametrize("kind", [WorkClient, AsyncWorkClient])
def test_a_client_refuses_a_wrong_address_when_it_is_made(kind: Any) -> None:
    with pytest.raises(UsageError):
        kind("nowhere")


# --- a server of scripted replies ---------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[Script]:
    with scripted() as script:
        yield script


@pytest.fixture
def moved() -> Iterator[Script]:
    """Return the server that the first one moved to."""
    with scripted() as script:
        yield script


@pytest.fixture(autouse=True)
def no_token_of_this_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPATCHER_TOKEN", raising=False)


EVERY_CALL: list[Callable[[Any], Any]] = [
    lambda client: client.get_work(2),
    lambda client: client.submit_results([WorkItem(0, "c", "{}")]),
    lambda client: client.release_work([1]),
    lambda client: client.heartbeat(HeartbeatRequest("w")),
]


def every(client: Any) -> list[Any]:
    return [call(client) for call in EVERY_CALL]


def nothing_listens() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


# --- what is sent -------------------------------------------------------------------------------


@both
def test_a_call_for_work_says_who_asks_for_how_much_and_how_long(
    send: Send, server: Script
) -> None:
    server.replies = [
        (200, b'{"status": "OK", "items": [{"work_id": 3, "content": "x", "later": 1}]}')
    ]

    [reply] = send(f"http://{server.address}/prefix", lambda c: [c.get_work(5, 2.5)])

    assert server.calls == [("GET", "/prefix/work?batch_size=5&worker=w%201&wait=2.5", b"")]
    assert reply == BatchWorkResponse(WorkStatus.OK, None, [WorkItem(3, "x")])


@both
def test_results_carry_the_worker_and_the_want_for_more(send: Send, server: Script) -> None:
    server.replies = [
        (
            200,
            b'{"status": "OK", "count": 1, "outcomes": ["accepted", "wrong_run"],'
            b' "work": {"status": "retry", "retry_in": 3}}',
        )
    ]
    items = [WorkItem(0, "c", '{"ü": 1}', run="r", lease="0.1"), WorkItem(1, "d", "{}")]

    [reply] = send(server.address, lambda c: [c.submit_results(items, want=7)])

    assert server.calls[0][:2] == ("POST", "/results")
    assert (server.sent["worker"], server.sent["want"]) == ("w 1", 7)
    first = server.sent["items"][0]
    assert (first["work_id"], first["result"], first["run"], first["lease"]) == (
        *(0, '{"ü": 1}'),
        *("r", "0.1"),
    )
    assert reply == BatchResultResponse(
        WorkStatus.OK,
        1,
        [Outcome.ACCEPTED, Outcome.WRONG_RUN],
        BatchWorkResponse(WorkStatus.RETRY, 3.0),
    )


@both
def test_releases_go_by_id_or_one_by_one_with_lease_and_charge(send: Send, server: Script) -> None:
    server.replies = [(200, b'{"status": "OK", "released_count": 2}')]
    item = ReleaseItem(4, "4.2", False, "stopped")

    [reply] = send(server.address, lambda c: [c.release_work([9], [item])])

    assert server.calls[0][:2] == ("POST", "/release")
    assert server.sent == {
        "work_ids": [9],
        "items": [{"work_id": 4, "lease": "4.2", "charge": False, "reason": "stopped"}],
        "worker": "w 1",
    }
    assert reply == ReleaseWorkResponse(WorkStatus.OK, 2)


@both
def test_a_crash_may_ask_for_new_leases_and_is_told_which(send: Send, server: Script) -> None:
    grant = b'{"work_id": 4, "lease": "4.2", "renewed": "4.7", "attempt": 1}'
    server.replies = [
        (200, b'{"status": "OK", "released_count": 1, "renewed": [' + grant + b"]}"),
        (200, b'{"status": "OK", "released_count": 1}'),
    ]
    item = ReleaseItem(4, "4.2", False, "crash", renew=True)

    renewed, of_an_older_server = send(
        server.address, lambda c: [c.release_work(items=[item]) for _ in range(2)]
    )

    assert server.sent["items"] == [
        {"work_id": 4, "lease": "4.2", "charge": False, "reason": "crash", "renew": True}
    ]
    assert renewed.renewed == [RenewedLease(4, "4.2", "4.7", 1)]
    assert not of_an_older_server.renewed


@both
def test_a_heartbeat_names_what_is_held_and_brings_the_verdict(send: Send, server: Script) -> None:
    server.replies = [(200, b'{"status": "OK", "lease_term_s": 12, "done": ["0.1"]}')]
    request = HeartbeatRequest("w", {"0.1": 3}, "down", 0.5)

    [reply] = send(server.address, lambda c: [c.heartbeat(request)])

    assert server.calls[0][:2] == ("POST", "/heartbeat")
    assert server.sent == {"worker": "w", "held": {"0.1": 3}, "backend": "down", "lag_s": 0.5}
    assert reply == HeartbeatResponse(WorkStatus.OK, 12.0, ["0.1"])


@both
def test_status_is_the_servers_object(send: Send, server: Script) -> None:
    server.replies = [(200, b'{"done": 3, "any": [1]}')]
    assert send(server.address, lambda c: [c.status()]) == [{"done": 3, "any": [1]}]
    assert server.calls[0][:2] == ("GET", "/status")


@both
def test_a_result_with_half_a_surrogate_pair_is_sent_as_an_escape(
    send: Send, server: Script
) -> None:
    server.replies = [(200, b'{"status": "OK"}')]
    items = [WorkItem(0, "c", '{"x": "\ud83d"}', lease="0.1"), WorkItem(1, "d", '{"y": "ü"}')]

    send(server.address, lambda c: [c.submit_results(items, want=2)])

    assert server.calls[0][2].isascii()
    assert [item["result"] for item in server.sent["items"]] == ['{"x": "\ud83d"}', '{"y": "ü"}']
    assert server.sent["items"][0]["lease"] == "0.1"
    assert (server.sent["want"], server.sent["worker"]) == (2, "w 1")


@both
def test_a_release_whose_reason_holds_half_a_surrogate_pair_is_sent(
    send: Send, server: Script
) -> None:
    server.replies = [(200, b'{"status": "OK", "released_count": 1}')]
    item = ReleaseItem(0, "0.1", True, "task_exception: ValueError: half a \ud83d")

    [reply] = send(server.address, lambda c: [c.release_work(items=[item])])

    assert reply.released_count == 1
    assert server.sent["items"][0]["reason"].startswith("task_exception: ValueError: half a ")


# --- replies that are none ----------------------------------------------------------------------


@both
def test_a_server_that_is_not_there_is_an_answer(send: Send) -> None:
    replies = send(nothing_listens(), every)
    assert [reply.status for reply in replies] == [AWAY] * 4
    assert send(nothing_listens(), lambda c: [c.status()]) == [{}]


@both
@pytest.mark.parametrize("status", [500, 502, 503, 507])
def test_a_server_that_cannot_answer_now_is_away(send: Send, status: int, server: Script) -> None:
    server.replies = [(status, b'{"message": "the disk is full"}')]
    assert [reply.status for reply in send(server.address, every)] == [AWAY] * 4


@both
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"<html>", b"[]", b'{"status": "no such"}', b'{"status": 3}', b"\xff", b"null"],
)
def test_a_reply_that_is_not_the_protocols_is_a_server_that_is_away(
    send: Send, body: bytes, server: Script
) -> None:
    server.replies = [(200, body)]
    assert [reply.status for reply in send(server.address, every)] == [AWAY] * 4


@both
@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"no HTTP at all\r\n\r\n",
        b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"status": "OK"}',
    ],
    ids=["nothing", "noise", "cut off"],
)
def test_a_connection_that_ends_early_is_a_server_that_is_away(
    send: Send, reply: bytes, server: Script
) -> None:
    server.replies = [(0, reply)]
    assert [reply.status for reply in send(server.address, every)] == [AWAY] * 4


@both
def test_a_server_that_takes_too_long_is_away(send: Send, server: Script) -> None:
    server.replies = [(200, b'{"status": "OK"}')]
    server.delay_s = 1.5
    start = time.monotonic()

    [reply] = send(server.address, lambda c: [c.get_work()], timeout_s=0.1)

    assert reply.status is AWAY
    assert time.monotonic() - start < 1.2


@both
def test_a_release_that_renews_leases_waits_less_long_for_its_reply(
    send: Send, server: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "RENEW_TIMEOUT_S", 0.1)
    server.replies = [(200, b'{"status": "OK"}')]
    server.delay_s = 1.5
    plain = ReleaseItem(4, "4.2", False, "crash")
    renewing = ReleaseItem(5, "5.2", False, "crash", renew=True)

    def release(*items: ReleaseItem) -> tuple[WorkStatus, bool]:
        start = time.monotonic()
        [reply] = send(server.address, lambda c: [c.release_work(items=iter(items))])
        return reply.status, time.monotonic() - start < 1.2

    assert release(plain) == (WorkStatus.OK, False)
    assert release(plain, renewing) == (AWAY, True)


@both
def test_a_call_that_waits_for_work_may_take_so_much_longer(send: Send, server: Script) -> None:
    server.replies = [(200, b'{"status": "all_work_complete"}')]
    server.delay_s = 0.3

    [reply] = send(server.address, lambda c: [c.get_work(1, 5.0)], timeout_s=0.1)

    assert reply.status is WorkStatus.ALL_WORK_COMPLETE


@both
def test_an_older_server_without_a_call_is_done_without(send: Send, server: Script) -> None:
    server.replies = [(404, b"404: Not Found")]

    work, results, releases, heartbeat = send(server.address, every)

    assert work.status is WorkStatus.ALL_WORK_COMPLETE
    assert results.status is releases.status is AWAY
    assert heartbeat.status is WorkStatus.OK
    assert (heartbeat.done, heartbeat.back) == ([], [])


# --- refusals -----------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("status", [400, 405, 413, 422])
@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"message": "batch_size must be 1 to 4096"}', "batch_size must be 1 to 4096"),
        (b"plain text", "plain text"),
        (b"", "no reason given"),
        (b'["no object"]', '["no object"]'),
    ],
)
def test_a_refusal_is_raised_with_the_servers_sentence(
    send: Send, status: int, body: bytes, said: str, server: Script
) -> None:
    server.replies = [(status, body)]
    with pytest.raises(BadRequestError) as caught:
        send(server.address, lambda c: [c.submit_results([])])
    assert str(caught.value) == f"the server refused POST /results: {said}"


@both
@pytest.mark.parametrize("status", [408, 425, 429])
def test_a_call_to_be_tried_again_later_is_no_refusal(
    send: Send, status: int, server: Script
) -> None:
    server.replies = [(status, b'{"message": "later"}')]
    assert [reply.status for reply in send(server.address, every)] == [AWAY] * 4


@both
@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_wants_another_token_is_an_error_that_says_what_to_give(
    send: Send, status: int, server: Script
) -> None:
    server.replies = [(status, b'{"message": "no entry"}')]
    with pytest.raises(AccessDeniedError) as caught:
        send(server.address, lambda c: [c.submit_results([])], token=TOKEN)
    for words in ("POST /results: no entry", "@STATE/server.json", "--token-file", "DISPATCHER_"):
        assert words in str(caught.value)
    assert TOKEN not in str(caught.value)


@both
def test_after_a_refusal_the_client_goes_on(send: Send, server: Script) -> None:
    server.replies = [(400, b"no"), (200, b'{"status": "OK"}')]

    def calls(client: Any) -> list[Any]:
        if isinstance(client, WorkClient):
            with pytest.raises(BadRequestError):
                client.get_work()
            return [client.get_work()]
        return [_refused(client), client.get_work()]

    async def _refused(client: AsyncWorkClient) -> None:
        with pytest.raises(BadRequestError):
            await client.get_work()

    assert send(server.address, calls)[-1].status is WorkStatus.OK


# --- tokens, and servers that move --------------------------------------------------------------

OK = (200, b'{"status": "OK"}')


def announce(
    path: Path, server: Script | str, token: str | None = TOKEN, state: str = "running"
) -> None:
    """Write the server.json of a server."""
    address = server if isinstance(server, str) else server.address
    write_server_file(path, ServerFile(f"http://{address}", token, "run", 1, 1, state))


@both
def test_a_token_goes_with_every_call(send: Send, server: Script) -> None:
    server.replies = [OK]
    send(server.address, every, token=TOKEN)
    assert server.tokens == [f"Bearer {TOKEN}"] * 4


@both
def test_without_a_token_none_is_sent(send: Send, server: Script) -> None:
    server.replies = [OK]
    send(server.address, every)
    assert server.tokens == [None] * 4


@both
def test_the_token_comes_from_the_environment_unless_it_is_given(
    send: Send, server: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISPATCHER_TOKEN", OTHER)
    server.replies = [OK]
    send(server.address, lambda c: [c.get_work()])
    send(server.address, lambda c: [c.get_work()], token=TOKEN)
    assert server.tokens == [f"Bearer {OTHER}", f"Bearer {TOKEN}"]


@pytest.mark.parametrize("kind", [WorkClient, AsyncWorkClient])
@pytest.mark.parametrize(
    "token", ["short", "x" * 2000, "a b" * 20, "x" * 20 + "\r\nX: y", "ä" * 20]
)
def test_what_is_no_token_is_refused_and_not_shown(kind: Any, token: str) -> None:
    with pytest.raises(UsageError, match="the token must be") as caught:
        kind("host:1", token=token)
    assert token not in str(caught.value)


@both
def test_a_path_leads_to_the_server_and_its_token(
    send: Send, server: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(tmp_path / "server.json", server)
    monkeypatch.setenv("DISPATCHER_TOKEN", OTHER)  # of another run: the file knows better
    server.replies, server.wants = [OK], TOKEN
    for address in (f"@{tmp_path / 'server.json'}", f"@{tmp_path}"):
        assert [reply.status for reply in send(address, every)] == [WorkStatus.OK] * 4


@both
def test_a_server_without_a_token_needs_none(send: Send, server: Script, tmp_path: Path) -> None:
    announce(tmp_path / "server.json", server, token=None)
    server.replies = [OK]
    send(f"@{tmp_path}", lambda c: [c.get_work()])
    assert server.tokens == [None]


@both
def test_a_server_that_is_not_there_yet_is_a_server_that_is_away(
    send: Send, server: Script, tmp_path: Path
) -> None:
    path = tmp_path / "state" / "server.json"
    server.replies = [OK]

    assert [r.status for r in send(f"@{path}", every)] == [AWAY] * 4
    path.parent.mkdir()
    assert send(f"@{path}", lambda c: [c.get_work()])[0].status is AWAY
    announce(path, server)
    assert send(f"@{path}", lambda c: [c.get_work()])[0].status is WorkStatus.OK


def test_a_client_waits_for_its_server_to_come(server: Script, tmp_path: Path) -> None:
    server.replies = [OK]
    with WorkClient(f"@{tmp_path}") as client:
        assert client.get_work().status is AWAY
        announce(tmp_path / "server.json", server)
        assert client.get_work().status is WorkStatus.OK


@pytest.mark.parametrize("moved_by", ["another port", "another token", "another program there"])
@both
def test_a_call_follows_a_server_that_moved(
    send: Send, moved_by: str, server: Script, moved: Script, tmp_path: Path
) -> None:
    path = tmp_path / "server.json"
    server.replies, moved.replies = [OK], [OK]
    server.wants, server.hangs_up = TOKEN, moved_by == "another port"
    announce(path, server)

    def move() -> None:
        if moved_by == "another token":
            server.wants = OTHER
            announce(path, server, OTHER)
            return
        if moved_by == "another program there":
            server.wants, server.replies = None, [(404, b"")]
        else:
            server.shutdown()
            server.server_close()
        moved.wants = OTHER
        announce(path, moved, OTHER)

    def calls(client: Any) -> list[Any]:
        if isinstance(client, WorkClient):
            first = client.get_work()
            move()
            return [first, *every(client)]
        return [client.get_work(), _now(move), *every(client)]

    states = [reply.status for reply in send(f"@{path}", calls) if reply is not None]

    assert states == [WorkStatus.OK] * 5
    last = server if moved_by == "another token" else moved
    assert last.tokens[-1] == f"Bearer {OTHER}"


async def _now(action: Callable[[], None]) -> None:
    await asyncio.to_thread(action)


@both
def test_a_server_that_did_not_move_is_asked_once(
    send: Send, server: Script, tmp_path: Path
) -> None:
    announce(tmp_path / "server.json", server)
    server.replies = [(401, b"{}")]
    with pytest.raises(AccessDeniedError):
        send(f"@{tmp_path}", lambda c: [c.get_work()])
    assert len(server.calls) == 1


@both
def test_a_server_that_left_its_run_complete_has_no_more_work(send: Send, tmp_path: Path) -> None:
    announce(tmp_path / "server.json", nothing_listens(), state="complete")
    work, results, released, _ = send(f"@{tmp_path}", every)
    assert work.status is WorkStatus.ALL_WORK_COMPLETE
    assert (results.status, released.status) == (AWAY, AWAY)
    announce(tmp_path / "server.json", nothing_listens(), state="stopped")
    assert send(f"@{tmp_path}", lambda c: [c.get_work()])[0].status is AWAY


@both
def test_a_file_that_others_can_read_is_not_used(
    send: Send, server: Script, tmp_path: Path
) -> None:
    announce(tmp_path / "server.json", server)
    (tmp_path / "server.json").chmod(0o640)
    with pytest.raises(UsageError, match="chmod 600"):
        send(f"@{tmp_path}", lambda c: [c.get_work()])
    assert server.calls == []


@pytest.mark.parametrize("kind", [WorkClient, AsyncWorkClient])
def test_an_at_sign_alone_names_no_file(kind: Any) -> None:
    with pytest.raises(UsageError, match=r"server\.json"):
        kind("@")


# --- connections --------------------------------------------------------------------------------


@both
def test_a_connection_is_kept_for_the_next_call(send: Send, server: Script) -> None:
    server.replies = [(200, b'{"status": "OK"}')]
    send(server.address, lambda c: [*every(c), *every(c)])
    assert len(server.calls) == 8
    assert server.connections == 1


@pytest.mark.parametrize("call", EVERY_CALL)
def test_a_kept_connection_that_the_server_closed_is_replaced_by_a_fresh_one(
    call: Callable[[Any], Any], server: Script
) -> None:
    server.replies = [(200, b'{"status": "OK"}')]
    server.hangs_up = True  # after each reply, although it lets the client think otherwise
    with WorkClient(server.address) as client:
        for _ in range(3):
            assert call(client).status is WorkStatus.OK
            time.sleep(0.02)  # the end of the connection arrives

    assert server.connections == 3
    assert len(server.calls) == 3


def test_a_kept_connection_to_a_server_that_is_gone_is_a_server_that_is_away() -> None:
    script = Script()
    script.replies = [(200, b'{"status": "OK"}')]
    script.hangs_up = True
    thread = threading.Thread(target=script.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    with WorkClient(script.address) as client:
        assert client.get_work().status is WorkStatus.OK
        script.shutdown()
        script.server_close()
        thread.join(5)
        assert client.get_work().status is AWAY
        assert client.get_work().status is AWAY


@both
def test_a_server_that_came_back_is_served_again(send: Send, server: Script) -> None:
    # Three times, because the blocking client tries a kept connection's call once more.
    server.replies = [(200, b'{"status": "OK"}'), *[(0, b"")] * 3, (200, b'{"status": "OK"}')]

    replies = send(server.address, _five_heartbeats)

    states = [reply.status for reply in replies]
    assert states[0] is states[-1] is WorkStatus.OK
    assert AWAY in states


def _five_heartbeats(client: Any) -> list[Any]:
    return [client.heartbeat(HeartbeatRequest("w")) for _ in range(5)]


def test_threads_may_share_a_client(server: Script) -> None:
    server.replies = [(200, b'{"status": "OK"}')]
    ends: list[WorkStatus] = []
    with WorkClient(server.address) as client:

        def ask() -> None:
            ends.extend(client.get_work().status for _ in range(25))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)

    assert ends == [WorkStatus.OK] * 200
    assert server.connections == 1


@both
def test_proxy_variables_never_apply(
    send: Send, server: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    server.replies = [(200, b'{"status": "OK"}')]
    assert [reply.status for reply in send(server.address, every)] == [WorkStatus.OK] * 4


@both
def test_a_redirect_is_not_followed(send: Send, server: Script) -> None:
    server.replies = [(302, b"")]
    assert send(server.address, lambda c: [c.get_work()])[0].status is AWAY
    assert len(server.calls) == 1


def test_closing_twice_or_unused_is_harmless() -> None:
    client = WorkClient("127.0.0.1:9")
    client.close()
    client.close()

    async def scenario() -> None:
        client = AsyncWorkClient("127.0.0.1:9")
        await client.close()
        await client.close()

    asyncio.run(scenario())
