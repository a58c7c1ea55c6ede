"""How rows are understood, whatever is in them: all shapes without a database."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.conversations.sources.answer import Answer, answer
from app.conversations.sources.flowise import Flowise
from app.conversations.sources.langchain import LangChain
from app.conversations.sources.litellm import LiteLLM
from app.conversations.sources.proxy import Proxy
from app.conversations.sources.shape import LONGEST, Key, Row, Session, Shape, Skipped
from app.conversations.summary import Said, fold

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
KEY = Key('"id"', is_serial=True)
SESSION = Session('"s"', "text", '"s" = $1::text', is_indexed=False)

LANGCHAIN = LangChain("langchain", "t", KEY, None, SESSION, ())
FLOWISE = Flowise("t", KEY, None, SESSION, (), ())
LITELLM = LiteLLM("t", KEY, None, SESSION, (), ())
PROXY = Proxy("t", KEY, None, None, ())


def message(value: Any, **row: Any) -> tuple[Any, ...]:
    """A row of LangChain's tables."""
    text = value if isinstance(value, str | None) else json.dumps(value)
    whole = {"key": 7, "session": "s", "message": text, "at": None, "user": None, "ip": None, "bot": None, **row}
    return tuple(whole.values())


def proxied(raw: str | None, **row: Any) -> tuple[Any, ...]:
    """A row of a proxy's log."""
    whole = {"key": 7, "text": "Why?", "raw": raw, "at": NOON, "session": None, "model": None, "user": "ann"}
    return tuple((whole | {"ip": "::1", "bot": None} | row).values())


def said(shape: Shape, row: Row) -> Said:
    found = shape.said(row)
    assert isinstance(found, Said), found
    return found


@pytest.mark.parametrize(
    ("value", "role", "text"),
    [
        ({"type": "human", "content": "Why?"}, "user", "Why?"),
        ({"type": "human", "data": {"content": "Why?", "type": "human"}}, "user", "Why?"),
        ({"type": "HumanMessageChunk", "data": {"content": ["a", {"type": "text", "text": "b"}]}}, "user", "a\nb"),
        ({"type": "human", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}, "user", ""),
        ({"type": "human", "content": "", "data": {"content": "no"}}, "user", ""),
        ({"type": "human", "content": None}, "user", ""),
        ({"type": "chat", "data": {"role": "user", "content": "Why?"}}, "user", "Why?"),
        ({"type": "generic", "role": "user", "content": "Why?"}, "user", "Why?"),
        ({"type": "generic", "role": "critic", "content": "No."}, "other", "No."),
        ({"type": "ai", "content": "So.", "tool_calls": []}, "assistant", "So."),
        ({"type": "AIMessageChunk", "data": {"content": "So."}}, "assistant", "So."),
        ({"type": "tool", "content": "42", "tool_call_id": "1"}, "other", "42"),
        ({"type": "system", "data": {"content": "Be brief."}}, "other", "Be brief."),
    ],
)
def test_messages_of_langchain(value: Any, role: str, text: str) -> None:
    row = message(value)
    found = said(LANGCHAIN, row)
    assert (found.conversation_id, found.rank, found.key, found.role) == ("s", 7, "7", role)
    assert found.question == (text if role == "user" else "")
    assert [(told.role, told.text) for told in LANGCHAIN.messages(row)] == [(role, text)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (message(None), "not_a_message"),
        (message("{"), "broken_json"),
        (message('{"type": "human", "content": ' + "9" * 5000 + "}"), "broken_json"),
        (message("[" * 100_000), "broken_json"),
        (message([]), "not_a_message"),
        (message({"type": "human"}), "not_a_message"),
        (message({"type": 7, "content": "x"}), "not_a_message"),
        (message({"content": "x"}), "not_a_message"),
        (message({"type": "human", "content": "x" * LONGEST}), "too_large"),
        (message({"type": "human", "content": "x"}, session=None), "no_conversation"),
        (message({"type": "human", "content": "x"}, session=""), "no_conversation"),
        (message({"type": "human", "content": "x"}, session="ü" * 513), "conversation_id_too_long"),
        (message({"type": "human", "content": "x"}, user="ü" * 257), "username_too_long"),
    ],
)
def test_rows_that_are_skipped_say_why(row: Row, reason: str) -> None:
    assert LANGCHAIN.said(row) == Skipped(reason)  # type: ignore[arg-type]


