"""Who is to blame for a failed model request, seen against a server with scripted faults."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

from dispatcher.core.limiter import AdaptiveLimiter, LimiterPolicy
from dispatcher.core.saturation import Saturation
from dispatcher.errors import (
    AuthenticationError,
    BackendError,
    QuotaExhaustedError,
    UsageError,
)
from dispatcher.fakellm import FakeLLM, FakeLLMSettings, Rule
from dispatcher.taskmanager.backend import http, servers
from dispatcher.taskmanager.backend.autoscale import AutoScaler
from dispatcher.taskmanager.backend.bodies import Sending
from dispatcher.taskmanager.backend.http import Endpoint
from dispatcher.taskmanager.backend.openai_compatible import (
    OpenAICompatibleBackend,
    RetryPolicy,
)
from dispatcher.taskmanager.backend.request import Request, Response
from tests.taskmanager.doubles import ask, run, until

CHAT = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no proxy of this machine stand in between."""
    monkeypatch.setattr(servers, "_FIRST_PROBE_PAUSE_S", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


IMPATIENT = RetryPolicy(initial_delay_s=0.01, max_delay_s=0.04)


@asynccontextmanager
async def backend_of(
    *urls: str, asking: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[OpenAICompatibleBackend]:
    """Yield a backend; `options` are those of its endpoints, `asking` its own."""
    endpoints = [Endpoint(url, **{"model": "m", **options}) for url in urls]
    backend = OpenAICompatibleBackend(endpoints, **{"retries": IMPATIENT, **(asking or {})})
    await backend.start()
    try:
        yield backend
    finally:
        await backend.close()


@asynccontextmanager
async def served(
    *rules: Rule, timeout_s: float = 5.0, asking: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[tuple[OpenAICompatibleBackend, FakeLLM]]:
    fake = FakeLLM(FakeLLMSettings(rules=rules, **settings))
    url = await fake.start()
    try:
        async with backend_of(url, request_timeout_s=timeout_s, asking=asking) as backend:
            yield backend, fake
    finally:
        await fake.stop()


async def ask_all(backend: OpenAICompatibleBackend, *texts: str) -> list[Response]:
    return await asyncio.gather(*(backend.process(ask(text)) for text in texts))


# --- answers ------------------------------------------------------------------------------------


def test_an_answer_is_passed_on_whole_with_its_request() -> None:
    async def scenario() -> None:
        async with served() as (backend, _):
            request = ask("what is a river", n=2)
            response = await backend.process(request)

            assert response.is_success
            assert response.request is request
            assert response.model_name == "m"
            assert response.content is not None
            assert response.content["usage"]["prompt_tokens"] == 4
            assert len(response.get_text(2)) == 2
            assert response.content["choices"][0]["finish_reason"] == "stop"

    run(scenario())


def test_a_body_with_prompt_is_a_completion_and_one_with_input_embeddings() -> None:
    async def scenario() -> None:
        async with served() as (backend, fake):
            completion = await backend.process(Request({"prompt": "a river"}))
            embedding = await backend.process(Request({"input": ["a", "b"]}))

            assert isinstance(completion.get_text(), str)
            assert completion.content is not None
            assert completion.content["object"] == "text_completion"
            assert embedding.content is not None
            assert [len(e["embedding"]) for e in embedding.content["data"]] == [16, 16]
            assert embedding.get_text() is None
            assert fake.calls == {"/v1/completions": 1, "/v1/embeddings": 1}

    run(scenario())


def test_the_endpoints_model_is_filled_in_where_a_request_names_none() -> None:
    async def scenario() -> None:
        async with served() as (backend, _):
            unnamed, named = ask("a"), ask("a", model="other")
            first, second = await backend.process(unnamed), await backend.process(named)

            assert first.content is not None
            assert second.content is not None
            assert (first.content["model"], first.model_name) == ("m", "m")
            assert (second.content["model"], second.model_name) == ("other", "other")
            assert "model" not in unnamed.content  # the task's own is not touched

    run(scenario())


def test_the_api_key_is_sent() -> None:
    async def scenario() -> None:
        fake = FakeLLM(FakeLLMSettings(api_key="secret"))
        url = await fake.start()
        async with backend_of(url, api_key="secret") as backend:
            assert (await backend.process(ask())).is_success
        await fake.stop()

    run(scenario())


def test_requests_and_tokens_are_counted() -> None:
    async def scenario() -> None:
        async with served(Rule(match="bad", status=400)) as (backend, _):
            responses = await ask_all(backend, "one two three", "four", "bad")
            answered = [r.content for r in responses if r.content is not None]

            account = backend.accounts()["m"]
            assert (account.requests, account.errors, account.prompt_tokens) == (2, 1, 4)
            assert account.completion_tokens == sum(
                content["usage"]["completion_tokens"] for content in answered
            )

    run(scenario())


def test_hundreds_of_requests_are_in_flight_at_once() -> None:
    async def scenario() -> None:
        async with served(latency_s=0.3, asking={"limit": 1000}) as (backend, fake):
            responses = await ask_all(backend, *(f"q{n}" for n in range(300)))

            assert all(response.is_success for response in responses)
            assert fake.max_in_flight > 200

    run(scenario())


# --- requests that cannot be sent ---------------------------------------------------------------


def _within_itself() -> dict[str, Any]:
    content: dict[str, Any] = {"messages": []}
    content["messages"].append(content)
    return content


@pytest.mark.parametrize(
    "content",
    [
        {"question": "?"},
        {},
        {"messages": [{"role": "user", "content": "\ud83d"}]},
        {"messages": {1, 2}, "x": object()},
        {"messages": [], "model": "\ud83d"},
        _within_itself(),
        None,
        "just the text",
        [{"role": "user", "content": "a list of messages"}],
    ],
    ids=["no prompt", "empty", "surrogate", "object", "model", "itself", "None", "text", "list"],
)
def test_a_request_that_cannot_be_sent_is_an_error_of_that_request(content: Any) -> None:
    async def scenario() -> None:
        async with served() as (backend, fake):
            request = Request(content)
            response = await backend.process(request)

            assert not response.is_success
            assert response.request is request
            assert "cannot be sent" in response.error
            assert fake.calls.total() == 0
            assert (await backend.process(ask())).is_success

    run(scenario())


# --- the request's own fault --------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 403, 404, 413, 422])
def test_a_refused_request_is_an_error_at_once(status: int) -> None:
    async def scenario() -> None:
        async with served(Rule(match="bad", status=status)) as (backend, fake):
            response = await backend.process(ask("bad"))

            assert response.error == f"HTTP {status}: A rule of the fake server answers {status}."
            assert response.model_name == "m"
            assert fake.calls[CHAT] == 1
            assert backend.healthy()

    run(scenario())


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ({"status": 500}, "HTTP 500: A rule of the fake server answers 500."),
        ({"status": 504}, "HTTP 504"),
        ({"garbage": True}, "HTTP 200: <html>"),
        ({"truncate": True}, "ClientPayloadError"),
        ({"reset": True}, "Client"),
        ({"hang": True}, "Timeout"),
        ({"hang": True, "delay_s": 0.01}, "ServerDisconnectedError"),
    ],
    ids=["500", "504", "garbage", "truncated", "reset", "hang", "closed"],
)
def test_a_request_that_fails_while_the_server_lives_gets_three_tries(
    fault: dict[str, Any], problem: str
) -> None:
    async def scenario() -> None:
        rule = Rule(match="bad", **fault)
        timeout_s = 0.25 if problem == "Timeout" else 5.0
        async with served(rule, timeout_s=timeout_s) as (backend, fake):
            bad, *fine = await ask_all(backend, "bad", *(f"fine {n}" for n in range(20)))

            assert bad.error.startswith(problem)
            assert bad.error.endswith("(in 3 tries, while the server was answering)")
            assert all(response.is_success for response in fine)
            assert fake.calls[CHAT] == 23
            assert backend.healthy()

    run(scenario())


@pytest.mark.parametrize(
    "fault", [{"status": 500}, {"garbage": True}, {"truncate": True}, {"reset": True}]
)
def test_a_request_that_fails_twice_is_answered_in_the_third_try(fault: dict[str, Any]) -> None:
    async def scenario() -> None:
        async with served(Rule(first=2, **fault)) as (backend, fake):
            assert (await backend.process(ask())).is_success
            assert fake.calls[CHAT] == 3
            assert backend.accounts()["m"].requests == 1

    run(scenario())


def test_requests_that_fail_together_ask_once_whether_the_server_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probes = 0
    answers = servers.answers

    async def counting(server: http.Transport) -> bool:
        nonlocal probes
        probes += 1
        await asyncio.sleep(0.1)
        return await answers(server)

    monkeypatch.setattr(servers, "answers", counting)

    async def scenario() -> None:
        async with served(Rule(status=500), asking={"limit": 50}) as (backend, _):
            responses = await ask_all(backend, *(f"{n}" for n in range(50)))

            assert not any(response.is_success for response in responses)
            assert probes <= 15  # three rounds, of which the last ones spread

    run(scenario())


def test_a_long_error_page_is_cut() -> None:
    async def scenario() -> None:
        page = b"x" * 100_000
        async with answering(b"HTTP/1.1 400 Bad\r\n", page) as (url, _), backend_of(url) as backend:
            response = await backend.process(ask())
            assert len(response.error) < 2100

    run(scenario())


@pytest.mark.parametrize("body", [b'"text"', b"[1]", b"", b"null", b'{"half": "\\ud83d"}'])
def test_an_answer_that_is_no_json_object_is_no_answer(body: bytes) -> None:
    async def scenario() -> None:
        async with answering(b"HTTP/1.1 200 OK\r\n", body) as (url, _), backend_of(url) as backend:
            response = await backend.process(ask())
            assert response.error.startswith("HTTP 200")

    run(scenario())


def test_an_answer_without_usage_counts_as_a_request() -> None:
    async def scenario() -> None:
        body = b'{"choices": [], "usage": null}'
        async with answering(b"HTTP/1.1 200 OK\r\n", body) as (url, _), backend_of(url) as backend:
            assert (await backend.process(ask())).is_success
            assert backend.accounts()["m"].requests == 1

    run(scenario())


# --- the server's fault: wait -------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503])
def test_an_overloaded_server_is_waited_for_however_often_it_says_so(status: int) -> None:
    async def scenario() -> None:
        async with served(Rule(first=7, status=status)) as (backend, fake):
            assert (await backend.process(ask())).is_success
            assert fake.calls[CHAT] == 8

    run(scenario())


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured(status: int) -> None:
    async def scenario() -> None:
        rule = Rule(match="bad", first=1, status=status, retry_after_s=0.3)
        async with served(rule) as (backend, _):
            start = time.monotonic()
            bad = asyncio.ensure_future(backend.process(ask("bad")))
            assert (await backend.process(ask("fine"))).is_success
            assert not bad.done()

            assert (await bad).is_success
            assert time.monotonic() - start >= 0.3

    run(scenario())


def test_a_retry_after_that_is_a_date_is_no_number_of_seconds() -> None:
    async def scenario() -> None:
        head = b"HTTP/1.1 429 Slow\r\nRetry-After: Fri, 31 Dec 1999 23:59:59 GMT\r\n"
        async with answering(head, b"{}") as (url, asked), backend_of(url) as backend:
            waiting = asyncio.ensure_future(backend.process(ask()))
            await until(lambda: len(asked) > 3, "it asks again")
            waiting.cancel()
            await asyncio.wait([waiting])

    run(scenario())


def test_a_limit_on_requests_in_flight_fails_none() -> None:
    async def scenario() -> None:
        limits = {"max_in_flight": 3, "retry_after_s": 0.01, "latency_s": 0.005}
        async with served(**limits) as (backend, fake):
            responses = await ask_all(backend, *(f"q{n}" for n in range(30)))

            assert all(response.is_success for response in responses)
            assert fake.answers[429] > 0

    run(scenario())


def test_a_server_that_is_restarted_in_mid_run_fails_nothing() -> None:
    async def scenario() -> None:
        settings = FakeLLMSettings(latency_s=0.02)
        fake = FakeLLM(settings)
        url = await fake.start()
        port = urlsplit(url).port
        assert port is not None
        async with backend_of(url) as backend:
            limit = asyncio.Semaphore(20)

            async def one(number: int) -> Response:
                async with limit:
                    return await backend.process(ask(f"q{number}"))

            working = [asyncio.ensure_future(one(n)) for n in range(200)]
            await until(lambda: fake.calls[CHAT] > 50, "the first calls")
            await fake.stop()
            await until(lambda: not backend.healthy(), "the outage is noticed")
            await asyncio.sleep(0.1)
            assert not all(task.done() for task in working)  # they wait

            again = FakeLLM(settings)
            await again.start(port=port)
            responses = await asyncio.gather(*working)
            await again.stop()

            assert all(response.is_success for response in responses)
            assert backend.accounts()["m"].requests == 200
            assert backend.healthy()

    run(scenario())


def test_an_engine_that_calls_itself_dead_is_away_though_it_lists_its_models() -> None:
    async def scenario() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while request := await _read_request(reader):
                fine = request.startswith(b"GET /v1/models")
                status = b"200 OK" if fine else b"503 Dead" if b"/health" in request else b"500 No"
                writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 2\r\n\r\n{}")

        async with raw_server(serve) as url, backend_of(url) as backend:
            asking = asyncio.ensure_future(backend.process(ask(), 5))
            await until(lambda: not backend.healthy(), "the outage is noticed")
            assert backend.orders_in_flight() == {5}
            await asyncio.sleep(0.1)
            assert not asking.done()
            asking.cancel()
            await asyncio.wait([asking])

    run(scenario())


def test_a_server_that_is_not_there_yet_is_waited_for() -> None:
    async def scenario() -> None:
        first = FakeLLM()
        url = await first.start()
        port = urlsplit(url).port or 0
        await first.stop()
        async with backend_of(url) as backend:
            asking = asyncio.ensure_future(backend.process(ask()))
            await until(lambda: not backend.healthy(), "the outage is noticed")
            fake = FakeLLM()
            await fake.start(port=port)
            assert (await asking).is_success
            assert backend.healthy()
            await fake.stop()

    run(scenario())


def test_a_server_that_hangs_whole_is_waited_for_and_not_blamed_on_a_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http.Transport.get, "__defaults__", (0.1,))

    async def scenario() -> None:
        hangs = True

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while await _read_request(reader):
                if hangs:
                    await asyncio.sleep(3)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

        async with raw_server(serve) as url, backend_of(url, request_timeout_s=0.1) as backend:
            asking = asyncio.ensure_future(backend.process(ask()))
            await until(lambda: not backend.healthy(), "the outage is noticed")
            await asyncio.sleep(0.3)
            assert not asking.done()
            hangs = False
            assert (await asking).is_success

    run(scenario())


