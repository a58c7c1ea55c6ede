"""What each route demands of whoever asks: the one table of it, and the check that no route is missing."""

from collections.abc import Mapping, Sequence
from typing import Literal

from starlette.routing import Route

from app.access.principal import Scope
from app.access.rates import Activity

Demand = Scope | Literal["public"]
# By method and path; with "?name", where the query has that name.
Demands = Mapping[tuple[str, str], Demand]

_DEMANDS: Demands = {
    ("POST", "/api/process-message"): "process",
    ("POST", "/api/upload-image"): "process",
    ("GET", "/api/conversation-config/{chatbot_id}"): "read",
    ("PUT", "/api/conversation-config/{chatbot_id}"): "admin",
    ("GET", "/api/stream-events/{stream_id}"): "read",
    ("GET", "/api/stream"): "read",
    ("POST", "/api/stream-events/{stream_id}/cancel"): "process",
    ("GET", "/api/sessions/{session_id}/queue"): "read",
    ("PATCH", "/api/sessions/{session_id}/queue/{message_id}"): "process",
    ("DELETE", "/api/sessions/{session_id}/queue/{message_id}"): "process",
    ("POST", "/api/sessions/{session_id}/queue/{message_id}/send-now"): "process",
    ("GET", "/api/messages/conversations"): "index",
    ("GET", "/conversations"): "index",
    ("GET", "/api/messages/conversations/events"): "index",
    ("GET", "/api/messages/conversations/{conversation_id}"): "index",
    ("GET", "/api/messages/statistics"): "index",
    ("GET", "/api/usage"): "read",
    ("POST", "/api/sync/init"): "admin",
    ("POST", "/api/sync/sync"): "admin",
    ("GET", "/api/sync/stats"): "index",
    ("DELETE", "/api/sync/index"): "admin",
    ("POST", "/api/sync/reset"): "admin",
    ("GET", "/api/discovery/status"): "admin",
    # Signed, by whoever has one of PARLEY_WEBHOOK_SECRETS.
    ("POST", "/api/webhooks/conversation-complete"): "public",
    ("POST", "/api/chat/sync"): "sync",
    ("GET", "/api/chat/sync"): "sync",
    ("DELETE", "/api/users/{user_id}"): "admin",
    ("GET", "/api/sync"): "sync",
    ("POST", "/api/sync"): "sync",
    ("GET", "/api/chats"): "sync",
    ("GET", "/api/chats/{chat_id}"): "sync",
    ("PATCH", "/api/chats/{chat_id}"): "sync",
    ("DELETE", "/api/chats/{chat_id}"): "sync",
    ("GET", "/api/chats/export"): "sync",
    ("POST", "/api/chats/import"): "sync",
    ("POST", "/api/chats/claim"): "sync",
    ("GET", "/api/chats/{chat_id}/export"): "sync",
    ("GET", "/api/chats/{chat_id}/messages"): "sync",
    ("POST", "/api/chats/{chat_id}/branch"): "sync",
    ("GET", "/api/chat/sync/events"): "sync",
    ("GET", "/api/chats/{chat_id}/versions"): "sync",
    ("POST", "/api/chats/{chat_id}/versions/{version}/restore"): "sync",
    ("GET", "/api/conversation-health"): "public",
    ("GET", "/livez"): "public",
    ("GET", "/readyz"): "public",
    ("GET", "/readyz?verbose"): "admin",
    ("GET", "/metrics"): "admin",
    ("GET", "/openapi.json"): "public",
    ("GET", "/docs"): "public",
}
# What is enough of a user's token, which reaches nobody else.
OF_USERS: Mapping[tuple[str, str], Scope] = {("DELETE", "/api/users/{user_id}"): "sync"}
# Where the token of a streaming URL is enough. Both may name no other streams than those of the tokens.
BY_TOKEN = frozenset({("GET", "/api/stream-events/{stream_id}"), ("GET", "/api/stream")})
# What a request that is no GET counts as, where it is not one of `changes`.
ACTIVITIES: Mapping[str, Activity] = {"/api/process-message": "messages", "/api/upload-image": "uploads"}
# What PARLEY_METRICS_OPEN opens.
_METRICS: Demands = {("GET", "/readyz?verbose"): "public", ("GET", "/metrics"): "public"}


def demands(*, metrics_open: bool = False) -> Demands:
    return {**_DEMANDS, **(_METRICS if metrics_open else {})}


def demands_of(route: Route, table: Demands) -> dict[str, Demand]:
    """What a route demands, by "METHOD" or "METHOD?name". Raises LookupError for a method that the table lacks."""
    if route.methods is None:
        raise LookupError(f"{route.path} takes any method; name those it takes")
    found = {}
    for (method, where), demand in table.items():
        path, mark, name = where.partition("?")
        if path == route.path:
            found[f"{method}{mark}{name}"] = demand
    if missing := route.methods - {"HEAD"} - found.keys():
        raise LookupError(f"{', '.join(sorted(missing))} {route.path} has no entry in app/access/demands.py")
    return found


def check(routes: Sequence[Route], table: Demands) -> None:
    """Raises LookupError for an entry without a route."""
    served = {(method, route.path) for route in routes for method in route.methods or ()}
    if idle := [entry for entry in table if (entry[0], entry[1].partition("?")[0]) not in served]:
        raise LookupError(f"app/access/demands.py has entries without a route: {idle}")
