"""The steps of one attempt: which of its requests were answered before, and in what order it asks.

A task's generator is run again from its beginning when its item is handed out again. A request is
answered from the record when it stands at the same position and asks the same as then, which its
hash tells; from the first that differs on, the record is void. This is how durable workflow
engines resume code (event-history replay, as in Temporal and Azure Durable Functions).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from dispatcher.models import Step
from dispatcher.taskmanager.backend.request import Request, Response

Position = tuple[int, int]

_HASH_BYTES = 16
_encode_canonical = msgspec.json.Encoder(order="deterministic").encode

log = logging.getLogger(__name__)


class RecordedResponse(msgspec.Struct, omit_defaults=True):
    """A response as it is recorded: all of it but the request."""

    content: Any = None
    error: Any = None
    model: str | None = None


_decode = msgspec.json.Decoder(RecordedResponse).decode
_NOT_JSON = (TypeError, ValueError, OverflowError, RecursionError)


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A request as the task yielded it; `hash` is None when it cannot be recorded."""

    request: Request
    position: Position = (0, 0)
    hash: str | None = None


class StepLog:
    """Numbers an attempt's requests and answers those that were answered before.

    `model` is asked where a request names none. `cut_at` is the position from which on the task
    asked something else than recorded, None as long as it did not; `void_hash` is the hash that was
    recorded there. `is_open` is False once nothing more of the attempt can be recorded.

    Of the task's requests, `asked` were yielded so far, `replayed` of them answered from the
    record and `answered` by the model; with `taken` of these its code has begun to work. The
    attempt counts on a step thread, all but `answered`.
    """

    def __init__(self, recorded: Iterable[Step] = (), model: str | None = None) -> None:
        self._recorded = {step.pos: step for step in recorded}
        self._model = model
        self.cut_at: Position | None = None
        self.void_hash = ""
        self.is_open = True
        self.asked = self.replayed = self.answered = self.taken = 0

    def ask(self, request: Request, position: Position) -> Asked:
        """Note a request that the task yielded."""
        self.asked += 1
        return Asked(request, position, request_hash(request, self._model))

    def replay(self, asked: Asked) -> Response | None:
        """Return the recorded answer, or None when the model must be asked."""
        step = self._recorded.get(asked.position)
        if step is None:
            return None
        if step.hash == asked.hash and (response := _read(step.response, asked.request)):
            self.replayed += 1
            return response
        self.cut_at, self.void_hash = asked.position, step.hash
        self._recorded = {p: s for p, s in self._recorded.items() if p < asked.position}
        return None


def request_hash(request: Request, model: str | None) -> str | None:
    """Return the hash of what is asked of which model; None when that is not JSON."""
    content = request.content
    try:
        named = content.get("model", model)
        body = _encode_canonical((named, content))
    except (AttributeError, *_NOT_JSON):
        return None
    return hashlib.blake2b(body, digest_size=_HASH_BYTES).hexdigest()


def response_text(response: Response, max_bytes: int) -> str | None:
    """Return a response as JSON text for the record; None when it is no JSON, or too long.

    It is not JSON when it would come back as something else: NaN, a tuple, a key that is a number.
    """
    recorded = RecordedResponse(response.content, response.error, response.model_name)
    try:
        text = msgspec.json.encode(recorded)
        if len(text) > max_bytes or _decode(text) != recorded:
            return None
    except _NOT_JSON:
        return None
    return text.decode()


def _read(text: str, request: Request) -> Response | None:
    try:
        recorded = _decode(text)
    except (msgspec.DecodeError, RecursionError):
        log.warning("a recorded step cannot be read; the model is asked again")
        return None
    return Response(request, recorded.content, recorded.error, recorded.model)
