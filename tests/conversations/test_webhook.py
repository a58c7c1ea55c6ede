"""A9: a webhook is believed when it is signed, fresh and new; then its conversation is in the index."""

import base64
import hashlib
import hmac
import json
from pathlib import Path
from time import time
from typing import Any

import asyncpg
import httpx2
import pytest

from app.conversations.sources.source import Source, apply_sources
from tests.house import House, Open

SECRET = "whsec_" + base64.b64encode(b"a secret of thirty two bytes or so").decode()
OTHER = "another secret, of the time before the rotation"
URL = "/api/webhooks/conversation-complete"
BODY = json.dumps({"session_id": "s1", "crew_code": "crew"}).encode()
_MESSAGE = '{"type": "human", "content": "Why?", "additional_kwargs": {}, "response_metadata": {}}'


def signed(body: bytes = BODY, *, name: str = "msg_1", at: float | None = None, secret: str = SECRET) -> dict[str, str]:
    """As the specification says it, written anew."""
    sent = str(int(time() if at is None else at))
    plain = base64.b64decode(secret[6:]) if secret.startswith("whsec_") else secret.encode()
    made = hmac.new(plain, b".".join([name.encode(), sent.encode(), body]), hashlib.sha256).digest()
    signature = f"v1a,nonsense v1,{base64.b64encode(made).decode()}"
    return {"webhook-id": name, "webhook-timestamp": sent, "webhook-signature": signature}


async def sent(client: httpx2.AsyncClient, headers: dict[str, str], body: bytes = BODY) -> httpx2.Response:
    return await client.post(URL, content=body, headers=headers)


@pytest.fixture
def secrets(tmp_path: Path) -> dict[str, Any]:
    for name, secret in (("new", SECRET), ("old", OTHER)):
        (tmp_path / name).write_text(secret)
    return {"webhook_secrets": f"file:{tmp_path / 'new'}, file:{tmp_path / 'old'}", "enable_background_jobs": False}


async def with_table(home: House, dsn: str, place: Path) -> asyncpg.Connection:
    """A stock n8n table that is a source, and a connection to write to it."""
    place.write_text(dsn)
    writer = await asyncpg.connect(dsn)
    await writer.execute(
        "create table n8n (id serial primary key, session_id varchar(255) not null, message jsonb not null)"
    )
    await writer.execute("insert into n8n (session_id, message) values ('s1', $1)", _MESSAGE)
    await apply_sources(home.database, [Source("n8n", f"file:{place}", "n8n", code="crew")])
    return writer


async def test_a_conversation_is_indexed_at_once_and_a_replay_does_nothing(
    house: Open, empty_database: str, secrets: dict[str, Any], tmp_path: Path
) -> None:
    async with house(**secrets) as home:
        writer = await with_table(home, empty_database, tmp_path / "dsn")
        first = await sent(home.client, headers := signed())
        assert (first.status_code, first.json()) == (
            200,
            {"success": True, "source": "n8n", "indexed": True, "new": 1, "replayed": False},
        )
        row = await home.row("select message_count, first_question from conversations where source = 'n8n'")
        assert tuple(row) == (1, "Why?")
        await writer.execute("insert into n8n (session_id, message) values ('s2', $1)", _MESSAGE)
        assert (await sent(home.client, headers)).json()["replayed"] is True
        assert await home.count("conversations") == 1
        assert (await sent(home.client, signed(name="msg_2", secret=OTHER))).json()["new"] == 1, "the older secret"
        listed = await home.client.get("/api/messages/conversations", params={"source": "n8n"})
        assert {one["conversationId"] for one in listed.json()["conversations"]} == {"s1", "s2"}
        await writer.close()


async def test_what_is_not_signed_or_not_fresh_is_refused(house: Open, secrets: dict[str, Any]) -> None:
    good = signed()
    now = int(time())
    bad = [
        ({}, BODY),
        (good, BODY.replace(b"s1", b"s2")),
        ({**good, "webhook-id": "msg_2"}, BODY),
        ({**good, "webhook-timestamp": str(now + 1)}, BODY),
        ({**good, "webhook-signature": good["webhook-signature"].swapcase()}, BODY),
        ({**good, "webhook-signature": ""}, BODY),
        ({**good, "webhook-signature": good["webhook-signature"].replace(" v1,", " v2,")}, BODY),
        (signed(at=now - 310), BODY),
        (signed(at=now + 310), BODY),
        (signed(secret="somebody else's secret, as long"), BODY),
        ({**good, "webhook-timestamp": "soon"}, BODY),
        ({**good, "webhook-id": "x" * 257}, BODY),
    ]
    async with house(**secrets) as home:
        for headers, body in bad:
            refused = await sent(home.client, headers, body)
            assert (refused.status_code, refused.json()["code"]) == (401, "webhook_refused"), headers
        assert await home.count("webhook_receipts") == 0
        assert (await sent(home.client, good)).json()["code"] == "source_unknown"


@pytest.mark.parametrize("body", [b"[]", b"{", b'{"session_id": "s"}', b'{"session_id": 1, "crew_code": "c"}'])
async def test_a_signed_body_that_says_nothing_is_refused(house: Open, secrets: dict[str, Any], body: bytes) -> None:
    async with house(**secrets) as home:
        assert (await sent(home.client, signed(body), body)).status_code in (400, 422)


async def test_a_source_that_cannot_be_read_is_told_and_may_be_repeated(
    house: Open, empty_database: str, secrets: dict[str, Any], tmp_path: Path
) -> None:
    async with house(**secrets) as home:
        writer = await with_table(home, empty_database, tmp_path / "dsn")
        await writer.execute("alter table n8n rename to away")
        told = await sent(home.client, headers := signed())
        assert (told.status_code, told.json()["code"]) == (503, "source_unavailable")
        await writer.execute("alter table away rename to n8n")
        assert (await sent(home.client, headers)).json()["indexed"] is True
        await writer.close()


async def test_without_a_secret_every_webhook_is_refused(house: Open) -> None:
    async with house() as home:
        assert (await sent(home.client, signed(secret=""))).status_code == 401