def test_odd_text_is_made_storable() -> None:
    row = message(r'{"type": "human", "content": "a\ud800b\u0000c\u2028d"}')
    assert said(LANGCHAIN, row).question == "a�b�c\u2028d"
    assert LANGCHAIN.messages(row)[0].text == "a�b�c\u2028d"
    found = answer(r'{"conversation_id": "c\udfff", "content": "\ud83d"}')
    assert isinstance(found, Answer)
    assert (found.conversation_id, found.text) == ("c�", "�")


@pytest.mark.parametrize(
    ("about", "model", "tokens"),
    [
        ({"usage_metadata": {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}}, "", 7),
        ({"response_metadata": {"model_name": "m", "token_usage": {"total_tokens": 7}}}, "m", 7),
        ({"response_metadata": {"model": "m", "tokenUsage": {"promptTokens": 3, "completionTokens": 4}}}, "m", 7),
        ({"response_metadata": {"model": "m", "usage": {"input_tokens": 3, "output_tokens": 4}}}, "m", 7),
        ({"response_metadata": {"model": "m", "prompt_eval_count": 3, "eval_count": 4}}, "m", 7),
        ({"response_metadata": {"model": 9, "usage": {"input_tokens": True, "output_tokens": -4}}}, "", 0),
        ({"response_metadata": {"usage": {"total_tokens": 1e300}}}, "", 10**9),
    ],
)
def test_what_an_answer_has_cost(about: dict[str, Any], model: str, tokens: int) -> None:
    for value in ({"type": "ai", "content": "", **about}, {"type": "ai", "data": {"content": "", **about}}):
        found = said(LANGCHAIN, message(value))
        assert (found.model, found.tokens) == (model, tokens)


OPENAI: dict[str, Any] = {
    "id": "chatcmpl-1",
    "model": "gpt",
    "choices": [{"message": {"role": "assistant", "content": "So."}}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
}
OPENAI_CHUNKS: list[dict[str, Any]] = [
    {"id": "chatcmpl-1", "model": "gpt", "choices": [{"delta": {"role": "assistant", "content": ""}}]},
    {"id": "chatcmpl-1", "model": "gpt", "choices": [{"delta": {"content": "S"}}]},
    {"id": "chatcmpl-1", "model": "gpt", "choices": [{"delta": {"content": "o."}, "finish_reason": "stop"}]},
    {"id": "chatcmpl-1", "model": "gpt", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}},
]
ANTHROPIC: dict[str, Any] = {
    "id": "msg_1",
    "type": "message",
    "model": "claude",
    "content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "So."}],
    "usage": {"input_tokens": 3, "output_tokens": 4},
}
ANTHROPIC_CHUNKS: list[dict[str, Any]] = [
    {
        "type": "message_start",
        "message": {"model": "claude", "content": [], "usage": {"input_tokens": 3, "output_tokens": 1}},
    },
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "S"}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "o."}},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 4}},
    {"type": "message_stop"},
]
RESPONSES: dict[str, Any] = {
    "id": "resp_1",
    "model": "gpt",
    "output": [{"type": "reasoning"}, {"type": "message", "content": [{"type": "output_text", "text": "So."}]}],
    "usage": {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7},
}
RESPONSES_CHUNKS: list[dict[str, Any]] = [
    {"type": "response.created", "response": {"id": "resp_1", "model": "gpt", "output": []}},
    {"type": "response.reasoning_summary_text.delta", "delta": "Hm."},
    {"type": "response.output_text.delta", "delta": "S"},
    {"type": "response.output_text.delta", "delta": "o."},
    {"type": "response.completed", "response": RESPONSES},
]
OLLAMA_CHUNKS: list[dict[str, Any]] = [
    {"model": "llama", "message": {"role": "assistant", "content": "S"}, "done": False},
    {"model": "llama", "message": {"content": "o."}, "done": True, "prompt_eval_count": 3, "eval_count": 4},
]


def sse(chunks: Sequence[dict[str, Any]], *, end: str = "\n") -> str:
    frames = [f"event: {chunk.get('type', 'x')}{end}data: {json.dumps(chunk)}{end}{end}" for chunk in chunks]
    return ": ping\n\n" + "".join(frames) + "data: [DONE]\n\n"


