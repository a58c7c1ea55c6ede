"""Ours against the official SDK on the same raw bytes: the same text when a stream is whole, an error when it is not.
And the other way round: the request we send is the one that the SDK sends for the same call.

The SDK is no full reader of event streams, so it judges only what Flowise itself writes. It takes each line for an
event (JSON over several lines is lost on it) and deletes every `data:` inside a text; a BOM hides the first line; what
follows `end` is still read, and a truncated stream is an answer. test_sse.py, test_dialects.py and test_flowise.py
cover those.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from functools import partial
from urllib.parse import quote

import flowise
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from app.providers.flowise import Flowise
from app.providers.provider import Image, Prompt, PromptMessage
from tests.providers.answers import answered
from tests.providers.conftest import Remembered
from tests.providers.referee import Both, agree_on_a_truncated_stream, agree_on_a_whole_stream
from tests.providers.streams import ENDINGS, ONE_SERVER, TEXTS, Wire, cuts
from tests.providers.wire import chunked, receive

Event = Mapping[str, object]
OTHERS: list[Event] = [
    {"event": "start", "data": "So"},
    {"event": "agentFlowEvent", "data": "INPROGRESS"},
    {"event": "nextAgentFlow", "data": {"nodeId": "llm_0", "status": "FINISHED"}},
    {"event": "sourceDocuments", "data": [{"pageContent": "token", "metadata": {}}]},
    {"event": "usedTools", "data": [{"tool": "t", "toolInput": {}, "toolOutput": "x"}]},
    {"event": "usageMetadata", "data": {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}},
    {"event": "metadata", "data": {"chatId": "c", "sessionId": "s"}},
]
EVENTS = st.one_of(TEXTS.map(lambda text: {"event": "token", "data": text}), st.sampled_from(OTHERS))
END: Event = {"event": "end", "data": "[DONE]"}


@st.composite
def wires(draw: st.DrawFn) -> Wire:
    ending = draw(ENDINGS)
    events = [{"event": "token", "data": "Hi"}, *draw(st.lists(EVENTS, max_size=8))]
    before = b"".join(draw(_written(event, ending)) for event in events)
    stream = before + draw(_written(END, ending))
    assume(stream.count(b"data:") == len(events) + 1)
    return Wire(stream, draw(cuts()), whole_at=len(stream))


@st.composite
def _written(draw: st.DrawFn, event: Event, ending: bytes) -> bytes:
    """An event on one line, after one of the lines that Flowise and what is before it write."""
    text = json.dumps(event, ensure_ascii=draw(st.booleans()))
    data = text.encode("utf-8", "surrogatepass")
    if b"\xed" in data:  # a lone surrogate has no UTF-8; servers escape it
        data = json.dumps(event).encode()
    before = draw(st.sampled_from([[b"message:"], [b"message"], [b"event: message"], [b": ping"], [b"id: 1"], []]))
    return ending.join([*before, draw(st.sampled_from([b"data:", b"data: "])) + data, b"", b""])


async def _by_sdk(sdk: flowise.Flowise) -> str:
    data = flowise.PredictionData("any", "Hello", streaming=True)
    lines = await asyncio.to_thread(lambda: list(sdk.create_prediction(data)))
    return "".join(event["data"] for event in map(_parsed, lines) if event.get("event") == "token")


def _parsed(line: str) -> dict[str, str]:
    with suppress(ValueError):  # the SDK gives out a line that was cut, too
        event: dict[str, str] = json.loads(line)
        return event
    return {}


STREAMABLE = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    + chunked(b'{"isStreaming":true}')
    + b"0\r\n\r\n"
)


@pytest.fixture
async def both() -> AsyncIterator[Both]:
    """A server of its own: before each question the SDK asks whether the flow can stream."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head, _ = await receive(reader)
            writer.write(STREAMABLE if head.startswith(b"GET ") else readers.response)
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        readers = Both(Flowise("vendor", url), partial(_by_sdk, flowise.Flowise(url)))
        yield readers
        await readers.ours.aclose()


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK would use the environment's proxies."""
    monkeypatch.setenv("NO_PROXY", "*")


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


async def test_what_we_send_is_what_the_sdk_sends(demo_url: str, remembered: Remembered) -> None:
    model, root = "demo?delay_ms=0&tokens=1&key=sent", demo_url.removesuffix("/v1")
    asked = Prompt(
        model,
        [
            PromptMessage("system", "Be brief."),
            PromptMessage("user", "What is it? 🙂"),
            PromptMessage("assistant", "A cat."),
            PromptMessage("user", "And\nthat?", [Image("image/png", b"\x89PNG")]),
        ],
        {"temperature": 0.5},
        session_id="s1",
        top_k=3,
    )
    ours = Flowise("vendor", root, api_key="any")
    assert (await answered(ours, asked))[1] is None
    await ours.aclose()
    [we] = await remembered("sent")
    picture = flowise.IFileUpload("data:image/png;base64,iVBORw==", "file", "picture-1.png", "image/png")
    data = flowise.PredictionData(
        quote(model, safe=""),
        "And\nthat?",
        overrideConfig={"sessionId": "s1", "systemMessage": "Be brief.", "topK": 3, "temperature": 0.5},
        chatId=we["body"]["chatId"],
        streaming=True,
        history=[
            flowise.IMessage("What is it? 🙂", "userMessage", "userMessage", "What is it? 🙂"),
            flowise.IMessage("A cat.", "apiMessage", "apiMessage", "A cat."),
        ],
        uploads=[picture],
    )
    await asyncio.to_thread(lambda: list(flowise.Flowise(root, "any").create_prediction(data)))
    _, they = await remembered("sent")
    # The SDK repeats the chatflow's id, and every message of the history under its two old names.
    assert they["body"].pop("chatflowId") == quote(model, safe="")
    for message in they["body"]["history"]:
        assert (message.pop("message"), message.pop("type")) == (message["content"], message["role"])
    assert we["body"] == they["body"]
    assert we["headers"]["authorization"] == they["headers"]["authorization"]
    assert we["headers"]["content-type"] == they["headers"]["content-type"]
