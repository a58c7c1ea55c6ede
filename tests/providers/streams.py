"""Event streams as hypothesis draws them: one stream of events, written in any of the ways the standard allows."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

TEXTS = st.text(st.one_of(st.characters(), st.sampled_from('\x00\r\n\t"\\/\u2028\u0085\ud83d\ude00🙂é')), max_size=12)
ENDINGS = st.sampled_from([b"\n", b"\r\n", b"\r"])
# The server and both readers live as long as the test; each example only asks them again.
ONE_SERVER = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@dataclass(frozen=True, slots=True)
class Wire:
    """A stream as bytes, cut into pieces; `whole_at` is where the event that finishes it is complete."""

    stream: bytes
    cuts: tuple[int, ...]
    whole_at: int

    def pieces(self, end: int | None = None) -> list[bytes]:
        stream = self.stream[:end]
        places = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in self.cuts)})
        return [stream[start:stop] for start, stop in itertools.pairwise(places)]

    def pieces_before_the_finish(self, share: float) -> list[bytes]:
        """Any part of the stream that is not whole yet."""
        # The blank line that completes an event is over at its CR; the LF after it adds nothing.
        needed = self.whole_at - self.stream[: self.whole_at].endswith(b"\r\n")
        return self.pieces(int(needed * share))


def cuts() -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(0, 100_000), max_size=20).map(tuple)


@st.composite
def rendered(draw: st.DrawFn, event: Mapping[str, object], ending: bytes, *, named: bool = False) -> bytes:
    """One of the ways to write an event: escaped or not, over one line or many, among comments and other fields."""
    text = json.dumps(event, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, None, 1])))
    data = text.encode("utf-8", "surrogatepass")
    if b"\xed" in data:  # a lone surrogate has no UTF-8; servers escape it
        data = json.dumps(event).encode()
    prefix = draw(st.sampled_from([b"data: ", b"data:"]))
    name = [b"event: %s" % str(event["type"]).encode()] if named else []
    lines = [*name, *(prefix + line for line in data.split(b"\n"))]
    return ending.join([*draw(st.sampled_from(_extras(named))), *lines, b"", b""])


def _extras(named: bool) -> Sequence[Sequence[bytes]]:
    return [[], [b": hb"], [b":"], [b"id: 1"], [b"nobody: knows"], *([] if named else [[b"event: message"]])]


def storable(text: str) -> str:
    """What we make of an SDK's text: U+FFFD for NUL and lone surrogates, pairs joined."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").replace("\x00", "\ufffd")
