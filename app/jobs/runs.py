"""The table `job_runs`: when each job is due next, and what came of its last pass."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from app.postgres import Connection, Pool

_NOW = "select parley_now()"
_SERVING = "select min(started_at) from replicas where alive"
_ALL = "select name, next_at, started_at, ended_at, done, failures, error from job_runs"
_NEXT = "select next_at from job_runs where name = $1"
_FIRST = """
insert into job_runs (name, next_at, started_at, replica_id) values ($1, $2, parley_now(), $3)
on conflict (name) do nothing returning 1
"""
_BEGIN = """
update job_runs set next_at = $2, started_at = parley_now(), replica_id = $3
where name = $1 and next_at = $4 returning 1
"""
_END = """
update job_runs set ended_at = parley_now(), done = $2, error = $3,
    failures = case when $3::text is null then 0 else failures + 1 end
where name = $1
"""


@dataclass(frozen=True, slots=True)
class JobRun:
    """A job as its row says; `failures` are those since it last went well."""

    next_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    done: int | None
    failures: int
    error: str | None


async def now(connection: Connection | Pool) -> datetime:
    moment: datetime = await connection.fetchval(_NOW)
    return moment


async def serving_since(connection: Connection | Pool) -> datetime | None:
    """Since when somebody could have run them: the start of the oldest replica that has not been declared dead."""
    since: datetime | None = await connection.fetchval(_SERVING)
    return since


async def all_runs(connection: Connection | Pool) -> Mapping[str, JobRun]:
    """By the job's name. Bounded by the schedule."""
    return {row["name"]: JobRun(*list(row.values())[1:]) for row in await connection.fetch(_ALL)}


async def next_of(pool: Pool, name: str) -> datetime | None:
    """When a job is due next; None where it has never run."""
    moment: datetime | None = await pool.fetchval(_NEXT, name)
    return moment


async def begin(pool: Pool, name: str, next_at: datetime, known: JobRun | None, replica_id: UUID) -> bool:
    """Take the slot that is due; false where somebody else has taken it."""
    if known is None:
        return await pool.fetchval(_FIRST, name, next_at, replica_id) is not None
    return await pool.fetchval(_BEGIN, name, next_at, replica_id, known.next_at) is not None


async def end(pool: Pool, name: str, *, done: int, error: str | None) -> None:
    await pool.execute(_END, name, done, error)
