"""The settings of a run as others may see them: what looks like a secret is left out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "hidden"
_SECRET_NAME = re.compile(
    r"key|token|secret|passw|credential|auth|bearer|cookie|signature|private", re.IGNORECASE
)
# Numbers of tokens are none, and the name of a variable is no value of it.
_NO_SECRET = re.compile(
    r"(max|min|num|n|completion|prompt)_\w*tokens\w*|api_key_env|\w*tokenizer\w*"
)
_SECRET_VALUE = re.compile(
    r"(?:sk|pk|hf|gsk|csk|ghp|xox[abp])[-_][A-Za-z0-9_-]{8,}"  # as providers make them
    r"|://[^/\s]*:[^/\s]*@"  # a password in a URL
    r"|\b(?=\w*[0-9])(?=\w*[A-Za-z])\w{28,}"  # long, of letters and digits mixed
)
_SECRET_OPTION = re.compile(
    r"(--?[\w-]*(?:key|token|secret|passw|auth)[\w-]*)([= ]+)('[^']*'|\"[^\"]*\"|\S+)",
    re.IGNORECASE,
)
_LONGEST = 400


def shown_settings(run_file: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a page may show of run.yaml: how the run was started, and its limits.

    Options that nobody gave are left out. A name or a value that looks like a secret's is shown
    as hidden; one too many costs little.
    """
    command = _part(run_file, "command")
    task = _part(command, "task")
    options = {k: v for k, v in _part(command, "options").items() if v not in (None, "", [], False)}
    return {
        "version": run_file.get("version"),
        "started_at": run_file.get("started_at"),
        "program": command.get("program"),
        "directory": command.get("directory"),
        "files": {k: v for k, v in _part(run_file, "settings").items() if k in _FILES},
        "limits": {k: v for k, v in _part(run_file, "settings").items() if k not in _FILES},
        "task": {k: _shown(k, v) for k, v in task.items() if k in ("spec", "class")},
        "task_args": {str(k): _shown(str(k), v) for k, v in _part(task, "args").items()},
        "model": {k: _shown(k, v) for k, v in _part(command, "model").items()},
        "options": {
            k: _shown(k, v) for k, v in options.items() if k not in ("task_arg", "task_args")
        },
        "versions": dict(_part(command, "versions")),
    }


_FILES = ("input", "output", "state")


def _part(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = content.get(name)
    return part if isinstance(part, Mapping) else {}


def _shown(name: str, value: Any) -> Any:
    if _SECRET_NAME.search(name) and not _NO_SECRET.fullmatch(name):
        return HIDDEN
    if isinstance(value, Mapping):
        return {str(key): _shown(str(key), part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_shown("", part) for part in value]
    if not isinstance(value, str):
        return value
    value = _SECRET_OPTION.sub(rf"\1\2{HIDDEN}", value)
    is_path = value.startswith(("/", "./", "~")) and "://" not in value
    if not is_path and _SECRET_VALUE.search(value):
        return HIDDEN
    return value if len(value) <= _LONGEST else value[: _LONGEST - 1] + "…"
