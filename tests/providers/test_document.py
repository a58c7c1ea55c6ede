"""A document in place of a stream: one payload, once, however it was cut, and never a large one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.providers.document import Document
from app.providers.provider import ProviderError


@given(pieces=st.lists(st.binary(min_size=1, max_size=5), max_size=10))
def test_the_pieces_are_one_payload_at_the_end_and_then_nothing(pieces: list[bytes]) -> None:
    document = Document()
    assert [payload for piece in pieces for payload in document.feed(piece)] == []
    assert document.end() == ([b"".join(pieces)] if pieces else [])
    assert document.end() == []


def test_u10_a_document_may_be_as_long_as_the_limit() -> None:
    document = Document(limit=6)
    document.feed(b"abc")
    document.feed(b"def")
    with pytest.raises(ProviderError) as refused:
        document.feed(b"g")
    assert (refused.value.kind, document.end()) == ("too_large", [b"abcdef"])
