"""The OpenAI-compatible dialect through a real socket: requests as configured, chunks as promised, U3 and U7 to U12."""

import json
from collections.abc import Callable

import pytest

from app.demo.answers import tokens
from app.errors import Misconfigured
from app.providers.answer import PIECE
from app.providers.openai import OpenAI
from app.providers.provider import Finish, Image, Prompt, PromptMessage, Provider, ProviderError, Text, Usage
from tests.providers.answers import answered, failed, finish_of, prompt, text_of
from tests.providers.conftest import KEY, Connect, Remembered
from tests.providers.wire import as_stream, raw_server

FAST = "demo?delay_ms=0&tokens=20"
SAID = "".join(tokens("Hello", 20))


def event(**members: object) -> bytes:
    return b"data: " + json.dumps(members).encode() + b"\n\n"


def delta(content: object = None, finish: object = None, index: int = 0) -> bytes:
    given = {} if content is None else {"content": content}
    return event(choices=[{"index": index, "delta": given, "finish_reason": finish}])


async def played(connect: Connect, *events: bytes) -> tuple[str, Finish | None, ProviderError | None]:
    """What comes of a stream of exactly these events, without retries."""
    async with raw_server(lambda writer: _written(writer.write, as_stream(list(events)))) as url:
        chunks, error = await answered(connect(url), prompt("any"))
    return text_of(chunks), finish_of(chunks), error


async def _written(write: Callable[[bytes], None], data: bytes) -> None:
    write(data)


async def test_an_answer_arrives_as_text_finish_and_usage(connect: Connect) -> None:
    provider: Provider = connect()
    chunks, error = await answered(connect(), prompt(FAST))
    assert error is None
    assert [chunk.text for chunk in chunks if isinstance(chunk, Text)] == tokens("Hello", 20)
    assert chunks[-2:] == [Finish("stop"), Usage(prompt_tokens=2, completion_tokens=20)]
    assert await provider.check() == "Provider 'vendor' answers and offers 3 models."


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


async def test_without_a_key_no_authorization_is_sent(connect: Connect, remembered: Remembered) -> None:
    await answered(connect(api_key=None), prompt(f"{FAST}&key=keyless"))
    [record] = await remembered("keyless")
    assert "authorization" not in record["headers"]


async def test_a_prompt_that_json_cannot_carry_is_rejected(connect: Connect) -> None:
    error = await failed(connect(), prompt(FAST, "lone \ud83d surrogate"))
    assert error.kind == "rejected"


@pytest.mark.parametrize("key", ["sk-1\r\nX-Evil: 1", "sk-1\n", "sk 1", "schlüssel", "\x00"])
def test_a_key_that_would_break_the_header_is_refused_at_the_start(key: str) -> None:
    with pytest.raises(Misconfigured) as refused:
        OpenAI("vendor", "https://vendor.invalid/v1", api_key=key)
    assert key not in refused.value.detail


@pytest.mark.parametrize(
    "url", ["", "vendor.invalid/v1", "ftp://a/v1", "https:///v1", "https://u:p@a/v1", "https://a/?b"]
)
def test_a_base_url_must_be_one(url: str) -> None:
    with pytest.raises(Misconfigured, match="base_url"):
        OpenAI("vendor", url)


async def test_u3_an_error_instead_of_a_stream_is_an_error(connect: Connect, remembered: Remembered) -> None:
    error = await failed(connect(), prompt("demo?fault=json_error&key=u3"))
    assert (error.kind, error.detail) == (
        "unavailable", "Provider 'vendor' reported an error: The demo is overloaded on request.",
    )  # fmt: skip
    assert len(await remembered("u3")) == 1


async def test_u3_a_document_instead_of_a_stream_is_an_error(connect: Connect) -> None:
    assert (await failed(connect(), prompt("demo?fault=html"))).kind == "protocol"


@pytest.mark.parametrize("model", [f"{FAST}&fault=eof", f"{FAST}&fault=cut"])
async def test_u7_an_end_without_a_finish_marker_is_never_an_answer(connect: Connect, model: str) -> None:
    chunks, error = await answered(connect(), prompt(f"{model}&after=5"))
    assert text_of(chunks) == "".join(tokens("Hello", 5))
    assert finish_of(chunks) is None
    assert error is not None
    assert (error.kind, error.retryable) == ("unavailable", True)


async def test_u7_done_ends_an_answer_that_named_no_reason(connect: Connect) -> None:
    assert await played(connect, delta("Hi"), b"data: [DONE]\n\n") == ("Hi", Finish("stop"), None)


async def test_u7_done_alone_is_no_answer(connect: Connect) -> None:
    text, finish, error = await played(connect, delta(""), b"data: [DONE]\n\n")
    assert (text, finish) == ("", None)
    assert error is not None


