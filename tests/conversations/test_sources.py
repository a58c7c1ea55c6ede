"""Sources in the file and on the command line: stored, compared, listed, checked, removed."""

from pathlib import Path

import asyncpg
import pytest
import yaml

from app.access import audit
from app.access.audit import Actor
from app.conversations.sources.source import Source, all_sources, apply_sources
from app.errors import Misconfigured
from app.flows import file
from app.flows.export import to_yaml
from tests.command import Done, run
from tests.conversations.test_recognition import load

WHOLE = """
sources:
  support:
    dsn: env:N8N_URL
    table: n8n_chat_histories
    kind: n8n
    columns: {username: owner}
    conversation: metadata.chat
    code: SUPPORT
    client: acme
    enabled: false
  bare: {dsn: "file:/run/secrets/url", table: Log.Messages}
"""


def test_sources_of_a_file() -> None:
    support, bare = file.parse(WHOLE).sources
    assert support == Source(
        *("support", "env:N8N_URL", "n8n_chat_histories", "n8n", {"username": "owner"}, "metadata.chat"),
        *("SUPPORT", "acme", False),
    )
    assert bare == Source("bare", "file:/run/secrets/url", "Log.Messages", code="bare")
    again = file.parse(to_yaml({}, sources=[support, bare]))
    assert again.sources == (support, bare)
    assert yaml.safe_load(to_yaml({}, sources=[bare]))["sources"] == {
        "bare": {"dsn": "file:/run/secrets/url", "table": "Log.Messages"}
    }


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("env:N8N_URL", "postgresql://me:hunter2@h/db", "line 4: sources.support.dsn: must be a reference, env:NAME"),
        ("n8n_chat_histories", "'x; drop table y'", "line 5: sources.support.table: must be the name of a table, or"),
        ("kind: n8n", "kind: m8m", "line 6: sources.support.kind: Input should be 'auto', 'n8n'"),
        ("{username: owner}", "{user: x}", "line 7: sources.support.columns: there is no part user; there are call_ty"),
        ("code: SUPPORT", "code: a b", "line 9: sources.support.code: a name holds only letters"),
        ("client:", "clients:", "line 10: sources.support.clients: there is no such member; did you mean client?"),
        ("  bare:", "  parley:", "line 12: sources.parley: is the name of our own chats; choose another"),
        ("sources:", "source:", "line 2: source: there is no such member; did you mean sources?"),
    ],
)
def test_mistakes_are_told_with_their_line(old: str, new: str, told: str) -> None:
    with pytest.raises(Misconfigured) as error:
        file.parse(WHOLE.replace(old, new, 1))
    assert told in error.value.detail
    assert "hunter2" not in error.value.detail


async def test_what_is_applied_is_there_and_counted_as_changed_where_other_rows_are_read(database: str) -> None:
    connection = await asyncpg.connect(database)
    support, bare = file.parse(WHOLE).sources
    assert [change.before for change in await apply_sources(connection, [support, bare], dry_run=True)] == [None, None]
    assert await all_sources(connection) == []
    await apply_sources(connection, [support, bare], actor=Actor("me"))
    assert await apply_sources(connection, [support, bare], actor=Actor("me")) == []
    assert await all_sources(connection) == [bare, support]
    renamed = file.parse(WHOLE.replace("client: acme", "client: other")).sources[0]
    moved = file.parse(WHOLE.replace("table: n8n", "table: m8m")).sources[0]
    versions = []
    for source in (renamed, moved):
        await apply_sources(connection, [source], actor=Actor("me"))
        versions += [there.version for there in await all_sources(connection) if there.id == "support"]
    assert versions == [1, 2]
    with pytest.raises(Misconfigured, match="The sources bare and third have the same code, bare"):
        await apply_sources(connection, [Source("third", "env:X", "t", code="bare")])
    assert [(entry.action, entry.target) for entry in await audit.last(connection, 10)][::-1] == [
        *(("source.apply", "support"), ("source.apply", "bare")),
        *[("source.apply", "support")] * 2,
    ]
    await connection.close()


async def test_the_commands(database: str, tmp_path: Path) -> None:
    connection = await asyncpg.connect(database)
    await load(connection, "n8n")
    await connection.execute(
        """update n8n_chat_histories set message = jsonb_set(message, '{content}', '"\\u001b[31mred"') where id = 7"""
    )

    async def parley(*args: str) -> Done:
        return await run(*args, DATABASE_URL=database, N8N_URL=database)

    refused = await parley("sources", "add", "n8n", "--dsn", "env:N8N_URL", "--table", "nobody")
    assert (refused.code, refused.out) == (2, [])
    assert "There is no table nobody" in refused.err[0]
    added = await parley("sources", "add", "n8n", "--dsn", "env:N8N_URL", "--table", "n8n_chat_histories")
    assert added.code == 0
    assert "+    table: n8n_chat_histories" in added.out
    (tmp_path / "more.yaml").write_text("sources: {gone: {dsn: 'env:NOWHERE', table: t, client: acme}}")
    applied = await parley("apply", str(tmp_path / "more.yaml"))
    assert applied.out[-1] == "1 of 1 sources changed."
    assert (await parley("sources", "list")).out == [
        "gone  auto  t  env:NOWHERE  code gone  client acme",
        "n8n  auto  n8n_chat_histories  env:N8N_URL  code n8n",
    ]
    assert "sources:" in (await parley("export")).out
    checked = await parley("sources", "check")
    assert checked.code == 1
    assert checked.out[:8] == [
        "gone: The environment variable NOWHERE is not set.",
        "n8n: public.n8n_chat_histories of env:N8N_URL",
        "  kind          n8n, recognised",
        '  key           "id", filled by a sequence',
        "  time          none to compare",
        '  conversation  "session_id", without an index',
        "  rows          8 read, 0 of them skipped",
        "    n8n-session-2  -  -  assistant  -",
    ]
    assert checked.out[8] == "    n8n-session-2  -  -  user  -  �[31mred"
    assert len(checked.out) == 15
    assert (await parley("sources", "remove", "gone")).out == ["Removed, with 0 conversations of the index."]
    assert (await parley("sources", "check")).code == 0
    assert "There is no source named 'gone' (n8n)" in (await parley("sources", "remove", "gone")).err[0]
    await connection.close()
