"""From flags and YAML sections to checked settings; what is wrong is told in one sentence."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from dispatcher.errors import UsageError
from dispatcher.taskmanager.backend.settings import (
    AUTO,
    DEFAULT_KIND,
    DEFAULT_LOCAL_WORKERS,
    DEFAULT_MODELS,
    DEFAULT_WORKERS,
    HOSTED,
    KINDS,
    MOST_WORKERS,
    NESTED,
    SECTIONS,
    Backends,
    BackendSettings,
    HostedSettings,
    Settings,
    Text,
)

_LIMITS = {"max_concurrent_requests", "min_concurrent_requests", "recover_threshold"}
_Kind = TypeVar("_Kind", bound=Settings)


class _Model(Settings, frozen=True, kw_only=True):
    """One of the models that are used at one endpoint."""

    name: Text
    concurrency: dict[str, Any] = msgspec.field(default_factory=dict)
    generation: dict[str, Any] = msgspec.field(default_factory=dict)


def backends_of(args: argparse.Namespace, environ: Mapping[str, str]) -> Backends:
    """Return the backends that the options and sections of a command describe.

    Where a hosted one names no address, the one of its variable in `environ` is filled in. Raises
    UsageError, one sentence that names the place, for what cannot work.
    """
    sections = {name: getattr(args, name, None) for name in SECTIONS}
    source = _source_of(args)
    for name in NESTED:
        _convert(_mapping(sections[name], source, name), NESTED[name], source, name)
    if sections["backends"] is not None:
        _refuse_beside_backends(args, sections, source)
        found = _read_named(args, sections, source)
        return Backends(_with_addresses(found, environ), are_named=True)
    kind = args.backend or DEFAULT_KIND
    if sections["models_to_run"] is not None:
        found = _read_models(args, kind, sections, source)
        return Backends(_with_addresses(found, environ), are_named=True)
    raw = _from_flags(args, kind)
    if "model" not in raw and kind in DEFAULT_MODELS:
        raw["model"] = DEFAULT_MODELS[kind]
    if "model" not in raw and not (kind == DEFAULT_KIND and args.no_launch):
        raise UsageError(f"--backend {kind} needs --model NAME")
    settings = _build(kind, {}, raw, sections, source, "")
    return Backends(_with_addresses({settings.model or kind: settings}, environ), are_named=False)


# -------------------------------------------------------------------- from flags and sections


def _from_flags(args: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Return the options that are about a backend of this kind."""
    if args.no_launch and kind != DEFAULT_KIND:
        instead = "; give its address with --base-url" if kind in HOSTED else ""
        raise UsageError(f"--no-launch does not go with --backend {kind}{instead}")
    if args.base_url and kind not in HOSTED:
        raise UsageError(
            f"--base-url goes with --backend {' or '.join(HOSTED)}, not with --backend {kind}"
        )
    names = {*KINDS[kind].__struct_fields__, "request_timeout"} - set(NESTED)
    raw = {name: value for name in names if (value := getattr(args, name, None)) not in (None, [])}
    if isinstance(raw.get("base_url"), list):
        raw["base_url"] = tuple(raw["base_url"])
    return raw


def _read_named(
    args: argparse.Namespace, sections: Mapping[str, Any], source: str
) -> dict[str, BackendSettings]:
    entries = _mapping(sections["backends"], source, "backends")
    if not entries:
        raise UsageError(f"{source}: backends names none; give `NAME: {{kind: ..., model: ...}}`")
    found: dict[str, BackendSettings] = {}
    for name, entry in entries.items():
        place = f"backends.{name}"
        given = dict(_mapping(entry, source, place))
        kind = given.pop("kind", None)
        if not isinstance(kind, str) or kind not in KINDS:
            said = "kind is missing" if kind is None else f"kind is {kind!r}"
            raise UsageError(f"{source}: {place}: {said}, but must be one of {', '.join(KINDS)}")
        # What the flags say in general; those about one server were refused.
        general = _from_flags(args, kind)
        if "model" not in given and kind in DEFAULT_MODELS:
            given["model"] = DEFAULT_MODELS[kind]
        if "model" not in given and not given.get("no_launch"):
            raise UsageError(f"{source}: {place}: model is missing; name the model it serves")
        found[str(name)] = _build(kind, given, general, sections, source, place)
    return found


def _read_models(
    args: argparse.Namespace, kind: str, sections: Mapping[str, Any], source: str
) -> dict[str, BackendSettings]:
    if kind not in HOSTED:
        raise UsageError(
            f"{source}: models_to_run lists models of a hosted endpoint (--backend "
            f"{' or '.join(HOSTED)}), not of --backend {kind}; name several servers in `backends`"
        )
    if args.model is not None:
        raise UsageError(
            f"{source}: --model does not go with models_to_run, whose first model is the default"
        )
    entries = sections["models_to_run"]
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{source}: models_to_run must be a list of models, each with its `name`")
    general = _from_flags(args, kind)
    found: dict[str, BackendSettings] = {}
    for number, entry in enumerate(entries):
        place = f"models_to_run[{number}]"
        model = _convert(_mapping(entry, source, place), _Model, source, place)
        if model.name in found:
            raise UsageError(f"{source}: {place}: {model.name} is listed twice")
        given = {"model": model.name}
        given |= {key: value for key in ("concurrency", "generation") if (value := entry.get(key))}
        found[model.name] = _build(kind, given, general, sections, source, place)
    return found