async def test_u7_a_reason_ends_an_answer_without_done(connect: Connect) -> None:
    chunks, error = await answered(connect(), prompt(f"{FAST}&fault=no_done"))
    assert error is None
    assert text_of(chunks) == SAID
    assert isinstance(chunks[-1], Usage)


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


async def test_u8_an_error_inside_the_stream_keeps_what_came_before(connect: Connect) -> None:
    chunks, error = await answered(connect(), prompt(f"{FAST}&fault=error&after=4"))
    assert text_of(chunks) == "".join(tokens("Hello", 4))
    assert error is not None
    assert error.detail == "Provider 'vendor' reported an error: The demo failed on request, see [url]"


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
    "fault", ["bytes", "crlf", "cr", "bom", "comments", "multiline", "bytes,crlf,bom,comments,multiline"]
)
async def test_u9_however_the_bytes_come_the_text_is_the_same(connect: Connect, fault: str) -> None:
    chunks, error = await answered(connect(), prompt(f"demo?delay_ms=0&fault={fault}", "Grüße 🙂"))
    assert error is None
    assert text_of(chunks) == "".join(tokens("Grüße 🙂", None))


@pytest.mark.parametrize(
    ("fault", "text"),
    [("nul", "a\ufffdb"), ("surrogates", "😀x\ufffdy\ufffdz"), ("u2028", "a\u2028b\u2029c\x85d")],
)
async def test_u10_what_cannot_be_stored_is_replaced_and_the_rest_kept(connect: Connect, fault: str, text: str) -> None:
    chunks, error = await answered(connect(), prompt(f"{FAST}&after=3&fault={fault}"))
    assert error is None
    assert text_of(chunks) == "".join([*tokens("Hello", 20)[:3], text, *tokens("Hello", 20)[3:]])


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


async def test_u10_a_line_of_a_mebibyte_comes_in_small_pieces(connect: Connect) -> None:
    chunks, error = await answered(connect(), prompt(f"{FAST}&fault=long"))
    assert error is None
    assert text_of(chunks).count("x") > 1_000_000
    assert max(len(chunk.text) for chunk in chunks if isinstance(chunk, Text)) == PIECE


async def test_u10_a_longer_line_is_an_error_after_the_tokens_before_it(connect: Connect) -> None:
    chunks, error = await answered(connect(), prompt(f"{FAST}&fault=too_long&after=3"))
    assert text_of(chunks) == "".join(tokens("Hello", 3))
    assert error is not None
    assert error.kind == "too_large"


async def test_u10_ten_thousand_tokens_at_full_speed(connect: Connect) -> None:
    chunks, error = await answered(connect(), prompt("demo?delay_ms=0&tokens=10000"))
    assert error is None
    assert [chunk.text for chunk in chunks if isinstance(chunk, Text)] == tokens("Hello", 10_000)


@pytest.mark.parametrize("fault", ["trailing", "events"])
async def test_u11_what_follows_the_end_and_what_nobody_knows_is_ignored(connect: Connect, fault: str) -> None:
    chunks, error = await answered(connect(), prompt(f"{FAST}&fault={fault}"))
    assert error is None
    assert text_of(chunks) == SAID
    assert finish_of(chunks) == Finish("stop")


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


@pytest.mark.parametrize("fault", ["deep", "digits", "garbage"])
async def test_u12_bombs_are_errors_and_the_next_call_works(connect: Connect, fault: str) -> None:
    provider = connect()
    chunks, error = await answered(provider, prompt(f"{FAST}&fault={fault}&after=3"))
    assert text_of(chunks) == "".join(tokens("Hello", 3))
    assert error is not None
    assert (error.kind, error.retryable) == ("protocol", False)
    assert text_of((await answered(provider, prompt(FAST)))[0]) == SAID


async def test_usage_told_many_times_is_one_chunk(connect: Connect) -> None:
    counts = [event(choices=[], usage={"prompt_tokens": 3, "completion_tokens": n}) for n in (1, 2, 3)]
    async with raw_server(
        lambda writer: _written(writer.write, as_stream([*counts, delta("Hi", finish="stop"), b"data: [DONE]\n\n"]))
    ) as url:
        chunks, error = await answered(connect(url), prompt("any"))
    assert error is None
    assert chunks == [Text("Hi"), Finish("stop"), Usage(3, 3)]


async def test_no_secret_and_no_address_is_in_any_failure(connect: Connect, demo_url: str) -> None:
    models = [f"demo?fault=status&status={status}" for status in (400, 401, 403, 404, 429, 500, 529)]
    models += [f"{FAST}&fault={fault}" for fault in ("error", "json_error", "redirect", "gzip", "eof", "garbage")]
    provider = connect()
    for model in models:
        error = await failed(provider, prompt(model))
        assert not any(secret in f"{error!r} {error.detail}" for secret in (KEY, "://", "127.0.0.1", "\r", "\n"))
