"""Which model servers a run uses, and how: what can be said about each kind.

A backend is described by the flags of the command (`--backend`, `--model`, ...), or by a section
`backends` of the file that `--config` names, which may name several:

    backends:
      writer: {kind: vllm, model: org/model, tensor_parallel: 2}
      judge: {kind: cerebras, model: llama-3.3-70b, concurrency: {max_concurrent_requests: 24}}
    concurrency: {recover_threshold: 20}

The sections `concurrency`, `load_monitoring` and `generation` hold for every backend that does not
say otherwise. `models_to_run` lists the models that are used at one hosted endpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

import msgspec

from dispatcher.config import MOST_SECONDS

AUTO: Literal["auto"] = "auto"
DEFAULT_WORKERS = 64
DEFAULT_LOCAL_WORKERS = 8
DEFAULT_KIND = "vllm"
DEFAULT_MODELS = {"local": "smollm2", "fake": "fake"}
SECTIONS = ("backends", "models_to_run", "concurrency", "load_monitoring", "generation")

MOST_WORKERS = 1 << 16

Seconds = Annotated[float, msgspec.Meta(gt=0, le=MOST_SECONDS)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Requests = Annotated[int, msgspec.Meta(ge=1, le=MOST_WORKERS)]
Text = Annotated[str, msgspec.Meta(min_length=1)]


def _says(meaning: str) -> msgspec.Meta:
    """Describe a key for docs/reference.md."""
    return msgspec.Meta(description=meaning)


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a mapping in the file may hold: these keys and no others."""


class Concurrency(Settings, frozen=True, kw_only=True):
    """How many requests may be in flight, and when a refused one is sent again. Delays in s."""

    max_concurrent_requests: Annotated[Requests, _says("requests in flight at most")] = (
        DEFAULT_WORKERS
    )
    min_concurrent_requests: Annotated[Requests, _says("requests that are always let through")] = 1
    recover_threshold: Annotated[
        Positive, _says("fast answers in a row before the limit grows")
    ] = 10
    initial_retry_delay: Annotated[
        Seconds, _says("seconds before a failed request is sent again; doubled each time, jittered")
    ] = 0.25
    max_retry_delay: Annotated[Seconds, _says("seconds of that delay at most")] = 10.0
    max_retries: Annotated[
        Count, _says("times a request that fails by itself is sent again; 429 and 503 do not count")
    ] = 2

    def __post_init__(self) -> None:
        """Refuse with ValueError what leaves no room between the least and the most."""
        least, most = self.min_concurrent_requests, self.max_concurrent_requests
        if least > most:
            raise ValueError(
                f"min_concurrent_requests {least} is above max_concurrent_requests {most}"
            )
        if self.initial_retry_delay > self.max_retry_delay:
            raise ValueError(
                f"initial_retry_delay {self.initial_retry_delay:g} is above max_retry_delay "
                f"{self.max_retry_delay:g}"
            )


class LoadMonitoring(Settings, frozen=True, kw_only=True):
    """When an answer counts as slow, and as lost: seconds to its first token, and to its end."""

    ttft_threshold: Annotated[
        Seconds, _says("seconds to the first token of a streamed answer that count as slow")
    ] = 5.0
    request_timeout: Annotated[Seconds, _says("seconds one model request may take")] = 600.0


class Generation(Settings, frozen=True, kw_only=True):
    """Fields of every request that does not say otherwise. `stream` None: as the kind does."""

    stream: Annotated[bool | None, _says("have answers sent as they are made")] = None
    max_completion_tokens: Annotated[Positive | None, _says("tokens of an answer at most")] = None
    temperature: Annotated[
        Annotated[float, msgspec.Meta(ge=0)] | None, _says("0 takes the likeliest token")
    ] = None
    top_p: Annotated[
        Annotated[float, msgspec.Meta(ge=0, le=1)] | None,
        _says("share of the likeliest tokens that are drawn from"),
    ] = None
    seed: Annotated[int | None, _says("seed of the model server's draws")] = None

    def fields(self) -> dict[str, Any]:
        """Return what is filled into a request."""
        given = msgspec.structs.asdict(self)
        return {key: value for key, value in given.items() if key != "stream" and value is not None}


class BackendSettings(Settings, frozen=True, kw_only=True):
    """What every kind of backend has. `workers` bounds the requests in flight.

    "auto" adapts that bound: to what the engine says of its load, or else (not `tells_load`) to
    refusals and slow answers.
    """

    kind: ClassVar[str]
    can_adapt: ClassVar[bool] = True
    tells_load: ClassVar[bool] = True
    most_concurrent: ClassVar[int] = 4096

    model: Text | None = None
    workers: Requests | Literal["auto"] = AUTO
    startup_timeout: Seconds = 1800.0
    concurrency: Concurrency = Concurrency()
    load_monitoring: LoadMonitoring = LoadMonitoring()
    generation: Generation = Generation()

    @property
    def is_launched(self) -> bool:
        """Whether its model server is started by the task manager, from files of this machine."""
        return True


