"""The OpenAI-compatible dialect's own: requests as configured, and events as its servers send them."""

import pytest

from app.demo.answers import tokens
from app.providers.provider import Finish, Image, Prompt, PromptMessage, Text, Usage
from tests.providers.answers import answered, played, prompt
from tests.providers.conftest import Connect, Remembered
from tests.providers.dialects import OPENAI, Dialect, event
from tests.providers.wire import as_stream, raw_server, written

FAST = "demo?delay_ms=0&tokens=20"
SAID = "".join(tokens("Hello", 20))


@pytest.fixture
def dialect() -> Dialect:
    return OPENAI


def delta(content: object = None, finish: object = None, index: int = 0) -> bytes:
    given = {} if content is None else {"content": content}
    return event(choices=[{"index": index, "delta": given, "finish_reason": finish}])


async def test_the_request_carries_prompt_parameters_and_key_and_nothing_can_turn_streaming_off(
    connect: Connect, remembered: Remembered
) -> None:
    provider = connect(limit_name="max_tokens")
    messages = [PromptMessage("system", "Be brief."), PromptMessage("user", "Hi"), PromptMessage("assistant", "Yo")]
    model = "demo?delay_ms=0&key=request"
    parameters = {"temperature": 0.9, "seed": 7, "stream": False, "model": "other", "messages": []}
    await answered(provider, Prompt(model, messages, parameters, max_tokens=500, json_output=True))
    [record] = await remembered("request")
    assert record["body"] == {
        "model": model,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yo"},
        ],
        "max_tokens": 500,
        "response_format": {"type": "json_object"},
        "temperature": 0.9,
        "seed": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert record["headers"]["accept-encoding"] == "identity"
    assert record["headers"]["authorization"].startswith("sha256:")
    assert "cookie" not in record["headers"]


async def test_pictures_travel_as_parts_beside_the_text(connect: Connect, remembered: Remembered) -> None:
    message = PromptMessage("user", "What is it?", [Image("image/png", b"\x89PNG")])
    await answered(connect(), Prompt(f"{FAST}&key=picture", [message]))
    [record] = await remembered("picture")
    assert record["body"]["messages"][0]["content"] == [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw=="}},
    ]


async def test_usage_need_not_be_asked_for(connect: Connect, remembered: Remembered) -> None:
    chunks, error = await answered(connect(include_usage=False), prompt(f"{FAST}&key=plain"))
    assert error is None
    assert chunks[-1] == Finish("stop")
    [record] = await remembered("plain")
    assert "stream_options" not in record["body"]


async def test_u7_done_ends_an_answer_that_named_no_reason(connect: Connect) -> None:
    assert await played(connect, delta("Hi"), b"data: [DONE]\n\n") == ("Hi", Finish("stop"), None)


async def test_u7_done_alone_is_no_answer(connect: Connect) -> None:
    text, finish, error = await played(connect, delta(""), b"data: [DONE]\n\n")
    assert (text, finish) == ("", None)
    assert error is not None


@pytest.mark.parametrize(
    ("reason", "expected"),
    [("stop", "stop"), ("length", "length"), ("content_filter", "content_filter"), ("tool_calls", "tool_calls"),
     ("function_call", "tool_calls"), ("eos_token", "stop"), (7, "stop")],
)  # fmt: skip
async def test_reasons_become_ours(connect: Connect, reason: object, expected: str) -> None:
    text, finish, error = await played(connect, delta("Hi", finish=""), delta("!", finish=reason))
    assert (text, error) == ("Hi!", None)
    assert finish is not None
    assert finish.reason == expected


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"message": "slow down", "code": 429}, "rate_limited"),
        ({"code": 401}, "refused"),
        ({"code": "context_length_exceeded"}, "unavailable"),
        ({"message": {"deep": 1}}, "unavailable"),
        ("plain words", "unavailable"),
        ([1], "unavailable"),
    ],
)
async def test_u8_errors_of_any_shape(connect: Connect, error: object, kind: str) -> None:
    text, finish, failure = await played(connect, delta("Hi"), event(error=error), delta("no", finish="stop"))
    assert (text, finish) == ("Hi", None)
    assert failure is not None
    assert failure.kind == kind


async def test_u8_an_error_as_finish_reason_is_an_error(connect: Connect) -> None:
    text, finish, failure = await played(connect, delta("Hi", finish="error"))
    assert (text, finish) == ("Hi", None)
    assert failure is not None


@pytest.mark.parametrize(
    ("contents", "text"),
    [
        (['"a\\ud83d"', '"\\ude00b"'], "a😀b"),
        (['"a\\ud83d"', '""', '"\\ude00b"'], "a😀b"),
        (['"a\\ud83d"', '"b"'], "a\ufffdb"),
        (['"\\ude00\\ud83d"'], "\ufffd\ufffd"),
        (['"\\ud83d\\ud83d"', '"\\ude00"'], "\ufffd😀"),
        (['"a\\ud83d"'], "a\ufffd"),
    ],
)
async def test_u10_halves_of_a_character_are_joined_over_deltas(
    connect: Connect, contents: list[str], text: str
) -> None:
    deltas = [b'data: {"choices":[{"delta":{"content":%s}}]}\n\n' % content.encode() for content in contents]
    assert await played(connect, *deltas, delta(finish="stop")) == (text, Finish("stop"), None)


async def test_u10_bytes_that_are_no_utf8_become_replacement_characters(connect: Connect) -> None:
    broken = delta("a?b").replace(b"?", b"\xf0\x9f")
    assert await played(connect, broken, delta(finish="stop")) == ("a\ufffdb", Finish("stop"), None)


async def test_u11_other_choices_and_odd_shapes_are_ignored(connect: Connect) -> None:
    odd = [
        event(choices=[]), event(choices=7), event(choices=[7]), event(choices=[{"delta": []}]), b"data:\n\n",
        event(choices=[{"delta": {"content": ["parts"]}}]), delta("no", index=1), event(usage={"prompt_tokens": -1}),
        event(usage="many"), b"data: 7\n\n", b"data: [1]\n\n", b"event: only\n\n",
    ]  # fmt: skip
    assert await played(connect, *odd, delta("Hi"), *odd, delta(finish="stop"), *odd) == ("Hi", Finish("stop"), None)


async def test_u11_nothing_of_a_stream_after_its_finish_is_text(connect: Connect) -> None:
    ended = await played(
        connect, delta("Hi", finish="stop"), delta("more"), delta(finish="length"), event(error="late")
    )
    assert ended == ("Hi", Finish("stop"), None)


async def test_usage_told_many_times_is_one_chunk(connect: Connect) -> None:
    counts = [event(choices=[], usage={"prompt_tokens": 3, "completion_tokens": n}) for n in (1, 2, 3)]
    async with raw_server(
        lambda writer: written(writer, as_stream([*counts, delta("Hi", finish="stop"), b"data: [DONE]\n\n"]))
    ) as url:
        chunks, error = await answered(connect(url), prompt("any"))
    assert error is None
    assert chunks == [Text("Hi"), Finish("stop"), Usage(3, 3)]
