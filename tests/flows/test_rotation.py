"""Encrypted keys in the database: applied, used, and encrypted anew while chatbots are applied."""

import asyncio
from collections.abc import AsyncGenerator
from hashlib import sha256
from typing import Any

import orjson
import pytest

from app.access import signing
from app.access.signing import Signing
from app.access.stream_token import SigningKey
from app.doctor import examine
from app.errors import Misconfigured
from app.flows import chatbots, file
from app.flows.rotation import holdings, rotate
from app.postgres import Pool, open_pool
from app.safe import NO_SAFE, MasterKey, Safe
from app.settings import load
from tests.command import run
from tests.flows.events import only
from tests.house import Open

_OLD, _NEW = "o" * 32, "n" * 32
OLD, NEW = (Safe([MasterKey.of(text.encode())]) for text in (_OLD, _NEW))
BOTH = Safe([MasterKey.of(text.encode()) for text in (_NEW, _OLD)])
_KEY = "sk-" + "canary" * 6


def _file(key: str | None, *, safe: Safe, model: str = "m", names: tuple[str, ...] = ("one",)) -> file.File:
    provider = {"kind": "openai", "base_url": "http://127.0.0.1:9/v1", **({"api_key": key} if key else {})}
    flow = {"provider": "p", "model": model, "fallbacks": [{"provider": "p", "model": "other"}]}
    wanted = {"providers": {"p": provider}, "chatbots": {name: {"flows": {"main": flow}} for name in names}}
    return file.parse(orjson.dumps(wanted).decode(), safe=safe)


@pytest.fixture
async def pool(database: str) -> AsyncGenerator[Pool, None]:
    pool = await open_pool(database, 5)
    yield pool
    await pool.close()


async def _configurations(pool: Pool) -> list[str]:
    return [row["configuration"] for row in await pool.fetch("select configuration from chatbots order by id, version")]


async def _keys(pool: Pool, safe: Safe) -> set[str]:
    async with pool.acquire() as connection:
        return {safe.resolve(key) for key in await chatbots.sealed_keys(connection)}


async def test_a_key_in_plain_text_is_stored_encrypted_and_applied_again_no_change(pool: Pool) -> None:
    async with pool.acquire() as connection:
        assert len(await chatbots.apply(connection, _file(_KEY, safe=OLD))) == 1
        (stored,) = await _configurations(pool)
        assert _KEY not in stored
        sealed = OLD.seal(_KEY, "chatbot")
        assert stored.count(sealed) == 2
        for again in (_file(_KEY, safe=OLD), _file(sealed, safe=OLD), _file(sealed, safe=NO_SAFE)):
            assert await chatbots.apply(connection, again) == []
        # After a rotation, too: a file with the old value is no way back to the old key.
        assert await rotate(connection, BOTH) == 1
        for again in (_file(_KEY, safe=BOTH), _file(sealed, safe=BOTH)):
            assert await chatbots.apply(connection, again) == []
    assert await _keys(pool, NEW) == {_KEY}


async def test_a_rotation_changes_every_version_and_the_signing_keys_and_nothing_else(pool: Pool) -> None:
    async with pool.acquire() as connection:
        await signing.renew(connection, NO_SAFE)
        await signing.renew(connection, OLD)
        before = await _signing(pool, OLD)
        for number in range(103):
            await chatbots.apply(connection, _file(f"{_KEY}{number % 3}", safe=OLD, model=f"m{number}"))
        await chatbots.apply(connection, _file("env:KEY", safe=OLD, names=("two",)))
        unchanged = await _configurations(pool)
        assert await rotate(connection, BOTH) == 103 + 2
        assert await rotate(connection, BOTH) == 0
        found = await holdings(connection)
    assert (dict(found.sealed), found.plain) == ({NEW.newest: 103 * 2 + 2}, 0)
    assert await _keys(pool, NEW) == {f"{_KEY}{number}" for number in range(3)}
    assert await _signing(pool, NEW) == before
    masked = [
        text.replace(OLD.seal(f"{_KEY}{n}", "chatbot"), NEW.seal(f"{_KEY}{n}", "chatbot"))
        for text, n in ((text, number % 3) for number, text in enumerate(unchanged))
    ]
    assert [orjson.loads(text) for text in await _configurations(pool)] == [orjson.loads(text) for text in masked]


async def _signing(pool: Pool, safe: Safe) -> list[SigningKey]:
    keys = Signing(pool, safe=safe)
    await keys.run_once()
    return keys._keys


