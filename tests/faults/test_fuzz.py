"""Ten thousand requests that no client should send, while one client does its work.

Everything goes over sockets to a real server. A request is answered in HTTP or its connection is
closed; no answer is a 5xx other than 503 and 507; the server lives, its memory stays bounded; and
the run that the well-behaved client works on meanwhile ends as the oracle demands.

A request is made from the seed and its number alone (and the run's id), so a failure can be
repeated: set DISPATCHER_TEST_SEED to the seed that it names.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import gzip
import http.client
import json
import os
import random
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvloop

from dispatcher.models import HeartbeatRequest, StepItem, StepOutcome, WorkItem, WorkStatus
from tests.faults.oracle import Ledger, input_line, result_of
from tests.support.processes import Server, dispatcher_server

SEED = int(os.environ.get("DISPATCHER_TEST_SEED", "20240601"))
CALLS, MESSAGES, NOISE = 6500, 2300, 1400
"""Requests whose body or query is wrong; whose HTTP is wrong; that are bytes and nothing more."""

LINES = 400
EARLY = 50
"""Lines that are answered before the fuzzer begins; only for these does it send good results."""

STRANGERS = 0.07
"""This share of the wrong calls comes from somebody who has not got the run's token."""

LARGE_EVERY = 2000
MIB = 1 << 20
LARGE_BYTES = 256 * MIB
"""One in so many requests is small and unpacks to so many bytes, four times what is allowed."""

CONNECTIONS = 48
REPLY_S = 30.0
"""Far above what a reply takes, so that only a hang reaches it."""

NO_REPLY_S = 0.1
NO_REPLY_LATENCIES = 4
"""How long the fuzzer stays when its request may not be one that is answered, in seconds and in
terms of what others wait."""

LARGE_AT_THE_END = 10
"""So many of these follow one by one when all else is over: were each body kept, they would be
640 MiB."""

PEAK_BYTES, RESIDENT_BYTES = 512 * MIB, 256 * MIB
"""Resident memory of the server: at most, and when all is over. A few bodies of 64 MiB fit."""

BROKEN = "<<broken>>"
"""A result that no change of a few bytes makes JSON."""

Random = random.Random


@dataclass(frozen=True)
class Access:
    """What lets calls in: the token of the run, and the one that may change its settings."""

    worker: dict[str, str]
    admin: dict[str, str]

    @classmethod
    def to(cls, server: Server) -> Access:
        return cls(server.headers, server.admin_headers)

    def headers(self, path: str) -> dict[str, str]:
        return self.admin if path == "/work_timeout" else self.worker


# -------------------------------------------------------------------- what is sent


@dataclass
class Shot:
    """What goes over one connection.

    `replies` is how many replies must come; None when closing the connection is an answer, too.
    `statuses` are those that they may have; none are named where all below 500 are right.
    `keeps` says that another request may follow over the same connection.
    """

    label: str
    parts: list[bytes]
    replies: int | None = None
    no_bodies: bool = False
    keeps: bool = False
    statuses: set[int] = field(default_factory=set)

    def __repr__(self) -> str:
        sent = b"".join(self.parts)
        shown = repr(sent[:3000]) + (f"... ({len(sent)} bytes)" if len(sent) > 3000 else "")
        return f"{self.label}, replies due: {self.replies}: {shown}"


@dataclass
class Call:
    """A call before it is put into HTTP; `text` is its body, where it has one."""

    method: str
    path: str
    query: list[tuple[str, str]] = field(default_factory=list)
    body: Any = None
    text: bytes | None = None

    @property
    def target(self) -> str:
        pairs = "&".join(f"{name}={value}" for name, value in self.query)
        return f"{self.path}?{pairs}" if pairs else self.path

    @property
    def may_be_held_open(self) -> bool:
        return any(name == "wait" for name, _ in self.query)


ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**64), 10**400, -0.0, 1.5, 1e308, 5e-324,
    float("nan"), float("inf"), "", " ", "0", "-1", "\ud800", "\x00", "\u0663", "é", "NaN", "null",
    "x" * 129, "y" * 10_000, "0.1", "1." + "9" * 30, [], {}, [[]], [None], {"": None}, [0] * 1000,
    "crash", "down", "\n", "\u2028", {"work_id": 1}, [{"work_id": "1"}],
]  # fmt: skip

ODD_TEXTS = [
    "", "0", "-1", "1", "+1", "%2B1", "1e9", "9" * 30, "1.5", "nan", "inf", "abc", "%00", "%",
    "%zz", "%ff", "%D9%A3", "%ED%A0%80", "%0d%0aX-Injected:%201", "'", "%22", "x" * 129,
    "x" * 3000, "1_0",
]  # fmt: skip

RESPONSES = [
    '{"text": "yes"}', '"\u20ac"', "1", "null", None, "", "NaN", "{", "1]\n", '"\ud800"',
    "[" * 3000, "[" * 100 + "]" * 100, '"' + "x" * 10_000 + '"',
]  # fmt: skip

NAMES = ["good", "f1", "f2", "f3", "élève", "x" * 128]


def random_value(rng: Random, depth: int = 3) -> Any:
    """Return a random JSON value."""
    if depth and rng.random() < 0.4:
        size = rng.randrange(4)
        if rng.random() < 0.5:
            return [random_value(rng, depth - 1) for _ in range(size)]
        return {random_text(rng): random_value(rng, depth - 1) for _ in range(size)}
    return rng.choice([*ODD_VALUES, rng.randrange(-5, 500), rng.random(), random_text(rng)])


def random_text(rng: Random) -> str:
    known = ["work_id", "result", "run", "lease", "items", "worker", "want", "held", "stats"]
    known += ["steps", "pos", "hash", "response", "attempt", "keep_yields"]
    if rng.random() < 0.5:
        return rng.choice(known)
    return "".join(chr(rng.randrange(1, 0x2FF)) for _ in range(rng.randrange(12)))


