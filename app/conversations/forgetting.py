"""Takes out of the index what it holds of sources that were removed, or that read another table by now."""

from app.conversations.index import OWN
from app.postgres import Connection

# Rows of one statement, each its own transaction: nobody waits for long.
_BATCH = 2_000

_STALE = f"""
with known as (
    select source from conversation_source_state union select source from conversation_counts)
select k.source, s.version from known k left join conversation_sources s on s.id = k.source
where k.source <> '{OWN}' and (s.id is null or s.indexed_version is distinct from s.version) order by k.source
"""
# First of all: what a pass that is under way has read counts no more.
_STOP = "delete from conversation_source_state where source = $1"
_DAYS = """
with gone as (
    delete from conversation_days where ctid = any(array(
        select ctid from conversation_days where source = $1 limit $2)) returning 1)
select count(*) from gone
"""
_CONVERSATIONS = """
with gone as (
    delete from conversations where ctid = any(array(select ctid from conversations where source = $1 limit $2))
    returning id),
words as (delete from conversation_words using gone where conversation = id)
select count(*) from gone
"""
# Last: until then it is known that something is left.
_END = "delete from conversation_counts where source = $1"
_CURRENT = "update conversation_sources set indexed_version = version where id = $1 and version = $2"
_UNREAD = """
update conversation_sources s set indexed_version = version where indexed_version is null
    and not exists (select from conversation_source_state t where t.source = s.id)
"""


async def forget_stale(connection: Connection) -> dict[str, int]:
    """How many conversations of which sources were forgotten.

    To be called before passes, by whoever makes them. Where it is cut short, the next call goes on.
    """
    forgotten: dict[str, int] = {}
    stale = await connection.fetch(_STALE)
    for row in stale:
        await connection.execute(_STOP, row["source"])
        forgotten[row["source"]] = await _deleted(connection, _CONVERSATIONS, row["source"])
        await _deleted(connection, _DAYS, row["source"])
        await connection.execute(_END, row["source"])
        await connection.execute(_CURRENT, row["source"], row["version"])
    await connection.execute(_UNREAD)
    return forgotten


async def _deleted(connection: Connection, piece_of: str, source: str) -> int:
    deleted = 0
    while piece := await connection.fetchval(piece_of, source, _BATCH):
        deleted += piece
    return deleted
