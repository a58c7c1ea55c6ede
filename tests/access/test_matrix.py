"""Every route with every kind of id of another user: each answers exactly as for an id that nobody has (G19, A4)."""

import re
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

import asyncpg
import httpx2
import pytest

from app.access import keys
from app.demo.server import demo_provider
from app.flows import chatbots, file
from app.operations import OPERATIONS
from app.sync.merge import stamp_at
from tests.access.users import as_user, serving_users
from tests.chats.pictures import base64_of, picture
from tests.serving import apply_demo, serving
from tests.sync.test_gateway import _NOW, add, delete, put

_BOTS = {"slow": "demo?delay_ms=20&tokens=100000", "quick": "demo?delay_ms=0&tokens=3"}
_SSE = {"Accept": "text/event-stream"}


def _wanted(demo: str) -> dict[str, Any]:
    flows: dict[str, Any] = {name: {"provider": "demo", "model": model} for name, model in _BOTS.items()}
    bots: dict[str, Any] = {name: {"flows": {"main": flow}} for name, flow in flows.items()}
    bots["sees"] = {"flows": {"main": {**flows["quick"], "images": True}}}
    return {"providers": {"demo": {"kind": "openai", "base_url": demo}}, "chatbots": bots}


@dataclass(frozen=True, slots=True)
class Things:
    """One id of each kind. A message that waits is in `session`; `chat` has a `note` that `device` has brought, which
    has read as far as `cursor`; `own_session` is of whoever asks."""

    running: str
    ended: str
    queued: str
    session: str
    message: str
    image: str
    chat: str
    note: str
    device: str
    cursor: str
    own_session: str = "mine"
    own_stream: str = ""


def _nobodys(things: Things) -> Things:
    """Ids of the same kinds that nobody has."""
    kinds = ("running", "ended", "queued", "message", "image", "chat", "note", "device")
    cursor = f"{uuid4().hex[:12]}.1"
    return replace(things, session="nobodys", cursor=cursor, **{kind: str(uuid4()) for kind in kinds})


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request that names an id of somebody."""

    path: str
    params: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None


Attempts = Callable[[Things], list[Attempt]]


def _reading(things: Things) -> list[Attempt]:
    urls = [f"/api/stream-events/{stream}" for stream in (things.running, things.ended, things.queued)]
    ways: list[dict[str, Any]] = [{}, {"headers": _SSE}, {"params": {"after": "1"}}, {"params": {"after": "999999"}}]
    ways += [
        {"params": {"wait": "1"}},
        {"headers": {**_SSE, "Last-Event-ID": "1"}},
        {"headers": {"If-None-Match": '"x"'}},
    ]
    return [Attempt(url, **way) for url in urls for way in ways]


def _reading_several(things: Things) -> list[Attempt]:
    """Beside one's own as alone, whatever is said of where one stands; as if it were no stream at all."""
    own, theirs = things.own_stream, (things.running, things.ended, things.queued)
    streams = [*theirs, f"{things.ended}:1", f"{things.ended}:999999", f"{things.ended},{things.running}"]
    streams += [named for one in theirs for named in (f"{own},{one}", f"{one},{own}:1", f"{own}:1,{one}:1")]
    attempts = [Attempt("/api/stream", {"streams": named}) for named in streams]
    for header in (f"{things.ended}:1", f"{own}:1,{things.ended}:999999"):
        seen = {**_SSE, "Last-Event-ID": header}
        attempts.append(Attempt("/api/stream", {"streams": f"{own},{things.ended}"}, seen))
    return attempts


def _stopping(things: Things) -> list[Attempt]:
    urls = [f"/api/stream-events/{stream}/cancel" for stream in (things.running, things.ended, things.queued)]
    return [Attempt(url, body=body) for url in urls for body in ({}, {"flow": "main"})]


def _listing(things: Things) -> list[Attempt]:
    return [Attempt(f"/api/sessions/{things.session}/queue")]


