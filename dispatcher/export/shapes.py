"""Which columns a file of JSON objects has: what each value is, and what it is all in all.

A place (a key, an item of a list) where values are of one kind has that type; whole numbers and
others together are floating-point numbers as long as that loses no digit. Where kinds mix, where
objects have no key or very many, where they or lists are nested deeply, and where a number fits
nothing, the values are kept as JSON text. null fits everywhere, and so does a key that is not
there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from dispatcher.storage.inputs.rows import JSON_TEXT

Convert = Callable[[Any], Any]

MOST_KEYS = 1000
"""Keys of an object within a row, beyond which it is JSON text: they are data, not columns."""

# Readers of Parquet have limits of their own, beyond which they refuse the whole file.
_MOST_DEPTH = 16
_EXACT_FLOATS = 1 << 53
_NAMES: Mapping[type, str] = {
    bool: "truth values",
    int: "whole numbers",
    float: "numbers",
    str: "text",
    list: "lists",
    dict: "objects",
}
_encode = msgspec.json.encode


@dataclass(slots=True)
class Shape:
    """What the values of one place were so far.

    `least` and `most` bound the whole numbers, `fields` are an object's keys, `items` is what a
    list holds. With `is_json` the values are kept as JSON text, whatever they are.
    """

    depth: int = 0
    kinds: set[type] = field(default_factory=set)
    least: int = 0
    most: int = 0
    fields: dict[str, Shape] = field(default_factory=dict)
    items: Shape | None = None
    is_json: bool = False

    def note(self, value: Any) -> None:
        """See one more value."""
        if value is None or self.is_json:
            return
        kind = type(value)
        self.kinds.add(kind)
        if kind is int:
            self.least = min(self.least, value)
            self.most = max(self.most, value)
        elif kind is dict:
            self._note_object(value)
        elif kind is list:
            self._note_list(value)
        if len(self.kinds) > 1 and not self.kinds <= {int, float}:
            self._give_up()

    def _note_list(self, value: list[Any]) -> None:
        if self.depth >= _MOST_DEPTH:
            self._give_up()
            return
        if self.items is None:
            self.items = Shape(self.depth + 1)
        for item in value:
            self.items.note(item)

    def _note_object(self, value: dict[str, Any]) -> None:
        if self.depth >= _MOST_DEPTH:
            self._give_up()
            return
        for key, part in value.items():
            if (shape := self.fields.get(key)) is None:
                shape = self.fields[key] = Shape(self.depth + 1)
            shape.note(part)
        if self.depth and len(self.fields) > MOST_KEYS:
            self._give_up()

    def _give_up(self) -> None:
        self.is_json, self.fields, self.items = True, {}, None

    def settle(self) -> None:
        """Decide, once all values were seen, which places are JSON text."""
        if self.kinds == {dict} and not self.fields:
            self._give_up()  # Parquet has no struct without a field
        if int in self.kinds and not self.is_json:
            if float in self.kinds:
                self.is_json = max(self.most, -self.least) > _EXACT_FLOATS
            else:
                is_signed = self.least >= -1 << 63 and self.most < 1 << 63
                self.is_json = not (is_signed or (self.least >= 0 and self.most < 1 << 64))
        for shape in self._inner():
            shape.settle()

    def mixed(self, name: str = "") -> Iterator[str]:
        """Yield, for people, each place that is JSON text, and what it holds."""
        if self.is_json:
            if self.kinds:  # none of the column of errors, which is nothing to tell
                yield f"{name} ({' and '.join(sorted(_NAMES[kind] for kind in self.kinds))})"
            return
        for key, shape in self.fields.items():
            yield from shape.mixed(f"{name}.{_shown(key)}" if name else _shown(key))
        if self.items is not None:
            yield from self.items.mixed(f"{name}[]")

    def arrow_type(self) -> Any:
        """Return the column's type. `settle` was called."""
        import pyarrow as pa

        if self.is_json:
            return pa.string()
        if not self.kinds:
            return pa.null()
        if self.kinds == {dict}:
            return pa.struct(list(self.arrow_fields()))
        if self.kinds == {list}:
            assert self.items is not None
            return pa.list_(_field("item", self.items))
        if self.kinds == {int}:
            return pa.int64() if self.most < 1 << 63 else pa.uint64()
        of_kind = {bool: pa.bool_(), str: pa.string()}
        return of_kind.get(next(iter(self.kinds)), pa.float64())

    def arrow_fields(self) -> Iterator[Any]:
        """Yield the fields of an object."""
        for name, shape in self.fields.items():
            yield _field(name, shape)

    def convert(self) -> Convert | None:
        """Return what makes a value, not null, fit its type; None when it does as it is."""
        if self.is_json:
            return lambda value: _encode(value).decode()
        if self.kinds == {list} and self.items is not None:
            inner = self.items.convert()
            return None if inner is None else lambda values: [_made(inner, v) for v in values]
        converts = {k: c for k, s in self.fields.items() if (c := s.convert()) is not None}
        if not converts:
            return None

        def convert(value: dict[str, Any]) -> dict[str, Any]:
            for key, each in converts.items():
                if key in value:
                    value[key] = _made(each, value[key])
            return value

        return convert

    def _inner(self) -> Iterator[Shape]:
        yield from self.fields.values()
        if self.items is not None:
            yield self.items


def _made(convert: Convert, value: Any) -> Any:
    return None if value is None else convert(value)


def _field(name: str, shape: Shape) -> Any:
    import pyarrow as pa

    return pa.field(name, shape.arrow_type(), metadata=JSON_TEXT if shape.is_json else None)


def _shown(key: str) -> str:
    return key if re.fullmatch(r"[\w-]{1,60}", key) else ascii(key[:60])