def forms() -> dict[str, tuple[str, Any]]:
    """The same answer in every form, the id at the place where it is likely."""
    of = {"conversation_id": "c1"}
    return {
        "openai": ("gpt", {**OPENAI, **of}),
        "openai metadata": ("gpt", {**OPENAI, "metadata": {"session_id": "c1"}}),
        "openai streamed": ("gpt", sse([*OPENAI_CHUNKS[:-1], {**OPENAI_CHUNKS[-1], **of}])),
        "openai streamed, CRLF": ("gpt", sse([{**chunk, **of} for chunk in OPENAI_CHUNKS], end="\r\n")),
        "openai chunks in an array": ("gpt", [{**chunk, **of} for chunk in OPENAI_CHUNKS]),
        "json in json": ("gpt", json.dumps(json.dumps({**OPENAI, **of}))),
        "streamed in json": ("gpt", json.dumps(sse([{**chunk, **of} for chunk in OPENAI_CHUNKS]))),
        "anthropic": ("claude", {**ANTHROPIC, "metadata": {"conversation": "c1"}}),
        "anthropic streamed": ("claude", sse([{**ANTHROPIC_CHUNKS[0], **of}, *ANTHROPIC_CHUNKS[1:]])),
        "responses": ("gpt", {**RESPONSES, "conversation": {"id": "c1"}}),
        "responses streamed": (
            "gpt",
            sse([*RESPONSES_CHUNKS[:-1], {"type": "x", "response": {**RESPONSES, "conversation": {"id": "c1"}}}]),
        ),
        "ollama streamed": ("llama", "\n".join(json.dumps({**chunk, "chat_id": "c1"}) for chunk in OLLAMA_CHUNKS)),
    }


@pytest.mark.parametrize("form", forms())
def test_answers_of_providers_streamed_or_not(form: str) -> None:
    model, raw = forms()[form]
    row = proxied(raw if isinstance(raw, str) else json.dumps(raw))
    found = said(PROXY, row)
    assert (found.conversation_id, found.model, found.tokens, found.messages) == ("c1", model, 7, 2)
    assert (found.username, found.client_ip, found.question, found.at) == ("ann", "::1", "Why?", NOON)
    assert [(told.role, told.text) for told in PROXY.messages(row)] == [("user", "Why?"), ("assistant", "So.")]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (None, "no_conversation"),
        (json.dumps(OPENAI), "no_conversation"),
        (sse(ANTHROPIC_CHUNKS), "no_conversation"),
        ('{"conversation_id": ""}', "no_conversation"),
        ('{"conversation_id": null, "session_id": []}', "no_conversation"),
        ('{"error": {"message": "Overloaded"}}', "no_conversation"),
        ("Bad gateway", "broken_json"),
        ("", "broken_json"),
        ("[]", "not_a_message"),
        ("7", "not_a_message"),
        ('{"conversation_id": "' + "x" * 2000 + '"}', "conversation_id_too_long"),
    ],
)
def test_answers_without_a_conversation_are_skipped(raw: str | None, reason: str) -> None:
    assert PROXY.said(proxied(raw)) == Skipped(reason)  # type: ignore[arg-type]


def test_the_id_may_be_at_either_end_of_a_long_stream_of_odd_text() -> None:
    parts = [{"choices": [{"delta": {"content": "a\u2028b\x85c "}}]} for _ in range(1000)]
    for place in (0, 999):
        chunks = [part | {"session_id": "c1"} if number == place else part for number, part in enumerate(parts)]
        row = proxied("".join(f"data: {json.dumps(chunk, ensure_ascii=False)}\r\n\r\n" for chunk in chunks))
        assert said(PROXY, row).conversation_id == "c1"
        assert PROXY.messages(row)[1].text == "a\u2028b\x85c " * 1000
    assert PROXY.said(proxied(sse(parts))) == Skipped("no_conversation")


def test_where_the_id_of_a_conversation_is_can_be_said() -> None:
    shape = Proxy("t", KEY, None, None, (), ("choices", "x"))
    assert shape.said(proxied('{"conversation_id": "no"}')) == Skipped("no_conversation")
    assert said(shape, proxied('{"conversation_id": "no", "choices": {"x": 4711}}')).conversation_id == "4711"
    of_column = said(PROXY, proxied("broken", session="s"))
    assert (of_column.conversation_id, of_column.messages) == ("s", 1)


def spent(**row: Any) -> tuple[Any, ...]:
    """A row of LiteLLM's table."""
    whole = {"key": "r1", "session": "s", "began": NOON, "ended": NOON + timedelta(seconds=2), "model": "m"}
    rest = {"tokens": 7, "call": "acompletion", "status": "success", "user": "ann", "ip": "::1"}
    last = json.dumps({"role": "user", "content": [{"type": "text", "text": "Why?"}]})
    return tuple((whole | rest | {"last": last, "response": json.dumps(OPENAI)} | row).values())


