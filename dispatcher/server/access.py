"""What clients may send: bounds on everything, and one sentence for what is refused."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import msgspec

from dispatcher.errors import BadRequestError
from dispatcher.models import ResultItem

T = TypeVar("T")

BODY_BYTES = 64 << 20
MAX_BATCH = 4096
MAX_WAIT_S = 60.0
MAX_NAME = 128


class Submission(msgspec.Struct):
    """A `/results` body as the server reads it."""

    items: list[ResultItem]
    worker: str | None = None
    want: int = 0


def decode(body: bytes, kind: type[T]) -> T:
    """Decode a JSON body. Raises BadRequestError naming the field that is wrong."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequestError(f"the body is not what this call takes: {error}") from error


def decode_submission(body: bytes) -> tuple[Submission, list[int]]:
    """Decode a `/results` body; one bad item does not harm the others.

    Returns the submission with its readable items and the places of those that are not.
    """
    try:
        return msgspec.json.decode(body, type=Submission), []
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _decode_item_by_item(body)


def _decode_item_by_item(body: bytes) -> tuple[Submission, list[int]]:
    try:
        # Python's decoder lets lone surrogates and NaN pass, so that only the item that holds
        # them is refused, later.
        loose: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"the body is not JSON: {error}") from error
    if not isinstance(loose, dict) or not isinstance(loose.get("items"), list):
        raise BadRequestError('the body must be an object with a list "items"')
    items: list[ResultItem] = []
    unreadable: list[int] = []
    for place, raw in enumerate(loose["items"]):
        known = (
            {name: raw.get(name) for name in ("work_id", "result", "run", "lease")}
            if isinstance(raw, dict)
            else raw
        )
        if isinstance(known, dict) and not isinstance(known["result"], str):
            known["result"] = None  # no string: invalid, but its lease can be told
        try:
            items.append(msgspec.convert(known, ResultItem))
        except msgspec.ValidationError:
            unreadable.append(place)
    worker = loose.get("worker")
    want = loose.get("want", 0)
    if not (worker is None or isinstance(worker, str)) or not isinstance(want, int):
        raise BadRequestError('"worker" must be a string and "want" a whole number')
    return Submission(items, worker, want), unreadable


def worker_name(name: str | None) -> str:
    """Return the client's name, "" for one that gives none."""
    if name is None:
        return ""
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise BadRequestError(f'"worker" must be 1 to {MAX_NAME} printable characters')
    return name


def whole_number(text: str | None, name: str, default: int) -> int:
    """Read a query parameter that must be at least 1."""
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal()) or len(text) > 18 or int(text) < 1:
        raise BadRequestError(f'"{name}" must be a whole number of at least 1, not {text[:40]!r}')
    return int(text)


def seconds(text: str | None, name: str, default: float) -> float:
    """Read a query parameter in seconds."""
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise BadRequestError(f'"{name}" must be seconds of at least 0, not {text[:40]!r}')
    return value