def test_one_task_asks_for_all_whether_the_server_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probes = 0
    answers = servers.answers

    async def counting(server: http.Transport) -> bool:
        nonlocal probes
        probes += 1
        return await answers(server)

    monkeypatch.setattr(servers, "answers", counting)

    async def scenario() -> None:
        fake = FakeLLM()
        url = await fake.start()
        await fake.stop()
        async with backend_of(url, asking={"limit": 200}) as backend:
            asking = [asyncio.ensure_future(backend.process(ask(f"{n}"))) for n in range(200)]
            await until(lambda: probes >= 3, "it asks again and again")
            for task in asking:
                task.cancel()
            await asyncio.wait(asking)

            assert probes < 50

    run(scenario())


def test_a_server_that_is_dead_for_good_ends_every_request_and_is_not_healthy() -> None:
    async def scenario() -> None:
        fake = FakeLLM()
        url = await fake.start()
        await fake.stop()
        async with backend_of(url) as backend:
            waiting = [asyncio.ensure_future(backend.process(ask())) for _ in range(5)]
            await until(lambda: not backend.healthy(), "the outage is noticed")
            error = BackendError("the engine ended with exit code 1")
            backend.declare_dead(error)
            ends = await asyncio.gather(*waiting, return_exceptions=True)

            assert ends == [error] * 5
            with pytest.raises(BackendError):
                await backend.process(ask())
            assert not backend.healthy()

    run(scenario())


