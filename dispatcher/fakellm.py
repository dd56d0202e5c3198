"""An OpenAI-compatible model server without a model: for rehearsals, load tests and fault drills.

    python -m dispatcher.fakellm --port 8001 --latency-s 0.2 --rules faults.yaml

An answer is computed from the request alone, so the same request gets the same bytes from every
server, on any day, and a run's output can be checked to the letter. Latency, limits and faults are
settings; faults are an ordered list of rules, and the first rule that applies to a call decides:

    - {share: 0.01, first: 1, status: 500}        # one request in a hundred fails, once
    - {match: "poison", delay_s: 0.5, exit: 137}  # the engine dies of a certain prompt
    - {after_s: 60, until_s: 90, status: 503, retry_after_s: 5}
    - {every: 50, choose: ["yes", "no"]}
    - {after_calls: 50, until_calls: 51, freeze_s: 20}  # nothing answers, /health included
    - {after_s: 60, hang: true}                   # from now on only /health and /metrics answer

With `requests_per_minute` or `requests_per_day` every answer tells in Cerebras' headers what is
left, and a call beyond is answered as Cerebras does: 429, with the reason and Retry-After.

`GET /calls` shows counters, `GET /metrics` speaks vLLM's names, and `call_log` appends every call
and every answer to a JSONL file that several servers may share.
"""

import argparse
import asyncio
import base64
import contextlib
import gc
import hashlib
import itertools
import os
import re
import resource
import secrets
import signal
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn

import msgspec
import uvloop
import yaml
from aiohttp import web

from dispatcher.help_text import HelpFormatter

__all__ = ["FakeLLM", "FakeLLMSettings", "FakeLLMSettingsError", "Rule", "load_settings", "main"]

Seconds = Annotated[float, msgspec.Meta(ge=0, le=10_000_000)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]

# What a request's prompt is called, by path.
PROMPT_FIELDS = {
    "/v1/chat/completions": "messages",
    "/v1/completions": "prompt",
    "/v1/embeddings": "input",
}
ACTIONS = (
    "status",
    "hang",
    "reset",
    "exit",
    "garbage",
    "truncate",
    "reply",
    "choose",
    "freeze_s",
)
MAX_BODY_BYTES = 256 * 1024 * 1024
EMBEDDING_FLOATS = 16
ENGINE_STEPS_PER_S = 50
CREATED_UNIX_S = 1_700_000_000  # a constant: the clock must not show in an answer
GARBAGE = b"<html>the fake server was told to send garbage</html>"
WORDS = re.findall(  # 64, so that a byte's low bits pick one
    r"\w+",
    """amber anchor apple autumn basket beacon birch bridge candle canyon cedar cherry cloud copper
    coral crystal desert dragon eagle ember falcon feather field forest garden glacier golden gravel
    harbor hazel honey island ivory jungle kettle lantern lemon maple marble meadow mirror morning
    needle ocean olive orchard paper pebble pepper quartz raven river saddle silver stone summer
    thunder timber valley velvet violet walnut willow winter""",
)