def _waiting(way: str = "", body: Mapping[str, Any] | None = None) -> Attempts:
    def attempts(things: Things) -> list[Attempt]:
        sessions = (things.session, things.own_session)
        return [Attempt(f"/api/sessions/{name}/queue/{things.message}{way}", body=body) for name in sessions]

    return attempts


def _asking(things: Things) -> list[Attempt]:
    body = {"chatbot_id": "sees", "message_text": "What is it?"}
    return [Attempt("/api/process-message", body={**body, "image_id": things.image, "session_id": things.own_session})]


def _conversation(things: Things) -> list[Attempt]:
    url = f"/api/messages/conversations/{things.session}"
    return [Attempt(url), Attempt(url, {"source": "parley"})]


def _chat(way: str = "", body: Mapping[str, Any] | None = None) -> Attempts:
    return lambda things: [Attempt(f"/api/chats/{things.session}{way}", body=body)]


def _branching(things: Things) -> list[Attempt]:
    return _chat("/branch", {"message_id": f"{things.session}-1"})(things)


def _pushing(things: Things) -> list[Attempt]:
    """Whatever a device may do to chats and messages, and as a device that has done something already."""
    ops = [
        put(f"by-{things.chat}", parent_chat_id=things.chat, branch_from_message_id=things.note),
        put(things.chat, "Mine", at=9),
        add(things.note, things.chat, "Mine", at=9),
        add(f"by-{things.note}", things.chat, parent_id=things.note),
        {"op": "msg.del", "id": things.note},
        delete(things.chat, 99),
        delete(things.session, 99),
    ]
    push = [{"mid": mid, "ops": [op]} for mid, op in enumerate(ops, 1)]
    return [Attempt("/api/chat/sync", body={"client": things.device, "cursor": things.cursor, "push": push})]


def _pulling(things: Things) -> list[Attempt]:
    return [Attempt("/api/chat/sync", {"cursor": things.cursor})]


def _restoring(things: Things) -> list[Attempt]:
    version = f"{stamp_at(_NOW)}.{things.device}"
    return [Attempt(f"/api/chats/{things.chat}/versions/{version}/restore")]


def _nothing(_: Things) -> list[Attempt]:
    """The route takes no id of anything that belongs to a user."""
    return []