def test_a_request_may_be_given_up_at_any_time() -> None:
    async def scenario() -> None:
        async with served(Rule(match="slow", hang=True)) as (backend, fake):
            for delay_s in (0.0, 0.001, 0.05):
                asking = asyncio.ensure_future(backend.process(ask("slow")))
                await asyncio.sleep(delay_s)
                asking.cancel()
                await asyncio.wait([asking])
                assert asking.cancelled()
            await until(lambda: fake.in_flight == 0, "the server notices")
            assert (await backend.process(ask())).is_success

    run(scenario())


# --- what ends the work ---------------------------------------------------------------------------


def test_a_refused_key_ends_the_work_and_names_where_it_should_be() -> None:
    async def scenario() -> None:
        fake = FakeLLM(FakeLLMSettings(api_key="secret"))
        url = await fake.start()
        async with backend_of(url, api_key="wrong-key", key_source="JUDGE_KEY") as backend:
            ends = await asyncio.gather(
                *(backend.process(ask(f"{n}")) for n in range(3)), return_exceptions=True
            )
            for end in ends:
                assert isinstance(end, AuthenticationError)
                assert url in str(end)
                assert "set JUDGE_KEY to a valid one" in str(end)
                assert "wrong-key" not in str(end)
        await fake.stop()

    run(scenario())


