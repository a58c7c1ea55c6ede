"""The table `audit`: what administrators did and which chats users deleted, by whom and when; written in the
transaction that does it.

A row is small and holds no secret: the name of what was changed, never what it was changed to.
"""

import os
import pwd
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Literal

from structlog.contextvars import get_contextvars

from app.expiry import Rows
from app.postgres import Connection
from app.text import redacted

Action = Literal[
    "chatbot.apply",
    "key.create",
    "key.revoke",
    "signing.renew",
    "secrets.rotate",
    "source.apply",
    "source.remove",
    "index.delete",
    "index.reset",
    "user.erase",
    "chat.delete",
    "chats.claim",
]

_NOTE = "insert into audit (actor, action, target, detail, request_id) values ($1, $2, $3, $4, $5)"
_LAST = "select at, actor, action, target, detail, request_id from audit order by at desc, id desc limit $1"
_LONGEST = 300


@dataclass(frozen=True, slots=True)
class Actor:
    """Who does it: the id of a principal, or `command:` and the account that runs `parley`."""

    id: str
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    at: datetime
    actor: str
    action: str
    target: str
    detail: str
    request_id: str | None


async def note(connection: Connection, actor: Actor, action: Action, *, target: str, detail: str = "") -> None:
    """To be called in the transaction of the action: neither is there without the other."""
    told = redacted(detail)[:_LONGEST]
    await connection.execute(_NOTE, actor.id, action, target[:_LONGEST], told, actor.request_id)


async def last(connection: Connection, most: int) -> Sequence[Entry]:
    """The newest first."""
    return [Entry(**row) for row in await connection.fetch(_LAST, most)]


def asker() -> Actor:
    """Whoever asks, as the door says it for the log: for what is done too far behind it to be told."""
    known = get_contextvars()
    return Actor(known.get("principal", "gateway"), known.get("request_id"))


def fingerprint(user_id: str) -> str:
    """What stands for a user whose name must not stay here: who knows the name can find it, nobody can read it off."""
    return f"user#{sha256(user_id.encode(errors='replace')).hexdigest()[:16]}"


def operator() -> Actor:
    """Whoever runs a command on this machine."""
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # as in a container with a number for a user
        name = str(os.getuid())
    return Actor(f"command:{name}")


def audit_expiring(keep_s: float) -> Rows:
    return Rows("audit", "at", keep_s)
