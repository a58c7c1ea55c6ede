"""The tables of chatbots and templates: what is applied is a version, and a stream keeps the one it began with."""

from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

import orjson

from app.access.audit import Actor, note
from app.errors import Misconfigured, NotFound
from app.flows.config import Assignment, Chatbot, Flow
from app.flows.document import Place
from app.flows.file import File, problems
from app.postgres import Connection, Pool, prompt_connection
from app.safe import Safe, is_sealed
from app.text import clean

_KEPT = 256
# How long the newest version of a chatbot is believed to be the newest, in seconds.
_FRESH_S = 1.0

_NEWEST = "select max(version) from chatbots where id = $1"
_READ = "select configuration from chatbots where id = $1 and version = $2"
_ADD = "insert into chatbots (id, version, configuration) values ($1, $2, $3)"
_ASSIGN = """
insert into flow_template_assignments (chatbot_id, chatbot_version, flow, template, template_version)
values ($1, $2, $3, $4, $5)
"""
_TEMPLATES = "select name, version, text from prompt_templates order by name, version"
_ADD_TEMPLATE = "insert into prompt_templates (name, version, text) values ($1, $2, $3)"
_LOCK = "lock table chatbots in share row exclusive mode"
_ALL = "select distinct on (id) id, version, configuration from chatbots order by id, version desc"
# Of every version, as a stream keeps the one it began with; so many at a time.
_ENCRYPTED = """
select id, version, configuration from chatbots
where configuration like '%"enc:%' and (id, version) > ($1, $2) order by id, version limit 100
"""
_REWRITE = "update chatbots set configuration = $3 where id = $1 and version = $2 and configuration = $4"


@dataclass(frozen=True, slots=True)
class Change:
    """What applying a chatbot changes: its configuration before (None: it is new) and after."""

    chatbot_id: str
    version: int
    before: dict[str, Any] | None
    after: dict[str, Any]


class Chatbots:
    """Reads by id. Parsed versions are kept; a version applied meanwhile is in use after a second."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._newest: dict[str, tuple[int, float]] = {}
        self._parsed: OrderedDict[tuple[str, int], Chatbot] = OrderedDict()

    async def newest(self, chatbot_id: str) -> tuple[int, Chatbot]:
        """Raises NotFound for an id that no configuration has."""
        version, until = self._newest.get(chatbot_id, (0, 0.0))
        if until < monotonic():
            version = await self._read_newest(chatbot_id)
        return version, await self.version(chatbot_id, version)

    async def _read_newest(self, chatbot_id: str) -> int:
        # The first that a message asks of the database: where that hangs, its sender is told soon (G12).
        async with prompt_connection(self._pool) as connection:
            version: int | None = await connection.fetchval(_NEWEST, clean(chatbot_id))
        if version is None:
            raise NotFound("chatbot_unknown", "There is no chatbot with this id; `parley apply FILE` makes one.")
        if len(self._newest) >= _KEPT:
            self._newest.clear()
        self._newest[chatbot_id] = (version, monotonic() + _FRESH_S)
        return version

    async def all(self) -> dict[str, Chatbot]:
        """Every chatbot in its newest version."""
        async with self._pool.acquire() as connection:
            return await all_newest(connection)

    async def version(self, chatbot_id: str, version: int) -> Chatbot:
        """Raises NotFound for a version that is not there."""
        key = (chatbot_id, version)
        if key not in self._parsed:
            text = await self._pool.fetchval(_READ, chatbot_id, version)
            if text is None:
                raise NotFound(
                    "chatbot_version_gone", "The version of the chatbot that was asked is not stored any more."
                )
            self._parsed[key] = Chatbot.from_json(orjson.loads(text))
            if len(self._parsed) > _KEPT:
                self._parsed.popitem(last=False)
        return self._parsed[key]


async def newest_version(connection: Connection, chatbot_id: str) -> int:
    """The version in use; 0 where there is none."""
    version: int | None = await connection.fetchval(_NEWEST, chatbot_id)
    return version or 0


async def all_newest(connection: Connection) -> dict[str, Chatbot]:
    """Every chatbot in its newest version."""
    return {row["id"]: Chatbot.from_json(orjson.loads(row["configuration"])) for row in await connection.fetch(_ALL)}


async def newest_templates(connection: Connection) -> dict[str, int]:
    """The newest version of every template."""
    return {row["name"]: row["version"] for row in await connection.fetch(_TEMPLATES)}


async def apply(
    connection: Connection, file: File, *, dry_run: bool = False, actor: Actor | None = None
) -> list[Change]:
    """Add a version for every chatbot and template that differs from its newest one; all others stay as they are.

    Noted in the audit as what `actor` did; None: it is nobody's doing.

    Raises Misconfigured, naming every place, where templates are missing or their stored text does not work there.
    """
    async with connection.transaction():
        await connection.execute(_LOCK)
        texts = await _templates(connection, file, dry_run=dry_run)
        rows = {row["id"]: row for row in await connection.fetch(_ALL)}
        changes = []
        for chatbot_id, chatbot in _resolved(file, texts).items():
            row = rows.get(chatbot_id)
            # Through JSON and back, so that a tuple and the list it is stored as do not count as a difference.
            after = orjson.loads(orjson.dumps(chatbot.to_json()))
            before = orjson.loads(row["configuration"]) if row else None
            if before != after:
                changes.append(Change(chatbot_id, row["version"] + 1 if row else 1, before, after))
        if not dry_run:
            for change in changes:
                await _add(connection, change)
                if actor is not None:
                    said = f"version {change.version}"
                    await note(connection, actor, "chatbot.apply", target=change.chatbot_id, detail=said)
        return changes


async def _add(connection: Connection, change: Change) -> None:
    await connection.execute(_ADD, change.chatbot_id, change.version, orjson.dumps(change.after).decode())
    for name, flow in change.after["flows"].items():
        if (assigned := flow["assignment"]) is not None:
            values = (change.chatbot_id, change.version, name, assigned["template"], assigned["version"])
            await connection.execute(_ASSIGN, *values)


async def _templates(connection: Connection, file: File, *, dry_run: bool) -> dict[Assignment, str]:
    """Every template's text by name and version, those of the file added; version 0 is the newest."""
    rows = await connection.fetch(_TEMPLATES)
    texts = {Assignment(row["name"], row["version"]): row["text"] for row in rows}
    newest = {row["name"]: row["version"] for row in rows}
    for name, text in file.templates.items():
        version = newest.get(name, 0)
        if texts.get(Assignment(name, version)) != text:
            newest[name] = version = version + 1
            texts[Assignment(name, version)] = text
            if not dry_run:
                await connection.execute(_ADD_TEMPLATE, name, version, text)
    return texts | {Assignment(name, 0): texts[Assignment(name, version)] for name, version in newest.items()}


