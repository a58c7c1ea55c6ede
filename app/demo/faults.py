"""Everything that can go wrong between a provider and its client, by name. docs/demo-provider.md lists them."""

import functools
import gzip
import json
from collections.abc import Awaitable, Callable, Mapping

from app.demo.dialect import Frames, dumped
from app.demo.exchange import Exchange

MIB = 1024 * 1024
_JSON = ((b"content-type", b"application/json"),)

# A shape changes the frames of the stream before they are sent; `at` is the index behind the chosen number of tokens.
Shape = Callable[[list[bytes], Frames, int], list[bytes]]


def _crlf(whole: list[bytes], frames: Frames, at: int) -> list[bytes]:
    return [frame.replace(b"\n", b"\r\n") for frame in whole]


def _cr(whole: list[bytes], frames: Frames, at: int) -> list[bytes]:
    return [frame.replace(b"\n", b"\r") for frame in whole]


def _bom(whole: list[bytes], frames: Frames, at: int) -> list[bytes]:
    return [b"\xef\xbb\xbf" + whole[0], *whole[1:]]


def _comments(whole: list[bytes], frames: Frames, at: int) -> list[bytes]:
    return [part for frame in whole for part in (b": still here\n\n", b":\n" + frame)]


def _multiline(whole: list[bytes], frames: Frames, at: int) -> list[bytes]:
    return [b"\n".join(map(_over_lines, frame.split(b"\n"))) for frame in whole]


def _over_lines(line: bytes) -> bytes:
    """A line of JSON data as many lines; any other as it is."""
    name, _, data = line.partition(b":")
    if name != b"data" or not data.lstrip().startswith(b"{"):
        return line
    text = json.dumps(json.loads(data), indent=1, ensure_ascii=False)
    return "\n".join(f"data: {part}" for part in text.split("\n")).encode()


def _bytes(whole: list[bytes], frames: Frames, at: int) -> list[bytes]:
    return [bytes((byte,)) for frame in whole for byte in frame]


def _inserted(*contents: bytes) -> Shape:
    """Frames with these JSON-encoded strings as their content."""

    def insert(whole: list[bytes], frames: Frames, at: int) -> list[bytes]:
        return [*whole[:at], *(frames.text(content) for content in contents), *whole[at:]]

    return insert


def _line_of(size: int) -> Shape:
    """One frame whose line is exactly this long."""

    def insert(whole: list[bytes], frames: Frames, at: int) -> list[bytes]:
        room = size - max(map(len, frames.text(b'""').split(b"\n")))
        return [*whole[:at], frames.text(b'"%s"' % (b"x" * room)), *whole[at:]]

    return insert


def _raw(*events: bytes) -> Shape:
    def insert(whole: list[bytes], frames: Frames, at: int) -> list[bytes]:
        return [*whole[:at], *events, *whole[at:]]

    return insert


def _error(whole: list[bytes], frames: Frames, at: int) -> list[bytes]:
    return [*whole[:at], frames.failed]


def _eof(whole: list[bytes], frames: Frames, at: int) -> list[bytes]:
    return whole[:at]


def _no_done(whole: list[bytes], frames: Frames, at: int) -> list[bytes]:
    return [frame for frame in whole if frame != frames.done]


def _no_finish(whole: list[bytes], frames: Frames, at: int) -> list[bytes]:
    return [frame for frame in whole if frame != frames.finish]


def _trailing(whole: list[bytes], frames: Frames, at: int) -> list[bytes]:
    return [*whole, frames.text(b'"after the end"'), b"data: {not json\n\n", b"garbage\n\n"]


SHAPES: Mapping[str, Shape] = {
    "error": _error,
    "eof": _eof,
    "no_done": _no_done,
    "no_finish": _no_finish,
    "nul": _inserted(b'"a\\u0000b"'),
    "surrogates": _inserted(b'"\\ud83d"', b'"\\ude00"', b'"x\\ud83dy\\ude00z"'),
    "u2028": _inserted('"a\u2028b\u2029c\u0085d"'.encode()),
    "long": _line_of(MIB),
    "too_long": _line_of(MIB + 1),
    "trailing": _trailing,
    "events": _raw(
        b'event: ping\ndata: {"type":"ping"}\n\n',
        b"id: 7\nretry: 10\nnobody: knows\n\n",
        b'event: thinking\ndata: {"object":"thinking","choices":"none"}\n\n',
        b"data: null\n\n",
    ),
    "deep": _raw(b"data: " + b"[" * 500_000 + b"]" * 500_000 + b"\n\n"),
    "digits": _raw(b'data: {"choices":' + b"9" * 900_000 + b"}\n\n"),
    "garbage": _raw(b"data: {this is not JSON}\n\n"),
    "multiline": _multiline,
    "comments": _comments,
    "bom": _bom,
    "crlf": _crlf,
    "cr": _cr,
    "bytes": _bytes,
}


async def _status(exchange: Exchange) -> None:
    wishes = exchange.wishes
    headers = [*_JSON, *([(b"retry-after", wishes.retry_after.encode())] if wishes.retry_after else [])]
    said = f"The demo answers {wishes.status} on request. Your credentials: {exchange.credentials}"
    failed = exchange.dialect.error(f"{said}\r\nSee https://demo.invalid/errors.", status=wishes.status)
    await exchange.start(wishes.status, headers)
    await exchange.end(dumped(failed))


async def _json_error(exchange: Exchange) -> None:
    await exchange.start(200, _JSON)
    await exchange.end(dumped(exchange.dialect.error("The demo is overloaded on request.", status=529)))


async def _html(exchange: Exchange) -> None:
    await exchange.start(200, ((b"content-type", b"text/html"),))
    await exchange.end(b"<html><title>Please log in</title></html>")


async def _redirect(exchange: Exchange) -> None:
    await exchange.start(307, ((b"location", exchange.wishes.to.encode()),))
    await exchange.end()


async def _gzip(exchange: Exchange) -> None:
    await exchange.start(200, ((b"content-type", b"text/event-stream"), (b"content-encoding", b"gzip")))
    await exchange.end(_bomb())


@functools.cache
def _bomb() -> bytes:
    return gzip.compress(b"data: " + b"0" * (64 * MIB), compresslevel=9)


async def _deaf(exchange: Exchange) -> None:
    await exchange.hang()


async def _silent(exchange: Exchange) -> None:
    await exchange.start()
    await exchange.write(b": the first token never comes\n\n")
    await exchange.hang()


async def _vanish(exchange: Exchange) -> None:
    await exchange.reset()


# Instead of a stream.
INSTEAD: Mapping[str, Callable[[Exchange], Awaitable[None]]] = {
    "status": _status,
    "json_error": _json_error,
    "html": _html,
    "redirect": _redirect,
    "gzip": _gzip,
    "deaf": _deaf,
    "silent": _silent,
    "vanish": _vanish,
}

# After some tokens of a stream.
ENDS: Mapping[str, Callable[[Exchange], Awaitable[None]]] = {
    "stall": Exchange.hang,
    "cut": Exchange.cut,
    "reset": Exchange.reset,
}

NAMES = (*INSTEAD, *ENDS, *SHAPES)


def shaped(names: tuple[str, ...], frames: Frames, *, after: int) -> list[bytes]:
    """The whole stream after the shapes of these names, in the table's order: content first, then its encoding."""
    whole = frames.whole()
    for name, shape in SHAPES.items():
        if name in names:
            whole = shape(whole, frames, len(frames.opening) + min(after, len(frames.said)))
    return whole
