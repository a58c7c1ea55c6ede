"""Tables as the libraries wrote them are recognised and read; everything else is refused with what to do."""

import json
import os
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from app.conversations.sources.examination import examined
from app.conversations.sources.reading import open_source
from app.conversations.sources.recognition import newest, recognise
from app.conversations.sources.shape import Shape, Skipped
from app.conversations.sources.source import Source
from app.conversations.summary import Said, Summaries, fold
from app.errors import Misconfigured

FIXTURES = Path(__file__).parent / "fixtures"
SOURCE = Source("s", "env:SOURCE_DSN", "t")


async def load(connection: asyncpg.Connection, name: str) -> str:
    """Make a table as a library left it. Returns its name."""
    fixture = json.loads((FIXTURES / f"{name}.json").read_text())
    for statement in fixture["ddl"]:
        await connection.execute(statement)
    names = ", ".join(f'"{column}"' for column in fixture["types"])
    values = ", ".join(f"${number}::text::{type_}" for number, type_ in enumerate(fixture["types"].values(), 1))
    await connection.executemany(f'insert into "{fixture["table"]}" ({names}) values ({values})', fixture["rows"])
    return str(fixture["table"])


@pytest.fixture
async def owner(empty_database: str) -> AsyncGenerator[asyncpg.Connection, None]:
    """Whoever writes the tables."""
    connection = await asyncpg.connect(empty_database)
    yield connection
    await connection.close()


@pytest.fixture
async def reader(empty_database: str, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Any, None]:
    monkeypatch.setenv("SOURCE_DSN", empty_database)
    connection = await open_source("env:SOURCE_DSN")
    yield connection
    await connection.close()


async def folded(reader: Any, shape: Shape) -> tuple[Summaries, list[Skipped]]:
    found = [shape.said(row) for row in await newest(reader, shape, 1000)]
    return fold(row for row in found if isinstance(row, Said)), [row for row in found if isinstance(row, Skipped)]


def told(summaries: Summaries) -> dict[tuple[str, str], tuple[int, str, str]]:
    """Messages, first and last question of each."""
    return {
        name: (of.messages, (of.first_question or (0, ""))[1], (of.last_question or (0, ""))[1])
        for name, of in summaries.items()
    }


LIBRARY = ("Do you have Moby-Dick?", "Thanks \u2028 a lot 🐋")
SESSIONS = ("00000000-0000-4000-8000-000000000001", "00000000-0000-4000-8000-000000000002")


@pytest.mark.parametrize(
    ("name", "kind", "conversations"),
    [
        (
            "n8n",
            "n8n",
            {
                ("", "n8n-session-1"): (6, "Which orders are late?", "Since when? 🕰"),
                ("", "n8n-session-2"): (2, "Hello", "Hello"),
            },
        ),
        ("langchain_js", "n8n", {("", "js-1"): (4, "What is on this picture?", "What is on this picture?")}),
        (
            "langchain_community",
            "langchain",
            {("", "library-1"): (8, *LIBRARY), ("", "library-2"): (1, "Are you open?", "Are you open?")},
        ),
        ("langchain_community_sql", "langchain", {("", name): (8, *LIBRARY) for name in ("sql-1", "sql-2")}),
        ("langchain_postgres", "langchain-postgres", {("", name): (8, *LIBRARY) for name in SESSIONS}),
        (
            "flowise",
            "flowise",
            {
                ("", "visitor-7"): (4, "What does delivery cost?", "And below?"),
                ("", "5e0c2d4b-2222-4f6e-8a54-6f1b3c7e6d3a"): (2, "Test", "Test"),
            },
        ),
        (
            "litellm",
            "litellm",
            {
                ("customer-9", "trace-1"): (4, "How tall is the Eiffel tower?", "And in feet?"),
                ("ann", "trace-2"): (2, "Hello", "Hello"),
            },
        ),
    ],
)
async def test_what_libraries_wrote_is_recognised_and_read(
    owner: asyncpg.Connection, reader: Any, name: str, kind: str, conversations: dict[Any, Any]
) -> None:
    table = await load(owner, name)
    shape = await recognise(reader, replace(SOURCE, table=table))
    summaries, skipped = await folded(reader, shape)
    assert (shape.kind, told(summaries)) == (kind, conversations)
    assert len(skipped) == (1 if name == "litellm" else 0)  # the embedding
    # A single conversation, by the condition that finds it.
    assert shape.session is not None
    for username, conversation_id in conversations:
        query = f"select {', '.join(shape.tells)} from {shape.table} where {shape.session.condition}"
        rows = await reader.fetch(query, conversation_id)
        texts = [message for row in rows for message in shape.messages(row)]
        assert len(texts) == summaries[username, conversation_id].messages
        keys = [key for _, key in summaries[username, conversation_id].keys]
        query = f"select {shape.key.column} from {shape.table} where {shape.key.condition}"
        assert {str(row[0]) for row in await reader.fetch(query, keys)} == set(keys)


