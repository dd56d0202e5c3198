"""Rows of Arrow tables as JSON lines.

Text, booleans, whole numbers, lists and structs are what they are in JSON. What JSON has not:

    floating-point NaN and infinities   null
    decimals                            text, so that no digit is lost: "12.30"
    bytes                               text, base64
    dates                               text: "2024-02-29"
    times of day                        text: "13:05:00.25"
    timestamps                          text, ISO 8601: "2024-02-29T13:05:00.25", of instants in
                                        UTC "2024-02-29T12:05:00.25Z"; beyond the years 1 to 9999
                                        the number of units since 1970
    durations                           a number of seconds
    maps                                an object where the keys are text, else a list of
                                        [key, value]
"""

from __future__ import annotations

import base64
import datetime
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from dispatcher.errors import UsageError
from dispatcher.storage.inputs.reader import BLOCK_BYTES

Convert = Callable[[Any], Any]

JSON_TEXT = {b"dispatcher": b"json"}
"""What says of a column that its text is JSON (dispatcher/export): it is put in as such."""

_EPOCH = datetime.datetime(1970, 1, 1)
_DAY_ZERO = _EPOCH.date().toordinal()
_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_encode = msgspec.json.Encoder(decimal_format="string").encode


class RowEncoder:
    """Encodes rows of tables that have one schema. Raises UsageError for what has no JSON."""

    def __init__(self, schema: Any, name: str) -> None:
        self._name = name
        names = list(schema.names)
        if twice := sorted({each for each in names if names.count(each) > 1}):
            raise UsageError(
                f"the input {name} has two columns {twice[0]!r}, which one object cannot hold; "
                "rename one"
            )
        self._plain = _plain_schema(schema)
        self._converts = [
            (field.name, convert)
            for field in schema
            if (convert := _convert_of_field(field)) is not None
        ]

    def lines(self, table: Any) -> Iterator[bytes]:
        """Yield the rows of a table or record batch, each a line with its line end."""
        try:
            for row in _cast(table, self._plain).to_pylist():
                for name, convert in self._converts:
                    if (value := row[name]) is not None:
                        row[name] = convert(value)
                yield _encode(row) + b"\n"
        except (ValueError, TypeError, NotImplementedError) as error:
            said = " ".join(str(error).split())
            raise UsageError(
                f"the input {self._name} holds what cannot be written as JSON: {said}; leave that "
                "column out"
            ) from error


def in_blocks(lines: Iterator[bytes]) -> Iterator[bytes]:
    """Put lines together to blocks."""
    block = bytearray()
    for line in lines:
        block += line
        if len(block) >= BLOCK_BYTES:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)


# -------------------------------------------------------------------- what is cast before


def _plain_schema(schema: Any) -> Any:
    import pyarrow as pa

    return pa.schema([(field.name, _plain_type(field.type)) for field in schema])


def _plain_type(kind: Any) -> Any:
    """Return the type that a value is read as: times as numbers, as Python has no nanoseconds."""
    import pyarrow as pa

    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _plain_type(kind.storage_type)
    if types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if types.is_float16(kind):
        return pa.float32()
    if types.is_timestamp(kind) or types.is_duration(kind) or types.is_time64(kind):
        return pa.int64()
    if types.is_date64(kind):
        return pa.int64()
    if types.is_date32(kind) or types.is_time32(kind):
        return pa.int32()
    if types.is_map(kind):
        return pa.map_(_plain_type(kind.key_type), _plain_type(kind.item_type))
    if types.is_struct(kind):
        return pa.struct([(f.name, _plain_type(f.type)) for f in kind])
    if types.is_fixed_size_list(kind):
        return pa.list_(_plain_type(kind.value_type), kind.list_size)
    if types.is_large_list(kind):
        return pa.large_list(_plain_type(kind.value_type))
    if types.is_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    return kind


def _cast(table: Any, schema: Any) -> Any:
    import pyarrow as pa

    columns = [
        column if column.type == field.type else _cast_column(column, field.type)
        for column, field in zip(table.columns, schema, strict=True)
    ]
    return type(table).from_arrays(columns, schema=schema) if columns else pa.table({})


