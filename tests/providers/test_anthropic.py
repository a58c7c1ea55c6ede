"""Anthropic's own: the prompt in the shape the vendor accepts, and its events, blocks, reasons, counts and errors."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.demo.answers import tokens
from app.providers.anthropic import MAX_TOKENS, NOTHING, VERSION
from app.providers.provider import Finish, Image, Prompt, PromptMessage, Provider, Role, Text, Usage
from tests.providers.answers import answered, failed, played, prompt, text_of
from tests.providers.conftest import Connect, Remembered
from tests.providers.dialects import ANTHROPIC, Dialect, event
from tests.providers.wire import as_stream, raw_server, written

FAST = "demo?delay_ms=0&tokens=20"
STOP = event("message_stop")


@pytest.fixture
def dialect() -> Dialect:
    return ANTHROPIC


def delta(text: object, index: int = 0, kind: str = "text_delta") -> bytes:
    return event("content_block_delta", index=index, delta={"type": kind, "text": text})


def finish(reason: object = "end_turn", **usage: object) -> bytes:
    return event("message_delta", delta={"stop_reason": reason, "stop_sequence": None}, usage=usage)


async def sent(provider: Provider, messages: list[PromptMessage], **options: Any) -> dict[str, Any]:
    """The body that reaches the provider, which would refuse what the vendor refuses."""
    chunks, error = await answered(provider, Prompt("demo?echo=1&delay_ms=0", messages, **options))
    assert error is None, error.detail
    body: dict[str, Any] = json.loads(text_of(chunks))
    return body


async def test_the_request_is_the_vendors(connect: Connect, remembered: Remembered) -> None:
    model = f"{FAST}&key=request"
    messages = [
        PromptMessage("system", "Be brief."),
        PromptMessage("user", "Hi"),
        PromptMessage("assistant", "Yo"),
        PromptMessage("system", "Be kind."),
        PromptMessage("user", "What now?"),
    ]
    parameters = {"temperature": 0.9, "stream": False, "model": "other", "messages": [], "system": "Be rude."}
    await answered(connect(), Prompt(model, messages, parameters, max_tokens=500, json_output=True, top_k=3))
    [record] = await remembered("request")
    assert record["body"] == {
        "model": model,
        "system": "Be brief.\n\nBe kind.",
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yo"},
            {"role": "user", "content": "What now?"},
        ],
        "max_tokens": 500,
        "temperature": 0.9,
        "stream": True,
    }
    assert record["headers"]["anthropic-version"] == VERSION
    assert record["headers"]["x-api-key"].startswith("sha256:")
    assert not {"authorization", "cookie"} & set(record["headers"])


async def test_a_limit_is_always_sent_and_a_parameter_may_set_it(connect: Connect) -> None:
    asked = [PromptMessage("user", "Hi")]
    assert (await sent(connect(), asked))["max_tokens"] == MAX_TOKENS
    assert (await sent(connect(), asked, max_tokens=7))["max_tokens"] == 7
    assert (await sent(connect(), asked, max_tokens=7, parameters={"max_tokens": 9}))["max_tokens"] == 9


async def test_pictures_come_before_the_text(connect: Connect) -> None:
    body = await sent(connect(), [PromptMessage("user", "What is it?", [Image("image/png", b"\x89PNG")])])
    [message] = body["messages"]
    assert message["content"] == [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw=="}},
        {"type": "text", "text": "What is it?"},
    ]


async def test_a_picture_needs_no_text(connect: Connect) -> None:
    body = await sent(connect(), [PromptMessage("user", " ", [Image("image/png", b"\x89PNG")])])
    assert [block["type"] for block in body["messages"][0]["content"]] == ["image"]


@pytest.mark.parametrize(
    ("told", "turns"),
    [
        ([("user", "a"), ("user", "b")], [("user", ["a", "b"])]),
        ([("assistant", "Hello!"), ("user", "Hi")], [("user", [NOTHING]), ("assistant", ["Hello!"]), ("user", ["Hi"])]),
        ([("user", "a"), ("assistant", " \n"), ("user", "b")], [("user", ["a", "b"])]),
        ([("user", "a"), ("assistant", "b"), ("user", "")],
         [("user", ["a"]), ("assistant", ["b"]), ("user", [NOTHING])]),
        ([("system", ""), ("system", "Go.")], [("user", [NOTHING])]),
        ([], [("user", [NOTHING])]),
    ],
)  # fmt: skip
async def test_turns_alternate_and_none_is_blank(
    connect: Connect, told: list[tuple[Role, str]], turns: list[tuple[str, list[str]]]
) -> None:
    body = await sent(connect(), [PromptMessage(role, text) for role, text in told])
    assert [(turn["role"], texts_of(turn)) for turn in body["messages"]] == turns


def texts_of(turn: dict[str, Any]) -> list[str]:
    content = turn["content"]
    return [content] if isinstance(content, str) else [block["text"] for block in content if block["type"] == "text"]


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
PICTURES = st.lists(st.just(Image("image/png", b"\x89PNG")), max_size=2)
SPOKEN = st.one_of(
    st.builds(PromptMessage, st.just("user"), WORDS, PICTURES),
    st.builds(PromptMessage, st.sampled_from(["system", "assistant"]), WORDS),
)
MESSAGES = st.lists(SPOKEN)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=MESSAGES)
async def test_whatever_was_said_the_vendor_accepts_it_and_no_word_is_lost(
    connect: Connect, messages: list[PromptMessage]
) -> None:
    body = await sent(connect(), messages)
    roles = [turn["role"] for turn in body["messages"]]
    assert roles == ["user" if place % 2 == 0 else "assistant" for place in range(len(roles))]
    spoken = [text for turn in body["messages"] for text in texts_of(turn) if text != NOTHING]
    assert spoken == [m.content for m in messages if m.role != "system" and m.content.strip() and m.content != NOTHING]
    assert body.get("system", "") == "\n\n".join(
        m.content for m in messages if m.role == "system" and m.content.strip()
    )


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
async def test_the_url_may_end_in_the_version_or_not(connect: Connect, demo_url: str, ending: str) -> None:
    provider = connect(demo_url.removesuffix("/v1") + ending)
    chunks, error = await answered(provider, prompt(FAST))
    assert (text_of(chunks), error) == ("".join(tokens("Hello", 20)), None)
    assert await provider.check() == "Provider 'vendor' answers and offers 3 models."


@pytest.mark.parametrize(
    ("reason", "expected"),
    [("end_turn", "stop"), ("stop_sequence", "stop"), ("pause_turn", "stop"), ("max_tokens", "length"),
     ("model_context_window_exceeded", "length"), ("refusal", "content_filter"), ("tool_use", "tool_calls"),
     ("something_new", "stop")],
)  # fmt: skip
async def test_reasons_become_ours(connect: Connect, reason: str, expected: str) -> None:
    text, finished, error = await played(connect, delta("Hi"), finish(reason), STOP)
    assert (text, error) == ("Hi", None)
    assert finished is not None
    assert finished.reason == expected


@pytest.mark.parametrize("reason", [None, 7, ["end_turn"]])
async def test_a_delta_without_a_reason_finishes_nothing(connect: Connect, reason: object) -> None:
    text, finished, error = await played(connect, delta("Hi"), finish(reason))
    assert (text, finished) == ("Hi", None)
    assert error is not None


async def test_a_refusal_may_come_before_any_word(connect: Connect) -> None:
    assert await played(connect, finish("refusal"), STOP) == ("", Finish("content_filter"), None)


async def test_text_of_all_text_blocks_and_of_nothing_else(connect: Connect) -> None:
    events = [
        event("content_block_start", index=0, content_block={"type": "thinking", "thinking": "Hm", "text": "no"}),
        event("content_block_delta", index=0, delta={"type": "thinking_delta", "thinking": "Hm"}),
        event("content_block_delta", index=0, delta={"type": "signature_delta", "signature": "x"}),
        event("content_block_stop", index=0),
        event("content_block_start", index=1, content_block={"type": "text", "text": "One"}),
        delta(", two", index=1),
        event("content_block_delta", index=1, delta={"type": "citations_delta", "citation": {}}),
        event("content_block_start", index=2, content_block={"type": "tool_use", "name": "f", "input": {}}),
        event("content_block_delta", index=2, delta={"type": "input_json_delta", "partial_json": "{}"}),
        event("content_block_start", index=3, content_block={"type": "text", "text": ""}),
        delta(", three", index=3),
        delta("no", kind="text_of_tomorrow"),
    ]
    assert await played(connect, *events, finish(), STOP) == ("One, two, three", Finish("stop"), None)


async def test_u11_odd_shapes_are_ignored(connect: Connect) -> None:
    odd = [
        event("ping"), event("message_start"), event("message_start", message=7), event("message_start", message={}),
        event("message_start", message={"usage": "many"}), event("content_block_start", content_block=[]),
        event("content_block_delta", delta=7), event("content_block_delta", delta={"type": "text_delta"}),
        delta(["parts"]), delta(None), event("message_delta"), event("message_delta", delta=[], usage=[1]),
        event(type=["message_stop"]), b"data:\n\n", b"data: 7\n\n", b"data: [1]\n\n", b"event: message_stop\n\n",
        event(type="error_of_tomorrow", error=None),
    ]  # fmt: skip
    assert await played(connect, *odd, delta("Hi"), *odd, finish(), *odd) == ("Hi", Finish("stop"), None)


async def test_u11_nothing_of_a_stream_after_its_finish_is_text(connect: Connect) -> None:
    late = [delta("more"), finish("max_tokens"), event("error", error={"type": "api_error"})]
    assert await played(connect, delta("Hi"), finish(), *late) == ("Hi", Finish("stop"), None)


@pytest.mark.parametrize(
    ("kind", "expected", "retryable"),
    [
        ("rate_limit_error", "rate_limited", True),
        ("overloaded_error", "unavailable", True),
        ("api_error", "unavailable", True),
        ("timeout_error", "unavailable", True),
        ("invalid_request_error", "rejected", False),
        ("not_found_error", "rejected", False),
        ("request_too_large", "rejected", False),
        ("authentication_error", "refused", False),
        ("permission_error", "refused", False),
        ("billing_error", "refused", False),
        ("error_of_tomorrow", "unavailable", True),
    ],
)
async def test_u8_errors_are_told_apart_by_their_type(
    connect: Connect, kind: str, expected: str, retryable: bool
) -> None:
    failure = event("error", error={"type": kind, "message": "No."})
    text, finished, error = await played(connect, delta("Hi"), failure, delta("no"), finish())
    assert (text, finished) == ("Hi", None)
    assert error is not None
    assert (error.kind, error.retryable) == (expected, retryable)
    assert error.detail.endswith(": No.")


@pytest.mark.parametrize(
    "failure",
    [event("error"), event("error", error=[1]), event("error", error="No."), event(error={"message": "No."}),
     event(error="No.")],
)  # fmt: skip
async def test_u8_errors_of_any_shape(connect: Connect, failure: bytes) -> None:
    text, finished, error = await played(connect, delta("Hi"), failure, finish())
    assert (text, finished) == ("Hi", None)
    assert error is not None
    assert error.retryable


async def test_u2_an_overloaded_vendor_may_be_asked_again(connect: Connect) -> None:
    error = await failed(connect(), prompt("demo?fault=status&status=529&retry_after=2"))
    assert (error.kind, error.retryable, error.retry_after) == ("unavailable", True, 2)


START = {"input_tokens": 10, "cache_creation_input_tokens": 200, "cache_read_input_tokens": 3000, "output_tokens": 1}


@pytest.mark.parametrize(
    ("start", "later", "usage"),
    [
        (START, [{"output_tokens": 7}], Usage(3210, 7)),
        (START, [{"output_tokens": 7}, {"output_tokens": 9}], Usage(3210, 9)),
        (START, [{"input_tokens": 11, "output_tokens": 7}], Usage(3211, 7)),
        ({"input_tokens": 10, "cache_read_input_tokens": None}, [{"output_tokens": 7}], Usage(10, 7)),
        ({}, [{"input_tokens": 10, "output_tokens": 7}], Usage(10, 7)),
        (START, [{"output_tokens": "7"}], Usage(3210, 1)),
        ({"input_tokens": -1}, [{"output_tokens": 2**31}], None),
    ],
)
async def test_usage_is_one_chunk_with_all_that_was_read(
    connect: Connect, start: dict[str, object], later: list[dict[str, object]], usage: Usage | None
) -> None:
    events = [event("message_start", message={"usage": start}), delta("Hi")]
    deltas = [event("message_delta", delta={}, usage=counts) for counts in later]
    stream = as_stream([*events, *deltas, finish(), STOP])
    async with raw_server(lambda writer: written(writer, stream)) as url:
        chunks, error = await answered(connect(url), prompt("any"))
    assert error is None
    assert chunks == [Text("Hi"), Finish("stop"), *([usage] if usage else [])]