def test_a_model_that_is_not_there_ends_the_work_but_one_that_a_task_asks_for_does_not() -> None:
    async def scenario() -> None:
        async with served(models=("m",)) as (backend, _):
            other = await backend.process(ask(model="other"))
            assert other.error == "HTTP 404: The model `other` does not exist."
        async with served(models=("another",)) as (backend, _):
            with pytest.raises(BackendError, match="has no model 'm'"):
                await backend.process(ask())

    run(scenario())


def test_a_used_up_quota_ends_the_work_to_be_gone_on_with_later() -> None:
    async def scenario() -> None:
        body = b'{"error": {"message": "Quota exceeded", "code": "insufficient_quota"}}'
        async with (
            answering(b"HTTP/1.1 429 Slow\r\n", body) as (url, asked),
            backend_of(url) as backend,
        ):
            with pytest.raises(QuotaExhaustedError, match="was given back"):
                await backend.process(ask())
            with pytest.raises(QuotaExhaustedError):
                await backend.process(ask())
            assert len(asked) == 1

    run(scenario())


# --- slots, limits, several servers -------------------------------------------------------------


def test_a_slot_is_not_held_while_a_request_waits_to_be_sent_again() -> None:
    async def scenario() -> None:
        rule = Rule(match="bad", first=1, status=429, retry_after_s=0.4)
        async with served(rule, asking={"limit": 1}) as (backend, fake):
            bad = asyncio.ensure_future(backend.process(ask("bad"), 0))
            await until(lambda: fake.answers[429] == 1, "it is refused")
            fine = [backend.process(ask(f"{n}"), n) for n in range(1, 6)]
            await asyncio.gather(*fine)

            assert not bad.done()
            assert backend.requests_in_flight == 0
            assert backend.room() == 1
            assert (await bad).is_success
            assert backend.accounts()["m"].overloads == 1

    run(scenario())


