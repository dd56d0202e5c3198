"""What is sent for what a task yields."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dispatcher.taskmanager.backend.bodies import Sending, prepare

MESSAGES = [{"role": "user", "content": "?"}]


def sent(content: Any, model: str | None = "m", **sending: Any) -> dict[str, Any]:
    """Return the body that goes out."""
    body = json.loads(prepare(content, model, Sending(**sending)).body)
    assert isinstance(body, dict)
    return body


@pytest.mark.parametrize(
    ("content", "path"),
    [
        ({"messages": MESSAGES}, "/chat/completions"),
        ({"prompt": "?"}, "/completions"),
        ({"input": "?"}, "/embeddings"),
    ],
)
def test_the_body_decides_which_call_it_is(content: dict[str, Any], path: str) -> None:
    assert prepare(content, "m", Sending()).path == path


def test_what_a_task_says_wins_over_the_defaults() -> None:
    defaults = {"temperature": 0.5, "seed": 7, "max_completion_tokens": 100}
    body = sent({"messages": MESSAGES, "temperature": 0, "max_tokens": 3}, generation=defaults)

    assert body == {
        "messages": MESSAGES,
        "temperature": 0,
        "max_tokens": 3,
        "seed": 7,
        "model": "m",
    }


def test_a_completion_gets_the_older_name_of_the_token_limit() -> None:
    body = sent({"prompt": "?"}, generation={"max_completion_tokens": 100, "top_p": 0.9})
    assert body == {"prompt": "?", "max_tokens": 100, "top_p": 0.9, "model": "m"}


def test_embeddings_are_neither_streamed_nor_given_generation_fields() -> None:
    body = sent({"input": ["?"]}, generation={"temperature": 1}, stream=True)
    assert body == {"input": ["?"], "model": "m"}


def test_a_stream_asks_for_its_token_counts() -> None:
    call = prepare({"messages": MESSAGES}, "m", Sending(stream=True))
    body = json.loads(call.body)

    assert call.streamed
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}


def test_a_task_may_ask_for_a_stream_or_refuse_it() -> None:
    asked = prepare({"messages": MESSAGES, "stream": True}, "m", Sending())
    refused = prepare({"messages": MESSAGES, "stream": False}, "m", Sending(stream=True))

    assert asked.streamed
    assert json.loads(asked.body)["stream_options"] == {"include_usage": True}
    assert not refused.streamed
    assert json.loads(refused.body)["stream"] is False


def test_a_name_of_this_run_becomes_the_models_real_name() -> None:
    names = frozenset({"judge"})
    content = {"messages": MESSAGES, "model": "judge"}
    call = prepare(content, "org/model", Sending(names=names))

    assert call.model == json.loads(call.body)["model"] == "org/model"
    assert content["model"] == "judge"  # the task's own is not touched
    assert sent({**content, "model": "other"}, "org/model", names=names)["model"] == "other"


def test_without_any_model_none_is_sent() -> None:
    assert sent({"prompt": "?"}, None) == {"prompt": "?"}


@pytest.mark.parametrize(
    "content", [{}, None, "text", {"messages": [object()]}, {"prompt": "\ud83d"}]
)
def test_what_cannot_be_sent_is_refused(content: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        prepare(content, "m", Sending())
