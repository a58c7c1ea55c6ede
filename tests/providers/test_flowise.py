"""Flowise's own: the prompt as a prediction, its events and documents, and that what nobody hears is aborted."""

import asyncio
import gc
import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.demo.answers import tokens
from app.providers.answer import PIECE
from app.providers.flowise import Flowise
from app.providers.provider import Deadlines, Finish, Image, Prompt, PromptMessage, Provider, Text, Usage
from tests.providers.answers import answered, failed, finish_of, played, prompt, text_of
from tests.providers.conftest import Connect, Remembered
from tests.providers.dialects import FLOWISE, Dialect, event
from tests.providers.wire import HEAD, as_stream, chunked, listener, raw_server, receive, written
from tests.serving import client_of

FAST = "demo?delay_ms=0&tokens=20"
STALLED = "demo?delay_ms=0&fault=stall"
SAID = "".join(tokens("Hello", 20))
HELLO = [PromptMessage("user", "Hello")]
END = event(event="end", data="[DONE]")
PIXEL = Image("image/png", b"\x89PNG")


@pytest.fixture
def dialect() -> Dialect:
    return FLOWISE


def token(data: object) -> bytes:
    return event(event="token", data=data)


async def sent(provider: Provider, messages: list[PromptMessage], **options: Any) -> dict[str, Any]:
    """The body that reaches the provider, which would refuse what Flowise refuses."""
    chunks, error = await answered(provider, Prompt("demo?echo=1&delay_ms=0", messages, **options))
    assert error is None, error.detail
    body: dict[str, Any] = json.loads(text_of(chunks))
    return body


# -- what is asked


async def test_the_request_is_a_prediction(connect: Connect, remembered: Remembered) -> None:
    messages = [
        PromptMessage("system", "Be brief."),
        PromptMessage("user", "Hi", [PIXEL]),
        PromptMessage("assistant", "Yo"),
        PromptMessage("system", "Be kind."),
        PromptMessage("user", "What now?", [PIXEL, Image("image/jpeg", b"\xff\xd8")]),
    ]
    asked = Prompt(
        f"{FAST}&key=request",
        messages,
        {"temperature": 0.9},
        max_tokens=500,
        json_output=True,
        top_k=3,
        session_id="s1",
    )
    await answered(connect(), asked)
    [record] = await remembered("request")
    chat = record["body"].pop("chatId")
    assert record["body"] == {
        "question": "What now?",
        "streaming": True,
        "history": [{"role": "userMessage", "content": "Hi"}, {"role": "apiMessage", "content": "Yo"}],
        "overrideConfig": {
            "sessionId": "s1",
            "systemMessage": "Be brief.\n\nBe kind.",
            "topK": 3,
            "maxTokens": 500,
            "temperature": 0.9,
        },
        "uploads": [
            {"data": "data:image/png;base64,iVBORw==", "type": "file", "name": "picture-1.png", "mime": "image/png"},
            {"data": "data:image/jpeg;base64,/9g=", "type": "file", "name": "picture-2.jpeg", "mime": "image/jpeg"},
        ],
    }
    assert len(chat) == 36
    assert record["headers"]["authorization"].startswith("sha256:")


async def test_nothing_is_overridden_with_nothing(connect: Connect) -> None:
    body = await sent(connect(), [PromptMessage("system", " \n"), *HELLO], session_id="")
    assert (body["overrideConfig"], body["history"], body["uploads"]) == ({}, [], [])


async def test_parameters_override_and_never_reach_the_rest_of_the_request(connect: Connect) -> None:
    parameters = {"sessionId": "mine", "systemMessage": "Sing.", "topK": 9, "question": "no", "streaming": False}
    body = await sent(
        connect(), [PromptMessage("system", "Talk."), *HELLO], parameters=parameters, session_id="s", top_k=1
    )
    assert body["overrideConfig"] == parameters
    assert (body["question"], body["streaming"]) == ("Hello", True)