def test_requests_that_wait_for_a_server_leave_no_room_for_further_items() -> None:
    async def scenario() -> None:
        fake = FakeLLM()
        url = await fake.start()
        await fake.stop()
        async with backend_of(url, asking={"limit": 3}) as backend:
            asking = [asyncio.ensure_future(backend.process(ask(f"{n}"), n)) for n in range(3)]
            await until(lambda: not backend.healthy(), "the outage is noticed")

            assert backend.room() == 0
            for task in asking:
                task.cancel()
            await asyncio.wait(asking)
            assert backend.room() == 3

    run(scenario())


def test_no_more_requests_than_the_limit_are_in_flight_and_older_items_go_first() -> None:
    async def scenario() -> None:
        async with served(latency_s=0.01, asking={"limit": 2}) as (backend, fake):
            done: list[int] = []

            async def one(order: int) -> None:
                await backend.process(ask(f"{order}"), order)
                done.append(order)

            await asyncio.gather(*(one(order) for order in (9, 8, 7, 3, 2, 1)))
            assert fake.max_in_flight == 2
            assert done[2:] == [1, 2, 3, 7] or sorted(done[2:4]) == [1, 2]

    run(scenario())


def test_with_a_limiter_the_limit_follows_what_the_server_bears() -> None:
    async def scenario() -> None:
        limiter = AdaptiveLimiter(LimiterPolicy(min_concurrent=2, max_concurrent=64))
        settings = {"max_in_flight": 8, "retry_after_s": 0.01, "latency_s": 0.005}
        async with served(asking={"limiter": limiter}, **settings) as (backend, fake):
            assert backend.limit == limiter.limit
            responses = await ask_all(backend, *(f"q{n}" for n in range(400)))

            assert all(response.is_success for response in responses)
            assert backend.limit == limiter.limit
            assert 2 <= backend.limit <= 32
            assert fake.answers[429] < 300  # with 32 fixed, 577 to 960

    run(scenario())