class FakeLLMSettingsError(ValueError):
    """The settings cannot be used; the text names the file, the key and the reason."""


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When it applies (every condition holds), and what happens then (one action, or a delay)."""

    match: str = ""  # regular expression searched in the prompt's texts, joined by newlines
    share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0  # of requests, drawn from their hash
    first: Positive | None = None  # the first N times that the same request gets as far as here
    every: Positive = 1  # every Nth of the calls that meet the other conditions
    after_s: Seconds = 0.0  # since the server's start
    until_s: Seconds | None = None
    after_calls: Count = 0  # 100: from this server's 101st call on
    until_calls: Count | None = None  # 100: up to and including its 100th call

    # Actions. All but the last five spare the call the settings' latency.
    status: Annotated[int, msgspec.Meta(ge=200, le=599)] | None = None  # with an error object
    hang: bool = False  # no answer, no progress; with `delay_s` it ends in a closed connection
    reset: bool = False  # the connection is reset (TCP RST)
    exit: int | None = None  # the whole process ends with this code
    garbage: bool = False  # 200 with a body that is not JSON
    truncate: bool = False  # 200, half of the body, then the connection is closed
    reply: str | None = None  # this text; cut by max_tokens and stop like any other
    choose: tuple[str, ...] = ()  # one of these texts, picked by the request's hash
    freeze_s: Seconds | None = None  # the whole process stands still first, deaf to SIGTERM

    retry_after_s: Seconds | None = None  # a Retry-After header beside `status`
    delay_s: Seconds = 0.0  # wait before the action; without one: a late but normal answer

    def __post_init__(self) -> None:
        """Refuse with ValueError a rule that does nothing, does two things, or cannot match."""
        values = [(name, getattr(self, name)) for name in ACTIONS]
        actions = [k for k, v in values if v is not None and v is not False and v != ()]
        if len(actions) > 1:
            raise ValueError(f"a rule has one action, this one has {' and '.join(actions)}")
        if not actions and not self.delay_s:
            raise ValueError(f"a rule needs a delay_s or an action ({', '.join(ACTIONS)})")
        if self.retry_after_s is not None and self.status is None:
            raise ValueError("retry_after_s goes with status")
        try:
            re.compile(self.match)
        except re.error as exc:
            raise ValueError(f"match is no regular expression: {exc}") from exc


class FakeLLMSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that shapes a server's behaviour; SETTINGS_HELP says what each field does."""

    latency_s: Seconds = 0.0
    latency_jitter_s: Seconds = 0.0
    ttft_s: Seconds = 0.0
    ttft_per_request_s: Seconds = 0.0
    tokens_per_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    max_in_flight: Count = 0
    retry_after_s: Seconds = 1.0
    requests_per_minute: Count = 0
    requests_per_day: Count = 0
    capacity: Count = 0
    min_words: Positive = 8
    max_words: Positive = 64
    call_log: str = ""
    models: tuple[str, ...] = ()  # empty: any name is served
    api_key: str = ""  # empty: none is asked for
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        """Refuse with ValueError an empty range of words."""
        if self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} is above max_words {self.max_words}")


SETTINGS_HELP = {
    "latency_s": "seconds before every answer",
    "latency_jitter_s": "up to so many seconds more, drawn from the request's hash",
    "ttft_s": "seconds more until the first token",
    "ttft_per_request_s": "seconds more until the first token for every other request in flight",
    "tokens_per_s": "tokens (words) a second of each answer, 0 = all at once",
    "max_in_flight": "requests in flight above which a call is answered 429, 0 = no limit",
    "retry_after_s": "seconds in the Retry-After header of such a 429",
    "requests_per_minute": "requests a minute, beyond which a call is answered 429, 0 = no limit",
    "requests_per_day": "requests a day, beyond which a call is answered 429, 0 = no limit",
    "capacity": "requests worked on at a time while the others wait, 0 = no limit",
    "min_words": "words in the shortest answer",
    "max_words": "words in the longest answer, unless the request asks for fewer",
    "call_log": "JSONL file to append a line to for every call and every answer",
}


def load_settings(path: str | Path) -> FakeLLMSettings:
    """Read a YAML or JSON file: a list of rules, or a mapping of settings with its `rules`.

    Raises FakeLLMSettingsError, in one sentence that names the file and the key, for a file that
    cannot be read, a key nobody knows and a value of the wrong type or out of range.
    """
    try:
        data = yaml.safe_load(Path(path).read_bytes())  # JSON is YAML, too
    except OSError as exc:
        raise FakeLLMSettingsError(f"{path}: {exc.strerror}") from exc
    except yaml.YAMLError as exc:
        raise FakeLLMSettingsError(f"{path}: {' '.join(str(exc).split())}") from exc
    return _checked({"rules": data} if isinstance(data, list) else data, str(path))


def _checked(data: object, origin: str) -> FakeLLMSettings:
    try:
        return msgspec.convert(data, FakeLLMSettings)
    except msgspec.ValidationError as exc:
        reason = str(exc).replace("`$.", "`")
        if "unknown field" in reason:
            known = Rule if "rules[" in reason else FakeLLMSettings
            reason += f"; the keys known there: {', '.join(known.__struct_fields__)}"
        raise FakeLLMSettingsError(f"{origin}: {reason}") from exc


# ---- Requests: the fields that matter here; every other one only changes the hash.

_Prompt = str | list[str | int | list[int]]


class _Message(msgspec.Struct):
    role: str
    content: str | list[dict[str, Any]] | None = None

    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "\n".join(str(part["text"]) for part in self.content or () if part.get("text"))


class _Request(msgspec.Struct):
    model: str
    messages: list[_Message] = []
    prompt: _Prompt = ""
    input: _Prompt = ""
    n: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None = None
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    encoding_format: str | None = None