async def test_each_call_is_a_chat_of_its_own_in_the_session(connect: Connect) -> None:
    first, second = [await sent(connect(), HELLO, session_id="s1") for _ in range(2)]
    assert first["chatId"] != second["chatId"]
    assert first["overrideConfig"] == second["overrideConfig"] == {"sessionId": "s1"}


async def test_what_follows_the_question_is_left_out_and_without_one_nothing_is_asked(connect: Connect) -> None:
    body = await sent(connect(), [*HELLO, PromptMessage("assistant", "Well,")])
    assert (body["question"], body["history"]) == ("Hello", [])
    error = await failed(connect(), Prompt(FAST, [PromptMessage("system", "x"), PromptMessage("assistant", "y")]))
    assert (error.kind, error.retryable) == ("rejected", False)


@pytest.mark.parametrize("suffix", ["", "/", "/api/v1", "/api/v1/", "/v1"])
async def test_the_url_may_end_in_the_version(suffix: str) -> None:
    async with listener() as (root, heard):
        for base in (root, f"{root}/below"):
            provider = Flowise("vendor", f"{base}{suffix}")
            await failed(provider, prompt("any"))
            await provider.aclose()
    paths = ["/api/v1/prediction/any", "/below/api/v1/prediction/any"]
    assert [request.line for request in heard] == [f"POST {path} HTTP/1.1" for path in paths]


@pytest.mark.parametrize("model", ["", ".", "..", "a/b", "../../x", "a\\b", "a\nb", "a\x00", "a\u2028b", "\ud83d"])
async def test_i10_what_cannot_be_an_id_never_gets_into_a_path(connect: Connect, model: str) -> None:
    error = await failed(connect(), prompt(model))
    assert (error.kind, error.retryable) == ("rejected", False)
    assert "chatflow" in error.detail


@pytest.fixture
async def heard() -> AsyncIterator[tuple[Flowise, list[str]]]:
    """A provider, and the request lines it sends."""
    lines: list[str] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, _ = await receive(reader)
        lines.append(head.decode().partition("\r\n")[0])
        writer.write(b"HTTP/1.1 400 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as server:
        provider = Flowise("vendor", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        yield provider, lines
        await provider.aclose()


IDS = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="/\\"), min_size=1, max_size=20)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(model=IDS.filter(lambda model: model not in (".", "..")))
async def test_i10_any_other_id_is_one_segment_of_the_path(heard: tuple[Flowise, list[str]], model: str) -> None:
    provider, lines = heard
    await failed(provider, prompt(model))
    method, path, _ = lines.pop().split(" ")
    *before, segment = path.split("/")
    assert (method, before) == ("POST", ["", "api", "v1", "prediction"])
    assert unquote(segment) == model
    assert "?" not in path
    assert "#" not in path


async def test_a_check_knows_flowise(connect: Connect) -> None:
    page = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 13\r\n\r\n<html></html>"
    async with raw_server(lambda writer: written(writer, page)) as url:
        with pytest.raises(Exception, match="base_url") as refused:
            await connect(url).check()
    assert getattr(refused.value, "kind", None) == "protocol"


# -- what is said


async def test_the_first_token_is_not_said_twice(connect: Connect) -> None:
    start = event(event="start", data="Hi")
    assert await played(connect, start, token("Hi"), token("!"), END) == ("Hi!", Finish("stop"), None)


@pytest.mark.parametrize("opening", [b"message:\n", b"message\n", b"event: token\n", b": ping\n", b""])
async def test_events_as_each_version_writes_them(connect: Connect, opening: bytes) -> None:
    stream = [opening + frame.replace(b"data: ", b"data:") for frame in (token("Hi"), END)]
    assert await played(connect, *stream) == ("Hi", Finish("stop"), None)


OTHERS = ["metadata", "sourceDocuments", "usedTools", "calledTools", "artifacts", "fileAnnotations", "agentReasoning",
          "nextAgent", "agentFlowEvent", "nextAgentFlow", "agentFlowExecutedData", "action", "thinking", "tool",
          "tts_start", "tts_data", "tts_end", "event_of_tomorrow"]  # fmt: skip