def test_requests_of_litellm() -> None:
    found = said(LITELLM, spent())
    assert (found.conversation_id, found.username, found.key, found.role) == ("s", "ann", "r1", "user")
    assert (found.at, found.question, found.model) == (NOON + timedelta(seconds=2), "Why?", "m")
    assert (found.tokens, found.duration_ms, found.messages) == (7, 2000, 2)
    assert [(told.role, told.text) for told in LITELLM.messages(spent())] == [("user", "Why?"), ("assistant", "So.")]
    assert said(LITELLM, spent(last='"Why?"')).question == "Why?"
    assert said(LITELLM, spent(last='{"role": "tool", "content": "42"}')).role == "other"
    assert said(LITELLM, spent(last=None, status="failure")).messages == 1
    assert LITELLM.said(spent(call="aembedding")) == Skipped("not_a_message")
    assert LITELLM.said(spent(session=None)) == Skipped("no_conversation")


def test_rows_of_flowise() -> None:
    def row(role: str, text: str | None, second: int) -> tuple[Any, ...]:
        return (f"k{second}", "s", role, text, NOON + timedelta(seconds=second), "flow", None, None)

    rows = [row("userMessage", "Why?", 0), row("apiMessage", "So.", 1), row("userMessage", None, 2)]
    (summary,) = fold(said(FLOWISE, one) for one in rows).values()
    assert (summary.messages, summary.first_at, summary.last_at) == (3, NOON, NOON + timedelta(seconds=2))
    assert summary.last_question is not None
    assert summary.last_question[1] == "Why?"
    assert summary.chatbot_id is not None
    assert summary.chatbot_id[1] == "flow"
    assert [key for _, key in summary.keys] == ["k0", "k1", "k2"]


# -- whatever there is

TEXT = st.text(max_size=20) | st.sampled_from(["human", "ai", "user", "s", "\ud800", "\x00", "1e999", "NaN"])
NAMES = st.sampled_from(
    [
        *("type", "content", "data", "role", "text", "delta", "choices", "message", "usage", "response", "metadata"),
        *("response_metadata", "conversation_id", "conversation", "id", "model", "output", "total_tokens", "done"),
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | TEXT, inner, max_size=6),
    max_leaves=30,
)
RAW = (
    st.none()
    | TEXT
    | JSON.map(json.dumps)
    | st.lists(JSON, max_size=4).map(lambda parts: "\n".join(f"data: {json.dumps(part)}" for part in parts))
)
STORED = st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=2000)
TIME = st.none() | st.datetimes() | st.datetimes(timezones=st.just(UTC)) | STORED


@given(st.data(), st.integers(0, 2**63 - 1), st.sampled_from([LANGCHAIN, FLOWISE, LITELLM, PROXY]))
def test_no_row_raises_and_what_is_understood_can_be_stored(data: st.DataObject, key: int, shape: Shape) -> None:
    def draw(*strategies: st.SearchStrategy[Any]) -> tuple[Any, ...]:
        return tuple(data.draw(strategy) for strategy in strategies)

    raw = RAW.map(lambda text: None if text is None else text.encode("utf-8", "replace").decode().replace("\0", ""))
    match shape:
        case LangChain():
            row = (key, *draw(STORED, raw, TIME, STORED, STORED, STORED))
        case Flowise():
            row = (key, *draw(STORED, TEXT.filter(str.isprintable), STORED, TIME, STORED, STORED, STORED))
        case LiteLLM():
            row = (str(key), *draw(STORED, TIME, TIME, STORED, st.integers(-1, 2**31), STORED, STORED, STORED, STORED))
            row += draw(raw, raw)
        case _:
            row = (key, *draw(STORED, raw, TIME, STORED, STORED, STORED, STORED, STORED))
    texts = [told.text for told in shape.messages(row)]
    found = shape.said(row)
    if isinstance(found, Said):
        assert found.conversation_id
        assert 0 <= found.rank < 2**63
        assert 0 <= found.tokens < 2**31
        assert 0 <= found.duration_ms < 2**63
        assert found.at is None or found.at.tzinfo is UTC
        assert len(found.question) <= 300
        assert max(len(found.model), len(found.client_ip), len(found.chatbot_id)) <= 200
        texts += [found.conversation_id, found.username, found.question, found.model, found.client_ip]
    for text in texts:
        assert "\0" not in text
        text.encode()
