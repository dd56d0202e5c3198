"""From a streamed answer to the answer that the same call gives when it does not stream.

A stream is server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html):
lines `data: {...}`, a blank line behind each event, `data: [DONE]` at the end. Every event is a
chunk of the answer; OpenAI, vLLM and Cerebras differ in what they put beside the text, so what is
not known here is kept by its type:

    in a message    texts are joined, but for NAMES, which are sent whole; lists grow, where entries
                    with an `index` are parts of one entry; objects are merged by the same rules
    in a choice     lists grow, of logprobs too; of anything else the last one stays
    beside them     the last one stays (id, model, usage, system_fingerprint, time_info, ...)

Nothing (null, empty) never takes the place of something; a text that turns into an object is
refused, because one of them would be lost.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Final

import msgspec

__all__ = ["DONE", "AnswerBuilder", "EventParser", "StreamError"]

Chunk = dict[str, Any]

# Texts that come whole, by some servers with every chunk.
NAMES = frozenset(("role", "id", "type", "name"))
# Beside any of these a message that says nothing has, unstreamed, no content; vLLM and OpenAI
# stream an empty one at the beginning all the same.
_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "refusal", "reasoning", "reasoning_content")
_QUOTED_BYTES = 200

_decode = msgspec.json.Decoder().decode


class _End(Enum):
    DONE = "[DONE]"


DONE: Final = _End.DONE


class StreamError(Exception):
    """The server ended the answer with an error, or sent what is no answer.

    `status` is the HTTP status it would have sent had the answer not begun, None if it did not say.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class EventParser:
    """Cuts bytes, however the network delivers them, into events."""

    def __init__(self) -> None:
        self._unfinished: list[bytes] = []  # pieces of the last line
        self._after_cr = False  # a "\n" that comes now belongs to the line before
        self._data: list[bytes] = []  # the `data` lines of the event that is being read

    def feed(self, data: bytes) -> list[Chunk | _End]:
        """Return the events that these bytes complete. Raises StreamError for one without JSON."""
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
            self._after_cr = False
        if not data:
            return []
        self._after_cr = data.endswith(b"\r")
        lines = data.splitlines()
        unfinished = None if data.endswith((b"\n", b"\r")) else lines.pop()
        if lines and self._unfinished:
            lines[0] = b"".join((*self._unfinished, lines[0]))
            self._unfinished.clear()
        if unfinished is not None:
            self._unfinished.append(unfinished)
        events: list[Chunk | _End] = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line.startswith(b" ", 5) else line[5:])
            elif not line and self._data:
                events.append(_event(b"\n".join(self._data)))
                self._data.clear()
            # Else a comment, that keeps the connection alive, or a field that no server needs.
        return events


def _event(data: bytes) -> Chunk | _End:
    if data.startswith(b"[DONE]"):
        return DONE
    try:
        chunk = _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        chunk = None
    if not isinstance(chunk, dict):
        text = data[:_QUOTED_BYTES].decode("utf-8", "replace")
        raise StreamError(f"the server streamed what is no answer: {text!r}")
    return chunk


class AnswerBuilder:
    """Puts the chunks of one answer together; they must not be used again elsewhere.

    `has_token` is True from the first chunk on that carries content, reasoning or a tool call.
    """

    def __init__(self) -> None:
        self.has_token = False
        self._head: dict[str, Any] = {}
        self._choices: dict[int, _Choice] = {}

    def add(self, chunk: Chunk) -> None:
        """Take in the next chunk. Raises StreamError if it is an error, or no chunk."""
        if chunk.get("error") or chunk.get("object") == "error":
            raise _error_in(chunk)
        head = self._head
        try:
            for key, value in chunk.items():
                if key == "choices":
                    for part in value or ():
                        self._add_choice(part)
                elif value or value == 0 or key not in head:
                    head[key] = value
        except (AttributeError, TypeError, RecursionError) as exc:  # values of unexpected types
            raise StreamError(f"the server streamed what is no answer: {exc}") from exc

    def _add_choice(self, part: dict[str, Any]) -> None:
        index = part.get("index") or 0
        choice = self._choices.get(index)
        if choice is None:
            if not isinstance(index, int):
                raise TypeError(f"the index of a choice is {index!r}")
            choice = self._choices[index] = _Choice(index)
        choice.add(part)
        if not self.has_token:
            delta = part.get("delta") or {}
            self.has_token = bool(part.get("text")) or any(
                value for key, value in delta.items() if key != "role"
            )

    @property
    def is_complete(self) -> bool:
        """True when every choice that began has its finish_reason; a usage may still come."""
        return bool(self._choices) and all(
            choice.rest.get("finish_reason") for choice in self._choices.values()
        )

    def answer(self) -> dict[str, Any]:
        """Return the whole answer; call it once. Raises StreamError when nothing was streamed."""
        head = self._head
        if not head and not self._choices:
            raise StreamError("the server ended the stream before it said anything")
        head.pop("obfuscation", None)  # random padding, against eavesdroppers, of each chunk
        usage = {"usage": head.pop("usage")} if "usage" in head else {}
        if isinstance(kind := head.get("object"), str):
            head["object"] = kind.removesuffix(".chunk")
        choices = [self._choices[index].whole() for index in sorted(self._choices)]
        return {**head, "choices": choices, **usage}


