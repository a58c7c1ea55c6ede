"""Decoding as the gateway sees it: what becomes of every kind of picture, and of processes that die or hang."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import psutil
import pytest
from PIL import Image, PngImagePlugin

from app.chats.decoders import Decoders, _start
from app.chats.picture import Limits, Picture
from app.errors import Invalid, ParleyError, Unavailable
from tests.chats.pictures import (
    BLUE,
    RED,
    base64_of,
    bomb,
    chunk,
    chunks_of,
    halves,
    noise,
    opened,
    picture,
    png,
    slow_jpeg,
    written,
)
from tests.command import all_gone

HTML = b"<!doctype html><script>alert(1)</script>"
JPEG = picture("JPEG")


@asynccontextmanager
async def open_decoders(limits: Limits | None = None, processes: int = 1) -> AsyncGenerator[Decoders, None]:
    """Decoders that leave no process behind."""
    decoders, before = Decoders(limits or Limits(), processes=processes), _children()
    try:
        yield decoders
    finally:
        await decoders.aclose()
        assert _children() <= before


@pytest.fixture
async def decoders() -> AsyncGenerator[Decoders, None]:
    async with open_decoders() as decoders:
        yield decoders


def _children() -> set[psutil.Process]:
    """The processes of this one that decode; also those that nobody has collected yet."""
    found = set()
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if any("app.chats.decoder" in word for word in child.cmdline()) or not child.cmdline():
                found.add(child)
    return found


async def _develop(decoders: Decoders, data: bytes, mime: str = "") -> Picture:
    return await decoders.develop(base64_of(data), mime)


async def _refusal(decoders: Decoders, data: bytes | str, mime: str = "") -> str:
    """The code of the error; the decoder lives on."""
    (before,) = _children()
    with pytest.raises(ParleyError) as refused:
        await decoders.develop(data if isinstance(data, str) else base64_of(data), mime)
    assert _children() == {before}
    assert refused.value.status == 422
    return refused.value.code


def _close(colour: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(abs(one - two) < 60 for one, two in zip(colour, other, strict=True))


# -- what becomes of a picture

# What Pillow tells of every file of a format.
_TECHNICAL = {"jfif", "jfif_version", "jfif_unit", "jfif_density", "loop", "background", "timestamp", "duration"}

KINDS: list[tuple[str, str, dict[str, Any], str, str]] = [
    ("PNG", "RGB", {}, "image/png", "RGB"),
    ("PNG", "L", {}, "image/png", "L"),
    ("PNG", "1", {}, "image/png", "L"),
    ("PNG", "LA", {}, "image/png", "RGBA"),
    ("PNG", "RGBA", {}, "image/png", "RGBA"),
    ("PNG", "P", {}, "image/png", "RGB"),
    ("PNG", "P", {"transparency": 0}, "image/png", "RGBA"),
    ("PNG", "P", {"transparency": bytes(range(256))}, "image/png", "RGBA"),
    ("PNG", "RGB", {"transparency": (0, 0, 0)}, "image/png", "RGBA"),
    ("JPEG", "RGB", {}, "image/jpeg", "RGB"),
    ("JPEG", "RGB", {"progressive": True}, "image/jpeg", "RGB"),
    ("JPEG", "L", {}, "image/jpeg", "L"),
    ("JPEG", "CMYK", {}, "image/jpeg", "RGB"),
    ("WEBP", "RGB", {}, "image/webp", "RGB"),
    ("WEBP", "RGBA", {"lossless": True}, "image/webp", "RGBA"),
    ("GIF", "P", {}, "image/png", "RGB"),
    ("GIF", "P", {"transparency": 0, "optimize": False}, "image/png", "RGBA"),
]


async def test_every_kind_comes_out_plain_and_looks_the_same(decoders: Decoders) -> None:
    for form, mode, options, mime, plain in KINDS:
        given = picture(form, mode, **options)
        developed = await _develop(decoders, given)
        image = opened(developed.data)
        assert (developed.mime, image.get_format_mimetype()) == (mime, mime)  # type: ignore[attr-defined]
        assert (developed.width, developed.height) == image.size == (64, 48)
        assert image.mode == plain, (form, mode, options)
        for place in ((5, 2), (30, 24), (60, 45)):
            before, after = (one.convert("RGBA").getpixel(place) for one in (opened(given), image))
            assert isinstance(before, tuple)
            assert isinstance(after, tuple)
            assert _close(before[3:], after[3:])
            assert before[3] == 0 or _close(before, after), (form, mode, options, place)


async def test_the_same_upload_gives_the_same_bytes_whatever_its_metadata(decoders: Decoders) -> None:
    one, two = picture("JPEG", comment=b"one"), picture("JPEG", comment=b"two", dpi=(72, 72))
    assert one != two
    assert await _develop(decoders, one) == await _develop(decoders, two)


async def test_sixteen_bits_of_grey_are_scaled_not_cut(decoders: Decoders) -> None:
    grey = Image.new("I;16", (8, 8), 0x8000)
    image = opened((await _develop(decoders, written(grey, "PNG"))).data)
    assert (image.mode, image.getpixel((4, 4))) == ("L", 0x80)


async def test_an_animation_is_its_first_frame(decoders: Decoders) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE)]
    for form, mime in (("GIF", "image/png"), ("WEBP", "image/webp"), ("PNG", "image/png")):
        moving = written(frames[0], form, save_all=True, append_images=frames[1:], duration=100)
        assert opened(moving).n_frames == 2  # type: ignore[attr-defined]
        developed = await _develop(decoders, moving)
        image = opened(developed.data)
        assert developed.mime == mime
        assert getattr(image, "n_frames", 1) == 1
        assert _close(image.convert("RGB").getpixel((8, 8)), RED)  # type: ignore[arg-type]


async def test_pictures_are_turned_upright(decoders: Decoders) -> None:
    """Where red is after the turn that each orientation asks for."""
    red = {1: "left", 2: "right", 3: "right", 4: "left", 5: "top", 6: "top", 7: "bottom", 8: "bottom"}
    places = {"left": (0.1, 0.5), "right": (0.9, 0.5), "top": (0.5, 0.1), "bottom": (0.5, 0.9)}
    for orientation, side in red.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for form in ("JPEG", "PNG", "WEBP"):
            image = opened((await _develop(decoders, written(halves(), form, exif=exif))).data)
            assert image.size == ((48, 64) if orientation > 4 else (64, 48))
            x, y = places[side]
            colour = image.convert("RGB").getpixel((int(image.width * x), int(image.height * y)))
            assert isinstance(colour, tuple)
            assert _close(colour, RED), (orientation, form)


async def test_nothing_but_the_picture_is_kept(decoders: Decoders) -> None:
    exif = Image.Exif()
    exif[0x010F] = "CANARY"
    exif.get_ifd(0x8825)[1] = "CANARY"
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "CANARY")
    text.add_itxt("XML:com.adobe.xmp", "CANARY", zip=True)
    profile = b"CANARY" + bytes(200)
    told: dict[str, Any] = {"exif": exif, "icc_profile": profile, "xmp": b"CANARY"}
    given = {
        "image/jpeg": picture("JPEG", comment=b"CANARY", dpi=(300, 300), **told),
        "image/png": picture("PNG", pnginfo=text, dpi=(300, 300), exif=exif, icc_profile=profile),
        "image/webp": picture("WEBP", **told),
    }
    for mime, data in given.items():
        assert b"CANARY" in data
        developed = await _develop(decoders, data)
        assert developed.mime == mime
        assert b"CANARY" not in developed.data
        assert not opened(developed.data).info.keys() - _TECHNICAL
        assert mime != "image/png" or chunks_of(developed.data) == [b"IHDR", b"IDAT", b"IEND"]
    gif = await _develop(decoders, picture("GIF", "P", comment=b"CANARY"))
    assert b"CANARY" not in gif.data


async def test_broken_metadata_is_no_reason_to_refuse(decoders: Decoders) -> None:
    for exif in (b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0MM\0*" + bytes(40), b"Exif\0\0nothing", b"Exif\0\0"):
        assert (await _develop(decoders, picture("JPEG", exif=exif))).mime == "image/jpeg"


async def test_large_pictures_are_scaled_down_and_small_ones_left() -> None:
    async with open_decoders(Limits(side=100)) as decoders:
        for size, after in (
            ((400, 200), (100, 50)),
            ((200, 1000), (20, 100)),
            ((1000, 1), (100, 1)),
            ((99, 1), (99, 1)),
        ):
            for form in ("PNG", "JPEG", "WEBP"):
                developed = await _develop(decoders, picture(form, size=size))
                assert (developed.width, developed.height) == opened(developed.data).size == after


async def test_what_would_be_too_many_bytes_is_encoded_closer_then_smaller() -> None:
    async with open_decoders(Limits(size=170_000)) as decoders:
        for mode, mime in (("RGB", "image/jpeg"), ("RGBA", "image/webp")):
            developed = await _develop(decoders, noise("PNG", (320, 220), mode))
            assert (developed.mime, developed.width) == (mime, 320)
            assert len(developed.data) <= 170_000
        for form in ("PNG", "JPEG", "WEBP"):
            developed = await _develop(decoders, noise(form, (1600, 1200)))
            assert 100 < developed.width < 1600
            assert len(developed.data) <= 170_000


async def test_a_single_pixel(decoders: Decoders) -> None:
    for form in ("PNG", "JPEG", "WEBP", "GIF"):
        developed = await _develop(decoders, picture(form, "L", (1, 1)))
        assert (developed.width, developed.height) == (1, 1)


async def test_base64_alone_or_as_a_data_url(decoders: Decoders) -> None:
    text = base64_of(JPEG)
    for before in ("", "data:image/jpeg;base64,", "data:;base64,", "DATA:image/JPEG;charset=utf-8;name=a.jpg;BASE64,"):
        assert (await decoders.develop(before + text, "")).mime == "image/jpeg"


async def test_a_type_may_be_declared_and_must_be_right_then(decoders: Decoders) -> None:
    for said in ("image/jpeg", "IMAGE/JPEG", " image/jpg ", "image/pjpeg; q=1", "application/octet-stream", ""):
        assert (await _develop(decoders, JPEG, said)).mime == "image/jpeg"
    for wrong in ("image/png", "text/html", "image/svg+xml", "image", "\x00"):
        assert await _refusal(decoders, JPEG, wrong) == "image_invalid"
    assert await _refusal(decoders, "data:image/png;base64," + base64_of(JPEG)) == "image_invalid"
    assert await _refusal(decoders, "data:text/html;base64," + base64_of(JPEG), "image/jpeg") == "image_invalid"


# -- what is refused (I6)


async def test_what_is_no_base64_is_refused(decoders: Decoders) -> None:
    good = base64_of(JPEG)
    await decoders.develop(good, "")
    for text in (
        "",
        "data:image/jpeg;base64,",
        "data:image/jpeg," + good,
        "data:" + good,
        "not base64!",
        good[:-1],
        good + "=",
        good[:40] + "\n" + good[40:],
        good[:40] + "=" + good[40:],
        good.replace("/", "_").replace("+", "-"),
        "=" * 1000,
        " " + good,
    ):
        assert await _refusal(decoders, text) == "image_invalid", text[:60]


async def test_what_is_no_picture_of_these_four_kinds_is_refused(decoders: Decoders) -> None:
    await _develop(decoders, JPEG)
    others = [written(halves(), form) for form in ("BMP", "TIFF", "PPM", "ICO", "PDF", "AVIF")]
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    empty = png(0, 0, b""), png(0, 5, b""), b"GIF89a" + bytes(7) + b";", b"GIF89a" + bytes(7)
    for data in (*others, svg, HTML, b"\x00", bytes(5000), b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", *empty):
        assert await _refusal(decoders, data) == "image_invalid", data[:20]


async def test_pictures_that_break_off_are_refused(decoders: Decoders) -> None:
    await _develop(decoders, JPEG)
    for form in ("PNG", "JPEG", "WEBP", "GIF"):
        whole = noise(form, (64, 48), "RGB" if form != "GIF" else "L")
        for part in (0.02, 0.1, 0.5, 0.9):
            assert await _refusal(decoders, whole[: int(len(whole) * part)]) == "image_invalid", (form, part)


async def test_damaged_pictures_are_refused_or_decoded_and_nothing_else(decoders: Decoders) -> None:
    await _develop(decoders, JPEG)
    (before,) = _children()
    for form in ("PNG", "JPEG", "WEBP", "GIF"):
        whole = noise(form, (64, 48), "RGB" if form != "GIF" else "L")
        for place in range(10, len(whole), len(whole) // 40):
            with suppress(Invalid):
                await _develop(decoders, whole[:place] + b"\xff\x00\xff\xff" + whole[place + 4 :])
    assert _children() == {before}


async def test_polyglots_are_refused_or_lose_their_second_meaning(decoders: Decoders) -> None:
    await _develop(decoders, JPEG)
    script = b"*/=1;alert(1)//"
    for form, mode in (("JPEG", "RGB"), ("PNG", "RGB"), ("WEBP", "RGB"), ("GIF", "P")):
        for rest in (HTML, b"PK\x03\x04" + bytes(30), script, b"%PDF-1.7"):
            assert await _refusal(decoders, picture(form, mode) + rest) == "image_invalid", (form, rest)
    # Inside of it: a comment, or a private chunk before the end.
    hidden = picture("JPEG", comment=HTML), picture("GIF", "P", comment=script), _with_chunk(picture("PNG"), HTML)
    for data in hidden:
        assert not {word for word in (HTML, script) if word in (await _develop(decoders, data)).data}


def _with_chunk(data: bytes, content: bytes) -> bytes:
    return data[:-12] + chunk(b"prVt", content) + data[-12:]


async def test_bombs_are_refused_by_their_header(decoders: Decoders) -> None:
    await _develop(decoders, JPEG)
    grey = {"bits": 1, "colour": 0}
    huge = png(2**31 - 1, 2**31 - 1, b""), png(6325, 6325, b"", **grey), png(40_000_001, 1, b"", **grey)
    screen = b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;"
    frame = b"GIF89a\x01\x00\x01\x00\x00\x00\x00,\x00\x00\x00\x00\xff\xff\xff\xff\x00\x02\x02D\x01\x00;"
    for data in (*huge, screen, frame):
        assert await _refusal(decoders, data) == "image_too_large", data[:30]


async def test_bombs_in_metadata_are_refused(decoders: Decoders) -> None:
    """Pillow unpacks a megabyte of text at most."""
    await _develop(decoders, JPEG)
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 100_000_000, zip=True)
    assert await _refusal(decoders, picture("PNG", pnginfo=text)) == "image_invalid"


async def test_what_fits_the_limit_is_decoded_in_bounded_memory(decoders: Decoders) -> None:
    """Forty million pixels of RGBA from 160 KB."""
    small = bomb(8000, 5000)
    assert len(small) < 170_000
    developed = await _develop(decoders, small)
    assert (developed.width, developed.height) == (2048, 1280)
    (process,) = _children()
    if sys.platform == "linux":
        assert process.rlimit(psutil.RLIMIT_AS)[1] == 1 << 30
    assert process.memory_info().rss < 100 << 20, "it gives back what it took"


async def test_more_memory_than_there_is_refuses_the_picture(decoders: Decoders) -> None:
    await _develop(decoders, JPEG)
    (process,) = _children()
    if sys.platform != "linux":
        pytest.skip("needs prlimit")
    process.rlimit(psutil.RLIMIT_AS, (200 << 20, 200 << 20))
    assert await _refusal(decoders, bomb(8000, 5000)) == "image_too_large"
    await _develop(decoders, JPEG)
    assert _children() == {process}


# -- processes


async def test_a_process_starts_when_it_is_needed_and_knows_no_secret(decoders: Decoders) -> None:
    assert not _children()
    await _develop(decoders, JPEG)
    (process,) = _children()
    await _develop(decoders, JPEG)
    assert _children() == {process}
    assert not process.environ().keys() & os.environ.keys()
    assert process.cwd() == "/"
    if sys.platform == "linux":
        assert process.rlimit(psutil.RLIMIT_CORE) == (0, 0)
        assert process.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)


async def test_no_more_processes_than_allowed() -> None:
    async with open_decoders(processes=2) as decoders:
        data = noise("PNG", (500, 500))
        async with asyncio.TaskGroup() as tasks:
            for _ in range(8):
                tasks.create_task(_develop(decoders, data))
        assert len(_children()) == 2


async def _busy(decoders: Decoders) -> tuple["asyncio.Task[Picture]", psutil.Process]:
    """A job that takes long, and the process that has begun it."""
    before = _children()
    job = asyncio.create_task(_develop(decoders, slow_jpeg(20_000)))
    async with asyncio.timeout(20):
        while not (begun := [child for child in _children() - before if _works(child)]):
            await asyncio.sleep(0.01)
    return job, begun[0]


def _works(process: psutil.Process) -> bool:
    """It has used more time than a start takes."""
    with suppress(psutil.Error):
        return process.cpu_times().user > 0.8
    return False


@pytest.mark.parametrize(
    ("number", "error", "code"),
    [
        (signal.SIGKILL, Unavailable, "decoder_lost"),
        (signal.SIGTERM, Unavailable, "decoder_lost"),
        (signal.SIGSEGV, Invalid, "image_invalid"),
        (signal.SIGALRM, Invalid, "image_too_large"),
    ],
)
async def test_a_process_that_dies_in_the_middle_is_replaced(
    decoders: Decoders, number: signal.Signals, error: type[ParleyError], code: str
) -> None:
    job, process = await _busy(decoders)
    process.send_signal(number)
    with pytest.raises(error) as failed:
        await job
    assert failed.value.code == code
    assert (await _develop(decoders, JPEG)).mime == "image/jpeg"
    assert process not in _children()


async def test_a_process_that_died_in_its_sleep_is_replaced_unnoticed(decoders: Decoders) -> None:
    await _develop(decoders, JPEG)
    (process,) = _children()
    process.kill()
    (decoder,) = decoders._idle
    await _until(lambda: not decoder.lives)
    assert (await _develop(decoders, JPEG)).mime == "image/jpeg"


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.01)


async def test_a_picture_that_takes_too_long_is_refused_and_its_process_replaced() -> None:
    async with open_decoders(Limits(seconds=1)) as decoders:
        await _develop(decoders, JPEG)
        (process,) = _children()
        with pytest.raises(Invalid) as refused:
            await _develop(decoders, slow_jpeg(20_000))
        assert refused.value.code == "image_too_large"
        assert process not in _children()
        assert (await _develop(decoders, JPEG)).mime == "image/jpeg"


async def test_a_process_that_hangs_is_replaced() -> None:
    async with open_decoders(Limits(seconds=1)) as decoders:
        await _develop(decoders, JPEG)
        (process,) = _children()
        process.suspend()
        with pytest.raises(Invalid):
            await _develop(decoders, JPEG)
        assert process not in _children()
        assert (await _develop(decoders, JPEG)).mime == "image/jpeg"


async def test_a_process_ends_a_long_job_by_itself() -> None:
    """Where the gateway is too busy, or stopped, to do it."""
    decoder = await _start(Limits(seconds=0.5))
    with pytest.raises(EOFError):
        await decoder.develop(base64_of(slow_jpeg(20_000)), "")
    assert await decoder.end(patience_s=10) == -signal.SIGALRM


async def test_a_job_that_is_given_up_takes_its_process_along(decoders: Decoders) -> None:
    job, process = await _busy(decoders)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    assert process not in _children()
    assert (await _develop(decoders, JPEG)).mime == "image/jpeg"


async def test_the_end_of_the_gateway_ends_everything_also_a_job() -> None:
    decoders = Decoders(Limits(), processes=2)
    await _develop(decoders, JPEG)
    idle = _children()
    async with asyncio.TaskGroup() as tasks:
        long = tasks.create_task(_refused(decoders, slow_jpeg(20_000)))
        await _until(lambda: any(map(_works, _children())))
        await _develop(decoders, JPEG)
        everyone = _children()
        assert everyone > idle
        await decoders.aclose()
    assert long.result() == "decoder_lost"
    await all_gone(list(everyone))
    assert not _children()


async def _refused(decoders: Decoders, data: bytes) -> str:
    with pytest.raises(ParleyError) as failed:
        await _develop(decoders, data)
    return failed.value.code


async def test_where_no_process_can_start_the_picture_may_come_again(
    decoders: Decoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(Unavailable) as failed:
        await _develop(decoders, JPEG)
    assert failed.value.code == "decoder_lost"
    monkeypatch.undo()
    assert (await _develop(decoders, JPEG)).mime == "image/jpeg"
