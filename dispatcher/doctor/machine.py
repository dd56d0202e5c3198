"""This machine: Python, packages, limits, GPUs."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata

from dispatcher import __version__
from dispatcher.doctor.finding import Finding, ok, problem, warning
from dispatcher.taskmanager.backend.gpus import visible_gpus

_LEAST_PYTHON = (3, 11)
_NEEDED = (
    *("aiohttp", "uvloop", "msgspec", "PyYAML", "filelock", "openai"),
    *("prometheus_client", "rich"),
)
_OPTIONAL = ("vllm", "cryptography", "xllamacpp")
_ENOUGH_FILES = 4096
_SMI_S = 20.0
_SMI = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")


def check_versions() -> Finding:
    """Say which Python and packages there are."""
    check = "Python"
    has = {name: version for name in (*_NEEDED, *_OPTIONAL) if (version := _version(name))}
    packages = ", ".join(f"{name} {version}" for name, version in has.items())
    found = f"dispatcher {__version__}, Python {platform.python_version()}, {packages}"
    if sys.version_info < _LEAST_PYTHON:
        return problem(check, found, "dispatcher needs Python 3.11 or newer")
    if missing := [name for name in _NEEDED if name not in has]:
        return problem(check, found, f"install what is missing: pip install {' '.join(missing)}")
    return ok(check, found)


def check_open_files() -> Finding:
    """Say how many files, connections among them, a process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = hard == resource.RLIM_INFINITY
    most = "any number" if unlimited else f"{hard:,}"
    found = f"{soft:,} now, and {most} when a command asks for more (ulimit -n)"
    if unlimited or hard >= _ENOUGH_FILES:
        return ok("open files", found)
    return warning(
        "open files",
        found,
        "a server keeps that many connections at most: have the limit raised for many workers",
    )


def check_gpus(environ: Mapping[str, str], wanted: int) -> Finding:
    """Say which GPUs there are; `wanted` is how many the engines of this run need."""
    names = _gpu_names()
    shown = visible_gpus(environ)
    count = len(names) if shown is None else len(shown)
    found = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "none"
    if shown is not None:
        found += f"; the environment shows {len(shown)} of them"
    if count >= wanted:
        return ok("GPUs", found)
    said = f"{found}; this run's engines take {wanted}"
    if not names and shown is None:
        return warning("GPUs", said, "only a CPU build of vLLM works here")
    return problem("GPUs", said, "ask for more, or lower --tensor-parallel or --task-managers")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpu_names() -> list[str]:
    if (command := shutil.which(_SMI[0])) is None:
        return []
    try:
        asked = subprocess.run(
            [command, *_SMI[1:]],
            capture_output=True,
            text=True,
            timeout=_SMI_S,
            check=True,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in asked.stdout.splitlines() if line.strip()]
