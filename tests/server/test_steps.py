"""Steps over HTTP: each is judged for itself, none is a fault of the server, and all come back."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dispatcher.config import RunSettings
from dispatcher.core.work_queue import QueuePolicy
from dispatcher.server import access
from dispatcher.server.access import Gate
from dispatcher.server.connections import ConnectionLimits
from tests.support import serving
from tests.support.serving import Peer, Running, head, run

Step = dict[str, Any]
DEEP = "[" * 100_000 + "]" * 100_000
LIMITS = ConnectionLimits()


class Client:
    """A worker that sends one call after the other over one connection."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, Any]:
        self._peer.send(head(method, path, f"Content-Length: {len(body)}") + body)
        status, _, answer = await self._peer.reply()
        return status, answer

    async def post(self, path: str, value: Any) -> Any:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        status, answer = await self.ask("POST", path, body)
        assert status == 200, answer
        return answer

    async def take(self, count: int = 1) -> list[dict[str, Any]]:
        status, work = await self.ask("GET", f"/work?batch_size={count}")
        assert status == 200
        items: list[dict[str, Any]] = work["items"]
        return items

    async def again(self, item: dict[str, Any]) -> dict[str, Any]:
        """Give an item back, and return it as it is handed out next."""
        named = {"work_id": item["work_id"], "lease": item["lease"], "charge": False}
        assert (await self.post("/release", {"items": [named]}))["released_count"] == 1
        (item,) = await self.take()
        return item


def on_a_server(directory: Path, scenario: Callable[[Client], Awaitable[None]]) -> None:
    async def whole(server: Running) -> None:
        peer = await server.connect()
        try:
            await scenario(Client(peer))
        finally:
            peer.close()

    run(directory, whole, LIMITS)


def step_of(item: dict[str, Any], *pos: int, **fields: Any) -> Step:
    step = {
        "work_id": item["work_id"],
        "lease": item["lease"],
        "attempt": item["attempt"],
        "run": item["run"],
        "pos": list(pos),
        "hash": "0123456789abcdef",
        "response": '{"text": "yes"}',
    }
    return step | fields


# -------------------------------------------------------------------- one bad step


def changed(**fields: Any) -> Callable[[Step], Any]:
    return lambda step: step | fields


def without(name: str) -> Callable[[Step], Any]:
    return lambda step: {key: value for key, value in step.items() if key != name}


def instead(value: Any) -> Callable[[Step], Any]:
    return lambda step: value


INVALID, STALE, FULL, ACCEPTED = "invalid", "stale", "full", "accepted"