async def test_u11_all_other_events_and_odd_shapes_are_ignored(connect: Connect) -> None:
    odd = [
        *(event(event=name, data=data) for name in OTHERS for data in ("no", {"text": "no", "error": "no"}, None)),
        token(None), token(7), token(["no"]), token({"text": "no"}), event(event="token"), event(event=["token"]),
        event(event="usageMetadata", data="many"), event(text="no"), event(data="no"), event(event=None, error="no"),
        b"data:\n\n", b"data: 7\n\n", b'data: ["token"]\n\n', b"event: end\n\n", b"message\n\n",
    ]  # fmt: skip
    assert await played(connect, *odd, token("Hi"), *odd, END) == ("Hi", Finish("stop"), None)


async def test_u11_nothing_after_the_end_is_heard(connect: Connect) -> None:
    late = [token("more"), event(event="error", data="late"), event(event="abort", data="[DONE]")]
    assert await played(connect, token("Hi"), END, *late) == ("Hi", Finish("stop"), None)


async def test_u7_metadata_is_no_end_for_tokens_may_follow_it(connect: Connect) -> None:
    metadata = event(event="metadata", data={"chatId": "c"})
    assert await played(connect, token("Hi"), metadata, token("!"), END) == ("Hi!", Finish("stop"), None)
    text, finish, error = await played(connect, token("Hi"), metadata)
    assert (text, finish) == ("Hi", None)
    assert error is not None


async def test_u7_an_end_without_a_word_is_no_answer(connect: Connect) -> None:
    text, finish, error = await played(connect, event(event="metadata", data={"chatId": "c"}), END)
    assert (text, finish) == ("", None)
    assert error is not None
    assert error.retryable


@pytest.mark.parametrize(
    ("said", "kind", "retryable"),
    [
        ("Error: predictionsServices.buildChatflow - 429 Rate limit reached", "rate_limited", True),
        ("429 You exceeded your current quota", "rate_limited", True),
        ("[503 Service Unavailable] The model is overloaded", "unavailable", True),
        ("Error: predictionsServices.buildChatflow - Unauthorized", "refused", False),
        ("Unauthorized", "refused", False),
        ("401 Incorrect API key provided", "refused", False),
        ("Error: 400 This model's maximum context length is 8192 tokens", "rejected", False),
        ("Cannot read properties of undefined (reading 'x')", "unavailable", True),
        ("It found 404 documents", "unavailable", True),
        ("Error: 4040 documents are too many", "unavailable", True),
        ("", "unavailable", True),
        ({"message": "No.", "code": 429}, "rate_limited", True),
        ([1], "unavailable", True),
        (None, "unavailable", True),
    ],
)
async def test_u8_errors_are_told_apart_by_what_they_say(
    connect: Connect, said: object, kind: str, retryable: bool
) -> None:
    text, finish, error = await played(connect, token("Hi"), event(event="error", data=said), END)
    assert (text, finish) == ("Hi", None)
    assert error is not None
    assert (error.kind, error.retryable) == (kind, retryable)


@pytest.mark.parametrize(
    "stop",
    [event(event="abort", data="[DONE]"), event(event="error", data="Error: buildChatflow - Aborted"),
     event(event="error", data="Flow execution was cancelled")],
)  # fmt: skip
async def test_an_answer_aborted_at_flowise_keeps_its_text_and_is_not_asked_again(
    connect: Connect, stop: bytes
) -> None:
    text, finish, error = await played(connect, token("Hi"), stop, END)
    assert (text, finish) == ("Hi", None)
    assert error is not None
    assert (error.kind, error.retryable) == ("unavailable", False)
    assert "abort" in error.detail


async def test_usage_is_the_sum_of_the_models_that_a_flow_asks(connect: Connect) -> None:
    usages = [
        {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7},
        {"input_tokens": 10},
        {"input_tokens": 20, "output_tokens": 5},
    ]
    stream = as_stream([*(event(event="usageMetadata", data=usage) for usage in usages), token("Hi"), END])
    async with raw_server(lambda writer: written(writer, stream)) as url:
        chunks, error = await answered(connect(url), prompt("any"))
    assert error is None
    assert chunks == [Text("Hi"), Finish("stop"), Usage(23, 9)]