_decode_request = msgspec.json.Decoder(_Request).decode


def _texts(prompt: _Prompt) -> list[str]:
    """One text for each prompt; token ids are one prompt, whose words they are."""
    if isinstance(prompt, str):
        return [prompt]
    if all(isinstance(each, int) for each in prompt):
        return [" ".join(map(str, prompt))]
    return [" ".join(map(str, p)) if isinstance(p, list) else str(p) for p in prompt]


class _Refusal(web.HTTPException):
    """A call that is answered with an HTTP status and OpenAI's error object."""

    status_code = 400  # what aiohttp's class starts from; set_status has the last word

    def __init__(
        self, status: int, message: str, *, retry_after_s: float | None = None, **fields: str | None
    ) -> None:
        kind = "invalid_request_error" if status < 500 else "server_error"
        kind = "rate_limit_error" if status == 429 else kind
        error = {"message": message, "type": kind, "param": None, "code": None, **fields}
        super().__init__(
            text=msgspec.json.encode({"error": error}).decode(),
            content_type="application/json",
            headers={} if retry_after_s is None else {"Retry-After": f"{retry_after_s:.10g}"},
        )
        self.set_status(status)


# ---- Answers: computed from the request alone.


def _fraction(digest: bytes, purpose: str) -> float:
    """A number in [0, 1) drawn from a request's hash, another one for every purpose."""
    drawn = hashlib.blake2b(purpose.encode(), key=digest, digest_size=6).digest()
    return int.from_bytes(drawn, "big") / 2**48


def _tokens(text: str) -> list[str]:
    """The text cut into words, each with the white space before it; joined they are the text."""
    return re.findall(r"\s*\S+|\s+", text)


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


class _Choice(NamedTuple):
    text: str
    tokens: int
    finish_reason: str


