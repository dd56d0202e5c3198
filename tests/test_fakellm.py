"""The fake model server, seen through the real openai client, plain HTTP and raw sockets."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import uvloop
from aiohttp import ClientConnectionResetError, web
from openai import AsyncOpenAI

from dispatcher.fakellm import (
    FakeLLM,
    FakeLLMSettings,
    FakeLLMSettingsError,
    Rule,
    _Window,
    load_settings,
    main,
)
from dispatcher.taskmanager.backend.rate_limits import read_limits

CHAT = "/chat/completions"
EMBED = "/embeddings"
GOLDEN = "fake answer fd675966: forest ivory orchard falcon ocean velvet"
QUESTION: list[Any] = [{"role": "user", "content": "what is a river"}]


def ask(text: str = "what is a river", **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **fields}


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine, for at most 15 s."""
    asyncio.run(asyncio.wait_for(coroutine, 15))


class Served:
    """A running server with an openai client and a plain HTTP client beside it."""

    def __init__(self, fake: FakeLLM, url: str, http: aiohttp.ClientSession) -> None:
        self.fake = fake
        self.url = url
        self.http = http

    @functools.cached_property  # its TLS context alone takes longer than most tests
    def client(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=self.url, api_key="key", max_retries=0)

    async def post(self, body: Any, path: str = CHAT) -> tuple[int, bytes, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.http.post(self.url + path, data=data) as reply:
            return reply.status, await reply.read(), reply.headers

    async def text(self, text: str = "what is a river", **fields: Any) -> str:
        status, body, _ = await self.post(ask(text, **fields))
        assert status == 200, body
        content = json.loads(body)["choices"][0]["message"]["content"]
        assert isinstance(content, str)
        return content

    async def statuses(self, *texts: str) -> list[int]:
        return [(await self.post(ask(text)))[0] for text in texts]

    async def get(self, path: str) -> str:
        async with self.http.get(self.url.removesuffix("/v1") + path) as reply:
            return await reply.text()

    async def in_flight(self, count: int) -> None:
        for _ in range(1000):
            if self.fake.in_flight == count:
                return
            await asyncio.sleep(0.005)
        raise AssertionError(f"{self.fake.in_flight} requests are in flight, not {count}")


@contextlib.asynccontextmanager
async def serving(*rules: Rule, **settings: Any) -> AsyncIterator[Served]:
    fake = FakeLLM(FakeLLMSettings(rules=rules, **settings))
    url = await fake.start()
    http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
    served = Served(fake, url, http)
    try:
        async with http:
            yield served
            if "client" in vars(served):
                await served.client.close()
    finally:
        await fake.stop()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


# ---- Answers


def test_the_same_request_gets_the_same_bytes_from_two_servers() -> None:
    async def scenario() -> None:
        async with serving() as one, serving() as two:
            body = ask(seed=7, temperature=0.5)
            status, answer, _ = await one.post(body)
            assert status == 200
            assert answer == (await two.post(dict(reversed(body.items()))))[1]
            assert answer == (await two.post({**body, "stream": False}))[1]
            streamed = (await one.post({**body, "stream": True}))[1]
            assert streamed == (await two.post({**body, "stream": True}))[1]

    run(scenario())


def test_the_answer_to_a_known_request_never_changes() -> None:
    async def scenario() -> None:
        async with serving() as s:
            text = await s.text("golden")
            assert text == GOLDEN

    run(scenario())


@pytest.mark.parametrize("fields", [{"seed": 1}, {"temperature": 0.1}, {"model": "o"}, {"x": [1]}])
def test_every_field_of_a_request_changes_its_answer(fields: dict[str, Any]) -> None:
    async def scenario() -> None:
        async with serving() as s:
            assert await s.text() != await s.text(**fields)

    run(scenario())


def test_a_chat_answers_the_openai_client_with_text_usage_and_a_marker() -> None:
    async def scenario() -> None:
        async with serving(min_words=10, max_words=20) as s:
            answer = await s.client.chat.completions.create(model="m", messages=QUESTION)
            text = answer.choices[0].message.content or ""
            assert text.startswith("fake answer ")
            assert 10 <= len(text.split()) <= 20
            assert answer.choices[0].finish_reason == "stop"
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == 4
            assert answer.usage.completion_tokens == len(text.split())
            assert answer.usage.total_tokens == 4 + len(text.split())

    run(scenario())


def test_content_in_parts_counts_like_content_in_one_string() -> None:
    async def scenario() -> None:
        async with serving(Rule(match="a\nriver", reply="seen")) as s:
            parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "river"}]
            image = {"type": "image_url", "image_url": {"url": "data:,"}}
            messages: list[Any] = [{"role": "user", "content": [*parts, image]}]
            answer = await s.client.chat.completions.create(model="m", messages=messages)
            assert answer.choices[0].message.content == "seen"
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == 2

    run(scenario())


