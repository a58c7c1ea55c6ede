"""Search over all messages: whichever way it goes it finds those that are shown, and nobody else's."""

from collections.abc import AsyncGenerator
from datetime import timedelta
from itertools import product
from random import Random
from typing import Any

import pytest

from app.conversations import message_search, message_words
from app.conversations.pages import Place, Slice, Total, Wanted
from app.conversations.recount import recount
from app.conversations.search import look
from app.conversations.words import tokens
from app.postgres import Connection, open_connection, open_pool
from app.wall import Reach, Wall, within
from tests.conversations import listed
from tests.conversations.listed import BEGAN
from tests.conversations.worded import follow
from tests.house import House, Open, flow
from tests.sync.test_gateway import add, delete, put, sync

_CHATS = "insert into chats (user_id, id, title, is_deleted) values ($1, $2, '', $3)"
_MESSAGES = """
insert into messages (user_id, id, chat_id, content, role, position, status, is_deleted, created_at)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9)
"""
_HEADS = "insert into sync_head (user_id, seq) select distinct user_id, 1 from chats"
_MODELS = """
update conversations set model = case when length(conversation_id) % 2 = 0 then 'small' else 'large' end,
    chatbot_id = case when conversation_id like '%3%' then 'shop' else 'help' end
"""


@pytest.fixture
async def connection(database: str) -> AsyncGenerator[Connection, None]:
    connection = await open_connection(database)
    yield connection
    await connection.close()


def _messages(chance: Random, chats: int) -> list[dict[str, Any]]:
    """Few moments and few words. Some are not shown."""
    words = ["rare", "common", "common", "common", "other", "april", "apple"]
    return [
        {
            "user": chance.choice(["ann", "bob"]),
            "chat": f"c{chance.randrange(chats)}",
            "id": f"m{number}",
            "content": " ".join(chance.choices(words, k=chance.randrange(3))),
            "role": chance.choice(["user", "assistant"]),
            "position": number,
            "status": "failed" if chance.random() < 0.05 else "complete",
            "deleted": chance.random() < 0.05,
            "at": BEGAN + timedelta(minutes=chance.randrange(30)),
        }
        for number in range(chats * 4)
    ]


async def _store(connection: Connection, messages: list[dict[str, Any]]) -> None:
    """With chat c7 deleted."""
    chats = sorted({(one["user"], one["chat"], one["chat"] == "c7") for one in messages})
    await connection.executemany(_CHATS, chats)
    columns = ("user", "id", "chat", "content", "role", "position", "status", "deleted", "at")
    await connection.executemany(_MESSAGES, [[one[name] for name in columns] for one in messages])
    await connection.execute(_HEADS)
    await recount(connection)
    await connection.execute(_MODELS)


def _expected(messages: list[dict[str, Any]], terms: tuple[str, ...], **given: Any) -> dict[tuple[str, str], str]:
    """Conversations, with the newest of their messages that has all the terms."""
    shown = [one for one in messages if one["status"] == "complete" and not one["deleted"] and one["chat"] != "c7"]
    last = {(one["user"], one["chat"]): one["at"] for one in sorted(shown, key=lambda one: one["at"])}
    found = {}
    for one in sorted(shown, key=lambda one: one["position"]):
        name, said = (one["user"], one["chat"]), one["content"].split()
        model = "small" if len(one["chat"]) % 2 == 0 else "large"
        bot = "shop" if "3" in one["chat"] else "help"
        is_it = given.get("username", name[0]) == name[0] and given.get("model", model) == model
        is_it = is_it and given.get("chatbot_id", bot) == bot and last[name] >= given.get("since", BEGAN)
        if is_it and all(any(w.startswith(t[:-1]) if t[-1] == "*" else w == t for w in said) for t in terms):
            found[name] = one["id"]
    return found


async def _all(connection: Connection, wanted: Wanted, size: int) -> dict[tuple[str, str], str]:
    """Of all pages by cursor, in order; the second page is also what its number gives."""
    page = await message_search.page(connection, wanted, size=size)
    second = await message_search.page(connection, wanted, size=size, skip=size)
    beyond = await message_search.page(connection, wanted, size=size, skip=5_000)
    found, total, number = list(page.rows), page.total, 1
    while page.behind is not None:
        page = await message_search.page(connection, wanted, size=size, after=page.behind)
        number += 1
        if number == 2:
            assert [row["id"] for row in page.rows] == [row["id"] for row in second.rows]
        found += page.rows
    places = [(row["last_message_at"], row["id"]) for row in found]
    assert places == sorted(places, reverse=wanted.newest_first)
    assert len(set(places)) == len(places)
    assert total.count == len(places) if total.exact else total.count <= len(places)
    assert (beyond.rows, beyond.total, beyond.behind) == ([], Total(len(places)), None)
    return {(row["username"], row["conversation_id"]): row["match_id"] for row in found}


