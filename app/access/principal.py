"""Who asks, in one frozen value: everything behind the door sees this and no credentials."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args
from uuid import UUID

from app.errors import Forbidden, NotFound

# What somebody may do: send messages and stop answers, read them, what each other room is for, and everything.
Scope = Literal["process", "read", "index", "sync", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclass(frozen=True, slots=True)
class Daily:
    """How much of a UTC day; None: as much as it likes."""

    messages: int | None = None
    tokens: int | None = None

    @property
    def limited(self) -> bool:
        return self.messages is not None or self.tokens is not None


UNLIMITED = Daily()


@dataclass(frozen=True, slots=True)
class Principal:
    """`id` is for logs, limits and the scope of idempotency keys, and never a secret.

    `user_id`: the one user whom this is; None where it acts for any user, as whoever runs a back end does.
    `streams`: the only ones it may read; None: all of its user. `until`: when it ends, in seconds since 1970.
    `daily`: the quotas of its own, for API keys.
    """

    kind: Literal["open", "key", "user", "token"]
    id: str
    scopes: frozenset[Scope]
    user_id: str | None = None
    streams: frozenset[UUID] | None = None
    until: float | None = None
    daily: Daily = UNLIMITED

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes

    def require(self, scope: Scope) -> None:
        """Raises Forbidden naming the scope."""
        if not self.may(scope):
            raise Forbidden("scope_missing", f"This needs the scope {scope}: {_REMEDIES[self.kind]}.", scope=scope)

    def require_streams(self, asked: Collection[UUID]) -> None:
        """Raises NotFound for one that its token is not for, as for a stream that does not exist (A5)."""
        for stream_id in asked:
            if self.streams is not None and stream_id not in self.streams:
                raise NotFound("stream_unknown", f"There is no stream {stream_id}; POST /api/process-message says ids.")

    def acting_for(self, user_id: str | None) -> str | None:
        """The user whom a request is about, given the one it names; None: nobody in particular.

        Raises Forbidden where it names somebody else than the user who asks.
        """
        if self.user_id is None:
            return user_id
        if user_id is not None and user_id != self.user_id:
            raise Forbidden("user_mismatch", "user_id is not the user who is signed in; leave it out.")
        return self.user_id


_REMEDIES = {
    "open": "without authentication only who asks under a loopback address of the server's own machine is an admin",
    "key": "make a key that has it with `parley keys create`",
    "user": "ask whoever issues your token for it",
    "token": "the token of a streaming URL only reads its stream",
}