def test_with_an_engine_that_tells_its_load_the_limit_follows_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(AutoScaler.__init__.__kwdefaults__, "pause_s", 0.02)

    async def scenario() -> None:
        settings = {"capacity": 24, "latency_s": 0.02}
        saturation = Saturation(first=4)
        async with served(asking={"saturation": saturation}, **settings) as (backend, fake):
            assert backend.limit == 4
            grown = False

            def notice() -> None:
                nonlocal grown
                grown = True

            async def blame(orders: set[int]) -> bool:
                return False

            backend.watch(notice, blame)
            await ask_all(backend, *(f"q{n}" for n in range(2000)))

            assert grown
            # The capacity, and what a busy machine adds by looking late; 2,000 were asked at once.
            assert 24 <= backend.limit <= 256
            assert fake.max_in_flight <= 256

    run(scenario())


def test_a_streamed_answer_is_whole_and_its_first_token_was_timed() -> None:
    async def scenario() -> None:
        sending = Sending(stream=True, generation={"max_completion_tokens": 12})
        settings = {"ttft_s": 0.05, "tokens_per_s": 200.0}
        async with served(asking={"sending": sending}, **settings) as (backend, _):
            streamed = await backend.process(ask("a question"))
        async with served(asking={"sending": Sending(generation=sending.generation)}) as (plain, _):
            whole = await plain.process(ask("a question"))

            assert streamed.content == whole.content
            ttft = backend.accounts()["m"].ttft
            assert sum(ttft.counts) == 1
            assert 0.04 < ttft.total < 0.1

    run(scenario())


@pytest.mark.parametrize("fault", [{"truncate": True}, {"garbage": True}, {"status": 500}])
def test_a_stream_that_fails_is_tried_again(fault: dict[str, Any]) -> None:
    async def scenario() -> None:
        sending = {"sending": Sending(stream=True)}
        async with served(Rule(first=1, **fault), asking=sending) as (backend, fake):
            assert (await backend.process(ask())).is_success
            assert fake.calls[CHAT] == 2
            assert backend.accounts()["m"].retried == 1

    run(scenario())