# -- flows that cannot stream


def document(body: bytes, content_type: bytes = b"application/json; charset=utf-8") -> bytes:
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n" % content_type
    )
    pieces = [body[start : start + 50_000] for start in range(0, len(body), 50_000)]
    return head + b"".join(map(chunked, pieces)) + b"0\r\n\r\n"


async def read(connect: Connect, response: bytes) -> tuple[str, Finish | None, Any]:
    async with raw_server(lambda writer: written(writer, response)) as url:
        chunks, error = await answered(connect(url), prompt("any"))
    return text_of(chunks), finish_of(chunks), error


async def test_a_flow_that_cannot_stream_answers_in_one_document(connect: Connect) -> None:
    chunks, error = await answered(connect(), prompt(f"{FAST}&whole=1"))
    assert (text_of(chunks), finish_of(chunks), error) == (SAID, Finish("stop"), None)


@pytest.mark.parametrize(
    ("held", "text"),
    [
        ({"text": "Hi", "question": "?", "chatId": "c"}, "Hi"),
        ({"text": "a\x00b"}, "a\ufffdb"),
        ({"json": {"mood": "glad", "of": ["ü"]}}, '{"mood": "glad", "of": ["ü"]}'),
        ({"json": []}, "[]"),
    ],
)
async def test_a_document_is_a_whole_answer(connect: Connect, held: dict[str, Any], text: str) -> None:
    assert await read(connect, document(json.dumps(held).encode())) == (text, Finish("stop"), None)


async def test_u10_a_long_document_comes_in_small_pieces(connect: Connect) -> None:
    response = document(json.dumps({"text": "x" * 1_000_000}).encode())
    async with raw_server(lambda writer: written(writer, response)) as url:
        chunks, error = await answered(connect(url), prompt("any"))
    assert error is None
    assert text_of(chunks) == "x" * 1_000_000
    assert max(len(chunk.text) for chunk in chunks if isinstance(chunk, Text)) == PIECE


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b'{"text": ""}', "unavailable"),
        (b"", "unavailable"),
        (b"{}", "protocol"),
        (b"null", "protocol"),
        (b'{"text": 7}', "protocol"),
        (b'{"text": null, "json": null}', "protocol"),
        (b'{"json": "plain"}', "protocol"),
        (b'{"text": "cut', "protocol"),
        (b'{"statusCode": 500, "success": false, "message": "No.", "stack": {}}', "unavailable"),
        (b'{"statusCode": 429, "success": false, "message": "No."}', "rate_limited"),
        (b'{"error": "No."}', "unavailable"),
        (b'{"text": "' + b"x" * (1 << 20) + b'"}', "too_large"),
        (b"[" * 500_000 + b"]" * 500_000, "protocol"),
    ],
)
async def test_u3_u12_a_document_that_is_no_answer_is_an_error(connect: Connect, body: bytes, kind: str) -> None:
    text, finish, error = await read(connect, document(body))
    assert (text, finish) == ("", None)
    assert error is not None
    assert error.kind == kind


async def test_u3_a_page_is_no_document(connect: Connect) -> None:
    text, _, error = await read(connect, document(b'{"text": "Hi"}', b"text/html"))
    assert (text, error.kind) == ("", "protocol")


async def test_u6_a_document_cut_short_is_no_answer(connect: Connect) -> None:
    text, finish, error = await read(connect, document(b'{"text": "Hi"}').removesuffix(b"0\r\n\r\n"))
    assert (text, finish) == ("", None)
    assert (error.kind, error.retryable) == ("unavailable", True)


# -- what nobody hears is aborted


