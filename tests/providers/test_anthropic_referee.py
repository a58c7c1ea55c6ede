"""Ours against the official SDK on the same raw bytes: the same text when a stream is whole, an error when it is not.
And the other way round: the request we send is the one that the SDK sends for the same call.

Where they are known to differ the SDK is not the standard: it loses the first event after a BOM, fails on characters
cut in two, and takes a truncated stream for an answer. test_sse.py, test_dialects.py and test_anthropic.py cover those.
"""

from collections.abc import AsyncIterator, Mapping
from functools import partial

import anthropic
import pytest
from anthropic.types import MessageParam
from hypothesis import given
from hypothesis import strategies as st

from app.providers.anthropic import MAX_TOKENS, VERSION, Anthropic
from app.providers.provider import Image, Prompt, PromptMessage
from tests.providers.answers import failed
from tests.providers.referee import Both, agree_on_a_truncated_stream, agree_on_a_whole_stream
from tests.providers.streams import ENDINGS, ONE_SERVER, TEXTS, Wire, cuts, rendered
from tests.providers.wire import listener, raw_server, written

REASONS = ["end_turn", "max_tokens", "stop_sequence", "tool_use", "pause_turn", "refusal", "reason_of_tomorrow"]
PING = {"type": "ping"}
Event = Mapping[str, object]


def _block(index: int, block: Event, deltas: list[Event]) -> list[Event]:
    return [
        {"type": "content_block_start", "index": index, "content_block": block},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def _text(opening: str, texts: list[str]) -> tuple[Event, list[Event]]:
    return {"type": "text", "text": opening}, [{"type": "text_delta", "text": text} for text in texts]


THINKING: tuple[Event, list[Event]] = (
    {"type": "thinking", "thinking": "", "signature": ""},
    [{"type": "thinking_delta", "thinking": "Hm."}, {"type": "signature_delta", "signature": "c2ln"}],
)
TOOL: tuple[Event, list[Event]] = (
    {"type": "tool_use", "id": "t1", "name": "f", "input": {}},
    [{"type": "input_json_delta", "partial_json": '{"a":'}, {"type": "input_json_delta", "partial_json": " 1}"}],
)
BLOCKS = st.one_of(
    st.builds(_text, st.sampled_from(["", "", "So"]), st.lists(TEXTS, max_size=6)),
    st.sampled_from([THINKING, TOOL, ({"type": "block_of_tomorrow"}, [])]),
)


@st.composite
def wires(draw: st.DrawFn) -> Wire:
    ending = draw(ENDINGS)
    message: Event = {
        "id": "m1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [],
        "stop_reason": None,
    }
    usage = {"input_tokens": 3, "output_tokens": 1}
    events: list[Event] = [{"type": "message_start", "message": {**message, "usage": usage}}]
    for index, (block, deltas) in enumerate(draw(st.lists(BLOCKS, max_size=4))):
        events += [*([PING] if draw(st.booleans()) else []), *_block(index, block, deltas)]
    delta = {"stop_reason": draw(st.sampled_from(REASONS)), "stop_sequence": None}
    finish = {"type": "message_delta", "delta": delta, "usage": {"output_tokens": 9}}
    finished = b"".join(draw(rendered(event, ending, named=True)) for event in [*events, finish])
    stop = draw(rendered({"type": "message_stop"}, ending, named=True)) if draw(st.booleans()) else b""
    return Wire(finished + stop, draw(cuts()), whole_at=len(finished))


async def _by_sdk(sdk: anthropic.AsyncAnthropic) -> str:
    """The text of the message that the SDK puts together."""
    asked: MessageParam = {"role": "user", "content": "Hello"}
    async with sdk.messages.stream(model="any", messages=[asked], max_tokens=9) as stream:
        message = await stream.get_final_message()
    return "".join(block.text for block in message.content if block.type == "text")


@pytest.fixture
async def both() -> AsyncIterator[Both]:
    async with (
        raw_server(lambda writer: written(writer, readers.response)) as url,
        anthropic.AsyncAnthropic(base_url=url.removesuffix("/v1"), api_key="any", max_retries=0) as sdk,
    ):
        readers = Both(Anthropic("vendor", url), partial(_by_sdk, sdk))
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
    # The SDK's own answer to half a character, and to no message.
    await agree_on_a_truncated_stream(both, wire, share, politely, sdk_fails=(UnicodeDecodeError, AssertionError))


async def test_what_we_send_is_what_the_sdk_sends() -> None:
    ours = Prompt(
        "claude-any",
        [
            PromptMessage("system", "Be brief."),
            PromptMessage("user", "What is it? 🙂", [Image("image/png", b"\x89PNG"), Image("image/jpeg", b"\xff\xd8")]),
            PromptMessage("assistant", "A cat."),
            PromptMessage("user", "And\nthat?"),
        ],
        {"stop_sequences": ["END"]},
    )
    theirs: list[MessageParam] = [
        {
            "role": "user",
            "content": [
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw=="}},
                {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": "/9g="}},
                {"type": "text", "text": "What is it? 🙂"},
            ],
        },
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "And\nthat?"},
    ]
    async with listener() as (root, heard):
        provider = Anthropic("vendor", root, api_key="sk-any")
        await failed(provider, ours)
        await provider.aclose()
        async with anthropic.AsyncAnthropic(base_url=root, api_key="sk-any", max_retries=0) as sdk:
            with pytest.raises(anthropic.BadRequestError):
                await sdk.messages.create(
                    model="claude-any",
                    system="Be brief.",
                    messages=theirs,
                    max_tokens=MAX_TOKENS,
                    stop_sequences=["END"],
                    stream=True,
                )
    we, they = heard
    assert we.line == they.line == "POST /v1/messages HTTP/1.1"
    assert we.body == they.body
    assert we.headers["content-type"] == they.headers["content-type"]
    # Two deliberate differences: an older version of the API, which still takes sampling parameters, and the key in
    # the vendor's own header, as the vendor's examples and its compatible servers have it.
    assert they.headers["anthropic-version"] >= we.headers["anthropic-version"] == VERSION
    assert they.headers["authorization"] == f"Bearer {we.headers['x-api-key']}" == "Bearer sk-any"
