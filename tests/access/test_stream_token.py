"""Tokens of streaming URLs as bytes: nothing but what was signed is taken, by the key that signed it, until its end."""

import string
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.access.links import Links
from app.access.principal import SCOPES
from app.access.signing import Signing
from app.access.stream_token import SigningKey, StreamToken, signed
from app.errors import Unauthorized

_NO_POOL: Any = None
_KEY, _OTHER = SigningKey.of(b"one" * 20), SigningKey.of(b"two" * 20)
_LETTERS = string.ascii_letters + string.digits + "-_"
moments = st.integers(0, 2**32 - 1)
MADE = 1_800_000_000
STREAM = UUID(int=(MADE * 1000 << 80) | 0x7ABC << 64 | 1 << 63)


def made_links(clock: float, *keys: SigningKey) -> Links:
    return Links(Signing(_NO_POOL, given=keys or [_KEY]), run_s=300, queue=20, clock=lambda: clock)


def token_of(url: str) -> str:
    return url.partition("?token=")[2]


async def refused(links: Links, *tokens: str) -> str:
    with pytest.raises(Unauthorized) as caught:
        await links.reader(tokens)
    assert not any(token in str(caught.value) for token in tokens if len(token) == 56)
    return caught.value.code


@given(st.uuids(), moments, st.binary(min_size=32, max_size=99))
def test_a_token_says_what_was_signed(stream_id: UUID, until: int, material: bytes) -> None:
    key = SigningKey.of(material)
    text = signed(key, stream_id, until=until)
    assert len(text) == 56
    token = StreamToken.parse(text)
    assert token is not None
    assert (token.key_id, token.until, token.stream_id) == (key.id, until, stream_id)
    assert token.is_by(key)
    assert not token.is_by(_OTHER)


@given(st.data(), st.uuids(), moments)
async def test_no_other_text_is_a_token(data: st.DataObject, stream_id: UUID, until: int) -> None:
    text = signed(_KEY, stream_id, until=until)
    place = data.draw(st.integers(0, len(text) - 1))
    letter = data.draw(st.sampled_from(sorted(set(_LETTERS) - {text[place]})))
    for forged in (text[:place] + letter + text[place + 1 :], text[:place] + text[place + 1 :], text + letter):
        assert await refused(made_links(0), forged) == "token_invalid"


@given(st.integers(0, 41), st.integers(1, 255), st.uuids())
async def test_no_changed_byte_is_taken(place: int, change: int, stream_id: UUID) -> None:
    data = bytearray(urlsafe_b64decode(signed(_KEY, stream_id, until=2**31)))
    data[place] ^= change
    assert await refused(made_links(0), urlsafe_b64encode(data).decode()) == "token_invalid"


@given(st.text() | st.binary(min_size=42, max_size=42).map(lambda data: urlsafe_b64encode(data).decode()))
async def test_what_anybody_makes_up_is_refused(text: str) -> None:
    assert await refused(made_links(0), text) == "token_invalid"


@given(st.uuids(), moments, moments)
async def test_a_token_ends(stream_id: UUID, until: int, now: int) -> None:
    text = signed(_KEY, stream_id, until=until)
    if now < until:
        principal = await made_links(now).reader([text])
        assert (principal.until, principal.streams) == (until, frozenset({stream_id}))
        assert (principal.kind, principal.user_id) == ("token", None)
        assert [scope for scope in SCOPES if principal.may(scope)] == ["read"]
    else:
        assert await refused(made_links(now), text) == "token_expired"


@given(st.lists(st.tuples(st.uuids(), st.integers(1, 2**32 - 1)), min_size=1, max_size=5))
async def test_several_tokens_are_good_for_their_streams_until_the_first_ends(said: Sequence[tuple[UUID, int]]) -> None:
    tokens = [signed(_KEY, stream_id, until=until) for stream_id, until in said]
    principal = await made_links(0).reader(tokens)
    assert principal.streams == frozenset(stream_id for stream_id, _ in said)
    assert principal.until == min(until for _, until in said)
    first = min(until for _, until in said)
    assert await refused(made_links(first), *tokens) == "token_expired"
    assert await refused(made_links(0), *tokens, signed(_OTHER, STREAM, until=9)) == "token_invalid"


async def test_more_tokens_than_streams_can_be_asked_for_are_refused() -> None:
    token = signed(_KEY, STREAM, until=9)
    assert await refused(made_links(0), *[token] * 101) == "token_invalid"


async def test_two_keys_are_good_at_once_and_the_first_signs() -> None:
    before, between, after = (made_links(MADE, *keys) for keys in ([_KEY], [_OTHER, _KEY], [_OTHER]))
    old, new = token_of(before.url(STREAM)), token_of(between.url(STREAM))
    for text in (old, new):
        assert (await between.reader([text])).streams == frozenset({STREAM})
    assert await refused(before, new) == "token_invalid"
    assert await refused(after, old) == "token_invalid"
    assert token_of(after.url(STREAM)) == new


def test_no_key_is_in_any_text_of_it() -> None:
    token = StreamToken.parse(signed(_KEY, STREAM, until=9))
    assert token is not None
    assert repr(_KEY.secret) not in repr(_KEY)
    assert repr(token.mac) not in repr(token)
    assert "secret" not in repr(Signing(_NO_POOL, given=[_KEY]))


@pytest.mark.parametrize(("queued", "life"), [(False, 300 + 900), (True, 21 * 300 + 900)])
async def test_a_url_is_good_until_the_deadline_and_a_quarter_of_an_hour_more(queued: bool, life: int) -> None:
    first = made_links(MADE + 0.1).url(STREAM, queued=queued)
    token = StreamToken.parse(token_of(first))
    assert token is not None
    assert token.until == MADE + life
    # Whoever repeats the request while the answer may still come is told the same, also by a clock that is late.
    for later in (-3600, 1, life - 900):
        assert made_links(MADE + later).url(STREAM, queued=queued) == first
    # Later ones get what is good for a quarter of an hour at least.
    for later in (life - 899, life, 100_000):
        fresh = made_links(MADE + later).url(STREAM, queued=queued)
        assert (await made_links(MADE + later + 899).reader([token_of(fresh)])).streams == frozenset({STREAM})


async def test_a_clock_that_is_ahead_takes_what_it_gives() -> None:
    ahead = made_links(MADE + 2 * 3600)
    assert (await ahead.reader([token_of(ahead.url(STREAM))])).streams == frozenset({STREAM})


def test_without_authentication_urls_are_plain() -> None:
    assert Links(None, run_s=1, queue=1).url(STREAM, queued=True) == f"/api/stream-events/{STREAM}"
