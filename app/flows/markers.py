"""Markers: structured marks that a model writes into its text, cut out of it even when they are split over tokens.

Delimiters are fixed strings, so cutting is linear: every character is compared with the openings once, and searched
once for each closing delimiter. What is held back is bounded: outside a marker by the longest opening less one
character, inside by the opening, `most` characters of content and a closing delimiter less one.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from operator import itemgetter

_MOST_MARKERS = 32
_LONGEST = 64
# Control characters, halves of a character, and what some readers take for the end of a line.
_UNPRINTABLE = frozenset({"Cc", "Cs", "Zl", "Zp"})


@dataclass(frozen=True, slots=True)
class Marker:
    """What a chatbot declares: fixed delimiters, never patterns."""

    name: str
    open: str
    close: str


@dataclass(frozen=True, slots=True)
class Piece:
    """Visible text, and the markers that stand right behind it: (name, content) in order."""

    text: str
    markers: tuple[tuple[str, str], ...] = ()


class Scanner:
    """Cuts the markers out of one text that comes in pieces.

    The leftmost opening counts, and of several at one place the longest. A marker ends at the first closing delimiter
    behind it, there is no nesting. One that is not closed within `most` characters, or at all, was plain text: its
    opening is visible, and scanning goes on right behind the opening.
    """

    def __init__(self, markers: Sequence[Marker], *, most: int = 4096) -> None:
        self._markers = {marker.open: marker for marker in markers}
        self._most = most
        self._closings = {marker.close: _Closing(marker.close) for marker in markers}
        if markers:
            self._openings, self._whole_openings = _patterns(frozenset(self._markers))
        self._held = ""
        self._offset = 0  # of what is held, in all that went through _scan
        self._inside: Marker | None = None  # what is held begins with its opening

    def feed(self, text: str) -> list[Piece]:
        """What `text` makes certain; all of it unless it ends in what may be a marker. Never empty pieces."""
        if not self._held and (not self._markers or self._openings.search(text) is None):
            return [Piece(text)] if text else []
        return self._scan(self._held + text, self._openings)

    def end(self) -> list[Piece]:
        """What was held back, now that nothing follows."""
        return self._scan(self._held, self._whole_openings, ended=True) if self._held else []

    def _scan(self, text: str, openings: re.Pattern[str], *, ended: bool = False) -> list[Piece]:
        pieces, at = _Pieces(), 0
        while at < len(text):
            if self._inside is None:
                found = openings.search(text, at)
                pieces.add(text[at : found.start() if found else None])
                at = found.start() if found else len(text)
                if found is None or found.lastindex is None:
                    break
                self._inside = self._markers[found[0]]
            behind = self._past(text, at, self._inside, pieces=pieces, ended=ended)
            if behind is None:
                break
            self._inside, at = None, behind
        self._held = text[at:]
        self._offset += at
        return pieces.all()

    def _past(self, text: str, at: int, marker: Marker, *, pieces: "_Pieces", ended: bool) -> int | None:
        """Where scanning goes on behind the opening at `at`; None while it is not known whether that is a marker."""
        start = at + len(marker.open)
        stop = self._closings[marker.close].find(text, start, self._offset)
        if stop < 0 and not ended and len(text) - len(marker.close) < start + self._most:
            return None
        if 0 <= stop <= start + self._most:
            pieces.mark(marker.name, text[start:stop])
            return stop + len(marker.close)
        pieces.add(marker.open)
        return start


class _Closing:
    """Where a closing delimiter comes next. However many openings ask, in order, the text is searched once."""

    __slots__ = ("_clear", "_delimiter")

    def __init__(self, delimiter: str) -> None:
        self._delimiter = delimiter
        self._clear = 0  # no delimiter begins between the last start asked for and here, in all that was scanned

    def find(self, text: str, start: int, offset: int) -> int:
        """The first place in `text`, which begins at `offset`, from `start` on; or -1."""
        clear = max(self._clear - offset, start)
        place = text.find(self._delimiter, clear)
        self._clear = offset + (place if place >= 0 else max(clear, len(text) - len(self._delimiter) + 1))
        return place


class _Pieces:
    """Gathers pieces: text that follows a marker begins a new one."""

    __slots__ = ("_markers", "_pieces", "_texts")

    def __init__(self) -> None:
        self._pieces: list[Piece] = []
        self._texts: list[str] = []
        self._markers: list[tuple[str, str]] = []

    def add(self, text: str) -> None:
        if text:
            if self._markers:
                self._close()
            self._texts.append(text)

    def mark(self, name: str, content: str) -> None:
        self._markers.append((name, content))

    def all(self) -> list[Piece]:
        if self._texts or self._markers:
            self._close()
        return self._pieces

    def _close(self) -> None:
        self._pieces.append(Piece("".join(self._texts), tuple(self._markers)))
        self._texts, self._markers = [], []


@lru_cache(maxsize=256)
def _patterns(openings: frozenset[str]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Two patterns for the longest opening at the leftmost place.

    The first also finds what may become one (or a longer one) when text follows; then `lastindex` is None.
    """
    ordered = sorted(openings)
    return re.compile(_either(ordered, 0, beginnings=True)), re.compile(_either(ordered, 0, beginnings=False))


def _either(openings: Sequence[str], at: int, *, beginnings: bool) -> str:
    r"""A pattern for the rest of sorted openings that are equal up to `at`: `a(?:b(?:c()|\Z)|\Z|())` for `a` and `abc`.

    Beginnings are shared, so at most one opening's length is compared at any place, however many there are.
    """
    longer = groupby((opening for opening in openings if len(opening) > at), itemgetter(at))
    branches = [re.escape(first) + _either([*alike], at + 1, beginnings=beginnings) for first, alike in longer]
    if branches and at and beginnings:
        branches.append(r"\Z")
    if len(openings[0]) == at:
        branches.append("()")
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"


def refusal(markers: Sequence[Marker]) -> str | None:
    """Why this set of markers cannot work, in a sentence; None when it can."""
    if len(markers) > _MOST_MARKERS:
        return f"At most {_MOST_MARKERS} markers can be declared, not {len(markers)}."
    for marker in markers:
        if not marker.name:
            return "A marker needs a name."
        for which, delimiter in (("opening", marker.open), ("closing", marker.close)):
            if why := _unusable(delimiter):
                return f"The {which} delimiter of the marker {marker.name!r} {why}."
    return _clash(markers)


def _unusable(delimiter: str) -> str | None:
    if not delimiter:
        return "is empty"
    if len(delimiter) > _LONGEST:
        return f"is longer than {_LONGEST} characters"
    if any(unicodedata.category(character) in _UNPRINTABLE for character in delimiter):
        return "contains a control character or half a character, such as a line break"
    return "is nothing but white space" if delimiter.isspace() else None


def _clash(markers: Sequence[Marker]) -> str | None:
    names: set[str] = set()
    openings: dict[str, str] = {}
    for marker in markers:
        if marker.name in names:
            return f"Two markers are named {marker.name!r}."
        if (other := openings.get(marker.open)) is not None:
            return f"The markers {other!r} and {marker.name!r} begin with the same delimiter {marker.open!r}."
        names.add(marker.name)
        openings[marker.open] = marker.name
    return None