MATRIX: dict[tuple[str, str], Attempts] = {
    # Its session_id and client_message_id are the user's own, whoever else has the same: see the tests below.
    ("POST", "/api/process-message"): _asking,
    ("POST", "/api/upload-image"): _nothing,
    ("GET", "/api/conversation-config/{chatbot_id}"): _nothing,
    ("PUT", "/api/conversation-config/{chatbot_id}"): _nothing,
    ("GET", "/api/stream-events/{stream_id}"): _reading,
    ("GET", "/api/stream"): _reading_several,
    ("POST", "/api/stream-events/{stream_id}/cancel"): _stopping,
    ("GET", "/api/sessions/{session_id}/queue"): _listing,
    ("PATCH", "/api/sessions/{session_id}/queue/{message_id}"): _waiting(body={"message_text": "Changed."}),
    ("DELETE", "/api/sessions/{session_id}/queue/{message_id}"): _waiting(),
    ("POST", "/api/sessions/{session_id}/queue/{message_id}/send-now"): _waiting("/send-now"),
    ("GET", "/api/messages/conversations"): _nothing,
    ("GET", "/conversations"): _nothing,
    ("GET", "/api/messages/conversations/events"): _nothing,
    ("GET", "/api/messages/conversations/{conversation_id}"): _conversation,
    ("GET", "/api/messages/statistics"): _nothing,
    ("GET", "/api/usage"): _nothing,
    ("POST", "/api/sync/init"): _nothing,
    ("POST", "/api/sync/sync"): _nothing,
    ("GET", "/api/sync/stats"): _nothing,
    ("DELETE", "/api/sync/index"): _nothing,
    ("POST", "/api/sync/reset"): _nothing,
    ("GET", "/api/discovery/status"): _nothing,
    ("POST", "/api/webhooks/conversation-complete"): _nothing,
    ("POST", "/api/chat/sync"): _pushing,
    ("GET", "/api/chat/sync"): _pulling,
    # Its id is the user: tests/flows/test_erasure.py.
    ("DELETE", "/api/users/{user_id}"): _nothing,
    # Its devices and their ids are the user's own: tests/sync/test_older.py.
    ("GET", "/api/sync"): _nothing,
    ("POST", "/api/sync"): _nothing,
    ("GET", "/api/chats"): _nothing,
    ("GET", "/api/chats/{chat_id}"): _chat(),
    ("PATCH", "/api/chats/{chat_id}"): _chat(body={"title": "Mine"}),
    ("DELETE", "/api/chats/{chat_id}"): _chat(),
    ("GET", "/api/chats/export"): _nothing,
    # Ids in a file are the user's own: tests/sync/test_imports.py.
    ("POST", "/api/chats/import"): _nothing,
    # Another user is proven, not named: tests/sync/test_claim.py.
    ("POST", "/api/chats/claim"): _nothing,
    ("GET", "/api/chats/{chat_id}/export"): _chat("/export"),
    ("GET", "/api/chats/{chat_id}/messages"): _chat("/messages"),
    ("POST", "/api/chats/{chat_id}/branch"): _branching,
    ("GET", "/api/chat/sync/events"): _nothing,
    ("GET", "/api/chats/{chat_id}/versions"): _chat("/versions"),
    ("POST", "/api/chats/{chat_id}/versions/{version}/restore"): _restoring,
    ("GET", "/api/conversation-health"): _nothing,
    ("GET", "/livez"): _nothing,
    ("GET", "/readyz"): _nothing,
    ("GET", "/metrics"): _nothing,
    ("GET", "/openapi.json"): _nothing,
    ("GET", "/docs"): _nothing,
}
# Whose ids are each user's own, whoever else has the same: another user's are new ones.
_OWN_IDS = [("POST", "/api/chat/sync"), ("GET", "/api/chat/sync")]
_WITH_IDS = [entry for entry, attempts in MATRIX.items() if attempts is not _nothing and entry not in _OWN_IDS]


def test_the_matrix_has_every_route() -> None:
    assert MATRIX.keys() == OPERATIONS.keys(), "a new route needs an entry: how could it name what is another user's?"
    with_id = {entry for entry in OPERATIONS if re.sub("{chatbot_id}|{user_id}", "", entry[1]).count("{")}
    assert with_id <= set(_WITH_IDS)


@dataclass(frozen=True, slots=True)
class Town:
    """A gateway, ann's things and a look into the database."""

    client: httpx2.AsyncClient
    database: asyncpg.Connection
    anns: Things
    key: str

    async def ask(self, method: str, attempt: Attempt, headers: Mapping[str, str], **params: str) -> httpx2.Response:
        """Up to the first bytes: a stream that is read goes on."""
        request = self.client.build_request(
            method,
            attempt.path,
            params={**attempt.params, **params},
            headers={**attempt.headers, **headers},
            json=attempt.body,
        )
        response = await self.client.send(request, stream=True)
        if response.headers.get("content-type", "").startswith("text/event-stream"):
            await response.aclose()
        else:
            await response.aread()
        return response

    async def rows(self) -> list[Any]:
        """Everything of ann's that somebody could have changed; her running answer goes on meanwhile."""
        streams = "select id, status, cancel_flows from streaming_sessions where user_id = 'ann' order by id"
        waiting = "select * from queued_messages where user_id = 'ann' order by place"
        fields = "id, chat_id, content, is_deleted, parent_id, stamp"
        messages = f"select {fields} from messages where user_id = 'ann' and role = 'user' order by id"
        chats = "select id, title, is_deleted, is_purged, parent_chat_id from chats where user_id = 'ann' order by id"
        devices = "select clients from sync_head where user_id = 'ann'"
        return [await self.database.fetch(query) for query in (streams, waiting, messages, chats, devices)]


def _secret_of(user: str) -> str:
    return f"The secret of {user}."