def test_requests_go_to_the_server_that_has_the_fewest() -> None:
    async def scenario() -> None:
        quick, slow = (
            FakeLLM(FakeLLMSettings(latency_s=0.01)),
            FakeLLM(FakeLLMSettings(latency_s=0.1)),
        )
        urls = [await quick.start(), await slow.start()]
        async with backend_of(*urls, asking={"limit": 8}) as backend:
            await ask_all(backend, *(f"q{n}" for n in range(100)))
        assert quick.calls[CHAT] > 3 * slow.calls[CHAT] > 0
        await quick.stop()
        await slow.stop()

    run(scenario())


def test_when_one_of_several_servers_dies_the_others_go_on_and_nothing_fails() -> None:
    async def scenario() -> None:
        settings = FakeLLMSettings(latency_s=0.01)
        one, two = FakeLLM(settings), FakeLLM(settings)
        urls = [await one.start(), await two.start()]
        async with backend_of(*urls, asking={"limit": 8}) as backend:
            working = [asyncio.ensure_future(backend.process(ask(f"q{n}"))) for n in range(300)]
            await until(lambda: two.calls[CHAT] > 20, "both are asked")
            await two.stop()
            responses = await asyncio.gather(*working)

            assert all(response.is_success for response in responses)
            assert backend.healthy()
        await one.stop()

    run(scenario())


def test_nothing_is_sent_while_the_server_says_that_nothing_is_left() -> None:
    async def scenario() -> None:
        head = (
            b"HTTP/1.1 200 OK\r\nx-ratelimit-remaining-tokens-minute: 0\r\n"
            b"x-ratelimit-reset-tokens-minute: 0.4\r\n"
        )
        async with answering(head, b"{}") as (url, asked), backend_of(url) as backend:
            await backend.process(ask())
            start = time.monotonic()
            await ask_all(backend, "a", "b", "c")
            assert time.monotonic() - start >= 0.35
            assert len(asked) == 4

    run(scenario())


def test_a_limit_a_minute_is_kept_to_by_all_after_one_refusal() -> None:
    async def scenario() -> None:
        head = (
            b"HTTP/1.1 429 Slow\r\nx-ratelimit-remaining-requests-minute: 0\r\n"
            b"x-ratelimit-reset-requests-minute: 30\r\n"
        )
        async with (
            answering(head, b"{}") as (url, asked),
            backend_of(url, asking={"limit": 1}) as backend,
        ):
            asking = [asyncio.ensure_future(backend.process(ask(f"{n}"), n)) for n in range(20)]
            await until(lambda: asked, "the first one is sent")
            await asyncio.sleep(0.3)
            assert len(asked) == 1
            for task in asking:
                task.cancel()
            await asyncio.wait(asking)

    run(scenario())


# --- a server that is started again -------------------------------------------------------------


def test_what_was_in_flight_on_a_server_that_died_is_known_until_another_one_answers() -> None:
    async def scenario() -> None:
        fake = FakeLLM(FakeLLMSettings(rules=(Rule(hang=True),)))
        url = await fake.start()
        async with backend_of(url, asking={"limit": 2}) as backend:
            asking = [asyncio.ensure_future(backend.process(ask(f"{n}"), n)) for n in range(4)]
            await until(lambda: fake.in_flight == 2, "two are in flight")
            await fake.stop()
            await until(lambda: not backend.healthy(), "the outage is noticed")
            await until(
                lambda: backend.orders_in_flight() == {0, 1}, "one that found nobody is not"
            )
            backend.declare_away("it died")
            assert backend.orders_in_flight() == {0, 1}

            again = FakeLLM()
            await backend.move_to(Endpoint(await again.start(), "m"))
            responses = await asyncio.gather(*asking)
            assert all(response.is_success for response in responses)
            assert backend.orders_in_flight() == set()
            assert backend.accounts()["m"].restarts == 1
            await again.stop()

    run(scenario())


