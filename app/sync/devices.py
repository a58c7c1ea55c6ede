"""The devices that a user's row of `sync_head` knows: how far each is, and what became of its last push."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from app.errors import Conflict
from app.sync.exchange import Asked, Head

# Devices known per user, those that pushed last.
MOST_CLIENTS = 100
# Those of them that are told again what became of their last push, and of how many operations.
_TOLD_CLIENTS, _TOLD_OPS = 10, 100
# A device that hears nothing new is noted as seldom, in milliseconds.
_NOTED_MS = 60_000


def acked_of(head: Head, asked: Asked) -> int:
    """The last mutation of this device that is here. Raises Conflict where those sent do not follow on it."""
    known, acked = head.clients.get(asked.client), known_mid(head, asked)
    first = asked.push[0].mid
    if known is None and first != 1:
        detail = "The server does not know this device; take a new client id and count from 1."
        raise Conflict("unknown_client", detail)
    if first > acked + 1:
        raise Conflict("gap", f"Mutation {acked + 1} comes next.", expected=acked + 1)
    return acked


def known_mid(head: Head, asked: Asked) -> int:
    """The last mutation of this device that is here; 0 of one that the server does not know."""
    known = head.clients.get(asked.client)
    return known["mid"] if known else 0


def remember(head: Head, asked: Asked, results: Sequence[Mapping[str, Any]]) -> None:
    """How far this device is now, and for when it repeats itself what became of its push: of the first operations, as
    each exchange of the user reads it.
    """
    known = head.clients.get(asked.client, {})
    kept = {name: known[name] for name in ("told", "has") if name in known}
    head.clients[asked.client] = kept | {"mid": asked.push[-1].mid, "at": head.now_ms}
    if results and (few := _few(results)):
        head.clients[asked.client]["results"] = few
    _forget(head)


def _few(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    many = accumulate(len(result["ops"]) for result in results)
    return [result for result, so_many in zip(results, many, strict=True) if so_many <= _TOLD_OPS]


def noted(head: Head, client: str, given: Mapping[str, int]) -> bool:
    """Note what is new about a device; whether there was anything, or for how long there was not."""
    known = head.clients.get(client, {"mid": 0, "at": 0})
    if known | given == known and head.now_ms - known["at"] < _NOTED_MS:
        return False
    head.clients[client] = known | given | {"at": head.now_ms}
    _forget(head)
    return True


def _forget(head: Head) -> None:
    """Those that were silent for longest, or what became of their pushes."""
    if len(head.clients) > _TOLD_CLIENTS:
        latest = sorted(head.clients, key=lambda client: head.clients[client]["at"], reverse=True)
        for client in latest[_TOLD_CLIENTS:]:
            head.clients[client].pop("results", None)
        for client in latest[MOST_CLIENTS:]:
            del head.clients[client]
