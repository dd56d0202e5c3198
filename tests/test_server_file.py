"""server.json and the token files: written for one reader, believed only as such."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from dispatcher.errors import UsageError
from dispatcher.server_file import (
    ServerFile,
    check_fingerprint,
    fingerprint_given,
    fingerprint_of,
    new_token,
    read_server_file,
    read_token_file,
    remove_partial_files,
    token_given,
    write_private,
    write_server_file,
)
from dispatcher.storage.files import Files

TOKEN = "t" * 43


def content(token: str | None = TOKEN) -> ServerFile:
    return ServerFile("http://host:1", token, "run", 3, 77, "running")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.parametrize("token", [TOKEN, None])
def test_what_is_written_is_read(token: str | None, tmp_path: Path) -> None:
    write_server_file(tmp_path / "server.json", content(token))
    assert read_server_file(tmp_path / "server.json") == content(token)
    assert read_server_file(tmp_path) == content(token)


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_only_its_owner_can_read_it_whatever_was_there_before(umask: int, tmp_path: Path) -> None:
    path = tmp_path / "server.json"
    path.write_text("{}")
    path.chmod(0o666)
    before = os.umask(umask)
    try:
        write_server_file(path, content())
    finally:
        os.umask(before)
    assert mode_of(path) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["server.json"]


def test_a_reader_never_sees_half_of_it(tmp_path: Path) -> None:
    path = tmp_path / "server.json"
    write_server_file(path, content())
    with path.open() as earlier:
        write_server_file(path, content(None))
        assert json.loads(earlier.read())["token"] == TOKEN


class FullDisk(Files):
    def write_at(self, fd: int, data: bytes, offset: int) -> None:
        raise OSError(28, "No space left on device")


def test_when_it_cannot_be_written_the_earlier_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "server.json"
    write_server_file(path, content())
    with pytest.raises(OSError, match="No space"):
        write_server_file(path, content(None), FullDisk())
    assert read_server_file(path) == content()
    assert [entry.name for entry in tmp_path.iterdir()] == ["server.json"]


def test_it_is_not_written_through_a_link(tmp_path: Path) -> None:
    target, path = tmp_path / "precious", tmp_path / "server.json"
    target.write_text("precious")
    path.symlink_to(target)
    with pytest.raises(UsageError, match="symbolic link"):
        write_server_file(path, content())
    assert target.read_text() == "precious"
    assert path.is_symlink()


def test_it_does_not_replace_what_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "server.json"
    os.mkfifo(path)
    with pytest.raises(UsageError, match="not a regular file"):
        write_server_file(path, content())
    assert stat.S_ISFIFO(path.lstat().st_mode)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o644, 0o777])
def test_a_file_that_others_can_use_is_refused_with_its_mode(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "server.json"
    write_server_file(path, content())
    path.chmod(mode)
    with pytest.raises(UsageError) as caught:
        read_server_file(path)
    for words in (str(path), f"{mode:04o}", "chmod 600", "remove it"):
        assert words in str(caught.value)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_file_of_its_owner_alone_is_read(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "server.json"
    write_server_file(path, content())
    path.chmod(mode)
    assert read_server_file(path) == content()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "server.json"
    write_server_file(path, content())
    os.chown(path, 12345, -1)
    with pytest.raises(UsageError, match="another user"):
        read_server_file(path)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    write_server_file(tmp_path / "real.json", content())
    (tmp_path / "server.json").symlink_to(tmp_path / "real.json")
    with pytest.raises(UsageError, match="symbolic link"):
        read_server_file(tmp_path / "server.json")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "server.json", 0o600)
    with pytest.raises(UsageError, match="not a regular file"):
        read_server_file(tmp_path / "server.json")


def test_a_file_that_is_not_there_is_no_usage_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "server.json", tmp_path / "no" / "server.json"):
        with pytest.raises(FileNotFoundError):
            read_server_file(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        "[]",
        "\udcff",
        '{"url": "http://h:1"}',
        '{"url": 7, "token": null, "run": "r", "epoch": 1, "pid": 1, "state": "running"}',
        '{"url": "", "token": "x", "run": "r", "epoch": 1, "pid": 1, "state": "running"}',
    ],
)
def test_what_is_no_server_json_is_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "server.json"
    write_private(path, text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match=str(path)):
        read_server_file(path)


def test_fields_of_later_versions_do_no_harm(tmp_path: Path) -> None:
    fields = {"url": "u", "token": None, "run": "r", "epoch": 1, "pid": 2, "state": "running"}
    write_private(tmp_path / "server.json", json.dumps(fields | {"more": [1]}).encode())
    assert read_server_file(tmp_path).url == "u"


# --- fingerprints -------------------------------------------------------------------------------

DIGITS = fingerprint_of(b"a certificate")
PAIRS = ":".join(DIGITS[place : place + 2] for place in range(0, 64, 2))


def test_a_fingerprint_stands_beside_an_https_url(tmp_path: Path) -> None:
    written = ServerFile("https://host:1", TOKEN, "run", 3, 77, "running", PAIRS.upper())
    write_server_file(tmp_path / "server.json", written)
    assert read_server_file(tmp_path).fingerprint == DIGITS


@pytest.mark.parametrize(
    ("url", "fingerprint", "said"),
    [
        ("http://host:1", DIGITS, "its url http://host:1 is not https"),
        ("host:1", DIGITS, "is not https"),
        ("https://host:1", "", "64 hexadecimal digits"),
        ("https://host:1", DIGITS[:-1], "64 hexadecimal digits"),
    ],
)
def test_a_fingerprint_that_would_not_be_looked_at_is_refused(
    url: str, fingerprint: str, said: str, tmp_path: Path
) -> None:
    written = ServerFile(url, TOKEN, "run", 3, 77, "running", fingerprint)
    write_server_file(tmp_path / "server.json", written)
    with pytest.raises(UsageError, match=said) as caught:
        read_server_file(tmp_path)
    assert str(tmp_path / "server.json") in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        DIGITS,
        DIGITS.upper(),
        PAIRS,
        f" {PAIRS.upper()}\n",
        f"SHA256 Fingerprint={PAIRS.upper()}",
        f"sha256 Fingerprint={PAIRS.upper()}",
        f"SHA-256:{DIGITS}",
        f"sha256:{DIGITS}",
    ],
)
def test_a_fingerprint_is_read_in_any_way_tools_print_one(text: str) -> None:
    assert check_fingerprint(text, "it") == DIGITS


def test_a_fingerprint_is_taken_from_the_environment_if_none_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DISPATCHER_FINGERPRINT", raising=False)
    assert fingerprint_given(None) is None
    monkeypatch.setenv("DISPATCHER_FINGERPRINT", "")
    assert fingerprint_given(None) is None
    monkeypatch.setenv("DISPATCHER_FINGERPRINT", PAIRS)
    assert fingerprint_given(None) == DIGITS
    assert fingerprint_given("0" * 64) == "0" * 64
    monkeypatch.setenv("DISPATCHER_FINGERPRINT", "no digits")
    with pytest.raises(UsageError, match="DISPATCHER_FINGERPRINT must be"):
        fingerprint_given(None)


# --- tokens -------------------------------------------------------------------------------------


def test_tokens_have_256_bits_and_are_never_the_same() -> None:
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert all(len(token) == 43 and token.isascii() for token in tokens)


def test_a_token_file_holds_a_token_and_perhaps_a_line_end(tmp_path: Path) -> None:
    path = tmp_path / "token"
    for text in (TOKEN, f"{TOKEN}\n", f"{TOKEN}\r\n"):
        write_private(path, text.encode())
        assert read_token_file(path) == TOKEN
        assert token_given(path) == TOKEN


@pytest.mark.parametrize("text", ["", "short", "two words of a token", "x" * 2000, "ä" * 30])
def test_what_is_no_token_is_refused_and_not_shown(text: str, tmp_path: Path) -> None:
    path = tmp_path / "token"
    write_private(path, text.encode())
    with pytest.raises(UsageError, match="16 to 1024 printable") as caught:
        token_given(path)
    assert not text or text not in str(caught.value)


def test_a_token_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN)
    path.chmod(0o644)
    with pytest.raises(UsageError, match="0644"):
        token_given(path)


def test_a_missing_token_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--token-file"):
        token_given(tmp_path / "nowhere")


def test_a_token_is_taken_from_the_environment_if_no_file_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_private(tmp_path / "token", TOKEN.encode())
    monkeypatch.setenv("DISPATCHER_TOKEN", "e" * 20)
    assert token_given(tmp_path / "token") == TOKEN
    assert token_given(None) == "e" * 20
    monkeypatch.setenv("DISPATCHER_TOKEN", "short")
    with pytest.raises(UsageError, match="DISPATCHER_TOKEN"):
        token_given(None)
    monkeypatch.setenv("DISPATCHER_TOKEN", "")
    assert token_given(None) is None


def test_what_a_killed_server_left_half_written_is_removed(tmp_path: Path) -> None:
    write_server_file(tmp_path / "server.json", content())
    (tmp_path / ".server.json.00ff.tmp").write_text("half")
    (tmp_path / ".admin.token.00ff.tmp").write_text("half")
    (tmp_path / ".tls.pem.00ff.tmp").write_text("half")
    remove_partial_files(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["server.json"]
