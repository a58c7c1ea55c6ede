"""What a vendor's wire format is to the demo: how a request is understood, and the bytes of what is said to it."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request

# A token to be replaced by the time at which its frame is sent; as wide as any such time.
STAMP = "0" * 19
# What a provider says that fails in the middle of a stream.
FAILED = "The demo failed on request, see https://demo.invalid/help."


@dataclass(frozen=True, slots=True)
class Call:
    """A request as far as the demo understands it. `model` holds the wishes; `length` is the prompt's, in tokens."""

    model: str
    question: str
    length: int
    streaming: bool
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Frames:
    """The frames of one answer, encoded before the first is sent: a benchmark measures its subject, not the demo.

    `around` is what stands before and after the encoded string of a text frame. `finish` (the frame that names the
    reason) and `done` (the end marker) are among `ending`; `failed` says that the provider failed.
    """

    opening: Sequence[bytes]
    around: tuple[bytes, bytes]
    said: Sequence[str]
    finish: bytes
    done: bytes
    ending: Sequence[bytes]
    failed: bytes

    def text(self, content: bytes) -> bytes:
        """A frame around an already encoded string."""
        return self.around[0] + content + self.around[1]

    def whole(self) -> list[bytes]:
        return [*self.opening, *(self.text(dumped(token)) for token in self.said), *self.ending]


class Dialect(Protocol):
    """One vendor's wire format. `path` is a route; its parameters are in `request.path_params`."""

    path: str

    def understood(self, body: Any, request: Request) -> Call:
        """Raises ValueError, with a sentence for the client, for what the vendor would refuse."""
        ...

    def frames(self, call: Call, said: Sequence[str]) -> Frames:
        """The answer as a stream."""
        ...

    def document(self, call: Call, said: Sequence[str]) -> Any:
        """The answer in one piece, as JSON."""
        ...

    def error(self, message: str, *, status: int) -> Any:
        """The body of an error answer, as JSON."""
        ...


def dumped(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def stamped(frames: bytes) -> bytes:
    return frames.replace(STAMP.encode(), b"%019d" % time.monotonic_ns())
