"""Are the model servers of a run there, or can they be started here?"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from dispatcher.doctor.finding import Finding, ok, problem, size_text, warning
from dispatcher.taskmanager.backend.http import Endpoint, Transport
from dispatcher.taskmanager.backend.local import model_file
from dispatcher.taskmanager.backend.making import endpoints_of, split_arguments
from dispatcher.taskmanager.backend.settings import (
    DEFAULT_MODELS,
    Backends,
    BackendSettings,
    FakeSettings,
    HostedSettings,
    LocalSettings,
    VLLMSettings,
)

_ANSWER_S = 20.0
_SHOWN_MODELS = 5


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


async def check_models(backends: Backends, environ: Mapping[str, str]) -> list[Finding]:
    """Look at each model server, asking those that run what they serve."""
    found: list[Finding] = []
    for name, settings in backends.by_name.items():
        check = f"model server {name}" if backends.are_named else "model server"
        if isinstance(settings, HostedSettings | VLLMSettings) and not settings.is_launched:
            found += [await _ask(check, endpoint) for endpoint in endpoints_of(settings)]
        else:
            found.append(_look(check, settings, environ))
    return found


async def _ask(check: str, endpoint: Endpoint) -> Finding:
    """Have a server list its models: is it there, does it take the key, has it the model?"""
    server = Transport(endpoint)
    begun_at = time.perf_counter()
    try:
        reply = await server.get("/models", timeout_s=_ANSWER_S)
    finally:
        await server.close()
    url, took_ms = endpoint.base_url, 1000 * (time.perf_counter() - begun_at)
    if reply is None:
        return problem(
            check,
            f"no answer from {url} within {took_ms / 1000:.0f} s",
            "check the address, that the server runs, and that this machine may reach it",
        )
    key = f"with the key of {endpoint.key_source}" if endpoint.api_key else "without a key"
    if reply.status in (401, 403):
        return problem(
            check,
            f"{url} refuses us {key} ({reply.status})",
            f"put a key that it takes into {endpoint.key_source}",
        )
    if reply.status != 200:
        return warning(
            check,
            f"{url} answers, but with {reply.status} when asked for its models",
            "dispatcher run --preview 1 tries a request",
        )
    try:
        served = [model.id for model in msgspec.json.decode(reply.body, type=_Models).data]
    except (msgspec.DecodeError, UnicodeDecodeError):
        return warning(
            check,
            f"{url} answers, but lists its models in no way that is known here",
            "dispatcher run --preview 1 tries a request",
        )
    more = f" and {len(served) - _SHOWN_MODELS} more" if len(served) > _SHOWN_MODELS else ""
    shown = ", ".join(served[:_SHOWN_MODELS]) + more or "none"
    if endpoint.model is not None and endpoint.model not in served:
        return problem(
            check, f"{url} serves {shown}, not {endpoint.model}", "give --model one of these"
        )
    return ok(check, f"{url} answers {key} in {took_ms:.0f} ms and serves {shown}")


def _look(check: str, settings: BackendSettings, environ: Mapping[str, str]) -> Finding:
    """Look for what is needed to start a server. Raises DispatcherError."""
    model = settings.model or DEFAULT_MODELS.get(settings.kind, "")
    if isinstance(settings, FakeSettings):
        return ok(check, "fakellm, which is started with the run and answers without a model")
    if isinstance(settings, LocalSettings):
        path = model_file(model)
        return ok(check, f"{path}, {size_text(path.stat().st_size)}, is started with the run")
    assert isinstance(settings, VLLMSettings)
    command = settings.vllm_command
    program = split_arguments(command, "--vllm-command")[0] if command else "vllm"
    found = shutil.which(program) or (importlib.util.find_spec("vllm") if not command else None)
    if not found:
        return problem(
            check,
            f"there is no command {program} here",
            "install vLLM, name its command with --vllm-command, or run this where it is",
        )
    return _look_for_model(check, model, environ)


def _look_for_model(check: str, model: str, environ: Mapping[str, str]) -> Finding:
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            return problem(check, f"{path} has no config.json", "name a model's directory")
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return ok(check, f"vLLM is here, and the model {path}, {size_text(size)}")
    if path.exists():
        return ok(check, f"vLLM is here, and the model file {path}")
    if path.is_absolute() or model.startswith(".") or model.count("/") > 1:
        return problem(check, f"there is no model {model}", "name its directory, or ORG/NAME")
    cached = _hub_cache(environ) / f"models--{model.replace('/', '--')}" / "snapshots"
    if cached.is_dir() and any(cached.iterdir()):
        return ok(check, f"vLLM is here, and {model} in the hub's cache, {cached.parent}")
    if environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        return problem(
            check,
            f"{model} is not in {_hub_cache(environ)}, and HF_HUB_OFFLINE is set",
            "download it where there is a network, to a cache that this machine sees (HF_HOME)",
        )
    return warning(
        check,
        f"{model} is not in {_hub_cache(environ)}, so vLLM has to download it",
        "do that before the run: a compute node may have no network, and many would download it",
    )


def _hub_cache(environ: Mapping[str, str]) -> Path:
    if given := environ.get("HF_HUB_CACHE"):
        return Path(given)
    home = environ.get("HF_HOME") or os.path.join(
        environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")), "huggingface"
    )
    return Path(home) / "hub"