async def test_applying_and_rotating_at_once_lose_nothing(pool: Pool) -> None:
    async def apply(which: int) -> None:
        async with pool.acquire() as connection:
            for number in range(15):
                safe = OLD if which == 0 else BOTH
                await chatbots.apply(
                    connection, _file(f"{_KEY}{which}{number}", safe=safe, model=f"m{number}", names=(f"bot{which}",))
                )

    async def rotating() -> None:
        async with pool.acquire() as connection:
            while not applying.done():
                await rotate(connection, BOTH)

    applying = asyncio.gather(apply(0), apply(1))
    await asyncio.gather(applying, rotating(), rotating())
    async with pool.acquire() as connection:
        await rotate(connection, BOTH)
        newest = await chatbots.all_newest(connection)
    # Each version that was applied is there, whole, with its key; each chatbot's newest is the one applied last.
    assert await _keys(pool, NEW) == {f"{_KEY}{which}{number}" for which in (0, 1) for number in range(15)}
    for which in (0, 1):
        choice = newest[f"bot{which}"].flows["main"].choices[0]
        assert (choice.model, NEW.resolve(choice.endpoint.api_key or "")) == ("m14", f"{_KEY}{which}14")


async def test_one_value_that_cannot_be_read_is_named_and_keeps_nothing_else(pool: Pool) -> None:
    async with pool.acquire() as connection:
        await chatbots.apply(connection, _file(_KEY, safe=OLD, names=("one", "two")))
        damaged = OLD.seal(_KEY, "chatbot")[:-6]
        await connection.execute(
            "update chatbots set configuration = replace(configuration, $1, $2) where id = 'one'",
            OLD.seal(_KEY, "chatbot"),
            damaged,
        )
        with pytest.raises(Misconfigured, match="chatbot one version 1: ") as caught:
            await rotate(connection, BOTH)
        assert damaged[-20:] not in caught.value.detail
        found = await holdings(connection)
    assert found.sealed[NEW.newest or ""] == 2


async def test_a_server_that_lacks_the_master_key_does_not_sign(pool: Pool) -> None:
    async with pool.acquire() as connection:
        await signing.renew(connection, OLD)
    with pytest.raises(Misconfigured, match="PARLEY_MASTER_KEY is not set"):
        await Signing(pool).run_once()
    assert "o" * 8 not in str(await pool.fetch("select * from signing_keys"))


async def test_a_gateway_asks_with_a_decrypted_key(house: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARLEY_TEST_OLD", _OLD)
    async with house(master_key="env:PARLEY_TEST_OLD") as home:
        flow = {"provider": "demo", "model": "demo?delay_ms=0&tokens=3&key=mine"}
        provider = {"kind": "openai", "base_url": home.demo, "api_key": _KEY}
        given: dict[str, Any] = {"providers": {"demo": provider}, "chatbot": {"flows": {"main": flow}}}
        url = "/api/conversation-config/mine"
        assert (await home.client.put(url, json=given)).json()["changed"]
        told = await home.client.get(url)
        assert _KEY not in told.text
        assert told.json()["configuration"]["flowApiKeys"] == {"main": "configured"}
        assert told.json()["definition"]["providers"]["demo"]["api_key"] == OLD.seal(_KEY, "chatbot")
        again = await home.client.put(url, json=told.json()["definition"])
        assert not again.json()["changed"]
        _, frames = await home.ask(chatbot_id="mine")
        assert only(frames, "stream_end")["status"] == "completed"
        asked = await home.client.get(home.demo.removesuffix("/v1") + "/demo/requests?key=mine")
        hashed = sha256(f"Bearer {_KEY}".encode()).hexdigest()[:16]
        assert asked.json()["requests"][0]["headers"]["authorization"] == f"sha256:{hashed}"


async def test_the_commands_rotate_and_the_doctor_tells(
    database: str, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARLEY_TEST_OLD", _OLD)
    monkeypatch.setenv("PARLEY_TEST_NEW", _NEW)

    async def told(master_key: str | None) -> tuple[bool, str]:
        settings = load(database_url=database, master_key=master_key)
        found = {finding.subject: finding async for finding in examine(settings)}
        return found["master key"].fine, found["master key"].sentence

    assert await told(None) == (True, "none: providers' keys are references, signing keys are in the database")
    async with pool.acquire() as connection:
        await chatbots.apply(connection, _file(_KEY, safe=OLD))
    fine, sentence = await told(None)
    assert not fine
    assert f"encrypted with {OLD.newest}" in sentence
    fine, sentence = await told("env:PARLEY_TEST_NEW, env:PARLEY_TEST_OLD")
    assert (fine, "2 secrets lack it: run `parley keys rotate`" in sentence) == (True, True)
    refused = await run("keys", "rotate", DATABASE_URL=database)
    assert (refused.code, refused.out) == (2, [])
    done = await run("keys", "rotate", DATABASE_URL=database, PARLEY_MASTER_KEY="env:NEW,env:OLD", NEW=_NEW, OLD=_OLD)
    assert (done.code, done.out) == (0, [f"1 rows encrypted anew; 2 values have the master key {NEW.newest} now."])
    assert await told("env:PARLEY_TEST_NEW") == (True, f"{NEW.newest}, secrets encrypted with it: 2")
    assert await _keys(pool, NEW) == {_KEY}
