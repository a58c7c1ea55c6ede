"""The second wall behind the owner in every query: users' requests see their user's rows only, whatever is asked.

The first wall is a condition that somebody may forget. This one is PostgreSQL's row security under a role of its own,
for the user whom the door has let in, not for whom a query names (docs/decisions/0009-the-second-wall.md).
"""

import asyncio
from collections.abc import AsyncGenerator, Collection, Generator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal
from uuid import UUID

import asyncpg
import structlog

from app import roles
from app.errors import Misconfigured, Unavailable
from app.postgres import ACQUIRE_S, Connection, Pool, open_pool, prompt_connection, roll_back

log = structlog.get_logger(__name__)

Demand = Literal["auto", "require", "off"]


@dataclass(frozen=True, slots=True)
class Reach:
    """Whose rows a request may touch: a user's, or those of some streams; of nobody in particular, everybody's."""

    user_id: str | None = None
    streams: frozenset[UUID] | None = None

    @property
    def is_bound(self) -> bool:
        return self.user_id is not None or self.streams is not None


# Set by the door. Not an argument: whoever forgets the owner in a query would forget it there as well.
_EVERYBODY = Reach()
_REACH: ContextVar[Reach] = ContextVar("reach", default=_EVERYBODY)


@contextmanager
def within(reach: Reach) -> Generator[None, None, None]:
    """What runs in this block, and the tasks it starts, reaches no further."""
    before = _REACH.set(reach)
    try:
        yield
    finally:
        _REACH.reset(before)


def narrow(user_id: str) -> None:
    """Who acts for any user has named one: from here to the end of its block, nobody else's rows are reached."""
    if not _REACH.get().is_bound:
        _REACH.set(Reach(user_id))


def reach() -> Reach:
    """How far the request that runs now may reach."""
    return _REACH.get()


class Wall:
    """Connections for whatever users ask, by what the request reaches: before the wall as the owner, behind it else.

    Those behind it are another pool, opened when first needed: they took the role once and for all, so no one is ever
    handed over as the owner; and a statement that changes its role is planned anew, 700 µs each time. Without `dsn`, or
    a role, there is no wall: then all are of `pool`.
    """

    def __init__(self, pool: Pool, *, demand: Demand = "off") -> None:
        self._pool = pool
        self._behind: Pool | None = None
        self._demand = demand
        self._role: str | None = None
        # Until somebody has looked for the role, nobody who belongs behind the wall is served.
        self._looked = demand == "off"

    async def look_for_role(self, connection: Connection) -> None:
        """Look for the role. Raises Misconfigured where there has to be one and there is none."""
        if self._demand == "off":
            return
        try:
            self._role = await roles.find(connection)
        except Misconfigured as missing:
            if self._demand == "require":
                raise
            if not self._looked:
                log.warning("row_security_missing", why=missing.detail)
        self._looked = True

    @asynccontextmanager
    async def open(self, dsn: str, size: int) -> AsyncGenerator["Wall", None]:
        """With at most so many connections behind it."""
        self._behind = await open_pool(dsn, size, first=self._enter)
        try:
            yield self
        finally:
            # Not close(): it waits for ever where the server hangs, and nothing is under way any more.
            self._behind.terminate()

    async def _enter(self, connection: Connection) -> None:
        assert self._role is not None
        try:
            await connection.execute(f"set role {roles.quoted(self._role)}")
        except (asyncpg.InvalidParameterValueError, asyncpg.InsufficientPrivilegeError) as error:
            log.warning("row_security_lost", role=self._role, why=str(error))
            detail = "The database has changed; its operator has to look at it."
            raise Unavailable("database_unavailable", detail, retry_after=10) from error

    async def expire(self) -> None:
        """Use none of the connections again."""
        if self._behind is not None:
            await self._behind.expire_connections()

    def entrance(self, streams: Collection[UUID] = ()) -> tuple[Pool, str]:
        """Where the request's connection is to be had, and the statement that has to begin its one transaction there.

        `streams` are those whose events are read. Raises Unavailable while nobody has looked for the role yet.
        """
        pool = self._pool_of(bound := reach())
        return pool, "begin" if pool is self._pool else f"begin{_settings(bound, streams)}"

    def _pool_of(self, bound: Reach) -> Pool:
        if not bound.is_bound:
            return self._pool
        if not self._looked:
            raise Unavailable("starting", "The server is starting: it waits for its database.", retry_after=2)
        return self._pool if self._role is None or self._behind is None else self._behind

    async def fetchrow(self, select: str, *values: object) -> asyncpg.Record | None:
        """The one row of a SELECT that is all there is to ask: one round trip, and its transaction ends with it."""
        pool = self._pool_of(bound := reach())
        if pool is not self._pool:
            select, values = _told(select, len(values) + 1), (*values, bound.user_id or "")
        async with pool.acquire(timeout=ACQUIRE_S) as connection:
            return await connection.fetchrow(select, *values)

    @asynccontextmanager
    async def connection(
        self, *, streams: Collection[UUID] = (), within_s: float | None = None
    ) -> AsyncGenerator[Connection, None]:
        """A connection for what the request asks; behind the wall it is a transaction, committed at the end.

        With `within_s` as `prompt_connection`.
        """
        pool, begin = self.entrance(streams)
        taken = pool.acquire(timeout=ACQUIRE_S) if within_s is None else prompt_connection(pool, within_s)
        async with taken as connection:
            if pool is self._pool:
                yield connection
                return
            try:
                await connection.execute(begin)
                yield connection
                await connection.execute("commit")
            except asyncio.CancelledError:
                if within_s is None:  # else it will be given up all the same
                    connection.terminate()
                raise
            except BaseException:
                await roll_back(connection)
                raise


@lru_cache(maxsize=16)
def _told(select: str, user: int) -> str:
    """The same for the user who is its value of that number. What it asks cannot come before the user is told."""
    return f"""
        select asked.* from (select set_config('parley.user_id', ${user}, true) as me offset 0) wall
        cross join lateral (select * from ({select}) s limit case when wall.me is null then 0 end) asked
    """


def _settings(reach: Reach, streams: Collection[UUID]) -> str:
    """Until the transaction's end. One text with BEGIN is one round trip, but takes no parameters."""
    given = {"user_id": reach.user_id or ""}
    if streams or reach.streams:
        given |= {"streams": _array(streams), "leave": _array(reach.streams or ())}
    return "".join(f"; set local parley.{name} = {_literal(value)}" for name, value in given.items() if value)


def _array(streams: Collection[UUID]) -> str:
    return f"{{{','.join(map(str, streams))}}}" if streams else ""


def _literal(text: str) -> str:
    """As PQescapeLiteral does it: right whatever standard_conforming_strings says."""
    return "E'" + text.replace("\\", "\\\\").replace("'", "''") + "'"