class Fuzzer:
    """Makes the requests of one run."""

    def __init__(self, seed: int, run: str, access: Access) -> None:
        self._seed = seed
        self._run = run
        self._access = access

    def shot(self, number: int) -> Shot:
        """Return a request; the same one for the same number."""
        rng = Random(f"{self._seed}:{number}")
        if number % LARGE_EVERY == LARGE_EVERY - 1:
            return a_small_body_that_unpacks_to_a_large_one(self, rng)
        if number < CALLS:
            return self._wrong_call(rng)
        if number < CALLS + MESSAGES:
            make = rng.choice(WRONG_MESSAGES)
            shot = make(self, rng)
            shot.label = sentence(make)
            return shot
        return self._noise(rng)

    # ---------------------------------------------------------------- calls

    def valid_call(self, rng: Random) -> Call:
        """Return a call as a client makes it, but never with a good result of an open line."""
        return rng.choice(
            [self._work, self._results, self._results, self._results, self._release,
             self._release, self._heartbeat, self._heartbeat, self._steps, self._steps,
             self._work_timeout, self._page]
        )(rng)  # fmt: skip

    def _work(self, rng: Random) -> Call:
        query = [("batch_size", str(rng.randrange(1, 4)))]
        if rng.random() < 0.5:
            query.append(("worker", rng.choice(["good", "f1", "f2"])))
        return Call("GET", "/work", query)

    def _results(self, rng: Random) -> Call:
        body: dict[str, Any] = {"items": [self._item(rng) for _ in range(rng.randrange(5))]}
        if rng.random() < 0.3:
            body["worker"] = rng.choice(NAMES)
        if rng.random() < 0.2:
            body["want"] = rng.randrange(3)
        return Call("POST", "/results", body=body)

    def _item(self, rng: Random) -> dict[str, Any]:
        work_id = rng.randrange(-2, LINES + 2)
        item = {
            "work_id": work_id,
            "result": rng.choice([BROKEN, json.dumps({"id": work_id}), None, "NaN", "7", "{<"]),
            "run": rng.choice([self._run, self._run, "0123456789abcdef"]),
            "lease": self._lease(rng, work_id),
            "content": input_line(max(0, work_id)),
        }
        for name in rng.sample(sorted(item), rng.randrange(3)):
            if name != "work_id":
                del item[name]
        return item

    def _lease(self, rng: Random, work_id: int) -> str:
        return f"{work_id}.{rng.randrange(1, 3 * LINES)}"

    def _release(self, rng: Random) -> Call:
        if rng.random() < 0.3:
            ids = [rng.randrange(-1, LINES + 1) for _ in range(rng.randrange(4))]
            return Call("POST", "/release", body={"work_ids": ids})
        items = []
        for _ in range(rng.randrange(4)):
            work_id = rng.randrange(LINES)
            reason = rng.choice(["crash", "sigterm", "x" * 600])
            charge, steps = rng.random() < 0.5, rng.choice(["keep", "keep", "drop"])
            lease = self._lease(rng, work_id)
            items.append(
                {
                    "work_id": work_id,
                    "lease": lease,
                    "charge": charge,
                    "reason": reason,
                    "steps": steps,
                    "keep_yields": rng.choice([None, None, None, 1, 2]),
                }
            )
        return Call("POST", "/release", body={"items": items})

    def _steps(self, rng: Random) -> Call:
        body: dict[str, Any] = {"steps": [self._step(rng) for _ in range(rng.randrange(6))]}
        if rng.random() < 0.3:
            body["worker"] = rng.choice(NAMES)
        return Call("POST", "/steps", body=body)

    def _step(self, rng: Random) -> dict[str, Any]:
        """Return a step, a right one where it guesses a live lease and its attempt."""
        work_id = rng.randrange(-2, LINES + 2)
        step = {
            "work_id": work_id,
            "lease": self._lease(rng, work_id),
            "attempt": rng.choice([1, 1, 2, 3]),
            "pos": [rng.randrange(3), rng.randrange(2)],
            "hash": rng.choice(["a", "0f" * 8, "f" * 64]),
            "response": rng.choice(RESPONSES),
            "run": rng.choice([self._run, self._run, None, "0123456789abcdef"]),
        }
        if rng.random() < 0.2:
            del step[rng.choice(sorted(step))]
        return step

    def _heartbeat(self, rng: Random) -> Call:
        held = {
            self._lease(rng, rng.randrange(LINES)): rng.randrange(3)
            for _ in range(rng.randrange(9))
        }
        name = rng.choice([*NAMES, f"f-{rng.random()}"])
        body = {
            "worker": name,
            "held": held,
            "backend": rng.choice(["up", "down"]),
            "lag_s": rng.random(),
            "stats": {"requests": rng.randrange(9), "prompt_tokens": 1, "in_flight": 0},
        }
        return Call("POST", "/heartbeat", body=body)

    def _work_timeout(self, rng: Random) -> Call:
        return Call("POST", "/work_timeout", body={"timeout": rng.choice([0.5, 1, 5, 1200])})

    def _page(self, rng: Random) -> Call:
        return Call("GET", rng.choice(["/status", "/metrics", "/healthz", "/"]))

    # ---------------------------------------------------------------- wrong calls

    def _wrong_call(self, rng: Random) -> Shot:
        call = self.valid_call(rng)
        label = "a call that is as it should be"
        if call.body is None:
            for _ in range(rng.randrange(3)):
                label = "a wrong query"
                name = rng.choice(["batch_size", "worker", "wait", "run", "", "%00"])
                call.query.insert(0, (name, rng.choice(ODD_TEXTS)))
        else:
            for _ in range(rng.randrange(4)):
                label = "a body with wrong fields"
                call.body = self.mutated(rng, call.body)
            call.text = as_json(self.tamed(call.body))
            if rng.random() < 0.25 and is_harmless(call.text):
                label = "a body with wrong bytes"
                call.text = scrambled(rng, call.text)
        if rng.random() < STRANGERS:
            return self.stranger(rng, call)
        if rng.random() < 0.03:
            label = "a wrong method"
            call.method = rng.choice(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "X-TEA"])
        if call.may_be_held_open:
            return Shot(label, [self.message(call)])
        return Shot(label, [self.message(call, close=False)], 1, keeps=True)

    def stranger(self, rng: Random, call: Call) -> Shot:
        """Return the call as somebody sends it who has not got the token."""
        token = self._access.worker["Authorization"].removeprefix("Bearer ")
        shown = [
            "", "Bearer", "Bearer ", "Bearer null", "Bearer wrong", f"Bearer {token}x",
            f"Bearer {token[:-1]}", f"Bearer {token.swapcase()}", f"Bearer x {token}", token,
            f"Basic {token}", "Basic " + base64.b64encode(f"x:{token}".encode()).decode(),
            "Bearer " + "x" * 7000, "Bearer \udcff\udcfe", f"Bearer\u00a0{token}", "Digest a=b",
        ]  # fmt: skip
        authorization = rng.choice(shown)
        call.query.append(("token", token))
        headers = [f"Authorization: {authorization}"] if authorization else []
        headers.append(f"Cookie: token={token}")
        message = self.message(call, *headers, access={}, close=False)
        is_open = (call.method, call.path) in (("GET", "/"), ("GET", "/healthz"))
        return Shot(
            "a stranger's call", [message], 1, keeps=True, statuses={200} if is_open else {401}
        )

    def mutated(self, rng: Random, value: Any) -> Any:
        """Return `value` with one place of it changed."""
        if isinstance(value, dict) and value and rng.random() < 0.8:
            changed = dict(value)
            name = rng.choice(list(changed))
            action = rng.randrange(5)
            if action == 0:
                del changed[name]
            elif action == 1:
                changed[random_text(rng)] = changed[name]
            elif action == 2:
                changed[name] = random_value(rng)
            else:
                changed[name] = self.mutated(rng, changed[name])
            return changed
        if isinstance(value, list) and value and rng.random() < 0.8:
            items = list(value)
            place = rng.randrange(len(items))
            action = rng.randrange(4)
            if action == 0:
                items += [items[place]] * rng.choice([1, 2, 300])
            elif action == 1:
                items[place] = random_value(rng)
            else:
                items[place] = self.mutated(rng, items[place])
            return items
        return random_value(rng) if rng.random() < 0.7 else rng.choice(ODD_VALUES)

    def tamed(self, body: Any) -> Any:
        """Return the body with every good result of an open line replaced by a broken one."""
        if not isinstance(body, dict) or not isinstance(body.get("items"), list):
            return body
        items = [
            {**item, "result": BROKEN} if isinstance(item, dict) and self._counts(item) else item
            for item in body["items"]
        ]
        return {**body, "items": items}

    def _counts(self, item: dict[Any, Any]) -> bool:
        work_id, run = item.get("work_id"), item.get("run", self._run)
        of_open_line = isinstance(work_id, int) and EARLY <= work_id < LINES
        return of_open_line and run in (None, self._run) and is_good(item.get("result"))

    # ---------------------------------------------------------------- HTTP

    def message(
        self,
        call: Call,
        *headers: str,
        version: str = "HTTP/1.1",
        target: str | None = None,
        access: dict[str, str] | None = None,
        close: bool = True,
        length: bool = True,
        body: bytes | None = None,
    ) -> bytes:
        """Put a call into HTTP, with more headers."""
        text = body if body is not None else call.text
        lines = [f"{call.method} {call.target if target is None else target} {version}"]
        lines += ["Host: dispatcher", f"Connection: {'close' if close else 'keep-alive'}"]
        shown = self._access.headers(call.path) if access is None else access
        lines += [f"{name}: {value}" for name, value in shown.items()]
        lines += headers
        if text is not None and length:
            lines.append(f"Content-Length: {len(text)}")
        head = "\r\n".join(lines).encode("utf-8", "surrogateescape")
        return head + b"\r\n\r\n" + (text or b"")

    def harmless_call(self, rng: Random) -> Call:
        """Return a valid call in which no result is good, so that any change of it is harmless."""
        while True:
            call = self.valid_call(rng)
            call.text = as_json(call.body) if call.body is not None else None
            if is_harmless(call.text or b""):
                return call

    def post(self, rng: Random) -> Call:
        """Return a harmless call with a body."""
        while (call := self.harmless_call(rng)).text is None:
            pass
        return call

    def _noise(self, rng: Random) -> Shot:
        kind = rng.randrange(4)
        if kind == 0:
            return Shot("random bytes", [rng.randbytes(rng.randrange(1, 3000))])
        if kind == 1:
            lines = [rng.randbytes(rng.randrange(60)) for _ in range(rng.randrange(1, 20))]
            return Shot("random lines", [b"GET / HTTP/1.1\r\n" + b"\r\n".join(lines) + b"\r\n\r\n"])
        message = self.message(self.harmless_call(rng))
        if kind == 2:
            return Shot("a request with wrong bytes", [scrambled(rng, message)])
        head, _, body = message.partition(b"\r\n")
        return Shot("a wrong request line", [scrambled(rng, head) + b"\r\n" + body])


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def is_good(result: object) -> bool:
    """Say whether the server could take this as a result (Python reads a little more)."""
    if not isinstance(result, str):
        return False
    try:
        json.loads(result)
    except ValueError:
        return False
    return True


