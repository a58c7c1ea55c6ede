"""Any chunking of a text gives the same visible text and the same markers at the same places: those of a naive reading
of the whole text. What is held back at any time could be a marker."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from app.flows.markers import Marker, Piece, Scanner, refusal

MOST = 6
Found = tuple[str, list[tuple[int, str, str]]]


def naive(markers: Sequence[Marker], text: str, most: int) -> Found:
    """The rules as they are written, on the whole text, one character after the other."""
    visible, found, at = "", [], 0
    while at < len(text):
        here = [marker for marker in markers if text.startswith(marker.open, at)]
        if not here:
            visible, at = visible + text[at], at + 1
            continue
        marker = max(here, key=lambda marker: len(marker.open))
        start = at + len(marker.open)
        stop = text.find(marker.close, start)
        if start <= stop <= start + most:
            found.append((len(visible), marker.name, text[start:stop]))
            at = stop + len(marker.close)
        else:
            visible, at = visible + marker.open, start
    return visible, found


def joined(pieces: Sequence[Piece]) -> Found:
    visible, found = "", []
    for piece in pieces:
        assert piece.text or piece.markers
        visible += piece.text
        found += [(len(visible), name, content) for name, content in piece.markers]
    return visible, found


delimiters = st.text("<>/a", min_size=1, max_size=4)
declared = st.lists(
    st.builds(Marker, st.sampled_from("klmnop"), delimiters, delimiters),
    max_size=4,
    unique_by=(lambda marker: marker.name, lambda marker: marker.open),
)


@st.composite
def chunked(draw: st.DrawFn) -> tuple[list[Marker], list[str]]:
    """Markers, and a text made of their delimiters and of what looks like them, in pieces."""
    markers = draw(declared)
    parts = [delimiter for marker in markers for delimiter in (marker.open, marker.close)]
    words = st.one_of(st.sampled_from(parts or ["a"]), st.text("<>/ab", max_size=3), st.text(max_size=2))
    text = "".join(draw(st.lists(words, max_size=25)))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return markers, [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@given(chunked(), st.sampled_from([0, 1, MOST, 4096]))
def test_any_chunking_gives_what_the_whole_text_gives(case: tuple[list[Marker], list[str]], most: int) -> None:
    markers, chunks = case
    assert refusal(markers) is None
    text = "".join(chunks)
    for way in (chunks, [text], list(text)):
        scanner = Scanner(markers, most=most)
        pieces = [piece for chunk in way for piece in scanner.feed(chunk)] + scanner.end()
        assert joined(pieces) == naive(markers, text, most)


@given(chunked())
def test_only_what_may_be_a_marker_is_held_back(case: tuple[list[Marker], list[str]]) -> None:
    markers, chunks = case
    width = {marker.name: len(marker.open) + len(marker.close) for marker in markers}
    scanner, fed, given_out = Scanner(markers, most=MOST), "", 0
    for chunk in chunks:
        fed += chunk
        visible, found = joined(scanner.feed(chunk))
        given_out += len(visible) + sum(width[name] + len(content) for _, name, content in found)
        held = fed[given_out:]
        assert not held or any(_may_be(marker, held) for marker in markers)


def _may_be(marker: Marker, held: str) -> bool:
    """Whether `held` is less than the opening, or the opening and content with room for the rest of a marker."""
    content = held[len(marker.open) :]
    return (len(held) < len(marker.open) and marker.open.startswith(held)) or (
        held.startswith(marker.open) and marker.close not in content and len(content) < MOST + len(marker.close)
    )


@given(chunked())
def test_a_scanner_begins_anew_after_the_end(case: tuple[list[Marker], list[str]]) -> None:
    markers, chunks = case
    scanner = Scanner(markers, most=MOST)
    first, second = ([*scanner.feed("".join(chunks)), *scanner.end()] for _ in range(2))
    assert first == second
