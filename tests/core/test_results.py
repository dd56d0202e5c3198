"""What counts as a result, looked at together and one by one."""

from __future__ import annotations

import pytest

from dispatcher.core.results import error_kind, error_kinds, lease_serials
from dispatcher.core.results import valid_results as valid_raw_results

GOOD = ['{"a": 1}', "[1, 2]", '"a,b"', "0", "null", '{"__ERROR__": {}}', '"\u00e9\U0001f600"']
BAD = ["", "{", "1,2", "1 2", "[3", "4]", '"a\nb"', "{}\r", "nan", '"\ud800"', "[" * 100_000]


def valid_results(texts: list[str], max_bytes: int) -> list[bytes | None]:
    found = valid_raw_results(texts, max_bytes)
    return [None if result is None else bytes(result) for result in found]


@pytest.mark.parametrize("text", GOOD)
def test_json_on_one_line_is_a_result(text: str) -> None:
    assert valid_results([text], 1 << 20) == [text.encode()]


@pytest.mark.parametrize("text", BAD)
def test_anything_else_is_none(text: str) -> None:
    assert valid_results([text], 1 << 20) == [None]


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_result_leaves_the_others_as_they_are(bad: str) -> None:
    expected = [text.encode() for text in GOOD]
    assert valid_results([*GOOD, bad, *GOOD], 1 << 20) == [*expected, None, *expected]


@pytest.fixture(params=[0, 8], ids=["few", "many"])
def others(request: pytest.FixtureRequest) -> list[str]:
    """Good results beside those of the test: few are looked at one by one, many together."""
    return ["0"] * int(request.param)


def test_bad_results_that_make_good_json_together_are_still_bad(others: list[str]) -> None:
    def looked_at(*texts: str) -> list[bytes | None]:
        return valid_results([*texts, *others], 1 << 20)[: len(texts)]

    assert looked_at("[3", "4]", "1,2") == [None, None, None]
    assert looked_at('"a', 'b"', "1,2") == [None, None, None]
    assert looked_at("1,2", "", "3") == [None, None, b"3"]


def test_blanks_around_a_result_are_cut_off(others: list[str]) -> None:
    assert valid_results([" 1\t", "2", *others], 1 << 20)[:2] == [b"1", b"2"]


def test_a_result_over_the_limit_in_bytes_is_none(others: list[str]) -> None:
    texts = ['"\u00e9"', '"ab"', '"abc"', *others]
    assert valid_results(texts, 4)[:3] == [b'"\xc3\xa9"', b'"ab"', None]


def test_no_texts_are_no_results() -> None:
    assert valid_results([], 10) == []


@pytest.mark.parametrize(
    ("lease", "serial"),
    [("7.31", 31), ("7.007", 7), ("8.31", 31), ("7", 0), ("", 0), ("7.x", 0), ("\ud800", 0)],
)
def test_a_lease_tells_its_number_alone_and_among_others(lease: str, serial: int) -> None:
    assert lease_serials([7], [lease]) == [serial]
    leases = ["1.5", lease, "2.6", "3.7"]
    assert lease_serials([1, 7, 2, 3], leases) == [5, serial, 6, 7]


def test_a_missing_lease_has_no_number() -> None:
    assert lease_serials([1, 2], ["1.5", None]) == [5, None]
    assert lease_serials([1, 2, 3, 4], ["1.5", None, "3.6", "4.7"]) == [5, None, 6, 7]
    assert lease_serials([], []) == []


def test_leases_are_not_mixed_up_by_what_looks_like_two_of_them() -> None:
    ids, leases = [1, 2, 3], ["1.5", "2.6", "3.7"]
    assert lease_serials([7, 8, *ids], ["7", "3.8.9", *leases]) == [0, 0, 5, 6, 7]
    assert lease_serials([7, 9, *ids], ["7.8,9.1", "", *leases]) == [0, 0, 5, 6, 7]
    assert lease_serials([7, 9, *ids], ["7.8],[9.1", "9.4", *leases]) == [0, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("result", "kind"),
    [
        (b'{"__ERROR__": {"error": "task_exception", "message": "x"}}', "task_exception"),
        (b'{"__ERROR__":{"error":"no_answer"}}', "no_answer"),
        (b'{"__ERROR__": {"message": "x"}}', "unnamed"),
        (b'{"__ERROR__": "text"}', "unnamed"),
        (b'{"__ERROR__": {"error": "%s"}}' % (b"k" * 65), "unnamed"),
        (b'{"answer": {"__ERROR__": {"error": "task_exception"}}}', ""),
        (b"1", ""),
    ],
)
def test_an_error_line_tells_its_kind(result: bytes, kind: str) -> None:
    assert error_kind(result) == kind
    text = result.decode()
    assert error_kinds(["1", text, f" \t{text} "]) == ["", kind, kind]
