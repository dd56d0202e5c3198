"""Parquet as input: every row a JSON object, whatever types it has."""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import math
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dispatcher.errors import StateError, UsageError
from dispatcher.storage.inputs.opening import reader_of
from dispatcher.storage.inputs.reader import CopyStop
from dispatcher.storage.inputs.rows import RowEncoder
from tests.storage.test_inputs import RunSettings, check_input, opened, text_of

UTC = datetime.UTC


def rows_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in text_of(path).splitlines()]


def through_parquet(tmp_path: Path, values: list[Any], kind: pa.DataType) -> list[Any]:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"x": pa.array(values, kind)}), path)
    return [row["x"] for row in rows_of(path)]


def us(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text)


PLAIN = [
    ([True, None, False], pa.bool_(), [True, None, False]),
    ([2**63 - 1, -(2**63)], pa.int64(), [2**63 - 1, -(2**63)]),
    ([2**64 - 1], pa.uint64(), [2**64 - 1]),
    (["a\n\u2028\x00\U0001f600", ""], pa.large_string(), ["a\n\u2028\x00\U0001f600", ""]),
    ([0.1, math.nan, math.inf, -math.inf, None], pa.float64(), [0.1, None, None, None, None]),
    ([1.5], pa.float16(), [1.5]),
    ([decimal.Decimal("12.30")], pa.decimal128(20, 2), ["12.30"]),
    ([b"\x00\xff"], pa.binary(), [base64.b64encode(b"\x00\xff").decode()]),
    ([b"ab"], pa.binary(2), ["YWI="]),
    ([datetime.date(2024, 2, 29)], pa.date32(), ["2024-02-29"]),
    ([datetime.date(1969, 12, 31)], pa.date64(), ["1969-12-31"]),
    ([datetime.time(13, 5, 0, 250_000)], pa.time64("us"), ["13:05:00.25"]),
    ([datetime.time(1, 2, 3)], pa.time32("s"), ["01:02:03"]),
    ([us("2024-02-29T13:05:00.25")], pa.timestamp("us"), ["2024-02-29T13:05:00.25"]),
    ([us("1969-12-31T23:59:59")], pa.timestamp("ms"), ["1969-12-31T23:59:59"]),
    ([1_709_211_900_000_000_001], pa.timestamp("ns"), ["2024-02-29T13:05:00.000000001"]),
    (
        [us("2024-02-29T13:05:00+01:00")],
        pa.timestamp("us", "Europe/Paris"),
        ["2024-02-29T12:05:00Z"],
    ),
    ([10**15], pa.timestamp("ms"), [10**15]),
    ([datetime.timedelta(seconds=90), None], pa.duration("us"), [90, None]),
    ([datetime.timedelta(milliseconds=1)], pa.duration("us"), [0.001]),
    ([None], pa.null(), [None]),
    ([[1, None], [], None], pa.list_(pa.int32()), [[1, None], [], None]),
    ([[b"a", None]], pa.list_(pa.binary()), [["YQ==", None]]),
    (
        [{"at": us("2024-01-01"), "raw": [b"b"]}, None],
        pa.struct([("at", pa.timestamp("ns")), ("raw", pa.list_(pa.binary()))]),
        [{"at": "2024-01-01T00:00:00", "raw": ["Yg=="]}, None],
    ),
    ([[("a", 1), ("b", None)]], pa.map_(pa.string(), pa.int64()), [{"a": 1, "b": None}]),
    (
        [[(1, datetime.date(2024, 1, 1))]],
        pa.map_(pa.int64(), pa.date32()),
        [[[1, "2024-01-01"]]],
    ),
    (["a", "b", "a"], pa.dictionary(pa.int8(), pa.string()), ["a", "b", "a"]),
]


@pytest.mark.parametrize(("values", "kind", "expected"), PLAIN, ids=[str(p[1]) for p in PLAIN])
def test_a_value_is_written_as_it_is_documented(
    values: list[Any], kind: pa.DataType, expected: list[Any], tmp_path: Path
) -> None:
    assert through_parquet(tmp_path, values, kind) == expected


OTHERS = [
    ([datetime.date(1969, 12, 31)], pa.date64(), ["1969-12-31"]),
    ([datetime.timedelta(seconds=1)], pa.duration("s"), [1]),
    ([[1, 2]], pa.list_(pa.timestamp("s"), 2), [["1970-01-01T00:00:01", "1970-01-01T00:00:02"]]),
    ([[b"a"]], pa.large_list(pa.large_binary()), [["YQ=="]]),
    ([{"a": datetime.time(1)}], pa.struct([("a", pa.time32("s"))]), [{"a": "01:00:00"}]),
]


@pytest.mark.parametrize(("values", "kind", "expected"), OTHERS, ids=[str(o[1]) for o in OTHERS])
def test_types_that_parquet_changes_come_with_data_sets(
    values: list[Any], kind: pa.DataType, expected: list[Any]
) -> None:
    table = pa.table({"x": pa.array(values, kind)})
    (line,) = RowEncoder(table.schema, "a table").lines(table)
    assert json.loads(line)["x"] == expected[0]


