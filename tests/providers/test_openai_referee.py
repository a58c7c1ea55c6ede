"""Ours against the official SDK on the same raw bytes: the same text when a stream is whole, an error when it is not.
And the other way round: the request we send is the one that the SDK sends for the same call.

Where they are known to differ the SDK is not the standard: it loses the first event after a BOM, fails on events
without data and on characters cut in two, and takes a truncated stream for an answer. test_sse.py, test_dialects.py
and test_openai.py cover those.
"""

from collections.abc import AsyncIterator
from functools import partial

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessageParam

from app.providers.openai import OpenAI
from app.providers.provider import FinishReason, Image, Prompt, PromptMessage
from tests.providers.answers import failed
from tests.providers.referee import Both, agree_on_a_truncated_stream, agree_on_a_whole_stream
from tests.providers.streams import ENDINGS, ONE_SERVER, TEXTS, Wire, cuts, rendered
from tests.providers.wire import listener, raw_server, written

REASONS: list[FinishReason] = ["stop", "length", "content_filter", "tool_calls"]


@st.composite
def wires(draw: st.DrawFn) -> Wire:
    ending = draw(ENDINGS)
    contents = draw(st.lists(TEXTS, max_size=8))
    events = [_chunk({"role": "assistant", "content": ""}), *(_chunk({"content": content}) for content in contents)]
    finish = _chunk(draw(st.sampled_from([{}, {"content": "end"}])), draw(st.sampled_from(REASONS)))
    before = b"".join(draw(rendered(event, ending)) for event in events)
    finished = before + draw(rendered(finish, ending))
    usage = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}}
    after = draw(rendered(usage, ending)) if draw(st.booleans()) else b""
    done = b"data: [DONE]" + ending * 2 if draw(st.booleans()) else b""
    return Wire(finished + after + done, draw(cuts()), whole_at=len(finished))


def _chunk(delta: dict[str, object], reason: str | None = None) -> dict[str, object]:
    stem = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return {**stem, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


async def _by_sdk(sdk: openai.AsyncOpenAI) -> str:
    stream = await sdk.chat.completions.create(
        model="any", messages=[{"role": "user", "content": "Hello"}], stream=True
    )
    async with stream:
        chunks = [chunk async for chunk in stream]
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


@pytest.fixture
async def both() -> AsyncIterator[Both]:
    async with (
        raw_server(lambda writer: written(writer, readers.response)) as url,
        openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as sdk,
    ):
        readers = Both(OpenAI("vendor", url), partial(_by_sdk, sdk))
        yield readers
        await readers.ours.aclose()


@ONE_SERVER
@given(wire=wires())
async def test_a_whole_stream_gives_the_sdks_text(both: Both, wire: Wire) -> None:
    await agree_on_a_whole_stream(both, wire)


@ONE_SERVER
@given(wire=wires(), share=st.floats(0, 1, exclude_max=True), politely=st.booleans())
async def test_a_truncated_stream_is_an_error_after_the_same_text(
    both: Both, wire: Wire, share: float, politely: bool
) -> None:
    # The SDK's own answer to a line cut inside a character.
    await agree_on_a_truncated_stream(both, wire, share, politely, sdk_fails=(UnicodeDecodeError,))


async def test_what_we_send_is_what_the_sdk_sends() -> None:
    ours = Prompt(
        "gpt-any",
        [
            PromptMessage("system", "Answer in JSON."),
            PromptMessage("user", "What is it? 🙂", [Image("image/png", b"\x89PNG"), Image("image/jpeg", b"\xff\xd8")]),
            PromptMessage("assistant", "A cat."),
            PromptMessage("user", "And\nthat?"),
        ],
        {"temperature": 0.5, "seed": 7},
        max_tokens=300,
        json_output=True,
    )
    theirs: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": "Answer in JSON."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is it? 🙂"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw=="}},
                {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,/9g="}},
            ],
        },
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "And\nthat?"},
    ]
    async with listener() as (root, heard):
        provider = OpenAI("vendor", f"{root}/v1", api_key="sk-any")
        await failed(provider, ours)
        await provider.aclose()
        async with openai.AsyncOpenAI(base_url=f"{root}/v1", api_key="sk-any", max_retries=0) as sdk:
            with pytest.raises(openai.BadRequestError):
                await sdk.chat.completions.create(
                    model="gpt-any",
                    messages=theirs,
                    temperature=0.5,
                    seed=7,
                    max_completion_tokens=300,
                    response_format={"type": "json_object"},
                    stream=True,
                    stream_options={"include_usage": True},
                )
    we, they = heard
    assert we.line == they.line == "POST /v1/chat/completions HTTP/1.1"
    assert we.body == they.body
    assert all(we.headers[name] == they.headers[name] for name in ("authorization", "content-type"))
