"""A preview as text: for each line a block, with what belongs together side by side.

line 0      ok: 1 request, 21 tokens in, 40 out, 0.41 s
  input     {"id": "code-03", "messages": ...}
  request 1 max_tokens=64 temperature=0
    user    What does this code print, and why? … (+67 characters)
  response  stop, 21 tokens in, 40 out, 0.41 s
            The code prints ...
  result    {"response": "The code prints ..."} and 3 fields of the input
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeGuard

from dispatcher.preview.record import Exchange, LineRecord, parsed

SHOWN_CHARACTERS = 400
_LABEL_WIDTH = 14
_TURNING = frozenset(
    map(chr, (*range(0x200E, 0x2010), *range(0x202A, 0x202F), *range(0x2066, 0x206A)))
)
"""They change the order in which a terminal shows what follows."""


class Row(NamedTuple):
    """A label at its indentation, and a text beside it; `style` is one of rich's."""

    indent: int
    label: str
    text: str
    style: str = ""

    def lines(self) -> list[str]:
        """Return it as lines of text, further ones below the first one's text."""
        first, *more = self.text.split("\n")
        label = " " * self.indent + self.label
        head = (
            f"{label:<{_LABEL_WIDTH}}{first}" if len(label) < _LABEL_WIDTH else f"{label} {first}"
        )
        return [head.rstrip(), *((" " * _LABEL_WIDTH + line).rstrip() for line in more)]


class Writer:
    """Turns records into rows. Texts longer than `shown` characters are cut; None cuts none."""

    def __init__(self, shown: int | None = SHOWN_CHARACTERS) -> None:
        self._shown = shown

    def block(self, record: LineRecord) -> list[Row]:
        """Return what became of one line."""
        error = record.error
        how = "ok" if error is None else f"ERROR {printable(str(error.get('error')))}"
        rows = [
            Row(
                0,
                f"line {record.work_id}",
                f"{how}: {_figures(record.exchanges, record.seconds)}",
                "bold green" if error is None else "bold red",
            ),
            Row(2, "input", self._cut(record.text)),
        ]
        many = len(record.exchanges) > 1
        tries = len({exchange.attempt for exchange in record.exchanges}) > 1
        for number, exchange in enumerate(record.exchanges, 1):
            rows += self._exchange(exchange, f" {number}" if many else "", tries=tries)
        rows += [Row(2, "note", self._cut(note), "yellow") for note in record.notes]
        return [*rows, *self._end(record, error)]

    def _exchange(self, exchange: Exchange, number: str, *, tries: bool) -> Iterator[Row]:
        content = dict(exchange.request.content)
        messages = content.pop("messages", None)
        prompt = content.pop("prompt", None)
        embedded = content.pop("input", None)
        options = [f"{printable(str(k))}={self._value(v)}" for k, v in content.items()]
        if tries:
            options.insert(0, f"(attempt {exchange.attempt})")
        yield Row(2, f"request{number}", " ".join(options), "cyan")
        if messages is not None:
            yield from self._messages(messages)
        for name, value in (("prompt", prompt), ("input", embedded)):
            if value is not None:
                yield Row(4, name, self._value(value))
        yield from self._response(exchange, number)

    def _messages(self, messages: Any) -> Iterator[Row]:
        for message in messages if _is_list(messages) else [messages]:
            if not isinstance(message, dict):
                yield Row(4, "message", self._value(message))
                continue
            extra = {k: v for k, v in message.items() if k not in ("role", "content")}
            if "content" in message or not extra:
                role = printable(str(message.get("role", "message")))
                yield Row(4, role, self._value(message.get("content")))
            for key, value in extra.items():
                yield Row(4, printable(str(key)), self._value(value))

    def _response(self, exchange: Exchange, number: str) -> Iterator[Row]:
        response = exchange.response
        label, asked = f"response{number}", _figures([exchange], exchange.seconds, count=False)
        if not response.is_success:
            yield Row(2, label, f"{asked}: {self._value(response.error)}", "red")
            return
        content = response.content if isinstance(response.content, dict) else {}
        given = content.get("choices")
        choices = [each for each in given if isinstance(each, dict)] if _is_list(given) else []
        if not choices:
            vectors = content.get("data")
            what = f"{len(vectors)} embeddings" if _is_list(vectors) else "no choices"
            yield Row(2, label, f"{what}, {asked}", "cyan")
            return
        for place, choice in enumerate(choices):
            reason = printable(str(choice.get("finish_reason") or "no finish reason"))
            # A text that was cut for its length is the commonest surprise.
            style = "yellow" if reason == "length" else "cyan"
            yield Row(2, label, f"{reason}, {asked}" if not place else reason, style)
            yield from self._choice(choice)

    def _choice(self, choice: dict[str, Any]) -> Iterator[Row]:
        message = choice.get("message")
        said = message if isinstance(message, dict) else {"content": choice.get("text")}
        for name in ("reasoning_content", "reasoning"):
            if said.get(name):
                yield Row(4, "thinking", self._value(said[name]))
        if said.get("content") is not None:
            yield Row(4, "", self._value(said["content"]))
        if said.get("tool_calls"):
            yield Row(4, "tools", self._value(said["tool_calls"]))

    def _end(self, record: LineRecord, error: dict[str, Any] | None) -> Iterator[Row]:
        if error is not None:
            where = f" at {error['place']}" if error.get("place") else ""
            said = error.get("message") or error.get("error")
            yield Row(2, "error", self._cut(f"{said}{where}"), "red")
            return
        value, line = parsed(record.result), parsed(record.text)
        if not isinstance(value, dict) or not isinstance(line, dict) or self._shown is None:
            yield Row(2, "result", self._cut(record.result), "green")
            return
        same = [key for key in value if key in line and line[key] == value[key]]
        new = {key: part for key, part in value.items() if key not in same}
        kept = f" and {_many(len(same), 'field')} of the input as it was" if same else ""
        yield Row(2, "result", self._value(new) + kept, "green")

    def _value(self, value: Any) -> str:
        return self._cut(value if isinstance(value, str) else _dump(value))

    def _cut(self, text: str) -> str:
        if self._shown is not None and len(text) > self._shown:
            return printable(text[: self._shown]) + f" … (+{len(text) - self._shown:,} characters)"
        return printable(text)