BAD_STEPS: dict[str, tuple[Callable[[Step], Any], str]] = {
    "no work id": (without("work_id"), INVALID),
    "no lease": (without("lease"), INVALID),
    "no attempt": (without("attempt"), INVALID),
    "no position": (without("pos"), INVALID),
    "no hash": (without("hash"), INVALID),
    "a step that is null": (instead(None), INVALID),
    "a step that is a number": (instead(7), INVALID),
    "a step that is a list": (instead([0, "0.1"]), INVALID),
    "a step without fields": (instead({}), INVALID),
    "a work id that is a string": (changed(work_id="0"), INVALID),
    "a work id that is a float": (changed(work_id=0.0), INVALID),
    "a work id that is true": (changed(work_id=True), INVALID),
    "a work id of a line that was not handed out": (changed(work_id=2), STALE),
    "a work id of a line that does not exist": (changed(work_id=1000), STALE),
    "a negative work id": (changed(work_id=-1), STALE),
    "a work id beyond 64 bits": (changed(work_id=2**70), STALE),
    "a work id of 4000 digits": (changed(work_id=10**4000), STALE),
    "a lease that is a number": (changed(lease=7), INVALID),
    "a lease that is null": (changed(lease=None), INVALID),
    "a lease that is no lease": (changed(lease="\x00 or so"), STALE),
    "a lease that never was": (changed(lease="0.99999"), STALE),
    "a lease of 10,000 characters": (changed(lease="0." * 5000), STALE),
    "a lease that is half a surrogate pair": (changed(lease="\ud800"), STALE),
    "an attempt that is a string": (changed(attempt="1"), INVALID),
    "an attempt to come": (changed(attempt=2), STALE),
    "an attempt beyond 64 bits": (changed(attempt=2**70), STALE),
    "a negative attempt": (changed(attempt=-1), STALE),
    "another run": (changed(run="0123456789abcdef"), "wrong_run"),
    "an empty run": (changed(run=""), "wrong_run"),
    "a run that is half a surrogate pair": (changed(run="\ud800"), "wrong_run"),
    "a run that is a number": (changed(run=7), INVALID),
    "a position of one number": (changed(pos=[1]), INVALID),
    "a position of three numbers": (changed(pos=[1, 0, 0]), INVALID),
    "a position that is a number": (changed(pos=1), INVALID),
    "a position that is a string": (changed(pos="10"), INVALID),
    "a position that is an object": (changed(pos={"0": 1}), INVALID),
    "a position of floats": (changed(pos=[1.0, 0.5]), INVALID),
    "a position of NaN": (changed(pos=[float("nan"), 0]), INVALID),
    "an infinite position": (changed(pos=[0, float("inf")]), INVALID),
    "a position of truths": (changed(pos=[True, False]), INVALID),
    "a position of strings": (changed(pos=["1", "0"]), INVALID),
    "a negative yield": (changed(pos=[-1, 0]), INVALID),
    "a negative place": (changed(pos=[0, -1]), INVALID),
    "a yield of 2^31": (changed(pos=[2**31, 0]), INVALID),
    "a place beyond 64 bits": (changed(pos=[0, 2**64]), INVALID),
    "a position of 4000 digits": (changed(pos=[10**4000, 0]), INVALID),
    "the last yield there may be": (changed(pos=[2**31 - 1, 2**31 - 1]), ACCEPTED),
    "a hash that is empty": (changed(hash=""), INVALID),
    "a hash that is a number": (changed(hash=7), INVALID),
    "a hash that is null": (changed(hash=None), INVALID),
    "a hash of 65 characters": (changed(hash="x" * 65), INVALID),
    "a hash of a million characters": (changed(hash="x" * 1_000_000), INVALID),
    "a hash that closes its string": (changed(hash='","x'), INVALID),
    "a hash with a line end": (changed(hash="ab\n"), INVALID),
    "a hash with a backslash": (changed(hash="\\u0041"), INVALID),
    "a hash of another script": (changed(hash="\u0663\u00e9"), INVALID),
    "a hash that is half a surrogate pair": (changed(hash="\ud800"), INVALID),
    "a hash of 64 characters": (changed(hash="f" * 64), ACCEPTED),
    "a response that is an object": (changed(response={"text": "yes"}), INVALID),
    "a response that is a number": (changed(response=7), INVALID),
    "a response that is false": (changed(response=False), INVALID),
    "an empty response": (changed(response=""), INVALID),
    "a blank response": (changed(response=" \t"), INVALID),
    "a response that is no JSON": (changed(response="hello"), INVALID),
    "a response that breaks off": (changed(response='{"a": 1'), INVALID),
    "a response of two values": (changed(response="1,2"), INVALID),
    "a response that closes the record": (changed(response='1]\n["cut",0,[0,0]]'), INVALID),
    "a response with a line end": (changed(response='{"a":\n1}'), INVALID),
    "a response with a carriage return": (changed(response='{"a":\r1}'), INVALID),
    "a response that is NaN": (changed(response="NaN"), INVALID),
    "a response that holds infinity": (changed(response="[-Infinity]"), INVALID),
    "a response with half a surrogate pair": (changed(response='"\ud800"'), INVALID),
    "a response with half a pair, escaped": (changed(response='"\\ud800"'), INVALID),
    "a response with a raw NUL": (changed(response='"\0"'), INVALID),
    "a response with a byte order mark": (changed(response="\ufeff1"), INVALID),
    "a response nested 100,000 deep": (changed(response=DEEP), INVALID),
    "a response nested without an end": (changed(response="[" * 100_000), INVALID),
    "a response of 1 MiB and a byte": (changed(response="1" * ((1 << 20) + 1)), FULL),
    "a response with odd line ends": (changed(response='"\u2028\u0085"'), ACCEPTED),
    "a response beyond every float": (changed(response="1e999"), ACCEPTED),
    "a response that is null": (changed(response="null"), ACCEPTED),
    "fields nobody knows": (changed(color="red", nested=[{"deep": [1]}]), ACCEPTED),
}


