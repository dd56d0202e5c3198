"""Streamed answers, put together again: as the unstreamed call gives them, and as openai does."""

from __future__ import annotations

import itertools
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from dispatcher.fakellm import FakeLLMSettings, Rule, _Call
from dispatcher.taskmanager.backend.streaming import (
    DONE,
    AnswerBuilder,
    EventParser,
    StreamError,
)

HEAD = {"id": "chatcmpl-1", "created": 1_723_733_419, "model": "m"}


def chat(*deltas: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    """Chunks with one choice each: `chat({"content": "a"}, {"content": "b"})`."""
    return [
        chunk({"index": 0, "delta": delta, "finish_reason": None}, **fields) for delta in deltas
    ]


def chunk(*choices: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**HEAD, "object": "chat.completion.chunk", "choices": list(choices), **fields}


def end(reason: str = "stop", index: int = 0, **fields: Any) -> dict[str, Any]:
    return chunk({"index": index, "delta": {}, "finish_reason": reason, **fields})


def stream(*chunks: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in chunks)


def parsed(data: bytes, cuts: list[int] | None = None) -> list[Any]:
    parser = EventParser()
    ends = [*sorted(cuts or ()), len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise([0, *ends])]
    return [event for piece in pieces for event in parser.feed(piece)]


def built(*chunks: dict[str, Any]) -> dict[str, Any]:
    builder = AnswerBuilder()
    for each in msgspec.json.decode(msgspec.json.encode(chunks)):
        builder.add(each)
    return builder.answer()


def message(*chunks: dict[str, Any]) -> dict[str, Any]:
    (choice,) = built(*chunks)["choices"]
    found = choice["message"]
    assert isinstance(found, dict)
    return found


# ---- Events

BYTES = (
    b": ping\n\n"
    b'data: {"a": "\xc3\xa9\xe2\x82\xac"}\n\n'
    b'event: message\r\nid: 7\r\nretry: 10\r\ndata:{"b":\r\ndata:  2}\r\n\r\n'
    b": keep-alive\r\r"
    b'data: {"c": 3}\r\r'
    b"\n"
    b"data: [DONE]\n\n"
)
EVENTS = [{"a": "é€"}, {"b": 2}, {"c": 3}, DONE]


def test_events_are_read_with_every_line_end_and_comments_are_not_events() -> None:
    assert parsed(BYTES) == EVENTS


@given(st.lists(st.integers(0, len(BYTES)), max_size=20))
def test_events_may_be_cut_anywhere(cuts: list[int]) -> None:
    assert parsed(BYTES, cuts) == EVENTS


def test_events_may_come_byte_by_byte() -> None:
    assert parsed(BYTES, list(range(len(BYTES)))) == EVENTS


def test_a_cut_within_a_line_end_does_not_end_an_event_of_two_lines() -> None:
    data = b'data: {"b":\r\ndata: 2}\r\n\r\n'
    assert [parsed(data, [cut]) for cut in range(len(data))] == [[{"b": 2}]] * len(data)


def test_two_line_ends_of_different_kinds_are_two() -> None:
    data = b'data: {"a": 1}\r\n\ndata: {"b": 2}\n\n'
    assert parsed(data, list(range(len(data)))) == [{"a": 1}, {"b": 2}]


def test_an_event_that_was_not_ended_is_not_delivered() -> None:
    assert parsed(b'data: {"a": 1}\n\ndata: {"b": 2}\n') == [{"a": 1}]


@pytest.mark.parametrize("data", [b"<html>", b"7", b'{"a": ', b"\xff", b'["a"]', b"[" * 9999])
def test_an_event_that_is_no_object_is_an_error_that_quotes_it(data: bytes) -> None:
    with pytest.raises(StreamError, match="no answer") as caught:
        parsed(b"data: " + data + b"\n\n")
    assert data[:1] == b"\xff" or data[:3].decode() in str(caught.value)
    assert len(str(caught.value)) < 300


# ---- A chat


def test_a_chat_is_what_the_unstreamed_call_gives() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    answer = built(
        *chat({"role": "assistant", "content": ""}, {"content": "Hel"}, {"content": "lo"}),
        end(stop_reason=None),
        {**chunk(), "usage": usage, "system_fingerprint": "fp"},
    )
    said = {"role": "assistant", "content": "Hello"}
    assert answer == {
        **HEAD,
        "object": "chat.completion",
        "system_fingerprint": "fp",
        "choices": [{"index": 0, "message": said, "finish_reason": "stop", "stop_reason": None}],
        "usage": usage,
    }


def test_the_last_chunk_of_cerebras_brings_usage_and_times() -> None:
    times = {"queue_time": 7e-05, "total_time": 0.02, "created": 1}
    last = {**end(), "usage": {"total_tokens": 5}, "time_info": times}
    answer = built(*chat({"role": "assistant"}, {"content": "x"}), last)
    assert answer["time_info"] == times
    assert answer["usage"] == {"total_tokens": 5}


def test_what_is_not_known_is_kept_and_null_takes_the_place_of_nothing() -> None:
    answer = built(
        *chat({"content": "a", "mood": "go"}, prompt_token_ids=[1, 2], tier="flex", cost=3),
        *chat({"content": None, "mood": "od", "calm": 0}, prompt_token_ids=None, cost=0),
        chunk({"index": 0, "delta": None, "token_ids": [5], "stop_reason": None}),
        chunk({"index": 0, "token_ids": [6, 7], "stop_reason": 0, "finish_reason": "stop"}),
        chunk({"index": 0, "stop_reason": None, "finish_reason": None}),
        {**chunk(), "id": "", "object": "", "obfuscation": "aXb"},
    )
    (choice,) = answer.pop("choices")
    whole = {"prompt_token_ids": [1, 2], "tier": "flex", "cost": 0}
    assert answer == {**HEAD, "object": "chat.completion", **whole}
    assert choice["message"] == {
        "role": "assistant",
        "content": "a",
        "mood": "good",
        "calm": 0,
    }
    assert choice["token_ids"] == [5, 6, 7]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", 0)


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content", "refusal"])
def test_reasoning_and_refusal_are_joined_and_alone_leave_no_content(field: str) -> None:
    begun = {"role": "assistant", "content": ""}
    said = message(*chat(begun, {field: "We "}, {field: "think"}), end("length"))
    assert said == {"role": "assistant", "content": None, field: "We think"}
    said = message(*chat(begun, {field: "We"}, {"content": "Yes"}), end())
    assert said == {"role": "assistant", "content": "Yes", field: "We"}


def test_a_message_without_content_has_content_none_and_an_empty_one_stays_empty() -> None:
    assert message(*chat({"role": "assistant"}), end()) == {"role": "assistant", "content": None}
    assert message(*chat({"content": ""}), end())["content"] == ""


def call(index: int, **function: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": index, "function": function}]}


def test_tool_calls_are_joined_by_their_index() -> None:
    def head(index: int, name: str) -> dict[str, Any]:
        entry = {"id": f"c{index}", "type": "function", **call(index, name=name, arguments="")}
        return {"tool_calls": [{**entry.pop("tool_calls")[0], **entry}]}

    said = message(
        *chat({"role": "assistant", "content": ""}, head(0, "get"), call(0, arguments='{"a')),
        *chat(head(1, "put"), call(1, arguments="{}"), call(0, arguments='": 1}')),
        end("tool_calls"),
    )
    assert said == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c0", "type": "function", "function": {"name": "get", "arguments": '{"a": 1}'}},
            {"id": "c1", "type": "function", "function": {"name": "put", "arguments": "{}"}},
        ],
    }