def test_a_streamed_chat_is_the_same_text_and_ends_with_the_usage() -> None:
    async def scenario() -> None:
        async with serving() as s:
            whole = await s.client.chat.completions.create(model="m", messages=QUESTION)
            stream = await s.client.chat.completions.create(
                model="m", messages=QUESTION, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            assert text == whole.choices[0].message.content
            assert chunks[0].choices[0].delta.role == "assistant"
            assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
            assert chunks[-2].choices[0].finish_reason == "stop"
            assert chunks[-1].choices == []
            assert chunks[-1].usage == whole.usage
            # One chunk for the role, one for each token, one for the end, one for the usage.
            assert len(chunks) == len(text.split()) + 3

    run(scenario())


def test_n_choices_differ_and_stream_side_by_side() -> None:
    async def scenario() -> None:
        async with serving() as s:
            whole = await s.client.chat.completions.create(model="m", messages=QUESTION, n=3)
            texts = [choice.message.content for choice in whole.choices]
            assert len(set(texts)) == 3
            streamed = ["", "", ""]
            order = []
            async for chunk in await s.client.chat.completions.create(
                model="m", messages=QUESTION, n=3, stream=True
            ):
                streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
                order.append(chunk.choices[0].index)
            assert streamed == texts
            assert order[:6] == [0, 1, 2, 0, 1, 2]
            assert whole.usage is not None
            assert whole.usage.completion_tokens == sum(len((t or "").split()) for t in texts)

    run(scenario())


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_token_limit_cuts_the_answer_and_says_length(name: str) -> None:
    async def scenario() -> None:
        async with serving(Rule(reply="one  two three four")) as s:
            limit: dict[str, Any] = {name: 2}
            body = json.loads((await s.post(ask(**limit)))[1])
            assert body["choices"][0]["message"]["content"] == "one  two"
            assert body["choices"][0]["finish_reason"] == "length"
            assert body["usage"]["completion_tokens"] == 2
            limit[name] = 4
            body = json.loads((await s.post(ask(**limit)))[1])
            assert body["choices"][0]["finish_reason"] == "stop"

    run(scenario())


@pytest.mark.parametrize("stop", [" three", ["nowhere", "four", " three"]])
def test_a_stop_string_ends_the_answer_before_itself(stop: Any) -> None:
    async def scenario() -> None:
        async with serving(Rule(reply="one two three four")) as s:
            body = json.loads((await s.post(ask(stop=stop, max_tokens=4)))[1])
            assert body["choices"][0]["message"]["content"] == "one two"
            assert body["choices"][0]["finish_reason"] == "stop"
            assert body["usage"]["completion_tokens"] == 2

    run(scenario())


def test_completions_answer_every_prompt_n_times() -> None:
    async def scenario() -> None:
        async with serving() as s:
            create = s.client.completions.create
            one = await create(model="m", prompt="a river")
            assert one.choices[0].text.startswith("fake answer ")
            assert one.usage is not None
            assert one.usage.prompt_tokens == 2
            many = await create(model="m", prompt=["a river", "a stone"], n=2)
            assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
            assert len({choice.text for choice in many.choices}) == 4
            ids = await create(model="m", prompt=[1, 2, 3])
            assert ids.usage is not None
            assert (len(ids.choices), ids.usage.prompt_tokens) == (1, 3)
            lists = await create(model="m", prompt=[[1, 2, 3], [4]])
            assert lists.usage is not None
            assert (len(lists.choices), lists.usage.prompt_tokens) == (2, 4)

    run(scenario())


def test_a_streamed_completion_is_the_same_text() -> None:
    async def scenario() -> None:
        async with serving() as s:
            create = s.client.completions.create
            whole = await create(model="m", prompt="a river", max_tokens=5)
            stream = await create(
                model="m",
                prompt="a river",
                max_tokens=5,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = [chunk async for chunk in stream]
            text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
            assert text == whole.choices[0].text
            assert chunks[-2].choices[0].finish_reason == "length"
            assert chunks[-1].usage == whole.usage

    run(scenario())


def test_an_embedding_is_the_same_in_any_batch_and_in_either_encoding() -> None:
    async def scenario() -> None:
        async with serving() as s:
            create = s.client.embeddings.create
            packed = await create(model="m", input="a river")  # the client asks for base64
            listed = await create(model="m", input=["b", "a river"], encoding_format="float")
            assert [item.index for item in listed.data] == [0, 1]
            assert packed.data[0].embedding == listed.data[1].embedding
            assert listed.data[0].embedding != listed.data[1].embedding
            raw = await s.post({"model": "m", "input": "a", "encoding_format": "base64"}, EMBED)
            assert len(base64.b64decode(json.loads(raw[1])["data"][0]["embedding"])) == 64
            assert len(listed.data[0].embedding) == 16
            assert all(-1 <= value < 1 for value in listed.data[0].embedding)
            assert listed.usage.prompt_tokens == 3

    run(scenario())


# ---- Refusals


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, b"{", None),
        (CHAT, b"[" * 100_000, None),
        (CHAT, b'{"model": "\xff"}', None),
        (CHAT, b"[]", None),
        (CHAT, {"messages": QUESTION}, "model"),
        (CHAT, {"model": "m"}, "messages"),
        (CHAT, {"model": "m", "messages": []}, "messages"),
        (CHAT, {"model": "m", "messages": "hello"}, "messages"),
        (CHAT, ask(max_tokens=0), "max_tokens"),
        (CHAT, ask(n="two"), "n"),
        (CHAT, ask(stream_options=True), "stream_options"),
        ("/completions", {"model": "m"}, "prompt"),
        ("/completions", {"model": "m", "prompt": []}, "prompt"),
        (EMBED, {"model": "m", "input": None}, "input"),
        (EMBED, {"model": "m", "input": [{}]}, "input"),
    ],
)
def test_an_invalid_body_is_refused_with_openais_error_object(
    path: str, body: Any, param: str | None
) -> None:
    async def scenario() -> None:
        async with serving() as s:
            status, answer, headers = await s.post(body, path)
            assert (status, headers["Content-Type"].split(";")[0]) == (400, "application/json")
            error = json.loads(answer)["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert (error["type"], error["param"]) == ("invalid_request_error", param)
            assert await s.statuses("still alive") == [200]
            assert s.fake.answers == {400: 1, 200: 1}

    run(scenario())


def test_a_model_is_unknown_only_where_the_settings_name_models() -> None:
    async def scenario() -> None:
        async with serving(models=("a", "b")) as s:
            with pytest.raises(openai.NotFoundError) as caught:
                await s.client.chat.completions.create(model="c", messages=QUESTION)
            assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
            await s.client.chat.completions.create(model="b", messages=QUESTION)
            assert [model.id async for model in s.client.models.list()] == ["a", "b"]
        async with serving() as s:
            await s.client.chat.completions.create(model="c", messages=QUESTION)

    run(scenario())


def test_an_api_key_is_asked_for_where_the_settings_have_one() -> None:
    async def scenario() -> None:
        async with serving(api_key="key") as s:
            await s.client.chat.completions.create(model="m", messages=QUESTION)
            stranger = s.client.with_options(api_key="other")
            with pytest.raises(openai.AuthenticationError) as caught:
                await stranger.chat.completions.create(model="m", messages=QUESTION)
            assert caught.value.code == "invalid_api_key"
            with pytest.raises(openai.AuthenticationError):
                [model async for model in stranger.models.list()]
            assert "vllm:num_requests_running" in await s.get("/metrics")

    run(scenario())


# ---- Time and limits


def test_an_answer_takes_its_latency_its_first_token_and_its_tokens() -> None:
    async def scenario() -> None:
        rule = Rule(reply="one two three four")
        async with serving(rule, latency_s=0.1, ttft_s=0.1, tokens_per_s=20.0) as s:
            begun_s = time.monotonic()
            await s.text()
            assert time.monotonic() - begun_s >= 0.39
            begun_s = time.monotonic()
            arrivals_s = []
            async for _ in await s.client.chat.completions.create(
                model="m", messages=QUESTION, stream=True
            ):
                arrivals_s.append(time.monotonic() - begun_s)
            assert arrivals_s[0] >= 0.19
            assert arrivals_s[-1] - arrivals_s[0] >= 0.1  # 0.15 s, less what a busy machine eats

    run(scenario())


def test_jitter_depends_on_the_request_alone() -> None:
    async def scenario() -> None:
        async with serving(latency_jitter_s=0.4) as s:

            async def took_s(text: str) -> float:
                begun_s = time.monotonic()
                await s.text(text)
                return time.monotonic() - begun_s

            durations_s = await asyncio.gather(*map(took_s, "000000123456"))
            same_s = durations_s[:6]
            assert max(same_s) - min(same_s) < 0.1
            assert max(durations_s) - min(durations_s) > 0.15

    run(scenario())


def test_the_first_token_comes_later_with_every_request_in_flight() -> None:
    async def scenario() -> None:
        async with serving(ttft_s=0.2, ttft_per_request_s=0.02) as s:

            async def took_s(text: str) -> float:
                begun_s = time.monotonic()
                await s.text(text)
                return time.monotonic() - begun_s

            assert await took_s("alone") < 0.4
            durations_s = await asyncio.gather(*(took_s(str(number)) for number in range(20)))
            assert max(durations_s) >= 0.57
            assert s.fake.max_in_flight == 20

    run(scenario())


def test_a_request_above_max_in_flight_is_answered_429_with_retry_after() -> None:
    async def scenario() -> None:
        async with serving(max_in_flight=3, latency_s=0.3, retry_after_s=2.5) as s:
            held = [asyncio.create_task(s.text(str(number))) for number in range(3)]
            await s.in_flight(3)
            with pytest.raises(openai.RateLimitError) as caught:
                await s.client.chat.completions.create(model="m", messages=QUESTION)
            assert caught.value.response.headers["retry-after"] == "2.5"
            await asyncio.gather(*held)
            assert await s.statuses("later") == [200]
            assert s.fake.max_in_flight == 3
            assert s.fake.answers == {200: 4, 429: 1}

    run(scenario())


def test_capacity_makes_the_others_wait_and_metrics_tell_them_apart() -> None:
    async def scenario() -> None:
        async with serving(capacity=2, latency_s=0.15, models=("m",)) as s:
            begun_s = time.monotonic()
            held = [asyncio.create_task(s.text(str(number))) for number in range(5)]
            await s.in_flight(5)
            metrics = (await s.get("/metrics")).splitlines()
            assert 'vllm:num_requests_running{model_name="m"} 2' in metrics
            assert 'vllm:num_requests_waiting{model_name="m"} 3' in metrics
            words = sum(len(text.split()) for text in await asyncio.gather(*held))
            assert time.monotonic() - begun_s >= 0.44
            metrics = (await s.get("/metrics")).splitlines()
            assert 'vllm:num_requests_running{model_name="m"} 0' in metrics
            assert 'vllm:prompt_tokens_total{model_name="m"} 5' in metrics
            assert f'vllm:generation_tokens_total{{model_name="m"}} {words}' in metrics
            success = 'vllm:request_success_total{finished_reason="stop",model_name="m"} 5'
            assert success in metrics

    run(scenario())


async def metric(s: Served, name: str) -> float:
    lines = (await s.get("/metrics")).splitlines()
    (value,) = [line.split()[-1] for line in lines if line.startswith(f"vllm:{name}{{")]
    return float(value)


def test_the_kv_cache_is_as_full_as_the_capacity_is_used() -> None:
    async def scenario() -> None:
        async with serving(Rule(hang=True), capacity=4) as s:
            held = [asyncio.create_task(s.text(str(number))) for number in range(3)]
            await s.in_flight(3)
            assert await metric(s, "kv_cache_usage_perc") == 0.75
            assert await metric(s, "num_preemptions_total") == 0
            for each in held:
                each.cancel()
            await s.in_flight(0)
            assert await metric(s, "kv_cache_usage_perc") == 0
        async with serving() as s:
            assert await metric(s, "kv_cache_usage_perc") == 0

    run(scenario())


def test_the_engine_counts_steps_while_it_answers_and_only_then() -> None:
    async def scenario() -> None:
        async with serving(latency_s=0.3) as s:
            assert await metric(s, "iteration_tokens_total_count") == 0
            held = asyncio.create_task(s.text())
            await s.in_flight(1)
            seen = []
            for _ in range(3):
                await asyncio.sleep(0.06)
                seen.append(await metric(s, "iteration_tokens_total_count"))
            assert 0 < seen[0] < seen[1] < seen[2]
            words = len((await held).split())
            ended = await metric(s, "iteration_tokens_total_count")
            await asyncio.sleep(0.06)
            assert await metric(s, "iteration_tokens_total_count") == ended > seen[2]
            assert await metric(s, "iteration_tokens_total_sum") == words + 4

    run(scenario())


def test_every_answer_is_a_step_of_the_engine_however_fast() -> None:
    async def scenario() -> None:
        async with serving() as s:
            await s.statuses(*map(str, range(20)))
            assert await metric(s, "iteration_tokens_total_count") >= 20

    run(scenario())


def test_an_engine_that_hangs_from_some_call_on_stands_still_beside_its_health_page() -> None:
    async def scenario() -> None:
        async with serving(Rule(after_calls=2, hang=True)) as s:
            assert await s.statuses("a", "b") == [200, 200]
            held = [asyncio.create_task(s.text(str(number))) for number in range(3)]
            await s.in_flight(3)
            pages = []
            for _ in range(2):
                assert await s.get("/health") == ""
                pages.append(await s.get("/metrics"))
                await asyncio.sleep(0.06)
            assert pages[0] == pages[1]
            assert await metric(s, "num_requests_running") == 3
            for each in held:
                each.cancel()

    run(scenario())


def test_an_engine_that_hangs_from_some_time_on_answers_nothing_more() -> None:
    async def scenario() -> None:
        async with serving(Rule(after_s=0.3, hang=True)) as s:
            assert await s.statuses("a") == [200]
            await asyncio.sleep(0.3)
            for text in ("a", "b"):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(s.text(text), 0.1)

    run(scenario())


def test_what_is_left_of_a_minute_and_a_day_is_told_with_every_answer() -> None:
    async def scenario() -> None:
        async with serving(requests_per_minute=3, requests_per_day=90) as s:
            for stream in (False, True):
                _, _, headers = await s.post(ask(stream=stream))
            assert headers["x-ratelimit-limit-requests-minute"] == "3"
            assert headers["x-ratelimit-remaining-requests-minute"] == "1"
            assert 50 < float(headers["x-ratelimit-reset-requests-minute"]) <= 60
            assert headers["x-ratelimit-limit-requests-day"] == "90"
            assert headers["x-ratelimit-remaining-requests-day"] == "88"
            assert 86390 < float(headers["x-ratelimit-reset-requests-day"]) <= 86400
            assert read_limits(headers, None, 200, 0).pause_s == 0
            _, _, headers = await s.post(ask())
            assert 50 < read_limits(headers, None, 200, 0).pause_s <= 60
        async with serving() as s:
            _, _, headers = await s.post(ask())
            assert not [name for name in headers if name.lower().startswith("x-ratelimit")]

    run(scenario())


@pytest.mark.parametrize(("period", "length_s"), [("minute", 60), ("day", 86400)])
def test_a_request_beyond_the_limit_is_answered_429_as_cerebras_does(
    period: str, length_s: float
) -> None:
    async def scenario() -> None:
        limits: dict[str, Any] = {f"requests_per_{period}": 2}
        async with serving(**limits) as s:
            assert await s.statuses("a", "b") == [200, 200]
            status, body, headers = await s.post(ask())
            assert status == 429
            error = json.loads(body)["error"]
            assert error == {
                "message": f"Requests per {period} limit exceeded - too many requests sent.",
                "type": "too_many_requests_error",
                "param": "quota",
                "code": "request_quota_exceeded",
            }
            assert length_s - 10 < float(headers["Retry-After"]) <= length_s
            assert headers[f"x-ratelimit-remaining-requests-{period}"] == "0"
            found = read_limits(headers, error, status, 0)
            assert found.pause_s == pytest.approx(length_s, abs=10)
            assert found.is_quota_exhausted is (period == "day")
            assert s.fake.answers == {200: 2, 429: 1}

    run(scenario())


def test_a_window_begins_anew_when_it_is_over() -> None:
    window = _Window("minute", 0.1, 2)
    assert window.left() == 2
    window.take()
    window.take()
    assert window.left() == 0
    assert 0 < window.reset_s() <= 0.1
    time.sleep(window.reset_s())
    assert window.left() == 2


def test_a_refused_request_is_not_counted() -> None:
    async def scenario() -> None:
        async with serving(requests_per_minute=1, requests_per_day=3) as s:
            assert await s.statuses("a", "b", "c") == [200, 429, 429]
            _, _, headers = await s.post(ask())
            assert headers["x-ratelimit-remaining-requests-day"] == "2"

    run(scenario())


def test_a_waiting_client_that_leaves_frees_its_place() -> None:
    async def scenario() -> None:
        async with serving(Rule(match="hang", hang=True), capacity=1) as s:
            hanging = asyncio.create_task(s.text("hang"))
            await s.in_flight(1)
            waiting = asyncio.create_task(s.text("wait"))
            await s.in_flight(2)
            waiting.cancel()
            await s.in_flight(1)
            hanging.cancel()
            await s.in_flight(0)
            assert await s.statuses("next") == [200]
            assert s.fake.answers == {0: 2, 200: 1}

    run(scenario())


def test_a_client_that_is_gone_when_a_part_is_written_is_no_error(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def reset(self: web.StreamResponse, data: bytes) -> None:
        raise ClientConnectionResetError("Cannot write to closing transport")

    async def scenario() -> None:
        async with serving() as s:
            monkeypatch.setattr(web.StreamResponse, "write", reset)
            with contextlib.suppress(aiohttp.ClientError):
                await s.http.post(f"{s.url}/chat/completions", json=ask(stream=True))
            await s.in_flight(0)

    run(scenario())
    assert not caplog.records


def test_counters_and_health_are_open_to_see() -> None:
    async def scenario() -> None:
        async with serving() as s:
            await s.statuses("a", "b")
            await s.post({"model": "m", "input": "c"}, EMBED)
            assert await s.get("/health") == ""
            counters = json.loads(await s.get("/calls"))
            assert counters["calls"] == {"/v1/chat/completions": 2, "/v1/embeddings": 1}
            assert counters["answers"] == {"200": 3}
            assert (counters["in_flight"], counters["max_in_flight"]) == (0, 1)
            assert s.fake.calls == counters["calls"]

    run(scenario())


def test_hundreds_of_requests_are_in_flight_at_once() -> None:
    async def scenario() -> None:
        async with serving(latency_s=1.0) as s:
            texts = await asyncio.gather(*(s.text(str(number)) for number in range(300)))
            assert len(set(texts)) == 300
            assert s.fake.max_in_flight == 300
            assert s.fake.answers == {200: 300}

    run(scenario())


def test_stop_drops_the_calls_in_flight() -> None:
    async def scenario() -> None:
        async with serving(latency_s=60.0) as s:
            held = asyncio.create_task(s.post(ask()))
            await s.in_flight(1)
            await s.fake.stop()
            with pytest.raises(aiohttp.ClientError):
                await held
            assert (s.fake.in_flight, s.fake.answers) == (0, {0: 1})

    run(scenario())


# ---- Rules


def test_a_status_rule_answers_with_an_error_object_and_retry_after() -> None:
    async def scenario() -> None:
        async with serving(Rule(status=503, retry_after_s=7)) as s:
            with pytest.raises(openai.InternalServerError) as caught:
                await s.client.chat.completions.create(model="m", messages=QUESTION)
            assert caught.value.status_code == 503
            assert caught.value.response.headers["retry-after"] == "7"
            assert caught.value.type == "server_error"

    run(scenario())


@pytest.mark.parametrize("status", [200, 204, 304, 404, 429, 500, 529])
def test_a_rule_may_answer_any_status(status: int) -> None:
    async def scenario() -> None:
        async with serving(Rule(status=status, until_calls=1)) as s:
            assert await s.statuses("a", "b") == [status, 200]

    run(scenario())


def test_the_first_rule_that_applies_decides() -> None:
    async def scenario() -> None:
        rules = Rule(match="^b", status=500), Rule(match="b", status=502), Rule(status=504)
        async with serving(*rules) as s:
            assert await s.statuses("ba", "ab", "c") == [500, 502, 504]

    run(scenario())


def test_first_counts_how_often_the_same_request_was_seen() -> None:
    async def scenario() -> None:
        async with serving(Rule(first=1, status=500), Rule(first=3, status=429)) as s:
            assert await s.statuses("a", "b", "a", "a", "a", "b") == [500, 500, 429, 429, 200, 429]

    run(scenario())


def test_every_counts_only_the_calls_that_meet_the_other_conditions() -> None:
    async def scenario() -> None:
        async with serving(Rule(match="a", every=3, status=500)) as s:
            statuses = await s.statuses("a", "b", "a", "b", "a", "a", "a", "a")
            assert statuses == [200, 200, 200, 200, 500, 200, 200, 500]

    run(scenario())


def test_after_calls_and_until_calls_bound_a_rule() -> None:
    async def scenario() -> None:
        async with serving(Rule(after_calls=1, until_calls=3, status=500)) as s:
            assert await s.statuses("a", "b", "c", "d") == [200, 500, 500, 200]

    run(scenario())


def test_after_s_and_until_s_bound_a_rule() -> None:
    async def scenario() -> None:
        async with serving(Rule(until_s=0.5, status=500), Rule(after_s=1.0, status=502)) as s:
            assert await s.statuses("a") == [500]
            await asyncio.sleep(0.5)
            assert await s.statuses("a") == [200]
            await asyncio.sleep(0.5)
            assert await s.statuses("a") == [502]

    run(scenario())


def test_share_picks_the_same_requests_on_every_server_and_rules_pick_apart() -> None:
    async def scenario() -> None:
        texts = [str(number) for number in range(200)]
        rules = Rule(share=0.3, status=500), Rule(share=0.5, status=502)
        async with serving(*rules) as one, serving(*rules) as two:
            statuses = await one.statuses(*texts)
            assert statuses == await two.statuses(*texts)
            assert 35 <= statuses.count(500) <= 85  # 60 expected
            assert 45 <= statuses.count(502) <= 95  # half of what is left
        async with serving(Rule(share=0.0, status=500)) as s:
            assert set(await s.statuses(*texts)) == {200}

    run(scenario())


def test_a_hang_lasts_until_the_client_leaves() -> None:
    async def scenario() -> None:
        async with serving(Rule(hang=True)) as s:
            with pytest.raises(openai.APITimeoutError):
                await s.client.with_options(timeout=0.2).chat.completions.create(
                    model="m", messages=QUESTION
                )
            await s.in_flight(0)
            assert s.fake.answers == {0: 1}

    run(scenario())


def test_a_hang_with_a_delay_ends_with_a_closed_connection() -> None:
    async def scenario() -> None:
        async with serving(Rule(hang=True, delay_s=0.2)) as s:
            begun_s = time.monotonic()
            with pytest.raises(openai.APIConnectionError):
                await s.client.chat.completions.create(model="m", messages=QUESTION)
            assert time.monotonic() - begun_s >= 0.19
            await s.in_flight(0)

    run(scenario())


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_reset_is_a_tcp_reset(loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    def ask_over_a_socket(port: int) -> bytes:
        body = json.dumps(ask()).encode()
        head = f"POST /v1{CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(head.encode() + body)
            return connection.recv(1)

    async def scenario() -> None:
        async with serving(Rule(reset=True)) as s:
            port = int(s.url.split(":")[2].split("/")[0])
            with pytest.raises(ConnectionResetError):
                await asyncio.to_thread(ask_over_a_socket, port)
            with pytest.raises(openai.APIConnectionError):
                await s.client.chat.completions.create(model="m", messages=QUESTION)
            await s.in_flight(0)
            assert s.fake.answers == {0: 2}

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(asyncio.wait_for(scenario(), 15))


def test_garbage_is_200_and_no_json() -> None:
    async def scenario() -> None:
        async with serving(Rule(garbage=True)) as s:
            status, body, headers = await s.post(ask())
            assert (status, headers["Content-Type"]) == (200, "application/json")
            with pytest.raises(json.JSONDecodeError):
                json.loads(body)
            with pytest.raises(ValueError, match="Expecting value"):
                await s.client.chat.completions.create(model="m", messages=QUESTION)
            stream = await s.client.chat.completions.create(
                model="m", messages=QUESTION, stream=True
            )
            with pytest.raises(ValueError, match="Expecting value"):
                [chunk async for chunk in stream]

    run(scenario())


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_truncated_answer_is_half_of_it_and_a_closed_connection(
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def scenario() -> None:
        async with serving(Rule(truncate=True, until_calls=3)) as s:
            halves: list[bytes] = []

            async def read_on(stream: bool) -> None:
                async with s.http.post(s.url + CHAT, json=ask(stream=stream)) as reply:
                    assert reply.status == 200
                    halves.append(b"")
                    async for piece in reply.content.iter_any():
                        halves[-1] += piece

            for stream in (False, True):
                with pytest.raises(aiohttp.ClientPayloadError):
                    await read_on(stream)
            with pytest.raises(openai.APIConnectionError):
                await s.client.chat.completions.create(model="m", messages=QUESTION)
            wholes = [(await s.post(ask(stream=stream)))[1] for stream in (False, True)]
            assert halves == [whole[: len(whole) // 2] for whole in wholes]
            await s.in_flight(0)
            assert s.fake.answers == {0: 3, 200: 2}

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(asyncio.wait_for(scenario(), 15))


def test_a_delay_is_added_to_a_normal_answer() -> None:
    async def scenario() -> None:
        async with serving(Rule(delay_s=0.3, until_calls=1)) as s:
            begun_s = time.monotonic()
            late = await s.text()
            assert time.monotonic() - begun_s >= 0.29
            assert late == await s.text()

    run(scenario())


def test_reply_and_choose_set_the_text() -> None:
    async def scenario() -> None:
        rules = Rule(match="exact", reply='{"grade": 3}'), Rule(choose=("yes", "no", "maybe"))
        async with serving(*rules) as s:
            assert await s.text("exact") == '{"grade": 3}'
            picks = [await s.text(str(number)) for number in range(40)]
            assert set(picks) == {"yes", "no", "maybe"}
            assert picks == [await s.text(str(number)) for number in range(40)]

    run(scenario())


# ---- The call log


def test_the_call_log_has_a_line_at_each_end_of_a_call_and_is_shared(tmp_path: Path) -> None:
    log = tmp_path / "calls.jsonl"
    log.write_text('{"event": "earlier"}\n')

    async def scenario() -> None:
        rule = Rule(match="bad", status=500)
        async with serving(call_log=str(log)) as one, serving(rule, call_log=str(log)) as two:
            system = {"role": "system", "content": "be brief"}
            text = json.loads((await one.post(ask("x" * 300)))[1])["choices"][0]["message"]
            await one.post({"model": "m", "messages": [*ask("second")["messages"], system]})
            await two.statuses("bad", "x" * 300)
            await two.post(b"{")
            lines = [json.loads(line) for line in log.read_text().splitlines()[1:]]
            first, end = [x for x in lines if x["server"] == one.fake.server_id and x["call"] == 1]
            assert (first["event"], end["event"]) == ("call", "answer")
            assert first["path"] == "/v1/chat/completions"
            assert (first["model"], first["prompt"]) == ("m", "x" * 200)
            assert (first["in_flight"], end["in_flight"]) == (1, 0)
            assert first["hash"][:8] in text["content"]
            assert (end["status"], end["completion_tokens"]) == (200, len(text["content"].split()))
            assert abs(first["t"] - time.time()) < 30
            assert "rule" not in end
            assert lines[2]["prompt"] == "second"
            others = [x for x in lines if x["server"] == two.fake.server_id]
            assert [x.get("status") for x in others] == [None, 500, None, 200, None, 400]
            assert [x.get("rule") for x in others] == [None, 0, None, None, None, None]
            assert others[2]["hash"] == first["hash"]
            assert (others[4]["hash"], others[4]["model"]) == ("", "")

    run(scenario())


def test_a_client_that_left_is_logged_with_status_0_and_its_rule(tmp_path: Path) -> None:
    log = tmp_path / "calls.jsonl"

    async def scenario() -> None:
        rules = Rule(match="never", status=500), Rule(hang=True)
        async with serving(*rules, call_log=str(log)) as s:
            call = asyncio.create_task(s.text())
            await s.in_flight(1)
            call.cancel()
            await s.in_flight(0)
            end = json.loads(log.read_text().splitlines()[-1])
            assert (end["event"], end["status"], end["rule"]) == ("answer", 0, 1)
            assert end["completion_tokens"] == 0

    run(scenario())


# ---- Settings


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("- {match: a, statsu: 500}", r"unknown field `statsu` - at `rules\[0\]`.*known.*status"),
        ("{latency: 3}", "unknown field `latency`.*known.*latency_s"),
        ("{rules: [{match: a}]}", "needs a delay_s or an action"),
        ("- {status: 500, hang: true}", "one action, this one has status and hang"),
        ("- {exit: 0, reply: ''}", "one action, this one has exit and reply"),
        ("- {hang: true, retry_after_s: 1}", "retry_after_s goes with status"),
        ("- {match: '(', status: 500}", "match is no regular expression"),
        ("- {status: 99}", r"`int` >= 200 - at `rules\[0\].status`"),
        ("- {share: 1.5, hang: true}", "share"),
        ("- {delay_s: .nan}", "delay_s"),
        ("- {reply: yes}", "Expected `str | null`, got `bool`"),
        ("{latency_s: -1}", "latency_s"),
        ("{min_words: 9, max_words: 8}", "min_words 9 is above max_words 8"),
        ("- [", "while parsing"),
        ("just text", "Expected `object`, got `str`"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_in_one_sentence(
    tmp_path: Path, text: str, problem: str
) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(FakeLLMSettingsError, match=problem) as caught:
        load_settings(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_settings_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FakeLLMSettingsError, match=r"nowhere.yaml: No such file"):
        load_settings(tmp_path / "nowhere.yaml")


def test_settings_are_read_from_yaml_and_from_json(tmp_path: Path) -> None:
    listed = tmp_path / "rules.yaml"
    listed.write_text("- {match: a, status: 500, retry_after_s: 2}\n- {every: 2, choose: [x, y]}\n")
    rules = (Rule(match="a", status=500, retry_after_s=2), Rule(every=2, choose=("x", "y")))
    assert load_settings(listed) == FakeLLMSettings(rules=rules)
    whole = tmp_path / "settings.json"
    whole.write_text(json.dumps({"latency_s": 2, "models": ["m"], "rules": [{"exit": 0}]}))
    assert load_settings(whole) == FakeLLMSettings(
        latency_s=2.0, models=("m",), rules=(Rule(exit=0),)
    )


# ---- The command


@contextlib.contextmanager
def command(*flags: str, **env: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command on a free port, with its base URL; killed at the end if need be."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dispatcher.fakellm", "--port", "0", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
        cwd=Path(__file__).parents[1],
    )
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        assert ready.startswith("fakellm ready at http://127.0.0.1:"), process.communicate()
        yield process, ready.split()[-1]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_at_once_with_exit_0(tmp_path: Path, number: int) -> None:
    log = tmp_path / "calls.jsonl"
    rules = tmp_path / "rules.yaml"
    rules.write_text("{latency_s: 60, rules: [{match: q, reset: true}]}")
    flags = ["--rules", str(rules), "--call-log", str(log), "--model", "m"]
    with command(*flags, "--api-key-env", "FAKE_KEY", FAKE_KEY="key") as (process, url):

        async def scenario() -> None:
            async with AsyncOpenAI(base_url=url, api_key="key", max_retries=0) as client:
                assert [model.id async for model in client.models.list()] == ["m"]
                with pytest.raises(openai.APIConnectionError):
                    await client.completions.create(model="m", prompt="q")
                held = asyncio.create_task(client.completions.create(model="m", prompt="long"))
                for _ in range(500):
                    if "long" in log.read_text():
                        break
                    await asyncio.sleep(0.01)
                begun_s = time.monotonic()
                process.send_signal(number)
                with pytest.raises(openai.APIConnectionError):
                    await held
                assert await asyncio.to_thread(process.wait, 5) == 0
                assert time.monotonic() - begun_s < 3

        run(scenario())
        assert process.stderr is not None
        assert process.stderr.read() == ""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line.get("status") for line in lines] == [None, 0, None, 0]


def test_an_exit_rule_ends_the_process_with_its_code(tmp_path: Path) -> None:
    rules = tmp_path / "rules.json"
    settings = {"min_words": 9, "max_words": 90, "rules": [{"match": "poison", "exit": 137}]}
    rules.write_text(json.dumps(settings))
    with command("--rules", str(rules), "--max-words", "9") as (process, url):

        async def scenario() -> None:
            async with AsyncOpenAI(base_url=url, api_key="key", max_retries=0) as client:
                answer = await client.completions.create(model="m", prompt="water")
                assert len(answer.choices[0].text.split()) == 9  # the flag outdoes the file
                with pytest.raises(openai.APIConnectionError):
                    await client.completions.create(model="m", prompt="poison")

        run(scenario())
        assert process.wait(5) == 137


def test_a_freeze_stops_the_whole_server_and_then_answers(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("- {match: ice, freeze_s: 1.0}\n")

    async def scenario(process: subprocess.Popen[str], url: str) -> None:
        async with aiohttp.ClientSession() as http:

            async def health_s() -> float:
                begun_s = time.monotonic()
                async with http.get(url.removesuffix("/v1") + "/health") as reply:
                    assert reply.status == 200
                return time.monotonic() - begun_s

            async def status() -> int:
                async with http.post(url + CHAT, json=ask("ice")) as reply:
                    return reply.status

            assert await health_s() < 0.5
            frozen = asyncio.create_task(status())
            await asyncio.sleep(0.3)
            assert await health_s() > 0.4
            assert await frozen == 200
            frozen = asyncio.create_task(status())
            await asyncio.sleep(0.3)
            process.terminate()
            await asyncio.sleep(0.3)
            assert process.poll() is None
            assert await asyncio.to_thread(process.wait, 10) == 0
            await asyncio.gather(frozen, return_exceptions=True)

    with command("--rules", str(rules)) as (process, url):
        run(scenario(process, url))


def test_a_port_in_use_is_one_sentence_and_exit_1(capfd: pytest.CaptureFixture[str]) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--port", str(port)]) == 1
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"fakellm: cannot start on 127.0.0.1 port {port}: ")
    assert "address already in use" in err
    assert err.count("\n") == 1


def test_a_call_log_that_cannot_be_written_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "missing" / "calls.jsonl"
    assert main(["--port", "0", "--call-log", str(log)]) == 1
    assert capfd.readouterr().err == f"fakellm: cannot start on {log}: No such file or directory\n"


def test_an_unknown_rule_key_is_exit_2_without_a_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("- {statsu: 500}")
    assert main(["--rules", str(rules)]) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"fakellm: {rules}: Object contains unknown field `statsu`")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--latency-s", "-1"], "latency_s"),
        (["--min-words", "99"], "min_words 99 is above max_words 64"),
        (["--port", "70000"], "--port: 70000"),
        (["--api-key-env", "NOT_SET_ANYWHERE"], "NOT_SET_ANYWHERE"),
        (["--latancy-s", "1"], "--latancy-s"),
    ],
)
def test_flags_that_cannot_be_used_are_exit_2(
    flags: list[str], problem: str, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = main(flags)
    except SystemExit as exc:
        code = exc.code
    assert code == 2
    assert problem in capfd.readouterr().err


def test_help_names_every_setting_with_its_unit_and_default(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = " ".join(capfd.readouterr().out.split())
    for name in FakeLLMSettings.__struct_fields__:
        flag = {"models": "model", "api_key": "api-key-env"}.get(name, name)
        assert f"--{flag.replace('_', '-')} " in text
    assert "seconds before every answer (default: 0.0)" in text
    assert all(name in text for name in Rule.__struct_fields__)
