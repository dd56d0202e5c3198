"""From what a task yields to what is sent: path, model, defaults, streaming."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

CHAT = "/chat/completions"
COMPLETION = "/completions"
EMBEDDINGS = "/embeddings"


@dataclass(frozen=True, slots=True)
class Sending:
    """How requests for one model are sent, where they do not say so themselves.

    `generation` are fields of a chat request (`max_completion_tokens`, `temperature`, ...) that
    are filled in. `names` are what a task may call this model; the server gets its real name.
    """

    stream: bool = False
    generation: Mapping[str, Any] = field(default_factory=dict)
    names: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Call:
    """One request as it goes out."""

    path: str
    body: bytes
    model: str | None
    streamed: bool


def prepare(content: Any, model: str | None, sending: Sending) -> Call:
    """Return the call for a request's content; `model` is the name where it has none.

    Raises ValueError, TypeError or RecursionError when it cannot be sent.
    """
    if not isinstance(content, dict):
        raise TypeError(f"its content is {type(content).__name__}, not a dict")
    path = _path_of(content)
    asked = content.get("model", model)
    if asked in sending.names:
        asked = model
    added = _defaults(content, path, sending.generation) if sending.generation else {}
    if asked is not None and asked != content.get("model"):
        added["model"] = asked
    streamed = bool(content.get("stream", sending.stream)) and path != EMBEDDINGS
    if streamed:
        options = content.get("stream_options")
        kept = options if isinstance(options, dict) else {}
        added |= {"stream": True, "stream_options": {"include_usage": True, **kept}}
    if added:
        content = {**content, **added}
    return Call(path, msgspec.json.encode(content), asked, streamed)


def _path_of(content: Mapping[str, Any]) -> str:
    if "messages" in content:
        return CHAT
    if "prompt" in content:
        return COMPLETION
    if "input" in content:
        return EMBEDDINGS
    raise ValueError("it has neither `messages` (chat), `prompt` (completion) nor `input`")


def _defaults(
    content: Mapping[str, Any], path: str, generation: Mapping[str, Any]
) -> dict[str, Any]:
    if path == EMBEDDINGS:
        return {}
    added = {key: value for key, value in generation.items() if key not in content}
    limit = added.pop("max_completion_tokens", None)
    if limit is not None and "max_tokens" not in content:
        # The older call has no other name for it.
        added["max_completion_tokens" if path == CHAT else "max_tokens"] = limit
    return added
