"""The door of every route: nobody gets behind it whom the table of demands does not let in."""

from collections.abc import Collection, Mapping, Sequence
from math import inf
from time import time
from typing import Any, TypedDict
from uuid import UUID

from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from app.access.credentials import Credentials
from app.access.demands import ACTIVITIES, BY_TOKEN, OF_USERS, Demand, Demands, check, demands_of
from app.access.limits import Limits, headers_of
from app.access.principal import Principal
from app.access.principal import Scope as Right
from app.access.rates import Activity
from app.errors import Invalid, Unauthorized
from app.text import clean
from app.wall import Reach, narrow, within

# Credentials that were no good, rather than none, or some that were good once.
_FAILURES = {"credentials_invalid", "token_invalid"}


class Needs(TypedDict):
    credentials: Credentials
    limits: Limits


def guard(routes: Sequence[Route], table: Demands) -> None:
    """Put a door before every route. Raises LookupError where the table and the routes are not the same."""
    check(routes, table)
    for route in routes:
        by_token, writes = ("GET", route.path) in BY_TOKEN, ACTIVITIES.get(route.path, "changes")
        of_users = {method: scope for (method, path), scope in OF_USERS.items() if path == route.path}
        route.app = _Door(route.app, demands_of(route, table), of_users, by_token=by_token, writes=writes)


class _Door:
    """ASGI. Asked before anything of the body is read."""

    def __init__(
        self,
        app: ASGIApp,
        demands: dict[str, Demand],
        of_users: Mapping[str, Right],
        *,
        by_token: bool,
        writes: Activity,
    ) -> None:
        self._app = app
        self._of_users = of_users
        self._writes: Activity = writes
        self._by_token = by_token
        self._demands = demands
        self._named = [name.partition("?") for name in demands if "?" in name]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        demand = self._demand(scope)
        if demand == "public":
            await self._app(scope, receive, send)
            return
        principal = scope["principal"] = await self._principal(scope)
        principal.require(self._of_users.get(scope["method"], demand) if principal.kind == "user" else demand)
        limits: Limits = scope["state"]["limits"]
        limits.count(scope, self._activity(scope), principal)
        reach = Reach(principal.user_id, principal.streams)
        with bound_contextvars(principal=principal.id), within(reach):
            await self._app(scope, receive, _telling(scope, send))

    async def _principal(self, scope: Scope) -> Principal:
        try:
            return await self._known(scope)
        except Unauthorized as refused:
            if refused.code in _FAILURES:
                limits: Limits = scope["state"]["limits"]
                limits.count_failure(scope)
            raise

    async def _known(self, scope: Scope) -> Principal:
        credentials: Credentials = scope["state"]["credentials"]
        # A word that is not in the query needs no parsing of it.
        if self._by_token and scope["method"] in ("GET", "HEAD") and b"token" in scope["query_string"]:
            tokens = ",".join(QueryParams(scope["query_string"]).getlist("token")).split(",")
            return await credentials.reader([token for token in tokens if token], scope["headers"])
        return await credentials.principal(scope["headers"])

    def _activity(self, scope: Scope) -> Activity:
        if scope["method"] not in ("GET", "HEAD"):
            return self._writes
        accept = next((value for name, value in scope["headers"] if name == b"accept"), b"")
        return "connects" if b"text/event-stream" in accept else "reads"

    def _demand(self, scope: Scope) -> Demand:
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        query = QueryParams(scope["query_string"]) if self._named else ()
        stricter = (self._demands[f"{of}?{name}"] for of, _, name in self._named if of == method and name in query)
        return next(stricter, self._demands[method])


def _telling(scope: Scope, send: Send) -> Send:
    """Say in an answer how much is left, unless it says so already: failures are answered elsewhere."""

    async def tell(message: Message) -> None:
        if message["type"] == "http.response.start":
            told = [(name.lower().encode(), value.encode()) for name, value in headers_of(scope).items()]
            message["headers"] = [*message["headers"], *told]
        await send(message)

    return tell


def principal_of(request: Request[Any]) -> Principal:
    """Who asks. Raises KeyError on a route that is public."""
    principal: Principal = request.scope["principal"]
    return principal


def acting_for(request: Request[Any], user_id: str | None) -> str | None:
    """The user whom a request is about, as `Principal.acting_for`; from here on it reaches nobody else's rows."""
    user_id = principal_of(request).acting_for(user_id)
    if user_id is not None:
        narrow(user_id)
    return user_id


def owner_of(request: Request[Any]) -> str | None:
    """Whose things the ids of a request may name: the user who asks, or whom `?user_id=` names; None: anybody's.

    Raises Invalid for an empty name, which would else be taken for nobody in particular.
    """
    given = request.query_params.getlist("user_id")
    if given and (len(given) > 1 or not given[0]):
        raise Invalid("invalid_request", "user_id is empty, or there twice; name one user, or leave it out.")
    return acting_for(request, clean(given[0]) if given else None)


def user_of(request: Request[Any]) -> str:
    """As `owner_of`, on a route about one user's things. Raises Invalid where nobody says whose."""
    user_id = owner_of(request)
    if user_id is None:
        raise Invalid("invalid_request", "user_id is missing: whose chats are they?")
    return user_id


def require_readable(request: Request[Any], stream_ids: Collection[UUID]) -> float:
    """For how many more seconds whoever asks may read these streams.

    Raises NotFound for one that the token of the request is not for.
    """
    principal = principal_of(request)
    principal.require_streams(stream_ids)
    return inf if principal.until is None else max(0.0, principal.until - time())