async def test_what_a_pass_has_to_know_of_a_table(owner: asyncpg.Connection, reader: Any) -> None:
    async def shape(name: str) -> Shape:
        return await recognise(reader, replace(SOURCE, table=await load(owner, name)))

    n8n, postgres, flowise, litellm = [
        await shape(name) for name in ("n8n", "langchain_postgres", "flowise", "litellm")
    ]
    assert [of.key.is_serial for of in (n8n, postgres, flowise, litellm)] == [True, True, False, False]
    assert [of.time.means if of.time else None for of in (n8n, postgres, flowise, litellm)] == [
        *(None, "transaction", "transaction", "began"),
    ]
    assert [of.time.is_indexed for of in (postgres, flowise, litellm) if of.time] == [False, False, True]
    assert [of.session.is_indexed for of in (n8n, postgres, flowise, litellm) if of.session] == [
        *(False, True, False, True),
    ]
    assert litellm.table == 'public."LiteLLM_SpendLogs"'


async def test_costs_of_captured_answers(owner: asyncpg.Connection, reader: Any) -> None:
    (js, _), (spent, _) = [
        await folded(reader, await recognise(reader, replace(SOURCE, table=await load(owner, name))))
        for name in ("langchain_js", "litellm")
    ]
    assert js["", "js-1"].tokens == 34
    assert js["", "js-1"].model is not None
    assert js["", "js-1"].model[1] == "gpt-5-mini"
    trace = spent["customer-9", "trace-1"]
    assert trace.tokens == 71
    assert trace.client_ip is not None
    assert trace.client_ip[1] == "192.0.2.7"


PROXY = """
create table message_log (id bigserial primary key, "time" timestamptz default now(), username text, "clientIp" inet,
    "userQuestion" text, "rawResponse" text)
"""


async def test_a_proxys_log(owner: asyncpg.Connection, reader: Any) -> None:
    await owner.execute(PROXY)
    rows = [
        ("ann", "192.0.2.1", "Why?", '{"conversation_id": "c1", "choices": [{"message": {"content": "So."}}]}'),
        ("ann", "192.0.2.1", "Really?", 'data: {"conversationId": "c1", "choices": [{"delta": {"content": "Yes"}}]}'),
        ("bob", None, "Who?", '{"choices": []}'),
    ]
    await owner.executemany(
        'insert into message_log (username, "clientIp", "userQuestion", "rawResponse") values ($1, $2, $3, $4)', rows
    )
    shape = await recognise(reader, replace(SOURCE, table="message_log"))
    summaries, skipped = await folded(reader, shape)
    assert (shape.kind, told(summaries)) == ("proxy", {("ann", "c1"): (4, "Why?", "Really?")})
    assert skipped == [Skipped("no_conversation")]
    assert summaries["ann", "c1"].client_ip == (2, "192.0.2.1")


async def test_columns_of_other_names_are_taken_as_configured(owner: asyncpg.Connection, reader: Any) -> None:
    await owner.execute(
        'create schema "Notes"; create table "Notes"."T" (no int generated always as identity unique, who text,'
        ' "the ""talk""" text, said json, happened bigint)'
    )
    said = '{"type": "human", "content": "a\\ud800\\u0000b"}'
    times = (1795262400, 1795262401000, -5, 2**62)
    for happened in times:
        await owner.execute('insert into "Notes"."T" values (default, $1, $2, $3, $4)', "ann", "x", said, happened)
    await owner.execute('alter table "Notes"."T" alter no set not null')
    columns = {"key": "no", "session": 'the "talk"', "message": "said", "username": "who", "time": "happened"}
    shape = await recognise(reader, replace(SOURCE, table="Notes.T", columns=columns))
    summaries, _ = await folded(reader, shape)
    assert told(summaries) == {("ann", "x"): (4, "a��b", "a��b")}
    first, last = summaries["ann", "x"].first_at, summaries["ann", "x"].last_at
    assert first is not None
    assert last is not None
    assert (first.isoformat(), last.isoformat()) == ("2026-11-21T12:00:00+00:00", "2026-11-21T12:00:01+00:00")


async def test_times_that_no_calendar_here_has(owner: asyncpg.Connection, reader: Any) -> None:
    table = await load(owner, "langchain_postgres")
    for odd in ("infinity", "-infinity", "294276-01-01", "4713-01-01 BC"):
        await owner.execute(f"update {table} set created_at = $1::text::timestamptz where id = 1", odd)
        summaries, _ = await folded(reader, await recognise(reader, replace(SOURCE, table=table)))
        assert sum(of.messages for of in summaries.values()) == 16


@pytest.mark.parametrize(
    "name",
    ["", "x; drop table y", 'x"y', "x'y", "a.b.c", ".x", "x.", "x" * 64, "é", "x y", "x\n", "x\0", "pg_temp.", "*"],
)
async def test_names_that_are_none_are_refused(reader: Any, name: str) -> None:
    with pytest.raises(Misconfigured, match="letters of either case, digits and underscores"):
        await recognise(reader, replace(SOURCE, table=name))