async def test_every_way_finds_the_same(connection: Connection, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = Random(8)
    messages = _messages(chance, 100)
    await _store(connection, messages)
    await follow(database)
    await connection.execute("analyze message_words")

    async def as_is(*_: object, far: Any) -> Any:
        return far

    for _ in range(40):
        terms = chance.choice([("common",), ("rare",), ("common", "other"), ("ap*",), ("rare", "ap*"), ("never",)])
        given: dict[str, Any] = {}
        for name, values in (("username", ["ann", "bob"]), ("model", ["small", "large"]), ("chatbot_id", ["shop"])):
            if chance.random() < 0.3:
                given[name] = chance.choice(values)
        if chance.random() < 0.3:
            given["since"] = BEGAN + timedelta(minutes=chance.randrange(30))
        wanted = Wanted(**given, query=" ".join(terms), newest_first=chance.random() < 0.5)
        expected = _expected(messages, terms, **given)
        for far in (0, 1, 60, 1000, None):
            monkeypatch.setattr(message_search, "_far", lambda *_, far=far: as_is(far=far))
            assert await _all(connection, wanted, chance.randint(1, 50)) == expected


async def test_a_user_finds_what_is_theirs(connection: Connection, database: str) -> None:
    """Behind the second wall."""
    messages = _messages(Random(9), 60)
    await _store(connection, messages)
    await follow(database)
    await connection.execute("analyze message_words")
    pool = await open_pool(database, 2)
    async with Wall(pool, demand="require").open(database, 2) as wall:
        async with pool.acquire() as one:
            await wall.look_for_role(one)
        for terms in (("rare",), ("common", "ap*")):
            query = " ".join(terms)
            with within(Reach("ann")):
                async with wall.connection() as behind:
                    assert await behind.fetchval("select count(*) from message_words where username <> 'ann'") == 0
                    assert await behind.fetchval("select count(*) from message_words") > 0
                    found = await _all(behind, Wanted(username="ann", query=query), 7)
                    for other in (Wanted(username="bob", query=query), Wanted(query=query)):
                        assert {name for name, _ in await _all(behind, other, 7)} <= {"ann"}
            assert found == _expected(messages, terms, username="ann")
    pool.terminate()


async def _alone(home: House) -> None:
    """Have the server's own job have run, and not again."""
    await home.row("select from job_runs where name = 'messages' and ended_at is not null")
    await home.database.execute("update job_runs set next_at = now() + interval '1 hour' where name = 'messages'")


async def test_over_http(house: Open, database: str) -> None:
    async with house(search_messages=True) as home:
        await _alone(home)
        await home.apply(
            one={"flows": {"main": flow("The deposit is two months' rent, and " + "so on " * 30 + "Zebra!")}}
        )
        await home.ask("one", session_id="s1", message_text="What is a lease?")
        await home.ask("one", session_id="s2", message_text="What is a lease?", user_id="bob")
        await follow(database)

        async def found(**params: str) -> list[Any]:
            page = await listed.page(home.client, **{"in": "messages", **params})
            assert page["searchIsComplete"] is True
            return list(page["conversations"])

        entries = await found(q="deposit")
        assert {entry["conversationId"] for entry in entries} == {"s1", "s2"}
        assert [entry["conversationId"] for entry in await found(q="deposit", username="bob")] == ["s2"]
        (entry,) = await found(q="ZEBRA", username="ann", source="parley")
        assert entry["match"]["role"] == "assistant"
        assert entry["match"]["messageId"] == entry["messageIds"][0]
        assert entry["match"]["snippet"].startswith("…")
        assert entry["match"]["snippet"].endswith("so on Zebra!")
        assert (await found(q="deposit", username="ann"))[0]["match"]["snippet"].startswith("The deposit is")
        assert await found(q="'deposit lease'") == [], "they are in two messages"
        assert await found(q="?!") == []
        plain = await listed.page(home.client, q="deposit")
        assert plain["conversations"] == []
        assert "searchIsComplete" not in plain
        for params in ({"source": "n8n"}, {"in": "titles"}):
            answer = await home.client.get("/conversations", params={"q": "x", "in": "messages", **params})
            assert (answer.status_code, answer.json()["code"]) == (400, "bad_parameter")


async def test_it_is_off_unless_asked_for(house: Open) -> None:
    async with house() as home:
        answer = await home.client.get("/conversations", params={"q": "x", "in": "messages"})
        assert (answer.status_code, answer.json()["code"]) == (400, "search_off")
        assert "PARLEY_SEARCH_MESSAGES" in answer.json()["detail"]
        assert (await home.client.get("/conversations", params={"in": "messages"})).status_code == 200


async def test_what_is_deleted_is_not_found_from_then_on(house: Open, database: str) -> None:
    """Nor is it kept."""
    async with house(search_messages=True) as home:
        await _alone(home)
        ops = [
            put("c"),
            add("m1", "c", "the first zebra"),
            add("m2", "c", "a second giraffe"),
            put("d"),
            add("m3", "d", "zebra"),
        ]
        await sync(home.client, "phone", ops)
        await follow(database)

        async def found(q: str) -> set[str]:
            page = await listed.page(home.client, **{"in": "messages", "q": q})
            return {entry["conversationId"] for entry in page["conversations"]}

        assert (await found("zebra"), await found("giraffe")) == ({"c", "d"}, {"c"})
        await sync(home.client, "phone", [{"op": "msg.del", "id": "m1"}, delete("d", 9)], first=2)
        assert (await found("zebra"), await found("giraffe")) == (set(), {"c"})
        await follow(database)
        assert [row[0] for row in await home.database.fetch("select message_id from message_words")] == ["m2"]


_MANY = [
    "insert into chats (user_id, id, title, seq) select 'u' || n % 3, n, '', n from generate_series(1, 20000) n",
    """
    insert into messages (user_id, id, chat_id, content, role, position, seq)
    select 'u' || n % 3, n, n, 'common w' || n % 1000, 'user', 1, n from generate_series(1, 20000) n
    """,
    f"""
    insert into message_words (username, conversation_id, message_id, words)
    select user_id, chat_id, id, {tokens("content")} from messages
    """,
    """
    insert into conversations (source, username, conversation_id, chatbot_id, model, first_message_at, last_message_at,
        time_source, message_count, total_tokens)
    select 'parley', 'u' || n % 3, n, 'b' || n % 3, 'm' || n % 3, now(), now() - n * interval '1 s', 'message', 1, 1
    from generate_series(1, 20000) n
    """,
    "insert into conversation_counts values ('parley', 0, 20000)",
    "insert into sync_head (user_id, seq) select 'u' || n, 1 from generate_series(1, 20000) n",
    "insert into message_word_users (username, seq) select user_id, 1 from sync_head",
]


@pytest.fixture
async def many(connection: Connection) -> Connection:
    for statement in _MANY:
        await connection.execute(statement)
    for table in (
        *("message_words", "message_word_users", "messages"),
        *("chats", "conversations", "sync_head"),
    ):
        await connection.execute(f"vacuum analyze {table}")
    return connection


_WANTED = [
    Wanted(query="x"),
    Wanted(query="x", username="u1"),
    Wanted(query="x", model="m1", since=BEGAN, newest_first=False),
    Wanted(query="x", chatbot_id="b1", model="m1"),
]
# Of changes and of what was there before: nothing of what others have, or of what was done.
_PIECES: dict[str, list[Any]] = {
    message_words._FOLLOW: ["u1", 19_980, 50],
    message_words._FILL: ["u1", "2", 50],
    message_words._UNSHOWN: ["u1", ["1", "2"]],
    message_words._SHOWN_AGAIN: ["u1", ["1", "2"], 50],
    message_words._PAGE.format(only=message_words._BEHIND): ["", 5_000],
    message_words._RECENT.format(only=message_words._BEHIND): [5_000],
}


async def test_each_statement_has_its_plan(many: Connection) -> None:
    for wanted, after in product(_WANTED, (None, Place(BEGAN, 7, Total(1)))):
        slice_ = Slice(50, after)
        found = await listed.plan(many, message_search.matching(wanted, slice_, words="'x'"))
        assert "Bitmap Index Scan on message_words_found" in found, found
        for far in (None, 500):
            walked = await listed.plan(many, message_search.walking(wanted, slice_, words="'x'", far=far))
            walk = walked[walked.index("CTE page") : walked.index("CTE Scan on page")]
            assert "Sort" not in walk, walked
            assert "message_words_found" not in walked, walked
            for plan in (found, walked):
                assert "Index Scan using message_words_pkey" in plan, plan
                assert "Index Scan using messages_pkey" in plan, plan
                assert "Seq Scan" not in plan, plan
        reached = await listed.plan(many, message_search.reaching(wanted, slice_, far=500))
        assert "Seq Scan" not in reached, reached
    for statement, values in _PIECES.items():
        plan = await listed.plan(many, (statement, values))
        for table in ("messages", "message_words", "chats", "conversations", "message_word_users"):
            assert f"Seq Scan on {table}" not in plan, plan
        if statement == message_words._FOLLOW:
            assert "messages_changed" in plan, plan
            assert "chats_changed" in plan, plan


async def test_the_way_follows_what_is_common(many: Connection) -> None:
    rare, common = [await look(many, query, [], table="message_words") for query in ("w7", "common")]
    assert rare.rarest < 0.01 < 0.9 < common.rarest
    assert (rare.conversations, rare.is_bound) == (20_000, False)
    far = [await message_search._far(many, Slice(50), seen) for seen in (rare, common)]
    assert far[0] == 0 < far[1]
    page = await message_search.page(many, Wanted(query="common"), size=50)
    assert (len(page.rows), page.total) == (50, Total(51, exact=False))
    page = await message_search.page(many, Wanted(query="w7"), size=50)
    assert (len(page.rows), page.total) == (20, Total(20))
