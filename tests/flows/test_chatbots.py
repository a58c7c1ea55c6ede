"""The tables of chatbots and templates: versions, assignments, and what the first format becomes."""

import json
from collections.abc import AsyncGenerator

import asyncpg
import pytest

from app.errors import Misconfigured
from app.flows import chatbots, file
from app.flows.chatbots import Change, Chatbots
from app.flows.config import Allow, Assignment, Chatbot, Choice, Flow, Step
from app.postgres import open_pool
from app.providers.provider import Endpoint
from app.schema import migrate
from tests.migrating import migrate_to

GOOD = """
providers:
  p: {kind: openai, base_url: "http://127.0.0.1:1/v1", api_key: env:KEY}
chatbots:
  a: {flows: {main: {provider: p, model: m}}}
"""
TEMPLATES = """
providers: {p: {kind: openai, base_url: "http://127.0.0.1:1/v1"}}
templates:
  polite: You are polite.
chatbots:
  newest: {flows: {main: {provider: p, model: m, template: polite}}}
  fixed: {flows: {main: {provider: p, model: m, template: polite@1}}}
  none: {flows: {main: {provider: p, model: m, system: You are polite.}}}
"""


@pytest.fixture
async def connection(database: str) -> AsyncGenerator[asyncpg.Connection, None]:
    opened = await asyncpg.connect(database)
    yield opened
    await opened.close()


async def applied(connection: asyncpg.Connection, text: str, *, dry_run: bool = False) -> dict[str, int]:
    """The versions that applying a text made."""
    changes: list[Change] = await chatbots.apply(connection, file.parse(text), dry_run=dry_run)
    return {change.chatbot_id: change.version for change in changes}


async def assignments(connection: asyncpg.Connection) -> list[tuple[str, int, str, str, int]]:
    rows = await connection.fetch(
        "select chatbot_id, chatbot_version, flow, template, template_version from flow_template_assignments "
        "order by chatbot_id, chatbot_version"
    )
    return [tuple(row) for row in rows]


async def test_a_version_is_added_only_where_something_changes(connection: asyncpg.Connection) -> None:
    wanted = file.parse(GOOD)
    assert [change.version for change in await chatbots.apply(connection, wanted, dry_run=True)] == [1]
    assert [change.version for change in await chatbots.apply(connection, wanted)] == [1]
    assert await chatbots.apply(connection, wanted) == []
    changed = file.parse(GOOD.replace("model: m", "model: n, parameters: {temperature: 0.5}"))
    assert [change.version for change in await chatbots.apply(connection, changed)] == [2]
    assert await chatbots.all_newest(connection) == changed.chatbots


async def test_a_template_is_a_version_and_so_is_what_uses_it(connection: asyncpg.Connection) -> None:
    assert await applied(connection, TEMPLATES, dry_run=True) == {"newest": 1, "fixed": 1, "none": 1}
    assert await connection.fetchval("select count(*) from prompt_templates") == 0
    assert await applied(connection, TEMPLATES) == {"newest": 1, "fixed": 1, "none": 1}
    assert await applied(connection, TEMPLATES) == {}
    changed = TEMPLATES.replace("polite: You are polite.", "polite: You are very polite.")
    assert await applied(connection, changed, dry_run=True) == {"newest": 2}
    assert await applied(connection, changed) == {"newest": 2}
    stored = await connection.fetch("select name, version, text from prompt_templates order by version")
    assert [tuple(row) for row in stored] == [("polite", 1, "You are polite."), ("polite", 2, "You are very polite.")]
    assert await assignments(connection) == [
        ("fixed", 1, "main", "polite", 1),
        ("newest", 1, "main", "polite", 1),
        ("newest", 2, "main", "polite", 2),
    ]
    bots = await chatbots.all_newest(connection)
    assert bots["newest"].flows["main"].system == "You are very polite."
    assert bots["newest"].flows["main"].assignment == Assignment("polite", 2)
    assert bots["fixed"].flows["main"].system == bots["none"].flows["main"].system == "You are polite."