@pytest.mark.parametrize("kind", BAD_STEPS)
def test_a_bad_step_is_told_apart_and_harms_no_other(kind: str, tmp_path: Path) -> None:
    make, expected = BAD_STEPS[kind]

    async def scenario(client: Client) -> None:
        one, other = await client.take(2)
        bad = make(step_of(one, 1, 0))
        steps = [step_of(one, 0, 0), bad, step_of(other, 0, 0), bad, step_of(one, 2, 0)]

        reply = await client.post("/steps", {"steps": steps, "worker": "w"})

        outcomes = [ACCEPTED, expected, ACCEPTED, expected, ACCEPTED]
        assert reply == {"status": "OK", "outcomes": outcomes, "recording": True}
        _, status = await client.ask("GET", "/status")
        assert status["steps"] == 3 + (expected == ACCEPTED)
        assert status["step_mismatches"] == 0
        named = [{"work_id": x["work_id"], "lease": x["lease"]} for x in (one, other)]
        await client.post("/release", {"items": named})
        one, other = await client.take(2)
        carried = [step["pos"] for step in one["steps"]]
        if expected == ACCEPTED:
            at = bad["pos"]
            (step,) = (step for step in one["steps"] if step["pos"] == at)
            assert (step["hash"], step["response"]) == (bad["hash"], bad["response"])
            carried.remove(at)
        assert carried == [[0, 0], [2, 0]]
        assert [step["pos"] for step in other["steps"]] == [[0, 0]]

    on_a_server(tmp_path, scenario)


def test_all_kinds_of_bad_steps_in_one_call_are_told_apart(tmp_path: Path) -> None:
    """Beside steps that no JSON is, a number of many digits may be no number either."""

    async def scenario(client: Client) -> None:
        (item,) = await client.take()
        steps = [make(step_of(item, n, 0)) for n, (make, _) in enumerate(BAD_STEPS.values())]

        reply = await client.post("/steps", {"steps": steps})

        for kind, outcome in zip(BAD_STEPS, reply["outcomes"], strict=True):
            expected = {BAD_STEPS[kind][1]}
            if "digits" in kind or "64 bits" in kind:
                expected = {STALE, INVALID}
            assert outcome in expected, kind
        assert reply["outcomes"].count(ACCEPTED) > 5

    on_a_server(tmp_path, scenario)


BODIES: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"steps",
    "a list": b"[]",
    "no steps": b"{}",
    "steps that are null": b'{"steps": null}',
    "steps that are an object": b'{"steps": {"0": 1}}',
    "steps that are a string": b'{"steps": "[]"}',
    "no UTF-8": b'\xff{"steps": []}',
    "a body nested 100,000 deep": DEEP.encode(),
    "a field nested 100,000 deep": b'{"x": %b, "steps": []}' % DEEP.encode(),
    "steps nested 100,000 deep": b'{"steps": %b}' % DEEP.encode(),
    "a body that breaks off": b'{"steps": [{"work_id": 0',
    "too many steps": b'{"steps": [%b1]}' % (b"1," * access.MAX_ITEMS),
}


@pytest.mark.parametrize("kind", BODIES)
def test_a_body_without_steps_is_refused_with_a_sentence(kind: str, tmp_path: Path) -> None:
    async def scenario(client: Client) -> None:
        await client.take()
        status, answer = await client.ask("POST", "/steps", BODIES[kind])
        assert status == 400
        assert answer.keys() == {"status", "message"}
        assert "\n" not in answer["message"]
        _, told = await client.ask("GET", "/status")
        assert (told["steps"], told["step_mismatches"]) == (0, 0)

    on_a_server(tmp_path, scenario)


@pytest.mark.parametrize("worker", [None, "", 7, "\ud800", "x" * 10_000, ["w"]])
def test_whatever_name_a_client_gives_its_steps_count(worker: Any, tmp_path: Path) -> None:
    async def scenario(client: Client) -> None:
        (item,) = await client.take()
        body = {"steps": [step_of(item, 0, 0)], "worker": worker}
        assert (await client.post("/steps", body))["outcomes"] == [ACCEPTED]
        assert (await client.post("/steps", {"steps": []}))["outcomes"] == []

    on_a_server(tmp_path, scenario)


def test_other_methods_are_refused(tmp_path: Path) -> None:
    async def scenario(client: Client) -> None:
        status, _ = await client.ask("GET", "/steps")
        assert status == 405

    on_a_server(tmp_path, scenario)


def test_a_run_that_records_nothing_says_so_in_every_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = partial(RunSettings, policy=QueuePolicy(run_step_bytes=0))
    monkeypatch.setattr(serving, "RunSettings", settings)

    async def scenario(client: Client) -> None:
        (item,) = await client.take()
        steps = [step_of(item, 0, 0), step_of(item, 1, 0, response="1")]
        reply = await client.post("/steps", {"steps": steps})
        assert reply == {"status": "OK", "outcomes": [FULL, FULL], "recording": False}
        assert (await client.post("/steps", {"steps": []}))["recording"] is False
        assert (await client.again(item))["steps"] is None

    on_a_server(tmp_path, scenario)


