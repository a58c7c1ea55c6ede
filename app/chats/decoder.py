"""A process that decodes strangers' pictures: bounded in memory and time, without secrets, gone with its gateway.

`app.chats.decoders` starts it, and nobody else imports it: Pillow stays out of the gateway. A job on stdin is a line of
JSON and base64 text; its answer on stdout is a line of JSON and, where that has a `length`, the new picture's bytes.
"""

import binascii
import hashlib
import io
import json
import os
import re
import resource
import select
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from PIL import GifImagePlugin, Image, JpegImagePlugin, MpoImagePlugin, PngImagePlugin, WebPImagePlugin

from app.chats.extent import has_foreign_rest
from app.chats.picture import Limits, Picture

# All of one WebP of 40 million pixels with its copies, the dearest of the four; and no file, no dump of memory.
_BOUNDS = {resource.RLIMIT_AS: 1 << 30, resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}
_PLUGINS = (PngImagePlugin, JpegImagePlugin, WebPImagePlugin, GifImagePlugin, MpoImagePlugin)
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_MIMES = {"PNG": "image/png", "JPEG": "image/jpeg", "MPO": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}
_ALIASES = {"image/jpg": "image/jpeg", "image/pjpeg": "image/jpeg", "image/x-png": "image/png"}
_UNKNOWN = ("", "application/octet-stream")
_DATA_URL = re.compile(rb"data:([^;,]{0,100})(?:;[^;,]{0,100}){0,4};base64,", re.IGNORECASE)
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Unfit(Exception):
    """The picture is not taken; the sentence is for whoever sent it."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


def serve() -> None:
    """Answer jobs until the gateway closes its end. The first argument holds the limits, as JSON."""
    limits = Limits(**json.loads(sys.argv[1]))
    threading.Thread(target=_leave_with_the_gateway, daemon=True).start()
    _confine()
    _be_strict(limits)
    while line := sys.stdin.buffer.readline():
        job = json.loads(line)
        text = sys.stdin.buffer.read(job["length"])
        # The default action ends the process, also in the middle of a loop in C. The gateway's deadline is the same,
        # but the gateway may have gone.
        signal.setitimer(signal.ITIMER_REAL, limits.seconds)
        told, data = _answer(text, job["mime"], limits)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(json.dumps(told).encode() + b"\n" + data)
        sys.stdout.buffer.flush()


def _leave_with_the_gateway() -> None:
    # A thread, because the end of the pipe would else be seen after the job only.
    pipe = select.poll()
    pipe.register(0, 0)
    pipe.poll()
    os._exit(0)


def _confine() -> None:
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as score:
        # Where memory runs out, this process goes and not the gateway.
        score.write("1000")
    with suppress(OSError):
        os.nice(10)
    for what, bound in _BOUNDS.items():
        with suppress(ValueError, OSError):
            resource.setrlimit(what, (bound, bound))


def _be_strict(limits: Limits) -> None:
    warnings.simplefilter("error")
    # Broken metadata, which is dropped anyhow.
    warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")
    Image.MAX_IMAGE_PIXELS = limits.pixels


def _answer(text: bytes, declared: str, limits: Limits) -> tuple[dict[str, Any], bytes]:
    try:
        picture = developed(text, declared, limits)
    except Unfit as unfit:
        return {"code": unfit.code, "detail": unfit.detail}, b""
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError):
        detail = f"The picture has more than {limits.pixels} pixels, or needs too much memory."
        return {"code": "image_too_large", "detail": detail}, b""
    except Exception:  # noqa: BLE001  decoders raise anything at hostile bytes
        return {"code": "image_invalid", "detail": "This is not a whole PNG, JPEG, WebP or GIF picture."}, b""
    told = {name: getattr(picture, name) for name in ("mime", "width", "height", "sha256")}
    return {**told, "length": len(picture.data)}, picture.data


def developed(text: bytes, declared: str, limits: Limits) -> Picture:
    """The picture in base64 text or a data: URL, encoded anew. Raises Unfit, or whatever Pillow raises."""
    url = _DATA_URL.match(text)
    data = _decoded(text[url.end() :] if url else text)
    image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
    assert image.format is not None
    mime = _MIMES[image.format]
    for said in (declared, url[1].decode("latin-1") if url else ""):
        _check_declared(said, mime)
    if has_foreign_rest(data, mime):
        raise Unfit("image_invalid", "Something that is no part of the picture follows its end.")
    del data, text
    turn = _UPRIGHT.get(_orientation(image))
    image = _shrunk(image, limits.side)
    return _encoded(image.transpose(turn) if turn is not None else image, mime, limits)


def _decoded(text: bytes) -> bytes:
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error:
        raise Unfit(
            "image_invalid", "data is not base64 in the standard alphabet, padded and without line breaks."
        ) from None
    if not data:
        raise Unfit("image_invalid", "The picture is empty.")
    return data


def _check_declared(said: str, mime: str) -> None:
    declared = said.partition(";")[0].strip().lower()
    if declared not in _UNKNOWN and _ALIASES.get(declared, declared) != mime:
        raise Unfit("image_invalid", f"The picture is {mime}, not what its mime says.")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001  metadata may be as broken as it likes
        return 1


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    """The first frame, with at most `side` pixels on the longer side."""
    # JPEG is decoded at a fraction of its size where that is enough.
    image.draft(None, (2 * side, 2 * side))
    image = _plain(image)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def _plain(image: Image.Image) -> Image.Image:
    """As grey, RGB or RGBA; a copy is made only where it must be."""
    if image.mode.startswith("I"):
        # 16 bits of grey; converting would cut instead of scale.
        return image.point(lambda value: value / 256).convert("L")
    plain = "RGBA" if image.has_transparency_data else "L" if image.mode in ("1", "L") else "RGB"
    return image if image.mode == plain else image.convert(plain)


def _encoded(image: Image.Image, mime: str, limits: Limits) -> Picture:
    # Comments and colour profiles would be written from here.
    image.info = {}
    while True:
        for form in _forms(image, mime):
            data = _written(image, form)
            if len(data) <= limits.size:
                return Picture(_MIMES[form], image.width, image.height, hashlib.sha256(data).hexdigest(), data)
        image = image.resize((max(1, image.width * 3 // 4), max(1, image.height * 3 // 4)), Image.Resampling.LANCZOS)


def _forms(image: Image.Image, mime: str) -> Iterator[str]:
    """Its own format first, then one that needs fewer bytes. An animation was cut to its first frame: no GIF."""
    own = {"image/jpeg": "JPEG", "image/webp": "WEBP"}.get(mime, "PNG")
    yield own
    if own == "PNG":
        yield "WEBP" if image.mode == "RGBA" else "JPEG"


def _written(image: Image.Image, form: str) -> bytes:
    written = io.BytesIO()
    image.save(written, form, quality=90)
    return written.getvalue()