def test_names_that_come_with_every_part_are_not_joined() -> None:
    entry = {"index": 0, "id": "c", "type": "function"}
    parts = [{**entry, "function": {"name": "get", "arguments": text}} for text in ("{", "}")]
    said = message(*chat(*({"role": "assistant", "tool_calls": [part]} for part in parts)))
    assert said["role"] == "assistant"
    assert said["tool_calls"] == [
        {"id": "c", "type": "function", "function": {"name": "get", "arguments": "{}"}}
    ]


def test_tool_calls_without_an_index_begin_with_their_id() -> None:
    said = message(
        *chat(
            {"tool_calls": [{"id": "a", "function": {"name": "get", "arguments": "{"}}]},
            {"tool_calls": [{"function": {"arguments": "}"}}]},
            {"tool_calls": [{"id": "b", "function": {"name": "put", "arguments": "[]"}}]},
        )
    )
    assert [c["function"]["arguments"] for c in said["tool_calls"]] == ["{}", "[]"]


def test_an_empty_list_of_tool_calls_is_none() -> None:
    assert "tool_calls" not in message(*chat({"content": "a", "tool_calls": []}), end())


def test_a_function_call_is_joined() -> None:
    parts = ({"name": "get", "arguments": ""}, {"arguments": "{"}, {"arguments": "}"})
    said = message(*chat(*({"function_call": part} for part in parts)), end("function_call"))
    assert said["function_call"] == {"name": "get", "arguments": "{}"}
    assert said["content"] is None


