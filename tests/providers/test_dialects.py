"""What every dialect makes of the demo provider's answers and faults, through a real socket: U3 and U7 to U12."""

import pytest

from app.demo.answers import tokens
from app.errors import Misconfigured
from app.providers.answer import PIECE
from app.providers.provider import Finish, Text, Usage
from tests.providers.answers import answered, failed, finish_of, played, prompt, text_of
from tests.providers.conftest import KEY, Connect, Remembered
from tests.providers.dialects import DIALECTS, Dialect

FAST = "demo?delay_ms=0&tokens=20"
SAID = "".join(tokens("Hello", 20))


@pytest.fixture(params=DIALECTS)
def dialect(request: pytest.FixtureRequest) -> Dialect:
    return DIALECTS[request.param]


async def test_an_answer_arrives_as_text_finish_and_usage(connect: Connect, dialect: Dialect) -> None:
    provider = connect()
    chunks, error = await answered(provider, prompt(FAST))
    assert error is None
    assert [chunk.text for chunk in chunks if isinstance(chunk, Text)] == tokens("Hello", 20)
    assert chunks[-2:] == [Finish("stop"), Usage(prompt_tokens=2, completion_tokens=20)]
    assert await provider.check() == f"Provider 'vendor' {dialect.checked}"


async def test_without_a_key_none_is_sent(connect: Connect, remembered: Remembered) -> None:
    await answered(connect(api_key=None), prompt(f"{FAST}&key=keyless"))
    [record] = await remembered("keyless")
    assert not {"authorization", "x-api-key"} & set(record["headers"])


async def test_the_key_travels_in_one_header(connect: Connect, remembered: Remembered) -> None:
    await answered(connect(), prompt(f"{FAST}&key=keyed"))
    [record] = await remembered("keyed")
    [hashed] = [record["headers"][name] for name in ("authorization", "x-api-key") if name in record["headers"]]
    assert hashed.startswith("sha256:")


async def test_a_prompt_that_json_cannot_carry_is_rejected(connect: Connect) -> None:
    error = await failed(connect(), prompt(FAST, "lone \ud83d surrogate"))
    assert error.kind == "rejected"


@pytest.mark.parametrize("key", ["sk-1\r\nX-Evil: 1", "sk-1\n", "sk 1", "schlüssel", "\x00"])
def test_a_key_that_would_break_the_header_is_refused_at_the_start(dialect: Dialect, key: str) -> None:
    with pytest.raises(Misconfigured) as refused:
        dialect.provider("vendor", "https://vendor.invalid/v1", api_key=key)
    assert key not in refused.value.detail


@pytest.mark.parametrize(
    "url", ["", "vendor.invalid/v1", "ftp://a/v1", "https:///v1", "https://u:p@a/v1", "https://a/?b"]
)
def test_a_base_url_must_be_one(dialect: Dialect, url: str) -> None:
    with pytest.raises(Misconfigured, match="base_url"):
        dialect.provider("vendor", url)


async def test_u3_an_error_instead_of_a_stream_is_an_error(connect: Connect, remembered: Remembered) -> None:
    error = await failed(connect(), prompt("demo?fault=json_error&key=u3"))
    assert (error.kind, error.retryable) == ("unavailable", True)
    assert error.detail.startswith("Provider 'vendor' reported an error")
    assert error.detail.endswith(": The demo is overloaded on request.")
    assert len(await remembered("u3")) == 1


async def test_u3_a_page_instead_of_a_stream_is_an_error(connect: Connect) -> None:
    assert (await failed(connect(), prompt("demo?fault=html"))).kind == "protocol"


async def test_u3_a_document_instead_of_a_stream_is_an_answer_only_where_the_dialect_has_such(
    connect: Connect, dialect: Dialect
) -> None:
    chunks, error = await answered(connect(), prompt(f"{FAST}&whole=1"))
    if dialect.takes_documents:
        assert (text_of(chunks), error) == (SAID, None)
    else:
        assert error is not None
        assert (chunks, error.kind) == ([], "protocol")


@pytest.mark.parametrize("model", [f"{FAST}&fault=eof", f"{FAST}&fault=cut"])
async def test_u7_an_end_without_a_finish_marker_is_never_an_answer(connect: Connect, model: str) -> None:
    chunks, error = await answered(connect(), prompt(f"{model}&after=5"))
    assert text_of(chunks) == "".join(tokens("Hello", 5))
    assert finish_of(chunks) is None
    assert error is not None
    assert (error.kind, error.retryable) == ("unavailable", True)


async def test_u7_a_reason_ends_an_answer_without_the_marker(connect: Connect, dialect: Dialect) -> None:
    chunks, error = await answered(connect(), prompt(f"{FAST}&fault=no_done"))
    assert text_of(chunks) == SAID
    assert (error is None) == (finish_of(chunks) is not None) == isinstance(chunks[-1], Usage) == dialect.names_reason


async def test_u7_a_marker_ends_an_answer_that_named_no_reason(connect: Connect) -> None:
    chunks, error = await answered(connect(), prompt(f"{FAST}&fault=no_finish"))
    assert error is None
    assert (text_of(chunks), finish_of(chunks)) == (SAID, Finish("stop"))


async def test_u7_a_marker_alone_is_no_answer(connect: Connect, dialect: Dialect) -> None:
    text, finish, error = await played(connect, dialect.marker)
    assert (text, finish) == ("", None)
    assert error is not None


async def test_u7_nothing_is_heard_after_the_marker(connect: Connect, dialect: Dialect) -> None:
    text, finish, error = await played(connect, dialect.marker, dialect.finished, dialect.marker)
    assert (text, finish) == ("", None)
    assert error is not None


async def test_u8_an_error_inside_the_stream_keeps_what_came_before(connect: Connect) -> None:
    chunks, error = await answered(connect(), prompt(f"{FAST}&fault=error&after=4"))
    assert text_of(chunks) == "".join(tokens("Hello", 4))
    assert error is not None
    assert (error.kind, error.retryable) == ("unavailable", True)
    assert error.detail.endswith(": The demo failed on request, see [url]")


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


@pytest.mark.parametrize("fault", ["deep", "digits", "garbage"])
async def test_u12_bombs_are_errors_and_the_next_call_works(connect: Connect, fault: str) -> None:
    provider = connect()
    chunks, error = await answered(provider, prompt(f"{FAST}&fault={fault}&after=3"))
    assert text_of(chunks) == "".join(tokens("Hello", 3))
    assert error is not None
    assert (error.kind, error.retryable) == ("protocol", False)
    assert text_of((await answered(provider, prompt(FAST)))[0]) == SAID


async def test_no_secret_and_no_address_is_in_any_failure(connect: Connect, demo_url: str) -> None:
    models = [f"demo?fault=status&status={status}" for status in (400, 401, 403, 404, 429, 500, 529)]
    models += [f"{FAST}&fault={fault}" for fault in ("error", "json_error", "redirect", "gzip", "eof", "garbage")]
    provider = connect()
    for model in models:
        error = await failed(provider, prompt(model))
        assert not any(secret in f"{error!r} {error.detail}" for secret in (KEY, "://", "127.0.0.1", "\r", "\n"))
