"""Conditions of rules and steps: what must be true of a message, and of what earlier flows said."""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from app.flows.config import Condition

# A letter or digit of a script that puts spaces between words. Thai, Lao, Burmese, Khmer and the scripts of East Asia
# put none, so that a keyword may stand anywhere in them, and right beside them.
_LETTER = r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\U0010ffff]"
# Marks that belong to the letter before them, which `\w` leaves out: the signs of Hebrew, Arabic and India.
_MARK = r"[\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0963\u0966-\u0dff]"
_AROUND_A_WORD = "\"'`.,:;!*()[]{}<> \t\r\n„“”‚‘’«»‹›「」『』【】。、۔।"


@dataclass(frozen=True, slots=True)
class Ask:
    """What is known of a message before anything was called. `flow_type` is the flow that the request asks for."""

    text: str
    image: bool = False
    language: str = ""
    flow_type: str | None = None


def holds(when: Condition, ask: Ask) -> bool:
    """Whether the part of a condition holds that is known from the message alone."""
    if when.image is not None and when.image != ask.image:
        return False
    if when.language and ask.language.casefold() not in {name.casefold() for name in when.language}:
        return False
    return not when.keywords or _keywords(when.keywords).search(_folded(ask.text)) is not None


def outputs_hold(when: Condition, outputs: Mapping[str, str]) -> bool:
    """Whether the other part holds: what earlier flows have said. A flow that did not run said nothing."""
    return all(as_word(outputs.get(flow, "")) in map(as_word, words) for flow, words in when.output.items())


@lru_cache(maxsize=512)
def _keywords(keywords: tuple[str, ...]) -> re.Pattern[str]:
    """Fixed words only, so that the search is linear; whole words where the script has any."""
    return re.compile("|".join(_whole(_folded(word)) for word in keywords))


def _whole(word: str) -> str:
    edge = re.compile(f"{_LETTER}|{_MARK}")
    before = f"(?<!{_LETTER})(?<!{_MARK})" if edge.match(word[0]) else ""
    after = f"(?!{_LETTER}|{_MARK})" if edge.match(word[-1]) else ""
    return before + re.escape(word) + after


def as_word(output: str) -> str:
    """What a model said, without the quotes and full stops that models like to put around a word."""
    return _folded(output).strip(_AROUND_A_WORD)


def _folded(text: str) -> str:
    """Alike for upper and lower case, for wide and narrow letters, and however accents are put together."""
    return (text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold()