def is_harmless(text: bytes) -> bool:
    """Say whether no result in the body is good, whatever item it may come to belong to."""
    try:
        body = json.loads(text)
    except ValueError:
        return True
    items = body.get("items") if isinstance(body, dict) else None
    items = items if isinstance(items, list) else []
    return not any(isinstance(item, dict) and is_good(item.get("result")) for item in items)


def scrambled(rng: Random, text: bytes) -> bytes:
    """Return the bytes with a few of them changed, lost, moved, repeated or added."""
    data = bytearray(text)
    for _ in range(rng.choice([1, 1, 2, 5])):
        place = rng.randrange(len(data) + 1)
        action = rng.randrange(8)
        if action == 0:
            del data[place:]
        elif action == 1:
            del data[place : place + rng.randrange(1, 9)]
        elif action == 2:
            data[place:place] = rng.randbytes(rng.randrange(1, 5))
        elif action == 3:
            data[place:place] = data[place : place + 50] * rng.choice([1, 2, 20])
        elif action == 4:
            odd = [
                b"\0",
                b"\xff",
                b"\xef\xbb\xbf",
                b"NaN",
                b"1" * 5000,
                b"\\ud800",
                b"\r\n",
                b"[" * 3000,
            ]
            data[place:place] = rng.choice(odd)
        elif place < len(data):
            data[place] ^= 1 << rng.randrange(8)
    return bytes(data)


# -------------------------------------------------------------------- wrong messages

MakeShot = Callable[[Fuzzer, Random], Shot]


def sentence(make: Callable[..., Any]) -> str:
    return make.__name__.replace("_", " ")


