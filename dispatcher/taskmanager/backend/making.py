"""From settings to backends: one, or a pool of several."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from dispatcher.core.limiter import AdaptiveLimiter, LimiterPolicy
from dispatcher.core.saturation import Saturation
from dispatcher.errors import UsageError
from dispatcher.taskmanager.backend import vllm
from dispatcher.taskmanager.backend.base import Backend
from dispatcher.taskmanager.backend.bodies import Sending
from dispatcher.taskmanager.backend.existing import ExistingServer
from dispatcher.taskmanager.backend.fake import FakeBackend
from dispatcher.taskmanager.backend.gpus import range_environment
from dispatcher.taskmanager.backend.http import Endpoint
from dispatcher.taskmanager.backend.launched import LaunchOptions
from dispatcher.taskmanager.backend.local import LocalBackend
from dispatcher.taskmanager.backend.openai_compatible import RetryPolicy
from dispatcher.taskmanager.backend.pool import BackendPool
from dispatcher.taskmanager.backend.settings import (
    AUTO,
    DEFAULT_MODELS,
    DEFAULT_WORKERS,
    Backends,
    BackendSettings,
    FakeSettings,
    HostedSettings,
    LaunchedSettings,
    LocalSettings,
    VLLMSettings,
    urls_of,
)
from dispatcher.taskmanager.backend.vllm import VLLMBackend

_VLLM_KEY = "VLLM_API_KEY"


def make_backend(backends: Backends, log_dir: Path) -> Backend:
    """Build what the settings describe; logs of launched servers go below `log_dir`.

    Raises UsageError for arguments that cannot be split, or GPUs that are not there.
    """
    if not backends.are_named:
        return _make(backends.first, log_dir, frozenset())
    pooled: dict[str, Backend] = {}
    names: dict[str, str] = {}
    gpus = _gpus_by_name(backends)
    for name, settings in backends.by_name.items():
        directory = log_dir / re.sub(r"[^\w.-]", "_", name)
        pooled[name] = _make(settings, directory, frozenset({name}), gpus.get(name, {}))
        if settings.model is not None:
            names.setdefault(settings.model, name)  # of two with one model, the first
    return BackendPool(pooled, names)


def check_keys(backends: Backends, environ: Mapping[str, str]) -> None:
    """Raise UsageError when a hosted endpoint's key is not where it should be."""
    for name, settings in backends.by_name.items():
        if not isinstance(settings, HostedSettings):
            continue
        variable = settings.api_key_env or settings.key_variable
        needed = settings.api_key_env is not None or settings.default_url in urls_of(settings)
        if needed and not environ.get(variable):
            whose = f"the backend {name}" if backends.are_named else f"--backend {settings.kind}"
            raise UsageError(
                f"{whose} needs the API key of {urls_of(settings)[0]} in the environment variable "
                f"{variable}, which is not set; export it, or name another with api_key_env"
            )


def gpus_needed(backends: Backends) -> int:
    """Return how many GPUs one task manager's engines take."""
    return sum(count for _, count in _engines(backends))


def _engines(backends: Backends) -> list[tuple[str, int]]:
    """Return the engines that are launched here, and how many GPUs each takes."""
    return [
        (name, settings.tensor_parallel)
        for name, settings in backends.by_name.items()
        if isinstance(settings, VLLMSettings) and settings.is_launched
    ]


def _gpus_by_name(backends: Backends) -> dict[str, dict[str, str]]:
    """Share out the GPUs among several engines; one alone sees all. Raises UsageError."""
    engines = _engines(backends)
    if len(engines) < 2:
        return {}
    found: dict[str, dict[str, str]] = {}
    first = 0
    for name, count in engines:
        found[name] = range_environment(os.environ, first, count, f"the backend {name}")
        first += count
    return found