def _cast_column(column: Any, kind: Any) -> Any:
    import pyarrow as pa

    if isinstance(column.type, pa.BaseExtensionType):
        if isinstance(column, pa.ChunkedArray):
            chunks = [chunk.storage for chunk in column.chunks]
            column = pa.chunked_array(chunks, column.type.storage_type)
        else:
            column = column.storage
    return column if column.type == kind else column.cast(kind)


# -------------------------------------------------------------------- what is converted after


def _convert_of_field(field: Any) -> Convert | None:
    import pyarrow as pa

    found = dict(field.metadata or {})
    if JSON_TEXT.items() <= found.items() and pa.types.is_string(field.type):
        return _json
    return _convert_of(field.type)


def _json(text: str) -> Any:
    try:
        msgspec.json.decode(text)
    except msgspec.MsgspecError:
        return text  # somebody wrote into it since
    return msgspec.Raw(text.encode())


def _convert_of(kind: Any) -> Convert | None:
    """Return what makes JSON of a value that is not null; None when it is JSON as it is."""
    import pyarrow as pa

    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _convert_of(kind.storage_type)
    if types.is_dictionary(kind):
        return _convert_of(kind.value_type)
    if types.is_timestamp(kind):
        return _timestamps(kind.unit, "Z" if kind.tz is not None else "")
    if types.is_duration(kind):
        return _seconds(_PER_SECOND[kind.unit])
    if types.is_time(kind):
        return _times(_PER_SECOND[kind.unit])
    if types.is_date32(kind):
        return _date
    if types.is_date64(kind):
        return lambda value: _date(value // 86_400_000)
    if _is_bytes(kind):
        return lambda value: base64.b64encode(value).decode()
    if types.is_map(kind):
        return _maps(_convert_of(kind.key_type), _convert_of(kind.item_type))
    if types.is_struct(kind):
        return _structs({f.name: c for f in kind if (c := _convert_of_field(f)) is not None})
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _lists(_convert_of_field(kind.value_field))
    return None


def _is_bytes(kind: Any) -> bool:
    from pyarrow import types

    views = getattr(types, "is_binary_view", lambda _: False)
    fixed = types.is_fixed_size_binary(kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or fixed or views(kind))


def _timestamps(unit: str, zone: str) -> Convert:
    per_second = _PER_SECOND[unit]

    def convert(value: int) -> str | int:
        seconds, rest = divmod(value, per_second)
        try:
            whole = _EPOCH + datetime.timedelta(seconds=seconds)
        except OverflowError:
            return value
        return f"{whole.isoformat()}{_fraction(rest, per_second)}{zone}"

    return convert


def _times(per_second: int) -> Convert:
    def convert(value: int) -> str:
        seconds, rest = divmod(value, per_second)
        minutes, second = divmod(seconds, 60)
        hour, minute = divmod(minutes, 60)
        return f"{hour:02}:{minute:02}:{second:02}{_fraction(rest, per_second)}"

    return convert


def _seconds(per_second: int) -> Convert:
    def convert(value: int) -> int | float:
        return value // per_second if value % per_second == 0 else value / per_second

    return convert


def _fraction(rest: int, per_second: int) -> str:
    if not rest:
        return ""
    digits = len(str(per_second)) - 1
    return f".{rest:0{digits}}".rstrip("0")


def _date(days: int) -> str | int:
    try:
        return datetime.date.fromordinal(_DAY_ZERO + days).isoformat()
    except (ValueError, OverflowError):
        return days


def _maps(key: Convert | None, item: Convert | None) -> Convert:
    def convert(pairs: Any) -> Any:
        made = [[_made(key, k), _made(item, v)] for k, v in pairs]
        if all(isinstance(k, str) for k, _ in made):
            return dict(made)
        return made

    return convert


def _structs(converts: dict[str, Convert]) -> Convert | None:
    if not converts:
        return None

    def convert(value: dict[str, Any]) -> dict[str, Any]:
        for name, each in converts.items():
            value[name] = _made(each, value[name])
        return value

    return convert


def _lists(inner: Convert | None) -> Convert | None:
    if inner is None:
        return None
    return lambda values: [_made(inner, value) for value in values]


def _made(convert: Convert | None, value: Any) -> Any:
    return value if convert is None or value is None else convert(value)