async def _sent(client: httpx2.AsyncClient, user: str, **fields: Any) -> dict[str, Any]:
    body = {"message_text": _secret_of(user), **fields}
    response = await client.post("/api/process-message", json=body, headers=as_user(user))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def _ended(client: httpx2.AsyncClient, user: str, **fields: Any) -> str:
    answer = await _sent(client, user, chatbot_id="quick", **fields)
    url, cursor, page = answer["streaming_url"], 0, {"has_more": True}
    while page["has_more"]:
        page = (await client.get(url, params={"after": cursor, "wait": 5}, headers=as_user(user))).json()
        cursor = page["last_event_id"]
    stream: str = answer["streaming_session_id"]
    return stream


async def _things_of(client: httpx2.AsyncClient, user: str) -> Things:
    running = await _sent(client, user, chatbot_id="slow", session_id=f"{user}s", client_message_id=f"{user}s-1")
    queued = await _sent(client, user, chatbot_id="slow", session_id=f"{user}s", client_message_id=f"{user}s-2")
    assert queued["status"] == "queued"
    upload = {"chatbot_id": "sees", "image_data": {"data": base64_of(picture())}}
    uploaded = await client.post("/api/upload-image", json=upload, headers=as_user(user))
    ops = [put(f"{user}s-trip", _secret_of(user)), add(f"{user}s-note", f"{user}s-trip", _secret_of(user))]
    push = {"client": f"{user}s-phone", "push": [{"mid": 1, "ops": ops}]}
    synced = await client.post("/api/chat/sync", json=push, headers=as_user(user))
    other = [put(f"{user}s-trip", f"{_secret_of(user)} again", at=1)]
    push = {"client": f"{user}s-desk", "push": [{"mid": 1, "ops": other}]}
    await client.post("/api/chat/sync", json=push, headers=as_user(user))
    return Things(
        running=running["streaming_session_id"],
        ended=await _ended(client, user),
        queued=queued["streaming_session_id"],
        session=f"{user}s",
        message=f"{user}s-2",
        image=uploaded.json()["image"]["id"],
        chat=f"{user}s-trip",
        note=f"{user}s-note",
        device=f"{user}s-phone",
        cursor=synced.json()["cursor"],
    )


@pytest.fixture
async def town(database: str) -> AsyncGenerator[Town, None]:
    async with _town(database) as town:
        yield town


@asynccontextmanager
async def _town(database: str) -> AsyncGenerator[Town, None]:
    connection = await asyncpg.connect(database)
    try:
        async with demo_provider() as demo:
            await chatbots.apply(connection, file.parse(str(_wanted(demo))))
            async with serving_users(database) as client:
                key = await keys.create(connection, "a back end", ["process", "read", "index", "sync"])
                anns = await _things_of(client, "ann")
                await _ended(client, "bob", session_id="mine")
                yield Town(client, connection, replace(anns, own_stream=await _ended(client, "bob")), key)
    finally:
        await connection.close()


def _told(response: httpx2.Response, things: Things) -> tuple[int, Any, list[str]]:
    """What an answer says, but for the ids that were asked for and those of the answer itself."""
    text = response.text
    for kind in ("running", "ended", "queued", "session", "message", "image"):
        text = text.replace(getattr(things, kind), f"<{kind}>")
    text = re.sub(r'"error_id":"[^"]*"', "", text)
    varying = ("date", "x-request-id", "content-length")
    return response.status_code, text, sorted(f"{k}: {v}" for k, v in response.headers.items() if k not in varying)


@pytest.mark.parametrize(("method", "path"), _WITH_IDS)
async def test_another_users_ids_are_unknown(town: Town, method: str, path: str) -> None:
    attempts = MATRIX[method, path]
    unknown = _nobodys(town.anns)
    before = await town.rows()
    # bob himself, and a back end that acts for bob.
    for headers, params in ((as_user("bob"), {}), (as_user(town.key), {"user_id": "bob"})):
        for his, nobodys in zip(attempts(town.anns), attempts(unknown), strict=True):
            if his.body is not None and params and "chatbot_id" in his.body:
                his, nobodys = (replace(one, body={**(one.body or {}), **params}) for one in (his, nobodys))
            foreign, none = [await town.ask(method, one, headers, **params) for one in (his, nobodys)]
            assert foreign.status_code == 404, (his, foreign.text)
            assert _told(foreign, town.anns) == _told(none, unknown), his
    assert await town.rows() == before
    # The attempts are real ones: with ann's credentials they are answered, and a back end that names nobody may, too.
    for attempt in attempts(town.anns)[:1]:
        assert (await town.ask(method, attempt, as_user("ann"))).status_code in (200, 204), attempt


