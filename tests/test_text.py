"""Text from outside: what looks like a secret goes, in a time that grows with the text and not with its square."""

from time import perf_counter

import pytest

from app.providers.refusal import Refusals
from app.text import redacted

SECRETS = {
    "key sk-ab***yz.": "key [key].",
    "Incorrect API key provided: abcd****wxyz": "Incorrect API key provided: [key]",
    "sk-abcdefgh.xyz*** and (abc***def)": "[key] and [key])",
    "Bearer abc, then": "[key] then",
    "two ** stars * are none": "two ** stars * are none",
    "postgresql://parley:secret@db/x": "postgresql://[credentials]@db/x",
}


@pytest.mark.parametrize("text", SECRETS)
def test_what_looks_like_a_key_is_gone(text: str) -> None:
    assert redacted(text) == SECRETS[text]


@pytest.mark.parametrize("word", ["z", "a.", "*a", "**a ", "sk-", "Bearer ", "://a:", "://", "a-", " ", "*", "https:/"])
def test_no_text_takes_long(word: str) -> None:
    text = word * (60_000 // len(word))
    began = perf_counter()
    redacted(text)
    Refusals("vendor", secret="tree").scrubbed(text)
    # Quadratic time would be many seconds.
    assert perf_counter() - began < 1.5