def chunked(rng: Random, text: bytes, extension: str = "") -> bytes:
    out = bytearray()
    while text:
        size = rng.randrange(1, len(text) + 1)
        out += f"{size:x}{extension}\r\n".encode() + text[:size] + b"\r\n"
        text = text[size:]
    return bytes(out + b"0\r\n\r\n")


def a_body_in_chunks(fuzzer: Fuzzer, rng: Random) -> Shot:
    call = fuzzer.post(rng)
    body = chunked(rng, call.text or b"", rng.choice(["", ";a=b"]))
    message = fuzzer.message(call, "Transfer-Encoding: chunked", length=False, body=body)
    return Shot("", [message], 1)


def a_body_in_wrong_chunks(fuzzer: Fuzzer, rng: Random) -> Shot:
    call = fuzzer.post(rng)
    body = chunked(rng, call.text or b"")
    wrong = [
        body[: rng.randrange(len(body))],
        b"-1\r\n" + body,
        b"ffffffffffffffffffff\r\n" + body,
        b"0x5\r\n" + body,
        b"zz\r\n" + body,
        body.replace(b"\r\n", b"\n"),
        body[:-2] + b"X-Trailer: \0\r\n\r\n",
        b"5;" + b"a" * 20_000 + b"\r\n" + body,
        scrambled(rng, body),
    ]
    return Shot(
        "",
        [fuzzer.message(call, "Transfer-Encoding: chunked", length=False, body=rng.choice(wrong))],
    )


def a_compressed_body(fuzzer: Fuzzer, rng: Random) -> Shot:
    call = fuzzer.post(rng)
    text = call.text or b""
    encoding, body = rng.choice([("gzip", gzip.compress(text)), ("deflate", zlib.compress(text))])
    return Shot("", [fuzzer.message(call, f"Content-Encoding: {encoding}", body=body)], 1)


def a_body_that_is_not_compressed_as_it_says(fuzzer: Fuzzer, rng: Random) -> Shot:
    call = fuzzer.post(rng)
    packed = gzip.compress(call.text or b"")
    body = rng.choice(
        [call.text, packed[:-5], scrambled(rng, packed), packed + packed, b"\x1f\x8b"]
    )
    encoding = rng.choice(
        ["gzip", "deflate", "br", "zstd", "gzip, gzip", "compress", "x", "\u00e9"]
    )
    return Shot("", [fuzzer.message(call, f"Content-Encoding: {encoding}", body=body)])


def a_small_body_that_unpacks_to_a_large_one(fuzzer: Fuzzer, rng: Random) -> Shot:
    body = small_that_unpacks_to(LARGE_BYTES)
    message = fuzzer.message(fuzzer.post(rng), "Content-Encoding: deflate", body=body)
    return Shot(sentence(a_small_body_that_unpacks_to_a_large_one), [message], 1)


@functools.cache
def small_that_unpacks_to(size: int) -> bytes:
    """Return a zlib stream of blanks, without its end: nobody gets that far."""
    packer = zlib.compressobj()
    begin = packer.compress(b" " * MIB) + packer.flush(zlib.Z_FULL_FLUSH)
    repeated = packer.compress(b" " * MIB) + packer.flush(zlib.Z_FULL_FLUSH)
    return begin + repeated * (size // MIB - 1)


def another_content_type(fuzzer: Fuzzer, rng: Random) -> Shot:
    kinds = [
        "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
        "application/json; charset=utf-16", "application/json; charset=\x01", ";;;", "x" * 5000, "",
    ]  # fmt: skip
    return Shot("", [fuzzer.message(fuzzer.post(rng), f"Content-Type: {rng.choice(kinds)}")])


def text_in_another_encoding(fuzzer: Fuzzer, rng: Random) -> Shot:
    call = fuzzer.post(rng)
    text = (call.text or b"").decode()
    body = rng.choice(
        [text.encode("utf-16"), text.encode("utf-32-le"), b"\xef\xbb\xbf" + text.encode(),
         text.replace('"', "\u201c").encode(), base64.b64encode(text.encode()),
         text.encode("utf-7")]
    )  # fmt: skip
    return Shot("", [fuzzer.message(call, body=body)], 1)


def json_nested_deep(fuzzer: Fuzzer, rng: Random) -> Shot:
    call = fuzzer.post(rng)
    depth = rng.choice([500, 2000, 100_000])
    deep = b"[" * depth + rng.choice([b"]" * depth, b""])
    text = call.text or b""
    body = rng.choice(
        [deep, b'{"x": ' + deep + b", " + text[1:], text[:-1] + b', "held": ' + deep + b"}"]
    )
    return Shot("", [fuzzer.message(call, body=body)], 1)


def another_version(fuzzer: Fuzzer, rng: Random) -> Shot:
    versions = [
        "HTTP/1.0", "HTTP/0.9", "HTTP/1.2", "HTTP/2.0", "HTTP/9.9", "HTTP/11", "http/1.1",
        "HTTP/1.1 ", "HTTP", "ICY/1.1", "",
    ]  # fmt: skip
    version = rng.choice(versions)
    call = fuzzer.harmless_call(rng)
    return Shot("", [fuzzer.message(call, version=version)], 1 if version == "HTTP/1.0" else None)


def a_request_of_http_0_9(fuzzer: Fuzzer, rng: Random) -> Shot:
    return Shot(
        "", [rng.choice([b"GET /status\r\n", b"GET /work\n", b"GET /\r\n\r\n", b"GET\r\n\r\n"])]
    )


def the_greeting_of_another_protocol(fuzzer: Fuzzer, rng: Random) -> Shot:
    greetings = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0",
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + rng.randbytes(200),
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"EHLO example.org\r\n",
        b"*1\r\n$4\r\nPING\r\n",
        b"\x05\x01\x00",
    ]
    return Shot("", [rng.choice(greetings)])


def an_odd_path(fuzzer: Fuzzer, rng: Random) -> Shot:
    paths = [
        "/%00", "/work%00", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/./work", "//work",
        "/work/", "/WORK", "/work;x=1", "/work#x", "/work?", "/work?%", "/work?&&&", "/work?a=b=c",
        "/%", "/%zz", "/%ff", "/\udcff", "/\u00e9", "/" + "x" * 7000, "/" + "x" * 70_000,
        "/?" + "a=b&" * 3000, "*", "", "work", "?", "/ work", "/\t", "/work?batch_size=1 ",
        "\\work",
        "/work?worker=\udc80", "/work?worker=" + "%41" * 128, "/status?" + "%00" * 100,
    ]  # fmt: skip
    return Shot("", [fuzzer.message(fuzzer.harmless_call(rng), target=rng.choice(paths))])