class HostedSettings(BackendSettings, frozen=True, kw_only=True):
    """An endpoint that somebody else runs. Several URLs serve the same; the least loaded is asked.

    The key itself stands nowhere but in the variable that `api_key_env` names.
    """

    default_url: ClassVar[str]
    url_variable: ClassVar[str]
    key_variable: ClassVar[str]
    streams: ClassVar[bool] = False
    tells_load: ClassVar[bool] = False
    most_concurrent: ClassVar[int] = DEFAULT_WORKERS

    base_url: Text | Annotated[tuple[Text, ...], msgspec.Meta(min_length=1)] | None = None
    api_key_env: Text | None = None

    def __post_init__(self) -> None:
        """Refuse with ValueError what is no URL."""
        _check_urls(self.base_url)

    @property
    def is_launched(self) -> bool:
        """It never is."""
        return False


class OpenAISettings(HostedSettings, frozen=True, kw_only=True):
    """Any server with OpenAI's interface."""

    kind: ClassVar[str] = "openai"
    default_url: ClassVar[str] = "https://api.openai.com/v1"
    url_variable: ClassVar[str] = "OPENAI_BASE_URL"
    key_variable: ClassVar[str] = "OPENAI_API_KEY"


class CerebrasSettings(HostedSettings, frozen=True, kw_only=True):
    """Cerebras' endpoint: streamed, with a limit that adapts to what it bears."""

    kind: ClassVar[str] = "cerebras"
    default_url: ClassVar[str] = "https://api.cerebras.ai/v1"
    url_variable: ClassVar[str] = "CEREBRAS_BASE_URL"
    key_variable: ClassVar[str] = "CEREBRAS_API_KEY"
    streams: ClassVar[bool] = True


class LaunchedSettings(BackendSettings, frozen=True, kw_only=True):
    """A model server that the task manager starts, watches and, within a budget, starts again."""

    hang_timeout: Seconds = 180.0
    engine_restarts: Count = 4


class VLLMSettings(LaunchedSettings, frozen=True, kw_only=True):
    """vLLM; with `no_launch` one that runs at `host`, `port` already."""

    kind: ClassVar[str] = "vllm"

    tensor_parallel: Positive = 1
    max_model_len: Positive | None = None
    chat_template: Text | None = None
    enforce_eager: bool = False
    silence_vllm_logs: bool = False
    vllm_extra_args: str | tuple[str, ...] = ""
    vllm_command: Text | None = None
    no_launch: bool = False
    host: Text = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 8000

    @property
    def is_launched(self) -> bool:
        """Whether it is started here."""
        return not self.no_launch


class LocalSettings(LaunchedSettings, frozen=True, kw_only=True):
    """A small model on the CPU."""

    kind: ClassVar[str] = "local"
    can_adapt: ClassVar[bool] = False

    max_model_len: Positive | None = None


class FakeSettings(LaunchedSettings, frozen=True, kw_only=True):
    """`fakellm`, which speaks vLLM's metrics."""

    kind: ClassVar[str] = "fake"

    fakellm_args: str = ""


_TYPES: Sequence[type[BackendSettings]] = (
    VLLMSettings,
    OpenAISettings,
    CerebrasSettings,
    LocalSettings,
    FakeSettings,
)
KINDS: Mapping[str, type[BackendSettings]] = {each.kind: each for each in _TYPES}
HOSTED: Mapping[str, type[HostedSettings]] = {
    each.kind: each for each in (OpenAISettings, CerebrasSettings)
}
NESTED: Mapping[str, type[Settings]] = {
    "concurrency": Concurrency,
    "load_monitoring": LoadMonitoring,
    "generation": Generation,
}


@dataclass(frozen=True)
class Backends:
    """The backends of a run by name; the first is asked where a request names none.

    `are_named`: the file names them, so that a task's request may name only these.
    """

    by_name: Mapping[str, BackendSettings]
    are_named: bool

    @property
    def first(self) -> BackendSettings:
        """The default."""
        return next(iter(self.by_name.values()))


def workers_of(text: str) -> int | Literal["auto"]:
    """Parse `--workers`. Raises argparse.ArgumentTypeError."""
    if text == AUTO:
        return AUTO
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor auto") from None
    if not 1 <= value <= MOST_WORKERS:
        raise argparse.ArgumentTypeError(
            f"{text} is out of range; allowed: auto, or 1 to {MOST_WORKERS}"
        )
    return value


def urls_of(settings: HostedSettings | VLLMSettings) -> tuple[str, ...]:
    """Return the addresses of a server that runs already."""
    if isinstance(settings, HostedSettings):
        url = settings.base_url or settings.default_url
        return (url,) if isinstance(url, str) else url
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return (f"http://{host}:{settings.port}/v1",)


def _check_urls(given: str | tuple[str, ...] | None) -> None:
    for url in (given,) if isinstance(given, str) else given or ():
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url {url!r} is not a URL; give one like http://HOST:8000/v1")
