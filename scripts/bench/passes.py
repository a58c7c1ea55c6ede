"""A stock n8n table with as many rows as one likes, and passes of discovery over it."""

import resource
from collections.abc import Mapping
from dataclasses import dataclass

import asyncpg

from app.conversations import source_state
from app.conversations.batch import Bounds, Found
from app.conversations.discovery import Discovery
from app.conversations.foreign import Foreign
from app.conversations.sources.recognition import recognise
from app.conversations.sources.source import Source
from app.postgres import Pool
from scripts.bench.cost import Cost, weighed

# How often a pass is measured, by how many rows are new.
TIMES: Mapping[int, int] = {0: 200, 10: 100, 100: 30, 10_000: 5}

_THERE = "select to_regclass('n8n_chat_histories') is not null"
_TABLE = (
    "create table n8n_chat_histories (id serial primary key, session_id varchar(255) not null, message jsonb not null)"
)
_ROWS = """
insert into n8n_chat_histories (session_id, message)
select 'session-' || (n / 10), jsonb_build_object('type', case n % 2 when 0 then 'human' else 'ai' end,
    'content', 'Where is my order number ' || n || '? ' || repeat('It was promised for today. ', 4),
    'additional_kwargs', '{}'::jsonb, 'response_metadata', '{}'::jsonb)
from generate_series($1::bigint, $1::bigint + $2::bigint - 1) n
"""
_LAST = "select coalesce(max(id), 0) from n8n_chat_histories"
_COUNTED = "update conversation_source_state set settled = $1, seen = '{}', marks = '[]' where source = 'n8n'"
_SERVERS = "select pid from pg_stat_activity where datname = current_database() and backend_type = 'client backend'"
_STEP = 1_000_000


@dataclass(slots=True)
class Stock:
    """`last` is the last row's id; all rows up to it are counted, or taken as such."""

    theirs: "asyncpg.Connection[asyncpg.Record]"
    foreign: Foreign
    engine: Discovery
    last: int

    @classmethod
    async def of(cls, pool: Pool, theirs: "asyncpg.Connection[asyncpg.Record]", rows: int) -> "Stock":
        """A table with these rows, or the one that is there."""
        if not await theirs.fetchval(_THERE):
            await theirs.execute(_TABLE)
            for first in range(1, rows + 1, _STEP):
                await theirs.execute(_ROWS, first, min(_STEP, rows + 1 - first))
            await theirs.execute("vacuum analyze n8n_chat_histories")
        shape = await recognise(theirs, Source("n8n", "env:NONE", "n8n_chat_histories"))
        stock = cls(theirs, Foreign(theirs, shape), Discovery(pool, Bounds(grace_s=0)), await theirs.fetchval(_LAST))
        await source_state.load(pool, "n8n")
        await pool.execute(_COUNTED, stock.last)
        return stock

    async def write(self, rows: int) -> None:
        await self.theirs.execute(_ROWS, self.last + 1, rows)
        self.last += rows

    async def discover(self) -> Found:
        return await self.engine.discover("n8n", self.foreign)

    async def passes(self, new: int, times: int) -> list[Cost]:
        """What settles is written by a pass of its own, and not measured; nor is the first one, which prepares the
        statements of its connections."""
        costs = []
        for _ in range(1 + times):
            if new:
                await self.write(new)
            servers = [row["pid"] for row in await self.theirs.fetch(_SERVERS)]
            found, cost = await weighed(self.discover(), servers)
            costs.append(cost)
            assert found.rows == new, found
            await self.discover()
        return costs[1:]


def most_memory() -> float:
    """Of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