@pytest.mark.parametrize(
    ("statements", "table", "refusal"),
    [
        ("select 1", "nobody", "There is no table nobody there that the search path finds; name its schema"),
        ("select 1", "x.nobody", "There is no table x.nobody there."),
        ("create table chats (id int)", "Chats", "There is no table Chats there, but one that is called chats"),
        ("create view v as select 1 as id", "v", "v is a view"),
        ("create materialized view v as select 1 as id", "v", "v is a view"),
        ("create table p (id int) partition by range (id)", "p", "p is partitioned"),
        ("create table a (id int); create table b () inherits (a)", "a", "a has tables that inherit from it"),
        ("create sequence q", "q", "q is no table"),
        ("create table t ()", "t", "its columns are none"),
        ("create table t (id int, session_id text, message jsonb)", "t", "its column id is no key"),
        ("create table t (id int primary key, session_id text, message bytea)", "t", "message bytea"),
        (
            "create table t (id int primary key, session_id text, message text); insert into t values (1, 's', '{')",
            "t",
            "none of its newest rows is understood (1 broken_json)",
        ),
        (
            'create table t (id int primary key, "userQuestion" text, "rawResponse" jsonb);'
            "insert into t values (1, 'Why?', '{}')",
            "t",
            "Say in `conversation` where the conversation's id is in the JSON",
        ),
    ],
)
async def test_tables_that_are_refused_say_what_was_seen(
    owner: asyncpg.Connection, reader: Any, statements: str, table: str, refusal: str
) -> None:
    await owner.execute(statements)
    with pytest.raises(Misconfigured) as error:
        await recognise(reader, replace(SOURCE, table=table))
    assert refusal in error.value.detail
    assert len(error.value.detail) < 3000


async def test_overrides_that_fit_nothing_are_refused(owner: asyncpg.Connection, reader: Any) -> None:
    table = await load(owner, "n8n")
    for columns, refusal in (
        ({"session": "chat"}, "the table has no column chat"),
        ({"sessoin": "session_id"}, "no part called sessoin"),
        ({"message": "id"}, "the column id is int4, and message must be one of bpchar, citext, json, jsonb"),
    ):
        with pytest.raises(Misconfigured) as error:
            await recognise(reader, replace(SOURCE, table=table, kind="n8n", columns=columns))
        assert refusal in error.value.detail
    with pytest.raises(Misconfigured, match="n8n_chat_histories is not of the kind flowise: it has no column for role"):
        await recognise(reader, replace(SOURCE, table=table, kind="flowise"))


async def test_rights_that_are_missing_are_named(
    owner: asyncpg.Connection, empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = f"reader_{os.getpid()}"
    await owner.execute(f"create role {user} login; create schema s; create table s.t (id int primary key)")
    monkeypatch.setenv("SOURCE_DSN", empty_database.replace("://parley@", f"://{user}@"))
    try:
        reader = await open_source("env:SOURCE_DSN")
        for grant, refusal in (
            ("select 1", "grant usage on it"),
            (f"grant usage on schema s to {user}", "grant select on it"),
            (f"grant select on s.t to {user}; alter table s.t enable row level security", "row security that hides"),
        ):
            await owner.execute(grant)
            with pytest.raises(Misconfigured, match=refusal):
                await recognise(reader, replace(SOURCE, table="s.t"))
        await reader.close()
    finally:
        await owner.execute(f"drop owned by {user}; drop role {user}")


async def test_a_locked_table_is_told(
    owner: asyncpg.Connection, empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DSN", empty_database)
    source = replace(SOURCE, table=await load(owner, "n8n"))
    async with owner.transaction():
        await owner.execute("lock table n8n_chat_histories in access exclusive mode")
        with pytest.raises(Misconfigured, match="somebody holds a lock on the table that keeps readers out"):
            await examined(source)
    assert (await examined(source))[1] == "  kind          n8n, recognised"


async def test_nothing_can_be_written_over_a_sources_connection(owner: asyncpg.Connection, reader: Any) -> None:
    table = await load(owner, "n8n")
    with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
        await reader.execute(f"delete from {table}")
    assert await reader.fetchval("show statement_timeout") == "30s"
    assert await reader.fetchval("show application_name") == "parley-sources"


@pytest.mark.parametrize(
    ("dsn", "refusal"),
    [
        ("postgresql://me:hunter2@127.0.0.1:9/db", "nothing listens"),
        ("postgresql://me:hunter2@no.such.host.invalid/db", "it is away"),
        ("mysql://me:hunter2@h/db", "is no PostgreSQL URL"),
        ("postgresql://me:hunter2@h:port/db", "is no PostgreSQL URL"),
        ("hunter2", "is no PostgreSQL URL"),
    ],
)
async def test_a_database_that_is_away_is_named_by_its_reference(
    monkeypatch: pytest.MonkeyPatch, dsn: str, refusal: str
) -> None:
    monkeypatch.setenv("SOURCE_DSN", dsn)
    with pytest.raises(Misconfigured) as error:
        await open_source("env:SOURCE_DSN")
    assert refusal in error.value.detail
    assert "env:SOURCE_DSN" in error.value.detail
    assert "hunter2" not in error.value.detail