def an_absolute_address_as_the_path(fuzzer: Fuzzer, rng: Random) -> Shot:
    call = fuzzer.harmless_call(rng)
    prefixes = [
        "http://dispatcher", "http://user:pass@dispatcher:80", "http://[::1]:80", "http://[::1",
        "http://x:99999999", "http://x:y", "https://dispatcher", "file://", "http:", "http://",
        "ftp://\u00e9", "http://" + "a" * 300, "//x", "javascript:", "http://xn--a", "http://\udcff",
    ]  # fmt: skip
    prefix = rng.choice(prefixes)
    replies = 1 if prefix == "http://dispatcher" else None
    return Shot("", [fuzzer.message(call, target=prefix + call.target)], replies)


def a_method_for_proxies(fuzzer: Fuzzer, rng: Random) -> Shot:
    call = Call(rng.choice(["CONNECT", "TRACE", "OPTIONS"]), "/status")
    target = rng.choice(["example.org:443", "*", "/status", "/work", "[::1]:1", ":", "x:99999"])
    return Shot("", [fuzzer.message(call, target=target)])


def only_the_head_of_a_reply(fuzzer: Fuzzer, rng: Random) -> Shot:
    call = Call("HEAD", rng.choice(["/status", "/metrics", "/work", "/results", "/nothing", "/"]))
    return Shot("", [fuzzer.message(call)], 1, no_bodies=True)


def an_odd_method(fuzzer: Fuzzer, rng: Random) -> Shot:
    call = fuzzer.harmless_call(rng)
    call.method = rng.choice(
        ["get", "G ET", "", "\u00e9", "X" * 500, "GET\0", "P\tOST", "{}", "\x7f", "1"]
    )
    return Shot("", [fuzzer.message(call)])


def an_odd_length(fuzzer: Fuzzer, rng: Random) -> Shot:
    call = fuzzer.post(rng)
    lengths = [
        "-1", "+5", "0x10", "1e3", "", "abc", "9" * 30, "1, 1", "5 5", "\u0663", "0", "1", "99999",
        str(64 << 20), str((64 << 20) + 1), "1_0", " 7", "1;2",
    ]  # fmt: skip
    length = rng.choice(lengths)
    return Shot("", [fuzzer.message(call, f"Content-Length: {length}", length=False)])


def two_lengths(fuzzer: Fuzzer, rng: Random) -> Shot:
    call = fuzzer.post(rng)
    length = len(call.text or b"") + rng.choice([0, 1, -1, 100])
    return Shot("", [fuzzer.message(call, f"Content-Length: {length}")])


def a_length_and_chunks(fuzzer: Fuzzer, rng: Random) -> Shot:
    call = fuzzer.post(rng)
    hidden = fuzzer.message(fuzzer.harmless_call(rng))
    body = rng.choice(
        [call.text or b"", chunked(rng, call.text or b"") + hidden, b"0\r\n\r\n" + hidden]
    )
    codings = [
        "chunked", "Chunked", "identity", "chunked, identity", "gzip, chunked", "xchunked",
        " chunked", "chunked\x0b", "chunked, chunked", "",
    ]  # fmt: skip
    coding = rng.choice(codings)
    return Shot("", [fuzzer.message(call, f"Transfer-Encoding: {coding}", body=body)])


def very_many_headers(fuzzer: Fuzzer, rng: Random) -> Shot:
    count = rng.choice([50, 300, 2000])
    headers = [f"X-{number}: {number}" for number in range(count)]
    return Shot("", [fuzzer.message(fuzzer.harmless_call(rng), *headers)])


def a_very_long_header(fuzzer: Fuzzer, rng: Random) -> Shot:
    size = rng.choice([4000, 8190, 9000, 100_000])
    header = rng.choice(
        ["X-Long: " + "x" * size, "X" * size + ": 1", "Cookie: " + "a=b; " * (size // 6)]
    )
    return Shot("", [fuzzer.message(fuzzer.harmless_call(rng), header)])


def an_odd_header(fuzzer: Fuzzer, rng: Random) -> Shot:
    headers = [
        "no colon", ": no name", "X : 1", " X: 1", "X: a\r\n folded", "X: \0", "X: \udcff\udcfe",
        "X\0: 1",
        "X: \x7f", "X(): 1", "X: a\rb", "X: a\nY: b", "\u00e9: 1", "X:", "X:\t\t", "Host: other",
        "Host: [::1", "Host: a b", "Host: \udc80", "Connection: upgrade\r\nUpgrade: websocket",
        "Upgrade: h2c", "Connection: keep-alive, close", "Connection: \x01", "Expect: 100-continue",
        "Expect: something", "Range: bytes=0-1", "If-Match: *", "Authorization: Bearer",
        "Authorization: Basic " + "=" * 100, "Cookie: =; ;;; \"",
        "Accept-Encoding: " + "gzip," * 500,
        "Keep-Alive: timeout=-1", "Trailer: Content-Length", "X-HTTP-Method-Override: DELETE",
        "Content-Encoding:", "Content-Length ", "Sec-WebSocket-Key1: x", "Max-Forwards: -1",
    ]  # fmt: skip
    return Shot("", [fuzzer.message(fuzzer.harmless_call(rng), rng.choice(headers))])


def other_line_ends(fuzzer: Fuzzer, rng: Random) -> Shot:
    message = fuzzer.message(fuzzer.harmless_call(rng))
    return Shot(
        "", [message.replace(b"\r\n", rng.choice([b"\n", b"\r", b"\n\r", b"\r\r\n", b"\0"]))]
    )


def a_request_that_breaks_off(fuzzer: Fuzzer, rng: Random) -> Shot:
    message = fuzzer.message(fuzzer.harmless_call(rng))
    return Shot("", [message[: rng.randrange(1, len(message))]])


def a_request_in_single_bytes(fuzzer: Fuzzer, rng: Random) -> Shot:
    return Shot("", split(rng, fuzzer.message(fuzzer.harmless_call(rng))), 1)


def split(rng: Random, message: bytes) -> list[bytes]:
    """Cut a message into single bytes for a while, and larger parts before and after."""
    start = rng.randrange(len(message))
    end = min(len(message), start + 20)
    return [message[:start], *(message[n : n + 1] for n in range(start, end)), message[end:]]


def several_requests_at_once(fuzzer: Fuzzer, rng: Random) -> Shot:
    count = rng.randrange(2, 9)
    calls = [fuzzer.harmless_call(rng) for _ in range(count)]
    messages = [fuzzer.message(call, close=call is calls[-1]) for call in calls]
    return Shot("", [b"".join(messages)], count)


def a_good_request_and_rubbish_behind_it(fuzzer: Fuzzer, rng: Random) -> Shot:
    message = fuzzer.message(fuzzer.harmless_call(rng), close=False)
    return Shot("", [message + rng.randbytes(rng.randrange(1, 300))])


WRONG_MESSAGES: list[MakeShot] = [
    a_body_in_chunks,
    a_body_in_wrong_chunks,
    a_compressed_body,
    a_body_that_is_not_compressed_as_it_says,
    another_content_type,
    text_in_another_encoding,
    json_nested_deep,
    another_version,
    a_request_of_http_0_9,
    the_greeting_of_another_protocol,
    an_odd_path,
    an_odd_path,
    an_absolute_address_as_the_path,
    a_method_for_proxies,
    only_the_head_of_a_reply,
    an_odd_method,
    an_odd_length,
    two_lengths,
    a_length_and_chunks,
    very_many_headers,
    a_very_long_header,
    an_odd_header,
    an_odd_header,
    other_line_ends,
    a_request_that_breaks_off,
    a_request_in_single_bytes,
    several_requests_at_once,
    a_good_request_and_rubbish_behind_it,
]


# -------------------------------------------------------------------- what comes back

STATUS_LINE = re.compile(rb"HTTP/[0-9]\.[0-9] ([1-9][0-9][0-9])( [^\r\n]*)?")
HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n\0]*)")