class _Call:
    """One POST: what was asked, and its answer in every form it can be sent in."""

    def __init__(self, number: int, path: str) -> None:
        self.number = number
        self.path = path
        self.request = _Request(model="")
        self.texts: list[str] = []
        self.digest = b""
        self.admitted = False
        self.in_flight = 0  # at its arrival, itself included
        self.prompt_tokens = self.completion_tokens = 0
        self.rule: int | None = None
        self.choices: list[_Choice] = []

    def read(self, body: bytes) -> None:
        """Take in the request; _Refusal(400) for a body that OpenAI would refuse, too."""
        field = PROMPT_FIELDS[self.path]
        try:
            self.request = _decode_request(body)
            content = msgspec.json.decode(body)
        except msgspec.ValidationError as exc:
            named = re.search(r"at `\$\.(\w+)|field `(\w+)`", str(exc))
            param = named and (named[1] or named[2])
            raise _Refusal(400, f"Invalid request: {exc}", param=param) from exc
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise _Refusal(400, f"The body is not JSON: {exc}") from exc
        if content.get(field) in (None, []):
            raise _Refusal(400, f"Invalid request: `{field}` is missing or empty", param=field)
        for how_to_send in ("stream", "stream_options"):
            content.pop(how_to_send, None)
        canonical = msgspec.json.encode(content, order="sorted")
        self.digest = hashlib.blake2b(canonical, digest_size=16).digest()
        if field == "messages":
            self.texts = [message.text() for message in self.request.messages]
        else:
            self.texts = _texts(self.request.prompt if field == "prompt" else self.request.input)
        self.prompt_tokens = sum(len(text.split()) for text in self.texts)

    def last_user_text(self) -> str:
        messages = self.request.messages
        spoken = [m.text() for m in messages if m.role == "user"] if messages else self.texts
        return spoken[-1] if spoken else ""

    def compose(self, settings: FakeLLMSettings, rule: Rule | None) -> None:
        """Decide the texts of the answer: `n` for a chat or for each prompt, none if embedding."""
        prompts = {"messages": 1, "prompt": len(self.texts), "input": 0}
        for number in range((self.request.n or 1) * prompts[PROMPT_FIELDS[self.path]]):
            seed = self.digest
            if number:
                seed = hashlib.blake2b(b"%d" % number, key=seed, digest_size=16).digest()
            if rule is not None and rule.choose:
                text = rule.choose[int(_fraction(seed, "choose") * len(rule.choose))]
            elif rule is not None and rule.reply is not None:
                text = rule.reply
            else:
                spread = settings.max_words - settings.min_words + 1
                count = settings.min_words + int(_fraction(seed, "words") * spread)
                words = [WORDS[byte % 64] for byte in hashlib.shake_128(seed).digest(count)]
                text = " ".join(["fake", "answer", f"{seed[:4].hex()}:", *words][:count])
            self.choices.append(self._bounded(text))
        self.completion_tokens = sum(choice.tokens for choice in self.choices)

    def _bounded(self, text: str) -> _Choice:
        """Cut a text as an engine would: at the token limit, then at the first stop string."""
        limit = self.request.max_completion_tokens or self.request.max_tokens
        count = len(text.split())
        reason = "stop"
        if limit is not None and count > limit:
            text, count, reason = "".join(_tokens(text)[:limit]), limit, "length"
        stop = self.request.stop
        stops = [stop] if isinstance(stop, str) else stop or ()
        ends = [text.find(string) for string in stops if string and string in text]
        if ends:
            text = text[: min(ends)]
            count, reason = len(text.split()), "stop"
        return _Choice(text, count, reason)

    @property
    def chat(self) -> bool:
        return self.path == "/v1/chat/completions"

    def _head(self, kind: str) -> dict[str, Any]:
        answer_id = f"{'chatcmpl' if self.chat else 'cmpl'}-{self.digest.hex()}"
        model = self.request.model
        return {"id": answer_id, "object": kind, "created": CREATED_UNIX_S, "model": model}

    def _usage(self) -> dict[str, int]:
        asked, said = self.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}

    def body(self) -> bytes:
        """The answer in one piece."""
        if self.path == "/v1/embeddings":
            model = self.request.model
            data = [
                {"object": "embedding", "index": i, "embedding": self._embedding(text)}
                for i, text in enumerate(self.texts)
            ]
            usage = {"prompt_tokens": self.prompt_tokens, "total_tokens": self.prompt_tokens}
            return msgspec.json.encode(
                {"object": "list", "model": model, "data": data, "usage": usage}
            )
        choices = []
        for index, (text, _, reason) in enumerate(self.choices):
            message = {"message": {"role": "assistant", "content": text}}
            said: dict[str, Any] = message if self.chat else {"text": text}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": reason})
        head = self._head("chat.completion" if self.chat else "text_completion")
        return msgspec.json.encode({**head, "choices": choices, "usage": self._usage()})

    def _embedding(self, text: str) -> list[float] | str:
        """A vector of model and text alone: the same in any batch and in either encoding."""
        noise = hashlib.shake_128(f"{self.request.model}\0{text}".encode())
        shorts = struct.unpack(f"<{EMBEDDING_FLOATS}h", noise.digest(2 * EMBEDDING_FLOATS))
        floats = [value / 32768 for value in shorts]  # exact as float32, too
        if self.request.encoding_format != "base64":
            return floats
        return base64.b64encode(struct.pack(f"<{EMBEDDING_FLOATS}f", *floats)).decode()

    def events(self) -> list[bytes]:
        """The answer as server-sent events, joined into one step for each token."""
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        with_usage = (self.request.stream_options or {}).get("include_usage")
        if with_usage:
            head["usage"] = None

        def chunk(index: int, text: str | None, reason: str | None = None, **delta: str) -> bytes:
            if text is not None:
                delta["content"] = text
            said: dict[str, Any] = {"delta": delta} if self.chat else {"text": text or ""}
            choice = {"index": index, **said, "logprobs": None, "finish_reason": reason}
            return _event(msgspec.json.encode({**head, "choices": [choice]}))

        rows = itertools.zip_longest(*(_tokens(choice.text) for choice in self.choices))
        steps = [
            b"".join(chunk(index, text) for index, text in enumerate(row) if text is not None)
            for row in rows
        ] or [b""]
        if self.chat:
            roles = [chunk(index, "", role="assistant") for index in range(len(self.choices))]
            steps[0] = b"".join(roles) + steps[0]
        for index, choice in enumerate(self.choices):
            steps[-1] += chunk(index, None, choice.finish_reason)
        if with_usage:
            last = {**head, "choices": [], "usage": self._usage()}
            steps[-1] += _event(msgspec.json.encode(last))
        steps[-1] += _event(b"[DONE]")
        return steps


# ---- The server.


