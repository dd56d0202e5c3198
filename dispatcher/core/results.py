"""What counts as a result: one JSON value on one line, not too large.

A call may bring hundreds of results, and nearly always all of them are good; so many are looked
at together first, which costs a fraction of looking at each.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import msgspec

_ERROR_MARK = b'{"__ERROR__"'
_KIND = re.compile(rb'\{"__ERROR__":\s*\{"error":\s*"([^"\\]{1,64})"')
_MAY_BE_ERROR = (_ERROR_MARK.decode(), " ", "\t")  # blanks are cut off only later
UNNAMED_ERROR = "unnamed"
_FEW = 4
_check_json = msgspec.json.Decoder(msgspec.Raw).decode
_split_json = msgspec.json.Decoder(list[msgspec.Raw]).decode
_read_pairs = msgspec.json.Decoder(list[tuple[int, int]]).decode


def valid_results(texts: Sequence[str], max_bytes: int) -> list[msgspec.Raw | None]:
    """Return each result as the output's bytes, or None where it is not JSON on one line."""
    if len(texts) >= _FEW:
        try:
            return [*_split(texts, max_bytes)]
        except (ValueError, RecursionError):
            pass  # one of them or more is bad: which?
    return [_valid_result(text, max_bytes) for text in texts]


def _split(texts: Sequence[str], max_bytes: int) -> list[msgspec.Raw]:
    """Return valid results as the output's bytes; raise ValueError if one is not."""
    together = f"[{','.join(texts)}]".encode()
    results = _split_json(together)
    sizes = [*map(len, results)]
    # Each is one value by itself only if the commas that part values are those put here.
    if sizes != [*map(len, texts if together.isascii() else map(str.encode, texts))]:
        raise ValueError("a text is no value, or more than one, or has blanks around it")
    if b"\n" in together or b"\r" in together or max(sizes) > max_bytes:
        raise ValueError("a result has line ends in it, or is too large")
    return results


def _valid_result(text: str, max_bytes: int) -> msgspec.Raw | None:
    if "\n" in text or "\r" in text:
        return None
    try:
        result = _check_json(text.strip(" \t").encode())
    except (ValueError, RecursionError):
        return None
    return result if len(result) <= max_bytes else None


def error_kind(result: bytes) -> str:
    """Return the kind of error of an `__ERROR__` line, "" for any other result."""
    if not result.startswith(_ERROR_MARK):
        return ""
    found = _KIND.match(result)
    return found[1].decode("utf-8", "replace") if found else UNNAMED_ERROR


def error_kinds(texts: Sequence[str]) -> list[str]:
    """Return `error_kind` of each text that is a valid result."""
    if not any(map(str.startswith, texts, itertools.repeat(_MAY_BE_ERROR))):
        return [""] * len(texts)
    return [
        error_kind(x.strip(" \t").encode()) if x.startswith(_MAY_BE_ERROR) else "" for x in texts
    ]


def lease_serials(work_ids: Sequence[int], leases: Sequence[str | None]) -> list[int | None]:
    """Return the number in each lease id, 0 for what is none, None where there is none.

    It need not be the number of one of the item's leases.
    """
    if len(leases) < _FEW:
        return [None if lease is None else _serial_of(lease) for lease in leases]
    try:
        # "7.31", "9.32" -> [[7,31],[9,32]]
        pairs = _read_pairs(f"[[{'],['.join(leases).replace('.', ',')}]]")  # type: ignore[arg-type]
    except (TypeError, UnicodeEncodeError, msgspec.DecodeError):
        pairs = []
    if [work_id for work_id, _ in pairs] == [*work_ids]:
        return [serial for _, serial in pairs]
    return [None if lease is None else _serial_of(lease) for lease in leases]


def _serial_of(lease: str) -> int:
    try:
        return int(lease.partition(".")[2])
    except ValueError:
        return 0