class WrongReplyError(Exception):
    """What came back is nothing that a client may ever get; the text says why."""


def require(holds: object, what: str) -> None:
    if not holds:
        raise WrongReplyError(what)


@dataclass
class Reply:
    """A reply, read whole."""

    status: int
    headers: dict[str, str]
    body: bytes = b""

    @property
    def is_json(self) -> bool:
        return self.headers.get("content-type", "").startswith("application/json")

    @property
    def keeps(self) -> bool:
        """Whether the server keeps the connection."""
        # aiohttp's own answer to what is no HTTP ends it without saying so; it is no JSON.
        is_http = self.status != 400 or self.is_json
        return is_http and self.headers.get("connection") != "close"


async def read_reply(reader: asyncio.StreamReader, *, no_body: bool) -> Reply | None:
    """Read one reply; None when the connection was closed. WrongReplyError when it is no HTTP."""
    while True:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            rest = getattr(error, "partial", b"")
            require(not rest, f"a reply that breaks off: {rest[:200]!r}")
            return None
        first, *lines = head[:-4].split(b"\r\n")
        status = STATUS_LINE.fullmatch(first)
        pairs = [HEADER.fullmatch(line) for line in lines]
        if status is None or not all(pairs):
            raise WrongReplyError(f"no reply in HTTP: {head[:500]!r}")
        headers = {pair[1].decode().lower(): pair[2].decode("latin-1") for pair in pairs if pair}
        reply = Reply(int(status[1]), headers)
        if reply.status >= 200:
            break
    if no_body or reply.status in (204, 304):
        return reply
    require("transfer-encoding" not in headers, f"no reply of this server has chunks: {headers}")
    try:
        length = headers.get("content-length")
        reply.body = await (reader.read() if length is None else reader.readexactly(int(length)))
    except (ConnectionError, asyncio.IncompleteReadError) as error:
        raise WrongReplyError(f"a body that breaks off: {error}") from error
    return reply


def judge(reply: Reply) -> None:
    """Raise WrongReplyError when a client must never get this."""
    shown = f"{reply.status}: {reply.body[:300]!r}"
    require(reply.status < 500 or reply.status in (503, 507), f"answered {shown}")
    if not reply.is_json or not reply.body:
        return
    value = json.loads(reply.body)
    if reply.status >= 400:
        require(value.keys() == {"status", "message"}, f"a refusal without a sentence: {shown}")
    taken = "accepted" in value.get("outcomes", ()) and "recording" not in value
    require(not taken, f"a result was taken: {shown}")


