"""Whether the run on disk is the one that a command means: its input, output, task and model.

Limits and time-outs may change from one start of a run to the next; these may not, since the
output would then hold answers to different questions.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dispatcher.config import RunSettings
from dispatcher.errors import StateError
from dispatcher.storage.inputs.opening import is_there
from dispatcher.storage.run_state import SPOOL_FILE

_SHOWN_CHARACTERS = 60
_ACCEPT = "--accept-changes goes on with it"
_MODEL = ("name",)
_TASK = ("spec", "class", "file", "sha256", "args")


def check_input(settings: RunSettings, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise StateError when the input's fingerprint is another one now.

    A run that began while its copy was made knows only what it was made of.
    """
    if "size" not in before and "original" in before:
        now = {key: part for key, part in now.items() if key not in _OF_COPY}
    if before == now:
        return
    copy = settings.state_dir / SPOOL_FILE
    if _is_of_copy(settings, before, now) and copy.exists():
        remedy = "restore it from a backup, or start a new run with another --outfile"
        if is_there(settings.infile):
            remedy = "remove it, and start the same command again, which makes it anew"
        raise StateError(
            f"{copy}, the copy of the input {settings.infile}, is not what this run began with; "
            f"{remedy}"
        )
    raise StateError(
        f"the input {settings.infile} is not the one this run began with: "
        f"{_input_change(before, now)} changed; restore it, or start a new run with another "
        "output"
    )


_OF_COPY = ("size", "head", "tail", "samples")
"""What is told of the file that is read by offset, which may be a copy."""


def _is_of_copy(settings: RunSettings, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Say whether a copy changed, and not what it was made of."""
    rest = [{k: v for k, v in each.items() if k not in _OF_COPY} for each in (before, now)]
    return rest[0] == rest[1] and ("original" in now or not is_there(settings.infile))


_PARTS = (
    ("name", "its name"),
    ("subset", "its subset"),
    ("split", "its split"),
    ("revision", "its revision"),
    ("files", "the number of its files"),
)


def _input_change(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return what of an input is another, in words."""
    if before.get("kind") != now.get("kind"):
        kinds = [fingerprint.get("kind", "plain lines") for fingerprint in (before, now)]
        return f"its kind ({kinds[0]} then, {kinds[1]} now)"
    # Of a copy, what it was made of tells more than the copy.
    old, new = before.get("original") or before, now.get("original") or now
    for name, words in _PARTS:
        if old.get(name) != new.get(name):
            return f"{words} ({old.get(name)} then, {new.get(name)} now)"
    if old.get("size") != new.get("size"):
        return f"its size ({old.get('size')} bytes then, {new.get('size')} now)"
    return "names or sizes of its files" if old.get("names") != new.get("names") else "its content"


def check_output(settings: RunSettings, before: str | None, written_bytes: int) -> None:
    """Raise StateError when the run writes to another file than this command names.

    One that was moved is recognised by what the run wrote to it; while that is nothing, a file
    with something in it is somebody else's.
    """
    now = settings.outfile
    if before is None or shown(now) == before or _is_same_file(Path(before), now):
        return
    is_empty = not now.exists() or now.stat().st_size == 0
    if Path(before).exists() or not (written_bytes or is_empty):
        raise StateError(
            f"the run in {settings.state_dir} writes to {before}, not to {now}; name that output, "
            "or give a new run another --state"
        )


def check_command(
    before: Mapping[str, Any] | None, now: Mapping[str, Any] | None, accept_changes: bool
) -> list[str]:
    """Compare task and model of two descriptions of a run's command (run_command.py).

    Return the changes that were accepted. Raises StateError that names a change which is not, or
    cannot be. What one of them does not say is not compared.
    """
    models = _section(before, "model", _MODEL), _section(now, "model", _MODEL)
    if all(models) and (change := _model_change(*models)):
        raise StateError(
            f"{change}; give the model that it began with, or start a new run with another output"
        )
    tasks = _section(before, "task", _TASK), _section(now, "task", _TASK)
    changes = _task_changes(*tasks) if all(tasks) else []
    if changes and not accept_changes:
        raise StateError(f"{'; '.join(changes)}; restore that, or {_ACCEPT}")
    return changes


def going_on(
    before: Mapping[str, Any] | None, now: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Return the description of the command that has the run now, with what it does not say."""
    if not before or not now:
        return dict(now or before or {}) or None
    return {key: before[key] for key in ("task", "model") if key in before} | dict(now)


def shown(path: Path) -> str:
    """Return a path as it stands in a text file: a name need not be UTF-8, but that must be."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _is_same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _section(
    command: Mapping[str, Any] | None, name: str, keys: tuple[str, ...]
) -> Mapping[str, Any]:
    found = (command or {}).get(name)
    whole = isinstance(found, Mapping) and all(key in found for key in keys)
    return found if isinstance(found, Mapping) and whole else {}


def _model_change(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    if old["name"] != new["name"]:
        return f"the model is {new['name']}, but this run began with {old['name']}"
    if "files" in old and "files" in new and old["files"] != new["files"]:
        where = new.get("path") or old.get("path")
        return (
            f"the model {where} is not the one this run began with: names or sizes of its files "
            "changed"
        )
    return None


def _task_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    changes = []
    if before["class"] != now["class"]:
        changes.append(f"the task is {now['spec']}, but this run began with {before['spec']}")
    elif before["sha256"] != now["sha256"]:
        where = now["file"] or now["spec"]
        changes.append(
            f"the task file {where} is not the one this run began with: its content changed"
        )
    elif before["sha256"] is None and before["spec"] != now["spec"]:
        changes.append(f"the task is {now['spec']}, but this run began with {before['spec']}")
    if changed := _changed_args(before["args"], now["args"]):
        changes.append(f"the task's arguments are not those this run began with: {changed}")
    return changes


def _changed_args(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    missing = object()
    changed = []
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name, missing), now.get(name, missing)
        if old is missing:
            changed.append(f"{name} is new")
        elif new is missing:
            changed.append(f"{name} is gone")
        elif old != new and _text(old) != _text(new):  # .nan is not equal to itself
            changed.append(f"{name} is {_short(new)} and was {_short(old)}")
    return ", ".join(changed)


def _text(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1 << 30, sort_keys=False)
    return text.removesuffix("...\n").strip()


def _short(value: Any) -> str:
    text = _text(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
