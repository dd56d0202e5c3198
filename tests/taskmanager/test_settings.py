"""Flags and YAML sections become checked settings; what cannot work is named in one sentence."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dispatcher.config import Parser, parse
from dispatcher.errors import UsageError
from dispatcher.taskmanager.backend import making
from dispatcher.taskmanager.backend.base import Backend
from dispatcher.taskmanager.backend.existing import ExistingServer
from dispatcher.taskmanager.backend.fake import FakeBackend
from dispatcher.taskmanager.backend.launched import LaunchedBackend
from dispatcher.taskmanager.backend.local import LocalBackend
from dispatcher.taskmanager.backend.making import check_keys, gpus_needed, make_backend
from dispatcher.taskmanager.backend.openai_compatible import OpenAICompatibleBackend, RetryPolicy
from dispatcher.taskmanager.backend.options import (
    add_backend_options,
    describe_model,
    sections_of,
)
from dispatcher.taskmanager.backend.pool import BackendPool
from dispatcher.taskmanager.backend.reading import backends_of
from dispatcher.taskmanager.backend.settings import (
    AUTO,
    Backends,
    BackendSettings,
    CerebrasSettings,
    OpenAISettings,
    VLLMSettings,
    urls_of,
)
from dispatcher.taskmanager.backend.vllm import VLLMBackend

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "generator_and_judge.yaml"
TWO = """
backends:
  writer: {kind: vllm, model: org/writer, tensor_parallel: 2}
  judge: {kind: openai, model: big, base_url: 'http://judge:1/v1', workers: 8}
"""

Read = Callable[..., Backends]


def parsed(*argv: str) -> argparse.Namespace:
    parser = Parser(prog="it")
    parser.add_argument("--config", type=Path)
    add_backend_options(parser)
    return parse(parser, argv)


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Return a function that reads flags beside a file with this content."""

    def read(content: str, *flags: str, **environ: str) -> Backends:
        path = tmp_path / "it.yaml"
        path.write_text(content)
        return backends_of(parsed("--config", str(path), *flags), environ)

    return read


def flags(*argv: str, **environ: str) -> BackendSettings:
    backends = backends_of(parsed(*argv), environ)
    assert not backends.are_named
    return backends.first


def refusal(read: Read, content: str, *argv: str) -> str:
    with pytest.raises(UsageError) as caught:
        read(content, *argv)
    said = str(caught.value)
    assert "\n" not in said
    return said


# --- flags --------------------------------------------------------------------------------------


def test_flags_alone_describe_one_backend_and_vllm_is_the_default() -> None:
    settings = flags("--model", "m", "--tensor-parallel", "4", "--vllm-extra-args=--seed 1")
    assert isinstance(settings, VLLMSettings)
    assert (settings.model, settings.tensor_parallel, settings.workers) == ("m", 4, AUTO)
    assert settings.vllm_extra_args == "--seed 1"
    assert settings.is_launched
    assert (settings.hang_timeout, settings.engine_restarts) == (180.0, 4)


@pytest.mark.parametrize(
    ("argv", "workers"),
    [
        (["--model", "m"], AUTO),
        (["--model", "m", "--workers", "7"], 7),
        (["--backend", "openai", "--model", "m"], 64),
        (["--backend", "openai", "--model", "m", "--workers", "auto"], AUTO),
        (["--backend", "cerebras", "--model", "m"], AUTO),
        (["--backend", "cerebras", "--model", "m", "--workers", "3"], 3),
        (["--backend", "local"], 8),
        (["--backend", "fake"], 64),
    ],
)
def test_how_many_requests_are_in_flight_has_a_default_for_each_kind(
    argv: list[str], workers: object
) -> None:
    assert flags(*argv).workers == workers


def test_the_sections_hold_for_a_backend_of_flags_and_flags_win_over_them(read: Read) -> None:
    content = """
concurrency: {max_concurrent_requests: 24, min_concurrent_requests: 2, max_retries: 5}
load_monitoring: {ttft_threshold: 1.5, request_timeout: 30}
generation: {temperature: 0, max_completion_tokens: 9, stream: true}
"""
    settings = read(content, "--backend", "openai", "--model", "m").first
    assert settings.workers == AUTO  # there are bounds to adapt between
    assert settings.concurrency.max_concurrent_requests == 24
    assert settings.concurrency.max_retries == 5
    assert settings.load_monitoring.ttft_threshold == 1.5
    assert settings.load_monitoring.request_timeout == 30
    assert settings.generation.fields() == {"temperature": 0, "max_completion_tokens": 9}

    again = read(content, "--backend=openai", "--model=m", "--request-timeout=7", "--workers=5")
    assert again.first.load_monitoring.request_timeout == 7
    assert again.first.workers == 5


