"""Text from outside: what looks like a secret goes, in a time that grows with the text and not with its square."""

from time import perf_counter

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import BadRequest
from app.providers.refusal import Refusals
from app.text import clean, parse_object, redacted, stored_size

SECRETS = {
    "key sk-ab***yz.": "key [key].",
    "Incorrect API key provided: abcd****wxyz": "Incorrect API key provided: [key]",
    "sk-abcdefgh.xyz*** and (abc***def)": "[key] and [key])",
    "Bearer abc, then": "[key] then",
    "two ** stars * are none": "two ** stars * are none",
    "token eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2ln-bmF0_dXJl?": "token [token]?",
    f"/api/x/{'aB3-' * 14}/y": "/api/x/[token]/y",
    f"enc:1:0a1b2c3d:{'x' * 40}": "[token]",
    f"{'long_name_' * 5}of_56x and {'0a1b' * 16}": f"{'long_name_' * 5}of_56x and {'0a1b' * 16}",
    "postgresql://parley:secret@db/x": "postgresql://[credentials]@db/x",
}


@pytest.mark.parametrize("text", SECRETS)
def test_what_looks_like_a_key_is_gone(text: str) -> None:
    assert redacted(text) == SECRETS[text]


@pytest.mark.parametrize(
    "word",
    [
        "z",
        "a.",
        "*a",
        "**a ",
        "sk-",
        "Bearer ",
        "://a:",
        "://",
        "a-",
        "eyJaaaaaaaa-",
        "A1-",
        "enc:1:x ",
        " ",
        "*",
        "https:/",
    ],
)
def test_no_text_takes_long(word: str) -> None:
    text = word * (60_000 // len(word))
    began = perf_counter()
    redacted(text)
    Refusals("vendor", secret="tree").scrubbed(text)
    # Quadratic time would be many seconds.
    assert perf_counter() - began < 1.5


@pytest.mark.parametrize("lone", ["", "\\ud800"])
def test_numbers_are_such_as_can_be_written_again_whichever_way_they_are_read(lone: str) -> None:
    numbers = f"[{2**64}, {-(2**63) - 1}, {2**64 - 1}, 1, 1.5, {'9' * 300}]"
    found = parse_object(f'{{"lone": "{lone}", "numbers": {numbers}}}'.encode())
    assert found["numbers"] == [float(2**64), float(-(2**63) - 1), 2**64 - 1, 1, 1.5, float("9" * 300)]
    orjson.dumps(found)


@pytest.mark.parametrize("lone", ["", "\\ud800"])
def test_a_body_may_be_100_deep(lone: str) -> None:
    for depth in (99, 100):
        body = f'{{"lone": "{lone}", "deep": {"[" * depth}{"]" * depth}}}'.encode()
        if depth == 99:
            parse_object(body)
        else:
            with pytest.raises(BadRequest, match="nested"):
                parse_object(body)


@given(st.text(st.sampled_from("aé🌿\0\ud83d\ude00\uffff")))
def test_the_size_of_a_text_is_that_of_what_is_stored(text: str) -> None:
    assert stored_size(text) == len(clean(text).encode())