@pytest.mark.parametrize(("method", "path"), _OWN_IDS)
async def test_another_users_ids_are_new_ones_where_each_user_has_its_own(town: Town, method: str, path: str) -> None:
    (theirs,), (nobodys,) = MATRIX[method, path](town.anns), MATRIX[method, path](_nobodys(town.anns))
    before = await town.rows()
    for headers, params in ((as_user("bob"), {}), (as_user(town.key), {"user_id": "bob"})):
        foreign, none = [await town.ask(method, one, headers, **params) for one in (theirs, nobodys)]
        assert (foreign.status_code, none.status_code) == (200, 200), foreign.text
        told, expected = foreign.json(), none.json()
        for of in ("acked", "results", "resync"):
            assert told.get(of) == expected.get(of), of
        hers = (_secret_of("ann"), town.anns.running, town.anns.ended, town.anns.queued)
        assert not any(secret in foreign.text for secret in hers)
    assert await town.rows() == before
    assert _secret_of("ann") in (await town.ask("GET", Attempt(path), as_user("ann"))).text
    await town.database.execute(_HIDDEN)
    assert _secret_of("ann") not in (await town.ask("GET", Attempt(path), as_user("ann"))).text


@pytest.mark.parametrize(("method", "path"), _WITH_IDS + _OWN_IDS)
async def test_naming_another_user_is_forbidden(town: Town, method: str, path: str) -> None:
    before = await town.rows()
    for attempt in MATRIX[method, path](town.anns):
        if "chatbot_id" in (attempt.body or {}):
            response = await town.ask(
                method, replace(attempt, body={**(attempt.body or {}), "user_id": "ann"}), as_user("bob")
            )
        else:
            response = await town.ask(method, attempt, as_user("bob"), user_id="ann")
        assert (response.status_code, response.json()["code"]) == (403, "user_mismatch"), attempt
        assert (await town.ask(method, attempt, as_user("bob"), user_id="")).status_code in (403, 404, 422)
    assert await town.rows() == before


async def test_a_back_end_reads_and_stops_whatever_it_likes(town: Town) -> None:
    headers = as_user(town.key)
    for attempt in (*_reading(town.anns)[:3], *_stopping(town.anns)):
        for params in ({}, {"user_id": "ann"}):
            assert (
                await town.ask("POST" if attempt.body is not None else "GET", attempt, headers, **params)
            ).status_code == 200


# Every row is hidden from whoever is behind the second wall; the first one does not know.
_HIDDEN = """
do $$ declare t regclass; begin
    for t in select oid from pg_class where relrowsecurity and relname <> 'streaming_events' loop
        execute format(
            'create policy hidden on %s as restrictive using (current_user not like %L)', t, 'parley_users%');
    end loop; end $$
"""


@pytest.mark.parametrize(("method", "path"), _WITH_IDS)
async def test_what_users_ask_goes_through_the_second_wall(town: Town, method: str, path: str) -> None:
    # What is being written here is read from memory.
    things = replace(town.anns, running=town.anns.queued)
    await town.database.execute(_HIDDEN)
    for attempt in MATRIX[method, path](things):
        assert (await town.ask(method, attempt, as_user("ann"))).status_code == 404, attempt
        if "chatbot_id" not in (attempt.body or {}):
            named = await town.ask(method, attempt, as_user(town.key), user_id="ann")
            assert named.status_code == 404, attempt


