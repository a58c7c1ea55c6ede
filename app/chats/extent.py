"""Where a picture ends within its bytes. What follows its end makes a second file of it: a polyglot.

Decoders stop at the end and never look at the rest; a browser, an unpacker or a virus may start there.
"""

import re
from collections.abc import Callable

_JPEG = b"\xff\xd8\xff"
# A marker that does not belong to the compressed data: no stuffed zero, no restart, no fill byte.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
_PADDING = re.compile(rb"[\x00\s]*")


def has_foreign_rest(data: bytes, mime: str) -> bool:
    """Whether something follows the picture that neither pads it nor is what cameras append to their JPEGs.

    Those are further JPEGs (depth and gain maps), a film of the moment (MP4) and Samsung's trailer.
    """
    at = _padded(data, _ENDS[mime](data, 0))
    while mime == "image/jpeg" and data.startswith(_JPEG, at):
        at = _padded(data, _jpeg_end(data, at))
    if at >= len(data):
        return False
    # A film begins with its length, whose zeros look like padding.
    return mime != "image/jpeg" or not (b"ftyp" in data[at : at + 8] or data.endswith(b"SEFT"))


def _padded(data: bytes, at: int) -> int:
    padding = _PADDING.match(data, at)
    return padding.end() if padding else at


def _jpeg_end(data: bytes, at: int) -> int:
    at += 2
    while found := _MARKER.search(data, at):
        at = found.end()
        if data[at - 1] == 0xD9:
            return at
        at += int.from_bytes(data[at : at + 2], "big")
    return len(data)


def _png_end(data: bytes, at: int) -> int:
    at += 8
    while at < len(data):
        kind = data[at + 4 : at + 8]
        at += 12 + int.from_bytes(data[at : at + 4], "big")
        if kind == b"IEND":
            return at
    return len(data)


def _webp_end(data: bytes, at: int) -> int:
    size = int.from_bytes(data[at + 4 : at + 8], "little")
    return at + 8 + size + size % 2


def _gif_end(data: bytes, at: int) -> int:
    try:
        at += 13 + _gif_colours(data[at + 10])
        while data[at] in b"!,":
            # An extension has two bytes before its blocks; a frame has ten, a table of colours and a code size.
            at += 2 if data[at] == ord("!") else 11 + _gif_colours(data[at + 9])
            while data[at]:
                at += 1 + data[at]
            at += 1
        return at + 1 if data[at] == ord(";") else at
    except IndexError:
        return len(data)


def _gif_colours(flags: int) -> int:
    return 3 * 2 ** (flags % 8 + 1) if flags & 0x80 else 0


_ENDS: dict[str, Callable[[bytes, int], int]] = {
    "image/jpeg": _jpeg_end,
    "image/png": _png_end,
    "image/webp": _webp_end,
    "image/gif": _gif_end,
}