def test_several_addresses_are_those_of_the_flags_then_of_the_environment(read: Read) -> None:
    hosted = ["--backend", "openai", "--model", "m"]

    def addresses(settings: BackendSettings) -> tuple[str, ...]:
        assert isinstance(settings, OpenAISettings | CerebrasSettings)
        return urls_of(settings)

    one, two = "http://a:1/v1", "http://b:2/v1"
    assert addresses(flags(*hosted, "--base-url", one, "--base-url", two)) == (one, two)
    assert addresses(flags(*hosted, OPENAI_BASE_URL=one)) == (one,)
    assert addresses(flags(*hosted, "--base-url", two, OPENAI_BASE_URL=one)) == (two,)
    assert addresses(flags(*hosted, OPENAI_BASE_URL="")) == ("https://api.openai.com/v1",)
    hosted[1] = "cerebras"
    assert addresses(flags(*hosted)) == ("https://api.cerebras.ai/v1",)
    assert addresses(flags(*hosted, CEREBRAS_BASE_URL=one, OPENAI_BASE_URL=two)) == (one,)
    # A flag is instead of the file's, not one more.
    from_file = read(f"base-url: [{one}, {two}]\n", *hosted, "--base-url", "http://c:3/v1").first
    assert addresses(from_file) == ("http://c:3/v1",)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--backend vllm needs --model NAME"),
        (["--backend", "openai"], "--backend openai needs --model NAME"),
        (["--backend", "fake", "--no-launch"], "--no-launch does not go with --backend fake"),
        (
            ["--backend", "openai", "--model", "m", "--no-launch"],
            "--no-launch does not go with --backend openai; give its address with --base-url",
        ),
        (
            ["--model", "m", "--base-url", "http://h:1/v1"],
            "--base-url goes with --backend openai or cerebras, not with --backend vllm",
        ),
        (
            ["--backend", "openai", "--model", "m", "--base-url", "h:1"],
            "the command: base_url 'h:1' is not a URL; give one like http://HOST:8000/v1",
        ),
        (
            ["--backend", "local", "--workers", "auto"],
            "--workers auto does not go with local, which cannot tell its load; give a number",
        ),
    ],
)
def test_flags_that_cannot_work_together_are_refused_in_a_sentence(
    argv: list[str], said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        flags(*argv)
    assert str(caught.value) == said


@pytest.mark.parametrize("text", ["0", "lots", "-1", "65537", "1.5", ""])
def test_workers_is_a_number_or_auto(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--workers", text)
    assert "auto" in capsys.readouterr().err


# --- the section backends -----------------------------------------------------------------------


def test_named_backends_keep_their_order_their_kinds_and_their_own_limits(read: Read) -> None:
    backends = read(TWO)
    assert list(backends.by_name) == ["writer", "judge"]
    assert backends.are_named
    writer, judge = backends.by_name.values()
    assert isinstance(writer, VLLMSettings)
    assert (writer.model, writer.tensor_parallel, writer.workers) == ("org/writer", 2, AUTO)
    assert isinstance(judge, OpenAISettings)
    assert (judge.workers, urls_of(judge)) == (8, ("http://judge:1/v1",))
    assert gpus_needed(backends) == 2


def test_what_a_backend_says_wins_over_flags_and_those_over_global_sections(read: Read) -> None:
    content = """
backends:
  a: {kind: fake, load_monitoring: {request_timeout: 1}, generation: {seed: 7}}
  b: {kind: fake, startup_timeout: 3, concurrency: {max_retry_delay: 2}}
load_monitoring: {request_timeout: 3}
generation: {seed: 1, top_p: 0.5}
concurrency: {max_retries: 9}
"""
    a, b = read(content, "--request-timeout", "2", "--startup-timeout", "4").by_name.values()
    assert (a.load_monitoring.request_timeout, b.load_monitoring.request_timeout) == (1, 2)
    assert (a.startup_timeout, b.startup_timeout) == (4, 3)
    assert a.generation.fields() == {"seed": 7, "top_p": 0.5}
    assert b.generation.fields() == {"seed": 1, "top_p": 0.5}
    assert (b.concurrency.max_retries, b.concurrency.max_retry_delay) == (9, 2)
    assert a.concurrency.max_retry_delay == 10


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("backends: [a]", "backends must hold `key: value` lines, not ['a']"),
        ("backends: {}", "backends names none; give `NAME: {kind: ..., model: ...}`"),
        ("backends:", "the section backends is empty; fill it or leave it out"),
        ("backends: {a: 3}", "backends.a must hold `key: value` lines, not 3"),
        (
            "backends: {a: {kind: vlm}}",
            "backends.a: kind is 'vlm', but must be one of vllm, openai, cerebras, local, fake",
        ),
        (
            "backends: {a: {model: m}}",
            "backends.a: kind is missing, but must be one of vllm, openai, cerebras, local, fake",
        ),
        (
            "backends: {a: {kind: openai}}",
            "backends.a: model is missing; name the model it serves",
        ),
        (
            "backends: {a: {kind: fake, modle: m}}",
            "backends.a: unknown key 'modle'; known there: kind, model, workers, ",
        ),
        (
            "backends: {a: {kind: openai, model: m, tensor_parallel: 2}}",
            "backends.a: unknown key 'tensor_parallel'; known there: ",
        ),
        (
            "backends: {a: {kind: fake, concurrency: {max: 2}}}",
            "backends.a.concurrency: unknown key 'max'; known there: max_concurrent_requests, ",
        ),
        (
            "backends: {a: {kind: fake, generation: {top_k: 2}}}",
            "backends.a.generation: unknown key 'top_k'; known there: stream, ",
        ),
        (
            "backends: {a: {kind: fake, startup_timeout: soon}}",
            "backends.a.startup_timeout: expected `float`, got `str`",
        ),
        (
            "backends: {a: {kind: fake, concurrency: {max_retries: -1}}}",
            "backends.a.concurrency.max_retries: expected `int` >= 0",
        ),
        (
            "backends: {a: {kind: fake, workers: lots}}",
            "backends.a.workers: must be auto or a whole number from 1 to 65536",
        ),
        (
            "backends: {a: {kind: local, workers: auto}}",
            "backends.a: workers auto does not go with local, which cannot tell its load",
        ),
        (
            "backends: {a: {kind: openai, model: m, base_url: judge}}",
            "backends.a: base_url 'judge' is not a URL; give one like http://HOST:8000/v1",
        ),
        (
            "backends: {a: {kind: openai, model: m, base_url: []}}",
            "backends.a.base_url: expected `array` of length >= 1",
        ),
        (
            "backends: {a: {kind: openai, model: m, workers: 9, "
            "concurrency: {max_concurrent_requests: 9}}}",
            "backends.a: workers 9 fixes the requests in flight, so that "
            "concurrency.max_concurrent_requests has no meaning; leave one of them out",
        ),
        (
            "backends: {a: {kind: fake, load_monitoring: {ttft_threshold: 9}}}",
            "backends.a.load_monitoring.ttft_threshold has no meaning for kind fake",
        ),
        (
            "backends: {a: {kind: cerebras, model: m, "
            "concurrency: {min_concurrent_requests: 9, max_concurrent_requests: 8}}}",
            "backends.a.concurrency: min_concurrent_requests 9 is above max_concurrent_requests 8",
        ),
        ("concurrency: {max_request: 3}", "concurrency: unknown key 'max_request'; known there: "),
        ("concurrency: 3", "concurrency must hold `key: value` lines, not 3"),
        (
            "concurrency: {initial_retry_delay: 60}",
            "concurrency: initial_retry_delay 60 is above max_retry_delay 10",
        ),
        ("load_monitoring: {ttft: 3}", "load_monitoring: unknown key 'ttft'; known there: "),
        ("generation: {temperature: hot}", "generation.temperature: expected `float"),
        (f"{TWO}\nmodels_to_run: [{{name: m}}]", "models_to_run does not go with backends; "),
    ],
)
def test_what_is_wrong_in_the_file_is_named_with_its_place(
    read: Read, content: str, said: str
) -> None:
    answer = refusal(read, content)
    assert "it.yaml: " in answer
    assert answer.partition("it.yaml: ")[2].startswith(said)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--backend", "openai"], "--backend"),
        (["--model", "m"], "--model"),
        (["--base-url", "http://h:1/v1"], "--base-url"),
        (["--api-key-env", "KEY"], "--api-key-env"),
        (["--no-launch"], "--no-launch"),
        (["--backend", "vllm", "--model", "m"], "--backend and --model"),
    ],
)
def test_flags_about_one_server_are_refused_where_the_file_names_several(
    read: Read, argv: list[str], named: str
) -> None:
    assert f"{named} cannot go with the section backends" in refusal(read, TWO, *argv)