async def test_a_streaming_url_is_behind_the_second_wall_and_a_back_end_that_names_nobody_before_it(
    database: str,
) -> None:
    async with demo_provider() as demo, serving(database, auth="keys") as client:
        await apply_demo(database, demo, {"quick": _BOTS["quick"]})
        connection = await asyncpg.connect(database)
        headers = as_user(await keys.create(connection, "a back end", ["process", "read", "index", "sync"]))
        body = {"user_id": "ann", "chatbot_id": "quick", "message_text": "Hello"}
        url = (await client.post("/api/process-message", json=body, headers=headers)).json()["streaming_url"]
        page = {"has_more": True}
        while page["has_more"]:
            page = (await client.get(f"{url}&wait=5")).json()
        plain = url.partition("?")[0]
        token = {"token": url.partition("?token=")[2]}
        assert (
            (await client.get(plain, params=token)).json() == (await client.get(plain, headers=headers)).json() == page
        )
        await connection.execute(_HIDDEN)
        assert (await client.get(plain, params=token)).status_code == 404
        assert (await client.get(plain, headers=headers)).json() == page
        await connection.close()


async def test_the_same_session_message_and_key_of_two_users_are_two(town: Town) -> None:
    same = {"chatbot_id": "quick", "session_id": "anns", "client_message_id": "anns-2", "message_text": "Mine."}
    headers = {**as_user("bob"), "Idempotency-Key": "one"}
    mine = await town.client.post("/api/process-message", json=same, headers=headers)
    assert (mine.status_code, mine.json()["status"]) == (200, "active"), "bob's session is idle, whatever ann's is"
    again = await town.client.post("/api/process-message", json=same, headers=headers)
    assert again.json() == mine.json()
    assert again.headers["idempotent-replayed"] == "true"
    hers = await town.client.post("/api/process-message", json=same, headers={**headers, **as_user("carl")})
    assert hers.json()["streaming_session_id"] != mine.json()["streaming_session_id"]
    seen = await town.database.fetch("select content from messages where user_id = 'bob' and chat_id = 'anns'")
    assert {row["content"] for row in seen} >= {"Mine."}
    assert not any("secret" in row["content"] for row in seen)


async def test_what_a_user_sends_is_that_users_whoever_is_not_named(town: Town) -> None:
    body = {"chatbot_id": "sees", "message_text": "Hello", "image_data": {"data": base64_of(picture())}}
    uploaded = await town.client.post("/api/upload-image", json=body, headers=as_user("bob"))
    assert uploaded.status_code == 200, uploaded.text
    users = "select distinct user_id from {} where user_id <> 'ann'"
    for table in ("images", "messages", "streaming_sessions", "chats"):
        assert [row["user_id"] for row in await town.database.fetch(users.format(table))] == ["bob"], table
    for route in ("/api/upload-image", "/api/process-message"):
        refused = await town.client.post(route, json={**body, "user_id": "ann"}, headers=as_user("bob"))
        assert (refused.status_code, refused.json()["code"]) == (403, "user_mismatch")


async def test_idempotency_keys_are_their_holders_own(town: Town) -> None:
    other = await keys.create(town.database, "another back end", ["process"])
    body = {"user_id": "dora", "chatbot_id": "quick", "message_text": "Hello"}
    answers = []
    for key, user in ((town.key, "dora"), (town.key, "dora"), (other, "dora"), (town.key, "emil")):
        headers = {**as_user(key), "Idempotency-Key": "the same"}
        answer = await town.client.post("/api/process-message", json={**body, "user_id": user}, headers=headers)
        assert answer.status_code == 200, answer.text
        answers.append(answer.json()["streaming_session_id"])
    assert answers[0] == answers[1]
    assert len(set(answers)) == 3


async def test_a_reader_is_told_apart_also_while_the_answer_is_written_elsewhere(database: str) -> None:
    async with _town(database) as town, serving_users(database) as other:
        for client in (town.client, other):
            for stream in (town.anns.running, town.anns.ended, town.anns.queued):
                url = f"/api/stream-events/{stream}"
                assert (await client.get(url, headers=as_user("bob"))).status_code == 404
                assert (await client.get(url, headers=as_user("ann"))).status_code == 200
