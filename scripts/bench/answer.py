"""One answer as a reader got it: the bytes with their times of arrival, taken apart after the measuring is over."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import httptools
import orjson

Subject = Literal["provider", "relay", "passthrough", "parley", "elsewhere"]
Piece = tuple[int, bytes]

# The demo provider's tokens are the time of their sending, this many digits long.
_STAMP = 19


@dataclass(slots=True)
class Answer:
    """Times in monotonic nanoseconds: of the request, and of each token at the provider and at the reader."""

    asked: int
    sent: list[int] = field(default_factory=list)
    arrived: list[int] = field(default_factory=list)
    error: str | None = None


class Response:
    """An HTTP response in the making."""

    def __init__(self) -> None:
        self.body = bytearray()
        self.complete = False
        self._parser = httptools.HttpResponseParser(self)

    @property
    def status(self) -> int:
        return self._parser.get_status_code()

    def feed(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete = True


class Malformed(Exception):
    """What arrived is not the answer that was asked for."""


def read(subject: Subject, asked: int, pieces: list[Piece], *, tokens: int) -> Answer:
    """Take an event stream apart; `error` says what is wrong with it, if anything."""
    answer = Answer(asked)
    try:
        for arrived, token in _READERS[subject](_events(pieces)):
            stamps = [int(token[at : at + _STAMP]) for at in range(0, len(token), _STAMP)]
            answer.sent += stamps
            answer.arrived += [arrived] * len(stamps)
        if len(answer.sent) != tokens:
            raise Malformed(f"{len(answer.sent)} tokens instead of {tokens}")
    except (Malformed, httptools.HttpParserError, ValueError, KeyError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer


def _events(pieces: list[Piece]) -> Iterator[tuple[int, Any]]:
    """The JSON of each event with the arrival of its last byte."""
    response = Response()
    for arrived, data in pieces:
        response.feed(data)
        *frames, rest = response.body.split(b"\n\n")
        response.body = rest
        for frame in frames:
            if (payload := frame[frame.index(b"data: ") + 6 :]) != b"[DONE]":
                yield arrived, orjson.loads(payload)
    if not response.complete or response.status != 200:
        raise Malformed(f"status {response.status}, {'whole' if response.complete else 'cut off'}")


_Events = Iterator[tuple[int, Any]]


def _of_provider(events: _Events) -> Iterator[tuple[int, str]]:
    for arrived, event in events:
        if event["choices"] and (token := event["choices"][0]["delta"].get("content")):
            yield arrived, token


def _of_passthrough(events: _Events) -> Iterator[tuple[int, str]]:
    for arrived, event in events:
        yield arrived, event["token"]


def _of_parley(events: _Events) -> Iterator[tuple[int, str]]:
    status = None
    for expected, (arrived, event) in enumerate(events, 1):
        if event["id"] != expected:
            raise Malformed(f"event {event['id']} instead of {expected}")
        if event["event"] == "token":
            yield arrived, event["data"]["token"]
        elif event["event"] == "stream_end":
            status = event["data"]["status"]
    if status != "completed":
        raise Malformed(f"ended as {status}")


_READERS: dict[Subject, Callable[[_Events], Iterator[tuple[int, str]]]] = {
    "provider": _of_provider,
    "relay": _of_provider,
    "passthrough": _of_passthrough,
    "parley": _of_parley,
    "elsewhere": _of_parley,
}
