"""The table of chatbots: every applied configuration is a version, and a stream keeps the version it began with."""

from collections import OrderedDict
from dataclasses import dataclass
from time import monotonic
from typing import Any

import orjson

from app.errors import NotFound
from app.flows.config import Chatbot
from app.postgres import Connection, Pool

_KEPT = 256
# How long the newest version of a chatbot is believed to be the newest, in seconds.
_FRESH_S = 1.0

_NEWEST = "select max(version) from chatbots where id = $1"
_READ = "select configuration from chatbots where id = $1 and version = $2"
_ADD = "insert into chatbots (id, version, configuration) values ($1, $2, $3)"
_LOCK = "lock table chatbots in share row exclusive mode"
_ALL = "select distinct on (id) id, version, configuration from chatbots order by id, version desc"


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
        version: int | None = await self._pool.fetchval(_NEWEST, chatbot_id)
        if version is None:
            raise NotFound("chatbot_unknown", "There is no chatbot with this id; `parley apply FILE` makes one.")
        if len(self._newest) >= _KEPT:
            self._newest.clear()
        self._newest[chatbot_id] = (version, monotonic() + _FRESH_S)
        return version

    async def version(self, chatbot_id: str, version: int) -> Chatbot:
        key = (chatbot_id, version)
        if key not in self._parsed:
            text = await self._pool.fetchval(_READ, chatbot_id, version)
            self._parsed[key] = Chatbot.from_json(orjson.loads(text))
            if len(self._parsed) > _KEPT:
                self._parsed.popitem(last=False)
        return self._parsed[key]


async def all_newest(connection: Connection) -> dict[str, Chatbot]:
    """Every chatbot in its newest version."""
    return {row["id"]: Chatbot.from_json(orjson.loads(row["configuration"])) for row in await connection.fetch(_ALL)}


async def apply(connection: Connection, chatbots: dict[str, Chatbot], *, dry_run: bool = False) -> list[Change]:
    """Add a version for every chatbot that differs from its newest one; chatbots not named stay as they are."""
    async with connection.transaction():
        await connection.execute(_LOCK)
        rows = {row["id"]: row for row in await connection.fetch(_ALL)}
        changes = []
        for chatbot_id, chatbot in chatbots.items():
            row = rows.get(chatbot_id)
            # Through JSON and back, so that a tuple and the list it is stored as do not count as a difference.
            after = orjson.loads(orjson.dumps(chatbot.to_json()))
            before = orjson.loads(row["configuration"]) if row else None
            if before != after:
                changes.append(Change(chatbot_id, row["version"] + 1 if row else 1, before, after))
        if not dry_run:
            await connection.executemany(
                _ADD, [(c.chatbot_id, c.version, orjson.dumps(c.after).decode()) for c in changes]
            )
        return changes