class Label(pa.ExtensionType):
    """A type of somebody's own."""

    def __init__(self) -> None:
        super().__init__(pa.timestamp("s"), "tests.label")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: Any, serialized: bytes) -> Label:
        return cls()


def test_a_type_of_somebodys_own_is_what_it_is_stored_as() -> None:
    stored = pa.array([0, None], pa.timestamp("s"))
    table = pa.table({"x": pa.ExtensionArray.from_storage(Label(), stored)})
    lines = list(RowEncoder(table.schema, "a table").lines(table))
    assert lines == [b'{"x":"1970-01-01T00:00:00"}\n', b'{"x":null}\n']


def test_columns_keep_their_order_and_missing_values_are_null(tmp_path: Path) -> None:
    table = pa.table({"z": [1, 2], "a": ["x", None], "m": [None, [1]]})
    pq.write_table(table, path := tmp_path / "in.parquet")
    assert text_of(path) == b'{"z":1,"a":"x","m":null}\n{"z":2,"a":null,"m":[1]}\n'


def test_a_directory_is_its_files_by_name(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    directory.mkdir()
    for name, values in (("b.parquet", [3]), ("a.PARQUET", [1, 2]), ("_meta.parquet", [9])):
        pq.write_table(pa.table({"x": values}), directory / name)
    (directory / "README.md").write_text("no data")
    pq.write_table(pa.table({"y": ["other columns"]}), directory / "c.parquet")
    assert rows_of(directory) == [{"x": 1}, {"x": 2}, {"x": 3}, {"y": "other columns"}]


def test_what_changed_in_a_directory_is_told(tmp_path: Path) -> None:
    directory, state = tmp_path / "data", tmp_path / "state"
    directory.mkdir()
    for name in "ab":
        pq.write_table(pa.table({"x": [1]}), directory / f"{name}.parquet")
    lines, before = opened(directory, state, is_begun=False)
    assert len(lines) == 2
    run = RunSettings(directory, tmp_path / "out", state)

    (directory / "a.parquet").rename(directory / "c.parquet")
    with pytest.raises(StateError, match="names or sizes of its files changed"):
        check_input(run, before, opened(directory, state)[1])
    (directory / "c.parquet").unlink()
    with pytest.raises(StateError, match=r"the number of its files \(2 then, 1 now\)"):
        check_input(run, before, opened(directory, state)[1])
    pq.write_table(pa.table({"x": [2]}), directory / "a.parquet")
    with pytest.raises(StateError, match="its content changed"):
        check_input(run, before, opened(directory, state)[1])


def test_a_file_of_many_rows_is_never_whole_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"text": ["x" * 1000] * 40_000}), path)
    reader = reader_of(path)
    assert reader is not None
    arrow_before = pa.total_allocated_bytes()
    peak_arrow = total = 0
    tracemalloc.start()
    try:
        for block in reader.blocks(CopyStop()):
            total += len(block)
            peak_arrow = max(peak_arrow, pa.total_allocated_bytes() - arrow_before)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == 40_000 * 1012
    assert peak < 10_000_000
    assert peak_arrow < 10_000_000
    assert reader.share_read() == 1.0


@pytest.mark.parametrize("content", [b"", b"PAR1", b'{"a": 1}\n', b"PAR1" + bytes(100) + b"PAR1"])
def test_a_file_that_is_no_parquet_is_refused_in_a_sentence(content: bytes, tmp_path: Path) -> None:
    (path := tmp_path / "in.parquet").write_bytes(content)
    with pytest.raises(UsageError) as refused:
        text_of(path)
    assert str(path) in str(refused.value)
    assert "cannot be read as Parquet" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_damaged_file_says_how_far_it_was_readable(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    rows = [f"row {number}" for number in range(5000)]
    options = {"row_group_size": 1000, "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(pa.table({"x": rows}), path, **options)
    whole = bytearray(path.read_bytes())
    middle = len(whole) // 2
    whole[middle : middle + 2000] = b"\xff" * 2000
    path.write_bytes(whole)
    with pytest.raises(UsageError, match=r"cannot be read as Parquet after 2,\d+ rows|1,\d+ rows"):
        text_of(path)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"])
    pq.write_table(table, path := tmp_path / "in.parquet")
    with pytest.raises(UsageError, match="two columns 'x'"):
        text_of(path)


def test_a_file_without_rows_is_an_empty_input(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": pa.array([], pa.int64())}), path := tmp_path / "in.parquet")
    assert text_of(path) == b""


def test_a_directory_without_parquet_says_what_could_be_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"hf:{tmp_path}"):
        reader_of(tmp_path)


def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.table({"x": [1]}), path := tmp_path / "in.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match="pip install pyarrow"):
        text_of(path)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    texts=st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"])), max_size=600),
    nested=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
)
def test_rows_of_json_types_come_back_as_they_were(
    tmp_path: Path, texts: list[str | None], nested: list[int]
) -> None:
    rows = [{"text": text, "inner": {"numbers": nested}} for text in texts]
    kind = pa.struct([("numbers", pa.list_(pa.int64()))])
    schema = pa.schema([("text", pa.string()), ("inner", kind)])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path := tmp_path / "in.parquet")
    assert rows_of(path) == rows