def _resolved(file: File, texts: Mapping[Assignment, str]) -> dict[str, Chatbot]:
    """The chatbots with the text and the true version of every assigned template in its place."""
    if missing := list(_missing(file, texts)):
        raise file.refused(missing)
    resolved = {
        name: replace(chatbot, flows={flow: _assigned(of, texts) for flow, of in chatbot.flows.items()})
        for name, chatbot in file.chatbots.items()
    }
    if wrong := [(("chatbots", name, *at), why) for name, chatbot in resolved.items() for at, why in problems(chatbot)]:
        raise file.refused(wrong)
    return resolved


def _missing(file: File, texts: Mapping[Assignment, str]) -> Iterator[tuple[Place, str]]:
    known = ", ".join(sorted(_called(assigned) for assigned in texts if assigned.version)) or "none"
    for chatbot_id, chatbot in file.chatbots.items():
        for name, flow in chatbot.flows.items():
            if flow.assignment is not None and flow.assignment not in texts:
                place = ("chatbots", chatbot_id, "flows", name, "template")
                yield place, f"there is no template {_called(flow.assignment)} ({known}); add it to templates"


def _called(assigned: Assignment) -> str:
    return f"{assigned.template}@{assigned.version}" if assigned.version else assigned.template


def _assigned(flow: Flow, texts: Mapping[Assignment, str]) -> Flow:
    if flow.assignment is None:
        return flow
    name = flow.assignment.template
    version = flow.assignment.version or max(known.version for known in texts if known.template == name)
    return replace(flow, system=texts[flow.assignment], assignment=Assignment(name, version))


# -- encrypted keys


async def sealed_keys(connection: Connection) -> list[str]:
    """The encrypted keys of every version, as often as they are there."""
    found: list[str] = []

    def note(key: str) -> str:
        found.append(key)
        return key

    async with aclosing(_encrypted(connection)) as rows:
        async for row in rows:
            _with_keys(row["configuration"], note)
    return found


async def rotate(connection: Connection, safe: Safe) -> int:
    """Encrypt the keys of every version with the newest master key; returns how many versions that changed.

    Raises Misconfigured, once all others are done, where a key cannot be decrypted.
    """
    changed, unreadable = 0, list[str]()
    async with aclosing(_encrypted(connection)) as rows:
        async for row in rows:
            try:
                after = _with_keys(row["configuration"], lambda key: safe.renewed(key, "chatbot"))
            except Misconfigured as error:
                unreadable.append(f"chatbot {row['id']} version {row['version']}: {error.detail}")
                continue
            if orjson.loads(after) != orjson.loads(row["configuration"]):
                await connection.execute(_REWRITE, row["id"], row["version"], after, row["configuration"])
                changed += 1
    if unreadable:
        more = f" (and {len(unreadable) - 5} more)" if len(unreadable) > 5 else ""
        raise Misconfigured("secret_unreadable", " ".join(unreadable[:5]) + more)
    return changed


async def _encrypted(connection: Connection) -> AsyncGenerator[Any, None]:
    last = ("", 0)
    while rows := await connection.fetch(_ENCRYPTED, *last):
        for row in rows:
            yield row
        last = (rows[-1]["id"], rows[-1]["version"])


def _with_keys(configuration: str, rewrite: Callable[[str], str]) -> str:
    """A stored chatbot with each encrypted key rewritten."""
    chatbot = orjson.loads(configuration)
    for flow in chatbot["flows"].values():
        for choice in flow["choices"]:
            if (key := choice["endpoint"].get("api_key")) and is_sealed(key):
                choice["endpoint"]["api_key"] = rewrite(key)
    return orjson.dumps(chatbot).decode()