class _Window:
    """So many requests in so many seconds, which begin with the first of them."""

    def __init__(self, name: str, length_s: float, limit: int) -> None:
        self.name = name
        self.limit = limit
        self._length_s = length_s
        self._used = 0
        self._ends_s = 0.0

    def left(self) -> int:
        if time.monotonic() >= self._ends_s:
            self._used = 0
            self._ends_s = time.monotonic() + self._length_s
        return self.limit - self._used

    def take(self) -> None:
        self._used += 1

    def reset_s(self) -> float:
        return max(0.0, self._ends_s - time.monotonic())

    def headers(self) -> dict[str, str]:
        left = self.left()
        values = {"limit": self.limit, "remaining": left, "reset": self.reset_s()}
        return {f"x-ratelimit-{key}-requests-{self.name}": str(values[key]) for key in values}

    def refusal(self) -> _Refusal:
        return _Refusal(
            429,
            f"Requests per {self.name} limit exceeded - too many requests sent.",
            type="too_many_requests_error",
            param="quota",
            code="request_quota_exceeded",
            retry_after_s=self.reset_s(),
        )


class FakeLLM:
    """The server, on the event loop of whoever starts it.

    `calls` counts POSTs by path; `answers` counts their ends by HTTP status, where 0 stands for no
    whole answer (the client left, or a rule closed the connection). `in_flight` calls are waiting
    or being worked on, `max_in_flight` were so at the same time; a refused call (400, 401, 404, the
    limit's 429) never is.
    """

    def __init__(self, settings: FakeLLMSettings | None = None) -> None:
        """Listen to nobody yet; see `start`."""
        self.settings = settings = settings or FakeLLMSettings()
        self.server_id = secrets.token_hex(4)
        self.calls: Counter[str] = Counter()
        self.answers: Counter[int] = Counter()
        self.in_flight = self.max_in_flight = 0
        self._running = self._prompt_tokens = self._generation_tokens = 0
        self._finished: Counter[str] = Counter()
        self._patterns = [re.compile(rule.match) if rule.match else None for rule in settings.rules]
        self._matches = [0] * len(settings.rules)
        # Hashes are kept only if a rule asks for them: a long run has millions.
        self._counts_repeats = any(rule.first for rule in settings.rules)
        self._seen: Counter[bytes] = Counter()
        self._turns = asyncio.Semaphore(settings.capacity or sys.maxsize)
        day_and_minute = (
            _Window("day", 86400.0, settings.requests_per_day),
            _Window("minute", 60.0, settings.requests_per_minute),
        )
        self._windows = [window for window in day_and_minute if window.limit]
        # Calls that make progress, and the engine's steps for them until the second given.
        self._progressing = 0
        self._steps = self._stepped_s = 0.0
        self._started_s = 0.0
        self._log_fd = -1
        self._runner: web.AppRunner | None = None

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Listen (port 0: on any free one) and return the base URL, `http://HOST:PORT/v1`.

        Raises OSError when the address cannot be listened on or the call log cannot be opened.
        """
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.add_routes([web.post(path, self._post) for path in PROMPT_FIELDS])
        app.router.add_get("/v1/models", self._get_models)
        app.router.add_get("/health", self._get_health)
        app.router.add_get("/metrics", self._get_metrics)
        app.router.add_get("/calls", self._get_calls)
        if self._windows:
            app.on_response_prepare.append(self._tell_limits)
        runner = web.AppRunner(
            app,
            access_log=None,
            handler_cancellation=True,  # a client that leaves frees its place at once
            keepalive_timeout=3600.0,
            shutdown_timeout=0.01,  # 0 would mean for ever
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port, backlog=4096).start()
            if self.settings.call_log:
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
                self._log_fd = os.open(self.settings.call_log, flags, 0o644)
        except OSError:
            await runner.cleanup()
            raise
        self._runner = runner
        self._started_s = time.monotonic()
        return f"http://{f'[{host}]' if ':' in host else host}:{runner.addresses[0][1]}/v1"

    async def stop(self) -> None:
        """Stop at once: calls in flight are dropped, and logged with status 0."""
        if self._runner is None:
            return
        runner, self._runner = self._runner, None
        await runner.cleanup()
        if self._log_fd >= 0:
            os.close(self._log_fd)
            self._log_fd = -1

    async def _post(self, request: web.Request) -> web.StreamResponse:
        """One call: admit it, wait for its turn, act out its rule or answer, account for it."""
        body = await request.read()
        self.calls[request.path] += 1
        call = _Call(self.calls.total(), request.path)
        status = 0
        try:
            self._admit(call, request, body)
            async with self._turns:
                self._running += 1
                try:
                    response = await self._answer(call, request)
                finally:
                    self._running -= 1
            status = response.status
            return response
        except _Refusal as refusal:
            status = refusal.status
            raise
        finally:
            self._leave(call, status)

    def _admit(self, call: _Call, request: web.Request, body: bytes) -> None:
        limit, models = self.settings.max_in_flight, self.settings.models
        try:
            self._check_key(request)
            call.read(body)
            if models and call.request.model not in models:
                message = f"The model `{call.request.model}` does not exist."
                raise _Refusal(404, message, param="model", code="model_not_found")
            if limit and self.in_flight >= limit:
                message = f"The limit of {limit} requests in flight is reached."
                wait_s = self.settings.retry_after_s
                raise _Refusal(429, message, code="rate_limit_exceeded", retry_after_s=wait_s)
            for window in self._windows:
                if window.left() <= 0:
                    raise window.refusal()
            for window in self._windows:
                window.take()
            call.admitted = True
            self.in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self.in_flight)
        finally:
            call.in_flight = self.in_flight
            if self._log_fd >= 0:
                self._log(
                    "call",
                    call,
                    path=call.path,
                    hash=call.digest.hex(),
                    model=call.request.model,
                    prompt=call.last_user_text()[:200],
                )

    def _leave(self, call: _Call, status: int) -> None:
        self.answers[status] += 1
        self.in_flight -= call.admitted
        if self._log_fd >= 0:
            rule = {} if call.rule is None else {"rule": call.rule}
            tokens = call.completion_tokens if status == 200 else 0
            self._log("answer", call, status=status, completion_tokens=tokens, **rule)

    def _log(self, event: str, call: _Call, **fields: Any) -> None:
        line = {"event": event, "server": self.server_id, "call": call.number, "t": time.time()}
        line |= {"in_flight": self.in_flight, **fields}
        # One write(2) a line: servers that share the file do not tear each other's lines.
        os.write(self._log_fd, msgspec.json.encode(line) + b"\n")

    def _pick_rule(self, call: _Call) -> Rule | None:
        if self._counts_repeats:
            self._seen[call.digest] += 1
        age_s = time.monotonic() - self._started_s
        for index, rule in enumerate(self.settings.rules):
            pattern = self._patterns[index]
            if (
                rule.after_s <= age_s
                and (rule.until_s is None or age_s < rule.until_s)
                and rule.after_calls < call.number
                and (rule.until_calls is None or call.number <= rule.until_calls)
                and (rule.first is None or self._seen[call.digest] <= rule.first)
                and (rule.share == 1 or _fraction(call.digest, f"rule {index}") < rule.share)
                and (pattern is None or pattern.search("\n".join(call.texts)))
            ):
                self._matches[index] += 1
                if self._matches[index] % rule.every == 0:
                    call.rule = index
                    return rule
        return None

    async def _tell_limits(self, request: web.Request, response: web.StreamResponse) -> None:
        if request.method == "POST":
            for window in self._windows:
                response.headers.update(window.headers())

    async def _answer(self, call: _Call, request: web.Request) -> web.StreamResponse:
        rule = self._pick_rule(call) if self.settings.rules else None
        progress = rule is None or not rule.hang
        self._step(progress)
        try:
            return await self._work_on(call, request, rule)
        finally:
            self._step(-progress)

    def _step(self, more: int = 0) -> None:
        """Count the engine's steps until now; from now on, for so many calls more."""
        now = time.monotonic()
        if self._progressing:
            self._steps += (now - self._stepped_s) * ENGINE_STEPS_PER_S
        self._stepped_s = now
        self._progressing += more

    async def _work_on(
        self, call: _Call, request: web.Request, rule: Rule | None
    ) -> web.StreamResponse:
        settings = self.settings
        if rule is not None:
            await _act_out(rule, request)
        call.compose(settings, rule)
        self._prompt_tokens += call.prompt_tokens
        streamed = bool(call.request.stream and call.choices)
        wait_s = settings.latency_s + settings.ttft_s
        wait_s += settings.ttft_per_request_s * (call.in_flight - 1)
        if settings.latency_jitter_s:
            wait_s += settings.latency_jitter_s * _fraction(call.digest, "jitter")
        if settings.tokens_per_s and call.choices and not streamed:
            wait_s += max(choice.tokens for choice in call.choices) / settings.tokens_per_s
        if wait_s:
            await asyncio.sleep(wait_s)
        steps = call.events() if streamed else [call.body()]
        response = await self._send(request, rule, steps, streamed=streamed)
        self._generation_tokens += call.completion_tokens
        self._finished[call.choices[0].finish_reason if call.choices else "stop"] += 1
        return response

    async def _send(
        self, request: web.Request, rule: Rule | None, steps: list[bytes], *, streamed: bool
    ) -> web.StreamResponse:
        content_type = "text/event-stream" if streamed else "application/json"
        if rule is not None and rule.garbage:
            steps = [_event(GARBAGE) if streamed else GARBAGE]
        truncated = rule is not None and rule.truncate
        if not streamed and not truncated:
            return web.Response(body=steps[0], content_type=content_type)
        response = web.StreamResponse(headers={"Content-Type": content_type})
        if truncated:
            whole = b"".join(steps)
            response.content_length = len(whole)
            steps = [whole[: len(whole) // 2]]
        # Clients leave in the middle, and that is no fault of the server to be logged as one.
        with contextlib.suppress(ConnectionError):
            await response.prepare(request)
            await _write_paced(response, steps, self.settings.tokens_per_s)
            if truncated:
                await _hang_up(request)
            await response.write_eof()
        return response

    # What the server tells about itself, whatever its rules and limits.

    def _check_key(self, request: web.Request) -> None:
        key = self.settings.api_key
        if key and request.headers.get("Authorization") != f"Bearer {key}":
            raise _Refusal(401, "Incorrect API key provided.", code="invalid_api_key")

    async def _get_models(self, request: web.Request) -> web.Response:
        self._check_key(request)
        fields = {"object": "model", "created": CREATED_UNIX_S, "owned_by": "fakellm"}
        models = [{"id": name, **fields} for name in self.settings.models or ("fake",)]
        return web.json_response({"object": "list", "data": models})

    async def _get_health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _get_metrics(self, request: web.Request) -> web.Response:
        """Speak as vLLM does; everything counts under the first model's name."""
        name = msgspec.json.encode((self.settings.models or ("fake",))[0]).decode()
        self._step()
        steps = int(self._steps) + self._finished.total()
        tokens = self._prompt_tokens + self._generation_tokens
        capacity = self.settings.capacity
        lines = []
        for metric, kind, value in (
            ("num_requests_running", "gauge", self._running),
            ("num_requests_waiting", "gauge", self.in_flight - self._running),
            ("kv_cache_usage_perc", "gauge", self._running / capacity if capacity else 0.0),
            ("num_preemptions_total", "counter", 0),
            ("prompt_tokens_total", "counter", self._prompt_tokens),
            ("generation_tokens_total", "counter", self._generation_tokens),
        ):
            lines.append(f"# TYPE vllm:{metric} {kind}")
            lines.append(f"vllm:{metric}{{model_name={name}}} {value}")
        lines.append("# TYPE vllm:iteration_tokens_total histogram")
        lines.append(f'vllm:iteration_tokens_total_bucket{{le="+Inf",model_name={name}}} {steps}')
        lines.append(f"vllm:iteration_tokens_total_count{{model_name={name}}} {steps}")
        lines.append(f"vllm:iteration_tokens_total_sum{{model_name={name}}} {tokens}")
        lines.append("# TYPE vllm:request_success_total counter")
        for reason in ("stop", "length"):
            labels = f'finished_reason="{reason}",model_name={name}'
            lines.append(f"vllm:request_success_total{{{labels}}} {self._finished[reason]}")
        return web.Response(text="\n".join(lines) + "\n")

    async def _get_calls(self, request: web.Request) -> web.Response:
        names = ("server_id", "calls", "in_flight", "max_in_flight", "answers")
        return web.json_response({name: getattr(self, name) for name in names})


async def _act_out(rule: Rule, request: web.Request) -> None:
    """Wait the rule's delay, then do its fault; return if it only shapes the answer."""
    if rule.hang and not rule.delay_s:
        await asyncio.Event().wait()
    if rule.delay_s:
        await asyncio.sleep(rule.delay_s)
    if rule.freeze_s is not None:
        time.sleep(rule.freeze_s)  # noqa: ASYNC251 (that the event loop stands still is the point)
    if rule.exit is not None:
        os._exit(rule.exit)
    if rule.status is not None:
        message = f"A rule of the fake server answers {rule.status}."
        raise _Refusal(rule.status, message, code="fake", retry_after_s=rule.retry_after_s)
    if rule.hang or rule.reset:
        await _hang_up(request, reset=rule.reset)


async def _write_paced(response: web.StreamResponse, steps: list[bytes], per_s: float) -> None:
    """Write the steps at their rate (0: at once); those that are late go out together."""
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    sent = 0
    while sent < len(steps):
        due = int((loop.time() - begun_s) * per_s) + 1 if per_s else len(steps)
        if due > sent:
            await response.write(b"".join(steps[sent:due]))
            sent = due
        else:
            # Not below a millisecond: the loop's timers are no finer, and would spin.
            await asyncio.sleep(max(0.001, begun_s + sent / per_s - loop.time()))


async def _hang_up(request: web.Request, *, reset: bool = False) -> NoReturn:
    """Close the connection, after what was written or with a TCP reset."""
    transport = request.transport
    if transport is not None and reset:
        # Lingering for 0 s makes close send RST. It is set through a second descriptor,
        # because uvloop hands out sockets that cannot be changed.
        with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as twin:
            twin.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if transport is not None:
        transport.close()
    await asyncio.Event().wait()  # aiohttp cancels the call once the connection is gone
    raise AssertionError("an event that nobody sets was set")


# ---- The command.


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT.

    Returns 0 after a signal, 1 when the server cannot start (its port is in use), 2 for settings
    that cannot be used; for flags it does not know, argparse exits with 2.
    """
    try:
        host, port, settings = _parse(argv)
    except FakeLLMSettingsError as exc:
        print(f"fakellm: {exc}", file=sys.stderr)
        return 2
    # A connection is a descriptor, and the usual soft limit of 1,024 is below the load meant here.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS names a hard limit it does not grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # With 4,096 requests in flight, collecting as often as by default takes a quarter of the CPU.
    gc.set_threshold(50_000, 50, 100)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(settings, host, port))


_EXAMPLES = """\
examples:
  python -m dispatcher.fakellm --port 8001 --latency-s 0.2
  python -m dispatcher.fakellm --rules faults.yaml --call-log calls.jsonl"""


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m dispatcher.fakellm",
        description="An OpenAI-compatible model server without a model.",
        epilog=f"Keys of a rule: {', '.join(Rule.__struct_fields__)}.\n\n{_EXAMPLES}",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8001, help="TCP port, 0 = any free one")
    base = FakeLLMSettings()
    for name, text in SETTINGS_HELP.items():
        default = getattr(base, name)
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, help=text)
    parser.add_argument("--model", action="append", help="a model to serve, repeatable; none: any")
    parser.add_argument("--api-key-env", help="name of the environment variable with the API key")
    parser.add_argument("--rules", help="YAML or JSON: a list of rules, or settings with `rules`")
    return parser


def _parse(argv: Sequence[str] | None) -> tuple[str, int, FakeLLMSettings]:
    base = FakeLLMSettings()
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.rules:
        base = load_settings(args.rules)
        parser.set_defaults(**{name: getattr(base, name) for name in SETTINGS_HELP})
        args = parser.parse_args(argv)  # again: the flags that were given outdo the file
    if not 0 <= args.port <= 65535:
        parser.error(f"--port: {args.port} is not between 0 and 65535")
    if args.api_key_env and not os.environ.get(args.api_key_env):
        parser.error(f"--api-key-env: there is no {args.api_key_env} in the environment")
    flags = _checked({name: getattr(args, name) for name in SETTINGS_HELP}, "command line")
    settings = msgspec.structs.replace(
        flags,
        models=tuple(args.model or base.models),
        api_key=os.environ[args.api_key_env] if args.api_key_env else base.api_key,
        rules=base.rules,
    )
    return args.host, args.port, settings


async def _serve(settings: FakeLLMSettings, host: str, port: int) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    fake = FakeLLM(settings)
    try:
        base_url = await fake.start(host, port)
    except OSError as exc:
        place = exc.filename or f"{host} port {port}"
        print(f"fakellm: cannot start on {place}: {exc.strerror or exc}", file=sys.stderr)
        return 1
    else:
        print(f"fakellm ready at {base_url}", flush=True)
        await stop.wait()
        await fake.stop()
        return 0
    finally:  # for callers of main() that live on
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


if __name__ == "__main__":
    sys.exit(main())