def split_arguments(text: str, option: str) -> list[str]:
    """Split an option that holds command-line arguments, as a shell would."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{option} {text!r}: {error}") from error


# -------------------------------------------------------------------- one of each kind


def _make(
    settings: BackendSettings,
    log_dir: Path,
    names: frozenset[str],
    gpus: Mapping[str, str] | None = None,
) -> Backend:
    if isinstance(settings, LaunchedSettings) and settings.is_launched:
        options = _launch_options(settings, log_dir, names)
        if isinstance(settings, LocalSettings):
            return LocalBackend(
                options,
                model=settings.model or DEFAULT_MODELS[settings.kind],
                parallel=options.limit,
                context_tokens=settings.max_model_len,
            )
        if isinstance(settings, FakeSettings):
            arguments = split_arguments(settings.fakellm_args, "--fakellm-args")
            model = settings.model or DEFAULT_MODELS[settings.kind]
            return FakeBackend(options, model=model, arguments=arguments)
        assert isinstance(settings, VLLMSettings)
        return VLLMBackend(_engine_of(settings, gpus or {}), options)
    assert isinstance(settings, HostedSettings | VLLMSettings)
    return ExistingServer(
        endpoints_of(settings),
        startup_timeout_s=settings.startup_timeout,
        limit=_first_limit(settings),
        limiter=_limiter_of(settings),
        saturation=_saturation_of(settings),
        retries=_retries_of(settings),
        sending=_sending_of(settings, names),
    )


def _launch_options(
    settings: LaunchedSettings, log_dir: Path, names: frozenset[str]
) -> LaunchOptions:
    return LaunchOptions(
        log_dir=log_dir,
        limit=_first_limit(settings),
        saturation=_saturation_of(settings),
        startup_timeout_s=settings.startup_timeout,
        request_timeout_s=settings.load_monitoring.request_timeout,
        engine_restarts=settings.engine_restarts,
        hang_timeout_s=settings.hang_timeout,
        retries=_retries_of(settings),
        sending=_sending_of(settings, names),
    )


def _engine_of(settings: VLLMSettings, gpus: Mapping[str, str]) -> vllm.VLLMSettings:
    assert settings.model is not None
    extra, command = settings.vllm_extra_args, settings.vllm_command
    return vllm.VLLMSettings(
        model=settings.model,
        tensor_parallel=settings.tensor_parallel,
        max_model_len=settings.max_model_len,
        chat_template=settings.chat_template,
        enforce_eager=settings.enforce_eager,
        extra_args=split_arguments(extra, "--vllm-extra-args") if isinstance(extra, str) else extra,
        command=split_arguments(command, "--vllm-command") if command is not None else None,
        quiet=settings.silence_vllm_logs,
        environment=gpus,
    )


def endpoints_of(settings: HostedSettings | VLLMSettings) -> list[Endpoint]:
    """Return the servers that run already, each with the key that belongs to it."""
    # A key goes only where it belongs: a vLLM of one's own is not shown the hosted one's.
    variable = _VLLM_KEY
    if isinstance(settings, HostedSettings):
        variable = settings.api_key_env or settings.key_variable
    return [
        Endpoint(
            url,
            settings.model,
            os.environ.get(variable) or None,
            settings.load_monitoring.request_timeout,
            f"the environment variable {variable}",
        )
        for url in urls_of(settings)
    ]


def _first_limit(settings: BackendSettings) -> int:
    """Return how many requests may be in flight, at first if that adapts."""
    if settings.workers == AUTO:
        return min(DEFAULT_WORKERS, settings.concurrency.max_concurrent_requests)
    return settings.workers


def _saturation_of(settings: BackendSettings) -> Saturation | None:
    """Return what follows the load that an engine tells."""
    if settings.workers != AUTO or not settings.tells_load:
        return None
    return Saturation(_first_limit(settings), settings.concurrency.max_concurrent_requests)


def _limiter_of(settings: BackendSettings) -> AdaptiveLimiter | None:
    """Return what feels for the limit of a server that does not tell its load."""
    if settings.workers != AUTO or settings.tells_load:
        return None
    concurrency = settings.concurrency
    policy = LimiterPolicy(
        concurrency.min_concurrent_requests,
        concurrency.max_concurrent_requests,
        concurrency.recover_threshold,
        settings.load_monitoring.ttft_threshold,
    )
    return AdaptiveLimiter(policy)


def _retries_of(settings: BackendSettings) -> RetryPolicy:
    concurrency = settings.concurrency
    return RetryPolicy(
        concurrency.max_retries, concurrency.initial_retry_delay, concurrency.max_retry_delay
    )


def _sending_of(settings: BackendSettings, names: frozenset[str]) -> Sending:
    stream = settings.generation.stream
    if stream is None:
        stream = isinstance(settings, HostedSettings) and settings.streams
    return Sending(stream, settings.generation.fields(), names)