def _refuse_beside_backends(
    args: argparse.Namespace, sections: Mapping[str, Any], source: str
) -> None:
    """Refuse what is about one server where several are named."""
    if sections["models_to_run"] is not None:
        raise UsageError(
            f"{source}: models_to_run does not go with backends; give each model a name there"
        )
    about_one = ("backend", "model", "base_url", "api_key_env", "no_launch")
    given = [f"--{name.replace('_', '-')}" for name in about_one if getattr(args, name)]
    if given:
        raise UsageError(
            f"{source}: {' and '.join(given)} cannot go with the section backends, which says "
            "that for each of them; give one or the other"
        )


def _build(
    kind: str,
    given: Mapping[str, Any],
    general: Mapping[str, Any],
    sections: Mapping[str, Any],
    source: str,
    place: str,
) -> BackendSettings:
    """Build one backend's settings: what is `given` for it, over flags, over global sections."""
    raw = {**general, **given}
    own = {name: _mapping(given.get(name), source, f"{place}.{name}") for name in NESTED}
    for name in NESTED:
        raw[name] = {**_mapping(sections[name], source, name), **own[name]}
    if (timeout := raw.pop("request_timeout", None)) is not None:
        # The flag wins over the section for all, and is outdone by the backend's own.
        raw["load_monitoring"] |= {"request_timeout": timeout, **own["load_monitoring"]}
    _refuse_meaningless(KINDS[kind], own, source, place)
    fixed = given.get("workers", AUTO) != AUTO
    if fixed and (both := _LIMITS & own["concurrency"].keys()):
        raise UsageError(
            f"{source}: {place}: workers {given['workers']} fixes the requests in flight, so that "
            f"concurrency.{min(both)} has no meaning; leave one of them out"
        )
    if "workers" not in raw:
        raw["workers"] = _default_workers(kind, raw["concurrency"])
    raw["concurrency"] = {
        "max_concurrent_requests": KINDS[kind].most_concurrent,
        **raw["concurrency"],
    }
    if raw["workers"] == AUTO and not KINDS[kind].can_adapt:
        raise UsageError(
            f"{f'{source}: {place}: ' if place else '--'}workers auto does not go with {kind}, "
            "which cannot tell its load; give a number"
        )
    return _convert(raw, KINDS[kind], source, place)


def _refuse_meaningless(
    kind: type[BackendSettings], own: Mapping[str, Mapping[str, Any]], source: str, place: str
) -> None:
    """Refuse what is said for this backend and is only looked at where a limit is felt for."""
    felt = {
        "concurrency": ("min_concurrent_requests", "recover_threshold"),
        "load_monitoring": ("ttft_threshold",),
    }
    for section, keys in felt.items():
        for key in keys:
            if kind.tells_load and key in own[section]:
                raise UsageError(
                    f"{source}: {place}.{section}.{key} has no meaning for kind {kind.kind}, whose "
                    "own figures tell how many requests it bears; leave it out"
                )


def _default_workers(kind: str, concurrency: Mapping[str, Any]) -> Any:
    if kind in ("vllm", "cerebras"):
        return AUTO
    if kind == "openai" and _LIMITS & concurrency.keys():
        return AUTO
    default = DEFAULT_LOCAL_WORKERS if kind == "local" else DEFAULT_WORKERS
    return concurrency.get("max_concurrent_requests", default)


def _with_addresses(
    found: Mapping[str, BackendSettings], environ: Mapping[str, str]
) -> dict[str, BackendSettings]:
    """Fill in the addresses that a variable or the kind gives."""
    filled = dict(found)
    for name, settings in found.items():
        if isinstance(settings, HostedSettings) and settings.base_url is None:
            url = environ.get(settings.url_variable) or settings.default_url
            filled[name] = msgspec.structs.replace(settings, base_url=url)
    return filled


# -------------------------------------------------------------------- what is wrong, in a sentence


def _source_of(args: argparse.Namespace) -> str:
    """Name the file in which the sections stand."""
    if getattr(args, "config", None) is not None:
        return f"--config {args.config}"
    resumed = getattr(args, "resume", None)
    return f"run.yaml of {resumed}" if resumed is not None else "the command"


def _mapping(value: object, source: str, place: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UsageError(f"{source}: {place} must hold `key: value` lines, not {value!r}")
    return {str(key): part for key, part in value.items()}


def _convert(raw: Mapping[str, Any], kind: type[_Kind], source: str, place: str) -> _Kind:
    try:
        return msgspec.convert(dict(raw), kind)
    except msgspec.ValidationError as error:
        raise UsageError(f"{source}: {_sentence(str(error), kind, place)}") from error


def _sentence(said: str, kind: type[Settings], place: str) -> str:
    """Return what msgspec says about a value, with its place and, for a key, the known ones."""
    match = re.fullmatch(r"(.*?)(?: - at `\$\.?(.*)`)?", said, re.DOTALL)
    assert match is not None
    problem, inner = match[1], match[2] or ""
    where = ".".join(part for part in (place, inner) if part)
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", problem, re.DOTALL):
        holder = NESTED.get(inner, kind)
        known = list(holder.__struct_fields__)
        if issubclass(holder, BackendSettings):
            known = ["kind", *known]
        problem = f"unknown key {unknown[1]!r}; known there: {', '.join(known)}"
    elif inner == "workers":
        problem = f"must be auto or a whole number from 1 to {MOST_WORKERS}"
    else:
        problem = problem[0].lower() + problem[1:]
    return f"{where}: {problem}" if where else problem
