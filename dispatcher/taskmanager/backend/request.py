"""What a task asks of a model, and what it gets back."""

from __future__ import annotations

import copy
from typing import Any


class Request:
    """One model request: `content` is the body of an OpenAI-style call, copied deeply.

    A body with `messages` is a chat, with `prompt` a completion, with `input` embeddings.
    `context` is the task's own and comes back as `response.request.context`.
    """

    __slots__ = ("content", "context")

    def __init__(self, content: dict[str, Any], context: Any = None) -> None:
        self.content: dict[str, Any] = copy.deepcopy(content)
        self.context = context

    def __repr__(self) -> str:
        return f"Request({self.content!r})"


class Response:
    """The raw answer to a request: `content` is the server's whole JSON, or `error` is set."""

    __slots__ = ("content", "error", "model_name", "request")

    def __init__(
        self,
        request: Request,
        content: dict[str, Any] | None = None,
        error: Any = None,
        model_name: str | None = None,
    ) -> None:
        self.request = request
        self.content = content
        self.error = error
        self.model_name = model_name

    @classmethod
    def from_error(cls, request: Request, error: Any, model_name: str | None = None) -> Response:
        """Build the answer to a request that failed for good."""
        return cls(request, error=error, model_name=model_name)

    @property
    def is_success(self) -> bool:
        """True when there is no error and the server's answer is there."""
        return self.error is None and self.content is not None

    def get_text(self, n: int | None = None) -> Any:
        """Return the first choice's text, or the first `n` choices' texts as a list.

        Works for chat and text completions. None when there is no text (an error, embeddings,
        a message that holds only tool calls).
        """
        choices = (self.content or {}).get("choices") if isinstance(self.content, dict) else None
        if not isinstance(choices, list) or not choices:
            return None
        if n is None:
            return _choice_text(choices[0])
        return [_choice_text(choice) for choice in choices[:n]]

    def __repr__(self) -> str:
        outcome = f"error={self.error!r}" if self.error is not None else f"text={self.get_text()!r}"
        return f"Response({outcome})"


def _choice_text(choice: Any) -> str | None:
    if not isinstance(choice, dict):
        return None
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    return text if isinstance(text, str) else None
