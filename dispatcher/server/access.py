"""Who may speak and what they may send: bounds on everything, a sentence for what is refused."""

from __future__ import annotations

import hmac
import json
from collections.abc import Sized
from enum import Enum, auto
from typing import Any, TypeVar

import msgspec
from aiohttp import StreamReader

from dispatcher.errors import BadRequestError, BodyTooLargeError, UnsupportedTypeError
from dispatcher.models import (
    LATENCY_BOUNDS_S,
    MAX_MODEL_NAME,
    MAX_MODELS,
    ResultItem,
    StepItem,
    StepsSubmission,
    WorkerStats,
)

T = TypeVar("T")

BODY_BYTES = 64 << 20
MAX_BATCH = 4096
MAX_WAIT_S = 60.0
MAX_NAME = 128
MAX_REASON = 500
MAX_COUNT = 1 << 53
MAX_ITEMS = 1 << 14
MAX_STEPS = 1 << 12
MAX_HELD = 1 << 17
_LONGEST_INT = 18

_OPEN_PATHS = ("/", "/healthz")
_PARTS_OF_THE_PAGE = "/page/"
_JSON = "application/json"
_NOT_JSON = f'this call takes JSON: send it with the header "Content-Type: {_JSON}"'


class Role(Enum):
    """What a caller may do: nothing; everything but change settings; everything."""

    STRANGER = auto()
    WORKER = auto()
    ADMIN = auto()


# Python 3.11 looks an enumeration's member up in Python code, which every request would pay.
STRANGER, WORKER, ADMIN = Role


class Gate:
    """Tells callers apart by the token they show; without tokens, all of them may do all."""

    def __init__(self, token: str | None = None, admin_token: str | None = None) -> None:
        self.is_open = token is None
        self._worker = _bearer(token)
        self._admin = _bearer(admin_token)

    def role(self, authorization: str | None) -> Role:
        """Return what the value of the header `Authorization` allows."""
        if self.is_open:
            return ADMIN
        if authorization is None:
            return STRANGER
        shown = authorization.encode("utf-8", "surrogateescape")
        if hmac.compare_digest(shown, self._worker):
            return WORKER
        # The scheme's name has no case (RFC 9110, section 11.1); ours send it as it is here.
        scheme, _, secret = shown.partition(b" ")
        shown = b"Bearer " + secret.strip() if scheme.lower() == b"bearer" else b""
        if hmac.compare_digest(shown, self._admin):
            return ADMIN
        is_worker = hmac.compare_digest(shown, self._worker)
        return WORKER if is_worker else STRANGER


def is_for_everybody(method: str, path: str) -> bool:
    """Say whether a call needs no token, as it tells nothing of the run."""
    is_open = path in _OPEN_PATHS or path.startswith(_PARTS_OF_THE_PAGE)
    return is_open and method in ("GET", "HEAD")


def check_is_json(content_type: str | None, origin: str | None) -> None:
    """Refuse a POST that a page of somebody else could have a browser send.

    A browser asks the server before it sends JSON there from another site's page, and this server
    never agrees; forms and plain text it just sends. Older clients may say no type at all, as
    their protocol names none; a browser says at least from which page the call comes.
    Raises UnsupportedTypeError.
    """
    if content_type == _JSON or (content_type is None and origin is None):
        return
    if (content_type or "").partition(";")[0].strip().lower() != _JSON:
        raise UnsupportedTypeError(_NOT_JSON)


def _bearer(token: str | None) -> bytes:
    # Without a token, a value that no header can have.
    return f"Bearer {token}".encode() if token is not None else b"\n"


TOO_LARGE = f"the body is larger than {BODY_BYTES >> 20} MiB; send less at a time"
NO_TOKEN = (
    'this server wants a token in the header "Authorization: Bearer TOKEN"; it is in server.json '
    "in the run's state directory (older clients, which send none, need a server with --no-auth)"
)
WRONG_TOKEN = "the token is not that of this run; server.json in its state directory has it"
NOT_ADMIN = (
    "this changes settings of the run and wants the admin token, which is in admin.token in the "
    "run's state directory"
)


class Submission(msgspec.Struct):
    """A `/results` body as the server reads it."""

    items: list[ResultItem]
    worker: str | None = None
    want: int = 0


