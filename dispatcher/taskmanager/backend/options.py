"""What a command line says of its model servers, and what run.yaml keeps of them."""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path
from typing import Any

from dispatcher.config import OwnList, Parser, number, seconds
from dispatcher.taskmanager.backend.settings import (
    DEFAULT_KIND,
    DEFAULT_LOCAL_WORKERS,
    DEFAULT_MODELS,
    DEFAULT_WORKERS,
    HOSTED,
    KINDS,
    SECTIONS,
    Backends,
    BackendSettings,
    workers_of,
)

_HOSTED = " or ".join(HOSTED)
_URLS = ", ".join(f"{each.url_variable}, else {each.default_url}" for each in HOSTED.values())
_KEYS = " or ".join(each.key_variable for each in HOSTED.values())


def add_backend_options(parser: Parser) -> None:
    """Add what says which model servers answer, and how many requests they get."""
    parser.add_sections(*SECTIONS)
    model = parser.add_argument_group(
        "model server",
        "--config FILE may also hold the sections backends (several model servers), models_to_run, "
        "concurrency, load_monitoring and generation; see README.",
    )
    model.add_argument(
        "--backend",
        choices=tuple(KINDS),
        help=f"kind of model server (default: {DEFAULT_KIND})",
    )
    model.add_argument(
        "--model",
        metavar="NAME",
        help=f"model name or path (default of local: {DEFAULT_MODELS['local']})",
    )
    model.add_argument(
        "--base-url",
        action=OwnList,
        default=[],
        metavar="URL",
        help=f"--backend {_HOSTED}: the server's URL with /v1; repeatable, each request goes to "
        f"the least loaded (default: {_URLS})",
    )
    model.add_argument(
        "--api-key-env",
        metavar="NAME",
        help=f"--backend {_HOSTED}: environment variable that holds the API key (default: {_KEYS})",
    )
    model.add_argument(
        "--no-launch", action="store_true", help="use a vLLM server that runs at --host, --port"
    )
    model.add_argument("--host", default="127.0.0.1", help="--no-launch: the server's host")
    model.add_argument(
        "--port", type=number(int, 1, 65535), default=8000, help="--no-launch: the server's port"
    )
    model.add_argument(
        "--startup-timeout",
        type=seconds(1),
        default=1800.0,
        metavar="S",
        help="seconds the model server may take to start",
    )
    model.add_argument(
        "--request-timeout",
        type=seconds(0.1),
        metavar="S",
        help="seconds one model request may take (default: 600)",
    )
    model.add_argument(
        "--hang-timeout",
        type=seconds(1),
        default=180.0,
        metavar="S",
        help="seconds a launched model server may make no progress before it is started again",
    )
    model.add_argument(
        "--engine-restarts",
        type=number(int, 0),
        default=4,
        metavar="N",
        help="times within an hour that a launched model server is started again when it died or "
        "hung",
    )
    model.add_argument(
        "--workers",
        type=workers_of,
        metavar="N|auto",
        help="model requests in flight; auto follows what the server bears (default: auto; openai "
        f"and fake: {DEFAULT_WORKERS}; local: {DEFAULT_LOCAL_WORKERS})",
    )
    model.add_argument(
        "--batch-size",
        type=number(int, 1, 4096),
        metavar="N",
        help="items kept ready ahead of need (default: a quarter of --workers; auto: "
        f"{DEFAULT_WORKERS})",
    )
    model.add_argument(
        "--max-model-len",
        type=number(int, 1),
        metavar="TOKENS",
        help="context length limit in tokens (default: the model's)",
    )
    model.add_argument(
        "--fakellm-args",
        default="",
        metavar="ARGS",
        help="--backend fake: options of fakellm, as in --fakellm-args='--latency-s 0.2'",
    )
    model.add_argument(
        "--log-dir",
        type=Path,
        metavar="DIR",
        help="where logs go (default: a temporary directory; of dispatcher run: STATE/logs)",
    )
    _add_vllm_options(parser)


def _add_vllm_options(parser: Parser) -> None:
    vllm = parser.add_argument_group("vLLM")
    vllm.add_argument(
        "--tensor-parallel",
        type=number(int, 1),
        default=1,
        metavar="GPUS",
        help="GPUs to spread the model over",
    )
    vllm.add_argument(
        "--chat-template", metavar="FILE", help="chat template to use (default: the model's)"
    )
    vllm.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    vllm.add_argument("--silence-vllm-logs", action="store_true", help="log warnings only")
    vllm.add_argument(
        "--vllm-extra-args",
        default="",
        metavar="ARGS",
        help="options of vLLM, as in --vllm-extra-args='--seed 1'",
    )
    vllm.add_argument(
        "--vllm-command",
        metavar="COMMAND",
        help="command that starts vLLM's server (default: vllm serve, or its module form)",
    )


def sections_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the sections of the file of `--config` as they stand there."""
    found = {name: getattr(args, name, None) for name in SECTIONS}
    return {name: section for name, section in found.items() if section is not None}


def describe_model(backends: Backends) -> dict[str, Any]:
    """Return the models' names and, where this machine serves one, what its files look like."""
    if not backends.are_named:
        return _describe(backends.first)
    each = {name: _describe(settings) for name, settings in backends.by_name.items()}
    described: dict[str, Any] = {
        "name": ", ".join(f"{name}: {model['name']}" for name, model in each.items())
    }
    if files := {name: model["files"] for name, model in each.items() if model.get("files")}:
        described["path"] = ", ".join(each[name]["path"] for name in files)
        described["files"] = files
    return described


def _describe(settings: BackendSettings) -> dict[str, Any]:
    described: dict[str, Any] = {"name": settings.model}
    if settings.model is None or not settings.is_launched or settings.kind == "fake":
        return described
    path = Path(settings.model).absolute()
    if not path.exists():
        return described | {"files": None}
    return described | {"path": str(path), "files": _fingerprint(path)}


def _fingerprint(path: Path) -> str:
    """Return a hash over the names and sizes of a model's files."""
    hashed = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        name = file.relative_to(path.parent)
        hidden = any(part.startswith(".") for part in name.parts[1:])  # a download's notes
        if not hidden and file.is_file():
            hashed.update(f"{os.fsencode(name).hex()} {file.stat().st_size}\n".encode())
    return hashed.hexdigest()