class Line:
    """One of the fuzzer's connections; it is opened anew when the server does not keep it."""

    def __init__(self, address: str) -> None:
        self._host, _, self._port = address.rpartition(":")
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def fire(self, shot: Shot, patience_s: float = REPLY_S) -> list[int]:
        """Send it, judge what comes back, return the statuses. Raises WrongReplyError.

        A request that need not be answered is given up after `patience_s` without a reply.
        """
        keep = False
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection(self._host, int(self._port))
            replies = await self._exchange(*self._streams, shot, patience_s)
            keep = shot.keeps and replies[-1].keeps
            return [reply.status for reply in replies]
        finally:
            if not keep:
                self.hang_up()

    def hang_up(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None

    async def _exchange(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        shot: Shot,
        patience_s: float,
    ) -> list[Reply]:
        for part in shot.parts:
            writer.write(part)
            await asyncio.sleep(0)
        with suppress(ConnectionError):  # it may close before it has read everything
            await writer.drain()
        if shot.replies is not None:
            patience_s = REPLY_S
        replies: list[Reply] = []
        while shot.replies is None or len(replies) < shot.replies:
            coming = read_reply(reader, no_body=shot.no_bodies)
            try:
                reply = await asyncio.wait_for(coming, patience_s)
            except TimeoutError:
                require(shot.replies is None, f"no reply within {patience_s:g} s")
                break
            if reply is None:
                require(shot.replies is None, f"closed after {len(replies)} replies")
                break
            judge(reply)
            expected = shot.statuses
            require(not expected or reply.status in expected, f"{reply.status}, not {expected}")
            replies.append(reply)
        return replies


# -------------------------------------------------------------------- the well-behaved client


class GoodClient:
    """Works on the run as a worker does, and no faster than the fuzzer."""

    def __init__(self, server: Server, ledger: Ledger) -> None:
        self._server = server
        self._ledger = ledger
        self._client = server.client("good")
        self._nonce = 0
        self.complete = False
        self.steps_taken = 0
        self.problems: list[str] = []

    def work(self, count: int) -> int:
        """Take up to `count` items and answer them; return how many there were."""
        work = self._client.get_work(count)
        self._expect(work.status is not WorkStatus.SERVER_UNAVAILABLE, f"work: {work}")
        self.complete = work.status is WorkStatus.ALL_WORK_COMPLETE
        if work.items:
            self._answer(work.items)
        return len(work.items)

    def _answer(self, items: list[WorkItem]) -> None:
        held = {str(item.lease): 1 for item in items}
        beat = self._client.heartbeat(HeartbeatRequest("good", held))
        self._expect(beat.status is WorkStatus.OK, f"heartbeat: {beat}")
        self._record_a_step_of(items)
        for item in items:
            self._ledger.note_grant(item.work_id, item.content, item.retry_count, item.attempt)
            self._nonce += 1
            item.set_result(result_of(item.content, "good", self._nonce))
        reply = self._client.submit_results(items)
        self._expect(set(reply.outcomes) <= {"accepted", "duplicate"}, f"results: {reply}")
        for item, outcome in zip(items, reply.outcomes, strict=True):
            self._ledger.note_outcome(item.work_id, str(item.result), outcome)

    def _record_a_step_of(self, items: list[WorkItem]) -> None:
        """Only what was recorded for these leases, or by whoever guessed them, comes back."""
        steps = [
            StepItem(x.work_id, str(x.lease), x.attempt, (9, n), "good", "1", x.run)
            for n, x in enumerate(items)
        ]
        reply = self._client.record_steps(steps)
        known = {StepOutcome.ACCEPTED, StepOutcome.STALE}
        self._expect(set(reply.outcomes) <= known and reply.recording, f"steps: {reply}")
        self.steps_taken += reply.outcomes.count(StepOutcome.ACCEPTED)
        carried = [step for item in items for step in item.steps or []]
        odd = [x for x in carried if x.hash != "good" and x.response not in RESPONSES]
        self._expect(not odd, f"steps that nobody recorded: {odd}")

    def _expect(self, holds: bool, what: str) -> None:
        if not holds:
            self.problems.append(f"the well-behaved client was answered so: {what}")

    @property
    def done(self) -> int:
        return len(self._ledger.accepted)

    def set_work_timeout(self, seconds: float) -> None:
        """Have what the fuzzer holds come back soon."""
        connection = http.client.HTTPConnection(self._server.address, timeout=REPLY_S)
        body = json.dumps({"timeout": seconds})
        connection.request("POST", "/work_timeout", body, self._server.admin_headers)
        self._expect((reply := connection.getresponse()).status == 200, f"work timeout: {reply}")
        connection.close()

    async def keep_up(self, progress: Callable[[], float]) -> None:
        """Work while `progress` goes from 0 to 1; the last lines are left for after it."""
        while progress() < 1:
            due = EARLY + (LINES - EARLY - 10) * progress()
            worked = self.done < due and await asyncio.to_thread(self.work, 4)
            if not worked:
                await asyncio.to_thread(self.set_work_timeout, 1.0)
                await asyncio.sleep(0.1)

    async def finish(self) -> None:
        """Work until the server says that all is complete."""
        await asyncio.to_thread(self.set_work_timeout, 0.2)
        while not self.complete:
            if not await asyncio.to_thread(self.work, 50):
                await asyncio.sleep(0.1)


# -------------------------------------------------------------------- the test


@dataclass
class Fuzzed:
    """What the fuzzer did and saw."""

    fired: int = 0
    latency_s: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


async def fuzz(address: str, fuzzer: Fuzzer, seen: Fuzzed, shots: Iterable[int]) -> None:
    """Fire the shots of these numbers over some connections at a time."""
    numbers = iter(shots)

    async def shooter() -> None:
        line = Line(address)
        for number in numbers:
            shot = fuzzer.shot(number)
            began = time.monotonic()
            try:
                patience_s = NO_REPLY_S + NO_REPLY_LATENCIES * seen.latency_s
                seen.statuses.update(await line.fire(shot, patience_s))
                if shot.replies is not None:
                    took_s = time.monotonic() - began
                    seen.latency_s += (took_s - seen.latency_s) / 20
            except (WrongReplyError, OSError) as error:
                seen.problems.append(
                    f"DISPATCHER_TEST_SEED={SEED}, request {number}: {error}\n  {shot!r}"
                )
            seen.fired += 1
        line.hang_up()

    await asyncio.gather(*(shooter() for _ in range(CONNECTIONS)))


async def fuzz_with_large_bodies(address: str, fuzzer: Fuzzer, seen: Fuzzed) -> None:
    """Fire those requests that unpack to the most, one after the other."""
    for nth in range(1, LARGE_AT_THE_END + 1):
        await fuzz(address, fuzzer, seen, [nth * LARGE_EVERY - 1])


def memory_bytes(pid: int) -> dict[str, int]:
    """Return the resident memory of a process, now and at most; nothing where it is not told."""
    path = Path(f"/proc/{pid}/status")
    fields = path.read_text().splitlines() if path.exists() else []
    found = (re.fullmatch(r"(VmRSS|VmHWM):\s+(\d+) kB", line) for line in fields)
    return {match[1]: int(match[2]) << 10 for match in found if match}


def serve(directory: Path) -> AbstractContextManager[Server]:
    """Serve a run of LINES lines whose items come back soon when nobody answers them."""
    infile = directory / "in.jsonl"
    infile.write_text("".join(f"{input_line(number)}\n" for number in range(LINES)))
    files = ["--infile", infile, "--outfile", directory / "out.jsonl"]
    limits = ["--max-retries", "-1", "--lease-term", "2", "--work-timeout", "1", "--retry", "0.1"]
    return dispatcher_server(*files, *limits)


def judged(ledger: Ledger, directory: Path) -> list[str]:
    lines = [input_line(number) for number in range(LINES)]
    return ledger.problems(lines, (directory / "out.jsonl").read_bytes())


@pytest.mark.slow
def test_ten_thousand_wrong_requests_harm_neither_the_server_nor_the_run(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        where = json.loads(server.state_file.read_text())
        ledger, seen = Ledger(max_retries=-1), Fuzzed()
        client = GoodClient(server, ledger)
        fuzzer = Fuzzer(SEED, where["run"], Access.to(server))
        before = memory_bytes(where["pid"])

        async def everything() -> None:
            assert client.work(EARLY) == EARLY
            shots = range(CALLS + MESSAGES + NOISE)
            fuzzing = asyncio.create_task(fuzz(server.address, fuzzer, seen, shots))
            await client.keep_up(lambda: 1 if fuzzing.done() else 0.99 * seen.fired / len(shots))
            await fuzzing
            await fuzz_with_large_bodies(server.address, fuzzer, seen)
            await client.finish()

        uvloop.run(asyncio.wait_for(everything(), 300))
        after = memory_bytes(where["pid"])
        server.process.stop()
        code = server.process.wait()
    said = server.process.output
    problems = seen.problems + client.problems + judged(ledger, tmp_path)
    print(f"{client.steps_taken} steps of the well-behaved client recorded")
    assert client.steps_taken >= EARLY
    print(f"{seen.fired} requests, {dict(sorted(seen.statuses.items()))}, {len(problems)} problems")
    print("resident MiB:", *(f"{k} {v >> 20}" for k, v in [*before.items(), *after.items()]))
    assert not problems, f"{len(problems)} problems, the first:\n" + "\n".join(problems[:5])
    assert code == 0
    assert "Traceback" not in said, said[:5000]
    assert after.get("VmHWM", 0) < PEAK_BYTES
    assert after.get("VmRSS", 0) < RESIDENT_BYTES


class Stranger(Fuzzer):
    """Somebody who knows everything of a run but its token."""

    def shot(self, number: int) -> Shot:
        rng = Random(f"{self._seed}:{number}")
        call = self.valid_call(rng)
        if call.path == "/results":  # results that would be taken, were they not a stranger's
            work_id = rng.randrange(LINES)
            result = result_of(input_line(work_id), "stranger", number)
            call.body = {"items": [{"work_id": work_id, "result": result}]}
        if call.body is not None:
            call.text = as_json(call.body)
        return self.stranger(rng, call)


def test_a_connection_that_idles_keeps_nothing_of_its_last_body(tmp_path: Path) -> None:
    body = b'{"items": [], "padding": "' + b"x" * (32 * MIB) + b'"}'
    with serve(tmp_path) as server:
        pid = json.loads(server.state_file.read_text())["pid"]
        headers = server.headers | {"Content-Type": "application/json"}
        idle = [http.client.HTTPConnection(server.address, timeout=REPLY_S) for _ in range(12)]
        for connection in idle:
            connection.request("POST", "/results", body, headers)
            reply = connection.getresponse()
            assert (reply.status, reply.getheader("Connection")) == (200, None), reply.read()
            reply.read()
        resident = memory_bytes(pid).get("VmRSS", 0)
        for connection in idle:
            connection.close()
    assert resident < RESIDENT_BYTES


def status_of(server: Server) -> dict[str, Any]:
    with server.client() as client:
        return client.status()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that no test may change anything at."""
    with serve(tmp_path_factory.mktemp("strangers")) as server:
        yield server


def test_whoever_has_not_got_the_token_changes_nothing(server: Server) -> None:
    before, seen = status_of(server), Fuzzed()
    stranger = Stranger(SEED, str(before["run"]), Access.to(server))

    uvloop.run(asyncio.wait_for(fuzz(server.address, stranger, seen, range(600)), 60))

    assert status_of(server) == before
    assert not seen.problems, "\n".join(seen.problems[:5])
    assert seen.statuses.total() == 600
    print(f"{seen.fired} calls of strangers, {dict(sorted(seen.statuses.items()))}")


@pytest.mark.parametrize("header", ["", "Expect: 100-continue\r\n"], ids=["body", "announced body"])
def test_a_stranger_is_refused_before_the_body_is_sent(header: str, server: Server) -> None:
    head = f"POST /results HTTP/1.1\r\nHost: x\r\nContent-Length: {64 * MIB}\r\n{header}\r\n"
    shot = Shot("only a head", [head.encode()], 1, statuses={401})
    assert uvloop.run(asyncio.wait_for(Line(server.address).fire(shot), 60)) == [401]


WAYS_TO_SETTINGS = [
    "/work_timeout", "/work_timeout?timeout=5", "/%77ork_timeout", "/work%5Ftimeout",
    "/./work_timeout", "/healthz/../work_timeout", "//work_timeout", "/work_timeout/",
    "/work_timeout#", "/WORK_TIMEOUT", "http://x/work_timeout", "http://x/%77ork_timeout",
    "/work_timeout%00", "/work_timeout;x",
]  # fmt: skip
WAYS_TO_STATUS = [
    "/status", "/%73tatus", "/healthz/../status", "/./status", "//status",
    "/healthz%2f..%2fstatus", "http://x/status", "http://healthz/status", "/status?/healthz",
    "/status#/healthz", "/metrics",
]  # fmt: skip


def statuses_of(server: Server, access: Access, call: Call, targets: list[str]) -> set[int]:
    """Return how a call is answered, however its path is written."""
    fuzzer = Fuzzer(SEED, "", access)

    async def fire_all() -> set[int]:
        shots = [Shot(t, [fuzzer.message(call, target=t)], 1) for t in targets]
        line = Line(server.address)
        return {status for shot in shots for status in await line.fire(shot)}

    return set(uvloop.run(asyncio.wait_for(fire_all(), 60)))


def test_the_token_of_workers_changes_no_setting_however_the_path_is_written(
    server: Server,
) -> None:
    before = status_of(server)
    call = Call("POST", "/work_timeout", text=b'{"timeout": 5}')
    workers = Access(server.headers, server.headers)
    assert statuses_of(server, workers, call, WAYS_TO_SETTINGS) <= {400, 403, 404}
    assert status_of(server) == before


def test_strangers_do_not_see_the_run_however_the_path_is_written(server: Server) -> None:
    call = Call("GET", "/status")
    assert statuses_of(server, Access({}, {}), call, WAYS_TO_STATUS) <= {400, 401}
