"""TLS: the server's certificate, who is spoken to, and that a squatter on its port gets nothing."""

from __future__ import annotations

import asyncio
import http.client
import logging
import os
import re
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dispatcher import client as client_module
from dispatcher.client import AsyncWorkClient, WorkClient
from dispatcher.config import parse
from dispatcher.errors import AccessDeniedError, DispatcherError, UsageError
from dispatcher.models import HeartbeatRequest, StepItem, WorkItem, WorkStatus
from dispatcher.server import tls
from dispatcher.server.access import Gate
from dispatcher.server.cli import build_parser
from dispatcher.server.connections import ConnectionLimits
from dispatcher.server.tls import Tls, given_tls, own_tls
from dispatcher.server_file import ServerFile, read_server_file, write_private, write_server_file
from tests.support import serving
from tests.support.processes import Server, dispatcher_server, run_python, running, wait_until
from tests.support.scripted import Script, Send, both, scripted
from tests.support.serving import QUICK, SOON_S, Running, head, run
from tests.support.squatter import SQUATTERS, squatting

TOKEN, PROMPT, ANSWER = "t" * 43, "a prompt nobody may see", "an answer nobody may see"
AWAY = WorkStatus.SERVER_UNAVAILABLE
OK = (200, b'{"status": "OK"}')
CHAT = "examples/chat_task.py:ChatTask"