class _Choice:
    def __init__(self, index: int) -> None:
        self._index = index
        self._message: dict[str, Any] | None = None
        self._text: list[str] | None = None
        self.rest: dict[str, Any] = {}

    def add(self, part: dict[str, Any]) -> None:
        rest = self.rest
        for key, value in part.items():
            if key == "delta":
                if self._message is None:
                    self._message = {}
                if value:
                    _merge(self._message, value)
            elif key == "text":
                if self._text is None:
                    self._text = []
                self._text.append(value or "")
            elif key == "logprobs" and value and rest.get(key):
                _extend(rest[key], value)
            else:
                _set_or_extend(rest, key, value)

    def whole(self) -> dict[str, Any]:
        rest = self.rest
        rest.pop("index", None)
        choice: dict[str, Any] = {"index": self._index}
        if self._text is not None:
            choice["text"] = "".join(self._text)
        if self._message is not None:
            choice["message"] = _message(self._message)
        return {**choice, **rest}


def _message(message: dict[str, Any]) -> dict[str, Any]:
    role, content = message.pop("role", "assistant"), message.pop("content", None)
    whole = {"role": role, "content": _whole(content), **_whole(message)}
    if not whole["content"] and any(whole.get(key) for key in _INSTEAD_OF_CONTENT):
        whole["content"] = None
    if "tool_calls" in whole:
        calls = whole["tool_calls"] or ()
        for call in calls:
            if isinstance(call, dict):
                call.pop("index", None)  # only parts have one
        if not calls:
            del whole["tool_calls"]
    return whole


class _Text(list[str]):
    """The pieces of a text: joined once, because a long answer has a hundred thousand."""


def _merge(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Add a part of a message to what is there of it. Raises TypeError when they do not fit."""
    for key, value in part.items():
        known = whole.get(key)
        if isinstance(value, str) and key not in NAMES:
            if isinstance(known, _Text):
                known.append(value)
            elif value or not known:
                whole[key] = _fitting(known, _Text, key)
                whole[key].append(value)
        elif isinstance(value, list):
            whole[key] = entries = _fitting(known, list, key)
            _merge_entries(entries, value)
        elif isinstance(value, dict):
            whole[key] = known = _fitting(known, dict, key)
            _merge(known, value)
        elif value or value == 0 or key not in whole:
            whole[key] = value


def _fitting(known: Any, kind: type, key: str) -> Any:
    """Return what is known, or an empty one if that is nothing yet."""
    if type(known) is kind:
        return known
    if known and any(known):  # an empty text has pieces, too
        raise TypeError(f"{key!r} changes its type")
    return kind()


def _merge_entries(entries: list[Any], parts: list[Any]) -> None:
    """Add parts to the entries with their index; a part without one is an entry of its own,
    unless it is a part of a tool call whose beginning, with its id, is the last entry.
    """
    for part in parts:
        if not isinstance(part, dict):
            entries.append(part)
            continue
        index = part.get("index")
        if index is not None:
            entry = next((e for e in entries if e.get("index") == index), None)
        elif "function" in part and not part.get("id") and entries:
            entry = entries[-1]
        else:
            entry = None
        if entry is None:
            entry = {}
            entries.append(entry)
        _merge(entry, part)


def _extend(whole: dict[str, Any], part: dict[str, Any]) -> None:
    for key, value in part.items():
        _set_or_extend(whole, key, value)


def _set_or_extend(whole: dict[str, Any], key: str, value: Any) -> None:
    """Keep the value, behind what is there if both are lists, else in its place."""
    known = whole.get(key)
    if isinstance(known, list) and isinstance(value, list):
        known.extend(value)
    elif value or value == 0 or key not in whole:
        whole[key] = value


def _whole(value: Any) -> Any:
    """Join the texts in a message."""
    if isinstance(value, _Text):
        return "".join(value)
    if isinstance(value, dict):
        return {key: _whole(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return value


def _error_in(chunk: Chunk) -> StreamError:
    """Read `{"error": {...}}`, `{"error": "text"}` or vLLM's older `{"object": "error", ...}`."""
    error = chunk.get("error") or chunk
    if not isinstance(error, dict):
        return StreamError(str(error))
    message = error.get("message") or error.get("type") or "an error without a message"
    for code in (error.get("code"), error.get("status"), chunk.get("status_code")):
        text = str(code)
        if text.isascii() and text.isdigit() and 400 <= int(text[:9]) < 600:
            return StreamError(str(message), int(text))
    return StreamError(str(message))