# --- the section models_to_run ------------------------------------------------------------------

MODELS = """
models_to_run:
  - {name: small, concurrency: {max_concurrent_requests: 40}}
  - {name: big, concurrency: {max_concurrent_requests: 4}, generation: {temperature: 0}}
concurrency: {min_concurrent_requests: 2, recover_threshold: 5}
generation: {temperature: 1, seed: 3}
"""


def test_models_of_one_endpoint_have_their_own_limits_over_the_global_ones(read: Read) -> None:
    backends = read(MODELS, "--backend", "cerebras")
    small, big = backends.by_name.values()
    assert list(backends.by_name) == [small.model, big.model] == ["small", "big"]
    assert backends.are_named
    assert isinstance(big, CerebrasSettings)
    assert small.concurrency.max_concurrent_requests == 40
    assert big.concurrency.max_concurrent_requests == 4
    assert small.concurrency.min_concurrent_requests == big.concurrency.min_concurrent_requests == 2
    assert big.concurrency.recover_threshold == 5
    assert (small.generation.temperature, big.generation.temperature) == (1, 0)
    assert big.generation.seed == 3


@pytest.mark.parametrize(
    ("content", "argv", "said"),
    [
        (MODELS, ["--model", "x"], "--model does not go with models_to_run"),
        (MODELS, ["--backend", "vllm"], "models of a hosted endpoint (--backend openai or cerebr"),
        ("models_to_run: []", [], "models_to_run must be a list of models, each with its `name`"),
        ("models_to_run: {name: m}", [], "models_to_run must be a list of models"),
        ("models_to_run: [m]", [], "models_to_run[0] must hold `key: value` lines, not 'm'"),
        ("models_to_run: [{}]", [], "models_to_run[0]: object missing required field `name`"),
        (
            "models_to_run: [{name: a}, {name: a}]",
            [],
            "models_to_run[1]: a is listed twice",
        ),
        (
            "models_to_run: [{name: a, workers: 3}]",
            [],
            "models_to_run[0]: unknown key 'workers'; known there: name, concurrency, generation",
        ),
        (
            "models_to_run: [{name: a, concurrency: {most: 3}}]",
            [],
            "models_to_run[0].concurrency: unknown key 'most'; known there: max_concurrent",
        ),
    ],
)
def test_what_is_wrong_with_models_to_run_is_named(
    read: Read, content: str, argv: list[str], said: str
) -> None:
    argv = argv if "--backend" in argv else ["--backend", "openai", *argv]
    assert said in refusal(read, content, *argv)


