"""Lines on their way into the queue: in columns, taken a few at a time."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from dispatcher.storage.lines import InputLine, Lines, ReadAhead

DEFECTS = [None, None, None, "blank_line", "undecodable_line"]


def lines_of(sizes: list[int], defects: list[str | None], offset: int = 0) -> list[InputLine]:
    ends = list(accumulate(sizes, initial=offset))
    return [
        InputLine(begin, end, f"line at {begin}", defect)
        for begin, end, defect in zip(ends, ends[1:], defects, strict=False)
    ]


def columns_of(lines: list[InputLine]) -> Lines:
    columns = Lines(lines[0].offset if lines else 0)
    for line in lines:
        columns.append(line)
    return columns


def test_columns_give_back_every_line_and_where_the_next_one_begins() -> None:
    lines = lines_of([3, 1, 9], [None, "blank_line", None], offset=100)
    columns = columns_of(lines)
    assert list(columns) == lines
    assert (len(columns), columns.end) == (3, 113)
    assert columns.defects == {1: "blank_line"}


@given(
    drawn=st.lists(st.tuples(st.integers(1, 9), st.sampled_from(DEFECTS)), max_size=30),
    offset=st.integers(0, 99),
    asked=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 30)), min_size=30, max_size=30),
)
def test_however_lines_are_taken_each_comes_once_in_order_and_defects_by_themselves(
    drawn: list[tuple[int, str | None]], offset: int, asked: list[tuple[int, int]]
) -> None:
    lines = lines_of([size for size, _ in drawn], [defect for _, defect in drawn], offset)
    ahead = ReadAhead(columns_of(lines))
    taken: list[InputLine] = []
    for count, max_bytes in asked:
        if not ahead:
            break
        part = list(ahead.take(count, max_bytes))
        assert 1 <= len(part) <= count
        assert len({line.defect is None for line in part}) == 1
        if part[0].defect is None:
            assert sum(line.next_offset - line.offset for line in part[:-1]) < max_bytes
        taken += part
    assert taken == lines
    assert not ahead


def test_as_many_lines_are_taken_as_fit() -> None:
    ahead = ReadAhead(columns_of(lines_of([10] * 6, [None] * 6)))
    assert [len(ahead.take(9, size)) for size in (20, 21, 1)] == [2, 3, 1]