def test_a_stranger_records_nothing(tmp_path: Path) -> None:
    async def scenario(server: Running) -> None:
        body = json.dumps({"steps": []}).encode()
        call = head("POST", "/steps", f"Content-Length: {len(body)}") + body
        assert await server.first_status(call) == "401"

    run(tmp_path, scenario, LIMITS, Gate("secret", "admin"))


# -------------------------------------------------------------------- what comes back


def test_steps_come_back_with_their_item_byte_for_byte(tmp_path: Path) -> None:
    answers = ['{"a": "\u20ac\U0001f600"}', '"\\ud83d\\ude00"', "[1, 2.50]", '"\u2028"', " 7\t"]

    async def scenario(client: Client) -> None:
        (item,) = await client.take()
        assert item["steps"] is None
        sent = [
            step_of(item, n // 2, n % 2, response=answer, hash=f"{n}f")
            for n, answer in enumerate(answers)
        ]
        assert (await client.post("/steps", {"steps": sent}))["outcomes"] == [ACCEPTED] * 5

        item = await client.again(item)

        assert item["steps"] == [
            {"pos": step["pos"], "hash": step["hash"], "response": step["response"].strip(" \t")}
            for step in sent
        ]

    on_a_server(tmp_path, scenario)


def test_a_step_without_a_response_drops_what_stands_there_and_after_it(tmp_path: Path) -> None:
    async def scenario(client: Client) -> None:
        (item,) = await client.take()
        steps = [step_of(item, n, 0) for n in range(3)]
        cut = [step_of(item, 1, 0, response=None, hash="0"), step_of(item, 1, 0, hash="new")]
        await client.post("/steps", {"steps": steps})
        assert (await client.post("/steps", {"steps": cut}))["outcomes"] == [ACCEPTED] * 2
        item = await client.again(item)
        carried = [(step["pos"], step["hash"]) for step in item["steps"]]
        assert carried == [([0, 0], steps[0]["hash"]), ([1, 0], "new")]
        _, status = await client.ask("GET", "/status")
        assert (status["steps"], status["step_mismatches"]) == (4, 1)

    on_a_server(tmp_path, scenario)


@pytest.mark.parametrize(
    ("how", "left"),
    [
        ({"charge": False}, 3),
        ({"charge": True}, 3),
        ({"steps": "drop"}, None),
        ({"keep_yields": 2}, 2),
        ({"keep_yields": 0}, None),
        ({"keep_yields": -5}, None),
        ({"keep_yields": 2**70}, 3),
        ({"steps": "sideways"}, 3),
        ({"fresh_start": True, "steps": "drop"}, None),
    ],
)
def test_what_a_release_leaves_of_the_steps(
    how: dict[str, Any], left: int | None, tmp_path: Path
) -> None:
    async def scenario(client: Client) -> None:
        (item,) = await client.take()
        await client.post("/steps", {"steps": [step_of(item, n, 0) for n in range(3)]})
        named = {"work_id": 0, "lease": item["lease"], **how}
        assert (await client.post("/release", {"items": [named]}))["released_count"] == 1
        (item,) = await client.take()
        assert (item["steps"] and len(item["steps"])) == left
        assert item["fresh_starts"] == ("fresh_start" in how)

    on_a_server(tmp_path, scenario)


def test_an_old_clients_release_drops_the_steps(tmp_path: Path) -> None:
    async def scenario(client: Client) -> None:
        (item,) = await client.take()
        await client.post("/steps", {"steps": [step_of(item, 0, 0)]})
        await client.post("/release", {"work_ids": [0]})
        (item,) = await client.take()
        assert (item["steps"], item["retry_count"]) == (None, 1)

    on_a_server(tmp_path, scenario)


def test_steps_of_another_attempt_or_of_a_done_item_are_stale(tmp_path: Path) -> None:
    async def scenario(client: Client) -> None:
        item, done = await client.take(2)
        old = step_of(item, 0, 0)
        await client.post(
            "/release", {"items": [{"work_id": 0, "lease": item["lease"], "charge": True}]}
        )
        (item,) = await client.take()
        result = {"work_id": 1, "result": "{}", "lease": done["lease"], "run": done["run"]}
        await client.post("/results", {"items": [result]})
        steps = [old, step_of(item, 0, 0, attempt=1), step_of(item, 0, 0), step_of(done, 0, 0)]
        reply = await client.post("/steps", {"steps": steps})
        assert reply["outcomes"] == [STALE, STALE, ACCEPTED, STALE]

    on_a_server(tmp_path, scenario)
