"""Connections have limits: how many, how long a request's header and body may take, how idle."""

from __future__ import annotations

import asyncio
import json
import resource
import ssl
import time
from contextlib import suppress
from pathlib import Path

import pytest

from dispatcher.client import AsyncWorkClient, WorkClient
from dispatcher.errors import AccessDeniedError
from dispatcher.models import WorkItem, WorkStatus
from dispatcher.server import connections
from dispatcher.server.access import BODY_BYTES, Gate
from dispatcher.server.connections import ConnectionLimits, raise_file_limit
from dispatcher.server.tls import Tls, own_tls
from tests.support import serving
from tests.support.serving import LONG_S, QUICK, SOON_S, Running, head, run

TOKEN = "t" * 43
HEALTH = head("GET", "/healthz")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return own_tls(tmp_path_factory.mktemp("tls"))


@pytest.fixture(autouse=True, params=["plain", "tls"])
def spoken(
    request: pytest.FixtureRequest, certificate: Tls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run every test of this file without TLS and with it."""
    if request.param == "tls":
        monkeypatch.setattr(serving, "TLS", certificate)
        monkeypatch.setenv("DISPATCHER_FINGERPRINT", certificate.fingerprint)


# --- time ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent", [b"", b"G", head("GET", "/healthz")[:-2], head("GET", "/" + "x" * 3000)[:-1]]
)
def test_who_does_not_send_a_whole_header_in_time_is_hung_up_on(
    sent: bytes, tmp_path: Path
) -> None:
    async def scenario(server: Running) -> None:
        peer = await server.connect()
        peer.send(sent)
        assert 0.3 < await peer.closed_after() < SOON_S
        assert server.open_connections() == 0

    run(tmp_path, scenario)


def test_a_header_that_comes_in_drops_has_no_more_time_than_one_that_does_not(
    tmp_path: Path,
) -> None:
    async def scenario(server: Running) -> None:
        peer = await server.connect()
        peer.send(b"GET /")
        start = time.monotonic()

        async def drip() -> None:
            while True:
                peer.send(b"x")
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        await peer.closed_after()
        dripping.cancel()
        assert time.monotonic() - start < SOON_S

    run(tmp_path, scenario)


def test_a_header_has_its_time_on_a_kept_connection_too(tmp_path: Path) -> None:
    limits = ConnectionLimits(header_s=0.3, idle_s=60.0)

    async def scenario(server: Running) -> None:
        peer = await server.connect()
        for _ in range(2):
            peer.send(HEALTH)
            assert (await peer.reply())[0] == 200
            await asyncio.sleep(0.5)  # idle for longer than a header may take
        peer.send(HEALTH[:9])
        assert 0.2 < await peer.closed_after() < SOON_S

    run(tmp_path, scenario, limits)


def test_an_idle_connection_is_closed(tmp_path: Path) -> None:
    limits = ConnectionLimits(header_s=60.0, idle_s=0.4)

    async def scenario(server: Running) -> None:
        peer = await server.connect()
        for _ in range(4):
            peer.send(HEALTH)
            assert (await peer.reply())[0] == 200
            await asyncio.sleep(0.15)
        assert 0.1 < await peer.closed_after() < SOON_S

    run(tmp_path, scenario, limits)


def test_clients_of_ours_do_not_notice_that_they_were_idle_for_too_long(tmp_path: Path) -> None:
    async def scenario(server: Running) -> None:
        blocking = WorkClient(server.address)
        with_loop = AsyncWorkClient(server.address)
        for _ in range(3):
            for reply in (await asyncio.to_thread(blocking.status), await with_loop.status()):
                assert reply["state"] == "running"
            await server.has_connections(0)
        blocking.close()
        await with_loop.close()

    run(tmp_path, scenario)


def test_a_call_that_waits_for_work_is_not_cut(tmp_path: Path) -> None:
    async def scenario(server: Running) -> None:
        client = AsyncWorkClient(server.address, "w")
        assert len((await client.get_work(3)).items) == 3
        start = time.monotonic()
        reply = await client.get_work(1, wait_s=1.5)
        assert reply.status is WorkStatus.RETRY
        assert time.monotonic() - start >= 1.5
        assert server.open_connections() == 1
        await client.close()

    run(tmp_path, scenario)


@pytest.mark.parametrize("path", ["/results", "/release", "/heartbeat", "/work_timeout"])
@pytest.mark.parametrize("drips", [False, True])
def test_a_body_that_does_not_arrive_in_time_is_answered_408(
    path: str, drips: bool, tmp_path: Path
) -> None:
    async def scenario(server: Running) -> None:
        peer = await server.connect()
        start = time.monotonic()
        peer.send(head("POST", path, "Content-Length: 1000") + b'{"items"')

        async def drip() -> None:
            while drips:
                peer.send(b" ")
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        status, headers, body = await peer.reply()
        dripping.cancel()
        assert status == 408
        assert headers["connection"] == "close"
        assert "took too long" in body["message"]
        assert 0.3 < time.monotonic() - start < SOON_S
        assert await peer.closed_after() < SOON_S

    run(tmp_path, scenario)


def test_a_body_that_takes_its_time_within_the_limit_is_read(tmp_path: Path) -> None:
    async def scenario(server: Running) -> None:
        peer = await server.connect()
        body = json.dumps({"worker": "w", "held": {}}).encode()
        peer.send(head("POST", "/heartbeat", f"Content-Length: {len(body)}"))
        for byte in body:
            peer.send(bytes([byte]))
            await asyncio.sleep(0.005)
        assert (await peer.reply())[0] == 200

    run(tmp_path, scenario)


def read_slowly(server: Running, request: bytes) -> bytes:
    """Return everything until the server hangs up.

    Not by asyncio's streams: over TLS they drop what they hold when the other end hangs up.
    """
    got = b""
    with server.connect_blocking() as peer, suppress(ssl.SSLEOFError):
        peer.settimeout(LONG_S)
        peer.sendall(request)
        while part := peer.recv(1 << 18):
            got += part
            time.sleep(len(part) / 6e6)  # 6 MB/s
    return got


def test_an_answer_that_is_read_slowly_is_read_to_its_end(tmp_path: Path) -> None:
    # Given an answer that does not fit into the sockets' buffers, which take some 7 MB
    (tmp_path / "in.jsonl").write_text(f'"{"x" * 3_000_000}"\n' * 6)

    async def scenario(server: Running) -> None:
        # When it is read for longer than a connection may be idle
        got = await asyncio.to_thread(read_slowly, server, head("GET", "/work?batch_size=6"))
        # Then the server hangs up on nothing that was not read yet
        header, _, body = got.partition(b"\r\n\r\n")
        assert f"content-length: {len(body)}\r\n".encode() in header.lower() + b"\r\n"
        assert len(body) > 18_000_000

    # Far above what the kernel takes to tell the server of what was read: it does so by the MB.
    run(tmp_path, scenario, ConnectionLimits(idle_s=1.0))


# --- numbers and sizes --------------------------------------------------------------------------


def test_connections_above_the_limit_are_closed_at_once_and_the_others_live(
    tmp_path: Path,
) -> None:
    async def scenario(server: Running) -> None:
        peers = [await server.connect() for _ in range(4)]
        for peer in peers:
            peer.send(HEALTH)
            assert (await peer.reply())[0] == 200
        for _ in range(3):
            assert await (await server.connect()).closed_after() < SOON_S
        assert server.open_connections() == 4
        for peer in peers:
            peer.send(HEALTH)
            assert (await peer.reply())[0] == 200
        # And room that was made is used
        peers[0].close()
        await server.has_connections(3)
        late = await server.connect()
        late.send(HEALTH)
        assert (await late.reply())[0] == 200

    run(tmp_path, scenario, ConnectionLimits(max_connections=4))


def test_a_client_that_found_no_room_says_that_the_server_is_away(tmp_path: Path) -> None:
    async def scenario(server: Running) -> None:
        peer = await server.connect()
        peer.send(HEALTH)
        await peer.reply()
        with WorkClient(server.address) as client:
            reply = await asyncio.to_thread(client.get_work)
            assert reply.status is WorkStatus.SERVER_UNAVAILABLE

    run(tmp_path, scenario, ConnectionLimits(max_connections=1))


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\nHost: h\r\n\r\n",
        head("GET", "/healthz", "X-Long: " + "x" * 10_000),
        head("GET", "/healthz", "x" * 10_000 + ": 1"),
    ],
)
def test_a_header_that_is_too_large_is_refused(sent: bytes, tmp_path: Path) -> None:
    async def scenario(server: Running) -> None:
        peer = await server.connect()
        peer.send(sent)
        assert (await peer.reply())[0] in (400, 414, 431)
        assert await peer.closed_after() < SOON_S

    run(tmp_path, scenario)


def test_a_header_without_end_is_not_kept_in_memory(tmp_path: Path) -> None:
    async def scenario(server: Running) -> None:
        peer = await server.connect()
        peer.send(b"GET / HTTP/1.1\r\n")
        with pytest.raises(ConnectionError):
            await peer.keep_sending(b"X-More: " + b"x" * 1000 + b"\r\n", 0)

    run(tmp_path, scenario, ConnectionLimits())


@pytest.mark.parametrize("expect", [[], ["Expect: 100-continue"]])
def test_a_body_that_is_too_large_is_refused_before_it_is_sent(
    expect: list[str], tmp_path: Path
) -> None:
    async def scenario(server: Running) -> None:
        peer = await server.connect()
        peer.send(head("POST", "/results", f"Content-Length: {BODY_BYTES + 1}", *expect))
        status, headers, body = await peer.reply()
        assert (status, headers["connection"]) == (413, "close")
        assert "64 MiB" in body["message"]
        assert await peer.closed_after() < SOON_S

    run(tmp_path, scenario)


def test_a_body_of_unknown_length_that_is_too_large_is_refused(tmp_path: Path) -> None:
    chunk = b"%x\r\n" % (1 << 20) + b" " * (1 << 20) + b"\r\n"

    async def scenario(server: Running) -> None:
        peer = await server.connect()
        peer.send(head("POST", "/results", "Transfer-Encoding: chunked"))
        answering = asyncio.create_task(peer.reply())
        for _ in range(70):
            if answering.done():
                break
            peer.send(chunk)
            try:
                await peer._writer.drain()
            except ConnectionError:
                break
        assert (await answering)[0] == 413

    run(tmp_path, scenario, ConnectionLimits())


# --- who may speak ------------------------------------------------------------------------------


def test_the_token_is_looked_at_before_the_body_is_there(tmp_path: Path) -> None:
    async def scenario(server: Running) -> None:
        for expect in ([], ["Expect: 100-continue"]):
            for header, status in (("X: y", 401), ("Authorization: Bearer nonsense", 401)):
                peer = await server.connect()
                length = f"Content-Length: {BODY_BYTES}"
                peer.send(head("POST", "/results", length, header, *expect))
                got, headers, body = await peer.reply()
                assert (got, headers["www-authenticate"]) == (status, "Bearer")
                assert headers["connection"] == "close"
                assert "token" in body["message"]
                assert await peer.closed_after() < SOON_S

    run(tmp_path, scenario, QUICK, Gate(TOKEN, "a" * 43))


def test_who_sends_a_large_body_without_a_token_is_not_read_for_long(tmp_path: Path) -> None:
    async def scenario(server: Running) -> None:
        peer = await server.connect()
        peer.send(head("POST", "/results", f"Content-Length: {BODY_BYTES}"))
        assert (await peer.reply())[0] == 401
        with pytest.raises(ConnectionError):
            await peer.keep_sending(b" ", 0.05)

    run(tmp_path, scenario, ConnectionLimits(linger_s=0.2), Gate(TOKEN))


def test_a_client_with_a_wrong_token_hears_so_even_while_it_sends_a_large_body(
    tmp_path: Path,
) -> None:
    async def scenario(server: Running) -> None:
        items = [WorkItem(n, "x" * (1 << 20), "1") for n in range(40)]
        with (
            WorkClient(server.address, token="wrong" * 5) as client,
            pytest.raises(AccessDeniedError, match="/results"),
        ):
            await asyncio.to_thread(client.submit_results, items)

    run(tmp_path, scenario, ConnectionLimits(), Gate(TOKEN))


def test_a_client_that_may_speak_is_asked_for_the_body_it_holds_back(tmp_path: Path) -> None:
    async def scenario(server: Running) -> None:
        peer = await server.connect()
        body = b'{"worker": "w"}'
        auth = f"Authorization: Bearer {TOKEN}"
        length = f"Content-Length: {len(body)}"
        peer.send(head("POST", "/heartbeat", auth, length, "Expect: 100-continue"))
        async with asyncio.timeout(LONG_S):
            line = await peer._reader.readuntil(b"\r\n\r\n")
        assert line.startswith(b"HTTP/1.1 100")
        peer.send(body)
        assert (await peer.reply())[0] == 200

    run(tmp_path, scenario, ConnectionLimits(), Gate(TOKEN))


# --- descriptors --------------------------------------------------------------------------------


class Limits:
    """A process's limit on open files, to be changed without changing this one's."""

    RLIMIT_NOFILE, RLIM_INFINITY = resource.RLIMIT_NOFILE, resource.RLIM_INFINITY

    def __init__(self, soft: int, hard: int) -> None:
        self.now = (soft, hard)

    def getrlimit(self, _: int) -> tuple[int, int]:
        return self.now

    def setrlimit(self, _: int, limits: tuple[int, int]) -> None:
        self.now = limits


@pytest.mark.parametrize(
    ("soft", "hard", "possible", "soft_then"),
    [
        (1024, 1 << 20, 8192, 8192 + 128),
        (1 << 20, 1 << 20, 8192, 1 << 20),
        (1024, 4096, 4096 - 128, 4096),
        (1024, -1, 8192, 8192 + 128),
        (-1, -1, 8192, -1),
        (64, 64, 1, 64),
    ],
)
def test_the_limit_on_open_files_is_raised_as_far_as_it_goes(
    soft: int, hard: int, possible: int, soft_then: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits(soft, hard)
    monkeypatch.setattr(connections, "resource", limits)
    assert raise_file_limit(8192) == possible
    assert limits.now == (soft_then, hard)
