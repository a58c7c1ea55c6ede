"""The table `images`: the same picture once per user, and nobody else's."""

import asyncio
from collections.abc import AsyncGenerator
from uuid import uuid4

import pytest

from app.chats.decoders import Decoders
from app.chats.images import Images
from app.chats.picture import Limits
from app.chats.uploads import Upload
from app.errors import Invalid, NotFound, Unavailable
from app.postgres import Pool, open_pool
from app.wall import Wall
from tests.chats.pictures import base64_of, halves, noise, opened, picture, written

INLINE = {"name": "C:\\photos\\me.jpg", "mime": "image/jpeg", "data": base64_of(picture("JPEG"))}


@pytest.fixture
async def pool(database: str) -> AsyncGenerator[Pool, None]:
    pool = await open_pool(database, 5)
    yield pool
    await pool.close()


@pytest.fixture
async def images(pool: Pool) -> AsyncGenerator[Images, None]:
    decoders = Decoders(Limits(), processes=2)
    yield Images(Wall(pool), decoders)
    await decoders.aclose()


def _upload(data: bytes, name: str | None = None) -> Upload:
    return Upload(base64_of(data), "", name)


async def _rows(pool: Pool) -> int:
    rows: int = await pool.fetchval("select count(*) from images")
    return rows


async def test_a_picture_is_stored_and_read(images: Images) -> None:
    stored = await images.accept(_upload(written(halves(), "PNG"), "halves.png"), user_id="ann")
    assert (stored.mime, stored.width, stored.height, stored.name) == ("image/png", 64, 48, "halves.png")
    assert await images.find(str(stored.id), user_id="ann") == stored
    read = await images.read(str(stored.id), user_id="ann")
    assert (read.mime, read.width, read.height, read.sha256) == (stored.mime, 64, 48, stored.sha256)
    assert len(read.data) == stored.bytes
    assert opened(read.data).getpixel((0, 0)) == (255, 0, 0)


async def test_the_same_picture_is_stored_once_per_user(images: Images, pool: Pool) -> None:
    one, two = picture("JPEG", comment=b"one"), picture("JPEG", comment=b"two")
    first = await images.accept(_upload(one, "one.jpg"), user_id="ann")
    assert await images.accept(_upload(one), user_id="ann") == first
    again = await images.accept(_upload(two, "two.jpg"), user_id="ann")
    assert (again.id, again.name) == (first.id, "two.jpg")
    assert await _rows(pool) == 1
    others = {(await images.accept(_upload(one), user_id=user)).id for user in ("bob", "", "ann")}
    assert len(others) == await _rows(pool) == 3
    assert (await images.accept(_upload(picture("JPEG", size=(64, 47))), user_id="ann")).id not in others


async def test_the_same_picture_many_times_at_once_is_stored_once(images: Images, pool: Pool) -> None:
    upload = _upload(noise("JPEG", (300, 200)))
    async with asyncio.TaskGroup() as tasks:
        uploads = [tasks.create_task(images.accept(upload, user_id="ann")) for _ in range(12)]
    assert len({task.result().id for task in uploads}) == await _rows(pool) == 1


async def test_a_repeated_upload_counts_as_used(images: Images, pool: Pool) -> None:
    """Retention will go by it: what was just sent again must not be cleaned up before its message names it."""
    stored = await images.accept(_upload(picture()), user_id="ann")
    await pool.execute("update images set created_at = created_at - interval '1 year', updated_at = created_at")
    before = await pool.fetchrow("select created_at, updated_at from images")
    await images.accept(_upload(picture()), user_id="ann")
    after = await pool.fetchrow("select created_at, updated_at from images where id = $1", stored.id)
    assert before is not None
    assert after is not None
    assert after["created_at"] == before["created_at"]
    assert after["updated_at"] > before["updated_at"]


async def test_a_foreign_image_is_as_unknown_as_any(images: Images) -> None:
    stored = await images.accept(_upload(picture()), user_id="ann")
    told = set()
    for image_id, user_id in (
        (str(stored.id), "bob"),
        (str(stored.id), ""),
        (str(uuid4()), "ann"),
        ("", "ann"),
        ("nonsense", "ann"),
        ("../" * 1000, "ann"),
        ("\x00", "ann"),
        ("0" * 32, "ann"),
    ):
        for look in (images.find, images.read):
            with pytest.raises(NotFound) as unknown:
                await look(image_id, user_id=user_id)
            told.add((unknown.value.code, unknown.value.detail))
    assert len(told) == 1
    assert next(iter(told))[0] == "image_unknown"


async def test_an_image_without_a_user_is_for_whoever_knows_its_id(images: Images) -> None:
    stored = await images.accept(_upload(picture()), user_id="")
    for user_id in ("ann", "bob", ""):
        assert await images.find(str(stored.id), user_id=user_id) == stored
        assert (await images.read(str(stored.id), user_id=user_id)).sha256 == stored.sha256


async def test_image_data_of_a_message(images: Images) -> None:
    stored = await images.accept_inline(INLINE, user_id="ann")
    assert (stored.mime, stored.name) == ("image/jpeg", "me.jpg")
    assert await images.accept_inline({"data": INLINE["data"], "more": "is ignored"}, user_id="ann") == stored


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({}, "invalid_request"),
        ({"data": None}, "invalid_request"),
        ({"data": ""}, "invalid_request"),
        ({"data": ["AAAA"]}, "invalid_request"),
        ({"data": "AAAA", "mime": 7}, "invalid_request"),
        ({"data": "AAAA", "mime": "i" * 256}, "invalid_request"),
        ({"data": "AAAA", "name": {}}, "invalid_request"),
        ({"data": "AAAA"}, "image_invalid"),
        ({"data": "ÄÄÄÄ"}, "image_invalid"),
        ({"data": "\ufffd"}, "image_invalid"),
        ({"data": INLINE["data"], "mime": "image/png"}, "image_invalid"),
    ],
)
async def test_wrong_image_data_stores_nothing(images: Images, pool: Pool, wrong: dict[str, object], code: str) -> None:
    with pytest.raises(Invalid) as refused:
        await images.accept_inline(wrong, user_id="ann")
    assert refused.value.code == code
    assert "data" in refused.value.detail or code == "image_invalid"
    assert await _rows(pool) == 0


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("cat.png", "cat.png"),
        ("/etc/../../cat.png", "cat.png"),
        ("C:\\photos\\cat.png", "cat.png"),
        ("a\r\nSet-Cookie: b.png", "aSet-Cookie: b.png"),
        ("evil\u202egnp.exe", "evilgnp.exe"),
        ("\x00\ud800 \t", None),
        ("/", None),
        ("", None),
        ("  two   words.png ", "two words.png"),
        ("ö" * 5000 + ".png", "ö" * 196 + ".png"),
    ],
)
async def test_names_are_cleaned(images: Images, name: str, kept: str | None) -> None:
    assert (await images.accept_inline({**INLINE, "name": name}, user_id="ann")).name == kept


async def test_without_a_database_the_picture_may_come_again(pool: Pool, images: Images) -> None:
    pool.terminate()
    with pytest.raises(Unavailable) as failed:
        await images.accept(_upload(picture()), user_id="ann")
    assert failed.value.code == "database_unavailable"


async def test_reading_goes_by_the_key(pool: Pool) -> None:
    plan = await pool.fetch("explain select data from images where id = $1 and user_id in ($2, '')", uuid4(), "ann")
    assert "Index Scan using images_pkey" in plan[0][0]