async def read_body(content: StreamReader) -> bytes:
    """Read a request's body. Raises BodyTooLargeError when it is, unpacked, larger than may be.

    `Request.read` would keep the body until its connection has another one, and reads a compressed
    one in pieces as large as a body may be: 64 MiB for every connection that is idle.
    """
    parts: list[bytes] = []
    size = 0
    while not content.at_eof():
        part = await content.readany()
        size += len(part)
        if size > BODY_BYTES:
            raise BodyTooLargeError(TOO_LARGE)
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def decode(body: bytes, kind: type[T]) -> T:
    """Decode a JSON body. Raises BadRequestError naming the field that is wrong."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequestError(f"the body is not what this call takes: {error}") from error


def decode_submission(body: bytes) -> tuple[Submission, list[int]]:
    """Decode a `/results` body; one bad item does not harm the others.

    Returns the submission with its readable items and the places of those that are not.
    """
    try:
        submission = msgspec.json.decode(body, type=Submission)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _decode_item_by_item(body)
    check_length(submission.items, "items", MAX_ITEMS)
    return submission, []


def decode_steps(body: bytes) -> tuple[list[StepItem], list[int]]:
    """Decode a `/steps` body; one bad step does not harm the others.

    Returns the readable steps and the places of those that are not.
    """
    try:
        steps = msgspec.json.decode(body, type=StepsSubmission).steps
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        steps, unreadable = [], []
        for place, raw in enumerate(_decode_loosely(body, "steps", MAX_STEPS)["steps"]):
            try:
                steps.append(msgspec.convert(raw, StepItem))
            except (msgspec.ValidationError, UnicodeEncodeError):
                unreadable.append(place)
        return steps, unreadable
    check_length(steps, "steps", MAX_STEPS)
    return steps, []


def _decode_loosely(body: bytes, name: str, most: int) -> dict[str, Any]:
    """Decode a body that holds a list `name`, whatever its members are."""
    try:
        # Python's decoder lets lone surrogates and NaN pass, so that only the item that holds
        # them is refused, later.
        loose: Any = json.loads(body, parse_int=_int_or_text)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"the body is not JSON: {error}") from error
    if not isinstance(loose, dict) or not isinstance(loose.get(name), list):
        raise BadRequestError(f'the body must be an object with a list "{name}"')
    check_length(loose[name], name, most)
    return loose


def _decode_item_by_item(body: bytes) -> tuple[Submission, list[int]]:
    loose = _decode_loosely(body, "items", MAX_ITEMS)
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
        except (msgspec.ValidationError, UnicodeEncodeError):
            unreadable.append(place)
    worker = loose.get("worker")
    want = loose.get("want", 0)
    if not (worker is None or isinstance(worker, str)) or not isinstance(want, int):
        raise BadRequestError('"worker" must be a string and "want" a whole number')
    return Submission(items, worker, want), unreadable


def _int_or_text(digits: str) -> int | str:
    # Python refuses to convert thousands of digits; as text they spoil only their own item.
    return int(digits) if len(digits) <= _LONGEST_INT else digits


def check_length(entries: Sized, name: str, most: int) -> None:
    """Refuse a call with so many entries that others would have to wait for it."""
    if len(entries) > most:
        raise BadRequestError(f'"{name}" has {len(entries)} entries, but {most} are the most')


def check_counts(stats: WorkerStats) -> None:
    """Refuse numbers that no worker can have counted to, and more models than it may have."""
    _check_numbers(stats)
    check_length(stats.models, "models", MAX_MODELS)
    for name, counts in stats.models.items():
        if not 0 < len(name) <= MAX_MODEL_NAME or not name.isprintable():
            raise BadRequestError(
                f'a name in "models" must be 1 to {MAX_MODEL_NAME} printable characters'
            )
        _check_numbers(counts)
        for histogram in (counts.ttft, counts.latency):
            _check_numbers(histogram)
            if len(histogram.counts) not in (0, len(LATENCY_BOUNDS_S) + 1):
                raise BadRequestError(f'"counts" must be {len(LATENCY_BOUNDS_S) + 1} numbers')
            if not all(0 <= count < MAX_COUNT for count in histogram.counts):
                raise BadRequestError('"counts" must be whole numbers from 0 to 2^53')


def _check_numbers(value: msgspec.Struct) -> None:
    for name in value.__struct_fields__:
        number = getattr(value, name)
        if isinstance(number, int | float) and not 0 <= number < MAX_COUNT:
            raise BadRequestError(f'"{name}" must be a number from 0 to 2^53')


def worker_name(name: str | None) -> str:
    """Return the client's name, "" for one that gives none."""
    if name is None:
        return ""
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise BadRequestError(f'"worker" must be 1 to {MAX_NAME} printable characters')
    return name


def reason(text: str) -> str:
    """Return what somebody gave as a reason: it stands in logs and on terminals."""
    if len(text) > MAX_REASON or not text.isprintable():
        raise BadRequestError(f'"reason" must be at most {MAX_REASON} printable characters')
    return text.strip()


def whole_number(text: str | None, name: str, default: int) -> int:
    """Read a query parameter that must be at least 1."""
    if text is None:
        return default
    digits = text.lstrip("0")
    if not (text.isascii() and text.isdecimal()) or not digits:
        raise BadRequestError(f'"{name}" must be a whole number of at least 1, not {text[:40]!r}')
    return int(digits[:_LONGEST_INT])  # what is larger is far beyond any bound, cut or not


def seconds(text: str | None, name: str, default: float) -> float:
    """Read a query parameter in seconds."""
    if text is None:
        return default
    try:
        # Python also takes other scripts' digits and underscores, which no number here has.
        value = float(text) if text.isascii() and "_" not in text else -1.0
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise BadRequestError(f'"{name}" must be seconds of at least 0, not {text[:40]!r}')
    return value
