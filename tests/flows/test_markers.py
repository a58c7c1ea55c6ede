"""Markers as a chatbot uses them, sets that cannot work, and texts made to be slow."""

from dataclasses import replace
from typing import Any

import pytest

from app.flows.markers import Marker, Piece, Scanner, refusal

CARD = Marker("card", "[[card:", "]]")
PERSON = Marker("person", "[[person", "]]")
LINK = Marker("link", "[[", "]]")


def test_without_markers_every_token_passes() -> None:
    scanner = Scanner([])
    assert scanner.feed("[[card:7]]") == [Piece("[[card:7]]")]
    assert scanner.feed("") == []
    assert scanner.end() == []


def test_a_marker_is_cut_out_across_tokens_and_stands_behind_the_text_before_it() -> None:
    scanner = Scanner([CARD])
    assert scanner.feed("Try this: [") == [Piece("Try this: ")]
    assert scanner.feed("[card:") == []
    assert scanner.feed("sku-7]") == []
    assert scanner.feed("] or that") == [Piece("", (("card", "sku-7"),)), Piece(" or that")]
    assert scanner.end() == []


def test_markers_behind_each_other_share_a_piece() -> None:
    pieces = Scanner([CARD, PERSON]).feed("a[[card:1]][[person]]b[[card:2]]")
    assert pieces == [Piece("a", (("card", "1"), ("person", ""))), Piece("b", (("card", "2"),))]


def test_text_that_cannot_become_a_marker_comes_at_once() -> None:
    scanner = Scanner([CARD])
    assert scanner.feed("a [b] [[d") == [Piece("a [b] [[d")]
    assert scanner.feed("[[ca") == []
    assert scanner.feed("t [") == [Piece("[[cat ")]
    assert scanner.end() == [Piece("[")]


def test_of_several_openings_the_longest_counts() -> None:
    scanner = Scanner([LINK, CARD])
    assert scanner.feed("[[ca") == []
    assert scanner.feed("t]] [[card:1]]") == [Piece("", (("link", "cat"),)), Piece(" ", (("card", "1"),))]


def test_an_unclosed_marker_is_text_and_what_follows_its_opening_is_scanned() -> None:
    scanner = Scanner([CARD, Marker("person", "<p>", "</p>")])
    assert scanner.feed("a [[card:<p>Jo</p>") == [Piece("a ")]
    assert scanner.end() == [Piece("[[card:", (("person", "Jo"),))]


def test_content_may_have_as_many_characters_as_allowed_and_no_more() -> None:
    assert Scanner([CARD], most=3).feed("[[card:123]]") == [Piece("", (("card", "123"),))]
    scanner = Scanner([CARD], most=3)
    assert scanner.feed("[[card:123]") == []
    assert scanner.feed("]") == [Piece("", (("card", "123"),))]
    assert scanner.feed("[[card:123") == []
    assert scanner.feed("4]]") == [Piece("[[card:1234]]")]
    assert Scanner([CARD], most=3).feed("[[card:12345]]") == [Piece("[[card:12345]]")]


def test_the_same_delimiter_may_open_and_close() -> None:
    assert Scanner([Marker("mark", "%%", "%%")]).feed("a%%b%%c%%") == [Piece("a", (("mark", "b"),)), Piece("c")]


def test_delimiters_are_no_patterns() -> None:
    scanner = Scanner([Marker("odd", ".*(", "\\Z)")])
    assert scanner.feed("aa( .*(x\\Z)") == [Piece("aa( ", (("odd", "x"),))]


class Counted(str):
    """A text that counts how many of its characters are searched for closing delimiters."""

    searched = 0

    def find(self, sub: str, *bounds: Any) -> int:
        place = super().find(sub, *bounds)
        start = bounds[0] if bounds else 0
        Counted.searched += (len(self) if place < 0 else place + len(sub)) - start
        return place

    def __add__(self, other: str) -> "Counted":
        return Counted(super().__add__(other))

    def __radd__(self, other: str) -> "Counted":
        return Counted(other + str(self))

    def __getitem__(self, index: Any) -> "Counted":
        return Counted(super().__getitem__(index))


@pytest.mark.parametrize("chunk", [1, 7, 20_000])
@pytest.mark.parametrize("word", ["<", "<a", "<a<", "<a<b"])
def test_openings_that_are_never_closed_cost_no_second_search(word: str, chunk: int) -> None:
    markers = [Marker("one", "<", "/>"), Marker("two", "<a", "a>"), Marker("three", "<a<b", "b>")]
    text, scanner = word * (20_000 // len(word)), Scanner(markers)
    Counted.searched = 0
    pieces = [piece for at in range(0, len(text), chunk) for piece in scanner.feed(Counted(text[at : at + chunk]))]
    assert "".join(piece.text for piece in pieces + scanner.end()) == text
    assert 0 < Counted.searched <= 2 * len({marker.close for marker in markers}) * len(text)


def test_every_set_that_may_be_declared_can_be_scanned() -> None:
    letters = [chr(ord("あ") + number) for number in range(32)]
    markers = [Marker(letter, letter * 64, letter * 63 + "。") for letter in letters]
    assert refusal(markers) is None
    text = "".join(f"x{marker.open}{marker.name}{marker.close}" for marker in markers)
    scanner = Scanner(markers)
    assert [piece for letter in text for piece in scanner.feed(letter) if piece.markers]
    assert Scanner(markers).feed(text) == [Piece("x", ((marker.name, marker.name),)) for marker in markers]


@pytest.mark.parametrize(
    ("markers", "why"),
    [
        ([replace(CARD, open="")], "The opening delimiter of the marker 'card' is empty."),
        ([replace(CARD, close="")], "The closing delimiter of the marker 'card' is empty."),
        ([replace(CARD, open=" \u3000")], "The opening delimiter of the marker 'card' is nothing but white space."),
        ([replace(CARD, close="x" * 65)], "The closing delimiter of the marker 'card' is longer than 64 characters."),
        ([replace(CARD, open="a\0")], "contains a control character or half a character, such as a line break."),
        ([replace(CARD, open="a\n")], "contains a control character"),
        ([replace(CARD, close="\ud800")], "or half a character"),
        ([replace(CARD, name="")], "A marker needs a name."),
        ([CARD, replace(PERSON, name="card")], "Two markers are named 'card'."),
        ([CARD, replace(PERSON, open=CARD.open)], "The markers 'card' and 'person' begin with the same delimiter '[["),
        ([Marker(str(n), f"<{n}>", ">") for n in range(33)], "At most 32 markers can be declared, not 33."),
    ],
)
def test_a_set_that_cannot_work_is_refused_in_a_sentence(markers: list[Marker], why: str) -> None:
    assert why in (refusal(markers) or "")


def test_a_set_that_works_is_not_refused() -> None:
    assert refusal([CARD, PERSON, LINK]) is None
    assert refusal([]) is None
