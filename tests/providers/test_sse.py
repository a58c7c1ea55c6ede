"""The decoder against the standard's algorithm written down naively, for every way bytes can be cut."""

import re
from collections.abc import Iterable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.providers.provider import ProviderError
from app.providers.sse import LIMIT, Decoder


def by_the_standard(stream: bytes) -> list[bytes]:
    """https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation, data only."""
    lines = re.split(b"\r\n|\n|\r", stream.removeprefix(b"\xef\xbb\xbf"))[:-1]
    payloads, data = [], b""
    for line in lines:
        if line == b"":
            if data:
                payloads.append(data.removesuffix(b"\n"))
            data = b""
        elif not line.startswith(b":"):
            name, _, value = line.partition(b":")
            if name == b"data":
                data += value.removeprefix(b" ") + b"\n"
    return payloads


def decoded(pieces: Iterable[bytes], *, limit: int = LIMIT) -> tuple[list[bytes], str | None]:
    """The payloads, and the kind of the failure that ended them."""
    decoder = Decoder(limit=limit)
    payloads: list[bytes] = []
    try:
        for piece in pieces:
            for payload in decoder.feed(piece):
                payloads.append(payload)
    except ProviderError as error:
        return payloads, error.kind
    return payloads, None


def cut(stream: bytes, cuts: Iterable[int]) -> list[bytes]:
    places = sorted({min(place, len(stream)) for place in cuts})
    return [stream[start:end] for start, end in zip([0, *places], [*places, len(stream)], strict=True)]


PIECES = st.sampled_from(
    [b"data: ", b"data:", b"data", b"x", b"{}", b"\n", b"\n\n", b"\r", b"\r\n", b"\r\n\r\n", b":", b": hb\n", b" ",
     b"event: x\n", b"id: \x00\n", b"\xef\xbb\xbf", "é🙂\u2028\u0085".encode(), b"\xff", b"\x00"]
)  # fmt: skip
STREAMS = st.lists(PIECES | st.binary(max_size=20), max_size=40).map(b"".join)
CUTS = st.lists(st.integers(0, 200), max_size=30)


@settings(deadline=None)
@given(stream=STREAMS, cuts=CUTS)
@example(stream=b"\xef\xbb\xbfdata: x\r\n\r\n", cuts=[1, 2, 3, 11, 12])
@example(stream=b"data: x\r\rdata: y\r\n\r\n", cuts=[8, 9])
def test_any_cut_gives_what_the_standard_gives(stream: bytes, cuts: list[int]) -> None:
    expected = by_the_standard(stream)
    assert decoded([stream]) == (expected, None)
    assert decoded(cut(stream, cuts)) == (expected, None)
    assert decoded(bytes([byte]) for byte in stream) == (expected, None)


@settings(deadline=None)
@given(stream=STREAMS, cuts=CUTS, limit=st.integers(1, 24))
def test_a_limit_strikes_at_the_same_place_however_the_bytes_are_cut(
    stream: bytes, cuts: list[int], limit: int
) -> None:
    assert decoded(cut(stream, cuts), limit=limit) == decoded([stream], limit=limit)


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\r"])
def test_an_unfinished_event_is_dropped(ending: bytes) -> None:
    assert decoded([b"data: a" + ending * 2 + b"data: b" + ending]) == ([b"a"], None)


@pytest.mark.parametrize(
    ("stream", "kind"),
    [
        (b"data: " + b"x" * (LIMIT - 6) + b"\n\n", None),
        (b"data: " + b"x" * (LIMIT - 5) + b"\n\n", "too_large"),
        (b"x" * (LIMIT + 1), "too_large"),
        (b"data: " + b"x" * (LIMIT // 2) + b"\ndata: " + b"x" * (LIMIT // 2 - 1) + b"\n\n", None),
        (b"data: " + b"x" * (LIMIT // 2) + b"\ndata: " + b"x" * (LIMIT // 2) + b"\n\n", "too_large"),
        (b"data\n" * (LIMIT + 2), "too_large"),
        (b": " + b"x" * 100 + b"\n" * 3 * LIMIT, None),
    ],
    ids=["line", "line+1", "endless line", "event", "event+1", "endless event", "many small lines"],
)
def test_lines_and_events_up_to_one_mebibyte(stream: bytes, kind: str | None) -> None:
    assert decoded([stream])[1] == kind
    assert decoded(cut(stream, range(0, len(stream), 65536)))[1] == kind


def test_events_before_a_line_that_is_too_long_are_given_out_first() -> None:
    assert decoded([b"data: a\n\ndata: b\n\n" + b"x" * 100], limit=50) == ([b"a", b"b"], "too_large")


def test_an_endless_line_in_tiny_pieces_costs_no_more_than_in_large_ones() -> None:
    decoder = Decoder()
    for _ in range(LIMIT // 8):  # joining at each piece would copy 64 GiB
        assert not list(decoder.feed(b"12345678"))
    with pytest.raises(ProviderError):
        list(decoder.feed(b"x"))