async def test_a_changed_template_changes_only_the_chatbots_that_are_applied(connection: asyncpg.Connection) -> None:
    await applied(connection, TEMPLATES)
    alone = "templates: {polite: You are very polite.}\nchatbots: {}"
    assert await applied(connection, alone) == {}
    assert (await chatbots.all_newest(connection))["newest"].flows["main"].system == "You are polite."
    without_text = TEMPLATES.replace("templates:\n  polite: You are polite.\n", "")
    assert await applied(connection, without_text) == {"newest": 2}
    assert (await chatbots.all_newest(connection))["newest"].flows["main"].system == "You are very polite."


async def test_an_older_text_again_is_a_new_version(connection: asyncpg.Connection) -> None:
    for text in ("one", "two", "one"):
        await applied(connection, TEMPLATES.replace("polite: You are polite.", f"polite: {text}"))
    assert await connection.fetchval("select max(version) from prompt_templates") == 3


async def test_all_missing_templates_are_told_with_their_lines_and_nothing_is_written(
    connection: asyncpg.Connection,
) -> None:
    await applied(connection, TEMPLATES)
    wrong = TEMPLATES.replace("template: polite}", "template: rude}").replace("polite@1", "polite@7")
    with pytest.raises(Misconfigured) as error:
        await applied(connection, wrong.replace("You are polite.", "Other."))
    assert error.value.detail.splitlines()[1:] == [
        "  line 6: chatbots.newest.flows.main.template: there is no template rude (polite@1, polite@2); "
        "add it to templates",
        "  line 7: chatbots.fixed.flows.main.template: there is no template polite@7 (polite@1, polite@2); "
        "add it to templates",
    ]
    assert await connection.fetchval("select max(version) from prompt_templates") == 1


async def test_a_stored_text_that_does_not_work_here_is_told_with_its_line(connection: asyncpg.Connection) -> None:
    await applied(connection, "templates: {t: '{{value.shop}} {{output.mood}}'}\nchatbots: {}")
    with pytest.raises(Misconfigured) as error:
        await applied(connection, GOOD.replace("model: m", "model: m, template: t"))
    assert error.value.detail.splitlines()[1:] == [
        "  line 5: chatbots.a.flows.main: uses the output of 'mood', which runs in no earlier stage",
        "  line 5: chatbots.a.flows.main.template: {{value.shop}} is neither in the chatbot's values nor in "
        "allow.values",
    ]


async def test_the_first_format_is_migrated(empty_database: str) -> None:
    await migrate_to(empty_database, "0001")
    connection = await asyncpg.connect(empty_database)
    old = {
        "flow_type": "main",
        "flows": {
            "main": {
                "endpoint": {
                    "name": "p",
                    "kind": "openai",
                    "base_url": "http://h/v1",
                    "api_key": "env:K",
                    "include_usage": False,
                },
                "model": "m",
                "system": 'Say "hi" to {them} at 100 %',
                "parameters": {"seed": 7, "stop": ["\u00e9"]},
            }
        },
        "temperature": [0.0, 1.5],
    }
    plain = {**old, "temperature": None}
    for name, configuration in (("old", old), ("plain", plain)):
        await connection.execute(
            "insert into chatbots (id, version, configuration) values ($1, 3, $2)", name, json.dumps(configuration)
        )
    await connection.close()
    assert (await migrate(empty_database)).revisions[0] == "0002"
    pool = await open_pool(empty_database, 1)
    try:
        assert await Chatbots(pool).newest("old") == (3, MIGRATED)
        assert (await Chatbots(pool).newest("plain"))[1].allow == Allow()
    finally:
        pool.terminate()


MIGRATED = Chatbot(
    flows={
        "main": Flow(
            (
                Choice(
                    Endpoint("p", "openai", "http://h/v1", "env:K", include_usage=False),
                    "m",
                    {"seed": 7, "stop": ["\u00e9"]},
                ),
            ),
            system='Say "hi" to {them} at 100 %',
        )
    },
    answers=("main",),
    plan=((Step("answer"),),),
    allow=Allow(temperature=(0.0, 1.5)),
)
