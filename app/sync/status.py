"""How far a device is, as the server knows it: for front ends that ask instead of keeping it themselves."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson

from app.sync.cursor import Cursor
from app.wall import Wall

# Changes are counted up to here, chats and messages each.
MOST = 10_000

_HEAD = """
select parley_now() as at, h.epoch, h.clients::json -> $2 as known from (select) nothing
left join sync_head h on h.user_id = $1
"""
_PENDING = f"""
select (select count(*) from (
    select from chats where user_id = $1 and seq > 0 and seq > $2 and origin <> $3 limit {MOST}) chats)
+ (select count(*) from (
    select from messages where user_id = $1 and seq > 0 and seq > $2 and origin <> $3
        and (status <> 'failed' or is_deleted) limit {MOST}) messages)
"""


@dataclass(frozen=True, slots=True)
class Status:
    """`at` is the device's last exchange, `cursor` what it has shown to have; `pending` it was not told yet."""

    now: datetime
    at: datetime | None
    cursor: Cursor | None
    pending: int


async def status(wall: Wall, user_id: str, device: str) -> Status:
    """What is known of a device; of an unknown one, that everything is pending."""
    async with wall.connection() as connection:
        head = await connection.fetchrow(_HEAD, user_id, device)
        assert head is not None
        known: dict[str, Any] = orjson.loads(head["known"] or b"{}")
        pending = await connection.fetchval(_PENDING, user_id, known.get("told", 0), device)
    at = datetime.fromtimestamp(known["at"] / 1000, UTC) if known else None
    cursor = Cursor(head["epoch"], known["has"]) if known.get("has") else None
    return Status(head["at"], at, cursor, pending)