@pytest.mark.parametrize("model", [STALLED, "demo?fault=deaf", "demo?fault=silent", "demo?whole=1&first_ms=60000"])
async def test_u17_a_cancelled_answer_is_aborted_at_flowise(
    connect: Connect, remembered: Remembered, demo_url: str, model: str
) -> None:
    provider = connect()
    consumer = asyncio.create_task(answered(provider, prompt(f"{model}&key=gone")))
    chat = await chat_of(demo_url, "gone")
    consumer.cancel()
    with suppress(asyncio.CancelledError):
        await consumer
    await provider.aclose()
    [abort] = await remembered("abort:gone")
    assert abort["body"] == {"chatId": chat}
    assert abort["headers"]["authorization"].startswith("sha256:")
    assert abort["headers"]["connection"] == "close"  # a burst of aborts leaves no idle connections


async def chat_of(demo_url: str, key: str) -> str:
    """The chat of the request with this key, once it has arrived."""
    async with client_of(demo_url.removesuffix("/v1")) as client, asyncio.timeout(5):
        while not (records := (await client.get("/demo/requests", params={"key": key})).json()["requests"]):
            pass
    chat: str = records[0]["body"]["chatId"]
    return chat


async def test_u17_so_is_one_whose_reader_leaves(connect: Connect, remembered: Remembered) -> None:
    provider = connect()
    batches = provider.stream(prompt("demo?tokens=1000&key=left"))
    await anext(batches)
    await batches.aclose()
    await provider.aclose()
    assert len(await remembered("abort:left")) == 1


@pytest.mark.parametrize("fault", ["stall", "deaf", "reset", "cut", "eof"])
async def test_u4_u5_u6_u7_so_is_one_that_came_too_late_or_broke(
    connect: Connect, remembered: Remembered, fault: str
) -> None:
    provider = connect(deadlines=Deadlines(first_token_s=0.2, gap_s=0.1))
    assert (await failed(provider, prompt(f"demo?delay_ms=5&fault={fault}&key=lost"))).retryable
    await provider.aclose()
    assert len(await remembered("abort:lost")) == 1


@pytest.mark.parametrize(
    "model", [FAST, f"{FAST}&whole=1", f"{FAST}&fault=error", "demo?fault=status", "demo?fault=json_error", "other"]
)
async def test_what_came_to_its_end_is_not_aborted(connect: Connect, remembered: Remembered, model: str) -> None:
    provider = connect()
    await answered(provider, prompt(f"{model}&key=over"))
    await provider.aclose()
    assert await remembered("abort:over") == []


@asynccontextmanager
async def one_that_hears_no_abort() -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that says one token and then nothing, and does not answer to anything else; its URL, what it heard."""
    methods: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head, _ = await receive(reader)
            methods.append(head.partition(b" ")[0])
            if methods[-1] == b"POST":
                writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(token("Hi")))
            await reader.read()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", methods


async def test_an_abort_delays_nothing_and_is_given_up(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.providers.flowise._ABORT_S", 0.3)
    told: list[object] = []  # what a task failed with that nobody asked
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    async with one_that_hears_no_abort() as (url, methods):
        provider = connect(url)
        async with aclosing(provider.stream(prompt("any"))) as batches:
            await anext(batches)
            started = time.monotonic()
        assert time.monotonic() - started < 0.2
        assert not provider.full
        await provider.aclose()
        assert 0.2 < time.monotonic() - started < 2
        assert methods == [b"POST", b"PUT"]
    gc.collect()
    assert (aborts_under_way(), told) == ([], [])


def aborts_under_way() -> list[asyncio.Task[Any]]:
    return [task for task in asyncio.all_tasks() if task.get_name() == "flowise abort"]


async def test_aborts_under_way_are_few_and_none_begins_when_the_provider_is_closed(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.providers.flowise._ABORTS", 2)
    monkeypatch.setattr("app.providers.flowise._ABORT_S", 0.3)
    async with one_that_hears_no_abort() as (url, methods):
        provider = connect(url)
        answers = [provider.stream(prompt("any")) for _ in range(6)]
        for answer in answers:
            await anext(answer)
        for answer in answers[:5]:
            await answer.aclose()
        await provider.aclose()
        await answers[5].aclose()
        assert aborts_under_way() == []
        assert methods.count(b"PUT") == 2