def summary(records: Sequence[LineRecord], lines_in_all: float, *, is_exact: bool) -> list[str]:
    """Return what the previewed lines come to, and what as many as the input has would."""
    failed = [error for record in records if (error := record.error) is not None]
    exchanges = [exchange for record in records for exchange in record.exchanges]
    kinds: dict[str, int] = {}
    for error in failed:
        kind = printable(str(error.get("error")))
        kinds[kind] = kinds.get(kind, 0) + 1
    said = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
    how = f"{len(failed)} with errors ({said})" if failed else "none with an error"
    seconds = sum(exchange.seconds for exchange in exchanges)
    lines = [f"{_many(len(records), 'line')}, {how}; {_figures(exchanges, seconds)} of requests"]
    if records and lines_in_all > len(records):
        each = lines_in_all / len(records)
        tokens = [sum(exchange.tokens[way] for exchange in exchanges) * each for way in (0, 1)]
        size = sum(len(record.result.encode("utf-8", "replace")) + 1 for record in records)
        lines += [
            f"the whole input, {'' if is_exact else 'about '}{lines_in_all:,.0f} lines, comes at "
            f"this rate to {len(exchanges) * each:,.0f} requests, {tokens[0]:,.0f} tokens in, "
            f"{tokens[1]:,.0f} out, {size * each / 2**20:,.1f} MiB of output "
            f"(dispatcher doctor --expect-bytes-per-line {math.ceil(size / len(records))})"
        ]
    return lines


def printable(text: str) -> str:
    """Return a text in which nothing moves a terminal's cursor or turns its text around."""
    return "".join(f"\\u{ord(c):04x}" if _is_harmful(c) else c for c in text)


def _is_harmful(character: str) -> bool:
    is_control = unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
    return is_control or character in _TURNING


def _figures(exchanges: Sequence[Exchange], seconds: float, *, count: bool = True) -> str:
    tokens_in = sum(exchange.tokens[0] for exchange in exchanges)
    tokens_out = sum(exchange.tokens[1] for exchange in exchanges)
    parts = [_many(len(exchanges), "request")] if count else []
    if tokens_in or tokens_out:
        parts += [f"{tokens_in} tokens in, {tokens_out} out"]
    return ", ".join([*parts, f"{seconds:.2f} s"])


def _is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _dump(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return repr(value)
