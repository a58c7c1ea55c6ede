"""Where pictures end: what is behind is told from padding and from what cameras append."""

import io
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.chats.extent import has_foreign_rest
from tests.chats.pictures import picture

HTML = b"<!doctype html><script>alert(1)</script>"
PICTURES = {
    "image/png": picture("PNG"),
    "image/jpeg": picture("JPEG"),
    "image/webp": picture("WEBP"),
    "image/gif": picture("GIF", "P"),
}
VARIANTS = [
    ("image/jpeg", picture("JPEG", progressive=True)),
    ("image/jpeg", picture("JPEG", "CMYK", comment=b"\xff\xd9 not the end")),
    ("image/jpeg", picture("JPEG", "L", restart_marker_rows=1)),
    ("image/webp", picture("WEBP", "RGBA", lossless=True)),
    ("image/gif", picture("GIF", "P", comment=b"; not the end")),
    ("image/png", picture("PNG", "P", transparency=0)),
]


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("evil.js", "alert(1)")
    return file.getvalue()


MIMES = pytest.mark.parametrize("mime", PICTURES)


@pytest.mark.parametrize(("mime", "data"), [*PICTURES.items(), *VARIANTS])
def test_a_picture_ends_where_its_bytes_do(mime: str, data: bytes) -> None:
    assert not has_foreign_rest(data, mime)
    assert not has_foreign_rest(data + bytes(512) + b"\r\n", mime)
    assert has_foreign_rest(data + b"x", mime)
    assert has_foreign_rest(data + bytes(512) + HTML, mime)


@MIMES
def test_a_second_file_is_seen(mime: str) -> None:
    for second in (HTML, _zip(), b"*/=1;alert(1)//", b"%PDF-1.7\n%%EOF", b"GIF89a", b"<?php"):
        assert has_foreign_rest(PICTURES[mime] + second, mime)


def test_what_cameras_append_to_jpegs_is_theirs() -> None:
    jpeg = PICTURES["image/jpeg"]
    film, other = b"\x00\x00\x00\x18ftypmp42" + bytes(40), b"\x00\x00\x00 ftypisom" + bytes(40)
    for rest in (
        jpeg,
        bytes(100) + jpeg + jpeg,
        film,
        bytes(9) + other,
        jpeg + film,
        b"\x00\x00\x00\x00image info SEFT",
    ):
        assert not has_foreign_rest(jpeg + rest, "image/jpeg")
    assert has_foreign_rest(jpeg + jpeg + HTML, "image/jpeg")
    for mime in PICTURES.keys() - {"image/jpeg"}:
        assert has_foreign_rest(PICTURES[mime] + film, mime)


@MIMES
def test_a_picture_that_breaks_off_has_no_rest(mime: str) -> None:
    """It is the decoder that refuses it."""
    for end in range(len(PICTURES[mime])):
        assert not has_foreign_rest(PICTURES[mime][:end], mime)


@given(mime=st.sampled_from(sorted(PICTURES)), at=st.floats(0, 1, exclude_max=True), damage=st.binary(max_size=64))
def test_damage_breaks_nothing(mime: str, at: float, damage: bytes) -> None:
    data = bytearray(PICTURES[mime])
    place = int(at * len(data))
    data[place : place + len(damage)] = damage
    assert has_foreign_rest(bytes(data), mime) in (True, False)


@MIMES
def test_megabytes_of_anything_are_gone_through_once(mime: str) -> None:
    """The deadline of a test is the proof: quadratic time would be hours."""
    for filling in (b"\xff\xd8\xff\xd9", b"\xff", b"\xff\x00", b"\xff\xc0\x00\x02", b"!\xff\x01\x00\x00", b"\x00"):
        has_foreign_rest(PICTURES[mime] + filling * (4_000_000 // len(filling)), mime)
        has_foreign_rest(PICTURES[mime][:20] + filling * (4_000_000 // len(filling)), mime)
