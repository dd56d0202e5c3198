"""Whatever a client sends, the server answers, and never calls it a fault of its own."""

from __future__ import annotations

import gzip
import json
import logging
import os
import zlib
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from dispatcher.server.access import Gate
from dispatcher.server.connections import ConnectionLimits
from tests.support.serving import Running, head, run

SEED = int(os.environ.get("DISPATCHER_TEST_SEED", "1"))
QUICK = ConnectionLimits(header_s=0.2, body_s=0.2, idle_s=0.2, linger_s=0.05)
HUGE = 10**30
POSTS = ("/results", "/release", "/heartbeat", "/work_timeout")


def request(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    length = [f"Content-Length: {len(body)}"] if body else []
    return head(method, path, "Connection: close", *headers, *length) + body


def post(path: str, value: Any) -> bytes:
    return request("POST", path, json.dumps(value).encode())


def chunked(body: bytes, *headers: str) -> bytes:
    return head("POST", "/results", "Transfer-Encoding: chunked", *headers) + body


LINES = [
    request("GET", "/work?batch_size=%ff"),
    request("GET", "/work?batch_size=%D9%A3"),
    request("GET", "/work?batch_size=" + "9" * 5000),
    request("GET", "/work?worker=%ff%fe"),
    request("GET", "/work?worker=%ed%a0%80"),
    request("GET", "/work?worker=a%00b"),
    request("GET", "/work?wait=nan"),
    request("GET", "/work?wait=-0"),
    request("GET", "/work?wait=1e-400"),
    request("GET", "/%00"),
    request("GET", "/%ff"),
    request("GET", "//[bad"),
    request("GET", "http://[bad/work"),
    request("GET", "http://x:99999999/work"),
    request("GET", "*"),
    request("OPTIONS", "*"),
    request("CONNECT", "h:80"),
    request("FOO", "/work"),
    request("TRACE", "/"),
    request("HEAD", "/work"),
    request("HEAD", "/status"),
    request("PUT", "/results", b"{}"),
    request("GET", "/healthz", b"", "Upgrade: websocket", "Sec-WebSocket-Key: x"),
    request("GET", "/status", b"", "Upgrade: h2c"),
    request("GET", "/status", b"", "Range: bytes=9-1", 'Cookie: =;;;"', "If-Modified-Since: x"),
    request("POST", "/results", b"{}", "Expect: nonsense"),
    request("POST", "/results", b"{}", "Content-Type: text/plain; charset=nonsense"),
    b"GET /status HTTP/0.9\r\n\r\n",
    b"GET /status HTTP/2.0\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"POST /results HTTP/1.0\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET /status HTTP/1.1\r\nHost: \xff\xfe\r\nAuthorization: Bearer \xff\r\n\r\n",
    b"GET /status HTTP/1.1\r\nAuthorization: Bearer SECRET\x00\r\n\r\n",
    b"GET /status HTTP/1.1\r\nAuth orization: Bearer SECRET\r\n\r\n",
]
FRAMES = [
    request("POST", "/results", b"no gzip", "Content-Encoding: gzip"),
    request("POST", "/results", b"no brotli", "Content-Encoding: br"),
    request("POST", "/results", b"no zstd", "Content-Encoding: zstd"),
    request("POST", "/results", b"{}", "Content-Encoding: nonsense"),
    request("POST", "/results", zlib.compress(b'{"items":[]}')[:-3], "Content-Encoding: deflate"),
    request("POST", "/results", gzip.compress(b'{"items":[]}'), "Content-Encoding: gzip"),
    chunked(b"zz\r\n"),
    chunked(b"5\r\nabcdeXX\r\n0\r\n\r\n"),
    chunked(b"ffffffffffffffffff\r\n"),
    chunked(b"2\r\n{}\r\n0\r\n\r\n", "Content-Length: 5"),
    head("POST", "/results", "Content-Length: -5"),
    head("POST", "/results", "Content-Length: 99999999999999999999999"),
    head("POST", "/results", "Content-Length: 5", "Content-Length: 6") + b"abcdef",
]
TEXTS = [
    b"null",
    b"[]",
    b"{}",
    b'"',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"items":' + b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"items":[{"work_id":' + b"9" * 5000 + b',"result":"1"}]}',
    b'{"items":[{"work_id":0,"result":NaN}]}',
    b'{"items":[],"want":NaN}',
    b'{"worker":"w","lag_s":1e999}',
    b'{"timeout":' + b"9" * 400 + b"}",
]
VALUES: list[Any] = [
    {"items": None},
    {"items": [{"work_id": HUGE, "result": "1"}]},
    {"items": [{"work_id": -HUGE, "result": "1"}]},
    {"items": [{"work_id": 1.0, "result": "1"}]},
    {"items": [{"work_id": 0, "result": "1", "lease": "9" * 41 + ".1"}]},
    {"items": [{"work_id": 0, "result": "1", "lease": "\u0663.\u0663"}]},
    {"items": [{"work_id": 1, "result": "\ud800", "run": "\ud800", "lease": "\ud800"}]},
    {"items": [{"work_id": 1, "result": "[" * 50_000 + "]" * 50_000}]},
    {"items": [{"work_id": 1, "result": "1" + "0" * 5000}]},
    {"items": [{"work_id": 1, "result": "1e999"}]},
    {"items": [], "want": HUGE},
    {"items": [], "want": -HUGE},
    {"items": [], "want": 10**9, "worker": "w"},
    {"items": [], "worker": "\ud800"},
    {"items": [], "worker": ""},
    {"work_ids": [HUGE, -1, 0]},
    {"items": [{"work_id": 0, "lease": "x"}]},
    {"items": [{"work_id": HUGE, "lease": "0.1", "charge": False, "reason": "\0" * 1000}]},
    {"items": [{"work_id": 0, "charge": None}]},
    {"worker": "w", "held": {"0.1": HUGE, "1.2": -HUGE}},
    {"worker": "w", "held": {"x": 1, "": 2, "9" * 50 + ".1": 3}},
    {"worker": "w", "backend": "x" * 100_000},
    {"worker": "w" * 129},
    {"worker": "\n"},
    {"worker": "w", "stats": {"requests": 2**64 - 1, "prompt_tokens": 2**64 - 1}},
    {"worker": "v", "stats": {"requests": 2**64 - 1}},
    {"worker": "u", "stats": {"requests": HUGE}},
    {"worker": "t", "stats": {"requests": -1}},
    {"timeout": 1e-300},
    {"timeout": 1e308},
    {"timeout": True},
    {"timeout": HUGE},
]
BODIES = [request("POST", path, text) for path in POSTS for text in TEXTS]
BODIES += [post(path, value) for path in POSTS for value in VALUES]
AFTER_ALL = [request("GET", "/status"), request("GET", "/metrics")]
EVERYTHING = LINES + FRAMES + BODIES + AFTER_ALL


def mutated(rng: Random) -> bytes:
    """Return one of the requests with a few bytes changed, removed or put in."""
    data = bytearray(rng.choice(EVERYTHING))
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(min(len(data), 400) or 1)
        match rng.randrange(3):
            case 0 if data:
                data[place] = rng.randrange(256)
            case 1:
                del data[place : place + rng.randint(1, 8)]
            case _:
                data[place:place] = rng.randbytes(rng.randint(1, 8))
    return bytes(data)


def check(
    requests: list[bytes], directory: Path, caplog: pytest.LogCaptureFixture, gate: Gate
) -> Counter[str]:
    """Send all of them, each over its own connection; return how often each status came."""
    answers: Counter[str] = Counter()

    async def scenario(server: Running) -> None:
        for data in requests:
            status = await server.first_status(data)
            assert status[:1] != "5", f"{status} for {data[:300]!r}"
            answers[status] += 1

    with caplog.at_level(logging.WARNING):
        run(directory, scenario, QUICK, gate, deadline_s=120)
    assert caplog.text == ""
    return answers


def test_no_request_is_answered_as_a_fault_of_the_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answers = check(EVERYTHING, tmp_path, caplog, Gate())
    print(f"{len(EVERYTHING)} odd requests: {dict(answers)}")
    assert answers["200"] > 50


def test_nor_is_one_with_bytes_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = Random(SEED)
    answers = check([mutated(rng) for _ in range(300)] + AFTER_ALL, tmp_path, caplog, Gate())
    print(f"300 broken requests with seed {SEED}: {dict(answers)}")


def test_without_a_token_none_of_them_gets_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answers = check(EVERYTHING, tmp_path, caplog, Gate("t" * 43))
    print(f"{len(EVERYTHING)} odd requests without a token: {dict(answers)}")
    assert set(answers) <= {"200", "400", "401", ""}
    assert answers["200"] <= 1  # /healthz
