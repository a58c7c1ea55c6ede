"""What the demo says: readable text that depends on the question and is the same every time."""

import itertools
import re
import zlib
from collections.abc import Iterator

_EXCERPT = 120
# About the length of a model's tokens: a word with the space before it, longer words in two or three pieces.
_TOKEN = re.compile(r"\n+|[^\S\n]*\S{1,7}|[^\S\n]+")

_OPENINGS = (
    "You asked: *{question}* Here is an answer that looks like one.",
    "Your message was: *{question}* Let me pretend to think about it.",
    "About *{question}* a real model would have an opinion. I have sentences.",
)
_BODIES = (
    "Every piece of this text is one event. It was written to PostgreSQL before you saw it, so closing the page or "
    "losing the network costs you nothing: come back and the answer goes on where you left it.",
    "Watch the text grow. Each token travels from this provider to the gateway, is committed with its neighbours, "
    "and only then reaches your reader. That takes a few milliseconds.",
    "Try to break it: cut the connection, reload the page, restart the gateway in the middle of a sentence. The "
    "events keep their numbers, and none comes twice.",
    "Nothing here was computed by a neural network. The sentences were chosen by a checksum of your message, which "
    "is why the same question always gets the same answer.",
)
_LISTS = (
    "Three things to notice:\n\n1. **Order** – events are numbered from one, without gaps.\n"
    "2. **Durability** – what you have seen is on disk.\n3. **Resuming** – send `Last-Event-ID` and read on.",
    "In short:\n\n- *Streaming* is how the answer reaches you.\n- *Storing* is why it is still there tomorrow.\n"
    "- *Resuming* is what a flaky train connection needs.",
    "What you could do next:\n\n- Open two tabs on the same stream.\n- Read it with `curl -N`.\n"
    "- Put a real provider in my place: one YAML file, one environment variable.",
)
_CLOSINGS = (
    "That is all a demo has to say. 🙂",
    "Ask something else and the words will change – grüße from the demo. 👋",
    "End of the demonstration – 以上です。",
)
_FILLER = (
    "\n\nStill the demo: you asked for a long answer, so here are more words of no importance.",
    "\n\nThe demo goes on, one small token after the other, at the pace that was asked for.",
    "\n\nEven the longest demo answer ends where it was told to end.",
)


def tokens(question: str, count: int | None) -> list[str]:
    """The answer in pieces; exactly `count` of them where a count is given."""
    if count is None:
        return cut(_text(question))
    return list(itertools.islice(_endless(question), count))


def cut(text: str) -> list[str]:
    """Any text in pieces like a model's."""
    return _TOKEN.findall(text)


def _endless(question: str) -> Iterator[str]:
    yield from cut(_text(question))
    for paragraph in itertools.cycle(_FILLER):
        yield from cut(paragraph)


def _text(question: str) -> str:
    seed = zlib.crc32(question.encode("utf-8", "replace"))
    opening, body, points, closing = (
        choices[(seed >> shift) % len(choices)]
        for shift, choices in ((0, _OPENINGS), (8, _BODIES), (16, _LISTS), (24, _CLOSINGS))
    )
    said = opening.format(question=_excerpt(question))
    return f"**This is a demo**, not a language model. {said}\n\n{body}\n\n{points}\n\n{closing}"


def _excerpt(question: str) -> str:
    line = " ".join(question.split()) or "nothing at all"
    line = line if len(line) <= _EXCERPT else f"{line[: _EXCERPT - 1]}…"
    return line if line[-1] in ".!?…" else f"{line}."
