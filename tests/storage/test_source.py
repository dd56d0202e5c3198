"""The input: one line at a time, by offset, whatever stands in it."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dispatcher.errors import StateError, UsageError
from dispatcher.storage import source as source_module
from dispatcher.storage.inputs.opening import open_source
from dispatcher.storage.lines import InputLine
from dispatcher.storage.source import LineSource

LIMIT = 1000


def source_of(directory: Path, content: bytes, limit: int = LIMIT) -> LineSource:
    path = directory / "in.jsonl"
    path.write_bytes(content)
    return LineSource(path, limit)


def read_all(source: LineSource, max_lines: int = 3, max_bytes: int = 1 << 20) -> list[InputLine]:
    lines: list[InputLine] = []
    offset = 0
    while part := source.scan(offset, max_lines, max_bytes):
        lines += part
        offset = part.end
    assert offset == source.size_bytes
    return lines


def texts(
    directory: Path, content: bytes, limit: int = LIMIT, max_lines: int = 3
) -> list[tuple[str, str | None]]:
    source = source_of(directory, content, limit)
    lines = read_all(source, max_lines)
    source.close()
    return [(line.text, line.defect) for line in lines]


def test_each_line_tells_where_it_stands_and_where_the_next_one_does(tmp_path: Path) -> None:
    source = source_of(tmp_path, b"one\ntwo\nthree\n")
    assert read_all(source) == [
        InputLine(0, 4, "one"),
        InputLine(4, 8, "two"),
        InputLine(8, 14, "three"),
    ]
    source.close()


def test_a_line_ends_at_a_line_feed_only(tmp_path: Path) -> None:
    odd = "a\rb\x0bc\x0cd\x1ce\x85f\u2028g\u2029h"
    assert texts(tmp_path, f"{odd}\nnext\n".encode()) == [(odd, None), ("next", None)]


def test_a_last_line_without_a_line_feed_counts(tmp_path: Path) -> None:
    assert texts(tmp_path, b"one\nlast") == [("one", None), ("last", None)]


def test_a_carriage_return_before_the_line_feed_is_kept(tmp_path: Path) -> None:
    assert texts(tmp_path, b"one\r\ntwo\r\n") == [("one\r", None), ("two\r", None)]


def test_a_byte_order_mark_is_dropped_from_the_first_line_only(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf{}\n\xef\xbb\xbf{}\n"
    assert texts(tmp_path, content) == [("{}", None), ("\ufeff{}", None)]


def test_a_file_that_holds_only_a_byte_order_mark_is_one_blank_line(tmp_path: Path) -> None:
    assert texts(tmp_path, b"\xef\xbb\xbf") == [("", "blank_line")]


@pytest.mark.parametrize("blank", [b"", b" ", b"\t \r", b"\x0b"])
def test_a_blank_line_keeps_its_position(tmp_path: Path, blank: bytes) -> None:
    assert texts(tmp_path, b"a\n" + blank + b"\nb\n") == [
        ("a", None),
        ("", "blank_line"),
        ("b", None),
    ]


def test_a_line_that_is_not_utf_8_keeps_its_position_and_shows_what_can_be_shown(
    tmp_path: Path,
) -> None:
    assert texts(tmp_path, b"a\n{\xff}\nb\n") == [
        ("a", None),
        ("{\ufffd}", "undecodable_line"),
        ("b", None),
    ]


def test_a_lone_surrogate_in_the_bytes_is_undecodable(tmp_path: Path) -> None:
    ((_, defect),) = texts(tmp_path, b'"\xed\xa0\x80"\n')
    assert defect == "undecodable_line"


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_line_of_exactly_the_limit_is_taken_and_one_byte_more_is_too_long(
    tmp_path: Path, end: bytes
) -> None:
    assert texts(tmp_path, b"x" * 10 + end, limit=10) == [("x" * 10, None)]
    assert texts(tmp_path, b"x" * 11 + end, limit=10) == [("x" * 11, "line_too_long")]


def test_an_oversized_line_is_shown_by_its_beginning_and_skipped_whole(tmp_path: Path) -> None:
    source = source_of(tmp_path, b"a\n" + b"y" * (3 << 20) + b"\nb\n")
    lines = read_all(source)
    source.close()

    assert [(line.text[:300], line.defect) for line in lines] == [
        ("a", None),
        ("y" * 200, "line_too_long"),
        ("b", None),
    ]
    assert lines[1].next_offset == 2 + (3 << 20) + 1


def test_an_oversized_last_line_ends_with_the_input(tmp_path: Path) -> None:
    source = source_of(tmp_path, b"a\n" + b"y" * 5000)
    assert [(x.defect, x.next_offset) for x in read_all(source)] == [
        (None, 2),
        ("line_too_long", 5002),
    ]
    source.close()


def test_an_empty_input_has_no_lines(tmp_path: Path) -> None:
    source = source_of(tmp_path, b"")
    assert not source.scan(0, 10, 100)
    assert source.fingerprint()["size"] == 0
    source.close()


def test_a_scan_gives_at_least_one_line_and_stops_at_its_limits(tmp_path: Path) -> None:
    source = source_of(tmp_path, b"aaaa\nbbbb\ncccc\ndddd\n")
    assert [x.text for x in source.scan(0, 2, 100)] == ["aaaa", "bbbb"]
    assert [x.text for x in source.scan(5, 10, 1)] == ["bbbb"]
    assert [x.text for x in source.scan(5, 10, 10)] == ["bbbb", "cccc"]
    assert all(line.offset < 16 for line in source.scan(5, 10, 11))
    assert not source.scan(20, 10, 100)
    source.close()


def test_any_line_can_be_fetched_again_in_any_order(tmp_path: Path) -> None:
    source = source_of(tmp_path, b"\xef\xbb\xbfa\n\n\xff\nzz\nlast")
    lines = read_all(source)
    for line in [*reversed(lines), *lines]:
        assert source.fetch(line.offset) == line
    source.close()


BLANKS = [b" ", b"\x0b", b"\x1c", "\u2003".encode()]
PIECES = [b"\n", b"\n", b"\r\n", b"a", b"{}", *BLANKS, b"\xff", b"\xef\xbb\xbf", b"x" * 9]


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    content=st.lists(st.sampled_from(PIECES)).map(b"".join),
    limit=st.integers(1, 12),
    max_lines=st.integers(1, 4),
    max_bytes=st.integers(1, 20),
    at_once=st.integers(1, 20),
)
def test_the_lines_cover_the_input_however_it_is_scanned(
    tmp_path: Path, content: bytes, limit: int, max_lines: int, max_bytes: int, at_once: int
) -> None:
    source = source_of(tmp_path, content, limit)
    with patch.object(source_module, "_PLAIN_BYTES", at_once):
        lines = read_all(source, max_lines, max_bytes)
    expected = content.split(b"\n")
    if expected[-1] == b"":
        expected.pop()

    assert len(lines) == len(expected)
    offset = 0
    for line, raw in zip(lines, expected, strict=True):
        assert line.offset == offset
        offset = line.next_offset
        assert content[line.offset : offset].removesuffix(b"\n") == raw
        assert (line.defect == "line_too_long") == (len(raw) > limit)
        if line.defect is None:
            assert line.text.encode() == shown_of(raw, line.offset)
            assert line.text.encode().strip()
            assert source.fetch(line.offset) == line
        elif line.defect == "blank_line":
            assert not shown_of(raw, line.offset).strip()
        assert source.fetch(line.offset).next_offset == line.next_offset
    source.close()


def shown_of(raw: bytes, offset: int) -> bytes:
    return raw if offset else raw.removeprefix(b"\xef\xbb\xbf")


def test_a_long_input_of_plain_lines_with_odd_ones_between_is_read_whole(tmp_path: Path) -> None:
    plain = [f'{{"n": {number}, "text": "{"x" * (number % 700)}"}}' for number in range(3000)]
    odd = {700: b"", 701: b"\xff", 1500: b"y" * 2000, 2999: b" "}
    raw = [odd.get(number, text.encode()) for number, text in enumerate(plain)]

    read = texts(tmp_path, b"\n".join(raw) + b"\n", max_lines=1024)

    assert [number for number, (_, defect) in enumerate(read) if defect] == sorted(odd)
    assert all(read[n] == (text, None) for n, text in enumerate(plain) if n not in odd)


# -------------------------------------------------------------------- files that change


def test_a_file_that_grows_meanwhile_does_not_change_the_run(tmp_path: Path) -> None:
    source = source_of(tmp_path, b"one\ntwo")
    with source.path.open("ab") as file:
        file.write(b" and more\nthree\n")
    assert [x.text for x in read_all(source)] == ["one", "two"]
    assert source.size_bytes == 7
    source.close()


def test_a_file_that_was_cut_before_a_line_is_refused(tmp_path: Path) -> None:
    source = source_of(tmp_path, b"one\ntwo\nthree\n")
    os.truncate(source.path, 4)
    with pytest.raises(StateError, match="was cut"):
        source.scan(4, 10, 100)
    with pytest.raises(StateError, match=r"in\.jsonl"):
        source.fetch(8)
    source.close()


def test_a_file_that_was_cut_inside_a_line_is_refused_too(tmp_path: Path) -> None:
    source = source_of(tmp_path, b"one\ntwo\nthree\n")
    os.truncate(source.path, 10)
    with pytest.raises(StateError, match="was cut"):
        source.fetch(8)
    source.close()


def test_a_file_that_was_cut_inside_an_oversized_line_is_refused_too(tmp_path: Path) -> None:
    source = source_of(tmp_path, b"a" * 100 + b"\nlast\n", limit=10)
    os.truncate(source.path, 50)
    with pytest.raises(StateError, match="was cut"):
        source.scan(0, 1, 1000)
    source.close()


# -------------------------------------------------------------------- fingerprints


def test_the_fingerprint_is_the_same_for_the_same_content_at_another_time(tmp_path: Path) -> None:
    source = source_of(tmp_path, b"one\ntwo\n")
    before = source.fingerprint()
    source.close()
    os.utime(source.path, (1, 1))
    source = LineSource(source.path, LIMIT)
    assert source.fingerprint() == before
    source.close()


def test_a_changed_head_tail_or_size_changes_the_fingerprint(tmp_path: Path) -> None:
    content = bytes(1000) * 300
    prints = []
    for changed in (
        content,
        b"x" + content[1:],
        content[:-1] + b"x",
        content[:-1],
        content + b"\n",
    ):
        source = source_of(tmp_path, changed)
        prints.append(str(source.fingerprint()))
        source.close()
    assert len(set(prints)) == len(prints)


def test_a_change_in_any_of_the_samples_changes_the_fingerprint(tmp_path: Path) -> None:
    size = 4 << 20
    content = bytes(size)
    source = source_of(tmp_path, content)
    before = source.fingerprint()
    source.close()
    for number in range(1, 17):
        at = size * number // 17 + 5
        with source.path.open("r+b") as file:
            file.seek(at)
            file.write(b"x")
        source = LineSource(source.path, LIMIT)
        assert source.fingerprint() != before
        source.close()
        with source.path.open("r+b") as file:
            file.seek(at)
            file.write(b"\0")


def test_every_byte_of_a_small_file_is_in_the_fingerprint(tmp_path: Path) -> None:
    content = b"abcdefghij" * 30
    seen = set()
    for at in range(len(content)):
        source = source_of(tmp_path, content[:at] + b"X" + content[at + 1 :])
        seen.add(str(source.fingerprint()))
        source.close()
    assert len(seen) == len(content)


def test_a_fingerprint_survives_being_written_down(tmp_path: Path) -> None:
    import yaml

    source = source_of(tmp_path, b"one\n")
    written = source.fingerprint()
    assert yaml.safe_load(yaml.safe_dump(written)) == written
    source.close()


# -------------------------------------------------------------------- what is opened


def test_a_missing_input_or_a_directory_is_a_usage_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing\.jsonl"):
        open_source(tmp_path / "nothing.jsonl", tmp_path, LIMIT)
    with pytest.raises(UsageError, match="directory"):
        open_source(tmp_path, tmp_path, LIMIT)


def test_a_pipe_is_copied_into_the_state_directory_and_read_once(tmp_path: Path) -> None:
    pipe, state = tmp_path / "pipe", tmp_path / "state"
    state.mkdir()
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"one\ntwo\n",))
    writer.start()
    source = open_source(pipe, state, LIMIT)
    writer.join(10)

    assert [x.text for x in read_all(source)] == ["one", "two"]
    assert source.fetch(4).text == "two"
    source.close()

    again = open_source(pipe, state, LIMIT)  # nobody writes to the pipe any more
    assert [x.text for x in read_all(again)] == ["one", "two"]
    again.close()
    assert [p.name for p in state.iterdir()] == ["input.spool"]


def test_a_half_copied_pipe_is_not_taken_for_the_input(tmp_path: Path) -> None:
    pipe, state = tmp_path / "pipe", tmp_path / "state"
    state.mkdir()
    (state / "input.partial").write_bytes(b"one\ntw")
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"one\ntwo\n",))
    writer.start()
    source = open_source(pipe, state, LIMIT)
    writer.join(10)
    assert [x.text for x in read_all(source)] == ["one", "two"]
    source.close()