def test_a_server_that_is_declared_away_is_not_asked_though_it_answers() -> None:
    async def scenario() -> None:
        async with served() as (backend, fake):
            backend.declare_away("it makes no progress")
            asking = asyncio.ensure_future(backend.process(ask()))
            await asyncio.sleep(0.1)
            assert not asking.done()
            assert not backend.healthy()
            assert fake.calls[CHAT] == 0
            asking.cancel()
            await asyncio.wait([asking])

    run(scenario())


# --- start --------------------------------------------------------------------------------------


def test_waiting_for_a_server_ends_when_it_answers_and_when_time_is_up() -> None:
    async def scenario() -> None:
        first = FakeLLM()
        url = await first.start()
        port = urlsplit(url).port or 0
        await first.stop()
        async with backend_of(url) as backend:
            with pytest.raises(BackendError, match=f"no model server answers at {url}"):
                await backend.wait_until_serving(0.1)
            waiting = asyncio.ensure_future(backend.wait_until_serving(5))
            fake = FakeLLM()
            await fake.start(port=port)
            await waiting
            await fake.stop()

    run(scenario())


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://host/v1", "http://", "", "http:///v1"])
def test_an_address_that_is_no_url_is_refused_with_an_example(url: str) -> None:
    with pytest.raises(UsageError, match=r"give one like http://HOST:8000/v1"):
        Endpoint(url)


@pytest.mark.parametrize(
    ("url", "is_local"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://localhost:8000/v1", True),
        ("http://node17:8000/v1", True),
        ("http://10.0.0.3:8000/v1", True),
        ("http://[::1]:8000/v1", True),
        ("https://api.openai.com/v1", False),
    ],
)
def test_engines_of_this_machine_or_cluster_are_told_from_hosted_ones(
    url: str, is_local: bool
) -> None:
    assert Endpoint(url).is_local is is_local


def test_proxy_variables_do_not_apply_to_a_local_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")

    async def scenario() -> None:
        async with served() as (backend, _):
            assert (await asyncio.wait_for(backend.process(ask()), 3)).is_success
            assert backend.healthy()

    run(scenario())


def test_proxy_variables_apply_to_a_hosted_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with answering(b"HTTP/1.1 200 OK\r\n", b'{"choices": []}') as (proxy, asked):
            monkeypatch.setenv("http_proxy", proxy.removesuffix("/v1"))
            async with backend_of("http://model.invalid/v1") as backend:
                assert (await backend.process(ask())).is_success
            assert asked[0].startswith(b"POST http://model.invalid/v1/chat/completions")

    run(scenario())


# --- a server of raw bytes ----------------------------------------------------------------------


async def _read_request(reader: asyncio.StreamReader) -> bytes:
    """Return a request's head, its body read too; empty at the end of the connection."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return b""
    for field in head.split(b"\r\n"):
        name, _, size = field.partition(b":")
        if name.lower() == b"content-length":
            await reader.readexactly(int(size))
    return head


@asynccontextmanager
async def raw_server(serve: Any) -> AsyncIterator[str]:
    handlers: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        try:
            await serve(reader, writer)
        except asyncio.CancelledError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()
        for task in handlers:
            task.cancel()
        if handlers:
            await asyncio.wait(handlers)


@asynccontextmanager
async def answering(head: bytes, body: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Answer every POST with these bytes, every GET with an empty object."""
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while request := await _read_request(reader):
            if request.startswith(b"POST"):
                asked.append(request)
                writer.write(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            else:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    async with raw_server(serve) as url:
        yield url, asked


def test_what_is_sent_is_the_content_as_the_task_wrote_it() -> None:
    async def scenario() -> None:
        bodies: list[Any] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.lower().partition(b"content-length:")[2].split()[0])
            bodies.append(json.loads(await reader.readexactly(size)))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

        async with raw_server(serve) as url, backend_of(url) as backend:
            await backend.process(ask("ü\n", temperature=0.5, extra={"any": [None, True]}))

        assert bodies == [
            {
                "messages": [{"role": "user", "content": "ü\n"}],
                "temperature": 0.5,
                "extra": {"any": [None, True]},
                "model": "m",
            }
        ]

    run(scenario())