def test_lists_in_a_message_grow_and_entries_with_an_index_are_joined() -> None:
    details = [{"reasoning_details": [{"index": 0, "type": "t", "text": x}]} for x in "ab"]
    notes = [{"annotations": [{"url": x}]} for x in "cd"]
    said = message(*chat(*details, *notes, {"audio": {"id": "x", "data": "e"}}))
    assert said["reasoning_details"] == [{"index": 0, "type": "t", "text": "ab"}]
    assert said["annotations"] == [{"url": "c"}, {"url": "d"}]
    assert said["audio"] == {"id": "x", "data": "e"}


def test_a_list_as_content_is_kept_and_an_empty_text_behind_it_is_nothing() -> None:
    parts = [{"type": "thinking", "text": "hm"}]
    said = message(*chat({"content": ""}, {"content": parts}, {"content": ""}), end())
    assert said["content"] == parts


def test_logprobs_are_joined() -> None:
    def part(token: str) -> dict[str, Any]:
        probs = {"content": [{"token": token, "logprob": 0.0, "top_logprobs": []}], "refusal": None}
        choice = {"index": 0, "delta": {"content": token}, "logprobs": probs}
        return chunk({**choice, "finish_reason": None})

    (choice,) = built(*chat({"role": "assistant"}), part("a"), part("b"), end(logprobs=None))[
        "choices"
    ]
    assert [each["token"] for each in choice["logprobs"]["content"]] == ["a", "b"]
    assert choice["logprobs"]["refusal"] is None


def test_choices_that_come_side_by_side_stand_in_order() -> None:
    parts = [(2, "x"), (0, "a"), (1, "k"), (0, "b"), (2, "y")]
    chunks = [chunk({"index": i, "delta": {"content": text}}) for i, text in parts]
    answer = built(*chunks, *(end(index=i) for i in range(3)))
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert [c["message"]["content"] for c in answer["choices"]] == ["ab", "k", "xy"]


# ---- A completion


def test_a_completion_is_what_the_unstreamed_call_gives() -> None:
    def part(text: str, reason: str | None = None) -> dict[str, Any]:
        probs = {"tokens": [text], "token_logprobs": [-1.0], "top_logprobs": None}
        choice = {"index": 0, "text": text, "logprobs": probs, "finish_reason": reason}
        return {**HEAD, "object": "text_completion", "choices": [choice]}

    answer = built(part("a"), part("b"), part("", "length"))
    probs = {"tokens": ["a", "b", ""], "token_logprobs": [-1.0] * 3, "top_logprobs": None}
    choice = {"index": 0, "text": "ab", "logprobs": probs, "finish_reason": "length"}
    assert answer == {**HEAD, "object": "text_completion", "choices": [choice]}


# ---- Its beginning and its end