# --- keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "environ", "variable"),
    [
        (["--backend", "cerebras"], {}, "CEREBRAS_API_KEY"),
        (["--backend", "cerebras"], {"CEREBRAS_API_KEY": ""}, "CEREBRAS_API_KEY"),
        (["--backend", "cerebras"], {"CEREBRAS_API_KEY": "k"}, None),
        (["--backend", "openai"], {"CEREBRAS_API_KEY": "k"}, "OPENAI_API_KEY"),
        (["--backend", "openai", "--base-url", "http://h:1/v1"], {}, None),
        (
            ["--backend", "openai", "--base-url", "http://h:1/v1", "--api-key-env", "MINE"],
            {"OPENAI_API_KEY": "k"},
            "MINE",
        ),
    ],
)
def test_a_key_that_is_needed_and_not_there_is_named(
    argv: list[str], environ: dict[str, str], variable: str | None
) -> None:
    backends = backends_of(parsed(*argv, "--model", "m"), {})
    if variable is None:
        check_keys(backends, environ)
        return
    with pytest.raises(UsageError, match=f"variable {variable}, which is not set"):
        check_keys(backends, environ)


# --- from settings to backends ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "kind", "follows_load"),
    [
        (["--model", "m"], VLLMBackend, True),
        (["--model", "m", "--workers", "9"], VLLMBackend, False),
        (["--backend", "fake"], FakeBackend, False),
        (["--backend", "fake", "--workers", "auto"], FakeBackend, True),
        (["--backend", "local"], LocalBackend, False),
        (["--no-launch"], ExistingServer, True),
        (["--no-launch", "--workers", "9"], ExistingServer, False),
        (["--backend", "openai", "--model", "m"], ExistingServer, False),
        (["--backend", "cerebras", "--model", "m"], ExistingServer, False),
    ],
)
def test_each_kind_becomes_its_backend(
    argv: list[str], kind: type[Backend], follows_load: bool, tmp_path: Path
) -> None:
    backend = make_backend(backends_of(parsed(*argv), {}), tmp_path)
    assert type(backend) is kind
    assert isinstance(backend, LaunchedBackend | OpenAICompatibleBackend)
    options = backend.options if isinstance(backend, LaunchedBackend) else backend
    assert (options.saturation is not None) is follows_load


