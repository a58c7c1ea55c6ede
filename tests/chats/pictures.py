"""Pictures made for tests: every form and mode, and what somebody hostile would send instead."""

import base64
import io
import struct
import zlib
from typing import Any

from PIL import Image

RED, BLUE = (255, 0, 0), (0, 0, 255)


def picture(form: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (64, 48), **options: Any) -> bytes:
    """A gradient from black at the top to white at the bottom; with an alpha channel from invisible to opaque."""
    gradient = Image.linear_gradient("L").resize(size)
    image = gradient.convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(gradient)
    return written(image, form, **options)


def written(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def halves(size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, BLUE)
    image.paste(RED, (0, 0, size[0] // 2, size[1]))
    return image


def noise(form: str, size: tuple[int, int], mode: str = "RGB") -> bytes:
    """What no format can compress; the bands differ."""
    bands = [Image.effect_noise(size, 100) for _ in mode]
    return written(Image.merge(mode, bands), form)


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def chunks_of(data: bytes) -> list[bytes]:
    """The kinds of a PNG's chunks, in order."""
    kinds, at = [], 8
    while at < len(data):
        kinds.append(data[at + 4 : at + 8])
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return kinds


def png(width: int, height: int, rows: bytes, *, bits: int = 8, colour: int = 6) -> bytes:
    """A PNG of any size, whatever its rows hold (they are given compressed); colour 6 is RGBA, 0 grey."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def bomb(width: int, height: int) -> bytes:
    """A transparent PNG, a thousandth of what it decodes to."""
    packer, row = zlib.compressobj(9), bytes(1 + 4 * width)
    rows = b"".join(packer.compress(row) for _ in range(height))
    return png(width, height, rows + packer.flush())


def slow_jpeg(scans: int, size: tuple[int, int] = (6000, 4000)) -> bytes:
    """A progressive JPEG whose every further scan is 60 bytes that say "all blocks stay as they are".

    Ten thousand of them fit into a megabyte and keep a decoder busy for half a minute.
    """
    flat = written(Image.new("L", size, 128), "JPEG", progressive=True)
    first_scan = flat.index(b"\xff\xda")
    end = flat.index(b"\xff\xc4", first_scan)
    # One code, of one bit: 16384 blocks (and the number in the 14 bits that follow) are skipped.
    table = b"\xff\xc4" + struct.pack(">H", 20) + b"\x10\x01" + bytes(15) + b"\xe0"
    blocks = (size[0] // 8) * (size[1] // 8)
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00" + bytes(blocks // 16384 * 2 + 2)
    return flat[:end] + table + scan * scans + b"\xff\xd9"