@pytest.mark.parametrize(
    ("delta", "is_token"),
    [
        ({"role": "assistant", "content": ""}, False),
        ({"role": "assistant", "refusal": None, "tool_calls": []}, False),
        ({"content": "a"}, True),
        ({"reasoning": "a"}, True),
        ({"reasoning_content": "a"}, True),
        (call(0, name="get"), True),
    ],
)
def test_the_first_token_is_the_first_text(delta: dict[str, Any], is_token: bool) -> None:
    builder = AnswerBuilder()
    builder.add(chat(delta)[0])
    assert builder.has_token is is_token
    builder.add(end())
    assert builder.has_token is is_token


def test_the_first_token_of_a_completion_is_its_first_text() -> None:
    builder = AnswerBuilder()
    builder.add({"object": "text_completion", "choices": [{"index": 0, "text": ""}]})
    assert not builder.has_token
    builder.add({"object": "text_completion", "choices": [{"index": 0, "text": "a"}]})
    assert builder.has_token


def test_an_answer_is_complete_when_every_choice_has_its_finish_reason() -> None:
    builder = AnswerBuilder()
    assert not builder.is_complete
    for index in (0, 1):
        builder.add(chunk({"index": index, "delta": {"content": "a"}, "finish_reason": None}))
    builder.add(end(index=1))
    assert not builder.is_complete
    builder.add(end(index=0))
    assert builder.is_complete
    builder.add({**chunk(), "usage": {"total_tokens": 5}})
    assert builder.is_complete


def test_a_stream_without_a_chunk_is_no_answer() -> None:
    with pytest.raises(StreamError, match="before it said anything"):
        AnswerBuilder().answer()


@pytest.mark.parametrize(
    ("error", "message", "status"),
    [
        ({"error": {"message": "too long", "type": "x", "code": 400}}, "too long", 400),
        ({"object": "error", "message": "bad", "code": 503}, "bad", 503),
        ({"error": {"message": "slow", "code": "rate_limit_exceeded"}}, "slow", None),
        ({"error": {"message": "slow", "code": "429"}}, "slow", 429),
        ({"error": {"type": "overloaded"}, "status_code": 529}, "overloaded", 529),
        ({"error": "broken"}, "broken", None),
        ({"error": {"code": 7}}, "an error without a message", None),
        ({"error": {"message": "m", "code": "9" * 5000}}, "m", None),
    ],
)
def test_an_error_in_the_stream_is_raised(
    error: dict[str, Any], message: str, status: int | None
) -> None:
    builder = AnswerBuilder()
    builder.add(chat({"content": "a"})[0])
    with pytest.raises(StreamError) as caught:
        builder.add(error)
    assert (str(caught.value), caught.value.status) == (message, status)


def test_a_chunk_whose_error_is_null_is_none() -> None:
    assert message(*chat({"content": "a"}, error=None), end())["content"] == "a"


@pytest.mark.parametrize(
    "choices",
    [
        7,
        [7],
        [{"index": "a"}],
        [{"index": [1]}],
        [{"index": 0, "delta": "a"}],
        [{"index": 0, "delta": {"tool_calls": [7, {"index": 0}]}}],
        [{"index": 0, "delta": {"content": "a"}}, {"index": 0, "delta": {"content": ["b"]}}],
        [{"index": 0, "delta": {"content": ["a"]}}, {"index": 0, "delta": {"content": "b"}}],
    ],
)
def test_a_chunk_of_another_form_is_an_error(choices: Any) -> None:
    with pytest.raises(StreamError, match="no answer"):
        AnswerBuilder().add({**HEAD, "choices": choices})


# ---- Against fakellm and the openai package