def test_only_a_hosted_server_that_adapts_gets_a_limiter(tmp_path: Path) -> None:
    def made(*argv: str) -> ExistingServer:
        backend = make_backend(backends_of(parsed(*argv, "--model", "m"), {}), tmp_path)
        assert isinstance(backend, ExistingServer)
        return backend

    assert made("--backend", "openai").limiter is None
    assert made("--backend", "openai").limit == 64
    assert made("--backend", "cerebras", "--workers", "5").limit == 5
    limiter = made("--backend", "cerebras").limiter
    assert limiter is not None
    assert (limiter.policy.min_concurrent, limiter.policy.max_concurrent) == (1, 64)
    assert made("--no-launch").limiter is None


def test_a_launched_backend_gets_the_limits_it_was_given(read: Read, tmp_path: Path) -> None:
    content = "concurrency: {max_retries: 7, initial_retry_delay: 1, max_retry_delay: 4}\n"
    argv = ["--backend", "fake", "--hang-timeout", "9", "--engine-restarts", "2", "--workers", "3"]
    backend = make_backend(read(content, *argv, "--request-timeout", "5"), tmp_path)
    assert isinstance(backend, LaunchedBackend)
    options = backend.options
    assert (options.limit, options.hang_timeout_s, options.engine_restarts) == (3, 9.0, 2)
    assert options.request_timeout_s == 5
    assert options.retries == RetryPolicy(7, 1, 4)
    assert not options.sending.stream


def test_cerebras_streams_unless_it_is_told_not_to(read: Read, tmp_path: Path) -> None:
    def streams(content: str, kind: str) -> bool:
        made: Any = make_backend(read(content, "--backend", kind, "--model", "m"), tmp_path)
        return bool(made._sending.stream)

    assert streams("", "cerebras")
    assert not streams("", "openai")
    assert not streams("generation: {stream: false}", "cerebras")
    assert streams("generation: {stream: true}", "openai")


def test_named_backends_become_a_pool_even_a_single_one(read: Read, tmp_path: Path) -> None:
    assert isinstance(make_backend(read(TWO), tmp_path), BackendPool)
    assert isinstance(make_backend(read("backends: {a: {kind: fake}}"), tmp_path), BackendPool)


# --- what is kept and handed on -----------------------------------------------------------------


def test_several_models_are_told_by_name_and_by_the_files_that_are_here(
    read: Read, tmp_path: Path
) -> None:
    (tmp_path / "weights").write_text("x")
    content = TWO.replace("org/writer", str(tmp_path / "weights"))
    described = describe_model(read(content))
    assert described["name"] == f"writer: {tmp_path / 'weights'}, judge: big"
    assert described["path"] == str(tmp_path / "weights")
    assert list(described["files"]) == ["writer"]
    assert "files" not in describe_model(read(TWO))


def test_the_sections_are_handed_on_as_they_stand_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "it.yaml"
    path.write_text("generation: {seed: 1}\nworkers: auto\n")
    args = parsed("--config", str(path))
    assert sections_of(args) == {"generation": {"seed": 1}}
    assert args.workers == AUTO


def test_the_example_file_can_be_used(read: Read) -> None:
    writer, judge = read(EXAMPLE.read_text()).by_name.values()
    assert writer.kind == "vllm"
    assert judge.kind == "cerebras"
    assert judge.concurrency.max_concurrent_requests == 24
    assert judge.concurrency.max_retries == 3
    assert judge.load_monitoring.request_timeout == 300


def test_several_engines_get_different_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4,5")
    launched: dict[str, Any] = {}

    def note(settings: Any, options: Any) -> Any:
        launched[settings.model] = dict(settings.environment)
        return VLLMBackend(settings, options)

    monkeypatch.setattr(making, "VLLMBackend", note)
    (tmp_path / "run.yaml").write_text(
        "backends:\n"
        "  a: {kind: vllm, model: one, tensor_parallel: 2}\n"
        "  b: {kind: vllm, model: two}\n"
    )
    config = ["--config", str(tmp_path / "run.yaml")]
    make_backend(backends_of(parsed(*config), {}), tmp_path)

    assert launched == {
        "one": {"CUDA_VISIBLE_DEVICES": "3,4"},
        "two": {"CUDA_VISIBLE_DEVICES": "5"},
    }
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(UsageError, match="the backend a of this node needs the GPUs 1 to 2"):
        make_backend(backends_of(parsed(*config), {}), tmp_path)