@pytest.fixture(autouse=True)
def nothing_of_this_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPATCHER_TOKEN", "DISPATCHER_FINGERPRINT", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    client_module._say_once.cache_clear()


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    """Return the certificate that server.json names in these tests."""
    return own_tls(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    """Return the certificate of somebody else."""
    return own_tls(tmp_path_factory.mktemp("theirs"))


def no_cryptography(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def openssl(*arguments: str | Path) -> str:
    return subprocess.run(
        ["openssl", *map(str, arguments)], capture_output=True, text=True, timeout=30, check=True
    ).stdout


# --- the server's own certificate ---------------------------------------------------------------


@pytest.fixture(params=[pytest.param("cryptography", marks=pytest.mark.cryptography), "openssl"])
def maker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have certificates made in one of the two ways, and be sure that it is this one."""
    if request.param == "openssl":
        no_cryptography(monkeypatch)
    else:
        monkeypatch.setattr(shutil, "which", lambda _: None)
    return str(request.param)


def test_a_certificate_is_made_once_for_a_run(maker: str, tmp_path: Path) -> None:
    first = own_tls(tmp_path)
    content = (tmp_path / "tls.pem").read_bytes()
    again = own_tls(tmp_path)
    assert re.fullmatch("[0-9a-f]{64}", first.fingerprint)
    assert again.fingerprint == first.fingerprint
    assert (tmp_path / "tls.pem").read_bytes() == content
    (tmp_path / "other").mkdir()
    assert own_tls(tmp_path / "other").fingerprint != first.fingerprint


def test_its_fingerprint_is_what_openssl_says_it_is(maker: str, tmp_path: Path) -> None:
    made = own_tls(tmp_path)
    said = openssl("x509", "-in", tmp_path / "tls.pem", "-noout", "-fingerprint", "-sha256")
    assert said.strip().partition("=")[2].replace(":", "").lower() == made.fingerprint
    text = openssl("x509", "-in", tmp_path / "tls.pem", "-noout", "-text")
    assert "prime256v1" in text
    assert "Subject: CN = dispatcher" in text


def test_the_key_is_its_owners_alone_whatever_the_umask(maker: str, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        own_tls(tmp_path)
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["tls.pem"]
    assert mode_of(tmp_path / "tls.pem") == 0o600
    assert "PRIVATE KEY" in (tmp_path / "tls.pem").read_text()


def test_the_openssl_command_is_given_no_file_to_put_the_key_into(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_cryptography(monkeypatch)
    real = tmp_path / "openssl"
    real.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/given\nexec {shutil.which("openssl")} "$@"\n'
    )
    real.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda _: str(real))
    (tmp_path / "state").mkdir()
    own_tls(tmp_path / "state")
    given = (tmp_path / "given").read_text().splitlines()
    assert given[given.index("-keyout") + 1] == "/dev/stdout"
    assert not [word for word in given if str(tmp_path) in word]


def later(years: int) -> Callable[[], float]:
    at = time.time() + years * 365.25 * 86400
    return lambda: at


@pytest.mark.parametrize("spoilt", ["garbage", "empty", "no key", "key of another", "mode", "old"])
def test_one_that_cannot_be_used_is_made_anew(
    spoilt: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "tls.pem"
    before = own_tls(tmp_path)
    key, _, certificate = path.read_text().partition("-----BEGIN CERTIFICATE")
    if spoilt == "key of another":
        key = tls.new_certificate().decode().partition("-----BEGIN CERTIFICATE")[0]
    certificate = f"-----BEGIN CERTIFICATE{certificate}"
    content = {"garbage": "garbage", "empty": "", "no key": certificate}.get(spoilt)
    write_private(path, (content if content is not None else key + certificate).encode())
    if spoilt == "mode":
        path.chmod(0o640)
    if spoilt == "old":
        monkeypatch.setattr(tls.time, "time", later(9))
        assert own_tls(tmp_path).fingerprint == before.fingerprint
        monkeypatch.setattr(tls.time, "time", later(11))
    assert own_tls(tmp_path).fingerprint != before.fingerprint
    assert mode_of(path) == 0o600


def test_a_link_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / "tls.pem").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="symbolic link"):
        own_tls(tmp_path)
    assert (tmp_path / "elsewhere").read_text() == "precious"


def test_without_anything_to_make_one_with_the_server_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_cryptography(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DispatcherError) as caught:
        own_tls(tmp_path)
    for words in ("cryptography", "openssl", "--tls CERT,KEY", "--tls off"):
        assert words in str(caught.value)


def test_an_openssl_command_that_fails_is_quoted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_cryptography(monkeypatch)
    broken = tmp_path / "openssl"
    broken.write_text("#!/bin/sh\necho more >&2\necho 'no random numbers' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(DispatcherError, match=r"openssl .*\(no random numbers\); install"):
        own_tls(tmp_path)
    assert not (tmp_path / "tls.pem").exists()


# --- a certificate that is given ----------------------------------------------------------------


@pytest.fixture(scope="module")
def files_given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with cert.pem for 127.0.0.1, key.pem, and others that do not fit."""
    directory = tmp_path_factory.mktemp("given")
    made = ("req", "-x509", "-days", "9", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
    name = ("-subj", "/CN=here", "-addext", "subjectAltName=IP:127.0.0.1")
    openssl(
        *made, "-nodes", *name, "-keyout", directory / "key.pem", "-out", directory / "cert.pem"
    )
    locked = ("-keyout", directory / "locked.pem", "-out", directory / "cert-of-locked.pem")
    openssl(*made, "-passout", "pass:secret", *name, *locked)
    (directory / "text.pem").write_text("no certificate at all")
    return directory


def test_a_given_certificate_is_used(files_given: Path) -> None:
    given = given_tls(f"{files_given / 'cert.pem'},{files_given / 'key.pem'}")
    said = openssl("x509", "-in", files_given / "cert.pem", "-noout", "-fingerprint", "-sha256")
    assert given is not None
    assert given.fingerprint == said.strip().partition("=")[2].replace(":", "").lower()


@pytest.mark.parametrize(
    ("certificate", "key", "said"),
    [
        ("nowhere.pem", "key.pem", "cannot read the certificate .*nowhere.pem: No such file"),
        ("cert.pem", "nowhere.pem", "cannot read the key .*nowhere.pem: No such file"),
        (
            "cert-of-locked.pem",
            "key.pem",
            "the key .*key.pem is not that of the certificate .*cert",
        ),
        ("cert-of-locked.pem", "locked.pem", "locked.pem cannot be used .*without a passphrase"),
        ("text.pem", "key.pem", "text.pem holds no certificate"),
        ("key.pem", "key.pem", "key.pem holds no certificate"),
        ("cert.pem", "text.pem", "text.pem cannot be used"),
        ("cert.pem", "", "neither auto, on, off nor CERT,KEY"),
        ("cert.pem", "key.pem,more", "neither auto, on, off nor CERT,KEY"),
    ],
)
def test_a_given_certificate_that_cannot_be_used_is_refused_with_a_sentence(
    certificate: str, key: str, said: str, files_given: Path, tmp_path: Path
) -> None:
    paths = f"{files_given / certificate},{files_given / key if key else ''}"
    code, output = run_python("-m", "dispatcher.server", *files(tmp_path), "--tls", paths)
    assert code == 2, output
    assert output.count("\n") == 1, output
    assert re.search(said, output), output
    assert not (tmp_path / "out.jsonl.dispatch").exists()


# --- when TLS is spoken -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "address", "wanted"),
    [
        ("auto", "127.0.0.1", False),
        ("auto", "127.8.9.1", False),
        ("auto", "::1", False),
        ("auto", "0.0.0.0", True),
        ("auto", "::", True),
        ("auto", "10.1.2.3", True),
        ("auto", "fe80::1%eth0", True),
        ("on", "127.0.0.1", True),
        ("off", "0.0.0.0", False),
        ("/cert,/key", "127.0.0.1", True),
    ],
)
def test_auto_encrypts_what_leaves_the_machine(choice: str, address: str, wanted: bool) -> None:
    assert tls.is_wanted(choice, address) is wanted


@pytest.mark.parametrize(
    ("text", "choice"),
    [("off", "off"), ("on", "on"), ("auto", "auto"), ("/a,/b", "/a,/b")],
)
def test_a_file_of_options_may_say_it_too(text: str, choice: str, tmp_path: Path) -> None:
    config = tmp_path / "options.yaml"
    config.write_text(f"tls: {text}\ninfile: in\noutfile: out\n")
    assert parse(build_parser(), ["--config", str(config)]).tls == choice


def test_paths_of_a_given_certificate_hold_wherever_the_run_is_resumed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--infile", "in", "--outfile", "out", "--tls", "c.pem,k.pem"]
    assert parse(build_parser(), flags).tls == f"{tmp_path}/c.pem,{tmp_path}/k.pem"


# --- who is spoken to ---------------------------------------------------------------------------


def announce(path: Path, address: str, fingerprint: str | None, state: str = "running") -> None:
    """Write the server.json of a server that speaks TLS."""
    content = ServerFile(f"https://{address}", TOKEN, "run", 1, 1, state, fingerprint)
    write_server_file(path, content)


CALLS: list[Callable[[Any], Any]] = [
    lambda client: client.get_work(2),
    lambda client: client.submit_results([WorkItem(0, PROMPT, f'"{ANSWER}"')]),
    lambda client: client.heartbeat(HeartbeatRequest("w")),
    lambda client: client.release_work([1]),
    lambda client: client.record_steps([StepItem(0, "0.1", 1, (0, 0), "h", f'"{ANSWER}"')]),
]


def every(client: Any) -> list[Any]:
    return [call(client) for call in CALLS]


def states(replies: list[Any]) -> list[WorkStatus]:
    return [reply.status for reply in replies if reply is not None]


@pytest.fixture
def server(ours: Tls) -> Iterator[Script]:
    """Return the server that server.json means."""
    with scripted(ours.context) as script:
        script.replies, script.wants = [OK], TOKEN
        yield script


@both
def test_a_path_leads_to_the_certificate_too(
    send: Send, server: Script, ours: Tls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(tmp_path / "server.json", server.address, ours.fingerprint)
    monkeypatch.setenv("DISPATCHER_FINGERPRINT", "0" * 64)  # of another run: the file knows better
    assert states(send(f"@{tmp_path}", every)) == [WorkStatus.OK] * 5
    assert server.connections == 1


@both
@pytest.mark.parametrize("way", ["argument", "variable", "https", "as openssl prints it", "bare"])
def test_a_fingerprint_is_given_in_words(
    send: Send, way: str, server: Script, ours: Tls, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = ":".join(re.findall("..", ours.fingerprint.upper()))
    text = {"as openssl prints it": f"SHA256 Fingerprint={pairs}\n", "bare": pairs}.get(
        way, ours.fingerprint
    )
    address = f"https://{server.address}" if way == "https" else server.address
    options = {"fingerprint": text}
    if way == "variable":
        monkeypatch.setenv("DISPATCHER_FINGERPRINT", text)
        options = {}
    assert states(send(address, every, token=TOKEN, **options)) == [WorkStatus.OK] * 5


@pytest.mark.parametrize("kind", [WorkClient, AsyncWorkClient])
@pytest.mark.parametrize(
    ("address", "text", "said"),
    [
        ("host:1", "abc", "must be a SHA-256 fingerprint, 64 hexadecimal digits, not 'abc'"),
        ("host:1", "0" * 63 + "g", "must be a SHA-256"),
        ("http://host:1", "0" * 64, "http://host:1 is not encrypted"),
        ("@state", "0" * 64, "leave --server-fingerprint out"),
    ],
)
def test_a_fingerprint_that_cannot_be_meant_is_refused(
    kind: Any, address: str, text: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        kind(address, fingerprint=text)


@both
def test_a_certificate_that_the_system_trusts_needs_no_fingerprint(
    send: Send,
    files_given: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = given_tls(f"{files_given / 'cert.pem'},{files_given / 'key.pem'}")
    assert given is not None
    with scripted(given.context) as script:
        script.replies = [OK]
        address = f"https://{script.address}"
        # Before it is trusted, nothing is sent, and the log says why
        assert states(send(address, every, token=TOKEN)) == [AWAY] * 5
        assert script.calls == []
        (record,) = caplog.records
        assert f"does not trust the certificate of {address} (self" in record.getMessage()
        assert "--server-fingerprint" in record.getMessage()
        # And then it is
        monkeypatch.setenv("SSL_CERT_FILE", str(files_given / "cert.pem"))
        assert states(send(address, every, token=TOKEN)) == [WorkStatus.OK] * 5
        assert script.tokens == [f"Bearer {TOKEN}"] * 5
        # But not for another name
        named = f"https://localhost:{script.server_address[1]}"
        assert states(send(named, every, token=TOKEN)) == [AWAY] * 5


# --- squatters ----------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("kind", SQUATTERS)
@pytest.mark.parametrize("known_by", ["server.json", "fingerprint"])
def test_a_squatter_gets_neither_token_nor_prompt(
    send: Send, kind: str, known_by: str, ours: Tls, theirs: Tls, tmp_path: Path
) -> None:
    with squatting(kind, theirs) as squatter:
        if known_by == "server.json":
            announce(tmp_path / "server.json", squatter.address, ours.fingerprint)
            replies = send(f"@{tmp_path}", every, timeout_s=0.4)
        else:
            words = {"token": TOKEN, "fingerprint": ours.fingerprint}
            replies = send(squatter.address, every, **words, timeout_s=0.4)
    assert states(replies) == [AWAY] * 5
    assert squatter.met >= 5
    for secret in (TOKEN, PROMPT, ANSWER, "HTTP/1.1", "Authorization"):
        assert secret.encode() not in squatter.heard
    if kind == "another certificate":
        assert squatter.heard == b""
    else:
        assert squatter.heard[:1] == b"\x16"  # the beginning of TLS, and nothing that follows it


@both
@pytest.mark.parametrize("kind", SQUATTERS)
def test_a_client_that_met_a_squatter_goes_on_where_server_json_says_the_server_is_now(
    send: Send, kind: str, server: Script, ours: Tls, theirs: Tls, tmp_path: Path
) -> None:
    path = tmp_path / "server.json"
    with squatting(kind, theirs) as squatter:
        announce(path, squatter.address, ours.fingerprint)

        def calls(client: Any) -> list[Any]:
            first = client.get_work()
            if isinstance(client, WorkClient):
                announce(path, server.address, ours.fingerprint)
                return [first, *every(client)]
            return [first, come_back(), *every(client)]

        async def come_back() -> None:
            announce(path, server.address, ours.fingerprint)

        replies = send(f"@{path}", calls, timeout_s=1.0)
    assert states(replies) == [AWAY, *[WorkStatus.OK] * 5]
    assert TOKEN.encode() not in squatter.heard


@both
def test_a_run_whose_certificate_is_a_new_one_is_found_again(
    send: Send, server: Script, ours: Tls, theirs: Tls, tmp_path: Path
) -> None:
    # Given a server.json with the certificate from before, that is being written anew
    path = tmp_path / "server.json"
    announce(path, server.address, theirs.fingerprint)

    def calls(client: Any) -> list[Any]:
        first = client.get_work()
        if isinstance(client, WorkClient):
            announce(path, server.address, ours.fingerprint)
            return [first, *every(client)]
        return [first, renewed(), *every(client)]

    async def renewed() -> None:
        announce(path, server.address, ours.fingerprint)

    assert states(send(f"@{path}", calls)) == [AWAY, *[WorkStatus.OK] * 5]


@both
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("another certificate", "shows another certificate"),
        ("plain HTTP", "does not speak TLS"),
    ],
)
def test_the_log_says_once_who_is_there(
    send: Send,
    kind: str,
    said: str,
    ours: Tls,
    theirs: Tls,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with squatting(kind, theirs) as squatter:
        announce(tmp_path / "server.json", squatter.address, ours.fingerprint)
        send(f"@{tmp_path}", every, timeout_s=1.0)
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert f"https://{squatter.address} {said}" in record.getMessage()
    assert "was sent nothing; waiting for the server" in record.getMessage()


@both
def test_a_server_that_is_away_is_no_squatter(
    send: Send, ours: Tls, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    announce(tmp_path / "server.json", address, ours.fingerprint)
    assert states(send(f"@{tmp_path}", every)) == [AWAY] * 5
    assert caplog.records == []
    announce(tmp_path / "server.json", address, ours.fingerprint, state="complete")
    [work] = send(f"@{tmp_path}", lambda client: [client.get_work()])
    assert work.status is WorkStatus.ALL_WORK_COMPLETE


@both
def test_plain_http_is_never_spoken_where_a_certificate_is_named(
    send: Send, ours: Tls, theirs: Tls, tmp_path: Path
) -> None:
    with squatting("plain HTTP", theirs) as squatter:
        url = f"http://{squatter.address}"
        content = ServerFile(url, TOKEN, "run", 1, 1, "running", ours.fingerprint)
        write_server_file(tmp_path / "server.json", content)
        with pytest.raises(UsageError, match="is not https"):
            send(f"@{tmp_path}", lambda client: [client.get_work()])
    assert (squatter.met, squatter.heard) == (0, b"")


# --- connections --------------------------------------------------------------------------------


@pytest.fixture
def with_tls(ours: Tls, monkeypatch: pytest.MonkeyPatch) -> Tls:
    """Have the servers of `run` speak TLS, and our clients know with whom."""
    monkeypatch.setattr(serving, "TLS", ours)
    monkeypatch.setenv("DISPATCHER_FINGERPRINT", ours.fingerprint)
    return ours


def hello() -> bytes:
    """Return what a client of TLS says first."""
    context = ssl.create_default_context()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="host").do_handshake()
    return outgoing.read()


@pytest.mark.parametrize(
    "sent", [b"", b"\x16", hello()[:40], hello()], ids=["nothing", "a byte", "some", "hello"]
)
def test_who_does_not_finish_the_handshake_in_time_is_hung_up_on(
    sent: bytes, with_tls: Tls, tmp_path: Path
) -> None:
    async def scenario(server: Running) -> None:
        peer = await server.connect_plainly()
        start = time.monotonic()
        peer.send(sent)
        await server.has_connections(1)
        await peer.whole_reply()
        assert 0.3 < time.monotonic() - start < SOON_S
        await server.has_connections(0)

    run(tmp_path, scenario)


def test_a_handshake_that_comes_in_drops_has_no_more_time(with_tls: Tls, tmp_path: Path) -> None:
    async def scenario(server: Running) -> None:
        peer = await server.connect_plainly()
        start = time.monotonic()

        async def drip() -> None:
            for byte in hello():
                peer.send(bytes([byte]))
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        await peer.whole_reply()
        dripping.cancel()
        assert time.monotonic() - start < SOON_S
        assert server.open_connections() == 0

    run(tmp_path, scenario)


def received(connection: socket.socket) -> bytes:
    data = connection.recv(1 << 16)
    assert data, "the server hung up"
    return data


@pytest.mark.parametrize("cuts", [[], [1], [5, 60], [3, 9, 200]])
def test_a_handshake_may_arrive_in_pieces(cuts: list[int], with_tls: Tls, tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    def ask(port: int) -> bytes:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        speaking = context.wrap_bio(incoming, outgoing)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            is_first = True
            while True:
                try:
                    speaking.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    said = outgoing.read()
                    places = [0, *cuts, len(said)] if is_first else [0, len(said)]
                    is_first = False
                    for begin, end in pairwise(places):
                        connection.sendall(said[begin:end])
                        time.sleep(0.02)
                    incoming.write(received(connection))
            # The first request comes together with the end of the handshake
            speaking.write(head("GET", "/healthz"))
            connection.sendall(outgoing.read())
            while True:
                try:
                    return speaking.read(1 << 16)
                except ssl.SSLWantReadError:
                    incoming.write(received(connection))

    async def scenario(server: Running) -> None:
        assert b"200 OK" in await asyncio.to_thread(ask, server.port)

    run(tmp_path, scenario, ConnectionLimits())


def test_connections_count_before_they_speak(with_tls: Tls, tmp_path: Path) -> None:
    async def scenario(server: Running) -> None:
        # Given as many as may be, none of which has said enough
        peers = [await server.connect_plainly() for _ in range(4)]
        peers[1].send(hello()[:9])
        peers[2].send(hello())
        await server.has_connections(4)
        # Then there is no room for more
        for _ in range(3):
            assert await (await server.connect_plainly()).closed_after() < SOON_S
        assert server.open_connections() == 4
        # Until one of them leaves
        peers[2].close()
        await server.has_connections(3)
        late = await server.connect()
        late.send(head("GET", "/healthz"))
        assert (await late.reply())[0] == 200
        assert server.open_connections() == 4

    run(tmp_path, scenario, ConnectionLimits(max_connections=4))


def test_many_that_fail_the_handshake_leave_nothing_behind(with_tls: Tls, tmp_path: Path) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1

    async def scenario(server: Running) -> None:
        for _ in range(30):
            peer = await server.connect_plainly()
            peer.send(b"\x16\x03\x01" + b"\xff" * 500)
            await peer.whole_reply()
            peer.close()
        with pytest.raises(OSError):  # noqa: PT011 (which one is the system's affair)
            await asyncio.open_connection("127.0.0.1", server.port, ssl=old)
        await server.has_connections(0)

    run(tmp_path, scenario, ConnectionLimits())


def test_a_client_that_leaves_in_the_handshake_is_counted_out(
    with_tls: Tls, tmp_path: Path
) -> None:
    async def scenario(server: Running) -> None:
        for sent in (b"", b"\x16\x03", hello(), hello()[:50]):
            peer = await server.connect_plainly()
            peer.send(sent)
            await server.has_connections(1)
            peer.close()
            await server.has_connections(0)

    run(tmp_path, scenario, ConnectionLimits())


def test_a_call_that_waits_ends_with_its_client(with_tls: Tls, tmp_path: Path) -> None:
    async def scenario(server: Running) -> None:
        peer = await server.connect()
        peer.send(head("GET", "/work?batch_size=3"))
        assert len((await peer.reply())[2]["items"]) == 3
        peer.send(head("GET", "/work?wait=60"))
        await asyncio.sleep(0.1)
        peer.close()
        await server.has_connections(0)

    run(tmp_path, scenario, ConnectionLimits())


@both
def test_who_speaks_plain_http_is_told_what_to_do(
    send: Send, with_tls: Tls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISPATCHER_FINGERPRINT")

    async def scenario(server: Running) -> None:
        for address in (server.address, f"http://{server.address}"):
            with pytest.raises(AccessDeniedError) as caught:
                await asyncio.to_thread(send, address, lambda client: [client.get_work()])
            for words in ("speaks TLS", "@STATE/server.json", "--server-fingerprint"):
                assert words in str(caught.value)
        await server.has_connections(0)

    run(tmp_path, scenario, QUICK, Gate(TOKEN))


@both
def test_a_client_follows_its_server_from_plain_http_to_tls(
    send: Send, with_tls: Tls, tmp_path: Path
) -> None:
    path = tmp_path / "server.json"

    async def scenario(server: Running) -> None:
        # Given a client that knows the server from before it spoke TLS, at the same port
        content = ServerFile(f"http://{server.address}", TOKEN, "run", 1, 1, "running")
        write_server_file(path, content)
        reads: list[str] = []
        real = client_module.read_server_file

        def read(where: Path) -> ServerFile:
            reads.append("")
            if len(reads) == 2:
                announce(path, server.address, with_tls.fingerprint)
            return real(where)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(client_module, "read_server_file", read)
            [reply] = await asyncio.to_thread(send, f"@{path}", lambda c: [c.get_work()])
        assert reply.status is WorkStatus.OK

    run(tmp_path, scenario, ConnectionLimits(), Gate(TOKEN))


def test_tokens_are_wanted_with_tls_as_without(with_tls: Tls, tmp_path: Path) -> None:
    async def scenario(server: Running) -> None:
        peer = await server.connect()
        peer.send(head("GET", "/status"))
        status, headers, body = await peer.reply()
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert "server.json" in body["message"]
        peer = await server.connect()
        peer.send(head("GET", "/status", f"Authorization: Bearer {TOKEN}"))
        assert (await peer.reply())[0] == 200

    run(tmp_path, scenario, ConnectionLimits(), Gate(TOKEN))


def test_a_large_body_and_a_large_answer_pass(with_tls: Tls, tmp_path: Path) -> None:
    line = f'"{"x" * 3_000_000}"\n'
    (tmp_path / "in.jsonl").write_text(line * 4)

    async def scenario(server: Running) -> None:
        async with asyncio.timeout(15):
            client = AsyncWorkClient(server.address, "w")
            items = (await client.get_work(4)).items
            assert [len(item.content) for item in items] == [len(line) - 1] * 4
            for item in items:
                item.set_result(item.content)
            assert (await client.submit_results(items)).count == 4
            await client.close()

    run(tmp_path, scenario, ConnectionLimits())


# --- the command --------------------------------------------------------------------------------


def files(directory: Path, lines: int = 3) -> tuple[str | Path, ...]:
    infile = directory / "in.jsonl"
    infile.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n' * lines)
    return ("--infile", infile, "--outfile", directory / "out.jsonl", "--retry", "1")


def start_lines(server: Server) -> list[str]:
    wait_until(lambda: " -> " in server.process.output, "the server's first lines")
    return server.process.output.splitlines()


def test_on_loopback_there_is_no_tls_unless_it_is_asked_for(tmp_path: Path) -> None:
    with dispatcher_server(*files(tmp_path)) as server:
        assert server.url.startswith("http://")
        assert read_server_file(server.state_file).fingerprint is None
    assert not server.state_file.with_name("tls.pem").exists()


def test_a_server_with_tls_says_so_and_what_others_need(tmp_path: Path) -> None:
    with dispatcher_server(*files(tmp_path), "--tls", "on") as server:
        found = read_server_file(server.state_file)
        assert found.url == server.url == f"https://{server.address}"
        text = "\n".join(start_lines(server))
        for words in (
            f"--dispatcher @{server.state_file}",
            f"--dispatcher {server.url} --server-fingerprint {found.fingerprint} and the token",
            "--tls off",
        ):
            assert words in text
        assert server.token is not None
        assert server.token not in text
        with WorkClient(server.at) as client:
            assert client.status()["state"] == "running"
        words = {"token": server.token, "fingerprint": found.fingerprint}
        with WorkClient(server.address, **words) as client:
            assert client.get_work().status is WorkStatus.OK
    assert mode_of(server.state_file.with_name("tls.pem")) == 0o600


def test_without_tokens_there_is_tls_too(tmp_path: Path) -> None:
    with dispatcher_server(*files(tmp_path), "--tls", "on", "--no-auth") as server:
        assert server.token is None
        text = "\n".join(start_lines(server))
        assert f"--dispatcher @{server.state_file}" in text
        assert "--server-fingerprint" in text
        assert "and the token" not in text
        with WorkClient(server.at) as client:
            assert client.get_work().status is WorkStatus.OK


def test_a_given_certificate_is_the_one_that_is_shown(files_given: Path, tmp_path: Path) -> None:
    paths = f"{files_given / 'cert.pem'},{files_given / 'key.pem'}"
    with dispatcher_server(*files(tmp_path), "--tls", paths) as server:
        given = given_tls(paths)
        assert given is not None
        assert read_server_file(server.state_file).fingerprint == given.fingerprint
        trusted = ssl.create_default_context(cafile=str(files_given / "cert.pem"))
        connection = http.client.HTTPSConnection(server.address, context=trusted, timeout=10)
        connection.request("GET", "/healthz")
        assert connection.getresponse().status == 200
        connection.close()
    assert not server.state_file.with_name("tls.pem").exists()


def test_the_certificate_survives_a_restart_and_running_clients_notice_nothing(
    tmp_path: Path,
) -> None:
    flags = (*files(tmp_path), "--tls", "on")
    with dispatcher_server(*flags) as first:
        before = read_server_file(first.state_file)
        client = WorkClient(first.address, token=first.token, fingerprint=before.fingerprint)
        assert client.status()["state"] == "running"
        first.process.kill()
    port = first.address.rpartition(":")[2]
    with client, dispatcher_server(*flags, "--port", port) as second:
        assert read_server_file(second.state_file).fingerprint == before.fingerprint
        assert client.status()["state"] == "running"


@pytest.mark.parametrize("kind", SQUATTERS)
def test_who_takes_the_port_of_a_killed_server_gets_nothing(
    kind: str, theirs: Tls, tmp_path: Path
) -> None:
    flags = (*files(tmp_path), "--tls", "on")
    with dispatcher_server(*flags) as first, WorkClient(first.at, timeout_s=1.0) as client:
        (item,) = client.get_work(1).items
        item.set_result(f'"{ANSWER}"')
        first.process.kill()
        # When somebody else listens where it was
        with squatting(kind, theirs, int(first.address.rpartition(":")[2])) as squatter:
            assert client.submit_results([item]).status is AWAY
            assert client.get_work().status is AWAY
            assert squatter.met
            # Then the client waits, and hands its result to the server that comes back
            with dispatcher_server(*flags):
                assert client.submit_results([item]).count == 1
    assert first.token is not None
    for secret in (first.token, ANSWER, "hello"):
        assert secret.encode() not in squatter.heard


def test_runs_are_listed_with_what_their_server_says(tmp_path: Path) -> None:
    with dispatcher_server(*files(tmp_path), "--tls", "on") as server:
        with WorkClient(server.at, "w") as client:
            for item in client.get_work(2).items:
                item.set_result("1")
                client.submit_results([item])
        code, output = run_python("-m", "dispatcher.cli", "runs", server.state_file.parent)
    assert code == 0, output
    assert "running" in output, output
    assert re.search(r"\b2\b", output), output


@pytest.mark.slow
@pytest.mark.parametrize("way", ["server.json", "flag", "variable"])
def test_a_worker_speaks_tls_to_its_server(way: str, tmp_path: Path) -> None:
    with dispatcher_server(*files(tmp_path, 30), "--tls", "on") as server:
        found = read_server_file(server.state_file)
        assert found.token is not None
        assert found.fingerprint is not None
        env = {"DISPATCHER_TOKEN": found.token}
        address, flags = {
            "server.json": (server.at, []),
            "flag": (server.address, ["--server-fingerprint", found.fingerprint]),
            "variable": (server.url, []),
        }[way]
        if way == "variable":
            env["DISPATCHER_FINGERPRINT"] = found.fingerprint
        command = [sys.executable, "-m", "dispatcher.taskmanager.cli", "--dispatcher", address]
        command += ["--task", CHAT, "--backend", "fake", "--workers", "4", *flags]
        with running(*command, env=env) as process:
            assert process.wait(deadline_s=60) == 0, process.output
        assert server.process.wait(deadline_s=30) == 0
    assert (tmp_path / "out.jsonl").read_bytes().count(b"\n") == 30