@given(
    st.sampled_from(["/v1/chat/completions", "/v1/completions"]),
    st.integers(1, 4),
    st.none() | st.text("ab \né", max_size=12),
    st.none() | st.integers(1, 9),
    st.data(),
)
def test_a_stream_of_fakellm_is_its_unstreamed_answer_to_the_byte(
    path: str, n: int, reply: str | None, max_tokens: int | None, data: st.DataObject
) -> None:
    ask: dict[str, Any] = {"model": "m", "n": n, "stream_options": {"include_usage": True}}
    ask |= {"prompt": "hi", "messages": [{"role": "user", "content": "hi"}]}
    fake = _Call(1, path)
    fake.read(msgspec.json.encode(ask | ({"max_tokens": max_tokens} if max_tokens else {})))
    fake.compose(FakeLLMSettings(), None if reply is None else Rule(reply=reply))
    streamed = b"".join(fake.events())
    cuts = data.draw(st.lists(st.integers(0, len(streamed)), max_size=9))
    *chunks, last = parsed(streamed, cuts)
    assert last is DONE
    assert msgspec.json.encode(built(*chunks)) == fake.body()


_text = st.text('ab {}\n"é', max_size=6)
_pieces = st.lists(_text, max_size=4)


@st.composite
def _choice_parts(draw: st.DrawFn, index: int) -> list[dict[str, Any]]:
    """What a server streams for one choice, after the chunk with its role."""
    deltas: list[dict[str, Any]] = []
    field = draw(st.sampled_from(["reasoning", "reasoning_content"]))
    deltas += [{field: text} for text in draw(_pieces)]
    deltas += [{"content": text} for text in draw(_pieces)]
    deltas += [{"refusal": text} for text in draw(st.just([]) | _pieces)]
    for number in range(draw(st.integers(0, 2))):
        entry = {"index": number, "id": f"call-{number}", "type": "function"}
        deltas.append({"tool_calls": [{**entry, "function": {"name": "f", "arguments": ""}}]})
        deltas += [call(number, arguments=text) for text in draw(_pieces)]
    parts = []
    for delta in deltas:
        probs = None
        if draw(st.booleans()):
            token = {"token": "t", "logprob": draw(st.floats(-9, 0)), "bytes": None}
            probs = {"content": [{**token, "top_logprobs": []}], "refusal": None}
        parts.append({"index": index, "delta": delta, "logprobs": probs, "finish_reason": None})
    reason = draw(st.sampled_from(["stop", "length", "tool_calls"]))
    return [*parts, {"index": index, "delta": {}, "logprobs": None, "finish_reason": reason}]


@st.composite
def _streams(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Chunks of one to three choices, of which each keeps its own order."""
    count = draw(st.integers(1, 3))
    role = {"role": "assistant", "content": ""}
    chunks = [
        chunk({"index": i, "delta": role, "logprobs": None, "finish_reason": None})
        for i in range(count)
    ]
    waiting = [draw(_choice_parts(i)) for i in range(count)]
    while any(waiting):
        parts = draw(st.sampled_from([each for each in waiting if each]))
        chunks.append(chunk(parts.pop(0)))
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    chunks.append({**chunk(), "usage": usage})
    return chunks


def _as_openai_builds_it(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    state = ChatCompletionStreamState()
    for each in chunks:
        list(state.handle_chunk(ChatCompletionChunk.model_validate(each)))
    # Not the final completion: that one is parsed once more, for tools that it knows.
    answer: dict[str, Any] = state.current_completion_snapshot.to_dict(mode="json")
    for choice in answer["choices"]:
        choice.setdefault("logprobs", None)
        said = choice["message"]
        for name in [name for name in said if said[name] is None and name != "content"]:
            del said[name]  # a field of its type that no chunk had
        for each in said.get("tool_calls") or ():
            each["function"].pop("parsed_arguments", None)
            each.pop("index", None)
        if not said.get("tool_calls"):
            said.pop("tool_calls", None)
        beside = ("tool_calls", "refusal", "reasoning", "reasoning_content")
        if said["content"] == "" and any(said.get(name) for name in beside):
            said["content"] = None  # where unstreamed answers have none
    return answer


@given(_streams())
def test_an_answer_is_as_the_openai_package_puts_it_together(chunks: list[dict[str, Any]]) -> None:
    expected = _as_openai_builds_it(chunks)
    answer = built(*parsed(stream(*chunks)))
    expected.pop("system_fingerprint", None)
    assert answer == expected
